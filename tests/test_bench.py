"""The benchmark of a training step: its reference, its check, its peers, its report.

Nothing here depends on how fast the machine is. What a GPU would run is held against the reference on the emulated device
(gpumlp) and on the CPU (the peers): the same functions, without CUDA's graphs.
"""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedRuntime

import gpumlp as gm
from gpumlp.backends.gpu_backend import GpuBackend

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


@pytest.fixture
def problem(bench, monkeypatch):
    """One that takes a device milliseconds: unequal widths, 12 batches of 33 rows."""
    train_step, _ = bench
    monkeypatch.setattr(train_step.Config, "n_samples", lambda config, device: 396)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return train_step.make_problem(train_step.Config((20, 17, 9, 3), 33))


def quick(*arguments):
    return ["--repeats", "2", "--rounds", "2", "--block-seconds", "0.001", *arguments]


def test_the_reference_gradient_agrees_with_a_central_difference(bench):
    train_step, _ = bench
    problem = train_step.make_problem(train_step.CONFIGS["small"])
    parameters = [p.astype(float) for pair in zip(problem.weights, problem.biases, strict=True) for p in pair]
    X, y, share = problem.X[:4].astype(float), problem.y[:4], np.array([0.1, 0.2, 0.3, 0.4])
    rng = np.random.default_rng(1)
    direction = [rng.standard_normal(p.shape) for p in parameters]

    def loss(step):
        moved = [p + step * d for p, d in zip(parameters, direction, strict=True)]
        return train_step.loss_and_gradient(moved, X, y, share)[0]

    gradient = train_step.loss_and_gradient(parameters, X, y, share)[1]
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6)


def test_a_problem_survives_its_file(bench, tmp_path):
    train_step, peers = bench
    problem = train_step.make_problem(train_step.CONFIGS["small"])
    problem.save(tmp_path / "problem.npz")
    loaded = peers.Problem.load(tmp_path / "problem.npz")
    assert loaded.layer_sizes == [5, 7, 6, 3]
    assert (loaded.batch_size, loaded.check_steps, loaded.check_rows) == (4, 10, 0)
    assert np.array_equal(train_step.reference_losses(loaded), train_step.reference_losses(problem))


def test_a_second_pass_goes_on_where_the_first_ended(bench, problem):
    train_step, _ = bench
    first, both = train_step.reference_losses(problem), train_step.reference_losses(problem, 2)
    assert (first.shape, both.shape) == ((1, 10), (2, 10))
    assert np.array_equal(first[0], both[0])
    assert both[1].mean() < both[0].mean()


def test_checked_rows_start_again_where_a_small_data_set_ends(bench):
    train_step, peers = bench
    problem = train_step.make_problem(train_step.CONFIGS["wide"])
    order = problem.check_order
    assert len(order) == peers.CHECK_STEPS * 1024
    assert order[8191] == 8191
    assert order[8192] == 0


def test_rows_that_a_batch_repeats_count_as_often_as_they_stand_there(bench, problem):
    train_step, _ = bench
    few = replace(problem, check_steps=3, check_rows=10)
    assert few.check_order[:33].tolist() == [*range(10)] * 3 + [0, 1, 2]
    assert few.check_order[66:].tolist() == [*range(20, 30)] * 3 + [20, 21, 22]
    many = replace(few, X=few.X[few.check_order], y=few.y[few.check_order], check_rows=0)
    assert np.allclose(train_step.reference_losses(few), train_step.reference_losses(many), rtol=1e-12, atol=0)


def test_the_reference_updates_every_part_of_a_large_array(bench, monkeypatch):
    train_step, peers = bench
    rng = np.random.default_rng(2)
    p, g, m, v = rng.standard_normal((4, 31))
    v = v**2
    expected_m, expected_v = peers.BETA1 * m + 0.1 * g, peers.BETA2 * v + 0.001 * g**2
    step = expected_m / (1 - peers.BETA1**3) / (np.sqrt(expected_v / (1 - peers.BETA2**3)) + peers.EPSILON)
    expected = p - peers.LEARNING_RATE * step
    monkeypatch.setattr(train_step, "CHUNK", 7)
    train_step.adam(p, g, m, v, 3)
    for found, wanted in ((p, expected), (m, expected_m), (v, expected_v)):
        assert np.allclose(found, wanted, rtol=1e-12, atol=0)


