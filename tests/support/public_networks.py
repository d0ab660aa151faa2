"""The public codes' forward passes, over state dicts in their layouts with random weights.

Their times and signs are theirs: see backbones/pretrained/imports.py for what each predicts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, DEPTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 32, 2, 4, 2, 3, 4, 5
State = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        made[name] = scale * torch.randn(shape, generator=rng)
        if "norm" in name and name.endswith("weight"):
            made[name] += 1
    return made


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _layer(shapes: dict[str, tuple[int, ...]], name: str, out: int, inside: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside), (out,)


def transformer_state(
    *,
    out: int = CHANNELS,
    second: bool = False,
    swiglu: bool = False,
    qk_norm: bool = False,
    mf_dit: bool = False,
) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["x_embedder.proj.weight"] = (DIM, CHANNELS, PATCH, PATCH)
    shapes["x_embedder.proj.bias"] = (DIM,)
    for name in ["t_embedder"] + ["r_embedder"] * second + ["w_embedder"] * mf_dit:
        _layer(shapes, f"{name}.mlp.0", DIM, 256)
        _layer(shapes, f"{name}.mlp.2", DIM, DIM)
    table = "embedding" if mf_dit else "embedding_table"
    shapes[f"y_embedder.{table}.weight"] = (CLASSES + 1, DIM)
    hidden = int(2 / 3 * 4 * DIM)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        _layer(shapes, f"{block}.attn.qkv", 3 * DIM, DIM)
        _layer(shapes, f"{block}.attn.proj", DIM, DIM)
        _layer(shapes, f"{block}.adaLN_modulation.1", 6 * DIM, DIM)
        if swiglu:
            _layer(shapes, f"{block}.mlp.w12", 2 * hidden, DIM)
            _layer(shapes, f"{block}.mlp.w3", DIM, hidden)
            shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (DIM,)
        else:
            _layer(shapes, f"{block}.mlp.fc1", 4 * DIM, DIM)
            _layer(shapes, f"{block}.mlp.fc2", DIM, 4 * DIM)
        if qk_norm:
            for norm in ("q_norm", "k_norm"):
                shapes[f"{block}.attn.{norm}.weight"] = (DIM // HEADS,)
    finals = ("final_layer_v", "final_layer_u") if mf_dit else ("final_layer",)
    for final in finals:
        _layer(shapes, f"{final}.linear", PATCH * PATCH * out, DIM)
        _layer(shapes, f"{final}.adaLN_modulation.1", 2 * DIM, DIM)
    if swiglu:
        shapes["final_layer.norm_final.weight"] = (DIM,)
    state = drawn(shapes)
    state["pos_embed"] = sincos_positions()[None]
    if mf_dit:  # they are trained
        state["pos_embed"] += 0.1 * torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    if swiglu:
        state["feat_rope.freqs_cos"], state["feat_rope.freqs_sin"] = rotary_tables()
    return state


def sincos_positions() -> Tensor:
    omega = 10000.0 ** (-torch.arange(DIM // 4, dtype=torch.float64) / (DIM / 4))
    rows = []
    for y in range(SIDE):
        for x in range(SIDE):
            rows.append(torch.cat([(x * omega).sin(), (x * omega).cos(),
                                   (y * omega).sin(), (y * omega).cos()]))  # fmt: skip
    return torch.stack(rows).float()


def rotary_tables() -> tuple[Tensor, Tensor]:
    """Angles of the row in the first half of a head, of the column in the second, each twice."""
    half = DIM // HEADS // 2
    omega = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    rows = [
        torch.cat([(y * omega).repeat_interleave(2), (x * omega).repeat_interleave(2)])
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    angles = torch.stack(rows)
    return angles.cos(), angles.sin()


def embedded(state: State, name: str, t: Tensor) -> Tensor:
    w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    features = torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], dim=1)
    return linear(state, f"{name}.mlp.2", F.silu(linear(state, f"{name}.mlp.0", features)))


def normed(state: State, name: str, x: Tensor) -> Tensor:
    """RMSNorm where the layout has a weight for it, else LayerNorm without one."""
    if f"{name}.weight" not in state:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]


def attention(state: State, name: str, x: Tensor) -> Tensor:
    b, n, d = x.shape
    q, k, v = (
        linear(state, f"{name}.qkv", x).view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
    )
    if f"{name}.q_norm.weight" in state:
        q, k = normed(state, f"{name}.q_norm", q), normed(state, f"{name}.k_norm", k)
    if "feat_rope.freqs_cos" in state:
        q, k = (
            z * state["feat_rope.freqs_cos"]
            + torch.stack([-z[..., 1::2], z[..., ::2]], -1).flatten(-2)
            * state["feat_rope.freqs_sin"]
            for z in (q, k)
        )
    weights = (q @ k.transpose(-2, -1) / math.sqrt(d // HEADS)).softmax(-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(b, n, d))


def transformer(
    state: State,
    x: Tensor,
    t: Tensor,
    label: Tensor,
    second: Tensor | None = None,
    end: tuple[Tensor, int] | None = None,
) -> Tensor:
    """All output channels, in the clock and sign of the public code.

    `end` is the time that the blocks of this number and later ones see in the place of t.
    """
    tokens = F.conv2d(
        x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH
    )
    tokens = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
    c = embedded(state, "t_embedder", t) + state["y_embedder.embedding_table.weight"][label]
    if second is not None:
        c = c + embedded(state, "r_embedder", second)
    for i in range(DEPTH):
        if end is not None and i == end[1]:
            c = embedded(state, "t_embedder", end[0])
            c = c + state["y_embedder.embedding_table.weight"][label]
        block = f"blocks.{i}"
        s1, m1, g1, s2, m2, g2 = linear(state, f"{block}.adaLN_modulation.1", F.silu(c))[
            :, None
        ].chunk(6, -1)
        h = normed(state, f"{block}.norm1", tokens) * (1 + m1) + s1
        tokens = tokens + g1 * attention(state, f"{block}.attn", h)
        h = normed(state, f"{block}.norm2", tokens) * (1 + m2) + s2
        if f"{block}.mlp.w12.weight" in state:
            a, b = linear(state, f"{block}.mlp.w12", h).chunk(2, -1)
            h = linear(state, f"{block}.mlp.w3", F.silu(a) * b)
        else:
            h = F.gelu(linear(state, f"{block}.mlp.fc1", h), approximate="tanh")
            h = linear(state, f"{block}.mlp.fc2", h)
        tokens = tokens + g2 * h
    s, m = linear(state, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    tokens = normed(state, "final_layer.norm_final", tokens) * (1 + m) + s
    out = linear(state, "final_layer.linear", tokens)
    out = out.view(len(x), SIDE, SIDE, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", out).flatten(4, 5).flatten(2, 3)


def mf_dit(
    state: State, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """u and v of haidog-yaqub/MeanFlow, whose norms have no weights and no mean."""

    def rms(z: Tensor) -> Tensor:
        return z / (z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).sqrt()

    x = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    tokens = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    c = embedded(state, "t_embedder", 1000 * t) + embedded(state, "r_embedder", 1000 * r)
    c = c + embedded(state, "w_embedder", 1000 * torch.full_like(t, scale) / 4)
    if label is not None:
        c = c + state["y_embedder.embedding.weight"][label]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        modulation = linear(state, f"{block}.adaLN_modulation.1", F.silu(c))[:, None]
        s1, m1, g1, s2, m2, g2 = modulation.chunk(6, -1)
        tokens = tokens + g1 * attention(state, f"{block}.attn", rms(tokens) * (1 + m1) + s1)
        h = linear(state, f"{block}.mlp.fc1", rms(tokens) * (1 + m2) + s2)
        tokens = tokens + g2 * linear(state, f"{block}.mlp.fc2", F.gelu(h, approximate="tanh"))
    found = []
    for final in ("final_layer_u", "final_layer_v"):
        s, m = linear(state, f"{final}.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
        out = linear(state, f"{final}.linear", rms(tokens) * (1 + m) + s)
        out = out.view(len(x), SIDE, SIDE, PATCH, PATCH, -1)
        found.append(torch.einsum("nhwpqc->nchpwq", out).flatten(4, 5).flatten(2, 3))
    return found[0], found[1]


# The U-Net of the CIFAR-10 code: two levels of one block here, attention at the lower one.

UNET: dict[str, Any] = {"width": 16, "sides": (8, 4), "blocks": 1, "augments": 6}


def unet_state() -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    width, dim = UNET["width"], 2 * UNET["width"]  # multipliers (1, 1), embedding of 4 x 8
    base = width // 2

    def block(name: str, inside: int, out: int, attention: bool = False, move: bool = False):
        for norm, channels in (("norm0", inside), ("norm1", out)):
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (channels,)
        for conv, channels in (("conv0", inside), ("conv1", out)):
            shapes[f"{name}.{conv}.weight"] = (out, channels, 3, 3)
            shapes[f"{name}.{conv}.bias"] = (out,)
        _layer(shapes, f"{name}.affine", out, dim)
        if move or inside != out:
            shapes[f"{name}.skip.weight"], shapes[f"{name}.skip.bias"] = (out, inside, 1, 1), (out,)
        if attention:
            shapes[f"{name}.norm2.weight"] = shapes[f"{name}.norm2.bias"] = (out,)
            for part, many in (("qkv", 3), ("proj", 1)):
                shapes[f"{name}.{part}.weight"] = (many * out, out, 1, 1)
                shapes[f"{name}.{part}.bias"] = (many * out,)

    shapes["enc.8x8_conv.weight"], shapes["enc.8x8_conv.bias"] = (base, CHANNELS, 3, 3), (base,)
    block("enc.8x8_block0", base, width)
    block("enc.4x4_down", width, width, move=True)
    block("enc.4x4_block0", width, width, attention=True)
    block("dec.4x4_in0", width, width, attention=True)
    block("dec.4x4_in1", width, width)
    block("dec.4x4_block0", 2 * width, width)
    block("dec.4x4_block1", 2 * width, width, attention=True)
    block("dec.8x8_up", width, width, move=True)
    block("dec.8x8_block0", 2 * width, width)
    block("dec.8x8_block1", width + base, width)
    shapes["dec.8x8_aux_norm.weight"] = shapes["dec.8x8_aux_norm.bias"] = (width,)
    shapes["dec.8x8_aux_conv.weight"] = (CHANNELS, width, 3, 3)
    shapes["dec.8x8_aux_conv.bias"] = (CHANNELS,)
    _layer(shapes, "map_layer0", dim, 512)
    _layer(shapes, "map_layer1", dim, dim)
    shapes["map_augment.weight"] = (512, UNET["augments"])
    state = drawn(shapes)
    for name in ("enc.4x4_down", "dec.8x8_up"):
        for part in ("conv0", "skip"):
            state[f"{name}.{part}.resample_filter"] = filter2d()
    return state


def filter2d() -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return (torch.outer(taps, taps) / 64)[None, None]


def resampled(x: Tensor, move: str) -> Tensor:
    kernel = filter2d().tile(x.shape[1], 1, 1, 1)
    if move == "down":
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=1)
    if move == "up":
        return F.conv_transpose2d(x, 4 * kernel, groups=x.shape[1], stride=2, padding=1)
    return x


def unet_block(state: State, name: str, x: Tensor, c: Tensor) -> Tensor:
    def norm(part: str, z: Tensor) -> Tensor:
        groups = min(32, z.shape[1] // 4)
        weight, bias = state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"]
        return F.group_norm(z, groups, weight, bias, eps=1e-6)

    def conv(part: str, z: Tensor) -> Tensor:
        weight = state[f"{name}.{part}.weight"]
        return F.conv2d(z, weight, state[f"{name}.{part}.bias"], padding=weight.shape[-1] // 2)

    move = name.split("_")[-1]
    h = conv("conv0", resampled(F.silu(norm("norm0", x)), move))
    h = F.silu(norm("norm1", h + linear(state, f"{name}.affine", c)[..., None, None]))
    h = conv("conv1", h)
    if f"{name}.skip.weight" in state:
        x = conv("skip", resampled(x, move))
    x = (x + h) * math.sqrt(0.5)
    if f"{name}.qkv.weight" in state:
        q, k, v = conv("qkv", norm("norm2", x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        a = (v @ weights.transpose(1, 2)).view_as(x)
        x = (x + conv("proj", a)) * math.sqrt(0.5)
    return x


def unet(state: State, x: Tensor, t: Tensor, h: Tensor, augment: Tensor | None) -> Tensor:
    w = 10000.0 ** (-torch.arange(128, dtype=torch.float32) / 127)
    emb = torch.cat([f(s[:, None] * w) for s in (t, h) for f in (torch.sin, torch.cos)], dim=1)
    if augment is not None:
        emb = emb + F.linear(augment, state["map_augment.weight"])
    c = F.silu(linear(state, "map_layer1", F.silu(linear(state, "map_layer0", emb))))
    x = F.conv2d(x, state["enc.8x8_conv.weight"], state["enc.8x8_conv.bias"], padding=1)
    skips = [x]
    for name in ("enc.8x8_block0", "enc.4x4_down", "enc.4x4_block0"):
        x = unet_block(state, name, x, c)
        skips.append(x)
    for name in ("4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0",
                 "8x8_block1"):  # fmt: skip
        if "block" in name:
            x = torch.cat([x, skips.pop()], dim=1)
        x = unet_block(state, f"dec.{name}", x, c)
    norm = F.group_norm(
        x, 4, state["dec.8x8_aux_norm.weight"], state["dec.8x8_aux_norm.bias"], eps=1e-6
    )
    out = F.silu(norm)
    return F.conv2d(
        out, state["dec.8x8_aux_conv.weight"], state["dec.8x8_aux_conv.bias"], padding=1
    )
