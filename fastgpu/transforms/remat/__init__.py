"""Rematerialization: what the backward half of a program keeps, and what it computes again.

    trace_joint → pose (cut, price) → solve (what to keep) → rematerialized (the new program)

`Planner` does the last three for any number of budgets, against a model of the compiler's memory.
Other ways to write the program, each with a planner of its own, leave more to decide:
`reshaped_loops`, `softmaxes_of_results`, `in_row_chunks`.
"""

from fastgpu.transforms.remat.decide import Modelled as Modelled
from fastgpu.transforms.remat.decide import Planner as Planner
from fastgpu.transforms.remat.decide import modelled as modelled
from fastgpu.transforms.remat.joint import Joint as Joint
from fastgpu.transforms.remat.joint import flat_program as flat_program
from fastgpu.transforms.remat.joint import trace_joint as trace_joint
from fastgpu.transforms.remat.loops import reshaped_loops as reshaped_loops
from fastgpu.transforms.remat.rows import in_row_chunks as in_row_chunks
from fastgpu.transforms.remat.shelves import check_compress as check_compress
from fastgpu.transforms.remat.shelves import shelves_for as shelves_for
from fastgpu.transforms.remat.softmax import softmaxes_of_results as softmaxes_of_results
