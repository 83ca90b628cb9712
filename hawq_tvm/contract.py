"""The shapes and types that are promised: by the model's own declarations, by ONNX's or PyTorch's inference, and by every pass to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from . import ops, stages
from .errors import ModelError

REPORT = "report it with the model: one of the two is wrong, and no package is made of a doubt"
CORRECT = "correct the shape or type that the model declares"


@dataclass(frozen=True)
class Promise:
    """What somebody says about a tensor.

    by: who, in words.  kind: the element type, empty where nothing is said.  dims: sizes, None for each that is not known; None for no shape.
    """

    by: str
    kind: str
    dims: tuple[int | None, ...] | None
    remedy: str = REPORT

    def holds(self, kind: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of this type (empty: not compared) and shape is what was said."""
        if kind and self.kind and kind != self.kind:
            return False
        return self.dims is None or (len(self.dims) == len(shape) and all(d in (None, n) for d, n in zip(self.dims, shape, strict=True)))


def check(where: str, kind: str, shape: Sequence[int], promises: Iterable[Promise]) -> None:
    """Compare what became of a tensor with what was said about it.

    Raises ModelError naming the tensor, what was promised by whom, and what was found.
    """
    for p in promises:
        if not p.holds(kind, shape):
            dims = "" if p.dims is None else str(["?" if d is None else d for d in p.dims]).replace("'", "")
            raise ModelError(
                "would have another shape or type than promised", where=where, expected=f"{p.kind}{dims} ({p.by})",
                found=f"{kind}{list(shape)}", remedy=p.remedy,
            )  # fmt: skip


def outputs(module: tvm.IRModule) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every output of `main`."""
    main = module["main"]
    returned, _ = stages.outputs(main)
    fields = list(returned.fields) if isinstance(returned, relax.Tuple) else [returned]
    names = [str(n) for n in (main.attrs or {}).get("hawq.output_names", [])] or [f"output{i}" for i in range(len(fields))]
    return [(name, ops.dtype_of(f), ops.shape_of(f)) for name, f in zip(names, fields, strict=True)]


def check_step(promised: Sequence[tuple[str, str, tuple[int, ...]]], module: tvm.IRModule, step: str) -> None:
    """Compare a module's outputs with those it had when it was imported.

    Raises ModelError naming the first output that a step changed.
    """
    for (name, kind, shape), (_, found, now) in zip(promised, outputs(module), strict=True):
        check(name, found, now, [Promise(f"the model, before the step {step}", kind, shape)])
