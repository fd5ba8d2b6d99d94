"""Devices as data: what a program can be compiled and priced for."""

from fastgpu.hardware.devices import DEVICES, Device, device

__all__ = ["DEVICES", "Device", "device"]
