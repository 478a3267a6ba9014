"""How the modules lean on each other: checked on their source, so that a shortcut is seen when it is taken."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lerobot_pirl"
MAX_LINES = 320

# Top to bottom: a module may import what stands below it. What shares a line is on one level and may not import
# each other; a package's modules stand where the package does, unless they have a place of their own.
ORDER: list[set[str]] = [
    # what replaces LeRobot's modules: one step above the mains that they call
    {"startup.learner_main", "startup.actor_main", "startup.train_main"},
    # processes and commands; nothing below knows of them
    {"cli", "learner", "actor"},
    {"doctor", "follower", "inbox", "prepare", "saving"},
    {"launch"},
    {"health", "ledger", "plots"},
    {"metrics"},
    {"build"},
    {"transport"},
    {"checkpoint"},
    {"metadata", "restore"},
    {"digests"},
    {"wire"},
    {"tensors"},
    {"evaluate", "videos"},
    {"collector"},
    {"episodes"},
    {"algorithm"},
    {"admission", "diagnostics", "objective", "parallel", "probe", "targets", "value"},
    # from what a user wrote to a config
    {"config"},
    {"inert", "options", "parsing"},
    {"folders"},
    {"registry"},
    # one iteration's data, the policy, the world
    {"rollout"},
    {"policies", "weights"},
    {"envs"},
    # formulas
    {"noise"},
    {"ppo", "flow", "mlp"},
    # what a value may be, and how a sentence shows one; what a machine has
    {"rules", "memory"},
    # the finder is standard library only, so anybody may ask it what a command line selects
    {"startup"},
    # the version
    {""},
]
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

# the only third-party packages a module may import; modules that are not listed are free
THIRD_PARTY = {
    "": set(),
    "flow": {"torch"},
    "ppo": {"torch"},
    "mlp": {"torch"},
    "noise": {"torch"},
    "folders": set(),
    "rules": set(),
    "memory": set(),
    "wire": {"torch", "xxhash"},
    "tensors": {"torch"},
    "rollout": {"torch", "numpy"},
    "registry": {"importlib_metadata"},
    "cli": set(),
    "health": set(),
    "startup.learner_main": set(),
    "startup.actor_main": set(),
    "startup.train_main": set(),
    # a YAML config is read when a LeRobot command has been recognised, never at interpreter start
    "startup.hook": {"yaml"},
}
# imported package -> the only modules that may import it
ONLY_IN = {
    "grpc": {"transport"},
    "lerobot.transport": {"transport"},
    "libero": {"envs"},
    "mujoco": {"envs"},
    "robosuite": {"envs"},
    "matplotlib": {"plots"},
    "PIL": {"videos"},
    "wandb": {"metrics"},
    "tensorboard": {"metrics"},
    "accelerate": {"parallel"},
    "torch.utils.tensorboard": {"metrics"},
}
# code out of data; LeRobot's transport helpers unpickle what comes over the wire
UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "lerobot.transport.utils",
}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"}
STEPS_ENVIRONMENTS = {"collector", "envs"}


def place(module: str) -> str | None:
    """Return the name in ORDER that a module stands at, its own or its package's; None for a stranger."""
    package = module.rpartition(".")[0]
    return module if module in LEVELS else package if package and package in LEVELS else None


def belongs_to(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, whether in a function) of everything that is imported, wherever in a module."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    deferred = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"(relative).{node.module or ''}"]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield node.lineno, name, node in deferred


