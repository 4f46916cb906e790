"""Which weights a model needs least, by a few texts: magnitudes, scaled by what meets them.

A weight that multiplies a large feature matters more than its magnitude says. Nothing is trained,
and weights keep their values.

Legend: L layers, K contracted axis of a weight, the features of its input, N columns, I x J blocks.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.masks import (
    block_scores,
    count_kept,
    magnitude_mask,
    magnitude_nm_mask,
    transposable_mask,
)
from sparsejax.models import SparsityMask, Transformer, measure_inputs, sparse_weight_patterns
from sparsejax.models.config import LINEAR_LAYERS
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern


class InputStatistics(NamedTuple):
    """Squares of what linear layers have read, summed over tokens.

    Attributes:
      squares: layer name -> f32[L, K].
      count: i32[], tokens.
    """

    squares: dict[str, jax.Array]
    count: jax.Array

    @property
    def norms(self) -> dict[str, jax.Array]:
        """Layer name -> f32[L, K], the root of the mean square of each feature."""
        return {name: jnp.sqrt(x / self.count) for name, x in self.squares.items()}


def measure_statistics(model: Transformer, tokens: jax.Array) -> InputStatistics:
    """Sum the squares of what every linear layer of the blocks reads; pure, to be jitted.

    Args:
      model: called as its own options say.
      tokens: as of a call of the model, without padding.

    Returns:
      InputStatistics of these tokens.

    Numerics:
      f32, whatever the type of activations.
    """

    def sum_squares(x):
        return jnp.square(x.astype(jnp.float32)).sum(range(x.ndim - 1))

    squares = measure_inputs(model, tokens, sum_squares)
    positions = tokens[..., 0] if model.config.patch_values else tokens
    return InputStatistics(squares, jnp.int32(positions.size))


def collect_statistics(
    model: Transformer, batches: Iterable[np.ndarray | jax.Array]
) -> InputStatistics:
    """Sum statistics over batches, of which one at a time is in memory.

    Args:
      model: called as its own options say.
      batches: each as of a call of the model, without padding.

    Returns:
      InputStatistics of all tokens.

    Raises:
      ValueError: if there is no batch, or a sum is not finite.
    """
    graphdef, state = nnx.split(model)

    def measure(state, tokens):
        return measure_statistics(nnx.merge(graphdef, state), tokens)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, state, tokens):
        return jax.tree.map(jnp.add, total, measure(state, tokens))

    total = None
    for tokens in batches:
        if total is None:
            shapes = jax.eval_shape(measure, state, tokens)
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total = add(total, state, tokens)
    if total is None:
        raise ValueError("batches must hold at least one batch of tokens, got none")
    for name, squares_LK in total.squares.items():
        layers = np.flatnonzero(~np.isfinite(squares_LK).all(-1)).tolist()
        if layers:
            raise ValueError(f"what {name!r} reads must be finite, but is not in layers {layers}")
    return total


def score_weights(
    model: Transformer, norms: Mapping[str, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """Score every weight that has a mask.

    score_kn = |w_kn| ||x||_k

    Args:
      norms: layer name -> f32[L, K], `InputStatistics.norms`; None scores by magnitude alone.

    Returns:
      dict, layer name -> f32[L, K, N].

    Raises:
      ValueError: if no weight has a mask, or one has that is not of the blocks.

    References:
      Sun et al., Wanda, arXiv:2306.11695, equation 1.
    """
    scores = {}
    for name in _list_patterns(model):
        branch, _, layer = name.rpartition("/")
        w_LKN = getattr(getattr(model.blocks, branch), layer).kernel[...]
        scores[name] = jnp.abs(w_LKN) * (1 if norms is None else norms[name][..., None])
    return scores


def choose_mask(
    scores_LKN: jax.Array, pattern: WeightPattern, density: float | None = None
) -> jax.Array:
    """Keep the weights of the highest scores that a pattern allows.

    Unstructured weights are compared within each column, that is for each output; blocks, by the
    sum of their scores, within each layer.

    Args:
      scores_LKN: f32[L, K, N], not negative.
      pattern: of the weight.
      density: share that is kept, in (0, 1]; None for an NMPattern, which says it itself.

    Returns:
      bool[L, K, N], or bool[L, I, J] of blocks; True = kept.

    Raises:
      ValueError: if the density is missing, out of range or of no use, or there is no search for
        the pattern.
    """
    _check_density(pattern, density)
    if isinstance(pattern, NMPattern):
        if pattern.transposable:
            return transposable_mask(scores_LKN)
        return magnitude_nm_mask(scores_LKN, n=pattern.n, m=pattern.m, axis=-2)
    assert density is not None
    if isinstance(pattern, WeightBlocks):
        scores_LIJ = block_scores(scores_LKN, (pattern.rows, pattern.columns))
        num_kept = count_kept(scores_LIJ[0].size, density)
        return jax.vmap(lambda scores_IJ: magnitude_mask(scores_IJ, num_kept))(scores_LIJ)
    num_kept = count_kept(scores_LKN.shape[1], density)
    of_column = functools.partial(magnitude_mask, num_kept=num_kept)
    return jax.vmap(jax.vmap(of_column, in_axes=1, out_axes=1))(scores_LKN)


def set_weight_masks(model: Transformer, masks: Mapping[str, jax.Array]) -> Transformer:
    """Return a model of the same parameters with other masks of weights.

    Args:
      masks: layer name -> what `choose_mask` returns.
    """
    graphdef, params, state = nnx.split(model, nnx.Param, SparsityMask)
    plain = nnx.to_pure_dict(state)
    for name, mask in masks.items():
        branch, _, layer = name.rpartition("/")
        plain["blocks"][branch][layer]["kernel_mask"] = mask
    return nnx.merge(graphdef, params, plain)


def prune(
    model: Transformer,
    batches: Iterable[np.ndarray | jax.Array],
    *,
    density: float | None = None,
) -> Transformer:
    """Prune the weights that matter least for a few texts, without training.

    All layers are measured in one pass over the texts, before anything is pruned. The released code
    of Wanda measures each block behind pruned ones.

    Args:
      model: whose `config.sparse_weights` say which weights of the blocks have masks.
      batches: i32[B, T] each, texts without padding that nothing is measured on later.
      density: share that is kept of unstructured weights and of blocks; None where all patterns are
        n:m.

    Returns:
      Transformer with the same parameters, whose masks prune.

    Raises:
      ValueError: if no weight has a mask, one has that is not of the blocks, the density is missing
        or has no use, or there is no batch.

    References:
      Sun et al., Wanda, arXiv:2306.11695.

    Example:
      `model = load_pretrained(path, sparse_weights=(("mlp/.*", NMPattern()),)).model`, then
      `pruned = prune(model, [tokens])`.
    """
    patterns = _list_patterns(model)
    by_density = [name for name, p in patterns.items() if not isinstance(p, NMPattern)]
    densities = dict.fromkeys(by_density or patterns, density)
    for name, pattern in patterns.items():
        _check_density(pattern, densities.get(name))
    scores = score_weights(model, collect_statistics(model, batches).norms)
    masks = {
        name: choose_mask(scores[name], pattern, densities.get(name))
        for name, pattern in patterns.items()
    }
    return set_weight_masks(model, masks)


def _list_patterns(model):
    patterns = sparse_weight_patterns(model.config)
    if not patterns:
        raise ValueError("sparse_weights must name the weights to prune, got none")
    for name in patterns:
        if name not in LINEAR_LAYERS:
            raise ValueError(f"weights to prune must be of {LINEAR_LAYERS}, got {name!r}")
    return patterns


def _check_density(pattern, density):
    if not isinstance(pattern, NMPattern):
        if density is None or not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1] for '{pattern}' weights, got {density}")
        return
    if density is not None:
        raise ValueError(f"density must be None for '{pattern}' weights, got {density}")
    if pattern.transposable and (pattern.n, pattern.m) != (2, 4):
        raise ValueError(f"transposable patterns must be 2:4, got '{pattern}'")
