"""Peak memory and operations at any shape, without the memory: the real code on tensors that have no values.

    python study/plan.py                                         # the table of README.md
    python study/plan.py --config bloom-7b1/ --layers 2 --micro-tokens 1024 --checkpointing
    python study/plan.py --shape 1024,8,16,50000 --dtype float32 --measure    # beside what happens, on the CPU

score      neuron_awareness of one pass of --micro-tokens
train      train_step of one such pass, with AdamW, as in a run with --pairs pairs
generate   a tuned model: a first pass over prompts, and the last step of a batch of translations, whose keys and values
           take --cache-gb

torch's FakeTensorMode stands in for memory, FlopCounterMode counts operations; what is ours is the sum of what is alive.
Selected layers are evenly spaced from the second one on, the worst case but one. On a GPU its context, about 0.5 GB, and
what its allocator cannot use come on top.
"""

import argparse
import os
import subprocess
import sys
import warnings
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import exit_status, make_batch, read_lines
from model import PROMPTS_AT_ONCE, Cache, Config, cast_once
from study.shapes import random_decoder, shape_config

SENTENCE, TARGET = 64, 24  # tokens of an example, prompt and target; and those of the target


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and answers what a tensor without values cannot."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.now, self.peak, self.seen = targets, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if function is torch.ops.aten.index.Tensor:
            args = args[0], self.numbers(args[1])
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.hold(tensor.untyped_storage())
        return result

    def numbers(self, indices):
        """True for target positions: as many numbers as there are."""
        found = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += [torch.zeros(self.targets, dtype=torch.long)] * index.dim()
            else:
                found.append(index)
        return found

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def release(reference):
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, release)


