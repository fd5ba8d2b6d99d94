"""A budget lowers the resident memory of a training process on a CPU by what the plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def trained(budget: str | None) -> dict:
    """Losses and peak resident bytes of five steps, in a process of their own."""
    command = [sys.executable, ROOT / "benchmarks/resident.py", "--worker", "mlp"]
    command += ["--budget", budget] if budget else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_drops_by_at_least_what_was_planned():
    free, budgeted = trained(None), trained("60%")
    # The plan counts bytes of one program; a tenth is for what the process needs to plan.
    assert budgeted["planned_drop_bytes"] > 2**28
    drop = free["peak_bytes"] - budgeted["peak_bytes"]
    assert drop >= 0.9 * budgeted["planned_drop_bytes"]
    # The same sums in the same order, but for where XLA fuses them.
    np.testing.assert_allclose(budgeted["losses"], free["losses"], rtol=1e-5)
