"""The folder of a run: who may use it, and from where it goes on."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sparsejax.checkpoint.files import parse_order
from sparsejax.checkpoint.save import CheckpointInfo, find_checkpoints, read_run_metadata
from sparsejax.config.mesh import MeshConfig
from sparsejax.config.parse import ConfigError, add_later_settings, find_differences, parse_config
from sparsejax.config.schema import WATCHING, TrainConfig
from sparsejax.data import DataSpec
from sparsejax.processes import agree, count, decide, is_first

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_JAX_FLAGS = (
    "jax_allow_f16_reductions",
    "jax_compiler_enable_remat_pass",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_pgle",
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_memory_fitting_level",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_gpu_kernel_lowering",
    "jax_threefry_partitionable",
    "jax_use_direct_linearize",
    "jax_use_hlo_logistic_lowering",
    "jax_use_shardy_partitioner",
)
"""Those that may change a bit of what a run computes."""
_LOCK = ".lock"
_SHARING_SECONDS = 10
_WRITTEN = (".json", ".jsonl", ".png")
"""How the names of the files end that a run writes beside its checkpoints."""
# Compilers read these themselves.
_ENVIRONMENT = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")


def describe_run(
    config: TrainConfig, fingerprint: Mapping[str, Any], spec: DataSpec
) -> dict[str, Any]:
    """Return what must stay the same while a run is resumed, and what it ran on.

    Args:
      config: settings of the run.
      fingerprint: what identifies the data.
      spec: what the model knows of the data.

    Returns:
      JSON values: "config", "mesh", "data", "spec" and "versions", those of packages and whatever
      else decides about the bits: the device and flags of JAX and XLA.

    Raises:
      ConfigError: if the data of the processes is not the same.
    """
    require_same("data", {"data": fingerprint, "spec": spec._asdict()})
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    settings, sizes = config.to_dict(), config.mesh.fit(jax.device_count())
    # A run may go on on other devices: how they share the work is no part of what it computes.
    del settings["mesh"]
    if jax.device_count() > 1:
        versions["processes"] = str(count())
        versions["mesh"] = " x ".join(f"{name}={size}" for name, size in sizes.items())
    return {
        "config": settings,
        "mesh": dataclasses.asdict(config.mesh),
        "data": dict(fingerprint),
        "spec": spec._asdict(),
        "versions": {
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            **versions,
            **{name: os.environ.get(name, "") for name in _ENVIRONMENT},
            **{name: str(jax.config.values.get(name)) for name in _JAX_FLAGS},
        },
    }


@contextlib.contextmanager
def claim_workdir(workdir: str | os.PathLike) -> Iterator[Path]:
    """Create the folder of a run, or find it, and keep other runs out of it.

    Args:
      workdir: path, of a folder that all processes of the run see.

    Raises:
      ConfigError: if it is no folder, cannot be written, holds links, through which a run would
        write elsewhere, or folders named as files are that a run writes, another process trains
        in it, or one of this run does not see it.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(_lock_workdir(workdir))

        decide(lock)
        path = Path(workdir)
        if not is_first() and not _sees(path / _LOCK):
            raise ConfigError(
                f"--workdir={workdir} must be a folder that all processes share, but one that is "
                "not the first does not see it"
            )
        yield path


def _sees(path: Path) -> bool:
    """Return whether a file that another machine has made is there; a shared disk may take time."""
    deadline = time.monotonic() + _SHARING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _lock_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    if not isinstance(workdir, str | os.PathLike):
        raise ConfigError(f"workdir must be the path of a folder, got {workdir!r:.60}")
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Else the last step would be the first to meet them.
        folders = sorted(x.name for x in path.iterdir() if x.is_dir() and x.suffix in _WRITTEN)
        if folders:
            raise ConfigError(
                f"--workdir={workdir} must have no folders named like files of a run, got {folders}"
            )
        links = sorted(entry.name for entry in path.iterdir() if entry.is_symlink())
        if links:
            raise ConfigError(
                f"--workdir={workdir} must hold the run's own files and no links, got {links}; the "
                "folder itself may be a link"
            )
        lock = os.fdopen(os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "w")
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} must be a writable folder: {error}") from error
    with lock:
        try:
            # Freed by the system when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--workdir={workdir} is in use by another process") from error
        yield


