"""What every implementation of `block_sparse_matmul` must do, stated once.

A case fixes shapes and types; each of its pairs of masks goes through one compiled program. The
reference in f32 is the measure; 16-bit types may err as much as a plain product in that type.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_matmul
from pallas_kernels.doctor.oracles import error, make_masks, make_normal, plain_block_matmul

NAMES = ("y", "dx", "dw", "dbias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMatmulCase:
    """Shapes and types of one compiled program."""

    leading: tuple[int, ...] = (6, 4)
    grid: tuple[int, int] = (4, 5)
    block: tuple[int, int] = (8, 16)
    dtype: str = "float32"
    mask_names: tuple[str, ...] | None = None  # of those below; None for all

    def inputs(self):
        """Return x, w, bias and dy."""
        inner, columns = (count * side for count, side in zip(self.grid, self.block, strict=True))
        shapes = ((*self.leading, inner), (inner, columns), (columns,), (*self.leading, columns))
        return make_normal(shapes, self.dtype)

    def masks(self):
        """Return name -> (mask, mask of the gradient)."""
        masks = make_masks(self.grid)
        pairs = {name: (mask, mask) for name, mask in masks.items()}
        pairs["gradient of everything"] = (masks["random"], masks["full"])
        pairs["gradient of others"] = (masks["empty_rows"], masks["empty_columns"])
        return {name: pairs[name] for name in self.mask_names or pairs}


def call_block_matmul(implementation):
    """Return the op as the contract calls it."""

    def matmul(x, w, mask, grad_mask, bias):
        return block_sparse_matmul(
            x, w, mask, grad_mask=grad_mask, bias=bias, implementation=implementation
        )

    return matmul


def check_block_matmul(case, matmul):
    """Run all masks of a case through one program and compare values and gradients."""
    x, w, bias, dy = case.inputs()
    traces = []

    @jax.jit
    def run(x, w, mask, grad_mask, bias, dy):
        traces.append(mask)
        y, pull_back = jax.vjp(lambda x, w, b: matmul(x, w, mask, grad_mask, b), x, w, bias)
        return y, *pull_back(dy)

    wide = [a.astype(jnp.float32) for a in (x, w, bias, dy)]
    for name, (mask, grad_mask) in case.masks().items():
        rows, columns = w.shape[0] // mask.shape[0], w.shape[1] // mask.shape[1]
        kept = np.kron(np.asarray(mask), np.ones((rows, columns), bool))
        # Nothing that a pruned block holds may show.
        got = run(x, jnp.where(kept, w, jnp.nan), mask, grad_mask, bias, dy)
        # A kernel that is interpreted calls JAX itself, and may wait forever for what comes next.
        jax.block_until_ready(got)
        exact = plain_block_matmul(wide[0], wide[1], mask, grad_mask, wide[2], wide[3])
        plain = plain_block_matmul(x, w, mask, grad_mask, bias, dy)
        for part, a, e, p in zip(NAMES, got, exact, plain, strict=True):
            where = f"{part} of mask {name!r}"
            assert a.dtype == x.dtype and a.shape == e.shape, where
            factor = 2 if part == "y" else 3
            # Another order of summing f32 makes a difference too.
            bound = max(factor * error(p, e), 1e-5 + 2e-6 * np.abs(e).max())
            assert error(a, e) <= bound, f"{where}: {error(a, e)} > {bound}"
        wanted = np.kron(np.asarray(grad_mask), np.ones((rows, columns), bool))
        assert not np.asarray(got[2], np.float32)[~wanted].any(), f"dw of mask {name!r}"
    assert len(traces) == 1, "masks are data"
