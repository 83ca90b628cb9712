"""Tiles raced on other machines: every server of a key measures workloads of its own; what a lost one had begun is
measured elsewhere.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from hawq_tvm.core.errors import LostError, RemoteError, UsageError
from hawq_tvm.measure.race import Result, Run, judge, library
from hawq_tvm.remote.packaged import opened
from hawq_tvm.remote.session import Session, connect, exported
from hawq_tvm.remote.tracker import Servers, reach
from hawq_tvm.targets import target as targets
from schedules.rule import Kernel

Array = NDArray[Any]
TIMED = 3  # calls of a kernel in one turn; another one before them is not timed
ATTEMPTS = 2  # servers that may be lost while they measure one workload: perhaps it is the workload that ends them


@dataclass
class Job:
    """One workload to be raced.

    what: its first layer.  kernels: builds them.  outputs: shape and dtype of each.  losses: servers that were lost
    while they measured it.
    """

    number: int
    what: str
    kernels: Callable[[], Sequence[Kernel]]
    inputs: Sequence[Array]
    outputs: Sequence[tuple[tuple[int, ...], str]]
    losses: int = 0
    built: tuple[Sequence[Kernel], list[str], bytes] | None = None


@dataclass
class _Board:
    """What is left to do, for all workers; `unfinished` counts what is being measured, too."""

    waiting: deque[Job]
    unfinished: int
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> Job | None:
        """The next job; None when there will be none any more."""
        with self.changed:
            while not self.waiting and self.unfinished and not self.stop.is_set():
                self.changed.wait(0.1)
            return self.waiting.popleft() if self.waiting and not self.stop.is_set() else None

    def done(self) -> None:
        """A job was measured, or given up."""
        with self.changed:
            self.unfinished -= 1
            self.changed.notify_all()

    def again(self, job: Job) -> None:
        """A job is to be measured by whoever is free next."""
        with self.changed:
            self.waiting.appendleft(job)
            self.changed.notify_all()


class Crew:
    """The servers with one key, as a place where tiles are raced.

    target: what to build for; "host" means the servers' own CPU.  threads: of TVM's pool there (None: as many as it
    takes by itself).
    served: the workloads that each server measured.  notes: what went wrong with servers, in sentences.  failed:
    workloads that were given up.
    Raises RemoteError when there is no server that suits, UsageError for a target of another kind.
    """

    def __init__(self, servers: Servers, target: str, threads: int | None) -> None:
        self._servers = servers
        with opened(servers) as session:
            self.target, self.cpu = _target(target, session), session.machine.cpu or "unknown"
            self._suits(session)
            self.threads = session.threads(threads)
        self.served: Counter[str] = Counter()
        self.notes: list[str] = []
        self.failed = 0
        self._building = threading.Lock()

    def _suits(self, session: Session) -> None:
        if (session.machine.cpu or "unknown") != self.cpu:
            raise RemoteError(
                "is another machine than the first server of this key, so their times cannot be compared",
                where=session.name,
                expected=self.cpu,
                found=session.machine.cpu or "unknown",
                remedy="give each kind of machine a key of its own",
            )
        session.check(
            targets.architecture(self.target),
            targets.required_features(self.target),
            str(tvm.__version__),
            "what is tuned",
        )

    def measure(self, jobs: Sequence[Job], begins: Callable[[Job], None]) -> Generator[tuple[Job, Result], None, None]:
        """Every job's result as it comes; `begins` is called when a server takes a job.

        Raises RemoteError when no server is left.
        """
        board = _Board(deque(jobs), len(jobs))
        events: queue.SimpleQueue[tuple[Job, Result | None]] = queue.SimpleQueue()
        count = max(1, min(self._count(), len(jobs)))
        with ThreadPoolExecutor(count) as pool:
            workers = [pool.submit(self._work, board, events) for _ in range(count)]
            try:
                while board.unfinished or not events.empty():
                    try:
                        job, result = events.get(timeout=0.1)
                    except queue.Empty:
                        self._check_alive(workers, board)
                        continue
                    if result is None:
                        begins(job)
                    else:
                        yield job, result
            finally:
                # Workers end after their kernel's turn: a server whose client goes away before it is answered serves
                # nobody any more.
                board.stop.set()

    def _count(self) -> int:
        tracker = reach(self._servers)
        if tracker is None:
            return 1
        with tracker:
            return tracker.count()

    def _check_alive(self, workers: Sequence[Future[None]], board: _Board) -> None:
        for worker in workers:
            if worker.done():
                worker.result()  # what it raised
        if board.unfinished and all(w.done() for w in workers):
            raise RemoteError(
                "no server is left",
                where=self._servers.where,
                found="; ".join(self.notes),
                remedy="what was measured is kept: start the servers again, and repeat the command",
            )

    # -- a worker --------------------------------------------------------------------------------------------

    def _work(self, board: _Board, events: queue.SimpleQueue[tuple[Job, Result | None]]) -> None:
        """Measure jobs until none is left, on one server, or on others after it was lost."""
        while (session := self._session(board)) is not None:
            with session:
                self._serve(session, board, events)

    def _serve(self, session: Session, board: _Board, events: queue.SimpleQueue[tuple[Job, Result | None]]) -> None:
        while (job := board.take()) is not None:
            events.put((job, None))
            try:
                result = self._race(session, job, board.stop)
            except LostError as e:
                self._lost(job, e, board)
                return
            self.served[session.address] += 1
            events.put((job, result))
            board.done()

    def _lost(self, job: Job, error: LostError, board: _Board) -> None:
        if board.stop.is_set():
            return
        job.losses += 1
        if job.losses < ATTEMPTS:
            self.notes.append(
                f"{error.where} {error.message} while it measured {job.what}, which is to be measured again elsewhere"
                f" ({error.found})"
            )
            board.again(job)
        else:
            self.notes.append(
                f"{error.where} {error.message} while it measured {job.what}, the second server: the workload was given"
                f" up ({error.found})"
            )
            self.failed += 1
            board.done()

    def _session(self, board: _Board) -> Session | None:
        """A session that suits; None when nothing is left to do, or no server is left for this worker, which is
        noted.
        """
        for attempt in range(ATTEMPTS):
            if not board.unfinished or board.stop.is_set():
                return None
            try:
                tracker = reach(self._servers)
                if tracker is None:
                    session = connect(self._servers, None)
                else:
                    with tracker:
                        session = connect(self._servers, tracker, board.stop)
                return session and self._ready(session)
            except LostError as e:
                if attempt + 1 == ATTEMPTS:
                    self._note(e, board)
            except RemoteError as e:
                self._note(e, board)
                break
        return None

    def _ready(self, session: Session) -> Session:
        try:
            self._suits(session)
            if (number := session.threads(self.threads)) != self.threads:
                raise RemoteError(
                    "has another number of threads", where=session.name, expected=str(self.threads), found=str(number)
                )
        except RemoteError:
            session.close()
            raise
        return session

    def _note(self, error: RemoteError, board: _Board) -> None:
        if board.unfinished and not board.stop.is_set():
            self.notes.append(str(error))

    def _race(self, session: Session, job: Job, stop: threading.Event) -> Result:
        with self._building:  # one at a time: TVM's passes and LLVM share settings of the process
            if job.built is None:
                kernels = job.kernels()
                module, names = library(kernels, self.target)
                job.built = kernels, names, exported(module, targets.architecture(self.target))
        kernels, names, code = job.built
        module = session.load(code, "workload.so")
        with session.talking(f"measuring {job.what}"):
            inputs = [tvm.runtime.tensor(np.asarray(x, order="C"), session.device) for x in job.inputs]
            runs = [
                _run(
                    session,
                    module,
                    name,
                    [*inputs, *(tvm.runtime.tensor(a, session.device) for a in kernel.arguments)],
                    job.outputs,
                )
                for name, kernel in zip(names, kernels, strict=True)
            ]
            return judge(runs, stop)


def _run(
    session: Session,
    module: tvm.runtime.Module,
    name: str,
    arguments: Sequence[tvm.runtime.Tensor],
    outputs: Sequence[tuple[tuple[int, ...], str]],
) -> Run:
    """A kernel there, timed by the clock there."""
    results = [tvm.runtime.tensor(np.zeros(shape, dtype), session.device) for shape, dtype in outputs]
    evaluator = module.time_evaluator(name, session.device, number=1, repeat=TIMED)
    return Run(
        partial(module[name], *arguments, *results),
        results,
        lambda: [1e9 * t for t in evaluator(*arguments, *results).results],
    )


def _target(text: str, session: Session) -> tvm.target.Target:
    if text != "host":
        parsed = targets.parse(text)
        if targets.gpu_architectures(parsed):
            raise UsageError(
                "tiles for a GPU are not measured over RPC",
                where=f"--target {text}",
                expected="a CPU",
                found="a GPU",
                remedy="use --export DIR and run DIR/run.py on the machine with the GPU",
            )
        return parsed
    m = session.machine
    if m.cpu is None or m.features is None or m.architecture is None:
        raise UsageError(
            "the server does not say which CPU it has",
            where="--target host",
            found=session.name,
            remedy="name the --target",
        )
    here = targets.architecture(tvm.target.Target({"kind": "llvm"})) == m.architecture
    return targets.of_cpu(m.cpu, m.features, session.permit_tiles, "" if here else f"{m.architecture}-linux-gnu")
