"""Models and training states on disk: exact round trips, exact resumes, only FileError from damaged files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

import gpumlp as gm
from gpumlp import container, files
from gpumlp.activations import ACTIVATIONS
from gpumlp.losses import LOSSES
from gpumlp.optimizers import OPTIMIZERS

N, FEATURES, CLASSES, BATCH = 50, 6, 3, 8  # 6 = 2 x 3 pixels
STEPS = 7  # of an epoch: the last batch has 2 rows
EPOCHS = 4
SOFTMAX = "softmax_cross_entropy"


def table(n=N, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, FEATURES)).astype(np.float32)
    y = (X @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    y[:CLASSES] = np.arange(CLASSES)
    return X, y


def chain(activation="relu", outputs=CLASSES, **options):
    return gm.Network([gm.Dense(5, activation), gm.Dense(outputs)], n_features=FEATURES, seed=1, **options)


def fitted(net, y=None, loss=SOFTMAX):
    X, labels = table()
    gm.Trainer(net, loss).fit(X, labels if y is None else y, epochs=1, batch_size=BATCH)
    return net


# --- models ----------------------------------------------------------------------------------------------------------


def dag():
    x = gm.Input(FEATURES, dropout=0.1)
    h = gm.Dense(5, "elu(0.7)", name="trunk")(x)
    wide = gm.Concat()(h, gm.Dense(4, "gelu", norm="layer", dropout=0.2)(x), x)
    out = gm.Dense(CLASSES)(gm.Add()(gm.Dense(5, bias=False)(wide), h))
    return gm.Network(x, out, seed=4)


def norms():
    layers = [
        gm.Dense(5, "tanh", norm="batch"),
        gm.Dense(4, "relu", norm="batch", norm_after=True, max_norm=1.5),
        gm.Dense(7, norm="layer", initializer="orthogonal"),
        gm.Dense(CLASSES),
    ]
    return gm.Network(layers, n_features=FEATURES, seed=2**64 - 1)


MODELS = {
    **{
        f"activation {name}": lambda name=name: fitted(chain(name))
        for name in [*ACTIVATIONS, "leaky_relu(0.2)", "elu(1.7)"]
    },
    "untrained": chain,
    "graph": lambda: fitted(dag()),
    "norms": lambda: fitted(norms()),
    "fleet": lambda: fitted(
        gm.Network(
            [gm.Dense(5, "relu", norm="batch", dropout=[0.1, 0.0, 0.3]), gm.Dense(CLASSES)],
            n_features=FEATURES,
            models=3,
            seed=[7, 2**63, 9],
            standardize=True,
        )
    ),
    "fleet of one seed": lambda: fitted(chain(models=2)),
    "one of a fleet": lambda: fitted(chain(models=2))[1],
    "float64": lambda: fitted(chain(dtype="float64", standardize="global")),
    "scaled targets": lambda: fitted(
        chain(outputs=2, standardize=True, standardize_targets=True), 100 + table()[0][:, :2], "squared_error"
    ),
    "names": lambda: fitted(chain(), np.array(["ä", "b", "long name"])[table()[1]]),
    "int classes": lambda: fitted(chain(), np.array([10, -20, 30], dtype=object)[table()[1]]),
    "float classes": lambda: fitted(chain(), np.array([0.5, 1.5, 2.5], dtype=object)[table()[1]]),
    "bool classes": lambda: fitted(chain(outputs=1), table()[1] == 0, "binary_cross_entropy"),
    "numpy sizes": lambda: gm.Network([gm.Dense(np.int32(4), max_norm=np.float32(2))], n_features=np.int64(FEATURES)),
}
OPTIONS = {"huber": {"delta": 0.3}, "quantile": {"quantile": [0.1, 0.5, 0.9]}, SOFTMAX: {"label_smoothing": 0.1}}


def of_loss(name):
    net = chain()
    net.loss = gm.Loss(name, **OPTIONS.get(name, {}))
    return net


def weighing(class_weight, loss=SOFTMAX, outputs=CLASSES):
    net = chain(outputs=outputs)
    net.loss = gm.Loss(loss, class_weight=class_weight)
    return net


MODELS |= {f"loss {name}": lambda name=name: of_loss(name) for name in LOSSES}
MODELS |= {
    "class weights": lambda: weighing(np.array([1.0, 0.5, 2.0])),
    "class weights by label": lambda: weighing({0: 3, 2: 0.1}),
    "balanced": lambda: weighing("balanced"),
    "weights of two classes": lambda: weighing([0.25, 4.0], "binary_cross_entropy", outputs=1),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_as_it_was(case, tmp_path):
    net, path = MODELS[case](), tmp_path / "model.safetensors"
    net.save(path)
    again = gm.load(path)
    assert sorted(again.parameters) == sorted(net.parameters) and sorted(again.statistics) == sorted(net.statistics)
    np.testing.assert_array_equal(again.flat, net.flat)
    for name, values in net.statistics.items():
        np.testing.assert_array_equal(again.statistics[name], values)
    for name in ("seeds", "streams", "steps", "shift", "scale", "target_shift", "target_scale", "classes"):
        one, other = getattr(net, name), getattr(again, name)
        np.testing.assert_array_equal(one, other)
        assert one is None or one.dtype == other.dtype
    X = table()[0]
    np.testing.assert_array_equal(again.predict(X), net.predict(X))
    np.testing.assert_array_equal(again.logits(X), net.logits(X))
    assert repr(again.loss) == repr(net.loss) and again.summary() == net.summary() and again.dtype == net.dtype
    again.save(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("case", ["graph", "norms", "fleet"])
def test_a_loaded_model_trains_on_as_the_saved_one(case, tmp_path):
    net = MODELS[case]()
    net.save(tmp_path / "model")
    again = gm.load(tmp_path / "model")
    np.testing.assert_array_equal(fitted(again).flat, fitted(net).flat)


def test_any_safetensors_reader_reads_a_model(tmp_path):
    net, path = MODELS["fleet"](), tmp_path / "model.safetensors"
    net.save(path)
    tensors = safetensors.numpy.load_file(path)
    expected = {**net.parameters, **net.statistics, "input.shift": net.shift, "input.scale": net.scale}
    assert sorted(tensors) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "gpumlp model" and json.loads(metadata["config"])["models"] == 3


def test_a_loaded_model_checks_the_width(tmp_path):
    chain().save(tmp_path / "model")
    with pytest.raises(ValueError, match="the network takes 6 features, X has 5"):
        gm.load(tmp_path / "model").predict(np.ones((2, 5)))


def test_a_device_that_cannot_be_had_is_no_fault_of_the_file(tmp_path):
    chain().save(tmp_path / "model")
    with pytest.raises(RuntimeError, match="device='cuda'"):
        gm.load(tmp_path / "model", device="cuda")
    with pytest.raises(ValueError, match="device='tpu' is unknown") as caught:
        gm.load(tmp_path / "model", device="tpu")
    assert not isinstance(caught.value, gm.FileError)


@pytest.mark.parametrize(
    "activation",
    [
        gm.Activation("sine", np.sin, lambda z, a, out=None: np.cos(z, out=out), "own", "glorot_uniform"),
        replace(ACTIVATIONS["relu"], f=np.abs),  # a known name, another function
        replace(ACTIVATIONS["leaky_relu"], f_grad=np.abs),
    ],
    ids=["own", "relu", "leaky_relu"],
)
def test_an_activation_of_your_own_cannot_be_saved(activation, tmp_path):
    with pytest.raises(
        ValueError, match=f"activation '{activation.name}' is not in gpumlp's table: a file cannot name it"
    ):
        chain(activation).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_loss_of_your_own_cannot_be_saved(tmp_path):
    net = chain()
    net.loss = replace(LOSSES["huber"], name="mine")
    with pytest.raises(
        ValueError, match=r"loss 'mine' is not in gpumlp's table: a file cannot name it; set network.loss to None"
    ):
        net.save(tmp_path / "model")


def test_a_configuration_that_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    too_much = r"the model's configuration takes [\d,]+ bytes, and a file holds {:,}: use fewer or shorter names of"
    length = int.from_bytes(files.to_bytes(chain())[:8], "little")
    for largest in (100, length - 8):
        monkeypatch.setitem(container.LARGEST_HEADER, "model", largest)
        with pytest.raises(ValueError, match=too_much.format(largest)):
            chain().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(container.LARGEST_HEADER, "model", length)
    chain().save(tmp_path / "model")
    gm.load(tmp_path / "model")


def test_what_a_reader_would_refuse_is_not_written():
    net = chain()
    net.feature_names = ["[" * 100_000]
    with pytest.raises(ValueError, match=r"the model's configuration has 100,\d+ brackets; a file may have 65,536"):
        files.to_bytes(net)
    deep = gm.Network([gm.Dense(1)] * 1000, n_features=1)
    with pytest.raises(ValueError, match="the network must be a list of 1 to 1,000 layers"):
        files.to_bytes(deep)
    x = gm.Input(1 << 10)
    wide = x
    for _ in range(15):
        wide = gm.Concat()(wide, wide)
    with pytest.raises(ValueError, match="layers that are joined have more than 16,777,216 units"):
        files.to_bytes(gm.Network(x, wide))
    net = chain()
    net.classes = np.array(["a" * (1 << 21), "b", "c"])
    with pytest.raises(ValueError, match="3 classes, the longest name of 2,097,152 characters, are too many"):
        files.to_bytes(net)
    net.classes, net.feature_names = None, [None] * FEATURES
    with pytest.raises(ValueError, match="feature_names must be a list of names or numbers, or null"):
        files.to_bytes(net)
    net.feature_names, net.loss = None, gm.Loss(SOFTMAX, class_weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"class_weight has shape \(2,\); it needs one number for each of 3 classes"):
        files.to_bytes(net)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return files.to_bytes(fitted(norms()))


@pytest.fixture(scope="module")
def parts(model):
    """Configuration and tensors of a good model, to be spoiled and packed again with a right checksum."""
    return container.unpack(model, "good", "model", None)


def test_cut_off_at_every_byte(model):
    for length in range(len(model)):
        with pytest.raises(gm.FileError, match=r"^cut: "):
            files.from_bytes(model[:length], "cut")


def mutated(data, rng):
    """A copy with one to three bytes changed, removed or added."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        # Half of the changes in the header, which is small beside the tensors.
        at = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 3000)))
        kind = rng.integers(0, 6)
        if kind == 0:
            del data[at]
        elif kind == 1:
            data.insert(at, int(rng.integers(0, 256)))
        elif kind == 2:
            data[at] = ord(rng.choice(list('0123456789{}[]",:. ')))
        else:
            data[at] = int(rng.integers(0, 256))
    return bytes(data)


