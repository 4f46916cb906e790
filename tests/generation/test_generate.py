"""Prompts are continued as if the whole text were read anew for each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.data import Tokenizer
from sparsejax.data.tokenizer import byte_tokenizer, value_tokenizer
from sparsejax.generation import generate, loop
from sparsejax.models import Transformer
from tests.generation.models import LENGTH, make_model
from tests.small_models import VOCAB, make_config

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]
NUM_NEW = 20


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens).logits


def _continue(model, prompt, number):
    """Read the whole text anew for each token, which is the likeliest."""
    ids, (graphdef, state) = list(prompt), nnx.split(model)
    for _ in range(number):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        logits = _forward(graphdef, state, jnp.asarray(tokens))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "attention",
    ["zero", pytest.param("masked", marks=pytest.mark.ci)],
)
def test_the_likeliest_continuation_is_that_of_reading_the_whole_text_each_time(attention):
    model = make_model(attention)
    found = generate(model, PROMPTS, max_new_tokens=NUM_NEW, temperature=0)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert new.tolist() == _continue(model, prompt, NUM_NEW)
    assert len({tuple(new) for new in found}) == 3, "a mix-up would not be seen"


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param("dense", marks=pytest.mark.ci),
        pytest.param("chosen", marks=pytest.mark.ci),
        pytest.param("positions", marks=pytest.mark.slow),
    ],
)
def test_logits_of_single_tokens_are_those_of_the_whole_text(attention):
    model = make_model(attention)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))
    lengths, number = np.array([13, 21]), 30

    @functools.partial(jax.jit, static_argnums=0)
    def read(graphdef, state, tokens, positions):
        model = nnx.merge(graphdef, state)
        x, cache = model.prefill(tokens[:, :24], cache_length=56)

        def step(cache, positions):
            logits, cache = model.decode(tokens[jnp.arange(2), positions], cache, positions)
            return cache, logits

        first = model.compute_logits(x[jnp.arange(2), positions[0] - 1])
        return first, jax.lax.scan(step, cache, positions)[1]

    positions = lengths + np.arange(number)[:, None]
    graphdef, state = nnx.split(model)
    first, logits = read(graphdef, state, jnp.asarray(tokens), jnp.asarray(positions))
    whole = _forward(graphdef, state, jnp.asarray(tokens))
    # A weight that is rounded otherwise moves logits by 2e-5 of the largest.
    tolerance = 1e-4 * float(abs(whole).max())
    for row, length in enumerate(lengths):
        found = np.concatenate([first[None, row], logits[:, row]])
        expected = whole[row, length - 1 : length + number]
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.ci
def test_a_seed_draws_the_same_again_and_other_settings_compile_nothing_anew():
    model, before = make_model("zero"), loop._generate._cache_size()
    draw = functools.partial(generate, model, max_new_tokens=NUM_NEW, temperature=2.0)
    first, again, other = draw(PROMPTS, seed=1), draw(PROMPTS, seed=1), draw(PROMPTS, seed=2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=True))
    a, b, _ = draw([[1], [1], [2] * 11])
    assert a.tolist() != b.tolist(), "a prompt that is given twice is continued in two ways"
    for number, prompts in ((9, [[1, 2], [3] * 8, [4]]), (21, [[1] * 11] * 3)):
        found = generate(model, prompts, max_new_tokens=number, temperature=0.5)
        assert [len(new) for new in found] == [number] * 3
    assert loop._generate._cache_size() == before + 1


def _spell(vocab_size):
    """Make a tokenizer whose ids are the letters from "a" on; the last one is the separator."""
    return Tokenizer(
        name="letters",
        vocab_size=vocab_size,
        encode=lambda texts: [np.frombuffer(text, np.uint8) - ord("a") for text in texts],
        decode=lambda ids: (np.asarray(ids, np.uint8) + ord("a")).tobytes(),
        separator=vocab_size - 1,
    )


def test_a_text_ends_before_the_stop_token_and_others_go_on():
    model = make_model("zero")
    go_on = functools.partial(generate, model, max_new_tokens=NUM_NEW, temperature=0)
    free = go_on(PROMPTS)
    stop = int(free[0][3])
    found = go_on(PROMPTS, stop_token=stop)
    for whole, new in zip(free, found, strict=True):
        ends = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(new, whole[: ends[0]] if len(ends) else whole)
    # Text in, text out; the tokenizer's separator ends it, unless told otherwise.
    texts = ["".join(chr(ord("a") + token) for token in prompt) for prompt in PROMPTS]
    spelt = go_on(texts, tokenizer=_spell(VOCAB), stop_token=-1)
    assert spelt == ["".join(chr(ord("a") + token) for token in new) for new in free]
    ended = go_on(texts, tokenizer=_spell(stop + 1))
    assert [len(text) for text in ended] == [len(new) for new in found]


class Bare(Transformer):
    """A model without weights."""

    def __init__(self, **changes):
        self.config = make_config(max_length=LENGTH, **changes)


class Sharper(Bare):
    """A model whose calls are its own."""

    def __call__(self, tokens, **options):
        output = super().__call__(tokens, **options)
        return output._replace(logits=2 * output.logits)


_TEXT = {"prompts": ["abc"], "tokenizer": byte_tokenizer()}
_REFUSED = [
    ({"prompts": []}, r"prompts must be a list of at least one, got \[\]"),
    ({"prompts": "abc"}, "prompts must be a list of at least one, got 'abc'"),
    ({"prompts": ["a", [1]]}, "prompts must be texts or ids, got some of both"),
    ({"prompts": [[1], []]}, "prompt 1 must have at least one token"),
    ({"prompts": [[1, 17]]}, r"prompt 0 must be whole numbers in \[0, 17\), got int64 from"),
    ({"prompts": [[1.5]]}, "prompt 0 must be whole numbers"),
    ({"prompts": ["abc"]}, "texts must come with a tokenizer, got none"),
    (
        {"prompts": ["abc"], "tokenizer": value_tokenizer(9)},
        "texts must come with a tokenizer of text, got 'values:9'",
    ),
    (_TEXT, "prompt 0 must be whole numbers in"),
    (_TEXT | {"prompts": [""]}, "prompt 0 must have at least one token"),
    (_TEXT | {"prompts": ["\ud800"]}, "must be Unicode without surrogates"),
    (
        {"prompts": [[1], [1] * 60], "max_new_tokens": 5},
        "prompt 1 and the new tokens must fit max_length=64, got 60 tokens and max_new_tokens=5",
    ),
    ({"max_new_tokens": 0}, r"max_new_tokens must be a whole number in \[1, "),
    ({"temperature": -1}, "temperature must be at least 0, got -1"),
    ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    ({"top_k": 0}, "top_k must be a whole number in"),
    ({"top_p": 0.5, "temperature": 0}, "top_p must be 1 with temperature=0"),
    ({"top_k": 5, "temperature": 0}, "top_k must be None with temperature=0"),
    ({"seed": -1}, "seed must be a whole number in"),
    ({"stop_token": 17}, r"stop_token must be a whole number in \[-1, 16\], got 17"),
]


def _assert_refused(model, options, message):
    given = {"prompts": [[1]], "max_new_tokens": 4} | options
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, given.pop("prompts"), **given)
    assert "\n" not in str(caught.value)


_PATCHES = {"vocab_size": 0, "patch_values": 4, "num_classes": 2}


@pytest.mark.parametrize(
    "model, message",
    [
        (Bare(causal=False), "must be a causal language model, got one of text, both ways"),
        (Bare(causal=False, **_PATCHES), "must be a causal language model, got one of patches"),
        (Sharper(), "must have the __call__ of Transformer, got Sharper, whose own"),
    ],
    ids=["encoder", "patches", "own"],
)
def test_a_model_that_continues_nothing_is_refused(model, message):
    _assert_refused(model, {}, message)


@pytest.mark.parametrize("options, message", _REFUSED)
def test_what_cannot_be_continued_is_refused_in_one_line(options, message):
    _assert_refused(Bare(), options, message)
