"""Triton kernels that were exported for a GPU: read without Triton, and proven or refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import exported_calls, exported_contracts
from benchmarks.environment import ROOT
from pallas_kernels.aot import TARGETS
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.trials import Trial, list_default_calls
from pallas_kernels.machine import Gpu
from pallas_kernels.nm_matmul.call import NMFacts
from pallas_kernels.tables import TABLES

_MAP = MapFacts(num_queries=72, num_keys=40, head_dim=16, dtype="bfloat16", causal=True)
_ATTENTION = dataclasses.replace(
    dict(reversed(list_default_calls()))["block_sparse_attention"],
    num_queries=64, num_keys=64, num_heads=1, num_kv_heads=1, head_dim=32, block_q=16, block_kv=16,
)  # fmt: skip

_NM = NMFacts(rows=64, inner=64, columns=128, dtype="bfloat16", transposable=True)

# What a machine has that lacks both: importing them fails.
_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import jax, json, pathlib
from benchmarks.exported_calls import read_function
from pallas_kernels import aot
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.trials import parse_trial
folder = pathlib.Path(sys.argv[1])
for entry in json.loads((folder / "manifest.json").read_text())["calls"]:
    trial = parse_trial({name: entry[name] for name in ("op", "backend", "facts")})
    problem = MAKERS[trial.op].make(trial.facts)
    function = read_function((folder / entry["file"]).read_bytes())
    arguments = problem.inputs, next(iter(problem.masks.values()))
    mesh = aot.make_gpu_mesh(aot.TARGETS["h200"])
    report = aot.compile_for(function, *arguments, mesh=mesh)
    print(*(kernel.name for kernel in report.kernels))
"""


@pytest.mark.ci
def test_an_exported_call_is_compiled_where_triton_cannot_be_imported(tmp_path, monkeypatch):
    calls = [
        ("block_sparse_attention", _ATTENTION),
        ("mean_attention_map", _MAP),
        ("nm_matmul", _NM),
    ]
    refused = dataclasses.replace(_MAP, head_dim=8)
    monkeypatch.setattr(
        exported_calls, "list_calls", lambda: [*calls, ("mean_attention_map", refused)]
    )
    said = []
    assert exported_calls.export_calls("h200", tmp_path, say=said.append) == 0
    assert [line.rpartition(": ")[2].partition(", ")[2] for line in said[:3]] == [
        "forward and gradient",
        "forward",
        "forward and gradient",
    ]
    assert "head_dim=8, causal): not exported: the Triton kernels take head dims from" in said[3]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["target"] == "h200" and manifest["capability"] == "9.0"
    assert len(manifest["calls"]) == 3
    compiled = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRITON, tmp_path],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    name = "block_sparse_attention_"
    assert compiled.stdout.splitlines() == [
        f"{name}forward {name}backward_queries {name}backward_keys",
        "attention_log_sum_exp mean_attention_map",
        "pack_nm multiply_sparse multiply_sparse",
    ]


def test_every_op_with_triton_kernels_is_exported_and_no_call_twice():
    calls = exported_calls.list_calls()
    assert {op for op, _ in calls} == {
        op for op, table in TABLES.items() if "triton" in [row.name for row in table]
    }
    assert len(set(map(str, calls))) == len(calls)


def test_an_unknown_target_is_refused(capsys):
    assert exported_calls.main(["h300"]) == 2
    assert capsys.readouterr().err == f"TARGET must be one of {', '.join(TARGETS)}, got 'h300'\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder of calls for the CPU, of a machine without Triton.

    The second claims to be causal and is not; the third cannot be read.
    """

    def lack():
        raise NotImplementedError("implementation='triton' needs triton, which is not installed")

    monkeypatch.setattr(exported_contracts, "check_packages", lack)
    entries = []
    # Triton's place is taken by what runs on a CPU.
    plain = dataclasses.replace(_MAP, causal=False)
    for facts, done in ((_MAP, _MAP), (_MAP, plain), (plain, None)):
        file = f"{len(entries)}.bin"
        facts = dataclasses.replace(facts, num_keys=40 + len(entries))
        if done is None:
            blob = b"no export"
        else:
            done = dataclasses.replace(done, num_keys=facts.num_keys)
            problem = MAKERS["mean_attention_map"].make(done)
            blob = exported_calls.export_problem(problem, "xla", ("forward",), "cpu")
        (tmp_path / file).write_bytes(blob)
        entry = {"file": file, "tile": "t", "directions": ["forward"], "refused_gradient": ""}
        entries.append(entry | Trial("mean_attention_map", "triton", facts).to_json())
    manifest = {
        "target": "h200", "capability": "9.0", "jax": jax.__version__,
        "source": exported_calls.hash_package(), "calls": entries,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def _run(folder, *, capability="9.0"):
    said = []
    gpu = Gpu(jax.devices()[0].device_kind, "580.65.06", capability, 1)
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = exported_contracts.run_contracts(
        folder, gpu, say=said.append, limit_seconds=100.0, environment=environment
    )
    return code, said


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="calls are exported for a CPU")
def test_each_exported_call_is_proven_by_itself(folder):
    code, (right, wrong, unread) = _run(folder)
    assert code == 1
    name = "exported mean_attention_map(dtype=bfloat16, head_dim=16"
    assert right == f"{name}, causal): right"
    assert wrong.startswith(f"{name}, causal): wrong (forward: map off by")
    assert unread.startswith(f"{name}): wrong (forward: ")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["calls"] = manifest["calls"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert _run(folder)[0] == 0


_MEND = "run `make gpu-export TARGET=h200` where the extra `triton` is, and copy"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("capability", "8.0", "compute capability 8.0, expected 9.0"),
        ("jax", "0.11.1", f"JAX 0.11.1, expected {jax.__version__}"),
        ("source", "0" * 16, f"sources of hash {'0' * 16}, expected "),
    ],
)
def test_a_stale_folder_is_refused_in_one_line(name, value, message, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: value}))
    code, (line,) = _run(folder)
    assert code == 1
    assert line.startswith(f"{folder.name} was exported for {message}")
    assert line.endswith(f"{_MEND} {folder.name} here") and "\n" not in line


def test_it_is_said_when_nothing_can_be_run(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            exported_calls.importlib.util, "find_spec", lambda name: None if "flat" in name else 1
        )
        missing = "exported calls need flatbuffers, which is not installed: pip install flatbuffers"
        assert _run(folder) == (1, [missing])
    (folder / "manifest.json").unlink()
    _, (line,) = _run(folder, capability="12.0")
    assert line == (
        "Triton kernels are not proven: implementation='triton' needs triton, which is not "
        f"installed, and none were exported: {_MEND.replace('h200', 'rtx5090')} {folder.name} here"
    )
    monkeypatch.setattr(exported_contracts, "check_packages", lambda: None)
    assert _run(folder) == (
        0,
        ["Triton is installed: the tests of its kernels prove them, and exported ones are left"],
    )


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(exported_contracts, "find_gpu", lambda: None)
    assert exported_contracts.main([]) == 2
    assert "nvidia-smi finds no NVIDIA GPU here" in capsys.readouterr().err
