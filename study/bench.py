"""Speed and memory: beside other libraries, planned, measured, and of the whole command.

    python study/bench.py against --weights W --data D          # transformers, peft, tokenizers
    python study/bench.py against --shape 1024,4,16,50000       # random weights, D,L,H,V
    python study/bench.py plan                                  # the table of README.md
    python study/bench.py plan --weights bloom-7b1/ --layers 2  # its config.json is enough
    python study/bench.py step --shape 1024,16,16,50000         # the plan, and what happens
    python study/bench.py startup --weights W --data D          # millions of pairs
    python study/bench.py large --shape 4096,30,32,250880 --tokenizer bloom-7b1/tokenizer.json \\
        --folder DIR --pair en-de --data wmt16/                          # and any option of lander.py
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
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, exit_status, fingerprint, first_line, line_ends, load_tokenizer
from data import make_batch, make_batches, read_lines, read_parallel, render, split_pair
from data import write_json, write_tensors
from model import PROMPTS_AT_ONCE, Cache, Config, Decoder, cast_once, load_model, save_model
from model import to_published


# --------------------------------------------------------------------------------------------------
# What is measured


SIZES = "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"
FAMILIES = {
    "bloom": {"model_type": "bloom"},
    "llama": {"model_type": "llama"},
    "baichuan": {"model_type": "baichuan", "max_position_embeddings": 4096, "z_loss_weight": 0},
    "baichuan-13b": {"model_type": "baichuan", "z_loss_weight": 0},  # ALiBi
}


def shape_config(shape, family="bloom"):
    """ "D,L,H,V" or "D,L,H,V,F" -> Config. LLaMA's as of LLaMA 3: four query heads share a key's."""
    sizes = dict(zip(SIZES, map(int, shape.split(","))))
    published = FAMILIES[family] | sizes
    if family == "llama":
        published["num_key_value_heads"] = sizes["num_attention_heads"] // 4
        published.setdefault("intermediate_size", sizes["hidden_size"] * 7 // 2)
    return Config.from_json(published)


def random_decoder(config, dtype, device="cpu"):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Decoder(config).requires_grad_(False)
    torch.set_default_dtype(before)
    return model


EOS, PAD = 2, 3
SENTENCE, TARGET = 64, 24  # tokens of an example, prompt and target; and those of the target
SENTENCES, NEW_TOKENS = 80, 48  # in a training batch against others; after each prompt
PAIRS = [f"pair{i}" for i in range(10)]  # the first one is tuned


def spread(config, count):
    """Layers, evenly spaced from the second one on: the worst case, as only the first is spared."""
    return [1 + (config.layers - 1) * i // count for i in range(count)]


def random_groups(config, count):
    """Neurons of so many layers by chance, in groups of the usual sizes."""
    generator = torch.Generator().manual_seed(0)
    awareness = torch.rand(len(PAIRS), count, config.ffn_size, generator=generator)
    owner = lander.categorize(awareness, lander.Settings.epsilon)
    return lander.describe_groups(awareness, owner, PAIRS, {PAIRS[0]: spread(config, count)})


def regroup(model, groups):
    """Make a model that of the tuned pair. -> the parameters that learn"""
    lander.install_routing(model, groups)
    lander.route(model, PAIRS[0])
    return lander.what_learns(model, PAIRS[0]).values()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=lander.WEIGHT_DECAY, fused=True)


def resident(what):
    """Bytes of this process's memory on Linux: VmRSS, VmHWM (its peak), RssAnon (without files)."""
    (line,) = [line for line in read_lines("/proc/self/status") if line.startswith(what)]
    return int(line.split()[1]) * 1024


def config_of(args):
    if args.weights:
        return Config.from_folder(args.weights)
    return shape_config(args.shape, args.family)


def describe(args):
    """What is measured, and where."""
    shown = f"{args.family} {args.shape}" if args.shape else args.weights
    where = f"{torch.get_num_threads()} CPU threads"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{shown}, {args.dtype}, {where}; torch {torch.__version__}"


