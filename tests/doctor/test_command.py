"""The doctor's command, on machines with a GPU and without."""

import pathlib
import re

import pytest

from pallas_kernels.doctor import __main__ as doctor
from pallas_kernels.doctor import examine, visit
from pallas_kernels.doctor.trials import list_default_calls, list_trials
from pallas_kernels.verdict_files import read_verdicts
from tests.doctor.gpus import install_nvidia_smi, write_child


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder of verdicts of a user who has none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "cache" / "sparsejax" / "verdicts"


@pytest.fixture
def gpu(tmp_path, monkeypatch, cache):
    """Pretend that there is an H200 whose kernels are all right but one."""
    install_nvidia_smi(tmp_path, monkeypatch)
    body = (
        "if (trial['op'], trial['backend']) == ('pack_nm', 'mosaic_sm90'): os.abort()\n"
        "products = ('nm_matmul', 'block_sparse_matmul', 'block_sparse_attention')\n"
        "forward_only = trial['op'] not in products\n"
        "right(place, task, ('forward',) if forward_only else ('forward', 'gradient'))"
    )
    child = write_child(tmp_path, body)

    def examine_here(trials, kind, **options):
        assert kind == "NVIDIA H200"
        return examine.examine(
            trials, kind, child=child, environment={}, trial_seconds=20, **options
        )

    monkeypatch.setattr(visit, "examine", examine_here)
    return cache


def test_without_a_gpu_it_says_what_it_would_do(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "nvidia-smi finds no NVIDIA GPU here, so there is nothing to prove" in said
    assert "  nm_matmul mosaic_sm90: 2 calls\n" in said
    assert not cache.exists()


def test_on_a_gpu_it_tries_every_backend_and_keeps_the_verdicts(gpu, capsys):
    assert doctor.main([]) == 1  # a kernel is wrong
    said = capsys.readouterr().out
    assert said.startswith("NVIDIA H200, compute capability 9.0, driver 580.65.06, JAX ")
    assert "pack_nm(dtype=bfloat16, along_k, along_n), 1024 x 4096\n  mosaic_sm90  wrong" in said
    assert "mosaic_sm90  right, 1e+03 ms at density 0.1, 2x as fast as xla" in said
    (path,) = gpu.glob("*.json")
    verdicts = read_verdicts(path)
    tried = {(t.op, t.backend) for t in list_trials(list_default_calls())}
    assert {(v.key.op, v.key.backend) for v in verdicts} == tried
    assert [v.key.op for v in verdicts if v.wrong] == ["pack_nm"]


def test_one_op_can_be_asked_for_and_the_output_chosen(gpu, tmp_path, capsys):
    assert doctor.main(["--op=block_sparse_matmul", f"--output={tmp_path / 'other'}"]) == 0
    (path,) = (tmp_path / "other").glob("*.json")
    assert {v.key.op for v in read_verdicts(path)} == {"block_sparse_matmul"}
    assert f"verdicts: {path}" in capsys.readouterr().out and not gpu.exists()


REFUSED = {
    ("--op=conv",): "--op must be one of block_sparse_attention, .*, got 'conv'",
    ("--grid",): "unknown argument '--grid'; see --help",
    ("--all", "--config=configs/quickstart.py"): "--all and --config cannot both be given",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_bad_argument_is_one_line(arguments, capsys, gpu):
    assert doctor.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch("error: " + REFUSED[arguments], line)


def test_a_gpu_that_jax_has_no_cuda_for_is_named(cache, tmp_path, monkeypatch, capsys):
    install_nvidia_smi(tmp_path, monkeypatch, ["0, GPU-aa, Tesla V100-SXM2-16GB, 580.1, 7.0"])
    assert doctor.main([]) == 2
    assert capsys.readouterr().err == (
        "error: Tesla V100-SXM2-16GB has compute capability 7.0, and JAX for CUDA 13 needs 7.5 or "
        "more\n"
    )


def test_verdicts_that_cannot_be_kept_are_found_out_first(gpu, capsys):
    gpu.parent.mkdir(parents=True)
    gpu.write_text("")
    assert doctor.main([]) == 2
    assert "error: verdicts cannot be kept: " in capsys.readouterr().err
    gpu.unlink()
    assert doctor.main(["--op=pack_nm"]) == 1
    (path,) = gpu.glob("*.json")
    path.write_text("{")
    assert doctor.main(["--missing"]) == 2
    assert f"{path} must be a readable file of verdicts" in capsys.readouterr().err


@pytest.mark.ci
def test_a_config_says_what_it_calls(cache, capsys, monkeypatch, tmp_path):
    root = pathlib.Path(doctor.__file__).parents[2]
    monkeypatch.chdir(root)
    calls = visit.read_calls(["--config=configs/spion_small.py"])
    assert {op for op, _ in calls} == {"block_sparse_attention", "mean_attention_map"}
    assert {facts.num_queries for _, facts in calls} == {2048}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main(["--config=configs/spion_small.py", "--config.model.block_size=31"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: model.block_size must be a positive divisor of data.sequence_length=2048, got 31"
    )
