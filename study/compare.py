"""The method beside its baselines: same checkpoint, same batches, same steps, same evaluation.

    python study/compare.py --weights W --data D --pair en-de --methods lander,layers,lora-32 \\
        --rates 1e-3,3e-3 --seeds 0,1,2 --out DIR        # and any option of lander.py
    python study/compare.py ... --chosen                 # more pairs translated, at the best rates
    python study/compare.py --toy DIR --seeds 1          # toy languages, from another start

methods.py has the methods. "+kl=B" behind a name adds B * KL(start || now) on other pairs' sources,
with the start's own translations. Each run is a line of DIR/results.jsonl; what is there is not run
again. --fast makes a run twice as fast: the embedding is cut to the tokens of the data, and what
frozen layers below all that learns give is remembered. Losses are then those of a softmax over
fewer tokens, for all methods alike: lower than lander.py's.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, exit_status, line_ends, make_batches, open_parallel, read_json
from data import read_lines, read_tensors, render, split_pair, write_json, write_tensors
from model import load_model
from study import demo, methods
from study.methods import METHODS, Context


# --------------------------------------------------------------------------------------------------
# One run


def parse_method(text):
    """ "lora-32+kl=1" -> ("lora-32", 1.0); without KL the second is None"""
    name, _, weight = text.partition("+kl=")
    if name not in METHODS or not re.fullmatch(r"[\d.]*", weight) or text.endswith("="):
        expected = f"expected one of {', '.join(METHODS)}, and perhaps +kl=WEIGHT"
        raise InputError(f"method {text!r}: {expected}")
    return name, float(weight) if weight else None


KEPT_SENTENCES = 20  # that a step of +kl compares with the start


class KLKeeper:
    """lander.Keeper for any parameters: those of a method, and what they were."""

    def __init__(self, model, context, parameters, start, weight):
        self.what = model, context, parameters, start
        self.examples = [one for own in context.started.values() for one in own["train"]]
        self.rng = random.Random(context.settings.seed)
        self.weight, self.drift = weight, None

    def add_gradients(self, step):
        model, context, parameters, start = self.what
        chosen = self.rng.sample(self.examples, min(KEPT_SENTENCES, len(self.examples)))
        batches = micro_batches(context, chosen)
        tokens = lander.count_targets(batches)
        lander.route(model, None)
        model.reads_other_pairs = True
        for batch in batches:
            loss = methods.kl_from_start(model, batch, parameters, start) / tokens
            (self.weight * loss).backward()
        model.reads_other_pairs = False


def micro_batches(context, examples):
    return list(make_batches(examples, context.tokenizer.pad_id, context.settings.micro_tokens))


def train(model, context, parameters, start, kl):
    """What lander.py does, with what learns and a keeper of our own."""
    settings, pair = context.settings, context.pair
    text = {pair: context.inputs.train[pair]}
    total = lander.count_steps(text, settings)
    decay = lander.WEIGHT_DECAY
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=decay, fused=True)
    keeper = None if kl is None else KLKeeper(model, context, parameters, start, kl)
    batches = lander.step_batches(context.tokenizer, text, settings, 0)
    learners = {pair: parameters}
    rest = learners, batches, total, optimizer, settings.lr
    progress = lander.Progress("training steps", total)
    for entry in lander.training_steps(model, *rest, keeper=keeper):
        progress.add(1, f", loss {entry['loss']:.3f}")
    model.requires_grad_(False)


def run_one(context, memory, method, rate, seed, translated):
    """Train and measure one method. translated: pairs whose test text is translated. -> its line"""
    began = time.process_time()
    name, kl = parse_method(method)
    settings = SimpleNamespace(**vars(context.settings) | {"lr": rate, "seed": seed})
    context = context._replace(settings=settings)
    torch.manual_seed(seed)
    model = load(context)
    parameters = METHODS[name](model, context)
    if settings.fast:
        remember_lower_blocks(model, parameters, memory)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(model, context, parameters, start, kl)
    line = {"method": method, "rate": rate, "seed": seed, "pair": context.pair}
    line["trained"] = sum(p.numel() for p in parameters.values())
    line["valid_loss"] = valid_losses(model, context)
    line["kl"] = drift_from_start(model, context, parameters, start)
    line["after"] = translate(model, context, translated)
    return line | {"seconds": round(time.process_time() - began, 1)}  # of a core


# --------------------------------------------------------------------------------------------------
# What is measured


def valid_losses(model, context):
    """pair -> loss of a target token of its first valid sentences"""
    losses = {}
    for pair, examples in context.valid.items():
        losses[pair] = lander.validation_loss(model, pair, micro_batches(context, examples))
    return losses


@torch.no_grad()
def drift_from_start(model, context, parameters, start):
    """Untuned pair -> KL(start || now) of a token of the start's own translations."""
    drifts = {}
    lander.route(model, None)
    for pair, own in context.started.items():
        total, batches = 0.0, micro_batches(context, own["valid"])
        for batch in batches:
            total += methods.kl_from_start(model, batch, parameters, start).item()
        drifts[pair] = total / lander.count_targets(batches)
    return drifts


