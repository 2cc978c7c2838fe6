"""The GPU backend's verbs, on an emulated device, against NumPy's: forward, backward and update in a loop of one's own.

Both ways of each product run: on their own, with a kernel behind them (``prefer=0``), and with an epilogue (``prefer=1``).
"""

import gc
import pickle

import numpy as np
import pytest
from emulator import EmulatedRuntime, ForeignArray, on_device

import gpumlp as gm
from gpumlp.activations import ACTIVATIONS, Activation
from gpumlp.backends.device import DeviceArray, DeviceMemoryError, float32_to_bf16
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.losses import LOSSES, LossRow
from gpumlp.network import Network
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.workspace import Workspace

FEATURES, OUTPUTS, BATCH = 6, 4, 13
WAYS = {"plain": {}, "epilogues": {"prefer": 1}, "without epilogues": {"epilogues": False, "prefer": 1}}
TOLERANCES = {"float32": 5e-6, "float64": 1e-12, "tf32": 4e-3, "bf16": 4e-2}
SOFTMAX = "softmax_cross_entropy"


def gpu(**options):
    return GpuBackend(EmulatedRuntime(**options))


@pytest.fixture(scope="module", params=WAYS)
def backend(request):
    return gpu(**WAYS[request.param])


@pytest.fixture(scope="module")
def plain():
    return gpu()


