"""One session on another machine: what that machine is, whether it suits, libraries and arrays on it, and what went
wrong.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import queue
import re
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import relax, rpc, tirx
from tvm.script import tirx as T

from hawq_tvm.core.errors import LostError, RemoteError
from hawq_tvm.targets import cpu as cpus

from .tracker import START_SERVER, Found, Servers, Tracker

Array = NDArray[Any]


@dataclass(frozen=True)
class Machine:
    """What a server says about itself; None for what it cannot say.

    cpu: LLVM's name of it.  features: LLVM's names of the extensions that the CPU has and its operating system lets
    programs use.
    """

    architecture: str | None
    cpu: str | None
    features: frozenset[str] | None
    tvm: str | None


def connect(servers: Servers, tracker: Tracker | None, stop: threading.Event | None = None) -> Session | None:
    """A session on the next free server of a tracker, or on the server that is there itself; None when `stop` was
    set before.

    Raises RemoteError when there is none, LostError when the server that a tracker named does not answer.
    """
    if tracker is None:
        return Session(servers, Found(servers.host, servers.port, servers.key))
    tracker.count()
    found = tracker.next_free(stop)
    return None if found is None else Session(servers, found)


class Session:
    """A session with a server, and what is said to it.

    Every wait for an answer ends after `servers.timeout` seconds; afterwards the session is over, and so it is for
    all that lies there.
    Raises RemoteError when the server refuses.
    """

    def __init__(self, servers: Servers, found: Found) -> None:
        self.servers, self.address = servers, f"{found.host}:{found.port}"
        self.name = f"{servers.key or 'server'} at {self.address}"
        self._rpc = _connected(servers, found, self.name)
        self._sockets = _limited(found, servers.timeout)
        self._numbers = itertools.count()
        self.device = self._rpc.cpu()
        with self.talking("asking for its CPU"):
            self.machine = self._describe()

    # -- talking ---------------------------------------------------------------------------------------------

    @contextmanager
    def talking(self, what: str) -> Iterator[None]:
        """Errors of TVM's RPC as one sentence.

        Raises RemoteError for what failed there, LostError when no answer came; the session is over then.
        """
        try:
            yield
        except tvm.error.RPCError as e:
            raise RemoteError(f"{what} failed there", where=self.name, found=_told(e)) from e
        except tvm.error.InternalError as e:
            self.close()
            if os.strerror(errno.EAGAIN) in str(e):  # what the limit of `_limited` ends in
                found = f"no answer within {self.servers.timeout:g} s while {what}"
                raise LostError(
                    "does not answer any more",
                    where=self.name,
                    found=found,
                    remedy="see what the server printed, or give a longer --rpc-timeout",
                ) from e
            raise LostError(
                "was lost",
                where=self.name,
                found=f"the connection ended while {what}",
                remedy="see what the server printed, start it again, and repeat the command",
            ) from e

    def close(self) -> None:
        """End the session.

        Objects that lie there are freed by messages; through a closed connection these fail at once instead of
        waiting each.
        """
        while self._sockets:
            one = self._sockets.pop()
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _function(self, name: str) -> Callable[..., Any] | None:
        """A function of the server's TVM, or None where it has none of that name."""
        try:
            found: Callable[..., Any] = self._rpc.get_function(name)
            return found
        except AttributeError:
            return None

    # -- the machine -----------------------------------------------------------------------------------------

    def _describe(self) -> Machine:
        wanted = (
            "target.llvm_get_system_triple",
            "target.llvm_get_system_cpu",
            "tvm.codegen.llvm.GetHostCPUFeatures",
            "ffi.ToJSONGraphString",
        )
        triple, cpu, features, as_json = (self._function(name) for name in wanted)
        have = None
        if features is not None and as_json is not None:
            with suppress(tvm.error.RPCError):  # another version's functions: not known
                table = tvm_ffi.get_global_func("ffi.FromJSONGraphString")(str(as_json(features(), None)))
                have = frozenset(str(name) for name, there in table.items() if int(there))
        architecture = _architecture(str(triple())) if triple else None
        if architecture == "aarch64" and have is not None:
            # LLVM tells few of this architecture's extensions: neither dotprod nor i8mm.
            have = self._reported(architecture) or have
        return Machine(architecture, str(cpu()) if cpu else None, have, self._tvm_version())

    def _reported(self, architecture: str) -> frozenset[str] | None:
        """The extensions that the kernel there reports; None where nothing for it can be linked here, or there is no
        such file.
        """
        try:
            text = self.read_file("/proc/cpuinfo", architecture)
        except RemoteError:
            return None
        return frozenset(cpus.features_of(text.decode(errors="replace"), architecture)) or None

    def read_file(self, path: str, architecture: str) -> bytes:
        """A file there, also one that has no size.

        Raises RemoteError when no linker for the architecture is here, or nothing can be read.
        """
        library = self._helper(read_kernel(), architecture, "read_file")
        name, data = (
            self.tensor(np.frombuffer(path.encode().ljust(PATH_BYTES, b"\0"), np.uint8)),
            self.tensor(np.zeros(READ_BYTES, np.uint8)),
        )
        found = b""
        with self.talking(f"reading {path}"):
            while True:
                place = self.tensor(np.array([len(found), 0]))
                library["read_file"](name, data, place)
                count = int(place.numpy()[1])
                if count < 0:
                    raise RemoteError("cannot be read there", where=f"{self.name}: {path}")
                if count == 0:
                    return found
                found += data.numpy()[:count].tobytes()

    def _helper(self, kernel: tirx.PrimFunc, architecture: str, name: str) -> tvm.runtime.Module:
        """A function of ours, compiled for the least processor of an architecture and loaded there."""
        target = tvm.target.Target({"kind": "llvm", "mtriple": f"{architecture}-linux-gnu"})
        return self.load(
            exported(tvm.tirx.build(tvm.IRModule({name: kernel}), target=target), architecture), f"{name}.so"
        )

    def _tvm_version(self) -> str | None:
        """The server's version of TVM, which no function returns; but what it prints of a constant names it."""
        wanted = ("ffi.FromJSONGraphString", "ffi.Map", "node.PrinterConfig", "node.TVMScriptPrinterScript")
        parse, table, configure, script = (self._function(name) for name in wanted)
        if parse is None or table is None or configure is None or script is None:
            return None
        try:
            constant = parse(tvm.ir.save_json(relax.const(np.zeros(1, np.int8), "int8")))
            printed = str(script(constant, configure(table("show_meta", True))))
        except tvm.error.RPCError:  # another version's functions
            return None
        found = re.search(r'tvm_version\\": \\"([^"\\]+)', printed)
        return found.group(1) if found else None

    def check(self, architecture: str, features: Sequence[str], version: str, where: str) -> None:
        """Refuse code that this server's machine cannot run: an unknown instruction would end the server, not just
        the session.

        Asks for the tile registers there when the code needs them.  Raises RemoteError naming what does not suit, or
        what the server cannot say.
        """
        m = self.machine
        unknown = [
            what
            for what, known in (
                ("version of TVM", m.tvm),
                ("architecture", m.architecture),
                ("CPU features", m.features),
            )
            if known is None
        ]
        if unknown and not self.servers.unchecked:
            raise RemoteError(
                f"does not say its {' and '.join(unknown)}, so whether {where} can run there is not known",
                where=self.name,
                remedy="start the server from a whole TVM, or give --rpc-unchecked if you know that it can",
            )
        if m.tvm is not None and m.tvm != version:
            raise RemoteError(
                "has another version of TVM",
                where=self.name,
                expected=f"tvm {version}, which made {where}",
                found=f"tvm {m.tvm}",
                remedy=f"install apache-tvm=={version} there, or compile with its version",
            )
        if m.architecture is not None and m.architecture != architecture:
            raise RemoteError(
                f"has another architecture than {where}",
                where=self.name,
                expected=architecture,
                found=m.architecture,
                remedy="compile for it, or choose another --rpc-key",
            )
        missing = sorted(set(features) - m.features) if m.features is not None else []
        if missing:
            raise RemoteError(
                f"lacks CPU features that {where} needs",
                where=self.name,
                found=f"missing {', '.join(missing)}",
                remedy=f"compile for it (its CPU is {m.cpu}), or choose another --rpc-key",
            )
        if cpus.TILE_FEATURES & set(features) and not self.permit_tiles():
            raise RemoteError(
                f"does not get the tile registers of AMX, which {where} needs",
                where=self.name,
                remedy=(
                    "allow them there (Linux 5.16 or newer, no seccomp filter on arch_prctl), or compile without AMX"
                ),
            )

    def permit_tiles(self) -> bool:
        """Ask Linux there for the tile registers of AMX, for the process of this session: whether they were granted."""
        if self.machine.architecture != "x86_64":
            return False
        library = self._helper(permit_kernel(), "x86_64", "permit")
        answer = self.tensor(np.ones(1, np.int64))
        with self.talking("asking for the tile registers"):
            library["permit"](answer)
            return int(answer.numpy()[0]) == 0

    def threads(self, count: int | None) -> int:
        """Give TVM there a pool of `count` threads (None: as many as it takes by itself), once per session, before
        anything runs; how many it has.
        """
        wanted = ("runtime.config_threadpool", "runtime.NumThreads", "ffi.Array")
        with self.talking("setting the number of threads"):
            configure, number, array = (self._function(name) for name in wanted)
            if configure is None or number is None or array is None:
                raise RemoteError(
                    "its TVM cannot tell how many threads it has",
                    where=self.name,
                    remedy=f"start a server from a whole TVM: {START_SERVER}",
                )
            if count is not None:
                # The pool never grows beyond its first size; as many names of processors make that `count`, in mode 1
                # they bind nothing.
                configure(1, count, array(*(str(i) for i in range(count))))
            return int(number())

    # -- libraries and arrays --------------------------------------------------------------------------------

    def load(self, library: bytes, name: str) -> tvm.runtime.Module:
        """A library, loaded there.

        Raises RemoteError when it cannot be.
        """
        # Never a name twice: writing over a library that is loaded ends the process.
        unique = f"{next(self._numbers)}_{name}"
        with self.talking(f"loading {name} ({len(library) / 1e6:.1f} MB)"):
            self._rpc.upload(bytearray(library), unique)
            return self._rpc.load_module(unique)

    def tensor(self, array: Array) -> tvm.runtime.Tensor:
        """An array, copied there."""
        with self.talking("copying an array"):
            return tvm.runtime.tensor(np.asarray(array, order="C"), self.device)


