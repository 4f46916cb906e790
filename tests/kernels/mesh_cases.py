"""Ops on eight fake devices against the same calls on one: the program that `test_meshes` starts.

JAX counts its devices once, so these calls need a process of their own. Arguments are names of
calls, or none for all; what is wrong with each goes to standard output as JSON.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from tests.kernels.portable_forms import in_gpu_form

KINDS = ("explicit", "auto", "shard_map")
TRANSFORMS = ("eager", "remat", "vmap", "vmap over examples", "form for a GPU")
IMPLEMENTATIONS = {
    "block_sparse_attention": ("xla", "dense", "reference"),
    "block_sparse_matmul": ("xla", "reference"),
    "nm_matmul": ("xla", "reference"),
    "mean_attention_map": ("xla", "reference"),
    "pack_nm": ("xla",),
    "prune_mvue": ("xla",),
    "transposable_mask": ("xla", "reference"),
}


class Problem(NamedTuple):
    """One call.

    Attributes:
      function: (arrays, implementation) -> pytree of arrays.
      arrays: name -> array.
      specs: name of an array -> how it is sharded; others are on all devices.
      out_spec: the same for all that is returned.
      differentiated: names of arrays whose gradients are compared.
      averages: whether the call averages over what is sharded.
    """

    function: Callable[[Mapping[str, Any], str], Any]
    arrays: Mapping[str, Any]
    specs: Mapping[str, P]
    out_spec: P
    differentiated: tuple[str, ...] = ()
    averages: bool = False


_SHARDED = {
    "batch": P("data"),
    "heads": P(None, None, "model"),
    "both": P("data", None, "model"),
}


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _attend(arrays, implementation, **options):
    kv_mask, segments = arrays.get("kv_mask"), arrays.get("segments")
    return pk.block_sparse_attention(
        *(arrays[name] for name in "qkv"),
        arrays.get("blocks"),
        block_q=4,
        block_kv=8,
        kv_mask=kv_mask,
        segment_ids=segments,
        implementation=implementation,
        **options,
    )


def _make_attention(sharded, mask_shape, key_heads=2, **options):
    spec = _SHARDED[sharded]
    arrays = {
        "q": _normal(0, 4, 16, 4, 8),
        "k": _normal(1, 4, 16, key_heads, 8),
        "v": _normal(2, 4, 16, key_heads, 8),
    }
    specs = dict.fromkeys("qk", spec) | {"v": spec}
    if key_heads == 1:
        specs = {"q": spec}
    if mask_shape:
        arrays["blocks"] = jax.random.bernoulli(jax.random.key(3), 0.6, (*mask_shape, 4, 2))
        sizes = zip(mask_shape, (spec[0], spec[2] if len(spec) > 2 else None), strict=True)
        specs["blocks"] = P(*(name if size > 1 else None for size, name in sizes))
    return Problem(
        functools.partial(_attend, causal=True, **options), arrays, specs, spec, ("q", "k", "v")
    )


def _make_hostile_attention(sharded):
    """Every option at once: removed keys, segments, zeros in the denominator, lse."""
    plain = _make_attention(sharded, (1, 1))
    arrays = dict(plain.arrays)
    arrays["kv_mask"] = jax.random.bernoulli(jax.random.key(4), 0.8, (4, 16))
    arrays["segments"] = jnp.arange(4)[:, None] + jnp.arange(16)[None] // 7
    along = P(plain.out_spec[0])
    return plain._replace(
        function=functools.partial(_attend, pruned_logits="zero", return_lse=True),
        arrays=arrays,
        specs={**plain.specs, "kv_mask": along, "segments": along},
    )


def _multiply_blocks(arrays, implementation):
    return pk.block_sparse_matmul(**arrays, implementation=implementation)


def _make_block_matmul():
    arrays = {
        "x": _normal(0, 4, 6, 16),
        "w": _normal(1, 16, 12),
        "mask": jax.random.bernoulli(jax.random.key(2), 0.5, (4, 3)),
        "bias": _normal(3, 12),
    }
    return Problem(_multiply_blocks, arrays, {"x": P("data")}, P("data"), ("x", "w", "bias"))


def _multiply_nm(arrays, implementation, **options):
    return pk.nm_matmul(**arrays, check_mask=False, implementation=implementation, **options)


def _make_nm_matmul(**options):
    arrays = {
        "x": _normal(0, 4, 6, 16),
        "w": _normal(1, 16, 8),
        "mask": jnp.arange(16)[:, None] % 4 < jnp.full(8, 2),
        "bias": _normal(3, 8),
    }
    if "grad_pruning" in options:
        arrays["key"] = jax.random.key(5)
    return Problem(
        functools.partial(_multiply_nm, activation="geglu", **options),
        arrays,
        {"x": P("data")},
        P("data"),
        ("x", "w", "bias"),
    )


def _make_nm_matmul_with_bits(spec):
    """Parts of four tokens: one group on each device, where tokens are cut."""
    plain = _make_nm_matmul(grad_pruning="mvue")
    arrays = {name: plain.arrays[name] for name in ("w", "mask", "bias")}
    arrays["x"] = _normal(0, 4, 16, 16)
    arrays["bits"] = pk.draw_pruning_bits(plain.arrays["key"], arrays["x"].shape, 8)
    return plain._replace(arrays=arrays, specs={"x": spec, "bits": spec}, out_spec=spec)


def _average_map(arrays, implementation):
    return pk.mean_attention_map(
        arrays["q"], arrays["k"], causal=True, implementation=implementation
    )


def _make_map(sharded):
    plain = _make_attention(sharded, None)
    return plain._replace(function=_average_map, out_spec=P(), differentiated=(), averages=True)


def _make_packing():
    arrays = {
        "w": _normal(0, 4, 64, 64).astype(jnp.bfloat16),
        "mask": jnp.broadcast_to(jnp.arange(64)[:, None] % 4 < 2, (4, 64, 64)),
    }
    return Problem(
        lambda arrays, implementation: pk.pack_nm(**arrays, implementation=implementation),
        arrays,
        dict.fromkeys(arrays, P("data")),
        P("data"),
    )


def _make_pruning():
    return Problem(
        lambda arrays, implementation: pk.prune_mvue(
            **arrays, axis=1, implementation=implementation
        ),
        {"x": _normal(0, 4, 8, 6), "key": jax.random.key(1)},
        {"x": P("data")},
        P("data"),
    )


def _make_transposable(spec):
    return Problem(
        lambda arrays, implementation: pk.transposable_mask(
            **arrays, implementation=implementation
        ),
        {"w": _normal(0, 4, 16, 8)},
        {"w": spec},
        spec,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "block_sparse_attention batch": lambda: _make_attention("batch", (1, 4)),
    "block_sparse_attention heads": lambda: _make_attention("heads", (1, 4)),
    "block_sparse_attention batch, mask of each example": lambda: _make_attention("batch", (4, 1)),
    "block_sparse_attention both": lambda: _make_attention("both", (4, 4)),
    "block_sparse_attention heads, one key head": lambda: _make_attention(
        "heads", (1, 1), key_heads=1
    ),
    "block_sparse_attention batch, no mask": lambda: _make_attention("batch", None),
    "block_sparse_attention batch, all options": lambda: _make_hostile_attention("batch"),
    "block_sparse_attention heads, all options": lambda: _make_hostile_attention("heads"),
    "block_sparse_matmul batch": _make_block_matmul,
    "nm_matmul batch": _make_nm_matmul,
    "nm_matmul batch, pruned": lambda: _make_nm_matmul(grad_pruning="mvue"),
    "nm_matmul bits of the batch": lambda: _make_nm_matmul_with_bits(P("data")),
    "nm_matmul bits of tokens": lambda: _make_nm_matmul_with_bits(P(None, "data")),
    "mean_attention_map batch": lambda: _make_map("batch"),
    "mean_attention_map heads": lambda: _make_map("heads"),
    "pack_nm layers": _make_packing,
    "prune_mvue batch": _make_pruning,
    "transposable_mask layers": lambda: _make_transposable(P("data")),
    "transposable_mask rows": lambda: _make_transposable(P(None, "data")),
}


def list_calls() -> list[tuple[str, str, str]]:
    """List (problem, implementation, kind), the kind with a transform behind a plus."""
    transformed = [
        (problem, "xla", f"{kind}+{transform}")
        for problem in (
            "block_sparse_attention both",
            "block_sparse_matmul batch",
            "nm_matmul batch",
            "nm_matmul batch, pruned",
            "nm_matmul bits of tokens",
        )
        for transform in TRANSFORMS
        for kind in (("explicit", "shard_map") if transform == "form for a GPU" else KINDS[:1])
        if not ("examples" in transform and problem.endswith(("both", "pruned", "tokens")))
        and not (kind == "shard_map" and "pruned" in problem)
    ]
    return transformed + [
        (problem, implementation, kind)
        for problem in PROBLEMS
        for implementation in IMPLEMENTATIONS[problem.split()[0]]
        for kind in KINDS
        # Every device draws what the key says: not what one device would draw for all.
        if not (kind == "shard_map" and ("pruned" in problem or "prune_mvue" in problem))
    ]


def _weigh(out):
    """A loss that no permutation of the results leaves alone."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    # The log-sum-exp of a row that counts nothing is -inf.
    return sum(jnp.sum(jnp.where(x > -jnp.inf, jnp.sin(x), 0)) for x in leaves)