@pytest.fixture
def no_collector():
    """What is freed is freed because nothing holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def rows(n=BATCH, models=None, dtype=np.float64, seed=1):
    shape = (n, FEATURES) if models is None else (models, n, FEATURES)
    return np.random.default_rng(seed).normal(0.5, 2.0, shape).astype(dtype)


def host(network, array):
    return np.array(network.backend.to_numpy(array))


def pass_of(network, X, steps=5):
    """What forward, backward and an update give: name → array."""
    network.steps[...] = steps
    found = {"prediction": network.forward(X, training=False), "logits": network.forward(X)}
    network.backward(np.random.default_rng(2).normal(size=found["logits"].shape))
    found |= {f"gradient of {name}": host(network, value) for name, value in network.gradients.items()}
    gm.SGD(0.1, momentum=0.5).step(network)
    found |= {name: host(network, value) for name, value in network.parameters.items()}
    found |= {name: host(network, value) for name, value in network.statistics.items()}
    return found


def assert_close(ours, theirs, tolerance):
    """Relative to the largest value of each array; of gradients to the largest of all, as some are 0 but for rounding."""
    assert ours.keys() == theirs.keys()
    steepest = max((np.abs(v).max() for name, v in theirs.items() if name.startswith("gradient")), default=0)
    for name, expected in theirs.items():
        scale = max(np.abs(expected).max(), steepest if name.startswith("gradient") else 0.1)
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


def twins(make, backend, **options):
    """A network on the host and the same on the device."""
    return [make(device=device, **options) for device in ("cpu", backend)]


def check(make, backend, X, tolerance=None, **options):
    dtype = options.get("dtype", "float32")
    host_network, device_network = twins(make, backend, **options)
    assert device_network.backend is backend and isinstance(device_network.flat, DeviceArray)
    assert_close(pass_of(device_network, X), pass_of(host_network, X), tolerance or TOLERANCES[dtype])


def chain(*layers, **options):
    return gm.Network([*layers, gm.Dense(OUTPUTS)], **{"n_features": FEATURES, "seed": 3} | options)


# --- forward, backward, update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_activation(activation, dtype, backend):
    """Alone, behind a normalisation, with dropout; widths below and above a tile of 32 columns."""

    def make(**options):
        layers = [
            gm.Dense(9, activation),
            gm.Dense(33, activation, norm="batch", dropout=0.5),
            gm.Dense(8, activation, dropout=0.2),
        ]
        return chain(*layers, **options)

    check(make, backend, rows(), dtype=dtype)


def residual(models=None, activation="relu", **options):
    """Every way in which nodes read each other: one output read three times, sums, and the input itself."""
    x = gm.Input(FEATURES, dropout=0.1 if models is None else np.linspace(0, 0.4, models))
    h = gm.Dense(8, activation, norm="batch", dropout=0.3)(x)
    k = gm.Dense(8, "gelu_tanh", norm="layer", norm_after=True)(h)
    s = gm.Add()(h, k, h)
    c = gm.Concat()(s, x, h)
    return gm.Network(
        x, gm.Dense(OUTPUTS)(gm.Concat()(gm.Dense(5, activation)(c), s)), models=models, seed=3, **options
    )


def ends_in_a_join(models=None, **options):
    x = gm.Input(FEATURES)
    return gm.Network(x, gm.Add()(gm.Dense(OUTPUTS, "tanh")(x), gm.Dense(OUTPUTS)(x)), models=models, **options)


SHAPES = {  # what a layer can hold, in the places where it takes another way through the kernels
    "one layer": lambda **o: chain(**o),
    "no bias": lambda **o: chain(gm.Dense(9, "relu", bias=False), gm.Dense(5, bias=False), **o),
    "bias before a norm": lambda **o: chain(gm.Dense(9, "gelu", norm="batch", bias=True), **o),
    "batch norm before": lambda **o: chain(gm.Dense(33, "relu", norm="batch"), **o),
    "batch norm after": lambda **o: chain(gm.Dense(9, "silu", norm="batch", norm_after=True, dropout=0.5), **o),
    "layer norm before": lambda **o: chain(gm.Dense(33, "gelu_tanh", norm="layer", dropout=0.5), **o),
    "layer norm after": lambda **o: chain(gm.Dense(9, "relu", norm="layer", norm_after=True, dropout=0.2), **o),
    "linear with dropout": lambda **o: chain(gm.Dense(9, dropout=0.5), gm.Dense(16, dropout=0.1), **o),
    "input dropout": lambda **o: chain(gm.Dense(9, "tanh"), input_dropout=0.3, **o),
    "largest norm": lambda **o: chain(gm.Dense(9, "relu", max_norm=0.7), gm.Dense(5, max_norm=0.2), **o),
    "one unit": lambda **o: chain(gm.Dense(1, "tanh"), **o),
    "norm of the output": lambda **o: gm.Network(
        [gm.Dense(7, "relu"), gm.Dense(OUTPUTS, norm="batch", dropout=0.2)], n_features=FEATURES, **o
    ),
    "graph": residual,
    "smooth": lambda **o: residual(activation="silu", **o),
    "ends in a join": ends_in_a_join,
}


@pytest.mark.parametrize("models", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_networks_and_fleets(shape, models, dtype, backend):
    check(SHAPES[shape], backend, rows(), dtype=dtype, models=models)


@pytest.mark.parametrize("shape", ["input dropout", "graph", "ends in a join", "one layer"])
def test_rows_of_each_models_own(shape, plain):
    check(SHAPES[shape], plain, rows(models=3), models=3)


@pytest.mark.parametrize("n", [1, 2, 31, 300])
def test_batches_of_any_length(n, plain):
    """One row has no variance, 300 are shared out to several blocks."""
    check(SHAPES["batch norm before"], plain, rows(n))
    check(SHAPES["linear with dropout"], plain, rows(n), models=2)


def test_smaller_and_larger_batches_one_after_the_other(plain):
    for n in (7, 3, 13, 7):
        host_network, device_network = twins(residual, plain)
        assert_close(pass_of(device_network, rows(n)), pass_of(host_network, rows(n)), TOLERANCES["float32"])


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("shape", ["one layer", "batch norm after", "layer norm before", "largest norm", "smooth"])
def test_lower_precision_is_near(shape, precision, models, backend):
    """NumPy computes in float32 whatever is allowed. Few kinks here: rounding may take a value to the other side."""
    host_network, device_network = twins(SHAPES[shape], backend, precision=precision, models=models)
    ours, theirs = pass_of(device_network, rows()), pass_of(host_network, rows())
    assert_close(ours, theirs, TOLERANCES[precision])
    assert any((ours[name] != theirs[name]).any() for name in ("logits", "prediction"))


def test_bf16_keeps_master_weights_and_a_copy_that_follows_them(plain):
    """An update far below bfloat16's last digit adds up, and what products read is the rounded weight."""
    network = SHAPES["largest norm"](device=plain, precision="bf16")
    assert network.flat.type == "f32" and network.shadow.type == "bf16"
    before = network.flat.get()
    for step in range(3):
        network.forward(rows())
        network.backward(np.ones((BATCH, OUTPUTS)))
        gm.SGD(1e-4).step(network)
        weights = network.flat.get()
        expected = (float32_to_bf16(weights).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(network.shadow.get(), expected, err_msg=f"step {step}")
    assert 0 < np.abs(weights - before).max()


def test_parameters_may_be_assigned(plain):
    """Also where products read a copy."""
    for precision, tolerance in (("float32", 1e-5), ("bf16", TOLERANCES["bf16"])):
        host_network, device_network = twins(SHAPES["graph"], plain, precision=precision)
        for network in (host_network, device_network):
            network.predict(rows())
            network.parameters["dense_0.W"][...] = np.random.default_rng(5).normal(size=(1, 8, FEATURES))
            network.parameters["dense_1.b"][0] = np.arange(8.0)
            network.statistics["dense_0.mean"][...] = 0.25
        np.testing.assert_allclose(
            device_network.predict(rows()), host_network.predict(rows()), rtol=tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.full_batch])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_optimizer_in_a_loop(name, dtype, plain):
    """With penalties, decay, clipping, a largest norm, and every one of them each model's own."""
    numbers = dict(
        l1=[0.01, 0, 0.1], l2=[0.1, 0.2, 0], weight_decay=[0.5, 0, 0.1], clip_norm=[0.5, 9, 1], clip_value=[1, 0.1, 9]
    )
    networks = twins(SHAPES["largest norm"], plain, models=3, dtype=dtype)
    for network in networks:
        optimizer = OPTIMIZERS[name]([0.01, 0.1, 0.03], **numbers)
        for rate in (None, 0.02, [0.1, 0.2, 0.01]):
            network.backward(0.3 * network.forward(rows()))
            optimizer.step(network, rate)
    ours, theirs = ({n: host(net, v) for n, v in net.parameters.items()} for net in networks[::-1])
    assert_close(ours, theirs, 4 * TOLERANCES[dtype])


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgds_three_forms(momentum, nesterov, plain):
    networks = twins(SHAPES["one layer"], plain)
    for network in networks:
        optimizer = gm.SGD(0.05, momentum=momentum, nesterov=nesterov)
        for _ in range(3):
            network.backward(0.3 * network.forward(rows()))
            optimizer.step(network)
    np.testing.assert_allclose(host(networks[1], networks[1].flat), networks[0].flat, rtol=0, atol=3e-6)


