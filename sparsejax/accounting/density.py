"""How much of a model a phase computes: densities by layer, and the FLOPs that follow.

Legend: L layers.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.models import (
    EMBEDDING,
    GATED_ACTIVATIONS,
    TransformerConfig,
    sparse_weight_patterns,
)
from sparsejax.patterns import NMPattern, WeightPattern
from sparsejax.recipes import Phase, compute_attention_density, compute_weight_density
from sparsejax.types import PyTree

_DECODER = "decoder/"


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
      model: TransformerConfig.
      masks: nested dict of the stacked model's masks.
      phase: Phase, in which attention and weights may be dense whatever the masks hold.

    Returns:
      Density.
    """
    attention = np.ones(model.num_layers, np.float32)
    if phase.sparse_attention and phase.position_mask is not None:
        kept_TT, visible_TT = np.asarray(phase.position_mask(model.max_length)), True
        if model.causal:
            visible_TT = np.tri(model.max_length, dtype=bool)
        attention *= kept_TT.mean(where=visible_TT)
    elif phase.sparse_attention:
        attention = np.asarray(compute_attention_density(masks, causal=model.causal))
    weights = {}
    if phase.sparse_weights:
        weights = jax.device_get(compute_weight_density(masks))
    return Density(attention, weights)


def split_phase_flops(
    model: TransformerConfig, phase: Phase, density: Density, *, dense_gradient: bool = False
) -> PhaseFlops:
    """Count the FLOPs of forward and backward pass on one example in a phase, by part.

    The three products of a linear layer leave out different things. y = x (W * M) computes what M
    keeps; dx = dy (W * M)^T too if the mask is transposable or unstructured, and everything if not;
    dW = x^T dy computes everything, half where dy is pruned to two of every four tokens, or what M
    keeps where the phase masks gradients.

    Args:
      model: TransformerConfig.
      phase: Phase.
      density: Density of the phase.
      dense_gradient: bool, whether dW computes everything all the same.

    Returns:
      PhaseFlops, as `training/flops.py` counts; of both documents if there are two towers. The
      sentences of an encoder-decoder are counted with all their positions, padding included.
    """
    patterns = sparse_weight_patterns(model)
    share = 1.0 if phase.grad_pruning == "none" else 0.5
    every = dict.fromkeys(density.weights, share)
    kept = {name: share * d for name, d in density.weights.items()}
    thinned = {name: d for name, d in density.weights.items() if _thins_backward(patterns[name])}

    def count(weights):
        parts = _count_forward(model, density.attention, weights)
        return {part: model.num_towers * flops for part, flops in parts.items()}

    y, dx, dw = (count(w) for w in (density.weights, thinned, every))
    step_dw = count(kept) if phase.masked_gradients else dw
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
      model: TransformerConfig.
      phase: Phase.
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

    Returns:
      Density.
    """
    return Density(np.ones_like(density.attention), {})


def describe_density(density: Density) -> str:
    """Write densities for a person, one number where all layers agree.

    Args:
      density: Density.

    Returns:
      str.

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


def _count_forward(model, attention_density, weight_density) -> dict[str, float]:
    count = functools.partial(
        count_transformer_flops,
        model_dim=model.model_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        mlp_dim=model.mlp_dim,
        gated_mlp=model.mlp_activation in GATED_ACTIVATIONS,
        sequence_length=model.max_length,
    )
    in_decoder = {}
    if model.num_decoder_layers:
        in_decoder = {
            name: density
            for name, density in weight_density.items()
            if name.startswith(_DECODER) or name == EMBEDDING
        }
    first = count(
        num_layers=model.num_layers,
        causal=model.causal,
        vocab_size=0 if model.num_decoder_layers else model.vocab_size,
        num_classes=model.num_classes,
        patch_values=model.patch_values,
        attention_density=attention_density,
        weight_density={n: x for n, x in weight_density.items() if n not in in_decoder},
    )
    parts = {"patches": first.patches} if model.patch_values else {}
    parts |= {f"layer {index}": layer.forward for index, layer in enumerate(first.layers)}
    if not model.num_decoder_layers:
        return parts | {"head": first.head}
    decoder = count(
        num_layers=model.num_decoder_layers,
        causal=True,
        vocab_size=model.vocab_size,
        weight_density={n.removeprefix(_DECODER): x for n, x in in_decoder.items()},
    )
    # Queries of the target, keys and values of the source: as many as in a layer of the encoder.
    to_source = count(num_layers=model.num_decoder_layers, causal=False)
    for index, (layer, cross) in enumerate(zip(decoder.layers, to_source.layers, strict=True)):
        cross_attention = cross.qkv + cross.attention + cross.output
        parts[f"decoder layer {index}"] = layer.forward + cross_attention
    return parts | {"head": decoder.head}
