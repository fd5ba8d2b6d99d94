"""The programs of docs/training.md run as they stand."""

import re
from pathlib import Path


def test_the_programs_in_the_guide_run(capsys):
    guide = Path(__file__).parents[2] / "docs/training.md"
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "guide"}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 7
    assert namespace["scores"]["accuracy"] > 0.6
    assert namespace["logits"].shape == (256, 3)
    moments = namespace["small"].opt_state.inner_state[0]
    assert moments.nu["w"].codes.dtype == "uint8"
