"""What a change of a float network's answers costs: the loss whose second derivatives tell what a change of weights
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hawq_tvm.core.errors import InputError, ModelError
from hawq_tvm.quantize.network.answers import answers_of, end_of, no_classifier
from hawq_tvm.quantize.network.data import Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .sizes import check_outputs

DISTANCE = "Kullback-Leibler distance to the float network's answers"
CHANGE = "squared change of the outputs, by their mean squares"


class Loss:
    """Of a classifier, the cross-entropy of its first output with the data's labels, or with its own answers without
    them; of other outputs half of their squared change, by their mean squares.

    asked: whether the first output is a classifier's, None for what it looks like (`answers.py`).  units: the roots of
    the outputs' mean squares, by name; to be set before changes are computed.
    Raises ModelError where a classifier is asked for that it cannot be, and for outputs that are all integers.
    """

    def __init__(self, graph: FloatGraph, data: Calibration, asked: bool | None = None) -> None:
        self.graph, self.data = graph, data
        self.units: Mapping[str, float] = {}
        first, name = next(data.batches(graph.batch or 1, graph.batch is not None)), graph.outputs[0]
        with torch.no_grad():
            outputs = graph.run(first.inputs)
        check_outputs(graph, outputs)
        self.counted, output = [n for n in graph.outputs if outputs[n].is_floating_point()], outputs[name]
        self.answers = answers_of(
            name,
            output.shape,
            first.size,
            end_of(graph.nodes, graph.parameters, name),
            floating=output.is_floating_point(),
            labelled=data.has_labels,
            asked=asked,
        )

    @property
    def text(self) -> str:
        """What derivatives are those of."""
        if not self.answers.classes:
            return CHANGE
        return "cross-entropy with labels" if self.data.has_labels else "cross-entropy with the model's own argmax"

    def weigh(self, squares: Mapping[str, float]) -> None:
        """Set the units by the outputs' mean squares on all data, where they count.

        Raises ModelError for outputs that are 0 throughout, or infinite.
        """
        self.units = {} if self.answers.classes else {name: math.sqrt(squares[name]) for name in self.counted}
        for name, unit in self.units.items():
            if not 0 < unit < math.inf:
                raise ModelError(
                    "is an output that rounding errors cannot be measured by",
                    where=name,
                    expected="finite numbers that are not all 0 on the calibration data",
                    found=f"a root of the mean square of {unit:g}",
                    remedy="give data that it answers, or leave the output out of the model",
                )

    def changed(
        self, found: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], size: int
    ) -> torch.Tensor:
        """How far the outputs of a batch of that size are from others, in units (images, numbers), float64."""
        parts = [((found[n].double() - outputs[n].double()) / unit).reshape(size, -1) for n, unit in self.units.items()]
        return torch.cat(parts, 1)

    def scores(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The scores of a batch, (images, classes); options: of `FloatGraph.run`.

        Raises ModelError when the network is no classifier.
        """
        output = self.graph.run(batch.inputs, **options)[self.graph.outputs[0]]
        if not self.answers.classes:
            raise no_classifier(self.graph.outputs[0], output.shape, batch.size)
        return output.flatten(1)

    def of(self, batch: Batch, **options: Any) -> torch.Tensor:
        """The loss of every image of a batch; options: of `FloatGraph.run`.

        Of outputs that are no classes it is 0, and so is its slope.

        Raises InputError for a label that the network does not have.
        """
        if not self.answers.classes:
            outputs = self.graph.run(batch.inputs, **options)
            still = {name: value.detach() for name, value in outputs.items()}
            return self.changed(outputs, still, batch.size).square().sum(1) / 2
        scores = self.scores(batch, **options)
        self.check(batch, scores)
        target = torch.from_numpy(batch.labels) if batch.labels is not None else scores.detach().argmax(1)
        return F.nll_loss(self.answers.logarithms(scores), target, reduction="none")

    def check(self, batch: Batch, scores: torch.Tensor) -> None:
        """Raise InputError for a label that the model has no class for."""
        if batch.labels is not None and batch.labels.max() >= scores.shape[1]:
            raise InputError(
                "has a label that the model has no class for",
                where=self.data.where,
                expected=f"0 to {scores.shape[1] - 1}",
                found=str(batch.labels.max()),
            )
