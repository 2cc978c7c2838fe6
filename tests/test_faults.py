"""What kills, signals and disks do to a training: a committed checkpoint is there afterwards, and the fit that goes on from
it ends with the bits of one that nothing happened to.

Where a process has to die, a script of this file runs in one of its own: ``python test_faults.py ACTION FOLDER ...``.
"""

import errno
import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpumlp as gm
from gpumlp import checkpoints, container

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

ROOT = Path(gm.__file__).parents[1]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OPENBLAS_NUM_THREADS": "1",  # two fits of one test are to round alike
}


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """As far as a state's environment goes, what children save and this process resumes is of one."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", ENV["OPENBLAS_NUM_THREADS"])


# --- what the processes do -------------------------------------------------------------------------------------------


def trainer_and_data(hidden=16):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 8)).astype(np.float32)
    y = (X @ rng.normal(size=(8, 3))).argmax(axis=1)
    layers = [gm.Dense(hidden, "relu", norm="batch", dropout=0.1), gm.Dense(3)]
    net = gm.Network(layers, n_features=8, seed=1)
    return gm.Trainer(net, "softmax_cross_entropy", "adam", schedule="cosine"), X, y


def fit(folder, epochs, steps=1, hidden=16, **options):
    """A fit of 7 steps an epoch with a checkpoint at every step, begun or taken up; options are the Checkpoint's."""
    trainer, X, y = trainer_and_data(hidden)
    stop = gm.EarlyStopping(1000, monitor="loss")  # keeps weights of its own
    callbacks = [stop, *options.pop("before", []), gm.Checkpoint(folder, every_steps=steps, **options)]
    trainer.fit(X, y, epochs=epochs, batch_size=32, callbacks=callbacks, resume=folder)
    return trainer


def digest(trainer):
    return hashlib.sha256(trainer.network.flat.tobytes()).hexdigest()[:16]


def in_place(path, data):
    """The writer that the kills must catch."""
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(data), 1024):
            file.write(data[at : at + 1024])


class Say(gm.Callback):
    """GO, with the steps that were there already, when the first step is made: the kill's clock starts."""

    def on_fit_begin(self, trainer):
        self.first = trainer.epochs_done * trainer.steps_per_epoch + trainer.position

    def on_step_end(self, trainer, loss):
        if self.first is not None:
            print("GO", self.first, flush=True)
            self.first = None


