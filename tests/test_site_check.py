"""The checker of the built site finds what it is there to find."""

from pathlib import Path

import pytest

from site_check import problems, problems_of_markdown

GOOD = '<link rel="stylesheet" href="a.css"><h1 id="top-of-it">A</h1><a href="b.html#there">b</a><a href="https://x.org">x</a>'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "b.html").write_text('<p id="there"><img src="data:image/png;base64,AA=="><math></math></p>')
    (tmp_path / "a.css").write_text("@font-face { src: url('font.woff2') }")
    (tmp_path / "font.woff2").write_bytes(b"")
    return tmp_path


def test_a_good_site_has_no_problem(site: Path) -> None:
    assert problems(site) == []


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: has no page"]


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<a href="c.html">', "c.html leads to no file"),
        ('<a href="b.html#here">', "b.html#here leads to no anchor"),
        ('<a href="#here">', "#here leads to no anchor"),
        ('<img src="c.png">', "c.png leads to no file"),
        ('<img srcset="c.png 2x">', "c.png leads to no file"),
        ('<script src="https://cdn.example/m.js"></script>', "fetches https://cdn.example/m.js from elsewhere"),
        ('<link rel="stylesheet" href="//cdn.example/m.css">', "fetches //cdn.example/m.css from elsewhere"),
        ('<link rel="preconnect" href="https://cdn.example">', "fetches https://cdn.example from elsewhere"),
        ("<style>@import 'https://cdn.example/a.css';</style>", "fetches https://cdn.example/a.css from elsewhere"),
        ('<p style="background: url(https://cdn.example/a.png)">', "fetches https://cdn.example/a.png from elsewhere"),
    ],
)
def test_a_page_with_a_fault_is_found(site: Path, html: str, found: str) -> None:
    (site / "index.html").write_text(GOOD + html)
    assert problems(site) == [f"index.html: {found}"]


@pytest.mark.parametrize("url", ["https://cdn.example/f.woff2", "gone.woff2"])
def test_a_stylesheet_with_a_fault_is_found(site: Path, url: str) -> None:
    (site / "a.css").write_text(f"@font-face {{ src: url({url}) }}")
    assert len(problems(site)) == 1
    assert url in problems(site)[0]


def test_links_of_markdown(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text('# A title\n[a](b.md) [b](b.md#two-words) [c](#a-title) [d](https://x.org/y)\n<img src="p.svg">\n')
    (tmp_path / "b.md").write_text("## Two words\n")
    (tmp_path / "p.svg").write_text("<svg/>")
    assert problems_of_markdown(page) == []
    page.write_text("[a](c.md) [b](b.md#three-words)\n```\n[not a link](d.md)\n```\n")
    assert problems_of_markdown(page) == [
        f"{page}: c.md leads to no file",
        f"{page}: b.md#three-words leads to no heading",
    ]