def test_losses_per_step_and_means_of_passes_are_both_checked(bench):
    train_step, _ = bench
    reference, plain = np.array([[2.0, 1.0, 0.6], [0.5, 0.4, 0.3]]), train_step.TOLERANCES["float32"]
    assert train_step.largest_error([{}], reference, "peer", plain) is None
    fine = [{"steps": [2.0, 1.0, 0.6], "epochs": [1.2, 0.4]}, {"epochs": [1.2]}]
    assert train_step.largest_error(fine, reference, "peer", plain) == pytest.approx(0, abs=1e-15)
    assert train_step.largest_error([{"steps": [2.0, 1.0005, 0.6]}], reference, "peer", plain) == pytest.approx(5e-4)
    for wrong in (
        {"steps": [2.0, 1.002, 0.6]},
        {"epochs": [1.25]},
        {"epochs": [1.2, 0.45]},
        {"steps": [2.0, math.nan, 0.6]},
    ):
        with pytest.raises(train_step.PeerError, match=r"peer on tiny trains something else: losses .* 1e-03"):
            train_step.largest_error([wrong], reference, "peer on tiny", plain)


def test_the_first_loss_tells_a_coarser_precision(bench):
    train_step, _ = bench
    reference, rounded = np.array([[2.0, 1.0, 0.6]]), {"steps": [2.0 * (1 + 5e-5), 1.0001, 0.6]}
    assert train_step.largest_error([rounded], reference, "peer", train_step.TOLERANCES["tf32"]) == pytest.approx(1e-4)
    with pytest.raises(train_step.PeerError, match=r"relative error 5\.0e-05, allowed 3e-06"):
        train_step.largest_error([rounded], reference, "peer", train_step.TOLERANCES["float32"])
    tolerances = [train_step.TOLERANCES[precision] for precision in ("float32", "tf32", "bf16")]
    assert sorted(tolerances) == tolerances
    assert train_step.CONFIGS["wide"].tolerance("bf16") == (5e-3, 1e-2)
    assert train_step.CONFIGS["huge"].tolerance("bf16") == (5e-3, 5e-2)


@pytest.fixture
def trained(bench, monkeypatch):
    """A clock that stands still, and a way to spend a hundredth of a second an epoch; it notes the epochs."""
    _, peers = bench
    now, trained = [0.0], []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])

    def train(epochs):
        trained.append(epochs)
        now[0] += 0.01 * epochs

    return SimpleNamespace(train=train, epochs=trained)


def test_blocks_are_whole_epochs_and_long_enough(bench, trained):
    _, peers = bench
    timed = peers.time_blocks(peers.Training(dict, trained.train), steps_per_epoch=5, repeats=3, block_seconds=0.3)
    assert trained.epochs[0] == peers.WARM_UP
    assert timed["steps_per_block"] == 5 * trained.epochs[-1]
    assert 0.3 <= 0.01 * trained.epochs[-1] < 0.4
    assert trained.epochs[-4:] == trained.epochs[-1:] * 4
    assert timed["blocks_us"] == pytest.approx([2000.0] * 3)


def test_a_clock_within_a_fit_follows_the_same_plan(bench, trained):
    _, peers = bench

    def fit(plan):
        clock, told = peers.Clock(plan), None
        while told is None:
            trained.train(1)
            told = clock.on_epoch_end(None, None)
        assert told.tolist() == [True]
        return clock.found

    apart = peers.time_blocks(peers.Training(dict, trained.train), 5, 3, 0.3)
    n = sum(trained.epochs)
    within = peers.time_blocks(peers.Training(dict, None, follow=fit), 5, 3, 0.3)
    assert within["steps_per_block"] == apart["steps_per_block"]
    assert within["blocks_us"] == pytest.approx(apart["blocks_us"])
    assert sum(trained.epochs) == 2 * n


def test_a_missing_peer_is_reported_and_no_error(bench, monkeypatch, capsys):
    train_step, peers = bench
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer("no_such_package", lambda problem: None))
    train_step.main(quick("--configs", "small", "--peers", "absent"))
    assert "| small 5-7-6-3, batch 4 | not installed |" in capsys.readouterr().out


