"""All experiments, by name."""

from benchmarks.experiments import (
    attention_data,
    attention_listops,
    copying,
    fst_small,
    mst_budgets,
    mst_small,
    spion_small,
)
from benchmarks.experiments.plan import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        copying.HIDDEN_PERMUTATION,
        copying.FIXED_LAG,
        copying.ASSOCIATIVE_RECALL,
        attention_data.ATTENTION_IMAGES,
        attention_data.ATTENTION_TEXT,
        attention_listops.LISTOPS_TIMING,
        spion_small.SPION_SMALL_TIMING,
        fst_small.FST_SMALL,
        fst_small.FST_IMAGES,
        mst_small.MST_SMALL,
        mst_budgets.MST_SMALL_BUDGETS,
        mst_budgets.MST_SMALL_LONG,
        mst_small.MST_SMALL_PATTERNS,
        mst_small.MST_SMALL_TIMING,
    )
}
"""Name -> Experiment."""
