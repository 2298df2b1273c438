"""Time and peak memory of one training step at a given shape, random weights: the method against training every weight.

    python study/step.py --shape 1024,12,16,50000                                            # D,L,H,V on the CPU
    python study/step.py --shape 4096,30,32,250880 --device cuda --dtype bfloat16 --peak 989    # BLOOM-7b1 on an H100

Each case runs in a process of its own: "selected" trains general and own neurons and routers of --layers layers, as
lander.py does; "checkpointed" does so recomputing activations; "all" trains every weight with AdamW. Memory is that of
the device: on the CPU the growth of the resident set since before the model was made.

The operations counted are those of the matrix products that are needed: 2 a weight and token forward, 2 more where a
gradient passes through, 2 more where a weight is trained, the head at target positions only; attention scores and
recomputation are left out, so that the share of --peak (TFLOP/s of the device) is a lower bound.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import make_batch
from study.shapes import random_decoder, shape_config

CASES = ("selected", "checkpointed", "all")
SENTENCE, TARGET = 64, 24  # tokens of an example, prompt and target; and those of the target


def memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def measure(case, args):
    """Print one row: seconds, tokens a second, memory, and the rate of the operations that are needed."""
    config = shape_config(args.shape)
    hidden, layers, vocabulary = config.hidden_size, config.layers, config.vocab_size
    before = memory(args.device)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = random_decoder(config, getattr(torch, args.dtype))
    weights = sum(p.nbytes for p in model.parameters())

    selected = [layers * (i + 1) // (args.layers + 1) for i in range(args.layers)]
    if case == "all":
        parameters = dict(model.named_parameters())
    else:
        pairs = [f"pair{i}" for i in range(args.pairs)]
        awareness = torch.rand(args.pairs, args.layers, config.ffn_size)
        owner = lander.categorize(awareness, lander.Settings().epsilon)
        groups = lander.describe_groups(awareness, owner, pairs, {pairs[0]: selected})
        lander.install_routing(model, groups)
        lander.route(model, pairs[0])
        model.checkpointing = case == "checkpointed"
        parameters = lander.what_learns(model, pairs[0])
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)
    some_ids = lambda count: torch.randint(4, vocabulary, (count,)).tolist()
    examples = [
        (some_ids(SENTENCE - TARGET), some_ids(TARGET + 1)) for _ in range(args.tokens // SENTENCE)
    ]
    batches = [make_batch(examples, 3)] * args.passes

    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        lander.train_step(model, batches, optimizer, parameters.values())  # its .item() waits
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])

    tokens = args.passes * len(examples) * SENTENCE
    per_layer = 12 * hidden**2
    trained = sum(p.numel() for name, p in parameters.items() if "blocks" in name and p.dim() == 2)
    through = layers * per_layer if case == "all" else (layers - selected[0]) * per_layer
    head = hidden * vocabulary * (3 if case == "all" else 2) * TARGET / SENTENCE
    operations = 2 * tokens * (layers * per_layer + through + trained + head)
    rate = operations / best / 1e12
    share = f"{rate / args.peak:8.1%}" if args.peak else ""
    peak = memory(args.device) - before
    print(f"{case:<14}{best:9.3f}{tokens / best:10.0f}{weights / 2**30:10.2f}{peak / 2**30:8.2f}"
          f"{sum(p.numel() for p in parameters.values()) / 1e6:11.1f}{rate:10.3f}{share}", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, help="D,L,H,V of a BLOOM")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4, help="selected layers, evenly spaced (4)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs that own neurons (10)")
    parser.add_argument("--tokens", type=int, default=2048, help="in a pass (2048)")
    parser.add_argument("--passes", type=int, default=2, help="in a step (2)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps timed, after one to warm up (3)"
    )
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device could do at most")
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    args = parser.parse_args()
    if args.case:
        return measure(args.case, args)
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{args.shape}, {args.dtype}, {name}, torch {torch.__version__}")
    print(f"{'trained':<14}{'step, s':>9}{'tokens/s':>10}{'weights':>10}{'peak':>8}{'million':>11}{'TFLOP/s':>10}"
          f"{'of peak':>8}".replace("of peak", "of peak" if args.peak else ""), flush=True)  # fmt: skip
    for case in CASES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", case], check=True)


if __name__ == "__main__":
    main()
