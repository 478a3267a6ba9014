"""Videos of evaluations: which episodes, which pictures, what is written on them, and that nothing else changes."""

import logging
import sys
import weakref
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.utils.constants import IMAGENET_STATS
from PIL import ImageDraw, ImageFont

from lerobot_pirl import actor, videos
from lerobot_pirl.collector import Collector, Episode, EpisodeSpec
from lerobot_pirl.envs import make_chunk_envs
from lerobot_pirl.envs.tabletop_render import TabletopRenderer
from lerobot_pirl.evaluate import evaluate
from lerobot_pirl.metadata import config_hash
from lerobot_pirl.videos import EvaluationVideos, captioned, enlarged, picture, wrapped
from tests.test_collector import CHUNK, LIMIT, GoalAdapter, logged_envs, specs
from tests.toy import tiny_adapter, tiny_config

SENTENCE = "put both the alphabet soup and the tomato sauce in the basket"
RATE = Fraction(20, CHUNK)


def started(root: Path, version: int = 3, tasks: int = 1) -> EvaluationVideos:
    made = EvaluationVideos(root, {task: f"task {task}: {SENTENCE}" for task in range(tasks)}, RATE)
    made.begin(version)
    return made


def run(made: EvaluationVideos | None, *init_state_ids: int, n_envs: int = 2):
    """Evaluate a policy that succeeds in initial state 0 alone."""
    collector = Collector(logged_envs(n_envs, []), GoalAdapter(), 0.5, 7)
    return evaluate(collector, specs(*init_state_ids), watch=made and made.watch)


def numbers(evaluation) -> dict[str, list]:
    return {name: value.tolist() for name, value in evaluation.to_tensors()[1].items()}