def permit_kernel() -> tirx.PrimFunc:
    """What `target.permit_tiles` does, as code for another machine: permit(answer)."""

    @T.prim_func
    def permit(answer: T.Buffer((1,), "int64")) -> None:  # type: ignore[valid-type]
        T.func_attr({"global_symbol": "permit"})
        answer[0] = T.call_extern("int64", "syscall", T.int64(158), T.int64(0x1023), T.int64(18))

    return permit


PATH_BYTES, READ_BYTES = 64, 1 << 16


def read_kernel() -> tirx.PrimFunc:
    """read_file(path, data, place): from byte place[0] on, as many bytes as place[1] says afterwards; less than 0
    where there are none.
    """

    @T.prim_func
    def read_file(
        path: T.Buffer((PATH_BYTES,), "uint8"),  # type: ignore[valid-type]
        data: T.Buffer((READ_BYTES,), "uint8"),  # type: ignore[valid-type]
        place: T.Buffer((2,), "int64"),  # type: ignore[valid-type]
    ) -> None:
        T.func_attr({"global_symbol": "read_file"})
        file: T.int32 = T.call_extern("int32", "open", path.access_ptr("r"), T.int32(0))
        place[1] = T.call_extern("int64", "pread", file, data.access_ptr("w"), T.int64(READ_BYTES), place[0])
        T.evaluate(T.call_extern("int32", "close", file))

    return read_file


