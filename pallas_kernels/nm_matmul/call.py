"""What a backend of `nm_matmul`, and of `pack_nm`, is given.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.nm_matmul.packing import PackedNM


class NMArrays(NamedTuple):
    """Arrays of one call of `nm_matmul`.

    Attributes:
      x: float[M, K].
      w: float[K, N], the dense weight, dtype of x. What it holds where the mask is False, NaN too,
        has no effect.
      mask: bool[K, N], True = kept.
      packed: PackedNM of both, or None.
      bias: float[N] or None, dtype of x.
      key: key[] or None, typed random key of gradient pruning.
    """

    x: jax.Array
    w: jax.Array
    mask: jax.Array
    packed: PackedNM | None
    bias: jax.Array | None
    key: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMFacts:
    """Static facts of one call of `nm_matmul`.

    Attributes:
      rows: int, M.
      inner: int, K.
      columns: int, N.
      dtype: str, of x and w.
      pattern: (n, m).
      transposable: bool, the mask keeps at most n of m along N as well.
      grad_pruning: "none", "mvue" or "mvue_exact".
      activation: None, "gelu", "geglu" or "swiglu".
    """

    rows: int
    inner: int
    columns: int
    dtype: str
    pattern: tuple[int, int] = (2, 4)
    transposable: bool = False
    grad_pruning: str = "none"
    activation: str | None = None


class PackArrays(NamedTuple):
    """One weight to pack.

    Attributes:
      w: bf16 or f16[K, N].
      mask: bool[K, N], at most two of every four consecutive True along each packed axis.
    """

    w: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackFacts:
    """Static facts of one call of `pack_nm`.

    Attributes:
      along_k: bool, pack w^T [N, K].
      along_n: bool, pack w [K, N].
    """

    along_k: bool
    along_n: bool
