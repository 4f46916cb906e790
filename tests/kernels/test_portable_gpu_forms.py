"""The portable backends in the form for a GPU: the contracts, run on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, block_sparse_matmul, make_block_schedule
from pallas_kernels.block_lists import Tile
from pallas_kernels.doctor.oracles import error, make_masks, make_normal
from tests.kernels import contract
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.kernels.portable_forms import in_cpu_form, in_gpu_form
from tests.tiers import tier

_attend = in_gpu_form(contract.call_implementation("xla"))
_multiply = in_gpu_form(call_block_matmul("xla"))

# Lists of 17 columns are cut into tiles of 1, 3, 4 and 9, and 9 rows into 1, 1, 2 and 5.
_MATMUL_CASES = {
    "plain": BlockMatmulCase(),
    "many lists": BlockMatmulCase(grid=(9, 17), block=(8, 4)),
    "one axis": BlockMatmulCase(leading=(24,), block=(1, 3)),
    "wide blocks": BlockMatmulCase(dtype="bfloat16", grid=(5, 3), block=(64, 128)),
    "bfloat16": BlockMatmulCase(dtype="bfloat16", block=(16, 8)),
    "float16": BlockMatmulCase(dtype="float16", grid=(5, 3)),
}


@pytest.mark.parametrize(
    "case",
    tier(
        contract.CASES,
        fast=["bf16_zero"],
        slow={*contract.CASES} - {"bf16_zero", "causal_zero_heads", "causal_key_mask_long_keys"},
    ),
)
def test_attention(case):
    contract.check_case(case, _attend, optimise=False)


@pytest.mark.parametrize(
    "case", tier(_MATMUL_CASES, fast=["bfloat16"], slow=["float16", "plain", "one axis"])
)
def test_matmul(case):
    check_block_matmul(case, _multiply)


def _everything_listed(tile, step, block):
    visited, listed = _WALK(tile, step, block)
    return visited, jnp.ones_like(listed)


def _last_position_forgotten(tile, step, block):
    # Lists lose the last step that the longest list of their tile takes.
    visited, listed = _WALK(tile, step, block)
    return visited, listed & (step + 1 < tile.num_steps)


_WALK = Tile.walk
_BROKEN_WALKS = {f.__name__: f for f in (_everything_listed, _last_position_forgotten)}


@pytest.mark.ci
@pytest.mark.parametrize("walk", _BROKEN_WALKS.values(), ids=_BROKEN_WALKS.keys())
def test_the_contracts_reject_broken_walks(monkeypatch, walk):
    monkeypatch.setattr(Tile, "walk", walk)
    with pytest.raises(AssertionError, match="off by"):
        contract.check_case(contract.CASES["plain"], _attend, optimise=False)
    with pytest.raises(AssertionError, match="of mask"):
        check_block_matmul(_MATMUL_CASES["plain"], _multiply)


@pytest.mark.ci
@pytest.mark.parametrize(
    "broken", [contract.with_untransposed_lists, contract.with_a_block_dropped]
)
def test_the_contract_rejects_broken_schedules(broken):
    with pytest.raises(AssertionError, match="off by"):
        contract.check_case(contract.CASES["plain"], broken(_attend), optimise=False)


def test_the_form_follows_the_platform():
    q, x, w = make_normal(((1, 64, 1, 8), (8, 64), (64, 64)))
    mask = jnp.ones((4, 4), bool)

    def attend(q):
        return block_sparse_attention(
            q, q, q, mask[None, None], block_q=16, block_kv=16, implementation="xla"
        ).sum()

    def multiply(x, w):
        return block_sparse_matmul(x, w, mask, implementation="xla").sum()

    def count_loops(function, *args):
        gradient = jax.value_and_grad(function, argnums=tuple(range(len(args))))
        return str(jax.make_jaxpr(gradient)(*args)).count(" while[")

    # One loop inside one over tiles, forward and backward; one over all blocks for each product.
    assert count_loops(in_cpu_form(attend), q) == 2
    assert count_loops(in_cpu_form(multiply), x, w) == 3
    # Of four lists each is a tile, but for two that share the last.
    assert count_loops(in_gpu_form(attend), q) == 3 * 3
    assert count_loops(in_gpu_form(multiply), x, w) == 3 * 3


@pytest.mark.ci
def test_attention_is_bit_equal_when_repeated():
    case = contract.CASES["causal_zero_heads"]
    run = contract.compile_case(case, _attend)
    first, second = (run(case.inputs(), case.masks()["random"]) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.ci
def test_gradients_under_vmap_scan_and_remat():
    case = contract.Case(num_queries=64, num_keys=64, causal=True)
    (x,) = make_normal(((3, *case.shapes[0]),))
    masks = jnp.stack(list(make_masks((1, 1, 4, 4)).values())[:3])

    def loss(attend, x, masks):
        @jax.checkpoint
        def layer(x, schedule):
            return x + attend(x, x, x, schedule, **case.options), None

        return (jax.lax.scan(layer, x, make_block_schedule(masks))[0] ** 2).sum()

    def gradient(implementation):
        attend = functools.partial(block_sparse_attention, implementation=implementation)
        if implementation == "xla":
            attend = in_gpu_form(attend)
        stacks = jnp.stack([masks, masks[::-1], masks])
        return jax.jit(jax.vmap(jax.grad(functools.partial(loss, attend))))(x, stacks)

    assert error(gradient("xla"), gradient("reference")) < 1e-3


@pytest.mark.ci
def test_a_column_does_not_see_inputs_of_blocks_that_it_prunes():
    # Only the padding of the first two lists could meet the last rows of the weight.
    mask = jnp.array([[True, True, True], [True, False, True], [False, False, True]])
    x, w = make_normal(((4, 24), (24, 24)))
    got = _multiply(x.at[:, 16:].set(jnp.nan), w, mask, mask, jnp.zeros(24))
    kept = np.kron(np.asarray(mask), np.ones((8, 8)))
    np.testing.assert_allclose(got[:, :16], (x @ (w * kept))[:, :16], atol=1e-5)
    assert jnp.isnan(got[:, 16:]).all()


_BAND = np.tri(32, k=1, dtype=bool) & ~np.tri(32, k=-2, dtype=bool)
_GLOBAL = np.arange(32) == 0


@pytest.mark.ci
@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        (np.zeros((32, 32), bool), 0),
        # Lists of up to three blocks take two steps of two.
        (_BAND, 32 * 4),
        # The full list is walked with one other; those of up to four blocks take two steps.
        (_BAND | _GLOBAL | _GLOBAL[:, None], 2 * 32 + 30 * 4),
        (np.ones((32, 32), bool), 32 * 32),
    ],
    ids=["none", "band", "global row and column", "full"],
)
def test_work_follows_the_mask(monkeypatch, mask, blocks):
    computed = []

    def counting_walk(tile, step, block):
        visited, listed = _WALK(tile, step, block)
        jax.debug.callback(lambda size: computed.append(int(size)), visited.size)
        return visited, listed

    monkeypatch.setattr(Tile, "walk", counting_walk)
    q, k, v = make_normal(((1, 2048, 1, 8),) * 3)

    @in_gpu_form
    def attend(q, k, v, mask):
        return block_sparse_attention(
            q, k, v, mask, block_q=64, block_kv=64, implementation="xla"
        ).sum()

    gradient = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
    jax.block_until_ready(gradient(q, k, v, jnp.asarray(mask)[None, None]))
    jax.effects_barrier()
    # The output; dK and dV; dQ.
    assert sum(computed) == 3 * blocks
