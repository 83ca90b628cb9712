"""How well a model classifies labelled images: top-1, top-5, and where it decides otherwise than another model; of a
model whose answers are no classes, how far they are from another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.core.need import need
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.answers import Answers, End, answers_of, no_classifier
from hawq_tvm.quantize.network.data import CLASSES, LABELS, Batch, Calibration, class_number, open_data, read_labels
from hawq_tvm.quantize.network.float_graph import Input
from hawq_tvm.quantize.network.pictures import SUFFIXES, Preprocess

from .changes import Changes
from .paired import CONFIDENCE, Paired, paired
from .runners import Runner, Shapes, open_runner, scores_of

Array = np.ndarray[Any, Any]
TOP = 5
OPEN_BATCH = 8
KIND = (
    "a folder of images, a folder of one folder per class, a list of images (.txt or .csv), or an .npz file with labels"
)


# -- labelled images
# ------------------------------------------------------------------------------------------------------


def open_images(
    data: str | Path,
    inputs: tuple[Input, ...],
    preprocess: Preprocess | None,
    labels: str | Path | None = None,
    limit: int | None = None,
) -> Calibration:
    """Images with their classes, as `open_data` takes them, or a folder per class, or a list of "FILE CLASS" lines
    (FILE,CLASS in a .csv).

    A folder whose name is a number is that class; of other names the first in alphabetical order is class 0.
    labels: a list for a folder of images, instead of labels.txt in it.  limit: so many images, evenly spaced.
    Raises InputError for what cannot be read or does not fit.
    """
    place = Path(data)
    known = labelled_files(place, labels)
    if known is not None:
        return Calibration(_spaced(sorted(known), limit), inputs, preprocess, known, str(place))
    if place.is_dir() and limit is not None:
        files = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        return (
            Calibration(_spaced(files, limit), inputs, preprocess, None, str(place))
            if files
            else open_data(place, inputs, preprocess)
        )
    return open_data(place, inputs, preprocess)


def labelled_files(data: str | Path, labels: str | Path | None = None) -> dict[Path, int] | None:
    """The classes of image files: of a list, of a folder with one, or of a folder per class; None where the data are
    something else.

    Raises InputError for a list that cannot be read, is empty or names files that do not exist, UsageError for
    labels of no folder.
    """
    place = Path(data)
    if labels is not None and not place.is_dir():
        raise UsageError("is for a folder of images", where="--labels", found=str(place))
    if place.is_file() and place.suffix in (".txt", ".csv"):
        known = read_labels(place, place.parent)
    elif place.is_dir() and labels is not None:
        known = read_labels(Path(labels), place)
    elif place.is_dir() and any(p.is_dir() for p in place.iterdir()):
        known = _folders(place)
    elif place.is_dir() and (place / "labels.txt").exists():
        known = read_labels(place / "labels.txt", place)
    else:
        return None
    if not known:
        raise InputError("names no images", where=str(labels or place), expected=KIND)
    lost = next((f for f in sorted(known) if not f.is_file()), None)
    if lost is not None:
        raise InputError(
            "names a file that does not exist",
            where=str(labels or place),
            found=str(lost),
            expected=f"files relative to {lost.parent}",
        )
    return known


def _folders(place: Path) -> dict[Path, int]:
    names = sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    numbers = dict(zip(names, range(len(names)), strict=True))
    if all(re.fullmatch("[0-9]+", name) for name in names):
        given = {name: class_number(name) for name in names}
        absurd = next((name for name, number in given.items() if number is None), None)
        if absurd is not None:
            raise InputError(
                "is a folder whose number is no class",
                where=f"{place / absurd!s:.100}",
                expected=f"class numbers below {CLASSES:,}",
            )
        numbers = {name: number for name, number in given.items() if number is not None}
    return {
        p: number
        for name, number in numbers.items()
        for p in (place / name).iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    }


def _spaced(files: list[Path], limit: int | None) -> list[Path]:
    return files if limit is None or limit >= len(files) else [files[i * len(files) // limit] for i in range(limit)]


# -- evaluation
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Of `images` with labels (None without) how many had their class first, and among the first five."""

    name: str
    top1: int | None = None
    top5: int | None = None


