"""Load a model that another library trained."""

import os
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.data import Tokenizer
from sparsejax.models import (
    AttentionOptions,
    LinearOptions,
    SparsityMask,
    Transformer,
    TransformerConfig,
    make_transformer,
)
from sparsejax.patterns import BlockPattern, WeightPattern
from sparsejax.pretrained.leaves import flatten, nest
from sparsejax.pretrained.reading import open_checkpoint, read_leaves, read_settings


class PretrainedModel(NamedTuple):
    """What a folder or file holds.

    Attributes:
      model: Transformer; `model(tokens)` attends everywhere, until `attention_options` say else.
      config: TransformerConfig of the model.
      tokenizer: Tokenizer, None where there is none.
    """

    model: Transformer
    config: TransformerConfig
    tokenizer: Tokenizer | None


def load_pretrained(
    path: str | os.PathLike,
    *,
    max_length: int | None = None,
    block_size: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] | None = "float32",
    sparse_weights: tuple[tuple[str, WeightPattern], ...] = (),
) -> PretrainedModel:
    """Load a model of the shape of Llama, Mistral without windows, GPT-2 or BERT.

    Parameters are float32, whatever type the file has. Nothing is pickled, and tensors are read one
    at a time.

    Args:
      path: folder as `transformers` saves it, with config.json, tensors in safetensors, in one file
        or several, and maybe tokenizer.json; or a GGUF file of the architecture "llama" or "gpt2".
      max_length: positions, None for those that the model was trained with.
      block_size: rows and columns of a block of the attention mask; divides `max_length`.
      dtype: of activations, as of `TransformerConfig`.
      sparse_weights: which weights get masks, as of `TransformerConfig`; they keep everything at
        first. Products are XLA's until `model.linear_options` say else: kernels for 2:4 want masks
        that prune.

    Raises:
      ValueError: if the architecture or one of its settings is unknown, a tensor is missing, too
        many or of another shape, or `max_length` is beyond the context of training.

    Example:
      `model, config, tokenizer = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")`
    """
    checkpoint = open_checkpoint(path)
    family, settings = read_settings(checkpoint)
    trained = settings["max_length"]
    length = trained if max_length is None else max_length
    if not 1 <= length <= trained:
        raise ValueError(
            f"max_length must be at least 1 and at most the {trained} positions that "
            f"{checkpoint.origin} was trained with, got {max_length}"
        )
    settings |= {
        "max_length": length,
        "block": BlockPattern(block_q=block_size, block_kv=block_size),
        "dtype": dtype,
        "sparse_weights": sparse_weights,
    }
    config = TransformerConfig(**settings)
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint.origin}: the tokenizer must have at most the vocabulary's "
            f"{config.vocab_size} ids, got {tokenizer.vocab_size}"
        )
    # Nothing is drawn: a model may be as large as the memory.
    model = nnx.eval_shape(lambda: make_transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    shapes = {name: leaf.shape for name, leaf in flatten(nnx.to_pure_dict(params)).items()}
    leaves = read_leaves(checkpoint, family, config, shapes, trained)
    filled = nest({name: jnp.asarray(value) for name, value in leaves})
    kept = jax.tree.map(lambda mask: jnp.ones(mask.shape, bool), nnx.to_pure_dict(masks))
    model = nnx.merge(graphdef, filled, kept)
    model.attention_options = AttentionOptions(sparse=False)
    # Of masks that keep everything; a kernel for 2:4 would need ones that prune.
    model.linear_options = LinearOptions(implementation="xla")
    return PretrainedModel(model, config, tokenizer)
