"""Verdicts: which kernels were proven on a device, and how fast they were there.

`pallas_kernels.doctor` makes them, on the user's own device. A verdict belongs to a kernel key: op,
backend, hash of the kernel's source, direction, tile, and what the kernel is compiled for. A call
without a verdict for its key is unproven. `pallas_kernels.verdict_files` keeps them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pallas_kernels.source_hash import hash_source

type Scalar = str | int | bool | None

_SEP = ", "


class Facts(Protocol):
    """Static facts of a call, as every op's `call.py` has them.

    Attributes:
      DIRECTIONS: directions that a call may be run in: "forward", and "gradient" if it has one.
    """

    DIRECTIONS: ClassVar[tuple[str, ...]]

    @property
    def kernel_options(self) -> Mapping[str, Scalar]:
        """What a kernel is compiled for, sizes aside."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """How large the call is; kernels with equal options and tiles run any size."""
        ...


class Row(Protocol):
    """Of a backend, what verdicts need to know; `pallas_kernels.backends.Backend` is one."""

    @property
    def name(self) -> str:
        """What the op's table calls it."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """The function whose source is proven."""
        ...

    @property
    def tile(self) -> Callable[[Any], str]:
        """How the kernel is cut for given facts."""
        ...


class KernelKey(NamedTuple):
    """What a verdict belongs to.

    Attributes:
      op: name of the op.
      backend: name of the backend.
      source: hash of the kernel's source, see `hash_source`.
      direction: "forward" or "gradient".
      tile: how the kernel is cut, "" where its options say it.
      options: (name, value) of what it is compiled for, sorted.
    """

    op: str
    backend: str
    source: str
    direction: str
    tile: str
    options: tuple[tuple[str, Scalar], ...]


class Timing(NamedTuple):
    """How long one call took, values and gradients together.

    Attributes:
      sizes: `Facts.sizes` of the call.
      density: fraction of the blocks or weights that were kept.
      seconds: name of the backend -> median seconds, all measured in turns in one process.
    """

    sizes: tuple[int, ...]
    density: float
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about one kernel key.

    Attributes:
      sizes: of the call that it was last found on.
      wrong: why it is wrong, or "".
      refused: why the backend does not take such calls in this direction, or "".
      timings: of calls in this direction and those before it; empty if it is not right.
    """

    key: KernelKey
    sizes: tuple[int, ...]
    wrong: str = ""
    refused: str = ""
    timings: tuple[Timing, ...] = ()


def merge_verdicts(before: Verdict, found: Verdict) -> Verdict:
    """Add what was found about a kernel to what was known of it.

    A kernel that is wrong on calls of some sizes stays so until it is right on those; times of
    other sizes are kept.

    Args:
      before: earlier verdict.
      found: later verdict about the same key.
    """
    if found.wrong or (before.wrong and before.sizes == found.sizes):
        return found
    if before.wrong:
        return before
    new = {(timing.sizes, timing.density) for timing in found.timings}
    kept = [t for t in before.timings if (t.sizes, t.density) not in new]
    return dataclasses.replace(found, timings=(*kept, *found.timings))


def merge_all(verdicts: Iterable[Verdict]) -> dict[KernelKey, Verdict]:
    """Merge the verdicts about each key.

    Args:
      verdicts: the earlier ones first.

    Returns:
      key -> Verdict.
    """
    merged: dict[KernelKey, Verdict] = {}
    for verdict in verdicts:
        before = merged.get(verdict.key)
        merged[verdict.key] = verdict if before is None else merge_verdicts(before, verdict)
    return merged


class Judgement(NamedTuple):
    """What the verdicts say of one backend and one call.

    Attributes:
      state: "right" in every direction; "wrong" or "refused" in one; or "unproven" in one.
      reason: in words.
    """

    state: Literal["right", "wrong", "refused", "unproven"]
    reason: str


class Verdicts:
    """Verdicts to choose by.

    Args:
      verdicts: of one device; those about the same key are merged.
      assumed: every kernel that can run is taken to be right and faster, whatever the verdicts.
    """

    def __init__(self, verdicts: Iterable[Verdict] = (), *, assumed: bool = False):
        self.assumed = assumed
        self._verdicts = merge_all(verdicts)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self._verdicts.values())

    def find(self, key: KernelKey) -> Verdict | None:
        """Return the verdict of a key, or None: it is unproven."""
        return self._verdicts.get(key)

    def judge(self, op: str, backend: Row, facts: Facts) -> Judgement:
        """Say whether a kernel is proven for a call, in all its directions.

        Args:
          op: name of the op.
          backend: row of the op's table.
          facts: of the call.
        """
        if self.assumed:
            return Judgement("right", "taken to be right")
        unproven = []
        for direction in facts.DIRECTIONS:
            verdict = self.find(make_key(op, backend, direction, facts))
            if verdict is None:
                unproven.append(direction)
            elif verdict.wrong:
                return Judgement("wrong", f"wrong on this device ({verdict.wrong})")
            elif verdict.refused:
                return Judgement("refused", f"no {direction}: {verdict.refused}")
        if unproven:
            return Judgement("unproven", f"not proven on this device ({_SEP.join(unproven)})")
        return Judgement("right", "right on this device")

    def compare(self, op: str, backend: Row, facts: Facts) -> Mapping[str, float] | None:
        """Return how long a kernel and its peers took at the measured size closest to a call's.

        That is the largest of those no larger than the call in any of its sizes: what wins there
        is taken to win in larger calls too.

        Args:
          op: name of the op.
          backend: row of the op's table.
          facts: of the call.

        Returns:
          name of a backend -> seconds, values and gradients; None if no such size was measured.
        """
        verdict = self.find(make_key(op, backend, facts.DIRECTIONS[-1], facts))
        smaller = [
            timing
            for timing in (verdict.timings if verdict else ())
            if all(a <= b for a, b in zip(timing.sizes, facts.sizes, strict=True))
        ]
        return max(smaller, key=lambda t: t.sizes).seconds if smaller else None


def make_key(op: str, backend: Row, direction: str, facts: Facts) -> KernelKey:
    """Return the key that a verdict about a call belongs to.

    Args:
      op: name of the op.
      backend: row of the op's table.
      direction: one of `facts.DIRECTIONS`.
      facts: of the call.
    """
    options = tuple(sorted(facts.kernel_options.items()))
    source = hash_source(backend.run)
    return KernelKey(op, backend.name, source, direction, backend.tile(facts), options)


def describe_call(op: str, facts: Facts) -> str:
    """Name an op and what its kernels are compiled for, sizes aside.

    Args:
      op: name of the op.
      facts: of the call.

    Example:
      >>> from pallas_kernels.attention_map.call import MapFacts
      >>> facts = MapFacts(num_queries=64, num_keys=64, head_dim=8, dtype="float32", causal=True)
      >>> describe_call("mean_attention_map", facts)
      'mean_attention_map(dtype=float32, head_dim=8, causal)'
    """
    return f"{op}({describe_options(facts.kernel_options)})"


def describe_options(options: Mapping[str, Scalar]) -> str:
    """Write options in one line: those that are on by their names, and none that are off.

    Args:
      options: of a kernel.
    """
    return _SEP.join(
        name if value is True else f"{name}={value}"
        for name, value in options.items()
        if value is not False
    )
