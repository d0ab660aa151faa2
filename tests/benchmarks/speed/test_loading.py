"""The measurement of reading: what it reads is what a run would, and its rates are those."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_vaes import photos, save_kl

from benchmarks.speed.loading import SHAPE, Work, measure, open_folder, write_noise
from registry.protocols import Share, Shareable


def test_latents_of_noise_are_read_like_encoded_ones(tmp_path):
    write_noise(tmp_path, 1024)
    dataset = open_folder(tmp_path, 0)
    assert isinstance(dataset, Shareable)
    assert (dataset.shape, dataset.size, dataset.num_classes) == (SHAPE, 1024, 1000)
    x0, cond = dataset.batch_share(0, 16, 0, Share(1, 8))
    assert (x0.shape, cond["label"].shape) == ((2, *SHAPE), (16,))


@pytest.mark.slow  # two processes start
def test_the_command_reads_encoded_latents(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks.latents.autoencoders import find_vae
    from benchmarks.latents.encode import encode
    from benchmarks.latents.shard_encoder import Encoder

    vae = find_vae(str(save_kl(tmp_path / "vae")))
    encode(photos(tmp_path / "p"), tmp_path / "out", Encoder(vae=vae, resolution=16))
    command = [sys.executable, "-P", "-m", "benchmarks.loading"]
    words = ["--ranks", "1", "--batch", "8", "--steps", "2"]
    done = subprocess.run([*command, tmp_path / "out", *words], capture_output=True, text=True)
    assert "images/s" in done.stdout, done.stderr
    done = subprocess.run([*command, tmp_path / "gone", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "'gone' does not exist" in done.stderr.replace(str(tmp_path) + "/", "")


@pytest.mark.slow  # two processes start
def test_rates_of_two_processes_are_measured(tmp_path):
    work = Work(folder=photos(tmp_path / "p"), ranks=2, batch=8, steps=3, resolution=16)
    reading, copying = measure(work)
    assert 0 < reading.wall < copying.wall
    assert 0 < reading.cpu < copying.cpu
