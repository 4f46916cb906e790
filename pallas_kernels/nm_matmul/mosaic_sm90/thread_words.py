"""Words of 32 bits that each thread of a warpgroup reads and writes at places of its own.

Pallas moves whole tiles, whose elements lie in threads as a layout has it. Packing needs every
thread to hold four by four neighbours of a matrix. Here an array [128 n] of a kernel, called a
stack, has n elements in each thread, and where they are read or written are arrays too. What is
computed between is ordinary code, which the interpreter runs as the GPU does; only the functions
that read, write and rearrange stacks have a twin for it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

NUM_THREADS = 128
# Type checkers take the decorated function for one that still wants the launch context.
_inline: Any = plgpu.inline_mgpu


class Window(NamedTuple):
    """A part of a matrix in shared or global memory, all of which belongs to one program.

    Attributes:
      ref: reference to the whole matrix: of 32, 16 or 8 bits (bool).
      shape: (rows, columns) of the part.
      row: int or int32, where it starts.
      column: int or int32, where it starts.
    """

    ref: Any
    shape: tuple[int, int]
    row: Any = 0
    column: Any = 0

    def at(self):
        """Return the reference to the part.

        Returns:
          reference, of the shape.
        """
        return self.ref.at[pl.ds(self.row, self.shape[0]), pl.ds(self.column, self.shape[1])]

    @property
    def elements_of_word(self) -> int:
        """Elements that lie in 32 bits."""
        return 4 // self.ref.dtype.itemsize


class Place(NamedTuple):
    """Where each thread reads or writes in a window.

    Attributes:
      row: int32[128].
      column: int32[128], of the first element.
    """

    row: Any
    column: Any


def thread_index() -> jax.Array:
    """Return the index of each thread in its warpgroup.

    Returns:
      int32[128], 0 to 127.
    """
    return plgpu.broadcasted_iota(jnp.int32, (NUM_THREADS,), 0, layout=_layout(1))


def load_words(
    window: Window, places: Sequence[Place], *, count: int = 1, interpreted: bool
) -> tuple[jax.Array, ...]:
    """Read consecutive words of a row at each of some places.

    Args:
      places: of each thread, aligned to what is read.
      count: int, 1, 2 or 4 words.

    Returns:
      tuple of stacks uint32[128 * places], the first words of all places, the second, and so on;
      the first element of a row is in the low bits.
    """
    if interpreted:
        words = _as_words(window.at()[...])
        rows, columns = (jnp.concatenate(x) for x in zip(*places, strict=True))
        columns = columns // window.elements_of_word
        return tuple(words[rows, columns + i] for i in range(count))

    @_inline(
        arg_types=(plgpu.RefType(), (Place(_layout(1), _layout(1)),) * len(places)),
        return_type=(_word(len(places)),) * count,
    )
    def load(_, ref, places):
        words = ir.VectorType.get((count,), ir.IntegerType.get_signless(32))
        loaded = [llvm.load(words, _address(ref, place), alignment=4 * count) for place in places]
        return tuple(_as_stack([_element(x, i) for x in loaded]) for i in range(count))

    return load(window.ref, _shift(window, places))


def store_words(
    window: Window,
    places: Sequence[Place],
    words: Sequence[jax.Array],
    *,
    interpreted: bool,
) -> None:
    """Write consecutive words of a row at each of some places; no two threads write to the same.

    Args:
      window: Window, not of bool.
      places: of each thread, aligned to what is written.
      words: 1, 2 or 4 stacks uint32[128 * places], laid out as `load_words` returns them.
    """
    if interpreted:
        matrix = _as_words(window.at()[...])
        rows, columns = (jnp.concatenate(x) for x in zip(*places, strict=True))
        columns = columns // window.elements_of_word
        for i, stack in enumerate(words):
            matrix = matrix.at[rows, columns + i].set(stack)
        matrix = jax.lax.bitcast_convert_type(matrix, window.ref.dtype)
        window.at()[...] = matrix.reshape(window.shape)
        return

    @_inline(
        arg_types=(
            plgpu.RefType(),
            (Place(_layout(1), _layout(1)),) * len(places),
            (_layout(len(places)),) * len(words),
        )
    )
    def store(_, ref, places, words):
        of_place = zip(*(stack.registers.flat for stack in words), strict=True)
        types = ir.VectorType.get((len(words),), ir.IntegerType.get_signless(32))
        for place, registers in zip(places, of_place, strict=True):
            joined = vector.from_elements(types, [_element(x, 0) for x in registers])
            llvm.store(joined, _address(ref, place), alignment=4 * len(words))

    store(window.ref, _shift(window, places), tuple(words))


def rearrange(
    stacks: Sequence[jax.Array], picks: Sequence[tuple[int, int]], *, interpreted: bool
) -> jax.Array:
    """Make a stack of elements of others, which costs nothing on a GPU.

    Args:
      stacks: uint32[128 n], all of one size.
      picks: for each element of a thread, which stack and which of its elements.

    Returns:
      uint32[128 * picks].
    """
    size = stacks[0].shape[0] // NUM_THREADS
    if interpreted:
        return jnp.concatenate([stacks[i].reshape(size, NUM_THREADS)[at] for i, at in picks])

    @_inline(arg_types=((_layout(size),) * len(stacks),), return_type=_word(len(picks)))
    def pick(_, stacks):
        return _as_stack([_element(stacks[i].registers.flat[at], 0) for i, at in picks])

    return pick(tuple(stacks))


def _layout(size):
    return plgpu.Layout.WG_STRIDED((size * NUM_THREADS,), vec_size=1)


def _word(size):
    return plgpu.ShapeDtypeStruct((size * NUM_THREADS,), jnp.uint32, layout=_layout(size))


def _shift(window, places):
    return tuple(Place(place.row + window.row, place.column + window.column) for place in places)


def _as_words(matrix: jax.Array) -> jax.Array:
    if matrix.dtype == jnp.bool_:
        matrix = matrix.astype(jnp.uint8)
    of_word = 4 // matrix.dtype.itemsize
    if of_word == 1:
        return matrix
    grouped = matrix.reshape(matrix.shape[0], -1, of_word)
    return jax.lax.bitcast_convert_type(grouped, jnp.uint32)


def _address(ref, place):
    """Return the address of each thread's element, a pointer of the compiler."""
    ref_type = ir.MemRefType(ref.type)
    (row_stride, column_stride), _ = ref_type.get_strides_and_offset()
    assert column_stride == 1, f"rows are contiguous, got {ref_type}"
    i64 = ir.IntegerType.get_signless(64)
    row, column = (arith.extsi(i64, _element(x.registers.flat[0], 0)) for x in place)
    element = arith.addi(arith.muli(row, utils.c(row_stride, i64)), column)
    offset = arith.muli(element, utils.c(max(utils.bitwidth(ref_type.element_type) // 8, 1), i64))
    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _element(register, index):
    position = ir.DenseI64ArrayAttr.get([index])
    return vector.extract(register, dynamic_position=[], static_position=position)


def _as_stack(scalars):
    """Return the stack of which each thread holds these."""
    one = ir.VectorType.get((1,), scalars[0].type)
    return fa.FragmentedArray(
        _registers=np.array([vector.from_elements(one, [x]) for x in scalars], dtype=object),
        _layout=fa.WGStridedFragLayout((len(scalars) * NUM_THREADS,), vec_size=1),
        _is_signed=False,
    )
