"""Attention restricted to kept blocks of queries and keys.

  s = scale q k^T,  out_t = sum_{s kept} exp(s_ts) v_s / Z_t

Operands are laid out as for `jax.nn.dot_product_attention`, in f32, bf16 or f16, on any device. The
block mask may be a traced array: it changes between steps without a new compilation.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.block_sparse_attention.backends import BACKENDS
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts
from pallas_kernels.meshes import run_on_mesh

type PrunedLogits = Literal["masked", "zero"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@overload
def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_or_schedule: jax.Array | BlockSchedule | None,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = ...,
    kv_mask: jax.Array | None = ...,
    removed_keys_finite: bool = ...,
    segment_ids: jax.Array | None = ...,
    scale: float | None = ...,
    pruned_logits: PrunedLogits = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation | None = ...,
) -> jax.Array: ...


@overload
def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_or_schedule: jax.Array | BlockSchedule | None,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = ...,
    kv_mask: jax.Array | None = ...,
    removed_keys_finite: bool = ...,
    segment_ids: jax.Array | None = ...,
    scale: float | None = ...,
    pruned_logits: PrunedLogits = ...,
    return_lse: Literal[True],
    implementation: Implementation | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_or_schedule: jax.Array | BlockSchedule | None,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = False,
    kv_mask: jax.Array | None = None,
    removed_keys_finite: bool = False,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    pruned_logits: PrunedLogits = "masked",
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Attend to the kept blocks only.

    s = scale q k^T,  out_t = sum_{s kept, visible} exp(s_ts) v_s / Z_t
    Z_t = sum_{s kept, visible} exp(s_ts)                     pruned_logits="masked"
    Z_t = the same + number of visible positions pruned       pruned_logits="zero"

    Visible to query t are keys 0..t if causal (counted from the start of both sequences), and
    keys of its own segment. `kv_mask` removes keys from the sums; under "zero" a removed key
    still counts 1 in each pruned block, as in the published kernels. A query with nothing to
    attend to has output 0 and gradients 0; its lse is the logarithm of the positions counted,
    -inf if there are none.

    Args:
      q: float[B, T, N, H], queries, in f32, bf16 or f16.
      k: float[B, S, K, H], keys, dtype of q; K divides N (grouped queries).
      v: float[B, S, K, H], values, dtype of q.
      mask_or_schedule: bool[1 or B, 1 or N, T / block_q, S / block_kv], True where a block is
        kept; or the BlockSchedule of such a mask, built once per mask update; or None: every
        block is kept, known while tracing. Has no gradient.
      block_q: int, queries per block; divides T.
      block_kv: int, keys per block; divides S.
      causal: bool, hide later keys. Blocks above the diagonal cost nothing under "xla",
        "mosaic_sm90" and "triton".
      kv_mask: bool[B, S] or None, False removes a key; what it holds, NaN too, has no effect.
      removed_keys_finite: bool, removed keys and their values are finite, as are their products
        with q and cotangents, so that they need not be replaced by zeros first: a pass over k and v
        less, and one over their gradients. Where they are not, results may be NaN.
      segment_ids: int[B, T] or None, segment of each position; needs S == T.
      scale: float or None, factor of the logits; None is 1 / sqrt(H).
      pruned_logits: "masked" or "zero".
      return_lse: bool, return lse as well.
      implementation: "xla", a walk over the kept blocks; "dense", every logit, masked;
        "reference"; "mosaic_sm90", tensor cores of a Hopper GPU; "triton", any NVIDIA GPU since
        Ampere; or None: the kernels where they were proven and are faster, else "dense" where there
        is nothing to skip, without a mask or in blocks of one position, and "xla" elsewhere. A
        named one runs or raises.

    Returns:
      out, shaped and typed like q, or the tuple (out, lse) with lse f32[B, T, N], log Z_t.

    Raises:
      ValueError: if a shape, dtype or option is not as described.
      NotImplementedError: if `implementation` names a backend that does not run on the device,
        or not with these shapes, types or options; the message says which.

    Numerics:
      Products accumulate in f32 and softmax is f32; probabilities are rounded to the dtype of q
      before they meet the values. Products of f32 follow `jax_default_matmul_precision`, but for
      "reference" and "triton", which compute in full f32. A repeated call agrees to the last bit.
      float16 holds nothing above 65504: gradients of a loss that was scaled up can overflow there.

    Derivatives:
      Reverse mode. "dense" and "reference" are plain JAX: forward mode and reverse mode twice too.
      "xla" adds forward mode of the gradient, for Hessian products; kernels add nothing.

    References:
      SPION, arXiv:2309.12578; SAT, doi:10.1109/ACCESS.2024.3425638 (the "zero" rule). Their code is
      not causal; visible positions of causal attention and segments are our extension.

    Example:
      >>> q = k = v = jnp.ones((1, 64, 2, 16))
      >>> mask = jnp.eye(2, dtype=bool)[None, None]
      >>> block_sparse_attention(q, k, v, mask, block_q=32, block_kv=32).shape
      (1, 64, 2, 16)
    """
    _check_arrays(q, k, v, block_q, block_kv, kv_mask, segment_ids)
    _check_mask(mask_or_schedule, q, k, block_q, block_kv)
    _check_options(causal, removed_keys_finite, scale, pruned_logits, return_lse)

    def attend(q, k, v, mask_or_schedule, kv_mask, segment_ids, *, whole):
        facts = AttentionFacts(
            batch=q.shape[0],
            num_queries=q.shape[1],
            num_keys=k.shape[1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            dtype=q.dtype.name,
            mask_shape=_mask_shape(mask_or_schedule),
            block_q=block_q,
            block_kv=block_kv,
            causal=causal,
            has_kv_mask=kv_mask is not None,
            has_segments=segment_ids is not None,
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
            pruned_logits=pruned_logits,
            return_lse=return_lse,
        )
        backend = choose_backend(
            "block_sparse_attention", BACKENDS, implementation, facts, whole=whole
        )
        if kv_mask is not None and not removed_keys_finite:
            # A removed key meets probability 0, but 0 * NaN is NaN; zeros in its place are safe.
            k, v = (jnp.where(kv_mask[:, :, None, None], x, 0) for x in (k, v))
        arrays = AttentionArrays(q, k, v, mask_or_schedule, kv_mask, segment_ids)
        out, lse = backend.run(arrays, facts)
        return (out, lse) if return_lse else (out,)

    results = run_on_mesh(
        attend,
        (q, k, v, mask_or_schedule, kv_mask, segment_ids),
        ("BTNH", "BSNH", "BSNH", "BN", "BS", "BT"),
        ("BTNH", "BTN") if return_lse else ("BTNH",),
        parts={"B": 1, "N": 1},
    )
    return results if return_lse else results[0]


def _mask_shape(mask_or_schedule):
    if mask_or_schedule is None:
        return None
    if isinstance(mask_or_schedule, BlockSchedule):
        return mask_or_schedule.kv_counts.shape[:2]
    return mask_or_schedule.shape[:2]


def _check_arrays(q, k, v, block_q, block_kv, kv_mask, segment_ids):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have axes [batch, length, heads, dim], got {x.shape=}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            "q, k, v must share one of float32, bfloat16, float16, "
            f"got {q.dtype=}, {k.dtype=}, {v.dtype=}"
        )
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k and v must be [B, S, K, H] with B and H of q [B, T, N, H], "
            f"got {q.shape=}, {k.shape=}, {v.shape=}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k, v must not be empty, got {q.shape=}, {k.shape=}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"key heads must divide query heads, got {q.shape[2]} query heads ({q.shape=}) "
            f"and {k.shape[2]} key heads ({k.shape=})"
        )
    for name, block, axis, length in (
        ("block_q", block_q, "T", q.shape[1]),
        ("block_kv", block_kv, "S", k.shape[1]),
    ):
        if not isinstance(block, int) or block < 1 or length % block:
            raise ValueError(
                f"{name} must be a positive int that divides {axis}, "
                f"got {name}={block!r}, {axis}={length}; pad and set kv_mask"
            )
    if kv_mask is not None and (kv_mask.dtype != jnp.bool_ or kv_mask.shape != k.shape[:2]):
        raise ValueError(
            f"kv_mask must be bool{list(k.shape[:2])}, got {kv_mask.dtype=}, {kv_mask.shape=}"
        )
    if segment_ids is not None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"segment_ids needs T == S, got T={q.shape[1]}, S={k.shape[1]}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.shape != q.shape[:2]:
            raise ValueError(
                f"segment_ids must be int{list(q.shape[:2])}, "
                f"got {segment_ids.dtype=}, {segment_ids.shape=}"
            )


