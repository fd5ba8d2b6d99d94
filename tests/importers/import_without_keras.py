"""Import models where Keras and TensorFlow cannot be imported, and compare with kept outputs.

    python import_without_keras.py FOLDER NAME ...

Reads FOLDER/NAME.keras and FOLDER/NAME.npz; prints one JSON line per model.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Forbidden(MetaPathFinder):
    """Refuses Keras and TensorFlow, as if they were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("keras", "tf_keras", "tensorflow"):
            raise ModuleNotFoundError(f"{name} must not be imported here", name=name)
        return None


def main(folder: Path, names: list[str]) -> None:
    import jax
    import numpy as np

    from fastgpu.importers import from_keras

    for name in names:
        known = np.load(folder / f"{name}.npz")
        imported = from_keras(folder / f"{name}.keras")
        run = jax.jit(imported.module.apply, compiler_options={"xla_backend_optimization_level": 0})
        y = np.asarray(run(imported.variables, known["x"]))
        error = np.abs(y - known["y"]).max() / np.abs(known["y"]).max()
        counted = sum(leaf.size for leaf in jax.tree.leaves(imported.variables))
        line = {
            "name": name,
            "relative_error": float(error),
            "distinct_outputs": int((known["y"] > 1e-3 * known["y"].max()).sum()),
            "spread": float(known["y"].std() / known["y"].max()),
            "parameters": counted,
            "reported": imported.report.parameter_count,
            "expected_parameters": int(known["parameters"]),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.meta_path.insert(0, Forbidden())
    main(Path(sys.argv[1]), sys.argv[2:])
