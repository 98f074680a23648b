"""Which slot of a cache holds each position of each row of the batch.

Keys and values are appended to arenas and never move; a row of the batch is a list of slots. Beams
that continue another, rows repeated or dropped, a prompt that several rows share and positions
taken back change these lists alone, for all the layers of a cache at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Rows that grow side by side take so many slots at a time, so that each reads memory in order.
_PAGE = 64
# More slots than were asked for, when an arena is made or grows.
_SPARE = 256


class Arenas(Protocol):
    """What keeps its keys and values in the slots."""

    def move(self, slots: Tensor) -> None:
        """Slot slots[i] becomes slot i; the others are free."""


class Slots:
    """The slots of a batch of sequences.

    Args:
        window: how many positions a query sees, its own included; positions that none can see any
            more give their slots back. None for all.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.users: list[Arenas] = []
        self.capacity = 0  # slots that an arena has when it is next written
        self.made = 0  # arenas, until now
        self.version = 0  # changes whenever what a row consists of does
        self.recording = False  # positions out of the window are kept until the next crop
        self._padded: tuple[int, int, Tensor | None, tuple[Tensor, Tensor, Tensor] | None] | None
        self.reset()

    def reset(self) -> None:
        """Forgets all positions; the arenas stay as large as they are."""
        self.total = 0  # positions that were ever appended and not taken back
        self.visible = 0  # positions that the last ones see, themselves included
        self._count = 0  # of the last ones
        self._table = torch.empty((0, 0), dtype=torch.int32)
        self._begin = self._end = 0  # the columns of the table that count
        self._used = 0  # no slot from here on holds anything
        self._room = 0  # columns of the table, from _end on, with slots that are in reserve
        self._side_by_side = True  # no row has continued another
        self._changed()

    @property
    def batch(self) -> int:
        """Rows; 0 before the first position."""
        return self._table.shape[0]

    @property
    def kept(self) -> int:
        """Positions that the next one sees besides itself."""
        return self.total if self.window is None else min(self.total, self.window - 1)

    def rows(self, last: int) -> Tensor:
        """[batch, last] int32: the slots of the last positions of each row."""
        return self._table.narrow(1, self._end - last, last)

    @property
    def new(self) -> Tensor:
        """The slots of the last positions, row by row."""
        return self.rows(self._count).flatten()

    @property
    def table(self) -> Tensor:
        """[batch, width] int32, of which `columns` count."""
        return self._table

    def columns(self, hidden: Sequence[int]) -> list[int]:
        """The end of those that the last positions see, and where they begin in each row.

        Args:
            hidden: of each row, how many of its first positions are not seen.
        """
        end, out = self._end, self.total - self.visible  # out of the window
        return [end, *(end - self.visible + max(0, first - out) for first in hidden)]

    def run(self, last: int) -> tuple[int, int] | None:
        """First slot and the one after the last, if there is one row and it lies in order."""
        if self.batch != 1 or last == 0:
            return None
        # New slots are beyond all that a row has, so its slots rise.
        first, end = int(self._table[0, self._end - last]), int(self._table[0, self._end - 1]) + 1
        return (first, end) if end - first == last else None

    def append(self, batch: int, count: int) -> None:
        """Takes slots, `new`, for so many more positions of each row.

        Raises:
            ValueError: the batch is not that of the positions before.
        """
        if self.total == 0:
            self._table = torch.empty((batch, 0), dtype=torch.int32)
            self._begin = self._end = self._room = 0
        elif batch != self.batch:
            raise ValueError(
                f"key_states has batch size {batch}, but the cache holds a batch of {self.batch}"
            )
        if not self.recording:
            self._begin = self._end - self.kept
        self.visible = self.kept + count
        if count > self._room:
            self._take(count)
        self._count = count
        self._room -= count
        self._end += count
        self.total += count
        self._changed()

    def crop(self, total: int) -> None:
        """Takes back all positions from `total` on; none if there are no more than that.

        Raises:
            RuntimeError: positions would be seen again that left the window.
        """
        count = self.total - total
        if count > 0:
            left = self._end - self._begin - count
            if self.window is not None and left < min(total, self.window - 1):
                raise RuntimeError(
                    f"{count} tokens cannot be removed: what they hid has left the sliding window "
                    f"of {self.window}. Call activate_past_recording before them."
                )
            self.total = total
            self._end -= count
            self._used = int(self.rows(left).max()) + 1 if left else 0
            self._room = 0
            self._changed()
        if self.recording:
            self._begin = self._end - self.kept

    def reorder(self, parents: Tensor) -> None:
        """Row i continues what was row parents[i]."""
        if not torch.equal(parents, torch.arange(self.batch)):
            self.select(parents)
            self._side_by_side = False

    def select(self, indices: Tensor) -> None:
        """Row i is what was row indices[i]."""
        self._table = self._table[indices]
        self._room = 0
        self._changed()

    def repeat(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, which share its positions."""
        self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def padded(self, mask: Tensor | None, queries: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows without what `mask` hides, for attention in which all queries see the same.

        Args:
            mask: [batch, visible] bool (True: seen), or None.
            queries: of each row, the last of its positions.

        Returns:
            [batch, visible] int32, of which each row is filled from the left, and the cumulative
            lengths of queries and rows; None if a position is hidden between others that are seen.
        """
        known = self._padded
        if known is None or known[:2] != (self.version, queries) or known[2] is not mask:
            known = (self.version, queries, mask, self._without(mask, queries))
            self._padded = known
        return known[3]

    def _without(self, mask: Tensor | None, queries: int) -> tuple[Tensor, Tensor, Tensor] | None:
        rows = self.rows(self.visible)
        cu_q = _multiples(self.batch, queries)
        if mask is None:
            return rows, cu_q, _multiples(self.batch, self.visible)
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            return None
        lengths = mask.sum(1, dtype=torch.int32)
        from_left = torch.arange(self.visible) + (self.visible - lengths).unsqueeze(1)
        rows = rows.gather(1, from_left.clamp_(max=self.visible - 1))
        return rows, cu_q, torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def _take(self, count: int) -> None:
        """Writes the slots of the next positions of each row into the table, some ahead."""
        page = _PAGE if self._side_by_side else 1
        self._room = max(count, page)
        self._reserve(self.batch * self._room)
        self._widen(self._room)
        ahead = torch.arange(self.batch * self._room, dtype=torch.int32).view(self.batch, -1)
        self._table.narrow(1, self._end, self._room).copy_(ahead + self._used)
        self._used += self.batch * self._room

    def _reserve(self, count: int) -> None:
        if self._used + count <= self.capacity:
            return
        if self.capacity:
            rows = self._table[:, self._begin : self._end]
            held, names = torch.unique(rows, return_inverse=True)
            if 2 * (held.numel() + count) <= self.capacity:
                for user in self.users:
                    user.move(held)
                self._table[:, self._begin : self._end] = names
                self._used = held.numel()
                enough = 2 * (self._used + count) + _SPARE
                if self.capacity > 4 * enough:  # a long prompt has left the window
                    self.capacity = enough
                return
        self.capacity = max(2 * self.capacity, self._used + count + _SPARE)

    def _widen(self, count: int) -> None:
        if self._end + count <= self._table.shape[1]:
            return
        rows = self._table[:, self._begin : self._end]
        held = rows.shape[1]
        self._table = rows.new_empty((rows.shape[0], 2 * held + count + _SPARE))
        self._table[:, :held] = rows
        self._begin, self._end = 0, held

    def _changed(self) -> None:
        self.version += 1
        self._padded = None


def _multiples(count: int, step: int) -> Tensor:
    """0, step, ..., count * step"""
    return torch.arange(0, count * step + 1, step, dtype=torch.int32)