# --------------------------------------------------------------------------------------------------
# Against others: the same work on the same weights, in turn, in one run


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def alternate(name, ours, theirs, args):
    """Run both once to warm up, then in turn. -> what each of the two gave

    Prints the median seconds of each, the ratio of medians (above 1: ours is faster), and the
    smallest and largest ratio of two neighbouring runs.
    """
    seconds, results = {ours: [], theirs: []}, {}
    for repeat in range(args.repeats + 1):
        for run in (ours, theirs):
            start = time.perf_counter()
            results[run] = run()
            synchronize(args)
            if repeat:
                seconds[run].append(time.perf_counter() - start)
    first, second = (statistics.median(times) for times in seconds.values())
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs])]
    row = f"{name:<10}{first:9.4f}{second:9.4f}{second / first:8.2f}"
    print(f"{row}   {min(ratios):.2f} to {max(ratios):.2f}", flush=True)
    return results[ours], results[theirs]


def remark(text):
    print(f"{'':<10}{text}")


def count_same(ours, theirs, least=1.0):
    """How many of two lists are the same. InputError for too few: it was not the same work."""
    same = [a == b for a, b in zip(ours, theirs, strict=True)].count(True)
    if same < least * len(ours):
        raise InputError(f"not the same work: {same} of {len(ours)} are the same")
    return f"{same} of {len(ours)} the same"


def load(folder, args):
    """The checkpoint folder into a model on the device."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    ours = lambda: load_model(folder, args.device, dtype)
    theirs = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    return alternate("load", ours, theirs, args)


def their_batches(batches, device):
    """Batches as transformers takes them: labels are shifted there, so that eos is an input, too."""
    converted = []
    for ids, mask, targets in batches:
        words = {
            "input_ids": functional.pad(ids, (0, 1), value=PAD),
            "attention_mask": functional.pad(mask, (0, 1)).long(),
            "labels": functional.pad(targets, (1, 0), value=-100),
        }
        converted.append({name: tensor.to(device) for name, tensor in words.items()})
    return converted


def train(model, reference, examples, args):
    """Forward and backward, gradients of every weight, over one padded batch."""
    batch = make_batch(examples, PAD)
    (their_batch,) = their_batches([batch], args.device)
    tokens = lander.count_targets([batch])

    def gradients(model, loss):
        model.zero_grad()
        loss = loss()
        loss.backward()
        return loss.item()

    ours = partial(gradients, model, lambda: lander.target_loss(model, batch) / tokens)
    theirs = partial(gradients, reference, lambda: reference(**their_batch).loss)
    losses = alternate("train", ours, theirs, args)
    if abs(losses[0] / losses[1] - 1) > (1e-4 if args.dtype == "float32" else 2e-2):
        raise InputError(f"not the same work: losses {losses}")
    remark(f"{batch.mask.sum()} tokens in {len(examples)} sentences, {tokens} of them targets")
    model.zero_grad()
    reference.zero_grad()


def their_step(reference, batches, optimizer):
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    for batch, count in zip(batches, counts):
        (reference(**batch).loss * (count / sum(counts))).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], lander.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tune(model, reference, examples, args):
    """A step of ours against one of peft's LoRA, all linear layers, r 8, and one of full finetuning."""
    import peft

    batches = list(make_batches(examples, PAD, lander.Settings.micro_tokens))
    theirs = their_batches(batches, args.device)
    tuned = copy.deepcopy(model)
    learners = regroup(tuned, random_groups(model.config, args.layers))
    ours = partial(lander.train_step, tuned, batches, adamw(learners), learners)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for name in ("lora", "full"):
        rival = copy.deepcopy(reference)
        if name == "lora":
            rival = peft.get_peft_model(rival, peft.LoraConfig(**settings))
        optimizer = adamw([p for p in rival.parameters() if p.requires_grad])
        alternate(name, ours, partial(their_step, rival, theirs, optimizer), args)
    trained = sum(p.numel() for p in learners)
    size = sum(p.numel() for p in model.parameters())
    remark(f"{len(batches)} passes; {trained:,} of {size:,} weights learn in ours")


def score(model, examples, args):
    """neuron_awareness against a plain pass of the same model, down to the lowest scored layer."""
    batches = list(make_batches(examples, PAD, lander.Settings.micro_tokens))
    selected = spread(model.config, args.layers)
    model.requires_grad_(False)

    def plain():
        with lander.recording(model, selected) as h:
            for batch in batches:
                torch.autograd.grad(lander.target_loss(model, batch), h[selected[0]])

    alternate("score", lambda: lander.neuron_awareness(model, batches, selected), plain, args)


