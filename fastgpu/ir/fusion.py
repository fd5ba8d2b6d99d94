"""What a fusing compiler keeps in memory, and how long: a model of XLA, to be corrected by XLA.

XLA writes few of a program's values to memory. Elementwise equations disappear into the kernels
that read them; what convolutions, matrix products, loops and barriers read or write is stored. The
rules here are those of XLA's GPU fusion in short: a value is *stored* when an equation that cannot
fuse makes or reads it, when it is an output, or when it is dear and read more than once.

The warning: this is a model. It ranks plans and prices them; a compiled program's own figure
(`fastgpu.compile.memory_report`) is what counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastgpu.hardware import Device
from fastgpu.ir.analysis import aval_bytes, device_bytes
from fastgpu.ir.compat import DropVar, Jaxpr, JaxprEqn, Var, on_host, sub_jaxprs
from fastgpu.ir.cost import equation_flops
from fastgpu.ir.lowered import stands_for

# The same bytes under another name.
_VIEWS = frozenset(
    ("reshape", "squeeze", "expand_dims", "bitcast_convert_type", "copy_p", "stop_gradient")
)
_BARRIER = "optimization_barrier"
# Equations that XLA fuses into whatever reads their result.
_FUSIBLE = frozenset(
    (
        *("abs", "add", "add_any", "and", "atan2", "broadcast_in_dim", "cbrt", "ceil", "clamp"),
        *("concatenate", "convert_element_type", "copy", "cos", "cosh", "div", "dynamic_slice"),
        *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag"),
        *("integer_pow", "iota", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt"),
        *("max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pad", "population_count"),
        *("pow", "real", "reduce_precision", "rem", "rev", "round", "rsqrt", "select_n"),
        *("shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh"),
        *("slice", "sqrt", "square", "sub", "tan", "tanh", "transpose", "xor", "random_bits"),
        *("random_wrap", "random_unwrap", "threefry2x32", "sharding_constraint", "split"),
    )
)
_CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"))
_REDUCTIONS = frozenset(
    (
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        *("argmax", "argmin", "reduce_xor"),
        *("reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_scatter_add"),
    )
)
# Too dear to be computed once for every reader.
_DEAR = frozenset(("random_bits", "threefry2x32", "erf_inv"))
# Written over their first operand when nobody needs it any more.
_IN_PLACE = ("dynamic_update_slice", "scatter")

# Fusible, but not element by element.
_MOVING = frozenset(
    (
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "iota", "pad", "rev"),
        *("reshape", "slice", "split", "squeeze", "transpose", "random_bits", "random_wrap"),
        *("random_unwrap", "threefry2x32", "sharding_constraint", "bitcast_convert_type"),
        *("custom_jvp_call", "jit", "pjit", "closed_call", "core_call", "copy_p"),
    )
)


def is_fusible(eqn: JaxprEqn) -> bool:
    """Whether a compiler computes `eqn` inside of the kernels that read its result.

    >>> import jax, jax.numpy as jnp
    >>> eqns = jax.make_jaxpr(lambda x: jnp.dot(x + 1, x))(jnp.ones((2, 2))).jaxpr.eqns
    >>> [is_fusible(eqn) for eqn in eqns]
    [True, False]
    """
    name = eqn.primitive.name
    if name in _CALLS:
        return all(is_fusible(inner) for sub in sub_jaxprs(eqn) for inner in sub.eqns)
    return (name in _FUSIBLE or name in _VIEWS) and not eqn.effects


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether each element of the result is made of the same one of every input.

    >>> import jax, jax.numpy as jnp
    >>> eqns = jax.make_jaxpr(lambda x: jnp.exp(x).T)(jnp.ones((2, 2))).jaxpr.eqns
    >>> [is_elementwise(eqn) for eqn in eqns]
    [True, False]
    """
    return eqn.primitive.name not in _MOVING and is_fusible(eqn)


