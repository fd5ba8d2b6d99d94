"""Jaxprs as data: trace a function, rewrite it by rules, read its cost, check it, print it."""

from fastgpu.ir.analysis import aval_bytes as aval_bytes
from fastgpu.ir.analysis import last_use as last_use
from fastgpu.ir.analysis import uses as uses
from fastgpu.ir.analysis import walk as walk
from fastgpu.ir.compat import ClosedJaxpr as ClosedJaxpr
from fastgpu.ir.compat import JaxprEqn as JaxprEqn
from fastgpu.ir.compat import source_line as source_line
from fastgpu.ir.cost import Cost as Cost
from fastgpu.ir.cost import equation_cost as equation_cost
from fastgpu.ir.cost import program_cost as program_cost
from fastgpu.ir.cost import roofline_seconds as roofline_seconds
from fastgpu.ir.fusion import Storage as Storage
from fastgpu.ir.fusion import kernel_seconds as kernel_seconds
from fastgpu.ir.fusion import storage as storage
from fastgpu.ir.fusion import temporary_bytes as temporary_bytes
from fastgpu.ir.lowered import Chooser as Chooser
from fastgpu.ir.lowered import Site as Site
from fastgpu.ir.lowered import lower_by as lower_by
from fastgpu.ir.lowered import stands_for as stands_for
from fastgpu.ir.printer import to_text as to_text
from fastgpu.ir.rewrite import Rule as Rule
from fastgpu.ir.rewrite import Rules as Rules
from fastgpu.ir.rewrite import rewrite as rewrite
from fastgpu.ir.trace import Traced as Traced
from fastgpu.ir.trace import trace as trace
from fastgpu.ir.verify import verify as verify
