"""The networks of the table: how each is built, what it reads, and its float ONNX file from PyTorch's exporters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from . import sequences, vision

Array = np.ndarray[Any, Any]
BATCHES = 8
OPSETS = {"script": 17, "dynamo": 20}


@dataclass(frozen=True)
class Network:
    """A network: its module, the shapes of its float inputs (or `draw` for others), and what kind it is.

    transformer: what NNCF is told.  behind: adds to the exported ONNX graph what PyTorch cannot export.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    draw: Callable[[np.random.Generator], tuple[Array, ...]] | None = None
    transformer: bool = False
    behind: Callable[[onnx.ModelProto], None] | None = None

    def inputs(self, seed: int) -> dict[str, Array]:
        """One batch by input names."""
        rng = np.random.default_rng(seed)
        if self.draw is not None:
            return {f"x{i}": a for i, a in enumerate(self.draw(rng))}
        return {"x0": rng.standard_normal(self.shape).astype(np.float32)}

    def calibration(self) -> list[dict[str, Array]]:
        """The batches that every producer measures on."""
        return [self.inputs(seed) for seed in range(BATCHES)]

    def tensors(self, seed: int) -> tuple[torch.Tensor, ...]:
        """One batch for PyTorch."""
        return tuple(torch.from_numpy(a) for a in self.inputs(seed).values())

    def module(self) -> nn.Module:
        """The module in evaluation mode, its weights those of seed 0 and its statistics those of its own data."""
        torch.manual_seed(0)
        net = self.build()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                nn.init.uniform_(layer.weight, 0.6, 1.4)
                nn.init.uniform_(layer.bias, -0.3, 0.3)
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.momentum = None  # the mean of all batches
        net.train()
        with torch.no_grad():
            for seed in range(4 * BATCHES):
                net(*self.tensors(seed))
        return net.eval()

    def export(self, exporter: str, path: Path) -> None:
        """Write the float network as ONNX, by PyTorch's TorchScript exporter (`script`) or torch.export (`dynamo`)."""
        example = self.tensors(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self.module(),
                example,
                str(path),
                input_names=[f"x{i}" for i in range(len(example))],
                opset_version=OPSETS[exporter],
                dynamo=exporter == "dynamo",
                external_data=False,
                verbose=False if exporter == "dynamo" else None,
            )
        model = onnx.load(path)
        if self.behind is not None:
            self.behind(model)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _suppress(model: onnx.ModelProto) -> None:
    """Behind an SSD's boxes and probabilities: the ten best boxes by TopK, and what NonMaxSuppression keeps."""
    graph = model.graph
    boxes, scores = (o.name for o in graph.output)
    for name, values in (("limit", [10]), ("overlap", [0.5]), ("least", [0.3]), ("ten", [10]), ("flat", [-1])):
        floats = isinstance(values[0], float)
        kind = TensorProto.FLOAT if floats else TensorProto.INT64
        graph.initializer.append(helper.make_tensor(f"nms_{name}", kind, [1], values))
    graph.initializer.append(helper.make_tensor("nms_last", TensorProto.INT64, [1], [2]))
    graph.node.extend(
        [
            helper.make_node("Transpose", [scores], ["nms_scores"], "nms_turn", perm=[0, 2, 1]),
            helper.make_node(
                "NonMaxSuppression",
                [boxes, "nms_scores", "nms_limit", "nms_overlap", "nms_least"],
                ["selected"],
                "nms_select",
            ),
            helper.make_node("ReduceMax", [scores], ["nms_best"], "nms_reduce", axes=[2], keepdims=0)
            if model.opset_import[0].version < 18
            else helper.make_node("ReduceMax", [scores, "nms_last"], ["nms_best"], "nms_reduce", keepdims=0),
            helper.make_node("TopK", ["nms_best", "nms_ten"], ["best", "places"], "nms_top"),
            helper.make_node("Reshape", ["places", "nms_flat"], ["nms_places"], "nms_flatten"),
            helper.make_node("Gather", [boxes, "nms_places"], ["best_boxes"], "nms_choose", axis=1),
        ]
    )
    del graph.output[:]
    shapes: dict[str, tuple[int | str, ...]] = {"best": (1, 10), "best_boxes": (1, 10, 4), "selected": ("n", 3)}
    for name, shape in shapes.items():
        kind = TensorProto.INT64 if name == "selected" else TensorProto.FLOAT
        graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def _words(rng: np.random.Generator) -> tuple[Array, ...]:
    """Word numbers of a sentence of random length, and its mask."""
    mask = np.zeros((1, sequences.Bert.LENGTH), np.int64)
    mask[:, : rng.integers(8, sequences.Bert.LENGTH)] = 1
    return rng.integers(0, sequences.Bert.WORDS, mask.shape), mask


NETWORKS: dict[str, Network] = {
    "yolo": Network(vision.Yolo, (1, 3, 64, 64)),
    "ssd": Network(vision.SSD, (1, 3, 64, 64), behind=_suppress),
    "unet": Network(vision.UNet, (1, 3, 32, 32)),
    "deeplab": Network(vision.DeepLab, (1, 3, 48, 48)),
    "efficientnet": Network(lambda: vision.Mobile(nn.SiLU, nn.Sigmoid), (1, 3, 48, 48)),
    "mobilenetv3": Network(lambda: vision.Mobile(nn.Hardswish, nn.Hardsigmoid), (1, 3, 48, 48)),
    "quartznet": Network(sequences.QuartzNet, (1, 32, 64)),
    "bert-body": Network(sequences.BertBody, (1, 16, 64), transformer=True),
    "bert": Network(sequences.Bert, draw=_words, transformer=True),
    "vit": Network(sequences.ViT, (1, 3, 32, 32), transformer=True),
    "gpt": Network(sequences.GPT, (1, 16, 64), transformer=True),
    "conformer": Network(lambda: sequences.Conformer(True), (1, 16, 48), transformer=True),
    "conformer-plain": Network(lambda: sequences.Conformer(False), (1, 16, 48), transformer=True),
}
