"""What all tests share: those that take minutes wait until they are asked for."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "long" in (config.option.markexpr or ""):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with: pytest -m long"))
