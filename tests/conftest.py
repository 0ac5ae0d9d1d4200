"""What every test runs under."""

import os

# One BLAS/OpenMP thread a process: pytest-xdist already runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
