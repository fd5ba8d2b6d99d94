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
from fastgpu.ir.compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    ShapedArray,
    bind,
    is_plain_call,
    map_sub_jaxprs,
    scope,
    shard_mapped,
    sub_jaxprs,
)
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
    pass_ = _Pass(policy)
    inputs = [Kind.DATA if _is_wide(aval) else None for aval in closed.in_avals]
    wide = [False] * len(closed.out_avals)
    mixed, _ = pass_.program(closed, inputs, wide, wide, "")
    if policy.strict:
        pass_.require_matches()
    return mixed


class _Value:
    """An array on its way, and what it is made of: `None` if it is not the pass's business."""

    def __init__(self, array: Any, kind: Kind | None) -> None:
        self.array, self.kind = array, kind
        # In the other dtype, once for all that read it: their cotangents add up before they are
        # rounded, or after.
        self.other: Any = None

    def wide(self) -> Any:
        """The value in its own dtype."""
        if self.kind is not Kind.LOW:
            return self.array
        if self.other is None:
            self.other = lax.convert_element_type(self.array, np.float32)
        return self.other

    def low(self, dtype: np.dtype) -> Any:
        """The value in the low dtype."""
        if self.kind is Kind.LOW:
            return self.array
        if isinstance(self.array, np.generic):
            return self.array.astype(dtype)
        if self.kind in (Kind.DATA, Kind.SPREAD, Kind.CONSTANT):
            # Once for each use: gradients of parameters are then added up in float32.
            return lax.convert_element_type(self.array, dtype)
        if self.other is None:
            self.other = lax.convert_element_type(self.array, dtype)
        return self.other

    def is_exact_in(self, dtype: np.dtype) -> bool:
        """Whether this is no literal, or one that the low dtype has."""
        if not isinstance(self.array, np.generic):
            return True
        return self.array == self.array.astype(dtype).astype(np.float32) or np.isnan(self.array)


