"""Exported networks, and public checkpoints as teachers and starts of runs."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gin
import pytest
import torch
from backbone_cases import awake, inputs, small
from public_networks import DEPTH, DIM, HEADS, transformer, transformer_state
from safetensors.torch import load_file, save_file
from tiny_runs import METRIC, SIZES, sets, zoo

import registry
from backbones.pretrained import exported
from backbones.pretrained.exported import load_exported, save_exported
from benchmarks.runs.initial_weights import load_pretrained


@pytest.mark.parametrize("backbone", registry.backbones.names())
@pytest.mark.parametrize("keys", [("v",), ("u", "v", "logvar")])
def test_network_comes_back_from_its_folder_bit_by_bit(backbone, keys, tmp_path):
    net = awake(small(backbone, keys)).eval()
    save_exported(net, tmp_path / "out")
    again = load_exported(tmp_path / "out")
    assert not again.training
    for key, value in net(*inputs(backbone)).items():
        assert again(*inputs(backbone))[key].equal(value)


def test_exported_folder_does_not_look_at_gin(tmp_path):
    net = awake(small("dit", qk_norm=True, second_time="r")).eval()
    expected = net(*inputs("dit"))["u"]
    save_exported(net, tmp_path / "out")
    gin.parse_config("dit.dim = 8\ndit.qk_norm = False\ndit.second_time = 'h'")
    assert load_exported(tmp_path / "out")(*inputs("dit"))["u"].equal(expected)


def test_exported_folder_is_what_the_hub_takes(tmp_path):
    from huggingface_hub import ModelCard

    save_exported(small("dit"), tmp_path / "out", objective="mean_flow")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "objective-zoo"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["objective"] == "mean_flow"
    assert config["parameters"] == sum(p.numel() for p in small("dit").parameters())


def test_folder_that_cannot_be_exported_or_read_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        save_exported(small("mlp"), tmp_path / "full")
    with pytest.raises(ValueError, match=r"full has no config.json"):
        load_exported(tmp_path / "full")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config | {"format": 3}, "of format 3; this version reads formats 1 and 2"),
        (lambda config: [config], "of format None"),
        (lambda config: config["fields"].update(num_heads=1) or config, "not as it was exported"),
        (lambda config: config | {"heads": ["velocity"]}, "not as it was exported"),
        (lambda config: config.pop("network") and config, "not as it was exported"),
        (lambda config: config | {"objective": "mine", "outputs": []}, None),
    ],
)
def test_config_that_was_changed_is_refused_where_it_matters(change, said, tmp_path):
    """With other numbers of heads the weights would fit and compute something else."""
    out = save_exported(small("dit", ("u",)), tmp_path / "out")
    path = out / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    if said is None:
        load_exported(out)
        return
    with pytest.raises(ValueError, match=said):
        load_exported(out)


def test_config_that_is_no_json_or_of_another_version_is_named(tmp_path, monkeypatch):
    out = save_exported(small("dit"), tmp_path / "out")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text[:-9])
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_exported(out)
    (out / "config.json").write_text(text.replace('"dim"', '"width"'))
    monkeypatch.setattr(
        "backbones.pretrained.exported._digest", lambda config: config["defined_by"]
    )
    with pytest.raises(ValueError, match="another version of this package.*width"):
        load_exported(out)


def test_trunk_that_does_not_say_what_it_was_made_with_is_refused(tmp_path):
    class Foreign(torch.nn.Module):
        dim = 4

        def __init__(self, *, shape, num_classes=0, two_times=False):
            super().__init__()

        def readout(self):
            return torch.nn.Identity()

    from backbones import build_network

    with registry.backbones.temporary("foreign", Foreign):
        net = build_network(Foreign, (3,), 0, ("v",))
        with pytest.raises(
            ValueError, match="'foreign' does not say .* backbones.trunk.TrunkModule"
        ):
            save_exported(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# public files


def test_public_file_is_read_from_every_container(tmp_path):
    state = transformer_state(swiglu=True)
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    t = torch.rand(2)
    expected = -transformer(state, x, 1 - t, label)
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"ema": state, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    compiled = {f"module._orig_mod.{name}": value for name, value in state.items()}
    torch.save({"model": compiled, "step": 3}, tmp_path / "b.pt")
    for name in ("a.safetensors", "a.pt", "b.pt"):
        net = load_pretrained(tmp_path / name, num_heads=HEADS)
        torch.testing.assert_close(net(x, t, t, {"label": label})["v"], expected, **CLOSE)


CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # sums of a few hundred float32 products in another order


class Bad:
    def __reduce__(self):
        return (print, ("executed",))


def test_file_that_would_execute_something_is_refused(tmp_path, capsys):
    torch.save({"model": Bad()}, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match=r"bad.pt: to read it, Python would have to execute builtins.print"
    ):
        load_pretrained(tmp_path / "bad.pt")
    assert "executed" not in capsys.readouterr().out


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*gone.pt"):
        load_pretrained(tmp_path / "gone.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn.safetensors: it is a text, not weights"):
        load_pretrained(tmp_path / "torn.safetensors")


# runs

RUN = (
    *SIZES,
    *METRIC,
    "run.recorder = @jsonl()",
    "run.dataset = @image_folder()",
    "image_folder.resolution = 8",
    "run.backbone = @lightning_dit",
    "lightning_dit.patch = 2",
    f"lightning_dit.dim = {DIM}",
    f"lightning_dit.depth = {DEPTH}",
    f"lightning_dit.num_heads = {HEADS}",
    "lightning_dit.time_features = 'dit'",
    "lightning_dit.max_frequency = 1.0",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """As many classes as the public networks of the tests have."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for label in "abcde":
        (folder / label).mkdir()
        for i in range(6):
            colour = (40 * i, 9, 40 * "abcde".index(label))
            Image.new("RGB", (9, 8), colour).save(folder / label / f"{i}.png")
    return folder


