"""The producers of the table: every tool that quantizes a float network, as its own documentation calls it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from hawq_tvm.core.files import save_npz, write_bytes
from hawq_tvm.quantize.ptq.quantizer import post_training

from .networks import BATCHES, Network

Array = np.ndarray[Any, Any]
# Operators of shapes and of choices, which ONNX Runtime's "all operators" leaves alone.
LEFT_ALONE = {"Constant", "Shape", "ConstantOfShape", "Range", "Equal", "Expand", "Cast", "NonMaxSuppression", "TopK"}


@dataclass(frozen=True)
class Producer:
    """A tool: `make` writes a network's quantized file from its float ONNX file, or from its module.

    package: the distribution whose version the table names.  ending: of the file.  reads: whether it reads ONNX.
    networks: those that it is run on; none for all.
    """

    make: Callable[[Network, Path, Path], None]
    package: str
    ending: str = "onnx"
    reads: bool = True
    networks: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version that is installed, "" where none is."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""


def _ours(net: Network, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, batches = Path(folder) / "data.npz", net.calibration()
        save_npz(data, {name: np.concatenate([b[name] for b in batches]) for name in batches[0]})
        write_bytes(target, post_training(source, data).model.SerializeToString())


def _onnxruntime(every: bool) -> Callable[[Network, Path, Path], None]:
    """quantize_static to QDQ, int8, weights per channel; every: all operators of the graph, not the tool's choice."""

    def make(net: Network, source: Path, target: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(net.calibration())

            def get_next(self) -> dict[str, Array] | None:
                return next(self.left, None)

        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            kinds = {n.op_type for n in onnx.load(prepared).graph.node} - LEFT_ALONE
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if net.transformer else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=sorted(kinds) if every else None,
            )

    return make


def _nncf(net: Network, source: Path, target: Path) -> None:
    import nncf

    nncf.set_log_level(logging.ERROR)
    kind = nncf.ModelType.TRANSFORMER if net.transformer else None
    data = nncf.Dataset(net.calibration())
    onnx.save(nncf.quantize(onnx.load(source), data, model_type=kind, subset_size=BATCHES), target)


def _pt2e(quantizer: Callable[[], Any]) -> Callable[[Network, Path, Path], None]:
    def make(net: Network, source: Path, target: Path) -> None:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        example = net.tensors(0)
        prepared = prepare_pt2e(torch.export.export(net.module(), example).module(), quantizer())
        for seed in range(BATCHES):
            prepared(*net.tensors(seed))
        torch.export.save(torch.export.export(convert_pt2e(prepared), example), target)

    return make


def _x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as module

    return module.X86InductorQuantizer().set_global(module.get_default_x86_inductor_quantization_config())


def _arm() -> Any:
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as module

    return module.ArmInductorQuantizer().set_global(module.get_default_arm_inductor_quantization_config())


def _xnnpack() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def _brevitas(qonnx: bool) -> Callable[[Network, Path, Path], None]:
    def make(net: Network, source: Path, target: Path) -> None:
        from brevitas.export import export_onnx_qcdq, export_qonnx
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.graph.quantize import preprocess_for_quantize, quantize

        example = net.tensors(0)
        module = quantize(preprocess_for_quantize(net.module()))
        with torch.no_grad(), calibration_mode(module):
            for seed in range(BATCHES):
                module(*net.tensors(seed))
        (export_qonnx if qonnx else export_onnx_qcdq)(
            module, args=example, export_path=str(target), opset_version=17, dynamo=False
        )

    return make


BREVITAS = ("unet", "efficientnet", "mobilenetv3", "quartznet")
PRODUCERS: dict[str, Producer] = {
    "hawq-tvm": Producer(_ours, "hawq-tvm"),
    "ort": Producer(_onnxruntime(False), "onnxruntime"),
    "ort-all": Producer(_onnxruntime(True), "onnxruntime"),
    "nncf": Producer(_nncf, "nncf"),
    "pt2e-x86": Producer(_pt2e(_x86), "torchao", "pt2", reads=False),
    "pt2e-arm": Producer(_pt2e(_arm), "torchao", "pt2", reads=False),
    "pt2e-xnnpack": Producer(_pt2e(_xnnpack), "torchao", "pt2", reads=False),
    "brevitas-qcdq": Producer(_brevitas(False), "brevitas", reads=False, networks=BREVITAS),
    "brevitas-qonnx": Producer(_brevitas(True), "brevitas", reads=False, networks=BREVITAS),
}


def quietly(work: Callable[[], None]) -> None:
    """Do something without the tools' warnings."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
