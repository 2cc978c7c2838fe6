"""The file format: a safetensors file, a configuration as JSON in its metadata, and a checksum over both.

No code, no pickle, no import by name. The SHA-256 finds damage (not forgery). A file is written beside its place and
renamed into it, so that the name always holds a whole file, the old or the new one.

The reader takes nothing on trust: each check stands before the work that it makes safe. It reads the header itself, so
that there is no second reader of another opinion (the format's own library takes the last of two tensors of one name).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = "1"
# Bytes of a header, and brackets in it: an empty list, two bytes of text, takes 72 as an object. A training state needs
# more of both than a model: its header holds the history, a number for each epoch, metric and model of a fleet.
LARGEST_HEADER = {"model": 1 << 20, "state": 1 << 26}
MOST_BRACKETS = {"model": 1 << 16, "state": 1 << 21}
MOST_AXES = 32
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    **{f"{kind}{8 * n}": np.dtype(f"<{code}{n}") for kind, code in (("U", "u"), ("I", "i")) for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}
LONGEST_REASON = 2_000  # characters: a message may quote what the file says

Form = tuple[np.dtype, tuple[int, ...]]  # of a tensor: its dtype and shape


class FileError(ValueError):
    """A file that is not a gpumlp model or training state, or is damaged; the message names file and reason."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + ' ...'}")


