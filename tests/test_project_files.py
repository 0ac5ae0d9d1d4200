"""The files for contributors and for GitHub: workflows call what there is, pinned and with few rights."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import acprop_core

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SESSIONS = set(re.findall(r"^@nox.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE))
# What a job may do beside reading the source: publish the site, and prove to PyPI which workflow it is.
RIGHTS = {
    ("docs.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
}


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_there_are_four_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["docs.yml", "release.yml", "tests.yml", "weekly.yml"]


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    """In the sessions and in the promise of pyproject.toml; test_packaging.py compares the error at import."""
    versions = re.findall(r'^TORCHES = \["([\d.]+)"', (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["torch"] == [f"torch>={versions[0]}"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_have_few_rights(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"] == RIGHTS.get((path.name, name), {"contents": "read"})
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            # a tag of somebody else's repository can be moved, a commit cannot; and text of others is never run
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"none@{'0' * 40}"))
            assert "${{" not in step.get("run", "")
            if "checkout@" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert all(re.fullmatch(r"\S+@\w{40} # v\d+\.\d+\.\d+", use) for use in uses)


def test_workflows_run_the_sessions_of_the_noxfile() -> None:
    called: set[str] = set()
    for path in WORKFLOWS:
        for job in parsed(path)["jobs"].values():
            matrix = [row["session"] for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
            lines = re.findall(
                r"nox -s ([\w ]+)$", "\n".join(step.get("run", "") for step in job["steps"]), re.MULTILINE
            )
            called |= {*matrix, *(name for line in lines for name in line.split())}
    pythons = {f"tests_python-3.{minor}" for minor in (11, 12, 13, 14)}
    assert pythons <= called
    assert called - pythons <= SESSIONS
    # what .ci/run asks for is asked for there too
    asked = re.findall(
        r"^python -m nox -s ([\w ]+?)(?: --.*)?$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE
    )
    assert {name for line in asked for name in line.split()} <= called


def test_contributing_names_every_session() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} >= SESSIONS


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_for_what_is_needed(name: str) -> None:
    form = parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert form["name"]
    assert form["description"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["version"] == acprop_core.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2110.05454"
