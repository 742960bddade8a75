"""Compile the Triton kernels without a GPU, and count registers, instructions and memory accesses in the machine code.

    python -m kvkern.kernels.aot                            print every kernel, variant and target, one per line
    python -m kvkern.kernels.aot --target sm_90 --asm DIR   also keep the assembly
    python -m kvkern.kernels.aot --write FILE               write the counts as JSON: the golden file of the tests

Needs triton, but no GPU. The counts come from SASS (NVIDIA) or AMD's assembly, and from the resource usage that the binary
states. So a test on any machine notices a kernel that spills, or whose loads shrink to 8 bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import chunk_keys_triton, paged_copy_triton
from .target import TARGETS, Target, register_limit

_POINTERS = {
    "planes_ptr": "*i64", "weights_ptr": "*u64", "block_ids_ptr": "*i32", "slot_ids_ptr": "*i64", "slots_ptr": "*u8",
    "checksums_ptr": "*i64", "tokens_ptr": "*i32", "cu_tokens_ptr": "*i64", "num_chunks_ptr": "*i64",
    "num_chunks_out_ptr": "*i64",
}  # fmt: skip  # every other pointer points to int32
# name of the layout -> (outer runs, inner runs, bytes of a run) of one block
COPIES = {
    "fused K and V 64 KiB": (1, 1, 64 << 10),
    "split K/V 32 KiB": (1, 1, 32 << 10),
    "MLA 18 KiB": (1, 1, 18 << 10),
    "head-sliced rows 2 KiB": (16, 1, 2 << 10),
    "one head of a token 256 B": (16, 8, 256),
    "token pool, page 1": (1, 1, 2 << 10),
    "MLA fp8 656 B, page 1": (1, 1, 656),
}
CHUNK_BLOCKS = 128  # blocks per chunk of the compiled variants: more than any group holds
# also compiled with the deepest ring, and with a ring for the checksum alone
DEEP_RINGS = ("split K/V 32 KiB", "MLA fp8 656 B, page 1")


@dataclass(frozen=True)
class KernelVariant:
    """One kernel with its `constexpr` arguments and compile options."""

    name: str
    kernel: Any  # triton.JITFunction
    constants: Mapping[str, Any]
    num_warps: int
    max_registers: int
    moved_nbytes: int = 0  # bytes one thread moves in one turn of the copy loop; 0: not a copy


def kernel_variants(target: Target) -> Iterator[KernelVariant]:
    """Yield every kernel with the constants and options that the launchers use on this target."""
    for layout in COPIES:
        for op in ("gather", "scatter", "checksum"):
            yield _copy_variant(target, op, layout, 1)
        if target.backend == "cuda":
            deep = [("gather", 4), ("scatter", 4), ("checksum", 3)] if layout in DEEP_RINGS else []
            for op, stages in [("gather", 3), ("scatter", 3), *deep]:
                yield _copy_variant(target, op, layout, stages)
    keys = chunk_keys_triton
    for tokens, extras in ((16, False), (16, True), (128, False), (512, False)):
        name = f"chain_segments, {tokens} tokens" + (", extras" if extras else "")
        yield KernelVariant(
            name, keys.chain_segments, {"CHUNK_TOKENS": tokens, "EXTRAS": extras, "LANES": 32}, 1, keys.MAX_REGISTERS
        )
    yield KernelVariant("chain_parents", keys.chain_parents, {"CHUNK_TOKENS": 16, "LANES": 32}, 1, keys.MAX_REGISTERS)
    constants = {"CHUNK_TOKENS": 16, "LANES": 128}
    yield KernelVariant("chunk_keys_of_chains", keys.chunk_keys_of_chains, constants, 4, keys.MAX_REGISTERS)


def _copy_variant(target: Target, op: str, layout: str, stages: int) -> KernelVariant:
    geometry = paged_copy_triton.TileGeometry.of(COPIES[layout], 16, CHUNK_BLOCKS, target.warp_size, stages)
    constants = {"TO_SLOTS": op != "scatter", "STORE": op != "checksum", **geometry.constants()}
    if op == "checksum":
        constants |= {"slots_ptr": None, "slot_ids_ptr": None}
    name = f"{op}, {layout}" + (f", ring of {stages}" if stages > 1 else "")
    moved = geometry.UNROLL * paged_copy_triton.VECTOR_NBYTES
    kernel, registers = paged_copy_triton.copy_chunks, paged_copy_triton.MAX_REGISTERS
    return KernelVariant(name, kernel, constants, geometry.num_warps, registers, moved)


@dataclass(frozen=True)
class LoopCounts:
    """A loop of the machine code: the instructions of one turn, and the global accesses by width in bits."""

    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    asyncs: dict[int, int]  # cp.async: global to shared memory, past the registers


@dataclass(frozen=True)
class CompiledKernel:
    """The machine code of a variant and its resource usage."""

    registers: int  # per thread, 32 bits each; vector registers on AMD
    local_nbytes: int  # per thread: stack and spilled registers
    shared_nbytes: int  # per program
    instructions: int
    loops: tuple[LoopCounts, ...]  # loops that access global memory, innermost first
    asm: str

    @property
    def copy_loop(self) -> LoopCounts | None:
        """The innermost loop that stores. If no loop stores, the innermost loop that reads 16-byte vectors."""
        reading = (loop for loop in self.loops if 128 in loop.loads | loop.asyncs)
        return next((loop for loop in self.loops if loop.stores), None) or next(reading, None)


def compile_variant(variant: KernelVariant, target: Target) -> CompiledKernel:
    """Compile a variant for a target and read its machine code. Takes about a second."""
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants
        else _POINTERS.get(name, "*i32") if name.endswith("_ptr")
        else "i64" if name == "slot_stride" else "i32"
        for name in names
    }  # fmt: skip
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or name == "slot_stride"]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": variant.num_warps, **register_limit(variant.max_registers, target.backend)},
    )
    shared = compiled.metadata.shared
    if target.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"], shared)
    return _read_sass(compiled.asm["sass"], _resource_usage(compiled.asm["cubin"]), shared)


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _read_sass(asm: str, usage: str, shared: int) -> CompiledKernel:
    code: list[str] = []
    labels = {}
    for line in asm.splitlines():
        if found := re.fullmatch(r"(L\w+):", line.strip()):
            labels[found[1]] = len(code)
        elif found := re.fullmatch(r"(?:[-\w]+:){4}[-\w]+\s+(.*);", line):
            code.append(found[1])
    registers, stack, local = (_number(usage, rf"{name}:(\d+)") for name in ("REG", "STACK", "LOCAL"))
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code)
    return CompiledKernel(registers, max(stack, local, 4 * spills), shared, len(code), _memory_loops(code, labels), asm)


def _read_amd(asm: str, shared: int) -> CompiledKernel:
    registers, local = (_number(asm, rf"\.{name}:\s*(\d+)") for name in ("vgpr_count", "private_segment_fixed_size"))
    bodies: dict[str, list[str]] = {}  # innermost loop's header -> instructions; LLVM names it beside each block
    block, instructions = "", 0
    for line in asm.splitlines():
        if found := re.match(r"\.(L\w+):|; (%bb\.\d+):", line):
            block = header = (found[1] or found[2]).removeprefix("L")
        if found := re.search(r"in Loop: Header=(\w+)", line):
            header = found[1]
        if line.startswith("\t") and line[1:2].islower() and block:
            bodies.setdefault(header, []).append(line.strip())
            instructions += 1
    own = [name for name in bodies if re.search(rf"^\.L{re.escape(name)}:.*(?:\n\s*;.*)*Loop Header", asm, re.M)]
    loops = (_loop_counts(bodies[name], _amd_access) for name in own)
    return CompiledKernel(
        registers, local, shared, instructions, tuple(loop for loop in reversed(list(loops)) if loop), asm
    )


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, (
        f"the compiler's report has no match for {pattern!r}: its format has changed, adapt the pattern"
    )
    return int(found[1])


def _memory_loops(code: list[str], labels: dict[str, int]) -> tuple[LoopCounts, ...]:
    found = []
    for i, line in enumerate(code):
        # the target of a branch is a label, or the address of an instruction, which has 16 bytes
        target = re.search(r"\bBRA\b.*?(?:(L\w+)|\b0x([0-9a-f]+))", line)
        if target:
            begin = labels.get(target[1], len(code)) if target[1] else int(target[2], 16) // 16
            if begin < i:
                found.append(_loop_counts(code[begin : i + 1], _sass_access))
    return tuple(sorted(filter(None, found), key=lambda loop: loop.instructions))


def _loop_counts(body: list[str], access: Any) -> LoopCounts | None:
    """Count the accesses of one loop. `access` reads (kind, bits) from a line. None if the loop accesses no global memory."""
    accesses = [found for line in body if (found := access(line))]
    widths = ([bits for kind, bits in accesses if kind == which] for which in ("load", "store", "async"))
    return LoopCounts(len(body), *map(_histogram, widths)) if accesses else None


def _histogram(widths: list[int]) -> dict[int, int]:
    return {bits: widths.count(bits) for bits in sorted(set(widths))}


def _sass_access(line: str) -> tuple[str, int] | None:
    found = re.search(r"\b(LDGSTS|LDG|STG|LD|ST)\.([\w.]+)", line)
    if found is None:
        return None
    sizes = {"128": 128, "64": 64, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
    bits = next((sizes[part] for part in found[2].split(".") if part in sizes), 32)
    return ({"LDGSTS": "async", "LDG": "load", "LD": "load"}.get(found[1], "store"), bits)


def _amd_access(line: str) -> tuple[str, int] | None:
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", line)
    if found is None:
        return None
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    return (found[1], sizes.get(found[2], 8))


def golden_record(variant: KernelVariant, built: CompiledKernel) -> dict[str, Any]:
    """Return the golden record of one variant and target."""
    record: dict[str, Any] = {"registers": built.registers, "instructions": built.instructions}
    if variant.moved_nbytes and built.copy_loop:
        loop = built.copy_loop
        per_byte = round(loop.instructions / variant.moved_nbytes, 2)
        record |= {"loop_instructions": loop.instructions, "instructions_per_byte": per_byte}
        if loop.asyncs:
            record["shared_nbytes"] = built.shared_nbytes
    return record


def main() -> None:
    """Run the command line. See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", choices=[target.name for target in TARGETS], help="compile for this target only (default: all)"
    )
    parser.add_argument("--asm", type=Path, metavar="DIR", help="write the assembly of each variant into this folder")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the counts as JSON")
    args = parser.parse_args()
    if args.target and args.write:
        parser.error(f"--write was given with --target {args.target}, but it writes every target: leave out --target")
    golden: dict[str, Any] = {}
    for target in TARGETS:
        if args.target not in (None, target.name):
            continue
        for variant in kernel_variants(target):
            built = compile_variant(variant, target)
            record = golden_record(variant, built)
            golden[f"{variant.name} | {target.name}"] = record
            loop = asdict(built.copy_loop) if built.copy_loop else ""
            print(f"{target.name:7s} {variant.name:36s} local {built.local_nbytes} {record} {loop}", flush=True)
            if args.asm:
                args.asm.mkdir(parents=True, exist_ok=True)
                name = re.sub(r"\W+", "_", f"{variant.name} {target.name}")
                (args.asm / f"{name}.s").write_text(built.asm)
    if args.write:
        args.write.write_text(json.dumps({"triton": triton.__version__, "counts": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main()
