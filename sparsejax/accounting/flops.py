"""Floating-point operations of a transformer, counted from shapes and densities.

Conventions. A multiply-add is 2 FLOPs. Only matrix products count: no softmax, normalisation,
activation, bias, embedding look-up, position encoding or optimizer. The backward pass of a
product is two products of the same size, for either operand, hence twice the forward pass;
rematerialisation is not counted. What a density below 1 leaves out is not counted, whether or
not the hardware in use can save it, and it is left out of both passes alike; where the products
of the backward pass keep other parts, `accounting/density.py` counts each by itself.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from sparsejax.models import EMBEDDING, GATED_ACTIVATIONS, TransformerConfig
from sparsejax.models.config import DECODER_LINEAR_LAYERS, LINEAR_LAYERS

_DECODER = "decoder/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Forward FLOPs of one transformer layer for one sequence, by component.

    Attributes:
      qkv: float, projections to queries, keys and values.
      scores: float, queries times keys.
      values: float, probabilities times values.
      output: float, projection of the heads back to the model width.
      up: float, first product of the feed-forward block, the gate included.
      down: float, second product of the feed-forward block.
      cross_attention: float, all products of a decoder's attention to the encoded source.
    """

    qkv: float
    scores: float
    values: float
    output: float
    up: float
    down: float
    cross_attention: float = 0.0

    @property
    def attention(self) -> float:
        """FLOPs of the products that the attention pattern thins out: scores and values."""
        return self.scores + self.values

    @property
    def linears(self) -> float:
        """FLOPs of the products with weights: qkv, output, up and down."""
        return self.qkv + self.output + self.up + self.down

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.attention + self.linears + self.cross_attention

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass, twice those of the forward pass."""
        return 2 * self.forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerFlops:
    """FLOPs of a transformer for one sequence, or one source with its target.

    Attributes:
      layers: tuple of LayerFlops, first layer first.
      decoder_layers: the same of a decoder.
      head: forward FLOPs of the language-model head or the classifier.
      patches: forward FLOPs of the embedding of patches.
    """

    layers: tuple[LayerFlops, ...]
    decoder_layers: tuple[LayerFlops, ...] = ()
    head: float
    patches: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Forward FLOPs by part: "patches", "layer 0", ..., "decoder layer 0", ..., "head"."""
        parts = {"patches": self.patches} if self.patches else {}
        parts |= {f"layer {i}": layer.forward for i, layer in enumerate(self.layers)}
        parts |= {f"decoder layer {i}": x.forward for i, x in enumerate(self.decoder_layers)}
        return parts | {"head": self.head}

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass: inference on one sequence."""
        return sum(self.parts.values())

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass, twice those of the forward pass."""
        return 2 * self.forward

    @property
    def training(self) -> float:
        """FLOPs of forward and backward pass: one sequence of a training step."""
        return self.forward + self.backward


