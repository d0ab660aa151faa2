"""A folder is what its manifest says: neither less, nor more, nor elsewhere."""

from __future__ import annotations

import json

import pytest

from trainers.checkpoints.whole_folders import (
    MANIFEST,
    BrokenCheckpoint,
    aside_of,
    begin,
    fingerprint,
    publish,
    verify,
)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "step_00000001"
    aside = aside_of(target)
    begin(aside)
    for name in ("net.safetensors", "state.json"):
        (aside / name).write_text(name)
    publish(aside, target, {file.name: fingerprint(file) for file in aside.iterdir()})
    return target


def change(folder, **entries):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | entries))


def test_folder_is_begun_without_what_an_earlier_attempt_left(tmp_path):
    aside = aside_of(tmp_path / "run" / "step_00000001")
    for _ in range(2):
        begin(aside)
        assert not list(aside.iterdir())
        (aside / "net.safetensors").write_text("half of it")


def test_folder_as_it_was_written_is_whole(folder):
    (folder / ".hidden").write_text("of the file system")
    verify(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "1", "", '{"net.safetensors": {}}'])
def test_manifest_that_says_nothing_is_refused(text, folder):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BrokenCheckpoint, match=r"manifest.json (lists no files|cannot be read)"):
        verify(folder)


def test_file_that_the_manifest_leaves_out_is_refused(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["state.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match=r"state.json is not in manifest.json"):
        verify(folder)


def test_names_that_lead_out_are_refused(folder):
    (folder.parent / "secret").write_text("a")
    mark = fingerprint(folder.parent / "secret")
    for name in ("../secret", str(folder.parent / "secret")):
        change(folder, **{name: mark})
        with pytest.raises(BrokenCheckpoint, match="which is not inside it"):
            verify(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest[name]
        (folder / MANIFEST).write_text(json.dumps(manifest))


def test_link_that_leads_out_is_refused_though_its_content_is_right(folder):
    (folder / "net.safetensors").rename(folder.parent / "elsewhere")
    (folder / "net.safetensors").symlink_to("../elsewhere")
    with pytest.raises(BrokenCheckpoint, match="net.safetensors is a link to"):
        verify(folder)
