"""Files stay small, are named for what they hold, and know nothing of the machine they grew on."""

import pathlib
import re

import pytest

from tests.architecture.project_files import ROOT, list_files

EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "lib", "tools"}
# Split so that this file does not hold what it looks for.
FOREIGN = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:work|root|home" + r")/\w",
            r"(?<![\w.])/tmp" + r"/[a-z]",
            "pythonhosted" + r"\.",
            r"//pypi" + r"\.",
            "index" + "-url",
            r"/sim" + r"ple/",
        )
    )
)
TEXT = {".py", ".md", ".rst", ".toml", ".txt", ".json", ".sh", ".cfg", ".yml", ".yaml", ".cff", ""}


def limit_lines(path):
    """Return how many lines a Python file may have."""
    return 100 if path == pathlib.Path("train.py") else 400


def find_faults(path, text):
    """Return what is wrong with one file of the project."""
    faults = []
    if path.suffix == ".py":
        lines, limit = text.count("\n"), limit_lines(path)
        if lines > limit:
            faults.append(f"{path}: {lines} lines, at most {limit}")
        if path.stem in EMPTY_NAMES:
            faults.append(f"{path}: a name that says nothing")
    for number, line in enumerate(text.splitlines(), start=1):
        if match := FOREIGN.search(line):
            faults.append(f"{path}:{number}: {match.group()!r} belongs to one machine")
    return faults


def test_files_are_small_well_named_and_portable():
    texts = {path: (ROOT / path).read_text() for path in list_files() if path.suffix in TEXT}
    faults = [fault for path, text in texts.items() for fault in find_faults(path, text)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "path, text, fault",
    [
        ("sparsejax/long.py", "\n" * 401, "401 lines, at most 400"),
        ("pallas_kernels/op/mosaic_sm90/kernel.py", "\n" * 401, "401 lines, at most 400"),
        ("train.py", "\n" * 101, "101 lines, at most 100"),
        ("sparsejax/utils.py", "", "says nothing"),
        ("a.md", "see /wor" + "k/main", "belongs to one machine"),
        ("a.md", "in /tm" + "p/run", "belongs to one machine"),
        ("a.txt", "--ind" + "ex-url x", "belongs to one machine"),
        ("a.txt", "https://py" + "pi.org", "belongs to one machine"),
    ],
)
def test_each_fault_is_found(path, text, fault):
    (found,) = find_faults(pathlib.Path(path), text)
    assert fault in found


def test_ordinary_files_pass():
    text = "runs/quickstart, /path/to/text, https://arxiv.org/abs/2309.12578, network/"
    assert find_faults(pathlib.Path("pallas_kernels/op/mosaic_sm90.py"), text + "\n" * 400) == []
