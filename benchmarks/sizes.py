"""X-VLA policies of three sizes with random weights, and what they see: no model has to be downloaded.

``tiny`` is the smoke configs', ``real`` has the sizes of the published 0.88 B checkpoints, ``mid`` is between them.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.episodes import split_rows
from lerobot_pirl.policies.base import Features, sample_actions
from lerobot_pirl.policies.xvla import XVLAAdapter
from lerobot_pirl.rollout import Rollout

CONFIG = "configs/pirl_tabletop.json"
CHUNKS_PER_EPISODE = 8
# options of the policy; of its encoder's two parts
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tiny": ({"chunk_size": 10, "depth": 4}, {}, {}),
    "mid": (
        {
            "chunk_size": 10,
            "hidden_size": 384,
            "depth": 8,
            "num_heads": 8,
            "resize_imgs_with_padding": (128, 128),
        },
        {"embed_dim": [64, 128, 256, 512], "depths": [1, 1, 3, 1], "projection_dim": 256},
        {"d_model": 256, "encoder_layers": 4, "encoder_ffn_dim": 1024, "vocab_size": 8000},
    ),
    "real": (
        {
            "chunk_size": 30,
            "hidden_size": 1024,
            "depth": 24,
            "num_heads": 16,
            "num_domains": 30,
            "len_soft_prompts": 32,
            "max_len_seq": 512,
            "num_image_views": 3,
            "tokenizer_max_length": 64,
            "resize_imgs_with_padding": (224, 224),
        },
        {
            "embed_dim": [256, 512, 1024, 2048],
            "depths": [1, 1, 9, 1],
            "num_heads": [8, 16, 32, 64],
            "num_groups": [8, 16, 32, 64],
            "window_size": 12,
            "projection_dim": 1024,
        },
        {
            "d_model": 1024,
            "encoder_layers": 12,
            "encoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "vocab_size": 51289,
            "max_position_embeddings": 1024,
        },
    ),
}


@cache
def _base() -> PiRLTrainConfig:
    return PiRLTrainConfig.from_pretrained(CONFIG, cli_args=[])


def make_config(size: str, dtype: str = "float32", device: str = "cpu", **algorithm: Any) -> PiRLTrainConfig:
    """Return a run's config with a policy of a size and other options under ``algorithm``."""
    cfg = copy.deepcopy(_base())
    options, vision, text = SIZES[size]
    for name, value in (options | {"dtype": dtype, "device": device}).items():
        setattr(cfg.policy, name, value)
    cfg.policy.florence_config["vision_config"] |= vision
    cfg.policy.florence_config["text_config"] |= text
    cfg.policy.n_action_steps = 10
    defaults = {
        "n_action_steps": 10,
        "num_denoising_steps": 5,
        "target_kl": None,
        "critic_warmup_iterations": 0,
    }
    for name, value in (defaults | algorithm).items():
        setattr(cfg.algorithm, name, value)
    return cfg


def make_adapter(cfg: PiRLTrainConfig) -> XVLAAdapter:
    """Return the adapter of a policy with random weights, the same ones every time."""
    torch.manual_seed(0)
    with torch.device(cfg.policy.device):
        policy = XVLAPolicy(cfg.policy)
    return XVLAAdapter(policy, cfg)


def make_algorithm(cfg: PiRLTrainConfig) -> PiRLAlgorithm:
    """Return the algorithm and, in it, the adapter of a policy with random weights."""
    return PiRLAlgorithm(make_adapter(cfg), cfg.algorithm, seed=0)


def make_batch(adapter: XVLAAdapter, size: int) -> dict[str, Tensor]:
    """Return what the processors make of so many observations: noise for two cameras, a sentence and a state."""
    config, device = adapter.policy.config, adapter.device
    generator = torch.Generator().manual_seed(0)
    height, width = config.resize_imgs_with_padding
    tokens = torch.randint(3, 500, (size, config.tokenizer_max_length), generator=generator)
    batch = {
        "observation.images.image": torch.randn(size, 3, height, width, generator=generator),
        "observation.images.image2": torch.randn(size, 3, height, width, generator=generator),
        OBS_STATE: torch.randn(size, adapter.model.dim_proprio, generator=generator),
        OBS_LANGUAGE_TOKENS: tokens,
        "domain_id": torch.full((size,), 3),
    }
    return {name: value.to(device) for name, value in batch.items()}


def generators(size: int) -> list[torch.Generator]:
    """Return the generators of so many episodes."""
    return [torch.Generator().manual_seed(seed) for seed in range(size)]


def act(adapter: XVLAAdapter, features: Features, draw: list[torch.Generator]) -> list[dict[str, Any]]:
    """Draw a chunk for every observation, as a collection does, and return its rows."""
    return split_rows(features, sample_actions(adapter, features, 0.5, draw))


def make_rollout(
    adapter: XVLAAdapter, rows: int, batch_size: int = 32, tell: Callable[[int], None] = lambda rows: None
) -> Rollout:
    """Return a rollout of so many chunks that the policy drew, in episodes of eight of which every second succeeds."""
    parts: list[dict[str, Any]] = []
    batch = make_batch(adapter, batch_size)
    features = adapter.encode(batch)
    while len(parts) < rows:
        parts += act(adapter, features, generators(batch_size))
        tell(len(parts))
    parts = parts[:rows]
    count = rows // CHUNKS_PER_EPISODE
    success = torch.arange(count) % 2 == 1
    ends = torch.arange(1, count + 1) * CHUNKS_PER_EPISODE - 1
    rewards = torch.zeros(rows).index_put((ends,), success.float())
    names = list(parts[0]["features"])
    truncated = int((~success).sum())
    return Rollout(
        policy_version=0,
        features={name: torch.cat([part["features"][name] for part in parts]) for name in names},
        final_features={
            name: torch.cat([part["features"][name] for part in parts[:truncated]]) for name in names
        },
        **{
            name: torch.cat([part[name] for part in parts])
            for name in ("chain", "step_index", "gripper", "log_prob")
        },
        rewards=rewards,
        terminated=rewards > 0,
        episode_lengths=torch.full((count,), CHUNKS_PER_EPISODE),
        task_id=torch.zeros(count, dtype=torch.int64),
        init_state_id=torch.arange(count),
        success=success,
        env_steps=torch.full((count,), 10 * CHUNKS_PER_EPISODE),
    )
