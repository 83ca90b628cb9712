"""The errors a user can meet: each says where, what was expected, what was found, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .printable import printable

LONGEST = 800  # of a part of a sentence


def _short(text: str) -> str:
    """A text that may hold names of any length, its middle left out."""
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]}"


class HawqError(Exception):
    """Base of every error this project raises on purpose; the command line prints it without a traceback.

    where: the layer, file or option in the user's own terms.  expected, found: the two facts that
    disagree.  remedy: what the user can do about it.  Any field may be empty.
    exit_code: 1 a check failed, 2 what the user asked for or gave is wrong, 3 a model or package is not supported or
    not readable, 4 another machine cannot be reached, was lost, or does not suit.
    """

    exit_code = 3

    def __init__(self, message: str, *, where: str = "", expected: str = "", found: str = "", remedy: str = "") -> None:
        self.message, self.where = message, where
        self.expected, self.found, self.remedy = expected, found, remedy
        parts = [f"{_short(where)}: {message}" if where else message]
        parts += [f"expected {expected}"] if expected else []
        parts += [f"found {found}"] if found else []
        parts += [f"remedy: {remedy}"] if remedy else []
        super().__init__("; ".join(map(_short, parts)))

    def __str__(self) -> str:
        return self.sentence

    @property
    def sentence(self) -> str:
        """What is wrong here, without what is wrong elsewhere."""
        return printable(str(self.args[0]))

    def to_dict(self) -> dict[str, str]:
        """The error as JSON-ready fields."""
        fields = ("message", "where", "expected", "found", "remedy")
        return {"error": type(self).__name__, **{f: getattr(self, f) for f in fields}}


class ModelError(HawqError):
    """The model file cannot be read, is not valid, or asks for what is not supported.

    op: the operator at fault, where there is one.  others: what else is wrong with the model, in its order.
    imported: the module of what could be imported, where something could not.
    """

    op = ""
    others: tuple[ModelError, ...] = ()
    imported: Any = None

    def __str__(self) -> str:
        count = len(self.others)
        more = (
            f"; and {count} more {'problem' if count == 1 else 'problems'}, which `hawq-tvm inspect` lists"
            if count
            else ""
        )
        return self.sentence + more

    def problems(self) -> list[dict[str, str]]:
        """Everything that is wrong, JSON-ready: layer (an operator, input or output), op, reason, expected, found
        and remedy.
        """
        return [
            {
                "layer": e.where,
                "op": e.op,
                "reason": e.message,
                "expected": e.expected,
                "found": e.found,
                "remedy": e.remedy,
            }
            for e in (self, *self.others)
        ]


def not_quantized() -> ModelError:
    """The error for a float model."""
    return ModelError(
        "is not quantized",
        where="model",
        expected="operators that quantize and dequantize",
        found="a float model",
        remedy="hawq-tvm quantize MODEL --calib DATA -o QUANTIZED.onnx, and give that",
    )


def first_of(errors: Sequence[ModelError]) -> ModelError:
    """The first error, which knows the others."""
    first = errors[0]
    first.others = tuple(errors[1:])
    return first


class StageError(HawqError):
    """A module breaks the grammar of its stage: a bug in a pass, or an operation nobody lowered."""


class OverflowBoundError(ModelError):
    """An accumulator's computed worst case does not fit its type."""


class ScheduleError(HawqError):
    """A kernel rule was forced onto a function it does not fit."""


class PackageError(HawqError):
    """A package is damaged, foreign, or made for another machine or version."""


class SignatureError(PackageError):
    """A package is not signed, or not by the key that was given."""

    exit_code = 1


class InputError(HawqError):
    """Arrays given to a package, or the file that holds them, do not fit its inputs."""

    exit_code = 2


class OutputError(HawqError):
    """A file or folder that was named for a result cannot be written."""

    exit_code = 2


class UsageError(HawqError):
    """The command line or an argument is wrong."""

    exit_code = 2


class RemoteError(HawqError):
    """A tracker or server elsewhere cannot be reached, refuses, or does not suit."""

    exit_code = 4


class LostError(RemoteError):
    """A server stopped answering in the middle of a session."""
