"""objective-zoo encode: what is stored is the VAE's, whole or not there, and made only once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import zoo
from tiny_vaes import photos, save_dc, save_kl, save_tiny

pytest.importorskip("diffusers")

from benchmarks.data import image_pixels
from benchmarks.data.image_files import find_pictures
from benchmarks.data.image_pixels import read_picture
from benchmarks.latents import encode as module
from benchmarks.latents import shard_encoder
from benchmarks.latents.autoencoders import find_vae
from benchmarks.latents.encode import encode
from benchmarks.latents.shard_encoder import Encoder
from benchmarks.latents.shards import Manifest
from registry import progress, vaes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kl(tmp_path_factory.mktemp("kl") / "kl")


@pytest.fixture(scope="module")
def encoded(pictures: Path, kl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "latents"
    encode(pictures, out, encoder(kl), shard_rows=8)
    return out


def encoder(vae: Path, **changes) -> Encoder:
    return Encoder(**({"vae": find_vae(str(vae)), "resolution": 16, "batch_size": 3} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_shard_holds_the_posterior_of_each_picture_and_of_its_mirror(encoded, pictures, kl):
    files = find_pictures(pictures, labelled=True)
    rows = [load_file(encoded / f"shard_{i:05d}.safetensors") for i in range(3)]
    assert [len(shard["label"]) for shard in rows] == [8, 8, 6]
    assert torch.cat([shard["label"] for shard in rows]).tolist() == list(files.labels)
    pixels = torch.stack([read_picture(path, 16, 3) for path in files.files]).float() / 127.5 - 1
    vae = find_vae(str(kl))
    for name, seen in (("posterior", pixels), ("posterior_flipped", pixels.flip(-1))):
        stored = torch.cat([shard[name] for shard in rows])
        assert stored.dtype == torch.float16
        expected = torch.cat(vae.encode(seen), 1)
        assert stored.shape == expected.shape == (22, 8, 8, 8)
        torch.testing.assert_close(stored.float(), expected, rtol=1e-3, atol=1e-3)  # half floats


def test_the_manifest_says_what_made_the_latents(encoded, pictures, kl):
    about = json.loads((encoded / "manifest.json").read_text())
    assert about["vae"]["kind"] == "autoencoder_kl"
    assert about["vae"]["path"] == str(kl)
    assert about["vae"]["sha256"] == find_vae(str(kl)).digest()
    assert (about["resolution"], about["num"], about["flips"]) == (16, 22, True)
    assert about["scale"] == [0.18215] * 4
    assert about["shift"] == [0.0] * 4
    assert about["classes"] == ["class0", "class1"]
    assert "largest centred square at whole pixels" in about["preprocessing"]
    assert about["source"]["folder"] == str(pictures)
    assert len(about["source_sha256"]) == 64
    assert [shard["rows"] for shard in about["shards"]] == [8, 8, 6]


def test_channels_are_normalised_by_their_own_statistics_on_request(pictures, kl, tmp_path):
    manifest = encode(pictures, tmp_path, encoder(kl, dtype="float32"), normalise="channel")
    tensors = load_file(tmp_path / "shard_00000.safetensors")
    both = torch.cat([tensors["posterior"], tensors["posterior_flipped"]]).double()
    mean, logvar = both.chunk(2, 1)
    expected = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    assert manifest.shift == pytest.approx(expected.tolist(), rel=1e-6)
    assert manifest.scale == pytest.approx(variance.rsqrt().tolist(), rel=1e-6)
    again = encode(pictures, tmp_path, encoder(kl, dtype="float32"))  # nothing is encoded anew
    assert again.shards == manifest.shards
    assert again.scale == (0.18215,) * 4


@pytest.mark.parametrize(("save", "scale"), [(save_dc, 0.5), (save_tiny, 1.0)])
def test_deterministic_autoencoders_store_their_latents_alone(save, scale, pictures, tmp_path):
    vae = find_vae(str(save(tmp_path / "vae")))
    manifest = encode(pictures, tmp_path / "out", encoder(tmp_path / "vae", dtype="float32"))
    assert manifest.plan["logvar"] is False
    assert manifest.scale == (scale,) * 4
    stored = load_file(tmp_path / "out" / "shard_00000.safetensors")["posterior"]
    assert stored.shape == (22, 4, 8, 8)
    first = read_picture(find_pictures(pictures, labelled=True).files[0], 16, 3)
    expected, none = vae.encode(first[None].float() / 127.5 - 1)
    assert none is None
    torch.testing.assert_close(stored[:1], expected, rtol=1e-4, atol=1e-5)


def test_a_killed_command_continues_with_the_shards_that_are_missing(
    encoded, pictures, kl, tmp_path, monkeypatch
):
    made = []
    real = module.encode_shard

    def interrupted(task, *args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(task.number)
        return real(task, *args)

    monkeypatch.setattr(module, "encode_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(pictures, tmp_path, encoder(kl), shard_rows=8)
    with pytest.raises(ValueError, match=r"no manifest\.json.*Run the encode command again"):
        Manifest.load(tmp_path)
    (tmp_path / ".shard_00001.safetensors.0123abcd.partial").write_bytes(b"of a killed process")
    made[:] = [None, None]
    encode(pictures, tmp_path, encoder(kl), shard_rows=8)
    assert made[2:] == [1, 2]
    assert contents(tmp_path) == contents(encoded)


@pytest.mark.parametrize("how", ["cut", "flipped bit", "no record", "gone"])
def test_a_damaged_shard_is_named_and_only_it_is_redone(
    how, encoded, pictures, kl, tmp_path, caplog, monkeypatch
):
    for name, content in contents(encoded).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "shard_00001.safetensors"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.unlink()
    made = []
    real = module.encode_shard
    monkeypatch.setattr(
        module, "encode_shard", lambda task, *args: made.append(task.number) or real(task, *args)
    )
    encode(pictures, tmp_path, encoder(kl), shard_rows=8)
    assert made == [1]
    assert str(path) in caplog.text
    assert contents(tmp_path) == contents(encoded)


@pytest.mark.slow  # two processes import diffusers
def test_two_workers_write_what_one_writes(encoded, pictures, kl, tmp_path, caplog, capsys):
    with progress.show_progress():
        encode(pictures, tmp_path, encoder(kl), shard_rows=8, workers=2)
    assert contents(tmp_path) == contents(encoded)
    assert not caplog.records
    assert "22/22" in capsys.readouterr().err


def test_the_bar_moves_with_every_batch_and_idle_workers_are_warned_of(
    pictures, kl, tmp_path, monkeypatch, caplog
):
    moves = []

    class Bar(progress.tqdm):
        def update(self, n=1):
            moves.append(n)

    monkeypatch.setattr(progress, "tqdm", Bar)
    encode(pictures, tmp_path, encoder(kl, batch_size=4), workers=2)
    assert moves == [4, 4, 4, 4, 4, 2]  # of one shard
    assert "22 pictures in shards of 1024 leave 1 of 2 workers without work" in caplog.text


@pytest.mark.slow  # three processes import diffusers
def test_workers_of_a_killed_command_end(pictures, kl, tmp_path):
    words = ["encode", "--data", pictures, "--vae", kl, "--out", tmp_path / "out", "--workers", "2"]
    words += ["--resolution", "16", "--shard-rows", "1"]
    command = [sys.executable, "-m", "benchmarks.cli", *map(str, words)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = psutil.Process(started.pid)
    try:
        deadline = time.monotonic() + 300  # on a busy machine, imports take minutes
        while not list((tmp_path / "out").glob("shard_*.json")):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = parent.children(recursive=True)
        assert len(workers) >= 2
    finally:
        started.kill()
        started.wait()
    deadline = time.monotonic() + 10
    while (left := [w for w in workers if _lives(w)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in left:
        worker.kill()
    assert not left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_other_settings_do_not_continue_a_folder(encoded, pictures, kl, tmp_path):
    with pytest.raises(ValueError, match=r"resolution was 16, now 32"):
        encode(pictures, encoded, encoder(kl, resolution=32), shard_rows=8)
    other = save_kl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="vae was"):
        encode(pictures, encoded, encoder(other), shard_rows=8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".thesis.txt.partial").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no latents"):
        encode(pictures, tmp_path / "full", encoder(kl))
    assert (tmp_path / "full" / ".thesis.txt.partial").read_text() == "mine"


def test_a_damaged_plan_is_named(pictures, kl, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        encode(pictures, tmp_path, encoder(kl))


def test_splits_are_classes_on_request_alone(pictures, kl, tmp_path):
    for i, name in enumerate(("train", "test")):
        shutil.copytree(pictures / f"class{i}", tmp_path / "root" / name)
    with pytest.raises(ValueError, match="--splits-are-classes"):
        encode(tmp_path / "root", tmp_path / "out", encoder(kl))
    made = encode(tmp_path / "root", tmp_path / "out", encoder(kl), splits_are_classes=True)
    assert made.plan["classes"] == ["test", "train"]


def test_a_command_that_was_killed_while_it_wrote_its_plan_is_begun_anew(pictures, kl, tmp_path):
    (tmp_path / ".plan.json.0123abcd.partial").write_text("{")
    assert encode(pictures, tmp_path, encoder(kl)).num == 22
    assert not list(tmp_path.glob(".*.partial"))


def test_pictures_that_cannot_be_read_are_named_before_anything_is_encoded(kl, tmp_path):
    folder = photos(tmp_path / "photos", n=6)
    files = sorted(folder.rglob("*.png"))
    files[1].write_bytes(b"no picture")
    files[3].write_bytes(files[3].read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"2 of 6 pictures cannot be read") as caught:
        encode(folder, tmp_path / "out", encoder(kl))
    assert files[1].name in str(caught.value)
    assert files[3].name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_picture_broken_inside_is_named_and_the_other_shards_are_kept(kl, tmp_path, monkeypatch):
    monkeypatch.setattr(image_pixels, "LOOKED_AT", 0)  # of many pictures few are decoded at first
    folder = photos(tmp_path / "photos", n=6)
    broken = sorted(folder.rglob("*.png"))[1]
    content = bytearray(broken.read_bytes())
    content[200:260] = bytes(60)  # its checksum fails, its end is there
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 of 6 pictures cannot be read.*\n.*{broken.name}"):
        encode(folder, tmp_path / "out", encoder(kl), shard_rows=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [
        "shard_00001.safetensors",
        "shard_00002.safetensors",
    ]


def test_shards_of_repaired_pictures_alone_are_made_again(kl, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(image_pixels, "LOOKED_AT", 0)
    folder = photos(tmp_path / "photos", n=6)
    first, *_, last = sorted(folder.rglob("*.png"))
    good = last.read_bytes()
    content = bytearray(first.read_bytes())
    content[200:260] = bytes(60)
    first.write_bytes(content)
    with pytest.raises(ValueError, match="others of the same names in their place"):
        encode(folder, tmp_path / "out", encoder(kl), shard_rows=2)
    made = []
    real = module.encode_shard
    monkeypatch.setattr(
        module, "encode_shard", lambda task, *args: made.append(task.number) or real(task, *args)
    )
    first.write_bytes(good)
    assert encode(folder, tmp_path / "out", encoder(kl), shard_rows=2).num == 6
    assert made == [0]
    Image.new("RGB", (20, 20)).save(last)
    encode(folder, tmp_path / "out", encoder(kl), shard_rows=2)
    assert made == [0, 2]
    assert "shard_00002.safetensors have changed: encoded again" in caplog.text


def test_names_that_are_no_utf8_are_names(kl, tmp_path):
    folder = photos(tmp_path / "photos", n=6)
    picture = sorted(folder.rglob("*.png"))[0]
    picture.rename(os.fsdecode(os.fsencode(picture.with_name("caf")) + b"\xe9.png"))
    assert encode(folder, tmp_path / "out", encoder(kl)).num == 6


def test_a_resolution_that_the_vae_does_not_give_back_is_refused(pictures, kl, tmp_path):
    for vae in (kl, save_dc(tmp_path / "dc"), save_tiny(tmp_path / "tiny")):
        with pytest.raises(ValueError, match="--resolution 15 does not fit the VAE"):
            encode(pictures, tmp_path / "out", encoder(vae, resolution=15))
    assert not (tmp_path / "out").exists()


def test_latents_are_not_written_among_the_pictures(kl, tmp_path):
    folder = photos(tmp_path / "photos", n=6)
    with pytest.raises(ValueError, match="is among the pictures"):
        encode(folder, folder / "latents", encoder(kl))
    assert not (folder / "latents").exists()


def test_subfolders_that_are_no_classes_are_ignored_on_request(kl, tmp_path):
    folder = photos(tmp_path / "photos", n=6)
    (folder / "cover.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    with pytest.raises(ValueError, match="ignore the sub-folders by --no-labels"):
        encode(folder, tmp_path / "out", encoder(kl))
    manifest = encode(folder, tmp_path / "out", encoder(kl), labelled=False)
    assert (manifest.num, manifest.plan["classes"]) == (7, [])
    assert "label" not in load_file(tmp_path / "out" / "shard_00000.safetensors")


def test_latents_too_large_for_half_floats_are_refused(kl):
    with pytest.raises(ValueError, match="do not fit into float16.*--dtype float32"):
        shard_encoder._stored(torch.full((1, 1, 1, 1), 1e6), None, "float16")


# The VAEs.


def test_a_vae_is_found_by_the_class_in_its_config(tmp_path):
    assert vaes.name_of(find_vae(str(save_dc(tmp_path / "a")))) == "autoencoder_dc"
    assert vaes.name_of(find_vae(str(save_tiny(tmp_path / "b")))) == "autoencoder_tiny"
    save_kl(tmp_path / "pipeline" / "vae")
    assert find_vae(str(tmp_path / "pipeline")).subfolder == "vae"


def test_constants_come_from_the_config_and_a_misprint_is_warned_of(tmp_path, caplog):
    found = find_vae(str(save_kl(tmp_path / "a", scaling_factor=1.5305, shift_factor=0.0609)))
    assert (found.scale, found.shift) == (1.5305, 0.0609)
    assert not caplog.records
    assert find_vae(str(save_kl(tmp_path / "b", scaling_factor=0.18125))).scale == 0.18125
    assert "0.18215 is meant" in caplog.text


def test_statistics_of_the_channels_in_a_config_scale_and_shift_as_in_diffusers(pictures, tmp_path):
    about = {"latents_mean": [1.0, 2.0, 3.0, -4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    vae = save_kl(tmp_path / "vae", scaling_factor=0.5, **about)
    manifest = encode(pictures, tmp_path / "out", encoder(vae))
    assert manifest.scale == (0.5, 0.25, 0.125, 0.0625)  # its pipelines: (z - mean) factor / std
    assert manifest.shift == (1.0, 2.0, 3.0, -4.0)
    wrong = save_kl(tmp_path / "wrong", latents_mean=[0.0], latents_std=[1.0])
    with pytest.raises(ValueError, match="for each of 4 channels"):
        encode(pictures, tmp_path / "out2", encoder(wrong))


def test_a_folder_with_the_weights_of_one_variant_is_read(tmp_path):
    whole = save_kl(tmp_path / "vae")
    expected = find_vae(str(whole)).digest()
    file = whole / "diffusion_pytorch_model.safetensors"
    save_kl(tmp_path / "half")
    other = tmp_path / "half" / file.name
    other.rename(other.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert find_vae(str(tmp_path / "half")).digest() == expected


def test_pickled_weights_are_read_without_a_word(tmp_path, capfd):
    expected = find_vae(str(save_kl(tmp_path / "a"))).digest()
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(tmp_path / "a").save_pretrained(
        tmp_path / "b", safe_serialization=False
    )
    capfd.readouterr()
    assert find_vae(str(tmp_path / "b")).digest() == expected
    assert "error" not in capfd.readouterr().err


def test_what_is_no_vae_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json and is no hub id.*taesd"):
        find_vae(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sd_vae_ft_mse"):
        find_vae("/nowhere/vae")
    with pytest.raises(FileNotFoundError, match=r"'weights/vae\.pt' has no config\.json"):
        find_vae("weights/vae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; it must be one of AutoencoderDC"):
        find_vae(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match=r"cannot be loaded(.|\n)*needs config\.json and"):
        find_vae(str(tmp_path))


def test_the_command_says_how_to_go_on(pictures, kl, tmp_path):
    words = ("encode", "--data", pictures, "--vae", kl, "--out", tmp_path / "out")
    done = zoo(*words, "--resolution", 16, "--no-flips", "--dtype", "float32")
    assert done.status == 0, done.err
    assert "22 pictures of 2 classes as (4, 8, 8) latents in 1 shards" in done.out
    assert "run.dataset = @latents()" in done.out
    assert "img/s" in done.err
    assert "posterior_flipped" not in load_file(tmp_path / "out" / "shard_00000.safetensors")
    assert zoo(*words, "--dtype", "int8").status == 2
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_encoding_in_the_folder_waits_for_nobody(pictures, kl, tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / module.LOCK)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process runs an encoding"):
            encode(pictures, out, encoder(kl), shard_rows=4)
    finally:
        holder.kill()
        holder.wait()
    assert encode(pictures, out, encoder(kl), shard_rows=4).num > 0


HOLD = """
import sys, time
from pathlib import Path
from trainers.checkpoints.locks import alone
with alone(Path(sys.argv[1]), "an encoding"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(pictures, kl, tmp_path, device):
    with pytest.raises(ValueError, match=f"--device = '{device}'"):
        encode(pictures, tmp_path / "out", encoder(kl), device=device)
