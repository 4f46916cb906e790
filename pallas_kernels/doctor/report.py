"""What the doctor prints."""

from collections.abc import Iterable, Sequence

from pallas_kernels.doctor.examine import Outcome
from pallas_kernels.verdicts import Timing, describe_call


def describe_outcome(outcome: Outcome) -> str:
    """Say in words what became of a trial.

    That is "right", "wrong (...)", "not here: ..." or "not tried (...)".

    Args:
      outcome: of the trial.
    """
    if outcome.fault:
        return f"not tried ({outcome.fault})"
    if not outcome.verdicts:
        return f"not here: {outcome.refusal}"
    wrong = [f"wrong ({v.key.direction}: {v.wrong})" for v in outcome.verdicts if v.wrong]
    if wrong:
        return "; ".join(dict.fromkeys(wrong))
    refused = [f", no {v.key.direction}: {v.refused}" for v in outcome.verdicts if v.refused]
    return "right" + "".join(refused)


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """List outcomes under the calls they belong to.

    Args:
      outcomes: of all trials.

    Returns:
      str of several lines.
    """
    lines, before = [], None
    width = max((len(outcome.trial.backend) for outcome in outcomes), default=0)
    for outcome in outcomes:
        op, backend, facts = outcome.trial
        call = f"{describe_call(op, facts)}, {' x '.join(map(str, facts.sizes))}"
        if call != before:
            lines.append(call)
        before = call
        timings = outcome.verdicts[-1].timings if outcome.verdicts else ()
        cells = (describe_outcome(outcome), *_describe_times(backend, timings))
        lines.append(f"  {backend.ljust(width)}  {', '.join(cells)}")
    return "\n".join(lines)


def _describe_times(backend: str, timings: Iterable[Timing]) -> tuple[str, ...]:
    """Return the time at the lowest density, that of dense, and where they meet."""
    ordered = sorted(timings, key=lambda timing: timing.density)
    if not ordered or backend not in ordered[0].seconds:
        return ()
    first = ordered[0]
    peer = next((name for name in ("dense", "xla") if name in first.seconds), None)
    own = f"{first.seconds[backend] * 1e3:.3g} ms at density {first.density:g}"
    if peer is None:
        return (own,)
    beside = f"{first.seconds[peer] / first.seconds[backend]:.3g}x as fast as {peer}"
    meets = find_break_even(backend, peer, ordered)
    return (own, beside) if meets is None else (own, beside, meets)


def find_break_even(backend: str, peer: str, timings: Sequence[Timing]) -> str | None:
    """Say at which density a kernel takes as long as a dense program, by a straight line.

    Args:
      backend: name of the kernel's.
      peer: name of the dense one, whose time does not depend on the density.
      timings: of one call at two densities, the lower first.

    Returns:
      str, or None if there are not two densities.
    """
    if len(timings) < 2:
        return None
    (low, high), target = timings[:2], timings[0].seconds[peer]
    slope = (high.seconds[backend] - low.seconds[backend]) / (high.density - low.density)
    if slope <= 0:
        return "no break-even: time does not grow with density"
    density = low.density + (target - low.seconds[backend]) / slope
    if density <= 0:
        return "slower than dense at every density"
    return "faster at every density" if density >= 1 else f"break-even at density {density:.2g}"
