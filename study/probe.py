"""What scores, groups and routers say: neurons removed, groups found again, CAR looked at.

    python study/probe.py --weights W --data D --pair en-de,fr-cs --out DIR    # any option of lander.py
    python study/probe.py --plot DIR                                           # without running
    python study/probe.py --plot study/results/*                               # and all of compare.py's

Three experiments, each a file in DIR, passed over if it is there:

    removal.json     neurons removed by tenths of their awareness, from the least to the most aware
    stability.json   categories from other text, another sample, another prompt; who shares neurons
    routing.json     CAR after tuning, by layer, pair and kind of token, and without it
"""

import argparse
import sys
from dataclasses import replace
from itertools import combinations, takewhile
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import LANGUAGES, make_batch, make_batches, open_parallel, read_json, render, split_pair
from data import write_json
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
    """-> tuned pair -> a list over tenths of {"loss": {pair: nats}, "bleu": {pair: change}}

    The last but one key of a pair, "random", is a tenth by chance; "none" has nothing removed.
    """
    settings = context.settings
    pairs = [pair for pair in context.inputs.test if pair in context.inputs.scoring]
    valid = {}
    for pair in pairs:
        text = open_parallel(settings.data, "valid", pair)[: lander.VALID_SENTENCES]
        valid[pair] = [render(context.tokenizer, pair, *both) for both in text]

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
    found = {"none": [measure(nothing, "none")]}
    by_chance = torch.rand(nothing.shape, generator=torch.Generator().manual_seed(settings.seed))
    found["random"] = [measure(next(tenths(by_chance)), "random")]
    for pair in context.tuned:
        scores = context.awareness[list(context.inputs.scoring).index(pair)]  # [L, F]
        found[pair] = [measure(chosen, pair) for chosen in tenths(scores)]
    return found


# --------------------------------------------------------------------------------------------------
# Are the categories stable?


def short_prompt(tokenizer, pair, source, target):
    """Another prompt than the one of data.py, as an example."""
    first, second = (LANGUAGES[code] for code in split_pair(pair))
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
    (source, target), (other_source, other_target) = split_pair(first), split_pair(second)
    if (source, target) == (other_target, other_source):
        return "reversed"
    if source == other_source:
        return "same source"
    return "same target" if target == other_target else "neither"


