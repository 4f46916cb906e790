"""The model of cycles on loops that are small enough to count by hand."""

import pytest

from benchmarks import cycle_model, turn_timing
from benchmarks.cycle_model import (
    Counts,
    Plan,
    count,
    count_clocks,
    find_bound,
    find_clock,
    predict,
)
from benchmarks.loop_turns import Control, Issue, MainLoop, Product, read_main_loop
from benchmarks.turn_timing import LATENCY, simulate, time_turn
from pallas_kernels.aot import H200

PLAIN = Issue("MOV")
EXPONENTIAL = Issue("MUFU", unit="mufu", unit_clocks=8)
# 128 columns and 16 of the contraction: 64 clocks, and 6 KB of shared memory.
PRODUCT = Issue("HGMMA", product=Product(128, 16, False, True), commits=True)


def _wait(in_flight=0):
    return Issue("WARPGROUP", in_flight=in_flight)


def _work(clocks):
    """Issue slots are left to others meanwhile."""
    return Issue("NOP", control=Control(stall=clocks))


def test_instructions_take_an_issue_slot_each():
    assert simulate((PLAIN,) * 10, 1) == 10
    assert simulate((PLAIN,) * 10, 2) == 20


def test_stalls_of_one_warp_are_slots_of_the_other():
    turn = (_work(2),) * 10
    assert simulate(turn, 1) == simulate(turn, 2) == 20


def test_exponentials_share_their_unit():
    turn = (EXPONENTIAL,) * 4
    assert simulate(turn, 1) == 32
    assert simulate(turn, 2) == 64


def test_a_scoreboard_is_waited_for():
    load = Issue("LDS", control=Control(until_done=3))
    assert simulate((load, PLAIN), 1) == 2
    assert simulate((load, Issue("MOV", control=Control(waits=(3,)))), 1) == LATENCY + 1
    assert simulate((load, Issue("MOV", control=Control(waits=(2,)))), 1) == 2
    far = load._replace(is_global_read=True)
    waiting = Issue("MOV", control=Control(waits=(3,)))
    assert simulate((far, waiting), 1) == turn_timing.L2_LATENCY + 1


def test_operands_are_read_before_the_result_is_there():
    load = Issue("MUFU", control=Control(until_read=0), unit="mufu", unit_clocks=8)
    assert simulate((load, Issue("MOV", control=Control(waits=(0,)))), 1) == 8 + 1


def test_a_product_that_is_awaited_leaves_tensor_cores_idle_unless_another_warpgroup_has_one():
    turn = (PRODUCT, _wait())
    # The wait is issued when the product is seen to be done, the next product after it.
    assert simulate(turn, 1) == 64 + LATENCY + 1
    assert simulate(turn, 2) == 2 * 64


def test_a_product_in_flight_keeps_them_busy():
    assert simulate((PRODUCT, _wait(1)), 1) == 64
    assert simulate((PRODUCT, _wait(1), _work(100)), 1) == pytest.approx(101, abs=1)


def test_a_product_takes_as_long_as_its_operands():
    sparse = Product(256, 32, True, True)
    assert turn_timing.time_product(sparse) == 128
    assert sparse.shared_bytes == 2 * (256 * 32 + 64 * 16) == 144 * 128
    assert simulate((Issue("HGMMA", product=sparse, commits=True), _wait(1)), 1) == 144
    from_registers = sparse._replace(reads_left=False)
    assert simulate((Issue("HGMMA", product=from_registers, commits=True), _wait(1)), 1) == 128


# As compiled, products leave time for those of the other warpgroup to come in between.
PRODUCTS = (*(PRODUCT._replace(commits=False, control=Control(stall=12)),) * 7, PRODUCT)
SOFTMAX = (EXPONENTIAL,) * 62


def test_warpgroups_without_an_order_begin_with_several_lags():
    turn = (*PRODUCTS, _wait(), *SOFTMAX, *PRODUCTS, _wait())
    times = time_turn(turn)
    # All products take 2048, beside the exponentials of the other; one alone waits for both.
    assert len(times) == 8 and all(2048 <= time < 2200 for time in times)
    assert simulate(turn, 1) > 1024 + 62 * 8
    late = simulate((PLAIN,) * 10, 2, lag=5)
    assert late == simulate((PLAIN,) * 10, 2)


@pytest.mark.parametrize("in_one", [True, False])
def test_an_order_makes_them_go_in_turns(in_one):
    # Whoever has started its products lets the other go on, and whoever is about to waits for it.
    arrives, meets = Issue("SYNCS", arrives=True), Issue("SYNCS", meets=True, is_mutual=True)
    exchange = (meets._replace(arrives=True),) if in_one else (arrives, meets)
    turn = (*PRODUCTS, *exchange, _wait(), *SOFTMAX, *exchange, *PRODUCTS, _wait())
    (time,) = time_turn(turn)
    assert 2048 <= time < 2200
    assert simulate(turn, 1) > 1500  # one alone meets nobody


