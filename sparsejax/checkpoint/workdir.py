"""The folder of a run: who may use it, and from where it goes on."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sparsejax.checkpoint.files import parse_order
from sparsejax.checkpoint.save import CheckpointInfo, find_checkpoints, read_run_metadata
from sparsejax.config.parse import ConfigError, find_differences, parse_config
from sparsejax.config.schema import TrainConfig
from sparsejax.data import DataSpec

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_run(
    config: TrainConfig, fingerprint: Mapping[str, Any], spec: DataSpec
) -> dict[str, Any]:
    """Return what must stay the same while a run is resumed, and what it ran on.

    Args:
      config: settings of the run.
      fingerprint: what identifies the data.
      spec: what the model knows of the data.

    Returns:
      JSON values: "config", "data", "spec" and "versions".
    """
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "config": config.to_dict(),
        "data": dict(fingerprint),
        "spec": spec._asdict(),
        "versions": {
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **versions,
        },
    }


@contextlib.contextmanager
def claim_workdir(workdir: str | os.PathLike) -> Iterator[Path]:
    """Create the folder of a run, or find it, and keep other processes out of it.

    Args:
      workdir: path.

    Raises:
      ConfigError: if it is no folder, cannot be written, or another process trains in it.
    """
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} must be a writable folder: {error}") from error
    with lock:
        try:
            # Freed by the system when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--workdir={workdir} is in use by another process") from error
        yield path


def check_same_run(checkpoints: Path, description: dict[str, Any]) -> list[str]:
    """Refuse to go on in a folder that belongs to a run of other settings or data.

    Args:
      checkpoints: folder of the run's checkpoints.
      description: what `describe_run` returned.

    Returns:
      list of str, package versions that differ: the run goes on, but not bit for bit.

    Raises:
      ConfigError: if settings or data differ; the message lists the keys.
    """
    try:
        before = read_run_metadata(checkpoints)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if before is None:
        return []
    before["config"] = _drop_other_recipes(before["config"])
    for part, name in (("config", "settings"), ("data", "data")):
        differences = find_differences(before[part], description[part])
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise ConfigError(
                f"{checkpoints.parent} belongs to a run with other {name}; take another "
                f"--workdir, or the {name} it was started with. Differences (before -> now):{lines}"
            )
    return find_differences(before["versions"], description["versions"])


class RecordedRun(NamedTuple):
    """What a run's folder says of it.

    Attributes:
      config: its settings.
      spec: what its model knows of the data.
      tokenizer: name of the tokenizer of its data.
    """

    config: TrainConfig
    spec: DataSpec
    tokenizer: str


def read_run(workdir: str | os.PathLike) -> RecordedRun:
    """Read what a run was started with.

    Args:
      workdir: folder of the run.

    Raises:
      ConfigError: if the folder holds no run, or one that says too little.
    """
    checkpoints = Path(workdir) / "checkpoints"
    try:
        recorded = read_run_metadata(checkpoints) if checkpoints.is_dir() else None
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if recorded is None:
        raise ConfigError(f"workdir={str(workdir)!r} must hold a run's checkpoints, found none")
    if "spec" not in recorded:
        raise ConfigError(
            f"workdir={str(workdir)!r} must hold a run of this version, which records what its "
            "model knows of the data; resume it once, and it does"
        )
    config = parse_config(_drop_other_recipes(recorded["config"]))
    return RecordedRun(config, DataSpec(**recorded["spec"]), recorded["data"]["tokenizer"])


def read_choices(checkpoints: Path) -> dict[str, str]:
    """Read on which backend each sparse op of a run ran.

    Args:
      checkpoints: folder of the run's checkpoints.

    Returns:
      `Choice.call` -> name of the backend; empty of a run that did not record them.
    """
    return dict((read_run_metadata(checkpoints) or {}).get("implementations", {}))


def find_newest_checkpoint(checkpoints: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones.

    Args:
      checkpoints: folder of the run's checkpoints.

    Returns:
      tuple of CheckpointInfo or None, and a list of problems.

    Raises:
      ConfigError: if there are checkpoints and none is whole.
    """
    problems, committed = [], False
    for info in find_checkpoints(checkpoints):
        if info.problem is None:
            return info, problems
        problems.append(info.problem)
        committed |= parse_order(info.path) is not None
    if committed:
        raise ConfigError(
            f"no checkpoint in {checkpoints} is whole; remove the folder to start over:\n  "
            + "\n  ".join(problems)
        )
    return None, problems


def _drop_other_recipes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings without the sections of recipes that do not train.

    Earlier versions recorded them all.
    """
    recipe = config["recipe"]
    chosen = {"name", *recipe["name"].split("+")} | ({"own"} if ":" in recipe["name"] else set())
    return {**config, "recipe": {k: v for k, v in recipe.items() if k in chosen}}
