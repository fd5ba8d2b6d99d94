"""What an export wrote and how closely its reloaded copy followed the live function."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

REPORT_FILE = "fastgpu_export.json"


@dataclass(frozen=True)
class Check:
    """One call of a reloaded signature beside the live function.

    `relative_error` is the largest difference divided by the largest magnitude of that output.
    `argmax_agreement` is the share of rows whose largest entry is at the same place, or `None` when
    no output has rows of several floats.
    """

    sizes: dict[str, int]
    max_error: float
    relative_error: float
    argmax_agreement: float | None


@dataclass(frozen=True)
class SignatureReport:
    """One signature: its inputs and outputs by name, and the calls that it passed."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class ExportReport:
    """A finished, verified export: `print(report)` shows it, `to_json()` is in the folder.

    `format` is "SavedModel" or "StableHLO", `bytes` the size of the files on disk, `seconds` the
    time of the whole call, verification included.
    """

    format: str
    path: Path
    signatures: tuple[SignatureReport, ...]
    platforms: tuple[str, ...]
    calling_convention_version: int
    variables: int
    trainable_variables: int
    bytes: int
    seconds: float

    def to_json(self) -> str:
        """The report as JSON text, with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, default=str)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.format}, {self.bytes / 1e6:.2f} MB, {self.variables} variables"
            f" ({self.trainable_variables} trainable), platforms {', '.join(self.platforms)},"
            f" verified in {self.seconds:.1f} s"
        ]
        for signature in self.signatures:
            inputs = ", ".join(f"{name}: {kind}" for name, kind in signature.inputs.items())
            outputs = ", ".join(f"{name}: {kind}" for name, kind in signature.outputs.items())
            lines.append(f"  {signature.name}({inputs}) -> {outputs}")
            lines += [f"    {_describe(check)}" for check in signature.checks]
        return "\n".join(lines)


def _describe(check: Check) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in check.sizes.items()) or "fixed sizes"
    text = f"{sizes}: max error {check.max_error:.1e}, relative {check.relative_error:.1e}"
    if check.argmax_agreement is not None:
        text += f", same argmax in {check.argmax_agreement:.1%}"
    return text
