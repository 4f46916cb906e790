"""What several JAX processes of one run must agree on, and how they end together.

The first process alone decides what files there are and writes them; what it finds out is sent to
the others, so that all take the same branch. Messages go through the key-value store of JAX's
coordination service: no device takes part, and background threads may use it. With one process
nothing is sent and nothing waits.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

# The key-value store, the barriers and the list of live processes have no public name. That of the
# process is read here too: `jax.process_index` would take hold of the devices.
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.process_watch import FOREVER_MS, MEETING_SECONDS, Watch, exit_at_once, explain_aborts
from sparsejax.types import PyTree

HEARTBEAT_SECONDS = 20
"""So long a process may say nothing before it counts as dead."""
PATIENCE_SECONDS = HEARTBEAT_SECONDS + 5
"""By then it is known that another process is dead."""

_counts: dict[str, Iterator[int]] = {}


def is_first() -> bool:
    """Return whether this process decides and writes for all."""
    return distributed.global_state.process_id == 0


def count() -> int:
    """Return the number of processes of the run."""
    return distributed.global_state.num_processes


def wait_for_all(name: str) -> None:
    """Wait until every process is here; safe in a background thread.

    Args:
      name: of the place. Processes must come to places of one name in the same order.
    """
    if count() > 1:
        _client().wait_at_barrier(_make_key(name), FOREVER_MS)


def decide[T](function: Callable[[], T], name: str = "decision") -> T:
    """Call a function on the first process alone, and return its result on all.

    Args:
      function: returns a JSON value.
      name: as of `wait_for_all`; threads need names of their own.

    Returns:
      What it returned; with several processes, tuples have become lists.

    Raises:
      Exception: what the function raised, on all processes; `is_shared` tells of it.
    """
    if count() == 1:
        return function()
    key = _make_key(name)
    if is_first():
        try:
            text = json.dumps({"result": function()})
        except Exception as error:
            kind = [type(error).__module__, type(error).__qualname__]
            _client().key_value_set(key, json.dumps({"error": str(error), "kind": kind}))
            raise share(error) from None
        _client().key_value_set(key, text)
    else:
        text = _client().blocking_key_value_get(key, FOREVER_MS)
    answer = json.loads(text)
    if "error" in answer:
        module, kind = answer["kind"]
        raise share(_make_error(module, kind, answer["error"]))
    return answer["result"]


def collect(name: str, value: Any) -> list[Any]:
    """Bring a value of every process to the first.

    Args:
      name: as of `wait_for_all`.
      value: JSON value of this process.

    Returns:
      The values of all processes, in order, on the first; nothing on the others, which do not wait.
    """
    if count() == 1:
        return [value]
    key = _make_key(name)
    _client().key_value_set(f"{key}/{distributed.global_state.process_id}", json.dumps(value))
    if not is_first():
        return []
    keys = [f"{key}/{process}" for process in range(count())]
    return [json.loads(_client().blocking_key_value_get(each, FOREVER_MS)) for each in keys]


def agree(what: str, value: Mapping[str, Any]) -> None:
    """Refuse to go on, on all processes, unless they all have the same.

    Args:
      what: the name of what is compared.
      value: nested mapping of JSON values.

    Raises:
      ValueError: names the first process that differs, and its first difference.
    """
    if count() == 1:
        return
    values = collect(what, value)
    decide(lambda: compare(what, values), what)


def compare(what: str, values: list[Mapping[str, Any]]) -> None:
    """Refuse values of processes that differ from those of the first.

    Args:
      what: the name of what is compared.
      values: a nested mapping for each process.

    Raises:
      ValueError: names the first process that differs, and its first difference.

    Example:
      >>> compare("data", [{"a": {"b": 1}}, {"a": {"b": 2}}])
      Traceback (most recent call last):
      ValueError: all processes must have the same data, got a.b=1 in process 0 and 2 in process 1
    """
    first = _flatten(values[0])
    for process, value in enumerate(values):
        other = _flatten(value)
        for name in [*first, *other]:
            mine, theirs = first.get(name), other.get(name)
            if mine != theirs:
                raise ValueError(
                    f"all processes must have the same {what}, got {name}={mine!r:.60} in process "
                    f"0 and {theirs!r:.60} in process {process}"
                )


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Let the first process through, and the others when it is done or has failed.

    Args:
      name: as of `wait_for_all`.
    """
    if count() == 1:
        yield
        return
    key = _make_key(name)
    if not is_first():
        _client().blocking_key_value_get(key, FOREVER_MS)
    try:
        yield
    finally:
        if is_first():
            _client().key_value_set(key, "done")


