"""Write docs/api.md, the list of public names, from their docstrings.

    python docs/api.py         # after a public docstring changed its first sentence; tests/test_guides.py asks for it
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD = """# Public names

Each with the first sentence of its docstring; `help(stattn.attention)` shows the rest: shapes, dtypes, units, what is
raised, and the source of the formula. Written by `python docs/api.py`. What is not listed here may change without
notice.
"""
# module: (what the section says, the names; all functions and classes that are listed in __all__ when there are none)
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stattn": ("The operations, and what they are told of the tokens.", ()),
    "stattn.masks": (
        "Named masks; `&` and `|` combine them. Every mask has `allowed`, `density`, `tiles`, `draw` and `pack`.",
        ("full", "spatial", "temporal", "window", "sliding_tile", "frame_causal", "radial", "tables", "parse", "Mask"),
    ),
    "stattn.modules": ("Drop-in modules, with the parameters of what they replace.", ()),
    "stattn.dit": ("The reference model.", ("DiT", "DiTConfig", "load", "save")),
    "stattn.sampler": ("Sampling.", ("sample", "FlowMatching", "Diffusion")),
    "stattn.graph": ("", ("SampleGraph",)),
    "stattn.rollout": ("", ("rollout",)),
    "stattn.cache": ("", ("RollingKVCache",)),
    "stattn.convert": ("Wan's weights.", ("from_diffusers", "from_diffusers_state_dict", "to_diffusers_state_dict")),
    "stattn.integrations.diffusers_backend": ("One of diffusers' attention backends.", ("use", "register")),
    "stattn.flops": ("PyTorch's counter of flops.", ("formulas", "register")),
    "stattn.ranges": ("Ranges for profilers.", ("enable", "disable", "span")),
    "stattn.results": (
        "Measurements: how something is timed, and the file in which it is kept.",
        ("time_contenders", "time_in_graph", "new_report", "Result", "Report", "write", "read", "ceilings"),
    ),
    "stattn.metrics": ("Metrics of generated video.", ()),
    "stattn.video.edit": (
        "Edits of video ([guide](video.md)).",
        ("inpaint", "outpaint", "recolour", "restyle", "motion_brush"),
    ),
    "stattn.video.long": ("Long video.", ("tell", "extend", "interpolate", "smooth")),
    "stattn.video.camera": ("Camera control.", ("Move", "ray_maps", "maps_of_clip", "CameraAdapter")),
    "stattn.world": ("The synthetic world.", ("render", "sample", "tokenize")),
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
