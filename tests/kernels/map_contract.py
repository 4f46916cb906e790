"""The contract of `mean_attention_map`: what every kernel must compute, and what it must not miss.

Broken kernels of `BROKEN` have to be noticed by `check`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_attention, mean_attention_map
from pallas_kernels.doctor.oracles import error, make_normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `own_lse` leaves the computation of lse to the op."""

    batch: int = 1
    heads: tuple[int, int] = (1, 1)
    lengths: tuple[int, int] = (128, 128)
    head_dim: int = 64
    dtype: str = "bfloat16"
    causal: bool = False
    has_kv_mask: bool = False
    own_lse: bool = False
    loudness: float = 1.0

    def inputs(self):
        """Return q, k and lse."""
        (N, K), (T, S) = self.heads, self.lengths
        shapes = (self.batch, T, N, self.head_dim), (self.batch, S, K, self.head_dim)
        q, k = make_normal(shapes, self.dtype)
        q = (q * self.loudness).astype(self.dtype)
        if self.has_kv_mask:
            # What a removed key holds has no effect.
            k = jnp.where(self.kv_mask()[..., None, None], k, jnp.nan)
        if self.own_lse:
            return q, k, None
        f32 = (x.astype(jnp.float32) for x in (q, k, k))
        _, lse = block_sparse_attention(
            *f32, None, block_q=T, block_kv=S, causal=self.causal, kv_mask=self.kv_mask(),
            return_lse=True, implementation="reference",
        )  # fmt: skip
        return q, k, lse

    def kv_mask(self):
        """Return a mask in which, if causal, the first queries of the last example see nothing."""
        if not self.has_kv_mask:
            return None
        first = jnp.arange(self.batch)[:, None] * 5
        position = jnp.arange(self.lengths[1])
        return (position >= first) & (position % 7 != 3)


def make_map(implementation):
    """Return the op with a named backend."""
    return functools.partial(mean_attention_map, implementation=implementation)


def _plain_map(q, k, *, causal, kv_mask):
    """Average maps in the dtype of the inputs, as a user would write it."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
    visible = jnp.tri(*s.shape[2:], dtype=bool) if causal else jnp.ones(s.shape[2:], bool)
    visible = visible[None, None]
    if kv_mask is not None:
        visible &= kv_mask[:, None, None]
    p = jnp.where(visible, jax.nn.softmax(jnp.where(visible, s, -1e4), axis=-1), 0)
    return p.mean((0, 1))


def check(case, mean_map):
    """Compare a map with the reference in f32.

    Args:
      case: Case.
      mean_map: (q, k, lse=, causal=, kv_mask_BS=) -> f32[T, S].
    """
    q, k, lse = case.inputs()
    options = {"causal": case.causal, "kv_mask_BS": case.kv_mask()}
    got = jax.jit(functools.partial(mean_map, **options))(q, k, lse=lse)
    f32 = (x.astype(jnp.float32) for x in (q, k))
    exact = mean_attention_map(*f32, **options, implementation="reference")
    low = (x.astype(jnp.bfloat16) for x in (q, k))
    plain = functools.partial(_plain_map, causal=case.causal, kv_mask=case.kv_mask())
    # Nothing is rounded to 16 bits after the inputs.
    bound, off = 0.05 * error(jax.jit(plain)(*low), exact), error(got, exact)
    assert off <= bound, f"{case}: off by {off}, bound {bound}"
    if case.causal:
        np.testing.assert_array_equal(got, jnp.tril(got))


def _without_lse(mean_map, q, k, *, lse, **options):
    return mean_map(q, k, lse=jnp.zeros_like(lse), **options)


def _of_one_head(mean_map, q, k, *, lse, **options):
    return mean_map(q[:, :, :1], k[:, :, :1], lse=lse[:, :, :1], **options)


def _with_heads_of_another_group(mean_map, q, k, **options):
    return mean_map(q, k[:, :, ::-1], **options)


def _of_the_sum(mean_map, q, k, **options):
    return mean_map(q, k, **options) * q.shape[2]


def _one_key_ahead(mean_map, q, k, *, causal, **options):
    return jnp.tril(mean_map(q, k, **options), 1 if causal else q.shape[1])


def _one_key_behind(mean_map, q, k, *, causal, **options):
    return jnp.tril(mean_map(q, k, **options), -1 if causal else q.shape[1])


def _with_removed_keys(mean_map, q, k, *, kv_mask_BS, **options):
    del kv_mask_BS
    return mean_map(q, jnp.nan_to_num(k), **options)


BROKEN = {
    function.__name__: function
    for function in (
        _without_lse,
        _of_one_head,
        _of_the_sum,
        _with_heads_of_another_group,
        _one_key_ahead,
        _one_key_behind,
        _with_removed_keys,
    )
}
"""Name -> (right map, q, k, lse=, causal=, kv_mask_BS=) -> a map that is wrong."""
