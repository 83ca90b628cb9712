"""What a float classifier's answers cost: the loss whose second derivatives tell what a change of weights does."""

from __future__ import annotations

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


class Loss:
    """The cross-entropy of a network's first output with the data's labels, or with its own answers without them."""

    def __init__(self, graph: FloatGraph, data: Calibration) -> None:
        self.graph, self.data = graph, data
        self.text = "cross-entropy with labels" if data.has_labels else "cross-entropy with the model's own argmax"
        producer = next((n for n in graph.nodes if graph.outputs[0] in n.outputs), None)
        self._scores = PROBABILITIES.get(producer.op, "softmax") if producer else "softmax"

    def scores(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The scores of a batch, (images, classes); options: of `FloatGraph.run`.

        Raises ModelError when the network is no classifier.
        """
        output = self.graph.run(batch.inputs, **options)[self.graph.outputs[0]]
        flat = output.flatten(1) if output.ndim == 4 and output.shape[2:] == (1, 1) else output
        if flat.ndim != 2 or len(flat) != batch.size:
            raise ModelError(
                "is no classifier's output",
                where=self.graph.outputs[0],
                expected=f"{batch.size} images x classes",
                found="x".join(map(str, output.shape)),
            )
        return flat

    def of(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The loss of every image of a batch; options: of `FloatGraph.run`.

        Raises ModelError when the network is no classifier, InputError for a label that it does not have.
        """
        scores = self.scores(batch, **options)
        classes = scores.shape[1]
        if batch.labels is not None and batch.labels.max() >= classes:
            raise InputError(
                "has a label that the model has no class for",
                where=self.data.where,
                expected=f"0 to {classes - 1}",
                found=str(batch.labels.max()),
            )
        target = torch.from_numpy(batch.labels) if batch.labels is not None else scores.detach().argmax(1)
        logs = {
            "softmax": lambda: F.log_softmax(scores, 1),
            "log": lambda: scores.clamp_min(1e-30).log(),
            "none": lambda: scores,
        }[self._scores]()
        return F.nll_loss(logs, target, reduction="none")
