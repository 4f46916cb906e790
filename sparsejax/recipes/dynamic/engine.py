"""The engine of dynamic sparse training: masks drop and grow weights during training.

  forward      y = x (W * M); pruned weights are 0 and have no gradient
  every step   optimizer, then W <- W * M
  an update    changes M and W. It may read the gradient of all weights, and may take the place of
               the optimizer's step

Schedules and growth rule define the method: `mst.py`, `rigl.py`, `set.py`, `magnitude.py` and
`static_weights.py` state theirs as a `TopologyConfig`. Sparsity and density count the chosen
weights only: linear layers of blocks, and the token embedding, which shares its mask with the head.

Legend: L layers, K rows and N columns of a weight.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsejax.masks import (
    CosineAnnealing,
    SparsitySchedule,
    UpdateSteps,
    apply_topology,
    expand_mask,
    layer_densities,
    layer_densities_at,
    reset_moments,
)
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.masks.weights.topology import Growth
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.dynamic.layer_topology import init_mask, prune_mask, update_mask
from sparsejax.recipes.recipe import (
    Measured,
    Phase,
    Recipe,
    Sparsity,
    StepAccount,
    keep_where,
)
from sparsejax.recipes.weight_masks import (
    apply_weight_masks,
    compute_weight_density,
    get_weight_masks,
    map_moments,
    map_sparse_weights,
    map_weight_masks,
    set_gradient_masks,
)
from sparsejax.types import PyTree

_TOPOLOGY = zlib.crc32(b"topology")
# Names of metrics, which `_account` and `_draw_run` read again.
_MASK_DENSITY, _DENSE_GRADIENT = "mask_density", "dense_gradient"

type InitialMask = Literal["random", "magnitude"]
"""Which weights the first masks keep."""

type MomentRule = Literal["stale", "zero", "mean"]
"""The optimizer's moments of a grown weight, see `reset_moments`.