def translate(model, context, pairs):
    """-> {pair: {"bleu", "chrf"}} of their test text"""
    scores = {}
    for pair in pairs:
        what = context.tokenizer, pair, context.inputs.test[pair], context.settings
        limit = context.inputs.new_tokens.get(pair, lander.NEW_TOKENS)
        _, found = lander.evaluate(model, *what, limit)
        scores[pair] = {metric: round(found[metric], 3) for metric in ("bleu", "chrf")}
    return scores


KINDS = TUNED, REVERSE, SAME_TARGET, OTHER = "tuned", "reverse", "same target", "other"


def kind_of(pair, tuned):
    """What a pair is to the tuned one: en-de, then de-en, fr-de and all others."""
    if pair == tuned:
        return TUNED
    if split_pair(pair) == split_pair(tuned)[::-1]:
        return REVERSE
    return SAME_TARGET if split_pair(pair)[1] == split_pair(tuned)[1] else OTHER


# --------------------------------------------------------------------------------------------------
# Twice as fast (--fast)


class CutTokenizer:
    """A tokenizer.json with some of its tokens alone, numbered anew: those that the data has."""

    def __init__(self, tokenizer, kept):
        self.whole, self.kept = tokenizer, kept
        self.number = {id: number for number, id in enumerate(kept)}
        self.token = {id: token for token, id in tokenizer.ids.items()}
        self.vocab_size = len(kept)
        self.end_ids = [self.number[id] for id in tokenizer.end_ids]
        self.eos_id = self.pad_id = self.end_ids[0]
        self.prompt_prefix = [self.number[id] for id in tokenizer.prompt_prefix]
        self.target_prefix = tokenizer.target_prefix

    def encode(self, text):
        numbers = []
        for id in self.whole.encode(text):
            if id in self.number:
                numbers.append(self.number[id])
            else:  # a word of a translation: spelled in characters, but for those that no text has
                spelled = [self.whole.ids.get(character) for character in self.token[id]]
                numbers += [self.number[id] for id in spelled if id in self.number]
        return numbers

    def decode(self, ids):
        return self.whole.decode([self.kept[number] for number in ids])


def cut_tokenizer(tokenizer, settings, pairs):
    """With the tokens and characters of all text of some pairs, and what ends a line."""
    _, before, after = line_ends(tokenizer)
    kept = {
        *tokenizer.end_ids,
        *tokenizer.prompt_prefix,
        *(before | after).nonzero()[:, 0].tolist(),
    }
    characters = {"▁"}
    for split in ("train", "valid", "test"):
        for pair in pairs:
            for both in open_parallel(settings.data, split, pair)[0]:
                kept.update(*render(tokenizer, pair, *both), *map(tokenizer.encode, both))
                characters.update(*both)
    kept.update(tokenizer.ids[c] for c in characters if c in tokenizer.ids)
    return CutTokenizer(tokenizer, sorted(kept))


class Remembered(nn.Module):
    """A frozen block whose output is remembered, and that of all blocks below it, by their input.

    memory: the first block's input, hashed -> the last one's output; .key is that of this pass.
    """

    def __init__(self, block, memory, is_first, is_last):
        super().__init__()
        self.block, self.memory = block, memory
        self.is_first, self.is_last = is_first, is_last

    def forward(self, x, bias=None, angles=None, cache=None, layer=None):
        if cache is not None:  # while translating
            return self.block(x, bias, angles, cache, layer)
        if self.is_first:
            self.memory.key = hash(x.detach().float().cpu().numpy().tobytes())
        if self.memory.key in self.memory:
            return self.memory[self.memory.key] if self.is_last else x
        x = self.block(x, bias, angles, cache, layer)
        if self.is_last:
            self.memory[self.memory.key] = x.detach()
        return x


class Memory(dict):
    key = None


def remember_lower_blocks(model, parameters, memory):
    """Of blocks below all that learns. memory: number of the first that learns -> Memory"""
    numbers = [int(name.split(".")[1]) for name in parameters if name.startswith("blocks.")]
    first = min(numbers) if len(numbers) == len(parameters) else 0  # else the embedding learns
    own = memory.setdefault(first, Memory())
    for number in range(first):
        ends = number == 0, number == first - 1
        model.blocks[number] = Remembered(model.blocks[number], own, *ends)


# --------------------------------------------------------------------------------------------------
# A grid


VALID_SENTENCES = 100  # of each pair
START_SENTENCES = {"train": 60, "valid": 30}  # of each pair that is not tuned


