"""What the ops of a run run on: chosen once, recorded, and kept when the run is resumed."""

import json

import pytest

from pallas_kernels.backends import Backend, record_choices
from pallas_kernels.block_sparse_attention import op, xla
from pallas_kernels.block_sparse_attention.backends import BACKENDS
from pallas_kernels.verdict_files import assume_proven, use_verdicts
from pallas_kernels.verdicts import Verdict, Verdicts, make_key
from sparsejax.config.parse import ConfigError
from tests.training.runs import copy_until, make_settings, train

# Stands in for the kernel, and computes as "xla" does.
_KERNEL = Backend(name="mosaic_sm90", run=xla.run, needs_verdict=True)


def _choices(workdir):
    return json.loads((workdir / "checkpoints" / "run.json").read_text())["implementations"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return make_settings(
        folder,
        num_steps=2,
        eval_every_steps=2,
        optimizer__warmup_fraction=0.5,
        recipe__name="static_attention",
        recipe__static_attention__density=0.5,
        model__num_layers=1,
    )


@pytest.fixture(scope="module")
def proven_run(settings, tmp_path_factory):
    """A run that was started where the kernel was proven, and what it chose."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, record_choices() as made, assume_proven():
        patch.setattr(op, "BACKENDS", (_KERNEL, *BACKENDS[1:]))
        train(settings, workdir)
    return workdir, made


@pytest.mark.ci
def test_a_run_records_what_it_chose_for_every_op(proven_run):
    workdir, made = proven_run
    choices = _choices(workdir)
    assert choices == {choice.call: choice.backend for choice in made}
    assert set(choices.values()) == {"mosaic_sm90"}
    (call,) = choices
    assert call.startswith("block_sparse_attention(dtype=float32, head_dim=16, block_q=16")


@pytest.mark.ci
def test_a_resumed_run_goes_on_with_what_it_had_without_a_verdict(
    settings, proven_run, tmp_path, monkeypatch
):
    workdir = copy_until(proven_run[0], 1, tmp_path / "resumed")
    monkeypatch.setattr(op, "BACKENDS", (_KERNEL, *BACKENDS[1:]))
    with record_choices() as made:
        train(settings, workdir)
    assert {choice.reason for choice in made} == {"recorded when the run was started"}
    assert _choices(workdir) == _choices(proven_run[0])


@pytest.mark.ci
def test_a_resumed_run_is_refused_where_its_kernel_is_wrong_or_cannot_run(
    settings, proven_run, tmp_path, monkeypatch
):
    workdir, made = proven_run
    workdir = copy_until(workdir, 1, tmp_path / "resumed")
    message = r"^block_sparse_attention\(.*\) ran on 'mosaic_sm90' before, .*{}.*; resume on the "
    with pytest.raises(ConfigError, match=message.format("needs a Hopper GPU")):
        train(settings, workdir)
    monkeypatch.setattr(op, "BACKENDS", (_KERNEL, *BACKENDS[1:]))
    facts = made[0].facts
    key = make_key("block_sparse_attention", _KERNEL, "gradient", facts)
    wrong = Verdicts([Verdict(key=key, sizes=facts.sizes, wrong="hang")])
    with use_verdicts(wrong), pytest.raises(ConfigError, match=message.format("hang")):
        train(settings, workdir)


@pytest.mark.ci
def test_a_run_that_recorded_nothing_chooses_now(settings, proven_run, tmp_path):
    workdir = copy_until(proven_run[0], 1, tmp_path / "resumed")
    path = workdir / "checkpoints" / "run.json"
    before = json.loads(path.read_text())
    del before["implementations"]
    path.write_text(json.dumps(before))
    train(settings, workdir)
    assert set(_choices(workdir).values()) == {"xla"}
