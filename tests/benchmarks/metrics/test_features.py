"""Feature extractors: the right weights, the stated rounding and resize, and clear refusals."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.data.pictures import to_uint8
from benchmarks.metrics import features
from benchmarks.metrics.features import (
    INCEPTION_FILE,
    INCEPTION_URL,
    WEIGHTS_VARIABLE,
    EfficientNetLite0,
    InceptionV3,
    Pixels,
    best_available,
    efficientnet_input,
    efficientnet_lite0,
    resize,
)
from benchmarks.metrics.timm_features import TimmFeatures
from registry import extractors


class FakeInception(nn.Module):
    """A TorchScript stand-in with the parts that clean-fid's wrapper calls: 2048 block means."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d((32, 64)), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class FirstChannel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "INCEPTION_FILE", "not-there-" + INCEPTION_FILE)


@pytest.fixture
def inception_folder(tmp_path: Path) -> Path:
    fake = FakeInception()
    fake.layers.insert(0, FirstChannel())
    torch.jit.script(fake).save(str(tmp_path / INCEPTION_FILE))
    return tmp_path


def photo(name: str, rows: slice, columns: slice) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    crop = Image.fromarray(getattr(data, name)()[rows, columns]).resize((224, 224))
    return torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "rows", "columns", "classes"),
    [
        ("chelsea", slice(0, 300), slice(75, 375), {281, 282, 285}),  # tabby, tiger, Egyptian cat
        ("coffee", slice(0, 400), slice(100, 500), {967}),  # espresso
    ],
)
def test_efficientnet_weights_recognise_a_photo(name, rows, columns, classes) -> None:
    image = photo(name, rows, columns).float()
    with torch.no_grad():
        top = efficientnet_lite0()(efficientnet_input(image)).topk(5).indices[0].tolist()
    assert classes & set(top)


def test_efficientnet_features_are_what_the_classifier_reads() -> None:
    image = photo("chelsea", slice(0, 300), slice(75, 375))
    vectors = EfficientNetLite0(size=224)(image)
    net = efficientnet_lite0()
    with torch.no_grad():
        direct = net(efficientnet_input(image.float()))
        torch.testing.assert_close(net.classifier(vectors), direct, rtol=1e-4, atol=1e-4)
    assert vectors.shape == (1, 1280)
    assert vectors.dtype == torch.float32


def test_weight_map_by_position_refuses_other_shapes_and_counts() -> None:
    ours = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match="3 tensors"):
        features._by_position(ours, {str(i): torch.zeros(2) for i in range(3)})
    with pytest.raises(ValueError, match=r"y \(4,\).*b \(3,\)"):
        features._by_position(ours, {"x": torch.zeros(2), "y": torch.zeros(4)})


def test_float_images_are_rounded_as_files_are() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    off = (levels.float() / 127.5 - 1) + 0.4 / 127.5  # less than half a level away
    extractor = EfficientNetLite0(size=32)
    assert torch.equal(extractor(off), extractor(levels))
    assert not torch.equal(extractor(off + 0.2 / 127.5), extractor(levels))


def test_grey_images_are_repeated_to_three_channels() -> None:
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    extractor = EfficientNetLite0(size=32)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_features_do_not_depend_on_the_batch_size() -> None:
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    one = EfficientNetLite0(size=32, batch_size=1)(images)
    torch.testing.assert_close(
        EfficientNetLite0(size=32, batch_size=4)(images), one, rtol=1e-4, atol=1e-4
    )  # float32 convolutions choose other kernels for other batches


def test_resize_is_clean_fids() -> None:
    from cleanfid.resize import build_resizer

    image = np.random.RandomState(0).randint(0, 256, (11, 7, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None], 299)[0].permute(1, 2, 0)
    assert np.array_equal(ours.numpy(), build_resizer("clean")(image))


def test_resize_antialiases_when_it_shrinks() -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = resize(checks.to(torch.uint8).expand(1, 3, 64, 64), 16)
    assert (small - 127.5).abs().max() < 8  # without antialiasing: 0 or 255 everywhere


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        EfficientNetLite0()(torch.zeros(shape))


def test_efficientnet_refuses_a_size_below_its_stride() -> None:
    with pytest.raises(ValueError, match=r"efficientnet_lite0\.size"):
        EfficientNetLite0(size=31)


def test_missing_inception_says_where_it_goes_and_where_it_comes_from(
    no_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        InceptionV3()
    for part in (str(tmp_path), INCEPTION_URL, WEIGHTS_VARIABLE, "/tmp", "efficientnet_lite0"):
        assert part in str(caught.value)


def test_a_named_inception_folder_is_the_only_place_searched(
    inception_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(inception_folder))
    InceptionV3()
    with pytest.raises(FileNotFoundError):
        InceptionV3(folder=str(tmp_path_factory.mktemp("empty")))


def test_inception_sees_299_pixels_scaled_to_one(inception_folder: Path) -> None:
    images = torch.full((3, 1, 8, 8), 192, dtype=torch.uint8)
    vectors = InceptionV3(folder=str(inception_folder), batch_size=2)(images)
    assert vectors.shape == (3, 2048)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.full((3, 2048), 0.5))  # (192 - 128) / 128


