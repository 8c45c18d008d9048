"""Write docs/api.md, the list of public names, from their docstrings.

    python docs/api.py

After a public docstring changed its first sentence, tests/test_guides.py asks for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD = """# Public names

Every public function and class, with the first sentence of its docstring. `help(stattn.attention)` shows the rest:
shapes, dtypes, units, errors, and the source of each formula. Names that are not listed here may change without notice.
This page is written by `python docs/api.py`.
"""
# module: (a sentence about it, its public names; when none are given, all functions and classes of its __all__)
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stattn": ("The operations, and the types that describe tokens to them.", ()),
    "stattn.masks": (
        "Named masks, combined by `&` and `|`. Every mask has `allowed`, `density`, `tiles`, `draw` and `pack`.",
        ("full", "spatial", "temporal", "window", "sliding_tile", "frame_causal", "radial", "tables", "parse", "Mask"),
    ),
    "stattn.modules": ("Drop-in modules; each keeps the parameters of what it replaces.", ()),
    "stattn.dit": ("The reference video DiT.", ("DiT", "DiTConfig", "load", "save")),
    "stattn.sampler": ("Sampling, and the schedules for it.", ("sample", "FlowMatching", "Diffusion")),
    "stattn.graph": ("A sample as one CUDA graph.", ("SampleGraph",)),
    "stattn.rollout": ("Autoregressive video.", ("rollout",)),
    "stattn.cache": ("The key-value cache of autoregressive video.", ("RollingKVCache",)),
    "stattn.convert": (
        "Conversion of Wan's weights.",
        ("from_diffusers", "from_diffusers_state_dict", "to_diffusers_state_dict"),
    ),
    "stattn.integrations.diffusers_backend": ("Dense attention as a backend of diffusers.", ("use", "register")),
    "stattn.flops": ("Formulas for PyTorch's counter of floating-point operations.", ("formulas", "register")),
    "stattn.ranges": ("Named ranges for profilers.", ("enable", "disable", "span")),
    "stattn.results": (
        "Timing, and the files that hold results.",
        ("time_contenders", "time_in_graph", "new_report", "Result", "Report", "write", "read", "ceilings"),
    ),
    "stattn.metrics": ("Metrics of generated video, and the networks that they use.", ()),
    "stattn.video.edit": (
        "Edits of video ([guide](video.md)).",
        ("inpaint", "outpaint", "recolour", "restyle", "motion_brush"),
    ),
    "stattn.video.long": ("Long video, made window by window.", ("tell", "extend", "interpolate", "smooth")),
    "stattn.video.camera": ("Camera control.", ("Move", "ray_maps", "maps_of_clip", "CameraAdapter")),
    "stattn.world": ("The synthetic world that the shipped model was trained on.", ("render", "sample", "tokenize")),
}


def summary(thing: object) -> str:
    """The first sentence of a docstring, on one line of a table."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"(?<!et al)\.(?:\s|$)", paragraph, maxsplit=1)[0]
    return sentence.replace("``", "`").replace("|", "\\|")


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, (words, names) in SECTIONS.items():
        module = importlib.import_module(name)
        if not names:
            listed = [each for each in module.__all__ if callable(getattr(module, each))]
            names = tuple(sorted(listed, key=str.lower))
        parts.append(f"\n## `{name}`\n\n" + (f"{words}\n\n" if words else "") + "| name | |\n|---|---|\n")
        parts += [f"| `{each}` | {summary(getattr(module, each))} |\n" for each in names]
    return "".join(parts)


if __name__ == "__main__":
    (HERE / "api.md").write_text(text(), encoding="utf-8")
    print("wrote docs/api.md")