def fetch(tree: PyTree) -> PyTree:
    """Copy arrays to the host that may be dealt out over processes; all of them must call it.

    Args:
      tree: of arrays and None.

    Returns:
      The tree with NumPy arrays, whole on every process.
    """
    return jax.device_get(jax.tree.map(_replicate, tree))


def find_replicated(tree: PyTree) -> NamedSharding | None:
    """Return the sharding with which a program's results lie whole on all devices of a tree.

    Args:
      tree: of arrays.

    Returns:
      For `out_shardings` of `jax.jit`; None where no array lies on a mesh.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def share(error: Exception) -> Exception:
    """Mark an error that all processes raise alike, so that one of them tells it.

    Args:
      error: the error.

    Returns:
      The same error.
    """
    error.__dict__["shared"] = True
    return error


def is_shared(error: BaseException | None) -> bool:
    """Tell whether all processes raise an error alike, or what it was raised from.

    Args:
      error: the error.
    """
    while error is not None:
        if error.__dict__.get("shared"):
            return True
        error = error.__cause__
    return False


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the processes of a run, and watch them; before JAX takes hold of its devices.

    Args:
      coordinator: host:port of the first process; None = found by JAX, as are the others.
      num_processes: how many there are.
      process_id: of this one, from 0.

    Raises:
      ValueError: if JAX does not find out by itself what is None.
      RuntimeError: if the processes do not come together.
    """
    explain_aborts()
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=MEETING_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if count() > 1:
        Watch(_client(), distributed.global_state.process_id, count()).start()


def leave(code: int) -> None:
    """Exit, if `connect` has found other processes, from a run that ends alike on all of them.

    Args:
      code: exit code.
    """
    if Watch.current is None:
        return
    wait_for_all("end")
    Watch.current.is_over = True
    jax.distributed.shutdown()
    # The threads that watch may still be in JAX, which Python's own way out does not allow.
    exit_at_once(code)


def is_watched() -> bool:
    """Tell whether `connect` has found others: then `fail` and `leave` are the ways out."""
    return Watch.current is not None


def is_alone(error: BaseException | None) -> bool:
    """Tell whether an error is that of one of several processes, whose others have to be told.

    Args:
      error: the error; None for no error.
    """
    return error is not None and is_watched() and not is_shared(error)


def fail(message: str, code: int, *, patience: float = 0) -> NoReturn:
    """End this process for an error of its own, and the others with it.

    Without interpreter shutdown, where JAX would wait for processes that wait for this one.

    Args:
      message: one line.
      code: exit code, of all processes.
      patience: seconds to wait before, where the death of another process may have caused the
        error; that death is then told instead.
    """
    assert Watch.current is not None, "connect comes first"
    # Meanwhile the watch may end this process for the better reason.
    time.sleep(patience)
    Watch.current.fail(message, code)


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes have a coordination service"
    return client


def _make_key(name: str) -> str:
    return f"sparsejax/{name}/{next(_counts.setdefault(name, itertools.count()))}"


def _make_error(module: str, name: str, message: str) -> Exception:
    """Make an error of a kind that another process has named."""
    kind = getattr(sys.modules.get(module), name, RuntimeError)
    for base in kind.__mro__ if isinstance(kind, type) else ():
        with contextlib.suppress(TypeError):  # of its arguments
            if issubclass(base, Exception):
                return base(message)
    return RuntimeError(message)


def _replicate(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return jax.jit(lambda x: x, out_shardings=find_replicated(leaf))(leaf)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, x in value.items():
        if isinstance(x, Mapping):
            flat |= _flatten(x, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = x
    return flat
