"""JAX on a CPU: jitted steps with donated parameters and state, in one process and on one core.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_jax.py [quick] [--out docs/benchmarks]
"""

from functools import partial
from pkgutil import resolve_name
from typing import Any

import jax
import jax.numpy as jnp

from record import arguments
from steps import Contender, Grads, Optimizer, bench


def optimizer(grads: Grads, dtype: str, name: str, **options: Any) -> Optimizer:
    """Return the compiled step of the transformation called `name`."""
    import optax

    transform = resolve_name(name)(1e-3, **options)

    def compute(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(g.shape, dtype) for g in grads]
    own = [jnp.asarray(g, dtype) for g in grads]
    held = [params, transform.init(params)]
    program = jax.jit(compute, donate_argnums=(0, 1)).lower(*held, own).compile()

    def step() -> None:
        held[:] = jax.block_until_ready(program(*held, own))

    step.program = program
    return Optimizer(step, lambda: sum(x.nbytes for x in jax.tree.leaves(held)))


def extra(optimizer: Optimizer) -> int:
    """Return the bytes of the temporaries that XLA plans."""
    return optimizer.step.program.memory_analysis().temp_size_in_bytes


def contender(name: str, **options: Any) -> Contender:
    dtypes = options.pop("dtypes", ("float32", "bfloat16"))
    # XLA takes minutes to compile a step of 10,000 arrays
    return Contender(name.partition(":")[0], partial(optimizer, name=name, **options), dtypes, most_arrays=1_000)


acprop = partial(contender, "acprop_optax:acprop", clip_exponent=0.25)
CONTENDERS = {
    "acprop_optax": acprop(),
    "acprop_optax, compensate": acprop(compensate=True, dtypes=("bfloat16",)),
    "optax.contrib.acprop": contender("optax.contrib:acprop"),
    "optax.adamw": contender("optax:adamw"),
    "optax.adabelief": contender("optax:adabelief"),
}


def main() -> None:
    """Save the result steps_jax."""
    libraries = ("jax", "jaxlib", "optax")
    bench("jax", CONTENDERS, arguments(__doc__ or ""), unit="optax.adamw", extra=extra, libraries=libraries)


if __name__ == "__main__":
    main()
