"""Models that `transformers` saved compute here what they compute there, or are refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sparsejax
from sparsejax.patterns import Unstructured
from sparsejax.pretrained import load_pretrained
from tests.pretrained.folders import assert_same_bits, change_folder, load_golden
from tests.pretrained.make_golden import GOLDEN, LOGITS, NUM_PADDED

_EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama_tied", marks=pytest.mark.ci),
        "llama_scaled",
        pytest.param("gpt2", marks=pytest.mark.ci),
        "bert",
    ],
)
def test_logits_are_those_of_transformers(name):
    golden = load_file(LOGITS)
    tokens, mask = jnp.asarray(golden["tokens"]), None
    real = np.ones(tokens.shape, bool)
    if name == "bert":
        real[1, -NUM_PADDED:] = False
        mask = jnp.asarray(real)
    model = load_golden(name).model
    logits = jax.jit(lambda tokens: model(tokens, mask=mask).logits)(tokens)
    # At most 7e-6 was measured, at logits of up to 5.
    np.testing.assert_allclose(logits[real], golden[name][real], atol=3e-5, rtol=0)


def test_shards_hold_the_same_model(tmp_path):
    tensors = load_file(GOLDEN / "llama_tied" / "model.safetensors")
    index = {}
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    shutil.copy(GOLDEN / "llama_tied" / "config.json", tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert_same_bits(load_pretrained(tmp_path).model, load_golden("llama_tied").model)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="must hold 'model-1.safetensors', which its index names"):
        load_pretrained(tmp_path)
    path.write_text(json.dumps({"weight_map": {_EMBEDDING: "../model.safetensors"}}))
    with pytest.raises(ValueError, match="must map tensors to files of its folder"):
        load_pretrained(tmp_path)


def test_settings_and_tokenizer_are_those_of_the_folder():
    model, config, tokenizer = sparsejax.load_pretrained(
        GOLDEN / "llama_tied",
        max_length=32,
        block_size=8,
        dtype="bfloat16",
        sparse_weights=(("mlp/.*", Unstructured()),),
    )
    assert model.config == config and not model.attention_options.sparse
    assert (config.max_length, config.block.block_q, config.dtype) == (32, 8, "bfloat16")
    assert model.blocks.mlp.up.kernel_mask[...].all()
    # Kernels would take a full mask for one that prunes.
    assert model.linear_options.sparse and model.linear_options.implementation == "xla"
    assert tokenizer.vocab_size == 32 and load_golden("bert").tokenizer is None
    ids = tokenizer.encode([b"to the end<|endoftext|>"])[0]
    # The special token that the text spells out is text, of which these letters are known.
    assert tokenizer.decode(ids) == b"to the endendoftext" and 0 not in ids


def test_learned_positions_are_cut(tmp_path):
    short = load_pretrained(GOLDEN / "gpt2", max_length=16, block_size=16).model
    whole = load_golden("gpt2").model
    np.testing.assert_array_equal(short.position[...], whole.position[:16])


def test_other_spellings_are_the_same_model(tmp_path):
    """Of GPT-2 without the prefix, with buffers; of BERT as it was once written; tied heads."""
    saved = load_file(GOLDEN / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in saved.items()}
    bare |= dict.fromkeys(saved) | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    folder = change_folder(tmp_path / "gpt2", "gpt2", tensors=bare)
    assert_same_bits(load_pretrained(folder).model, load_golden("gpt2").model)
    saved = load_file(GOLDEN / "bert" / "model.safetensors")
    old = {}
    for name in saved:
        if "LayerNorm" in name:
            stem, kind = name.rsplit(".", 1)
            old[name], old[f"{stem}.{ {'weight': 'gamma', 'bias': 'beta'}[kind] }"] = (
                None,
                saved[name],
            )
    old |= {
        "cls.predictions.decoder.weight": saved["bert.embeddings.word_embeddings.weight"],
        "bert.pooler.dense.bias": np.ones(32, np.float32),
        "bert.embeddings.position_ids": np.arange(64)[None],
    }
    folder = change_folder(tmp_path / "bert", "bert", tensors=old)
    assert_same_bits(load_pretrained(folder).model, load_golden("bert").model)


def test_scaling_as_older_versions_write_it(tmp_path):
    config = load_golden("llama_scaled").config
    rope = json.loads((GOLDEN / "llama_scaled" / "config.json").read_text())["rope_parameters"]
    old = {"rope_parameters": None, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    folder = change_folder(tmp_path / "old", "llama_scaled", settings=old)
    assert load_pretrained(folder).config == config
    old["rope_scaling"] = {"type": "linear", "factor": 4.0}
    folder = change_folder(tmp_path / "linear", "llama_scaled", settings=old)
    assert load_pretrained(folder).config == dataclasses.replace(
        config,
        rotary_scaling="linear",
        rotary_factor=4.0,
        rotary_original_length=8192,
    )


def test_mistral_without_windows_is_a_llama(tmp_path):
    names = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    folder = change_folder(
        tmp_path / "whole", "llama_tied", settings=names | {"sliding_window": None}
    )
    assert_same_bits(load_pretrained(folder).model, load_golden("llama_tied").model)
    folder = change_folder(tmp_path / "windows", "llama_tied", settings=names)
    _refuse(folder, "sliding_window must be None")


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("llama_tied", {"architectures": ["MambaForCausalLM"]}, "architectures must be one of"),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("llama_tied", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("llama_tied", {"sliding_window": 8}, "sliding_window must be None, got 8"),
        ("llama_tied", {"head_dim": "8"}, "head_dim must be a positive integer, got '8'"),
        ("llama_tied", {"num_hidden_layers": None}, "num_hidden_layers must be a positive integer"),
        ("llama_tied", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be one of"),
        ("llama_tied", {"rope_parameters": {"beta_fast": 1}}, "got 'beta_fast'"),
        ("llama_tied", {"quantization_config": {"bits": 4}}, "weights that are not quantised"),
        ("gpt2", {"activation_function": "silu"}, "activation_function must be one of"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ("bert", {"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "must be 'absolute'"),
        ("bert", {"type_vocab_size": 1}, "type_vocab_size must be 2, got 1"),
    ],
)
def test_settings_that_change_the_mathematics_are_refused(tmp_path, name, settings, message):
    _refuse(change_folder(tmp_path / "model", name, settings=settings), message)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"model.norm.weight": None}, "must hold the tensor 'model.norm.weight' [32], found none"),
        ({"model.norm.weight": np.ones(32)}, "must be one of ('F32', 'F16', 'BF16'), got F64"),
        (
            {"model.norm.bias": np.ones(32, np.float32)},
            "no tensor that its architecture does not have, found 'model.norm.bias' [32]",
        ),
        (
            {"model.layers.1.self_attn.k_proj.weight": np.ones((32, 32), np.float32)},
            "'model.layers.1.self_attn.k_proj.weight' must be [16, 32] as the config says, got [32",
        ),
        ({"lm_head.weight": np.ones((80, 32), np.float32)}, f"must equal {_EMBEDDING!r}"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, tensors, message):
    _refuse(change_folder(tmp_path / "model", "llama_tied", tensors=tensors), message)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    _refuse(tmp_path / "nowhere", "which does not exist")
    _refuse(tmp_path, "must hold config.json, found none")
    folder = change_folder(tmp_path / "pickled", "gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refuse(folder, "convert pytorch_model.bin to safetensors, for it is a pickle")
    folder = change_folder(tmp_path / "cut", "gpt2")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    _refuse(folder, "must be a whole safetensors file")
    folder = change_folder(tmp_path / "few", "bert", settings={"vocab_size": 31})
    shutil.copy(GOLDEN / "llama_tied" / "tokenizer.json", folder)
    _refuse(folder, "the tokenizer must have at most the vocabulary's 31 ids, got 32")
    with pytest.raises(ValueError, match="at most the 64 positions .* was trained with, got 65"):
        load_pretrained(GOLDEN / "gpt2", max_length=65)
    with pytest.raises(ValueError, match="length=64"):
        load_pretrained(GOLDEN / "gpt2", block_size=48)


def _refuse(folder, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_pretrained(folder)
    assert "\n" not in str(refused.value)
