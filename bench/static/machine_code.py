"""Reads what Triton compiled: registers, spills, tensor-core instructions, and how wide memory is accessed.

Machine code does not say which tensor an instruction accesses. The LLVM IR it was made from does: every value there
is assigned once, so an address leads back to the kernel's arguments. Widths by tensor are therefore read off the IR,
and held against those in the machine code, so that an access split on the way does not pass.
"""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton

# An access of global memory in LLVM IR: Triton's inline PTX, LLVM's own instructions, AMD's buffer intrinsics.
# A tab in that PTX stands as \09 in the IR, and in front of a load that has no mask there is nothing else.
# The types are as in v4.b32, <4 x i32>, bfloat, v4i32; cp.async gives its bytes; a bulk copy (TMA) gives neither.
ACCESS = re.compile(
    r"(?:\b|\\09)(?:ld|st)\.global[.\w:]*?\.(?P<ptx>(?:v\d\.)?[bsuf]\d+)\b"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*?\], (?P<bytes>0x[0-9a-f]+|\d+)"
    r"|cp\.async\.bulk(?!\.(?:commit|wait))"
    r"|\bload (?:volatile )?(?P<load><[^>]+>|\w+), ptr addrspace\(1\)"
    r"|\bstore (?:volatile )?(?P<store><[^>]+>|\w+) .*?, ptr addrspace\(1\)"
    r"|@llvm\.amdgcn\.\w+\.ptr\.buffer\.(?:load|store)\.(?P<buffer>\w+)"
)
LLVM_BITS = {"bfloat": 16, "half": 16, "float": 32, "double": 64, "ptr": 64}
SASS_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)\s")
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # none of them: 4
AMD_ACCESS = re.compile(r"\b(?:buffer|global|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)")
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    warps: int
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a program
    tensor_memory: int  # columns a program; 0 but on Blackwell
    tensor_core: dict[str, int]  # instructions by name
    loads: list[int]  # widths of global loads in the machine code, in bytes
    stores: list[int]
    # Bytes of the narrowest access, by pointer; 0: used, but no access leads to it; "?": accesses that lead to none.
    arguments: dict[str, int]
    split: bool  # the machine code has a narrower access than the IR


def read(binary: Any) -> Code:
    """What Triton's CompiledKernel `binary` holds, for a GPU of NVIDIA's or AMD's.

    Raises ValueError if the compiler's listing lacks a figure.
    """
    if "cubin" in binary.asm:
        registers, spilled, code = _disassemble(binary.asm["cubin"])
        tensor_core = re.findall(r"\b(UTC\w*MMA|HGMMA|HMMA)\b", code)
        accesses = [
            (op == "STG", min([SASS_BYTES[m] for m in modifiers.split(".") if m in SASS_BYTES], default=4))
            for op, modifiers in SASS_ACCESS.findall(code)
        ]
    else:
        code = binary.asm["amdgcn"]
        registers, spilled = (int(_find(rf"; {name}: (\d+)", code)) for name in ("TotalNumVgprs", "ScratchSize"))
        tensor_core = re.findall(r"\bv_(mfma)_", code)
        accesses = [(op == "store", AMD_BYTES[unit]) for op, unit in AMD_ACCESS.findall(code)]
    arguments, narrowest = trace(binary.asm["llir"], _pointers(binary.src.signature))
    return Code(
        binary.metadata.num_warps,
        registers,
        spilled,
        binary.metadata.shared,
        getattr(binary.metadata, "tmem_size", 0),
        dict(collections.Counter(tensor_core)),
        sorted({width for store, width in accesses if not store}),
        sorted({width for store, width in accesses if store}),
        arguments,
        min((width for _, width in accesses), default=16) < narrowest,
    )


def _pointers(signature: dict[str, str]) -> dict[int, str]:
    """Names of the arguments that lead to memory, by position in the machine's list of arguments."""
    found, position = {}, 0
    for name, kind in signature.items():
        if kind.startswith(("*", "tensordesc")):
            found[position] = name
        if kind.startswith("tensordesc"):
            position += 2 * (_find(r"\[([^\]]*)\]", kind).count(",") + 1)  # the sizes and strides of its dimensions
        position += kind != "constexpr"
    return found


def trace(llir: str, pointers: dict[int, str]) -> tuple[dict[str, int], int]:
    """Bytes of the narrowest global access by name of the pointer, as in Code.arguments, and of all.

    `pointers` names the kernel's arguments that are pointers, by position. An access belongs to every pointer that its
    operands are computed from. What was loaded is no address, so the way back ends at a load.
    """
    sources: dict[str, list[str]] = {}
    accesses: list[tuple[int, list[str]]] = []
    for line in llir.splitlines():
        if not line.startswith("  "):
            continue  # a function's head, a label, a declaration
        target, equals, right = line.strip().partition(" = ") if line.startswith("  %") else ("", "", line)
        operands = re.findall(r"%[\w.]+", right)
        widths = [_width(match) for match in ACCESS.finditer(right)]
        if widths:
            accesses.append((min(widths), operands))
        elif equals:
            sources[target] = operands
    index = {f"%{i}": name for i, name in pointers.items()}
    used = {operand for operands in [*sources.values(), *(a for _, a in accesses)] for operand in operands}
    found: dict[str, list[int]] = {name: [] for value, name in index.items() if value in used}
    for width, operands in accesses:
        seen, ahead = set(operands), list(operands)
        while ahead:
            new = set(sources.get(ahead.pop(), ())) - seen
            seen |= new
            ahead.extend(new)
        for name in {index[value] for value in seen if value in index} or {"?"}:
            found.setdefault(name, []).append(width)
    narrowest = min((width for width, _ in accesses), default=16)
    return {name: min(widths, default=0) for name, widths in found.items()}, narrowest


def _width(match: re.Match[str]) -> int:
    """Bytes of one access."""
    if match["bytes"]:
        return int(match["bytes"], 0)
    text = match["ptx"] or match["load"] or match["store"] or match["buffer"]
    if text is None:
        return 16  # a bulk copy has lines of 16 bytes at least
    count, element = re.fullmatch(r"<?(?:v?(\d+)(?: x |\.)?)?([a-z]+\d*)>?", text).groups()  # type: ignore[union-attr]
    return int(count or 1) * (LLVM_BITS.get(element) or int(_find(r"(\d+)$", element))) // 8


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers and bytes of local memory a thread, and the machine code in words."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([os.path.join(tools, tool), option, file.name], capture_output=True, text=True, check=True)
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return int(_find(r"REG:(\d+)", usage.stdout)), int(_find(r"STACK:(\d+)", usage.stdout)), code.stdout


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in what the compiler wrote")
    return match[1]
