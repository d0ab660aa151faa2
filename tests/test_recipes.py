"""Each recipe against its paper: sizes, tokens, operations, schedules; and whole, at toy size."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import gin
import pytest
import torch
from tiny_runs import entries, zoo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.builtin_parts  # noqa: F401  registers every part
from backbones.network import build_network
from benchmarks.commands.smoke import shrunken
from benchmarks.data.edm_augment import _draws, augmented, labels
from benchmarks.grids.comparison import compare
from benchmarks.grids.request import Request
from benchmarks.planning.outline import outline
from registry import gin_setup, samplers
from zoo.guidance import LogUniformGuidance
from zoo.teachers import warmed_up
from zoo.times import LogitNormalPair, TwoLogitNormals

ROOT = Path(__file__).parents[1] / "gin" / "recipes"
RECIPES = sorted(file.stem for file in ROOT.glob("*.gin"))
SD, VA, PIXELS, PICTURES = (4, 32, 32), (32, 16, 16), (3, 32, 32), (3, 256, 256)
IMAGENET = 1_281_167

# Published sizes in millions; those of DiTs include 0.3M of frozen positions, a buffer here.
# Shortcut: its paper's 675M is DiT-XL/2; our step size has an embedder of its own.
# DE-CM and FACM: 675M is the teacher's; the student has a second time embedder.
# pMF: that of our DiT-B in its place.
# iMF: ours alone. Its 89M and 610M are of networks without modulation and without the blocks of v.
SIZES = {
    "flow_matching_xl2": (SD, 675.1),
    "mean_flow_b4": (SD, 131),
    "mean_flow_b2": (SD, 131),
    "mean_flow_m2": (SD, 308),
    "mean_flow_l2": (SD, 459),
    "mean_flow_xl2": (SD, 676.8),
    "shortcut_b2": (SD, 131),
    "shortcut_xl2": (SD, 676.8),
    "dumo_xl2": (SD, 679.45),
    "decm_xl1": (VA, 676.6),
    "facm_xl1": (VA, 676.6),
    "mean_flow_cifar10": (PIXELS, 55.9),
    "consistency_cifar10": (PIXELS, 55.9),
    "trig_consistency_cifar10": (PIXELS, 55.9),
    "decoupled_mean_flow_xl2": (SD, 675.1),
    "explicit_shortcut_xl2": (SD, 676.8),
    "pixel_mean_flow_b16": (PICTURES, 135.2),
    "improved_mean_flow_b2": (SD, 218.5),
    "improved_mean_flow_xl2": (SD, 1067.6),
    "so_flow_xl2": (SD, 676.8),
    "terminal_velocity_xl2": (SD, 678.4),  # published as 678M
}
TOKENS = dict.fromkeys(SIZES, 256) | {"mean_flow_b4": 64}
EPOCHS = {
    "flow_matching_xl2": 1400,
    "mean_flow_b4": 80,
    "mean_flow_b2": 240,
    "mean_flow_m2": 240,
    "mean_flow_l2": 240,
    "mean_flow_xl2": 240,
    "shortcut_xl2": 250,
    "dumo_xl2": 424,
    "decm_xl1": 250,
    "improved_mean_flow_b2": 640,
    "improved_mean_flow_xl2": 640,
    "so_flow_xl2": 240,
    "terminal_velocity_xl2": 240,  # ours
    "facm_xl1": 250,
    "explicit_shortcut_xl2": 240,
    "pixel_mean_flow_b16": 320,
}

each = pytest.mark.parametrize("recipe", RECIPES)


def parsed(recipe: str) -> None:
    data = "image_folder" if recipe.startswith("pixel") else "latents"
    bound = [f"{data}.folder = 'x'"]
    gin_setup.parse([ROOT / f"{recipe}.gin"], bound)
    start = [key for key in ("frozen.checkpoint", "run.start_from") if gin_setup.query(key)]
    gin_setup.parse([ROOT / f"{recipe}.gin"], [*bound, *(f"{key} = 'x'" for key in start)])


@cache
def network(recipe: str, keys: tuple[str, ...] = ()):
    """The recipe's network, or one with these outputs, on the meta device; nobody changes it."""
    made = outline(Request(file=ROOT / f"{recipe}.gin"))
    assert made.shape == SIZES[recipe][0]
    if not keys:
        return made.step.net
    with torch.device("meta"):
        backbone = gin_setup.build("run.backbone")
        return build_network(backbone, made.shape, made.num_classes, keys)


