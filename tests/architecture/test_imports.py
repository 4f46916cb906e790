"""Who may import whom. The arrows keep kernels free of models, and masks free of modules."""

import subprocess
import sys

import pytest

from tests.architecture.module_imports import find_imports, find_needs
from tests.architecture.project_files import ROOT, list_modules

# What training a run, and tools beside it, are made of.
RUN = (
    "sparsejax.batch",
    "sparsejax.recipes",
    "sparsejax.models",
    "sparsejax.optimizer",
    "sparsejax.data",
    "sparsejax.config",
    "sparsejax.checkpoint",
    "sparsejax.accounting",
    "sparsejax.checks",
    "sparsejax.dotted",
    "sparsejax.durable",
    "sparsejax.patterns",
    "sparsejax.pretrained",
    "sparsejax.processes",
    "sparsejax.report",
    "sparsejax.report.plots",
    "sparsejax.sharding",
    "sparsejax.shares",
    "sparsejax.strict_json",
    "sparsejax.types",
)

# What each part of the project may import of the project. A part may always import itself.
ARROWS = {
    "pallas_kernels": (
        "pallas_kernels.hopper",
        "pallas_kernels.meshes",
        "pallas_kernels.mosaic_call",
        "pallas_kernels.transposable_mask",
    ),
    "pallas_kernels.aot": (
        "pallas_kernels.kernel_dumps",
        "pallas_kernels.kernel_report",
        "pallas_kernels.triton_programs",
    ),
    "pallas_kernels.kernel_dumps": ("pallas_kernels.kernel_report",),
    "pallas_kernels.kernel_report": (),
    "pallas_kernels.triton_programs": (),
    # What kernels for Hopper have in common knows none of the ops.
    "pallas_kernels.hopper": ("pallas_kernels.mosaic_call",),
    "pallas_kernels.mosaic_call": ("pallas_kernels.meshes",),
    "pallas_kernels.meshes": (),
    # The search for transposable masks is one of the masks, and has kernels: of all ops, masks may
    # import this one.
    "pallas_kernels.transposable_mask": ("pallas_kernels",),
    "sparsejax.types": (),
    "sparsejax.process_watch": (),
    "sparsejax.processes": ("sparsejax.process_watch", "sparsejax.types"),
    "sparsejax.batch": (),
    "sparsejax.patterns": ("sparsejax.types",),
    "sparsejax.checks": (),
    "sparsejax.masks": (
        "pallas_kernels.transposable_mask",
        "sparsejax.checks",
        "sparsejax.patterns",
        "sparsejax.types",
    ),
    "sparsejax.sharding": ("sparsejax.types",),
    "sparsejax.dotted": (),
    "sparsejax.recipes": (
        "sparsejax.checks",
        "sparsejax.dotted",
        "sparsejax.masks",
        "sparsejax.patterns",
        "sparsejax.processes",
        "sparsejax.report.plots",
        "sparsejax.sharding",
        "sparsejax.shares",
        "sparsejax.types",
    ),
    "sparsejax.models": (
        "pallas_kernels",
        "sparsejax.checks",
        "sparsejax.dotted",
        "sparsejax.patterns",
        "sparsejax.sharding",
        "sparsejax.types",
    ),
    "sparsejax.optimizer": (
        "sparsejax.checks",
        "sparsejax.recipes",
        "sparsejax.shares",
        "sparsejax.types",
    ),
    "sparsejax.data": (
        "sparsejax.batch",
        "sparsejax.dotted",
        "sparsejax.durable",
        "sparsejax.strict_json",
    ),
    "sparsejax.durable": (),
    "sparsejax.shares": (),
    "sparsejax.interrupts": (),
    "sparsejax.strict_json": (),
    # Weights of other libraries: of models and of nothing that trains.
    "sparsejax.pretrained": (
        "sparsejax.checks",
        "sparsejax.data",
        "sparsejax.durable",
        "sparsejax.models",
        "sparsejax.patterns",
        "sparsejax.strict_json",
        "sparsejax.types",
    ),
    # The one place where a model decides its own masks before it trains.
    "sparsejax.calibration": (
        "sparsejax.checks",
        "sparsejax.masks",
        "sparsejax.models",
        "sparsejax.patterns",
        "sparsejax.types",
    ),
    # Text out of models: of those and of nothing that trains.
    "sparsejax.generation": ("sparsejax.checks", "sparsejax.data", "sparsejax.models"),
    "sparsejax.config": (
        "sparsejax.checks",
        "sparsejax.models",
        "sparsejax.recipes",
        "sparsejax.optimizer",
        "sparsejax.data",
        "sparsejax.patterns",
    ),
    "sparsejax.accounting": (
        "sparsejax.models",
        "sparsejax.recipes",
        "sparsejax.patterns",
        "sparsejax.processes",
        "sparsejax.types",
    ),
    "sparsejax.checkpoint": (
        "sparsejax.config",
        "sparsejax.data",
        "sparsejax.durable",
        "sparsejax.processes",
        "sparsejax.strict_json",
        "sparsejax.types",
    ),
    "sparsejax.report": (
        "sparsejax.accounting",
        "sparsejax.durable",
        "sparsejax.processes",
        "sparsejax.recipes",
        "sparsejax.report.plots",
        "sparsejax.strict_json",
    ),
    # Of no room that imports recipes, so that those may draw.
    "sparsejax.report.plots": ("sparsejax.durable",),
    "sparsejax.training": RUN,
    "sparsejax.tools": (
        "sparsejax.generation",
        "sparsejax.pretrained",
        "sparsejax.tools.plan",
        "sparsejax.tools.prove",
        "sparsejax.training",
        *RUN,
    ),
    # The one place where a run meets the compiler for absent GPUs, which models have no use for.
    "sparsejax.tools.plan": (
        "sparsejax.tools",
        "sparsejax.accounting",
        "sparsejax.batch",
        "sparsejax.training",
        "sparsejax.recipes",
        "sparsejax.optimizer",
        "sparsejax.data",
        "sparsejax.config",
        "sparsejax.report",
        "sparsejax.models",
        "sparsejax.sharding",
        "sparsejax.types",
        "pallas_kernels.aot",
    ),
    # The one place where a run meets the doctor.
    "sparsejax.tools.prove": (
        "sparsejax.tools",
        "sparsejax.config",
        "sparsejax.report",
        "pallas_kernels",
        "sparsejax.processes",
    ),
    "sparsejax": ("sparsejax.api", "sparsejax.pretrained", "sparsejax.version"),
    # What the package itself offers.
    "sparsejax.api": (
        "sparsejax.checkpoint",
        "sparsejax.config",
        "sparsejax.data",
        "sparsejax.dotted",
        "sparsejax.generation",
        "sparsejax.models",
        "sparsejax.recipes",
        "sparsejax.report",
        "sparsejax.tools",
        "sparsejax.training",
    ),
    "sparsejax.version": (),
    # What `train.py` and the command `sparsejax` share.
    "sparsejax.command": (
        "sparsejax.config",
        "sparsejax.interrupts",
        "sparsejax.training",
        "sparsejax.tools",
        "sparsejax.checkpoint",
        "sparsejax.processes",
        "sparsejax.report",
    ),
    # One of its commands is the doctor's own.
    "sparsejax.__main__": (
        "sparsejax.command",
        "sparsejax.config",
        "sparsejax.version",
        "pallas_kernels",
    ),
    "configs": ("sparsejax.config",),
    "train": ("sparsejax.command",),
    "benchmarks": ("pallas_kernels", "sparsejax", "configs"),
}

