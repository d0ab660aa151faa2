"""Objectives that train their derivative: which one they get, what is probed, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from backbone_cases import SMALL, awake, small
from point_runs import point_run
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from trained_derivatives import Lsd, Tvm
from trainer_toys import ToyData

import registry
from backbones.dit import DiT
from backbones.mlp import MLP
from backbones.network import build_network
from benchmarks.runs.passes import count_passes
from registry.protocols import Batch
from trainers import AdamW, Budget, fit
from trainers.derivative_probe import probe_derivatives
from trainers.engines import TorchEngine, TrainStep, as_trained
from trainers.zero.engine import ZeroEngine
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.weighting import Unweighted

each_trainable = pytest.mark.parametrize(
    "derivative", [Dual(), Jvp(), FiniteDifference()], ids=["dual", "jvp", "differences"]
)
each_exact = pytest.mark.parametrize("derivative", [Dual(), Jvp()], ids=["dual", "jvp"])
ROWS = 32


@pytest.fixture(autouse=True)
def registered():
    with (
        registry.objectives.temporary("lsd", Lsd),
        registry.objectives.temporary("tvm", Tvm),
    ):
        yield


def data(backbone, n=4):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, *SMALL[backbone][0], generator=rng), {"label": torch.arange(n) % 3}


def probe(net, derivative, backbone="dit", autocast=None):
    return probe_derivatives(Lsd(derivative=derivative), net, *data(backbone), autocast)


# which derivative


def test_one_without_a_graph_gives_way_to_that_of_its_own_pass():
    assert as_trained(Lsd(derivative=OnePass()), TorchEngine()) == Lsd(derivative=Dual())
    objective = Lsd(derivative=Jvp())
    assert as_trained(objective, TorchEngine()) is objective


@dataclass(frozen=True, kw_only=True)
class Graphless:
    needs_forward_ad: ClassVar = True

    def __call__(self, fn, primals, tangents):
        return Dual()(fn, primals, tangents)


def test_one_that_cannot_be_trained_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Lsd trains its derivative, and .*Graphless\(\) .*@dual"):
        as_trained(Lsd(derivative=Graphless()), TorchEngine())


@each_exact
def test_weights_in_pieces_are_refused_and_differences_are_not(derivative):
    engine = ZeroEngine(stage=3)
    name = registry.derivatives.name_of(derivative)
    with pytest.raises(ValueError, match=rf"its derivative = @{name}\(\) .*zero_engine.stage = 2"):
        as_trained(Lsd(derivative=derivative), engine)
    objective = Lsd(derivative=FiniteDifference())
    assert as_trained(objective, engine) is objective
    assert as_trained(Lsd(derivative=derivative), ZeroEngine(stage=2)).derivative == derivative


@pytest.mark.parametrize("make", [SelfDistillation, TerminalVelocity])
def test_objectives_of_the_zoo_are_refused_there_too(make):
    with pytest.raises(ValueError, match=rf"objective {make.__name__} trains .*stage = 2, or bind"):
        as_trained(make(), ZeroEngine(stage=3))
    differences = make(derivative=FiniteDifference())
    assert as_trained(differences, ZeroEngine(stage=3)) is differences
    assert as_trained(make(), ZeroEngine(stage=2)) == make()


def test_progressive_self_distillation_trains_no_derivative_and_serves_every_stage():
    objective = SelfDistillation(kind="psd")
    assert as_trained(objective, ZeroEngine(stage=3)) is objective


run = partial(point_run, objective=Lsd())


def test_run_says_that_another_derivative_takes_its_place_and_probes_it(caplog):
    experiment = run(objective=Lsd(derivative=OnePass()))
    assert experiment.objective.derivative == Dual()
    said = "the objective trains its derivative: derivatives take a pass of their own, "
    assert f"{said}@dual() for @one_pass()" in caplog.text
    assert set(experiment.derivative_error) == {"derivative_error", "derivative_gradient_error"}
    assert max(experiment.derivative_error.values()) < 1e-4


def test_a_loop_without_a_run_is_told_what_to_bind():
    net = small("mlp", num_classes=0)
    objective = Lsd(derivative=OnePass())
    with pytest.raises(NotImplementedError, match=r"one_pass .* bind @dual\(\)"):
        objective.loss(net, Batch(data("mlp", 8)[0]), torch.Generator())


# the probe


@each_trainable
@pytest.mark.parametrize("backbone", registry.backbones.names())
def test_every_backbone_passes_with_its_figure(derivative, backbone):
    figures = probe(small(backbone), derivative, backbone)
    bound = 1e-4 if derivative.needs_forward_ad else 2e-2
    assert 0 < figures["derivative_gradient_error"] < bound


@dataclass(frozen=True, kw_only=True)
class Detached(Dual):
    """Right values, and a derivative that carries no gradient of the tangent."""

    def with_graph(self, fn, primals, tangents, key):
        out, du = super().with_graph(fn, primals, tangents, key)
        return out, du.detach() + 0 * out[key]


def test_a_derivative_without_its_gradient_is_refused():
    with (
        registry.derivatives.temporary("detached", Detached),
        pytest.raises(ValueError, match="detached.* has a wrong gradient.* relative error is 1,"),
    ):
        probe(small("mlp"), Detached(), "mlp")


class CutTangent(nn.Module):
    """Detaches the tangent of one branch, whose value and derivative stay right."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        net.trunk.blocks[1].mlp.register_forward_hook(self.cut)

    def cut(self, module, args, out):
        value, tangent = forward_ad.unpack_dual(out)
        return out if tangent is None else forward_ad.make_dual(value, tangent.detach())

    def forward(self, x, t, r, cond=None):
        return self.net(x, t, r, cond)


