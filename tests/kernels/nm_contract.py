"""What every implementation of `nm_matmul` must do, stated once.

A case fixes shapes and static options; each of its masks goes through one compiled program. Results
are compared with the reference in f32, and a second program shows the pruned gradient by itself.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import draw_pruning_bits, nm_matmul, prune_mvue
from pallas_kernels.doctor.oracles import error, make_nm_masks, make_normal, plain_nm_matmul

NAMES = ("y", "dx", "dw", "dbias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMCase:
    """Shapes and static options of one compiled program."""

    leading: tuple[int, ...] = (24,)
    inner: int = 32
    columns: int = 24
    has_bias: bool = False
    activation: str | None = None
    transposable: bool = False
    grad_pruning: str = "none"
    pattern: tuple[int, int] = (2, 4)
    dtype: str = "float32"
    mask_names: tuple[str, ...] = ("whole", "underfull", "empty")

    @property
    def options(self):
        names = ("activation", "transposable", "grad_pruning", "pattern")
        return {name: getattr(self, name) for name in names}

    @property
    def key(self):
        return None if self.grad_pruning == "none" else jax.random.key(7)

    @property
    def out_columns(self):
        return self.columns // 2 if self.activation in ("geglu", "swiglu") else self.columns

    def masks(self):
        masks = make_nm_masks(
            (self.inner, self.columns), self.pattern, transposable=self.transposable
        )
        return {name: jnp.asarray(masks[name]) for name in self.mask_names}

    def inputs(self):
        """Return x, w and bias, typed as the case says."""
        x, w, bias = make_normal(
            ((*self.leading, self.inner), (self.inner, self.columns), (self.columns,))
        )
        w = w * math.sqrt(2 / self.inner)
        return tuple(a.astype(self.dtype) for a in (x, w, bias))

    def cotangent(self):
        """Return dy in bf16, so that every dtype sees the same values."""
        (dy,) = make_normal(((*self.leading, self.out_columns),), jnp.bfloat16, seed=1)
        return dy


# Every option meets another one; rows are not whole groups, tiles or both in most cases.
NM_CASES = {
    "plain": NMCase(),
    "batch_dims_bias": NMCase(leading=(2, 3, 5), has_bias=True),
    "transposable": NMCase(transposable=True, has_bias=True, activation="gelu"),
    "geglu": NMCase(activation="geglu", has_bias=True, leading=(3, 7)),
    "swiglu": NMCase(activation="swiglu"),
    "one_of_four": NMCase(pattern=(1, 4), activation="gelu"),
    "two_of_eight": NMCase(pattern=(2, 8), transposable=True),
    "mvue": NMCase(grad_pruning="mvue", has_bias=True, leading=(30,)),
    "mvue_exact": NMCase(grad_pruning="mvue_exact", transposable=True, leading=(2, 11)),
    "bf16": NMCase(dtype="bfloat16", has_bias=True),
    "bf16_geglu": NMCase(dtype="bfloat16", activation="geglu", transposable=True),
    "bf16_swiglu": NMCase(dtype="bfloat16", activation="swiglu", has_bias=True, leading=(2, 9)),
    "bf16_mvue": NMCase(dtype="bfloat16", grad_pruning="mvue", transposable=True, leading=(26,)),
    "f16_gelu": NMCase(dtype="float16", activation="gelu", has_bias=True),
    "f16_mvue_exact": NMCase(dtype="float16", grad_pruning="mvue_exact", leading=(2, 15)),
}

# What the Hopper kernels take: 16 bits, 2:4, whole tiles of weights, any number of rows.
_SMALL = {"inner": 128, "columns": 128, "mask_names": ("whole", "underfull")}
NM_KERNEL_CASES = {
    "bf16": NMCase(leading=(64,), dtype="bfloat16", **_SMALL),
    "bf16_transposable_bias": NMCase(
        leading=(2, 50), dtype="bfloat16", transposable=True, has_bias=True, **_SMALL
    ),
    "bf16_geglu": NMCase(
        leading=(192,), dtype="bfloat16", activation="geglu", transposable=True, **_SMALL
    ),
    "bf16_swiglu_bias": NMCase(
        leading=(65,), dtype="bfloat16", activation="swiglu", has_bias=True, **_SMALL
    ),
    "f16_gelu_bias": NMCase(
        leading=(3, 33), dtype="float16", activation="gelu", has_bias=True, **_SMALL
    ),
    "bf16_mvue": NMCase(
        leading=(128,), dtype="bfloat16", grad_pruning="mvue", transposable=True, **_SMALL
    ),
    "bf16_mvue_odd_rows": NMCase(
        leading=(2, 45), dtype="bfloat16", grad_pruning="mvue", has_bias=True, **_SMALL
    ),
    "f16_mvue_exact_swiglu": NMCase(
        leading=(64,),
        dtype="float16",
        grad_pruning="mvue_exact",
        activation="swiglu",
        transposable=True,
        **_SMALL,
    ),
}


def call_nm(implementation):
    """Return nm_matmul of a named implementation, or the function that was given."""
    if callable(implementation):
        return implementation
    return functools.partial(nm_matmul, implementation=implementation)


def compile_nm_case(case, matmul, *, optimise=True):
    """Return a jitted function of (x, w, bias, mask) -> y, dx, dw, dbias.

    What is under test is compiled as for a user, the rest without optimisation, in half the time.
    """
    level = 3 if optimise else 0

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": level})
    def run(x, w, bias, mask):
        def apply(x, w, bias):
            bias = bias if case.has_bias else None
            return matmul(x, w, mask, bias=bias, key=case.key, **case.options)

        # GPUs would otherwise round f32 operands to TF32.
        with jax.default_matmul_precision("highest"):
            y, back = jax.vjp(apply, x, w, bias)
            return y, *back(case.cotangent().astype(y.dtype))

    return run


def comparable(case):
    """Return the names of results that depend on no random draw near a threshold.

    Behind an activation dz differs in its last bits between implementations, and a draw may then
    fall on another pair; `check_pruned_gradient` compares such dw.
    """
    hidden = case.grad_pruning != "none" and case.activation is not None
    return tuple(name for name in NAMES if not (hidden and name == "dw"))


@functools.cache
def expected_nm_results(case):
    """Return mask name -> (f32 oracle, error of the bf16 baseline), each by result name.

    Nothing is allowed for an f32 case, whose baseline is not run.
    """
    oracle = compile_nm_case(case, call_nm("reference"), optimise=False)
    # Both see the values that the dtype of the case can hold: only arithmetic is compared.
    inputs = tuple(a.astype(jnp.float32) for a in case.inputs())

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def baseline(x, w, bias, mask):
        x, w, bias = (a.astype(jnp.bfloat16) for a in (x, w, bias))
        options = {"activation": case.activation, "grad_pruning": case.grad_pruning}
        bias = bias if case.has_bias else None
        return plain_nm_matmul(x, w, mask, bias, case.cotangent(), case.key, **options)

    results = {}
    for name, mask in case.masks().items():
        exact = dict(zip(NAMES, oracle(*inputs, mask), strict=True))
        allowed = dict.fromkeys(NAMES, 0.0)
        if case.dtype != "float32":
            rough = dict(zip(NAMES, baseline(*inputs, mask), strict=True))
            rough |= {} if case.has_bias else {"dbias": exact["dbias"]}
            allowed = {n: error(rough[n], exact[n]) for n in NAMES}
        results[name] = exact, allowed
    return results


def check_nm_case(case, implementation, *, optimise=True):
    """Assert that an implementation, named or given, meets the error bounds on every mask.

    It is given NaN for pruned weights, and the oracle numbers.
    """
    traces = []
    matmul = call_nm(implementation)

    def count_traces(*args, **options):
        traces.append(args)
        return matmul(*args, **options)

    run = compile_nm_case(case, count_traces, optimise=optimise)
    x, w, bias = case.inputs()
    for mask_name, (exact, baseline_error) in expected_nm_results(case).items():
        mask = case.masks()[mask_name]
        kept = jnp.where(mask, w, jnp.nan)
        actual = dict(zip(NAMES, run(x, kept, bias, mask), strict=True))
        for name in comparable(case):
            assert actual[name].shape == exact[name].shape, f"{case}: shape of {name}"
            assert actual[name].dtype == jnp.dtype(case.dtype), f"{case}: dtype of {name}"
            rounding = 2e-6 * (1 + float(jnp.abs(exact[name]).max()))
            bound = rounding + (2 if name == "y" else 3) * baseline_error[name]
            got = error(actual[name], exact[name])
            assert got <= bound, f"{case}, mask {mask_name}: {name} off by {got}, bound {bound}"
    assert len(traces) == 1, "a new mask compiled a new program"


def check_pruned_gradient(case, implementation, *, optimise=True):
    """Assert that dw is made from exactly two of four tokens of this implementation's own dz.

    With the identity as x, dw = x^T dz is dz itself, rounded as the implementation rounds it. So
    whatever the activation and the dtype, dw of the pruning call must equal `prune_mvue` of dw
    of the plain call to the last bit.
    """
    rows = math.prod(case.leading)
    assert rows <= case.inner, "the identity needs as many columns as there are tokens"
    _, w, bias = case.inputs()
    x = jnp.eye(rows, case.inner, dtype=case.dtype).reshape(*case.leading, case.inner)
    mask = case.masks()["whole"]
    plain = dataclasses.replace(case, grad_pruning="none")
    dz, pruned = (
        compile_nm_case(c, call_nm(implementation), optimise=optimise)(x, w, bias, mask)[2]
        for c in (plain, case)
    )
    padded = rows + -rows % 4
    assert not dz[rows:].any() and not pruned[rows:].any(), f"{case}: dw of absent tokens"
    dz = jnp.zeros((padded, case.columns), dz.dtype).at[:rows].set(dz[:rows])
    exact = case.grad_pruning == "mvue_exact"
    prune = jax.jit(functools.partial(prune_mvue, axis=0, exact=exact))
    expected, _ = prune(dz, case.key)
    off = error(pruned[:rows], expected[:rows])
    assert off == 0, f"{case}: pruned gradient off by {off}"


def check_bits_of_a_key(case, implementation):
    """Assert that results and gradients by bits are those by their key, to the bit."""
    matmul = call_nm(implementation)

    def multiply_by_bits(x, w, mask, *, key, **options):
        return matmul(x, w, mask, bits=draw_pruning_bits(key, x.shape, w.shape[1]), **options)

    arguments = *case.inputs(), case.masks()["whole"]
    by_key, by_bits = (
        compile_nm_case(case, function, optimise=False)(*arguments)
        for function in (matmul, multiply_by_bits)
    )
    for name, expected, actual in zip(NAMES, by_key, by_bits, strict=True):
        off = error(actual, expected)
        assert off == 0, f"{case}: {name} by bits off by {off}"
