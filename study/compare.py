"""The method beside its rivals: same checkpoint, same batches, same steps, same evaluation.

    python study/compare.py --toy DIR --seeds 1          # toy languages, from another start
    python study/compare.py --weights W --data D --pair en-de --methods lander,layers,lora-all \\
        --rates 1e-3,3e-3 --seeds 0,1,2 --out DIR        # and any option of lander.py
    python study/compare.py ... --chosen                 # all pairs translated, at the best rates
    python study/compare.py --plot DIR                   # what was measured, without running

methods.py has the methods. Behind a name may stand, in this order:

    :300         only that many training sentences, in as many steps
    +replay      steps of the other pairs' scoring text, spread evenly between the tuned ones'
    +decay=R     weights decay to their start instead of to zero, and stay within R * rms of it
    +fisher=R    the same, each weight by how much other pairs' loss needs it
    +kl=B        adds B * KL(start || now) on other pairs' sources, with the start's translations

With several pairs in --pair, --tune says how: together, each alone (a cell for each), or in-turn,
one after another with evaluation after each.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, replace
from itertools import chain, islice, product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, bleu_tokenizer, exit_status, group_by_length, locked, make_batch
from data import make_batches, open_parallel, read_json, read_lines, read_tensors, render
from data import split_pair, write_json, write_lines, write_tensors
from model import load_model
from study import demo, methods
from study.methods import METHODS, Context


# --------------------------------------------------------------------------------------------------
# One cell


class Cell(NamedTuple):
    """What is trained, how, and on which pairs: a line of results.jsonl."""

    method: str  # with all that stands behind its name
    rate: float
    seed: int
    pairs: tuple

    def name(self):
        return f"{self.method} {self.rate:g} {self.seed} {','.join(self.pairs)}"


class Recipe(NamedTuple):
    """What the name of a method says."""

    name: str
    size: int | None  # training sentences
    replay: bool
    decay: float | None  # radius
    fisher: float | None  # radius
    kl: float | None  # weight


NUMBER = r"(\d*\.?\d+)"
FORM = rf"([^:+]+)(?::(\d+))?(\+replay)?(\+decay={NUMBER})?(\+fisher={NUMBER})?(\+kl={NUMBER})?"


def parse_method(text):
    """ "lora-all:300+kl=1" -> Recipe("lora-all", 300, False, None, None, 1.0)"""
    match = re.fullmatch(FORM, text)
    if not match or match[1] not in METHODS:
        expected = f"expected {', '.join(METHODS)}, with :N, +replay, +decay=R, +fisher=R, +kl=B"
        raise InputError(f"method {text!r}: {expected}")
    name, size, replay, _, decay, _, fisher, _, kl = match.groups()
    numbers = [number and float(number) for number in (decay, fisher, kl)]
    return Recipe(name, size and int(size), bool(replay), *numbers)


def spread_evenly(first, second):
    """Merge, each spread over the whole. [1, 2, 3, 4], [5, 6] -> [1, 5, 2, 3, 6, 4]"""
    placed = []
    for items in (first, second):
        placed += [((i + 0.5) / len(items), item) for i, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda both: both[0])]


def plan(text, others, recipe, settings):
    """The steps of a training, each [(pair, numbers of its sentences), ...].

    text, others: tuned and replayed pair -> sequence. The scripts mix all tuned pairs in a step.
    """
    batch, seed = settings.batch, settings.seed
    count = lander.count_steps(text, settings)
    sizes = {pair: len(own) for pair, own in text.items()}
    if recipe.name == "scripts":
        share = math.ceil(batch / len(sizes))
        turns = [lander.schedule({pair: size}, share, seed) for pair, size in sizes.items()]
        steps = list(islice(zip(*turns), count))
    else:
        steps = [[turn] for turn in islice(lander.schedule(sizes, batch, seed), count)]
    if recipe.replay:
        sizes = {pair: len(own) for pair, own in others.items()}
        count = sum(math.ceil(size / batch) for size in sizes.values())
        replayed = [[turn] for turn in islice(lander.schedule(sizes, batch, seed), count)]
        steps = spread_evenly(steps, replayed)
    return steps


KEPT_SENTENCES = 20  # that a step of +kl compares with the start


def train(model, context, learners, start, pairs, recipe):
    """Train on some of the pairs, as the recipe says; without keepers, what lander.py does.

    start: name -> what a parameter was before training
    """
    settings = context.settings
    tuned = {pair: context.inputs.train[pair] for pair in pairs}
    settings = replace(settings, steps=lander.count_steps(tuned, settings))
    if recipe.size:
        for pair, own in tuned.items():
            size = min(recipe.size, len(own))
            tuned[pair] = random.Random(settings.seed).sample(own, size)
    others = {pair: own for pair, own in context.inputs.scoring.items() if pair not in pairs}
    steps = plan(tuned, others, recipe, settings)
    parameters = lander.merged({pair: learners[pair] for pair in pairs})
    strengths = keeper_strengths(model, parameters, others, recipe)
    kept = [example for pair in others for example in context.start_text["train"].get(pair, [])]
    rng = random.Random(settings.seed)
    decay = 0.0 if strengths else lander.WEIGHT_DECAY
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=decay, fused=True)
    weighted_kl = lambda model, batch: (
        recipe.kl * methods.kl_from_start(model, batch, parameters, start)
    )
    progress = lander.Progress("training", len(steps), "steps")
    for number, turns in enumerate(steps):
        rate = lander.learning_rate(number, len(steps), settings.lr)
        optimizer.param_groups[0]["lr"] = rate
        learning = lander.merged({pair: learners.get(pair, parameters) for pair, _ in turns})
        model.requires_grad_(False)
        for parameter in learning.values():
            parameter.requires_grad_(True)
        examples = {}
        for pair, numbers in turns:
            if pair in tuned:
                own = [render(context.tokenizer, pair, *tuned[pair][i]) for i in numbers]
                examples[pair] = lander.short_enough(own, context.inputs.max_tokens)
            else:
                examples[pair] = [others[pair][i] for i in numbers]
        add_gradients(model, context, examples, lander.target_loss)
        if recipe.kl is not None:
            chosen = rng.sample(kept, min(KEPT_SENTENCES, len(kept)))
            add_gradients(model, context, {None: chosen}, weighted_kl)
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), lander.CLIP_NORM)
        if norm.isfinite():
            optimizer.step()
            if strengths:
                methods.pull_to_start(parameters, start, strengths, rate)
        optimizer.zero_grad(set_to_none=True)
        progress.add(1)
    model.requires_grad_(False)


def micro_batches(context, examples):
    return list(make_batches(examples, context.tokenizer.pad_id, context.settings.micro_tokens))


def add_gradients(model, context, examples, loss_of):
    """Of what loss_of(model, batch) sums up, for a target token. examples: pair -> those of a step"""
    batches = {pair: micro_batches(context, own) for pair, own in examples.items()}
    tokens = sum(lander.count_targets(own) for own in batches.values())
    for pair, own in batches.items():
        methods.route(model, pair)
        for batch in own:
            (loss_of(model, batch) / tokens).backward()


FISHER_SENTENCES = 20  # of each other pair


def keeper_strengths(model, parameters, others, recipe):
    """name -> how strongly decay pulls it to its start; {} without such a keeper."""
    if recipe.decay:
        return methods.pulls(model, parameters, recipe.decay)
    if not recipe.fisher:
        return {}
    strengths = methods.pulls(model, parameters, recipe.fisher)
    examples = chain.from_iterable(own[:FISHER_SENTENCES] for own in others.values())
    needed = methods.fisher(model, parameters, examples)
    return {name: needed[name] * strength for name, strength in strengths.items()}


def run_cell(context, out, cell, tune, everything=False):
    """Train and measure one method. everything: translate the other pairs' test text, too

    -> its line of results.jsonl; pair -> what sentence_losses gives; and what bleu_counts gives
    """
    began = time.process_time()
    recipe = parse_method(cell.method)
    settings = replace(context.settings, lr=cell.rate, seed=cell.seed)
    context = context._replace(settings=settings, tuned=list(cell.pairs))
    folder = out / "cells" / cell.name()
    torch.manual_seed(cell.seed)
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    learners = METHODS[recipe.name](model, context)
    parameters = lander.merged(learners)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    line = {"method": cell.method, "rate": cell.rate, "seed": cell.seed, "pairs": cell.pairs}
    line["trained"] = sum(p.numel() for p in parameters.values())
    if tune == "in-turn":
        line["stages"] = {}
        for pair in cell.pairs:
            train(model, context, learners, start, [pair], recipe)
            line["stages"][pair], _ = evaluate(model, context, context.inputs.test, folder / pair)
    else:
        train(model, context, learners, start, context.tuned, recipe)
    losses = sentence_losses(model, context)
    line["valid_loss"] = mean_losses(losses, context)
    line["plain_loss"] = plain_losses(model, context)
    line["kl"] = drift_from_start(model, context, parameters, start)
    wanted = context.inputs.test if everything or tune == "in-turn" else cell.pairs
    line["after"], counts = evaluate(model, context, wanted, folder)
    line["seconds"] = round(time.process_time() - began, 1)  # of a core
    return line, losses, counts


# --------------------------------------------------------------------------------------------------
# What is measured


VALID_SENTENCES = 100  # of each pair


@torch.no_grad()
def sentence_losses(model, context):
    """pair -> the summed loss of each valid sentence, [V]"""
    losses = {}
    for pair, examples in context.valid.items():
        methods.route(model, pair)
        losses[pair] = torch.zeros(len(examples))
        lengths = [len(prompt) + len(target) for prompt, target in examples]
        for group in group_by_length(lengths, context.settings.micro_tokens):
            batch = make_batch([examples[i] for i in group], context.tokenizer.pad_id)
            targets = batch.targets.to(model.embedding.weight.device)
            each = torch.zeros(targets.shape, device=targets.device)  # [B, T]
            found = methods.log_probabilities(model, batch)  # [N, V]
            wanted = targets != -100
            each[wanted] = -found.gather(1, targets[wanted][:, None])[:, 0]
            losses[pair][group] = each.sum(1).cpu()
    return losses


def target_tokens(context):
    """pair -> target tokens of each valid sentence, [V]"""
    tokens = {}
    for pair, examples in context.valid.items():
        tokens[pair] = torch.tensor([float(len(target)) for _, target in examples])
    return tokens


def mean_losses(losses, context):
    """pair -> loss of a target token"""
    tokens = target_tokens(context)
    return {pair: (own.sum() / tokens[pair].sum()).item() for pair, own in losses.items()}


def plain_losses(model, context):
    """Language -> loss of a token of its valid text, with no prompt but the line's first token."""
    losses = {}
    for code, lines in context.plain.items():
        batches = micro_batches(context, [(ids[:1], ids[1:]) for ids in lines])
        losses[code] = lander.validation_loss(model, None, batches)
    return losses


