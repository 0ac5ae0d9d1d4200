"""The project's tasks. `python -m nox -l` lists them.

Those that run the project on all frameworks share one environment, `.nox/all-3.11` for Python 3.11, and install into it
what they need; the others have one of their own.
"""

import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["demo", "tests"]
nox.options.reuse_venv = "yes"

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
TORCHES = ["2.5.1", "2.6.0", "2.8.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0"]  # the oldest is the extra's lower bound
# Tests of torch have it in their names or in their file's, or are in a file of these names. Those of the texts and of
# other optimizers need no second torch.
TORCH_TESTS = "(torch or portable or compensate or nonfinite or sixteen) and not (docs or layout or supply or peers)"
# A process a core, each on a stretch of the suite as it stands, so that what one test has compiled or drawn serves the
# next; a process that is done early takes tests from another.
PARALLEL = ["-n", "auto", "--dist", "worksteal"]
# For figures of time: no row is slow because threads wait for cores that the machine does not have.
ONE_THREAD = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")},
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
BY_DOCS = [f"--ignore=tests/{name}.py" for name in ("test_docs", "test_reference_docs")]  # the session docs runs these
PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str, oldest: bool = False) -> None:
    """Install the project with dependency groups of pyproject.toml; with `oldest`, on the oldest versions promised."""
    pins = [requirement.replace(">=", "==") for requirement in promised()] if oldest else []
    session.install(*nox.project.dependency_groups(PROJECT, *groups), *pins, "-e", ".", silent=False)


def shared(session: nox.Session, *groups: str) -> str:
    """Return the Python of the environment that sessions without one share, with these dependency groups in it."""
    folder = Path(f".nox/all-{sys.version_info.major}.{sys.version_info.minor}").absolute()
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not Path(python).exists():
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(folder))
    session.log(f"Installing what is missing in {folder}: the first time several GB, most of it torch with CUDA")
    requirements = nox.project.dependency_groups(PROJECT, *groups)
    session.run_install(python, "-m", "pip", "install", *requirements, "-e", ".")
    return python


def promised() -> list[str]:
    """Return what the project and its extras need, each with its lower bound: all but torch, CuPy and numba-cuda.

    `torch_versions` begins with the oldest torch, and the other two need a device.
    """
    project = PROJECT["project"]
    extras = [project["optional-dependencies"][name] for name in ("optax", "numpy", "fast", "checkpoint")]
    return sorted({x for x in sum(extras, project["dependencies"]) if ">=" in x})


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train on real data in every framework, compare, hand a run over: docs/examples/digits.py."""
    python = shared(session, "demo")
    session.run(python, "docs/examples/digits.py", *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the suite on every CPU backend: all but what `tests_slow` and `docs` run."""
    python = shared(session, "tests")
    session.run(python, "-m", "pytest", *PARALLEL, *BY_DOCS, "-m", "not gpu and not slow", *session.posargs)


@nox.session(venv_backend="none")
def tests_slow(session: nox.Session) -> None:
    """Run the rest of the suite: long runs, and what takes minutes for one test."""
    python = shared(session, "tests")
    session.run(python, "-m", "pytest", *PARALLEL, *BY_DOCS, "-m", "not gpu and slow", *session.posargs)


