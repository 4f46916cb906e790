"""Multiple choice: what is asked, what counts as right, and which files are refused."""

import json
import math

import numpy as np
import pytest

from sparsejax.config.parse import ConfigError
from sparsejax.data.tokenizer import byte_tokenizer
from sparsejax.models import Transformer
from sparsejax.tools import choices
from sparsejax.tools.choices import evaluate_choices
from tests.small_models import make_config

GOOD = {"context": "2 + 2 = ", "choices": ["4", "five"], "answer": 0}


class Bare(Transformer):
    """A model without weights."""

    def __init__(self, **changes):
        self.config = make_config(vocab_size=256, **changes)


def _write(folder, *questions):
    path = folder / "questions.jsonl"
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in questions]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def _evaluate(path, **changes):
    return evaluate_choices(Bare(**changes), path, tokenizer=byte_tokenizer())


def test_the_likeliest_choice_is_the_answer_by_sum_and_by_byte(tmp_path, monkeypatch):
    asked = []

    def score(model, contexts, continuations):
        asked.extend(zip(map(bytes, contexts), map(bytes, continuations), strict=True))
        return np.array([-4.0, -6.0, -3.0, -2.0, -1.5, -1.0])

    def narrow(model, contexts, continuations):
        return score(model, *([np.uint8(x) for x in each] for each in (contexts, continuations)))

    monkeypatch.setattr(choices, "score_continuations", narrow)
    path = _write(
        tmp_path,
        GOOD | {"id": 7},
        {"context": "", "choices": ["ä", "b"], "answer": 0},
        {"context": "the", "choices": [" x", " y"], "answer": 0},
    )
    found = _evaluate(path)
    assert asked == [
        # A space at the end of the context is told together with what follows it.
        (b"2 + 2 =", b" 4"),
        (b"2 + 2 =", b" five"),
        (b"\0", "ä".encode()),
        (b"\0", b"b"),
        (b"the", b" x"),
        (b"the", b" y"),
    ]
    # By sum: 4, b, y; by byte: five, ä (-1.5 a byte), y.
    assert found == {
        "questions": 3,
        "accuracy": pytest.approx(1 / 3),
        "accuracy_error": pytest.approx(math.sqrt(2 / 9 / 2)),
        "normalised_accuracy": pytest.approx(1 / 3),
        "normalised_accuracy_error": pytest.approx(math.sqrt(2 / 9 / 2)),
    }


def test_one_question_has_no_standard_error(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "score_continuations", lambda *_: np.array([-1.0, -2.0]))
    found = _evaluate(_write(tmp_path, GOOD))
    assert found == {"questions": 1, "accuracy": 1.0, "normalised_accuracy": 0.0}


@pytest.mark.parametrize(
    "line, message",
    [
        (b"", "a question must be JSON, but"),
        (b"{'context': 1}", "a question must be JSON, but"),
        (b'{"context": "\xff"}', "a question must be JSON, but"),
        (["a"], r"a question must be a JSON object, got \['a'\]"),
        ({"context": "a", "answer": 0}, "keys context, choices, answer, got no 'choices'"),
        (GOOD | {"context": 3}, "context must be str, got 3"),
        (GOOD | {"answer": True}, "answer must be int, got True"),
        (GOOD | {"answer": 2}, r"answer must be in \[0, 2\), got 2"),
        (GOOD | {"answer": -1}, r"answer must be in \[0, 2\), got -1"),
        (GOOD | {"choices": ["a"]}, r"choices must be two texts or more, none empty, got \['a'\]"),
        (GOOD | {"choices": ["a", ""]}, "choices must be two texts or more, none empty"),
        (GOOD | {"choices": ["a", 4]}, "choices must be two texts or more, none empty"),
        (GOOD | {"context": "\ud800"}, "texts must be Unicode without surrogates"),
        (GOOD | {"context": "a" * 13}, "must fit max_length=16, got 17 tokens"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_number(line, message, tmp_path):
    with pytest.raises(ConfigError, match=f"questions.jsonl, line 2: .*{message}") as caught:
        _evaluate(_write(tmp_path, GOOD, line, GOOD))
    assert "\n" not in str(caught.value)


def test_files_and_models_that_ask_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="must hold at least one question, found none"):
        _evaluate(_write(tmp_path))
    with pytest.raises(ConfigError, match="must be a readable file: .*No such file"):
        _evaluate(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="must be a causal language model"):
        _evaluate(_write(tmp_path, GOOD), causal=False)