@torch.no_grad()
def drift_from_start(model, context, parameters, start):
    """Untuned pair -> KL(start || now) of a token of the start's own translations."""
    drifts = {}
    methods.route(model, None)
    for pair, examples in context.start_text["valid"].items():
        if pair not in context.tuned:
            batches = micro_batches(context, examples)
            total = 0.0
            for batch in batches:
                total += methods.kl_from_start(model, batch, parameters, start).item()
            drifts[pair] = total / lander.count_targets(batches)
    return drifts


def evaluate(model, context, pairs, folder):
    """-> {pair: {"bleu", "chrf"}}, and {pair: what BLEU counts in each sentence}; writes hypotheses."""
    scores, counts = {}, {}
    for pair in pairs:
        text = context.inputs.test[pair]
        what = context.tokenizer, pair, text, context.settings
        limit = context.inputs.new_tokens.get(pair, lander.NEW_TOKENS)
        methods.route(model, pair)
        lines, found = lander.evaluate(model, *what, limit)
        write_lines(folder / f"{pair}.txt", lines)
        scores[pair] = {metric: round(found[metric], 3) for metric in ("bleu", "chrf")}
        counts[pair] = bleu_counts(pair, lines, [target for _, target in text])
    return scores, counts


def bleu_counts(pair, hypotheses, references):
    """Of each sentence the words of hypothesis and reference, and the matches of 1 to 4 words. [N, 6]"""
    metric = BLEU(tokenize=bleu_tokenizer(split_pair(pair)[1]), effective_order=True)
    rows = []
    for hypothesis, reference in zip(hypotheses, references):
        score = metric.sentence_score(hypothesis, [reference])
        rows.append([score.sys_len, score.ref_len, *score.counts])
    return torch.tensor(rows, dtype=torch.int16)


