"""EfficientNet-Lite0 with its trained weights, quantized after training: its answers, beside the float network's and
other tools' at 8 bits.

    python -m hawq_tvm.studies.imagenet --data PICTURES

The pictures are labelled ones of yours, as `evaluate` takes them; some calibrate, the others are asked about.
Networks answer in ONNX Runtime, ours with --packages as compiled libraries. NNCF is left out where it is not
installed. A network that was measured stays measured: the same command continues. Needs the extras `quantize`,
`bench` and `demo`, which has the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch

from hawq_tvm.cli.terminal import ERR
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, InputError, UsageError
from hawq_tvm.core.files import check_folder, load_npz, save_npz, write_bytes, write_text
from hawq_tvm.core.json_files import read_json
from hawq_tvm.quantize.allocate.plan import Problem, bits_file, problem
from hawq_tvm.quantize.allocate.sensitivity import Settings, Step
from hawq_tvm.quantize.allocate.table import widths
from hawq_tvm.quantize.judge.evaluation import TOP, batch_size, labelled_files, open_images, ranked
from hawq_tvm.quantize.judge.runners import open_runner
from hawq_tvm.quantize.network.data import LABELS, Calibration
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.progress import measuring
from hawq_tvm.quantize.ptq.quantizer import METHOD, Recipe, post_training

Array = np.ndarray[Any, Any]
PIXELS = Preprocess((127.0,), (128.0,), 256)
CALIBRATION, PROBES = 96, 16
# How each network of ours is made; bits that begin with "bops" are a budget, for which the Hessian chooses.
OURS: dict[str, Recipe] = {
    "W8A8": Recipe("W8A8"),
    "mixed, 75 % of BOPS": Recipe("bops=75%"),
    "mixed, 50 % of BOPS": Recipe("bops=50%"),
    "W4A8": Recipe("W4A8"),
    "W4A4": Recipe("W4A4"),
}
FLOAT, ONNX_RUNTIME, NNCF = "float", "ONNX Runtime INT8", "NNCF INT8"
NETWORKS = (FLOAT, ONNX_RUNTIME, NNCF, *OURS)
# What stands between a dequantize and the layer that reads it, and moves integers only.
MOVES = (
    "Flatten",
    "Identity",
    "MaxPool",
    "GlobalMaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


@dataclass
class Study:
    """One table: the float network, the pictures, and the folder where files and rows are kept.

    model: a float ONNX file with one input.  calibration: so many of the pictures calibrate.  limit: at most so many
    others are asked about.
    packages: whether networks of ours are compiled, and the libraries answer.
    """

    model: Path
    data: Path
    folder: Path
    labels: Path | None = None
    pixels: Preprocess = PIXELS
    calibration: int = CALIBRATION
    limit: int | None = None
    settings: Settings = field(default_factory=lambda: Settings(probes=PROBES))
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: OURS)
    packages: bool = False
    quiet: bool = False

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for every network, measured now where none is kept; see `_row` for its fields.

        Raises InputError for pictures that do not suffice, UsageError when what is kept was measured with another
        setup.
        """
        kept = self._kept()
        for name in names:
            if name in kept:
                continue
            if name == NNCF and find_spec("nncf") is None:
                ERR.print("NNCF is not installed, and left out: pip install 'hawq-tvm[bench]'")
            else:
                ERR.print(name)
                start = time.perf_counter()
                kept[name] = {**self._row(name), "seconds": round(time.perf_counter() - start)}
                self._keep(kept)
        return [kept[name] for name in names if name in kept]

    # -- the files
    # ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _split(self) -> tuple[dict[Path, int], dict[Path, int]]:
        """Pictures to calibrate on, evenly spaced over the sorted list, and the others, evenly spaced, with their
        classes.
        """
        known = labelled_files(self.data, self.labels)
        if known is None:
            raise InputError(
                "holds no labelled pictures",
                where=str(self.data),
                expected="a folder per class, a folder with labels.txt, or a list of 'FILE CLASS' lines",
            )
        known = {file.absolute(): label for file, label in known.items()}
        files = sorted(known)
        if len(files) <= self.calibration:
            raise InputError(
                "leaves no pictures to ask about",
                where=str(self.data),
                expected=f"more than the {self.calibration} that calibrate",
                found=str(len(files)),
            )
        chosen = _spaced(files, self.calibration)
        rest = sorted(set(files) - set(chosen))
        return {f: known[f] for f in chosen}, {f: known[f] for f in _spaced(rest, self.limit or len(rest))}

    @cached_property
    def _calibration(self) -> Path:
        """The pictures to calibrate on, as the network reads them, with labels: an .npz file."""
        path, (chosen, _) = self.folder / "calibration.npz", self._split
        inputs = load_float(self.model).inputs
        (batch,) = Calibration(list(chosen), inputs, self.pixels, chosen, str(self.data)).batches(len(chosen))
        save_npz(path, {**batch.inputs, LABELS: np.asarray(batch.labels)})
        return path

    @cached_property
    def _tests(self) -> Path:
        path = self.folder / "pictures.csv"
        write_text(path, "".join(f"{file},{label}\n" for file, label in self._split[1].items()))
        return path

    def _setup(self) -> dict[str, Any]:
        chosen, rest = self._split
        return {
            "model": self.model.name,
            "bytes": self.model.stat().st_size,
            "calibration": len(chosen),
            "pictures": len(rest),
            "data": str(self.data.resolve()),
            "mean": list(self.pixels.mean),
            "std": list(self.pixels.std),
            "resize": self.pixels.resize,
            "seed": self.settings.seed,
            "method": METHOD,
            "probes": self.settings.probes,
            "tolerance": self.settings.tolerance,
            "packages": self.packages,
        }

    def _kept(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "rows.json"
        if not path.exists():
            return {}
        fields = read_json(path, "the rows of this command")
        if not isinstance(fields, dict) or fields.get("setup") != self._setup():
            raise UsageError(
                "was measured with another model, other pictures or other settings",
                where=str(path),
                remedy="remove it, or name another folder with --folder",
            )
        return {row["network"]: row for row in fields["rows"]}

    def _keep(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        write_text(
            self.folder / "rows.json",
            json.dumps({"setup": self._setup(), "rows": list(rows.values())}, indent=1) + "\n",
        )

    # -- the networks
    # ------------------------------------------------------------------------------------------------------

    def _row(self, name: str) -> dict[str, Any]:
        """network, answers and right (top-1 and top-5) beside float's, file_bytes, package_bytes and bops (a share
        of W8A8's) where they apply.
        """
        file, package, share = self.model, None, None
        if name != FLOAT:
            file = self.folder / f"{name.replace(' %', '').replace(', ', '-').replace(' ', '-').lower()}.onnx"
        if name in self.recipes:
            share = self._ours(self.recipes[name], file)
            package = self._compiled(file) if self.packages else None
        elif name != FLOAT:
            share = {ONNX_RUNTIME: self._onnx_runtime, NNCF: self._nncf}[name](file)
        return {
            "network": name,
            "pictures": len(self._split[1]),
            **self._compared(self._float_answers if name == FLOAT else self._answers(package or file)),
            "file_bytes": file.stat().st_size,
            "package_bytes": package and sum(f.stat().st_size for f in package.rglob("*") if f.is_file()),
            "bops": share,
        }

    def _answers(self, model: Path) -> Array:
        """The five best classes of every picture [picture, place]."""
        runner = open_runner(model)
        images, parts = open_images(self._tests, runner.inputs, self.pixels), []
        with measuring(ERR, self.quiet) as progress:
            for batch in images.batches(batch_size(runner)):
                parts.append(ranked(runner, batch)[:, :TOP])
                if progress:
                    progress(Step("pictures", sum(map(len, parts)), images.count))
        return np.concatenate(parts)

    @cached_property
    def _float_answers(self) -> Array:
        path, setup = self.folder / "float-answers.npz", json.dumps(self._setup())
        if path.exists():
            kept = load_npz(str(path))
            if str(kept.get("setup", "")) == setup:
                return kept["answers"]
        found = self._answers(self.model)
        save_npz(path, {"answers": found, "setup": np.array(setup)})
        return found

    def _compared(self, ours: Array) -> dict[str, Any]:
        """right: numbers of pictures; flips: first answers that differ; lost: those that float has right, gained:
        those that this network has.
        """
        labels, real = np.array([self._split[1][f] for f in sorted(self._split[1])]), self._float_answers
        right, was = ours[:, 0] == labels, real[:, 0] == labels
        return {
            "right": [int(right.sum()), int((ours == labels[:, None]).any(1).sum())],
            "flips": int((ours[:, 0] != real[:, 0]).sum()),
            "lost": int((was & ~right).sum()),
            "gained": int((right & ~was).sum()),
        }

    def _problem(self, budget: str) -> Problem:
        state = self.folder / "sensitivity.npz"
        with measuring(ERR, self.quiet) as progress:
            return problem(
                self.model, self._calibration, self.settings, budgets=[budget], state=state, progress=progress
            )

    def _ours(self, recipe: Recipe, file: Path) -> float:
        """Write a network of ours; its share of W8A8's bit operations."""
        if str(recipe.bits).startswith("bops"):
            bits = file.with_suffix(".bits.json")
            sought = self._problem(str(recipe.bits))
            allocation = sought.allocate([str(recipe.bits)])
            write_text(bits, json.dumps(bits_file(allocation, sought.provenance), indent=1) + "\n")
            recipe = replace(recipe, bits=bits)
        with measuring(ERR, self.quiet) as progress:
            found = post_training(self.model, self._calibration, recipe, progress=progress)
        write_bytes(file, found.model.SerializeToString())
        return self._share({row["layer"]: (row["weight_bits"], row["activation_bits"]) for row in found.layers})

    def _share(self, bits: Mapping[str, tuple[int, int]]) -> float:
        graph, sizes = load_float(self.model), dict[str, int]()
        with torch.no_grad():
            graph.run(self._pictures()[0], lambda name, value: sizes.update({name: value.numel()}))
        products = {layer.name: graph.products(layer, sizes[layer.output]) for layer in graph.layers}
        return sum(n * math.prod(bits[name]) for name, n in products.items()) / (
            math.prod(widths("W8A8")) * sum(products.values())
        )

    def _compiled(self, file: Path) -> Path:
        from hawq_tvm import compile as compile_package

        return compile_package(file).save(file.with_suffix(".hawq"))

    def _pictures(self) -> list[dict[str, Array]]:
        """What other tools calibrate on: the same pictures, one at a time."""
        with np.load(self._calibration) as arrays:
            ((name, values),) = ((n, arrays[n]) for n in arrays.files if n != LABELS)
        return [{name: value[None]} for value in values]

    def _onnx_runtime(self, file: Path) -> float | None:
        from hawq_tvm.bench.zoo import quantize

        quantize(self.model, file, self._pictures())
        return quantized_share(onnx.load(str(file)))

    def _nncf(self, file: Path) -> float | None:
        os.environ.setdefault("NNCF_CI", "1")  # otherwise it tells its authors about every call
        import nncf

        pictures = self._pictures()
        written = nncf.quantize(onnx.load(str(self.model)), nncf.Dataset(pictures), subset_size=len(pictures))
        write_bytes(file, written.SerializeToString())
        return quantized_share(written)


def quantized_share(model: onnx.ModelProto) -> float | None:
    """1, the share of W8A8's bit operations, when both operands of all convolutions and matrix products of a QDQ
    model are dequantized; else None.
    """
    made = {name: node for node in model.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        while name in made and made[name].op_type in MOVES:
            name = made[name].input[0]
        return name in made and made[name].op_type == "DequantizeLinear"

    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return 1.0 if layers and all(dequantized(name) for node in layers for name in node.input[:2]) else None


def _spaced(files: Sequence[Path], count: int) -> list[Path]:
    return [files[i * len(files) // count] for i in range(count)] if count < len(files) else list(files)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table: the difference in top-1 stands with its standard error, which the pictures that changed
    sides leave.
    """
    head = [
        "network",
        "answers that differ from float's",
        "top-1",
        "top-5",
        "top-1 less float's, points",
        "ONNX file, bytes",
        "package, bytes",
        "BOPS of W8A8's",
    ]
    lines = []
    for row in rows:
        n, lost, gained = row["pictures"], row["lost"], row["gained"]
        error = math.sqrt(max(lost + gained - (lost - gained) ** 2 / n, 0)) / n
        shares = [f"{right / n:.2%}" for right in row["right"]]
        package = f"{row['package_bytes']:,}" if row["package_bytes"] else ""
        bops = "" if row["bops"] is None else f"{row['bops']:.1%}"
        lines.append(
            [
                row["network"],
                f"{row['flips']} of {n}",
                *shares,
                f"{100 * (gained - lost) / n:+.2f} ± {100 * error:.2f}",
                f"{row['file_bytes']:,}",
                package,
                bops,
            ]
        )
    table = [head, ["---"] * len(head), *lines]
    if not any(row["package_bytes"] for row in rows):
        for cells in table:
            del cells[-2]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.imagenet", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder per class, a folder with labels.txt, or a list of 'FILE CLASS' lines (.txt, .csv)",
    )
    parser.add_argument("--labels", type=Path, help="'FILE CLASS' lines for a folder of images")
    parser.add_argument(
        "--folder", type=Path, default=Path(".imagenet"), help="where files and rows are kept (default: .imagenet)"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=CALIBRATION,
        metavar="N",
        help=f"pictures that calibrate (default: {CALIBRATION})",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many of the others are asked about")
    parser.add_argument(
        "--packages",
        action="store_true",
        help="compile the networks of ours for this machine, and let the libraries answer",
    )
    parser.add_argument(
        "--networks",
        default=";".join(NETWORKS),
        help="separated by ; (default: %(default)s)".replace("%(default)s", "; ".join(NETWORKS).replace("%", "%%")),
    )
    args = parser.parse_args()
    try:
        names = [name.strip() for name in args.networks.split(";")]
        unknown = [name for name in names if name not in NETWORKS]
        if unknown:
            raise UsageError(
                "is no network of this table", where="--networks", expected="; ".join(NETWORKS), found=unknown[0]
            )
        for option, value in (("--calibration", args.calibration), ("--limit", args.limit)):
            if value is not None and value < 1:
                raise UsageError("is no number of pictures", where=f"{option} {value}", expected="at least 1")
        check_folder(args.folder)
        args.folder.mkdir(exist_ok=True)
        model = args.folder / "float.onnx"
        if not model.exists():
            from .demo import export_network

            with TemporaryDirectory() as place:
                export_network(Path(place) / "float.onnx")
                write_bytes(model, (Path(place) / "float.onnx").read_bytes())
        study = Study(
            model,
            args.data,
            args.folder,
            args.labels,
            calibration=args.calibration,
            limit=args.limit,
            packages=args.packages,
        )
        print(markdown(study.rows(names)))
    except HawqError as e:
        print(f"imagenet: {e}", file=sys.stderr)
        return e.exit_code
    except ModuleNotFoundError as e:
        print(f"imagenet: {e}: pip install 'hawq-tvm[quantize,bench,demo]'", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