class At(gm.Callback):
    """Calls ``action`` after step ``step`` of the fit."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer, loss):
        if trainer.epochs_done * trainer.steps_per_epoch + trainer.position == self.step:
            self.action()


def train(folder, epochs, writer):
    """R1: print GO, train, print FINAL; LOST where no checkpoint can be read."""
    if writer == "in place":
        checkpoints.write_atomically = in_place
    try:
        trainer = fit(folder, int(epochs), hidden=256, before=[Say()])
    except gm.FileError as error:
        print("LOST", error, flush=True)
        sys.exit(7)
    print("FINAL", digest(trainer), flush=True)


POINTS = {  # of container.write_atomically, in order; the call of os and which one of it
    "open": ("open", 0),
    "write": ("write", 0),
    "half written": ("write", 0),
    "fsync": ("fsync", 0),
    "replace": ("replace", 0),
    "open the folder": ("open", 1),
    "fsync the folder": ("fsync", 1),
}


def with_fault(point, fault, after=False):
    """Have ``fault()`` happen instead of a call that write_atomically makes, or right after it."""
    call, which = POINTS[point]
    real, made = getattr(os, call), []

    @functools.wraps(real)
    def faulty(*args, **options):
        made.append(call)
        if len(made) - 1 != which:
            return real(*args, **options)
        if point == "half written":
            real(args[0], args[1][: len(args[1]) // 2])
            return fault()
        if after:
            real(*args, **options)
        return fault()

    return call, faulty


def die(folder, point, after, states):
    """R2: make ``states`` steps with a checkpoint each, then be killed within the writing of the next one."""
    write = checkpoints.write_atomically

    def dying(path, data):
        if int(path.name[5:15]) == int(states) + 1:
            call, faulty = with_fault(point, lambda: os.kill(os.getpid(), signal.SIGKILL), after == "after")
            setattr(os, call, faulty)
        write(path, data)

    checkpoints.write_atomically = dying
    fit(folder, 2)


ENDLESS = 10_000  # epochs


def endless(folder):
    """R16: train until a signal comes."""
    fit(folder, ENDLESS, before=[Say(), At(0, None)])
    print("RETURNED", flush=True)


def up_to(step, folder):
    """The same fit, begun or taken up, and ended by Ctrl-C after a step."""
    at = At(step, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.warns(UserWarning, match="fit was interrupted"):
        return fit(folder, ENDLESS, before=[Say(), at])


def start(*arguments):
    command = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def temporaries(folder):
    return [path.name for path in Path(folder).iterdir() if path.name.endswith(".part")]


# --- R1: kill -9 at random moments -------------------------------------------------------------------------------------

KILL_EPOCHS = 60  # 420 steps: about a second with their checkpoints


@functools.cache
def uninterrupted(tmp):
    with start("train", tmp / "whole", KILL_EPOCHS, "atomic") as run:
        out, errors = run.communicate(timeout=120)
    assert "FINAL" in out, errors
    return out.split()[-1]


def damaged(folder):
    """How many of the checkpoints in a folder are not whole."""
    count = 0
    for path in checkpoints.checkpoints(folder) if folder.exists() else []:
        try:
            container.unpack(path.read_bytes(), path, "state", None)
        except gm.FileError:
            count += 1
    return count


def kill_again_and_again(folder, kills, writer, seed):
    """Kill fits until ``kills`` were, each taken up by the next: (checkpoints lost, final digests, temporary files)."""
    rng, lost, finals, litter, killed, fits = random.Random(seed), 0, set(), 0, 0, 0
    run_folder, committed = folder / f"{writer} 0", 0
    while True:
        with start("train", run_folder, KILL_EPOCHS, writer) as run:
            line = run.stdout.readline()
            if line.startswith("GO"):
                if killed < kills:
                    lost += int(line.split()[1]) < committed
                    time.sleep(rng.uniform(0.0, 0.12))
                    run.kill()
                line, errors = run.communicate(timeout=120)
            else:
                errors = run.stderr.read()
        if run.returncode == -signal.SIGKILL:
            killed += 1
            lost += damaged(run_folder)
            found = checkpoints.checkpoints(run_folder)
            committed = int(found[0].name[5:15]) if found else 0
            continue
        assert "FINAL" in line or "LOST" in line, errors
        if "FINAL" in line:
            finals.add(line.split()[-1])
            litter += len(temporaries(run_folder))
        if killed >= kills:
            return lost, finals, litter
        fits += 1
        run_folder, committed = folder / f"{writer} {fits}", 0


@posix
@pytest.mark.parametrize("kills", [25, pytest.param(300, marks=pytest.mark.long)])
def test_kill_9_at_random_moments(kills, tmp_path):
    lost, finals, litter = kill_again_and_again(tmp_path, kills, "atomic", seed=kills)
    assert (lost, finals, litter) == (0, {uninterrupted(tmp_path)}, 0)


@posix
@pytest.mark.long
def test_the_kills_catch_a_writer_in_place(tmp_path):
    lost, _, _ = kill_again_and_again(tmp_path, 60, "in place", seed=0)
    assert lost >= 1


# --- R2: at every boundary of the writer -------------------------------------------------------------------------------


def whole_fit(tmp_path):
    return digest(fit(tmp_path / "whole", 2))


class Fault(BaseException):
    """As little expected as KeyboardInterrupt."""


def raise_fault():
    raise Fault


@pytest.mark.parametrize("states", [0, 1, 2])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_exception_at_every_boundary_of_the_writer(after, states, tmp_path, monkeypatch):
    """Neither a temporary file nor an open one stays; what was there stays; the fit that goes on ends the same."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files in /proc")
    whole = whole_fit(tmp_path)
    for point in POINTS:
        if after and point in ("open", "open the folder"):
            continue  # the number of the file is lost with the exception: nobody can close it
        folder = tmp_path / point
        open_files = len(os.listdir("/proc/self/fd"))
        write = container.write_atomically

        def faulty_write(path, data, write=write, point=point):
            if int(path.name[5:15]) != states + 1:
                return write(path, data)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, *with_fault(point, raise_fault, after))
                return write(path, data)

        monkeypatch.setattr(checkpoints, "write_atomically", faulty_write)
        with pytest.raises(Fault):
            fit(folder, 2)
        assert temporaries(folder) == [] and len(os.listdir("/proc/self/fd")) == open_files
        found = [int(path.name[5:15]) for path in checkpoints.checkpoints(folder)]
        in_place = point in ("open the folder", "fsync the folder") or (point == "replace" and after)
        # An earlier one goes only when the new one is safe on the disk.
        assert found == ([states + 1] if in_place else []) + [n for n in (2, 1) if n <= states]
        monkeypatch.setattr(checkpoints, "write_atomically", write)
        assert digest(fit(folder, 2)) == whole


