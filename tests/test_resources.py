"""What a run takes of its machine: the learner's memory, and the cores that learner and actor share."""

import logging
import os

import pytest
import torch

from lerobot_pirl import build, memory
from lerobot_pirl.options import PiRLConfig, WireConfig


def test_memory_is_planned_in_words():
    mib = 2**20
    text = memory.plan(16 * mib, episodes=64, iterations=1, available=4 * memory.GIB)
    assert text == (
        "the episodes of an iteration take up to 2 GiB of the learner's memory, 16 MiB each; 4 GiB are free"
    )
    assert memory.plan(mib, 64, iterations=3, available=memory.GIB).startswith(
        "the episodes of 3 iterations take up to 0.25"
    )


def test_episodes_that_do_not_fit_are_refused_with_what_to_lower():
    with pytest.raises(
        ValueError, match="take up to 2 GiB .* 1 GiB are free; lower algorithm.episodes_per_iteration=64"
    ):
        memory.plan(16 * 2**20, episodes=64, iterations=1, available=memory.GIB)


def test_available_memory_is_some_of_this_machines(monkeypatch, tmp_path):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available_bytes() <= whole
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert memory.available_bytes() == whole


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("max_staleness", "host", "chosen", "shared"),
    [
        (1, "127.0.0.1", None, True),
        (0, "127.0.0.1", None, False),
        (1, "learner.example", None, False),
        (1, "127.0.0.1", "7", False),
    ],
)
def test_cores_are_shared_where_both_work_at_once_on_one_machine(
    monkeypatch, caplog, threads, max_staleness, host, chosen, shared
):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    with caplog.at_level(logging.INFO):
        build._share_cores(PiRLConfig(max_staleness=max_staleness, wire=WireConfig(host=host)))
    assert torch.get_num_threads() == (3 if shared else threads)
    assert ("computing with 3 threads" in caplog.text) == shared
