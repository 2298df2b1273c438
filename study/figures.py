"""The figures: of a finished run, of the method, of the study. All that draws with matplotlib.

Each draws into axes that the caller made, so that any of them can stand alone or beside others. A
run is what report.read_run returns.
"""

import io
import itertools
import math
import re
from statistics import mean

import torch

import lander
from data import split_pair
from study.methods import METHODS
from study.tables import equal_loss, verdict

GENERAL, SPECIFIC, REST = "#4878a8", "#c8602a", "#9a9a9a"
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#404040", "#8c564b"]


# --------------------------------------------------------------------------------------------------
# Figures and files


def pyplot():
    """matplotlib.pyplot, set to write the same bytes every time, with text that stays text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lander", "font.size": 9})
    return plt


def save(figure, path):
    """Write a figure as SVG, to a path or an open file, and forget it."""
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # none of them
    figure.savefig(path, format="svg", metadata=metadata, bbox_inches="tight")
    pyplot().close(figure)


def picture(size, draw, *arguments):
    """What draw(axes, *arguments) draws, as HTML. size: width and height in inches"""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    draw(axes, *arguments)
    file = io.StringIO()
    save(figure, file)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same names in every figure, and used by none
    # It scrolls where a window is narrower than its text allows.
    inner = f'<div style="min-width: {60 * size[0]:.0f}px">{svg}</div>'
    return f'<div style="overflow-x: auto">{inner}</div>'


# --------------------------------------------------------------------------------------------------
# Parts of figures


def color_of(number):
    return COLORS[number % len(COLORS)]


def legend_above(axes, columns):
    """Where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(ncol=columns, frameon=False, columnspacing=1.2, handlelength=1.6, **place)


def draw_cells(axes, values, texts, rows, columns, limits, colors):
    """A map with text in its cells.

    values: [rows, columns], NaN for no color; texts: (row, column) -> text; rows, columns: their
    labels; limits: the values that have the first and the last color of the colormap `colors`
    """
    mesh = {"cmap": colors, "vmin": limits[0], "vmax": limits[1]}
    axes.pcolormesh(values.numpy(), edgecolors="white", linewidth=1, **mesh)
    axes.invert_yaxis()
    for (row, column), text in texts.items():
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.tick_params(length=0)


def frame_cells(axes, cells):
    from matplotlib.patches import Rectangle

    for row, column in cells:
        axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, linewidth=2))


# --------------------------------------------------------------------------------------------------
# A run


def draw_differences(axes, run, pair):
    """How much each layer changes the mean, and which layers that selects."""
    own = run.analysis[pair]
    layers = range(1, len(own["differences"]) + 1)  # the first layer has no score
    colors = [GENERAL if layer in own["selected"] else "#cccccc" for layer in layers]
    axes.bar(layers, own["differences"], color=colors)
    axes.set(xlabel="layer", ylabel="|A[l] - A[l-1]|", title=f"{pair}: selected layers in blue")
    axes.set_xticks([layer for layer in layers if len(layers) < 16 or layer in own["selected"]])


def draw_variance(axes, run, unit="neuron"):
    """Which units are specific: those right of the cut, however the pairs share them."""
    variance = lander.scale_awareness(run.awareness[unit]).var(0, correction=0)  # [K, F]
    F, epsilon = variance.shape[1], run.args["epsilon"]
    specific = round((1 - epsilon) * F)
    cut = F - specific
    axes.axvspan(0, cut, color=GENERAL, alpha=0.15, linewidth=0)
    axes.axvspan(cut, F, color=SPECIFIC, alpha=0.25, linewidth=0)
    axes.axvline(cut, color="black", linewidth=1)
    for number, (layer, own) in enumerate(zip(run.groups, variance)):
        style = {"color": color_of(number), "linewidth": 1.5}
        axes.plot(range(1, F + 1), own.sort().values, label=f"layer {layer}", **style)
    axes.set(yscale="log", xlim=(0, F), ylabel="variance over pairs")
    axes.set_xlabel(f"{unit}s, sorted: {cut} general | {specific} specific (epsilon = {epsilon})")
    legend_above(axes, columns=4)