def test_warpgroups_that_hand_over_go_in_turns_too():
    # Each waits for its turn before its products, and gives the other one behind them.
    turn = (Issue("BAR", meets=True), *PRODUCTS, Issue("BAR", arrives=True), _wait(), *SOFTMAX)
    (time,) = time_turn(turn)
    assert 1024 <= time < 1200


def test_who_waits_for_ever_is_reported():
    with pytest.raises(ValueError, match="wait for each other"):
        simulate((PLAIN, Issue("BAR", meets=True)))


def _counts(**changes):
    facts = dict(
        instructions=100, products=8, tensor_clocks=512.0, operand_bytes=8 * 6144, flops=8 * 2**18,
        exponentials=20, in_flight=0, has_order=False,
    )  # fmt: skip
    return Counts(**(facts | changes))


def test_clocks_are_counted_by_resource():
    assert count_clocks(_counts(), 32768, 2) == {
        "tensor cores": 1024,
        "shared memory": (2 * 8 * 6144 + 32768) / 128,
        "issue": 200,
        "exponentials": 320,
    }


def test_twice_the_bytes_make_shared_memory_the_bound():
    for scale, bound in ((1, "tensor cores"), (2, "shared memory")):
        clocks = count_clocks(_counts(), scale * 32768, 2) | {"path": 1050.0}
        assert find_bound(clocks) == bound
    assert find_bound(clocks | {"path": 1.2 * clocks["shared memory"]}) == "waits"


def test_the_clock_is_what_power_allows():
    assert find_clock(1000, 1000) == cycle_model.POWER_CLOCK_GHZ
    assert find_clock(1000, 10) == cycle_model.CLOCK_GHZ
    assert find_clock(1000, 8000) == pytest.approx(cycle_model.POWER_CLOCK_GHZ / 2)


def test_counts_are_those_of_the_turn():
    turn = (
        PRODUCT,
        PRODUCT._replace(commits=False),
        _wait(1),
        EXPONENTIAL,
        Issue("BAR", meets=True),
    )
    assert count(turn) == Counts(
        instructions=5, products=2, tensor_clocks=128, operand_bytes=2 * 6144, flops=2 * 2**18,
        exponentials=1, in_flight=1, has_order=True,
    )  # fmt: skip


_LOOP = MainLoop((*(PRODUCT._replace(commits=False),) * 7, PRODUCT, _wait(1)), is_repeated=True)
_FLOPS_OF_TURN = 2 * 8 * 2**18


def _plan(**changes):
    facts = dict(
        tiles=132, flops=1000 * _FLOPS_OF_TURN, copied_bytes=0, stored_bytes=0, memory_bytes=0
    )
    return Plan(**(facts | changes))


def test_a_tile_takes_its_turns():
    prediction = predict(_LOOP, _plan(), H200)
    assert prediction.bound == "tensor cores" and prediction.turns == 1000
    start = 2 * cycle_model.GLOBAL_LATENCY
    clocks = 1000 * 1024 + start
    assert prediction.seconds == pytest.approx(clocks / prediction.clock_ghz * 1e-9)
    assert prediction.flops_per_second == pytest.approx(
        132 * 1000 * _FLOPS_OF_TURN / prediction.seconds
    )


def test_tiles_go_in_rounds_over_the_processors():
    one, two = (predict(_LOOP, _plan(tiles=tiles), H200).seconds for tiles in (132, 133))
    assert two == pytest.approx(2 * one, rel=1e-2)


def test_programs_that_do_not_stay_begin_and_end_for_every_tile():
    plan = _plan(tiles=1320, flops=10 * _FLOPS_OF_TURN, stored_bytes=2**15, start_reads=4)
    stays, ends = (
        predict(MainLoop(_LOOP.turn, is_repeated), plan, H200) for is_repeated in (True, False)
    )
    waits = 9 * 5 * cycle_model.GLOBAL_LATENCY / stays.clock_ghz * 1e-9
    assert ends.seconds - stays.seconds > waits


def test_tiles_that_are_copied_slower_than_multiplied_are_the_bound():
    copied = 1000 * 2**17
    prediction = predict(_LOOP, _plan(copied_bytes=copied), H200)
    assert prediction.bound == "L2" and prediction.l2_share == 1
    assert prediction.seconds > copied * 132 / cycle_model.L2_BYTES_PER_SECOND


def test_memory_bounds_the_whole_kernel():
    prediction = predict(_LOOP, _plan(memory_bytes=4.8e12), H200)
    assert prediction.bound == "memory" and prediction.seconds == 1


