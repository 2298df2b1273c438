"""What the grids say: what a method gains at an equal loss of other pairs, with intervals.

    python study/evidence.py                    # every table and figure of study/results
    python study/evidence.py FOLDER ...         # of these grids of compare.py

The loss of others is that of their references, on valid text, and what it gained the BLEU of the
tuned pair, on test text. Over all cells of a method, rates, strengths and seeds, gain is fitted as a
function of loss that never falls, and read off where the perplexity of others is up by 1, 2 and 5%.
Where all cells lose less than that, the limit binds nobody: the gain is that of the best on valid.
Rates above the one with the lowest validation loss are left out: nobody would choose them.

Intervals hold 90% of 1000 draws, each of seeds and of sentences, the same draws for all methods, so
that differences of two are paired. They say nothing of other checkpoints and pairs: these are grounds
of their own.
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import read_json, read_tensors
from study import compare, probe
from study.compare import table

DRAWS = 1000
LIMITS = {"1%": math.log(1.01), "2%": math.log(1.02), "5%": math.log(1.05)}  # nats a token
COMPARED = "2%"  # of the tables that compare methods over all grounds
OTHERS = ("same target", "other target")


# --------------------------------------------------------------------------------------------------
# What is read


class Grid(NamedTuple):
    """The cells of one checkpoint and pair, drawn DRAWS times; the first draw is all of them once."""

    name: str
    lines: list  # C of them, as compare.py wrote them
    gain: np.ndarray  # [C, DRAWS] change of the tuned pair's BLEU
    loss: dict  # "same target", "other target" -> [C, DRAWS] change of the loss of a token, nats
    often: np.ndarray  # [C, DRAWS] how often the cell's seed was drawn
    plain: dict  # language -> loss of a token of plain text before training


def draw(rng, size):
    """How often each of `size` things is drawn. -> [DRAWS, size]"""
    counts = rng.multinomial(size, np.full(size, 1 / size), size=DRAWS)
    counts[0] = 1
    return counts.astype(np.float64)


def with_totals(counts):
    """What compare.bleu_counts gives, and how many runs of 1 to 4 words there are. [N, 6] -> [N, 10]"""
    words = counts[..., :1]
    return np.concatenate([counts, np.maximum(0, words - np.arange(4))], -1)


def bleu(sums):
    """BLEU of summed counts, as sacreBLEU smooths it. [.., 10] -> [..]"""
    matches, totals = sums[..., 2:6], sums[..., 6:]
    halved = np.exp2(-np.cumsum(matches == 0, -1))  # 1/2 a match for none, then 1/4, ...
    precisions = np.where(matches == 0, halved, matches) / np.maximum(totals, 1)
    words, reference = np.maximum(sums[..., 0], 1e-9), sums[..., 1]
    brevity = np.minimum(1, np.exp(1 - reference / words))
    score = 100 * brevity * np.exp(np.log(precisions).mean(-1))
    return np.where((totals == 0).any(-1) | (matches == 0).all(-1), 0, score)


def read_grid(out):
    lines = compare.read_results(out)
    tensors = {
        name: own.double().numpy()
        for name, own in read_tensors(out / "sentences.safetensors").items()
    }
    (tuned,) = {tuple(line["pairs"]) for line in lines}
    before = with_totals(tensors[f"before {tuned[0]} bleu"])  # [N, 10]
    tokens = np.zeros((len(compare.KINDS), len(tensors[f"before {tuned[0]} tokens"])))  # [3, V]
    measured = read_json(out / "before.json")
    for pair in measured["valid_loss"]:
        kind = compare.KINDS.index(compare.kind_of(pair, tuned))
        tokens[kind] += tensors[f"before {pair} tokens"]
    rng = np.random.default_rng(0)
    test, valid = draw(rng, len(before)), draw(rng, tokens.shape[1])
    seeds = sorted({line["seed"] for line in lines})
    seed_draws = dict(zip(seeds, draw(rng, len(seeds)).T))
    start = bleu(test @ before)
    gain = []
    loss = {kind: [] for kind in OTHERS}
    for line in lines:
        name = compare.key(line).name()
        gain.append(bleu(test @ with_totals(tensors[f"{name} bleu"])) - start)
        for kind in OTHERS:
            row = compare.KINDS.index(kind)
            loss[kind].append((valid @ tensors[f"{name} loss"][row]) / (valid @ tokens[row]))
    loss = {kind: np.array(own) for kind, own in loss.items()}
    often = np.array([seed_draws[line["seed"]] for line in lines])
    name = re.sub(r"-(?=\w+-\w+$)", " ", out.name.removeprefix("grid-"))
    return Grid(name, lines, np.array(gain), loss, often, measured.get("plain_loss", {}))


# --------------------------------------------------------------------------------------------------
# The statistic


def monotone(x, y, weights):
    """The line that never falls and is closest to the points (pool adjacent violators).

    [1, 2, 3, 4], [0, 4, 2, 5], equal weights -> [1, 2, 3, 4], [0, 3, 3, 5]
    """
    order = np.argsort(x, kind="stable")
    blocks = []  # [mean, weight, points]
    for value, weight in zip(y[order], weights[order]):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            value, weight, points = blocks.pop()
            below = blocks[-1]
            below[0] = (below[0] * below[1] + value * weight) / (below[1] + weight)
            below[1] += weight
            below[2] += points
    means, _, points = zip(*blocks)
    return x[order], np.repeat(means, points)


def gain_at(x, y, weights, limit, best):
    """What is gained where others lose `limit`; NaN where every cell loses more.

    Where every cell loses less, the limit binds nobody: what the best on valid gain, [C] bool.
    """
    drawn = weights > 0
    if not drawn.any() or x[drawn].min() > limit:
        return math.nan
    if x[drawn].max() <= limit and weights[best].any():
        return np.average(y[best], weights=weights[best])
    return np.interp(limit, *monotone(x[drawn], y[drawn], weights[drawn]))


def family(method):
    """A method with its keeper, whatever its strength: "full+decay=0.5" -> "full+decay" """
    return re.sub(r"=[^+]*", "", method)


def keeper_of(method):
    return family(method).partition("+")[2]


def sensible(lines):
    """family -> numbers of its cells, but for those of rates above the best on valid."""
    best = {name: compare.best_rate(rates) for name, rates in compare.by_method(lines).items()}
    found = {}
    for number, line in enumerate(lines):
        if line["rate"] <= best[line["method"]]:
            found.setdefault(family(line["method"]), []).append(number)
    return found


def best_on_valid(lines):
    """Which lines are of the method (of several strengths) and rate with the lowest loss. [C] bool"""
    losses = {}
    for method, rates in compare.by_method(lines).items():
        losses |= {(method, rate): compare.valid_loss(own) for rate, own in rates.items()}
    best = min(losses, key=losses.get)
    return np.array([(line["method"], line["rate"]) == best for line in lines])


def gains_at(grid, cells, limit):
    """[DRAWS] of gain_at over some cells of a grid."""
    best = best_on_valid([grid.lines[cell] for cell in cells])
    x, y, weights = grid.loss["other target"][cells], grid.gain[cells], grid.often[cells]
    return np.array([gain_at(x[:, r], y[:, r], weights[:, r], limit, best) for r in range(DRAWS)])


def all_gains(grid):
    """limit -> method with its keeper -> what it gains there, [DRAWS]"""
    cells = sensible(grid.lines)
    return {
        limit: {name: gains_at(grid, own, nats) for name, own in cells.items()}
        for limit, nats in LIMITS.items()
    }


def mean_over_seeds(values, often):
    """[cells, DRAWS] -> [DRAWS]; NaN where none of the cells' seeds was drawn."""
    with np.errstate(invalid="ignore"):
        return (values * often).sum(0) / often.sum(0)


