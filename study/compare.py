"""The method beside its rivals: same checkpoint, same batches, same steps, same evaluation.

    python study/compare.py --weights W --data D --pair en-de --methods lander,layers,lora-all \\
        --rates 1e-3,3e-3 --seeds 0,1,2 --out DIR        # and any option of lander.py
    python study/compare.py --plot DIR                   # what was measured, without running

One cell is a method at a learning rate with a seed: a line in DIR/results.jsonl. Cells that are
there are passed over, so that a grid can be stopped, go on, and be split over machines.

methods.py has the methods. Behind a name may stand, in this order:

    :300        only that many training sentences, in as many steps
    +replay     batches of the other pairs' scoring text come between the tuned ones', steps of their own
    +l2         weights decay to where they started instead of to zero, by 10; +l2=3 by 3

With several pairs in --pair, --tune says how: together, each alone (a cell for each), or in-turn, one
after another with evaluation after each.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, exit_status, locked, make_batches, read_json, read_lines, read_tensors
from data import split_pair, write_json, write_tensors
from model import load_model
from study.methods import GROUPS, L2_DECAY, METHODS, Context, draw_to_start


# --------------------------------------------------------------------------------------------------
# One cell


class Cell(NamedTuple):
    """What is trained, how, and on which pairs."""

    method: str  # with all that stands behind its name
    rate: float
    seed: int
    pairs: tuple

    def folder(self, out):
        return out / "cells" / f"{self.method} {self.rate:g} {self.seed} {','.join(self.pairs)}"


class Recipe(NamedTuple):
    """What the name of a method says."""

    name: str
    size: int | None  # training sentences
    replay: bool
    l2: float | None  # AdamW's decay to the start


def parse_method(text):
    """ "lora-all:300+replay" -> Recipe("lora-all", 300, True, None)

    InputError for what is no method.
    """
    match = re.fullmatch(r"([^:+]+)(?::(\d+))?(\+replay)?(\+l2(?:=(\d+))?)?", text)
    if not match or match[1] not in METHODS:
        raise InputError(f"method {text!r}: expected {', '.join(METHODS)}, with :N, +replay, +l2")
    name, size, replay, l2, decay = match.groups()
    return Recipe(name, size and int(size), bool(replay), float(decay or L2_DECAY) if l2 else None)


def run_cell(context, out, cell, in_turn=False):
    """Train and evaluate one method. -> its line of results.jsonl"""
    began = time.monotonic()
    recipe = parse_method(cell.method)
    settings = replace(context.settings, lr=cell.rate, seed=cell.seed)
    context = context._replace(settings=settings, tuned=list(cell.pairs))
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cell.seed)
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    learners = METHODS[recipe.name](model, context)
    line = {"method": cell.method, "rate": cell.rate, "seed": cell.seed, "pairs": cell.pairs}
    line["trained"] = sum(p.numel() for p in lander.merged(learners).values())
    if in_turn:
        line["stages"] = {}
        for pair in cell.pairs:
            train(model, context, learners, [pair], recipe, folder / pair)
            line["stages"][pair] = evaluate(model, context, folder / pair)
    else:
        train(model, context, learners, context.tuned, recipe, folder)
    valid = {pair: context.inputs.valid[pair] for pair in cell.pairs}
    line["valid_loss"] = lander.validation_loss(model, context.tokenizer, valid, settings)
    line["before"] = read_json(out / "before.json", {})
    line["after"] = evaluate(model, context, folder)
    line["seconds"] = round(time.monotonic() - began, 1)
    return line


def train(model, context, learners, pairs, recipe, folder):
    """lander.py's training of some of the pairs, as the recipe says."""
    settings = context.settings
    learners = {pair: learners[pair] for pair in pairs}
    examples = {pair: context.inputs.train[pair] for pair in pairs}
    settings = replace(settings, steps=lander.count_steps(examples, settings))
    if recipe.size:
        for pair, own in examples.items():
            size = min(recipe.size, len(own))
            examples[pair] = random.Random(settings.seed).sample(own, size)
    if recipe.replay:
        everything = lander.merged(learners)
        for pair, own in context.inputs.scoring.items():
            if pair not in examples:
                examples[pair], learners[pair] = own, everything
                more = math.ceil(len(own) / settings.batch)
                settings = replace(settings, steps=settings.steps + more)
    decay = lander.WEIGHT_DECAY
    if recipe.l2 is not None:
        learners, decay = draw_to_start(model, learners), recipe.l2
    lander.train(model, context.tokenizer, learners, examples, {}, settings, folder, decay)
    (folder / "state.safetensors").unlink()


