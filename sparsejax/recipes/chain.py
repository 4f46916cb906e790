"""Two methods at once: one that makes attention sparse and one that makes weights sparse.

  phases       those of both interleave: each goes on to its next when its own time has come
  hooks        both are called, attention first; what one keeps the other does not see
  masks        one tree: attention's leaves belong to the first, those of weights to the second

A run's phase is a pair of theirs, compiled once.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from sparsejax.recipes.phases import Metric
from sparsejax.recipes.recipe import Phase, Recipe, Sparsity, StepAccount
from sparsejax.types import PyTree

_PARTS = ("attention", "weights")


def chain(attention: Recipe, weights: Recipe) -> Recipe:
    """Train with two recipes.

    Each does what it does by itself, with the same random key; where one of the two is dense, the
    other trains to the bit as it does alone. What they keep stands under "attention" and "weights"
    in `Sparsity.params` and `Sparsity.statistics`.

    Args:
      attention: a recipe none of whose phases has sparse weights.
      weights: a recipe none of whose phases has sparse attention or probes it.

    Returns:
      Recipe named "attention+weights", whose phases are the pairs that can occur, named
      "attention + weights" too.

    Raises:
      ValueError: if both claim weights, or attention, or the learning rate.

    Example:
      >>> from sparsejax.recipes import make_dense
      >>> recipe = chain(make_dense(), make_dense())
      >>> recipe.name, [phase.name for phase in recipe.phases]
      ('dense+dense', ['dense + dense'])
    """
    recipes = (attention, weights)
    _refuse_clashes(attention, weights)
    return Recipe(
        name="+".join(recipe.name for recipe in recipes),
        phases=tuple(_list_pairs(attention, weights)),
        init=functools.partial(_init, recipes),
        choose_masks=functools.partial(_choose_masks, recipes),
        transform_params=functools.partial(_transform_params, recipes),
        auxiliary_loss=functools.partial(_auxiliary_loss, recipes),
        mask_gradients=functools.partial(_mask_gradients, recipes),
        transform_gradients=functools.partial(_transform_gradients, recipes),
        skip_optimizer=functools.partial(_skip_optimizer, recipes),
        transform_updates=functools.partial(_transform_updates, recipes),
        update=functools.partial(_update, recipes),
        metrics=functools.partial(_metrics, recipes),
        observe=functools.partial(_observe, recipes),
        enter_phase=functools.partial(_enter_phase, recipes),
        phase_metrics=functools.partial(_phase_metrics, recipes),
        phase_warnings=functools.partial(_phase_warnings, recipes),
        account=functools.partial(_account, recipes),
        progress_metrics=attention.progress_metrics + weights.progress_metrics,
        draw_phase=functools.partial(_draw_phase, recipes),
        draw_run=functools.partial(_draw_run, recipes),
        parts=recipes,
    )


def list_begun(previous: Phase, phase: Phase) -> tuple[Phase, ...]:
    """List the phases that begin where one phase of a run follows another: one, or parts of it.

    Args:
      previous: the phase before.
      phase: the phase that begins.
    """
    if not phase.parts:
        return (phase,)
    pairs = zip(previous.parts, phase.parts, strict=True)
    return tuple(new for old, new in pairs if new != old)


def _refuse_clashes(attention: Recipe, weights: Recipe) -> None:
    for recipe in (attention, weights):
        if recipe.parts:
            raise ValueError(f"chain takes two methods, got {recipe.name!r}, which is a chain")
    if any(phase.sparse_weights for phase in attention.phases):
        raise ValueError(
            "the first recipe of a chain must leave weights to the second, "
            f"got {attention.name!r}, which makes weights sparse"
        )
    if any(p.sparse_attention or p.probe_every_steps for p in weights.phases):
        raise ValueError(
            "the second recipe of a chain must leave attention to the first, "
            f"got {weights.name!r}, which makes attention sparse or probes it"
        )


def _list_pairs(attention: Recipe, weights: Recipe) -> Iterator[Phase]:
    """List the pairs of phases that can occur, in the order in which they can begin."""
    spans = [_list_spans(recipe) for recipe in (attention, weights)]
    found = []
    for (i, (begin_a, end_a)), (j, (begin_w, end_w)) in itertools.product(*map(enumerate, spans)):
        begin = max(begin_a, begin_w)
        if begin < min(end_a, end_w):
            found.append((begin, i + j, i, j))
    for _, _, i, j in sorted(found):
        yield _join(attention, weights, i, j)


def _list_spans(recipe: Recipe) -> list[tuple[float, float]]:
    """Return, for each phase, the first step that it may have and the last one but one."""
    spans, begin = [], 0.0
    for phase in recipe.phases[:-1]:
        end = math.inf if phase.last_step is None else phase.last_step
        spans.append((begin, end))
        # A phase that probes may end after any of its probes.
        begin = begin + 1 if phase.probe_every_steps else end
    return [*spans, (begin, math.inf)]


def _join(attention: Recipe, weights: Recipe, i: int, j: int) -> Phase:
    a, w = attention.phases[i], weights.phases[j]
    going = [p for p, r in ((a, attention), (w, weights)) if p != r.phases[-1]]
    last_steps = [p.last_step for p in going if p.last_step is not None]
    rates = [p for p in (a, w) if p.learning_rate != "schedule"]
    if len(rates) == 2:
        raise ValueError(
            "one recipe of a chain may change the learning rate, got two that do: "
            f"{attention.name!r} in phase {a.name!r}, {weights.name!r} in phase {w.name!r}"
        )
    return Phase(
        f"{a.name} + {w.name}",
        sparse_attention=a.sparse_attention,
        position_mask=a.position_mask,
        choose_blocks=a.choose_blocks,
        pruned_logits=a.pruned_logits,
        changes_attention=a.changes_attention,
        sparse_weights=w.sparse_weights,
        grad_pruning=w.grad_pruning,
        masked_gradients=w.masked_gradients,
        gradient_density=w.gradient_density,
        last_step=min(last_steps, default=None),
        ends_when=" and ".join(dict.fromkeys(p.ends_when for p in going if p.last_step is None))
        or a.ends_when,
        probe_every_steps=a.probe_every_steps,
        pool_map=a.pool_map,
        learning_rate=rates[0].learning_rate if rates else "schedule",
        learning_rate_scale=a.learning_rate_scale * w.learning_rate_scale,
        parts=(a, w),
    )


def _each(recipes: tuple[Recipe, ...], phase: Phase) -> Iterator[tuple[str, Recipe, Phase]]:
    return zip(_PARTS, recipes, phase.parts, strict=True)


def _view(sparsity: Sparsity, part: str) -> Sparsity:
    """Return what one recipe sees of the state."""
    return dataclasses.replace(
        sparsity, params=sparsity.params[part], statistics=sparsity.statistics[part]
    )


def _put(sparsity: Sparsity, part: str, seen: Sparsity) -> Sparsity:
    """Put back what one recipe saw and may have changed."""
    return dataclasses.replace(
        seen,
        params=sparsity.params | {part: seen.params},
        statistics=sparsity.statistics | {part: seen.statistics},
    )


def _narrow(weights: PyTree, part: str) -> PyTree:
    """Return gradients, parameters or updates as one recipe sees them."""
    return weights | {"recipe": weights["recipe"][part]}


def _widen(weights: PyTree, part: str, seen: PyTree) -> PyTree:
    return seen | {"recipe": weights["recipe"] | {part: seen["recipe"]}}


def _init(recipes, masks, params, key):
    kept = {}
    for part, recipe in zip(_PARTS, recipes, strict=True):
        kept[part] = recipe.init(masks, params, key)
        masks = kept[part].masks
    return Sparsity(
        masks=masks,
        params={part: sparsity.params for part, sparsity in kept.items()},
        statistics={part: sparsity.statistics for part, sparsity in kept.items()},
        phase_start_step=jnp.int32(0),
    )


def _choose_masks(recipes, sparsity, *, step, phase):
    for part, recipe, own in _each(recipes, phase):
        masks = recipe.choose_masks(_view(sparsity, part), step=step, phase=own)
        sparsity = dataclasses.replace(sparsity, masks=masks)
    return sparsity.masks


def _transform_params(recipes, params, sparsity, phase):
    for part, recipe, own in _each(recipes, phase):
        params = recipe.transform_params(params, _view(sparsity, part), own)
    return params


def _auxiliary_loss(recipes, sparsity, attention_maps, phase):
    losses = [
        recipe.auxiliary_loss(_view(sparsity, part), attention_maps, own)
        for part, recipe, own in _each(recipes, phase)
    ]
    return losses[0] + losses[1]


def _mask_gradients(recipes, grads, sparsity, phase):
    for part, recipe, own in _each(recipes, phase):
        seen = recipe.mask_gradients(_narrow(grads, part), _view(sparsity, part), own)
        grads = _widen(grads, part, seen)
    return grads


def _transform_gradients(recipes, grads, params, sparsity, phase):
    for part, recipe, own in _each(recipes, phase):
        seen = recipe.transform_gradients(
            _narrow(grads, part), _narrow(params, part), _view(sparsity, part), own
        )
        grads = _widen(grads, part, seen)
    return grads


def _skip_optimizer(recipes, step, phase):
    attention, weights = (r.skip_optimizer(step, own) for _, r, own in _each(recipes, phase))
    return attention | weights


def _transform_updates(recipes, updates, sparsity, phase):
    for part, recipe, own in _each(recipes, phase):
        seen = recipe.transform_updates(_narrow(updates, part), _view(sparsity, part), own)
        updates = _widen(updates, part, seen)
    return updates


def _update(recipes, sparsity, params, opt_state, grads, *, phase, **context: Any):
    for part, recipe, own in _each(recipes, phase):
        seen, params, opt_state = recipe.update(
            _view(sparsity, part), params, opt_state, _narrow(grads, part), phase=own, **context
        )
        sparsity = _put(sparsity, part, seen)
    return sparsity, params, opt_state


def _metrics(recipes, sparsity, *, step, phase):
    return _merge_metrics(
        recipe.metrics(_view(sparsity, part), step=step, phase=own)
        for part, recipe, own in _each(recipes, phase)
    )


def _phase_metrics(recipes, sparsity, phase):
    return _merge_metrics(
        recipe.phase_metrics(_view(sparsity, part), own)
        for part, recipe, own in _each(recipes, phase)
    )


def _phase_warnings(recipes, values):
    return tuple(warning for recipe in recipes for warning in recipe.phase_warnings(values))


def _merge_metrics(found: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for more in found:
        both = metrics.keys() & more.keys()
        if both:
            raise ValueError(f"metrics of chained recipes must have different names, got {both}")
        metrics |= more
    return metrics


def _observe(recipes, sparsity, attention_maps, phase):
    part, recipe, own = next(_each(recipes, phase))
    seen, observation = recipe.observe(_view(sparsity, part), attention_maps, own)
    return _put(sparsity, part, seen), observation


def _enter_phase(recipes, sparsity, phase, *, previous):
    for (part, recipe, own), old in zip(_each(recipes, phase), previous.parts, strict=True):
        seen = _view(sparsity, part)
        first, last = (recipe.phases.index(p) for p in (old, own))
        for later in recipe.phases[first + 1 : last + 1]:
            seen = recipe.enter_phase(seen, later, previous=old)
            old = later
        sparsity = _put(sparsity, part, seen)
    return sparsity


def _account(recipes, values):
    accounts = [recipe.account(values) for recipe in recipes]
    return StepAccount(
        dense_gradient=any(account.dense_gradient for account in accounts),
        weight_density={n: x for a in accounts for n, x in a.weight_density.items()},
    )


def _draw_phase(recipes, sparsity, phase, *, step, folder):
    for part, recipe, own in _each(recipes, phase):
        recipe.draw_phase(_view(sparsity, part), own, step=step, folder=folder)


def _draw_run(recipes, rows, *, folder):
    for recipe in recipes:
        recipe.draw_run(rows, folder=folder)
