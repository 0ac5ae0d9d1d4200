"""The how-to and reference pages: what a page says that its code prints is printed; what it says is complete is so."""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOW_TOS = sorted((ROOT / "docs").glob("howto-*.md")) + [ROOT / "docs" / "checkpoint.md"]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def said(snippet: str) -> list[str]:
    """Return the lines that a snippet says it prints: comments behind a `print`, or at its end if that is in a loop."""
    lines = snippet.splitlines()
    behind = [m[1] for line in lines if (m := re.match(r"print\(.*\)  # (.*)$", line))]
    after = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    return behind + after


@pytest.mark.parametrize("page", HOW_TOS, ids=lambda page: page.name)
def test_pages_print_what_they_say(page: Path) -> None:
    namespace: dict[str, object] = {}
    for snippet in snippets(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, str(page), "exec"), namespace)
        assert printed.getvalue().splitlines() == said(snippet)


def sources() -> list[Path]:
    return sorted([*(ROOT / "acprop_core").glob("*.py"), *(ROOT / "adapters").glob("acprop_*/*.py")])


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
        ("raise ValueError(f'{x} is {y!r:.40}; give z')", {"… is …; give z"}),
        ("raise error('a' if x else f'b {y}') from None", {"a", "b …"}),
        ("def refusal(x):\n    return ValueError(f'{x} is bad')\nraise refusal(row)", {"… is bad"}),
        ("try:\n    f()\nexcept E:\n    raise", set()),
    ],
)
def test_messages_are_read_from_the_syntax_tree(source: str, expected: set[str]) -> None:
    assert messages(source) == expected
