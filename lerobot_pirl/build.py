"""What learner and actor both build from a run config: environments' metadata, policy, adapter."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import parser
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.policies.factory import make_policy
from lerobot.utils.random_utils import set_seed

from lerobot_pirl import checkpoint, folders, registry, rules
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.metadata import Metadata, flat_options, make_metadata
from lerobot_pirl.parallel import World
from lerobot_pirl.policies.base import PolicyAdapter, noise_head

logger = logging.getLogger(__name__)
# what a resume sets by itself
_NOT_OVERRIDES = ("resume", "checkpoint_path", "policy.pretrained_path", "accept_changes")


def make_adapter(cfg: Any) -> PolicyAdapter:
    """Build the policy and its adapter.

    Both processes seed alike first: the frozen part of a policy without pretrained weights is drawn at random
    and never sent.
    """
    adapter_class = registry.policy_adapter(cfg.policy.type)
    adapter_class.validate(cfg)
    _share_cores(cfg.algorithm)
    if cfg.policy.pretrained_path and Path(cfg.policy.pretrained_path).is_dir():
        _check_weights(Path(cfg.policy.pretrained_path))
    set_seed(cfg.seed)
    try:
        policy = make_policy(cfg.policy, env_cfg=cfg.env)
    except (AssertionError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        # sizes that do not go together are found deep inside the policy; torch gives each tensor a line
        reason = rules.shown(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}")
        weights = cfg.policy.pretrained_path
        what = f"the weights in {weights} do not fit" if weights else "no policy can be built from"
        raise ValueError(f"{what} the options under `policy` ({reason}); correct them") from error
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "the options under `policy` leave nothing to train, such as train_policy_transformer=False"
        )
    adapter = adapter_class(policy, cfg)
    if cfg.algorithm.variant == "flow_noise" and noise_head(adapter) is None:
        raise ValueError(
            f"algorithm.variant='flow_noise' needs a noise head, which the adapter of policy.type={cfg.policy.type!r} "
            "does not offer; set algorithm.variant to 'flow_sde'"
        )
    return adapter


def _share_cores(algorithm: Any) -> None:
    """Compute with half the threads where learner and actor work at once on one machine, unless the user has chosen."""
    at_once = algorithm.max_staleness > 0 and rules.is_loopback(algorithm.wire.host)
    if at_once and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        logger.info(
            "computing with %d threads: learner and actor work at once; OMP_NUM_THREADS decides otherwise",
            torch.get_num_threads(),
        )


def make_algorithm(cfg: Any, world: World) -> PiRLAlgorithm:
    """Build the policy and what trains it, in one of the processes that do so together."""
    return PiRLAlgorithm(make_adapter(cfg), cfg.algorithm, cfg.seed, cfg.scheduler, cfg.steps, world)


def _check_weights(folder: Path) -> None:
    """Refuse a local policy without weights, or one of our checkpoints whose files have changed."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"policy.path={folder} holds no model.safetensors; name a pretrained_model folder")
    if (folder.parent / folders.DIGESTS_FILE).is_file():
        checkpoint.verify(folder.parent, f"{folder.name}/")


def log_overrides(cfg: Any) -> None:
    """Log which options of a resumed run are not what its checkpoint was written with."""
    path = Path(cfg.policy.pretrained_path) / TRAIN_CONFIG_NAME
    before, now = flat_options(json.loads(path.read_text())), flat_options(draccus.encode(cfg))
    for name in now:
        if name in before and now[name] != before[name] and name not in _NOT_OVERRIDES:
            logger.info("override: %s is %s instead of the checkpoint's %s", name, now[name], before[name])


def describe_run(cfg: Any, adapter: PolicyAdapter, run_id: str) -> Metadata:
    """Return this process's metadata."""
    return make_metadata(cfg, adapter, parser.parse_arg("config_path"), run_id)
