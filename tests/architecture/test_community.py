"""Files for other people's tools: they parse, and say what the project's own files say."""

import re
import tomllib

import pytest
import yaml

from tests.architecture.project_files import ROOT
from tests.architecture.test_lock import read_pins

MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ".github/workflows/test.yml"


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def list_targets():
    (listed,) = re.findall(r"^\.PHONY: (.+)", MAKEFILE, re.MULTILINE)
    return set(listed.split())


def test_citation_has_what_the_format_asks_for_and_agrees_with_the_project():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"].startswith(PROJECT["name"])
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_citation_refers_to_the_papers_of_the_readme():
    papers = read("CITATION.cff")["references"]
    for paper in papers:
        assert paper["type"] == "article" and paper["title"] and paper["authors"]
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", readme))
    named |= {doi.rstrip(")") for doi in re.findall(r"https://doi\.org/(\S+?)\)", readme)}
    assert named == {paper.get("url") or paper["doi"] for paper in papers}


def test_workflow_runs_what_the_makefile_has_on_the_python_of_the_project():
    workflow = read(WORKFLOW)
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML reads `on` as a boolean
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make test"] and "test" in list_targets()
    (python,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert PROJECT["requires-python"] == f">={python['python-version']}"
    (cache,) = (step["with"] for step in job["steps"] if "/cache@" in step.get("uses", ""))
    (locks,) = re.findall(r"hashFiles\('(.+?)'\)", cache["key"])
    assert {path.stem for path in ROOT.glob(locks)} == {"train", "docs", "dev", "cuda", "compile"}
    assert "secrets" not in (ROOT / WORKFLOW).read_text()


def test_pre_commit_runs_the_locked_ruff():
    (source,) = read(".pre-commit-config.yaml")["repos"]
    pins = read_pins((ROOT / "requirements" / "dev.txt").read_text())
    assert source["rev"] == f"v{pins['ruff']}"
    assert [hook["id"] for hook in source["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".ci/run", WORKFLOW])
def test_targets_of_make_exist(page):
    named = set(re.findall(r"(?:^|`|: |exec )make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    assert named and named <= list_targets()


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [path for path in re.findall(r"`([\w.]+/[\w./]*)`", text) if path != ".venv"]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
