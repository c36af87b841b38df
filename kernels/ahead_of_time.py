"""Compile recorded launches for GPUs that this machine need not have, and report the resources each kernel uses.

`backend.record` collects launches made with tensors on the ``meta`` device; Triton compiles them to machine
code without a GPU. Registers and spills come from NVIDIA's assembler (bundled with Triton) or from the
metadata in AMD's assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shodh_moe.kernels.backend import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Limits per program: shared memory in bytes, and columns of Blackwell's tensor memory.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_MEMORY_LIMIT = 512
_OPTIONS = ("num_warps", "num_stages")
_DTYPES = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "int64": "i64", "int32": "i32", "int8": "i8", "bool": "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel on a target."""

    registers: int  # per thread
    shared_bytes: int
    spill_bytes: int  # per thread; stores to local memory


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that affects its compiled code; hashable, so that duplicates can be removed."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16 (pointers: by address)
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's file and its name there."""
        file = self.kernel.__module__.rpartition(".")[2].removesuffix("_triton")
        return f"{file}.{self.kernel.__name__.strip('_').removesuffix('_kernel')}"


def variant(launch: Launch) -> Variant:
    """The variant that Triton would compile for a launch. Triton specialises integers that are 1 or multiples of 16."""
    signature, constexprs, divisible = {}, {}, []
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _DTYPES[str(value.dtype).removeprefix("torch.")]
            divisible.append(i)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(i)
    for key, value in launch.meta.items():
        if key not in _OPTIONS:
            signature[key], constexprs[key] = "constexpr", value
    options = {key: launch.meta[key] for key in _OPTIONS if key in launch.meta}
    return Variant(
        launch.kernel, tuple(signature.items()), tuple(constexprs.items()), tuple(divisible), tuple(options.items())
    )


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile for one of `TARGETS`.

    Raises:
        RuntimeError: the kernel would not run: it needs too much shared or tensor memory, or has no code.
        Exception: compilation failed; Triton and the assembler raise errors of many types.
    """
    gpu = TARGETS[target]
    constexprs = dict(variant.constexprs)
    if gpu.backend == "hip" and "PRECISION" in constexprs:
        constexprs["PRECISION"] = "ieee"  # what `backend.dot_precision` returns on AMD
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.divisible},
    )
    compiled = triton.compile(source, target=gpu, options=dict(variant.options))
    shared = int(compiled.metadata.shared)
    if shared > SHARED_LIMIT[target]:
        raise RuntimeError(f"{shared} bytes of shared memory; {target} has {SHARED_LIMIT[target]}")
    if (getattr(compiled.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY_LIMIT:
        raise RuntimeError(f"{compiled.metadata.tmem_size} columns of tensor memory; there are {TENSOR_MEMORY_LIMIT}")
    if gpu.backend == "hip":
        registers, spills = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spills = _assemble(compiled.asm["ptx"], gpu.arch)
    if registers < 8:  # if a tile is too large for sm_100, Triton 3.7 compiles a kernel without code
        raise RuntimeError(f"compiled to an empty kernel ({registers} registers): use smaller blocks")
    return Resources(registers, shared, spills)


def _read_amd(assembly: str) -> tuple[int, int]:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[-1])

    # Scalar registers spill to lanes of vector registers, not to memory, so they are not counted.
    return number("vgpr_count"), 4 * number("vgpr_spill_count")


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        # Triton passes the same options, so the registers are those of the code that will run.
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture}", source]
        result = subprocess.run([*command, "-o", Path(folder, "cubin")], capture_output=True, text=True, check=True)
    registers = int(re.findall(r"Used (\d+) registers", result.stderr)[-1])
    spills = int(re.findall(r"(\d+) bytes spill stores", result.stderr)[-1])
    return registers, spills
