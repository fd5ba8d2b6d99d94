"""Training: the state, the step, the losses, and a loop to copy."""

from fastgpu.training.batch_size import MaxBatch, max_batch
from fastgpu.training.data import ArrayBatches
from fastgpu.training.evaluation import evaluate, predict
from fastgpu.training.loop import FitResult, fit
from fastgpu.training.loss_scale import LossScale
from fastgpu.training.losses import SupervisedLoss, supervised_loss
from fastgpu.training.sharding import gather_params, shard_fsdp
from fastgpu.training.state import TrainState
from fastgpu.training.step import TrainStep, train_step

__all__ = [
    "ArrayBatches",
    "FitResult",
    "LossScale",
    "MaxBatch",
    "SupervisedLoss",
    "TrainState",
    "TrainStep",
    "evaluate",
    "fit",
    "gather_params",
    "max_batch",
    "predict",
    "shard_fsdp",
    "supervised_loss",
    "train_step",
]
