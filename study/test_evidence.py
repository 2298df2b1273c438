"""Tests of the grid's pieces: keepers, the scripts' recipe, what is measured, the statistic."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import make_batch
from study import compare, evidence, methods
from test_lander import IMPORTABLE, PAIRS, Letters, arguments, assert_close, batched, padded_ids
from test_lander import random_examples, tiny_decoder, world


def small_context(decoder, tuned=("en-de",)):
    """What methods.py needs, for a tiny decoder of four layers: random scores."""
    config = decoder.config
    L, F, D = config.layers, config.ffn_size, config.heads * config.head_size
    generator = torch.Generator().manual_seed(0)
    awareness = torch.rand(3, L, F, generator=generator)
    channels = torch.rand(3, L, D, generator=generator)
    languages = {}
    for code in ("en", "de", "fr", "cs"):
        languages[code] = {}
        for name, module in methods.modules_with_units(decoder, range(L)).items():
            languages[code][name] = torch.rand(len(module.weight), generator=generator) + 0.1
    inputs = lander.Inputs({}, {}, dict.fromkeys(PAIRS, []), {}, {}, {}, 256, {})
    settings = lander.Settings(epsilon=0.7, layers=2)
    differences = dict.fromkeys(tuned, [3.0, 2.0, 1.0])
    choice = {"adjacent": [1, 2], "languages": languages}
    scores = differences, awareness, channels
    return methods.Context(settings, Letters, inputs, list(tuned), *scores, **choice)


def moved_a_little(decoder, name, tuned=("en-de",)):
    """A method's parameters, its start, and the model after three steps away from it."""
    torch.manual_seed(0)
    learners = methods.METHODS[name](decoder, small_context(decoder, tuned))
    parameters = lander.merged(learners)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape)
            parameter.requires_grad_(True)
    return parameters, start


# --------------------------------------------------------------------------------------------------
# Methods


NEW = ("units-all", "units-random", "scripts", "linear", "lora-32")
ALL_UNITS = r"blocks\.[12]\.(attention\..*original|ffn\.(general|specific|router))"


