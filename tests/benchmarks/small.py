"""Small models, parameter groups, two threads and first steps: a step of ours beside a step of the usual optimizer.

OMP_NUM_THREADS=1 python tests/benchmarks/small.py [quick] [--parts numpy torch] [--out docs/benchmarks]

Each part saves a result of its own, `small_<part>`; the longest takes a minute and a half.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from record import alternate, arguments, pin, quartiles, ratio, save, versions
from steps import Grads, Shape, gradients

Step = Callable[[], object]

SIZES: list[Shape] = [(4, 1_000), (12, 10**4), (50, 1_000), (100, 10**4), (1, 10**6), (1_000, 1_000), (1, 16 * 10**6)]
GROUPS: list[Shape] = [(30, 10**4), (150, 10**4)]  # as many parameter groups as arrays
ARRAYS: list[Shape] = [(4, 1_000), (12, 10**4), (50, 1_000)]
THREADS: list[Shape] = [(1, 3 * 10**5), (1, 10**6), (1, 4 * 10**6), (20, 2 * 10**5), (200, 2 * 10**4), (1, 16 * 10**6)]
ROUNDS, ENOUGH = 200, 1_000  # steps of a contender: at least, and if they are short


class Pair(NamedTuple):
    """What is compared with what."""

    ours: str
    peer: str


class Case(NamedTuple):
    """Steps of one shape that are measured in turns."""

    shape: Shape
    steps: dict[str, Step]
    pairs: list[Pair]
    where: str = ""  # a number of groups or threads, where it is not 1


def eager_adam(grads: Grads) -> Step:
    """Return the step of an Adam as one writes it in NumPy: a line an equation, and new arrays."""
    held = [(np.ones_like(g), np.zeros_like(g), np.zeros_like(g)) for g in grads]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for i, g in enumerate(grads):
            x, m, v = held[i]
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            x = x - 0.001 * (m / (1.0 - 0.9**count)) / (np.sqrt(v / (1.0 - 0.999**count)) + 1e-8)
            held[i] = x, m, v

    return step


def on_numpy() -> Iterator[Case]:
    from bench_numpy import functional, sklearn, stepper

    for shape in ARRAYS:
        grads = gradients(*shape)
        steps = {
            "Stepper, Numba": stepper(grads, "float32", engine="numba").step,
            "Stepper, tiles": stepper(grads, "float32", engine="tiles").step,
            "scikit-learn Adam": sklearn(grads, "float32").step,
            "functional core": functional(grads, "float32").step,
            "eager NumPy Adam": eager_adam(grads),
        }
        pairs = [
            Pair("Stepper, Numba", "scikit-learn Adam"),
            Pair("Stepper, tiles", "scikit-learn Adam"),
            Pair("functional core", "eager NumPy Adam"),
        ]
        yield Case(shape, steps, pairs)


def on_numpy_threads() -> Iterator[Case]:
    from bench_numpy import stepper

    for shape in [ARRAYS[0], *THREADS]:
        grads = gradients(*shape)
        names = {"Stepper, threads=1": 1, "Stepper, threads=2": 2}
        steps = {name: stepper(grads, "float32", engine="numba", threads=n).step for name, n in names.items()}
        yield Case(shape, steps, [Pair("Stepper, threads=2", "Stepper, threads=1")], "2 threads")


def torch_step(grads: Grads, name: str, groups: int = 1, **options: Any) -> Step:
    import torch

    from acprop_torch import ACProp

    params = [torch.ones(g.shape, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g)
    each = len(params) // groups
    given: Any = params if groups == 1 else [{"params": params[i : i + each]} for i in range(0, len(params), each)]
    clip = {"clip_exponent": 0.25} if name == "ACProp" else {}
    kind = {"ACProp": ACProp, "AdamW": torch.optim.AdamW}[name]
    return kind(given, lr=1e-3, weight_decay=0.01, **clip, **options).step


def torch_cases(shapes: Iterable[Shape], groups: bool = False, threads: int = 1, flags: bool = True) -> Iterator[Case]:
    import torch

    torch.set_num_threads(threads)
    ways = {"fused": {"fused": True}, "default flags": {}} if flags else {"fused": {"fused": True}}
    for shape in shapes:
        grads = gradients(*shape)
        number = shape[0] if groups else 1
        steps = {
            f"{name}, {way}": torch_step(grads, name, number, **options)
            for way, options in ways.items()
            for name in ("ACProp", "AdamW")
        }
        where = f"{number} groups" if groups else f"{threads} threads" if threads > 1 else ""
        yield Case(shape, steps, [Pair(f"ACProp, {way}", f"AdamW, {way}") for way in ways], where)


def on_torch() -> Iterator[Case]:
    yield from torch_cases(SIZES[:-1])
    yield from torch_cases(GROUPS, groups=True)


def on_torch_large() -> Iterator[Case]:
    yield from torch_cases(SIZES[-1:])


def on_torch_threads() -> Iterator[Case]:
    yield from torch_cases(THREADS, threads=2, flags=False)


def jax_transforms() -> dict[str, Any]:
    import optax

    import acprop_optax

    options = {"learning_rate": 1e-3, "weight_decay": 1e-4}
    return {"acprop_optax": acprop_optax.acprop(**options, clip_exponent=0.25), "optax.adamw": optax.adamw(**options)}


def on_jax() -> Iterator[Case]:
    """Calls of a jitted function, which find out anew for which arguments it is compiled."""
    import jax
    import jax.numpy as jnp
    import optax

    def compiled(transform: Any, grads: Grads) -> Step:
        def compute(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        own = list(map(jnp.asarray, grads))
        held: list[Any] = [[jnp.ones(g.shape) for g in grads]]
        held.append(transform.init(held[0]))
        program = jax.jit(compute, donate_argnums=(0, 1))

        def step() -> None:
            held[:] = jax.block_until_ready(program(*held, own))

        return step

    pairs = [Pair("acprop_optax", "optax.adamw")]
    for shape in ARRAYS:
        grads = gradients(*shape)
        yield Case(shape, {name: compiled(own, grads) for name, own in jax_transforms().items()}, pairs, "jitted step")


def on_jax_compiling() -> Iterator[Case]:
    import jax
    import jax.numpy as jnp
    import optax

    def compiling(transform: Any, arrays: int) -> Step:
        params = [jnp.ones(10) for _ in range(arrays)]
        state = transform.init(params)

        def compute(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def compile_anew() -> None:
            jax.clear_caches()
            jax.jit(compute, donate_argnums=(0, 1)).lower(params, state, params).compile()

        return compile_anew

    shape = (1_000, 10)
    steps = {name: compiling(own, shape[0]) for name, own in jax_transforms().items()}
    yield Case(shape, steps, [Pair("acprop_optax", "optax.adamw")], "tracing and compiling")


# In a process after the first on a machine: imports of ours and a first step, beside the import of Numba.
FIRST = """
import json, time, small
small.before_{maker}()
start = time.perf_counter()
import numba
numba.njit
between = time.perf_counter()
small.{maker}()
print(json.dumps([time.perf_counter() - between, between - start]))
"""


def before_first_torch() -> None:
    import torch

    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    torch.optim.AdamW([param], fused=True).step()  # torch imports a lot at the first step of any optimizer


def first_torch() -> None:
    torch_step(gradients(4, 1_000), "ACProp", fused=True)()


def before_first_stepper() -> None:
    pass


def first_stepper() -> None:
    from acprop_stepper import Stepper

    Stepper(np.ones(1_000, np.float32), clip_exponent=0.25).step(np.ones(1_000, np.float32))


def first_steps(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return for each adapter the seconds of the first step, with our imports, and of the import of Numba."""
    found: dict[str, list[tuple[float, float]]] = {"acprop_torch, fused": [], "Stepper, Numba": []}
    makers = dict(zip(found, ("first_torch", "first_stepper"), strict=True))
    for number in range(rounds + 1):
        for name, maker in makers.items():
            command = [sys.executable, "-c", FIRST.format(maker=maker)]
            path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
            )
            if number:  # the first of all may have compiled
                found[name].append(tuple(json.loads(done.stdout.splitlines()[-1])))
    return found