def exported(module: tvm.runtime.Module, architecture: str) -> bytes:
    """The bytes of a linked library.

    Raises RemoteError when no linker for the architecture is there.
    """
    from tvm.support import cc

    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        path = Path(folder) / "library.so"
        try:
            if architecture == platform.machine():
                module.export_library(str(path))
            else:
                module.export_library(str(path), fcompile=cc.cross_compiler(f"{architecture}-linux-gnu-gcc"))
        except (RuntimeError, FileNotFoundError) as e:
            raise RemoteError(
                "a library for another machine could not be linked",
                where=architecture,
                found=str(e).splitlines()[0],
                remedy=f"install a linker for it (apt-get install gcc-{architecture.replace('_', '-')}-linux-gnu)",
            ) from e
        return path.read_bytes()


def _architecture(triple: str) -> str:
    machine = triple.split("-")[0]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _told(error: BaseException) -> str:
    """What an error of the other side says, without the words around it and the stack."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and "Error caught from RPC call" not in line
    ]
    return lines[0] if lines else type(error).__name__


def _connected(servers: Servers, found: Found, name: str) -> rpc.RPCSession:
    """A session, or an error when that takes too long: the time that the operating system gives a connection cannot
    be set from here.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put(rpc.connect(found.host, found.port, found.key))
        except RuntimeError as e:  # TVM's InternalError and RPCError
            answers.put(e)

    threading.Thread(target=call, daemon=True).start()
    try:
        answer = answers.get(timeout=servers.timeout)
    except queue.Empty as e:
        raise LostError(
            f"does not answer within {servers.timeout:g} s",
            where=name,
            remedy="see what the server printed, or give a longer --rpc-timeout",
        ) from e
    if not isinstance(answer, RuntimeError):
        return answer
    text = str(answer)
    if "protocol" in text:
        raise RemoteError(
            "speaks another version of TVM's RPC",
            where=name,
            found=_told(answer),
            remedy=f"install apache-tvm=={tvm.__version__} there",
        ) from answer
    if "cannot find server that matches" in text:
        raise RemoteError(
            "the server there has another key",
            where=name,
            found=f"--rpc-key {servers.key}" if servers.key else "no --rpc-key",
            remedy="give the --key that the server was started with",
        ) from answer
    if "failed" in text and "Connect" in text:
        raise LostError(
            "the server cannot be reached",
            where=name,
            remedy=(
                "see whether it runs, and start it again; behind a tracker, whether its address can be reached from"
                " here (--custom-addr)"
            ),
        ) from answer
    raise LostError(
        "is neither a tracker nor a server of TVM's, or ended the connection",
        where=name,
        found=_told(answer),
        remedy=f"check the address; a server starts with: {START_SERVER}",
    ) from answer


def _limited(found: Found, timeout: float) -> list[socket.socket]:
    """The connections of this process to a server, whose sends and receives now end after `timeout` seconds.

    TVM has no time limit of its own and does not show its socket; the operating system knows it by its other end.
    """
    ends = {a[4][:2] for a in socket.getaddrinfo(found.host, found.port, type=socket.SOCK_STREAM)}
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    sockets = []
    for number in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                continue
            one = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # closed since it was listed
            continue
        try:
            if one.getpeername()[:2] in ends:
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    one.setsockopt(socket.SOL_SOCKET, option, limit)
                sockets.append(one)
                continue
        except OSError:  # not connected
            pass
        one.close()
    if not sockets:
        raise RemoteError(
            "the connection is not among this process's, so no wait for an answer could be limited",
            where=f"{found.host}:{found.port}",
            expected="Linux or macOS",
        )
    return sockets
