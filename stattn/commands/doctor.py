"""`stattn doctor`: what this machine has, and which implementation every operation takes on it."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

import stattn
from stattn import extension, masks, results
from stattn.ops._dispatch import Operation, capability_of
from stattn.ops.denoise import DENOISE_STEP, PHILOX_NORMAL, DenoiseCall, NormalCall
from stattn.ops.gate import GATE_RESIDUAL, GATE_RESIDUAL_MODULATE, GateCall
from stattn.ops.modulate import MODULATE, ModulateCall
from stattn.ops.modulate_linear import MODULATE_LINEAR, ModulateLinearCall
from stattn.ops.patchify import PATCHIFY, UNPATCHIFY, PatchifyCall
from stattn.ops.qk_norm_rope import QK_NORM_ROPE, QK_NORM_ROPE_IN_PLACE, QKNormRopeCall
from stattn.ops.qk_norm_rope_means import QK_NORM_ROPE_MEANS
from stattn.ops.select import OPERATION as SELECT
from stattn.ops.select import SelectCall

GRID = (21, 30, 52)  # Wan 1.3B at 480p


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stattn doctor`."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="ask about another device (default: cuda where there is one)"
    )


def main(args: argparse.Namespace) -> int:
    """Print the report."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print("machine")
    for name, value in facts():
        print(f"  {name:<11} {value}")
    print(f"\nimplementations on {device} for the shapes of Wan 1.3B in bf16; * is what impl='auto' takes")
    for table in tables(device):
        print("  " + table.replace("\n", "\n  "))
    return 0


def facts() -> list[tuple[str, str]]:
    """List what this machine has, as (name, description) pairs."""
    rows = [
        ("os", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cpu", f"{results.cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads in use"),
        ("python", platform.python_version()),
        ("stattn", stattn.__version__),
        ("torch", torch.__version__),
        ("cuda", torch.version.cuda or "this build of torch has none"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            rows.append(
                (
                    f"gpu {index}",
                    f"{card.name}, compute capability {card.major}.{card.minor}, {card.multi_processor_count} SMs,"
                    f" {card.total_memory / 2**30:.0f} GiB, L2 {card.L2_cache_size / 2**20:.0f} MiB",
                )
            )
    else:
        rows.append(("gpu", "none that torch can use"))
    rows += [
        ("extension", extension.why_not() or "built and loaded"),
        ("triton", _version("triton")),
        ("flash-attn", _version("flash-attn")),
        ("weights", ", ".join(shipped_weights()) or "none are installed with the package"),
    ]
    rows += [(package, _version(package)) for package in ("safetensors", "av", "pillow", "tqdm", "diffusers")]
    return rows


def shipped_weights() -> list[str]:
    """Name the models whose weights are installed with the package."""
    from stattn.dit import WEIGHTS

    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def tables(device: str) -> Iterator[str]:
    """Yield for each operation which implementation serves a representative call, and why the others do not."""
    dtype, channels, heads, head_dim, patch = torch.bfloat16, 1536, 12, 128, (1, 2, 2)
    q = torch.empty(1, GRID[0] * GRID[1] * GRID[2], heads, head_dim, dtype=dtype, device="meta")
    for mask in (masks.full(), masks.sliding_tile((3, 6, 4), (3, 3, 5))):
        head, *rows = stattn.explain(q, q, q, GRID, mask, device=device).splitlines()
        yield "\n".join((f"{head}, mask {mask.key}", *rows))
    place = (device, capability_of(torch.device(device)))
    calls: list[tuple[Operation, tuple[object, ...]]] = [
        (SELECT, SelectCall(*place, dtype, head_dim)),
        (PATCHIFY, PatchifyCall(*place, dtype, 16, patch)),
        (UNPATCHIFY, PatchifyCall(*place, dtype, 16, patch)),
        (MODULATE, ModulateCall(*place, (dtype, torch.float32), channels, "layer")),
        (MODULATE_LINEAR, ModulateLinearCall(*place, (dtype, dtype), 64, False, False)),
        (GATE_RESIDUAL, GateCall(*place, (dtype, torch.float32), channels, None)),
        (GATE_RESIDUAL_MODULATE, GateCall(*place, (dtype, torch.float32), channels, "layer")),
        (QK_NORM_ROPE, QKNormRopeCall(*place, dtype, heads, head_dim, True, True, (dtype, dtype))),
        (QK_NORM_ROPE_IN_PLACE, QKNormRopeCall(*place, dtype, heads, head_dim, True, True, (dtype, dtype))),
        (QK_NORM_ROPE_MEANS, QKNormRopeCall(*place, dtype, heads, head_dim, True, True, (dtype, dtype))),
        (DENOISE_STEP, DenoiseCall(*place, torch.float32, dtype, patch, False, ())),
        (PHILOX_NORMAL, NormalCall(*place)),
    ]
    for operation, call in calls:
        table = operation.table(call)  # type: ignore[arg-type]  # every call has a device
        taken = next((name for name, reason in table if reason is None), None)
        lines = [f" {'*' if name == taken else ' '} {name:<9}  {reason or 'serves it'}" for name, reason in table]
        yield "\n".join((f"stattn.{operation.name} on {device}: auto takes {taken or 'nothing'}", *lines))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
