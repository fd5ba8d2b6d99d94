"""Put a decision into effect: the backward half with recomputation where it is needed.

When the backward half first needs something of a segment that was not kept, one
`optimization_barrier` takes everything that the recomputation reads and every cotangent on its way
down. Without the cotangents XLA would recompute early and gain nothing; without the barrier it
would find the first computation and keep that (jax issue 19822).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
from jax import lax

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, JaxprEqn, Literal, Var
from fastgpu.transforms.remat.joint import Joint, joined
from fastgpu.transforms.remat.solve import Decision


def rematerialized(decision: Decision) -> ClosedJaxpr:
    """Forward and backward as one program that keeps what `decision` keeps.

    Inputs and outputs are those of `flat_program(decision.problem.joint)`.
    """
    return _Emitter(decision).run()


class _Emitter:
    def __init__(self, decision: Decision) -> None:
        self.problem = problem = decision.problem
        self.decision = decision
        self.joint: Joint = problem.joint
        self.eqns: list[JaxprEqn] = []
        # Forward variables behind a fence; backward variables behind a barrier; recomputed ones.
        self.fenced: dict[Var, Var] = {}
        self.names: dict[Var, Any] = dict(
            zip(self.joint.backward_residuals, self.joint.residuals, strict=True)
        )
        self.again: dict[Var, Var] = {}
        self.opened: set[int] = set()
        self.last = self._last_uses()
        backward = self.joint.backward
        self.cotangents = set(backward.invars[: self.joint.cotangents])
        self.made_by = {v: i for i, eqn in enumerate(backward.eqns) for v in eqn.outvars}

    def run(self) -> ClosedJaxpr:
        self._forward()
        outvars = [self._read(v) for v in self.joint.forward.outvars[: self.joint.results]]
        self._backward()
        outvars += [self._read(v) for v in self.joint.backward.outvars]
        return joined(self.joint, self.eqns, outvars)

    def _forward(self) -> None:
        """The forward half, with a fence behind each segment that keeps fused values.

        A kept value that no kernel would write by itself is computed before the next segment
        starts; otherwise XLA keeps what it is computed from instead.
        """
        problem, eqns = self.problem, self.joint.forward.eqns
        all_packed = self._packed()
        last = {
            v: index for index, eqn in enumerate(eqns) for v in eqn.invars if isinstance(v, Var)
        }
        for index, eqn in enumerate(eqns):
            self.eqns.append(eqn.replace(invars=[self._read(v) for v in eqn.invars]))
            k = problem.segment_of[index]
            if index + 1 < len(eqns) and problem.segment_of[index + 1] == k:
                continue
            packed = [v for v in all_packed if problem.segment_of[problem.producer[v]] == k]
            if not packed:
                continue
            crossing = [
                v
                for v, end in last.items()
                if end > index
                and problem.producer.get(v, len(eqns)) <= index
                and problem.segment_of[problem.producer[v]] == k
                and v in problem.stored
                and v not in packed
                and aval_bytes(v.aval) > problem.small
            ]
            fenced = [*packed, *crossing]
            fresh = self._barrier([self._read(v) for v in fenced])
            self.fenced.update(zip(fenced, fresh, strict=True))

    def _packed(self) -> list[Var]:
        """Kept values that XLA would rather fuse into their readers."""
        problem = self.problem
        return [
            v
            for v in self.decision.saved
            if v not in problem.stored and aval_bytes(v.aval) > problem.small
        ]

    def _last_uses(self) -> dict[Var, int]:
        backward = self.joint.backward
        return {
            v: index
            for index, eqn in enumerate(backward.eqns)
            for v in eqn.invars
            if isinstance(v, Var)
        }

    def _backward(self) -> None:
        backward = self.joint.backward
        alive: dict[Var, int] = {}
        for v in backward.invars[: self.joint.cotangents]:
            if v in self.last:
                alive[v] = self.last[v]
        for index, eqn in enumerate(backward.eqns):
            for k in sorted(self._segments_needed(eqn), reverse=True):
                self._open(k, [v for v, end in alive.items() if end >= index])
            self.eqns.append(eqn.replace(invars=[self._read(v) for v in eqn.invars]))
            for v in eqn.outvars:
                if self.last.get(v, -1) > index:
                    alive[v] = self.last[v]
            for v in [v for v, end in alive.items() if end <= index]:
                del alive[v]

    def _read(self, atom: Any) -> Any:
        """What `atom`, of either half, is called by now."""
        if isinstance(atom, Literal):
            return atom
        name = self.names.get(atom, atom)
        if isinstance(name, Literal):
            return name
        return self.again.get(name, self.fenced.get(name, name))

    def _segments_needed(self, eqn: JaxprEqn) -> set[int]:
        """Segments, not opened yet, of what `eqn` reads and was not kept."""
        needed = set()
        for atom in eqn.invars:
            v = self.names.get(atom) if isinstance(atom, Var) else None
            if isinstance(v, Var) and v in self.problem.residuals:
                index = self.problem.producer[v]
                k = self.problem.segment_of[index]
                if k not in self.opened and v not in self.decision.saved:
                    needed.add(k)
        return needed

    def _open(self, k: int, cotangents: Iterable[Var]) -> None:
        """Compute segment `k` again, as far as the decision says."""
        self.opened.add(k)
        problem = self.problem
        forward = self.joint.forward
        indexes = self._wanted(k)
        # What costs nothing to compute again is left to the compiler, which finds it kept.
        if not any(problem.seconds[index] > 0 for index in indexes):
            return
        made: set[Var] = set()
        inputs: dict[Var, None] = {}
        for index in indexes:
            for v in forward.eqns[index].invars:
                if isinstance(v, Var) and v not in made:
                    inputs[v] = None
            made.update(forward.eqns[index].outvars)
        # Scalars gain nothing from a barrier; what is free is fused.
        through = [v for v in inputs if aval_bytes(v.aval) > 64 and v not in self.problem.free]
        moving, fused = self._stored_cotangents([v for v in cotangents if aval_bytes(v.aval) > 64])
        current = [self._read(v) for v in moving]
        fresh = self._barrier([*(self._read(v) for v in through), *current])
        local: dict[Var, Any] = dict(zip(through, fresh[: len(through)], strict=True))
        for v, new in zip(moving, fresh[len(through) :], strict=True):
            self.names[v] = new
        for index in fused:
            eqn = self.joint.backward.eqns[index]
            outvars = [Var(v.aval) for v in eqn.outvars]
            self.eqns.append(
                eqn.replace(invars=[self._read(v) for v in eqn.invars], outvars=outvars)
            )
            self.names.update(zip(eqn.outvars, outvars, strict=True))
        for index in indexes:
            eqn = forward.eqns[index]
            outvars = [Var(v.aval) for v in eqn.outvars]
            invars = [
                v if isinstance(v, Literal) else local.get(v, self._read(v)) for v in eqn.invars
            ]
            self.eqns.append(eqn.replace(invars=invars, outvars=outvars))
            local.update(zip(eqn.outvars, outvars, strict=True))
            for v, new in zip(eqn.outvars, outvars, strict=True):
                if v not in self.decision.saved:
                    self.again[v] = new

    def _stored_cotangents(self, cotangents: Iterable[Var]) -> tuple[list[Var], list[int]]:
        """The stored values behind `cotangents`, and the fused equations between, in order.

        A barrier would write a fused cotangent to memory; it takes what that is computed from,
        and the fused equations come again behind it.
        """
        leaves: dict[Var, None] = {}
        fused: set[int] = set()
        pending = list(cotangents)
        while pending:
            v = pending.pop()
            index = self.made_by.get(v)
            if index is None or v in leaves:
                if index is None and v in self.cotangents:
                    leaves[v] = None
                continue
            if self.problem.view.is_stored(v):
                leaves[v] = None
            elif index not in fused:
                fused.add(index)
                pending += [u for u in self.joint.backward.eqns[index].invars if isinstance(u, Var)]
        return list(leaves), sorted(fused)

    def _wanted(self, k: int) -> list[int]:
        """Equations of segment `k` that its unkept residuals need, in order."""
        problem, saved = self.problem, self.decision.saved
        pending = [
            v
            for v in problem.residuals
            if v not in saved and problem.segment_of[problem.producer[v]] == k
        ]
        indexes: set[int] = set()
        while pending:
            index = problem.producer[pending.pop()]
            if index in indexes:
                continue
            indexes.add(index)
            for u in self.joint.forward.eqns[index].invars:
                if (
                    isinstance(u, Var)
                    and u in problem.producer
                    and u not in saved
                    and problem.segment_of[problem.producer[u]] == k
                ):
                    pending.append(u)
        return sorted(indexes)

    def _barrier(self, values: list[Any]) -> list[Var]:
        fresh = [Var(v.aval) for v in values]
        if values:
            self.eqns.append(_barrier_equation().replace(invars=values, outvars=fresh))
        return fresh


@functools.cache
def _barrier_equation() -> JaxprEqn:
    struct = jax.ShapeDtypeStruct((), "float32")
    return jax.make_jaxpr(lambda x: lax.optimization_barrier((x,)))(struct).jaxpr.eqns[0]