def decoded(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """Return the pictures of a video and how many of them a second has."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, container.streams.video[0].average_rate


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def written(monkeypatch) -> dict[str, list]:
    """Pictures by the name of the video that was written last under it; no encoder is at work."""
    kept = {}

    def write_video(path: Path, frames: list, rate: Fraction) -> None:
        path.write_text("a video")
        kept[path.name.replace(".part", "")] = frames

    monkeypatch.setattr(videos, "write_video", write_video)
    return kept


@pytest.fixture
def plain(monkeypatch) -> None:
    """Pictures go into the videos as they are."""
    monkeypatch.setattr(videos, "captioned", lambda pictures, *captions: pictures)
    monkeypatch.setattr(videos, "enlarged", lambda frame: frame)


# --- which episodes -------------------------------------------------------------------------------------------


def observation(brightness: int) -> dict:
    return {"pixels": {"image": np.full((4, 4, 3), brightness, np.uint8)}}


def finish(made: EvaluationVideos, number: int, success: bool, task: int = 0) -> None:
    episode = Episode(EpisodeSpec(number, task, 0), seed=0)
    made.watch(episode, observation(number))
    episode.done, episode.success, episode.env_steps = True, success, 4
    made.watch(episode, observation(number))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_first_success_and_first_failure_by_number_in_whatever_order_episodes_end(
    order, tmp_path, written, plain
):
    made = started(tmp_path)
    for number in order:
        finish(made, number, success=number in (1, 2))
    shown = {name: int(frames[0].max()) for name, frames in written.items()}
    assert shown == {"task0_success.mp4": 1, "task0_failure.mp4": 0}
    assert made.first == {(0, True): 1, (0, False): 0}


def test_every_task_has_videos_of_its_own_and_an_outcome_that_never_came_has_none(tmp_path, written):
    made = started(tmp_path, version=12, tasks=3)
    for number, (task, success) in enumerate([(0, True), (1, False), (2, False), (0, True), (2, True)]):
        finish(made, number, success, task)
    assert names(tmp_path / "eval_12") == [
        *("task0_success.mp4", "task1_failure.mp4", "task2_failure.mp4", "task2_success.mp4")
    ]


@pytest.mark.parametrize("n_envs", [2, 5])
def test_the_videos_do_not_depend_on_how_many_environments_run_side_by_side(n_envs, tmp_path, written):
    run(started(tmp_path), 9, 17, 0, 33, 0, n_envs=1)
    alone = dict(written)
    written.clear()
    made = started(tmp_path)
    run(made, 9, 17, 0, 33, 0, n_envs=n_envs)
    assert made.first == {(0, True): 2, (0, False): 0}
    assert set(written) == set(alone)
    assert all(np.array_equal(written[name], alone[name]) for name in alone)


def test_every_evaluation_has_videos_of_its_own(tmp_path, written):
    made = started(tmp_path)
    finish(made, 0, success=False)
    made.begin(4)
    finish(made, 0, success=True)
    finish(made, 1, success=False)
    assert names(tmp_path / "eval_3") == ["task0_failure.mp4"]
    assert names(tmp_path / "eval_4") == ["task0_failure.mp4", "task0_success.mp4"]


def test_pictures_are_kept_of_running_episodes_that_may_be_the_first_alone(tmp_path, written, monkeypatch):
    alive: list[weakref.ref] = []

    def watched(observation: dict) -> np.ndarray:
        frame = np.zeros((256, 256, 3), np.uint8)
        alive.append(weakref.ref(frame))
        return frame

    def write_nothing(path: Path, frames: list, rate: Fraction) -> None:
        path.write_text("")

    monkeypatch.setattr(videos, "picture", watched)
    monkeypatch.setattr(videos, "write_video", write_nothing)
    made = started(tmp_path)
    long, later = (Episode(EpisodeSpec(number, 0, 0), seed=0) for number in (5, 6))
    for _ in range(3):
        made.watch(long, {})
        made.watch(later, {})
    finish(made, 1, success=True)
    assert sum(ref() is not None for ref in alive) == 6
    finish(made, 2, success=False)
    seen = len(alive)
    made.watch(long, {})
    assert sum(ref() is not None for ref in alive) == 3
    finish(made, 7, success=True)
    made.watch(later, {})
    assert sum(ref() is not None for ref in alive) == 0
    assert len(alive) == seen


# --- the pictures ---------------------------------------------------------------------------------------------


def test_a_picture_is_what_reaches_the_policy_all_cameras_side_by_side():
    adapter = tiny_adapter()
    envs = make_chunk_envs(adapter.run_config.env, 1, adapter.n_action_steps)
    seen, _ = envs.reset(seed=[0])
    batch = adapter.processors.env_pre(preprocess_observation(seen))
    views = [batch[f"observation.images.{name}"][0] for name in ("image", "image2")]
    # the policy's pictures are normalised besides
    mean, std = torch.tensor(IMAGENET_STATS["mean"]), torch.tensor(IMAGENET_STATS["std"])
    shown = torch.cat(views, dim=2).permute(1, 2, 0) * std.flatten() + mean.flatten()
    expected = (shown * 255).round().to(torch.uint8).numpy()
    raw = {"pixels": {name: frames[0] for name, frames in seen["pixels"].items()}}
    assert np.array_equal(picture(raw), expected)
    assert not np.array_equal(picture(raw), np.concatenate(list(raw["pixels"].values()), axis=1))


def test_a_video_shows_every_observation_of_the_episode_and_the_one_it_ended_in(
    tmp_path, written, plain, monkeypatch
):
    seen = []
    prepare = GoalAdapter.prepare_observation

    def prepare_observation(self, batch: dict, tasks: list[str]) -> dict:
        seen.append(picture({"pixels": {name: frames[0] for name, frames in batch["pixels"].items()}}))
        return prepare(self, batch, tasks)

    def to_and_fro(self, features: dict, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tensor([(-1.0) ** len(seen), 0.0, 0.1]).expand_as(x_t)

    monkeypatch.setattr(GoalAdapter, "prepare_observation", prepare_observation)
    monkeypatch.setattr(GoalAdapter, "predict_x0", to_and_fro)
    envs = logged_envs(1, [])
    evaluate(Collector(envs, GoalAdapter(), 0.5, 7), specs(9), watch=started(tmp_path).watch)
    frames = written["task0_failure.mp4"]
    assert len(frames) == len(seen) + 1 == -(-LIMIT // CHUNK) + 1
    final = picture(envs.envs[0].env._observe(render=True))
    assert all(np.array_equal(a, b) for a, b in zip(frames, [*seen, final], strict=True))
    assert all((a != b).any() for a, b in zip(frames, frames[1:], strict=False))


def test_small_pictures_are_enlarged_and_large_ones_left_alone():
    small = np.arange(100 * 4 * 3, dtype=np.uint8).reshape(100, 4, 3)
    assert np.array_equal(enlarged(small)[::3, ::3], small)
    assert enlarged(small).shape == (300, 12, 3)
    assert enlarged(np.zeros((256, 9, 3), np.uint8)).shape == (256, 9, 3)


def test_a_written_video_can_be_played_at_the_speed_of_the_world(tmp_path, monkeypatch):
    wanted = []

    def keep(pictures, *captions):
        wanted.append(captioned(pictures, *captions))
        return wanted[-1]

    monkeypatch.setattr(videos, "captioned", keep)
    run(started(tmp_path), 9, n_envs=1)
    frames, rate = decoded(tmp_path / "eval_3" / "task0_failure.mp4")
    assert rate == RATE
    assert len(frames) == len(wanted[0]) == 4
    for frame, exact in zip(frames, wanted[0], strict=True):
        assert frame.shape == exact.shape
        others = [np.abs(frame.astype(float) - other).mean() for other in wanted[0]]
        assert np.abs(frame.astype(float) - exact).mean() == min(others) < 6


def test_a_speed_that_is_no_whole_number_is_kept(tmp_path):
    made = EvaluationVideos(tmp_path, {0: SENTENCE}, Fraction(20, 30))
    made.begin(0)
    finish(made, 0, success=True)
    assert decoded(tmp_path / "eval_0" / "task0_success.mp4")[1] == Fraction(2, 3)


# --- the captions ---------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, tuple]]:
    """Every line of text that is drawn, with its colour."""
    lines = []
    draw = ImageDraw.ImageDraw.text

    def text(self, place, line, fill, font):
        lines.append((line, fill))
        draw(self, place, line, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lines


def test_captions_tell_task_version_start_step_and_outcome(tmp_path, written, drawn):
    evaluation = run(started(tmp_path, version=120), 9, 0, n_envs=1)
    assert drawn[0][0] == f"task 0: {SENTENCE}"
    details = [line for line, _ in drawn if line.startswith("policy")]
    steps = [0, 4, 8, LIMIT]
    assert details[:4] == [f"policy 120 | initial state 9 | step {step} | FAILURE" for step in steps]
    ended = int(evaluation.env_steps[1])
    assert details[-1] == f"policy 120 | initial state 0 | step {ended} | SUCCESS"
    assert len({fill for line, fill in drawn if line.startswith("policy")}) == 2


def test_captions_are_burnt_in_above_the_picture_and_within_its_width():
    shown = np.full((256, 300, 3), 90, np.uint8)
    details = ["step 0", "step 100, and so long a line that it takes two of them"]
    frames = captioned([shown, shown], SENTENCE, details, (0, 255, 0))
    bar = len(frames[0]) - len(shown)
    for frame in frames:
        assert np.array_equal(frame[bar:], shown)
        text = frame[:bar]
        assert (text == 255).any()
        assert (text[:, :6] == 0).all()
        assert (text[:, -6:] == 0).all()
        assert (text[-4:] == 0).all()
    assert frames[0].shape == frames[1].shape
    assert not np.array_equal(frames[0][:bar], frames[1][:bar])


def test_lines_hold_all_words_in_order_and_as_many_as_fit():
    font = ImageFont.load_default(14)
    lines = wrapped(SENTENCE, font, 200)
    assert " ".join(lines) == SENTENCE
    assert len(lines) > 1
    assert all(font.getlength(line) <= 200 for line in lines)
    for line, following in zip(lines, lines[1:], strict=False):
        assert font.getlength(f"{line} {following.split()[0]}") > 200
    assert wrapped("a wooooord", font, 20) == ["a", "wooooord"]


@pytest.mark.parametrize("shape", [(257, 301, 3), (256, 301, 3), (257, 300, 3), (258, 302, 3)])
def test_frames_have_the_even_sizes_that_the_encoder_takes(shape):
    (frame,) = captioned([np.full(shape, 90, np.uint8)], SENTENCE, ["step 0"], (0, 255, 0))
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    assert (frame == 90).all(axis=2).sum() >= shape[0] * shape[1]
    assert frame.shape[1] - shape[1] <= 1


# --- an evaluation counts what it counts without ----------------------------------------------------------------


def test_numbers_are_bit_for_bit_those_of_an_evaluation_without_videos(tmp_path):
    adapter = tiny_adapter()
    envs = make_chunk_envs(adapter.run_config.env, 2, adapter.n_action_steps, 8)
    collector = Collector(envs, adapter, 0.5, 7)
    torch.manual_seed(0)
    chunks: list[torch.Tensor] = []
    execute = adapter.execute
    adapter.execute = lambda x_0, bits: chunks.append(x_0) or execute(x_0, bits)
    before = torch.get_rng_state()
    outcomes = [numbers(evaluate(collector, specs(0, 1, 2), watch=started(tmp_path).watch))]
    half = len(chunks)
    outcomes.append(numbers(evaluate(collector, specs(0, 1, 2))))
    assert outcomes[0] == outcomes[1]
    assert len(chunks) == 2 * half > 2
    assert all(torch.equal(a, b) for a, b in zip(chunks[:half], chunks[half:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert names(tmp_path / "eval_3") == ["task0_failure.mp4"]


def test_nothing_is_rendered_for_a_video(tmp_path, monkeypatch):
    rendered = []
    render = TabletopRenderer.agentview

    def agentview(self, *args):
        rendered.append(1)
        return render(self, *args)

    monkeypatch.setattr(TabletopRenderer, "agentview", agentview)
    run(None, 9, 0)
    without = len(rendered)
    run(started(tmp_path), 9, 0)
    assert len(rendered) == 2 * without > 0
    assert len(names(tmp_path / "eval_3")) == 2


# --- what goes wrong --------------------------------------------------------------------------------------------


def no_space(path: Path, frames: list, rate: Fraction) -> None:
    path.write_text("half a video")
    raise OSError(28, "No space left on device")


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_full_disk_costs_the_videos_and_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(videos, "write_video", no_space)
    made = started(tmp_path)
    assert numbers(run(made, 9, 0, 17)) == numbers(run(None, 9, 0, 17))
    (warning,) = warnings(caplog)
    assert "no more videos of this evaluation" in warning
    assert str(tmp_path / "eval_3") in warning
    assert "OSError: [Errno 28] No space left on device" in warning
    assert "training goes on" in warning
    assert names(tmp_path / "eval_3") == []
    assert made.first == {}


def test_a_folder_that_cannot_be_made_costs_the_videos_and_nothing_else(tmp_path, caplog):
    (tmp_path / "videos").write_text("in the way")
    made = started(tmp_path / "videos")
    assert numbers(run(made, 9, 0)) == numbers(run(None, 9, 0))
    (warning,) = warnings(caplog)
    assert "NotADirectoryError" in warning


@pytest.mark.parametrize("missing", ["package", "codec"])
def test_without_an_encoder_there_are_no_videos(missing, tmp_path, monkeypatch, caplog):
    if missing == "package":
        monkeypatch.setitem(sys.modules, "av", None)
    else:

        def no_codec(path: str, mode: str) -> None:
            Path(path).touch()
            raise av.codec.codec.UnknownCodecError("libx264")

        monkeypatch.setattr(av, "open", no_codec)
    made = started(tmp_path)
    assert numbers(run(made, 9, 0)) == numbers(run(None, 9, 0))
    assert len(warnings(caplog)) == 1
    assert names(tmp_path / "eval_3") == []


def test_the_next_evaluation_tries_again_and_the_same_reason_is_told_once(tmp_path, monkeypatch, caplog):
    write_video = videos.write_video
    monkeypatch.setattr(videos, "write_video", no_space)
    made = started(tmp_path)
    run(made, 9)
    made.begin(4)
    run(made, 9)
    assert len(warnings(caplog)) == 1
    monkeypatch.setattr(videos, "write_video", write_video)
    made.begin(5)
    run(made, 9)
    assert names(tmp_path / "eval_5") == ["task0_failure.mp4"]


def test_after_a_failure_no_pictures_are_taken_or_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(videos, "write_video", no_space)
    taken = []

    def watched(observation: dict) -> np.ndarray:
        frame = picture(observation)
        taken.append(weakref.ref(frame))
        return frame

    monkeypatch.setattr(videos, "picture", watched)
    made = started(tmp_path)
    run(made, 0, 9)
    count = len(taken)
    assert count > 2
    caplog.clear()
    assert sum(frame() is not None for frame in taken) == 0
    run(made, 9)
    assert len(taken) == count


def test_an_evaluation_that_is_repeated_leaves_no_video_of_the_one_before(tmp_path, written):
    made = started(tmp_path)
    finish(made, 0, success=True)
    (tmp_path / "eval_3" / "notes.txt").write_text("the user's")
    made.begin(3)
    finish(made, 0, success=False)
    assert names(tmp_path / "eval_3") == ["notes.txt", "task0_failure.mp4"]


# --- the actor and the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
def test_the_actor_writes_them_where_the_option_says_so(wanted, tmp_path, caplog):
    made = EvaluationVideos(tmp_path / "videos", {0: SENTENCE}, RATE)
    sent = []
    fake = SimpleNamespace(
        cfg=SimpleNamespace(env_eval_videos=wanted),
        videos=made,
        num_init_states={0: 50},
        collector=Collector(logged_envs(1, []), GoalAdapter(), 0.5, 7),
        client=SimpleNamespace(post=sent.append),
        version=40,
        _start_bar=lambda what, count: None,
        _address=dict,
    )
    with caplog.at_level(logging.INFO):
        actor.Actor.evaluate(fake, 2)
    assert sent[0].tensors["success"].tolist() == [True, False]
    folder = tmp_path / "videos" / "eval_40"
    assert (tmp_path / "videos").exists() == wanted
    assert (f"2 videos in {folder}" in caplog.text) == wanted
    if wanted:
        assert names(folder) == ["task0_failure.mp4", "task0_success.mp4"]


def test_the_option_plays_no_part_in_what_is_learned():
    cfg, other = tiny_config(), tiny_config()
    assert cfg.env_eval_videos is True
    other.env_eval_videos = False
    assert config_hash(cfg) == config_hash(other)
