"""A package as a single file: a ZIP archive, uncompressed, of which every byte is determined by the files in it.

Any unzip opens it (APPNOTE 6.3.10: local headers 4.3.7, central directory 4.3.12, end record 4.3.16; no ZIP64).
Because there is one way only to write given files, a reader writes what it read again and compares: whatever else an
archive can hold is refused.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from hawq_tvm.core.errors import OutputError, PackageError

FIRST = "manifest.json"
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION, _UNIX, _DATE = 20, 3 << 8, 1 << 5 | 1  # ZIP 2.0, made by Unix, 1 January 1980
_MODE = (stat.S_IFREG | 0o644) << 16
_MOST = 0xFFFFFFFF
# What zipfile raises for archives that are damaged or foolish.
_UNREADABLE = (
    zipfile.BadZipFile,
    ValueError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    struct.error,
    zlib.error,
    KeyError,
    IndexError,
)


def pack(files: Mapping[str, bytes], where: str) -> bytes:
    """The archive of files by name: FIRST at the front, the others in order of their names.

    Raises OutputError when it would need more than 4 GiB.
    """
    body, directory, count = io.BytesIO(), io.BytesIO(), 0
    for name in sorted(files, key=lambda n: (n != FIRST, n)):
        data, encoded, offset = files[name], name.encode("ascii"), body.tell()
        if offset + len(data) > _MOST - (1 << 16):
            raise OutputError(
                "cannot be written as a single file", where=where, expected="less than 4 GiB", remedy="keep the folder"
            )
        # Version, flags, stored, time, date, checksum, packed and plain size, length of the name, of the extra field.
        common = struct.pack(
            "<HHHHHIIIHH", _VERSION, 0, 0, 0, _DATE, zlib.crc32(data), len(data), len(data), len(encoded), 0
        )
        body.write(_LOCAL + common + encoded + data)
        directory.write(
            _CENTRAL
            + struct.pack("<H", _UNIX | _VERSION)
            + common
            + struct.pack("<HHHII", 0, 0, 0, _MODE, offset)
            + encoded
        )
        count += 1
    start, size = body.tell(), directory.tell()
    return body.getvalue() + directory.getvalue() + _END + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)


def is_one(path: Path) -> bool:
    """Whether a file begins as `pack` begins: with FIRST."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(30 + len(FIRST))
    return head.startswith(_LOCAL) and head[30:] == FIRST.encode()


def unpack(data: bytes, where: str) -> dict[str, bytes]:
    """The files of an archive by name; it is what `pack` makes of them, byte for byte.

    Raises PackageError for anything else, saying what: names that lead elsewhere, links, repeated, compressed or
    encrypted entries, damage.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = file.infolist()
            _check(entries, len(data), where)
            contents = {e.filename: file.read(e) for e in entries}
    except _UNREADABLE as e:
        raise PackageError(
            "is damaged: it is no readable archive",
            where=where,
            found=str(e).splitlines()[0] if str(e) else type(e).__name__,
            remedy="copy or pack it again",
        ) from e
    if pack(contents, where) != data:
        raise PackageError(
            "is damaged: its archive is not as `hawq-tvm pack` writes it", where=where, remedy="copy or pack it again"
        )
    return contents


def _check(entries: list[zipfile.ZipInfo], size: int, where: str) -> None:
    """Refuse entries that no package has, before any is read."""

    def refuse(why: str, name: str) -> PackageError:
        return PackageError(
            f"is not a package, or a malicious one: {why}",
            where=where,
            found=ascii(name),
            remedy="get it from whom you trust, or pack it again",
        )

    seen: set[str] = set()
    for e in entries:
        name = e.orig_filename
        if name.startswith(("/", "\\")) or name[1:2] == ":":
            raise refuse("the archive has an absolute path", name)
        if ".." in name or "/" in name or "\\" in name:
            raise refuse("the archive has a path that leads elsewhere", name)
        if not name.isascii() or not name.isprintable():
            raise refuse("the archive has a name of other characters than a package's", name)
        if name in seen:
            raise refuse("the archive has two entries of one name", name)
        if e.flag_bits & 1:
            raise refuse("the archive has an encrypted entry", name)
        kind = stat.S_IFMT(e.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise refuse("the archive has a link or another special entry", name)
        if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size:
            raise refuse("the archive has a compressed entry, which could be of any size", name)
        seen.add(name)
    if sum(e.file_size for e in entries) > size:
        raise refuse("the archive's entries overlap", where)
