"""What the doctor tries: a backend on a call, in the words of its static facts."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_matmul.call import BlockFacts
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.nm_matmul.call import NMFacts, PackFacts, PruneFacts
from pallas_kernels.tables import TABLES
from pallas_kernels.transposable_mask.call import TransposableFacts


class Trial(NamedTuple):
    """One backend on one call.

    Attributes:
      op: name of the op.
      backend: name of the backend.
      facts: static facts of the call.
    """

    op: str
    backend: str
    facts: Any

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `parse_trial` reads."""
        return {**self._asdict(), "facts": dataclasses.asdict(self.facts)}


def parse_trial(values: Mapping[str, Any]) -> Trial:
    """Read a trial from JSON values.

    Args:
      values: as `Trial.to_json` returns them, or without "backend".

    Raises:
      ValueError: if op, backend or facts are none of ours.
    """
    op, backend = values["op"], values.get("backend", "")
    if op not in TABLES:
        raise ValueError(f"op must be one of {tuple(TABLES)}, got {op!r}")
    names = tuple(row.name for row in TABLES[op])
    if backend and backend not in names:
        raise ValueError(f"backend of {op} must be one of {names}, got {backend!r}")
    facts = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values["facts"].items()
    }
    try:
        return Trial(op, backend, MAKERS[op].facts(**facts))
    except TypeError as error:
        raise ValueError(f"facts of {op}: {error}, got {facts}") from error


def list_backends_to_try(op: str, facts: Any) -> list[str]:
    """List the backends whose results on a call are worth checking: all but the reference.

    Args:
      op: name of the op.
      facts: of the call; a portable backend that no call like it gets is left out.
    """
    return [
        row.name
        for row in TABLES[op]
        if row.name != "reference" and (row.needs_verdict or row.suits(facts))
    ]


def list_trials(calls: list[tuple[str, Any]]) -> list[Trial]:
    """List every backend that calls may get.

    Args:
      calls: (op, facts) of each.
    """
    return [Trial(op, b, facts) for op, facts in calls for b in list_backends_to_try(op, facts)]


_ATTENTION = AttentionFacts(
    batch=1,
    num_queries=4096,
    num_keys=4096,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    dtype="bfloat16",
    mask_shape=(1, 1),
    block_q=64,
    block_kv=64,
    causal=True,
    has_kv_mask=False,
    has_segments=False,
    scale=0.125,
    pruned_logits="masked",
    return_lse=False,
)
_NM = NMFacts(rows=4096, inner=1024, columns=4096, dtype="bfloat16", has_bias=True)
_BLOCKS = BlockFacts(rows=4096, shape=(1024, 4096), grid=(8, 32), dtype="bfloat16")
_MAP = MapFacts(num_queries=1024, num_keys=1024, head_dim=64, dtype="bfloat16", causal=False)
_PACK = PackFacts(along_k=True, along_n=True, shape=(1024, 4096), dtype="bfloat16")
_PRUNE = PruneFacts(shape=(4096, 4096), axis=0, dtype="bfloat16")
# What is searched are the master weights.
_SEARCH = TransposableFacts(rows=1024, columns=4096, dtype="float32")


def list_default_calls() -> list[tuple[str, Any]]:
    """List the calls that say in a minute what works: the shapes of the published recipes."""
    replace = dataclasses.replace
    return [
        ("block_sparse_attention", _ATTENTION),
        (
            "block_sparse_attention",
            replace(
                _ATTENTION,
                head_dim=32,
                scale=32**-0.5,
                causal=False,
                has_kv_mask=True,
                pruned_logits="zero",
            ),
        ),
        ("block_sparse_attention", replace(_ATTENTION, mask_shape=None)),
        ("block_sparse_matmul", _BLOCKS),
        ("mean_attention_map", replace(_MAP, has_lse=True)),
        ("nm_matmul", replace(_NM, transposable=True, activation="gelu", grad_pruning="mvue")),
        ("nm_matmul", replace(_NM, transposable=True, grad_pruning="mvue")),
        ("pack_nm", _PACK),
        ("prune_mvue", _PRUNE),
        ("transposable_mask", _SEARCH),
    ]


