"""Tests of tables.py and its figure:  python -m pytest study/test_tables.py

Each says which mistake it would catch.
"""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import write_json
from study import tables
from study.compare import by_method, best_rate, kind_of


def test_kinds_of_pairs():
    """The reverse counted among the others: it forgets first, and most."""
    kinds = {pair: kind_of(pair, "en-de") for pair in ("en-de", "de-en", "fr-de", "en-fr", "cs-fr")}
    assert list(kinds.values()) == ["tuned", "reverse", "same target", "other", "other"]


def test_the_best_rate_is_none_that_diverged():
    """NaN is smaller than nothing and larger than nothing: the first would win."""
    losses = {0.1: math.nan, 0.2: 1.0, 0.3: 2.0}
    line = lambda rate: {"method": "full", "rate": rate, "seed": 0, "pair": "en-de"}
    lines = [line(rate) | {"valid_loss": {"en-de": loss}} for rate, loss in losses.items()]
    assert best_rate(by_method(lines)["full"]) == 0.2


def density(t, freedom):
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    return scale / math.sqrt(freedom * math.pi) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)


def test_verdicts_are_students():
    """1.645, the normal's, instead of t's; one seed that gets a verdict."""
    for freedom, t in tables.T_90.items():
        inside = torch.linspace(-t, t, 20001, dtype=torch.float64)
        assert torch.trapezoid(density(inside, freedom), inside) == pytest.approx(0.9, abs=2e-4)
    assert tables.verdict([0.1, 0.2, 0.3]) == "above"  # t is 3.46, and the limit is 2.92
    assert tables.verdict([-0.1, -0.2, -0.3]) == "below"
    assert tables.verdict([0.0, 0.2, 0.3]) == "level"  # 1.89
    assert tables.verdict([5.0]) == ""
    first, second = {0: 1.0, 2: 3.0, 3: 9.0}, {3: 4.0, 2: 1.0, 1: 0.0}
    assert tables.differences(first, second, float) == [2, 5], "seeds that only one has"


def test_the_line_that_never_falls():
    """The closest one: against every line through heights of a grid."""
    assert tables.monotone([(1, 0), (2, 4), (3, 2), (4, 5)]) == [(1, 0), (2, 3), (3, 3), (4, 5)]
    rng = random.Random(0)
    for _ in range(9):
        points = [(x, rng.randrange(5)) for x in range(5)]
        heights = [y for _, y in tables.monotone(points)]
        distance = lambda line: sum((y - own) ** 2 for (_, y), own in zip(points, line))
        grid = itertools.combinations_with_replacement([n / 6 for n in range(25)], 5)
        assert heights == sorted(heights) and distance(heights) <= min(map(distance, grid)) + 1e-9


def test_what_is_gained_at_a_limit():
    """A gain beyond the measured points; a limit that nobody reaches."""
    points = [(0.0, 1.0), (0.1, 3.0), (0.3, 5.0)]
    assert tables.gain_at(points, 0.2, 5.0) == pytest.approx(4)
    assert tables.gain_at(points, 0.3, 4.5) == 4.5, "the limit binds nobody: the best rate's"
    assert tables.gain_at(points, -0.1, 5.0) is None
    assert tables.gain_at(points, 0.1, 5.0) == pytest.approx(3)


@pytest.fixture
def grid(tmp_path):
    """Results that can be checked by hand. For a BLEU others lose 0.01 nats, or 0.005 with full."""
    pairs = ["en-de", "de-en", "fr-de", "en-fr"]
    before = {"valid_loss": dict.fromkeys(pairs, 2.0)}
    before["scores"] = {pair: {"bleu": 10.0, "chrf": 30.0} for pair in pairs}
    write_json(tmp_path / "before.json", before)
    write_json(tmp_path / "grid.json", {})
    with open(tmp_path / "results.jsonl", "w") as file:
        for method, rate, seed in itertools.product(("lander", "full"), (1e-3, 2e-3), (0, 1)):
            gain = (rate == 2e-3) + 1 + 2 * (method == "full") + 0.1 * seed
            lost = {"en-de": -gain, "de-en": 0.3, "fr-de": -0.1, "en-fr": 0.01 * gain}
            lost["en-fr"] /= 1 + (method == "full")
            line = {"method": method, "rate": rate, "seed": seed, "pair": "en-de", "trained": 9}
            line["valid_loss"] = {pair: 2 + lost[pair] for pair in pairs}
            line["after"] = {"en-de": {"bleu": 10 + gain, "chrf": 30.0}}
            print(json.dumps(line | {"kl": {"en-fr": 0.5}, "seconds": 1.0}), file=file)
    return tables.Setting("small", tmp_path)


def test_a_grid_by_hand(grid, tmp_path, capsys):
    """BLEU of another pair; a sign; a seed beside another one's; a figure that leaves one out."""
    limit = math.log(1.02)
    assert tables.equal_loss(grid, "full") == pytest.approx([100 * limit] * 2)
    assert tables.equal_loss(grid, "full", percent=1) is None, "the lowest rate costs 1.5%"
    tables.show_best_rates(grid)
    shown = capsys.readouterr().out
    row = "| full | 0.002 (highest) | 2 | 9 | -2.050 | +4.0 | -4.050 | +0.300 | -0.100 | +0.020 |"
    assert row in shown, shown
    pytest.importorskip("matplotlib")
    from study import figures

    figures.draw_study([grid], tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert ">+2.0<" in drawn and drawn.count(">full<") == 2 and drawn.count(">lander<") == 1


def test_the_committed_tables_are_printed(capsys):
    """Numbers in the text that no command gives."""
    tables.show_all()
    committed = tables.ROOT / "study" / "tables.md"
    assert capsys.readouterr().out == committed.read_text(encoding="utf-8")
