"""Keras on JAX, with fastgpu's passes: `fit`, `evaluate` and `predict` as users know them.

Keras's JAX trainer compiles three functions: a training step with its gradient and the optimizer's
update, a test step, a prediction step. Each goes through the passes on its way to `jax.jit`, as it
stands, whatever made it: callbacks, metrics, class weights, a `train_step` of the user's own.
"""

from fastgpu.keras_integration.trainer import accelerate as accelerate
from fastgpu.keras_integration.trainer import accelerate_all as accelerate_all
