"""What the harness promises: checked before timed, recorded once, resumable, interleaved."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import (
    Case,
    ForeignCall,
    Point,
    measure_case,
    parse_arguments,
    run_points,
)
from benchmarks.records import Column, Results, make_table
from pallas_kernels.doctor.timing import make_random, relative_error, time_interleaved

QUICK = {"repeats": 3, "sample_seconds": 0.0}
COLUMNS = [
    Column("size", lambda r: str(r["key"]["size"])),
    Column("error", lambda r: f"{r['values']['twice']['relative_error']:.0e}"),
    Column("peer", lambda r: r["values"]["peer"]["absent"]),
]


def make_case(**changes):
    x = make_random(jax.ShapeDtypeStruct((8,), jnp.float32))
    functions = {"twice": lambda x: 2 * x}
    return Case(functions=functions, args=(x,), reference=lambda x: x + x, tolerance=1e-6)._replace(
        **changes
    )


def make_points(made, sizes=(1, 2), **changes):
    def point(size):
        return Point({"size": size}, lambda: made.append(size) or make_case(**changes))

    return [point(size) for size in sizes]


def test_a_wrong_function_is_reported_and_not_timed():
    functions = {"twice": lambda x: 2 * x, "thrice": lambda x: 3 * x}
    values = measure_case(make_case(functions=functions), **QUICK)
    assert "median_seconds" in values["twice"] and values["twice"]["rounds"] == 3
    assert set(values["thrice"]) == {"failed"}


def test_nan_is_an_error_not_a_pass():
    assert relative_error(jnp.array([jnp.nan]), jnp.array([1.0])) == float("inf")
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(1,\)"):
        relative_error(jnp.ones(2), jnp.ones(1))


def test_a_function_that_raises_has_failed_and_the_rest_is_measured():
    def refuse(x):
        raise NotImplementedError("no such device\nand more")

    values = measure_case(
        make_case(functions={"refuse": refuse, "twice": lambda x: 2 * x}), **QUICK
    )
    assert values["refuse"] == {"failed": "NotImplementedError: no such device"}
    assert "median_seconds" in values["twice"]


def test_a_function_may_have_a_reference_of_its_own():
    functions = {"twice": lambda x: 2 * x, "thrice": lambda x: 3 * x}
    references = {"thrice": lambda x: x + x + x}
    values = measure_case(make_case(functions=functions, references=references), **QUICK)
    assert all("median_seconds" in value for value in values.values())


def test_timed_calls_take_all_inputs_in_turns():
    seen = []
    inputs = [make_random(jax.ShapeDtypeStruct((8,), jnp.float32), seed=s) for s in range(3)]

    def note(x):
        jax.debug.callback(lambda first: seen.append(float(first)), x[0])
        return 2 * x

    case = make_case(functions={"twice": note}, more_args=[(x,) for x in inputs[1:]])
    assert measure_case(case, **QUICK)["twice"]["relative_error"] == 0.0
    jax.effects_barrier()
    assert len(set(seen)) == 3 and set(seen) == {float(x[0]) for x in inputs}


def test_foreign_calls_are_checked_timed_and_waited_for():
    case, waited = make_case(), []

    def foreign(factor):
        return ForeignCall(
            call=lambda: [factor], wait=waited.append, to_numpy=lambda r: r[0] * case.args[0]
        )

    def refuse():
        raise RuntimeError("block too small")

    calls = {"peer": foreign(2), "wrong": foreign(3), "broken": foreign(2)._replace(call=refuse)}
    values = measure_case(case._replace(foreign=calls, flops={"peer": 1e12}), **QUICK)
    assert values["peer"]["rounds"] == 3 and values["peer"]["tflops_per_second"] > 0
    assert waited == [[2]] * 8
    assert set(values["wrong"]) == {"failed"}
    assert values["broken"] == {"absent": "RuntimeError: block too small"}


def test_calls_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = time_interleaved(calls, repeats=4, sample_seconds=0.0)
    # Compile and calibrate; then rounds, each with a call to warm up before the timed one.
    assert "".join(order) == "aabb" + "aabb" * 4
    assert [len(samples[name]) for name in "ab"] == [4, 4]


def test_a_second_run_measures_only_what_is_missing(tmp_path, capsys):
    made = []
    run = {"columns": COLUMNS, "results_dir": tmp_path, **QUICK}
    assert run_points("op", make_points(made, sizes=(1,)), **run) == 0
    assert run_points("op", make_points(made), **run) == 0
    assert made == [1, 2]
    run_points("op", make_points(made), force=True, **run)
    assert made == [1, 2, 1, 2]
    assert len(json.loads((tmp_path / "op.json").read_text())["points"]) == 2
    assert "| 2 | 0e+00 |" in (tmp_path / "op.md").read_text()
    assert "| 2 | 0e+00 |" in capsys.readouterr().out


def test_a_failed_point_is_counted_and_measured_again(tmp_path):
    made = []
    run = {"columns": COLUMNS[:1], "results_dir": tmp_path, **QUICK}
    broken = {"twice": lambda x: -x}
    assert run_points("op", make_points(made, functions=broken), **run) == 2
    assert run_points("op", make_points(made), **run) == 0
    assert made == [1, 2, 1, 2]


def test_no_point_starts_when_the_time_is_up(tmp_path, capsys):
    made = []
    run = {"columns": COLUMNS, "results_dir": tmp_path, **QUICK}
    run_points("op", make_points(made), budget_seconds=0.0, **run)
    assert made == [] and "2 points not looked at" in capsys.readouterr().out


def test_table_names_device_driver_and_absent_peers():
    record = {
        "key": {"size": 1},
        "values": {"peer": {"absent": "not installed"}},
        "environment": {
            "device": "NVIDIA H200",
            "driver": "580.1",
            "jax": "0.11.2",
            "python": "3.12.3",
            "date": "2026-01-02 03:04",
        },
    }
    table = make_table([record], COLUMNS)
    assert "**NVIDIA H200**, driver 580.1, jax 0.11.2, Python 3.12.3, 2026-01-02" in table
    assert "| 1 | – | not installed |" in table


def test_an_optional_column_without_values_is_left_out():
    record = {
        "key": {"size": 1},
        "values": {},
        "environment": {"device": "d", "jax": "1", "python": "3", "date": "2026-01-02 03:04"},
    }
    columns = [COLUMNS[0], COLUMNS[1]._replace(optional=True), COLUMNS[2]]
    assert "| size | peer |\n| --- | --- |\n| 1 | – |" in make_table([record], columns)


def test_a_file_that_is_not_a_results_file_is_refused(tmp_path):
    (tmp_path / "op.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a results file"):
        Results(tmp_path / "op.json")


def test_arguments():
    assert vars(parse_arguments("op", ["--force", "--budget-seconds=5"])) == {
        "force": True,
        "budget_seconds": 5.0,
        "headline": False,
    }
    one = parse_arguments("op", ["--part=b"], choices={"part": ("a", "b"), "other": ("c",)})
    assert (one.part, one.other) == ("b", None)
    with pytest.raises(SystemExit):
        parse_arguments("op", ["--part=c"], choices={"part": ("a", "b")})
