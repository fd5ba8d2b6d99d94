"""From a function to a compiled program, for a device that may be absent, and what it needs."""

from fastgpu.compile.budget import Attempt as Attempt
from fastgpu.compile.budget import Search as Search
from fastgpu.compile.counts import CountSearch as CountSearch
from fastgpu.compile.deviceless import absent_devices as absent_devices
from fastgpu.compile.deviceless import absent_mesh as absent_mesh
from fastgpu.compile.deviceless import compile_for as compile_for
from fastgpu.compile.deviceless import options_for as options_for
from fastgpu.compile.deviceless import shape_of as shape_of
from fastgpu.compile.gradient import Gradient as Gradient
from fastgpu.compile.gradient import ValueAndGrad as ValueAndGrad
from fastgpu.compile.gradient import gradient_distance as gradient_distance
from fastgpu.compile.gradient import gradient_of as gradient_of
from fastgpu.compile.gradient import value_and_grad as value_and_grad
from fastgpu.compile.memory import MemoryReport as MemoryReport
from fastgpu.compile.memory import memory_report as memory_report
from fastgpu.compile.plan import Plan as Plan
from fastgpu.compile.plan import plan as plan
