"""Children that are right, wrong, hang, die and lie, and the verdicts that come of them."""

import dataclasses

import jax
import pytest

from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor.child import shrink
from pallas_kernels.doctor.examine import examine, judge
from pallas_kernels.doctor.report import describe_outcome, find_break_even, format_outcomes
from pallas_kernels.doctor.trials import (
    Trial,
    list_all_calls,
    list_default_calls,
    list_trials,
    parse_trial,
)
from pallas_kernels.doctor.visit import drop_known, keep_outcomes
from pallas_kernels.machine import Gpu
from pallas_kernels.nm_matmul.call import NMFacts
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import read_processors, read_verdicts
from pallas_kernels.verdicts import Judgement, Timing, Verdicts
from tests.doctor.gpus import write_child

FACTS = NMFacts(rows=64, inner=128, columns=128, dtype="bfloat16")
KERNEL, PORTABLE = (Trial("nm_matmul", name, FACTS) for name in ("mosaic_sm90", "xla"))
H200 = Gpu("NVIDIA H200", "580.65.06", "9.0", 1)


def _vary(count):
    sizes = range(64, 64 * count + 1, 64)
    return [KERNEL._replace(facts=dataclasses.replace(FACTS, inner=size)) for size in sizes]


def _examine(tmp_path, body, trials=(KERNEL,), **options):
    child = write_child(tmp_path, body)
    return examine(
        trials, H200.kind, child=child, environment={}, **{"trial_seconds": 600, **options}
    )


def test_a_right_kernel_is_timed_and_a_portable_program_is_not(tmp_path):
    outcomes = _examine(tmp_path, "right(place, task)", [KERNEL, PORTABLE])
    assert [describe_outcome(outcome) for outcome in outcomes] == ["right", "right"]
    kernel, portable = outcomes
    assert [v.key.direction for v in kernel.verdicts] == ["forward", "gradient"]
    assert kernel.verdicts[1].timings == (Timing((1, 1, 1), 0.1, {"xla": 2.0, "mosaic_sm90": 1.0}),)
    assert portable.verdicts[0].timings == ()
    assert "right, 1e+03 ms at density 0.1, 2x as fast as xla" in format_outcomes(outcomes)


FAULTY = {
    "wrong (forward: hang); wrong (gradient: hang)": "hang()",
    "wrong (forward: crash, SIGABRT); wrong (gradient: crash, SIGABRT)": "os.abort()",
    "wrong (forward: illegal address); wrong (gradient: illegal address)": (
        "print('CUDA_ERROR_ILLEGAL_ADDRESS'); sys.exit(1)"
    ),
    # What follows lies: it says that all is well and shows nothing for it, or something else.
    "wrong (forward: no result); wrong (gradient: no result)": (
        "write(index=place, verdict='right')"
    ),
    "wrong (gradient: no result)": "right(place, task, ['forward'])",
    "not tried (no result)": "file.truncate(0); print('right')",
    "wrong (forward: y off by nan, allowed 0.2, mask random)": (
        "found = dict(off='y', mask='random', error=float('nan'), allowed=0.2, differs='')\n"
        "write(index=place, findings={'forward': found, 'gradient': found | {'error': 0.0}})"
    ),
    "wrong (gradient: dw off by 0.3, allowed 0.2, mask whole)": (
        "found = dict(off='dw', mask='whole', error=0.3, allowed=0.2, differs='')\n"
        "write(index=place, findings={'forward': found | {'error': 0.1}, 'gradient': found})"
    ),
    "wrong (forward: y differs when repeated)": (
        "found = dict(off='y', mask='random', error=0.1, allowed=0.2, differs='y')\n"
        "write(index=place, findings={'forward': found, 'gradient': found | {'differs': ''}})"
    ),
    "wrong (forward: ValueError: no); wrong (gradient: ValueError: no)": (
        "write(index=place, failed='ValueError: no')"
    ),
    "not tried (RESOURCE_EXHAUSTED: 80 GB)": (
        "write(index=place, no_memory='RESOURCE_EXHAUSTED: 80 GB')"
    ),
    "not here: too old": "write(index=place, refused='too old')",
    "wrong (forward: hang, at full size); wrong (gradient: hang, at full size)": (
        "right(place, task) if task == 'prove' else hang()"
    ),
    "wrong (forward: no result, at full size); wrong (gradient: no result, at full size)": (
        "right(place, task) if task == 'prove' else write(index=place, timings=[{'sizes': [1]}])"
    ),
}


