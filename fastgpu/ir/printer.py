"""A jaxpr as text that says what each equation costs and which line wrote it."""

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, source_line, sub_jaxprs
from fastgpu.ir.cost import equation_cost
from fastgpu.ir.lowered import stands_for


def to_text(closed: ClosedJaxpr) -> str:
    """One line per equation: outputs, primitive, inputs, cost, the user's source line.

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(jnp.ones(3))
    >>> print(to_text(closed))
    in  a: float32[3]
    b: float32[3] = sin a    # 3 flop, 24 B, ...
    c: float32[3] = mul b 2.0    # 3 flop, 28 B, ...
    out c
    """
    names = _Names()
    return "\n".join(_lines(closed.jaxpr, names, ""))


class _Names:
    """Short names in order of appearance: a ... z, ba ..."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def __call__(self, atom: object) -> str:
        if isinstance(atom, Literal):
            return str(atom.val)
        if id(atom) not in self.known:
            self.known[id(atom)] = _letters(len(self.known))
        return self.known[id(atom)]


def _letters(number: int) -> str:
    digits = chr(97 + number % 26)
    return digits if number < 26 else _letters(number // 26) + digits


def _typed(atom: object, names: _Names) -> str:
    aval = atom.aval  # pyright: ignore[reportAttributeAccessIssue]
    return f"{names(atom)}: {getattr(aval, 'str_short', lambda: str(aval))()}"


def _lines(jaxpr: Jaxpr, names: _Names, indent: str) -> list[str]:
    lines = [f"{indent}in  {', '.join(_typed(v, names) for v in jaxpr.invars)}".rstrip()]
    for eqn in jaxpr.eqns:
        lines.append(indent + _equation(eqn, names))
        for sub in sub_jaxprs(eqn):
            lines += _lines(sub, names, indent + "    ")
    lines.append(f"{indent}out {', '.join(names(v) for v in jaxpr.outvars)}".rstrip())
    return lines


def _equation(eqn: JaxprEqn, names: _Names) -> str:
    made = ", ".join(_typed(v, names) for v in eqn.outvars)
    name, _ = stands_for(eqn)
    if eqn.primitive.name != name:
        name = f"{name} by {eqn.params['chooser'].name}"
    read = " ".join(names(v) for v in eqn.invars)
    cost = equation_cost(eqn)
    note = f"{_short(cost.flops)}flop, {_short(cost.bytes_moved)}B, {source_line(eqn)}"
    return f"{made} = {name} {read}    # {note}"


def _short(number: float) -> str:
    for unit in ("", "K", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T"
