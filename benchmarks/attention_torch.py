"""PyTorch's FlexAttention and SDPA on the inputs of an attention point, without JAX in between.

PyTorch is imported only when its functions are made. Flex gets the block mask of the point; SDPA,
like cuDNN, knows none and computes every visible logit.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_problems import Problem
from benchmarks.harness import ForeignCall
from pallas_kernels import make_block_schedule

FLEX, SDPA = "torch flex", "torch sdpa"
# Tiles that FlexAttention chooses by itself span up to this many positions and may not be larger
# than the blocks of the mask.
_DEFAULT_TILE = 128


def list_flex_blocks(mask: np.ndarray, *, causal: bool) -> dict[str, np.ndarray]:
    """List the kept blocks as FlexAttention's `BlockMask` has them.

    "Full" blocks are attended to whole. The others are masked logit by logit; with square blocks
    those are the kept ones on the diagonal of causal attention, and none otherwise.

    Args:
      mask: bool[1 or B, 1 or N, I, I], True where a block is kept.
      causal: bool, whether blocks above the diagonal are dropped.

    Returns:
      dict of int32 arrays: `kv_num_blocks` [..., I], `kv_indices` [..., I, I], `q_num_blocks` and
      `q_indices` of the blocks that need a mask, and the same names after `full_` of the others.
      Indices are permutations, the listed blocks first and ascending.
    """
    mask = np.asarray(mask)
    if causal:
        on_diagonal = np.eye(mask.shape[-1], dtype=bool)
        masked, full = mask & on_diagonal, np.tril(mask, -1)
    else:
        masked, full = np.zeros_like(mask), mask
    lists = {}
    for prefix, blocks in (("", masked), ("full_", full)):
        schedule = make_block_schedule(jnp.asarray(blocks))
        lists |= {
            f"{prefix}kv_num_blocks": np.asarray(schedule.kv_counts),
            f"{prefix}kv_indices": np.asarray(schedule.kv_indices),
            f"{prefix}q_num_blocks": np.asarray(schedule.q_counts),
            f"{prefix}q_indices": np.asarray(schedule.q_indices),
        }
    return lists


def make_torch_calls(
    problem: Problem, ring: Sequence[Sequence[jax.Array]], mask: jax.Array | None
) -> tuple[dict[str, ForeignCall], dict[str, str]]:
    """Make PyTorch's functions of a point.

    Args:
      problem: the setting.
      ring: the inputs (q, k, v, d_out), used in turns; the first call uses the first.
      mask: bool[1, 1, I, I] or None.

    Returns:
      (calls by name, why a name is absent). Exactly one of the two has each name.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.attention import (  # pyright: ignore[reportMissingImports]
            flex_attention as flex,
        )
    except ImportError as error:
        return {}, dict.fromkeys((FLEX, SDPA), f"PyTorch is not installed: {error}")
    platform = next(iter(ring[0][0].devices())).platform
    if platform != "cpu" and not torch.cuda.is_available():
        return {}, dict.fromkeys((FLEX, SDPA), "PyTorch sees no GPU")
    if platform == "cpu":
        # By itself it may leave threads of a core unused, which XLA does not.
        torch.set_num_threads(os.cpu_count() or 1)

    # Compiled functions of earlier points count against a limit beyond which nothing is compiled.
    torch.compiler.reset()
    tensors = [tuple(_as_tensor(torch, array) for array in args) for args in ring]
    for q, k, v, _ in tensors:
        for x in (q, k, v):
            x.requires_grad_(problem.backward)
    blocks = (
        np.ones((1, 1, *(problem.length // problem.block,) * 2), bool) if mask is None else mask
    )
    device = tensors[0][0].device
    block_mask = _make_block_mask(torch, flex, np.asarray(blocks), problem, device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    options = _choose_tiles(problem.block)

    def attend_flex(q, k, v):
        return compiled(q, k, v, block_mask=block_mask, kernel_options=options)

    def attend_sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem.causal)

    def to_foreign(attend):
        return ForeignCall(
            call=_timed(torch, attend, tensors, backward=problem.backward),
            wait=lambda result: None if platform == "cpu" else torch.cuda.synchronize(),
            to_numpy=_to_numpy,
        )

    return {FLEX: to_foreign(attend_flex), SDPA: to_foreign(attend_sdpa)}, {}


def _as_tensor(torch: Any, array: jax.Array) -> Any:
    # [B, T, N, H] to the layout that PyTorch's kernels are made for; the copy is PyTorch's own.
    return torch.from_dlpack(jax.block_until_ready(array)).transpose(1, 2).contiguous()


def _make_block_mask(
    torch: Any, flex: Any, blocks: np.ndarray, problem: Problem, device: Any
) -> Any:
    lists = {
        name: torch.from_numpy(listed.copy()).to(device)
        for name, listed in list_flex_blocks(blocks, causal=problem.causal).items()
        # PyTorch derives the lists by key block from those by query block.
        if "kv_" in name
    }
    return flex.BlockMask.from_kv_blocks(
        **lists,
        BLOCK_SIZE=(problem.block, problem.block),
        mask_mod=(lambda b, h, q_index, kv_index: q_index >= kv_index) if problem.causal else None,
        seq_lengths=(problem.length, problem.length),
    )


def _choose_tiles(block: int) -> dict[str, int] | None:
    """Tiles that divide the blocks, where FlexAttention's own choice would not."""
    if block >= _DEFAULT_TILE:
        return None
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", *(f"bwd_BLOCK_{n}" for n in ("M1", "N1", "M2", "N2")))
    return dict.fromkeys(names, block)


def _timed(
    torch: Any, attend: Callable[..., Any], tensors: Sequence[tuple], *, backward: bool
) -> Callable[[], Any]:
    turns = itertools.cycle(tensors)

    def forward():
        q, k, v, _ = next(turns)
        with torch.no_grad():
            return attend(q, k, v)

    def forward_and_backward():
        q, k, v, d_out = next(turns)
        out = attend(q, k, v)
        return out, torch.autograd.grad(out, (q, k, v), d_out)

    return forward_and_backward if backward else forward


def _to_numpy(result: Any) -> Any:
    return jax.tree.map(lambda x: x.detach().transpose(1, 2).float().cpu().numpy(), result)