def draw_owners(axes, run, unit="neuron"):
    """How many units of each layer each pair owns."""
    key = {"neuron": "specific", "channel": "channels"}[unit]
    pairs = list(next(iter(run.groups.values()))[key])
    counts = torch.zeros(len(pairs), len(run.groups))
    texts, trained = {}, []
    for column, group in enumerate(run.groups.values()):
        for row, pair in enumerate(pairs):
            counts[row, column] = texts[row, column] = len(group[key][pair])
            if pair in group["share"]:
                trained.append((row, column))
    limits = 0, 1.6 * max(1, counts.max().item())  # no color so dark that it hides the number
    draw_cells(axes, counts, texts, pairs, list(run.groups), limits, "Oranges")
    frame_cells(axes, trained)
    axes.set(xlabel="layer", title=f"{unit}s owned; framed: trained by the pair")


def draw_losses(axes, run):
    """Of each tuned pair: the loss of every step, and that on the development set."""
    for number, pair in enumerate(run.analysis):
        color = color_of(number)
        steps = [entry for entry in run.log if entry.get("pair") == pair]
        losses = [entry["loss"] for entry in steps]
        axes.plot([entry["step"] for entry in steps], losses, color=color, label=pair, linewidth=1)
        entries = [entry for entry in run.log if pair in entry.get("valid_loss", ())]
        if entries:
            losses = [entry["valid_loss"][pair] for entry in entries]
            style = {"marker": "o", "linestyle": "--", "label": f"{pair}, development set"}
            axes.plot([entry["step"] for entry in entries], losses, color=color, **style)
    axes.set(xlabel="step", ylabel="loss of a target token, nats")
    axes.grid(alpha=0.3)
    legend_above(axes, columns=2)


def draw_bleu(axes, run):
    """BLEU of each evaluated pair before and after, in the color of its change."""
    codes = languages(run)
    change = torch.full((len(codes), len(codes)), torch.nan)
    texts, tuned = {}, []
    for pair, scores in run.results.items():
        source, target = split_pair(pair)
        cell = codes.index(source), codes.index(target)
        before, after = scores["before"]["bleu"], scores["after"]["bleu"]
        change[cell] = after - before
        texts[cell] = f"{after - before:+.1f}\n{before:.1f} → {after:.1f}"
        if pair in run.analysis:
            tuned.append(cell)
    limit = 1.8 * max(1, change.nan_to_num().abs().max().item())
    draw_cells(axes, change, texts, codes, codes, (-limit, limit), "PuOr")
    frame_cells(axes, tuned)
    axes.set(xlabel="to", ylabel="from", title="change of BLEU; before → after; framed: tuned")


def languages(run):
    """Codes of the evaluated pairs' languages, sorted."""
    return sorted({code for pair in run.results for code in split_pair(pair)})


# --------------------------------------------------------------------------------------------------
# The method


def draw_ffn(path):
    """x goes through three FFNs, two of them weighed for each token; their sum is y."""
    figure, axes = pyplot().subplots(figsize=(8, 3.9))
    from matplotlib.patches import FancyBboxPatch

    axes.set(xlim=(0, 8), ylim=(0, 3.9))
    axes.axis("off")
    middle = {"ha": "center", "va": "center"}
    axes.text(4, 3.75, "x, one token", **middle)
    axes.text(4, 0.12, "y = the sum + b$_{down}$", **middle)
    branches = [
        (1.4, GENERAL, "FFN$_G$: general neurons", "trained by every pair"),
        (4.0, REST, "FFN$_{rest}$: other pairs' neurons", "frozen"),
        (6.6, SPECIFIC, "FFN$_S$: the pair's own neurons", "trained by this pair alone"),
    ]
    factors = "CAR(x) / share", "1", "(1 - CAR(x)) / (1 - share)"
    for factor, (x, color, name, note) in zip(factors, branches):
        box = {"boxstyle": "round,pad=0.05", "fc": color, "ec": "none"}
        axes.add_patch(FancyBboxPatch((x - 1.2, 1.15), 2.4, 0.9, **box))
        axes.text(x, 1.72, name, color="white", **middle)
        axes.text(x, 1.4, note, color="white", fontsize=8, **middle)
        axes.text(x, 2.62, f"× {factor}", **middle)
        arrow = {"arrowstyle": "-|>", "color": color}
        axes.annotate("", (x, 2.8), (4, 3.6), arrowprops=arrow)
        axes.annotate("", (x, 2.12), (x, 2.48), arrowprops=arrow)
        axes.annotate("", (4, 0.28), (x, 1.08), arrowprops=arrow)
    save(figure, path)


