"""Every part that ships with the project; importing this registers all of them."""

import backbones
import trainers.engines
import trainers.optim
import trainers.zero
import zoo
from benchmarks import (
    augment,
    cifar10,
    datasets,
    distances,
    features,
    hf_images,
    latents,
    launchers,
    metrics,
    neighbours,
    pruning,
    ray_cluster,
    subprocesses,
    timm_features,
    tracking,
    vaes,
)

__all__ = [
    "augment",
    "backbones",
    "cifar10",
    "datasets",
    "distances",
    "features",
    "hf_images",
    "latents",
    "launchers",
    "metrics",
    "neighbours",
    "pruning",
    "ray_cluster",
    "subprocesses",
    "timm_features",
    "tracking",
    "trainers",
    "vaes",
    "zoo",
]