def test_3000_mutations_of_a_model(model):
    rng, survived = np.random.default_rng(0), 0
    for _ in range(3000):
        damaged = mutated(model, rng)
        try:
            again = files.from_bytes(damaged, "damaged")
        except gm.FileError as error:
            assert str(error).startswith("damaged: ")
        else:
            survived += 1
            assert files.to_bytes(again) == model  # white space of the header, or a byte changed into itself
    assert survived < 100


def raw(header, tail=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tail


OTHER_FILES = {
    "empty": (b"", "has 0 bytes: it is empty or cut off"),
    "text": (b"epoch,loss\n1,0.5\n2,0.4\n", "is not a safetensors file, or is cut off"),
    "zip": (b"PK\x03\x04" + bytes(100), "is not a safetensors file, or is cut off"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "is not a safetensors file, or is cut off"),
    "list": (raw([1, 2]), "its header is not a table"),
    "other": (safetensors.numpy.save({"a": np.ones(3)}), "is a safetensors file, but not gpumlp's"),
    "other metadata": (safetensors.numpy.save({"a": np.ones(3)}, {"format": "pt"}), "but not gpumlp's"),
    "metadata list": (raw({"__metadata__": ["gpumlp model"]}), "but not gpumlp's"),
    "no config": (
        raw({"__metadata__": {"format": "gpumlp model", "format_version": "1"}}),
        "its metadata lack 'config'",
    ),
    "twice": (raw(b'{"a": 1, "a": 2}'), "its header names something twice"),
    "deep": (raw(b"[" * 50_000), "RecursionError"),
    "no text": (raw(b"\xff\xfe"), "UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files(case, tmp_path):
    data, message = OTHER_FILES[case]
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(gm.FileError, match=message) as caught:
        gm.load(tmp_path / "file")
    assert str(caught.value).startswith(str(tmp_path / "file"))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        gm.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        gm.Trainer(chain(), SOFTMAX).resume(tmp_path / "none")


def test_a_model_of_version_0_1_whose_loss_has_no_class_weight(parts):
    config, tensors = parts
    assert config["loss"] == {"name": SOFTMAX}
    assert files.from_bytes(container.pack("model", config, tensors)).loss.class_weight is None


def test_a_later_format(monkeypatch):
    monkeypatch.setattr(container, "FORMAT_VERSION", "2")
    later = files.to_bytes(chain())
    monkeypatch.undo()
    with pytest.raises(gm.FileError, match="has format version 2; this gpumlp reads 1"):
        files.from_bytes(later)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_have(model, constant):
    length = int.from_bytes(model[:8], "little")
    header = json.loads(model[8 : 8 + length])
    config = header["__metadata__"]["config"]
    header["__metadata__"]["config"] = config.replace('"max_norm": 1.5', f'"max_norm": {constant}')
    assert header["__metadata__"]["config"] != config
    with pytest.raises(gm.FileError, match=f"its configuration holds {constant}"):
        files.from_bytes(raw(header, model[8 + length :]))


def test_one_bit_of_a_weight(model):
    damaged = bytearray(model)
    damaged[-1] ^= 1
    with pytest.raises(gm.FileError, match="the checksum does not fit: the file is damaged"):
        files.from_bytes(bytes(damaged))


def spoil(config, path, value):
    """A copy of a configuration with another value at ``path``."""
    config = json.loads(json.dumps(config))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


FOREIGN = {  # a configuration that is wrong although its checksum is right
    "units": (("layers", 1, "units"), 10**12, "a layer has 1,000,000,000,000 units; a file may have 16,777,216"),
    "one unit more": (("layers", 1, "units"), 6, "its tensors are not those that its configuration describes"),
    "models": (("models",), 10**12, "seeds has 1 values for 1000000000000 models"),
    "features": (("layers", 0, "units"), 0, "n_features=0 must be an integer of at least 1"),
    "input dropout": (("layers", 0, "dropout"), 1.5, r"dropout=1.5 must be a number in \[0, 1\)"),
    "activation": (("layers", 1, "activation"), "sine", "activation='sine' is unknown; allowed: identity"),
    "alpha": (("layers", 1, "activation"), "elu(-1)", "alpha='-1' of elu"),
    "norm": (("layers", 1, "norm"), "group", "norm='group' is unknown"),
    "kind": (("layers", 1, "kind"), "conv", "KeyError: 'conv'"),
    "key": (("layers", 1, "rate"), 3, "TypeError"),
    "first": (("layers", 0), {"kind": "dense", "units": 6, "bias": False}, "the first layer is no input"),
    "second input": (("layers", 1), {"kind": "input", "units": 5}, "cannot be read"),
    "a layer that reads a later one": (("reads", 1), [2], "the layers read layers that do not come before them"),
    "a layer that reads itself": (("reads", 1), [1], "do not come before them"),
    "a layer from the end": (("reads", 2), [-2], "do not come before them"),
    "too few reads": (("reads",), [[], [0]], "do not come before them"),
    "a layer that nothing reads": (("reads", 3), [1], "some layers are read by none"),
    "two inputs of one layer": (("reads", 2), [0, 1], "Dense reads one node, got 2"),
    "no input of a layer": (("reads", 1), [], "Dense reads one node, got 0"),
    "scaled": (
        ("scaled",),
        ["weights"],
        "scaled='weights' is unknown; allowed: shift, scale, target_shift, target_scale",
    ),
    "scaling": (("scaled",), ["shift"], "its tensors are not those"),
    "other dtype": (("dtype",), "float64", "its tensors are not those"),
    "dtype": (("dtype",), "float16", "dtype='float16' is not supported"),
    "seed": (("seeds",), [-1], "seed=-1"),
    "seeds": (("seeds",), [1, 2], "seeds has 2 values for 1 models"),
    "steps": (("steps",), [0.5], "steps must be a list of integers"),
    "classes": (("classes",), [["a"], ["b"]], "classes must be a list of names or numbers, or null"),
    "class weights": (
        ("loss",),
        {"name": SOFTMAX, "class_weight": [1.0]},
        r"class_weight has shape \(1,\); it needs one number for each of 3",
    ),
    "class of a weight": (
        ("loss",),
        {"name": SOFTMAX, "class_weight": {"3": 1.0}},
        "class_weight names label 3; labels are 0 to 2",
    ),
    "loss": (("loss",), {"name": "mse"}, "loss='mse' is unknown"),
    "no layers": (("layers",), [], "cannot be read"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_configuration_that_makes_no_sense(parts, case):
    path, value, message = FOREIGN[case]
    data = container.pack("model", spoil(parts[0], path, value), parts[1])
    tracemalloc.start()
    with pytest.raises(gm.FileError, match=message):
        files.from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # nothing was allocated by the sizes that it names


def test_tensors_that_do_not_fit(parts):
    config, tensors = parts
    for spoiled in (
        {name: values for name, values in tensors.items() if name != "dense_0.W"},
        tensors | {"extra": np.ones(2)},
        tensors | {"dense_0.W": tensors["dense_0.W"][:, :, :-1]},
    ):
        with pytest.raises(gm.FileError, match="its tensors are not those that its configuration describes"):
            files.from_bytes(container.pack("model", config, spoiled))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, function, error):
    path = tmp_path / "model"
    path.write_text("old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        chain().save(path)
    with pytest.raises(type(error)):
        chain().save(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"] and path.read_text() == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model cannot be written: there is no folder .*none"):
        chain().save(tmp_path / "none" / "model")


def test_a_file_is_replaced_and_its_name_may_be_long(tmp_path):
    path = tmp_path / ("m" * 250)
    for seed in (1, 2):
        net = gm.Network([gm.Dense(2)], n_features=3, seed=seed)
        net.save(str(path))
        np.testing.assert_array_equal(gm.load(path).flat, net.flat)
    assert len(list(tmp_path.iterdir())) == 1


# --- training states: an interrupted fit that is resumed ends with the bits of one that was not ----------------------


class Crash(Exception):
    pass


class Saver(gm.Callback):
    """Saves the state after step ``at`` of the fit, then does ``action``."""

    def __init__(self, path=None, at=0, action=None):
        self.path, self.at, self.action = path, at, action

    def on_step_end(self, trainer, loss):
        if trainer.epochs_done * trainer.steps_per_epoch + trainer.position == self.at:
            trainer.save_state(self.path)
            self.action()


def crash():
    raise Crash


def everything(optimizer="adam", models=None, **changed):
    """A trainer with all that has a state, and the arguments of its fit; ``changed`` replaces parts."""
    X, y = table()
    rates = {} if models is None else {"dropout": [0.2, 0.0, 0.4][:models]}
    layers = [
        gm.Dense(5, "relu", norm="batch", **{"dropout": 0.2} | rates),
        gm.Dense(4, "tanh", max_norm=1.0),
        gm.Dense(3),
    ]
    net = {"n_features": FEATURES, "seed": 3, "models": models, "standardize": True, "input_dropout": 0.1}
    trainer = {
        "loss": gm.Loss(SOFTMAX, label_smoothing=0.05),
        "optimizer": OPTIMIZERS[optimizer](l2=0.01) if isinstance(optimizer, str) else optimizer,
        "schedule": gm.ReduceOnPlateau(patience=1, factor=0.5),
        "augment": [gm.RandomShift(1, (2, 3)), gm.GaussianNoise(0.05), gm.Mixup()],
        "ema": None,
    }
    fit = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "validation_data": table(20, seed=1),
        "sample_weight": np.linspace(0.5, 1.5, N),
        "rows": None if models is None else [np.arange(50), np.arange(0, 50, 2), np.arange(9)][:models],
        "callbacks": [gm.EarlyStopping(2, monitor="val_accuracy"), Saver()],
    }
    for part in (net, trainer, fit):
        part.update({name: value for name, value in changed.items() if name in part})
    layers = changed.get("layers", layers)
    made = gm.Trainer(gm.Network(layers, **net), **trainer)
    return SimpleNamespace(
        trainer=made, fit=lambda **more: made.fit(X, changed.get("y", y), **fit | {"shuffle": True} | more)
    )


def facts(trainer):
    """All bits that two trainings may differ in."""
    net, bound = trainer.network, trainer.optimizer.bind(trainer.network)
    found = {"flat": net.flat, **net.statistics, "steps": net.steps, "t": bound.t, **bound.states}
    found |= {"shift": net.shift, "scale": net.scale}
    found |= {f"reached.{name}": values for name, values in trainer._last.items()}
    found |= {} if trainer.average is None else {f"average.{k}": v for k, v in trainer.average.averages.items()}
    found |= trainer.schedule.state() if hasattr(trainer.schedule, "state") else {}
    for callback in trainer.callbacks:
        found |= callback.state()
    plain = {name: values for name, values in trainer.history.items() if name != "seconds"}
    plain |= {"counters": [trainer.epoch, trainer.epochs_done, trainer.position], "stopped": trainer.stopped}
    return found, plain


def same(one, other):
    (arrays, plain), (others, other_plain) = facts(one), facts(other)
    assert sorted(arrays) == sorted(others)
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, others[name], err_msg=name)
    assert json.dumps(plain) == json.dumps(other_plain)  # NaN equals NaN as text


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_exact(optimizer, models, tmp_path):
    whole = everything(optimizer, models)
    whole.fit()
    steps = whole.trainer.steps_per_epoch
    done = steps * whole.trainer.epochs_done
    for at in sorted(
        {1, steps, min(steps + 3, done), done}
    ):  # the first, the last of an epoch, in the middle, the last of all
        path = tmp_path / f"state {at}"
        broken = everything(optimizer, models)
        with pytest.raises(Crash):
            broken.fit(callbacks=[gm.EarlyStopping(2, monitor="val_accuracy"), Saver(path, at, crash)])
        resumed = everything(optimizer, models)
        resumed.trainer.network.flat[...] = 9.0  # all of it comes from the file
        resumed.trainer.resume(path)
        resumed.fit()
        same(whole.trainer, resumed.trainer)


def test_a_chain_of_crashes_and_the_same_trainer_again(tmp_path):
    whole, broken = everything(), everything()
    whole.fit()
    for at in (2, 3, STEPS, 2 * STEPS + 1, 2 * STEPS + 5):
        with pytest.raises(Crash):
            broken.fit(callbacks=[gm.EarlyStopping(2, monitor="val_accuracy"), Saver(tmp_path / "state", at, crash)])
        broken.trainer.network.flat[...] = 9.0
        broken.trainer.resume(tmp_path / "state")
    broken.fit()
    same(whole.trainer, broken.trainer)


FRESH = """
import hashlib, sys
import test_files
resumed = test_files.everything()
resumed.trainer.resume(sys.argv[1])
resumed.fit()
print(test_files.digest(resumed.trainer))
"""


def digest(trainer):
    arrays, plain = facts(trainer)
    text = json.dumps(plain) + "".join(f"{name}{values.tobytes().hex()}" for name, values in sorted(arrays.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def test_resume_in_a_fresh_process(tmp_path):
    whole, broken = everything(), everything()
    whole.fit()
    with pytest.raises(Crash):
        broken.fit(callbacks=[gm.EarlyStopping(2, monitor="val_accuracy"), Saver(tmp_path / "state", STEPS + 3, crash)])
    here, package = Path(__file__).parent, Path(gm.__file__).parents[1]
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "state")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(package), os.environ.get("PYTHONPATH", "")])},
    )
    assert fresh.stdout.strip() == digest(whole.trainer)


