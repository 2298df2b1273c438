"""A page about a finished run, RUN/report.html: one file, nothing in it from elsewhere.

    python study/picture.py RUN               # the page
    python study/picture.py RUN --readme      # and the README's pictures, study/ffn.svg and run.svg

In this file: what is read; the pictures, each drawn into axes; sentences, token by token; the page.
"""

import io
import re
import shlex
import sys
from dataclasses import fields
from html import escape
from itertools import chain, groupby, islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lander
from data import InputError, exit_status, language_name, parse_json, read_json, read_lines, reading
from data import read_tensors, split_pair, write_text
from study import compare, probe

GENERAL, SPECIFIC, REST = "#4878a8", "#c8602a", "#9a9a9a"
PAIRS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#404040"]


# --------------------------------------------------------------------------------------------------
# What is read


class Run(NamedTuple):
    folder: Path
    args: dict
    analysis: dict  # layers.json: tuned pair -> differences, selected layers
    groups: dict  # neurons.json
    variance: dict  # "neuron", "channel" with --units all -> [K, F], [K, C]: of scaled awareness
    log: list  # the lines of log.jsonl: the first and the last hold validation losses
    results: dict  # results.json: evaluated pair -> before, after
    model: torch.nn.Module
    tokenizer: object


def read_awareness(path):
    """What a file of a run holds. -> [P, K, units]"""
    stored = read_tensors(path)
    with reading(path):
        return torch.stack(list(stored.values()))


def variance_over_pairs(awareness):
    """Of scaled awareness. [P, K, F] -> [K, F]"""
    return lander.scale_awareness(awareness).var(0, correction=0)


def read_run(folder):
    """All of a finished run. InputError where it is none, or damaged."""
    settings = lander.settings_of_run({"tuned": str(folder), "translate": "-"})
    model, tokenizer, _ = lander.load_tuned(settings)
    groups = lander.read_groups(folder / "neurons.json", model.config)
    results, analysis = read_json(folder / "results.json"), read_json(folder / "layers.json")
    with reading(folder / "results.json"):
        for pair, scores in results.items():
            if "after" not in scores:
                raise InputError(f"{folder / 'results.json'}: {pair} has no after: not finished")
    with reading(folder / "log.jsonl"):
        log = [parse_json(line) for line in read_lines(folder / "log.jsonl")]
    args = lander.read_args(folder)
    variance = {"neuron": variance_over_pairs(read_awareness(folder / "awareness.safetensors"))}
    if args["units"] == "all":
        read = read_awareness(folder / "channels.safetensors")
        awareness = lander.channel_awareness(read, model.config)
        variance["channel"] = variance_over_pairs(awareness)
    return Run(folder, args, analysis, groups, variance, log, results, model, tokenizer)


# --------------------------------------------------------------------------------------------------
# The pictures


def draw_ffn(path):
    """x goes through three FFNs, two of them weighed for each token; their sum is y."""
    plt = compare.pyplot()
    from matplotlib.patches import FancyBboxPatch

    figure, axes = plt.subplots(figsize=(8, 3.9))
    axes.set(xlim=(0, 8), ylim=(0, 3.9))
    axes.axis("off")
    factors = "CAR(x) / share", "1", "(1 - CAR(x)) / (1 - share)"
    branches = [
        (1.4, GENERAL, "FFN$_G$: general neurons", "trained by every pair"),
        (4.0, REST, "FFN$_{rest}$: other pairs' neurons", "frozen"),
        (6.6, SPECIFIC, "FFN$_S$: the pair's own neurons", "trained by this pair alone"),
    ]
    axes.text(4, 3.75, "x, one token", ha="center", va="center")
    axes.text(4, 0.12, "y = the sum + b$_{down}$", ha="center", va="center")
    for factor, (x, color, name, note) in zip(factors, branches):
        shape = {"boxstyle": "round,pad=0.05", "fc": color, "ec": "none"}
        axes.add_patch(FancyBboxPatch((x - 1.2, 1.15), 2.4, 0.9, **shape))
        axes.text(x, 1.72, name, ha="center", va="center", color="white")
        axes.text(x, 1.4, note, ha="center", va="center", color="white", fontsize=8)
        axes.text(x, 2.62, f"× {factor}", ha="center", va="center")
        arrow = {"arrowstyle": "-|>", "color": color}
        axes.annotate("", (x, 2.8), (4, 3.6), arrowprops=arrow)
        axes.annotate("", (x, 2.12), (x, 2.48), arrowprops=arrow)
        axes.annotate("", (4, 0.28), (x, 1.08), arrowprops=arrow)
    compare.save(figure, path)
    plt.close(figure)