@pytest.mark.parametrize("verdict", FAULTY)
def test_what_a_child_does_is_what_is_said_of_its_kernel(tmp_path, verdict):
    (outcome,) = _examine(tmp_path, FAULTY[verdict])
    assert describe_outcome(outcome) == verdict
    assert not outcome.is_right


def test_a_kernel_that_does_not_fit_beside_the_dense_program_stays_right(tmp_path):
    body = "right(place, task) if task == 'prove' else write(index=place, no_memory='80 GB')"
    (outcome,) = _examine(tmp_path, body)
    assert outcome.is_right and outcome.verdicts[-1].timings == ()


def test_the_rest_goes_on_after_one_that_hangs_and_one_that_dies(tmp_path):
    body = (
        "inner = trial['facts']['inner']\n"
        "if inner == 128: hang()\n"
        "if inner == 256: os.abort()\n"
        "right(place, task)"
    )
    portable = PORTABLE._replace(facts=dataclasses.replace(FACTS, inner=64))
    outcomes = _examine(tmp_path, body, [*_vary(5), portable])
    found = [describe_outcome(outcome).split(";")[0] for outcome in outcomes]
    assert found == [
        "right",
        "wrong (forward: hang)",
        "right",
        "wrong (forward: crash, SIGABRT)",
        "right",
        "right",
    ]


def test_a_child_that_ends_before_its_first_trial_is_not_started_for_ever(tmp_path):
    child = write_child(tmp_path, "")
    (tmp_path / "child.py").write_text("raise SystemExit('no driver')")
    outcomes = examine(_vary(3), H200.kind, child=child, environment={})
    assert [describe_outcome(o) for o in outcomes] == [
        "not tried (crash, exit code 1: no driver)"
    ] * 3
    assert all(outcome.verdicts == () for outcome in outcomes)


def test_an_interrupt_ends_the_children_under_way(tmp_path):
    def interrupt(outcome):
        raise KeyboardInterrupt

    body = "right(place, task) if trial['backend'] == 'xla' else signal.pause()"
    with pytest.raises(KeyboardInterrupt):
        _examine(tmp_path, body, [KERNEL, PORTABLE], trial_seconds=10**6, done=interrupt)


def test_nothing_is_begun_when_time_is_up(tmp_path):
    assert _examine(tmp_path, "right(place, task)", limit_seconds=0) == []


def test_gradients_that_a_backend_does_not_have_leave_the_forward_pass_proven():
    found = {"off": "y", "mask": "m", "error": 0.0, "allowed": 1.0, "differs": ""}
    answer = {"tile": "t", "refused_gradient": "H=256", "findings": {"forward": found}}
    outcome = judge(KERNEL, answer)
    assert describe_outcome(outcome) == "right, no gradient: H=256" and not outcome.is_right
    assert [v.refused for v in outcome.verdicts] == ["", "H=256"]
    judgement = Verdicts(outcome.verdicts).judge("nm_matmul", _row("t"), FACTS)
    assert judgement == Judgement("refused", "no gradient: H=256")


def _row(tile):
    return dataclasses.replace(TABLES["nm_matmul"][0], tile=lambda facts: tile)


def _tile(trial):
    with jax.sharding.use_abstract_mesh(make_abstract_gpu(H200.kind, 132)):
        return TABLES["nm_matmul"][0].tile(trial.facts)