class ThenCtrlC(gm.Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, trainer, loss):
        if trainer.network.steps[0] == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [STEPS + 1, 2 * STEPS + 4, 3 * STEPS])
def test_after_ctrl_c_the_state_holds_the_weights_that_training_had_reached(at, tmp_path):
    """EarlyStopping put the best ones back: they are for use, and not what training goes on from."""
    options = {"optimizer": gm.SGD(3.0), "schedule": None}  # a rate so large that the best epoch is not the last
    whole, broken = everything(**options), everything(**options)
    whole.fit(callbacks=[gm.EarlyStopping(9, monitor="loss"), gm.EarlyStopping(9), ThenCtrlC(0)])
    reached = {}

    class Watch(gm.Callback):
        def on_step_end(self, trainer, loss):
            reached["flat"] = trainer.network.flat.copy()

    with pytest.warns(UserWarning, match="interrupted"):
        broken.fit(callbacks=[gm.EarlyStopping(9, monitor="loss"), gm.EarlyStopping(9), ThenCtrlC(at), Watch()])
    assert (broken.trainer.network.flat != reached["flat"]).any()
    broken.trainer.callbacks.pop()
    broken.trainer.save_state(tmp_path / "state")
    resumed = everything(**options)
    resumed.trainer.resume(tmp_path / "state")
    np.testing.assert_array_equal(resumed.trainer.network.flat, reached["flat"])
    resumed.fit(callbacks=[gm.EarlyStopping(9, monitor="loss"), gm.EarlyStopping(9), ThenCtrlC(0)])
    same(whole.trainer, resumed.trainer)