def test_a_tangent_detached_in_one_branch_of_one_block_is_refused():
    net = CutTangent(small("dit", depth=4))
    with pytest.raises(
        ValueError, match=r"has a wrong gradient on this network: .*\n.* twice. Mend"
    ):
        probe(net, Dual())


@each_exact
@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_activation_checkpointing_is_refused_by_name_for_forward_mode(derivative, backbone):
    net = small(backbone, checkpointing=True)
    with pytest.raises(ValueError) as refusal:
        probe(net, derivative, backbone)
    name = registry.derivatives.name_of(derivative)
    assert f"its derivative, {name}(" in str(refusal.value)
    assert "cannot be trained with activation checkpointing" in str(refusal.value)
    assert "checkpointing = False" in str(refusal.value)
    assert "@finite_difference()" in str(refusal.value)


def test_activation_checkpointing_works_for_differences():
    figures = [
        probe(small("dit", checkpointing=saving), FiniteDifference())["derivative_gradient_error"]
        for saving in (False, True)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


def test_probe_under_autocast():
    autocast = TorchEngine(precision="bf16").autocast(torch.device("cpu"))
    for backbone in ("dit", "unet", "mlp"):
        with autocast:
            pass
        figures = probe(small(backbone), Dual(), backbone, autocast)
        assert 1e-3 < figures["derivative_gradient_error"] < 0.15


def test_probe_leaves_network_and_generators():
    net = small("dit", dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    probe(net, Dual())
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# what it costs


def wide() -> nn.Module:
    """A DiT of 16 tokens: nearly all its products are in layers whose every gradient is needed."""
    torch.manual_seed(0)
    dit = partial(DiT, dim=64, depth=3, num_heads=2)
    return awake(build_network(dit, (1, 8, 8), 0, ("u",)))


def batch():
    return Batch(torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(1)))


def flops(run_it) -> int:
    with FlopCounterMode(display=False) as counted:
        run_it()
    return counted.get_total_flops()


COSTS = [
    (Lsd(), 4),  # of a quarter: forward, tangent, two backwards, target; 3 for the others
    (Lsd(derivative=Jvp()), 4),
    (Lsd(derivative=FiniteDifference()), 0.75 * 3 + 0.25 * (3 * 3 + 1)),
    (Lsd(eulerian=True), 4),
    (Lsd(off_diagonal_fraction=1.0), 7),
    (Tvm(), 10),  # 6 for the derivative, 1 for the target, 3 for the velocity
    (Tvm(derivative=Jvp()), 10),
    (Tvm(through=True), 11),  # and a backward to the input of the target
    (SelfDistillation(weight=Unweighted()), 4),
    (SelfDistillation(kind="esd", weight=Unweighted()), 4),
    (SelfDistillation(kind="psd", weight=Unweighted()), 3.5),  # of a quarter: 3, and two targets
    (SelfDistillation(gradient="full", weight=Unweighted()), 4.5),  # and a backward of the target
    (SelfDistillation(kind="psd", gradient="full", weight=Unweighted()), 4.5),
    (TerminalVelocity(), 10),
]


@pytest.mark.parametrize(("objective", "total"), COSTS, ids=str)
def test_passes_are_what_the_products_of_a_step_are(objective, total):
    """The products of a step, over those of a forward, leave out what the first layers save."""
    net = wide()
    step = TrainStep(net, objective).train()
    assert count_passes(step, [batch()], 0).total == pytest.approx(total)

    def a_step():
        step(batch(), torch.Generator().manual_seed(0)).per_sample.mean().backward()

    t = torch.rand(ROWS)
    with torch.no_grad():
        forward = flops(lambda: net(batch().x0, t, t / 2, None))
    # torch.func.jvp takes a third product for each of a tangent, with weights that do not move.
    spare = 1.25 if objective.derivative == Jvp() else 1.0
    assert 0.95 < flops(a_step) / forward / total < 1.05 * spare


def test_passes_of_a_derivative_that_is_not_trained_after_all():
    @dataclass(frozen=True, kw_only=True)
    class Semi(Dual):
        def with_graph(self, *given):
            out, du = super().with_graph(*given)
            return out, du.detach()

    found = count_passes(TrainStep(wide(), Lsd(derivative=Semi())).train(), [batch()], 0)
    assert (found.forward, found.tangent, found.backward) == (1.25, 0.25, 1)


# training


@each_trainable
@pytest.mark.parametrize("make", [Lsd, partial(Tvm, through=True)], ids=["lsd", "tvm"])
def test_training_lowers_the_loss(make, derivative):
    losses = []
    torch.manual_seed(0)
    net = build_network(lambda **given: MLP(dim=32, depth=1, **given), (2,), 3, ("u",))
    fit(
        net=net, objective=make(derivative=derivative), dataset=ToyData(), batch_size=32,
        budget=Budget(steps=60), optimizer=AdamW(lr=3e-3), callbacks=[Watched(losses)],
    )  # fmt: skip
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Watched:
    """Keeps every step's mean loss."""

    def __init__(self, losses):
        self.losses = losses

    def on_start(self, state): ...
    def on_evaluate(self, state, values): ...
    def on_end(self, state): ...
    def on_step(self, state, out):
        self.losses.append(float(out.per_sample.mean()))
