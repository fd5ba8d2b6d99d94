"""What a benchmark found: one row per side, ratios of times, loss curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """The figures of one side.

    seconds: of every timed step, round by round.
    items: examples that a step works on (1 for a plain function).
    compile_seconds: from nothing to the first result, less one step.
    peak_bytes: the compiler's figure for one step; None where the framework does not tell.
    resident_bytes: the highest resident memory of the process during timed steps; None off Linux.

    >>> row = Row("fastgpu", [[0.02, 0.01], [0.03, 0.01]], 32, 1.5, 2**20, None)
    >>> row.median_seconds, round(row.throughput)
    (0.015, 2133)
    """

    side: str
    seconds: Sequence[Sequence[float]]
    items: int
    compile_seconds: float
    peak_bytes: int | None
    resident_bytes: int | None

    @property
    def median_seconds(self) -> float:
        """The median over all steps of all rounds."""
        return median(self._all())

    @property
    def spread_seconds(self) -> tuple[float, float]:
        """The fastest and the slowest step."""
        return min(self._all()), max(self._all())

    @property
    def throughput(self) -> float:
        """Items per second at the median."""
        return self.items / self.median_seconds

    def _all(self) -> list[float]:
        return [second for one_round in self.seconds for second in one_round]


@dataclass(frozen=True)
class BenchmarkReport:
    """Rows, the ratios between them, and the loss curves; `print` it, or write `to_json()`.

    `ratios[side]` is how many times longer a step of that side takes than fastgpu's: the median of
    the ratios of single rounds, so that a disturbance of the machine that lasts longer than a round
    cancels. `losses[side]` are the losses of the same steps from the same weights.

    >>> rows = [Row(s, [[t]], 1, 0.1, None, None) for s, t in (("fastgpu", 1.0), ("slow", 3.0))]
    >>> report = BenchmarkReport("f", rows, {"fastgpu": [2.0, 1.0], "slow": [2.0, 1.01]})
    >>> report.ratios, round(report.loss_deviations["slow"], 6)
    ({'fastgpu': 1.0, 'slow': 3.0}, 0.01)
    """

    name: str
    rows: Sequence[Row]
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def row(self, side: str) -> Row:
        """The row of `side`; raises `KeyError` if it was not measured."""
        return {row.side: row for row in self.rows}[side]

    @property
    def ratios(self) -> dict[str, float]:
        """Step time of each side over fastgpu's (more than 1: fastgpu is faster)."""
        ours = [median(one_round) for one_round in self.row("fastgpu").seconds]
        return {
            row.side: median(
                median(one_round) / mine for one_round, mine in zip(row.seconds, ours, strict=True)
            )
            for row in self.rows
        }

    @property
    def loss_deviations(self) -> dict[str, float]:
        """The largest relative difference of each side's loss curve from fastgpu's."""
        ours = self.losses.get("fastgpu", ())
        return {side: _deviation(curve, ours) for side, curve in self.losses.items() if ours}

    @property
    def peer_deviation(self) -> float | None:
        """The same between the Keras backends: what rounding alone makes of these losses."""
        curves = [curve for side, curve in self.losses.items() if side.startswith("keras-")]
        return _deviation(*curves) if len(curves) == 2 else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as a JSON-ready dict."""
        return {
            "name": self.name,
            "environment": dict(self.environment),
            "rows": [
                {
                    "side": row.side,
                    "median_seconds": row.median_seconds,
                    "spread_seconds": list(row.spread_seconds),
                    "throughput": row.throughput,
                    "compile_seconds": row.compile_seconds,
                    "peak_bytes": row.peak_bytes,
                    "resident_bytes": row.resident_bytes,
                    "ratio": self.ratios[row.side],
                    "seconds": [list(one_round) for one_round in row.seconds],
                }
                for row in self.rows
            ],
            "losses": {side: list(curve) for side, curve in self.losses.items()},
            "loss_deviations": self.loss_deviations,
            "peer_deviation": self.peer_deviation,
        }

    def __str__(self) -> str:
        header = ("", "step ms", "(min-max)", "per s", "ratio", "compile s", "peak MiB", "RSS MiB")
        lines = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.name, table, *self._loss_lines()])

    def _cells(self, row: Row) -> tuple[str, ...]:
        low, high = row.spread_seconds
        return (
            row.side,
            f"{row.median_seconds * 1e3:.4g}",
            f"({low * 1e3:.4g}-{high * 1e3:.4g})",
            f"{row.throughput:.4g}",
            f"{self.ratios[row.side]:.2f}x",
            f"{row.compile_seconds:.2f}",
            _mebibytes(row.peak_bytes),
            _mebibytes(row.resident_bytes),
        )

    def _loss_lines(self) -> list[str]:
        lines = [
            f"losses of {len(self.losses[side])} steps differ from fastgpu's by at most "
            f"{deviation:.1e} ({side})"
            for side, deviation in self.loss_deviations.items()
            if side != "fastgpu"
        ]
        if self.peer_deviation is not None:
            lines.append(f"those of the Keras backends from each other: {self.peer_deviation:.1e}")
        return lines


def _deviation(curve: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(curve, other, strict=True))


def _mebibytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / MIB:.0f}" if count >= 10 * MIB else f"{count / MIB:.2g}"