"mean" (ours) applies to second moments; first moments start at 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    """How a method changes its masks, and when.

    Attributes:
      sparsity: that of all sparse weights together, by step.
      layer_density: how a density is divided among weights.
      initial_mask: which weights the first masks keep.
      updates: None = masks never change.
      annealing: fraction of the kept weights that an update replaces; None replaces nothing.
      growth: None = masks only lose entries.
      mix: of "mixed" growth, see `drop_and_grow`.
      moments: the optimizer's moments of grown weights.
      skips_optimizer: True = an update takes the place of the optimizer's step. False = it follows
        that step and sees its weights.
      rate_exponent: p in [0, 1]. The learning rate of a sparse weight, weight decay included, is
        multiplied by density^-p, with the density of its layer.

    Raises:
      ValueError: if a setting is unknown or out of range.
    """

    sparsity: SparsitySchedule
    layer_density: DensityMethod
    initial_mask: InitialMask = "random"
    updates: UpdateSteps | None = None
    annealing: CosineAnnealing | None = None
    growth: Growth | None = None
    mix: int = 3
    moments: MomentRule = "stale"
    skips_optimizer: bool = False
    rate_exponent: float = 0.0

    def __post_init__(self):
        # Raises where the method is unknown.
        layer_densities({"any": (1, 1)}, density=1.0, method=self.layer_density)
        for name, known in {
            "initial_mask": ("random", "magnitude"),
            "growth": (None, "gradient", "random", "mixed"),
            "moments": ("stale", "zero", "mean"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not 0 <= self.rate_exponent <= 1:
            raise ValueError(
                f"rate_exponent must be in [0, 1], got rate_exponent={self.rate_exponent}"
            )
        if self.mix < 1:
            raise ValueError(f"mix must be at least 1, got mix={self.mix}")

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether an update reads gradients of pruned weights."""
        return self.growth in ("gradient", "mixed")

    def due(self, step: jax.Array) -> jax.Array:
        """Return whether a step updates the masks.

        Args:
          step: i32[...].

        Returns:
          bool[...], like the step.
        """
        return jnp.bool_(False) if self.updates is None else self.updates.due(step)


def make_dynamic(
    name: str,
    topology: TopologyConfig,
    patterns: Mapping[str, WeightPattern],
    *,
    phases: tuple[Phase, ...],
) -> Recipe:
    """Return the recipe that trains under changing masks.

    Counts and schedules are arrays computed from the step, so that nothing recompiles within a
    phase. After an update every mask holds exactly what `count_kept` gives for the density of its
    layer. Statistics, which are also the metrics of steps that update: "mask_density/NAME", f32[L],
    kept fraction of a weight; "mask_density", f32[], of all sparse weights; "update_fraction",
    f32[]; "target_density", f32[]. The metric "dense_gradient" is 1 if the update read the gradient
    of pruned weights.

    Args:
      name: of the recipe.
      topology: how masks change.
      patterns: layer name -> pattern of its weight.
      phases: see `sparse_phase`.
    """
    return Recipe(
        name=name,
        phases=phases,
        init=functools.partial(_init, topology, patterns),
        choose_masks=functools.partial(_choose_masks, topology),
        skip_optimizer=functools.partial(_skip_optimizer, topology),
        transform_updates=functools.partial(_transform_updates, topology),
        update=functools.partial(_update, topology, patterns),
        metrics=functools.partial(_metrics, topology),
        account=_account,
        draw_run=functools.partial(_draw_run, name),
    )


def sparse_phase(name: str, **options) -> Phase:
    """Return a phase in which pruned weights count as 0 and are not trained.

    Args:
      name: of the phase.
      **options: other attributes of Phase.
    """
    return Phase(name, sparse_weights=True, masked_gradients=True, **options)


def _init(
    topology: TopologyConfig,
    patterns: Mapping[str, WeightPattern],
    masks: PyTree,
    params: PyTree,
    key: jax.Array,
) -> Sparsity:
    density = topology.sparsity.density(0)
    densities = _divide_density(topology, density, masks, params)

    def init(name, mask, w):
        keys = None
        if topology.initial_mask == "random":
            keys = _split_key(key, name, w.shape[0])
        init_layer = functools.partial(init_mask, patterns[name], density=densities[name])
        return jax.vmap(lambda mask, w, key: init_layer(mask, w, key=key))(mask, w, keys)

    masks = map_weight_masks(init, masks, params)
    statistics = {}
    if topology.updates is not None:
        statistics = _measure(masks, params, density, jnp.float32(0))
    return Sparsity(masks=masks, params={}, statistics=statistics, phase_start_step=jnp.int32(0))


def _choose_masks(
    topology: TopologyConfig, sparsity: Sparsity, *, step: jax.Array, phase: Phase
) -> PyTree:
    del phase
    # Pruned blocks have a gradient only in a step that reads it.
    wanted = topology.due(step) & topology.needs_dense_gradient
    return set_gradient_masks(sparsity.masks, wanted)


def _skip_optimizer(topology: TopologyConfig, step: jax.Array, phase: Phase) -> jax.Array:
    del phase
    return topology.due(step) & topology.skips_optimizer


def _transform_updates(
    topology: TopologyConfig, updates: PyTree, sparsity: Sparsity, phase: Phase
) -> PyTree:
    del phase
    if not topology.rate_exponent:
        return updates
    densities = compute_weight_density(sparsity.masks)

    def scale(name, mask, u):
        del mask
        return u * densities[name][:, None, None] ** -topology.rate_exponent

    return updates | {"model": map_sparse_weights(scale, sparsity.masks, updates["model"])}


def _update(
    topology: TopologyConfig,
    patterns: Mapping[str, WeightPattern],
    sparsity: Sparsity,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    *,
    step: jax.Array,
    key: jax.Array,
    phase: Phase,
    learning_rate: jax.Array,
) -> tuple[Sparsity, PyTree, PyTree]:
    del phase, learning_rate
    params = apply_weight_masks(sparsity.masks, params)
    if topology.updates is None:
        return sparsity, params, opt_state

    def update(state):
        sparsity, params, opt_state = state
        masks, statistics = _update_masks(
            topology, patterns, sparsity.masks, params, grads["model"], step=step, key=key
        )
        old = get_weight_masks(sparsity.masks)
        params = _update_weights(old, masks, params)
        opt_state = _update_moments(topology.moments, old, masks, opt_state)
        sparsity = dataclasses.replace(sparsity, masks=masks, statistics=statistics)
        return sparsity, params, opt_state

    state = (sparsity, params, opt_state)
    return jax.lax.cond(topology.due(step), update, lambda state: state, state)


def _metrics(
    topology: TopologyConfig, sparsity: Sparsity, *, step: jax.Array, phase: Phase
) -> dict[str, Measured]:
    del phase
    if topology.updates is None:
        return {}
    values = sparsity.statistics | {_DENSE_GRADIENT: jnp.float32(topology.needs_dense_gradient)}
    due = topology.due(step)
    return {name: keep_where(due, value) for name, value in values.items()}


def _account(values: Mapping[str, Any]) -> StepAccount:
    prefix = f"{_MASK_DENSITY}/"
    return StepAccount(
        dense_gradient=bool(values.get(_DENSE_GRADIENT)),
        weight_density={
            name.removeprefix(prefix): density
            for name, density in values.items()
            if name.startswith(prefix)
        },
    )


def _draw_run(name: str, rows: Sequence[Mapping[str, Any]], *, folder: Path) -> None:
    if any(_MASK_DENSITY in row for row in rows):
        from sparsejax.report.plots.topology import plot_topology

        title = f"{name}: weights kept, loss and FLOPs"
        plot_topology(rows, path=folder / "topology.png", title=title)


def _update_masks(
    topology: TopologyConfig,
    patterns: Mapping[str, WeightPattern],
    masks: PyTree,
    params: PyTree,
    grads: PyTree,
    *,
    step: jax.Array,
    key: jax.Array,
) -> tuple[PyTree, dict[str, jax.Array]]:
    density, fraction = topology.sparsity.density(step), jnp.float32(0)
    if topology.annealing is not None:
        fraction = topology.annealing.fraction(step)
    densities = _divide_density(topology, density, masks, params)
    by_name = {}
    if topology.needs_dense_gradient:
        map_sparse_weights(lambda name, _, g: by_name.setdefault(name, g), masks, grads)

    def update(name, mask, w):
        if topology.growth is None:
            prune = functools.partial(prune_mask, patterns[name], density=densities[name])
            return jax.vmap(prune)(mask, w)
        update_layer = functools.partial(
            update_mask,
            patterns[name],
            density=densities[name],
            update_fraction=fraction,
            growth=topology.growth,
            mix=topology.mix,
        )
        keys = _split_key(key, name, w.shape[0])
        return jax.vmap(lambda mask, w, grad, key: update_layer(mask, w, grad, key=key))(
            mask, w, by_name.get(name), keys
        )

    masks = map_weight_masks(update, masks, params)
    return masks, _measure(masks, params, density, fraction)


def _update_weights(old: Mapping[str, jax.Array], masks: PyTree, params: PyTree) -> PyTree:
    def update(name, new, w):
        return apply_topology(w, expand_mask(old[name], w.shape), expand_mask(new, w.shape))

    return map_sparse_weights(update, masks, params)


def _update_moments(
    rule: MomentRule, old: Mapping[str, jax.Array], masks: PyTree, opt_state: PyTree
) -> PyTree:
    def update(name, new, m, *, order):
        own_rule = "zero" if rule == "mean" and order == 1 else rule
        pair = expand_mask(old[name], m.shape), expand_mask(new, m.shape)
        return reset_moments(m, *pair, rule=own_rule)

    return map_moments(update, masks, opt_state)


def _measure(
    masks: PyTree, params: PyTree, density: jax.Array, fraction: jax.Array
) -> dict[str, jax.Array]:
    densities, shapes = compute_weight_density(masks), _get_shapes(masks, params)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = sum(densities[name].mean() * sizes[name] for name in sizes)
    return {f"{_MASK_DENSITY}/{name}": x for name, x in densities.items()} | {
        _MASK_DENSITY: kept / sum(sizes.values()),
        "target_density": density,
        "update_fraction": fraction,
    }


def _divide_density(
    topology: TopologyConfig, density: jax.Array, masks: PyTree, params: PyTree
) -> dict[str, jax.Array]:
    shapes = _get_shapes(masks, params)
    return layer_densities_at(density, shapes, method=topology.layer_density)


def _get_shapes(masks: PyTree, params: PyTree) -> dict[str, tuple[int, ...]]:
    shapes = {}

    def note(name, _, w):
        shapes[name] = w.shape
        return w

    map_sparse_weights(note, masks, params)
    return shapes


def _split_key(key: jax.Array, name: str, num_layers: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, _TOPOLOGY), zlib.crc32(name.encode()))
    return jax.random.split(key, num_layers)
