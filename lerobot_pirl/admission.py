"""Whether the policy of a run can have made a rollout: shapes and ranges, before an update trips over them."""

from torch import Tensor

from lerobot_pirl.policies.base import PolicyAdapter, noise_head
from lerobot_pirl.rollout import Rollout


def check(rollout: Rollout, adapter: PolicyAdapter) -> None:
    """Raise ValueError with one sentence when an update could not read a rollout.

    Args:
        rollout: checked in itself already, see :meth:`Rollout.check`.
        adapter: of the policy; one without ``check_features`` has its features not looked at.
    """
    num_steps, num_rows, num_channels = adapter.noise_std.shape
    stored = 1 if noise_head(adapter) is None else num_steps
    bits = 0 if adapter.gripper_index is None else adapter.n_action_steps
    _check_shape("chain", rollout.chain, (stored + 1, num_rows, num_channels))
    _check_shape("step_index", rollout.step_index, (stored,))
    _check_shape("log_prob", rollout.log_prob, (stored,))
    _check_shape("gripper", rollout.gripper, (bits,))
    _check_range("step_index", rollout.step_index, num_steps - 1)
    _check_range("gripper", rollout.gripper, 1)
    check_features = getattr(adapter, "check_features", None)
    if check_features is not None:
        check_features(rollout.features)
        check_features(rollout.final_features)


def _check_shape(name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    if value.shape[1:] != wanted:
        raise ValueError(
            f"rollout: {name} has rows of shape {tuple(value.shape[1:])}, this policy makes {wanted}; start the actor with "
            "the learner's config"
        )


def _check_range(name: str, value: Tensor, highest: int) -> None:
    if value.numel() and not 0 <= value.min() <= value.max() <= highest:
        raise ValueError(
            f"rollout: {name} goes from {int(value.min())} to {int(value.max())}, but must lie in 0 to {highest}"
        )
