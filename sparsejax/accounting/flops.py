"""Floating-point operations of a transformer, counted from shapes and densities.

Conventions. A multiply-add is 2 FLOPs. Only matrix products count: no softmax, normalisation,
activation, bias, embedding look-up, position encoding or optimizer. The backward pass of a
product is two products of the same size, for either operand, hence twice the forward pass;
rematerialisation is not counted. What a density below 1 leaves out is not counted, whether or
not the hardware in use can save it, and it is left out of both passes alike; where the products
of the backward pass keep other parts, `training/density.py` counts each by itself.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

_LAYER_WEIGHTS = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
_HEAD = "embedding"


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
    """

    qkv: float
    scores: float
    values: float
    output: float
    up: float
    down: float

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
        return self.attention + self.linears

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass, twice those of the forward pass."""
        return 2 * self.forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerFlops:
    """FLOPs of a transformer for one sequence.

    Attributes:
      layers: tuple of LayerFlops, first layer first.
      head: float, forward FLOPs of the language-model head or the classifier.
      patches: float, forward FLOPs of the embedding of patches.
    """

    layers: tuple[LayerFlops, ...]
    head: float
    patches: float = 0.0

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass: inference on one sequence."""
        return sum(layer.forward for layer in self.layers) + self.head + self.patches

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass, twice those of the forward pass."""
        return 2 * self.forward

    @property
    def training(self) -> float:
        """FLOPs of forward and backward pass: one sequence of a training step."""
        return self.forward + self.backward


def count_transformer_flops(
    *,
    num_layers: int,
    model_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    sequence_length: int,
    causal: bool,
    gated_mlp: bool = False,
    vocab_size: int = 0,
    num_classes: int = 0,
    patch_values: int = 0,
    attention_density: ArrayLike = 1.0,
    weight_density: Mapping[str, ArrayLike] | None = None,
) -> TransformerFlops:
    """Count the FLOPs of a transformer on one sequence, by layer and component.

    With T = sequence_length, D = model_dim, H = head_dim, N and K = num_heads and num_kv_heads,
    P = T^2 query-key pairs, or T (T + 1) / 2 if causal:

      qkv      2 T D (N + 2 K) H   * weight_density["attention/qkv"]
      scores   2 P N H             * attention_density
      values   2 P N H             * attention_density
      output   2 T N H D           * weight_density["attention/out"]
      up       2 T D mlp_dim, twice that if gated, * weight_density["mlp/up"]
      down     2 T D mlp_dim       * weight_density["mlp/down"]
      head     2 T D vocab_size    * weight_density["embedding"], or 2 D num_classes
      patches  2 T D patch_values

    The module's docstring states what is counted and what is not. Multiply by the batch size
    for a step, divide by the sequence length for a token.

    Args:
      num_layers: int, transformer layers.
      model_dim: int, width of the residual stream.
      num_heads: int, query heads; a multiple of `num_kv_heads`.
      num_kv_heads: int, key and value heads.
      head_dim: int, width of a head.
      mlp_dim: int, hidden width of the feed-forward block.
      sequence_length: int, positions of one sequence.
      causal: bool, whether only the visible half of the query-key pairs is counted. False counts
        the full square, also the usual convention for dense causal models.
      gated_mlp: bool, whether the feed-forward block has a third, gating matrix.
      vocab_size: int, outputs of the head at every position; 0 leaves the head out.
      num_classes: int, outputs of a classifier at one pooled position. If positive, it is the
        head, and `vocab_size` merely sizes an embedding, which costs no FLOPs.
      patch_values: int, inputs of the embedding of a patch; 0 for token ids, which are looked up.
      attention_density: float[] or float[num_layers] in [0, 1], kept fraction of the counted pairs.
      weight_density: name -> float[] or float[num_layers] in [0, 1], kept fraction of a weight;
        1 for weights without a name. That of the embedding, tied to the head, is float[] or
        float[1].

    Returns:
      TransformerFlops for one sequence.

    Raises:
      ValueError: if a size is not positive, one that may be 0 is negative, the heads
        are not a multiple of the key/value heads, a density is outside [0, 1] or neither one
        number nor one per layer, or a weight is unknown.

    Example:
      >>> gpt2 = dict(num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12, head_dim=64,
      ...             mlp_dim=3072, vocab_size=50304, sequence_length=1024, causal=True)
      >>> dense = count_transformer_flops(**gpt2)
      >>> sparse = count_transformer_flops(**gpt2, attention_density=0.1)
      >>> round(dense.training / sparse.training, 3)
      1.068
    """
    sizes = {
        "num_layers": num_layers,
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
        "sequence_length": sequence_length,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "patch_values": patch_values}
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {name}={value}")
    if num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        )

    pairs = sequence_length * (sequence_length + 1) // 2 if causal else sequence_length**2
    qkv = 2 * sequence_length * model_dim * (num_heads + 2 * num_kv_heads) * head_dim
    scores = 2 * pairs * num_heads * head_dim
    output = 2 * sequence_length * num_heads * head_dim * model_dim
    down = 2 * sequence_length * model_dim * mlp_dim
    names = (*_LAYER_WEIGHTS, _HEAD)
    weights = dict.fromkeys(names, 1.0) | dict(weight_density or {})
    if unknown := set(weights) - set(names):
        raise ValueError(f"weight_density must name some of {names}, got {sorted(unknown)}")
    densities = [
        _per_layer(f"weight_density[{name!r}]", weights[name], num_layers)
        for name in _LAYER_WEIGHTS
    ]
    (to_head,) = _per_layer(f"weight_density[{_HEAD!r}]", weights[_HEAD], 1)
    densities.append(_per_layer("attention_density", attention_density, num_layers))
    layers = tuple(
        LayerFlops(
            qkv=qkv * to_qkv,
            scores=scores * attention,
            values=scores * attention,
            output=output * to_output,
            up=down * (2 if gated_mlp else 1) * to_up,
            down=down * to_down,
        )
        for to_qkv, to_output, to_up, to_down, attention in zip(*densities, strict=True)
    )
    head = num_classes or sequence_length * vocab_size * to_head
    return TransformerFlops(
        layers=layers,
        head=2.0 * model_dim * head,
        patches=2.0 * sequence_length * model_dim * patch_values,
    )


def _per_layer(name: str, density: ArrayLike, num_layers: int) -> list[float]:
    densities = np.asarray(density, np.float64)
    if densities.shape not in ((), (num_layers,)):
        raise ValueError(
            f"{name} must be one number or one per layer, got {name}={density} for "
            f"num_layers={num_layers}"
        )
    if not ((densities >= 0) & (densities <= 1)).all():
        raise ValueError(f"{name} must be within [0, 1], got {name}={density}")
    return np.broadcast_to(densities, num_layers).tolist()
