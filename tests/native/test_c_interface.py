"""The C interface of the library that a package holds: every layer equal to the reference, and everything wrong
refused with a sentence.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.compiler.native import link, toolchain
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.package import direct
from hawq_tvm.targets import target

from ..models import residual_net
from .networks import FLOAT, NETWORKS


@pytest.fixture(scope="module")
def package() -> ht.Package:
    return ht.compile(residual_net())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_equals_the_reference(name: str) -> None:
    package = ht.compile(NETWORKS[name](), allow_float_tail=name in FLOAT)
    report = package.verify(random=2, seed=3, through="c")
    report.raise_if_mismatch()
    assert [r.layer for r in report.rows] == [r.layer for r in package.verify(random=1).rows]
    inputs = package.random_inputs(1, 4)[0]
    run = package.run_layers(inputs, through="c")
    for output, value in package.run(inputs).items():
        np.testing.assert_array_equal(run.outputs[output], value)


def test_resnet18(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    package = ht.compile(zoo.make("resnet18", tmp_path / "r.onnx", size=64))
    report = package.verify(random=1, through="c")
    report.raise_if_mismatch()
    assert len(report.rows) > 20 and package.certificate()["ok"]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(package: ht.Package, threads: int) -> None:
    inputs = package.random_inputs(1, 0)[0]
    with direct.Model(package.library, threads) as model:
        for _ in range(20):
            model.set_inputs([inputs["x"]])
            model.run()
            np.testing.assert_array_equal(model.outputs()[0], next(iter(package.run(inputs).values())))


def test_tvm_and_c_share_a_library() -> None:
    """Whichever comes first: TVM gives the kernels its functions when it loads the library, the C interface where
    there are none.
    """
    for first_c in (True, False):
        package = ht.compile(residual_net())
        inputs = package.random_inputs(1, 1)[0]
        ways = [lambda: package.run_layers(inputs, through="c").outputs, lambda: package.run(inputs)]  # noqa: B023
        results = [way() for way in (ways if first_c else ways[::-1]) for _ in range(2)]
        for r in results[1:]:
            np.testing.assert_array_equal(list(r.values()), list(results[0].values()))


def test_libraries_in_one_process_call_their_own_kernels() -> None:
    """Both are open to all of the process, as if a program had been linked with both; their kernels have the same
    names.
    """
    packages = [ht.compile(residual_net(*kinds)) for kinds in (("int8", "uint8"), ("int4", "uint4"))]
    for p in packages:
        ctypes.CDLL(str(p.library), mode=ctypes.RTLD_GLOBAL)
    for p in packages * 2:
        p.verify(random=1, through="c").raise_if_mismatch()


def test_misuse_is_an_error(package: ht.Package) -> None:
    library = direct._declared(ctypes.CDLL(str(package.library)))

    def error() -> str:
        return library.hawq_error().decode()

    for threads in (-1, 1025):
        assert (
            library.hawq_model_create(ctypes.byref(direct._Options(threads))) is None
            and f"{threads} threads were asked for, and 0 to 1024" in error()
        )
    assert library.hawq_model_run(None) == -1 and "NULL" in error()
    assert (
        library.hawq_model_input(None, 0) is None
        and library.hawq_model_outputs(None) == -1
        and library.hawq_model_observe(None, direct._OBSERVER(), None) == -1
    )
    library.hawq_model_destroy(None)
    nonsense = ctypes.create_string_buffer(4096)
    assert library.hawq_model_run(nonsense) == -1 and "no model" in error()
    assert library.hawq_model_output(nonsense, 0) is None
    model = library.hawq_model_create(None)
    assert model and library.hawq_model_inputs(model) == 1 and library.hawq_model_outputs(model) == 1
    assert library.hawq_model_threads(model) >= 1
    for i in (-1, 1, 99):
        assert library.hawq_model_input(model, i) is None and f"input {i} was asked for, and the model has 1" in error()
        assert library.hawq_model_output(model, i) is None and f"output {i} was asked for" in error()
    refused = []

    @direct._OBSERVER
    def again(*_: object) -> None:
        refused.append((library.hawq_model_run(model), error()))
        library.hawq_model_destroy(model)
        refused.append((library.hawq_model_observe(model, direct._OBSERVER(), None), error()))

    assert library.hawq_model_observe(model, again, None) == 0 and library.hawq_model_run(model) == 0
    assert set(refused) == {(-1, "the model is running in another thread")}
    library.hawq_model_destroy(model)


def test_the_version_says_what_made_it(package: ht.Package) -> None:
    library = direct._declared(ctypes.CDLL(str(package.library)))
    text = library.hawq_version().decode()
    assert ht.__version__ in text and package.manifest["target"]["architecture"] in text
    assert library.hawq_abi_version() == package.manifest["c_interface"] == toolchain.ABI_VERSION


def test_a_cpu_without_the_instructions_is_refused(tmp_path: Path) -> None:
    """hawq_model_create looks before any kernel runs: a library that asks for what no CPU has is refused."""
    checks = (toolchain.SOURCES / "cpu.c").read_text()
    known = set(re.findall(r'\{"([a-z0-9.-]+)", ', checks))
    assert {f for names in target.CPUINFO_NAMES.values() for f in names} <= known
    source = tmp_path / "try.c"
    source.write_text(
        '#include <stdio.h>\n#include "cpu.h"\n#include "abi.h"\nint main(int n, char **a) { (void)n;'
        ' puts(hawq_check_cpu((const char *const *)a + 1) ? hawq_error() : "ok"); }\n'
    )
    machine = platform.machine()
    words = [
        *toolchain.compiler(machine),
        *toolchain.options(machine),
        str(source),
        *(str(toolchain.SOURCES / f) for f in ("cpu.c", "error.c")),
        "-o",
        str(tmp_path / "try"),
    ]
    subprocess.run(words, check=True)

    def ask(*features: str) -> str:
        return subprocess.run([tmp_path / "try", *features], capture_output=True, text=True, check=True).stdout.strip()

    assert ask() == "ok"
    for feature in target.CPUINFO_NAMES[machine]:
        if feature not in target.TILE_FEATURES:
            assert (ask(feature) == "ok") == (feature in target.host_features()), feature
    assert 'needs the instructions "made-up"' in ask("made-up")


def test_the_header_compiles_as_c_and_as_cpp(package: ht.Package, tmp_path: Path) -> None:
    package.save(tmp_path / "p.hawq")
    source = (
        '#include "model.h"\nint shape[] = HAWQ_INPUT_0_SHAPE;\ndouble scales[] = HAWQ_INPUT_0_SCALES;\nint main(void)'
        " { return sizeof(shape) / sizeof(int) != HAWQ_INPUT_0_RANK || HAWQ_INPUT_0_ZERO_POINT != 120; }\n"
    )
    machine = platform.machine()
    for language, standard in (("c", "-std=c11"), ("c++", "-std=c++17")):
        compiler = toolchain.compiler(machine)
        words = [
            *compiler,
            "-x",
            language,
            standard,
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            "-I",
            str(tmp_path / "p.hawq"),
            "-",
        ]
        subprocess.run(words, input=source, text=True, check=True)


def test_the_header_knows_the_interface() -> None:
    text = ht.compile(NETWORKS["several"]())._files["model.h"].decode()
    defined = dict(re.findall(r"#define (\w+) (.+)", text))
    assert defined["HAWQ_INPUTS"] == "2" and defined["HAWQ_OUTPUTS"] == "3" and defined["HAWQ_INPUT_1_NAME"] == '"y"'
    assert defined["HAWQ_INPUT_0_BYTES"] == str(2 * 4 * 36 * 4) and defined["HAWQ_INPUT_1_BYTES"] == str(2 * 4 * 36)
    assert defined["HAWQ_OUTPUT_0_DTYPE"] == '"uint8"' and "HAWQ_OUTPUT_0_SCALE" not in defined
    assert defined["HAWQ_INPUT_0_ROUNDING"] == '"half_even"' and float(defined["HAWQ_INPUT_0_SCALE"]) == float(
        np.float32(0.05)
    )


def test_the_runtime_compiles_without_a_warning() -> None:
    machine = platform.machine()
    for source in sorted(toolchain.SOURCES.glob("*.c")):
        subprocess.run(
            [*toolchain.compiler(machine), *toolchain.options(machine), "-Werror", "-fsyntax-only", str(source)],
            check=True,
        )


def test_a_missing_compiler_is_found_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    with pytest.raises(
        UsageError,
        match=(
            r"no compiler links libraries for this architecture; expected gcc or clang or cc.*remedy: install a C"
            r" compiler"
        ),
    ):
        ht.compile("no such model.onnx")
    with pytest.raises(UsageError, match=r"riscv64: .*expected riscv64-linux-gnu-gcc"):
        toolchain.compiler("riscv64")


def test_a_failing_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bad-cc").write_text("#!/bin/sh\necho 'bad-cc: error: out of order' >&2\nexit 1\n")
    (tmp_path / "bad-cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "bad-cc"))
    with pytest.raises(PackageError, match="runtime could not be made; found bad-cc: error: out of order"):
        ht.compile(residual_net())


def test_kernels_that_need_more_of_tvm_are_refused(tmp_path: Path) -> None:
    source, made = tmp_path / "kernel.c", tmp_path / "kernel.o"
    source.write_text("void *__TVMBackendParallelLaunch, *__TVMFFIFunctionCall;\n")
    subprocess.run([*toolchain.compiler(platform.machine()), "-c", str(source), "-o", str(made)], check=True)
    with pytest.raises(PackageError, match=r"a kernel calls TVM's runtime.*found __TVMFFIFunctionCall"):
        link._check_self_contained([str(made)])


def test_through_something_else_is_refused(package: ht.Package) -> None:
    with pytest.raises(UsageError, match="expected vm or c"):
        package.run_layers(package.random_inputs(1, 0)[0], through="rust")
