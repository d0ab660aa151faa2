"""Names and links of somebody else's folder do not lead out of it."""

from __future__ import annotations

import pytest

from registry.folders import check_output, file_in


@pytest.mark.parametrize("name", ["a", "b/a", "not-there"])
def test_names_inside_are_given_as_paths(name, tmp_path):
    assert file_in(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "b/../../a", "/etc/passwd"])
def test_names_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="which is not inside it"):
        file_in(tmp_path, name)


def test_links_that_lead_out_are_refused_and_others_followed(tmp_path):
    (tmp_path / "secret").write_text("a")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "there").write_text("a")
    (folder / "inside").symlink_to("there")
    (folder / "outside").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    assert file_in(folder, "inside").read_text() == "a"
    for name in ("outside", "up/secret"):
        with pytest.raises(ValueError, match=f"{name} is a link to .*secret, which lies outside"):
            file_in(folder, name)


def test_folder_may_be_a_link_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a").write_text("a")
    (tmp_path / "folder").symlink_to("disk")
    assert file_in(tmp_path / "folder", "a").read_text() == "a"


def test_snapshot_of_the_hub_is_made_of_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0f3a", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "9c2e").write_text("a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/9c2e")
    assert file_in(snapshot, "model.safetensors").read_text() == "a"
    (tmp_path / "secret").write_text("a")
    (snapshot / "config.json").symlink_to("../../secret")
    with pytest.raises(ValueError, match="lies outside"):
        file_in(snapshot, "config.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [("b\udce9", "is no UTF-8"), ("file/inner", "is a file, and no folder"), ("there", "")],
)
def test_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, said):
    (tmp_path / "file").touch()
    if not said:
        return check_output(tmp_path / name, "--out", folder=True)
    with pytest.raises(ValueError, match=said):
        check_output(tmp_path / name, "--out", folder=True)
