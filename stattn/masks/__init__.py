"""What a query may see: masks over a (t, h, w) grid, as small tables.

The rule of one axis is a pair of tables and a residue: a query at x sees the keys k with ``lo[x] <= k <= hi[x]`` and
``(k - x) % step == 0``. A *product* is one rule per axis; a mask is a union of at most eight products, each excluding
what earlier ones allow, so that no key counts twice. Every named mask is a way to fill the tables; ``a & b`` intersects
them, and ``a | b`` appends. A mask is not tied to a grid: it is described once, and packed for each grid it meets.

Global tokens are outside the mask: every video query sees them, and they see everything (or each other only, with
``globals_see="globals"``).

``python -m stattn.masks`` draws a page of all named masks.
"""

from stattn.masks.mask import (
    CONSTRUCTORS,
    EMPTY,
    FULL,
    MAX_PRODUCTS,
    PARTIAL,
    Constructor,
    Mask,
    is_global,
    parse,
)
from stattn.masks.named import frame_causal, full, radial, sliding_tile, spatial, tables, temporal, window

__all__ = [
    "CONSTRUCTORS",
    "EMPTY",
    "FULL",
    "MAX_PRODUCTS",
    "PARTIAL",
    "Constructor",
    "Mask",
    "frame_causal",
    "full",
    "is_global",
    "parse",
    "radial",
    "sliding_tile",
    "spatial",
    "tables",
    "temporal",
    "window",
]