@pytest.mark.parametrize("kind", ["bloom", "llama"])
@pytest.mark.parametrize("name", NEW)
def test_each_method_starts_at_the_base_model(name, kind):
    """A method that starts elsewhere: what it forgets would be its own change of the model."""
    decoder = tiny_decoder(kind, layers=4)
    ids, mask = padded_ids(90, "right")
    expected = decoder(ids, mask)
    learners = methods.METHODS[name](decoder, small_context(decoder))
    methods.route(decoder, "en-de")
    assert_close(decoder(ids, mask), expected, mask)
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    optimizer = torch.optim.AdamW(learners["en-de"].values(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        batches = batched(random_examples(6, seed=seed))
        lander.train_step(decoder, batches, optimizer, learners["en-de"].values())
    moved = {n for n, p in decoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(learners["en-de"])


@pytest.mark.parametrize("name", NEW)
def test_what_learns_in_16_bits_is_a_master_in_32(name):
    """Steps that are lost in rounding; activations that turn into fp32, at twice the time."""
    decoder = tiny_decoder("llama", layers=4).bfloat16()
    learners = methods.METHODS[name](decoder, small_context(decoder))
    methods.route(decoder, "en-de")
    assert {p.dtype for p in learners["en-de"].values()} == {torch.float32}
    assert decoder(*padded_ids(90, "right")).dtype == torch.bfloat16


def test_units_by_chance_are_as_many():
    """A choice by awareness that trains more weights than the choice by chance that it is held against."""
    sizes = []
    for name in ("units-all", "units-random"):
        decoder = tiny_decoder("bloom", layers=4)
        learners = methods.METHODS[name](decoder, small_context(decoder))
        sizes.append({name: p.shape for name, p in learners["en-de"].items()})
    assert sizes[0] == sizes[1] and any("query_key_value" in name for name in sizes[0])


def test_adjacent_layers_by_hand():
    """Layers one too high, or a pair that shares a layer with a better one."""
    assert methods.adjacent_layers([1.0, 5.0, 4.0, 2.0], 4) == [1, 2, 3, 4]
    assert methods.adjacent_layers([1.0, 5.0, 4.0, 2.0], 2) == [1, 2]
    assert methods.adjacent_layers([3.0, 1.0, 1.0], 2) == [0, 1]


def test_awareness_of_outputs():
    """A sum over tokens for a mean, the loss of a batch for a sentence's, an input for an output."""
    decoder = tiny_decoder("bloom", layers=2)
    sentences = [[5, 8, 13, 21], [34, 55]]
    found = methods.output_awareness(decoder.requires_grad_(False), sentences)
    assert len(found) == 2 * 6
    name = "blocks.1.ffn.up"
    expected = 0
    kept = []
    decoder.requires_grad_(True)

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    decoder.get_submodule(name).register_forward_hook(keep)
    for ids in sentences:
        logits = decoder(torch.tensor([ids]))[0]
        functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).backward()
        read = kept.pop()[0, :-1]  # the last token's output moves nothing: no token comes after
        expected = expected + (read * kept_gradient(read, ids, decoder, name)).abs().sum(0) / (
            len(ids) - 1
        )
    assert_close(found[name], expected.detach())


def kept_gradient(read, ids, decoder, name):
    """dloss/doutput by a second model run whose output is replaced by a leaf."""
    leaf = read.detach().clone().requires_grad_(True)
    handle = decoder.get_submodule(name).register_forward_hook(lambda m, i, o: leaf[None])
    logits = decoder(torch.tensor([ids[:-1]]))[0]
    loss = functional.cross_entropy(logits, torch.tensor(ids[1:]))
    handle.remove()
    return torch.autograd.grad(loss, leaf)[0]


def test_the_scripts_train_rows_of_general_units_and_of_two_languages():
    """Columns for rows; a third language's units; a gradient that is not scaled."""
    decoder = tiny_decoder("bloom", layers=4)
    context = small_context(decoder, ("en-de", "fr-en"))
    name = "blocks.1.ffn.up"
    scores = torch.stack([own[name] for own in context.languages.values()])
    specific = scores.var(0).topk(round(0.3 * scores.shape[1])).indices
    owner = scores.argmax(0)
    owned = {code: specific[owner[specific] == i] for i, code in enumerate(context.languages)}
    plain = tiny_decoder("bloom", layers=4)
    batches = batched(random_examples(6))
    lander.target_loss(plain, batches[0]).backward()
    learners = methods.METHODS["scripts"](decoder, context)
    long_name = f"{name}.parametrizations.weight.original0"
    part = learners["en-de"][long_name]
    rows = decoder.get_submodule(name).parametrizations.weight[0].index
    assert not set(owned["cs"].tolist()) & set(rows.tolist())
    assert len(rows) + len(owned["cs"]) == scores.shape[1]
    for pair, foreign in (("en-de", "fr"), ("fr-en", "de")):
        methods.route(decoder, pair)
        lander.target_loss(decoder, batches[0]).backward()
        awareness = scores[[list(context.languages).index(code) for code in pair.split("-")]].mean(
            0
        )
        factor = awareness / awareness.mean()
        factor[owned[foreign]] = 0
        expected = plain.get_submodule(name).weight.grad * factor[:, None]
        assert_close(part.grad, expected[rows])
        part.grad = None


def test_the_scripts_mix_all_pairs_in_a_step():
    settings = lander.Settings(batch=6, steps=4)
    examples = {"en-de": range(12), "fr-en": range(7)}
    recipe = compare.parse_method("scripts")
    steps = compare.plan(examples, {}, recipe, settings)
    assert len(steps) == 4
    for turns in steps:
        assert [pair for pair, _ in turns] == ["en-de", "fr-en"]
        assert all(1 <= len(numbers) <= 3 for _, numbers in turns)


# --------------------------------------------------------------------------------------------------
# Keepers


def test_the_gradient_of_the_kl():
    """KL the other way round, over padding, or through the start: dKL/dlogits is p - p0 at each target."""
    decoder = tiny_decoder("bloom", layers=4)
    parameters, start = moved_a_little(decoder, "lora-all")
    methods.route(decoder, None)
    examples = random_examples(5)
    (batch,) = batched(examples)
    found = methods.kl_from_start(decoder, batch, parameters, start)
    gradients = torch.autograd.grad(found, list(parameters.values()))
    before = []
    with methods.at_start(parameters, start), torch.no_grad():
        for prompt, target in examples:
            logits = decoder(torch.tensor([prompt + target[:-1]]))[0, len(prompt) - 1 :]
            before.append(logits.double().softmax(-1))
    expected = 0.0
    by_hand = 0.0
    for prompt, target in examples:
        p0 = before.pop(0)
        logits = decoder(torch.tensor([prompt + target[:-1]]))[0, len(prompt) - 1 :]
        p = logits.detach().double().softmax(-1)
        expected += (p0 * (p0.log() - p.log())).sum().item()
        by_hand = by_hand + (logits * (p - p0).float()).sum()
    assert found.item() == pytest.approx(expected, rel=1e-4) and found.item() > 0.01
    for ours, theirs in zip(gradients, torch.autograd.grad(by_hand, list(parameters.values()))):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["lander", "units-all", "scripts", "lora-all", "full"])
def test_the_start_is_exact_and_comes_back(name):
    """A start that is not quite the start: KL would draw to another model; or training that is lost by looking."""
    decoder = tiny_decoder("bloom", layers=4)
    ids, mask = padded_ids(90, "right")
    expected = decoder(ids, mask)
    parameters, start = moved_a_little(decoder, name)
    methods.route(decoder, None)
    moved = decoder(ids, mask)
    with methods.at_start(parameters, start):
        assert_close(decoder(ids, mask), expected, mask)
        (batch,) = batched(random_examples(3))
        kl = methods.kl_from_start(decoder, batch, parameters, start)
        assert kl.item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(decoder(ids, mask), moved) and not torch.equal(moved, expected)


def test_no_weight_leaves_its_radius():
    """A strength that means another thing on another model; a start that itself decays."""
    decoder = tiny_decoder("bloom", layers=4)
    parameters, start = moved_a_little(decoder, "attention")
    lander.load_parameters("", start, parameters)
    strengths = methods.pulls(decoder, parameters, radius=0.5)
    methods.pull_to_start(parameters, start, strengths, rate=0.01)
    assert all(torch.equal(p, start[name]) for name, p in parameters.items())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0)
    for _ in range(300):  # always in the same direction, as fast as AdamW goes
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        methods.pull_to_start(parameters, start, strengths, rate=0.01)
    for name, p in parameters.items():
        bound = 0.5 * start[name].square().mean().sqrt()
        farthest = (p - start[name]).abs().max()
        assert 0.9 * bound < farthest < 1.01 * bound, name


