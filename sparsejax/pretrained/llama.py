"""Llama, and Mistral without sliding windows."""

from typing import Any

from sparsejax.models import TransformerConfig
from sparsejax.pretrained.family import PLAIN, Family
from sparsejax.pretrained.leaves import Leaf, list_linear, list_norm
from sparsejax.pretrained.settings import Settings

# Our name of a setting -> that of `transformers`.
_LLAMA3 = {
    "rotary_factor": "factor",
    "rotary_low_frequency_factor": "low_freq_factor",
    "rotary_high_frequency_factor": "high_freq_factor",
    "rotary_original_length": "original_max_position_embeddings",
}


def _read_config(settings: Settings) -> dict[str, Any]:
    settings.get_choice("hidden_act", ("silu",))
    settings.get_choice("sliding_window", (None,), None)
    width, num_heads = settings.get_int("hidden_size"), settings.get_int("num_attention_heads")
    settings.check(width % num_heads == 0, "hidden_size", f"a multiple of {num_heads} heads")
    features = num_heads * settings.get_int("head_dim", width // num_heads)
    use_bias = settings.get_choice("attention_bias", (False, True), False)
    # Biases are those of all linear layers or of none.
    settings.get_choice("mlp_bias", (use_bias,), False)
    return {
        "vocab_size": settings.get_int("vocab_size"),
        "num_layers": settings.get_int("num_hidden_layers"),
        "model_dim": width,
        "num_heads": num_heads,
        "num_kv_heads": settings.get_int("num_key_value_heads", num_heads),
        "qkv_features": 0 if features == width else features,
        "mlp_dim": settings.get_int("intermediate_size"),
        "max_length": settings.get_int("max_position_embeddings"),
        "norm_epsilon": settings.get_float("rms_norm_eps"),
        "use_bias": use_bias,
        "tied_head": settings.get_choice("tie_word_embeddings", (False, True), False),
        **_read_rotary(settings),
    }


def _read_mistral(settings: Settings) -> dict[str, Any]:
    # Its class has windows unless a file says otherwise.
    settings.get_choice("sliding_window", (None,))
    return _read_config(settings)


def _read_rotary(settings: Settings) -> dict[str, Any]:
    """Read what versions of `transformers` before and after 5 write."""
    rope = settings.get_section("rope_parameters") or settings.get_section("rope_scaling")
    if rope is None:
        return {"rotary_wavelength": settings.get_float("rope_theta", 10_000.0)}
    names = {"rope_theta", "rope_type", "type"}
    key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.get_choice(key, ("default", "linear", "llama3"), "default")
    found: dict[str, Any] = {
        "rotary_wavelength": rope.get_float(
            "rope_theta", settings.get_float("rope_theta", 10_000.0)
        )
    }
    if kind == "linear":
        rope.check_names(names | {"factor"})
        return found | {"rotary_scaling": "linear", "rotary_factor": rope.get_float("factor")}
    if kind == "llama3":
        rope.check_names(names | set(_LLAMA3.values()))
        get = {"rotary_original_length": rope.get_int}
        scaling = {ours: get.get(ours, rope.get_float)(theirs) for ours, theirs in _LLAMA3.items()}
        return found | scaling | {"rotary_scaling": "llama3"}
    rope.check_names(names)
    return found


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    # The older of the two forms: newer versions of `transformers` read it too.
    rope = None
    if config.rotary_scaling == "linear":
        rope = {"rope_type": "linear", "factor": config.rotary_factor}
    elif config.rotary_scaling == "llama3":
        rope = {theirs: getattr(config, ours) for ours, theirs in _LLAMA3.items()}
        rope["rope_type"] = "llama3"
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rotary_wavelength,
        "rope_scaling": rope,
    }


def _list_leaves(config: TransformerConfig, length: int) -> list[Leaf]:
    del length
    layer, bias = "model.layers.{}", config.use_bias
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    leaves = [
        Leaf("embedding.embedding", ("model.embed_tokens.weight",)),
        *list_norm("blocks.attention_norm", f"{layer}.input_layernorm", use_bias=False),
        *list_linear(
            "blocks.attention.qkv",
            [f"{attention}.{name}_proj" for name in "qkv"],
            widths=[count * config.head_dim for count in heads],
            use_bias=bias,
        ),
        *list_linear("blocks.attention.out", [f"{attention}.o_proj"], use_bias=bias),
        *list_norm("blocks.mlp_norm", f"{layer}.post_attention_layernorm", use_bias=False),
        *list_linear(
            "blocks.mlp.up",
            [f"{mlp}.up_proj", f"{mlp}.gate_proj"],
            widths=[config.mlp_dim] * 2,
            use_bias=bias,
        ),
        *list_linear("blocks.mlp.down", [f"{mlp}.down_proj"], use_bias=bias),
        *list_norm("final_norm", "model.norm", use_bias=False),
    ]
    if not config.tied_head:
        leaves += list_linear("head", ["lm_head"], use_bias=False)
    return leaves


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    fixed=PLAIN
    | {
        "positions": ("rotary",),
        "causal": (True,),
        "norm": ("rms",),
        "norm_position": ("pre",),
        "mlp_activation": ("swiglu",),
        "embedding_norm": (False,),
        "head_transform": (False,),
    },
    read_config=_read_config,
    write_config=_write_config,
    list_leaves=_list_leaves,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)
"""Models of Llama's shape."""

MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM", model_type="mistral", read_config=_read_mistral
)
"""Those of Mistral that attend to all positions."""