def legend_above(axes, columns):
    """Where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(ncol=columns, frameon=False, columnspacing=1.2, handlelength=1.6, **place)


def draw_differences(axes, run, pair):
    own = run.analysis[pair]
    layers = range(1, len(own["differences"]) + 1)  # the first layer has no score
    colors = [GENERAL if layer in own["selected"] else "#cccccc" for layer in layers]
    axes.bar(layers, own["differences"], color=colors)
    axes.set(xlabel="layer", ylabel="|A[l] - A[l-1]|", title=f"{pair}: chosen layers in blue")
    axes.set_xticks([layer for layer in layers if len(layers) < 16 or layer in own["selected"]])


def draw_variance(axes, run, unit="neuron"):
    """Which units are specific: those right of the cut, however the pairs share them."""
    F = run.variance[unit].shape[1]
    epsilon = run.args["epsilon"]
    specific = round((1 - epsilon) * F)
    cut = F - specific
    axes.axvspan(0, cut, color=GENERAL, alpha=0.15, linewidth=0)
    axes.axvspan(cut, F, color=SPECIFIC, alpha=0.25, linewidth=0)
    axes.axvline(cut, color="black", linewidth=1)
    for number, (layer, variance) in enumerate(zip(run.groups, run.variance[unit])):
        style = {"color": PAIRS[number % len(PAIRS)], "linewidth": 1.5}
        axes.plot(range(1, F + 1), variance.sort().values, label=f"layer {layer}", **style)
    axes.set(yscale="log", xlim=(0, F), ylabel="variance over pairs")
    axes.set_xlabel(f"{unit}s, sorted: {cut} general | {specific} specific (epsilon = {epsilon})")
    legend_above(axes, columns=4)


def frame_cells(axes, cells):
    from matplotlib.patches import Rectangle

    for row, column in cells:
        axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, linewidth=2))


def draw_owners(axes, run, unit="neuron"):
    """How many neurons or channels of each layer each pair owns."""
    kind = {"neuron": "specific", "channel": "channels"}[unit]
    pairs = list(next(iter(run.groups.values()))["specific"])
    counts = torch.zeros(len(pairs), len(run.groups))
    texts, trained = {}, []
    for column, group in enumerate(run.groups.values()):
        for row, pair in enumerate(pairs):
            counts[row, column] = texts[row, column] = len(group[kind][pair])
            if pair in group["share"]:
                trained.append((row, column))
    limits = 0, 1.6 * max(1, counts.max().item())  # no color so dark that it hides the number
    compare.draw_cells(axes, counts, texts, pairs, list(run.groups), limits, "Oranges")
    frame_cells(axes, trained)
    axes.set(xlabel="layer", title=f"{unit}s owned; framed: trained by the pair")


def draw_losses(axes, run):
    first, *steps, last = run.log
    for number, pair in enumerate(run.analysis):
        color = PAIRS[number % len(PAIRS)]
        own = [entry for entry in steps if entry["pair"] == pair]
        losses = [entry["loss"] for entry in own]
        axes.plot([entry["step"] for entry in own], losses, color=color, label=pair, linewidth=1)
        if pair in first["valid_loss"] and pair in last["valid_loss"]:
            ends = [line["valid_loss"][pair] for line in (first, last)]
            marks = {"marker": "o", "linestyle": "--", "label": f"{pair}, validation"}
            axes.plot([0, last["step"]], ends, color=color, **marks)
    axes.set(xlabel="step", ylabel="loss of a target token, nats")
    axes.grid(alpha=0.3)
    legend_above(axes, columns=2)


def draw_bleu(axes, run):
    """BLEU of each evaluated pair before and after, in the color of its change."""
    codes = languages(run)
    change = torch.full((len(codes), len(codes)), torch.nan)
    texts, tuned = {}, []
    for pair, scores in run.results.items():
        cell = tuple(map(codes.index, split_pair(pair)))
        before, after = scores["before"]["bleu"], scores["after"]["bleu"]
        change[cell] = after - before
        texts[cell] = f"{after - before:+.1f}\n{before:.1f} → {after:.1f}"
        if pair in run.analysis:
            tuned.append(cell)
    limit = 1.8 * max(1, change.nan_to_num().abs().max().item())
    compare.draw_cells(axes, change, texts, codes, codes, (-limit, limit), "PuOr")
    frame_cells(axes, tuned)
    axes.set(xlabel="to", ylabel="from", title="change of BLEU; before → after; framed: tuned")


def languages(run):
    """Codes of the evaluated pairs' languages, sorted."""
    return sorted({code for pair in run.results for code in split_pair(pair)})


