"""The pipeline, on one page."""

from fastgpu.transforms.optimize import optimize
