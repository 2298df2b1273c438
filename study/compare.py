"""The method beside its rivals: same checkpoint, same batches, same steps, same evaluation.

    python study/compare.py --weights W --data D --pair en-de --methods lander,layers,lora-all \\
        --rates 1e-3,3e-3 --seeds 0,1,2 --out DIR        # and any option of lander.py
    python study/compare.py --plot DIR                   # what was measured, without running

One cell is a method at a learning rate with a seed: a line in DIR/results.jsonl. Cells that are
there are passed over, so that a grid can be stopped, go on, and be split over machines.

A method is a function that changes the model as it needs and says which parameters learn; all
else is lander.py's own `train` and `evaluate`. Behind a method's name may stand:

    +replay     batches of the other pairs' training text alternate with the tuned ones'
    +l2         weights decay to where they started instead of to zero
    @0.5        no training: that part of the way from the start to the end of the cell without it
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import InputError, exit_status, locked, read_json, read_lines, read_tensors, render
from data import split_pair, write_json
from model import Linear, load_model


class Context(NamedTuple):
    """What the cells of a grid share."""

    settings: lander.Settings
    tokenizer: object
    inputs: lander.Inputs
    tuned: list  # pairs
    selected: dict  # pair -> layers, by representation analysis
    awareness: torch.Tensor  # [P, L, F] of all layers


# --------------------------------------------------------------------------------------------------
# LANDeRMT, and without each of its parts


def groups_of(context, awareness, selected):
    """Groups as in lander.py, of some layers."""
    own = awareness[:, lander.union(selected)]  # [P, K, F]
    owner = lander.categorize(own, context.settings.epsilon)
    return lander.describe_groups(own, owner, list(context.inputs.scoring), selected)


def install(model, context, groups, routing=True):
    """Route, and say what learns. -> learners"""
    lander.install_routing(model, groups, routing)
    return {pair: lander.what_learns(model, pair) for pair in context.tuned}


def lander_method(model, context):
    """LANDeRMT as lander.py runs it."""
    return install(model, context, groups_of(context, context.awareness, context.selected))


def no_car(model, context):
    """The same neurons, without routing."""
    groups = groups_of(context, context.awareness, context.selected)
    return install(model, context, groups, routing=False)


def keep(learners, word):
    """What has `word` in its name."""
    kept = {}
    for pair, own in learners.items():
        kept[pair] = {name: parameter for name, parameter in own.items() if word in name}
    return kept


def specific_only(model, context):
    """The pair's own neurons alone: the paper's LANDeRMT-LS."""
    return keep(no_car(model, context), ".specific.")


def general_only(model, context):
    """The general neurons alone."""
    return keep(no_car(model, context), ".general.")


def random_layers(model, context):
    """As many layers as representation analysis selects, any but the first."""
    selected = {}
    for pair, layers in context.selected.items():
        order = torch.randperm(model.config.layers - 1) + 1
        selected[pair] = sorted(order[: len(layers)].tolist())
    return install(model, context, groups_of(context, context.awareness, selected))


def random_scores(model, context):
    """Neurons of the same number in each group, by chance instead of by awareness."""
    return install(
        model, context, groups_of(context, torch.rand_like(context.awareness), context.selected)
    )


# --------------------------------------------------------------------------------------------------
# Some neurons of all layers, of equal number


PART_OF_NEURONS = 0.3


def best_neurons(model, context, scores):
    """Train the PART_OF_NEURONS of all FFN neurons that score highest. scores: pair -> [L, F]"""
    (pair,) = context.tuned
    ranked = scores[pair].flatten().argsort(descending=True)  # [L * F]
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked[: round(PART_OF_NEURONS * len(ranked))]] = True
    groups = {}
    for layer, own in enumerate(chosen.view_as(scores[pair])):
        others = (~own).nonzero().flatten().tolist()
        specific = {pair: own.nonzero().flatten().tolist(), "others": others}
        groups[str(layer)] = {"specific": specific, "share": {pair: None}}
    return keep(install(model, context, groups), ".specific.")


def own_awareness(context):
    """pair -> [L, F]: each pair's scores, scaled to mean 1 in each layer."""
    scaled = lander.scale_awareness(context.awareness)
    return dict(zip(context.inputs.scoring, scaled))


