"""Files of verdicts, and those in force.

One JSON file holds the verdicts of one device kind, driver and JAX. The user's own lie in the cache
folder, where `pallas_kernels.doctor` writes them; those of a few measured devices are shipped in
`pallas_kernels/measured/`. They are read once in a process, when the first call without a named
backend is traced.
"""

import contextlib
import contextvars
import fcntl
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from pallas_kernels.dispatch import runs_on_own_gpu
from pallas_kernels.machine import find_gpu
from pallas_kernels.verdicts import KernelKey, Timing, Verdict, Verdicts, merge_all


class VerdictsError(ValueError):
    """A file is there and is no file of verdicts; the message names it."""


# A file of verdicts has some thousand of them.
_MOST_CHARACTERS = 64 << 20

SHIPPED = pathlib.Path(__file__).parent / "measured"

_in_force: contextvars.ContextVar[Verdicts | None] = contextvars.ContextVar(
    "verdicts", default=None
)
_NONE = Verdicts()


@contextlib.contextmanager
def use_verdicts(verdicts: Verdicts) -> Iterator[None]:
    """Choose by these verdicts instead of those on disk.

    What `jax.jit` has traced before does not change.

    Args:
      verdicts: of the device that code is traced for.
    """
    token = _in_force.set(verdicts)
    try:
        yield
    finally:
        _in_force.reset(token)


@contextlib.contextmanager
def assume_proven() -> Iterator[None]:
    """Take every kernel that can run to be right and faster: for programs that are only compiled.

    Of several, a call gets the first of its op's table.
    """
    with use_verdicts(Verdicts(assumed=True)):
        yield


def verdicts_in_force() -> Verdicts:
    """Return the verdicts to choose by: those in use, or those on disk for this GPU.

    Raises:
      VerdictsError: if a file of verdicts cannot be read.
    """
    verdicts = _in_force.get()
    if verdicts is not None:
        return verdicts
    if not runs_on_own_gpu():
        return _NONE
    return _read_own(jax.devices("gpu")[0].device_kind)


@functools.cache
def _read_own(kind: str) -> Verdicts:
    gpu = find_gpu()
    name = file_name(kind, gpu.driver if gpu else "unknown")
    return Verdicts(
        verdict for folder in (SHIPPED, cache_folder()) for verdict in read_verdicts(folder / name)
    )


def cache_folder() -> pathlib.Path:
    """Return the folder of the user's verdicts: `$XDG_CACHE_HOME/sparsejax/verdicts`."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "sparsejax" / "verdicts"


def file_name(kind: str, driver: str) -> str:
    """Name the file of a device kind and driver, with the JAX of this process.

    Args:
      kind: as the driver reports it.
      driver: version.

    Example:
      >>> file_name("NVIDIA H200", "580.65.06").startswith("nvidia-h200_driver-580.65.06_jax-")
      True
    """
    parts = (kind, f"driver-{driver}", f"jax-{jax.__version__}")
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()) for part in parts) + ".json"


def read_verdicts(path: pathlib.Path) -> list[Verdict]:
    """Read the verdicts of a file.

    Args:
      path: of the file, which need not exist.

    Raises:
      VerdictsError: if it is there and is no file of verdicts.
    """
    return _read(path)[1]


def read_processors(path: pathlib.Path) -> int | None:
    """Read how many streaming multiprocessors the device of a file has.

    Args:
      path: of the file, which need not exist.

    Returns:
      int, or None: not known yet.

    Raises:
      VerdictsError: if it is there and is no file of verdicts.
    """
    return _read(path)[0]


def _read(path: pathlib.Path) -> tuple[int | None, list[Verdict]]:
    try:
        with open(path, encoding="utf-8") as file:
            # One that is longer is cut, and then no JSON.
            content = json.loads(file.read(_MOST_CHARACTERS))
        processors = content["processors"]
        if processors is not None:
            processors = _parse_count(processors)
        return processors, [_parse_verdict(entry) for entry in content["verdicts"]]
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerdictsError(
            f"{path} must be a readable file of verdicts, got {type(error).__name__}: {error}; "
            "delete it and run the doctor again"
        ) from error


def write_verdicts(
    path: pathlib.Path, verdicts: Iterable[Verdict], *, processors: int | None = None
) -> None:
    """Add verdicts to a file; those about the same key are merged.

    Several processes may write at a time: each holds the lock beside the file meanwhile, and a
    reader finds the file before or after.

    Args:
      path: of the file; its folder is made.
      verdicts: to add.
      processors: streaming multiprocessors of the device, None if not known.

    Raises:
      OSError: if it cannot be written.
      VerdictsError: if it is there and is no file of verdicts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before, kept = _read(path)
        known = merge_all((*kept, *verdicts))
        unfinished = path.with_suffix(".tmp")
        entries = [_describe_verdict(verdict) for verdict in known.values()]
        content = {"processors": processors or before, "verdicts": entries}
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, path)


def _describe_verdict(verdict: Verdict) -> dict[str, Any]:
    entry = {
        **verdict.key._asdict(),
        "options": dict(verdict.key.options),
        "sizes": list(verdict.sizes),
        "verdict": _describe_state(verdict),
    }
    timings = [timing._asdict() for timing in verdict.timings]
    return entry | ({"timings": timings} if timings else {})


def _describe_state(verdict: Verdict) -> str:
    if verdict.refused:
        return f"refused ({verdict.refused})"
    return f"wrong ({verdict.wrong})" if verdict.wrong else "right"


def _parse_verdict(entry: Any) -> Verdict:
    text = entry["verdict"]
    found = re.fullmatch(r"(wrong|refused) \((.+)\)", text, re.DOTALL)
    if text != "right" and found is None:
        raise ValueError(f"a verdict is 'right', 'wrong (why)' or 'refused (why)', got {text!r}")
    names = ("op", "backend", "source", "direction", "tile")
    values = {name: entry[name] for name in names}
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{names} must be texts, got {list(values.values())}")
    timings = tuple(
        Timing(
            tuple(map(_parse_count, timing["sizes"])),
            _parse_number(timing["density"]),
            {name: _parse_number(seconds) for name, seconds in timing["seconds"].items()},
        )
        for timing in entry.get("timings", ())
    )
    options = tuple(sorted(entry["options"].items()))
    if not all(isinstance(value, str | int | None) for _, value in options):
        raise ValueError(
            f"options must be texts, whole numbers or null, got {entry['options']!r:.80}"
        )
    key = KernelKey(**values, options=options)
    sizes = tuple(map(_parse_count, entry["sizes"]))
    state = {found[1]: found[2]} if found else {}
    return Verdict(key=key, sizes=sizes, timings=timings, **state)


def _parse_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"a count must be a whole number in [0, 2^63), got {value!r:.40}")
    return value


def _parse_number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError(f"a time or density must be a number in [0, 1e9), got {value!r:.40}")
    return float(value)
