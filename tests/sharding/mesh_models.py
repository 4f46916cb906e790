"""Models on eight fake devices against one: the values, the gradients, and what devices exchange.

JAX counts its devices once, so this is a program of its own, which `test_mesh_models` starts.
Arguments are names out of `CASES`; results go to standard output as JSON.
"""

import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.accounting.collectives import find_collectives
from sparsejax.models import AttentionOptions, LinearOptions, SparsityMask, make_transformer
from sparsejax.patterns import BlockPattern, NMPattern, WeightBlocks
from sparsejax.recipes import give_heads_masks
from sparsejax.sharding import AXES, make_mesh, shard_tree, use_mesh
from tests.small_models import make_config

BATCH, LENGTH, VOCAB = 8, 32, 64


class Case(NamedTuple):
    """A model and a mesh.

    Attributes:
      mesh: sizes that are not 1.
      model: changes of the model's settings.
      linear: how its linear layers multiply.
      attention: how it attends.
      own: whether projections are layers of a user's own.
      per_head: whether heads have masks of blocks of their own.
    """

    mesh: dict[str, int]
    model: dict[str, Any]
    linear: LinearOptions = LinearOptions()
    attention: AttentionOptions = AttentionOptions()
    own: bool = False
    per_head: bool = False


class OwnLinear(nnx.Linear):
    """A layer that does what it does in its own way."""

    def __call__(self, inputs):
        """Multiply and do nothing else."""
        return super().__call__(inputs)


_PRUNED = {"sparse_weights": (("mlp/.*", NMPattern(2, 4, transposable=True)),)}
_BLOCKS = {"sparse_weights": ((".*", WeightBlocks(8, 8)),)}
CASES = {
    "gates and grouped heads over tensor": Case(
        {"data": 2, "fsdp": 2, "tensor": 2},
        _PRUNED | {"mlp_activation": "geglu", "num_kv_heads": 2, "use_bias": True},
        LinearOptions(grad_pruning="mvue"),
    ),
    "repeated heads over context": Case(
        {"fsdp": 2, "context": 4}, _PRUNED | {"num_kv_heads": 2, "positions": "rotary"}
    ),
    "blocks over fsdp": Case({"fsdp": 8}, _BLOCKS),
    "blocks over tensor and context": Case({"fsdp": 2, "tensor": 2, "context": 2}, _BLOCKS),
    "dense over all": Case(
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"remat": True, "dropout_rate": 0.1},
        LinearOptions(sparse=False),
        AttentionOptions(sparse=False),
    ),
    "encoder-decoder over all": Case(
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"num_decoder_layers": 2, "causal": False, "num_kv_heads": 2},
        attention=AttentionOptions(sparse=False),
    ),
    "own layers over tensor": Case(
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"mlp_activation": "swiglu", "num_kv_heads": 4},
        LinearOptions(sparse=False),
        own=True,
    ),
    "blocks of each head over tensor and context": Case(
        {"fsdp": 2, "tensor": 2, "context": 2}, {"num_kv_heads": 2}, per_head=True
    ),
    "classifier over tensor and context": Case(
        {"fsdp": 2, "tensor": 2, "context": 2}, {"num_classes": 4, "causal": False}
    ),
}


def _make_config(case: Case):
    settings = {
        "vocab_size": VOCAB,
        "model_dim": 64,
        "num_heads": 8,
        "num_kv_heads": 8,
        "mlp_dim": 96,
        "max_length": LENGTH,
        "block": BlockPattern(block_q=8, block_kv=8),
    }
    return make_config(**settings | case.model)


def _make_masks(masks: Any) -> Any:
    """Prune: two of four weights along both axes, half of the blocks."""

    def prune(path, mask):
        if path[-1].key == "kernel_mask" and mask.shape[-1] % 4 == 0 and mask.shape[-2] >= 64:
            rows, columns = jnp.indices(mask.shape[-2:])
            return jnp.broadcast_to((rows // 2 + columns // 2) % 2 == 0, mask.shape)
        drawn = jax.random.bernoulli(jax.random.key(1), 0.5, mask.shape)
        return drawn | jnp.eye(*mask.shape[-2:], dtype=bool)

    return jax.tree_util.tree_map_with_path(prune, masks)


def run(name: str) -> dict[str, Any]:
    """Compute a model on one device and on a mesh.

    Args:
      name: out of `CASES`.

    Returns:
      "value", the relative difference of the loss; "gradient", the largest difference of a
      gradient; "moves", [kind, axes, bytes of the whole array] of each exchange; "weight", bytes of
      the largest weight of a layer; "activations", bytes of what one layer hands to the next.
    """
    case = CASES[name]
    config = _make_config(case)
    model = make_transformer(config, rngs=nnx.Rngs(0))
    if case.own:
        model.blocks.attention.qkv.__class__ = model.blocks.mlp.up.__class__ = OwnLinear
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    params, masks = nnx.to_pure_dict(params), nnx.to_pure_dict(masks)
    masks = _make_masks(give_heads_masks(masks, config.num_heads) if case.per_head else masks)
    key = jax.random.key(2)
    tokens = jax.random.randint(key, (BATCH, LENGTH), 0, VOCAB)
    mask = jnp.arange(LENGTH)[None] < jnp.arange(BATCH)[:, None] + LENGTH - BATCH
    draws = case.linear.grad_pruning != "none"

    def compute(params, masks, tokens):
        logits = nnx.merge(graphdef, params, masks)(
            tokens,
            decoder_tokens=tokens if config.num_decoder_layers else None,
            mask=None if config.causal else mask,
            dropout_key=key if config.dropout_rate else None,
            pruning_key=key if draws else None,
            attention_options=case.attention,
            linear_options=case.linear,
        ).logits
        return (jnp.sin(logits) ** 2).mean()

    step = jax.value_and_grad(compute)
    value, gradient = jax.jit(step)(params, masks, tokens)
    sizes = dict.fromkeys(AXES, 1) | case.mesh
    mesh = make_mesh(sizes)
    placed = jax.device_put(params, shardings := shard_tree(params, mesh))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed_masks = jax.device_put(masks, shard_tree(masks, mesh))
    placed_tokens = jax.device_put(tokens, everywhere)
    with use_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(everywhere, shardings))
        lowered = jitted.lower(placed, placed_masks, placed_tokens)
    program = lowered.compile()
    found, found_gradient = program(placed, placed_masks, placed_tokens)
    differences = jax.tree.map(
        lambda a, b: float(
            np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max()
        ),
        gradient,
        found_gradient,
    )
    moves = [
        [move.kind, "+".join(move.axes), move.whole_bytes]
        for move in find_collectives(program.as_text() or "", sizes)
    ]
    layer = config.model_dim * max(3 * config.model_dim, 2 * config.mlp_dim)
    copies = sizes["data"] * sizes["fsdp"] * sizes["context"]
    return {
        "value": abs(float(found) / float(value) - 1),
        "gradient": max(jax.tree.leaves(differences)),
        "moves": sorted(map(list, {tuple(move) for move in moves})),
        "weight": 4 * layer,
        "activations": 4 * BATCH * LENGTH * config.model_dim // copies,
    }


if __name__ == "__main__":
    told, sys.stdout = sys.stdout, sys.stderr
    json.dump({name: run(name) for name in sys.argv[1:] or CASES}, told)
