"""Compile every Triton kernel to machine code for chips that are not here, and look at what came out.

    python -m benchmarks.kernel_gate                              table to benchmarks/results/kernel_gate.md
    python -m benchmarks.kernel_gate --json --chips cuda:90       rows on standard output

A row passes with no register spills, shared memory within the chip's limit, a matrix instruction where the
kernel multiplies matrices, and no 32-bit product in its address arithmetic (500k tokens of 4,096 do not fit
in 31 bits). The specialisation is the one the JIT would choose: pointers and strides divisible by 16.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pronghorn.ops.triton import bf16, cross_entropy, gated, lora, nf4, norm, rope
from pronghorn.ops.triton.launch import DEFAULTS, Launch, row_launch

RESULTS = Path(__file__).parent / "results" / "kernel_gate.md"
# chip -> bytes of shared memory one block may use (CUDA programming guide; CDNA3 ISA)
CHIPS = {
    "cuda:80": 163 * 1024, "cuda:86": 99 * 1024, "cuda:89": 99 * 1024, "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024, "cuda:120": 99 * 1024, "hip:gfx942": 64 * 1024,
}  # fmt: skip
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)")
# of Triton's own representation: a product of two numbers or tensors of 32 bits or fewer
NARROW = re.compile(r"arith\.muli .*: (?:tensor<(?:\d+x)+)?i(?:1|8|16|32)\b")


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments, its compile-time constants and how it is launched."""

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    launch: Launch
    product: bool = False


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case on a chip; ``registers`` is 0 where it does not say."""

    kernel: str
    chip: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: bool
    wide: bool
    passed: bool


def cases() -> list[Case]:
    """Every kernel at the sizes that models use: rows of 4,096 and 16,384, heads of 128, rank 16 and 64."""
    how = DEFAULTS
    block = {"BLOCK": how["nf4"].block[0]}
    weights = [
        Case("nf4", nf4.nf4_kernel, "*u8 *fp32 *fp32 *bf16 i32/16 i32/16", block, how["nf4"]),
        Case("absmax", nf4.absmax_kernel, "*u8 *fp32 *fp32 *fp32 i32/16 fp32 i32/16", block, how["absmax"]),
    ]
    casts = [Case("bf16", bf16.bf16_kernel, "*i32 *i16 i32/16", {"BLOCK": how["bf16"].block[0]}, how["bf16"])]
    return [*_norms(), *_gated(), *_ropes(), *_losses(), *weights, *_adapters(), *casts]


def _norms() -> list[Case]:
    forward = "*bf16 *bf16 *bf16 *bf16 *fp32 i32/16 i32/16 fp32 fp32"
    back = "*bf16 *bf16 *fp32 *bf16 *bf16 i32/16 i32/16 i32/16 fp32"
    found = []
    for columns in (4096, 16384):
        how = row_launch(columns)
        for early, centered in ((True, False), (False, False), (False, True)):
            name = f"{'early' if early else 'layer' if centered else 'late'} {columns}"
            same = {"BLOCK": how.block[0], "WEIGHT": True, "CENTERED": centered}
            more = {"BIAS": centered, "EARLY": early}
            found.append(Case(f"norm_forward {name}", norm.norm_forward_kernel, forward, same | more, how))
            if not early:  # the backward is the same for both
                found.append(Case(f"norm_backward {name}", norm.norm_backward_kernel, back, same, how))
    return found


def _gated() -> list[Case]:
    how = DEFAULTS["gated_forward"]
    forward = "*bf16 *bf16 *bf16 i32/16 i32 i32/16 i32/16 i32/16"
    back = "*bf16 *bf16 *bf16 *bf16 *bf16 i32/16 i32 i32/16 i32/16 i32/16"
    found = []
    for activation, kind in gated.KINDS.items():
        constants = {"BLOCK": how.block[0], "KIND": kind}
        found.append(Case(f"gated_forward {activation}", gated.gated_forward_kernel, forward, constants, how))
        found.append(Case(f"gated_backward {activation}", gated.gated_backward_kernel, back, constants, how))
    return found


def _ropes() -> list[Case]:
    how = DEFAULTS["rope"]
    types = "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16" + " i32" * 3 + " i32/16" * 10
    found = []
    for halves in (True, False):
        for backward in (False, True):
            constants = {"HEADS": how.block[0], "PAIRS": 64, "DIM": 128, "HALVES": halves,
                         "HALF_TABLE": False, "BACKWARD": backward}  # fmt: skip
            name = f"rope {'halves' if halves else 'interleaved'} {'backward' if backward else 'forward'}"
            found.append(Case(name, rope.rope_kernel, types, constants, how))
    return found


def _losses() -> list[Case]:
    how = DEFAULTS["cross_entropy"]
    types = "*bf16 *i64 *fp32 *fp32 i32/16 i32/16 fp32 fp32 i32"
    return [
        Case(f"cross_entropy {name}", cross_entropy.cross_entropy_kernel, types,
             {"BLOCK": how.block[0], "CAP": capped, "GRAD": True}, how)
        for name, capped in (("plain", False), ("softcap", True))
    ]  # fmt: skip


def _adapters() -> list[Case]:
    how = DEFAULTS["lora_add"]
    types = "*bf16 *bf16 *bf16 i32/16 i32/16 i32/16 i32/16 i32/16 i32/16 fp32"
    return [
        Case(f"lora_add rank {rank}", lora.lora_add_kernel, types,
             {"ROWS": how.block[0], "COLUMNS": how.block[1], "RANK": rank}, how, product=True)
        for rank in (16, 64)
    ]  # fmt: skip


def compile_case(case: Case, chip: str) -> Row:
    """Compile one case for one chip and read the machine code."""
    backend, arch = chip.split(":")
    cuda = backend == "cuda"
    target = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
    names = case.kernel.arg_names
    types = dict(zip((n for n in names if n not in case.constants), case.types.split(), strict=True))
    signature = {n: "constexpr" if n in case.constants else types[n].removesuffix("/16") for n in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, n in enumerate(names)
        if n in types and (types[n].startswith("*") or types[n].endswith("/16"))
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options=case.launch.options)
    registers, spills, matrix = (
        _read_cuda(compiled.asm["cubin"], case.product) if cuda else _read_hip(compiled.asm["amdgcn"])
    )
    shared = int(compiled.metadata.shared)
    wide = not NARROW.search(compiled.asm["ttir"])
    passed = wide and spills == 0 and shared <= CHIPS[chip] and (matrix or not case.product)
    return Row(case.name, chip, registers, spills, shared, matrix, wide, passed)


def _read_cuda(cubin: bytes, product: bool) -> tuple[int, int, bool]:
    """(registers, accesses to local memory, matrix instructions); disassembled only where needed."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        registers, stack, local = (
            int(re.findall(rf"{k}:(\d+)", usage)[0]) for k in ("REG", "STACK", "LOCAL")
        )
        if not (stack or local or product):
            return registers, 0, False
        code = _output(str(tools / "nvdisasm"), file.name)
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", code)), bool(MATRIX.search(code))