def _compute(problem, function):
    """Return a function of all arrays: what is returned, and gradients."""

    def compute(arrays):
        chosen = {name: arrays[name] for name in problem.differentiated}

        def loss(chosen):
            out = function({**arrays, **chosen})
            return (_weigh(out) if chosen else 0.0), out

        if not chosen:
            return function(arrays), {}
        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(chosen)
        return out, gradients

    return compute


def check_call(name: str, implementation: str, kind: str) -> str:
    """Compare a call on eight devices with the same on one.

    Returns:
      what is wrong, "" if nothing is.
    """
    problem = PROBLEMS[name]()
    kind, _, transform = kind.partition("+")
    function = functools.partial(problem.function, implementation=implementation)
    function = transform_call(function, transform)
    expected = jax.jit(_compute(problem, function))(problem.arrays)
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    specs = {name: problem.specs.get(name, P()) for name in problem.arrays}
    if kind == "shard_map":

        def run_part(arrays):
            out = transform_call(problem.function, transform)(arrays, implementation=implementation)
            names = {name for spec in problem.specs.values() for name in spec if name}
            return jax.lax.pmean(out, tuple(names)) if problem.averages else out

        function = jax.shard_map(run_part, mesh=mesh, in_specs=(specs,), out_specs=problem.out_spec)
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in problem.arrays.items()
    }
    run = jax.jit(_compute(problem, function))
    with jax.set_mesh(mesh):
        compiled = run.lower(placed).compile()
        found = _compute(problem, function)(placed) if transform == "eager" else compiled(placed)
    faults = []
    for path, one in jax.tree_util.tree_leaves_with_path(expected):
        many = functools.reduce(lambda tree, key: _step(tree, key), path, found)
        if one.dtype == jnp.bfloat16:
            one, many = one.astype(jnp.float32), many.astype(jnp.float32)
        # A row that counts nothing has log-sum-exp -inf.
        size = float(jnp.max(jnp.abs(jnp.where(one > -jnp.inf, one, 0))))
        if not np.allclose(one, many, rtol=0, atol=1e-5 * size):
            faults.append(f"{jax.tree_util.keystr(path)} differs")
    # XLA sees nothing but indices where the lists of all heads are one.
    partitioned = kind == "auto" and not name.endswith(("batch", "layers"))
    if "all-gather" in compiled.as_text() and not partitioned and "pruned" not in name:
        faults.append("gathers")
    return "; ".join(faults)