@pytest.mark.parametrize("models", [None, 2])
def test_lbfgs_in_a_loop(models, plain):
    """Its vectors stay on the device: direction, pairs, line search, penalties, running statistics."""
    X, y, loss = rows(30), np.arange(30) % OUTPUTS, gm.Loss(SOFTMAX)
    networks, values = twins(SHAPES["batch norm before"], plain, models=models, dtype="float64"), []
    for network in networks:
        optimizer = gm.LBFGS(l1=1e-3, l2=1e-2, history=2)

        def evaluate(network=network):
            value, dz = loss(network.forward(X), y)
            network.backward(dz)
            return value

        values.append([optimizer.step(network, evaluate=evaluate) for _ in range(6)])
    np.testing.assert_allclose(values[1], values[0], rtol=1e-9)
    assert np.mean(values[0][-1]) < np.mean(values[0][0])
    for name, expected in networks[0].statistics.items():
        np.testing.assert_allclose(networks[1].statistics[name].get(), expected, rtol=1e-8)


def test_a_forward_between_backward_and_update_leaves_the_gradient(backend):
    """It may make new buffers and try ways to a product, which write where the gradient stands."""
    network = SHAPES["one layer"](device=backend)
    network.backward(network.forward(rows(5)))
    before = network.flat_gradient.get()
    network.forward(rows(50))
    network.predict(rows(50))
    np.testing.assert_array_equal(network.flat_gradient.get(), before)
    assert np.isfinite(before).all() and before.any()


# --- ways to a result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu_tanh"])
def test_an_epilogue_saves_the_kernel_behind_a_product(activation):
    counts = {}
    for way, options in WAYS.items():
        device = gpu(**options)
        network = chain(gm.Dense(9, activation), device=device)
        X, dz = rows(), np.ones((BATCH, OUTPUTS))
        network.forward(X)  # tries both
        device.runtime.launches.clear()
        network.backward(network.forward(X) * 0 + dz)
        counts[way] = [device.runtime.launches[f"dense_{pass_}_f32"] for pass_ in ("forward", "backward")]
    linear = activation == "identity"
    assert counts == {"plain": [2, 2], "epilogues": [0, 0 if linear else 1], "without epilogues": [2, 2]}


def test_both_ways_agree_to_rounding():
    """What an epilogue adds, a kernel adds behind the product."""
    found = [pass_of(residual(device=gpu(prefer=prefer)), rows()) for prefer in (0, 1)]
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("shape", ["graph", "layer norm before", "linear with dropout", "largest norm"])
def test_the_order_in_which_threads_run_changes_no_bit(shape):
    found = [
        pass_of(SHAPES[shape](models=2, device=gpu(schedule=schedule, prefer=1)), rows(70)) for schedule in range(4)
    ]
    for other in found[1:]:
        for name, values in found[0].items():
            assert other[name].tobytes() == values.tobytes(), name


def test_the_number_of_processors_decides_the_blocks_alone(plain):
    """One processor gives a block many rows, a hundred give it few."""
    found = [pass_of(residual(device=gpu(processors=n)), rows(300)) for n in (1, 100)]
    assert_close(found[1], found[0], 1e-6)


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_nan_stays_nan(activation, norm, backend):
    """In the row that it entered by, and through the batch's statistics in all."""
    X = rows()
    X[4, 2] = np.nan
    networks = twins(lambda **o: chain(gm.Dense(9, activation, norm=norm), **o), backend)
    for training in (False, True):
        host_nan, device_nan = (np.isnan(network.forward(X, training)) for network in networks)
        np.testing.assert_array_equal(device_nan, host_nan)
        assert host_nan[4].all() and host_nan.any(axis=1).sum() == (BATCH if norm == "batch" and training else 1)
    for network in networks:
        with np.errstate(invalid="ignore"):
            network.backward(np.ones((BATCH, OUTPUTS)))
    host_nan, device_nan = (np.isnan(host(network, network.flat_gradient)) for network in networks)
    np.testing.assert_array_equal(device_nan, host_nan)
    assert host_nan.any()


