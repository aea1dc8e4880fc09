"""A recorded stretch of a run: the spans that were open, the work that was done meanwhile, and what one says of the other.

A span owns the work that was asked for while it was open, on whatever thread, because backward passes have their own. On a
GPU that work comes later than the span; how busy the device was is then measured between the first and the last piece of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Range:
    """One time that a span was open, by the host's clock."""

    name: str
    start_s: float
    end_s: float
    tokens: int | None = None  # read or drawn in it
    depth: int = 0  # ranges it lies in


@dataclass(slots=True)
class Work:
    """A kernel or a copy of the device; on a CPU an op."""

    name: str
    start_s: float
    end_s: float
    asked_s: float  # when the host asked for it
    own_s: float  # without what ran inside it


@dataclass(slots=True)
class Timeline:
    """Everything between the first and the last recorded instant; `ranges` by start, outer before inner, `work` by asked_s."""

    is_gpu: bool
    ranges: list[Range]
    work: list[Work]

    @classmethod
    def of(cls, is_gpu: bool, ranges: Iterable[Range], work: Iterable[Work]) -> Timeline:
        """In order, and with the depth of every range."""
        ranges, open_ = sorted(ranges, key=lambda r: (r.start_s, -r.end_s)), []
        for range_ in ranges:
            while open_ and open_[-1].end_s <= range_.start_s:
                open_.pop()
            range_.depth = len(open_)
            open_.append(range_)
        return cls(is_gpu, ranges, sorted(work, key=lambda w: w.asked_s))


@dataclass(slots=True)
class Row:
    """What is known about a span, all the times it was open together. None: the source does not tell."""

    name: str
    depth: int
    count: int = 0
    host_s: float = 0.0
    extent_s: float | None = None  # from the first piece of its work to the last; on a CPU host_s
    busy_s: float | None = None  # of the extent, with some of its work being done
    longest_gap_s: float | None = None  # of the extent, with none of it
    tokens: int | None = None
    own_s: dict[str, float] = field(default_factory=dict)  # by kernel or op

    @property
    def busy_share(self) -> float | None:
        return self.busy_s / self.extent_s if self.extent_s else None

    @property
    def gap_s(self) -> float | None:
        return None if self.busy_s is None else self.extent_s - self.busy_s

    @property
    def tokens_per_s(self) -> float | None:
        seconds = max(self.host_s, self.extent_s or 0.0)
        return self.tokens / seconds if self.tokens is not None and seconds else None

    def top(self, count: int) -> list[tuple[str, float]]:
        """The kernels or ops that took longest, with their seconds."""
        return sorted(self.own_s.items(), key=lambda item: -item[1])[:count]


def rows_of(timeline: Timeline) -> list[Row]:
    """A row per span and place in the tree, outer before inner."""
    asked, rows, above = [work.asked_s for work in timeline.work], {}, []
    for range_ in timeline.ranges:
        del above[range_.depth :]
        above.append(range_.name)
        row = rows.setdefault(tuple(above), Row(range_.name, range_.depth))
        row.count += 1
        row.host_s += range_.end_s - range_.start_s
        if range_.tokens is not None:
            row.tokens = (row.tokens or 0) + range_.tokens
        work = timeline.work[bisect_left(asked, range_.start_s) : bisect_left(asked, range_.end_s)]
        for item in work:
            row.own_s[item.name] = row.own_s.get(item.name, 0.0) + item.own_s
        if timeline.work:
            _measure(row, range_, union((w.start_s, w.end_s) for w in work), timeline.is_gpu)
    return _in_tree_order(rows)


def union(intervals: Iterable[tuple[float, float]], gap_s: float = 0.0) -> list[tuple[float, float]]:
    """The instants that lie in any of the intervals, as intervals in order; those at most `gap_s` apart become one."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1] + gap_s:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _measure(row: Row, range_: Range, busy: list[tuple[float, float]], is_gpu: bool) -> None:
    if is_gpu and busy:
        start, end = busy[0][0], busy[-1][1]
    elif is_gpu:
        start = end = 0.0
    else:
        start, end = range_.start_s, range_.end_s
    edges = [start, *(edge for interval in busy for edge in interval), end]
    gaps = [after - before for before, after in zip(edges[::2], edges[1::2], strict=True)]
    row.extent_s = (row.extent_s or 0.0) + end - start
    row.busy_s = (row.busy_s or 0.0) + sum(b - a for a, b in busy)
    row.longest_gap_s = max(row.longest_gap_s or 0.0, *gaps)


def _in_tree_order(rows: dict[tuple[str, ...], Row]) -> list[Row]:
    """Children directly below their parent, siblings in the order they first came."""
    place = {path: index for index, path in enumerate(rows)}
    return [rows[path] for path in sorted(rows, key=lambda path: [place[path[: i + 1]] for i in range(len(path))])]
