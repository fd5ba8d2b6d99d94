"""Where a program repeats itself: runs of equal blocks of equations, whatever they are called.

Equations become numbers, equal where primitive, settings and types are; a stretch of numbers that
is equal to itself some way further on is a run of blocks of that length. Which equations read which
is looked at afterwards, so that nothing here is more than sorting and comparing whole numbers.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from fastgpu.ir.compat import JaxprEqn
from fastgpu.transforms.dataflow.same_equations import operation

# Windows of so many equations vote for the distance at which they come again; the distances with
# most votes are tried.
_WINDOW = 8
_CANDIDATES = 32


def numbered(eqns: Sequence[JaxprEqn]) -> np.ndarray:
    """A whole number for each equation, equal for those that do the same to the same types.

    An equation with effects is equal to no other. Values of literals do not count, their types do;
    neither do derivatives that functions bring along (`same_equations.derivative` is about those).

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: (x * 2.0 + 1.0) * 3.0)(1.0).jaxpr
    >>> numbered(jaxpr.eqns).tolist()
    [0, 1, 0]
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(operation(eqn), len(numbers)) for eqn in eqns], np.int64)


def stretches(numbers: np.ndarray, least: int) -> Iterator[tuple[int, int, int]]:
    """`(start, stop, period)` of stretches of at least `least` equal blocks, the longest first.

    Stretches overlap where several periods fit; of equally long ones, the shorter period is first.

    >>> list(stretches(np.array([7, *[1, 2, 3, 4] * 4, 8]), least=3))[0]
    (1, 17, 4)
    """
    found = []
    for period in _periods(numbers):
        equal = np.zeros(len(numbers) - period + 2, bool)
        equal[1:-1] = numbers[:-period] == numbers[period:]
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if stop - start >= period * (least - 1):
                found.append((start, stop + period, period))
    return iter(sorted(found, key=lambda run: (run[0] - run[1], run[2])))


def _periods(numbers: np.ndarray) -> list[int]:
    """Distances at which windows come again, those of most windows."""
    width = min(_WINDOW, len(numbers))
    if width == 0:
        return []
    windows = np.zeros(len(numbers) - width + 1, np.uint64)
    for offset in range(width):
        windows *= np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying loses nothing
        windows += numbers[offset : offset + len(windows)].astype(np.uint64) + np.uint64(1)
    order = np.argsort(windows, kind="stable")
    again = windows[order[1:]] == windows[order[:-1]]
    votes = Counter((order[1:] - order[:-1])[again].tolist())
    return [distance for distance, _ in votes.most_common(_CANDIDATES)]
