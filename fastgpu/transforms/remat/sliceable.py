"""What equations do to one dimension: which can be run on a slice of it at a time.

A value is *sliced* along the dimension that is cut into chunks; a result that sums over it is
*summed*: it is the sum of what the chunks give. The rules here are about shapes alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpu.ir.compat import JaxprEqn, Literal
from fastgpu.ir.fusion import is_elementwise

SUMMED = "summed"
# The dimension along which a value is cut; `None` for a value that every chunk needs whole.
Dim = int | None

_REDUCTIONS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("argmax", "argmin"),
)
# Parameters with the size of the result along a dimension that is cut.
_SHAPES = {
    "broadcast_in_dim": "shape",
    "iota": "shape",
    "reshape": "new_sizes",
    "slice": "limit_indices",
}


@dataclass(frozen=True)
class Sliced:
    """How an equation runs on a slice: along which dimension each input is cut, and its result."""

    inputs: tuple[Dim, ...]
    output: int | str


def sliced(eqn: JaxprEqn, dims: Sequence[Dim]) -> Sliced | None:
    """How `eqn` runs on slices of inputs that are cut along `dims`, or `None` if it does not.

    An input with `None` is not cut yet; the answer may ask for a slice of it.
    """
    if len(eqn.outvars) != 1 or eqn.effects:
        return None
    name = eqn.primitive.name
    if is_elementwise(eqn):
        cut = {dim for dim in dims if dim is not None}
        return _elementwise(eqn, cut.pop()) if len(cut) == 1 else None
    if name in _REDUCTIONS:
        return _reduction(eqn, dims[0])
    rule = _RULES.get(name)
    found = rule(eqn, tuple(dims)) if rule else None
    # Nothing that is cut already can be had whole.
    if found and all(
        want == dim for want, dim in zip(found.inputs, dims, strict=True) if dim is not None
    ):
        return found
    return None


def sliced_result(eqn: JaxprEqn, dim: int) -> Sliced | None:
    """How `eqn` gives a slice of its result along `dim`, or `None` if it does not."""
    if len(eqn.outvars) != 1 or eqn.effects:
        return None
    if is_elementwise(eqn):
        return _elementwise(eqn, dim)
    if eqn.primitive.name == "iota" and eqn.params["dimension"] != dim:
        return Sliced((None,) * len(eqn.invars), dim)
    if eqn.primitive.name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        source: Dim = None
        if dim in places and _shape(eqn.invars[0])[list(places).index(dim)] > 1:
            source = list(places).index(dim)
        return Sliced((source, *(None for _ in eqn.invars[1:])), dim)
    if eqn.primitive.name in ("scatter-add", "scatter_add"):
        return _scatter_add(eqn, (dim, None, None))
    if eqn.primitive.name == "dot_general":
        for side in (0, 1):
            for own in range(len(_shape(eqn.invars[side]))):
                found = _dot_general(eqn, (own, None) if side == 0 else (None, own))
                if found is not None and found.output == dim:
                    return found
    return None


def resized(eqn: JaxprEqn, dim: int | str, size: int) -> dict[str, Any]:
    """The parameters of `eqn` for a result that has `size` elements along `dim`."""
    name = _SHAPES.get(eqn.primitive.name)
    if name is None or not isinstance(dim, int):
        return eqn.params
    shape = eqn.params[name]
    return {**eqn.params, name: (*shape[:dim], size, *shape[dim + 1 :])}


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _elementwise(eqn: JaxprEqn, dim: int) -> Sliced | None:
    shape = _shape(eqn.outvars[0])
    inputs: list[Dim] = []
    for atom in eqn.invars:
        whole = isinstance(atom, Literal) or not _shape(atom) or _shape(atom)[dim] == 1
        if not whole and _shape(atom)[dim] != shape[dim]:
            return None
        inputs.append(None if whole else dim)
    return Sliced(tuple(inputs), dim)


def _reduction(eqn: JaxprEqn, dim: Dim) -> Sliced | None:
    if dim is None:
        return None
    axes = tuple(int(axis) for axis in eqn.params["axes"])
    if dim in axes:
        return Sliced((dim,), SUMMED) if eqn.primitive.name == "reduce_sum" else None
    return Sliced((dim,), dim - sum(axis < dim for axis in axes))


def _dot_general(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    contracting, batch = (
        tuple(tuple(map(int, side)) for side in sides) for sides in eqn.params["dimension_numbers"]
    )
    side = 0 if dims[0] is not None else 1
    other, dim = 1 - side, dims[side]
    if dim is None:
        return None
    wanted: list[Dim] = [None, None]
    wanted[side] = dim
    if dim in contracting[side]:
        wanted[other] = contracting[other][contracting[side].index(dim)]
        return Sliced(tuple(wanted), SUMMED)
    if dim in batch[side]:
        wanted[other] = batch[other][batch[side].index(dim)]
        return Sliced(tuple(wanted), batch[side].index(dim))
    free = [
        [d for d in range(len(_shape(atom))) if d not in (*contracting[i], *batch[i])]
        for i, atom in enumerate(eqn.invars)
    ]
    place = len(batch[0]) + (0 if side == 0 else len(free[0])) + free[side].index(dim)
    return Sliced(tuple(wanted), place)


def _broadcast_in_dim(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    if dims[0] is None:
        return None
    return Sliced(dims, int(eqn.params["broadcast_dimensions"][dims[0]]))


def _transpose(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    return Sliced(dims, list(eqn.params["permutation"]).index(dims[0]))


def _squeeze(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    gone = eqn.params["dimensions"]
    if dims[0] is None or dims[0] in gone:
        return None
    return Sliced(dims, dims[0] - sum(d < dims[0] for d in gone))


def _reshape(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    """A dimension that is the outermost of those that it is merged with or split into."""
    dim, old, new = dims[0], _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if dim is None or eqn.params["dimensions"] is not None:
        return None
    before = 1
    for size in old[:dim]:
        before *= size
    place = 0
    while before > 1 and place < len(new) and before % new[place] == 0:
        before //= new[place]
        place += 1
    if before != 1:
        return None
    while place < len(new) and new[place] == 1:
        place += 1
    if place == len(new) or (new[place] % old[dim] and old[dim] % new[place]):
        return None
    # Merged with inner ones it has more elements, split it has fewer: a slice is a part of either.
    return Sliced(dims, place)


def _slice(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    dim = dims[0]
    if dim is None or _shape(eqn.invars[0])[dim] != _shape(eqn.outvars[0])[dim]:
        return None
    return Sliced(dims, dim)


def _pad(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    if dims[0] is None or any(eqn.params["padding_config"][dims[0]]):
        return None
    return Sliced((dims[0], None), dims[0])


def _gather(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    """Picks along other dimensions, the same in every row: `take_along_axis`."""
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    if dims[0] not in batching:
        return None
    index = numbers.start_indices_batching_dims[batching.index(dims[0])]
    kept = [d for d in range(len(_shape(eqn.outvars[0]))) if d not in numbers.offset_dims]
    return Sliced((dims[0], int(index)), kept[index])


def _scatter_add(eqn: JaxprEqn, dims: tuple[Dim, ...]) -> Sliced | None:
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    windows = tuple(numbers.update_window_dims)
    kept = [d for d in range(len(_shape(eqn.invars[2]))) if d not in windows]
    if dims[2] is not None and dims[2] in kept:
        index = kept.index(dims[2])
    elif dims[0] in batching:
        index = numbers.scatter_indices_batching_dims[batching.index(dims[0])]
    else:
        return None
    if index not in numbers.scatter_indices_batching_dims:
        return None
    dim = batching[tuple(numbers.scatter_indices_batching_dims).index(index)]
    return Sliced((dim, int(index), kept[index]), dim)


_RULES: dict[str, Callable[[JaxprEqn, tuple[Dim, ...]], Sliced | None]] = {
    "dot_general": _dot_general,
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "pad": _pad,
    "reshape": _reshape,
    "gather": _gather,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
}