# Where each package from outside may be imported.
HOMES = {
    "jax": ("pallas_kernels", "sparsejax", "benchmarks"),
    # Instructions that Pallas does not have are written with the compiler that JAX brings along.
    "jaxlib": (
        "pallas_kernels.mosaic_fences",
        "pallas_kernels.nm_matmul.mosaic_sm90.wgmma_sp",
        "pallas_kernels.nm_matmul.mosaic_sm90.thread_words",
    ),
    # An extra, imported when a kernel is launched.
    "jax_triton": ("pallas_kernels.triton.launch",),
    "triton": (
        "pallas_kernels.attention_map.triton",
        "pallas_kernels.block_sparse_attention.triton",
        "pallas_kernels.block_sparse_matmul.triton",
        "pallas_kernels.nm_matmul.triton",
        "pallas_kernels.transposable_mask.triton",
    ),
    "numpy": ("pallas_kernels", "sparsejax", "benchmarks"),
    "flax": (
        "sparsejax.calibration",
        "sparsejax.generation",
        "sparsejax.models",
        "sparsejax.pretrained",
        "sparsejax.training",
        "benchmarks",
    ),
    "optax": ("sparsejax.optimizer", "sparsejax.training", "benchmarks"),
    "scipy": ("sparsejax.calibration", "benchmarks.experiments.paired"),
    "orbax": ("sparsejax.checkpoint.save", "benchmarks.same_training"),
    "ml_collections": (
        "configs",
        "sparsejax.command",
        "sparsejax.config.command_line",
        "sparsejax.tools.kernel_calls",
    ),
    "absl": ("train", "sparsejax.command", "sparsejax.tools.kernel_calls"),
    "tensorboardX": ("sparsejax.report.tensorboard",),
    "matplotlib": ("sparsejax.report.plots", "benchmarks"),
    "torch": ("benchmarks.attention_torch", "benchmarks.nm_matmul_torch"),
    "grain": ("sparsejax.data",),
    "array_record": ("sparsejax.data",),
    "tensorflow_datasets": ("sparsejax.data",),
    "tokenizers": ("sparsejax.data", "sparsejax.pretrained"),
    # Of an extra: the formats of weights of other libraries.
    "safetensors": ("sparsejax.pretrained",),
    "gguf": ("sparsejax.pretrained",),
    "ml_dtypes": ("sparsejax.pretrained",),
    "PIL": ("sparsejax.data",),
    "pyarrow": ("sparsejax.data",),
    "tqdm": ("sparsejax.data",),
}