def neurons_random(model, context):
    scores = {pair: torch.rand_like(context.awareness[0]) for pair in context.tuned}
    return best_neurons(model, context, scores)


def neurons_aware(model, context):
    """By awareness for the pair."""
    return best_neurons(model, context, own_awareness(context))


def neurons_relative(model, context):
    """By awareness for the pair over the mean of the other pairs'."""
    scores = own_awareness(context)
    relative = {}
    for pair in context.tuned:
        others = torch.stack([scores[other] for other in scores if other != pair]).mean(0)
        relative[pair] = scores[pair] / others
    return best_neurons(model, context, relative)


def neurons_least(model, context):
    """The least aware."""
    scores = own_awareness(context)
    return best_neurons(model, context, {pair: -scores[pair] for pair in context.tuned})


# --------------------------------------------------------------------------------------------------
# Whole weights


def weights(model, context, wanted):
    """Train the linear layers whose names satisfy `wanted`, as fp32 masters, with every pair."""
    own = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and wanted(name):
            own |= module.float().named_parameters(name)
    return dict.fromkeys(context.tuned, own)


def full(model, context):
    """Full finetuning: every weight."""
    own = dict(model.float().named_parameters())
    return dict.fromkeys(context.tuned, own)


def layers(model, context):
    """The paper's Layers: every FFN weight of the layers that representation analysis selects."""
    learners = {}
    for pair, selected in context.selected.items():
        places = tuple(f"blocks.{layer}.ffn." for layer in selected)
        learners |= {pair: weights(model, context, lambda name: name.startswith(places))[pair]}
    return learners


def all_ffn(model, context):
    return weights(model, context, lambda name: ".ffn." in name)


def all_attention(model, context):
    return weights(model, context, lambda name: ".attention." in name)


# --------------------------------------------------------------------------------------------------
# LoRA and adapters


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x  (Hu et al. 2022; loralib/layers.py, peft's tuners/lora).

    A [r, in] is uniform within 1 / sqrt(in), B [out, r] zero, so that the start is the base model.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        limit = 1 / math.sqrt(linear.in_features)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.uniform_(self.lora_a, -limit, limit)

    def forward(self, x):
        low = functional.linear(x, self.lora_a.to(x.dtype))  # [.., r]
        return self.linear(x) + functional.linear(low, self.lora_b.to(x.dtype)) * self.scale


LORA_RANK, LORA_ALPHA = 8, 16  # alpha = 2 r, as in practice


def add_lora(model, wanted):
    """Put a LoRA around the linear layers of the blocks whose names satisfy `wanted`."""
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear) and wanted(name):
            parent, _, child = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), child, LoRA(module, LORA_RANK, LORA_ALPHA))


