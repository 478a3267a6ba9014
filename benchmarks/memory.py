"""How much more memory a process comes to hold while it does something."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# of the kernel: forget the highest mark
_FORGET_PEAK = "5"


class Peak:
    """The most that a block of code held on top of what there was before it, in bytes; known when it is left, the latter at once."""

    extra: int | None = None
    before: int | None = None


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise OSError(f"{_STATUS} has no {name}")


@contextmanager
def peak(before: int | None = None) -> Iterator[Peak]:
    """Measure what this process's resident memory comes to, on Linux; ``extra`` stays None elsewhere.

    Args:
        before: bytes that it is compared with; what there is now, if not given.
    """
    found = Peak()
    try:
        _RESET.write_text(_FORGET_PEAK)
        found.before = before = before or _resident("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.extra = max(0, _resident("VmHWM") - before)
