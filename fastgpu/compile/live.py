"""What is alive at the peak of a program, by the model of the compiler's memory."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastgpu.ir.analysis import device_bytes
from fastgpu.ir.compat import source_line
from fastgpu.transforms.remat import Modelled


@dataclass(frozen=True)
class LiveValue:
    """One kind of value alive at the peak: `count` of this primitive, shape and source line."""

    primitive: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    bytes: int
    count: int = 1

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"{self.count:>4} x {self.dtype}[{shape}]  {self.primitive}  {self.source}"


def live_at_peak(model: Modelled) -> list[LiveValue]:
    """The temporaries alive when there are most bytes of them, largest first."""
    view, timeline = model.view, model.timeline
    if not timeline:
        return []
    peak = timeline.index(max(timeline))
    counts: Counter[tuple[Any, ...]] = Counter()
    sizes: dict[tuple[Any, ...], int] = {}
    for index, eqn in enumerate(view.jaxpr.eqns[: peak + 1]):
        for v in view.writes[index]:
            if view.last.get(v, index) >= peak:
                aval: Any = v.aval
                key = eqn.primitive.name, aval.shape, str(aval.dtype), source_line(eqn)
                counts[key] += 1
                sizes[key] = device_bytes(aval)
    values = [
        LiveValue(name, shape, dtype, source, sizes[key] * count, count)
        for key, count in counts.items()
        for name, shape, dtype, source in (key,)
    ]
    return sorted(values, key=lambda value: -value.bytes)
