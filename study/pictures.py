"""The README's two pictures, as SVG beside this file.

    python study/pictures.py runs/demo/run          # a finished run: the demo's, or any other

ffn.svg    the regrouped FFN and its three branches
run.svg    of the run's last selected layer, the variance of each neuron's awareness over pairs,
           sorted, with the cut that epsilon makes; and the change of BLEU from each source language
           to each target language, the tuned pairs framed
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lander
from data import exit_status, read_json, read_tensors, split_pair

# Text stays text, and the same picture is the same bytes.
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lander", "font.size": 10})
GENERAL, SPECIFIC, REST = "#4878a8", "#c8602a", "#9a9a9a"


def save(figure, path):
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def draw_ffn(path):
    """x goes through three FFNs, two of them weighed for each token; their sum is y."""
    figure, axes = plt.subplots(figsize=(8, 3.9))
    axes.set(xlim=(0, 8), ylim=(0, 3.9))
    axes.axis("off")
    branches = [
        (1.4, GENERAL, "FFN$_G$: general neurons", "trained by every pair", "CAR(x) / share"),
        (4.0, REST, "FFN$_{rest}$: other pairs' neurons", "frozen", "1"),
        (6.6, SPECIFIC, "FFN$_S$: the pair's own neurons", "trained by this pair alone", None),
    ]
    axes.text(4, 3.75, "x, one token", ha="center", va="center")
    axes.text(4, 0.12, "y = the sum + b$_{down}$", ha="center", va="center")
    for x, color, name, note, factor in branches:
        box = FancyBboxPatch(
            (x - 1.2, 1.15), 2.4, 0.9, boxstyle="round,pad=0.05", fc=color, ec="none"
        )
        axes.add_patch(box)
        axes.text(x, 1.72, name, ha="center", va="center", color="white", fontsize=9)
        axes.text(x, 1.4, note, ha="center", va="center", color="white", fontsize=8)
        factor = factor or "(1 - CAR(x)) / (1 - share)"
        axes.text(x, 2.62, f"× {factor}", ha="center", va="center", fontsize=9)
        arrow = {"arrowstyle": "-|>", "color": color}
        axes.annotate("", (x, 2.8), (4, 3.6), arrowprops=arrow)
        axes.annotate("", (x, 2.12), (x, 2.48), arrowprops=arrow)
        axes.annotate("", (4, 0.28), (x, 1.08), arrowprops=arrow)
    save(figure, path)


def draw_variance(axes, run, args, pairs):
    """Which neurons are specific: those right of the cut, however the pairs share them."""
    groups = read_json(run / "neurons.json", {})
    awareness = read_tensors(run / "awareness.safetensors")
    scaled = lander.scale_awareness(torch.stack([awareness[pair] for pair in pairs]))  # [P, K, F]
    variance = scaled[:, -1].var(0, correction=0)  # [F]
    specific = round((1 - args["epsilon"]) * len(variance))
    cut = len(variance) - specific
    values = variance.sort().values.numpy()
    for part, color in ((range(cut), GENERAL), (range(cut, len(values)), SPECIFIC)):
        axes.stairs(
            values[part], [*part, part.stop], fill=True, color=color, baseline=values[0] / 2
        )
    axes.set_yscale("log")
    axes.axvline(cut, color="black", linewidth=1)
    axes.text(cut - 2, variance.max(), f"epsilon = {args['epsilon']}", ha="right", va="top")
    axes.set(xlabel="neurons, sorted", ylabel="variance over pairs of scaled awareness")
    axes.set_title(f"layer {list(groups)[-1]}: {specific} of {len(variance)} are language-specific")


def draw_changes(axes, results, tuned):
    """What tuning did to each pair."""
    codes = sorted({code for pair in results for code in split_pair(pair)})
    change = torch.full((len(codes), len(codes)), torch.nan)
    for pair, scores in results.items():
        source, target = split_pair(pair)
        gain = scores["after"]["bleu"] - scores["before"]["bleu"]
        change[codes.index(source), codes.index(target)] = gain
    limit = (
        1.8 * change.nan_to_num().abs().max().item()
    )  # no color so dark that it hides the number
    axes.imshow(change, cmap="PuOr", vmin=-limit, vmax=limit)
    for row, source in enumerate(codes):
        for column, target in enumerate(codes):
            if f"{source}-{target}" in results:
                text = f"{change[row, column]:+.1f}"
                axes.text(column, row, text, ha="center", va="center")
            if f"{source}-{target}" in tuned:
                frame = (column - 0.48, row - 0.48), 0.96, 0.96
                axes.add_patch(Rectangle(*frame, fill=False, linewidth=2.5))
    axes.set(xticks=range(len(codes)), yticks=range(len(codes)))
    axes.set_xticklabels(codes)
    axes.set_yticklabels(codes)
    axes.set(xlabel="to", ylabel="from", title="change of BLEU, tuned pairs framed")


def draw_run(run, path):
    args, results = read_json(run / "args.json", {}), read_json(run / "results.json", {})
    layer = next(iter(read_json(run / "neurons.json", {}).values()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    draw_variance(left, run, args, list(layer["specific"]))
    draw_changes(right, results, tuned=read_json(run / "layers.json", {}))
    figure.tight_layout()
    save(figure, path)


def main(run):
    draw_ffn(ROOT / "study" / "ffn.svg")
    draw_run(Path(run), ROOT / "study" / "run.svg")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python study/pictures.py RUN")
    sys.exit(exit_status(main, sys.argv[1]))
