"""The PTX machine's Ampere: single instructions by their definition, and a kernel of Triton's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import ptx_triton
from tests.kernels.ptx_ampere import AmpereUnits
from tests.kernels.ptx_machine import WARP
from tests.kernels.ptx_program import PtxError
from tests.kernels.test_ptx_machine import run

_LEGAL = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
_LANES = np.arange(WARP)


def run_ampere(body, params=(), num_threads=32, *, copies="late", order="first"):
    """Run some lines, warp by warp; return what `run` does."""
    units = functools.partial(AmpereUnits, copies=copies)
    return run(body, params, num_threads, units=units, pool=WARP, order=order)


def make_sparse(rows, contraction, seed=0):
    """Return a random 2:4 matrix, its kept values [rows, groups, 2] and their positions."""
    rng = np.random.default_rng(seed)
    positions = _LEGAL[rng.integers(0, 6, (rows, contraction // 4))]
    assert len(np.unique(positions @ [1, 4])) == 6
    values = rng.integers(-8, 9, positions.shape).astype(np.float32)
    dense = np.zeros((rows, contraction // 4, 4), np.float32)
    np.put_along_axis(dense, positions, values, 2)
    return dense.reshape(rows, contraction), values, positions


def pair(low, high, dtype):
    """Return words of two values."""
    low, high = (np.asarray(x).astype(dtype).view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | high << 16


def hold_left(matrix, dtype):
    """Return the words [4, lanes] by which a warp holds A[16, 16], after the PTX ISA."""
    row, column = _LANES // 4, 2 * (_LANES % 4)
    places = (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)
    return [pair(matrix[r, c], matrix[r, c + 1], dtype) for r, c in places]


def hold_right(matrix, dtype):
    """Return the words by which a warp holds B[8 * words, 8], after the PTX ISA."""
    first, column = 2 * (_LANES % 4), _LANES // 4
    rows = [first + 8 * i for i in range(len(matrix) // 8)]
    return [pair(matrix[r, column], matrix[r + 1, column], dtype) for r in rows]


def sums_of(words):
    """Return D[16, 8] of the words [4, lanes] by which a warp holds it."""
    result, row, column = np.zeros((16, 8), np.float32), _LANES // 4, 2 * (_LANES % 4)
    for i, word in enumerate(words):
        result[row + 8 * (i // 2), column + i % 2] = word.view(np.float32)
    return result


def multiply(instruction, words, rest=""):
    """Run a product on words [n, lanes] of A and of B; return D, added to 1, 2, 3 and 4."""
    count = len(words)
    loads = "".join(f"ld.global.b32 %r{8 + i}, [%rd2+{128 * i}];" for i in range(count))
    right = ", ".join(f"%r{i}" for i in range(12, 12 + (4 if rest else 2)))
    body = f"""
        ld.param.u64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        {loads}
        mov.b32 %r4, 0f3F800000; mov.b32 %r5, 0f40000000;
        mov.b32 %r6, 0f40400000; mov.b32 %r7, 0f40800000;
        {instruction} {{%r4, %r5, %r6, %r7}}, {{%r8, %r9, %r10, %r11}}, {{{right}}},
            {{%r4, %r5, %r6, %r7}}{rest};
    """
    machine, _ = run_ampere(body, [np.stack(words)])
    return sums_of([machine.registers[f"%r{i}"] for i in (4, 5, 6, 7)])


_ADDED = np.kron(np.array([[1], [3]]), np.ones((8, 8))) + np.arange(8) % 2


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", jnp.bfloat16), ("f16", np.float16)])
def test_sparse_product(kind, dtype, selector):
    dense, values, positions = make_sparse(16, 32)
    b = np.random.default_rng(1).integers(-8, 9, (32, 8)).astype(np.float32)
    # Words of lanes that supply nothing are no metadata.
    metadata = np.zeros(WARP, np.uint32)
    for row in range(16):
        for group in range(8):
            low, high = positions[row, group].tolist()
            lane = 4 * (row % 8) + 2 * selector + group // 4
            metadata[lane] |= np.uint32((low | high << 2) << 4 * (group % 4) + 16 * (row // 8))
    words = [*hold_left(values.reshape(16, 16), dtype), *hold_right(b, dtype), metadata]
    name = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32"
    instruction = f"{name}.{kind}.{kind}.f32"
    assert (multiply(instruction, words, f", %r16, 0x{selector}") == dense @ b + _ADDED).all()
    with pytest.raises(PtxError, match="rising"):
        multiply(instruction, words, f", %r16, 0x{1 - selector}")
    with pytest.raises(PtxError, match="selector"):
        multiply(instruction, words, ", %r16, 0x2")


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", jnp.bfloat16), ("f16", np.float16)])
def test_dense_product(kind, dtype):
    a, b = (np.random.default_rng(i).integers(-8, 9, (16, 16)) for i in range(2))
    words = [*hold_left(a, dtype), *hold_right(b[:, :8], dtype)]
    instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    assert (multiply(instruction, words) == a @ b[:, :8] + _ADDED).all()


@pytest.mark.parametrize("turned", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded_by_their_rows(count, turned):
    # Element 8 i + j of matrix m lies at row 8 m + i; rows are 16 bytes, in reverse order here.
    registers = ", ".join(f"%r{3 + i}" for i in range(count))
    body = f"""
        ld.param.u64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd2, %r1, 16, %rd1;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2];
        shl.b32 %r2, %r1, 4;
        sub.s32 %r2, 496, %r2;
        add.s32 %r2, %r2, global_smem;
        st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
        ldmatrix.sync.aligned.m8n8.x{count}{turned}.shared::cta.b16 {{{registers}}}, [%r2 + 0];
    """
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    machine, _ = run_ampere(body, [matrices])
    for i, matrix in enumerate(matrices[:count]):
        matrix = matrix.T if turned else matrix
        row, column = _LANES // 4, 2 * (_LANES % 4)
        expected = matrix[row, column].astype(np.uint32) | matrix[row, column + 1] * np.uint32(
            65536
        )
        assert (machine.registers[f"%r{3 + i}"] == expected).all()


# Thread i has 16 bytes of its own at %r2 of shared memory and %rd2 of global memory, and those of a
# thread of the next warp at %r3.
_PLACES = """
    ld.param.u64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 16, %rd1;
    mad.lo.s32 %r2, %r1, 16, global_smem;
    add.s32 %r3, %r1, 32;
    and.b32 %r3, %r3, 63;
    mad.lo.s32 %r3, %r3, 16, global_smem;
