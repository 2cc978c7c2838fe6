"""The scripts for a GPU, on the emulated device: what they check, count and report. No time that they measure matters."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedRuntime
from test_bench import BENCH

from gpumlp.backends.device import DeviceArray
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.backends.kernel_source import instances

MISSING = "CuPy is not installed: pip install it"


@pytest.fixture
def bench(monkeypatch):
    """The scripts as they see each other; `bench` is a folder of scripts, not a package."""
    if not BENCH.exists():
        pytest.skip("the benchmarks are not shipped with an installed package")
    monkeypatch.syspath_prepend(str(BENCH))
    import cpu_vs_gpu
    import fleet
    import gpu_check
    import gpu_parts
    import machine
    import timing

    import kernels

    modules = (cpu_vs_gpu, fleet, gpu_check, gpu_parts, kernels, machine, timing)
    return SimpleNamespace(**{module.__name__: module for module in modules})


@pytest.fixture
def backend():
    return GpuBackend(EmulatedRuntime(memory=1 << 27))


@pytest.fixture
def no_gpu(bench, monkeypatch):
    monkeypatch.setattr(bench.machine, "find_device", lambda emulate=False: (None, MISSING))


def report_of(bench, benchmark, backend, protocol, results):
    runtime = None if backend is None else backend.runtime
    reason = MISSING if backend is None else backend.runtime.device
    return bench.machine.frame(benchmark, runtime, reason) | {"protocol": protocol, "results": results}


# --- machine and timing -----------------------------------------------------------------------------------------------


def test_a_report_names_the_machine_with_a_gpu_and_without(bench, backend):
    alone = report_of(bench, "fleet", None, {}, [])
    assert set(alone) == {"benchmark", "date", "device", "machine", "versions", "protocol", "results"}
    assert alone["machine"]["gpu"] is None and "no GPU" in bench.machine.in_words(alone)
    both = report_of(bench, "fleet", backend, {}, [])
    assert both["machine"]["gpu"] == {
        "description": "a CUDA emulator on the host",
        "multiprocessors": 4,
        "free_bytes": 1 << 27,
    }
    assert "a CUDA emulator on the host" in bench.machine.in_words(both)
    assert {"python", "numpy", "gpumlp", "blas", "libraries"} == set(both["versions"])
    json.dumps(both)


def test_the_emulated_device_needs_a_compiler(bench, monkeypatch):
    runtime, reason = bench.machine.find_device(emulate=True)
    assert runtime.name == "emulator" and reason.endswith("its times mean nothing")
    monkeypatch.setattr(bench.machine.shutil, "which", lambda name: None)
    assert bench.machine.find_device(emulate=True) == (
        None,
        "g++ is not installed: the emulator compiles kernels with it",
    )


class FakeTrainer:
    """Whose first epoch takes a second, the second 0.1 s and each other one 0.02 s."""

    def __init__(self):
        self.epochs = []

    def fit(self, X, y, epochs, batch_size, progress):
        assert not progress
        self.epochs.append(epochs)
        return {"seconds": np.cumsum([1.0, 0.1, *[0.02] * (epochs - 2)])}


@pytest.mark.parametrize("x, text", [(0.04567, "0.0457"), (4.0, "4"), (99.94, "99.9"), (8399000.4, "8,399,000")])
def test_numbers_in_tables_have_no_exponent(bench, x, text):
    assert bench.timing.short(x) == text


def test_the_first_epochs_are_in_no_step_s_time(bench):
    trainer = FakeTrainer()
    found = bench.timing.step_times(trainer, np.zeros((33, 2)), None, batch_size=8, seconds=0.1)
    assert trainer.epochs == [5, 7]
    assert (found["epochs"], found["steps_per_epoch"]) == (5, 5)
    assert found["median_us"] == found["min_us"] == found["max_us"] == pytest.approx(4000)


@pytest.mark.parametrize("can_capture", [True, False])
def test_launches_are_timed_in_graphs_and_take_turns(bench, monkeypatch, can_capture):
    now, launched, recorded = [0.0], [], []
    monkeypatch.setattr(bench.timing.time, "perf_counter", lambda: now[0])

    def launch(name):
        def run():
            launched.append(name)
            now[0] += 5e-6

        return run

    def capture(function):
        recorded.append(function)
        return function

    runtime = SimpleNamespace(can_capture=can_capture, capture=capture, synchronize=lambda: None)
    found = bench.timing.launch_times(runtime, [launch("a"), launch("b")], seconds=0.01, rounds=3)
    assert found == pytest.approx([5.0] * 3)
    assert launched[:4] == ["a", "b", "a", "b"] and len(recorded) == 2 * can_capture
    assert (
        len(launched) == 2 + 2 + 3 * 2 + 256 + 3 * 2048
    )  # loading, recording's first run, an estimate, warm-up, rounds


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_every_kernel_is_timed_or_said_why_not(bench):
    timed = {kernel for row in bench.kernels.ROWS for kernel in row.kernels}
    known = {instance.call.partition("<")[0] for instance in instances().values()}
    assert timed | set(bench.kernels.NOT_TIMED) == known
    assert not timed & set(bench.kernels.NOT_TIMED)
    names = [(row.name, row.type) for row in bench.kernels.ROWS]
    assert len(set(names)) == len(names)


def test_every_row_agrees_with_numpy_and_launches_the_kernels_that_it_names(bench, backend):
    make = bench.kernels.Maker(backend)
    for row in bench.kernels.ROWS:
        assert bench.kernels.check(make, row, 5 * 1024) < 2e-2, row.name
        job = row.make(make, 5 * 1024)
        backend.runtime.launches.clear()
        job.run()
        launched = {instances()[name].call.partition("<")[0] for name in backend.runtime.launches}
        assert launched == set(row.kernels), row.name


def test_a_kernel_that_is_wrong_is_not_timed(bench, backend, monkeypatch, tmp_path, capsys):
    kernels = bench.kernels

    def wrong(make, n):
        job = kernels.combine(make, n)
        return kernels.replace(job, wanted=lambda: [(array, values + 1e-3) for array, values in job.wanted()])

    row = kernels.Row("sum", "f32", "combine", wrong)
    told = r"sum \(f32\) differs from NumPy by .* allowed is 2e-05; its speed would mean nothing"
    with pytest.raises(kernels.Wrong, match=rf"^{told}$"):
        kernels.check(kernels.Maker(backend), row, 1000)
    monkeypatch.setattr(bench.machine, "find_device", lambda: (backend.runtime, "cuda:0: the emulator"))
    monkeypatch.setattr(kernels, "ROWS", [row, kernels.Row("dot", "f32", "dot", kernels.dot, False)])
    monkeypatch.setattr(kernels, "COLD", 0)
    with pytest.raises(SystemExit, match=r"^a kernel does not agree with NumPy: see its note$"):
        kernels.main(["--sizes", "0.0625", "--json", str(tmp_path / "x.json")])
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [r["status"] for r in results] == ["wrong", "ok"] and "differs from NumPy" in results[0]["note"]
    shown = capsys.readouterr()
    assert "| sum | f32 | | wrong |" in shown.out and "- sum (f32) differs from NumPy" in shown.out


@pytest.mark.parametrize(
    "name, type, moved, formula",
    [
        ("bias, relu", "f32", 8, "read z; write z"),
        ("bias, gelu, dropout", "bf16", 8, "read z; write z, a, dropped"),
        ("update, Adam", "f32", 28, "read w, g, m, v; write w, m, v"),
        ("update, Adam, bfloat16 layers", "f32", 30, "read w, g, m, v; write w, m, v, bfloat16 copy"),
        ("cast to bfloat16", "f32", 6, "read in; write out"),
        ("dot", "f32", 8, "read a, b"),
        ("shuffle", "i64", 6 * 32, "6 × (read keys, numbers; write keys, numbers)"),
    ],
)
def test_the_bytes_that_a_kernel_moves(bench, backend, name, type, moved, formula):
    (row,) = (row for row in bench.kernels.ROWS if (row.name, row.type) == (name, type))
    job = row.make(bench.kernels.Maker(backend), 4096)
    assert job.moved == 4096 * moved and job.formula == formula


def test_the_passes_of_the_sort(bench, backend):
    n = 1 << 13
    job = bench.kernels.shuffle(bench.kernels.Maker(backend), n)
    job.run()
    launches = backend.runtime.launches
    assert launches["sort_local"] + launches["sort_pass"] == job.times == 10


def test_a_kernel_s_share_of_a_copy_and_the_goal(bench, backend, monkeypatch):
    kernels, seen = bench.kernels, []
    us = iter([[10.0, 12.0, 11.0], [9.0, 9.0, 9.0]] * 3)

    def launch_times(runtime, launches, seconds):
        seen.append(len(launches))
        return next(us)

    monkeypatch.setattr(kernels, "launch_times", launch_times)
    monkeypatch.setattr(kernels, "GOAL_FROM", 0.25)
    make, (row,) = kernels.Maker(backend), [row for row in kernels.ROWS if row.name == "combine"]
    found = kernels.measure(make, row, 0.25, cold=1 << 20)
    assert found["moved_bytes"] == 3 << 18 and (found["median_us"], found["max_us"]) == (11.0, 12.0)
    assert found["share"] == pytest.approx(9 / 11, abs=1e-4) and found["reaches_goal"] is False
    assert found["gb_per_s"] == pytest.approx((3 << 18) / 11e-6 / 1e9, abs=0.06)
    assert seen == [2, 2]  # 768 KiB each time, in turns, to fill a MiB
    assert kernels.measure(make, row, 0.125, cold=0)["reaches_goal"] is None
    dot = next(row for row in kernels.ROWS if row.name == "dot")
    assert kernels.measure(make, dot, 0.25)["reaches_goal"] is None


def test_the_kernels_table(bench, backend, capsys):
    kernels, kept = bench.kernels, []
    rows = [row for row in kernels.ROWS if row.name in ("combine", "dot")]
    results = kernels.run(
        backend, rows, [1 / 64], checked=1024, keep=lambda found: kept.append(len(found)), cold=0, seconds=1e-5
    )
    assert kept == [1, 2, 2] and [r["status"] for r in results] == ["ok", "ok"]
    report = report_of(bench, "kernels", backend, {"sizes_mib": [1 / 64, 64.0]}, results)
    small = {"mib": 64.0, "status": "ok", "gb_per_s": 2000.4, "formula": ""}
    results[0]["sizes"].append({**small, "share": 0.8, "reaches_goal": True})
    results[1]["sizes"].append({**small, "share": 0.5, "reaches_goal": False})
    results.append({"name": "noise", "type": "f32", "status": "no time"})
    table = kernels.markdown(report)
    assert "| dot | f32 | read a, b | " in table and "| 2000 GB/s, 80% |" in table
    assert "| **2000 GB/s, 50%** |" in table and "| noise | f32 | | no time | no time |" in table
    assert table.endswith("1 of 2 reach the goal; not: combine f32 at 64 MiB (50%).")
    assert "combine f32: 0.015625 MiB" in capsys.readouterr().err


def test_kernels_behind_the_deadline_or_beyond_memory_are_left_out(bench, backend):
    kernels = bench.kernels
    rows = [row for row in kernels.ROWS if row.name == "combine"]
    assert kernels.run(backend, rows, [1.0], deadline=-1.0)[0]["status"] == "no time"
    (found,) = kernels.run(backend, rows, [1024.0], checked=1024)[0]["sizes"]
    assert found["status"] == "no memory" and "bytes free" in found["note"]
    assert kernels.cell(found) == "no memory"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kernels", "gather,fast"], "fast is not known; choose from add_columns, average, batch_norm_backward"),
        (["--sizes", "64,big"], "--sizes takes numbers above 0 with commas between them"),
        (["--sizes", "0"], "--sizes takes numbers above 0 with commas between them"),
    ],
)
def test_wrong_arguments_of_kernels(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.kernels.main(arguments)
    assert message in capsys.readouterr().err


def test_kernels_need_a_gpu(bench, no_gpu):
    with pytest.raises(SystemExit, match=rf"^bench/kernels.py needs a GPU: {MISSING}$"):
        bench.kernels.main([])


def test_kernels_from_end_to_end(bench, backend, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.machine, "find_device", lambda: (backend.runtime, "cuda:0: the emulator"))
    monkeypatch.setattr(bench.kernels, "COLD", 0)
    path = tmp_path / "new" / "kernels.json"
    bench.kernels.main(["--kernels", "combine,penalize", "--sizes", "0.0625", "--json", str(path)])
    report = json.loads(path.read_text())
    assert [r["name"] for r in report["results"]] == ["penalties", "combine"]
    assert report["protocol"]["sizes_mib"] == [0.0625] and report["device"] == "cuda:0: the emulator"
    assert "| penalties | f32 | read w, g; write g |" in capsys.readouterr().out


# --- CPU and GPU ------------------------------------------------------------------------------------------------------


def test_work_of_a_step(bench):
    cell = bench.cpu_vs_gpu.Cell(2, 7, 5)
    assert cell.parameters == 65 * 7 + 8 * 7 + 8 * 10
    assert cell.flop == 6 * 5 * cell.parameters
    cells = bench.cpu_vs_gpu.grid([1, 2], [4, 8], [3, 6])
    assert len(cells) == 8 and [c.flop for c in cells] == sorted(c.flop for c in cells)


@pytest.mark.parametrize(
    "cpu, gpu, sentence",
    [
        ([1, 9, 9], [5, 5, 5], "The crossover: the CPU is faster up to 1 MFLOP a step, the GPU from 20 MFLOP on."),
        (
            [1, 6, 4],
            [5, 5, 5],
            "The crossover: the CPU is faster below 20 MFLOP a step, the GPU above 3 GFLOP; in between "
            "it depends on width and batch size.",
        ),
        ([1, 1, 1], [5, 5, 5], "The CPU is faster everywhere, up to 3 GFLOP a step."),
        ([9, 9, 9], [5, 5, 5], "The GPU is faster everywhere, from 1 MFLOP a step on."),
        ([1, 1, 1], None, "No GPU was measured: there is no crossover to show."),
    ],
)
def test_where_the_crossover_lies(bench, cpu, gpu, sentence):
    results = [{"flop": flop, "cpu": {"median_us": us}} for flop, us in zip((1e6, 2e7, 3e9), cpu, strict=True)]
    for result, us in zip(results, gpu or [], strict=bool(gpu)):
        result["gpu"] = {"median_us": us}
    assert bench.cpu_vs_gpu.crossover(results) == sentence


@pytest.mark.parametrize(
    "flop, text", [(1.26e13, "13 TFLOP"), (2.04e9, "2 GFLOP"), (9.99e5, "1000 kFLOP"), (150, "0.15 kFLOP")]
)
def test_work_in_words(bench, flop, text):
    assert bench.cpu_vs_gpu.work(flop) == text


def small_grid(bench, monkeypatch):
    monkeypatch.setattr(bench.cpu_vs_gpu, "MOST_STEPS", 3)
    return {"depths": [1, 2], "widths": [4, 6], "batches": [5]}


def test_cpu_and_gpu_side_by_side(bench, backend, monkeypatch, tmp_path, capsys):
    script, protocol = bench.cpu_vs_gpu, small_grid(bench, monkeypatch)
    kept = []
    results = script.run(script.grid(**protocol), backend, 1e-4, keep=lambda found: kept.append(len(found)))
    assert kept == [1, 2, 3, 4]
    for result in results:
        assert result["largest_loss_error"]["cpu"] == 0 and result["largest_loss_error"]["gpu"] < 1e-5
        assert result["cpu"]["epochs"] >= 3 and result["gpu"]["steps_per_epoch"] <= 3
    report = report_of(bench, "cpu-vs-gpu", backend, protocol, results)
    table = script.markdown(report)
    assert "| 64-width-10 | 4 | 6 |" in table and "| 64-width-width-10 | 4 | 6 |" in table
    assert table.count("| batch 5 |") == 2 and "No GPU was measured" not in table
    results[0]["cpu"]["median_us"], results[0]["gpu"]["median_us"] = 300.0, 20.0
    assert script.cell_text(results[0]) == "**300 / 20 (15×)**"
    assert script.cell_text(None) == "–"
    script.plot(report, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert "depth 1, width 4, batch 5: cpu " in capsys.readouterr().err
    assert script.run(script.grid(**protocol), backend, 1e-4, deadline=-1.0) == []


def test_a_device_that_trains_something_else_is_not_timed(bench, backend, monkeypatch):
    script = bench.cpu_vs_gpu
    found = iter([([1.0, 0.5], {}), ([1.0, 0.51], {}), ([1.0], {}), ([math.nan], {})])
    monkeypatch.setattr(script, "measure_device", lambda *args: next(found))
    for _ in range(2):
        with pytest.raises(
            SystemExit, match=r"gpu and cpu train Cell\(depth=1, width=4, batch=5\) differently: losses \["
        ):
            script.measure(script.Cell(1, 4, 5), {"cpu": "cpu", "gpu": backend}, 0.1)


def test_without_a_gpu_the_cpu_is_measured_alone_and_that_is_said(bench, no_gpu, monkeypatch, tmp_path, capsys):
    script, _ = bench.cpu_vs_gpu, small_grid(bench, monkeypatch)
    titles = []
    path, picture = tmp_path / "new" / "found.json", tmp_path / "pictures" / "alone.svg"
    options = ["--widths", "4,6", "--batches", "5", "--depths", "1", "--cell-seconds", "0.0001"]
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    script.main([*options, "--json", str(path), "--plot", str(picture)])
    told = capsys.readouterr()
    assert f"**No GPU was measured**: {MISSING}." in told.out and "median: CPU alone." in told.out
    assert f"the CPU is measured alone: {MISSING}" in told.err
    report = json.loads(path.read_text())
    assert report["machine"]["gpu"] is None and report["device"] == MISSING
    assert report["crossover"].startswith("No GPU was measured")
    assert all("gpu" not in result for result in report["results"]) and len(report["results"]) == 2
    assert picture.exists() and titles[0].endswith("alone: no GPU was found")


def test_a_plot_needs_matplotlib(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.cpu_vs_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.cpu_vs_gpu.parse(["--plot", "x.png"])
    assert '--plot needs matplotlib, which is not installed; run: pip install "gpumlp[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("script", ["cpu_vs_gpu", "fleet"])
def test_numbers_must_be_above_0(bench, capsys, script):
    flag = "--widths" if script == "cpu_vs_gpu" else "--models"
    with pytest.raises(SystemExit):
        getattr(bench, script).parse([flag, "8,0"])
    assert "8,0 is not allowed; give integers above 0 with commas between them" in capsys.readouterr().err


# --- fleets -----------------------------------------------------------------------------------------------------------


def small_fleet(bench):
    return bench.fleet.Config(layer_sizes=(6, 5, 3), batch=4, steps=3, cpu_steps=2)


def test_fleets_beside_one_model_alone(bench, backend, capsys):
    config, results = small_fleet(bench), []
    bench.fleet.run(config, backend, "gpu", [1, 3], "tf32", 1e-4, keep=results.append)
    bench.fleet.run(config, "cpu", "cpu", [2], "float32", 1e-4, keep=results.append)
    assert [(r["device"], r["models"], r["steps_per_epoch"]) for r in results] == [
        ("gpu", None, 3),
        ("gpu", 1, 3),
        ("gpu", 3, 3),
        ("cpu", None, 2),
        ("cpu", 2, 2),
    ]
    three = results[2]
    assert three["per_model_us"] == pytest.approx(three["median_us"] / 3, abs=1e-3)
    assert three["faster_than_alone"] == pytest.approx(results[0]["median_us"] / three["per_model_us"], rel=1e-2)
    assert three["largest_loss_error"] < 1e-5
    table = bench.fleet.markdown(
        report_of(bench, "fleet", backend, {"layer_sizes": config.layer_sizes, "batch": config.batch}, results)
    )
    assert "| | alone | fleet of 1 | fleet of 2 | fleet of 3 |" in table and "6-5-3, batch 4" in table
    assert "| GPU, tf32 |" in table and "| CPU, float32 |" in table and " – |" in table
    assert "gpu tf32, 3 models: " in capsys.readouterr().err
    results.clear()
    bench.fleet.run(config, "cpu", "cpu", [2], "float32", 1e-4, deadline=-1.0, keep=results.append)
    assert [r["models"] for r in results] == [None]


def test_a_model_that_trains_differently_in_a_fleet_stops_the_run(bench, monkeypatch):
    monkeypatch.setitem(bench.fleet.TOLERANCES, "float32", -1.0)
    with pytest.raises(SystemExit, match=r"in a fleet of 2 a model does not train as it does alone: losses \[\["):
        bench.fleet.check(small_fleet(bench), "cpu", 2, "float32")


def test_fleets_on_the_cpu_alone(bench, no_gpu, monkeypatch, tmp_path, capsys):
    config = small_fleet(bench)
    monkeypatch.setattr(bench.fleet, "Config", lambda: config)
    path = tmp_path / "new" / "fleet.json"
    bench.fleet.main(["--cpu-models", "2", "--block-seconds", "0.0001", "--json", str(path)])
    report = json.loads(path.read_text())
    assert [r["models"] for r in report["results"]] == [None, 2] and report["machine"]["gpu"] is None
    assert f"**No GPU was measured**: {MISSING}." in capsys.readouterr().out


# --- gpu_check --------------------------------------------------------------------------------------------------------


def test_the_whole_check_on_the_emulated_device(bench, tmp_path, capsys):
    bench.gpu_check.main(["--emulate", "--quick", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("gpu-emulator-*.json")
    report = json.loads(path.read_text())
    assert report["passed"] and report["emulated"] and report["machine"]["gpu"]
    found = {part["name"]: part for part in report["parts"]}
    assert list(found) == ["conformance", "capture", "parity", "memory", "arrays"]
    for part in found.values():
        assert part["status"] == "ok" and part["seconds"] > 0 and part["checks"]
        assert all(check["status"] == "ok" and check["detail"] != "" for check in part["checks"]), part["name"]
    assert len(found["conformance"]["checks"]) > 10 and len(found["parity"]["checks"]) > 25
    summary = path.with_suffix(".md").read_text()
    assert "**PASSED: conformance, capture, parity, memory, arrays.**" in summary
    told = capsys.readouterr()
    assert told.out == summary and f"written to {path}" in told.err
    assert sorted(tmp_path.iterdir()) == [path, path.with_suffix(".md")]


def test_without_a_gpu_the_check_says_what_is_missing(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        SystemExit, match=r"(?s)^gpu_check needs a GPU that works: .*\n--emulate runs the correctness parts"
    ):
        bench.gpu_check.main(["--results", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_every_precision_activation_loss_and_optimizer_is_in_the_parity_part(bench):
    from gpumlp.activations import ACTIVATIONS
    from gpumlp.losses import LOSSES
    from gpumlp.optimizers import OPTIMIZERS

    cases = [*bench.gpu_parts.table_cases("float32", 1e-3), *bench.gpu_parts.special_cases()]
    assert {layer.activation for case in cases[: len(ACTIVATIONS)] for layer in case.layers} == set(ACTIVATIONS)
    assert {case.loss for case in cases} == set(LOSSES)
    used = {type(case.optimizer) for case in cases if not isinstance(case.optimizer, str)}
    assert used == set(OPTIMIZERS.values())
    assert {case.network.get("precision") for case in cases} == {None, "tf32", "bf16"}
    assert len({case.name for case in cases}) == len(cases)


def test_parity_notices_another_training(bench, backend):
    parts = bench.gpu_parts
    setting = parts.Setting(backend.runtime, emulated=True)
    case = parts.Case("small", (), tolerance=0.0)
    with pytest.raises(AssertionError, match=r"^losses differ by .*; allowed for (losses|logits) is 0e\+00$"):
        parts.agrees(setting, case)


def test_a_capture_that_is_not_the_launches_is_noticed(bench, monkeypatch):
    parts, runtime = bench.gpu_parts, EmulatedRuntime()
    setting = parts.Setting(runtime, emulated=True)
    monkeypatch.setattr(runtime, "capture", lambda step: lambda: None)
    with pytest.raises(AssertionError, match="replay 1 differs from launches by"):
        parts.replays_like_launches(setting, "f32", False, "")
    without = parts.Setting(EmulatedRuntime(epilogues=False), emulated=True)
    with pytest.raises(parts.Skip, match="cuBLASLt has no such product: no product with the epilogue 'bias'"):
        parts.replays_like_launches(without, "f32", False, "bias")


def test_memory_checks_notice_what_is_wrong(bench, backend, monkeypatch):
    parts = bench.gpu_parts
    setting = parts.Setting(backend.runtime, emulated=True)
    with pytest.raises(AssertionError, match=r"^nothing was raised$"):
        parts.refused(lambda: None)

    def vague():
        raise parts.DeviceMemoryError("out of memory")

    with pytest.raises(AssertionError, match=r"^the message names not both numbers of bytes: out of memory$"):
        parts.refused(vague)
    kept = []
    monkeypatch.setattr(
        parts, "fit", lambda *args, **options: kept.append(DeviceArray.empty(backend.runtime, (9999,), "u8"))
    )
    with pytest.raises(AssertionError, match=r"^bytes free after each of five fits: \["):
        parts.no_leak(setting)


def test_a_copied_array_is_noticed(bench, backend):
    parts = bench.gpu_parts

    def elsewhere(setting, X):
        array, pointer, kind = parts.emulated_array(setting, X)
        return array, pointer + 4, kind

    with pytest.raises(AssertionError, match=r"^the array was copied$"):
        parts.taken_where_it_lies(parts.Setting(backend.runtime, emulated=True), elsewhere)


def test_tensor_cores_are_skipped_where_there_are_none(bench, backend, monkeypatch):
    monkeypatch.setattr(backend.runtime, "capability", (7, 5), raising=False)
    setting = bench.gpu_parts.Setting(backend.runtime, emulated=True)
    found = {check["name"]: check["status"] for check in bench.gpu_check.made(bench.gpu_parts.conformance(setting))}
    assert {name for name, status in found.items() if status == "skipped"} == {"mma_by_ldmatrix", "mma_by_hand"}


@pytest.mark.parametrize(
    "missing, reason",
    [("pytest", "pytest is not installed: pip install pytest"), ("tests", "there is no .*: run this from a checkout")],
)
def test_the_tests_part_is_skipped_where_it_cannot_run(bench, backend, monkeypatch, tmp_path, missing, reason):
    parts = bench.gpu_parts
    if missing == "pytest":
        monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(parts, "TESTS", tmp_path / "away")
    ((_, check),) = parts.tests(parts.Setting(backend.runtime))
    with pytest.raises(parts.Skip, match=f"^{reason}$"):
        check()


XML = (
    "<testsuite><testcase name='a'/><testcase name='b'><skipped/></testcase>"
    "<testcase name='c'><failure>boom</failure></testcase></testsuite>"
)


def test_pytest_s_outcome_is_read(bench, monkeypatch):
    parts, written = bench.gpu_parts, [XML]

    def run_pytest(*arguments):
        if written[0]:
            path = next(a for a in arguments if a.startswith("--junitxml=")).partition("=")[2]
            parts.Path(path).write_text(written[0])
        return SimpleNamespace(returncode=2, stdout="bad", stderr="")

    monkeypatch.setattr(parts, "run_pytest", run_pytest)
    with pytest.raises(AssertionError, match=r"^c: boom$"):
        parts.outcome_of(["x"])
    written[0] = XML.replace("<failure>boom</failure>", "")
    assert parts.outcome_of(["x"]) == "2 passed, 1 skipped"
    written[0] = "<testsuite><testcase name='b'><skipped/></testcase></testsuite>"
    with pytest.raises(parts.Skip, match=r"^all 1 tests were skipped$"):
        parts.outcome_of(["x"])
    written[0] = ""
    with pytest.raises(AssertionError, match=r"^pytest ended with status 2: bad$"):
        parts.outcome_of(["x"])


def test_tests_run_side_by_side_and_none_is_an_error(bench, backend, monkeypatch):
    parts, ids = (
        bench.gpu_parts,
        ["tests/gpu/test_gpu.py::test_a", f"tests/gpu/test_gpu.py::{bench.gpu_parts.ALONE}[x.py]"],
    )
    monkeypatch.setattr(parts, "run_pytest", lambda *a: SimpleNamespace(returncode=0, stdout="\n".join(ids), stderr=""))
    monkeypatch.setattr(parts, "outcome_of", lambda arguments: " ".join(arguments))
    found = {name: check() for name, check in parts.tests(parts.Setting(backend.runtime))}
    assert found == {
        "all but the kernels' own tests": f"-k not {parts.ALONE} tests/gpu/test_gpu.py",
        "x.py": ids[1],
    }
    assert len([*parts.tests(parts.Setting(backend.runtime, quick=True))]) == 1
    ids.clear()
    ((_, check),) = parts.tests(parts.Setting(backend.runtime))
    with pytest.raises(AssertionError, match=r"^pytest finds no test that needs a GPU: "):
        check()


def test_what_goes_wrong_in_a_check_is_its_outcome(bench):
    def checks():
        yield "right", lambda: "fine"
        yield "wrong", lambda: bench.gpu_parts.expect(False, "2 is not 3")
        yield "cannot", lambda: bench.gpu_parts.skip("no tensor cores")
        yield "broken", lambda: {}["x"]
        raise ValueError("no more")

    found = [*bench.gpu_check.made(checks())]
    assert [(c["name"], c["status"]) for c in found] == [
        ("right", "ok"),
        ("wrong", "failed"),
        ("cannot", "skipped"),
        ("broken", "failed"),
        ("(preparing the next check)", "failed"),
    ]
    assert [c["detail"] for c in found[:3]] == ["fine", "2 is not 3", "no tensor cores"]
    assert "KeyError: 'x'" in found[3]["detail"] and "ValueError: no more" in found[4]["detail"]


def part(bench, tmp_path, name, code, seconds=60):
    """A benchmark that is this code; `path` is its JSON file."""
    script = tmp_path / f"{name}.py"
    script.write_text(f"import sys, time, json, os\npath = sys.argv[sys.argv.index('--json') + 1]\n{code}\n")
    return bench.gpu_check.Part(name, "a script", seconds, seconds, (str(script),), (str(script),))


def arguments(bench, tmp_path, *more):
    return bench.gpu_check.parse(["--results", str(tmp_path), *more])


def test_a_crash_loses_nothing_else(bench, tmp_path):
    parts = [
        part(bench, tmp_path, "works", "open(path, 'w').write(json.dumps({'results': [7]})); print('a table')"),
        part(bench, tmp_path, "crashes", "open(path, 'w').write(json.dumps({'results': [8]})); os.abort()"),
        part(bench, tmp_path, "says", "sys.exit('the GPU is on fire')"),
        part(bench, tmp_path, "silent", "pass"),
    ]
    report, kept = {"parts": []}, []
    bench.gpu_check.run(parts, report, arguments(bench, tmp_path), lambda: kept.append(len(report["parts"])))
    works, crashes, says, silent = report["parts"]
    assert kept == [1, 2, 3, 4]
    assert (works["status"], works["detail"], works["numbers"], works["table"]) == (
        "ok",
        "",
        {"results": [7]},
        "a table",
    )
    assert crashes["status"] == "failed" and crashes["numbers"] == {"results": [8]}
    assert crashes["detail"].startswith("ended with status -") and crashes["detail"].endswith(", with what it had")
    assert says["detail"] == "ended with status 1" and "the GPU is on fire" in says["stderr"]
    assert (silent["status"], silent["numbers"]) == ("failed", None)


def test_a_hang_is_cut_off(bench, tmp_path):
    hangs = part(bench, tmp_path, "hangs", "time.sleep(1000)")
    found = bench.gpu_check.run_part(hangs, 0.5, False, False, tmp_path)
    assert (found["status"], found["detail"]) == ("failed", "cut off after 0 s") and found["numbers"] is None
    assert bench.gpu_check.of_benchmark({"results": [1]}, "cut off after 9 s") == {
        "status": "failed",
        "detail": "cut off after 9 s, with what it had",
        "numbers": {"results": [1]},
    }


def test_parts_for_which_no_time_is_left_are_said_to_be_skipped(bench, tmp_path):
    report = {"parts": []}
    parts = [part(bench, tmp_path, "late", "pass")]
    bench.gpu_check.run(parts, report, arguments(bench, tmp_path, "--seconds", "2"), lambda: None)
    assert report["parts"][0]["status"] == "skipped" and report["parts"][0]["detail"] == "the 2 s were up"


def test_an_unfinished_part_has_failed(bench):
    of_checks = bench.gpu_check.of_checks
    known = {"checks": [{"name": "one", "status": "ok"}], "finished": False}
    assert of_checks(known, "ended with status -11")["detail"] == "ended with status -11 after 'one'; 1 ok"
    assert of_checks(known, "")["status"] == "failed"
    assert of_checks(None, "cut off after 9 s")["detail"] == "cut off after 9 s; no check was made"
    assert of_checks(known | {"finished": True}, "") == {"status": "ok", "detail": "1 ok", "checks": known["checks"]}
    skipped = {"checks": [{"name": "one", "status": "skipped"}], "finished": True}
    assert of_checks(skipped, "")["status"] == "skipped"
    assert of_checks({"checks": [], "finished": True}, "")["status"] == "skipped"
    failed = {"checks": [*known["checks"], {"name": "two", "status": "failed"}], "finished": True}
    assert (of_checks(failed, "")["status"], of_checks(failed, "")["detail"]) == ("failed", "1 ok, 1 failed")


def test_only_correctness_parts_decide_and_all_of_them(bench):
    gpu_check = bench.gpu_check

    def verdict(wanted, *parts):
        found = [{"name": name, "status": status, "is_benchmark": name == "fleet"} for name, status in parts]
        report = {"wanted": wanted, "parts": found}
        return gpu_check.passed(report), gpu_check.verdict(report)

    assert verdict(2, ("capture", "ok"), ("fleet", "failed")) == (True, "PASSED: capture.")
    assert verdict(2, ("capture", "ok")) == (False, "NOT PASSED: 1 parts still to come.")
    assert verdict(2, ("capture", "ok"), ("tests", "skipped")) == (False, "NOT PASSED: tests skipped.")
    assert verdict(1, ("capture", "failed")) == (False, "NOT PASSED: capture failed.")
    assert verdict(1, ("fleet", "ok")) == (False, "NOT PASSED: no correctness part ran.")


def with_numbers(**parts):
    return {"parts": [{"name": name.replace("_", " "), "numbers": {"results": found}} for name, found in parts.items()]}


def step_result(us, **torch):
    peers = {"gpumlp": {"status": "ok", "median_us": us}, "torch-compile": {"status": "failed"}}
    peers |= {name.replace("_", "-"): {"status": "ok", "median_us": value} for name, value in torch.items()}
    return {"layer_sizes": [784, 256, 10], "batch_size": 128, "precision": "tf32", "peers": peers}


def test_goals_stand_beside_what_was_measured(bench):
    kernels = [
        {"name": "add", "type": "f32", "sizes": [{"mib": 64.0, "share": 0.93, "reaches_goal": True}]},
        {"name": "noise", "type": "f32", "sizes": [{"mib": 64.0, "share": 0.6, "reaches_goal": False}]},
        {"name": "dot", "type": "f32", "sizes": [{"mib": 64.0, "share": 0.1, "reaches_goal": None}]},
        {"name": "late", "type": "f32", "status": "no time"},
    ]
    fleets = [
        {"device": "gpu", "models": 64, "per_model_us": 4.5, "precision": "float32"},
        {"device": "gpu", "models": 64, "per_model_us": 3.25, "precision": "tf32"},
        {"device": "cpu", "models": 64, "per_model_us": 1.0, "precision": "float32"},
        {"device": "gpu", "models": None, "per_model_us": 2.0, "precision": "tf32"},
    ]
    report = with_numbers(
        step_mnist=[step_result(31.4, torch_graph=50.2, torch_eager=200.0)], fleet=fleets, kernels=kernels
    )
    mnist, wide, huge, fleet, elementwise = bench.gpu_check.goals(report)
    assert mnist == {
        "what": "a step of 784-256-10, batch 128, tf32",
        "goal": "at most 30 µs",
        "measured": "31.4 µs",
        "rival": "50.2 µs (torch-graph)",
        "reached": False,
    }
    assert (wide["measured"], wide["rival"], wide["reached"]) == ("not measured", "not measured", None)
    assert huge["goal"] == "at most 5000 µs"
    assert (fleet["measured"], fleet["reached"]) == ("3.25 µs (tf32)", True)
    assert elementwise["measured"] == "1 of 2 reach it, the lowest 60% (noise f32 at 64 MiB)"
    assert elementwise["reached"] is False
    nothing = bench.gpu_check.goals({"parts": []})
    assert {goal["measured"] for goal in nothing} == {"not measured"} and {goal["reached"] for goal in nothing} == {
        None
    }


def test_goals_are_about_configurations_that_the_benchmark_has(bench):
    from train_step import CONFIGS, GPU_CONFIGS

    measured = {name: CONFIGS[name] for name in GPU_CONFIGS}
    known = {(config.layer_sizes, config.batch_size, how) for config in measured.values() for how in config.precisions}
    assert {(goal.layer_sizes, goal.batch, goal.precision) for goal in bench.gpu_check.GOALS} <= known
    steps = [part for part in bench.gpu_check.PARTS if part.name.startswith("step ")]
    assert {part.name.removeprefix("step ") for part in steps} == set(GPU_CONFIGS)


def test_every_part_s_command_is_understood(bench, monkeypatch):
    import train_step

    for benchmark in (p for p in bench.gpu_check.PARTS if p.is_benchmark):
        for script, *options in filter(
            None, (benchmark.script, benchmark.quick_script if benchmark.quick_seconds else ())
        ):
            module = train_step if script == "train_step.py" else getattr(bench, script.removesuffix(".py"))
            budget = ["--seconds", "9"] if script in bench.gpu_check.BUDGETED else []
            assert module.parse([*options, "--json", "x.json", *budget]).json.name == "x.json"
    names = [p.name for p in bench.gpu_check.PARTS if not p.is_benchmark]
    assert names == list(bench.gpu_parts.PARTS)


def test_the_summary_shows_failures_goals_and_tables(bench, backend, tmp_path):
    frame = report_of(bench, "gpu-check", backend, {}, [])
    failed = {"name": "sums", "status": "failed", "detail": "2 is not 3"}
    fine = {"name": "shuffles", "status": "ok", "detail": None}
    parts = [
        {"name": "conformance", "about": "intrinsics", "status": "failed", "seconds": 1.2, "detail": "1 ok, 1 failed"},
        {"name": "fleet", "about": "many", "status": "ok", "seconds": 3.0, "detail": "", "table": "| a table |"},
    ]
    parts[0] |= {"is_benchmark": False, "checks": [fine, failed], "stderr": "a warning"}
    parts[1] |= {"is_benchmark": True, "numbers": {"results": []}}
    report = frame | {"emulated": False, "wanted": 2, "parts": parts}
    report["goals"] = bench.gpu_check.goals(report)
    text = bench.gpu_check.markdown(report)
    assert "**NOT PASSED: conformance failed.**" in text and "| fleet | many | ok | 3 |  |" in text
    assert "- sums: failed\n\n```\n2 is not 3\n```" in text and "shuffles" not in text
    assert "```\na warning\n```" in text and text.endswith("## fleet\n\n| a table |")
    assert "| a step of 784-256-10, batch 128, tf32 | at most 30 µs | not measured | not measured | – |" in text
    path = bench.gpu_check.result_path(tmp_path, report)
    assert path.name.startswith("gpu-a-cuda-emulator-on-the-host-") and path.suffix == ".json"
    report["machine"]["gpu"]["description"] = "NVIDIA H100 80GB HBM3, CUDA 13.0, CuPy 14.2.0"
    assert bench.gpu_check.result_path(tmp_path, report).name.startswith("gpu-h100-80gb-hbm3-20")


def test_which_parts_are_chosen(bench):
    def names(*options):
        return [part.name for part in bench.gpu_check.chosen(bench.gpu_check.parse(options))]

    assert names() == [part.name for part in bench.gpu_check.PARTS]
    assert names("--emulate") == ["conformance", "capture", "parity", "memory", "arrays"]
    assert "step huge" not in names("--quick") and "step mnist" in names("--quick")
    assert names("--parts", "fleet,capture") == ["capture", "fleet"]
    quick = bench.gpu_check.parse(["--quick"])
    assert quick.seconds == 170 and bench.gpu_check.parse([]).seconds == 570


def test_an_unknown_part(bench, capsys):
    with pytest.raises(SystemExit):
        bench.gpu_check.parse(["--parts", "speed"])
    assert "speed is not known; choose from conformance, capture, tests" in capsys.readouterr().err


def test_the_process_of_a_part_ends_where_there_is_no_device(bench, no_gpu, tmp_path):
    with pytest.raises(SystemExit, match=f"^{MISSING}$"):
        bench.gpu_check.run_checks("capture", tmp_path / "x.json", emulate=False, quick=False)
    bench.gpu_check.find(tmp_path / "found.json", emulate=False)
    assert json.loads((tmp_path / "found.json").read_text()) == {"missing": MISSING}
