"""Optimizers: each against its docstring's equation written out in float64, and against torch.optim."""

from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest

from gpumlp import LBFGS, SGD, Adadelta, Adagrad, Adam, AdamW, Dense, Loss, NAdam, Network, RMSprop, Trainer
from gpumlp.optimizer_state import BLOCK
from gpumlp.optimizers import OPTIMIZERS, get_optimizer

STEPWISE = {name: row for name, row in OPTIMIZERS.items() if not row.full_batch}  # L-BFGS has tests/test_lbfgs.py
DTYPES = {"float64": 1e-11, "float32": 1e-5}  # relative to the largest value, after ten steps


# --- the equations, as the docstrings have them: what is subtracted from w ------------------------------------------


def sgd(o, t, g, s):
    s["v"] = o.momentum * s["v"] + g
    return o.learning_rate * (g + o.momentum * s["v"] if o.nesterov else s["v"])


def rmsprop(o, t, g, s):
    s["v"] = o.rho * s["v"] + (1 - o.rho) * g**2
    return o.learning_rate * g / (np.sqrt(s["v"]) + o.epsilon)


def adagrad(o, t, g, s):
    s["v"] = s["v"] + g**2
    return o.learning_rate * g / (np.sqrt(s["v"]) + o.epsilon)


def adadelta(o, t, g, s):
    s["v"] = o.rho * s["v"] + (1 - o.rho) * g**2
    delta = g * np.sqrt(s["u"] + o.epsilon) / np.sqrt(s["v"] + o.epsilon)
    s["u"] = o.rho * s["u"] + (1 - o.rho) * delta**2
    return o.learning_rate * delta


def adam(o, t, g, s):
    s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * g
    s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * g**2
    m_hat, v_hat = s["m"] / (1 - o.beta1**t), s["v"] / (1 - o.beta2**t)
    return o.learning_rate * m_hat / (np.sqrt(v_hat) + o.epsilon)


def nadam(o, t, g, s):
    mu = [o.beta1 * (1 - 0.5 * 0.96 ** (o.momentum_decay * k)) for k in range(1, t + 2)]  # μ₁ ... μₜ₊₁
    s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * g
    s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * g**2
    m_hat = mu[t] * s["m"] / (1 - np.prod(mu)) + (1 - mu[t - 1]) * g / (1 - np.prod(mu[:t]))
    return o.learning_rate * m_hat / (np.sqrt(s["v"] / (1 - o.beta2**t)) + o.epsilon)


EQUATIONS = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "adam": adam,
    "adamw": adam,
    "nadam": nadam,
}


def reference_step(o, t, w, g, states):
    """One model's step, in the documented order; ``w`` and ``g`` map the names of tensors to float64 arrays."""
    if o.clip_value is not None:
        g = {name: np.clip(x, -o.clip_value, o.clip_value) for name, x in g.items()}
    if o.clip_norm is not None:
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        g = {name: x * min(1, o.clip_norm / norm) for name, x in g.items()}
    for name in w:
        own = g[name]
        if name.endswith(".W"):
            own = own + o.l2 * w[name] + o.l1 * np.sign(w[name])
            w[name] = w[name] * (1 - o.learning_rate * o.weight_decay)
        w[name] = w[name] - EQUATIONS[NAMES[type(o)]](o, t, own, states[name])


