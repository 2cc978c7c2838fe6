"""Data: readers, checks, scaling, splits and built-in sets."""

from .checks import check_sample_weight, check_targets, check_X, encode_labels
from .dataset import Dataset
from .idx import read_idx
from .readers import load, read_rows
from .scaling import standardization
from .splits import batches, kfold_indices, split_indices

__all__ = [
    "Dataset",
    "batches",
    "check_X",
    "check_sample_weight",
    "check_targets",
    "encode_labels",
    "kfold_indices",
    "load",
    "read_idx",
    "read_rows",
    "split_indices",
    "standardization",
]
