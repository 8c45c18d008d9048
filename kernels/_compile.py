"""Compile kernels ahead of time, without a GPU, and say what they need.

    python -m stattn.kernels._compile attention patchify --capability 80 90 100

Every kernel file has a function ``specializations()`` that lists what its launcher compiles: each kernel with each of
its CONFIGS. The command prints one JSON line per kernel with its registers, its shared memory and its local memory
(spilled registers and indexed arrays), in bytes, beside what it may take, or the error with which it does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stattn.kernels._device import LITTLE_SHARED

# Bytes of shared memory that a program may take. sm_86 and sm_89 take what sm_80 does, and have LITTLE_SHARED.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


class Specialization(NamedTuple):
    """A kernel as a launcher compiles it.

    name: for people. fn: the ``triton.jit`` or ``gluon.jit`` function. types: argument name -> type ("*bf16", "i32",
    "fp32"), in order. constants: argument name -> value, of its constexprs (a None stands for an absent pointer).
    options: num_warps and num_stages. unaligned: arguments that are no multiple of 16; all other pointers and integers
    are. local: bytes of local memory that it may take at most on sm_90 and later; a file that allows any says why.
    only: the one capability to compile a variant for that takes long, None for all. little: whether it is launched
    on GPUs that have but LITTLE_SHARED.
    """

    name: str
    fn: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    unaligned: tuple[str, ...] = ()
    local: int = 0
    only: int | None = None
    little: bool = True


class Needs(NamedTuple):
    """What a compiled kernel needs: registers a thread, bytes of shared and of local memory, and its machine code."""

    registers: int
    shared: int
    local: int
    cubin: bytes


def compile_for(kernel: Specialization, capability: int) -> Needs:
    """Compile a kernel for a compute capability (90 for 9.0)."""
    names = kernel.fn.arg_names
    signature = {name: "constexpr" if name in kernel.constants else kernel.types[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name][0] in "*i" and name not in kernel.unaligned and signature[name] != "i1"
    }
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    source_of: Any = ASTSource
    if kernel.fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    source = source_of(fn=kernel.fn, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(kernel.options))
    usage = _resources(built.asm["cubin"])
    return Needs(usage["REG"], built.metadata.shared, usage["LOCAL"] + usage["STACK"], built.asm["cubin"])


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def specializations(stem: str) -> Iterator[Specialization]:
    """List the kernels of one file."""
    yield from importlib.import_module(f"stattn.kernels.{stem}").specializations()


def main() -> None:
    """Compile the kernels of some files and print what they need."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stems", nargs="+")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    args = parser.parse_args()
    triton.knobs.compilation.disable_line_info = True  # it takes two fifths of the time and changes no instruction
    jobs = [
        (stem, kernel.name, capability)
        for stem in args.stems
        for kernel in specializations(stem)
        for capability in args.capability
        if kernel.only in (None, capability)
    ]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for row in pool.map(_row, jobs):
            print(json.dumps(row), flush=True)


def _row(job: tuple[str, str, int]) -> dict[str, Any]:
    stem, name, capability = job
    kernel = next(each for each in specializations(stem) if each.name == name)
    row: dict[str, Any] = {"stem": stem, "kernel": name, "capability": capability}
    try:
        needs = compile_for(kernel, capability)._asdict()
    except Exception as error:  # the others are to be compiled all the same
        return row | {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
    del needs["cubin"]
    # Before wgmma, products take their operands from registers.
    room = LITTLE_SHARED if kernel.little and capability == 80 else SHARED[capability]
    return row | needs | {"allowed": kernel.local if capability >= 90 else 3 * kernel.local, "room": room}


if __name__ == "__main__":
    main()
