"""Multiple choice: how often a language model finds the right answer the likeliest."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.config.parse import ConfigError
from sparsejax.data import Tokenizer
from sparsejax.generation import (
    LoadedModel,
    check_continues,
    encode_texts,
    score_continuations,
)
from sparsejax.models import Transformer

_KINDS = {"context": str, "choices": list, "answer": int}


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a file of questions.

    Attributes:
      line: its number, from 1.
      context: what comes before the answer.
      choices: texts that may follow it, with the space before them if there is one.
      answer: index of the right one.
    """

    line: int
    context: str
    choices: tuple[str, ...]
    answer: int


class _Pair(NamedTuple):
    context: np.ndarray
    continuation: np.ndarray


def evaluate_choices(
    model: Transformer | LoadedModel,
    path: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Ask a causal language model questions, and compare its answers with the right ones.

    The answer is the choice whose tokens have the highest sum of log-likelihoods after the context;
    or, normalised, the highest sum divided by the bytes of the choice. Context and choice are
    encoded together, and a context without a character is the separator of documents.

    Args:
      model: Transformer, or what `sparsejax.load_model` or `load_pretrained` returned.
      path: file of JSON objects, one a line, {"context": str, "choices": [str, ...], "answer":
        int}: the index of the right choice, from 0. Other keys are not read.
      tokenizer: None = that of the loaded model.

    Returns:
      "questions", "accuracy" and "normalised_accuracy" in [0, 1], and the standard error of both,
      "accuracy_error" and "normalised_accuracy_error", where there are two questions or more.

    Raises:
      ConfigError: if the file is missing, or a line is not such a question or does not fit the
        model: the message names its number; or the model is no causal language model of text.

    References:
      As in lm-evaluation-harness, accuracy and accuracy normalised by bytes.
    """
    questions = read_questions(path)
    if not isinstance(model, Transformer):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    try:
        check_continues(model)
        pairs = [_encode(tokenizer, each, model.config.max_length, path) for each in questions]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flat = [pair for group in pairs for pair in group]
    scores = score_continuations(model, *map(list, zip(*flat, strict=True)))
    right, right_normalised, start = [], [], 0
    for question in questions:
        stop = start + len(question.choices)
        lengths = np.array([len(choice.encode()) for choice in question.choices])
        right.append(scores[start:stop].argmax() == question.answer)
        right_normalised.append((scores[start:stop] / lengths).argmax() == question.answer)
        start = stop
    return {
        "questions": len(questions),
        **_summarise("accuracy", right),
        **_summarise("normalised_accuracy", right_normalised),
    }


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Read a file of questions.

    Args:
      path: of the file.

    Raises:
      ConfigError: if it cannot be read, is empty, or a line is not a question; the message names
        its number.
    """
    questions = []
    try:
        with open(path, "rb") as file:
            for line, text in enumerate(file, 1):
                try:
                    questions.append(_parse(line, text))
                except ValueError as error:
                    raise ConfigError(f"{path}, line {line}: {error}") from error
    except OSError as error:
        raise ConfigError(f"choices={str(path)!r} must be a readable file: {error}") from error
    if not questions:
        raise ConfigError(f"choices={str(path)!r} must hold at least one question, found none")
    return questions


def _parse(line: int, text: bytes) -> Question:
    try:
        # Not the bytes, whose encoding would be guessed.
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a question must be JSON, but: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a question must be a JSON object, got {value!r:.60}")
    for key, kind in _KINDS.items():
        if key not in value:
            raise ValueError(f"a question must have the keys {', '.join(_KINDS)}, got no {key!r}")
        if type(value[key]) is not kind:
            raise ValueError(f"{key} must be {kind.__name__}, got {value[key]!r:.60}")
    choices = value["choices"]
    if len(choices) < 2 or not all(isinstance(x, str) and x for x in choices):
        raise ValueError(f"choices must be two texts or more, none empty, got {choices!r:.60}")
    if not 0 <= value["answer"] < len(choices):
        raise ValueError(f"answer must be in [0, {len(choices)}), got {value['answer']}")
    return Question(line, value["context"], tuple(choices), value["answer"])


def _encode(
    tokenizer: Tokenizer | None, question: Question, limit: int, path: str | os.PathLike
) -> list[_Pair]:
    """Encode each choice after its context, where its first token may hold the space between."""
    context = question.context.rstrip(" ")
    texts = [context, *(question.context + choice for choice in question.choices)]
    try:
        before, *whole = encode_texts(tokenizer, texts)
    except ValueError as error:
        raise ValueError(f"{path}, line {question.line}: {error}") from error
    assert tokenizer is not None, "it has encoded the texts"
    pairs = []
    for ids in whole:
        start = np.array([tokenizer.separator] if not len(before) else ids[: len(before)])
        pair = _Pair(start.astype(np.int32), ids[len(before) :].astype(np.int32))
        if not len(pair.continuation):
            raise ValueError(
                f"{path}, line {question.line}: choices must add a token to the context, got "
                f"{question.choices!r:.60}"
            )
        if len(pair.context) + len(pair.continuation) > limit:
            raise ValueError(
                f"{path}, line {question.line}: context and choice must fit max_length={limit}, "
                f"got {len(pair.context) + len(pair.continuation)} tokens"
            )
        pairs.append(pair)
    return pairs


def _summarise(name: str, right: Sequence[bool]) -> dict[str, float]:
    """Return the share that is right, and its standard error."""
    share, number = float(np.mean(right)), len(right)
    if number == 1:
        return {name: share}
    return {name: share, f"{name}_error": math.sqrt(share * (1 - share) / (number - 1))}
