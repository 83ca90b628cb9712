"""Quantized networks to test and measure with: pytorchcv's definitions, random weights, ONNX Runtime's quantizer.

    python -m hawq_tvm.bench.zoo resnet50 -o resnet50.onnx

The weights are random but the BatchNorm statistics are lively (random gamma and beta, running statistics from random
batches), so that quantization has something to look at. Needs the extras `torch` and `bench`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core import signals
from hawq_tvm.core.files import write_bytes

NETWORKS: dict[str, tuple[str, str, int]] = {
    "resnet18": ("resnet", "resnet18", 224),
    "resnet50": ("resnet", "resnet50b", 224),
    "mobilenetv2": ("mobilenetv2", "mobilenetv2b_w1", 224),
    "inceptionv3": ("inceptionv3", "inceptionv3", 299),
}

# Weights of a layer that `keep` thins out, and of one that it thins out four times as much.
LARGE, LARGEST = (
    1 << 13,
    1 << 18,
)


def build(name: str, size: int, seed: int = 0, keep: float = 1) -> Any:
    """A torch module of one of NETWORKS in evaluation mode, with random weights and lively statistics.

    keep: the part of the weights of every layer with LARGE of them that is not made zero; a quarter of it where
    there are LARGEST.
    """
    import importlib

    import torch

    torch.manual_seed(seed)
    module, function, _ = NETWORKS[name]
    net = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)(
        pretrained=False, in_size=(size, size)
    )
    if size != NETWORKS[name][2]:
        net.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)  # the definition's window fits its own image size only
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
            layer.momentum = 0.5
        elif keep < 1 and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and layer.weight.numel() >= LARGE:
            layer.weight.data *= torch.rand(layer.weight.shape) < (keep if layer.weight.numel() < LARGEST else keep / 4)
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(2, 3, size, size))
    return net.eval()


def export(net: Any, path: Path, batch: int, size: int, symbolic: bool = False) -> None:
    """A torch module as float ONNX (opset 17), input `input`, output `output`; symbolic: for any batch."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its own deprecation
        torch.onnx.export(
            net,
            (torch.randn(batch, 3, size, size),),
            str(path),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={n: {0: "batch"} for n in ("input", "output")} if symbolic else None,
        )


def quantize(
    source: Path,
    target: Path,
    batches: list[dict[str, np.ndarray[Any, Any]]],
    *,
    qoperator: bool = False,
    weight_bits: int = 8,
    activation_bits: int = 8,
    **options: Any,
) -> None:
    """Static quantization as a user of ONNX Runtime does it: per channel, unsigned activations, signed weights, of 4
    or 8 bits.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=QuantFormat.QOperator if qoperator else QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt4 if activation_bits == 4 else QuantType.QUInt8,
            weight_type=QuantType.QInt4 if weight_bits == 4 else QuantType.QInt8,
            **options,
        )


def calibration(batch: int, size: int) -> list[np.ndarray[Any, Any]]:
    """The inputs that a network's ranges are measured on: float32 [batch, 3, size, size], normal, mean 0, deviation
    1.
    """
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, 3, size, size)).astype(np.float32) for _ in range(4)]


def make(
    name: str,
    path: Path,
    *,
    size: int | None = None,
    batch: int = 1,
    qoperator: bool = False,
    weight_bits: int = 8,
    activation_bits: int = 8,
    keep: float = 1,
    symbolic: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the quantized ONNX file of a network, complete or not at all; an existing file is kept.

    keep: see `build`.  symbolic: for any batch; its ranges are measured with `batch`.
    """
    if path.exists():
        return path
    size = size or NETWORKS[name][2]
    with tempfile.TemporaryDirectory() as folder:
        say(f"building {name}")
        exported, quantized = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        export(build(name, size, keep=keep), exported, batch, size, symbolic)
        say("calibrating and quantizing")
        quantize(
            exported,
            quantized,
            [{"input": b} for b in calibration(batch, size)],
            qoperator=qoperator,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, quantized.read_bytes())
    return path


def main() -> int:
    """The command: write one network."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.bench.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=None, help="image size (default: the network's own)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--float", action="store_true", help="the float network, not quantized")
    parser.add_argument(
        "--qoperator", action="store_true", help="QLinear operators instead of quantize/dequantize pairs"
    )
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--activation-bits", type=int, choices=(4, 8), default=8)
    args = parser.parse_args()
    if args.float:
        if args.qoperator or (args.weight_bits, args.activation_bits) != (8, 8):
            parser.error("--float writes no quantized network, so it goes with none of its options")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        size = args.size or NETWORKS[args.network][2]
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "float.onnx"
            export(build(args.network, size), exported, args.batch, size)
            write_bytes(args.output, exported.read_bytes())
        return 0
    make(
        args.network,
        args.output,
        size=args.size,
        batch=args.batch,
        qoperator=args.qoperator,
        weight_bits=args.weight_bits,
        activation_bits=args.activation_bits,
        say=lambda text: print(text, file=sys.stderr),
    )
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
