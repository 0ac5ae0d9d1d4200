"""Make the links of README.md absolute, because PyPI, unlike GitHub, cannot resolve relative ones.

Run as ``python tests/absolute_links.py OWNER/REPOSITORY TAG``, as .github/workflows/release.yml does before it builds.
A page in docs/ becomes its page on the published site, any other file the repository's file at this tag.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(!\[[^\]]*\]\(|\]\()([^)\s]+)")  # of a picture or a link, the last part of [![...](...)](...) too
OTHER = re.compile(r"""(?:src|srcset|href)\s*=\s*["']?([^"'>\s]+)|^ *\[[^\]]+\]: *(\S+)""", re.MULTILINE)


def absolute(text: str, repository: str, tag: str) -> str:
    """Return the text with absolute links; refuse a relative one in HTML, or apart from its text."""
    owner, name = repository.split("/")

    def rewritten(match: re.Match[str]) -> str:
        opening, url = match.groups()
        path, hash_sign, anchor = url.partition("#")
        if re.match(r"\w+:", url):
            return match[0]
        if page := re.fullmatch(r"docs/([\w-]+)\.md", path):
            return f"{opening}https://{owner.lower()}.github.io/{name}/{page[1]}.html{hash_sign}{anchor}"
        if opening.startswith("!"):
            return f"{opening}https://raw.githubusercontent.com/{repository}/{tag}/{path}"
        return f"{opening}https://github.com/{repository}/blob/{tag}/{path or 'README.md'}{hash_sign}{anchor}"

    parts = CODE.split(text)  # code is in every second one
    if relative := [a or b for part in parts[::2] for a, b in OTHER.findall(part) if not re.match(r"\w+:", a or b)]:
        raise ValueError(f"links to {relative} are not of the form [text](address)")
    return "".join(part if i % 2 else INLINE.sub(rewritten, part) for i, part in enumerate(parts))


if __name__ == "__main__":
    README.write_text(absolute(README.read_text(), *sys.argv[1:]))
