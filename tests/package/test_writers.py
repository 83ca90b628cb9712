"""Many writers and readers of one path: every reader sees something whole, every writer ends, nothing is left
behind, no link is followed.
"""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import package as files
from hawq_tvm.core import files as plain
from hawq_tvm.core.errors import OutputError

WRITERS, READERS, TIMES = 4, 2, 50
FORK = multiprocessing.get_context("fork")


def at_once(writes: list[Callable[[], None]], reads: Callable[[], None], times: int) -> None:
    """Every write many times in a process of its own, and reads as long as they last; any error fails."""
    over = FORK.Event()

    def read_on() -> None:
        while not over.is_set():
            reads()

    def write_on(write: Callable[[], None]) -> None:
        for _ in range(times):
            write()

    writers = [FORK.Process(target=write_on, args=(w,)) for w in writes]
    readers = [FORK.Process(target=read_on) for _ in range(READERS)]
    for p in (*readers, *writers):
        p.start()
    for p in writers:
        p.join(120)
    over.set()
    for p in readers:
        p.join(60)
    assert [p.exitcode for p in (*writers, *readers)] == [0] * (len(writers) + READERS)


def test_many_writers_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    contents = [bytes([i]) * 100_000 for i in range(WRITERS)]
    plain.write_bytes(path, contents[0])

    def read() -> None:
        assert path.read_bytes() in contents

    at_once([lambda c=c: plain.write_bytes(path, c) for c in contents], read, TIMES)  # type: ignore[misc]
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


@pytest.mark.parametrize("exchange", [True, False])
def test_many_writers_of_a_package(tiny: Path, tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Linux exchanges names, readers always find one; elsewhere, writers at least do not hinder each other."""
    manifest, contents = files.read_files(tiny)
    packages = [files.sealed({**manifest, "name": f"writer{i}"}, contents) for i in range(WRITERS)]
    place = tmp_path / "m.hawq"
    files.install(place, packages[0], contents)
    if not exchange:
        monkeypatch.setattr("deploy.folders._exchange", lambda one, other: 38)  # ENOSYS

    def read() -> None:
        if exchange:
            assert files.read_files(place)[0]["name"] in [p["name"] for p in packages]

    at_once([lambda p=p: files.install(place, p, contents) for p in packages], read, TIMES // 5)  # type: ignore[misc]
    assert files.read_files(place)[0]["name"].startswith("writer") and [p.name for p in tmp_path.iterdir()] == [
        "m.hawq"
    ]


def test_the_name_of_the_temporary_file_cannot_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    tokens = iter(["taken", "taken", "free"])
    monkeypatch.setattr(plain.secrets, "token_hex", lambda count: next(tokens))
    (tmp_path / ".out.taken.tmp").symlink_to(victim)
    plain.write_text(tmp_path / "out", "new")
    assert (
        victim.read_text() == "mine"
        and (tmp_path / "out").read_text() == "new"
        and not list(tmp_path.glob(".out.free*"))
    )
    assert (tmp_path / ".out.taken.tmp").is_symlink()  # somebody else's


def test_permissions_are_the_users_or_those_that_the_file_had(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = os.umask(0o027)
    try:
        plain.write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        plain.write_text(path, "newer")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_long_names_and_failures_leave_nothing(tmp_path: Path) -> None:
    plain.write_text(tmp_path / ("x" * 250), "new")
    (tmp_path / ("x" * 250)).unlink()

    def fail(stream: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        plain._write(tmp_path / "out", fail)
    with pytest.raises(KeyboardInterrupt):
        plain._write(tmp_path / "out", lambda stream: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not list(tmp_path.iterdir())