def test_a_peer_that_cannot_run_is_reported_with_its_reason(bench):
    train_step, _ = bench
    found = train_step.summarise([{"unavailable": "no compiler"}], np.ones((1, 1)), "peer", (1, 1))
    assert found == {"status": "unavailable", "note": "no compiler"}


def test_a_process_that_crashes_is_told_with_its_message(bench, tmp_path):
    train_step, _ = bench
    with pytest.raises(train_step.PeerError, match=r"(?s)process of gpumlp ended with status 1.*FileNotFoundError"):
        train_step.run_peer("gpumlp", tmp_path / "missing.npz", 1, 0.001, 1)


def test_one_that_fails_gets_no_figure_and_the_run_ends_with_an_error(bench, monkeypatch, capsys, tmp_path):
    train_step, peers = bench
    path = tmp_path / "result.json"

    def run(name, problem, *settings):
        if name == "crashes":
            raise train_step.PeerError("the process of crashes ended with status 1:\nTraceback\nOSError: no room")
        losses = train_step.reference_losses(peers.Problem.load(problem))[0] * (1.5 if name == "wrong" else 1)
        checks = {"steps": losses.tolist()}
        return {"note": "", "checks": checks, "steps_per_block": 8, "blocks_us": [5.0, 7.0], "version": "1"}

    monkeypatch.setattr(train_step, "run_peer", run)
    for name in ("right", "wrong", "crashes"):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer("numpy", None))
    names = ["--configs", "small", "--peers", "right", "wrong", "crashes"]
    with pytest.raises(SystemExit, match="a peer failed or trains something else: see the notes"):
        train_step.main(quick(*names, "--json", str(path)))
    (result,) = json.loads(path.read_text())["results"]
    assert [peer["status"] for peer in result["peers"].values()] == ["ok", "failed", "failed"]
    assert result["peers"]["right"]["median_us"] == 6.0
    assert "median_us" not in result["peers"]["wrong"]
    printed = capsys.readouterr().out
    assert "| 6.0 (5.0–7.0) | failed | failed |" in printed
    assert "- small, wrong: wrong on small trains something else" in printed
    assert "- small, crashes: OSError: no room" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "colossal"], "colossal is not known; choose from tiny, digits"),
        (["--configs", "huge"], "huge is not for --device cpu; choose from tiny, digits"),
        (["--peers", "keras"], "keras is not known; choose from gpumlp, torch-eager"),
        (["--peers", "torch-graph"], "torch-graph is not for --device cpu; choose from gpumlp, torch-eager"),
        (["--peers", "scikit-learn", "--device", "cuda"], "scikit-learn is not for --device cuda; choose from gpumlp"),
        (["--precision", "fp8"], "fp8 is not known; choose from float32, tf32, bf16"),
        (["--precision", "tf32,bf16"], "--precision tf32 bf16 is for --device cuda; the CPU is measured in float32"),
        (["--repeats", "0"], "0 is not allowed; give a number above 0"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(bench, capsys, arguments, message):
    train_step, _ = bench
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_measured_unless_asked_otherwise(bench):
    train_step, peers = bench
    on_cpu, on_gpu = train_step.parse([]), train_step.parse(["--device", "cuda"])
    assert on_cpu.configs == ["tiny", "digits", "mnist", "mnist2", "wide", "deep", "small"]
    assert on_cpu.peers == ["gpumlp", "torch-eager", "torch-compile", "jax", "jax-scan", "scikit-learn"]
    assert (on_cpu.precision, on_cpu.rounds, on_cpu.json) == (["float32"], 2, None)
    assert on_gpu.configs == ["mnist", "wide", "huge"]
    assert on_gpu.peers == [name for name in peers.PEERS if name != "scikit-learn"]
    assert (on_gpu.precision, on_gpu.rounds) == ([], 1)
    assert [train_step.CONFIGS[name].precisions for name in on_gpu.configs] == [("tf32",), ("bf16",), ("bf16",)]
    asked = train_step.parse(
        ["--device", "cuda", "--configs", "tiny", "huge,wide", "--precision", "float32,bf16", "tf32"]
    )
    assert asked.configs == ["tiny", "huge", "wide"]
    assert asked.precision == ["float32", "bf16", "tf32"]


def test_every_batch_size_divides_the_rows_of_a_gpu(bench):
    train_step, _ = bench
    assert all(train_step.GPU_ROWS % config.batch_size == 0 for config in train_step.CONFIGS.values())
    assert train_step.CONFIGS["wide"].n_samples("cuda") == 65536
    assert train_step.CONFIGS["wide"].n_samples("cpu") == 8192


def test_a_process_sees_its_device_alone_and_tf32_only_where_it_is_asked_for(bench, monkeypatch):
    train_step, _ = bench
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    on_cpu = train_step.child_environment(7)
    assert (on_cpu["JAX_PLATFORMS"], on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["OMP_NUM_THREADS"]) == ("cpu", "", "7")
    on_gpu = {how: train_step.child_environment(7, "cuda", how) for how in train_step.TOLERANCES}
    assert all((e["JAX_PLATFORMS"], e["CUDA_VISIBLE_DEVICES"]) == ("cuda", "3") for e in on_gpu.values())
    assert [e.get("NVIDIA_TF32_OVERRIDE") for e in on_gpu.values()] == ["0", None, None]


def test_without_a_gpu_there_is_a_reason_and_status_1():
    script = BENCH / "train_step.py"
    if not script.exists():
        pytest.skip("the benchmarks are not shipped with an installed package")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), "--device", "cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(
        "--device cuda needs a GPU that works: (CuPy is not installed|CuPy finds no|CUDA finds no)", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_search_for_a_gpu_that_crashes_is_told(bench, monkeypatch):
    train_step, _ = bench
    monkeypatch.setattr(train_step, "PROBE", "raise OSError('no such machine')")
    with pytest.raises(SystemExit, match=r"(?s)looks for a GPU ended with status 1:.*OSError: no such machine"):
        train_step.describe_gpu()


