"""What a transformer is made of, as one frozen and checked value."""

import dataclasses
import re
from typing import Literal, get_args

from sparsejax.models.mlp import MLPActivation
from sparsejax.patterns import BlockPattern, NMPattern, WeightPattern

LINEAR_LAYERS = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
"""The linear layers of a block, whose weights may be sparse."""

EMBEDDING = "embedding"
"""The embedding of tokens, tied to the head of a language model; its weight may be sparse too."""

DECODER_LINEAR_LAYERS = ("decoder/mlp/up", "decoder/mlp/down")
"""Those of a decoder's block, beside the encoder's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and options of `Transformer`.

    Attributes:
      vocab_size: int, number of token ids; 0 with patches.
      num_layers: int, transformer blocks.
      model_dim: int, width of the residual stream; a multiple of `num_heads`.
      num_heads: int, query heads.
      num_kv_heads: int, key/value heads; divides `num_heads` (grouped queries when smaller).
      mlp_dim: int, hidden width of the feed-forward layer; a gated one computes twice as many
        values, half of them gates.
      max_length: int, positions; the block pattern divides it.
      causal: bool, True for a decoder, which sees the past only; False for an encoder.
      num_classes: int, 0 gives logits of the vocabulary at every position: of the next token in a
        decoder, of the token itself in an encoder (masked language model). Otherwise the model, an
        encoder, pools and classifies.
      num_towers: int, documents per example; 2 compares two (document matching).
      num_decoder_layers: int, blocks of a decoder that attends to the output of the `num_layers`
        blocks before it, those of a bidirectional encoder; 0 = no decoder.
      mlp_activation: "gelu" or "relu", or the gated "geglu" or "swiglu".
      sparse_weights: pairs of a regular expression and a WeightPattern. A linear layer of a block,
        one of `LINEAR_LAYERS` or, in a decoder, `DECODER_LINEAR_LAYERS`, and the `EMBEDDING` that
        is tied to a head, take the pattern of the first expression that matches the whole name, and
        are dense if none does. An embedding has no NMPattern.
      positions: "learned" table or "rotary" embedding.
      block: BlockPattern of the attention mask.
      dropout_rate: float in [0, 1), applied to embeddings and residual branches.
      init_std: float or None, standard deviation of weight matrices; residual outputs get it
        divided by sqrt(2 num_layers) as in GPT-2, in a decoder by sqrt(3 num_decoder_layers).
        None takes LeCun-normal kernels.
      dtype: "float32", "bfloat16" or "float16", type of activations and matrix products.
        Parameters are always float32.
      use_bias: bool, add biases in linear layers; norms keep theirs.
      embedding_norm: bool, normalise the sum of embedding and position.
      patch_values: int, bytes of a patch where the inputs are patches; 0 for token ids.
      remat: bool, recompute each block in the backward pass instead of storing it.
      scan_layers: bool, compile one block and scan it; False unrolls the same stacked
        parameters.

    Raises:
      ValueError: if a value is out of range or two values contradict each other.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    max_length: int
    causal: bool
    num_classes: int = 0
    num_towers: int = 1
    num_decoder_layers: int = 0
    mlp_activation: MLPActivation = "gelu"
    sparse_weights: tuple[tuple[str, WeightPattern], ...] = ()
    positions: Literal["learned", "rotary"] = "learned"
    block: BlockPattern
    dropout_rate: float = 0.0
    init_std: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    use_bias: bool = True
    embedding_norm: bool = False
    patch_values: int = 0
    remat: bool = False
    scan_layers: bool = True

    def __post_init__(self):
        sizes = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_dim", "max_length")
        for name in sizes if self.patch_values else ("vocab_size", *sizes):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self._check_patches()
        _check(
            self.model_dim % self.num_heads == 0,
            "model_dim",
            self.model_dim,
            f"a multiple of num_heads={self.num_heads}",
        )
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        _check(0 <= self.dropout_rate < 1, "dropout_rate", self.dropout_rate, "in [0, 1)")
        _check(
            self.positions in ("learned", "rotary"),
            "positions",
            self.positions,
            "'learned' or 'rotary'",
        )
        _check(
            self.positions == "learned" or self.head_dim % 2 == 0,
            "model_dim",
            self.model_dim,
            f"an even multiple of num_heads={self.num_heads} with rotary positions",
        )
        dtypes = ("float32", "bfloat16", "float16")
        _check(self.dtype in dtypes, "dtype", self.dtype, f"one of {dtypes}")
        _check(self.num_towers in (1, 2), "num_towers", self.num_towers, "1 or 2")
        _check(
            self.num_towers == 1 or self.num_classes > 0,
            "num_towers",
            self.num_towers,
            "1 in a language model",
        )
        _check(
            not (self.causal and self.num_classes),
            "num_classes",
            self.num_classes,
            "0 in a causal language model",
        )
        _check(
            self.num_decoder_layers >= 0,
            "num_decoder_layers",
            self.num_decoder_layers,
            "at least 0",
        )
        plain = not (self.causal or self.num_classes or self.num_towers == 2)
        _check(
            self.num_decoder_layers == 0 or plain,
            "num_decoder_layers",
            self.num_decoder_layers,
            "0 in a causal language model and in a classifier",
        )
        _check(
            self.num_classes == 0 or self.num_classes > 1,
            "num_classes",
            self.num_classes,
            "at least 2, or 0 in a language model",
        )
        _check(self.init_std is None or self.init_std > 0, "init_std", self.init_std, "positive")
        self.block.grid(self.max_length)
        activations = get_args(MLPActivation.__value__)
        _check(
            self.mlp_activation in activations,
            "mlp_activation",
            self.mlp_activation,
            f"one of {activations}",
        )
        layers = _list_linear_layers(self)
        for regex, _ in self.sparse_weights:
            try:
                matches = any(re.fullmatch(regex, name) for name in layers)
            except re.error as error:
                raise ValueError(
                    f"model.sparse_weights must be regular expressions, but {regex!r}: {error}"
                ) from error
            if not matches:
                raise ValueError(
                    f"model.sparse_weights must match some of {layers}, but {regex!r} matches none"
                )
        embedding = sparse_weight_patterns(self).get(EMBEDDING)
        _check(
            not isinstance(embedding, NMPattern),
            "sparse_weights",
            f"{embedding}",
            f"'unstructured' or blocks such as '64x64' for {EMBEDDING!r}",
        )

    def _check_patches(self):
        _check(self.patch_values >= 0, "patch_values", self.patch_values, "at least 0")
        if self.patch_values:
            _check(self.vocab_size == 0, "vocab_size", self.vocab_size, "0 with patches")
            _check(self.num_classes > 1, "num_classes", self.num_classes, "at least 2 with patches")
            _check(self.num_towers == 1, "num_towers", self.num_towers, "1 with patches")

    @property
    def head_dim(self) -> int:
        """Return the width of one head, model_dim / num_heads.

        Returns:
          int.
        """
        return self.model_dim // self.num_heads


def sparse_weight_patterns(config: TransformerConfig) -> dict[str, WeightPattern]:
    """Return which layers have sparse weights, and their patterns.

    Args:
      config: TransformerConfig.

    Returns:
      dict from names out of `LINEAR_LAYERS`, `DECODER_LINEAR_LAYERS` and `EMBEDDING`, in that
      order, to WeightPattern.

    Example:
      >>> from sparsejax.patterns import BlockPattern, NMPattern
      >>> sizes = dict(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64)
      >>> config = TransformerConfig(**sizes, vocab_size=256, max_length=16, causal=True,
      ...   block=BlockPattern(block_q=16, block_kv=16), sparse_weights=(("mlp/.*", NMPattern()),))
      >>> [f"{name}={pattern}" for name, pattern in sparse_weight_patterns(config).items()]
      ['mlp/up=2:4', 'mlp/down=2:4']
    """
    found = {}
    for name in _list_linear_layers(config):
        for regex, pattern in config.sparse_weights:
            if re.fullmatch(regex, name):
                found[name] = pattern
                break
    return found


def _list_linear_layers(config: TransformerConfig) -> tuple[str, ...]:
    names = LINEAR_LAYERS
    if config.num_decoder_layers:
        names += DECODER_LINEAR_LAYERS
    # Without a head that is tied to it, an embedding is looked up only.
    if not (config.num_classes or config.patch_values):
        names += (EMBEDDING,)
    return names


def _check(ok: bool, name: str, value, expected: str):
    if not ok:
        raise ValueError(f"model.{name} must be {expected}, got {value!r}")
