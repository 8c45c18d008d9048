"""The masks of a plan for the CUDA kernels: what each row of a slab sees of a box of keys that is seen in part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stattn.ops._cuda_tiles import AXES, ROWS, Tiling, product_of


class MaskTable:
    """The masks of an axis for a slab's coordinates, equal ones kept once."""

    def __init__(self, tiling: Tiling) -> None:
        self._width = 64 if tiling.config.box <= 64 else 128
        self._slab = tiling.slab
        self._warpgroups = tiling.warpgroups
        self._known: dict[tuple[int, bytes], int] = {}
        self._masks: list[np.ndarray] = []
        self._length = 0
        rows = product_of(tiling.box)
        column = np.arange(tiling.config.box)
        _, h, w = tiling.box
        self._place = (column // (h * w), column // w % h, column % w)
        self._real = column < rows

    def find(self, axis: int, spans: np.ndarray) -> np.ndarray:
        """Give the number of the first mask of each group. spans: [groups, slab, 2], the keys seen, from and up to."""
        if not len(spans):
            return np.zeros(0, np.int64)
        different, inverse = np.unique(spans.reshape(len(spans), -1), axis=0, return_inverse=True)
        numbers = np.array([self._add(axis, each.reshape(-1, 2)) for each in different], np.int64)
        return numbers[inverse.reshape(-1)]

    def line(self, axis: int, slab: int, count: int) -> int:
        """Give the number of the first mask of a group by which all rows see the first ``count`` keys of a box."""
        key = (axis, f"line of {count}".encode())
        if key not in self._known:
            self._known[key] = self._append(np.broadcast_to(np.arange(self._width) < count, (slab, self._width)))
        return self._known[key]

    def _add(self, axis: int, spans: np.ndarray) -> int:
        key = (axis, spans.astype(np.int64).tobytes())
        if key not in self._known:
            place = self._place[axis]
            bits = (spans[:, :1] <= place) & (place < spans[:, 1:]) & self._real
            self._known[key] = self._append(np.pad(bits, ((0, 0), (0, self._width - bits.shape[1]))))
        return self._known[key]

    def _append(self, bits: np.ndarray) -> int:
        first = self._length
        self._masks.append(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
        self._length += len(bits)
        return first

    def combine(self, records: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Join the masks of the axes to those of rows. records: of masks, [boxes, warpgroups, equally many] each.

        Returns the different groups of masks [groups, ROWS, words], and for each of ``records`` the numbers of the
        groups [boxes, warpgroups].
        """
        masks = np.concatenate([np.zeros((0, self._width // 32), np.int32), *self._masks])
        axes = np.concatenate([np.delete(each, 3, 2).reshape(-1, each.shape[2] - 1) for each in records])
        different, inverse = _unique_rows(axes, len(masks))
        row = np.minimum(np.arange(ROWS), product_of(self._slab) - 1)
        place = np.unravel_index(row, self._slab)
        joined = np.full((len(different), ROWS, masks.shape[1]), -1, np.int32)
        for first in range(0, different.shape[1], 3):
            some = np.flatnonzero(different[:, first] >= 0)
            seen = np.full((len(some), ROWS, masks.shape[1]), -1, np.int32)
            for axis in AXES:
                seen &= masks[different[some, first + axis, None] + place[axis]]
            joined[some] &= seen if first == 0 else ~seen
        ends = np.cumsum([len(each) * self._warpgroups for each in records])[:-1]
        parts = np.split(inverse.reshape(-1), ends)
        return joined, [part.reshape(-1, self._warpgroups) for part in parts]


def _unique_rows(rows: np.ndarray, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Do ``np.unique(rows, axis=0, return_inverse=True)`` for numbers from -1 to below ``stop``, by one key a row."""
    columns = rows.shape[1]
    if (stop + 1) ** columns >= 1 << 62:
        different, inverse = np.unique(rows, axis=0, return_inverse=True)
        return different, inverse.reshape(-1)
    key = np.zeros(len(rows), np.int64)
    for column in range(columns):
        key = key * (stop + 1) + rows[:, column] + 1
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return rows[first], inverse.reshape(-1)