def draw_run(run, path):
    """What README shows of the page."""
    plt = compare.pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    for axes, draw in zip(panels.flat, (draw_variance, draw_owners, draw_losses, draw_bleu)):
        draw(axes, run)
    compare.save(figure, path)
    plt.close(figure)


def picture(label, size, draw, *arguments):
    """A figure of its own, of size in inches, with what `draw` draws into its axes, as HTML."""
    plt = compare.pyplot()
    buffer = io.StringIO()
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    draw(axes, *arguments)
    compare.save(figure, buffer)
    plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same names in every picture, and used by none
    style = f"min-width: {70 * size[0]:.0f}px" if size[0] > 5 else ""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" style="{style}"', 1)
    return f'<div class="wide">{svg}</div>'


# --------------------------------------------------------------------------------------------------
# Sentences, token by token


SENTENCES = 3
RIGHT_TO_LEFT = ("ar", "fa", "he", "ps", "ur")


def in_language(code):
    """Attributes of an element with text in a language."""
    direction = "rtl" if code in RIGHT_TO_LEFT else "ltr"
    return f'lang="{code}" dir="{direction}"'


def visible_tokens(tokenizer, ids):
    """The text of each token; "" for one that ends inside a character, which the next one shows."""
    texts = []
    shown = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        ends_inside = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if ends_inside else text[shown:])
        shown += len(texts[-1])
    return texts


