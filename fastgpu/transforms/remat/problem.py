"""What there is to decide: for each value of the forward half, keep it or compute it again.

The forward half is cut into segments where little memory crosses. The backward half walks the
segments from last to first; what a segment did not keep is computed again when the backward half
reaches it, from what it and the segments before it kept.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgpu.hardware import Device
from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import Var
from fastgpu.ir.fusion import (
    Storage,
    is_dear,
    is_fusible,
    is_in_place,
    is_view,
    kernel_seconds,
)
from fastgpu.transforms.remat.joint import Joint
from fastgpu.transforms.remat.shelves import Shelf

# The part of the time in which copies to and from the host are taken to hide.
_HIDDEN = 0.9
# Segments that a copy from the host may set out ahead.
_MOST_AHEAD = 6
# Stretches of the backward half of one segment that are told apart.
_WINDOWS = 12


@dataclass(frozen=True)
class Window:
    """A stretch of the backward half from equation `start` on, with `base` bytes of its own."""

    start: int
    base: int


@dataclass(frozen=True)
class Cut:
    """How to cut: segments of about `segment_bytes` of residuals.

    With `taper` between 0 and 1 the first segments are larger by that part, and the last smaller:
    the backward half reaches the first ones when everything else has been freed. `in_order`: the
    backward half is done with a segment before it reads from an earlier one; otherwise it stays as
    differentiation wrote it. Values of at most `small_bytes` are not decided about.
    """

    segment_bytes: float
    taper: float = 0.5
    in_order: bool = True


@dataclass(frozen=True)
class Problem:
    """The forward half of `joint`, cut and priced for `device`.

    `segment_of[i]` is the segment of forward equation i; `seconds[i]` what it costs to run it
    again. `windows[k]` says what else is alive while the backward half is in segment k: cotangents
    and gradients. `stored` are the forward values that take memory when they are computed again,
    `free` those that cost nothing, `needed` what the residuals are computed from. Values of at
    most `small` bytes are kept: deciding about them costs more than they do. `movable` says on
    which shelves a value may wait; `forward_seconds` and `backward_seconds` how long each segment
    takes; `ahead[k]` how many segments before segment k its copies from the host set out, so that
    the largest of them can hide.
    """

    joint: Joint
    device: Device
    segment_of: list[int]
    segments: int
    seconds: list[float]
    windows: list[list[Window]]
    forward_base: list[int]
    stored: frozenset[Var]
    residuals: frozenset[Var]
    producer: dict[Var, int]
    view: Storage
    needed: frozenset[Var]
    free: frozenset[Var]
    small: float
    movable: dict[Var, tuple[Shelf, ...]]
    forward_seconds: list[float]
    backward_seconds: list[float]
    ahead: list[int]

    def last_read(self, var: Var) -> int:
        """The last equation of the joint program that reads `var`, fused readers included."""
        return self.view.last.get(self.view.root[var], -1)

    def hidden_bytes(self, seconds: float) -> float:
        """Bytes that the link to the host moves beside that many seconds of kernels."""
        return _HIDDEN * seconds * self.device.host_link

    def may_recompute(self, index: int) -> bool:
        """Whether forward equation `index` may run twice: one with effects may not."""
        return not self.joint.forward.eqns[index].effects


@dataclass(frozen=True)
class Survey:
    """What is to know of `joint` before it is cut: see `Problem` for the names.

    `view` is the storage of its flat program, the forward half first. `crossing[i]` are the bytes
    that forward equations after i read, `gathered[i]` those of equation i's results that the
    backward half reads. `backward_prices` has the seconds of each backward equation.
    """

    joint: Joint
    device: Device
    view: Storage
    small: float
    producer: dict[Var, int]
    residuals: frozenset[Var]
    stored: frozenset[Var]
    free: frozenset[Var]
    needed: frozenset[Var]
    movable: dict[Var, tuple[Shelf, ...]]
    seconds: list[float]
    crossing: list[int]
    gathered: list[int]
    backward_prices: list[float]


def survey(
    joint: Joint, view: Storage, device: Device, small: float, shelves: tuple[Shelf, ...] = ()
) -> Survey:
    """Price `joint` and sort its values; those of at most `small` bytes are not decided about."""
    eqns = joint.forward.eqns
    producer = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    stored = frozenset(v for v in producer if view.is_stored(v))
    free = _free(joint, stored, small)
    residuals = {v for v in joint.residuals if isinstance(v, Var) and v in producer} - free
    needed = _needed(joint, residuals, producer, free)
    prices = kernel_seconds(view, device)
    gathered = [0] * len(eqns)
    for v, index in producer.items():
        if v in view.stored and view.last.get(v, -1) >= len(eqns):
            gathered[index] += aval_bytes(v.aval)
    return Survey(
        joint,
        device,
        view,
        small,
        producer,
        frozenset(residuals),
        stored,
        free,
        needed,
        _movable(needed & stored, residuals, view, small, shelves),
        prices[: len(eqns)],
        _crossing_bytes(joint, view),
        gathered,
        prices[len(eqns) :],
    )


def pose(known: Survey, cut: Cut, segment_of: list[int]) -> Problem:
    """The problem of `known`, cut by `segments(known, cut)`."""
    joint, view, device, prices = known.joint, known.view, known.device, known.backward_prices
    boundary = len(joint.forward.eqns)
    count = segment_of[-1] + 1 if segment_of else 0
    if cut.in_order and not joint.backward.effects:
        order = _segment_by_segment(known, segment_of)
        eqns = [joint.backward.eqns[i] for i in order]
        joint = replace(joint, backward=joint.backward.replace(eqns=eqns))
        view = view.reordered([*range(boundary), *(boundary + i for i in order)])
        prices = [prices[i] for i in order]
    spans = _backward_spans(known, view, segment_of, count)
    forward_seconds = [0.0] * max(count, 1)
    for index, price in enumerate(known.seconds):
        forward_seconds[segment_of[index]] += price
    backward_seconds = [sum(prices[i - boundary] for i in span) for span in spans]
    return Problem(
        joint,
        device,
        segment_of,
        count,
        known.seconds,
        _windows(joint, view, spans, device.platform),
        _forward_base(joint, view, segment_of, count, device.platform),
        known.stored,
        known.residuals,
        known.producer,
        view,
        known.needed,
        known.free,
        known.small,
        known.movable,
        forward_seconds,
        backward_seconds,
        _ahead(known, segment_of, backward_seconds),
    )


def _ahead(known: Survey, segment_of: Sequence[int], seconds: Sequence[float]) -> list[int]:
    largest = [0] * len(seconds)
    for v, shelves in known.movable.items():
        if any(shelf.host for shelf in shelves):
            k = segment_of[known.producer[v]]
            largest[k] = max(largest[k], aval_bytes(v.aval))
    ahead = []
    for k, size in enumerate(largest):
        most = max(1, min(_MOST_AHEAD, len(seconds) - 1 - k))
        reach = itertools.accumulate(_HIDDEN * t * known.device.host_link for t in seconds[k + 1 :])
        enough = next((i + 1 for i, moved in enumerate(reach) if moved >= size), most)
        ahead.append(min(most, enough))
    return ahead


def _movable(
    values: frozenset[Var],
    residuals: set[Var],
    view: Storage,
    small: float,
    shelves: tuple[Shelf, ...],
) -> dict[Var, tuple[Shelf, ...]]:
    """For values with bytes of their own, the shelves that take them.

    Only what the backward half itself reads may lose bits: a residual that is computed again from
    an inexact value can be much further off (an attention's weights from its scores).
    """
    movable = {}
    read = {view.root[v] for v in residuals}
    for v in values:
        if view.root[v] is v and aval_bytes(v.aval) > small:
            fitting = (shelf for shelf in shelves if shelf.exact or v in read)
            taken = tuple(shelf for shelf in fitting if shelf.takes(v.aval))
            if taken:
                movable[v] = taken
    return movable


def _segment_by_segment(known: Survey, segment_of: Sequence[int]) -> list[int]:
    """An order of the backward half that is done with a segment before it reads an earlier one.

    Differentiation emits the gradients of parallel branches one after the other; without this two
    segments would be computed again at the same time.
    """
    joint = known.joint
    level: dict[Var, int] = {}
    for v, residual in zip(joint.backward_residuals, joint.residuals, strict=True):
        made = isinstance(residual, Var) and residual in known.producer
        if made and aval_bytes(residual.aval) > known.small:
            level[v] = segment_of[known.producer[residual]]
    last_segment = max(segment_of, default=0)
    levels = []
    for eqn in joint.backward.eqns:
        read = (level.get(v, last_segment) for v in eqn.invars if isinstance(v, Var))
        lowest = min(read, default=last_segment)
        levels.append(lowest)
        level.update((v, lowest) for v in eqn.outvars)
    return sorted(range(len(levels)), key=lambda index: -levels[index])


def segments(known: Survey, cut: Cut) -> list[int]:
    """Cut where the fewest bytes cross, when half to one and a half of a segment gathered."""
    crossing, gathered = known.crossing, known.gathered
    whole = sum(gathered) or 1
    done = list(itertools.accumulate(gathered, initial=0))
    outstanding = 4 * whole / max(1, sum(size > 0 for size in gathered))
    cuts: list[int] = []
    start = 0
    for position in range(len(gathered)):
        size = cut.segment_bytes * (1 + cut.taper * (1 - 2 * done[position] / whole))
        before, total = done[position] - done[start], done[position + 1] - done[start]
        # A value that stands out starts a segment, with what little goes before it: nothing else
        # is computed again beside it.
        great = gathered[position] >= max(size / 2, outstanding) and before >= size / 4
        if great:
            first = bisect.bisect_left(done, done[position] - size / 4)
            least = min(crossing[first - 1 : position])
            nearly = (p for p in range(first, position + 1) if crossing[p - 1] <= 1.02 * least)
            cuts.append(next(nearly))
        elif total >= 1.5 * size:
            first = bisect.bisect_left(done, done[start] + size / 2)
            cuts.append(min(range(first, position + 2), key=lambda p: (crossing[p - 1], -p)))
        start = cuts[-1] if cuts else 0
    labels, label = [], 0
    for index in range(len(gathered)):
        if label < len(cuts) and index == cuts[label]:
            label += 1
        labels.append(label)
    return labels


def _crossing_bytes(joint: Joint, view: Storage) -> list[int]:
    """For each forward equation, the stored bytes that later forward equations read."""
    eqns = joint.forward.eqns
    last: dict[Var, int] = {}
    for index, eqn in enumerate(eqns):
        for v in eqn.invars:
            if isinstance(v, Var):
                last[view.root[v]] = index
    change = [0] * (len(eqns) + 1)
    for index, eqn in enumerate(eqns):
        if is_view(eqn):
            continue
        for v in eqn.outvars:
            end = last.get(v, index)
            # A fused value crosses as what it is computed from would; count it as its own bytes.
            size = aval_bytes(v.aval)
            if end > index:
                change[index] += size
                change[end] -= size
    crossing, alive = [], 0
    for index in range(len(eqns)):
        alive += change[index]
        crossing.append(alive)
    return crossing


def _backward_spans(
    known: Survey, view: Storage, segment_of: Sequence[int], count: int
) -> list[list[int]]:
    """For each segment, the equations of its backward half."""
    decided = {
        v: segment_of[index]
        for v, index in known.producer.items()
        if v not in known.free and aval_bytes(v.aval) > known.small
    }
    spans: list[list[int]] = [[] for _ in range(max(count, 1))]
    current = max(count - 1, 0)
    for index in range(len(known.joint.forward.eqns), len(view.jaxpr.eqns)):
        reads = [
            decided[v] for v in view.jaxpr.eqns[index].invars if isinstance(v, Var) and v in decided
        ]
        if reads:
            current = min(current, max(reads))
        spans[current].append(index)
    return spans


def _windows(
    joint: Joint, view: Storage, spans: list[list[int]], platform: str
) -> list[list[Window]]:
    """For each segment, stretches of its backward half and what they hold of their own."""
    boundary = len(joint.forward.eqns)
    held = _held(view, boundary, len(view.jaxpr.eqns), view.last, platform)
    windows = []
    for span in spans:
        size = max(1, -(-len(span) // _WINDOWS))
        chunks = [span[i : i + size] for i in range(0, len(span), size)]
        windows.append(
            [Window(chunk[0], max(held[index - boundary] for index in chunk)) for chunk in chunks]
        )
    return windows


def _forward_base(
    joint: Joint, view: Storage, segment_of: Sequence[int], count: int, platform: str
) -> list[int]:
    """Peak bytes of what the forward half holds for itself in each segment."""
    last: dict[Var, int] = {}
    for index in range(len(joint.forward.eqns)):
        if not view.fused[index]:
            last.update((v, index) for v in view.reads[index])
    base = [0] * max(count, 1)
    for index, held in enumerate(_held(view, 0, len(joint.forward.eqns), last, platform)):
        base[segment_of[index]] = max(base[segment_of[index]], held)
    return base


def _held(view: Storage, start: int, stop: int, last: dict[Var, int], platform: str) -> list[int]:
    """Bytes alive while each equation from `start` to `stop` runs, of values made there."""
    alive, ends, timeline = 0, {}, []
    for index in range(start, stop):
        born = 0
        for out in view.writes[index]:
            if out not in view.borders:
                size = aval_bytes(out.aval)
                born += size
                end = max(last.get(out, index), index)
                ends[end] = ends.get(end, 0) + size
        alive += born
        dying = ends.pop(index, 0)
        reused = min(born, dying)
        if reused and not is_in_place(view.jaxpr.eqns[index], platform):
            reused = 0
        timeline.append(alive - reused)
        alive -= dying
    return timeline


def _needed(
    joint: Joint, residuals: set[Var], producer: dict[Var, int], free: frozenset[Var]
) -> frozenset[Var]:
    """Residuals, and every forward value that they are computed from."""
    pending = list(residuals)
    seen: set[Var] = set()
    while pending:
        v = pending.pop()
        if v not in seen and v in producer and v not in free:
            seen.add(v)
            eqn = joint.forward.eqns[producer[v]]
            pending += [u for u in eqn.invars if isinstance(u, Var)]
    return frozenset(seen)


def _free(joint: Joint, stored: frozenset[Var], small: float) -> frozenset[Var]:
    """Values that cost neither memory nor time: masks, positions, constants grown large.

    They are fused into whatever reads them, from inputs and small values that are always there.
    """
    free: set[Var] = set()
    for eqn in joint.forward.eqns:
        if not is_fusible(eqn) or is_dear(eqn) or any(v in stored for v in eqn.outvars):
            continue
        if all(
            not isinstance(v, Var) or v in free or aval_bytes(v.aval) <= small for v in eqn.invars
        ):
            free.update(v for v in eqn.outvars if aval_bytes(v.aval) > small)
    return frozenset(free)
