"""One command that says whether gpumlp is right on this machine's GPU, and how fast it is, within ten minutes.

    python bench/gpu_check.py            # everything: bench/results/gpu-<device>-<date>.json and .md
    python bench/gpu_check.py --quick    # three minutes
    python bench/gpu_check.py --emulate  # the correctness parts on the emulated device of the tests, without a GPU

Every part runs in a process of its own with a time limit, so that a crash or a hang loses nothing else, and the files are
written after each. The exit code is 0 only if every correctness part passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timing import short
from train_step import ROOT, write_json

BENCH = ROOT / "bench"
SECONDS, QUICK_SECONDS = 570, 170
LEAST_SECONDS = 5  # that a part is begun with
TORCH = ("torch-graph", "torch-compile-graph")  # the modes that may be the fastest; train_step.py has the others


@dataclass(frozen=True)
class Part:
    """What runs, and how many seconds it may take, in full and quick; a benchmark has arguments for its script."""

    name: str
    about: str
    seconds: int
    quick_seconds: int  # 0: left out
    script: tuple[str, ...] = ()
    quick_script: tuple[str, ...] = ()
    needs_gpu: bool = False  # it cannot run on the emulated device

    @property
    def is_benchmark(self) -> bool:
        return bool(self.script)


def step(config: str, seconds: int, quick_seconds: int = 0) -> Part:
    arguments = (
        "train_step.py",
        "--device",
        "cuda",
        "--configs",
        config,
        "--block-seconds",
        "0.2",
        "--peers",
        "gpumlp",
    )
    full, quick = (*arguments, *TORCH, "--repeats", "5"), (*arguments, "torch-graph", "--repeats", "3")
    return Part(f"step {config}", "a training step beside PyTorch's as a graph", seconds, quick_seconds, full, quick)


PARTS = (
    Part("conformance", "the intrinsics that kernels lean on, to the last bit", 60, 30),
    Part("capture", "products of cuBLASLt and a kernel, recorded and replayed", 60, 30),
    Part("tests", "pytest -m gpu", 240, 60, needs_gpu=True),
    Part("parity", "networks, losses and optimizers trained on both", 150, 60),
    Part("memory", "limits, streaming, too little memory", 60, 30),
    Part("arrays", "arrays that lie on the device", 60, 30),
    step("mnist", 100, 30),
    step("wide", 100),
    Part(
        "kernels",
        "bandwidth against a copy",
        90,
        25,
        ("kernels.py", "--sizes", "64,256"),
        ("kernels.py", "--sizes", "64"),
    ),
    Part("fleet", "many models at once", 75, 20, ("fleet.py",), ("fleet.py", "--models", "64", "--cpu-models", "1")),
    step("huge", 150),
    Part(
        *("cpu_vs_gpu", "where the crossover lies", 60, 20),
        ("cpu_vs_gpu.py", "--cell-seconds", "0.1", "--depths", "1"),
        ("cpu_vs_gpu.py", "--cell-seconds", "0.05", "--widths", "16,256,1024", "--batches", "64,1024", "--depths", "1"),
    ),
)
BUDGETED = ("kernels.py", "fleet.py", "cpu_vs_gpu.py")  # scripts that end by themselves after --seconds


# --- a part, in a process of its own --------------------------------------------------------------------------------


def find(path: Path, emulate: bool) -> None:
    """Writes the first lines of the report; ``missing`` says why there is no device."""
    import machine

    runtime, reason = machine.find_device(emulate)
    write_json(path, {"missing": reason} if runtime is None else machine.frame("gpu-check", runtime, reason))


def run_checks(name: str, path: Path, emulate: bool, quick: bool) -> None:
    """Makes the checks of a part; what is known is written after each."""
    import machine
    from gpu_parts import PARTS as CHECKS
    from gpu_parts import Setting

    runtime, reason = machine.find_device(emulate)
    found: dict[str, Any] = {"checks": [], "finished": False}
    if runtime is None:
        raise SystemExit(reason)
    for check in made(CHECKS[name](Setting(runtime, emulate, quick))):
        found["checks"].append(check)
        write_json(path, found)
    found["finished"] = True
    write_json(path, found)


def made(checks: Iterator[tuple[str, Callable[[], Any]]]) -> Iterator[dict[str, Any]]:
    """Each check's outcome."""
    from gpu_parts import Skip

    while True:
        begin, name = time.monotonic(), "(preparing the next check)"
        try:
            name, function = next(checks)
            status, detail = "ok", function()
        except StopIteration:
            return
        except Skip as reason:
            status, detail = "skipped", str(reason)
        except AssertionError as error:
            status, detail = "failed", str(error) or traceback.format_exc()
        except (Exception, SystemExit):
            status, detail = "failed", traceback.format_exc()
        yield {"name": name, "status": status, "seconds": round(time.monotonic() - begin, 2), "detail": detail}


