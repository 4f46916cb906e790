"""Shares of a run as steps, so that the number of steps alone makes a run shorter or longer."""


def count_share(fraction: float, num_steps: int) -> int:
    """Count the steps of a share of a run.

    Args:
      fraction: in [0, 1].
      num_steps: steps of the whole, at least 1.

    Returns:
      The nearest number of steps; at least 1 if the fraction is above 0.

    Example:
      >>> [count_share(fraction, 1000) for fraction in (0.0, 1e-6, 0.25)]
      [0, 1, 250]
    """
    return max(1, round(fraction * num_steps)) if fraction > 0 else 0
