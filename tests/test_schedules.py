import numpy as np
import pytest

from gpumlp.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    OneCycle,
    ReduceOnPlateau,
    StepDecay,
    get_schedule,
)

PURE = [Constant(), StepDecay(3, 0.5), Exponential(0.9), Cosine(2.5, 0.1), OneCycle(0.25, 0.1, 0.01)]


@pytest.mark.parametrize("schedule", PURE, ids=lambda s: type(s).__name__)
def test_vectorised_equals_scalar_and_is_pure(schedule):
    epoch = np.linspace(0, 20, 101).reshape(1, 101)
    factor = schedule(epoch, 20)
    assert factor.shape == epoch.shape and factor.dtype == np.float64
    assert [schedule(float(e), 20) for e in epoch[0]] == factor[0].tolist()
    assert isinstance(schedule(3, 20), float)
    assert ((factor >= 0) & (factor <= 1)).all()
    np.testing.assert_array_equal(schedule(epoch, 20), factor)


def test_constant():
    np.testing.assert_array_equal(Constant()(np.arange(4), 4), np.ones(4))


def test_step_decay_drops_exactly_at_the_period():
    schedule = StepDecay(every=2.5, factor=0.5)
    below = np.nextafter(2.5, 0)
    np.testing.assert_array_equal(schedule(np.array([0, below, 2.5, 4.9, 5.0]), 9), [1, 1, 0.5, 0.5, 0.25])


def test_exponential_is_smooth_per_epoch():
    np.testing.assert_allclose(Exponential(0.9)(np.array([0, 0.5, 1, 7]), 9), [1, 0.9**0.5, 0.9, 0.9**7])


def test_cosine_without_warmup():
    np.testing.assert_allclose(Cosine(final=0.2)(np.array([0, 5, 10]), 10), [1, 0.6, 0.2])
    assert Cosine()(10, 10) == 0.0
    assert Cosine(final=0.2)(12, 10) == 0.2  # flat after the end


def test_cosine_warms_up_linearly_then_joins_without_a_jump():
    schedule = Cosine(warmup=4, final=0.0)
    np.testing.assert_allclose(schedule(np.array([0, 1, 4, 7, 10]), 10), [0, 0.25, 1, 0.5, 0], atol=1e-15)
    assert schedule(np.nextafter(4, 0), 10) == pytest.approx(1)


def test_cosine_refuses_a_warmup_as_long_as_the_training():
    with pytest.raises(ValueError, match=r"Cosine: warmup=5 must be shorter than the training \(epochs=5\)"):
        Cosine(warmup=5)(0, 5)
    assert Cosine(warmup=4.9)(0, 5) == 0