def evaluate(model, context, folder):
    """-> {pair: {"bleu", "chrf"}}; hypotheses go to the folder."""
    scores = {}
    for pair, text in context.inputs.test.items():
        path = folder / f"{pair}.txt"
        found = lander.evaluate(model, context.tokenizer, pair, text, context.settings, path)
        scores[pair] = {metric: round(found[metric], 3) for metric in ("bleu", "chrf")}
    return scores


# --------------------------------------------------------------------------------------------------
# A grid


def prepare(settings, out):
    """Read what all cells need; score layers, neurons and channels once, of all layers. -> Context"""
    tuned = lander.choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer = lander.open_checkpoint(settings.weights)
    lander.check_layer_count(settings.layers, config.layers - 1)
    inputs = lander.read_inputs(tokenizer, tuned, settings)
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    path = out / "layers.json"
    lander.analyse_layers(model, tokenizer, inputs.scoring, tuned, settings, path)
    analysis = read_json(path, {str: {"differences": [float]}})
    differences = {pair: analysis[pair]["differences"] for pair in tuned}
    path = out / "awareness.safetensors"
    if not path.exists():
        scores = {}
        for pair, examples in inputs.scoring.items():
            for reader in ("ffn.down", "attention.output"):
                batches = make_batches(examples, tokenizer.pad_id, settings.micro_tokens)
                batches = lander.counted(batches, f"scoring {pair}, {reader}", len(examples))
                name = f"{pair} {reader}"
                scores[name] = lander.neuron_awareness(model, batches, range(config.layers), reader)
        write_tensors(path, scores)
    scores = read_tensors(path)
    neurons = torch.stack([scores[f"{pair} ffn.down"] for pair in inputs.scoring])  # [P, L, F]
    channels = torch.stack([scores[f"{pair} attention.output"] for pair in inputs.scoring])
    context = Context(settings, tokenizer, inputs, tuned, differences, neurons, channels)
    if not (out / "before.json").exists():
        write_json(out / "before.json", evaluate(model, context, out / "before"))
    references = {pair: [target for _, target in inputs.test.get(pair, [])] for pair in tuned}
    write_json(out / "references.json", references)
    return context


def given(settings):
    """The settings that differ from the defaults, and say what a grid is."""
    defaults = asdict(lander.Settings())
    values = asdict(settings).items()
    return {key: value for key, value in values if value != defaults[key] and key != "out"}


def check_grid(path, settings, tune):
    """One folder holds one grid. InputError if it holds another."""
    recorded = given(settings) | {"tune": tune}
    if path.exists() and read_json(path, {}) != recorded:
        raise InputError(f"{path}: a grid with other settings, expected {json.dumps(recorded)}")
    write_json(path, recorded)


def append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        print(json.dumps(line, ensure_ascii=False), file=file)


def run_grid(args, settings, out):
    """Run every cell that is not in results.jsonl yet."""
    methods = args.methods.split(",")
    for name in methods:
        parse_method(name)
    check_grid(out / "grid.json", settings, args.tune)
    done = {key(line) for line in read_results(out)}
    context = prepare(settings, out)
    together = [tuple(context.tuned)]
    if args.tune == "each":
        together = [(pair,) for pair in context.tuned]
    for seed, rate, name, pairs in product(args.seeds, args.rates, methods, together):
        cell = Cell(name, rate, seed, pairs)
        if cell not in done:
            run_and_write(context, out, cell, args.tune)


