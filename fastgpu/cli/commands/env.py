"""`fastgpu env`"""

import importlib.util

from fastgpu.cli.options import AsJson, Device, show

_EXTRAS = {
    "cuda12": "jax_cuda12_plugin",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "torch": "torch",
    "onnx": "onnx",
    "tune": "optuna",
    "ray": "ray",
}


def env(device: Device = "auto", as_json: AsJson = False) -> None:
    """Show the device, versions, settings and optional packages: for bug reports.

    Example: fastgpu env --json
    """
    import fastgpu as fgpu
    from fastgpu.benchmarking.environment import environment

    configuration = fgpu.configure(device, quiet=True)
    found = environment()
    extras = {extra: bool(importlib.util.find_spec(name)) for extra, name in _EXTRAS.items()}
    data = {
        "fastgpu": fgpu.__version__,
        **found,
        "compile_cache": configuration.cache_dir,
        "extras": extras,
    }
    lines = [
        f"fastgpu {fgpu.__version__}",
        str(configuration),
        f"  machine        {found['machine']}, {found['cores']} cores, Python {found['python']}",
        f"  versions       {', '.join(f'{n} {v}' for n, v in found['versions'].items())}",
        f"  extras         {', '.join(n for n, there in extras.items() if there) or 'none'}",
        f"  not installed  {', '.join(n for n, there in extras.items() if not there) or 'none'}",
    ]
    show("\n".join(lines), data, as_json)
