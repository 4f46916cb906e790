"""dK and dV of grouped queries in parts: how many, and what they add up to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention.mosaic_sm90 import attention, bwd, program
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import choose_parts, locate
from tests.kernels.contract import Case, call_implementation, check_case, compile_case
from tests.kernels.interpreter import hopper

_ATTEND = call_implementation("mosaic_sm90")


@pytest.mark.parametrize(
    ("items", "rings", "group", "processors", "parts"),
    [
        (64, 1, 4, 132, 4),  # B=1, K=4, S=2048, blocks of 128; two parts are 128 programs
        (64, 1, 8, 132, 4),  # 256 programs are enough
        (128, 2, 8, 132, 4),  # the same in blocks of 64, two items a program
        (66, 1, 4, 132, 2),
        (131, 1, 4, 132, 2),
        (132, 1, 4, 132, 1),
        (263, 2, 4, 132, 1),  # the last of 132 programs has one item
        (262, 2, 4, 132, 2),
        (50, 1, 6, 132, 3),
        (1, 1, 6, 132, 6),  # never enough
        (8, 1, 7, 132, 7),  # a prime number of heads: all or nothing
        (8, 1, 1, 132, 1),
        (2, 2, 4, 2, 2),
        (1, 2, 4, 2, 4),
    ],
)
def test_the_fewest_parts_that_fill_the_device(items, rings, group, processors, parts):
    assert choose_parts(items, rings, group, processors) == parts


_SMALL = Case(
    batch=1, num_heads=4, num_kv_heads=1, num_queries=128, num_keys=128, head_dim=32, block_q=64,
    block_kv=64, dtype="bfloat16", causal=True, mask_names=("full",),
)  # fmt: skip
_change = functools.partial(dataclasses.replace, _SMALL)

# Name -> case, processors (two are what the interpreter says), parts.
_FAST = {
    # Three items for programs of two.
    "own_masks_in_3_of_1": (
        _change(num_heads=3, mask_heads=3, num_keys=64, mask_names=("random",)), 2, 3,
    ),
}  # fmt: skip
_SLOW = {
    # Each part walks its list twice.
    "shared_mask_in_2_of_2": (_SMALL, 2, 2),
    # Each part has a list of two joined heads; wide blocks, so that a program has one ring.
    "own_masks_in_2_of_2": (_change(mask_heads=4, block_kv=128, mask_names=("random",)), 2, 2),
    "shared_mask_in_4_of_1": (_SMALL, 4, 4),
    "own_masks_in_4_of_1": (_change(mask_heads=4, mask_names=("random",)), 4, 4),
    "own_masks_in_2_of_2_narrow": (
        _change(mask_heads=4, mask_names=("full", "random")), 2, 2,
    ),
    "shared_mask_in_2_of_1": (_change(num_heads=2), 2, 2),
    "own_masks_in_2_of_1_wide": (
        _change(num_heads=2, mask_heads=2, block_kv=128, block_q=128, num_queries=256), 2, 2,
    ),
    "not_causal_heads_and_batch": (
        _change(batch=2, num_heads=8, num_kv_heads=2, causal=False, mask_batch=2), 8, 2,
    ),
    "own_masks_heads_and_batch": (
        _change(batch=2, num_heads=8, num_kv_heads=2, mask_batch=2, mask_heads=8), 132, 4,
    ),
    "own_masks_heads_one_batch_of_them": (
        _change(batch=2, num_heads=8, num_kv_heads=2, mask_heads=8, num_keys=192), 12, 2,
    ),
    "blocks_of_32_joined": (
        _change(block_q=32, block_kv=32, mask_heads=4, mask_names=("random", "empty_rows")), 2, 2,
    ),
    "blocks_of_32_shared": (_change(block_q=32, block_kv=64), 2, 2),
    "everything_f16": (
        _change(
            dtype="float16", head_dim=128, has_kv_mask=True, has_segments=True, scale=0.2,
            pruned_logits="zero", mask_names=("random", "empty_columns"),
        ), 2, 2,
    ),
    "every_mask": (_change(mask_heads=4, mask_names=None), 4, 4),
}  # fmt: skip


def _parametrize():
    slow = [pytest.param(*args, id=name, marks=pytest.mark.slow) for name, args in _SLOW.items()]
    fast = [pytest.param(*args, id=name) for name, args in _FAST.items()]
    return pytest.mark.parametrize(("case", "processors", "parts"), fast + slow)


@pytest.mark.ci
@_parametrize()
def test_contract(case, processors, parts, monkeypatch):
    walks = []

    def record(operands, lists, problem, walk):
        walks.append(walk)
        return bwd.attention_backward_keys(operands, lists, problem, walk)

    monkeypatch.setattr(attention, "count_processors", lambda: processors)
    monkeypatch.setattr(attention, "attention_backward_keys", record)
    with hopper():
        check_case(case, _ATTEND)
    assert [walk.parts for walk in walks] == [parts]


@pytest.mark.ci
def test_a_repeated_call_agrees_to_the_bit():
    case = _change(num_heads=2, num_queries=64, num_keys=64)
    inputs, mask = case.inputs(), case.masks()["full"]
    run = compile_case(case, _ATTEND)
    with hopper():
        first, second = run(inputs, mask), run(inputs, mask)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_parts_that_overlap_are_noticed(monkeypatch):
    def locate_first_part(problem, walk, lists, item, step):
        return locate(problem, walk, lists, item._replace(head=jnp.int32(0)), step)

    monkeypatch.setattr(program, "locate", locate_first_part)
    with pytest.raises(AssertionError, match="d[kv] off by"), hopper():
        check_case(_FAST["own_masks_in_3_of_1"][0], _ATTEND)


@pytest.mark.slow
def test_vmap_of_parts():
    inputs = [_SMALL.inputs(), tuple(x[::-1, ::-1] for x in _SMALL.inputs())]
    mask = jnp.array([[[[True, False], [True, True]]]])

    def loss(q, k, v):
        return (_ATTEND(q, k, v, mask, **_SMALL.options)[0].astype(jnp.float32) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    with hopper():
        together = jax.jit(jax.vmap(gradient))(*(jnp.stack(x) for x in zip(*inputs, strict=True)))
        alone = [jax.jit(gradient)(*x) for x in inputs]
    for x, *rest in zip(together, *alone, strict=True):
        np.testing.assert_array_equal(x, jnp.stack(rest))
