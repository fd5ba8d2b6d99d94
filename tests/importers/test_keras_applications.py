"""Every architecture of keras.applications: imported from a file, without Keras, equal outputs.

Float32 outputs of up to a thousand layers in another order of summation: 1e-4 relative to the
largest output.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Name, input size, width. Together with test_keras_layers.py all 25 layer classes are covered.
SMALL = ["MobileNet:64:0.25", "MobileNetV2:64:0.35", "MobileNetV3Small:64"]
SMALL += ["EfficientNetV2B0:64", "DenseNet121:64"]

# Small inputs, but with enough positions left at the end for batch statistics to mean something.
ALL = [f"ConvNeXt{size}:64" for size in ("Tiny", "Small", "Base", "Large", "XLarge")]
ALL += [f"DenseNet{depth}:64" for depth in (121, 169, 201)]
ALL += [f"EfficientNetB{index}:64" for index in range(8)]
ALL += [f"EfficientNetV2{size}:64" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")]
ALL += ["InceptionResNetV2:160", "InceptionV3:160", "Xception:96"]
ALL += ["MobileNet:64", "MobileNetV2:64", "MobileNetV3Small:64", "MobileNetV3Large:64"]
ALL += ["NASNetMobile:64", "NASNetLarge:64", "VGG16:64", "VGG19:64"]
ALL += [f"ResNet{depth}{version}:96" for depth in (50, 101, 152) for version in ("", "V2")]


def run_script(script: str, folder: Path, names: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    result = subprocess.run(
        [sys.executable, str(HERE / script), str(folder), *names],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_equal_to_keras(folder: Path, models: list[str]) -> None:
    names = [model.split(":")[0] for model in models]
    run_script("keras_oracle.py", folder, models)
    lines = run_script("import_without_keras.py", folder, names).splitlines()
    results = {line["name"]: line for line in map(json.loads, lines)}
    assert list(results) == names
    for result in results.values():
        assert result["relative_error"] < 1e-4, result
        assert result["distinct_outputs"] > 10, f"one-hot outputs prove nothing: {result}"
        assert result["spread"] > 0.01, f"uniform outputs prove nothing: {result}"
        assert result["parameters"] == result["reported"] == result["expected_parameters"], result


def test_small_applications_equal_keras(tmp_path: Path) -> None:
    assert_equal_to_keras(tmp_path, SMALL)


def test_there_are_forty_applications() -> None:
    assert len(ALL) == len({name.split(":")[0] for name in ALL}) == 40


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL)
def test_application_equals_keras(tmp_path: Path, model: str) -> None:
    assert_equal_to_keras(tmp_path, [model])
    for file in tmp_path.iterdir():
        file.unlink()  # Up to 1.4 GB each.