@nox.session(python=PYTHONS)
def tests_python(session: nox.Session) -> None:
    """Run the suite without torch on each Python: NumPy, Numba, array-api-strict, Dask and JAX."""
    install(session, "suite", "jax", "fast")
    session.run("python", "-m", "pytest", *PARALLEL, "-m", "not gpu and not slow", *session.posargs)


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """Run the suite without torch on the oldest versions that pyproject.toml promises."""
    install(session, "suite", oldest=True)
    session.run("python", "-m", "pytest", *PARALLEL, "-m", "not gpu and not slow", *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("torch", TORCHES)
def torch_versions(session: nox.Session, torch: str) -> None:
    """Run the part of the suite that needs torch on each of its versions (6 GB and some minutes a version)."""
    install(session, "suite", "jax", "fast", "optax_hosts", "examples")
    # A constraints file of the system may hold torch back; what is asked for here is exact. Inductor of 2.5 imports
    # setuptools, which not every tool puts into an environment.
    session.install(f"torch=={torch}", "setuptools", env={"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""})
    session.run("python", "-m", "pytest", *PARALLEL, "-m", "not gpu and not slow", "-k", TORCH_TESTS, *session.posargs)


@nox.session(python="3.11")
def hosts(session: nox.Session) -> None:
    """Train inside the libraries that people train with, stop, and resume to the bit (6 GB and some minutes)."""
    install(session, "suite", "fast", "hosts")
    session.run("python", "-m", "pytest", "-o", "python_files=in_*.py", "tests/in_hosts", *session.posargs)
    session.run("python", "-m", "pytest", "tests/test_scale_torch.py")  # DDP and FSDP2, by torchrun
    session.run("python", "-m", "pytest", *PARALLEL, "-k", "mlx", "tests")


@nox.session(venv_backend="none")
def reliability(session: nox.Session) -> None:
    """Run what holds a promise, and write the counts into docs/reliability.md."""
    python = shared(session, "tests")
    options = ["tests", *PARALLEL, "-m", "promise and not gpu", "--promises", "docs/reliability.md"]
    session.run(python, "-m", "pytest", *options, *session.posargs)


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """Step each CPU backend a million times (an hour or two); `-- --steps 100000` for fewer, and names of hosts."""
    python = shared(session, "tests")
    session.run(python, "tests/soak.py", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run exactly what needs a CUDA device, tests and benchmark: tests/on_device.py; it fails where there is none."""
    python = shared(session, "tests")
    session.run(python, "tests/on_device.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and English."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tests/words.py")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "typecheck", "torch", "jax", "fast", "cuda")
    session.run("mypy")


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the site, warnings being errors, check its links, and run every snippet of README, docs and docstrings."""
    python = shared(session, "docs", "tests")
    # -E: read every page anew; a page read by an earlier run would keep its warnings to itself
    session.run(python, "-m", "sphinx", "-W", "-E", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run(python, "tests/site_check.py", "docs/_build/html", "README.md")
    session.run(python, "-m", "pytest", *PARALLEL, "tests/test_docs.py", "tests/test_reference_docs.py")


@nox.session(venv_backend="none")
def figures(session: nox.Session) -> None:
    """Draw the figures of docs/paper.md in full, and write its tables (two minutes)."""
    python = shared(session, "examples", "jax")
    for name in ("convergence_area", "trajectories", "explosion"):
        session.run(python, f"docs/figures/{name}.py", "--out", "docs/figures")


@nox.session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Install the built wheel, not the tree, in a fresh environment and use it from outside."""
    session.install(".", "numpy")
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", "import acprop_core, acprop_stepper; print(acprop_core.__file__)")
        # what came with it: array-api-compat alone, beside the NumPy asked for
        listed = (
            "import importlib.metadata as m; got = {d.name for d in m.distributions()} - {'pip', 'setuptools', 'wheel'}"
        )
        session.run("python", "-c", f"{listed}; assert got == {{'acprop-core', 'array-api-compat', 'numpy'}}, got")


@nox.session
def bench(session: nox.Session) -> None:
    """Print the benchmarks; `-- quick` is short, `-- small` a part, `-- gpu` on CUDA; `-- --out docs/benchmarks`."""
    install(session, "demo", "rivals", *(["cupy", "cuda"] if "gpu" in session.posargs else []))
    one_thread = {**ONE_THREAD, "KINETO_LOG_LEVEL": "5"}  # torch's profiler is silent
    options = [option for option in session.posargs if option not in ("gpu", "small")]
    if "gpu" in session.posargs:
        session.run("python", "tests/benchmarks/bench_cuda.py", *options)
        return
    session.run("python", "tests/benchmarks/small.py", *options, env=one_thread)
    if "small" in session.posargs:
        session.run("python", "tests/benchmarks/report.py", *options)
        return
    for name in ("numpy", "torch", "jax"):
        session.run("python", f"tests/benchmarks/bench_{name}.py", *options, env=one_thread)
    for name in ("accuracy", "convergence", "ablation", "rates", "report"):
        session.run("python", f"tests/benchmarks/{name}.py", *options)
