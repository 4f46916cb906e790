"""What kernels compute, in float64 and straight from the equations: values, gradients, sizes.

The size of a sum is that of its terms: the sum of their magnitudes. Rounding is measured against
it, since a sum whose terms cancel keeps the digits of its terms and not its own.

Everything here is NumPy and by hand: it shares no code with what it judges.
"""

import math
from typing import NamedTuple

import numpy as np


class ActParts(NamedTuple):
    """z sigmoid(t) and its derivative sigmoid(t) + z t' sigmoid(t) sigmoid(-t).

    Attributes:
      value: f64[...].
      slope: f64[...].
      slope_size: f64[...], sum of the magnitudes of the slope's two terms.
      exponent: f64[...], t, no further from 0 than where every f32 result is 0 or 1.
    """

    value: np.ndarray
    slope: np.ndarray
    slope_size: np.ndarray
    exponent: np.ndarray


def act_parts(z, name):
    """Compute "gelu" (tanh form, t = 2 sqrt(2/pi) (z + 0.044715 z^3)) or "silu" (t = z)."""
    z = np.asarray(z, np.float64)
    linear = 2 * math.sqrt(2 / math.pi) if name == "gelu" else 1.0
    cubic = 0.044715 * linear if name == "gelu" else 0.0
    near = np.clip(z, -700 if name == "silu" else -20, 700 if name == "silu" else 20)
    t = near * (linear + cubic * near**2)
    s, rest = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(t))
    inner = near * (linear + 3 * cubic * near**2) * s * rest
    return ActParts(z * s, s + inner, s + np.abs(inner), t)


ULP = 2.0**-24
"""What one rounding to f32 may change, as a share of the result."""

# Where an f32 exponential has left the normal numbers it may be 0; no factor makes more of it.
_UNDERFLOW = 1e-30


def activated(z, name, d_out=1.0):
    """Compute act(z) and dz = act'(z) d_out of an activation of `nm_matmul`, by name."""
    if name is None:
        return z, d_out
    if name == "gelu":
        act = act_parts(z, name)
        return act.value, d_out * act.slope
    value, gate = np.split(z, 2, axis=-1)
    act = act_parts(gate, "silu" if name == "swiglu" else "gelu")
    of_value, of_gate = d_out * act.value, d_out * value * act.slope
    return value * act.value, np.concatenate([of_value, of_gate], axis=-1)


class Judged(NamedTuple):
    """A right value, and how far an f32 computation may be from it.

    Attributes:
      value: f64[...].
      bound: f64[...].
    """

    value: np.ndarray
    bound: np.ndarray

    def check(self, got, where):
        """Assert that `got` is within the bound; infinities must be the same."""
        got = np.asarray(got, np.float64)
        assert got.shape == self.value.shape, where
        finite = np.isfinite(self.value)
        assert np.array_equal(got[~finite], self.value[~finite]), f"{where}: infinities"
        off = np.abs(got[finite] - self.value[finite])
        excess = np.where(np.isfinite(off), off - self.bound[finite], np.inf)
        worst = excess.argmax() if excess.size else None
        assert worst is None or excess[worst] <= 0, (
            f"{where}: got {got[finite][worst]}, right is {self.value[finite][worst]} "
            f"within {self.bound[finite][worst]}"
        )


def _judged(value, size):
    return Judged(value, size + _UNDERFLOW)


def attention_softmax(q, k, attended, num_zeros, scale):
    """Return probabilities f64[B, N, T, S], lse f64[B, N, T] and roundings u f64[B, N, T].

    u is the share by which a probability may be wrong, and by which lse may be off. An f32 sum of
    S terms takes S roundings. Exponents are differences of numbers as large as the logits and lse,
    each rounded once or twice: an error of |exponent| 2^-24 there is one of that share in exp.
    """
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = scale * np.einsum("btnh,bsnh->bnts", q, k)
    attended = np.broadcast_to(attended, s.shape)
    num_zeros = np.broadcast_to(num_zeros, s.shape[:3])
    top = np.where(attended, s, -np.inf).max(-1)
    top = np.where(num_zeros > 0, np.maximum(top, 0), top)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(np.where(attended, s - top[..., None], -np.inf))
    total = e.sum(-1) + np.where(num_zeros > 0, num_zeros * np.exp(-np.maximum(top, 0)), 0)
    some = total > 0
    lse = np.where(some, top + np.log(np.where(some, total, 1)), -np.inf)
    largest = np.where(attended, np.abs(s), 0).max(-1)
    largest = np.maximum(largest, np.where(some, np.abs(lse), 0))
    u = (s.shape[-1] + q.shape[-1] + 8 + 2 * largest) * ULP
    return e / np.where(some, total, 1)[..., None], lse, u


