"""X-VLA: how LeRobot's unmodified ``XVLAPolicy`` encodes, denoises and executes under piRL.

The Florence-2 encoder is frozen, its features are computed once per observation; the policy transformer and the
soft prompts train. The action space is ``ee6d`` (20 channels): LIBERO executes the first arm, position in metres
0-2, 6-D rotation 3-8 and a gripper logit 9. The second arm's channels feed back into the network and are never
explored, and neither is the gripper before the last step: the network does not see it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.policies.xvla.processor_xvla import (
    XVLAAddDomainIdProcessorStep,
    XVLAImageNetNormalizeProcessorStep,
    XVLAImageScaleProcessorStep,
    XVLAImageToFloatProcessorStep,
    XVLARotation6DToAxisAngleProcessorStep,
    make_xvla_pre_post_processors,
)
from lerobot.processor import (
    PolicyProcessorPipeline,
    TokenizerProcessorStep,
)
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from lerobot_pirl import flow

logger = logging.getLogger(__name__)

LIBERO_DOMAIN_ID = 3
POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 9), 9
# the tiny configs' tokenizer; the same name is a folder of a clone, so stock LeRobot finds it there too
PACKAGED_TOKENIZER = "lerobot_pirl/tokenizer"


@dataclass(frozen=True)
class Processors:
    """The four pipelines between a LIBERO-shaped environment and the policy, as ``lerobot-eval`` chains them."""

    env_pre: PolicyProcessorPipeline
    policy_pre: PolicyProcessorPipeline
    policy_post: PolicyProcessorPipeline
    env_post: PolicyProcessorPipeline


def resolve_tokenizer(name: str) -> str:
    """Return where a tokenizer is loaded from: the packaged one by its name, anything else unchanged."""
    if name == PACKAGED_TOKENIZER:
        return str(Path(__file__).parent.parent / "tokenizer")
    return name


def _scratch_policy_pipelines(config: Any) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Build the policy pipelines of a policy that has no saved ones.

    LeRobot's own are made for dataset frames; behind the LIBERO environment pipeline they would scale and
    normalise the images a second time, so those steps go and the domain is LIBERO's.
    """
    tokenizer_name = config.tokenizer_name
    config.tokenizer_name = resolve_tokenizer(tokenizer_name)
    try:
        pre, post = make_xvla_pre_post_processors(config)
    finally:
        config.tokenizer_name = tokenizer_name
    image_steps = (XVLAImageToFloatProcessorStep, XVLAImageNetNormalizeProcessorStep)
    pre.steps = [step for step in pre.steps if not isinstance(step, image_steps)]
    for step in pre.steps:
        if isinstance(step, XVLAAddDomainIdProcessorStep):
            step.domain_id = LIBERO_DOMAIN_ID
    return pre, post


def make_processors(policy_cfg: Any, env_cfg: Any) -> Processors:
    """Build the pipelines, from the checkpoint where there is one, and check that every step occurs once.

    Raises:
        ValueError: when images would be normalised never or twice or scaled again, no tokenizer is there,
            rotations are not converted once, or the domain that reaches the network is not LIBERO's.
    """
    env_pre, env_post = make_env_pre_post_processors(env_cfg, policy_cfg)
    if policy_cfg.pretrained_path:
        overrides = {"device_processor": {"device": str(policy_cfg.device)}}
        if policy_cfg.tokenizer_name == PACKAGED_TOKENIZER:
            overrides["tokenizer_processor"] = {"tokenizer_name": resolve_tokenizer(PACKAGED_TOKENIZER)}
        try:
            pre, post = make_pre_post_processors(
                policy_cfg,
                pretrained_path=str(policy_cfg.pretrained_path),
                pretrained_revision=policy_cfg.pretrained_revision,
                preprocessor_overrides=overrides,
            )
        except KeyError as error:
            raise ValueError(
                f"the processors of {policy_cfg.pretrained_path} lack a step that X-VLA needs; fix "
                f"policy_preprocessor.json beside the weights: {error}"
            ) from error
    else:
        pre, post = _scratch_policy_pipelines(policy_cfg)
    processors = Processors(env_pre, pre, post, env_post)
    _check_steps(processors, policy_cfg.pretrained_path or "a policy built from scratch")
    return processors