class Adapter(nn.Module):
    """x + W_up relu(W_down norm(x)), after each FFN's residual sum (Bapna & Firat 2019).

    W_up starts at zero, so that the start is the base model.
    """

    def __init__(self, hidden_size, size, device):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, device=device)
        self.down = nn.Linear(hidden_size, size, device=device)
        self.up = nn.Linear(size, hidden_size, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        return x + self.up(torch.relu(self.down(self.norm(x.float())))).to(x.dtype)


ADAPTER_SIZE = 64


def add_adapters(model):
    def adapt(block, inputs, output):
        return block.adapter(output)

    for block in model.blocks:
        device = block.ffn.up.weight.device
        block.adapter = Adapter(model.config.hidden_size, ADAPTER_SIZE, device)
        block.register_forward_hook(adapt)


def added(model, context):
    """Everything that was added to the checkpoint's own parameters learns, with every pair."""
    own = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".adapter." in name:
            own[name] = parameter
    return dict.fromkeys(context.tuned, own)


def lora_attention(model, context):
    add_lora(model, lambda name: ".attention." in name)
    return added(model, context)


def lora_all(model, context):
    add_lora(model, lambda name: True)
    return added(model, context)


def adapters(model, context):
    add_adapters(model)
    return added(model, context)


def adapter_lora(model, context):
    """Both at once. The paper does not say what its Adapter-LoRA is: this is our reading."""
    add_lora(model, lambda name: ".attention." in name)
    add_adapters(model)
    return added(model, context)


# --------------------------------------------------------------------------------------------------
# No training


class FewShot:
    """A tokenizer that puts the same examples in front of every prompt."""

    def __init__(self, tokenizer, pair, examples):
        self.tokenizer, self.prefix = tokenizer, []
        for source, target in examples:
            prompt, answer = render(tokenizer, pair, source, target)
            self.prefix += [*prompt, *answer[:-1], *tokenizer.encode("\n\n")]

    def encode(self, text):
        return self.prefix + self.tokenizer.encode(text)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def untrained(model, context):
    return dict.fromkeys(context.tuned, {})


SHOTS = 5
METHODS = {
    "zero-shot": untrained,
    "5-shot": untrained,
    "lander": lander_method,
    "no-car": no_car,
    "specific-only": specific_only,
    "general-only": general_only,
    "random-layers": random_layers,
    "random-scores": random_scores,
    "neurons-random": neurons_random,
    "neurons-aware": neurons_aware,
    "neurons-relative": neurons_relative,
    "neurons-least": neurons_least,
    "full": full,
    "layers": layers,
    "ffn": all_ffn,
    "attention": all_attention,
    "lora-attention": lora_attention,
    "lora-all": lora_all,
    "adapters": adapters,
    "adapter-lora": adapter_lora,
}


# --------------------------------------------------------------------------------------------------
# Cheap rivals of any method


class FromStart(nn.Module):
    """A weight as its start plus what is learned, so that decay draws it to the start."""

    def __init__(self, start):
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, change):
        return self.start + change

    def right_inverse(self, weight):
        return weight - self.start


L2_DECAY = 10.0  # a step takes this times the learning rate of the way back


def draw_to_start(model, learners):
    """Learn the difference to the start instead of the weights themselves. -> learners"""
    changes = {}
    for name, parameter in lander.merged(learners).items():
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        parametrize.register_parametrization(module, kind, FromStart(parameter))
        changes[name] = getattr(module.parametrizations, kind).original
    return {pair: {name: changes[name] for name in own} for pair, own in learners.items()}


def interpolate(learners, tuned, part):
    """Move every parameter `part` of the way from its start to what was tuned."""
    with torch.no_grad():
        for name, parameter in lander.merged(learners).items():
            parameter += part * (tuned[name].to(parameter.device) - parameter)


# --------------------------------------------------------------------------------------------------
# A grid


def parse_method(name):
    """ "lora-all+replay@0.5" -> ("lora-all", {"replay"}, 0.5); without @: None. InputError"""
    rest, _, part = name.partition("@")
    base, *extras = rest.split("+")
    if base not in METHODS or not set(extras) <= {"replay", "l2"}:
        raise InputError(
            f"method {name!r}: expected {', '.join(METHODS)}, with +replay, +l2, @PART"
        )
    try:
        part = float(part) if part else None
    except ValueError:
        raise InputError(f"method {name!r}: @{part} is no part of the way") from None
    return base, set(extras), part


def cell_folder(out, name, rate, seed):
    return out / "cells" / f"{name} {rate:g} {seed}"


