"""Data: readers, checks, tables as numbers, scaling, splits and built-in sets."""

from .checks import check_sample_weight, check_targets, check_X, encode_labels
from .dataset import Dataset
from .encoding import TableEncoder
from .idx import read_idx
from .readers import load, load_table, read_columns, read_rows
from .scaling import standardization
from .splits import batches, kfold_indices, split_indices

__all__ = [
    "Dataset",
    "TableEncoder",
    "batches",
    "check_X",
    "check_sample_weight",
    "check_targets",
    "encode_labels",
    "kfold_indices",
    "load",
    "load_table",
    "read_columns",
    "read_idx",
    "read_rows",
    "split_indices",
    "standardization",
]
