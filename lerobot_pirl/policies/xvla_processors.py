"""The processors around X-VLA in a LIBERO-shaped environment, checked for what goes wrong with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.xvla.processor_xvla import (
    XVLAAddDomainIdProcessorStep,
    XVLAImageNetNormalizeProcessorStep,
    XVLAImageScaleProcessorStep,
    XVLAImageToFloatProcessorStep,
    XVLARotation6DToAxisAngleProcessorStep,
    make_xvla_pre_post_processors,
)
from lerobot.processor import PolicyProcessorPipeline, TokenizerProcessorStep

LIBERO_DOMAIN_ID = 3
# what LeRobot's LIBERO pipeline has done to images before the policy's own pipeline sees them
IMAGE_STEPS = (XVLAImageToFloatProcessorStep, XVLAImageNetNormalizeProcessorStep)
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
    pre.steps = [step for step in pre.steps if not isinstance(step, IMAGE_STEPS)]
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
                "policy_preprocessor.json or policy_postprocessor.json beside the weights; for a policy that was trained "
                "on a dataset, `lerobot-pirl prepare` does"
            )
    (tokenizer,) = (step for step in before if isinstance(step, TokenizerProcessorStep))
    if tokenizer.padding != "max_length":
        raise ValueError(
            f"the tokenizer of {source} pads to {tokenizer.padding!r}, so that what runs beside an episode would change it; "
            "set policy.pad_language_to, or padding in the step tokenizer_processor of policy_preprocessor.json, to "
            "'max_length'"
        )
    domains = [step.domain_id for step in before if isinstance(step, XVLAAddDomainIdProcessorStep)]
    if not domains or domains[-1] != LIBERO_DOMAIN_ID:
        raise ValueError(
            f"the processors of {source} send domain_id {domains[-1] if domains else None} to X-VLA, but LIBERO "
            f"is domain {LIBERO_DOMAIN_ID}; set it in the step xvla_add_domain_id of policy_preprocessor.json"
        )