def count_transformer_flops(
    config: TransformerConfig,
    *,
    attention_density: ArrayLike = 1.0,
    weight_density: Mapping[str, ArrayLike] | None = None,
) -> TransformerFlops:
    """Count the FLOPs of a transformer on one sequence, by layer and component.

    With T positions, D = model_dim, H = head_dim, N and K query and key/value heads, and
    P = T^2 query-key pairs, or T (T + 1) / 2 if causal:

      qkv      2 T D (N + 2 K) H   * weight_density["attention/qkv"]
      scores   2 P N H             * attention_density
      values   2 P N H             * attention_density
      output   2 T N H D           * weight_density["attention/out"]
      up       2 T D mlp_dim, twice that if gated, * weight_density["mlp/up"]
      down     2 T D mlp_dim       * weight_density["mlp/down"]
      head     2 T D vocab_size    * weight_density["embedding"], or 2 D num_classes;
               2 T D^2 more with `head_transform`
      patches  2 T D patch_values

    A decoder's layers attend densely: to their own past, and to the source, which costs the same as
    the dense attention of an encoder's layer, projections included. The head is at the end of the
    decoder then. A classifier's head counts at one pooled position.

    The module's docstring states what is counted and what is not. Multiply by the batch size for a
    step, divide by T for a token; of two towers, each is one sequence.

    Args:
      config: the model; its T is `max_length`.
      attention_density: float[] or float[num_layers] in [0, 1], kept fraction of the counted pairs.
      weight_density: layer name, such as "mlp/up" or "decoder/mlp/up" -> float[] or float[layers]
        in [0, 1], kept fraction of a weight; 1 for weights without a name. That of the embedding,
        tied to the head, is float[] or float[1].

    Raises:
      ValueError: if a density is outside [0, 1] or neither one number nor one per layer, or a
        weight is unknown.

    Example:
      >>> from sparsejax.patterns import BlockPattern
      >>> gpt2 = TransformerConfig(num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12,
      ...   mlp_dim=3072, vocab_size=50304, max_length=1024, causal=True,
      ...   block=BlockPattern(block_q=64, block_kv=64))
      >>> dense = count_transformer_flops(gpt2)
      >>> sparse = count_transformer_flops(gpt2, attention_density=0.1)
      >>> round(dense.training / sparse.training, 3)
      1.068
    """
    weights = dict(weight_density or {})
    known = (*LINEAR_LAYERS, *DECODER_LINEAR_LAYERS, EMBEDDING)
    if unknown := set(weights) - set(known):
        raise ValueError(f"weight_density must name some of {known}, got {sorted(unknown)}")
    layers = _count_layers(
        config, config.num_layers, config.causal, weights, attention_density=attention_density
    )
    decoder_layers = ()
    if config.num_decoder_layers:
        decoder_layers = tuple(
            dataclasses.replace(layer, cross_attention=_count_dense_attention(config))
            for layer in _count_layers(
                config, config.num_decoder_layers, True, weights, prefix=_DECODER
            )
        )
    (to_head,) = _spread(f"weight_density[{EMBEDDING!r}]", weights.get(EMBEDDING, 1.0), 1)
    T, D = config.max_length, config.model_dim
    head = config.num_classes or T * config.vocab_size * to_head
    if config.head_transform:
        head += T * D
    return TransformerFlops(
        layers=layers,
        decoder_layers=decoder_layers,
        head=2.0 * D * head,
        patches=2.0 * T * D * config.patch_values,
    )


def _count_layers(
    config: TransformerConfig,
    num_layers: int,
    causal: bool,
    weights: Mapping[str, ArrayLike],
    *,
    prefix: str = "",
    attention_density: ArrayLike = 1.0,
) -> tuple[LayerFlops, ...]:
    """Count a stack of blocks; `prefix` goes before the names of its weights."""
    T, D, N, H = config.max_length, config.model_dim, config.num_heads, config.head_dim
    pairs = T * (T + 1) // 2 if causal else T**2
    qkv = 2 * T * D * (N + 2 * config.num_kv_heads) * H
    scores = 2 * pairs * N * H
    output = 2 * T * N * H * D
    down = 2 * T * D * config.mlp_dim
    up = down * (2 if config.mlp_activation in GATED_ACTIVATIONS else 1)
    names = [prefix + name for name in LINEAR_LAYERS]
    densities = [
        _spread(f"weight_density[{name!r}]", weights.get(name, 1.0), num_layers) for name in names
    ]
    densities.append(_spread("attention_density", attention_density, num_layers))
    return tuple(
        LayerFlops(
            qkv=qkv * to_qkv,
            scores=scores * attention,
            values=scores * attention,
            output=output * to_output,
            up=up * to_up,
            down=down * to_down,
        )
        for to_qkv, to_output, to_up, to_down, attention in zip(*densities, strict=True)
    )


def _count_dense_attention(config: TransformerConfig) -> float:
    (layer,) = _count_layers(config, 1, False, {})
    return layer.qkv + layer.attention + layer.output


def _spread(name: str, density: ArrayLike, num_layers: int) -> list[float]:
    """Return a density for each layer."""
    densities = np.asarray(density, np.float64)
    if densities.shape not in ((), (num_layers,)):
        raise ValueError(
            f"{name} must be one number or one per layer, got {name}={density} for "
            f"num_layers={num_layers}"
        )
    if not ((densities >= 0) & (densities <= 1)).all():
        raise ValueError(f"{name} must be within [0, 1], got {name}={density}")
    return np.broadcast_to(densities, num_layers).tolist()
