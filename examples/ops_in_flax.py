"""The ops in a Flax model of one's own: block-sparse attention and a 2:4 feed-forward layer.

python -m examples.ops_in_flax
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pallas_kernels import block_sparse_attention, nm_matmul, transposable_mask
from sparsejax.masks import sliding_window

BLOCK, LENGTH, DIM, HEADS = 16, 64, 32, 2


class Layer(nnx.Module):
    """Attention over a window of blocks, then y = gelu(x (W * M))."""

    def __init__(self, *, rngs):
        self.qkv = nnx.LinearGeneral(DIM, (3, HEADS, DIM // HEADS), rngs=rngs)
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (DIM, DIM)))
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)

    def __call__(self, x, block_mask, weight_mask):
        q, k, v = jnp.moveaxis(self.qkv(self.norm(x)), 2, 0)
        attended = block_sparse_attention(
            q, k, v, block_mask, block_q=BLOCK, block_kv=BLOCK, causal=True
        )
        x = x + attended.reshape(x.shape)
        return x + nm_matmul(x, self.w[...], weight_mask, transposable=True, activation="gelu")


def main(num_steps=20):
    """Train the layer to shift its input by one position; return the losses."""
    layer = Layer(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    block_mask = sliding_window(LENGTH // BLOCK, width=1, causal=True)[None, None]

    @jax.jit
    def step(params, state, weight_mask, x):
        def loss(params):
            y = nnx.merge(graphdef, params)(x, block_mask, weight_mask)
            return ((y[:, 1:] - x[:, :-1]) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return value, optax.apply_updates(params, updates), state

    losses = []
    for i in range(num_steps):
        # A mask is data: a new one compiles nothing.
        weight_mask = transposable_mask(params["w"][...])
        x = jax.random.normal(jax.random.key(i), (8, LENGTH, DIM))
        value, params, state = step(params, state, weight_mask, x)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    for i, value in enumerate(main()):
        print(f"step {i + 1}: loss {value:.3f}")
