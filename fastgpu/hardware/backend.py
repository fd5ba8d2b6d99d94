"""Has JAX's backend started, and which line of the user's program started it?

JAX reads its environment once, when the first array is made or the first device is asked for.
`configure` has to come before that.
"""

import ast
import linecache
import sys
from pathlib import Path
from types import FrameType

import jax

# What may be called at import time without starting a backend.
_LAZY = {
    "ShapeDtypeStruct",
    "checkpoint",
    "config",
    "custom_jvp",
    "custom_vjp",
    "dtypes",
    "grad",
    "jit",
    "named_call",
    "remat",
    "tree",
    "tree_util",
    "value_and_grad",
    "vmap",
}


def backend_started() -> bool:
    """Whether JAX has initialized a backend in this process. Starts none.

    JAX has no public question for this, but it refuses to change the number of CPU devices once a
    backend runs; asking for another number and taking it back is that question.

    >>> import jax
    >>> _ = jax.devices()
    >>> backend_started()
    True
    """
    before = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_num_cpu_devices", before + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


def first_use_of_jax(frame: FrameType) -> str | None:
    """Where the program of `frame` used JAX before the line that `frame` stands on, or None.

    Looks for a call into JAX above that line at module level of the same file, then for arrays
    that other modules of the user hold as globals. A guess for an error message, nothing more.
    """
    return _call_above(frame.f_code.co_filename, frame.f_lineno) or _array_in_a_module()


def _call_above(filename: str, before_line: int) -> str | None:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None
    names = _names_from_jax(tree)
    statements = [node for node in tree.body if node.lineno < before_line]
    for statement in statements:
        for call in _calls_that_run(statement):
            path = _dotted(call.func)
            if path and path[0] in names and not _LAZY & {names[path[0]], *path[1:]}:
                text = linecache.getline(filename, call.lineno).strip()
                return f"{filename}:{call.lineno} `{text}`"
    return None


def _names_from_jax(tree: ast.Module) -> dict[str, str]:
    """Local name -> the last part of what it names, for everything imported from jax."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jax":
                    names[alias.asname or "jax"] = alias.name.split(".")[-1]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    return names


def _calls_that_run(node: ast.AST) -> list[ast.Call]:
    """Calls in `node` in source order, without those in bodies of functions defined there."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    calls = [node] if isinstance(node, ast.Call) else []
    for child in ast.iter_child_nodes(node):
        calls += _calls_that_run(child)
    return calls


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (prefix := _dotted(node.value)):
        return [*prefix, node.attr]
    return []


def _array_in_a_module() -> str | None:
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not path or {"site-packages", "dist-packages"} & set(Path(path).parts):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, jax.Array):
                return f"{path}, where the global `{name}` is an array"
    return None
