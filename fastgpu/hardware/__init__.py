"""Devices as data: what a program can be compiled and priced for."""

from fastgpu.hardware.devices import DEVICES as DEVICES
from fastgpu.hardware.devices import Device as Device
from fastgpu.hardware.devices import Geometry as Geometry
from fastgpu.hardware.sizes import parse_budget as parse_budget
from fastgpu.hardware.sizes import show_bytes as show_bytes
from fastgpu.hardware.targets import Target as Target
from fastgpu.hardware.targets import device as device
from fastgpu.hardware.targets import parse_target as parse_target
from fastgpu.hardware.targets import resolve_target as resolve_target
