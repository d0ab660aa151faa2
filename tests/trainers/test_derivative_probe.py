"""The start-up probe: what it refuses, what it lets pass and with which figure, what it leaves."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from backbone_cases import SMALL, small
from point_runs import point_run
from torch import nn

import registry
from backbones.mlp import MLP
from benchmarks.experiments import checks
from benchmarks.records.recorders import Jsonl
from benchmarks.runs.execute import Texts, execute
from registry.protocols import Derivative, parts, required_heads
from trainers.derivative_probe import add_noise, perturbed, probe_derivatives
from trainers.engines import TorchEngine
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.mean_flow import MeanFlow
from zoo.residuals import Exact

each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())
each_exact = pytest.mark.parametrize("exact", [Dual(), Jvp()], ids=["dual", "jvp"])

ROUNDING = 1e-5  # float32; measured up to 4e-6
FINITE = FiniteDifference()


def data(backbone, n=4):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, *SMALL[backbone][0], generator=rng), {"label": torch.arange(n) % 3}


def probe(net, derivative=FINITE, backbone="mlp", autocast=None):
    return probe_derivatives(MeanFlow(derivative=derivative), net, *data(backbone), autocast)


def bf16():
    return TorchEngine(precision="bf16").autocast(torch.device("cpu"))


class Around(nn.Module):
    """A network around another; by itself it changes nothing."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, t, r, cond=None):
        return self.net(x, t, r, cond)


class Cut(Around):
    """A stray operation on one of the inputs."""

    def __init__(self, net: nn.Module, where: str = "t", how: str = "detach"):
        super().__init__(net)
        self.where, self.how = where, how

    def forward(self, x, t, r, cond=None):
        values = {"x": x, "t": t, "r": r}
        value = values[self.where]
        if self.how == "detach":
            values[self.where] = value.detach()
        elif self.how == "item":
            flat = [torch.tensor(v.item(), dtype=value.dtype) for v in value.flatten()]
            values[self.where] = torch.stack(flat).reshape(value.shape)
        elif self.how == "training" and self.training:
            values[self.where] = value.detach()
        return self.net(*values.values(), cond)


# what passes


@each_backbone
@pytest.mark.parametrize("derivative", [Dual(), Jvp(), FINITE], ids=["dual", "jvp", "differences"])
def test_every_backbone_passes_with_its_figure(backbone, derivative):
    figures = probe(small(backbone), derivative, backbone)
    assert list(figures) == ["derivative_error"]
    bound = ROUNDING if derivative.needs_forward_ad else 5e-3
    assert 0 < figures["derivative_error"] < bound


@pytest.mark.parametrize("name", registry.objectives.names())
def test_objectives_are_probed_where_they_hold_a_derivative_and_skipped_elsewhere(name):
    calls = []
    objective = registry.objectives.get(name)()
    net = small("mlp", required_heads(objective))
    net.register_forward_hook(lambda *_: calls.append(1))
    figures = probe_derivatives(objective, net, *data("mlp"))
    holds = any(isinstance(part, Derivative) for _, part in parts(objective))
    assert {"mean_flow": True, "decm": True, "flow_matching": False}.get(name, holds) == holds
    assert bool(figures) == bool(calls) == holds


def test_a_derivative_inside_a_part_is_probed_on_the_head_that_it_is_taken_of():
    objective = DuMo(residual=Exact(derivative=Dual()))
    net = small("mlp", ("u", "v"))
    assert probe_derivatives(objective, net, *data("mlp"))["derivative_error"] < ROUNDING
    # The v head may cut what it likes: no objective differentiates it.
    net.heads["dual_head"].readouts["v"].register_forward_hook(lambda m, i, out: out.detach())
    assert probe_derivatives(objective, net, *data("mlp"))["derivative_error"] < ROUNDING
    with pytest.raises(ValueError, match="its residual.derivative, dual"):
        probe_derivatives(objective, Cut(small("mlp", ("u", "v"))), *data("mlp"))


@pytest.mark.parametrize(("heads", "head"), [(("v", "u"), "u"), (("v",), "v")])
def test_the_output_is_u_or_else_the_first_head(heads, head):
    @dataclass(frozen=True)
    class Headed:
        heads: ClassVar[tuple[str, ...]] = ()
        derivative: Derivative

    Headed.heads = heads
    for cut in heads:
        net = small("mlp", heads)
        for module in net.heads.values():
            hook = lambda m, i, out: out.detach()  # noqa: E731
            module.readouts[cut].register_forward_hook(hook)
        with pytest.raises(ValueError, match="no tangent") if cut == head else nullcontext():
            probe_derivatives(Headed(Dual()), net, *data("mlp"))


def test_cost_is_a_few_forwards_of_six_rows():
    rows = []
    net = small("mlp")
    net.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    probe(net, Dual())
    assert set(rows) == {6}
    assert len(rows) <= 13