# Whole steps must run on a machine that has no more than these.
STEP_MODULES = ("sparsejax.training.state", "sparsejax.training.step", "sparsejax.accounting.flops")
STEP_NEEDS = {"jax", "jaxlib", "flax", "optax", "numpy"}


def is_within(name, parent):
    return name == parent or name.startswith(parent + ".")


def find_part(module):
    """Return the narrowest part of the project that a dotted name belongs to, or None."""
    return max((part for part in ARROWS if is_within(module, part)), key=len, default=None)


def find_violations(module, source):
    part, violations = find_part(module), []
    for name in sorted(find_imports(source)):
        package, target = name.split(".")[0], find_part(name)
        if name.startswith("."):
            violations.append(f"{module} imports {name}: write absolute imports")
        elif target is not None:
            if target != part and not any(is_within(target, to) for to in ARROWS[part]):
                violations.append(f"{module} imports {name}: {part} may not import {target}")
        elif package not in sys.stdlib_module_names:
            homes = HOMES.get(package, ())
            if not any(is_within(module, home) for home in homes):
                violations.append(f"{module} imports {name}: its place is {homes or 'nowhere'}")
    return violations


def read_sources():
    return {name: (ROOT / path).read_text() for name, path in list_modules().items()}


def test_every_import_follows_the_arrows():
    sources = read_sources()
    violations = [line for name in sources for line in find_violations(name, sources[name])]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("module", STEP_MODULES)
def test_steps_need_no_data_package(module):
    assert find_needs(module, read_sources()) <= STEP_NEEDS


def test_importing_the_kernels_does_not_import_triton():
    look = "import sys, pallas_kernels; print({'triton', 'jax_triton'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "module, source",
    [
        ("pallas_kernels.op", "import triton"),
        ("pallas_kernels.hopper.ring", "from pallas_kernels.nm_matmul import packing"),
        ("pallas_kernels.hopper.launch", "from pallas_kernels import dispatch"),
        ("pallas_kernels.op", "from sparsejax import types"),
        ("pallas_kernels.op", "def f():\n    import flax"),
        ("sparsejax.masks.weights.decay", "import optax"),
        ("sparsejax.masks.weights.decay", "from sparsejax.models import transformer"),
        ("sparsejax.masks.weights.decay", "from sparsejax import models"),
        ("sparsejax.masks.weights.decay", "from pallas_kernels import nm_matmul"),
        ("sparsejax.recipes.nm.fst", "from pallas_kernels.transposable_mask import op"),
        ("sparsejax.models.mlp", "from sparsejax.masks.weights.decay import decay"),
        ("sparsejax.recipes.dense", "import sparsejax.training.state"),
        ("sparsejax.training.step", "from orbax.checkpoint import v1"),
        ("sparsejax.training.loop", "import configs.base"),
        ("sparsejax.training.loop", "import unheard_of"),
        ("sparsejax.training.loop", "from . import step"),
        ("sparsejax.training.loop", "from pallas_kernels import aot"),
        ("sparsejax.tools.plan", "from pallas_kernels import dispatch"),
        ("sparsejax.command", "from pallas_kernels.doctor import visit"),
        ("train", "from sparsejax import masks"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(find_violations(module, source)) == 1


def test_needs_are_followed_through_modules_and_packages():
    sources = {
        "a": "import grain",
        "a.b": "import a.c.d",
        "a.c": "",
        "a.c.d": "from a.e import f\nimport os",
        "a.e": "import numpy.linalg\ndef f():\n    import matplotlib",
        "a.x": "import torch",
    }
    assert find_needs("a.b", sources) == {"grain", "numpy"}
