"""What an experiment asks: which settings train with which seeds, and what may be said of them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

type Overrides = Mapping[str, Any]
"""Key -> value, given as `--config.KEY=VALUE`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: a config and what is changed in it.

    Attributes:
      config: str, path from the root of the repository.
      overrides: what is changed.
      tuned: str, name in `Tuning.settings` whose best candidate is changed besides; None = none.
    """

    config: str
    overrides: Overrides = dataclasses.field(default_factory=dict)
    tuned: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How settings get what their papers do not give for this model, at equal cost for each.

    Every candidate trains with every seed; the one of the least mean loss is taken, of equals the
    first.

    Attributes:
      settings: name -> Setting.
      candidates: name -> overrides to choose from, equally many for each name.
      seeds: tuple of int, none of which is reported.
      metric: key of `summary.json` that is to be least.

    Raises:
      ValueError: if a name has more candidates than another.
    """

    settings: Mapping[str, Setting]
    candidates: Mapping[str, Sequence[Overrides]]
    seeds: tuple[int, ...]
    metric: str = "validation_loss"

    def __post_init__(self):
        if self.settings.keys() != self.candidates.keys():
            names = [list(self.settings), list(self.candidates)]
            raise ValueError(f"candidates must be given for each of settings, got {names}")
        counts = {name: len(candidates) for name, candidates in self.candidates.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"candidates must be equally many for each setting, got {counts}")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row against another, seed by seed.

    Attributes:
      row: str, the setting that is judged.
      against: str, the setting that it is compared with.
      metric: column title, of `Experiment.columns`.
      better: "less" or "more" of the metric.
      margin: share of the mean of `against` by which `row` may be worse: the comparison asks
        whether it is no worse than that. None = it asks whether `row` is better.
      claim: str, what a paper says, in our words, and where; "" = the question is ours.
      method: str, the paper's method, under which `docs/results.md` lists the claim.
    """

    row: str
    against: str
    _: dataclasses.KW_ONLY
    metric: str
    better: Literal["less", "more"]
    margin: float | None = None
    claim: str = ""
    method: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question put to several settings.

    Attributes:
      name: str, names the files in `benchmarks/results` and the folder under `runs`.
      kind: "quality" or "timing".
      settings: row name -> Setting.
      seeds: tuple of int. The runs of one seed come one after the other, so the settings of a
        timing experiment take turns and drift of the machine falls on all of them.
      columns: column title -> key of `summary.json` or of what `measure` returns.
      curves: axis title -> key of `metrics.jsonl`, each a panel of the plot.
      tuning: how `Setting.tuned` is found out.
      by_seed: function from a seed to overrides of all settings; None = none. Equal seeds then
        mean equal data as well.
      measure: function from the folder of a finished run to values that join its record.
      comparisons: which rows are compared.
      headline: str, the row that a reader trains again; "" = the first.
      report: function from the records of each row and the folder of the results to Markdown that
        follows the tables; it may draw there.
      max_busy_cores: float, cores in use by others above which a timing run does not start.

    Raises:
      ValueError: if names do not belong together, or a seed is both reported and tuned on.
    """

    name: str
    kind: Literal["quality", "timing"]
    settings: Mapping[str, Setting]
    seeds: tuple[int, ...]
    columns: Mapping[str, str]
    curves: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"validation loss": "validation_loss"}
    )
    tuning: Tuning | None = None
    by_seed: Callable[[int], Overrides] | None = None
    measure: Callable[[pathlib.Path], Mapping[str, Any]] | None = None
    comparisons: Sequence[Comparison] = ()
    headline: str = ""
    report: Callable[[Mapping[str, Sequence[Mapping[str, Any]]], pathlib.Path], str] | None = None
    max_busy_cores: float = 0.2

    def __post_init__(self):
        tuned = {s.tuned for s in self.settings.values() if s.tuned is not None}
        known = set(self.tuning.settings) if self.tuning else set()
        if tuned - known:
            raise ValueError(f"{self.name}: settings are tuned as {tuned - known}, not in {known}")
        seen = set(self.tuning.seeds) & set(self.seeds) if self.tuning else set()
        if seen:
            raise ValueError(f"{self.name}: seeds {sorted(seen)} are both tuned on and reported")
        rows = {name for c in self.comparisons for name in (c.row, c.against)}
        rows |= {self.headline} if self.headline else set()
        if rows - set(self.settings):
            raise ValueError(f"{self.name}: {sorted(rows - set(self.settings))} are no settings")
        if unknown := {c.metric for c in self.comparisons} - set(self.columns):
            raise ValueError(f"{self.name}: {sorted(unknown)} are no columns")


def static_attention(config: str, pattern: str, density: float, **options: Any) -> Setting:
    """Return a run whose attention keeps a fixed pattern of blocks.

    Args:
      config: str, path from the root of the repository.
      pattern: str, of `recipe.static_attention`.
      density: float, fraction of the visible blocks.
      **options: others of `recipe.static_attention`.
    """
    options |= {"pattern": pattern, "density": density}
    return use_recipe(config, "static_attention", **options)


def use_recipe(config: str, name: str, **options: Any) -> Setting:
    """Return a run of a config with another recipe, or with other options of its own.

    Args:
      config: str, path from the root of the repository.
      name: of the recipe.
      **options: of the recipe.
    """
    changed = {f"recipe.{name}.{key}": value for key, value in options.items()}
    return Setting(config=config, overrides={"recipe.name": name, **changed})


def change(setting: Setting, **overrides: Any) -> Setting:
    """Return a setting with more changes.

    Args:
      **overrides: with "__" for the dots of a key.
    """
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    return dataclasses.replace(setting, overrides={**setting.overrides, **changed})


def shorten(setting: Setting, num_steps: int, **overrides: Any) -> Setting:
    """Return a setting that trains no longer than a timing run needs.

    Args:
      **overrides: others, as in `change`.
    """
    every = ("num_steps", "eval_every_steps", "checkpoint__every_steps")
    return change(setting, **dict.fromkeys(every, num_steps), **overrides)