def _check_mask(mask_or_schedule, q, k, block_q, block_kv):
    if mask_or_schedule is None:
        return
    num_q, num_kv = q.shape[1] // block_q, k.shape[1] // block_kv
    expected = f"[1 or {q.shape[0]}, 1 or {q.shape[2]}, {num_q}, {num_kv}]"
    if isinstance(mask_or_schedule, BlockSchedule):
        fields = vars(mask_or_schedule)
        shape = mask_or_schedule.kv_indices.shape
        leading = shape[:2]
        right = (
            {name: leaf.shape for name, leaf in fields.items()}
            == {
                "kv_counts": (*leading, num_q),
                "kv_indices": (*leading, num_q, num_kv),
                "q_counts": (*leading, num_kv),
                "q_indices": (*leading, num_kv, num_q),
            }
        ) and all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in fields.values())
        got = ", ".join(f"{name}: {leaf.dtype}{leaf.shape}" for name, leaf in fields.items())
    elif hasattr(mask_or_schedule, "dtype"):
        shape = mask_or_schedule.shape
        right = mask_or_schedule.dtype == jnp.bool_ and shape[2:] == (num_q, num_kv)
        got = f"{mask_or_schedule.dtype}{shape}"
    else:
        raise ValueError(
            "mask_or_schedule must be an array, a BlockSchedule or None, "
            f"got {type(mask_or_schedule).__name__}"
        )
    if (
        not right
        or len(shape) != 4
        or shape[0] not in (1, q.shape[0])
        or shape[1] not in (1, q.shape[2])
    ):
        raise ValueError(
            f"mask_or_schedule must be bool{expected} or the schedule of such a mask, for "
            f"{q.shape=}, {k.shape=}, {block_q=}, {block_kv=}; got {got}"
        )


def _check_options(causal, removed_keys_finite, scale, pruned_logits, return_lse):
    for name, value in (
        ("causal", causal),
        ("removed_keys_finite", removed_keys_finite),
        ("return_lse", return_lse),
    ):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be a bool, got {name}={value!r}")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale)
    ):
        raise ValueError(f"scale must be None or a finite number, got scale={scale!r}")
    if pruned_logits not in ("masked", "zero"):
        raise ValueError(f"pruned_logits must be 'masked' or 'zero', got {pruned_logits!r}")