def attention(q, k, v, kept, d_out, d_lse, *, scale, causal, zero):
    """Judge out, lse, dq, dk, dv of attention to the kept positions.

    out = P v,  ds_i = P_i (dP_i - sum_j P_j dP_j + dlse),  dP = dout v^T,  dq = scale ds k

    Args:
      q: [B, T, N, H]; logits must be exact in f32.
      k: [B, S, K, H].
      v: [B, S, K, H].
      kept: bool[1 or B, 1 or N, T, S].
      d_out: [B, T, N, H], cotangent.
      d_lse: [B, T, N], cotangent; without effect where lse is -inf.
      scale: float.
      causal: bool.
      zero: bool, whether pruned positions count as logits of 0.

    Returns:
      dict of name -> Judged.
    """
    visible = np.tri(*kept.shape[-2:], dtype=bool) if causal else np.ones(kept.shape[-2:], bool)
    num_zeros = (visible & ~kept).sum(-1) if zero else np.zeros(kept.shape[:3], int)
    p, lse, u = attention_softmax(q, k, kept & visible, num_zeros, scale)
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    d_lse = np.where(np.isfinite(lse), d_lse.swapaxes(1, 2), 0)

    def judge(equation, left, right, factor=1.0, share=u[..., None]):
        value = factor * np.einsum(equation, left[0], right)
        return value, factor * np.einsum(equation, share * left[1], np.abs(right))

    def sum_groups(x):
        return x.reshape(*x.shape[:2], kv_heads, group, -1).sum(3)

    d_p, d_p_size = (np.einsum("btnh,bsnh->bnts", f(d_out), f(v)) for f in (np.asarray, np.abs))
    spread = (p * d_p).sum(-1, keepdims=True)
    spread_size = (p * d_p_size).sum(-1, keepdims=True)
    ds = p * (d_p - spread + d_lse[..., None])
    ds_size = p * (d_p_size + spread_size + np.abs(d_lse[..., None]))
    # Wrong in p, in what is subtracted, and in the sums that come after.
    of_ds = {"left": (ds, ds_size), "factor": scale, "share": 3 * u[..., None]}
    results = {
        "out": judge("bnts,bsnh->btnh", (p, p), v),
        "lse": (lse.swapaxes(1, 2), u.swapaxes(1, 2)),
        "dq": judge("bnts,bsnh->btnh", right=k, **of_ds),
        "dk": [sum_groups(x) for x in judge("bnts,btnh->bsnh", right=q, **of_ds)],
        "dv": [
            sum_groups(x) for x in judge("bnts,btnh->bsnh", (p, p), d_out, share=2 * u[..., None])
        ],
    }
    return {name: _judged(*result) for name, result in results.items()}


def mean_map(q, k, attended):
    """Judge the softmax map averaged over batch and heads; rows that see nothing add 0."""
    p, _, u = attention_softmax(q, k, attended, 0, q.shape[3] ** -0.5)
    return _judged(p.mean((0, 1)), (3 * u[..., None] * p).mean((0, 1)))


def _product(a, b, share_a=0.0):
    """Return a b and its bound: that of a's own error, and a rounding for every term."""
    value = a @ b
    return value, (np.abs(a) * share_a) @ np.abs(b) + (a.shape[1] + 4) * ULP * (
        np.abs(a) @ np.abs(b)
    )


def matmul(x, w, kept, wanted, bias, dy):
    """Judge y = x (w * kept) + bias, dx = dy (w * kept)^T, dw = (x^T dy) * wanted, dbias."""
    x, w, bias, dy = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
    w = np.where(kept, w, 0)
    y, y_bound = _product(x, w)
    dw, dw_bound = _product(x.T, dy)
    results = {
        "y": (y + bias, y_bound + np.abs(bias) * ULP * 2 + np.abs(y) * ULP),
        "dx": _product(dy, w.T),
        "dw": (np.where(wanted, dw, 0), np.where(wanted, dw_bound, 0)),
        "dbias": (dy.sum(0), (len(dy) + 2) * ULP * np.abs(dy).sum(0)),
    }
    return {name: Judged(*result) for name, result in results.items()}


def activated_matmul(x, w, kept, bias, dy, activation):
    """Judge y = act(x (w * kept) + bias) with its gradients, straight through to the whole w.

    The pre-activation must be exact in f32: an error in it is one of the inputs and not of the
    activation, whose tails it would swamp.
    """
    x, w, bias, dy = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
    w = np.where(kept, w, 0)
    z = x @ w + bias
    name = "silu" if activation == "swiglu" else "gelu"
    value, gate = (1.0, z) if activation == "gelu" else np.split(z, 2, axis=1)
    act = act_parts(gate, name)
    # Five roundings of the exponent, and an exponential with a few operations around it.
    share = (16 + 6 * np.abs(act.exponent)) * ULP
    y = value * act.value
    dz, dz_size = dy * value * act.slope, np.abs(dy * value) * act.slope_size
    dz_bound = dz_size * share
    if activation != "gelu":
        of_value = dy * act.value
        dz, dz_size = np.hstack([of_value, dz]), np.hstack([np.abs(of_value), dz_size])
        dz_bound = np.hstack([np.abs(of_value) * share, dz_bound])

    def judge(left, right, of_left):
        """Judge a product of dz, whose error adds to that of the product's own roundings."""
        bound = of_left(dz_bound) + (len(z) + z.shape[1]) * ULP * of_left(dz_size)
        return _judged(left @ right, bound)

    return {
        "y": _judged(y, np.abs(y) * share),
        "dx": judge(dz, w.T, lambda size: size @ np.abs(w).T),
        "dw": judge(x.T, dz, lambda size: np.abs(x).T @ size),
        "dbias": judge(np.ones((1, len(z))), dz, lambda size: size.sum(0, keepdims=True)),
    }
