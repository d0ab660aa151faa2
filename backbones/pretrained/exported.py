"""A network as a folder that needs neither gin nor the run that made it.

    model.safetensors   the weights
    config.json         the architecture: backbone and fields, heads, parametrisation, conventions
    README.md           a model card, as the Hugging Face hub wants one

`load_exported(folder)` gives the network back. `huggingface_hub.upload_folder(folder_path=folder,
repo_id=...)` publishes it; nothing here talks to a network.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch

import registry
from backbones.network import FlowNetwork
from backbones.noise import VpNoise
from backbones.parametrisations.equations import RawVelocity
from backbones.pretrained.size_limits import check_numbers, no_larger_than
from backbones.pretrained.tensors import check_fit, load_into, save_tensors, tensor_shapes
from backbones.trunk import TrunkModule
from registry.folders import file_in, file_sha256
from registry.plugins import load_plugins
from registry.protocols import Parametrisation

CONFIG, MODEL = "config.json", "model.safetensors"
HEAD_FIELDS = "head_fields"  # {head: its fields}, of heads that have any
DEFINING = ("network", "backbone", "fields", "heads")  # the network that the weights belong to
# In format 1, which earlier versions read, `network` says what the readouts mean. Format 2 has a
# `parametrisation` for every other meaning.
FORMER: dict[str, Parametrisation] = {"flow": RawVelocity(), "noise": VpNoise()}
HIDDEN = ("fields", "format", "defined_by", "weights_sha256")  # what the model card leaves out
CONVENTIONS = (
    "t = 0 is data, t = 1 noise; net(x, t, r, {'label': y}) -> {'v': dx/dt at t, 'u': (x - x_r) / "
    "(t - r)}; label -1 is none"
)


def save_exported(net: FlowNetwork, out: Path, **about: str) -> Path:
    """Write a network into an empty or new folder; `about` are more lines for its config.json.

    ValueError if the folder is not empty or the network cannot be described in JSON.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    config = {**_architecture(net), **about, "conventions": CONVENTIONS}
    json.dumps(config)  # an error comes before anything is written
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / MODEL, net.state_dict())
    config["weights_sha256"] = file_sha256(out / MODEL)
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").write_text(_card(config))
    return out


def load_exported(folder: Path | str) -> FlowNetwork:
    """The network in a folder that `save_exported` wrote, on the CPU, in evaluation mode.

    Its sizes are those of the tensors in the file of weights: a configuration that asks for more or
    larger ones is refused before a network is built. ValueError if the folder is not as it was
    written, or if this version cannot read it.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = file_in(folder, MODEL)
    shapes = tensor_shapes(weights)
    if (recorded := config.get("weights_sha256")) and file_sha256(weights) != recorded:
        raise ValueError(
            f"{weights} is not the file that was exported: its sha256 is not that in {CONFIG}. "
            "It was damaged or exchanged: restore it, or export the network again"
        )
    load_plugins()
    for values in (config["fields"], *config.get(HEAD_FIELDS, {}).values()):
        check_numbers(values, shapes, folder / CONFIG)
    with torch.device("meta"), no_larger_than(shapes, folder / CONFIG):
        outline = _built(config, folder)
    check_fit(weights, shapes, {name: tuple(x.shape) for name, x in outline.state_dict().items()})
    net = _built(config, folder)
    load_into(weights, net)
    return net.eval()


def _built(config: Mapping[str, Any], folder: Path) -> FlowNetwork:
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["fields"].items()
    }
    try:
        trunk = registry.backbones.get(config["backbone"])(**given)
    except TypeError as error:
        raise ValueError(
            f"{folder / CONFIG} is of another version of this package: {error}"
        ) from None
    given = config.get(HEAD_FIELDS, {})
    heads = [registry.heads.get(name)(trunk, **given.get(name, {})) for name in config["heads"]]
    return FlowNetwork(trunk, heads, _parametrisation(config, folder))


def _parametrisation(config: Mapping[str, Any], folder: Path) -> Parametrisation:
    if config["format"] == 1:
        return FORMER[config["network"]]
    described = config["parametrisation"]
    try:
        made = registry.parametrisations.get(described["name"])(**described["fields"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} is of another version of this package: {error}"
        ) from None
    return cast(Parametrisation, made)


def _read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json; ValueError unless it is as `save_exported` wrote it."""
    path = file_in(folder, CONFIG)
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}; `objective-zoo export RUN` writes such folders"
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    form = config.get("format") if isinstance(config, dict) else None
    if form is None and isinstance(config, dict):
        raise ValueError(
            f"{path} was not written by `objective-zoo export`: it is the configuration of another "
            f"package. Give the file of weights itself, and its layout; {folder} has "
            f"{', '.join(sorted(f.name for f in folder.iterdir() if f.is_file())[:8])}"
        )
    if form not in (1, 2):
        raise ValueError(f"{path} is of format {form!r}; this version reads formats 1 and 2")
    if config.get("defined_by") != _digest(config):
        raise ValueError(
            f"{path} is not as it was exported: the weights belong to other values of "
            f"{', '.join(_defining(config))}. Restore it, or export the network again"
        )
    network, backbone, given, heads = (config.get(name) for name in DEFINING)
    if not (
        network in FORMER
        and (form == 1 or _is_parametrisation(config["parametrisation"]))
        and isinstance(backbone, str)
        and isinstance(given, dict)
        and isinstance(heads, list)
        and all(isinstance(head, str) for head in heads)
        and _are_fields(config.get(HEAD_FIELDS, {}))
    ):
        raise ValueError(
            f"{path} does not describe a network: {', '.join(_defining(config))} are damaged"
        )
    return config


