"""What every test runs under."""

import os

from promises import (  # noqa: F401  # a plugin: pytest finds these by their names
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_pyfunc_call,
    pytest_runtest_logreport,
    pytest_terminal_summary,
)

# One BLAS/OpenMP thread a process: pytest-xdist already runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
