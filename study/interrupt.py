"""Ends runs at random moments and goes on with them: the bytes must be those of an undisturbed run.

    python study/interrupt.py --times 50 --seed 0       # about six minutes on two cores

Each trial is a run with two tuned pairs that saves after every step. It is ended at random moments
until it is done, by SIGKILL; by SIGTERM; or by a file that may not grow beyond a random size, as on
a full disk. Then two processes start on one folder, in every order: one runs, one ends at once.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fuzz
import lander


def start(words, folder, largest_file=None):
    """Run lander.main in a process of its own, in that folder. -> its number"""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as lander.py has it
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    lander.SAVE_EVERY = 0
    with open("err", "a") as err, open("out", "a") as out:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = 99  # a traceback
            try:
                status = lander.main(words)
            finally:
                err.flush()
                os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def trial(kind, words, folder, whole, seconds, largest, rng):
    """One run, ended again and again. -> how often it was ended"""
    folder.mkdir()
    ended = 0
    while True:
        resume = ["--resume"] if (folder / "run").exists() else []
        if kind == "full disk":
            limit = None if ended == 2 else rng.randrange(largest)
            status = wait(start([*words, *resume], folder, limit))
            expected = 2
        else:
            child = start([*words, *resume], folder)
            time.sleep(rng.uniform(0, seconds))
            number = signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM
            os.kill(child, number)
            status = wait(child)
            expected = -signal.SIGKILL if kind == "SIGKILL" else 130
        if status == 0:
            break
        assert status == expected, f"{kind}: status {status}; {(folder / 'err').read_text()}"
        ended += 1
        seconds *= 1.5
    found = contents(folder / "run")
    differing = {name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)}
    assert not differing, f"{kind}: {differing} differ after {ended} ends"
    assert "Traceback" not in (folder / "err").read_text()
    return ended


def two_processes(words, folder):
    """Both at once, and one a little after the other. -> what the second was told"""
    folder.mkdir()
    told = []
    for delay in (0, 0.05, 0.2, 0.5):
        out = f"run{delay}"
        children = [start([*words, "--out", out], folder)]
        time.sleep(delay)
        children.append(start([*words, "--out", out], folder))
        statuses = sorted(wait(child) for child in children)
        assert statuses == [0, 2], statuses
        told.append((folder / "err").read_text().splitlines()[-1])
        assert "in use by process" in told[-1], told
    return told[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=50, help="trials of each kind (50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fuzz.build(folder / "world")
        words = fuzz.run_words(folder / "world", "bloom", "run")
        words += ["--pair", "qaa-qab,qaa-qad", "--steps", "12", "--eval-pairs", "all"]
        (folder / "whole").mkdir()
        began = time.monotonic()
        assert wait(start(words, folder / "whole")) == 0
        seconds = time.monotonic() - began
        whole = contents(folder / "whole" / "run")
        largest = max(map(len, whole.values()))
        print(f"an undisturbed run: {seconds:.1f} s, {len(whole)} files")
        rng = random.Random(args.seed)
        for kind in ("SIGKILL", "SIGTERM", "full disk"):
            ends = []
            for number in range(args.times):
                place = folder / f"{kind} {number}"
                ends.append(trial(kind, words, place, whole, seconds, largest, rng))
            print(
                f"{kind}: {len(ends)} runs, ended {sum(ends)} times, all the same bytes", flush=True
            )
        print(f"two processes: {two_processes(words, folder / 'two')}")


if __name__ == "__main__":
    main()
