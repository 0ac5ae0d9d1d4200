"""The reference pages and the vendored rule: what a page says is complete or alone is so."""

import ast
import enum
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from acprop_core import ACProp

ROOT = Path(__file__).parents[1]


def sources() -> list[Path]:
    return sorted(path for folder in ("acprop_core", "adapters") for path in (ROOT / folder).rglob("*.py"))


def templates(node: ast.AST) -> Iterator[str]:
    """Yield what an expression says, with … for what differs; a conditional says either."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from templates(node.body)
        yield from templates(node.orelse)


def messages(source: str) -> set[str]:
    """Return the messages of all `raise` statements, also of those that call a function which makes the exception."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def of(call: ast.Call) -> set[str]:
        own = {text for argument in call.args for text in templates(argument)}
        if own or not isinstance(call.func, ast.Name) or call.func.id not in functions:
            return own
        returned = (node.value for node in ast.walk(functions[call.func.id]) if isinstance(node, ast.Return))
        return {text for value in returned if isinstance(value, ast.Call) for text in of(value)}

    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "attr", "") == "pop":
                continue  # an error that was raised, and kept, elsewhere
            said = of(node.exc)
            assert said, f"{ast.unparse(node)} says nothing that could be documented"
            found |= said
    return found


def test_every_error_message_is_on_the_page_of_errors() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    documented = {m[2].strip() for m in re.finditer(r"^\| (`+)(.*?)\1 \|", page, flags=re.MULTILINE)}
    raised = {text for path in sources() for text in messages(path.read_text())}
    assert len(raised) > 100
    assert documented == raised


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ValueError('a')", {"a"}),
        ("raise ValueError(f'{x} is {y!r:.40}; use z')", {"… is …; use z"}),
        ("raise error('a' if x else f'b {y}') from None", {"a", "b …"}),
        ("def refusal(x):\n    return ValueError(f'{x} is bad')\nraise refusal(row)", {"… is bad"}),
        ("try:\n    f()\nexcept E:\n    raise", set()),
        ("raise errors.pop()", set()),
    ],
)
def test_messages_are_read_from_the_syntax_tree(source: str, expected: set[str]) -> None:
    assert messages(source) == expected


def test_the_rule_alone_gives_the_same_bits(tmp_path: Path) -> None:
    """Run the loop of the page on vendoring with a copy of one file, where nothing else of ours can be imported."""
    page = (ROOT / "docs" / "howto-vendor.md").read_text()
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "for count in" in block)
    shutil.copy(ROOT / "acprop_core" / "rule.py", tmp_path / "acprop_rule.py")
    absent = [
        "acprop_core",
        "acprop_optax",
        "acprop_stepper",
        "acprop_torch",
        "array_api_compat",
        "array_api_compat.numpy",
    ]
    program = [
        f"import sys; sys.modules.update(dict.fromkeys({absent})); sys.path.insert(0, '.')",
        loop,
        "print(x.tobytes().hex(), mu.tobytes().hex(), nu.tobytes().hex())",
    ]
    command = [sys.executable, "-I", "-c", "\n".join(program)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    optimizer = ACProp(1e-3, weight_decay=0.01, clip_exponent=0.25)
    x = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
    state = optimizer.init(x)
    for _ in range(10):
        updates, state = optimizer.update(2.0 * (x - 0.5), state, x)
        x = optimizer.apply(x, updates)
    assert printed.splitlines()[-1] == " ".join(array.tobytes().hex() for array in (x, state.mu, state.nu))
    assert {*tmp_path.iterdir()} <= {tmp_path / "acprop_rule.py", tmp_path / "__pycache__"}


def documented() -> Iterator[str]:
    """Yield the full names of all objects on the pages of the API, members after their class."""
    page = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("api-*.md")))
    for name, members in re.findall(
        r"^\.\. auto(?:class|function):: (\S+)\n(?:   :members: (.*)\n)?", page, re.MULTILINE
    ):
        yield name
        yield from (f"{name}.{member}" for member in members.split(", ") if member)


@pytest.mark.parametrize("name", list(documented()))
def test_docstrings_are_complete(name: str) -> None:
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is in the group docs")
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["numpydoc_validation"]["checks"]
    assert chosen[0] == "all"
    without = {*chosen[1:]}
    thing = pkgutil.resolve_name(name)
    if name.startswith(("acprop_core.rule.", "acprop_core.adapt.")) and "step" not in name.lower():
        without.add("EX01")  # the examples of step and step_at show the others too
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        without.add("PR01")  # the parameters are those of the base class
    if isinstance(thing, type) and issubclass(thing, tuple):
        without.add("PR01")  # the fields of a record are attributes, not parameters
        attributes = {
            x
            for part in validate.Validator(validate.get_doc_object(thing)).doc["Attributes"]
            for x in part.name.split(", ")
        }
        assert attributes == {*thing._fields}
    assert [(code, message) for code, message in validate.validate(name)["errors"] if code not in without] == []


def test_the_rule_on_the_page_is_all_that_vendoring_needs() -> None:
    page = (ROOT / "docs" / "howto-vendor.md").read_text()
    (names,) = re.findall(r"^from acprop_rule import (.*)$", page, flags=re.MULTILINE)
    assert {*names.split(", ")} <= {name.rpartition(".")[2] for name in documented() if ".rule." in name}
