"""The machine that runs PTX, against values worked out by hand from the PTX ISA."""

import functools

import numpy as np
import pytest

from tests.kernels import ptx_arithmetic, ptx_machine, ptx_program, ptx_tensor_cores
from tests.kernels.ptx_cluster import Cluster
from tests.kernels.ptx_hopper import HopperUnits


def _make_units(machine, **options):
    """Return the units of a block that is a cluster of its own."""
    return HopperUnits(machine, {}, Cluster(), **options)


def run(body, params=(), num_threads=32, *, units=_make_units, **options):
    """Run a kernel of some lines; return its machine and its memory."""
    memory = ptx_machine.GlobalMemory()
    addresses = [memory.add(x) for x in params]
    names = ", ".join(f".param .u64 k_param_{i}" for i in range(len(params)))
    ptx = (
        f".visible .entry k({names})\n.maxntid {num_threads}, 1, 1\n{{\n"
        ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<40>;\n.reg .b64 %rd<9>;\n"
        f".shared .align 16 .b8 __dynamic_shmem__0;\n{body}\nret;\n}}\n"
    )
    program = ptx_program.parse(ptx)

    machine = ptx_machine.Machine(
        program, memory, addresses, (0, 0, 0), (1, 1, 1), units, **options
    )
    machine.run()
    return machine, [
        memory.read(a, x.shape, x.dtype) for a, x in zip(addresses, params, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov.b32 %r1, 0f3F800000;", 0x3F800000),
        ("mov.b32 %r1, -1;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0x80000000; shr.s32 %r1, %r2, 40;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0x80000000; shr.u32 %r1, %r2, 32;", 0),
        ("mov.b32 %r2, 1; shl.b32 %r1, %r2, 33;", 0),
        ("mov.b32 %r2, 0x00F0; bfe.u32 %r1, %r2, 4, 4;", 0xF),
        ("mov.b32 %r2, 0x00F0; bfe.s32 %r1, %r2, 4, 4;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0x0070; bfe.s32 %r1, %r2, 4, 4;", 7),
        ("mov.b32 %r2, 0x33221100; mov.b32 %r3, 0x77665544; prmt.b32 %r1, %r2, %r3, 0x7520;",
         0x77552200),
        ("mov.b32 %r2, 0x00000080; prmt.b32 %r1, %r2, %r2, 0x8888;", 0xFFFFFFFF),
        ("mov.b32 %r2, 12; mov.b32 %r3, 10; lop3.b32 %r1, %r2, %r3, 9, 0xE8;", 8),
        ("mov.b32 %r2, 12; mov.b32 %r3, 10; lop3.b32 %r1, %r2, %r3, 9, 0x96;", 15),
        ("mov.b32 %r2, 0x80000000; shf.l.wrap.b32 %r1, %r2, 1, 1;", 3),
        ("mov.b32 %r2, 0; shf.r.clamp.b32 %r1, %r2, 5, 40;", 5),
        ("mov.b32 %r2, 0xFFFFFFFF; mul.hi.u32 %r1, %r2, %r2;", 0xFFFFFFFE),
        ("mov.b32 %r2, -7; rem.s32 %r1, %r2, 4;", 0xFFFFFFFD),
        ("mov.b32 %r2, -7; div.s32 %r1, %r2, 4;", 0xFFFFFFFF),
        ("mov.b32 %r2, 0f3F808000; cvt.rn.bf16x2.f32 %r1, %r2, %r2;", 0x3F803F80),
        ("mov.b32 %r2, 0f3F818000; cvt.rn.bf16x2.f32 %r1, 0f3F800000, %r2;", 0x3F803F82),
        ("mov.b32 %r2, 0f3F800000; cvt.rn.f16x2.f32 %r1, 0f40000000, %r2;", 0x40003C00),
        ("mov.b32 %r2, 0f40400000; ex2.approx.ftz.f32 %r1, %r2;", 0x41000000),
        ("mov.b32 %r2, 0f7FC00000; max.f32 %r1, %r2, 0f3F800000;", 0x3F800000),
        ("mov.b32 %r2, 0f7FC00000; setp.lt.f32 %p1, %r2, %r2; selp.b32 %r1, 1, 2, %p1;", 2),
        ("mov.b32 %r2, 0f7FC00000; setp.neu.f32 %p1, %r2, %r2; selp.b32 %r1, 1, 2, %p1;", 1),
        ("mov.b32 %r2, 0xABCD1234; mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r1, {%rs2, %rs1};",
         0x1234ABCD),
    ],
)  # fmt: skip
def test_one_instruction(text, expected):
    machine, _ = run(text)
    assert (machine.registers["%r1"] == np.uint32(expected)).all(), hex(machine.registers["%r1"][0])


def test_swizzles():
    # Row 1 of 128 bytes exchanges neighbours of 16 bytes; row 2 pairs of them, unless of 32 bytes.
    assert ptx_tensor_cores.swizzle(128 + 16, 128) == 128
    assert ptx_tensor_cores.swizzle(7 * 128 + 16, 128) == 7 * 128 + 96
    assert ptx_tensor_cores.swizzle(2 * 128, 64) == 2 * 128 + 32
    assert ptx_tensor_cores.swizzle(4 * 128, 64) == 4 * 128
    assert ptx_tensor_cores.swizzle(3 * 128 + 4, 32) == 3 * 128 + 20
    assert ptx_tensor_cores.swizzle(1000, 16) == 1000


