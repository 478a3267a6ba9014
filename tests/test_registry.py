"""Entry points: ours and anybody else's through one lookup, with errors that name the distribution."""

import sys
from collections.abc import Iterator
from pathlib import Path

import importlib_metadata
import pytest

from lerobot_pirl import registry
from tests.installs import fake_distribution, write_files

OURS = {
    (registry.RECIPES, "pi-rl"),
    (registry.POLICY_ADAPTERS, "xvla"),
    (registry.CHECKPOINT_VALIDATORS, "pi-rl"),
}
RECIPE_MODULE = """
from lerobot_pirl.registry import Recipe

RECIPE = Recipe(name="walk", config_class=dict, learner="walker:learn", actor="walker:act")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path`` for fake distributions; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def own_version() -> str:
    return f"lerobot-pirl {importlib_metadata.version('lerobot-pirl')}"


def test_our_entry_points_are_found_next_to_those_of_others(site):
    groups = {registry.RECIPES: {"walk": "walker:RECIPE"}, registry.POLICY_ADAPTERS: {"gait": "walker:Gait"}}
    fake_distribution(site, "walker", "3.1", groups)
    rows = registry.describe()
    assert {(group, name) for group, name, _, origin in rows if origin == own_version()} == OURS
    assert (registry.RECIPES, "walk", "walker:RECIPE", "walker 3.1") in rows
    assert (registry.POLICY_ADAPTERS, "gait", "walker:Gait", "walker 3.1") in rows


def test_our_entry_points_load():
    assert registry.recipe("pi-rl").name == "pi-rl"
    assert callable(registry.checkpoint_validators("pi-rl")["pi-rl"].validate)
    assert callable(registry.policy_adapter("xvla").validate)


def test_the_mains_that_our_recipe_names_exist():
    recipe = registry.recipe("pi-rl")
    for reference in (recipe.learner, recipe.actor):
        assert callable(importlib_metadata.EntryPoint("main", reference, "any").load())


def test_a_third_partys_recipe_is_loaded(site):
    fake_distribution(site, "walker", "3.1", {registry.RECIPES: {"walk": "walker:RECIPE"}})
    write_files(site, {"walker.py": RECIPE_MODULE})
    assert registry.recipe("walk").learner == "walker:learn"


@pytest.mark.parametrize(
    ("lookup", "kind", "known"),
    [
        (registry.recipe, "recipe", "'pi-rl'"),
        (registry.policy_adapter, "policy adapter", "'xvla'"),
        (registry.checkpoint_validators, "checkpoint validator", "'pi-rl'"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_where_they_come_from(site, lookup, kind, known):
    groups = {group: {"zig": "walker:THING"} for group in registry.GROUPS}
    fake_distribution(site, "walker", "3.1", groups)
    with pytest.raises(registry.RegistryError) as caught:
        lookup("run")
    assert str(caught.value) == (
        f"unknown {kind} 'run'; known are {known} (from {own_version()}), 'zig' (from walker 3.1)"
    )


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("", "AttributeError: module 'faulty' has no attribute 'RECIPE'"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_broken_entry_point_is_named_with_its_distribution(site, source, complaint):
    fake_distribution(site, "faulty-plugin", "0.2", {registry.RECIPES: {"limp": "faulty:RECIPE"}})
    write_files(site, {"faulty.py": source})
    with pytest.raises(registry.RegistryError) as caught:
        registry.recipe("limp")
    assert str(caught.value).startswith(
        f"the entry point limp = faulty:RECIPE of faulty-plugin 0.2 in {registry.RECIPES} cannot be loaded: "
    )
    assert complaint in str(caught.value)


def test_a_broken_entry_point_leaves_the_others_alone(site):
    fake_distribution(site, "walker", "3.1", {registry.RECIPES: {"walk": "walker:RECIPE"}})
    fake_distribution(site, "faulty-plugin", "0.2", {registry.RECIPES: {"limp": "not a reference"}})
    write_files(site, {"walker.py": RECIPE_MODULE})
    assert registry.recipe("walk").name == "walk"
    assert registry.recipe("pi-rl").name == "pi-rl"


def test_metadata_left_over_from_a_removed_distribution_does_no_harm(site):
    write_files(site, {"gone-1.0.dist-info/entry_points.txt": f"[{registry.RECIPES}]\nlimp = gone:RECIPE\n"})
    with pytest.raises(registry.RegistryError, match="limp = gone:RECIPE of a distribution without metadata"):
        registry.recipe("limp")
    assert (registry.RECIPES, "pi-rl", "lerobot_pirl.config:RECIPE", own_version()) in registry.describe()


def test_a_name_declared_by_two_distributions_is_an_error_that_names_both(site):
    fake_distribution(site, "usurper", "6.6", {registry.RECIPES: {"pi-rl": "usurper:RECIPE"}})
    with pytest.raises(registry.RegistryError) as caught:
        registry.recipe("pi-rl")
    assert str(caught.value) == (
        f"'pi-rl' in {registry.RECIPES} is declared by {own_version()} (lerobot_pirl.config:RECIPE) and "
        "usurper 6.6 (usurper:RECIPE); uninstall all but one of them"
    )


def test_two_distributions_that_disagree_about_one_name_leave_the_other_names_alone(site):
    write_files(site, {"walker.py": RECIPE_MODULE})
    fake_distribution(site, "walker", "3.1", {registry.RECIPES: {"walk": "walker:RECIPE"}})
    for name in ("usurper", "pretender"):
        fake_distribution(site, name, "6.6", {registry.RECIPES: {"crown": f"{name}:RECIPE"}})
    assert registry.recipe("walk").name == "walk"


def test_a_copy_of_a_distribution_further_down_the_path_is_no_duplicate(site, monkeypatch):
    for version in ("2.0", "1.0"):
        folder = site / version
        folder.mkdir()
        fake_distribution(folder, "walker", version, {registry.RECIPES: {"walk": "walker:RECIPE"}})
    monkeypatch.syspath_prepend(site / "1.0")
    monkeypatch.syspath_prepend(site / "2.0")
    origins = [origin for group, name, _, origin in registry.describe() if name == "walk"]
    assert origins == ["walker 2.0"]


def test_a_recipe_entry_point_must_hold_a_recipe(site):
    fake_distribution(site, "odd", "1.0", {registry.RECIPES: {"odd": "odd_recipe:RECIPE"}})
    write_files(site, {"odd_recipe.py": "RECIPE = {'learner': 'odd:learn'}\n"})
    with pytest.raises(registry.RegistryError) as caught:
        registry.recipe("odd")
    assert str(caught.value) == (
        "the entry point odd = odd_recipe:RECIPE of odd 1.0 is a dict instead of a lerobot_pirl.registry.Recipe"
    )


def test_looking_up_imports_nothing(site):
    write_files(site, {"walker_untouched.py": "raise RuntimeError"})
    fake_distribution(site, "walker", "3.1", {registry.RECIPES: {"walk": "walker_untouched:RECIPE"}})
    registry.describe()
    assert "walker_untouched" not in sys.modules


@pytest.mark.parametrize("version", ["0.6.1", "0.6.2"])
def test_a_known_lerobot_passes(site, version):
    fake_distribution(site, "lerobot", version, {})
    registry.check_lerobot_version()


@pytest.mark.parametrize("version", ["0.5.0", "0.6.0", "0.7.0", "1.0"])
def test_another_lerobot_is_refused_with_the_known_range(site, version):
    fake_distribution(site, "lerobot", version, {})
    with pytest.raises(registry.RegistryError) as caught:
        registry.check_lerobot_version()
    assert str(caught.value) == (
        f"lerobot {version} is installed, but this lerobot-pirl knows lerobot >= 0.6.1, < 0.7; "
        "install a version in that range"
    )


def test_a_lerobot_without_metadata_is_refused(monkeypatch):
    def version(name):
        raise importlib_metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib_metadata, "version", version)
    with pytest.raises(registry.RegistryError, match="lerobot of an unknown version is installed"):
        registry.check_lerobot_version()


# --- validators ----------------------------------------------------------------------------------

LAB_MODULE = """
from lerobot_pirl.registry import CheckpointValidator

