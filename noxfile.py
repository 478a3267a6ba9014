"""Sessions for tests, checks and the smoke runs; `nox -l` lists them."""

from datetime import datetime

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "tests"]
# learners and actors of the tests work at once: threads of several processes that share the cores wait for each other
SINGLE_THREAD = {"OMP_NUM_THREADS": "1"}
FAULTS = ("faults", "actors", "ledger", "transport", "wire", "fuzz", "security", "admission", "bad_configs")
PYTHON = nox.project.load_toml("pyproject.toml")["project"]["requires-python"].removeprefix(">=")


@nox.session(python=PYTHON)
def tests(session: nox.Session) -> None:
    """Run the tests against the installed package; those of LIBERO's simulator are in tests_libero."""
    session.install(".[test]")
    session.run("pytest", *session.posargs, env=SINGLE_THREAD)


@nox.session(python=PYTHON)
def tests_libero(session: nox.Session) -> None:
    """Run the tests on LIBERO's simulator; they skip, with the reason, what is missing."""
    session.install(".[test,libero]")
    session.run("pytest", "-m", "libero", *session.posargs, env={"MUJOCO_GL": "egl"})


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def smoke(session: nox.Session) -> None:
    """Train on the tabletop with learner and actor as two processes, and report; takes a few minutes."""
    session.install(".")
    session.run("python", "tests/smoke.py", "tabletop", *session.posargs)


@nox.session(python=PYTHON)
def smoke_libero(session: nox.Session) -> None:
    """The same on LIBERO's simulator; without LIBERO's assets, the fallback that its report names."""
    session.install(".[libero]")
    session.run("python", "tests/smoke.py", "libero", *session.posargs, env={"MUJOCO_GL": "egl"})


@nox.session(python=PYTHON)
def stock(session: nox.Session) -> None:
    """Train with the package, uninstall it, and let LeRobot alone load, evaluate and train on the checkpoint."""
    folder = f"outputs/stock/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    pip = ("uv", "pip", "uninstall") if session.venv_backend == "uv" else ("pip", "uninstall", "--yes")
    session.install(".[libero]")
    session.run("python", "tests/stock.py", "make", folder, *session.posargs)
    session.run(*pip, "lerobot-pirl", external=True)
    session.run("python", "tests/stock.py", "check", folder)


@nox.session(python=PYTHON)
def faults(session: nox.Session) -> None:
    """Run the short forms alone: faults of processes and networks, hostile bytes, bad configs; under ten minutes."""
    session.install(".[test]")
    session.run("pytest", *(f"tests/test_{name}.py" for name in FAULTS), *session.posargs, env=SINGLE_THREAD)


@nox.session(python=PYTHON)
def package(session: nox.Session) -> None:
    """Build the wheel, install it into clean environments and run the start-up tests there."""
    session.install(".[test]")
    session.run(
        "pytest",
        "-q",
        "tests/test_package.py",
        "tests/test_third_party.py",
        "tests/test_startup.py",
        *session.posargs,
    )


@nox.session(python=PYTHON)
def fuzz(session: nox.Session) -> None:
    """Mutate messages, streams into a learner that trains, and configs, at length; report and memory in JSON."""
    session.install(".[test]")
    session.run("python", "-m", "benchmarks.fuzz", *session.posargs, env=SINGLE_THREAD)


@nox.session(python=PYTHON)
def bench(session: nox.Session) -> None:
    """Measure speed against LeRobot and bare limits, LIBERO included, and print the table; about 20 minutes."""
    session.install(".[libero]")
    session.run("python", "-m", "benchmarks.all", *session.posargs, env={"MUJOCO_GL": "egl"})


@nox.session(python=PYTHON)
def scaling(session: nox.Session) -> None:
    """Measure how collection scales with actors, and what an iteration costs against its sizes; plots and JSON."""
    session.install(".")
    session.run("python", "-m", "benchmarks.scaling", "--write")
    session.run("python", "-m", "benchmarks.actors", "--write")


@nox.session(python=PYTHON)
def learn(session: nox.Session) -> None:
    """Demonstrations, lerobot-train, the recipe and lerobot-eval on the tabletop, with all controls; takes hours."""
    session.install(".[test]")
    session.run("python", "-m", "benchmarks.learn", *session.posargs)


@nox.session(python=PYTHON)
def soak(session: nox.Session) -> None:
    """A thousand updates with actor and learner restarted over and over: memory, ledger, curve; takes half an hour."""
    session.install(".[test]")
    session.run("python", "-m", "benchmarks.soak", *session.posargs, env=SINGLE_THREAD)


@nox.session(python=PYTHON)
def soak_kills(session: nox.Session) -> None:
    """Kill a learner fifty times, and saves at every file-system operation; takes half an hour."""
    session.install(".[test]")
    session.run("python", "-m", "benchmarks.kill_soak", *session.posargs)
    single_thread = SINGLE_THREAD | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    report = "benchmarks/results/kills_everywhere.json"
    session.run(
        *("python", "-m", "tests.kills", session.create_tmp(), "--everywhere", "--report", report),
        env=single_thread,
    )
