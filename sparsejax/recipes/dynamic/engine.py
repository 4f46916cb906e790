"""The engine of dynamic sparse training: masks of weights that drop and grow while training.

  forward      y = x (W * M); pruned weights are 0 and have no gradient
  every step   optimizer, then W <- W * M
  an update    the gradient of all weights decides what grows; M and W change; no optimizer step,
               unless the method takes one

Which method it is, its schedules and its growth say: see `mst.py`, `rigl.py`, `set.py`,
`magnitude.py`, `static.py`. Sparsity and density are of the chosen weights: linear layers of
blocks, and the embedding of tokens, which is the weight of the head too and has one mask.

Legend: L layers, K rows and N columns of a weight.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

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
from sparsejax.patterns import NMPattern, WeightPattern
from sparsejax.recipes.dynamic.layer_topology import begin_mask, change_mask, prune_mask
from sparsejax.recipes.recipe import Phase, Recipe, Sparsity
from sparsejax.recipes.weight_masks import (
    compute_weight_density,
    get_weight_masks,
    map_moments,
    map_sparse_weights,
    map_weight_masks,
    set_gradient_masks,
)
from sparsejax.types import PyTree

_TOPOLOGY = zlib.crc32(b"topology")

type InitialMask = Literal["random", "magnitude"]
"""Which weights a run begins with."""

type MomentRule = Literal["stale", "zero", "mean"]
"""What becomes of the optimizer's moments of a grown weight, see `reset_moments`.

Of "mean" (ours), first moments begin at 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """What a method of dynamic sparse training does to masks, and when.

    Attributes:
      sparsity: SparsitySchedule of all sparse weights together.
      layer_density: DensityMethod, how a density is shared out among weights.
      initial_mask: InitialMask.
      updates: UpdateSteps; None = masks stay as they begin.
      annealing: CosineAnnealing of the fraction replaced; None replaces nothing.
      growth: Growth; None = masks only lose entries.
      mix: int, of "mixed" growth, see `drop_and_grow`.
      moments: MomentRule.
      skips_optimizer: bool, an update takes the place of the optimizer's step. Otherwise it comes
        after it and sees the weights that it left.
      rate_exponent: float in [0, 1], p: the learning rate of a sparse weight is density^-p times
        that of others, weight decay included, with the density of its layer.

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


def make_dynamic(
    name: str,
    topology: Topology,
    patterns: Mapping[str, WeightPattern],
    *,
    phases: tuple[Phase, ...],
    enter_phase: Callable[[Sparsity, Phase], Sparsity] | None = None,
) -> Recipe:
    """Return the recipe of a topology that changes.

    Args:
      name: str.
      topology: Topology.
      patterns: layer name -> WeightPattern.
      phases: tuple of Phase; see `sparse_phase`.
      enter_phase: as of Recipe; None changes nothing.

    Returns:
      Recipe. Counts and schedules are arrays of the step: within a phase nothing recompiles. Every
      mask holds exactly what `count_kept` says of its layer's density after an update. Statistics,
      and metrics of the steps that update: "mask_density/NAME", f32[L], kept fraction of a weight,
      and "mask_density", f32[], of all sparse weights; "update_fraction", f32[];
      "target_density", f32[]; "dense_gradient", 1 if the update needed that.
    """

    def init(masks, params, key):
        density = topology.sparsity.density(0)
        densities = _share_out(topology, density, masks, params)

        def begin(name, mask, w):
            keys = None
            if topology.initial_mask == "random":
                keys = _split_key(key, name, w.shape[0])
            choose = functools.partial(begin_mask, patterns[name], density=densities[name])
            return jax.vmap(lambda mask, w, key: choose(mask, w, key=key))(mask, w, keys)

        masks = map_weight_masks(begin, masks, params)
        statistics = {}
        if topology.updates is not None:
            statistics = _measure(masks, params, density, jnp.float32(0))
        return Sparsity(
            masks=masks, params={}, statistics=statistics, phase_start_step=jnp.int32(0)
        )

    def choose_masks(sparsity, *, step, phase):
        del phase
        # Blocks outside the mask have a gradient only in the step that asks for it.
        wanted = is_due(step) & topology.needs_dense_gradient
        return set_gradient_masks(sparsity.masks, wanted)

    def mask_gradients(grads, sparsity, phase):
        del phase
        return grads | {"model": _mask(sparsity.masks, grads["model"])}

    def transform_updates(updates, sparsity, phase):
        del phase
        if not topology.rate_exponent:
            return updates
        densities = compute_weight_density(sparsity.masks)

        def scale(name, mask, u):
            del mask
            return u * densities[name][:, None, None] ** -topology.rate_exponent

        model = map_sparse_weights(scale, sparsity.masks, updates["model"])
        return updates | {"model": model}

    def is_due(step):
        return jnp.bool_(False) if topology.updates is None else topology.updates.due(step)

    def skip_optimizer(step, phase):
        del phase
        return is_due(step) & topology.skips_optimizer

    def update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
        del phase, learning_rate
        params = _mask(sparsity.masks, params)
        if topology.updates is None:
            return sparsity, params, opt_state

        def change(state):
            sparsity, params, opt_state = state
            masks, statistics = _change_masks(
                topology, patterns, sparsity.masks, params, grads["model"], step=step, key=key
            )
            old = get_weight_masks(sparsity.masks)

            def move(name, new, w):
                return apply_topology(w, expand_mask(old[name], w.shape), expand_mask(new, w.shape))

            def forget(name, new, m, *, order):
                rule = topology.moments
                if rule == "mean" and order == 1:
                    rule = "zero"
                masks = expand_mask(old[name], m.shape), expand_mask(new, m.shape)
                return reset_moments(m, *masks, rule=rule)

            params = map_sparse_weights(move, masks, params)
            opt_state = map_moments(forget, masks, opt_state)
            sparsity = dataclasses.replace(sparsity, masks=masks, statistics=statistics)
            return sparsity, params, opt_state

        state = (sparsity, params, opt_state)
        return jax.lax.cond(is_due(step), change, lambda state: state, state)

    def metrics(sparsity, *, step, phase):
        del phase
        if topology.updates is None:
            return {}
        values = sparsity.statistics | {"dense_gradient": float(topology.needs_dense_gradient)}
        due = is_due(step)
        return {name: jnp.where(due, value, jnp.nan) for name, value in values.items()}

    recipe = Recipe(
        name=name,
        phases=phases,
        init=init,
        choose_masks=choose_masks,
        mask_gradients=mask_gradients,
        skip_optimizer=skip_optimizer,
        transform_updates=transform_updates,
        update=update,
        metrics=metrics,
    )
    return recipe if enter_phase is None else recipe._replace(enter_phase=enter_phase)


def fraction_to_steps(name: str, fraction: float, num_steps: int) -> int:
    """Turn a fraction of a run into steps.

    Args:
      name: str, what the message calls the fraction.
      fraction: float in (0, 1].
      num_steps: int, steps of the run.

    Returns:
      int.

    Raises:
      ValueError: if the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {name}={fraction}")
    return round(fraction * num_steps)


