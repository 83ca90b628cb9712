"""A tracker and servers of TVM's own on this machine, each a process group that is killed at the end."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import RemoteError
from hawq_tvm.remote.tracker import Servers, parse, reach

from ..models import Graph, float_output, residual_net

HOST = "127.0.0.1"
PATIENCE = 90  # seconds that a busy machine may take to start a process that imports TVM


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


class Process:
    """`python -m tvm.exec.NAME` in a process group of its own; its output goes to a file."""

    def __init__(self, folder: Path, number: int, name: str, *options: str) -> None:
        self.port, self.log = free_port(), folder / f"{number}.log"
        command = [
            sys.executable,
            "-m",
            f"tvm.exec.{name}",
            "--host",
            HOST,
            "--port",
            str(self.port),
            "--port-end",
            str(self.port + 1),
            *options,
        ]
        # TVM imports PyTorch where it is installed, which takes most of the start and which nobody here needs.
        (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
        environment = {**os.environ, "TVM_NUM_THREADS": "1", "TVM_BIND_THREADS": "0", "PYTHONPATH": str(folder)}
        with self.log.open("w") as out:
            self._popen = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it started."""
        try:
            os.killpg(self._popen.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._popen.wait(30)
        end = time.monotonic() + 10
        while self._alive() and time.monotonic() < end:
            time.sleep(0.05)
        assert not self._alive(), "processes are left"

    def _alive(self) -> bool:
        """Whether anything of the group runs; what init has not yet reaped does not count."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self._popen.pid and state != "Z":
                return True
        return False


class Cluster:
    """A tracker, and the servers started so far."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, list[Process]()
        self.tracker = self.start("rpc_tracker")
        self.lonely = self.tracker

    def start(self, name: str, *options: str) -> Process:
        made = Process(self._folder, len(self._processes), name, *options)
        self._processes.append(made)
        return made

    def servers(self, key: str, count: int) -> list[Process]:
        """Servers that the tracker will know."""
        return [self.start("rpc_server", "--tracker", self.tracker.address, "--key", key) for _ in range(count)]

    def at(self, key: str, timeout: float = 30) -> Servers:
        return parse(self.tracker.address, key, timeout)

    def wait_for(self, key: str, count: int) -> None:
        """Until the tracker knows so many servers with a key."""

        def known() -> bool:
            with reach(self.at(key)) as tracker:  # type: ignore[union-attr]
                return tracker.count() >= count

        self.wait_until(known)

    def wait_until(self, there: Callable[[], bool]) -> None:
        """Until something answers as it should."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(RemoteError):
                if there():
                    return
            time.sleep(0.1)
        raise AssertionError("\n".join(p.log.read_text() for p in self._processes))

    def kill(self) -> None:
        for one in self._processes:
            one.kill()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A tracker, two servers with the key "two", and "lonely", who has no tracker; tests may start others and kill
    them.
    """
    for needed in ("tornado", "psutil", "cloudpickle"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"TVM's tracker and servers need {needed}: pip install 'hawq-tvm[remote]'")
    made = Cluster(tmp_path_factory.mktemp("rpc"))
    try:
        # A server that finds no tracker waits five seconds before it looks again.
        made.wait_until(lambda: reach(made.at("")) is not None)
        made.servers("two", 2)
        made.lonely = made.start("rpc_server", "--key", "lonely")
        made.wait_for("two", 2)
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="package")
def package() -> ht.Package:
    return ht.compile(residual_net())


@pytest.fixture(scope="package")
def saved(package: ht.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.save(tmp_path_factory.mktemp("packages") / "m.hawq")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit code, standard output, and standard error."""
    from hawq_tvm.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def several_layers(layers: int = 5) -> onnx.ModelProto:
    """A chain of convolutions of different sizes: as many workloads."""
    g = Graph(7)
    channels, x = 16, g.qdq(g.input("x", [1, 16, 7, 7]), 0.02, 128)
    for i in range(layers):
        wider = channels + 16
        x = g.qdq(g.conv(x, g.weight([wider, channels, 1, 1])), 0.5 + 0.1 * i, 100)
        channels = wider
    return g.model([float_output(x)])
