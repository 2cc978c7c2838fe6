"""Data: readers, checks, scaling, splits and built-in sets."""

from gpumlp.data.checks import check_sample_weight, check_targets, check_X, encode_labels
from gpumlp.data.dataset import Dataset
from gpumlp.data.idx import read_idx
from gpumlp.data.readers import load, read_rows
from gpumlp.data.scaling import standardization
from gpumlp.data.splits import batches, kfold_indices, split_indices

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
