"""Kernels that are broken on purpose, and which proof notices each of them.

"machine code" follows the paths of the compiled program (`machine_checks`); "interpreter" runs the
kernel with products as late as their waits allow and copies early, late and in between (`hopper`);
"PTX" runs what it was compiled to (`ptx_machine`). Some faults only one of them can see. Which do
is asserted both ways, so that this table stays true.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels.doctor.oracles import error
from pallas_kernels.nm_matmul.mosaic_sm90 import kernel as kernel_module
from pallas_kernels.nm_matmul.mosaic_sm90 import wgmma_sp
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.packing import Compressed
from tests.kernels import asynchronous
from tests.kernels.contract import Case, call_implementation
from tests.kernels.interpreter import give_back_early, hopper, miss_barrier
from tests.kernels.machine_checks import find_faults
from tests.kernels.ptx_host import ptx_machine_runs_kernels
from tests.kernels.ptx_program import PtxError
from tests.kernels.test_nm_mosaic_sm90 import make_operands, run

pytestmark = pytest.mark.ci

# Thirteen steps: too many for LLVM to unroll, and one is left over from the turns.
_PROBLEM = Problem(
    rows=256, contraction=832, columns=128, dtype="bfloat16", dense_is_transposed=True
)
_TILES = Tiles(blocks=2, columns=32, contraction=64, stages=2)
_ALL_AWAITED = dataclasses.replace(_TILES, in_flight=0)
_CASE = Case(
    batch=1, num_heads=1, num_kv_heads=1, num_queries=128, num_keys=320, head_dim=64, block_q=128,
    block_kv=64, dtype="bfloat16", mask_names=("full",),
)  # fmt: skip


def _reload_metadata(patch):
    """One step a turn: the register is loaded again while the step before may still read it."""
    patch.setattr(kernel_module, "_steps_of_turn", lambda tiles: 1)


def _load_metadata_behind_the_fence(patch):
    """Each word is loaded where it is first used, after `wgmma.fence`."""
    load = wgmma_sp._load_words

    class Later:
        def __init__(self, block):
            self._block = block

        def __getitem__(self, at):
            return load([self._block])[0][at]

    patch.setattr(wgmma_sp, "_load_words", lambda metadata: [Later(block) for block in metadata])


def _no_fence(patch):
    patch.setattr(wgmma_sp.nvvm, "wgmma_fence_aligned", lambda: None)


def _read_sums_in_flight(patch):
    """The epilogue begins without the last wait."""
    patch.setattr(wgmma_sp.nvvm, "wgmma_wait_group_sync_aligned", lambda n: None)


def _touch_sums_between_products(patch):
    issue = wgmma_sp._issue

    def issue_and_double(acc, *operands):
        acc = issue(acc, *operands)
        return acc + acc

    patch.setattr(wgmma_sp, "_issue", issue_and_double)


def _swap_the_selector(patch):
    """The lanes that supply metadata to the other instruction are asked for them."""
    instruction = wgmma_sp._instruction

    def swapped(*operands, selector, **options):
        return instruction(*operands, selector=1 - selector, **options)

    patch.setattr(wgmma_sp, "_instruction", swapped)


def _no_wait(patch):
    _wait_otherwise(patch, lambda wait, n: None)


def _give_back_the_slot_in_use(patch):
    """A kernel that waits for every group does so one step too late."""
    _wait_otherwise(patch, lambda wait, n: wait(n + 1))
    patch.setattr(kernel_module, "_steps_of_turn", lambda tiles: 2)


def _wait_otherwise(patch, change):
    # On a GPU, and in the interpreter.
    for module in (plgpu, asynchronous):
        patch.setattr(module, "wgmma_wait", functools.partial(change, module.wgmma_wait))


def _reuse_a_slot_without_waiting(patch):
    """The copying warpgroup leaves out its wait, as with a wrong parity."""
    miss_barrier(patch, 0)


def _read_a_tile_before_it_arrives(patch):
    miss_barrier(patch, 2)


def _no_proxy_fence(patch):
    patch.setattr(plgpu, "commit_smem", lambda: None)


def _overwrite_what_is_being_stored(patch):
    wait = plgpu.wait_smem_to_gmem

    def wait_at_the_end(n, wait_read_only=False):
        if not wait_read_only:
            wait(n)

    patch.setattr(plgpu, "wait_smem_to_gmem", wait_at_the_end)


def _compile_product(tiles=_TILES):
    # So many steps that ptxas leaves them in a loop.
    problem, struct = dataclasses.replace(_PROBLEM, contraction=4096), jax.ShapeDtypeStruct
    half = problem.contraction // 2
    values = struct((problem.rows, half), "bfloat16")
    metadata = struct((problem.rows // 64, half // 32, 128), "uint32")
    dense = struct((problem.columns, problem.contraction), "bfloat16")

    def multiply(values, metadata, dense):
        sparse = Compressed(values, metadata)
        return multiply_sparse(sparse, dense, None, problem, tiles, num_programs=132)

    return aot.compile_for(multiply, values, metadata, dense), tiles.in_flight


def _run_product(tiles=_TILES):
    """Return what is wrong with the product, "" if nothing."""
    a, mask, *operands = make_operands(_PROBLEM)
    out, *_ = run(_PROBLEM, tiles, *operands, num_programs=1)
    f32 = functools.partial(np.asarray, dtype=np.float32)
    exact = f32(operands[1]) @ f32(jnp.where(mask, a, 0)).T
    return "" if error(out, exact) < 0.01 * np.abs(exact).max() else "other values"


def _attend(q, k, v, mask):
    options = _CASE.options
    return call_implementation("mosaic_sm90")(q, k, v, mask, **options)


def _compile_attention():
    mask = jnp.ones((1, 1, 1, 5), bool)
    q, k, v = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in _CASE.shapes)
    # Turns are handed over while products run.
    return aot.compile_for(lambda q, k, v: _attend(q, k, v, mask), q, k, v), 2


def _run_attention():
    inputs, mask = _CASE.inputs(), jnp.ones((1, 1, 1, 5), bool)
    out, _ = jax.jit(_attend)(*inputs, mask)
    exact, _ = call_implementation("reference")(*inputs, mask, **_CASE.options)
    return "" if error(out, exact) < 0.02 else "other values"


@dataclasses.dataclass(frozen=True)
class Broken:
    """A fault and who notices it."""

    break_it: Callable
    noticed_by: frozenset
    compile: Callable = _compile_product
    run: Callable = _run_product


_ALL = frozenset({"machine code", "interpreter", "PTX"})
BROKEN = {
    "metadata reloaded while they are read": Broken(_reload_metadata, _ALL),
    "no wait for products": Broken(_no_wait, _ALL),
    "no proxy fence before a store": Broken(_no_proxy_fence, _ALL),
    "slot in use given back": Broken(
        _give_back_the_slot_in_use,
        _ALL,
        functools.partial(_compile_product, _ALL_AWAITED),
        functools.partial(_run_product, _ALL_AWAITED),
    ),
    "metadata loaded behind the fence": Broken(
        _load_metadata_behind_the_fence, _ALL - {"interpreter", "PTX"}
    ),
    "no fence before products": Broken(_no_fence, _ALL - {"interpreter", "PTX"}),
    "sums read in flight": Broken(_read_sums_in_flight, _ALL - {"interpreter"}),
    "sums touched between products": Broken(_touch_sums_between_products, _ALL - {"interpreter"}),
    "slot reused without waiting": Broken(_reuse_a_slot_without_waiting, _ALL - {"machine code"}),
    "tile read before it arrives": Broken(_read_a_tile_before_it_arrives, _ALL - {"machine code"}),
    "staging overwritten while it is stored": Broken(
        _overwrite_what_is_being_stored, _ALL - {"machine code"}
    ),
    "tile given back before it is multiplied": Broken(
        give_back_early,
        _ALL - {"machine code", "PTX"},
        _compile_attention,
        _run_attention,
    ),
    "selector of metadata swapped": Broken(
        _swap_the_selector, _ALL - {"machine code", "interpreter"}
    ),
}


# A proof that fails for another reason notices nothing.
_SIGNS = {
    "machine code": r"writes a register|touches a sum|arrives at|fence is missing|\(C75\d\d\)|"
    r"in flight|groups of products",
    "interpreter": r"saw a race|other values|observed|was touched|violates the inv",
    "PTX": r"other values|on their way|rising positions|after all of the phase|from thread",
}


def _by(proof):
    """Return a parameter for each fault; that a proof is blind to it takes longer to show."""
    return [
        pytest.param(broken, id=name, marks=() if proof in broken.noticed_by else pytest.mark.slow)
        for name, broken in BROKEN.items()
    ]


def _look_at_machine_code(compile_it):
    report, in_flight = compile_it()
    return [
        fault
        for kernel in report.kernels
        for fault in find_faults(kernel, in_flight_at_release=in_flight)
    ]


def _interpret(run_it):
    for copies, seed in (("early", 0), ("late", 0), ("random", 0), ("random", 1)):
        jax.clear_caches()
        try:
            with hopper(copies, seed):
                wrong = run_it()
        except (AssertionError, jax.errors.JaxRuntimeError) as noticed:
            wrong = str(noticed).strip().splitlines()[-1]
        if wrong:
            return wrong
    return ""


def _run_ptx(run_it):
    for copies in ("early", "late"):
        jax.clear_caches()
        try:
            with ptx_machine_runs_kernels(reads="late", copies=copies):
                wrong = run_it()
        except (PtxError, jax.errors.JaxRuntimeError) as noticed:
            wrong = str(noticed).strip().splitlines()[-1]
        if wrong:
            return wrong
    return ""


@pytest.mark.slow
def test_sound_kernels_pass_all():
    for compile_it, run_it in (
        (_compile_product, _run_product),
        (BROKEN["slot in use given back"].compile, BROKEN["slot in use given back"].run),
        (_compile_attention, _run_attention),
    ):
        assert not _look_at_machine_code(compile_it)
        assert not _interpret(run_it) and not _run_ptx(run_it)


def _check(broken, proof, noticed):
    if proof in broken.noticed_by:
        assert re.search(_SIGNS[proof], noticed), noticed
    else:
        assert not noticed


@pytest.mark.parametrize("broken", _by("machine code"))
def test_machine_code_shows_it_or_not(broken, monkeypatch):
    broken.break_it(monkeypatch)
    _check(broken, "machine code", "\n".join(_look_at_machine_code(broken.compile)))


@pytest.mark.parametrize("broken", _by("interpreter"))
def test_interpreter_shows_it_or_not(broken, monkeypatch):
    broken.break_it(monkeypatch)
    _check(broken, "interpreter", _interpret(broken.run))


@pytest.mark.parametrize("broken", _by("PTX"))
def test_ptx_shows_it_or_not(broken, monkeypatch):
    broken.break_it(monkeypatch)
    _check(broken, "PTX", _run_ptx(broken.run))
