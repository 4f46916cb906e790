"""Save and restore the train state bit for bit, and find out which checkpoints are whole.

A folder of checkpoints holds `run.json`, which describes the run, and one folder per save:

    00000300/            an Orbax checkpoint of the state's leaves, by path
      manifest.json      step, data position, metadata, metrics, and for each leaf its dtype
                         and shape, for each file its size and checksum

A save is written under a temporary name and renamed when its manifest is complete, so a folder
with its final name was whole when it was written. `find_checkpoints` tells if it still is.

Orbax writes and reads the arrays; names, order and deletion are decided here. Its own
`training.Checkpointer` (0.12.8) overwrites a step by deleting it first, deletes a folder `2/` and a
file `5` that are not its own, forgets the older checkpoints once a save has failed, and keeps no
checksums. Its policies could decide what is kept, but `BestN` takes a loss that is NaN for a rank,
and checkpoints without a loss for the best while there are few.
"""

import concurrent.futures
import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sparsejax.checkpoint.files import (
    MANIFEST,
    CheckpointInfo,
    choose_folder,
    delete_checkpoint,
    delete_leftover,
    describe_checkpoint,
    find_checkpoints,
    find_leftovers,
    get_unfinished,
    is_saved,
    measure_files,
    parse_order,
    read_manifest,
    seal_manifest,
)
from sparsejax.checkpoint.leaves import (
    check_storable,
    compare_leaves,
    describe_leaves,
    is_none,
    name_leaves,
)
from sparsejax.durable import write_durably
from sparsejax.processes import collect, count, decide, fail, is_alone, is_first, wait_for_all
from sparsejax.strict_json import dump_json, load_json
from sparsejax.types import PyTree

_RUN = "run.json"
# What goes wrong because another process has gone is that one's to tell.
_PATIENCE_SECONDS = 3


class CheckpointError(RuntimeError):
    """A save, or the check of older checkpoints, has failed; those that are kept are untouched."""


