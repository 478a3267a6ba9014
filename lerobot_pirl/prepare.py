"""From a policy that LeRobot trained on a dataset to one that acts in LIBERO-shaped environments: the same function.

``lerobot-train --policy.type=xvla`` saves pipelines for dataset frames. Behind LeRobot's LIBERO pipeline they would
normalise images a second time, and they send domain 0 where LIBERO's published weights have domain 3.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.xvla.processor_xvla import XVLAAddDomainIdProcessorStep
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lerobot_pirl.policies.xvla import domain_tables
from lerobot_pirl.policies.xvla_processors import IMAGE_STEPS, LIBERO_DOMAIN_ID

WEIGHTS, PIPELINE = "model.safetensors", f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
# as a saved pipeline calls its steps
IMAGE_STEP_NAMES = [step._registry_name for step in IMAGE_STEPS]
DOMAIN_STEP = XVLAAddDomainIdProcessorStep._registry_name


def prepare(source: Path, target: Path) -> list[str]:
    """Write a copy of a policy that acts in LIBERO-shaped environments as the policy does on dataset frames.

    Args:
        source: a ``pretrained_model`` folder of X-VLA.
        target: the folder to write; it must not exist.

    Returns:
        What was changed, in words.

    Raises:
        ValueError: with a sentence for the user, when the source is no such folder or the target is there.
        OSError: when the copy cannot be written; nothing is left of it.
    """
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    config, pipeline = _read(source / "config.json"), _read(source / PIPELINE)
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
    left_out = [step["registry_name"] for step in steps if step.get("registry_name") in IMAGE_STEP_NAMES]
    pipeline["steps"] = [step for step in steps if step.get("registry_name") not in IMAGE_STEP_NAMES]
    domains[0]["domain_id"] = LIBERO_DOMAIN_ID
    weights, header = _weights(source / WEIGHTS)
    done = [f"the step {name} is left out: LIBERO's pipeline does it" for name in left_out]
    tables = [] if former == LIBERO_DOMAIN_ID else domain_tables(weights, config["use_hetero_proj"])
    for name in tables:
        weights[name][LIBERO_DOMAIN_ID] = weights[name][former]
    if tables:
        done.append(
            f"row {former} of {len(tables)} tables is copied to row {LIBERO_DOMAIN_ID}, which domain_id={LIBERO_DOMAIN_ID} "
            "selects"
        )
    with _whole(target) as folder:
        shutil.copytree(source, folder)
        # a store may be read-only
        for each in (folder, *folder.rglob("*")):
            each.chmod(each.stat().st_mode | (0o700 if each.is_dir() else 0o600))
        (folder / PIPELINE).write_text(json.dumps(pipeline, indent=2) + "\n")
        if tables:
            try:
                save_file(weights, folder / WEIGHTS, metadata=header)
            except SafetensorError as error:
                raise OSError(f"{folder / WEIGHTS} cannot be written ({error})") from error
    return done


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Give a hidden name beside a folder's, which becomes the folder's when all is written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
