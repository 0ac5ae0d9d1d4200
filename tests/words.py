"""Words that make a sentence hard to read, above all in a second language, each with a better one.

Run as ``python tests/words.py``, or with files and folders. Prints where they are; the exit code is 1 if there are any.
Other words may be right in one place and wrong in another; they are for the reader to judge.
"""

import re
import sys
from pathlib import Path

TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
CHECKED = ("acprop_core", "adapters", "docs", "tests", ".github", "noxfile.py", "pyproject.toml", *TEXTS)
BETTER = {
    r"lest": "so that … not",
    r"whoever": "anyone who",
    r"whatever": "any",
    r"(?<!there )(?:is|are|was|were) no(?! (?:longer|more|less|larger|smaller|faster|earlier|later))": "is not a",
    r"(?-i:of none)": "without",
    r"at hand": "known, installed",
    r"but for": "except",
    r"one (?:behind|beside|below) the other": "back to back, next to each other",
    r"(?:takes?|took|taken) (?:it |them )?up": "resumes",
    r"(?:hands?|handed) (?:it |them )?on": "passes",
    r"(?:gives?|gave|given) (?:it |them )?back": "restores, adds later",
    r"(?:goes|go|went|gone|going) on": "continues",
    r"(?:stands?|stood) (?:in|at|on|behind|beside|around|where)": "is in",
    r"(?:lies?|lay) (?:in|at|beside|between|scattered)": "is in",
    r"beside what": "compared with",
    r"as (?:of|ever)": "as with, as always",
}


def main(paths: list[str]) -> int:
    """Print each place, and return whether there is one."""
    root = Path(__file__).parents[1]
    files = []
    for path in map(root.joinpath, paths):
        files += [path] if path.is_file() else [*path.rglob("*.md"), *path.rglob("*.py")]
    found = 0
    for path in sorted({*files} - {Path(__file__)}):  # which has the words themselves
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if path.suffix == ".md":
                line = re.sub("`.*?`", "", line)  # code is named as it is
            for words, better in BETTER.items():
                for match in re.finditer(rf"\b(?:{words})(?!\w)", line, flags=re.IGNORECASE):
                    found += 1
                    print(f"{path.relative_to(root)}:{number}: {match[0].strip()!r}; better: {better}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [*CHECKED]))