VALIDATOR = CheckpointValidator(validate=print, fields=lambda cfg, adapter: {"gravity": 9.81})
"""


def validators_of(site: Path, name: str, source: str = LAB_MODULE, entry: str = "pi-rl.lab") -> list[str]:
    """Install a distribution with a validator; return the names of those of our recipe."""
    write_files(site, {f"{name}.py": source})
    fake_distribution(site, name, "1.2", {registry.CHECKPOINT_VALIDATORS: {entry: f"{name}:VALIDATOR"}})
    return list(registry.checkpoint_validators("pi-rl"))


def test_validators_of_others_come_after_the_recipes_own_in_the_order_of_their_names(site):
    assert validators_of(site, "works", entry="pi-rl.zoo") == ["pi-rl", "pi-rl.zoo"]
    assert validators_of(site, "lab") == ["pi-rl", "pi-rl.lab", "pi-rl.zoo"]
    assert registry.checkpoint_validators("pi-rl")["pi-rl.lab"].fields(None, None) == {"gravity": 9.81}


@pytest.mark.parametrize("entry", ["lab", "pi-rl-2.lab", "pi-rlx", "gait.pi-rl.lab"])
def test_a_validator_of_another_recipe_does_not_judge(site, entry):
    assert validators_of(site, "lab", entry=entry) == ["pi-rl"]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("VALIDATOR = {'validate': print}", "dict"),
        ("VALIDATOR = print", "builtin_function_or_method"),
        ("from lerobot_pirl.registry import CheckpointValidator as VALIDATOR", "type"),
    ],
)
def test_a_validator_that_is_none_is_refused_with_its_type(site, source, kind):
    with pytest.raises(registry.RegistryError) as caught:
        validators_of(site, "lab", source)
    assert str(caught.value) == (
        f"the entry point pi-rl.lab = lab:VALIDATOR of lab 1.2 is a {kind} instead of a "
        "lerobot_pirl.registry.CheckpointValidator"
    )


def test_a_broken_validator_is_refused_rather_than_left_out(site):
    with pytest.raises(registry.RegistryError, match=r"pi-rl\.lab = lab:VALIDATOR of lab 1\.2 .* no licence"):
        validators_of(site, "lab", "raise RuntimeError('no licence')")


def test_a_validator_that_two_distributions_declare_is_refused_with_both(site):
    validators_of(site, "lab")
    with pytest.raises(registry.RegistryError) as caught:
        validators_of(site, "workshop")
    assert str(caught.value) == (
        f"'pi-rl.lab' in {registry.CHECKPOINT_VALIDATORS} is declared by lab 1.2 (lab:VALIDATOR) and "
        "workshop 1.2 (workshop:VALIDATOR); uninstall all but one of them"
    )


def fields_of(site: Path, expression: str) -> dict:
    """Return the fields of a validator whose function returns an expression."""
    source = f"""