@posix
@pytest.mark.parametrize("point", POINTS)
def test_kill_9_at_every_boundary_of_the_writer(point, tmp_path):
    """Three at a time: with no checkpoint before, one, and two."""
    whole = whole_fit(tmp_path)
    after = "before" if point == "half written" else "after"
    runs = [start("die", tmp_path / str(states), point, after, states) for states in (0, 1, 2)]
    for states, run in enumerate(runs):
        with run:
            _, errors = run.communicate(timeout=120)
        assert run.returncode == -signal.SIGKILL, errors
        folder = tmp_path / str(states)
        newest = states + 1 if point in ("replace", "open the folder", "fsync the folder") else states
        found = [int(path.name[5:15]) for path in checkpoints.checkpoints(folder)]
        assert found[:1] == ([newest] if newest else [])
        assert len(temporaries(folder)) == (point in ("open", "write", "half written", "fsync"))
        assert digest(fit(folder, 2)) == whole
        assert temporaries(folder) == []


# --- R3: a disk that is full, or broken ----------------------------------------------------------------------------------


ERRNOS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS]
CALLS = ["open", "write", "fsync", "replace", "fsync the folder"]


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("point", CALLS)
def test_write_errors(point, number, tmp_path, monkeypatch):
    def fail():
        raise OSError(number, os.strerror(number), "a temporary name")

    whole, write = whole_fit(tmp_path), container.write_atomically

    def faulty_write(path, data):
        if int(path.name[5:15]) != 4:
            return write(path, data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, *with_fault(point, fail))
            return write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", faulty_write)
    with pytest.raises(OSError, match=r"step-0000000004\.safetensors'$") as caught:
        fit(tmp_path / "run", 2)
    assert caught.value.errno == number and caught.value.filename2 is None
    assert temporaries(tmp_path / "run") == []
    newest = 4 if point == "fsync the folder" else 3  # it is there, and whole, if the machine does not stop now
    assert checkpoints.checkpoints(tmp_path / "run")[0].name == f"step-{newest:010d}.safetensors"
    with pytest.warns(UserWarning, match=r"no checkpoint at step 4, training goes on: .*step-0000000004.safetensors'$"):
        assert digest(fit(tmp_path / "warned", 2, on_error="warn")) == whole
    monkeypatch.setattr(checkpoints, "write_atomically", write)  # the disk is well again
    assert digest(fit(tmp_path / "run", 2)) == whole


def first_epoch(folder):
    with pytest.raises(Fault):
        fit(folder, 2, before=[At(8, raise_fault)])


