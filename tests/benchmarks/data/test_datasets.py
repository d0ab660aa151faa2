"""The registered data sets: contract, values, closed forms, and errors at construction."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10_files import write_cifar10
from PIL import Image
from tiny_vaes import save_tiny

import benchmarks.builtin_parts  # noqa: F401  registers every data set
from benchmarks.data.digits import Digits
from benchmarks.data.fashion_mnist import FashionMnist
from benchmarks.data.image_folder import ImageFolder
from benchmarks.data.mixtures import Gaussian, Mixture
from benchmarks.data.pictures import to_uint8
from benchmarks.data.streams import StoredSet
from benchmarks.latents.autoencoders import find_vae
from benchmarks.latents.encode import encode
from benchmarks.latents.shard_encoder import Encoder
from registry import datasets
from registry.protocols import Share, groups_by_label, read_share

STORED = [name for name in datasets.names() if issubclass(datasets.get(name), StoredSet)]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def fashion_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 20), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        labels = np.arange(n)[:: 1 if prefix == "train" else -1] % 10
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory) -> Path:
    """Six 4x4 pictures, dark on the left and bright on the right; two of class a, four of b."""
    folder = tmp_path_factory.mktemp("pictures")
    ramp = np.tile(np.array([0, 80, 160, 240], np.uint8), (4, 1))
    for i, name in enumerate(["a", "a", "b", "b", "b", "b"]):
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(ramp + np.uint8(i)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(params=sorted({*datasets.names()} - {"edm_augment", "scaled"}))  # made of others
def dataset(request, fashion_folder, picture_folder, tmp_path):
    name = request.param
    if name == "hf_images":
        pytest.importorskip("datasets").load_dataset(
            "imagefolder", data_dir=str(picture_folder), split="train", cache_dir=str(tmp_path)
        ).save_to_disk(tmp_path / "saved")
        return datasets.build(name, path=str(tmp_path / "saved"))
    if name == "latents":
        pytest.importorskip("diffusers")
        encoder = Encoder(vae=find_vae(str(save_tiny(tmp_path / "vae"))), resolution=8)
        encode(picture_folder, tmp_path / "latents", encoder)
        return datasets.build(name, folder=str(tmp_path / "latents"))
    folders = {"fashion_mnist": fashion_folder, "image_folder": picture_folder}
    folders["cifar10"] = write_cifar10(tmp_path)
    kwargs = {"folder": str(folders[name])} if name in folders else {}
    return datasets.build(name, **kwargs)


def test_dataset_keeps_the_contract(dataset):
    assert dataset.name == datasets.name_of(dataset)
    for x0, cond in (dataset.batch(2, 5, 0), dataset.reference(5, 0)):
        assert x0.shape == (5, *dataset.shape)
        assert x0.dtype == torch.float32
        assert x0.isfinite().all()
        if dataset.num_classes:
            assert cond["label"].shape == (5,)
            assert cond["label"].dtype == torch.int64
            assert int(cond["label"].min()) >= 0
            assert int(cond["label"].max()) < dataset.num_classes
        else:
            assert cond is None
    assert dataset.identity().startswith(f"{dataset.name}: ")
    assert (dataset.sample_labels(4) is None) == (dataset.num_classes == 0)


def test_labelled_dataset_gives_groups_of_one_label(dataset):
    if not dataset.num_classes:
        return
    assert groups_by_label(dataset)
    x0, cond = read_share(dataset, 0, 12, 0, Share(group=3))
    labels = cond["label"].view(-1, 3)
    assert (labels == labels[:, :1]).all()
    for share in (Share(0, 2, group=3), Share(1, 2, group=3)):
        rows, whole = read_share(dataset, 0, 12, 0, share)
        assert torch.equal(rows, x0.unflatten(0, (-1, 3))[share.number :: 2].flatten(0, 1))
        assert torch.equal(whole["label"], cond["label"])
    assert torch.equal(dataset.batch(1, 5, 0, same_label=1)[0], dataset.batch(1, 5, 0)[0])


def test_dataset_survives_pickling(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert copy.identity() == dataset.identity()
    assert torch.equal(copy.batch(1, 3, 0)[0], dataset.batch(1, 3, 0)[0])


@pytest.mark.parametrize("dataset", STORED, indirect=True)
def test_pictures_fill_the_range_and_round_back_to_their_levels(dataset):
    x0, _ = dataset.reference(dataset.size, 0)
    assert x0.min() >= -1
    assert x0.max() <= 1
    top = type(dataset).top
    levels = (to_uint8(x0).double() * top / 255).round().to(torch.uint8)
    assert torch.equal(
        levels.flatten(1).sum(1).sort()[0], dataset.stored.pixels.flatten(1).sum(1).sort()[0]
    )


def test_digits_are_those_of_scikit_learn():
    digits = Digits()
    assert (digits.size, digits.shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    assert digits.identity() == "digits: 1797 x (1, 8, 8), sha256 4e5f6c511bbc9ef0"
    x0, cond = digits.reference(1797, 0)
    assert (x0.min(), x0.max()) == (-1, 1)
    # Class means, not pictures: a zero is empty in the middle, a one is not.
    means = [x0[cond["label"] == k, 0, 3:5, 3:5].mean() for k in (0, 1)]
    assert means[0] < -0.6
    assert means[1] > 0.5


def test_fashion_mnist_joins_the_splits(fashion_folder):
    sizes = {
        s: FashionMnist(folder=str(fashion_folder), split=s).size for s in ("train", "test", "all")
    }
    assert sizes == {"train": 20, "test": 10, "all": 30}
    every = FashionMnist(folder=str(fashion_folder), split="all")
    assert (every.shape, every.num_classes) == ((1, 28, 28), 10)
    assert every.stored.labels.tolist() == [*range(10), *range(10), *reversed(range(10))]


def test_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        FashionMnist(folder=str(tmp_path))
    for needed in (
        "apt-get install dataset-fashion-mnist",
        "fashion_mnist.folder",
        str(tmp_path),
        "train-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        assert needed in str(raised.value)


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (np.zeros((3, 28, 28)), np.zeros(2), "and .* 2 labels; expected n pictures of 28 x 28"),
        (np.zeros((3, 32, 32)), np.zeros(3), r"holds \(3, 32, 32\) pixels"),
        (np.zeros((0, 28, 28)), np.zeros(0), r"holds \(0, 28, 28\) pixels"),
        (np.zeros((3, 28, 28)), np.array([0, 10, 1]), "holds the label 10; expected 0 to 9"),
    ],
)
def test_fashion_mnist_rejects_files_that_do_not_fit(tmp_path, images, labels, expected):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(ValueError, match=expected):
        FashionMnist(folder=str(tmp_path))


def test_fashion_mnist_rejects_an_unknown_split(fashion_folder):
    with pytest.raises(ValueError, match="'valid'; it must be one of train, test, all"):
        FashionMnist(folder=str(fashion_folder), split="valid")


def test_image_folder_reads_classes_and_pixels(picture_folder):
    grey = ImageFolder(folder=str(picture_folder), resolution=4, channels=1)
    assert (grey.size, grey.shape, grey.num_classes) == (6, (1, 4, 4), 2)
    assert grey.stored.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert grey.stored.pixels[5, 0, 0].tolist() == [5, 85, 165, 245]
    assert grey.sample_labels(3)["label"].tolist() == [0, 1, 1]
    free = ImageFolder(folder=str(picture_folder), resolution=4, labelled=False)
    assert (free.shape, free.num_classes, free.batch(0, 2, 0)[1]) == ((3, 4, 4), 0, None)


def test_image_folder_flips_by_place_and_only_in_training(picture_folder):
    folder = {"folder": str(picture_folder), "resolution": 4, "channels": 1}
    plain, flipped = ImageFolder(**folder), ImageFolder(**folder, flip=True)
    n = 60
    x0, _ = plain.batch(0, n, 0)
    y0, _ = flipped.batch(0, n, 0)
    mirrored = (y0 != x0).flatten(1).any(1)
    assert torch.equal(torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0), y0)
    assert 15 <= int(mirrored.sum()) <= 45  # 30 expected, 4 standard deviations
    assert torch.equal(y0, flipped.batch(0, n, 0)[0])
    assert torch.equal(y0, torch.cat([flipped.batch(i, n // 4, 0)[0] for i in range(4)]))
    assert torch.equal(flipped.reference(6, 0)[0], plain.reference(6, 0)[0])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"channels": 4}, r"channels is 4; it must be 1 \(grey\) or 3"),
        ({"resolution": 0}, "resolution is 0; it must be positive"),
    ],
)
def test_image_folder_rejects_settings(picture_folder, kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        ImageFolder(folder=str(picture_folder), **kwargs)


def test_image_folder_names_a_broken_picture_at_construction(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"1 of 1 pictures.*\n.*broken\.png"):
        ImageFolder(folder=str(tmp_path))


@pytest.mark.parametrize("law", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])
def test_draws_have_the_moments_of_their_components(law):
    parts = law.components()
    means, stds, weights = parts["means"], parts["stds"], parts["weights"]
    mean = weights @ means
    variance = weights @ (stds**2 + means**2) - mean**2
    n = 40_000
    for x in (law.reference(n, 0)[0].double(), law.batch(0, n, 0)[0].double()):
        assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
        # Var(s^2) <= 2 sigma^4 / n for these laws, whose tails are lighter than a Gaussian's
        assert ((x.var(0) - variance).abs() < 4 * variance * (2 / n) ** 0.5).all()


def test_mixture_draws_each_mode_with_its_weight_and_shape():
    law = Mixture()
    parts = law.components()
    n = 40_000
    x = law.reference(n, 1)[0].double()
    # By the nearest mode in standard deviations; the modes are at least 2.9 of them apart.
    apart = ((x[:, None] - parts["means"]) / parts["stds"]).square().sum(-1).argmin(1)
    share = torch.bincount(apart).double() / n
    assert ((share - parts["weights"]).abs() < 0.01).all()  # 4 standard errors
    for k in range(4):
        scatter = x[apart == k].std(0)
        assert ((scatter / parts["stds"][k] - 1).abs() < 0.05).all()  # points near a border


def test_mixture_default_has_unit_scale():
    parts = Mixture().components()
    mean = parts["weights"] @ parts["means"]
    std = (parts["weights"] @ (parts["stds"] ** 2 + parts["means"] ** 2) - mean**2).sqrt()
    assert mean.abs().max() < 0.01
    assert (std - 1).abs().max() < 0.01


def test_mixture_weights_are_relative_and_lists_are_welcome():
    law = Mixture(means=[[0.0], [1.0]], stds=[[1.0], [2.0]], weights=[1, 3])
    assert law.components()["weights"].tolist() == [0.25, 0.75]
    assert law.shape == (1,)
    assert law.batch(0, 3, 0)[0].shape == (3, 1)


def test_identity_of_a_law_follows_its_parameters():
    assert Gaussian().identity() == Gaussian().identity()
    assert Gaussian().identity() != Gaussian(mean=(0.6, -0.7)).identity()
    assert Gaussian(mean=(1, 0)).identity() == Gaussian(mean=(1.0, 0.0)).identity()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Gaussian(mean=(0.0,)), "gaussian: .* do not fit together"),
        (lambda: Gaussian(mean=(), std=()), "do not fit together"),
        (lambda: Gaussian(std=(1.0, 0.0)), "must be positive"),
        (lambda: Gaussian(mean=(float("nan"), 0.0)), "must be finite"),
        (lambda: Mixture(weights=(1.0,)), "mixture: .* do not fit together"),
        (lambda: Mixture(weights=(0.5, 0.5, 0.0, 0.5)), "must be positive"),
    ],
)
def test_laws_reject_components_that_do_not_fit(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


def test_a_folder_read_as_needed_gives_the_batches_of_one_in_memory(tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 10, 5)).save(path)
    kept = ImageFolder(folder=str(tmp_path), resolution=4, flip=True)
    read = ImageFolder(folder=str(tmp_path), resolution=4, flip=True, in_memory=False)
    for step in range(3):
        (x0, cond), (other, others) = kept.batch(step, 10, 7), read.batch(step, 10, 7)
        assert torch.equal(x0, other)
        assert torch.equal(cond["label"], others["label"])
    assert torch.equal(kept.reference(5, 1)[0], read.reference(5, 1)[0])
    assert "sha256 of names and sizes" in read.identity()
    for dataset in (read, kept):
        assert "largest centred square at whole pixels" in dataset.identity()
    (tmp_path / "class0" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 12 pictures cannot be read"):
        ImageFolder(folder=str(tmp_path), resolution=4, in_memory=False)