def _check_steps(processors: Processors, source: Any) -> None:
    before = [*processors.env_pre.steps, *processors.policy_pre.steps]
    after = [*processors.policy_post.steps, *processors.env_post.steps]
    # LeRobot's environment observations are in [0, 1] already
    expected = [
        ("image normalisation (xvla_imagenet_normalize)", XVLAImageNetNormalizeProcessorStep, before, 1),
        ("image scaling (xvla_image_scale)", XVLAImageScaleProcessorStep, before, 0),
        ("image scaling (xvla_image_to_float)", XVLAImageToFloatProcessorStep, before, 0),
        ("tokenizer (tokenizer_processor)", TokenizerProcessorStep, before, 1),
        (
            "rotation conversion (xvla_rotation_6d_to_axis_angle)",
            XVLARotation6DToAxisAngleProcessorStep,
            after,
            1,
        ),
    ]
    for label, step_type, steps, wanted in expected:
        count = sum(isinstance(step, step_type) for step in steps)
        if count != wanted:
            raise ValueError(
                f"the processors of {source} hold the step '{label}' {count} times together with the "
                f"environment's, but it must {'occur exactly once' if wanted else 'not occur'}; fix "
                "policy_preprocessor.json or policy_postprocessor.json beside the weights"
            )
    domains = [step.domain_id for step in before if isinstance(step, XVLAAddDomainIdProcessorStep)]
    if not domains or domains[-1] != LIBERO_DOMAIN_ID:
        raise ValueError(
            f"the processors of {source} send domain_id {domains[-1] if domains else None} to X-VLA, but LIBERO "
            f"is domain {LIBERO_DOMAIN_ID}; set it in the step xvla_add_domain_id of policy_preprocessor.json"
        )


