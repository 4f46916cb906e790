"""What a backend of `block_sparse_matmul` is given.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax


class BlockArrays(NamedTuple):
    """Arrays of one call.

    Attributes:
      x_MK: float[M, K].
      w_KN: float[K, N], dtype of x. What it holds in pruned blocks, NaN too, has no effect.
      mask_IJ: bool[I, J], blocks kept.
      grad_mask_IJ: bool[I, J], blocks whose gradient is wanted.
      bias_N: float[N] or None, dtype of x.
    """

    x_MK: jax.Array
    w_KN: jax.Array
    mask_IJ: jax.Array
    grad_mask_IJ: jax.Array
    bias_N: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """Static facts of one call.

    Attributes:
      rows: int, M.
      shape: (K, N).
      grid: (I, J).
      dtype: str, of x and w.
      has_bias: bool, a bias is added.
    """

    rows: int
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    dtype: str
    has_bias: bool = False

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward", "gradient")

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        rows, columns = (size // count for size, count in zip(self.shape, self.grid, strict=True))
        return {"dtype": self.dtype, "block": f"{rows}x{columns}", "bias": self.has_bias}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(M, K, N)."""
        return self.rows, *self.shape


def find_sides(mask_IJ: jax.Array, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows and columns a block of a weight has.

    Args:
      mask_IJ: bool[I, J], blocks.
      shape: (K, N), of the weight.

    Returns:
      (K / I, N / J).
    """
    return shape[0] // mask_IJ.shape[0], shape[1] // mask_IJ.shape[1]
