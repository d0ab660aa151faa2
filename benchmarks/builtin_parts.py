"""Imports the modules that register the built-in parts; an entry point names this module."""

from importlib import import_module

MODULES = (
    "zoo",
    "backbones",
    "trainers.engines",
    "trainers.optim",
    "trainers.zero.engine",
    "benchmarks.data.cifar10",
    "benchmarks.data.derived.scaled",
    "benchmarks.data.digits",
    "benchmarks.data.edm_augment",
    "benchmarks.data.fashion_mnist",
    "benchmarks.data.hf_images",
    "benchmarks.data.image_folder",
    "benchmarks.data.mixtures",
    "benchmarks.latents.autoencoders",
    "benchmarks.latents.dataset",
    "benchmarks.metrics.distances",
    "benchmarks.metrics.feature_metrics",
    "benchmarks.metrics.features",
    "benchmarks.metrics.precision_recall",
    "benchmarks.metrics.timm_features",
    "benchmarks.records.recorders",
    "benchmarks.launchers.launcher",
    "benchmarks.launchers.ray_cluster",
    "benchmarks.launchers.subprocesses",
    "benchmarks.experiments.build",  # `run`, the root of every configuration
    "benchmarks.experiments.pruning",
    "benchmarks.grids.axes",  # `Grid`
)

for module in MODULES:
    import_module(module)
