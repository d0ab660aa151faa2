"""The data set `latents`: posteriors by seed and place, the VAE's constants, pixels for metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import FILE_ONLY, sets, zoo
from tiny_vaes import photos, save_kl, save_tiny

pytest.importorskip("diffusers")

from benchmarks.data.pictures import to_uint8
from benchmarks.latents.autoencoders import AutoencoderKl, find_vae
from benchmarks.latents.dataset import Latents
from benchmarks.latents.encode import encode
from benchmarks.latents.shard_encoder import Encoder
from benchmarks.metrics import evaluate
from registry.protocols import Coded

CONFIG = {"scaling_factor": 2.0, "shift_factor": 0.25}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kl(tmp_path_factory.mktemp("vae") / "kl", **CONFIG)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def folder(vae: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "latents"
    encode(pictures, out, Encoder(vae=find_vae(str(vae)), resolution=16), shard_rows=8)
    return out


def stored(folder: Path, name: str = "posterior") -> torch.Tensor:
    shards = sorted(folder.glob("shard_*.safetensors"))
    return torch.cat([load_file(path)[name] for path in shards]).float()


def test_means_are_shifted_and_scaled_by_the_vaes_constants(folder) -> None:
    dataset = Latents(folder=str(folder), sample=False, flip=False)
    assert isinstance(dataset, Coded)
    assert (dataset.shape, dataset.size, dataset.num_classes) == ((4, 8, 8), 22, 2)
    x0, cond = dataset.batch(0, 22, seed=3)
    expected = (stored(folder).chunk(2, 1)[0] - 0.25) * 2.0
    labels = torch.cat([load_file(p)["label"] for p in sorted(folder.glob("*.safetensors"))])
    order = [int((expected - row).flatten(1).norm(dim=1).argmin()) for row in x0]
    assert sorted(order) == list(range(22))  # an epoch has every picture once
    torch.testing.assert_close(x0, expected[order])
    assert torch.equal(cond["label"], labels[order])


def test_posteriors_have_their_stored_variance(folder) -> None:
    drawn, means = (Latents(folder=str(folder), flip=False, sample=s) for s in (True, False))
    _, logvar = stored(folder).chunk(2, 1)
    steps = range(200)
    noise = torch.cat([drawn.batch(k, 22, 0)[0] - means.batch(k, 22, 0)[0] for k in steps]) / 2.0
    error = float(noise.std()) / noise.numel() ** 0.5
    assert abs(float(noise.mean())) < 4 * error
    assert float(noise.var()) == pytest.approx(float(logvar.exp().mean()), rel=0.02)


def test_a_batch_depends_on_seed_and_place_alone(folder) -> None:
    dataset = Latents(folder=str(folder))
    whole, cond = dataset.batch(1, 90, seed=5)
    again, _ = Latents(folder=str(folder)).batch(1, 90, seed=5)
    assert torch.equal(whole, again)
    parts = [dataset.batch(step, 30, seed=5) for step in (3, 4, 5)]
    assert torch.equal(whole, torch.cat([x0 for x0, _ in parts]))
    assert torch.equal(cond["label"], torch.cat([c["label"] for _, c in parts]))
    assert not torch.equal(whole, dataset.batch(1, 90, seed=6)[0])
    assert not torch.equal(whole, dataset.batch(2, 90, seed=5)[0])


def test_half_of_the_samples_are_of_the_mirrored_pictures(folder) -> None:
    mirrored = Latents(folder=str(folder), sample=False)
    plain = Latents(folder=str(folder), sample=False, flip=False)
    upright = (stored(folder).chunk(2, 1)[0] - 0.25) * 2.0
    flipped = (stored(folder, "posterior_flipped").chunk(2, 1)[0] - 0.25) * 2.0
    x0, reference = mirrored.batch(0, 22 * 40, seed=0)[0], plain.batch(0, 22 * 40, seed=0)[0]
    changed = (x0 != reference).flatten(1).any(1)
    assert abs(float(changed.float().mean()) - 0.5) < 4 * 0.5 / (22 * 40) ** 0.5
    place = {row.numpy().tobytes(): i for i, row in enumerate(upright)}
    for row, other in zip(x0[changed][:20], reference[changed][:20], strict=True):
        assert torch.equal(row, flipped[place[other.numpy().tobytes()]])


def test_decoding_undoes_shift_and_scale(folder, vae) -> None:
    dataset = Latents(folder=str(folder), sample=False, flip=False, decode_batch=3)
    x0, _ = dataset.batch(0, 7, seed=0)
    expected = find_vae(str(vae)).decode(x0 / 2.0 + 0.25)
    torch.testing.assert_close(dataset.decode(x0), expected, rtol=1e-4, atol=1e-5)


def test_metrics_see_decoded_pixels_of_samples_and_reference(folder) -> None:
    dataset = Latents(folder=str(folder))
    reference, cond = evaluate.reference_of(dataset, 4, seed=0)
    assert reference.dtype == torch.uint8
    assert reference.shape == (8, 3, 16, 16)
    assert cond["label"].shape == (8,)
    assert torch.equal(reference, to_uint8(dataset.decode(dataset.reference(8, 0)[0])))


def test_labels_to_sample_have_the_frequencies_of_the_data(folder) -> None:
    labels = Latents(folder=str(folder)).sample_labels(11)["label"]
    assert torch.bincount(labels).tolist() == [4, 7]


def test_deterministic_latents_are_taken_as_they_are(pictures, tmp_path) -> None:
    tiny = find_vae(str(save_tiny(tmp_path / "vae")))
    encode(pictures, tmp_path / "out", Encoder(vae=tiny, resolution=16, dtype="float32"))
    dataset = Latents(folder=str(tmp_path / "out"), flip=False)
    x0, _ = dataset.batch(0, 22, seed=0)
    latents = stored(tmp_path / "out")
    assert {row.numpy().tobytes() for row in x0} == {row.numpy().tobytes() for row in latents}


def damaged(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_cut_shard_is_named_before_training(folder, tmp_path) -> None:
    copy = damaged(folder, tmp_path)
    path = copy / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors has \d+ bytes instead of") as e:
        Latents(folder=str(copy))
    assert "makes only these shards anew" in str(e.value)


def test_a_changed_shard_is_found_by_verify_alone(folder, tmp_path) -> None:
    copy = damaged(folder, tmp_path)
    path = copy / "shard_00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Latents(folder=str(copy))
    with pytest.raises(ValueError, match=r"shard_00002.*SHA-256 differs"):
        Latents(folder=str(copy), verify=True)


def test_a_shard_of_other_content_is_named(folder, tmp_path) -> None:
    copy = damaged(folder, tmp_path)
    path = copy / "shard_00001.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "label": tensors["label"][:3]}, path)
    about = json.loads((copy / "manifest.json").read_text())
    about["shards"][1]["bytes"] = path.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"shard_00001.*holds .*'label': \[3\]"):
        Latents(folder=str(copy))


def edit(copy: Path, **changes) -> None:
    about = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(about | changes))


WRONG = {
    "scale of another VAE": ({"scale": [0.18215] * 4}, "the constants of its VAE give 2, 2, 2, 2"),
    "shift of another VAE": ({"shift": [0.0] * 4}, "the shift 0, 0, 0, 0"),
    "scale of other channels": ({"scale": [2.0] * 3}, "must be 4 finite numbers"),
    "scale that is no number": ({"scale": [float("nan")] * 4}, "must be 4 finite numbers"),
    "scale 0": ({"scale": [0.0] * 4}, "none of them 0"),
    "another dtype": ({"dtype": "float32"}, "posterior as torch.float16"),
    "no dtype": ({"dtype": "int8"}, "dtype is 'int8'"),
    "a shape": ({"latent_shape": [4, -8, 8]}, "latent_shape is"),
    "fewer classes": ({"classes": ["class0"]}, "labels outside of 0 to 0"),
    "no VAE": ({"vae": {"kind": "autoencoder_kl"}}, "vae is"),
    "no shards": ({"shards": []}, "shards of  rows"),
    "shards that are none": ({"shards": [{"file": 3}]}, "is no manifest of latents"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_manifest_that_does_not_fit_its_shards_or_its_vae_is_refused(folder, tmp_path, kind):
    copy = damaged(folder, tmp_path)
    changes, message = WRONG[kind]
    edit(copy, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        Latents(folder=str(copy))


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "{", "[" * 100_000])
def test_a_damaged_manifest_is_named(folder, tmp_path, content):
    copy = damaged(folder, tmp_path)
    (copy / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it is no manifest"):
        Latents(folder=str(copy))


def test_constants_of_the_channels_must_be_those_of_the_shards(pictures, vae, tmp_path):
    how = Encoder(vae=find_vae(str(vae)), resolution=16)
    scale = encode(pictures, tmp_path, how, normalise="channel").scale
    assert Latents(folder=str(tmp_path)).size == 22
    edit(tmp_path, scale=[2 * s for s in scale])
    with pytest.raises(ValueError, match="the statistics of its shards give"):
        Latents(folder=str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "inside/shard.safetensors", "link"])
def test_a_shard_outside_of_the_folder_is_refused(folder, tmp_path, name):
    copy = damaged(folder, tmp_path)
    outside = copy.parent / "outside.safetensors"
    (copy / "shard_00000.safetensors").rename(outside)
    if name == "link":
        name = "shard_00000.safetensors"
        (copy / name).symlink_to(outside)
    shards = json.loads((copy / "manifest.json").read_text())["shards"]
    edit(copy, shards=[{**shards[0], "file": name}, *shards[1:]])
    with pytest.raises(ValueError, match="out of the folder") as refused:
        Latents(folder=str(copy))
    assert repr(name) in str(refused.value)


def test_a_shard_that_is_no_file_of_safetensors_is_named_without_raw_text(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    path = copy / "shard_00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"shard_00001.* is no whole file of safetensors"):
        Latents(folder=str(copy))


def test_latents_of_another_rule_are_told(folder, tmp_path, caplog):
    copy = damaged(folder, tmp_path)
    Latents(folder=str(copy))
    assert caplog.text == ""
    edit(copy, preprocessing="largest centred square, Pillow's filter")
    Latents(folder=str(copy))
    assert "encoded by another rule than today's" in caplog.text
    assert "largest centred square at whole pixels" in caplog.text


def test_another_vae_is_refused_and_a_moved_one_named(folder, vae, tmp_path) -> None:
    other = save_kl(tmp_path / "other", seed=7, **CONFIG)
    with pytest.raises(ValueError, match="made by a VAE with other weights"):
        Latents(folder=str(folder), vae=AutoencoderKl(path=str(other)))
    copy = damaged(folder, tmp_path)
    about = json.loads((copy / "manifest.json").read_text())
    about["vae"]["path"] = str(tmp_path / "gone")
    (copy / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"autoencoder_kl\.path = 'FOLDER'"):
        Latents(folder=str(copy))
    assert Latents(folder=str(copy), vae=AutoencoderKl(path=str(vae))).size == 22


def test_latents_without_mirrored_copies_say_what_to_bind(pictures, vae, tmp_path) -> None:
    encode(pictures, tmp_path, Encoder(vae=find_vae(str(vae)), resolution=16, flips=False))
    with pytest.raises(ValueError, match=r"latents\.flip = False"):
        Latents(folder=str(tmp_path))
    assert Latents(folder=str(tmp_path), flip=False).size == 22


def test_no_latents_say_how_to_make_them(tmp_path) -> None:
    with pytest.raises(ValueError, match="objective-zoo encode --data"):
        Latents(folder=str(tmp_path))


def test_a_run_whose_latents_moved_is_told_the_place(folder, tmp_path) -> None:
    copy = damaged(folder, tmp_path)
    how = (*FILE_ONLY, "run.dataset = @latents()", f"latents.folder = {str(copy)!r}")
    out = tmp_path / "run"
    done = zoo("run", "experiments/digits.gin", "--arm", "mean_flow", *sets(*how), "--out", out)
    assert done.status == 0, done.err
    copy.rename(tmp_path / "moved")
    place = sets(f"latents.folder = {str(tmp_path / 'moved')!r}")
    for words in (("sample", out / "mean_flow", "--num", 2), ("export", out / "mean_flow")):
        there = ("--out", tmp_path / words[0])
        (out / "mean_flow" / "data.json").rename(tmp_path / "data.json")
        assert zoo(*words, *there).status == 2  # an earlier version recorded less of the data
        done = zoo(*words, *there, *place)
        assert done.status == 0, done.err
        (tmp_path / "data.json").rename(out / "mean_flow" / "data.json")


def test_from_pictures_to_a_table_of_distances(folder, pictures, tmp_path) -> None:
    network = [b for b in FILE_ONLY if not b.startswith("run.metric") and "extractor" not in b]
    how = (*network, "run.dataset = @latents()", f"latents.folder = {str(folder)!r}",
           "run.metric = @feature_metrics()", "feature_metrics.extractor = @pixels()")  # fmt: skip
    out = tmp_path / "run"
    done = zoo("run", "experiments/digits.gin", "--arm", "mean_flow", *sets(*how), "--out", out)
    assert done.status == 0, done.err
    run = out / "mean_flow"
    assert (run / "samples.png").is_file()  # decoded
    assert load_file(run / "samples.safetensors")["nfe1"].shape[1:] == (3, 16, 16)
    assert zoo("sample", run, "--num", 4, "--nfe", 1, "--out", tmp_path / "x.png").status == 0
    words = ("evaluate", run, "--num", 6, "--nfe", 1, "--features", "pixels", "--metrics")
    refused = zoo(*words, "frechet", "--out", tmp_path / "e")
    assert refused.status == 2
    assert "Give --reference" in refused.err
    cache = ("--cache", tmp_path / "cache")
    done = zoo(*words, "frechet", "--out", tmp_path / "e", "--reference", pictures, *cache)
    assert done.status == 0, done.err
    assert "| NFE 1 " in done.out