def count(net) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


# what a file says


@each
def test_recipe_is_in_the_tables_and_says_what_to_expect(recipe):
    text = (ROOT / f"{recipe}.gin").read_text()
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line[:1] == "#")
    assert recipe in SIZES
    assert re.search(r"arXiv \d{4}\.\d{5}", header)
    assert "Expected: FID" in header
    assert re.search(r"(Hardware|hardware|Time|time).*(not found|not disclosed|TPU)", header)
    assert "Our reading" in header
    assert len(text.splitlines()) < 45


@pytest.mark.parametrize("recipe", EPOCHS)
def test_budget_is_the_stated_number_of_epochs(recipe):
    parsed(recipe)
    assert gin_setup.query("run.images") == EPOCHS[recipe] * IMAGENET


def test_budget_of_decoupled_mean_flow_is_that_of_its_command():
    parsed("decoupled_mean_flow_xl2")
    assert gin_setup.query("run.images") == 400_000 * gin_setup.query("run.batch_size")


def test_budget_of_shortcut_b2_is_its_readmes():
    parsed("shortcut_b2")
    assert gin_setup.query("run.images") == 810_000 * gin_setup.query("run.batch_size")


# the networks


@each
def test_network_has_the_published_size(recipe):
    assert abs(count(network(recipe)) - SIZES[recipe][1]) < 0.5


@pytest.mark.parametrize("recipe", [name for name in TOKENS if SIZES[name][0] != PIXELS])
def test_network_has_the_published_number_of_tokens(recipe):
    trunk = network(recipe).trunk
    assert trunk.positions.shape == (TOKENS[recipe], trunk.dim)


def test_second_parts_cost_what_the_papers_say():
    """One second embedder 675.1M -> 676.8M; a second final layer less than half a percent more."""
    one, two, dual = (
        count(network("mean_flow_xl2", keys)) for keys in (("v",), ("u",), ("u", "v"))
    )
    assert two - one == pytest.approx(676.8 - 675.1, abs=0.1)
    assert dual - two == pytest.approx(2.67, abs=0.01)


@each
def test_second_embedder_sees_what_the_papers_say(recipe):
    """The end r in DE-CM, FACM and RCGM, DuMo's line; the interval in MeanFlow and Shortcut."""
    fields = network(recipe).trunk.fields
    if fields["two_times"]:
        ends = ("decm_xl1", "dumo_xl2", "facm_xl1")
        assert fields["second_time"] == ("r" if recipe in ends else "h")


def test_lightning_dit_teacher_has_the_published_size():
    assert count(network("decm_xl1", ("v",))) == pytest.approx(675, abs=0.5)


@pytest.mark.parametrize(
    ("recipe", "published"),
    [("flow_matching_xl2", 118.64), ("mean_flow_l2", 80.71), ("mean_flow_b2", 23.01),
     ("mean_flow_b4", 5.56)],
)  # fmt: skip
def test_an_image_costs_the_published_multiplications(recipe, published):
    """In 10^9 multiply-adds, as DiT's table counts them; each is two operations here."""
    net = network(recipe, ("v",))
    x, t = torch.zeros(1, *SD, device="meta"), torch.zeros(1, device="meta")
    label = {"label": torch.zeros(1, dtype=torch.int64, device="meta")}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, t, t, label)
    assert counter.get_total_flops() / 2e9 == pytest.approx(published, rel=0.003)


# schedules


