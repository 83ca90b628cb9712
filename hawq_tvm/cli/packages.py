"""The verbs that handle a package's files and run none of its code: info, pack, strip, sign, verify-signature."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import PackageError, UsageError


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the options of every verb; verb makes the parser of one."""

    def package(name: str, text: str) -> argparse.ArgumentParser:
        sub = verb(name, text)
        sub.add_argument("package", metavar="PKG", help="a folder or a single file")
        return sub

    def output(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("-o", "--output", required=True, metavar="OUT", help=what)

    subs = [package("info", "print what a package holds, whatever machine it is for")]
    subs[0].add_argument("--rules", action="store_true", help="say of kernels why earlier rules did not make them")
    subs += [package("pack", "write a package as a single file")]
    output(subs[-1], "the file, by habit NAME.hawq; `unzip` makes the folder again")
    subs += [
        package(
            "strip",
            "write a package without its integer graph: smaller, it runs and is timed, and is verified only beside a"
            " full package of the same integer graph",
        )
    ]
    output(subs[-1], "the folder, or with --single-file the file")
    subs[-1].add_argument("--single-file", action="store_true", help="write one file instead of a folder")
    subs += [
        package(
            "sign",
            "sign a package with a secret key of minisign's; its password is asked for, or read from"
            " HAWQ_TVM_KEY_PASSWORD",
        )
    ]
    subs[-1].add_argument("--key", required=True, metavar="SECRET.key", help="made by `minisign -G`")
    subs += [package("verify-signature", "check a package's signature")]
    subs[-1].add_argument("--key", required=True, metavar="PUBLIC.pub", help="of whom you trust")
    for sub in subs:
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")


def info(path: Path) -> dict[str, Any]:
    """What a package holds, JSON-ready: its manifest, compile report, certificate, files and sizes, and whether this
    machine runs it.

    Raises PackageError when it is damaged: what is told was checked.
    """
    from deploy import contents, package
    from hawq_tvm.targets import cpu

    manifest, files = package.read_files(path)
    try:
        cpu.check_host(manifest["target"]["architecture"], manifest["target"]["cpu_features"], "")
        cannot_run = ""
    except PackageError as e:
        cannot_run = str(e)
    report = contents.checked(files["report.json"], "report", str(path))
    sizes = {
        **{name: len(data) for name, data in sorted(files.items())},
        package.MANIFEST: len(package.dump_json(manifest)),
    }
    return {
        **manifest,
        "report": report,
        "certificate": contents.checked(files["certificate.json"], "certificate", str(path)),
        "single_file": path.is_file(),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "checksums": "ok",
        "has_graph": set(package.GRAPH) <= set(files),
        "signed": package.SIGNATURE in files,
        "runs_on_this_cpu": not cannot_run,
        "cannot_run": cannot_run,
        "kernels_by_rule": dict(Counter(row["rule"] for row in report)),
    }


def _info(args: argparse.Namespace) -> int:
    from .show import show_info

    fields = info(Path(args.package))
    print(json.dumps(fields, indent=2)) if args.json else show_info(fields, args.rules)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from deploy import package

    manifest, files = package.read_files(Path(args.package))
    package.install_file(Path(args.output), manifest, files)
    return _wrote(args)


def _strip(args: argparse.Namespace) -> int:
    from deploy import package

    path, output = Path(args.package), Path(args.output)
    if output.resolve() == path.resolve():
        raise UsageError(
            "would replace the full package",
            where=str(output),
            remedy="choose another --output: the graph could not be brought back",
        )
    if not args.single_file:
        package.check_destination(output)
    manifest, files = package.read_files(path)
    package.require_graph(manifest, str(path))
    (package.install_file if args.single_file else package.install)(output, *package.stripped(manifest, files))
    return _wrote(args)


def _wrote(args: argparse.Namespace) -> int:
    from .show import say

    output = Path(args.output)
    count = output.stat().st_size if output.is_file() else sum(f.stat().st_size for f in output.iterdir())
    (
        print(json.dumps({"package": str(output), "bytes": count}))
        if args.json
        else say(f"wrote {output} ({count / 1e6:.2f} MB)")
    )
    return 0


def _sign(args: argparse.Namespace) -> int:
    from deploy import package, signature
    from hawq_tvm.core.files import write_bytes

    from .show import say

    path = Path(args.package)
    manifest, files = package.read_files(path)
    made = signature.sign(
        manifest, args.key, _ask if signature.PASSWORD not in os.environ and sys.stdin.isatty() else None
    )
    if path.is_dir():
        write_bytes(path / package.SIGNATURE, made)
    else:
        package.install_file(path, manifest, {**files, package.SIGNATURE: made})
    (
        print(json.dumps({"package": str(path), "signature": package.SIGNATURE}))
        if args.json
        else say(f"signed {path}: {package.SIGNATURE}")
    )
    return 0


def _ask() -> str:
    return getpass.getpass("password of the key: ")


def _verify_signature(args: argparse.Namespace) -> int:
    from deploy import package, signature

    from .show import say

    manifest, files = package.read_files(Path(args.package))
    comment = signature.verify(manifest, files, args.key, args.package)
    (
        print(json.dumps({"ok": True, "trusted_comment": comment}))
        if args.json
        else say(f"signature valid; trusted comment: {comment}")
    )
    return 0


COMMANDS = {"info": _info, "pack": _pack, "strip": _strip, "sign": _sign, "verify-signature": _verify_signature}
