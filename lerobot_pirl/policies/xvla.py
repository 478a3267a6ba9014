"""X-VLA: how LeRobot's unmodified ``XVLAPolicy`` encodes, denoises and executes under piRL.

The Florence-2 encoder is frozen, its features are computed once per observation; the policy transformer and the
soft prompts train. The action space is ``ee6d`` (20 channels): LIBERO executes the first arm, position in metres
0-2, 6-D rotation 3-8 and a gripper logit 9. The second arm's channels feed back into the network and are never
explored, and neither is the gripper before the last step: the network does not see it.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from lerobot_pirl import flow
from lerobot_pirl.noise import NoiseHead
from lerobot_pirl.policies.xvla_processors import LIBERO_DOMAIN_ID, make_processors
from lerobot_pirl.rules import refusal, shown

logger = logging.getLogger(__name__)

# far beyond any X-VLA
MAX_TOKENS, MAX_CAMERAS, MAX_PIXELS = 65536, 64, 4096
EE6D_WIDTH = 20
POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 9), 9


def _decode_in_float32(decoder: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    """Decode again without autocast (forward hook of the action decoder).

    bfloat16 rounds a position of 0.5 m to 2 mm, nearly the std of the last step: an update would move the mean
    by whole quanta, and with it the ratio.
    """
    hidden, domain_id = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        return decoder.forward(hidden.float(), domain_id)


def domain_tables(names: Iterable[str], use_hetero_proj: bool) -> list[str]:
    """Return the names of an X-VLA's weights that have a row per domain."""
    modules = ["soft_prompt_hub", "action_encoder", "action_decoder"]
    if use_hetero_proj:
        modules += ["vlm_proj", "aux_visual_proj"]
    return [name for name in names if any(f".{module}." in name for module in modules)]


def _check_sizes(policy: Any) -> None:
    """Refuse sizes that would take an hour, or all memory, to find out about."""
    sequence = min(policy.max_len_seq, MAX_TOKENS)
    limits = {
        "max_len_seq": MAX_TOKENS,
        "chunk_size": sequence,
        "tokenizer_max_length": sequence,
        "empty_cameras": MAX_CAMERAS,
        "num_image_views": MAX_CAMERAS,
    }
    for name, limit in limits.items():
        if (getattr(policy, name) or 0) > limit:
            raise refusal(f"policy.{name}", getattr(policy, name), f"at most {limit}")
    if (
        policy.resize_imgs_with_padding is not None
        and max(policy.resize_imgs_with_padding, default=0) > MAX_PIXELS
    ):
        raise refusal(
            "policy.resize_imgs_with_padding",
            policy.resize_imgs_with_padding,
            f"two integers up to {MAX_PIXELS}",
        )
    layer = (4 + 2 * abs(policy.mlp_ratio)) * policy.hidden_size
    domain = policy.len_soft_prompts + 2 * policy.max_action_dim + policy.max_state_dim + policy.dim_time
    numbers = policy.hidden_size * (policy.depth * layer + policy.num_domains * domain)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 4 * numbers <= memory:
        raise ValueError(
            f"policy.hidden_size={policy.hidden_size}, policy.depth={policy.depth}, policy.mlp_ratio={policy.mlp_ratio}, "
            f"policy.num_domains={policy.num_domains} and policy.len_soft_prompts={policy.len_soft_prompts} take about "
            f"{4 * numbers / 2**30:.3g} GiB, more than the {memory / 2**30:.3g} GiB of this machine; lower them"
        )


