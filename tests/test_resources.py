"""What a run takes of its machine: the learner's memory, and the cores that learner and actor share."""

import logging
import os

import pytest
import torch

from lerobot_pirl import build, memory
from lerobot_pirl.options import PiRLConfig, WireConfig


def test_sizes_are_told_in_the_unit_that_fits():
    assert memory.in_words(3 * 2**29) == "1.5 GiB"
    assert memory.in_words(12 * 2**20) == "12 MiB"


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
    torch.set_num_threads(6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    with caplog.at_level(logging.INFO):
        build._share_cores(PiRLConfig(max_staleness=max_staleness, wire=WireConfig(host=host)))
    assert torch.get_num_threads() == (3 if shared else 6)
    assert ("computing with 3 threads" in caplog.text) == shared
