"""What the framework costs beside a loop written by hand and bare calls of the network."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experiments.experiment import Experiment
from benchmarks.metrics import evaluate
from benchmarks.records.recorders import Jsonl
from registry.protocols import LossOutput, rows_of, to_device
from trainers.callbacks import MetricsLog
from trainers.engines import compile_in_place
from trainers.state import TrainState
from zoo.samplers import Euler

SAMPLING_NFE = 2


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """What the framework adds to flow matching, as shares."""

    group: str
    loop: float  # of the hand-written step
    sampling: float  # of the bare network calls
    logging: float  # of the step, a record every `run.log_every` steps


def bare_loop(experiment: Experiment) -> Iterator[None]:
    """Flow matching as one writes it by hand: the same network, batch, optimizer and averages."""
    net = copy.deepcopy(experiment.net).train()
    if experiment.compile:
        compile_in_place(net)
    params: list[Tensor] = list(net.parameters())
    averages: list[tuple[float, list[Tensor]]] = [
        (decay, list(copy.deepcopy(net).requires_grad_(False).parameters()))
        for decay in (*experiment.ema_decay, *experiment.power_emas)  # both kinds cost the same
    ]
    optimizer = experiment.optimizer.build(net.parameters())
    device, n = experiment.device, experiment.batch_size
    images, cond = experiment.dataset.reference(max(experiment.dataset.size, n), 0)
    while True:
        rows = torch.randint(len(images), (n,))
        x0 = images[rows].to(device)
        x1, t = torch.randn_like(x0), torch.rand(n, device=device)
        s = t.view(-1, *[1] * (x0.ndim - 1))
        given = to_device(rows_of(cond, rows), device)
        with experiment.engine.autocast(device):
            loss = ((net((1 - s) * x0 + s * x1, t, t, given)["v"] - (x1 - x0)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for decay, means in averages:
                torch._foreach_lerp_(means, params, 1 - decay)
        yield


def sampling_pair(experiment: Experiment) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same Euler steps by `evaluate.draw` and by bare calls of the network."""
    net, n = experiment.net, experiment.batch_size
    x1 = evaluate.noise(experiment.dataset.shape, n, 0).to(experiment.device)
    cond = to_device(experiment.dataset.sample_labels(n), experiment.device)

    def ours() -> object:
        return evaluate.draw(net, Euler(nfe=SAMPLING_NFE), x1, cond)

    @torch.no_grad()
    def bare() -> object:
        net.eval()
        x = x1
        for i in range(SAMPLING_NFE, 0, -1):
            t = torch.full((n,), i / SAMPLING_NFE, device=x.device)
            x = x - net(x, t, t, cond)["v"] / SAMPLING_NFE
        net.train()
        return x

    return ours, bare


def logging_seconds(experiment: Experiment, state: TrainState, out: LossOutput) -> float:
    """Seconds per step of the metrics log and the record file, over one record's worth of steps."""
    with tempfile.TemporaryDirectory() as folder:
        with Jsonl().start("logging", Path(folder)) as record:
            log = MetricsLog(record=record.metrics, every=experiment.log_every)
            log.on_start(state)
            first, start = state.step, time.perf_counter()
            for i in range(experiment.log_every):
                state.step = first - first % experiment.log_every + i + 1
                log.on_step(state, out)
            seconds = time.perf_counter() - start
    state.step = first
    return seconds / experiment.log_every
