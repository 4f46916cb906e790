"""`make gpu` proves something or says that it did not."""

import pytest

from benchmarks import gpu
from pallas_kernels.doctor.isolation import Ended


@pytest.fixture
def commands(monkeypatch):
    """Return the list of commands run and the dict of faults they end with, by module."""
    ran, codes = [], {}

    def run(command, *, limit_seconds, environment, folder, show):
        assert environment == {"JAX_PLATFORMS": "cuda,cpu"} and folder == gpu.ROOT and show
        assert limit_seconds > 0
        ran.append(command[2:])
        return Ended(codes.get(command[2], ""), "")

    monkeypatch.setattr(gpu, "find_gpu", lambda: ("NVIDIA H200", ""))
    monkeypatch.setattr(gpu, "run_isolated", run)
    return ran, codes


@pytest.mark.ci
def test_without_a_gpu_it_says_so_and_is_no_success(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main([]) == 2
    assert "No GPU found, so nothing was run. JAX said: RuntimeError" in capfd.readouterr().err


def test_contracts_run_before_headline_points(commands):
    ran, _ = commands
    assert gpu.main([]) == 0
    assert [command[0] for command in ran] == [
        *["pytest"] * (len(gpu.CONTRACTS) + 1),
        "benchmarks.exported_contracts",
        "benchmarks.l2_bandwidth",
        "benchmarks.attention",
        "benchmarks.nm_matmul",
        "benchmarks.block_sparse_matmul",
        "benchmarks.fst_gpt2",
    ]
    *alone, others = [command for command in ran if command[0] == "pytest"]
    first = [gpu.ROOT / path for command in alone for path in command if path.startswith("tests/")]
    assert [path.name for path in first] == list(gpu.CONTRACTS)
    assert all(path.exists() for path in first)
    ignored = [option.split("=")[1] for option in others if option.startswith("--ignore")]
    assert {path for pattern in ignored for path in gpu.ROOT.glob(pattern)} == {
        path
        for path in (gpu.ROOT / "tests/kernels").glob("test_*.py")
        if "aot" in path.name or "compiled" in path.name or path in first
    }
    # The last part may take all that the others left.
    exported, *budgets = [command[1:] for command in ran if command[0] != "pytest"]
    assert exported == ["--budget-seconds=90"]
    assert budgets == [["--headline", f"--budget-seconds={s}"] for s in (108, 135, 180, 270, 540)]


def test_contracts_that_hang_fail_the_run_and_points_are_still_measured(commands):
    ran, codes = commands
    codes["pytest"] = "hang"
    assert gpu.main([]) == 1
    assert len(ran) == len(gpu.CONTRACTS) + 2 + len(gpu.PARTS)


def test_no_point_starts_when_time_is_up(commands, monkeypatch):
    ran, _ = commands
    monkeypatch.setattr(gpu, "BUDGET_SECONDS", -1.0)
    assert gpu.main([]) == 0
    assert {command[2] for command in ran if "--headline" in command} == {"--budget-seconds=0"}


def test_a_sweep_measures_all_points_of_one_part(commands, capsys):
    ran, _ = commands
    assert gpu.main(["--sweep", "attention"]) == 0
    assert gpu.main(["--sweep", "nm_matmul_tiles"]) == 0
    assert ran == [["benchmarks.attention"], ["benchmarks.nm_matmul_tiles"]]
    assert gpu.main(["--sweep", ""]) == 2
    assert (
        "PART must be one of l2_bandwidth, attention, nm_matmul, block_sparse_matmul, fst_gpt2, "
        "nm_matmul_tiles, grouped_gradients, got ''" in capsys.readouterr().err
    )
