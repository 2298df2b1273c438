"""Speed and memory: beside transformers and peft, of a step, and of the whole command.

python checks/bench.py against --weights W --data D             # a checkpoint and parallel text
python checks/bench.py against --shape 1024,4,16,50000          # random weights, D,L,H,V
python checks/bench.py step --shape 1024,16,16,50000            # peak memory and time
python checks/bench.py step --shape 4096,30,32,250880 --dtype bfloat16 --plan    # memory alone
python checks/bench.py large --shape 4096,30,32,250880 --folder DIR --weights W -- ...
"""

import argparse
import copy
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, exit_status, first_line, line_ends, load_tokenizer, make_batch
from data import make_batches, read_lines, read_parallel, render
from model import Cache, Decoder, cast_once, load_model, read_config, save_model


# --------------------------------------------------------------------------------------------------
# What is measured


SIZES = "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"
EOS, PAD = 2, 3
SENTENCE, TARGET = 64, 24  # tokens of an example, prompt and target; and those of the target
SENTENCES, NEW_TOKENS = 80, 48  # in a training batch against others; after each prompt
PAIRS = [f"pair{i}" for i in range(10)]  # the first one is tuned


def shape_config(args):
    """ "D,L,H,V" or "D,L,H,V,F" -> Config"""
    sizes = dict(zip(SIZES, map(int, args.shape.split(","))))
    return read_config({"model_type": args.family} | sizes)


def random_decoder(config, dtype, device="cpu"):
    torch.set_default_dtype(getattr(torch, dtype))  # so that it never is in 32 bits
    with torch.device(device):
        model = Decoder(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def spread(config, count):
    """Layers, evenly spaced from the second one on: the worst case, as only the first is spared."""
    return [1 + (config.layers - 1) * i // count for i in range(count)]


def random_groups(config, count):
    """Neurons of so many layers by chance, in groups of the usual sizes."""
    generator = torch.Generator().manual_seed(0)
    awareness = torch.rand(len(PAIRS), count, config.ffn_size, generator=generator)
    owner = lander.categorize(awareness, lander.read_settings().epsilon)
    return lander.describe_groups(awareness, owner, PAIRS, {PAIRS[0]: spread(config, count)})


def regroup(model, groups):
    """Make a model that of the tuned pair. -> what learns"""
    lander.install_routing(model, groups)
    lander.route(model, PAIRS[0])
    return list(lander.what_learns(model, PAIRS[0]).values())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=lander.WEIGHT_DECAY, fused=True)


def seconds_of(run, args):
    """-> seconds, and what it gave"""
    start = time.perf_counter()
    result = run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


# --------------------------------------------------------------------------------------------------
# Against others: the same work on the same weights, in turn, in one run


def alternate(name, ours, theirs, args):
    """Run both in turn, print medians, their ratio and how it varied. -> what each gave"""
    results = ours(), theirs()
    rows = [(seconds_of(ours, args)[0], seconds_of(theirs, args)[0]) for _ in range(args.repeats)]
    first, second = map(statistics.median, zip(*rows))
    ratios = [there / here for here, there in rows]
    row = f"{name:<10}{first:9.4f}{second:9.4f}{second / first:8.2f}"
    print(f"{row}   {min(ratios):.2f} to {max(ratios):.2f}", flush=True)
    return results


def check_same(ours, theirs, what, args):
    """Print how many are the same. InputError where it was not the same work."""
    same = [a == b for a, b in zip(ours, theirs, strict=True)].count(True)
    print(f"{'':<10}{what}: {same} of {len(ours)} the same")
    # A near tie falls one way or the other with what else is in the batch, and often in 16 bits.
    if args.dtype == "float32" and same < 0.98 * len(ours):
        raise InputError("not the same work")


def their_batches(batches, device):
    """Batches as transformers takes them: it shifts labels, so that eos is an input, too."""
    for ids, mask, targets in batches:
        labels = functional.pad(targets, (1, 0), value=-100).to(device)
        ids, mask = functional.pad(ids, (0, 1), value=PAD), functional.pad(mask, (0, 1)).long()
        yield dict(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels)


def their_step(reference, batches, learners, optimizer):
    """What lander.train_step does. -> loss of a target token"""
    counts, losses = [int((batch["labels"] != -100).sum()) for batch in batches], []
    for batch, count in zip(batches, counts):
        losses.append(reference(**batch).loss * (count / sum(counts)))
        losses[-1].backward()
    torch.nn.utils.clip_grad_norm_(learners, lander.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(losses).item()


def train(model, reference, examples, args):
    """A step that trains every weight; and selected neurons against LoRA in all linear layers."""
    batches = list(make_batches(examples, PAD, args.micro_tokens))
    converted = list(their_batches(batches, args.device))
    for name in ("full", "lora"):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(reference)
        learners = list(ours.parameters())
        if name == "lora":
            learners = regroup(ours, random_groups(model.config, args.layers))
            theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules="all-linear"))
        rivals = [p for p in theirs.parameters() if p.requires_grad]
        step = partial(lander.train_step, ours, batches, adamw(learners), learners)
        rival = partial(their_step, theirs, converted, rivals, adamw(rivals))
        (loss, _), their_loss = alternate(name, step, rival, args)
        if abs(loss / their_loss - 1) > (1e-4 if args.dtype == "float32" else 2e-2):
            raise InputError(f"not the same work: losses {loss} and {their_loss}")
        ours, theirs = (sum(map(torch.numel, own)) for own in (learners, rivals))
        print(f"{'':<10}{ours:,} weights learn in ours, {theirs:,} in theirs")