def interval(draws, digits=1):
    """ "+12.3 (+10.1 to +14.0)", or "not reached" """
    if math.isnan(draws[0]):
        return "not reached"
    low, high = np.nanpercentile(draws, [5, 95])
    return f"{draws[0]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(difference):
    """Of two methods, from draws of their difference: above, level, below; "-" where one is not reached."""
    if math.isnan(difference[0]):
        return "-"
    low, high = np.nanpercentile(difference, [5, 95])
    if low > 0:
        return "above"
    return "below" if high < 0 else "level"


# --------------------------------------------------------------------------------------------------
# Tables


def show_best_rates(grid):
    """Each method at the rate with the lowest validation loss."""
    rows = []
    for name, rates in compare.by_method(grid.lines).items():
        rate = compare.best_rate(rates)
        edge = {min(rates): " (lowest)", max(rates): " (highest)"}.get(rate, "")
        cells = [
            i for i, line in enumerate(grid.lines) if (line["method"], line["rate"]) == (name, rate)
        ]
        often = grid.often[cells]
        row = [name, f"{rate:g}{edge}", len(cells), f"{rates[rate][0]['trained']:,}"]
        row.append(f"{compare.valid_loss(rates[rate]):.3f}")
        row.append(interval(mean_over_seeds(grid.gain[cells], often)))
        for kind in OTHERS:
            row.append(interval(mean_over_seeds(grid.loss[kind][cells], often), digits=3))
        drift = [np.mean(list(line["kl"].values())) for line in rates[rate]]
        row.append(f"{np.mean(drift):.4f}")
        for language, before in grid.plain.items():
            change = np.mean([line["plain_loss"][language] for line in rates[rate]]) - before
            row.append(f"{change:+.2f}")
        rows.append(row)
    head = ["method", "rate", "n", "weights", "valid", "BLEU gained"]
    plain = [f"plain {language}" for language in grid.plain]
    table([*head, "loss, same target", "loss, other target", "KL", *plain], rows)


