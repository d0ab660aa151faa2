"""Sampling for measurement: the same noise and labels in every arm, at every NFE and batch size.

Row i of the noise depends on the seed and i alone, so that samples of two methods start from the
same points, and the first rows of a large set are those of a small one. Labels are the reference's
own, row by row, so both sides have the same classes. A sampler always runs on a block of 256 rows,
and what it draws comes from a generator of that block's own: how many rows the network sees at a
time, or how blocks are shared out over processes, changes no draw.

Where the data are codes, such as a VAE's latents, a metric sees what they decode to, as uint8.
Where they are scaled (`@scaled()`), it sees them in their original scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

import registry
from backbones.network import FlowNetwork
from benchmarks.data.pictures import to_uint8
from registry.protocols import (
    Coded,
    Cond,
    Dataset,
    Metric,
    Network,
    Sampler,
    rows_of,
    scaled_by,
)
from registry.sampling import outputs_for

BLOCK = 256  # rows whose noise is from one generator; part of what a seed means
DECODED = 64  # codes whose pixels are held in float32 at a time
_NOISE, _SAMPLER = 0, 1


@runtime_checkable
class Referenced(Protocol):
    """A metric that knows its value on real data, and what its values depend on."""

    def floor(self, reference: Tensor, num: int) -> Iterator[tuple[str, float]]: ...
    def provenance(self, reference: Tensor, num: int) -> dict[str, str]: ...


def evaluate(
    net: Network,
    sampler: Sampler,
    nfe_list: Sequence[int],
    metric: Metric,
    dataset: Dataset,
    num: int,
    seed: int,
    batch_size: int = BLOCK,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, float]]:
    """("nfe{n}/{name}", value) for `num` samples at each NFE, then the metric's floors by name."""
    runs = samplers_for(sampler, nfe_list)
    reference, cond = reference_of(dataset, num, seed)
    x1 = noise(dataset.shape, num, seed).to(device)
    labels = None if cond is None else _cyclic(cond, num, device)
    for nfe, run in runs.items():
        samples = decoded(dataset, draw(net, run, x1, labels, seed, batch_size))
        for name, value in values_of(metric, samples, reference):
            yield f"nfe{nfe}/{name}", value
    if isinstance(metric, Referenced):
        yield from metric.floor(reference, num)


def values_of(metric: Metric, samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]:
    """The metric's pairs as plain numbers; ValueError for another pair, and for a name given twice.

    A tensor or an array of one number counts as that number.
    """
    name = called(metric)
    given: Any = metric(samples, reference)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ValueError(
            f"{name} gave {type(given).__name__}; a metric yields pairs of a name and a number, "
            f'such as yield "{name}", value.item()'
        )
    seen: set[str] = set()
    for pair in given:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f"{name} gave {repr(pair)[:100]}; a metric yields pairs of a name and a number"
            )
        key, value = pair
        if key in seen:
            raise ValueError(f"{name} gave the value {key!r} twice; give each a name of its own")
        seen.add(key)
        if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, Real):
            raise ValueError(
                f"{name} gave {key!r} = {repr(value)[:100]}; each value must be one number, "
                "such as value.mean().item()"
            )
        yield key, float(value)


def called(metric: Metric) -> str:
    """The name as gin has it, or else that of the function or class."""
    if registry.kind_of(metric) is registry.metrics:
        return f"@{registry.metrics.name_of(metric)}()"
    return str(getattr(metric, "__qualname__", type(metric).__qualname__))


def provenance(metric: Metric, dataset: Dataset, num: int, seed: int) -> dict[str, str]:
    """What the values depend on besides the network; working it out also checks the metric."""
    about = {"data": dataset.identity(), "samples": str(num), "seed": str(seed)}
    if isinstance(metric, Referenced):
        about |= metric.provenance(reference_of(dataset, num, seed)[0], num)
    return about


def samplers_for(sampler: Sampler, nfe_list: Sequence[int]) -> dict[int, Sampler]:
    """The sampler at each NFE; ValueError for those that it cannot have, all at once."""
    if not nfe_list or len(set(nfe_list)) != len(nfe_list):
        raise ValueError(
            f"the NFEs to evaluate are {list(nfe_list)}; give each NFE once, such as (1, 2)"
        )
    if not dataclasses.is_dataclass(type(sampler)):
        raise ValueError(f"{type(sampler).__name__} is no dataclass, so its nfe cannot be replaced")
    runs, refused = possible_samplers(sampler, nfe_list)
    if refused:
        lines = "\n  ".join(f"nfe {nfe}: {reason}" for nfe, reason in refused.items())
        raise ValueError(f"{type(sampler).__name__} cannot run at these NFEs:\n  {lines}")
    return runs