def inner_name(imported: str, modules: set[str]) -> str:
    """Return the module of ours behind a dotted name, without the package's own name; "" for the package."""
    name = imported.removeprefix("lerobot_pirl").removeprefix(".")
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def violations(sources: dict[str, str]) -> list[str]:
    """Return what is wrong with modules, given by name without the package's own; "" is the package itself."""
    found = []
    for module, source in sources.items():
        tree = ast.parse(source)
        if place(module) is None:
            found.append(f"{module}: has no place in ORDER")
            continue
        found += [f"{module}:{line}: {text}" for line, text in _import_violations(module, tree, set(sources))]
        found += [f"{module}:{line}: {text}" for line, text in _call_violations(module, tree)]
        lines = len(source.splitlines())
        if lines > MAX_LINES:
            found.append(f"{module}: has {lines} lines, more than {MAX_LINES}")
    return found


def _import_violations(module: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    for line, name, deferred in imports(tree):
        top = name.partition(".")[0]
        if top == "(relative)":
            yield line, "imports relatively; write the full name"
        elif top == "lerobot_pirl":
            theirs = inner_name(name, modules)
            mine, yours = place(module), place(theirs)
            if module == "":
                yield line, "the package imports something"
            elif yours is not None and mine != yours and LEVELS[mine] >= LEVELS[yours]:
                yield line, f"imports {theirs}, which is not below it"
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY.get(module, {top}):
            yield line, f"imports {top}"
        elif top not in sys.stdlib_module_names and belongs_to(module, {"startup"}) and not deferred:
            yield line, f"imports {top} at interpreter start"
        if module == "" and top != "lerobot_pirl":
            yield line, "the package imports something"
        for package, owners in ONLY_IN.items():
            if belongs_to(name, {package}) and not belongs_to(module, owners):
                yield line, f"imports {package}, which belongs to {', '.join(owners)}"
        if belongs_to(name, UNSAFE_MODULES):
            yield line, f"imports {name}, which makes code out of data"


def _call_violations(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in UNSAFE_CALLS:
            yield node.lineno, f"calls {called}, which makes code out of data"
        owner, _, method = called.rpartition(".")
        steps = method in ("step", "reset", "step_async", "step_wait") and "env" in owner.rpartition(".")[2]
        if steps and not belongs_to(module, STEPS_ENVIRONMENTS):
            yield (
                node.lineno,
                f"calls {called}; only {', '.join(sorted(STEPS_ENVIRONMENTS))} step environments",
            )


def package_sources() -> dict[str, str]:
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        sources[".".join(parts).removesuffix("__init__").removesuffix(".")] = path.read_text(encoding="utf-8")
    return sources


def test_the_package_keeps_to_its_layers():
    sources = package_sources()
    assert {"", "learner", "flow", "envs", "envs.chunk", "startup.hook"} <= set(sources)
    assert violations(sources) == []


# a package that keeps all rules, for one of them to be broken
CLEAN = {
    "": '"""A package."""\n__version__ = "1"\n',
    "startup": "",
    "startup.hook": "import os\ndef read():\n    import yaml\n    return yaml\n",
    "startup.learner_main": "from lerobot_pirl.learner import main\n",
    "learner": "from lerobot_pirl import __version__, launch\nfrom lerobot_pirl.transport import Server\n",
    "actor": "from lerobot_pirl.collector import Collector\n",
    "launch": "from lerobot_pirl.startup.hook import read\n",
    "transport": "import grpc\nfrom lerobot.transport import services_pb2\nfrom lerobot_pirl.wire import encode\n",
    "wire": "import json\nimport torch\n",
    "collector": "def collect(envs):\n    envs.reset()\n    return envs.step(0)\n",
    "algorithm": "from lerobot_pirl import flow, ppo\ndef update(self):\n    self.optimizer.step()\n    policy.eval()\n",
    "config": "from lerobot_pirl.envs import chunk\n",
    "policies": "",
    "policies.base": "import torch\nfrom lerobot_pirl import flow\n",
    "envs": "from lerobot_pirl.envs.chunk import ChunkEnv\n",
    "envs.chunk": "def step(self):\n    import libero\n    return self.env.step(0)\n",
    "rollout": "import numpy\nfrom lerobot_pirl.ppo import compute_gae\n",
    "ppo": "import math\nimport torch\n",
    "flow": "import torch.nn.functional as F\n",
}


def test_a_clean_package_has_no_violations():
    assert violations(CLEAN) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        # arrows
        ("rollout", "from lerobot_pirl.algorithm import PiRLAlgorithm", "imports algorithm, which is not below it"),
        ("algorithm", "import lerobot_pirl.learner", "imports learner, which is not below it"),
        ("config", "from lerobot_pirl import actor", "imports actor, which is not below it"),
        ("envs.chunk", "from lerobot_pirl.policies.base import PolicyAdapter", "imports policies.base, which is not"),
        ("ppo", "from lerobot_pirl.flow import noise_table", "imports flow, which is not below it"),
        ("learner", "from lerobot_pirl import actor", "imports actor, which is not below it"),
        ("startup.hook", "from lerobot_pirl import registry, learner", "imports learner, which is not below it"),
        ("wire", "def f():\n    from lerobot_pirl.transport import x", "imports transport, which is not below it"),
        ("wire", "from .transport import x", "imports relatively"),
        ("wire", "from . import flow", "imports relatively"),
        # what a module may lean on at all
        ("flow", "import numpy as np", "imports numpy"),
        ("ppo", "from lerobot.utils import constants", "imports lerobot"),
        ("flow", "if TYPE_CHECKING:\n    import gymnasium", "imports gymnasium"),
        ("startup.hook", "import torch", "imports torch"),
        ("startup.hook", "import yaml", "imports yaml at interpreter start"),
        ("startup.hook", "try:\n    import yaml\nexcept ImportError:\n    pass", "imports yaml at interpreter start"),
        ("startup.learner_main", "import lerobot", "imports lerobot"),
        ("", "import torch", "the package imports something"),
        ("", "import os", "the package imports something"),
        ("", "from lerobot_pirl.flow import x", "the package imports something"),
        # who may do what
        ("learner", "import grpc", "imports grpc, which belongs to transport"),
        ("actor", "from grpc import aio", "imports grpc, which belongs to transport"),
        ("actor", "from lerobot.transport.services_pb2_grpc import X", "imports lerobot.transport, which belongs to"),
        ("config", "from libero.libero import benchmark", "imports libero, which belongs to envs"),
        ("learner", "def f(env):\n    env.step(0)", "calls env.step; only collector, envs step environments"),
        ("actor", "def f(self):\n    self.vector_env.reset(seed=0)", "calls self.vector_env.reset; only"),
        # code out of data
        ("wire", "import pickle", "imports pickle, which makes code out of data"),
        ("wire", "from pickle import loads", "imports pickle.loads, which makes code out of data"),
        ("wire", "x = torch.load('f')", "calls torch.load, which makes code out of data"),
        ("wire", "x = eval('1')", "calls eval, which makes code out of data"),
        ("config", "x = yaml.load(f)", "calls yaml.load, which makes code out of data"),
        ("envs.chunk", "exec('1')", "calls exec, which makes code out of data"),
        ("transport", "from lerobot.transport.utils import bytes_to_python_object", "imports lerobot.transport.utils"),
        ("envs", "import shelve", "imports shelve, which makes code out of data"),
        # size
        ("wire", "\n" * MAX_LINES, f"lines, more than {MAX_LINES}"),
        ("stray", "", "stray: has no place in ORDER"),
        ("stray.module", "", "stray.module: has no place in ORDER"),
    ],
)  # fmt: skip
def test_a_violation_is_found(module, line, expected):
    found = violations(CLEAN | {"registry": "", module: CLEAN.get(module, "") + line + "\n"})
    assert found
    assert all(each.startswith(f"{module}:") for each in found)
    assert any(expected in each for each in found), found


def test_a_violation_is_reported_with_its_line():
    assert violations(CLEAN | {"ppo": "import math\n\nimport numpy\n"}) == ["ppo:3: imports numpy"]
