"""The packing and pruning kernels compiled for absent GPUs: no spills, wide accesses, no fusion."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, pack_nm, prune_mvue
from pallas_kernels.nm_matmul.call import PackFacts, PruneFacts

pytest.importorskip("jax_triton")

_WEIGHT = (1024, 4096)
_CALLS = [
    ("pack_nm", PackFacts(along_k=True, along_n=True, shape=_WEIGHT, dtype="bfloat16")),
    *(
        ("prune_mvue", PruneFacts(shape=(4096, 4096), axis=axis, dtype=dtype, exact=exact))
        for dtype, axis, exact in (("bfloat16", 0, False), ("float32", 1, True))
    ),
    # Tiles that stand out.
    *(
        ("prune_mvue", PruneFacts(shape=shape, axis=0, dtype="bfloat16"))
        for shape in ((4096, 1000), (4096, 3), (100,))
    ),
]


def _compile_call(op, facts, target):
    x = jax.ShapeDtypeStruct(facts.shape, facts.dtype)
    if op == "pack_nm":
        axis = "both" if facts.along_k and facts.along_n else int(facts.along_n)
        function, other = functools.partial(pack_nm, axis=axis), jax.ShapeDtypeStruct(x.shape, bool)
    else:
        function = functools.partial(prune_mvue, axis=facts.axis, exact=facts.exact)
        other = jax.eval_shape(lambda: jax.random.key(0))
    mesh = aot.make_gpu_mesh(aot.TARGETS[target])
    report = aot.compile_for(
        functools.partial(function, implementation="triton"), x, other, mesh=mesh
    )
    (kernel,) = report.kernels
    return kernel


def _find_faults(kernel, op, facts, target):
    gpu, faults = aot.TARGETS[target], []
    major, minor = gpu.compute_capability
    if not re.search(rf"\.target\s+sm_{major}{minor}", kernel.ptx):
        faults.append("compiled for another device")
    if kernel.name != op:
        faults.append(f"is called {kernel.name}")
    if kernel.spill_bytes or kernel.stack_bytes or kernel.remarks:
        faults.append(
            f"{kernel.spill_bytes} bytes of spills, stack {kernel.stack_bytes}, {kernel.remarks}"
        )
    # Half of what would let one block alone fill a processor: four are to run beside each other.
    if 4 * kernel.shared_memory_bytes > gpu.shared_memory_per_core_bytes or kernel.registers > 168:
        faults.append(f"{kernel.shared_memory_bytes} bytes shared, {kernel.registers} registers")
    # Arrays whose rows are whole pieces of 16 bytes are read and written so.
    ragged = op == "prune_mvue" and _is_ragged(facts)
    narrow = set(re.findall(r"LDG\.E(?!\.128)[.\w]*", kernel.sass))
    if not ragged and (narrow or "STG.E.128" not in kernel.sass):
        faults.append(
            f"loads of {sorted(narrow)}, stores of 16 bytes: {'STG.E.128' in kernel.sass}"
        )
    if op == "prune_mvue":
        faults += _find_roundings(kernel.ptx, exact=facts.exact)
    return [f"{op} {facts} on {gpu.name}: {fault}" for fault in faults]


def _is_ragged(facts):
    before, length, behind = facts.sizes
    return (behind if behind > 1 else before * length // 4) % 16


def _find_roundings(ptx, *, exact):
    """Return the f32 operations that are not rounded one by one, to nearest."""
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp)\.[a-z.]*f32\b", ptx))
    allowed = {"mul.rn.f32", "add.rn.f32", "sub.rn.f32"} | (set() if exact else {"div.rn.f32"})
    found = [f"computes with {name}" for name in sorted(operations - allowed)]
    if not exact and "div.rn.f32" not in operations:
        found.append("does not divide")
    return found + ["flushes to zero"] * (".ftz" in ptx)


def _name(value):
    return str(value) if isinstance(value, str) else "-".join(map(str, vars(value).values()))


@pytest.mark.ci
@pytest.mark.parametrize("target", ["a100", "rtx5090"])
@pytest.mark.parametrize(("op", "facts"), _CALLS, ids=_name)
def test_memory_is_accessed_in_wide_pieces_and_every_operation_rounds(op, facts, target):
    faults = _find_faults(_compile_call(op, facts, target), op, facts, target)
    assert not faults, "\n".join(faults)


@pytest.mark.ci
def test_a_division_that_is_not_to_nearest_is_seen(monkeypatch, tmp_path):
    from pallas_kernels.nm_matmul import triton as package
    from tests.kernels.broken_triton import break_kernel

    broken = "tl.div_rn(a, total) + _FLOOR", "a / total + _FLOOR"
    break_kernel(monkeypatch, tmp_path, package, "prune_kernel", *broken)
    facts = PruneFacts(shape=(64, 512), axis=0, dtype="bfloat16")
    faults = _find_faults(_compile_call("prune_mvue", facts, "a100"), "prune_mvue", facts, "a100")
    assert len(faults) == 1 and "computes with div.full.f32" in faults[0]


@pytest.mark.ci
def test_stacked_weights_are_one_launch():
    w = jax.ShapeDtypeStruct((3, 64, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct(w.shape, bool)
    mesh = aot.make_gpu_mesh(aot.TARGETS["h200"])
    pack = functools.partial(pack_nm, axis="both", implementation="triton")
    report = aot.compile_for(pack, w, mask, mesh=mesh)
    assert len(report.kernels) == 1
    # Nothing is copied: the weight, its mask and what was packed.
    assert report.temp_bytes < 1024, report.temp_bytes
