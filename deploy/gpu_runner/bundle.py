"""The bundle on disk: a manifest with the SHA-256 of every file, libraries whose constants lie elsewhere, and expected integers.

    manifest.json             what is in the bundle, and the hash of every file
    runtime/*.xz, *.whl       TVM's runtime libraries and tvm-ffi
    libraries/NAME.so.xz      a library with zeros in the place of its large constants ("holes")
    entries/NAME.json.xz      its holes, inputs, layers and kernels, and the name of what is expected
    expected/NAME.json.xz     the reference's integers of every layer, or their hashes, the same for every batch of a network
    constants/SHA256.xz       the bytes of holes
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .noise import weights
from .refusal import Refusal

FORMAT = 1
MANIFEST = "manifest.json"
MAKE = "make it again with `make gpu-bundle`"
NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.+-]*/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # nothing outside of the bundle


@dataclass(frozen=True)
class Hole:
    """A constant's place in a library: `count` bytes from `offset`.

    sha256: of the constant's bytes.  kind: what random weights in its place would be, "int8" or "nibbles".
    """

    offset: int
    count: int
    sha256: str
    kind: str


class Bundle:
    """A bundle that was checked: every file is there and has its hash.

    Raises Refusal, exit code 3, naming the first file that has not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise Refusal(f"{folder}: is no bundle: it has no {MANIFEST}; {MAKE}")
        data = path.read_bytes()
        try:
            self.manifest: dict[str, Any] = json.loads(data)
        except ValueError:
            raise Refusal(f"{path}: is damaged: it is no JSON; {MAKE}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise Refusal(f"{path}: has another format than {FORMAT}; {MAKE}")
        self.sha256 = hashlib.sha256(data).hexdigest()
        files = self.manifest.get("files")
        if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
            raise Refusal(f"{path}: is damaged: it lists no files; {MAKE}")
        for name, known in files.items():
            if not NAME.fullmatch(name):
                raise Refusal(f"{folder}: lists a file that no bundle has: {name!a}; {MAKE}")
            file = folder / name
            if not file.is_file() or file.is_symlink():
                raise Refusal(f"{folder}: is damaged: {name} is missing; copy it again or {MAKE}")
            if hashlib.sha256(file.read_bytes()).hexdigest() != known.get("sha256"):
                raise Refusal(f"{folder}: is damaged: {name} does not match its checksum; copy it again or {MAKE}")

    def entry(self, name: str) -> dict[str, Any]:
        """What an entry's library takes, does and must compute."""
        fields: dict[str, Any] = json.loads(self._unpacked(f"entries/{name}.json.xz"))
        wanted = json.loads(self._unpacked(f"expected/{fields['expected']}.json.xz"))
        return {**fields, "layers": [{**layer, "results": results} for layer, results in zip(fields["layers"], wanted, strict=True)]}

    def library(self, name: str, dense: bool = False) -> bytes:
        """An entry's library with its constants; dense: with random weights in the place of large constants.

        Raises Refusal when a constant is not the one that the library was made with.
        """
        library = bytearray(self._unpacked(f"libraries/{name}.so.xz"))
        holes = json.loads(self._unpacked(f"entries/{name}.json.xz"))["holes"]
        for number, fields in enumerate(holes):
            hole = Hole(**fields)
            if not 0 <= hole.offset <= hole.offset + hole.count <= len(library):
                raise Refusal(f"{self.folder}: a constant of {name} lies outside its library; {MAKE}")
            library[hole.offset : hole.offset + hole.count] = self._filling(hole, number, dense)
        return bytes(library)

    def _filling(self, hole: Hole, seed: int, dense: bool) -> bytes:
        if dense:
            return weights(hole.kind, seed, hole.count).tobytes()
        data = self._unpacked(f"constants/{hole.sha256}.xz")
        if len(data) != hole.count:
            raise Refusal(f"{self.folder}: a constant has {len(data)} bytes, expected {hole.count}; {MAKE}")
        return data

    def _unpacked(self, name: str) -> bytes:
        if name not in self.manifest["files"]:
            raise Refusal(f"{self.folder}: {name} is not in the bundle; {MAKE}")
        return lzma.decompress((self.folder / name).read_bytes())

    def unpack_runtime(self, destination: Path) -> None:
        """Write TVM's runtime libraries and, from its wheel, tvm-ffi to a folder."""
        import zipfile

        for name in self.manifest["files"]:
            if name.startswith("runtime/") and name.endswith(".xz"):
                (destination / Path(name).stem).write_bytes(self._unpacked(name))
            elif name.startswith("runtime/") and name.endswith(".whl"):
                with zipfile.ZipFile(self.folder / name) as wheel:
                    wheel.extractall(destination)


def packed(data: bytes) -> bytes:
    """Data as the bundle keeps it."""
    return lzma.compress(data, preset=9)
