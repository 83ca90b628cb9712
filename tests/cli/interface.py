"""What the command line promises: every command's options, the keys of every `--json`, the exit codes. Run as a
program it writes interface.json, which test_interface.py compares with:

    python -m tests.cli.interface
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import minisign
import numpy as np
import onnx

from hawq_tvm.cli import commands, main, options
from hawq_tvm.core import errors

from ..models import Graph, float_output
from ..quantize.networks import FloatNet, images

STORED = Path(__file__).with_name("interface.json")
KEY = re.compile("[a-z][a-z0-9_]*")  # of our own: what is data is written otherwise, or one of NAMES
NAMES = frozenset({"x", "conv", "fc", "gemm_4", "half_up", "hawq2qonnx"})
QUICK = ["--quiet", "--json"]
# One line per promise: what is run in a folder that `folder` made, each after those above it.
COMMANDS = """
inspect --operators
inspect q.onnx
inspect sinh.onnx
inspect none.onnx
quantize net.onnx --calib in.npz --bits 8 -o q.onnx
compile q.onnx -o q.hawq
compile q.onnx -o v2.hawq --target x86-64-v2
compile none.onnx -o none.hawq
tune q.onnx --trials 2 --threads 1 -o records.json
tune gpu.onnx --target cuda-sm90 --export candidates --trials 2
run q.hawq --inputs one.npz -o out.npz
run q.hawq --inputs two.npz -o out.npz
run q.hawq --inputs one.npz -o out.npz --rpc 127.0.0.1:1 --rpc-timeout 1
verify q.hawq --random 1
verify q.hawq v2.hawq --random 1
prove q.hawq
bench q.hawq --duration 0.01 --warmup-ms 0 --iterations 1 --threads 1
bench q.hawq --duration 0.01 --warmup-ms 0 --iterations 1 --threads 1 --against onnxruntime --model q.onnx
profile q.hawq --duration 0.01 --threads 1
info q.hawq
pack q.hawq -o q1.hawq
strip q.hawq -o small.hawq
verify-signature v2.hawq --key k.pub
sign q.hawq --key k.key
verify-signature q.hawq --key k.pub
allocate net.onnx --calib in.npz --budget size=0.9
allocate net.onnx --calib in.npz --budget size=0.9 --metric trace --probes 2
prune net.onnx --calib in.npz --budget macs=90% --multiple 1 --probes 1 --steps 1 -o smaller.onnx
latency net.onnx -o table.json
finetune net.onnx --data in.npz --bits 8 --epochs 1 --device cpu -o tuned.onnx
evaluate q.hawq --data in.npz --against net.onnx
compare-fake q.onnx q.hawq --data in.npz -o figure.svg --limit 1
"""


def option(action: argparse.Action) -> str:
    """An option as `--help` tells it, in a form that does not depend on Python's version."""
    parts = [", ".join(action.option_strings) or "argument"]
    if action.nargs != 0:
        parts += [str(action.metavar or action.dest.upper())]
    parts += [f"nargs {action.nargs}"] if action.nargs not in (None, 0) else []
    parts += [f"one of {', '.join(map(str, action.choices))}"] if action.choices else []
    return "; ".join(parts + ["required"] * bool(action.option_strings and action.required))


def helps() -> dict[str, list[str]]:
    """Every command and its options."""
    made = options.parser(commands.COMMANDS, *(g.add_verbs for g in commands.GROUPS))
    verbs = next(a for a in made._actions if isinstance(a, argparse._SubParsersAction))
    top = [option(a) for a in made._actions if a is not verbs]
    return {"": top, **{verb: [option(a) for a in sub._actions] for verb, sub in sorted(verbs.choices.items())}}


def exit_codes() -> dict[str, int]:
    """The exit code of every error."""
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.HawqError)]
    return {e.__name__: e.exit_code for e in sorted(found, key=lambda e: e.__name__)}


def keys(value: Any) -> Iterator[str]:
    """The paths of all keys: `a.b` of an object in an object, `a[].b` of one in a list; `*` for what is data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            name = key if KEY.fullmatch(key) and key not in NAMES else "*"
            yield name
            yield from (f"{name}.{k}" if k[0] != "[" else f"{name}{k}" for k in keys(inner))
    elif isinstance(value, list):
        yield from (f"[].{k}" if k[0] != "[" else f"[]{k}" for inner in value for k in keys(inner))


def folder(place: Path) -> None:
    """The files that COMMANDS name."""
    net = FloatNet([1, 3, 8, 8])
    pooled = net.node("GlobalAveragePool", net.node("Relu", net.conv("x", 4, 3, 3, "conv")))
    flat = net.node("Flatten", pooled)
    onnx.save(net.model(net.node("Gemm", flat, net.random(4, 5), name="fc")), str(place / "net.onnx"))
    for name, op in (("q", "Relu"), ("sinh", "Sinh")):
        g = Graph()
        y = g.conv(g.qdq(g.input("x", [1, 3, 8, 8]), 0.1, 128), g.weight([4, 3, 3, 3]))
        onnx.save(g.model([float_output(g.qdq(g.node(op, [y]), 0.1))]), str(place / f"{name}.onnx"))
    g = Graph()
    y = g.conv(g.qdq(g.input("x", [1, 16, 8, 8]), 0.1, 128), g.weight([16, 16, 1, 1]))
    onnx.save(g.model([float_output(g.qdq(y, 0.1))]), str(place / "gpu.onnx"))
    np.savez(place / "in.npz", x=images(4))
    np.savez(place / "one.npz", x=images(1))
    np.savez(place / "two.npz", y=images(1))
    pair = minisign.KeyPair.generate()
    (place / "k.key").write_bytes(bytes(pair.secret_key))
    (place / "k.pub").write_bytes(bytes(pair.public_key))


def outputs(lines: Collection[str]) -> dict[str, dict[str, Any]]:
    """For every command its exit code, and the keys of what it prints."""
    found = {}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        folder(Path(place))
        os.chdir(place)
        try:
            for line in lines:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    code = main([*line.split(), *QUICK])
                found[line] = {"exit": code, "keys": sorted(set(keys(json.loads(out.getvalue()))))}
        finally:
            os.chdir(here)
    return found


def interface() -> dict[str, Any]:
    """All of it."""
    return {"options": helps(), "exit_codes": exit_codes(), "json": outputs(COMMANDS.strip().splitlines())}


if __name__ == "__main__":
    STORED.write_text(json.dumps(interface(), indent=1) + "\n")