def test_infinite_parameters_and_large_inputs(plain):
    networks = twins(SHAPES["one layer"], plain)
    for network in networks:
        network.parameters["dense_0.b"][0] = [np.inf, -np.inf, np.nan, 1e30]
    np.testing.assert_array_equal(networks[1].logits(rows()), networks[0].logits(rows()))


# --- data ------------------------------------------------------------------------------------------------------------

KINDS = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_input_of_any_type(kind, dtype, plain):
    X = np.random.default_rng(0).integers(0, 100, (9, FEATURES)).astype(kind)
    networks = twins(SHAPES["one layer"], plain, dtype=dtype)
    for network in networks:
        network.learn_standardization(X, None)
    for call in (Network.logits, Network.forward):
        expected = call(networks[0], X)
        np.testing.assert_allclose(
            call(networks[1], X), expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max()
        )


@pytest.mark.parametrize("mode", [True, "global"])
@pytest.mark.parametrize("own", [False, True])
def test_standardized_input_and_targets(mode, own, plain):
    """Of all models together, and where each has learned from rows of its own."""
    X, y = rows(40) * 7 + 100, rows(40, seed=8)[:, :OUTPUTS] * 1000
    parts = [np.arange(10 + 9 * i) for i in range(3)] if own else None
    networks = twins(
        SHAPES["input dropout"], plain, models=3, standardize=mode, standardize_targets=True, dtype="float64"
    )
    for network in networks:
        network.learn_standardization(X, y, parts)
        network.loss = "squared_error"
        assert network.scales_apart == own
    for call in (Network.predict, Network.logits, Network.forward):
        np.testing.assert_allclose(call(networks[1], X), call(networks[0], X), rtol=1e-11)


