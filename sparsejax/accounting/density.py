"""How much of a model a phase computes: densities by layer, and the FLOPs that follow.

Legend: L layers.
"""

from typing import NamedTuple

import jax
import numpy as np

from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.models import TransformerConfig, sparse_weight_patterns
from sparsejax.patterns import NMPattern, WeightPattern
from sparsejax.processes import find_replicated
from sparsejax.recipes import Phase, compute_attention_density, compute_weight_density
from sparsejax.types import PyTree


class Density(NamedTuple):
    """What a phase keeps of a model, by layer.

    Attributes:
      attention: f32[L], fraction of the visible attention blocks, or of the visible pairs of
        positions where attention goes by positions.
      weights: name -> f32[L], fraction of the entries of a sparse weight; empty if the phase has
        none.
    """

    attention: np.ndarray
    weights: dict[str, np.ndarray]

    @property
    def mean_weights(self) -> float | None:
        """Mean over the sparse weights, each counting the same; None if there is none."""
        if not self.weights:
            return None
        return float(np.mean([density.mean() for density in self.weights.values()]))


class PhaseFlops(NamedTuple):
    """FLOPs of a step on one example, by part: "layer 0", "decoder layer 0", "head", "patches".

    Attributes:
      forward: part -> float.
      backward: part -> float, of the gradients that every step needs.
      update: part -> float, what an update of the topology adds: the gradient of pruned weights.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    update: dict[str, float]

    @property
    def total(self) -> float:
        """FLOPs of all parts and passes."""
        return sum(sum(parts.values()) for parts in self)


def compute_density(model: TransformerConfig, masks: PyTree, phase: Phase) -> Density:
    """Return what a phase keeps.

    Args:
      masks: nested dict of the stacked model's masks.
      phase: Phase, in which attention and weights may be dense whatever the masks hold.
    """
    attention = np.ones(model.num_layers, np.float32)
    if phase.sparse_attention and phase.position_mask is not None:
        # On each process by itself.
        make_mask = jax.jit(phase.position_mask, static_argnums=0)
        kept_TT, visible_TT = jax.device_get(make_mask(model.max_length)), True
        if model.causal:
            visible_TT = np.tri(model.max_length, dtype=bool)
        attention *= kept_TT.mean(where=visible_TT)
    elif phase.sparse_attention and phase.choose_blocks is not None:
        attention *= phase.choose_blocks.measure_density(
            model.max_length // model.block.block_q, model.num_heads
        )
    elif phase.sparse_attention:
        measure = jax.jit(
            compute_attention_density,
            static_argnames="causal",
            out_shardings=find_replicated(masks),
        )
        attention = jax.device_get(measure(masks, causal=model.causal))
    weights = {}
    if phase.sparse_weights:
        measure = jax.jit(compute_weight_density, out_shardings=find_replicated(masks))
        weights = jax.device_get(measure(masks))
    return Density(attention, weights)


def split_phase_flops(
    model: TransformerConfig, phase: Phase, density: Density, *, dense_gradient: bool = False
) -> PhaseFlops:
    """Count the FLOPs of forward and backward pass on one example in a phase, by part.

    The three products of a linear layer leave out different things. y = x (W * M) computes what M
    keeps; dx = dy (W * M)^T too if the mask is transposable or unstructured, and everything if not;
    dW = x^T dy computes everything, half where dy is pruned to two of every four tokens, or what M
    keeps where the phase masks gradients, or the share that it says.

    Args:
      density: Density of the phase.
      dense_gradient: bool, whether dW computes everything all the same.

    Returns:
      PhaseFlops, as `accounting/flops.py` counts; of both documents if there are two towers. The
      sentences of an encoder-decoder are counted with all their positions, padding included.
    """
    patterns = sparse_weight_patterns(model)
    share = 1.0 if phase.grad_pruning == "none" else 0.5
    every = dict.fromkeys(density.weights, share)
    kept = {name: share * d for name, d in density.weights.items()}
    thinned = {name: d for name, d in density.weights.items() if _thins_backward(patterns[name])}

    def count(weights):
        flops = count_transformer_flops(
            model, attention_density=density.attention, weight_density=weights
        )
        return {part: model.num_towers * x for part, x in flops.parts.items()}

    y, dx, dw = (count(w) for w in (density.weights, thinned, every))
    step_dw = count(kept) if phase.masked_gradients else dw
    if phase.gradient_density is not None:
        step_dw = count(dict.fromkeys(density.weights, share * phase.gradient_density))
    return PhaseFlops(
        forward=y,
        backward={part: dx[part] + step_dw[part] for part in dx},
        update={part: (dw[part] - step_dw[part]) * dense_gradient for part in dw},
    )


def count_phase_flops(
    model: TransformerConfig, phase: Phase, density: Density, *, dense_gradient: bool = False
) -> float:
    """Count the FLOPs of forward and backward pass on one example in a phase.

    Args:
      density: Density of the phase.
      dense_gradient: bool, as `split_phase_flops`.

    Returns:
      float, all that `split_phase_flops` counts.
    """
    return split_phase_flops(model, phase, density, dense_gradient=dense_gradient).total


def make_dense(density: Density) -> Density:
    """Return the density of a phase that keeps everything.

    Args:
      density: Density, of as many layers.
    """
    return Density(np.ones_like(density.attention), {})


def describe_density(density: Density) -> str:
    """Write densities for a person, one number where all layers agree.

    Example:
      >>> describe_density(Density(np.ones(2), {"mlp/up": np.array([0.5, 0.25])}))
      'attention density per layer 1, density of mlp/up per layer [0.5, 0.25]'
    """

    def write(values):
        values = np.round(values.astype(float), 3)
        return f"{values[0]:g}" if (values == values[0]).all() else str(values.tolist())

    parts = {"attention density": density.attention}
    parts |= {f"density of {name}": values for name, values in density.weights.items()}
    return ", ".join(f"{title} per layer {write(values)}" for title, values in parts.items())


def _thins_backward(pattern: WeightPattern) -> bool:
    return not isinstance(pattern, NMPattern) or pattern.transposable
