"""Files that somebody damaged or forged: FileError or the same content, no code run, no more memory than they may take.

The work is done in processes of its own, so that a crash, a hang or a growing memory is seen and not shared.
"""

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import gpumlp as gm
from gpumlp import container, files

HERE, PACKAGE = Path(__file__).parent, Path(gm.__file__).parent
SOFTMAX = "softmax_cross_entropy"
FEATURES = 3
MEMORY = 64 << 20  # bytes that a refused file may take beside its own size
LONG = partial(pytest.param, marks=pytest.mark.long)


def small_model():
    """The content of a file with every kind of tensor and setting, of about 2 KB."""
    net = gm.Network(
        [gm.Dense(2, "elu(0.5)", norm="batch", dropout=0.1), gm.Dense(2)],
        n_features=FEATURES,
        seed=1,
        standardize=True,
        device="cpu",
    )
    gm.Trainer(net, gm.Loss(SOFTMAX, class_weight={0: 2.0})).fit(*table(), epochs=1, batch_size=4)
    net.feature_names = ["a", "b", "ü"]
    return files.to_bytes(net)


def table():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, FEATURES)), np.array(["no", "yes"] * 4)


def small_table_model():
    """The content of a file whose network takes tables: numbers, one-hot categories, and codes with their vectors."""
    people = {"age": [30.0, None, 50.0, 41.0], "city": ["Oslo", "Rome", None, "Bonn"], "member": [True, False] * 2}
    encoder = gm.TableEncoder(scaling="quantile", one_hot_limit=3).fit(people)
    net = gm.Network([gm.Embedding((5,), 2), gm.Dense(2)], encoder=encoder, seed=1, device="cpu")
    gm.Trainer(net, SOFTMAX).fit(people, ["no", "yes"] * 2, epochs=1)
    return files.to_bytes(net)


def small_state(folder):
    """The content of a training state."""
    trainer = gm.Trainer(gm.Network([gm.Dense(2)], n_features=FEATURES, device="cpu"), SOFTMAX)
    trainer.fit(*table(), epochs=2, batch_size=4)
    trainer.save_state(Path(folder) / "state")
    return (Path(folder) / "state").read_bytes()


def elsewhere(action, *args, timeout=3000):
    """What a function of this module returns in a fresh process, as JSON brings it."""
    program = "import json, sys, test_hostile_files as t; print(json.dumps(getattr(t, sys.argv[1])(*sys.argv[2:])))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, action, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(PACKAGE.parent)]), "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# --- parts of files ----------------------------------------------------------------------------------------------------


def split(data):
    """Header, as a table, and tensors."""
    body = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:body]), data[body:]


