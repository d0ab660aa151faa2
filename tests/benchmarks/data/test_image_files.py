"""Which files of a folder are pictures: classes, hidden files, links, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data import image_files
from benchmarks.data.image_files import find_pictures


def picture(path: Path, size=(8, 8), colour=(200, 100, 50), **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)
    return path


def test_find_pictures_takes_sorted_subfolders_as_classes(tmp_path):
    for name in ("dog/b.PNG", "dog/deep/a.jpg", "cat/c.jpeg"):
        picture(tmp_path / name)
    found = find_pictures(tmp_path, labelled=True)
    assert found.classes == ("cat", "dog")
    names = [path.relative_to(tmp_path).as_posix() for path in found.files]
    assert list(zip(names, found.labels, strict=True)) == [
        ("cat/c.jpeg", 0),
        ("dog/b.PNG", 1),
        ("dog/deep/a.jpg", 1),
    ]


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["all/a.png", "all/b.png"]])
def test_find_pictures_gives_no_labels_without_two_subfolders(tmp_path, names):
    for name in names:
        picture(tmp_path / name)
    found = find_pictures(tmp_path, labelled=True)
    assert (found.labels, found.classes) == ((), ())
    assert len(found.files) == 2


def test_find_pictures_works_in_the_current_folder(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.png")
    monkeypatch.chdir(tmp_path)
    assert find_pictures(Path("."), labelled=True).labels == (0, 1)


def test_find_pictures_refuses_pictures_beside_class_folders(tmp_path):
    picture(tmp_path / "top.png")
    picture(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"beside its sub-folders \(top.png\).*\(cat\)"):
        find_pictures(tmp_path, labelled=True)
    found = find_pictures(tmp_path, labelled=False)
    assert (len(found.files), found.classes) == (2, ())


def test_find_pictures_names_empty_class_folders(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"no picture in these class folders of .*: dog"):
        find_pictures(tmp_path, labelled=True)


def test_find_pictures_ignores_hidden_files_and_counts_other_kinds(tmp_path, caplog):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".thumbnails" / "a.png")
    for name in ("notes.txt", "more.TXT", "README"):
        (tmp_path / name).touch()
    found = find_pictures(tmp_path, labelled=True)
    assert "3 files are no pictures and are ignored (.txt 2, no suffix 1)" in caplog.text
    assert [path.name for path in found.files] == ["a.png"]


def test_find_pictures_follows_links_once(tmp_path):
    picture(tmp_path / "far" / "a.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "near")
    assert len(find_pictures(tmp_path / "near", labelled=False).files) == 1


def test_find_pictures_says_what_is_wrong_with_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        find_pictures(tmp_path / "gone", labelled=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file' is not a folder"):
        find_pictures(tmp_path / "file", labelled=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no picture in the folder .*empty'.*: none"):
        find_pictures(tmp_path / "empty", labelled=True)
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"other kinds: \.heic 1\. .*\.jpg"):
        find_pictures(tmp_path / "empty", labelled=True)


@pytest.mark.parametrize("suffix", [".AVIF", ".jp2", ".jpe", ".mpo"])
def test_less_common_suffixes_are_pictures_too(tmp_path, suffix):
    (tmp_path / f"x{suffix}").touch()
    assert len(find_pictures(tmp_path, labelled=False).files) == 1


SPLITS = [
    ("train/a.png", "val/a.png"),
    ("Training/a.png", "TEST/a.png"),
    ("train2017/a.png", "val2017/a.png"),
    ("train_images/a.png", "test-set/a.png", "extra/a.png"),
    ("train/cat/a.png", "train/dog/a.png", "unlabelled/x/a.png"),
    ("train/cat/a.png", "train/dog/a.png"),  # the only sub-folder, whose own are the classes
]


@pytest.mark.parametrize("names", SPLITS)
def test_find_pictures_refuses_splits_as_classes_and_names_the_folder_to_give(tmp_path, names):
    for name in names:
        picture(tmp_path / name)
    train = tmp_path / names[0].split("/")[0]
    with pytest.raises(ValueError, match="splits of a data set") as refused:
        find_pictures(tmp_path, labelled=True)
    assert f"such as {train};" in str(refused.value)
    assert "image_folder.splits_are_classes = True" in str(refused.value)
    wanted = sorted({name.split("/")[0] for name in names})
    classes = find_pictures(tmp_path, labelled=True, splits_are_classes=True).classes
    assert classes == (tuple(wanted) if len(wanted) > 1 else ())


@pytest.mark.parametrize("name", ["test", "dev", "train"])
def test_find_pictures_takes_one_class_with_the_name_of_a_split_aloud(tmp_path, name, caplog):
    for folder in (name, "boat", "car"):
        picture(tmp_path / folder / "a.png")
    assert name in find_pictures(tmp_path, labelled=True).classes
    assert f"the sub-folder {name} of" in caplog.text


def test_find_pictures_knows_names_that_only_begin_like_splits(tmp_path, caplog):
    for folder in ("trainer", "valley", "testament"):
        picture(tmp_path / folder / "a.png")
    assert find_pictures(tmp_path, labelled=True).classes == ("testament", "trainer", "valley")
    assert caplog.text == ""


def test_find_pictures_says_that_it_takes_all_splits_without_labels(tmp_path, caplog):
    for folder in ("train", "val"):
        picture(tmp_path / folder / "a.png")
    assert len(find_pictures(tmp_path, labelled=False).files) == 2
    assert str(tmp_path / "train") in caplog.text


@pytest.mark.parametrize("name", ["a/lost.png", "lost_class"])
def test_find_pictures_names_links_that_lead_nowhere(tmp_path, name):
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "b" / "0.png")
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="leads nowhere") as refused:
        find_pictures(tmp_path, labelled=True)
    assert str(tmp_path / name) in str(refused.value)
    assert str(tmp_path / "gone") in str(refused.value)


def test_find_pictures_names_a_pipe_and_does_not_wait_for_it(tmp_path):
    picture(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png \(a pipe"):
        find_pictures(tmp_path, labelled=False)


def test_find_pictures_does_not_pass_over_a_folder_that_it_may_not_read(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "b" / "0.png")
    scan = os.scandir

    def refuse(top):
        if Path(top).name == "b":
            raise PermissionError(13, "Permission denied", str(top))
        return scan(top)

    monkeypatch.setattr(image_files.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"b' may not be read by this user"):
        find_pictures(tmp_path, labelled=True)
