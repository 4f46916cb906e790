"""Metrics files survive kills and resumes, and never hold the device back."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sparsejax.report.metrics import DeferredMetrics, MetricsWriter, read_metrics
from sparsejax.strict_json import dump_json, load_json


def write_steps(workdir, steps, resume_step=None):
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"phase": "dense", "loss": 1 / (step + 1)})
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
    write_steps(tmp_path / "straight", range(40))
    write_steps(tmp_path / "resumed", range(27))
    killed = tmp_path / "resumed" / "metrics.jsonl"
    killed.write_bytes(killed.read_bytes() + torn)
    assert [row["step"] for row in read_metrics(killed)][-1] == 26
    write_steps(tmp_path / "resumed", range(resume_step + 1, 40), resume_step=resume_step)
    assert killed.read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()


def test_a_run_that_begins_anew_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(2))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 1]


@pytest.mark.parametrize("line", [b"garbage\n", b'{"loss": 1.0}\n', b"3\n"])
def test_a_garbled_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'{"step": 2}\n'
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


def read_events(workdir: Path) -> list[Event]:
    """Unframe the records: 8 bytes length, 4 checksum, the event, 4 checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_gets_the_numbers_and_forgets_the_steps_run_again(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(3, {"phase": "dense", "loss": 0.5, "tokens": 7})
    events = read_events(tmp_path)
    scalars = {v.tag: v.simple_value for event in events for v in event.summary.value}
    assert scalars == {"loss": 0.5, "tokens": 7.0}
    assert [event.step for event in events if event.summary.value] == [3, 3]

    MetricsWriter(tmp_path, resume_step=2).close()
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 3


def test_scalars_come_one_step_late_as_python_numbers():
    deferred = DeferredMetrics()
    assert deferred.flush() is None
    assert deferred.push(1, {"loss": jnp.float32(0.1), "skipped": jnp.array(True)}) is None
    step, values = deferred.push(2, {"loss": jnp.float32(0.2)})
    assert (step, values) == (1, {"loss": float(np.float32(0.1)), "skipped": True})
    assert type(values["loss"]) is float and type(values["skipped"]) is bool
    assert deferred.flush() == (2, {"loss": float(np.float32(0.2))})
    assert deferred.flush() is None


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
    assert scalar.calls == ["copy", "wait"]


def test_a_vector_is_a_list_and_a_matrix_is_refused():
    deferred = DeferredMetrics()
    deferred.push(1, {"density": jnp.arange(3.0)})
    assert deferred.flush() == (1, {"density": [0.0, 1.0, 2.0]})
    with pytest.raises(
        ValueError, match=r"metrics\['map'\] must be a scalar or a vector, got shape \(3, 3\)"
    ):
        deferred.push(1, {"map": jnp.ones((3, 3))})