def show_chosen(out):
    """BLEU and chrF of the other pairs, too, each method at its best rate: means over seeds."""
    rows = []
    for name, rates in compare.by_method(compare.read_results(out, "chosen.jsonl")).items():
        for rate, lines in rates.items():
            row = [name, f"{rate:g}", len(lines)]
            for kind in ("tuned", *OTHERS):
                for metric in ("bleu", "chrf"):
                    changes = [compare.gains(line, metric)[kind] for line in lines]
                    row.append(f"{np.mean(changes):+.1f}")
            rows.append(row)
    if rows:
        head = ["method", "rate", "n"]
        for kind in ("tuned", *OTHERS):
            head += [f"BLEU, {kind}", f"chrF, {kind}"]
        table(head, rows)


def show_equal_loss(grid, gains):
    """BLEU gained where the perplexity of pairs into other targets is up by so much."""
    rows = []
    for name, cells in sensible(grid.lines).items():
        row = [name, len(cells)]
        for limit, nats in LIMITS.items():
            unused = " <" if grid.loss["other target"][cells, 0].max() < nats else ""
            row.append(interval(gains[limit][name]) + unused)
        rows.append(row)
    table(["method", "n", *(f"others +{limit}" for limit in LIMITS)], rows)
    print("n: cells; <: all of them lose less, so this is what the best on valid gain")


OURS = ("lander", "units-all", "scripts")


def differences(gains, ours):
    """Rival -> draws of what `ours` gains more. gains: method with its keeper -> draws"""
    rivals = [name for name in gains if name != ours and keeper_of(name) == keeper_of(ours)]
    return {name: gains[ours] - gains[name] for name in rivals}


def show_verdicts(gained):
    """Rival by ground: is one of ours above, level or below, where others lose the same?

    gained: ground -> method with its keeper -> draws, at COMPARED
    """
    for ours in sorted(set().union(*gained.values())):
        if ours.partition("+")[0] not in OURS:
            continue
        columns = {ground: differences(own, ours) for ground, own in gained.items() if ours in own}
        rows = []
        for rival in sorted(set().union(*columns.values())):
            row = [rival]
            for column in columns.values():
                own = column.get(rival)
                row.append("" if own is None else f"{verdict(own)} {interval(own)}")
            rows.append(row)
        table([f"{ours}, others +{COMPARED}, against", *columns], rows)


