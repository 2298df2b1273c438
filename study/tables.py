"""Every table of the study, from the committed results alone.

    python study/tables.py > study/tables.md        # and the figures, with --figures

The unit is a seed: two methods are compared on the same seed, whose batches are the same. Where
there are several, a difference has its mean and, in parentheses, each seed's. One seed gets no
verdict.

In this file: reading results; differences; at equal loss of others; the tables.
"""

import math
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import read_json
from study.compare import KINDS, OTHER, best_rate, by_method, kind_of, read_results

RESULTS = ROOT / "study" / "results"
NATURAL = ["gemma-en-de", "mini-en-de", "mini-fr-cs", "smollm2-en-de", "smollm2-en-fr"]
TOY = ["toy-0-qab-qaa", "toy-0-qac-qab", "toy-1-qab-qaa", "toy-1-qac-qab"]


# --------------------------------------------------------------------------------------------------
# Reading results


class Setting:
    """A checkpoint and a tuned pair: all runs on it. .runs: method -> rate -> seed -> its line"""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.options, self.before = (
            read_json(folder / "grid.json"),
            read_json(folder / "before.json"),
        )
        self.runs = {}
        for line in read_results(folder):
            rates = self.runs.setdefault(line["method"], {})
            rates.setdefault(line["rate"], {})[line["seed"]] = line

    def best(self, method):
        """The rate with the lowest mean validation loss of the tuned pair."""
        rates = {rate: list(seeds.values()) for rate, seeds in self.runs[method].items()}
        return best_rate(rates)

    def up_to_best(self, method):
        """The rates that a user would choose from: those up to the best."""
        return sorted(rate for rate in self.runs[method] if rate <= self.best(method))

    def loss(self, line, kind):
        """Change of the loss of a target token, in nats: mean over the pairs of a kind."""
        pairs = [pair for pair in line["valid_loss"] if kind_of(pair, line["pair"]) == kind]
        changes = [line["valid_loss"][pair] - self.before["valid_loss"][pair] for pair in pairs]
        return mean(changes) if changes else math.nan

    def bleu(self, line):
        """What the tuned pair gained."""
        pair = line["pair"]
        return line["after"][pair]["bleu"] - self.before["scores"][pair]["bleu"]


def settings(names, prefix="grid"):
    folders = {name: RESULTS / f"{prefix}-{name}" for name in names}
    return [Setting(name, path) for name, path in folders.items() if path.exists()]


# --------------------------------------------------------------------------------------------------
# Differences

# Of Student's t at 90%, by degrees of freedom. For two, two-sided p is 1 - t / sqrt(t^2 + 2).
T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132}


def differences(first, second, value):
    """value of the first minus that of the second, of each seed that both have."""
    seeds = sorted(first.keys() & second.keys())
    return [value(first[seed]) - value(second[seed]) for seed in seeds]


