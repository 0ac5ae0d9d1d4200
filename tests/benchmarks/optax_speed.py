"""A training step's optimizer part under jit with donation on the CPU: adamw, optax's own acprop and ours.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/optax_speed.py [quick]

One process, in turns. What would favour one of them is evened out: each is built twice, in opposite orders (of a
thousand small arrays, those that are allocated first lie best), the turns are shuffled, and each waits until the
temporaries of the one before have been given back. Figures are medians over the rounds; ratios are of one round.
"""

import random
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from acprop_optax import acprop

TRANSFORMS = {
    "optax.adamw": optax.adamw(1e-3),
    "optax.contrib.acprop": optax.contrib.acprop(1e-3),
    "acprop_optax": acprop(1e-3),
    "acprop_optax, clip": acprop(1e-3, clip_exponent=0.25),
}


class Contender:
    """One transformation, compiled, with its parameters and state."""

    def __init__(self, transform: optax.GradientTransformation, arrays: int, size: int) -> None:
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.params = [jnp.ones(size) for _ in range(arrays)]
        self.grads = [jnp.linspace(-1.0, 1.0, size) for _ in range(arrays)]
        self.state = transform.init(self.params)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.grads)
        self.program = lowered.compile()

    def seconds(self) -> float:
        """Do a step and return the time that it took."""
        time.sleep(0.02)
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.program(self.params, self.state, self.grads))
        return time.perf_counter() - start


def measure(arrays: int, size: int, rounds: int) -> None:
    """Print, for each, the ratio to adamw, the time, and the temporaries of the compiled program."""
    names = list(TRANSFORMS)
    contenders: dict[str, list[Contender]] = {name: [] for name in names}
    for name in names + names[::-1]:
        contenders[name].append(Contender(TRANSFORMS[name], arrays, size))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(rounds + 1), desc=f"{arrays:,} x {size:,}", leave=False):
        for name in random.sample(names, len(names)):
            seconds = sum(contender.seconds() for contender in contenders[name]) / 2
            if number:  # the first round warms up
                taken[name].append(seconds)
    print(f"{arrays:,} x {size:,} float32")
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken[names[0]], strict=True))
        temporaries = contenders[name][0].program.memory_analysis().temp_size_in_bytes / (4 * arrays * size)
        print(
            f"    {name:24}{ratio:8.2f}{1e3 * statistics.median(taken[name]):10.2f} ms"
            f"{temporaries:8.2f} parameter-sized temporaries"
        )
    faster = [statistics.median(b / a for a, b in zip(taken[o], taken[names[1]], strict=True)) for o in names[2:]]
    print(f"    {names[1]} takes {faster[0]:.1f} times as long as ours, {faster[1]:.1f} times with the clip")


def main() -> None:
    """Measure one large array, and many small ones."""
    quick = "quick" in sys.argv[1:]
    for arrays, size in [(1, 1_000_000)] if quick else [(1, 16_000_000), (1_000, 1_000)]:
        measure(arrays, size, rounds=5 if quick else 30)


if __name__ == "__main__":
    main()