@each
def test_learning_rate_is_constant_after_its_warm_up(recipe):
    parsed(recipe)
    schedule, optimizer = gin_setup.build("run.schedule"), gin_setup.build("run.optimizer")
    imf = recipe.startswith("improved_mean_flow")
    warmup = 9766 if recipe == "mean_flow_cifar10" else 12_512 if imf else 0
    peak = {"mean_flow_cifar10": 6e-4, "dumo_xl2": 2e-4}.get(recipe, 1e-4)
    batch = gin_setup.query("run.batch_size")
    total = gin_setup.query("run.images") // batch
    for step in (warmup, total // 2, total - 1):
        assert optimizer.lr * schedule(step, step / total) == pytest.approx(peak)
    if warmup:
        images = 10 * IMAGENET if imf else 200 * 50_000  # 10 epochs, or 200 of CIFAR-10
        assert warmup == pytest.approx(images / batch, abs=1)
        assert schedule(0, 0.0) == pytest.approx(1 / warmup)
        assert schedule(warmup // 2 - 1, 0.0) == pytest.approx(0.5)


@each
def test_batch_optimizer_and_dropped_labels_are_the_papers(recipe):
    """Batch, second moment, decay.

    The second moment is 0.95 in MeanFlow's and iMF's released codes, 0.99 in SoFlow's, and Adam's
    0.999 in the others.
    """
    parsed(recipe)
    batch, beta, decay = 256, 0.95, 0.0
    if recipe.endswith("consistency_cifar10"):
        batch, beta = (512, 0.99) if recipe.startswith("trig") else (128, 0.999)
    imf = recipe.startswith("improved_mean_flow")
    large = ("mean_flow_cifar10", "dumo_xl2", "decm_xl1", "facm_xl1", "pixel_mean_flow_b16")
    if imf or recipe in large:
        batch = 1024
    if recipe == "so_flow_xl2":
        beta = 0.99
    if recipe == "terminal_velocity_xl2":
        batch = 2048
    if (
        recipe.startswith(("flow_matching", "shortcut", "decm", "facm"))
        or recipe == "mean_flow_cifar10"
    ):
        beta = 0.999
    if recipe.startswith("shortcut"):
        decay = 0.1
    optimizer = gin_setup.build("run.optimizer")
    assert gin_setup.query("run.batch_size") == batch
    assert (*optimizer.betas, optimizer.weight_decay) == (0.9, beta, decay)
    dropped = 0 if recipe.endswith("cifar10") or recipe == "facm_xl1" else 0.1
    name = gin_setup.query("run.objective").configurable.name
    assert gin_setup.query(f"{name}.label_dropout") == dropped


@pytest.mark.parametrize("recipe", [name for name in SIZES if name.startswith("mean_flow")])
def test_times_and_weights_of_mean_flow_are_the_papers(recipe):
    parsed(recipe)
    objective = gin_setup.build("run.objective")
    times, weight = objective.times, objective.weight
    found = times.mean, times.std, times.off_diagonal_fraction, weight.power, weight.offset
    cifar = recipe == "mean_flow_cifar10"
    assert found == ((-2, 2, 0.75, 0.75, 1e-3) if cifar else (-0.4, 1, 0.25, 1, 0.01))


@each
def test_average_of_the_weights_reaches_its_decay(recipe):
    parsed(recipe)
    decay = gin_setup.query("run.ema_decay")
    # Shortcut's code samples with the online weights, which are the average of decay 0.
    special = {"shortcut_b2": 0.0, "shortcut_xl2": 0.0, "mean_flow_cifar10": 0.99995}
    assert decay == special.get(recipe, 0.9999)
    early = [min(0.1, decay), min(0.91, decay)]
    assert [warmed_up(decay, step) for step in (0, 90, 10**7)] == [*early, decay]


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [("mean_flow_b4", 3), ("mean_flow_b2", 2), ("mean_flow_m2", 2), ("mean_flow_l2", 2.5),
     ("mean_flow_xl2", 2.5), ("dumo_xl2", 2), ("shortcut_xl2", 1.5), ("facm_xl1", 1.75),
     ("decoupled_mean_flow_xl2", 2.5), ("explicit_shortcut_xl2", 2.5), ("decm_xl1", 1.75)],
)  # fmt: skip
def test_guidance_has_the_published_scale(recipe, scale):
    parsed(recipe)
    if recipe in ("decm_xl1", "facm_xl1"):
        name = gin_setup.query("run.objective").configurable.name
        assert gin_setup.query(f"{name}.guidance_scale") == scale
    else:
        assert gin_setup.build("run.objective").guidance_scale == pytest.approx(scale)


def test_cifar_recipe_is_the_papers():
    parsed("mean_flow_cifar10")
    assert gin_setup.query("run.images") == 16_000 * 50_000
    with torch.device("meta"):
        trunk = gin.get_configurable("ddpmpp")(shape=PIXELS, two_times=True)
    assert trunk.fields["dropout"] == 0.2
    assert trunk.fields["num_augments"] == labels(_draws(0.12, 0, 0)).shape[1]


@pytest.mark.parametrize(
    ("recipe", "batch", "images"),
    [("consistency_cifar10", 128, 25_600_000), ("trig_consistency_cifar10", 512, 204_800_000)],
)
def test_budget_after_the_start_is_the_papers(recipe, batch, images):
    """200,000 and 400,000 steps, after 200 million images of flow matching."""
    parsed(recipe)
    whole, first = gin_setup.query("run.images"), gin_setup.query("run.pretrain")
    assert whole - images == 200_000_000
    assert whole * first == pytest.approx(200_000_000, rel=1e-3)
    assert images // batch in (200_000, 400_000)
    if recipe.startswith("trig"):
        assert gin_setup.build("run.objective").warmup * images / batch == pytest.approx(10_000)


# whole, at toy size


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smoke")


# A recipe takes seconds. By default there are one with a derivative and one without, and below
# decm_xl1 by the command.
WHOLE = ("flow_matching_xl2", "mean_flow_b2")


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=() if r in WHOLE else pytest.mark.slow) for r in RECIPES]
)
def test_recipe_runs_whole_at_toy_size(recipe, data, tmp_path):
    pytest.importorskip("diffusers")
    request = shrunken(Request(file=ROOT / f"{recipe}.gin"), data)
    (row,) = compare(request, tmp_path / "out").rows.values()
    (result,) = row.results
    assert result.num_params < 200_000
    assert result.steps == 4
    assert all(f"nfe{n}/kid_pixels" in result.values for n in gin_setup.query("run.nfe"))
    folder = next(path.parent for path in (tmp_path / "out").glob("*/record.jsonl"))
    logged = [e["values"] for e in entries(folder, "metrics") if "loss" in e["values"]]
    assert all(torch.tensor(values["loss"]).isfinite() for values in logged)
    if recipe in UNGUIDED_AT_FIRST:
        check_first_loss(logged[0][f"terms/{UNGUIDED_AT_FIRST[recipe]}"])


