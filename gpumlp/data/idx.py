"""IDX, the format of MNIST and its kin: a folder of four files, gzip or not.

A file is two zero bytes, a dtype code, the number of dimensions, each dimension as a big-endian 32-bit integer, then
the values, big-endian, last dimension fastest. Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", file
formats.
"""

import math
from pathlib import Path

import numpy as np

from .compressed import read_bytes

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PARTS = {"images": "idx3", "labels": "idx1"}


def read_idx(path: Path | str) -> np.ndarray:
    """Return the array in an IDX file, compressed with gzip or not, in native byte order.

    Raises: ValueError naming the file, for bytes that are no IDX file, too few or too many values and damaged gzip.
    """
    path = Path(path)
    raw = read_bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in DTYPES or raw[3] == 0:
        raise ValueError(f"{path} is not an IDX file: it starts with the bytes {raw[:4].hex(' ') or '(none)'}")
    dtype, start = np.dtype(DTYPES[raw[2]]), 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: it ends within its header of {start} bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", raw[3], offset=4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        fault = "is truncated" if len(raw) < expected else "has trailing bytes"
        raise ValueError(f"{path} {fault}: shape {shape} {dtype.name} takes {expected} bytes, it has {len(raw)}")
    return np.frombuffer(raw, dtype, offset=start).astype(dtype.newbyteorder("=")).reshape(shape)  # a copy: writable


def is_idx_name(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith("-ubyte")


def find_part(folder: Path, part: str, kind: str) -> Path | None:
    """Return the file of `part` ("train" or "t10k") and `kind` ("images" or "labels"), None where there is none."""
    candidates = (folder / name for name in _names(part, kind))
    return next((path for path in candidates if path.is_file()), None)


def _names(part: str, kind: str) -> list[str]:
    return [f"{part}-{kind}{dot}{PARTS[kind]}-ubyte{end}" for dot in "-." for end in ("", ".gz")]


def read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Return images (n, rows * columns), labels (n,) and the shape of an image.

    Raises: FileNotFoundError naming what was looked for, ValueError for files that do not belong together.
    """
    images_path, labels_path = (find_part(folder, part, kind) for kind in PARTS)
    for path, kind in ((images_path, "images"), (labels_path, "labels")):
        if path is None:
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "nothing"
            raise FileNotFoundError(f"{folder} has no {part} {kind}: looked for {_names(part, kind)}, found {there}")
    assert images_path is not None and labels_path is not None
    images, image_shape = read_images(images_path)
    labels = read_idx(labels_path)
    if labels.ndim != 1:
        raise ValueError(f"{labels_path} has shape {labels.shape}; expected one label per image")
    if len(labels) != len(images):
        raise ValueError(f"{labels_path} has {len(labels)} labels, {images_path.name} has {len(images)} images")
    return images, labels, image_shape


def read_images(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return images (n, rows * columns) and the shape of one."""
    images = read_idx(path)
    if images.ndim < 2:
        raise ValueError(f"{path} has shape {images.shape}; expected (images, rows, columns)")
    if images.size == 0:
        raise ValueError(f"{path} has no images, shape {images.shape}")
    return images.reshape(len(images), -1), images.shape[1:]
