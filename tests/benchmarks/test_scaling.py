"""The scaling law: its formulas by hand, and the page that shows its tables."""

import pathlib

import pytest

from benchmarks import scaling, scaling_law
from benchmarks.records import Results
from benchmarks.scaling_law import GRADIENTS, HEADS, SUMS, WEIGHTS, Mesh
from sparsejax.models import TransformerConfig
from sparsejax.patterns import BlockPattern

_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"
_TINY = TransformerConfig(
    num_layers=2,
    model_dim=8,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=16,
    vocab_size=10,
    max_length=32,
    causal=True,
    block=BlockPattern(block_q=8, block_kv=8),
)


def test_formulas_by_hand():
    # 2 x (4 x 64 + 2 x 128) weights, 512 of them with a mask, a table of 80.
    mesh = Mesh(data=2, fsdp=4, micro_batches=3, batch=24)
    assert mesh.sequences == 1 and mesh.devices == 8 and mesh.hosts == 1
    gathered, gradients, positions = 2 * (2048 + 512) + 320, 2048 + 320, 2 * 2 * 32 * 8
    assert scaling_law.predict(_TINY, mesh) == {
        WEIGHTS: 3 * 3 / 4 * (gathered + gradients + positions),
        GRADIENTS: 3 * gradients / 4,
        HEADS: 0,
        SUMS: 0,
    }
    mesh = Mesh(context=2, tensor=2, micro_batches=1, batch=3)
    sent = scaling_law.predict(_TINY, mesh)
    assert sent[GRADIENTS] == gradients / 2
    assert sent[HEADS] == 12 * 2 / 2 * 2 * 3 * 32 * 8 / 4
    assert sent[SUMS] == 12 * 2 * 3 * 32 * 8 / 2


def test_what_crosses_hosts():
    share = scaling_law.find_crossing_share
    assert share(Mesh(fsdp=8), WEIGHTS) == 0 and share(Mesh(fsdp=16), WEIGHTS) == 1 / 8
    assert share(Mesh(data=2, fsdp=8), GRADIENTS) == 1
    assert share(Mesh(data=4, fsdp=4), GRADIENTS) == 1 / 2
    assert share(Mesh(context=16), HEADS) == 8 / 15


def test_a_ring_between_hosts_goes_at_the_rate_of_their_networks():
    mesh = Mesh(data=2, fsdp=8)
    seconds = scaling_law.predict_seconds(_TINY, mesh)
    sent = scaling_law.predict(_TINY, mesh)
    assert seconds[GRADIENTS] == pytest.approx(sent[GRADIENTS] / 50e9)
    assert seconds[WEIGHTS] == pytest.approx(sent[WEIGHTS] / 450e9)
    tokens = scaling_law.find_balance(_TINY, mesh, GRADIENTS)
    assert tokens == pytest.approx(32 * 32 * seconds[GRADIENTS] / seconds["products"] / 16)


def test_the_law_is_drawn_for_equal_parts():
    for devices in (8, 64, 512, 1024):
        mesh = scaling_law.choose_mesh(devices)
        assert mesh.devices == devices and mesh.sequences in (1, 4)


def test_compiled_programs_send_what_is_predicted_and_fit():
    results = Results(scaling.RECORDS)
    points = [(size, mesh) for size, meshes in scaling.COMPILED.items() for mesh in meshes]
    assert len(points) == len(results.records)
    for size, mesh in points:
        values = results[scaling.make_key(size, mesh)]["values"]
        predicted = scaling_law.predict(scaling.make_model(size), mesh)
        for part, sent in predicted.items():
            assert values["sent"][part] == pytest.approx(sent, rel=0.02)
        assert values["sent"][scaling.REST] <= 0.02 * sum(predicted.values())
    peaks = {
        mesh.fsdp: results[scaling.make_key("1558m", mesh)]["values"]["memory"]["peak_bytes"]
        for mesh in (Mesh(), Mesh(fsdp=8), Mesh(fsdp=16))
    }
    assert peaks[1] < 52e9 and peaks[8] < 8.5e9 and peaks[16] < 6.2e9


def test_the_page_shows_the_tables():
    page = _PAGE.read_text()
    for table in scaling.make_tables(Results(scaling.RECORDS)):
        assert table in page
