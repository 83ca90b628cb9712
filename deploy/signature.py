"""Signatures of packages, in minisign's format (Ed25519 over BLAKE2b): `minisign -Vm manifest.json -p KEY.pub`
checks the same.

The manifest is signed; it holds the hash of every other file.  The library py-minisign (extra `sign`) is imported
when it is needed only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import InputError, SignatureError, UsageError

from . import package
from .package import MANIFEST, SIGNATURE, dump_json

PASSWORD = "HAWQ_TVM_KEY_PASSWORD"


def sign(manifest: Mapping[str, Any], key: str | Path, password: Callable[[], str] | None = None) -> bytes:
    """The signature of a package's manifest, with a secret key of `minisign -G` (or -G -W: without a password).

    password: asks for the key's password; None takes it from the environment variable HAWQ_TVM_KEY_PASSWORD.
    Raises InputError when the key cannot be read or the password is wrong.
    """
    minisign = _library()
    secret = _read(minisign.SecretKey.from_file, key, "a secret key of `minisign -G`")
    try:
        with secret:
            if secret.is_encrypted():
                secret.decrypt(password() if password is not None else os.environ.get(PASSWORD, ""))
            comment = f"file:{MANIFEST}\tpackage:{_ascii(str(manifest['name']))}\thashed"
            return bytes(secret.sign(dump_json(manifest), trusted_comment=comment)) + b"\n"
    except minisign.Error as e:
        raise InputError(
            "the key cannot be used",
            where=str(key),
            found=str(e),
            remedy=f"give its password, by the prompt or as {PASSWORD}",
        ) from e


def verify(manifest: Mapping[str, Any], files: Mapping[str, bytes], key: str | Path, where: str) -> str:
    """Check a package's signature against a public key of minisign's; the signature's trusted comment.

    Raises SignatureError when there is no signature, or not this key's for this manifest; InputError when the key
    cannot be read.
    """
    minisign = _library()
    public = _read(minisign.PublicKey.from_file, key, "a public key of `minisign -G`")
    if SIGNATURE not in files:
        raise SignatureError(
            "is not signed", where=where, expected=SIGNATURE, remedy="get a signed one from whom you trust"
        )
    try:
        found = minisign.Signature.from_bytes(files[SIGNATURE])
        public.verify(dump_json(manifest), found)
    except minisign.Error as e:
        raise SignatureError(
            "has a signature that is not valid for this key",
            where=where,
            expected=f"one by {key}",
            found=str(e),
            remedy="do not use it; get it again from whom you trust",
        ) from e
    return str(found.trusted_comment)


def read_files(path: Path, key: str | Path | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the other files of a package, checked as `package.read_files` does; with a public key, its
    signature too.

    Raises PackageError, and what `verify` raises.
    """
    manifest, files = package.read_files(path)
    if key is not None:
        verify(manifest, files, key, str(path))
    return manifest, files


def _read(load: Callable[[Any], Any], key: str | Path, expected: str) -> Any:
    try:
        return load(str(key))
    except (OSError, ValueError) as e:  # minisign.Error is a ValueError
        raise InputError(
            "is no readable key", where=str(key), expected=expected, found=getattr(e, "strerror", None) or str(e)
        ) from e


def _ascii(text: str) -> str:
    """A name as minisign's comments may hold it: printable, one line."""
    return "".join(c if " " <= c < "\x7f" else "?" for c in text)[:100]


def _library() -> Any:
    try:
        import minisign
    except ImportError as e:
        raise UsageError("signatures need py-minisign", remedy="pip install 'hawq-tvm[sign]'") from e
    return minisign