def run(pictures: Path, arm: str, out: Path, *bindings: str, backbone: str = "lightning_dit"):
    bound = [binding.replace("lightning_dit", backbone) for binding in RUN]
    bound += [f"image_folder.folder = '{pictures}'", *bindings]
    return zoo("run", "experiments/digits.gin", "--arm", arm, "--out", out, *sets(*bound))


def test_public_checkpoint_teaches_and_starts_its_student(pictures, tmp_path):
    state = transformer_state(swiglu=True)
    save_file(state, tmp_path / "teacher.safetensors")
    bound = ["frozen.pretrain = 0.0", f"frozen.checkpoint = '{tmp_path / 'teacher.safetensors'}'"]
    done = run(pictures, "decm", tmp_path / "out", *bound)
    assert done.status == 0, done.err
    student = load_file(tmp_path / "out" / "decm" / "model.safetensors")
    name = "trunk.blocks.1.attn.qkv.weight"
    ours, theirs = student[name], state["blocks.1.attn.qkv.weight"]
    assert 0 < (ours - theirs).abs().max() < 0.01  # four steps of warm-up

    bound.append("lightning_dit.max_frequency = 8.0")
    done = run(pictures, "decm", tmp_path / "other", *bound)
    assert done.status == 2
    assert "max_frequency = 8.0, the teacher's 1.0" in done.err


def test_run_starts_from_an_exported_folder_and_ends_in_one(pictures, tmp_path):
    save_file(transformer_state(swiglu=True), tmp_path / "public.safetensors")
    words = ("--layout", "lightning_dit", "--num-heads", HEADS)
    done = zoo("export", tmp_path / "public.safetensors", "--out", tmp_path / "start", *words)
    assert done.status == 0, done.err
    assert "not needed: pos_embed (the fixed positions)" in done.err

    start = f"run.start_from = '{tmp_path / 'start'}'"
    done = run(pictures, "mean_flow", tmp_path / "out", start, "adamw.lr = 1e-12")
    assert done.status == 0, done.err
    finished = tmp_path / "out" / "mean_flow"
    done = zoo("export", finished, "--out", tmp_path / "end")
    assert done.status == 0, done.err
    before, after = load_exported(tmp_path / "start"), load_exported(tmp_path / "end")
    x, t, label = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 1, -1])
    expected = before(x, t, t, {"label": label})["v"]
    for r in (t, 0 * t):
        found = after(x, t, r, {"label": label})["u"]
        # Four steps of 1e-12 times the learning rate's factor, on the averaged weights.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_start_for_other_data_is_refused(pictures, tmp_path):
    save_file(transformer_state(swiglu=True), tmp_path / "public.safetensors")
    start = f"run.start_from = '{tmp_path / 'public.safetensors'}'"
    done = run(pictures, "mean_flow", tmp_path / "out", start, "image_folder.resolution = 16")
    assert done.status == 2
    assert "the shape of its data is (3, 8, 8); that of image_folder is (3, 16, 16)" in done.err
    assert not (tmp_path / "out").exists()


