"""Times one training step of gpumlp on the CPU beside its peers, after checking that everyone computes the same step.

    python bench/train_step.py --configs tiny,digits --peers gpumlp jax --json bench/results/train-step-HOST-DATE.json

The table on stdout is Markdown; progress goes to stderr. See bench/README.md for what is timed and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import BETA1, BETA2, CHECK_STEPS, EPSILON, LEARNING_RATE, PEERS, Problem

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3  # relative, float32 losses against the float64 reference over CHECK_STEPS updates


class Config(NamedTuple):
    layer_sizes: tuple[int, ...]
    batch_size: int

    @property
    def n_samples(self) -> int:
        return max(8192, 8 * self.batch_size)


CONFIGS = {
    "tiny": Config((20, 64, 64, 2), 32),
    "digits": Config((64, 128, 10), 64),
    "mnist": Config((784, 256, 10), 128),
    "mnist2": Config((784, 512, 256, 10), 256),
    "wide": Config((784, 1024, 1024, 10), 1024),
    "deep": Config((128, *[256] * 6, 10), 512),
}


def make_problem(config: Config) -> Problem:
    """Random data, labels and initial weights (He et al. 2015, equation 10). The same numbers on every machine."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((config.n_samples, config.layer_sizes[0]), dtype=np.float32)
    y = rng.integers(config.layer_sizes[-1], size=config.n_samples)
    weights = [
        rng.standard_normal((fan_out, fan_in), dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))
        for fan_in, fan_out in pairwise(config.layer_sizes)
    ]
    # Not zero, as usual, but small: a peer that drops the given biases is then caught.
    biases = [rng.standard_normal(len(W), dtype=np.float32) * np.float32(0.1) for W in weights]
    return Problem(X, y, weights, biases, config.batch_size)