def is_view(eqn: JaxprEqn) -> bool:
    """Whether `eqn` only renames bytes."""
    return eqn.primitive.name in _VIEWS


def is_in_place(eqn: JaxprEqn, platform: str) -> bool:
    """Whether the kernel of `eqn` writes over an input that it is the last to read.

    Elementwise kernels do on a CPU. On a GPU they hardly ever do: their inputs come from library
    calls, which give out a tuple with a workspace.
    """
    if eqn.primitive.name.startswith(_IN_PLACE):
        return True
    return platform == "cpu" and is_fusible(eqn)


def is_dear(eqn: JaxprEqn) -> bool:
    """Whether `eqn` is fusible, but too much work to be done once for every reader."""
    return eqn.primitive.name in _DEAR


@dataclass(frozen=True)
class Storage:
    """Which values of one flat program take memory, and until which equation.

    `root` maps a value to the one whose bytes it shares. `stored` holds roots. `last` is the index
    of the last equation that reads a root's bytes, fused readers included; values that the program
    gives out have the number of equations. For each equation, `reads` has the roots that it reads
    (none for a view), `writes` the values whose bytes it writes to memory, `fused` whether it
    disappears into the kernels that read its results.
    """

    jaxpr: Jaxpr
    root: dict[Var, Var]
    stored: frozenset[Var]
    last: dict[Var, int]
    sources: dict[Var, frozenset[Var]]
    reads: list[tuple[Var, ...]]
    writes: list[tuple[Var, ...]]
    fused: list[bool]

    def is_stored(self, var: Var) -> bool:
        """Whether `var` has bytes of its own in memory."""
        return self.root[var] in self.stored

    def behind(self, index: int) -> frozenset[Var]:
        """The stored values that a kernel for equation `index` reads, by itself or fused."""
        return _stored_behind(self.reads[index], self.sources)

    def reordered(self, order: Sequence[int]) -> "Storage":
        """The storage of the program with its equations in another order: the same are stored.

        What is fused depends on who reads a value, not on when.
        """
        jaxpr = self.jaxpr.replace(eqns=[self.jaxpr.eqns[i] for i in order])
        reads, writes = [self.reads[i] for i in order], [self.writes[i] for i in order]
        fused = [self.fused[i] for i in order]
        last = _last_reads(jaxpr, self.root, reads, fused)
        return Storage(jaxpr, self.root, self.stored, last, self.sources, reads, writes, fused)

    @cached_property
    def borders(self) -> frozenset[Var]:
        """Inputs and outputs of the program: buffers of their own, no temporaries."""
        jaxpr = self.jaxpr
        atoms = (*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars)
        return frozenset(self.root[v] for v in atoms if isinstance(v, Var))


