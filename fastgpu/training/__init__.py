"""Training: the state, the step, the losses, and a loop to copy."""

from fastgpu.training.losses import SupervisedLoss, supervised_loss
from fastgpu.training.state import TrainState
from fastgpu.training.step import TrainStep, train_step

__all__ = ["SupervisedLoss", "TrainState", "TrainStep", "supervised_loss", "train_step"]
