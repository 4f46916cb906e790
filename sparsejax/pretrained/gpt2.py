"""GPT-2, whose linear weights are [inputs, outputs] as ours are."""

from typing import Any

from sparsejax.models import TransformerConfig
from sparsejax.pretrained.family import ACTIVATIONS, PLAIN, Family, list_head_limits
from sparsejax.pretrained.leaves import Leaf, list_linear, list_norm
from sparsejax.pretrained.settings import Settings


def _read_config(settings: Settings) -> dict[str, Any]:
    settings.get_choice("scale_attn_weights", (True,), True)
    settings.get_choice("scale_attn_by_inverse_layer_idx", (False,), False)
    settings.get_choice("add_cross_attention", (False,), False)
    width, num_heads = settings.get_int("n_embd"), settings.get_int("n_head")
    activation = settings.get_choice("activation_function", tuple(ACTIVATIONS), "gelu_new")
    return {
        "vocab_size": settings.get_int("vocab_size"),
        "num_layers": settings.get_int("n_layer"),
        "model_dim": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "mlp_dim": settings.get_int("n_inner", 4 * width),
        "mlp_activation": ACTIVATIONS[activation],
        "max_length": settings.get_int("n_positions"),
        "norm_epsilon": settings.get_float("layer_norm_epsilon", 1e-5),
        "tied_head": settings.get_choice("tie_word_embeddings", (True, False), True),
    }


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.model_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": names[config.mlp_activation],
        "tie_word_embeddings": config.tied_head,
        "embd_pdrop": config.dropout_rate,
        "resid_pdrop": config.dropout_rate,
        "attn_pdrop": 0.0,
    }


def _list_leaves(config: TransformerConfig, length: int) -> list[Leaf]:
    layer = "transformer.h.{}"
    linear = {
        "blocks.attention.qkv": f"{layer}.attn.c_attn",
        "blocks.attention.out": f"{layer}.attn.c_proj",
        "blocks.mlp.up": f"{layer}.mlp.c_fc",
        "blocks.mlp.down": f"{layer}.mlp.c_proj",
    }
    norms = {
        "blocks.attention_norm": f"{layer}.ln_1",
        "blocks.mlp_norm": f"{layer}.ln_2",
        "final_norm": "transformer.ln_f",
    }
    leaves = [
        Leaf("embedding.embedding", ("transformer.wte.weight",)),
        Leaf("position", ("transformer.wpe.weight",), rows=length),
    ]
    for path, name in linear.items():
        leaves += list_linear(path, [name], transposed=False)
    for path, name in norms.items():
        leaves += list_norm(path, name)
    if not config.tied_head:
        leaves += list_linear("head", ["lm_head"], use_bias=False)
    return leaves


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    fixed=PLAIN
    | {
        "positions": ("learned",),
        "causal": (True,),
        "norm": ("layer",),
        "norm_position": ("pre",),
        "mlp_activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
        "embedding_norm": (False,),
        "head_transform": (False,),
    },
    read_config=_read_config,
    write_config=_write_config,
    list_leaves=_list_leaves,
    list_limits=list_head_limits,
    prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    copies={"lm_head.weight": "transformer.wte.weight"},
    has_biases=True,
)
"""Models of GPT-2's shape."""
