"""Ends runs at random moments and goes on with them: the bytes must be those of an undisturbed run.

    python study/interrupt.py --times 50 --seed 0       # minutes on two cores

Each trial is a run with two tuned pairs that saves after every step. It is ended at random moments
until it is done, by SIGKILL; by SIGTERM; or by a file that may not grow beyond a random size, as on
a full disk. Then two processes start on one folder: one runs, the other ends at once.
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
import lander
from study import fuzz

WORDS = "--pair qaa-qab,qaa-qad --steps 12 --eval-pairs qaa-qab,qad-qac,qaa-qad".split()
# Of each kind, the status in which an ended run ends.
ENDS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 130, "full disk": 2}


def start(world, out, *words, largest_file=resource.RLIM_INFINITY):
    """Run lander.main in a process of its own, in that world. -> its number"""
    (world / f"{out}.err").touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the run begins
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return child
    os.chdir(world)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as lander.py has it
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    lander.SAVE_EVERY = 0
    status = 99  # a traceback
    with open(f"{out}.err", "a") as err, open(f"{out}.out", "a") as printed:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(err):
            if signal.SIGTERM in signal.sigpending():
                os._exit(ENDS["SIGTERM"])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            try:
                status = lander.main([*fuzz.run_words("bloom", out), *WORDS, *words])
            finally:
                err.flush()
                os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def trial(kind, world, out, whole, seconds, rng):
    """One run, ended again and again, each time later. -> how often it was ended"""
    largest = max(map(len, whole.values()))
    ended, resume = 0, []
    while True:
        if kind == "full disk":
            limit = rng.randrange(largest) if ended < 2 else resource.RLIM_INFINITY
            status = wait(start(world, out, *resume, largest_file=limit))
        else:
            child = start(world, out, *resume)
            time.sleep(rng.uniform(0, seconds * 1.5**ended))
            os.kill(child, getattr(signal, kind))
            status = wait(child)
        if status == 0:
            break
        said = (world / f"{out}.err").read_text()
        assert status == ENDS[kind], f"{kind}: status {status}; {said}"
        ended += 1
        resume = ["--resume"] if (world / out).exists() else []
    found = contents(world / out)
    differing = [name for name in whole | found if whole.get(name) != found.get(name)]
    assert not differing, f"{kind}: {differing} differ after {ended} ends"
    return ended


def two_processes(world):
    """Both at once, and one a little after the other. -> what the second was told"""
    for delay in (0, 0.05, 0.2, 0.5):
        out = f"two{delay}"
        first = start(world, out)
        time.sleep(delay)
        second = start(world, out)
        assert {wait(first), wait(second)} == {0, 2}
        told = (world / f"{out}.err").read_text().splitlines()[-1]
        assert "in use by process" in told, told
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=50, help="trials of each kind (50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary, "world")
        fuzz.build(world)
        began = time.monotonic()
        assert wait(start(world, "whole")) == 0
        seconds = time.monotonic() - began
        whole = contents(world / "whole")
        print(f"an undisturbed run: {seconds:.1f} s, {len(whole)} files")
        rng = random.Random(args.seed)
        for kind in ENDS:
            ended = 0
            for number in range(args.times):
                ended += trial(kind, world, f"{kind} {number}", whole, seconds, rng)
            print(f"{kind}: {args.times} runs, ended {ended} times, all the same bytes", flush=True)
        print(f"two processes: {two_processes(world)}")


if __name__ == "__main__":
    main()
