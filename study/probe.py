"""What scores, groups and routers say: neurons removed, groups found again, CAR looked at.

    python study/probe.py --weights W --data D --pair en-de,fr-cs --out DIR  # and options of lander.py
    python study/probe.py --plot study/results/*                             # without running

Three experiments, each a file in DIR, passed over if it is there:

    removal.json     neurons removed by tenths of their awareness, from the least to the most aware
    stability.json   categories from other text, another sample, another prompt; who shares neurons
    routing.json     CAR after tuning, by layer, pair and kind of token, and without it
"""

import argparse
import sys
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import language_name, make_batch, open_parallel, read_json, render, split_pair, write_json
from model import load_model
from study import compare
from study.methods import METHODS


# --------------------------------------------------------------------------------------------------
# Do scores tell which neurons matter?


TENTHS = 10


def removed(model, chosen):
    """Remove FFN neurons for good: zero their columns of W_down. chosen: [L, F] bool"""
    for block, own in zip(model.blocks, chosen):
        block.ffn.down.weight[:, own] = 0


def tenths(scores):
    """scores [L, F] -> TENTHS masks [L, F], from the lowest scores to the highest"""
    ranked = scores.flatten().argsort()
    for part in ranked.chunk(TENTHS):
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[part] = True
        yield mask.view_as(scores)


@torch.no_grad()
def removal(context):
    """-> {"none": [measured], "random": [measured], tuned pair: [measured, ... over tenths]}

    measured: {"loss": {pair: nats}, "bleu": {pair: BLEU}}; "random" lacks a tenth by chance
    """
    settings, tokenizer = context.settings, context.tokenizer
    pairs = [pair for pair in context.inputs.test if pair in context.inputs.scoring]
    valid = {}
    for pair in pairs:
        text = open_parallel(settings.data, "valid", pair)[: lander.VALID_SENTENCES]
        valid[pair] = [render(tokenizer, pair, *both) for both in text]

    def measure(chosen, what):
        model = load_model(settings.weights, *lander.choose_device(settings))
        removed(model, chosen)
        losses = {}
        for pair, examples in valid.items():
            batches = compare.micro_batches(context, examples)
            losses[pair] = lander.validation_loss(model, pair, batches)
        scores, _ = compare.evaluate(model, context, pairs, Path(settings.out) / "cells" / what)
        return {"loss": losses, "bleu": {pair: scores[pair]["bleu"] for pair in pairs}}

    nothing = torch.zeros(context.awareness.shape[1:], dtype=torch.bool)  # [L, F]
    by_chance = torch.rand(nothing.shape, generator=torch.Generator().manual_seed(settings.seed))
    found = {"none": [measure(nothing, "none")]}
    found["random"] = [measure(next(tenths(by_chance)), "random")]
    for pair in context.tuned:
        scores = context.awareness[list(context.inputs.scoring).index(pair)]  # [L, F]
        found[pair] = [measure(chosen, pair) for chosen in tenths(scores)]
    return found


# --------------------------------------------------------------------------------------------------
# Are the categories stable?


def short_prompt(tokenizer, pair, source, target):
    """Another prompt than the one of data.py, as an example."""
    first, second = map(language_name, split_pair(pair))
    prompt = tokenizer.encode(f"{first}: {source} = {second}:")
    return [*tokenizer.prompt_prefix, *prompt], render(tokenizer, pair, source, target)[1]


def agreement(first, second):
    """Of two owners [L, F]: what share of the one's specific neurons are the other's, by chance that
    many, and what share of those have the same owner, by chance that many."""
    specific, again = first >= 0, second >= 0
    both = specific & again
    same_owner = (first[both] == second[both]).float().mean().item()
    owners = torch.bincount(first[both]) / both.sum()
    others = torch.bincount(second[both], minlength=len(owners)) / both.sum()
    by_chance = (owners * others[: len(owners)]).sum().item()
    return {
        "specific in both": (both.sum() / specific.sum()).item(),
        "by chance": again.float().mean().item(),
        "same owner": same_owner,
        "same owner by chance": by_chance,
    }