def their_continuations(reference, prompts, limit, device, criteria=()):
    """Greedy, padded on the left, as transformers wants it."""
    longest = max(map(len, prompts))
    rows = [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    out = reference.generate(
        torch.tensor(rows, device=device),
        attention_mask=(torch.arange(longest) >= padding[:, None]).long().to(device),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        stopping_criteria=list(criteria),
    )
    rows = out[:, longest:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def generate(model, reference, prompts, args):
    """Greedy continuations of prompts of mixed length in one batch."""
    ids, mask, _ = make_batch([(prompt, []) for prompt in prompts], PAD)
    ids, mask = ids.to(args.device), mask.to(args.device)
    ours = lambda: model.generate(ids, mask, NEW_TOKENS, EOS)
    theirs = lambda: their_continuations(reference, prompts, NEW_TOKENS, args.device)
    new = alternate("generate", ours, theirs, args)
    # 16-bit rounding differs between kernels, and one near tie changes a continuation.
    same = count_same(*new, 1.0 if args.dtype == "float32" else 0.0)
    remark(f"{mask.sum()} prompt tokens, {sum(map(len, new[1]))} new; {same}")


class Words:
    """A tokenizer for random weights: an id for each word. No word ends a line."""

    pad_id, eos_id, end_ids = PAD, EOS, [EOS]
    prompt_prefix, target_prefix = [], " "

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [4 + int.from_bytes(word.encode()) % (self.vocab_size - 4) for word in text.split()]

    def decode(self, ids):
        return " ".join(f"w{id}" for id in ids)


def random_text(count):
    """Sentences of random words, in pairs."""
    rng = random.Random(0)
    sentence = lambda: " ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randint(8, 35)))
    return [(sentence(), sentence()) for _ in range(count)]


def evaluate(model, reference, tokenizer, sources, args):
    """Translating to the end of the line, against transformers sorted by length, at its best batch."""
    prompts = [render(tokenizer, args.pair, source)[0] for source in sources]
    limits = [max(3 * len(prompt), lander.LEAST_NEW_TOKENS) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    ends = line_ends(tokenizer).ends_after.to(args.device)
    ends_its_line = lambda ids, scores, **rest: ends[ids[:, -1]]

    def ours():
        what = list(enumerate(sources)), lander.Settings(), "translating"
        lines = lander.translate_lines(model, tokenizer, args.pair, *what)
        return [line for _, line, _ in lines]

    def theirs(size):
        lines = {}
        for first in range(0, len(prompts), size):
            group = longest_first[first : first + size]
            options = limits[group[0]], args.device, [ends_its_line]
            rows = their_continuations(reference, [prompts[i] for i in group], *options)
            for i, row in zip(group, rows):
                lines[i] = first_line(tokenizer.decode(row[: limits[i]]))
        return [lines[i] for i in range(len(sources))]

    def seconds(size):
        start = time.perf_counter()
        theirs(size)
        return time.perf_counter() - start

    theirs(16)  # to warm up
    best = min([16, 32, 64, 128, 256, 512], key=seconds)
    lines = alternate("evaluate", ours, partial(theirs, best), args)
    # A near tie falls one way or the other with what else is in the batch.
    same = count_same(*lines, 0.98 if args.dtype == "float32" else 0.0)
    remark(f"translations: {same}; theirs in batches of {best}")


def tokenize(folder, sentences, args):
    """Sentences one by one, by a new tokenizer each time, so that no cache is warm."""
    from tokenizers import Tokenizer

    count = args.repeats + 1
    our_tokenizers = iter([load_tokenizer(folder) for _ in range(count)])
    path = str(folder / "tokenizer.json")
    their_tokenizers = iter([Tokenizer.from_file(path) for _ in range(count)])

    def ours():
        encode = next(our_tokenizers).encode
        return [encode(sentence) for sentence in sentences]

    def theirs():
        encode = partial(next(their_tokenizers).encode, add_special_tokens=False)
        return [encode(sentence).ids for sentence in sentences]

    ids, same = alternate("tokenize", ours, theirs, args)
    remark(f"{sum(map(len, ids))} tokens; {count_same(ids, same)}")


def against(args):
    os.environ["RAYON_NUM_THREADS"] = "1"  # the Rust library, single-threaded
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        if args.shape:
            config = shape_config(args.shape, args.family)
            save_model(random_decoder(config, getattr(torch, args.dtype)), folder)
        print(f"{describe(args)}, transformers {transformers.__version__}")
        print(f"{'':<10}{'ours, s':>9}{'theirs':>9}{'ratio':>8}   of neighbours")
        model, reference = load(folder, args)
        if args.data:
            tokenizer = load_tokenizer(folder)
            text = read_parallel(args.data, "train", args.pair)
            test = read_parallel(args.data, "test", args.pair)[: args.test_sentences]
        else:
            tokenizer = Words(model.config.vocab_size)
            text, test = random_text(SENTENCES), random_text(args.test_sentences)
        examples = [render(tokenizer, args.pair, *pair) for pair in text[:SENTENCES]]
        train(model, reference, examples, args)
        tune(model, reference, examples, args)
        score(model, examples, args)
        generate(model, reference, [prompt for prompt, _ in examples[:64]], args)
        evaluate(model, reference, tokenizer, [source for source, _ in test], args)
        if args.data and (folder / "tokenizer.json").exists():
            tokenize(folder, [side for pair in text[:5000] for side in pair], args)


# --------------------------------------------------------------------------------------------------
# Plan and step: memory and operations without the memory, and beside what happens
#
# The plan is the real code on tensors that have no values (torch's FakeTensorMode); what is ours is
# the sum of what is alive. On a GPU its context, about 0.5 GB, and what its allocator cannot use
# come on top. Operations are those that FlopCounterMode counts.


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and answers what a tensor without values cannot."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.now, self.peak, self.seen = targets, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
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


def one_pass(args):
    example = [5] * (SENTENCE - TARGET), [5] * (TARGET + 1)
    return make_batch([example] * (args.micro_tokens // SENTENCE), PAD)


def generate_last(model, args):
    """A first pass over prompts, and the last step of a batch of translations."""
    prompt = SENTENCE - TARGET
    tokens = 4 * prompt  # the limit is three times the prompt
    rows = max(1, int(args.cache_gb * 1e9 / (model.cache_bytes() * tokens)))
    first = min(rows, PROMPTS_AT_ONCE)
    with torch.no_grad(), cast_once(model):
        cache = Cache.empty(model, rows, tokens)
        for store in cache.stores:
            store.zero_()  # memory that nobody wrote to is not resident
        ids = torch.full((rows, prompt), 5, device=model.embedding.weight.device)
        chunk = cache.part(0, first, 0)
        model.logits(model.hidden_states(ids[:first], cache=chunk)[:, -1])
        cache.length = tokens - 1
        model.logits(model.hidden_states(ids[:, :1], cache=cache)[:, -1]).max(-1)


CASES = "score", "train", "checkpointed", "train all", "generate"  # all: every weight


def make_case(case, config, args, groups, device="cpu"):
    """Make a model and what else a case needs. -> the function that is measured"""
    model = random_decoder(config, getattr(torch, args.dtype), device)
    if case == "score":
        return lambda: lander.neuron_awareness(model, [one_pass(args)], spread(config, args.layers))
    learners = list(model.parameters()) if case == "train all" else regroup(model, groups)
    if case == "generate":
        return partial(generate_last, model, args)
    model.checkpointing = case == "checkpointed"
    optimizer = adamw(learners)
    return lambda: lander.train_step(model, [one_pass(args)], optimizer, learners)


def plan(case, config, args):
    """-> peak bytes and operations, those of the second time: AdamW has its moments by then."""
    groups = random_groups(config, args.layers)  # has values
    memory = Memory(args.micro_tokens // SENTENCE * (TARGET + 1))
    with FakeTensorMode(), memory:
        run = make_case(case, config, args, groups)
        run()
        memory.peak = memory.now
        run()
        peak = memory.peak
        with FlopCounterMode(display=False) as counter:  # its hooks keep tensors alive
            run()
    return peak, counter.get_total_flops()


def measure(case, config, args):
    """The same with values. -> growth of memory in bytes, operations, seconds (the best of some)"""
    on_gpu = args.device == "cuda"
    small = replace(config, layers=2)
    cache_gb = args.cache_gb * small.layers / config.layers  # for as many rows
    few = argparse.Namespace(**vars(args) | {"layers": 1, "cache_gb": cache_gb})
    # Loads libraries; those of matrix products keep buffers, which are as large as the matrices.
    make_case(case, small, few, random_groups(small, 1), args.device)()
    groups = random_groups(config, args.layers)
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    run, seconds = make_case(case, config, args, groups, args.device), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        run()
        synchronize(args)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    with FlopCounterMode(display=False) as counter:
        run()
    return peak - before, counter.get_total_flops(), min(seconds[1:])


def show_plan(args):
    """Each case, planned; of `step` also measured, in a process of its own."""
    config = config_of(args)
    if args.command == "step" and args.case:
        return print(*measure(args.case, config, args))
    if args.command == "step":
        print(describe(args))
    print(f"{'planned':<14}{'GB':>8}{'TFLOP':>10}   both over what is measured, seconds, TFLOP/s")
    for case in CASES:
        planned, operations = plan(case, config, args)
        print(f"{case:<14}{planned / 1e9:>8.3f}{operations / 1e12:>10.4f}", end="", flush=True)
        if args.command == "step":
            words = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            # Or else the C library keeps what was freed.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment)
            peak, done_operations, seconds = map(float, done.stdout.split())
            print(f"{planned / peak:>10.1%}{operations / done_operations:>8.1%}", end="")
            print(f"{seconds:>9.3f}{operations / seconds / 1e12:>8.3f}", end="")
        print()


# Family and sizes, as their config.json say.
MODELS = {
    "bloom-7b1": ("bloom", "4096,30,32,250880"),
    "Baichuan2-7B": ("baichuan", "4096,32,32,125696,11008"),
    "Baichuan2-13B": ("baichuan-13b", "5120,40,40,125696,13696"),
}
SETTINGS = (2, 1024, True), (4, 2048, False), (4, 1024, True), (8, 2048, True)
CARDS = 24, 40, 80  # GB
CONTEXT = 1.0  # GB of a card that are not for tensors


def show_table(args):
    """For README.md. SETTINGS: layers, micro-tokens, checkpointing"""
    args.dtype = "bfloat16"
    print("| model | settings | score | train | generate | card |")
    print("|---|---|---|---|---|---|")
    for name, (family, shape) in MODELS.items():
        config = shape_config(shape, family)
        for args.layers, args.micro_tokens, checkpointing in SETTINGS:
            words = f"--layers {args.layers} --micro-tokens {args.micro_tokens}"
            train = "train"
            if checkpointing:
                words, train = f"{words} --checkpointing", "checkpointed"
            peaks = [plan(case, config, args)[0] / 1e9 for case in ("score", train, "generate")]
            cards = [card for card in CARDS if card >= max(peaks) + CONTEXT]
            shown = " | ".join(f"{peak:.1f}" for peak in peaks)
            print(f"| {name} | `{words}` | {shown} | {cards[0] if cards else 'none'} |", flush=True)


# --------------------------------------------------------------------------------------------------
# Startup: how long millions of pairs take before the first step, and how much memory


MANY_PAIRS = 5_000_000


def startup(args):
    """Read a text, repeated, as a run does, up to the first step's batches."""
    tokenizer = load_tokenizer(args.weights)
    text = read_parallel(args.data, "train", args.pair)
    source, target = split_pair(args.pair)
    with tempfile.TemporaryDirectory() as folder:
        for side, code in enumerate((source, target)):
            lines = "".join(f"{row[side]}\n" for row in text)
            Path(folder, f"test.{args.pair}.{code}").write_text(lines)
            with open(f"{folder}/train.{args.pair}.{code}", "w", encoding="utf-8") as file:
                for _ in range(MANY_PAIRS // len(text)):
                    file.write(lines)
        both = f"{target}-{source},{args.pair}"
        settings = lander.Settings(data=folder, pair=args.pair, score_pairs=both, eval_sentences=1)
        before, start = resident("RssAnon"), time.monotonic()
        inputs = lander.read_inputs(tokenizer, [args.pair], settings)
        for path in inputs.paths.values():
            fingerprint(path)
        settings = replace(settings, max_tokens=inputs.max_tokens)
        next(lander.step_batches(tokenizer, inputs.train, settings, start=0))
        seconds, pairs = time.monotonic() - start, len(inputs.train[args.pair])
        memory = (resident("RssAnon") - before) / pairs
    print(f"{pairs:,} pairs: {seconds:.1f} s to the first step, {memory:.0f} bytes a pair")


# --------------------------------------------------------------------------------------------------
# Large: the whole command on random weights of a large model's shape, in shards


def write_weights(shape, folder):
    """A published checkpoint of random weights, in two shards. They do not stay in memory."""
    model = random_decoder(shape_config(shape), torch.bfloat16)
    tensors, weight_map = {}, {}
    for parameter, value in model.named_parameters():
        tensors |= to_published(model.config, parameter, value)
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        names = list(tensors)[i::2]
        write_tensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", model.config.published)


def large(args):
    """--lander runs another version's lander.py on the same weights."""
    weights = args.folder / "weights"
    if not weights.exists():
        write_weights(args.shape, weights)
        shutil.copyfile(args.tokenizer, weights / "tokenizer.json")
    run = args.folder / f"run-{time.time():.0f}"
    command = [sys.executable, args.lander, "--weights", weights, "--out", run, *args.rest]
    start = time.monotonic()
    status = subprocess.run(command).returncode
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # KiB on Linux
    print(f"{args.shape}: exit status {status}, {seconds:.0f} s, {peak / 1e9:.1f} GB")


# --------------------------------------------------------------------------------------------------
# The command line


LANDER = Path(lander.__file__)
OPTIONS = {
    "weights": {"type": Path, "help": "a checkpoint folder with its tokenizer"},
    "shape": {"help": "D,L,H,V[,F] of random weights instead"},
    "family": {"default": "bloom", "choices": FAMILIES, "help": "of --shape (bloom)"},
    "data": {"type": Path, "help": "parallel text (against: random words)"},
    "pair": {"default": "en-de", "help": "of --data (en-de)"},
    "device": {"default": "cpu", "choices": ["cpu", "cuda"]},
    "dtype": {"default": "float32", "choices": ["float32", "bfloat16"]},
    "layers": {"type": int, "default": 4, "help": "that learn or are scored (4)"},
    "micro-tokens": {"type": int, "default": 2048, "help": "in a pass (2048)"},
    "cache-gb": {"type": float, "default": 2.0, "help": "as in lander.py (2)"},
    "repeats": {"type": int, "default": 5, "help": "timed runs of each (5)"},
    "test-sentences": {"type": int, "default": 1000, "help": "to translate (1000)"},
    "tokenizer": {"type": Path, "required": True, "help": "a tokenizer.json"},
    "folder": {"type": Path, "required": True, "help": "for weights and runs"},
    "lander": {"type": Path, "default": LANDER, "help": "another version's lander.py"},
    "case": {"choices": CASES, "help": "measure this one, in this process"},
}
COMMANDS = {
    "against": "weights shape family data pair device dtype layers repeats test-sentences",
    "plan": "weights shape family dtype layers micro-tokens cache-gb",
    "step": "weights shape family device dtype layers micro-tokens cache-gb repeats case",
    "startup": "weights data pair",
    "large": "shape tokenizer folder lander",
}


def main():
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, options in COMMANDS.items():
        of_command = commands.add_parser(command)
        for option in options.split():
            of_command.add_argument(f"--{option}", **OPTIONS[option])
    args, args.rest = parser.parse_known_args()
    if args.rest and args.command != "large":
        parser.error(f"unknown: {' '.join(args.rest)}")
    warnings.simplefilter("ignore")  # of peft at transformers, of torch at tensors without values
    table = args.command == "plan" and not (args.weights or args.shape)
    if table:
        return show_table(args)
    tools = {"against": against, "startup": startup, "large": large}
    return tools.get(args.command, show_plan)(args)


if __name__ == "__main__":
    sys.exit(exit_status(main))
