"""Continue prompts: text in and text out, or ids in and ids out."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from sparsejax.checks import check_setting
from sparsejax.data import Tokenizer
from sparsejax.generation.loop import generate_ids
from sparsejax.generation.sampling import Sampling
from sparsejax.models import Transformer, TransformerConfig


class LoadedModel(Protocol):
    """A model with its tokenizer, such as `sparsejax.load_model` returns."""

    @property
    def model(self) -> Transformer:
        """The model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, None where there is none."""
        ...


def generate(
    model: Transformer | LoadedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[str] | list[np.ndarray]:
    """Continue prompts with a causal language model.

    Attention is that of the model's phase, sparse or dense, and each new token attends to what is
    kept of the ones before. The whole is one program on the device, compiled once for each number
    of prompts and, rounded up to powers of two, length of prompts and of the whole.

    Args:
      model: Transformer, or what `sparsejax.load_model` or `load_pretrained` returned.
      prompts: texts, or ids of each; at least one, none of them empty.
      max_new_tokens: how many tokens are added to each at the most.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_p: in (0, 1]; tokens are drawn from the fewest whose probabilities sum to this.
      top_k: tokens are drawn from so many of the likeliest; None = all.
      seed: the same seed draws the same tokens.
      stop_token: id that ends a text; None = the tokenizer's separator of documents, and none
        without a tokenizer; -1 = none.
      tokenizer: encodes and decodes texts; None = that of the loaded model.

    Returns:
      What follows each prompt, without the stop token: str for texts, in which bytes that are no
      UTF-8 are replaced; i32 arrays for ids.

    Raises:
      ValueError: if the model is no causal language model or has a `__call__` of its own, which
        the cache of the past does not know; a prompt is empty, has ids out of range or leaves no
        room for the new tokens; or another argument is out of range.

    Example:
      `sparsejax.generate(sparsejax.load_model("runs/spion_small"), ["def "], max_new_tokens=64)`
    """
    if not isinstance(model, Transformer):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    check_continues(model)
    sampling = _make_sampling(temperature, top_p, top_k)
    _check_whole("max_new_tokens", max_new_tokens, 1)
    _check_whole("seed", seed, 0)
    config = model.config
    if stop_token is None and tokenizer is not None:
        stop_token = tokenizer.separator
    if stop_token is not None:
        _check_whole("stop_token", stop_token, -1, config.vocab_size - 1)
    if isinstance(prompts, str | bytes) or not len(prompts):
        raise ValueError(f"prompts must be a list of at least one, got {prompts!r:.60}")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) < len(prompts):
        raise ValueError("prompts must be texts or ids, got some of both")
    encoded: Sequence[Any] = prompts if not texts else encode_texts(tokenizer, texts)
    ids = [_check_ids(config, number, prompt) for number, prompt in enumerate(encoded)]
    for number, prompt in enumerate(ids):
        if len(prompt) + max_new_tokens > config.max_length:
            raise ValueError(
                f"prompt {number} and the new tokens must fit max_length={config.max_length}, got "
                f"{len(prompt)} tokens and max_new_tokens={max_new_tokens}"
            )
    found = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_token=stop_token,
    )
    if not texts:
        return found
    assert tokenizer is not None, "it has encoded the texts"
    return [_decode(tokenizer, *pair) for pair in zip(ids, found, strict=True)]


def check_continues(model: Transformer) -> None:
    """Refuse a model that does not continue a text.

    Raises:
      ValueError: if it is no causal language model, or has a `__call__` of its own.
    """
    config, kind = model.config, type(model)
    reads = "patches" if config.patch_values else "text, both ways"
    if not config.causal:
        raise ValueError(
            f"the model must be a causal language model, got one of {reads} (causal=False)"
        )
    if kind.__call__ is not Transformer.__call__:
        raise ValueError(
            f"the model must have the __call__ of Transformer, got {kind.__name__}, whose own the "
            "cache of the past does not know"
        )


def encode_texts(tokenizer: Tokenizer | None, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of texts.

    Args:
      tokenizer: of text.
      texts: any number.

    Returns:
      A list of integer arrays.

    Raises:
      ValueError: if there is no tokenizer, or it is not one of text, or a text has no UTF-8.
    """
    if tokenizer is None:
        raise ValueError("texts must come with a tokenizer, got none; ids need none")
    try:
        ids = tokenizer.encode([text.encode() for text in texts])
    except UnicodeEncodeError as error:
        raise ValueError(f"texts must be Unicode without surrogates, got {error}") from error
    if not all(isinstance(each, np.ndarray) for each in ids):
        raise ValueError(f"texts must come with a tokenizer of text, got {tokenizer.name!r}")
    return ids


def _make_sampling(temperature: float, top_p: float, top_k: int | None) -> Sampling:
    check_setting(0 <= temperature < float("inf"), "temperature", temperature, "at least 0")
    check_setting(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    if top_k is not None:
        _check_whole("top_k", top_k, 1)
    if not temperature:
        unused = "with temperature=0, which has no use for it"
        check_setting(top_p == 1, "top_p", top_p, f"1 {unused}")
        check_setting(top_k is None, "top_k", top_k, f"None {unused}")
        return Sampling(None)
    return Sampling(
        jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        None if top_p == 1 else jnp.float32(top_p),
    )


def _check_whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    fits = whole and bool(low <= value <= high)
    check_setting(fits, name, value, f"a whole number in [{low}, {high}]")


def _check_ids(config: TransformerConfig, number: int, prompt: Any) -> np.ndarray:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"prompt {number} must have at least one token, got shape {ids.shape}")
    if ids.dtype.kind not in "ui" or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"prompt {number} must be whole numbers in [0, {config.vocab_size}), got "
            f"{ids.dtype} from {ids.min()} to {ids.max()}"
        )
    return ids.astype(np.int32)


def _decode(tokenizer: Tokenizer, prompt: Any, new: Any) -> str:
    """Return what new tokens add to the text of a prompt.

    Some tokenizers drop a space where a text begins, so that new tokens are not decoded alone.
    """
    before = tokenizer.decode(prompt).decode(errors="replace")
    whole = tokenizer.decode([*prompt, *new]).decode(errors="replace")
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(new).decode(errors="replace")
