"""The suite itself under test: an optimizer that is wrong in one place must break a bound."""

import importlib
import pathlib
import random
import shutil
import sys
from collections.abc import Sequence

import pytest

import acprop_core
import hosts
from agreement import violations
from cases import CASES, Case
from hosts import BACKENDS, Backend

CORE = pathlib.Path(acprop_core.__file__).parent

# name: (file, the text that is replaced, what replaces it, the backend that must notice)
MUTANTS = {
    "residual from m_{t-1}": (
        "rule.py",
        "(mu if flags.centering == Centering.PREVIOUS else new_mu)",
        "mu",
        "numpy",
    ),
    "denominator from s_t": (
        "rule.py",
        "        d = _direction(grad, nu, numbers, flags, xp)\n"
        "        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)\n",
        "        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)\n"
        "        d = _direction(grad, new_nu, numbers, flags, xp)\n",
        "numpy",
    ),
    "no bias correction": (
        "rule.py",
        "scale, offset = _bias_correction(hyper.b2, before if hyper.asynchronous else before + 1, xp)",
        "scale, offset = (1.0, 0.0) if count else (0.0, 1.0)",
        "numpy",
    ),
    "bias correction of the wrong step": (
        "rule.py",
        "scale, offset = _bias_correction(hyper.b2, before if hyper.asynchronous else before + 1, xp)",
        "scale, offset = _bias_correction(hyper.b2, before and before + 1, xp)",
        "numpy",
    ),
    "momentum in the numerator": (
        "rule.py",
        "        d = _direction(grad, nu, numbers, flags, xp)\n"
        "        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)\n",
        "        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)\n"
        "        d = _direction(new_mu, nu, numbers, flags, xp)\n",
        "numpy",
    ),
    "eps_root outside the recurrence": (
        "rule.py",
        "    new_nu = _average(nu, square, numbers.old_weight2, numbers.new_weight2, flags.old_is_lighter2, xp)\n"
        "    return new_mu, new_nu + numbers.eps_root",
        "    square = square + numbers.eps_root\n"
        "    return new_mu, _average(nu, square, numbers.old_weight2, numbers.new_weight2, flags.old_is_lighter2, xp)",
        "numpy",
    ),
    "decay before the step (in the gradient)": (
        "rule.py",
        "(Decay.L2 if hyper.l2 else Decay.DECOUPLED)",
        "Decay.L2",
        "numpy",
    ),
    "schedule off by one": ("adapt.py", "schedule(count),", "schedule(count + 1),", "numpy"),
    "clip off by one": (
        "rule.py",
        "_limit(hyper.clip_exponent, before + 1)",
        "_limit(hyper.clip_exponent, before + 2)",
        "numpy",
    ),
    "eps inside the root": (
        "rule.py",
        "(xp.sqrt(nu * numbers.scale + numbers.offset) + numbers.eps)",
        "xp.sqrt(nu * numbers.scale + numbers.offset + numbers.eps)",
        "numpy",
    ),
    "weights that do not add to one": (
        "rule.py",
        "    return old + new_weight * (new - old)",
        "    return old_weight * old + new_weight * new",
        "numpy",
    ),
    "average always from the old value": (
        "rule.py",
        "    if old_is_lighter:\n",
        "    if False:\n",
        "numpy",
    ),
    "complex residual squared, not |.|^2": (
        "rule.py",
        "xp.real(xp.conj(residual) * residual)",
        "xp.real(residual * residual)",
        "numpy",
    ),
    "16-bit arithmetic": (
        "_dtypes.py",
        "return x if x.dtype == dtype else xp.astype(x, dtype)",
        "return x if x.dtype == dtype else xp.astype(xp.astype(x, xp.float16), dtype)",
        "numpy",
    ),
    "traced bias correction cancels": (
        "rule.py",
        "xp.expm1(exponent)",
        "(b ** (steps + first) - 1.0)",
        "jax_jit",
    ),
    "synchronous: the denominator from s_{t-1}": (
        "rule.py",
        "_direction(new_mu * numbers.mean_scale, new_nu,",
        "_direction(new_mu * numbers.mean_scale, nu,",
        "numpy",
    ),
    "synchronous: the gradient in the numerator": (
        "rule.py",
        "_direction(new_mu * numbers.mean_scale,",
        "_direction(grad,",
        "numpy",
    ),
    "synchronous: no bias correction of the mean": ("rule.py", "new_mu * numbers.mean_scale", "new_mu", "numpy"),
    "synchronous: the mean corrected for one step too many": (
        "rule.py",
        "_bias_correction(hyper.b1, before + 1, xp)",
        "_bias_correction(hyper.b1, before + 2, xp)",
        "numpy",
    ),
    "synchronous: the mean corrected by b2": (
        "rule.py",
        "_bias_correction(hyper.b1, before + 1, xp)",
        "_bias_correction(hyper.b2, before + 1, xp)",
        "numpy",
    ),
    "synchronous: s_t corrected for the steps before": (
        "rule.py",
        "before if hyper.asynchronous else before + 1",
        "before",
        "numpy",
    ),
    "not centred, and centred nevertheless": (
        "rule.py",
        "        return grad\n",
        "        return grad - new_mu\n",
        "numpy",
    ),
    "carry not added later": ("rule.py", "wanted = carry + update", "wanted = update", "numpy"),
    "no dither": ("rule.py", "lost / place + numbers.dither", "lost / place", "numpy"),
}


def _broken(backend: Backend, cases: Sequence[Case] = CASES) -> bool:
    cases = [case for case in cases if not case.random and not backend.cannot_take(case)]
    # In any order but theirs: a mutant of one corner, or of one option, is seen only by cases that stand together. The
    # long ones come last.
    random.Random(0).shuffle(cases)
    cases.sort(key=lambda case: case.steps > 100)
    return any(violations(case, backend.run(case)) for case in cases)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the root of what should be positive
@pytest.mark.parametrize("name", MUTANTS)
def test_suite_catches(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, backend_name = MUTANTS[name]
    backend = BACKENDS[backend_name]
    if reason := backend.cannot_run():
        pytest.skip(reason)
    shutil.copytree(CORE, tmp_path / "acprop_core", ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "acprop_core" / file).read_text()
    assert source.count(old) == 1, "the mutant must change exactly one place"
    (tmp_path / "acprop_core" / file).write_text(source.replace(old, new))

    monkeypatch.syspath_prepend(tmp_path)
    for module in [m for m in sys.modules if m.partition(".")[0] == "acprop_core"]:
        monkeypatch.delitem(sys.modules, module)
    mutant = importlib.import_module("acprop_core")
    assert pathlib.Path(mutant.__file__ or "").is_relative_to(tmp_path)
    monkeypatch.setattr(hosts, "ACProp", mutant.ACProp)
    assert _broken(backend)


def test_suite_passes_what_is_right() -> None:
    assert not _broken(BACKENDS["numpy"], CASES[:20])  # test_suite.py runs all of them
