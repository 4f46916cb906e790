"""Models that continue texts, small and with weights that make their choices clear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks import DynamicBlocks
from sparsejax.models import AttentionOptions, Transformer
from sparsejax.recipes import set_attention_masks
from sparsejax.training.state import merge_model
from tests.small_models import SPARSE_ATTENTION, make_config, make_small_optimizer, make_state

LENGTH, BLOCK = 64, 8


def keep_five(length):
    """Keep the last five positions."""
    return jnp.tri(length, dtype=bool) & ~jnp.tri(length, k=-5, dtype=bool)


OPTIONS = {
    "dense": AttentionOptions(sparse=False),
    "masked": AttentionOptions(),
    "zero": AttentionOptions(pruned_logits="zero"),
    "positions": AttentionOptions(position_mask=keep_five),
    "chosen": AttentionOptions(
        choose_blocks=DynamicBlocks(
            density=0.5, block_size=BLOCK, num_blocks=LENGTH // BLOCK, causal=True
        )
    ),
}


@functools.cache
def make_model(attention: str) -> Transformer:
    """Return a model of two layers whose block masks differ."""
    config = make_config(max_length=LENGTH, positions="rotary")
    state = make_state(config, SPARSE_ATTENTION, make_small_optimizer())
    params = jax.tree.map(lambda x: 4 * x, state.params)
    own = np.eye(LENGTH // BLOCK, dtype=bool)
    patterns = np.stack([own | np.eye(len(own), k=-2, dtype=bool), own])
    patterns[1, :, 0] = True
    masks = set_attention_masks(state.sparsity.masks, jnp.asarray(patterns))
    model = merge_model(config, params, masks)
    model.attention_options = OPTIONS[attention]
    return model