def _decode_in_float32(decoder: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    """Decode again without autocast (forward hook of the action decoder).

    bfloat16 rounds a position of 0.5 m to 2 mm, nearly the std of the last step: an update would move the mean
    by whole quanta, and with it the ratio.
    """
    hidden, domain_id = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        return decoder.forward(hidden.float(), domain_id)


class XVLAAdapter:
    """piRL's view of an ``XVLAPolicy`` (see :class:`lerobot_pirl.policies.base.PolicyAdapter`)."""

    @staticmethod
    def validate(cfg: Any) -> None:
        """Refuse run configs that X-VLA cannot run in a LIBERO-shaped environment."""
        policy = cfg.policy
        if policy.action_mode != "ee6d":
            raise ValueError(
                f"policy.action_mode={policy.action_mode!r} is not supported; X-VLA under piRL runs with 'ee6d'"
            )
        if policy.use_peft:
            raise ValueError(
                "policy.use_peft=True is not supported; merge the PEFT adapter into the weights and set it to False"
            )
        if policy.use_amp:
            raise ValueError(
                "policy.use_amp=True is not supported; set policy.dtype to 'bfloat16' to train under autocast"
            )
        obs_type = getattr(cfg.env, "obs_type", "pixels_agent_pos")
        if obs_type != "pixels_agent_pos":
            raise ValueError(
                f"env.obs_type={obs_type!r} lacks the robot state that X-VLA reads; "
                "set env.obs_type to 'pixels_agent_pos'"
            )
        control_mode = getattr(cfg.env, "control_mode", "absolute")
        if control_mode != "absolute":
            raise ValueError(
                f"env.control_mode={control_mode!r} makes X-VLA's absolute poses wrong; "
                "set env.control_mode to 'absolute'"
            )
        if cfg.algorithm.n_action_steps > policy.chunk_size:
            raise ValueError(
                f"algorithm.n_action_steps={cfg.algorithm.n_action_steps} exceeds policy.chunk_size="
                f"{policy.chunk_size}; lower algorithm.n_action_steps"
            )
        if policy.num_domains <= LIBERO_DOMAIN_ID:
            raise ValueError(
                f"policy.num_domains={policy.num_domains} has no row for LIBERO's domain {LIBERO_DOMAIN_ID}; "
                f"use {LIBERO_DOMAIN_ID + 1} or more"
            )

    def __init__(self, policy: XVLAPolicy, cfg: Any) -> None:
        """Freeze the encoder and prepare the noise.

        Args:
            policy: the policy, on its device.
            cfg: the validated run config.
        """
        algorithm = cfg.algorithm
        self.policy = policy
        self.model = policy.model
        # the saved config.json must carry the grid and the executed chunk the weights are tuned for
        for name in ("num_denoising_steps", "n_action_steps"):
            value, former = getattr(algorithm, name), getattr(policy.config, name)
            if value != former:
                logger.info("algorithm.%s=%s takes the place of policy.%s=%s", name, value, name, former)
                setattr(policy.config, name, value)
        policy.reset()
        policy.eval()
        for parameter in self.model.vlm.parameters():
            parameter.requires_grad_(False)
        self.n_action_steps = algorithm.n_action_steps
        self.gripper_index = GRIPPER
        self.gripper_temperature = algorithm.resolved_gripper_temperature
        # a bfloat16 policy trains under autocast on float32 weights: steps of 1e-6 would vanish in bfloat16
        self.dtype = self.model._get_target_dtype()
        self.model.transformer.float()
        if self.dtype == torch.bfloat16:
            self.model.transformer.action_decoder.register_forward_hook(_decode_in_float32)
        self.device = next(self.model.transformer.parameters()).device
        self.noise_std = self._noise_table(algorithm).to(self.device)
        vlm_dim = policy.config.get_florence_config().vision_config.projection_dim
        self.value_input_dim = 2 * vlm_dim + self.model.dim_proprio
        self.processors = make_processors(policy.config, cfg.env)

    def _noise_table(self, algorithm: Any) -> Tensor:
        steps = flow.flow_sde_std(algorithm.noise_level, algorithm.num_denoising_steps)
        early = torch.zeros(len(steps), self.model.dim_action)
        last = torch.zeros(self.model.dim_action)
        early[:, POSITION] = early[:, ROTATION] = steps[:, None]
        last[POSITION] = algorithm.last_step_std_position
        last[ROTATION] = algorithm.last_step_std_rotation
        return flow.noise_table(early, last, algorithm.n_action_steps, self.model.chunk_size)

    def prepare_observation(self, observation: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
        """Run raw vector-environment observations through LeRobot's two pre-processing pipelines."""
        batch = preprocess_observation(observation)
        batch["task"] = tasks
        return self.processors.policy_pre(self.processors.env_pre(batch))

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the frozen encoder's features ``[B, tokens, width]``, proprio ``[B, P]`` and domain ``[B]``."""
        inputs = self.policy._build_model_inputs(batch)
        features = self.model.forward_vlm(
            inputs["input_ids"], inputs["image_input"].to(self.dtype), inputs["image_mask"]
        )
        return {
            **features,
            "proprio": inputs["proprio"].to(self.dtype),
            "domain_id": inputs["domain_id"].to(self.device),
        }

    def predict_x0(self, features: dict[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean chunk (gripper channels as logits), float32 ``[B, H, D]``."""
        proprio, x_t = self.model.action_space.preprocess(features["proprio"].float(), x_t)
        bfloat16 = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            x0_pred = self.model.transformer(
                domain_id=features["domain_id"],
                vlm_features=features["vlm_features"],
                aux_visual_inputs=features["aux_visual_inputs"],
                action_with_noise=x_t,
                proprio=proprio,
                t=t,
            )
        return x0_pred.float()

    def value_input(self, features: dict[str, Tensor]) -> Tensor:
        """Return pooled primary and auxiliary view features and the raw proprio, float32 ``[B, F]``."""
        primary = features["vlm_features"].float().mean(dim=1)
        auxiliary = features["aux_visual_inputs"].float()
        pooled = auxiliary.mean(dim=1) if auxiliary.shape[1] else torch.zeros_like(primary)
        return torch.cat([primary, pooled, features["proprio"].float()], dim=1).detach()

    def execute(self, x_0: Tensor, gripper: Tensor | None) -> Tensor:
        """Return the executed rows as X-VLA postprocesses them: gripper in [0, 1], bits where given."""
        # postprocess writes into its argument
        actions = self.model.action_space.postprocess(x_0[:, : self.n_action_steps].clone())
        if gripper is not None:
            actions[..., GRIPPER] = gripper.to(actions.dtype)
        return actions

    def environment_actions(self, actions: Tensor) -> Tensor:
        """Return LIBERO's 7-D actions (position, axis-angle, gripper -1/+1), float32 ``[B, A, 7]`` on the CPU."""
        rows = self.processors.policy_post(actions.flatten(0, 1))
        rows = self.processors.env_post({ACTION: rows})[ACTION]
        return rows.unflatten(0, actions.shape[:2]).cpu()

    def no_decay(self) -> set[str]:
        """Return the trainable parameters that weight decay must not touch.

        Tables with one row per domain: decay would shrink the rows of the domains that are not trained.
        """
        tables = ("soft_prompt_hub", "action_encoder", "action_decoder")
        hetero = ("vlm_proj", "aux_visual_proj") if self.policy.config.use_hetero_proj else ()
        return {
            name
            for name, _ in self.policy.named_parameters()
            if any(f".{table}." in name for table in (*tables, *hetero))
        }
