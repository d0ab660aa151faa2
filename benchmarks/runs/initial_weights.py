"""Loads networks that were trained before: by a run of ours, exported, or by public code.

folder with result.json    a finished run of ours
folder with config.json    an exported network (backbones/pretrained/exported.py)
.safetensors, .pt, ...     a public checkpoint, read without executing it
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import registry
from backbones.network import FlowNetwork, warm_start
from backbones.pretrained.exported import CONFIG, load_exported
from backbones.pretrained.imports import import_file
from backbones.pretrained.public_files import SUFFIXES
from backbones.pretrained.transformer_parts import NUM_HEADS
from benchmarks.experiments.experiment import Experiment
from benchmarks.runs.result import RESULT, measured_weights
from registry import gin_setup
from trainers.checkpoints.weights import load_module
from zoo.teachers import Frozen

log = logging.getLogger(__name__)


def is_run(path: Path) -> bool:
    """Whether this is one of our runs, or a folder that may have been meant as one."""
    if path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()):
        return False
    return (path / RESULT).exists() or not (path / CONFIG).exists()


def load_pretrained(
    path: Path, layout: str = "", num_heads: int | None = None, num_classes: int | None = None
) -> FlowNetwork:
    """The network of an exported folder or of a public checkpoint.

    `num_heads` and `num_classes` are for a checkpoint whose tensors do not tell them.
    """
    if path.is_dir():
        return load_exported(path)
    imported = import_file(path, layout, num_heads, num_classes)
    for note in imported.notes:
        log.warning("%s: %s", path, note)
    return imported.network()


def load_initial_weights(experiment: Experiment) -> None:
    """Load the weights that run.start_from and frozen.checkpoint name into the run's networks."""
    if experiment.start_from:
        with _naming("run.start_from", experiment.start_from):
            source = _pretrained(experiment, experiment.start_from, experiment.start_layout)
            warm_start(experiment.net, source)
    if experiment.distilled is None or not experiment.distilled[0].checkpoint:
        return
    teacher, network = experiment.distilled
    folder = Path(teacher.checkpoint)
    with _naming("frozen.checkpoint", teacher.checkpoint):
        if is_run(folder):
            _load_run(folder, network)
            _check_network(experiment, folder)
        else:
            network = _pretrained(experiment, teacher.checkpoint, teacher.layout)
        attach_teacher(experiment, teacher, network)


@contextmanager
def _naming(key: str, value: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key} = {value!r}: {error}") from None


def _pretrained(experiment: Experiment, path: str, layout: str) -> FlowNetwork:
    """An exported network or that of a public checkpoint; ValueError for data of another shape."""
    fields = getattr(experiment.net.trunk, "fields", {})
    num_heads = None if fields.get("dim") in NUM_HEADS else fields.get("num_heads")
    dataset = experiment.dataset
    network = load_pretrained(Path(path), layout, num_heads, dataset.num_classes)
    made_for = getattr(network.trunk, "fields", {})
    for what, theirs, ours in (
        ("shape", tuple(made_for["shape"]), tuple(dataset.shape)),
        ("number of classes", made_for["num_classes"], dataset.num_classes),
    ):
        if theirs != ours:
            raise ValueError(
                f"the {what} of its data is {theirs}; that of {dataset.name} is {ours}"
            )
    return network


def _load_run(folder: Path, network: FlowNetwork) -> None:
    weights = measured_weights(folder)
    try:
        load_module(weights, network)
    except ValueError as error:
        raise ValueError(
            f"{error}. A teacher of another backbone is taken from the folder that objective-zoo "
            "export makes of the run, with run.warm_start = False"
        ) from None


def _check_network(experiment: Experiment, folder: Path) -> None:
    """ValueError unless both networks have the same settings of backbone and parametrisation.

    Some settings, such as the number of attention heads, change no shape of a weight.
    """
    meaning = registry.parametrisations.name_of(experiment.net.parametrisation)
    names = (f"{experiment.backbone_name}.", f"{meaning}.", "run.parametrisation")
    was, now = (
        {
            plain: value
            for key, value in gin_setup.bindings_of(text).items()
            if (plain := key.split("/")[-1]).startswith(names)
            and not plain.endswith(".decoder_from")  # which a velocity does not depend on
        }
        for text in ((folder / "operative.gin").read_text(), gin_setup.operative_text())
    )
    if differing := [k for k in was | now if was.get(k) != now.get(k)]:
        shown = [
            f"{k} = {was.get(k, 'unbound')} there, {now.get(k, 'unbound')} here" for k in differing
        ]
        raise ValueError(f"its network is another one: {'; '.join(shown)}")


def attach_teacher(experiment: Experiment, teacher: Frozen, network: FlowNetwork) -> None:
    """Give the teacher its network, from which the student starts.

    It does not if run.start_from names another start, nor with run.warm_start = False.
    """
    teacher.attach(network.to(experiment.device))
    if experiment.start_from or not experiment.warm_start:
        return
    try:
        warm_start(experiment.net, network)
    except ValueError as error:
        raise ValueError(
            f"{error}. To keep it as the teacher, bind run.warm_start = False, with which the "
            "student starts anew, or bind run.start_from to other weights for the student"
        ) from None
