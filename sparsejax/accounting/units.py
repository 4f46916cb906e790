"""Write quantities of any size for a person."""

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def choose_prefix(value: float) -> tuple[float, str]:
    """Return the decimal prefix that leaves one to three digits before the point.

    Args:
      value: at least 0; below 1000 it has no prefix.

    Example:
      >>> choose_prefix(4.4e7)
      (1000000.0, 'M')
    """
    return next(((scale, prefix) for scale, prefix in _PREFIXES if value >= scale), (1.0, ""))


def format_quantity(value: float, unit: str = "") -> str:
    """Write a quantity with three digits.

    Args:
      value: at least 0.
      unit: such as "B".

    Example:
      >>> format_quantity(44138496, "FLOPs"), format_quantity(999.6e6, "B"), format_quantity(4016.0)
      ('44.1 MFLOPs', '1.00 GB', '4.02k')
    """
    scale, prefix = choose_prefix(float(f"{value:.3g}"))
    scaled = value / scale
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    if scale == 1 and float(value).is_integer():
        digits = 0
    return f"{scaled:.{digits}f}" + (f" {prefix}{unit}" if unit else prefix)
