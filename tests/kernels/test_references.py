"""The oracle against numbers worked by hand and against JAX's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.doctor.oracles import error, make_normal

_attend = functools.partial(
    block_sparse_attention, return_lse=True, implementation="reference", scale=1.0
)


def _column(*values):
    return jnp.array(values, jnp.float32)[None, :, None, None]


# One query block of two, two key blocks of one; logits of query t are q_t * (0, log 3).
_Q, _K, _V = _column(1.0, 0.0), _column(0.0, np.log(3.0)), _column(4.0, 8.0)


@pytest.mark.parametrize(
    ("mask", "options", "out", "lse"),
    [
        ([1, 1], {}, [7.0, 6.0], np.log([4.0, 2.0])),
        ([1, 1], {"pruned_logits": "zero"}, [7.0, 6.0], np.log([4.0, 2.0])),
        ([0, 1], {}, [8.0, 8.0], np.log([3.0, 1.0])),
        ([0, 1], {"pruned_logits": "zero"}, [6.0, 4.0], np.log([4.0, 2.0])),
        ([0, 0], {}, [0.0, 0.0], [-np.inf, -np.inf]),
        ([0, 0], {"pruned_logits": "zero"}, [0.0, 0.0], np.log([2.0, 2.0])),
        ([1, 1], {"causal": True}, [4.0, 6.0], np.log([1.0, 2.0])),
        ([0, 1], {"causal": True}, [0.0, 8.0], [-np.inf, 0.0]),
        ([0, 1], {"causal": True, "pruned_logits": "zero"}, [0.0, 4.0], np.log([1.0, 2.0])),
        # A removed key of a kept block vanishes; one of a pruned block still counts 1.
        ([1, 1], {"kv_mask": [1, 0], "pruned_logits": "zero"}, [4.0, 4.0], [0.0, 0.0]),
        ([0, 1], {"kv_mask": [0, 1], "pruned_logits": "zero"}, [6.0, 4.0], np.log([4.0, 2.0])),
        ([1, 1], {"segment_ids": [5, 3]}, [4.0, 8.0], [0.0, 0.0]),
        ([0, 1], {"segment_ids": [5, 3], "pruned_logits": "zero"}, [0.0, 8.0], [0.0, 0.0]),
    ],
)
def test_hand_worked_values(mask, options, out, lse):
    options = dict(options)
    if "kv_mask" in options:
        options["kv_mask"] = jnp.array([options["kv_mask"]], bool)
    if "segment_ids" in options:
        options["segment_ids"] = jnp.array([options["segment_ids"]])
    mask = jnp.array(mask, bool)[None, None, None]
    got_out, got_lse = _attend(_Q, _K, _V, mask, block_q=2, block_kv=1, **options)
    np.testing.assert_allclose(got_out[0, :, 0, 0], out, rtol=1e-6)
    np.testing.assert_allclose(got_lse[0, :, 0], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("causal", [False, True])
def test_full_mask_is_jax_attention_with_its_gradient(causal):
    q, k, v = make_normal(((2, 32, 4, 8), (2, 32, 2, 8), (2, 32, 2, 8)))
    ours = functools.partial(_attend, block_q=16, block_kv=16, causal=causal)
    mask = jnp.ones((1, 1, 2, 2), bool)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=causal)

    @jax.jit
    def compare(q, k, v):
        out, vjp = jax.vjp(lambda *x: ours(*x, mask)[0], q, k, v)
        expected, expected_vjp = jax.vjp(theirs, q, k, v)
        return (out, *vjp(jnp.cos(q))), (expected, *expected_vjp(jnp.cos(q)))

    for actual, expected in zip(*compare(q, k, v), strict=True):
        assert error(actual, expected) < 1e-5


@pytest.mark.ci
def test_zero_rule_keeps_the_share_of_pruned_positions():
    q, k, _ = make_normal(((1, 64, 1, 8),) * 3)
    mask = jnp.asarray(np.random.default_rng(0).random((1, 1, 4, 4)) < 0.5)
    attend = functools.partial(_attend, block_q=16, block_kv=16, pruned_logits="zero")
    out, lse = jax.jit(attend)(q, k, jnp.ones_like(k), mask)
    num_pruned = 16 * (~mask[0, 0]).sum(axis=-1).repeat(16)
    np.testing.assert_allclose(
        out[0, :, 0, 0], 1 - num_pruned / jnp.exp(lse[0, :, 0]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.ci
def test_rows_that_keep_nothing_have_no_gradient():
    q, k, v = make_normal(((1, 32, 1, 8),) * 3)
    mask = jnp.array([[True, True], [False, False]])[None, None]
    for rule in ("masked", "zero"):

        def loss(q, k, v, rule=rule):
            out, _ = _attend(q, k, v, mask, block_q=16, block_kv=16, pruned_logits=rule)
            return (out**2).sum() + out.sum()

        dq, dk, dv = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
        assert not dq[:, 16:].any() and bool(dq[:, :16].any())
        assert all(bool(jnp.isfinite(x).all()) for x in (dq, dk, dv))
