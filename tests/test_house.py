"""The structure: the arithmetic is in one file, arrows point one way, and private names stay private."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("acprop_core/**/*.py"), *ROOT.glob("adapters/*/*.py")])
OUTSIDE = [file for file in FILES if file.name != "rule.py"]

# What a step is made of, by every name that it has in the packages.
OPERANDS = {
    *("grad", "g", "mu", "nu", "exp_avg", "exp_avg_var", "carry", "update", "d", "direction", "residual"),
    *("new_mu", "new_nu", "new_carry", "wide_carry", "lost", "wanted"),
    *("scale", "offset", "eps", "limit", "old_weight1", "new_weight1", "old_weight2", "new_weight2", "eps_root"),
    *("rate", "lr", "b1", "b2", "beta1", "beta2", "weight_decay", "dither", "grad_scale"),
}
FUNCTIONS = {"sqrt", "rsqrt", "lerp", "addcmul", "addcdiv", "square", "clamp", "expm1", "pow", "divide", "multiply"}

# Arithmetic outside rule.py that is none of the rule: (file, the expression as Python writes it, why it is there).
ALLOWED = {
    ("_state_dict.py", "state['exp_avg_var'] + group['eps']"): "the authors add eps when they use the moment",
    ("_state_dict.py", "-state['exp_avg']"): "Adam averages the negated gradient if it maximizes",
    ("_tiles.py", "param + update"): "the addition to the parameter, in a check that writes nothing",
    ("_traced.py", "row.param + update"): "the addition to the parameter",
    ("_dtypes.py", "-self.numbers.rate"): "the learning rate, for the record of a step",
    ("_rows.py", "1.0 / scale"): "GradScaler's factor, which torch divides by",
    ("_stepper.py", "self._clip_norm / norm"): "the factor of clip_norm",
    ("_overlap.py", "stride * (n - 1)"): "addresses",
}


def arithmetic(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield each operation that takes an operand of a step."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Mod):
            operands = [node.left, node.right]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operands = [node.operand]
        elif isinstance(node, ast.AugAssign):
            operands = [node.target, node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FUNCTIONS:
            operands = [*node.args, node.func.value]
        else:
            continue
        if any(name_of(operand) in OPERANDS for operand in operands):
            yield node


def name_of(node: ast.expr) -> str | None:
    """Return the last name of ``a.b``, the key of ``a["b"]``, or the name itself."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        key = node.slice
        return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else name_of(node.value)
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("file", OUTSIDE, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_arithmetic_of_a_step_outside_the_rule(file: Path) -> None:
    found = {ast.unparse(node) for node in arithmetic(ast.parse(file.read_text()))}
    assert found - {expression for name, expression in ALLOWED if name == file.name} == set()


def test_what_is_allowed_is_there() -> None:
    texts = {file.name: "" for file in OUTSIDE}
    for file in OUTSIDE:
        texts[file.name] += ast.unparse(ast.parse(file.read_text()))
    assert [pair for pair in ALLOWED if pair[1] not in texts[pair[0]]] == []


@pytest.mark.parametrize(
    "source",
    ["new = b2 * nu", "nu *= 0.9", "row.mu + x", "xp.sqrt(nu)", "s['exp_avg'].lerp(g, w)", "torch.lerp(mu, g)"],
)
def test_arithmetic_is_found(source: str) -> None:
    assert list(arithmetic(ast.parse(source)))


def test_the_rule_is_found_to_be_arithmetic() -> None:
    assert len(list(arithmetic(ast.parse((ROOT / "acprop_core/rule.py").read_text())))) > 25


def test_a_step_is_assembled_once() -> None:
    """Everyone calls `rule.step`; the parts of it are named by the compiler's registration alone."""
    parts = re.compile(r"\brule\._(direction|moments|residual|square|average|compensated)\b")
    naming = {str(file.relative_to(ROOT)) for file in OUTSIDE if parts.search(file.read_text())}
    assert naming == {"acprop_core/kernels/element.py"}
    callers = {str(file.relative_to(ROOT)) for file in OUTSIDE if re.search(r"\brule\.step\(", file.read_text())}
    assert callers == {
        "acprop_core/_dtypes.py",  # with casts: the functional core, optax, torch, tiles
        "acprop_core/kernels/calls.py",  # traced
        "acprop_core/kernels/element.py",  # compiled
    }


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", sorted(ROOT.glob("adapters/*/*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_adapters_import_no_private_name_of_the_core(file: Path) -> None:
    names = [name for name in imported(ast.parse(file.read_text())) if name.startswith("acprop_core")]
    assert [name for name in names if any(part.startswith("_") for part in name.split("."))] == []


def test_private_names_of_torch_are_in_one_file() -> None:
    private = re.compile(r"\b(?:torch|Tensor|_utils|_optimizer|optim\.optimizer)\._(?!_)\w+|from torch[\w.]*\._\w+")
    naming = {file.name for file in ROOT.glob("adapters/acprop_torch/*.py") if private.search(file.read_text())}
    assert naming == {"_private.py"}


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: n for name, n in lengths.items() if n > 400 and not name.endswith("rule.py")} == {}


def test_packages_open_with_names_only() -> None:
    for file in ROOT.glob("adapters/*/__init__.py"):
        assert {type(node) for node in ast.parse(file.read_text()).body} <= {ast.Expr, ast.ImportFrom, ast.Assign}