@dataclass
class Evaluation:
    """One model's answers, and beside another's.

    answers: whether these are classes.  flips: images whose first class is another one than the other model's, None
    where they are not; lost: of those the other model had right, gained: this one has.  change: where they are not, the
    squared change of the other's outputs, as a share of their squares, the mean of all outputs.
    """

    images: int
    score: Score
    answers: Answers | None = None
    against: Score | None = None
    flips: int | None = None
    lost: int | None = None
    gained: int | None = None
    change: float | None = None

    @property
    def paired(self) -> Paired | None:
        """How the shares of right first answers differ; None without labels or without another model."""
        return None if self.lost is None or self.gained is None else paired(self.lost, self.gained, self.images)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; shares are of all images."""
        found: dict[str, Any] = {"images": self.images, **self._scores(self.score)}
        if self.answers is not None:
            found |= {"answers": self.answers.kind, "answers_by": self.answers.by}
        if self.against is not None:
            found["against"] = {
                **self._scores(self.against),
                "squared_change": self.change,
                "flips": self.flips,
                "agreement": None if self.flips is None else (self.images - self.flips) / self.images,
                "lost": self.lost,
                "gained": self.gained,
                **self._difference(),
            }
        return found

    def _difference(self) -> dict[str, Any]:
        found = self.paired
        if found is None:
            return {"difference": None, "interval": None, "confidence": CONFIDENCE, "mcnemar_p": None}
        interval = [found.low, found.high]
        return {
            "difference": found.difference,
            "interval": interval,
            "confidence": CONFIDENCE,
            "mcnemar_p": found.p,
        }

    def _scores(self, score: Score) -> dict[str, Any]:
        shares = {
            name: None if count is None else count / self.images
            for name, count in (("top1", score.top1), ("top5", score.top5))
        }
        return {"model": score.name, **shares}


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    shapes: Shapes | None = None,
    preprocess: Preprocess | None = None,
    labels: str | Path | None = None,
    limit: int | None = None,
    against: str | Path | None = None,
    classes: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a package or an ONNX model; against: another one that is asked about the same images.

    shapes: full shapes of the model's inputs by name, which fix what it leaves open.
    classes: whether the first output holds scores of classes, None for what it looks like (`network/answers.py`);
    labels of other numbers are not looked at.
    Without labels there must be an `against`, and only their agreement is counted.
    Raises InputError for data that do not fit, UsageError when there is nothing to count.
    """
    if limit is not None and limit < 1:
        raise UsageError("is no number of images", where=f"--limit {limit}", expected="at least 1")
    runner = open_runner(model, shapes)
    other = open_runner(against) if against is not None else None
    if other is not None:
        need("scipy.stats")
        _check_same(runner, other)
    images = open_images(data, runner.inputs, preprocess, labels, limit)
    counted = images.has_labels and classes is not False
    if not counted and other is None:
        raise InputError(
            "holds no labels" if not images.has_labels else "has answers that are no classes to count",
            where=str(data),
            expected=f"{KIND}; labels as labels.txt, --labels, folders, or the array {LABELS!r}",
            remedy="or compare with another model by --against",
        )
    tell, count = progress or (lambda step: None), min(images.count, limit or images.count)
    found = Evaluation(0, Score(runner.name), None, Score(other.name) if other else None)
    changes = Changes()
    for batch in _cut_at(images.batches(batch_size(runner)), count):
        ours = answered(runner, batch)
        theirs = answered(other, batch) if other is not None else None
        if found.answers is None:
            found.answers = _answers_of([one for one in (runner, other) if one], ours, batch, classes)
            _begin(found, counted)
        if found.answers.classes:
            _classified(found, ours, theirs, batch.labels if counted else None)
        elif theirs is not None:
            changes.add(ours, theirs, runner.name, str(against))
        found.images += batch.size
        tell(Step("evaluating images", found.images, count))
    found.change = changes.mean()
    return found


def _answers_of(runners: Sequence[Runner], outputs: Mapping[str, Array], batch: Batch, asked: bool | None) -> Answers:
    """What the models' first outputs hold; where one is a softmax of the other's, scores of classes.

    Raises ModelError for labels of a model whose one output is not scores of them.
    """
    ends = [one.end for one in runners if one.end is not None]
    sure = [end for end in ends if end is not End.SUMS]
    end = min(sure or ends or [End.OTHER], key=list(End).index)
    name, value = next(iter(outputs.items()))
    labelled = batch.labels is not None
    answers = answers_of(name, value.shape, batch.size, end, labelled=labelled, asked=asked)
    if labelled and asked is None and len(outputs) > 1:
        raise ModelError(
            "is no classifier's output",
            where=", ".join(outputs),
            expected="one output of scores beside labels",
            found=f"{len(outputs)} outputs",
            remedy="--classes takes the first for scores; onnx.utils.extract_model ends a model at them",
        )
    if labelled and asked is None and answers.by == "shape":
        raise no_classifier(name, value.shape, batch.size)
    return answers


