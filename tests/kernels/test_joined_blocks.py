"""Attention in joined blocks, the form for a CPU where a mask keeps most of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, make_block_schedule
from pallas_kernels.block_sparse_attention.block_schedule import drop_blocks_above_diagonal
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_attention.xla import attention, joining
from pallas_kernels.choosing import choose_cheaper
from pallas_kernels.doctor.oracles import make_normal
from tests.kernels import contract
from tests.tiers import tier

_attend = contract.call_implementation("xla")


@pytest.fixture
def joined_always(monkeypatch):
    """Join two by three blocks of 16, and walk the tiles for every mask."""
    monkeypatch.setattr(joining, "_MOST_QUERIES", 32)
    monkeypatch.setattr(joining, "_MOST_KEYS", 48)
    monkeypatch.setattr(joining, "_FEWEST", 1)
    monkeypatch.setattr(attention, "choose_cheaper", lambda _, first, second, *args: second(*args))


@pytest.mark.usefixtures("joined_always")
@pytest.mark.parametrize(
    "case",
    tier(contract.CASES, fast=["causal_zero_heads"], slow=["bf16_causal", "f16_key_mask"]),
)
def test_contract(case):
    contract.check_case(case, _attend, optimise=False)


def _with_whole_tiles(joined):
    return joined._replace(kept_YJqc=jnp.ones_like(joined.kept_YJqc))


def _with_swapped_tiles(joined):
    return joined._replace(kept_YJqc=joined.kept_YJqc[:, ::-1])


@pytest.mark.ci
@pytest.mark.usefixtures("joined_always")
@pytest.mark.parametrize("broken", [_with_whole_tiles, _with_swapped_tiles])
def test_the_contract_rejects_broken_tiles(monkeypatch, broken):
    join = attention.join_blocks
    monkeypatch.setattr(attention, "join_blocks", lambda *args: broken(join(*args)))
    with pytest.raises(AssertionError, match="off by"):
        contract.check_case(contract.CASES["plain"], _attend, optimise=False)


def _join(mask, *, block=64, causal=False):
    """Join blocks of a mask; None where tiles would be too small."""
    length = block * mask.shape[0]
    facts = AttentionFacts(
        batch=1, num_queries=length, num_keys=length, num_heads=1, num_kv_heads=1, head_dim=8,
        dtype="float32", mask_shape=(1, 1), block_q=block, block_kv=block, causal=causal,
        has_kv_mask=False, has_segments=False, scale=1.0, pruned_logits="masked", return_lse=False,
    )  # fmt: skip
    schedule = make_block_schedule(jnp.asarray(mask)[None, None])
    if causal:
        schedule = drop_blocks_above_diagonal(schedule, block_q=block, block_kv=block)
    return joining.join_blocks(schedule, facts)


def _find_masks(blocks):
    rows, columns = np.indices((blocks, blocks))
    return {
        "none": np.zeros((blocks, blocks), bool),
        "a third": np.random.default_rng(0).random((blocks, blocks)) < 0.3,
        "window": np.abs(rows - columns) <= 1,
        "all": np.ones((blocks, blocks), bool),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_only_masks_that_keep_most_are_walked_in_tiles(block, causal):
    for name, mask in _find_masks(4096 // block).items():
        joined = _join(mask, block=block, causal=causal)
        by_blocks, by_tiles = joined.costs
        assert bool(by_tiles < by_blocks) == (name == "all"), name


def test_tiles_divide_the_sequence_and_are_worth_it():
    joined = _join(np.ones((48, 48), bool))
    assert (joined.facts.block_q, joined.facts.block_kv) == (512, 1024)
    # 25 blocks have no other divisor up to 8 than 5, and up to 16.
    odd = _join(np.ones((25, 25), bool))
    assert (odd.facts.block_q, odd.facts.block_kv) == (320, 320)
    assert _join(np.ones((3, 3), bool)) is None, "192 positions"
    assert _join(np.ones((23, 23), bool)) is None, "a prime number of blocks"
    assert _join(np.ones((4, 4), bool), block=1024) is None, "already as large"


def test_one_program_serves_both_forms():
    q, k, v, d_out = make_normal(((2, 1024, 2, 8),) * 4)

    def run(mask, implementation):
        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, mask, block_q=64, block_kv=64, causal=True, implementation=implementation
            )

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(d_out)

    compiled = jax.jit(lambda mask: run(mask, "xla"))
    for name, mask in _find_masks(16).items():
        expected = run(jnp.asarray(mask)[None, None], "reference")
        for got, want in zip(compiled(jnp.asarray(mask)[None, None]), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


def test_a_batch_makes_one_choice():
    def run(cost, x):
        return choose_cheaper((cost, 2.0), lambda x: x, lambda x: -x, x)

    ones = jnp.ones(2)
    batched = jax.jit(jax.vmap(run))
    # The first costs 1 and 2.5, less than twice 2.
    assert batched(jnp.array([1.0, 2.5]), ones).tolist() == [1, 1]
    assert batched(jnp.array([1.0, 3.5]), ones).tolist() == [-1, -1]
    assert " select_n" not in str(jax.make_jaxpr(jax.vmap(run))(ones, ones))
