"""Holds gm.MLPClassifier and gm.MLPRegressor against scikit-learn's own on real tables: scores, and the time of `fit`.

    python bench/estimators.py --json bench/results/estimators-HOST-DATE.json
    python bench/estimators.py --sets adult,diamonds --epochs 5
    python bench/estimators.py --raw  # DataFrames with categories and missing cells, scikit-learn behind its preprocessing

The table on stdout is Markdown; progress goes to stderr. See bench/README.md for what is compared and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import numpy as np
import tables
from estimator_peers import CHECK_EPOCHS, CHECK_EPSILON, CHECK_ROWS, LIBRARIES, SETTINGS
from timing import short
from train_step import PeerError, child_environment, describe_blas, n_cores, names, positive, run_script, write_json

DTYPES = ("default", "float64", "float32")  # default: float64 data, and what each library makes of it
TRAINED_IN = {"default": "by default: float64, float32", "float64": "float64", "float32": "float32"}
# Of predictions after the checked steps. Of one type 2e-6 was seen, and 1e-4 where alpha is 100 times too large; between
# two types 6e-5, and 2e-2 where the learning rate is a tenth too large.
TOLERANCES = {"default": 5e-4, "float64": 2e-5, "float32": 2e-5}
# Standard errors by which a score may be behind. Of equals, medians of five rounds are that far behind once in 300
# comparisons, of three once in 100; two standard errors would fail every second run.
NOISE = 4
LEAST_ROUNDS = 3


def run_pair(args: argparse.Namespace, name: str, source: Path, i: int) -> dict[str, Any]:
    """Round i of both libraries on a set: {library: {dtype: found}}. Raises PeerError for a crash or a check that fails."""
    rest = ",".join(DTYPES), str(args.epochs or tables.SOURCES[name].epochs), str(i)
    environment, found = child_environment(args.threads), {}
    for library in turn(LIBRARIES, i):
        found[library] = run_script("estimator_peers.py", library, source, (name, *rest), environment)
    for dtype in DTYPES:
        theirs, ours = (np.array(found[library][dtype].pop("check")) for library in LIBRARIES)
        if args.raw:
            continue  # each prepares the table in its own way
        error = float(np.abs(ours - theirs).max())
        if not error <= TOLERANCES[dtype]:  # so written, a NaN fails too
            raise PeerError(
                f"gpumlp trains something else than scikit-learn on {name} in {dtype}: after {CHECK_EPOCHS} epochs of "
                f"{len(ours)} rows their predictions differ by {error:.1e}, allowed {TOLERANCES[dtype]:.0e}"
            )
        for library in LIBRARIES:
            found[library][dtype]["check_error"] = error
    return found


def turn(them: Any, i: int) -> list:
    """Every second round goes backwards: a machine that slows down steadily then favours nobody."""
    return list(them)[:: -1 if i % 2 else 1]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all rounds on all sets; one result for each set and dtype."""
    rounds: dict[str, list] = {name: [] for name in args.sets}
    failures: dict[str, str] = {}
    about, deadline = {}, time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: args.data if args.raw else Path(folder) / f"{name}.npz" for name in args.sets}
        for name in args.sets:
            rows = tables.read(name, args.data)
            if not args.raw:
                rows = tables.prepare(rows)
                rows.save(sources[name])
            about[name] = {"rows": len(rows.X), "test_rows": len(rows.X_test), "columns": rows.X.shape[1]}
        for i in range(args.repeats):
            for name in turn(args.sets, i):
                if name in failures or time.monotonic() > deadline:
                    continue
                try:
                    found = run_pair(args, name, sources[name], i)
                except PeerError as error:
                    failures[name] = told = str(error)
                else:
                    rounds[name].append(found)
                    told = ", ".join(
                        f"{library} {found[library][DTYPES[-1]]['seconds']:.2f} s" for library in LIBRARIES
                    )
                print(f"round {i + 1}/{args.repeats} {name}: {told}", file=sys.stderr, flush=True)
    return [
        {
            **{"set": name, "task": tables.SOURCES[name].task, "dtype": dtype},
            **about[name],
            "epochs": args.epochs or tables.SOURCES[name].epochs,
            **summarise(rounds[name], dtype, failures.get(name, "")),
        }
        for name in args.sets
        for dtype in DTYPES
    ]