import math
from pathlib import Path

import numpy

from lerobot_pirl.registry import CheckpointValidator

VALIDATOR = CheckpointValidator(validate=print, fields=lambda cfg, adapter: {expression})
"""
    validators_of(site, "lab", source)
    return registry.validator_fields("pi-rl", None, None)


def test_fields_of_a_validator_carry_its_name(site):
    assert fields_of(site, "{'gravity': 9.81, 'floor': None}") == {
        "pi-rl.lab.gravity": 9.81,
        "pi-rl.lab.floor": None,
    }


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("None", "returns its fields as a NoneType instead of a dict"),
        ("['gravity']", "returns its fields as a list instead of a dict"),
        ("{'gravity': 1 / 0}", "cannot tell its fields (ZeroDivisionError: division by zero)"),
        (
            "{'seed': cfg.seed}",
            "cannot tell its fields (AttributeError: 'NoneType' object has no attribute 'seed')",
        ),
        (
            "{'gravity': numpy.float32(9.81)}",
            "returns no JSON value as its field 'gravity' (TypeError: Object of type float32 is not JSON serializable)",
        ),
        (
            "{'floor': 1, 'scene': Path('a')}",
            "returns no JSON value as its field 'scene' (TypeError: Object of type PosixPath is not JSON serializable)",
        ),
    ],
)
def test_a_validator_whose_fields_are_wrong_is_named_with_its_distribution(site, expression, problem):
    with pytest.raises(registry.RegistryError) as caught:
        fields_of(site, expression)
    assert str(caught.value) == f"validator 'pi-rl.lab' of lab 1.2 {problem}; correct or uninstall it"


@pytest.mark.parametrize("value", ["math.nan", "math.inf", "[1, {'deep': math.nan}]"])
def test_a_field_that_is_not_finite_is_refused(site, value):
    with pytest.raises(
        registry.RegistryError, match=r"^validator 'pi-rl\.lab' of lab 1\.2 .* 'gravity' \(ValueError"
    ):
        fields_of(site, f"{{'gravity': {value}}}")