def stability(context):
    """-> {"agreement": ..., "layers": ..., "overlap": ..., "where": ...}"""
    settings, tokenizer = context.settings, context.tokenizer
    model = load_model(settings.weights, *lander.choose_device(settings)).requires_grad_(False)
    text = {}
    for pair in context.inputs.scoring:
        text[pair] = open_parallel(settings.data, "train", pair)[: 2 * settings.score_sentences]

    def owners(chosen, make=render):
        scores = []
        layers = {}
        for pair, own in text.items():
            examples = [make(tokenizer, pair, *sentences) for sentences in chosen(own)]
            batches = list(make_batches(examples, tokenizer.pad_id, settings.micro_tokens))
            scores.append(lander.neuron_awareness(model, batches, range(model.config.layers)))
            prompts = [(prompt, []) for prompt, _ in examples]
            batches = make_batches(prompts, tokenizer.pad_id, settings.micro_tokens)
            differences = lander.layer_differences(lander.activation_means(model, batches))
            layers[pair] = lander.select_layers(differences, settings.layers)
        stacked = torch.stack(scores)
        return lander.categorize(stacked, settings.epsilon), stacked, layers

    size = settings.score_sentences
    base, awareness, base_layers = owners(lambda own: own[:size])
    rivals = {
        "other text": owners(lambda own: own[size:]),
        "half the text": owners(lambda own: own[: size // 2]),
        "another prompt": owners(lambda own: own[:size], short_prompt),
    }
    result = {"agreement": {}, "layers": {}, "overlap": {}, "where": {}}
    for name, (owner, _, layers) in rivals.items():
        result["agreement"][name] = agreement(base, owner)
        same = [layers[pair] == base_layers[pair] for pair in text]
        result["layers"][name] = sum(same) / len(same)
    scaled = lander.scale_awareness(awareness).flatten(1)  # [P, L * F]
    top = scaled >= scaled.quantile(settings.epsilon, dim=1, keepdim=True)
    shared = {}
    for (a, first), (b, second) in combinations(enumerate(text), 2):
        correlation = torch.corrcoef(scaled[[a, b]].log1p())[0, 1].item()
        overlap = ((top[a] & top[b]).sum() / top[a].sum()).item()
        shared.setdefault(relation(first, second), []).append((correlation, overlap))
    for name, own in shared.items():
        columns = [mean(column) for column in zip(*own)]
        result["overlap"][name] = dict(zip(("correlation", "most aware in both"), columns))
    variance = lander.scale_awareness(awareness).var(0, correction=0)  # [L, F]
    result["where"]["mean variance"] = variance.mean(1).tolist()
    for p, pair in enumerate(text):
        result["where"][pair] = (base == p).sum(1).tolist()
    return result


# --------------------------------------------------------------------------------------------------
# What does CAR do?


def in_common(first, second):
    """How many tokens two lists begin with alike."""
    alike = takewhile(lambda both: both[0] == both[1], zip(first, second))
    return len(list(alike))


def kinds_of_tokens(tokenizer, pair, source, target):
    """An example with "prompt", "source" or "target" for each token that the model reads."""
    prompt, answer = render(tokenizer, pair, source, target)
    empty, _ = render(tokenizer, pair, "")
    before = in_common(prompt, empty)
    after = in_common(prompt[before:][::-1], empty[before:][::-1])
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
    values = []
    bleu = []
    routers = {}
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
                    for kind, found in kinds.items():
                        spread = torch.tensor(found).std().item()
                        entry = {"rate": rate, "seed": seed, "pair": pair, "layer": layer}
                        entry |= {"kind": kind, "mean": mean(found), "std": spread}
                        values.append(entry | {"share": layers[layer].share[pair]})
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


def show_removal(found, path):
    (none,), (chance,) = found.pop("none"), found.pop("random")

    def changes(pair, part):
        """Of loss and of BLEU, each of this pair and the mean of the others."""
        row = []
        for what in ("loss", "bleu"):
            change = {other: part[what][other] - none[what][other] for other in none[what]}
            row += [change.pop(pair), mean(change.values())]
        return row

    plt = compare.pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    print("neurons removed by tenths: change of loss, this pair's and others'; the same of BLEU")
    tenth = range(1, TENTHS + 1)
    for number, (pair, parts) in enumerate(found.items()):
        rows = [changes(pair, part) for part in [*parts, chance]]
        for label, row in zip([*tenth, "random"], rows):
            print(
                f"{pair:<9}{label!s:>7}{row[0]:>+9.3f}{row[1]:>+9.3f}{row[2]:>+8.2f}{row[3]:>+8.2f}"
            )
        own_loss, other_loss, own_bleu, other_bleu = zip(*rows)
        color = plt.cm.tab10(number)
        for axes, own, others, name in (
            (panels[0], own_loss, other_loss, "loss, nats a token"),
            (panels[1], own_bleu, other_bleu, "BLEU"),
        ):
            axes.plot(tenth, own[:-1], "o-", color=color, label=pair)
            axes.plot(tenth, others[:-1], "--", color=color, label="others")
            axes.axhline(own[-1], color=color, linestyle=":", label="a tenth by chance")
            axes.set(xlabel="tenth of awareness that is removed", ylabel=f"change of {name}")
            axes.grid(alpha=0.3)
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    compare.save(figure, path)


def show_stability(found):
    print("specific neurons found again, by chance; with the same owner, by chance; same layers")
    for name, own in found["agreement"].items():
        row = "".join(f"{value:>8.2f}" for value in own.values())
        print(f"{name:<16}{row}{found['layers'][name]:>8.2f}")
    print("pairs that share what: correlation of awareness, the most aware neurons in common")
    for name, own in found["overlap"].items():
        print(f"{name:<16}" + "".join(f"{value:>8.2f}" for value in own.values()))
    print("by layer: mean variance, then specific neurons of each pair")
    for name, own in found["where"].items():
        print(f"{name:<16}" + "".join(f"{value:>8.3g}" for value in own))


def show_routing(found):
    print("CAR / share after tuning: mean, deviation over tokens; by rate, pair, layer, kind")
    cells = {}
    for entry in found["values"]:
        place = f"{entry['rate']:<8g}{entry['pair']:<9}{entry['layer']:>3}  {entry['kind']:<8}"
        cells.setdefault(place, []).append(entry)
    for place, own in cells.items():
        means = compare.spread([entry["mean"] for entry in own])
        deviation = mean(entry["std"] for entry in own)
        print(f"{place}{means:>27}{deviation:>7.3f}  share {own[0]['share']:.2f}")
    print("BLEU of the tuned pairs, minus BLEU as trained: mean over pairs, from to over seeds")
    for rate in sorted({entry["rate"] for entry in found["bleu"]}):
        own = [entry for entry in found["bleu"] if entry["rate"] == rate]
        for name in [name for name in own[0] if name not in ("rate", "seed", "as trained")]:
            values = []
            for entry in own:
                values.append(mean(entry[name].values()) - mean(entry["as trained"].values()))
            print(f"{rate:<8g}{name:<20}{compare.spread(values):>27}")
    print("cosine of routers: " + ", ".join(f"{k} {v:.2f}" for k, v in found["cosines"].items()))


def plot(out):
    if (out / "results.jsonl").exists():
        return compare.plot(out)
    print(out)
    if (out / "removal.json").exists():
        show_removal(read_json(out / "removal.json"), out / "removal.svg")
    if (out / "stability.json").exists():
        show_stability(read_json(out / "stability.json"))
    if (out / "routing.json").exists():
        show_routing(read_json(out / "routing.json"))


EXPERIMENTS = {"removal": removal, "stability": stability, "routing": routing}


def look(args, settings, out):
    """Make every experiment whose file is not there yet."""
    compare.check_grid(out / "grid.json", settings, "together")
    context = compare.prepare(settings, out)
    for name, experiment in EXPERIMENTS.items():
        if not (out / f"{name}.json").exists():
            write_json(out / f"{name}.json", experiment(context))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    return compare.run_or_plot(parser, argv, plot, look)


if __name__ == "__main__":
    sys.exit(main())
