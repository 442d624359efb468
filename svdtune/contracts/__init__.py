"""The language of shapes, and SVD written in it. Imports nothing of ours but errors, and torch only for type checking."""

from svdtune.contracts.spec import Axes, Mismatch, TensorSpec, check, move, require, specs, tensor
from svdtune.contracts.svd import (
    Batch,
    Draws,
    Encoded,
    LatentBatch,
    ModelFacts,
    Prediction,
    StepResult,
    UNetInput,
    VideoBatch,
)

__all__ = [
    "Axes",
    "Batch",
    "Draws",
    "Encoded",
    "LatentBatch",
    "Mismatch",
    "ModelFacts",
    "Prediction",
    "StepResult",
    "TensorSpec",
    "UNetInput",
    "VideoBatch",
    "check",
    "move",
    "require",
    "specs",
    "tensor",
]
