"""TVM's RPC tracker: which servers it knows, and the next one that is free.

TVM's own client of it waits a minute for a tracker that does not run, and for ever for a key that nobody has; the
messages are the same.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass

from tvm.rpc import base

from hawq_tvm.core.errors import RemoteError, UsageError

START_TRACKER = "python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190"
START_SERVER = "python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY"
TIMEOUT = 60.0  # seconds
POLL = 0.1  # seconds between two looks at whether anybody still waits


@dataclass(frozen=True)
class Servers:
    """Where servers are, in the user's words.

    host, port: of a tracker, or of one server.  key: the servers' name; a server that was started alone may have none.
    timeout: seconds to wait for the tracker, for a free server, and for every single answer of a server.
    unchecked: go on with a server that cannot say which TVM and which CPU it has.
    """

    host: str
    port: int
    key: str = ""
    timeout: float = TIMEOUT
    unchecked: bool = False

    @property
    def where(self) -> str:
        """The address as it was given."""
        return f"--rpc {self.host}:{self.port}"


def parse(text: str, key: str = "", timeout: float = TIMEOUT, unchecked: bool = False) -> Servers:
    """Servers at HOST:PORT ([HOST]:PORT for an address with colons).

    Raises UsageError for anything else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(
            "an address is not understood", where="--rpc", expected="HOST:PORT of a tracker or of a server", found=text
        )
    if not 0 < timeout < float("inf"):
        raise UsageError("must be more than 0 seconds", where="--rpc-timeout", found=f"{timeout:g}")
    if any(c.isspace() for c in key):
        raise UsageError("a key has no spaces", where="--rpc-key", found=key)
    return Servers(host.strip("[]"), int(port), key, timeout, unchecked)


@dataclass(frozen=True)
class Found:
    """A server to connect to; key: what it must be told, which a tracker gives for one connection."""

    host: str
    port: int
    key: str


class Tracker:
    """A connection to a tracker."""

    def __init__(self, servers: Servers, connection: socket.socket) -> None:
        self._servers, self._connection = servers, connection

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def count(self) -> int:
        """How many servers have the key, free or not.

        Raises RemoteError, with the keys that the tracker knows, when there are none.
        """
        where, key = self._servers.where, self._servers.key
        try:
            base.sendjson(self._connection, [base.TrackerCode.SUMMARY])
            code, summary = base.recvjson(self._connection)
        except (OSError, ValueError) as e:
            raise RemoteError(
                "the tracker went away", where=where, found=str(e), remedy="see what it printed, and start it again"
            ) from e
        if code != base.TrackerCode.SUCCESS:
            raise RemoteError("the tracker does not tell which servers it has", where=where, found=str(code))
        known = Counter(str(s["key"]).removeprefix("server:") for s in summary["server_info"])
        if key not in known:
            listed = ", ".join(f"{k} ({n} server{'s' * (n > 1)})" for k, n in sorted(known.items()))
            raise RemoteError(
                "the tracker knows no server with this key"
                if key
                else "the tracker needs to know which servers are meant",
                where=where,
                expected=f"--rpc-key, one of {listed}" if known else "",
                found=key or "no --rpc-key",
                remedy="" if known else f"start one on the machine to measure: {START_SERVER}",
            )
        return known[key]

    def next_free(self, stop: threading.Event | None = None) -> Found | None:
        """A server with the key as soon as one is free; None when `stop` was set before.

        Raises RemoteError when none becomes free in time.
        """
        servers, end = self._servers, time.monotonic() + self._servers.timeout
        try:
            base.sendjson(self._connection, [base.TrackerCode.REQUEST, servers.key, "", 1])
            while not select.select([self._connection], [], [], POLL)[0]:
                if stop is not None and stop.is_set():
                    return None
                if time.monotonic() > end:
                    raise RemoteError(
                        f"no server became free within {servers.timeout:g} s",
                        where=servers.where,
                        found=f"every server with the key {servers.key} is in use",
                        remedy="wait, or give a longer --rpc-timeout",
                    )
            _, (host, port, key) = base.recvjson(self._connection)
        except (OSError, ValueError) as e:
            raise RemoteError(
                "the tracker went away",
                where=servers.where,
                found=str(e),
                remedy="see what it printed, and start it again",
            ) from e
        return Found(str(host), int(port), str(key))


def reach(servers: Servers) -> Tracker | None:
    """The tracker at an address; None when another program answers there, as TVM's servers do.

    Raises RemoteError when nothing answers.
    """
    where = servers.where
    try:
        connection = socket.create_connection((servers.host, servers.port), servers.timeout)
    except TimeoutError as e:
        raise RemoteError(
            f"nothing answers within {servers.timeout:g} s",
            where=where,
            remedy="check the address and what lies between the machines",
        ) from e
    except OSError as e:
        raise RemoteError(
            "cannot be reached",
            where=where,
            found=e.strerror or str(e),
            remedy=f"check the address; a tracker starts with: {START_TRACKER}",
        ) from e
    try:
        connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        answer = connection.recv(4)
    except TimeoutError as e:
        connection.close()
        raise RemoteError(
            f"takes connections, but answers nothing within {servers.timeout:g} s",
            where=where,
            remedy="a server without a tracker serves one session at a time: wait; else check the address",
        ) from e
    except OSError:
        answer = b""
    if answer == struct.pack("<i", base.RPC_TRACKER_MAGIC):
        return Tracker(servers, connection)
    connection.close()
    return None
