"""Attention blocks chosen for each input and head from cheap scores of its queries and keys.

A query block's own queries are not known before its tokens are. In a causal model its blocks are
chosen from the first query of the block and from queries before it: `R` of them, sampled. Their
exact attention to every key before the block, summed by key block, tells what to keep, beside what
is known of each head.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, H head dim,
I query blocks, J key blocks, R sampled queries of a query block, C classes of distance, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checks import check_setting
from sparsejax.masks.attention.block_counts import count_row_blocks, spread_over_layers
from sparsejax.masks.attention.habits import NUM_CLASSES, Habits, predict_scores
from sparsejax.masks.attention.query_shares import compute_shares, sample_queries


def keep_top_blocks(
    scores_BNIJ: jax.Array,
    counts_I: np.ndarray | jax.Array,
    *,
    always_IJ: np.ndarray,
    visible_IJ: np.ndarray,
    most: int,
    shared: bool,
) -> jax.Array:
    """Keep the highest scores of each query block, an exact number of them.

    Args:
      scores_BNIJ: f32[B, N, I, J], finite.
      counts_I: int[I], blocks that all heads together keep of a query block.
      always_IJ: bool[I, J], kept whatever their scores; no more than the counts.
      visible_IJ: bool[I, J], what may be kept.
      most: int, the largest count.
      shared: bool, static; the counts go to the highest scores of all heads together. Otherwise
        each head gets an equal part.

    Returns:
      bool[B, N, I, J]; of equal scores the first head, then the first block, is kept.
    """
    B, N, I, J = scores_BNIJ.shape  # noqa: E741
    scores = jnp.where(always_IJ[None, None], jnp.inf, scores_BNIJ)
    scores = jnp.where(visible_IJ[None, None], scores, -jnp.inf)
    counts_I = jnp.asarray(counts_I)
    if shared:
        scores = scores.swapaxes(1, 2).reshape(B, I, N * J)
    else:
        counts_I, most = counts_I // N, most // N
    highest, chosen = jax.lax.top_k(scores, min(most, scores.shape[-1]))
    order = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, chosen.ndim - 1)
    counts = jax.lax.broadcast_in_dim(counts_I, chosen.shape, (chosen.ndim - 2,))
    taken = (order < counts) & (highest > -jnp.inf)
    # One more column takes what is not chosen.
    chosen = jnp.where(taken, chosen, scores.shape[-1])
    rows = jnp.zeros((*scores.shape[:-1], scores.shape[-1] + 1), bool)
    kept = jnp.put_along_axis(rows, chosen, True, axis=-1, inplace=False)[..., :-1]
    return kept.reshape(B, I, N, J).swapaxes(1, 2) if shared else kept


# A causal model's query blocks are scored in so many groups, which read keys up to their own end
# only. More groups save less and compile longer.
_GROUPS = 4


class Budget(NamedTuple):
    """What a choice needs to know of its layer.

    Attributes:
      counts_I: i32[I], blocks that all heads together keep of each query block.
      habits: Habits of the heads, by calibration; None where there was none.
    """

    counts_I: jax.Array | np.ndarray
    habits: Habits | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicBlocks:
    """A `BlockChooser`: the blocks of each input and head that sampled queries ask for.

    Attributes:
      density: share of the visible blocks that a model keeps, exactly.
      block_size: side of a block, positions.
      num_blocks: blocks along one side of the longest input.
      causal: what a query block keeps depends on positions up to its first; otherwise on all.
      num_queries: sampled queries of each query block. 0 = none: then a causal model keeps what the
        habits of its heads say, whatever the input.
      query_spacing: of a causal model, positions between the query blocks that are sampled, whole
        blocks; those between have the samples of the last one before. None = every one is.
      num_sinks: first key blocks that are always kept, beside the diagonal.
      share_heads: the heads of a layer share their budget of a query block; otherwise each keeps as
        many blocks as the others.
      layer_shares: of the budget, one for each layer, in any unit; () = equal.
      habits: of each layer, `Habits` whose arrays are tuples; () = unknown.
      lookahead: sample the queries of the block itself in a causal model. It reads a prompt that is
        known, and cannot train or generate.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> blocks = DynamicBlocks(density=0.7, block_size=4, num_blocks=4, causal=True)
      >>> q = k = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
      >>> kept = blocks(q, k, None, Budget(blocks.count(4, 2)[0], None))
      >>> kept.shape, int(kept.sum()), bool(kept[:, :, 2, 0].all())
      ((1, 2, 4, 4), 14, True)
    """

    density: float
    block_size: int
    num_blocks: int
    causal: bool
    num_queries: int = 1
    query_spacing: int | None = None
    num_sinks: int = 1
    share_heads: bool = True
    layer_shares: tuple[float, ...] = ()
    habits: tuple[Habits, ...] = ()
    lookahead: bool = False

    def __post_init__(self):
        for name in ("block_size", "num_blocks"):
            check_setting(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        least = 0 if self._predicts else 1
        expected = f"in [{least}, block_size={self.block_size}]"
        check_setting(
            least <= self.num_queries <= self.block_size,
            "num_queries",
            self.num_queries,
            expected,
        )
        spacing, expected = self.query_spacing, f"a multiple of block_size={self.block_size}"
        if spacing is not None:
            is_whole = isinstance(spacing, int) and spacing > 0 and spacing % self.block_size == 0
            check_setting(is_whole, "query_spacing", spacing, expected)
            expected = "None where queries are sampled within their own block"
            check_setting(self._predicts, "query_spacing", spacing, expected)
            expected = "None with num_queries=0"
            check_setting(self.num_queries > 0, "query_spacing", spacing, expected)
            length = self.num_blocks * self.block_size
            expected = f"at most the {length} positions of the longest input"
            check_setting(spacing <= length, "query_spacing", spacing, expected)
        is_used = self._predicts or not self.habits
        check_setting(is_used, "habits", "some", "() where a query block's own queries are known")
        lengths = {len(part) for part in (self.habits, self.layer_shares) if part}
        expected = "of as many layers as layer_shares"
        check_setting(len(lengths) < 2, "habits", f"{len(self.habits)}", expected)
        check_setting(
            0 <= self.num_sinks <= self.num_blocks,
            "num_sinks",
            self.num_sinks,
            f"in [0, {self.num_blocks}]",
        )
        check_setting(
            self.causal or not self.lookahead, "lookahead", self.lookahead, "False without causal"
        )
        least_I = self._list_always(self.num_blocks).sum(-1)
        counts_I = count_row_blocks(self.num_blocks, density=self.density, causal=self.causal)
        expected = f"enough for {self.num_sinks} sinks and a diagonal"
        check_setting(bool((least_I <= counts_I).all()), "density", self.density, expected)
        positive = all(share > 0 for share in self.layer_shares)
        check_setting(positive, "layer_shares", self.layer_shares, "positive")
        together = self.share_heads or not self.layer_shares
        check_setting(together, "layer_shares", self.layer_shares, "() without share_heads")

    def count(self, num_blocks: int, num_heads: int) -> np.ndarray:
        """Return how many blocks all heads together keep of each query block.

        Args:
          num_blocks: I, at most those of the longest input.
          num_heads: N.

        Returns:
          i32[L | 1, I], those of the longest input, cut.
        """
        counts_I = count_row_blocks(self.num_blocks, density=self.density, causal=self.causal)
        counts_LI = spread_over_layers(
            counts_I,
            self.layer_shares or (1.0,),
            num_heads=num_heads,
            least_I=self._list_always(self.num_blocks).sum(-1),
            most_I=self._list_visible(self.num_blocks).sum(-1),
        )
        return counts_LI[:, :num_blocks].astype(np.int32)

    def budget(self, num_blocks: int, num_heads: int) -> Budget:
        """Return what a choice needs to know of its layer.

        Args:
          num_blocks: I, at most those of the longest input.
          num_heads: N.

        Returns:
          Budget whose arrays have a leading axis of layers, or 1.
        """
        habits = None
        if self.habits:
            habits = Habits(*(np.asarray(x, np.float32) for x in zip(*self.habits, strict=True)))
            shapes = [x.shape[1:] for x in habits]
            expected = f"of {num_heads} heads and {NUM_CLASSES} classes of distance"
            wanted = [(num_heads, NUM_CLASSES), (num_heads,), (num_heads,)]
            check_setting(shapes == wanted, "habits", f"{shapes=}", expected)
        return Budget(self.count(num_blocks, num_heads), habits)

    def measure_density(self, num_blocks: int, num_heads: int) -> np.ndarray:
        """Return the share of the visible blocks that each layer keeps.

        Args:
          num_blocks: I = J.
          num_heads: N.

        Returns:
          f64[L | 1], in (0, 1].
        """
        visible = self._list_visible(num_blocks).sum()
        return self.count(num_blocks, num_heads).sum(-1) / (num_heads * visible)

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        kv_mask_BS: jax.Array | None,
        budget: Budget,
    ) -> jax.Array:
        """Choose blocks.

        Args:
          q_BTNH: float[B, T, N, H], whole blocks.
          k_BSKH: float[B, T, K, H].
          kv_mask_BS: bool[B, T], True = real token; None = all.
          budget: of the layer, for as many blocks or more.

        Returns:
          bool[B, N, I, I], True = kept.
        """
        scores_BNIJ = self.score(q_BTNH, k_BSKH, kv_mask_BS, budget.habits)
        _, N, I, _ = scores_BNIJ.shape  # noqa: E741
        return self.keep(scores_BNIJ, budget.counts_I[:I], most=int(self.count(I, N).max()))

    def score(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        kv_mask_BS: jax.Array | None,
        habits: Habits | None,
    ) -> jax.Array:
        """Score the blocks of each head, without a gradient.

        Args:
          q_BTNH: float[B, T, N, H], whole blocks.
          k_BSKH: float[B, T, K, H].
          kv_mask_BS: bool[B, T], True = real token; None = all.
          habits: of the layer's heads, or None; of the causal form.

        Returns:
          f32[B, N, I, I].
        """
        if self._predicts:
            shares_BNIJ = self.look(q_BTNH, k_BSKH, kv_mask_BS)
            return predict_scores(shares_BNIJ, habits, num_sinks=self.num_sinks)
        positions_IR = sample_queries(
            q_BTNH.shape[1] // self.block_size,
            block_size=self.block_size,
            num_queries=self.num_queries,
            within=True,
        )
        shares_BNIRJ = self._compute_shares(q_BTNH, k_BSKH, kv_mask_BS, positions_IR)
        # Of the block's own queries it is cubes that a loss grows with.
        return (shares_BNIRJ**3).mean(3)

    def look(self, q_BTNH: jax.Array, k_BSKH: jax.Array, kv_mask_BS: jax.Array | None) -> jax.Array:
        """Say what the sampled queries of a causal model give to each key block on average.

        Args:
          q_BTNH: float[B, T, N, H], whole blocks.
          k_BSKH: float[B, T, K, H].
          kv_mask_BS: bool[B, T], True = real token; None = all.

        Returns:
          f32[B, N, I, I], without a gradient.
        """
        B, T, N, _ = q_BTNH.shape
        num_blocks = T // self.block_size
        if not self.num_queries:
            return jnp.zeros((B, N, num_blocks, num_blocks), jnp.float32)
        every = (self.query_spacing or self.block_size) // self.block_size
        positions_IR = sample_queries(
            num_blocks, block_size=self.block_size, num_queries=self.num_queries, within=False
        )
        sampled = self._compute_shares(q_BTNH, k_BSKH, kv_mask_BS, positions_IR[::every])
        return jnp.repeat(sampled.mean(3), every, axis=2)[:, :, :num_blocks]

    def _compute_shares(self, q_BTNH, k_BSKH, kv_mask_BS, positions_IR):
        """Return f32[B, N, I, R, J] of the sampled queries, I of those query blocks."""
        q, k = jax.lax.stop_gradient((q_BTNH, k_BSKH))
        num_rows, num_blocks = len(positions_IR), q.shape[1] // self.block_size
        num_groups, parts = min(_GROUPS, num_rows) if self.causal else 1, []
        for rows in np.array_split(np.arange(num_rows), num_groups):
            end = positions_IR[rows].max() // self.block_size + 1 if self.causal else num_blocks
            seen = slice(end * self.block_size)
            shares_BNIRJ = compute_shares(
                q[:, positions_IR[rows]],
                k[:, seen],
                jnp.asarray(positions_IR[rows]),
                None if kv_mask_BS is None else kv_mask_BS[:, seen],
                block_size=self.block_size,
                causal=self.causal,
            )
            parts.append(jnp.pad(shares_BNIRJ, ((0, 0),) * 4 + ((0, num_blocks - end),)))
        return jnp.concatenate(parts, axis=2)

    def keep(
        self, scores_BNIJ: jax.Array, counts_I: jax.Array | np.ndarray, *, most: int
    ) -> jax.Array:
        """Keep the highest scores, and what is always kept.

        Args:
          scores_BNIJ: f32[B, N, I, I].
          counts_I: i32[I], blocks of all heads together.
          most: int, the largest count.

        Returns:
          bool[B, N, I, I], True = kept.
        """
        num_blocks = scores_BNIJ.shape[-1]
        return keep_top_blocks(
            scores_BNIJ,
            counts_I,
            always_IJ=self._list_always(num_blocks),
            visible_IJ=self._list_visible(num_blocks),
            most=most,
            shared=self.share_heads,
        )

    @property
    def _predicts(self):
        """Whether a query block's own queries are not known."""
        return self.causal and not self.lookahead

    def _list_visible(self, num_blocks):
        visible_IJ = np.ones((num_blocks, num_blocks), bool)
        return np.tril(visible_IJ) if self.causal else visible_IJ

    def _list_always(self, num_blocks):
        sinks_J = np.arange(num_blocks) < self.num_sinks
        return (np.eye(num_blocks, dtype=bool) | sinks_J) & self._list_visible(num_blocks)
