"""Before a run on a GPU: what it needs is proven first, once, and nothing without a GPU."""

import json

import jax
import pytest

from pallas_kernels.backends import find_backend
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor import examine, visit
from pallas_kernels.tables import TABLES
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.tools import prove
from sparsejax.tools.programs import list_kernel_calls
from sparsejax.tools.prove import prove_kernels
from tests.doctor.gpus import install_nvidia_smi, write_child
from tests.training.runs import make_settings


@pytest.fixture
def config(tmp_path):
    settings = make_settings(
        tmp_path,
        recipe__name="static_attention",
        recipe__static_attention__density=1.0,
        model__num_layers=1,
        model__dtype="bfloat16",
        model__model_dim=64,
        model__block_size=32,
    )
    return parse_config(settings)


def _trace_here(arguments, *, settings):
    """Stand in for the process that traces the steps of a run."""
    assert arguments == ["-"]
    return list_kernel_calls(parse_config(json.loads(settings)))


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(prove, "say", lines.append)
    return lines


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Pretend that there is an H200; return the trials that its doctor is given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install_nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.setattr(prove, "_jax_may_use_cuda", lambda: True)
    tiles = tmp_path / "tiles.json"
    body = (
        f"tiles = json.load(open({str(tiles)!r}))\n"
        "write(began=place, tile=tiles[trial['backend']], processors=132)\n"
        "right(place, task)"
    )
    child, trials = write_child(tmp_path, body), []

    def examine_here(given, kind, **options):
        trials.extend(given)
        with jax.sharding.use_abstract_mesh(make_abstract_gpu(kind, 132)):
            backends = [find_backend(t.op, TABLES[t.op], t.backend) for t in given]
            cut = {b.name: b.tile(t.facts) for b, t in zip(backends, given, strict=True)}
        tiles.write_text(json.dumps(cut))
        return examine.examine(
            given, kind, child=child, environment={}, trial_seconds=20, **options
        )

    monkeypatch.setattr(visit, "examine", examine_here)
    monkeypatch.setattr(prove, "read_calls", _trace_here)
    return trials


def test_what_a_run_needs_is_proven_once(config, tried, said):
    prove_kernels(config)
    assert [(t.op, t.backend, t.facts.head_dim) for t in tried] == [
        ("block_sparse_attention", "mosaic_sm90", 32),
        ("block_sparse_attention", "triton", 32),
    ]
    assert said[0].startswith("proving 2 kernels on NVIDIA H200 first, once for this driver and")
    prove_kernels(config)
    assert len(tried) == 2


def test_kernels_are_proven_for_the_part_that_each_device_of_all_processes_has(
    config, tried, said, monkeypatch
):
    monkeypatch.setattr(prove, "collect", lambda name, own: [own, 3])
    prove_kernels(config)
    assert {(t.facts.batch, config.data.batch_size) for t in tried} == {(1, 4)}
    more = parse_config(config.to_dict() | {"mesh": {**config.to_dict()["mesh"], "data": 2}})
    with pytest.raises(ConfigError, match="as there are devices, 4, got data=2"):
        prove_kernels(more)


def test_a_run_goes_on_where_verdicts_cannot_be_kept(config, tried, said, tmp_path):
    (tmp_path / "cache").write_text("")
    prove_kernels(config)
    assert tried == []
    assert said[-1].startswith("note: kernels are not proven, verdicts cannot be kept: ")


def test_a_garbled_file_stops_the_run_with_one_line(config, tried, said, tmp_path):
    prove_kernels(config)
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"^{path} must be a readable file of verdicts, got"):
        prove_kernels(config)


def test_nothing_is_asked_for_without_a_gpu_or_on_the_cpu(
    config, tried, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(prove, "_jax_may_use_cuda", lambda: False)
    prove_kernels(config)
    monkeypatch.setattr(prove, "_jax_may_use_cuda", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    prove_kernels(config)
    assert (tried, said) == ([], [])


@pytest.mark.ci
def test_a_process_of_its_own_traces_what_the_settings_say(config):
    settings = json.dumps(config.to_dict())
    calls = visit.read_calls(["-"], settings=settings)
    assert calls == _trace_here(["-"], settings=settings) and calls
    with pytest.raises(ValueError, match="^num_steps must be at least 1, got 0"):
        visit.read_calls(["-"], settings=json.dumps(config.to_dict() | {"num_steps": 0}))
