"""Choices that were timed once, kept on disk: which of several ways to do the same work is the fastest on this device.

A cache may be lost or damaged at any time; what it held is then timed again. So nothing here raises for a file's sake.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from ..container import write_atomically

FORMAT = 1


class TuningCache:
    """The choices for one device with one set of versions: by key, an index or a text that names the choice.

    Args:
        device: its name, say "NVIDIA H100 80GB HBM3".
        versions: of all that offers the choices, say "cuBLASLt 131000, gpumlp 0.2.0"; others have a file of their own.
    """

    def __init__(self, device: str, versions: str) -> None:
        self._about: dict[str, Any] = {"format": FORMAT, "device": device, "versions": versions}
        self._choices: dict[str, int | str] | None = None  # read when first asked
        self._warned = False

    @property
    def path(self) -> Path:
        """A readable name, told apart from others by a hash of device and versions."""
        name = re.sub(r"\W+", "-", self._about["device"])[:60].strip("-")
        digest = hashlib.sha256(json.dumps(self._about).encode()).hexdigest()[:16]
        return cache_folder() / f"tuning-{name}-{digest}.json"

    def get(self, key: str) -> int | str | None:
        """The choice, None where none is known."""
        if self._choices is None:
            self._choices = self._read()
        return self._choices.get(key)

    def put(self, key: str, value: int | str) -> None:
        """Remember a choice, in this object always and on disk where that can be written."""
        known = self._choices or {}
        # What other processes have added meanwhile stays. Of two that write at once one loses, and times again.
        self._choices = {**self._read(), **known, key: value}
        try:
            path = self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({**self._about, "choices": self._choices}, indent=1).encode())
        except (OSError, RuntimeError) as error:
            self._warn(f"choices timed on this device cannot be kept: {error}")

    def _read(self) -> dict[str, int | str]:
        try:
            content = json.loads(self.path.read_bytes())
            choices = content.pop("choices")
            if content != self._about:
                raise ValueError("it is about another device or other versions")
            if any(type(value) not in (int, str) for value in choices.values()):
                raise ValueError("it holds something that is no choice")
        except FileNotFoundError:
            return {}
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, or JSON too deep
            self._warn(f"choices timed on this device cannot be read: {error}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            self._warn(f"{self.path} is damaged and is not used: {error}")
        else:
            return choices
        return {}

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{reason}. Set GPUMLP_CACHE_DIR to another folder, or delete the file", stacklevel=4)


def cache_folder() -> Path:
    """GPUMLP_CACHE_DIR, or where the platform keeps such files for a user; perhaps not there yet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if given := os.environ.get("GPUMLP_CACHE_DIR"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gpumlp" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gpumlp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpumlp"