NAMES = {row: name for name, row in OPTIMIZERS.items()}
REGULARISED = dict(l1=0.02, l2=0.3, weight_decay=0.2, clip_value=0.9, clip_norm=1.5)
VARIANTS = {
    **{f"{name} default": row() for name, row in STEPWISE.items()},
    **{f"{name} regularised": row(0.03, **REGULARISED) for name, row in STEPWISE.items()},
    **{f"sgd {name}": SGD(0.1, **{name: value}) for name, value in REGULARISED.items()},
    "sgd momentum": SGD(0.05, 0.8),
    "sgd nesterov": SGD(0.05, 0.8, nesterov=True),
    "rmsprop options": RMSprop(0.02, 0.7, 0.1),
    "adagrad options": Adagrad(0.3, 0.1),
    "adadelta options": Adadelta(0.5, 0.6, 1e-2),
    "adam options": Adam(0.02, 0.7, 0.9, 0.1),
    "adam without moments": Adam(0.02, 0.0, 0.0),
    "adamw options": AdamW(0.02, 0.7, 0.9, 0.1, weight_decay=2.0),
    "nadam options": NAdam(0.02, 0.7, 0.9, 0.1, 0.2),
}
PER_MODEL = {  # three models each with its own
    "sgd": dict(learning_rate=[0.1, 0.01, 0.03], momentum=[0.0, 0.5, 0.9]),
    "rmsprop": dict(learning_rate=[0.1, 0.01, 0.03], rho=[0.0, 0.5, 0.9], epsilon=[1e-8, 1e-2, 0.1]),
    "adagrad": dict(learning_rate=[0.1, 0.01, 0.03], epsilon=[1e-8, 1e-2, 0.1]),
    "adadelta": dict(learning_rate=[0.1, 1.0, 0.3], rho=[0.0, 0.5, 0.9], epsilon=[1e-8, 1e-2, 0.1]),
    "adam": dict(
        learning_rate=[0.1, 0.01, 0.03], beta1=[0.0, 0.5, 0.9], beta2=[0.9, 0.0, 0.99], epsilon=[1e-8, 1e-2, 0.1]
    ),
    "adamw": dict(beta1=[0.0, 0.5, 0.9], weight_decay=[0.0, 0.1, 2.0]),
    "nadam": dict(beta1=[0.0, 0.5, 0.9], beta2=[0.9, 0.0, 0.99], momentum_decay=[0.0, 0.004, 0.5]),
}
SHAPES = {
    "small": dict(units=5, n_features=4),
    "several blocks": dict(units=131, n_features=257),  # 33,667 weights
    "fleet": dict(units=5, n_features=4, models=3),
    "fleet of several blocks": dict(units=131, n_features=257, models=3),
}


def build(units=5, n_features=4, models=None, dtype="float64"):
    layers = [Dense(units, "tanh", norm="layer"), Dense(3)]
    return Network(layers, n_features=n_features, models=models, dtype=dtype, seed=3)


def compare_ten_steps(optimizer, network, tolerance):
    """Ten steps of one random gradient each, of every size, against the equations."""
    rng = np.random.default_rng(1)
    optimizer = optimizer.fresh()
    models = range(network.models)
    w = [{name: values[i].astype(np.float64) for name, values in network.parameters.items()} for i in models]
    states = [defaultdict(lambda: defaultdict(float)) for _ in models]
    for t in range(1, 11):
        for values in network.gradients.values():
            values[...] = rng.normal(size=values.shape) * rng.choice([1e-3, 1e-1, 1, 5], size=values.shape)
        for i in models:
            g = {name: values[i].astype(np.float64) for name, values in network.gradients.items()}
            own = optimizer.for_model(i)
            reference_step(own, t, w[i], g, states[i])
        optimizer.step(network)
    for i in models:
        for name, values in network.parameters.items():
            np.testing.assert_allclose(values[i], w[i][name], rtol=0, atol=tolerance * np.abs(w[i][name]).max())
    assert network.steps.tolist() == [10] * network.models


