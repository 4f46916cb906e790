"""What do the compilers make of the Triton kernels, on every device that they are for?

    make compiled-report          # or python -m benchmarks.compiled_kernels [--op=NAME]

Nothing runs: Triton and ptxas compile every entry of the tables of tiles for every compute
capability that has a row, and registers, spills, shared memory and instructions are read off. What
was compiled before from the same kernels is not compiled again, so the command may be stopped and
called again. It exits with 1 if a kernel spills or its shared memory does not fit.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks.harness import RESULTS
from pallas_kernels import aot
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_matmul.call import BlockFacts
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.nm_matmul.call import NMFacts, PackFacts, PruneFacts
from pallas_kernels.source_hash import hash_modules
from pallas_kernels.transposable_mask.call import TransposableFacts
from pallas_kernels.triton.tile_tables import find_row
from pallas_kernels.verdicts import describe_call

FOLDER = RESULTS / "compiled_kernels"
TABLE = RESULTS / "compiled_kernels.md"
# What is counted in machine code: products on tensor cores by their family, copies to shared memory
# ahead of their use, and accesses of 16 bytes. Of kernels with sparse products these as well, and
# loads of fragments.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "LDG.E.128", "STG.E.128")
_SPARSE_INSTRUCTIONS = ("HMMA.SP", "LDSM")

type Record = Mapping[str, Any]


def list_targets() -> dict[tuple[int, int], list[aot.GpuTarget]]:
    """List the devices of each compute capability; one is compiled for, for the others as well."""
    targets: dict[tuple[int, int], list[aot.GpuTarget]] = {}
    for gpu in aot.TARGETS.values():
        targets.setdefault(gpu.compute_capability, []).append(gpu)
    return dict(sorted(targets.items()))


def find_block_bytes(capability: tuple[int, int]) -> int:
    """Return the shared memory that a block may take on all devices of a compute capability.

    Args:
      capability: (major, minor); one that no device has gets what an older one has.
    """
    return min(gpu.shared_memory_per_block_bytes for gpu in find_row(list_targets(), capability))


def _list_attention() -> Iterator[AttentionFacts]:
    base = AttentionFacts(
        batch=2, num_queries=256, num_keys=256, num_heads=4, num_kv_heads=1, head_dim=64,
        dtype="bfloat16", mask_shape=(1, 4), block_q=128, block_kv=128, causal=True,
        has_kv_mask=False, has_segments=False, scale=0.125, pruned_logits="zero", return_lse=True,
    )  # fmt: skip
    masked = dataclasses.replace(
        base, num_kv_heads=4, mask_shape=(1, 1), has_kv_mask=True, has_segments=True
    )
    plain = dataclasses.replace(base, causal=False, pruned_logits="masked")
    head_dims = (32, 64, 128, 256)
    for kind, head_dim, block in itertools.product((base, masked), head_dims, (128, 32, 16)):
        yield dataclasses.replace(kind, head_dim=head_dim, block_q=block, block_kv=block)
    for kind, (block_q, block_kv) in itertools.product((base, masked), ((16, 128), (128, 16))):
        yield dataclasses.replace(kind, block_q=block_q, block_kv=block_kv)
    for head_dim in head_dims:
        yield dataclasses.replace(plain, head_dim=head_dim)
        yield dataclasses.replace(base, head_dim=head_dim, dtype="float16")
    for kind, head_dim, block in itertools.product((base, masked), (64, 128), (128, 16)):
        yield dataclasses.replace(
            kind, head_dim=head_dim, dtype="float32", block_q=block, block_kv=block
        )


def _list_block_matmul() -> Iterator[BlockFacts]:
    base = BlockFacts(rows=1000, shape=(512, 768), grid=(4, 6), dtype="bfloat16", has_bias=True)
    for dtype, side in itertools.product(("bfloat16", "float32"), (128, 64, 32, 16)):
        grid = (base.shape[0] // side, base.shape[1] // side)
        yield dataclasses.replace(base, grid=grid, dtype=dtype)
    yield dataclasses.replace(base, dtype="float16", has_bias=False, rows=1024)


def _list_transposable() -> Iterator[TransposableFacts]:
    for dtype in ("bfloat16", "float16", "float32"):
        yield TransposableFacts(rows=512, columns=768, dtype=dtype)


def _list_map() -> Iterator[MapFacts]:
    plain = MapFacts(num_queries=512, num_keys=512, head_dim=64, dtype="bfloat16", causal=False)
    # Every mask, and lengths that end inside a tile.
    cut = dataclasses.replace(plain, num_queries=500, num_keys=490, causal=True, has_kv_mask=True)
    for dtype, head_dims in (
        ("bfloat16", (16, 32, 64, 80, 128, 256)),
        ("float16", (64, 128)),
        ("float32", (64, 128, 256)),
    ):
        for head_dim, facts in itertools.product(head_dims, (plain, cut)):
            yield dataclasses.replace(facts, dtype=dtype, head_dim=head_dim)
    yield dataclasses.replace(cut, has_lse=True)


def _list_nm_matmul() -> Iterator[NMFacts]:
    # Many tiles and few; each sets how y, dx and dw are cut.
    many = NMFacts(
        rows=8192, inner=2048, columns=4096, dtype="bfloat16", transposable=True,
        grad_pruning="mvue",
    )  # fmt: skip
    few = dataclasses.replace(many, rows=1000, inner=640, columns=768, has_bias=True)
    for facts, activation in itertools.product((many, few), (None, "gelu", "geglu", "swiglu")):
        yield dataclasses.replace(facts, activation=activation)
    yield dataclasses.replace(many, dtype="float16", activation="gelu", has_bias=True)
    yield dataclasses.replace(few, dtype="float16", activation="swiglu", grad_pruning="mvue_exact")
    # Sides that 128 does not divide, and no more tokens than half of a tile.
    yield dataclasses.replace(few, inner=192, columns=320, activation="gelu")
    yield dataclasses.replace(few, rows=40, columns=320, has_bias=False)
    yield dataclasses.replace(few, rows=64, activation="geglu")


def _list_packing() -> Iterator[PackFacts]:
    axes = ((True, False), (False, True), (True, True))
    for dtype, (along_k, along_n) in itertools.product(("bfloat16", "float16"), axes):
        yield PackFacts(along_k=along_k, along_n=along_n, shape=(512, 768), dtype=dtype)


def _list_pruning() -> Iterator[PruneFacts]:
    dtypes = ("bfloat16", "float16", "float32")
    for dtype, axis, exact in itertools.product(dtypes, (0, 1), (False, True)):
        yield PruneFacts(shape=(512, 768), axis=axis, dtype=dtype, exact=exact)


# Op -> calls that together reach every entry of its tables of tiles, each cut in every way.
CALLS: Mapping[str, tuple[Any, ...]] = {
    "block_sparse_attention": tuple(_list_attention()),
    "block_sparse_matmul": tuple(_list_block_matmul()),
    "mean_attention_map": tuple(_list_map()),
    "nm_matmul": tuple(_list_nm_matmul()),
    "pack_nm": tuple(_list_packing()),
    "prune_mvue": tuple(_list_pruning()),
    "transposable_mask": tuple(_list_transposable()),
}


def describe_program(op: str, facts: Any) -> str:
    """Name a call of `CALLS`: by its options, and by its sizes if others have the same options.

    Args:
      op: name of the op.
      facts: of the call.
    """
    call = describe_call(op, facts)
    alike = [other for other in CALLS[op] if describe_call(op, other) == call]
    return call if len(alike) == 1 else f"{call}, {' x '.join(map(str, facts.sizes))}"


def hash_kernels(op: str) -> str:
    """Hash the code that decides an op's programs: its Triton folder, and the launch.

    Lists of blocks are left out: kernels read them, and are the same whatever they hold.

    Args:
      op: name of the op.

    Returns:
      str, 16 hexadecimal digits.
    """
    folder = f"{_find_package(op)}.triton"
    return hash_modules(folder, "pallas_kernels.triton.launch", without=("lists",))


def _find_package(op: str) -> str:
    folders = {
        "mean_attention_map": "attention_map",
        "pack_nm": "nm_matmul",
        "prune_mvue": "nm_matmul",
    }
    return f"pallas_kernels.{folders.get(op, op)}"


def compile_call(op: str, facts: Any, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """Compile the kernels of a call, gradients included.

    Args:
      op: name of the op.
      facts: of the call.
      capability: of the device.

    Returns:
      list of dict, what a record keeps of each kernel.
    """
    problem = _make_problem(op, facts)
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (problem.inputs, next(iter(problem.masks.values()))),
    )
    run = problem.call("triton", tuple(problem.names))
    mesh = _make_mesh(capability)
    return [_describe(kernel) for kernel in aot.compile_triton_kernels(run, *structs, mesh=mesh)]


@functools.lru_cache(maxsize=1)
def _make_problem(op: str, facts: Any) -> Any:
    return MAKERS[op].make(facts)


@functools.cache
def _make_mesh(capability: tuple[int, int]) -> jax.sharding.Mesh:
    return aot.make_gpu_mesh(list_targets()[capability][0])


def _describe(kernel: aot.KernelReport) -> dict[str, Any]:
    is_sparse = _SPARSE_INSTRUCTIONS[0] in kernel.sass
    counts = {
        name: len(re.findall(rf"(?<![A-Z]){re.escape(name)}\b", kernel.sass))
        for name in (*INSTRUCTIONS, *(_SPARSE_INSTRUCTIONS if is_sparse else ()))
    }
    return {
        "name": kernel.name,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "stack_bytes": kernel.stack_bytes,
        "shared_memory_bytes": kernel.shared_memory_bytes,
        "instructions": {name: count for name, count in counts.items() if count},
    }


def find_path(op: str) -> pathlib.Path:
    """Return the file of an op's records."""
    return FOLDER / f"{op}.json"