def run_and_write(context, out, cell, tune):
    """Run a cell. Its hypotheses for the tuned pairs are kept, for the paired bootstrap."""
    line = run_cell(context, out, cell, tune == "in-turn")
    for pair in cell.pairs:
        if pair in context.inputs.test:
            known = cell._replace(pairs=pair)._asdict()
            text = read_lines(cell.folder(out) / f"{pair}.txt")
            append(out / "hypotheses.jsonl", known | {"hypotheses": text})
    append(out / "results.jsonl", line)
    change = gains(line)
    gained = f"tuned {change['tuned']:+.2f}, others {change['others']:+.2f}"
    lander.say(f"{cell.method} {cell.rate:g} {cell.seed} {','.join(cell.pairs)}: {gained}")


# --------------------------------------------------------------------------------------------------
# What was measured


def read_results(out):
    path = out / "results.jsonl"
    return [json.loads(line) for line in read_lines(path)] if path.exists() else []


def key(line):
    return Cell(line["method"], line["rate"], line["seed"], tuple(line["pairs"]))


def gains(line):
    """Mean change of BLEU: of the tuned pairs, of all others, and of those into the same language
    as a tuned pair and those into another. NaN for none."""
    into = {split_pair(pair)[1] for pair in line["pairs"]}
    kinds = {"tuned": [], "others": [], "same target": [], "other target": []}
    for pair, after in line["after"].items():
        change = after["bleu"] - line["before"][pair]["bleu"]
        if pair in line["pairs"]:
            kinds["tuned"].append(change)
        else:
            kinds["others"].append(change)
            same = split_pair(pair)[1] in into
            kinds["same target" if same else "other target"].append(change)
    return {kind: mean(own) if own else math.nan for kind, own in kinds.items()}


def by_method(lines):
    """method -> rate -> its lines, a seed or a pair each"""
    cells = {}
    for line in lines:
        cells.setdefault(line["method"], {}).setdefault(line["rate"], []).append(line)
    return {name: dict(sorted(rates.items())) for name, rates in sorted(cells.items())}


def valid_loss(lines):
    """The mean validation loss of the tuned pairs, over lines."""
    return mean(loss for line in lines for loss in line["valid_loss"].values())


def best_rate(rates):
    """The rate with the lowest mean validation loss of the tuned pairs. rates: rate -> lines"""
    return min(rates, key=lambda rate: valid_loss(rates[rate]))


EQUAL_FORGETTING = 1.0, 2.0  # BLEU


def gain_at_equal_forgetting(rates, limit):
    """The gain where the other pairs lose `limit` BLEU, or less: the highest on the line from the
    start through the means at each rate. rates: rate -> lines"""
    points = [(0.0, 0.0)]  # lost by the others, gained by the tuned
    for lines in rates.values():
        lost = -mean(gains(line)["others"] for line in lines)
        points.append((lost, mean(gains(line)["tuned"] for line in lines)))
    best = max(gained for lost, gained in points if lost <= limit)
    for (lost, gained), (more_lost, more_gained) in zip(points, points[1:]):
        if min(lost, more_lost) <= limit < max(lost, more_lost):
            way = (limit - lost) / (more_lost - lost)
            best = max(best, gained + way * (more_gained - gained))
    return best


def spread(values):
    """ "+1.23 (+1.10 to +1.40)" """
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def show_table(lines):
    """Change of BLEU over seeds, of every method at its best rate, and at equal forgetting."""
    print(f"{'method':<21}{'rate':>7}{'cells':>6}{'weights':>10}{'valid':>7}", end="")
    print(f"{'tuned':>27}{'others':>27}  tuned, where others lose {EQUAL_FORGETTING}")
    for name, rates in by_method(lines).items():
        rate = best_rate(rates)
        own = rates[rate]
        row = f"{name:<21}{rate:>7g}{len(own):>6}{own[0]['trained']:>10,}{valid_loss(own):>7.3f}"
        for kind in ("tuned", "others"):
            row += f"{spread([gains(line)[kind] for line in own]):>27}"
        for limit in EQUAL_FORGETTING:
            row += f"{gain_at_equal_forgetting(rates, limit):>+10.2f}"
        print(row)


