"""Calibration data: an .npz file, or a folder of .npy, .npz or image files; checked whole when opened, then streamed
batch by batch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.core.files import DATA, UNREADABLE, check_data, load_npz

from .float_graph import Input
from .pictures import SUFFIXES, Preprocess, read_picture

Array = NDArray[Any]
LABELS = "labels"
# Class numbers are less than this.
CLASSES = 10**9


@dataclass(frozen=True)
class Batch:
    """Inputs by name, each with as many entries in its first dimension; labels when the data have them."""

    inputs: dict[str, Array]
    labels: Array | None

    @property
    def size(self) -> int:
        """How many images."""
        return len(next(iter(self.inputs.values())))


class Calibration:
    """Calibration data of a network, opened by `open_data`.

    inputs: the network's, with the sizes that the data have where the network leaves them open, but for the first
    dimension, which counts images.
    count: images.  has_labels: whether every image has its class.  fingerprint: of all values and labels.
    """

    def __init__(
        self,
        files: Sequence[Path],
        inputs: Sequence[Input],
        preprocess: Preprocess | None,
        classes: Mapping[Path, int] | None,
        where: str,
    ) -> None:
        self.inputs, self.where = tuple(inputs), where
        flat = next((one.name for one in inputs if not one.shape), None)
        if flat is not None:
            raise ModelError(
                "is an input without dimensions, of which data cannot have several",
                where=flat,
                expected="a first dimension that counts images",
            )
        self._files, self._preprocess, self._classes = list(files), preprocess, classes
        self.count, labelled, digest = 0, 0, hashlib.sha256()
        for file in self._files:
            batch = self._read(file)
            self.count += batch.size
            labelled += batch.size if batch.labels is not None else 0
            for value in (*batch.inputs.values(), *([batch.labels] if batch.labels is not None else [])):
                digest.update(np.ascontiguousarray(value).tobytes())
            if 0 < labelled < self.count:
                raise InputError(
                    "has no labels, but other files have",
                    where=str(file),
                    expected="labels for all images, or for none",
                )
        if not self.count:
            raise InputError("holds no images", where=where, expected=DATA)
        self.has_labels, self.fingerprint = bool(labelled), digest.hexdigest()

    def batches(self, size: int, fixed: bool = False) -> Iterator[Batch]:
        """Batches of `size` images in order, the last one smaller; fixed: left out instead, as the network takes no
        smaller one.

        Raises InputError when that leaves none.
        """
        if fixed and self.count < size:
            raise InputError(
                "holds fewer images than one batch of the model",
                where=self.where,
                expected=f"at least {size}",
                found=str(self.count),
            )
        held: list[Batch] = []
        for file in self._files:
            held.append(self._read(file))
            while sum(b.size for b in held) >= size:
                joined = _joined(held)
                yield _cut(joined, 0, size)
                held = [_cut(joined, size, joined.size)] if joined.size > size else []
        if held and not fixed:
            yield _joined(held)

    def _read(self, file: Path) -> Batch:
        if file.suffix.lower() in SUFFIXES:
            if self._preprocess is None:
                raise UsageError(
                    "pictures need to know how pixels become numbers",
                    where=str(file),
                    expected="--mean and --std, for (pixel - mean) / std",
                )
            arrays = {self.inputs[0].name: read_picture(file, self.inputs, self._preprocess)}
            labels = None if self._classes is None else np.array([self._label(file)])
        elif file.suffix.lower() == ".npy":
            arrays, labels = {self.inputs[0].name: _load_npy(file)}, None
        else:
            arrays = load_npz(str(file))
            labels = arrays.pop(LABELS, None)
        return self._checked(arrays, labels, str(file))

    def _label(self, file: Path) -> int:
        assert self._classes is not None
        if file not in self._classes:
            raise InputError("has no label", where=str(file), expected=f"a line '{file.name} CLASS' in labels.txt")
        return self._classes[file]

    def _checked(self, arrays: dict[str, Array], labels: Array | None, where: str) -> Batch:
        names = [i.name for i in self.inputs]
        if set(arrays) != set(names):
            raise InputError(
                "holds arrays of other names",
                where=where,
                expected=f"{', '.join(names)}, and labels if there are any",
                found=", ".join(sorted(arrays)) or "none",
                remedy=f"write it with numpy.savez(PATH, {', '.join(f'{name}=...' for name in names)})",
            )
        sizes = set()
        for one in self.inputs:
            value, spot = arrays[one.name], f"{where}: {one.name}"
            if value.dtype.name != one.dtype:
                raise InputError(
                    "has another type",
                    where=spot,
                    expected=one.dtype,
                    found=value.dtype.name,
                    remedy=f"convert it with .astype('{one.dtype}')",
                )
            if value.ndim == len(one.shape) - 1:
                value = arrays[one.name] = value[None]
            if value.ndim != len(one.shape) or any(
                w is not None and w != d for w, d in zip(one.shape[1:], value.shape[1:], strict=True)
            ):
                raise InputError(
                    "has another shape", where=spot, expected=_shape(one), found="x".join(map(str, value.shape))
                )
            if not len(value):
                raise InputError("is empty", where=spot, expected=_shape(one), found="0 images")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise InputError(
                    "holds NaN or infinity",
                    where=spot,
                    found=f"{int((~np.isfinite(value)).sum())} such values",
                    remedy="look at how it was made",
                )
            sizes.add(len(value))
        # What the network leaves open is as in the first file: a compiled network has one shape.
        self.inputs = tuple(replace(i, shape=(i.shape[0], *arrays[i.name].shape[1:])) for i in self.inputs)
        if len(sizes) > 1:
            raise InputError(
                "holds different numbers of images for its inputs",
                where=where,
                found=", ".join(map(str, sorted(sizes))),
            )
        if labels is not None:
            if (
                labels.dtype.kind not in "iu"
                or labels.ndim != 1
                or len(labels) not in sizes
                or labels.min() < 0
                or labels.max() >= CLASSES
            ):
                found = f"{labels.dtype.name} {'x'.join(map(str, labels.shape))}"
                found += f", from {labels.min()} to {labels.max()}" if labels.dtype.kind in "iu" and labels.size else ""
                raise InputError(
                    "has labels that do not fit",
                    where=f"{where}: {LABELS}",
                    expected=f"{sizes.pop()} class numbers",
                    found=found,
                )
            labels = labels.astype(np.int64)
        return Batch({n: arrays[n] for n in names}, labels)


def open_data(path: str | Path, inputs: Sequence[Input], preprocess: Preprocess | None = None) -> Calibration:
    """Calibration data for a network with these inputs.

    In .npz files arrays are called as the inputs, and `labels` holds class numbers; .npy files are for networks with
    one input; pictures have their classes in labels.txt, a line "FILE CLASS" each.  All of it is read once and
    checked.
    Raises InputError naming the file and the array that does not fit.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".npz":
        return Calibration([place], inputs, preprocess, None, str(place))
    check_data(place)
    if not place.is_dir():
        raise InputError("is no calibration data", where=str(place), expected=DATA)
    files = sorted(
        p for p in place.iterdir() if p.suffix.lower() in (".npy", ".npz", *SUFFIXES) and not p.name.startswith(".")
    )
    if not files:
        raise InputError(
            "holds no data", where=str(place), expected=DATA, found=f"{len(list(place.iterdir()))} other files"
        )
    if len(inputs) > 1 and any(f.suffix == ".npy" for f in files):
        raise InputError(
            "holds .npy files, which do not say for which input",
            where=str(place),
            expected=f".npz files with {', '.join(i.name for i in inputs)}",
        )
    names = place / "labels.txt"
    return Calibration(files, inputs, preprocess, read_labels(names, place) if names.exists() else None, str(place))