GPU = {"description": "NVIDIA H100 80GB HBM3, CUDA 13.2, CuPy 14.2.0", "nvidia-smi": {"driver_version": "580.95.05"}}


def test_a_report_of_a_gpu_names_it_and_has_a_row_for_each_precision(bench, monkeypatch, capsys, tmp_path):
    train_step, peers = bench
    seen = []

    def run(name, problem, repeats, block_seconds, threads, device, precision):
        problem = peers.Problem.load(problem)
        seen.append((name, len(problem.X), device, precision))
        passes = train_step.reference_losses(problem, 2)
        checks = {"steps": passes[0].tolist(), "epochs": passes.mean(axis=1).tolist()}
        return {"note": "", "checks": checks, "steps_per_block": 8, "blocks_us": [2.5, 2.5], "version": "0.9"}

    monkeypatch.setattr(train_step, "run_peer", run)
    monkeypatch.setattr(train_step, "describe_gpu", lambda: GPU)
    monkeypatch.setattr(train_step, "GPU_ROWS", 120)
    path = tmp_path / "result.json"
    arguments = ["--device", "cuda", "--configs", "small", "--precision", "tf32,bf16", "--peers", "gpumlp"]
    train_step.main([*arguments, "--json", str(path)])
    assert seen == [("gpumlp", 120, "cuda", "tf32"), ("gpumlp", 120, "cuda", "bf16")]
    report = json.loads(path.read_text())
    assert report["machine"]["gpu"] == GPU
    assert set(report["versions"]) == {"python", "numpy", "gpumlp", "blas", "libraries"}
    assert all(name.startswith(train_step.LIBRARIES) for name in report["versions"]["libraries"])
    assert (report["protocol"]["device"], report["protocol"]["rounds"]) == ("cuda", 1)
    rows = report["results"]
    assert [(row["precision"], row["checked_steps"], row["n_samples"]) for row in rows] == [
        ("tf32", 10, 120),
        ("bf16", 10, 120),
    ]
    assert rows[1]["tolerance"] == [5e-3, 1e-2]
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H100 80GB HBM3, CUDA 13.2, CuPy 14.2.0, driver 580.95.05; ")
    assert "| small 5-7-6-3, batch 4, tf32 | 2.5 (2.5–2.5) |" in printed


