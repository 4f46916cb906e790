"""What a transformer is made of, as one frozen and checked value."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal, get_args

from sparsejax.checks import check_setting, make_check
from sparsejax.patterns import BlockPattern, NMPattern, WeightBlocks, WeightPattern

type MLPActivation = Literal["gelu", "gelu_exact", "relu", "geglu", "swiglu"]

type LinearInit = Literal["lecun_normal", "torch"]

type RotaryScaling = Literal["none", "linear", "llama3"]

GATED_ACTIVATIONS = ("geglu", "swiglu")
"""Activations that compute twice as many values, half of them gates."""

LINEAR_LAYERS = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
"""The linear layers of a block, whose weights may be sparse."""

EMBEDDING = "embedding"
"""The embedding of tokens, tied to the head of a language model; its weight may be sparse too."""

DECODER_LINEAR_LAYERS = ("decoder/mlp/up", "decoder/mlp/down")
"""Those of a decoder's block, beside the encoder's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """What is chosen of a transformer whatever the data.

    Attributes:
      num_layers: transformer blocks.
      model_dim: width of the residual stream; a multiple of `num_heads`.
      num_heads: query heads.
      qkv_features: width of all query heads together; 0 = `model_dim`.
      mlp_dim: hidden width of the feed-forward layer; a gated one computes twice as many values,
        half of them gates.
      num_decoder_layers: blocks of a decoder that attends to the output of the `num_layers` blocks
        before it, those of a bidirectional encoder; 0 = no decoder.
      mlp_activation: "gelu" (tanh form, which sparse kernels fuse), "gelu_exact" (by the error
        function) or "relu", or the gated "geglu" (tanh form) or "swiglu".
      positions: "learned" table or "rotary" embedding.
      rotary_wavelength: base of the rotary embedding's wavelengths, positions per radian.
      rotary_scaling: how wavelengths grow for longer contexts: "none"; "linear", all by
        `rotary_factor`; or "llama3", the long ones by `rotary_factor`, the short ones not.
      rotary_factor: growth of the wavelengths that grow.
      rotary_low_frequency_factor: "llama3" multiplies wavelengths above
        `rotary_original_length` / `rotary_low_frequency_factor`.
      rotary_high_frequency_factor: it leaves those below `rotary_original_length` /
        `rotary_high_frequency_factor`, and goes from one to the other in between.
      rotary_original_length: positions that a "llama3" model was first trained with.
      norm: "layer" (mean and variance) or "rms" (root of the mean square, no bias).
      norm_epsilon: added to the variance, or to the mean square.
      norm_position: "pre" normalises the input of each branch, and the end of the stack; "post" the
        sum of a branch and its input, as the original Transformer and BERT.
      dropout_rate: in [0, 1), applied to embeddings and residual branches.
      mlp_dropout_rate: in [0, 1), applied after the activation of the feed-forward layer.
      init_std: standard deviation of weight matrices; residual outputs get it divided by
        sqrt(2 num_layers) as in GPT-2, in a decoder by sqrt(3 num_decoder_layers). None leaves it
        to `linear_init`.
      linear_init: without `init_std`, what linear layers begin as: "lecun_normal" kernels and zero
        biases; or "torch", both uniform within 1 / sqrt(inputs), as torch.nn.Linear.
      dtype: "float32", "bfloat16" or "float16", type of activations and matrix products; None for
        that of inputs and parameters together. Parameters are always float32.
      use_bias: add biases in linear layers.
      use_norm_bias: add biases in norms; those by the root of the mean square have none.
      embedding_norm: normalise the sum of embedding and position.
      tied_head: the head of a language model is its embedding; otherwise it has its own weight.
      head_transform: put a linear layer, exact GELU and a norm before the head, and a bias of each
        token after it, as BERT does.
      remat: recompute each block in the backward pass instead of storing it.
      scan_layers: compile one block and scan it; False unrolls the same stacked parameters.
      own_class: "module:class" of a subclass of `Transformer` that takes its place; "" = itself.
        FLOPs are counted as those of `Transformer`.
    """

    num_layers: int
    model_dim: int
    num_heads: int
    mlp_dim: int
    qkv_features: int = 0
    num_decoder_layers: int = 0
    mlp_activation: MLPActivation = "gelu"
    positions: Literal["learned", "rotary"] = "learned"
    rotary_wavelength: float = 10_000.0
    rotary_scaling: RotaryScaling = "none"
    rotary_factor: float = 1.0
    rotary_low_frequency_factor: float = 1.0
    rotary_high_frequency_factor: float = 4.0
    rotary_original_length: int = 8192
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    dropout_rate: float = 0.0
    mlp_dropout_rate: float = 0.0
    init_std: float | None = None
    linear_init: LinearInit = "lecun_normal"
    dtype: Literal["float32", "bfloat16", "float16"] | None = "float32"
    use_bias: bool = True
    use_norm_bias: bool = True
    embedding_norm: bool = False
    tied_head: bool = True
    head_transform: bool = False
    remat: bool = False
    scan_layers: bool = True
    own_class: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerOptions):
    """Shape and options of `Transformer`: those of `TransformerOptions`, and what follows.

    Attributes:
      vocab_size: number of token ids; 0 with patches.
      num_kv_heads: key/value heads; divides `num_heads` (grouped queries when smaller).
      max_length: positions; the block pattern divides it.
      causal: True for a decoder, which sees the past only; False for an encoder.
      block: BlockPattern of the attention mask.
      num_classes: 0 gives logits of the vocabulary at every position: of the next token in a
        decoder, of the token itself in an encoder (masked language model). Otherwise the model, an
        encoder, pools and classifies.
      num_towers: documents per example; 2 compares two (document matching).
      patch_values: bytes of a patch where the inputs are patches; 0 for token ids.
      sparse_weights: pairs of a regular expression and a WeightPattern. A linear layer of a block,
        one of `LINEAR_LAYERS` or, in a decoder, `DECODER_LINEAR_LAYERS`, and the `EMBEDDING` that
        is tied to a head, take the pattern of the first expression that matches the whole name, and
        are dense if none does. An embedding has no NMPattern.

    Raises:
      ValueError: if a value is out of range or two values contradict each other.
    """

    vocab_size: int
    num_kv_heads: int
    max_length: int
    causal: bool
    block: BlockPattern
    num_classes: int = 0
    num_towers: int = 1
    patch_values: int = 0
    # A layer in somebody's model follows its input; a run's settings name a type.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    sparse_weights: tuple[tuple[str, WeightPattern], ...] = ()

    def __post_init__(self):
        check = make_check("model", self)
        for ok, name, expected in _list_checks(self):
            check(ok, name, expected)
        self.block.grid(self.max_length)
        _check_sparse_weights(self)

    @property
    def head_dim(self) -> int:
        """Width of one head, H."""
        return (self.qkv_features or self.model_dim) // self.num_heads

    @property
    def is_language_model(self) -> bool:
        """Whether the model has a head that gives logits of tokens."""
        return not (self.num_classes or self.patch_values)