def class_number(text: str) -> int | None:
    """The class that decimal digits mean; None for any other text, such as one with a sign, and for 10^9 and more."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def read_labels(path: Path, place: Path) -> dict[Path, int]:
    """The classes of files: lines "FILE CLASS", or "FILE,CLASS" in a .csv file; names are relative to `place`.

    Raises InputError naming the line that is no label or contradicts another, or when the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise InputError("is no file", where=str(path), expected="lines 'FILE CLASS'")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as e:  # ValueError: no UTF-8, or a path that no file can have
        raise InputError("cannot be read", where=str(path), expected="lines 'FILE CLASS'", found=str(e)) from e
    found: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition("," if path.suffix == ".csv" else " ")
        where, known = f"{path}, line {number}", class_number(label.strip())
        if line.strip() and (not name.strip() or known is None):
            raise InputError(
                "is no label",
                where=where,
                expected=f"a file's name, a space and its class number, below {CLASSES:,}",
                found=f"{line!r:.60}",
            )
        if line.strip() and known is not None and found.setdefault(place / name.strip(), known) != known:
            raise InputError(
                "gives a file another class than before",
                where=where,
                expected=f"{found[place / name.strip()]}, as before",
                found=f"{line!r:.60}",
            )
    return found


def _load_npy(file: Path) -> Array:
    try:
        value = np.load(file, allow_pickle=False)
    except UNREADABLE as e:
        raise InputError(
            "cannot be read",
            where=str(file),
            expected="an .npy file",
            found=(str(e).splitlines() or [type(e).__name__])[0],
        ) from e
    return value


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    labels = None if batches[0].labels is None else np.concatenate([b.labels for b in batches if b.labels is not None])
    return Batch({n: np.concatenate([b.inputs[n] for b in batches]) for n in batches[0].inputs}, labels)


def _cut(batch: Batch, start: int, end: int) -> Batch:
    return Batch(
        {n: v[start:end] for n, v in batch.inputs.items()}, None if batch.labels is None else batch.labels[start:end]
    )


def _shape(one: Input) -> str:
    return "x".join(["images", *("any" if d is None else str(d) for d in one.shape[1:])])