def test_after_a_time_limit(tmp_path):
    whole, broken, resumed = everything(), everything(), everything()
    whole.fit()
    broken.fit(time_limit=1e-9)
    assert broken.trainer.stopped == "time limit" and broken.trainer.position == 1
    broken.trainer.save_state(tmp_path / "state")
    resumed.trainer.resume(tmp_path / "state")
    resumed.fit()
    same(whole.trainer, resumed.trainer)


class SaveEpoch(gm.Callback):
    """Saves at the end of an epoch: last in the list, when the others have seen it."""

    def __init__(self, path=None):
        self.path = path

    def on_epoch_end(self, trainer, record):
        if self.path is not None and record["epoch"] == 2:
            trainer.save_state(self.path)


@pytest.mark.parametrize("models", [None, 3])
def test_saved_between_epochs(models, tmp_path):
    whole, resumed = everything(models=models), everything(models=models)
    whole.fit(callbacks=[gm.EarlyStopping(1), SaveEpoch(tmp_path / "state")])
    resumed.trainer.resume(tmp_path / "state")
    resumed.fit(callbacks=[gm.EarlyStopping(1), SaveEpoch()])
    same(whole.trainer, resumed.trainer)


def test_a_finished_fit_can_be_prolonged(tmp_path):
    options = {"schedule": None, "callbacks": []}
    whole, short, longer = everything(**options), everything(**options), everything(**options)
    whole.fit(epochs=5)
    short.fit(epochs=3)
    short.trainer.save_state(tmp_path / "state")
    longer.trainer.resume(tmp_path / "state")
    assert longer.trainer.history == short.trainer.history
    longer.fit(epochs=5)
    same(whole.trainer, longer.trainer)
    assert longer.trainer.history["epoch"] == [1, 2, 3, 4, 5]
    longer.fit(epochs=2)  # a fit of its own again
    whole.fit(epochs=2)
    same(whole.trainer, longer.trainer)
    assert longer.trainer.history["epoch"] == [1, 2]


