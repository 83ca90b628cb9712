"""An input or output of a package as its users see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantization:
    """real = scale (integer - zero_point), each one for all or one by channel; integers from qmin to qmax; rounding:
    of an input's quantize, else "none".
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    qmin: int
    qmax: int
    rounding: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a package.

    type: in the model ("int4", say).  dtype: of its arrays ("int8").  quantization: None where the model's own
    border is not float.  range: the least and greatest integer that an input takes, where its type holds more: of
    positions in a table or of a mask.  saturates: the declared least and greatest of a float input; what lies beyond
    counts as these.
    """

    name: str
    type: str
    dtype: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    range: tuple[int, int] | None = None
    saturates: tuple[float, float] | None = None

    @staticmethod
    def of(entry: Mapping[str, Any]) -> TensorSpec:
        """From an entry of a manifest."""
        q = entry.get("quantization")
        made = (
            None
            if q is None
            else Quantization(
                tuple(map(float, q["scale"])), tuple(q["zero_point"]), q["qmin"], q["qmax"], q["rounding"]
            )
        )
        limits = (int(entry["range"][0]), int(entry["range"][1])) if "range" in entry else None
        ends = (float(entry["saturates"][0]), float(entry["saturates"][1])) if "saturates" in entry else None
        return TensorSpec(entry["name"], entry["type"], entry["dtype"], tuple(entry["shape"]), made, limits, ends)

    @property
    def declared(self) -> str:
        """The declared range of a float input in a few words, empty where it has none."""
        return f"{self.saturates[0]:g}:{self.saturates[1]:g}" if self.saturates else ""

    def text(self) -> str:
        """Type and shape of its arrays in a few words."""
        return f"{self.dtype}{list(self.shape)}"
