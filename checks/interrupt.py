"""Ends runs at random moments and goes on with them: the bytes must be those of an undisturbed run.

    python checks/interrupt.py --times 50 --seed 0      # a quarter of an hour on one core

A run that saves after every step is ended again and again, until it is done, by SIGKILL, SIGTERM,
Ctrl-C, or a file that may not grow, as on a full disk. Of two processes on one folder one runs.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checks import fuzz  # before torch: it sees to it that no thread starts
import lander

WORDS = "--pair en-de,de-en --steps 12 --eval-pairs en-de,de-en --valid-every 3".split()
# The statuses in which a run may end, 99 of a traceback: C code may turn Ctrl-C into an error.
ENDS = {"SIGKILL": [-9], "SIGTERM": [-15], "SIGINT": [130, 2, 99], "full disk": [2]}


def start(world, out, *words, largest_file=resource.RLIM_INFINITY):
    """Run the command in a process of its own. -> its number, and where to read what it says"""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can answer it
    receiver, sender = os.pipe()
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.close(sender)
        return child, receiver
    status = 99
    try:
        os.chdir(world)
        for stream in (1, 2):
            os.dup2(sender, stream)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        lander.SAVE_EVERY = 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status = lander.main([*words, "--out", out])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child, receiver):
    """-> its status, and what it said"""
    with open(receiver) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def trial(kind, world, out, words, whole, seconds, rng):
    """One run, ended again and again, each time later. -> how often it was ended"""
    largest, ended = max(map(len, whole.values())), 0
    while True:
        if (world / out / "args.json").exists():
            words = ["--resume"]  # the folder says the rest
        if kind == "full disk":
            limit = int(largest ** rng.random()) if ended < 2 else resource.RLIM_INFINITY
            status, said = wait(*start(world, out, *words, largest_file=limit))
        else:
            child, receiver = start(world, out, *words)
            time.sleep(rng.uniform(0, seconds * 1.5**ended))
            os.kill(child, getattr(signal, kind))
            status, said = wait(child, receiver)
        if status == 0:
            break
        assert status in ENDS[kind] and ended < 99, said
        ended += 1
    found = contents(world / out)
    if kind in ("SIGKILL", "SIGTERM"):  # safetensors was writing, as docs/running.md says
        found = {name: own for name, own in found.items() if not name.match(".tmp??????")}
    assert found == whole, [name for name in whole | found if whole.get(name) != found.get(name)]
    return ended


def two_processes(world, words):
    """Both at once, and one after the other. -> what the second was told"""
    for delay in (0, 0.05, 0.2, 0.5):
        first = start(world, f"two-{delay}", *words)
        time.sleep(delay)
        ends = sorted([wait(*start(world, f"two-{delay}", *words)), wait(*first)])
        assert [status for status, _ in ends] == [0, 2], ends
    return ends[1][1].splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=50, help="trials of each kind (50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary, "world")
        fuzz.build(world)
        words = [*fuzz.run_words("bloom", "whole"), *WORDS]
        began = time.monotonic()
        assert wait(*start(world, "whole", *words))[0] == 0
        seconds, whole = time.monotonic() - began, contents(world / "whole")
        print(f"an undisturbed run: {seconds:.1f} s, {len(whole)} files", flush=True)
        rng = random.Random(args.seed)
        for kind in ENDS:
            ended = 0
            for number in range(args.times):
                ended += trial(kind, world, f"{kind} {number}", words, whole, seconds, rng)
            print(f"{kind}: {args.times} runs, ended {ended} times, all the same bytes", flush=True)
        print(f"two processes: {two_processes(world, words)}")


if __name__ == "__main__":
    main()