def test_a_fit_that_stopped_early_stays_stopped(tmp_path):
    options = {"optimizer": gm.SGD(5.0), "callbacks": [gm.EarlyStopping(1)]}
    whole, resumed = everything(**options), everything(**options)
    whole.fit(epochs=50)
    assert whole.trainer.stopped == "early"
    whole.trainer.save_state(tmp_path / "state")
    resumed.trainer.resume(tmp_path / "state")
    resumed.fit(epochs=50)
    same(whole.trainer, resumed.trainer)


def test_the_second_fit_of_a_trainer_resumes_too(tmp_path):
    whole, broken, resumed = everything(), everything(), everything()
    for run in (whole, broken):
        run.fit(epochs=2)
    whole.fit()
    with pytest.raises(Crash):
        broken.fit(callbacks=[gm.EarlyStopping(2, monitor="val_accuracy"), Saver(tmp_path / "state", STEPS + 3, crash)])
    resumed.trainer.resume(tmp_path / "state")
    resumed.fit()
    same(whole.trainer, resumed.trainer)


def test_names_and_a_long_history_of_a_fleet(tmp_path):
    names = np.array(["a", "b", "c"])[table()[1]]
    options = {"models": 3, "y": names, "validation_data": None}
    run, resumed = everything(**options), everything(**options)
    run.fit(epochs=1, callbacks=[])
    run.trainer.history["loss"] = [
        [float("nan"), float("inf"), i / 3] for i in range(50_000)
    ]  # a few megabytes of text
    run.trainer.save_state(tmp_path / "state")
    resumed.trainer.resume(tmp_path / "state")
    assert json.dumps(resumed.trainer.history) == json.dumps(run.trainer.history)
    assert resumed.trainer.network.classes.tolist() == ["a", "b", "c"]
    resumed.fit(epochs=2, callbacks=[])
    assert resumed.trainer.network.predict(table()[0]).dtype.kind == "U"