# --------------------------------------------------------------------------------------------------
# The study's


def draw_study(settings, path):
    """The study in one figure. settings: of each column; the first is that of the points"""
    figure, (left, right) = pyplot().subplots(
        1, 2, figsize=(11.5, 4.6), layout="constrained", width_ratios=(1.5, 1)
    )
    draw_methods(left, settings)
    draw_costs(right, settings[0])
    save(figure, path)


def draw_methods(axes, settings):
    """BLEU of each method less LANDeRMT's, where other pairs' perplexity is up by 2%."""
    names = [setting.name for setting in settings]
    plain = {name for setting in settings for name in setting.runs if "+" not in name}
    methods = [name for name in METHODS if name in plain - {"lander"}]
    values = torch.full((len(methods), len(settings)), torch.nan)
    texts, level, alone = {}, [], []
    for cell in itertools.product(range(len(methods)), range(len(settings))):
        setting, method = settings[cell[1]], methods[cell[0]]
        if method not in setting.runs:
            continue
        found = equal_loss(setting, method)
        if found is None:
            texts[cell] = "†"
            continue
        texts[cell] = f"{mean(found):+.1f}"
        if verdict(found) == "level":
            level.append(cell)
        else:
            values[cell] = math.copysign(abs(mean(found)) ** 0.5, mean(found))
        if len(found) == 1:
            alone.append(cell)
    draw_cells(axes, values, texts, methods, names, (-8, 8), "PuOr")  # square roots
    shade_cells(axes, level, facecolor="#d0d0d0")
    shade_cells(axes, alone, fill=False, hatch="////", edgecolor="#00000030")
    axes.set_xticklabels([name.replace("-", "\n", 1) for name in names], fontsize=8)
    axes.set_title("BLEU less LANDeRMT's, others' perplexity up by 2%", fontsize=9)
    note = "grey: seeds disagree; hatched: one seed; white: not run; †: others lose more"
    axes.set_xlabel(note, fontsize=8)


def draw_costs(axes, setting):
    """What the tuned pair gains against what others lose: a point a run; names at the best rate."""
    methods = [name for name in METHODS if name in setting.runs]
    best = []  # what each method gains and costs, its name and color
    for number, method in enumerate(methods):
        color = color_of(number)
        for kind, marker in (("other", "o"), ("reverse", "x")):
            for rate in setting.up_to_best(method):
                seeds = setting.runs[method][rate]
                x = [setting.loss(line, kind) for line in seeds.values()]
                y = [setting.bleu(line) for line in seeds.values()]
                axes.scatter(x, y, 18, color, marker=marker, linewidths=1)
                if kind == "other" and rate == setting.best(method):
                    best.append((y[0], x[0], method, color))  # the first seed
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    height = bottom
    for y, x, method, color in sorted(best):
        height = max(y, height + (top - bottom) / 20)  # no name on another
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
        style = {"color": color, "arrowprops": line, "fontsize": 8, "ha": "right", "va": "center"}
        axes.annotate(method, (x, y), (left, height), **style)
    axes.set_xlim(left - 0.3 * (right - left), right)  # room for the names
    axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(xlabel="loss of pairs that were not tuned, change in nats", ylabel="BLEU gained")
    axes.set_title(f"{setting.name}: ● other pairs, × the reverse pair", fontsize=9)
    axes.grid(alpha=0.3)


def shade_cells(axes, cells, **style):
    """Cover cells of draw_cells."""
    from matplotlib.patches import Rectangle

    for row, column in cells:
        axes.add_patch(Rectangle((column, row), 1, 1, linewidth=0, zorder=1, **style))
