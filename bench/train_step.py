"""Times one training step of gpumlp beside its peers, after checking that everyone computes the same step.

    python bench/train_step.py --configs tiny,digits --peers gpumlp jax --json bench/results/train-step-HOST-DATE.json
    python bench/train_step.py --device cuda --configs mnist --precision float32 tf32 --json

The table on stdout is Markdown; progress goes to stderr. See bench/README.md for what is timed and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import BETA1, BETA2, CHECK_STEPS, EPSILON, LEARNING_RATE, PEERS, Checks, Problem

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 13  # elements that the float64 reference updates at a time, so that they stay in the cache
GPU_ROWS = 65_536  # in memory: about MNIST's, because an epoch's end is part of a step's time on a GPU
# Relative, of the losses against the float64 reference: of the first, which no update has touched, and of later ones. The
# first tells the precisions apart: float32 was seen to be off by 1e-7, TF32 by 1e-5 to 1e-4, once by 1e-6.
TOLERANCES = {"float32": (3e-6, 1e-3), "tf32": (1e-3, 4e-3), "bf16": (5e-3, 1e-2)}
LIBRARIES = ("cupy", "jax", "nvidia-", "torch", "triton")  # beginnings of the packages that a GPU run names
PROBE = """\
import json, machine
runtime, reason = machine.find_device()
found = {"missing": reason}
if runtime is not None:
    found = machine.describe_gpu(runtime) | {"cublaslt": machine.versions(runtime).get("cublaslt")}
