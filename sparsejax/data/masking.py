"""Masked language modelling: hidden tokens are masked and must be predicted."""

import numpy as np

from sparsejax.data.pipeline import Batch, Transform

# Of the chosen tokens, so many become the mask token, and so many more a random token.
_MASKED, _RANDOM = 0.8, 0.1


def count_chosen(sequence_length: int, mask_fraction: float) -> int:
    """Return how many tokens of an example are chosen.

    Args:
      sequence_length: Tokens of the example.
      mask_fraction: Share of them.

    Returns:
      The nearest whole number.

    Example:
      >>> count_chosen(128, 0.15)
      19
    """
    return round(mask_fraction * sequence_length)


def make_masking(*, sequence_length: int, mask_fraction: float, vocab_size: int) -> Transform:
    """Return the function that hides tokens of an example.

    Tokens are chosen without regard to what they are, separators included, and always as many of an
    example, so that no example is without a target and all weigh the same. Each chosen token
    becomes the mask token with probability 0.8, any token of the vocabulary with 0.1, and
    stays as it is with 0.1: the model cannot know which tokens it must predict.

    Args:
      sequence_length: Tokens of an example, T.
      mask_fraction: Share of them that is chosen.
      vocab_size: Token ids; the mask token is the next one.

    Returns:
      Function of an example whose `targets` are int32[T], and of a random generator. The example
      it returns has `inputs` int32[T] and `loss_weights` float32[T], 1 at chosen tokens.

    References:
      Devlin et al., BERT, arXiv:1810.04805, section 3.1. It excludes separators.
    """
    count = count_chosen(sequence_length, mask_fraction)

    def hide_tokens(example: Batch, rng: np.random.Generator) -> Batch:
        targets = example["targets"]
        chosen = rng.permutation(sequence_length)[:count]
        fate = rng.random(count)
        others = rng.integers(vocab_size, size=count, dtype=np.int32)
        inputs = targets.copy()
        inputs[chosen] = np.where(
            fate < _MASKED,
            np.int32(vocab_size),
            np.where(fate < _MASKED + _RANDOM, others, targets[chosen]),
        )
        weights = np.zeros(sequence_length, np.float32)
        weights[chosen] = 1.0
        return example | {"inputs": inputs, "loss_weights": weights}

    return hide_tokens
