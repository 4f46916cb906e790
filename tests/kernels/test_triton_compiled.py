"""The Triton kernels compiled for absent GPUs: no spills, tensor cores, enough memory."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_attention
from pallas_kernels.block_sparse_attention.triton.tiles import CAPABILITIES

pytest.importorskip("jax_triton")

# A target of each compute capability; the H200 stands for 9.0.
_TARGETS = {gpu.compute_capability: name for name, gpu in reversed(aot.TARGETS.items())}
# What tensor cores of a family are called in machine code.
_TENSOR_CORES = {8: ("HMMA",), 9: ("HGMMA", "HMMA"), 10: ("UTCHMMA", "HMMA"), 12: ("HMMA",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of the kernels; lengths are those of real use."""

    head_dim: int = 64
    blocks: tuple[int, int] = (128, 128)
    causal: bool = True
    masks: bool = False
    zero: bool = True
    group: int = 1
    own_masks: bool = False
    dtype: str = "bfloat16"

    def __str__(self):
        flags = [n for n in ("causal", "masks", "zero", "own_masks") if getattr(self, n)]
        size = f"h{self.head_dim}-{self.blocks[0]}x{self.blocks[1]}-g{self.group}"
        return "-".join([size, *flags, self.dtype])


def _compile(setting, target, batch=2, length=2048, heads=8):
    gpu = aot.TARGETS[target]
    q = jax.ShapeDtypeStruct((batch, length, heads, setting.head_dim), setting.dtype)
    k = jax.ShapeDtypeStruct((*q.shape[:2], heads // setting.group, q.shape[3]), setting.dtype)
    grid = (length // setting.blocks[0], length // setting.blocks[1])
    mask = jax.ShapeDtypeStruct((1, heads if setting.own_masks else 1, *grid), bool)
    positions = {}
    if setting.masks:
        positions["kv_mask"] = jax.ShapeDtypeStruct((batch, length), bool)
        positions["segment_ids"] = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward_and_backward(q, k, v, mask, positions):
        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, mask, block_q=setting.blocks[0], block_kv=setting.blocks[1],
                causal=setting.causal, pruned_logits="zero" if setting.zero else "masked",
                implementation="triton", return_lse=True, **positions,
            )  # fmt: skip

        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    mesh = aot.make_gpu_mesh(gpu)
    return gpu, aot.compile_for(forward_and_backward, q, k, k, mask, positions, mesh=mesh)


def _find_faults(kernel, gpu, setting):
    faults = []
    if kernel.spill_bytes or kernel.stack_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes, stack {kernel.stack_bytes}")
    if kernel.shared_memory_bytes > gpu.shared_memory_per_block_bytes:
        faults.append(f"{kernel.shared_memory_bytes} bytes of shared memory")
    major, minor = gpu.compute_capability
    if f".target sm_{major}{minor}" not in kernel.ptx.replace("\t", " "):
        faults.append("compiled for another device")
    if setting.dtype != "float32":
        names = _TENSOR_CORES[major]
        if not any(name in kernel.sass for name in names):
            faults.append(f"none of {names}")
    # dK and dV of wide heads find no room for a second tile.
    is_wide = setting.head_dim > 128 and "backward_keys" in kernel.name
    if not is_wide and "LDGSTS" not in kernel.sass:
        faults.append("no tile is copied ahead")
    return [f"{kernel.name}: {fault}" for fault in faults]


def _check(setting, target):
    gpu, report = _compile(setting, target)
    assert len(report.kernels) == 3
    faults = [fault for k in report.kernels for fault in _find_faults(k, gpu, setting)]
    assert not faults, f"{setting} on {gpu.name}:\n" + "\n".join(faults)


def test_a_kernel_reports_what_ptxas_made_of_it():
    gpu, report = _compile(Setting(causal=False, zero=False, blocks=(64, 64)), "rtx3090")
    names = ("forward", "backward_queries", "backward_keys")
    assert [k.name for k in report.kernels] == [f"block_sparse_attention_{n}" for n in names]
    for kernel in report.kernels:
        assert not _find_faults(kernel, gpu, Setting())
        assert 0 < kernel.registers <= 255 and kernel.remarks == ()
    # Tiles of 64 queries and 64 keys, 16 x 8 x 16 an instruction of one of four warps.
    assert report.kernels[0].sass.count("HMMA.16816") == 2 * 64 * 64 * 64 // (16 * 8 * 16) // 4
    # Queries, keys and values are read where they lie, and nothing is written that grows with the
    # square of the length.
    rows = 2 * 2048 * 8
    assert report.temp_bytes < 2 * rows * 64 + 8 * 4 * rows + 2**20


_SETTINGS = [
    *(Setting(head_dim=h, masks=m) for h, m in itertools.product((64, 128, 256), (False, True))),
    *(Setting(head_dim=h, dtype="float32") for h in (64, 128)),
]


@pytest.mark.ci
@pytest.mark.parametrize("target", ["a100", "rtx5090"])
@pytest.mark.parametrize("setting", _SETTINGS, ids=str)
def test_tiles_compile_without_spills(setting, target):
    _check(setting, target)


# One target for each family of instructions, both kinds of loops, and every way to cut tiles.
_FAMILIES = ("a100", "h200", "b200", "rtx5090")
_GRID = [
    Setting(
        head_dim=head_dim, blocks=blocks, masks=masks, dtype=dtype,
        group=1 if masks else 4, own_masks=not masks,
    )
    for dtype, head_dims in (("bfloat16", (32, 64, 128, 256)), ("float32", (64, 128)))
    for head_dim in head_dims
    for blocks in ((16, 16), (32, 32), (64, 64), (16, 128), (128, 16))
    for masks in (False, True)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", _FAMILIES)
@pytest.mark.parametrize("setting", _GRID, ids=str)
def test_every_configuration_compiles_without_spills(setting, target):
    _check(setting, target)


def test_every_row_of_the_table_has_a_target():
    assert set(CAPABILITIES) == set(_TARGETS)


@pytest.mark.ci
def test_kernels_inside_loops_are_reported_once():
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def attend(q, _):
        return block_sparse_attention(
            q, q, q, None, block_q=64, block_kv=64, implementation="triton"
        ), None

    def loop(q):
        return jax.lax.scan(attend, q, None, length=3)[0] + jax.vmap(
            lambda q: attend(q[None], None)[0][0]
        )(q)

    mesh = aot.make_gpu_mesh(aot.TARGETS["l40s"])
    assert len(aot.compile_for(loop, q, mesh=mesh).kernels) == 1
