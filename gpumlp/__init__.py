"""gpumlp: multi-layer perceptrons with a training step of their own; NumPy is the definition of every answer.

Public is what this module lists; each name's home has the details.
"""

from typing import Any as _Any

from . import data, plots  # matplotlib is imported when a picture is drawn
from .activations import Activation
from .augment import GaussianNoise, Mixup, RandomShift
from .callbacks import Callback, CSVLogger, EarlyStopping, ProgressBar, TensorBoard
from .checkpoints import Checkpoint
from .container import FileError
from .data import TableEncoder, batches
from .files import load
from .layers import Add, Concat, Dense, Embedding, Input
from .losses import Loss
from .network import Network
from .optimizers import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop
from .schedules import Constant, Cosine, Exponential, OneCycle, ReduceOnPlateau, StepDecay
from .trainer import DivergedError, Trainer

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "SGD",
    "Activation",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Add",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "Concat",
    "Constant",
    "Cosine",
    "Dense",
    "DivergedError",
    "EarlyStopping",
    "Embedding",
    "Exponential",
    "FileError",
    "GaussianNoise",
    "Input",
    "Loss",
    "Mixup",
    "NAdam",
    "Network",
    "OneCycle",
    "ProgressBar",
    "RMSprop",
    "RandomShift",
    "ReduceOnPlateau",
    "StepDecay",
    "TableEncoder",
    "TensorBoard",
    "Trainer",
    "batches",
    "data",
    "load",
    "plots",
]


def __getattr__(name: str) -> _Any:
    """MLPClassifier, MLPRegressor and Perceptron, which need scikit-learn: imported when they are first asked for.

    They are not in ``__all__``, so that ``from gpumlp import *`` needs no extra.
    """
    if name not in ("MLPClassifier", "MLPRegressor", "Perceptron"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "Perceptron":
            from .perceptron import Perceptron

            return Perceptron
        from . import estimators
    except ImportError as error:
        raise ImportError(f'{name} needs scikit-learn: pip install "gpumlp[sklearn]" ({error})') from error
    return getattr(estimators, name)
