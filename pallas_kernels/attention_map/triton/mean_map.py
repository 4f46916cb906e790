"""The mean softmax map in Triton: what runs, and what is refused.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.attention_map.triton.launches import (
    Operands,
    Problem,
    average,
    count_tiles,
    sum_exponentials,
)
from pallas_kernels.attention_map.triton.tiles import find_tiles
from pallas_kernels.block_sparse_attention.triton.launches import LOG2_E, pad_head_dim
from pallas_kernels.dispatch import count_processors
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.interpretation import find_interpretation
from pallas_kernels.triton.tile_tables import Tile

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 256)
# Programs that every processor may get, and parts that heads are divided into, at most.
_PROGRAMS_PER_PROCESSOR = 2
_MOST_PARTS = 8


def check(facts: MapFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    make_problem(facts)


def tile(facts: MapFacts) -> str:
    """Name the tiles of the kernels, the parts, and which lengths end inside a tile.

    Returns:
      str, "" where the kernels cannot run.
    """
    try:
        problem = make_problem(facts)
    except NotImplementedError:
        return ""
    mean, lse = problem.tiles
    names = [f"mean {mean} {problem.parts} parts"]
    cuts = {"T": (facts.num_queries, mean.rows), "S": (facts.num_keys, mean.columns)}
    if not facts.has_lse:
        names.append(f"lse {lse}")
        cuts |= {"T of lse": (cuts["T"][0], lse.rows), "S of lse": (cuts["S"][0], lse.columns)}
    names += [f"{name} is cut" for name, (length, step) in cuts.items() if length % step]
    return ", ".join(names)


def make_problem(facts: MapFacts) -> Problem:
    """Collect what the kernels are compiled for, and refuse what they do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    capability = check_device()
    if facts.dtype not in DTYPES:
        raise NotImplementedError(f"the Triton kernels take {DTYPES}, got {facts.dtype}")
    least, most = HEAD_DIMS
    if not least <= facts.head_dim <= most:
        raise NotImplementedError(
            f"the Triton kernels take head dims from {least} to {most}, got H={facts.head_dim}"
        )
    tiles = find_tiles(capability, jnp.dtype(facts.dtype).itemsize, pad_head_dim(facts.head_dim))
    return Problem(
        causal=facts.causal,
        capability=capability,
        tiles=tiles,
        parts=_choose_parts(facts, tiles.mean),
    )


def run(arrays: MapArrays, facts: MapFacts) -> jax.Array:
    """Average the maps of all heads, tile by tile of the result.

    A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

    Without `lse` a kernel that writes nothing else computes it first: one more product of queries
    and keys.

    Returns:
      f32[T, S].

    Raises:
      NotImplementedError: if the device or the call is not one that the kernels take.

    Numerics:
      Products accumulate in f32, and those of f32 are not rounded to TF32; scores, exponentials
      and sums are f32, in one order: a repeated call agrees to the bit.
    """
    problem = make_problem(facts)
    q, k, kv_mask, lse = arrays
    operands = Operands(q, k, None if kv_mask is None else kv_mask.astype(jnp.int8))
    if lse is None:
        lse2_BNT = sum_exponentials(operands, problem)
    else:
        # A row that sees nothing has no probabilities: exp2(s - inf) = 0.
        lse2_BNT = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf).swapaxes(1, 2)
    return average(operands._replace(lse=lse2_BNT), problem)[0]


def _choose_parts(facts: MapFacts, tile: Tile) -> int:
    """Divide examples and heads where tiles alone would leave processors without work."""
    # Interpreted, so few that small calls show both.
    processors = 2 if find_interpretation() is not None else count_processors()
    tiles = count_tiles(facts.num_queries, facts.num_keys, tile)
    parts = 1
    while parts < _MOST_PARTS and 2 * parts * tiles <= _PROGRAMS_PER_PROCESSOR * processors:
        parts *= 2
    return parts