def test_a_report_without_a_path_is_named_after_what_was_measured(bench):
    train_step, _ = bench
    host = {"cpu": "AMD EPYC", "cores": 2}
    pattern = r"bench/results/train-step-amd-epyc-2-cores-\d{4}-\d\d-\d\d\.json"
    assert re.fullmatch(pattern, train_step.results_path(host).relative_to(train_step.ROOT).as_posix())
    name = train_step.results_path(host | {"gpu": GPU}).name
    assert re.fullmatch(r"train-step-h100-80gb-hbm3-\d{4}-\d\d-\d\d\.json", name)
    assert train_step.parse(["--json"]).json == Path()


# --- the peers ------------------------------------------------------------------------------------------------------


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
def test_scikit_learn_can_be_given_weights_and_agrees_with_the_reference(bench, problem, tmp_path):
    # The one peer whose check leans on a detail: warm_start keeps coefs_ that we put there.
    pytest.importorskip("sklearn")
    train_step, _ = bench
    problem.save(tmp_path / "problem.npz")
    result = train_step.run_peer("scikit-learn", tmp_path / "problem.npz", repeats=1, block_seconds=0.001, threads=1)
    assert (
        train_step.largest_error(
            [result["checks"]], train_step.reference_losses(problem), "scikit-learn", train_step.TOLERANCES["float32"]
        )
        < 1e-4
    )


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_gpumlp_on_a_device_agrees_with_the_reference(bench, problem, precision):
    train_step, peers = bench
    runtime = EmulatedRuntime()
    training = peers.gpumlp(problem, GpuBackend(runtime), precision)
    checks = training.check()
    assert [len(losses) for losses in checks.values()] == [10, 2]
    error = train_step.largest_error(
        [checks], train_step.reference_losses(problem, 2), "gpumlp", train_step.TOLERANCES[precision]
    )
    assert (error < 1e-6) == (precision == "float32")  # the others do round


def test_gpumlp_on_a_device_is_timed_within_one_fit(bench, problem, monkeypatch):
    _, peers = bench
    fits, original = [], gm.Trainer.fit

    def fit(trainer, *arguments, **options):
        fits.append(options["epochs"])
        return original(trainer, *arguments, **options)

    monkeypatch.setattr(gm.Trainer, "fit", fit)
    training = peers.gpumlp(problem, GpuBackend(EmulatedRuntime()), "float32")
    timed = peers.time_blocks(training, problem.steps_per_epoch, repeats=3, block_seconds=1e-9)
    assert fits == [peers.NO_END]
    assert timed["steps_per_block"] == 12
    assert len(timed["blocks_us"]) == 3 and min(timed["blocks_us"]) > 0
    training.train(2)
    assert fits == [peers.NO_END, 2]
    assert peers.gpumlp(problem, "cpu").follow is None


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.peer
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("mode", ["torch_eager", "torch_graph"])
def test_pytorch_agrees_with_the_reference_at_each_precision(bench, problem, torch, mode, precision):
    train_step, peers = bench
    reference = train_step.reference_losses(problem)
    training = getattr(peers, mode)(problem, "cpu", precision)
    error = train_step.largest_error([training.check()], reference, mode, train_step.TOLERANCES[precision])
    assert (error < 1e-6) == (precision == "float32")
    training.train(2)
    if mode == "torch_graph":  # its check starts anew, from whatever it has trained: a captured one is warmed up before
        assert train_step.largest_error([training.check()], reference, mode, train_step.TOLERANCES[precision]) == error


@pytest.mark.peer
def test_steps_of_the_graph_take_every_row_of_an_epoch_once(bench, problem, torch, monkeypatch):
    _, peers = bench
    picked = []
    select = torch.Tensor.index_select

    def index_select(tensor, dim, rows):
        picked.extend(rows.tolist() if tensor.dtype == torch.float32 else [])
        return select(tensor, dim, rows)

    training = peers.torch_graph(problem, "cpu", "float32")
    monkeypatch.setattr(torch.Tensor, "index_select", index_select)
    training.train(2)
    first, second = np.reshape(picked, (2, -1))
    assert sorted(first) == sorted(second) == list(range(396))
    assert list(first) != list(second)