def summarise(rounds: list[dict[str, Any]], dtype: str, failure: str) -> dict[str, Any]:
    """Medians over the rounds, and whether gpumlp's score holds; no figures where a fit failed or rounds are missing."""
    if failure:
        return {"status": "failed", "note": failure}
    if len(rounds) < LEAST_ROUNDS:
        return {"status": "no time", "note": f"{len(rounds)} of the {LEAST_ROUNDS} rounds that noise is told by"}
    peers: dict[str, Any] = {}
    for library in LIBRARIES:
        fits = [found[library][dtype] for found in rounds]
        columns = {name: [fit[name] for fit in fits] for name in fits[0]}
        peers[library] = {
            name: {"median": statistics.median(values), "rounds": values} for name, values in columns.items()
        }
    theirs, ours = peers.values()
    spread = sum(statistics.variance(peer["score"]["rounds"]) for peer in (theirs, ours))
    noise = NOISE * math.sqrt(spread / len(rounds))
    lead = ours["score"]["median"] - theirs["score"]["median"]
    return {
        "status": "ok" if lead >= -noise else "behind",
        "note": "" if lead >= -noise else f"gpumlp's score is {-lead:.4f} lower, noise explains {noise:.4f}",
        "noise": noise,
        "ratio": theirs["seconds"]["median"] / ours["seconds"]["median"],
        "peers": peers,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table for people: one row for each set and dtype, then notes."""
    protocol, results = report["protocol"], report["results"]
    lines = [
        machine.in_words(report),
        f"{'Raw tables' if protocol['raw'] else 'Prepared matrices'}; medians over {protocol['rounds']} rounds. Score: "
        "accuracy, R², or of several labels a row the share of rows with all right, in brackets the share of right labels; "
        f"± is {NOISE} standard errors of the difference. × is the ratio of the times, above 1 where gpumlp is faster.",
        "",
        "| | trained in | epochs | scikit-learn's score | gpumlp's | ± | scikit-learn, s | gpumlp, s | × |",
        "|---|---|---:|" + "---:|" * 6,
    ]
    notes = [f"- {name}: skipped, {', '.join(files)} not there" for name, files in report["skipped"].items()]
    for r in results:
        title = (
            f"| {r['set']} {r['rows']:,} × {r['columns']}, {r['task']} | {TRAINED_IN[r['dtype']]} | {r['epochs']} | "
        )
        cells = [r["status"], *["–"] * 5]
        if "peers" in r:
            theirs, ours = r["peers"].values()
            cells = [
                score(theirs),
                score(ours),
                f"{r['noise']:.4f}",
                seconds(theirs),
                seconds(ours),
                f"{r['ratio']:.2f}",
            ]
        lines.append(title + " | ".join(cells) + " |")
        if r["note"]:
            title = f"{r['set']} {r['dtype']}" if "peers" in r else r["set"]
            notes.append(f"- {title}: {r['note'].strip().splitlines()[-1]}")
    return "\n".join(lines + [""] * bool(notes) + list(dict.fromkeys(notes)))


def score(peer: dict[str, Any]) -> str:
    text = f"{peer['score']['median']:.4f}"
    return text + (f" ({peer['label_score']['median']:.4f})" if "label_score" in peer else "")


def seconds(peer: dict[str, Any]) -> str:
    """`median (min–max)`."""
    found = peer["seconds"]
    return f"{short(found['median'])} ({short(min(found['rounds']))}–{short(max(found['rounds']))})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold the estimators against scikit-learn's on real tables.")

    def rounds(text: str) -> int:
        if not text.isdigit() or int(text) < LEAST_ROUNDS:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give {LEAST_ROUNDS} or more, fewer tell no noise")
        return int(text)

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    known = ", ".join(tables.SOURCES)
    option(
        "--sets", type=names(tables.SOURCES), metavar="A,B", help=f"of {known} (all; with --raw those with categories)"
    )
    option("--data", type=Path, default=tables.FOLDER, metavar="FOLDER", help="that holds the sets (GPUMLP_DATA)")
    option("--raw", action="store_true", help="fit DataFrames as they are, scikit-learn behind its preprocessing")
    option("--repeats", type=rounds, default=5, metavar="ROUNDS", help="rounds; the number of each is its seed (5)")
    option("--epochs", type=positive(int), help="of every fit (20, of covertype 5)")
    option("--threads", type=positive(int), default=n_cores(), help="threads for everyone (all cores)")
    option("--seconds", type=positive(float), default=math.inf, help="begin no further set after so many (no limit)")
    option("--json", type=Path, metavar="PATH", help="also write machine, versions and every round there")
    args = parser.parse_args(argv)
    args.sets = args.sets or (tables.RAW if args.raw else list(tables.SOURCES))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    needed = {"sklearn": "scikit-learn", "pandas": "pandas"}
    if lacking := [package for module, package in needed.items() if importlib.util.find_spec(module) is None]:
        raise SystemExit(f"this benchmark needs {' and '.join(needed.values())}: pip install {' '.join(lacking)}")
    skipped = {name: files for name in args.sets if (files := tables.absent(name, args.data))}
    args.sets = [name for name in args.sets if name not in skipped]
    if not args.sets:
        raise SystemExit(f"{args.data} holds none of {', '.join(skipped)}: name the folder with --data or GPUMLP_DATA")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, so that a bad path fails before minutes of timing
    report = machine.frame("estimators", None, "everyone computes on the CPU")
    report["versions"] |= {package: version(package) for package in needed.values()}
    report["versions"]["blas"] = describe_blas(args.threads)
    report["protocol"] = {
        "raw": args.raw,
        "settings": SETTINGS | {"n_iter_no_change": "inf"},
        "test_share": tables.TEST_SHARE,
        "split_seed": tables.SPLIT_SEED,
        "rounds": args.repeats,
        "threads": args.threads,
        "check": {"rows": CHECK_ROWS, "epochs": CHECK_EPOCHS, "epsilon": CHECK_EPSILON, "tolerance": TOLERANCES},
        "noise": f"{NOISE} standard errors of the difference",
    }
    report["skipped"], report["results"] = skipped, measure(args)
    if args.json:
        write_json(args.json, report)
    print(markdown(report))
    if any(result["status"] in ("failed", "behind") for result in report["results"]):
        raise SystemExit("gpumlp's score is behind scikit-learn's, or a fit failed: see the notes")


if __name__ == "__main__":
    main()
