"""GGUF files hold the same models; their rows of queries and keys lie in another order."""

import dataclasses
import json
import re

import gguf
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from sparsejax.data.tokenizer_files import open_tokenizer_file
from sparsejax.pretrained import load_pretrained, save_tokenizer
from tests.pretrained.folders import assert_same_bits, load_golden, read_params
from tests.pretrained.make_golden import GOLDEN

_Q8 = gguf.GGMLQuantizationType.Q8_0
_LLAMA = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "up_proj": "ffn_up",
    "gate_proj": "ffn_gate",
    "down_proj": "ffn_down",
}
_GPT2 = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "ln_f": "output_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_llama(
    path, name="llama_tied", *, kind=None, pre="smollm", model="gpt2", base=0, extra=None, end=None
):
    """Write a golden model as the tools of llama.cpp do, maybe quantised."""
    writer, settings = _start(path, "llama", name)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_rope_freq_base(base or settings["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    tokenizer = json.loads((GOLDEN / "llama_tied" / "tokenizer.json").read_text())
    tokens = list(tokenizer["model"]["vocab"])
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if end is not None:
        writer.add_eos_token_id(end)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for key, value in load_file(GOLDEN / name / "model.safetensors").items():
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        if heads:
            halves = value.reshape(heads, 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        _add(writer, _rename(key, _LLAMA), value, kind)
    for key, value in (extra or {}).items():
        writer.add_tensor(key, value)
    return _finish(writer, path)


def write_gpt2(path):
    writer, settings = _start(path, "gpt2", "gpt2")
    writer.add_block_count(settings["n_layer"])
    writer.add_context_length(settings["n_positions"])
    writer.add_embedding_length(settings["n_embd"])
    writer.add_feed_forward_length(4 * settings["n_embd"])
    writer.add_head_count(settings["n_head"])
    writer.add_layer_norm_eps(settings["layer_norm_epsilon"])
    for key, value in load_file(GOLDEN / "gpt2" / "model.safetensors").items():
        value = value.T if re.search(r"\.c_\w+\.weight$", key) else value
        _add(writer, _rename(key, _GPT2), value)
    return _finish(writer, path)


def test_a_llama_is_the_same_model(tmp_path):
    found = load_pretrained(write_llama(tmp_path / "model.gguf"))
    golden = load_golden("llama_tied")
    assert found.config == golden.config
    assert_same_bits(found.model, golden.model)
    save_tokenizer(tmp_path / "model.gguf", tmp_path / "tokenizer.json")
    assert open_tokenizer_file(f"file:{tmp_path}").name == found.tokenizer.name
    texts = [b"the end of the road", b"a <|endoftext|>"]
    for ids, expected in zip(
        found.tokenizer.encode(texts), golden.tokenizer.encode(texts), strict=True
    ):
        np.testing.assert_array_equal(ids, expected)


def test_a_text_ends_at_the_token_that_the_file_names(tmp_path):
    """As of models that follow instructions, whose turns end otherwise than their documents."""
    path = tmp_path / "model.gguf"
    assert load_pretrained(write_llama(path)).tokenizer.separator == 0
    found = load_pretrained(write_llama(path, end=5)).tokenizer
    save_tokenizer(path, tmp_path / "saved.json")
    saved = open_tokenizer_file(f"file:{tmp_path / 'saved.json'}")
    assert found.separator == saved.separator == 5 and found.name == saved.name
    number = found.vocab_size
    _refuse(write_llama(path, end=number), f"eos_token_id must be an id below {number}, got")


def test_scaling_of_wavelengths_is_found_in_its_factors(tmp_path):
    """As of Llama 3.1: the file lists how much longer each wavelength is."""
    wavelengths = 2 * np.pi * 500_000 ** (np.arange(6) / 6)
    share = (8192 / wavelengths[3] - 1) / 3
    factors = np.array([1, 1, 1, 1 / ((1 - share) / 32 + share), 32, 32], np.float32)
    path = tmp_path / "model.gguf"
    extra = {"rope_freqs.weight": factors}
    found = load_pretrained(write_llama(path, "llama_scaled", base=500_000, extra=extra))
    golden = load_golden("llama_scaled")
    assert found.config == dataclasses.replace(
        golden.config, rotary_wavelength=5e5, rotary_factor=32.0, rotary_original_length=8192
    )
    assert_same_bits(found.model, golden.model)
    extra["rope_freqs.weight"] = factors + np.float32(0.01)
    _refuse(
        write_llama(path, "llama_scaled", base=500_000, extra=extra),
        "'rope_freqs.weight' must be that of Llama 3",
    )


def test_a_gpt2_is_the_same_model(tmp_path):
    found = load_pretrained(write_gpt2(tmp_path / "model.gguf"))
    assert found.config == load_golden("gpt2").config and found.tokenizer is None
    assert_same_bits(found.model, load_golden("gpt2").model)


def test_quantised_weights_are_near(tmp_path):
    found = read_params(load_pretrained(write_llama(tmp_path / "model.gguf", kind=_Q8)).model)
    for path, expected in read_params(load_golden("llama_tied").model).items():
        error = np.abs(found[path] - expected).max()
        if "norm" in path or path == "blocks.mlp.down.kernel":
            assert error == 0, f"{path} is written as it is: no rows of 32"
        else:
            # Of each 32 weights the largest is 127 steps.
            assert 0 < error < np.abs(expected).max() / 250, path


def test_files_that_are_not_understood_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML")
    _refuse(path, "must be a whole GGUF file")
    _refuse(
        _finish(_start(path, "mamba", "gpt2")[0], path), "one of ['llama', 'gpt2'], got 'mamba'"
    )
    _refuse(write_llama(path, pre="qwen2"), "tokenizer.ggml.pre must be one of ('gpt-2', ")
    _refuse(write_llama(path, model="llama"), "tokenizer.ggml.model must be 'gpt2', got 'llama'")
    wide = {"blk.0.attn_q.bias": np.ones(32, np.float64)}
    _refuse(write_llama(path, extra=wide), "'blk.0.attn_q.bias' must be of a type that")
    unknown = {"blk.0.ffn_exps.weight": np.ones((2, 32), np.float32)}
    _refuse(write_llama(path, extra=unknown), "found 'blk.0.ffn_exps.weight' [2, 32]")


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("smollm", "ab 2024", ["ab", "Ġ", "2", "0", "2", "4"]),
        ("llama-bpe", "ab 2024", ["ab", "Ġ", "202", "4"]),
        ("gpt-2", "ab 2024", ["ab", "Ġ2024"]),
    ],
)
def test_texts_are_split_as_each_kind_of_tokenizer_does(tmp_path, pre, text, expected):
    path = write_llama(tmp_path / "model.gguf", pre=pre)
    save_tokenizer(path, tmp_path / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == expected


def _start(path, architecture, name):
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    return gguf.GGUFWriter(path, architecture), settings


def _rename(key, names):
    layer = re.search(r"\.(\d+)\.", key)
    stem, kind = next(to for name, to in names.items() if name in key), key.rpartition(".")[2]
    return f"blk.{layer[1]}.{stem}.{kind}" if layer else f"{stem}.{kind}"


def _add(writer, name, value, kind=None):
    value = np.ascontiguousarray(value.astype(np.float32))
    if kind is None or value.ndim < 2 or value.shape[1] % 32:
        writer.add_tensor(name, value)
    else:
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)


def _finish(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _refuse(path, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_pretrained(path)
    assert "\n" not in str(refused.value)
