"""What must agree between learner, actor and checkpoint, and how a difference is told."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lerobot.processor import TokenizerProcessorStep
from torch import nn

from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.metadata import (
    Metadata,
    MetadataMismatch,
    config_hash,
    frozen_digest,
    make_metadata,
    one_line,
    tokenizer_digest,
    validate_metadata,
)
from lerobot_pirl.options import PiRLConfig, WireConfig
from tests.toy import CONFIGS, tiny_config

CONFIG = CONFIGS / "pirl_tabletop.json"
VALUES = {
    "format_version": 1,
    "recipe": "pi-rl",
    "variant": "flow_sde",
    "config_path": "configs/a.json",
    "config_hash": "1" * 64,
    "policy_type": "xvla",
    "policy_features": "{}",
    "action_mode": "ee6d",
    "num_denoising_steps": 5,
    "n_action_steps": 10,
    "encoder_digest": "2" * 64,
    "tokenizer_digest": "3" * 64,
    "package_version": "0.1.0",
    "lerobot_version": "0.6.1",
    "run_id": "a-run",
    "config": {"seed": 1, "algorithm": {"gamma": 0.99, "betas": [0.9, 0.95]}},
    "history": [],
}
METADATA = Metadata(**VALUES)
SHOWN_ONLY = ("config_path", "run_id", "config", "history")
JUDGED = [name for name in VALUES if name not in SHOWN_ONLY]


def changed(name: str) -> Metadata:
    value = getattr(METADATA, name)
    if isinstance(value, dict):
        return replace(METADATA, **{name: value | {"seed": 2}})
    if isinstance(value, list):
        return replace(METADATA, **{name: [*value, {"version": 3, "changes": {"seed": [0, 1]}}]})
    return replace(METADATA, **{name: value + 1 if isinstance(value, int) else f"other-{value}"})


def mismatch(actor: dict, learner: dict) -> list[str]:
    """Return the lines of what the actor says about the learner."""
    with pytest.raises(MetadataMismatch) as caught:
        validate_metadata(actor, learner, "actor", "learner")
    return str(caught.value).splitlines()


def test_equal_metadata_pass():
    validate_metadata(METADATA.to_dict(), json.loads(json.dumps(METADATA.to_dict())), "actor", "learner")


@pytest.mark.parametrize("name", SHOWN_ONLY)
def test_what_differs_between_machines_by_nature_is_not_judged(name):
    validate_metadata(METADATA.to_dict(), changed(name).to_dict(), "actor", "learner")
    without = {key: value for key, value in METADATA.to_dict().items() if key != name}
    validate_metadata(METADATA.to_dict(), without, "actor", "learner")


@pytest.mark.parametrize("name", JUDGED)
def test_a_difference_is_a_table_with_both_values_and_what_to_do(name):
    mine, theirs = METADATA.to_dict(), changed(name).to_dict()
    title, head, row, config_row, remedy = mismatch(mine, theirs)
    assert title == f"metadata of learner and actor differ in {name}:"
    assert head.split() == ["field", "learner", "actor"]
    assert row.split() == [name, str(theirs[name]), str(mine[name])]
    assert config_row.split() == ["config_path", "configs/a.json", "configs/a.json"]
    assert remedy.startswith("What to do: ")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config_hash", "give both sides the same config file and overrides."),
        ("num_denoising_steps", "give both sides the same config file and overrides."),
        ("package_version", "install the same lerobot-pirl on both sides."),
        ("format_version", "install the same lerobot-pirl on both sides."),
        ("lerobot_version", "install the same lerobot on both sides."),
    ],
)
def test_the_remedy_fits_the_field(name, remedy):
    assert mismatch(METADATA.to_dict(), changed(name).to_dict())[-1] == f"What to do: {remedy}"


def test_other_frozen_weights_are_not_blamed_on_the_config():
    remedy = mismatch(METADATA.to_dict(), changed("encoder_digest").to_dict())[-1]
    assert "pretrained weights" in remedy
    assert "config file" not in remedy


def test_several_differences_are_told_at_once_with_every_remedy_once():
    theirs = METADATA.to_dict() | {"config_hash": "3", "n_action_steps": 7, "lerobot_version": "0.6.2"}
    theirs["config_path"] = "elsewhere/b.json"
    lines = mismatch(METADATA.to_dict(), theirs)
    assert lines[0] == "metadata of learner and actor differ in config_hash, n_action_steps, lerobot_version:"
    rows = [line.split() for line in lines[2:-1]]
    assert rows == [
        ["config_hash", "3", "1" * 64],
        ["n_action_steps", "7", "10"],
        ["lerobot_version", "0.6.2", "0.6.1"],
        ["config_path", "elsewhere/b.json", "configs/a.json"],
    ]
    assert lines[-1] == (
        "What to do: give both sides the same config file and overrides; install the same lerobot on both sides."
    )


def test_another_config_is_told_option_by_option():
    config = {"seed": 1, "algorithm": {"gamma": 0.9, "betas": [0.9, 0.95], "dual_clip": 3}, "env": {}}
    theirs = replace(METADATA, config=config, config_hash="3" * 64)
    lines = mismatch(METADATA.to_dict(), json.loads(json.dumps(theirs.to_dict())))
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert rows["algorithm.gamma"] == ["0.9", "0.99"]
    assert rows["algorithm.dual_clip"] == ["3", "-"]
    assert rows["env"] == ["{}", "-"]
    assert set(rows) == {"config_hash", "config_path", "algorithm.gamma", "algorithm.dual_clip", "env"}


def test_the_line_for_the_log_leaves_the_config_out():
    shown = json.loads(one_line(METADATA.to_dict()))
    assert shown == {key: value for key, value in METADATA.to_dict().items() if key != "config"}


def test_the_columns_of_the_table_are_aligned():
    lines = mismatch(METADATA.to_dict(), changed("config_hash").to_dict())
    head = lines[1]
    for line in lines[2:-1]:
        assert line[head.index("learner") - 1] == line[head.index("actor") - 1] == " "
        assert " " not in (line[head.index("learner")], line[head.index("actor")])


@pytest.mark.parametrize("value", ["new", None])
def test_a_field_that_one_side_does_not_know_is_a_difference_of_versions(value):
    extra = METADATA.to_dict() | {"noise": value}
    for mine, theirs, row in [
        (METADATA.to_dict(), extra, ["noise", str(value), "-"]),
        (extra, METADATA.to_dict(), ["noise", "-", str(value)]),
    ]:
        lines = mismatch(mine, theirs)
        assert lines[2].split() == row
        assert lines[-1] == "What to do: install the same lerobot-pirl on both sides."


def test_a_peer_without_metadata_differs_in_everything_that_is_judged():
    title = mismatch(METADATA.to_dict(), {})[0]
    assert title == f"metadata of learner and actor differ in {', '.join(JUDGED)}:"


# the hash of a config


@pytest.fixture(scope="module")
def base() -> PiRLTrainConfig:
    return PiRLTrainConfig.from_pretrained(CONFIG, cli_args=[])


def hash_with(base: PiRLTrainConfig, name: str, value: object) -> str:
    """Return the hash of the config with one field replaced."""
    cfg = copy.deepcopy(base)
    *parents, last = name.split(".")
    owner = cfg
    for parent in parents:
        owner = getattr(owner, parent)
    assert hasattr(owner, last)
    setattr(owner, last, value)
    return config_hash(cfg)


def test_an_integer_and_the_same_number_as_a_float_are_one_config(base):
    one = hash_with(base, "algorithm.gae_lambda", 1)
    assert one == hash_with(base, "algorithm.gae_lambda", 1.0)
    assert one != hash_with(base, "algorithm.gae_lambda", 0.5)
    assert hash_with(base, "algorithm.betas", [0, 0.5]) == hash_with(base, "algorithm.betas", (0.0, 0.5))


def test_a_list_in_another_order_is_another_config(base):
    assert hash_with(base, "algorithm.betas", (0.9, 0.5)) != hash_with(base, "algorithm.betas", (0.5, 0.9))


def test_fields_in_another_order_and_spelled_out_defaults_are_the_same_config(base, tmp_path):
    config = json.loads(CONFIG.read_text())
    default = PiRLConfig()
    for name in ("dual_clip", "huber_delta"):
        assert name not in config["algorithm"]
        config["algorithm"][name] = getattr(default, name)
    for name, value in reversed(list(config.items())):
        del config[name]
        config[name] = dict(reversed(value.items())) if isinstance(value, dict) else value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config))
    assert config_hash(PiRLTrainConfig.from_pretrained(path, cli_args=[])) == config_hash(base)


PER_PROCESS = {
    "algorithm.wire": WireConfig(host="localhost", port=1234),
    "algorithm.n_envs": 3,
    "algorithm.async_envs": True,
    "policy.device": "cuda",
    "policy.pretrained_path": "elsewhere",
    "policy.repo_id": "me/policy",
    "policy.tokenizer_name": "elsewhere",
    "steps": 7,
    "output_dir": "outputs/elsewhere",
    "job_name": "other",
    "save_freq": 5,
    "log_freq": 5,
    "resume": True,
}
CRITICAL = {
    "seed": 1,
    "algorithm.learning_rate": 0.5,
    "algorithm.n_action_steps": 3,
    "algorithm.num_denoising_steps": 7,
    "algorithm.episodes_per_iteration": 3,
    "algorithm.bootstrap_truncation": False,
    "policy.hidden_size": 64,
    "policy.dtype": "bfloat16",
    "env.task": "pickup",
}


@pytest.mark.parametrize("name", PER_PROCESS)
def test_where_and_how_fast_a_run_goes_is_not_in_the_hash(name, base):
    assert hash_with(base, name, PER_PROCESS[name]) == config_hash(base)


@pytest.mark.parametrize("name", CRITICAL)
def test_what_is_learned_is_in_the_hash(name, base):
    assert hash_with(base, name, CRITICAL[name]) != config_hash(base)


@pytest.mark.parametrize("name", ["policy.num_denoising_steps", "policy.n_action_steps"])
def test_what_the_recipe_overrules_in_the_policys_config_is_not_in_the_hash(name, base):
    assert hash_with(base, name, 2) == config_hash(base)


# the digest of the frozen weights


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3)
        self.encoder.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)


def test_the_digest_changes_with_frozen_weights_only():
    module = Frozen()
    digest = frozen_digest(module)
    with torch.no_grad():
        module.head.weight.add_(1.0)
    assert frozen_digest(module) == digest
    with torch.no_grad():
        module.encoder.weight[0, 0] += 1.0
    assert frozen_digest(module) != digest


def test_a_frozen_scalar_and_the_name_of_a_weight_are_in_the_digest():
    module = Frozen()
    digest = frozen_digest(module)
    module.logit_scale.data += 1
    assert frozen_digest(module) != digest
    module.logit_scale.data -= 1
    assert frozen_digest(module) == digest
    module.renamed = module.encoder
    del module.encoder
    assert frozen_digest(module) != digest


def test_the_layout_in_memory_is_not_in_the_digest():
    module = Frozen()
    digest = frozen_digest(module)
    module.encoder.weight.data = module.encoder.weight.data.T.contiguous().T
    assert not module.encoder.weight.is_contiguous()
    assert frozen_digest(module) == digest


def test_the_digest_of_a_tokenizer_is_that_of_its_vocabulary():
    def step(vocabulary: dict[str, int]) -> TokenizerProcessorStep:
        return TokenizerProcessorStep(tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary))

    digest = tokenizer_digest([object(), step({"a": 0, "b": 1})])
    assert digest == tokenizer_digest([step({"b": 1, "a": 0})])
    assert digest != tokenizer_digest([step({"a": 1, "b": 0})])
    assert digest != tokenizer_digest([])


def test_metadata_describe_the_run():
    cfg = tiny_config()
    pipeline = SimpleNamespace(steps=[])
    adapter = SimpleNamespace(policy=Frozen(), processors=SimpleNamespace(policy_pre=pipeline))
    metadata = make_metadata(cfg, adapter, None, "run-1")
    assert metadata.config_path == "(command line)"
    assert metadata.config_hash == config_hash(cfg)
    assert (metadata.num_denoising_steps, metadata.n_action_steps) == (4, 4)
    assert json.loads(metadata.policy_features)["action"] == ["ACTION", [7]]
    assert json.loads(json.dumps(metadata.to_dict())) == metadata.to_dict()
