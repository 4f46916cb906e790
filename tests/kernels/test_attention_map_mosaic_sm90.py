"""The mean softmax map of the Hopper kernel: interpreted, or on a GPU where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, mean_attention_map
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.contract import has_select
from tests.kernels.interpreter import hopper, miss_barrier
from tests.kernels.tiers import tier


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


CASES = {
    # Six steps in each of six tiles: the slots of the ring are used again.
    "rectangle_of_tiles": Case(batch=2, heads=(3, 3), lengths=(256, 384)),
    "causal_grouped_f16": Case(
        heads=(4, 2), lengths=(256, 256), head_dim=32, causal=True, dtype="float16"
    ),
    "grouped_causal_key_mask": Case(heads=(4, 2), head_dim=32, causal=True, has_kv_mask=True),
    "causal_key_mask": Case(batch=2, lengths=(256, 256), causal=True, has_kv_mask=True),
    "more_keys_than_queries_wide_head": Case(lengths=(128, 256), causal=True, head_dim=128),
    # One head in flight: the slot is used again at once.
    "widest_head": Case(heads=(2, 1), head_dim=256, has_kv_mask=True),
    # What lies above the diagonal is exp of hundreds before it is dropped.
    "loud_causal": Case(causal=True, loudness=100.0),
    "own_lse": Case(batch=2, heads=(2, 1), causal=True, has_kv_mask=True, own_lse=True),
}


def _mean_map(q, k, **options):
    return mean_attention_map(q, k, implementation="mosaic_sm90", **options)


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


def _check(case, mean_map):
    q, k, lse = case.inputs()
    options = {"causal": case.causal, "kv_mask_BS": case.kv_mask()}
    got = jax.jit(functools.partial(mean_map, **options))(q, k, lse=lse)
    f32 = (x.astype(jnp.float32) for x in (q, k))
    exact = mean_attention_map(*f32, **options, implementation="reference")
    low = (x.astype(jnp.bfloat16) for x in (q, k))
    rough = jax.jit(functools.partial(_plain_map, causal=case.causal, kv_mask=case.kv_mask()))(*low)
    # Nothing is rounded to 16 bits after the inputs.
    bound, off = 0.05 * error(rough, exact), error(got, exact)
    assert off <= bound, f"{case}: off by {off}, bound {bound}"
    if case.causal:
        np.testing.assert_array_equal(got, jnp.tril(got))


@pytest.mark.parametrize("case", tier(CASES, fast=["grouped_causal_key_mask"]))
def test_the_mean_map(case):
    with hopper():
        _check(case, _mean_map)


@pytest.mark.ci
def test_keys_are_not_rewritten_to_find_lse_and_removed_ones_have_no_effect():
    case = dataclasses.replace(CASES["own_lse"], batch=1)
    q, k, _ = case.inputs()
    run = jax.jit(functools.partial(_mean_map, causal=case.causal, kv_mask_BS=case.kv_mask()))
    assert jnp.isnan(k).any()
    with hopper():
        poisoned, clean = run(q, k), run(q, jnp.nan_to_num(k))
        assert not has_select(run, q, k, shape=k.shape)
    np.testing.assert_array_equal(poisoned, clean)


def _without_lse(q, k, *, lse, **options):
    return _mean_map(q, k, lse=jnp.zeros_like(lse), **options)


def _of_one_head(q, k, *, lse, **options):
    return _mean_map(q[:, :, :1], k[:, :, :1], lse=lse[:, :, :1], **options)


def _with_heads_of_another_group(q, k, **options):
    return _mean_map(q, k[:, :, ::-1], **options)


def _of_the_sum(q, k, **options):
    return _mean_map(q, k, **options) * q.shape[2]


def _one_key_ahead(q, k, *, causal, **options):
    return jnp.tril(_mean_map(q, k, **options), 1 if causal else q.shape[1])


def _one_key_behind(q, k, *, causal, **options):
    return jnp.tril(_mean_map(q, k, **options), -1 if causal else q.shape[1])


def _with_removed_keys(q, k, *, kv_mask_BS, **options):
    del kv_mask_BS
    return _mean_map(q, jnp.nan_to_num(k), **options)


_BROKEN = (
    _without_lse,
    _of_one_head,
    _of_the_sum,
    _with_heads_of_another_group,
    _one_key_ahead,
    _one_key_behind,
    _with_removed_keys,
)


@pytest.mark.parametrize(
    "broken", tier({f.__name__: f for f in _BROKEN}, fast=["_with_heads_of_another_group"])
)
def test_a_broken_mean_is_noticed(broken):
    with pytest.raises(AssertionError, match="off by"), hopper():
        _check(CASES["grouped_causal_key_mask"], broken)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize("missing", [0, 2], ids=["slot_reused", "tile_read"])
def test_a_missing_barrier_is_noticed(missing, monkeypatch):
    # Barriers are awaited in the order: two of the copying warpgroup, one of a computing one.
    miss_barrier(monkeypatch, missing)
    q, k, lse = Case(batch=3, heads=(2, 2), head_dim=32).inputs()
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)), hopper():
        jax.block_until_ready(jax.jit(_mean_map)(q, k, lse=lse))


@pytest.mark.ci
def test_a_repeated_call_agrees_to_the_bit_and_lse_of_minus_infinity_adds_nothing():
    q, k, lse = Case(heads=(4, 2), head_dim=32).inputs()
    nothing = lse.at[:, 5].set(-jnp.inf)
    run = jax.jit(_mean_map)
    with hopper():
        first, second, emptied = (run(q, k, lse=x) for x in (lse, lse, nothing))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(emptied, first.at[5].set(0.0))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(dtype="float32"), "takes bfloat16 and float16, got float32"),
        (Case(head_dim=48), r"takes head dims \(32, 64, 128, 256\), got H=48"),
        (Case(lengths=(192, 128)), "lengths that are multiples of 128, got T=192, S=128"),
        (Case(lengths=(128, 100)), "lengths that are multiples of 128, got T=128, S=100"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(case, message):
    q, k, _ = dataclasses.replace(case, own_lse=True).inputs()
    lse = jnp.zeros(q.shape[:3])
    with hopper(), pytest.raises(NotImplementedError, match=message):
        _mean_map(q, k, lse=lse)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a Hopper GPU may be there")
def test_without_a_hopper_gpu_the_kernel_is_refused():
    q, k, lse = Case(own_lse=True).inputs()
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        _mean_map(q, k, lse=lse)