def shown(values, digits=3):
    """Mean and each: "-0.038 (-0.034 -0.043 -0.036)"; one alone without parentheses."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    each = " ".join(f"{value:+.{digits}f}" for value in values)
    return each if len(values) == 1 else f"{mean(values):+.{digits}f} ({each})"


def t_statistic(values):
    """Of the mean against 0; nan for one seed."""
    if len(values) < 2:
        return math.nan
    return mean(values) / (stdev(values) / math.sqrt(len(values)) or 1e-12)


def verdict(values):
    """above or below 0 by a paired t-test at 90%, else level; nothing for one seed."""
    statistic = t_statistic(values)
    if math.isnan(statistic):
        return ""
    if abs(statistic) < T_90[len(values) - 1]:
        return "level"
    return "above" if statistic > 0 else "below"


# --------------------------------------------------------------------------------------------------
# At equal loss of others


def monotone(points):
    """The line that never falls and is closest to the points (pool adjacent violators).

    [(1, 0), (2, 4), (3, 2), (4, 5)] -> [(1, 0), (2, 3), (3, 3), (4, 5)]
    """
    blocks = []  # [mean, points]
    for _, y in sorted(points):
        blocks.append([y, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (y, count), below = blocks.pop(), blocks[-1]
            below[0] = (below[0] * below[1] + y * count) / (below[1] + count)
            below[1] += count
    heights = [y for y, count in blocks for _ in range(count)]
    return [(x, y) for (x, _), y in zip(sorted(points), heights)]


def gain_at(points, limit, best):
    """What is gained where others lose `limit` nats; None where every rate costs more.

    points: [(loss of others, BLEU gained), ...] of rates. Where all lose less, the limit binds
    nobody: the best rate's gain. Between two points, on the line between them.
    """
    if min(x for x, _ in points) > limit:
        return None
    if max(x for x, _ in points) <= limit:
        return best
    line = monotone(points)
    for (x, y), (x_next, y_next) in zip(line, line[1:]):
        if x <= limit < x_next:
            return y + (y_next - y) * (limit - x) / (x_next - x)


def gains(setting, method, limit):
    """seed -> gain_at, over the rates up to the best."""
    rates, found = setting.up_to_best(method), {}
    for seed in setting.runs[method][rates[-1]]:
        lines = [setting.runs[method][rate].get(seed) for rate in rates]
        points = [(setting.loss(line, OTHER), setting.bleu(line)) for line in lines if line]
        found[seed] = gain_at(points, limit, setting.bleu(lines[-1]))
    return found


def equal_loss(setting, method, percent=2):
    """Seeds' gains of a method less LANDeRMT's, where the perplexity of other pairs is up by so
    much; None where it always costs more."""
    limit = math.log(1 + percent / 100)
    kl = "+kl=1" if "+kl=1" in method else ""
    own, lander = gains(setting, method, limit), gains(setting, f"lander{kl}", limit)
    if None in own.values() or None in lander.values():
        return None
    return differences(own, lander, lambda gain: gain)


# --------------------------------------------------------------------------------------------------
# The tables


def table(head, rows):
    """Print a table in Markdown."""
    print()
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def show_settings(all_settings):
    print("\n## What was run\n\nSeeds without and with KL; the rates of LANDeRMT.")
    rows = []
    for setting in all_settings:
        rates = setting.runs["lander"]
        seeds = [
            max(len(own) for own in setting.runs[name].values()) if name in setting.runs else 0
            for name in ("lander", "lander+kl=1")
        ]
        runs = sum(len(own) for rates in setting.runs.values() for own in rates.values())
        pairs = len(setting.before["valid_loss"])
        rows.append(
            [setting.name, pairs, ", ".join(f"{rate:g}" for rate in sorted(rates)), *seeds, runs]
        )
    table(["setting", "pairs", "rates", "seeds", "with KL", "runs"], rows)


def show_best_rates(setting):
    """Each method at the rate with the lowest validation loss."""
    rows = []
    for method, rates in sorted(setting.runs.items()):
        rate = setting.best(method)
        lines = list(rates[rate].values())
        edge = "".join(
            f" ({name})"
            for name, end in (("lowest", min), ("highest", max))
            if len(rates) > 1 and rate == end(rates)
        )
        row = [method, f"{rate:g}{edge}", len(lines), f"{lines[0]['trained']:,}"]
        row.append(f"{mean(line['valid_loss'][line['pair']] for line in lines):.3f}")
        row.append(f"{mean(setting.bleu(line) for line in lines):+.1f}")
        for kind in KINDS:
            row.append(f"{mean(setting.loss(line, kind) for line in lines):+.3f}")
        row.append(f"{mean(mean(line['kl'].values()) for line in lines):.3f}")
        rows.append(row)
    print(f"\n### {setting.name}")
    head = ["method", "rate", "seeds", "weights", "valid loss", "BLEU gained"]
    table([*head, *(f"loss, {kind}" for kind in KINDS), "KL to the start"], rows)


CHOICES = {"lander": "random-scores", "units-all": "units-random"}


def show_who_pays(all_settings):
    """Chosen by awareness less as many by chance: what awareness decides is who pays."""
    for aware, chance in CHOICES.items():
        rows = []
        for setting in all_settings:
            if aware not in setting.runs or chance not in setting.runs:
                continue
            highest = max(setting.best(aware), setting.best(chance))
            for rate in sorted(setting.runs[aware].keys() & setting.runs[chance].keys()):
                first, second = setting.runs[aware][rate], setting.runs[chance][rate]
                row = [setting.name, f"{rate:g}" + " (beyond the best)" * (rate > highest)]
                row.append(shown(differences(first, second, setting.bleu), 1))
                for kind in KINDS:
                    values = differences(first, second, lambda line: setting.loss(line, kind))
                    row.append(shown(values))
                rows.append(row)
        print(f"\n### {aware} less {chance}: BLEU gained, and change of the loss in nats")
        table(["setting", "rate", "BLEU", *KINDS], rows)


def show_test_of_who_pays(all_settings):
    """One number a seed: the mean over the rates up to the best, fixed before looking."""
    rows = []
    for aware, chance in CHOICES.items():
        for setting in all_settings:
            if aware not in setting.runs or chance not in setting.runs:
                continue
            row = [f"{aware} less {chance}", setting.name]
            rates = [rate for rate in setting.up_to_best(aware) if rate in setting.runs[chance]]
            both = [(setting.runs[aware][rate], setting.runs[chance][rate]) for rate in rates]
            seeds = set.intersection(*(first.keys() & second.keys() for first, second in both))
            for kind in KINDS:
                loss = lambda line: setting.loss(line, kind)
                values = [
                    mean(loss(first[seed]) - loss(second[seed]) for first, second in both)
                    for seed in sorted(seeds)
                ]
                row.append(f"{shown(values)} {verdict(values)}")
            rows.append(row)
    print("\n### The same, mean over the rates up to the best; above or below 0: paired t, 90%")
    table(["", "setting", *KINDS], rows)


def show_equal_loss(all_settings, kl=""):
    """A method's gain of BLEU less LANDeRMT's, where other pairs' perplexity is up by 2%."""
    methods = sorted(
        {
            name
            for setting in all_settings
            for name in setting.runs
            if name.endswith(kl) and ("+kl" in name) == bool(kl)
        }
        - {f"lander{kl}"}
    )
    rows = []
    for method in methods:
        row = [method]
        for setting in all_settings:
            if method not in setting.runs or f"lander{kl}" not in setting.runs:
                row.append("")
                continue
            values = equal_loss(setting, method)
            row.append("costs more" if values is None else f"{shown(values, 1)} {verdict(values)}")
        rows.append(row)
    print(f"\n### BLEU of a method{kl} less that of lander{kl}, others' perplexity up by 2%")
    table(["method", *(setting.name for setting in all_settings)], rows)


