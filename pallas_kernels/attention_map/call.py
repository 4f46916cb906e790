"""What a backend of `mean_attention_map` is given.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax


class MapArrays(NamedTuple):
    """Arrays of one call.

    Attributes:
      q_BTNH: float[B, T, N, H], queries.
      k_BSKH: float[B, S, K, H], keys; K divides N.
      kv_mask_BS: bool[B, S] or None, False removes a key.
      lse: f32[B, T, N] or None: it is computed.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    kv_mask_BS: jax.Array | None
    lse: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapFacts:
    """Static facts of one call.

    Attributes:
      num_queries: int, T.
      num_keys: int, S.
      head_dim: int, H.
      dtype: str, of q and k.
      causal: bool, query t sees keys 0..t.
      has_lse: bool, the log-sum-exp is given.
    """

    num_queries: int
    num_keys: int
    head_dim: int
    dtype: str
    causal: bool
    has_kv_mask: bool = False
    has_lse: bool = False

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        return {
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "kv_mask": self.has_kv_mask,
            "lse": self.has_lse,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """(T, S)."""
        return self.num_queries, self.num_keys
