"""From which size on the sparse product is faster than the dense one: measured, not modelled.

Letters: M rows (tokens)   K contracted axis   N columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


class Measurement(NamedTuple):
    """One shape measured on a Hopper GPU.

    Attributes:
      rows: int, M.
      inner: int, K.
      columns: int, N.
      dtype: str, of x and w.
      time_ratio: float, seconds of the sparse product over seconds of the dense one.
    """

    rows: int
    inner: int
    columns: int
    dtype: str
    time_ratio: float


MEASURED: tuple[Measurement, ...] = ()
"""Empty until the kernels were measured on a GPU."""


def beats_dense(
    rows: int,
    inner: int,
    columns: int,
    dtype: DTypeLike,
    *,
    measured: Sequence[Measurement] | None = None,
) -> bool:
    """Return whether the sparse product is known to be faster than the dense one.

    It goes by the measured shape of that dtype that is largest among those no larger than the
    asked one in any direction; with none, the answer is no.

    Args:
      rows: int, M.
      inner: int, K.
      columns: int, N.
      dtype: dtype of x and w.
      measured: measurements to go by, or None for `MEASURED`.

    Example:
      >>> table = [Measurement(1024, 1024, 1024, "bfloat16", 1.3)]
      >>> table += [Measurement(4096, 4096, 4096, "bfloat16", 0.6)]
      >>> beats_dense(8192, 4096, 4096, "bfloat16", measured=table)
      True
      >>> beats_dense(8192, 4096, 2048, "bfloat16", measured=table)
      False
    """
    name = jnp.dtype(dtype).name
    smaller = [
        m
        for m in (MEASURED if measured is None else measured)
        if m.dtype == name and m.rows <= rows and m.inner <= inner and m.columns <= columns
    ]
    if not smaller:
        return False
    return max(smaller, key=lambda m: m.rows * m.inner * m.columns).time_ratio < 1