def read_records(op: str) -> dict[str, Any]:
    """Read what was compiled for an op.

    Args:
      op: name of the op.

    Returns:
      dict: `source`, the hash of the kernels; `versions` of the compilers; `programs`, a list of
      dict with `call`, `capability` and `kernels`.
    """
    return json.loads(find_path(op).read_text())


def find_faults(kernel: Record, capability: tuple[int, int]) -> list[str]:
    """Say what is wrong with a kernel: spilled registers, or shared memory that does not fit.

    Args:
      kernel: a record.
      capability: of the device.
    """
    faults = []
    if kernel["spill_bytes"] or kernel["stack_bytes"]:
        faults.append(f"{kernel['spill_bytes']} bytes spilled, stack {kernel['stack_bytes']}")
    for gpu in list_targets()[capability]:
        if kernel["shared_memory_bytes"] > gpu.shared_memory_per_block_bytes:
            faults.append(f"{kernel['shared_memory_bytes']} bytes of shared memory on {gpu.name}")
    return faults


def find_versions() -> dict[str, str]:
    """Return the versions of what decides the machine code beside the kernels."""
    names = ("jax", "jax-triton", "triton", "nvidia-cuda-nvcc")
    return {name: importlib.metadata.version(name) for name in names}


def _compile_op(op: str) -> list[str]:
    """Compile what is missing of an op; return the faults of all of it."""
    source, versions = hash_kernels(op), find_versions()
    programs: list[dict[str, Any]] = []
    if find_path(op).exists():
        records = read_records(op)
        if (records["source"], records["versions"]) == (source, versions):
            programs = records["programs"]
    known = {(program["call"], tuple(program["capability"])) for program in programs}
    wanted = {(describe_program(op, facts), c) for facts in CALLS[op] for c in list_targets()}
    programs = [p for p in programs if (p["call"], tuple(p["capability"])) in wanted]
    for facts, capability in itertools.product(CALLS[op], list_targets()):
        call = describe_program(op, facts)
        if (call, capability) in known:
            continue
        kernels = compile_call(op, facts, capability)
        programs.append({"call": call, "capability": capability, "kernels": kernels})
        _write(find_path(op), {"source": source, "versions": versions, "programs": programs})
        for line in _list_faults(programs[-1]):
            print(line, flush=True)
        print(f"compiled {call} for {capability[0]}.{capability[1]}", flush=True)
    return [fault for program in programs for fault in _list_faults(program)]


