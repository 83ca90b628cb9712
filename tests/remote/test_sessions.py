"""Packages on other machines: the same integers, times by the clock there, and a sentence for all that can go wrong."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm.rpc

import hawq_tvm as ht
from hawq_tvm import cpu, target
from hawq_tvm.errors import InputError, LostError, RemoteError, UsageError
from hawq_tvm.remote import packaged
from hawq_tvm.remote import session as session_module
from hawq_tvm.remote.packaged import RemotePackage, opened
from hawq_tvm.remote.session import Machine, Session, exported, permit_kernel
from hawq_tvm.remote.tracker import Found, parse, reach

from .conftest import HOST, Cluster, free_port

Command = Callable[..., tuple[int, str, str]]


def refused(command: Command, *arguments: object, code: int = 4) -> str:
    """The one sentence of a command that fails."""
    found, out, err = command(*arguments)
    assert (found, out) == (code, "") and len(err.strip().splitlines()) == 1, err
    return err


# -- what works ------------------------------------------------------------------------------------------------


def test_outputs_are_the_local_ones(cluster: Cluster, package: ht.Package, saved: Path, tmp_path: Path, command: Command) -> None:
    batches = package.random_inputs(5, 2)
    with opened(cluster.at("two")) as session:
        there = RemotePackage(package, session)
        for batch in batches:
            found = there.run(batch)
            assert list(found) == list(package.run(batch))
            for name, value in package.run(batch).items():
                np.testing.assert_array_equal(found[name], value, strict=True)
    np.savez(tmp_path / "in.npz", **batches[0])
    code, _, _ = command("run", saved, "--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--rpc", cluster.tracker.address, "--rpc-key", "two")
    assert code == 0
    with np.load(tmp_path / "out.npz") as outputs:
        for name, value in package.run(batches[0]).items():
            np.testing.assert_array_equal(outputs[name], value, strict=True)


def test_a_measurement_has_the_fields_of_a_local_one(cluster: Cluster, package: ht.Package, saved: Path, tmp_path: Path, command: Command) -> None:
    settings = ("--duration", 0.1, "--warmup-ms", 10, "--iterations", 20)
    code, out, _ = command("bench", saved, *settings, "--rpc", cluster.tracker.address, "--rpc-key", "two", "--json")
    fields = json.loads(out)
    local = package.bench(duration=0, iterations=1, warmup_ms=0).to_dict()
    assert code == 0 and set(fields) == {*local, "rpc", "products", "tops", "share_of_limit", "limits"}
    assert set(fields["latency_ms"]) == set(local["latency_ms"])
    ms = [fields["latency_ms"][k] for k in ("min", "median", "p90", "p95", "p99", "max")]
    assert ms == sorted(ms) and ms[0] > 0 and fields["tops"] > 0
    assert fields["iterations"] >= 20 and fields["threads"] == 1  # TVM_NUM_THREADS of the servers
    assert (fields["rpc"]["address"], fields["rpc"]["key"], fields["limits"]) == (cluster.tracker.address, "two", None)
    assert fields["machine"]["architecture"] == package.manifest["target"]["architecture"] and fields["machine"]["cpu"]
    code, out, _ = command("bench", saved, *settings, "--rpc", cluster.tracker.address, "--rpc-key", "two", "--threads", 3)
    assert code == 0 and "threads 3," in out and "key two" in out and "by its clock" in out and "median" in out


def test_the_network_is_not_in_the_times(cluster: Cluster, package: ht.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes 50 ms longer changes no time: a network that slow would be seen in each of them."""
    slow = RemotePackage.times_ms

    def late(self: RemotePackage, count: int) -> list[float]:
        time.sleep(0.05)
        return slow(self, count)

    monkeypatch.setattr(RemotePackage, "times_ms", late)
    fields = packaged.alone(package, cluster.at("two"), duration=0, iterations=50, warmup_ms=0)
    assert fields["iterations"] == 50 and fields["latency_ms"]["median"] < 25  # an inference takes 0.01 ms; the rest is for a busy machine


def test_a_server_without_a_tracker(cluster: Cluster, package: ht.Package, saved: Path, command: Command) -> None:
    alone, servers = cluster.lonely, parse(cluster.lonely.address, "lonely", 30)
    cluster.wait_until(lambda: reach(servers) is None)
    batch = package.random_inputs(1, 0)[0]
    for name, value in packaged.run(package, batch, servers).items():
        np.testing.assert_array_equal(value, package.run(batch)[name], strict=True)
    said = refused(command, "bench", saved, "--rpc", alone.address, "--rpc-key", "other")
    assert "another key" in said and "other" in said
    with opened(servers):
        assert "answers nothing" in refused(command, "bench", saved, "--rpc", alone.address, "--rpc-key", "lonely", "--rpc-timeout", 0.3)


