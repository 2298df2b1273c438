"""A page about a finished run, RUN/report.html: one file, nothing in it from elsewhere.

    pip install matplotlib
    python study/report.py RUN

In this file: a run's files; sentences, token by token; the page. The pictures are in figures.py.
"""

import argparse
import json
import sys
from html import escape
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lander
from data import InputError, exit_status, name_languages, pair_name, read_if_there, read_json
from data import read_lines, read_tensors, render, split_pair, write_text
from study import figures


# --------------------------------------------------------------------------------------------------
# A run's files


class Run(NamedTuple):
    folder: Path
    args: dict  # args.json
    analysis: dict  # layers.json: tuned pair -> differences, selected layers
    groups: dict  # neurons.json
    awareness: dict  # "neuron" -> [P, K, F]; with --units all "channel" -> [P, K, C], too
    log: list  # the lines of log.jsonl
    results: dict  # results.json: evaluated pair -> before, after
    model: torch.nn.Module
    tokenizer: object


def read_run(folder):
    """All of a finished run. InputError for another folder, and while evaluation lacks pairs."""
    results = read_if_there(folder / "results.json")
    if not results or any("after" not in scores for scores in results.values()):
        raise InputError(f"{folder}: not the folder of a finished run")
    args = read_json(folder / "args.json")
    words = "--tuned", str(folder), "--translate", "-", "--device", "cpu"
    settings = lander.read_settings(words, **args)
    name_languages(settings.language)
    model, tokenizer, _ = lander.load_tuned(settings)
    scores = torch.stack(list(read_tensors(folder / "awareness.safetensors").values()))
    size = model.config.ffn_size  # [P, K, F], and with --units all [P, K, F + H * d]
    awareness = {"neuron": scores[..., :size]}
    if args["units"] == "all":
        _, columns = lander.channel_places(model.config)
        awareness["channel"] = scores[..., size:][..., columns].mean(-1)
    analysis, groups = read_json(folder / "layers.json"), read_json(folder / "neurons.json")
    log = [json.loads(line) for line in read_lines(folder / "log.jsonl")]
    return Run(folder, args, analysis, groups, awareness, log, results, model, tokenizer)


# --------------------------------------------------------------------------------------------------
# Sentences, token by token


SENTENCES = 3
KINDS = "source", "reference", "before", "after"


def read_examples(run, pair):
    """The first of its test set. -> [(texts of KINDS, ids that the model reads, factors), ...]"""
    if pair not in run.results:
        return []
    examples, paths = [], [run.folder / "hypotheses" / f"{pair}.{kind}.txt" for kind in KINDS]
    for texts in islice(zip(*map(read_lines, paths)), SENTENCES):
        prompt, target = render(run.tokenizer, pair, *texts[:2], run.args["template"])
        ids = prompt + target[:-1]
        examples.append((texts, ids, token_factors(run, pair, ids)))
    return examples


def routing_ffns(run, pair):
    """layer -> its RoutedFFN, of those that route the pair"""
    ffns = {int(layer): run.model.blocks[int(layer)].ffn for layer in run.groups}
    return {layer: ffn for layer, ffn in ffns.items() if pair in ffn.share}


@torch.no_grad()
def token_factors(run, pair, ids):
    """CAR / share of each token, the mean over layers that route the pair. -> [T], [] if none do"""
    lander.route(run.model, pair)
    routed = routing_ffns(run, pair)
    with lander.recording(run.model, [(layer, "ffn") for layer in routed]) as x:
        run.model.hidden_states(torch.tensor([ids]))
    factors = [ffn.factors(x[layer, "ffn"])[0][0] for layer, ffn in routed.items()]  # [T] each
    return torch.stack(factors).mean(0).tolist() if factors else []


def visible_tokens(tokenizer, ids):
    """The text of each token; "" for one that ends inside a character, which the next one shows."""
    texts, shown = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])[shown:]
        ends_inside = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if ends_inside else text)
        shown += len(texts[-1])
    return texts


def shaded(text, factors, limit):
    """Text in the color of the mean of its factors: white for 1, as before training; blue above,
    orange below, deepest where it is `limit` away. Pointing at it shows them."""
    factor = mean(factors)
    color = figures.GENERAL if factor > 1 else figures.SPECIFIC
    part = 0.7 * abs(factor - 1) / limit
    mixed = [round(255 + part * (int(color[i : i + 2], 16) - 255)) for i in (1, 3, 5)]
    color, title = "%02x%02x%02x" % tuple(mixed), " ".join(f"{own:.3f}" for own in factors)
    text = escape(text).replace("\n", "↵\n")
    return f'<span style="background:#{color}" title="{title}">{text}</span>'


def shaded_tokens(tokenizer, ids, factors, limit):
    """Tokens as text, each in the color of its factor; those of one character together."""
    shown, waiting = "", []
    for text, factor in zip(visible_tokens(tokenizer, ids), factors):
        waiting.append(factor)
        if text:
            shown += shaded(text, waiting, limit)
            waiting = []
    return f'<p class="tokens" dir="auto">{shown}</p>' if shown else ""