@pytest.fixture
def state(tmp_path):
    """A state saved in the middle of an epoch."""
    broken = everything()
    with pytest.raises(Crash):
        broken.fit(callbacks=[gm.EarlyStopping(2, monitor="val_accuracy"), Saver(tmp_path / "state", STEPS + 3, crash)])
    return tmp_path / "state"


OTHER_TRAINERS = {
    "layers": (
        {"layers": [gm.Dense(4), gm.Dense(3)]},
        r"another network: {'layers': .*, 'reads': .*; this trainer has {'layers'",
    ),
    "seed": ({"seed": 4}, r"another network: {'seeds': \[3\]}; this trainer has {'seeds': \[4\]}"),
    "standardize": (
        {"standardize": False},
        r"another network: {'standardize': 'columns'}; this trainer has {'standardize': None}",
    ),
    "fleet": ({"models": 2}, r"another network: .*'models': None.* this trainer has .*'models': 2"),
    "loss": ({"loss": SOFTMAX}, "another loss: Loss"),
    "class weight": (
        {"loss": gm.Loss(SOFTMAX, label_smoothing=0.05, class_weight="balanced")},
        "another loss: .* has .*class_weight='balanced'",
    ),
    "optimizer": ({"optimizer": gm.SGD()}, "another optimizer: {'name': 'Adam'"),
    "learning rate": ({"optimizer": gm.Adam(0.5, l2=0.01)}, "another optimizer"),
    "schedule": ({"schedule": "cosine"}, r"another schedule: ReduceOnPlateau\(factor=0.5.*this trainer has Cosine"),
    "patience": ({"schedule": gm.ReduceOnPlateau(patience=2, factor=0.5)}, "another schedule"),
    "own schedule": ({"schedule": lambda epoch, epochs: 1.0}, "another schedule: .* has function"),
    "augment": ({"augment": ()}, r"another augment: \(RandomShift"),
}