def test_the_radius_of_lora():
    """B starts at zero: without a bound of its own it would be free, or held at zero."""
    decoder = tiny_decoder("bloom", layers=2)
    parameters, start = moved_a_little(decoder, "lora-all")
    lander.load_parameters("", start, parameters)
    strengths = methods.pulls(decoder, parameters, radius=0.5)
    name = "blocks.1.ffn.up.lora_b"
    lora = decoder.get_submodule("blocks.1.ffn.up")
    b = torch.randn(lora.lora_b.shape).sign() / strengths[name]  # each as far as it may go
    change = (lora.scale * b @ lora.lora_a).detach()
    expected = 0.5 * lora.linear.weight.square().mean().sqrt()
    assert change.square().mean().sqrt().item() == pytest.approx(expected.item(), rel=0.3)


def test_fisher_is_the_square_of_each_sentences_gradient():
    """The square of a sum for a sum of squares."""
    decoder = tiny_decoder("bloom", layers=4)
    parameters, _ = moved_a_little(decoder, "attention")
    examples = random_examples(4)
    found = methods.fisher(decoder, parameters, examples)
    expected = {name: 0 for name in parameters}
    for example in examples:
        loss = lander.target_loss(decoder, make_batch([example], 3))
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            expected[name] = expected[name] + gradient.square()
    mean = torch.cat([own.flatten() for own in expected.values()]).mean()
    for name in parameters:
        assert_close(found[name], expected[name] / mean)
    assert all(p.grad is None for p in parameters.values())


def test_replay_is_spread_over_the_training():
    """All replay first, the tuned pair in what is left of the learning rate."""
    assert compare.spread_evenly([1, 2, 3, 4], [5, 6]) == [1, 5, 2, 3, 6, 4]
    settings = lander.Settings(batch=2, steps=30)
    recipe = compare.parse_method("full+replay")
    others = {"fr-en": range(10), "en-cs": range(10)}
    steps = compare.plan({"en-de": range(60)}, others, recipe, settings)
    pairs = [pair for ((pair, _),) in steps]
    assert len(pairs) == 40 and pairs.count("fr-en") == pairs.count("en-cs") == 5
    replayed = [i for i, pair in enumerate(pairs) if pair != "en-de"]
    gaps = [after - before for before, after in zip([-1, *replayed], [*replayed, 40])]
    assert max(gaps) <= 5 and pairs[replayed[0]] != pairs[replayed[1]]
    plain = compare.plan({"en-de": range(60)}, others, recipe._replace(replay=False), settings)
    assert [turns for turns in steps if turns[0][0] == "en-de"] == plain