def joined(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_header(change):
    """The model with another header around the same tensors."""

    def build(model):
        header, body = split(model)
        changed = change(header)
        return joined(header if changed is None else changed, body)

    return build


def with_text(old, new):
    """The model with other text in its header."""

    def build(model):
        body = 8 + int.from_bytes(model[:8], "little")
        assert old in model[8:body]
        return joined(model[8:body].replace(old, new, 1), model[body:])

    return build


def with_config(text):
    """A model whose configuration is ``text``, and whose checksum fits."""

    def build(model):
        _, tensors = container.unpack(model, "model", "model", None)
        header, body = split(model)
        header["__metadata__"] |= {"config": text, "sha256": container._digest(text, tensors)}
        return joined(header, body)

    return build


def forged(change):
    """A model with another configuration or other tensors, and a checksum that fits."""

    def build(model):
        config, tensors = container.unpack(model, "model", "model", None)
        change(config, tensors)
        return container.pack("model", config, tensors)

    return build


def tabled(change):
    """A model over tables with another encoder, and a checksum that fits."""
    table_model = small_table_model()

    def build(model):
        return forged(lambda config, tensors: change(config["encoder"], tensors))(table_model)

    return build


def tensor(**values):
    """The model's first weights described in another way."""
    return with_header(lambda header: header["dense_0.W"].update(values))


def layer(**values):
    return forged(lambda config, tensors: config["layers"][1].update(values))


def setting(**values):
    return forged(lambda config, tensors: config.update(values))


def towers(config, tensors):
    """Sixty layers that double the width and have no parameters."""
    config["layers"] = [{"kind": "input", "units": 1}] + [{"kind": "concat"}] * 60
    config["reads"] = [[]] + [[i, i] for i in range(60)]
    config.update(scaled=[], loss=None, classes=None)
    tensors.clear()


class Payload:
    """A pickle that would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def archive(model):
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as file:
        file.writestr("../model", model)
    return found.getvalue()


def npz(model):
    found = io.BytesIO()
    np.savez(found, np.array([Payload()], dtype=object))
    return found.getvalue()


def tar(model):
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w") as file:
        file.addfile(tarfile.TarInfo("/tmp/model"))
    return found.getvalue()


def many_words(model):
    """As many categories as a file may have, of letters that take four bytes each, and a network of another width."""
    words = "".join(map(chr, range(0x10000, 0x10000 + (1 << 18)))).encode()
    ends = np.arange(4, len(words) + 1, 4, dtype=np.int64)

    def change(config, tensors):
        for name in [name for name in tensors if name.startswith("encoder.")]:
            del tensors[name]
        tensors.update({"encoder.words": np.frombuffer(words, np.uint8), "encoder.word_ends": ends})
        column = {"names": ["c"], "kinds": "o", "missing": [0], "words": [len(ends)]}
        config["encoder"].update(column, n_word_bytes=len(words), n_quantiles=0)

    return forged(change)(small_table_model())


def million_tensors(model):
    entry = b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return joined(b"{" + b",".join(b'"%d' % i + entry for i in range(1_000_000)) + b"}")


# --- files that lie -----------------------------------------------------------------------------------------------------

CUT, OTHER, SHAPES = "is not a safetensors file, or is cut off", "but not gpumlp's", "its tensors are not those that"
LIES = "does not lie where the one before it ends, or has another size"
MIB = 1 << 20

CONTENTS = {  # what is in the file, given a good model, and what is said about it
    # its first eight bytes
    "empty": (lambda model: b"", "has 0 bytes: it is empty or cut off"),
    "seven bytes": (lambda model: model[:7], "has 7 bytes: it is empty or cut off"),
    "zeros": (lambda model: bytes(64), "cannot be read: JSONDecodeError"),
    "length 2^64 - 1": (lambda model: b"\xff" * 8 + model[8:], CUT),
    "length 2^63": (lambda model: (1 << 63).to_bytes(8, "little") + model[8:], CUT),
    "length one beyond": (lambda model: (len(model) - 7).to_bytes(8, "little") + model[8:], CUT),
    "length of all": (lambda model: (len(model) - 8).to_bytes(8, "little") + model[8:], "cannot be read"),
    "length one less": (lambda model: (int.from_bytes(model[:8], "little") - 1).to_bytes(8, "little") + model[8:], ""),
    "a million empty tensors": (million_tensors, r"has a header of [\d,]+ bytes; a model's has at most 1,048,576"),
    "one byte above a MiB": (lambda model: joined(b" " * (MIB + 1)), "has a header of 1,048,577 bytes"),
    # JSON
    "a MiB of lists": (
        lambda model: joined(b'{"a":[' + b"[]," * 349_000 + b"0]}"),
        "has 349,002 brackets; a file may have 65,536",
    ),
    "a MiB of tables": (
        lambda model: joined(b'{"a":[' + b'{"":0},' * 149_000 + b"0]}"),
        "has 149,002 brackets; a file may have",
    ),
    "60,000 lists": (lambda model: joined(b'{"a":[' + b"[]," * 60_000 + b"0]}"), OTHER),
    "60,000 tables": (lambda model: joined(b'{"a":[' + b'{"":0},' * 60_000 + b"0]}"), OTHER),
    "a MiB of numbers": (lambda model: joined(b'{"a":[' + b"0.5," * 262_000 + b"0]}"), OTHER),
    "a MiB of names": (lambda model: joined(b'{"a":[' + b'"a",' * 262_000 + b"0]}"), OTHER),
    "a MiB of one number": (lambda model: joined(b'{"a":' + b"9" * (MIB - 6) + b"}"), "Exceeds the limit"),
    "500,000 lists deep": (lambda model: joined(b"[" * 500_000 + b"]" * 500_000), "500,000 brackets"),
    "200,000 tables deep": (lambda model: joined(b'{"":' * 200_000 + b"0" + b"}" * 200_000), "200,000 brackets"),
    "60,000 lists deep": (lambda model: joined(b"[" * 60_000 + b"]" * 60_000), "RecursionError"),
    "60,000 tables deep": (lambda model: joined(b'{"":' * 60_000 + b"0" + b"}" * 60_000), "RecursionError"),
    "NaN": (with_text(b"[1,2,2]", b"[1,2,NaN]"), "its header holds NaN"),
    "-Infinity": (with_text(b"[1,2,2]", b"[1,2,-Infinity]"), "its header holds -Infinity"),
    "1e999": (with_text(b"[1,2,2]", b"[1,2,1e999]"), "its header holds 1e999"),
    "5000 digits": (with_text(b"[1,2,2]", b"[1,2," + b"1" * 5000 + b"]"), "Exceeds the limit"),
    "not UTF-8": (with_text(b"dense_1", b"dens\xff_1"), "UnicodeDecodeError"),
    "UTF-16": (lambda model: joined("{}".encode("utf-16")), "UnicodeDecodeError"),
    "byte order mark": (lambda model: joined(b"\xef\xbb\xbf{}"), "cannot be read: JSONDecodeError"),
    "more after the table": (with_text(b"}}", b"}} {}"), "cannot be read: JSONDecodeError"),
    "a list": (lambda model: joined([1, 2]), "its header is not a table"),
    "null": (lambda model: joined(None), "its header is not a table"),
    "one tensor twice": (with_text(b'"dense_1.b"', b'"dense_1.W"'), "its header names something twice"),
    "one setting twice": (with_text(b'"format":', b'"sha256":"","format":'), "its header names something twice"),
    # metadata
    "no metadata": (with_header(lambda header: header.pop("__metadata__") and None), OTHER),
    "metadata of numbers": (with_header(lambda header: header.update(__metadata__={"format": 1})), OTHER),
    "format is a list": (with_header(lambda header: header["__metadata__"].update(format=["gpumlp model"])), OTHER),
    "version 2": (
        with_header(lambda header: header["__metadata__"].update(format_version="2")),
        "has format version 2",
    ),
    "version is a number": (
        with_header(lambda header: header["__metadata__"].update(format_version=1)),
        "has format version 1; this gpumlp reads 1",
    ),
    "a state": (
        with_header(lambda header: header["__metadata__"].update(format="gpumlp state")),
        "holds a gpumlp state, expected a gpumlp model",
    ),
    "no checksum": (
        with_header(lambda header: header["__metadata__"].pop("sha256") and None),
        "its metadata lack 'sha",
    ),
    "another checksum": (
        with_header(lambda header: header["__metadata__"].update(sha256="0" * 64)),
        "checksum does not",
    ),
    "configuration is a table": (
        with_header(lambda header: header["__metadata__"].update(config={})),
        "its metadata lack 'config'",
    ),
    # tensors
    "overlap": (tensor(data_offsets=[0, 16]), SHAPES + "|" + LIES),
    "all tensors in one place": (
        with_header(lambda header: [v.update(data_offsets=[0, 8]) for v in list(header.values())[1:]] and None),
        LIES,
    ),
    "a hole": (lambda model: joined(split(model)[0], bytes(8) + split(model)[1]), "its tensors take"),
    "bytes after the last": (lambda model: model + bytes(8), "its tensors take .* bytes, but .* are there"),
    "tensors missing": (lambda model: joined(split(model)[0]), "its tensors take .* bytes, but 0 are there"),
    "end before begin": (tensor(data_offsets=[24, 0]), LIES),
    "offsets beyond the file": (tensor(data_offsets=[1 << 40, (1 << 40) + 24]), LIES),
    "negative offsets": (tensor(data_offsets=[-24, 0]), "the offsets of its tensor dense_0.W are not two numbers"),
    "fractional offsets": (tensor(data_offsets=[0.0, 24.0]), "the offsets of its tensor dense_0.W are not two"),
    "three offsets": (tensor(data_offsets=[0, 24, 24]), "the offsets of its tensor dense_0.W are not two"),
    "70 axes": (tensor(shape=[1] * 70), "the shape of its tensor dense_0.W is not a list of at most 32 lengths"),
    "0 x 2^62": (tensor(shape=[0, 1 << 62]), SHAPES),
    "2^62": (tensor(shape=[1 << 62]), SHAPES),
    "2^32 x 2^32": (tensor(shape=[1 << 32, 1 << 32]), SHAPES),
    "2^64": (tensor(shape=[1 << 64]), "the shape of its tensor dense_0.W is not"),
    "a length of true": (tensor(shape=[True, 2, 3]), "the shape of its tensor dense_0.W is not"),
    "BF16": (tensor(dtype="BF16"), "its tensor dense_0.W has dtype 'BF16'; allowed: BOOL"),
    "F4": (tensor(dtype="F4"), "its tensor dense_0.W has dtype 'F4'"),
    "object dtype": (tensor(dtype="|O"), r"its tensor dense_0.W has dtype '\|O'"),
    "dtype is a list": (tensor(dtype=["F32"]), r"its tensor dense_0.W has dtype \['F32'\]"),
    "I32": (tensor(dtype="I32"), SHAPES),
    "something else in a tensor": (tensor(code="import os"), "its tensor dense_0.W has not just dtype, shape and data"),
    "a tensor that is none": (with_header(lambda header: header.update({"dense_0.W": 1})), "dense_0.W has not just"),
    "one tensor more": (forged(lambda config, tensors: tensors.update(more=np.ones(2))), SHAPES),
    "one tensor less": (forged(lambda config, tensors: tensors.pop("dense_1.b")), SHAPES),
    "float64 weights": (forged(lambda config, tensors: tensors.update({"dense_1.b": np.ones((1, 2))})), SHAPES),
    "a name with dots": (with_text(b'"dense_0.W"', b'"../../W"'), SHAPES),
    # the configuration
    "configuration of text": (with_config("layers"), "cannot be read: JSONDecodeError"),
    "configuration is a list": (with_config("[]"), "its configuration is not a table"),
    "empty configuration": (with_config("{}"), "KeyError: 'layers'"),
    "deep configuration": (with_config("[" * 60_000), "RecursionError"),
    "a setting twice": (with_config('{"layers": [], "layers": []}'), "its configuration names something twice"),
    "endless number": (with_config('{"layers": -1e999}'), "its configuration holds -1e999"),
    "5000 digits in the configuration": (with_config('{"models": ' + "1" * 5000 + "}"), "Exceeds the limit"),
    "width 2^60": (layer(units=1 << 60), "a layer has 1,152,921,504,606,846,976 units; a file may have 16,777,216"),
    "width 2^24": (layer(units=1 << 24), SHAPES),
    "10,000 layers": (
        setting(layers=[{"kind": "add"}] * 10_000, reads=[[]] * 10_000),
        "the network must be a list of 1 to 1,000 layers",
    ),
    "10^12 models": (setting(models=10**12), "seeds has 1 values for 1000000000000 models"),
    "sixty towers": (forged(towers), "layers that are joined have more than 16,777,216 units"),
    "long names of many classes": (
        setting(classes=["a" * 500_000] + ["b"] * 1_000),
        "1,001 classes, the longest name of 500,000 characters, are too many",
    ),
    "classes of tables": (setting(classes=[{}]), "classes must be a list of names or numbers, or null"),
    "fractional steps": (setting(steps=[0.5]), "steps must be a list of integers"),
    "seed of 4000 digits": (setting(seeds=[10**4000]), "seed"),
    "a dotted name": (layer(name="a.b"), r"layer name 'a\.b' must be a string, unique and without a dot"),
    "dropout of tables": (layer(dropout=[{}]), "must be a number in"),
    "dropout of 300,000 models": (layer(dropout=[0] * 300_000), "300000 values for 1 models"),
    "an activation of code": (layer(activation="__import__('os').system('id')"), "activation="),
    "an activation of a module": (layer(activation="os.system"), "activation='os.system' is unknown"),
    "a loss of code": (setting(loss={"name": "os.system"}), "loss='os.system' is unknown"),
    "a layer of a class": (layer(kind="Lambda"), "KeyError: 'Lambda'"),
    "a layer with a class": (layer(__class__="os.system"), "TypeError"),
    "a loss with another self": (setting(loss={"name": SOFTMAX, "self": 1}), "TypeError"),
    # the encoder of tables
    "an encoder of text": (setting(encoder="os.system"), "not a table encoder's configuration"),
    "an encoder of nothing": (setting(encoder={}), "not a table encoder's configuration"),
    "an encoder of code": (tabled(lambda e, t: e.update(scaling="__import__('os')")), "do not fit together"),
    "other columns": (tabled(lambda e, t: e.update(kinds=e["kinds"][:-1])), "do not fit together"),
    "a column of another kind": (
        tabled(lambda e, t: e.update(kinds="l" + e["kinds"][1:])),
        "do not fit together",
    ),
    "two columns of one name": (tabled(lambda e, t: e["names"].__setitem__(1, "age")), "do not fit together"),
    "10^9 categories": (tabled(lambda e, t: e["words"].__setitem__(0, 10**9)), "do not fit together"),
    "10^9 quantiles": (tabled(lambda e, t: e.update(n_quantiles=10**9)), "do not fit together"),
    "-1 missing cells": (tabled(lambda e, t: e["missing"].__setitem__(0, -1)), "not a table encoder's"),
    "NaN among the quantiles": (tabled(lambda e, t: t["encoder.quantiles"].fill(np.nan)), "are not all finite"),
    "falling quantiles": (
        tabled(
            lambda e, t: (
                t["encoder.quantiles"].sort(axis=1) or np.negative(t["encoder.quantiles"], out=t["encoder.quantiles"])
            )
        ),
        "not in ascending order",
    ),
    "words beyond their end": (tabled(lambda e, t: t["encoder.word_ends"].__setitem__(-1, 2**62)), "do not divide"),
    "words that go backwards": (tabled(lambda e, t: t["encoder.word_ends"].__setitem__(0, -5)), "do not divide"),
    "words that are no text": (tabled(lambda e, t: t["encoder.words"].fill(0xFF)), "UnicodeDecodeError"),
    "words out of order": (tabled(lambda e, t: t["encoder.words"].__setitem__(0, 0x7E)), "not in ascending order"),
    "a quarter of a million categories": (many_words, "the encoder makes 262144 columns|its tensors are not those"),
    # other formats
    "pickle": (lambda model: pickle.dumps(Payload()), CUT),
    "pickle of protocol 0": (lambda model: pickle.dumps(Payload(), 0), CUT),
    "pickle in a header": (lambda model: joined(pickle.dumps(Payload())), "cannot be read"),
    "zip": (archive, CUT),
    "npz with objects": (npz, CUT),
    "tar": (tar, CUT),
    "gzip": (lambda model: b"\x1f\x8b\x08" + bytes(100), CUT),
    "HDF5": (lambda model: b"\x89HDF\r\n\x1a\n" + bytes(1000), CUT),
    "ELF": (lambda model: b"\x7fELF\x02\x01\x01" + bytes(1000), "has a header of|is not a safetensors"),
    "text": (lambda model: b"epoch,loss\n1,0.5\n", CUT),
    "noise": (lambda model: np.random.default_rng(0).bytes(4096), CUT),
}


def sparse(path, model):
    """64 GB that take no room on the disk."""
    with open(path, "wb") as file:
        file.write((1 << 35).to_bytes(8, "little"))
        file.truncate(1 << 36)


PLACES = {  # what stands at the path, and what is said about it
    "folder": (lambda path, model: path.mkdir(), "is not a regular file"),
    "pipe": (lambda path, model: os.mkfifo(path), "is not a regular file"),
    "endless zeros": (lambda path, model: path.symlink_to("/dev/zero"), "is not a regular file"),
    "link to a folder": (lambda path, model: path.symlink_to("/tmp"), "is not a regular file"),
    "64 GB": (sparse, r"has a header of 34,359,738,368 bytes; a model's has at most"),
}


def put(place, path, model):
    if place in CONTENTS:
        path.write_bytes(CONTENTS[place][0](model))
    else:
        PLACES[place][0](path, model)


def read_all(folder):
    """For each file of a folder: the error's kind and text, and the most memory that it took beside its size."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        size = path.stat().st_size if path.is_file() else 0
        tracemalloc.start()
        try:
            gm.load(path, device="cpu")
            kind, text = "none", ""
        except Exception as error:
            kind, text = type(error).__name__, str(error)
        found[path.name] = [kind, text, tracemalloc.get_traced_memory()[1] - min(size, MEMORY)]
        tracemalloc.stop()
    return found


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("hostile")
    for place in [*CONTENTS, *PLACES]:
        put(place, made / place.replace("/", " of "), model)
    return made


@pytest.fixture(scope="module")
def answers(folder):
    return elsewhere("read_all", folder, timeout=100)  # a pipe or a device would hold it for ever


@pytest.mark.parametrize("case", [*CONTENTS, *PLACES])
def test_a_hostile_file_is_refused(case, answers, folder):
    kind, text, memory = answers[case]
    assert kind == "FileError" and text.startswith(f"{folder / case}: ")
    assert re.search((CONTENTS | PLACES)[case][1], text)
    assert len(text) < 3000 and memory < MEMORY
    assert len(CONTENTS | PLACES) >= 40


def test_what_cannot_be_opened_is_an_os_error(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", "none", "n" * 300):
        with pytest.raises(OSError):
            gm.load(tmp_path / name)


def test_what_is_damaged_while_it_is_read_is_a_file_error(model, tmp_path, monkeypatch):
    (tmp_path / "model").write_bytes(model)
    monkeypatch.setattr(os, "fstat", lambda *args: os.stat(tmp_path / "model"))
    real = open

    class Broken(io.BytesIO):
        def read(self, *args):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda file, *args: (real(file, *args).close(), Broken())[1])
    with pytest.raises(gm.FileError, match=r"cannot be read: OSError: .*Input/output error"):
        gm.load(tmp_path / "model")


def test_no_memory_is_a_file_error(model, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    (tmp_path / "model").write_bytes(model)
    monkeypatch.setattr(container, "_digest", fail)
    with pytest.raises(gm.FileError, match="cannot be read: MemoryError"):
        gm.load(tmp_path / "model", device="cpu")


def test_a_message_stays_short():
    assert len(str(gm.FileError("path", "x" * 10**6))) < 2_100


# --- no code ------------------------------------------------------------------------------------------------------------

CODE = (
    "pickle",
    "exec",
    "compile",
    "import",
    "subprocess",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "socket",
)
CODE += (
    "marshal",
    "ctypes",
    "code.__new__",
    "builtins.input",
    "urllib",
    "os.remove",
    "os.rename",
    "shutil",
    "webbrowser",
)


def listen(folder):
    """The audit events of code while every file of a folder is read."""
    (good,) = [path for path in Path(folder).iterdir() if path.name == "good"]
    gm.load(good, device="cpu")  # what NumPy and we import late is no file's doing
    read_all_once(folder)
    heard, listening = [], [True]
    sys.addaudithook(lambda event, args: heard.append(event) if listening[0] else None)
    refused = read_all_once(folder)
    gm.load(good, device="cpu")
    listening[0] = False
    code = [event for event in heard if event.startswith(CODE)]
    return {"code": code, "opened": heard.count("open"), "refused": refused}


def read_all_once(folder):
    refused = 0
    for path in Path(folder).iterdir():
        try:
            gm.load(path, device="cpu")
        except gm.FileError:
            refused += 1
    return refused


def test_no_file_runs_code(folder, model, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "good").write_bytes(model)
    found = elsewhere("listen", tmp_path, timeout=100)
    assert found["refused"] == len(CONTENTS | PLACES)
    assert found["opened"] > found["refused"]  # the hook does hear
    assert found["code"] == []
    assert not Path("code_was_run").exists()


def unsafe(source):
    """What could run code that came from elsewhere: modules that do, and builtins that do."""
    modules = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy", "code", "codeop", "imp"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in modules)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in modules:
            yield node.module
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            yield node.id
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and getattr(node.value, "value", 1) is not False
        ):
            yield "allow_pickle"


def test_the_package_has_nothing_that_runs_code():
    checked = list(PACKAGE.rglob("*.py"))
    assert len(checked) > 30
    assert [(path.name, found) for path in checked for found in unsafe(path.read_text("utf-8"))] == []
    bad = "import pickle as p\nfrom marshal import loads\neval('1')\nf = exec\nnp.load(path, allow_pickle=True)"
    assert sorted(unsafe(bad)) == ["allow_pickle", "eval", "exec", "marshal", "pickle"]


# --- damage -------------------------------------------------------------------------------------------------------------


def take_model(data):
    """A model's content as its reader understood it."""
    return files.to_bytes(files.from_bytes(data, "file", device="cpu"))


def take_state(data):
    config, tensors = container.unpack(data, "file", "state", None)
    return container.pack("state", config, tensors)


READERS = {"model": take_model, "table": take_model, "state": take_state}
STRANGE = (None, True, -1, 0, 0.5, 2**62, 10**30, "", "x", "F16", [], [0], {}, [[]], {"a": 1}, "\ud800", "é" * 50)


def strange(value, rng):
    """The same JSON with one of its values replaced, removed or repeated."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(rng.integers(len(keys)))]
        what = rng.random()
        if what < 0.15:
            del value[key]
        elif what < 0.3 and isinstance(value, list):
            value.append(value[key])
        elif what < 0.3:
            value[f"{key}."] = value[key]
        else:
            value[key] = strange(value[key], rng)
        return value
    if isinstance(value, str) and value.startswith('{"'):  # the configuration
        return json.dumps(strange(json.loads(value), rng))
    return STRANGE[int(rng.integers(len(STRANGE)))]


def mutated(data, rng):
    """A copy with other bytes or bits, cut, longer, shorter, of another header length or with other JSON."""
    kind, at = int(rng.integers(8)), int(rng.integers(len(data)))
    if kind == 0:  # up to eight bytes
        data = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] = rng.integers(256)
        return bytes(data)
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.bytes(int(rng.integers(1, 20))) + data[at:]
    if kind == 4:
        return data[:at] + data[at + int(rng.integers(1, 20)) :]
    if kind == 5:
        length = (
            int.from_bytes(data[:8], "little") + int(rng.integers(-9, 10))
            if rng.random() < 0.5
            else rng.integers(2**63)
        )
        return int(length).to_bytes(8, "little") + data[8:]
    if kind == 6:  # a piece of the file over another
        other, n = int(rng.integers(len(data))), int(rng.integers(1, 40))
        return data[:at] + data[other : other + n] + data[at + n :]
    header, body = split(data)
    return joined(strange(header, rng), body)


def forgery(data, rng):
    """The same file with other JSON in its configuration and a checksum that fits."""
    _, tensors = container.unpack(data, "model", "model", None)
    header, body = split(data)
    text = json.dumps(strange(json.loads(header["__metadata__"]["config"]), rng))
    header["__metadata__"] |= {"config": text, "sha256": container._digest(text, tensors)}
    return joined(header, body)


def peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def survey(damages, good, read):
    """How reading goes for each of the damaged files, and what memory all of them took."""
    found = {"refused": 0, "same": 0, "other": 0, "wrong": [], "memory": 0}
    assert read(good) == good
    before = peak()
    for i, damaged in enumerate(damages):
        try:
            content = read(damaged)
        except gm.FileError as error:
            found["refused"] += 1
            if not str(error).startswith("file: "):
                found["wrong"].append([i, str(error)])
        except BaseException as error:
            found["wrong"].append([i, repr(error)])
        else:
            found["same" if content == good else "other"] += 1
    return found | {"memory": peak() - before}


def mutate(kind, path, count):
    good, rng = Path(path).read_bytes(), np.random.default_rng(2)
    return survey((mutated(good, rng) for _ in range(int(count))), good, READERS[kind])


def forge(path, count):
    good, rng = Path(path).read_bytes(), np.random.default_rng(3)
    return survey((forgery(good, rng) for _ in range(int(count))), good, take_model)


def cut(kind, path):
    good = Path(path).read_bytes()
    return survey((good[:length] for length in range(len(good))), good, READERS[kind])


@pytest.fixture(scope="module")
def goods(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("goods")
    (made / "model").write_bytes(model)
    (made / "table").write_bytes(small_table_model())
    small_state(made)
    return made


@pytest.mark.parametrize("count", [10_000, LONG(1_000_000)])
@pytest.mark.parametrize("kind", READERS)
def test_mutated_files(kind, count, goods):
    found = elsewhere("mutate", kind, goods / kind, count)
    assert (found["wrong"], found["other"]) == ([], 0)
    assert found["refused"] + found["same"] == count and found["same"] < count / 20
    assert found["memory"] < MEMORY


@pytest.mark.parametrize("kind", READERS)
def test_a_file_cut_off_at_every_byte(kind, goods):
    found = elsewhere("cut", kind, goods / kind)
    assert found["refused"] == (goods / kind).stat().st_size > 1000
    assert (found["wrong"], found["memory"] < MEMORY) == ([], True)


@pytest.mark.parametrize("count", [3_000, LONG(100_000)])
@pytest.mark.parametrize("kind", ["model", "table"])
def test_forged_configurations(kind, count, goods):
    """A right checksum proves nothing: what it covers is a network, or it is refused."""
    found = elsewhere("forge", goods / kind, count)
    assert found["wrong"] == [] and found["memory"] < MEMORY
    assert found["refused"] > count / 3


# --- promises -----------------------------------------------------------------------------------------------------------


def test_every_promise_of_security_md_names_a_test():
    page = HERE.parent / "SECURITY.md"
    if not page.exists():
        pytest.skip("not a checkout")
    named = re.findall(r"`tests/(\w+\.py)::(\w+)`", page.read_text("utf-8"))
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in (HERE / file).read_text("utf-8"), f"{file}::{test}"