def pyplot():
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lander", "font.size": 9})
    return plt


def save(figure, path):
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


FARTHEST = -12  # what forgets more is off the picture
IN_EVERY_ROW = {"lander": "black", "lora-all": "dimgray", "attention": "darkgray"}
MARKERS = "osD^vPX<>*dph"


def draw_front(lines, path):
    """What was gained against what was forgotten: a line a method from the start over its rates, a
    dot a seed."""
    plt = pyplot()
    cells = by_method(lines)
    placed = set().union(*GROUPS.values())
    rows = GROUPS | {"decay to the start, replay": [name for name in cells if "+" in name]}
    rows["what lost"] = [name for name in cells if name not in placed and "+" not in name]
    rows = {title: group for title, group in rows.items() if cells.keys() & group}
    shape = {"figsize": (11, 3.4 * len(rows)), "squeeze": False}
    figure, panels = plt.subplots(len(rows), 2, sharex=True, sharey=True, **shape)
    for row, (title, group) in zip(panels, rows.items()):
        names = [name for name in IN_EVERY_ROW if name in cells]
        names += [name for name in group if name in cells and name not in IN_EVERY_ROW]
        for number, name in enumerate(names):
            color = IN_EVERY_ROW.get(name) or plt.cm.tab10(number % 10)
            style = {"color": color, "marker": MARKERS[number % len(MARKERS)]}
            for axes, kind in zip(row, ("same target", "other target")):
                means = [(0.0, 0.0)]
                for own in cells[name].values():
                    points = [(gains(line)[kind], gains(line)["tuned"]) for line in own]
                    axes.plot(*zip(*points), linestyle="", alpha=0.35, markersize=4, **style)
                    means.append([mean(values) for values in zip(*points)])
                axes.plot(*zip(*means), label=name, linewidth=1, **style)
        for axes, target in zip(row, ("the same target", "another target")):
            axes.set_xlabel(f"change of BLEU, other pairs into {target}")
            axes.set_xlim(left=max(axes.get_xlim()[0], FARTHEST))
            axes.grid(alpha=0.3)
        row[0].set_title(title, loc="left")
        row[0].set_ylabel("change of BLEU, tuned pairs")
        row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, path)


def forgetting(lines):
    """method -> row -> pair -> mean change of BLEU; a row is a tuned pair, or a stage of in-turn."""
    found = {}
    for line in lines:
        rows = line.get("stages") or {",".join(line["pairs"]): line["after"]}
        for row, scores in rows.items():
            for pair, after in scores.items():
                change = after["bleu"] - line["before"][pair]["bleu"]
                place = found.setdefault(line["method"], {}).setdefault(row, {})
                place.setdefault(pair, []).append(change)
    for rows in found.values():
        for pairs in rows.values():
            pairs.update({pair: mean(changes) for pair, changes in pairs.items()})
    return found


def draw_matrix(lines, path):
    """What tuning the pair of a row, alone or after those above it, did to every pair."""
    plt = pyplot()
    found = forgetting(best_lines(lines))
    count = max(len(rows) for rows in found.values())
    size = 8, len(found) * (1 + 0.3 * count)
    figure, panels = plt.subplots(len(found), 1, figsize=size, squeeze=False)
    for axes, (name, rows) in zip(panels[:, 0], found.items()):
        values = torch.tensor([list(row.values()) for row in rows.values()])
        limit = 1.8 * values.abs().max().item()  # no color so dark that it hides the number
        axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for (y, x), value in np.ndenumerate(values.numpy()):
            axes.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=8)
        pairs = list(next(iter(rows.values())))
        axes.set_xticks(range(len(pairs)), pairs, rotation=45)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_title(name)
    figure.tight_layout()
    save(figure, path)


def best_lines(lines):
    """The cells of each method at its best rate."""
    return [line for rates in by_method(lines).values() for line in rates[best_rate(rates)]]