def _read_hip(code: str) -> tuple[int, int, bool]:
    def figure(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])

    spills = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    return figure("vgpr_count"), spills, bool(MATRIX.search(code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cell(row: Row) -> str:
    """A row as the table shows it."""
    marks = (" M" if row.matrix else "") + ("" if row.passed else " FAIL")
    return f"{row.registers} / {row.spills} / {row.shared_bytes}{marks}"


def table(rows: list[Row]) -> str:
    """The rows as Markdown: one line a kernel, one column a chip."""
    chips = list(CHIPS)
    lines = [
        "# Triton kernels compiled ahead of time",
        "",
        f"Triton {triton.__version__}; made by `python -m benchmarks.kernel_gate`.",
        "Each cell: registers / spills / shared bytes; M: matrix instructions; FAIL: breaks the gate.",
        "",
        "| kernel | " + " | ".join(chips) + " |",
        "|---" * (len(chips) + 1) + "|",
    ]
    cells = {(row.kernel, row.chip): cell(row) for row in rows}
    for kernel in dict.fromkeys(row.kernel for row in rows):
        lines.append(f"| {kernel} | " + " | ".join(cells[kernel, chip] for chip in chips) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile all, write the table or JSON; exit code 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows instead of writing the table")
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="with --json")
    arguments = parser.parse_args()
    if arguments.chips != list(CHIPS) and not arguments.json:
        parser.error("the table needs every chip: use --chips with --json")
    rows = [compile_case(case, chip) for case in cases() for chip in arguments.chips]
    if arguments.json:
        print(
            json.dumps(
                {"triton": triton.__version__, "rows": [asdict(row) | {"cell": cell(row)} for row in rows]}
            )
        )
    else:
        RESULTS.write_text(table(rows), encoding="utf-8")
        print(table(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