def keep_schedule(config: TrainConfig, checkpoints: Path) -> TrainConfig:
    """Resolve the schedule: that of the run's start, or of these settings if it starts now.

    Args:
      config: settings.
      checkpoints: folder of the run's checkpoints.

    Returns:
      The settings with `schedule_steps` of 1 or more.

    Raises:
      ConfigError: if the folder's record is not what a run writes, or the run has steps beyond a
        schedule that ends with a rate of 0.
    """
    before = decide(lambda: _read_record(checkpoints))
    steps = config.schedule_length
    if before is not None and not config.schedule_steps:
        steps = before["config"].get("schedule_steps")
        if type(steps) is not int or steps < 1:
            raise _make_error(checkpoints, "config.schedule_steps", "a whole number above 0", steps)
    return dataclasses.replace(config, schedule_steps=steps)


def check_same_run(checkpoints: Path, description: dict[str, Any]) -> list[str]:
    """Refuse to go on in a folder that belongs to a run of other settings or data.

    How long a run goes on and how it is watched may change, see `WATCHING`.

    Args:
      checkpoints: folder of the run's checkpoints.
      description: what `describe_run` returned.

    Returns:
      list of str, one for each thing that differs and is allowed to: settings of `WATCHING`; and
      versions and flags, with which the run does not go on bit for bit.

    Raises:
      ConfigError: if settings or data differ; the message lists the keys.
    """
    return decide(lambda: _compare_runs(checkpoints, description))


def _compare_runs(checkpoints: Path, description: dict[str, Any]) -> list[str]:
    before = _read_record(checkpoints)
    if before is None:
        return []
    old, old_watching = _split_watching(before["config"])
    new, new_watching = _split_watching(description["config"])
    compared = (
        ("settings", old, new),
        ("data", before["data"], description["data"]),
        ("data", before["spec"], description["spec"]),
    )
    for name, was, now in compared:
        differences = find_differences(was, now)
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise ConfigError(
                f"{checkpoints.parent} belongs to a run with other {name}; take another "
                f"--workdir, or the {name} it was started with. Differences (before -> now):{lines}"
            )
    return [
        *(f"changed from here: {x}" for x in find_differences(old_watching, new_watching)),
        *(
            f"the run goes on, but not bit for bit as before, {x}"
            for x in find_differences(before["versions"], description["versions"])
        ),
    ]


class RecordedRun(NamedTuple):
    """What a run's folder says of it.

    Attributes:
      config: its settings.
      spec: what its model knows of the data.
      fingerprint: what identifies its data, the name of the tokenizer among it.
    """

    config: TrainConfig
    spec: DataSpec
    fingerprint: dict[str, Any]


def read_run(workdir: str | os.PathLike) -> RecordedRun:
    """Read what a run was started with.

    Args:
      workdir: folder of the run.

    Raises:
      ConfigError: if the folder holds no run, or one that says too little.
    """
    checkpoints = Path(workdir) / "checkpoints"
    recorded = _read_record(checkpoints)
    if recorded is None:
        raise ConfigError(f"workdir={str(workdir)!r} must hold a run's checkpoints, found none")
    # That of the run, of which earlier versions had none.
    mesh = recorded.get("mesh", dataclasses.asdict(MeshConfig()))
    config = parse_config({**recorded["config"], "mesh": mesh})
    spec, fingerprint = recorded["spec"], recorded["data"]
    kinds = {name: str if name == "task" else int for name in DataSpec._fields}
    if {name: type(value) for name, value in spec.items()} != kinds:
        raise _make_error(checkpoints, "spec", f"made of {', '.join(kinds)}", spec)
    if not isinstance(name := fingerprint.get("tokenizer"), str):
        raise _make_error(checkpoints, "data.tokenizer", "the name of a tokenizer", name)
    return RecordedRun(config, DataSpec(**spec), fingerprint)


