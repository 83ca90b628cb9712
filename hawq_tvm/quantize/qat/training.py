"""Quantization-aware fine-tuning in the deployed arithmetic, taught by the float network: what is trained is, bit
for bit, what the package computes.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hawq_tvm.core.errors import HawqError, InputError, UsageError
from hawq_tvm.core.files import check_output, load_npz, save_npz
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.float_onnx import Shapes
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.network.prepare import prepare
from hawq_tvm.quantize.ptq.quantizer import Draft, Quantized, as_onnx, draft
from hawq_tvm.quantize.ptq.recipe import Recipe

from .deployed import Deployed, check_trainable
from .straight import Tensor
from .taught import Images, held, rows, scored

Array = np.ndarray[Any, Any]
# Scales move by this share of the rate: one scale moves every integer of its tensor.
SCALES, SCALE_RATE = ("step:", "grid:"), 0.1
# The root of the mean square of answers that are all zero.
LEAST = 1e-6


class TrainingMismatch(HawqError):
    """The compiled package does not compute what was trained: a bug in either."""

    exit_code = 1


@dataclass(frozen=True)
class Training:
    """How to train.

    epochs: passes over the images.  rate: Adam's, in steps of the integer grid for weights and biases and in natural
    logarithms for scales, falling to 0 along half a cosine.  batch: images of a step; a model that fixes fewer at a
    time takes them in turns.  alpha: the share of the cross-entropy with the labels, the rest being the distance to
    the float network's answers; 0 without labels.  temperature: of that distance (Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015); of answers that are no scores of classes it is the squared error, as a share
    of their mean square.
    held_out: the share of images that no epoch sees, and the best epoch is chosen by, unless there is a set for that.
    checked: images on which the compiled package is compared with what was trained, 0 for none.  classes: whether
    answers are scores of classes, None for what they look like (`network/answers.py`).
    device: "cpu", "cuda" or "auto".  One seed gives one result on one CPU.
    """

    epochs: int = 2
    rate: float = 0.02
    batch: int = 64
    alpha: float = 0.5
    temperature: float = 4.0
    held_out: float = 0.1
    checked: int = 16
    seed: int = 0
    device: str = "auto"
    classes: bool | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("rate", 0 < self.rate < math.inf, "a positive number"),
            ("batch", self.batch >= 1, "at least 1"),
            ("alpha", 0 <= self.alpha <= 1, "0 to 1"),
            ("temperature", 0 < self.temperature < math.inf, "a positive number"),
            ("held_out", 0 < self.held_out < 1, "a share between 0 and 1"),
            ("checked", self.checked >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not good:
                raise UsageError("is out of range", where=name, expected=expected, found=str(getattr(self, name)))


@dataclass(frozen=True)
class Score:
    """On images that were held out: the mean loss, the share with the right first answer (None without labels), and
    with the float network's (None where answers are no classes).
    """

    loss: float
    top1: float | None
    agreement: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better."""
        share = self.agreement if self.top1 is None else self.top1
        return (share or 0.0, -self.loss)