def _list_faults(program: Record) -> list[str]:
    capability = tuple(program["capability"])
    return [
        f"{program['call']} for {capability[0]}.{capability[1]}: {kernel['name']}: {fault}"
        for kernel in program["kernels"]
        for fault in find_faults(kernel, capability)
    ]


def _write(path: pathlib.Path, records: Record) -> None:
    """Write records, a line for each program, through a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in records.items() if name != "programs"}
    lines = ",\n".join(json.dumps(program) for program in records["programs"])
    text = f'{json.dumps(head)[:-1]}, "programs": [\n{lines}\n]}}\n'
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def make_table() -> str:
    """Make the table: for each kernel and capability, the extremes over all calls."""
    head = (
        "compute capability", "devices", "kernel", "programs", "registers", "spilled bytes",
        "shared memory, bytes", "products on tensor cores",
    )  # fmt: skip
    rows = []
    for op, (capability, devices) in itertools.product(CALLS, list_targets().items()):
        if not find_path(op).exists():
            continue
        found: dict[str, list[Record]] = {}
        for program in read_records(op)["programs"]:
            if tuple(program["capability"]) == capability:
                for kernel in program["kernels"]:
                    found.setdefault(kernel["name"], []).append(kernel)
        names = ", ".join(gpu.name.removeprefix("NVIDIA ") for gpu in devices)
        for name, kernels in found.items():
            rows.append(
                (
                    f"{capability[0]}.{capability[1]}",
                    names,
                    f"`{name}`",
                    str(len(kernels)),
                    _range(k["registers"] for k in kernels),
                    str(max(k["spill_bytes"] for k in kernels)),
                    _range(k["shared_memory_bytes"] for k in kernels),
                    ", ".join(_list_tensor_cores(kernels)) or "none",
                )
            )
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _range(values: Iterator[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}" if ordered[0] < ordered[-1] else str(ordered[0])


def _list_tensor_cores(kernels: Sequence[Record]) -> list[str]:
    names = ("HMMA", "HMMA.SP", "HGMMA", "UTCHMMA")
    found = [name for name in names if any(name in kernel["instructions"] for kernel in kernels)]
    # All of them may be sparse.
    dense = any(
        kernel["instructions"].get("HMMA", 0) > kernel["instructions"].get("HMMA.SP", 0)
        for kernel in kernels
    )
    return [name for name in found if name != "HMMA" or dense]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if no kernel has a fault.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=tuple(CALLS), help="one op instead of all")
    op = parser.parse_args(arguments).op
    faults = [fault for name in ([op] if op else CALLS) for fault in _compile_op(name)]
    table = make_table()
    TABLE.write_text(table)
    print("\n" + table)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
