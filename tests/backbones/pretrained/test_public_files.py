"""Files that people download: which are read, and what is said of the others."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from public_networks import CLASSES, DIM, HEADS, transformer, transformer_state
from safetensors.torch import save_file
from tiny_runs import zoo

from backbones.pretrained.imports import import_file, import_weights
from backbones.pretrained.public_files import read_state

STATE = transformer_state()
SAME = import_weights(STATE, "sit", HEADS).weights


def imported(path, **more):
    return import_file(path, "sit", HEADS, **more)


def assert_same(found):
    assert found.weights.keys() == SAME.keys()
    for name, value in SAME.items():
        assert found.weights[name].equal(value), name


def saved(content, path: Path, **how) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path, **how)
    else:
        torch.save(content, path, **how)
    return path


# precision


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_precision_are_those_in_float32_rounded_to_it(dtype, suffix, tmp_path):
    half = {name: value.to(dtype) for name, value in STATE.items()}
    found = imported(saved(half, tmp_path / f"w.{suffix}"))
    expected = import_weights({n: v.float() for n, v in half.items()} | fixed(), "sit", HEADS)
    for name, value in expected.weights.items():
        assert found.weights[name].equal(value), name
        assert found.weights[name].dtype == torch.float32


def fixed():
    return {"pos_embed": STATE["pos_embed"]}


def test_positions_in_half_precision_that_are_others_are_refused(tmp_path):
    half = {name: value.bfloat16() for name, value in STATE.items()}
    half["pos_embed"] = (STATE["pos_embed"] + 0.05).bfloat16()
    with pytest.raises(ValueError, match="'pos_embed' of the checkpoint differs from the fixed"):
        imported(saved(half, tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(DIM, dtype=torch.int8), "torch.int8, as quantized weights are"),
        (torch.full((DIM,), torch.inf), "not finite"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(value, said, tmp_path):
    with pytest.raises(ValueError, match=rf"w.pt: 'x_embedder.proj.bias' .*{said}"):
        imported(saved(STATE | {"x_embedder.proj.bias": value}, tmp_path / "w.pt"))


# wrappers and prefixes


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.module.", "module._orig_mod.module.", "model._orig_mod.", "ema.module.",
     "state_dict.model.", "generator.net._forward_module.", "_fsdp_wrapped_module."],
)  # fmt: skip
def test_prefixes_in_any_order_and_number_are_taken_off(prefix):
    assert_same(import_weights({prefix + k: v for k, v in STATE.items()}, "sit", HEADS))


def test_wrappers_inside_the_names_are_taken_off():
    state = {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in STATE.items()}
    state = {
        n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): state[n] for n in state
    }
    assert_same(import_weights(state, "sit", HEADS))


def other():
    return {name: value + 1 for name, value in STATE.items()}


@pytest.mark.parametrize(
    "state",
    [
        {"model": other(), "ema": STATE, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"state_dict": {f"model.{k}": v for k, v in other().items()}
         | {f"ema_model.{k}": v for k, v in STATE.items()} | {"vae.conv": torch.ones(1)}},
        {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in STATE.items()}},
        {"ema": {"decay": 0.9999, "module": STATE}, "model": other()},
    ],
)  # fmt: skip
def test_averaged_weights_are_found_and_the_rest_is_listed(state):
    found = import_weights(state, "sit", HEADS)
    assert_same(found)
    assert found.unused.keys() & {"model", "state_dict.model", "n_averaged"}


def test_one_of_several_networks_is_never_guessed():
    with pytest.raises(ValueError, match="holds 2 networks .'student.', 'teacher.'."):
        import_weights({"student": STATE, "teacher": other()}, "sit", HEADS)
    averages = {"ema_0_999": STATE, "ema_0_9999": other()}
    with pytest.raises(ValueError, match="holds 2 networks"):
        import_weights(averages, "sit", HEADS)
    both = {f"module.{k}": v for k, v in STATE.items()} | other()
    with pytest.raises(ValueError, match="two different tensors"):
        import_weights(both, "sit", HEADS)


# what lies beside the weights


@dataclass
class Settings:
    """A class of the training script."""

    name: str = "a"


def test_old_format_of_torch_save_is_read(tmp_path):
    path = saved({"ema": STATE}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_same(imported(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_arguments_and_settings_beside_weights_are_no_obstacle(zipped, tmp_path):
    beside = {
        "fid": np.float64(3.2), "step": np.int64(9), "seen": np.arange(3), "dtype": np.dtype("f4"),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/x")),
        "counts": defaultdict(int, {"a": 1}), "names": {"b"}, "opt": {"state": {}, "groups": [{}]},
    }  # fmt: skip
    path = saved({"ema": STATE, **beside}, tmp_path / "w.ckpt",
                 _use_new_zipfile_serialization=zipped)  # fmt: skip
    found = imported(path)
    assert_same(found)
    assert {"fid", "step", "args", "opt"} <= {name.split(".")[0] for name in found.unused}


@pytest.mark.parametrize("zipped", [True, False])
def test_class_of_a_script_is_named_and_not_imported(zipped, tmp_path):
    path = saved({"ema": STATE, "settings": Settings()}, tmp_path / "w.pt",
                 _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(ValueError, match=r"w.pt: .*execute .*test_public_files.Settings") as error:
        imported(path)
    assert "weights_only" not in str(error.value)


class Evil:
    """A pickle that calls a function when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Shell:
    """A pickle that calls the shell when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("evil", [Evil, Shell])
def test_code_in_a_pickle_is_not_executed(evil, zipped, tmp_path):
    target = tmp_path / "done"
    content = {"ema": STATE, "x": evil(target)}
    path = saved(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="would have to execute"):
        imported(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the same file does act where it is trusted
    assert target.exists()


# files that are no weights


def archive(name: str) -> bytes:
    stream = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("weights.pt", b"x")
    elif name == "npz":
        np.savez(stream, a=np.ones(2))
    else:
        with tarfile.open(fileobj=stream, mode="w") as file:
            file.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"
PAGE = b"\n\n<!DOCTYPE html><html><title>Not Found</title></html>"


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.bin", "w"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (POINTER, "a pointer of Git LFS, which stands for a file of 2,700,000,000 bytes"),
        (PAGE, "it is a web page, not weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page"),
        (b'{"error": "Repository not found"}', "a text in JSON.*Repository not found"),
        (b"Entry not found", "it is a text, not weights; it begins with 'Entry not found'"),
        (archive("zip"), "a zip archive of weights.pt. Unpack it"),
        (archive("npz"), "a NumPy archive"),
        (archive("tar"), "a tar archive. Unpack it"),
        (gzip.compress(b"weights", mtime=0), "compressed by gzip. Unpack it"),
        (pickle.dumps({"a": 1}), "a pickle of Python objects, which may execute code"),
        (b"\x83\xa5embed\x01", "a file of MessagePack, as Flax"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "an HDF5 file"),
        (b"\x08\x07\x12\x00\xff", "no file of torch.save or safetensors"),
    ],
    ids=["empty", "lfs", "page", "xml", "json", "text", "zip", "npz", "tar", "gzip", "pickle",
         "msgpack", "hdf5", "bytes"],
)  # fmt: skip
def test_file_that_is_no_weights_is_called_what_it_is(content, said, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{said}") as error:
        imported(tmp_path / name)
    assert "mmap" not in str(error.value)
    assert "header too" not in str(error.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_file_that_is_cut_off_is_called_incomplete(kept, name, tmp_path):
    path = saved(STATE, tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match="download is not complete"):
        imported(path)


def test_content_decides_and_not_the_name(tmp_path):
    saved(STATE, tmp_path / "w.pt").rename(tmp_path / "torch.safetensors")
    save_file(STATE, tmp_path / "safe.pt", {"format": "pt", "origin": "somewhere"})
    assert_same(imported(tmp_path / "torch.safetensors"))
    assert_same(imported(tmp_path / "safe.pt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3), r"it holds one tensor of shape \[3\]"),
        ([torch.zeros(3)], "it holds something else instead of weights by name"),
        ({"a": 1}, "it holds no tensors"),
        (OrderedDict(), "it holds no tensors"),
        (torch.nn.Linear(1, 1), "execute torch.nn.modules.linear.Linear"),
    ],
)
def test_content_without_weights_by_name_is_named(content, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        imported(saved(content, tmp_path / "w.pt"))


def test_torchscript_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"net/{name}", b"")
    with pytest.raises(ValueError, match="a TorchScript program, which is code"):
        imported(tmp_path / "w.pt")


# several files


def sharded(folder: Path) -> Path:
    names = sorted(STATE)
    files = {"m-00001-of-00002.safetensors": names[:9], "m-00002-of-00002.safetensors": names[9:]}
    for file, inside in files.items():
        save_file({name: STATE[name] for name in inside}, folder / file)
    places = {name: file for file, inside in files.items() for name in inside}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_index_of_several_files_is_read(tmp_path):
    assert_same(imported(sharded(tmp_path)))


def test_files_of_an_index_that_are_missing_or_elsewhere_are_named(tmp_path):
    index = sharded(tmp_path)
    with pytest.raises(ValueError, match="one of 2 that hold the weights together; give their ind"):
        imported(tmp_path / "m-00001-of-00002.safetensors")
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="m-00002-of-00002.safetensors is not beside it"):
        imported(index)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.pt"}}))
    with pytest.raises(ValueError, match="names '../secret.pt'; the files of an index lie beside"):
        read_state(index)


# labels


def with_rows(rows: int):
    table = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(5))
    return STATE | {"y_embedder.embedding_table.weight": table}


def test_last_row_is_no_label_and_a_note_says_so():
    found = import_weights(STATE, "sit", HEADS)
    assert found.num_classes == CLASSES
    assert any("null" in note and "num_classes = 6" in note for note in found.notes)
    assert import_weights(STATE, "sit", HEADS, CLASSES).notes == ()


def test_table_without_a_row_for_no_label_keeps_every_class():
    state = with_rows(CLASSES)
    found = import_weights(state, "sit", HEADS, CLASSES)
    assert found.num_classes == CLASSES
    x, t = torch.randn(CLASSES, 3, 8, 8), torch.rand(CLASSES)
    label = torch.arange(CLASSES)
    expected = -transformer(state, x, 1 - t, label)
    ours = found.network()(x, t, t, {"label": label})["v"]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    table = found.weights["trunk.conditioning.label.table.weight"]
    assert table[-1].equal(table[:-1].mean(0))
    assert import_weights(state, "sit", HEADS).num_classes == CLASSES - 1  # with the note


def test_table_of_one_row_is_a_network_without_classes():
    state = with_rows(1)
    found = import_weights(state, "sit", HEADS)
    assert found.num_classes == 0
    x, t = torch.randn(3, 3, 8, 8), torch.rand(3)
    expected = -transformer(state, x, 1 - t, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found.network()(x, t, t)["v"], expected, atol=2e-5, rtol=1e-4)
    without = dict(found.weights)
    name = "trunk.conditioning.time.output.bias"
    without[name] = STATE["t_embedder.mlp.2.bias"]
    assert not without[name].equal(found.weights[name])


def test_number_of_classes_on_the_command_line(tmp_path):
    path = saved(with_rows(CLASSES), tmp_path / "w.pt")
    words = ("export", path, "--layout", "sit", "--num-heads", HEADS)
    done = zoo(*words, "--out", tmp_path / "a")
    assert done.status == 0
    assert "the row for no label (null)" in done.err
    done = zoo(*words, "--out", tmp_path / "b", "--num-classes", CLASSES)
    assert done.status == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["fields"]["num_classes"] == CLASSES
    done = zoo(*words, "--out", tmp_path / "c", "--num-classes", 9)
    assert done.status == 2
    assert "--num-classes 9 does not fit its table of labels" in done.err


# shapes that the layout cannot have


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pos_embed": None}, "no 'pos_embed', and no other tensor tells the size"),
        ({"pos_embed": torch.zeros(1, 15, DIM)}, "only positions of square images"),
        ({"x_embedder.proj.weight": torch.zeros(DIM, 3)}, "needs 4 dimensions"),
        ({"t_embedder.mlp.0.weight": torch.zeros(DIM, 64)}, "only embeddings of 256 time features"),
        ({"final_layer.linear.weight": torch.zeros(13, DIM)}, "not 2x2 pixels each"),
    ],
)
def test_tensor_of_another_shape_is_named(change, said, tmp_path):
    state = {n: v for n, v in (STATE | change).items() if v is not None}
    with pytest.raises(ValueError, match=rf"w.pt: .*{said}"):
        imported(saved(state, tmp_path / "w.pt"))
