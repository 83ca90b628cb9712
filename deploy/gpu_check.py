"""Check and time a GPU bundle: every layer exactly, then times beside PyTorch's, in one JSON file.

    python3 gpu-bundle/gpu_check.py --out gpu.json          (make gpu-check OUT=gpu.json)

Needs Python, NumPy and an NVIDIA driver; PyTorch for what stands beside. No TVM, no compiler of ours, no network. The same command with
--resume does what an earlier run left out. Exit codes: 0 exact, 1 a layer differs or a step failed, 2 wrong options, 3 it cannot run here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_runner import driver, peers, plan, timing, vm
from gpu_runner.bundle import Bundle
from gpu_runner.refusal import Refusal

FORMAT = 1
ALIKE = ("gpu", "driver_cuda", "cpu", "python", "torch")  # what must be the same of machines whose figures stand in one report


class Checker:
    """Does the steps of a plan with the libraries of a bundle."""

    def __init__(self, bundle: Bundle, tvm_ffi: Any, cuda: driver.Driver | None) -> None:
        self.bundle, self.ffi, self.cuda = bundle, tvm_ffi, cuda
        self.stream = cuda.stream() if cuda else None

    def do(self, step: plan.Step) -> Any:
        """The result of a step."""
        try:
            if step.kind == "verify":
                return vm.verify(self._machine(step.key), self.bundle.entry(step.key))
            assert self.stream is not None and self.cuda is not None
            if step.kind == "limits":
                return peers.limits(self.stream)
            if step.kind == "peer":
                return self._peer(step.key)
            entry = self.bundle.entry(step.key)
            if step.kind == "products":
                return peers.products(peers.shapes_of(entry), self.stream)
            machine = self._machine(step.key, dense=True)
            return timing.layers(machine, entry, self.stream) if step.kind == "layers" else self._times(machine, entry)
        finally:
            gc.collect()  # a virtual machine's memory, before the next one takes its own

    def _machine(self, name: str, dense: bool = False) -> vm.Machine:
        return vm.Machine(self.ffi, self.bundle.library(name, dense), self.cuda is not None)

    def _times(self, machine: vm.Machine, entry: dict[str, Any]) -> dict[str, Any]:
        assert self.stream is not None and self.cuda is not None
        fields = timing.ours(machine, timing.images(entry, self.cuda.gpu.l2), self.stream)
        best = fields["graph"] or fields["launched"]
        return {**fields, "products": entry["products"], "tops": round(2e-9 * entry["products"] / best["median_ms"], 3)}

    def _peer(self, key: str) -> dict[str, Any]:
        assert self.stream is not None and self.cuda is not None
        place, _, peer = key.partition("/")
        net, _, batch = place.rpartition("-b")
        size = next(e["size"] for e in self.bundle.manifest["entries"] if e["net"] == net and e["batch"] == int(batch))
        return peers.network(net, peer, (int(batch), 3, size, size), self.stream, self.cuda.gpu.l2)


def describe(cuda: driver.Driver | None) -> dict[str, Any]:
    """The machine, JSON-ready."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        **(driver.describe(cuda.gpu) if cuda else {}), "cpu": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(), **(peers.versions() if cuda else {}),
    }  # fmt: skip


def earlier(path: Path, bundle: Bundle, machine: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier run of the same bundle on the same kind of machine.

    Raises Refusal, exit code 2, for any other file.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise Refusal(f"{path}: cannot be read as the JSON of an earlier run: {e}", 2) from e
    before = report.get("machine", {})
    if report.get("bundle") != bundle.sha256 or any(before.get(k) != machine.get(k) for k in ALIKE):
        raise Refusal(f"{path}: is of another bundle or another machine; remove it or leave --resume out", 2)
    return {**report, "seconds_before": report.get("seconds", 0)}


def keep(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report in one step; None: nowhere."""
    if path is not None:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.resolve().parent) as folder:
            made = Path(folder) / "report"
            made.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
            os.replace(made, path.resolve())


def check(args: argparse.Namespace) -> int:
    """Everything, from the options; returns the exit code."""
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise Refusal(f"{args.out}: cannot be written: no such folder", 2)
    cuda = driver.Driver() if args.device == "cuda" else None
    bundle = Bundle(args.bundle)
    target = bundle.manifest["targets"]
    if (target["kind"] == "cuda") != (cuda is not None):
        raise Refusal(f"{args.bundle}: was made for {bundle.manifest['target']}, and --device is {args.device}", 2)
    if cuda:
        driver.check(cuda.gpu, target["architectures"], bundle.manifest["producer"]["cuda"])
    machine = describe(cuda)
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        bundle.unpack_runtime(Path(folder))
        tvm_ffi = vm.prepare(Path(folder), cuda is not None)
        report = earlier(args.out, bundle, machine) if args.resume and args.out else {}
        report |= {"format": FORMAT, "bundle": bundle.sha256, "date": datetime.date.today().isoformat(), "machine": machine}
        report |= {k: bundle.manifest[k] for k in ("producer", "entries", "target", "keep")}
        without = peers.missing() if cuda else None
        report["without_peers"] = without
        wanted = [s for s in plan.steps(bundle.manifest["entries"], peers.PEERS, cuda is not None) if args.only in s.name and not (without and s.kind in plan.OF_TORCH)]
        run = plan.Run(report, args.budget_s, lambda: keep(args.out, report), lambda text: print(text, flush=True))
        run.go(wanted, Checker(bundle, tvm_ffi, cuda).do)
    keep(args.out, report)
    return conclude(report)


def conclude(report: dict[str, Any]) -> int:
    """Print the verdict; returns the exit code."""
    verified = report.get("verify", {})
    wrong = [name for name, row in verified.items() if not row["ok"]]
    unequal = [name for name, row in report.get("time", {}).items() if row.get("graph_equal") is False]
    for name in wrong:
        print(f"NOT EXACT: {name}: {verified[name]['first_difference']}")
    for name in unequal:
        print(f"NOT EQUAL: {name}: its graph computes something else than its kernels launched one by one")
    elements = sum(row["elements"] for row in verified.values())
    if verified and not wrong:
        print(f"exact: {len(verified)} libraries, {elements} elements, 0 different")
    elif not verified:
        print("nothing was verified")
    if report["failed"]:
        print(f"failed: {', '.join(report['failed'])}")
    if report["without_peers"]:
        print(f"nothing stands beside: {report['without_peers']}")
    if report["left_out"]:
        print(f"left out, because the time was over (continue with --resume): {', '.join(report['left_out'])}")
    return 1 if wrong or unequal or report["failed"] or not verified else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, metavar="FOLDER", help="default: the folder of this file")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--budget-s", type=float, default=500, metavar="SECONDS", help="begin nothing that would end later (default: 500)")
    parser.add_argument("--resume", action="store_true", help="keep the results in --out and do what is missing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only steps whose name contains TEXT, such as 'verify case' or 'resnet50'")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a bundle that was made for CPUs (default: cuda)")
    args = parser.parse_args(argv)
    try:
        return check(args)
    except Refusal as e:
        print(f"gpu-check: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