def read_choices(checkpoints: Path) -> dict[str, str]:
    """Read on which backend each sparse op of a run ran.

    Args:
      checkpoints: folder of the run's checkpoints.

    Returns:
      `Choice.call` -> name of the backend; empty of a run that did not record them.

    Raises:
      ConfigError: if the folder's record is not what a run writes.
    """
    record = decide(lambda: _read_record(checkpoints)) or {}
    choices = record.get("implementations", {})
    if not isinstance(choices, dict) or not all(isinstance(x, str) for x in choices.values()):
        raise _make_error(checkpoints, "implementations", "names of backends by call", choices)
    return choices


def find_newest_checkpoint(checkpoints: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones.

    Args:
      checkpoints: folder of the run's checkpoints.

    Returns:
      tuple of CheckpointInfo or None, and a list of problems.

    Raises:
      ConfigError: if there are checkpoints and none is whole.
    """
    found, problems = decide(lambda: _find_newest(checkpoints))
    return None if found is None else CheckpointInfo.from_json(found, checkpoints), problems


def _find_newest(checkpoints: Path) -> tuple[dict[str, Any] | None, list[str]]:
    problems, committed = [], False
    for info in find_checkpoints(checkpoints):
        if info.problem is None:
            return info.to_json(), problems
        problems.append(info.problem)
        committed |= parse_order(info.path) is not None
    if committed:
        raise ConfigError(
            f"no checkpoint in {checkpoints} is whole; remove the folder to start over:\n  "
            + "\n  ".join(problems)
        )
    return None, problems


def find_last_good(checkpoints: Path, *, before_step: int) -> CheckpointInfo | None:
    """Return the newest checkpoint that is whole and good.

    Args:
      checkpoints: folder of the run's checkpoints.
      before_step: int, checkpoints of this step and later ones are left out.
    """

    def find() -> list[dict[str, Any]]:
        found = (x for x in find_checkpoints(checkpoints) if x.problem is None and x.good)
        return [info.to_json() for info in found if info.step < before_step][:1]

    return next((CheckpointInfo.from_json(x, checkpoints) for x in decide(find)), None)


def find_saved(checkpoints: Path, step: int) -> CheckpointInfo:
    """Return the newest checkpoint of a step that this run has saved.

    Args:
      checkpoints: folder of the run's checkpoints.
      step: optimiser steps done.
    """

    def find() -> dict[str, Any]:
        saved = find_checkpoints(checkpoints, verify_checksums=False)
        return next(info for info in saved if info.step == step).to_json()

    return CheckpointInfo.from_json(decide(find), checkpoints)


def require_same(what: str, value: Mapping[str, Any]) -> None:
    """Refuse to go on unless all processes of the run have the same.

    Args:
      what: the name of what is compared.
      value: nested mapping of JSON values.

    Raises:
      ConfigError: names the first process that differs, and its first difference.
    """
    try:
        agree(what, value)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _read_record(checkpoints: Path) -> dict[str, Any] | None:
    """Return what a run recorded of itself; None of one without a checkpoint, which starts anew."""
    if not find_checkpoints(checkpoints, verify_checksums=False):
        return None
    try:
        record = read_run_metadata(checkpoints)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if record is None:
        raise ConfigError(
            f"{checkpoints} must hold a run.json that describes the run: without it nothing says "
            "which settings and data its checkpoints belong to"
        )
    parts = ("config", "data", "spec", "versions")
    if not isinstance(record, dict) or any(not isinstance(record.get(x), dict) for x in parts):
        raise ConfigError(
            f"{checkpoints / 'run.json'} must describe a run by {', '.join(parts)}, got "
            f"{str(record)[:60]!r}"
        )
    return record | {"config": add_later_settings(record["config"])}


def _make_error(checkpoints: Path, name: str, expected: str, value: Any) -> ConfigError:
    place = f"{name} in {checkpoints / 'run.json'}"
    return ConfigError(f"{place} must be {expected}, got {value!r:.60}")


def _split_watching(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that define a run, and those that `WATCHING` names."""
    watching = {name: config[name] for name in WATCHING if name in config}
    return {name: x for name, x in config.items() if name not in WATCHING}, watching