print(json.dumps(found))
"""


class Config(NamedTuple):
    layer_sizes: tuple[int, ...]
    batch_size: int
    precisions: tuple[str, ...] = ("float32",)  # on a GPU, unless others are asked for
    check_steps: int = CHECK_STEPS
    check_rows: int = 0  # see Problem
    slack: float = 1  # factor on the tolerance of losses after the first
    devices: tuple[str, ...] = ("cpu", "cuda")

    def tolerance(self, precision: str) -> tuple[float, float]:
        first, later = TOLERANCES[precision]
        return first, later * self.slack

    def n_samples(self, device: str) -> int:
        return GPU_ROWS if device == "cuda" else max(8192, 8 * self.batch_size)


CONFIGS = {
    "tiny": Config((20, 64, 64, 2), 32),
    "digits": Config((64, 128, 10), 64),
    "mnist": Config((784, 256, 10), 128, ("tf32",)),
    "mnist2": Config((784, 512, 256, 10), 256),
    "wide": Config((784, 1024, 1024, 10), 1024, ("bf16",)),
    "deep": Config((128, *[256] * 6, 10), 512),
    # A checked batch repeats few rows: one that does not would be 3.3 TFLOP in float64. At this width Adam's first update
    # throws the loss from 3 to 100 and roundings with it; what trains something else is thrown just as far.
    "huge": Config((*[4096] * 5, 10), 8192, ("bf16",), check_steps=2, check_rows=1000, slack=5, devices=("cuda",)),
}
GPU_CONFIGS = ["mnist", "wide", "huge"]  # unless others are asked for, so that a run takes about five minutes


def make_problem(config: Config, device: str = "cpu") -> Problem:
    """Random data, labels and initial weights (He et al. 2015, equation 10). The same numbers on every machine."""
    rng = np.random.default_rng(0)
    n_samples = config.n_samples(device)
    X = rng.standard_normal((n_samples, config.layer_sizes[0]), dtype=np.float32)
    y = rng.integers(config.layer_sizes[-1], size=n_samples)
    weights = [
        rng.standard_normal((fan_out, fan_in), dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))
        for fan_in, fan_out in pairwise(config.layer_sizes)
    ]
    # Not zero, as usual, but small: a peer that drops the given biases is then caught.
    biases = [rng.standard_normal(len(W), dtype=np.float32) * np.float32(0.1) for W in weights]
    return Problem(X, y, weights, biases, config.batch_size, config.check_steps, config.check_rows)


def loss_and_gradient(
    parameters: Sequence[np.ndarray], X: np.ndarray, y: np.ndarray, share: np.ndarray
) -> tuple[float, list[np.ndarray]]:
    """Softmax cross-entropy of a ReLU network and its gradient; parameters are [W_0, b_0, W_1, b_1, ...].

    The loss is the mean over the rows by their shares (batch,) of the batch, which sum to 1.
    """
    activations = [X]
    for W, b in zip(parameters[0:-2:2], parameters[1:-2:2], strict=True):
        activations.append(np.maximum(activations[-1] @ W.T + b, 0))  # (batch, fan_out)
    z = activations[-1] @ parameters[-2].T + parameters[-1]  # (batch, n_classes)
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = -(share * np.log(p[rows, y])).sum()
    p[rows, y] -= 1
    dz = p * share[:, None]
    gradient: list[np.ndarray] = []
    for W, a in zip(parameters[-2::-2], activations[::-1], strict=True):
        gradient = [dz.T @ a, dz.sum(axis=0), *gradient]  # (fan_out, fan_in), (fan_out,)
        dz = (dz @ W) * (a > 0)  # (batch, fan_in); relu'(0) = 0
    return float(loss), gradient


def reference_losses(problem: Problem, passes: int = 1) -> np.ndarray:
    """Losses under Adam (Kingma & Ba 2015, algorithm 1) in float64, (passes over the checked batches, batches).

    Each is the batch's loss before its update.
    """
    parameters = [p.astype(np.float64) for pair in zip(problem.weights, problem.biases, strict=True) for p in pair]
    m, v = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    losses = np.empty((passes, problem.check_steps))
    batches = [*problem.check_order.reshape(problem.check_steps, -1)] * passes
    for t, rows in enumerate(batches, start=1):
        rows, copies = np.unique(rows, return_counts=True)
        X, y, share = problem.X[rows].astype(np.float64), problem.y[rows], copies / problem.batch_size
        losses.flat[t - 1], gradient = loss_and_gradient(parameters, X, y, share)
        for arrays in zip(parameters, gradient, m, v, strict=True):
            adam(*(array.reshape(-1) for array in arrays), t)
    return losses


def adam(parameters: np.ndarray, gradient: np.ndarray, m: np.ndarray, v: np.ndarray, t: int) -> None:
    """One update in place, number t from 1; all arrays are flat."""
    for start in range(0, len(parameters), CHUNK):
        part = slice(start, start + CHUNK)
        m[part] = BETA1 * m[part] + (1 - BETA1) * gradient[part]
        v[part] = BETA2 * v[part] + (1 - BETA2) * gradient[part] ** 2
        m_hat, v_hat = m[part] / (1 - BETA1**t), v[part] / (1 - BETA2**t)
        parameters[part] -= LEARNING_RATE * m_hat / (np.sqrt(v_hat) + EPSILON)


class PeerError(Exception):
    """A peer that ended with an error, or that trains something else: it gets no figure."""


def largest_error(
    checks: Sequence[Checks], reference: np.ndarray, who: str, tolerance: tuple[float, float]
) -> float | None:
    """The largest relative error of a peer's losses, None where it has none; raises PeerError where one is too large."""
    first, later = tolerance
    errors = []
    for kind, losses in ((kind, losses) for check in checks for kind, losses in check.items()):
        expected = (reference.ravel() if kind == "steps" else reference.mean(axis=1))[: len(losses)]
        allowed = np.where((np.arange(len(losses)) == 0) & (kind == "steps"), first, later)
        error = np.abs(np.array(losses) / expected - 1)
        if not (error <= allowed).all():  # so written, a NaN fails too
            worst = int(np.argmax(np.nan_to_num(error / allowed, nan=np.inf)))
            raise PeerError(
                f"{who} trains something else: losses {losses}, the float64 reference says {expected.tolist()} "
                f"(relative error {error[worst]:.1e}, allowed {allowed[worst]:.0e}); its time would mean nothing"
            )
        errors.append(float(error.max()))
    return max(errors, default=None)


def child_environment(threads: int, device: str = "cpu", precision: str = "float32") -> dict[str, str]:
    """Environment of a peer's process: the thread count as each library reads it, its device, this checkout's gpumlp."""
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
    names += ["PJRT_NPROC", "NPROC"]  # JAX, newer and older
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path, "JAX_PLATFORMS": device}
    # NVIDIA's own switch, over every library's: what the shell says must not decide, and float32 means no TF32 at all.
    environment.pop("NVIDIA_TF32_OVERRIDE", None)
    if device == "cpu":
        return environment | {"CUDA_VISIBLE_DEVICES": ""}
    return environment | ({"NVIDIA_TF32_OVERRIDE": "0"} if precision == "float32" else {})


