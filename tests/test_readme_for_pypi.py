"""The README that PyPI shows: every link is absolute, and leads to a page of the site or a file of the repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from readme_for_pypi import WORDS, for_pypi

ROOT = Path(__file__).parents[1]
SITE, BLOB, RAW = (
    "https://someone.github.io/Some.where/",
    "https://github.com/Someone/Some.where/blob/v1.2.3/",
    "https://raw.githubusercontent.com/Someone/Some.where/v1.2.3/",
)
LINK = re.compile(r"\]\s*(?:\(|:\s)\s*<?([^)\s>]+)|(?:src|srcset|href)\s*=\s*[\"']?([^\"'>\s]+)")


def links(text: str) -> list[str]:
    """Return where all links lead, in Markdown and in HTML; none of the README's code looks like one."""
    return [a or b for a, b in LINK.findall(text)]


def rewritten(text: str) -> str:
    return for_pypi(text, "Someone/Some.where", "v1.2.3")


def test_every_link_of_the_readme_is_absolute_and_leads_somewhere() -> None:
    before = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", before)
    urls = links(before)
    assert len(urls) > 20
    assert {*pictures} <= {*urls}
    now = links(rewritten(before))
    now.remove("https://github.com/Someone/Some.where")
    for url, new in zip(urls, now, strict=True):
        if url.startswith("https://"):
            assert new == url
            continue
        path, _, anchor = url.partition("#")
        assert (ROOT / (path or "README.md")).is_file(), url
        if new.startswith(SITE):
            page, _, anchor = new.removeprefix(SITE).partition("#")
            source = ROOT / "docs" / f"{page.removesuffix('.html')}.md"
            assert source == ROOT / path or f"{{literalinclude}} {path.removeprefix('docs/')}" in source.read_text()
            # Sphinx's anchor of a heading; GitHub's is another one where the heading has an apostrophe
            titles = re.findall(r"^#+ (.*)$", source.read_text(), flags=re.MULTILINE)
            assert anchor in {"", *(re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles)}
        elif url in pictures:
            assert new == RAW + url
        else:
            assert new == BLOB + (f"README.md{url}" if url.startswith("#") else url)


def test_it_installs_from_pypi() -> None:
    before = (ROOT / "README.md").read_text()
    assert all(words in before for words in WORDS)
    (table,) = re.findall(r"^Python .* From PyPI:\n\n((?:\|.*\n)+)", rewritten(before), re.MULTILINE)
    commands = re.findall(r"`(pip install .*?)`", table)
    assert len(commands) == table.count("pip install") == 5
    assert all(re.fullmatch(r'pip install (acprop-core|"acprop-core\[[a-z,]+\]")', command) for command in commands)
    assert '".' not in table


def test_code_and_absolute_links_stay() -> None:
    text = "```python\na = b[0](c)\n```\n[a](https://arxiv.org/abs/1) [b](mailto:a@b.org)\n"
    assert rewritten(text) == text


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/b.md)", f"[a]({SITE}b.html)"),
        ("[a\nb](docs/b-c.md#d-e)", f"[a\nb]({SITE}b-c.html#d-e)"),
        ("[a](docs/benchmarks/b.md)", f"[a]({BLOB}docs/benchmarks/b.md)"),
        ("[a](docs/b.py#L3)", f"[a]({BLOB}docs/b.py#L3)"),
        ("[a](docs/examples/loop_b.py)", f"[a]({SITE}howto-loop-b.html)"),
        ("[a](LICENSE)", f"[a]({BLOB}LICENSE)"),
        ("[a](#b)", f"[a]({BLOB}README.md#b)"),
        ("![a](docs/b.png)", f"![a]({RAW}docs/b.png)"),
        ("[a](docs/b.png)", f"[a]({BLOB}docs/b.png)"),
        ("[![a](docs/b.png)](docs/c.md)", f"[![a]({RAW}docs/b.png)]({SITE}c.html)"),
    ],
)
def test_each_form_of_link(link: str, expected: str) -> None:
    assert rewritten(f"see {link}.") == f"see {expected}."


@pytest.mark.parametrize("link", ["[a]: docs/b.md", '<img src="docs/b.png">', "<a href='docs/b.md'>"])
def test_a_relative_link_of_another_form_is_refused(link: str) -> None:
    with pytest.raises(ValueError, match="are not of the form"):
        rewritten(f"see\n{link}\n")


def test_a_release_rewrites_the_readme_after_the_tests_and_before_it_builds() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["build"]["steps"]
    runs = [step.get("run", "") for step in steps]
    rewrites = runs.index('python tests/readme_for_pypi.py "$REPOSITORY" "$TAG"')
    assert runs.index("python -m nox -s lint typecheck tests tests_slow docs wheel") < rewrites
    assert rewrites < runs.index("python -m hatchling build")
    assert steps[rewrites]["env"] == {"REPOSITORY": "${{ github.repository }}", "TAG": "${{ github.ref_name }}"}


def test_the_script_writes_the_file(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    script = tmp_path / "tests" / "readme_for_pypi.py"
    script.write_text((ROOT / "tests" / "readme_for_pypi.py").read_text())
    (tmp_path / "README.md").write_text("[a](docs/b.md)\n")
    subprocess.run([sys.executable, script, "Someone/Some.where", "v1.2.3"], check=True)
    assert (tmp_path / "README.md").read_text() == f"[a]({SITE}b.html)\n"
