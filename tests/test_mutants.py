"""The suite itself under test: an optimizer that is wrong in one place must break a bound."""

import importlib
import pathlib
import shutil
import sys

import pytest

import acprop_core
import hosts
from agreement import violations
from cases import CASES
from hosts import BACKENDS, Backend

CORE = pathlib.Path(acprop_core.__file__).parent

# name: (file, the text that is replaced, what replaces it, the backend that must notice)
MUTANTS = {
    "residual from m_{t-1}": (
        "_rule.py",
        "(mu if k.from_previous else new_mu)",
        "mu",
        "numpy",
    ),
    "denominator from s_t": (
        "_rule.py",
        "return direction(grad, nu, k, xp), new_mu, new_nu",
        "return direction(grad, new_nu, k, xp), new_mu, new_nu",
        "numpy",
    ),
    "no bias correction": (
        "_rule.py",
        "scale, offset = _bias_correction(optimizer.b2, count, xp)",
        "scale, offset = (1.0, 0.0) if count else (0.0, 1.0)",
        "numpy",
    ),
    "bias correction of the wrong step": (
        "_rule.py",
        "scale, offset = _bias_correction(optimizer.b2, count, xp)",
        "scale, offset = _bias_correction(optimizer.b2, count and count + 1, xp)",
        "numpy",
    ),
    "momentum in the numerator": (
        "_rule.py",
        "return direction(grad, nu, k, xp), new_mu, new_nu",
        "return direction(new_mu, nu, k, xp), new_mu, new_nu",
        "numpy",
    ),
    "eps_root outside the recurrence": (
        "_rule.py",
        "new_mu, _average(nu, square, k.weight2, k.old_is_lighter2, xp) + k.eps_root",
        "new_mu, _average(nu, square + k.eps_root, k.weight2, k.old_is_lighter2, xp)",
        "numpy",
    ),
    "decay before the step (in the gradient)": (
        "_step.py",
        "if decay and not self._decoupled:",
        "if decay:",
        "numpy",
    ),
    "schedule off by one": (
        "_optimizer.py",
        "learning_rate(count))",
        "learning_rate(count + 1))",
        "numpy",
    ),
    "clip off by one": ("_rule.py", "float(count + 1) ** exponent", "float(count) ** exponent", "numpy"),
    "eps inside the root": (
        "_rule.py",
        "(xp.sqrt(nu * k.scale + k.offset) + k.eps)",
        "xp.sqrt(nu * k.scale + k.offset + k.eps)",
        "numpy",
    ),
    "weights that do not add to one": (
        "_rule.py",
        "return heavy + weight * (light - heavy)",
        "return (1.0 - weight) * heavy + weight * light",
        "numpy",
    ),
    "average always from the old value": (
        "_rule.py",
        "return (b if old_is_lighter else 1.0 - b), old_is_lighter",
        "return 1.0 - b, False",
        "numpy",
    ),
    "complex residual squared, not |.|^2": (
        "_rule.py",
        "xp.real(xp.conj(residual) * residual)",
        "xp.real(residual * residual)",
        "numpy",
    ),
    "16-bit arithmetic": (
        "_rule.py",
        "return x if x.dtype == dtype else xp.astype(x, dtype)",
        "return x if x.dtype == dtype else xp.astype(xp.astype(x, xp.float16), dtype)",
        "numpy",
    ),
    "traced bias correction cancels": (
        "_rule.py",
        "xp.expm1(n * _log(b2, xp))",
        "(b2**n - 1.0)",
        "jax_jit",
    ),
}


def _broken(backend: Backend) -> bool:
    cases = (case for case in CASES if not case.random and not backend.cannot_take(case))
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
    assert not _broken(BACKENDS["numpy"])
