"""How many bytes a rollout sends per env step, and how many its frames and LeRobot's transitions have.

Ours is what an actor streams to the learner: the messages of whole episodes. The frames are those that the policy looked
at, as they were rendered, uint8; LeRobot's actor sends every step's observation, float32, and the next one's.

    python -m benchmarks.payload [--pixels 256] [--episodes 4] [--write]
"""

import argparse

import torch
from lerobot.transport.utils import transitions_to_bytes
from lerobot.utils.constants import OBS_STATE
from lerobot.utils.transition import Transition

from benchmarks.ratios import Ratio, report
from benchmarks.sizes import make_adapter, make_config
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.envs import make_chunk_envs, num_init_states
from lerobot_pirl.episodes import assemble
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.wire import Message, encode_parts

FEATURES, PIXELS, LEROBOT = 0.1, 1.05, 1 / 75
CHANNELS, CAMERAS, CHUNK = 3, 2, 10
TRANSITIONS = 20
# of Florence-2's images: one token for so many pixels in a row, and a pooled one
_STRIDE = 32
_ACTION_DIM = 20


def frame_bytes(pixels: int) -> int:
    """Return the bytes of what a policy looks at once."""
    return CAMERAS * CHANNELS * pixels**2


def message_bytes(rollout: Rollout) -> int:
    """Return the bytes of an episode's message."""
    header, tensors = rollout.to_tensors()
    return sum(map(len, encode_parts(Message("rollout", header, tensors))))


def collected(pixels: int, episodes: int) -> tuple[int, int, int]:
    """Play episodes with a tiny X-VLA on the tabletop; return bytes sent, bytes looked at, and env steps."""
    cfg = make_config("tiny")
    cfg.env.observation_height = cfg.env.observation_width = pixels
    cfg.env.__post_init__()
    envs = make_chunk_envs(cfg.env, 1, CHUNK)
    ended = []
    collector = Collector(envs, make_adapter(cfg), 0.5, seed=0)
    waiting = [
        collector.episode(spec, 0) for spec in episode_specs({0: num_init_states(cfg.env, 0)}, 0, episodes)
    ]
    collector.explore(lambda previous: waiting.pop() if waiting else None, 1.0, ended.append)
    envs.close()
    rollouts = [assemble([episode], 0) for episode in ended]
    looks = sum(len(rollout) + int(rollout.truncated.sum()) for rollout in rollouts)
    return (
        sum(map(message_bytes, rollouts)),
        looks * frame_bytes(pixels),
        sum(int(r.env_steps.sum()) for r in rollouts),
    )


def chunk_bytes(size: str, dtype_bytes: int) -> int:
    """Return the bytes that a chunk of an X-VLA of a size adds to a message: its features, its chain and the rest.

    ``dtype_bytes`` is the size of a number of the policy's dtype; the policy is not built.
    """
    policy = make_config(size).policy
    view = (policy.resize_imgs_with_padding[0] // _STRIDE) ** 2 + 1
    # views without a camera are not sent
    tokens = min(policy.num_image_views, CAMERAS) * view + policy.tokenizer_max_length
    width = policy.florence_config["vision_config"]["projection_dim"]
    features = dtype_bytes * (tokens * width + policy.max_state_dim)
    chain = 4 * 2 * policy.chunk_size * _ACTION_DIM
    # domain, step, gripper bits, log-prob, reward, whether it terminated
    return features + chain + 8 + 8 + CHUNK + 4 + 4 + 1


def lerobot_bytes(pixels: int) -> float:
    """Return the bytes per env step of LeRobot's transitions, whose tensors are already on the CPU."""

    def observation() -> dict[str, torch.Tensor]:
        images = {
            f"observation.images.image{number}": torch.zeros(1, CHANNELS, pixels, pixels)
            for number in range(CAMERAS)
        }
        return images | {OBS_STATE: torch.zeros(1, 20)}

    observations = [observation() for _ in range(TRANSITIONS + 1)]
    transitions = [
        Transition(
            state=observations[step],
            action=torch.zeros(1, 7),
            reward=0.0,
            next_state=observations[step + 1],
            done=False,
            truncated=False,
            complementary_info=None,
        )
        for step in range(TRANSITIONS)
    ]
    return len(transitions_to_bytes(transitions)) / TRANSITIONS


def compare(pixels: int, episodes: int) -> list[Ratio]:
    """Count, which has no rounds: nothing of it is random."""
    sent, looked, steps = collected(pixels, episodes)
    unit, where = "bytes/env step", f"{pixels}-pixel frames that it looked at"
    tiny = Ratio(f"tiny X-VLA's rollout to the {where}", unit, FEATURES, at_least=False)
    tiny.add(sent / steps, looked / steps)
    real = Ratio(f"real X-VLA's rollout to the {where}", unit, PIXELS, at_least=False)
    real.add(chunk_bytes("real", 2) / CHUNK, frame_bytes(pixels) / CHUNK)
    stock = Ratio("tiny X-VLA's rollout to LeRobot's transitions", unit, LEROBOT, at_least=False)
    stock.add(sent / steps, lerobot_bytes(pixels))
    return [tiny, real, stock]


def main() -> None:
    """Count, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=256, help="height and width of a frame")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/payload.json")
    options = parser.parse_args()
    settings = {"pixels": options.pixels, "chunk": CHUNK, "cameras": CAMERAS}
    report(compare(options.pixels, options.episodes), "payload", settings, options.write)


if __name__ == "__main__":
    main()