def test_every_optimizer_has_its_equation_here():
    assert EQUATIONS.keys() == STEPWISE.keys() == PER_MODEL.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_follow_the_equations(variant, dtype):
    compare_ten_steps(VARIANTS[variant], build(dtype=dtype), DTYPES[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPWISE)
def test_blocks_and_fleets_follow_the_equations(name, shape):
    network = build(**SHAPES[shape])
    optimizer = OPTIMIZERS[name](**PER_MODEL[name] if network.models > 1 else {}, l1=0.02, l2=0.1, clip_norm=30.0)
    compare_ten_steps(optimizer, network, 1e-11)
    block_count = len(optimizer.fresh().bind(network).blocks(slice(0, network.models)))
    assert (network.n_weights > BLOCK) == ("blocks" in shape)
    assert block_count == {"small": 2, "fleet": 2, "several blocks": 3, "fleet of several blocks": 7}[shape]


def test_per_model_penalties_and_clipping():
    per_model = dict(
        l1=[0.0, 0.1, 0.01],
        l2=[0.3, 0.0, 0.1],
        weight_decay=[0.1, 0.0, 1.0],
        clip_norm=[1.0, 9.0, 3.0],
        clip_value=[0.5, 9.0, 1.0],
    )
    compare_ten_steps(SGD(0.1, **per_model), build(models=3), 1e-11)


def test_bias_and_norm_feel_the_gradient_alone():
    network = build()
    for values in network.parameters.values():
        values[...] = 2.0
    AdamW(0.1, l1=0.1, l2=0.1, weight_decay=0.5).step(network)  # all gradients are 0
    for name, values in network.parameters.items():
        assert (values == 2.0).all() == (not name.endswith(".W"))


def test_a_model_of_a_fleet_steps_by_itself():
    """Rows of different lengths and early stopping step some models and not others: each counts its own t."""
    fleet, alone = build(models=3), build(models=3)
    bound, bound_alone = Adam(0.1, l2=0.1).bind(fleet), Adam(0.1, l2=0.1).bind(alone)
    rng = np.random.default_rng(5)
    for t in range(4):
        g = rng.normal(size=fleet.flat.shape)
        fleet.flat_gradient[...] = alone.flat_gradient[...] = g
        bound.step(slice(0, 3) if t != 1 else slice(1, 2), 0.1)
        for i in range(3):
            if t != 1 or i == 1:
                bound_alone.step(slice(i, i + 1), 0.1)
    assert bound.t.tolist() == bound_alone.t.tolist() == [3, 4, 3]
    np.testing.assert_array_equal(fleet.flat, alone.flat)


# --- the peer -------------------------------------------------------------------------------------------------------

PEERS = {  # ours, torch's class, its arguments
    "sgd": (SGD(0.1), "SGD", dict(lr=0.1)),
    "momentum": (SGD(0.1, 0.9), "SGD", dict(lr=0.1, momentum=0.9)),
    "nesterov": (SGD(0.1, 0.9, nesterov=True), "SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    "rmsprop": (RMSprop(), "RMSprop", {}),
    "adagrad": (Adagrad(), "Adagrad", {}),
    "adadelta": (Adadelta(), "Adadelta", dict(lr=1.0)),
    "adam": (Adam(), "Adam", {}),
    "adamw": (AdamW(), "AdamW", {}),
    "nadam": (NAdam(), "NAdam", {}),
    "lbfgs": (LBFGS(0.5, history=4, line_search=False), "LBFGS", dict(lr=0.5, history_size=4, max_iter=1)),
}


def torch_twin(torch, network):
    """The same tanh network in torch, its parameters by our names."""
    dense = [(network.parameters[f"dense_{i}.W"][0], network.parameters[f"dense_{i}.b"][0]) for i in range(3)]
    names = {
        f"dense_{i}.{k}": torch.tensor(v, requires_grad=True)
        for i, pair in enumerate(dense)
        for k, v in zip("Wb", pair, strict=True)
    }

    def loss(X, y):
        x = torch.tensor(X)
        for i in range(3):
            x = x @ names[f"dense_{i}.W"].T + names[f"dense_{i}.b"]
            x = torch.tanh(x) if i < 2 else x
        return torch.nn.functional.cross_entropy(x, torch.tensor(y))

    return names, loss


@pytest.mark.peer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("peer", "clip"), [(p, c) for p in PEERS for c in (None, 0.05) if not (c and p == "lbfgs")])
def test_ten_steps_as_torch(peer, dtype, clip):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its pool spins against ours and costs more than these few rows
    ours, name, arguments = PEERS[peer]
    optimizer = ours.fresh()
    optimizer.clip_norm = clip
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(32, 6)).astype(dtype), rng.integers(0, 4, 32)
    network = Network([Dense(9, "tanh"), Dense(5, "tanh"), Dense(4)], n_features=6, seed=1, dtype=dtype)
    parameters, torch_loss = torch_twin(torch, network)
    weights = [v for k, v in parameters.items() if k.endswith("W")]
    rest = [v for k, v in parameters.items() if k.endswith("b")]
    groups = [dict(params=weights), dict(params=rest, weight_decay=0.0)] if name == "AdamW" else [*parameters.values()]
    theirs = getattr(torch.optim, name)(groups, **arguments)
    loss = Loss("softmax_cross_entropy")

    def evaluate():
        value, dz = loss(network.forward(X), y)
        network.backward(dz)
        return value

    def closure():
        theirs.zero_grad()
        value = torch_loss(X, y)
        value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        return value

    for _ in range(10):
        theirs.step(closure)
        if optimizer.full_batch:
            optimizer.step(network, evaluate=evaluate)
        else:
            evaluate()
            optimizer.step(network)
    loose = clip or peer == "nadam"  # torch's clipping adds 1e-6 to the norm, and its Πμ is float32
    tolerance = 1e-5 if dtype == "float32" or loose else 1e-11
    for key, values in parameters.items():
        expected = values.detach().numpy()
        np.testing.assert_allclose(
            network.parameters[key][0], expected, rtol=0, atol=tolerance * np.abs(expected).max()
        )


# --- what users hold ------------------------------------------------------------------------------------------------