def sparse_weight_patterns(config: TransformerConfig) -> dict[str, WeightPattern]:
    """Return which layers have sparse weights, and their patterns.

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


def list_weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return the shape of one layer's weight, by the names that patterns are given to.

    Returns:
      dict from names out of `LINEAR_LAYERS`, `DECODER_LINEAR_LAYERS` and `EMBEDDING` to (K, N), or
      to (tokens, width) of the embedding.
    """
    width, hidden = config.model_dim, config.mlp_dim
    heads, out = config.num_heads + 2 * config.num_kv_heads, config.num_heads * config.head_dim
    gates = 2 if config.mlp_activation in GATED_ACTIVATIONS else 1
    shapes = {
        "attention/qkv": (width, heads * config.head_dim),
        "attention/out": (out, width),
        "mlp/up": (width, gates * hidden),
        "mlp/down": (hidden, width),
        EMBEDDING: (config.vocab_size, width),
    }
    for name in DECODER_LINEAR_LAYERS:
        shapes[name] = shapes[name.removeprefix("decoder/")]
    return shapes


def _list_linear_layers(config: TransformerConfig) -> tuple[str, ...]:
    names = LINEAR_LAYERS
    if config.num_decoder_layers:
        names += DECODER_LINEAR_LAYERS
    # An untied embedding is never multiplied, so never sparse.
    if config.is_language_model and config.tied_head:
        names += (EMBEDDING,)
    return names


