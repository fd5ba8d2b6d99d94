"""Products in a low dtype, activations between them too, the rest in float32.

As `torch.autocast` and Keras's mixed precision do, but decided on the program instead of a list of
layers (Micikevicius et al. 2018, arXiv:1710.03740). Matrix products and convolutions get their
inputs cast and give their results in the low dtype; sums inside of a product are in float32, as
GPUs add them. Elementwise operations on such results run in the low dtype as long as a product
follows. In float32 stay: reductions, norms, softmax, exponentials and logarithms; what leads to no
product any more, so losses and the program's results; what is computed of data and parameters
before a product reads it; state carried by a loop that no product reads in it. Casts are equations
before differentiation, so gradients of products run in the low dtype, and those of parameters
arrive in float32. What is not float32 is left alone, and so is a product with a `precision=` of
its own, and what is inside of a function with a derivative rule of its own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastgpu.errors import ConfigurationError
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, bind, scope, sub_jaxprs
from fastgpu.transforms.precision.calls import call
from fastgpu.transforms.precision.kinds import (
    ELEMENTWISE,
    MOVING,
    PARALLEL,
    POOLING,
    PRODUCTS,
    Kind,
    elementwise,
    repeated,
    wide_result,
)
from fastgpu.transforms.precision.policy import Policy, matches
from fastgpu.transforms.precision.values import Value, is_plain_product, is_wide
from fastgpu.transforms.precision.wanted import Wanted, scope_path


def in_precision(closed: ClosedJaxpr, policy: Policy) -> ClosedJaxpr:
    """`closed` computed as `policy` says; inputs and outputs keep their types.

    Raises `ConfigurationError` if the policy is strict and one of its patterns matches nothing.

    >>> from fastgpu.transforms.precision import policy_of
    >>> closed = jax.make_jaxpr(lambda x, w: jnp.sum(x @ w))(jnp.ones((2, 2)), jnp.ones((2, 2)))
    >>> mixed = in_precision(closed, policy_of("bf16-mixed"))
    >>> for eqn in mixed.jaxpr.eqns:
    ...     print(eqn.primitive, eqn.outvars[0].aval.str_short())
    convert_element_type bfloat16[2,2]
    convert_element_type bfloat16[2,2]
    dot_general bfloat16[2,2]
    convert_element_type float32[2,2]
    reduce_sum float32[]
    """
    evaluator = Evaluator(policy)
    inputs = [Kind.DATA if is_wide(aval) else None for aval in closed.in_avals]
    wide = [False] * len(closed.out_avals)
    mixed, _ = evaluator.program(closed, inputs, wide, wide, "")
    if policy.strict:
        evaluator.require_matches()
    return mixed


class Evaluator:
    """Evaluates programs under a new trace, each value in the dtype that its kind says.

    `frozen` is for a program that stays as it is: only the kinds of its results are asked for.
    """

    def __init__(self, policy: Policy, *, frozen: bool = False) -> None:
        self.policy, self.frozen = policy, frozen
        self.dtype = policy.low or np.dtype(jnp.bfloat16)
        self.wanted = Wanted(self.is_product)
        self.paths: set[str] = set()

    def require_matches(self) -> None:
        """Raise `ConfigurationError` for a pattern that matches no scope that was met."""
        for pattern, _ in self.policy.rules:
            if not any(matches(pattern, path) for path in self.paths or {""}):
                shown = sorted(path for path in self.paths if path)
                raise ConfigurationError(
                    f"precision: no scope is called {pattern!r}",
                    expected="the name of a module or `jax.named_scope`, of several one in the "
                    "other, such as 'encoder/block_*'",
                    got=f"a program with the scopes {', '.join(shown[:20]) or '(none)'}"
                    + (", ..." if len(shown) > 20 else ""),
                    fix="`fastgpu.ir.walk` and `eqn.source_info.name_stack` show all of them",
                )

    def is_product(self, eqn: JaxprEqn, path: str) -> bool:
        """Whether `eqn` is a product of float32 arrays that is to be computed in the low dtype."""
        return self.low_at(path) and not self.frozen and is_plain_product(eqn)

    def low_at(self, path: str) -> bool:
        """Whether values may be in the low dtype in the scope `path`."""
        mode = self.policy.mode(path)
        return mode is not None and mode.low is not None

    # ---- programs

    def program(
        self,
        closed: ClosedJaxpr,
        kinds: Sequence[Kind | None],
        outs: Sequence[bool],
        low: Sequence[bool | None],
        path: str,
    ) -> tuple[ClosedJaxpr, list[Kind | None]]:
        """`closed` for inputs of these kinds, and the kinds of its outputs.

        `outs` says which outputs lead to a product; `low` in which dtype they are given: float32
        (False), the low one (True), or as they are computed (None).
        """
        found: list[Kind | None] = []

        def evaluate(*args: Any) -> list[Any]:
            values = [Value(arg, kind) for arg, kind in zip(args, kinds, strict=True)]
            results = self.evaluate(closed.jaxpr, closed.consts, values, outs, path)
            found.extend(value.kind for value in results)
            return [self.given(value, how) for value, how in zip(results, low, strict=True)]

        avals = [
            aval.update(dtype=self.dtype, weak_type=False) if kind is Kind.LOW else aval
            for aval, kind in zip(closed.in_avals, kinds, strict=True)
        ]
        made = jax.make_jaxpr(evaluate)(*avals)
        jaxpr = made.jaxpr.replace(debug_info=closed.jaxpr.debug_info)
        return ClosedJaxpr(jaxpr, made.consts), found

    def given(self, value: Value, low: bool | None) -> Any:
        """The value in float32 (False), in the low dtype (True), or as it is (None)."""
        if value.kind is None or low is None:
            return value.array
        return value.low(self.dtype) if low else value.wide()

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Value],
        outs: Sequence[bool],
        path: str,
    ) -> list[Value]:
        """The results of `jaxpr`, in the trace that is under way; arguments as for `program`."""
        wanted = self.wanted.of(jaxpr, outs, path)
        env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        for v, const in zip(jaxpr.constvars, consts, strict=True):
            env[v] = Value(const, Kind.DATA if is_wide(v.aval) else None)

        def read(atom: Any) -> Value:
            return self.literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inside = scope_path(path, eqn)
            self.paths.add(inside)
            values = [read(atom) for atom in eqn.invars]
            with scope(eqn):
                results = self.apply(eqn, values, [v in wanted for v in eqn.outvars], inside)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def literal(self, atom: Literal) -> Value:
        """A literal, float32 whatever it meets if the low dtype has no such number."""
        if not is_wide(atom.aval):
            return Value(atom.val, None)
        value, limits = np.float32(atom.val), jnp.finfo(self.dtype)
        fits = value == 0 or not np.isfinite(value) or limits.tiny <= abs(value) <= limits.max
        return Value(value, Kind.CONSTANT if fits else Kind.STATISTIC)

    # ---- equations

    def apply(
        self, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
    ) -> list[Value]:
        """The results of one equation; `wanted` are those that lead to a product."""
        name = eqn.primitive.name
        if name in PRODUCTS:
            return self.product(eqn, values, path)
        if sub_jaxprs(eqn):
            return call(self, eqn, values, wanted, path)
        if name == "convert_element_type":
            return [self.converted(eqn, values[0])]
        if not any(is_wide(v.aval) for v in eqn.outvars):
            outputs = bind(eqn, [value.wide() for value in values])
            return [Value(output, None) for output in outputs]
        if name in PARALLEL:
            outputs = bind(eqn, [value.array for value in values])
            return [Value(o, value.kind) for o, value in zip(outputs, values, strict=True)]
        kind = self.kind_of(eqn, values, wanted[0] and self.low_at(path))
        if kind is Kind.LOW and not all(value.is_exact_in(self.dtype) for value in values):
            # 1 / 0.9 in bfloat16 would be off by the same 0.2% in every element.
            (output,) = bind(eqn, [value.wide() for value in values])
            return [Value(lax.convert_element_type(output, self.dtype), kind)]
        if kind is Kind.LOW:
            inputs = [v.array if v.kind is None else v.low(self.dtype) for v in values]
        else:
            inputs = [value.wide() for value in values]
        outputs = bind(eqn, inputs)
        wide = [is_wide(v.aval) for v in eqn.outvars]
        return [Value(o, kind if w else None) for o, w in zip(outputs, wide, strict=True)]

    def kind_of(self, eqn: JaxprEqn, values: list[Value], low: bool) -> Kind:
        """The kind of the result, LOW if it is computed in the low dtype."""
        name = eqn.primitive.name
        kinds = [value.kind for value in values if value.kind is not None]
        if name in POOLING:
            return Kind.LOW if low and kinds[0] in (Kind.LOW, Kind.WIDE) else kinds[0]
        if name in MOVING:
            if len(kinds) == 1:
                moved = kinds[0]
                if name == "gather" and moved is Kind.DATA:
                    return Kind.LOOKUP
                grows = _size(eqn.outvars[0]) > _size(eqn.invars[0])
                return repeated(moved) if grows and name == "broadcast_in_dim" else moved
            return elementwise(name, kinds, low)
        if name in ELEMENTWISE and eqn.params.get("out_dtype") is None:
            size = _size(eqn.outvars[0])
            fitted = [
                repeated(value.kind) if _size(v) < size else value.kind
                for v, value in zip(eqn.invars, values, strict=True)
                if value.kind is not None
            ]
            return elementwise(name, fitted, low)
        return wide_result(name, kinds)

    def product(self, eqn: JaxprEqn, values: list[Value], path: str) -> list[Value]:
        """The result of a product, as its scope's precision says."""
        mode = self.policy.mode(path)
        wide = is_wide(eqn.outvars[0].aval)
        if mode is None or self.frozen or not is_plain_product(eqn):
            outputs = bind(eqn, [value.wide() for value in values])
            return [Value(output, Kind.WIDE if wide else None) for output in outputs]
        params = {**eqn.params, "precision": (mode.products, mode.products)}
        if mode.low is None:
            outputs = bind(eqn, [value.wide() for value in values], params)
            return [Value(output, Kind.WIDE) for output in outputs]
        inputs = [v.array if v.kind is None else v.low(self.dtype) for v in values]
        if params["preferred_element_type"] is not None:
            params["preferred_element_type"] = self.dtype
        return [Value(output, Kind.LOW) for output in bind(eqn, inputs, params)]

    def converted(self, eqn: JaxprEqn, value: Value) -> Value:
        """A cast of the user's."""
        before: Any = eqn.invars[0].aval
        if not is_wide(eqn.outvars[0].aval):
            return Value(bind(eqn, [value.wide()])[0], None)
        if value.kind is Kind.LOW:
            return value
        kind = value.kind
        if kind is None and before.dtype == np.bool_:
            kind = Kind.CONSTANT
        elif kind is None:
            kind = Kind.WIDE if jnp.issubdtype(before.dtype, jnp.floating) else Kind.DATA
        return Value(bind(eqn, [value.array])[0], kind)


def _size(v: Any) -> int:
    return int(np.prod(v.aval.shape))
