"""``lerobot-pirl doctor``: is everything in place on this machine, and for this config?"""

import contextlib
import errno
import logging
import os
import site
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"
_ROW = "{:<30} {:<6} {}"
REQUIRED = ("torch", "grpcio", "safetensors")
OPTIONAL = ("mujoco", "hf-libero")
INSTALL_LIBERO = "pip install 'lerobot-pirl[libero]'"
PTH_FILE = "lerobot_pirl.pth"
PROBE_TIMEOUT_S = 60
# runs in a fresh interpreter whose command line says `-m lerobot.rl.learner` with a recipe
PROBE = """
import sys
for finder in list(sys.meta_path):
    if getattr(finder, "__module__", "") == "lerobot_pirl.startup.hook":
        spec = finder.find_spec("lerobot.rl.learner")
        print(spec.origin if spec else "")
"""


@dataclass(frozen=True)
class Check:
    """A row of the table: what was looked at, :data:`OK`, :data:`WARN` or :data:`FAIL`, and a sentence."""

    name: str
    status: str
    detail: str


Checks = Iterator[Check]


def run(config_path: str | None = None) -> int:
    """Print the table; returns 0 when nothing failed, else 1."""
    out = sys.stdout
    print(_ROW.format("check", "result", "detail"), file=out)
    counts = {OK: 0, WARN: 0, FAIL: 0}
    with _undisturbed():
        for check in diagnose(config_path):
            counts[check.status] += 1
            print(_ROW.format(check.name, check.status, check.detail), file=out, flush=True)
    print(f"{sum(counts.values())} checks, {counts[WARN]} warnings, {counts[FAIL]} failed", file=out)
    return 1 if counts[FAIL] else 0


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep whatever is imported from writing between the rows and from waiting for an answer on stdin."""
    stdin, disabled = sys.stdin, logging.root.manager.disable
    with (
        open(os.devnull, "r+") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
            logging.disable(disabled)


def diagnose(config_path: str | None) -> Checks:
    """Yield every check's rows; what a check raises becomes a row."""
    yield from _guarded("versions", check_versions)
    yield from _guarded("device", check_device)
    yield from _guarded("start-up hook", check_hook)
    yield from _guarded("entry points", check_entry_points)
    cfg = None
    if config_path is not None:
        cfg, row = check_config(config_path)
        yield row
    yield from _guarded("tokenizer", check_tokenizers, cfg)
    yield from _guarded("LIBERO", check_libero, cfg)
    yield from _guarded("port", check_port, cfg)


def _guarded(name: str, check: Callable[..., Checks], *args: Any) -> Checks:
    try:
        yield from check(*args)
    except (Exception, SystemExit) as error:
        yield Check(name, FAIL, _sentence(error))


def _sentence(error: BaseException) -> str:
    """Return an exception on one line; its type where the text alone says too little."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"
    )


def check_versions() -> Checks:
    """Look at the interpreter, this package, LeRobot and what both stand on."""
    import importlib_metadata

    from lerobot_pirl import registry

    def version(name: str) -> str | None:
        with contextlib.suppress(importlib_metadata.PackageNotFoundError):
            return importlib_metadata.version(name)
        return None

    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", OK, f"{python} ({sys.executable})")
    for name in ("lerobot-pirl", *REQUIRED):
        found = version(name)
        remedy = f"not installed; pip install {name}"
        yield Check(name, OK if found else FAIL, found or remedy)
    try:
        registry.check_lerobot_version()
        yield Check("lerobot", OK, f"{version('lerobot')} (supported: {registry.SUPPORTED_LEROBOT})")
    except registry.RegistryError as error:
        yield Check("lerobot", FAIL, _sentence(error))
    for name in OPTIONAL:
        if found := version(name):
            yield Check(name, OK, found)


def check_device() -> Checks:
    """Tell which device torch sees."""
    import torch

    if torch.cuda.is_available():
        yield Check("device", OK, f"cuda ({torch.cuda.get_device_name()})")
    else:
        yield Check("device", OK, "cpu (torch sees no CUDA device)")


def check_hook() -> Checks:
    """Start an interpreter that must be redirected, and see that it would be."""
    from lerobot_pirl.startup.hook import DISABLE

    if value := os.environ.get(DISABLE):
        effect = (
            "LeRobot runs without this package" if value == "1" else "without effect, only 1 switches off"
        )
        yield Check(DISABLE, WARN, f"is set to {value!r}: {effect}; unset it to run recipes")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "-m", "lerobot.rl.learner", "--recipe=pi-rl"],
        env={name: value for name, value in os.environ.items() if name != DISABLE},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
        check=False,
    )
    if origin := done.stdout.strip():
        yield Check("start-up hook", OK, f"`python -m lerobot.rl.learner` with a recipe runs {origin}")
        return
    folders = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages()])
    found = [str(Path(folder) / PTH_FILE) for folder in folders if (Path(folder) / PTH_FILE).is_file()]
    reason = f"{found[0]} has no effect" if found else f"{PTH_FILE} is in none of {', '.join(folders)}"
    said = "".join(f" ({line})" for line in done.stderr.strip().splitlines()[-1:])
    yield Check(
        "start-up hook",
        FAIL,
        f"LeRobot's commands are not redirected, {reason}{said}; reinstall lerobot-pirl, or use the commands "
        "lerobot-pirl-learner and lerobot-pirl-actor",
    )


def check_entry_points() -> Checks:
    """Load every recipe, policy adapter and checkpoint validator, ours and third parties'."""
    from lerobot_pirl import registry

    declared: dict[tuple[str, str], str] = {
        (registry.RECIPES, "pi-rl"): "",
        (registry.POLICY_ADAPTERS, "xvla"): "",
        (registry.CHECKPOINT_VALIDATORS, "pi-rl"): "",
    }
    for group, name, value, distribution in registry.describe():
        declared[group, name] = f"{value} from {distribution}"
    for (group, name), origin in declared.items():
        label = f"{group.rpartition('.')[2].rstrip('s').replace('_', ' ')} {name}"
        if not origin:
            yield Check(label, FAIL, f"no distribution declares it in {group}; reinstall lerobot-pirl")
            continue
        try:
            registry.load(group, name)
            yield Check(label, OK, origin)
        except (Exception, SystemExit) as error:
            yield Check(label, FAIL, f"{_sentence(error)}; repair or uninstall that distribution")


