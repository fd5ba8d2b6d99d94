"""Where a program computes softmax attention.

From a product with values back to the product of queries and keys. On the way the names of the
weights' dimensions are carried along, so that a softmax over another dimension, or divided by
another row's sum, is not taken for one.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.ir.compat import Jaxpr, JaxprEqn, Literal, Var, bind
from fastgpu.ir.fusion import is_elementwise
from fastgpu.transforms.dataflow.attention_site import FEATURES, Names, Site
from fastgpu.transforms.dataflow.fused_attention import Form, kernel_takes

# Fewer scores than these are no traffic worth a kernel of its own.
_FEWEST = 1 << 18
# A score filled with this or less has no weight.
_HIDDEN = -1e4
# Masks with more elements are not looked at.
_MOST_EVALUATED = 1 << 26
# How many equations may lie between the two products.
_MOST_BETWEEN = 100
# A condition, its dimensions' names, and what it is where a key is seen.
_Mask = tuple[Any, Names, bool]


def attentions(jaxpr: Jaxpr, known: dict[Any, Any]) -> list[Site]:
    """The attentions of a flat program that the kernel takes; `known` are values of constants."""
    if not any(eqn.primitive.name == "exp" for eqn in jaxpr.eqns):
        return []
    program = _Program(jaxpr, known)
    found = (
        program.attention(eqn, side)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general"
        for side in (0, 1)
    )
    return [site for site in found if site is not None]


@dataclass
class _Scores:
    """What happens to the product of queries and keys before the softmax."""

    product: JaxprEqn
    names: Names
    scale: float
    biases: list[tuple[Any, Names, float]] = field(default_factory=list)
    masks: list[_Mask] = field(default_factory=list)


class _Program:
    def __init__(self, jaxpr: Jaxpr, known: dict[Any, Any]) -> None:
        self.jaxpr, self.known = jaxpr, known
        self.producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.readers: dict[Any, list[JaxprEqn]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            for v in {v for v in eqn.invars if isinstance(v, Var)}:
                self.readers[v].append(eqn)
        self.given = {v for v in jaxpr.outvars if isinstance(v, Var)}
        self.values: dict[Any, np.ndarray | None] = {}

    def made_by(self, atom: Any, *names: str) -> JaxprEqn | None:
        eqn = None if isinstance(atom, Literal) else self.producer.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    def attention(self, result: JaxprEqn, side: int) -> Site | None:
        """The attention whose weights are the `side`th input of the product `result`."""
        weights, values = result.invars[side], result.invars[1 - side]
        contracting, batch = result.params["dimension_numbers"]
        if len(contracting[side]) != 1 or not isinstance(weights, Var):
            return None
        sizes = dict(enumerate(_shape(weights)))
        names: Names = tuple(n if size > 1 else None for n, size in sizes.items())
        (keys,) = (names[int(d)] for d in contracting[side])
        if keys is None:
            return None
        inner, inner_names, zeroed = self.without_zeros(weights, names)
        softmax = self.softmax(inner, inner_names, keys)
        scores = softmax and self.scores(*softmax)
        if not scores or not self.is_private(scores.product, result):
            return None
        # A weight set to zero has to be one that is zero, also where a query sees no key.
        if any(self.triangle(mask, keys) is None for mask in zeroed):
            return None
        # The values' dimensions, by the weights' names.
        value_names: list[int | None] = [None] * len(_shape(values))
        value_names[int(contracting[1 - side][0])] = keys
        for mine, other in zip(batch[side], batch[1 - side], strict=True):
            value_names[int(other)] = names[int(mine)]
        free = _free(result, 1 - side)
        wide = [d for d in free if _shape(values)[d] > 1]
        if len(wide) != 1:
            return None
        value_names[wide[0]] = FEATURES
        sizes[FEATURES] = _shape(values)[wide[0]]
        batched = [names[int(d)] for d in batch[side]]
        frees: list[list[int | None]] = [[], []]
        frees[side] = [names[d] for d in _free(result, side)]
        frees[1 - side] = [FEATURES if d in wide else None for d in free]
        out = (*batched, *frees[0], *frees[1])
        site = self.site(result, scores, keys, values, tuple(value_names), sizes, out)
        if site is None or not self.pays(site):
            return None
        return site

    def pays(self, site: Site) -> bool:
        sizes = [
            site.sizes[n] for kind in site.order if kind != "features" for n in site.order[kind]
        ]
        if math.prod(sizes) < _FEWEST:
            return False
        structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in site.operands]
        q, k, v, *extras = jax.eval_shape(site.arguments, *structs)
        return q.shape[1] > 1 and kernel_takes(site.form, q, k, v, *extras)

    def site(
        self,
        result: JaxprEqn,
        scores: _Scores,
        keys: int,
        values: Any,
        value_names: Names,
        sizes: dict[int, int],
        out: Names,
    ) -> Site | None:
        """The attention, its dimensions sorted by what they are for."""
        product = scores.product
        contracting, batch = product.params["dimension_numbers"]
        if len(contracting[0]) != 1 or len(set(scores.names) - {None}) != len(
            [n for n in scores.names if n is not None]
        ):
            return None
        # Names of the dimensions of both inputs of the product, by those of its result.
        free = [_free(product, side) for side in (0, 1)]
        named: list[list[int | None]] = [[None] * len(_shape(v)) for v in product.invars]
        for place, pair in enumerate(zip(*batch, strict=True)):
            for side in (0, 1):
                named[side][int(pair[side])] = scores.names[place]
        place = len(batch[0])
        for side in (0, 1):
            for d in free[side]:
                named[side][d] = scores.names[place]
                place += 1
            named[side][int(contracting[side][0])] = FEATURES
        if sizes[FEATURES] != _shape(product.invars[0])[int(contracting[0][0])]:
            return None
        key_side = 0 if keys in named[0] else 1
        query_names, key_names = named[1 - key_side], named[key_side]
        shared = [n for n in query_names if n in key_names and n not in (None, FEATURES)]
        own = [n for n in query_names if n not in key_names and n is not None]
        if keys in query_names or not own:
            return None
        if {n for n in key_names if n is not None} != {*shared, keys, FEATURES}:
            return None
        if {n for n in value_names if n is not None} != {*shared, keys, FEATURES}:
            return None
        triangles = [self.triangle(mask, keys) for mask in scores.masks]
        causal = {n for n in triangles if n is not None}
        if len(causal) > 1 or not causal <= {*own}:
            return None
        masks = [m for m, n in zip(scores.masks, triangles, strict=True) if n is None]
        seen = [n for _, names, _ in (*scores.biases, *masks) for n in names]
        queries = max(causal or own, key=lambda n: (n in seen, sizes[n]))
        order = {
            "batch": tuple(shared[:-1] if len(shared) > 1 else shared),
            "queries": (queries,),
            "groups": tuple(shared[-1:] if len(shared) > 1 else ()),
            "heads": tuple(n for n in own if n != queries),
            "keys": (keys,),
            "features": (FEATURES,),
        }
        operands = [product.invars[1 - key_side], product.invars[key_side], values]
        names = [tuple(query_names), tuple(key_names), value_names]
        first = len(operands)
        biases = [(first + i, factor) for i, (_, _, factor) in enumerate(scores.biases)]
        operands += [v for v, _, _ in scores.biases]
        names += [n for _, n, _ in scores.biases]
        hiding = [(len(operands) + i, keep) for i, (_, _, keep) in enumerate(masks)]
        operands += [v for v, _, _ in masks]
        names += [n for _, n, _ in masks]
        if any(isinstance(v, Literal) for v in operands):
            return None
        dtype = _dtype(operands[0])
        if any(_dtype(v) != dtype for v in operands[:first]):
            return None
        # A bias that is added in more than the kernel's precision would be rounded.
        if any(_dtype(v) != dtype for v, _, _ in scores.biases):
            return None
        form = Form(scores.scale, bool(causal), bool(biases), bool(hiding))
        return Site(result, form, operands, names, order, sizes, biases, hiding, out)

    def is_private(self, product: JaxprEqn, result: JaxprEqn) -> bool:
        """Whether `result` is all that is made of `product`."""
        pending, seen = list(product.outvars), set()
        while pending:
            v = pending.pop()
            if v in self.given or len(seen) > _MOST_BETWEEN:
                return False
            for eqn in self.readers[v]:
                if eqn is not result and id(eqn) not in seen:
                    seen.add(id(eqn))
                    pending += eqn.outvars
        return True

    def without_zeros(self, weights: Any, names: Names) -> tuple[Any, Names, list[_Mask]]:
        """Weights before some are set to zero, and the conditions on which they are not."""
        atom, names = self.behind(weights, names)
        select = self.made_by(atom, "select_n")
        if select is None or len(select.invars) != 3 or self.scalar(select.invars[1]) != 0:
            return atom, names, []
        return select.invars[2], names, self.conjuncts(select.invars[0], names, True)

    def softmax(self, weights: Any, names: Names, keys: int) -> tuple[Any, Names] | None:
        """What `weights` are the softmax of, over `keys`, and its dimensions' names."""
        atom, names = self.behind(weights, names)
        division, exp = self.made_by(atom, "div"), self.made_by(atom, "exp")
        if division is not None:
            above, above_names = self.behind(division.invars[0], names)
            exp, below = self.made_by(above, "exp"), division.invars[1]
            if exp is None:
                return None
            shifted = exp.invars[0], above_names
        elif exp is not None and (difference := self.made_by(exp.invars[0], "sub")):
            # exp(log_softmax(x)): the logarithm of the sum is taken off.
            shifted = difference.invars[0], names
            below = self.logarithm_of(difference.invars[1])
        else:
            return None
        # The sum of the exponentials of what the exponentials are taken of, over the keys.
        total, total_names = self.reduced(below, names, "reduce_sum")
        terms = total and self.made_by(self.uncast(total.invars[0]), "exp")
        if total is None or not terms or terms.invars[0] is not shifted[0]:
            return None
        if not _is_over(total, shifted[1], total_names, keys):
            return None
        shifted = self.behind(*shifted)
        difference = self.made_by(shifted[0], "sub")
        if difference is None:
            return None
        scores = difference.invars[0], shifted[1]
        largest, largest_names = self.reduced(difference.invars[1], shifted[1], "reduce_max")
        for same, same_names in [scores, *self.casts_and_views(*scores)]:
            if largest and self.uncast(largest.invars[0]) is self.uncast(same):
                return scores if _is_over(largest, same_names, largest_names, keys) else None
        return None

    def logarithm_of(self, atom: Any) -> Any:
        """What `atom`, up to its shape, is the logarithm of."""
        while eqn := self.made_by(atom, *_VIEWS, "log"):
            atom = eqn.invars[0]
            if eqn.primitive.name == "log":
                return atom
        return None

    def reduced(self, atom: Any, names: Names, kind: str) -> tuple[JaxprEqn | None, Names]:
        """The reduction that `atom` is, up to casts and moved dimensions; its result's names."""
        if atom is None or len(names) != len(_shape(atom)):
            return None, ()
        names = tuple(n if size > 1 else None for n, size in zip(names, _shape(atom), strict=True))
        while not isinstance(atom, Literal) and (eqn := self.producer.get(atom)) is not None:
            name = eqn.primitive.name
            before = _names_before(eqn, names)
            if name == kind:
                return eqn, names
            if name == "max":  # with -inf, as jax.nn.softmax has it
                rest = [v for v in eqn.invars if not isinstance(v, Literal)]
                least = [v for v in eqn.invars if isinstance(v, Literal)]
                if len(rest) != 1 or not np.all(np.isneginf(np.asarray(least[0].val, float))):
                    break
                atom = rest[0]
            elif name == "stop_gradient":
                atom = eqn.invars[0]
            elif before is not None:
                atom, names = eqn.invars[0], before
            else:
                break
        return None, ()

    def uncast(self, atom: Any) -> Any:
        while eqn := self.made_by(atom, "convert_element_type"):
            atom = eqn.invars[0]
        return atom

    def behind(self, atom: Any, names: Names) -> tuple[Any, Names]:
        """The value that `atom` is a cast or another arrangement of, and its dimensions' names."""
        return [(atom, names), *self.casts_and_views(atom, names)][-1]

    def casts_and_views(self, atom: Any, names: Names) -> Iterator[tuple[Any, Names]]:
        """All values that `atom` is a cast or another arrangement of, nearest first."""
        while not isinstance(atom, Literal) and (eqn := self.producer.get(atom)) is not None:
            before = _names_before(eqn, names)
            # From numbers that are not floating it is no mere cast.
            if before is None or not jnp.issubdtype(_dtype(eqn.invars[0]), jnp.floating):
                break
            atom, names = eqn.invars[0], before
            yield atom, names

    def scores(self, atom: Any, names: Names) -> _Scores | None:
        """How `atom` is made of a product, if nobody else reads anything on the way."""
        factor = 1.0
        biases: list[tuple[Any, Names, float]] = []
        masks: list[_Mask] = []
        while True:
            atom, names = self.behind(atom, names)
            eqn = None if isinstance(atom, Literal) else self.producer.get(atom)
            if eqn is None:
                return None
            name = eqn.primitive.name
            if name == "dot_general":
                return _Scores(eqn, names, factor, biases, masks)
            if name in ("mul", "div"):
                place = self.scale_of(eqn)
                if place is None:
                    return None
                scalar, atom = place
                factor *= scalar if name == "mul" else 1 / scalar
            elif name in ("add", "sub"):
                place = next((i for i in (0, 1) if self.leads_to_product(eqn.invars[i])), None)
                if place is None or (name == "sub" and place == 1):
                    return None
                bias, compact = self.compact(eqn.invars[1 - place], names)
                biases.append((bias, compact, factor if name == "add" else -factor))
                atom = eqn.invars[place]
            elif name == "select_n" and len(eqn.invars) == 3:
                place = next((i for i in (1, 2) if self.leads_to_product(eqn.invars[i])), None)
                fill = place and self.scalar(eqn.invars[3 - place])
                if place is None or fill is None or not fill * factor <= _HIDDEN:
                    return None
                masks += self.conjuncts(eqn.invars[0], names, place == 2)
                atom = eqn.invars[place]
            else:
                return None
            if not factor > 0 or not math.isfinite(factor):
                return None

    def leads_to_product(self, atom: Any) -> bool:
        """Whether `atom` is a product, scaled, masked or moved."""
        while not isinstance(atom, Literal):
            eqn = self.producer.get(atom)
            if eqn is None:
                return False
            name = eqn.primitive.name
            if name == "dot_general":
                return True
            if name in ("mul", "div"):
                place = self.scale_of(eqn)
                if place is None:
                    return False
                atom = place[1]
            elif name in ("add", "sub"):
                return any(self.leads_to_product(v) for v in eqn.invars)
            elif name == "select_n" and len(eqn.invars) == 3:
                return any(self.leads_to_product(v) for v in eqn.invars[1:])
            elif name in _VIEWS or name == "convert_element_type":
                atom = eqn.invars[0]
            else:
                return False
        return False

    def scale_of(self, eqn: JaxprEqn) -> tuple[float, Any] | None:
        """The number that a product or quotient has, and what it multiplies."""
        places = (1,) if eqn.primitive.name == "div" else (1, 0)
        for place in places:
            scalar = self.scalar(eqn.invars[place])
            if scalar:
                return scalar, eqn.invars[1 - place]
        return None

    def scalar(self, atom: Any) -> float | None:
        """The one number that `atom` is everywhere, if no input has a part in it."""
        while not isinstance(atom, Literal) and (
            eqn := self.made_by(atom, "broadcast_in_dim", "reshape", "convert_element_type")
        ):
            atom = eqn.invars[0]
        if not isinstance(atom, Literal) and math.prod(_shape(atom)) > 1:
            return None
        value = self.value(atom)
        return None if value is None else float(value.reshape(()))

    def value(self, atom: Any) -> np.ndarray | None:
        """The value of `atom`, if it depends on no input, of size 1 where it is a broadcast."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val)
        if atom in self.known:
            return np.asarray(self.known[atom])
        if atom not in self.values:
            self.values[atom] = self._evaluated(atom)
        return self.values[atom]

    def _evaluated(self, atom: Any) -> np.ndarray | None:
        eqns: dict[int, JaxprEqn] = {}
        pending = [atom]
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in self.known:
                continue
            eqn = self.producer.get(v)
            if eqn is None or eqn.effects:
                return None
            if id(eqn) not in eqns:
                eqns[id(eqn)] = eqn
                pending += eqn.invars
        found: dict[Any, Any] = {}
        with jax.ensure_compile_time_eval():
            for eqn in self.jaxpr.eqns:
                if id(eqn) in eqns:
                    inputs = [
                        v.val if isinstance(v, Literal) else found.get(v, self.known.get(v))
                        for v in eqn.invars
                    ]
                    outputs = _unbroadcast(eqn, [jnp.asarray(x) for x in inputs])
                    if outputs is None:
                        return None
                    found.update(zip(eqn.outvars, outputs, strict=True))
        return np.asarray(found[atom])

    def compact(self, atom: Any, names: Names) -> tuple[Any, Names]:
        """The smaller value that `atom` is a broadcast of, and its dimensions' names."""
        while eqn := self.made_by(atom, "broadcast_in_dim", "squeeze", "reshape", "expand_dims"):
            source = eqn.invars[0]
            if isinstance(source, Literal):
                break
            if eqn.primitive.name == "broadcast_in_dim":
                places = [int(d) for d in eqn.params["broadcast_dimensions"]]
                names = tuple(
                    names[d] if size > 1 else None
                    for d, size in zip(places, _shape(source), strict=True)
                )
            else:
                before = _names_before(eqn, names)
                if before is None:
                    break
                names = before
            atom = source
        return atom, tuple(
            n if size > 1 else None for n, size in zip(names, _shape(atom), strict=True)
        )

    def conjuncts(self, atom: Any, names: Names, keep: bool) -> list[_Mask]:
        """The conditions all of which `atom` asks, less those that always hold."""
        atom, names = self.compact(atom, names)
        both = self.made_by(atom, "and") if keep else None
        if both is not None:
            fitting = [(v, names if _shape(v) else ()) for v in both.invars]
            return [mask for pair in fitting for mask in self.conjuncts(*pair, keep)]
        scalar = self.scalar(atom)
        return [] if scalar is not None and bool(scalar) == keep else [(atom, names, keep)]

    def triangle(self, mask: _Mask, keys: int) -> int | None:
        """The dimension of which each place sees the keys up to its own, if `mask` says that."""
        atom, names, keep = mask
        value = None if keys not in names else self.value(atom)
        if value is None:
            return None
        # The same for all examples and heads, it may still have been written out for each.
        for axis in range(value.ndim):
            first = value.take([0], axis)
            if names[axis] != keys and np.array_equal(value, np.broadcast_to(first, value.shape)):
                value = first
        names = tuple(n if size > 1 else None for n, size in zip(names, value.shape, strict=True))
        kept = [n for n in names if n is not None]
        if len(kept) != 2 or keys not in kept:
            return None
        value = value.reshape([size for size in value.shape if size > 1])
        (queries,) = {*kept} - {keys}
        value = value.transpose([kept.index(n) for n in (queries, keys)])
        triangle = np.tri(len(value), dtype=bool)
        return queries if np.array_equal(value.astype(bool) == keep, triangle) else None


