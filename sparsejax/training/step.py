"""The algorithm: one jitted step, and its evaluation twin.

Legend: B batch, T position, V vocabulary, C classes, L layers.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax.batch import get_targets
from sparsejax.models import (
    AttentionOptions,
    Implementation,
    LinearOptions,
    ModelOutput,
)
from sparsejax.optimizer import Optimizer, compute_b1, compute_learning_rate
from sparsejax.recipes import (
    Observation,
    Phase,
    Recipe,
    apply_weight_masks,
    keep_where,
)
from sparsejax.training.block_lists import BlockLists
from sparsejax.training.state import TrainState, trainable

type Batch = dict[str, jax.Array]
type Metrics = dict[str, jax.Array]

STEP_METRICS = ("loss", "accuracy", "grad_norm", "learning_rate", "skipped")
"""What every training step tells, whatever the recipe: `skipped` is 0 or 1."""

# Folded into the key of a step: pruned gradients draw other numbers than dropout.
_PRUNING = zlib.crc32(b"pruning")


def make_train_step(
    graphdef: nnx.GraphDef,
    recipe: Recipe,
    phase: Phase,
    optimizer: Optimizer,
    *,
    implementation: Implementation | None = None,
    weight_implementation: Implementation | None = None,
    num_micro_batches: int = 1,
    probes: bool = False,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Batch], tuple]:
    """Return the step of one phase: loss, gradient, recipe, optimizer, recipe.

    A step is skipped if its loss, its gradient, or what would come of it (weights, the recipe's
    parameters, optimizer state) is not finite: it changes nothing but the two counters of the
    state, and says so in `skipped`. So a state that was finite stays finite.

    A step that probes shows the recipe the attention maps of its own forward pass, averaged over
    the batch and heads, and what the phase makes of each head's, before it acts on the gradient.

    Args:
      graphdef: nnx.GraphDef of the model.
      phase: Phase, static.
      implementation: kernel of sparse attention, None for the best on the device.
      weight_implementation: kernel of sparse weights, None for the best on the device.
      num_micro_batches: int, the batch is split into so many parts whose gradients are averaged.
      probes: bool, whether the recipe observes attention in this step.
      label_smoothing: float in [0, 1), share of the target that is spread over all classes.

    Returns:
      Function (state, batch, block_lists=None) -> (state, metrics), to be jitted with the state
      donated; of a step that probes, (state, metrics, Observation). Without `block_lists`, those of
      the state's masks, the model builds them. Metrics are f32[]: those of `STEP_METRICS`, whose
      loss is the smoothed one that is trained; and those of the recipe, Measured, which a skipped
      step does not know. A skipped step does not ask for the next phase.
    """
    options = make_options(phase, implementation, weight_implementation)

    def transform(weights, state):
        sparsity = dataclasses.replace(state.sparsity, params=weights["recipe"])
        return weights | {"model": recipe.transform_params(weights["model"], sparsity, phase)}

    def compute_loss(seen, masks, state, batch, key, count, block_lists):
        sparsity = dataclasses.replace(state.sparsity, params=seen["recipe"])
        output = _apply(
            graphdef, seen["model"], masks, batch, options, block_lists, key=key, probe=probes
        )
        totals = compute_totals(output, batch, label_smoothing=label_smoothing)
        loss = totals["loss"] / count
        auxiliary = recipe.auxiliary_loss(sparsity, output.attention_maps, phase)
        metrics = {"loss": loss, "accuracy": totals["correct"] / count}
        return loss + auxiliary, (metrics, output.attention_maps)

    def compute_gradients(weights, state, batch, key, block_lists):
        # Of the whole batch: parts with fewer targets weigh less, as they do without parts.
        count = _spread_weights(batch).sum() / num_micro_batches
        # Transformed once, whatever the number of parts; so is the sum of their gradients, back.
        seen, pull_back = jax.vjp(lambda weights: transform(weights, state), weights)
        masks = recipe.choose_masks(state.sparsity, step=state.step, phase=phase)

        def differentiate(part, part_key):
            return jax.grad(compute_loss, has_aux=True)(
                seen, masks, state, part, part_key, count, block_lists
            )

        total = _sum_over_parts(differentiate, batch, key, num_micro_batches)
        grads, observed = jax.tree.map(lambda x: x / num_micro_batches, total)
        return pull_back(grads)[0], observed

    def train_step(state: TrainState, batch: Batch, block_lists: BlockLists = None):
        key = jax.random.fold_in(state.key, state.step)
        weights = trainable(state.params, state.sparsity)
        dense_grads, (metrics, attention_maps) = compute_gradients(
            weights, state, batch, key, block_lists
        )
        dense_norm = optax.tree.norm(dense_grads)
        finite_grads = jnp.isfinite(metrics["loss"]) & jnp.isfinite(dense_norm)

        observed, observation = state.sparsity, None
        if probes:
            observed, observation = recipe.observe(observed, attention_maps, phase)
        grads = recipe.mask_gradients(dense_grads, observed, phase)
        if phase.masked_gradients:
            grads = grads | {"model": apply_weight_masks(observed.masks, grads["model"])}
        # If pruned weights alone had gradients that are not finite, this tells.
        grad_norm = jnp.where(jnp.isfinite(dense_norm), optax.tree.norm(grads), dense_norm)
        grads = recipe.transform_gradients(optimizer.clip(grads), weights, observed, phase)
        when = (phase, state.step, state.sparsity.phase_start_step)
        rate, b1 = compute_learning_rate(optimizer, *when), compute_b1(optimizer, *when)
        updates, opt_state = optimizer.update(grads, state.opt_state, weights, b1=b1)
        updates = recipe.transform_updates(updates, observed, phase)
        new_weights = jax.tree.map(lambda w, u: w + rate * u, weights, updates)
        skip = recipe.skip_optimizer(state.step, phase)
        new_weights, opt_state = _select(skip, (weights, state.opt_state), (new_weights, opt_state))

        sparsity = dataclasses.replace(observed, params=new_weights["recipe"])
        sparsity, params, opt_state = recipe.update(
            sparsity,
            new_weights["model"],
            opt_state,
            dense_grads,
            step=state.step,
            key=key,
            phase=phase,
            learning_rate=rate,
        )
        finite = finite_grads & _all_finite((params, sparsity.params, opt_state))
        new = (sparsity, params, opt_state)
        old = (state.sparsity, state.params, state.opt_state)
        sparsity, params, opt_state = _select(finite, new, old)
        metrics |= {"grad_norm": grad_norm, "learning_rate": rate}
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        metrics |= _report(recipe.metrics(sparsity, step=state.step, phase=phase), finite)
        new_state = TrainState(
            step=state.step + 1,
            num_skipped=jnp.where(finite, 0, state.num_skipped + 1),
            params=params,
            sparsity=sparsity,
            opt_state=opt_state,
            key=state.key,
        )
        if observation is None:
            return new_state, metrics
        observation = Observation(
            change_phase=observation.change_phase & finite,
            metrics=_report(observation.metrics, finite),
        )
        return new_state, metrics, observation

    return train_step


def explain_skip(metrics: Mapping[str, float]) -> str:
    """Say why a step was skipped.

    Args:
      metrics: those of `STEP_METRICS`, as numbers.

    Example:
      >>> explain_skip({"loss": 2.5, "grad_norm": float("inf")})
      'the gradient was not finite'
    """
    if not math.isfinite(metrics["loss"]):
        return "the loss was not finite"
    if not math.isfinite(metrics["grad_norm"]):
        return "the gradient was not finite"
    return "the weights or the optimizer state would not be finite"


def make_eval_step(
    graphdef: nnx.GraphDef,
    recipe: Recipe,
    phase: Phase,
    *,
    implementation: Implementation | None = None,
    weight_implementation: Implementation | None = None,
    num_micro_batches: int = 1,
) -> Callable[[TrainState, Batch], Metrics]:
    """Return the function that sums loss and correct answers over one batch.

    Args:
      graphdef: nnx.GraphDef of the model.
      phase: Phase, static.
      implementation: kernel of sparse attention, None for the best on the device.
      weight_implementation: kernel of sparse weights, None for the best on the device.
      num_micro_batches: int, parts that the batch is split into to save memory.

    Returns:
      Function (state, batch, block_lists=None) -> {"loss", "correct", "count"}, f32[] sums; the
      loss is the plain cross-entropy, whatever is trained.
    """
    options = make_options(phase, implementation, weight_implementation)

    def eval_step(state: TrainState, batch: Batch, block_lists: BlockLists = None) -> Metrics:
        params = recipe.transform_params(state.params, state.sparsity, phase)

        def evaluate(part, _):
            output = _apply(graphdef, params, state.sparsity.masks, part, options, block_lists)
            return compute_totals(output, part)

        return _sum_over_parts(evaluate, batch, state.key, num_micro_batches)

    return eval_step


def compute_totals(output: ModelOutput, batch: Batch, *, label_smoothing: float = 0.0) -> Metrics:
    """Sum cross-entropy and correct answers over what has a weight above 0.

    With e = label_smoothing, the target is (1 - e) one-hot + e / V.

    Args:
      output: ModelOutput of the batch.
      batch: dict of arrays, as `sparsejax.batch` says for each task.
      label_smoothing: float, static.

    Returns:
      dict of f32[]: "loss" in nats and "correct", summed; "count", tokens or examples.

    Numerics:
      Everything is f32.

    References:
      Label smoothing: Szegedy et al., arXiv:1512.00567, section 7.
    """
    targets, weights = get_targets(batch), _spread_weights(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, targets)
    if label_smoothing:
        uniform = jax.nn.logsumexp(output.logits, -1) - output.logits.mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    correct = output.logits.argmax(-1) == targets
    # Where, not times: what has weight 0 must not leak a NaN.
    return {
        "loss": jnp.where(weights > 0, losses * weights, 0.0).sum(),
        "correct": jnp.where(correct, weights, 0.0).sum(),
        "count": weights.sum(),
    }


def _spread_weights(batch: Batch) -> jax.Array:
    """Return the weight of every target: an example's weight is that of all its tokens."""
    weights, shape = batch["loss_weights"], get_targets(batch).shape
    return jnp.broadcast_to(
        weights.reshape(*weights.shape, *[1] * (len(shape) - weights.ndim)), shape
    )


