"""Attention patterns of a pretrained model: fixed, learned on other documents, chosen, and oracles.

Legend: L layers, T positions, N query heads, I = J blocks along one side.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import mean_attention_map
from sparsejax.calibration import calibrate_blocks, read_heads
from sparsejax.masks import (
    DynamicBlocks,
    flood_fill,
    model_pooled_map,
    pattern_at_density,
    pool_attention,
    sat_pattern,
    top_k_blocks,
)
from sparsejax.masks.attention.block_counts import count_row_blocks
from sparsejax.masks.attention.dynamic import keep_top_blocks
from sparsejax.masks.attention.query_shares import compute_shares
from sparsejax.models import Transformer

SINK_WINDOW = "sink + window"
ORACLE, SHARED_ORACLE = "oracle", "oracle, heads share"
FREE_ORACLE = "oracle, heads and layers share"
DYNAMIC, HABITS = "dynamic", "habits alone"
DYNAMIC_PLAIN, DYNAMIC_HEADS = "dynamic, uncalibrated", "dynamic, heads alike"
LOOKAHEAD = "lookahead"
QUERY_SPACING = 128
"""Positions between the queries that are sampled where the choice is calibrated."""
FIXED = {
    SINK_WINDOW: "sink_window",
    "sliding window": "sliding_window",
    "Longformer": "longformer",
    "BigBird": "bigbird",
}
WALKS = {"SPION-CF, causal walk": "flood", "SPION-CF, published walk": "greedy"}
SPION_C, SAT, TOP, SHARED_TOP = "SPION-C", "SAT, fitted", "top-k by head", "top-k, heads share"
CHOSEN: dict[str, dict[str, Any]] = {
    DYNAMIC: {"query_spacing": QUERY_SPACING},
    HABITS: {"num_queries": 0},
    DYNAMIC_PLAIN: {},
    DYNAMIC_HEADS: {"share_heads": False},
    LOOKAHEAD: {"lookahead": True, "num_queries": 8},
}
"""Settings of what chooses blocks within the model."""
PATTERNS = (
    *(SINK_WINDOW, ORACLE, DYNAMIC, HABITS, SHARED_ORACLE, FREE_ORACLE),
    *(DYNAMIC_PLAIN, LOOKAHEAD, DYNAMIC_HEADS, TOP, SHARED_TOP, SPION_C, SAT, *WALKS, *FIXED),
)
"""All patterns, the most important first; one name may come twice."""
_FIT_STEPS = 400


class Maps(NamedTuple):
    """Attention of a dense model to one document, or a mean over some.

    Attributes:
      layers_LTT: f32[L, T, T], averaged over heads.
      blocks_LNIJ: f32[L, N, I, J], share of each key block, averaged over the rows of each query
        block.
      cubes_LNIJ: f32[L, N, I, J], likewise of the cubes of these shares.
    """

    layers_LTT: np.ndarray
    blocks_LNIJ: np.ndarray
    cubes_LNIJ: np.ndarray


def measure_maps(model: Transformer, ids_T: np.ndarray, block_size: int) -> Maps:
    """Run a model densely over one document.

    Args:
      ids_T: i32[T], T = `max_length` of the model.
      block_size: int, side of a block, positions.

    Returns:
      Maps of all layers.
    """

    @jax.jit
    def look(q_BTNH, k_BSKH):
        rows = jnp.arange(len(ids_T)).reshape(-1, block_size)

        def measure(of_block):
            q_RNH, rows_R = of_block
            shares = compute_shares(
                q_RNH[None, None],
                k_BSKH,
                rows_R[None],
                None,
                block_size=block_size,
                causal=True,
            )
            return shares[0, :, 0].mean(1), (shares[0, :, 0] ** 3).mean(1)

        found = jax.lax.map(measure, (q_BTNH[0][rows], rows))
        by_head = (x_INJ.swapaxes(0, 1) for x_INJ in found)
        return mean_attention_map(q_BTNH, k_BSKH, causal=True), *by_head

    states = read_heads(model, ids_T[None])
    pairs = zip(states.q_LBTNH, states.k_LBTKH, strict=True)
    layers = [jax.device_get(look(q, k)) for q, k in pairs]
    return Maps(*(np.stack(part) for part in zip(*layers, strict=True)))


def average_maps(maps: list[Maps]) -> Maps:
    """Average over documents."""
    return Maps(*(np.mean(part, axis=0) for part in zip(*maps, strict=True)))


def make_masks(calibration: Maps, *, density: float, block_size: int) -> dict[str, np.ndarray]:
    """Make the patterns that do not depend on the document.

    Args:
      calibration: of other documents.
      density: share of the visible blocks that is kept.
      block_size: int, side of a block, positions.

    Returns:
      name -> bool[L, 1 | N, I, J].
    """
    layers, num_blocks = len(calibration.layers_LTT), calibration.blocks_LNIJ.shape[-1]
    masks = {}
    for name, family in FIXED.items():
        kept = pattern_at_density(
            family, num_blocks, density=density, causal=True, key=jax.random.key(0)
        )
        masks[name] = np.broadcast_to(kept, (layers, 1, num_blocks, num_blocks))
    pooled_LIJ = pool_attention(
        calibration.layers_LTT, block_size=block_size, filter_size=31, causal=True
    )
    masks[SPION_C] = np.asarray(top_k_blocks(pooled_LIJ, density=density, causal=True))[:, None]
    for name, walk in WALKS.items():
        kept = flood_fill(pooled_LIJ, density=density, causal=True, walk=walk)
        masks[name] = np.asarray(kept)[:, None]
    pattern = _fit_pattern(
        pool_attention(calibration.layers_LTT, block_size=block_size, filter_size=None)
    )
    masks[SAT] = np.asarray(sat_pattern(pattern, density=density, causal=True))[:, None]
    masks[TOP] = _keep_top(calibration.blocks_LNIJ, density, shared=False)
    masks[SHARED_TOP] = _keep_top(calibration.blocks_LNIJ, density, shared=True)
    return masks


def make_oracles(maps: Maps, *, density: float) -> dict[str, np.ndarray]:
    """Keep the highest of a document's own dense maps, which no method knows.

    Where layers share, too, the highest cubes are kept, which a loss grows with.

    Args:
      maps: of the document.
      density: share of the visible blocks that is kept.

    Returns:
      name -> bool[L, N, I, J].
    """
    cubes_LNIJ = maps.cubes_LNIJ
    # As if all heads were of one layer.
    free = _keep_top(cubes_LNIJ.reshape(1, -1, *cubes_LNIJ.shape[2:]), density, shared=True)
    return {
        ORACLE: _keep_top(maps.blocks_LNIJ, density, shared=False),
        SHARED_ORACLE: _keep_top(maps.blocks_LNIJ, density, shared=True),
        FREE_ORACLE: free.reshape(cubes_LNIJ.shape),
    }


def make_chooser(
    name: str, model: Transformer, ids_BT: np.ndarray, *, density: float, block_size: int
) -> DynamicBlocks:
    """Make what chooses blocks within the model.

    Args:
      name: one of `CHOSEN`.
      ids_BT: i32[B, T], other documents, by which a choice is calibrated.
      density: share of the visible blocks that is kept.
      block_size: int, side of a block, positions.
    """
    blocks = DynamicBlocks(
        density=density,
        block_size=block_size,
        num_blocks=ids_BT.shape[1] // block_size,
        causal=True,
        **CHOSEN[name],
    )
    return calibrate_blocks(model, ids_BT, blocks) if name in (DYNAMIC, HABITS) else blocks


def _keep_top(blocks_LNIJ, density, *, shared):
    num_heads, num_blocks = blocks_LNIJ.shape[1:3]
    counts_I = count_row_blocks(num_blocks, density=density, causal=True)
    return np.asarray(
        keep_top_blocks(
            jnp.asarray(blocks_LNIJ),
            num_heads * counts_I,
            always_IJ=np.eye(num_blocks, dtype=bool),
            visible_IJ=np.tri(num_blocks, dtype=bool),
            most=int(num_heads * counts_I.max()),
            shared=shared,
        )
    )


def _fit_pattern(pooled_LIJ):
    """Fit SAT's W to maps, from its published beginning, by as many steps as settle it."""
    visible_IJ = np.tri(pooled_LIJ.shape[-1], dtype=bool)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def fit(pattern):
        def loss(pattern):
            error_LIJ = model_pooled_map(pattern) - pooled_LIJ
            return (error_LIJ**2).mean((1, 2), where=visible_IJ).sum()

        def step(carry, _):
            pattern, state = carry
            updates, state = optimizer.update(jax.grad(loss)(pattern), state)
            return (optax.apply_updates(pattern, updates), state), None

        return jax.lax.scan(step, (pattern, optimizer.init(pattern)), None, length=_FIT_STEPS)[0][0]

    shape = (*pooled_LIJ.shape[:2], 64)
    return fit(jax.random.uniform(jax.random.key(0), shape, jnp.float32))
