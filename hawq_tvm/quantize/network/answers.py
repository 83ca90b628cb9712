"""What a network says of an image: scores of classes, or other numbers, such as an embedding or a pose.

Scores are compared by the Kullback-Leibler distance of what they say and by which class is first; other numbers by
their squared change.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hawq_tvm.core.errors import ModelError

if TYPE_CHECKING:
    import torch

# Operators by what ONNX, ATen and Relax call them.
SOFTMAX = frozenset({"softmax", "_softmax", "softmax_wide", "i_softmax"})
LOG_SOFTMAX = frozenset({"logsoftmax", "log_softmax", "_log_softmax"})
SUMS = frozenset({"gemm", "matmul", "linear", "addmm", "mm", "einsum", "conv", "conv1d", "conv2d", "conv3d"})
SUMS |= frozenset({"convolution", "convtranspose"})
MOVED = frozenset({"flatten", "reshape", "view", "squeeze", "unsqueeze", "expand_dims", "transpose", "permute"})
MOVED |= frozenset({"permute_dims", "t", "identity", "clone", "alias", "contiguous", "dropout", "getitem", "cast"})
MOVED |= frozenset({"astype", "_to_copy", "slice", "strided_slice", "select", "gather", "take", "split"})
MOVED |= frozenset({"quantizelinear", "dequantizelinear", "quantize", "dequantize", "requantize"})
# With one operand that is not constant these keep sums sums of other weights.
SCALED = frozenset({"add", "sub", "subtract", "mul", "multiply", "div", "divide", "batchnormalization", "batch_norm"})
SCALED |= frozenset({"_native_batch_norm_legit_no_training", "averagepool", "globalaveragepool", "reducemean", "mean"})
SCALED |= frozenset({"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "sum_pool2d", "sum"})
# Of a class, where probabilities are rounded to so much.
LEAST = 1e-30


class Operation(Protocol):
    """A node of any graph; operands that are left out are called ""."""

    @property
    def op(self) -> str: ...
    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def outputs(self) -> Sequence[str]: ...


class End(enum.Enum):
    """What a network's output is computed by."""

    SOFTMAX = "a softmax"
    LOG_SOFTMAX = "the logarithm of a softmax"
    SUMS = "the sums of a layer with weights, moved, scaled or averaged"
    OTHER = "anything else"


def end_of(nodes: Iterable[Operation], constants: Collection[str], output: str) -> End:
    """What computes an output; constants: the tensors that do not hang on an input."""
    known, makers, scaled, logarithm = set(constants) | {""}, dict[str, Operation](), False, False
    for node in nodes:
        makers.update((name, node) for name in node.outputs)
        if known.issuperset(node.inputs):
            known.update(node.outputs)
    name = output
    while name in makers:
        node = makers[name]
        kind, varying = _name(node.op), [n for n in node.inputs if n not in known]
        if kind in LOG_SOFTMAX or kind in SOFTMAX:
            return End.OTHER if scaled else End.LOG_SOFTMAX if logarithm or kind in LOG_SOFTMAX else End.SOFTMAX
        if len(varying) != 1 or (logarithm and kind not in MOVED):
            return End.OTHER
        if kind in SUMS:
            return End.SUMS
        if kind not in MOVED and kind not in SCALED and kind != "log":
            return End.OTHER
        scaled, logarithm, name = scaled or kind in SCALED, logarithm or kind == "log", varying[0]
    return End.OTHER


def _name(op: str) -> str:
    parts = op.lower().split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else parts[-1]


@dataclass(frozen=True)
class Answers:
    """What a network's first output holds.

    classes: a score for each class.  by: what told so: "asked", "labels", "softmax", "sums", "end" or "shape".
    probabilities: the scores are a softmax's, and not logarithms.
    """

    classes: bool
    by: str
    probabilities: bool = False

    @property
    def kind(self) -> str:
        """In a word."""
        return "classes" if self.classes else "numbers"

    @property
    def hint(self) -> str:
        """What was taken for granted, and the option that says otherwise; empty where something told it."""
        if self.by == "sums":
            return (
                "a last layer's sums are taken for scores of classes: --no-classes if they are other numbers, such as"
                " an embedding"
            )
        if self.by == "end":
            return (
                "the outputs are taken for numbers, as no labels, no softmax and no last layer's sums say that they are"
                " scores of classes: --classes if they are"
            )
        return ""

    def logarithms(self, scores: torch.Tensor, least: float = LEAST) -> torch.Tensor:
        """The logarithms of the classes' probabilities, of scores (images, classes); no probability is below `least`.

        A softmax of logarithms of probabilities is these probabilities.
        """
        return (scores.clamp_min(least).log() if self.probabilities else scores).log_softmax(1)


def answers_of(
    output: str,
    shape: Sequence[int],
    size: int,
    end: End,
    *,
    floating: bool = True,
    labelled: bool = False,
    asked: bool | None = None,
) -> Answers:
    """What a network's first output is, of this shape for `size` images, by the first of these that tells it: what was
    asked for, labels, a softmax at its end; a layer's sums are scores, too, and anything else is numbers.

    Only (images, two or more numbers) can be scores: of one class alone every answer would be right.
    Raises ModelError where they are asked for and cannot be.
    """
    possible = floating and len(shape) > 1 and shape[0] == size and math.prod(shape[1:]) == shape[1] > 1
    probabilities = end is End.SOFTMAX
    if not possible:
        if asked:
            raise no_classifier(output, shape, size)
        return Answers(False, "shape")
    if asked is not None:
        return Answers(asked, "asked", asked and probabilities)
    if labelled:
        return Answers(True, "labels", probabilities)
    if end in (End.SOFTMAX, End.LOG_SOFTMAX):
        return Answers(True, "softmax", probabilities)
    return Answers(end is End.SUMS, "sums" if end is End.SUMS else "end")


def no_classifier(output: str, shape: Sequence[int], size: int) -> ModelError:
    """The error about an output that holds no scores of classes."""
    return ModelError(
        "is no classifier's output",
        where=output,
        expected=f"{size} images x classes, two or more",
        found="x".join(map(str, shape)) or "one number",
        remedy="end the model at its scores (onnx.utils.extract_model), and give what is made of that",
    )