def shade(value, limit):
    """The color of a factor: white where it is 1, as at the start; blue above, orange below."""
    color = GENERAL if value > 1 else SPECIFIC
    part = 0.7 * abs(value - 1) / limit
    mixed = [round(255 + part * (int(color[i : i + 2], 16) - 255)) for i in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def shaded_tokens(tokenizer, ids, values, limit):
    """Tokens as text, in the color of their value, which the title tells."""
    shown = ""
    waiting = []
    for text, value in zip(visible_tokens(tokenizer, ids), values):
        waiting.append(value)
        if text:
            title = " ".join(f"{value:.3f}" for value in waiting)
            color = shade(mean(waiting), limit)
            text = escape(text.replace("\n", "↵\n"))
            shown += f'<span style="background:{color}" title="{title}">{text}</span>'
            waiting = []
    return shown


def read_sentences(run, pair):
    """The first test sentences. -> [(source, reference, before, after), ...], tokens of each

    tokens: as in tokens_table, with the mean CAR / share of the layers that route the pair
    """
    if pair not in run.results:
        return [], []
    names = ("source", "reference", "before", "after")
    paths = [run.folder / "hypotheses" / f"{pair}.{name}.txt" for name in names]
    sentences = list(islice(zip(*map(read_lines, paths)), SENTENCES))
    tokens = []
    for source, reference, *_ in sentences:
        ids, kinds = probe.kinds_of_tokens(run.tokenizer, pair, source, reference)
        layers = probe.token_factors(run.model, run.tokenizer, pair, ids).values()
        factors = torch.stack(list(layers)).mean(0).tolist() if layers else []
        tokens.append(list(zip(ids, kinds, factors)))
    return sentences, tokens


def tokens_table(run, pair, tokens, limit):
    """A row for each stretch of prompt, source or target, from top to bottom as the model reads.

    tokens: (id, "prompt", "source" or "target", CAR / share) of each
    """
    source, target = split_pair(pair)
    codes = {"prompt": "en", "source": source, "target": target}
    rows = ""
    for kind, stretch in groupby(tokens, key=lambda token: token[1]):
        ids, _, values = zip(*stretch)
        shown = shaded_tokens(run.tokenizer, ids, values, limit)
        cell = f'<td class="tokens" {in_language(codes[kind])}>{shown}</td>'
        rows += f"<tr><th scope=row>{kind}<td>{mean(values):.2f}{cell}"
    head = "<tr><th scope=col>part<th scope=col>mean<th scope=col>tokens"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def show_sentences(run):
    """Each tuned pair's sentences, with tokens where the pair is routed."""
    page = ""
    everything = {pair: read_sentences(run, pair) for pair in run.analysis}
    each = [token for _, tokens in everything.values() for token in chain.from_iterable(tokens)]
    limit = max([0.01, *(abs(value - 1) for _, _, value in each)])
    if each:
        ends = shade(1 - limit, limit), "#fff", shade(1 + limit, limit)
        page += f"""<p class="scale"><span>{1 - limit:.2f}<br>the pair's own</span>
            <i style="background: linear-gradient(to right, {", ".join(ends)})"></i>
            <span>{1 + limit:.2f}<br>general</span></p>"""
    for pair, (sentences, tokens) in everything.items():
        source, target = split_pair(pair)
        page += f"<h3>{pair}: {language_name(source)} to {language_name(target)}</h3>"
        layers = [name for name, group in run.groups.items() if group["share"].get(pair)]
        if run.args["no_routing"]:
            page += "<p>Trained without routing (--no-routing): there is no CAR to show.</p>"
        elif not layers:
            page += "<p>No layer has a share to route it by: there is no CAR to show.</p>"
        else:
            page += f"<p>Layers that route it: {', '.join(layers)}.</p>"
        if not sentences:
            page += "<p>It was not evaluated: there are no translations to show.</p>"
        for lines, own in zip(sentences, tokens):
            page += "<article><dl>"
            labels = ("source", "reference", "before tuning", "after tuning")
            for label, line, code in zip(labels, lines, (source, target, target, target)):
                page += f"<dt>{label}<dd {in_language(code)}>{escape(line) or '(nothing)'}"
            page += f"</dl>{tokens_table(run, pair, own, limit) if own else ''}</article>"
    return page


# --------------------------------------------------------------------------------------------------
# The page


STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #1a1a1a; background: #fff; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2; margin: 0 0 .5rem }
h3 { margin-top: 2rem }
section { border-top: 1px solid #bbb; padding: 1.5rem 0 }
.wide { overflow-x: auto }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin-bottom: .5rem }
code { background: #f0f0f0; padding: .1rem .3rem }
article { border-left: 3px solid #bbb; padding-left: .8rem; margin: 1.2rem 0 }
dl { margin: 0 0 .6rem }
dt, th { color: #555; font-weight: normal; text-align: start; white-space: nowrap }
dd { margin: 0 0 .3rem; justify-self: start }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem .15rem 0; vertical-align: top }
td { min-width: 2.2rem }
.tokens { white-space: pre-wrap; line-height: 1.8; min-width: 12rem }
.tokens span { box-shadow: inset 1px 0 #999; padding-block: .15rem }
.scale { display: flex; gap: .6rem; align-items: center; max-width: 30rem; font-size: .85rem }
.scale i { flex: 1; height: 1rem; border: 1px solid #888 }
@media (min-width: 56rem) {
  .beside { display: grid; grid-template-columns: 2fr 3fr; column-gap: 2.5rem }
  dl { display: grid; grid-template-columns: max-content 1fr; column-gap: .8rem } }
"""

TEXTS = {
    "Layers": """Each block adds to the mean of the residual stream. A bar is how much the mean over
        a pair's prompts changes from one layer to the next; the layers that change it most (blue)
        are chosen, and nothing outside them is trained. The first layer has no score.""",
    "Which neurons are specific": """Awareness says how much a pair's loss needs a neuron. Sorted by
        how much it varies over pairs, neurons on the left matter to all pairs alike: they are
        language-general. Those right of the black line, the share 1 - epsilon that varies most, are
        language-specific. A line is a layer; a steep end means that the split is a clear one. With
        --units all attention's channels are split alike.""",
    "Who owns them": """Each specific neuron belongs to the pair that needs it most. A row is a
        pair, a column a layer, a cell the number of neurons. A tuned pair trains the general
        neurons and those in its framed cells; what other pairs own stays as it was, to the bit.""",
    "Loss": """Solid: the loss of each training step, which is of other sentences every time, and so
        jumps. Dashed: of the validation text before and after training; compare its two ends. Both
        falling is learning; training alone falling would be memorizing.""",
    "BLEU": """How well test sentences are translated, from the languages of the rows to those of
        the columns. Above, what tuning changed: purple is better, orange worse. Framed pairs were
        tuned and should gain; any other that lost was forgotten in part.""",
    "Sentences": """The first test sentences of each tuned pair. Shown token by token: CAR divided
        by its start, the general share: the factor that weighs the general neurons' input, as the
        mean over the layers that route the pair. At the start it is 1 everywhere (white). Blue
        tokens lean more on general neurons than before tuning, orange ones more on the pair's own.
        The target is the reference, and the number before a stretch of tokens their mean; pointing
        at a token shows its own.""",
}


def command_of(args):
    """The command line of a run."""
    words = ["python", "lander.py"]
    for setting in fields(lander.Settings):
        value = args.get(setting.name, setting.default)
        if value != setting.default:
            words += [lander.flag_of(setting.name), *[str(value)] * (value is not True)]
    return shlex.join(words)


def section(heading, text, shown, beside=True):
    kind = "beside" if beside else "below"
    text = f"<div><h2>{heading}</h2><p>{text}</p></div>"
    return f'<section class="{kind}">{text}<div>{shown}</div></section>'


def show_page(run):
    """-> the page as HTML"""
    pairs, width = next(iter(run.groups.values()))["specific"], max(4.6, 0.85 * len(languages(run)))
    layers = variances = owners = ""
    for pair in run.analysis:
        layers += picture(f"layers of {pair}", (4.6, 2.2), draw_differences, run, pair)
    for unit in run.variance:
        variances += picture(f"variance of {unit}s", (4.6, 3.4), draw_variance, run, unit)
        size = 4.6, 1 + 0.3 * len(pairs)
        owners += picture(f"owners of {unit}s", size, draw_owners, run, unit)
    shown = {
        "Layers": layers,
        "Which neurons are specific": variances,
        "Who owns them": owners,
        "Loss": picture("loss", (4.6, 3.4), draw_losses, run),
        "BLEU": picture("BLEU", (width, 0.8 * width), draw_bleu, run),
    }
    if not run.log[0]["valid_loss"]:
        shown["Loss"] += "<p>There was no validation text.</p>"
    body = "".join(section(heading, TEXTS[heading], own) for heading, own in shown.items())
    body += section("Sentences", TEXTS["Sentences"], show_sentences(run), beside=False)
    title = f"LANDeRMT: {', '.join(run.analysis)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head>
<body><h1>{title}</h1><p><code>{escape(command_of(run.args))}</code></p>{body}</body></html>
"""


def main(argv=None):
    parser = lander.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--readme", action="store_true", help="draw study/ffn.svg and run.svg, too")

    def command():
        args = parser.parse_args(argv)
        run = read_run(args.run)
        write_text(args.run / "report.html", show_page(run))
        print(args.run / "report.html")
        if args.readme:
            draw_ffn(ROOT / "study" / "ffn.svg")
            draw_run(run, ROOT / "study" / "run.svg")

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