class _Pass:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
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
        mode = self.policy.mode(path)
        return mode is not None and mode.low is not None and _is_plain_product(eqn)

    def low_at(self, path: str) -> bool:
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
            values = [_Value(arg, kind) for arg, kind in zip(args, kinds, strict=True)]
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

    def given(self, value: _Value, low: bool | None) -> Any:
        if value.kind is None or low is None:
            return value.array
        return value.low(self.dtype) if low else value.wide()

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[_Value],
        outs: Sequence[bool],
        path: str,
    ) -> list[_Value]:
        wanted = self.wanted.of(jaxpr, outs, path)
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, args, strict=True))
        for v, const in zip(jaxpr.constvars, consts, strict=True):
            env[v] = _Value(const, Kind.DATA if _is_wide(v.aval) else None)

        def read(atom: Any) -> _Value:
            return self.literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inside = scope_path(path, eqn)
            self.paths.add(inside)
            values = [read(atom) for atom in eqn.invars]
            with scope(eqn):
                results = self.apply(eqn, values, [v in wanted for v in eqn.outvars], inside)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def literal(self, atom: Literal) -> _Value:
        if not _is_wide(atom.aval):
            return _Value(atom.val, None)
        value, limits = np.float32(atom.val), jnp.finfo(self.dtype)
        fits = value == 0 or not np.isfinite(value) or limits.tiny <= abs(value) <= limits.max
        return _Value(value, Kind.CONSTANT if fits else Kind.STATISTIC)

    # ---- equations

    def apply(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        name = eqn.primitive.name
        if name in PRODUCTS:
            return self.product(eqn, values, path)
        if sub_jaxprs(eqn):
            return self.call(eqn, values, wanted, path)
        if name == "convert_element_type":
            return [self.converted(eqn, values[0])]
        if not any(_is_wide(v.aval) for v in eqn.outvars):
            outputs = bind(eqn, [value.wide() for value in values])
            return [_Value(output, None) for output in outputs]
        if name in PARALLEL:
            outputs = bind(eqn, [value.array for value in values])
            return [_Value(o, value.kind) for o, value in zip(outputs, values, strict=True)]
        kind = self.kind_of(eqn, values, wanted[0] and self.low_at(path))
        if kind is Kind.LOW and not all(value.is_exact_in(self.dtype) for value in values):
            # 1 / 0.9 in bfloat16 would be off by the same 0.2% in every element.
            (output,) = bind(eqn, [value.wide() for value in values])
            return [_Value(lax.convert_element_type(output, self.dtype), kind)]
        if kind is Kind.LOW:
            inputs = [v.array if v.kind is None else v.low(self.dtype) for v in values]
        else:
            inputs = [value.wide() for value in values]
        outputs = bind(eqn, inputs)
        wide = [_is_wide(v.aval) for v in eqn.outvars]
        return [_Value(o, kind if w else None) for o, w in zip(outputs, wide, strict=True)]

    def kind_of(self, eqn: JaxprEqn, values: list[_Value], low: bool) -> Kind:
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

    def product(self, eqn: JaxprEqn, values: list[_Value], path: str) -> list[_Value]:
        mode = self.policy.mode(path)
        wide = _is_wide(eqn.outvars[0].aval)
        if mode is None or not _is_plain_product(eqn):
            outputs = bind(eqn, [value.wide() for value in values])
            return [_Value(output, Kind.WIDE if wide else None) for output in outputs]
        params = {**eqn.params, "precision": (mode.products, mode.products)}
        if mode.low is None:
            outputs = bind(eqn, [value.wide() for value in values], params)
            return [_Value(output, Kind.WIDE) for output in outputs]
        inputs = [v.array if v.kind is None else v.low(self.dtype) for v in values]
        if params["preferred_element_type"] is not None:
            params["preferred_element_type"] = self.dtype
        return [_Value(output, Kind.LOW) for output in bind(eqn, inputs, params)]

    def converted(self, eqn: JaxprEqn, value: _Value) -> _Value:
        """A cast of the user's."""
        before: Any = eqn.invars[0].aval
        if not _is_wide(eqn.outvars[0].aval):
            return _Value(bind(eqn, [value.wide()])[0], None)
        if value.kind is Kind.LOW:
            return value
        kind = value.kind
        if kind is None and before.dtype == np.bool_:
            kind = Kind.CONSTANT
        elif kind is None:
            kind = Kind.WIDE if jnp.issubdtype(before.dtype, jnp.floating) else Kind.DATA
        return _Value(bind(eqn, [value.array])[0], kind)

    # ---- equations that run programs

    def call(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, values, wanted, path)
        if name == "while":
            return self.while_loop(eqn, values, wanted, path)
        if name == "cond":
            return self.cond(eqn, values, wanted, path)
        if name.startswith("custom_"):
            return self.custom(eqn, values, wanted, path)
        if is_plain_call(eqn):
            (closed,) = _closed(eqn)
            called = eqn.params.get("name", name)
            with jax.named_scope(called):
                path = f"{path}/{called}" if path else called
                return self.evaluate(closed.jaxpr, closed.consts, values, wanted, path)
        if name in ("checkpoint", "remat2"):
            kinds = [value.kind for value in values]
            return self.bound(eqn, [value.array for value in values], kinds, wanted, path, None)
        # What says where its inputs and outputs lie also says their types.
        kinds = [Kind.WIDE if value.kind is Kind.LOW else value.kind for value in values]
        if name == "shard_map":
            return self.shard_map(eqn, values, kinds, wanted, path)
        return self.bound(eqn, [value.wide() for value in values], kinds, wanted, path, False)

    def bound(
        self,
        eqn: JaxprEqn,
        arrays: list[Any],
        kinds: list[Kind | None],
        wanted: list[bool],
        path: str,
        low: bool | None,
    ) -> list[_Value]:
        """The equation with its one program rewritten; outputs are given as `low` says."""
        found: list[Kind | None] = []

        def change(closed: ClosedJaxpr) -> ClosedJaxpr:
            made, out_kinds = self.program(closed, kinds, wanted, [low] * len(wanted), path)
            found.extend(out_kinds)
            return made

        outputs = bind(eqn, arrays, map_sub_jaxprs(eqn, change))
        given = [Kind.WIDE if kind is Kind.LOW and low is False else kind for kind in found]
        return [_Value(output, kind) for output, kind in zip(outputs, given, strict=True)]

    def shard_map(
        self,
        eqn: JaxprEqn,
        values: list[_Value],
        kinds: list[Kind | None],
        wanted: list[bool],
        path: str,
    ) -> list[_Value]:
        found: list[Kind | None] = []

        def body(*args: Any) -> list[Any]:
            inputs = [_Value(arg, kind) for arg, kind in zip(args, kinds, strict=True)]
            results = self.evaluate(eqn.params["jaxpr"], (), inputs, wanted, path)
            found[:] = [Kind.WIDE if value.kind is Kind.LOW else value.kind for value in results]
            return [value.wide() for value in results]

        outputs = shard_mapped(eqn, body, [value.wide() for value in values])
        return [_Value(output, kind) for output, kind in zip(outputs, found, strict=True)]

    def custom(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        """A function with a derivative rule of its own: it runs in the types that it was written
        for, and its result is rounded if the equations in it would have given a low one."""
        (closed, *_) = _closed(eqn)
        kinds = [value.kind for value in values]
        inside = _Frozen(self.policy)
        _, found = inside.program(closed, kinds, wanted, [None] * len(wanted), path)
        results = []
        for output, kind in zip(bind(eqn, [v.wide() for v in values]), found, strict=True):
            if kind is Kind.LOW:
                output = lax.convert_element_type(output, self.dtype)
            results.append(_Value(output, kind))
        return results

    def cond(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        index, *operands = values
        kinds = [value.kind for value in operands]
        branches = _closed(eqn)
        found = [
            self.program(branch, kinds, wanted, [None] * len(wanted), path)[1]
            for branch in branches
        ]
        merged = [_either(each) for each in zip(*found, strict=True)]
        low = [kind is Kind.LOW for kind in merged]
        changed = tuple(self.program(b, kinds, wanted, low, path)[0] for b in branches)
        arrays = [index.array, *(value.array for value in operands)]
        outputs = bind(eqn, arrays, {**eqn.params, "branches": changed})
        return [_Value(output, kind) for output, kind in zip(outputs, merged, strict=True)]

    def while_loop(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        """The carry stays in float32: the number of roundings is not known."""
        skipped = eqn.params["cond_nconsts"]
        kinds = [Kind.DATA if value.kind is not None else None for value in values[skipped:]]
        outs = self.wanted.loop_outputs(eqn, wanted, path)
        body, _ = self.program(eqn.params["body_jaxpr"], kinds, outs, [False] * len(outs), path)
        arrays = [value.wide() for value in values]
        outputs = bind(eqn, arrays, {**eqn.params, "body_jaxpr": body})
        carry = values[-len(outputs) :] if outputs else []
        return [_after_loop(o, v.kind) for o, v in zip(outputs, carry, strict=True)]

    def scan(
        self, eqn: JaxprEqn, values: list[_Value], wanted: list[bool], path: str
    ) -> list[_Value]:
        """A carry is in the low dtype if it comes as activations and a product of the body reads
        it, as that of a stack of layers; others add up, and stay in float32."""
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        body: ClosedJaxpr = eqn.params["jaxpr"]
        outs = self.wanted.loop_outputs(eqn, wanted, path)
        at_once = [*[False] * count, *outs[count:]]
        read = self.wanted.inputs(body.jaxpr, at_once, path)[first : first + count]
        kinds = [value.kind for value in values]
        low = [
            r and kind in (Kind.LOW, Kind.WIDE, Kind.LOOKUP)
            for r, kind in zip(read, kinds[first : first + count], strict=True)
        ]
        while True:
            given: list[bool | None] = [*low, *[None] * (len(outs) - count)]
            inside = [
                *kinds[:first],
                *(_carried(kind, k) for kind, k in zip(kinds[first:], low, strict=False)),
                *kinds[first + count :],
            ]
            made, found = self.program(body, inside, outs, given, path)
            fit = [k and kind in (Kind.LOW, Kind.WIDE) for k, kind in zip(low, found, strict=False)]
            if fit == low:
                break
            low = fit
        arrays = [value.array for value in values]
        for place, k in enumerate(low, start=first):
            arrays[place] = self.given(values[place], k)
        outputs = bind(eqn, arrays, {**eqn.params, "jaxpr": made})
        results = [_Value(o, kind) for o, kind in zip(outputs, found, strict=True)]
        for place, k in enumerate(low):
            before = kinds[first + place]
            results[place] = (
                _Value(outputs[place], Kind.LOW) if k else _after_loop(outputs[place], before)
            )
        return results


class _Frozen(_Pass):
    """Finds the kinds of what a program gives that is not changed inside."""

    def is_product(self, eqn: JaxprEqn, path: str) -> bool:
        return False

    def product(self, eqn: JaxprEqn, values: list[_Value], path: str) -> list[_Value]:
        outputs = bind(eqn, [value.wide() for value in values])
        wide = _is_wide(eqn.outvars[0].aval)
        return [_Value(output, Kind.WIDE if wide else None) for output in outputs]


def _is_wide(aval: Any) -> bool:
    return isinstance(aval, ShapedArray) and aval.dtype == np.float32


def _is_plain_product(eqn: JaxprEqn) -> bool:
    """A product of float32 arrays whose author asked for no `precision`."""
    if eqn.primitive.name not in PRODUCTS or eqn.params["precision"] not in _NO_WISH:
        return False
    if eqn.params["preferred_element_type"] not in (None, np.float32):
        return False
    return all(_is_wide(v.aval) for v in (*eqn.invars[:2], *eqn.outvars))


_NO_WISH = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT, lax.Precision.DEFAULT))


def _closed(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The programs that `eqn` runs, with their constants."""
    found: list[ClosedJaxpr] = []

    def collect(closed: ClosedJaxpr) -> ClosedJaxpr:
        found.append(closed)
        return closed

    map_sub_jaxprs(eqn, collect)
    return found


def _size(v: Any) -> int:
    return int(np.prod(v.aval.shape))


def _carried(kind: Kind | None, low: bool) -> Kind | None:
    if kind is None:
        return None
    return Kind.LOW if low else Kind.DATA


def _after_loop(array: Any, before: Kind | None) -> _Value:
    if before is None:
        return _Value(array, None)
    return _Value(array, Kind.DATA if before is Kind.DATA else Kind.WIDE)


def _either(kinds: Sequence[Kind | None]) -> Kind | None:
    """The kind of a value that comes from one of several branches."""
    if len(set(kinds)) == 1:
        return kinds[0]
    if Kind.LOW in kinds and set(kinds) <= {Kind.LOW, Kind.WIDE, Kind.CONSTANT}:
        return Kind.LOW
    return Kind.DATA if Kind.DATA in kinds else Kind.WIDE
