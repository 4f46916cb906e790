"""What a backend of `nm_matmul`, of `pack_nm` and of `prune_mvue` is given.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

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
      draws: what gradient pruning draws by, or None: key[], typed random key, or
        uint32[ceil(M / 4), N], random bits.
    """

    x: jax.Array
    w: jax.Array
    mask: jax.Array
    packed: PackedNM | None
    bias: jax.Array | None
    draws: jax.Array | None


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
      has_bias: bool, a bias is added.
    """

    rows: int
    inner: int
    columns: int
    dtype: str
    pattern: tuple[int, int] = (2, 4)
    transposable: bool = False
    grad_pruning: str = "none"
    activation: str | None = None
    has_bias: bool = False

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward", "gradient")

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        most, group = self.pattern
        return {
            "dtype": self.dtype,
            "pattern": f"{most}:{group}",
            "grad_pruning": self.grad_pruning,
            "activation": self.activation or "none",
            "transposable": self.transposable,
            "bias": self.has_bias,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """(M, K, N)."""
        return self.rows, self.inner, self.columns


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
      shape: (K, N).
      dtype: str, of w.
    """

    along_k: bool
    along_n: bool
    shape: tuple[int, ...]
    dtype: str

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        return {"dtype": self.dtype, "along_k": self.along_k, "along_n": self.along_n}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(K, N)."""
        return self.shape


class PruneArrays(NamedTuple):
    """What is pruned, and by what.

    Attributes:
      x: float[..., 4 G, ...].
      bits: uint32[..., G, ...], random, one for each group.
    """

    x: jax.Array
    bits: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneFacts:
    """Static facts of one call of `prune_mvue`.

    Attributes:
      shape: of x.
      axis: int, not negative, in which groups lie.
      dtype: str, of x.
      exact: bool, whether the variance is the least possible.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: str
    exact: bool = False

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        return {"dtype": self.dtype, "exact": self.exact, "last_axis": self.sizes[2] == 1}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(entries before the axis, its length, entries behind it)."""
        before, behind = self.shape[: self.axis], self.shape[self.axis + 1 :]
        return math.prod(before), self.shape[self.axis], math.prod(behind)
