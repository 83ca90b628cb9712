"""Files that users name: refused before the work, written whole, links followed, nothing left behind."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hawq_tvm.core.errors import InputError, OutputError
from hawq_tvm.core.files import check_output, load_npz, save_npz, write_text


def test_a_link_stays_and_leads_to_the_new_contents(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    check_output(link)
    assert target.read_text() == "old"
    write_text(link, "new")
    assert (
        link.is_symlink() and target.read_text() == "new" and [p.name for p in target.parent.iterdir()] == ["real.json"]
    )


def test_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "a device or pipe"), (".", "a folder"), ("none/a", "no folder")):
        for act in (check_output, lambda p: write_text(p, "x")):
            with pytest.raises(OutputError, match=f"cannot be written.*found {found}"):
                act(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_arrays_come_back(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    np.testing.assert_array_equal(load_npz(str(tmp_path / "a.npz"))["x"], np.arange(3))


def test_what_is_no_file_of_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as z:
        z.writestr("x.npy", "no array")
    np.savez_compressed(tmp_path / "damaged.npz", x=np.random.default_rng(0).integers(0, 9, 1000))
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[200] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(data)
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, words in (
        ("text.npz", "no array"),
        ("damaged.npz", "cannot be read"),
        ("one.npy", "without a name"),
        ("none.npz", "does not exist"),
        (".", "is a folder"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_npz(str(tmp_path / name))
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
