"""The Triton kernels of the mean map: interpreted, or on a GPU if there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention_map import triton as package
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.attention_map.triton import mean_map
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.doctor.child import prove, shrink
from pallas_kernels.doctor.examine import judge
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.oracles import error, make_normal
from pallas_kernels.doctor.report import describe_outcome
from pallas_kernels.doctor.trials import Trial
from pallas_kernels.tables import TABLES
from tests.kernels.broken_triton import break_kernel
from tests.kernels.map_contract import BROKEN, Case, check, make_map
from tests.kernels.triton_interpreter import triton_kernels
from tests.tiers import tier

_average = make_map("triton")

# Tiles of f32 have 64 queries and 32 keys: three by three, all but the first cut or crossed.
_CUT = Case(
    batch=2, heads=(4, 2), lengths=(130, 70), head_dim=16, dtype="float32", causal=True,
    has_kv_mask=True, own_lse=True,
)  # fmt: skip
_change = functools.partial(dataclasses.replace, _CUT)

CASES = {
    "cut_f32": _CUT,
    "cut_given_lse": _change(own_lse=False),
    "no_mask_bf16": _change(has_kv_mask=False, causal=False, dtype="bfloat16"),
    "causal_f16": _change(has_kv_mask=False, dtype="float16", heads=(3, 3)),
    "key_mask": _change(causal=False, batch=3, heads=(1, 1)),
    "whole_tiles_causal_bf16": Case(lengths=(256, 128), causal=True, own_lse=True, heads=(2, 1)),
    "more_keys_than_queries": _change(lengths=(20, 200), dtype="bfloat16"),
    "padded_head": _change(head_dim=48, lengths=(64, 33)),
    "padded_wide_head_bf16": _change(head_dim=80, dtype="bfloat16", batch=1),
    "widest_head_bf16": _change(head_dim=256, dtype="bfloat16", heads=(2, 1), batch=1),
    "widest_head_f32": _change(head_dim=256, lengths=(33, 40), heads=(2, 1), batch=1),
    # What lies above the diagonal is exp of hundreds before it is dropped.
    "loud_causal": Case(lengths=(64, 64), causal=True, loudness=100.0),
    "one_position": _change(lengths=(1, 1), batch=1, has_kv_mask=False),
}


@pytest.mark.parametrize(
    "case",
    tier(
        CASES,
        fast=["cut_f32"],
        slow=[
            "key_mask",
            "more_keys_than_queries",
            "padded_wide_head_bf16",
            "widest_head_bf16",
            "causal_f16",
            "padded_head",
            "no_mask_bf16",
        ],
    ),
)
def test_contract(case):
    with triton_kernels():
        check(case, _average)


@pytest.mark.ci
@pytest.mark.parametrize("capability", [(8, 6), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_contract_with_tiles_of_other_devices(capability, head_dim):
    with triton_kernels(capability):
        check(_change(head_dim=head_dim, batch=1, dtype="bfloat16"), _average)


@pytest.mark.ci
@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_mean_is_noticed(broken):
    with pytest.raises(AssertionError, match="off by"), triton_kernels():
        check(_change(own_lse=False), functools.partial(broken, _average))


_OFF, _RACE, _BOUNDS = "off by", "race: ", "outside of every array"

# Name -> what stands in the kernels, what is put in its place, who notices.
_BROKEN_KERNELS = {
    "last head dropped": ("range(first, last)", "range(first, last - 1)", _OFF),
    "wrong key head": (
        "+ (b * S + key) * (K * H) + (n // (N // K)) * H", "+ (b * S + key) * (K * H) + n % K * H",
        _OFF,
    ),
    "wrong key head of lse": (
        "k_at = k + b * S * K * H + (n // (N // K)) * H", "k_at = k + b * S * K * H + n % K * H",
        _OFF,
    ),
    "no mask on the diagonal": (
        "acc = tl.where(rows[:, None] >= keys[None, :], acc, 0.0)", "acc = acc", _OFF
    ),
    "no mask on the diagonal of lse": (
        "seen & (rows[:, None] >= keys[None, :])", "seen", _OFF
    ),
    "tiles on the diagonal are zeros": ("query + BQ > key", "query > key", _OFF),
    "key mask ignored": ("tl.where((present != 0)[None, :], p, 0.0)", "p", _OFF),
    "key mask of lse ignored": ("seen & (present != 0)[None, :]", "seen", _OFF),
    "keys behind the edge counted": (
        "seen = keys[None, :] < S", "seen = keys[None, :] < S + BK", _OFF
    ),
    "edge not masked": (
        "tl.store(at, acc * SHARE, mask=inside)", "tl.store(at, acc * SHARE)", f"{_RACE}|{_BOUNDS}"
    ),
    "rows behind the edge read": ("inside = row < count", "inside = row < count + ROWS", _BOUNDS),
    "two programs on one tile": ("in_group // tall * BK", "in_group // tall // 2 * BK", _RACE),
    "every part adds all heads": ("first = part * (B * N) // PARTS", "first = part * 0", _OFF),
    "a tile is left out": ("range(num_clear, count)", "range(num_clear, count - 1)", _OFF),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU does not check memory")
@pytest.mark.parametrize("name", _BROKEN_KERNELS)
def test_broken_kernels_are_rejected(name, monkeypatch, tmp_path):
    old, new, message = _BROKEN_KERNELS[name]
    break_kernel(monkeypatch, tmp_path, package, "kernels", old, new)
    # One tile leaves one of two processors without work: its heads are divided.
    cases = {
        "every part adds all heads": _change(lengths=(60, 30)),
        "keys behind the edge counted": _change(causal=False, has_kv_mask=False),
    }
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed, triton_kernels():
        check(cases.get(name, _CUT), _average)


def _options(case):
    return {"causal": case.causal, "kv_mask_BS": case.kv_mask()}


@pytest.mark.ci
def test_repeat_is_bit_equal_and_lse_of_minus_infinity_adds_nothing():
    case = _change(own_lse=False)
    q, k, lse = case.inputs()
    nothing = lse.at[:, 5].set(-jnp.inf)
    run = jax.jit(functools.partial(_average, **_options(case)))
    with triton_kernels():
        first, second, emptied = (run(q, k, lse=x) for x in (lse, lse, nothing))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(emptied, first.at[5].set(0.0))


_AXES = {"both": (0, 0), "queries": (0, None), "keys": (None, 0)}


@pytest.mark.parametrize("axes", tier(_AXES, fast=(), slow=["both", "keys"]))
@pytest.mark.parametrize("own_lse", [True, False])
def test_vmap_is_one_launch_and_equals_a_loop(axes, own_lse):
    shapes = [
        shape if axis is None else (2, 3, *shape)
        for axis, shape in zip(axes, ((2, 40, 4, 16), (2, 40, 2, 16)), strict=True)
    ]
    q, k = make_normal(shapes)
    lse = None if own_lse else jnp.ones((2, 40, 4))
    average = functools.partial(_average, lse=lse, causal=True)

    def loop(q, k):
        q, k = (jnp.broadcast_to(x, (2, 3, *x.shape[-4:])) for x in (q, k))
        rows = [[average(q[i, j], k[i, j]) for j in range(3)] for i in range(2)]
        return jnp.stack([jnp.stack(row) for row in rows])

    together = jax.vmap(jax.vmap(average, in_axes=axes), in_axes=axes)
    with triton_kernels():
        assert str(jax.make_jaxpr(together)(q, k)).count("pure_callback[") == 1 + own_lse
        got, expected = jax.jit(together)(q, k), loop(q, k)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.ci
def test_scan():
    q, k = make_normal(((3, 1, 40, 2, 16), (1, 40, 2, 16)))

    def add(total, q):
        return total + _average(q, k, causal=True), None

    with triton_kernels():
        got, _ = jax.jit(lambda q: jax.lax.scan(add, jnp.zeros((40, 40)), q))(q)
    expected = sum(make_map("reference")(x, k, causal=True) for x in q)
    assert error(got, expected) < 1e-6


@st.composite
def _cases(draw):
    kv_heads = draw(st.integers(1, 2))
    return Case(
        batch=draw(st.integers(1, 2)), heads=(kv_heads * draw(st.integers(1, 3)), kv_heads),
        lengths=(draw(st.integers(1, 200)), draw(st.integers(1, 200))),
        head_dim=draw(st.integers(16, 70)), dtype="float32", causal=draw(st.booleans()),
        has_kv_mask=draw(st.booleans()), own_lse=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=_cases())
def test_any_shape_agrees_with_the_reference(case):
    q, k, lse = case.inputs()
    with triton_kernels():
        got = jax.jit(functools.partial(_average, **_options(case)))(q, k, lse=lse)
    exact = make_map("reference")(q, k, lse=lse, **_options(case))
    assert error(got, exact) < 1e-5, case


_FACTS = MapFacts(num_queries=1000, num_keys=512, head_dim=64, dtype="bfloat16", causal=True)
_REFUSED = [
    ({"head_dim": 8}, "head dims from 16 to 256, got H=8"),
    ({"head_dim": 272}, "head dims from 16 to 256, got H=272"),
    ({"dtype": "float64"}, r"take \('bfloat16', 'float16', 'float32'\), got float64"),
]


@pytest.mark.parametrize(("change", "message"), _REFUSED)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(change, message):
    facts = dataclasses.replace(_FACTS, **change)
    with triton_kernels():
        assert package.tile(facts) == ""
        with pytest.raises(NotImplementedError, match=message) as refusal:
            package.check(facts)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may be there")
def test_without_a_gpu_the_kernels_are_refused():
    q = jnp.ones((1, 16, 1, 16))
    with pytest.raises(NotImplementedError, match="^implementation='triton' needs an NVIDIA GPU"):
        _average(q, q)


def test_heads_are_divided_until_every_processor_has_work(monkeypatch):
    parts = []
    monkeypatch.setattr(mean_map, "check_device", lambda: (9, 0))
    for processors, length in ((132, 256), (132, 1000), (132, 4096), (8, 512), (8, 300)):
        facts = dataclasses.replace(_FACTS, num_queries=length, num_keys=length)
        with jax.sharding.use_abstract_mesh(make_abstract_gpu("NVIDIA H200", processors)):
            parts.append(mean_map.make_problem(facts).parts)
    # 4, 64, 1024, 16 and 9 tiles; two programs a processor and eight parts are the most.
    assert parts == [8, 4, 1, 1, 1]


def test_a_tile_names_what_is_compiled_and_sizes_shrink_without_changing_it():
    (backend,) = (row for row in TABLES["mean_attention_map"] if row.name == "triton")
    with triton_kernels():
        assert package.tile(dataclasses.replace(_FACTS, has_lse=True)) == (
            "mean 128x128 8 warps 3 stages 1 parts, T is cut"
        )
        assert package.tile(_FACTS) == (
            "mean 128x128 8 warps 3 stages 1 parts, lse 128x64 8 warps 3 stages, T is cut, "
            "T of lse is cut"
        )
        large = dataclasses.replace(_FACTS, num_queries=16500, num_keys=8192)
        smallest = shrink(Trial("mean_attention_map", "triton", large), backend)
        assert smallest == dataclasses.replace(large, num_queries=628, num_keys=512)
        assert package.tile(smallest) == package.tile(large)
    sizes = [facts.sizes for facts in MAKERS["mean_attention_map"].shrink(large)]
    assert sizes == [(628, 512), (1140, 1024), (2164, 2048), (16500, 8192)]


@pytest.mark.ci
def test_the_doctor_proves_lengths_inside_a_tile():
    facts = dataclasses.replace(_FACTS, num_queries=130, num_keys=72, head_dim=16, has_kv_mask=True)
    trial, tiles = Trial("mean_attention_map", "triton", facts), []
    with triton_kernels():
        answer = prove(trial, tiles.append)
    assert describe_outcome(judge(trial, answer | {"tile": tiles[0]})) == "right"
