"""How far ACProp by this project and by others is from its equations after 10,000 steps in float32.

    python tests/benchmarks/accuracy.py [quick] [--out FOLDER]

Six elements see the same normally distributed gradients. Each quantity of each step is compared with the oracle of the
test suite (tests/reference.py, 50 digits), in machine epsilons of float32: update and first moment on the scales of
tests/agreement.py, their largest magnitude so far; the second moment against itself, so that Adam's compare. The ACProp
of optax is compared with the formula that its code has (g_t - m_{t-1}), the second moments of AdamW with Adam's.
Printed is the worst of all elements and steps. Written are accuracy.json, accuracy_table.md, and accuracy.png, which
shows the way there.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from tqdm import tqdm

import acprop_optax

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "docs" / "figures")]
import palette
import record
from agreement import Exact, in_epsilons, oracle
from cases import Case
from eager import EagerACProp
from hosts import BACKENDS, Backend
from reference import mp

RATE, B1, DECAY_RATES = 1e-3, 0.9, (0.999, 0.99999)
STEPS, QUICK_STEPS, POINTS = 10_000, 500, 60
QUANTITIES = {"update": "update", "mu": "first moment", "nu": "second moment"}
Columns = dict[str, np.ndarray]  # quantities, (steps, elements)
Run = Callable[[Case], Columns]

ACPROP, OPTAX, ADAM = "ACProp", "ACProp with g - m of the step before", "Adam"


def by_suite(backend: Backend) -> Run:
    """Return what runs a backend of the test suite."""

    def run(case: Case) -> Columns:
        records = [step["w"] for step in backend.run(case)]
        # what works in place shows its update as the parameter, which was zero
        updates = [r.param if r.update is None else r.update for r in records]
        return {"update": np.stack(updates)} | {q: np.stack([getattr(r, q) for r in records]) for q in ("mu", "nu")}

    return run


def in_jax(make: Callable[..., optax.GradientTransformation]) -> Run:
    """Return what runs an optax transformation in one compiled scan."""

    def run(case: Case) -> Columns:
        transform = make(RATE, b1=B1, b2=case.hyper["b2"])
        zeros = jnp.zeros(case.leaves["w"][1], jnp.float32)

        def step(state: Any, grad: Any) -> Any:
            update, state = transform.update(grad, state, zeros)
            return state, {"update": update, "mu": state[0].mu, "nu": state[0].nu}

        scan = jax.jit(lambda state, grads: jax.lax.scan(step, state, grads)[1])
        return jax.tree.map(np.asarray, scan(transform.init(zeros), case.grads("w")))

    return run


def in_torch(make: Callable[..., torch.optim.Optimizer], nu: str) -> Run:
    """Return what runs a torch optimizer that keeps its second moment as `nu`."""

    def run(case: Case) -> Columns:
        param = torch.zeros(case.leaves["w"][1])
        optimizer = make([param], lr=RATE, betas=(B1, case.hyper["b2"]))
        rows = []
        for grad in torch.from_numpy(case.grads("w")):
            param.zero_()
            param.grad = grad
            optimizer.step()
            rows.append(
                [x.numpy().copy() for x in (param, optimizer.state[param]["exp_avg"], optimizer.state[param][nu])]
            )
        return dict(zip(QUANTITIES, map(np.stack, zip(*rows, strict=True)), strict=True))

    return run


CONTENDERS: dict[str, tuple[str, Run]] = {
    "acprop_core, NumPy": (ACPROP, by_suite(BACKENDS["numpy"])),
    "acprop_optax, jit": (ACPROP, in_jax(acprop_optax.acprop)),
    "acprop_torch, foreach": (ACPROP, by_suite(BACKENDS["torch_foreach"])),
    "acprop_stepper, Numba": (ACPROP, by_suite(BACKENDS["stepper_numba"])),
    "eager torch, textbook form": (ACPROP, in_torch(EagerACProp, "exp_avg_var")),
    "optax.contrib.acprop": (OPTAX, in_jax(optax.contrib.acprop)),
    "optax.adamw": (ADAM, in_jax(functools.partial(optax.adamw, weight_decay=0.0))),
    "torch.optim.AdamW": (ADAM, in_torch(functools.partial(torch.optim.AdamW, weight_decay=0.0), "exp_avg_sq")),
}
OURS = "acprop_"


def case_of(b2: float, formula: str, steps: int) -> Case:
    """Return the case; its name seeds the gradients, so that all formulas see the same."""
    centering = "previous" if formula == OPTAX else "current"
    hyper = {"learning_rate": RATE, "b1": B1, "b2": b2, "centering": centering}
    return Case("accuracy", hyper, {"w": ("float32", (6,))}, steps=steps)


@functools.cache
def truth(b2: float, formula: str, steps: int) -> dict[str, Exact]:
    case = case_of(b2, formula, steps)
    if formula == ADAM:
        return {"nu": adam_moment(case)}
    exact = {quantity: oracle(case, "w", False)[quantity] for quantity in QUANTITIES}
    # without the conditioning of g_t - m_t, which noise does not need
    return exact | {"nu": exact["nu"]._replace(scale=exact["nu"].high)}


def adam_moment(case: Case) -> Exact:
    """Return the second moment of Adam in 50 digits."""
    b2 = mp.mpf(case.hyper["b2"])
    moments = [mp.mpf(0)] * case.leaves["w"][1][0]
    rows = []
    for grads in case.grads("w").astype(float).tolist():
        moments = [b2 * s + (1 - b2) * mp.mpf(g) ** 2 for s, g in zip(moments, grads, strict=True)]
        rows.append(moments)
    high = np.array(rows, dtype=float)
    low = [[float(s - mp.mpf(h)) for s, h in zip(*row, strict=True)] for row in zip(rows, high.tolist(), strict=True)]
    return Exact(high, np.array(low), high)


def compare(steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender, decay rate and quantity."""
    points = np.unique(np.geomspace(1, steps, POINTS).astype(int))
    todo = [(b2, name) for b2 in DECAY_RATES for name in CONTENDERS]
    progress = tqdm(todo, unit="run")
    for b2, name in progress:
        progress.set_description(f"{name}, b2={b2}")
        formula, run = CONTENDERS[name]
        got = run(case_of(b2, formula, steps))
        for quantity, exact in truth(b2, formula, steps).items():
            worst = np.maximum.accumulate(in_epsilons(got[quantity], exact, "float32").max(axis=1))
            yield {
                "contender": name,
                "formula": formula,
                "b2": b2,
                "quantity": quantity,
                "epsilons": round(float(worst[-1]), 2),
                "steps": points.tolist(),
                "epsilons so far": [round(float(x), 3) for x in worst[points - 1]],
            }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the worst errors in Markdown."""
    found = {(row["contender"], row["quantity"], row["b2"]): row["epsilons"] for row in rows}
    tables = []
    for b2 in DECAY_RATES:
        text = f"**b2 = {b2}**\n\n| | compared with | {' | '.join(QUANTITIES.values())} |\n"
        text += "|---|---|" + "---|" * len(QUANTITIES) + "\n"
        for name, (formula, _) in CONTENDERS.items():
            cells = [found.get((name, quantity, b2)) for quantity in QUANTITIES]
            numbers = ["" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in cells]
            text += f"| {name} | {formula} | {' | '.join(numbers)} |\n"
        tables.append(text)
    return "\n".join(tables)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the worst error so far over the steps, ours as one line: the worst of them."""
    from matplotlib import ticker

    dashes = {
        "optax.contrib.acprop": "--",
        "eager torch, textbook form": "-.",
        "optax.adamw": ":",
        "torch.optim.AdamW": (0, (1, 3)),
    }
    plt = palette.pyplot()
    size = (palette.WIDTH, 7.2)
    figure, grid = plt.subplots(2, 2, figsize=size, sharex=True, sharey="row", layout="constrained")
    figure.suptitle("Worst error so far, in machine epsilons of float32", fontsize=12)
    worst = "acprop-core, the worst of four ways"
    for axes, quantity in zip(grid, ("update", "nu"), strict=True):
        for ax, b2 in zip(axes, DECAY_RATES, strict=True):
            here = [row for row in rows if row["quantity"] == quantity and row["b2"] == b2]
            ours = np.max([row["epsilons so far"] for row in here if row["contender"].startswith(OURS)], axis=0)
            ax.plot(here[0]["steps"], ours, color=palette.COLOURS["ACProp"], linewidth=2.6, label=worst)
            for row in here:
                if (name := row["contender"]) in dashes:
                    style = {"color": palette.CONTENDERS[name], "linestyle": dashes[name], "linewidth": 2.0}
                    ax.plot(row["steps"], row["epsilons so far"], label=name, **style)
            ax.set(xscale="log", yscale="log", title=f"{QUANTITIES[quantity]},\nb2 = {b2}")
            ax.grid(alpha=0.25)
    for ax in grid.flat:
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    for ax in grid[1]:
        ax.set_xlabel("step")
    for ax in grid[:, 0]:
        ax.set_ylabel("machine epsilons")
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", handlelength=3.2)
    palette.save(figure, file)


def write(path: Path) -> str:
    """Write table and picture beside the results at `path`; return the table."""
    rows = json.loads(path.read_text())["rows"]
    path.with_name("accuracy_table.md").write_text(table(rows))
    draw(rows, path.with_name("accuracy.png"))
    return table(rows)


def main() -> None:
    """Compare, write the results, print the table."""
    given = record.arguments(__doc__)
    steps = QUICK_STEPS if given.quick else STEPS
    rows = list(compare(steps))
    used = record.versions("jax", "optax", "torch", "numpy", "numba")
    print(write(record.save("accuracy", rows, given, used, steps=steps)))


if __name__ == "__main__":
    main()
