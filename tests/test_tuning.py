"""The cache of timed choices: what is put is found again, and no file whatsoever makes it raise."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest

from gpumlp.backends import tuning
from gpumlp.backends.tuning import TuningCache, cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "to" / "cache"  # made when first written to
    monkeypatch.setenv("GPUMLP_CACHE_DIR", str(folder))
    return folder


def cache(device="NVIDIA H100 80GB HBM3", versions="cuBLASLt 131000"):
    return TuningCache(device, versions)


def test_what_was_put_is_found_again(folder):
    one = cache()
    assert one.get("forward") is None and not folder.exists()
    one.put("forward", 2)
    one.put("product, a f32 3x5x7", "00ff")
    one.put("forward", 1)
    for each in (one, cache()):
        assert each.get("forward") == 1
        assert each.get("product, a f32 3x5x7") == "00ff"
        assert each.get("backward") is None
    assert [path.name for path in folder.iterdir()] == [one.path.name]  # no temporary file is left
    assert one.path.name.startswith("tuning-NVIDIA-H100-80GB-HBM3-")
    assert json.loads(one.path.read_text()) == {
        "format": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "versions": "cuBLASLt 131000",
        "choices": {"forward": 1, "product, a f32 3x5x7": "00ff"},
    }


def test_a_device_and_a_version_have_a_file_each():
    caches = [cache(), cache(device="NVIDIA H100 80GB PCIe"), cache(versions="cuBLASLt 131001"), cache(device="½ / ..")]
    for i, each in enumerate(caches):
        each.put("key", i)
    assert [each.get("key") for each in caches] == [*range(4)]
    assert len({each.path for each in caches}) == 4
    assert {each.path.parent for each in caches} == {cache_folder()}


def test_what_another_process_adds_stays():
    one, other = cache(), cache()
    assert one.get("a") is None and other.get("a") is None
    one.put("a", 1)
    other.put("b", 2)
    assert (other.get("a"), other.get("b")) == (1, 2)
    one.put("c", 3)
    assert [cache().get(key) for key in "abc"] == [1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"choices": {}}',
        b"[" * 100_000,
        {"choices": []},
        {"choices": {"key": 1.5}},
        {"choices": {"key": True}},
        {"choices": {"key": 1}, "format": 2},
        {"choices": {"key": 1}, "versions": "others"},
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_damaged_file_is_left_aside_with_one_warning(content):
    path = cache().path
    path.parent.mkdir(parents=True)
    if isinstance(content, dict):
        about = {"format": 1, "device": "NVIDIA H100 80GB HBM3", "versions": "cuBLASLt 131000"}
        content = json.dumps(about | content).encode()
    path.write_bytes(content)
    one = cache()
    with pytest.warns(UserWarning, match=r"GPUMLP_CACHE_DIR") as caught:
        assert one.get("key") is None
        assert one.get("key") is None
        one.put("other", 1)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "cannot be read" in str(caught[0].message) or f"{path} is damaged" in str(caught[0].message)
    assert cache().get("other") == 1  # written anew


def test_a_folder_that_cannot_be_written_costs_one_warning(folder):
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    one = cache()
    with pytest.warns(UserWarning, match="timed on this device cannot be") as caught:
        one.get("a")
        one.put("a", 1)
        one.put("b", 2)
    assert len(caught) == 1
    assert (one.get("a"), one.get("b")) == (1, 2)  # this process knows them all the same


def test_a_write_that_fails_leaves_the_earlier_file(monkeypatch):
    cache().put("a", 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    one = cache()
    with pytest.warns(UserWarning, match="cannot be kept.*No space left on device.*Set GPUMLP_CACHE_DIR"):
        one.put("b", 2)
    assert cache().get("a") == 1 and cache().get("b") is None
    assert len(list(one.path.parent.iterdir())) == 1


def test_no_home_folder(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    for name in ("GPUMLP_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    one = cache()
    with pytest.warns(UserWarning, match="Could not determine home directory") as caught:
        assert one.get("a") is None
        one.put("a", 1)
    assert len(caught) == 1 and one.get("a") == 1


def test_where_it_is(monkeypatch, folder):
    assert cache_folder() == folder
    monkeypatch.delenv("GPUMLP_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("home/.cache/gpumlp")
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert cache_folder() == Path("elsewhere/gpumlp")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("home/Library/Caches/gpumlp")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_folder() == Path("home/AppData/Local/gpumlp/cache")
    monkeypatch.setenv("LOCALAPPDATA", "local")
    assert cache_folder() == Path("local/gpumlp/cache")


def test_reading_is_silent_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache().put("a", 1)
        assert cache().get("a") == 1 and tuning.FORMAT == 1
