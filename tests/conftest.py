"""What every test runs under."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

from promises import (  # noqa: F401  # a plugin: pytest finds these by their names
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_pyfunc_call,
    pytest_runtest_logreport,
    pytest_terminal_summary,
)

# One BLAS/OpenMP thread a process: pytest-xdist already runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And one compiler a process: torch.compile would start a pool of further processes, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    """Keep what XLA compiles in a folder of this process until its last test: of five programs two come again.

    Each process has a folder of its own, because JAX writes the files without a lock; processes that tests start have
    none. Tried with the version of JAX that the suite pins.
    """
    gc.freeze()  # modules and collected tests are never garbage, and a full collection need not walk over them
    jax = sys.modules.get("jax")
    if jax is None or jax.__version_info__ < (0, 10):
        return (yield)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        return (yield)
