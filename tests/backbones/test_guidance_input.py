"""Guidance that is chosen when sampling: by two rows a sample, or told to the network."""

from __future__ import annotations

import math

import pytest
import torch
from backbone_cases import awake, inputs, small
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo
from tiny_vaes import photos

import registry
from benchmarks.conformance.subject import MIXTURE, law_batch
from benchmarks.experiments.guidance_checks import check_guidance
from registry.protocols import NULL_LABEL
from zoo.guidance import (
    LogUniformGuidance,
    guidance_share,
    guided_target,
    with_guidance,
)
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like, normal_like
from zoo.samplers import ClassifierFree, Euler, FlowMap, InputGuidance, check_sampler
from zoo.times import LogitNormalPair, UniformPair
from zoo.weighting import Unweighted

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def guided_oracle(x, t, r, cond):
    """The exact velocity, guided by the scale that cond tells inside its interval."""
    given = MIXTURE.velocity(x, t, cond)
    null = MIXTURE.velocity(x, t)
    kept = cond["label"] != NULL_LABEL
    share = guidance_share(cond, t) * kept  # 1 - 1/w
    v = null + like(1 / (1 - share), x) * (given - null)
    return {"u": v, "v": v}


class Heard:
    """A network that remembers what it was told."""

    def __init__(self, net):
        self.net, self.conds = net, []

    def __call__(self, x, t, r, cond):
        self.conds.append(cond)
        return self.net(x, t, r, cond)


# the law


def test_scales_are_log_uniform_and_intervals_lie_around_the_middle():
    drawn = LogUniformGuidance()(20_000, rng())
    scale, low, high = drawn.unbind(1)
    assert drawn.shape == (20_000, 3)
    shares = scale.log() / math.log(8)
    for values in (shares, 2 * low, 2 * high - 1):
        assert 0 <= values.min() <= values.max() <= 1
        # A uniform mean is 1/2 with standard error 0.29 / sqrt(n); four of them.
        assert abs(float(values.mean()) - 0.5) < 4 * 0.29 / 20_000**0.5
        assert abs(float((values**2).mean()) - 1 / 3) < 4 * 0.3 / 20_000**0.5


def test_rows_of_the_diagonal_have_the_whole_interval():
    diagonal = torch.arange(50) % 2 == 0
    cond = with_guidance({"label": torch.zeros(50)}, LogUniformGuidance(), diagonal, rng())
    assert (cond["guidance"][diagonal, 1:] == torch.tensor([0.0, 1.0])).all()
    assert (cond["guidance"][~diagonal, 1] < 0.5).all()
    assert cond["guidance"][:, 0].unique().numel() == 50


@pytest.mark.parametrize("fields", [{"largest": 0.5}, {"low": (0.0, 0.7)}, {"high": (0.9, 0.8)}])
def test_impossible_laws_are_refused(fields):
    with pytest.raises(ValueError, match="log_uniform_guidance"):
        LogUniformGuidance(**fields)


# the target


def test_target_of_each_row_has_the_fixed_point_of_its_own_scale():
    """v_c + (1 - 1/w) (v(y, w) - v(null, w)) averages to v where v is guided with w."""
    batch, t = law_batch(MIXTURE, 64, 0), torch.rand(64, generator=rng(), dtype=F64)
    x = like(1 - t, batch.x0) * batch.x0 + like(t, batch.x0) * normal_like(batch.x0, rng(1))
    cond = with_guidance(batch.cond, LogUniformGuidance(), torch.zeros(64, dtype=torch.bool), rng())
    share = guidance_share(cond, t)
    assert 0 < int((share == 0).sum()) < 64  # some rows lie outside their interval
    v_c = MIXTURE.velocity(x, t, batch.cond)  # the mean of the conditional velocity
    rows = torch.ones(64, dtype=torch.bool)
    target = guided_target(v_c, guided_oracle, x, t, cond, rows, share)
    torch.testing.assert_close(target, guided_oracle(x, t, t, cond)["v"])

    told_twice = {**cond, "guidance": cond["guidance"] * torch.tensor([2.0, 1.0, 1.0])}
    wrong = guided_target(v_c, guided_oracle, x, t, told_twice, rows, share)
    assert (wrong - guided_oracle(x, t, t, told_twice)["v"]).abs().max() > 0.01


@pytest.mark.parametrize("make", [MeanFlow, DuMo])
def test_objective_draws_scales_and_tells_them_to_the_network(make):
    net = Heard(lambda x, t, r, cond: guided_oracle(x, t, t, cond))
    batch = law_batch(MIXTURE, 256, 0)
    objective = make(guidance=LogUniformGuidance(), label_dropout=0.1)
    objective.loss(net, batch, rng())
    (given, null), rest = net.conds[:2], net.conds[2:]  # the target is asked for first
    scales = torch.cat([cond["guidance"] for cond in rest])[:, 0]
    assert 1 <= scales.min() < scales.max() <= 8
    assert given["guidance"].shape == (256, 3)
    assert (given["guidance"][:, 1:] == torch.tensor([0.0, 1.0])).all()
    assert (null["guidance"] == torch.tensor([1.0, 0.0, 1.0])).all()
    drawn = sorted(set(scales.tolist()))
    for scale in given["guidance"][:, 0].tolist():  # its row's own, or 1 outside its interval
        assert scale == 1 or scale in drawn


