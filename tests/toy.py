"""Tiny X-VLA runs for the tests."""

import copy
import functools
import json
from pathlib import Path

import torch
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.options import VARIANT_OPTIONS, PiRLConfig
from lerobot_pirl.policies.xvla import XVLAAdapter

CONFIGS = Path(__file__).parent.parent / "configs"


@functools.cache
def _tabletop_config() -> PiRLTrainConfig:
    # parsing takes a second, so it is done once
    return PiRLTrainConfig.from_pretrained(CONFIGS / "pirl_tabletop.json", cli_args=[])


def tiny_config(**algorithm) -> PiRLTrainConfig:
    """Return the tabletop run config, smaller still, with some of its algorithm options replaced."""
    cfg = copy.deepcopy(_tabletop_config())
    cfg.policy.hidden_size, cfg.policy.depth, cfg.policy.chunk_size = 64, 2, 8
    cfg.algorithm.n_action_steps = 4
    for name, value in algorithm.items():
        if not hasattr(cfg.algorithm, name):
            raise AttributeError(name)
        setattr(cfg.algorithm, name, value)
    cfg.algorithm.validate()
    return cfg


def flow_noise_config(**algorithm) -> PiRLTrainConfig:
    """Return the same run with learned noise, without the options that are about fixed noise."""
    defaults = {name: getattr(PiRLConfig(), name) for name in VARIANT_OPTIONS["flow_sde"]}
    return tiny_config(**{"variant": "flow_noise"} | defaults | algorithm)


def tiny_adapter(**algorithm) -> XVLAAdapter:
    """Return an adapter of a random policy; the same weights every time."""
    make = flow_noise_config if algorithm.get("variant") == "flow_noise" else tiny_config
    cfg = make(**algorithm)
    torch.manual_seed(0)
    adapter = XVLAAdapter(XVLAPolicy(cfg.policy), cfg)
    adapter.run_config = cfg
    return adapter


def tiny_features(adapter: XVLAAdapter, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return features of random observations, ``rows`` of them."""
    generator = torch.Generator().manual_seed(seed)
    width = adapter.model.transformer.vlm_proj.in_features
    return {
        "vlm_features": torch.randn(rows, 6, width, generator=generator),
        "aux_visual_inputs": torch.randn(rows, 3, width, generator=generator),
        "empty_views": torch.empty(rows, 0, 0),
        "proprio": torch.randn(rows, adapter.model.dim_proprio, generator=generator),
        "domain_id": torch.full((rows,), 3),
    }


def read_json(path: Path) -> dict:
    """Return a JSON file's content."""
    return json.loads(Path(path).read_text())