def selection(config, args):
    return [1 + (config.layers - 1) * i // args.layers for i in range(args.layers)]


def one_pass(args):
    example = [5] * (SENTENCE - TARGET), [5] * (TARGET + 1)
    return make_batch([example] * (args.micro_tokens // SENTENCE), 3)


# Each makes what it needs, and returns what is then measured.


def score(config, args, groups):
    model = random_decoder(config, getattr(torch, args.dtype))
    return lambda: lander.neuron_awareness(model, [one_pass(args)], selection(config, args))


def tuned(config, args, groups):
    model = random_decoder(config, getattr(torch, args.dtype))
    lander.install_routing(model, groups)
    lander.route(model, PAIR)
    return model


def train(config, args, groups):
    model = tuned(config, args, groups)
    model.checkpointing = args.checkpointing
    learners = lander.what_learns(model, PAIR).values()
    optimizer = torch.optim.AdamW(learners, fused=True)
    return lambda: lander.train_step(model, [one_pass(args)], optimizer, learners)


def generate(config, args, groups):
    model = tuned(config, args, groups)
    prompt = SENTENCE - TARGET
    tokens = 4 * prompt  # the limit is three times the prompt
    rows = max(1, int(args.cache_gb * 1e9 / (model.cache_bytes() * tokens)))
    first = min(rows, PROMPTS_AT_ONCE)

    @torch.no_grad()
    def run():
        with cast_once(model):
            cache = Cache.empty(model, rows, tokens)
            for store in cache.stores:
                store.zero_()  # memory that nobody wrote to is not resident
            ids = torch.full((rows, prompt), 5)
            part = cache.part(0, first, 0, 0)
            model.logits(model.hidden_states(ids[:first], cache=part)[:, -1])
            cache.length = tokens - 1
            model.logits(model.hidden_states(ids[:, :1], cache=cache)[:, -1]).max(-1)

    return run


CASES = {"score": score, "train": train, "generate": generate}
PAIR = "pair0"


def groups_of(config, args):
    """Neurons by chance, in groups of the usual sizes."""
    torch.manual_seed(0)
    awareness = torch.rand(args.pairs, args.layers, config.ffn_size)
    owner = lander.categorize(awareness, lander.Settings.epsilon)
    pairs = [f"pair{i}" for i in range(args.pairs)]
    return lander.describe_groups(awareness, owner, pairs, {PAIR: selection(config, args)})


def plan(case, config, args):
    """-> peak bytes and operations, those of the second time: AdamW has its moments by then."""
    groups = groups_of(config, args)  # has values
    memory = Memory(args.micro_tokens // SENTENCE * (TARGET + 1))
    with FakeTensorMode(), memory:
        run = CASES[case](config, args, groups)
        run()
        memory.peak = memory.now
        run()
        peak = memory.peak
        with FlopCounterMode(display=False) as counter:  # its hooks keep tensors alive
            run()
    return peak, counter.get_total_flops()


def resident(what):
    """This program's memory on Linux: VmRSS now, VmHWM its peak. ru_maxrss may be the parent's."""
    (line,) = [line for line in read_lines(Path("/proc/self/status")) if line.startswith(what)]
    return int(line.split()[1]) * 1024


def measure(case, config, args):
    """The same with values, on the CPU. -> growth of the resident set, operations"""
    small = replace(config, layers=2)
    cache_gb = args.cache_gb * small.layers / config.layers  # for as many rows
    few = Namespace(**vars(args) | {"layers": 1, "cache_gb": cache_gb})
    # Loads libraries; those of matrix products keep buffers, which are as large as the matrices.
    CASES[case](small, few, groups_of(small, few))()
    groups, before = groups_of(config, args), resident("VmRSS")
    run = CASES[case](config, args, groups)
    run()
    run()
    peak = resident("VmHWM") - before
    with FlopCounterMode(display=False) as counter:
        run()
    return peak, counter.get_total_flops()


# What their config.json say.
MODELS = {
    "bloom-7b1": dict(model_type="bloom", n_embed=4096, n_layer=30, num_attention_heads=32, vocab_size=250880),
    "Baichuan2-7B": dict(model_type="baichuan", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                         num_attention_heads=32, vocab_size=125696, max_position_embeddings=4096),
    "Baichuan2-13B": dict(model_type="baichuan", hidden_size=5120, intermediate_size=13696, num_hidden_layers=40,
                          num_attention_heads=40, vocab_size=125696),
}  # fmt: skip
# layers, micro-tokens, checkpointing
SETTINGS = [(2, 1024, True), (4, 2048, False), (4, 1024, True), (8, 2048, True)]
CARDS = 24, 40, 80  # GB
CONTEXT = 1.0  # GB of a card that are not for tensors


def table(args):
    """For README.md."""
    print("| model | settings | score | train | generate | card |")
    print("|---|---|---|---|---|---|")
    for name, published in MODELS.items():
        config = Config.from_json(published)
        for args.layers, args.micro_tokens, args.checkpointing in SETTINGS:
            peaks = [plan(case, config, args)[0] / 1e9 for case in CASES]
            words = f"--layers {args.layers} --micro-tokens {args.micro_tokens}"
            words += " --checkpointing" * args.checkpointing
            cards = [card for card in CARDS if card >= max(peaks) + CONTEXT]
            shown = " | ".join(f"{peak:.1f}" for peak in peaks)
            print(f"| {name} | `{words}` | {shown} | {cards[0] if cards else 'none'} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, help="a checkpoint folder; its config.json is enough"
    )
    parser.add_argument("--shape", help="D,L,H,V of a BLOOM, instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4, help="selected layers (4)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs that own neurons (10)")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="in a pass (2048)")
    parser.add_argument("--cache-gb", type=float, default=2.0, help="as in lander.py (2)")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--measure", action="store_true", help="run it, too, on the CPU")
    parser.add_argument("--case", choices=CASES, help="measure this one, in this process")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    def command():
        if not (args.config or args.shape):
            return table(args)
        if args.shape:
            config = shape_config(args.shape)
        else:
            config = Config.from_folder(args.config)
        if args.case:
            return print(*measure(args.case, config, args))
        print(f"{'':<10}{'GB':>8}{'TFLOP':>10}" + f"{'measured':>14}{'':>10}" * args.measure)
        for case in CASES:
            peak, operations = plan(case, config, args)
            row = f"{case:<10}{peak / 1e9:>8.3f}{operations / 1e12:>10.4f}"
            if args.measure:
                again = [sys.executable, __file__, *sys.argv[1:], "--case", case]
                # Or else the C library keeps what was freed.
                environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(again, check=True, stdout=subprocess.PIPE, env=environment)
                out = done.stdout.decode()
                measured, counted = map(int, out.split())
                row += f"{measured / 1e9:>14.3f}{counted / 1e12:>10.4f}{peak / measured:>8.1%}"
            print(row, flush=True)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
