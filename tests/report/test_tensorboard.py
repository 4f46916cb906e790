"""TensorBoard and other writers get the rows, and training goes on when they fail."""

import contextlib
import re
import resource
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from sparsejax.report.metrics import MetricsWriter, read_metrics
from sparsejax.report.plots.training import plot_training
from sparsejax.report.tensorboard import TensorBoardWriter


def read_events(workdir):
    """Unframe the records: 8 bytes length, 4 checksum, the event, 4 checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def open_writer(workdir, *more, resume_step=None, warn=print, settings=None):
    board = TensorBoardWriter(workdir, resume_step=resume_step, settings=settings or {})
    return MetricsWriter(workdir, resume_step=resume_step, writers=[board, *more], warn=warn)


@contextlib.contextmanager
def files_limited_to(num_bytes):
    """Refuse to write past a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_numbers_stand_in_groups_and_those_of_layers_by_layer(tmp_path):
    rows = [
        {"kind": "phase", "layer_weight_density": {"mlp/up": [0.5]}, "step_memory_bytes": 7},
        {"kind": "phase", "phase_metrics": {"untrained_share": [None, 0.75], "count": 3}},
        {"kind": "train", "phase": "dense", "loss": 0.5, "attention_density": 0.25},
        {"kind": "train", "flip_rate": 0.5, "flip_rate/mlp/up": [None, 1.0]},
        {"kind": "train", "tokens_per_second": 64.0},
        {"kind": "validation", "validation_loss": 0.75},
        {"kind": "switch", "reason": "its last step is reached"},
    ]
    with open_writer(tmp_path) as writer:
        for row in rows:
            writer.write(3, row)
    events = read_events(tmp_path)
    values = [value for event in events if event.step == 3 for value in event.summary.value]
    assert {value.tag: value.simple_value for value in values} == {
        "layers/weight_density/mlp/up/00": 0.5,
        "speed/step_memory_bytes": 7.0,
        "layers/untrained_share/01": 0.75,
        "sparsity/count": 3.0,
        "train/loss": 0.5,
        "sparsity/attention_density": 0.25,
        "sparsity/flip_rate": 0.5,
        "layers/flip_rate/mlp/up/01": 1.0,
        "speed/tokens_per_second": 64.0,
        "validation/loss": 0.75,
    }


def test_tensorboard_shows_settings_and_pictures_and_forgets_the_steps_run_again(tmp_path):
    settings = {"num_steps": 3, "model": {"num_layers": 2}}
    picture = tmp_path / "loss.png"
    plot_training([{"step": 1, "loss": 1.0}], path=picture, title="a run")
    with open_writer(tmp_path, settings=settings) as writer:
        row = {"kind": "phase", "phase": "dense", "attention_density": 1.0}
        writer.write(1, row | {"step_memory_bytes": 7})
    values = [value for event in read_events(tmp_path) for value in event.summary.value]
    by_tag = {value.tag: value for value in values}
    text = by_tag["settings/text_summary"].tensor.string_val[0].decode()
    assert text.split() == ["num_steps", "=", "3", "model.num_layers", "=", "2"]
    image = by_tag["pictures/loss"].image
    assert image.encoded_image_string == picture.read_bytes()
    assert (image.width, image.height) == (1200, 525)

    with open_writer(tmp_path, resume_step=1) as writer:
        writer.write(2, {"kind": "train", "phase": "dense", "loss": 1.0})
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_costs_the_events_and_not_the_run(tmp_path, capsys):
    # In an event a number takes ten times as much as in a line. The thread of tensorboardX died
    # here, and the eleventh row after it waited for ever.
    row = {"kind": "train", "phase": "dense", "loss": 1, "flips": [0] * 50}
    said = []
    with files_limited_to(24_000), open_writer(tmp_path, warn=said.append) as writer:
        for step in range(1, 101):
            writer.write(step, row)
    (line,) = said
    assert "TensorBoardWriter failed, training goes on without it: OSError:" in line
    assert "File too large" in line and "\n" not in line
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100
    assert not any(capsys.readouterr())


def test_a_folder_that_cannot_be_made_costs_the_events_and_not_the_run(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    said = []
    with open_writer(tmp_path, warn=said.append) as writer:
        for step in (1, 2):
            writer.write(step, {"kind": "train", "phase": "dense", "loss": 1.0})
    assert len(said) == 1 and "FileExistsError" in said[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_stops_what_needs_its_metrics_and_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"File too large: '.*metrics.jsonl'"),
        files_limited_to(100),
        MetricsWriter(tmp_path, resume_step=None) as writer,
    ):
        for step in range(10):
            writer.write(step, {"loss": 1.0})
    kept = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [0, 1, 2, 3], "what a torn line leaves"


class Service:
    """A writer of one's own, which fails when it is told to."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def write(self, step, row):
        self.calls.append((step, row["loss"]))
        if self.fails == "write":
            raise TimeoutError("no\nanswer")

    def close(self):
        self.calls.append("close")
        if self.fails == "close":
            raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("fails", "calls", "warning"),
    [
        (None, [(1, 0.5), (2, 0.25), "close"], ""),
        (
            "write",
            [(1, 0.5), "close"],
            "Service failed, training .* TimeoutError: no answer",
        ),
        ("close", [(1, 0.5), (2, 0.25), "close"], "Service could not be closed: .*: gone$"),
    ],
)
def test_a_writer_of_ones_own_gets_every_row_until_it_fails(tmp_path, fails, calls, warning):
    service, said = Service(fails), []
    with open_writer(tmp_path, service, warn=said.append) as writer:
        for step in (1, 2):
            writer.write(step, {"kind": "train", "loss": 0.5 / step})
    assert service.calls == calls
    assert [re.search(warning, line) is not None for line in said] == [True] * bool(warning)
