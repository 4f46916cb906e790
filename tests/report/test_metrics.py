"""Metrics files survive kills and resumes, and never hold the device back."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.recipes import Measured, keep_where
from sparsejax.report.metrics import DeferredMetrics, MetricsWriter, fetch_metrics, read_metrics
from sparsejax.strict_json import dump_json, load_json


def write_steps(workdir, steps, resume_step=None):
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"kind": "train", "phase": "dense", "loss": 1 / (step + 1)})
            if step % 10 == 0:
                writer.write(step, {"phase": "dense", "validation_loss": 2 / (step + 1)})


def test_rows_come_back_as_written(tmp_path):
    loss = float(np.float32(1 / 3))
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"phase": "dense", "loss": loss, "skipped": False})
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "phase": "dense", "loss": loss, "skipped": False}
        ]


@pytest.mark.parametrize("torn", [b"", b'{"step": 27, "lo', b'{"step": 27, "loss": 1.0}'])
@pytest.mark.parametrize("resume_step", [20, 25, 26])
def test_a_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path, resume_step, torn):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    write_steps(tmp_path / "straight", range(1, 40))
    write_steps(tmp_path / "resumed", range(1, 27))
    killed = tmp_path / "resumed" / "metrics.jsonl"
    killed.write_bytes(killed.read_bytes() + torn)
    assert [row["step"] for row in read_metrics(killed)][-1] == 26
    write_steps(tmp_path / "resumed", range(resume_step + 1, 40), resume_step=resume_step)
    assert killed.read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()


def test_a_run_that_begins_anew_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(2))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 1]


def test_steps_without_a_row_are_named_and_the_file_goes_on(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 6])
    said = []
    with MetricsWriter(tmp_path, resume_step=9, warn=said.append) as writer:
        writer.write(10, {"kind": "train", "phase": "dense", "loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    assert said == [f"warning: {path} lacks steps 4-5, 7-9, and goes on after them"]
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 6, 10]
    path.unlink()
    MetricsWriter(tmp_path, resume_step=2, warn=said.append).close()
    assert "lacks steps 1-2," in said[1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.new"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    other = tmp_path / "other"
    other.write_text("somebody else's\n")
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / name).symlink_to(other)
    write_steps(workdir, [1])
    assert other.read_text() == "somebody else's\n"
    assert not (workdir / "metrics.jsonl").is_symlink()
    assert len(read_metrics(workdir / "metrics.jsonl")) == 1


def test_a_file_of_an_earlier_version_is_refused_and_names_are_not_mixed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "kind": "phase", "phase": "x", "step_memory_bytes": 1, "density": 1.0}\n'
    )
    with pytest.raises(ValueError, match=r"line 1, must name its 'attention_density'"):
        MetricsWriter(tmp_path, resume_step=3)


@pytest.mark.parametrize(
    "line", [b"garbage", b'{"loss": 1.0}', b"3", b'{"step": "1"}', b"\xff", b"[" * 100_000]
)
def test_a_garbled_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, must be"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, must be"):
        MetricsWriter(tmp_path, resume_step=2)
    assert path.read_bytes() == content


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path):
    values = {"loss": math.nan, "norm": math.inf, "low": [-math.inf, 0.0]}
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"]) and row["norm"] == math.inf and row["low"] == [-math.inf, 0.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": (1, 2)}, r"x\['a'\] must be .* of type tuple"),
        ({"a": [np.float32(1)]}, r"x\['a'\]\[0\] must be .* of type float32"),
        ({1: "a"}, "keys of x must be strings, got 1"),
        ("NaN", "x must not be the string 'NaN'"),
    ],
)
def test_values_that_would_not_come_back_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        dump_json(value, "x")


def test_json_keeps_every_digit():
    value = {"f32": float(np.float32(0.1)), "big": 2**63 + 1, "tiny": 5e-324, "none": None}
    assert load_json(dump_json(value)) == value


@pytest.mark.parametrize("values", [{"loss": jnp.ones(())}, {"step": 3}])
def test_a_bad_row_is_refused_and_leaves_no_trace(tmp_path, values):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        with pytest.raises(ValueError):
            writer.write(1, values)
        writer.write(2, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 1.0}]


def test_scalars_come_one_step_late_as_python_numbers():
    deferred = DeferredMetrics()
    assert deferred.flush() is None
    assert deferred.push(1, {"loss": jnp.float32(0.1), "skipped": jnp.array(True)}) is None
    step, values = deferred.push(2, {"loss": jnp.float32(0.2)})
    assert (step, values) == (1, {"loss": float(np.float32(0.1)), "skipped": True})
    assert type(values["loss"]) is float and type(values["skipped"]) is bool
    assert deferred.flush() == (2, {"loss": float(np.float32(0.2))})
    assert deferred.flush() is None


def test_what_has_no_value_is_absent_and_null_in_a_list():
    def fetch(known, value):
        return fetch_metrics({"x": keep_where(jnp.array(known), value), "loss": jnp.float32(2)})

    rates = jnp.array([jnp.nan, 0.5])
    assert fetch([False, True], rates) == {"x": [None, 0.5], "loss": 2.0}
    assert fetch(True, jnp.float32(3)) == {"x": 3.0, "loss": 2.0}
    for nothing in (fetch(False, jnp.float32(3)), fetch(False, rates), fetch([False] * 2, rates)):
        assert nothing == {"loss": 2.0}
    # What a skipped step leaves of it.
    assert fetch(False, keep_where(jnp.array([False, True]), rates)) == {"loss": 2.0}
    assert fetch(True, keep_where(jnp.array([False, True]), rates))["x"] == [None, 0.5]
    # A loss that is not finite is a value, and reported.
    assert math.isnan(fetch(True, jnp.float32(jnp.nan))["x"])


def test_no_value_is_no_nan():
    with jax.debug_nans(True):
        measured = jax.jit(lambda x: keep_where(x > 0, 1 / x - 1 / x))(jnp.array([0.0, 2.0]))
        assert measured == Measured(pytest.approx([0, 0]), pytest.approx([False, True]))


class RunningScalar:
    """An array of a step still running: asking for its value would wait."""

    shape = ()

    def __init__(self):
        self.calls = []

    def copy_to_host_async(self):
        self.calls.append("copy")

    def tolist(self):
        self.calls.append("wait")
        return 0.5


def test_pushing_starts_the_copy_and_does_not_wait_for_the_step_that_runs():
    deferred, scalar = DeferredMetrics(), RunningScalar()
    deferred.push(1, {"loss": scalar})
    assert scalar.calls == ["copy"]
    assert deferred.push(2, {}) == (1, {"loss": 0.5})
    assert scalar.calls[-1] == "wait"


def test_a_vector_is_a_list_and_a_matrix_is_refused():
    deferred = DeferredMetrics()
    deferred.push(1, {"density": jnp.arange(3.0)})
    assert deferred.flush() == (1, {"density": [0.0, 1.0, 2.0]})
    with pytest.raises(
        ValueError, match=r"metrics\['map'\] must be a scalar or a vector, got shape \(3, 3\)"
    ):
        deferred.push(1, {"map": jnp.ones((3, 3))})


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 3, "kind": "train"}',
        '{"step": 3, "kind": "train", "phase": "dense", "loss": "abc"}',
        '{"step": 4, "kind": "validation", "phase": "dense"}',
        '{"step": -1, "kind": "train", "phase": "dense", "loss": 1.0}',
        '{"step": true, "kind": "train", "phase": "dense", "loss": 1.0}',
        '{"step": 3, "kind": "train", "phase": 5, "loss": 1.0}',
    ],
)
def test_a_row_without_what_its_kind_has_is_named(row, tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = '{"step": 1, "kind": "switch", "phase": "dense", "reason": "x"}'
    path.write_text(f"{first}\n{row}\n")
    with pytest.raises(ValueError, match="line 2, must be a JSON object with a step and what its"):
        read_metrics(path)