def _begin(found: Evaluation, counted: bool) -> None:
    """Nothing is counted yet, which is something else than nothing to count."""
    if found.against is not None and found.answers is not None and found.answers.classes:
        found.flips = 0
    if counted:
        found.score.top1 = found.score.top5 = 0
    if counted and found.against is not None:
        found.against.top1 = found.against.top5 = found.lost = found.gained = 0


def _classified(
    found: Evaluation, ours: Mapping[str, Array], theirs: Mapping[str, Array] | None, labels: Array | None
) -> None:
    """Count the first answers of a batch."""
    mine = ranked(ours, found.score.name)
    _count(found, found.score, mine, labels)
    if theirs is None or found.against is None or found.flips is None:
        return
    other = ranked(theirs, found.against.name)
    _count(found, found.against, other, labels)
    found.flips += int((mine[:, 0] != other[:, 0]).sum())
    if labels is not None and found.lost is not None and found.gained is not None:
        right, was = mine[:, 0] == labels, other[:, 0] == labels
        found.lost += int((was & ~right).sum())
        found.gained += int((right & ~was).sum())


def _check_same(one: Runner, other: Runner) -> None:
    """Raise UsageError when two models do not take the same arrays."""
    if len(one.inputs) != len(other.inputs):
        raise UsageError(
            "has another number of inputs",
            where=other.name,
            expected=str(len(one.inputs)),
            found=str(len(other.inputs)),
        )
    for a, b in zip(one.inputs, other.inputs, strict=True):
        same = len(a.shape) == len(b.shape) and all(
            x == y or x is None or y is None for x, y in zip(a.shape[1:], b.shape[1:], strict=True)
        )
        if a.dtype != b.dtype or not same:
            raise UsageError(
                "takes other arrays",
                where=f"{other.name}: {b.name}",
                expected=f"{a.dtype} {a.shape}",
                found=f"{b.dtype} {b.shape}",
            )


def _cut_at(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for batch in batches:
        if count <= 0:
            return
        if batch.size > count:
            batch = Batch(
                {n: v[:count] for n, v in batch.inputs.items()}, None if batch.labels is None else batch.labels[:count]
            )
        count -= batch.size
        yield batch


def batch_size(runner: Runner) -> int:
    """How many images it is given at a time."""
    return runner.inputs[0].shape[0] or OPEN_BATCH


def answered(runner: Runner, batch: Batch) -> dict[str, Array]:
    """The outputs for every image by name; a smaller batch than the model takes is filled up with its last image."""
    size = runner.inputs[0].shape[0] or batch.size
    parts: list[dict[str, Array]] = []
    for start in range(0, batch.size, size):
        given = {one.name: v[start : start + size] for one, v in zip(runner.inputs, batch.inputs.values(), strict=True)}
        held = len(next(iter(given.values())))
        filled = {
            n: np.concatenate([v, np.repeat(v[-1:], size - held, 0)]) if held < size else v for n, v in given.items()
        }
        parts.append({n: v[:held] if v.shape[:1] == (size,) else v for n, v in runner.run(filled).items()})
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]}


def ranked(outputs: Mapping[str, Array], where: str) -> Array:
    """The classes of every image, best first [image, class].

    Raises ModelError where the first output holds none.
    """
    return np.argsort(-scores_of(outputs, where).astype(np.float64), axis=1, kind="stable")


def _count(found: Evaluation, score: Score, ranked: Array, labels: Array | None) -> None:
    if labels is None:
        return
    if labels.max() >= ranked.shape[1]:
        raise InputError(
            "holds a class that the model does not have",
            where=score.name,
            expected=f"0 to {ranked.shape[1] - 1}",
            found=str(int(labels.max())),
        )
    right = ranked[:, :TOP] == labels[:, None]
    score.top1, score.top5 = (score.top1 or 0) + int(right[:, 0].sum()), (score.top5 or 0) + int(right.any(1).sum())
