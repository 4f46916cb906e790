"""The sparse tensor-core product as JAX's interpreter is taught it: what is inline PTX on a GPU.

A sum in flight is an array of NaN with a number in its corner: whoever touches it gets NaN, and the
interpreter finds the sum by its number. Metadata are read into registers when a group is started,
and each place in the program that starts one has registers of its own, as a compiled loop has. The
product reads registers, values and the dense operand when it is run: as late as its wait allows.
"""

import collections
import functools
import inspect
import itertools
from typing import NamedTuple

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.nm_matmul.mosaic_sm90 import wgmma_sp
from tests.kernels.asynchronous import PRODUCTS, read_operand, wgmma_wait


class Call(NamedTuple):
    """An inline function that is run by a thread.

    Attributes:
      thread: whose.
      site: which place in the program.
      args: pytree of arrays; of references, functions that read them.
    """

    thread: object
    site: int
    args: tuple


def expand(values, words):
    """Return the dense matrix of a sparse one, after the PTX ISA of `wgmma.mma_async.sp`.

    Args:
      values: [64, C/2], kept values of each row.
      words: uint32[C/64, 128], for each thread the metadata of 64 columns.

    Returns:
      f32[64, C].
    """
    rows, columns = values.shape[0], 2 * values.shape[1]
    # Thread 32 w + 4 r + 2 s + h: of four threads, two serve the instruction that selects s, each
    # 16 of its 32 columns, of row 16 w + r in the lower half of the word and 8 below it in the
    # upper. Four bits a group: two positions.
    words = words.reshape(columns // 64, 4, 8, 2, 2)
    halves = np.stack([words & 0xFFFF, words >> 16])
    nibbles = halves[..., None] >> (4 * np.arange(4, dtype=np.uint32)) & 0xF
    # [half, tile, w, r, s, h, group] -> row 16 w + 8 half + r, group of four columns
    nibbles = nibbles.transpose(2, 0, 3, 1, 4, 5, 6).reshape(rows, columns // 4)
    dense = np.zeros((rows, columns // 4, 4), np.float32)
    kept = values.astype(np.float32).reshape(rows, columns // 4, 2)
    at = np.indices(nibbles.shape)
    for which in range(2):
        # Two equal positions are undefined; adding shows them.
        np.add.at(dense, (*at, nibbles >> (2 * which) & 3), kept[..., which])
    return dense.reshape(rows, columns)


# What threads hold: sums by number, and metadata by thread and place in the program.
_sums: dict = {}
_registers: dict = collections.defaultdict(list)
_numbers = itertools.count(1)


def reset():
    """Forget what threads held."""
    _sums.clear()
    _registers.clear()


def _number_of(handle):
    handle = np.asarray(handle)
    number = int(np.nan_to_num(handle[0, 0]))
    if (number not in _sums) or not np.isnan(handle).sum() == handle.size - 1:
        raise ValueError("a sum in flight was touched")
    return number


def _zero_sum(call, *, shape):
    del call
    number = next(_numbers)
    _sums[number] = np.zeros(shape, np.float32)
    handle = np.full(shape, np.nan, np.float32)
    handle[0, 0] = number
    return [handle]


def _start(call, *, dense_is_transposed):
    accs, values, metadata, dense = call.args
    numbers = [_number_of(acc) for acc in accs]
    registers = _registers[call.thread, call.site]
    # Loaded by the thread itself; the rest is read past its back.
    registers[:] = [read(asynchronous=False) for read in metadata]

    def run():
        dense_PC = dense().astype(np.float32)
        dense_CP = dense_PC.T if dense_is_transposed else dense_PC
        for number, read, words in zip(numbers, values, registers, strict=True):
            with np.errstate(all="ignore"):  # NaN is a number like others
                _sums[number] = _sums[number] + expand(read(), words) @ dense_CP

    PRODUCTS.start(call.thread, run)
    return accs


def _finish(call):
    (accs,) = call.args
    PRODUCTS.wait(call.thread, 0)
    return [_sums.pop(_number_of(acc)) for acc in accs]


def _wait(call, *, n):
    PRODUCTS.wait(call.thread, n)
    return []


_MEANINGS = {
    f"{function.__module__}.{function.__qualname__}": meaning
    for function, meaning in (
        (wgmma_sp.zero_sums, _zero_sum),
        (wgmma_sp.start_multiply_add, _start),
        (wgmma_sp.finish_multiply_add, _finish),
        (wgmma_wait, _wait),
    )
}


def interpret_inline(fallback, interpreter, eqn, token, get_invals):
    """Interpret `inline_mgpu`, the functions of `wgmma_sp` among others.

    Args:
      fallback: method of JAX's interpreter, for all other functions.
      interpreter: JAX's interpreter of the thread.
      eqn: the equation.
      token: what orders callbacks.
      get_invals: function that returns operands.

    Returns:
      tuple of token and results.
    """
    function = eqn.params["mgpu_fn"]
    name = f"{function.__module__}.{function.__qualname__}"
    meaning = _MEANINGS.get(name.partition(".<locals>")[0])
    if meaning is None:
        return fallback(interpreter, eqn, token, get_invals)
    known = inspect.signature(meaning).parameters
    closure = inspect.getclosurevars(function).nonlocals
    meaning = functools.partial(meaning, **{k: v for k, v in closure.items() if k in known})
    invals, tree = get_invals(), eqn.params["pytree_args"]
    args, leaves = invals[: tree.num_leaves], invals[tree.num_leaves :]

    def run(*, token, thread, args, transforms):
        args = [
            x if transform is None else functools.partial(read_operand, thread, x, transform)
            for x, transform in zip(args, transforms, strict=True)
        ]
        # The equation lives as long as this function, so that no other has its identity.
        return token, *meaning(Call(thread, id(eqn), jax.tree.unflatten(tree, args)))

    token, *out = callback.io_callback(
        gpu_callbacks.fail_on_exception(run),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, *(var.aval for var in eqn.outvars)),
        token=token,
        thread=interpreter.thread,
        args=args,
        transforms=jax.tree.unflatten(eqn.params["pytree_ref_transforms"], leaves),
    )
    return token, out
