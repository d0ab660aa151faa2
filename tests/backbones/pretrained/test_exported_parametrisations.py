"""Exported networks keep what their readouts mean; folders that do not say it mean velocities."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from backbone_cases import awake, inputs, small
from public_networks import CLASSES, HEADS, transformer_state

import registry
from backbones import FlowNetwork, build_network, warm_start
from backbones.noise import NoiseNetwork, VpNoise
from backbones.parametrisations import EDM, Data, RawVelocity
from backbones.pretrained import exported
from backbones.pretrained.exported import load_exported, save_exported
from backbones.pretrained.imports import import_weights
from registry.protocols import Call


@pytest.mark.parametrize("name", registry.parametrisations.names())
def test_parametrisation_comes_back_from_its_folder(name, tmp_path):
    part = registry.parametrisations.get(name)()
    net = awake(small("mlp", ("u", "v", "logvar"), parametrisation=part)).eval()
    again = load_exported(save_exported(net, tmp_path / "out"))
    assert again.parametrisation == part
    for key, value in net(*inputs("mlp")).items():
        assert again(*inputs("mlp"))[key].equal(value)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Format 1 is what earlier versions read: they know these two meanings, and refuse format 2.
    former = {"raw_velocity": "flow", "vp_noise": "noise"}
    assert (config["format"], config["network"]) == (2 - (name in former), former.get(name, "flow"))
    assert ("parametrisation" in config) == (config["format"] == 2)


def test_settings_come_back_and_are_part_of_the_network(tmp_path):
    out = save_exported(small("mlp", ("u",), parametrisation=Data(t_min=0.2)), tmp_path / "out")
    assert load_exported(out).parametrisation == Data(t_min=0.2)
    config = json.loads((out / "config.json").read_text())
    for changed in ({"name": "data", "fields": {"t_min": 0.1}}, {"name": "edm", "fields": {}}):
        (out / "config.json").write_text(json.dumps(config | {"parametrisation": changed}))
        with pytest.raises(ValueError, match=r"other values of .*heads, parametrisation"):
            load_exported(out)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ("data", "does not describe a network: .*parametrisation are damaged"),
        ({"name": "data", "fields": None}, "parametrisation are damaged"),
        ({"name": "data", "fields": {"t_max": 1.0}}, "of another version .*t_max"),
        ({"name": "data", "fields": {"t_min": 0.0}}, "of another version .*t_min = 0.0"),
        ({"name": "dato", "fields": {}}, "no parametrisation named 'dato'. Did you mean 'data'"),
    ],
)
def test_damaged_description_is_refused(described, said, tmp_path):
    out = save_exported(small("mlp", ("u",), parametrisation=Data()), tmp_path / "out")
    config = json.loads((out / "config.json").read_text()) | {"parametrisation": described}
    config["defined_by"] = exported._digest(config)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, KeyError), match=said):
        load_exported(out)


def test_folder_of_an_earlier_version_means_velocities(tmp_path):
    """It has the same digest as before: of network, backbone, fields and heads alone."""
    out = save_exported(awake(small("mlp", ("u",))), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert "parametrisation" not in config
    assert exported._digest(config | {"parametrisation": 1}) == config["defined_by"]
    assert load_exported(out).parametrisation == RawVelocity()


def test_setting_that_json_cannot_hold_is_named(tmp_path):
    @dataclass(frozen=True)
    class Odd:
        weights: torch.Tensor

        def __call__(self, raw, key, at):
            return raw

    with registry.parametrisations.temporary("odd", Odd):
        net = small("mlp", ("u",), parametrisation=Odd(torch.zeros(1)))
        with pytest.raises(ValueError, match="odd.weights = tensor.* cannot be written as JSON"):
            save_exported(net, tmp_path / "out")


# public weights


@pytest.mark.parametrize("name", registry.parametrisations.names())
def test_public_weights_work_under_each(name):
    """A readout is what the public code computes, whatever it is said to mean."""
    imported = import_weights(transformer_state(swiglu=True), num_heads=HEADS)
    net, part = imported.network(), registry.parametrisations.get(name)()
    assert net.parametrisation == RawVelocity()
    x, t = torch.randn(2, *imported.shape), torch.tensor([0.3, 0.7])
    at = Call(x, t, t, {"label": torch.tensor([0, CLASSES - 1])})
    seen = part.inputs(at) if hasattr(part, "inputs") else at
    raw = net(seen.x, seen.t, seen.r, seen.cond)["v"]
    net = FlowNetwork(net.trunk, list(net.heads.values()), part)
    torch.testing.assert_close(net(x, t, t, at.cond)["v"], part(raw, "v", at))


def test_weights_that_predict_noise_start_a_student_that_does():
    imported = import_weights(transformer_state(out=6), "dit", num_heads=HEADS)
    teacher = imported.network()
    assert teacher.parametrisation == VpNoise()
    made = registry.backbones.get("dit")
    backbone = lambda **given: made(**imported.fields, **given)  # noqa: E731

    heads = imported.shape, imported.num_classes, ("u", "v"), None
    x, t = torch.randn(3, *imported.shape), torch.tensor([0.1, 0.5, 0.9])
    expected = teacher(x, t, t, {"label": torch.tensor([0, 1, 2])})["v"]
    student = build_network(backbone, *heads, VpNoise())
    warm_start(student, teacher)
    out = student(x, t, t, {"label": torch.tensor([0, 1, 2])})
    torch.testing.assert_close(out["v"], expected)
    torch.testing.assert_close(out["u"], expected)
    for other in (None, EDM()):
        with pytest.raises(ValueError, match=r"the teacher's vp_noise\(\)"):
            warm_start(build_network(backbone, *heads, other), teacher)


def test_former_class_of_noise_networks_goes_on():
    net = small("dit", ("v",))
    assert NoiseNetwork(net.trunk, list(net.heads.values())).parametrisation == VpNoise()