class XVLAAdapter:
    """piRL's view of an ``XVLAPolicy`` (see :class:`lerobot_pirl.policies.base.PolicyAdapter`)."""

    @staticmethod
    def validate(cfg: Any) -> None:
        """Refuse run configs that X-VLA cannot run in a LIBERO-shaped environment, or nobody's machine."""
        policy = cfg.policy
        _check_sizes(policy)
        if policy.action_mode != "ee6d":
            raise ValueError(
                f"policy.action_mode={policy.action_mode!r} is not supported; X-VLA under piRL runs with 'ee6d'"
            )
        if not policy.use_proprio or policy.max_state_dim < EE6D_WIDTH:
            raise ValueError(
                f"policy.use_proprio={policy.use_proprio} and policy.max_state_dim={policy.max_state_dim} leave no room for "
                f"the {EE6D_WIDTH} numbers of 'ee6d'; set policy.use_proprio to true and policy.max_state_dim to "
                f"{EE6D_WIDTH} or more"
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
        self.position_index = POSITION
        self.gripper_temperature = algorithm.resolved_gripper_temperature
        # a bfloat16 policy trains under autocast on float32 weights: steps of 1e-6 would vanish in bfloat16
        self.dtype = self.model._get_target_dtype()
        self.model.transformer.float()
        if self.dtype == torch.bfloat16:
            self.model.transformer.action_decoder.register_forward_hook(_decode_in_float32)
        self.device = next(self.model.transformer.parameters()).device
        self.noise_head = self._make_noise_head(algorithm) if algorithm.variant == "flow_noise" else None
        self.noise_std = self._noise_table(algorithm).to(self.device)
        vlm_dim = policy.config.get_florence_config().vision_config.projection_dim
        self.value_input_dim = 2 * vlm_dim + self.model.dim_proprio
        self.processors = make_processors(policy.config, cfg.env)

    def _make_noise_head(self, algorithm: Any) -> NoiseHead:
        """Return a noise head, and see to it that the action decoder's input is kept for it."""
        groups = {
            "position": (POSITION, algorithm.noise_std_position),
            "rotation": (ROTATION, algorithm.noise_std_rotation),
        }
        transformer = self.model.transformer
        transformer.action_decoder.register_forward_pre_hook(self._keep_hidden)
        return NoiseHead(
            transformer.hidden_size,
            algorithm.noise_head_hidden_dims,
            groups,
            self.model.dim_action,
            algorithm.n_action_steps,
        ).to(self.device)

    def _keep_hidden(self, decoder: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self._hidden = inputs[0]

    def _noise_table(self, algorithm: Any) -> Tensor:
        if self.noise_head is not None:
            return self.noise_head.upper_bound(algorithm.num_denoising_steps, self.model.chunk_size)
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
        """Return the frozen encoder's features ``[B, tokens, width]``, proprio ``[B, P]`` and domain ``[B]``.

        Views without a camera come last and are zeros: of them ``empty_views`` keeps the number of tokens alone,
        ``[B, tokens, 0]``.
        """
        inputs = self.policy._build_model_inputs(batch)
        features = self.model.forward_vlm(
            inputs["input_ids"], inputs["image_input"].to(self.dtype), inputs["image_mask"]
        )
        auxiliary, (_, *others) = features["aux_visual_inputs"], inputs["image_mask"][0].tolist()
        seen = auxiliary.shape[1] * sum(others) // max(1, len(others))
        return {
            "vlm_features": features["vlm_features"],
            "aux_visual_inputs": auxiliary[:, :seen],
            "empty_views": auxiliary[:, seen:, :0],
            "proprio": inputs["proprio"].to(self.dtype),
            "domain_id": inputs["domain_id"].to(self.device),
        }

    def check_features(self, features: dict[str, Tensor]) -> None:
        """Raise ValueError for features that :meth:`encode` cannot have made."""
        transformer, num_domains = self.model.transformer, self.policy.config.num_domains
        room = transformer.pos_emb.shape[1] - self.model.chunk_size
        width = self.policy.config.get_florence_config().vision_config.projection_dim
        shapes = {name: tuple(value.shape[1:]) for name, value in features.items()}
        views = ("vlm_features", "aux_visual_inputs", "empty_views")
        vlm, aux, empty = (shapes.get(name, ()) for name in views)
        # the pooled view needs a token of the first, the sequence has room for so many of all
        tokens_fit = (
            len(vlm) == len(aux) == len(empty) == 2 and 1 <= vlm[0] <= vlm[0] + aux[0] + empty[0] <= room
        )
        wanted = dict(zip(views, ((*vlm[:1], width), (*aux[:1], width), (*empty[:1], 0)), strict=True))
        if not tokens_fit or shapes != wanted | {"proprio": (self.model.dim_proprio,), "domain_id": ()}:
            raise ValueError(
                f"rollout: features have rows of shapes {shown(shapes)}, which this policy does not make; start the actor "
                "with the learner's config"
            )
        for name, value in features.items():
            if name != "domain_id" and not value.is_floating_point():
                raise ValueError(f"rollout: features.{name} is {value.dtype} instead of floating point")
        domain = features["domain_id"]
        if domain.dtype != torch.int64 or ((domain < 0) | (domain >= num_domains)).any():
            raise ValueError(
                f"rollout: features.domain_id is {domain.dtype} with {shown(domain.unique().tolist())}, but must be int64 "
                f"from 0 to {num_domains - 1}"
            )

    def predict_x0(self, features: dict[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean chunk (gripper channels as logits), float32 ``[B, H, D]``."""
        proprio, x_t = self.model.action_space.preprocess(features["proprio"].float(), x_t)
        bfloat16 = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            x0_pred = self.model.transformer(
                domain_id=features["domain_id"],
                vlm_features=features["vlm_features"],
                aux_visual_inputs=_auxiliary_views(features),
                action_with_noise=x_t,
                proprio=proprio,
                t=t,
            )
        return x0_pred.float()

    def predict_x0_and_std(
        self, features: dict[str, Tensor], x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted clean chunk and the std that the noise head reads off the same hidden features."""
        x0_pred = self.predict_x0(features, x_t, t)
        hidden, self._hidden = self._hidden, None
        return x0_pred, self.noise_head(hidden)

    def value_input(self, features: dict[str, Tensor]) -> Tensor:
        """Return pooled primary and auxiliary view features and the raw proprio, float32 ``[B, F]``."""
        primary = features["vlm_features"].float().mean(dim=1)
        auxiliary = _auxiliary_views(features).float()
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
        names = [name for name, _ in self.policy.named_parameters()]
        return set(domain_tables(names, self.policy.config.use_hetero_proj))

    def bfloat16_inputs(self) -> set[str]:
        """Return the parameters of the transformer's linear layers, which autocast rounds in every forward pass."""
        if self.dtype != torch.bfloat16:
            return set()
        layers = self.model.transformer.named_modules(prefix="model.transformer")
        linear = [(name, module) for name, module in layers if isinstance(module, nn.Linear)]
        return {f"{name}.{each}" for name, module in linear for each, _ in module.named_parameters()}


def _auxiliary_views(features: dict[str, Tensor]) -> Tensor:
    """Return the tokens of all views but the first, those without a camera included."""
    return F.pad(features["aux_visual_inputs"], (0, 0, 0, features["empty_views"].shape[1]))