def possible_samplers(
    sampler: Sampler, nfe_list: Sequence[int]
) -> tuple[dict[int, Sampler], dict[int, str]]:
    """The sampler at each NFE that it can have, and why it cannot have the others."""
    replace: Any = dataclasses.replace  # a Protocol cannot say "a dataclass"
    runs: dict[int, Sampler] = {}
    refused: dict[int, str] = {}
    for nfe in nfe_list:
        try:
            runs[nfe] = replace(sampler, nfe=nfe)
        except ValueError as error:
            refused[nfe] = str(error)
    return runs, refused


def reference_of(dataset: Dataset, num: int, seed: int) -> tuple[Tensor, Cond | None]:
    """Real data for a reference of `num` rows, and `num` others whose score is the floor."""
    if isinstance(dataset, Coded):
        return _decoded_reference(dataset, num, seed)
    rows, cond = dataset.reference(2 * num, seed)
    if bad := int((~rows.flatten(1).isfinite().all(1)).sum()):
        raise ValueError(
            f"{bad} of {len(rows)} reference rows of {dataset.name} are not finite, and no sample "
            "can be compared with them; remove these rows from the data set"
        )
    return decoded(dataset, rows), cond


@lru_cache(maxsize=1)  # every evaluation of a run asks for it, and decoding is slow
def _decoded_reference(dataset: Dataset, num: int, seed: int) -> tuple[Tensor, Cond | None]:
    codes, cond = dataset.reference(2 * num, seed)
    return decoded(dataset, codes), cond


def decoded(dataset: Dataset, samples: Tensor) -> Tensor:
    """Samples [n *d] as people and metrics see them: decoded to uint8, or in their own scale."""
    if not isinstance(dataset, Coded):
        factor = scaled_by(dataset)
        return samples if factor == 1 else samples / factor
    return torch.cat([to_uint8(dataset.decode(part)) for part in samples.split(DECODED)])


def draw(
    net: Network,
    sampler: Sampler,
    x1: Tensor,
    cond: Cond | None = None,
    seed: int = 0,
    batch_size: int = BLOCK,
    first: int = 0,
) -> Tensor:
    """Samples [n *d] from noise x1 [n *d], on its device, the network in evaluation mode.

    A network of ours is asked for the outputs alone that the sampler reads, so that heads may leave
    out the others.
    x1 is the noise of the seed's rows `first`, `first` + 1, ...; `first` is where a block starts.
    """
    assert first % BLOCK == 0, f"no block starts at row {first}"
    blocks = []
    read: Network = net
    if isinstance(net, FlowNetwork):
        read = partial(net, asked=outputs_for(sampler, net.keys))
    with evaluation_mode(net), torch.no_grad():
        for start in range(0, len(x1), BLOCK):
            rows = slice(start, start + BLOCK)
            rng = _generator(seed, _SAMPLER, first + start, x1.device)
            part = rows_of(cond, rows)
            blocks.append(sampler(_in_batches(read, batch_size), x1[rows], part, rng))
            _check_shape(sampler, blocks[-1], x1[rows])
    samples = torch.cat(blocks)
    broken = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(broken):
        raise FloatingPointError(
            f"{type(sampler).__name__} at nfe {sampler.nfe} gave {len(broken)} of {len(samples)} "
            f"samples that are not finite, the first at row {first + int(broken[0])}; the network "
            "diverged or was loaded wrongly"
        )
    return samples


def _check_shape(sampler: Sampler, samples: Any, x1: Tensor) -> None:
    """ValueError unless the sampler gave one sample for each row of the noise."""
    found = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
    if found != tuple(x1.shape):
        raise ValueError(
            f"{type(sampler).__name__} at nfe {sampler.nfe} gave {found} from noise of shape "
            f"{tuple(x1.shape)}; a sampler returns a tensor of the shape of its noise"
        )


def _in_batches(net: Network, size: int) -> Network:
    """The same network, given `size` rows at a time."""

    def batched(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        if len(x) <= size:
            return net(x, t, r, cond)
        parts = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = rows_of(cond, rows)
            parts.append(net(x[rows], t[rows], r[rows], part))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return batched


def noise(shape: Sequence[int], n: int, seed: int, first: int = 0) -> Tensor:
    """Standard normal noise [n *shape] on the CPU, row i depending on seed and i alone.

    The rows are `first`, `first` + 1, ...; `first` is where a block starts.
    """
    assert first % BLOCK == 0, f"no block starts at row {first}"
    blocks = [
        torch.randn(BLOCK, *shape, generator=_generator(seed, _NOISE, first + start))
        for start in range(0, n, BLOCK)
    ]
    return torch.cat(blocks)[:n]


@contextmanager
def evaluation_mode(net: Network) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own mode afterwards.

    A network that is a plain function has no mode.
    """
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _cyclic(cond: Cond, n: int, device: torch.device | str) -> Cond:
    """n rows; where there are fewer, they are repeated from the first one on."""
    return {name: c[torch.arange(n) % len(c)].to(device) for name, c in cond.items()}


def _generator(
    seed: int, purpose: int, start: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A stream for this seed, purpose and row, unrelated to those of neighbouring seeds."""
    words = np.random.SeedSequence((seed, purpose, start)).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