def load(context):
    """A fresh model."""
    settings = context.settings
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    if settings.fast:
        kept = torch.tensor(context.tokenizer.kept)
        model.embedding = nn.Embedding.from_pretrained(model.embedding.weight[kept].clone())
        model.config = replace(model.config, vocab_size=len(kept))
    return model


def prepare(settings, out, scripts=False):
    """Read and find what all runs need, once. scripts: what that method needs, too. -> Context"""
    pair = settings.pair
    config, tokenizer, _ = lander.open_checkpoint(settings.weights)
    lander.select_layers(torch.zeros(config.layers - 1), settings.layers)  # too many show at once
    if settings.fast:
        if config.head != "tied":
            raise InputError("--fast cuts an embedding that is the head, too; this one is not")
        pairs = lander.choose_pairs(settings.score_pairs, settings.data, "train")
        tokenizer = cut_tokenizer(tokenizer, settings, pairs)
    inputs = lander.read_inputs(tokenizer, [pair], settings, config.longest)
    settings.max_tokens = inputs.max_tokens
    valid = {}
    for name in inputs.scoring:
        text, _ = open_parallel(settings.data, "valid", name)
        valid[name] = [render(tokenizer, name, *both) for both in text[:VALID_SENTENCES]]
    context = Context(settings, tokenizer, inputs, pair, valid, {}, {})
    model = load(context)
    path = out / "scores.safetensors"
    if not path.exists():
        write_tensors(path, find_scores(model, context))
    context.scores.update(read_tensors(path))
    if scripts:
        path = out / "outputs.safetensors"
        if not path.exists():
            write_tensors(path, find_output_scores(model, context))
        context.scores.update(read_tensors(path))
    for name, own in lander.grow(
        out / "start.json", inputs.others, start_of(model, context)
    ).items():
        context.started[name] = {}
        for split, text in own.items():
            context.started[name][split] = [render(tokenizer, name, *both) for both in text]
    if not (out / "before.json").exists():
        scores = translate(model, context, inputs.test)
        write_json(
            out / "before.json", {"scores": scores, "valid_loss": valid_losses(model, context)}
        )
    return context


def start_of(model, context):
    """-> a function: pair -> split -> [(source, what the start makes of it), ...]"""

    def make(pair):
        found = {}
        for split, size in START_SENTENCES.items():
            text, _ = open_parallel(context.settings.data, split, pair)
            sources = [source for source, _ in text[:size]]
            what = context.tokenizer, pair, sources, context.settings
            found[split] = list(zip(sources, lander.translate_text(model, *what)[0]))
        return found

    return make


def find_scores(model, context):
    """What methods.py chooses units by, of all layers, as tensors by name."""
    scores, pair = {}, context.pair
    layers, readers = list(range(model.config.layers)), lander.NEURONS + lander.CHANNELS
    for name, examples in context.inputs.scoring.items():
        batches = micro_batches(context, examples)
        own = lander.neuron_awareness(model, batches, layers, readers)
        size = model.config.ffn_size
        scores[f"awareness {name}"] = own[:, :size].clone()
        scores[f"channels {name}"] = own[:, size:].clone()
        scores[f"activation {name}"], _ = activations(model, batches)
    prompts = [(prompt, []) for prompt, _ in context.inputs.scoring[pair]]
    prompts = micro_batches(context, prompts)
    scores["differences"] = lander.layer_differences(lander.activation_means(model, prompts))
    for code, sentences in by_language(context).items():
        batches = micro_batches(context, [(ids, []) for ids in sentences])
        _, scores[f"active {code}"] = activations(model, batches)
    return scores


def find_output_scores(model, context):
    """What the public scripts' recipe chooses layers and rows by."""
    scores, means = {}, []
    for examples in context.inputs.scoring.values():
        means.append(lander.activation_means(model, micro_batches(context, examples)))
    scores["differences with targets"] = lander.layer_differences(torch.stack(means).mean(0))
    for code, sentences in by_language(context).items():
        for name, own in methods.output_awareness(model, sentences).items():
            scores[f"outputs {code} {name}"] = own
    return scores


@torch.no_grad()
def activations(model, batches):
    """Mean |h| of every neuron, and the share of h, or its gate, above 0. -> two of [L, F]"""
    layers = range(model.config.layers)
    size, active, tokens = 0.0, 0.0, 0
    seen = {}

    def record(layer, module, inputs, output):
        seen[layer] = output

    handles = []
    for layer, block in enumerate(model.blocks):
        first = block.ffn.up if block.ffn.gate is None else block.ffn.gate
        handles.append(first.register_forward_hook(lambda *rest, layer=layer: record(layer, *rest)))
    with lander.recording(model, [(layer, "ffn.down") for layer in layers]) as h:
        for batch in batches:
            model.hidden_states(*lander.to_device(batch, model)[:2])
            real = batch.mask[..., None].to(seen[0].device)
            size += torch.stack(
                [(h[i, "ffn.down"].abs() * real).float().sum((0, 1)) for i in layers]
            )
            active += torch.stack([((seen[i] > 0) & real).float().sum((0, 1)) for i in layers])
            tokens += int(batch.mask.sum())
    for handle in handles:
        handle.remove()
    return (size / tokens).cpu(), (active / tokens).cpu()


