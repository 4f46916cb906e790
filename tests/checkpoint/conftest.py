"""Folders of checkpoints to look at and to damage."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.saves import save_steps


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(directory, [10, 20])
    return directory


@pytest.fixture
def directory(two_saves, tmp_path):
    return Path(shutil.copytree(two_saves, tmp_path / "checkpoints"))