def test_one_cycle_has_its_peak_where_it_says():
    schedule = OneCycle(peak=0.4, start=0.1, final=0.01)
    np.testing.assert_allclose(schedule(np.array([0, 2, 4, 7, 10]), 10), [0.1, 0.55, 1, 0.505, 0.01])
    assert schedule(np.nextafter(4, 0), 10) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepDecay(every=0), "StepDecay: every=0 must be a number of epochs > 0"),
        (lambda: StepDecay(factor=1.5), r"StepDecay: factor=1.5 must be in \(0, 1\]"),
        (lambda: StepDecay(factor=True), "StepDecay: factor=True"),
        (lambda: Exponential(factor=0.0), r"Exponential: factor=0.0 must be in \(0, 1\]"),
        (lambda: Exponential(factor="0.5"), "Exponential: factor='0.5'"),
        (lambda: Cosine(warmup=-1), "Cosine: warmup=-1 must be a number of epochs >= 0"),
        (lambda: Cosine(warmup=float("nan")), "Cosine: warmup=nan"),
        (lambda: Cosine(final=2), r"Cosine: final=2 must be in \[0, 1\]"),
        (lambda: OneCycle(peak=1.0), r"OneCycle: peak=1.0 must be in \(0, 1\)"),
        (lambda: OneCycle(start=-0.1), "OneCycle: start=-0.1"),
        (lambda: OneCycle(final=None), "OneCycle: final=None"),
        (lambda: ReduceOnPlateau(factor=1.0), r"ReduceOnPlateau: factor=1.0 must be in \(0, 1\)"),
        (lambda: ReduceOnPlateau(patience=0), "ReduceOnPlateau: patience=0 must be an integer >= 1"),
        (lambda: ReduceOnPlateau(patience=2.5), "ReduceOnPlateau: patience=2.5"),
        (lambda: ReduceOnPlateau(min_factor=-1), "ReduceOnPlateau: min_factor=-1"),
        (lambda: ReduceOnPlateau(tolerance=float("inf")), "ReduceOnPlateau: tolerance=inf must be a number >= 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_plateau_reduces_after_patience_epochs_for_each_model():
    schedule = ReduceOnPlateau(factor=0.5, patience=2, min_factor=0.2, tolerance=0.1)
    assert schedule(0, 9).tolist() == [1.0]  # before anything was observed; broadcasts over any fleet
    columns = [  # one row per epoch, one column per model: improving, stuck, just not enough, NaN
        [5.0, 5.0, 5.0, np.nan],
        [4.0, 5.0, 4.9, np.nan],
        [3.0, 5.0, 4.9, 1.0],
        [2.0, 5.0, 4.8, np.nan],
        [1.0, 5.0, 4.8, np.nan],
        [0.0, 5.0, 4.8, np.nan],
        [-1.0, 5.0, 4.8, np.nan],
    ]
    factors = []
    for row in columns:
        schedule.observe(np.array(row))
        factors.append(schedule(99.0, 1).tolist())
    assert factors == [
        [1, 1, 1, 1],
        [1, 1, 1, 0.5],
        [1, 0.5, 0.5, 0.5],
        [1, 0.5, 0.5, 0.5],
        [1, 0.25, 0.5, 0.25],
        [1, 0.25, 0.25, 0.25],
        [1, 0.2, 0.25, 0.2],
    ]


def test_plateau_model_of_a_fleet_equals_the_model_alone():
    values = np.random.default_rng(0).normal(size=(30, 3)).round(1)
    fleet = ReduceOnPlateau(patience=2)
    alone = [ReduceOnPlateau(patience=2) for _ in range(3)]
    for row in values:
        fleet.observe(row)
        for model, value in zip(alone, row, strict=True):
            model.observe(np.array([value]))
    assert fleet(0, 1).tolist() == [model(0, 1)[0] for model in alone]


def test_plateau_resumes_exactly_from_its_state():
    values = np.random.default_rng(1).normal(size=(20, 3)).round(1)
    whole, first = ReduceOnPlateau(patience=2), ReduceOnPlateau(patience=2)
    for row in values[:7]:
        whole.observe(row)
        first.observe(row)
    second = ReduceOnPlateau(patience=2)
    state = first.state()
    second.load_state(state)
    first.observe(values[0])  # the state is a copy
    state["factors"][:] = -1
    for row in values[7:]:
        whole.observe(row)
        second.observe(row)
    assert {k: v.tolist() for k, v in whole.state().items()} == {k: v.tolist() for k, v in second.state().items()}
    assert whole == second == ReduceOnPlateau(patience=2) != ReduceOnPlateau(patience=3)


def test_plateau_state_before_the_first_observation():
    schedule = ReduceOnPlateau()
    schedule.load_state(ReduceOnPlateau().state())
    schedule.observe(np.array([1.0, 2.0]))
    assert schedule(0, 1).tolist() == [1, 1]


def test_plateau_returns_copies():
    schedule = ReduceOnPlateau()
    schedule.observe(np.array([1.0, 2.0]))
    schedule(0, 1)[:] = 7
    assert schedule(0, 1).tolist() == [1, 1]


def test_plateau_refuses_bad_values_and_states():
    schedule = ReduceOnPlateau()
    for values in (1.0, np.ones((2, 3)), np.ones(0)):
        with pytest.raises(ValueError, match=r"values of shape .* must be \(models,\)"):
            schedule.observe(values)
    schedule.observe(np.ones(3))
    with pytest.raises(ValueError, match="values for 2 models, but it remembers 3"):
        schedule.observe(np.ones(2))
    with pytest.raises(ValueError, match=r"the state lacks \['factors', 'waited'\]"):
        schedule.load_state({"best": np.ones(3)})
    with pytest.raises(ValueError, match=r"arrays of one length; their shapes are \(3,\), \(2,\), \(3,\)"):
        schedule.load_state({"best": np.ones(3), "waited": np.ones(2, int), "factors": np.ones(3)})


def test_get_schedule():
    assert get_schedule(None) == Constant()
    for name, schedule in SCHEDULES.items():
        assert get_schedule(name) == schedule()
    cosine = Cosine(warmup=3)
    assert get_schedule(cosine) is cosine

    def own(epoch, epochs):
        return 0.5

    assert get_schedule(own) is own


def test_get_schedule_gives_a_plateau_without_memory():
    used = ReduceOnPlateau(patience=1)
    for _ in range(3):
        used.observe(np.ones(2))
    fresh = get_schedule(used)
    assert fresh is not used and fresh == used and fresh(0, 1).tolist() == [1]


def test_get_schedule_refuses_the_rest():
    with pytest.raises(ValueError, match=r"schedule='cosin' is unknown; use one of constant, step, .*plateau"):
        get_schedule("cosin")
    for spec in (3, Cosine):
        with pytest.raises(TypeError, match="must be a name"):
            get_schedule(spec)


@pytest.mark.peer
def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    from torch.optim import lr_scheduler

    def rates(make, values=None):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler, out = make(optimizer), []
        for epoch in range(12):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(*(() if values is None else (values[epoch],)))
        return out

    epoch = np.arange(12)
    for ours, make in (
        (StepDecay(5, 0.3), lambda o: lr_scheduler.StepLR(o, 5, 0.3)),
        (Exponential(0.8), lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
        (Cosine(final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 12, 0.1)),
    ):
        np.testing.assert_allclose(ours(epoch, 12), rates(make), rtol=1e-12)

    values = [3.0, 2.0, 2.0, 2.05, 1.9, 1.95, 1.85, 1.9, 2.0, 2.0, 2.0, 2.0]
    theirs = rates(
        lambda o: lr_scheduler.ReduceLROnPlateau(
            o, factor=0.5, patience=1, threshold=0.1, threshold_mode="abs", min_lr=0.2
        ),
        values,
    )
    plateau, ours = ReduceOnPlateau(factor=0.5, patience=2, tolerance=0.1, min_factor=0.2), []
    for value in values:
        ours.append(plateau(0, 12)[0])
        plateau.observe(np.array([value]))
    np.testing.assert_allclose(ours, theirs)
    assert min(theirs) == 0.2