KINDS = TUNED, SAME_TARGET, OTHER_TARGET = "tuned", "same target", "other target"


def kind_of(pair, tuned):
    """Which of KINDS a pair is: tuned, or into the same language as a tuned one, or into another."""
    if pair in tuned:
        return TUNED
    targets = {split_pair(own)[1] for own in tuned}
    return SAME_TARGET if split_pair(pair)[1] in targets else OTHER_TARGET


def by_kind(values, tuned):
    """Sum tensors of pairs over pairs of a kind. {pair: [V]} -> [3, V]"""
    total = torch.zeros(len(KINDS), len(next(iter(values.values()))))
    for pair, own in values.items():
        total[KINDS.index(kind_of(pair, tuned))] += own
    return total


# --------------------------------------------------------------------------------------------------
# A grid


def prepare(settings, out):
    """Read what all cells need; score layers, neurons and channels once, of all layers. -> Context"""
    tuned = lander.choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer, _ = lander.open_checkpoint(settings.weights)
    lander.select_layers(torch.zeros(config.layers - 1), settings.layers)  # too many show at once
    inputs = lander.read_inputs(tokenizer, tuned, settings)
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    path = out / "layers.json"
    lander.analyse_layers(model, tokenizer, inputs.scoring, tuned, settings, path)
    differences = {pair: own["differences"] for pair, own in read_json(path).items()}
    path = out / "awareness.safetensors"
    if not path.exists():
        write_tensors(path, score(model, tokenizer, inputs, settings))
    scores = read_tensors(path)
    neurons = torch.stack([scores[f"{pair} ffn.down"] for pair in inputs.scoring])  # [P, L, F]
    channels = torch.stack([scores[f"{pair} attention.output"] for pair in inputs.scoring])
    languages = {}
    for name, own in scores.items():
        if name.startswith("language "):
            _, code, module = name.split(" ")
            languages.setdefault(code, {})[module] = own
    adjacent = methods.adjacent_layers(scores["differences with targets"], settings.layers)
    valid, plain = read_valid(tokenizer, inputs, settings)
    translate = lambda split: translate_sources(model, tokenizer, inputs, settings, split)
    start_text = {}
    for split, pairs in lander.grow(out / "start.json", START_SENTENCES, translate).items():
        start_text[split] = {}
        for pair, text in pairs.items():
            start_text[split][pair] = [render(tokenizer, pair, *both) for both in text]
    units = differences, neurons, channels, adjacent, languages
    context = Context(settings, tokenizer, inputs, tuned, *units, valid, plain, start_text)
    if not (out / "before.json").exists():
        write_before(model, context, out)
    return context