# --------------------------------------------------------------------------------------------------
# A cell


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own, and little for the start to translate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "START_SENTENCES", {"train": 6, "valid": 3})


@pytest.fixture
def prepared(world, here):
    words = arguments(world, "--steps 5 --micro-tokens 300")
    settings = lander.Settings(**lander.parse_arguments(words))
    Path("grid").mkdir()
    return compare.prepare(settings, Path("grid"))


def test_without_keepers_the_training_is_landers_own(prepared):
    """A study of another training than the one that users run."""
    found = []
    for ours in (True, False):
        settings = prepared.settings
        model = lander.load_model(settings.weights, "cpu", torch.float32).requires_grad_(False)
        learners = methods.METHODS["lander"](model, prepared)
        if ours:
            recipe = compare.parse_method("lander")
            compare.train(model, prepared, learners, {}, ["qaa-qab"], recipe)
        else:
            text = prepared.inputs.train, {}
            lander.train(model, prepared.tokenizer, learners, *text, settings, Path("."))
        found.append(lander.merged(learners))
    for name, parameter in found[0].items():
        assert torch.equal(parameter, found[1][name]), name


def test_losses_of_sentences_are_those_of_the_set(prepared):
    """A sentence's loss given to another, or a prompt's tokens counted."""
    settings = prepared.settings
    model = lander.load_model(settings.weights, "cpu", torch.float32).requires_grad_(False)
    losses = compare.sentence_losses(model, prepared)
    tokens = compare.target_tokens(prepared)
    for pair, examples in prepared.valid.items():
        valid = lander.validation_loss(model, pair, batched(examples))
        assert losses[pair].sum() / tokens[pair].sum() == pytest.approx(valid, rel=1e-5)
        alone = lander.target_loss(model, make_batch([examples[3]], 0)).item()
        assert losses[pair][3].item() == pytest.approx(alone, rel=1e-4)
    assert len(losses) == 3


ON_PRETEND = """
import sys
from argparse import Namespace
from study import pretend

library = pretend.register()
import torch
from study import bench, compare

compare.START_SENTENCES = {"train": 6, "valid": 3}
torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda: 0
of_all = {"dtype": "float32", "layers": 1, "micro_tokens": 128, "cache_gb": 1e-3, "repeats": 1}
args = Namespace(device="pretend", **of_all)
with pretend.OnPretend():
    for case in ("score", "train", "train all", "generate"):
        bench.measure(case, bench.shape_config("64,2,2,100"), args)
    sys.exit(compare.main(sys.argv[1:]))
"""