# -- what is refused before anything runs ----------------------------------------------------------------------


def test_addresses_and_options_that_mean_nothing(saved: Path, command: Command) -> None:
    for text in ("host", "host:", ":9190", "host:0", "host:70000", "host:9x"):
        assert text in refused(command, "bench", saved, "--rpc", text, code=2)
    assert "more than 0" in refused(command, "bench", saved, "--rpc", "h:1", "--rpc-timeout", 0, code=2)
    assert "without --rpc" in refused(command, "bench", saved, "--rpc-key", "k", code=2)
    assert "--against" in refused(command, "bench", saved, "--rpc", "h:1", "--against", saved, code=2)
    assert "measures now" in refused(command, "tune", "m.onnx", "--rpc", "h:1", "--export", "d", "--target", "cuda-sm80", code=2)
    assert parse("[::1]:9190").host == "::1"


def test_a_dead_tracker_and_what_is_none(saved: Path, command: Command) -> None:
    assert "cannot be reached" in refused(command, "bench", saved, "--rpc", f"{HOST}:{free_port()}", "--rpc-key", "k")
    assert "cannot be reached" in refused(command, "bench", saved, "--rpc", "nowhere.invalid:9190", "--rpc-key", "k")
    for greeting in (None, b"", b"SSH-2.0-OpenSSH_9.2\r\n"):
        with socket.create_server((HOST, 0)) as other:
            kept: list[socket.socket] = []

            def answer(other: socket.socket = other, greeting: bytes | None = greeting, kept: list[socket.socket] = kept) -> None:
                for _ in range(2):
                    try:
                        connection, _ = other.accept()
                    except OSError:
                        return
                    if greeting is None:
                        kept.append(connection)
                    else:
                        connection.sendall(greeting)
                        connection.close()

            threading.Thread(target=answer, daemon=True).start()
            said = refused(command, "bench", saved, "--rpc", f"{HOST}:{other.getsockname()[1]}", "--rpc-key", "k", "--rpc-timeout", 0.5)
            assert ("answers nothing within 0.5 s" if greeting is None else "neither a tracker nor a server") in said
            for connection in kept:
                connection.close()


def test_a_wrong_key_is_told_the_right_ones(cluster: Cluster, saved: Path, command: Command) -> None:
    for options, found in ((("--rpc-key", "tow"), "found tow"), ((), "found no --rpc-key")):
        said = refused(command, "bench", saved, "--rpc", cluster.tracker.address, *options)
        assert "two (2 servers)" in said and found in said


def test_when_all_servers_are_in_use(cluster: Cluster, saved: Path, command: Command) -> None:
    with opened(cluster.at("two")), opened(cluster.at("two")):
        assert "no server became free within 0.3 s" in refused(command, "bench", saved, "--rpc", cluster.tracker.address, "--rpc-key", "two", "--rpc-timeout", 0.3)


def changed(package: ht.Package, part: str, **fields: Any) -> ht.Package:
    other = copy.copy(package)
    other.manifest = {**package.manifest, part: {**package.manifest[part], **fields}}
    return other


def test_what_cannot_run_there_is_not_sent_there(cluster: Cluster, package: ht.Package) -> None:
    features = package.manifest["target"]["cpu_features"]
    with opened(cluster.at("two")) as session:
        for other, words in (
            (changed(package, "target", cpu_features=[*features, "a-feature-of-tomorrow"]), "missing a-feature-of-tomorrow"),
            (changed(package, "target", architecture="riscv64"), "expected riscv64"),
            (changed(package, "producer", tvm="0.1"), "expected tvm 0.1"),
        ):
            with pytest.raises(RemoteError, match=words) as e:
                RemotePackage(other, session)
            assert "remedy" in str(e.value)
        gpu = changed(package, "target")
        gpu._target = {**gpu._target, "kind": "cuda"}
        with pytest.raises(UsageError, match="GPU"):
            RemotePackage(gpu, session)
        assert session.machine.features is not None and set(features) <= session.machine.features
        known, m = session.servers, session.machine
        session.machine = replace(m, features=None, tvm=None)
        with pytest.raises(RemoteError, match=r"version of TVM and CPU features.*--rpc-unchecked"):
            RemotePackage(package, session)
        session.servers = replace(known, unchecked=True)
        there = RemotePackage(package, session)
        there.give(package.random_inputs(1, 0)[0])
        assert len(there.times_ms(3)) == 3
    with pytest.raises(InputError):
        packaged.run(package, {}, cluster.at("two"))