def _unbroadcast(eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
    """What `eqn` gives of these values, all of size 1 along dimensions in which nothing differs.

    `None` where that would be large.
    """
    name, shape = eqn.primitive.name, _shape(eqn.outvars[0])
    if name == "iota":
        own = eqn.params["dimension"]
        params = {**eqn.params, "shape": tuple(n if d == own else 1 for d, n in enumerate(shape))}
        return bind(eqn, values, params)
    if name == "broadcast_in_dim":
        sizes = dict(zip(eqn.params["broadcast_dimensions"], values[0].shape, strict=True))
        return [values[0].reshape([sizes.get(d, 1) for d in range(len(shape))])]
    if is_elementwise(eqn):
        sizes = np.broadcast_shapes(*(x.shape for x in values))
        if math.prod(sizes) > _MOST_EVALUATED:
            return None
        return bind(eqn, [jnp.broadcast_to(x, sizes) for x in values])
    if name == "transpose":
        return bind(eqn, values)
    if sum(math.prod(_shape(v)) for v in (*eqn.invars, *eqn.outvars)) > _MOST_EVALUATED:
        return None
    whole = zip(values, eqn.invars, strict=True)
    return bind(eqn, [jnp.broadcast_to(x, _shape(v)) for x, v in whole])


_VIEWS = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim")


def _names_before(eqn: JaxprEqn, names: Names) -> Names | None:
    """The dimensions' names of the input of a cast or move, `None` for any other equation."""
    name, source = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
    if name == "convert_element_type":
        return names
    if name == "transpose":
        before: list[int | None] = [None] * len(names)
        for place, d in enumerate(eqn.params["permutation"]):
            before[int(d)] = names[place]
        return tuple(before)
    if name not in _VIEWS or isinstance(source, Literal):
        return None
    old, new = _shape(source), _shape(eqn.outvars[0])
    if [size for size in old if size > 1] != [size for size in new if size > 1]:
        return None
    if name == "broadcast_in_dim":
        return tuple(names[int(d)] for d in eqn.params["broadcast_dimensions"])
    rest = iter([n for n, size in zip(names, new, strict=True) if size > 1])
    return tuple(next(rest) if size > 1 else None for size in old)


def _is_over(reduction: JaxprEqn, names: Names, result: Names, keys: int) -> bool:
    """Whether what has these names is reduced over `keys`, to a result with those names."""
    axes = [int(axis) for axis in reduction.params["axes"]]
    rest = tuple(n for d, n in enumerate(names) if d not in axes)
    return [names[axis] for axis in axes] == [keys] and result == rest


def _free(product: JaxprEqn, side: int) -> list[int]:
    contracting, batch = product.params["dimension_numbers"]
    bound = {int(d) for d in (*contracting[side], *batch[side])}
    return [d for d in range(len(_shape(product.invars[side]))) if d not in bound]


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype
