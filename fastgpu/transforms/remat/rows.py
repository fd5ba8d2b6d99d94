"""A loss over many classes, a few rows at a time, its gradient with it.

The scores of a vocabulary are the largest values of many training steps, several of them alive at
once, and nothing of them is needed but a number per row and two products: the gradients of what
made them. So the program from the scores on is run on chunks of rows, forward and backward half of
a chunk together, and the gradients are those of a cotangent of 1, which the backward half scales
(Hsu et al. 2024, arXiv:2410.10989). Nothing is computed twice; sums over rows are added up in
another order.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    bind,
    scope,
    source_line,
    with_borders,
)
from fastgpu.transforms.inline import inline_calls, instantiated
from fastgpu.transforms.remat.joint import Changed, Joint, flat_program, without_unread
from fastgpu.transforms.remat.sliceable import SUMMED, Dim, Sliced, resized, sliced, sliced_result

# Scores that are a smaller part of the program's temporaries are left alone, and so are those of
# products before the last ones.
_NOTABLE = 0.02
_MOST_PRODUCTS = 3
# What a chunk's scores may be of the temporaries, and how many chunks there may be.
_CHUNK = 1 / 40
_MOST_CHUNKS = 16
# A value is large if it has this part of the scores' elements.
_LARGE = 0.25


def in_row_chunks(joint: Joint, temporary_bytes: int) -> Changed | None:
    """`joint` with a large product near its end, and what is made of it, in chunks of rows.

    `temporary_bytes` is what the program takes as it is. `None` where no product is a notable part
    of that, where its result is given out or mixed over its rows, where more than one scalar is
    differentiated, or where anything has effects.

    >>> from fastgpu.transforms.remat.joint import trace_joint
    >>> def loss(w, x, labels):
    ...     scores = jax.nn.log_softmax(x @ w)
    ...     return [-jnp.mean(jnp.take_along_axis(scores, labels, axis=1))], []
    >>> w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 5000), (256, 64)))
    >>> joint = trace_joint(loss, [w, x], [jax.ShapeDtypeStruct((256, 1), jnp.int32)])
    >>> in_row_chunks(joint, temporary_bytes=256 * 5000 * 4 * 5).how.split(": ")[1]
    'float32[256,5000] in 8 chunks of rows'
    """
    if joint.cotangents != 1 or _shape(joint.backward.invars[0]):
        return None
    if joint.forward.effects or joint.backward.effects:
        return None
    flat = flat_program(joint).jaxpr
    products = (
        index
        for index in reversed(range(len(joint.forward.eqns)))
        if flat.eqns[index].primitive.name == "dot_general"
        and aval_bytes(flat.eqns[index].outvars[0].aval) >= _NOTABLE * temporary_bytes
    )
    for first in itertools.islice(products, _MOST_PRODUCTS):
        scores = flat.eqns[first].outvars[0]
        for dim in range(len(_shape(scores))):
            region = _region(flat, first, dim)
            if region is None or not _gives_gradients(joint, flat, region):
                continue
            chunks = _count(region.rows, aval_bytes(scores.aval), _CHUNK * temporary_bytes)
            if chunks > 1:
                kind = f"{_aval(scores).dtype}[{','.join(map(str, _shape(scores)))}]"
                how = f"{source_line(flat.eqns[first])}: {kind} in {chunks} chunks of rows"
                return Changed(_rewritten(joint, flat, region, chunks), how)
    return None


@dataclass
class _Region:
    """The equations of a flat program that run on slices.

    `runs` says how, by index; those in `members` run nowhere else, those in `later` use what they
    give. `cut` are values from outside of which each chunk needs a slice, along which dimension;
    `whole` those that it needs as they are. `results` are read outside. All sizes that are cut are
    multiples of `rows`.
    """

    runs: dict[int, Sliced] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    later: set[int] = field(default_factory=set)
    cut: dict[Var, int] = field(default_factory=dict)
    whole: dict[Var, None] = field(default_factory=dict)
    results: dict[Var, int | str] = field(default_factory=dict)
    rows: int = 0


def _region(flat: Jaxpr, first: int, dim: int) -> _Region | None:
    """What has to run on slices of the scores along `dim`, or `None` if something cannot."""
    scores = flat.eqns[first].outvars[0]
    enough = _LARGE * math.prod(_shape(scores))

    def is_large(v: Any) -> bool:
        return math.prod(_shape(v)) >= enough

    own = sliced_result(flat.eqns[first], dim)
    if own is None:
        return None
    runs, descendants, uses = {first: own}, {first}, {first}
    dims: dict[Any, int | str | None] = {scores: dim}
    chain: set[Any] = {scores}
    for index in range(first + 1, len(flat.eqns)):
        eqn = flat.eqns[index]
        inputs = [v for v in eqn.invars if not isinstance(v, Literal) and v in dims]
        if not inputs:
            continue
        descendants.add(index)
        run = None
        if all(isinstance(dims[v], int) for v in inputs):
            run = sliced(eqn, [_dim(dims, v) for v in eqn.invars])
        dims.update((v, None if run is None else run.output) for v in eqn.outvars)
        if run is not None:
            runs[index] = run
        # What is large again after it was small is no use of the scores.
        if not chain.isdisjoint(inputs):
            uses.add(index)
            if run is None:
                return None
            if run.output != SUMMED and is_large(eqn.outvars[0]):
                chain.update(eqn.outvars)

    # What lies between the scores and their last use runs with them.
    region, needed = _Region(), set()
    for index in sorted(descendants, reverse=True):
        eqn = flat.eqns[index]
        feeds = not needed.isdisjoint(eqn.outvars)
        if index not in uses and not feeds:
            continue
        if index not in runs or (feeds and runs[index].output == SUMMED):
            return None
        region.members.add(index)
        needed.update(v for v in eqn.invars if not isinstance(v, Literal) and v in dims)
    region.later = descendants - region.members
    region.runs = {index: runs[index] for index in region.members}

    producer = {v: i for i, eqn in enumerate(flat.eqns) for v in eqn.outvars}
    wanted = [
        (v, want)
        for index in sorted(region.members)
        for v, want in zip(flat.eqns[index].invars, runs[index].inputs, strict=True)
        if not isinstance(v, Literal) and v not in dims
    ]
    while wanted:
        v, want = wanted.pop()
        if want is None:
            region.whole[v] = None
            continue
        if dims.setdefault(v, want) != want:
            return None
        # Large values that are quickly made of small ones are made in the chunk.
        index = producer.get(v, -1)
        product = index < 0 or flat.eqns[index].primitive.name == "dot_general"
        run = None if product or not is_large(v) else sliced_result(flat.eqns[index], want)
        if run is None:
            region.cut[v] = want
        elif index not in region.runs:
            region.runs[index] = run
            inputs = zip(flat.eqns[index].invars, run.inputs, strict=True)
            wanted += [(u, d) for u, d in inputs if not isinstance(u, Literal)]

    made = {v for index in region.members for v in flat.eqns[index].outvars}
    read = {
        v for i, eqn in enumerate(flat.eqns) if i not in region.members for v in _variables(eqn)
    }
    read.update(v for v in flat.outvars if isinstance(v, Var))
    for v in made & read:
        if dims[v] != SUMMED and is_large(v):
            return None
        region.results[v] = dims[v]  # pyright: ignore[reportArgumentType]
    region.rows = _common_size(flat, region)
    return region


def _common_size(flat: Jaxpr, region: _Region) -> int:
    sizes = []
    for index, run in region.runs.items():
        eqn = flat.eqns[index]
        pairs = [*zip(eqn.invars, run.inputs, strict=True), (eqn.outvars[0], run.output)]
        sizes += [_shape(v)[d] for v, d in pairs if isinstance(d, int)]
    return math.gcd(*sizes)


def _gives_gradients(joint: Joint, flat: Jaxpr, region: _Region) -> bool:
    """Whether the region has results in the backward half, all of which the cotangent scales."""
    gradients = _made_backward(joint, flat, region)
    return bool(gradients) and all(jnp.issubdtype(_aval(v).dtype, jnp.floating) for v in gradients)


def _made_backward(joint: Joint, flat: Jaxpr, region: _Region) -> list[Var]:
    """Results of the region that the backward half computes."""
    boundary = len(joint.forward.eqns)
    made = {v for i in region.members if i >= boundary for v in flat.eqns[i].outvars}
    return [v for v in region.results if v in made]


def _count(rows: int, scores_bytes: int, chunk_bytes: float) -> int:
    divisors = [k for k in range(1, _MOST_CHUNKS + 1) if rows % k == 0]
    return next((k for k in divisors if scores_bytes / k <= chunk_bytes), divisors[-1])


def _rewritten(joint: Joint, flat: Jaxpr, region: _Region, chunks: int) -> Joint:
    boundary, (cotangent,) = len(joint.forward.eqns), joint.backward.invars[:1]
    loop = _Loop(flat, region, chunks, boundary, cotangent)
    closed = inline_calls(jax.make_jaxpr(loop.run)(*map(_struct, loop.inputs)))

    # The forward half gives the gradients of a cotangent of 1, under names of its own.
    gradients = _made_backward(joint, flat, region)
    given, taken = ({v: Var(v.aval) for v in gradients} for _ in range(2))
    scaling = []
    for v in gradients:
        scaled = inline_calls(jax.make_jaxpr(_scaled)(_struct(cotangent), _struct(v)))
        scaling += instantiated(scaled.jaxpr, [cotangent, taken[v]], [v])[0]

    before, after = [], []
    for index, eqn in enumerate(joint.forward.eqns):
        if index not in region.members:
            (after if index in region.later else before).append(eqn)
    rest = [e for i, e in enumerate(joint.backward.eqns, boundary) if i not in region.members]
    results = [given.get(v, v) for v in region.results]
    chunked, _ = instantiated(closed.jaxpr, loop.inputs, results)
    forward = with_borders(
        joint.forward,
        eqns=[*before, *chunked, *after],
        outvars=[*joint.forward.outvars, *given.values()],
    )
    backward = with_borders(
        joint.backward,
        eqns=[*scaling, *rest],
        invars=[*joint.backward.invars, *taken.values()],
    )
    return without_unread(replace(joint, forward=forward, backward=backward))


class _Loop:
    """The region as a function of `inputs`: a scan over chunks of rows."""

    def __init__(
        self, flat: Jaxpr, region: _Region, chunks: int, boundary: int, cotangent: Var
    ) -> None:
        self.flat, self.region, self.chunks, self.cotangent = flat, region, chunks, cotangent
        # What the backward half makes of the cotangent for the region.
        self.of_cotangent: list[JaxprEqn] = []
        wanted: dict[Any, None] = {**dict.fromkeys(region.cut), **region.whole}
        for index in range(len(flat.eqns) - 1, boundary - 1, -1):
            eqn = flat.eqns[index]
            if index not in region.members and any(v in wanted for v in eqn.outvars):
                self.of_cotangent.insert(0, eqn)
                wanted.update(dict.fromkeys(_variables(eqn)))
        made = {cotangent, *(v for eqn in self.of_cotangent for v in eqn.outvars)}
        self.inputs = [v for v in wanted if v not in made]

    def run(self, *values: Any) -> list[Any]:
        """The region's results."""
        region = self.region
        whole: dict[Any, Any] = dict(zip(self.inputs, values, strict=True))
        whole[self.cotangent] = jnp.ones((), _aval(self.cotangent).dtype)
        for eqn in self.of_cotangent:
            with scope(eqn):
                whole.update(zip(eqn.outvars, bind(eqn, _read(eqn, whole)), strict=True))
        summed = [v for v, dim in region.results.items() if dim == SUMMED]
        stacked = [v for v, dim in region.results.items() if dim != SUMMED]

        def turn(sums: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            known = dict(zip(region.cut, slices, strict=True))
            for index in sorted(region.runs):
                known.update(self._run(index, known, whole))
            sums = [total + known[v] for total, v in zip(sums, summed, strict=True)]
            return sums, [known[v] for v in stacked]

        zeros = [jnp.zeros(_shape(v), _summing_dtype(v)) for v in summed]
        slices = [self._split(whole[v], dim) for v, dim in region.cut.items()]
        sums, rows = lax.scan(turn, zeros, slices, length=self.chunks)
        found = {v: x.astype(_aval(v).dtype) for v, x in zip(summed, sums, strict=True)}
        for v, x in zip(stacked, rows, strict=True):
            found[v] = jnp.moveaxis(x, 0, int(region.results[v])).reshape(_shape(v))
        return [found[v] for v in region.results]

    def _run(self, index: int, known: dict[Any, Any], whole: dict[Any, Any]) -> dict[Any, Any]:
        """One equation on a slice."""
        eqn, run = self.flat.eqns[index], self.region.runs[index]
        values = [
            v.val if isinstance(v, Literal) else whole[v] if dim is None else known[v]
            for v, dim in zip(eqn.invars, run.inputs, strict=True)
        ]
        (out,) = eqn.outvars
        with scope(eqn):
            if run.output == SUMMED:
                dtype = _summing_dtype(out)
                if "preferred_element_type" in eqn.params:
                    params = {**eqn.params, "preferred_element_type": jnp.dtype(dtype)}
                    return {out: bind(eqn, values, params)[0].astype(dtype)}
                return {out: bind(eqn, [value.astype(dtype) for value in values])[0]}
            size = _shape(out)[run.output] // self.chunks if isinstance(run.output, int) else 0
            return {out: bind(eqn, values, resized(eqn, run.output, size))[0]}

    def _split(self, x: Any, dim: int) -> Any:
        shape = (*x.shape[:dim], self.chunks, x.shape[dim] // self.chunks, *x.shape[dim + 1 :])
        return jnp.moveaxis(x.reshape(shape), dim, 0)


def _scaled(cotangent: jax.Array, gradient: jax.Array) -> jax.Array:
    return cotangent.astype(gradient.dtype) * gradient


def _summing_dtype(v: Var) -> Any:
    """Floating-point chunks of 16 bits are added up in 32."""
    dtype = _aval(v).dtype
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _read(eqn: JaxprEqn, known: dict[Any, Any]) -> list[Any]:
    return [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if isinstance(v, Var)]


def _dim(dims: dict[Any, int | str | None], atom: Any) -> Dim:
    found = None if isinstance(atom, Literal) else dims.get(atom)
    return found if isinstance(found, int) else None


def _struct(v: Var) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_shape(v), _aval(v).dtype)


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def _aval(v: Var) -> Any:
    return v.aval
