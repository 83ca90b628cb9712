"""The sliding window of convolutions and pools: kernel, strides, dilations and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .node import Operation

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """One entry per spatial axis; before and after are the padding."""

    kernel: Ints
    strides: Ints
    dilations: Ints
    before: Ints
    after: Ints

    @property
    def reach(self) -> Ints:
        """How far the dilated kernel extends."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def along(self, first: int, last: int) -> Window:
        """The window over the spatial axes from `first` to before `last`."""
        fields = (self.kernel, self.strides, self.dilations, self.before, self.after)
        return Window(*(f[first:last] for f in fields))

    def beside(self) -> Window:
        """A window over one axis as one over two, of one element along the second."""
        one, none = (1,), (0,)
        return Window(
            self.kernel + one, self.strides + one, self.dilations + one, self.before + none, self.after + none
        )

    def flat(self, values: Ints, fill: int) -> list[int]:
        """Two spatial values: a 1-D operator runs as a 2-D one of height 1."""
        return [fill, *values] if len(values) == 1 else list(values)

    @property
    def padding(self) -> list[int]:
        """Relax's [top, left, bottom, right]."""
        return [*self.flat(self.before, 0), *self.flat(self.after, 0)]


def fitting(node: Operation, window: Window, spatial: Sequence[int]) -> Window:
    """The window itself.

    Raises ModelError when the kernel does not fit into the padded data of these spatial sizes.
    """
    padded = [d + b + a for d, b, a in zip(spatial, window.before, window.after, strict=True)]
    if any(r > p for r, p in zip(window.reach, padded, strict=True)):
        raise node.fail(
            "has a kernel larger than its padded input",
            expected=f"at most {padded}",
            found=f"kernel {list(window.kernel)}, dilated {list(window.reach)}",
        )
    return window


def split_padding(totals: Sequence[int], *, upper: bool) -> tuple[Ints, Ints]:
    """Total padding in halves; an odd one goes to the end (upper) or the beginning."""
    small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (small, large) if upper else (large, small)
