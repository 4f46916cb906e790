"""Make the models and numbers that tests of pretrained weights compare with, by `transformers`.

In an environment that has torch, transformers, safetensors, tokenizers and, for GGUF, gguf and
accelerate:

  python tests/pretrained/make_golden.py models              tiny models and their logits
  python tests/pretrained/make_golden.py smollm2 FILE.gguf   losses of SmolLM2-135M-Instruct
  python tests/pretrained/make_golden.py check FOLDER        FOLDER/NAME, exported, against both

What was installed is written into the files.
"""

import json
import pathlib
import shutil
import sys
from importlib import metadata

GOLDEN = pathlib.Path(__file__).with_name("golden")
LOGITS = GOLDEN / "logits.safetensors"
LOSSES = GOLDEN / "smollm2.json"
NAMES = ("llama_tied", "llama_scaled", "gpt2", "bert")
VOCAB_SIZE = 80
# Positions at the end of the second example that BERT does not see.
NUM_PADDED = 5

TEXT = (
    "The mill at the bend of the river had been silent for eleven years when Marta bought it. "
    "She paid in three instalments, the last of them in December 1987, and moved in with a cat, "
    "two lamps and a box of letters that her grandfather had written from Trieste. Nobody in the "
    "village believed that the wheel would ever turn again. The carpenter, who was asked first, "
    "shook his head; the blacksmith laughed. But a wheel is only wood and iron, and water does "
    "not ask for permission. In the second spring she cleared the race, stone by stone, until her "
    "hands were raw. In the third, at 6:40 on a wet morning, the paddles dipped, hesitated, and "
    'began to move. "Well," said the blacksmith, who had come to watch, "it can\'t last." '
    "It has lasted, so far, for thirty-one years: longer than the blacksmith, the cat, or the road."
)


def make_models():
    import torch
    import transformers
    from safetensors.torch import save_file

    shared = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
    llama = shared | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    scaling = {
        "rope_theta": 500.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    models = {
        "llama_tied": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **llama, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5
            )
        ),
        "llama_scaled": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **llama,
                max_position_embeddings=128,
                head_dim=12,
                attention_bias=True,
                mlp_bias=True,
                rope_parameters=scaling,
            )
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64
            )
        ),
        "bert": transformers.BertForMaskedLM(
            transformers.BertConfig(
                **shared, intermediate_size=64, num_attention_heads=4, max_position_embeddings=64
            )
        ),
    }
    types = {"llama_scaled": torch.bfloat16, "gpt2": torch.float16}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (2, 24), generator=generator)
    found = {"tokens": tokens.to(torch.int32)}
    for name, model in models.items():
        with torch.no_grad():
            for key, value in model.named_parameters():
                mean = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
                value.copy_(mean + 0.2 * torch.randn(value.shape, generator=generator))
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(types.get(name, torch.float32)).save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        # Read again: a model that was turned into 16 bits has rounded more than its weights.
        model = type(model).from_pretrained(folder, dtype=torch.float32)
        found[name] = compute_logits(model, tokens, padded=name == "bert")
    write_tokenizer(GOLDEN / "llama_tied" / "tokenizer.json")
    save_file(found, LOGITS, metadata=list_versions())


def compute_logits(model, tokens, *, padded):
    import torch

    mask = torch.ones_like(tokens)
    if padded:
        mask[1, -NUM_PADDED:] = 0
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=mask).logits.contiguous()


def write_tokenizer(path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = ["<|endoftext|>", *"Ġabcdefghijklmnopqrstuvwxyz.", "th", "the", "Ġthe"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocab = {token: i for i, token in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))


def measure_smollm2(path):
    import torch
    import transformers

    folder, file = pathlib.Path(path).parent, pathlib.Path(path).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    logits = compute_logits(model, ids, padded=False)[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    found = {
        "versions": list_versions() | {"gguf": metadata.version("gguf")},
        "text": TEXT,
        "ids": ids[0].tolist(),
        "losses": [round(loss, 6) for loss in losses.tolist()],
    }
    LOSSES.write_text(json.dumps(found) + "\n")


def check_exported(folder):
    import transformers
    from safetensors.torch import load_file

    golden = load_file(LOGITS)
    for name in NAMES:
        path = pathlib.Path(folder) / name
        architecture = json.loads((path / "config.json").read_text())["architectures"][0]
        model, loading = getattr(transformers, architecture).from_pretrained(
            path, dtype="float32", output_loading_info=True
        )
        logits = compute_logits(model, golden["tokens"].long(), padded=name == "bert")
        wrong = {key: value for key, value in loading.items() if value}
        print(name, "largest difference", float((logits - golden[name]).abs().max()), wrong or "")


def list_versions():
    names = ("torch", "transformers", "safetensors", "tokenizers")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    commands = {"models": make_models, "smollm2": measure_smollm2, "check": check_exported}
    commands[sys.argv[1]](*sys.argv[2:])
