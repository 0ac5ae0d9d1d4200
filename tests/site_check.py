"""Check a built site without a network: links and their anchors lead somewhere, and nothing comes from elsewhere.

Run as ``python tests/site_check.py docs/_build/html README.md ...``: every page of the folders, and the relative links
of the Markdown files. Prints what is wrong; the exit code is 1 if anything is.
"""

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches unasked; a link to another site is left to the reader
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data"), ("use", "href")}
LINKS_FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
GENERATED = {"genindex.html", "search.html", "py-modindex.html"}


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self._style = tag == "style"
        self.fetched += _of_css(values.get("style", ""))
        for name in ("href", "src", "data", "xlink:href"):
            if name not in values:
                continue
            fetches = (tag, name) in FETCHED or (tag == "link" and {*values.get("rel", "").split()} & LINKS_FETCHED)
            (self.fetched if fetches else self.links).append(values[name])
        self.fetched += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]

    def handle_data(self, data: str) -> None:
        if self._style:
            self.fetched += _of_css(data)


def problems(site: Path) -> list[str]:
    """Return what is wrong with the built site in this folder."""
    page_of = cache(lambda path: Page(path.read_text()))
    found: list[str] = []
    for path in sorted(site.rglob("*.html")):
        page = page_of(path)
        where = path.relative_to(site)
        found += [f"{where}: fetches {url} from elsewhere" for url in page.fetched if _is_outside(url)]
        for url in [*page.links, *page.fetched]:
            if _is_outside(url) or url.startswith(("data:", "mailto:", "javascript:")):
                continue
            parts = urlsplit(url)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{where}: {url} leads to no file")
            elif (
                target.suffix == ".html"
                and target.name not in GENERATED
                and unquote(parts.fragment) not in page_of(target).anchors
            ):
                found.append(f"{where}: {url} leads to no anchor")
    for path in sorted(site.rglob("*.css")):
        for url in _of_css(path.read_text()):
            if _is_outside(url):
                found.append(f"{path.relative_to(site)}: fetches {url} from elsewhere")
            elif not url.startswith(("data:", "#")) and not (path.parent / urlsplit(url).path).is_file():
                found.append(f"{path.relative_to(site)}: {url} leads to no file")
    if not any(site.rglob("*.html")):
        found.append(f"{site}: has no page")
    return found


def problems_of_markdown(path: Path) -> list[str]:
    """Return the relative links and pictures of a Markdown file that lead nowhere, or to no heading."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for url in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        url = url[0] or url[1]
        if _is_outside(url) or url.startswith("mailto:"):
            continue
        parts = urlsplit(url)
        target = path.parent / unquote(parts.path) if parts.path else path
        if not target.exists():
            found.append(f"{path}: {url} leads to no file")
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in _headings(target):
            found.append(f"{path}: {url} leads to no heading")
    return found


def _headings(path: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.*?)\s*$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _of_css(text: str) -> list[str]:
    return [a or b for a, b in re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text)]


def _is_outside(url: str) -> bool:
    return bool(urlsplit(url).netloc)


if __name__ == "__main__":
    wrong = []
    for argument in map(Path, sys.argv[1:]):
        wrong += problems(argument) if argument.is_dir() else problems_of_markdown(argument)
    print("\n".join(wrong) or "every link within leads somewhere, and nothing is fetched from elsewhere")
    sys.exit(bool(wrong))