def test_a_grid_on_a_device_that_is_not_the_cpu(world, here):
    """An index or a generator of the CPU beside tensors on a GPU, in a cell or in bench.py."""
    words = arguments(world, "--steps 2 --rates 0.01 --dtype float32")
    words += ["--methods", "units-all+kl=1,scripts,lora-all+decay=1,full+fisher=1"]
    command = [sys.executable, "-c", ON_PRETEND, *words, "--device", "pretend", "--out", "there"]
    done = subprocess.run(command, env=IMPORTABLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert compare.main([*words, "--out", "here"]) == 0
    for there, same in zip(*map(compare.read_results, (Path("there"), Path("here"))), strict=True):
        for what in ("valid_loss", "plain_loss", "kl"):
            assert there[what] == pytest.approx(same[what], rel=1e-4), there["method"]


def test_a_grid(world, here, capsys):
    """Cells that are run twice; a keeper that changes nothing; other pairs translated in every cell."""
    pytest.importorskip("matplotlib")
    words = arguments(world, "--steps 3 --eval-pairs qaa-qab,qab-qaa --out grid --rates 0.01")
    words += ["--methods"]
    names = (
        "lora-all,lora-all+kl=1,lander:7+replay,attention+decay=1,attention+fisher=1,scripts,full"
    )
    assert compare.main([*words, names]) == 0, capsys.readouterr().err
    cells = {line["method"]: line for line in compare.read_results(Path("grid"))}
    assert list(cells) == names.split(",")
    losses = {line["valid_loss"]["qaa-qab"] for line in cells.values()}
    assert len(losses) == len(cells)
    drift = {name: sum(line["kl"].values()) for name, line in cells.items()}
    assert drift["lora-all+kl=1"] < drift["lora-all"] and min(drift.values()) > 0
    for line in cells.values():
        assert set(line["after"]) == {"qaa-qab"} and set(line["kl"]) == {"qac-qab", "qab-qaa"}
        assert set(line["valid_loss"]) == {"qaa-qab", "qac-qab", "qab-qaa"}
    before = Path("grid/results.jsonl").read_text()
    assert compare.main([*words, names]) == 0
    assert Path("grid/results.jsonl").read_text() == before
    assert compare.main([*words, "full", "--chosen"]) == 0
    (chosen,) = compare.read_results(Path("grid"), "chosen.jsonl")
    assert set(chosen["after"]) == {"qaa-qab", "qab-qaa"}
    for what in ("valid_loss", "kl"):  # the same training, to the bit
        assert chosen[what] == cells["full"][what]
    grid = evidence.read_grid(Path("grid"))
    for line, gain, same in zip(grid.lines, grid.gain, grid.loss["same target"]):
        start = line["before"]["qaa-qab"]["bleu"]
        assert gain[0] == pytest.approx(line["after"]["qaa-qab"]["bleu"] - start, abs=2e-3)
        base = json.loads(Path("grid/before.json").read_text())["valid_loss"]["qac-qab"]
        assert same[0] == pytest.approx(line["valid_loss"]["qac-qab"] - base, abs=2e-3)
    capsys.readouterr()
    assert evidence.main(["grid"]) == 0
    table = capsys.readouterr().out
    for name in names.split(","):
        assert f"| {name} " in table
    assert Path("grid/front.svg").exists()
    assert compare.main([*words, "lora-al"]) == 2
    assert "'lora-al'" in capsys.readouterr().err
    assert compare.main([*words, "lora-all", "--layers", "1"]) == 2
    assert "grid.json: a grid with other settings" in capsys.readouterr().err


def test_pairs_tuned_each_and_in_turn(world, here, capsys):
    """In-turn that starts anew for each pair, or trains on another pair's text."""
    words = "--steps 3 --eval-pairs qaa-qab,qab-qaa --rates 0.01 --methods attention"
    words = arguments(world, words, pair="qaa-qab,qab-qaa")
    for tune in ("each", "in-turn"):
        assert compare.main([*words, "--out", tune, "--tune", tune]) == 0, capsys.readouterr().err
    each = compare.read_results(Path("each"))
    (turn,) = compare.read_results(Path("in-turn"))
    assert [line["pairs"] for line in each] == [["qaa-qab"], ["qab-qaa"]]
    assert list(turn["stages"]) == turn["pairs"] == ["qaa-qab", "qab-qaa"]
    first = turn["stages"]["qaa-qab"]
    assert first["qaa-qab"] == each[0]["after"]["qaa-qab"]  # the first pair is tuned as it is alone
    assert turn["stages"]["qab-qaa"] == turn["after"]
    assert turn["valid_loss"]["qab-qaa"] != each[1]["valid_loss"]["qab-qaa"]
    capsys.readouterr()
    assert compare.main(["--plot", "in-turn"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")[4:7]
    for cell, (stage, pair) in zip(
        row, [("qaa-qab", "qaa-qab"), ("qab-qaa", "qaa-qab"), ("qab-qaa", "qab-qaa")]
    ):
        gained = turn["stages"][stage][pair]["bleu"] - turn["before"][pair]["bleu"]
        assert float(cell) == pytest.approx(gained, abs=0.051)


# --------------------------------------------------------------------------------------------------
# The statistic


def test_the_monotone_fit_by_hand():
    """A running maximum, which rewards noise; a fit in the order of the rates."""
    ones = np.ones(4)
    x, y = evidence.monotone(np.array([1.0, 2, 3, 4]), np.array([0.0, 4, 2, 5]), ones)
    assert list(x) == [1, 2, 3, 4] and list(y) == [0, 3, 3, 5]
    _, y = evidence.monotone(np.array([4.0, 3, 2, 1]), np.array([0.0, 4, 2, 5]), ones)
    assert list(y) == [2.75] * 4
    _, y = evidence.monotone(np.array([1.0, 2]), np.array([4.0, 1]), np.array([2.0, 1]))
    assert list(y) == [3, 3]


def test_gain_at_an_equal_loss():
    """A gain promised where every cell loses more; a seed not drawn; rates averaged for no reason."""
    x, y = np.array([0.1, 0.3, 0.5]), np.array([10.0, 40.0, 20.0])
    ones, best = np.ones(3), np.array([False, True, False])
    assert evidence.gain_at(x, y, ones, 0.2, best) == pytest.approx(20)
    assert evidence.gain_at(x, y, ones, 0.4, best) == pytest.approx(30)
    assert evidence.gain_at(x, y, ones, 0.9, best) == 40
    assert evidence.gain_at(x, y, np.array([1.0, 0, 1]), 0.9, best) == 20
    assert np.isnan(evidence.gain_at(x, y, ones, 0.05, best))
    assert np.isnan(evidence.gain_at(x, y, np.array([0.0, 1, 1]), 0.2, best))
    lines = []
    for rate, loss in ((0.1, 3.0), (0.1, 1.0), (0.2, 1.5)):
        line = {"method": "full", "rate": rate, "pairs": ["en-de"], "valid_loss": {"en-de": loss}}
        lines.append(line)
    assert evidence.best_on_valid(lines).tolist() == [False, False, True]  # by means over seeds


def test_bleu_of_counts_is_sacrebleus():
    """Counts that are added up otherwise than sacreBLEU's, short and empty sentences, no match at all."""
    lines = ["a b c d e", "a b", "", "x a b c y z", "the a b c d e f g"]
    references = ["a b c d f", "a b c", "a", "a b c q", "the a b c d e f g"]
    for own in (lines, ["q w r t y"] * 5, ["a b u i o"] * 5, [""] * 5):
        counts = compare.bleu_counts("en-de", own, references).double().numpy()
        ours = evidence.bleu(evidence.with_totals(counts).sum(0))
        assert ours == pytest.approx(BLEU().corpus_score(own, [references]).score, abs=1e-6)


def test_rates_above_the_best_are_left_out():
    """A method that is punished for a rate that nobody would choose."""
    lines = []
    for rate, loss in ((0.1, 2.0), (0.3, 1.0), (0.9, 4.0)):
        for method in ("full", "full+decay=2"):
            line = {
                "method": method,
                "rate": rate,
                "pairs": ["en-de"],
                "valid_loss": {"en-de": loss},
            }
            lines.append(line)
    assert evidence.sensible(lines) == {"full": [0, 2], "full+decay": [1, 3]}


def test_two_methods_share_their_draws():
    """Unpaired draws: an interval of a difference as wide as two methods' together."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=evidence.DRAWS)
    loss = {"other target": np.tile([[0.0], [0.1]] * 2, evidence.DRAWS)}
    gain = np.stack([noise, noise + 1, noise + 2, noise + 3])
    lines = []
    for method in ("lander", "full"):
        for rate in (0.1, 0.2):
            line = {"method": method, "rate": rate, "seed": 0, "pairs": ["en-de"]}
            lines.append(line | {"valid_loss": {"en-de": 1 - rate}})
    grid = evidence.Grid("ground", lines, gain, loss, np.ones((4, evidence.DRAWS)), {})
    gains = evidence.all_gains(grid)["5%"]
    found = evidence.differences(gains, "lander")
    assert list(found) == ["full"] and np.allclose(found["full"], -2)
    assert evidence.verdict(found["full"]) == "below"
    assert evidence.interval(found["full"]) == "-2.0 (-2.0 to -2.0)"


def squeezed(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_readmes_tables_are_what_the_results_say(monkeypatch, capsys):
    """A table that was edited by hand, or left as it was when cells were added."""
    monkeypatch.setattr(evidence, "draw_fronts", lambda grid, path: None)
    results = evidence.ROOT / "study" / "results"
    grids = sorted(path.parent for path in results.glob("*/sentences.safetensors"))
    assert evidence.main(grids) == 0
    printed = set(squeezed(capsys.readouterr().out))
    for name, least in (("README.md", 1), ("study/README.md", 9)):
        tables = (evidence.ROOT / name).read_text(encoding="utf-8").split("\n\n")
        tables = [squeezed(table) for table in tables if table.startswith("|")]
        tables = [rows for rows in tables if rows[0] in printed]
        assert len(tables) >= least
        for head, _, *rows in tables:
            assert not set(rows) - printed, f"{name}: {head}"
