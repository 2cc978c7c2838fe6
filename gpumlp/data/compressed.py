"""Opening files that may be compressed."""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, through gzip where its first bytes say so: its name may mislead, as browsers unpack."""
    file = open(path, "rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    file.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def read_bytes(path: Path) -> bytes:
    """Return all bytes, unpacked. Raises ValueError naming the file where its gzip is damaged or cut off."""
    try:
        with open_bytes(path) as file:
            return file.read()
    except DAMAGED as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
