"""Train, draw the loss, load the model and let it write.

python -m examples.train_and_use runs/example
"""

import sys

import jax
import jax.numpy as jnp

import sparsejax
from configs import spion_small
from sparsejax.report.metrics import read_metrics


def write(model, tokenizer, text, length):
    """Continue a text with the likeliest token, one after another."""
    predict = jax.jit(lambda tokens: model(tokens[None]).logits[0, -1].argmax())
    ids = tokenizer.encode([text.encode()])[0].tolist()
    # Of one length, so that one program serves every step.
    window = len(ids)
    for _ in range(length):
        ids.append(int(predict(jnp.asarray(ids[-window:], jnp.int32))))
    return tokenizer.decode(ids).decode(errors="replace")


def main(workdir, **settings):
    """Train the model of `configs/spion_small.py`, or resume it, and use it.

    Args:
      workdir: folder of the run.
      **settings: that differ from those of the config, dots written as double underscores.

    Returns:
      tuple of steps, losses and what the model wrote.
    """
    config = spion_small.get_config()
    for name, value in settings.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    sparsejax.train(config, workdir)

    rows = [row for row in read_metrics(f"{workdir}/metrics.jsonl") if row["kind"] == "train"]
    steps, losses = zip(*((row["step"], row["loss"]) for row in rows), strict=True)

    model, _, tokenizer = sparsejax.load_model(workdir)
    return steps, losses, write(model, tokenizer, "import numpy as", length=40)


if __name__ == "__main__":
    import matplotlib.pyplot as plt

    steps, losses, written = main(sys.argv[1])
    plt.plot(steps, losses)
    plt.xlabel("step")
    plt.ylabel("loss, nats per byte")
    plt.savefig(f"{sys.argv[1]}/loss.png")
    print(written)
