"""The Triton kernels of a lowered program: their PTX, and what ptxas makes of it.

XLA assembles these kernels when a program is loaded onto a GPU and not when it is compiled, so
`aot` does it itself. jax-triton hands XLA one call per kernel, with a compressed
`jax_triton.TritonAnyKernelCall` (https://github.com/jax-ml/jax/blob/main/jaxlib/gpu/triton.proto)
from which the text and the shared memory are read here.
"""

import pathlib
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

CALL_TARGET = "triton_kernel_call_ffi"
"""Name of the custom call by which XLA launches a Triton kernel."""
# Numbers of fields in the messages.
_KERNEL_CALL, _KERNEL, _NAME, _SHARED_BYTES, _PTX = 1, 1, 1, 3, 4


class TritonProgram(NamedTuple):
    """One kernel as Triton left it.

    Attributes:
      name: str, of the kernel function.
      ptx: str, the program given to ptxas.
      shared_memory_bytes: int, per block.
    """

    name: str
    ptx: str
    shared_memory_bytes: int


class Assembly(NamedTuple):
    """One kernel as ptxas left it.

    Attributes:
      report: str, what ptxas says of registers and spills.
      sass: str, the machine program.
    """

    report: str
    sass: str


def find_triton_programs(module: Any) -> tuple[TritonProgram, ...]:
    """Return the Triton kernels that a program calls, each once, in order.

    Args:
      module: MLIR module in StableHLO, of `jax.stages.Lowered.compiler_ir`.
    """
    found = dict.fromkeys(_read_program(opaque) for opaque in _find_calls(module.operation))
    return tuple(found)


def assemble(program: TritonProgram, binaries: pathlib.Path) -> Assembly:
    """Assemble a kernel for the device that its PTX names, and disassemble the result.

    Args:
      binaries: folder of `ptxas` and `nvdisasm`.

    Raises:
      RuntimeError: if ptxas refuses the program.
    """
    match = re.search(r"^\.target\s+(sm_\w+)", program.ptx, re.MULTILINE)
    assert match, f"the PTX of {program.name} names no target"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        ptx.write_text(program.ptx)
        report = _run(
            [binaries / "ptxas", "-v", f"--gpu-name={match.group(1)}", ptx, "-o", cubin],
            program.name,
        )
        sass = _run([binaries / "nvdisasm", "-c", cubin], program.name)
    return Assembly(report, sass)


def _run(command: list[Any], name: str) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} fails on the kernel {name}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _find_calls(operation: Any) -> Iterator[bytes]:
    """Yield the compressed message of each call, loops and functions included."""
    if operation.name == "stablehlo.custom_call":
        attributes = operation.attributes
        if attributes["call_target_name"].value == CALL_TARGET:
            yield attributes["mhlo.backend_config"]["opaque"].value_bytes
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield from _find_calls(inner.operation)


def _read_program(opaque: bytes) -> TritonProgram:
    call = _read_fields(zlib.decompress(opaque))
    kernel = _read_fields(_read_fields(call[_KERNEL_CALL])[_KERNEL])
    name, ptx = (kernel[field].decode() for field in (_NAME, _PTX))
    # A field that is zero is left out.
    return TritonProgram(name, ptx, kernel.get(_SHARED_BYTES, 0))


def _read_fields(message: bytes) -> dict[int, Any]:
    """Read a message of protocol buffers: number -> int or bytes, the last of each number."""
    fields, at = {}, 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == 0:
            fields[key >> 3], at = _read_varint(message, at)
            continue
        if kind == 2:
            size, at = _read_varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a message of protocol buffers has no fields of kind {kind}")
        fields[key >> 3] = message[at : at + size]
        at += size
    return fields


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
