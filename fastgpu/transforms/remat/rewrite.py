"""Put a decision into effect: the backward half with recomputation where it is needed.

When the backward half first needs something of a segment that was not kept, one
`optimization_barrier` takes everything that the recomputation reads and every cotangent on its way
down. Without the cotangents XLA would recompute early and gain nothing; without the barrier it
would find the first computation and keep that (jax issue 19822).

What waits on a shelf is put there behind its segment; the forward half goes on when it is packed,
or has a barrier behind the segment in which it arrives in the host's memory. It comes back with the
barrier of the segment that reads it; from the host it sets out some barriers earlier, so that the
copy can hide behind what is done between.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from fastgpu.ir.fusion import is_fusible
from fastgpu.transforms.inline import instantiated
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
        # What lies on shelves, what of it is on its way to a segment, what no barrier holds yet.
        self.waiting: dict[Var, list[Var]] = {}
        self.arriving: dict[int, dict[Var, Var]] = {}
        self.unfenced: list[Var] = []
        self.last = self._last_uses()
        backward = self.joint.backward
        self.cotangents = set(backward.invars[: self.joint.cotangents])
        self.made_by = {v: i for i, eqn in enumerate(backward.eqns) for v in eqn.outvars}
        self.finished: list[Var] = []
        self.opens_at = self._openings()
        order = [k for ks in self.opens_at.values() for k in ks]
        self.departures = self._departures(order)
        self.free_at = 0.0
        self.arrives: dict[Var, float] = {}

    def run(self) -> ClosedJaxpr:
        self._forward()
        outvars = [self._read(v) for v in self.joint.forward.outvars[: self.joint.results]]
        self._backward()
        outvars += [self._read(v) for v in self.joint.backward.outvars]
        return joined(self.joint, self.eqns, outvars)

    def _forward(self) -> None:
        """The forward half, with a fence behind each segment that keeps or puts something away.

        A kept value that a kernel could compute for its reader is written before the next segment
        starts; otherwise XLA may keep what it is computed from instead.
        """
        problem, eqns = self.problem, self.joint.forward.eqns
        sunk, now = self._sunk(), 0.0
        crossing_from = self._crossing(sunk)
        kept_from: dict[int, list[Var]] = {}
        for v in sunk:
            kept_from.setdefault(problem.segment_of[problem.producer[v]], []).append(v)
        for index, eqn in enumerate(eqns):
            self.eqns.append(eqn.replace(invars=[self._read(v) for v in eqn.invars]))
            k = problem.segment_of[index]
            if index + 1 < len(eqns) and problem.segment_of[index + 1] == k:
                continue
            now += problem.forward_seconds[k]
            leaving = [v for v in self.unfenced if self.arrives[v] <= now]
            self.unfenced = [v for v in self.unfenced if v not in leaving]
            shelved = self._put_away(k, now)
            kept, crossing = kept_from.get(k, []), crossing_from.get(k, [])
            if not crossing and not kept:
                self.unfenced = [*leaving, *shelved, *self.unfenced]
            elif kept or leaving or shelved:
                self._fence([*kept, *crossing], [*leaving, *shelved])

    def _crossing(self, sunk: list[Var]) -> dict[int, list[Var]]:
        """For each segment, its large stored values that later ones read, but for `sunk`."""
        problem, segment_of = self.problem, self.problem.segment_of
        crossing: dict[int, dict[Var, None]] = {}
        for index, eqn in enumerate(self.joint.forward.eqns):
            for v in eqn.invars:
                if isinstance(v, Var) and v in problem.stored and v not in sunk:
                    k = segment_of[problem.producer[v]]
                    if k != segment_of[index] and aval_bytes(v.aval) > problem.small:
                        crossing.setdefault(k, {})[v] = None
        return {k: list(values) for k, values in crossing.items()}

    def _put_away(self, k: int, now: float) -> list[Var]:
        """Put values of segment `k` on their shelves; those that are packed there."""
        packed = []
        for v, shelf in self.decision.shelved.items():
            if self.problem.segment_of[self.problem.producer[v]] == k:
                put, _ = shelf.programs(v.aval)
                self.waiting[v] = self._inline(put, [self._read(v)])
                (self.unfenced if shelf.host else packed).append(v)
                if shelf.host:
                    seconds = aval_bytes(v.aval) / self.problem.device.host_link
                    self.free_at = self.arrives[v] = max(now, self.free_at) + seconds
        return packed

    def _fence(self, values: list[Var], shelved: list[Var]) -> None:
        """One barrier over forward `values` and what `shelved` are on their shelves."""
        waiting = [name for v in shelved for name in self.waiting[v]]
        fresh = iter(self._barrier([*map(self._read, values), *waiting]))
        self.fenced.update((v, next(fresh)) for v in values)
        for v in shelved:
            self.waiting[v] = [next(fresh) for _ in self.waiting[v]]

    def _sunk(self) -> list[Var]:
        """Kept values that XLA may leave to their readers, keeping what they are made from."""
        problem, eqns = self.problem, self.joint.forward.eqns
        return [
            v
            for v in self.decision.saved
            if aval_bytes(v.aval) > problem.small and is_fusible(eqns[problem.producer[v]])
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
        outputs = {v for v in backward.outvars if isinstance(v, Var)}
        alive: dict[Var, None] = {}
        ends: dict[int, list[Var]] = {}
        for v in backward.invars[: self.joint.cotangents]:
            if v in self.last:
                alive[v] = None
                ends.setdefault(self.last[v], []).append(v)
        for index, eqn in enumerate(backward.eqns):
            for k in self.opens_at.get(index, ()):
                self._open(k, alive)
            self.eqns.append(eqn.replace(invars=[self._read(v) for v in eqn.invars]))
            for v in eqn.outvars:
                if self.last.get(v, -1) > index:
                    alive[v] = None
                    ends.setdefault(self.last[v], []).append(v)
                elif v in outputs:
                    self.finished.append(v)
            for v in ends.pop(index, ()):
                del alive[v]

    def _openings(self) -> dict[int, list[int]]:
        """The segments to be computed again or fetched before each backward equation."""
        problem, saved = self.problem, self.decision.saved
        opened: set[int] = set()
        opens_at = {}
        for index, eqn in enumerate(self.joint.backward.eqns):
            residuals = [self.names.get(v) for v in eqn.invars if isinstance(v, Var)]
            needed = {
                problem.segment_of[problem.producer[v]]
                for v in residuals
                if isinstance(v, Var) and v in problem.residuals and v not in saved
            } - opened
            opened |= needed
            if needed:
                opens_at[index] = sorted(needed, reverse=True)
        return opens_at

    def _restored(self, k: int) -> list[Var]:
        """Values that come back from their shelves for segment `k`, in order."""
        found = [v for v, place in self.decision.restored if place == k]
        return sorted(found, key=lambda v: self.problem.producer[v])

    def _read(self, atom: Any) -> Any:
        """What `atom`, of either half, is called by now."""
        if isinstance(atom, Literal):
            return atom
        name = self.names.get(atom, atom)
        if isinstance(name, Literal):
            return name
        return self.again.get(name, self.fenced.get(name, name))

    def _open(self, k: int, cotangents: Iterable[Var]) -> None:
        """Compute segment `k` again, as far as the decision says, and fetch for the next one."""
        problem, forward = self.problem, self.joint.forward
        indexes = self._wanted(k)
        restored = self._restored(k)
        arrived = self.arriving.pop(k, {})
        ahead = self.departures.get(k, [])
        made: set[Var] = set(restored)
        inputs: dict[Var, None] = {}
        for index in indexes:
            for v in forward.eqns[index].invars:
                if isinstance(v, Var) and v not in made:
                    inputs[v] = None
            made.update(forward.eqns[index].outvars)
        # Scalars gain nothing from a barrier; what is free is fused.
        through = [v for v in inputs if aval_bytes(v.aval) > 64 and v not in problem.free]
        moving, fused = self._stored_cotangents([v for v in cotangents if aval_bytes(v.aval) > 64])
        shelves = [v for v in restored if v not in arrived] + [v for v, _ in ahead]
        shelves = list(dict.fromkeys((*shelves, *self.unfenced)))
        # Unless held here, gradients are finished when all copies are under way.
        finished = [v for v in self.finished if v not in moving] if self.decision.shelved else []
        self.unfenced, self.finished = [], []
        fresh = iter(
            self._barrier(
                [
                    *map(self._read, through),
                    *map(self._read, moving),
                    *map(self._read, finished),
                    *arrived.values(),
                    *(name for v in shelves for name in self.waiting[v]),
                ]
            )
        )
        local: dict[Var, Any] = {v: next(fresh) for v in through}
        self.names.update((v, next(fresh)) for v in (*moving, *finished))
        local.update((v, next(fresh)) for v in arrived)
        for v in shelves:
            self.waiting[v] = [next(fresh) for _ in self.waiting[v]]
        local.update((v, self._restore(v)) for v in restored if v not in arrived)
        for v, place in ahead:
            self.arriving.setdefault(place, {})[v] = self._restore(v)
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
        own = {v for v in restored if problem.segment_of[problem.producer[v]] == k}
        computed = {v for index in indexes for v in forward.eqns[index].outvars}
        self.again.update((v, local[v]) for v in own | computed if v not in self.decision.saved)

    def _departures(self, order: list[int]) -> dict[int, list[tuple[Var, int]]]:
        """For each barrier, the values that set out there from the host, each for a later one."""
        departures: dict[int, list[tuple[Var, int]]] = {}
        for index, k in enumerate(order):
            earliest = k + self.problem.ahead[k]
            start = next((other for other in order[:index] if other <= earliest), None)
            if start is not None:
                moving = [v for v in self._restored(k) if self.decision.shelved[v].host]
                departures.setdefault(start, []).extend((v, k) for v in moving)
        return departures

    def _restore(self, v: Var) -> Var:
        _, restore = self.decision.shelved[v].programs(v.aval)
        return self._inline(restore, self.waiting[v])[0]

    def _inline(self, program: Jaxpr, values: Sequence[Any]) -> list[Any]:
        """Append `program`'s equations for these inputs; the names of its outputs."""
        eqns, outputs = instantiated(program, values)
        self.eqns += eqns
        return outputs

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
        """Equations of segment `k` that run again, in order."""
        segment_of = self.problem.segment_of
        return sorted(index for index in self.decision.again if segment_of[index] == k)

    def _barrier(self, values: list[Any]) -> list[Var]:
        fresh = [Var(v.aval) for v in values]
        if values:
            self.eqns.append(_barrier_equation().replace(invars=values, outvars=fresh))
        return fresh


@functools.cache
def _barrier_equation() -> JaxprEqn:
    struct = jax.ShapeDtypeStruct((), "float32")
    return jax.make_jaxpr(lambda x: lax.optimization_barrier((x,)))(struct).jaxpr.eqns[0]
