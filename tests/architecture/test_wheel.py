"""What `pip install .` installs: both packages, their data, the configs and one command."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from sparsejax.version import __version__
from tests.architecture.project_files import ROOT, list_files

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel without an index and unpack it; return the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / f"sparsejax-{__version__}-py3-none-any.whl") as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_wheel_has_every_file_of_the_packages_and_the_configs_inside(wheel):
    expected = {path for path in list_files() if path.parts[0] in ("sparsejax", "pallas_kernels")}
    shipped = [path for path in list_files() if path.parts[0] == "configs"]
    expected |= {pathlib.Path("sparsejax", "shipped", path) for path in shipped}
    found = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    about = {path for path in found if path.parts[0] == f"sparsejax-{__version__}.dist-info"}
    assert {str(path) for path in found - about} == {str(path) for path in expected}
    assert {"METADATA", "LICENSE", "entry_points.txt"} <= {path.name for path in about}


def test_wheel_has_one_command(wheel):
    points = (wheel / f"sparsejax-{__version__}.dist-info" / "entry_points.txt").read_text()
    assert points.split() == ["[console_scripts]", "sparsejax", "=", "sparsejax.__main__:main"]


def test_an_installed_command_reads_its_own_configs_in_any_folder(wheel, tmp_path):
    # Of another project, and in the way if the path were searched in the usual order.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("raise ImportError('not ours')")
    arguments = ["--config=quickstart", f"--workdir={tmp_path / 'run'}", "--config.modle.block=1"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsejax", "train", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "did you mean 'model." in done.stderr