def first_texts(inputs, settings, split, size):
    """pair -> its first sentences of a split, [(source, target), ...]"""
    return {pair: open_parallel(settings.data, split, pair)[:size] for pair in inputs.scoring}


def by_language(tokenizer, texts):
    """Language -> ids of each sentence, of the first text that has it. texts: as of first_texts"""
    languages = {}
    for pair, text in texts.items():
        for code, sentences in zip(split_pair(pair), zip(*text)):
            if code not in languages:
                languages[code] = [tokenizer.encode(sentence) for sentence in sentences]
    return languages


def score(model, tokenizer, inputs, settings):
    """All that methods.py chooses units by, as tensors by name."""
    scores = {}
    means = []
    texts = first_texts(inputs, settings, "train", settings.score_sentences)
    for pair, examples in inputs.scoring.items():
        batches = list(make_batches(examples, tokenizer.pad_id, settings.micro_tokens))
        for reader in ("ffn.down", "attention.output"):
            made = lander.counted(batches, f"scoring {pair}, {reader}", len(examples))
            own = lander.neuron_awareness(model, made, range(model.config.layers), reader)
            scores[f"{pair} {reader}"] = own
        means.append(lander.activation_means(model, batches))
    scores["differences with targets"] = lander.layer_differences(torch.stack(means).mean(0))
    for code, sentences in by_language(tokenizer, texts).items():
        for name, own in methods.output_awareness(model, sentences).items():
            scores[f"language {code} {name}"] = own
    return scores