def check_config(path: str) -> tuple[Any, Check]:
    """Parse and validate a run config as learner and actor do; returns it, or None, and the row."""
    from lerobot_pirl import parsing, registry
    from lerobot_pirl.config import PiRLTrainConfig

    # LeRobot's parser and the configs' validation read the command line
    argv, sys.argv = sys.argv, [sys.argv[0], f"--config_path={path}"]
    try:
        name = parsing.read_config_file(path).get("recipe")
        if not name:
            raise ValueError(f'{path} selects no recipe; add "recipe": "pi-rl" to it')
        cfg = parsing.parse_config(registry.recipe(name).config_class)
        if isinstance(cfg, PiRLTrainConfig):
            cfg.validate(check_output_dir=False)
            registry.policy_adapter(cfg.policy.type).validate(cfg)
        else:
            cfg.validate()
        detail = f"{path}: recipe {name}, policy {cfg.policy.type}, environment {cfg.env.type}"
    except (Exception, SystemExit) as error:
        return None, Check("config", FAIL, _sentence(error))
    finally:
        sys.argv = argv
    return cfg, Check("config", OK, detail)


def check_tokenizers(cfg: Any) -> Checks:
    """Load the packaged tokenizer and the config's, and encode an instruction."""
    from lerobot_pirl.policies.xvla_processors import PACKAGED_TOKENIZER

    yield _tokenizer("tokenizer", PACKAGED_TOKENIZER, "reinstall lerobot-pirl")
    name = getattr(cfg.policy, "tokenizer_name", None) if cfg else None
    if name and name != PACKAGED_TOKENIZER:
        remedy = "connect to the Hub once so that it is cached, or name a folder in policy.tokenizer_name"
        yield _tokenizer("policy.tokenizer_name", name, remedy)


def _tokenizer(label: str, name: str, remedy: str) -> Check:
    from transformers import AutoTokenizer

    from lerobot_pirl.policies.xvla_processors import resolve_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer(name), trust_remote_code=False)
        tokens = tokenizer("put the red bowl on the plate")["input_ids"]
        if not tokens:
            raise ValueError("an instruction became no token")
    except Exception as error:
        return Check(label, FAIL, f"{name} cannot be used ({_sentence(error)}); {remedy}")
    return Check(label, OK, f"{name}, {len(tokenizer)} tokens")


def check_libero(cfg: Any) -> Checks:
    """Report on LIBERO; what is wrong with it fails only a config that uses it."""
    from lerobot_pirl.envs import check

    needed = cfg is not None and cfg.env.type == "libero"
    rows = check.check_libero()
    if not needed and len(rows) == 1:
        yield Check(rows[0][0], WARN, f"not installed; optional: {INSTALL_LIBERO}")
        return
    for name, well, detail in rows:
        yield Check(name, OK if well else FAIL if needed else WARN, " ".join(detail.split()))


def check_port(cfg: Any) -> Checks:
    """See whether a learner could listen where the config says."""
    from lerobot_pirl.options import WireConfig
    from lerobot_pirl.transport import security

    wire = getattr(getattr(cfg, "algorithm", None), "wire", None) or WireConfig()
    name = f"port {wire.port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(wire.host, wire.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        detail = f"algorithm.wire.host={wire.host!r} is no known host ({_sentence(error)}); use 127.0.0.1"
        yield Check(name, FAIL, detail)
        return
    try:
        wire.validate()
        security.read(wire)
    except ValueError as error:
        yield Check(name, FAIL, _sentence(error))
        return
    with socket.socket(family, kind) as listener:
        # a learner that ended a minute ago does not count; one that listens does
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                detail = f"{wire.host} is no address of this machine; right for an actor, but no learner can listen there"
                yield Check(name, WARN, detail)
                return
            taken = error.errno == errno.EADDRINUSE
            reason = "taken, a learner may be running there" if taken else f"not usable ({error.strerror})"
            remedy = "stop it or set another algorithm.wire.port for both processes"
            yield Check(name, WARN if taken else FAIL, f"{reason} on {wire.host}; {remedy}")
        else:
            yield Check(name, OK, f"free on {wire.host}")
