"""How to quantize: what a user may say, checked before a library is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hawq_tvm.core.errors import UsageError

from .effort import EFFORTS
from .observers import OBSERVERS
from .widths import uniform


@dataclass(frozen=True)
class Recipe:
    """How to quantize.

    bits: 8, 4, a choice such as "W4A8", or the path of a bits.json.  observer: of activations' ranges.  percentile:
    for that observer.
    keep_ends, keep_small: the first and the last layer, and small ones (`kept_small`), have 8 bits; ignored where a
    bits.json says what each has.  symmetric: tensors that can be negative have the zero point 0.  search: scales of
    weights of the least error instead of the largest magnitude (None: below 8 bits).
    equalize: "off", "relu" or "relu6" (see `equalize.py`); None: "relu" where something is learned.  smooth: channels
    of what matrix products read, see `smooth.py`.
    rounding: "learned" (where anything has fewer than 8 bits all layers are fitted, blocks of few bits are learned
    behind that, and scales and biases are corrected, see `reconstruct.py`) or "nearest"; None: learned, but nearest
    where fine-tuning follows.
    effort: behind the fit, a key of EFFORTS, or iterations a block.  correct_bias: scales and biases, also where
    nothing is learned.  Both use at most `images` images (None: more of small ones, see `_some`).  batch: images at a
    time.
    """

    bits: int | str | Path = 8
    observer: str = "mse"
    percentile: float = 99.99
    keep_ends: bool = True
    symmetric: bool = False
    search: bool | None = None
    equalize: str | None = None
    correct_bias: bool = False
    rounding: str | None = None
    effort: str | int = "fast"
    images: int | None = None
    batch: int = 8
    seed: int = 0
    smooth: bool = True
    keep_small: bool = True

    def __post_init__(self) -> None:
        uniform(self.bits)
        if self.observer not in OBSERVERS:
            raise UsageError("is no observer", where=self.observer, expected=", ".join(OBSERVERS))
        if not 50 < self.percentile <= 100:
            raise UsageError("is no percentile", where=str(self.percentile), expected="more than 50, at most 100")
        if self.equalize not in (None, "off", "relu", "relu6"):
            raise UsageError("is no way to equalise", where=self.equalize, expected="off, relu or relu6")
        if self.rounding not in (None, "learned", "nearest"):
            raise UsageError("is no rounding", where=self.rounding, expected="learned or nearest")
        if isinstance(self.effort, str) and self.effort not in EFFORTS:
            expected = f"{', '.join(EFFORTS)}, or iterations a block"
            raise UsageError("is no effort", where=self.effort, expected=expected)
        for name, value, least in (
            ("effort", self.iterations, 0),
            ("images", self.images, 1),
            ("batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise UsageError("is too small", where=name, expected=f"at least {least}", found=str(value))

    @property
    def iterations(self) -> int:
        """Of what is learned, a block."""
        return EFFORTS[self.effort] if isinstance(self.effort, str) else self.effort