def storage(jaxpr: Jaxpr) -> Storage:
    """Decide for every value of `jaxpr` whether it is stored, and for how long.

    >>> import jax, jax.numpy as jnp
    >>> fn = lambda x: jnp.dot(jnp.maximum(x * 2, 0), x)
    >>> jaxpr = jax.make_jaxpr(fn)(jnp.ones((2, 2))).jaxpr
    >>> stored = storage(jaxpr)
    >>> [stored.is_stored(v) for eqn in jaxpr.eqns for v in eqn.outvars]
    [False, True, True]
    """
    eqns = jaxpr.eqns
    root: dict[Var, Var] = {v: v for v in (*jaxpr.constvars, *jaxpr.invars)}
    reads: list[tuple[Var, ...]] = []
    readers: dict[Var, list[int]] = {}
    for index, eqn in enumerate(eqns):
        for place, out in enumerate(eqn.outvars):
            source = _shares_bytes_with(eqn, place)
            root[out] = root[source] if isinstance(source, Var) else out
        read: dict[Var, None] = {}
        if not is_view(eqn):
            read = {root[v]: None for v in eqn.invars if isinstance(v, Var)}
        for v in read:
            readers.setdefault(v, []).append(index)
        reads.append(tuple(read))
    given_out = {root[v] for v in jaxpr.outvars if isinstance(v, Var)}

    fusible = [is_fusible(eqn) for eqn in eqns]
    # What no kernel reads from another's registers.
    apart = [
        not fuses and stands_for(eqn)[0] not in _REDUCTIONS
        for eqn, fuses in zip(eqns, fusible, strict=True)
    ]
    stored = {root[v] for v in (*jaxpr.constvars, *jaxpr.invars)} | given_out
    sources: dict[Var, frozenset[Var]] = {}
    writes: list[tuple[Var, ...]] = []
    fused: list[bool] = []
    for index, eqn in enumerate(eqns):
        if is_view(eqn) or eqn.primitive.name == _BARRIER:
            writes.append(())
            fused.append(False)
            continue
        behind = _stored_behind(reads[index], sources)
        for out in eqn.outvars:
            its = readers.get(out, ())
            if (
                not fusible[index]
                or out in given_out
                or any(apart[i] for i in its)
                or _pays_to_write(eqn, out, len(its), behind)
            ):
                stored.add(out)
            else:
                sources[out] = behind
        written = [v for v in eqn.outvars if v in stored and not isinstance(v, DropVar)]
        writes.append(tuple(written))
        fused.append(fusible[index] and not any(v in stored for v in eqn.outvars))

    last = _last_reads(jaxpr, root, reads, fused)
    return Storage(jaxpr, root, frozenset(stored), last, sources, reads, writes, fused)


def _last_reads(
    jaxpr: Jaxpr, root: dict[Var, Var], reads: list[tuple[Var, ...]], fused: list[bool]
) -> dict[Var, int]:
    """For each root the last equation that reads its bytes, by itself or through fused readers."""
    last = {root[v]: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, Var)}
    for index in range(len(reads) - 1, -1, -1):
        used = index
        if fused[index]:
            used = max((last.get(v, -1) for v in jaxpr.eqns[index].outvars), default=-1)
        for v in reads[index]:
            if last.get(v, -1) < used:
                last[v] = used
    return last


def _stored_behind(reads: Sequence[Var], sources: dict[Var, frozenset[Var]]) -> frozenset[Var]:
    """The stored values that are read: these themselves, or what they are fused from."""
    if not any(v in sources for v in reads):
        return frozenset(reads)
    found: set[Var] = set()
    for v in reads:
        if v in sources:
            found |= sources[v]
        else:
            found.add(v)
    return frozenset(found)


def temporary_bytes(view: Storage, platform: str) -> list[int]:
    """Bytes of temporaries alive while each equation runs on `platform`, in program order.

    Inputs and outputs are not counted: they are buffers of their own.

    >>> import jax, jax.numpy as jnp
    >>> fn = lambda x: jnp.sum(jnp.dot(jnp.sin(x), x))
    >>> temporary_bytes(storage(jax.make_jaxpr(fn)(jnp.ones((16, 16))).jaxpr), "cpu")
    [1024, 2048, 1024]
    """
    jaxpr = view.jaxpr
    ends: dict[int, list[Var]] = {}
    alive = 0
    timeline = []
    for index, eqn in enumerate(jaxpr.eqns):
        if view.fused[index]:
            timeline.append(alive)
            continue
        born = 0
        for out in view.writes[index]:
            if out not in view.borders:
                born += device_bytes(out.aval)
                ends.setdefault(max(view.last.get(out, index), index), []).append(out)
        alive += born
        subs = () if is_fusible(eqn) else sub_jaxprs(eqn)
        inner = max((_inner_bytes(sub, platform) for sub in subs), default=0)
        dying = sum(device_bytes(v.aval) for v in ends.pop(index, ()))
        reused = min(born, dying) if is_in_place(eqn, platform) else 0
        timeline.append(alive + inner - reused)
        alive -= dying
    return timeline


def _inner_bytes(jaxpr: Jaxpr, platform: str) -> int:
    view = storage(jaxpr)
    carried = sum(aval_bytes(v.aval) for v in jaxpr.outvars if isinstance(v, Var))
    return max(temporary_bytes(view, platform), default=0) + min(
        carried, sum(aval_bytes(v.aval) for v in jaxpr.invars)
    )