def test_threads_meet_again():
    body = """
        mov.u32 %r1, %tid.x;
        mov.b32 %r2, 0;
        setp.lt.u32 %p1, %r1, 5;
        @%p1 bra $L_few;
        add.s32 %r2, %r2, 7;
        bra.uni $L_join;
    $L_few:
        add.s32 %r2, %r2, 1;
    $L_join:
        shfl.sync.bfly.b32 %r3, %r2, 31, 31, -1;
        elect.sync %r4|%p2, -1;
        @%p2 mov.b32 %r3, 99;
    """
    machine, _ = run(body)
    wanted = [99] + [7] * 26 + [1] * 5
    assert machine.registers["%r3"].tolist() == wanted


def test_each_matrix_is_stored_by_rows_or_turned():
    body = """
        mov.u32 %r1, %tid.x;
        shl.b32 %r2, %r1, 4;
        add.s32 %r2, %r2, 1024;
        stmatrix.sync.aligned.m8n8.x4{}.shared.b16 [%r2], {{%r1, %r1, %r1, %r1}};
        ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
    """
    for turned, places in ((".trans", (0, 8)), ("", (0, 1))):
        machine, _ = run(body.format(turned, turned))
        halves = machine.shared[1024 : 1024 + 128].view(np.uint16)
        # Thread 0 holds elements 0 and 1 of row 0, thread 1 the next two; the low half counts here.
        assert halves[places[0]] == 0 and halves[places[1]] == 0
        assert halves[2 * places[1]] == 1 and halves[3 * places[1]] == 0
        first_of_thread_4 = 1 if turned else 8
        assert halves[first_of_thread_4] == 4
        assert (machine.registers["%r4"] == np.arange(32)).all()


def test_sums_lie_as_the_isa_has_them():
    row, column = ptx_tensor_cores.accumulator_places(16)
    # Thread 37 is lane 5 of warp 1.
    assert row[:, 37].tolist() == [17, 17, 25, 25, 17, 17, 25, 25]
    assert column[:, 37].tolist() == [2, 3, 2, 3, 10, 11, 10, 11]


def test_left_operands_lie_as_the_isa_has_them():
    words = [np.full(128, i + (i << 16), np.uint32) for i in range(4)]
    matrix = ptx_tensor_cores.unpack_left(words)
    assert matrix[0, 0] == 0 and matrix[8, 1] == 1 and matrix[0, 8] == 2 and matrix[8, 15] == 3


def test_metadata_say_where_values_are():
    values = np.arange(1, 64 * 16 + 1, dtype=np.float32).reshape(64, 16)
    # Group 0: positions 1 and 3; the others 0 and 1.
    words = np.full(128, 0x444D444D, np.uint32)
    dense = ptx_tensor_cores.spread(values, words, 0)
    assert dense[0, :8].tolist() == [0, 1, 0, 2, 3, 4, 0, 0]
    assert dense[8, 16:20].tolist() == [0, values[8, 8], 0, values[8, 9]]
    words[2::4] = words[3::4] = 0
    assert (ptx_tensor_cores.spread(values, words, 0) == dense).all()
    with pytest.raises(ptx_program.PtxError, match="rising"):
        ptx_tensor_cores.spread(values, words, 1)


_WGMMA = """
    mov.b64 %rd1, 4611686293305294848;
    or.b64 %rd1, %rd1, 64;
    mov.b32 %r1, 0f00000000;
    mov.b32 %r2, 0f00000000;
    mov.b32 %r3, 0f00000000;
    mov.b32 %r4, 0f00000000;
    mov.b32 %r5, 0x3F803F80;
    wgmma.fence.sync.aligned;
    {{ .reg .pred p; setp.ne.b32 p, 1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r1, %r2, %r3, %r4}},
    {{%r5, %r5, %r5, %r5}}, %rd1, p, 1, 1, 0; }}
    wgmma.commit_group.sync.aligned;
    {}
    wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(("reads", "expected"), [("early", 16.0), ("late", 32.0)])
def test_a_register_that_is_overwritten_in_flight(reads, expected):
    fill = (
        "mov.u32 %r9, %tid.x; shl.b32 %r9, %r9, 3; add.s32 %r9, %r9, 1024; mov.b32 %r8, 0x3F803F80;"
        "st.shared.v2.b32 [%r9], {%r8, %r8}; bar.sync 0; fence.proxy.async.shared::cta;"
    )
    body = fill + _WGMMA.format("mov.b32 %r5, 0x40004000;")
    machine, _ = run(body, num_threads=128, units=functools.partial(_make_units, reads=reads))
    assert (machine.registers["%r1"].view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("vote.sync.all.pred %p1, %p2, -1;", "unknown instruction 'vote"),
        ("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 3; @%p1 bra $L; bar.sync 0; $L:",
         "no thread can go on"),
        ("mov.b32 %r1, 1024; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; mov.b32 %r2, 0;"
         "mbarrier.try_wait.parity.shared.b64 %p2, [%r1], %r2, 10;", "no thread can go on"),
        ("ld.param.b64 %rd1, [k_param_0]; ld.global.b32 %r1, [%rd1+4096];", "outside of every"),
        ("ld.param.b64 %rd1, [k_param_0]; ld.global.b32 %r1, [%rd1+2];", "not aligned"),
    ],
)  # fmt: skip
def test_what_a_program_may_not_do(body, message):
    with pytest.raises(ptx_program.PtxError, match=message):
        run(body, [np.zeros(4, np.uint32)])


def test_rounding_to_bf16_is_that_of_the_hardware():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    import ml_dtypes

    expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (ptx_arithmetic.round_to_bf16(x) == expected).all()
