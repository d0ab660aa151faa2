"""The deep dual head: blocks of its own for u and v, of which samples run those that they read."""

from __future__ import annotations

import json

import gin
import pytest
import torch
from backbone_cases import SMALL, awake, inputs, small

from backbones import warm_start
from backbones.heads import AverageVelocity, DeepDual, DualHead
from backbones.network import build_network
from backbones.pretrained.exported import load_exported, save_exported
from benchmarks.metrics.evaluate import draw, noise
from registry import backbones, samplers
from registry.sampling import outputs_for
from trainers.derivative_probe import probe_derivatives
from zoo.objectives.improved_mean_flow import ImprovedMeanFlow

TRUNKS = ("mlp", "dit", "lightning_dit")
each = pytest.mark.parametrize("backbone", TRUNKS)


def deep(backbone, blocks=2, **fields):
    with gin.unlock_config():
        gin.bind_parameter("deep_dual.blocks", blocks)
    return small(backbone, ("u", "v"), heads=(gin.get_configurable(DeepDual),), **fields)


@pytest.fixture(autouse=True)
def clean():
    yield
    gin.clear_config()


def blocks_run(net):
    """A list that collects the name of every block of the head that runs."""
    found = []
    for key, branch in net.heads["deep_dual"].branches.items():
        for block in branch.blocks:
            block.register_forward_hook(lambda *_, key=key: found.append(key))
    return found


@each
def test_every_output_has_as_many_blocks_as_are_asked_for(backbone):
    net, dual = deep(backbone, 3), small(backbone, ("u", "v"), heads=(DualHead,))
    size = {name: sum(p.numel() for p in made.parameters()) for name, made in
            (("deep", net), ("dual", dual), ("block", net.trunk.blocks[0]))}  # fmt: skip
    assert size["deep"] - size["dual"] == 2 * 3 * size["block"]
    gin.clear_config()
    assert len(small(backbone, ("u", "v"), heads=(DeepDual,)).heads["deep_dual"].branches["v"]
               .blocks) == 8  # fmt: skip


@each
def test_an_output_is_that_of_a_network_with_the_blocks_of_both(backbone):
    net = awake(deep(backbone, 2)).eval()
    depth = SMALL[backbone][1]["depth"]
    plain = small(backbone, ("u",), heads=(AverageVelocity,), depth=depth + 2).eval()
    head = net.heads["deep_dual"]
    for key in ("u", "v"):
        for ours, theirs in zip(plain.trunk.blocks[depth:], head.branches[key].blocks, strict=True):
            ours.load_state_dict(theirs.state_dict())
        added = {f"blocks.{depth + i}" for i in range(2)}  # which the trunk of `net` does not have
        kept = {k: v for k, v in plain.trunk.state_dict().items() if k[: len("blocks.0")] in added}
        plain.trunk.load_state_dict({**net.trunk.state_dict(), **kept})
        plain.heads["average_velocity"].readouts["u"].load_state_dict(
            head.readouts[key].state_dict()
        )
        point = inputs(backbone)
        assert net(*point)[key].equal(plain(*point)["u"])


@each
def test_blocks_of_an_output_that_is_not_asked_for_do_not_run(backbone):
    net = awake(deep(backbone, 2)).eval()
    point, run = inputs(backbone), blocks_run(net)
    whole = net(*point)
    assert sorted(run) == ["u", "u", "v", "v"]
    for key in ("u", "v"):
        run.clear()
        only = net(*point, asked=(key,))
        assert only.keys() == {key}
        assert only[key].equal(whole[key])
        assert run == [key, key]


@pytest.mark.parametrize(
    ("sampler", "read"),
    [
        (samplers.get("flow_map")(nfe=2), {"u"}),
        (samplers.get("restart")(nfe=2), {"u"}),
        (samplers.get("euler")(nfe=2), {"v"}),
        (samplers.get("mix")(nfe=3), {"u", "v"}),
        (samplers.get("input_guidance")(nfe=2, scale=2.0), {"u"}),
        (samplers.get("cfg")(nfe=2, scale=2.0), {"v"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else samplers.name_of(value),
)
def test_samples_run_the_blocks_that_their_sampler_reads(sampler, read):
    net = awake(deep("mlp", 1)).eval()
    run, x1 = blocks_run(net), noise((3,), 5, 0)
    cond = {"label": torch.arange(5) % 4}
    drawn = draw(net, sampler, x1, cond)
    assert set(run) == read
    whole = draw(lambda *given: net(*given), sampler, x1, cond)  # asks for everything
    assert drawn.equal(whole)


def test_sampler_reads_what_it_needs():
    euler, flow_map = samplers.get("euler")(), samplers.get("flow_map")()
    assert outputs_for(euler, ("u", "logvar")) == ("u",)
    assert outputs_for(euler, ("u", "v", "logvar")) == ("v",)
    assert outputs_for(flow_map, ("u", "v")) == ("u",)
    assert outputs_for(object(), ("u", "v")) == ("u", "v")


def test_trunk_without_equal_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match="UNet has no branch.blocks. that makes them. Choose @dit"):
        small("unet", ("u", "v"), heads=(DeepDual,))


@each
def test_network_comes_back_from_its_folder(backbone, tmp_path):
    net = awake(deep(backbone, 3)).eval()
    save_exported(net, tmp_path / "out")
    gin.clear_config()
    again = load_exported(tmp_path / "out")
    for key, value in net(*inputs(backbone)).items():
        assert again(*inputs(backbone))[key].equal(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["head_fields"]["deep_dual"].update(blocks=1), "not as it was"),
        (lambda config: config.pop("head_fields"), "not as it was exported"),
    ],
)
def test_number_of_blocks_that_was_changed_is_refused(change, message, tmp_path):
    path = save_exported(deep("mlp", 2), tmp_path / "out") / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "out")


def test_warm_start_copies_the_blocks_of_the_head():
    teacher, student = awake(deep("dit", 2)).eval(), deep("dit", 2, seed=3).eval()
    warm_start(student, teacher)
    for key, value in teacher(*inputs("dit")).items():
        assert student(*inputs("dit"))[key].equal(value)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (lambda: deep("dit", 2), lambda: small("dit", ("v",))),
        (lambda: small("dit", ("u", "v")), lambda: deep("dit", 2)),
        (lambda: deep("dit", 2), lambda: deep("dit", 1)),
    ],
    ids=["only_the_student", "only_the_teacher", "another_number"],
)
def test_warm_start_between_different_heads_is_refused(student, teacher):
    with pytest.raises(ValueError, match="heads with blocks of their own are"):
        warm_start(student(), teacher())


@each
def test_derivative_is_probed_and_right(backbone):
    net, (x, _, _, cond) = deep(backbone, 1), inputs(backbone)
    found = probe_derivatives(ImprovedMeanFlow(), net, x, cond)
    assert 0 < found["derivative_error"] < 1e-4


def test_checkpointing_reaches_the_blocks_of_the_head():
    trunk = lambda **given: backbones.get("dit")(  # noqa: E731
        **given, dim=16, depth=1, num_heads=2, checkpointing=True
    )
    net = build_network(trunk, (3, 4, 6), 4, ("u", "v"), [DeepDual])
    assert all(branch.checkpointing for branch in net.heads["deep_dual"].branches.values())
    awake(net)
    gradients = []
    for checkpointing in (True, False):
        for branch in net.heads["deep_dual"].branches.values():
            branch.checkpointing = checkpointing
        net.zero_grad()
        sum(value.square().sum() for value in net(*inputs("dit")).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.heads.parameters()]))
    assert gradients[0].equal(gradients[1])
    assert gradients[0].norm() > 0