def test_best_available_prefers_inception_and_says_what_it_took(
    inception_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(inception_folder))
    with caplog.at_level(logging.WARNING):
        assert isinstance(best_available((3, 32, 32)), InceptionV3)
    assert str(inception_folder) in caplog.text


def test_best_available_without_inception_says_so(
    no_weights: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(best_available((1, 8, 8)), EfficientNetLite0)
        assert "EfficientNetLite0" in caplog.text
        assert isinstance(best_available((2,)), Pixels)
        assert isinstance(best_available((4, 8, 8)), Pixels)
    assert "Pixels" in caplog.text


def test_pixels_are_the_values() -> None:
    x = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(Pixels()(x), x.reshape(2, 6))


def test_pixels_have_one_scale_before_and_after_rounding() -> None:
    x = torch.tensor([[[[-1.0, -1 / 255], [1 / 255, 1.0]]]])
    assert Pixels()(to_uint8(x)).allclose(Pixels()(x), atol=1e-6)


def test_provenance_names_weights_resize_and_rounding(inception_folder: Path) -> None:
    for extractor in (EfficientNetLite0(size=96), InceptionV3(folder=str(inception_folder))):
        about = extractor.provenance()
        assert len(about["weights"]) == 64
        assert "bicubic" in about["resize"]
        assert "round(127.5 (x + 1))" in about["rounding"]
        assert extractor.label in about["features"]
    assert "96x96" in EfficientNetLite0(size=96).provenance()["resize"]


def test_every_extractor_is_registered() -> None:
    assert {"efficientnet_lite0", "inception_v3", "pixels"} <= set(extractors.names())


def test_inception_with_its_own_resize_sees_the_image_as_it_is(inception_folder: Path) -> None:
    class Graph(nn.Module):
        """Gives back what it was handed, in 2048 values."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Identity()

        def forward(self, x: torch.Tensor, return_features: bool) -> torch.Tensor:
            return x.flatten(1)[:, :2048]

    torch.jit.script(Graph()).save(str(inception_folder / INCEPTION_FILE))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    extractor = InceptionV3(folder=str(inception_folder), resize="tensorflow", batch_size=2)
    assert torch.equal(extractor(images), images.flatten(1)[:, :2048].float())
    about = extractor.provenance()
    assert "TensorFlow graph, not antialiased" in about["resize"]
    assert "legacy_tensorflow" in about["protocol"]
    with pytest.raises(ValueError, match="'clean' or 'tensorflow'"):
        InceptionV3(folder=str(inception_folder), resize="pil")


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from timm.models import create_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(create_model("resnet10t").state_dict(), path)
    return path


def test_timm_features_are_the_pooled_ones_of_the_named_weights(resnet_weights: Path) -> None:
    from timm.models import create_model

    extractor = TimmFeatures(model="resnet10t", weights=str(resnet_weights), size=64, batch_size=2)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    net = create_model("resnet10t").eval()
    net.load_state_dict(load_file(resnet_weights))
    mean, std = (torch.tensor(net.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        maps = net.forward_features((images / 255 - mean) / std)
        expected = net.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    about = extractor.provenance()
    assert about["features"] == "resnet10t, 512 pooled"
    assert about["weights"] == hashlib.sha256(resnet_weights.read_bytes()).hexdigest()
    assert "64x64" in about["resize"]


def test_timm_features_take_a_vision_transformer_at_another_size(tmp_path: Path) -> None:
    from timm.models import create_model

    save_file(create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    extractor = TimmFeatures(model="test_vit", weights=str(tmp_path / "vit.safetensors"), size=64)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert extractor(images).shape == (2, 64)


def test_timm_features_refuse_other_models_and_missing_files(resnet_weights: Path) -> None:
    for given in ({}, {"model": "resnet10t"}, {"weights": str(resnet_weights)}):
        with pytest.raises(ValueError, match=r"bind timm_features\.model = .*\.weights = "):
            TimmFeatures(**given)
    with pytest.raises(ValueError, match=r"no model named 'resnet10'.*Did you mean 'resnet1"):
        TimmFeatures(model="resnet10", weights=str(resnet_weights))
    with pytest.raises(FileNotFoundError, match=r"Nothing is\s+downloaded.*timm/resnet10t"):
        TimmFeatures(model="resnet10t", weights="/nowhere/x.safetensors")
    wrong = TimmFeatures(model="test_vit", weights=str(resnet_weights))
    with pytest.raises(ValueError, match="does not fit timm's test_vit"):
        wrong.provenance()
