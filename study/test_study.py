"""Tests of study/, as those in test_lander.py:  pytest study/test_study.py"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lander
import model
from data import render
from model import Decoder
from study import bench, compare, fuzz, methods, picture, probe
from test_lander import PAIRS, Letters, arguments, assert_close, batched, finished
from test_lander import padded_ids, random_examples, randomize, step, tiny_config, tiny_decoder
from test_lander import world


# --------------------------------------------------------------------------------------------------
# Rivals of the method (study/methods.py, study/compare.py)


def small_context(decoder):
    """What methods.py needs, for a tiny decoder: random scores; layers 1 and 2 change most."""
    L, F, D = decoder.config.layers, decoder.config.ffn_size, decoder.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    awareness = torch.rand(3, L, F, generator=generator)
    channels = torch.rand(3, L, D, generator=generator)
    inputs = lander.Inputs({}, {}, dict.fromkeys(PAIRS, []), {}, {}, {}, 256, {})
    settings = lander.Settings(epsilon=0.7, layers=2)
    differences = {"en-de": [3.0, 2.0, 1.0]}
    return methods.Context(settings, Letters, inputs, ["en-de"], differences, awareness, channels)


NEURONS = r"ffn\.(general\.|specific\.en-de\.|router\.en-de)"
ALL_UNITS = rf"blocks\.[12]\.({NEURONS}|attention\..*\.parts\..*\.(general|en-de))"
TRAINED_BY = {
    "lander": rf"blocks\.[12]\.{NEURONS}",
    "no-car": r"blocks\.[12]\.ffn\.(general\.|specific\.en-de\.)",
    "specific-only": r"blocks\.[12]\.ffn\.specific\.en-de\.",
    "general-only": r"blocks\.[12]\.ffn\.general\.",
    "random-layers": rf"blocks\.\d\.{NEURONS}",
    "random-scores": rf"blocks\.[12]\.{NEURONS}",
    "full": r".*",
    "layers": r"blocks\.[12]\.ffn\.",
    "ffn": r"blocks\.\d\.ffn\.",
    "attention": r"blocks\.\d\.attention\.",
    "lora-all": r"blocks\.\d\..*\.lora_[ab]",
    "adapters": r"blocks\.\d\.adapter\.",
    "adapter-lora": r"blocks\.\d\.(adapter\.|attention\..*\.lora_[ab])",
    "k=1": rf"blocks\.1\.{NEURONS}",
    "epsilon=0.5": rf"blocks\.[12]\.{NEURONS}",
    "units-all": ALL_UNITS,
    "units-random": ALL_UNITS,
}


@pytest.mark.parametrize("name", TRAINED_BY)
def test_each_rival_starts_at_the_base_model_and_trains_what_it_says(name):
    """A baseline that trains more or less than its name says, or does not start where the others start."""
    decoder = tiny_decoder("bloom", layers=4)
    ids, mask = padded_ids(90, "right")
    expected = decoder(ids, mask)
    torch.manual_seed(0)
    learners = methods.METHODS[name](decoder, small_context(decoder))
    lander.route(decoder, "en-de")
    start = decoder(ids, mask)
    if name in ("full", "layers", "ffn", "attention", "lora-all", "adapters", "adapter-lora"):
        assert torch.equal(start[mask], expected[mask])
    else:
        assert_close(start, expected, mask)
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    optimizer = torch.optim.AdamW(learners["en-de"].values(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        step(decoder, "en-de", batched(random_examples(6, seed=seed)), learners, optimizer)
    moved = {n for n, p in decoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(learners["en-de"]) and moved
    assert moved == {n for n in before if re.match(TRAINED_BY[name], n)}


def test_lora_equals_pefts():
    """Another scale, the transposed product, a bias lost."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = model.Linear(12, 20)
    randomize(linear)
    ours = methods.LoRA(linear, rank=4, alpha=8)
    plain = torch.nn.Linear(12, 20)
    plain.load_state_dict(linear.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(plain), config).base_model.model[0]
    with torch.no_grad():
        ours.lora_b.normal_()
        theirs.lora_A["default"].weight.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.copy_(ours.lora_b)
    x = torch.randn(3, 5, 12)
    assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert_close(ours.lora_a.grad, theirs.lora_A["default"].weight.grad)
    assert_close(ours.lora_b.grad, theirs.lora_B["default"].weight.grad)
    assert ours.lora_a.abs().max() <= 12**-0.5


def test_the_best_rate_is_chosen_on_validation_loss():
    """On test it would be the other one."""
    lines = []
    for rate, loss, bleu in ((0.1, 1.0, 5.0), (0.2, 2.0, 9.0)):
        scores = {"en-de": {"bleu": bleu}, "de-en": {"bleu": 10 - 10 * rate}}
        start = {"en-de": {"bleu": 1.0}, "de-en": {"bleu": 9.25}}
        lines.append({"method": "full", "rate": rate, "pairs": ["en-de"], "after": scores})
        lines[-1] |= {"valid_loss": {"en-de": loss}, "before": start}
    rates = compare.by_method(lines)["full"]
    assert compare.best_rate(rates) == 0.1


