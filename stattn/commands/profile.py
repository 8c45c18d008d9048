"""`stattn profile`: run a program under Nsight Compute, Nsight Systems or torch.profiler, with stattn's ranges on.

Where the tool is missing, the exact command line is printed, to be run where it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = {"ncu": "Nsight Compute", "nsys": "Nsight Systems", "torch": "torch.profiler"}
ENDINGS = {"ncu": ".ncu-rep", "nsys": ".nsys-rep", "torch": ".json"}
SCRIPTS = {"stattn": "stattn.cli", "pytest": "pytest"}  # what runs as a module, too
USED_BY = {"kernel": ("ncu", "torch"), "range": ("ncu", "nsys"), "launches": ("ncu",), "skip": ("ncu",)}
ROWS = 20  # of the table of torch.profiler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn profile`."""
    from stattn.cli import count, positive

    tools = ", ".join(f"{name} ({what})" for name, what in TOOLS.items())
    parser.add_argument("--tool", choices=tuple(TOOLS), required=True, help=tools)
    parser.add_argument(
        "--kernel", metavar="REGEX", help="ncu: measure kernels whose name it matches; torch: print these"
    )
    parser.add_argument(
        "--range", metavar="NAME", help="ncu, nsys: only within this range, as stattn.attention, stattn.step.3"
    )
    parser.add_argument(
        "--launches", type=positive, help="ncu: number of kernels to measure, each replayed (default: 1)"
    )
    parser.add_argument("--skip", type=count, help="ncu: number of kernels to skip first (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="report to write, without its ending (default: out/profile/TOOL)")
    parser.add_argument("--dry-run", action="store_true", help="print the command line, run nothing")
    parser.add_argument(
        "program", nargs="+", metavar="COMMAND", help="what to run, behind --: a Python program, for ranges"
    )


def main(args: argparse.Namespace) -> int:
    """Run the tool and return its exit status; raise ValueError where it is not installed, the command printed."""
    out = Path(args.out or f"out/profile/{args.tool}")
    check(args)
    program = python_program(args.program)
    if args.tool == "torch":
        return _torch(args, program, out)
    command = command_line(args, out)
    print(shlex.join(command), flush=True)
    if program is None:
        print(f"{args.program[0]} is not run by Python: it has ranges if it calls stattn.ranges.enable()", flush=True)
    if args.dry_run:
        return 0
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not on the PATH: run the line above where {TOOLS[args.tool]} is installed")
    out.parent.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(command, check=False).returncode
    report = f"{out}{ENDINGS[args.tool]}"
    if args.tool == "nsys":
        print(f"nsys stats --report nvtx_kern_sum,cuda_gpu_kern_sum {shlex.quote(report)}")
    else:
        print(f"ncu --import {shlex.quote(report)} --page details")
    return status


def check(args: argparse.Namespace) -> None:
    """Refuse, by ValueError, an option that the tool has no use for, and a pattern that is none."""
    for name, tools in USED_BY.items():
        value = getattr(args, name)
        if value is not None and args.tool not in tools:
            raise ValueError(f"--{name} {value}: --tool {args.tool} records all there is; {', '.join(tools)} filters")
    if args.kernel is not None:
        try:
            re.compile(args.kernel)
        except re.error as error:
            raise ValueError(f"--kernel {args.kernel!r} is not a regular expression: {error}") from error


def command_line(args: argparse.Namespace, out: Path) -> list[str]:
    """Return what runs a program under ncu or nsys, filters and ranges included."""
    program = python_program(args.program)
    if program is None:
        command = list(args.program)
    else:
        command = [interpreter(args.program), "-m", "stattn.with_ranges", *program]
    if args.tool == "nsys":
        found = ["nsys", "profile", "--trace=cuda,nvtx,cublas,cudnn", "--cuda-graph-trace=node"]
        if args.range is not None:
            # PyTorch's names are not registered strings, which alone nsys compares unless it is told otherwise.
            found += ["--capture-range=nvtx", f"--nvtx-capture={args.range}", "--capture-range-end=stop"]
            found += ["--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0"]
        return [*found, "--force-overwrite=true", f"--output={out}", *command]
    # With the clocks as they are, a kernel's duration is the one that timings show.
    found = ["ncu", "--set", "full", "--clock-control", "none", "--target-processes", "all", "--nvtx"]
    if args.range is not None:
        found += ["--nvtx-include", f"{args.range}/"]  # the stroke: a range that is pushed and popped
    if args.kernel is not None:
        found += ["--kernel-name", f"regex:{args.kernel}"]
    found += ["--launch-skip", str(args.skip or 0), "--launch-count", str(args.launches or 1)]
    return [*found, "--force-overwrite", "--export", str(out), *command]


def interpreter(command: Sequence[str]) -> str:
    """Return the Python that runs a command: its own where it names one, else this one."""
    return command[0] if _is_python(command[0]) else sys.executable


def python_program(command: Sequence[str]) -> list[str] | None:
    """Return a command as arguments of Python (-m MODULE ... or SCRIPT ...), or None when it is not run by Python."""
    first, *rest = command
    if _is_python(first):
        if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
            raise ValueError(f"{shlex.join(command)!r} must run a module (-m) or a script, without options of Python")
        return rest
    if first == "-m":
        return list(command)
    if Path(first).name in SCRIPTS:
        return ["-m", SCRIPTS[Path(first).name], *rest]
    return list(command) if first.endswith(".py") else None


def _is_python(name: str) -> bool:
    return re.fullmatch(r"python[\d.]*(\.exe)?", os.path.basename(name)) is not None


def _torch(args: argparse.Namespace, program: list[str] | None, out: Path) -> int:
    """Run a Python program here under torch.profiler; write a trace for Perfetto and print what took longest."""
    if program is None:
        raise ValueError(f"{shlex.join(args.program)!r} is not run by Python, which --tool torch needs")
    if args.dry_run:
        print(args.command_line)
        return 0
    import torch

    from stattn import ranges
    from stattn.with_ranges import run_program

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    ranges.enable("record")
    try:
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
            status = run_program(program)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    finally:
        ranges.disable()
    trace = Path(f"{out}{ENDINGS['torch']}")
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    rows = [
        (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if event.device_type.name == kind and (args.kernel is None or re.search(args.kernel, event.key))
    ]
    rows.sort(key=lambda row: -row[0])
    whole = sum(time for time, _ in rows) or 1.0
    print(f"{'own time':>12}  share  {'calls':>7}  name")
    for time, event in rows[:ROWS]:
        print(f"{time / 1e3:9.3f} ms  {time / whole:5.1%}  {event.count:7}  {event.key}")
    if len(rows) > ROWS:
        print(f"and {len(rows) - ROWS} more, {sum(time for time, _ in rows[ROWS:]) / whole:.1%}")
    print(f"{trace}: open it in https://ui.perfetto.dev")
    return status
