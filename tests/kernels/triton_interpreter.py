"""Triton kernels on the CPU: the real ones, in Triton's interpreter, without torch.

What the interpreter of Triton 3.9 gets wrong or does not look at is mended here:

- Products of bfloat16 multiply raw bits, and rounding to bfloat16 truncates: ml_dtypes does both.
- Memory is not checked: arrays lie apart, and a load or store outside all of them raises.
- Races are not seen: a store to what another program has read or written raises, and so does a
  store to an input.
- What no program writes goes unseen: outputs are filled with NaN, and the rest is counted.
- Functions that kernels call patch `triton.language` and leave it so; it is restored.

Order inside a program, such as that of asynchronous copies, is the compiler's work and not seen.

Kernels in Gluon are not interpreted. Their PTX is run instead, see `ptx_triton`: with the order of
what happens inside a program.
"""

import contextlib
import functools
import threading
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.interpretation import interpret_with
from tests.kernels import ptx_triton

# Nothing is interpreted, and no test that needs it runs, where the extra is not installed.
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
jit = pytest.importorskip("triton.runtime.jit")
gluon = pytest.importorskip("triton.experimental.gluon._runtime")

_NAMES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int8": "i8",
    "uint8": "u8", "int16": "i16", "uint16": "u16", "uint32": "u32", "bool": "i1",
}  # fmt: skip
_BF16 = np.dtype(ml_dtypes.bfloat16)
_UNWRITTEN = -123456789
_GAP_BYTES = 1 << 20
# Kernels that do not depend on each other may be interpreted at the same time, and what is patched
# belongs to the process.
_LOCK = threading.Lock()


@contextlib.contextmanager
def triton_kernels(capability=(8, 0)):
    """Run Triton kernels: on an NVIDIA GPU, or interpreted where there is none.

    On a GPU that they do not run on the test is skipped.

    Args:
      capability: whose tiles are interpreted.
    """
    if jax.default_backend() == "gpu":
        try:
            check_device()
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        yield
        return
    with interpret_with(functools.partial(run, capability=capability), capability):
        yield


def run(kernel, programs, inputs, outputs, constants, capability=(8, 0)):
    """Interpret a kernel, see `pallas_kernels.triton.interpretation.Interpretation`.

    The PTX of a kernel in Gluon is that for `capability`.
    """
    if isinstance(kernel, gluon.GluonJITFunction):
        return ptx_triton.run_gluon(kernel, programs, inputs, outputs, constants, capability)
    with _LOCK, np.errstate(all="ignore"):
        memory = _Memory(inputs, outputs)
        with _patched(memory):
            arguments = memory.pointers | dict(constants)
            interpreter.InterpretedFunction(kernel.fn)[(programs,)](**arguments)
        return memory.read_outputs(outputs)


