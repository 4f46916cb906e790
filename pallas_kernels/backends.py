"""Backends of an op: one table in one shape, and the one place that chooses from it.

A backend is a module, or a folder, and a row of its op's table. The choice rests on static facts
alone: the device, what the caller named, shapes, types and options known while tracing, and the
verdicts read when the process started. It never looks at the values in a mask, so a pattern may
change between steps without a new compilation, and it never times anything.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pallas_kernels.dispatch import runs_on_own_gpu, target_platform
from pallas_kernels.verdict_files import verdicts_in_force
from pallas_kernels.verdicts import Facts, describe_call

type Implementation = Literal["mosaic_sm90", "triton", "xla", "dense", "reference"]
"""Names of backends. An op has some of them and refuses the others."""

DOCTOR = "python -m pallas_kernels.doctor"

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


def _no_tile(facts: Any) -> str:
    del facts
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend[Arrays, Facts]:
    """One row of an op's table.

    Attributes:
      name: what a caller passes as `implementation` to get this backend and no other.
      run: (arrays, facts) -> result, of one signature for all rows of a table.
      check: (facts) -> None; raises NotImplementedError, with the reason, where the call cannot
        run. By default it runs everywhere.
      suits: (facts) -> bool, whether a call that names no backend may get this one without a
        verdict. By default it may not.
      needs_verdict: whether a call that names no backend gets this one where it was proven, and was
        measured to be faster than what it would get otherwise.
      tile: (facts) -> str, how the kernel is cut where that follows from the sizes: a kernel is
        proven for each cut by itself.
    """

    name: Implementation
    run: Callable[[Arrays, Facts], Any]
    check: Callable[[Facts], None] = _accept
    suits: Callable[[Facts], bool] = _never
    needs_verdict: bool = False
    tile: Callable[[Facts], str] = _no_tile


class Choice(NamedTuple):
    """What a call runs, and why.

    Attributes:
      op: name of the op.
      facts: static facts of the call.
      backend: name of the backend.
      reason: why it is this one.
      others: name -> why it is none of these; of backends that a call without a name may get.
      is_named: whether the caller named it.
    """

    op: str
    facts: Any
    backend: str
    reason: str
    others: Mapping[str, str]
    is_named: bool = False

    @property
    def call(self) -> str:
        """The op and what its kernels are compiled for, sizes aside: what a run records."""
        return describe_call(self.op, self.facts)


_records: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar(
    "records", default=()
)
_recorded: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collect what is chosen while functions are traced.

    A function that `jax.jit` has traced before chooses nothing.

    Example:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> x, w, mask = jnp.ones((8, 16)), jnp.ones((16, 4)), jnp.eye(2, dtype=bool)
      >>> with record_choices() as choices:
      ...     _ = jax.eval_shape(pallas_kernels.block_sparse_matmul, x, w, mask)
      >>> [(choice.op, choice.backend) for choice in choices]
      [('block_sparse_matmul', 'xla')]
    """
    choices: list[Choice] = []
    token = _records.set((*_records.get(), choices))
    try:
        yield choices
    finally:
        _records.reset(token)


@contextlib.contextmanager
def use_recorded(choices: Mapping[str, str]) -> Iterator[None]:
    """Give calls that name no backend the one they had before.

    Such a call raises NotImplementedError if that backend cannot run it now, or was found to be
    wrong.

    Args:
      choices: `Choice.call` -> name of the backend.
    """
    token = _recorded.set(choices)
    try:
        yield
    finally:
        _recorded.reset(token)


def choose_backend[Arrays, F: Facts](
    op: str,
    backends: Sequence[Backend[Arrays, F]],
    implementation: str | None,
    facts: F,
    *,
    whole: bool = False,
) -> Backend[Arrays, F]:
    """Choose the backend that a call runs.

    A named one runs or raises, and is never replaced. Without a name it is the fastest of those
    proven on this device for such calls; where none is, the first row that suits and can run.

    Args:
      op: str, name of the op, for messages.
      backends: table of the op, in order of preference; a row of it suits always and runs
        everywhere.
      implementation: name the caller passed, or None.
      facts: static facts of the call.
      whole: XLA is to partition the call over a mesh, which it cannot do with a kernel.

    Raises:
      ValueError: if the op has no backend of that name; those it has are listed.
      NotImplementedError: if the named one cannot run, with the reason.
    """
    table = without_kernels(backends) if whole else backends
    choice = explain_choice(op, table, implementation, facts)
    for choices in _records.get():
        choices.append(choice)
    _logger.debug("%s: %r on %s: %s", choice.call, choice.backend, target_platform(), choice.reason)
    return find_backend(op, backends, choice.backend)


