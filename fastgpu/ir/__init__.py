"""Jaxprs as data: trace a function, rewrite it by rules, read its cost, check it, print it."""

from fastgpu.ir.trace import Traced, trace
from fastgpu.ir.rewrite import Rule, Rules, rewrite
from fastgpu.ir.analysis import walk
