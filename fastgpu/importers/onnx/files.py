"""What a source is: the path of a model, its bytes, or a ModelProto."""

from pathlib import Path
from typing import Any

from fastgpu.errors import FileError, require
from fastgpu.importers.onnx.tensors import ExternalData

# A protobuf message cannot be larger.
_LARGEST_FILE = (1 << 31) - 1


def open_model(source: Any) -> tuple[str, Any, ExternalData]:
    """The name of a source for messages, its ModelProto, and the data beside it."""
    onnx = require("onnx", "onnx")
    if isinstance(source, str | Path):
        path = Path(source)
        return str(path), _parsed(_bytes(path), str(path)), ExternalData(path.parent)
    if isinstance(source, bytes | bytearray | memoryview):
        return "an ONNX model", _parsed(bytes(source), "the bytes"), ExternalData(None)
    if isinstance(source, onnx.ModelProto):
        return source.graph.name or "an ONNX model", source, ExternalData(None)
    raise FileError(
        "from_onnx cannot read this",
        expected="a path, bytes or an onnx.ModelProto",
        got=type(source).__name__,
        fix="pass the path of a .onnx file",
    )


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if path.is_file() and size <= _LARGEST_FILE:
            return path.read_bytes()
    except OSError as error:
        raise FileError(
            f"{path} cannot be opened",
            expected="an ONNX model",
            got=error.strerror,
            fix="check the path",
        ) from error
    raise FileError(
        f"{path} is not an ONNX model",
        expected=f"a file of at most {_LARGEST_FILE:,} bytes",
        got=f"{size:,} bytes" if path.is_file() else "a folder or a device",
        fix="save large weights as external data: onnx.save_model(..., save_as_external_data=True)",
    )


def _check_text(model: Any, source: str) -> None:
    """Refuse names that are no UTF-8: protobuf hands them out as bytes."""
    waiting = [model]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
                continue
            single = isinstance(value, str | bytes) or hasattr(value, "ListFields")
            each = [value] if single else value
            if field.type == field.TYPE_MESSAGE:
                waiting.extend(each)
            elif any(isinstance(text, bytes) for text in each):
                raise FileError(
                    f"{source} is damaged: a name in it is not UTF-8",
                    got=f"{field.full_name}: {value!r}"[:200],
                    fix="copy the file again, or export the model again",
                )


def _parsed(data: bytes, source: str) -> Any:
    onnx = require("onnx", "onnx")
    message = require("google.protobuf.message", "onnx")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except message.DecodeError as error:
        raise FileError(
            f"{source} is not an ONNX model",
            expected="a protobuf message of type onnx.ModelProto",
            got=f"{len(data):,} bytes that start with {data[:8]!r}",
            fix="export the model again, or copy the file again",
        ) from error
    _check_text(model, source)
    if not model.HasField("graph") or not model.opset_import:
        raise FileError(
            f"{source} holds no ONNX model",
            expected="a graph and the opsets it is written in",
            got="an empty message" if not data else "another protobuf message",
            fix="pass a .onnx file",
        )
    return model