@pytest.mark.parametrize("case", OTHER_TRAINERS)
def test_a_state_of_another_trainer_changes_nothing(case, state):
    options, message = OTHER_TRAINERS[case]
    other, untouched = everything(**options), everything(**options)
    with pytest.raises(ValueError, match=f"state: the state was saved with {message}"):
        other.trainer.resume(state)
    assert (other.trainer.history, other.trainer.epoch, other.trainer.network.steps.sum()) == ({}, 0, 0)
    other.fit(epochs=2)
    untouched.fit(epochs=2)
    same(other.trainer, untouched.trainer)


OTHER_FITS = {
    "rows": (
        {"rows": [np.arange(40)]},
        r"the resumed training had rows \[50\], this fit has \[40\]; they must be the same",
    ),
    "n_samples": ({"validation_data": None, "validation_split": 0.2}, "had n_samples 50, this fit has 40"),
    "batch_size": ({"batch_size": 10}, "had batch_size 8, this fit has 10"),
    "shuffle": ({"shuffle": False}, "had shuffle True, this fit has False"),
    "callbacks": (
        {"callbacks": [Saver(), gm.EarlyStopping(2)]},
        r"the saved fit had callbacks \['EarlyStopping', 'Saver'\], this one has \['Saver', 'EarlyStopping'\]; give",
    ),
    "no callbacks": ({"callbacks": []}, r"this one has \[\]; give the same ones in the same order"),
}


