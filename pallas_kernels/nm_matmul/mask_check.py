"""Whether a mask keeps at most n of every m consecutive entries, and where it does not.

Letters: K contracted axis   N columns of the weight.
"""

import jax
import numpy as np
from jax import core
from jax.typing import ArrayLike


def check_nm_mask(mask: ArrayLike, *, pattern: tuple[int, int] = (2, 4), axis: int) -> None:
    """Refuse a mask that keeps too many entries of a group; runs on the host.

    sum_{i < m} mask[m g + i] <= n  for every group g along the axis

    Args:
      mask: bool[..., K, N], True = kept, with values known: not traced.
      pattern: (n, m), at most n kept of every m consecutive.
      axis: 0 for groups along K, 1 for groups along N.

    Raises:
      ValueError: naming the first group that keeps too many, or what is wrong with the arguments.

    Example:
      >>> check_nm_mask(np.array([[1, 0], [1, 1], [0, 0], [1, 0]], bool), axis=0)
      Traceback (most recent call last):
        ...
      ValueError: mask must keep at most 2 of every 4 consecutive entries of a column; column 0 \
keeps 3 of rows 0 to 3
    """
    check_pattern(pattern)
    mask = np.asarray(mask)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis=}")
    if mask.ndim < 2 or mask.dtype != bool:
        raise ValueError(f"mask must be bool[..., K, N], got {mask.dtype}{list(mask.shape)}")
    most, group = pattern
    if mask.shape[axis - 2] % group:
        raise ValueError(
            f"{'KN'[axis]} of mask [..., K, N] must be a multiple of {group} for pattern "
            f"{pattern}, got {mask.shape=}"
        )
    counts = _count_kept(mask, group, axis)
    if (counts <= most).all():
        return
    *matrix, row, column = (int(i) for i in np.argwhere(counts > most)[0])
    line, start = (column, row * group) if axis == 0 else (row, column * group)
    raise ValueError(
        _MESSAGES[axis].format(
            most=most,
            group=group,
            line=line,
            kept=counts[(*matrix, row, column)],
            start=start,
            end=start + group - 1,
        )
        + (f" of matrix {matrix}" if matrix else "")
    )


def check_known_mask(mask: jax.Array, *, pattern: tuple[int, int], transposable: bool) -> None:
    """Look at the values of a mask that is not traced.

    Args:
      mask: bool[K, N], True = kept; a traced one is let pass.
      pattern: (n, m), at most n kept of every m consecutive.
      transposable: bool, along N as well as along K.

    Raises:
      ValueError: naming the first group that keeps too many.
    """
    if isinstance(mask, core.Tracer):
        return
    check_nm_mask(mask, pattern=pattern, axis=0)
    if transposable:
        try:
            check_nm_mask(mask, pattern=pattern, axis=1)
        except ValueError as error:
            raise ValueError(f"transposable=True, but {error}") from None


_MESSAGES = tuple(
    "mask must keep at most {most} of every {group} consecutive entries of a "
    f"{line}; {line} {{line}} keeps {{kept}} of {others} {{start}} to {{end}}"
    for line, others in (("column", "rows"), ("row", "columns"))
)


def check_pattern(pattern: tuple[int, int]) -> None:
    """Refuse what is not an N:M pattern.

    Args:
      pattern: (n, m), at most n kept of every m consecutive.

    Raises:
      ValueError: unless it is two ints, 1 <= n <= m.
    """
    sane = isinstance(pattern, tuple) and len(pattern) == 2
    sane = sane and all(isinstance(x, int) and not isinstance(x, bool) for x in pattern)
    if not sane or not 1 <= pattern[0] <= pattern[1]:
        raise ValueError(f"pattern must be two ints (n, m), 1 <= n <= m, got {pattern!r}")


def _count_kept(mask, group, axis):
    *leading, rows, columns = mask.shape
    if axis == 0:
        return mask.reshape(*leading, rows // group, group, columns).sum(axis=-2)
    return mask.reshape(*leading, rows, columns // group, group).sum(axis=-1)
