"""The CPU benchmark: its reference, its check, its report. Nothing here depends on how fast the machine is."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The two modules as `python bench/train_step.py` sees them; `bench` is a folder of scripts, not a package."""
    if not BENCH.exists():
        pytest.skip("the benchmarks are not shipped with an installed package")
    monkeypatch.syspath_prepend(str(BENCH))
    import peers
    import train_step

    monkeypatch.setitem(train_step.CONFIGS, "small", train_step.Config((5, 7, 6, 3), 4))
    return train_step, peers


def quick(*arguments):
    return ["--repeats", "2", "--rounds", "2", "--block-seconds", "0.001", *arguments]


def test_the_reference_gradient_agrees_with_a_central_difference(bench):
    train_step, _ = bench
    problem = train_step.make_problem(train_step.CONFIGS["small"])
    parameters = [p.astype(float) for pair in zip(problem.weights, problem.biases, strict=True) for p in pair]
    X, y = problem.X[:4].astype(float), problem.y[:4]
    rng = np.random.default_rng(1)
    direction = [rng.standard_normal(p.shape) for p in parameters]

    def loss(step):
        return train_step.loss_and_gradient([p + step * d for p, d in zip(parameters, direction, strict=True)], X, y)[0]

    slope = sum(
        (g * d).sum() for g, d in zip(train_step.loss_and_gradient(parameters, X, y)[1], direction, strict=True)
    )
    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6)


def test_a_problem_survives_its_file(bench, tmp_path):
    train_step, peers = bench
    problem = train_step.make_problem(train_step.CONFIGS["small"])
    problem.save(tmp_path / "problem.npz")
    loaded = peers.Problem.load(tmp_path / "problem.npz")
    assert loaded.layer_sizes == [5, 7, 6, 3]
    assert loaded.batch_size == 4
    assert train_step.reference_losses(loaded) == train_step.reference_losses(problem)


def test_checked_rows_start_again_where_a_small_data_set_ends(bench):
    train_step, peers = bench
    problem = train_step.make_problem(train_step.CONFIGS["wide"])
    order = problem.check_order
    assert len(order) == peers.CHECK_STEPS * 1024
    assert order[8191] == 8191
    assert order[8192] == 0


def test_losses_per_step_and_their_mean_are_both_checked(bench):
    train_step, _ = bench
    reference = [2.0, 1.0, 0.6]
    assert train_step.largest_error([], reference, "peer") is None
    assert train_step.largest_error([reference, [1.2]], reference, "peer") == pytest.approx(0, abs=1e-15)
    assert train_step.largest_error([[2.0, 1.0005, 0.6]], reference, "peer") == pytest.approx(5e-4)
    for wrong in ([2.0, 1.002, 0.6], [1.25], [2.0, math.nan, 0.6]):
        with pytest.raises(SystemExit, match="peer on tiny trains something else"):
            train_step.largest_error([wrong], reference, "peer on tiny")


def test_blocks_are_whole_epochs_and_long_enough(bench, monkeypatch):
    _, peers = bench
    now = [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    trained = []

    def train(epochs):
        trained.append(epochs)
        now[0] += 0.01 * epochs  # a hundredth of a second an epoch of 5 steps

    timed = peers.time_blocks(train, steps_per_epoch=5, repeats=3, block_seconds=0.3)
    assert timed["steps_per_block"] == 5 * trained[-1]
    assert 0.3 <= 0.01 * trained[-1] < 0.4
    assert trained[-3:] == trained[-1:] * 3
    assert timed["blocks_us"] == pytest.approx([2000.0] * 3)


def test_a_missing_peer_is_reported_and_no_error(bench, monkeypatch, capsys):
    train_step, peers = bench
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer("no_such_package", lambda problem: None))
    train_step.main(quick("--configs", "small", "--peers", "absent"))
    assert "| small 5-7-6-3, batch 4 | not installed |" in capsys.readouterr().out


def test_a_peer_that_cannot_run_is_reported_with_its_reason(bench):
    train_step, _ = bench
    found = train_step.summarise([{"unavailable": "no compiler"}], [1.0], "peer")
    assert found == {"status": "unavailable", "note": "no compiler"}


def test_a_peer_that_crashes_stops_the_run_with_its_message(bench, tmp_path):
    train_step, _ = bench
    with pytest.raises(SystemExit, match=r"(?s)process of gpumlp ended with status 1.*FileNotFoundError"):
        train_step.run_peer("gpumlp", tmp_path / "missing.npz", 1, 0.001, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "huge"], "huge is not known; choose from tiny, digits"),
        (["--peers", "keras"], "keras is not known; choose from gpumlp, torch-eager"),
        (["--repeats", "0"], "0 is not allowed; give a number above 0"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(bench, capsys, arguments, message):
    train_step, _ = bench
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert message in capsys.readouterr().err


def test_gpumlp_agrees_with_the_reference_and_the_report_is_complete(bench, tmp_path, capsys):
    train_step, _ = bench
    path = tmp_path / "new folder" / "result.json"
    train_step.main(quick("--configs", "tiny", "--peers", "gpumlp", "--threads", "1", "--json", str(path)))
    report = json.loads(path.read_text())
    assert set(report) == {"benchmark", "date", "machine", "versions", "protocol", "results"}
    assert set(report["machine"]) == {"cpu", "cores", "os"}
    assert set(report["versions"]) == {"python", "numpy", "gpumlp", "blas"}
    assert set(report["versions"]["blas"]) == {"name", "version", "threads"}
    assert report["protocol"]["threads"] == 1
    (result,) = report["results"]
    assert (result["config"], result["layer_sizes"], result["batch_size"]) == ("tiny", [20, 64, 64, 2], 32)
    assert (result["n_samples"], result["n_parameters"]) == (8192, 5634)
    found = result["peers"]["gpumlp"]
    assert found["status"] == "ok"
    assert 0 <= found["largest_loss_error"] < 1e-3
    assert 0 < found["min_us"] <= found["median_us"] <= found["max_us"]
    assert [len(r["blocks_us"]) for r in found["rounds"]] == [2, 2]
    assert all(r["steps_per_block"] % 256 == 0 for r in found["rounds"])
    assert list(path.parent.iterdir()) == [path]
    assert "| tiny 20-64-64-2, batch 32 |" in capsys.readouterr().out


@pytest.mark.peer
def test_scikit_learn_can_be_given_weights_and_agrees_with_the_reference(bench, tmp_path):
    pytest.importorskip(
        "sklearn"
    )  # the one peer whose check leans on a detail: warm_start keeps coefs_ that we put there
    train_step, _ = bench
    problem = train_step.make_problem(train_step.CONFIGS["small"])
    problem.save(tmp_path / "small.npz")
    result = train_step.run_peer("scikit-learn", tmp_path / "small.npz", repeats=1, block_seconds=0.001, threads=1)
    assert train_step.largest_error(result["checks"], train_step.reference_losses(problem), "scikit-learn") < 1e-4