class Checkpointer:
    """Save checkpoints in the background, and keep the last ones and the best ones.

    To be used as a context manager by one run at a time; leaving it waits for the save
    under way. Opening it deletes what an interrupted save left behind. All processes of a run use
    it alike: each writes its part of the state, the first one everything else.

    Args:
      directory: folder for the checkpoints, made if absent.
      keep_last: int >= 1, periodic checkpoints kept by step.
      keep_best: int >= 0, checkpoints kept by their metric besides.
      best_metric: str, name of the metric that ranks them; lower is better.
      run_metadata: JSON dict kept for the whole run (config, data fingerprint, versions).

    Raises:
      ValueError: if a count is out of range, the metadata is not JSON, the folder cannot be
        written.
      OSError: if the record of the run cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int,
        keep_best: int,
        best_metric: str = "validation_loss",
        run_metadata: dict[str, Any],
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got keep_last={keep_last}")
        if keep_best < 0:
            raise ValueError(f"keep_best must be at least 0, got keep_best={keep_best}")
        run_text = dump_json(run_metadata, "run_metadata")
        self._directory = Path(directory).absolute()
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric

        def open_folder() -> None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                for leftover in find_leftovers(self._directory):
                    delete_leftover(leftover)
            except OSError as error:
                raise ValueError(
                    f"directory={directory} must be a writable folder: {error}"
                ) from error
            write_durably(self._directory / _RUN, run_text)

        decide(open_folder)
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._whole: list[CheckpointInfo] = []
        # Every byte is read; meanwhile training begins.
        self._pending = self._executor.submit(self._find_whole)

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: dict[str, Any],
        *,
        metadata: dict[str, Any],
        metrics: dict[str, float] | None = None,
        good: bool = True,
        periodic: bool = True,
        block: bool = False,
    ) -> None:
        """Save the state; return once it is copied to the host, before it is on disk.

        The state's buffers may be donated as soon as this returns. Saving a step again
        replaces its checkpoint once the new one is whole.

        What is kept besides the newest of all: of the good ones the last periodic ones, and the
        best.

        Args:
          step: int, optimiser steps done.
          state: tree of jax.Array and None.
          data_state: JSON dict, the position of the data iterator.
          metadata: JSON dict about this checkpoint, such as {"phase": "sparse"}.
          metrics: floats by name, or None if not evaluated; ranked by `best_metric`.
          good: bool, False if training from this state does not go well; such a one pushes no
            other out, and goes with the next save.
          periodic: bool, False if it is saved for its metrics alone.
          block: bool, return only when the checkpoint is whole on disk.

        Raises:
          CheckpointError: if the save before this one failed, or the check of older checkpoints, or
            this one with `block`.
          ValueError: if an argument cannot be stored exactly, or `best_metric` is not among
            the metrics.
        """
        self.wait()
        if metrics is not None and self._keep_best and self._best_metric not in metrics:
            raise ValueError(f"metrics must contain {self._best_metric!r}, got {sorted(metrics)}")
        leaves = name_leaves(state)
        manifest = {
            "step": step,
            "data_state": data_state,
            "metadata": metadata,
            "metrics": metrics or {},
            "good": good,
            "periodic": periodic,
            "leaves": describe_leaves(leaves),
        }
        # As it is now: the caller's dicts may change before it is written.
        manifest = load_json(dump_json(manifest, "checkpoint"))
        arrays = {name: check_storable(name, leaf) for name, leaf in leaves.items()}
        final = self._directory / decide(lambda: choose_folder(self._directory, step).name)
        unfinished = get_unfinished(final)
        with _reporting_failure(f"saving {final}", self._directory):
            write = ocp.save_async(
                str(unfinished), {k: v for k, v in arrays.items() if v is not None}
            )
        self._pending = self._executor.submit(self._finish, write, unfinished, final, manifest)
        if block:
            self.wait()

    def ranks_among_best(self, metrics: dict[str, float]) -> bool:
        """Tell whether a checkpoint with these metrics would be kept for them.

        Args:
          metrics: floats by name, `best_metric` among them.

        Raises:
          CheckpointError: if the save under way failed, or the check of older checkpoints.
        """
        self.wait()
        rank = metrics[self._best_metric]
        as_good = [info for info in self._whole if info.good and self._rank(info) <= rank]
        return math.isfinite(rank) and len(as_good) < self._keep_best

    def describe_run(self, run_metadata: dict[str, Any]) -> None:
        """Replace what is kept for the whole run.

        Args:
          run_metadata: JSON dict, as of the constructor.

        Raises:
          ValueError: if it is not JSON.
          OSError: if it cannot be written.
        """
        text = dump_json(run_metadata, "run_metadata")
        decide(lambda: write_durably(self._directory / _RUN, text))

    def wait(self) -> None:
        """Wait until the save under way, if any, is whole on disk.

        Raises:
          CheckpointError: if it failed, or the check of older checkpoints.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save under way, and leave nothing of one that failed.

        Raises:
          CheckpointError: if the save failed, or the check of older checkpoints.
        """
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            # Threads of Orbax that wrote other arrays of a failed save may have ended only now.
            _clear_leftovers(self._directory)
            logging.getLogger("absl").removeFilter(_is_not_from_orbax)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _finish(
        self, write: ocp.AsyncResponse, unfinished: Path, final: Path, manifest: dict[str, Any]
    ) -> None:
        with _reporting_failure(f"saving {final}", self._directory):
            write.result()
            self._put_in_place(unfinished, final, manifest)
            self._drop_old(describe_checkpoint(final, manifest))

    def _put_in_place(self, unfinished: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Seal a checkpoint that Orbax has written, and give it its name."""
        # Of no process before Orbax has put together what all of them wrote.
        wait_for_all("checkpoint written")
        # Each measures what it wrote, which a shared disk may show others late.
        own = f"*/ocdbt.process_{jax.process_index()}" if count() > 1 else ""
        parts = collect("checkpoint files", measure_files(unfinished, own))

        def finish() -> None:
            known = {name: measured for part in parts for name, measured in part.items()}
            manifest["files"] = measure_files(unfinished, known=known)
            write_durably(unfinished / MANIFEST, seal_manifest(manifest))
            unfinished.rename(final)

        decide(finish, "checkpoint finished")

    def _find_whole(self) -> None:
        with _reporting_failure(f"opening {self._directory}", self._directory):
            found = decide(self._list_whole, "checkpoints found")
            self._whole = [CheckpointInfo.from_json(info, self._directory) for info in found]
            if self._whole:
                # What an earlier run was about to delete when it was killed.
                self._drop_old(self._whole[0])

    def _list_whole(self) -> list[dict[str, Any]]:
        return [x.to_json() for x in find_checkpoints(self._directory) if x.problem is None]

    def _drop_old(self, new: CheckpointInfo) -> None:
        known = [new, *(info for info in self._whole if info.step < new.step)]
        good = [info for info in known if info.good]
        last = [info for info in good if info.periodic][: self._keep_last]
        ranked = [info for info in good if math.isfinite(self._rank(info))]
        best = sorted(ranked, key=self._rank)[: self._keep_best]
        kept = {info.path for info in [new, *last, *best]}
        self._whole = [info for info in known if info.path in kept]
        for path in self._directory.iterdir() if is_first() else ():
            order = parse_order(path)
            if order and order[0] <= new.step and path not in kept and is_saved(path):
                delete_checkpoint(path)

    def _rank(self, info: CheckpointInfo) -> float:
        return info.metrics.get(self._best_metric, math.inf)


