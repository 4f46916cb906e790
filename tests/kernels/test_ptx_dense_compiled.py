"""The compiled kernels of dense tensor-core products, run instruction by instruction.

Attention, the mean attention map and the block-sparse matmul, against "xla" and the contracts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, mean_attention_map
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.kernels.ptx_host import ptx_machine_runs_kernels

# The ends of what asynchronous units may do, and something in between.
TIMES = {
    "late": dict(reads="late", copies="late"),
    "early": dict(reads="early", copies="early"),
    "random": dict(reads="late", copies="random", seed=3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """One call."""

    lengths: tuple[int, int] = (192, 192)
    heads: tuple[int, int] = (1, 1)
    head_dim: int = 64
    blocks: tuple[int, int] = (64, 64)
    causal: bool = False
    has_kv_mask: bool = False
    pruned_logits: str = "masked"
    dtype: str = "bfloat16"

    def run(self, implementation):
        """Return out, lse and the gradients of q, k and v."""
        (N, K), (T, S) = self.heads, self.lengths
        shapes = [(1, T, N, self.head_dim), *2 * [(1, S, K, self.head_dim)]]
        *qkv, d_out = make_normal((*shapes, shapes[0]), self.dtype)
        rng = np.random.default_rng(0)
        mask = rng.random((1, N, T // self.blocks[0], S // self.blocks[1])) < 0.6
        mask[..., 0] = True
        kv_mask = jnp.asarray(rng.random((1, S)) < 0.8).at[:, 0].set(True)
        options = dict(kv_mask=kv_mask) if self.has_kv_mask else {}

        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, jnp.asarray(mask), block_q=self.blocks[0], block_kv=self.blocks[1],
                causal=self.causal, pruned_logits=self.pruned_logits, return_lse=True,
                implementation=implementation, **options,
            )  # fmt: skip

        (out, lse), pull_back = jax.vjp(attend, *qkv)
        return out, lse, *pull_back((d_out, jnp.ones_like(lse)))


ATTENTION = {
    "causal": Attention(causal=True),
    "grouped keys, wide blocks": Attention(
        lengths=(128, 256), heads=(2, 1), blocks=(128, 128), head_dim=128, has_kv_mask=True
    ),
    "zero, f16": Attention(
        lengths=(128, 192), blocks=(64, 64), head_dim=32, pruned_logits="zero", dtype="float16"
    ),
}


def check_attention(case, **times):
    with ptx_machine_runs_kernels(**times):
        got = jax.block_until_ready(case.run("mosaic_sm90"))
    wanted = case.run("xla")
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert error(a, b.astype(jnp.float32)) < 0.01, name


@pytest.mark.ci
@pytest.mark.parametrize("times", ["late"])
def test_attention(times):
    check_attention(ATTENTION["causal"], **TIMES[times])


@pytest.mark.slow
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention_of_every_kind(case, times):
    check_attention(case, **times)


def check_map(head_dim, lengths, **times):
    T, S = lengths
    q, k = make_normal(((1, T, 2, head_dim), (1, S, 1, head_dim)), "bfloat16")
    with ptx_machine_runs_kernels(**times):
        got = mean_attention_map(q, k, implementation="mosaic_sm90")
        jax.block_until_ready(got)
    assert error(got, mean_attention_map(q, k, implementation="reference")) < 0.01


@pytest.mark.ci
def test_mean_map():
    check_map(64, (256, 128), **TIMES["late"])


@pytest.mark.slow
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
# Two tiles of queries are a cluster.
@pytest.mark.parametrize(
    ("head_dim", "lengths"), [(64, (128, 256)), (128, (256, 128)), (256, (256, 128))]
)
def test_mean_map_of_every_width(head_dim, lengths, times):
    check_map(head_dim, lengths, **times)


def check_block_products(block, dtype, masks, **times):
    # Two row tiles, of one cluster; with all blocks, two of dw together.
    case = BlockMatmulCase(leading=(2, 65), grid=(2, 4), block=block, dtype=dtype, mask_names=masks)
    with ptx_machine_runs_kernels(**times):
        check_block_matmul(case, call_block_matmul("mosaic_sm90"))


@pytest.mark.ci
def test_block_products():
    check_block_products((64, 64), "bfloat16", ("gradient of everything",), **TIMES["late"])


@pytest.mark.slow
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize(
    ("block", "dtype"), [((64, 128), "bfloat16"), ((128, 64), "float16"), ((128, 128), "bfloat16")]
)
def test_block_products_of_every_kind(block, dtype, times):
    masks = ("global_row_and_column", "gradient of everything", "empty_columns")
    check_block_products(block, dtype, masks, **times)
