"""What counts as floating point code, and where it is looked for: nameless functions, and calls out of the library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import s_tir, te, tirx

from hawq_tvm.core.errors import PackageError
from hawq_tvm.verify.disassemble import _decode_arm, _decode_x86, inspect_library, is_float_instruction

iced_x86 = pytest.importorskip("iced_x86", reason="iced-x86 is installed on x86-64 only")

FLOAT = {
    "x86_64": (
        """addps vaddps addss mulsd vmulpd vdivps sqrtss vsqrtpd vrsqrt14ps rcpps maxps vminsd cmpps cmpltss vcmppd
        vcmpeqps
        ucomiss vcomisd vucomish roundss vrndscaleps vfmadd231ps vfnmadd213sd vfmaddsub132pd vfmsubadd213ph
        vfcmaddcph vfmulcph
        v4fmaddps v4fnmaddss cvtdq2ps vcvttps2dq cvtsi2ss vcvtusi2sd vcvtneps2bf16 vdpbf16ps tdpbf16ps tdpfp16ps
        vdpps dppd haddps
        addsubpd vscalefps vgetexpsd vgetmantps vrangeps vreducepd vfixupimmps vfpclassps vaddph vaddnepbf16 fld fadd
        fstp fild
        fistp"""
    ),
    "aarch64": (
        """fadd fsub fmul fdiv fsqrt fmadd fmla fmls fmax fminnm fcmp fcmpe fccmp fcmeq fcvtzs fcvt fcvtn scvtf ucvtf
        frinta fneg
        fabs fabd frecpe frsqrts faddp fmulx fjcvtzs bfdot bfmmla bfcvt bfmlalb fmopa"""
    ),
}
INTEGER = {
    "x86_64": (
        """vpaddd vpmulld vpmuldq vpdpbusd pmaddwd vpmaddubsw vpsrad vpmaxsd vpminsd vpcmpgtd vpcmpd add imul idiv
        div sub sar cmp
        vpmovdb vpmovsdb vpacksswb tdpbusd tileloadd movaps vmovups vmovss movd vxorps vandps vorps shufps vshufps
        unpcklps
        vunpckhpd vpermilps vpermt2ps vblendps vblendvps vbroadcastss vbroadcastsd vinsertf128 vextractf32x4 vmovddup
        movhps vmovmskps
        vtestps vcompressps vexpandps vgatherdps fxsave vpmadd52luq stosq"""
    ),
    "aarch64": (
        """add sub mul madd smull sdot udot smmla sqrdmulh sshr cmge smax fmov fcsel bfi bfm bfxil bfc movi dup tbl
        zip1 ldr str
        sqxtn b bl b.eq bic bsl bit"""
    ),
}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arithmetic_is_told_from_data_movement(machine: str) -> None:
    assert [m for m in FLOAT[machine].split() if not is_float_instruction(m, machine)] == []
    assert [m for m in INTEGER[machine].split() if is_float_instruction(m, machine)] == []


def references(machine: str, code: str) -> list[tuple[str, list[int], bool]]:
    """Mnemonic, referenced addresses and whether it is a jump, of instructions at address 0x1000 given in
    hexadecimal.
    """
    decode = {"x86_64": _decode_x86, "aarch64": _decode_arm}[machine]
    return [(i.mnemonic, list(i.references), i.is_jump) for i in decode(bytes.fromhex(code), 0x1000)]


def test_references_of_x86_instructions() -> None:
    assert references("x86_64", "e81b070000 750a eb0a") == [
        ("call", [0x1720], False),
        ("jne", [0x1011], True),
        ("jmp", [0x1013], True),
    ]
    assert references("x86_64", "488d3d14000000 488b05d9ffffff") == [("lea", [0x101B], False), ("mov", [0xFE7], False)]
    assert references("x86_64", "ff1508000000 ffd0 ff10") == [
        ("call", [0x100E], False),
        ("call", [], False),
        ("call", [], False),
    ]
    assert references("x86_64", "b820170000 3d20170000") == [("mov", [], False), ("cmp", [], False)]


def test_references_of_arm_instructions() -> None:
    # adrp x3, 0x5000; add x0, x3, #0x10; ldr x0, [x3, #24]; add x0, x4, #0x10
    assert references("aarch64", "23000090 60400091 600c40f9 80400091") == [
        ("adrp", [], False),
        ("add", [0x5010], False),
        ("ldr", [0x5018], False),
        ("add", [], False),
    ]
    # A register that was written since holds no page: adrp x3; mov x3, x4 or mov w3, w4 or ldp x0, x3, [sp]; add x0,
    # x3, #0x10. A store keeps it.
    for written in ("e30304aa", "e303042a", "e00f40a9"):
        assert references("aarch64", f"23000090 {written} 60400091")[-1] == ("add", [], False)
    assert references("aarch64", "23000090 830000f9 60400091")[-1] == ("add", [0x5010], False)
    # bl, b, b.eq, cbz x1, tbz w0 #3, adr x0: each 0x40 further
    assert references("aarch64", "10000094 10000014 00020054 010200b4 00021836 00020010") == [
        ("bl", [0x1040], False),
        ("b", [0x1044], True),
        ("b.eq", [0x1048], True),
        ("cbz", [0x104C], True),
        ("tbz", [0x1050], True),
        ("adr", [0x1054], False),
    ]


def test_a_constant_made_with_fneg_is_no_arithmetic() -> None:
    def mnemonics(code: str) -> list[str]:
        return [i.mnemonic for i in _decode_arm(bytes.fromhex(code), 0x1000)]

    # Movi v0.4s, #0x80, lsl #24; fneg v0.2d, v0.2d; fadd v1.4s, v1.4s, v4.4s.
    movi, fneg, other = (
        "0064044f",
        "00f8e06e",
        "21d4244e",
    )
    load, copy, call = "0000c03d", "401ca24e", "10000094"  # ldr q0, [x0]; mov v0.16b, v2.16b; bl
    assert mnemonics(movi + fneg) == ["movi", "fneg-constant"] and not is_float_instruction("fneg-constant", "aarch64")
    assert mnemonics(movi + other + fneg + fneg) == ["movi", "fadd", "fneg-constant", "fneg-constant"]
    for written in (load, copy, call):
        assert mnemonics(movi + written + fneg)[-1] == "fneg" and is_float_instruction("fneg", "aarch64")
    # A jump to the fneg: b 0x1010 at 0x1000, nop, movi, nop, fneg.
    assert mnemonics("04000014" + "1f2003d5" + movi + "1f2003d5" + fneg)[-1] == "fneg"
    assert mnemonics(fneg) == ["fneg"]


def test_the_newest_integer_instructions_are_known() -> None:
    code = {
        "c4e2695ec1": "tdpbusd",
        "c4e27b4b0c18": "tileloadd",
        "c4e2784900": "ldtilecfg",
        "c4e26d50d9": "vpdpbusd",
        "c4e26f50d9": "vpdpbssd",
        "62f56c4858d9": "vaddph",
        "c4e26a5cc1": "tdpbf16ps",
    }
    for data, mnemonic in code.items():
        assert references("x86_64", data) == [(mnemonic, [], False)]


def test_every_x86_mnemonic_named_like_a_float_one_is_judged() -> None:
    """All 1,894 mnemonics of the decoder: whatever is named like a float operation is one, or moves or combines
    bits.
    """
    moves = re.compile(
        r"v?(mov|mask|blend|broadcast|shuf|unpck|perm|insert|extract|and|andn|or|xor|test|gather|scatter|compress|expand)"
    )
    # Integers whose names end alike (packed doublewords, strings, shadow stacks), and Knights Corner, which is not
    # decoded.
    integer = re.compile(
        r"v?p|tdpb(us|ss)d|(ins|lods|outs|scas|stos|wrs|wrus)[sd]|incsspd|rdsspd|lss|seamops|ccs_hash|clflush|fx(save|rstor)"
    )
    corner = re.compile(
        r"v(addn|addsets|exp223|fixupnan|gmax|gmin|loadunpack|log2|rcp23|rndfxpnt|rsqrt23|scaleps|subr)"
    )
    names = [k.lower() for k, v in vars(iced_x86.Mnemonic).items() if isinstance(v, int)]
    named_float = [n for n in names if re.search(r"(ps|pd|ss|sd|ph|sh|bf16)$|[ps][sdh]2|2[pst][sdh]|bf16|^f|^v?cvt", n)]
    for name in named_float:
        harmless = moves.match(name) or integer.match(name) or corner.match(name)
        assert is_float_instruction(name, "x86_64") != bool(harmless and not name.startswith(("pf", "pi2f"))), name
    assert len(named_float) > 500


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
    report = inspect_library(
        export(tmp_path / "f.so", element_wise(lambda v: v * 1.5, "float32", parallel)), ["kernel"]
    )
    assert any("mul" in o.instruction for o in report.offenders)
    assert all(o.function.startswith("kernel_compute_" + (" at 0x" if parallel else "")) for o in report.offenders)
    report = inspect_library(export(tmp_path / "i.so", element_wise(lambda v: v * 3, "int32", parallel)), ["kernel"])
    assert report.offenders == () and report.instructions > 50 and report.functions >= 4


def test_a_call_out_of_the_library_is_an_offence(tmp_path: Path) -> None:
    report = inspect_library(
        export(tmp_path / "r.so", element_wise(lambda v: v + tirx.call_extern("int32", "lrand48"))), ["kernel"]
    )
    assert any("(lrand48)" in o.instruction for o in report.offenders)


def test_memory_functions_are_allowed(tmp_path: Path) -> None:
    report = inspect_library(export(tmp_path / "m.so", element_wise(lambda v: v)), ["kernel"])
    assert report.offenders == ()


def test_other_exported_functions_are_left_out_with_all_that_only_they_reach(tmp_path: Path) -> None:
    functions = {
        "kernel": element_wise(lambda v: v * 3, parallel=True),
        "border": element_wise(lambda v: v * 1.5, "float32", parallel=True),
    }
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