def run_cell(context, out, name, rate, seed):
    """Train and evaluate one method. -> its line of results.jsonl"""
    began = time.monotonic()
    base, extras, part = parse_method(name)
    settings = replace(context.settings, lr=rate, seed=seed)
    folder = cell_folder(out, name, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    device, dtype = lander.choose_device(settings)
    torch.manual_seed(seed)
    model = load_model(settings.weights, device, dtype).requires_grad_(False)
    learners = METHODS[base](model, context)
    trained = sum(p.numel() for p in lander.merged(learners).values())
    valid_loss = None
    if part is not None:
        whole = cell_folder(out, name.partition("@")[0], rate, seed) / "tuned.safetensors"
        if not whole.exists():
            raise InputError(f"{name}: no {whole}; run {name.partition('@')[0]} first")
        interpolate(learners, read_tensors(whole), part)
    elif trained:
        examples = {pair: context.inputs.train[pair] for pair in context.tuned}
        decay = lander.WEIGHT_DECAY
        if "replay" in extras:
            everything = lander.merged(learners)
            for pair, own in context.inputs.scoring.items():
                examples.setdefault(pair, own)
                learners.setdefault(pair, everything)
        if "l2" in extras:
            learners, decay = draw_to_start(model, learners), L2_DECAY
        steps = lander.count_steps(context.inputs.train, settings)
        settings = replace(settings, steps=steps)  # as many with replay as without
        valid = context.inputs.valid
        lander.train(model, context.tokenizer, learners, examples, valid, settings, folder, decay)
        (folder / "state.safetensors").unlink()
        valid_loss = json.loads(read_lines(folder / "log.jsonl")[-1])["valid_loss"]
    after = evaluate_all(model, context, folder, shots=SHOTS if base == "5-shot" else 0)
    line = {"method": name, "rate": rate, "seed": seed, "pairs": context.tuned, "trained": trained}
    line |= {"seconds": round(time.monotonic() - began, 1), "valid_loss": valid_loss}
    return line | {"before": read_json(out / "before.json", {}), "after": after}


def evaluate_all(model, context, folder, shots=0):
    """-> {pair: {"bleu", "chrf"}}; hypotheses go to the folder."""
    scores = {}
    for pair, text in context.inputs.test.items():
        tokenizer = context.tokenizer
        if shots:
            examples = lander.read_text(context.settings, "train", pair, {})[:shots]
            tokenizer = FewShot(tokenizer, pair, examples)
        path = folder / f"{pair}.txt"
        found = lander.evaluate(model, tokenizer, pair, text, context.settings, path)
        scores[pair] = {metric: round(found[metric], 3) for metric in ("bleu", "chrf")}
    return scores


def prepare(settings, out):
    """Read what all cells need; score layers and neurons once, of all layers. -> Context"""
    device, dtype = lander.choose_device(settings)
    tuned = lander.choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer = lander.open_checkpoint(settings.weights)
    lander.check_layer_count(settings.layers, config.layers - 1)
    inputs = lander.read_inputs(tokenizer, tuned, settings)
    model = load_model(settings.weights, device, dtype).requires_grad_(False)
    arguments = (model, tokenizer, inputs.scoring)
    selected = lander.analyse_layers(*arguments, tuned, settings, out / "layers.json")
    every = {pair: list(range(config.layers)) for pair in tuned}
    lander.group_neurons(*arguments, every, settings, out)
    awareness = read_tensors(out / "awareness.safetensors")
    stacked = torch.stack([awareness[pair] for pair in inputs.scoring])  # [P, L, F]
    context = Context(settings, tokenizer, inputs, tuned, selected, stacked)
    if not (out / "before.json").exists():
        write_json(out / "before.json", evaluate_all(model, context, out / "before"))
    return context


def run_grid(settings, methods, rates, seeds):
    """Run every cell that is not in results.jsonl yet."""
    out = Path(settings.out)
    for name in methods:
        parse_method(name)
    with locked(out):
        path, done = out / "results.jsonl", set()
        if path.exists():
            lines = [json.loads(line) for line in read_lines(path)]
            done = {(line["method"], line["rate"], line["seed"]) for line in lines}
        recorded = {name: value for name, value in asdict(settings).items() if name != "out"}
        if (out / "grid.json").exists():
            if read_json(out / "grid.json", {}) != recorded:
                raise InputError(f"{out}: holds a grid with other settings, in grid.json")
        else:
            write_json(out / "grid.json", recorded)
        context = prepare(settings, out)
        for seed in seeds:
            for rate in rates:
                for name in methods:
                    untuned = METHODS[parse_method(name)[0]] is untrained
                    if (name, rate, seed) in done or (
                        untuned and (rate, seed) != (rates[0], seeds[0])
                    ):
                        continue
                    line = run_cell(context, out, name, rate, seed)
                    with open(path, "a", encoding="utf-8") as file:
                        print(json.dumps(line), file=file)
                    change = gains(line)
                    gained = f"tuned {change['tuned']:+.2f}, others {change['others']:+.2f}"
                    lander.say(f"{name} {rate:g} {seed}: {gained}")


# --------------------------------------------------------------------------------------------------
# What was measured


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
    return {kind: sum(own) / len(own) if own else math.nan for kind, own in kinds.items()}


def read_cells(out):
    """results.jsonl -> (method, rate) -> its lines, a seed each"""
    cells = {}
    for text in read_lines(out / "results.jsonl"):
        line = json.loads(text)
        cells.setdefault((line["method"], line["rate"]), []).append(line)
    return dict(sorted(cells.items()))


def show_table(cells):
    """Mean change over seeds, with the lowest and the highest, of every method at every rate."""
    print(f"{'method':<17}{'rate':>7}{'seeds':>6}{'weights':>9}", end="")
    print(f"{'tuned':>7}{'from':>7}{'to':>7}{'others':>8}{'from':>6}{'to':>6}")
    for (name, rate), lines in cells.items():
        tuned = [gains(line)["tuned"] for line in lines]
        others = [gains(line)["others"] for line in lines]
        row = f"{name:<17}{rate:>7g}{len(lines):>6}{lines[0]['trained']:>9,}"
        row += f"{sum(tuned) / len(lines):>+7.1f}{min(tuned):>+7.1f}{max(tuned):>+7.1f}"
        row += f"{sum(others) / len(lines):>+8.1f}{min(others):>+6.1f}{max(others):>+6.1f}"
        print(row)


def draw_front(cells, path):
    """What was gained against what was forgotten: a line a method over rates, a dot a seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lander", "font.size": 9})
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharey=True)
    methods = list(dict.fromkeys(name for name, _ in cells))
    for axes, kind in zip(panels, ("same target", "other target")):
        for number, method in enumerate(methods):
            style = {"color": plt.cm.tab20(number % 20), "marker": "osD^vP*X<>"[number % 10]}
            means = []
            for (name, _), lines in cells.items():
                if name != method:
                    continue
                points = [(gains(line)[kind], gains(line)["tuned"]) for line in lines]
                axes.plot(*zip(*points), linestyle="", alpha=0.35, markersize=4, **style)
                means.append([sum(values) / len(values) for values in zip(*points)])
            axes.plot(*zip(*means), label=method, **style)
        axes.set(xlabel=f"mean change of BLEU, other pairs, {kind}", ylabel="change, tuned pairs")
        axes.set_xlim(left=max(axes.get_xlim()[0], -12))  # what forgets more is off the picture
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def plot(out):
    cells = read_cells(out)
    show_table(cells)
    draw_front(cells, out / "front.svg")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default="lander,layers,lora-all")
    parser.add_argument("--rates", default="1e-3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--plot", type=Path, help="a folder of results; nothing is run")
    args, rest = parser.parse_known_args(argv)

    def command():
        if args.plot:
            return plot(args.plot)
        settings = lander.Settings(**lander.parse_arguments(rest))
        if not (settings.out and settings.weights and settings.data):
            raise InputError("--weights, --data and --out name what to compare on, and where to")
        rates = [float(rate) for rate in args.rates.split(",")]
        seeds = [int(seed) for seed in args.seeds.split(",")]
        run_grid(settings, args.methods.split(","), rates, seeds)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