# A loop that multiplies, in a loop over tiles. Where a tile is not there, it goes on behind the
# program. The address of the first barrier changes from turn to turn, that of the second does not.
_SASS = """
.L_x_0:
-:-:-:Y:01        /*0010*/  MOV R1, RZ ;
.L_x_1:
-:-:2:Y:02        /*0020*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R1 ;
2:-:-:Y:05        /*0030*/  @!P1 BRA `(.L_x_3) ;
.L_x_2:
-:-:-:Y:01        /*0040*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
-:-:-:Y:12        /*0050*/  HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
-:-:-:Y:01        /*0060*/  SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9], RZ ;
-:-:1:Y:02        /*0070*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R1 ;
0x16:-:-:Y:02     /*0080*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
3&1:0:2:-:03      /*0090*/  LDS.64 R2, [R3] ;
-:-:-:Y:01        /*00a0*/  UIADD3 UR8, UR8, 0x8, URZ ;
-:-:-:Y:05        /*00b0*/  @P0 BRA `(.L_x_1) ;
-:-:-:Y:05        /*00c0*/  @P2 BRA `(.L_x_0) ;
-:-:-:Y:05        /*00d0*/  EXIT ;
.L_x_3:
-:-:2:Y:02        /*00e0*/  SYNCS.PHASECHK.TRANS64 P1, [UR8], R1 ;
2:-:-:Y:05        /*00f0*/  @!P1 BRA `(.L_x_3) ;
-:-:-:Y:05        /*0100*/  BRA `(.L_x_2) ;
"""


def test_a_loop_is_read_from_machine_code():
    loop = read_main_loop(_SASS)
    assert loop.is_repeated
    bases = " ".join(x.base for x in loop.turn)
    assert bases == "SYNCS BRA HGMMA HGMMA SYNCS SYNCS WARPGROUP LDS UIADD3 BRA"
    assert not read_main_loop(_SASS.replace("@P2 BRA `(.L_x_0)", "NOP")).is_repeated
    with pytest.raises(ValueError, match="no loops"):
        read_main_loop(_SASS.replace("@P0 BRA `(.L_x_1)", "NOP").replace("@P2 BRA", "@P2 NOP"))


def test_of_several_loops_those_with_most_products_come_first():
    shorter = """
.L_x_9:
-:-:-:Y:12        /*0002*/  HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
-:-:-:Y:05        /*0004*/  @P0 BRA `(.L_x_9) ;
"""
    sass = shorter + _SASS
    assert read_main_loop(sass).turn == read_main_loop(_SASS).turn
    assert [x.base for x in read_main_loop(sass, 1).turn] == ["HGMMA", "BRA"]
    with pytest.raises(ValueError, match="2 loops"):
        read_main_loop(sass, 2)


def test_instructions_are_read_with_their_control_codes():
    *_, first, second, arrives, meets, wait, load, _, _ = read_main_loop(_SASS).turn
    assert first.product == Product(128, 16, False, reads_left=True) and not first.commits
    assert second.product == Product(128, 16, False, reads_left=False) and second.commits
    assert second.control.stall == 12
    assert wait.in_flight == 1 and wait.control.waits == (1, 2, 4)
    assert load.control == Control((3, 1), until_read=0, until_done=2, stall=3)
    assert (load.unit, load.unit_clocks) == ("lsu", 8)
    assert arrives.arrives and meets.meets and meets.is_mutual


def test_barriers_of_a_ring_are_no_order():
    assert not read_main_loop(_SASS).turn[0].meets
    moved = _SASS.replace("UIADD3 UR8, UR8", "UIADD3 UR9, UR9")
    assert not any(x.meets for x in read_main_loop(moved).turn[2:])


@pytest.mark.parametrize(
    ("move", "is_order"),
    [
        ("MOV R2, UR9", True),
        ("IMAD.U32 R2, RZ, RZ, UR9", True),
        ("IMAD.U32 R2, R9, R9, UR9", False),
        ("MOV R2, UR8", False),
    ],
)
def test_a_barrier_is_known_where_its_address_was_moved(move, is_order):
    meeting = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R1 ;"
    moved = _SASS.replace(
        f"-:-:1:Y:02        /*0070*/  {meeting}",
        f"-:-:-:Y:02         /*0064*/  {move} ;\n"
        f"-:-:1:Y:02        /*0070*/  {meeting.replace('UR9', 'R2+URZ')}",
    )
    assert moved != _SASS
    assert any(x.meets for x in read_main_loop(moved).turn) == is_order


def test_a_barrier_that_is_looked_at_again_is_met_once():
    again = "-:-:-:Y:02        /*0072*/  SYNCS.PHASECHK.TRANS64 P1, [UR9], R1 ;"
    wait = "0x16:-:-:Y:02     /*0080*/"
    repeated = _SASS.replace(wait, f"{again}\n{wait}")
    assert repeated != _SASS
    assert sum(x.meets for x in read_main_loop(repeated).turn) == 1


def test_sparse_products_are_read():
    sass = _SASS.replace(
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24",
        "HGMMA.SP.64x256x32.F32.BF16 R24, gdesc[UR4], R24, R153, 0x0",
    )
    assert read_main_loop(sass).turn[2].product == Product(256, 32, True, True)


def test_numbered_barriers_of_both_warpgroups_are_an_order():
    named = _SASS.replace("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9], RZ", "BAR.ARV R7, 0x100").replace(
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R1", "BAR.SYNC.DEFER_BLOCKING R6, 0x100"
    )
    *_, arrives, meets, _, _, _, _ = read_main_loop(named).turn
    assert (arrives.arrives, arrives.meets) == (True, False)
    assert (meets.arrives, meets.meets, meets.is_mutual) == (False, True, False)
    own = named.replace("0x100", "0x80")
    assert not any(x.meets or x.arrives for x in read_main_loop(own).turn)