def test_network_without_a_second_time_or_labels_passes():
    net = small("mlp", num_classes=0)
    x0, _ = data("mlp")
    assert probe_derivatives(MeanFlow(), net, x0)["derivative_error"] < ROUNDING

    class OneTime(Around):
        def forward(self, x, t, r, cond=None):
            return {"u": self.net(x, t, t, cond)["v"]}

    net = OneTime(small("mlp", ("v",), num_classes=0))  # nothing moves along r
    for derivative in (Dual(), FINITE):
        figure = probe_derivatives(MeanFlow(derivative=derivative), net, x0)
        assert figure["derivative_error"] < 5e-3


# what is cut


@each_exact
@pytest.mark.parametrize("where", ["x", "t", "r"])
@pytest.mark.parametrize("how", ["detach", "item"])
def test_a_cut_input_is_refused_by_the_name_of_its_direction(exact, where, how):
    net = Cut(small("mlp"), where, how)
    with pytest.raises(ValueError) as refusal:
        probe(net, exact)
    text = str(refusal.value)
    backend = registry.derivatives.name_of(exact)
    assert text.startswith(f"its derivative, {backend}(")
    assert f"is wrong on this network: along {where} " in text
    assert "relative error is " in text
    assert "more than 0.01, against central differences in float64" in text
    for remedy in (".detach()", ".item()", "@finite_difference()"):
        assert remedy in text
    assert probe(net, FINITE)["derivative_error"] < 5e-3


@each_exact
@pytest.mark.parametrize("part", ["attn", "mlp", "modulation"])
def test_a_cut_inside_one_block_of_a_fresh_dit_is_refused(exact, part):
    # adaLN-zero blocks start as the identity: only perturbed weights show it.
    net = small("dit", depth=4)
    getattr(net.trunk.blocks[2], part).register_forward_hook(lambda m, i, out: out.detach())
    with pytest.raises(ValueError, match="is wrong on this network"):
        probe(net, exact, "dit")


def test_a_cut_in_training_mode_alone_is_refused():
    net = Cut(small("mlp"), how="training").eval()
    with pytest.raises(ValueError, match="along t"):
        probe(net, Dual())
    assert not net.training