def show_robustness(all_settings):
    """How many verdicts hang on the limit, and how many are left by Benjamini and Hochberg."""
    rows = []
    for percent in (1, 2, 5):
        found, tests = {"above": 0, "below": 0, "level": 0, "costs more": 0}, []
        for setting in all_settings:
            for method in setting.runs:
                if "+" in method or method == "lander":
                    continue
                values = equal_loss(setting, method, percent)
                if values is None:
                    found["costs more"] += 1
                elif len(values) == 3:
                    found[verdict(values)] += 1
                    statistic = abs(t_statistic(values))
                    tests.append(1 - statistic / math.sqrt(statistic**2 + 2))
        kept = [rank for rank, p in enumerate(sorted(tests), 1) if p <= 0.1 * rank / len(tests)]
        rows.append([f"{percent}%", *found.values(), len(tests), max(kept, default=0)])
    print("\n### Verdicts against lander, settings of three seeds, by limit")
    head = ["limit", "above", "below", "level", "costs more", "tests", "left by Benjamini-Hochberg"]
    table(head, rows)


def show_neurons(all_settings):
    """What each choice of neurons gains and costs, where the choice is real."""
    for setting in all_settings:
        rows = []
        for method, rates in setting.runs.items():
            for rate, seeds in sorted(rates.items()):
                lines = list(seeds.values())
                row = [method, f"{rate:g}", len(lines), f"{lines[0]['trained']:,}"]
                row.append(shown([setting.bleu(line) for line in lines], 1))
                for kind in KINDS:
                    row.append(shown([setting.loss(line, kind) for line in lines], 2))
                row.append(shown([mean(line["kl"].values()) for line in lines], 2))
                rows.append(row)
        print(f"\n### {setting.name}, --epsilon {setting.options.get('epsilon', 0.9)}")
        table(
            ["method", "rate", "seeds", "weights", "BLEU gained", *KINDS, "KL to the start"], rows
        )