def sparse_phase(name: str, **options) -> Phase:
    """Return a phase in which pruned weights count as 0 and are not trained.

    Args:
      name: str.
      **options: other attributes of Phase.

    Returns:
      Phase.
    """
    return Phase(name, sparse_weights=True, masked_gradients=True, **options)


def check_patterns(
    patterns: Mapping[str, WeightPattern], *, constant_sparsity: float | None = None
) -> None:
    """Refuse patterns that a method cannot follow.

    Args:
      patterns: layer name -> pattern of its weight.
      constant_sparsity: float, the sparsity of the whole run; None if it changes.

    Raises:
      ValueError: if there is no weight; or one of n:m whose sparsity would not be that of the run,
        or transposable, or beside weights of other patterns.
    """
    shown = {name: str(pattern) for name, pattern in patterns.items()}
    if not patterns:
        raise ValueError(f"sparse_weights must name at least one weight, got {shown}")
    groups = {p for p in patterns.values() if isinstance(p, NMPattern)}
    if not groups:
        return
    if constant_sparsity is None:
        raise ValueError(
            "sparse_weights must be 'unstructured' or blocks such as '64x64' where the sparsity "
            f"changes while training, got {shown}"
        )
    if len({*patterns.values()}) > 1 or any(p.transposable for p in groups):
        raise ValueError(
            f"sparse_weights must be one n:m pattern, not transposable, or none of n:m, got {shown}"
        )
    (pattern,) = groups
    if constant_sparsity != 1 - pattern.n / pattern.m:
        raise ValueError(
            f"sparsity must be {1 - pattern.n / pattern.m:g}, that of the pattern '{pattern}', got "
            f"sparsity={constant_sparsity}"
        )


def _change_masks(
    topology: Topology,
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
    densities = _share_out(topology, density, masks, params)
    by_name = {}
    if topology.needs_dense_gradient:
        map_sparse_weights(lambda name, _, g: by_name.setdefault(name, g), masks, grads)

    def change(name, mask, w):
        if topology.growth is None:
            prune = functools.partial(prune_mask, patterns[name], density=densities[name])
            return jax.vmap(prune)(mask, w)
        change_layer = functools.partial(
            change_mask,
            patterns[name],
            density=densities[name],
            update_fraction=fraction,
            growth=topology.growth,
            mix=topology.mix,
        )
        keys = _split_key(key, name, w.shape[0])
        return jax.vmap(lambda mask, w, grad, key: change_layer(mask, w, grad, key=key))(
            mask, w, by_name.get(name), keys
        )

    masks = map_weight_masks(change, masks, params)
    return masks, _measure(masks, params, density, fraction)


def _measure(
    masks: PyTree, params: PyTree, density: jax.Array, fraction: jax.Array
) -> dict[str, jax.Array]:
    densities, shapes = compute_weight_density(masks), _get_shapes(masks, params)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = sum(densities[name].mean() * sizes[name] for name in sizes)
    return {f"mask_density/{name}": x for name, x in densities.items()} | {
        "mask_density": kept / sum(sizes.values()),
        "target_density": density,
        "update_fraction": fraction,
    }


def _share_out(
    topology: Topology, density: jax.Array, masks: PyTree, params: PyTree
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


def _mask(masks: PyTree, tree: PyTree) -> PyTree:
    return map_sparse_weights(
        lambda name, mask, x: jnp.where(expand_mask(mask, x.shape), x, 0), masks, tree
    )


def _split_key(key: jax.Array, name: str, num_layers: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, _TOPOLOGY), zlib.crc32(name.encode()))
    return jax.random.split(key, num_layers)