# --------------------------------------------------------------------------------------------------
# What scores, groups and routers say (study/probe.py)


def test_removed_neurons_are_gone():
    """Rows for columns: as many weights would be zero, and other neurons gone."""
    decoder = tiny_decoder("bloom", layers=2).requires_grad_(False)
    scores = torch.rand(2, 128, generator=torch.Generator().manual_seed(0))
    parts = list(probe.tenths(scores))
    assert torch.stack(parts).sum(0).eq(1).all()  # each neuron in one tenth
    assert scores[parts[0]].max() <= scores[parts[-1]].min()
    x = torch.randn(2, 3, decoder.config.hidden_size)
    kept = (~parts[3][1]).nonzero().flatten().tolist()
    expected = decoder.blocks[1].ffn.part(kept, torch.float32)(x) + decoder.blocks[1].ffn.down.bias
    probe.removed(decoder, parts[3])
    assert_close(decoder.blocks[1].ffn(x), expected)


def test_agreement_by_hand():
    first = torch.tensor([[0, 0, 1, -1, -1, -1, -1, -1]])
    second = torch.tensor([[0, 1, -1, 1, -1, -1, -1, -1]])
    found = probe.agreement(first, second)
    assert found["specific in both"] == pytest.approx(2 / 3)
    assert found["by chance"] == pytest.approx(3 / 8)
    assert found["same owner"] == 0.5 and found["same owner by chance"] == 0.5
    names = [("en-de", "de-en"), ("en-de", "en-fr"), ("fr-de", "en-de"), ("en-de", "fr-cs")]
    found = [probe.relation(*pair) for pair in names]
    assert found == ["reversed", "same source", "same target", "neither"]


def test_kinds_of_tokens_and_their_factors():
    """A token taken for its neighbour; CAR of another x than the one that the FFN reads."""
    ids, kinds = probe.kinds_of_tokens(Letters, "en-de", "A house", "Ein Haus")
    prompt, answer = render(Letters, "en-de", "A house", "Ein Haus")
    assert ids == prompt + answer[:-1] and len(kinds) == len(ids)
    source = [token for token, kind in zip(ids, kinds) if kind == "source"]
    assert source == Letters.encode("A house")
    assert [token for token, kind in zip(ids, kinds) if kind == "target"] == answer[:-1]
    decoder = tiny_decoder("bloom", vocabulary=128, layers=4)
    methods.METHODS["lander"](decoder, small_context(decoder))
    ffn = decoder.blocks[1].ffn
    with torch.no_grad():
        ffn.router["en-de"].normal_()
    read = []
    handle = ffn.general.register_forward_pre_hook(lambda part, inputs: read.append(inputs[0]))
    whole = ffn.register_forward_pre_hook(lambda part, inputs: read.append(inputs[0]))
    found = probe.factors(decoder, Letters, "en-de", [("A house", "Ein Haus")])
    handle.remove()
    whole.remove()
    expected = (read[1] / read[0])[0].mean(-1)  # what the general branch reads over x, [T]
    values = {kind: iter(own) for kind, own in found[1].items()}
    assert_close(torch.tensor([next(values[kind]) for kind in kinds]), expected.detach())


@pytest.mark.parametrize("begins", [False, True])
def test_every_prompt_begins_as_the_files_ask(world, begins):
    """Prompts without the beginning-of-sentence token that the model knows from all of its text."""
    tokenizer = data.load_tokenizer(world / "weights")
    tokenizer.prompt_prefix = [tokenizer.bos_id] * begins
    front = tokenizer.prompt_prefix
    short, _ = probe.short_prompt(tokenizer, "en-de", "the house", "das Haus")
    assert short == [*front, *tokenizer.encode("English: the house = German:")]
    ids, kinds = probe.kinds_of_tokens(tokenizer, "en-de", "the house", "das Haus")
    assert kinds[: len(front)] == ["prompt"] * begins and ids[: len(front)] == front


# --------------------------------------------------------------------------------------------------
# The report on a run (study/picture.py)


