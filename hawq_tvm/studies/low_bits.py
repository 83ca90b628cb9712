"""A float network in 8, mixed and 4 bits with the defaults of `quantize`, beside ONNX Runtime's and NNCF's best for the
same bits: one table with intervals of paired differences.

    python -m hawq_tvm.studies.low_bits
    python -m hawq_tvm.studies.low_bits --pictures PICTURES
    python -m hawq_tvm.studies.low_bits --model float.onnx --calib calibration.npz --data labelled.npz

Without options a depthwise network is trained on Fashion-MNIST (Debian's dataset-fashion-mnist): it is calibrated on
512 training pictures and answers the 10,000 test pictures. With --pictures it is EfficientNet-Lite0 with its trained
weights on labelled pictures of yours: 128 calibrate, evenly spaced, and it answers the others. All networks answer in
ONNX Runtime. NNCF quantizes convolutions to 8 bits only, and is left out where it is not installed. A row that was
measured stays, unless `quantize` has learned another method since: the same command continues. Needs the extras
`quantize` and `bench`, for --pictures `demo`, which has the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from hawq_tvm.cli.terminal import ERR
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, InputError, UsageError
from hawq_tvm.core.files import check_folder, save_npz, write_bytes, write_text
from hawq_tvm.core.json_files import read_json
from hawq_tvm.quantize.allocate.plan import bits_file, problem
from hawq_tvm.quantize.judge.evaluation import evaluate, labelled_files
from hawq_tvm.quantize.network.data import LABELS, Calibration
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.progress import measuring
from hawq_tvm.quantize.ptq.quantizer import METHOD, post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .fashion import FOLDER, prepare

BUDGET = "bops=50%"
PICTURES = 128  # that calibrate other tools, and EfficientNet-Lite0
PIXELS = Preprocess((127.0,), (128.0,), 256)  # as EfficientNet-Lite0 reads them
# What an interrupted network of ours is continued from.
STATES = (".measured.npz", ".state.npz")
MIXED = "mixed, half of W8A8's BOPS"  # whose bits BUDGET allocates
OURS: dict[str, Recipe] = {
    "W8A8": Recipe("W8A8"),
    "W4A8, nearest": Recipe("W4A8", rounding="nearest"),
    "W4A8": Recipe("W4A8"),
    MIXED: Recipe(),
    "W4A4, nearest": Recipe("W4A4", rounding="nearest"),
    "W4A4": Recipe("W4A4"),
}
# Bits of weights and of activations.
ONNX_RUNTIME = {f"ONNX Runtime, W{w}A{a}": (w, a) for w, a in ((8, 8), (4, 8), (4, 4))}
# What `prepare` writes, by option.
FILES = {"model": "float.onnx", "calib": "calibration.npz", "data": "test.npz"}
FLOAT, NNCF = "float", "NNCF, W8A8"
NETWORKS = (FLOAT, *OURS, *ONNX_RUNTIME, NNCF)


class Bottleneck(nn.Module):
    """An inverted bottleneck: wider by four, depthwise, narrow again; with a shortcut where the shape stays."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        wide, self.shortcut = 4 * into, into == out and stride == 1
        self.layers = nn.Sequential(
            *(nn.Conv2d(into, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def depthwise() -> nn.Module:
    """A small network of the kind of MobileNetV2, for pictures of 28 x 28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(Bottleneck(16, 16, 1), Bottleneck(16, 24, 2), Bottleneck(24, 24, 1), Bottleneck(24, 40, 2)),
        *(Bottleneck(40, 40, 1), nn.Conv2d(40, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def file_of(name: str, folder: Path) -> Path:
    """Where a network of the table is."""
    return folder / f"{name.replace(' ', '-').replace(',', '').lower()}.onnx"


def quantized(model: Path, calibration: Path, folder: Path, name: str) -> Path:
    """A network of the table, written into the folder."""
    file = file_of(name, folder)
    if name in OURS:
        recipe, states = OURS[name], [file.with_suffix(suffix) for suffix in STATES]
        with measuring(ERR, False) as progress:
            if name == MIXED:
                found = problem(model, calibration, budgets=[BUDGET], state=states[0], progress=progress)
                bits = file.with_suffix(".bits.json")
                write_text(bits, json.dumps(bits_file(found.allocate([BUDGET]), found.provenance), indent=1) + "\n")
                recipe = replace(recipe, bits=bits)
            made = post_training(model, calibration, recipe, state=states[1], progress=progress).model
        write_bytes(file, made.SerializeToString())
        for state in states:
            state.unlink(missing_ok=True)
        return file
    with np.load(calibration) as arrays:
        ((given, values),) = ((n, arrays[n]) for n in arrays.files if n != LABELS)
    pictures = [{given: value[None]} for value in values[:PICTURES]]
    if name in ONNX_RUNTIME:
        from hawq_tvm.bench.zoo import quantize

        weights, activations = ONNX_RUNTIME[name]
        quantize(model, file, pictures, weight_bits=weights, activation_bits=activations)
    else:
        os.environ.setdefault("NNCF_CI", "1")  # otherwise it tells its authors about every call
        import nncf

        made = nncf.quantize(onnx.load(str(model)), nncf.Dataset(pictures), subset_size=len(pictures))
        write_bytes(file, made.SerializeToString())
    return file


def row(model: Path, calibration: Path, data: Path, folder: Path, name: str) -> dict[str, Any]:
    """What a network answers, as `evaluate --against` counts it, and the CPU time that it took to make."""
    begun, resumed = time.process_time(), any(file_of(name, folder).with_suffix(s).exists() for s in STATES)
    file = model if name == FLOAT else quantized(model, calibration, folder, name)
    seconds = None if resumed else round(time.process_time() - begun)
    return {"network": name, "cpu_seconds": seconds, **evaluate(file, data, against=model).to_dict()}


def rows(names: Sequence[str], setup: Mapping[str, str], folder: Path) -> list[dict[str, Any]]:
    """A row for every network, measured where none is kept that was made the same way.

    Raises UsageError when what is kept was measured with another model or data.
    """
    path, kept = folder / "rows.json", dict[str, dict[str, Any]]()
    model, calibration, data = files = [Path(setup[n]) for n in FILES]
    told = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    if path.exists():
        fields = read_json(path, "the rows of this command")
        if not isinstance(fields, dict) or fields.get("setup") != told:
            remedy = "remove it, or name another folder with --folder"
            raise UsageError("was measured with another model or other data", where=str(path), remedy=remedy)
        kept = {row["network"]: row for row in fields["rows"]}
    for name in names:
        made = f"method {METHOD}, {OURS[name]}" if name in OURS else ""
        if name in kept and kept[name].get("made") == made:
            continue
        if name == NNCF and find_spec("nncf") is None:
            ERR.print("NNCF is not installed, and left out")
            continue
        ERR.print(name)
        kept[name] = {"made": made, **row(model, calibration, data, folder, name)}
        write_text(path, json.dumps({"setup": told, "rows": list(kept.values())}, indent=1) + "\n")
    return [kept[name] for name in names if name in kept]


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    head = ["network", "top-1", "less float's, points (95 %)", "McNemar's p", "answers that differ", "CPU s to make"]
    lines = [head, ["---"] * len(head)]
    for one in found:
        beside = one["against"]
        low, high = beside["interval"]
        points = f"{100 * beside['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        share = f"{one['top1']:.2%}"
        cells = [points, f"{beside['mcnemar_p']:.2g}", f"{beside['flips']} of {one['images']}"]
        cells.append("" if one["cpu_seconds"] is None else str(one["cpu_seconds"]))
        lines.append([one["network"], share, *(cells if one["network"] != FLOAT else [""] * len(cells))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _fashion(folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """The depthwise network and its pictures, made where they are not there."""
    if not all((folder / name).exists() for name in FILES.values()):
        prepare(FOLDER, folder, 0, say, depthwise)
    return {key: str(folder / name) for key, name in FILES.items()}


def efficientnet(pictures: Path, folder: Path) -> dict[str, str]:
    """EfficientNet-Lite0 and labelled pictures, as `evaluate` takes them, as the files of `FILES`.

    Raises InputError when they are not labelled, or leave none to answer.
    """
    model, calibration, data = (folder / name for name in FILES.values())
    known = labelled_files(pictures)
    if known is None:
        expected = "a folder per class, a folder with labels.txt, or a list of 'FILE CLASS' lines"
        raise InputError("holds no labelled pictures", where=str(pictures), expected=expected)
    files = sorted(known)
    if len(files) <= PICTURES:
        expected, found = f"more than the {PICTURES} that calibrate", str(len(files))
        raise InputError("leaves no pictures to answer", where=str(pictures), expected=expected, found=found)
    if not model.exists():
        from .demo import export_network

        with TemporaryDirectory() as place:
            export_network(Path(place) / model.name)
            write_bytes(model, (Path(place) / model.name).read_bytes())
    chosen = [files[i * len(files) // PICTURES] for i in range(PICTURES)]
    for path, part in ((calibration, chosen), (data, sorted(set(files) - set(chosen)))):
        images = Calibration(part, load_float(model).inputs, PIXELS, known, str(pictures))
        (batch,) = images.batches(len(part))
        save_npz(path, {**batch.inputs, LABELS: np.asarray(batch.labels)})
    return {key: str(folder / name) for key, name in FILES.items()}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.low_bits", description=__doc__.splitlines()[0])
    pictures = "labelled pictures for EfficientNet-Lite0: a folder per class, one with labels.txt, or a list"
    parser.add_argument("--pictures", type=Path, help=pictures)
    parser.add_argument("--model", help="a float ONNX file with one input and labelled data of one's own")
    parser.add_argument("--calib", help="an .npz file with the input's pictures, to calibrate on")
    parser.add_argument("--data", help="an .npz file with other pictures, and labels")
    parser.add_argument("--folder", type=Path, default=Path(".low-bits"), help="where files and rows are kept")
    parser.add_argument("--networks", default=";".join(NETWORKS), help="separated by ; (default: all)")
    args = parser.parse_args()
    try:
        names = [name.strip() for name in args.networks.split(";")]
        for name in set(names) - set(NETWORKS):
            raise UsageError(
                "is no network of this table", where="--networks", expected="; ".join(NETWORKS), found=name
            )
        setup = {"model": args.model, "calib": args.calib, "data": args.data}
        if any(setup.values()) and not all(setup.values()):
            raise UsageError("go together", where="--model, --calib and --data", remedy="give all three, or none")
        if args.model and args.pictures:
            raise UsageError("has a network of its own", where="--pictures", remedy="leave out --model")
        check_folder(args.folder)
        args.folder.mkdir(exist_ok=True)
        if args.pictures:
            setup = efficientnet(args.pictures, args.folder)
        elif args.model is None:
            setup = _fashion(args.folder, ERR.print)
        print(markdown(rows(names, setup, args.folder)))
    except HawqError as e:
        print(f"low_bits: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