class Part(NamedTuple):
    """A result: its cases, the libraries whose versions matter, its rounds, and its cores."""

    cases: Callable[[], Iterator[Case]]
    libraries: tuple[str, ...]
    rounds: int = ROUNDS
    cores: int = 1


PARTS = {
    "numpy": Part(on_numpy, ("numpy", "numba", "scikit-learn")),
    "numpy_threads": Part(on_numpy_threads, ("numpy", "numba"), cores=2),
    "torch": Part(on_torch, ("torch", "numba")),
    "torch_large": Part(on_torch_large, ("torch", "numba")),
    "torch_threads": Part(on_torch_threads, ("torch", "numba"), cores=2),
    "jax": Part(on_jax, ("jax", "jaxlib", "optax")),
    "jax_compiling": Part(on_jax_compiling, ("jax", "jaxlib", "optax"), rounds=3),
}
FIRST_STEPS = "first"


def rows_of(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure a case: a row for each pair."""
    seconds = alternate(case.steps, rounds, most=ENOUGH if rounds == ROUNDS else rounds, budget=1.0)
    for pair in case.pairs:
        own, other = seconds[pair.ours], seconds[pair.peer]
        row = {"contender": pair.ours, "peer": pair.peer, "where": case.where}
        row |= {"arrays": case.shape[0], "size": case.shape[1], "rounds": len(own)}
        yield row | {"seconds": quartiles(own), "peer seconds": quartiles(other), "to peer": ratio(own, other)}


def measure_part(name: str, quick: bool) -> list[dict[str, Any]]:
    part = PARTS[name]
    rows: list[dict[str, Any]] = []
    for case in part.cases():
        rows += rows_of(case, min(part.rounds, 5) if quick else part.rounds)
        del case
        gc.collect()
    return rows


def main() -> None:
    """Save the results, each part measured in a process of its own."""
    given = arguments(__doc__ or "", parts={"nargs": "+", "choices": [*PARTS, FIRST_STEPS], "default": []})
    chosen = given.parts or [*PARTS, FIRST_STEPS]
    if len(chosen) > 1:
        flags = (["quick"] if given.quick else []) + ["--out", str(given.out)]
        for name in chosen:
            start = time.perf_counter()
            subprocess.run([sys.executable, __file__, *flags, "--parts", name], check=True)
            print(f"{name}: {time.perf_counter() - start:.0f} s")
        return
    (name,) = chosen
    if name == FIRST_STEPS:
        rows = [
            {
                "contender": own,
                "seconds": quartiles(first),
                "numba": quartiles(numba),
                "rounds": len(times),
            }
            for own, times in first_steps(2 if given.quick else 7).items()
            for first, numba in [zip(*times, strict=True)]
        ]
        save("small_first", rows, given, versions("numpy", "torch", "numba"))
        return
    part = PARTS[name]
    if part.cores == 1:
        pin()
    elif len(os.sched_getaffinity(0)) < part.cores:
        print(f"{name}: left out, because it needs {part.cores} cores")
        return
    for module in part.libraries:
        if module in ("torch", "jax"):
            import_module(module)
    save(f"small_{name}", measure_part(name, given.quick), given, versions(*part.libraries))


if __name__ == "__main__":
    main()