def run_peer(
    name: str,
    problem: Path,
    repeats: int,
    block_seconds: float,
    threads: int,
    device: str = "cpu",
    precision: str = "float32",
) -> dict[str, Any]:
    """Runs one peer in a process of its own and returns what it wrote (see `peers.main`)."""
    rest = str(repeats), str(block_seconds), device, precision
    return run_script("peers.py", name, problem, rest, child_environment(threads, device, precision))


def run_script(script: str, name: str, source: Path, rest: Sequence[str], environment: dict[str, str]) -> Any:
    """Runs `script name source result *rest` of this folder in a process of its own; returns the JSON that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "bench" / script), name, str(source), str(result), *rest]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(f"the process of {name} ended with status {done.returncode}:\n{done.stderr}")
        return json.loads(result.read_text())


def summarise(
    rounds: Sequence[dict[str, Any]], reference: np.ndarray, who: str, tolerance: tuple[float, float]
) -> dict[str, Any]:
    """One peer's rounds on one configuration: median, min and max over all blocks, in microseconds per step."""
    if reason := next((r["failed"] for r in rounds if "failed" in r), ""):
        return {"status": "failed", "note": reason}
    if reason := next((r["unavailable"] for r in rounds if "unavailable" in r), ""):
        return {"status": "unavailable", "note": reason}
    blocks = [block for r in rounds for block in r["blocks_us"]]
    return {
        "status": "ok",
        "note": rounds[0]["note"],
        "median_us": statistics.median(blocks),
        "min_us": min(blocks),
        "max_us": max(blocks),
        "largest_loss_error": largest_error([r["checks"] for r in rounds], reference, who, tolerance),
        "rounds": [{"steps_per_block": r["steps_per_block"], "blocks_us": r["blocks_us"]} for r in rounds],
    }


