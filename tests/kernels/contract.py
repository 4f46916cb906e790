"""What every implementation of block-sparse attention must do, stated once.

A case fixes shapes and static options; each of its masks goes through one compiled program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_attention, make_block_schedule
from pallas_kernels.doctor.oracles import (
    error,
    make_masks,
    make_normal,
    plain_attention,
    value_and_gradients,
)

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and static options of one compiled program."""

    batch: int = 2
    head_dim: int = 8
    num_queries: int = 96
    num_keys: int = 96
    num_heads: int = 4
    num_kv_heads: int = 4
    block_q: int = 16
    block_kv: int = 16
    mask_batch: int = 1
    mask_heads: int = 1
    causal: bool = False
    has_kv_mask: bool = False
    has_segments: bool = False
    scale: float | None = None
    pruned_logits: str = "masked"
    dtype: str = "float32"
    mask_names: tuple[str, ...] | None = None  # None is all of them

    @property
    def options(self):
        names = ("block_q", "block_kv", "causal", "scale", "pruned_logits")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def shapes(self):
        kv = (self.batch, self.num_keys, self.num_kv_heads, self.head_dim)
        return ((self.batch, self.num_queries, self.num_heads, self.head_dim), kv, kv)

    def masks(self):
        grid = (self.num_queries // self.block_q, self.num_keys // self.block_kv)
        masks = make_masks((self.mask_batch, self.mask_heads, *grid))
        return masks if self.mask_names is None else {n: masks[n] for n in self.mask_names}

    def inputs(self):
        return make_normal(self.shapes, self.dtype)

    def cotangents(self):
        return make_normal((self.shapes[0], self.shapes[0][:3]), seed=1)

    def position_masks(self):
        rng = np.random.default_rng(2)
        kv_mask = rng.random((self.batch, self.num_keys)) < 0.7
        # The last example loses the keys of whole blocks, so that kept blocks may be empty.
        kv_mask[-1, : 2 * self.block_kv] = False
        segments = np.sort(rng.integers(0, 4, (self.batch, self.num_queries)), axis=1)[:, ::-1]
        return {
            "kv_mask": jnp.asarray(kv_mask) if self.has_kv_mask else None,
            "segment_ids": jnp.asarray(segments.copy()) if self.has_segments else None,
        }


CASES = {
    "plain": Case(),
    "causal_zero_heads": Case(causal=True, pruned_logits="zero", mask_heads=4, block_kv=32),
    "grouped_key_mask_batch": Case(
        num_kv_heads=2, has_kv_mask=True, mask_batch=2, num_keys=64, block_q=32, scale=0.5
    ),
    "grouped_causal_segments_zero": Case(
        num_kv_heads=2, causal=True, has_segments=True, pruned_logits="zero", block_q=8
    ),
    "grouped_key_mask_segments_zero_all": Case(
        num_kv_heads=2,
        mask_batch=2,
        mask_heads=4,
        has_kv_mask=True,
        has_segments=True,
        pruned_logits="zero",
    ),
    "causal_key_mask_long_keys": Case(causal=True, has_kv_mask=True, num_queries=64, block_kv=32),
    "bf16_causal": Case(dtype="bfloat16", causal=True),
    "bf16_zero": Case(dtype="bfloat16", pruned_logits="zero", num_kv_heads=2),
    "bf16_grouped_key_mask_segments": Case(
        dtype="bfloat16", num_kv_heads=2, has_kv_mask=True, has_segments=True, mask_heads=4
    ),
    "f16_key_mask": Case(dtype="float16", has_kv_mask=True),
}


def call_implementation(implementation):
    """Return attention(q, k, v, mask, **options) -> (out, lse) for a named implementation."""
    return functools.partial(block_sparse_attention, return_lse=True, implementation=implementation)


def with_untransposed_lists(attention):
    """Break an attention: keys read the lists of queries."""

    def broken(q, k, v, mask, **options):
        schedule = make_block_schedule(mask)
        lists = {"q_counts": schedule.kv_counts, "q_indices": schedule.kv_indices}
        return attention(q, k, v, dataclasses.replace(schedule, **lists), **options)

    return broken


def with_a_block_dropped(attention):
    """Break an attention: queries do not see the last block of their lists."""

    def broken(q, k, v, mask, **options):
        schedule = make_block_schedule(mask)
        counts = jnp.maximum(schedule.kv_counts - 1, 0)
        return attention(q, k, v, dataclasses.replace(schedule, kv_counts=counts), **options)

    return broken


def compile_case(case, attention, *, optimise=True):
    """Return a jitted function of (inputs, mask) -> out, lse, dq, dk, dv.

    What is under test is compiled as for a user, the rest without optimisation, in half the time.
    """
    options = case.options | case.position_masks()
    level = 3 if optimise else 0

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": level})
    def run(inputs, mask):
        # GPUs would otherwise round f32 operands to TF32.
        with jax.default_matmul_precision("highest"):
            return value_and_gradients(
                lambda q, k, v: attention(q, k, v, mask, **options), inputs, case.cotangents()
            )

    return run


@functools.cache
def expected_results(case):
    """Return mask name -> (f32 oracle, error of the bf16 baseline), each by result name.

    Nothing is allowed for an f32 case, whose baseline is not run.
    """

    def baseline(q, k, v, mask, *, pruned_logits, scale, **options):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return plain_attention(q, k, v, mask, scale=scale, zero=pruned_logits == "zero", **options)

    oracle = compile_case(case, call_implementation("reference"), optimise=False)
    low_precision = compile_case(case, baseline, optimise=False)
    # Both see the values that the dtype of the case can hold: only arithmetic is compared.
    inputs = tuple(x.astype(jnp.float32) for x in case.inputs())
    low_inputs = tuple(x.astype(jnp.bfloat16) for x in inputs)
    results = {}
    for name, mask in case.masks().items():
        exact = dict(zip(NAMES, oracle(inputs, mask), strict=True))
        allowed = dict.fromkeys(NAMES, 0.0)
        if case.dtype != "float32":
            rough = dict(zip(NAMES, low_precision(low_inputs, mask), strict=True))
            allowed = {n: error(rough[n], exact[n]) for n in NAMES}
        results[name] = exact, allowed
    return results


def has_select(run, *args, shape):
    """Whether a jitted function chooses between arrays of a shape, element by element."""
    return f"[{','.join(map(str, shape))}] = select_n" in str(run.trace(*args).jaxpr)


def poison_removed_keys(case, inputs):
    """Put NaN where a key and its value are removed, which nothing may depend on."""
    if not case.has_kv_mask:
        return inputs
    q, *kv = inputs
    removed = ~case.position_masks()["kv_mask"][:, :, None, None]
    return (q, *(jnp.where(removed, jnp.nan, x) for x in kv))


def check_case(case, attention, *, optimise=True):
    """Assert that an implementation meets the error bounds on every mask of a case.

    It is given NaN for removed keys, and the oracle numbers.
    """
    traces = []

    def count_traces(*args, **options):
        traces.append(args)
        return attention(*args, **options)

    run = compile_case(case, count_traces, optimise=optimise)
    inputs = poison_removed_keys(case, case.inputs())
    for mask_name, (exact, baseline_error) in expected_results(case).items():
        actual = dict(zip(NAMES, run(inputs, case.masks()[mask_name]), strict=True))
        for name in NAMES:
            factor = 2 if name in ("out", "lse") else 3
            bound = factor * baseline_error[name] + 1e-5
            got = error(actual[name], exact[name])
            assert got <= bound, f"{case}, mask {mask_name}: {name} off by {got}, bound {bound}"
    assert len(traces) == 1, "a new mask compiled a new program"