def pack(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """The content of a file. Raises ValueError where the configuration takes more room than a reader allows."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    text = json.dumps(config, allow_nan=False)
    _check_room(len(text), kind)  # of far too much the library would raise an error of its own
    metadata = {
        "format": f"gpumlp {kind}",
        "format_version": FORMAT_VERSION,
        "config": text,
        "sha256": _digest(text, arrays),
    }
    data = _in_order(save(arrays, metadata=metadata))
    length = int.from_bytes(data[:8], "little")
    _check_room(length, kind)
    _check_brackets(data[8 : 8 + length].decode(), kind)
    return data


def _check_room(length: int, kind: str) -> None:
    if length > LARGEST_HEADER[kind]:
        raise ValueError(
            f"the {kind}'s configuration takes {length:,} bytes, and a file holds {LARGEST_HEADER[kind]:,}: use fewer or "
            "shorter names of classes and columns, or save a large fleet's models one by one"
        )


def _check_brackets(text: str, kind: str) -> None:
    found = text.count("[") + text.count("{")
    if found > MOST_BRACKETS[kind]:
        raise ValueError(f"the {kind}'s configuration has {found:,} brackets; a file may have {MOST_BRACKETS[kind]:,}")


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata in order, so that equal models give equal files: the library shuffles them."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read(path: Any, kind: str) -> bytes:
    """The content of a file whose size and header length are in order: a large file of another kind is not read.

    Raises:
        FileError: not a regular file (a pipe would never end), or its first bytes are not those of a ``kind``.
        OSError: it cannot be opened.
    """

    def content() -> bytes:
        with open(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            _header_length(file.read(8), size, path, kind)
            file.seek(0)
            return file.read(size)

    # Not to wait for somebody who writes into a pipe; on Windows the flags are others.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(path, "is not a regular file")
    return refusing(path, content)


def unpack(
    data: bytes, path: Any, kind: str, forms: Callable[[dict], dict[str, Form]] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors; everything is checked before a tensor is made.

    Args:
        data: the file's content.
        path: how errors call it.
        kind: "model" or "state".
        forms: gives, for a configuration that it has checked, the dtype and shape of each tensor; None takes any.

    Raises:
        FileError: anything is not as it should be.
    """

    def parse() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        body = 8 + _header_length(data[:8], len(data), path, kind)
        header = _table(data[8:body].decode("utf-8"), path, kind, "header")
        text, checksum = _metadata(header.pop("__metadata__", None), path, kind)
        config = _table(text, path, kind, "configuration")
        expected = None if forms is None else forms(config)
        places = {name: _place(name, entry, path) for name, entry in header.items()}
        if expected is not None and {name: place[:2] for name, place in places.items()} != expected:
            raise FileError(path, "its tensors are not those that its configuration describes")
        _check_places(places, len(data) - body, path)
        views = {
            name: np.ndarray(shape, dtype, buffer=data, offset=body + begin)
            for name, (dtype, shape, begin, _) in places.items()
        }
        if _digest(text, views) != checksum:
            raise FileError(path, "the checksum does not fit: the file is damaged")
        return config, {name: view.copy() for name, view in views.items()}

    return refusing(path, parse)


def _header_length(start: bytes, size: int, path: Any, kind: str) -> int:
    if size < 8 or len(start) < 8:
        raise FileError(path, f"has {size} bytes: it is empty or cut off")
    length = int.from_bytes(start[:8], "little")
    if 8 + length > size:
        raise FileError(path, "is not a safetensors file, or is cut off")
    if length > LARGEST_HEADER[kind]:
        raise FileError(path, f"has a header of {length:,} bytes; a {kind}'s has at most {LARGEST_HEADER[kind]:,}")
    return length


def _metadata(metadata: Any, path: Any, kind: str) -> tuple[str, str]:
    """The configuration's text and the checksum, of a file of the right kind and version."""
    form = metadata.get("format") if isinstance(metadata, dict) else None
    if form not in [f"gpumlp {kind}" for kind in LARGEST_HEADER]:
        raise FileError(path, "is a safetensors file, but not gpumlp's")
    if form != f"gpumlp {kind}":
        raise FileError(path, f"holds a {form}, expected a gpumlp {kind}")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise FileError(
            path, f"has format version {metadata.get('format_version')}; this gpumlp reads {FORMAT_VERSION}"
        )
    for name in ("config", "sha256"):
        if not isinstance(metadata.get(name), str):
            raise FileError(path, f"its metadata lack {name!r}")
    return metadata["config"], metadata["sha256"]


def _table(text: str, path: Any, kind: str, part: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise FileError(path, f"its {part} names something twice")
        return table

    def finite(number: str) -> float:
        value = float(number)
        if -math.inf < value < math.inf:
            return value
        raise FileError(path, f"its {part} holds {number}")  # JSON has no NaN or Infinity, but it has 1e999

    _check_brackets(text, kind)
    table = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    if not isinstance(table, dict):
        raise FileError(path, f"its {part} is not a table")
    return table


def _place(name: str, entry: Any, path: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, and the first byte and the end of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(path, f"its tensor {name:.100} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(path, f"its tensor {name:.100} has dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_AXES:
        raise FileError(path, f"the shape of its tensor {name:.100} is not a list of at most {MOST_AXES} lengths")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise FileError(path, f"the offsets of its tensor {name:.100} are not two numbers of bytes")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _check_places(places: dict[str, tuple[np.dtype, tuple[int, ...], int, int]], size: int, path: Any) -> None:
    """Raises FileError unless the tensors lie side by side and fill the file, each as long as its shape says."""
    reached = 0
    for name, (dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != reached or end - begin != math.prod(shape) * dtype.itemsize:
            raise FileError(
                path, f"its tensor {name:.100} does not lie where the one before it ends, or has another size"
            )
        reached = end
    if reached != size:
        raise FileError(path, f"its tensors take {reached:,} bytes, but {size:,} are there")


def _digest(config: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"|{name}|{values.dtype.str}|{values.shape}|".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def refusing(path: Any, action: Callable[[], Any]) -> Any:
    """What ``action`` returns; any error in it becomes a FileError that names the file."""
    try:
        return action()
    except FileError:
        raise
    except (Exception, RecursionError) as error:
        raise FileError(path, f"cannot be read: {type(error).__name__}: {error}") from error


def write_atomically(path: Any, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all: beside it, to disk, renamed into place.

    Whatever fails or interrupts it, the name holds the earlier file or the new one, and nothing else stays behind; only a
    process that is killed leaves its temporary file, ``.<name>.<8 hex digits>.part``.

    Raises:
        OSError: it could not be written, or the disk does not promise to keep it; the message names ``path``.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        try:
            _write_new(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":
            _sync_folder(path.parent)  # the rename itself
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # not the temporary one, which nobody asked for


def _write_new(path: Path, data: bytes) -> None:
    """A file that was not there before, on the disk when this returns."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]  # a write may take a part: 2 GB at most, or what the disk has left
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