def show_kl(all_settings):
    """What +kl=1 costs in BLEU of the tuned pair, and what it saves: each at its best rate."""
    rows = []
    for setting in all_settings:
        for method in sorted(setting.runs):
            if f"{method}+kl=1" not in setting.runs:
                continue
            plain, held = (
                setting.runs[name][setting.best(name)] for name in (method, f"{method}+kl=1")
            )
            row = [setting.name, method, shown(differences(held, plain, setting.bleu), 1)]
            seeds = sorted(plain.keys() & held.keys())
            for lines in (plain, held):
                row.append(f"{mean(setting.loss(lines[seed], OTHER) for seed in seeds):+.3f}")
            rows.append(row)
    head = ["setting", "method", "BLEU with KL less without", "loss, other: without", "with"]
    table(head, rows)


def show_translations(all_settings):
    """BLEU and chrF of pairs of each kind, each method at its best rate: mean change."""
    for setting in all_settings:
        rows = []
        for method, rates in by_method(read_results(setting.folder, "chosen.jsonl")).items():
            rate = setting.best(method)
            if rate not in rates:  # another was the best when they were translated
                continue
            lines = rates[rate]
            row = [method, f"{rate:g}", len(lines)]
            for metric in ("bleu", "chrf"):
                for kind in KINDS:
                    changes = []
                    for line in lines:
                        for pair, after in line["after"].items():
                            if kind_of(pair, line["pair"]) == kind:
                                before = setting.before["scores"][pair][metric]
                                changes.append(after[metric] - before)
                    row.append(f"{mean(changes):+.1f}" if changes else "")
            rows.append(row)
        if rows:
            print(f"\n### {setting.name}")
            head = [f"{metric}, {kind}" for metric in ("BLEU", "chrF") for kind in KINDS]
            table(["method", "rate", "seeds", *head], rows)


def show_all():
    natural, toy = settings(NATURAL), settings(TOY)
    print("# Tables of the study\n")
    print("Printed by `python study/tables.py > study/tables.md`. README.md explains them.")
    show_settings(natural + toy)
    print("\n## Who pays: awareness against chance")
    show_who_pays(natural)
    show_test_of_who_pays(natural)
    print("\nToy languages, which share nothing by nature:")
    show_test_of_who_pays(toy)
    print("\n## Choice of neurons, where the choice is real")
    show_neurons(settings([*NATURAL, *TOY], "neurons"))
    print("\n## At equal loss of others")
    show_equal_loss(natural + toy)
    show_robustness(natural + toy)
    print("\n## KL to the start")
    show_kl(natural + toy)
    show_equal_loss(natural + toy, "+kl=1")
    print("\n## Translations of all pairs")
    show_translations(natural + toy)
    print("\n## Each method at its best rate")
    for setting in natural + toy:
        show_best_rates(setting)


if __name__ == "__main__":
    show_all()
    if "--figures" in sys.argv:
        from study import figures

        figures.draw_ffn(ROOT / "study" / "ffn.svg")
        figures.draw_study(settings([*NATURAL, *TOY]), ROOT / "study" / "methods.svg")
