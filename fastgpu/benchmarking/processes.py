"""Sides that run in processes of their own (`worker.py`), asked in turn over pipes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastgpu.benchmarking import worker
from fastgpu.errors import BatchError, FastGPUError


class Process:
    """A side in a process of its own: `first_step`, `steps`, `losses` as in `worker.Side`."""

    def __init__(self, spec: Mapping[str, Any], log: Path) -> None:
        self.name = str(spec["side"])
        self.resident_bytes: int | None = None
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                # -P: the folder of the script does not become a place to import from
                [sys.executable, "-P", worker.__file__, json.dumps(dict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(self.name),
                text=True,
            )

    def wait_until_ready(self) -> None:
        """Block until the model is loaded."""
        self._reply()

    def first_step(self) -> dict[str, Any]:
        """Compile and do one step."""
        return self._ask(do="first_step")

    def steps(self, count: int) -> list[float]:
        """The seconds of `count` steps; the highest resident memory is kept."""
        reply = self._ask(do="steps", count=count)
        if reply["resident_bytes"] is not None:
            self.resident_bytes = max(self.resident_bytes or 0, reply["resident_bytes"])
        return reply["seconds"]

    def losses(self, count: int) -> list[float]:
        """The losses of the first `count` steps."""
        return self._ask(do="losses", count=count)["losses"]

    def environment(self) -> dict[str, Any]:
        """Versions and machine, as fastgpu's process sees them."""
        return self._ask(do="environment")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply says why
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        said = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
        raise FastGPUError(
            f"the process that measures {self.name!r} ended with status {status}",
            got="\n       ".join(said[-5:]) or "no message",
            fix=f"leave {self.name!r} out of `against`, or reduce the batch if memory ran out",
        )


@contextmanager
def processes(specs: list[dict[str, Any]], folder: Path) -> Iterator[list[Process]]:
    """Start one process per spec, wait until all have loaded; end them all on the way out."""
    started: list[Process] = []
    try:
        started += [Process(spec, folder / f"{spec['side']}.log") for spec in specs]
        for process in started:
            process.wait_until_ready()
        yield started
    finally:
        for process in started:
            process.close()


def save_batch(batch: Mapping[str, Any], path: Path) -> int:
    """Write the batch for the processes to read; returns its number of examples."""
    if not {"inputs", "labels"} <= set(batch):
        raise BatchError(
            "a batch to measure a Keras model with lacks a key",
            expected="{'inputs': array or tuple of arrays, 'labels': array}",
            got=f"the keys {sorted(batch)}",
        )
    inputs = batch["inputs"]
    inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
    labels = np.asarray(batch["labels"])
    arrays = {f"input_{i}": np.asarray(array) for i, array in enumerate(inputs)}
    lengths = {name: len(array) for name, array in (*arrays.items(), ("labels", labels))}
    if len(set(lengths.values())) != 1:
        raise BatchError(
            "the arrays of the batch have different lengths",
            expected="one length along the first axis",
            got=str(lengths),
        )
    np.savez(path, allow_pickle=False, labels=labels, **arrays)
    return len(labels)


def _environment(side: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # compile times are to be real
    # several processes share the accelerator: none may take all of its memory
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if side.startswith("keras-"):
        environment["KERAS_BACKEND"] = side.removeprefix("keras-")
    return environment
