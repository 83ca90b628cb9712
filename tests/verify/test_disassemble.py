"""What counts as floating point code, and where it is looked for: nameless functions, and calls out of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import s_tir, te, tirx

from hawq_tvm.errors import PackageError
from hawq_tvm.verify.disassemble import _arm_references, _x86_references, inspect_library, is_float_instruction

FLOAT = {
    "x86_64": """addps vaddps addss mulsd vmulpd vdivps sqrtss vsqrtpd vrsqrt14ps rcpps maxps vminsd cmpps cmpltss vcmppd vcmpeqps
        ucomiss vcomisd vucomish roundss vrndscaleps vfmadd231ps vfnmadd213sd vfmaddsub132pd vfmsubadd213ph vfcmaddcph vfmulcph
        v4fmaddps v4fnmaddss cvtdq2ps vcvttps2dq cvtsi2ss vcvtusi2sd vcvtneps2bf16 vdpbf16ps tdpbf16ps tdpfp16ps vdpps dppd haddps
        addsubpd vscalefps vgetexpsd vgetmantps vrangeps vreducepd vfixupimmps vfpclassps vaddph vaddnepbf16 fld fadd fstp fild
        fistp""",
    "aarch64": """fadd fsub fmul fdiv fsqrt fmadd fmla fmls fmax fminnm fcmp fcmpe fccmp fcmeq fcvtzs fcvt fcvtn scvtf ucvtf frinta fneg
        fabs fabd frecpe frsqrts faddp fmulx fjcvtzs bfdot bfmmla bfcvt bfmlalb fmopa""",
}
INTEGER = {
    "x86_64": """vpaddd vpmulld vpmuldq vpdpbusd pmaddwd vpmaddubsw vpsrad vpmaxsd vpminsd vpcmpgtd vpcmpd add imul idiv div sub sar cmp
        vpmovdb vpmovsdb vpacksswb tdpbusd tileloadd movaps vmovups vmovss movd vxorps vandps vorps shufps vshufps unpcklps
        vunpckhpd vpermilps vpermt2ps vblendps vblendvps vbroadcastss vbroadcastsd vinsertf128 vextractf32x4 vmovddup movhps vmovmskps
        vtestps vcompressps vexpandps vgatherdps fxsave vpmadd52luq stosq""",
    "aarch64": """add sub mul madd smull sdot udot smmla sqrdmulh sshr cmge smax fmov fcsel bfi bfm bfxil bfc movi dup tbl zip1 ldr str
        sqxtn b bl b.eq bic bsl bit""",
}  # fmt: skip


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arithmetic_is_told_from_data_movement(machine: str) -> None:
    assert [m for m in FLOAT[machine].split() if not is_float_instruction(m, machine)] == []
    assert [m for m in INTEGER[machine].split() if is_float_instruction(m, machine)] == []
    assert is_float_instruction("lock addps", "x86_64")


def test_references_of_x86_instructions() -> None:
    def found(mnemonic: str, operands: str) -> list[int]:
        return list(_x86_references(mnemonic, operands, 0x1000, {}))

    assert found("call", "0x1720") == [0x1720] and found("jne", "0x1730") == [0x1730] and found("bnd jmp", "0x20") == [0x20]
    assert found("lea", "rdi, [rip + 0x14]") == [0x1014] and found("mov", "rax, qword ptr [rip - 0x20]") == [0xFE0]
    assert found("call", "qword ptr [rip + 8]") == [0x1008] and found("jmp", "qword ptr [rip]") == [0x1000]
    assert found("mov", "eax, 0x1720") == [] and found("call", "qword ptr [rax]") == [] and found("cmp", "eax, 0x1720") == []


def test_references_of_arm_instructions() -> None:
    pages: dict[str, int] = {}

    def found(mnemonic: str, operands: str) -> list[int]:
        return list(_arm_references(mnemonic, operands, 0, pages))

    assert found("bl", "#0x1720") == [0x1720] and found("b.eq", "#0x40") == [0x40] and found("tbz", "w0, #3, #0x88") == [0x88]
    assert found("cbnz", "x1, #0x90") == [0x90] and found("adr", "x0, #0x1234") == [0x1234]
    assert found("add", "x0, x3, #0x10") == []
    assert found("adrp", "x3, #0x5000") == []
    assert found("add", "x0, x3, #0x10") == [0x5010] and found("ldr", "x0, [x3, #24]") == [0x5018] and found("ldr", "x0, [x3]") == [0x5000]


def export(path: Path, func: tirx.PrimFunc, name: str = "kernel") -> Path:
    """A library with one function."""
    module = tvm.IRModule({name: func.with_attr("global_symbol", name)})
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))
    return path


def element_wise(function: Any, dtype: str = "int32", parallel: bool = False) -> tirx.PrimFunc:
    a = te.placeholder((4096,), dtype, name="A")
    sch = s_tir.Schedule(te.create_prim_func([a, te.compute((4096,), lambda i: function(a[i]), name="B")]))
    if parallel:
        outer, _ = sch.split(sch.get_loops(sch.get_sblock("B"))[0], [None, 64])
        sch.parallel(outer)
    return sch.mod["main"]


@pytest.mark.parametrize("parallel", [False, True])
def test_float_arithmetic_is_found_also_in_the_nameless_body_of_a_parallel_loop(tmp_path: Path, parallel: bool) -> None:
    report = inspect_library(export(tmp_path / "f.so", element_wise(lambda v: v * 1.5, "float32", parallel)), ["kernel"])
    assert any("mul" in o.instruction for o in report.offenders)
    assert all(o.function.startswith("kernel_compute_" + (" at 0x" if parallel else "")) for o in report.offenders)
    report = inspect_library(export(tmp_path / "i.so", element_wise(lambda v: v * 3, "int32", parallel)), ["kernel"])
    assert report.offenders == () and report.instructions > 50 and report.functions >= 4


def test_a_call_out_of_the_library_is_an_offence(tmp_path: Path) -> None:
    report = inspect_library(export(tmp_path / "r.so", element_wise(lambda v: v + tirx.call_extern("int32", "lrand48"))), ["kernel"])
    assert any("(lrand48)" in o.instruction for o in report.offenders)


def test_memory_functions_are_allowed(tmp_path: Path) -> None:
    report = inspect_library(export(tmp_path / "m.so", element_wise(lambda v: v)), ["kernel"])
    assert report.offenders == ()


def test_other_exported_functions_are_left_out_with_all_that_only_they_reach(tmp_path: Path) -> None:
    functions = {"kernel": element_wise(lambda v: v * 3, parallel=True), "border": element_wise(lambda v: v * 1.5, "float32", parallel=True)}
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    path = tmp_path / "two.so"
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))
    assert inspect_library(path, ["kernel"]).offenders == ()
    assert inspect_library(path, ["border"]).offenders and inspect_library(path, ["kernel", "border"]).offenders
    assert inspect_library(path.read_bytes(), ["kernel"]) == inspect_library(path, ["kernel"])


def test_missing_kernels_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "k.so", element_wise(lambda v: v))
    with pytest.raises(PackageError, match=r"a kernel's code is missing.*__tvm_ffi_other"):
        inspect_library(path, ["kernel", "other"])
    with pytest.raises(PackageError, match="expected an ELF shared library"):
        inspect_library(b"MZ not an ELF file", ["kernel"])
    with pytest.raises(PackageError, match="cannot be read"):
        inspect_library(path.read_bytes()[:1000], ["kernel"])
    with pytest.raises(PackageError, match="no symbol table"):
        inspect_library(path.read_bytes().replace(b".symtab\0", b".hidden\0"), ["kernel"])
    executable = bytearray(path.read_bytes())
    executable[16] = 1  # e_type: ET_REL
    with pytest.raises(PackageError, match="before it is linked"):
        inspect_library(bytes(executable), ["kernel"])


def test_bytes_that_are_no_instruction_are_an_error(tmp_path: Path) -> None:
    path = export(tmp_path / "k.so", element_wise(lambda v: v * 3))
    data = path.read_bytes()
    loop = data.index(bytes.fromhex("c3"), 0x1700)
    with pytest.raises(PackageError, match="no known instruction"):
        inspect_library(data[:loop] + b"\x06\x07\x0e" + data[loop + 3 :], ["kernel"])
