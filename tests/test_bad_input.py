"""Bad input of each kind in each host: refused by the right exception, which names culprit, reason and remedy.

Every row of the tables in bad_input/ is one bad input. Around all of them stands one test: bit for bit, parameters,
moments, counts and options are afterwards what they were, and the next good step is that of a run that has seen no bad
input. Damaged files are in test_checkpoint.py, gradients that are not finite in test_stepper.py and test_nonfinite.py.
"""

from pathlib import Path
from typing import Any

import pytest

from bad_input.core import CORE, JAX, NUMPY, OPTIONS, Core
from bad_input.files import FILES, Files
from bad_input.optax import OPTAX, OPTAX_OPTIONS, Optax
from bad_input.rows import Bad
from bad_input.stepper import STEPPER, STEPPER_OPTIONS
from hosts import BACKENDS

# The hosts by name: what is in the middle of a run, and the tables for it
WORLDS: dict[str, tuple[type[Any], list[Bad]]] = {
    "numpy": (Core, [*CORE, *NUMPY, *OPTIONS]),
    "jax_eager": (Core, [*CORE, *JAX]),
    "optax": (Optax, [*OPTAX, *OPTAX_OPTIONS]),
    "optax_scale": (Optax, OPTAX),
    "stepper_numba": (Files, [*STEPPER, *STEPPER_OPTIONS, *FILES]),
    "stepper_tiles": (Files, STEPPER),
}
if not BACKENDS["torch"].cannot_run():
    from bad_input.torch import TORCH_CORE, TORCH_OPTIONS, TORCH_PARAMETERS, TORCH_STATES, TORCH_STEPS, Torch

    WORLDS |= {
        "torch": (Core, [*CORE, *TORCH_CORE]),
        "torch_optimizer": (Torch, [*TORCH_OPTIONS, *TORCH_PARAMETERS, *TORCH_STATES, *TORCH_STEPS]),
        "torch_foreach": (Torch, TORCH_STEPS),
        "torch_fused": (Torch, TORCH_STEPS),
    }
ROWS = [(backend, row) for backend, (_, rows) in WORLDS.items() for row in rows]


@pytest.mark.promise("bad input")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(("backend", "row"), ROWS, ids=[f"{backend}-{row.name}" for backend, row in ROWS])
def test_bad_input_is_refused_and_changes_nothing(backend: str, row: Bad, tmp_path: Path) -> None:
    world, twin = (WORLDS[backend][0](backend) for _ in range(2))
    folder = tmp_path / "input"
    folder.mkdir()
    world.folder = folder
    before = world.bits()
    with pytest.raises(row.error) as caught:
        row.act(world)
    assert type(caught.value) is row.error, repr(caught.value)
    missing = [word for word in row.words if word not in str(caught.value)]
    assert not missing, (missing, str(caught.value))
    world.mend()
    assert world.bits() == before
    file = getattr(world, "file", None)
    assert [x.read_bytes() for x in folder.iterdir()] == ([] if file is None else [file])
    world.step()
    twin.step()
    assert world.bits() == twin.bits()


def test_no_row_stands_twice() -> None:
    names = [(backend, row.name) for backend, row in ROWS]
    assert len(set(names)) == len(names)
    distinct = {(WORLDS[backend][0], row.name) for backend, row in ROWS}
    assert len(distinct) > 600
