"""The benchmark of FST's blocks and steps: what it times trains, and targets read the right row."""

import numpy as np
import pytest

from benchmarks.fst_gpt2 import (
    DENSE,
    TARGETS,
    BlockProblem,
    StepProblem,
    list_problems,
    make_block_case,
    make_step_case,
)
from benchmarks.harness import measure_case

QUICK = {"repeats": 3, "sample_seconds": 0.0}


@pytest.mark.slow
def test_both_blocks_agree_with_their_references():
    case = make_block_case(BlockProblem(64, 1, 64, "float32"), "xla")
    values = measure_case(case, **QUICK)
    assert set(values) == {"xla", DENSE}
    assert all(value["median_seconds"] > 0 for value in values.values())
    y, grads, dx = case.reference(*case.args)
    other, _, dx_dense = case.references[DENSE](*case.args)
    assert np.abs(y - other).max() > 1e-3 and np.abs(dx - dx_dense).max() > 1e-3
    assert np.asarray(grads["mlp"]["up"]["kernel"]).any()


@pytest.mark.slow
def test_a_call_of_a_step_goes_from_one_search_to_the_next():
    case = make_step_case(StepProblem("small", 1), "xla")
    assert case.units == 10
    losses = [[float(f.call()) for _ in range(2)] for f in case.foreign.values()]
    # One state goes on from call to call: the same batch, again and again, is learnt.
    assert all(second < first for first, second in losses)
    assert losses[0] != losses[1], "sparse and dense steps are different programs"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_problems_are_all_different_and_headlines_come_first(platform):
    headline, every = (list_problems(platform, headline=h) for h in (True, False))
    assert every[: len(headline)] == headline
    assert len({str(problem.key()) for problem in every}) == len(every)


def test_targets_speak_of_gpt2_774m_on_the_kernel():
    def record(kernel, **key):
        seconds = {kernel: {"median_seconds": 1.0}, DENSE: {"median_seconds": 1.3}}
        # Reasons come first in a record.
        if kernel != "mosaic_sm90":
            seconds = {"mosaic_sm90": {"absent": "no Hopper GPU"}, **seconds}
        return {"key": key | {"device": "gpu"}, "values": seconds}

    block = record("mosaic_sm90", **BlockProblem(1280, 16).key())
    step = record("mosaic_sm90", **StepProblem("774m", 16).key())
    assert [t.value(block) for t in TARGETS] == [1.3, None]
    assert [t.value(step) for t in TARGETS] == [None, 1.3]
    others = [
        record("xla", **StepProblem("774m", 16).key()),
        record("triton", **StepProblem("774m", 16).key()),
        record("mosaic_sm90", **StepProblem("124m", 32).key()),
        record("mosaic_sm90", **BlockProblem(2048, 16).key()),
    ]
    assert all(t.value(other) is None for t in TARGETS for other in others)
