"""The README's Python runs as printed, block after block in one session."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    if not README.exists():
        pytest.skip("the README is not shipped with an installed package")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(blocks) >= 4
    session: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    out = capsys.readouterr().out
    assert "19,210 parameters" in out and "accuracy" in out
    assert len(session["best"].predict(session["data"].X_test)) == len(session["data"].X_test)


def test_nothing_is_left_to_fill_in():
    if not README.exists():
        pytest.skip("the README is not shipped with an installed package")
    assert not re.findall(r"^[A-Z_]{6,}$", README.read_text("utf-8"), re.M)


def test_every_promise_names_a_test():
    if not README.exists():
        pytest.skip("the README is not shipped with an installed package")
    promises = README.read_text("utf-8").split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line and line != "| | |"]
    for row in rows:
        named = re.findall(r"`(tests|bench)/(\w+\.py)(?:::(\w+))?`", row)
        assert named, row
        for folder, file, test in named:
            text = (README.parent / folder / file).read_text("utf-8")
            assert not test or f"def {test}(" in text, f"{folder}/{file}::{test}"
    assert len(rows) >= 10
