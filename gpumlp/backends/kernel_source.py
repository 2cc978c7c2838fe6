"""Where the CUDA sources are: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def kernel_path(name: str) -> Path:
    """The file ``name`` of ``kernels/``, say "philox.cuh".

    Raises:
        FileNotFoundError: it is in neither place: the installation is incomplete.
    """
    for folder in (PACKAGE / "kernels", PACKAGE.parent / "kernels"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"kernels/{name} is neither in {PACKAGE} nor beside it: install gpumlp again")