def read_valid(tokenizer, inputs, settings):
    """The first valid sentences, of every pair the same ones. -> pair -> rendered; language -> ids"""
    texts = first_texts(inputs, settings, "valid", VALID_SENTENCES)
    if len({len(text) for text in texts.values()}) > 1:
        raise InputError(f"{settings.data}: valid text is not the same sentences in all pairs")
    valid = {}
    for pair, text in texts.items():
        valid[pair] = [render(tokenizer, pair, *both) for both in text]
    return valid, by_language(tokenizer, texts)


START_SENTENCES = {"train": 60, "valid": 30}  # of each pair


def translate_sources(model, tokenizer, inputs, settings, split):
    """pair -> [(source, what the start makes of it), ...]"""
    translated = {}
    for pair, text in first_texts(inputs, settings, split, START_SENTENCES[split]).items():
        sources = [source for source, _ in text]
        what = pair, list(enumerate(sources)), settings, f"translating {pair}"
        lines = lander.translate_lines(model, tokenizer, *what)
        translated[pair] = [(sources[number], line) for number, line, _ in lines]
    return translated


def write_before(model, context, out):
    """What every pair has before training: before.json, and sentences.safetensors of each pair."""
    scores, counts = evaluate(model, context, context.inputs.test, out / "before")
    losses = sentence_losses(model, context)
    tokens = target_tokens(context)
    tensors = {f"before {pair} bleu": own for pair, own in counts.items()}
    for pair in losses:
        tensors |= {f"before {pair} loss": losses[pair], f"before {pair} tokens": tokens[pair]}
    write_tensors(out / "sentences.safetensors", tensors)
    before = {"scores": scores, "valid_loss": mean_losses(losses, context)}
    write_json(out / "before.json", before | {"plain_loss": plain_losses(model, context)})


def check_grid(path, settings, tune):
    """One folder holds one grid, of settings that are not the defaults. InputError if of others."""
    defaults = asdict(lander.Settings())
    given = {key: own for key, own in asdict(settings).items() if own != defaults[key]}
    del given["out"]
    given["tune"] = tune
    if path.exists() and read_json(path) != given:
        raise InputError(f"{path}: a grid with other settings, expected {json.dumps(given)}")
    write_json(path, given)


def run_grid(args, settings, out):
    """Run every cell that is not in results.jsonl yet."""
    names = args.methods.split(",")
    for name in names:
        parse_method(name)
    check_grid(out / "grid.json", settings, args.tune)
    context = prepare(settings, out)
    tuned = [(pair,) for pair in context.tuned] if args.tune == "each" else [tuple(context.tuned)]
    choices = product(args.seeds, args.rates, names, tuned)
    cells = [Cell(name, rate, seed, pairs) for seed, rate, name, pairs in choices]
    path = out / "results.jsonl"
    if args.chosen:
        path = out / "chosen.jsonl"
        best = {name: best_rate(rates) for name, rates in by_method(read_results(out)).items()}
        cells = [cell for cell in cells if cell.rate == best[cell.method]]
    done = {key(line) for line in read_results(out, path.name)}
    for cell in cells:
        if cell in done:
            continue
        line, losses, counts = run_cell(context, out, cell, args.tune, args.chosen)
        if len(cell.pairs) == 1 and not args.chosen:
            write_sentences(out / "sentences.safetensors", cell, losses, counts)
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(line, ensure_ascii=False), file=file)
        gained = "".join(f" {line['after'][pair]['bleu']:.2f}" for pair in cell.pairs)
        drift = mean(line["kl"].values()) if line["kl"] else math.nan
        lander.say(f"{cell.name()}: BLEU{gained}, KL {drift:.4f}, {line['seconds']} s")


def write_sentences(path, cell, losses, counts):
    """Add a cell's [N, 6] of bleu_counts, and how the losses changed by kind, [3, V] in 16 bits."""
    tensors = read_tensors(path)
    before = {pair: tensors[f"before {pair} loss"] for pair in losses}
    change = by_kind(losses, cell.pairs) - by_kind(before, cell.pairs)
    tensors[f"{cell.name()} bleu"] = counts[cell.pairs[0]]
    tensors[f"{cell.name()} loss"] = change.half()
    write_tensors(path, tensors)


# --------------------------------------------------------------------------------------------------
# What was measured


