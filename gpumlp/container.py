"""The file format: a safetensors file, a configuration as JSON in its metadata, and a checksum over both.

No code, no pickle, no import by name. The SHA-256 finds damage (not forgery). A file is written beside its place and
renamed into it, so that the name always holds a whole file, the old or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = "1"
LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it


class FileError(ValueError):
    """A file that is not a gpumlp model or training state, or is damaged; the message names file and reason."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def pack(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    text = json.dumps(config, allow_nan=False)
    if len(text) > LARGEST_HEADER // 2:  # names and quotes take some room too
        raise ValueError(f"the {kind}'s configuration takes {len(text):,} bytes, too many for a safetensors header")
    metadata = {
        "format": f"gpumlp {kind}",
        "format_version": FORMAT_VERSION,
        "config": text,
        "sha256": _digest(text, arrays),
    }
    return _in_order(save(arrays, metadata=metadata))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata in order, so that equal models give equal files: the library shuffles them."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def unpack(
    data: bytes, path: Any, kind: str, shapes: Callable[[dict], dict[str, tuple[int, ...]]] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors; everything is checked before a tensor is made. Raises FileError."""

    def read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header = _header(data, path)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not str(metadata.get("format", "")).startswith("gpumlp "):
            raise FileError(path, "is a safetensors file, but not gpumlp's")
        if metadata["format"] != f"gpumlp {kind}":
            raise FileError(path, f"holds a {metadata['format']}, expected a gpumlp {kind}")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise FileError(
                path, f"has format version {metadata.get('format_version')}; this gpumlp reads {FORMAT_VERSION}"
            )
        config = _json(metadata["config"], path)
        if shapes is not None:
            expected = {name: list(shape) for name, shape in shapes(config).items()}
            if {name: entry["shape"] for name, entry in header.items()} != expected:
                raise FileError(path, "its tensors are not those that its configuration describes")
        from safetensors.numpy import load as load_tensors

        tensors = load_tensors(data)
        if _digest(metadata["config"], tensors) != metadata.get("sha256"):
            raise FileError(path, "the checksum does not fit: the file is damaged")
        return config, tensors

    return refusing(path, read)


def _header(data: bytes, path: Any) -> dict[str, Any]:
    if len(data) < 8:
        raise FileError(path, f"has {len(data)} bytes: it is empty or cut off")
    length = int.from_bytes(data[:8], "little")
    if length > LARGEST_HEADER or 8 + length > len(data):
        raise FileError(path, "is not a safetensors file, or is cut off")
    header = _json(data[8 : 8 + length].decode("utf-8"), path)
    if not isinstance(header, dict):
        raise FileError(path, "its header is not a table")
    return header


def _json(text: str, path: Any) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise FileError(path, "its header names something twice")
        return table

    def refuse(constant: str) -> Any:
        raise FileError(path, f"its header holds {constant}")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


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

    Raises:
        OSError: nothing was written, or the rename failed; an earlier file stays as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
