#!/usr/bin/env python3
"""Compile the candidate kernels beside this file, check them against each other and time them on this machine's GPU.

    python run.py [--budget SECONDS]

Needs nvcc, an NVIDIA driver and Python with NumPy. Writes times.json beside this file, workload by workload, those that take the
model most time first; started again it continues. Then, where the model was exported:

    hawq-tvm tune --import times.json -o records.json

exit codes: 0 ok, 1 a candidate is wrong or cannot be built, 3 this machine cannot run it
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

try:
    import numpy as np
    from contest import Contest
    from gpu import FOREIGN_CODE, OUT_OF_MEMORY, CannotRun, CudaError, Gpu
    from plan import FORMAT, TIMES, identity
except ImportError as missing:
    print(f"run.py: needs Python with NumPy and the files beside it: {missing}", file=sys.stderr)
    sys.exit(3)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def manifest() -> dict[str, Any]:
    """The manifest beside this file.

    Raises CannotRun when it or a file that it names is missing or another.
    """
    try:
        found = json.loads((HERE / "manifest.json").read_bytes())
        if found["format"] != FORMAT or found["id"] != identity(found["plan"]):
            raise CannotRun(f"manifest.json is damaged or of another version (this is {FORMAT!r}): export it again")
        for name, digest in found["files"].items():
            if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
                raise CannotRun(f"{name} is damaged: export it again")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CannotRun(f"manifest.json cannot be used ({type(e).__name__}: {e}): export it again") from None
    return found


def find_nvcc() -> str | None:
    """nvcc: of PATH, of CUDA_HOME, or in its usual place; None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def release(command: str) -> str:
    """The toolkit's version."""
    text = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"release (\d+\.\d+)", text)
    return number[1] if number else "unknown"


def compile_all(sources: list[str], options: list[str], until: float) -> dict[str, Path | str]:
    """The cubin of every source, or nvcc's first error; by all cores, until it is late. What was compiled before is kept.

    Raises CannotRun when nvcc is needed and missing.
    """
    folder = HERE / "build"
    folder.mkdir(exist_ok=True)
    found: dict[str, Path | str] = {}
    names = {s: folder / f"{Path(s).stem}.{identity([options, (HERE / s).read_text()])[:16]}.cubin" for s in sources}
    found.update({s: p for s, p in names.items() if p.exists()})
    missing = [s for s in sources if s not in found]
    if not missing:
        return found
    command, cores, start = find_nvcc(), len(os.sched_getaffinity(0)), time.monotonic()
    if command is None:
        raise CannotRun("nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit")

    def build(source: str) -> Path | str | None:
        if time.monotonic() > until:
            return None
        with tempfile.TemporaryDirectory(prefix=".nvcc.", dir=folder) as place:
            made = Path(place) / names[source].name
            done = subprocess.run([command, *options, "-o", str(made), str(HERE / source)], cwd=folder, capture_output=True, text=True)
            if done.returncode < 0:
                return f"nvcc was killed by {signal.Signals(-done.returncode).name}" + (": memory ran out?" if done.returncode == -signal.SIGKILL else "")
            if done.returncode:
                lines = (done.stderr + done.stdout).splitlines()
                return next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else f"exit code {done.returncode}")
            os.replace(made, names[source])
        return names[source]

    told = 0.0
    with ThreadPoolExecutor(cores) as pool:
        futures = {pool.submit(build, s): s for s in missing}
        for number, future in enumerate(as_completed(futures), 1):
            if (one := future.result()) is not None:
                found[futures[future]] = one
            if time.monotonic() - told > 2 or number == len(missing):
                told = time.monotonic()
                say(f"compiled {number} of {len(missing)} sources on {cores} cores, {told - start:.0f} s")
    return found


def load_times(identifier: str, plan: Any, gpu: Gpu) -> dict[str, Any]:
    """What earlier runs on the same kind of GPU measured, or nothing."""
    fresh: dict[str, Any] = {"format": TIMES, "id": identifier, "plan": plan, "machine": {"gpu": gpu.name, "driver": gpu.driver}, "workloads": {}, "failed": {}}
    try:
        found = json.loads((HERE / "times.json").read_bytes())
        if found["format"] == TIMES and found["id"] == identifier and found["machine"]["gpu"] == gpu.name and isinstance(found["workloads"], dict):
            return {**fresh, "machine": {**found["machine"], **fresh["machine"]}, "workloads": found["workloads"], "failed": found["failed"]}
        say("times.json is of another export or GPU and is replaced")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        say("times.json is damaged and is replaced")
    return fresh


def save(times: dict[str, Any]) -> None:
    """Write times.json, whole."""
    with tempfile.TemporaryDirectory(prefix=".times.", dir=HERE) as folder:
        made = Path(folder) / "times.json"
        made.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n")
        os.replace(made, HERE / "times.json")


