"""A model of every kind, traced where types are wide and ranks are strict."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsejax.models import SparsityMask, Transformer
from sparsejax.patterns import NMPattern, Unstructured, WeightBlocks
from tests.flags.flags import assert_narrow, flags_set
from tests.small_models import LENGTH, make_config

_KINDS = {
    "decoder": {"sparse_weights": (("embedding", WeightBlocks(17, 8)), ("mlp/.*", NMPattern()))},
    "rotary": {"positions": "rotary", "num_kv_heads": 1, "use_bias": False, "dropout_rate": 0.1},
    "classifier": {"causal": False, "num_classes": 3, "num_towers": 2, "embedding_norm": True},
    "patches": {"causal": False, "num_classes": 3, "vocab_size": 0, "patch_values": 4},
    "encoder_decoder": {
        "causal": False,
        "num_decoder_layers": 1,
        "mlp_activation": "swiglu",
        "sparse_weights": ((".*mlp/.*", Unstructured()),),
    },
}


@pytest.mark.parametrize("kind", _KINDS)
def test_parameters_logits_and_gradients_stay_narrow(kind):
    config = make_config(**_KINDS[kind])
    shape = (2, LENGTH)
    if config.num_towers == 2:
        shape = (2, 2, LENGTH)
    if config.patch_values:
        shape = (2, LENGTH, config.patch_values)
    tokens = jax.ShapeDtypeStruct(shape, jnp.uint8 if config.patch_values else jnp.int32)
    target = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32) if config.num_decoder_layers else None

    def differentiate(tokens, target):
        graphdef, params, masks = nnx.split(
            Transformer(config, rngs=nnx.Rngs(0)), nnx.Param, SparsityMask
        )

        def loss(params):
            output = nnx.merge(graphdef, params, masks)(
                tokens,
                decoder_tokens=target,
                mask=jnp.ones(shape[: 3 if config.num_towers == 2 else 2], bool),
                dropout_key=jax.random.key(1),
                probe=True,
            )
            return output.logits.sum(), output

        return params, masks, jax.grad(loss, has_aux=True)(params)

    with flags_set("x64", "rank_promotion"):
        assert_narrow(jax.eval_shape(differentiate, tokens, target), kind)
