"""Make README.md the page for PyPI, which installs from there, and whose links must be absolute.

Run as ``python tests/readme_for_pypi.py OWNER/REPOSITORY TAG``, as .github/workflows/release.yml does before it builds.
A page in docs/ becomes its page on the published site, any other file the repository's file at this tag.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
WORDS = {
    "In a clone of this repository:": "From PyPI:",
    "pip install .`": "pip install acprop-core`",
    '".[': '"acprop-core[',
    "In a clone, try it": "In a clone of [the repository](https://github.com/REPOSITORY), try it",
}
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(!\[[^\]]*\]\(|\]\()([^)\s]+)")  # of a picture or a link, the last part of [![...](...)](...) too
OTHER = re.compile(r"""(?:src|srcset|href)\s*=\s*["']?([^"'>\s]+)|^ *\[[^\]]+\]: *(\S+)""", re.MULTILINE)


def for_pypi(text: str, repository: str, tag: str) -> str:
    """Return the text of the page; refuse a relative link in HTML, or one whose address is apart from its text."""
    owner, name = repository.split("/")

    def absolute(match: re.Match[str]) -> str:
        opening, url = match.groups()
        path, hash_sign, anchor = url.partition("#")
        if re.match(r"\w+:", url):
            return match[0]
        path = re.sub(r"^docs/examples/loop_(\w+)\.py$", r"docs/howto-loop-\1.md", path)  # the page shows it
        if page := re.fullmatch(r"docs/([\w-]+)\.md", path):
            return f"{opening}https://{owner.lower()}.github.io/{name}/{page[1]}.html{hash_sign}{anchor}"
        if opening.startswith("!"):
            return f"{opening}https://raw.githubusercontent.com/{repository}/{tag}/{path}"
        return f"{opening}https://github.com/{repository}/blob/{tag}/{path or 'README.md'}{hash_sign}{anchor}"

    for words, others in WORDS.items():
        text = text.replace(words, others.replace("REPOSITORY", repository))
    parts = CODE.split(text)  # code is in every second one
    if relative := [a or b for part in parts[::2] for a, b in OTHER.findall(part) if not re.match(r"\w+:", a or b)]:
        raise ValueError(f"links to {relative} are not of the form [text](address)")
    return "".join(part if i % 2 else INLINE.sub(absolute, part) for i, part in enumerate(parts))


if __name__ == "__main__":
    README.write_text(for_pypi(README.read_text(), *sys.argv[1:]))