def explain_choice[Arrays, F: Facts](
    op: str,
    backends: Sequence[Backend[Arrays, F]],
    implementation: str | None,
    facts: F,
) -> Choice:
    """Say what `choose_backend` chooses, and why.

    Args:
      op: str, name of the op.
      backends: table of the op.
      implementation: name, or None.
      facts: static facts of the call.

    Raises:
      ValueError: as `choose_backend`.
      NotImplementedError: as `choose_backend`.
    """
    if implementation is not None:
        find_backend(op, backends, implementation).check(facts)
        return Choice(op, facts, implementation, "named by the caller", {}, is_named=True)
    before = (_recorded.get() or {}).get(describe_call(op, facts))
    if before is not None:
        _check_recorded(find_backend(op, backends, before), op, facts)
        return Choice(op, facts, before, "recorded when the run was started", {})
    return _choose_proven(op, backends, facts)


def without_kernels[Arrays, F](
    backends: Sequence[Backend[Arrays, F]],
) -> tuple[Backend[Arrays, F], ...]:
    """Return a table whose kernels refuse: XLA partitions what surrounds them, but not them.

    Args:
      backends: table of an op.
    """

    def refuse(name, facts):
        del facts
        raise NotImplementedError(
            f"implementation={name!r} cannot be partitioned over a mesh with explicit axes; call "
            "it inside jax.shard_map"
        )

    return tuple(
        dataclasses.replace(backend, check=functools.partial(refuse, backend.name))
        if backend.needs_verdict
        else backend
        for backend in backends
    )


def find_backend[Arrays, F](
    op: str, backends: Sequence[Backend[Arrays, F]], name: str
) -> Backend[Arrays, F]:
    """Return the row of a name.

    Args:
      op: str, name of the op, for the message.
      backends: table of the op.
      name: of the backend.

    Raises:
      ValueError: if there is none; the message lists the names.
    """
    for backend in backends:
        if backend.name == name:
            return backend
    names = tuple(backend.name for backend in backends)
    raise ValueError(f"implementation must be None or one of {names} for {op}, got {name!r}")


def _choose_proven(op, backends, facts) -> Choice:
    portable = [b for b in backends if b.suits(facts) and _refusal(b, facts) is None]
    if not portable:
        raise NotImplementedError(f"{op} has no backend for {facts}")
    default, verdicts = portable[0], verdicts_in_force()
    others, proven, unproven = {}, {}, False
    for backend in backends:
        if not backend.needs_verdict:
            continue
        refusal = _refusal(backend, facts)
        if refusal is not None:
            others[backend.name] = refusal
            continue
        judgement = verdicts.judge(op, backend, facts)
        if judgement.state == "right":
            proven[backend] = verdicts.compare(op, backend, facts)
        else:
            others[backend.name] = judgement.reason
            unproven |= judgement.state == "unproven"
    faster = {}
    for backend, seconds in proven.items():
        if verdicts.assumed:
            # The order of the table is that of preference.
            return Choice(op, facts, backend.name, "taken to be right there and faster", others)
        if seconds is None:
            others[backend.name] = "right, but no size up to this one was timed"
        elif seconds[backend.name] < seconds[default.name]:
            faster[backend] = seconds
        else:
            times = seconds[backend.name] / seconds[default.name]
            others[backend.name] = f"right, but takes {times:.3g} of the time of {default.name!r}"
    if faster:
        best = min(faster, key=lambda b: faster[b][b.name] / faster[b][default.name])
        times = faster[best][default.name] / faster[best][best.name]
        reason = f"right on this device, {times:.3g}x as fast as {default.name!r}"
        return Choice(op, facts, best.name, reason, others)
    if others and runs_on_own_gpu():
        _tell_fallback(op, default.name, tuple(others.items()), unproven)
    return Choice(op, facts, default.name, "runs everywhere", others)


def _refusal(backend: Backend, facts: Any) -> str | None:
    try:
        backend.check(facts)
    except NotImplementedError as error:
        return str(error)
    return None


def _check_recorded(backend: Backend, op: str, facts: Any) -> None:
    refusal = _refusal(backend, facts)
    if refusal is None and backend.needs_verdict:
        judgement = verdicts_in_force().judge(op, backend, facts)
        refusal = judgement.reason if judgement.state == "wrong" else None
    if refusal is not None:
        raise NotImplementedError(
            f"{describe_call(op, facts)} ran on {backend.name!r} before, which cannot go on here: "
            f"{refusal}"
        )


@functools.cache
def _tell_fallback(
    op: str, taken: str, reasons: tuple[tuple[str, str], ...], unproven: bool
) -> None:
    """Say once why a call takes none of the kernels; a warning if that can be helped."""
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    if unproven:
        _logger.warning("%s takes %r (%s); `%s` proves kernels", op, taken, told, DOCTOR)
    else:
        _logger.info("%s takes %r (%s)", op, taken, told)