def finetune(
    model: Any,
    data: str | Path,
    recipe: Recipe | None = None,
    training: Training | None = None,
    *,
    calibration: str | Path | None = None,
    validation: str | Path | None = None,
    shapes: Shapes | None = None,
    preprocess: Preprocess | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a float model as `post_training` does, then train weights, biases and scales in the deployed arithmetic.

    shapes: full shapes of inputs by name, which fix what the model leaves open.
    data: images to train on, with labels if there are any.  calibration: images for post-training quantization
    (default: data).  validation: images to choose the epoch by (default: a part of data).  state: an .npz file that
    is written after every epoch; an interrupted run is continued by the next. `notes["finetune"]` of the result has
    the losses and scores of every epoch; the first row is the network before training, which is kept if none is
    better.
    Raises ModelError for an operator without a derivative, UsageError when training diverges, TrainingMismatch if the
    package computed something else, and InputError, ModelError and UsageError as `post_training` does.
    """
    chosen, settings, tell = recipe or Recipe(), training or Training(), progress or (lambda step: None)
    chosen = replace(chosen, rounding=chosen.rounding or "nearest")
    if state is not None:
        check_output(Path(state))
    device = _device(settings.device)
    _, given = prepare(as_onnx(model, shapes), shapes)
    check_trainable(given)
    opened = open_data(data, given.inputs, preprocess)
    others = open_data(validation, given.inputs, preprocess) if validation is not None else None
    calibrating = calibration if calibration is not None else data
    started = draft(model, calibrating, chosen, shapes=shapes, preprocess=preprocess, progress=tell)
    images = held(opened, started.given, settings.batch, device, tell, settings.classes)
    # One set has labels, perhaps, and the other has not: what answers are is told by the first.
    asked = settings.classes if images.answers.by == "shape" else images.classes
    kept = held(others, started.given, settings.batch, device, tell, asked) if others is not None else None
    told = opened.fingerprint + (others.fingerprint if others is not None else "")
    return _Run(started, images, kept, settings, device, Path(state) if state is not None else None, told, tell).run()


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError("is no device", where=name, expected="auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "is not there", where="cuda", expected="a GPU that PyTorch can use", remedy="take --device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


class _Run:
    def __init__(
        self,
        started: Draft,
        images: Images,
        validation: Images | None,
        settings: Training,
        device: torch.device,
        state: Path | None,
        fingerprint: str,
        tell: Progress,
    ) -> None:
        self.settings, self.device, self.state, self.tell = settings, device, state, tell
        self.net = Deployed(started, device)
        self.fixed, self.size = started.graph.batch is not None, started.graph.batch or settings.batch
        self.train, self.validation = (images, validation) if validation is not None else self._split(images)
        for part, name in ((self.train, "to train on"), (self.validation, "to choose the epoch by")):
            if part.count < (self.size if self.fixed else 1):
                raise InputError(
                    f"too few images are left {name}",
                    where=started.graph.name,
                    expected=str(self.size if self.fixed else 1),
                    found=str(part.count),
                )
        # One for all images: an answer of a single number may be near 0, and its error counts no more for that.
        self.unit = float(self.train.teacher.double().square().mean().sqrt().clamp(min=LEAST))
        self.optimizer = torch.optim.Adam(
            [{"params": own, "share": share} for own, share in self._groups()], settings.rate
        )
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        digest = hashlib.sha256(started.model().SerializeToString() + f"{fingerprint} {asdict(settings)}".encode())
        self.key = digest.hexdigest()

    def _groups(self) -> list[tuple[list[Tensor], float]]:
        """Parameters by the share of the rate that they get."""
        scales = [v for n, v in self.net.parameters.items() if n.startswith(SCALES)]
        return [([v for n, v in self.net.parameters.items() if not n.startswith(SCALES)], 1.0), (scales, SCALE_RATE)]

    def _split(self, images: Images) -> tuple[Images, Images]:
        order = torch.randperm(images.count, generator=torch.Generator().manual_seed(self.settings.seed))
        kept = max(1, round(images.count * self.settings.held_out))
        kept = max(kept, self.size) if self.fixed else kept
        return images.chosen(order[kept:]), images.chosen(order[:kept])

    def run(self) -> Quantized:
        first = self._resumed()
        if first == 0:
            self._note(0, None, 0.0)
        for epoch in range(first, self.settings.epochs):
            start = time.monotonic()
            loss = self._epoch(epoch)
            self._note(epoch + 1, loss, time.monotonic() - start)
            self._save()
        with torch.no_grad():
            for name, value in self.net.parameters.items():
                value.copy_(self.best[name])
        found = self.net.drafted().written()
        checked = self._proved(found) if self.settings.checked else 0
        chosen = max(range(len(self.history)), key=lambda i: self._rank(self.history[i]))
        found.notes["finetune"] = {
            **asdict(self.settings),
            "device": self.device.type,
            "images": self.train.count,
            "validation_images": self.validation.count,
            "labels": self.train.labels is not None,
            "answers": self.train.answers.kind,
            "answers_by": self.train.answers.by,
            "epochs_run": self.history,
            "kept_epoch": self.history[chosen]["epoch"],
            "package_equal_on": checked,
        }
        return found

    # -- training
    # ---------------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> float:
        """One pass over the images; the mean loss."""
        order = torch.randperm(
            self.train.count, generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch + 1)
        )
        total, done, start = 0.0, 0, time.monotonic()
        count = self.train.count // self.size if self.fixed else -(-self.train.count // self.size)
        turns = max(1, self.settings.batch // self.size)  # a model that fixes a small batch takes several in turn
        for i, batch in enumerate(self.train.batches(order, self.size, self.fixed)):
            together = min(turns, count - i // turns * turns)
            loss = self._loss(self._answers(batch), batch)
            where = f"epoch {epoch + 1}, step {i // turns + 1}"
            self._check(where, loss)
            (loss / together).backward()
            if i % turns == together - 1:
                self._step((epoch + i / count) / self.settings.epochs)
                self._check(where, *self.net.parameters.values())
            total += float(loss.detach()) * batch.count
            done += batch.count
            left = (time.monotonic() - start) / done * (self.train.count - done)
            self.tell(Step(f"epoch {epoch + 1} of {self.settings.epochs}", done, self.train.count, None, left))
        return total / done

    def _step(self, gone: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * group["share"] * 0.5 * (1 + math.cos(math.pi * gone))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _check(self, where: str, *numbers: Tensor) -> None:
        """Raise UsageError when the loss or a parameter is no finite number any more."""
        if not all(bool(one.isfinite().all()) for one in numbers):
            raise UsageError(
                "training diverged: the loss or what is learned is infinite or NaN",
                where=where,
                remedy=f"train at a lower rate than {self.settings.rate:g} (--rate)",
            )

    def _answers(self, batch: Images) -> Tensor:
        """What the network says of a batch, as what the float one says is held."""
        return scored(rows(self.net(batch.inputs)), batch.answers)

    def _loss(self, scores: Tensor, batch: Images) -> Tensor:
        if not batch.classes:
            return ((scores - batch.teacher) / self.unit).square().mean()
        heat = self.settings.temperature
        apart = (
            F.kl_div(
                F.log_softmax(scores / heat, 1),
                F.log_softmax(batch.teacher / heat, 1),
                reduction="batchmean",
                log_target=True,
            )
            * heat**2
        )
        if batch.labels is None or self.settings.alpha == 0:
            return apart
        return self.settings.alpha * F.cross_entropy(scores, batch.labels) + (1 - self.settings.alpha) * apart

    def _measure(self, epoch: int) -> Score:
        total, right, same, count = 0.0, 0, 0, 0
        with torch.no_grad():
            for batch in self.validation.batches(torch.arange(self.validation.count), self.size, self.fixed):
                scores = self._answers(batch)
                loss = self._loss(scores, batch)
                self._check(f"after epoch {epoch}", loss)
                total += float(loss) * batch.count
                same += int((scores.argmax(1) == batch.teacher.argmax(1)).sum())
                right += int((scores.argmax(1) == batch.labels).sum()) if batch.labels is not None else 0
                count += batch.count
                self.tell(Step("validation", count, self.validation.count))
        return Score(
            total / count,
            right / count if self.validation.labels is not None else None,
            same / count if self.validation.classes else None,
        )

    def _note(self, epoch: int, loss: float | None, seconds: float) -> None:
        """Measure, remember, and keep what is best so far."""
        score = self._measure(epoch)
        better = not self.history or score.rank > max(self._rank(row) for row in self.history)
        self.history.append({"epoch": epoch, "train_loss": loss, **asdict(score), "seconds": round(seconds, 1)})
        if better:
            self.best = {n: v.detach().clone() for n, v in self.net.parameters.items()}

    def _rank(self, row: dict[str, Any]) -> tuple[float, float]:
        return Score(row["loss"], row["top1"], row["agreement"]).rank

    # -- what outlives an interruption
    # ------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.state is None:
            return
        arrays = {"key": np.array(self.key), "history": np.array(repr(self.history))}
        for name, value in self.net.parameters.items():
            held = self.optimizer.state[value]
            arrays |= {f"now/{name}": value.detach().cpu().numpy(), f"best/{name}": self.best[name].cpu().numpy()}
            arrays |= {
                f"{field}/{name}": held[field].cpu().numpy()
                for field in ("exp_avg", "exp_avg_sq", "step")
                if field in held
            }
        save_npz(self.state, arrays)

    def _resumed(self) -> int:
        """The epochs that a state holds, 0 without one.

        Raises UsageError for the state of another run.
        """
        if self.state is None or not self.state.exists():
            return 0
        import ast

        arrays = load_npz(str(self.state))
        if str(arrays.get("key")) != self.key:
            raise UsageError(
                "was written with another model, other data or other settings",
                where=str(self.state),
                expected="a state of this very run",
                remedy="remove it, or name another with --state",
            )
        self.history = ast.literal_eval(str(arrays["history"]))
        with torch.no_grad():
            for name, value in self.net.parameters.items():
                value.copy_(torch.from_numpy(arrays[f"now/{name}"]))
                self.best[name] = torch.from_numpy(arrays[f"best/{name}"]).to(self.device)
                if f"step/{name}" in arrays:
                    self.optimizer.state[value] = {
                        field: torch.from_numpy(np.array(arrays[f"{field}/{name}"])).to(
                            self.device if field != "step" else "cpu"
                        )
                        for field in ("exp_avg", "exp_avg_sq", "step")
                    }
        return len(self.history) - 1

    # -- what runs
    # --------------------------------------------------------------------------------------------------------

    def _proved(self, found: Quantized) -> int:
        """Compile what was written and compare its outputs with the training side's, element by element; how many
        images that were.

        Raises TrainingMismatch when one differs.
        """
        from hawq_tvm.package.package import compile as compile_package

        least = self.size if self.fixed else 1
        count = max(least, min(self.settings.checked, self.validation.count) // least * least)
        size = self.size if self.fixed else count
        self.tell(Step("compiling and comparing", 0, 1))
        batches = list(self.validation.chosen(torch.arange(count)).batches(torch.arange(count), size, self.fixed))
        package = compile_package(found.model, shapes={n: v.shape for n, v in batches[0].inputs.items()})
        for batch in batches:
            (theirs,) = package.run({n: v.cpu().numpy() for n, v in batch.inputs.items()}).values()
            with torch.no_grad():
                ours = self.net(batch.inputs).cpu().numpy()
            if theirs.shape != ours.shape or not np.array_equal(theirs, ours):
                raise TrainingMismatch(
                    "the compiled package does not compute what was trained",
                    where=self.net.graph.name,
                    expected="equal outputs",
                    found=f"{int((theirs != ours).sum())} of {ours.size} differ"
                    if theirs.shape == ours.shape
                    else f"shapes {theirs.shape} and {ours.shape}",
                    remedy="report this network: it is a bug of hawq_tvm",
                )
        self.tell(Step("compiling and comparing", 1, 1))
        return count
