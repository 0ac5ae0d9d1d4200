"""numpyro: stochastic variational inference takes an optax transform as its optimizer."""

from pathlib import Path
from typing import Any

import jax
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from acprop_optax import acprop
from runs import Run, check, data, jax_arrays, pickled, unpickled


def model(x: Any, y: Any) -> None:
    weights = numpyro.sample("weights", numpyro.distributions.Normal(0.0, 1.0).expand([8, 3]).to_event(2))
    with numpyro.plate("points", len(x)):
        numpyro.sample("y", numpyro.distributions.Categorical(logits=x @ weights), obs=y)


def train(steps: int, resume: Path | None, save: Path) -> Run:
    x, y = data()
    # begin
    transform = acprop(3e-2, clip_exponent=0.25)
    svi = SVI(model, AutoNormal(model), transform, Trace_ELBO(num_particles=8))
    state = svi.init(jax.random.PRNGKey(0), x, y)
    step = jax.jit(svi.update)
    # end
    done = 0
    if resume is not None:
        done, state = unpickled(resume)
    losses = []
    for _ in range(done, steps):
        state, loss = step(state, x, y)
        losses.append(float(loss))
    pickled(save, (steps, state))
    return Run(losses, jax_arrays(state))


def test_numpyro(tmp_path: Path) -> None:
    check("numpyro", train, tmp_path)