"""
_COPY = "cp.async.cg.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x10, 0x10; cp.async.commit_group;"
_WAIT = "cp.async.wait_group 0;"


def run_on_places(body, **options):
    """Run some lines on two warps; return register %r9."""
    machine, _ = run_ampere(_PLACES + body, [np.arange(256, dtype=np.uint32)], 64, **options)
    return machine.register("%r9")


@pytest.mark.parametrize("order", ["first", "last", "random"])
@pytest.mark.parametrize(("copies", "expected"), [("early", 0), ("late", 7)])
def test_a_copy_is_made_between_its_issue_and_its_wait(copies, expected, order):
    body = f"mov.b32 %r5, 7; {_COPY} st.global.b32 [%rd2], %r5; {_WAIT} bar.sync 0;"
    value = run_on_places(body + "ld.shared.b32 %r9, [%r3];", copies=copies, order=order)
    other = (np.arange(64) + 32) % 64
    assert (value == (7 if expected else 4 * other)).all()


def test_bytes_beyond_the_source_are_zero():
    body = """
        mov.b32 %r5, 0;
        mov.b64 %rd3, 0;
        cp.async.ca.shared.global [%r2], [%rd2], 8, 2;
        cp.async.ca.shared.global [%r2+8], [%rd3], 8, %r5;
        mov.b32 %r5, 8;
        cp.async.wait_all;
        ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r2];
    """
    machine, _ = run_ampere(_PLACES + body, [np.full(256, 0x12345678, np.uint32)], 64)
    values = [int(machine.register(f"%r{i}")[5]) for i in (9, 10, 11, 12)]
    assert values == [0x5678, 0, 0, 0]


@pytest.mark.parametrize(
    "body",
    [
        f"{_COPY} {_COPY.replace('%r2 + 0', '%r2 + 1024')} cp.async.wait_group 1; bar.sync 0;"
        f"ld.shared.b32 %r9, [%r3]; {_WAIT}",
        "st.shared.b32 [%r2], %r1; ld.shared.b32 %r9, [%r2]; bar.sync 0; ld.shared.b32 %r9, [%r3];",
        "ld.shared.b32 %r9, [%r2]; ld.shared.b32 %r9, [%r3]; bar.sync 0; st.shared.b32 [%r2], %r1;",
        f"{_COPY} {_WAIT} ld.shared.b32 %r9, [%r2]; cp.async.commit_group;",
    ],
    ids=["ring", "exchange", "read by all", "own bytes"],
)
def test_what_a_program_may_do(body):
    for order in ("first", "last"):
        run_on_places(body, order=order)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.shared.b32 [%r2], %r1; ld.shared.b32 %r9, [%r3];", "race"),
        ("ld.shared.b32 %r9, [%r3]; st.shared.b32 [%r2], %r1;", "race"),
        ("st.shared.b32 [%r2], %r1; st.shared.b32 [%r3], %r1;", "race"),
        (f"{_COPY} {_WAIT} ld.shared.b32 %r9, [%r3]; bar.sync 0;", "race"),
        (f"ld.shared.b32 %r9, [%r3]; {_COPY} {_WAIT}", "race"),
        # A barrier does not wait for copies, and after a wait only its own thread may read.
        (f"{_COPY} bar.sync 0; ld.shared.b32 %r9, [%r3]; {_WAIT}", "on its way"),
        (f"{_COPY} cp.async.wait_group 1; ld.shared.b32 %r9, [%r2]; {_WAIT}", "on its way"),
        (f"{_COPY} {_COPY} {_WAIT}", "on its way"),
        (f"{_COPY} {_WAIT} xor.b32 %r2, %r2, 16; ld.shared.b32 %r9, [%r2];", "race"),
        (_COPY, "nobody has waited for 32"),
        (_COPY.replace("cp.async.commit_group;", _WAIT), "nobody has waited for 32"),
        ("cp.async.ca.shared.global [%r2], [%rd2+4096], 4, 4;", "outside of every"),
        ("cp.async.ca.shared.global [%r2+8], [%rd2+4], 8, 8;", "not aligned"),
        ("cp.async.ca.shared.global [%r2+4], [%rd2], 8, 8;", "not aligned"),
        ("cp.async.cg.shared.global [%r2], [%rd2], 8, 8;", "unknown"),
        ("bar.sync 1, 32;", "part of the block"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r1}, {%r1};",
         "unknown"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("copies", ["early", "late"])
def test_what_a_program_may_not_do(body, message, copies):
    with pytest.raises(PtxError, match=message.replace("32", r"\d+")):
        run_on_places(body, copies=copies)


def check_product(contraction, programs, *, edit=lambda ptx: ptx, shift=0, **options):
    """Run the kernel of `small_triton`; raises AssertionError if the numbers are wrong."""
    from tests.kernels import small_triton

    program = small_triton.compile_product(contraction, programs, shift)
    dense, values, positions = make_sparse(64, contraction)
    shape = 64 * programs, contraction
    x = np.random.default_rng(1).integers(-8, 9, shape).astype(jnp.bfloat16)
    packed = small_triton.pack(values.astype(jnp.bfloat16), positions)
    (out,) = ptx_triton.run_program(
        edit(program.ptx), programs, [packed[0], x.view(np.int32), packed[1]],
        [small_triton.describe_output(programs)],
        shared_memory_bytes=program.shared_memory_bytes, **options,
    )  # fmt: skip
    assert (out == dense @ x.astype(np.float32).T).all()


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("copies", ["early", "late", "random"])
def test_a_kernel_of_triton(copies, order):
    check_product(256, 1, copies=copies, order=order)


@pytest.mark.ci
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("copies", ["early", "late", "random"])
@pytest.mark.parametrize(("contraction", "programs"), [(128, 3), (512, 2)])
def test_shapes_and_random_orders(contraction, programs, copies, seed):
    check_product(contraction, programs, copies=copies, order="random", seed=seed)


@pytest.mark.ci
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("copies", ["early", "late", "random"])
@pytest.mark.parametrize("rows", [64, 40])
def test_copies_that_triton_arranges(rows, copies, order):
    from tests.kernels import small_triton

    program = small_triton.compile_dense_product(rows, 128)
    assert "mma.sync.aligned.m16n8k16" in program.ptx and "cp.async" in program.ptx
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, x).astype(jnp.bfloat16) for x in ((rows, 128), (128, 64)))
    (out,) = ptx_triton.run_program(
        program.ptx, 1, [a, b], [jax.ShapeDtypeStruct((rows, 64), jnp.float32)],
        copies=copies, order=order, shared_memory_bytes=program.shared_memory_bytes,
    )  # fmt: skip
    product = a.astype(np.float32) @ b.astype(np.float32)
    assert (out == product - product.max(axis=1, keepdims=True)).all()


def replace(pattern, replacement):
    """Return a function that edits PTX at the first place of a pattern."""

    def edit(ptx):
        edited, count = re.subn(pattern, replacement, ptx, count=1)
        assert count, f"no {pattern} in the program"
        return edited

    return edit


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (dict(edit=replace(r"wait_group 1;", "wait_group 2;")), PtxError, "on its way"),
        (dict(edit=replace(r"bar\.sync\s+0;", "")), PtxError, "race"),
        (dict(edit=replace(r"(mma.sp.*), 0;", r"\1, 1;")), AssertionError, None),
        (dict(shift=1), PtxError, "on its way"),
    ],
    ids=["one group more", "no barrier", "selector", "slot"],
)
def test_a_fault_is_found(fault, error, message):
    with pytest.raises(error, match=message):
        check_product(256, 1, **fault)
