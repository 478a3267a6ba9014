"""A policy that LeRobot trained on a dataset, made ready for LIBERO-shaped environments."""

import json
import shutil

import pytest
import torch
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.utils.constants import OBS_STATE
from safetensors import SafetensorError

from lerobot_pirl.cli import main
from lerobot_pirl.policies.xvla import domain_tables
from lerobot_pirl.policies.xvla_processors import LIBERO_DOMAIN_ID, make_processors, resolve_tokenizer
from lerobot_pirl.prepare import prepare
from tests.toy import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINED_DOMAIN = 0


@pytest.fixture(scope="module")
def config():
    config = tiny_config().policy
    config.tokenizer_name = resolve_tokenizer(config.tokenizer_name)
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A policy as lerobot-train saves it: LeRobot's own pipelines, every table's rows different."""
    folder = tmp_path_factory.mktemp("trained") / "pretrained_model"
    torch.manual_seed(0)
    policy = XVLAPolicy(config)
    with torch.no_grad():
        for name in domain_tables(dict(policy.named_parameters()), config.use_hetero_proj):
            policy.get_parameter(name).normal_()
    policy.save_pretrained(folder)
    for pipeline in make_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(trained, tmp_path_factory):
    target = tmp_path_factory.mktemp("prepared") / "start"
    prepare(trained, target)
    return target


def test_a_read_only_store_is_copied_and_what_is_written_is_not(trained, tmp_path):
    store = shutil.copytree(trained, tmp_path / "store")
    for path in (*store.rglob("*"), store):
        path.chmod(0o555 if path.is_dir() else 0o444)
    prepare(store, tmp_path / "start")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "start", *(tmp_path / "start").rglob("*")))
    store.chmod(0o755)


def test_weights_that_cannot_be_written_leave_nothing(trained, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("lerobot_pirl.prepare.save_file", fail)
    with pytest.raises(OSError, match="model.safetensors cannot be written .*No space left"):
        prepare(trained, tmp_path / "start")
    assert list(tmp_path.iterdir()) == []


def load(folder):
    """Return a policy without randomness, and its pipeline for observations."""
    policy = XVLAPolicy.from_pretrained(folder, strict=True).eval()
    return policy, make_pre_post_processors(policy.config, pretrained_path=str(folder))[0]


def act(policy, batch):
    torch.manual_seed(1)
    policy.reset()
    return policy.predict_action_chunk(batch)


def test_it_acts_on_an_environment_as_the_trained_policy_acts_on_the_frame(trained, prepared):
    """The frame is upright with pixels in [0, 1], the environment's own fixed camera is turned by 180 degrees."""
    generator = torch.Generator().manual_seed(2)
    images = {
        f"observation.images.{name}": torch.rand(1, 3, 64, 64, generator=generator)
        for name in ("image", "image2")
    }
    state, task = torch.rand(1, 20, generator=generator), ["pick it up"]
    before, frame_pipeline = load(trained)
    frame = frame_pipeline(images | {OBS_STATE: state, "task": task})
    after, pipeline = load(prepared)
    environment_pipeline, _ = make_env_pre_post_processors(tiny_config().env, after.config)
    turned = images | {"observation.images.image": images["observation.images.image"].flip(2, 3)}
    seen = pipeline(environment_pipeline(turned | {OBS_STATE: state, "task": task}))
    assert frame["domain_id"].tolist() == [TRAINED_DOMAIN]
    assert seen["domain_id"].tolist() == [LIBERO_DOMAIN_ID]
    for name in images:
        torch.testing.assert_close(seen[name], frame[name])
    torch.testing.assert_close(act(after, seen), act(before, frame))


def test_the_rows_of_other_domains_and_everything_else_stay(trained, prepared, config):
    before, after = load(trained)[0].state_dict(), load(prepared)[0].state_dict()
    tables = domain_tables(before, config.use_hetero_proj)
    assert len(tables) == 5
    for name, value in before.items():
        if name in tables:
            others = [row for row in range(len(value)) if row != LIBERO_DOMAIN_ID]
            assert torch.equal(after[name][others], value[others])
            assert torch.equal(after[name][LIBERO_DOMAIN_ID], value[TRAINED_DOMAIN])
            assert not torch.equal(value[LIBERO_DOMAIN_ID], value[TRAINED_DOMAIN])
        else:
            assert torch.equal(after[name], value)


def test_the_recipe_takes_it_and_refuses_the_trained_one(trained, prepared):
    cfg = tiny_config()
    for folder, fits in ((trained, False), (prepared, True)):
        cfg.policy.pretrained_path = folder
        try:
            if fits:
                make_processors(cfg.policy, cfg.env)
            else:
                with pytest.raises(ValueError, match="must occur exactly once.*lerobot-pirl prepare"):
                    make_processors(cfg.policy, cfg.env)
        finally:
            cfg.policy.pretrained_path = None


def test_a_prepared_policy_stays_as_it_is(prepared, tmp_path):
    assert prepare(prepared, tmp_path / "again") == []
    for path in prepared.iterdir():
        again = (tmp_path / "again" / path.name).read_bytes()
        if path.suffix == ".json":
            assert json.loads(again) == json.loads(path.read_bytes())
        else:
            assert again == path.read_bytes()


def test_the_command_says_what_it_changed(trained, tmp_path, capsys):
    target = tmp_path / "start"
    assert main(["prepare", str(trained), str(target)]) == 0
    out = capsys.readouterr().out
    assert "xvla_imagenet_normalize is left out" in out
    assert f"row {TRAINED_DOMAIN} of 5 tables is copied to row {LIBERO_DOMAIN_ID}" in out
    assert f"{target} is written" in out


def broken(trained, tmp_path, name, change):
    """Return a copy of the trained policy in which a JSON file is different."""
    folder = tmp_path / "broken"
    shutil.copytree(trained, folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda c: c.update(type="act"), "policy of type 'act'"),
        ("config.json", lambda c: c.update(num_domains=3), "num_domains=3"),
        ("policy_preprocessor.json", lambda c: c["steps"].clear(), "0 steps xvla_add_domain_id"),
    ],
)
def test_what_it_cannot_prepare_is_refused_and_nothing_written(
    trained, tmp_path, capsys, name, change, words
):
    folder = broken(trained, tmp_path, name, change)
    assert main(["prepare", str(folder), str(tmp_path / "start")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "start").exists()


def test_a_folder_without_a_policy_and_a_target_that_exists_are_refused(trained, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "no"), str(tmp_path / "start")]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err
    assert main(["prepare", str(trained), str(tmp_path)]) == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err


def test_damaged_weights_are_refused_and_nothing_written(trained, tmp_path, capsys):
    folder = broken(trained, tmp_path, "config.json", lambda c: None)
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert main(["prepare", str(folder), str(tmp_path / "start")]) == 1
    assert "model.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "start").exists()


def test_a_copy_that_cannot_be_finished_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("lerobot_pirl.prepare.save_file", full)
    assert main(["prepare", str(trained), str(tmp_path / "start")]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