def series(lines, pattern):
    """Methods named by a pattern with one number in it: group 1 -> number -> lines at best rate"""
    found = {}
    for line in best_lines(lines):
        match = re.fullmatch(pattern, line["method"])
        if match:
            found.setdefault(match[1], {}).setdefault(float(match[2]), []).append(line)
    return {name: dict(sorted(points.items())) for name, points in sorted(found.items())}


CURVES = {  # file -> methods with a number in their names, label of the number, logarithmic
    "layers.svg": (r"(k)=(\d+)", "k, layers that learn", False),
    "epsilon.svg": (r"(epsilon)=([\d.]+)", "epsilon, share of general neurons", False),
    "sentences.svg": (r"([\w-]+):(\d+)", "training sentences", True),
}


def in_a_curve(method):
    return any(re.fullmatch(pattern, method) for pattern, _, _ in CURVES.values())


def draw_curve(found, label, logarithmic, path):
    """Change of BLEU of the tuned and the other pairs over a number, a dot a seed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axes, kind in zip(panels, ("tuned", "others")):
        for number, (name, points) in enumerate(found.items()):
            color = plt.cm.tab10(number % 10)
            for x, own in points.items():
                changes = [gains(line)[kind] for line in own]
                axes.plot([x] * len(own), changes, "o", color=color, alpha=0.35, markersize=4)
            means = [mean(gains(line)[kind] for line in own) for own in points.values()]
            axes.plot(list(points), means, "-", color=color, label=name)
        axes.set(xlabel=label, ylabel=f"mean change of BLEU, {kind}")
        axes.set_xscale("log" if logarithmic else "linear")
        axes.grid(alpha=0.3)
    if len(found) > 1:
        panels[1].legend(fontsize=7)
    figure.tight_layout()
    save(figure, path)


def show_series(found, label):
    print()
    print(label)
    for name, points in found.items():
        for x, own in points.items():
            print(f"{name:<17}{x:>7g}{len(own):>6}", end="")
            for kind in ("tuned", "others"):
                print(f"{spread([gains(line)[kind] for line in own]):>27}", end="")
            print()


def plot(out):
    """Table and figures of a grid, from its committed results alone."""
    lines = read_results(out)
    if not lines:
        raise InputError(f"{out / 'results.jsonl'}: no results yet")
    grid = read_json(out / "grid.json", {"tune": str})
    print(f"{out}: {json.dumps(grid)}")
    for name, (pattern, label, logarithmic) in CURVES.items():
        found = series(lines, pattern)
        if found:
            show_series(found, label)
            draw_curve(found, label, logarithmic, out / name)
    lines = [line for line in lines if not in_a_curve(line["method"])]
    if not lines:
        return
    print()
    show_table(lines)
    if any(not math.isnan(gains(line)["others"]) for line in lines):
        draw_front(lines, out / "front.svg")
    if grid["tune"] != "together":
        draw_matrix(lines, out / "matrix.svg")


def numbers(kind):
    """ "1,2" -> [1, 2]"""

    def parse(text):
        return [kind(word) for word in text.split(",")]

    return parse


def run_or_plot(parser, argv, show, work):
    """--plot FOLDER ... shows what was found there; else any option of lander.py, and work.

    show: folder -> None; work: (the parser's options, Settings, Path of --out) -> None
    """
    parser.add_argument("--plot", type=Path, nargs="+", help="folders of results; nothing is run")
    args, rest = parser.parse_known_args(argv)

    def command():
        if args.plot:
            for folder in args.plot:
                show(folder)
            return
        settings = lander.Settings(**lander.parse_arguments(rest))
        if not (settings.out and settings.weights and settings.data):
            raise InputError("--weights, --data and --out name what to work on, and where to write")
        out = Path(settings.out)
        with locked(out):
            work(args, settings, out)

    return exit_status(command)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default="lander,layers,lora-all")
    parser.add_argument("--rates", default=[1e-3], type=numbers(float))
    parser.add_argument("--seeds", default=[0], type=numbers(int))
    parser.add_argument("--tune", default="together", choices=("together", "each", "in-turn"))
    return run_or_plot(parser, argv, plot, run_grid)


if __name__ == "__main__":
    sys.exit(main())
