"""What a float classifier's answers cost: the loss whose second derivatives tell what a change of weights does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hawq_tvm.core.errors import InputError, ModelError
from hawq_tvm.quantize.network.data import Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph

PROBABILITIES = {
    "Softmax": "log",
    "LogSoftmax": "none",
    "aten.softmax.int": "log",
    "aten._softmax.default": "log",
    "aten.log_softmax.int": "none",
    "aten._log_softmax.default": "none",
}


def class_scores(output: torch.Tensor, size: int) -> torch.Tensor | None:
    """What an output of a batch of that size says of each class, (images, classes): numbers in a second dimension, two
    or more, of one alone would have every answer right. None where it holds no such scores.
    """
    if output.ndim < 2 or len(output) != size or not output.is_floating_point():
        return None
    return output.flatten(1) if output.shape[1] > 1 and output[0].numel() == output.shape[1] else None


class Loss:
    """The cross-entropy of a network's first output with the data's labels, or with its own answers without them."""

    def __init__(self, graph: FloatGraph, data: Calibration) -> None:
        self.graph, self.data = graph, data
        self.text = "cross-entropy with labels" if data.has_labels else "cross-entropy with the model's own argmax"
        producer = next((n for n in graph.nodes if graph.outputs[0] in n.outputs), None)
        self._scores = PROBABILITIES.get(producer.op, "softmax") if producer else "softmax"

    def classes(self, outputs: Mapping[str, torch.Tensor], size: int) -> torch.Tensor | None:
        """The scores of a classifier, (images, classes); None where the outputs of a batch of that size are none."""
        return class_scores(outputs[self.graph.outputs[0]], size)

    def logarithms(self, scores: torch.Tensor) -> torch.Tensor:
        """The logarithms of the classes' probabilities."""
        if self._scores == "log":
            return scores.clamp_min(1e-30).log()
        return scores if self._scores == "none" else F.log_softmax(scores, 1)

    def scores(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The scores of a batch, (images, classes); options: of `FloatGraph.run`.

        Raises ModelError when the network is no classifier.
        """
        outputs = self.graph.run(batch.inputs, **options)
        flat = self.classes(outputs, batch.size)
        if flat is None:
            raise ModelError(
                "is no classifier's output",
                where=self.graph.outputs[0],
                expected=f"{batch.size} images x classes, two or more",
                found="x".join(map(str, outputs[self.graph.outputs[0]].shape)),
            )
        return flat

    def of(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The loss of every image of a batch; options: of `FloatGraph.run`.

        Raises ModelError when the network is no classifier, InputError for a label that it does not have.
        """
        scores = self.scores(batch, **options)
        self.check(batch, scores)
        target = torch.from_numpy(batch.labels) if batch.labels is not None else scores.detach().argmax(1)
        return F.nll_loss(self.logarithms(scores), target, reduction="none")

    def check(self, batch: Batch, scores: torch.Tensor) -> None:
        """Raise InputError for a label that the model has no class for."""
        if batch.labels is not None and batch.labels.max() >= scores.shape[1]:
            raise InputError(
                "has a label that the model has no class for",
                where=self.data.where,
                expected=f"0 to {scores.shape[1] - 1}",
                found=str(batch.labels.max()),
            )
