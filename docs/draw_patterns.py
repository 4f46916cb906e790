"""Draw the blocks that SPION's variants and SAT keep of one and the same model.

    python train.py --config=configs/sat_quickstart.py --workdir=runs/patterns \
        --config.num_steps=300 --config.recipe.sat.min_skewness=1e9
    python docs/draw_patterns.py runs/patterns

The run stays dense, so that its last checkpoint holds what every method decides by: the attention
maps of the last batch, and SAT's fitted parameters.
"""

import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from configs import sat_quickstart
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import parse_config
from sparsejax.masks import block_density, sat_pattern, spion_pattern
from sparsejax.training.setup import prepare_run

_DENSITY = 0.15
_FILTER_SIZE = 15


def main(workdir: str) -> None:
    """Draw `docs/patterns.png`.

    Args:
      workdir: folder of a run of SAT that is still dense.
    """
    run = prepare_run(parse_config(sat_quickstart.get_config().to_dict()))
    info = find_checkpoints(pathlib.Path(workdir) / "checkpoints")[0]
    state, _ = restore(info, run.make_abstract_state("dense"))
    maps, pooled = (state.sparsity.statistics[name] for name in ("map_before", "pooled"))
    options = {"block_size": run.config.model.block_size, "filter_size": _FILTER_SIZE}
    flood = {"quantile": 1 - _DENSITY, **options}
    diagonal = 1 / pooled.shape[-1]
    patterns = {
        "SPION-CF": spion_pattern(maps, variant="cf", **flood),
        "SPION-F": spion_pattern(maps, variant="f", **flood),
        "SPION-C": spion_pattern(maps, variant="c", density=_DENSITY + diagonal, **flood),
        "SAT": sat_pattern(state.sparsity.params["pattern"], density=_DENSITY),
    }
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    figure.suptitle(
        f"{run.config.data.source}, blocks of {options['block_size']}, step {info.step}"
    )
    grid = figure.subplots(len(pooled), 1 + len(patterns), squeeze=False)
    for layer, row in enumerate(grid):
        # The root brings out weak blocks beside strong ones.
        row[0].imshow(np.sqrt(np.asarray(pooled[layer])), cmap="viridis")
        row[0].set_title("pooled attention" if layer == 0 else "")
        row[0].set_ylabel(f"layer {layer}")
        for panel, (name, pattern) in zip(row[1:], patterns.items(), strict=True):
            panel.imshow(np.asarray(pattern[layer]), cmap="Blues", vmin=0, vmax=1)
            kept = float(block_density(pattern)[layer])
            panel.set_title(f"{name}: {kept:.0%} kept")
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
    figure.savefig(pathlib.Path(__file__).parent / "patterns.png")


if __name__ == "__main__":
    main(sys.argv[1])