def show_keepers(gained):
    """What each method gains there alone, and beside it what it gains with a keeper."""
    names = set().union(*gained.values())
    for keeper in sorted({keeper_of(name) for name in names} - {""}):
        bases = sorted(name.partition("+")[0] for name in names if keeper_of(name) == keeper)
        head, rows = [f"others +{COMPARED}"], [[base] for base in bases]
        for ground, own in gained.items():
            if not any(f"{base}+{keeper}" in own for base in bases):
                continue
            head += [ground, f"with +{keeper}"]
            for base, row in zip(bases, rows):
                for name in (base, f"{base}+{keeper}"):
                    row.append(interval(own[name]) if name in own else "")
        table(head, rows)


CHOICES = {"units-all": "units-random", "lander": "random-scores"}


def show_choice(grids):
    """Does awareness beat chance, with as many units, each at its own best rate?"""
    rows = []
    for grid in grids:
        rates = compare.by_method(grid.lines)
        for aware, chance in CHOICES.items():
            if aware not in rates or chance not in rates:
                continue
            row = [f"{aware} - {chance}", grid.name]
            cells = {}  # of each at its best rate
            for name in (aware, chance):
                best = compare.best_rate(rates[name])
                cells[name] = [
                    i
                    for i, line in enumerate(grid.lines)
                    if (line["method"], line["rate"]) == (name, best)
                ]
                row.append(f"{best:g}, n {len(cells[name])}")
            for values, digits in ((grid.gain, 1), *((grid.loss[kind], 3) for kind in OTHERS)):
                first, second = (
                    mean_over_seeds(values[own], grid.often[own]) for own in cells.values()
                )
                row.append(interval(first - second, digits))
            rows.append(row)
    head = ["difference", "ground", "rate of the first", "of the second", "BLEU gained"]
    table([*head, "loss, same target", "loss, other target"], rows)


# --------------------------------------------------------------------------------------------------
# The figure


def draw_fronts(grid, path):
    """Gain over the loss of others, a dot a cell, a line what is fitted; a panel for each keeper."""
    plt = compare.pyplot()
    cells = sensible(grid.lines)
    keepers = sorted({keeper_of(name) for name in cells})
    bases = sorted({name.partition("+")[0] for name in cells})
    shape = {"squeeze": False, "sharey": True, "figsize": (5 * len(keepers) + 1.5, 4)}
    figure, (panels,) = plt.subplots(1, len(keepers), **shape)
    for axes, keeper in zip(panels, keepers):
        for name, own in cells.items():
            if keeper_of(name) != keeper:
                continue
            number = bases.index(name.partition("+")[0])
            style = {"color": plt.cm.tab10(number % 10), "label": bases[number]}
            x, y = grid.loss["other target"][own, 0], grid.gain[own, 0]
            axes.plot(x, y, compare.MARKERS[number], markersize=4, alpha=0.5, color=style["color"])
            axes.plot(*monotone(x, y, np.ones(len(x))), **style)
        axes.set_xscale("symlog", linthresh=0.02)
        axes.set(title=keeper or "no keeper", xlabel="change of loss, pairs into another target")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("change of BLEU, tuned pair")
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    panels[-1].legend(
        handles.values(), handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.tight_layout()
    compare.save(figure, path)
    plt.close(figure)


def main(argv=None):
    folders = [Path(word) for word in (sys.argv[1:] if argv is None else argv)]
    grids, gained = [], {}
    for out in folders or sorted((ROOT / "study" / "results").iterdir()):
        if not (out / "sentences.safetensors").exists():
            probe.plot(out)
            continue
        grid = read_grid(out)
        print(f"\n{grid.name}: {len(grid.lines)} cells")
        show_best_rates(grid)
        if not out.name.startswith("grid"):  # too few cells to compare at equal loss
            continue
        show_chosen(out)
        gains = all_gains(grid)
        show_equal_loss(grid, gains)
        draw_fronts(grid, out / "front.svg")
        grids.append(grid)
        gained[grid.name] = gains[COMPARED]
    if grids:
        show_choice(grids)
        show_verdicts(gained)
        show_keepers(gained)
    return 0


if __name__ == "__main__":
    sys.exit(main())
