"""Backends of an op: one table in one shape, and the one place that chooses from it.

A backend is a module, or a folder, and a row of its op's table. The choice rests on static facts
alone: the device, what the caller named, and shapes, types and options, known while tracing. It
never looks at the values in a mask, so a pattern may change between steps without a new
compilation.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pallas_kernels.dispatch import target_platform

type Implementation = Literal["mosaic_sm90", "xla", "dense", "reference"]
"""Names of backends. An op has some of them and refuses the others."""

_logger = logging.getLogger(__name__)


def always(facts: Any) -> bool:
    """Answer that a backend suits, whatever the facts.

    Args:
      facts: static facts of a call.
    """
    del facts
    return True


def _never(facts: Any) -> bool:
    del facts
    return False


def _accept(facts: Any) -> None:
    del facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend[Arrays, Facts]:
    """One row of an op's table.

    Attributes:
      name: what a caller passes as `implementation` to get this backend and no other.
      run: (arrays, facts) -> result, of one signature for all rows of a table.
      check: (facts) -> None; raises NotImplementedError, with the reason, where the call cannot
        run. By default it runs everywhere.
      suits: (facts) -> bool, whether a call that names no backend may get this one. By default it
        has to be named.
    """

    name: Implementation
    run: Callable[[Arrays, Facts], Any]
    check: Callable[[Facts], None] = _accept
    suits: Callable[[Facts], bool] = _never


def choose_backend[Arrays, Facts](
    op: str,
    backends: Sequence[Backend[Arrays, Facts]],
    implementation: str | None,
    facts: Facts,
) -> Backend[Arrays, Facts]:
    """Choose the backend that a call runs.

    A named one runs or raises, and is never replaced. Without a name it is the first row that
    suits and can run.

    Args:
      op: str, name of the op, for messages.
      backends: table of the op, in order of preference; a row of it suits always and runs
        everywhere.
      implementation: name the caller passed, or None.
      facts: static facts of the call.

    Raises:
      ValueError: if the op has no backend of that name; those it has are listed.
      NotImplementedError: if the named one cannot run, with the reason.

    Example:
      >>> double = Backend(name="xla", run=lambda x, facts: 2 * x, suits=always)
      >>> add = Backend(name="reference", run=lambda x, facts: x + x)
      >>> choose_backend("double", (add, double), None, ()).name
      'xla'
      >>> choose_backend("double", (add, double), "reference", ()).run(3, ())
      6
    """
    if implementation is not None:
        for backend in backends:
            if backend.name == implementation:
                backend.check(facts)
                return backend
        names = tuple(backend.name for backend in backends)
        raise ValueError(
            f"implementation must be None or one of {names} for {op}, got {implementation!r}"
        )
    for backend in backends:
        if backend.suits(facts) and _can_run(backend, facts):
            _logger.debug("%s: chose %r on %s, %s", op, backend.name, target_platform(), facts)
            return backend
    raise NotImplementedError(f"{op} has no backend for {facts}")


def _can_run(backend: Backend, facts: Any) -> bool:
    try:
        backend.check(facts)
    except NotImplementedError:
        return False
    return True
