"""Every gin file that ships is read, says what it is, and builds runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import gin
import pytest
import torch
from tiny_vaes import save_tiny

from backbones.network import build_network
from benchmarks.experiments.build import run
from benchmarks.grids.axes import bindings
from benchmarks.grids.cells import plan
from benchmarks.grids.request import Request
from benchmarks.latents.autoencoders import find_vae
from benchmarks.latents.encode import encode
from benchmarks.latents.shard_encoder import Encoder
from registry import gin_setup

ROOT = Path(__file__).parents[1] / "gin"
FILES = sorted(f.relative_to(ROOT).as_posix() for f in ROOT.rglob("*.gin"))
WHOLE = [f for f in FILES if f.split("/")[0] in ("experiments", "grids")]
PARTS = [f for f in FILES if f not in WHOLE]
SMALL_MLP = ("run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")
# What a file expects from the one that includes it.
NEEDS = {
    "data/image_folder.gin": "image_folder.folder",
    "data/hf_images.gin": "hf_images.path",
    "data/latents.gin": "latents.folder",
}
NEEDS |= {
    file: "latents.folder"
    for file in FILES
    if file.startswith("recipes/") and "cifar" not in file  # see tests/test_recipes.py
}
NEEDS |= {"recipes/pixel_mean_flow_b16.gin": "image_folder.folder"}


def in_folder(name: str) -> list[str]:
    return [f for f in FILES if f.startswith(f"{name}/")]


def depth(file: str) -> int:
    includes = re.findall(r"^include '(.*)'", (ROOT / file).read_text(), re.MULTILINE)
    return 1 + max(map(depth, includes), default=-1)


@pytest.mark.parametrize("file", FILES)
def test_file_says_what_it_is_and_keeps_the_style(file):
    text = (ROOT / file).read_text()
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 100
    assert "skip_unknown" not in text
    assert depth(file) <= 3  # a grid, its experiment, its parts, and one variation of a part


@pytest.mark.parametrize("file", FILES)
def test_file_is_read_and_every_name_in_it_exists(file):
    gin_setup.parse([file])
    if file in NEEDS:
        with pytest.raises(ValueError, match=NEEDS[file]), gin_setup.arm():
            pass
    else:
        with gin_setup.arm():
            pass


@pytest.mark.parametrize("file", WHOLE)
def test_comparison_builds_every_arm_and_uses_all_that_the_file_binds(file):
    text = "".join((ROOT / f).read_text() for f in [file, *includes_of(file)])
    small = ["run.num_samples = 12", "run.recorder = @jsonl()"]
    small += ["unet.channels = 8"] if "@unet" in text else ["mlp.dim = 8", "mlp.depth = 3"]
    request = Request(file=Path(file), bindings=tuple(small))
    axes = replace(request.axes(), repeat={})  # one seed shows as much
    planned = plan(request, axes)
    arms = gin_setup.query("Grid.arms")
    assert [(one.cell.arm, one.bindings) for one in planned.cells] == [
        (arm, bindings(arm, setting)) for arm, setting in axes.cells(arms)
    ]
    assert len(planned.cells) > 1
    assert planned.notes == ()


def includes_of(file: str) -> list[str]:
    found = re.findall(r"^include '(.*)'", (ROOT / file).read_text(), re.MULTILINE)
    return found + [inner for f in found for inner in includes_of(f)]


@pytest.mark.parametrize("file", in_folder("objective"))
def test_objective_binds_every_part_of_itself_by_reference(file):
    """Only then do the bindings of the parts take effect, whatever the defaults are."""
    objective = gin_setup.bindings_of((ROOT / file).read_text())
    name = next(key.split(".")[0] for key in objective if "/" not in key)
    data = ["data/gaussian.gin", "trainer/cpu.gin", file]
    gin_setup.parse(data, [f"run.objective = @{name}()", "run.steps = 1", *SMALL_MLP])
    experiment = run()
    assert experiment.objective_name == name
    unused = [key for key in gin_setup.inert_bindings() if not key.startswith("exact.")]
    assert [key for key in unused if key in objective] == []  # exact.* waits for dumo.residual


@pytest.mark.parametrize("file", in_folder("backbone"))
def test_backbone_has_the_parameters_that_its_file_says(file):
    name, shape = ("dit", (4, 32, 32))
    if "lightning_dit" in file:
        name, shape = ("lightning_dit", (32, 16, 16))
    gin_setup.parse([file], [f"{name}.patch = {1 if shape[0] == 32 else 2}"])
    said = re.findall(r"([\d.]+)M with", (ROOT / file).read_text().replace("also 131M with", ""))
    for keys, millions in zip((("v",), ("u",), ("u", "v")), said, strict=True):
        with torch.device("meta"):
            net = build_network(gin.get_configurable(name), shape, 1000, keys)
        count = sum(p.numel() for p in net.parameters())
        assert count / 1e6 == pytest.approx(float(millions), abs=0.06), keys


@pytest.mark.parametrize("file", in_folder("data"))
def test_data_file_gives_batches(file, tmp_path, tmp_path_factory):
    from PIL import Image

    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for i in range(6):
            Image.new("RGB", (40, 36), (40 * i, 9, 99)).save(tmp_path / label / f"{i}.png")
    folder = tmp_path
    if file == "data/latents.gin":
        pytest.importorskip("diffusers")
        folder = tmp_path_factory.mktemp("encoded") / "latents"
        vae = find_vae(str(save_tiny(folder.with_name("vae"))))
        encode(tmp_path, folder, Encoder(vae=vae, resolution=16))
    bound = [f"{NEEDS[file]} = '{folder}'"] if file in NEEDS else []
    gin_setup.parse([file, "objective/flow_matching.gin", "trainer/cpu.gin"], bound)
    try:
        dataset = gin_setup.query("run.dataset").scoped_configurable_fn()
    except FileNotFoundError:
        # It says where the data come from.
        pytest.skip("the data are not on this machine")
    x0, _ = dataset.batch(0, 4, 0)
    assert x0.shape == (4, *dataset.shape)


@pytest.mark.parametrize("file", in_folder("trainer"))
def test_trainer_file_is_used_to_the_last_binding(file):
    below = [] if file == "trainer/cpu.gin" else ["trainer/cpu.gin"]
    gin_setup.parse(
        ["data/gaussian.gin", "objective/flow_matching.gin", *below, file],
        ["run.objective = @flow_matching()", "run.steps = 1", *SMALL_MLP],
    )
    run()
    bound = gin_setup.bindings_of((ROOT / file).read_text())
    assert [key for key in gin_setup.inert_bindings() if key in bound] == []
