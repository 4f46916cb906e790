"""Problems that show whether kernels of attention and of its averaged map are right.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_map import mean_attention_map
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.doctor import oracles
from pallas_kernels.doctor.problem import Function, Maker, Problem, draw_blocks


def _make_attention(facts: AttentionFacts) -> Problem:
    q_shape = (facts.batch, facts.num_queries, facts.num_heads, facts.head_dim)
    kv_shape = (facts.batch, facts.num_keys, facts.num_kv_heads, facts.head_dim)
    inputs = oracles.make_normal((q_shape, kv_shape, kv_shape), facts.dtype)
    cotangents = oracles.make_normal((q_shape, q_shape[:3]), seed=1)
    kv_mask, segment_ids = _draw_positions(facts)
    options: dict[str, Any] = {
        "block_q": facts.block_q,
        "block_kv": facts.block_kv,
        "causal": facts.causal,
        "kv_mask": kv_mask,
        "segment_ids": segment_ids,
        "scale": facts.scale,
    }

    def call(implementation, directions):
        rules: dict[str, Any] = {"pruned_logits": facts.pruned_logits}

        def attend(q, k, v, mask):
            return block_sparse_attention(
                q, k, v, mask, return_lse=True, implementation=implementation, **rules, **options
            )

        def run(inputs, mask):
            if "gradient" not in directions:
                q, k, v = inputs
                return attend(q, k, v, mask)
            return oracles.value_and_gradients(
                lambda q, k, v: attend(q, k, v, mask), inputs, cotangents
            )

        return run

    def plain(inputs, mask):
        if mask is None:
            mask = jnp.ones((1, 1, *_attention_grid(facts)), bool)
        zero = facts.pruned_logits == "zero"
        return oracles.value_and_gradients(
            lambda q, k, v: oracles.plain_attention(q, k, v, mask, zero=zero, **options),
            inputs,
            cotangents,
        )

    def hide(inputs, mask):
        if kv_mask is None:
            return inputs
        q, *kv = inputs
        return (q, *(jnp.where(kv_mask[:, :, None, None], x, jnp.nan) for x in kv))

    masks: dict[str, Any] = {"all": None}
    if facts.mask_shape is not None:
        masks = oracles.make_masks((*facts.mask_shape, *_attention_grid(facts)))
    names = {"forward": ("out", "lse"), "gradient": ("dq", "dk", "dv")}
    directions = tuple(names)
    return Problem(names, inputs, masks, call, call("reference", directions), plain, hide)


def _attention_grid(facts: AttentionFacts) -> tuple[int, int]:
    return facts.num_queries // facts.block_q, facts.num_keys // facts.block_kv


def _draw_positions(facts: AttentionFacts) -> tuple[jax.Array | None, jax.Array | None]:
    """Draw a mask of keys that empties the first two blocks of the last example, and segments."""
    rng = np.random.default_rng(2)
    kv_mask = rng.random((facts.batch, facts.num_keys)) < 0.7
    kv_mask[-1, : 2 * facts.block_kv] = False
    segments = np.sort(rng.integers(0, 4, (facts.batch, facts.num_queries)), axis=1)[:, ::-1]
    return (
        jnp.asarray(kv_mask) if facts.has_kv_mask else None,
        jnp.asarray(segments.copy()) if facts.has_segments else None,
    )


def _shrink_attention(facts: AttentionFacts) -> Iterator[AttentionFacts]:
    unit, group = math.lcm(facts.block_q, facts.block_kv), facts.num_heads // facts.num_kv_heads
    sizes = itertools.product(
        sorted({min(facts.batch, 2), facts.batch}),
        sorted({min(facts.num_kv_heads, 2), facts.num_kv_heads}),
        sorted({16 * unit, max(facts.num_queries, facts.num_keys)}),
    )
    for batch, kv_heads, length in sorted(sizes, key=math.prod):
        heads = kv_heads * group
        mask_batch, mask_heads = facts.mask_shape or (1, 1)
        mask_shape = (batch if mask_batch > 1 else 1, heads if mask_heads > 1 else 1)
        yield dataclasses.replace(
            facts,
            batch=batch,
            num_heads=heads,
            num_kv_heads=kv_heads,
            num_queries=min(facts.num_queries, length),
            num_keys=min(facts.num_keys, length),
            mask_shape=None if facts.mask_shape is None else mask_shape,
        )


def _draw_attention_mask(facts: AttentionFacts, density: float) -> jax.Array | None:
    if facts.mask_shape is None:
        return None
    return draw_blocks((*facts.mask_shape, *_attention_grid(facts)), density)


def _dense_attention(facts: AttentionFacts) -> Function:
    dense = dataclasses.replace(facts, mask_shape=None)

    def run(inputs, mask):
        return _make_attention(dense).call("dense", ("forward", "gradient"))(inputs, None)

    return run


def _make_map(facts: MapFacts) -> Problem:
    shapes = ((2, facts.num_queries, 4, facts.head_dim), (2, facts.num_keys, 2, facts.head_dim))
    inputs = oracles.make_normal(shapes, facts.dtype)
    kv_mask = None
    if facts.has_kv_mask:
        kv_mask = jnp.asarray(np.random.default_rng(2).random((2, facts.num_keys)) < 0.7)
    lse = None
    if facts.has_lse:
        q, k = (x.astype(jnp.float32) for x in inputs)
        _, lse = block_sparse_attention(
            q, k, k, None, block_q=facts.num_queries, block_kv=facts.num_keys, kv_mask=kv_mask,
            causal=facts.causal, return_lse=True, implementation="reference",
        )  # fmt: skip

    def call(implementation, directions):
        def run(inputs, mask):
            average = mean_attention_map(
                *inputs,
                causal=facts.causal,
                kv_mask_BS=kv_mask,
                lse=lse,
                implementation=implementation,
            )
            return (average,)

        return run

    def plain(inputs, mask):
        return (oracles.plain_attention_map(*inputs, causal=facts.causal, kv_mask=kv_mask),)

    names = {"forward": ("map",)}
    masks = {"all": None}
    return Problem(names, inputs, masks, call, call("reference", tuple(names)), plain)


def _shrink_map(facts: MapFacts) -> Iterator[MapFacts]:
    # Tiles have up to 128 positions: a length that ends inside of one still does.
    least = (512, 1024, 2048, max(facts.sizes))
    sizes = (tuple(min(n, most + n % 128) for n in facts.sizes) for most in sorted(least))
    for num_queries, num_keys in dict.fromkeys(sizes):
        yield dataclasses.replace(facts, num_queries=num_queries, num_keys=num_keys)


ATTENTION = Maker(
    AttentionFacts, _make_attention, _shrink_attention, _draw_attention_mask, _dense_attention
)
ATTENTION_MAP = Maker(MapFacts, _make_map, _shrink_map)
