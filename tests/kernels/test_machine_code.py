"""Hazards of asynchronous products, in machine code of a few lines each."""

import textwrap

import pytest

from pallas_kernels.machine_code import find_named, find_written, parse
from pallas_kernels.products_in_flight import (
    Loop,
    count_groups,
    count_groups_asked_for,
    find_hazards,
    find_loops,
)

_PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
_SPARSE = "HGMMA.SP.64x64x32.F32.BF16 R24, gdesc[UR8], R24, R{}, 0x{}"
_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"
_ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ"


def assemble(text):
    """Return a disassembly: lines with a colon are labels, others instructions."""
    lines, address = [], 0
    for line in textwrap.dedent(text).strip().splitlines():
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(
                f"   -:-:-:Y:01        /*{address:04x}*/                   {line.strip()} "
            )
            address += 16
    return parse("\n".join(lines))


def find(text, **options):
    return find_hazards(assemble(text), **options)


def rolled(*steps):
    """Return a loop that has a step for each register of metadata."""
    body = "".join(
        f"LDS R{r}, [R2]\n{_SPARSE.format(r, 0)}\n{_SPARSE.format(r, 1)}, gsb0\n{_WAIT.format(1)}\n"
        for r in steps
    )
    return f".L_x_1:\n{body}@P0 BRA `(.L_x_1)\n{_WAIT.format(0)}\nEXIT"


def test_a_register_of_metadata_that_is_loaded_again_while_it_is_read():
    (fault,) = find(rolled(150))
    assert fault == "0x0000: LDS R150, [R2] writes a register that a product in flight reads"
    assert not find(rolled(150, 151))
    # A wide load reaches the other one.
    (fault,) = find(rolled(150, 151).replace("LDS R150", "LDS.64 R150"))
    assert fault.startswith("0x0000")


def test_a_register_of_metadata_between_the_products_of_a_group():
    products = (
        f"{_SPARSE.format(150, 0)}\n{{}}\n{_SPARSE.format(151, 1)}, gsb0\n{_WAIT.format(0)}\nEXIT"
    )
    assert len(find(products.format("LDS R150, [R2]"))) == 1
    assert not find(products.format("LDS R152, [R2]"))


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("F2FP.BF16.F32.PACK_AB R7, R90, R91", True),
        ("F2FP.BF16.F32.PACK_AB R8, R90, R91", False),
        ("MOV R90, R4", False),
        ("LDS.128 R4, [R2]", True),
        ("LOP3.LUT P0, R5, R90, 0x7f, RZ, 0xc0, !PT", True),
        ("SHFL.IDX PT, R6, R90, RZ, 0x1f", True),
        ("FSETP.GEU.AND P0, PT, R4, R5, PT", False),
        ("STG.E [R4.64], R90", False),
        ("@P1 IMAD.WIDE R6, R90, R91, R92", True),
    ],
)
def test_registers_of_a_left_operand(line, is_fault):
    product = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0"
    code = f"{product}\n{line}\n{_WAIT.format(0)}\nEXIT"
    assert bool(find(code)) == is_fault


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("FADD R90, R24, R91", True),
        ("FADD R90, R55, R91", True),
        ("FADD R90, R56, R91", False),
        ("CS2R R54, SRZ", True),
        ("STSM.16.MT88.4 [R2], R52", True),
        ("UMOV UR24, URZ", False),
    ],
)
def test_sums_in_flight(line, is_fault):
    code = f"{_PRODUCT}, gsb0\n{line}\n{_WAIT.format(0)}\nFADD R90, R24, R55\nEXIT"
    assert bool(find(code)) == is_fault


def test_a_product_that_reads_or_overwrites_what_others_use():
    left = "HGMMA.64x64x16.F32.BF16 R{}, R{}, gdesc[UR8].tnspB, R{}, gsb0"
    code = f"{{}}\n{{}}\n{_WAIT.format(0)}\nEXIT"
    first = left.format(24, 4, 24)
    assert "reads a sum in flight" in find(code.format(first, left.format(88, 28, 88)))[0]
    assert "a product in flight reads" in find(code.format(first, left.format(0, 60, 0)))[0]
    assert not find(code.format(first, left.format(88, 60, 88)))
    assert not find(code.format(first, first))


def test_what_may_not_be_executed_is_no_wait_and_no_fence():
    for line in (f"@P0 {_PRODUCT}, gsb0", f"@P0 {_WAIT.format(0)}"):
        with pytest.raises(ValueError, match="is not known"):
            find(f"{line}\nEXIT")
    code = "STSM.16.M88.4 [R2], R4\n{}FENCE.VIEW.ASYNC.S\n{} [UR8], [UR4]\nEXIT"
    assert find(code.format("@P0 ", "UTMASTG.2D")) and find(code.format("@P0 ", "UBLKCP.G.S"))
    assert not find(code.format("@UPT ", "UTMASTG.2D"))


def test_a_wait_covers_the_oldest_groups():
    code = f"{_PRODUCT}, gsb0\n{_PRODUCT.replace('24', '56')}, gsb0\n{_WAIT.format(1)}\n{{}}\n"
    code += f"{_WAIT.format(0)}\nEXIT"
    assert not find(code.format("FADD R90, R24, R91"))
    assert find(code.format("FADD R90, R56, R91"))


