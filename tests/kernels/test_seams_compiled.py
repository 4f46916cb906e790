"""Every part of the kernels that the interpreter does not run as a GPU does, and what proves it.

Functions are found in the source: one that is missing in the table, or is gone, fails a test.
Where a test is named, the real kernels' PTX has run through the function's instructions on the
machine of `ptx_machine`, with copies and products as early and as late as a program allows.
"""

import ast
import pathlib

import pallas_kernels
from tests.kernels import test_ptx_dense_compiled, test_ptx_machine, test_ptx_nm_compiled

_ROOT = pathlib.Path(pallas_kernels.__file__).parent
_PACK = ("test_ptx_nm_compiled.test_packing", "test_ptx_nm_compiled.test_pruning")
_PRODUCT = ("test_ptx_nm_compiled.test_products", "test_ptx_nm_compiled.test_every_tile")
_ATTENTION = (
    "test_ptx_dense_compiled.test_attention",
    "test_ptx_dense_compiled.test_attention_of_every_kind",
)
_MAP = (
    "test_ptx_dense_compiled.test_mean_map",
    "test_ptx_dense_compiled.test_mean_map_of_every_width",
)
_BLOCKS = (
    "test_ptx_dense_compiled.test_block_products",
    "test_ptx_dense_compiled.test_block_products_of_every_kind",
)
_LAYER = ("test_ptx_nm_compiled.test_a_whole_layer",)
_BREAKS = ("test_ptx_nm_compiled.test_a_broken_program_is_noticed",)

# File and function -> tests.
FUNCTIONS = {
    "attention_map/mosaic_sm90.py _launch": _MAP,
    "block_sparse_attention/mosaic_sm90/attention.py make_problem": _ATTENTION,
    "block_sparse_attention/mosaic_sm90/fwd.py _load_queries": _ATTENTION,
    "block_sparse_attention/mosaic_sm90/program.py _describe_scratch": _ATTENTION,
    "block_sparse_attention/mosaic_sm90/program.py launch": _ATTENTION,
    "block_sparse_attention/mosaic_sm90/walk.py make_walk": _ATTENTION,
    "mosaic_fences.py fence_products": (*_BLOCKS, *_MAP),
    "hopper/launch.py launch_kernel": (*_ATTENTION, *_MAP, *_BLOCKS, *_PRODUCT),
    "nm_matmul/mosaic_sm90/products.py run": _LAYER,
    "nm_matmul/mosaic_sm90/kernel.py multiply_sparse": _PRODUCT,
    "nm_matmul/mosaic_sm90/pack.py pack_weight": _LAYER,
    "nm_matmul/mosaic_sm90/thread_words.py _address": _PACK,
    "nm_matmul/mosaic_sm90/thread_words.py _as_stack": _PACK,
    "nm_matmul/mosaic_sm90/thread_words.py _element": _PACK,
    "nm_matmul/mosaic_sm90/thread_words.py load_words": _PACK,
    "nm_matmul/mosaic_sm90/thread_words.py rearrange": _PACK,
    "nm_matmul/mosaic_sm90/thread_words.py store_words": _PACK,
    "nm_matmul/mosaic_sm90/wgmma_sp.py _advance": _PRODUCT,
    "nm_matmul/mosaic_sm90/wgmma_sp.py _instruction": (*_PRODUCT, *_BREAKS),
    "nm_matmul/mosaic_sm90/wgmma_sp.py _issue": _PRODUCT,
    "nm_matmul/mosaic_sm90/wgmma_sp.py _keep_in_place": _PRODUCT,
    "nm_matmul/mosaic_sm90/wgmma_sp.py _load_words": _PRODUCT,
    "nm_matmul/mosaic_sm90/wgmma_sp.py finish_multiply_add": _PRODUCT,
    "nm_matmul/mosaic_sm90/wgmma_sp.py start_multiply_add": (*_PRODUCT, *_BREAKS),
    "nm_matmul/mosaic_sm90/wgmma_sp.py zero_sums": _PRODUCT,
}

