"""A process that makes or judges files one after the other, and prints a line of JSON for each; what ends it, such as
an error of a tool, costs the one file that it was at.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core import processes
from hawq_tvm.core.errors import HawqError

FAILED = "failed"
DRAWS = 2  # inputs that no tool has measured on
Task = tuple[str, ...]
Done = Callable[[Task, dict[str, Any]], None]


def run(tasks: Sequence[Task], seconds: float, done: Done) -> None:
    """Do tasks in processes of their own: ("make", network, exporter, producer, source, target), without a producer for
    the float file, ("judge", network, file) or ("inspect", network, file).

    seconds: that one may take.  done: is given each with what was found, or FAILED and the sentence.
    """
    left = list(tasks)
    while left:
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", __name__, json.dumps(left)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            late = threading.Event()
            timer = _timer(seconds, process, late)
            for line in process.stdout:
                if line.startswith("{"):
                    timer.cancel()
                    done(left.pop(0), json.loads(line))
                    timer = _timer(seconds, process, late)
            code = process.wait()
            timer.cancel()
            errors.seek(0)
            said = errors.read()
        if left:
            ended = subprocess.CompletedProcess(command, code, "", said)
            why = f"not done in {seconds:g} s" if late.is_set() else processes.failure(ended, "")["found"]
            done(left.pop(0), {"verdict": FAILED, "sentence": why})


def _timer(seconds: float, process: subprocess.Popen[str], late: threading.Event) -> threading.Timer:
    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main() -> int:
    """Do the tasks that are given as JSON."""
    for task in json.loads(sys.argv[1]):
        try:
            found = WORK[task[0]](*task[1:])
        except HawqError as e:
            found = {"verdict": FAILED, "sentence": str(e)}
        print(json.dumps(found), flush=True)
    return 0


def _make(network: str, exporter: str, producer: str, source: str, target: str) -> dict[str, Any]:
    from .networks import NETWORKS
    from .tools import PRODUCERS, quietly

    net = NETWORKS[network]
    if producer:
        quietly(lambda: PRODUCERS[producer].make(net, Path(source), Path(target)))
    else:
        quietly(lambda: net.export(exporter, Path(target)))
    return {"verdict": "made"}


def _inspect(network: str, path: str) -> dict[str, Any]:
    del network
    from .judge import inspected

    return inspected(Path(path))


def _judge(network: str, path: str) -> dict[str, Any]:
    from .judge import judge
    from .networks import BATCHES, NETWORKS

    return judge(Path(path), [NETWORKS[network].inputs(BATCHES + i) for i in range(DRAWS)])


WORK: dict[str, Callable[..., dict[str, Any]]] = {"make": _make, "judge": _judge, "inspect": _inspect}

if __name__ == "__main__":
    sys.exit(main())
