"""Every objective with every backbone and every set of heads that covers it; what cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import combinations

import pytest
import torch
from backbone_cases import SMALL
from few_rows import for_few_rows

import registry
from backbones.network import build_network
from benchmarks.data.digits import Digits
from benchmarks.data.mixtures import Gaussian
from benchmarks.experiments.build import run
from benchmarks.metrics import evaluate
from registry import gin_setup
from registry.protocols import LossOutput, required_heads
from trainers.budget import Budget
from trainers.callbacks import Callback
from trainers.loop import fit
from zoo.objectives.flow_matching import FlowMatching
from zoo.ops import mean_flat
from zoo.samplers import valid_samplers
from zoo.weighting import LearnedLogvar

OBJECTIVES, BACKBONES = registry.objectives.names(), registry.backbones.names()


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_step(self, state, out):
        self.seen.append(out.per_sample.mean().item())


def data(backbone: str):
    return Gaussian() if backbone == "mlp" else Digits()


def network(backbone: str, keys, heads=None):
    dataset = data(backbone)
    torch.manual_seed(0)
    trunk = partial(registry.backbones.get(backbone), **SMALL[backbone][1])
    return build_network(trunk, dataset.shape, dataset.num_classes, keys, heads)


def train(objective, net, dataset, steps: int = 3) -> list[float]:
    losses = Losses()
    fit(
        net=net,
        objective=objective,
        dataset=dataset,
        batch_size=8,
        budget=Budget(steps=steps),
        callbacks=(losses,),
    )
    return losses.seen


def coverings(keys: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sets of registered heads that make all of `keys` and nothing twice."""
    names = registry.heads.names()
    sets = [s for k in range(1, len(names) + 1) for s in combinations(names, k)]
    made = {s: [key for name in s for key in registry.heads.get(name).keys] for s in sets}
    return [s for s in sets if set(keys) <= set(made[s]) and len(set(made[s])) == len(made[s])]


HEADS = {n: coverings(required_heads(registry.objectives.get(n)())) for n in OBJECTIVES}


def fit_for(backbone: str, objective: str) -> list[tuple[str, ...]]:
    """The sets of heads that the backbone can have: those of its own blocks need blocks."""
    blocks = backbone not in ("unet", "ddpmpp")
    return [heads for heads in HEADS[objective] if blocks or "deep_dual" not in heads]


def by_default(objective: str) -> set[tuple[str, tuple[str, ...]]]:
    """Each backbone once, with sets of heads that change from one objective to the next."""
    first = OBJECTIVES.index(objective)
    chosen = ((backbone, fit_for(backbone, objective)) for backbone in BACKBONES)
    return {(name, sets[(first + i) % len(sets)]) for i, (name, sets) in enumerate(chosen)}


CASES = [
    pytest.param(
        *(objective, backbone, heads),
        id=f"{objective}-{backbone}-{'+'.join(heads)}",
        marks=() if (backbone, heads) in by_default(objective) else pytest.mark.slow,
    )
    for objective in OBJECTIVES
    for backbone in BACKBONES
    for heads in fit_for(backbone, objective)
]


def test_every_objective_and_backbone_is_covered_by_several_sets_of_heads():
    assert len(CASES) >= 4 * len(OBJECTIVES) * len(BACKBONES)
    chosen = {objective: by_default(objective) for objective in OBJECTIVES}
    assert all({name for name, _ in pairs} == {*BACKBONES} for pairs in chosen.values())
    made = {head for pairs in chosen.values() for _, heads in pairs for head in heads}
    assert made == {*registry.heads.names()}