def make_options(
    phase: Phase,
    implementation: Implementation | None = None,
    weight_implementation: Implementation | None = None,
) -> tuple[AttentionOptions, LinearOptions]:
    """Return what a phase means for attention and for linear layers.

    Args:
      phase: Phase, static.
      implementation: kernel of sparse attention, None for the best on the device.
      weight_implementation: kernel of sparse weights, None for the best on the device.
    """
    return (
        AttentionOptions(
            sparse=phase.sparse_attention,
            position_mask=phase.position_mask,
            choose_blocks=phase.choose_blocks,
            pool_map=phase.pool_map,
            pruned_logits=phase.pruned_logits,
            implementation=implementation,
        ),
        LinearOptions(
            sparse=phase.sparse_weights,
            grad_pruning=phase.grad_pruning,
            implementation=weight_implementation,
        ),
    )


def _apply(graphdef, params, masks, batch, options, block_lists, *, key=None, probe=False):
    """Run the model; without a key, without dropout and without gradients to be pruned."""
    model = nnx.merge(graphdef, params, masks)
    attention_options, linear_options = options
    pruning_key = None
    if key is None:
        linear_options = linear_options._replace(grad_pruning="none")
    elif linear_options.grad_pruning != "none":
        pruning_key = jax.random.fold_in(key, _PRUNING)
    return model(
        batch["inputs"],
        decoder_tokens=batch.get("decoder_inputs"),
        mask=batch.get("mask"),
        dropout_key=key,
        attention_options=attention_options,
        linear_options=linear_options,
        pruning_key=pruning_key,
        block_lists=block_lists,
        probe=probe,
    )


def _sum_over_parts(function, batch, key, num_parts):
    """Sum function(part, key of the part) over the parts of a batch, one after the other."""
    if num_parts == 1:
        return function(batch, jax.random.fold_in(key, 0))
    # Strided: every part takes examples from every device that the batch is dealt out to.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_parts))
    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _all_finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _report(metrics, finite):
    """Make a recipe's metrics unknown in a skipped step, which did nothing to report."""
    return {name: keep_where(finite, metric) for name, metric in metrics.items()}


def _select(condition, if_true, if_false):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)