def loss_and_gradient(parameters: Sequence[np.ndarray], X: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Mean softmax cross-entropy of a ReLU network and its gradient; parameters are [W_0, b_0, W_1, b_1, ...]."""
    activations = [X]
    for W, b in zip(parameters[0:-2:2], parameters[1:-2:2], strict=True):
        activations.append(np.maximum(activations[-1] @ W.T + b, 0))  # (batch, fan_out)
    z = activations[-1] @ parameters[-2].T + parameters[-1]  # (batch, n_classes)
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y]).mean()
    p[rows, y] -= 1
    dz = p / len(y)
    gradient: list[np.ndarray] = []
    for W, a in zip(parameters[-2::-2], activations[::-1], strict=True):
        gradient = [dz.T @ a, dz.sum(axis=0), *gradient]  # (fan_out, fan_in), (fan_out,)
        dz = (dz @ W) * (a > 0)  # (batch, fan_in); relu'(0) = 0
    return float(loss), gradient


def reference_losses(problem: Problem) -> list[float]:
    """Losses of the checked batches under Adam (Kingma & Ba 2015, algorithm 1), each before its update, in float64."""
    parameters = [p.astype(np.float64) for pair in zip(problem.weights, problem.biases, strict=True) for p in pair]
    m, v = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    losses = []
    for t, rows in enumerate(problem.check_order.reshape(CHECK_STEPS, -1), start=1):
        loss, gradient = loss_and_gradient(parameters, problem.X[rows].astype(np.float64), problem.y[rows])
        losses.append(loss)
        for i, g in enumerate(gradient):
            m[i] = BETA1 * m[i] + (1 - BETA1) * g
            v[i] = BETA2 * v[i] + (1 - BETA2) * g**2
            m_hat, v_hat = m[i] / (1 - BETA1**t), v[i] / (1 - BETA2**t)
            parameters[i] -= LEARNING_RATE * m_hat / (np.sqrt(v_hat) + EPSILON)
    return losses


def largest_error(checks: Sequence[Sequence[float]], reference: Sequence[float], who: str) -> float | None:
    """The largest relative error of a peer's losses, None where it has none; exits where one is beyond TOLERANCE."""
    errors = []
    for losses in checks:
        expected = reference if len(losses) == len(reference) else [statistics.fmean(reference)]
        error = np.abs(np.array(losses) / np.array(expected) - 1).max()
        if not error <= TOLERANCE:  # so written, a NaN fails too
            raise SystemExit(
                f"{who} trains something else: losses {losses}, the float64 reference says {expected} "
                f"(relative error {error:.1e}, allowed {TOLERANCE:.0e}); its time would mean nothing"
            )
        errors.append(float(error))
    return max(errors, default=None)


def child_environment(threads: int) -> dict[str, str]:
    """Environment of a peer's process: the thread count as each library reads it, no GPU, this checkout's gpumlp."""
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
    names += ["PJRT_NPROC", "NPROC"]  # JAX, newer and older
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cpu_only = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return os.environ | dict.fromkeys(names, str(threads)) | cpu_only | {"PYTHONPATH": path}


def run_peer(name: str, problem: Path, repeats: int, block_seconds: float, threads: int) -> dict[str, Any]:
    """Runs one peer in a process of its own and returns what it wrote (see `peers.main`)."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "bench" / "peers.py"), name, str(problem), str(result)]
        command += [str(repeats), str(block_seconds)]
        done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the process of {name} ended with status {done.returncode}:\n{done.stderr}")
        return json.loads(result.read_text())


def summarise(rounds: Sequence[dict[str, Any]], reference: Sequence[float], who: str) -> dict[str, Any]:
    """One peer's rounds on one configuration: median, min and max over all blocks, in microseconds per step."""
    if reason := next((r["unavailable"] for r in rounds if "unavailable" in r), ""):
        return {"status": "unavailable", "note": reason}
    blocks = [block for r in rounds for block in r["blocks_us"]]
    return {
        "status": "ok",
        "note": rounds[0]["note"],
        "median_us": statistics.median(blocks),
        "min_us": min(blocks),
        "max_us": max(blocks),
        "largest_loss_error": largest_error([losses for r in rounds for losses in r["checks"]], reference, who),
        "rounds": [{"steps_per_block": r["steps_per_block"], "blocks_us": r["blocks_us"]} for r in rounds],
    }


def measure(args: argparse.Namespace, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Runs every peer on every configuration, `args.rounds` times over; puts the peers' versions into `versions`."""
    installed = [name for name in args.peers if importlib.util.find_spec(PEERS[name].package)]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        problems = {name: make_problem(CONFIGS[name]) for name in args.configs}
        references = {name: reference_losses(problem) for name, problem in problems.items()}
        for name, problem in problems.items():
            problem.save(Path(folder) / f"{name}.npz")
        for i in range(args.rounds):
            for config in args.configs:
                # Every second round goes backwards: a machine that slows down steadily then favours nobody.
                for peer in installed if i % 2 == 0 else reversed(installed):
                    path = Path(folder) / f"{config}.npz"
                    result = run_peer(peer, path, args.repeats, args.block_seconds, args.threads)
                    largest_error(
                        result.get("checks", []), references[config], f"{peer} on {config}"
                    )  # stop here if wrong
                    versions[PEERS[peer].package] = result["version"]
                    found.setdefault((config, peer), []).append(result)
                    told = result.get("unavailable") or f"{statistics.median(result['blocks_us']):.1f} us a step"
                    print(f"round {i + 1}/{args.rounds} {config} {peer}: {told}", file=sys.stderr, flush=True)

    def row(config: str, peer: str) -> dict[str, Any]:
        if peer not in installed:
            return {"status": "not installed", "note": ""}
        return summarise(found[config, peer], references[config], f"{peer} on {config}")

    return [
        {
            "config": name,
            "layer_sizes": list(CONFIGS[name].layer_sizes),
            "batch_size": CONFIGS[name].batch_size,
            "n_samples": CONFIGS[name].n_samples,
            "n_parameters": sum(p.size for p in problems[name].weights + problems[name].biases),
            "peers": {peer: row(name, peer) for peer in args.peers},
        }
        for name in args.configs
    ]


def n_cores() -> int:
    """The cores that this process may use, which a container or taskset can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.processor() or platform.machine(), "cores": n_cores(), "os": platform.platform()}


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
    blas = versions["blas"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "blas")
    lines = [
        f"{machine['cpu']}, {protocol['threads']} of {machine['cores']} cores, {machine['os']}; {named}, "
        f"{blas['name']} {blas['version']}; {report['date'][:10]}.",
        f"µs per training step, {protocol['dtype']}: median (min–max) of {protocol['rounds']} × {protocol['repeats']} "
        f"blocks of about {protocol['block_seconds']:g} s; × is the ratio to gpumlp, above 1 where gpumlp is faster.",
        "",
    ]
    peers = list(report["results"][0]["peers"])
    lines += ["| | " + " | ".join(peers) + " |", "|---|" + "---:|" * len(peers)]
    notes: list[str] = []
    for result in report["results"]:
        sizes = "-".join(map(str, result["layer_sizes"]))
        base = result["peers"].get("gpumlp", {})
        cells = [cell(peer, base) for peer in result["peers"].values()]
        lines.append(f"| {result['config']} {sizes}, batch {result['batch_size']} | " + " | ".join(cells) + " |")
        notes += [f"- {result['config']}, {name}: {p['note']}" for name, p in result["peers"].items() if p["note"]]
    return "\n".join(lines + [""] * bool(notes) + notes)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes beside the target and renames: an interrupted run leaves the old file, never half a new one."""
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(half, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one training step on the CPU beside the peers.")

    def names(known: dict[str, Any]) -> Any:
        def read(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            if unknown := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
            return chosen

        return read

    def positive(kind: type) -> Any:
        def read(text: str) -> Any:
            if not (value := kind(text)) > 0:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number above 0")
            return value

        return read

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    option("--configs", type=names(CONFIGS), default=list(CONFIGS), metavar="A,B", help=f"of {', '.join(CONFIGS)}")
    option(
        "--peers", type=names(PEERS), nargs="+", default=[list(PEERS)], metavar="NAME", help=f"of {', '.join(PEERS)}"
    )
    option("--repeats", type=positive(int), default=9, help="timed blocks in each process (9)")
    option("--rounds", type=positive(int), default=2, help="times that the whole list of processes is run (2)")
    option("--block-seconds", type=positive(float), default=0.3, help="least duration of a block (0.3)")
    option("--threads", type=positive(int), default=n_cores(), help="threads for everyone (all cores)")
    option("--json", type=Path, metavar="PATH", help="also write machine, versions and every block to this file")
    args = parser.parse_args(argv)
    args.peers = [name for group in args.peers for name in group]  # "a,b c" and "a b c" both serve
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    sys.path.insert(0, str(ROOT))  # find_spec looks for gpumlp here; nothing of it is imported in this process
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, so that a bad path fails before minutes of timing
    peer_versions: dict[str, str] = {}
    results = measure(args, peer_versions)
    report = {
        "benchmark": "train-step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **peer_versions,
            "blas": describe_blas(args.threads),
        },
        "protocol": {
            "dtype": "float32",
            "optimizer": f"Adam({LEARNING_RATE:g})",
            "loss": "softmax cross-entropy",
            "hidden": "ReLU",
            "repeats": args.repeats,
            "rounds": args.rounds,
            "block_seconds": args.block_seconds,
            "threads": args.threads,
            "checked_steps": CHECK_STEPS,
            "tolerance": TOLERANCE,
        },
        "results": results,
    }
    if args.json:
        write_json(args.json, report)
    print(markdown(report))


if __name__ == "__main__":
    main()
