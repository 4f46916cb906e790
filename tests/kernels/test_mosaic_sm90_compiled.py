"""The Hopper kernels compiled for an H200 without one: no spills, tensor cores, enough memory."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_attention
from pallas_kernels.block_sparse_attention.mosaic_sm90 import attention
from pallas_kernels.machine_code import parse
from pallas_kernels.products_in_flight import find_loops
from tests.kernels.machine_checks import check_attention, is_attention_forward
from tests.tiers import tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of the kernels; lengths are those of real use."""

    head_dim: int = 64
    blocks: tuple[int, int] = (64, 64)
    causal: bool = False
    masks: str = "none"  # positions: none, keys, segments, both
    zero: bool = False
    group: int = 1
    batch: int = 2
    own_masks: bool = False
    dtype: str = "bfloat16"

    def __str__(self):
        flags = [n for n in ("causal", "zero", "own_masks") if getattr(self, n)]
        size = f"h{self.head_dim}-{self.blocks[0]}x{self.blocks[1]}-{self.masks}"
        return "-".join([size, f"g{self.group}-b{self.batch}", *flags, self.dtype])


# Every pair of choices that share a loop of a kernel occurs; the slow test has all of them.
_PAIRWISE = (
    Setting(head_dim=128, blocks=(128, 128)),
    Setting(
        head_dim=128, blocks=(64, 64), causal=True, masks="both", group=4, batch=16,
        own_masks=True,
    ),
    Setting(head_dim=128, blocks=(64, 128), causal=True, zero=True, dtype="float16"),
    Setting(head_dim=128, blocks=(128, 64), masks="keys", group=4, causal=True),
    Setting(head_dim=128, blocks=(32, 32), masks="keys", zero=True, causal=True),
    Setting(head_dim=64, blocks=(64, 64), causal=True, group=4, batch=4, own_masks=True),
    Setting(head_dim=64, blocks=(128, 128), masks="segments", own_masks=True, zero=True),
    Setting(head_dim=64, blocks=(64, 32), causal=True, masks="both", zero=True),
    Setting(head_dim=32, blocks=(64, 64), masks="keys", zero=True),
    Setting(head_dim=32, blocks=(32, 32), masks="keys", zero=True),
    Setting(head_dim=32, blocks=(128, 32), causal=True, group=4, masks="segments"),
)  # fmt: skip
_GRID = [
    Setting(
        head_dim=head_dim, blocks=blocks, causal=causal, masks=masks, zero=zero, group=group,
        batch=batch, own_masks=group > 1 and causal,
    )
    for head_dim, blocks, causal, (masks, zero), (group, batch) in itertools.product(
        (32, 64, 128),
        ((64, 64), (64, 128), (128, 64), (128, 128), (32, 32)),
        (False, True),
        (("none", False), ("keys", True), ("both", False)),
        # No groups; groups in parts; whole groups, where there is work enough.
        ((1, 2), (4, 1), (4, 16)),
    )
    if not (head_dim == 128 and blocks == (32, 32) and masks == "both")
]  # fmt: skip