def measure(args: argparse.Namespace, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Runs every peer on every configuration, `args.rounds` times over; puts the peers' versions into `versions`."""
    installed = [name for name in args.peers if importlib.util.find_spec(PEERS[name].package)]
    cases = [(name, precision) for name in args.configs for precision in args.precision or CONFIGS[name].precisions]
    on_gpu = args.device == "cuda"
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print("making data and their float64 reference", file=sys.stderr, flush=True)
        problems = {name: make_problem(CONFIGS[name], args.device) for name in args.configs}
        # On a GPU gpumlp's second pass over the checked batches replays what it recorded in the first.
        references = {name: reference_losses(problem, 1 + on_gpu) for name, problem in problems.items()}
        for name, problem in problems.items():
            problem.save(Path(folder) / f"{name}.npz")
        for i in range(args.rounds):
            for config, precision in cases:
                label = f"{config} {precision}" if on_gpu else config
                # Every second round goes backwards: a machine that slows down steadily then favours nobody.
                for peer in installed if i % 2 == 0 else reversed(installed):
                    path, tolerance = Path(folder) / f"{config}.npz", CONFIGS[config].tolerance(precision)
                    settings = args.repeats, args.block_seconds, args.threads, args.device, precision
                    try:
                        result = run_peer(peer, path, *settings)
                        largest_error([result.get("checks", {})], references[config], f"{peer} on {label}", tolerance)
                    except PeerError as error:
                        result = {"failed": str(error)}
                    if "version" in result:
                        versions[PEERS[peer].package] = result["version"]
                    found.setdefault((config, precision, peer), []).append(result)
                    told = result.get("failed") or result.get("unavailable")
                    told = told or f"{statistics.median(result['blocks_us']):.1f} us a step"
                    print(f"round {i + 1}/{args.rounds} {label} {peer}: {told}", file=sys.stderr, flush=True)

    def row(config: str, precision: str, peer: str) -> dict[str, Any]:
        if peer not in installed:
            return {"status": "not installed", "note": ""}
        rounds = found[config, precision, peer]
        return summarise(rounds, references[config], f"{peer} on {config}", CONFIGS[config].tolerance(precision))

    def check_of(config: str, precision: str) -> dict[str, Any]:
        steps, tolerance = CONFIGS[config].check_steps, CONFIGS[config].tolerance(precision)
        return {"precision": precision, "checked_steps": steps, "tolerance": list(tolerance)}

    return [
        {
            "config": name,
            **(check_of(name, precision) if on_gpu else {}),
            "layer_sizes": list(CONFIGS[name].layer_sizes),
            "batch_size": CONFIGS[name].batch_size,
            "n_samples": len(problems[name].X),
            "n_parameters": sum(p.size for p in problems[name].weights + problems[name].biases),
            "peers": {peer: row(name, precision, peer) for peer in args.peers},
        }
        for name, precision in cases
    ]


def n_cores() -> int:
    """The cores that this process may use, which a container or taskset can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.processor() or platform.machine(), "cores": n_cores(), "os": platform.platform()}


def describe_gpu() -> dict[str, Any]:
    """The GPU as `machine.describe_gpu` has it. Exits where none works, with the reason and what to do.

    It is asked in a process of its own: what starts CUDA here would hold memory on the GPU to the end.
    """
    command, environment = [sys.executable, "-c", PROBE], child_environment(1, "cuda", "tf32")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), environment["PYTHONPATH"]])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the process that looks for a GPU ended with status {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "missing" in found:
        raise SystemExit(f"--device cuda needs a GPU that works: {found['missing']}")
    return found


def in_words(gpu: dict[str, Any]) -> str:
    driver = (gpu.get("nvidia-smi") or {}).get("driver_version", "unknown")
    return f"{gpu['description']}, driver {driver}"


def describe_libraries() -> dict[str, str]:
    """The versions of all that a GPU's peers are made of, as installed: cuBLAS, compilers, plugins."""
    packages = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {name: packages[name] for name in sorted(packages) if name.lower().startswith(LIBRARIES)}


def describe_blas(threads: int) -> dict[str, Any]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {"name": blas.get("name", "unknown"), "version": blas.get("version", "unknown"), "threads": threads}


def cell(peer: dict[str, Any], base: dict[str, Any]) -> str:
    """`median (min-max)` in microseconds and, beside another's, the ratio of its median to gpumlp's."""
    if peer["status"] != "ok":
        return peer["status"]
    digits = 1 if peer["median_us"] < 100 else 0
    text = f"{peer['median_us']:.{digits}f} ({peer['min_us']:.{digits}f}–{peer['max_us']:.{digits}f})"
    if peer is not base and base.get("status") == "ok":
        text += f", {peer['median_us'] / base['median_us']:.2f}×"
    return text


def markdown(report: dict[str, Any]) -> str:
    """The table for people: one row per configuration, one column per peer, then the notes."""
    machine, versions, protocol = report["machine"], report["versions"], report["protocol"]
    blas, on_gpu = versions["blas"], "gpu" in machine
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("blas", "libraries"))
    gpu = in_words(machine["gpu"]) + "; " if on_gpu else ""
    lines = [
        f"{gpu}{machine['cpu']}, {protocol['threads']} of {machine['cores']} cores, {machine['os']}; {named}, "
        f"{blas['name']} {blas['version']}; {report['date'][:10]}.",
        f"µs per training step, {'everyone at the precision of the row' if on_gpu else protocol['dtype']}: "
        f"median (min–max) of {protocol['rounds']} × {protocol['repeats']} "
        f"blocks of about {protocol['block_seconds']:g} s; × is the ratio to gpumlp, above 1 where gpumlp is faster.",
        "",
    ]
    peers = list(report["results"][0]["peers"])
    lines += ["| | " + " | ".join(peers) + " |", "|---|" + "---:|" * len(peers)]
    notes: list[str] = []
    for result in report["results"]:
        sizes = "-".join(map(str, result["layer_sizes"]))
        case = f"{result['config']} {sizes}, batch {result['batch_size']}"
        base = result["peers"].get("gpumlp", {})
        cells = [cell(peer, base) for peer in result["peers"].values()]
        about = result["config"]
        if on_gpu:
            case, about = f"{case}, {result['precision']}", f"{about} {result['precision']}"
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
        told = {name: p["note"].strip().splitlines()[-1] for name, p in result["peers"].items() if p["note"]}
        notes += [f"- {about}, {name}: {note}" for name, note in told.items()]
    return "\n".join(lines + [""] * bool(notes) + notes)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes beside the target and renames: an interrupted run leaves the old file, never half a new one."""
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(half, path)


def results_path(machine: dict[str, Any]) -> Path:
    """Where `--json` without a path puts the report: bench/results/train-step-<what was measured>-<date>.json."""
    what = f"{machine['cpu']} {machine['cores']} cores"
    if "gpu" in machine:
        what = machine["gpu"]["description"].split(",")[0].removeprefix("NVIDIA ")
    name = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
    return ROOT / "bench" / "results" / f"train-step-{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def names(known: Any) -> Any:
    """The type of an option that takes names with commas between them."""

    def read(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
        return chosen

    return read


def positive(kind: type) -> Any:
    """The type of an option that takes a number above 0."""

    def read(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number above 0")
        return value

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one training step beside the peers, on the CPU or on a GPU.")

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    def several(flag: str, known: Any, more: str = "") -> None:
        text = f"of {', '.join(known)}{more}"
        option(flag, type=names(known), nargs="+", default=[], metavar="A,B", help=text)

    option("--device", choices=("cpu", "cuda"), default="cpu", help="cpu, or cuda: the first GPU (cpu)")
    several("--configs", CONFIGS, f"; on a GPU {', '.join(GPU_CONFIGS)} unless others are asked for")
    several("--peers", PEERS)
    several("--precision", TOLERANCES, "; on a GPU each configuration has its own unless others are asked for")
    option("--repeats", type=positive(int), default=9, help="timed blocks in each process (9)")
    option("--rounds", type=positive(int), help="times that the whole list of processes is run (2, on a GPU 1)")
    option("--block-seconds", type=positive(float), default=0.3, help="least duration of a block (0.3)")
    option("--threads", type=positive(int), default=n_cores(), help="threads for everyone (all cores)")
    written = "also write machine, versions and every block to this file; without PATH bench/results/train-step-..."
    option("--json", type=Path, nargs="?", const=Path(), metavar="PATH", help=written)
    args = parser.parse_args(argv)
    for flag in ("configs", "peers", "precision"):
        setattr(args, flag, [name for group in getattr(args, flag) for name in group])  # "a,b c" and "a b c" both serve
    settle(args, parser)
    return args


def settle(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what the device does not run, and fill in what was not asked for."""

    def able(known: dict[str, Any], asked: list[str]) -> list[str]:
        names = [name for name, it in known.items() if args.device in it.devices]
        if unable := [name for name in asked if name not in names]:
            parser.error(f"{', '.join(unable)} is not for --device {args.device}; choose from {', '.join(names)}")
        return asked or names

    on_gpu = args.device == "cuda"
    args.configs = able(CONFIGS, args.configs or (GPU_CONFIGS if on_gpu else []))
    args.peers = able(PEERS, args.peers)
    args.rounds = args.rounds or (1 if on_gpu else 2)
    if not on_gpu and set(args.precision) - {"float32"}:
        parser.error(f"--precision {' '.join(args.precision)} is for --device cuda; the CPU is measured in float32")
    if not on_gpu:
        args.precision = ["float32"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    on_gpu = args.device == "cuda"
    sys.path.insert(0, str(ROOT))  # find_spec looks for gpumlp here; nothing of it is imported in this process
    machine = describe_machine() | ({"gpu": describe_gpu()} if on_gpu else {})
    if args.json == Path():
        args.json = results_path(machine)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, so that a bad path fails before minutes of timing
    peer_versions: dict[str, str] = {}
    results = measure(args, peer_versions)
    report = {
        "benchmark": "train-step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **peer_versions,
            "blas": describe_blas(args.threads),
            **({"libraries": describe_libraries()} if on_gpu else {}),
        },
        "protocol": {
            **({"device": args.device} if on_gpu else {}),
            "dtype": "float32",
            "optimizer": f"Adam({LEARNING_RATE:g})",
            "loss": "softmax cross-entropy",
            "hidden": "ReLU",
            "repeats": args.repeats,
            "rounds": args.rounds,
            "block_seconds": args.block_seconds,
            "threads": args.threads,
            **({} if on_gpu else {"checked_steps": CHECK_STEPS, "tolerance": TOLERANCES["float32"][1]}),
        },
        "results": results,
    }
    if args.json:
        write_json(args.json, report)
    print(markdown(report))
    if any(peer["status"] == "failed" for result in results for peer in result["peers"].values()):
        raise SystemExit("a peer failed or trains something else: see the notes")


if __name__ == "__main__":
    main()
