"""Inputs, masks and the low-precision baseline that kernels are measured against."""

import jax
import jax.numpy as jnp
import numpy as np


def make_normal(shapes, dtype=jnp.float32, *, seed=0):
    """Return one standard normal array per shape."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def make_masks(shape, *, seed=0):
    """Return name -> block mask, one for each way in which a mask can be difficult."""
    rng = np.random.default_rng(seed)
    num_q, num_kv = shape[-2:]
    masks = {name: rng.random(shape) < 0.4 for name in ("random", "empty_rows", "empty_columns")}
    masks["empty_rows"][..., [0, num_q - 1], :] = False
    masks["empty_columns"][..., :, [0, num_kv - 1]] = False
    masks["one_block"] = np.zeros(shape, bool)
    masks["one_block"][..., num_q // 2, num_kv // 3] = True
    masks["none"] = np.zeros(shape, bool)
    masks["full"] = np.ones(shape, bool)
    masks["global_row_and_column"] = np.broadcast_to(
        np.eye(num_q, num_kv, dtype=bool), shape
    ).copy()
    masks["global_row_and_column"][..., min(1, num_q - 1), :] = True
    masks["global_row_and_column"][..., :, min(2, num_kv - 1)] = True
    return {name: jnp.asarray(mask) for name, mask in masks.items()}


def plain_attention(q, k, v, mask, *, block_q, block_kv, causal, kv_mask, segment_ids, scale, zero):
    """Attend in the dtype of the inputs, as a user would write it without care for rounding."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    kept = jnp.repeat(jnp.repeat(mask, block_q, axis=2), block_kv, axis=3)
    visible = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None] if causal else kept | True
    if segment_ids is not None:
        visible &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    attended = kept & visible
    if kv_mask is not None:
        attended &= kv_mask[:, None, None, :]
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(scale, q.dtype)
    e = jnp.where(attended, jnp.exp(s), 0)
    total = e.sum(axis=-1, keepdims=True)
    if zero:
        total += (visible & ~kept).sum(axis=-1, keepdims=True).astype(q.dtype)
    p = e / jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", p, v), lse[..., 0].swapaxes(1, 2)


def softmax_maps(q_BTNH, k_BSKH, visible_BTS):
    """Return f64[B, N, T, S] straight from the definition; rows that see nothing are zero."""
    k_BSNH = np.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, dtype=np.float64)
    weights = np.exp(scores / q_BTNH.shape[3] ** 0.5) * visible_BTS[:, None]
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total, total, 1)


def error(actual, expected):
    """Largest absolute difference; infinities must stand in the same places."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(actual), finite):
        return np.inf
    if not np.array_equal(actual[~finite], expected[~finite]):
        return np.inf
    return float(np.abs(actual[finite] - expected[finite]).max(initial=0.0))


def value_and_gradients(attention, inputs, cotangents):
    """Return out, lse, dq, dk, dv of `attention(q, k, v)` under given cotangents.

    The lse of rows that count nothing is -inf; its cotangent is dropped.
    """

    def finite(q, k, v):
        out, lse = attention(q, k, v)
        return (out, jnp.where(lse > -jnp.inf, lse, 0)), lse

    (out, _), vjp, lse = jax.vjp(finite, *inputs, has_aux=True)
    d_out, d_lse = cotangents
    return out, lse, *vjp((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))
