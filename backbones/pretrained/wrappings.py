"""Finds a network's tensors inside what training scripts wrap around them.

A script may keep its weights under `ema` and `model`, beside the state of an optimizer; wrappers of
PyTorch put `module.`, `_orig_mod.` and others before or inside the names, in any order and number.
Here the contents become one list of tensors by dotted names. A tensor that every layout has, such
as `x_embedder.proj.weight`, then shows where the networks are. An average of the weights is taken
before the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

# What wrappers of PyTorch add: data parallel, torch.compile, FSDP, activation checkpointing, ZeRO.
_WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
_LANDMARKS = (
    "x_embedder.proj.weight", "map_layer0.weight",
    "t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight", "map_layer1.weight",
)  # fmt: skip
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
_PLAIN_AVERAGES = ("ema", "net_ema", "model_ema", "ema_model", "ema_state_dict", "ema_net")
_PLAIN_NETWORKS = ("model", "net", "state_dict", "model_state_dict", "")
_DEEPEST = 8  # mappings inside mappings


def unwrapped(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the network by its own names; and what was left out, with the reason.

    ValueError if there is no tensor, if nothing tells which of several networks is meant, or if two
    different tensors have one name.
    """
    contents = _flat(state)
    tensors = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
    if not tensors:
        kinds = sorted({type(value).__name__ for value in contents.values()})
        raise ValueError(
            f"it holds no tensors; its {len(contents)} entries are {', '.join(kinds[:5]) or 'none'}"
        )
    bare = {name: _bare(name) for name in tensors}
    places = _places(set(bare.values()))
    chosen = _chosen(places)
    found: dict[str, Tensor] = {}
    used = set()
    for name, value in tensors.items():
        if not bare[name].startswith(chosen) or _elsewhere(bare[name], chosen, places):
            continue
        if not value.ndim:
            continue  # a counter, such as `num_updates`
        own = bare[name].removeprefix(chosen)
        if own in found and not found[own].equal(value):
            raise ValueError(
                f"it has two different tensors that are both {own!r}, such as {name!r}"
            )
        found[own] = value
        used.add(name)
    reason = "not the averaged weights" if _is_average(chosen) else "not the weights"
    return found, dict.fromkeys(_shortened(contents, used), reason)


def _flat(state: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, Any]:
    """The contents of mappings inside mappings, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            found |= _flat(value, f"{before}{name}.", depth + 1)
        else:
            found[f"{before}{name}"] = value
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _places(names: Collection[str]) -> list[str]:
    """The prefixes under which there are networks; one that is empty if no landmark is found."""
    for landmark in _LANDMARKS:
        found = {
            name.removesuffix(landmark)
            for name in names
            if name == landmark or name.endswith(f".{landmark}")
        }
        if found:
            return sorted(found)
    return [""]


def _is_average(place: str) -> bool:
    return bool(_AVERAGE.search(place))


def _chosen(places: Sequence[str]) -> str:
    averages = [place for place in places if _is_average(place)]
    candidates = averages or list(places)
    if len(candidates) == 1:
        return candidates[0]
    for plain in _PLAIN_AVERAGES if averages else _PLAIN_NETWORKS:
        same = [place for place in candidates if place.rstrip(".").split(".")[-1] == plain]
        if len(same) == 1:
            return same[0]
    raise ValueError(
        f"it holds {len(candidates)} networks ({', '.join(map(repr, candidates[:5]))}), and "
        "nothing tells which is meant. Save the one that you want: "
        "torch.save(state[NAME], 'weights.pt')"
    )


def _elsewhere(name: str, chosen: str, places: Sequence[str]) -> bool:
    """Whether the tensor belongs to another network, which lies below the chosen one's prefix."""
    others = [p for p in places if p != chosen and p.startswith(chosen) and len(p) > len(chosen)]
    return any(name.startswith(place) for place in others)


def _shortened(contents: Mapping[str, Any], used: set[str]) -> list[str]:
    """What was not used, by the shortest dotted names that hold nothing which was used."""
    kept = {".".join(name.split(".")[:i]) for name in used for i in range(name.count(".") + 2)}
    found: dict[str, None] = {}
    for name in contents:
        if name in used:
            continue
        parts = name.split(".")
        lengths = range(1, len(parts) + 1)
        short = next(
            (".".join(parts[:i]) for i in lengths if ".".join(parts[:i]) not in kept), name
        )
        found[short] = None
    return list(found)
