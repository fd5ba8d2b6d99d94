"""Targets: which device, how many of them, on how many hosts."""

import difflib
import re
from dataclasses import dataclass

import jax

from fastgpu.errors import ConfigurationError
from fastgpu.hardware.devices import DEVICES, Device

_ALIASES = {
    "a100-80gb": "a100",
    "a100-sxm": "a100",
    "h100-sxm": "h100",
    "rtx-3090": "rtx3090",
    "rtx-4090": "rtx4090",
    "rtx6000ada": "rtx6000-ada",
}


@dataclass(frozen=True)
class Target:
    """`hosts` machines with `devices_per_host` devices each.

    >>> parse_target("h100:4x8").count
    32
    """

    device: Device
    hosts: int = 1
    devices_per_host: int = 1

    @property
    def count(self) -> int:
        """All devices."""
        return self.hosts * self.devices_per_host

    def __str__(self) -> str:
        if self.count == 1:
            return self.device.name
        if self.hosts == 1:
            return f"{self.device.name}:{self.devices_per_host}"
        return f"{self.device.name}:{self.hosts}x{self.devices_per_host}"


def parse_target(text: str | Device | Target) -> Target:
    """A target from "cpu", "h100", "h100:8" (devices) or "h100:4x8" (hosts x devices a host).

    Raises `ConfigurationError` naming the known devices, nearest first, or the form expected.

    >>> str(parse_target("a100:8")), parse_target("h100").device.platform
    ('a100:8', 'cuda')
    """
    if isinstance(text, Target):
        return text
    if isinstance(text, Device):
        return Target(text)
    name, _, shape = text.strip().lower().partition(":")
    chosen = device(name)
    if not shape and ":" not in text:
        return Target(chosen)
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if match is None:
        raise ConfigurationError(
            f"target {text!r} has no number of devices that can be read",
            expected="'h100:8' for eight devices, 'h100:4x8' for four hosts of eight",
            got=repr(shape),
        )
    return Target(chosen, int(match[1] or 1), int(match[2]))


def resolve_target(target: str | Device | Target | None) -> Target:
    """The target named; for `None` what JAX runs on, as the nearest known device. Starts JAX then.

    Raises `ConfigurationError` for an unknown name.

    >>> resolve_target("t4").device.name
    't4'
    """
    return Target(_live_device()) if target is None else parse_target(target)


def _live_device() -> Device:
    """The profile whose name the live device has in its own; else the platform's."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "").replace("-", "")
    for name, known in sorted(DEVICES.items(), key=lambda item: -len(item[0])):
        if known.platform == "cuda" and name.replace("-", "") in kind:
            return known
    return DEVICES["h100" if jax.default_backend() in ("gpu", "cuda") else "cpu"]


def device(name: str) -> Device:
    """Look a device up by name.

    Raises `ConfigurationError` naming the known devices, nearest first.

    >>> device("h100").platform
    'cuda'
    """
    name = _ALIASES.get(name, name)
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name, DEVICES, n=len(DEVICES), cutoff=0.0)
    raise ConfigurationError(
        f"unknown target {name!r}", expected=f"one of {', '.join(near)}", got=repr(name)
    )
