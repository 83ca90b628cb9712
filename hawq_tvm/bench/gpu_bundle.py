"""The GPU bundle: everything that a machine with a GPU, without TVM and without a network needs to check and time our packages.

    python -m hawq_tvm.bench.gpu_bundle          (make gpu-bundle; then, on the other machine, make gpu-check)

Libraries are compiled once and kept in --work until the compiler's source changes. All weights of the networks are random; in
the networks that are verified all but one in 16 (of the largest layers: in 64) are zero, so that they compress; times are taken with dense random weights, which
the other machine makes itself. Needs nvcc and the extras `bench`, `torch` and `cuda`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import tvm
import tvm_ffi

from deploy.gpu_runner.bundle import FORMAT, MANIFEST, packed

from .. import __version__, processes, signals
from .. import target as targets
from ..errors import HawqError, OutputError, UsageError
from ..files import check_folder, write_bytes
from ..pipeline import compile_model, import_annotated, to_packed
from . import gpu_cases, gpu_entries, zoo

NETS = ("resnet50", "resnet18", "mobilenetv2", "inceptionv3")
PRECISIONS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
BATCHES = (1, 8, 32, 128)
SMALL = {"resnet18": 64, "mobilenetv2": 64}  # image sizes at which every element is kept
KEEP = 1 / 16
LIMIT_MB = 60
PYTHON = "3.12"
RUNTIME = ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_runtime_cuda.so")
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Wanted:
    """An entry of the bundle before it is made; net: "" for the odd-shape models.

    seeds: of the images.  whole: keep every expected element.  rank: the importance of its true constants, 0 first.
    """

    name: str
    net: str
    precision: str
    size: int
    batch: int
    seeds: tuple[int, ...]
    whole: bool
    rank: int

    @property
    def expected(self) -> str:
        """The name of what is expected of its layers."""
        return f"{self.net}-{self.precision}-{self.size}" if self.net else self.name


def plan(nets: Sequence[str], precisions: Sequence[str], batches: Sequence[int], size: int | None = None) -> list[Wanted]:
    """The entries in order of importance; size: of all images (None: each network's own, and a small one for some)."""
    made = [Wanted(f"case-{n}", "", n, 0, gpu_cases.BATCH, tuple(range(1, gpu_cases.BATCH + 1)), True, 0) for n in gpu_cases.CASES]
    for net in nets:
        for precision in precisions:
            sizes = [size or zoo.NETWORKS[net][2]] + ([SMALL[net]] if size is None and net in SMALL else [])
            for pixels in sizes:
                small = pixels <= 64
                for batch in (3,) if small and size is None else batches:
                    rank = 1 + (batches.index(batch) if batch in batches else 0)
                    made.append(Wanted(f"{net}-{precision}-{pixels}-b{batch}", net, precision, pixels, batch, (1, 2, 3) if small else (1, 2), small, rank))
    return sorted(made, key=lambda w: w.rank)


class Maker:
    """Compiles entries into a folder and keeps them until the source of the compiler changes."""

    def __init__(self, work: Path, target: str, say: Callable[[str], None]) -> None:
        self.work, self.target, self.say = work, target, say
        self.stamp = hashlib.sha256((target + str(tvm.__version__)).encode() + b"".join(p.read_bytes() for p in _sources())).hexdigest()
        self._expected: dict[str, list[dict[str, Any]]] = {}

    def make(self, wanted: Wanted) -> Path:
        """The folder of an entry: library.so.xz, entry.json.xz, and its constants in the folder `constants` beside it."""
        folder = self.work / "entries" / wanted.name
        stamp = folder / "stamp"
        if stamp.is_file() and stamp.read_text() == self.stamp:
            return folder
        self.say(f"compiling {wanted.name}")
        entry = self._entry(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (self.work / "constants").mkdir(exist_ok=True)
        for digest, data in entry.constants.items():
            _write(self.work / "constants" / f"{digest}.xz", partial(packed, data))
        (folder / "library.so.xz").write_bytes(packed(entry.library))
        (folder / "entry.json.xz").write_bytes(packed(json.dumps(entry.fields).encode()))
        (folder / "expected.json.xz").write_bytes(packed(json.dumps([s["results"] for s in self._samples(wanted)]).encode()))
        (folder / "constants.json").write_text(json.dumps(sorted(entry.constants)))
        stamp.write_text(self.stamp)
        return folder

    def _entry(self, wanted: Wanted) -> gpu_entries.Entry:
        about = {k: getattr(wanted, k) for k in ("name", "net", "precision", "size", "expected")}
        compiled = compile_model(self._model(wanted), targets.parse(self.target), shapes=_shapes(wanted, wanted.batch))
        return gpu_entries.make(compiled, wanted.seeds, self._samples(wanted), target=self.target, **about)

    def _samples(self, wanted: Wanted) -> list[dict[str, Any]]:
        """What the reference expects of every layer; made once for all batches of a network."""
        if wanted.expected not in self._expected:
            annotated = import_annotated(self._model(wanted), shapes=_shapes(wanted, 1))
            graph = to_packed(annotated, target=targets.parse(self.target))
            self._expected[wanted.expected] = gpu_entries.expected_layers(graph, wanted.seeds, wanted.whole)
        return self._expected[wanted.expected]

    def _model(self, wanted: Wanted) -> str | onnx.ModelProto:
        if not wanted.net:
            return gpu_cases.CASES[wanted.precision]()
        weight_bits, activation_bits = PRECISIONS[wanted.precision]
        made_by = hashlib.sha256(Path(zoo.__file__).read_bytes() + str(KEEP).encode()).hexdigest()[:12]
        path = self.work / "models" / made_by / f"{wanted.expected}.onnx"
        return str(zoo.make(
            wanted.net, path, size=wanted.size, weight_bits=weight_bits, activation_bits=activation_bits, keep=KEEP, symbolic=True, say=self.say,
        ))  # fmt: skip


def _shapes(wanted: Wanted, batch: int) -> dict[str, tuple[int, ...]]:
    return {"input": (batch, 3, wanted.size, wanted.size)} if wanted.net else {}


def _sources() -> Iterator[Path]:
    for folder in ("hawq_tvm", "relay_passes", "schedules"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent.name != "bench" or path.stem in ("gpu_cases", "gpu_entries", "zoo"):
                yield path
    yield ROOT / "deploy" / "gpu_runner" / "compare.py"
    yield ROOT / "deploy" / "gpu_runner" / "noise.py"


def _write(path: Path, data: Callable[[], bytes]) -> None:
    if not path.exists():
        write_bytes(path, data())


def choose(wanted: Sequence[Wanted], folders: Sequence[Path], constants: Path, room: int) -> tuple[dict[str, Path], list[str]]:
    """The files, by their names in the bundle, of libraries and, in order of rank, of those constants that fit into `room` bytes.

    The second result: the entries whose constants do not fit; they can be timed, not verified.
    Raises OutputError when the libraries alone do not fit.
    """
    files: dict[str, Path] = {}
    for w, folder in zip(wanted, folders, strict=True):
        files |= {f"libraries/{w.name}.so.xz": folder / "library.so.xz", f"entries/{w.name}.json.xz": folder / "entry.json.xz"}
        files |= {f"expected/{w.expected}.json.xz": folder / "expected.json.xz"}
    left = room - sum(p.stat().st_size for p in files.values())
    if left < 0:
        raise OutputError("the bundle would be larger than its limit", where="--limit-mb", found=f"{-left / 1e6:.1f} MB too much without any weights", remedy="leave out networks, precisions or batches")
    without: list[str] = []
    for w, folder in zip(wanted, folders, strict=True):
        needed = {f"constants/{d}.xz": constants / f"{d}.xz" for d in json.loads((folder / "constants.json").read_text())}
        more = sum(p.stat().st_size for n, p in needed.items() if n not in files)
        if more > left:
            without.append(w.name)
            continue
        left -= more
        files |= needed
    return files, without


def runtime_files(folder: Path, wheel: Path | None) -> dict[str, Path]:
    """TVM's runtime libraries of this installation, and the wheel of tvm-ffi for the other machine's Python, in a folder.

    Raises OutputError when the wheel cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries = Path(tvm.__file__).parent / "lib"
    files: dict[str, Path] = {}
    for name in RUNTIME:
        _write(folder / f"{name}-{tvm.__version__}.xz", partial(_packed_file, libraries / name))
        files[f"runtime/{name}.xz"] = folder / f"{name}-{tvm.__version__}.xz"
    if wheel is None:
        version = str(tvm_ffi.__version__)
        have = sorted(folder.glob(f"apache_tvm_ffi-{version}-cp{PYTHON.replace('.', '')}-*.whl"))
        wheel = have[0] if have else _download(folder, version)
    elif not wheel.is_file():
        raise UsageError("does not exist", where="--wheel", found=str(wheel))
    return {**files, f"runtime/{wheel.name}": wheel}


def _packed_file(path: Path) -> bytes:
    return packed(path.read_bytes())


def _download(folder: Path, version: str) -> Path:
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (24, 28)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", *platforms]
    done = subprocess.run([*command, f"apache-tvm-ffi=={version}", "--dest", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob("apache_tvm_ffi-*.whl"))
    if done.returncode or not found:
        told = processes.failure(done, "give it with --wheel FILE")
        raise OutputError(f"the wheel of tvm-ffi for Python {PYTHON} cannot be downloaded", **told)
    return found[0]


def _check(destination: Path) -> None:
    """Refuse a destination, before the work, whose folder does not exist or that is something else than a bundle."""
    check_folder(destination)
    if destination.exists() and not (destination / MANIFEST).is_file():
        raise OutputError("exists and is not a bundle", where=str(destination), remedy="choose another --output, or remove it")


def write(destination: Path, files: dict[str, Path], manifest: dict[str, Any]) -> dict[str, int]:
    """Write the bundle in one step; an older bundle is replaced, anything else refused. Returns every file's bytes.

    Raises OutputError when the destination is something else than a bundle.
    """
    _check(destination)
    runner = {f"gpu_runner/{p.name}": p for p in sorted((ROOT / "deploy" / "gpu_runner").glob("*.py"))}
    files = {"gpu_check.py": ROOT / "deploy" / "gpu_check.py", **runner, **files}
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.resolve().parent) as staging:
        new = Path(staging) / "new"
        known: dict[str, dict[str, Any]] = {}
        for name, source in files.items():
            data = source.read_bytes()
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
            known[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (new / MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest, "files": known}, indent=1, sort_keys=True) + "\n")
        if destination.exists():
            os.replace(destination, Path(staging) / "old")
        os.replace(new, destination)
    return {n: int(k["bytes"]) for n, k in known.items()}


def make(
    destination: Path, work: Path, wanted: Sequence[Wanted], target: str, *, wheel: Path | None = None, limit: float = LIMIT_MB * 1e6,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:  # fmt: skip
    """Make a bundle of entries; returns every file's bytes.

    limit: bytes of all files.  Raises OutputError when it would be larger, or cannot be written.
    """
    _check(destination)
    maker = Maker(work, target, say)
    folders = []
    for i, w in enumerate(wanted):
        folders.append(maker.make(w))
        say(f"{i + 1} of {len(wanted)}: {w.name}")
    runtime = runtime_files(work / "runtime", wheel)
    spare = 200_000 + 200 * 4 * len(wanted) + sum(p.stat().st_size for p in runtime.values())  # the runner, the manifest, the runtime
    files, without = choose(wanted, folders, work / "constants", int(limit - spare))
    manifest = {
        "made": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "target": target, "targets": targets.describe(targets.parse(target)),
        "producer": {"hawq_tvm": __version__, "tvm": str(tvm.__version__), "tvm_ffi": str(tvm_ffi.__version__), **targets.compiler_versions(targets.parse(target))},
        "keep": KEEP, "entries": [{"name": w.name, "net": w.net, "precision": w.precision, "size": w.size, "batch": w.batch, "verifiable": w.name not in without} for w in wanted],
    }  # fmt: skip
    sizes = write(destination, {**runtime, **files}, manifest)
    for name in without:
        say(f"{name}: its weights do not fit: it can be timed, not verified")
    return sizes


def _parser() -> argparse.ArgumentParser:
    def names(known: Sequence[str], text: str) -> list[str]:
        odd = set(parts := text.split(",")) - set(known)
        if odd:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(odd))}: expected {', '.join(known)}")
        return parts

    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.bench.gpu_bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", type=partial(names, NETS), default=list(NETS), metavar="A,B", help=f"default: {','.join(NETS)}")
    parser.add_argument("--precisions", type=partial(names, list(PRECISIONS)), default=list(PRECISIONS), metavar="A,B", help=f"default: {','.join(PRECISIONS)}")
    parser.add_argument("--batches", type=partial(names, [str(b) for b in BATCHES]), default=[str(b) for b in BATCHES], metavar="1,8", help="default: 1,8,32,128")
    parser.add_argument("--target", default="cuda-sm90", help="default: cuda-sm90")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB, metavar="MB", help=f"default: {LIMIT_MB}")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"tvm-ffi for the other machine's Python (default: downloaded, for Python {PYTHON})")
    parser.add_argument("--work", type=Path, default=Path(".bench/gpu"), metavar="FOLDER", help="where models and libraries are kept (default: .bench/gpu)")
    parser.add_argument("--output", type=Path, default=Path("gpu-bundle"), metavar="FOLDER")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: make the bundle and list it."""
    args = _parser().parse_args(argv)
    say = partial(print, file=sys.stderr, flush=True)
    try:
        targets.check_compiler(targets.parse(args.target))
        wanted = plan(args.nets, args.precisions, [int(b) for b in args.batches])
        sizes = make(args.output, args.work, wanted, args.target, wheel=args.wheel, limit=args.limit_mb * 1e6, say=say)
    except HawqError as e:
        say(f"gpu-bundle: {e}")
        return e.exit_code
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    print(f"{sum(sizes.values()):>12,}  in all, in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