def test_noise_predictor_teaches_only_a_student_with_other_weights(pictures, tmp_path):
    save_file(transformer_state(out=6), tmp_path / "dit.safetensors")
    save_file(transformer_state(out=6), tmp_path / "sit.safetensors")
    bound = [
        "frozen.pretrain = 0.0",
        f"frozen.checkpoint = '{tmp_path / 'dit.safetensors'}'",
        "frozen.layout = 'dit'",
    ]
    done = run(pictures, "decm", tmp_path / "alone", *bound, backbone="dit")
    assert done.status == 2
    assert "bind run.start_from to other weights for the student" in done.err
    start = [f"run.start_from = '{tmp_path / 'sit.safetensors'}'", "run.start_layout = 'sit'"]
    done = run(pictures, "decm", tmp_path / "out", *bound, *start, backbone="dit")
    assert done.status == 0, done.err


# folders of somebody else


def rewritten(out: Path, **fields) -> Path:
    """The folder with other fields, and the hash that belongs to them."""
    config = json.loads((out / "config.json").read_text())
    config["fields"] |= fields
    config["defined_by"] = exported._digest(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"depth": 10**8}, "depth = 100000000, and the file of its weights holds"),
        ({"depth": 60_000}, "describes a larger network than the file of its weights holds"),
        ({"dim": 2**16, "num_heads": 1}, "describes a larger network"),
        ({"num_classes": 2**62}, "num_classes = .* holds"),
        ({"shape": [1, 50_000, 50_000], "patch": 1}, "describes a larger network"),
        ({"shape": [1, 10**9, 10**9], "patch": 7}, "the two do not belong together"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio = inf, and the file"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan, and the file"),
        ({"mlp_ratio": 60_000.0}, "describes a larger network"),
    ],
)
def test_configuration_cannot_ask_for_more_than_the_weights_hold(fields, said, tmp_path):
    out = rewritten(save_exported(small("dit"), tmp_path / "out"), **fields)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=said):
        load_exported(out)
    assert time.monotonic() - begun < 10  # at 10^8 layers it went on for minutes


def test_configuration_of_another_size_is_refused_by_its_tensors(tmp_path):
    out = rewritten(save_exported(small("dit"), tmp_path / "out"), depth=3)
    with pytest.raises(ValueError, match="does not fit this network"):
        load_exported(out)


def test_weights_that_were_changed_or_exchanged_are_refused(tmp_path):
    out = save_exported(small("mlp"), tmp_path / "out")
    path = out / "model.safetensors"
    save_file({name: x + 1 for name, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="model.safetensors is not the file that was exported"):
        load_exported(out)
    config = json.loads((out / "config.json").read_text())
    del config["weights_sha256"]  # as earlier versions wrote it
    (out / "config.json").write_text(json.dumps(config))
    load_exported(out)


def test_links_out_of_the_folder_are_refused(tmp_path):
    for name in ("model.safetensors", "config.json"):
        out = save_exported(small("mlp"), tmp_path / name / "out")
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to("../elsewhere")
        with pytest.raises(ValueError, match=f"{name} is a link to"):
            load_exported(out)


@pytest.mark.parametrize(
    "change", [{"backbone": 3}, {"fields": [1]}, {"heads": "velocity"}, {"network": "other"}]
)
def test_configuration_that_describes_no_network_is_named(change, tmp_path):
    out = save_exported(small("mlp"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text()) | change
    config["defined_by"] = exported._digest(config)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not describe a network"):
        load_exported(out)


def test_folder_of_another_package_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="the configuration of another package.*model.bin"):
        load_exported(tmp_path)