@pytest.mark.parametrize("make", [MeanFlow, DuMo])
def test_objective_tells_the_rows_of_its_diagonal_the_whole_interval(make):
    net = Heard(lambda x, t, r, cond: guided_oracle(x, t, t, cond))
    times = UniformPair(off_diagonal_fraction=0.5)
    objective = make(guidance=LogUniformGuidance(), times=times)
    objective.loss(net, law_batch(MIXTURE, 64, 0), rng())
    told = torch.cat([cond["guidance"] for cond in net.conds[2:]])[:64]  # after the target's two
    whole = (told[:, 1:] == torch.tensor([0.0, 1.0])).all(1)
    assert whole.tolist() == [False] * 32 + [True] * 32  # rows with r < t come first


def test_mean_flow_regresses_the_guided_velocity_on_the_diagonal():
    """On rows with r = t the loss is that of v_g about its mean: zero gradient at the oracle."""
    objective = MeanFlow(
        guidance=LogUniformGuidance(),
        times=LogitNormalPair(off_diagonal_fraction=0.0),
        weight=Unweighted(),
    )
    shift = torch.zeros(2, dtype=F64, requires_grad=True)

    def net(x, t, r, cond):
        return {"u": guided_oracle(x, t, r, cond)["u"] + shift}

    losses = [
        objective.loss(net, law_batch(MIXTURE, 4096, seed), rng(seed)).per_sample.mean()
        for seed in range(4)
    ]
    slopes = torch.stack([torch.autograd.grad(loss, shift)[0] for loss in losses])
    # The conditional velocity has a standard deviation of about 1.5; four standard errors.
    assert slopes.mean(0).abs().max() < 4 * 2 * 1.5 / (4 * 4096) ** 0.5


@pytest.mark.parametrize(
    ("make", "fields"),
    [(MeanFlow, {"omega": 2.0}), (MeanFlow, {"kappa": 0.5}), (DuMo, {"omega": 0.5})],
)
def test_drawn_and_fixed_scales_exclude_each_other(make, fields):
    with pytest.raises(ValueError, match="guidance draws the scale"):
        make(guidance=LogUniformGuidance(), **fields)


# the network


@pytest.mark.parametrize("backbone", registry.backbones.names())
def test_network_with_the_input_starts_as_the_one_without_it(backbone):
    plain, told = small(backbone), small(backbone, guidance_input=True)
    for name, value in plain.state_dict().items():
        assert told.state_dict()[name].equal(value), name
    told.load_state_dict(told.state_dict() | awake(plain).state_dict())
    x, t, r, cond = inputs(backbone)
    scales = {**cond, "guidance": torch.tensor([[3.0, 0.2, 0.8]]).expand(5, 3)}
    assert told(x, t, r, scales)["u"].equal(plain(x, t, r, cond)["u"])


@pytest.mark.parametrize("backbone", registry.backbones.names())
def test_network_reads_scale_and_both_ends_and_takes_none_as_no_guidance(backbone):
    net = awake(small(backbone, guidance_input=True))
    x, t, r, cond = inputs(backbone)
    plain = net(x, t, r, cond)["u"]
    none = {**cond, "guidance": torch.tensor([[1.0, 0.0, 1.0]]).expand(5, 3)}
    torch.testing.assert_close(net(x, t, r, none)["u"], plain)
    for row in ([2.0, 0.0, 1.0], [1.0, 0.3, 1.0], [1.0, 0.0, 0.7]):
        told = {**cond, "guidance": torch.tensor([row]).expand(5, 3)}
        assert not torch.allclose(net(x, t, r, told)["u"], plain)


# samplers


def plain_oracle(x, t, r, cond):
    v = MIXTURE.velocity(x, t, cond)
    return {"u": v, "v": v}


LABELS = {"label": torch.arange(8) % 2}


def start():
    return torch.randn(8, 2, generator=rng(3), dtype=F64)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_classifier_free_guidance_follows_the_guided_field(interval):
    def field(x, t, r, cond):
        given, null = MIXTURE.velocity(x, t, cond), MIXTURE.velocity(x, t)
        inside = like(((interval[0] <= t) & (t <= interval[1])).to(x.dtype), x)
        return {"v": given + inside * 1.5 * (given - null)}

    sampler = ClassifierFree(nfe=10, scale=2.5, interval=interval, sampler=Euler(shift=2.0))
    found = sampler(plain_oracle, start(), LABELS, rng())
    torch.testing.assert_close(found, Euler(nfe=10, shift=2.0)(field, start(), LABELS, rng()))


