"""Device profiles and the names of targets."""

import pytest

from fastgpu.errors import ConfigurationError
from fastgpu.hardware import DEVICES, device, parse_target

GPUS = [d for d in DEVICES.values() if d.platform == "cuda"]


@pytest.mark.parametrize(
    "text, hosts, each, back",
    [
        ("cpu", 1, 1, "cpu"),
        ("h100", 1, 1, "h100"),
        ("H100:8", 1, 8, "h100:8"),
        ("h100:4x8", 4, 8, "h100:4x8"),
        ("rtx-4090", 1, 1, "rtx4090"),
        ("a100-80gb:2", 1, 2, "a100:2"),
    ],
)
def test_targets_are_read_and_written(text, hosts, each, back):
    target = parse_target(text)
    assert (target.hosts, target.devices_per_host, str(target)) == (hosts, each, back)
    assert parse_target(target) is target


@pytest.mark.parametrize("text", ["h100:", "h100:0", "h100:8x", "h100:x8", "h100:-1", "h100:2x2x2"])
def test_a_number_of_devices_that_cannot_be_read_says_the_form(text):
    with pytest.raises(ConfigurationError, match=r"expected: 'h100:8'.*'h100:4x8'"):
        parse_target(text)


def test_an_unknown_device_lists_the_known_ones_nearest_first():
    with pytest.raises(ConfigurationError) as error:
        device("h1000")
    assert str(error.value.expected).startswith("one of h100, ")
    assert all(name in str(error.value.expected) for name in DEVICES)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_profiles_are_complete_and_in_plausible_units(gpu):
    assert gpu.source
    assert 10 * 2**30 < gpu.memory_bytes < 300 * 2**30
    assert 2e11 < gpu.bandwidth < 1e13
    assert gpu.peak_flops("float16") >= gpu.peak_flops("float32") >= gpu.vector_flops > 1e12
    geometry = gpu.geometry
    # The data sheet's float32 rate is cores x units x 2 x clock; NVIDIA quotes the boost clock.
    rate = geometry.cores * geometry.fpus_per_core * 2 * geometry.clock_ghz * 1e9
    assert rate == pytest.approx(gpu.vector_flops, rel=0.16)


def test_devices_can_be_keys():
    assert len({parse_target("h100"), parse_target("h100"), parse_target("a100")}) == 2
