"""A figure on real data with a clean split: a small residual network trained on Fashion-MNIST here, then quantized
after training, and fine-tuned.

    python -m hawq_tvm.studies.fashion --seeds 0,1,2

The pictures are those of Debian's package dataset-fashion-mnist (MIT licence): 60,000 to train on, 10,000 to test
on. Calibration and fine-tuning use training pictures alone. Every quantized network is compiled, and its package
answers all test pictures; the float network runs in ONNX Runtime. Needs the extras `quantize` and `bench`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, InputError
from hawq_tvm.core.files import check_output, write_text
from hawq_tvm.package.package import compile as compile_package
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.ptq.quantizer import Quantized, post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.qat.training import Training, finetune

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
FOLDER = Path("/usr/share/datasets/fashion-mnist")
WIDTHS, EPOCHS, BATCH, RATE = (16, 32, 64), 3, 128, 0.2
CALIBRATION = 512
LEARNED = {"images": 512, "batch": 64}
RECIPES: dict[str, Recipe] = {
    "W8A8": Recipe(8),
    "W4A8, nearest": Recipe("W4A8", rounding="nearest"),
    "W4A8, learned": Recipe("W4A8", **LEARNED),  # type: ignore[arg-type]
    "W4A4, nearest": Recipe("W4A4", rounding="nearest"),
    "W4A4, learned": Recipe("W4A4", **LEARNED),  # type: ignore[arg-type]
    "W4A4 with first and last, learned": Recipe("W4A4", keep_ends=False, **LEARNED),  # type: ignore[arg-type]
}
# Fine-tuned from nearest rounding on the first FINETUNE_IMAGES training pictures and their labels, a tenth of them held
# out to choose the epoch by.
FINETUNE_IMAGES, TRAINING = 20_000, Training(epochs=1, device="cpu")
FINETUNED: dict[str, Recipe] = {
    "W4A8, fine-tuned": Recipe("W4A8"),
    "W4A4, fine-tuned": Recipe("W4A4"),
    "W4A4 with first and last, fine-tuned": Recipe("W4A4", keep_ends=False),
}
PACKAGE_BATCH = 200


def read(folder: Path, part: str) -> tuple[Array, Array]:
    """Pictures (number, 1, 28, 28) float32 with mean about 0, and classes; part: train or t10k.

    Raises InputError when the files are not there.
    """
    arrays = []
    for name, skip in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        try:
            arrays.append(np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=skip))
        except OSError as e:
            raise InputError(
                "cannot be read", where=str(folder / name), found=str(e), remedy="apt-get install dataset-fashion-mnist"
            ) from e
    return ((arrays[0].reshape(-1, 1, 28, 28).astype(np.float32) - 73) / 90), arrays[1].astype(np.int64)


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class Net(nn.Module):
    """A stem of stride 2, three stages of one block each, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.stem, self.norm = nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a)
        self.stages = nn.Sequential(Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
        self.classifier = nn.Linear(c, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.stages(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def train(images: Array, labels: Array, seed: int, make: Callable[[], nn.Module] = Net) -> nn.Module:
    """A network after EPOCHS epochs of SGD with mirrored pictures."""
    torch.manual_seed(seed)
    net, x, y = make(), torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            batch = x[chosen]
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)
            loss = F.cross_entropy(net(batch), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@dataclass(frozen=True)
class Files:
    """A trained float network and its data: float is the ONNX file, calibration and finetune are training pictures,
    test is for counting.
    """

    seed: int
    place: Path
    float: Path
    calibration: Path
    finetune: Path
    test: Path
    weight_bytes: int


def prepare(folder: Path, place: Path, seed: int, say: Say, make: Callable[[], nn.Module] = Net) -> Files:
    """Train a network and write everything that is measured with into `place`."""
    images, labels = read(folder, "train")
    tests, classes = read(folder, "t10k")
    start = time.perf_counter()
    net = train(images, labels, seed, make)
    say(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s")
    real, calibration, tuning, data = (place / n for n in ("float.onnx", "calibration.npz", "finetune.npz", "test.npz"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its own deprecation
        torch.onnx.export(
            net,
            (torch.zeros(1, 1, 28, 28),),
            str(real),
            opset_version=17,
            dynamo=False,
            input_names=["x"],
            output_names=["scores"],
            dynamic_axes={"x": {0: "n"}, "scores": {0: "n"}},
        )
    np.savez(calibration, x=images[:CALIBRATION], labels=labels[:CALIBRATION])
    np.savez(tuning, x=images[:FINETUNE_IMAGES], labels=labels[:FINETUNE_IMAGES])
    np.savez(data, x=tests, labels=classes)
    return Files(
        seed, place, real, calibration, tuning, data, 4 * sum(p.numel() for p in net.parameters() if p.ndim > 1)
    )


def row(files: Files, name: str, quantized: Quantized | None, say: Say) -> dict[str, Any]:
    """What a network does on all test pictures: top-1, answers other than the float network's, bytes of weights;
    quantized: None for the float one.
    """
    if quantized is None:
        found = evaluate(files.float, files.test)
    else:
        package = files.place / f"{len(list(files.place.glob('*.hawq')))}.hawq"
        compile_package(quantized.model, shapes={"x": (PACKAGE_BATCH, 1, 28, 28)}).save(package)
        found = evaluate(package, files.test, against=files.float)
    size = files.weight_bytes if quantized is None else quantized.notes["weight_bytes"]
    made = {
        "seed": files.seed,
        "network": name,
        "top1": (found.score.top1 or 0) / found.images,
        "flips": found.flips or 0,
        "weight_bytes": size,
    }
    say(f"seed {files.seed}: {name}: {made['top1']:.2%}, {made['flips']} flips")
    return made


def tuned(files: Files, recipe: Recipe) -> Quantized:
    """A network fine-tuned as TRAINING says."""
    return finetune(files.float, files.finetune, recipe, TRAINING, calibration=files.calibration)


def measure(folder: Path, seed: int, recipes: Sequence[str], say: Say) -> list[dict[str, Any]]:
    """Float and quantized networks of one seed; recipes: keys of RECIPES and FINETUNED."""
    with tempfile.TemporaryDirectory() as place:
        files = prepare(folder, Path(place), seed, say)
        rows = [row(files, "float", None, say)]
        for name in recipes:
            made = (
                tuned(files, FINETUNED[name])
                if name in FINETUNED
                else post_training(files.float, files.calibration, RECIPES[name])
            )
            rows.append(row(files, name, made, say))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The mean of all seeds, with the least and the greatest."""
    grid = Grid("network", "top-1", "range", "answers that flip, of 10,000", "bytes of weights")
    for name in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == name]
        top1, flips = [100 * r["top1"] for r in own], [r["flips"] for r in own]
        grid.add_row(
            name,
            f"{np.mean(top1):.2f} %",
            f"{min(top1):.2f} to {max(top1):.2f}",
            ", ".join(map(str, flips)),
            f"{own[0]['weight_bytes']:,}",
        )
    OUT.print(grid)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.fashion", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="the quantized networks whose names hold this text, such as 'W4A4, ' (default: all)",
    )
    return run(
        parser,
        show,
        lambda args, seed, say: measure(args.data, seed, [n for n in (*RECIPES, *FINETUNED) if args.only in n], say),
    )


def run(
    parser: argparse.ArgumentParser,
    show: Callable[[Sequence[dict[str, Any]]], None],
    measure: Callable[[argparse.Namespace, int, Say], list[dict[str, Any]]],
) -> int:
    """Measure every seed that the command line asks for, keep the rows after each, and show them; returns an exit
    code.
    """
    parser.add_argument("--data", type=Path, default=FOLDER, help=f"the folder of the four files (default: {FOLDER})")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        if args.output:
            check_output(args.output)
        for seed in args.seeds.split(","):
            rows += measure(args, int(seed), lambda text: print(text, file=sys.stderr, flush=True))
            if args.output:
                write_text(args.output, json.dumps(rows, indent=1) + "\n")
    except HawqError as e:
        print(f"{parser.prog.rpartition('.')[2]}: {e}", file=sys.stderr)
        return e.exit_code
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