def list_all_calls() -> list[tuple[str, Any]]:
    """List the whole grid: what kernels are compiled for, every option with every other."""
    calls: list[tuple[str, Any]] = []
    for op, base, grid in _GRIDS:
        varied = (
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        )
        for options in varied:
            facts = base(**options) if callable(base) else dataclasses.replace(base, **options)
            if facts is not None:
                calls.append((op, facts))
    return calls


def _vary_attention(block: int, **options: Any) -> AttentionFacts | None:
    # Without a mask, blocks and rule mean nothing.
    if options["mask_shape"] is None and (block != 64 or options["pruned_logits"] == "zero"):
        return None
    scale = options["head_dim"] ** -0.5
    return dataclasses.replace(_ATTENTION, block_q=block, block_kv=block, scale=scale, **options)


def _vary_blocks(block: int, **options: Any) -> BlockFacts:
    grid = tuple(size // block for size in _BLOCKS.shape)
    return dataclasses.replace(_BLOCKS, grid=grid, **options)


def _vary_map(lengths: tuple[int, int], **options: Any) -> MapFacts:
    num_queries, num_keys = lengths
    return dataclasses.replace(_MAP, num_queries=num_queries, num_keys=num_keys, **options)


def _vary_nm(shape: tuple[int, int, int], **options: Any) -> NMFacts:
    rows, inner, columns = shape
    return dataclasses.replace(_NM, rows=rows, inner=inner, columns=columns, **options)


def _vary_pack(axes: tuple[bool, bool], **options: Any) -> PackFacts:
    return dataclasses.replace(_PACK, along_k=axes[0], along_n=axes[1], **options)


_BOTH = (False, True)
_LOW = ("bfloat16", "float16")
_GRIDS: tuple[tuple[str, Any, dict[str, tuple[Any, ...]]], ...] = (
    (
        "block_sparse_attention",
        _vary_attention,
        {
            "dtype": _LOW,
            "head_dim": (32, 64, 128, 256),
            "block": (32, 64, 128),
            "mask_shape": ((1, 1), (1, 8), None),
            "pruned_logits": ("masked", "zero"),
            "causal": _BOTH,
            "has_kv_mask": _BOTH,
            "has_segments": _BOTH,
            "num_kv_heads": (8, 2),
        },
    ),
    (
        "block_sparse_matmul",
        _vary_blocks,
        {"dtype": _LOW, "block": (64, 128), "has_bias": _BOTH},
    ),
    (
        "mean_attention_map",
        _vary_map,
        {
            "dtype": (*_LOW, "float32"),
            "head_dim": (32, 64, 80, 128, 256),
            # Few tiles, many, and lengths that end inside of one.
            "lengths": ((512, 512), (4096, 4096), (1000, 1500)),
            "causal": _BOTH,
            "has_kv_mask": _BOTH,
            "has_lse": _BOTH,
        },
    ),
    (
        "nm_matmul",
        _vary_nm,
        {
            "shape": (
                (4096, 1024, 4096),
                (4096, 4096, 1024),
                (8192, 4096, 4096),
                (8192, 4096, 16384),
            ),
            "dtype": _LOW,
            "activation": (None, "gelu", "geglu", "swiglu"),
            "grad_pruning": ("none", "mvue", "mvue_exact"),
            "transposable": _BOTH,
            "has_bias": _BOTH,
        },
    ),
    ("pack_nm", _vary_pack, {"dtype": _LOW, "axes": ((True, False), (False, True), (True, True))}),
    (
        "prune_mvue",
        _PRUNE,
        {
            # Tiles that fit and tiles that stand out.
            "shape": ((4096, 4096), (4096, 1000)),
            "axis": (0, 1),
            "dtype": (*_LOW, "float32"),
            "exact": _BOTH,
        },
    ),
    ("transposable_mask", _SEARCH, {"dtype": (*_LOW, "float32")}),
)
