"""What an equation costs: floating-point operations and bytes moved, and roofline seconds.

Counts follow the definitions, not a compiler: a matrix product of [m, k] by [k, n] is 2 m k n
operations, an elementwise equation one per output element, and every equation reads its inputs and
writes its outputs once. A nested program is counted as often as it runs; `while` loops, whose
number of turns is not known, count once, and of `cond` the dearest branch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgpu.hardware import Device
from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, sub_jaxprs
from fastgpu.ir.lowered import stands_for


@dataclass(frozen=True)
class Cost:
    """`flops` floating-point operations and `bytes_moved` bytes to and from memory."""

    flops: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes_moved + other.bytes_moved)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes_moved * times)


def equation_cost(eqn: JaxprEqn) -> Cost:
    """The cost of one equation, nested programs included.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(jnp.dot)(jnp.ones((8, 32)), jnp.ones((32, 16))).jaxpr
    >>> equation_cost(jaxpr.eqns[0])
    Cost(flops=8192.0, bytes_moved=3584.0)
    """
    name, params = stands_for(eqn)
    subs = sub_jaxprs(eqn)
    if name == "cond":
        return max((program_cost(sub) for sub in subs), key=lambda cost: cost.bytes_moved)
    if subs:
        total = Cost()
        for sub in subs:
            total += program_cost(sub)
        return total * (params["length"] if name == "scan" else 1)
    moved = sum(aval_bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
    return Cost(_own_flops(eqn, name, params), float(moved))


def equation_flops(eqn: JaxprEqn) -> float:
    """The floating-point operations of one equation, nested programs included.

    >>> import jax, jax.numpy as jnp
    >>> equation_flops(jax.make_jaxpr(jnp.sin)(jnp.ones(10)).jaxpr.eqns[0])
    10.0
    """
    if sub_jaxprs(eqn):
        return equation_cost(eqn).flops
    return _own_flops(eqn, *stands_for(eqn))


def _own_flops(eqn: JaxprEqn, name: str, params: dict[str, Any]) -> float:
    count = _FLOPS.get(name, _one_per_output if name not in _NO_ARITHMETIC else _none)
    return float(count(eqn, params))


def program_cost(jaxpr: ClosedJaxpr | Jaxpr) -> Cost:
    """The sum over a program's equations.

    >>> import jax, jax.numpy as jnp
    >>> program_cost(jax.make_jaxpr(lambda x: jnp.sin(x) + x)(jnp.ones(10))).flops
    20.0
    """
    total = Cost()
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        total += equation_cost(eqn)
    return total


def roofline_seconds(eqn: JaxprEqn, device: Device) -> float:
    """The least time that `eqn` takes on `device`, by arithmetic or by memory, in seconds.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.hardware import device
    >>> eqn = jax.make_jaxpr(lambda x: x + 1)(jnp.ones(1 << 20)).jaxpr.eqns[0]
    >>> f"{roofline_seconds(eqn, device('h100')):.2e}"
    '2.50e-06'
    """
    cost = equation_cost(eqn)
    dtypes = [dtype for v in eqn.outvars if (dtype := getattr(v.aval, "dtype", None)) is not None]
    return device.seconds(cost.flops, cost.bytes_moved, dtypes[0] if dtypes else "float32")


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _size(atom: Any) -> int:
    return math.prod(_shape(atom))


def _none(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    return 0


def _one_per_output(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    return sum(_size(v) for v in eqn.outvars)


def _one_per_input(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    return sum(_size(v) for v in eqn.invars)


def _dot(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    (contract, _), _ = params["dimension_numbers"]
    shape = _shape(eqn.invars[0])
    return 2 * _size(eqn.outvars[0]) * math.prod(shape[axis] for axis in contract)


def _convolution(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    # Each output element sums over the window and its group's input features. Batch groups split
    # the examples instead, which `rhs` does not show.
    rhs = _shape(eqn.invars[1])
    spec = params["dimension_numbers"].rhs_spec
    per_output = math.prod(rhs) // rhs[spec[0]]
    dilation = math.prod(params["lhs_dilation"])
    return 2 * _size(eqn.outvars[0]) * per_output / dilation


def _window(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    return _size(eqn.outvars[0]) * math.prod(params["window_dimensions"])


def _scatter_window(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    return _size(eqn.invars[0]) * math.prod(params["window_dimensions"])


def _attention(eqn: JaxprEqn, params: dict[str, Any]) -> float:
    # Products over queries and keys: two, in the derivative four, in the gradient five.
    queries, keys = _size(eqn.invars[0]), _shape(eqn.invars[1])[1]
    products = {"forward": 2, "tangent": 4, "backward": 5}[params["part"]]
    return 2 * queries * keys * products / (2 if params["form"].causal else 1)


_FLOPS: dict[str, Callable[[JaxprEqn, dict[str, Any]], float]] = {
    "attention": _attention,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "select_and_gather_add": _window,
    "select_and_scatter_add": _scatter_window,
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"),
        _one_per_input,
    ),
}
_NO_ARITHMETIC = frozenset(
    (
        *("broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "rev"),
        *("dynamic_update_slice", "gather", "concatenate", "pad", "iota", "copy", "split"),
        *("convert_element_type", "bitcast_convert_type", "stop_gradient", "select_n"),
        *("optimization_barrier", "device_put", "random_wrap", "random_unwrap", "random_seed"),
        *("sharding_constraint", "copy_p", "device_put"),
    )
)