def test_the_way_with_the_fault_is_found_among_others():
    code = f"""
        {_PRODUCT}, gsb0
        @P0 BRA `(.L_x_1)
        {_WAIT.format(0)}
        .L_x_1:
        FADD R90, R24, R91
        {_WAIT.format(0)}
        EXIT
    """
    (fault,) = find(code)
    assert "touches a sum in flight" in fault
    assert not find(code.replace("@P0 ", "@!PT ").replace("BRA `(.L_x_1)", "NOP"))


def test_products_without_end():
    assert (
        "starts while 4 groups are in flight"
        in find(f".L_x_1:\n{_PRODUCT}, gsb0\nBRA `(.L_x_1)")[0]
    )
    (fault,) = find(f"{_PRODUCT}, gsb0\nEXIT")
    assert "ends the program with products in flight" in fault


def test_a_slot_is_given_back_after_the_wait():
    code = f"{_PRODUCT}, gsb0\n{_WAIT.format(1)}\n{_ARRIVE}\n{_WAIT.format(0)}\nEXIT"
    assert "with 1 groups in flight, of which 0" in find(code)[0]
    assert not find(code, in_flight_at_release=1)
    assert not find(code.replace("0x1", "0x0"))


def test_stores_need_a_fence_before_they_are_copied():
    code = "STSM.16.M88.4 [R2], R4\n{}\nUTMASTG.2D [UR8], [UR4]\nEXIT"
    assert "a proxy fence is missing" in find(code.format("NOP"))[0]
    assert not find(code.format("FENCE.VIEW.ASYNC.S"))


def test_groups_are_counted_as_asked_for_and_as_made():
    ptx = "wgmma.mma_async.x;\n wgmma.mma_async.x;\n wgmma.commit_group.sync.aligned;"
    assert count_groups_asked_for(ptx) == {2}
    assert count_groups(assemble(f"{_PRODUCT}\n{_PRODUCT}, gsb0\nEXIT")) == {2}
    assert count_groups(assemble(f"{_PRODUCT}, gsb0\n{_PRODUCT}, gsb0\nEXIT")) == {1}


def test_loops_are_counted_without_those_that_wait():
    code = f"""
        .L_x_1:
        {_PRODUCT}
        {_PRODUCT}, gsb0
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R11
        @!P1 BRA `(.L_x_2)
        {_WAIT.format(0)}
        @P0 BRA `(.L_x_1)
        EXIT
    """
    (loop,) = find_loops(assemble(code))
    assert loop == Loop(
        products=2, groups=1, waits=(0,), arrivals=(), exponentials=(0, 0), instructions=4
    )


def test_arrivals_and_exponentials_are_told_with_what_is_in_flight():
    code = f"""
        .L_x_1:
        {_PRODUCT}, gsb0
        MUFU.EX2 R80, R80
        {_ARRIVE}
        {_WAIT.format(0)}
        {_ARRIVE}
        MUFU.EX2 R80, R80
        @P0 BRA `(.L_x_1)
        EXIT
    """
    (loop,) = find_loops(assemble(code))
    assert loop.arrivals == (1, 0) and loop.exponentials == (2, 1)


def test_a_subroutine_belongs_to_each_call():
    code = f"""
        CALL.REL.NOINC `($divide)
        {_PRODUCT}, gsb0
        CALL.REL.NOINC `($divide)
        {_WAIT.format(0)}
        EXIT
        $divide:
        FADD R30, R90, R91
        RET.REL.NODEC R4 `(kernel)
    """
    (fault,) = find(code)
    assert "touches a sum in flight" in fault


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("LDG.E.64 R4, desc[UR8][R2.64]", [4, 5]),
        ("CS2R.32 R4, SR_CLOCKLO", [4]),
        ("LDSM.16.M88.4 R8, [R2]", [8, 9, 10, 11]),
        ("S2UR UR4, SR_CTAID.X", []),
        ("IADD3 RZ, P0, R4, R5, RZ", []),
        ("SYNCS.ARRIVE.TRANS64 R4, [UR8], R5", [4]),
        ("SYNCS.ARRIVE.TRANS64 RZ, [UR8], R5", []),
        ("ELECT P0, R4, PT", [4]),
        ("R2UR UR4, R5", []),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", []),
        ("STS [R4], R5", []),
    ],
)
def test_registers_that_are_written(line, written):
    assert list(find_written(assemble(f"{line}\nEXIT").code[0])) == written


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("LDS.64 R88, [R23+UR10]", {23, 88, 89}),
        ("STS.128 [R23], R4", {4, 5, 6, 7, 23}),
        ("LDG.E.64 R4, desc[UR8][R2.64]", {2, 3, 4, 5}),
    ],
)
def test_registers_that_are_named(line, named):
    assert find_named(assemble(f"{line}\nEXIT").code[0]) == named


@pytest.mark.parametrize("line", ["BRX R4 -0x10", "FROB R4, R5"])
def test_what_is_not_known_is_refused(line):
    with pytest.raises(ValueError, match="is not known"):
        find(f"{line}\nEXIT")
