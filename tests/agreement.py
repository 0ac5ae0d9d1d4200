"""How far a trajectory is from the oracle, in machine epsilons, and how far it may be."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import finfo

from acprop_core import ACProp
from cases import DTYPES, Case
from reference import Hyperparameters, mp, trajectory

QUANTITIES = ("update", "param", "mu", "nu")

# The published bounds (docs/guarantees.md), in machine epsilons over all backends, cases and steps, each at most twice
# what was measured (tests/benchmarks/bounds.py). The unit is the epsilon of the dtype in which the quantity is kept.
# `update` and `mu` count against their largest magnitude so far, `nu` against itself, `param` against the parameter and
# the update; each with the conditioning that the oracle carries along.
BOUNDS = {
    "float16": {"update": 1.2, "param": 0.7},
    "bfloat16": {"update": 1.0, "param": 0.7},
    "float32": {"update": 3.0, "param": 1.5, "mu": 2.5, "nu": 5.0},
    "float64": {"update": 3.0, "param": 2.5, "mu": 3.0, "nu": 5.5},
}
# The same for random hyperparameters, of which `cases.WORST_SEEDS` pins the worst: an average whose rate is within 1e-6
# of 1 loses half a unit in the last place at every step, in any arithmetic of this width.
RANDOM_BOUNDS = {
    "float32": {"update": 12.0, "param": 8.0, "mu": 16.0, "nu": 16.0},
    "float64": {"update": 7.0, "param": 4.0, "mu": 6.5, "nu": 12.0},
}
# The same where the second moment is not centred. Zero gradients only multiply it by b2 then, and near 1 that product
# is rounded the same way at each of 60 steps, by up to half a unit in its last place.
UNCENTRED_BOUNDS = {**RANDOM_BOUNDS, "float64": {**RANDOM_BOUNDS["float64"], "nu": 24.0}}

# How far a 16-bit parameter and its carry are from the parameter of a float64 run, in units in the last place of a
# number of 16 significant bits: a pair of bfloat16 numbers holds no more. After n steps of noise their roundings add up
# to this times sqrt(n), as so many at random do; what constant updates lose in 10,000 steps has a bound of its own.
# Measured are 0.41 and 4.6 at most for bfloat16, 0.01 and 0.09 for float16; on 1,000 parameters up to 0.6 under noise.
NOISE_BOUNDS = {"float16": 0.025, "bfloat16": 1.0}
CONSTANT_BOUNDS = {"float16": 0.2, "bfloat16": 8.0}


class Record(NamedTuple):
    """What one step did to one parameter: NumPy arrays; no update from a host that works in place."""

    update: np.ndarray | None
    param: np.ndarray
    mu: np.ndarray
    nu: np.ndarray
    carry: np.ndarray | None = None


Trajectory = Sequence[dict[str, Record]]


class Exact(NamedTuple):
    """One quantity by the oracle, (steps, *shape): value = high + low, exact to 100 bits, and its scale."""

    high: np.ndarray
    low: np.ndarray
    scale: np.ndarray


def violations(case: Case, steps: Trajectory, complex_as_real: bool = False) -> list[str]:
    """Return a line for each bound that a trajectory breaks."""
    if case.free:
        return [
            f"parameter and carry are {error:.3g} units from the float64 run ({what}); the bound is {bound}"
            for what, error, bound in compensation_errors(case, steps)
            if not error <= bound
        ]
    bounds = bounds_of(case)
    return [
        f"{quantity} is {error:.3g} epsilons of {dtype} from the oracle; the bound is {bounds[dtype][quantity]}"
        for (quantity, dtype), error in errors(case, steps, complex_as_real).items()
        if not error <= bounds[dtype][quantity]
    ]


def bounds_of(case: Case) -> dict[str, dict[str, float]]:
    """Return the bounds of each quantity, by dtype."""
    if not case.random:
        return BOUNDS
    return UNCENTRED_BOUNDS if case.hyper.get("centering") == "none" else RANDOM_BOUNDS


def errors(case: Case, steps: Trajectory, complex_as_real: bool = False) -> dict[tuple[str, str], float]:
    """Return the largest error of each (quantity, dtype) in machine epsilons.

    With `complex_as_real` a complex parameter counts as two real ones, as in torch.optim.
    """
    assert len(steps) == case.steps
    worst: dict[tuple[str, str], float] = {}
    for leaf in case.leaves:
        exact = oracle(case, leaf, complex_as_real)
        dtypes = expected_dtypes(case, leaf)
        for quantity in QUANTITIES:
            records = [getattr(step[leaf], quantity) for step in steps]
            if records[0] is None:
                continue
            for record in records:
                assert record.dtype == DTYPES[dtypes[quantity]], (leaf, quantity, record.dtype)
            got = np.stack([as_real(x) if complex_as_real else x for x in records])
            assert got.shape == exact[quantity].high.shape, (leaf, quantity, got.shape)
            unit = unit_of(dtypes, quantity)
            error = float(np.max(in_epsilons(got, exact[quantity], unit), initial=0.0))
            worst[quantity, unit] = max(worst.get((quantity, unit), 0.0), error)
    return worst


def compensation_errors(case: Case, steps: Trajectory) -> list[tuple[str, float, float]]:
    """Return for each 16-bit parameter a description, the largest error, and what that may be."""
    truth = _float64_run(case)
    found = []
    for leaf, (dtype, _) in case.leaves.items():
        for record in (step[leaf] for step in steps):
            assert record.carry is not None
            assert record.param.dtype == record.carry.dtype == DTYPES[dtype]
        sums = np.stack([step[leaf].param.astype(np.float64) + step[leaf].carry.astype(np.float64) for step in steps])
        largest = np.maximum.accumulate(np.abs(truth[leaf]))
        error = np.abs(sums - truth[leaf]) / 2.0 ** (np.floor(np.log2(largest)) - 15)
        roots = np.sqrt(np.arange(1.0, case.steps + 1.0))
        found += [
            (f"{leaf}, constant", float(np.max(error[:, ::2])), CONSTANT_BOUNDS[dtype]),
            (f"{leaf}, noise / sqrt(n)", float(np.max(error[:, 1::2] / roots[:, None])), NOISE_BOUNDS[dtype]),
        ]
    return found


@functools.cache
def _float64_run(case: Case) -> dict[str, np.ndarray]:
    """Return the parameters after each step, by the functional core, which other cases compare with the oracle."""
    hyper = {name: x for name, x in case.hyper.items() if name != "compensate"}
    optimizer = ACProp(**hyper)
    grads = {leaf: case.grads(leaf).astype(np.float64) for leaf in case.leaves}
    params = {leaf: case.params(leaf)[0].astype(np.float64) for leaf in case.leaves}
    state, rows = optimizer.init(params), []
    for t in range(case.steps):
        updates, state = optimizer.update({leaf: x[t] for leaf, x in grads.items()}, state)
        params = optimizer.apply(params, updates)
        rows.append(params)
    return {leaf: np.stack([row[leaf] for row in rows]) for leaf in case.leaves}


def in_epsilons(got: np.ndarray, exact: Exact, unit: str) -> np.ndarray:
    """Return the error of each element, (steps, *shape), in machine epsilons; infinite if any is not finite."""
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    info = finfo(DTYPES[unit])
    with np.errstate(invalid="ignore"):
        error = np.abs((got.astype(wide) - exact.high) - exact.low)
    if not np.all(np.isfinite(error)):
        return np.full(error.shape, np.inf)
    scale = np.maximum(exact.scale, float(info.smallest_normal))
    return error / scale / float(info.eps)


@functools.cache
def oracle(case: Case, leaf: str, complex_as_real: bool) -> dict[str, Exact]:
    grads, params = case.grads(leaf), case.params(leaf)
    if complex_as_real:
        grads, params = as_real(grads), as_real(params)
    h = {k: v for k, v in case.hyper.items() if k not in ("weight_decay", "mask", "moment_dtype")}
    hyper = Hyperparameters(**h, decay=case.hyper.get("weight_decay", 0.0) if case.decays(leaf) else 0.0)
    arithmetic = unit_of(expected_dtypes(case, leaf), "nu")
    epsilon = float(finfo(DTYPES[arithmetic]).eps)
    wide = np.complex128 if grads.dtype.kind == "c" else np.float64
    columns = [
        trajectory(hyper, g.tolist(), x.tolist(), epsilon)
        for g, x in zip(
            grads.astype(wide).reshape(case.steps, -1).T, params.astype(wide).reshape(case.steps, -1).T, strict=True
        )
    ]

    def table(pick: Any, dtype: Any) -> np.ndarray:
        rows = [[pick(element) for element in column] for column in columns]
        return np.array(rows, dtype=dtype).reshape(len(columns), case.steps).T.reshape(grads.shape)

    result = {}
    for quantity in QUANTITIES:
        kind = np.float64 if quantity == "nu" else wide
        number = complex if kind is np.complex128 else float
        scale = f"{'update' if quantity == 'param' else quantity}_scale"
        result[quantity] = Exact(
            table(lambda e, q=quantity, n=number: n(getattr(e, q)), kind),
            table(lambda e, q=quantity, n=number: n(getattr(e, q) - mp.mpmathify(n(getattr(e, q)))), kind),
            table(lambda e, s=scale: float(getattr(e, s)), np.float64),
        )
    # a parameter is rounded after the update is added
    param = result["param"]
    result["param"] = param._replace(scale=param.scale + np.maximum(np.abs(param.high), np.abs(params.astype(wide))))
    return result


def expected_dtypes(case: Case, leaf: str) -> dict[str, str]:
    """Return the dtype in which each quantity must arrive."""
    dtype = case.leaves[leaf][0]
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    nu = case.hyper.get("moment_dtype") or {"float16": "float32", "bfloat16": "float32"}.get(real, real)
    mu = nu if dtype == real else dtype
    return {"update": dtype, "param": dtype, "mu": mu, "nu": nu}


def unit_of(dtypes: dict[str, str], quantity: str) -> str:
    """Return the real dtype whose epsilon is the unit: an update cannot be better than the moments it comes from."""
    coarse = ("bfloat16", "float16", "float32", "float64")
    names = {dtypes["nu"]} if quantity in ("mu", "nu") else {dtypes["update"], dtypes["nu"]}
    real = {{"complex64": "float32", "complex128": "float64"}.get(name, name) for name in names}
    return min(real, key=coarse.index)


def as_real(x: np.ndarray) -> np.ndarray:
    """Return a real array with (real, imaginary) as its last axis, if `x` is complex."""
    return np.stack([x.real, x.imag], axis=-1) if x.dtype.kind == "c" else x