def test_what_a_server_of_a_smaller_tvm_does_not_tell(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler's functions, or with others under their names, nothing is known, and nothing breaks."""
    inner = Session._function
    monkeypatch.setattr(Session, "_function", lambda self, name: None if "llvm" in name or name.startswith("node.") else inner(self, name))
    with opened(cluster.at("two")) as session:
        assert session.machine == Machine(None, None, None, None)
    monkeypatch.setattr(Session, "_function", lambda self, name: inner(self, "rpc.test.except" if name in ("ffi.ToJSONGraphString", "node.PrinterConfig") else name))
    with opened(cluster.at("two")) as session:
        assert (session.machine.features, session.machine.tvm) == (None, None) and session.machine.cpu


def test_an_answer_in_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: object) -> None:
        raise tvm.error.RPCError("Server: Client protocol version mismatch with the server server protocol=0.9, client protocol=0.8")

    monkeypatch.setattr(tvm.rpc, "connect", other)
    with pytest.raises(RemoteError, match=r"another version.*apache-tvm=="):
        Session(parse("h:1"), Found("h", 1, ""))


def test_the_tile_registers_are_asked_for_there(cluster: Cluster) -> None:
    """The answer is that of this machine, on which the servers run."""
    with opened(cluster.at("two")) as session:
        granted = session.permit_tiles()
        assert granted == session.permit_tiles() == (target.permit_tiles() is None)
        tiles = replace(session.machine, features=(session.machine.features or frozenset()) | {"amx-int8"})
        session.machine = tiles
        if not granted:
            with pytest.raises(RemoteError, match="tile registers"):
                session.check(tiles.architecture or "", ["amx-int8"], tiles.tvm or "", "it")


def test_files_without_a_size_are_read_there(cluster: Cluster) -> None:
    with opened(cluster.at("two")) as session:
        assert cpu.features_of(session.read_file("/proc/cpuinfo", platform.machine()).decode(), platform.machine()) == target.host_features()
        library = "/bin/sh"  # more than is read at once
        assert session.read_file(library, platform.machine()) == Path(library).read_bytes()
        with pytest.raises(RemoteError, match=r"/no/such/file: cannot be read there"):
            session.read_file("/no/such/file", platform.machine())


def test_an_arm_server_has_what_its_kernel_reports(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM tells neither dotprod nor i8mm of it; where nothing for it can be linked here, there is only what LLVM tells."""
    text = (Path(__file__).parents[1] / "targets/cpuinfo/graviton2.txt").read_bytes()
    monkeypatch.setattr(session_module, "_architecture", lambda triple: "aarch64")
    monkeypatch.setattr(Session, "read_file", lambda self, path, architecture: text)
    with opened(cluster.at("two")) as session:
        assert session.machine.features == {"neon", "lse", "fullfp16", "rdm", "rcpc", "dotprod"}
        session.check("aarch64", target.required_features(target.parse("arm-dotprod")), str(tvm.__version__), "it")
        with pytest.raises(RemoteError, match="missing i8mm"):
            session.check("aarch64", target.required_features(target.parse("arm-i8mm")), str(tvm.__version__), "it")

    def unlinked(*_: object) -> bytes:
        raise RemoteError("a library for another machine could not be linked")

    monkeypatch.setattr(Session, "read_file", unlinked)
    with opened(cluster.at("two")) as session:
        assert session.machine.features is not None and "dotprod" not in session.machine.features


def test_a_library_that_cannot_be_loaded_or_linked(cluster: Cluster) -> None:
    with opened(cluster.at("two")) as session, pytest.raises(RemoteError, match=r"loading x\.so .* failed there; found .*load.*x\.so"):
        session.load(b"no library", "x.so")
    module = tvm.tirx.build(tvm.IRModule({}), target="llvm")
    if shutil.which("aarch64-linux-gnu-gcc"):
        where = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"}
        linked = exported(tvm.tirx.build(tvm.IRModule({"permit": permit_kernel()}), target=where), "aarch64")
        assert linked[:4] == b"\x7fELF" and struct.unpack("<H", linked[18:20]) == (183,)  # EM_AARCH64
    else:
        print("not tried: no aarch64-linux-gnu-gcc")
    with pytest.raises(RemoteError, match="apt-get install"):
        exported(module, "sparc99")


# -- what is lost in the middle --------------------------------------------------------------------------------


def test_a_server_that_hangs(cluster: Cluster, package: ht.Package) -> None:
    """It is the last that "lonely" sees."""
    with opened(parse(cluster.lonely.address, "lonely", 0.5)) as session:
        there = RemotePackage(package, session)
        there.give(package.random_inputs(1, 0)[0])
        cluster.lonely.signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(LostError, match=r"no answer within 0.5 s while timing"):
            there.times_ms(1)
        with pytest.raises(LostError, match="was lost"):
            there.times_ms(1)
        del there
        assert time.monotonic() - start < 10  # nothing that lies there is waited for
    cluster.lonely.kill()
