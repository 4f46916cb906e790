"""Words of 32 bits that each thread of a warpgroup reads and writes at a place of its own.

Pallas moves whole tiles, whose elements lie in threads as a layout has it. Packing needs every
thread to hold four by four neighbours of a matrix. Here an array [128] of a kernel has one element
in each thread; where it is read or written is an array too. What is computed between is ordinary
code, which the interpreter runs as the GPU does; only these two functions have a twin for it.
"""

import itertools
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
_LAYOUT = plgpu.Layout.WG_STRIDED((NUM_THREADS,), vec_size=1)
# Type checkers take the decorated function for one that still wants the launch context.
_inline: Any = plgpu.inline_mgpu
_WORD = plgpu.ShapeDtypeStruct((NUM_THREADS,), jnp.uint32, layout=_LAYOUT)


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
    return plgpu.broadcasted_iota(jnp.int32, (NUM_THREADS,), 0, layout=_LAYOUT)


def load_words(
    window: Window, places: Sequence[Place], *, count: int = 1, interpreted: bool
) -> list[tuple[jax.Array, ...]]:
    """Read consecutive words of a row at each of some places.

    Args:
      window: Window.
      places: of each thread, aligned to what is read.
      count: int, 1, 2 or 4 words.
      interpreted: bool.

    Returns:
      list of tuples of uint32[128]; the first element of a row is in the low bits.
    """
    if interpreted:
        words = _as_words(window.at()[...])
        return [
            tuple(words[row, column // window.elements_of_word + i] for i in range(count))
            for row, column in places
        ]

    @_inline(
        arg_types=(plgpu.RefType(), (Place(_LAYOUT, _LAYOUT),) * len(places)),
        return_type=(_WORD,) * (count * len(places)),
    )
    def load(_, ref, places):
        words = ir.VectorType.get((count,), ir.IntegerType.get_signless(32))
        loaded = [llvm.load(words, _address(ref, place), alignment=4 * count) for place in places]
        return tuple(_as_array(_element(x, i)) for x in loaded for i in range(count))

    loaded = load(window.ref, _shift(window, places))
    return list(itertools.batched(loaded, count))


def store_words(
    window: Window,
    places: Sequence[Place],
    words: Sequence[Sequence[jax.Array]],
    *,
    interpreted: bool,
) -> None:
    """Write consecutive words of a row at each of some places; no two threads write to the same.

    Args:
      window: Window, not of bool.
      places: of each thread, aligned to what is written.
      words: for each place, 1, 2 or 4 uint32[128]; the low bits go to the first element.
      interpreted: bool.
    """
    if interpreted:
        matrix = _as_words(window.at()[...])
        for (row, column), row_words in zip(places, words, strict=True):
            for i, word in enumerate(row_words):
                matrix = matrix.at[row, column // window.elements_of_word + i].set(word)
        matrix = jax.lax.bitcast_convert_type(matrix, window.ref.dtype)
        window.at()[...] = matrix.reshape(window.shape)
        return
    words = tuple(tuple(row_words) for row_words in words)

    @_inline(
        arg_types=(
            plgpu.RefType(),
            (Place(_LAYOUT, _LAYOUT),) * len(places),
            jax.tree.map(lambda _: _LAYOUT, words),
        )
    )
    def store(_, ref, places, words):
        for place, row_words in zip(places, words, strict=True):
            types = ir.VectorType.get((len(row_words),), ir.IntegerType.get_signless(32))
            joined = vector.from_elements(types, [_scalar(word) for word in row_words])
            llvm.store(joined, _address(ref, place), alignment=4 * len(row_words))

    store(window.ref, _shift(window, places), words)


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
    row, column = (arith.extsi(i64, _scalar(x)) for x in place)
    element = arith.addi(arith.muli(row, utils.c(row_stride, i64)), column)
    offset = arith.muli(element, utils.c(max(utils.bitwidth(ref_type.element_type) // 8, 1), i64))
    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _scalar(array):
    """Return this thread's element of an array."""
    (register,) = array.registers.flat
    return _element(register, 0)


def _element(register, index):
    position = ir.DenseI64ArrayAttr.get([index])
    return vector.extract(register, dynamic_position=[], static_position=position)


def _as_array(scalar):
    """Return the array of which each thread holds one element."""
    register = vector.from_elements(ir.VectorType.get((1,), scalar.type), [scalar])
    return fa.FragmentedArray(
        _registers=np.array([register], dtype=object),
        _layout=fa.WGStridedFragLayout((NUM_THREADS,), vec_size=1),
        _is_signed=False,
    )
