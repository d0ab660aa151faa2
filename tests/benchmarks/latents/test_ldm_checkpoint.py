"""Autoencoders in one file: what is read computes what latent-diffusion's code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from public_networks import State, drawn
from safetensors.torch import save_file
from tiny_vaes import photos
from torch import Tensor

pytest.importorskip("diffusers")

from benchmarks.latents.autoencoders import find_vae
from benchmarks.latents.dataset import Latents
from benchmarks.latents.encode import encode
from benchmarks.latents.shard_encoder import Encoder

WIDTHS, BLOCKS, LATENT = (32, 64, 64), 2, 3  # three levels, attention in the lowest as in VA-VAE


def ldm_state() -> State:
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inside: int, out: int, size: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside, size, size), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, inside: int, out: int) -> None:
        norm(f"{name}.norm1", inside)
        conv(f"{name}.conv1", inside, out)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if inside != out:
            conv(f"{name}.nin_shortcut", inside, out, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def side(name: str, levels: list[int], blocks: int, move: str, inside: int, out: int) -> None:
        width = WIDTHS[levels[0]]
        conv(f"{name}.conv_in", inside, width)
        for part in ("block_1", "block_2"):
            block(f"{name}.mid.{part}", WIDTHS[-1], WIDTHS[-1])
        attention(f"{name}.mid.attn_1", WIDTHS[-1])
        for level in levels:
            for i in range(blocks):
                block(f"{name}.{move}.{level}.block.{i}", width, WIDTHS[level])
                width = WIDTHS[level]
                if level == len(WIDTHS) - 1:
                    attention(f"{name}.{move}.{level}.attn.{i}", width)
            if level != levels[-1]:
                conv(f"{name}.{move}.{level}.{move}sample.conv", width, width)
        norm(f"{name}.norm_out", width)
        conv(f"{name}.conv_out", width, out)

    order = list(range(len(WIDTHS)))
    side("encoder", order, BLOCKS, "down", 3, 2 * LATENT)
    side("decoder", order[::-1], BLOCKS + 1, "up", LATENT, 3)
    conv("quant_conv", 2 * LATENT, 2 * LATENT, 1)
    conv("post_quant_conv", LATENT, LATENT, 1)
    return drawn(shapes)


class Reference:
    """The published forward passes over such a state."""

    def __init__(self, state: State):
        self.state = state

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        how = {"padding": weight.shape[-1] // 2} | how
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.state:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(self, name: str, h: Tensor) -> Tensor:
        h = self.attention(f"{name}.mid.attn_1", self.block(f"{name}.mid.block_1", h))
        return self.block(f"{name}.mid.block_2", h)

    def encode(self, x: Tensor) -> Tensor:
        h = self.conv("encoder.conv_in", x)
        for level in range(len(WIDTHS)):
            for i in range(BLOCKS):
                h = self.block(f"encoder.down.{level}.block.{i}", h)
                h = self.attention(f"encoder.down.{level}.attn.{i}", h)
            if level < len(WIDTHS) - 1:
                name = f"encoder.down.{level}.downsample.conv"
                h = self.conv(name, F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = F.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h))

    def decode(self, z: Tensor) -> Tensor:
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        h = self.middle("decoder", h)
        for level in reversed(range(len(WIDTHS))):
            for i in range(BLOCKS + 1):
                h = self.block(f"decoder.up.{level}.block.{i}", h)
                h = self.attention(f"decoder.up.{level}.attn.{i}", h)
            if level:
                h = F.interpolate(h, scale_factor=2.0)
                h = self.conv(f"decoder.up.{level}.upsample.conv", h)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)))


@pytest.fixture(scope="module")
def state() -> State:
    return ldm_state()


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "vavae.pt"
    beside = {"loss.logvar": torch.zeros(()), "foundation_model.pos_embed": torch.zeros(3)}
    torch.save({"state_dict": state | beside, "epoch": 3}, path)
    return path


def test_posterior_and_pictures_are_those_of_the_public_code(state, file) -> None:
    vae, theirs = find_vae(str(file)), Reference(state)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # sums of some hundred float32 products in another order; values of order one
    expected = theirs.encode(x)
    assert expected.std() > 0.1
    mean, logvar = vae.encode(x)
    torch.testing.assert_close(torch.cat([mean, logvar], 1), expected, atol=1e-4, rtol=1e-4)
    decoded = theirs.decode(mean)
    assert decoded.std() > 0.1
    torch.testing.assert_close(vae.decode(mean), decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {k: v for k, v in state.items() if "mid.block_2.conv1.bias" not in k},
        lambda state: state | {"decoder.up.1.attn.9.q.weight": torch.zeros(64, 64, 1, 1)},
        lambda state: state | {"quant_conv.weight": torch.zeros(8, 6, 1, 1)},
        lambda state: {k: v for k, v in state.items() if not k.startswith("encoder.")},
    ],
)
def test_every_tensor_of_the_autoencoder_is_used_or_an_error(state, tmp_path, change) -> None:
    save_file(change(state), tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"broken\.safetensors does not (hold|fit)"):
        find_vae(str(tmp_path / "broken.safetensors")).encode(torch.zeros(1, 3, 16, 16))


def test_nothing_in_the_file_is_executed(tmp_path) -> None:
    torch.save({"encoder.conv_in.weight": print}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt does not hold .*would have to execute"):
        find_vae(str(tmp_path / "bad.ckpt"))


def test_latents_of_such_a_file_are_normalised_by_channel_and_decoded(file, tmp_path) -> None:
    pictures = photos(tmp_path / "photos", n=6)
    encoder = Encoder(vae=find_vae(str(file)), resolution=16)
    with pytest.raises(ValueError, match=r"vavae\.pt holds no constants .*--normalise channel"):
        encode(pictures, tmp_path / "out", encoder)
    manifest = encode(pictures, tmp_path / "out", encoder, normalise="channel")
    assert manifest.shape == (LATENT, 4, 4)
    dataset = Latents(folder=str(tmp_path / "out"))
    x0, _ = dataset.batch(0, 6, 0)
    assert x0.std().item() == pytest.approx(1, abs=0.2)  # of 288 values
    assert dataset.decode(x0).shape == (6, 3, 16, 16)
