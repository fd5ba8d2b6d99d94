"""Call an exported StableHLO program in a process that has never seen the model's code.

Run as a script with three paths: the folder, a pickled list of inputs by name, and the file to
write the pickled list of outputs by name to.
"""

import pickle
import sys


def main(folder: str, calls_file: str, results_file: str) -> None:
    """Load the program at `folder` and make the calls."""
    import jax

    from fastgpu.exporters.stablehlo_model import load_stablehlo

    with open(calls_file, "rb") as file:
        calls = pickle.load(file)
    model = load_stablehlo(folder)
    results = [jax.device_get(model(**inputs)) for inputs in calls]
    with open(results_file, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
