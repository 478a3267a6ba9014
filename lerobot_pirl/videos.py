"""Videos of evaluations: of every task the first success and the first failure, as the policy saw them."""

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.io_utils import write_video
from PIL import Image, ImageDraw, ImageFont

from lerobot_pirl.collector import Episode

logger = logging.getLogger(__name__)

# pixels: smaller pictures are enlarged to at least so much, for the caption's sake
_MIN_HEIGHT = 256
_FONT_SIZE, _LINE, _MARGIN = 14, 18, 6
_WHITE, _GREEN, _RED = (255, 255, 255), (110, 230, 110), (255, 120, 110)


class EvaluationVideos:
    """Watches the episodes of evaluations and writes ``eval_<version>/task<id>_{success,failure}.mp4``.

    Pictures are kept of running episodes alone, and only while they may become the first of their task to succeed
    or to fail. Nothing that goes wrong here ends an evaluation: there is one warning, and no videos.

    Attributes:
        folder: of the present evaluation's videos.
        first: number of the episode in every video that was written, by task and success.
    """

    def __init__(self, root: Path, descriptions: dict[int, str], frame_rate: Fraction) -> None:
        """Keep where to write and what to write on the pictures.

        Args:
            root: gets a folder per evaluation.
            descriptions: the sentence of every task.
            frame_rate: pictures per second at which an episode lasts as long as it did.
        """
        self.root, self.descriptions, self.frame_rate = root, descriptions, frame_rate
        self.folder = root
        self.first: dict[tuple[int, bool], int] = {}
        self._version = 0
        # by the episode's number: pictures, each with the number of steps before it
        self._frames: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._off = False
        self._warned = ""

    def begin(self, policy_version: int) -> None:
        """Forget what was before, and make an evaluation's folder; what it holds of an earlier one goes."""
        self._version, self._off = policy_version, False
        self.folder = self.root / f"eval_{policy_version}"
        self.first, self._frames = {}, {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("task*.mp4"):
                path.unlink()
        except OSError as error:
            self._give_up(error)

    def watch(self, episode: Episode, observation: dict[str, Any]) -> None:
        """See what the policy sees of an episode, or the observation in which the episode has ended."""
        if self._off:
            return
        try:
            self._watch(episode, observation)
        except Exception as error:
            self._give_up(error)

    def _watch(self, episode: Episode, observation: dict[str, Any]) -> None:
        spec = episode.spec
        outcomes = (episode.success,) if episode.done else (True, False)
        frames = self._frames.pop(spec.number, [])
        if all(spec.number > self.first.get((spec.task_id, outcome), math.inf) for outcome in outcomes):
            return
        frames.append((episode.env_steps, picture(observation)))
        if episode.done:
            self._write(episode, frames)
            self.first[spec.task_id, episode.success] = spec.number
        else:
            self._frames[spec.number] = frames

    def _write(self, episode: Episode, frames: list[tuple[int, np.ndarray]]) -> None:
        outcome = "success" if episode.success else "failure"
        colour = _GREEN if episode.success else _RED
        path = self.folder / f"task{episode.spec.task_id}_{outcome}.mp4"
        part = path.with_suffix(".part.mp4")
        sentence = self.descriptions[episode.spec.task_id]
        start = f"policy {self._version} | initial state {episode.spec.init_state_id}"
        details = [f"{start} | step {step} | {outcome.upper()}" for step, _ in frames]
        pictures = [enlarged(frame) for _, frame in frames]
        try:
            write_video(part, captioned(pictures, sentence, details, colour), self.frame_rate)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _give_up(self, error: Exception) -> None:
        self._off, self._frames = True, {}
        warning = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # the next evaluation tries again, and need not say the same again
        if warning != self._warned:
            logger.warning(
                "no more videos of this evaluation in %s (%s); free space, make the folder writable, install what "
                "is missing, or set env_eval_videos=false; training goes on",
                self.folder,
                warning,
            )
        self._warned = warning


def picture(observation: dict[str, Any]) -> np.ndarray:
    """Return the cameras' pictures of an observation side by side, as X-VLA sees them, uint8 ``[H, W, 3]``."""
    # LIBERO's fixed camera comes rotated by 180 degrees; X-VLA's processor turns that one back
    pixels = observation["pixels"].items()
    return np.concatenate([view[::-1, ::-1] if name == "image" else view for name, view in pixels], axis=1)


def enlarged(frame: np.ndarray) -> np.ndarray:
    """Return a picture of at least 256 rows: every pixel becomes a square."""
    scale = math.ceil(_MIN_HEIGHT / frame.shape[0])
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def captioned(
    pictures: list[np.ndarray], sentence: str, details: list[str], colour: tuple[int, int, int]
) -> list[np.ndarray]:
    """Return the pictures under a bar of text: the sentence in white, and each picture's own line in a colour."""
    font = ImageFont.load_default(_FONT_SIZE)
    height, width = pictures[0].shape[:2]
    room = width - 2 * _MARGIN
    above = wrapped(sentence, font, room)
    below = [wrapped(line, font, room) for line in details]
    bar = _LINE * (len(above) + max(map(len, below))) + _MARGIN
    # the encoder takes even sizes
    size = (width + width % 2, bar + height + (bar + height) % 2)
    frames = []
    for shown, lines in zip(pictures, below, strict=True):
        canvas = Image.new("RGB", size)
        canvas.paste(Image.fromarray(shown), (0, bar))
        draw = ImageDraw.Draw(canvas)
        coloured = [(line, _WHITE) for line in above] + [(line, colour) for line in lines]
        for row, (line, fill) in enumerate(coloured):
            draw.text((_MARGIN, row * _LINE + _MARGIN // 2), line, fill, font)
        frames.append(np.asarray(canvas))
    return frames


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """Return the text in lines of at most so many pixels, as far as its words are not longer themselves."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
