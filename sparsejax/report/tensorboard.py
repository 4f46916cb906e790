"""Write rows of metrics as TensorBoard events, without a thread.

The writer of tensorboardX queues events for a thread; where the disk is full the thread dies, and
the next event waits for it for ever. Here an event is on its way when `write` returns, or `write`
raises. A row becomes one event.
"""

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text

_GROUPS = {
    "train": ("loss", "accuracy", "grad_norm", "learning_rate", "skipped"),
    "speed": (
        "step_seconds",
        "tokens_per_second",
        "probing_step_seconds",
        "compile_seconds",
        "step_memory_bytes",
    ),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


class TensorBoardWriter:
    """Write rows as scalars in groups, the settings as text, and the pictures of a phase.

    The file is opened for the first row. All methods raise OSError if it cannot be written.

    Args:
      workdir: folder of the run; events go to its folder `tensorboard`, which need not exist.
      resume_step: int, step of the checkpoint that training goes on from, or None at the
        beginning. TensorBoard hides the steps after it that an earlier process wrote.
      settings: of the run, shown as text.
    """

    def __init__(self, workdir: Path, *, resume_step: int | None, settings: Mapping[str, Any]):
        self._workdir, self._settings = workdir, settings
        self._first_step = 0 if resume_step is None else resume_step + 1
        self._file: BinaryIO | None = None

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row, and beside that of a phase the pictures in the folder.

        Args:
          step: int, steps done.
          row: JSON values by name; those of layers are lists, and dicts may hold both.
        """
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in make_tags(row)]
        if values:
            self._append(step, summary=Summary(value=values))
        if row["kind"] == "phase":
            for path in sorted(self._workdir.glob("*.png")):
                self._append(step, summary=_make_picture(path))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _append(self, step: int, **content: Any) -> None:
        if self._file is None:
            self._file = self._open()
            self._begin(self._file)
        _write_event(self._file, step=step, **content)

    def _open(self) -> BinaryIO:
        folder = self._workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        return (folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}").open("xb")

    def _begin(self, file: BinaryIO) -> None:
        _write_event(file, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        _write_event(file, step=self._first_step, session_log=start)
        # Indented, so that it is shown as it is.
        lines = [f"    {name} = {value!r}" for name, value in _flatten(self._settings)]
        _write_event(file, step=self._first_step, summary=text("settings", "\n".join(lines)))


def _write_event(file: BinaryIO, **content: Any) -> None:
    """Write a record: length, its checksum, event, its checksum."""
    event = Event(wall_time=time.time(), **content).SerializeToString()
    length = struct.pack("<Q", len(event))
    file.write(length + _checksum(length) + event + _checksum(event))
    file.flush()


def _make_picture(path: Path) -> Summary:
    content = path.read_bytes()
    # After its signature and the frame of its first chunk, a PNG file says how large it is.
    width, height = struct.unpack(">II", content[16:24])
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=f"pictures/{path.stem}", image=image)])


def make_tags(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name the numbers of a row for TensorBoard.

    Args:
      row: JSON values by name.

    Returns:
      Iterator of (tag, number). Text and what has no value are left out.

    Example:
      >>> row = {"kind": "train", "loss": 2.5, "step_seconds": 0.1, "attention_density": 0.25}
      >>> dict(make_tags(row))
      {'train/loss': 2.5, 'speed/step_seconds': 0.1, 'sparsity/attention_density': 0.25}
      >>> dict(make_tags({"kind": "phase", "layer_attention_density": [1.0, 0.5]}))
      {'layers/attention_density/00': 1.0, 'layers/attention_density/01': 0.5}
      >>> dict(make_tags({"kind": "validation", "validation_loss": 2.25}))
      {'validation/loss': 2.25}
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            # Those of a phase have names of their own, the others are of weights.
            prefix = "" if name == "phase_metrics" else f"{name}/"
            yield from make_tags({f"{prefix}{inner}": x for inner, x in value.items()})
        elif isinstance(value, list):
            for layer, x in enumerate(value):
                if x is not None:
                    yield f"layers/{name.removeprefix('layer_')}/{layer:02d}", x
        elif isinstance(value, int | float):
            if name.startswith("validation_"):
                yield f"validation/{name.removeprefix('validation_')}", value
            else:
                yield f"{_GROUP_OF.get(name, 'sparsity')}/{name}", value


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