@posix
def test_a_disk_that_fills_up(tmp_path):
    """By the limit on a file's size: a part of it is written, then nothing more."""
    import resource

    whole = whole_fit(tmp_path)
    first_epoch(tmp_path / "run")
    size = checkpoints.checkpoints(tmp_path / "run")[0].stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(OSError, match=r"File too large: '.*step-0000000008.safetensors'"):
            fit(tmp_path / "run", 2, before=[At(0, None)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert temporaries(tmp_path / "run") == []
    assert digest(fit(tmp_path / "run", 2, before=[At(0, None)])) == whole


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk, as root")
def test_a_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount here")
    try:
        first_epoch(disk / "run")
        room = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_bsize))
        with pytest.raises(OSError, match=r"No space left on device: '.*step-0000000008"):
            fit(disk / "run", 2, before=[At(0, None)])
        assert temporaries(disk / "run") == []
        (disk / "filler").unlink()
        assert digest(fit(disk / "run", 2, before=[At(0, None)])) == whole_fit(tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_write_that_takes_a_part(tmp_path, monkeypatch):
    """os.write need not write all that it is given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:1000]))
    whole = np.random.default_rng(0).bytes(12_345)
    container.write_atomically(tmp_path / "file", whole)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == whole and os.listdir(tmp_path) == ["file"]


# --- R16: Ctrl-C and SIGTERM ---------------------------------------------------------------------------------------------


def interrupted_fits(tmp_path, trials):
    """Each at another step, in this process: fit returns, with a checkpoint from which it goes on to the same bits."""
    whole, rng = whole_fit(tmp_path), random.Random(0)
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    signal.signal(signal.SIGTERM, lambda *args: seen.append("SIGTERM"))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        for trial in range(trials):
            signum, step = (signal.SIGINT, signal.SIGTERM)[trial % 2], rng.randint(1, 13)
            folder = tmp_path / str(trial)
            at = [At(step, lambda signum=signum: signal.raise_signal(signum))]
            with pytest.warns(UserWarning, match="fit was interrupted"):
                trainer = fit(folder, 2, steps=1000, before=at)
            assert trainer.stopped == "interrupted" and trainer.network.steps[0] == step
            assert [path.name for path in checkpoints.checkpoints(folder)] == [f"step-{step:010d}.safetensors"]
            assert len(seen) == (trial + 1) // 2  # a SIGTERM is passed on
            assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
            assert digest(fit(folder, 2, steps=1000, before=[At(0, None)])) == whole
    finally:
        signal.signal(signal.SIGTERM, before)


@posix
@pytest.mark.parametrize("trials", [6, pytest.param(50, marks=pytest.mark.long)])
def test_signals_in_fits(trials, tmp_path):
    interrupted_fits(tmp_path, trials)


@posix
@pytest.mark.parametrize("trials", [1, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_from_outside(signum, trials, tmp_path):
    """Ctrl-C lets fit return; SIGTERM ends the process, both with a checkpoint that goes on to the same bits."""
    rng = random.Random(int(signum))
    for trial in range(trials):
        folder = tmp_path / str(trial)
        with start("endless", folder) as run:
            assert run.stdout.readline() == "GO 0\n"
            time.sleep(rng.uniform(0, 0.2))
            run.send_signal(signum)
            began = time.monotonic()
            out, errors = run.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert (out, run.returncode) == (("RETURNED\n", 0) if signum == signal.SIGINT else ("", -signal.SIGTERM)), (
            errors
        )
        assert temporaries(folder) == []
        made = int(checkpoints.checkpoints(folder)[0].name[5:15])
        assert digest(up_to(made + 1, folder)) == digest(up_to(made + 1, tmp_path / f"whole {trial}"))


@posix
def test_a_second_ctrl_c_raises_and_the_last_checkpoint_stays(tmp_path):
    whole = whole_fit(tmp_path)

    def twice():
        signal.raise_signal(signal.SIGTERM)  # the first of the two may be either
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, lambda *args: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", 2, before=[At(5, twice)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoints.checkpoints(tmp_path / "run")[0].name == "step-0000000004.safetensors"
    assert digest(fit(tmp_path / "run", 2, before=[At(0, None)])) == whole


@posix
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As SIGINT is in a job that a shell runs in the background."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer = fit(tmp_path / "run", 2, before=[At(5, lambda: signal.raise_signal(signal.SIGTERM))])
        assert trainer.stopped == "epochs" and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    {"train": train, "die": die, "endless": endless}[sys.argv[1]](*sys.argv[2:])
