"""The whole command on random weights of a large model's shape, in shards: how long, how much memory.

    python study/large.py --shape 4096,30,32,250880 --tokenizer bloom-7b1/tokenizer.json --folder DIR \\
        --pair en-de --data wmt16/ --layers 4 --dtype bfloat16        # and any option of lander.py

Writes DIR/weights, 14 GB at that shape, if they are not there yet. Memory is the peak of the resident
set, the mapped files with it. --lander runs another version's lander.py on the same weights.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import write_json
from model import published_names
from study.shapes import random_decoder, shape_config, write_shards

SHARDS = 2


def write_weights(shape, tokenizer, folder):
    """A published checkpoint of random weights, in shards. They do not stay in memory."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = random_decoder(shape_config(shape), torch.bfloat16)
    tensors = {}
    for parameter, value in model.named_parameters():
        (name,) = published_names("bloom", parameter)
        tensors[name] = value
    write_shards(tensors, folder, SHARDS)
    write_json(folder / "config.json", model.config.published)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, help="D,L,H,V of a BLOOM")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--folder", type=Path, required=True, help="for weights and runs")
    parser.add_argument("--lander", type=Path, default=Path(__file__).parent.parent / "lander.py")
    args, rest = parser.parse_known_args()
    weights = args.folder / "weights"
    if not weights.exists():
        write_weights(args.shape, args.tokenizer, weights)
    run = args.folder / f"run-{time.time():.0f}"
    command = [sys.executable, args.lander, "--weights", weights, "--out", run, *rest]
    start = time.monotonic()
    done = subprocess.run(command)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # KiB on Linux
    print(f"{args.shape}: exit status {done.returncode}, {seconds:.0f} s, {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
