"""What a transformer refuses to read."""

import jax

from sparsejax.models.config import TransformerConfig


def check_tokens(config: TransformerConfig, shape: tuple[int, ...]) -> None:
    """Refuse tokens, or patches, that a model does not take.

    Args:
      config: of the model.
      shape: of the tokens.

    Raises:
      ValueError: if the rank is wrong, or they are longer than `max_length`.
    """
    names = ["B", "T"]
    if config.num_towers == 2:
        names.insert(1, "2")
    if config.patch_values:
        names.append(str(config.patch_values))
    axes = dict(zip(names, shape, strict=False))
    fits = all(name == str(size) for name, size in axes.items() if name.isdigit())
    if len(shape) != len(names) or axes["T"] > config.max_length or not fits:
        raise ValueError(
            f"tokens must be [{', '.join(names)}] with T at most "
            f"max_length={config.max_length}, got shape {shape}"
        )


def check_cache_length(config: TransformerConfig, length: int, *, num_read: int) -> None:
    """Refuse a cache that does not hold a prompt, or is not of whole blocks.

    Args:
      config: of the model.
      length: positions of the cache.
      num_read: positions of the prompt.

    Raises:
      ValueError: if it does not fit.
    """
    config.block.grid(length)
    if not num_read <= length <= config.max_length:
        raise ValueError(
            f"cache_length must be at least T={num_read} and at most "
            f"max_length={config.max_length}, got {length}"
        )


def check_decoder_tokens(
    config: TransformerConfig, tokens: jax.Array, decoder_tokens: jax.Array | None
) -> None:
    """Refuse what a decoder does not take.

    Args:
      config: of the model.
      tokens: of the source, of the right shape.
      decoder_tokens: i32[B, U], or None.

    Raises:
      ValueError: if they are missing, have no use, or have the wrong shape.
    """
    if (decoder_tokens is not None) != (config.num_decoder_layers > 0):
        got = None if decoder_tokens is None else f"shape {decoder_tokens.shape}"
        raise ValueError(
            "decoder_tokens must be given to a model with decoder layers and to no other, got "
            f"{got} for num_decoder_layers={config.num_decoder_layers}"
        )
    if decoder_tokens is None:
        return
    B, U = tokens.shape[0], config.max_length
    if decoder_tokens.ndim != 2 or decoder_tokens.shape[0] != B or decoder_tokens.shape[1] > U:
        raise ValueError(
            f"decoder_tokens must be [B, U] with B={B} and U at most max_length={U}, got shape "
            f"{decoder_tokens.shape}"
        )
