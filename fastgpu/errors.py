"""The errors a user can meet: each says what was expected, what came, and what to do."""

import importlib
from types import ModuleType


class FastGPUError(Exception):
    """Base of every error that fastgpu raises on purpose.

    `summary` names the thing that failed (file, layer, leaf, equation). `expected`, `got` and `fix`
    are kept as attributes and printed on lines of their own.

    >>> print(FastGPUError("batch['x'] changed", expected="f32[8]", got="f32[7]", fix="pad it"))
    batch['x'] changed
      expected: f32[8]
      got: f32[7]
      to do: pad it
    """

    def __init__(
        self,
        summary: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.summary, self.expected, self.got, self.fix = summary, expected, got, fix
        lines = [summary]
        lines += [
            f"  {label}: {text}"
            for label, text in (("expected", expected), ("got", got), ("to do", fix))
            if text is not None
        ]
        super().__init__("\n".join(lines))

    def one_line(self) -> str:
        """The whole message on one line, for a terminal or a log."""
        return "; ".join(line.strip() for line in str(self).splitlines())


class MissingExtraError(FastGPUError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""


class ConfigurationError(FastGPUError, RuntimeError):
    """`configure` was called too late or with settings that contradict each other."""


class FileError(FastGPUError, ValueError):
    """A file is missing, truncated, unsafe, or not what its name says."""


class WeightsError(FileError):
    """Weights are missing, left over, or of another shape than the model declares."""


class UnsupportedLayerError(FastGPUError, ValueError):
    """A layer (or one of its settings) has no equal in fastgpu's table."""


class TraceError(FastGPUError, TypeError):
    """A function cannot be traced to a jaxpr, or gives outputs that a transform cannot take."""


class VerificationError(FastGPUError, RuntimeError):
    """A rewritten program is ill-typed or gives other numbers than the original."""


class LossError(FastGPUError, TypeError):
    """A loss function does not return `(scalar, (model_state, metrics))`."""


class BatchError(FastGPUError, ValueError):
    """A batch has other leaves, shapes or dtypes than the step was compiled for."""


class NonFiniteError(FastGPUError, FloatingPointError):
    """The training loss became infinite or not a number."""


class OptimizerError(FastGPUError, ValueError):
    """An optimizer's settings are out of range, or it is given a state that is not its own."""


class CheckpointError(FastGPUError, RuntimeError):
    """A checkpoint cannot be written, read, or does not match the state it should restore."""


class ModelError(FastGPUError, ValueError):
    """A model's name, configuration, or input shape is not one it can take."""


class BudgetError(FastGPUError, ValueError):
    """No plan fits a memory budget. `least_bytes` is the smallest peak that was found."""

    def __init__(self, summary: str, *, least_bytes: int, **lines: str | None) -> None:
        super().__init__(summary, **lines)
        self.least_bytes = least_bytes


class TuningError(FastGPUError, RuntimeError):
    """A search space is ill-formed, a study cannot be resumed, or no trial of it succeeded."""


class ExportError(FastGPUError, RuntimeError):
    """An export cannot be written, or its reloaded copy gives other numbers."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or raise `MissingExtraError` naming the pip extra that has it.

    >>> require("json", "demo").dumps([1])
    '[1]'
    >>> require("not_a_module", "tune")
    Traceback (most recent call last):
    ...
    fastgpu.errors.MissingExtraError: 'not_a_module' is not installed
      to do: pip install 'fastgpu[tune]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise
        raise MissingExtraError(
            f"{error.name!r} is not installed", fix=f"pip install 'fastgpu[{extra}]'"
        ) from error
