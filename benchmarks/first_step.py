"""The actor's command, which notes in a file when an environment takes its first step.

python -m benchmarks.first_step FILE [the actor's options]
"""

import sys
import time
from pathlib import Path

import numpy as np


def note(path: Path) -> None:
    """Let environments write the time of the first step of any of them."""
    from lerobot_pirl.envs.chunk import ChunkEnv

    step = ChunkEnv.step

    def noting(env: ChunkEnv, actions: np.ndarray) -> tuple:
        if not path.exists():
            path.write_text(repr(time.perf_counter()))
        return step(env, actions)

    ChunkEnv.step = noting


if __name__ == "__main__":
    note(Path(sys.argv.pop(1)))
    from lerobot_pirl.actor import main

    main()