class NoRule(torch.autograd.Function):
    """Stands for a fused kernel: a gradient, no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Fused(Around):
    def forward(self, x, t, r, cond=None):
        return self.net(NoRule.apply(x), t, r, cond)


@each_exact
def test_an_operation_without_a_forward_mode_rule_is_refused_with_remedies(exact):
    net = Fused(small("mlp"))
    with pytest.raises(ValueError) as refusal:
        probe(net, exact)
    text = str(refusal.value)
    assert text.startswith(f"its derivative, {registry.derivatives.name_of(exact)}(")
    assert ", cannot pass" in text
    assert "autograd.Function" in text.splitlines()[0]  # what torch says
    for remedy in ("math kernel", "jvp", "@finite_difference()"):
        assert remedy in text.splitlines()[1]
    assert isinstance(refusal.value.__cause__, RuntimeError)
    assert probe(net, FINITE)["derivative_error"] < 5e-3


def test_a_network_without_any_tangent_is_refused():
    class Nothing(Around):
        def forward(self, x, t, r, cond=None):
            return {"u": self.net(x, t, r, cond)["u"].detach()}

    with pytest.raises(ValueError, match="dual.*cannot pass this network: .*carries no tangent"):
        probe(Nothing(small("mlp")), Dual())
    with pytest.raises(ValueError, match="jvp.*relative error is 1, more than 0.01"):
        probe(Nothing(small("mlp")), Jvp())


# how wrong


@dataclass(frozen=True, kw_only=True)
class Off:
    """An exact derivative times a factor, and of chosen inputs alone."""

    needs_forward_ad: ClassVar = True
    factor: float = 1.0
    moves: tuple[int, ...] = (0, 1, 2)

    def __call__(self, fn, primals, tangents):
        moved = [d if i in self.moves else 0 * d for i, d in enumerate(tangents)]
        return self.factor * Dual()(fn, primals, moved)


def test_figure_is_the_relative_error_and_the_bound_is_one_percent():
    with registry.derivatives.temporary("off", Off):
        for factor in (1.004, 0.996):
            figure = probe(small("mlp"), Off(factor=factor))["derivative_error"]
            assert figure == pytest.approx(0.004, rel=1e-2)
        with pytest.raises(ValueError, match=r"off\(factor=1.02.* error is 0.02, more than 0.01"):
            probe(small("mlp"), Off(factor=1.02))


@pytest.mark.parametrize(("moves", "missing"), [((1, 2), "x"), ((0, 2), "t"), ((0, 1), "r")])
def test_a_derivative_that_forgets_an_input_is_refused(moves, missing):
    with (
        registry.derivatives.temporary("off", Off),
        pytest.raises(ValueError, match=f"along {missing} its relative error is 1,"),
    ):
        probe(small("mlp"), Off(moves=moves))


class FastTimes(Around):
    """Times scaled so that the fastest feature has the frequency 1000 of the released DiT."""

    def forward(self, x, t, r, cond=None):
        return self.net(x, 62.5 * t, 62.5 * r, cond)


@pytest.mark.parametrize("step", [1e-3, 5e-3, 1e-2])
def test_differences_on_scaled_times_are_refused(step):
    net = FastTimes(small("dit"))
    with pytest.raises(ValueError) as refusal:
        probe(net, FiniteDifference(step=step), "dit")
    text = str(refusal.value)
    assert f"finite_difference(step={step})" in text
    assert "more than 0.1" in text
    assert "unscaled times" in text
    assert "@dual()" in text
    assert probe(net, Dual(), "dit")["derivative_error"] < 1e-3


def test_differences_with_too_fine_a_step_are_refused():
    with pytest.raises(ValueError, match="finite_difference"):
        probe(small("mlp"), FiniteDifference(step=1e-7))


# precision


@each_backbone
def test_bfloat16_passes_with_a_larger_figure_and_differences_leave_it(backbone):
    net = small(backbone)
    for exact in (Dual(), Jvp()):
        assert 1e-3 < probe(net, exact, backbone, bf16())["derivative_error"] < 0.08
    same = pytest.approx(probe(net, FINITE, backbone)["derivative_error"], rel=1e-4)
    assert probe(net, FINITE, backbone, bf16())["derivative_error"] == same
    with pytest.raises(ValueError, match="more than 0.1, against central differences in float64"):
        probe(Cut(net), Dual(), backbone, bf16())
    assert not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True, kw_only=True)
class NaiveDifference:
    """Stays in bfloat16 under autocast."""

    needs_forward_ad: ClassVar = False

    def __call__(self, fn, primals, tangents):
        ahead, behind = (
            fn(*(p + s * d for p, d in zip(primals, tangents, strict=True))) for s in (1e-3, -1e-3)
        )
        return (ahead - behind) / 2e-3


def test_differences_in_bfloat16_are_refused():
    with registry.derivatives.temporary("naive", NaiveDifference):
        assert probe(small("mlp"), NaiveDifference())["derivative_error"] < 5e-3
        with pytest.raises(ValueError, match="naive"):
            probe(small("mlp"), NaiveDifference(), autocast=bf16())
    half = small("mlp").bfloat16()
    assert 1e-3 < probe(half, Dual())["derivative_error"] < 0.08
    with pytest.raises(ValueError, match="too fine for weights in bfloat16"):
        probe(half, FINITE)


class Float32Only(Around):
    """Casts to float32 in front of a layer of its own, as many time embeddings do."""

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.gate = nn.Linear(1, 1)

    def forward(self, x, t, r, cond=None):
        return {"u": self.net(x, t, r, cond)["u"] * (2 + torch.sin(self.gate(t.float()[:, None])))}


def test_network_without_float64_is_compared_in_float32_and_says_so():
    net = Float32Only(small("mlp"))
    for derivative in (Dual(), FINITE):
        figures = probe(net, derivative)
        assert list(figures) == ["derivative_error_float32"]
        assert figures["derivative_error_float32"] < 2e-2
    with pytest.raises(ValueError, match="more than 0.05, against central differences in float32"):
        probe(Float32Only(Cut(small("mlp"))), Dual())
    # The step of the differences is one of those that they are compared with, and still refused.
    with pytest.raises(ValueError, match="more than 0.1, .* in float32"):
        probe(Float32Only(FastTimes(small("mlp"))), FiniteDifference(step=1e-3))


def test_network_that_rounds_to_float32_inside_passes():
    class Rounds(Around):
        def forward(self, x, t, r, cond=None):
            out = self.net(x.float(), t.float(), r.float(), cond)["u"]
            return {"u": out.to(x.dtype)}

    for derivative in (Dual(), FINITE):
        figures = probe(Rounds(small("mlp")), derivative)
        assert figures["derivative_error"] < 1e-2


# random numbers


@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_dropout_does_not_matter(backbone):
    plain, dropping = (small(backbone, dropout=p) for p in (0.0, 0.3))
    for derivative in (Dual(), FINITE):
        same = pytest.approx(probe(plain, derivative, backbone)["derivative_error"], rel=1e-4)
        assert probe(dropping, derivative, backbone)["derivative_error"] == same


class OwnNoise(Around):
    """Dropout from a generator of its own."""

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.seed = 0

    def forward(self, x, t, r, cond=None):
        u = self.net(x, t, r, cond)["u"]
        if not self.training:
            return {"u": u}
        self.seed += 1
        rng = torch.Generator().manual_seed(self.seed)
        return {"u": u * torch.empty(u.shape).bernoulli_(0.7, generator=rng)}


def test_differences_of_a_network_whose_noise_cannot_be_repeated_are_refused():
    net = OwnNoise(small("mlp"))
    message = "finite_difference.* torch's global generator does not govern.* choose @dual()"
    with pytest.raises(ValueError, match=message):
        probe(net, FINITE)
    assert probe(net, Dual())["derivative_error"] < ROUNDING


# what it leaves


def test_noise_on_a_piece_has_the_scale_of_the_whole_weight():
    rng = torch.Generator().manual_seed(0)
    for shape, scale in (((1000, 25), 0.2), ((10, 4, 2, 2), 0.25), ((7,), 0.1)):
        piece = torch.zeros(40_000)  # as of a weight that several processes hold in pieces
        add_noise(piece, shape, rng)
        assert piece.std().item() == pytest.approx(scale, rel=0.02)  # 5 standard errors
        assert abs(piece.mean().item()) < 0.02 * scale


@each_backbone
def test_perturbed_copy_has_every_layer_active_and_leaves_the_original(backbone):
    net = small(backbone, ("u", "v"))
    net.trunk.conditioning.label.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = perturbed(net, torch.device("cpu"))
    for (name, p), (_, q) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert q.requires_grad == p.requires_grad == ("label" not in name)
        assert q.equal(p) != p.requires_grad
    x0, cond = data(backbone)
    t = torch.full((4,), 0.5)
    assert not net(x0, t, t, cond)["u"].any()
    out = other(x0, t, t, cond)
    sum(value.square().sum() for value in out.values()).backward()
    assert all(p.grad.any() for p in other.parameters() if p.requires_grad)
    assert 0.1 < out["u"].std() < 10
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("autocast", [None, bf16()], ids=["fp32", "bf16"])
def test_probe_changes_neither_the_network_nor_any_generator(autocast):
    net = small("dit", dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    first = probe(net, Dual(), "dit", autocast)
    assert torch.get_rng_state().equal(generator)
    torch.manual_seed(8)
    assert probe(net, Dual(), "dit", autocast) == first
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert torch.is_grad_enabled()


# in a run


run = partial(point_run, objective=MeanFlow())


def recorded(experiment, folder) -> list[dict]:
    with Jsonl().start(name="run", folder=folder) as record:
        execute(experiment, Texts(config="", operative="", params={}), record, folder)
    entries = map(json.loads, (folder / "record.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == "metrics"]


def test_run_records_the_figure_and_trains_as_without_the_probe(tmp_path, monkeypatch):
    experiment = run()
    assert 0 < experiment.derivative_error["derivative_error"] < ROUNDING
    probed = recorded(experiment, tmp_path / "probed")
    assert probed[0]["step"] == 0
    assert probed[0]["values"] == dict(experiment.derivative_error)

    monkeypatch.setattr(checks, "probe_derivatives", lambda *_: {})
    experiment = run()
    assert experiment.derivative_error == {}
    plain = recorded(experiment, tmp_path / "plain")
    losses = [
        [(e["step"], e["values"]["loss"]) for e in entries if "loss" in e["values"]]
        for entries in (probed, plain)
    ]
    assert losses[0] == losses[1]  # bit for bit
    assert len(losses[0]) == 4
    assert not any("derivative_error" in e["values"] for e in plain)


def test_run_without_a_derivative_has_no_figure():
    objective = registry.objectives.get("flow_matching")()
    assert run(objective=objective).derivative_error == {}


class CutMLP(MLP):
    """Forgets that the conditioning moves with t."""

    def forward(self, x, t, r, cond):
        return super().forward(x, t.detach(), r, cond)


def test_run_refuses_a_network_that_cuts_the_derivative_when_it_is_built():
    cut = partial(CutMLP, dim=16, depth=1)
    with pytest.raises(ValueError) as refusal:
        run(backbone=cut)
    text = str(refusal.value)
    assert text.startswith("objective 'mean_flow' on 4 rows of gaussian: its derivative, one_pass(")
    assert "along t" in text
    with pytest.raises(ValueError, match="'decm' .*jvp"):
        run(backbone=cut, objective=DECM(derivative=Jvp()))
    figures = run(backbone=cut, objective=MeanFlow(derivative=FINITE)).derivative_error
    assert figures["derivative_error"] < 5e-3


def test_run_probes_in_the_precision_of_its_engine():
    figures = [
        run(engine=TorchEngine(precision=p)).derivative_error["derivative_error"]
        for p in ("fp32", "bf16")
    ]
    assert figures[0] < ROUNDING
    assert 1e-3 < figures[1] < 0.1