def test_verdicts_are_kept_one_by_one_and_known_ones_are_not_tried_again(tmp_path):
    path, said = tmp_path / "v.json", []
    wrong = KERNEL._replace(facts=dataclasses.replace(FACTS, activation="gelu"))
    other = KERNEL._replace(facts=dataclasses.replace(FACTS, activation="geglu"))
    refused = KERNEL._replace(facts=dataclasses.replace(FACTS, dtype="float32"))
    body = (
        f"write(began=place, tile={_tile(KERNEL)!r}, processors=132)\n"
        "os.abort() if trial['facts']['activation'] else right(place, task)"
    )
    options = {"child": write_child(tmp_path, body), "environment": {}, "trial_seconds": 20}
    trials = [KERNEL, wrong, other, refused]
    assert drop_known(trials, H200, path) == trials
    keep_outcomes(trials[:2], H200, path, say=said.append, **options)
    assert len(said) == 2 and "SIGABRT" in "".join(said)
    assert len(read_verdicts(path)) == 4 and read_processors(path) == 132
    assert drop_known(trials, H200, path) == [other]


def test_unwritable_verdicts_are_found_out_before_anything_is_tried(tmp_path):
    (tmp_path / "file").write_text("")
    body = f"open({str(tmp_path / 'ran')!r}, 'w')"
    with pytest.raises(OSError):
        keep_outcomes(
            [KERNEL],
            H200,
            tmp_path / "file" / "v.json",
            say=print,
            child=write_child(tmp_path, body),
        )
    assert not (tmp_path / "ran").exists()


def test_trials_survive_json_and_name_their_faults():
    for op, facts in list_default_calls():
        trial = Trial(op, "xla", facts)
        assert parse_trial(trial.to_json()) == trial
    for change, message in (
        ({"op": "conv"}, "op must be one of .*'conv'"),
        ({"backend": "cuda"}, "backend of nm_matmul must be one of .*'cuda'"),
        ({"facts": {"rows": 3, "heads": 2}}, "facts of nm_matmul: .*heads"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_trial(KERNEL.to_json() | change)


def test_the_lists_cover_every_op_and_kernel_and_the_grid_has_no_call_twice():
    kernels = {(op, row.name) for op in TABLES for row in TABLES[op] if row.needs_verdict}
    defaults = list_trials(list_default_calls())
    assert {(t.op, t.backend) for t in defaults} >= kernels
    assert all(trial.backend != "reference" for trial in defaults)
    grid = list_all_calls()
    assert len(set(grid)) == len(grid) and {op for op, _ in grid} == set(TABLES)


def test_a_call_is_made_smaller_only_if_it_runs_the_same_kernel():
    table = {row.name: row for row in TABLES["nm_matmul"]}
    facts = dataclasses.replace(FACTS, rows=8192)
    small = dataclasses.replace(table["xla"], tile=lambda facts: "")
    assert shrink(KERNEL._replace(facts=facts), small).rows == 1024
    by_rows = dataclasses.replace(table["xla"], tile=lambda facts: str(facts.rows > 2000))
    assert shrink(KERNEL._replace(facts=facts), by_rows).rows == 4096
    exact = dataclasses.replace(table["xla"], tile=lambda facts: str(facts.rows))
    assert shrink(KERNEL._replace(facts=facts), exact) == facts


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (1.0, 5.0, "break-even at density 0.3"),
        (4.0, 8.0, "slower than dense at every density"),
        (0.1, 0.5, "faster at every density"),
        (1.0, 1.0, "no break-even: time does not grow with density"),
    ],
)
def test_break_even_is_where_a_straight_line_meets_dense(low, high, expected):
    timings = [
        Timing((1,), density, {"kernel": seconds, "dense": 3.0})
        for density, seconds in ((0.1, low), (0.5, high))
    ]
    assert find_break_even("kernel", "dense", timings) == expected
    assert find_break_even("kernel", "dense", timings[:1]) is None


@pytest.mark.slow
def test_what_ran_on_another_device_is_no_verdict():
    # JAX takes the CPU, in silence, where it was asked for a GPU first and has no plugin for it.
    (outcome,) = examine([PORTABLE], H200.kind, environment={"JAX_PLATFORMS": "cpu"})
    assert outcome.verdicts == ()
    assert describe_outcome(outcome) == (
        "not tried (crash, exit code 1: JAX runs on 'cpu' and not on 'NVIDIA H200'; is jax[cuda13] "
        "installed?)"
    )
    (outcome,) = examine([PORTABLE], "cpu", environment={"JAX_PLATFORMS": "cpu"})
    assert describe_outcome(outcome) == "right"