def _list_checks(config: TransformerConfig) -> Iterator[tuple[bool, str, str]]:
    """Yield (condition, attribute, expectation); later ones rely on earlier ones."""
    c = config
    sizes = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_dim", "max_length")
    for name in sizes if c.patch_values else ("vocab_size", *sizes):
        yield getattr(c, name) >= 1, name, "at least 1"
    yield c.patch_values >= 0, "patch_values", "at least 0"
    if c.patch_values:
        yield c.vocab_size == 0, "vocab_size", "0 with patches"
        yield c.num_classes > 1, "num_classes", "at least 2 with patches"
        yield c.num_towers == 1, "num_towers", "1 with patches"
    heads = f"num_heads={c.num_heads}"
    yield c.qkv_features >= 0, "qkv_features", "at least 0"
    width = "qkv_features" if c.qkv_features else "model_dim"
    yield getattr(c, width) % c.num_heads == 0, width, f"a multiple of {heads}"
    yield c.num_heads % c.num_kv_heads == 0, "num_kv_heads", f"a divisor of {heads}"
    yield 0 <= c.dropout_rate < 1, "dropout_rate", "in [0, 1)"
    yield 0 <= c.mlp_dropout_rate < 1, "mlp_dropout_rate", "in [0, 1)"
    yield c.positions in ("learned", "rotary"), "positions", "'learned' or 'rotary'"
    pairs = c.positions == "learned" or c.head_dim % 2 == 0
    yield pairs, width, f"an even multiple of {heads} with rotary positions"
    yield from _list_rotary_checks(c)
    yield c.norm in ("layer", "rms"), "norm", "'layer' or 'rms'"
    yield c.norm_epsilon > 0, "norm_epsilon", "positive"
    yield c.norm_position in ("pre", "post"), "norm_position", "'pre' or 'post'"
    pre = c.norm_position == "pre" or c.num_decoder_layers == 0
    yield pre, "norm_position", "'pre' with decoder layers"
    plain_head = c.tied_head and not c.head_transform
    no_classes = c.is_language_model and c.num_decoder_layers == 0
    untied = "the default in a classifier and with decoder layers, whose heads are others"
    yield plain_head or no_classes, "head_transform" if c.head_transform else "tied_head", untied
    dtypes = ("float32", "bfloat16", "float16")
    yield c.dtype is None or c.dtype in dtypes, "dtype", f"None or one of {dtypes}"
    yield c.num_towers in (1, 2), "num_towers", "1 or 2"
    yield c.num_towers == 1 or c.num_classes > 0, "num_towers", "1 in a language model"
    yield not (c.causal and c.num_classes), "num_classes", "0 in a causal language model"
    yield c.num_decoder_layers >= 0, "num_decoder_layers", "at least 0"
    plain = not (c.causal or c.num_classes or c.num_towers == 2)
    expected = "0 in a causal language model and in a classifier"
    yield c.num_decoder_layers == 0 or plain, "num_decoder_layers", expected
    one_class = c.num_classes != 0 and c.num_classes <= 1
    yield not one_class, "num_classes", "at least 2, or 0 in a language model"
    yield c.init_std is None or c.init_std > 0, "init_std", "positive"
    inits = get_args(LinearInit.__value__)
    yield c.linear_init in inits, "linear_init", f"one of {inits}"
    drawn = c.init_std is None or c.linear_init == "lecun_normal"
    yield drawn, "linear_init", f"'lecun_normal' with init_std={c.init_std}"
    activations = get_args(MLPActivation.__value__)
    yield c.mlp_activation in activations, "mlp_activation", f"one of {activations}"


def _list_rotary_checks(c: TransformerConfig) -> Iterator[tuple[bool, str, str]]:
    scalings = get_args(RotaryScaling.__value__)
    yield c.rotary_scaling in scalings, "rotary_scaling", f"one of {scalings}"
    for name in ("rotary_wavelength", "rotary_factor", "rotary_low_frequency_factor"):
        yield getattr(c, name) > 0, name, "positive"
    low = c.rotary_low_frequency_factor
    above = c.rotary_high_frequency_factor > low
    expected = f"above rotary_low_frequency_factor={low}"
    yield above, "rotary_high_frequency_factor", expected
    yield c.rotary_original_length >= 1, "rotary_original_length", "at least 1"
    unscaled = c.rotary_scaling != "none" or c.rotary_factor == 1
    yield unscaled, "rotary_factor", "1 without rotary_scaling"


def _check_sparse_weights(config: TransformerConfig) -> None:
    layers = _list_linear_layers(config)
    for regex, _ in config.sparse_weights:
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
    patterns, shapes = sparse_weight_patterns(config), list_weight_shapes(config)
    embedding = patterns.get(EMBEDDING)
    check_setting(
        not isinstance(embedding, NMPattern),
        "model.sparse_weights",
        f"{embedding}",
        f"'unstructured' or blocks such as '64x64' for {EMBEDDING!r}",
    )
    for name, pattern in patterns.items():
        _check_shape(name, pattern, shapes[name])


def _check_shape(name: str, pattern: WeightPattern, shape: tuple[int, int]) -> None:
    """Refuse a weight that its pattern does not fill, or whose entries an int32 cannot count."""
    sides = (1, 1)
    if isinstance(pattern, NMPattern):
        sides = (pattern.m, pattern.m if pattern.transposable else 1)
    elif isinstance(pattern, WeightBlocks):
        sides = (pattern.rows, pattern.columns)
    fits = all(size % side == 0 for size, side in zip(shape, sides, strict=True))
    check_setting(
        fits and math.prod(shape) < 2**31,
        f"the weight {name!r} with the pattern '{pattern}'",
        list(shape),
        f"a multiple of {sides[0]} by a multiple of {sides[1]}, of fewer than 2^31 entries",
    )
