"""The language of shapes, and SVD written in it. Imports nothing of ours but errors, and torch only for type checking."""

from svdtune.contracts.spec import Axes, Mismatch, TensorSpec, check, move, require, specs, tensor
from svdtune.contracts.svd import Draws, Encoded, ModelFacts, Prediction, StepResult, UNetInput, VideoBatch

__all__ = [
    "Axes",
    "Draws",
    "Encoded",
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
