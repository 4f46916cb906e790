"""Find FST's decay rate: the one that lets masks change a little less than in a dense run.

A rate that is too small lets pruned weights come and go, and masks change more than those of a
dense run would; one that is too large freezes them. For each rate the warm-up is run from one
initial state on the same batches, and the flip rate after it is compared with that of a dense run
whose masks are searched for at the same steps:

  mu = flip rate with decay / flip rate of the dense run,  accepted in [0.60, 0.95]
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.checks import check_setting
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig, make_recipe
from sparsejax.durable import write_durably
from sparsejax.report.metrics import fetch_metrics
from sparsejax.report.plots.flips import plot_decay_search
from sparsejax.report.progress import say
from sparsejax.shares import count_share
from sparsejax.strict_json import dump_json
from sparsejax.training.initial import create_initial_state
from sparsejax.training.setup import Run, compile_phase, prepare_run

ACCEPTED = (0.60, 0.95)
"""Range of mu in which the method's authors accept a rate."""

_PREFERRED = 0.8
# Searches after the warm-up that are averaged: one compares two batches' worth of noise.
_NUM_SEARCHES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecaySearch:
    """What came of a search.

    Attributes:
      first_step: int, the last step before the first search that counts.
      last_step: int, of the last search.
      dense_flip_rate: float, mean over the searches of the dense run.
      flip_rates: rate -> mean flip rate.
      chosen: float or None, accepted rate whose mu is nearest 0.8.
    """

    first_step: int
    last_step: int
    dense_flip_rate: float
    flip_rates: Mapping[float, float]
    chosen: float | None

    def mu(self, rate: float) -> float:
        """Return the flip rate relative to that of the dense run.

        Args:
          rate: float, one that was tried.
        """
        return self.flip_rates[rate] / self.dense_flip_rate


def find_decay(config: TrainConfig, workdir: str | os.PathLike) -> DecaySearch:
    """Try the configured rates and write table and picture.

    Args:
      config: TrainConfig of the recipe "fst".
      workdir: folder for `find_decay.json` and `find_decay.png`.

    Raises:
      ConfigError: if the recipe is another one, or the run is too short for the searches.

    References:
      FST, arXiv:2404.01847, determination of the decay factor; no code of it was released. That mu
      is averaged over several searches, and which rate is preferred, are ours.
    """
    with _refusing():
        candidates, refresh = _check_recipe(config)
    warmup_steps = count_share(config.optimizer.warmup_fraction, config.schedule_length)
    first = math.ceil(warmup_steps / refresh) * refresh
    last = first + _NUM_SEARCHES * refresh
    run = prepare_run(config)
    with _refusing():
        check_setting(
            last <= (run.recipe.phases[0].last_step or config.num_steps),
            "num_steps",
            config.num_steps,
            f"large enough for {last} sparse steps: the warm-up and {_NUM_SEARCHES} searches",
        )
    begin = run.data.train.get_state()
    (dense,) = _measure(_make_dense_run(run), begin, (first, last, refresh), [0.0])
    if dense == 0:
        raise ConfigError(
            f"the masks of a dense run do not change from step {first} to {last}: "
            f"optimizer.learning_rate={config.optimizer.learning_rate} is too small for a search"
        )
    rates = _measure(run, begin, (first, last, refresh), candidates)
    flip_rates = dict(zip(candidates, rates, strict=True))
    accepted = [c for c in candidates if ACCEPTED[0] <= flip_rates[c] / dense <= ACCEPTED[1]]
    search = DecaySearch(
        first_step=first,
        last_step=last,
        dense_flip_rate=dense,
        flip_rates=flip_rates,
        chosen=min(accepted, key=lambda c: abs(flip_rates[c] / dense - _PREFERRED), default=None),
    )
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "find_decay.json", dump_json(_describe(search)) + "\n")
    plot_decay_search(
        {rate: search.mu(rate) for rate in candidates},
        accepted=ACCEPTED,
        chosen=search.chosen,
        path=folder / "find_decay.png",
    )
    say(format_search(search))
    return search


