"""The softmax map of attention, averaged over batch and heads.

  A = 1/(B N) sum_bn softmax(q_bn k_bn^T / sqrt(H))

What methods look at that learn a sparsity pattern. The maps of single heads are never held.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.mosaic_sm90 import mean_attention_map_mosaic_sm90
from pallas_kernels.attention_map.reference import mean_attention_map_reference
from pallas_kernels.attention_map.xla import log_sum_exp, mean_attention_map_xla
from pallas_kernels.dispatch import check_implementation

type MapImplementation = Literal["mosaic_sm90", "xla", "reference"]
"""Names a caller may pass as `implementation`."""

_IMPLEMENTATIONS: tuple[str, ...] = get_args(MapImplementation.__value__)


def mean_attention_map(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    causal: bool = False,
    kv_mask_BS: jax.Array | None = None,
    lse_BTN: jax.Array | None = None,
    implementation: MapImplementation | None = None,
) -> jax.Array:
    """Average the softmax map over batch and heads.

    A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H], dtype of q, K divides N. No gradient.
      causal: bool, a query sees keys at its position and before.
      kv_mask_BS: bool[B, S], True = visible; None = all.
      lse_BTN: f32[B, T, N], what `block_sparse_attention(return_lse=True)` returned for these
        inputs with every block kept, for "mosaic_sm90", which computes it otherwise by one more
        product of queries and keys; the others have no use for it. It is not compared with them.
      implementation: "xla", rows streamed; "reference", all maps in memory; "mosaic_sm90", tiles of
        A that stay in registers while heads pass by, on a Hopper GPU, for bf16 and f16, head dims
        64 and 128 and lengths in multiples of 128; or None, which is "xla" until the kernel was run
        on a GPU. A named one runs or raises.

    Returns:
      f32[T, S]; each row sums to 1 if every query sees a key. A query of an example that sees no
      key has no distribution and adds nothing.

    Raises:
      ValueError: if a shape or dtype is not as described, or the name is unknown.
      NotImplementedError: if `implementation` names a backend that does not run on the device, or
        not with these shapes or types.

    Numerics:
      Scores, softmax and sums are f32.

    Example:
      >>> q = jnp.zeros((1, 2, 1, 4))
      >>> mean_attention_map(q, q, causal=True).tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    _check(q_BTNH, k_BSKH, kv_mask_BS, lse_BTN)
    if implementation is not None:
        check_implementation(implementation, _IMPLEMENTATIONS)
    operands = jax.lax.stop_gradient(q_BTNH), jax.lax.stop_gradient(k_BSKH)
    if implementation == "reference":
        return mean_attention_map_reference(*operands, kv_mask_BS, causal=causal)
    if implementation in (None, "xla"):
        return mean_attention_map_xla(*operands, kv_mask_BS, causal=causal)
    if lse_BTN is None:
        lse_BTN = log_sum_exp(*operands, kv_mask_BS, causal=causal)
    return mean_attention_map_mosaic_sm90(*operands, kv_mask_BS, lse_BTN, causal=causal)


def _check(q_BTNH, k_BSKH, kv_mask_BS, lse_BTN):
    shapes = f"{q_BTNH.shape=}, {k_BSKH.shape=}"
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or q_BTNH.shape[::3] != k_BSKH.shape[::3]:
        raise ValueError(f"q must be [B, T, N, H] and k [B, S, K, H], got {shapes}")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"the heads of k must divide those of q, got {shapes}")
    if q_BTNH.dtype != k_BSKH.dtype or not jnp.issubdtype(q_BTNH.dtype, jnp.floating):
        raise ValueError(
            f"q and k must share a floating dtype, got {q_BTNH.dtype=}, {k_BSKH.dtype=}"
        )
    B, S = k_BSKH.shape[:2]
    if kv_mask_BS is not None and (kv_mask_BS.shape != (B, S) or kv_mask_BS.dtype != jnp.bool_):
        got = f"{kv_mask_BS.dtype}{list(kv_mask_BS.shape)}"
        raise ValueError(f"kv_mask_BS must be bool{[B, S]} or None, got {got}")
    if lse_BTN is not None and lse_BTN.shape != q_BTNH.shape[:3]:
        raise ValueError(f"lse_BTN must be f32{list(q_BTNH.shape[:3])}, got {lse_BTN.shape=}")
