"""What make installs: CUDA's lock where a GPU is found, JAX for the CPU elsewhere, nothing twice.

Make runs with the project's Makefile in a folder of its own, where nothing is real that it calls.
"""

import os
import shutil
import subprocess

import pytest

from tests.architecture.project_files import ROOT

H200 = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1a)'; echo 'GPU 1: NVIDIA H200 (UUID: GPU-2b)'"
MIG = "echo 'GPU 0: NVIDIA B200 (UUID: GPU-1a)'; echo '  MIG 1g.23gb Device 0: (UUID: MIG-3c)'"
# An image made for GPUs on a machine without one: both are seen.
NO_GPU = {"none": "echo 'No devices were found'", "no driver": "echo 'GPU 0: x (UUID: y)'; exit 9"}
STUBS = {
    "requirements/install.sh": """
        echo "install $1" >> log
        mkdir -p .venv/bin
        cp stub-python .venv/bin/python""",
    "requirements/find-python.sh": "exit 1",
    "stub-python": 'echo "python PYTHONPATH=${PYTHONPATH-} $*" >> log',
}


class Project:
    """The Makefile among stubs that write down how they are called."""

    def __init__(self, folder, nvidia_smi):
        self.folder = folder
        (folder / "requirements").mkdir()
        for path in ("Makefile", "requirements/find-gpu.sh"):
            shutil.copy(ROOT / path, folder / path)
        for lock in ("train", "docs", "dev", "cuda", "compile"):
            (folder / "requirements" / f"{lock}.txt").touch()
        for path, script in STUBS.items():
            self._write(path, script)
        (folder / "path").mkdir()
        self._write("path/nvidia-smi", f'echo "nvidia-smi $*" >> log\n{nvidia_smi}')

    def make(self, *arguments):
        """Return what one call of make did, a line for each step."""
        log = self.folder / "log"
        log.write_text("")
        # Nothing of the make that may run these tests.
        environment = {"PATH": f"{self.folder / 'path'}:{os.environ['PATH']}"}
        subprocess.run(
            ["make", *arguments], cwd=self.folder, env=environment, check=True, capture_output=True
        )
        return log.read_text().splitlines()

    def _write(self, path, script):
        (self.folder / path).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / path).chmod(0o755)


def list_installs(steps):
    return [step.removeprefix("install ") for step in steps if step.startswith("install ")]


@pytest.mark.parametrize("target", ["train", "plan", "doctor", "gpu"])
def test_a_gpu_brings_the_lock_of_cuda_and_only_once(target, tmp_path):
    project = Project(tmp_path, H200)
    first = project.make(target)
    assert list_installs(first) == ["cuda"] and first.count("nvidia-smi -L") == 1
    # The second call does not even look.
    assert [line.split()[0] for line in project.make(target)] == ["python"]
    # The lock contains those of training and of the tests.
    assert list_installs(project.make("bench", "lint")) == []


@pytest.mark.parametrize("nvidia_smi", NO_GPU.values(), ids=NO_GPU)
def test_without_a_gpu_jax_for_the_cpu_is_installed(nvidia_smi, tmp_path):
    project = Project(tmp_path, nvidia_smi)
    assert list_installs(project.make("train")) == ["train"]
    assert list_installs(project.make("doctor")) == []
    assert list_installs(project.make("plan")) == ["compile"]
    assert list_installs(project.make("gpu")) == ["dev"]
    *_, run = project.make("gpu-export", "TARGET=a100")
    assert run == "python PYTHONPATH=.venv/compile -m benchmarks.exported_calls a100"


def test_docs_need_no_tools_for_tests_and_nothing_beside_them(tmp_path):
    project = Project(tmp_path, NO_GPU["none"])
    first = project.make("docs")
    assert list_installs(first) == ["docs"] and "sphinx" in first[-1]
    assert list_installs(project.make("train")) == []
    assert list_installs(project.make("lint")) == ["dev"]
    assert list_installs(project.make("docs")) == []


def test_the_plugin_of_plans_lies_in_one_place(tmp_path):
    project = Project(tmp_path, H200)
    # Beside an environment without CUDA,
    assert list_installs(project.make("plan", "LOCK=train")) == ["train", "compile"]
    (run,) = project.make("plan", "LOCK=train")
    assert run.startswith("python PYTHONPATH=.venv/compile train.py --mode=plan")
    # and inside one with it.
    for arguments in (["plan"], ["plan", "LOCK=train"]):
        assert "python PYTHONPATH= train.py --mode=plan" in "\n".join(project.make(*arguments))


def test_nobody_looks_for_a_gpu_who_does_not_need_it(tmp_path):
    project = Project(tmp_path, H200)
    assert project.make("help") == []
    assert "nvidia-smi -L" not in project.make("lint")
    assert list_installs(project.make("train", "LOCK=train")) == []


@pytest.mark.parametrize(
    "script, name", [(H200, "NVIDIA H200"), (MIG, "NVIDIA B200")], ids=["two", "mig"]
)
def test_the_gpu_is_named(script, name, tmp_path):
    project = Project(tmp_path, script)
    environment = {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
    command = [ROOT / "requirements/find-gpu.sh"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"{name}\n")
    (project.folder / "path/nvidia-smi").unlink()
    for tool in ("bash", "grep"):
        (project.folder / "path" / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": str(tmp_path / "path")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (1, "", "")