def show_sentences(run):
    """Each tuned pair's sentences, with tokens where the pair is routed."""
    examples = {pair: read_examples(run, pair) for pair in run.analysis}
    away = [abs(f - 1) for own in examples.values() for _, _, factors in own for f in factors]
    limit = max([0.01, *away])
    legend = {"the pair's own": 1 - limit, "as before training": 1.0, "general": 1 + limit}
    legend = " ".join(shaded(text, [factor], limit) for text, factor in legend.items())
    page = f'<p class="tokens">{legend}</p>' if away else ""
    for pair, own in examples.items():
        page += f"<h3>{pair}: {' to '.join(pair_name(pair))}</h3>"
        layers = ", ".join(map(str, routing_ffns(run, pair))) or "none, so there is no CAR to show"
        page += f"<p>Layers that route it: {layers}.{'' if own else ' It was not evaluated.'}</p>"
        source, target = split_pair(pair)
        for texts, ids, factors in own:
            page += "<article><dl>"
            for kind, text, code in zip(KINDS, texts, (source, target, target, target)):
                page += f'<dt>{kind}<dd lang="{code}" dir="auto">{escape(text) or "(nothing)"}'
            page += f"</dl>{shaded_tokens(run.tokenizer, ids, factors, limit)}</article>"
    return page


# --------------------------------------------------------------------------------------------------
# The page


STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2; margin: 1rem 0 .5rem }
section { border-top: 1px solid #bbb; padding: .5rem 0 1.5rem }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin-bottom: .5rem }
article { border-left: 3px solid #bbb; padding-left: .8rem; margin: 1.2rem 0 }
dt, th { color: #555; font-weight: normal; text-align: start; padding-inline-end: 1rem }
dl { display: grid; grid-template-columns: max-content 1fr }
dl, dd { margin: 0 }
.tokens { white-space: pre-wrap; line-height: 1.8 }
.tokens span { box-shadow: inset 1px 0 #999; padding-block: .15rem }
@media (min-width: 56rem) { section { display: grid; grid-template-columns: 2fr 3fr; gap: 2rem } }
"""

TEXTS = {
    "Layers": """Each block adds to the mean of the residual stream. A bar is how much the mean over
        a pair's prompts changes from one layer to the next. The layers that change it most (blue)
        are selected, and nothing outside them is trained. The first layer has no score.""",
    "Specific neurons": """Awareness says how much a pair's loss needs a neuron. Sorted by how much
        it varies over pairs, neurons on the left matter to all pairs alike: they are
        language-general. Those right of the black line, the share 1 - epsilon that varies most, are
        language-specific. A line is a layer; a steep end means that the split is a clear one. With
        --units all attention's channels are split alike.""",
    "Their owners": """Each specific neuron belongs to the pair that needs it most. A row is a
        pair, a column a layer, a cell the number of neurons. A tuned pair trains the general
        neurons and those in its framed cells; what other pairs own stays as it was, to the bit.""",
    "Loss": """Solid: the loss of each training step, which is of other sentences every time, and so
        jumps. Dashed: the loss on the development set (valid.*). Both falling is learning; the
        training loss alone falling would be overfitting.""",
    "BLEU": """Of the test set, from the languages of the rows to those of the columns. The baseline
        is the model before tuning. Above it, what tuning changed: purple is better, orange worse.
        Framed pairs were tuned and should gain; any other that lost was forgotten in part.""",
    "Sentences": """The first of each tuned pair's test set, translated before (the baseline) and
        after tuning. Below, prompt and reference as the model reads them, token by token: CAR
        divided by the general share, which is the factor that weighs the general neurons' input, as
        the mean over the layers that route the pair. Before training it is 1 (white). Blue tokens
        lean more on general neurons, orange ones more on the pair's own; pointing at one shows its
        factor.""",
}


def show_settings(args):
    """What was not the default, as a table."""
    usual = vars(lander.read_settings())
    rows = ""
    for name, value in args.items():
        if name not in ("files", "new_tokens") and value != usual.get(name):
            rows += f"<tr><th scope=row>{name}<td>{escape(str(value))}"
    return f"<p>Settings that are not the defaults:</p><table>{rows}</table>"


def show_page(run):
    """-> the page as HTML"""
    shown = dict.fromkeys(TEXTS, "")  # heading -> pictures and the like
    for pair in run.analysis:
        shown["Layers"] += figures.picture((4.6, 2.2), figures.draw_differences, run, pair)
    height = 1 + 0.3 * len(next(iter(run.groups.values()))["specific"])
    for unit in run.awareness:
        shown["Specific neurons"] += figures.picture((4.6, 3.4), figures.draw_variance, run, unit)
        shown["Their owners"] += figures.picture((4.6, height), figures.draw_owners, run, unit)
    shown["Loss"] = figures.picture((4.6, 3.4), figures.draw_losses, run)
    if not any(entry.get("valid_loss") for entry in run.log):
        shown["Loss"] += "<p>There was no development set.</p>"
    width = max(4.6, 0.85 * len(figures.languages(run)))
    shown["BLEU"] = figures.picture((width, 0.8 * width), figures.draw_bleu, run)
    shown["Sentences"] = show_sentences(run)
    body = ""
    for heading, text in TEXTS.items():
        body += f"<section><div><h2>{heading}</h2><p>{text}</p></div>"
        body += f"<div>{shown[heading]}</div></section>"
    title = f"LANDeRMT: {', '.join(run.analysis)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head>
<body><h1>{title}</h1>{show_settings(run.args)}{body}</body></html>
"""


def write_report(folder):
    path = folder / "report.html"
    write_text(path, show_page(read_run(folder)))
    print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    return exit_status(write_report, parser.parse_args(argv).run)


if __name__ == "__main__":
    sys.exit(main())
