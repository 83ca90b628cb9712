"""A figure on real data with a clean split: a small residual network trained on Fashion-MNIST here, then quantized after training.

    python -m hawq_tvm.quantize.fashion --seeds 0,1,2

The pictures are those of Debian's package dataset-fashion-mnist (MIT licence): 60,000 to train on, 10,000 to test on. Calibration uses training
pictures alone. Every quantized network runs in ONNX Runtime on all test pictures. Needs the extras `quantize` and `bench`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table as Grid
from torch import nn

from ..errors import HawqError, InputError
from ..files import check_output, write_text
from .evaluation import evaluate
from .quantizer import Recipe, post_training

Array = np.ndarray[Any, Any]
FOLDER = Path("/usr/share/datasets/fashion-mnist")
WIDTHS, EPOCHS, BATCH, RATE = (16, 32, 64), 3, 128, 0.2
CALIBRATION = 512
LEARNED = {"adaround": 500, "correct_bias": True, "images": 512, "batch": 64}
RECIPES: dict[str, Recipe] = {
    "W8A8": Recipe(8),
    "W4A8, nearest": Recipe("W4A8"),
    "W4A8, adaround": Recipe("W4A8", **LEARNED),  # type: ignore[arg-type]
    "W4A4, nearest": Recipe("W4A4"),
    "W4A4, adaround": Recipe("W4A4", **LEARNED),  # type: ignore[arg-type]
    "W4A4 with first and last, adaround": Recipe("W4A4", keep_ends=False, **LEARNED),  # type: ignore[arg-type]
}


def read(folder: Path, part: str) -> tuple[Array, Array]:
    """Pictures (number, 1, 28, 28) float32 with mean about 0, and classes; part: train or t10k.

    Raises InputError when the files are not there.
    """
    arrays = []
    for name, skip in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        try:
            arrays.append(np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=skip))
        except OSError as e:
            raise InputError("cannot be read", where=str(folder / name), found=str(e), remedy="apt-get install dataset-fashion-mnist") from e
    return ((arrays[0].reshape(-1, 1, 28, 28).astype(np.float32) - 73) / 90), arrays[1].astype(np.int64)


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

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


def train(images: Array, labels: Array, seed: int) -> Net:
    """A network after EPOCHS epochs of SGD with mirrored pictures."""
    torch.manual_seed(seed)
    net, x, y = Net(), torch.from_numpy(images), torch.from_numpy(labels)
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


def measure(folder: Path, seed: int, recipes: Sequence[str], say: Any) -> list[dict[str, Any]]:
    """Float and quantized networks of one seed on all test pictures: rows with top-1, flips against float, bytes of weights."""
    images, labels = read(folder, "train")
    tests, classes = read(folder, "t10k")
    start = time.perf_counter()
    net = train(images, labels, seed)
    say(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s")
    with tempfile.TemporaryDirectory() as place:
        real, data, calibration = (Path(place) / n for n in ("float.onnx", "test.npz", "calibration.npz"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter announces its own deprecation
            torch.onnx.export(net, (torch.zeros(1, 1, 28, 28),), str(real), opset_version=17, dynamo=False, input_names=["x"], output_names=["scores"], dynamic_axes={"x": {0: "n"}, "scores": {0: "n"}})
        np.savez(data, x=tests, labels=classes)
        np.savez(calibration, x=images[:CALIBRATION])
        found = evaluate(real, data)
        size = 4 * sum(p.numel() for p in net.parameters() if p.ndim > 1)
        rows = [{"seed": seed, "network": "float", "top1": (found.score.top1 or 0) / found.images, "flips": 0, "weight_bytes": size}]
        for name in recipes:
            quantized = post_training(real, calibration, RECIPES[name])
            path = Path(place) / "quantized.onnx"
            onnx.save(quantized.model, str(path))
            found = evaluate(path, data, against=real)
            rows.append({"seed": seed, "network": name, "top1": (found.score.top1 or 0) / found.images, "flips": found.flips or 0, "weight_bytes": quantized.notes["weight_bytes"]})
            say(f"seed {seed}: {name}: {rows[-1]['top1']:.2%}")
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The mean of all seeds, with the least and the greatest."""
    grid = Grid("network", "top-1", "range", "answers that flip, of 10,000", "bytes of weights")
    for name in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == name]
        top1, flips = [100 * r["top1"] for r in own], [r["flips"] for r in own]
        grid.add_row(name, f"{np.mean(top1):.2f} %", f"{min(top1):.2f} to {max(top1):.2f}", ", ".join(map(str, flips)), f"{own[0]['weight_bytes']:,}")
    Console(width=160, highlight=False).print(grid)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.quantize.fashion", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FOLDER, help=f"the folder of the four files (default: {FOLDER})")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        if args.output:
            check_output(args.output)
        for seed in args.seeds.split(","):
            rows += measure(args.data, int(seed), list(RECIPES), lambda text: print(text, file=sys.stderr, flush=True))
            if args.output:
                write_text(args.output, json.dumps(rows, indent=1) + "\n")
    except HawqError as e:
        print(f"fashion: {e}", file=sys.stderr)
        return e.exit_code
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
