"""A GGUF file, as llama.cpp and its tools write it, seen as a folder of `transformers` would be."""

import functools
import os
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.tokenizer import TOKENIZER_FILE
from sparsejax.durable import write_durably
from sparsejax.models import Rotary, compute_frequencies
from sparsejax.pretrained.checkpoint import Checkpoint
from sparsejax.pretrained.tokenizer import open_gguf_tokenizer, write_gguf_tokenizer

# GGUF's names of layers -> those of `transformers`.
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"


class _Architecture(NamedTuple):
    """What is told of one architecture: names, settings, and how tensors are turned."""

    names: Mapping[str, str]
    make_settings: Callable[[Mapping[str, Any], Container[str]], dict[str, Any]]
    transform: Callable[[str, np.ndarray, Mapping[str, Any]], np.ndarray]


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file whose architecture is "llama" or "gpt2".

    Raises:
      ValueError: if it is no GGUF file, is of another architecture, or has a tensor of a type that
        cannot be dequantised.
    """
    import gguf

    metadata, tensors = _read(path)
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture must be one of {[*_ARCHITECTURES]}, got {name!r}"
        )
    architecture = _ARCHITECTURES[name]
    values = {
        key.removeprefix(f"{name}."): value
        for key, value in metadata.items()
        if key.startswith(f"{name}.")
    }
    factors = tensors.pop(_ROPE_FACTORS, None)
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} must hold the tensor 'token_embd.weight', found none")
    values["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    settings = architecture.make_settings(values, tensors)
    if factors is not None:
        settings["rope_scaling"] = _find_scaling(factors.data, settings, path)
    theirs = {_rename(key, architecture.names): key for key in tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[theirs[name]]
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        return architecture.transform(name, value, settings)

    shapes = {}
    for name, key in theirs.items():
        shape = tuple(int(size) for size in tensors[key].shape[::-1])
        # Of a view: only shapes of what `read` turns are asked for.
        shapes[name] = architecture.transform(name, np.broadcast_to(0.0, shape), settings).shape
    load = functools.partial(open_gguf_tokenizer, metadata, str(path))
    return Checkpoint(str(path), settings, shapes, read, load)


def save_tokenizer(path: str | os.PathLike, file: str | os.PathLike) -> None:
    """Write the tokenizer of a GGUF file as a tokenizer.json, which the library `tokenizers` reads.

    The token that ends a text is named in a tokenizer_config.json beside it.

    Args:
      path: of the GGUF file.
      file: the tokenizer.json, by whatever name; both are replaced if they exist.

    Raises:
      ValueError: if it is no GGUF file, or its tokenizer is of an unknown kind.
      OSError: if they cannot be written.
    """
    file = Path(file)
    for name, text in write_gguf_tokenizer(_read(Path(path))[0], str(path)).items():
        write_durably(file if name == TOKENIZER_FILE else file.with_name(name), text)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metadata and tensors, which are mapped and not yet read."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading it needs the package gguf: pip install gguf") from error

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _round(field.contents()) for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a whole GGUF file: {error}") from error
    readable = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind not in readable:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            try:
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
                readable[kind] = True
            except NotImplementedError:
                readable[kind] = False
        if not readable[kind]:
            raise ValueError(
                f"{path}: the tensor {tensor.name!r} must be of a type that the package gguf "
                f"dequantises, such as F16 or Q8_0, got {kind.name}"
            )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _round(value: Any) -> Any:
    """Return the shortest number that is the same in the 32 bits that GGUF keeps of it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rename(name: str, names: Mapping[str, str]) -> str:
    layer, kind = re.search(r"^blk\.(\d+)\.", name), name.rpartition(".")[2]
    pattern = name.rpartition(".")[0]
    if layer:
        pattern = f"blk.{{}}.{pattern[layer.end() :]}"
    if pattern not in names:
        return name
    return f"{names[pattern].format(layer and layer[1])}.{kind}"


def _make_llama_settings(values: Mapping[str, Any], tensors: Container[str]) -> dict[str, Any]:
    heads, width = values.get("attention.head_count"), values.get("embedding_length")
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": values["vocab_size"],
        "num_hidden_layers": values.get("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv"),
        "head_dim": values.get("attention.key_length"),
        "intermediate_size": values.get("feed_forward_length"),
        "max_position_embeddings": values.get("context_length"),
        "rms_norm_eps": values.get("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "sliding_window": values.get("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": values.get("rope.freq_base"),
    }
    scaling = values.get("rope.scaling.type", "none")
    if scaling != "none":
        settings["rope_scaling"] = {"rope_type": scaling, "factor": values["rope.scaling.factor"]}
    return settings


def _make_gpt2_settings(values: Mapping[str, Any], tensors: Container[str]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": values["vocab_size"],
        "n_layer": values.get("block_count"),
        "n_embd": values.get("embedding_length"),
        "n_head": values.get("attention.head_count"),
        "n_inner": values.get("feed_forward_length"),
        "n_positions": values.get("context_length"),
        "layer_norm_epsilon": values.get("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _unpermute(name: str, value: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Put rows of queries and keys back: GGUF has the two halves of a head alternate."""
    found = re.search(r"\.([qk])_proj\.", name)
    if not found:
        return value
    heads = settings["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def _transpose(name: str, value: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    del settings
    return value.T if re.search(r"\.c_\w+\.weight$", name) else value


def _find_scaling(factors: np.ndarray, settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return Llama 3's scaling whose effect on the wavelengths a file lists."""
    head_dim = 2 * factors.size
    plain = Rotary(wavelength=settings["rope_theta"] or 10_000.0)
    scaled = plain._replace(scaling="llama3", factor=float(factors.max()))
    expected = compute_frequencies(head_dim, plain) / compute_frequencies(head_dim, scaled)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{path}: the tensor {_ROPE_FACTORS!r} must be that of Llama 3 with a context of "
            f"{scaled.original_length} before scaling, got {factors[-3:]} at the end"
        )
    return {
        "rope_type": "llama3",
        "factor": scaled.factor,
        "low_freq_factor": scaled.low_frequency_factor,
        "high_freq_factor": scaled.high_frequency_factor,
        "original_max_position_embeddings": scaled.original_length,
    }


_ARCHITECTURES = {
    "llama": _Architecture(_LLAMA, _make_llama_settings, _unpermute),
    "gpt2": _Architecture(_GPT2, _make_gpt2_settings, _transpose),
}