class _Pointer:
    """What the interpreter asks of a torch tensor, for an array at an address."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, _NAMES[dtype]

    def data_ptr(self):
        return self.address

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return ()

    def stride(self):
        return ()

    def copy_(self, other):
        pass


class _Memory:
    """Inputs and outputs of one launch, far apart in one buffer, and who accessed what."""

    def __init__(self, inputs, outputs):
        arrays = dict(inputs)
        for name, out in outputs.items():
            value = np.nan if jax.numpy.issubdtype(out.dtype, np.floating) else _UNWRITTEN
            arrays[name] = np.full(out.shape, value).astype(out.dtype)
        sizes = [-(-x.nbytes // 64) * 64 + _GAP_BYTES for x in arrays.values()]
        self._buffer = np.empty(sum(sizes) + _GAP_BYTES, np.uint8)
        self._names, self._views, self.pointers = list(arrays), {}, {}
        self._starts = np.cumsum([_GAP_BYTES, *sizes[:-1]], dtype=np.int64)
        self._ends = self._starts + [x.nbytes for x in arrays.values()]
        # Addresses are multiples of 16, as compiled kernels may assume.
        self._base = self._buffer.ctypes.data
        skip = -self._base % 64
        self._starts, self._ends = self._starts + skip, self._ends + skip
        self._item_bytes = [x.itemsize for x in arrays.values()]
        for name, start, x in zip(arrays, self._starts, arrays.values(), strict=True):
            view = self._buffer[start : start + x.nbytes]
            view[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            self._views[name] = view
            self.pointers[name] = _Pointer(self._base + int(start), x.dtype.name)
        # By first byte of an element: the program, -1 for none, -2 for several readers.
        self._writers = {n: np.full(self._views[n].size, -1, np.int32) for n in outputs}
        self._readers = {n: np.full(self._views[n].size, -1, np.int32) for n in outputs}

    def check_load(self, program, pointers, mask):
        for name, at in self._locate(program, pointers, mask, "loads"):
            if name not in self._writers:
                continue
            if np.isin(self._writers[name][at], (-1, program), invert=True).any():
                raise RuntimeError(f"race: program {program} reads {name} of another")
            before = self._readers[name][at]
            self._readers[name][at] = np.where(np.isin(before, (-1, program)), program, -2)

    def check_store(self, program, pointers, mask):
        for name, at in self._locate(program, pointers, mask, "stores"):
            if name not in self._writers:
                raise RuntimeError(f"program {program} writes the input {name}")
            if np.unique(at).size != at.size:
                raise RuntimeError(f"race: one store of program {program} writes {name} twice")
            for who in (self._writers, self._readers):
                if np.isin(who[name][at], (-1, program), invert=True).any():
                    raise RuntimeError(f"race: program {program} writes {name} of another")
            self._writers[name][at] = program

    def _locate(self, program, pointers, mask, what):
        """Yield the name of each array that is accessed, and where its elements begin, in bytes."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        at = addresses[mask].astype(np.int64) - self._base
        which = np.searchsorted(self._starts, at, side="right") - 1
        if ((which < 0) | (at + size > self._ends[which])).any():
            raise IndexError(f"program {program} {what} outside of every array")
        for index in np.unique(which):
            # A word may span several elements.
            elements = np.arange(0, size, self._item_bytes[index])
            first = at[which == index] - self._starts[index]
            yield self._names[index], (first[:, None] + elements).reshape(-1)

    def read_outputs(self, outputs):
        results = []
        for name, out in outputs.items():
            dtype = np.dtype(out.dtype)
            if (self._writers[name][:: dtype.itemsize] == -1).any():
                raise RuntimeError(f"no program writes some elements of {name}")
            results.append(self._views[name].view(dtype).reshape(out.shape).copy())
        return tuple(results)


def _widen(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return handle.data.view(_BF16).astype(np.float32)
    return handle.data


def _dot(builder, a, b, d, *precision):
    product = np.matmul(_widen(a).astype(np.float32), _widen(b).astype(np.float32))
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _cast_with(original):
    def cast(builder, source, target, *rounding):
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in kinds:
            return original(builder, source, target, *rounding)
        wide = _widen(source)
        if kinds[1] == tl.bfloat16:
            return interpreter.TensorHandle(wide.astype(_BF16).view(np.uint16), tl.bfloat16)
        dtype = interpreter._get_np_dtype(target)
        return interpreter.TensorHandle(wide.astype(dtype), kinds[1])

    return cast


def _call_inner(function, *arguments, **options):
    """Call a function that a kernel calls; `triton.language` is patched for all of them."""
    return interpreter.InterpretedFunction(function.fn).rewrite()(*arguments, **options)


@contextlib.contextmanager
def _patched(memory):
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        memory.check_load(self.grid_idx[0], pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        memory.check_store(self.grid_idx[0], pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patches = {
        "create_masked_load": checked_load,
        "create_masked_store": checked_store,
        "create_dot": _dot,
        "cast_impl": _cast_with(builder.cast_impl),
        "create_fp_to_fp": _cast_with(builder.create_fp_to_fp),
    }
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(builder, name, function))
        stack.enter_context(mock.patch.object(jit.JITFunction, "__call__", _call_inner))
        # Kernels see `tl`, and the functions of Triton's own that they call see `tl.core`.
        stack.callback(interpreter._patch_lang(tl.max.fn).restore)
        yield