@pytest.mark.parametrize("case", OTHER_FITS)
def test_another_fit_is_refused_and_the_right_one_still_resumes(case, state):
    options, message = OTHER_FITS[case]
    whole, resumed = everything(), everything()
    whole.fit()
    resumed.trainer.resume(state)
    with pytest.raises(ValueError, match=message):
        resumed.fit(**options)
    resumed.fit()
    same(whole.trainer, resumed.trainer)


def test_epochs_count_those_that_are_done(tmp_path):
    run, resumed = everything(callbacks=[]), everything(callbacks=[])
    run.fit(epochs=3)
    run.trainer.save_state(tmp_path / "state")
    resumed.trainer.resume(tmp_path / "state")
    with pytest.raises(ValueError, match="epochs=2, but the resumed fit has finished 3; epochs counts them too"):
        resumed.fit(epochs=2)
    resumed.fit(epochs=3)
    same(run.trainer, resumed.trainer)


def test_models_and_states_are_told_apart(state, tmp_path):
    with pytest.raises(gm.FileError, match="holds a gpumlp state, expected a gpumlp model"):
        gm.load(state)
    chain().save(tmp_path / "model")
    with pytest.raises(gm.FileError, match="holds a gpumlp model, expected a gpumlp state"):
        everything().trainer.resume(tmp_path / "model")


def unharmed(run, untouched):
    np.testing.assert_array_equal(run.trainer.network.flat, untouched.trainer.network.flat)
    run.fit(epochs=2)
    untouched.fit(epochs=2)
    same(run.trainer, untouched.trainer)


def test_damaged_states_change_nothing(state):
    data, rng = state.read_bytes(), np.random.default_rng(0)
    run = everything()
    damaged = [data[: int(n)] for n in rng.integers(0, len(data), 50)] + [mutated(data, rng) for _ in range(200)]
    for one in damaged:
        state.write_bytes(one)
        try:
            run.trainer.resume(state)
        except gm.FileError:
            continue
        run = everything()  # white space in the header
    unharmed(run, everything())


FOREIGN_STATES = {  # with a right checksum
    "no t": (lambda config, tensors: tensors.pop("t"), "KeyError: 't'"),
    "no moment": (lambda config, tensors: tensors.pop("optimizer.v"), "KeyError: 'optimizer.v'"),
    "shape": (
        lambda config, tensors: tensors.update({"weights.flat": np.ones((1, 2))}),
        "its tensor weights.flat does not fit",
    ),
    "dtype": (
        lambda config, tensors: tensors.update({"steps": np.ones(1)}),
        "its tensor steps does not fit the network",
    ),
    "epoch": (lambda config, tensors: config.update(epoch="first"), "ValueError: invalid literal"),
    "history": (lambda config, tensors: config.pop("history"), "KeyError: 'history'"),
    "schedule": (lambda config, tensors: tensors.pop("schedule.best"), "the state lacks"),
}


@pytest.mark.parametrize("case", FOREIGN_STATES)
def test_a_state_that_lacks_something_changes_nothing(case, state):
    change, message = FOREIGN_STATES[case]
    config, tensors = container.unpack(state.read_bytes(), state, "state", None)
    change(config, tensors)
    state.write_bytes(container.pack("state", config, tensors))
    run = everything()
    with pytest.raises(gm.FileError, match=message):
        run.trainer.resume(state)
    unharmed(run, everything())


def test_a_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = everything(callbacks=[])
    run.fit(epochs=1)
    run.trainer.save_state(tmp_path / "state")
    old = (tmp_path / "state").read_bytes()
    run.fit(epochs=1)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        run.trainer.save_state(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"] and (tmp_path / "state").read_bytes() == old
