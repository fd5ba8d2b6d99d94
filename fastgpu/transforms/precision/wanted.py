"""Which values lead to a product: only those are worth having in the low dtype.

A loss is where no product follows: what leads there and nowhere else stays in float32, and so do
the results of a program, and the scores of an attention (a softmax needs them as they are).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Var, is_plain_call, sub_jaxprs
from fastgpu.transforms.precision.kinds import (
    ELEMENTWISE,
    MOVING,
    PARALLEL,
    PASSING,
    POOLING,
    REDUCTIONS,
)

_THROUGH = ELEMENTWISE | MOVING | PASSING | POOLING | REDUCTIONS


class Wanted:
    """Asks, for programs and the programs in them, which values a product is made of.

    `is_product(eqn, path)` says which equations are products to be cast; `path` is the scope.
    """

    def __init__(self, is_product: Callable[[JaxprEqn, str], bool]) -> None:
        self.is_product = is_product
        self.known: dict[Any, tuple[Jaxpr, frozenset[Var]]] = {}

    def of(self, jaxpr: Jaxpr, outs: Sequence[bool], path: str) -> frozenset[Var]:
        """The variables that lead to a product, there or (where `outs` is true) outside."""
        key = id(jaxpr), tuple(outs), path
        if key not in self.known:
            # The jaxpr is kept, so that its id is not given to another.
            self.known[key] = jaxpr, frozenset(self._of(jaxpr, outs, path))
        return self.known[key][1]

    def inputs(self, jaxpr: Jaxpr, outs: Sequence[bool], path: str) -> list[bool]:
        """Of each input, whether it leads to a product."""
        found = self.of(jaxpr, outs, path)
        return [v in found for v in jaxpr.invars]

    def loop_outputs(self, eqn: JaxprEqn, outs: Sequence[bool], path: str) -> list[bool]:
        """Of each output of the body of a `scan` or `while`: a carry is read by the next turn."""
        body, first, count = _body(eqn)
        outs = list(outs)
        while True:
            carried = self.inputs(body, outs, path)[first : first + count]
            merged = [*(a or b for a, b in zip(outs[:count], carried, strict=True)), *outs[count:]]
            if merged == outs:
                return outs
            outs = merged

    def _of(self, jaxpr: Jaxpr, outs: Sequence[bool], path: str) -> set[Var]:
        found = {v for v, w in zip(jaxpr.outvars, outs, strict=True) if w and isinstance(v, Var)}

        def add(atoms: Iterable[Any]) -> None:
            found.update(v for v in atoms if isinstance(v, Var))

        for eqn in reversed(jaxpr.eqns):
            inside = scope_path(path, eqn)
            name, results = eqn.primitive.name, [v in found for v in eqn.outvars]
            if self.is_product(eqn, inside) or (any(results) and _passes(eqn)):
                add(eqn.invars)
            elif name in PARALLEL:
                add(v for v, w in zip(eqn.invars, results, strict=True) if w)
            elif sub_jaxprs(eqn):
                into = self._into(eqn, results, inside)
                add(v for v, w in zip(eqn.invars, into, strict=True) if w)
        return found

    def _into(self, eqn: JaxprEqn, outs: list[bool], path: str) -> list[bool]:
        """Of each input of an equation that runs programs, whether it leads to a product."""
        name = eqn.primitive.name
        if name == "cond":
            branches = [self.inputs(sub, outs, path) for sub in sub_jaxprs(eqn)]
            return [False, *map(any, zip(*branches, strict=True))]
        if name in ("scan", "while"):
            body, first, count = _body(eqn)
            into = self.inputs(body, self.loop_outputs(eqn, outs, path), path)
            # A `while` has the constants of its condition in front.
            skipped = len(eqn.invars) - len(into)
            carried = zip(into[first : first + count], outs, strict=False)
            into[first : first + count] = [a or b for a, b in carried]
            return [*[False] * skipped, *into]
        if is_plain_call(eqn):
            path = joined(path, call_name(eqn))
        if name.startswith("custom_"):  # runs as its author wrote it: no casts inside
            return Wanted(lambda eqn, path: False).inputs(sub_jaxprs(eqn)[0], outs, path)
        return self.inputs(sub_jaxprs(eqn)[0], outs, path)


def _passes(eqn: JaxprEqn) -> bool:
    """Whether the inputs of `eqn` lead to a product if its result does."""
    if eqn.primitive.name == "convert_element_type":  # which may only be of the weak kind
        return eqn.invars[0].aval.dtype == eqn.params["new_dtype"]  # pyright: ignore[reportAttributeAccessIssue]
    return eqn.primitive.name in _THROUGH


def _body(eqn: JaxprEqn) -> tuple[Jaxpr, int, int]:
    """The body of a loop, and where its carry begins and how long it is."""
    if eqn.primitive.name == "scan":
        closed: ClosedJaxpr = eqn.params["jaxpr"]
        return closed.jaxpr, eqn.params["num_consts"], eqn.params["num_carry"]
    closed, first = eqn.params["body_jaxpr"], eqn.params["body_nconsts"]
    return closed.jaxpr, first, len(closed.jaxpr.invars) - first


def scope_path(path: str, eqn: JaxprEqn) -> str:
    """The scope of `eqn` in a program that runs in the scope `path`."""
    return joined(path, str(eqn.source_info.name_stack))


def call_name(eqn: JaxprEqn) -> str:
    """The scope of what a call runs."""
    return eqn.params.get("name", eqn.primitive.name)


def joined(path: str, inner: str) -> str:
    """The scope `inner` in the scope `path`; either may be empty."""
    return f"{path}/{inner}" if path and inner else path or inner