# A network starts at zero, where these targets are the conditional velocity on every row.
UNGUIDED_AT_FIRST = {
    "flow_matching_xl2": "v",
    "mean_flow_b2": "u",
    "shortcut_b2": "v",
    "dumo_xl2": "v",
    "mean_flow_cifar10": "u",
}


def check_first_loss(found: float) -> None:
    """The mean square of x1 - x0, which is 1 + that of x0, within four standard errors."""
    x0, _ = gin_setup.build("run.dataset").batch(0, 8, 0)
    m = float((x0**2).mean())
    assert abs(found - (1 + m)) < 4 * ((2 + 4 * m) / (7 / 8 * x0.numel())) ** 0.5


def test_smoke_command_goes_from_pictures_to_a_report(tmp_path):
    pytest.importorskip("diffusers")
    done = zoo("run", "recipes/decm_xl1.gin", "--smoke", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "first its teacher" in done.err
    assert (tmp_path / "out" / "report" / "report.html").exists()
    assert (tmp_path / "out-data" / "latents").exists()


# the augmentation


def still(**values: float) -> torch.Tensor:
    order = ("mirrored", "scale", "stretch", "angle", "right", "down")
    return torch.tensor([[values.get(name, 0.0) for name in order]])


def test_augmentation_by_nothing_is_the_picture():
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(augmented(x, still()), x, atol=1e-5, rtol=0)


def test_augmentation_mirrors_and_moves():
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(augmented(x, still(mirrored=1)), x.flip(-1), atol=1e-5, rtol=0)
    moved = augmented(x, still(right=1, down=-2))  # an eighth of 8 pixels is one
    torch.testing.assert_close(moved[..., :-2, 1:], x[..., 2:, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("angle", "wide"), [(0.0, (2, 0.5)), (torch.pi / 2, (0.5, 2))])
def test_augmentation_scales_and_stretches_about_the_centre(angle, wide):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 65)] * 2, indexing="ij")
    blob = torch.exp(-(x**2 + y**2) / 0.02)[None, None]

    def extent(picture: torch.Tensor) -> tuple[float, float]:
        near = picture[0, 0] * (x.abs() < 0.7) * (y.abs() < 0.7)  # borders are reflected beyond
        weights = near / near.sum()
        return float((weights * x**2).sum().sqrt()), float((weights * y**2).sum().sqrt())

    before = extent(blob)
    doubled = extent(augmented(blob, still(scale=5)))  # 2^(0.2 * 5) = 2
    assert doubled[0] / before[0] == pytest.approx(2, rel=0.02)
    assert doubled[1] / before[1] == pytest.approx(2, rel=0.02)
    stretched = extent(augmented(blob, still(stretch=5, angle=angle)))
    for now, then, factor in zip(stretched, before, wide, strict=True):
        assert now / then == pytest.approx(factor, rel=0.05)


def test_augmentation_is_drawn_as_often_as_asked_and_told():
    draws = _draws(0.12, 0, 0)
    for column, probability in ((0, 0.5), (1, 0.12), (2, 0.12), (4, 0.12)):
        share = float((draws[:, column] != 0).float().mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / len(draws)) ** 0.5
    told = labels(draws)
    torch.testing.assert_close(told[:, [0, 1, 4, 5]], draws[:, [0, 1, 4, 5]])
    torch.testing.assert_close(torch.hypot(told[:, 2], told[:, 3]), draws[:, 2].abs())


def test_augmented_batches_depend_on_seed_and_place_alone():
    from benchmarks.data.digits import Digits
    from benchmarks.data.edm_augment import EdmAugment

    data = EdmAugment(data=Digits(), labelled=False, probability=0.5)
    whole, cond = data.batch(0, 8, 3)
    halves = [data.batch(step, 4, 3) for step in (0, 1)]
    assert torch.cat([x for x, _ in halves]).equal(whole)
    assert torch.cat([c["augment"] for _, c in halves]).equal(cond["augment"])
    assert set(cond) == {"augment"}
    assert data.num_classes == 0
    assert data.reference(5, 0)[1] is None is data.sample_labels(5)
    assert not data.batch(0, 8, 4)[1]["augment"].equal(cond["augment"])


@pytest.mark.parametrize(("recipe", "sampler"), [("decm_xl1", "mix"), ("facm_xl1", "restart")])
def test_sampler_of_a_distilled_recipe_is_its_papers(recipe, sampler):
    parsed(recipe)
    assert samplers.name_of(gin_setup.build("run.sampler")) == sampler


@pytest.mark.parametrize(
    ("recipe", "blocks", "without_v", "guidance"),
    [
        ("improved_mean_flow_b2", 12, 132.3, (8.0, 0.4, 0.65)),
        ("improved_mean_flow_xl2", 48, 914.4, (8.0, 0.42, 0.62)),
    ],
)
def test_imf_has_the_papers_blocks_and_guidance(recipe, blocks, without_v, guidance):
    """As many blocks on the way to u as in the paper, eight of them its own; v has as many."""
    net = network(recipe)
    branches = net.heads["deep_dual"].branches
    assert [len(branch.blocks) for branch in branches.values()] == [8, 8]
    assert len(net.trunk.blocks) + 8 == blocks
    of_v = [p for name, p in net.heads.named_parameters() if name.split(".")[2] == "v"]
    without = count(net) - sum(p.numel() for p in of_v) / 1e6
    assert without == pytest.approx(without_v, abs=0.1)
    parsed(recipe)
    sampler = gin_setup.build("run.sampler")
    assert (sampler.scale, *sampler.interval) == guidance
    objective = gin_setup.build("run.objective")
    assert objective.guidance == LogUniformGuidance(largest=8.0)
    assert objective.times == LogitNormalPair(mean=-0.4, std=1.0, off_diagonal_fraction=0.5)


def test_guidance_and_times_of_so_flow_are_the_released_ones():
    parsed("so_flow_xl2")
    objective = gin_setup.build("run.objective")
    assert (objective.guidance_scale, objective.guidance_mix, objective.fade) == (3.0, 0.25, 0.8)
    assert objective.times == TwoLogitNormals()


@pytest.mark.parametrize("recipe", ["shortcut_b2", "shortcut_xl2"])
def test_sampler_of_shortcut_guides_the_steps_that_learn_no_guidance(recipe):
    """1 and 4 NFE by training, 128 by the sampler, each at the published scale."""
    parsed(recipe)
    objective, sampler = (gin_setup.build(f"run.{part}") for part in ("objective", "sampler"))
    assert samplers.name_of(sampler.sampler) == "flow_map"
    found = {n: replace(sampler, nfe=n).guidance_scale for n in gin_setup.query("run.nfe")}
    assert found == {1: 1.0, 4: 1.0, 128: 1.5}
    for nfe, scale in found.items():
        step = 1 / nfe
        assert objective.trains_step(1.0, 1 - step)
        assert objective.guides(1.0, 1 - step) == (scale == 1.0)
    assert objective.guidance_scale == 1.5


def test_sampler_of_the_flow_matching_recipe_is_guided():
    parsed("flow_matching_xl2")
    sampler = gin_setup.build("run.sampler")
    assert samplers.name_of(sampler) == "cfg"
    assert (sampler.scale, samplers.name_of(sampler.sampler)) == (1.5, "heun")
