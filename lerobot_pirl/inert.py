"""LeRobot's run options that do nothing under this recipe: none of them is ignored in silence."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from lerobot_pirl.rules import shown

_DATASET = "it belongs to training on a dataset; remove it"
_OPTIMIZER = "set algorithm.learning_rate, algorithm.betas and algorithm.weight_decay"

# option of LeRobot's run config -> what to do instead
INERT = {
    "dataset": "it learns from its own rollouts; remove it",
    "reward_model": "the environment gives the reward; remove it",
    "cudnn_deterministic": "remove it",
    "num_workers": _DATASET,
    "batch_size": "set algorithm.minibatch_size and algorithm.micro_batch_size",
    "prefetch_factor": _DATASET,
    "persistent_workers": _DATASET,
    "dataloader_multiprocessing_context": _DATASET,
    "eval_steps": _DATASET,
    "max_eval_samples": _DATASET,
    "tolerance_s": _DATASET,
    "use_policy_training_preset": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "eval": "evaluation uses algorithm.n_envs, algorithm.async_envs and eval.n_episodes; remove it",
    "peft": "the policy's own weights train; remove it",
    "job": "start the learner and the actor on the machine they shall run on",
    "save_checkpoint_to_hub": "upload a checkpoint's pretrained_model folder with `hf upload`",
    "sample_weighting": _DATASET,
    "rename_map": "the environment names the observations; remove it",
    "mixer": "there is no replay buffer; remove it",
    "online_ratio": "there is no replay buffer; remove it",
}
# values that say what happens anyway
_ALSO_FINE = {"eval.batch_size": 0, "job.target": "local"}
# what has an effect in a group of options that otherwise has none
_USED = ("eval.n_episodes",)


def refuse_inert(cfg: Any, recipe: str) -> None:
    """Refuse an option that would do nothing.

    The defaults pass: the ``train_config.json`` of a checkpoint spells them out.

    Raises:
        ValueError: one sentence with the option's full name, its value and what to use instead.
    """
    for option in fields(cfg):
        if option.name not in INERT:
            continue
        default = option.default if option.default_factory is MISSING else option.default_factory()
        for name, value, usual in _leaves(option.name, getattr(cfg, option.name), default):
            if name not in _USED and value != usual and (name not in _ALSO_FINE or value != _ALSO_FINE[name]):
                raise ValueError(
                    f"{name}={shown(value)} does nothing under recipe {recipe!r}; {INERT[option.name]}"
                )


def _leaves(name: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, value, default) of an option, or of every field of a group of options."""
    if not (is_dataclass(value) and type(value) is type(default)):
        yield name, value, default
        return
    for option in fields(value):
        yield f"{name}.{option.name}", getattr(value, option.name), getattr(default, option.name)
