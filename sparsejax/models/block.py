"""One block of a transformer: attention and feed-forward, each around a residual connection.

Legend: B batch, T position, D model width.
"""

import jax
from flax import nnx

from sparsejax.models.attention import BlockSparseAttention
from sparsejax.models.config import TransformerConfig
from sparsejax.models.mlp import MLP
from sparsejax.models.residual import dropout, make_norm
from sparsejax.sharding import cut_positions


class Block(nnx.Module):
    """One transformer block, pre-norm or post-norm as `config.norm_position` says.

    Attributes:
      attention_norm, mlp_norm: nnx.LayerNorm or nnx.RMSNorm over D.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create the two branches.

        Args:
          rngs: nnx.Rngs with a `params` stream.
        """
        self.dropout_rate, self.norm_position = config.dropout_rate, config.norm_position
        self.attention_norm = make_norm(config, rngs)
        self.attention = BlockSparseAttention(config, rngs=rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x_BTD,
        *,
        schedule,
        budget,
        kv_mask_BT,
        dropout_key,
        attention_options,
        linear_options,
        pruning_key,
        probe,
    ):
        """Apply attention and feed-forward, each around a residual connection.

        Args:
          x_BTD: float[B, T, D].
          schedule: BlockSchedule of this layer's mask, or None.
          budget: what a chooser of blocks has for this layer, or None.
          kv_mask_BT: bool[B, T], True = real token, or None.
          dropout_key: typed key, or None for no dropout.
          attention_options: AttentionOptions, static.
          linear_options: LinearOptions, static.
          pruning_key: typed key, or None where no gradient is pruned.
          probe: bool, static; also return the attention map.

        Returns:
          float[B, T, D] and f32[T, T], HeadMaps or None.
        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        branch, attention_maps = self.attention(
            self._enter(self.attention_norm, x_BTD),
            kv_mask_BT=kv_mask_BT,
            schedule=schedule,
            budget=budget,
            options=attention_options,
            linear_options=linear_options,
            pruning_key=pruning_key,
            probe=probe,
        )
        x_BTD = self._leave(self.attention_norm, x_BTD, branch, keys[0])
        branch = self.mlp(
            self._enter(self.mlp_norm, x_BTD),
            options=linear_options,
            pruning_key=pruning_key,
            dropout_key=dropout_key,
        )
        return self._leave(self.mlp_norm, x_BTD, branch, keys[1]), attention_maps

    def prefill(self, x_BTD, *, schedule, budget, cache_length, attention_options, linear_options):
        """Apply both branches to a prompt, and keep what later positions attend to.

        Args:
          x_BTD: float[B, T, D].
          schedule: BlockSchedule of this layer's mask, or None.
          budget: what a chooser of blocks has for this layer, or None.
          cache_length: int, positions of the cache.
          attention_options: AttentionOptions, static.
          linear_options: LinearOptions, static.

        Returns:
          float[B, T, D] and LayerCache.
        """
        branch, cache = self.attention.prefill(
            self._enter(self.attention_norm, x_BTD),
            schedule=schedule,
            budget=budget,
            cache_length=cache_length,
            options=attention_options,
            linear_options=linear_options,
        )
        return self._finish(x_BTD, branch, linear_options), cache

    def decode(self, x_B1D, cache, positions_B, *, budget, attention_options, linear_options):
        """Apply both branches to one position of each example.

        Args:
          x_B1D: float[B, 1, D].
          cache: LayerCache of the positions before.
          positions_B: i32[B].
          budget: what a chooser of blocks has for this layer, or None.
          attention_options: AttentionOptions, static.
          linear_options: LinearOptions, static.

        Returns:
          float[B, 1, D] and LayerCache.
        """
        branch, cache = self.attention.decode(
            self._enter(self.attention_norm, x_B1D),
            cache,
            positions_B,
            budget=budget,
            options=attention_options,
            linear_options=linear_options,
        )
        return self._finish(x_B1D, branch, linear_options), cache

    def _finish(self, x_BTD, branch, linear_options):
        """Leave attention, and apply the feed-forward branch, both without dropout."""
        x_BTD = self._leave(self.attention_norm, x_BTD, branch)
        branch = self.mlp(self._enter(self.mlp_norm, x_BTD), options=linear_options)
        return self._leave(self.mlp_norm, x_BTD, branch)

    def _enter(self, norm, x_BTD):
        """Return what a branch reads."""
        return norm(x_BTD) if self.norm_position == "pre" else x_BTD

    def _leave(self, norm, x_BTD, branch, key=None):
        """Add what a branch made to its input."""
        x_BTD = cut_positions(x_BTD + dropout(branch, self.dropout_rate, key))
        return x_BTD if self.norm_position == "pre" else norm(x_BTD)
