"""What an importer returns: a module, its variables, and a report of what became of every part."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flax import linen as nn

Status = Literal["mapped", "ignored"]


class Entry(NamedTuple):
    """One line of a report: a layer, a variable or an option, and what became of it.

    >>> Entry("variable", "conv1/kernel", "mapped", "float32[3,3,3,8] in params").name
    'conv1/kernel'
    """

    kind: Literal["layer", "variable", "option", "file"]
    name: str
    status: Status
    detail: str


@dataclass
class ImportReport:
    """Every layer and variable of the source: mapped or ignored, and why.

    A part that cannot be imported raises instead, before any weight is read; the error lists all of
    them. `parameter_count` counts the elements of every mapped variable, as Keras does.

    >>> report = ImportReport("demo.keras")
    >>> report.add("layer", "dense", "mapped", "Dense")
    >>> print(report)
    demo.keras: 1 layers, 0 parameters
      mapped   layer     dense  Dense
    """

    source: str
    entries: list[Entry] = field(default_factory=list)
    parameter_count: int = 0

    def add(
        self,
        kind: Literal["layer", "variable", "option", "file"],
        name: str,
        status: Status,
        detail: str,
    ) -> None:
        """Append one entry."""
        self.entries.append(Entry(kind, name, status, detail))

    def ignored(self) -> Iterator[Entry]:
        """The entries that the module does not reproduce, each with its reason."""
        return (entry for entry in self.entries if entry.status == "ignored")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for `json.dumps`."""
        return {
            "source": self.source,
            "parameter_count": self.parameter_count,
            "entries": [entry._asdict() for entry in self.entries],
        }

    def __str__(self) -> str:
        layers = sum(entry.kind == "layer" for entry in self.entries)
        width = max((len(entry.name) for entry in self.entries), default=0)
        lines = [f"{self.source}: {layers} layers, {self.parameter_count:,} parameters"]
        lines += [
            f"  {entry.status:8} {entry.kind:9} {entry.name:{width}}  {entry.detail}"
            for entry in self.entries
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Imported:
    """An imported model: call `module.apply(variables, *inputs)`.

    `module` is a linen module (`init`, `apply`); `variables` a dict of collections, each a nested
    dict of JAX arrays; `report` says what became of every part of the source.
    """

    module: nn.Module
    variables: dict[str, Any]
    report: ImportReport