def format_search(search: DecaySearch) -> str:
    """Write the table for a person.

    Returns:
      str of several lines.
    """
    lines = [
        f"flip rate from step {search.first_step} to {search.last_step}, dense run: "
        f"{search.dense_flip_rate:.5f}",
        "decay_rate   flip rate   mu      accepted",
    ]
    for rate, flips in search.flip_rates.items():
        mu = search.mu(rate)
        mark = "yes" if ACCEPTED[0] <= mu <= ACCEPTED[1] else "no"
        chosen = "  <- chosen" if rate == search.chosen else ""
        lines.append(f"{rate:<10.3g}   {flips:<9.5f}   {mu:<5.3f}   {mark}{chosen}")
    if search.chosen is None:
        least = min(search.flip_rates, key=search.mu)
        which = "larger" if search.mu(least) > ACCEPTED[1] else "finer"
        lines.append(f"no rate is accepted: try {which} ones in recipe.fst.decay_candidates")
    else:
        lines.append(f"use --config.recipe.fst.decay_rate={search.chosen:g}")
    return "\n".join(lines)


def _measure(run: Run, begin, steps: tuple[int, int, int], rates: list[float]) -> list[float]:
    """Return for each rate the mean flip rate of the searches, by one compiled step."""
    first, last, refresh = steps
    run.data.train.set_state(begin)
    batch = run.put_batch(next(run.data.train))
    phase = run.recipe.phases[0]
    step = compile_phase(run, phase, batch).train_step
    results = []
    for rate in rates:
        state = create_initial_state(run)
        # On the devices of the state: the compiled step takes no other.
        on_devices = jax.device_put(np.float32(rate), run.replicated)
        statistics = {**state.sparsity.statistics, "decay_rate": on_devices}
        sparsity = dataclasses.replace(state.sparsity, statistics=statistics)
        state = dataclasses.replace(state, sparsity=sparsity)
        run.data.train.set_state(begin)
        flips = []
        for number in range(1, last + 1):
            state, metrics = step(state, run.put_batch(next(run.data.train)), None)
            if number > first and number % refresh == 0:
                # Unknown if the step was skipped: the rate is too high for the model.
                flips.append(fetch_metrics(metrics).get("flip_rate", np.nan))
        results.append(float(np.mean(flips)))
        say(f"{run.recipe.name}, decay_rate {rate:g}: flip rate {results[-1]:.5f}")
    run.data.train.set_state(begin)
    return results


def _check_recipe(config: TrainConfig) -> tuple[list[float], int]:
    """Return the rates to try and the steps between two searches for masks."""
    name, settings = config.recipe.name, config.recipe.settings
    check_setting(name == "fst", "recipe.name", name, "'fst'")
    variant, expected = settings["variant"], "'fst' or 'sr_ste', which decay"
    check_setting(variant in ("fst", "sr_ste"), "recipe.fst.variant", variant, expected)
    return _parse_candidates(settings["decay_candidates"]), settings["refresh_steps"]


def _make_dense_run(run: Run) -> Run:
    """Return the run that trains densely and logs flip rates all the same."""
    changes = {"variant": "dense", "decay_rate": 0.0, "grad_pruning": "none"}
    sections = {"fst": {**run.config.recipe.settings, **changes}}
    recipe = dataclasses.replace(run.config.recipe, sections=sections)
    config = dataclasses.replace(run.config, recipe=recipe)
    return dataclasses.replace(run, config=config, recipe=make_recipe(config, run.model_config))


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _parse_candidates(text: str) -> list[float]:
    try:
        rates = sorted({float(word) for word in text.replace(",", " ").split()})
    except ValueError:
        rates = []
    check_setting(
        bool(rates) and rates[0] > 0 and math.isfinite(rates[-1]),
        "recipe.fst.decay_candidates",
        text,
        "positive numbers separated by spaces",
    )
    return rates


def _describe(search: DecaySearch) -> dict[str, Any]:
    return {
        "first_step": search.first_step,
        "last_step": search.last_step,
        "dense_flip_rate": search.dense_flip_rate,
        "accepted_mu": list(ACCEPTED),
        "candidates": [
            {"decay_rate": rate, "flip_rate": flips, "mu": search.mu(rate)}
            for rate, flips in search.flip_rates.items()
        ],
        "chosen": search.chosen,
    }