def test_every_range_is_checked():
    for name, row in OPTIMIZERS.items():
        for f in fields(row):
            if isinstance(f.default, bool) or f.name in ("history", "max_evaluations"):
                continue
            bad = [-0.1, np.nan, np.inf, [0.1, -1.0], [[0.1]], "much", [[0.1], 0.1], [0.1, "much"]]
            bad += [0.0] if f.name in ("learning_rate", "epsilon", "clip_norm", "clip_value") else []
            bad += [1.0] if f.name in ("momentum", "beta1", "beta2", "rho") else []
            bad += [None] if f.default is not None else []
            for value in bad:
                with pytest.raises(
                    ValueError, match=rf"(?s)^{f.name}=.* is out of range: a number, or one for each model, in"
                ):
                    row(**{f.name: value})
            if name != "lbfgs" or f.name in ("learning_rate", "l1", "l2"):
                assert getattr(row(**{f.name: 0.5}), f.name) == 0.5


def test_edges_of_the_ranges():
    SGD(momentum=0.0, l1=0.0, l2=0.0, weight_decay=0.0)
    Adam(1e-30, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"^momentum=1.0 is out of range: .* in \[0, 1\)$"):
        SGD(momentum=1.0)
    with pytest.raises(ValueError, match=r"^epsilon=0 is out of range: .* in \(0, inf\)$"):
        Adam(epsilon=0)


@pytest.mark.parametrize("momentum", [0.0, [0.9, 0.0]])
def test_nesterov_needs_momentum(momentum):
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0; momentum="):
        SGD(momentum=momentum, nesterov=True)


def test_one_number_for_the_only_model():
    for n in (build(), build(models=1)):
        compare_ten_steps(Adam([0.1], beta1=[0.5], clip_norm=[2.0], weight_decay=[0.5], l2=[0.1]), n, 1e-11)


def test_per_model_values_must_fit_the_fleet():
    with pytest.raises(
        ValueError, match=r"^learning_rate has 2 values for 3 models; give one number, or one for each$"
    ):
        Adam([0.1, 0.2]).step(build(models=3))
    with pytest.raises(ValueError, match=r"^l2 has 2 values for 1 models"):
        Adam(l2=[0.1, 0.2]).step(build())


def test_an_optimizer_belongs_to_one_network():
    optimizer, network = Adam(), build()
    optimizer.step(network)
    with pytest.raises(ValueError, match="holds the state of another network; make a new one for this network"):
        optimizer.step(build())
    optimizer.step(network)
    optimizer.fresh().step(build())


def test_fresh_has_the_settings_and_no_state():
    network = build()
    network.flat_gradient[...] = 1.0
    optimizer = Adam(0.2, beta1=[0.5], l1=0.1)
    optimizer.step(network)
    fresh = optimizer.fresh()
    assert fresh.describe() == optimizer.describe() and fresh._bound is None
    assert not fresh.bind(network).t.any() and not any(state.any() for state in fresh.bind(network).states.values())


def test_a_trainer_takes_a_fresh_copy():
    X, y = np.eye(4, dtype=np.float32), np.arange(4) % 3
    optimizer = SGD(0.1, 0.9)
    for _ in range(2):
        Trainer(build(dtype="float32"), "softmax_cross_entropy", optimizer).fit(X, y, epochs=1)
    assert optimizer._bound is None


def test_for_model_picks_its_numbers():
    fleet = NAdam(learning_rate=[0.1, 0.2], beta1=0.5, clip_norm=[1.0, 2.0])
    one = fleet.for_model(1)
    assert (one.learning_rate, one.beta1, one.clip_norm, one.clip_value) == (0.2, 0.5, 2.0, None)
    assert type(one) is NAdam and np.ndim(one.learning_rate) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_describe_builds_the_same_optimizer(name):
    optimizer = OPTIMIZERS[name](learning_rate=[0.1, 0.2], l1=0.5)
    description = optimizer.describe()
    assert description.pop("name") == type(optimizer).__name__
    assert description["learning_rate"] == [0.1, 0.2] and set(map(type, description.values())) <= {
        float,
        int,
        bool,
        list,
        type(None),
    }
    assert OPTIMIZERS[name](**description).describe() == optimizer.describe()


def test_a_rate_for_one_step():
    network, scheduled = build(models=2), build(models=2)
    for n, optimizer, rate in ((network, SGD([0.1, 0.3]), None), (scheduled, SGD(7.0), [0.1, 0.3])):
        n.flat_gradient[...] = 1.0
        optimizer.step(n, rate)
    np.testing.assert_array_equal(network.flat, scheduled.flat)


def test_get_optimizer():
    optimizer = Adam()
    assert get_optimizer(optimizer) is optimizer
    assert all(type(get_optimizer(name)) is row for name, row in OPTIMIZERS.items())
    with pytest.raises(ValueError, match="optimizer='adamm' is unknown; allowed: sgd, rmsprop"):
        get_optimizer("adamm")
