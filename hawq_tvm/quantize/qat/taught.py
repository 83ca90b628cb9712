"""What a network is taught with: images in memory, and what the float network says of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.answers import Answers, answers_of, end_of
from hawq_tvm.quantize.network.data import Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .straight import Tensor

# Integers of 24 bits hold no smaller probability: what a softmax rounds to 0 is this, in the float network too.
LEAST = 2.0**-24


@dataclass(frozen=True)
class Images:
    """Inputs by name and labels, held in memory as tensors; teacher: the float network's answers, a row for each, of a
    classifier as logarithms of probabilities or what differs from these by a number for each image.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    teacher: Tensor
    answers: Answers

    @property
    def classes(self) -> bool:
        """Whether answers are scores of classes, and not other numbers."""
        return self.answers.classes

    @property
    def count(self) -> int:
        """How many."""
        return len(self.teacher)

    def chosen(self, at: Tensor) -> Images:
        """Some of them."""
        return Images(
            {n: v[at] for n, v in self.inputs.items()},
            None if self.labels is None else self.labels[at],
            self.teacher[at],
            self.answers,
        )

    def batches(self, order: Tensor, size: int, fixed: bool) -> Iterator[Images]:
        """In the order given; fixed: the model takes no smaller batch, so that the rest is left out."""
        for at in order.split(size):
            if len(at) == size or not fixed:
                yield self.chosen(at)


def held(
    data: Calibration,
    graph: FloatGraph,
    size: int,
    device: torch.device,
    tell: Progress,
    asked: bool | None = None,
) -> Images:
    """All images, and what the float network says of each; size: images at a time where the model leaves that open;
    asked: whether it says scores of classes, None for what it looks like.

    Raises InputError for labels that it does not have, and where it says something that is no finite number, ModelError
    where classes are asked for and it has none.
    """
    parts, labels, scores, done = list[dict[str, Tensor]](), list[Tensor](), list[Tensor](), 0
    end, answers = end_of(graph.nodes, graph.parameters, graph.outputs[0]), list[Answers]()
    shape = tuple[int, ...]()
    constants = {n: v.to(device) for n, v in graph.parameters.items() if v.is_floating_point()}
    for batch in data.batches(graph.batch or size, graph.batch is not None):
        inputs = {n: torch.as_tensor(v, device=device) for n, v in batch.inputs.items()}
        with torch.no_grad():
            found = graph.run(inputs, parameters=constants)[graph.outputs[0]]
        if not bool(found.isfinite().all()):
            raise InputError(
                "an answer of the float network is infinite or NaN",
                where=f"{data.where}, images {done} to {done + batch.size - 1}",
                expected="answers that can be learned",
                remedy="leave such images out, or mend the network",
            )
        shape, floating = tuple(found.shape[1:]), found.is_floating_point()
        if not answers:
            about = (graph.outputs[0], found.shape, batch.size, end)
            answers = [answers_of(*about, floating=floating, labelled=data.has_labels, asked=asked)]
        scores.append(scored(rows(found), answers[0]))
        parts.append(inputs)
        labels += [torch.as_tensor(batch.labels, device=device)] if batch.labels is not None else []
        done += batch.size
        tell(Step("answers of the float network", done, data.count))
    made = Images(
        {n: torch.cat([p[n] for p in parts]) for n in parts[0]},
        torch.cat(labels) if labels and asked is not False else None,
        torch.cat(scores),
        answers[0],
    )
    if made.labels is not None and not made.classes:
        raise InputError(
            "holds labels, and the model gives no scores of classes",
            where=data.where,
            expected="data without labels",
            found=f"answers of {'x'.join(map(str, shape))} numbers"
            if math.prod(shape) > 1
            else "answers of one number",
            remedy="leave the labels out",
        )
    count = made.teacher.shape[1]
    if made.labels is not None and int(made.labels.max()) >= count:
        raise InputError(
            "holds a class that the model does not have",
            where=data.where,
            expected=f"0 to {count - 1}",
            found=str(int(made.labels.max())),
        )
    return made


def rows(output: Tensor) -> Tensor:
    return output.reshape(len(output), -1)


def scored(output: Tensor, answers: Answers) -> Tensor:
    """Answers, rows of numbers, as they are compared: of probabilities their logarithms."""
    return answers.logarithms(output, LEAST) if answers.probabilities else output
