"""Whether an iteration's episodes fit the learner's memory, found out with the first of them; standard library only."""

import os
from pathlib import Path

GIB = 2**30
_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Return the memory that processes could still take on this machine, in bytes; where nothing tells, all there is."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(episode_bytes: int, episodes: int, iterations: int, available: int) -> str:
    """Return in words what the episodes of iterations take at most: each once, and those of one again for its update.

    The features of the frozen encoder are most of it. They are kept, since they take less than the frames from which
    they could be computed again.

    Raises:
        ValueError: with the sentence, when that is more than is available.
    """
    needed = episode_bytes * episodes * (iterations + 1)
    text = (
        f"the episodes of {'an iteration' if iterations == 1 else f'{iterations} iterations'} take up to "
        f"{needed / GIB:.2g} GiB of the learner's memory, {episode_bytes / 2**20:.3g} MiB each; "
        f"{available / GIB:.3g} GiB are free"
    )
    if needed > available:
        raise ValueError(
            f"{text}; lower algorithm.episodes_per_iteration={episodes} or algorithm.max_episode_steps, or take a machine "
            "with more memory"
        )
    return text
