"""What a measurement can time: one protocol for every runtime, and the reasons for which one is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from hawq_tvm.core.errors import HawqError, ModelError, UsageError

Array = NDArray[Any]


class Engine(Protocol):
    """What can be timed.

    name, version: for the report.  what: which model it ran and how, in a few words.
    """

    name: str
    what: str

    @property
    def version(self) -> str: ...

    def prepare(self, model: Path | None, inputs: Mapping[str, Array], threads: int) -> None:
        """Load the model for inputs of exactly these shapes and with so many threads.

        Raises CannotRun where this machine or installation cannot run it; the measurement then goes on without it.
        """

    def call(self) -> None:
        """One inference."""

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name."""

    def close(self) -> None:
        """Give back what was taken of the process, its settings included."""


class CannotRun(HawqError):
    """An engine that cannot run here, for a reason that is no mistake of the user's."""


def missing(name: str, package: str, extra: str) -> UsageError:
    """The error for a peer whose package is not installed."""
    return UsageError(
        f"the package {package} is not installed", where=f"--against {name}", remedy=f"pip install 'hawq-tvm[{extra}]'"
    )


def refused(name: str, model: Path, error: Exception) -> ModelError:
    """The error for a peer that does not load the model."""
    return ModelError(
        f"{name} does not accept this model",
        where=str(model),
        found=last_line(error),
        remedy=f"leave {name} out of --against",
    )


def last_line(error: Exception) -> str:
    """What an exception of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
