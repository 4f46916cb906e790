"""BERT, a masked language model; of its two kinds of tokens ours all have the first."""

from typing import Any

from sparsejax.models import TransformerConfig
from sparsejax.pretrained.family import PLAIN, Family, list_head_limits
from sparsejax.pretrained.leaves import Leaf, list_linear, list_norm
from sparsejax.pretrained.settings import Settings

_NUM_TOKEN_TYPES = 2


def _read_config(settings: Settings) -> dict[str, Any]:
    # The head's activation is that of the blocks.
    settings.get_choice("hidden_act", ("gelu",))
    settings.get_choice("position_embedding_type", ("absolute",), "absolute")
    settings.get_choice("is_decoder", (False,), False)
    settings.get_choice("tie_word_embeddings", (True,), True)
    settings.get_choice("type_vocab_size", (_NUM_TOKEN_TYPES,), _NUM_TOKEN_TYPES)
    num_heads = settings.get_int("num_attention_heads")
    return {
        "vocab_size": settings.get_int("vocab_size"),
        "num_layers": settings.get_int("num_hidden_layers"),
        "model_dim": settings.get_int("hidden_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "mlp_dim": settings.get_int("intermediate_size"),
        "max_length": settings.get_int("max_position_embeddings"),
        "norm_epsilon": settings.get_float("layer_norm_eps", 1e-12),
    }


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "type_vocab_size": _NUM_TOKEN_TYPES,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
    }


def _list_leaves(config: TransformerConfig, length: int) -> list[Leaf]:
    table, layer, head = "bert.embeddings", "bert.encoder.layer.{}", "cls.predictions"
    names = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
    return [
        Leaf("embedding.embedding", (f"{table}.word_embeddings.weight",)),
        Leaf(
            "position",
            (f"{table}.position_embeddings.weight",),
            rows=length,
            offset=f"{table}.token_type_embeddings.weight",
            offset_rows=_NUM_TOKEN_TYPES,
        ),
        *list_norm("embedding_norm", f"{table}.LayerNorm"),
        *list_linear("blocks.attention.qkv", names, widths=[config.model_dim] * 3),
        *list_linear("blocks.attention.out", [f"{layer}.attention.output.dense"]),
        *list_norm("blocks.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *list_linear("blocks.mlp.up", [f"{layer}.intermediate.dense"]),
        *list_linear("blocks.mlp.down", [f"{layer}.output.dense"]),
        *list_norm("blocks.mlp_norm", f"{layer}.output.LayerNorm"),
        *list_linear("head_transform.dense", [f"{head}.transform.dense"]),
        *list_norm("head_transform.norm", f"{head}.transform.LayerNorm"),
        Leaf("head_transform.bias", (f"{head}.bias",)),
    ]


BERT = Family(
    architecture="BertForMaskedLM",
    model_type="bert",
    fixed=PLAIN
    | {
        "positions": ("learned",),
        "causal": (False,),
        "norm": ("layer",),
        "norm_position": ("post",),
        "mlp_activation": ("gelu_exact",),
        "embedding_norm": (True,),
        "tied_head": (True,),
        "head_transform": (True,),
    },
    read_config=_read_config,
    write_config=_write_config,
    list_leaves=_list_leaves,
    list_limits=list_head_limits,
    ignored=r"bert\.(pooler|embeddings\.position_ids).*|cls\.seq_relationship\..*",
    copies={
        f"cls.predictions.decoder.{kind}": name
        for kind, name in (
            ("weight", "bert.embeddings.word_embeddings.weight"),
            ("bias", "cls.predictions.bias"),
        )
    },
    has_biases=True,
)
"""Models of BERT's shape."""
