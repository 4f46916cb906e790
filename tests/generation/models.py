"""Models that continue texts, small and with weights that make their choices clear."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models import AttentionOptions, Transformer
from sparsejax.recipes import set_attention_masks
from sparsejax.training.state import merge_model
from tests.small_models import SPARSE_ATTENTION, make_config, make_small_optimizer, make_state

LENGTH, BLOCK = 64, 8


@dataclasses.dataclass(frozen=True)
class FirstOrOwn:
    """Keep a query block's own block, and the first one where its first query likes its key."""

    lookahead: bool = False

    def count(self, num_blocks, num_heads):
        return np.full((1, num_blocks), 2 * num_heads)

    def measure_density(self, num_blocks, num_heads):
        return np.ones(1)

    def __call__(self, q_BTNH, k_BSKH, kv_mask_BS, counts_I):
        del kv_mask_BS, counts_I
        liked_BNI = jnp.einsum("binh,bnh->bni", q_BTNH[:, ::BLOCK], k_BSKH[:, 0]) > 0
        own_IJ = jnp.eye(q_BTNH.shape[1] // BLOCK, dtype=bool)
        return own_IJ | (liked_BNI[..., None] & (jnp.arange(len(own_IJ)) == 0))


def keep_five(length):
    """Keep the last five positions."""
    return jnp.tri(length, dtype=bool) & ~jnp.tri(length, k=-5, dtype=bool)


OPTIONS = {
    "dense": AttentionOptions(sparse=False),
    "masked": AttentionOptions(),
    "zero": AttentionOptions(pruned_logits="zero"),
    "positions": AttentionOptions(position_mask=keep_five),
    "chosen": AttentionOptions(choose_blocks=FirstOrOwn()),
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