@pytest.mark.peer
@pytest.mark.parametrize("mode", ["torch_compile", "torch_compile_graph"])
def test_compiled_modes_train_what_the_compiler_returns(bench, problem, torch, monkeypatch, mode):
    train_step, peers = bench
    compiled = []

    def compile(f, **options):
        compiled.append(options)
        return f

    monkeypatch.setattr(torch, "compile", compile)
    training = getattr(peers, mode)(problem, "cpu", "float32")
    assert (
        train_step.largest_error(
            [training.check()], train_step.reference_losses(problem), mode, train_step.TOLERANCES["float32"]
        )
        < 1e-6
    )
    assert compiled == [{}]

    def refuse(X, y):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda f, **options: refuse)
    with pytest.raises(peers.Unavailable, match=r"torch.compile failed: RuntimeError: no C\+\+ compiler$"):
        getattr(peers, mode)(problem, "cpu", "float32")


@pytest.mark.peer
def test_a_graph_is_captured_as_pytorch_asks(bench, torch, monkeypatch):
    _, peers = bench
    happened = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def replay(self):
            happened.append("replay")

    @contextmanager
    def within(what):
        happened.append(f"{type(what).__name__} begins")
        yield
        happened.append(f"{type(what).__name__} ends")

    fakes = {"Stream": Stream, "current_stream": lambda: Stream("main"), "stream": within}
    for name, fake in (fakes | {"CUDAGraph": CUDAGraph, "graph": within}).items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: happened.append("gradients dropped"))
    peers._captured(lambda: happened.append("steps"), optimizer)()
    warm_up = ["side waits for main", "Stream begins", *["steps"] * 3, "Stream ends", "main waits for side"]
    assert happened == [*warm_up, "gradients dropped", "CUDAGraph begins", "steps", "CUDAGraph ends", "replay"]


@pytest.mark.peer
@pytest.mark.parametrize("mode", ["torch_eager", "torch_compile", "torch_graph", "torch_compile_graph"])
def test_pytorch_without_a_gpu_is_unavailable(bench, problem, torch, monkeypatch, mode):
    _, peers = bench
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(peers.Unavailable, match=r"PyTorch .* finds no GPU; pytorch.org says how"):
        getattr(peers, mode)(problem, "cuda", "tf32")


@pytest.mark.peer
def test_jax_in_bfloat16_agrees_with_the_reference(bench, problem, tmp_path):
    if find_spec("jax") is None:
        pytest.skip("jax is not installed")
    train_step, _ = bench
    problem = replace(problem, X=problem.X[:330], y=problem.y[:330])  # ten batches: one compilation serves all
    problem.save(tmp_path / "problem.npz")  # for a process of its own: once JAX is in this one, no test may fork
    result = train_step.run_peer("jax-scan", tmp_path / "problem.npz", 1, 0.001, 1, "cpu", "bf16")
    error = train_step.largest_error(
        [result["checks"]], train_step.reference_losses(problem), "jax-scan", train_step.TOLERANCES["bf16"]
    )
    assert error > 1e-6


@pytest.mark.parametrize(("precision", "flag"), [("float32", "float32"), ("tf32", "tensorfloat32"), ("bf16", None)])
def test_jax_is_told_the_precision_and_says_where_it_finds_no_gpu(bench, problem, monkeypatch, precision, flag):
    _, peers = bench
    flags = {}

    def devices(kind):
        raise RuntimeError(f"no {kind} backend")

    numpy = SimpleNamespace()
    config = SimpleNamespace(update=flags.__setitem__)
    fake = SimpleNamespace(__version__="0.10.2", config=config, devices=devices, numpy=numpy)
    monkeypatch.setitem(sys.modules, "jax", fake)
    monkeypatch.setitem(sys.modules, "jax.numpy", numpy)
    message = r'JAX 0.10.2 finds no GPU: pip install "jax\[cuda13\]" \(no cuda backend\)'
    for mode in (peers.jax_step, peers.jax_scan):
        with pytest.raises(peers.Unavailable, match=message):
            mode(problem, "cuda", precision)
    assert flags == {"jax_default_matmul_precision": flag}