def _compile(setting, *, gradient=True):
    B, T, N = setting.batch, 2048, 8
    q = jax.ShapeDtypeStruct((B, T, N, setting.head_dim), setting.dtype)
    k = jax.ShapeDtypeStruct((B, T, N // setting.group, setting.head_dim), setting.dtype)
    grid = (T // setting.blocks[0], T // setting.blocks[1])
    mask = jax.ShapeDtypeStruct((1, N if setting.own_masks else 1, *grid), bool)
    positions = {}
    if setting.masks in ("keys", "both"):
        positions["kv_mask"] = jax.ShapeDtypeStruct((B, T), bool)
    if setting.masks in ("segments", "both"):
        positions["segment_ids"] = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def attend(q, k, v, mask, positions):
        return block_sparse_attention(
            q, k, v, mask, block_q=setting.blocks[0], block_kv=setting.blocks[1],
            causal=setting.causal, pruned_logits="zero" if setting.zero else "masked",
            implementation="mosaic_sm90", return_lse=True, **positions,
        )  # fmt: skip

    def forward_and_backward(q, k, v, mask, positions):
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, mask, positions), q, k, v)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    return aot.compile_for(forward_and_backward if gradient else attend, q, k, k, mask, positions)


def _check(report, num_kernels):
    assert len(report.kernels) == num_kernels
    for kernel in report.kernels:
        check_attention(kernel)
        if is_attention_forward(kernel):
            _check_forward_loops(kernel)
        assert "HGMMA" in kernel.sass and "wgmma.mma_async" in kernel.ptx, kernel
        assert "UTMALDG" in kernel.sass, f"{kernel} copies no tiles"


def _check_forward_loops(kernel):
    loops = find_loops(parse(kernel.sass))
    steps = [loop for loop in loops if loop.groups == 2]
    assert steps, f"{kernel} has no loop that multiplies twice"
    for loop in steps:
        # The turn is handed over, keys are given back, values are given back.
        assert loop.arrivals == (2, 1, 0), (kernel, loop)
        count, beside = loop.exponentials
        assert count == beside > 0, f"{kernel} computes no exponentials beside products: {loop}"
    others = {loop.arrivals for loop in loops if loop.groups != 2}
    # The first step of a list, which may be no loop, and the values of its last.
    assert others <= {(1, 0), (0,)}, (kernel, others)


# The widest, the smallest, and one of everything; the rest is for `make test-all`.
_FEW = [_PAIRWISE[i] for i in (1, 2, 10)]


@pytest.mark.parametrize(
    "setting",
    tier(
        {str(setting): setting for setting in _PAIRWISE},
        fast=(),
        slow=[str(setting) for setting in _PAIRWISE if setting not in _FEW],
    ),
)
def test_kernels_compile_without_spills(setting):
    _check(_compile(setting), 3)


@pytest.mark.slow
@pytest.mark.parametrize("setting", _GRID, ids=str)
def test_every_configuration_compiles_without_spills(setting):
    _check(_compile(setting), 3)


@pytest.mark.ci
@pytest.mark.parametrize(("batch", "parts"), [(1, 4), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_groups_are_split_where_they_leave_processors_idle(batch, parts):
    # Without a split, 32 programs for each example, on 132 processors.
    setting = Setting(head_dim=128, blocks=(128, 128), causal=True, group=4, batch=batch)
    report = _compile(setting)
    _check(report, 3)
    sums = re.findall(rf"f32\[{batch},2048,(\d+),128\]\S* get-tuple-element", report.hlo)
    assert [int(n) for n in sums] == [2 * parts] * (2 if parts > 1 else 0)
    # The sums of dK and dV; the cotangent; lse, what is made of it and delta; lists.
    sums_bytes = len(sums) * 4 * batch * 2048 * 2 * parts * 128
    rows = batch * 2048 * 8
    others = 2 * rows * 128 + 4 * 4 * rows + 2**17
    assert sums_bytes <= report.temp_bytes <= sums_bytes + others


@pytest.mark.ci
def test_a_wide_head_compiles_forward():
    _check(_compile(Setting(head_dim=256, blocks=(128, 128)), gradient=False), 1)


@pytest.mark.parametrize(
    ("head_dim", "products"),
    [
        pytest.param(32, (12, 8, 12), marks=pytest.mark.slow),
        pytest.param(64, (16, 12, 16), marks=pytest.mark.ci),
    ],
)
def test_tensor_cores_do_the_products_and_nothing_else(head_dim, products):
    report = _compile(Setting(head_dim=head_dim, blocks=(64, 64)))
    _check(report, 3)
    # Products of a 64 x 64 tile, 16 positions of the contraction an instruction: Q K^T and P V, and
    # once more Q K^T of the first step and P V of the last; Q K^T, dO V^T and dS K; K Q^T, V dO^T,
    # P^T dO and dS^T Q.
    count = {k.name.split("attention_")[1].rsplit("_", 1)[0]: k for k in report.kernels}
    instructions = {name: kernel.sass.count("HGMMA") for name, kernel in count.items()}
    names = ("forward", "backward_queries", "backward_keys")
    assert instructions == dict(zip(names, products, strict=True))
    # A group for each product; of the forward kernel also the first step and the values of the
    # last, loops that are taken once.
    groups = {
        name: [loop.groups for loop in find_loops(parse(kernel.sass))]
        for name, kernel in count.items()
    }
    assert groups == {"forward": [1, 2, 1], "backward_queries": [3], "backward_keys": [4]}


@pytest.mark.ci
def test_the_form_for_the_interpreter_compiles_too(monkeypatch):
    # It differs in where the left operands of products are, and in nothing else.
    monkeypatch.setattr(attention, "is_interpreted", lambda: True)
    _check(_compile(Setting(head_dim=64, causal=True)), 3)


@pytest.mark.ci
def test_vmap_compiles():
    q = jax.ShapeDtypeStruct((2, 1, 256, 2, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 1, 1, 4, 4), bool)

    def attend(q, mask):
        return block_sparse_attention(
            q, q, q, mask, block_q=64, block_kv=64, implementation="mosaic_sm90"
        )

    _check(aot.compile_for(jax.vmap(attend), q, mask), 1)
