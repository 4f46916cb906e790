"""Inputs, masks and low-precision baselines that kernels are measured against.

A baseline is what a user would write in the dtype of the inputs, without care for rounding: how
far it is from the reference in f32 says how far a kernel may be.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.nm_matmul.mvue import prune_tokens


def make_normal(
    shapes: Sequence[tuple[int, ...]], dtype: DTypeLike = jnp.float32, *, seed: int = 0
) -> tuple[jax.Array, ...]:
    """Draw one standard normal array per shape, on the host.

    Args:
      shapes: of the arrays.
      dtype: of all of them.
      seed: equal seeds give equal arrays.

    Returns:
      arrays of the given shapes and dtype.
    """
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def make_masks(shape: tuple[int, ...], *, seed: int = 0) -> dict[str, jax.Array]:
    """Draw block masks, one for each way in which a mask can be difficult.

    Args:
      shape: [..., I, J].
      seed: equal seeds give equal masks.

    Returns:
      name -> bool[..., I, J].
    """
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


def make_nm_masks(
    shape: tuple[int, ...], pattern: tuple[int, int], *, transposable: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draw masks that keep at most n of m, one for each way in which a mask can be difficult.

    "whole" keeps exactly n in every group, "underfull" any smaller number in some, "empty" drops
    whole columns and whole rows of groups.

    Args:
      shape: (K, N), K a multiple of m, and N too if transposable.
      pattern: (n, m).
      transposable: groups along N keep at most n as well.
      seed: equal seeds give equal masks.

    Returns:
      name -> bool[K, N].
    """
    rng = np.random.default_rng(seed)
    most, group = pattern
    if transposable:
        # A circulant with n diagonals keeps n of m both ways, its rows and columns shuffled too.
        base = (np.arange(group)[:, None] - np.arange(group)) % group < most
        grid = shape[0] // group, shape[1] // group
        rows, columns = (rng.random((*grid, group)).argsort(axis=-1) for _ in range(2))
        tiles = base[rows[..., :, None], columns[..., None, :]]
        whole = tiles.swapaxes(1, 2).reshape(shape)
    else:
        rank = rng.random((shape[0] // group, group, shape[1])).argsort(axis=1).argsort(axis=1)
        whole = (rank < most).reshape(shape)
    underfull = whole & (rng.random(shape) < 0.6)
    empty = whole.copy()
    empty[:, : shape[1] // 3] = False
    empty[-group:] = False
    return {"whole": whole, "underfull": underfull, "empty": empty}


def plain_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    block_q: int,
    block_kv: int,
    causal: bool,
    kv_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
    zero: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the kept blocks in the dtype of the inputs.

    Args:
      q: float[B, T, N, H].
      k: float[B, S, K, H].
      v: float[B, S, K, H].
      mask: bool[1 or B, 1 or N, I, J].
      block_q: positions.
      block_kv: positions.
      causal: hide later keys.
      kv_mask: bool[B, S] or None.
      segment_ids: int[B, T] or None.
      scale: of the logits.
      zero: pruned visible positions count as logits of 0.

    Returns:
      out [B, T, N, H] and lse [B, T, N].
    """
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


def plain_attention_map(
    q: jax.Array, k: jax.Array, *, causal: bool, kv_mask: jax.Array | None
) -> jax.Array:
    """Average the softmax maps of all heads in the dtype of the inputs.

    Args:
      q: float[B, T, N, H].
      k: float[B, S, K, H].
      causal: hide later keys.
      kv_mask: bool[B, S] or None.

    Returns:
      [T, S].
    """
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
    visible = jnp.tri(*s.shape[2:], dtype=bool) if causal else jnp.ones(s.shape[2:], bool)
    visible = visible[None, None]
    if kv_mask is not None:
        visible &= kv_mask[:, None, None, :]
    e = jnp.where(visible, jnp.exp(s), 0)
    total = e.sum(axis=-1, keepdims=True)
    return (e / jnp.where(total > 0, total, 1)).mean((0, 1))


def plain_nm_matmul(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    dy: jax.Array,
    key: jax.Array | None,
    *,
    activation: str | None,
    grad_pruning: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Compute y, dx, dw and dbias in the dtype of x.

    Args:
      x: float[..., K].
      w: float[K, N].
      mask: bool[K, N].
      bias: float[N] or None.
      dy: float[..., N], or N / 2 of a gated activation.
      key: of gradient pruning, or None.
      activation: as of `nm_matmul`.
      grad_pruning: as of `nm_matmul`.

    Returns:
      y like dy, dx like x, dw like w, and dbias like the bias, or None.
    """
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    kept = w * mask
    z = x2 @ kept
    if bias is not None:
        z = z + bias

    def act(z):
        if activation in (None, "gelu"):
            return z if activation is None else jax.nn.gelu(z)
        value, gate = jnp.split(z, 2, axis=-1)
        return value * (jax.nn.gelu if activation == "geglu" else jax.nn.silu)(gate)

    y, back = jax.vjp(act, z)
    (dz,) = back(dy2)
    pruned = prune_tokens(dz, key, grad_pruning)
    d_bias = None if bias is None else dz.sum(axis=0)
    return y.reshape(dy.shape), (dz @ kept.T).reshape(x.shape), x2.T @ pruned, d_bias


def plain_block_matmul(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array,
    grad_mask: jax.Array,
    bias: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compute y, dx, dw and dbias by dense products in the dtype of x.

    Args:
      x: float[..., K].
      w: float[K, N].
      mask: bool[I, J], blocks kept.
      grad_mask: bool[I, J], blocks whose gradient is wanted.
      bias: float[N].
      dy: float[..., N].

    Returns:
      y like dy, dx like x, dw like w, dbias like the bias.
    """
    rows, columns = w.shape[0] // mask.shape[0], w.shape[1] // mask.shape[1]

    def expand(mask):
        return mask.repeat(rows, 0).repeat(columns, 1)

    kept = jnp.where(expand(mask), w, 0)
    flat_x, flat_dy = x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1])
    dw = jnp.where(expand(grad_mask), flat_x.T @ flat_dy, 0)
    return x @ kept + bias, dy @ kept.T, dw, flat_dy.sum(0)


def error(actual: Any, expected: Any) -> float:
    """Return the largest absolute difference; infinities must stand in the same places.

    Args:
      actual: array.
      expected: array of the same shape.

    Returns:
      float, infinite if one is not finite where the other is, or is another infinity.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(actual), finite):
        return np.inf
    if not np.array_equal(actual[~finite], expected[~finite]):
        return np.inf
    return float(np.abs(actual[finite] - expected[finite]).max(initial=0.0))


def value_and_gradients(
    attention: Callable[..., tuple[jax.Array, jax.Array]],
    inputs: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Return out, lse, dq, dk, dv of an attention under given cotangents.

    The lse of rows that count nothing is -inf; its cotangent is dropped.

    Args:
      attention: (q, k, v) -> (out, lse).
      inputs: q, k, v.
      cotangents: of out and lse.

    Returns:
      out [B, T, N, H], lse [B, T, N], and dq, dk, dv like q, k, v.
    """

    def finite(q, k, v):
        out, lse = attention(q, k, v)
        return (out, jnp.where(lse > -jnp.inf, lse, 0)), lse

    (out, _), vjp, lse = jax.vjp(finite, *inputs, has_aux=True)
    d_out, d_lse = cotangents
    return out, lse, *vjp((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))
