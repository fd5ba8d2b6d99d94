"""Mixed precision as a pass: products in 16 bits, what has to be exact in float32."""

from fastgpu.transforms.precision.mixed import in_precision as in_precision
from fastgpu.transforms.precision.policy import Policy as Policy
from fastgpu.transforms.precision.policy import policy_of as policy_of