def kernel_seconds(view: Storage, device: Device) -> list[float]:
    """Roofline seconds of each equation on `device`, when fused equations cost no traffic.

    A stored elementwise value is one write and one read of each stored value behind it; a value
    that is not stored is free, and paid for by those that read it.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.hardware import device
    >>> jaxpr = jax.make_jaxpr(lambda x: (x + 1) * 2)(jnp.ones(1 << 20)).jaxpr
    >>> [f"{s:.1e}" for s in kernel_seconds(storage(jaxpr), device("h100"))]
    ['0.0e+00', '2.5e-06']
    """
    return [equation_seconds(view, index, device) for index in range(len(view.jaxpr.eqns))]


def program_seconds(view: Storage, device: Device) -> float:
    """Roofline seconds of the whole program: `kernel_seconds`, and waiting for the host's link.

    Copies to the host's memory and back run beside the kernels, one in each direction at a time,
    and cost them traffic; a program waits where it reads what has not arrived.
    """
    now, free, arrival = 0.0, {True: 0.0, False: 0.0}, {}
    for eqn, seconds in zip(view.jaxpr.eqns, kernel_seconds(view, device), strict=True):
        now = max([now, *(arrival.get(v, 0.0) for v in eqn.invars if isinstance(v, Var))])
        if is_host_copy(eqn):
            upload = on_host(eqn.outvars[0].aval)
            start = max(now, free[upload])
            free[upload] = start + aval_bytes(eqn.outvars[0].aval) / device.host_link
            arrival[eqn.outvars[0]] = free[upload]
        now += seconds
    return max([now, *free.values()])


def is_host_copy(eqn: JaxprEqn) -> bool:
    """Whether `eqn` moves a value between the device's memory and the host's."""
    return eqn.primitive.name == "device_put" and on_host(eqn.invars[0].aval) != on_host(
        eqn.outvars[0].aval
    )


def equation_seconds(view: Storage, index: int, device: Device) -> float:
    """The entry of `kernel_seconds` for one equation of `view.jaxpr`."""
    eqn = view.jaxpr.eqns[index]
    if view.fused[index] or is_view(eqn) or eqn.primitive.name == _BARRIER:
        return 0.0
    if is_host_copy(eqn):
        return aval_bytes(eqn.outvars[0].aval) / device.bandwidth
    moved = sum(aval_bytes(v.aval) for v in view.behind(index))
    moved += sum(aval_bytes(v.aval) for v in eqn.outvars if not isinstance(v, DropVar))
    name, _ = stands_for(eqn)
    subs = sub_jaxprs(eqn)
    if subs and not is_fusible(eqn):
        turns = eqn.params.get("length", 1)
        inner = [sum(kernel_seconds(storage(sub), device)) for sub in subs]
        return (max(inner) if name == "cond" else sum(inner)) * turns
    matrix = name in ("dot_general", "conv_general_dilated")
    typed = eqn.invars if matrix else eqn.outvars
    dtype = getattr(typed[0].aval, "dtype", "float32") if typed else "float32"
    return device.seconds(equation_flops(eqn), moved, dtype, matrix=matrix)


def _shares_bytes_with(eqn: JaxprEqn, index: int) -> Any:
    if is_view(eqn):
        return eqn.invars[0]
    if eqn.primitive.name == _BARRIER:
        return eqn.invars[index]
    return None


def _pays_to_write(eqn: JaxprEqn, out: Var, readers: int, behind: frozenset[Var]) -> bool:
    """Whether every reader reading all that lies behind is more than one writing `out` for all."""
    if readers < 2:
        return False
    size = aval_bytes(out.aval)
    if is_dear(eqn):
        return size > 4
    gathered = sum(aval_bytes(v.aval) for v in behind)
    return readers * gathered > gathered + (1 + readers) * size
