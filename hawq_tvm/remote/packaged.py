"""A package that runs on another machine: its outputs, and its times by that machine's own clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.core import work
from hawq_tvm.core.errors import UsageError
from hawq_tvm.measure.measure import BenchReport, checked_threads
from hawq_tvm.package.made import LIBRARY
from hawq_tvm.package.package import Package

from .session import Session, connect
from .tracker import Servers, reach

Array = NDArray[Any]
PART = 0.5  # seconds of inferences between two answers of the server, or a quarter of the time that one may take
MOST = 10_000


class RemotePackage:
    """A package, loaded on a server.

    threads: of TVM's pool there (None: as many as it takes by itself).
    Raises RemoteError when that machine cannot run it, UsageError for a package for a GPU.
    """

    def __init__(self, package: Package, session: Session, threads: int | None = None) -> None:
        if package.on_gpu:
            raise UsageError(
                "packages for a GPU are not run over RPC",
                where="--rpc",
                expected="a package for a CPU",
                found=package.name,
                remedy="run it on a machine with the GPU",
            )
        target, producer = package.manifest["target"], package.manifest["producer"]
        session.check(target["architecture"], target["cpu_features"], producer["tvm"], package.name)
        self.package, self._session = package, session
        self.threads = session.threads(threads)
        module = session.load(package.library.read_bytes(), LIBRARY)
        with session.talking(f"opening {LIBRARY}"):
            self._vm = relax.VirtualMachine(module, session.device)

    def give(self, inputs: Mapping[str, Array]) -> None:
        """Copy the inputs there.

        Raises InputError naming the input that does not fit.
        """
        ready = self.package.prepare(inputs)
        tensors = [self._session.tensor(ready[i.name]) for i in self.package.inputs]
        with self._session.talking("copying the inputs"):
            self._vm.set_input("main", *tensors)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One inference: outputs by name, as `Package.run` has them."""
        self.give(inputs)
        with self._session.talking("running an inference"):
            self._vm.invoke_stateful("main")
            result = self._vm.get_outputs("main")
            return self.package._named([result[i].numpy() for i in range(len(self.package.outputs))])

    def times_ms(self, count: int) -> list[float]:
        """The milliseconds of `count` inferences, one by one, of the inputs that were given, after one that is not
        timed.
        """
        with self._session.talking("timing inferences"):
            timed = self._vm.time_evaluator("invoke_stateful", self._session.device, number=1, repeat=count)("main")
        return [1000 * float(t) for t in timed.results]

    def measure(self, warmup_ms: float, duration: float, iterations: int) -> tuple[float, ...]:
        """The milliseconds of at least `iterations` inferences and `duration` seconds of them, after `warmup_ms` of
        others.
        """
        first = max(self.times_ms(1)[0], 1e-3)
        part = 1000 * min(PART, self._session.servers.timeout / 4)
        count = max(1, min(MOST, int(part / first)))
        warmed = first
        while warmed < warmup_ms:
            warmed += sum(self.times_ms(min(count, 1 + int((warmup_ms - warmed) / first))))
        times: list[float] = []
        while len(times) < iterations or sum(times) < 1000 * duration:
            left = max(iterations - len(times), int((1000 * duration - sum(times)) / first))
            times += self.times_ms(max(1, min(count, left)))
        return tuple(times)


def opened(servers: Servers) -> Session:
    """A session on a server of a tracker, or on the server itself.

    Raises RemoteError when there is none.
    """
    tracker = reach(servers)
    if tracker is None:
        session = connect(servers, None)
    else:
        with tracker:
            session = connect(servers, tracker)
    assert session is not None
    return session


def run(package: Package, inputs: Mapping[str, Array], servers: Servers, tail: bool = True) -> dict[str, Array]:
    """One inference on another machine; a float end that was cut off runs here, unless `tail` is False.

    Raises RemoteError, or InputError for inputs that do not fit, before anybody is asked.
    """
    ready = package.prepare(inputs)
    with opened(servers) as session:
        found = RemotePackage(package, session).run(inputs)
    return package.joined(ready, found) if tail else found


def alone(
    package: Package,
    servers: Servers,
    inputs: Mapping[str, Array] | None = None,
    *,
    warmup_ms: float = 200,
    duration: float = 3,
    iterations: int = 10,
    threads: int | None = None,
) -> dict[str, Any]:
    """A package's times on another machine by its clock, so that no network is in them, JSON-ready: the fields of a
    measurement here and `rpc`.

    threads: None leaves it to TVM there.  What that machine could do at most is not measured: `limits` is None.
    Raises RemoteError, UsageError for numbers that make no sense.
    """
    checked_threads(warmup_ms, duration, iterations, threads)
    given = package.prepare(inputs) if inputs is not None else package.random_inputs(1, 0)[0]
    with opened(servers) as session:
        there = RemotePackage(package, session, threads)
        there.give(given)
        times = there.measure(warmup_ms, duration, iterations)
        m = session.machine
        described = {"cpu": m.cpu, "architecture": m.architecture, "tvm": m.tvm}
        report = BenchReport(package.name, described, there.threads, warmup_ms, times)
    products = work.products(package.graph)
    return {
        **report.to_dict(),
        "rpc": {"address": f"{servers.host}:{servers.port}", "key": servers.key, "server": session.address},
        "products": products,
        "tops": round(2e-9 * products / float(np.median(times)), 5),
        "share_of_limit": None,
        "limits": None,
    }
