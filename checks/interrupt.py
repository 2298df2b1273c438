"""Ends runs at random moments and goes on with them: the bytes must be those of an undisturbed run.

    python checks/interrupt.py --times 50 --seed 0      # a quarter of an hour on one core

A run with two tuned pairs saves after every step. It is ended again and again until it is done: by
SIGKILL, by SIGTERM, by Ctrl-C, or by a file that may not grow beyond a random size, as on a full
disk. Then two processes start on one folder: one runs, the other ends at once.
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

WORDS = "--pair en-de,en-cs --steps 12 --eval-pairs en-de,de-en --keep 1 --units all".split()
ENDS = {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": 130, "full disk": 2}


def start(world, out, *words, largest_file=resource.RLIM_INFINITY):
    """Run the command in a process of its own. -> its number; what it says is in {out}.said"""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until main can answer it
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    os.chdir(world)
    said = os.open(f"{out}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    lander.SAVE_EVERY, status = 0, 99  # 99: a traceback
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status = lander.main([*words, "--out", out])
    except KeyboardInterrupt:  # before main or after it
        status = ENDS["SIGINT"]
    except Exception:
        traceback.print_exc()
    os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def trial(kind, world, out, words, whole, seconds, rng):
    """One run, ended again and again, each time later. -> how often it was ended"""
    largest, ended = max(map(len, whole.values())), 0
    while True:
        if (world / out / "args.json").exists():
            words = ["--resume"]  # the folder says the rest
        if kind == "full disk":
            limit = rng.randrange(largest) if ended < 2 else resource.RLIM_INFINITY
            status = wait(start(world, out, *words, largest_file=limit))
        else:
            child = start(world, out, *words)
            time.sleep(rng.uniform(0, seconds * 1.5**ended))
            os.kill(child, getattr(signal, kind))
            status = wait(child)
        if status == 0:
            break
        assert status == ENDS[kind], f"{kind}: {status}; {(world / f'{out}.said').read_text()}"
        ended += 1
    found = contents(world / out)
    differing = [name for name in whole | found if whole.get(name) != found.get(name)]
    assert not differing, f"{kind}: {differing} differ after {ended} ends"
    return ended


def two_processes(world, words):
    """Both at once, and one after the other. -> what the second was told"""
    for delay in (0, 0.05, 0.2, 0.5):
        out = f"two-{delay}"
        first = start(world, out, *words)
        time.sleep(delay)
        second = start(world, out, *words)
        assert {wait(first), wait(second)} == {0, 2}
        said = (world / f"{out}.said").read_text().splitlines()
        (error,) = [line for line in said if line.startswith("error: ")]
        assert error.endswith("in use by another process"), error
    return error


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
        assert wait(start(world, "whole", *words)) == 0
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