def test_a_report(world, tmp_path, monkeypatch, capsys):
    """A page that needs another file, that text can break, or that shades tokens by another CAR."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--epsilon 0.5 --steps 1")) == 0
    capsys.readouterr()
    source, reference = (Path(f"run/hypotheses/qaa-qab.{n}.txt") for n in ("source", "reference"))
    sentences = list(zip(data.read_lines(source), data.read_lines(reference)))
    after = Path("run/hypotheses/qaa-qab.after.txt")
    after.write_text("<script>&amp;\n" + after.read_text().partition("\n")[2])
    assert picture.main(["run"]) == 0, capsys.readouterr().err
    page = Path("run/report.html").read_text()
    for heading in picture.TEXTS:
        assert page.count(f"<h2>{heading}</h2>") == 1
    assert page.count("<svg") == 5 and page.count("<article>") == picture.SENTENCES
    assert "&lt;script&gt;&amp;amp;" in page and "<script" not in page
    outside = re.findall(r"""<link|<iframe|@import|\bsrc=|href=["'](?!#)|url\((?!#)""", page)
    assert not outside
    assert picture.main(["run"]) == 0
    assert Path("run/report.html").read_text() == page, "not the same bytes"

    shown = [
        float(value) for title in re.findall(r'title="([^"]+)"', page) for value in title.split()
    ]
    settings = lander.settings_of_run({"tuned": "run", "translate": "-"})
    model, tokenizer, _ = lander.load_tuned(settings)
    lander.route(model, "qaa-qab")
    routed = {l: ffn for l, ffn in lander.routed_layers(model).items() if "qaa-qab" in ffn.share}
    assert len(routed) == 2
    expected = []
    for prompt, answer in (render(tokenizer, "qaa-qab", *both) for both in sentences[:3]):
        ratios = []
        with lander.recording(model, routed, "ffn") as x:
            with lander.recording(model, routed, "ffn.general") as weighed, torch.no_grad():
                model(torch.tensor([prompt + answer[:-1]]))
        for layer in routed:  # what the general branch reads, over what the FFN reads
            ratios.append((weighed[layer] / x[layer])[0].median(-1).values)
        expected += torch.stack(ratios).mean(0).tolist()
    assert shown == pytest.approx(expected, abs=6e-4)
    assert max(expected) - min(expected) > 0.01


def test_tokens_that_share_a_character_are_shown_together():
    """Half characters on the page, one for each byte; markup that is taken for markup."""

    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))

    ids = list("a<好".encode())
    assert picture.visible_tokens(Bytes, ids) == ["a", "<", "", "", "好"]
    assert picture.visible_tokens(Bytes, ids[:-1]) == ["a", "<", "", "\ufffd"]
    shown = picture.shaded_tokens(Bytes, ids, [1.0, 1.0, 0.5, 0.5, 0.75], limit=1)
    assert shown.count("<span") == 3 and "&lt;" in shown
    assert 'title="0.500 0.500 0.750">好</span>' in shown
    assert picture.in_language("ar") == 'lang="ar" dir="rtl"'
    assert picture.shade(1.0, 1) == "#ffffff" != picture.shade(1.5, 1) != picture.shade(0.5, 1)


def test_a_report_without_routing_and_validation(world, tmp_path, monkeypatch, capsys):
    """A mean over no layers; a curve that is not there; a pair not evaluated; channels not shown."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "data", "text", ignore=shutil.ignore_patterns("valid.*"))
    words = "--data text --steps 2 --eval-pairs qaa-qab"
    for name, more in (("plain", "--no-routing --units all"), ("general", "--epsilon 1")):
        words_of_run = f"{words} --out {name} {more}"
        assert lander.main(arguments(world, words_of_run, pair="qaa-qab,qac-qab")) == 0
        assert picture.main([name]) == 0, capsys.readouterr().err
        page = Path(name, "report.html").read_text()
        assert page.count("there is no CAR to show") == 2 and 'class="tokens"' not in page
        assert page.count("It was not evaluated") == 1
        assert "There was no validation text" in page
        assert ("channels owned" in page) == (name == "plain")
        assert page.count("<svg") == (8 if name == "plain" else 6)


def test_no_report_on_an_unfinished_run(finished, tmp_path, monkeypatch, capsys):
    """A page about half a run; a traceback."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    results = json.loads(Path("run/results.json").read_text())
    del results["qaa-qab"]["after"]
    Path("run/results.json").write_text(json.dumps(results))
    for words, culprit in ((["run"], "no after"), (["none"], "not the folder"), ([], "required")):
        assert picture.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert culprit in line
    assert not Path("run/report.html").exists()


# --------------------------------------------------------------------------------------------------
# Speed and memory, planned (study/bench.py)


@pytest.mark.parametrize("case", bench.CASES)
def test_a_plan_counts_what_happens(case):
    """Operations that the real code does not do; tensors without values that live longer, or are not counted."""
    sizes = dict(layers=2, micro_tokens=256, cache_gb=1e-3, repeats=1)
    args = bench.argparse.Namespace(**sizes, dtype="float32", device="cpu")
    config = tiny_config("bloom", vocabulary=500, layers=4)
    peak, operations = bench.plan(case, config, args)
    assert operations == pytest.approx(bench.measure(case, config, args)[1], rel=1e-3)
    weights = 4 * sum(p.numel() for p in Decoder(config).parameters())
    logits = 4 * 500 * (256 // bench.SENTENCE) * (bench.TARGET + 1)
    assert weights + (1e6 if case == "generate" else logits) < peak < 12e6
    args.micro_tokens = 2048
    more = bench.plan(case, config, args)[0]
    assert more == peak if case == "generate" else more > 1.5 * peak


# --------------------------------------------------------------------------------------------------
# Damaged files (study/fuzz.py)


def test_mutated_inputs_end_in_a_result_or_one_line(tmp_path):
    """A few hundred of study/fuzz.py's cases: no traceback, no hang, nothing written elsewhere."""
    fuzz.build(tmp_path / "world")
    outcomes = [fuzz.check(tmp_path / "world", number, seed=1) for number in range(300)]
    assert [case for case, outcome in outcomes if outcome not in ("0", "2")] == []
    assert {outcome for _, outcome in outcomes} == {"0", "2"}