@pytest.mark.parametrize(("objective", "backbone", "heads"), CASES)
def test_composition_trains_with_finite_losses(objective, backbone, heads):
    made = for_few_rows(registry.objectives.get(objective)())
    classes = [registry.heads.get(name) for name in heads]
    net = network(backbone, required_heads(made), classes)
    losses = train(made, net, data(backbone))
    assert len(losses) == 3
    assert all(torch.tensor(losses).isfinite()), losses
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("objective", "backbone"),
    [
        pytest.param(
            objective, backbone, marks=() if (i - j) % len(BACKBONES) == 0 else pytest.mark.slow
        )
        for i, objective in enumerate(OBJECTIVES)
        for j, backbone in enumerate(BACKBONES)
    ],
)
def test_extra_heads_do_not_change_the_losses(objective, backbone):
    made = for_few_rows(registry.objectives.get(objective)())
    keys = required_heads(made)
    plain = train(made, network(backbone, keys), data(backbone))
    extra = train(
        made, network(backbone, (*keys, "twin" if "logvar" in keys else "logvar")), data(backbone)
    )
    assert extra == plain


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if "weight" in dir(
    registry.objectives.get(n)()
)])  # fmt: skip
def test_learned_weight_brings_its_head(objective):
    made = for_few_rows(registry.objectives.get(objective)(weight=LearnedLogvar()))
    assert "logvar" in required_heads(made)
    net = network("mlp", required_heads(made))
    assert torch.tensor(train(made, net, Gaussian())).isfinite().all()
    assert net.heads["log_variance"].linear.weight.abs().sum() > 0  # it learns


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_gives_the_same_losses_to_the_bit(objective):
    made = for_few_rows(registry.objectives.get(objective)())
    one, two = (train(made, network("dit", required_heads(made)), Digits()) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_valid_sampler_draws_at_every_nfe(objective):
    made = registry.objectives.get(objective)()
    net = network("dit", required_heads(made))
    valid = valid_samplers(made)
    assert valid
    x1 = evaluate.noise((1, 8, 8), 3, 0)
    for name in valid:
        for nfe in (1, 2, 3):
            if name == "one_step" and nfe > 1:
                continue
            sampler = registry.samplers.get(name)(nfe=nfe)
            drawn = evaluate.draw(net, sampler, x1, {"label": torch.tensor([0, 1, 2])})
            assert drawn.shape == x1.shape


# What cannot be is said while the run is built


POINTS = ("data/gaussian.gin", "trainer/cpu.gin")
PICTURES = ("data/digits.gin", "trainer/cpu.gin")
MLP = ("run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1")
DIT = ("run.backbone = @dit", "dit.dim = 16", "dit.depth = 1", "dit.num_heads = 2")


def refused(files, *bindings: str) -> str:
    gin_setup.parse(files, ["run.steps = 1", "run.recorder = @null()", *bindings])
    with pytest.raises(ValueError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "bindings", "says"),
    [
        (POINTS, ("run.objective = @mean_flow()", *DIT), "dit"),
        (POINTS, ("run.objective = @mean_flow()", "run.backbone = @unet"), "unet"),
        (PICTURES, ("run.objective = @mean_flow()", *MLP), "mlp"),
        (PICTURES, ("run.objective = @mean_flow()",), "run.backbone is not bound"),
        (POINTS, MLP, "run.objective is not bound"),
        (
            POINTS,
            ("run.objective = @dumo()", *MLP, "run.heads = [@velocity]"),
            "needs the output 'u'",
        ),
        (
            POINTS,
            ("run.objective = @dumo()", *MLP, "run.heads = [@dual_head, @velocity]"),
            "both make 'v'",
        ),
        (
            POINTS,
            ("run.objective = @flow_matching()", *MLP, "run.sampler = @flow_map()"),
            "cannot use sampler 'flow_map'",
        ),
        (
            POINTS,
            ("run.objective = @decm()", "decm.teacher = @frozen()", *MLP),
            "frozen.checkpoint",
        ),
        (POINTS, ("run.objective = @mean_flow()", *MLP, "mean_flow.omega = 2.0"), "label"),
        (POINTS, ("run.objective = @dumo()", *MLP, "dumo.omega = 0.5"), "label"),
        (POINTS, ("run.objective = @decm()", *MLP, "decm.guidance_scale = 2.0"), "label"),
        (
            POINTS,
            (
                "run.objective = @mean_flow()",
                *MLP,
                "mean_flow.weight = @learned_logvar()",
                "run.heads = [@average_velocity]",
            ),
            "log_variance",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(files, bindings, says):
    assert says in refused(files, *bindings)


@dataclass(frozen=True, kw_only=True)
class Forgetful(FlowMatching):
    """A loss that draws times without asking for the law of its step."""

    def loss(self, net, batch, rng):
        t, _ = self.times(len(batch), rng)
        error = mean_flat(net(batch.x0, t, t, batch.cond)["v"] ** 2)
        return LossOutput(per_sample=error)


def test_law_that_changes_over_the_run_is_refused_where_the_loss_does_not_ask_for_it():
    bound = ("forgetful.times = @progressive()", *MLP)
    with registry.objectives.temporary("forgetful", Forgetful):
        said = refused(POINTS, "run.objective = @forgetful()", *bound)
        assert "forgetful.times = @progressive() changes over the run" in said
        assert "zoo.times.law_at(self.times, batch.step)" in said
        gin_setup.parse(POINTS, ["run.steps = 1", "run.objective = @forgetful()", *MLP])
        assert run().objective_name == "forgetful"  # with a law that does not change
    bound = ("run.objective = @mean_flow()", "mean_flow.times = @progressive()", *MLP)
    gin_setup.parse(POINTS, ["run.steps = 1", *bound])
    assert run().objective_name == "mean_flow"


def test_plug_in_velocity_in_batches_with_few_rows_of_a_label_is_warned_of(caplog):
    bound = ("run.objective = @mean_flow()", "mean_flow.velocity = @plug_in()", *DIT)
    gin_setup.parse(PICTURES, ["run.steps = 1", "run.batch_size = 8", *bound])
    run()
    assert "mean_flow.velocity = @plug_in() works on rows of the same label" in caplog.text


def test_velocity_is_an_estimator_of_its_own_kind():
    with pytest.raises(ValueError, match=r"must be a velocity estimator, such as @conditional\(\)"):
        gin_setup.parse(POINTS, ["mean_flow.velocity = @linear()"])