def test_predictions_in_stretches(monkeypatch, plain):
    monkeypatch.setattr(GpuBackend, "prediction_rows", 5)
    networks = twins(SHAPES["graph"], plain, models=2)
    for n in (3, 12, 5):  # with a ragged end, and buffers kept from one call to the next
        np.testing.assert_allclose(networks[1].logits(rows(n)), networks[0].logits(rows(n)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_predictions_of_each_loss(loss, plain):
    for call in (Network.predict, Network.predict_proba) if LOSSES[loss].is_classifier else (Network.predict,):
        networks = twins(SHAPES["one layer"], plain, models=2)
        for network in networks:
            network.loss = loss
        ours, theirs = call(networks[1], rows()), call(networks[0], rows())
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# --- a network as a thing --------------------------------------------------------------------------------------------


def trained_a_little(device, **options):
    network = residual(device=device, standardize=True, **options)
    network.learn_standardization(rows(), None)
    network.loss = SOFTMAX
    pass_of(network, rows())
    return network


def assert_same_network(ours, theirs):
    for name in ("parameters", "statistics"):
        for key, values in getattr(theirs, name).items():
            np.testing.assert_array_equal(host(ours, getattr(ours, name)[key]), host(theirs, values), err_msg=key)
    assert ours.steps.tolist() == theirs.steps.tolist()
    np.testing.assert_allclose(ours.logits(rows()), theirs.logits(rows()), rtol=0, atol=1e-5)


def test_the_same_weights_from_a_seed_on_both_sides(plain):
    networks = twins(SHAPES["graph"], plain, models=2)
    np.testing.assert_array_equal(networks[1].flat.get(), networks[0].flat)
    networks[1].flat[...] = 7.0
    networks[1].initialize()
    np.testing.assert_array_equal(networks[1].flat.get(), networks[0].flat)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_copy_on_another_device_and_back(precision, plain):
    network = trained_a_little(plain, models=2, precision=precision)
    there = network.copy(device="cpu")
    assert isinstance(there.flat, np.ndarray) and there.device_reason == "cpu: asked for"
    back = there.copy(device=plain)
    other = back.copy(device=gpu())  # another device, not only another network
    for twin in (back, other, network.copy()):
        assert_same_network(twin, network)
        assert_same_network(twin[1], network[1])
        twin.flat[...] = 0.0
    if precision == "float32":
        assert_same_network(there, network)
    assert network.flat.get().any()
    assert "the backend that was given" in network.device_reason and network.device_reason in network.summary()


def test_saved_loaded_and_pickled(tmp_path, plain):
    network = trained_a_little(plain, models=2)
    network.save(tmp_path / "net.safetensors")
    for twin in (
        gm.load(tmp_path / "net.safetensors", device=plain),
        gm.load(tmp_path / "net.safetensors", device="cpu"),
        pickle.loads(pickle.dumps(network)),  # where it is unpickled decides the device
    ):
        assert_same_network(twin, network)


def test_gradient_check(plain):
    network = gm.Network(
        [gm.Dense(8, "tanh", norm="batch", dropout=0.3), gm.Dense(OUTPUTS)], n_features=FEATURES, device=plain
    )
    network.loss = SOFTMAX
    before = pass_of(network, rows())
    errors = network.gradient_check(rows(), np.arange(BATCH) % OUTPUTS)
    assert errors.keys() == network.parameters.keys() and max(errors.values()) < 1e-5
    np.testing.assert_array_equal(network.parameters["dense_0.W"].get(), before["dense_0.W"])


def test_diagnose(plain):
    networks = twins(lambda **o: chain(gm.Dense(9, "relu"), gm.Dense(5, "sigmoid"), **o), plain, standardize=True)
    y = np.arange(BATCH) % OUTPUTS
    expected, found = (network.diagnose(100 * rows(), y, SOFTMAX) for network in networks)
    assert found.messages == expected.messages and str(found) == str(expected)
    assert networks[1].shift is None and not networks[1].flat_gradient.get().any()


def test_weights_are_copied_model_by_model(plain):
    fleet, kept = residual(models=3, device=plain), {}
    start = fleet.flat.get()
    fleet.copy_weights(kept, np.ones(3, bool))
    fleet.flat[...] = 5.0
    fleet.copy_weights(kept, np.array([False, True, False]))
    fleet.flat[...] = 6.0
    fleet.set_weights(kept, np.array([True, True, False]))
    np.testing.assert_array_equal(fleet.flat.get(), [start[0], np.full_like(start[1], 5), np.full_like(start[2], 6)])


# --- arrays of other libraries on the device -------------------------------------------------------------------------


def foreign(backend, values):
    return ForeignArray(on_device(backend.runtime, values))


class Strided:
    """Every second column of an array on the device."""

    def __init__(self, array):
        interface = dict(array.__cuda_array_interface__)
        n, columns = interface["shape"]
        width = np.dtype(interface["typestr"]).itemsize
        self.array = array
        self.__cuda_array_interface__ = interface | {
            "shape": (n, columns // 2),
            "strides": (columns * width, 2 * width),
        }


def test_predictions_come_back_in_kind(plain):
    network = trained_a_little(plain, models=2)
    X = rows(dtype=np.float32)
    there = foreign(plain, X)
    for call in (network.logits, network.predict, network.predict_proba):
        answer = call(there)
        assert isinstance(answer, ForeignArray)
        np.testing.assert_array_equal(answer.get(), call(X))
    network.classes = ["a", "b", "c", "d"]
    assert network.predict(there).tolist() == network.predict(X).tolist()  # names are for the host
    np.testing.assert_array_equal(there.get(), X)


@pytest.mark.parametrize("kind", KINDS)
def test_training_data_on_the_device(kind, plain):
    """X is read where it lies; targets and weights, which are checked, come to the host. The bits are the same."""
    rng = np.random.default_rng(0)
    X, y, weight = rng.integers(0, 90, (20, FEATURES)).astype(kind), np.arange(20) % OUTPUTS, rng.uniform(0.5, 2, 20)
    found = []
    for give in (lambda values: values, lambda values: foreign(plain, values)):
        network = residual(device=plain, standardize=True)
        trainer = gm.Trainer(network, SOFTMAX)
        data = give(X), give(y)
        history = trainer.fit(
            *data, sample_weight=give(weight), validation_data=(*data, give(weight)), batch_size=8, epochs=2
        )
        history.pop("seconds")
        found.append((history, network.flat.get().tobytes(), trainer.evaluate(*data, give(weight))))
    assert found[0] == found[1]


def test_data_on_the_device_are_not_copied_to_the_host_to_predict(plain):
    network = trained_a_little(plain)
    there = foreign(plain, rows(50, dtype=np.float32))
    network.predict(there)
    before = plain.runtime.downloads
    network.predict(there)
    assert plain.runtime.downloads - before == 2  # whether all is finite, and the logits


def test_data_on_the_device_that_do_not_fit(plain):
    network, X = SHAPES["one layer"](device=plain), rows(20, dtype=np.float32)
    y = np.arange(20) % OUTPUTS
    bad = X.copy()
    bad[7, 2], bad[9, 0] = np.nan, np.inf
    cases = {
        r"X has shape \(20, 5\); expected \(n_samples, 6\), n_samples at least 1": X[:, :5],
        r"X has shape \(20,\); expected \(n_samples, 6\)": X[:, 0],
        r"X has shape \(0, 6\); expected \(n_samples, 6\)": X[:0],
        r"X\[7, 2\] is nan; every value must be finite": bad,
    }
    for message, values in cases.items():
        for call in (network.predict, lambda X: gm.Trainer(network, SOFTMAX).fit(X, y)):
            with pytest.raises(ValueError, match=message):
                call(foreign(plain, values))
    wide = Strided(foreign(plain, np.repeat(X, 2, axis=1)))
    with pytest.raises(ValueError, match=r"X on the GPU must be C-contiguous: pass cupy.ascontiguousarray\(X\)"):
        network.predict(wide)
    trainer = gm.Trainer(network, SOFTMAX)
    with pytest.raises(ValueError, match=r"validation X\[7, 2\] is nan"):
        trainer.fit(X, y, validation_data=(foreign(plain, bad), y))
    with pytest.raises(
        ValueError, match="validation_split picks rows on the host; for X on the GPU give validation_data"
    ):
        trainer.fit(foreign(plain, X), y, validation_split=0.2)


def test_data_on_the_device_for_a_network_on_the_cpu(plain):
    network, y = SHAPES["one layer"](device="cpu"), np.arange(BATCH) % OUTPUTS
    message = "the data lie on a GPU and the network on the CPU: copy them, or build it with device='cuda'"
    X = foreign(plain, rows())
    trainer = gm.Trainer(network, SOFTMAX)
    for call in (lambda: network.predict(X), lambda: trainer.fit(X, y), lambda: trainer.fit(rows(), foreign(plain, y))):
        with pytest.raises(TypeError, match=message):
            call()


# --- what has no kernel ----------------------------------------------------------------------------------------------


class OwnRule(gm.SGD):
    """An optimizer of a user's own."""

    def __post_init__(self):
        super().__post_init__()
        self.rule = ""


def test_rows_of_ones_own_are_for_the_cpu(plain):
    own = Activation("own", np.negative, lambda z, a, out=None: -np.ones_like(z), "a test", "glorot_uniform")
    with pytest.raises(
        ValueError, match="activation 'own' is not in gpumlp's table and has no kernel: use device='cpu'"
    ):
        chain(gm.Dense(5, own), device=plain).forward(rows())
    row = LOSSES["squared_error"]
    loss = gm.Loss(LossRow("mine", row.f, row.targets, row.output, row.metric, row.source))
    network = chain(device=plain)
    with pytest.raises(ValueError, match="loss 'mine' is not in gpumlp's table and has no kernel: use device='cpu'"):
        gm.Trainer(network, loss).fit(rows(), rows()[:, :OUTPUTS])
    for use in (
        lambda: gm.Trainer(network, "squared_error", OwnRule()).fit(rows(), rows()[:, :OUTPUTS]),
        lambda: OwnRule().step(network),
    ):
        with pytest.raises(ValueError, match="OwnRule is not in gpumlp's table and has no kernel: use device='cpu'"):
            use()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_full():
    """The message says what was wanted and what there is; the network is still of use."""
    device = gpu(memory=200_000)
    network = chain(gm.Dense(50, "relu"), device=device)
    expected = network.logits(rows())
    with pytest.raises(
        DeviceMemoryError, match=r"cuda:0 has [\d,]+ bytes free and an array needs [\d,]+: try a smaller"
    ):
        network.forward(rows(5000))
    with pytest.raises(MemoryError):
        network.predict(rows(5000))
    np.testing.assert_array_equal(network.logits(rows()), expected)
    network.backward(network.forward(rows()))
    gm.SGD().step(network)
    assert np.isfinite(network.logits(rows())).all()


def test_buffers_that_are_replaced_are_freed(no_collector):
    """At once: the largest batch decides what a network holds, and no collector is needed."""
    device = gpu(prefer=1)
    network = residual(device=device)
    network.forward(rows(100))
    held = device.runtime.free_bytes()
    again = residual(device=device)
    for n in (10, 40, 100):
        again.forward(rows(n))
    assert device.runtime.free_bytes() == 2 * held - device.runtime.memory


# --- arrays of the device --------------------------------------------------------------------------------------------


def make(values, type=None):
    return on_device(EmulatedRuntime(), np.asarray(values), type)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bool"])
def test_an_array_comes_back_as_it_went(kind):
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    array = make(values)
    assert (array.shape, array.ndim, array.size, len(array)) == ((2, 3, 4), 3, 24, 2)
    assert array.dtype == values.dtype and array.nbytes == values.nbytes and array.is_contiguous
    assert array.get().dtype == values.dtype
    np.testing.assert_array_equal(array.get(), values)


def test_bfloat16_comes_back_as_float32():
    values = np.array([[1.0, 1 / 3, -1e-40, 3e38], [np.nan, np.inf, -0.0, 1 + 2**-9]], np.float32)
    array = make(values, "bf16")
    assert (array.dtype, array.nbytes) == (np.float32, 16)
    np.testing.assert_allclose(array.get(), values, rtol=2**-8, atol=1e-40)
    assert np.isnan(array.get()[1, 0]) and array.get()[1, 3] == 1
    array[0, 1:3] = [5.0, 7.0]
    assert array.get()[0].tolist()[1:3] == [5, 7]


VIEWS = {
    "first axis": lambda a: a[1],
    "last": lambda a: a[-1],
    "slice": lambda a: a[:, 1:3],
    "columns": lambda a: a[..., 1:3],
    "element": lambda a: a[1, 2, 3],
    "new axis": lambda a: a[:, None, 1],
    "numpy's integer": lambda a: a[np.int64(1)],
    "none": lambda a: a[:, 2:2],
    "past the end": lambda a: a[:, 1:100],
    "transposed": lambda a: a.swapaxes(1, 2),
    "transposed and cut": lambda a: a[1:].swapaxes(0, 2)[1:3],
    "flat": lambda a: a.reshape(24),
    "unknown length": lambda a: a.reshape(4, -1),
    "leading axis strided": lambda a: a[:, :2].reshape(2, 8),
    "split behind": lambda a: a[:, 1:2].reshape(2, 2, 2),
    "whole": lambda a: a[...],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory(name):
    view, values = VIEWS[name], np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = make(values)
    part = view(array)
    expected = view(values)
    assert part.shape == np.shape(expected)
    assert part.is_contiguous == (np.shape(expected) == () or expected.flags.c_contiguous)
    np.testing.assert_array_equal(part.get(), expected)
    part[...] = 100.0 + np.arange(part.size, dtype=np.float32).reshape(part.shape)
    places = view(np.arange(24).reshape(2, 3, 4))
    values.reshape(-1)[places] = 100.0 + np.arange(part.size).reshape(part.shape)
    np.testing.assert_array_equal(array.get(), values)
    part[...] = 0
    np.testing.assert_array_equal(part.get(), np.zeros(part.shape))


def test_values_are_broadcast_and_cast_and_copied_between_strides():
    array = make(np.zeros((2, 3, 4), np.float32))
    array[:, 1] = [1, 2, 3, 4]
    array[0, 2:] = 7
    other = make(np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    expected = array.get()
    np.testing.assert_array_equal(expected[:, 1], [[1, 2, 3, 4]] * 2)
    runtime = array.memory.runtime
    copied = on_device(runtime, np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    array[...] = copied.swapaxes(1, 2)
    np.testing.assert_array_equal(array.get(), other.get().swapaxes(1, 2))
    with pytest.raises(AssertionError):
        array[0] = copied[0]  # another shape


def test_what_a_view_cannot_be():
    array = make(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(IndexError, match="a view of device memory takes slices of step 1"):
        array[:, ::2]
    for key in (2, -3, 1.5, "x"):
        with pytest.raises(IndexError, match="is no index into an axis of 2"):
            array[key]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) does not reshape to \(5, 5\)"):
        array.reshape(5, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 4\) and strides \(12, 4, 1\) is no view of shape \(16,\)"):
        array[:, :2].reshape(16)


def test_numpy_does_not_take_it_silently():
    array = make(np.ones(3, np.float32))
    message = r"an array on the device does not become a NumPy array by itself: call its get\(\)"
    for use in (np.asarray, np.sum, lambda a: np.zeros(3) + a):
        with pytest.raises(TypeError, match=message):
            use(array)
    assert repr(array) == "<DeviceArray (3,) f32 on cuda:0>"


def test_the_interface_of_other_libraries():
    array = make(np.zeros((2, 3, 4), np.float32))
    interface = array[1:].__cuda_array_interface__
    assert interface == {
        "shape": (1, 3, 4), "typestr": "<f4", "data": (array.pointer + 48, False), "version": 3, "strides": None
    }  # fmt: skip
    assert array[..., :2].__cuda_array_interface__["strides"] == (48, 16, 4)
    with pytest.raises(AttributeError, match="bfloat16 has no name in __cuda_array_interface__"):
        make(np.zeros(3), "bf16").__cuda_array_interface__  # noqa: B018
    assert not hasattr(make(np.zeros(3), "bf16"), "__cuda_array_interface__")


def test_the_backend_adopts_a_view_and_makes_arrays():
    device = gpu()
    there = foreign(device, np.arange(6.0).reshape(2, 3))
    adopted = device.adopt(there)
    assert adopted.pointer == there.__cuda_array_interface__["data"][0] and adopted.type == "f64"
    assert device.adopt(np.zeros(3)) is None and device.adopt([1, 2]) is None
    assert device.asarray(adopted) is adopted and device.data(adopted) is adopted
    assert device.zeros((2, 3), np.int64).get().tolist() == [[0] * 3] * 2
    assert device.asarray([[1, 2]], np.float32).get().dtype == np.float32
    assert isinstance(device.export(np.arange(3.0), there), ForeignArray)
    values = np.arange(3)
    assert device.to_numpy(values) is values
    assert (device.name, device.device, device.is_device, device.keeps_masks) == ("gpu", "cuda:0", True, False)


# --- verbs that no network calls with all they take ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 33, 5000])
def test_vectors_of_parameters(n, dtype, plain):
    rng, models = np.random.default_rng(0), 3
    x, y = (rng.normal(size=(models, n)).astype(dtype) for _ in range(2))
    alpha, beta = rng.normal(size=(2, models))
    there_x, there_y = plain.asarray(x), plain.asarray(y)
    reference = Network([gm.Dense(1)], n_features=1, device="cpu").backend
    np.testing.assert_allclose(plain.dot(there_x, there_y), reference.dot(x, y), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(plain.dot(there_x, None), reference.dot(x, None), rtol=1e-6)
    for first, second in ((alpha, beta), (None, beta), (alpha, None), (None, None)):
        for whole in (y, None):
            out, expected = plain.empty(x.shape, dtype), np.empty_like(x)
            plain.combine(out, first, there_x, second, None if whole is None else there_y)
            reference.combine(expected, first, x, second, whole)
            np.testing.assert_allclose(out.get(), expected, rtol=1e-6, atol=1e-6)
    before = plain.runtime.downloads
    plain.dot(there_x, there_y)
    assert plain.runtime.downloads == before + 1


@pytest.mark.parametrize("outputs", [1, 40, 1100])
def test_predictions_of_many_outputs_are_evaluated(outputs, plain):
    """A lane, a warp and a block share the outputs of a row."""
    X, y = rows(5), np.arange(5) % max(outputs, 2)
    loss = "binary_cross_entropy" if outputs == 1 else SOFTMAX
    for name, targets in ((loss, y), ("huber", rows(5, seed=3)[:, :1] * np.ones(outputs))):
        if name == SOFTMAX:
            targets = targets * (outputs // 5)
        networks = [gm.Network([gm.Dense(outputs)], n_features=FEATURES, device=d, models=2) for d in ("cpu", plain)]
        expected, found = (gm.Trainer(n, name).evaluate(X, targets) for n in networks)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        expected, found = (gm.Trainer(n, name, "sgd").fit(X, targets, batch_size=2, epochs=2)["loss"] for n in networks)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_first_number_that_is_none(plain):
    X = np.zeros((70, 50), np.float32)
    assert plain.first_nonfinite(plain.asarray(X), np.float32) is None
    X[60, 3], X[69, 49] = np.inf, np.nan
    assert plain.first_nonfinite(plain.asarray(X), np.float32) == 60 * 50 + 3
    assert plain.first_nonfinite(plain.asarray(np.zeros((3, 2), np.uint8)), np.float32) is None
    X = np.full((2, 2), 1e39)
    assert plain.first_nonfinite(plain.asarray(X), np.float64) is None
    assert plain.first_nonfinite(plain.asarray(X), np.float32) == 0


def test_a_workspace_prepares_each_layer_once(plain):
    network = chain(gm.Dense(9, "relu"), device=plain)
    workspace = Workspace(network, 8, training=True, per_model_rows=False)
    works = [operation.work for operation in workspace.operations]
    workspace.forward()
    assert [operation.work for operation in workspace.operations] == works and None not in works
    assert workspace.view(slice(0, 1), 8) is workspace and workspace.view(slice(0, 1), 3) is workspace.view(
        slice(0, 1), 3
    )


def test_a_loop_on_the_device_copies_nothing(plain):
    """Rows and gradients that lie on the device are read there, and logits come back in kind."""
    network = gm.Network([gm.Dense(5, "relu"), gm.Dense(OUTPUTS)], n_features=FEATURES, seed=1, device=plain)
    X = rows(dtype=np.float32)
    expected = network.forward(X)
    network.backward(np.ones_like(expected))
    gradient = host(network, network.flat_gradient)
    z = network.forward(ForeignArray(on_device(plain.runtime, X)))
    assert isinstance(z, ForeignArray)
    np.testing.assert_array_equal(z.get(), expected)
    network.flat_gradient[...] = 0
    network.backward(ForeignArray(on_device(plain.runtime, np.ones_like(expected))))
    np.testing.assert_array_equal(host(network, network.flat_gradient), gradient)


def test_predictions_of_many_sizes_share_their_plans(plain):
    network = gm.Network([gm.Dense(5, "relu"), gm.Dense(OUTPUTS)], n_features=FEATURES, seed=1, device=plain)
    X, planned = rows(70, dtype=np.float32), []
    expected = network.logits(X)
    product = plain.runtime.product
    plain.runtime.product = lambda product_: planned.append(product_) or product(product_)
    try:
        for n in range(1, 71):
            np.testing.assert_allclose(network.logits(X[:n]), expected[:n], rtol=1e-5, atol=1e-6)
    finally:
        del plain.runtime.product
    assert len(planned) <= 2 * 2 * 8  # two layers, two ways, and 1, 2, 4, ..., 64 rows


def test_old_gpus_have_no_bf16():
    old = gpu()
    old.runtime.capability = (7, 5)
    with pytest.raises(
        ValueError, match=r"precision='bf16' needs a GPU of compute capability 8.0 .* cuda:0 has 7.5: use"
    ):
        gm.Network([gm.Dense(3)], n_features=2, device=old, precision="bf16")
    network = gm.Network([gm.Dense(3)], n_features=2, device=old, precision="tf32")  # a permission
    np.testing.assert_array_equal(network.logits(np.eye(2)), host(network, network.parameters["dense_0.W"])[0].T)