def read_results(out, name="results.jsonl"):
    """The lines of a grid, each with what its pairs had before training."""
    path = out / name
    if not path.exists():
        return []
    lines = [json.loads(line) for line in read_lines(path)]
    before = read_json(out / "before.json")
    return [{"before": before.get("scores", before)} | line for line in lines]


def key(line):
    return Cell(line["method"], line["rate"], line["seed"], tuple(line["pairs"]))


def gains(line, metric="bleu"):
    """Mean change of a score, by kind of pair; "others" are all but the tuned ones. NaN for none."""
    kinds = {kind: [] for kind in (*KINDS, "others")}
    for pair, after in line["after"].items():
        change = after[metric] - line["before"][pair][metric]
        kind = kind_of(pair, line["pairs"])
        kinds[kind].append(change)
        if kind != TUNED:
            kinds["others"].append(change)
    return {kind: mean(own) if own else math.nan for kind, own in kinds.items()}


def changes(lines, kind, metric="bleu"):
    """gains() of one kind, of several lines."""
    return [gains(line, metric)[kind] for line in lines]


def by_method(lines):
    """method -> rate -> its lines, a seed or a pair each"""
    cells = {}
    for line in lines:
        cells.setdefault(line["method"], {}).setdefault(line["rate"], []).append(line)
    return {name: dict(sorted(rates.items())) for name, rates in sorted(cells.items())}


def valid_loss(lines):
    """The mean validation loss of the tuned pairs, over lines."""
    return mean(line["valid_loss"][pair] for line in lines for pair in line["pairs"])


def best_rate(rates):
    """The rate with the lowest mean validation loss of the tuned pairs. rates: rate -> lines"""
    return min(rates, key=lambda rate: valid_loss(rates[rate]))


def at_best_rate(lines):
    """The lines of each method at its best rate."""
    return [line for rates in by_method(lines).values() for line in rates[best_rate(rates)]]


def spread(values):
    """ "+1.23 (+1.10 to +1.40)" """
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def table(head, rows):
    """Print a table in Markdown."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    print()
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [f"{cell!s:<{width}}" for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |")


def show_table(lines):
    """Change of BLEU over seeds, of every method at every rate."""
    rows = []
    for name, rates in by_method(lines).items():
        for rate, own in rates.items():
            shown = [spread(changes(own, kind)) for kind in ("tuned", "others")]
            rows.append([name, f"{rate:g}", len(own), f"{valid_loss(own):.3f}", *shown])
    table(["method", "rate", "cells", "valid", "tuned", "others"], rows)


def pyplot():
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lander", "font.size": 9})
    return plt


def save(figure, path):
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


MARKERS = "osD^vPX<>*dph"


def dots_and_means(axes, groups, label, **style):
    """A dot for each (x, y) of each group, and a line through the groups' means."""
    for points in groups:
        axes.plot(*zip(*points), linestyle="", alpha=0.35, markersize=4, **style)
    means = [[mean(values) for values in zip(*points)] for points in groups]
    axes.plot(*zip(*means), label=label, linewidth=1, **style)


def show_stages(lines):
    """Pairs tuned one after another: what the first gained after each, and all at the end."""
    pairs = lines[0]["pairs"]
    places = [(stage, pairs[0]) for stage in pairs] + [(pairs[-1], pair) for pair in pairs[1:]]
    rows = []
    for name, rates in by_method(lines).items():
        for rate, own in rates.items():
            row = [name, f"{rate:g}", len(own)]
            for stage, pair in places:
                after = mean(line["stages"][stage][pair]["bleu"] for line in own)
                row.append(f"{after - own[0]['before'][pair]['bleu']:+.1f}")
            rows.append([*row, *(spread(changes(own, kind)) for kind in ("tuned", "others"))])
    rows.sort(key=lambda row: float(row[3]))  # by what the first pair gained alone
    stages = [f"{pair} after {stage}" for stage, pair in places]
    table(["method", "rate", "cells", *stages, f"mean of {len(pairs)}", "others"], rows)


def draw_cells(axes, values, texts, rows, columns, limits, cmap):
    """A map with text in its cells. values: [rows, columns], NaN for none; texts: cell -> text"""
    mesh = {"cmap": cmap, "vmin": limits[0], "vmax": limits[1]}
    axes.pcolormesh(values.numpy(), edgecolors="white", linewidth=1, **mesh)
    axes.invert_yaxis()
    for (row, column), text in texts.items():
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.tick_params(length=0)


