"""Benchmarks of whole steps: what they time trains, and what they compare is what they say."""

import pytest

from benchmarks import probe_cost, sat_retrieval
from benchmarks.harness import measure_case
from benchmarks.steps import make_classification_batch
from benchmarks.targets import evaluate


@pytest.mark.slow
def test_a_step_without_and_steps_with_probes_are_timed():
    case = probe_cost.make_case(probe_cost.Problem(320, 1))
    assert set(case.foreign) == {"no probe", "spion", "sat"}
    values = measure_case(case, repeats=3, sample_seconds=0.0)
    assert all(value["median_seconds"] > 0 for value in values.values())
    # The rate of the first step is 0: it is from the second on that the loss moves.
    losses = {float(case.foreign["sat"].call()) for _ in range(3)}
    assert len(losses) > 1, "a call goes on from where the one before has come"


@pytest.mark.ci
def test_a_hopper_gpu_measures_the_kernel_too():
    everywhere = probe_cost.list_problems("gpu", "8.0", headline=False)
    hopper = probe_cost.list_problems("gpu", "9.0", headline=False)
    assert hopper == everywhere + [p._replace(implementation="mosaic_sm90") for p in everywhere]
    assert "implementation" not in everywhere[0].key()
    # It is the step that probes that needs the GPU, and it is not there.
    case = probe_cost.make_case(hopper[-1]._replace(length=384, batch=1))
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        case.foreign["sat"].call()


def test_the_cost_of_a_probe_is_what_its_step_takes_longer():
    seconds = {"no probe": 1.0, "spion": 1.3, "sat": 1.5}
    values = {name: {"median_seconds": s} for name, s in seconds.items()}
    record = {"key": {"length": 2048, "batch": 4, "device": "cpu"}, "values": values}
    worst, spion, sat = (target.value(record) for target in probe_cost.TARGETS)
    assert (worst, spion, sat) == (pytest.approx(0.5), pytest.approx(0.003), pytest.approx(0.05))
    assert evaluate(probe_cost.TARGETS, [record]).startswith("missed: a probe costs less than 40 %")


def test_the_faster_dense_step_is_what_a_sparse_one_is_compared_with():
    seconds = {"dense": 9.0, "own loop, every block": 6.0, "SAT": 2.0}
    values = {name: {"median_seconds": s} for name, s in seconds.items()}
    record = {"key": {"device": "cpu"}, "values": values}
    assert sat_retrieval.TARGETS[0].value(record) == 3.0


def test_a_batch_has_nothing_of_padding():
    batch = make_classification_batch(batch_size=3, shape=(2, 8), vocab_size=5, num_classes=2)
    assert batch["inputs"].shape == batch["mask"].shape == (3, 2, 8)
    assert batch["mask"].all() and batch["inputs"].min() >= 1 and batch["labels"].max() < 2