def relation(first, second):
    """What two pairs share: "same source", "reversed", ... or "neither"."""
    first, second = split_pair(first), split_pair(second)
    if first == second[::-1]:
        return "reversed"
    if first[0] == second[0]:
        return "same source"
    return "same target" if first[1] == second[1] else "neither"


def group_all(model, context, text, make=render):
    """Owners [L, F] and awareness [P, L, F] of all layers, and pair -> selected layers, from text."""
    settings, tokenizer = context.settings, context.tokenizer
    scores, layers = [], {}
    for pair, sentences in text.items():
        examples = [make(tokenizer, pair, *both) for both in sentences]
        batches = compare.micro_batches(context, examples)
        scores.append(lander.neuron_awareness(model, batches, range(model.config.layers)))
        batches = compare.micro_batches(context, [(prompt, []) for prompt, _ in examples])
        differences = lander.layer_differences(lander.activation_means(model, batches))
        layers[pair] = lander.select_layers(differences, settings.layers)
    awareness = torch.stack(scores)
    return lander.categorize(awareness, settings.epsilon), awareness, layers


def stability(context):
    """-> {"agreement": ..., "layers": ..., "overlap": ..., "where": ...}"""
    settings = context.settings
    size = settings.score_sentences
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    pairs = list(context.inputs.scoring)
    text = {pair: open_parallel(settings.data, "train", pair) for pair in pairs}
    part = lambda first, last: {pair: own[first:last] for pair, own in text.items()}
    base, awareness, base_layers = group_all(model, context, part(0, size))
    others = {
        "other text": group_all(model, context, part(size, 2 * size)),
        "half the text": group_all(model, context, part(0, size // 2)),
        "another prompt": group_all(model, context, part(0, size), short_prompt),
    }
    result = {"agreement": {}, "layers": {}, "overlap": {}, "where": {}}
    for name, (owner, _, layers) in others.items():
        result["agreement"][name] = agreement(base, owner)
        same = [layers[pair] == base_layers[pair] for pair in pairs]
        result["layers"][name] = sum(same) / len(same)
    scaled = lander.scale_awareness(awareness)  # [P, L, F]
    flat = scaled.flatten(1)
    top = flat >= flat.quantile(settings.epsilon, dim=1, keepdim=True)
    shared = {}
    for (a, first), (b, second) in combinations(enumerate(pairs), 2):
        correlation = torch.corrcoef(flat[[a, b]].log1p())[0, 1].item()
        overlap = ((top[a] & top[b]).sum() / top[a].sum()).item()
        shared.setdefault(relation(first, second), []).append((correlation, overlap))
    for name, own in shared.items():
        columns = [mean(column) for column in zip(*own)]
        result["overlap"][name] = dict(zip(("correlation", "most aware in both"), columns))
    result["where"]["mean variance"] = scaled.var(0, correction=0).mean(1).tolist()
    for p, pair in enumerate(pairs):
        result["where"][pair] = (base == p).sum(1).tolist()
    return result


# --------------------------------------------------------------------------------------------------
# What does CAR do?


def kinds_of_tokens(tokenizer, pair, source, target):
    """An example with "prompt", "source" or "target" for each token that the model reads."""
    prompt, answer = render(tokenizer, pair, source, target)
    empty, _ = render(tokenizer, pair, "")
    before = len(commonprefix([prompt, empty]))
    after = len(commonprefix([prompt[before:][::-1], empty[before:][::-1]]))
    kinds = ["prompt"] * before + ["source"] * (len(prompt) - before - after) + ["prompt"] * after
    return prompt + answer[:-1], kinds + ["target"] * (len(answer) - 1)


@torch.no_grad()
def token_factors(model, tokenizer, pair, ids):
    """CAR / share of each token: layer that routes the pair -> [T]"""
    lander.route(model, pair)
    layers = lander.routed_layers(model)
    routed = {layer: ffn for layer, ffn in layers.items() if pair in ffn.share}
    batch = make_batch([(ids, [])], tokenizer.pad_id)
    ids, mask, _ = lander.to_device(batch, model)
    with lander.recording(model, routed, "ffn") as x:
        model.hidden_states(ids, mask)
    return {layer: ffn.factors(x[layer])[0][0].cpu() for layer, ffn in routed.items()}


def factors(model, tokenizer, pair, text):
    """CAR / share of the tokens of some text: layer -> kind of token -> [tokens]"""
    found = {}
    for source, target in text:
        ids, kinds = kinds_of_tokens(tokenizer, pair, source, target)
        for layer, values in token_factors(model, tokenizer, pair, ids).items():
            for kind, value in zip(kinds, values.tolist()):
                found.setdefault(layer, {}).setdefault(kind, []).append(value)
    return found


ROUTING_SEEDS = (0, 1, 2)


def routing(context):
    """-> {"values": [...], "bleu": [...], "cosines": {...}}, over seeds and two rates"""
    settings, tokenizer = context.settings, context.tokenizer
    values, bleu, routers = [], [], {}
    for rate in (settings.lr, settings.lr / 3):
        for seed in ROUTING_SEEDS:
            torch.manual_seed(seed)
            own = context._replace(settings=replace(settings, lr=rate, seed=seed))
            model = load_model(settings.weights, *lander.choose_device(settings))
            learners = METHODS["lander"](model.requires_grad_(False), own)
            folder = Path(settings.out) / "cells" / f"{rate:g} {seed}"
            compare.train(model, own, learners, {}, own.tuned, compare.parse_method("lander"))
            layers = lander.routed_layers(model)
            for pair in own.tuned:
                text = open_parallel(settings.data, "valid", pair)[:50]
                for layer, kinds in factors(model, tokenizer, pair, text).items():
                    entry = {"rate": rate, "seed": seed, "pair": pair, "layer": layer}
                    entry["share"] = layers[layer].share[pair]
                    for kind, found in kinds.items():
                        numbers = {"mean": mean(found), "std": torch.tensor(found).std().item()}
                        values.append(entry | {"kind": kind} | numbers)
            for layer, ffn in layers.items():
                for pair, router in ffn.router.items():
                    routers[rate, seed, layer, pair] = router.detach().clone()
            bleu.append({"rate": rate, "seed": seed} | without_routing(model, own, folder))
    cosines = {"other seed": [], "other rate": [], "other pair": []}
    for (first, w), (second, v) in combinations(routers.items(), 2):
        named = zip(("rate", "seed", "layer", "pair"), first, second)
        differs = [name for name, a, b in named if a != b]
        if len(differs) == 1 and differs[0] != "layer":
            cosine = torch.nn.functional.cosine_similarity(w, v, dim=0).item()
            cosines[f"other {differs[0]}"].append(cosine)
    cosines = {name: mean(own) for name, own in cosines.items() if own}
    return {"values": values, "bleu": bleu, "cosines": cosines}


@torch.no_grad()
def without_routing(model, context, folder):
    """BLEU of the tuned pairs as trained; with CAR fixed where it started; swapped; by chance."""
    layers = lander.routed_layers(model)
    learned = {}
    for layer, ffn in layers.items():
        learned[layer] = {pair: router.clone() for pair, router in ffn.router.items()}
    after = dict(zip(context.tuned, context.tuned[1:] + context.tuned[:1]))
    changes = {
        "as trained": lambda own, pair: own[pair],
        "fixed at its start": lambda own, pair: torch.zeros_like(own[pair]),
        "of another pair": lambda own, pair: own.get(after[pair], own[pair]),
        "another direction": lambda own, pair: own[pair][torch.randperm(len(own[pair]))],
    }
    found = {}
    for name, change in changes.items():
        for layer, ffn in layers.items():
            for pair in ffn.router:
                ffn.router[pair].copy_(change(learned[layer], pair))
        scores, _ = compare.evaluate(model, context, context.tuned, folder / name)
        found[name] = {pair: scores[pair]["bleu"] for pair in context.tuned}
    return found


# --------------------------------------------------------------------------------------------------
# What was found


def show_removal(found, out):
    """A table and a figure: what losing a tenth changes, of this pair and of the others' mean."""
    (none,), (chance,) = found.pop("none"), found.pop("random")
    plt = compare.pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    tenth = range(1, TENTHS + 1)
    rows = []
    for number, (pair, parts) in enumerate(found.items()):
        color = plt.cm.tab10(number)
        columns = [[pair] * (TENTHS + 1), [*tenth, "random"]]
        for axes, what, unit in zip(panels, ("loss", "bleu"), ("loss, nats a token", "BLEU")):
            own, others = [], []
            for part in [*parts, chance]:
                change = {other: part[what][other] - none[what][other] for other in none[what]}
                own.append(change.pop(pair))
                others.append(mean(change.values()))
            columns += [[f"{value:+.3f}" for value in own], [f"{value:+.3f}" for value in others]]
            axes.plot(tenth, own[:-1], "o-", color=color, label=pair)
            axes.plot(tenth, others[:-1], "--", color=color, label="others")
            axes.axhline(own[-1], color=color, linestyle=":", label="a tenth by chance")
            axes.set(xlabel="tenth of awareness that is removed", ylabel=f"change of {unit}")
            axes.grid(alpha=0.3)
        rows += zip(*columns)
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    compare.save(figure, out / "removal.svg")
    head = ["most aware of", "tenth", "its loss", "others' loss", "its BLEU", "others' BLEU"]
    compare.table(head, rows)


def show_stability(found, out):
    rows = []
    for name, own in found["agreement"].items():
        row = [f"{value:.2f}" for value in [*own.values(), found["layers"][name]]]
        rows.append([name, *row])
    compare.table(["scored otherwise", *own, "same layers"], rows)
    rows = []
    for name, own in found["overlap"].items():
        rows.append([name, *(f"{value:.2f}" for value in own.values())])
    compare.table(["two pairs", *own], rows)
    rows = []
    for name, own in found["where"].items():
        rows.append([name, *(f"{value:.3g}" for value in own)])
    compare.table(["by layer", *range(len(own))], rows)


def show_routing(found, out):
    cells = {}
    for entry in found["values"]:
        place = tuple(entry[name] for name in ("rate", "pair", "layer", "kind", "share"))
        cells.setdefault(place, []).append(entry)
    rows = []
    for (*place, share), own in cells.items():
        means = compare.spread([entry["mean"] for entry in own])
        deviation = mean(entry["std"] for entry in own)
        rows.append([*place, f"{share:.2f}", means, f"{deviation:.3f}"])
    head = ["rate", "pair", "layer", "kind", "share", "CAR / share", "deviation over tokens"]
    compare.table(head, rows)
    changes = {}
    for entry in found["bleu"]:
        for name in entry.keys() - {"rate", "seed", "as trained"}:
            change = mean(entry[name].values()) - mean(entry["as trained"].values())
            changes.setdefault((entry["rate"], name), []).append(change)
    rows = [[*place, compare.spread(own)] for place, own in sorted(changes.items())]
    compare.table(["rate", "routers", "change of the tuned pairs' BLEU"], rows)
    compare.table(["routers", "cosine"], [(k, f"{v:.2f}") for k, v in found["cosines"].items()])


EXPERIMENTS = {
    "removal": (removal, show_removal),
    "stability": (stability, show_stability),
    "routing": (routing, show_routing),
}


def plot(out):
    if (out / "results.jsonl").exists():
        return compare.plot(out)
    print(f"\n{out}")
    for name, (_, show) in EXPERIMENTS.items():
        if (out / f"{name}.json").exists():
            show(read_json(out / f"{name}.json"), out)


def look(args, settings, out):
    """Make every experiment whose file is not there yet."""
    compare.check_grid(out / "grid.json", settings, "together")
    context = compare.prepare(settings, out)
    for name, (experiment, _) in EXPERIMENTS.items():
        if not (out / f"{name}.json").exists():
            write_json(out / f"{name}.json", experiment(context))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    return compare.run_or_plot(parser, argv, plot, look)


if __name__ == "__main__":
    sys.exit(main())