CURVES = {  # file -> methods with a number in their names, label of the number, logarithmic
    "layers.svg": (r"(k)=(\d+)", "k, layers that learn", False),
    "epsilon.svg": (r"(epsilon)=([\d.]+)", "epsilon, share of general neurons", False),
    "sentences.svg": (r"([\w-]+):(\d+)", "training sentences", True),
}


def draw_curve(lines, pattern, label, logarithmic, path):
    """Change of BLEU of the tuned and the other pairs over the number in the methods' names."""
    found = {}  # name -> number -> lines
    for line in sorted(at_best_rate(lines), key=lambda line: line["method"]):
        name, number = re.fullmatch(pattern, line["method"]).groups()
        found.setdefault(name, {}).setdefault(float(number), []).append(line)
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    rows = []
    for number, (name, points) in enumerate(found.items()):
        points = dict(sorted(points.items()))
        for axes, kind in zip(panels, ("tuned", "others")):
            groups = [[(x, change) for change in changes(own, kind)] for x, own in points.items()]
            dots_and_means(axes, groups, name, color=plt.cm.tab10(number % 10), marker="o")
            axes.set(xlabel=label, ylabel=f"mean change of BLEU, {kind}")
            axes.set_xscale("log" if logarithmic else "linear")
        for x, own in points.items():
            shown = [spread(changes(own, kind)) for kind in ("tuned", "others")]
            rows.append([name, f"{x:g}", len(own), *shown])
    for axes in panels:
        axes.grid(alpha=0.3)
    if len(found) > 1:
        panels[1].legend(fontsize=7)
    figure.tight_layout()
    save(figure, path)
    table(["method", label, "cells", "tuned", "others"], rows)


def plot(out):
    """Tables and figures of a grid, from its committed results alone."""
    lines = read_results(out)
    grid = read_json(out / "grid.json")
    print(f"\n{out}: {json.dumps(grid)}")
    for name, (pattern, *looks) in CURVES.items():
        in_curve = [line for line in lines if re.fullmatch(pattern, line["method"])]
        lines = [line for line in lines if line not in in_curve]
        if in_curve:
            draw_curve(in_curve, pattern, *looks, out / name)
    if lines and grid["tune"] == "in-turn":
        show_stages(lines)
    elif lines:
        show_table(lines)


def run_or_plot(parser, argv, show, work):
    """--plot FOLDER ... shows what was found there; else any option of lander.py, and work.

    show: folder -> None; work: (the parser's options, Settings, Path of --out) -> None
    """
    parser.add_argument("--plot", type=Path, nargs="+", help="folders of results; nothing is run")
    args, rest = parser.parse_known_args(argv)

    def command():
        for folder in args.plot or []:
            show(folder)
        if args.plot:
            return
        settings = lander.Settings(**lander.parse_arguments(rest))
        if not (settings.out and settings.weights and settings.data):
            raise InputError("--weights, --data and --out name what to work on, and where to write")
        with locked(Path(settings.out)):
            work(args, settings, Path(settings.out))

    return exit_status(command)


def main(argv=None):
    floats = lambda text: [float(word) for word in text.split(",")]
    seeds = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default="lander,layers,lora-all")
    parser.add_argument("--rates", default=[1e-3], type=floats)
    parser.add_argument("--seeds", default=[0], type=seeds)
    parser.add_argument("--tune", default="together", choices=("together", "each", "in-turn"))
    parser.add_argument("--chosen", action="store_true", help="all pairs, at the best rates")
    parser.add_argument("--toy", type=Path, help="make text and a checkpoint of toy languages here")
    args, _ = parser.parse_known_args(argv)
    if args.toy:
        return exit_status(build_toy, args.toy, *args.seeds)
    return run_or_plot(parser, argv, plot, run_grid)


def build_toy(folder, seed):
    """The demo's text and checkpoint from another start, with more text to evaluate on."""
    demo.SPLIT_SENTENCES |= {"valid": 500, "test": 500}
    torch.manual_seed(seed)
    demo.build(folder)


if __name__ == "__main__":
    sys.exit(main())