# --- the parts, one after the other ---------------------------------------------------------------------------------


def in_a_process(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Status (None where the time was up), stdout and the end of stderr. Whatever the process started ends with it."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT, process_group=0)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()[-4000:]


def run_part(part: Part, seconds: float, emulate: bool, quick: bool, folder: Path) -> dict[str, Any]:
    """Runs a part and says how it went: status "ok", "failed" or "skipped", seconds, and all that it found."""
    path, begin = folder / f"{part.name.replace(' ', '-')}.json", time.monotonic()
    if part.is_benchmark:
        script, *arguments = part.quick_script if quick else part.script
        command = [sys.executable, str(BENCH / script), *arguments, "--json", str(path)]
        command += ["--seconds", f"{0.75 * seconds:.0f}"] if script in BUDGETED else []
    else:
        command = [sys.executable, str(BENCH / "gpu_check.py"), "--part", part.name, "--out", str(path)]
        command += ["--emulate"] * emulate + ["--quick"] * quick
    status, out, err = in_a_process(command, seconds)
    found = {"name": part.name, "about": part.about, "is_benchmark": part.is_benchmark}
    found["seconds"] = round(time.monotonic() - begin, 1)
    known = json.loads(path.read_text()) if path.is_file() else None
    outcome = of_benchmark if part.is_benchmark else of_checks
    ended = "" if status == 0 else f"cut off after {seconds:.0f} s" if status is None else f"ended with status {status}"
    found |= outcome(known, ended)
    if ended:
        found["stderr"] = err
    return found | ({"table": out.strip()} if part.is_benchmark else {})


def of_checks(known: dict[str, Any] | None, ended: str) -> dict[str, Any]:
    """The outcome of a correctness part from what it wrote; one that did not finish has failed."""
    checks = known["checks"] if known else []
    count = {status: sum(check["status"] == status for check in checks) for status in ("ok", "failed", "skipped")}
    told = ", ".join(f"{n} {status}" for status, n in count.items() if n)
    if known is None or not known["finished"]:
        after = f" after {checks[-1]['name']!r}" if checks else ""
        return {
            "status": "failed",
            "detail": f"{ended or 'ended early'}{after}; {told or 'no check was made'}",
            "checks": checks,
        }
    status = "failed" if count["failed"] else "ok" if count["ok"] else "skipped"
    return {"status": status, "detail": told or "no checks", "checks": checks}


def of_benchmark(known: dict[str, Any] | None, ended: str) -> dict[str, Any]:
    numbers = known if known and known.get("results") else None
    status = "failed" if ended or numbers is None else "ok"
    return {"status": status, "detail": ended + ", with what it had" * bool(ended and numbers), "numbers": numbers}


def run(parts: Sequence[Part], report: dict[str, Any], args: argparse.Namespace, keep: Callable[[], None]) -> None:
    """Runs the parts until the time is up; ``keep`` is called after each."""
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            limit = min(part.quick_seconds if args.quick else part.seconds, deadline - time.monotonic())
            if limit < LEAST_SECONDS:
                about = {"name": part.name, "about": part.about, "is_benchmark": part.is_benchmark}
                found = {**about, "status": "skipped", "seconds": 0.0, "detail": f"the {args.seconds:.0f} s were up"}
            else:
                print(f"{part.name}: {part.about} (up to {limit:.0f} s)", file=sys.stderr, flush=True)
                found = run_part(part, limit, args.emulate, args.quick, Path(folder))
            print(f"{part.name}: {found['status']}, {found['detail']}", file=sys.stderr, flush=True)
            report["parts"].append(found)
            keep()


# --- the goals ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals: a step of one network, at most so many microseconds."""

    what: str
    us: float
    layer_sizes: tuple[int, ...]
    batch: int
    precision: str


GOALS = (
    Goal("784-256-10, batch 128, tf32", 30, (784, 256, 10), 128, "tf32"),
    Goal("784-1024-1024-10, batch 1024, bf16", 75, (784, 1024, 1024, 10), 1024, "bf16"),
    Goal("4 × 4096, batch 8192, bf16", 5000, (*[4096] * 5, 10), 8192, "bf16"),
)
FLEET, FLEET_US = 64, 4.0  # models, and microseconds for each and step
NONE = "not measured"


def numbers_of(report: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """The results of all benchmarks whose name begins so."""
    parts = [part for part in report["parts"] if part["name"].startswith(prefix) and part.get("numbers")]
    return [result for part in parts for result in part["numbers"]["results"]]


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted beside what was measured: ``reached`` is None where it was not."""
    return [*(step_goal(goal, report) for goal in GOALS), fleet_goal(report), kernel_goal(report)]


def step_goal(goal: Goal, report: dict[str, Any]) -> dict[str, Any]:
    key = (goal.layer_sizes, goal.batch, goal.precision)
    found = [
        r for r in numbers_of(report, "step ") if (tuple(r["layer_sizes"]), r["batch_size"], r.get("precision")) == key
    ]
    peers = {name: peer for result in found for name, peer in result["peers"].items() if peer["status"] == "ok"}
    torch = {name: peer["median_us"] for name, peer in peers.items() if name.startswith("torch")}
    best = min(torch, key=torch.__getitem__, default="")
    us = peers["gpumlp"]["median_us"] if "gpumlp" in peers else None
    return {
        "what": f"a step of {goal.what}",
        "goal": f"at most {goal.us:g} µs",
        "measured": NONE if us is None else f"{short(us)} µs",
        "rival": f"{short(torch[best])} µs ({best})" if best else NONE,
        "reached": None if us is None else us <= goal.us,
    }


def fleet_goal(report: dict[str, Any]) -> dict[str, Any]:
    found = [r for r in numbers_of(report, "fleet") if (r["device"], r["models"]) == ("gpu", FLEET)]
    best = min(found, key=lambda r: r["per_model_us"], default=None)
    return {
        "what": f"a model and step in a fleet of {FLEET} × (784-256-10, batch 128)",
        "goal": f"at most {FLEET_US:g} µs",
        "measured": f"{short(best['per_model_us'])} µs ({best['precision']})" if best else NONE,
        "rival": "",
        "reached": best["per_model_us"] <= FLEET_US if best else None,
    }


def kernel_goal(report: dict[str, Any]) -> dict[str, Any]:
    rows = [(row["name"], row["type"], f) for row in numbers_of(report, "kernels") for f in row.get("sizes", ())]
    judged = [
        (f["share"], f"{name} {type} at {f['mib']:g} MiB")
        for name, type, f in rows
        if f.get("reaches_goal") is not None
    ]
    reached = sum(f.get("reaches_goal") is True for _, _, f in rows)
    share, where = min(judged, default=(0.0, ""))
    return {
        "what": "element-wise kernels from 64 MiB on, of a copy's bandwidth",
        "goal": "at least 85 % each",
        "measured": f"{reached} of {len(judged)} reach it, the lowest {share:.0%} ({where})" if judged else NONE,
        "rival": "",
        "reached": reached == len(judged) if judged else None,
    }


# --- the report -----------------------------------------------------------------------------------------------------


def passed(report: dict[str, Any]) -> bool:
    """Whether all parts ran, and every correctness part passed."""
    checked = [part["status"] for part in report["parts"] if not part["is_benchmark"]]
    return len(report["parts"]) == report["wanted"] and bool(checked) and set(checked) == {"ok"}


def verdict(report: dict[str, Any]) -> str:
    """The first line: which correctness parts passed, which did not."""
    checked = {part["name"]: part["status"] for part in report["parts"] if not part["is_benchmark"]}
    if passed(report):
        return f"PASSED: {', '.join(checked)}."
    bad = [f"{name} {status}" for name, status in checked.items() if status != "ok"]
    left = report["wanted"] - len(report["parts"])
    told = bad + [f"{left} parts still to come"] * bool(left) + ["no correctness part ran"] * (not checked)
    return f"NOT PASSED: {', '.join(told)}."


def markdown(report: dict[str, Any]) -> str:
    """The summary for people; benchmarks' own tables below it."""
    import machine

    lines = [f"# gpumlp on {report['device']}", "", machine.in_words(report), "", f"**{verdict(report)}**", ""]
    lines += ["| part | what | outcome | seconds | |", "|---|---|---|---:|---|"]
    for part in report["parts"]:
        lines.append(
            f"| {part['name']} | {part['about']} | {part['status']} | {part['seconds']:.0f} | {part['detail']} |"
        )
    if not report["emulated"]:
        lines += [
            "",
            "| | goal | gpumlp, measured | PyTorch's best as a graph, measured | reached |",
            "|---|---|---|---|---|",
        ]
        words = {True: "yes", False: "no", None: "–"}
        for goal in report["goals"]:
            lines.append(
                "| "
                + " | ".join([*(goal[k] for k in ("what", "goal", "measured", "rival")), words[goal["reached"]]])
                + " |"
            )
    for part in report["parts"]:
        bad = [check for check in part.get("checks", ()) if check["status"] != "ok"]
        if bad or part.get("stderr"):
            lines += ["", f"## {part['name']}: {part['status']}", ""]
        for check in bad:
            lines.append(f"- {check['name']}: {check['status']}\n\n{fenced(check['detail'])}")
        if part.get("stderr"):
            lines += [fenced(part["stderr"])]
    for part in report["parts"]:
        if part.get("table"):
            lines += ["", f"## {part['name']}", "", part["table"]]
    return "\n".join(lines)


def fenced(text: Any) -> str:
    return "```\n" + str(text).strip()[-3000:] + "\n```"


def result_path(folder: Path, report: dict[str, Any]) -> Path:
    model = "emulator" if report["emulated"] else report["machine"]["gpu"]["description"].split(",")[0]
    name = re.sub(r"[^a-z0-9]+", "-", model.lower().removeprefix("nvidia ")).strip("-")
    return folder / f"gpu-{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check gpumlp on this machine's GPU, and measure it.")
    known = [part.name for part in PARTS]

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    option("--quick", action="store_true", help="three minutes: fewer checks, fewer benchmarks")
    option("--emulate", action="store_true", help="the correctness parts on the emulated device of the tests")
    option("--parts", default=",".join(known), metavar="A,B", help=f"of {', '.join(known)}")
    option("--seconds", type=float, help=f"for everything ({SECONDS}, with --quick {QUICK_SECONDS})")
    option(
        "--results", type=Path, default=BENCH / "results", metavar="FOLDER", help="where the files go (bench/results)"
    )
    option("--part", help=argparse.SUPPRESS)  # the process of one part: its name, and the file for what it finds
    option("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = [name for name in args.parts.split(",") if name]
    if unknown := [name for name in args.parts if name not in known]:
        parser.error(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
    args.seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    return args


def chosen(args: argparse.Namespace) -> list[Part]:
    """The parts that were asked for and can run."""
    parts = [part for part in PARTS if part.name in args.parts]
    if args.emulate:
        return [part for part in parts if not (part.is_benchmark or part.needs_gpu)]
    return [part for part in parts if part.quick_seconds] if args.quick else parts


def look(args: argparse.Namespace) -> dict[str, Any]:
    """The first lines of the report, from a process of its own; exits with the reason where there is no device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, str(BENCH / "gpu_check.py"), "--part", "find", "--out", str(path)]
        status, _, err = in_a_process(command + ["--emulate"] * args.emulate, 120)
        found = (
            json.loads(path.read_text())
            if path.is_file()
            else {"missing": f"the search ended with status {status}:\n{err}"}
        )
    if "missing" in found:
        hint = "" if args.emulate else "\n--emulate runs the correctness parts on an emulated device."
        raise SystemExit(f"gpu_check needs a GPU that works: {found['missing']}{hint}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.part == "find":
        return find(args.out, args.emulate)
    if args.part:
        return run_checks(args.part, args.out, args.emulate, args.quick)
    parts = chosen(args)
    report = look(args) | {"emulated": args.emulate, "quick": args.quick, "wanted": len(parts), "parts": []}
    args.results.mkdir(parents=True, exist_ok=True)
    path = result_path(args.results, report)

    def keep() -> None:
        report["goals"], report["passed"] = goals(report), passed(report)
        write_json(path, report)
        path.with_suffix(".md").write_text(markdown(report) + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the part at work is stopped too
    run(parts, report, args, keep)
    print(markdown(report))
    print(f"\nwritten to {path} and {path.with_suffix('.md').name}", file=sys.stderr)
    if not passed(report):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
