"""The measured change of what the policy does."""

import pytest
import torch

from lerobot_pirl import probe
from tests.test_algorithm import make_rollout
from tests.toy import tiny_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def adapter():
    return tiny_adapter()


def shift_positions(adapter, metres: float) -> None:
    """Let the policy predict all positions so far from where it did, along the first axis."""
    predict = adapter.predict_x0

    def shifted(features, x_t, t):
        x_0 = predict(features, x_t, t).clone()
        x_0[..., 0] += metres
        # what the network would make of its own shifted input is left out
        return x_0

    adapter.predict_x0 = shifted


def test_an_update_that_changes_nothing_moves_nothing(adapter):
    rollout = make_rollout(adapter)
    before, after = (probe.positions(adapter, rollout, 1000) for _ in range(2))
    assert before.shape == (len(rollout), adapter.n_action_steps, 3)
    assert probe.change_mm(before, after) == {"train/action_change_mm": 0.0}


def test_a_move_is_told_in_millimetres(adapter):
    before = torch.zeros(2, 4, 3)
    after = before + torch.tensor([0.003, 0.0, 0.004])
    assert probe.change_mm(before, after) == {"train/action_change_mm": pytest.approx(5.0)}


def test_other_weights_move_positions_and_another_seed_looks_elsewhere(adapter):
    rollout = make_rollout(adapter)
    before, elsewhere = (probe.positions(adapter, rollout, seed) for seed in (1000, 1001))
    assert not torch.equal(before, elsewhere)
    shift_positions(adapter, 0.01)
    assert probe.change_mm(before, probe.positions(adapter, rollout, 1000))["train/action_change_mm"] > 5


def test_the_gripper_and_rotations_are_no_positions(adapter):
    rollout = make_rollout(adapter)
    execute = adapter.execute
    before = probe.positions(adapter, rollout, 1000)

    def turned(x_0, gripper):
        actions = execute(x_0, gripper)
        actions[..., 3:] += 1
        return actions

    adapter.execute = turned
    assert torch.equal(before, probe.positions(adapter, rollout, 1000))


def test_a_large_rollout_is_looked_at_from_its_first_to_its_last_chunk(adapter, monkeypatch):
    rollout = make_rollout(adapter)
    seen = []

    def spy(adapter, features, generators):
        seen.append(features["proprio"])
        return torch.zeros(len(generators), 4, 20)

    monkeypatch.setattr(probe, "native_actions", spy)
    monkeypatch.setattr(probe, "_ROWS", 3)
    probe.positions(adapter, rollout, 1000)
    rows = [0, (len(rollout) - 1) // 2, len(rollout) - 1]
    assert torch.equal(seen[0], rollout.features["proprio"][rows])


def test_the_random_state_is_left_alone(adapter):
    rollout = make_rollout(adapter)
    before = torch.get_rng_state()
    probe.positions(adapter, rollout, 1000)
    assert torch.equal(before, torch.get_rng_state())


def test_an_adapter_that_knows_no_positions_has_no_such_number(adapter):
    del adapter.position_index
    assert probe.positions(adapter, make_rollout(adapter), 1000) is None
    assert probe.change_mm(None, None) == {}