def by_language(context):
    """Language -> ids of training sentences, of the first pair that has it."""
    found = {}
    for pair in context.inputs.scoring:
        text, _ = open_parallel(context.settings.data, "train", pair)
        for code, sentences in zip(
            split_pair(pair), zip(*text[: context.settings.score_sentences])
        ):
            if code not in found:
                found[code] = [context.tokenizer.encode(sentence) for sentence in sentences]
    return found


def check_grid(path, settings):
    """One folder holds one grid, of settings that are not the defaults. InputError if of others."""
    usual = vars(lander.read_settings())
    given = {key: own for key, own in vars(settings).items() if own != usual.get(key)}
    del given["out"]
    if path.exists() and read_json(path) != given:
        raise InputError(f"{path}: a grid with other settings, expected {json.dumps(given)}")
    write_json(path, given)


def run_grid(args, settings, out):
    """Run all that is not in results.jsonl yet."""
    names = args.methods.split(",")
    for name in names:
        parse_method(name)
    check_grid(out / "grid.json", settings)
    context, memory = prepare(settings, out, scripts="scripts" in args.methods), {}
    choices, path = list(product(args.seeds, args.rates, names)), out / "results.jsonl"
    translated = [settings.pair]
    if args.chosen:
        path, translated = out / "chosen.jsonl", list(context.inputs.test)
        best = {name: best_rate(rates) for name, rates in by_method(read_results(out)).items()}
        choices = [choice for choice in choices if choice[1] == best.get(choice[2])]
    for seed, rate, name in choices:
        done = {
            (line["seed"], line["rate"], line["method"]) for line in read_results(out, path.name)
        }
        if (seed, rate, name) in done:
            continue
        line = run_one(context, memory, name, rate, seed, translated)
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)
        bleu, drift = line["after"][settings.pair]["bleu"], mean(line["kl"].values())
        loss = line["valid_loss"][settings.pair]
        shown = f"loss {loss:.3f}, BLEU {bleu:.2f}, KL {drift:.4f}, {line['seconds']} s"
        print(f"{name} {rate:g} {seed}: {shown}", flush=True)


def read_results(out, name="results.jsonl"):
    """The lines of a grid."""
    path = out / name
    return [json.loads(line) for line in read_lines(path)] if path.exists() else []


def by_method(lines):
    """method -> rate -> its lines, one a seed"""
    found = {}
    for line in lines:
        found.setdefault(line["method"], {}).setdefault(line["rate"], []).append(line)
    return {name: dict(sorted(rates.items())) for name, rates in sorted(found.items())}


def best_rate(rates):
    """The rate with the lowest mean development loss of the tuned pair. rates: rate -> lines

    Of seeds that all rates have: some seeds are harder than others.
    """
    losses = {}
    seeds = set.intersection(*({line["seed"] for line in lines} for lines in rates.values()))
    for rate, lines in rates.items():
        loss = mean(line["valid_loss"][line["pair"]] for line in lines if line["seed"] in seeds)
        losses[rate] = math.inf if math.isnan(loss) else loss
    return min(losses, key=losses.get)


def build_toy(folder, seed):
    """The demo's text and checkpoint from another start, with more text to evaluate on."""
    demo.SPLIT_SENTENCES |= {"valid": 500, "test": 500}
    torch.manual_seed(seed)
    demo.build(folder)


def main(argv=None):
    floats = lambda text: [float(word) for word in text.split(",")]
    seeds = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default="lander,layers,lora-32")
    parser.add_argument("--rates", default=[1e-3], type=floats)
    parser.add_argument("--seeds", default=[0], type=seeds)
    parser.add_argument("--chosen", action="store_true", help="all --eval-pairs, at the best rates")
    parser.add_argument("--fast", action="store_true", help="see above")
    parser.add_argument("--toy", type=Path, help="make text and a checkpoint of toy languages here")
    args, rest = parser.parse_known_args(argv)
    if args.toy:
        return exit_status(build_toy, args.toy, *args.seeds)
    settings = lander.read_settings(rest, fast=args.fast)
    if not (settings.out and settings.weights and settings.data and settings.pair):
        parser.error("--weights, --data, --pair and --out name what to work on, and where to write")
    return exit_status(run_grid, args, settings, Path(settings.out))


if __name__ == "__main__":
    sys.exit(main())
