"""What all tests share: those that take minutes wait until they are asked for, those that need a GPU until there is one."""

import pytest

from gpumlp.backends.probe import find_gpu


def pytest_collection_modifyitems(config, items):
    asked_for = config.option.markexpr or ""
    if "long" not in asked_for:
        _skip(items, "long", "takes minutes; run it with: pytest -m long")
    if any(item.get_closest_marker("gpu") for item in items):
        runtime, reason = find_gpu(None)
        if runtime is None:
            _skip(items, "gpu", reason)


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