def measure(gpu: Gpu, entry: dict[str, Any], cubins: dict[str, Path], constants: Any, known: dict[str, str], until: float) -> dict[str, Any]:
    """What times.json holds of a workload."""
    contest = Contest(gpu, entry, cubins, constants, known)
    try:
        varied = contest.compare()
        medians, how = contest.times(until) if contest.right() else ({}, {})
        late = [i for i in contest.failed if i in medians]
        return {
            "median_us": [round(medians[i] * 1e6, 4) if i in medians and i not in late else None for i in range(len(contest.candidates))],
            "wrong": contest.wrong, "failed": {str(i): why for i, why in sorted(contest.failed.items())}, "varied": varied, **how,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }  # fmt: skip
    finally:
        contest.close()


def report(entry: dict[str, Any], planned: dict[str, Any], result: dict[str, Any], progress: str) -> None:
    """Lines about a workload that is done."""
    name, tiles = f"{planned['layers'][0]} ({len(planned['layers'])} layers)", [c["text"] for c in entry["candidates"]]
    for i in result["wrong"]:
        say(f"WRONG  {name}: {tiles[i]} computes something else than most candidates")
    for i, why in result["failed"].items():
        say(f"FAILED {name}: {tiles[int(i)]}: {why}")
    if not result["varied"]:
        say(f"note   {name}: every element of the outputs is the same, so they tell little")
    timed = {i: t for i, t in enumerate(result["median_us"]) if t is not None}
    if timed:
        best = min(timed, key=lambda i: timed[i])
        default = f"{timed[0]:.2f} us" if 0 in timed else "no time"
        say(f"{progress}  {name}: {len(timed)} candidates, the model's {default}, fastest {timed[best]:.2f} us ({tiles[best]})")


def work(budget: float) -> int:
    """Everything; returns the exit code."""
    until = time.monotonic() + budget
    found = manifest()
    plan, entries, arch = found["plan"]["workloads"], found["workloads"], found["plan"]["arch"]
    gpu = Gpu()
    if f"sm_{gpu.capability}" != arch:
        raise CannotRun(f"the candidates are for {arch}, and this GPU ({gpu.name}) is sm_{gpu.capability}: export them with --target cuda-sm{gpu.capability}")
    times = load_times(found["id"], found["plan"], gpu)
    todo = [i for i in sorted(range(len(plan)), key=lambda i: -entries[i]["priority"]) if plan[i]["key"] not in times["workloads"]]
    say(f"{gpu.name}: {len(todo)} of {len(plan)} workloads to measure, {budget:.0f} s")
    sources = list(dict.fromkeys(c["source"] for i in todo for c in entries[i]["candidates"]))
    # A third of the time at least for what is compiled to be measured.
    compiled = compile_all(sources, found["nvcc"], until - budget / 3)
    for source, made in compiled.items():
        if isinstance(made, str):
            say(f"FAILED {source}: nvcc refuses it: {made}")
    cubins = {s: p for s, p in compiled.items() if isinstance(p, Path)}
    if command := find_nvcc():
        times["machine"]["nvcc"] = release(command)
    gpu.begin()
    with np.load(HERE / "constants.npz", allow_pickle=False) as constants:
        done = 0
        for i in todo:
            needed = {c["source"] for c in entries[i]["candidates"]}
            if time.monotonic() > until or not needed <= set(compiled):
                continue
            key = plan[i]["key"]
            try:
                result = measure(gpu, entries[i], cubins, constants, times["failed"].get(key, {}), until)
            except CudaError as e:
                return broken(e, times, key, plan[i])
            times["workloads"][key] = result
            save(times)
            done += 1
            report(entries[i], plan[i], result, f"{done} of {len(todo)}")
    left = len(todo) - done
    say(f"{HERE / 'times.json'}: {len(plan) - left} of {len(plan)} workloads" + (f"; {left} are left: run it again, or with a larger --budget" if left else ""))
    return 1 if any(w["wrong"] or w["failed"] for w in times["workloads"].values()) else 0


def broken(e: CudaError, times: dict[str, Any], key: str, planned: dict[str, Any]) -> int:
    """What is left to do after an error that this process cannot go on from."""
    if e.code in FOREIGN_CODE:
        raise CannotRun(f"the driver refuses what nvcc made: {e}; update the driver, or use an older CUDA toolkit")
    if e.code == OUT_OF_MEMORY:
        raise CannotRun(f"the GPU's memory is full ({e}): end other programs that use it (nvidia-smi)")
    candidate = getattr(e, "candidate", None)
    if candidate is None:
        raise CannotRun(f"the GPU failed: {e}")
    times["failed"].setdefault(key, {})[str(candidate)] = str(e)
    save(times)
    say(f"FAILED {planned['layers'][0]}: candidate {candidate} ({planned['tiles'][candidate]}) broke the GPU's context: {e}; run it again to go on without it")
    return 1


def main() -> int:
    """Read the options and do everything."""
    parser = argparse.ArgumentParser(description="Time exported candidate kernels on this machine's GPU.")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="do not begin a workload after so long (default: 480)")
    try:
        return work(parser.parse_args().budget)
    except (CannotRun, CudaError) as e:
        say(f"run.py: {e}")
        return 3
    except KeyboardInterrupt:
        say("interrupted; what was measured is in times.json, and the same command continues")
        return 130


if __name__ == "__main__":
    sys.exit(main())
