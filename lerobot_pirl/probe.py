"""How far an update moves what the policy does, in millimetres: a size to judge a learning rate by."""

import torch
from torch import Tensor

from lerobot_pirl.policies.base import PolicyAdapter, native_actions
from lerobot_pirl.rollout import Rollout, derive_seed

_ROWS = 16
# stands where collection has the policy's version, which never gets there
_TAG = int.from_bytes(b"probe")


def positions(adapter: PolicyAdapter, rollout: Rollout, seed: int) -> Tensor | None:
    """Return the positions that the policy executes without noise, ``[B, A, 3]`` in the adapter's metres.

    Before and after an update they differ by the weights alone: the observations are spread evenly over the rollout,
    and each is denoised from the same start every time. So no state is kept, and a resumed run finds the same.

    Args:
        adapter: the policy with the weights it has now; one without ``position_index`` gives None.
        rollout: what the update learns from.
        seed: seed of the run.
    """
    index = getattr(adapter, "position_index", None)
    if index is None:
        return None
    rows = torch.linspace(0, len(rollout) - 1, min(_ROWS, len(rollout))).long()
    device = adapter.noise_std.device
    features = {name: value[rows].to(device) for name, value in rollout.features.items()}
    generators = [torch.Generator().manual_seed(derive_seed(seed, _TAG, i)) for i in range(len(rows))]
    return native_actions(adapter, features, generators)[..., index].cpu()


def change_mm(before: Tensor | None, after: Tensor | None) -> dict[str, float]:
    """Return the mean distance between two sets of positions as a number to log; nothing where there are none."""
    if before is None or after is None:
        return {}
    return {"train/action_change_mm": 1000 * float((after - before).norm(dim=-1).mean())}