# What is no function of its own -> tests.
CONSTRUCTS = {
    "64-byte swizzle of the sparse operand beside 128 bytes of the dense one": _PRODUCT,
    "dense operand with its contraction outside": _PRODUCT,
    "stmatrix, turned": (
        *_PRODUCT, "test_ptx_machine.test_each_matrix_is_stored_by_rows_or_turned"),
    "stmatrix and ldmatrix, plain": (*_ATTENTION, *_BLOCKS),
    "metadata, operands and sums of products in flight": (
        *_PRODUCT, "test_ptx_machine.test_a_register_that_is_overwritten_in_flight", *_BREAKS),
    "left operand of a product in registers, not staged": _ATTENTION,
    "two products started together (multiply_both, multiply_and_add)": _ATTENTION,
    "descriptors of copies, built by the host program": (*_PRODUCT, *_ATTENTION, *_MAP, *_BLOCKS),
    "slots and stages as many as a GPU gets": (*_ATTENTION, *_MAP, *_BLOCKS),
    "named barriers of warpgroups": (*_PACK, *_PRODUCT, *_ATTENTION),
    "proxy fences before copies out of shared memory": _BREAKS,
}  # fmt: skip

# On the machine these do nothing or are exact.
ONLY_A_GPU = {
    "errors of ex2.approx, rcp.approx, lg2.approx and of tensor cores' sums":
        "the machine gives the nearest value",
    "wgmma.fence (start_multiply_add, fence_products)":
        "the machine passes over it; ptxas and pallas_kernels.products_in_flight look for it",
    "registers that _keep_in_place keeps apart":
        "PTX has as many as it wants; pallas_kernels.products_in_flight follows the real ones",
    "set_max_registers": "ptxas accepts the numbers; who waits for registers is not modelled",
    "what ptxas makes of the PTX": "pallas_kernels.products_in_flight reads the machine code",
    "memory order where no barrier orders threads": "the machine runs one warpgroup at a time",
    "programs that run at the same time": "the machine runs blocks one after another",
    "speed": "nothing here says anything of it",
}  # fmt: skip


def find_seams():
    """Return "file function" of every function that has a part for a GPU only."""
    seams = set()
    for path in sorted(_ROOT.rglob("*.py")):
        if path.name == "dispatch.py":
            continue  # It asks which device there is, and is in no kernel.
        tree = ast.parse(path.read_text())
        dialects = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxlib.mlir")
            for alias in node.names
        }
        for node in tree.body:
            of_class = node.body if isinstance(node, ast.ClassDef) else [node]
            for function in of_class:
                if isinstance(function, ast.FunctionDef) and _is_seam(function, dialects):
                    seams.add(f"{path.relative_to(_ROOT).as_posix()} {function.name}")
    return seams


def _names(node):
    return {
        getattr(x, "id", None) or getattr(x, "attr", None)
        for x in ast.walk(node)
        if isinstance(x, ast.Name | ast.Attribute)
    }


def _is_seam(function, dialects):
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp) and _names(node.test) & {
            "interpreted", "in_registers", "is_interpreted",
        }:  # fmt: skip
            return True
        if isinstance(node, ast.Call) and _names(node.func) & {"is_interpreted"}:
            return True
        if isinstance(node, ast.keyword) and node.arg == "approx_math":
            return True
        if isinstance(node, ast.Name | ast.Attribute) and _names(node) & {
            "inline_mgpu", "_inline", *dialects,
        }:  # fmt: skip
            return True
    return False


def test_every_seam_is_in_the_table():
    assert find_seams() == set(FUNCTIONS)


def test_every_proof_is_there():
    modules = (test_ptx_dense_compiled, test_ptx_machine, test_ptx_nm_compiled)
    names = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name in vars(module)
    }
    for seam, tests in (FUNCTIONS | CONSTRUCTS).items():
        assert tests and set(tests) <= names, seam
