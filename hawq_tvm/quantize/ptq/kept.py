"""What an interrupted reconstruction leaves: the blocks that are done, in an .npz file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import check_output, load_npz, save_npz

from .simulated import Grids
from .weights import Rounded

# Of a layer.
FIELDS = ("codes", "scale", "bias")


@dataclass(frozen=True)
class Kept:
    """The file of one run; key: of everything that its result hangs on."""

    path: Path
    key: str

    def check(self) -> None:
        """Raise UsageError for the file of another run, OutputError where none can be written."""
        check_output(self.path)
        if self.path.exists() and str(load_npz(str(self.path)).get("key")) != self.key:
            raise UsageError(
                "was written with another model, other data or other settings",
                where=str(self.path),
                expected="a state of this very run",
                remedy="remove it, or name another with --state",
            )

    def save(self, rows: Sequence[Mapping[str, Any]], rounded: Mapping[str, Rounded], grids: Grids) -> None:
        """Write what the blocks of these rows have become."""
        arrays = {"key": np.array(self.key), "rows": np.array(json.dumps(rows))}
        for name in (name for row in rows for name in row["layers"]):
            values = {field: getattr(rounded[name], field) for field in FIELDS}
            arrays |= {f"{field}/{name}": v.numpy() for field, v in values.items() if v is not None}
        steps = [[*key, grid.scale] for key, grid in grids.by_key.items()]
        save_npz(self.path, {**arrays, "steps": np.array(json.dumps(steps))})

    def read(
        self, rounded: Mapping[str, Rounded], grids: Grids
    ) -> tuple[list[dict[str, Any]], dict[str, Rounded], Grids]:
        """The rows that were written, and weights and grids with what they made of them; no rows without a file."""
        if not self.path.exists():
            return [], dict(rounded), grids
        arrays, made = load_npz(str(self.path)), dict(rounded)
        rows = json.loads(str(arrays["rows"]))
        for name in (name for row in rows for name in row["layers"]):
            values: dict[str, Any] = {
                f: torch.from_numpy(arrays[f"{f}/{name}"]) for f in FIELDS if f"{f}/{name}" in arrays
            }
            made[name] = replace(made[name], **values)
        steps = {(source, bits): scale for source, bits, scale in json.loads(str(arrays["steps"]))}
        by_key = {key: replace(grid, scale=steps[key]) for key, grid in grids.by_key.items()}
        return rows, made, replace(grids, by_key=by_key)