def restore(info: CheckpointInfo, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Load a checkpoint exactly: same leaves, shapes and dtypes as asked for, or an error.

    Args:
      info: checkpoint without a problem.
      abstract_state: tree of jax.ShapeDtypeStruct (or arrays) and None; leaves without a
        sharding go to the default device.

    Returns:
      (state, data_state): a tree like `abstract_state` with arrays, and the data position.

    Raises:
      ValueError: if the checkpoint has a problem, or a leaf is missing, left over, or of
        another shape or dtype; the message names it, what is on disk and what was asked.
    """
    if info.problem:
        raise ValueError(f"info must be a whole checkpoint: {info.problem}")
    manifest = read_manifest(info.path)
    leaves = name_leaves(abstract_state)
    # Orbax casts to the dtype asked for without a word, so the comparison must come first.
    compare_leaves(info.path, manifest["leaves"], describe_leaves(leaves))
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
        for name, leaf in leaves.items()
        if leaf is not None
    }
    arrays = ocp.load(str(info.path.absolute()), abstract)
    treedef = jax.tree.structure(abstract_state, is_leaf=is_none)
    state = jax.tree.unflatten(treedef, [arrays.get(name) for name in leaves])
    return state, manifest["data_state"]


def read_run_metadata(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Read what `Checkpointer` was told about the run.

    Args:
      directory: folder of checkpoints.

    Returns:
      The `run_metadata`, or None if the folder has none.

    Raises:
      ValueError: if the file is there and garbled.
    """
    path = Path(directory) / _RUN
    if not path.exists():
        return None
    try:
        return load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but is garbled: {error}") from error


def count_bytes(state: PyTree) -> int:
    """Count the bytes of a tree's arrays; a checkpoint takes at most slightly more.

    Args:
      state: tree of arrays or jax.ShapeDtypeStruct.

    Example:
      >>> count_bytes({"w": jax.ShapeDtypeStruct((2, 3), "float32"), "mask": None})
      24
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@contextlib.contextmanager
def _reporting_failure(what: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _clear_leftovers(directory)
        reason = " ".join(str(error).split())
        if is_alone(error):
            # At once: Orbax lets the others wait for this one for minutes.
            fail(f"{what} failed: {reason}", code=1, patience=_PATIENCE_SECONDS)
        raise CheckpointError(f"{what} failed: {reason}") from error


def _clear_leftovers(directory: Path) -> None:
    if not is_first():
        return
    for leftover in find_leftovers(directory):
        with contextlib.suppress(OSError):
            delete_leftover(leftover)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    # Each of its threads logs a failure's traceback, hundreds of lines before the one that counts.
    return f"{os.sep}orbax{os.sep}" not in record.pathname
