"""From a policy that LeRobot trained on a dataset to one that acts in LIBERO-shaped environments: the same function.

``lerobot-train --policy.type=xvla`` saves pipelines for dataset frames. Behind LeRobot's LIBERO pipeline they would
normalise images a second time, and they send domain 0 where LIBERO's published weights have domain 3.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lerobot_pirl.policies.xvla import domain_tables
from lerobot_pirl.policies.xvla_processors import LIBERO_DOMAIN_ID

WEIGHTS = "model.safetensors"
# registry names of the steps that the environment's pipeline does already
IMAGE_STEPS = ("xvla_image_to_float", "xvla_imagenet_normalize")
DOMAIN_STEP = "xvla_add_domain_id"


def prepare(source: Path, target: Path) -> list[str]:
    """Write a copy of a policy that acts in LIBERO-shaped environments as the policy does on dataset frames.

    Args:
        source: a ``pretrained_model`` folder of X-VLA.
        target: the folder to write; it must not exist.

    Returns:
        What was changed, in words.

    Raises:
        ValueError: with a sentence for the user, when the source is no such folder or the target is there.
    """
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    config, pipeline = (
        _read(source / "config.json"),
        _read(source / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"),
    )
    if config.get("type") != "xvla":
        raise ValueError(f"{source} holds a policy of type {config.get('type')!r}; name one of type 'xvla'")
    steps = pipeline["steps"]
    domains = [step["config"] for step in steps if step.get("registry_name") == DOMAIN_STEP]
    if len(domains) != 1:
        raise ValueError(
            f"{source} has {len(domains)} steps {DOMAIN_STEP} in its preprocessor; it needs exactly one"
        )
    former = domains[0]["domain_id"]
    if config["num_domains"] <= LIBERO_DOMAIN_ID:
        raise ValueError(
            f"{source} has num_domains={config['num_domains']} and no row for LIBERO's domain {LIBERO_DOMAIN_ID}; train "
            f"it with policy.num_domains={LIBERO_DOMAIN_ID + 1} or more"
        )
    left_out = [step["registry_name"] for step in steps if step.get("registry_name") in IMAGE_STEPS]
    pipeline["steps"] = [step for step in steps if step.get("registry_name") not in IMAGE_STEPS]
    domains[0]["domain_id"] = LIBERO_DOMAIN_ID
    weights, header = _weights(source / WEIGHTS)
    shutil.copytree(source, target)
    (target / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json").write_text(json.dumps(pipeline, indent=2) + "\n")
    done = [f"the step {name} is left out: LIBERO's pipeline does it" for name in left_out]
    if former != LIBERO_DOMAIN_ID:
        tables = domain_tables(weights, config["use_hetero_proj"])
        for name in tables:
            weights[name][LIBERO_DOMAIN_ID] = weights[name][former]
        save_file(weights, target / WEIGHTS, metadata=header)
        done.append(
            f"row {former} of {len(tables)} tables is copied to row {LIBERO_DOMAIN_ID}, which domain_id={LIBERO_DOMAIN_ID} selects"
        )
    return done


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a pretrained_model folder") from error


def _weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a pretrained_model folder") from error
