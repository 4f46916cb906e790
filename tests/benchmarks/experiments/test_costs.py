"""What a run of the MST experiment had spent when it was validated."""

import json

import pytest
from matplotlib.figure import Figure

from benchmarks.experiments.costs import measure_flops, plot_costs, sum_costs


def test_flops_add_up_to_each_validation(tmp_path):
    rows = [{"kind": "phase", "step": 0, "step_flops": 10.0}]
    rows += [{"kind": "train", "step": s, "step_flops": f} for s, f in ((1, 10.0), (2, 4.0))]
    rows += [{"kind": "validation", "step": 2, "validation_loss": 5.0}]
    rows += [{"kind": "train", "step": 3, "step_flops": 1.0}]
    rows += [{"kind": "validation", "step": 3, "validation_loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert measure_flops(tmp_path) == {"spent_flops": [[2, 14.0], [3, 15.0]]}


def _record(summary, curves=None):
    return {"values": {"summary": summary, "curves": curves}}


def test_costs_add_up_the_steps_of_each_phase(tmp_path, monkeypatch):
    spent = {"num_steps": 4, "spent_flops": [[2, 20.0], [4, 28.0]]}
    summary = spent | {"warm-up_first_step": 0, "restoration_first_step": 3}
    curves = {"validation_loss": [[2, 5.0], [4, 3.0]]}
    other = {"validation_loss": [[2, 6.0], [4, 2.0]]}
    methods = {
        "MST": [_record(summary, curves), _record(summary, other)],
        "SET": [_record(spent | {"sparse_first_step": 0}, curves)],
    }
    timing = {
        "MST": [
            _record({"warm-up_step_seconds": 1.0, "restoration_step_seconds": seconds})
            for seconds in (2.0, 3.0, 10.0)
        ]
    }
    costs = sum_costs(methods, timing)
    assert costs["MST"] == ([5.5, 2.5], [20, 28], [2, 6])
    assert costs["SET"] == ([5.0, 3.0], [20, 28], None)

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_costs(costs, tmp_path / "costs.png")
    by_flops, by_time = drawn[0].axes
    assert [line.get_label() for line in by_flops.lines] == ["MST", "SET"]
    (line,) = by_time.lines
    assert line.get_xdata().tolist() == [2, 6] and line.get_ydata() == pytest.approx([5.5, 2.5])

    plot_costs(sum_costs(methods, {}), tmp_path / "costs.png")
    (by_flops,) = drawn[1].axes
    assert len(by_flops.lines) == 2
