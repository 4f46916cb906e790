"""The seam at which tests run Triton kernels on the CPU."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

type HostRun = Callable[
    [Any, int, Mapping[str, np.ndarray], Mapping[str, Any], Mapping[str, Any]],
    tuple[np.ndarray, ...],
]


class Interpretation(NamedTuple):
    """How kernels are interpreted.

    Attributes:
      run: (kernel, number of programs, inputs by parameter, outputs by parameter, each with shape
        and dtype, constants by parameter) -> outputs in their order.
      capability: (major, minor), compute capability whose tiles are taken.
    """

    run: HostRun
    capability: tuple[int, int]


_in_force: contextvars.ContextVar[Interpretation | None] = contextvars.ContextVar(
    "interpretation", default=None
)


def find_interpretation() -> Interpretation | None:
    """Return how kernels are interpreted, None if they are compiled."""
    return _in_force.get()


@contextlib.contextmanager
def interpret_with(run: HostRun, capability: tuple[int, int]) -> Iterator[None]:
    """Interpret the Triton kernels of functions that are traced meanwhile.

    Args:
      run: see `Interpretation`.
      capability: see `Interpretation`.
    """
    token = _in_force.set(Interpretation(run, capability))
    try:
        yield
    finally:
        _in_force.reset(token)