def _is_parametrisation(described: Any) -> bool:
    return (
        isinstance(described, dict)
        and isinstance(described.get("name"), str)
        and isinstance(described.get("fields"), dict)
    )


def _are_fields(described: Any) -> bool:
    return isinstance(described, dict) and all(isinstance(one, dict) for one in described.values())


def _defining(config: Mapping[str, Any]) -> tuple[str, ...]:
    more = ("parametrisation",) if config.get("format") != 1 else ()
    return (*DEFINING, *more, *((HEAD_FIELDS,) if HEAD_FIELDS in config else ()))


def _digest(config: Mapping[str, Any]) -> str:
    defining = json.dumps([config.get(name) for name in _defining(config)], sort_keys=True)
    return f"sha256 {hashlib.sha256(defining.encode()).hexdigest()}"


def _architecture(net: FlowNetwork) -> dict[str, Any]:
    backbone = registry.backbones.name_of(net.trunk)
    if not isinstance(net.trunk, TrunkModule):
        raise ValueError(
            f"the backbone {backbone!r} does not say what it was made with; "
            "make its class inherit from backbones.trunk.TrunkModule instead of nn.Module"
        )
    for name, value in net.trunk.fields.items():
        if not _is_plain(value):
            raise ValueError(f"{backbone}.{name} = {value!r} cannot be written as JSON")
    for name, head in net.heads.items():
        given: dict[str, Any] = getattr(head, "fields", {})
        takes = list(inspect.signature(type(head)).parameters)[1:]
        if more := [field for field in takes if field not in given]:
            raise ValueError(
                f"the head {name!r} takes {', '.join(more)} beside the trunk, and does not say "
                "with which values it was made. Keep them in its attribute `fields`, a dict by name"
            )
        for field, value in given.items():
            if not _is_plain(value):
                raise ValueError(f"{name}.{field} = {value!r} cannot be written as JSON")
    former = [name for name, known in FORMER.items() if known == net.parametrisation]
    described = {} if former else {"parametrisation": _described(net.parametrisation)}
    of_heads = {name: head.fields for name, head in net.heads.items() if hasattr(head, "fields")}
    config = {
        "format": 1 if former else 2,
        "network": former[0] if former else "flow",
        "backbone": backbone,
        "fields": net.trunk.fields,
        "heads": list(net.heads),
        **({HEAD_FIELDS: of_heads} if of_heads else {}),
        **described,
        "outputs": list(net.keys),
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    return {**config, "defined_by": _digest(config)}


def _described(parametrisation: Any) -> dict[str, Any]:
    name = registry.parametrisations.name_of(parametrisation)
    values = {f.name: getattr(parametrisation, f.name) for f in fields(parametrisation)}
    for field, value in values.items():
        if not _is_plain(value):
            raise ValueError(f"{name}.{field} = {value!r} cannot be written as JSON")
    return {"name": name, "fields": values}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)


def _card(config: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {config[name]}" for name in config if name not in HIDDEN]
    return "\n".join(
        [
            "---",
            "library_name: objective-zoo",
            "tags: [flow-matching, few-step]",
            "---",
            f"# {config['backbone']} {config.get('objective', '')}".rstrip(),
            "",
            *lines,
            "",
            "```python",
            "from backbones.pretrained.exported import load_exported",
            'net = load_exported("FOLDER")',
            "```",
            "",
        ]
    )