def transform_call(function: Callable[..., Any], transform: str) -> Callable[..., Any]:
    """Return a call under a transform of JAX, or in the form for a GPU.

    Args:
      function: (arrays, ...) -> pytree of arrays.
      transform: of TRANSFORMS, or "".
    """
    if transform == "remat":
        return jax.checkpoint(function)
    if transform == "vmap":

        def call_twice(arrays, **options):
            def call(scale):
                return function({**arrays, **{n: arrays[n] * scale for n in scaled}}, **options)

            scaled = [name for name in "qx" if name in arrays]
            return jax.vmap(call)(jnp.array([1.0, 0.5]))

        return call_twice
    if transform == "vmap over examples":
        return lambda arrays, **options: jax.vmap(
            lambda x: function({**arrays, "x": x}, **options)
        )(arrays["x"])
    return in_gpu_form(function) if transform == "form for a GPU" else function


def _step(tree, key):
    match key:
        case jax.tree_util.SequenceKey(idx=index):
            return tree[index]
        case jax.tree_util.DictKey(key=name):
            return tree[name]
        case _:
            return getattr(tree, key.name)


def main(wanted: list[str]) -> None:
    """Print what is wrong with calls.

    Args:
      wanted: "problem/implementation/kind"; none: all.
    """
    faults = {}
    for call in list_calls():
        name = "/".join(call)
        if wanted and name not in wanted:
            continue
        try:
            faults[name] = check_call(*call)
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {str(error)[:500]}"
    print(json.dumps(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