def test_classifier_free_guidance_guides_the_average_velocity_too():
    def net(x, t, r, cond):
        return {"u": MIXTURE.velocity(x, (t + r) / 2, cond)}  # any function of x, t, r and label

    def field(x, t, r, cond):
        given, null = (net(x, t, r, c)["u"] for c in (cond, None))
        return {"u": null + 2.5 * (given - null)}

    sampler = ClassifierFree(nfe=2, scale=2.5, sampler=FlowMap())
    torch.testing.assert_close(
        sampler(net, start(), LABELS, rng()), FlowMap(nfe=2)(field, start(), LABELS, rng())
    )


def test_classifier_free_guidance_doubles_rows_inside_its_interval_alone():
    net = Heard(plain_oracle)
    ClassifierFree(nfe=10, scale=2.0, interval=(0.25, 0.75))(net, start(), LABELS, rng())
    labels = [cond["label"] for cond in net.conds]
    assert list(map(len, labels)) == [8] * 3 + [16] * 5 + [8] * 2
    inside = labels[3]
    assert torch.equal(inside[:8], LABELS["label"])
    assert (inside[8:] == NULL_LABEL).all()


def test_guidance_of_scale_one_asks_once_and_needs_no_labels():
    net = Heard(lambda x, t, r, cond: {"v": MIXTURE.velocity(x, t)})
    found = ClassifierFree(nfe=3, scale=1.0)(net, start(), None, rng())
    assert net.conds == [None] * 3
    assert found.equal(Euler(nfe=3)(net, start(), None, rng()))


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="needs a data set with labels"):
        ClassifierFree(nfe=2, scale=2.0)(plain_oracle, start(), None, rng())


def test_told_guidance_reaches_every_call():
    net = Heard(lambda x, t, r, cond: plain_oracle(x, t, r, {"label": cond["label"]}))
    InputGuidance(nfe=3, scale=4.0, interval=(0.3, 0.6))(net, start(), LABELS, rng())
    assert len(net.conds) == 3
    for cond in net.conds:
        assert torch.equal(cond["guidance"], torch.tensor([[4.0, 0.3, 0.6]] * 8, dtype=F64))


def test_wrapped_sampler_is_checked_as_if_alone():
    check_sampler("mean_flow", MeanFlow(), InputGuidance(sampler=FlowMap()))
    from zoo.objectives.flow_matching import FlowMatching

    with pytest.raises(ValueError, match="cannot use sampler 'flow_map'"):
        check_sampler("flow_matching", FlowMatching(), ClassifierFree(sampler=FlowMap()))
    with pytest.raises(ValueError, match=r"cfg\.interval"):
        ClassifierFree(interval=(0.8, 0.2))
    with pytest.raises(ValueError, match="nfe"):
        ClassifierFree(nfe=0)


# runs


def test_run_with_drawn_guidance_needs_the_input_and_is_sampled_with_it(tmp_path):
    def run(out, *bindings):
        bound = (*FILE_ONLY, "mean_flow.guidance = @log_uniform_guidance()", *bindings)
        return zoo("run", DIGITS, "--arm", "mean_flow", "--out", tmp_path / out, *sets(*bound))

    done = run("deaf")
    assert done.status == 2
    assert "Bind dit.guidance_input = True" in done.err
    sampler = ("run.sampler = @input_guidance()", "input_guidance.scale = 3.0")
    done = run("told", "dit.guidance_input = True", *sampler)
    assert done.status == 0, done.err
    assert "input_guidance" in done.out


@pytest.mark.parametrize(
    ("dataset", "sampler", "said"),
    [
        ("digits", "input_guidance", "Bind dit.guidance_input = True, and train with it; @cfg()"),
        ("labelless", "cfg", "cfg.scale = 3: guidance needs a data set with labels"),
        ("labelless", "input_guidance", "input_guidance.scale = 3: guidance needs a data set"),
    ],
)
def test_sampler_whose_guidance_would_do_nothing_is_refused_before_training(
    tmp_path, dataset, sampler, said
):
    bound = [*FILE_ONLY, f"run.sampler = @{sampler}()", f"{sampler}.scale = 3.0"]
    if dataset == "labelless":
        pictures = photos(tmp_path / "pictures", size=8)
        bound += ["run.dataset = @image_folder()", "image_folder.labelled = False"]
        bound += [f"image_folder.folder = {str(pictures)!r}", "image_folder.resolution = 8"]
    done = zoo("run", DIGITS, "--arm", "mean_flow", "--out", tmp_path / "out", *sets(*bound))
    assert done.status == 2
    assert said in done.err


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_guidance_against_a_label_that_is_never_dropped_is_warned_of(dropout, caplog):
    objective, sampler = FlowMatching(label_dropout=dropout), ClassifierFree(scale=2.0)
    check_guidance("flow_matching", objective, sampler, small("dit", ("v",)), 4)
    assert ("flow_matching.label_dropout = 0 never trains" in caplog.text) == (dropout == 0)


def test_told_scale_below_one_is_refused():
    with pytest.raises(ValueError, match=r"input_guidance\.scale = 0\.0 must be at least 1"):
        InputGuidance(scale=0.0)