def score(model, examples, args):
    """neuron_awareness against a plain pass of the same model, down to the lowest scored layer."""
    batches, layers = list(make_batches(examples, PAD, args.micro_tokens)), spread(model.config, 4)
    lowest = model.requires_grad_(False).blocks[layers[0]].ffn.down.weight.requires_grad_(True)

    plain = lambda: [torch.autograd.grad(lander.target_loss(model, b), lowest) for b in batches]
    alternate("score", lambda: lander.neuron_awareness(model, batches, layers), plain, args)


def their_continuations(reference, prompts, limit, device, criteria=()):
    """Greedy, padded on the left, as transformers wants it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(max_new_tokens=limit, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    options |= dict(attention_mask=mask.to(device), stopping_criteria=list(criteria))
    rows = reference.generate(ids.to(device), **options)[:, longest:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def generate(model, reference, prompts, args):
    """Greedy continuations of prompts of mixed length in one batch."""
    ids, mask, _ = make_batch([(prompt, []) for prompt in prompts], PAD)
    ids, mask = ids.to(args.device), mask.to(args.device)
    ours = lambda: model.generate(ids, mask, NEW_TOKENS, EOS)
    theirs = lambda: their_continuations(reference, prompts, NEW_TOKENS, args.device)
    check_same(*alternate("generate", ours, theirs, args), "continuations", args)


def evaluate(model, reference, tokenizer, text, args):
    """Translating to the line's end; transformers is given sorted text, at its best batch."""
    sources = [source for source, _ in text]
    prompts = [render(tokenizer, args.pair, source)[0] for source in sources]
    limits = [max(lander.NEW_TOKENS * len(prompt), lander.LEAST_NEW_TOKENS) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    ends, settings = line_ends(tokenizer)[2].to(args.device), lander.read_settings()
    ends_its_line = lambda ids, scores, **rest: ends[ids[:, -1]]
    ours = partial(lander.translate_text, model, tokenizer, args.pair, sources, settings)

    def theirs(size):
        lines = {}
        for first in range(0, len(prompts), size):
            group = longest_first[first : first + size]
            options = limits[group[0]], args.device, [ends_its_line]
            rows = their_continuations(reference, [prompts[i] for i in group], *options)
            for i, row in zip(group, rows):
                lines[i] = first_line(tokenizer.decode(row[: limits[i]]))
        return [lines[i] for i in range(len(sources))]

    theirs(16)  # to warm up
    best = min([16, 32, 64, 128, 256], key=lambda size: seconds_of(partial(theirs, size), args)[0])
    (lines, _), their_lines = alternate("evaluate", ours, partial(theirs, best), args)
    check_same(lines, their_lines, f"translations, theirs in batches of {best}", args)


def random_examples(vocab_size):
    rng = random.Random(0)
    ids = lambda count: [rng.randrange(4, vocab_size) for _ in range(count)]
    return [(ids(rng.randint(20, 50)), [*ids(rng.randint(8, 35)), EOS]) for _ in range(SENTENCES)]


def against(args):
    """A ratio above 1: ours is faster. With text, translating: random weights never end a line."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        if args.shape:
            save_model(random_decoder(shape_config(args), args.dtype), folder)
        print(f"{'':<10}{'ours, s':>9}{'theirs':>9}{'ratio':>8}   of neighbours")
        dtype = getattr(torch, args.dtype)
        ours = lambda: load_model(folder, args.device, dtype)
        theirs = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
        model, reference = alternate("load", ours, theirs, args)
        examples = random_examples(model.config.vocab_size)
        if args.data:
            tokenizer = load_tokenizer(folder)
            text, test = (read_parallel(args.data, split, args.pair) for split in ("train", "test"))
            examples = [render(tokenizer, args.pair, *pair) for pair in text[:SENTENCES]]
        train(model, reference, examples, args)
        score(model, examples, args)
        generate(model, reference, [prompt for prompt, _ in examples[:64]], args)
        if args.data:
            evaluate(model, reference, tokenizer, test[: args.test_sentences], args)


# --------------------------------------------------------------------------------------------------
# A step: peak memory, planned and measured, and time


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and answers what one without values cannot."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.now, self.peak, self.seen = targets, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if function is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            # [B, T] picks the targets: as many numbers of rows and columns as there are.
            args = args[0], [torch.zeros(self.targets, dtype=torch.long)] * 2
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x.is_meta]
        for storage in map(torch.Tensor.untyped_storage, tensors):
            key = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                self.now += key[1]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, key)
        return result

    def release(self, key):
        self.seen.remove(key)
        self.now -= key[1]


def first_and_last_token(model, args):
    """As many prompts as --cache-gb holds translations are read; then the last of their tokens."""
    prompt, room = SENTENCE - TARGET, (1 + lander.NEW_TOKENS) * (SENTENCE - TARGET)
    rows = max(1, min(lander.ROWS_AT_ONCE, int(args.cache_gb * 1e9 / model.cache_bytes() / room)))
    ids = torch.full((rows, prompt), 5, device=model.embedding.weight.device)
    with torch.no_grad(), cast_once(model):
        cache = Cache(model, rows, 1, room, None)
        for store in cache.stores:
            store.zero_()  # memory that nobody wrote to is not resident
        model.next_logits(ids, cache, model.head_weight())
        cache.length = room - 1
        model.next_logits(ids[:, :1], cache, model.head_weight())


CASES = "score", "train", "checkpointed", "train all", "generate"  # all: every weight


def make_case(case, config, args, groups, device="cpu"):
    """Make a model and what else a case needs. -> the function that is measured"""
    model = random_decoder(config, args.dtype, device)
    example = [5] * (SENTENCE - TARGET), [5] * (TARGET + 1)
    batch = make_batch([example] * (args.micro_tokens // SENTENCE), PAD)
    if case == "score":
        return lambda: lander.neuron_awareness(model, [batch], spread(config, args.layers))
    learners = list(model.parameters()) if case == "train all" else regroup(model, groups)
    if case == "generate":
        return partial(first_and_last_token, model, args)
    model.checkpointing = case == "checkpointed"
    optimizer = adamw(learners)
    return lambda: lander.train_step(model, [batch], optimizer, learners)


def plan(case, config, args):
    """-> peak bytes of the real code on tensors without values. A GPU's context is not in it."""
    groups = random_groups(config, args.layers)  # has values
    memory = Memory(args.micro_tokens // SENTENCE * (TARGET + 1))
    with FakeTensorMode(), memory:
        run = make_case(case, config, args, groups)
        run()
        memory.peak = memory.now
        run()  # AdamW has its moments by now
    return memory.peak


def resident(what):
    """Bytes that this process holds, on Linux: VmRSS, or VmHWM, its peak."""
    (line,) = [line for line in read_lines("/proc/self/status") if line.startswith(what)]
    return int(line.split()[1]) * 1024


def measure(case, config, args):
    """The same with values. -> growth of memory in bytes, seconds (the best of some)"""
    small = replace(config, layers=2)
    few = argparse.Namespace(**vars(args) | {"layers": 1, "cache_gb": 0})
    # Loads libraries; those of matrix products keep buffers, which are as large as the matrices.
    make_case(case, small, few, random_groups(small, 1), args.device)()
    now, peak = partial(resident, "VmRSS"), partial(resident, "VmHWM")
    if args.device == "cuda":
        now, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    groups, before = random_groups(config, args.layers), now()
    run = make_case(case, config, args, groups, args.device)
    seconds = [seconds_of(run, args)[0] for _ in range(args.repeats + 1)]
    return peak() - before, min(seconds[1:])


def step(args):
    """Each case planned, and measured in a process of its own."""
    config = shape_config(args)
    if args.case:
        return print(*measure(args.case, config, args))
    print(f"{'':<14}{'plan, GB':>9}{'GB':>9}{'s':>9}")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or freed memory is kept
    for case in CASES:
        print(f"{case:<14}{plan(case, config, args) / 1e9:>9.3f}", end="", flush=True)
        if not args.plan:
            words = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            peak, seconds = map(float, subprocess.check_output(words, env=environment).split())
            print(f"{peak / 1e9:>9.3f}{seconds:>9.3f}", end="")
        print()


def large(args):
    """The weights, of bf16, are made once in --folder; the tokenizer is that of --weights."""
    weights, run = args.folder / "weights", args.folder / f"run-{time.time():.0f}"
    if not weights.exists():
        save_model(random_decoder(shape_config(args), "bfloat16"), weights)
        shutil.copyfile(args.weights / "tokenizer.json", weights / "tokenizer.json")
    command = [sys.executable, lander.__file__, "--weights", weights, "--out", run, *args.words]
    seconds, done = seconds_of(lambda: subprocess.run(command), args)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # KiB on Linux
    print(f"{args.shape}: exit status {done.returncode}, {seconds:.0f} s, {peak / 1e9:.1f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("command", choices=["against", "step", "large"])
    option("--weights", type=Path, help="a checkpoint folder with its tokenizer")
    option("--shape", help="D,L,H,V[,F] of random weights instead")
    option("--family", default="bloom", help="of --shape: bloom, llama with its F, ... (bloom)")
    option("--data", type=Path, help="parallel text (against: random ids)")
    option("--pair", default="en-de", help="of --data (en-de)")
    option("--device", default="cpu", choices=["cpu", "cuda"])
    option("--dtype", default="float32", choices=["float32", "bfloat16"])
    option("--layers", type=int, default=4, help="that learn or are scored (4)")
    option("--micro-tokens", type=int, default=2048, help="in a pass (2048)")
    option("--cache-gb", type=float, default=2.0, help="as in lander.py (2)")
    option("--repeats", type=int, default=5, help="timed runs of each (5)")
    option("--test-sentences", type=int, default=1000, help="to translate (1000)")
    option("--folder", type=Path, help="for weights and runs (large)")
    option("--plan", action="store_true", help="memory by plan alone (step)")
    option("--case", choices=CASES, help="measure this one, in this process (step)")
    option("words", nargs="*", help="after --: options of lander.py (large)")
    args = parser.parse_args()
    {"against": against, "step": step, "large": large}[args.command](args)


if __name__ == "__main__":
    sys.exit(exit_status(main))
