"""Tests on tiny random models, on the CPU, without downloads:  pytest

Each test says which mistake it would catch. Parity with transformers and tokenizers is checked where
they are installed (study/requirements.txt); a few tests use real checkpoints and text where they lie
in ../shared, and skip elsewhere.

In this file: tiny models; the method; runs and the command line; then what they stand on, the decoder,
generation, checkpoints, tokenizers and text; worked examples; real input.
"""

import contextlib
import doctest
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in commands

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import data
import lander
import model
from data import InputError, list_pairs, load_tokenizer, make_batches, read_parallel, render
from model import Config, Decoder, load_model, save_model
from study import demo, fuzz

SHARED = Path(__file__).resolve().parent.parent / "shared"


# --------------------------------------------------------------------------------------------------
# Tiny models


def randomize(module, seed=0, std=0.15):
    """Every parameter away from its initial value: zero biases and unit norms would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        mean = 1.0 if "norm" in name or "ln" in name else 0.0
        p.data.copy_(torch.randn(p.shape, generator=generator) * std + mean)
    return module.eval()


def assert_close(ours, theirs, real=None):
    """Largest difference below 2e-5 of the largest logit, on real tokens."""
    ours, theirs = (ours, theirs) if real is None else (ours[real], theirs[real])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def random_input(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random_ids(shape, vocabulary):
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def padded_ids(vocabulary, side, lengths=(11, 4, 7)):
    """Ids [B, T] and mask [B, T] with padding on one side."""
    rank = torch.arange(max(lengths))
    rank = rank if side == "right" else rank.flip(0)
    mask = rank < torch.tensor(lengths)[:, None]
    return random_ids(mask.shape, vocabulary), mask


SIZES = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
BAICHUAN = SIZES | {"model_type": "baichuan", "num_attention_heads": 6, "rms_norm_eps": 1e-6}
LLAMA_LIKE = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 8}
LLAMA_LIKE["max_position_embeddings"] = 64
LLAMA3_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_SCALING |= {"factor": 8.0, "original_max_position_embeddings": 16}
# A scaled LLaMA 3 with heads of another size and all biases there can be, and small Qwens.
TINY_LLAMA_LIKE = {
    "llama": {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "rope_theta": 1e6, "head_dim": 10},
}
TINY_LLAMA_LIKE["llama"]["rope_scaling"] = LLAMA3_SCALING


def tiny_config(kind, vocabulary=90, layers=2):
    sizes = {"model_type": kind, "vocab_size": vocabulary}
    if kind == "bloom":
        return Config.from_json(sizes | {"n_embed": 32, "n_layer": layers, "n_head": 4})
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
        return Config.from_json(sizes)
    if kind in TINY_LLAMA_LIKE:
        sizes["num_hidden_layers"] = layers
        return Config.from_json(LLAMA_LIKE | sizes | TINY_LLAMA_LIKE[kind])
    longest = "max_position_embeddings" if kind == "rotary" else "model_max_length"
    more = {longest: 64, "vocab_size": vocabulary, "normalize_head": True}
    return Config.from_json(BAICHUAN | more)


def tiny_decoder(kind, seed=0, vocabulary=90, layers=2):
    decoder = Decoder(tiny_config(kind, vocabulary, layers))
    return randomize(decoder, seed, std=0.5)  # wild enough for varied continuations


KINDS = ("bloom", "rotary", "alibi", "llama", "qwen2", "qwen3", "gpt2")
PUBLISHED_KINDS = [kind for kind in KINDS if kind not in ("rotary", "alibi")]  # Baichuan's
PAIRS = ["en-de", "fr-en", "en-cs"]


def random_examples(count, vocabulary=90, seed=0, longest=9):
    rng = random.Random(seed)
    ids = lambda: [rng.randrange(4, vocabulary) for _ in range(rng.randint(2, longest))]
    return [(ids(), [*ids(), 2]) for _ in range(count)]


def batched(examples, tokens=10**6):
    return list(make_batches(examples, pad_id=3, tokens_per_batch=tokens))


class Letters:
    """A tokenizer of one id a character."""

    eos_id, pad_id = 2, 3
    prompt_prefix, target_prefix = [], " "
    encode = staticmethod(lambda text: [ord(c) for c in text])


def refused(call, *culprits):
    """The message of the InputError that a call must end in: one line, with all culprits in it."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for culprit in culprits:
        assert culprit in text
    return text


# --------------------------------------------------------------------------------------------------
# The method in one column


def copies(decoder):
    """{name: value} of all parameters, to see later which have moved."""
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def moved_since(before, decoder):
    """Names of the parameters that are no longer what they were."""
    return {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}


def test_the_column_at_the_top_of_lander_runs():
    """The example that a student reads first must be the code, and must train what it says."""
    decoder = tiny_decoder("bloom", layers=5)
    before = copies(decoder)
    examples = {pair: batched(random_examples(9, seed=s)) for s, pair in enumerate(PAIRS)}
    prompts = batched([(prompt, []) for prompt, _ in random_examples(9)])
    names = vars(lander) | dict(model=decoder, prompts=prompts, examples=examples, pairs=PAIRS)
    (column,) = doctest.DocTestFinder(recurse=False).find(lander, "lander.py", globs=names)
    result = doctest.DocTestRunner().run(column, clear_globs=False)
    assert (result.attempted, result.failed) == (11, 0)
    names = column.globs
    assert names["means"].shape == (5,) and names["awareness"].shape == (3, 2, 128)
    assert [str(layer) for layer in names["layers"]] == list(names["groups"])
    assert names["loss"] > 0 and names["norm"] > 0
    learners = lander.what_learns(decoder, "en-de")
    assert len(learners) == 2 * (3 + 3 + 1), "up, its bias and down, twice; the router; two layers"
    assert all(p.any() for name, p in learners.items() if ".router." in name), "the step moved them"
    untrained = {name: p for name, p in decoder.named_parameters() if name in before}
    assert all(torch.equal(p, before[name]) for name, p in untrained.items())


# --------------------------------------------------------------------------------------------------
# Layers and neurons


def left_padded(batch):
    """The same batch with its padding on the left."""
    order = batch.mask.long().argsort(dim=1, stable=True)
    return data.Batch(*(tensor.gather(1, order) for tensor in batch))


def test_layer_scores_equal_a_loop_over_prompts():
    """Padding counted, the mean of all tokens for that of prompts' means, a block's input for its output."""
    decoder = tiny_decoder("rotary")
    prompts = [(prompt, []) for prompt, _ in random_examples(7)]
    expected = torch.zeros(3)
    for prompt, _ in prompts:
        x = decoder.embedding(torch.tensor([prompt]))
        angles = model.rotary_angles(decoder.config, None, len(prompt), len(prompt), "cpu")
        for layer, block in enumerate(decoder.blocks):
            x = block(x, None, angles)
            expected[layer] += x.mean().item() / len(prompts)
    padded_right = [make_batches(prompts, 3, tokens) for tokens in (1, 20, 1000)]
    for batches in (*padded_right, map(left_padded, make_batches(prompts, 3, 1000))):
        means = lander.activation_means(decoder, batches)
        assert torch.allclose(means, expected, rtol=1e-5, atol=1e-6)


def test_layer_selection_by_hand():
    """diff[l] scoring layer l instead of l + 1; ties to the higher layer; the first layer selected."""
    differences = lander.layer_differences(torch.tensor([0.0, 2.0, 1.0, 3.0, 3.5]))
    assert differences.tolist() == [2.0, 1.0, 2.0, 0.5]
    for k, layers in ((1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4])):
        assert lander.select_layers(differences, k) == layers
    refused(lambda: lander.select_layers(differences, 5), "5 layers")


def brute_force_awareness(decoder, examples, layers):
    """|h * dL/dh| per sentence and token, with every weight taking part in autograd."""
    kept, sums, tokens = {}, 0, 0

    def keep(down, inputs):
        inputs[0].retain_grad()
        kept[down] = inputs[0]

    downs = [decoder.blocks[layer].ffn.down for layer in layers]
    hooks = [down.register_forward_pre_hook(keep) for down in downs]
    for prompt, target in examples:
        logits = decoder(torch.tensor([prompt + target[:-1]]))[0].log_softmax(-1)
        (-logits[range(len(prompt) - 1, len(logits)), target].sum()).backward()
        effects = torch.stack([(kept[down] * kept[down].grad)[0] for down in downs])  # [K, T, F]
        sums = sums + effects.abs().sum(1).detach()
        tokens += len(logits)
    for hook in hooks:
        hook.remove()
    decoder.zero_grad()
    return sums / tokens


def test_a_loss_in_pieces_is_the_loss(monkeypatch):
    """Targets of one piece read as another's; logits of all targets at once."""
    decoder = tiny_decoder("bloom")
    (batch,) = batched(random_examples(9))
    parameters = list(decoder.parameters())
    expected = lander.target_loss(decoder, batch)
    gradients = torch.autograd.grad(expected, parameters)
    widths, logits = [], decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda x: widths.append(len(x)) or logits(x))
    monkeypatch.setattr(lander, "LOGITS_AT_ONCE", 4 * decoder.config.vocab_size + 1)
    loss = lander.target_loss(decoder, batch)
    assert sum(widths) == lander.count_targets([batch]) > 8 and max(widths) == 4
    assert_close(loss, expected)
    for gradient, other in zip(torch.autograd.grad(loss, parameters), gradients):
        assert_close(gradient, other)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_awareness_equals_brute_force(kind, frozen):
    """Labels shifted twice, a mean loss, the absolute value of a sum, padding counted; no graph if frozen."""
    decoder = tiny_decoder(kind)
    examples = random_examples(9)
    for layers in ([0, 1], [1], [1, 0]):
        expected = brute_force_awareness(decoder.requires_grad_(True), examples, layers)
        least = 1e-5 * expected.max().item()
        decoder.requires_grad_(not frozen)
        one_by_one, all_at_once = (make_batches(examples, 3, tokens) for tokens in (1, 10**6))
        shuffled = make_batches(examples[::-1], 3, 30, seed=1)
        padded_left = map(left_padded, make_batches(examples, 3, 60))
        for batches in (one_by_one, shuffled, all_at_once, padded_left):
            scores = lander.neuron_awareness(decoder, batches, layers)
            assert scores.shape == expected.shape and scores.dtype == torch.float32
            assert torch.allclose(scores, expected, rtol=1e-3, atol=least)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_awareness_predicts_the_damage_of_removing_a_neuron():
    """A score that ranks neurons by anything else than what they do to the loss, of a model that copies."""
    torch.manual_seed(0)
    decoder = Decoder(tiny_config("bloom", vocabulary=24))
    rng = random.Random(0)
    words = [[rng.randrange(4, 24) for _ in range(4)] for _ in range(600)]
    examples = [([*word, 0], [*word, 2]) for word in words]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for step in range(300):
        (batch,) = batched(rng.sample(examples, 32))
        (lander.target_loss(decoder, batch) / (batch.targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    (batch,) = batched(examples[:64])
    down = decoder.blocks[1].ffn.down

    @torch.no_grad()
    def sentence_losses(*removed):
        without = lambda _, inputs: inputs[0].index_fill(-1, torch.tensor(removed).long(), 0)
        hook = down.register_forward_pre_hook(without)
        logits = decoder(batch.ids).transpose(1, 2)
        hook.remove()
        return functional.cross_entropy(logits, batch.targets, reduction="none").sum(1)

    (scores,) = lander.neuron_awareness(decoder, [batch], [1])
    whole, damage = sentence_losses(), []
    for neuron in range(len(scores)):
        damage.append((sentence_losses(neuron) - whole).abs().mean())
    ranks = [values.argsort().argsort().double() for values in (scores, torch.stack(damage))]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    print(f"rank correlation of awareness and damage: {correlation:.3f}")
    assert correlation > 0.8


# --------------------------------------------------------------------------------------------------
# Parts, groups and routing

OF_PAIR_0, OF_PAIR_1 = [[1.0, 1, 1, 1, 6], [2, 2, 2, 2, 2]], [[30, 10, 10, 10, 40], [1, 2, 2, 2, 3]]
TABLE = torch.tensor([OF_PAIR_0, OF_PAIR_1])  # [2, 2, 5]


def test_categorization_by_hand():
    """Scaled, the rows of layer 0 are .5 .5 .5 .5 3 and 1.5 .5 .5 .5 2; unscaled, pair 1 would own everything."""
    owner = lander.categorize(TABLE, epsilon=0.6)
    assert owner.tolist() == [[1, -1, -1, -1, 0], [0, -1, -1, -1, 1]]
    assert owner.dtype == torch.long
    assert lander.categorize(TABLE, epsilon=1.0).eq(-1).all()
    one_each = lander.categorize(TABLE, epsilon=0.8)
    assert one_each.tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert lander.categorize(TABLE, epsilon=0.0).ge(0).all()
    refused(lambda: lander.categorize(TABLE[:1], epsilon=0.9), "one pair only")


def test_share_by_hand():
    """Layer 0 of the table: pair 1 has 1.5 on its own neuron and a mean of .5 on the general ones."""
    pairs = ["en-de", "de-en"]
    owner = lander.categorize(TABLE, epsilon=0.6)
    groups = lander.describe_groups(TABLE, owner, pairs, {"de-en": [3, 5]})
    assert groups["3"] == {"specific": {"en-de": [4], "de-en": [0]}, "share": {"de-en": 0.25}}
    owner = lander.categorize(TABLE, epsilon=0.8)
    nothing = lander.describe_groups(TABLE, owner, pairs, {"en-de": [3, 5]})
    assert nothing["3"]["share"] == {"en-de": None}


def random_groups(decoder, selected):
    layers = sorted(set().union(*selected.values()))
    sizes = len(PAIRS), len(layers), decoder.config.ffn_size
    awareness = torch.rand(sizes, generator=torch.Generator().manual_seed(0))
    return lander.describe_groups(awareness, lander.categorize(awareness, 0.7), PAIRS, selected)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole(kind):
    """What everything rests on: an FFN is a sum over its neurons. A gate's bias forgotten, a neuron lost."""
    ffn = tiny_decoder(kind).blocks[0].ffn
    F = ffn.up.out_features
    x = random_input(2, 3, ffn.up.in_features)
    order = random.Random(0).sample(range(F), F)
    of_neurons = {name: p for name, p in ffn.named_parameters() if name != "down.bias"}
    size = sum(p.numel() for p in of_neurons.values())
    for cuts in ([0, F], [0, 7, 7, 20, F], [0, *range(1, F + 1)]):
        parts = [ffn.part(order[a:b], torch.float32) for a, b in zip(cuts, cuts[1:])]
        y = sum(part(x) for part in parts)
        assert_close(y if ffn.down.bias is None else y + ffn.down.bias, ffn(x))
        assert sum(p.numel() for part in parts for p in part.parameters()) == size
    assert of_neurons.keys() <= set(model.NEURON_DIMENSION)
    assert of_neurons.keys() == dict(parts[0].named_parameters()).keys()


def routed_decoder(kind="bloom", selected={"en-de": [0, 1], "fr-en": [1]}, routing=True):
    decoder = tiny_decoder(kind)
    lander.install_routing(decoder, random_groups(decoder, selected), routing)
    return decoder


def test_generation_casts_weights_once(monkeypatch):
    """A cast of the trained parts at every token, 17% of the time; or a cast that outlives them."""
    decoder = tiny_decoder("bloom").bfloat16()
    lander.install_routing(decoder, random_groups(decoder, {"en-de": [0, 1]}))
    lander.route(decoder, "en-de")
    calls, operands = [], model.Linear.operands
    noted = lambda self, dtype: calls.append(self) or operands(self, dtype)
    monkeypatch.setattr(model.Linear, "operands", noted)
    ids = torch.tensor([[5, 6, 7]])
    before = decoder.generate(ids, None, 9, eos_id=89)
    linears = sum(isinstance(module, model.Linear) for module in decoder.modules())
    assert len(set(calls)) == len(calls) == linears
    logits = decoder(ids)
    with torch.no_grad():
        decoder.blocks[1].ffn.general.up.weight.mul_(-3)
    assert not torch.equal(decoder(ids), logits)
    assert before != decoder.generate(ids, None, 9, eos_id=89)


@pytest.mark.parametrize("share", ["off", "own", 1e-6, 1e-3, 0.3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_freshly_routed_model_is_the_pretrained_one(kind, share):
    """A neuron in two groups or none, a bias counted twice, factors that do not start at one, at any share."""
    decoder = tiny_decoder(kind)
    ids, mask = padded_ids(90, "left")
    expected = decoder(ids, mask)
    groups = random_groups(decoder, {"en-de": [0, 1], "fr-en": [1]})
    for group in groups.values():
        if share not in ("off", "own"):
            group["share"] = dict.fromkeys(group["share"], share)
    lander.install_routing(decoder, groups, share != "off")
    assert list(decoder.blocks[1].ffn.share) == ([] if share == "off" else ["en-de", "fr-en"])
    for pair in (None, *PAIRS):
        lander.route(decoder, pair)
        assert_close(decoder(ids, mask), expected, mask)


def test_routing_is_off_where_there_is_nothing_to_route_between():
    """A mean over an empty group is no number, and a group that scores nothing has a share of 0 or 1."""
    scores = torch.tensor([0.0, 0.0, 2.0, 1.0], dtype=torch.double)
    first, last = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    neither = torch.zeros(4, dtype=torch.bool)
    groups = [(first, last), (last, first), (neither, last), (last, neither), (first, neither)]
    assert [lander.general_share(scores, *pair) for pair in groups] == [None] * 5
    assert lander.general_share(scores, torch.tensor([True, False, True, False]), last) == 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_routing_follows_the_equation(kind):
    """The factor on the output, on the bias, or on the wrong group; w_p of another pair."""
    decoder = tiny_decoder(kind)
    ffn = decoder.blocks[0].ffn
    groups = random_groups(decoder, {"en-de": [0], "fr-en": [0]})
    specific, share = groups["0"]["specific"], groups["0"]["share"]
    x = random_input(2, 3, ffn.up.in_features)
    routed = lander.RoutedFFN(ffn, specific, share)
    for pair, s in share.items():
        torch.manual_seed(2)
        w = routed.router[pair].data.normal_()
        car = 1 / (1 + torch.exp(-(x @ w + torch.log(torch.tensor(s / (1 - s))))))[..., None]
        # Equation 7: CAR weighs the general branch, 1 - CAR the specific one.
        factor = (car / s).repeat(1, 1, ffn.up.out_features)
        for other, neurons in specific.items():
            factor[..., neurons] = (1 - car) / (1 - s) if other == pair else 1.0

        def projected(linear):
            return factor * (x @ linear.weight.T) + (0 if linear.bias is None else linear.bias)

        h = projected(ffn.up)
        if ffn.gate is None:
            h = functional.gelu(h, approximate="tanh")
        else:
            h = h * functional.silu(projected(ffn.gate))
        routed.pair = pair
        assert_close(routed(x), ffn.down(h))


def test_the_router_is_computed_in_32_bits():
    """A product in 16 bits: CAR moves in steps of a hundredth."""
    ffn = tiny_decoder("bloom").bfloat16().blocks[0].ffn
    routed = lander.RoutedFFN(ffn, {"en-de": [0, 1]}, {"en-de": 0.9})
    routed.pair, x = "en-de", random_input(2, 3, ffn.up.in_features).bfloat16()
    w = routed.router["en-de"].data.normal_()
    car = torch.sigmoid(x.double() @ w.double() + math.log(9))
    for factor, expected in zip(routed.factors(x), (car / 0.9, (1 - car) / 0.1)):
        assert factor.dtype == torch.float32 and (factor - expected).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Training


def adamw(decoder):
    """What learns from each pair, and an optimizer of all of it that decays and has momentum."""
    learners = {pair: lander.what_learns(decoder, pair) for pair in PAIRS}
    parameters = lander.merged(learners).values()
    return learners, torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def step(decoder, pair, batches, learners, optimizer):
    lander.route(decoder, pair)
    return lander.train_step(decoder, batches, optimizer, learners[pair].values())


def learning_names(decoder, pair):
    """Names of what a pair trains, spelled out anew."""
    layers = {"en-de": "[01]", "fr-en": "1"}[pair]
    learns = rf"blocks\.{layers}\.ffn\.(general\..+|specific\.{pair}\..+|router\.{pair})"
    return {name for name, _ in decoder.named_parameters() if re.fullmatch(learns, name)}


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_batchs_neurons_move(kind, routing):
    """A gradient multiplied by zero still lets AdamW decay the row; another pair's neurons train along."""
    decoder = routed_decoder(kind, routing=routing)
    checkpoint = copies(decoder)
    learners, optimizer = adamw(decoder)
    with_gradient = set()
    for name, p in decoder.named_parameters():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda p, name=name: with_gradient.add(name))
    for pair in ("en-de", "fr-en"):
        before = copies(decoder)
        for seed in range(20):
            with_gradient.clear()
            step(decoder, pair, batched(random_examples(6, seed=seed), 40), learners, optimizer)
            assert with_gradient == learning_names(decoder, pair) == set(learners[pair])
        assert all(p.grad is None for p in decoder.parameters())
        assert moved_since(before, decoder) == learning_names(decoder, pair)
    moved = learning_names(decoder, "en-de") | learning_names(decoder, "fr-en")
    assert moved_since(checkpoint, decoder) == moved and len(checkpoint) > len(moved) + 15
    assert {id(p) for p in optimizer.state} == {id(decoder.get_parameter(name)) for name in moved}
    assert set(lander.merged(learners)) == moved


def test_frozen_weights_equal_the_checkpoint_bit_for_bit():
    """A rest that is not the checkpoint's rows, in its type; training that writes into the FFN it was taken from."""
    decoder = tiny_decoder("rotary").bfloat16()
    original, ffn = copies(decoder), decoder.blocks[1].ffn
    groups = random_groups(decoder, {"en-de": [1]})
    lander.install_routing(decoder, groups)
    learners, optimizer = adamw(decoder)
    for seed in range(5):
        step(decoder, "en-de", batched(random_examples(4, seed=seed), 100), learners, optimizer)
    assert {p.dtype for p in learners["en-de"].values()} == {torch.float32}
    others = sorted(groups["1"]["specific"]["fr-en"] + groups["1"]["specific"]["en-cs"])
    rest = decoder.blocks[1].ffn.rest
    for name, p in ffn.named_parameters():
        assert torch.equal(p, original[f"blocks.1.ffn.{name}"])
        rows = p[:, others] if name == "down.weight" else p[others]
        assert torch.equal(rest.get_parameter(name), rows)
        assert rest.get_parameter(name).dtype == torch.bfloat16
    for name, p in decoder.named_parameters():
        if ".ffn." not in name or name.startswith("blocks.0."):
            assert torch.equal(p, original[name])


def test_any_parameters_can_be_trained():
    """A baseline that trains all weights, or some matrices, takes the same steps: none asks for a RoutedFFN."""
    decoder = tiny_decoder("bloom")
    before = copies(decoder)
    chosen = {name: p for name, p in decoder.named_parameters() if ".attention.output." in name}
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2, fused=True)
    pairs = ["en-de", "fr-en"] * 2
    steps = [(pair, batched(random_examples(3, seed=s)), 0) for s, pair in enumerate(pairs)]
    learners = dict.fromkeys(pairs, chosen)
    entries = list(lander.training_steps(decoder, learners, steps, 4, optimizer, 1e-2))
    assert [(entry["step"], entry["pair"]) for entry in entries] == list(enumerate(pairs, 1))
    rates = [lander.learning_rate(step, 4, 1e-2) for step in range(4)]
    assert [entry["learning_rate"] for entry in entries] == rates
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    assert moved_since(before, decoder) == set(chosen) and len(chosen) == 4


def test_validation_loss_is_the_mean_of_all_target_tokens():
    """A mean of batches' means; the text of one pair routed as another's."""
    decoder, losses = randomize(routed_decoder(), std=0.5), []
    (whole,), in_parts = batched(random_examples(12)), batched(random_examples(12), 40)
    for pair, before in (("en-de", "fr-en"), ("fr-en", "en-de")):
        lander.route(decoder, pair)
        expected = lander.target_loss(decoder, whole).item() / lander.count_targets([whole])
        lander.route(decoder, before)
        losses.append(lander.validation_loss(decoder, pair, in_parts))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def gradients_of_a_step(tokens, checkpointing=False):
    """How many micro-batches a step took, its loss and norm, and {name: gradient} before clipping."""
    decoder = routed_decoder()
    decoder.checkpointing = checkpointing
    learners, optimizer = adamw(decoder)
    batches, kept = batched(random_examples(12), tokens), {}
    for name, p in learners["en-de"].items():
        keep = lambda p, name=name: kept.update({name: p.grad.clone()})
        p.register_post_accumulate_grad_hook(keep)
    loss, norm = step(decoder, "en-de", batches, learners, optimizer)
    assert set(kept) == learning_names(decoder, "en-de")
    return len(batches), loss, norm, kept


def test_micro_batches_and_checkpointing_change_no_gradient():
    """A mean of means weighs the tokens of a short micro-batch more; a block recomputed without its routing."""
    one, loss, norm, whole = gradients_of_a_step(tokens=10**6)
    four, loss_4, norm_4, accumulated = gradients_of_a_step(tokens=40)
    assert one == 1 and four >= 4
    assert abs(loss - loss_4) < 1e-5 * loss and abs(norm - norm_4) < 1e-4 * norm
    recomputed = gradients_of_a_step(tokens=10**6, checkpointing=True)[-1]
    for name, gradient in whole.items():
        least = 1e-5 * gradient.abs().max().item()
        assert torch.allclose(gradient, accumulated[name], rtol=1e-3, atol=least)
        assert torch.equal(gradient, recomputed[name])


@pytest.mark.parametrize("processes", [1, 2])
def test_examples_over_the_limit_are_left_out_of_their_step(monkeypatch, processes):
    """Cut, or replaced, which would change every later step; AdamW's decay in a step without any sentence."""
    monkeypatch.setattr(lander, "process_count", lambda: processes)
    monkeypatch.setattr(lander.distributed, "all_reduce", lambda tensor: None)
    decoder = tiny_decoder("bloom", vocabulary=128)
    text = {"en-de": [("a" * length, "b") for length in (1, 60, 2, 60)]}
    settings = lander.Settings(steps=4, batch=1, max_tokens=100)
    steps = lander.step_batches(Bytes, text, settings, 0)
    learners = {"en-de": dict(decoder.named_parameters())}
    optimizer = torch.optim.AdamW(decoder.parameters())
    before, skipped = copies(decoder), []
    for entry in lander.training_steps(decoder, learners, steps, 4, optimizer, 1e-2):
        skipped.append(entry["skipped"])
        moved = "embedding.weight" in moved_since(before, decoder)
        assert (entry["skipped"] == 0) == moved == (entry["loss"] > 0)
        before = copies(decoder)
    assert sum(skipped) == 2 and len(skipped) == 4
    later = list(lander.step_batches(Bytes, text, settings, 2))
    assert [left_out for _, _, left_out in later] == skipped[2:], "resumed, the same steps follow"


def test_gradients_are_clipped_to_norm_1():
    """A step of norm 5 that moves five times as far, or that is clipped at another norm."""
    decoder = routed_decoder()
    learners, _ = adamw(decoder)
    before = copies(decoder)
    optimizer = torch.optim.SGD(learners["en-de"].values(), lr=1.0)
    _, norm = step(decoder, "en-de", batched(random_examples(6)), learners, optimizer)
    moved = [(p - before[name]).square().sum() for name, p in learners["en-de"].items()]
    assert norm > 2 and sum(moved).sqrt().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_recomputes_activations_where_it_is_asked_to(tmp_path, monkeypatch, checkpointing):
    """--checkpointing that is ignored: out of memory, on the machine that it was meant for."""
    decoder, seen, train_step = routed_decoder(), [], lander.train_step
    noted = lambda model, *rest: seen.append(model.checkpointing) or train_step(model, *rest)
    monkeypatch.setattr(lander, "train_step", noted)
    text = {"en-de": [("0", "1")] * 2}
    learners = {"en-de": lander.what_learns(decoder, "en-de")}
    settings = lander.Settings(steps=2, batch=1, checkpointing=checkpointing)
    lander.train(decoder, Letters, learners, text, {}, settings, tmp_path)
    assert seen == [checkpointing] * 2 and not decoder.checkpointing


def test_pairs_alternate_and_an_epoch_is_every_example_once():
    """The longer text cut to the shorter one's length; every epoch in the same order; a resumed run in another."""
    sizes = {"en-de": 7, "fr-en": 3}
    steps = list(itertools.islice(lander.schedule(sizes, 2, seed=0), 12))
    assert [pair for pair, _ in steps[:6]] == ["en-de", "fr-en", "en-de", "fr-en", "en-de", "en-de"]
    for epoch in (steps[:6], steps[6:]):
        for pair, size in sizes.items():
            numbers = [number for of, batch in epoch if of == pair for number in batch]
            assert sorted(numbers) == list(range(size))
    assert steps[:6] != steps[6:], "each epoch is shuffled anew"
    assert steps == list(itertools.islice(lander.schedule(sizes, 2, seed=0), 12))


def test_learning_rate_by_hand():
    """No warm-up or a longer one; a last step of rate zero; a twentieth of 30, 50 or 35 steps not rounded to 2."""
    rates = [lander.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == rates[5] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(1 / 95) and lander.learning_rate(0, 1, 1.0) == 1.0
    for total in (30, 50, 35):
        assert [lander.learning_rate(step, total, 1.0) for step in (0, 1)] == [0.5, 1.0]


# --------------------------------------------------------------------------------------------------
# Attention's channels, and what keeps other pairs


def with_channels(decoder, selected={"en-de": [0, 1], "fr-en": [1]}):
    """Groups that have attention's channels, too, by random scores."""
    groups = random_groups(decoder, selected)
    sizes = len(PAIRS), len(groups), decoder.config.heads * decoder.config.head_size
    awareness = torch.rand(sizes, generator=torch.Generator().manual_seed(1))
    lander.add_channels(groups, awareness, decoder.config, PAIRS, 0.7)
    return groups


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_a_sum_over_channels(kind):
    """A row of another head, or of the key where the query is meant; a row of two channels or none."""
    decoder = tiny_decoder(kind)
    config, attention = decoder.config, decoder.blocks[0].attention
    rows, columns = lander.channel_places(config)
    fused, output = attention.query_key_value, attention.output
    for places, projection in (rows, fused.weight), (columns, output.weight.T):
        assert sorted(places.flatten().tolist()) == list(range(len(projection)))
    H, H_kv, d = config.heads, config.kv_heads, config.head_size
    if config.query_key_value == "interleaved":
        assert rows[3].tolist() == [3, d + 3, 2 * d + 3]
    else:  # the last channel's query, key and value are the last of all
        assert {3, H * d + 3, (H + H_kv) * d + 3} <= {*rows[3].tolist()}
        last = {H * d - 1, (H + H_kv) * d - 1, (H + 2 * H_kv) * d - 1}
        assert last <= {*rows[-1].tolist()}
    ids, mask = padded_ids(config.vocab_size, "right")
    mixed = []  # what the output projection reads, before and after a value's row is zero
    channel = config.head_size if config.kv_heads > 1 else 0
    for _ in range(2):
        with lander.recording(decoder, [0], "attention.output") as h:
            decoder(ids, mask)
        mixed.append(h[0].detach())  # [B, T, H * d]
        for p in fused.parameters():
            p.data[rows[channel, -1]] = 0
    changed = (mixed[0] != mixed[1]).any(0).any(0).nonzero().flatten().tolist()
    assert changed == sorted(columns[channel].tolist())
    assert len(changed) == config.heads // config.kv_heads
    if kind != "qwen3":  # whose norms mix a head's channels
        turned = [channel, channel + config.head_size // 2]  # which rotary positions turn together
        no_query = attention_without(kind, rows[turned, :-2])
        assert_close(no_query, attention_without(kind, rows[turned, -2]))  # a channel of both
        assert (no_query - attention_without(kind, [])).abs().max() > 1e-4


def attention_without(kind, rows):
    """What a tiny decoder makes of padded prompts where some rows of its first layer are zero."""
    decoder = tiny_decoder(kind)
    for p in decoder.blocks[0].attention.query_key_value.parameters():
        p.data[rows] = 0
    return decoder(*padded_ids(decoder.config.vocab_size, "right"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_only_a_pairs_channels_move(kind, dtype):
    """A start that is another function; a frozen row that moves; another pair's channel that learns."""
    decoder = tiny_decoder(kind).to(dtype)
    ids, mask = padded_ids(decoder.config.vocab_size, "right")
    groups, whole = with_channels(decoder), copies(decoder)
    rows, columns = lander.channel_places(decoder.config)
    x = torch.ones(1, 3, decoder.config.hidden_size, dtype=dtype)
    attend = lambda layer: decoder.blocks[layer].attention(x, None, None, None, layer)
    before = attend(0), attend(1)
    lander.install_routing(decoder, groups)
    assert all(map(torch.equal, before, (attend(0), attend(1)))), "exact to the bit"
    learners, optimizer = adamw(decoder)
    assert {p.dtype for p in learners["en-de"].values()} == {torch.float32}
    for seed in range(4):
        step(decoder, "en-de", batched(random_examples(6, seed=seed)), learners, optimizer)
    expected = set()
    for layer, name in itertools.product((0, 1), ("query_key_value", "output")):
        place = f"blocks.{layer}.attention.{name}"
        owned, module = groups[str(layer)]["channels"], decoder.get_submodule(place)
        places = rows if name == "query_key_value" else columns
        stay = places[owned["en-cs"] + owned["fr-en"]].flatten().tolist()
        frozen = {"weight": {*stay}, "bias": {*range(len(module.weight))}}
        if name == "query_key_value":
            moves_scores = kind in ("llama", "qwen2")  # a key's bias, with rotary positions alone
            frozen["bias"] = {*stay} if moves_scores else {*stay, *rows[:, -2].tolist()}
        for what, now in zip(("weight", "bias"), module.operands(dtype)):
            if now is not None:
                old = whole[f"{place}.{what}"]
                same = now == old
                if what == "weight":
                    same = same.all(0 if places is columns else 1)
                learn = [i for i in range(len(same)) if i not in frozen[what]]
                assert same[[*frozen[what]]].all() and (~same[learn]).sum() >= 0.8 * len(learn)
                assert torch.equal(getattr(module, what), old)
                if learn:
                    expected |= {f"{place}.parts.{what}.{part}" for part in ("general", "en-de")}
    assert expected == {name for name in learners["en-de"] if ".attention." in name}
    out = decoder(ids, mask)
    for module in decoder.modules():
        if isinstance(module, lander.PartlyTrained):
            module.settle()
    assert torch.equal(decoder(ids, mask), out), "exported, it is the same function"
    kept = {name for name, _ in decoder.named_parameters() if ".attention." in name}
    assert kept == {name for name in whole if ".attention." in name}


def drifted(decoder, examples, weight=0.7, micro_tokens=10**6):
    """A keeper of what a routed decoder was, before all that learns moved a little."""
    lander.install_routing(decoder, random_groups(decoder, {"en-de": [0, 1]}))
    decoder.requires_grad_(False)
    learners = lander.what_learns(decoder, "en-de")
    keeper = lander.Keeper(decoder, examples, weight, pad_id=3, micro_tokens=micro_tokens)
    for i, p in enumerate(learners.values()):
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.requires_grad_(True)
    return keeper, learners


@pytest.mark.parametrize("rows_at_once", [10**6, 5])
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_the_gradient_of_keep(kind, rows_at_once, monkeypatch):
    """KL the other way round, over padding or prompts, a mean of means, or routed as the tuned pair."""
    monkeypatch.setattr(lander, "LOGITS_AT_ONCE", rows_at_once * 90)
    examples = random_examples(6)
    start, decoder = tiny_decoder(kind), tiny_decoder(kind)
    keeper, learners = drifted(decoder, examples)
    lander.route(decoder, "en-de")
    keeper.add_gradients(step=3)
    total, tokens = 0, 0
    for prompt, target in examples:
        ids = torch.tensor([prompt + target[:-1]])
        before = start(ids)[0, len(prompt) - 1 :].softmax(-1)
        now = decoder(ids)[0, len(prompt) - 1 :].softmax(-1)
        total = total + (before * (before / now).log()).sum()
        tokens += len(target)
    kl = total / tokens
    expected = torch.autograd.grad(0.7 * kl, learners.values(), allow_unused=True)
    assert keeper.drift == pytest.approx(kl.item(), rel=1e-4) and kl > 1e-3
    for (name, p), gradient in zip(learners.items(), expected):
        assert (p.grad is None) == (gradient is None) == ("router" in name)
        if gradient is not None:
            assert (p.grad - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_a_step_without_an_example_keeps_nothing():
    """A KL that no step had: AttributeError in the first, the step before's in others."""
    keeper, learners = drifted(tiny_decoder("bloom"), random_examples(6))
    optimizer = torch.optim.AdamW(learners.values(), fused=True)
    batches = [], batched(random_examples(3)), []
    steps = [("en-de", own, 0) for own in batches]
    rest = {"en-de": learners}, steps, 3, optimizer, 1e-2
    entries = lander.training_steps(keeper.model, *rest, keeper=keeper)
    assert ["kept" in entry for entry in entries] == [False, True, False]


def test_a_step_keeps_one_batch_and_the_next_step_the_next():
    """The same twenty sentences in all steps."""
    keeper, _ = drifted(tiny_decoder("bloom"), random_examples(6), micro_tokens=20)
    size, drifts = len(keeper.batches), []
    for step in range(size + 1):
        keeper.add_gradients(step)
        drifts.append(keeper.drift)
    assert size > 2 and len(set(drifts)) == size and drifts[0] == drifts[-1]


# --------------------------------------------------------------------------------------------------
# Runs and the command line


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny BLOOM checkpoint with a tokenizer, and multi-way text in the toy languages."""
    folder = tmp_path_factory.mktemp("world")
    meanings = demo.toy_meanings(70, seed=0)
    splits = {"train": meanings[:40], "valid": meanings[40:50], "test": meanings[50:]}
    demo.write_text(folder / "data", splits)
    prompts = [data.prompt_text("qaa-qab", sentence) for sentence in demo.toy_text(meanings)["qaa"]]
    tokenizer = fuzz.tokenizer_json(prompts)
    decoder = tiny_decoder("bloom", vocabulary=len(tokenizer["model"]["vocab"]) + 20, layers=4)
    randomize(decoder).final_norm.bias.data.zero_()  # which would make it repeat one token
    save_model(decoder, folder / "weights")
    (folder / "weights" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL_RUN = """--layers 2 --lr 1e-2 --batch 8 --score-sentences 10 --eval-sentences 4
    --max-tokens 120 --score-pairs qaa-qab,qac-qab,qab-qaa --out run"""
COMMAND = [sys.executable, lander.__file__]
TRANSLATE = "--tuned run --pair qaa-qab --translate".split()
EXPORT = "--tuned run --export exported".split()


def arguments(world, words="", pair="qaa-qab"):
    """A small run on the world, and more words, which count where they repeat others."""
    places = f"--pair {pair} --weights {world}/weights --data {world}/data"
    return f"{places} {SMALL_RUN} {words}".split()


def ends_in(capsys, status, words):
    """Run the command, which must end in a status. -> its stdout and stderr"""
    capsys.readouterr()
    assert lander.main(words) == status
    return capsys.readouterr()


def error_of(capsys, words):
    """The one line of error in which a command must end, with status 2."""
    lines = ends_in(capsys, 2, words).err.splitlines()
    assert [line for line in lines if line.startswith(("error: ", "process "))] == lines[-1:]
    return lines[-1]


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def change(path, edit):
    """A file's text, its value or its tensors through a function, which deletes it with None."""
    if path.suffix == ".safetensors":
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    elif path.suffix == ".json":
        path.write_text(json.dumps(edit(json.loads(path.read_text()) if path.exists() else {})))
    elif (text := edit(path.read_text())) is None:
        path.unlink()
    else:
        path.write_text(text)


with_e = lambda text: text.replace("a", "e")
negated = lambda tensors: {name: -tensor for name, tensor in tensors.items()}
no_numbers = lambda tensors: {name: tensor * math.nan for name, tensor in tensors.items()}


def noted(name, **more):
    """While open, a function of lander notes its calls, as a mock."""
    return mock.patch.object(lander, name, wraps=getattr(lander, name), **more)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A run of all pairs with all flags that change the work, on five lines of text, one with an empty side."""
    folder = tmp_path_factory.mktemp("fünf")
    shutil.copytree(world / "data", folder / "data")
    for path in (folder / "data").glob("test.*"):
        lines = path.read_text().split("\n")[:5]
        if path.suffix == ".qab":
            lines[1] = ""
        path.write_text("\n".join(lines))
    words = f"""--weights weights --data {folder}/data --out {folder}/run --steps 13 --seed 3
        --score-pairs all --eval-pairs all --eval-sentences 0 --beams 2 --micro-tokens 300
        --checkpointing --max-tokens 0 --epsilon 0.5 --device cpu --dtype bfloat16"""
    umask = os.umask(0o027)
    with contextlib.chdir(world), open(folder / "output", "w", encoding="utf-8") as output:
        with contextlib.redirect_stdout(output), noted("Progress") as progress:
            assert lander.main(arguments(world, words, pair="all")) == 0
    os.umask(umask)
    (folder / "labels").write_text("\n".join(call.args[0] for call in progress.call_args_list))
    return folder / "run"


def test_what_a_run_shows_and_leaves(finished):
    """Minutes of silence; lines of 250 columns; results shown twice; files that nobody else may read."""
    labels = (finished.parent / "labels").read_text().splitlines()
    for what in ("layers for", "scoring", "translating", "validation loss of", "training"):
        assert any(label.startswith(what) for label in labels), what
    lines = (finished.parent / "output").read_text("utf-8").splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 60
    shown = [line for line in lines if line.startswith(("pair ", "mean")) or line.endswith("tuned")]
    assert len([line for line in shown if line.endswith("  tuned")]) == 12 and len(shown) == 14
    (losses,) = [line for line in lines if "loss of a validation token" in line]
    assert " to " in losses
    pairs = list_pairs(finished.parent / "data", "test")
    expected = {"args.json", "layers.json", "awareness.safetensors", "neurons.json", "lock"}
    expected |= {"tuned.safetensors", "log.jsonl", "results.json"}
    for name in ("before", "after", "source", "reference"):
        expected |= {f"hypotheses/{pair}.{name}.txt" for pair in pairs}
    assert contents(finished).keys() == expected
    assert {(finished / name).stat().st_mode & 0o777 for name in expected} == {0o640}
    log = log_of(finished)
    assert [entry["step"] for entry in log] == [*range(14), 13]
    assert [entry["pair"] for entry in log[1:-1]] == [*pairs, pairs[0]]
    assert all(entry["loss"] > 0 for entry in log[1:-1]), "of no limit all examples are left out"
    assert set(log[0]["valid_loss"]) == set(pairs)
    args = json.loads((finished / "args.json").read_text())
    assert (args["beams"], args["device"], args["dtype"]) == (2, "cpu", "bfloat16")


def test_the_files_of_a_run_can_be_evaluated_alone(finished):
    """Hypotheses out of order, escaped, or not line by line beside sources and references."""
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == list_pairs(finished.parent / "data", "test")
    results, files = results["qaa-qab"], {}
    for name in ("source", "reference", "before", "after"):
        files[name] = finished / f"hypotheses/qaa-qab.{name}.txt"
        assert len(files[name].read_text().split("\n")) == 5
    for name, code in (("source", "qaa"), ("reference", "qab")):
        first, second, third, *_ = (finished.parent / f"data/test.{code}").read_text().split("\n")
        assert files[name].read_text().split("\n")[:2] == [first, third]
    assert second == "", "of the pair that is left out"
    assert set(results) == {"before", "after"}
    for when in ("before", "after"):
        command = [sys.executable, "-m", "sacrebleu", files["reference"], "-i", files[when]]
        command += "-m bleu chrf -w 10 -l qaa-qab".split()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        bleu, chrf = json.loads(done.stdout)
        assert round(results[when]["bleu"], 10) == bleu["score"]
        assert round(results[when]["chrf"], 10) == chrf["score"]
        assert results[when]["bleu_signature"] == bleu["signature"] and results[when]["cut"] >= 0


def test_using_a_finished_run(finished, here, capsys):
    """A line lost or out of order, the frozen model, other beams or types than the run had; routers lost in export."""
    shutil.copytree(finished, "run")
    names = [f"run/hypotheses/qaa-qab.{name}.txt" for name in ("source", "before", "after")]
    lines, before, after = (Path(name).read_text().splitlines() for name in names)
    Path("input").write_text(f"{lines[0]}\n\n{lines[1]}\n{lines[2]}\n \n{lines[3]}")
    captured = ends_in(capsys, 0, [*TRANSLATE, "input"])
    expected = [after[0], "", after[1], after[2], "", after[3], ""]
    assert captured.out.split("\n") == expected and "not tuned" not in captured.err
    assert after != before
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # output is UTF-8 whatever the locale
    Path("headed").write_text("header\n" + Path("input").read_text())
    with open("headed", "rb", buffering=0) as source, open("output", "wb") as output:
        source.readline()  # as a script may do
        command = [*COMMAND, *TRANSLATE, "-"]
        subprocess.run(command, stdin=source, stdout=output, env=environment, check=True)
    piped = Path("output").read_text(encoding="utf-8")
    assert piped.split("\n") == expected and not piped.isascii()
    captured = ends_in(capsys, 0, [*TRANSLATE, "input", "--pair", "en-de"])
    assert len(captured.out.split("\n")) == 7 and "en-de was not tuned" in captured.err
    settings = lander.settings_of_run({"tuned": "run", "export": "exported"})
    assert (settings.beams, settings.dtype, settings.no_routing) == (2, "bfloat16", False)
    assert "its tokens are routed" in error_of(capsys, EXPORT) and not Path("exported").exists()


def full_disk(source, target):
    Path(target).write_text("half")
    raise OSError(28, "No space left on device")


FAMILIES = [("bloom", "bloom"), ("rotary", "baichuan"), ("llama", "llama"), ("qwen2", "Qwen2")]


@pytest.mark.parametrize("kind, family", FAMILIES)
def test_a_run_on_any_family_and_its_export(world, tokenizer_folders, here, capsys, kind, family):
    """A step that knows only BLOOM; neurons in other places; weights rounded, or a sister's, under the trained."""
    save_model(tiny_decoder(kind, vocabulary=520, layers=4).bfloat16(), here / "weights")
    files = {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}} if kind == "llama" else {}
    with_files(tokenizer_folders[family], here / "weights", **files)
    words = "--weights weights --max-tokens 400 --steps 4 --no-routing --eval-pairs qaa-qab,qab-qaa"
    lines = ends_in(capsys, 0, arguments(world, words)).out.splitlines()
    assert [line[:6] for line in lines if line.startswith("mean")] == ["mean, "] * 2
    log, trained = log_of("run"), load_file("run/tuned.safetensors")
    assert log[-1]["valid_loss"]["qaa-qab"] < log[0]["valid_loss"]["qaa-qab"]
    assert any("bias" in name for name in trained) == (kind in ("bloom", "llama"))
    assert lander.main(EXPORT) == 0
    exported, base = load_model("exported"), load_model("weights", dtype=torch.float32)
    layers = {name.split(".")[1] for name in trained}
    expected = {f"blocks.{i}.ffn.{name}" for i in layers for name in model.NEURON_DIMENSION}
    expected &= dict(base.named_parameters()).keys()
    assert moved_since(copies(base), exported) == expected
    tuned, tokenizer, _ = lander.load_tuned(lander.settings_of_run({"tuned": "run", "export": "x"}))
    ids = random_ids((2, 9), tokenizer.vocab_size)
    assert_close(exported(ids), tuned(ids))
    assert not torch.allclose(exported(ids), base(ids), atol=1e-3)
    for path in Path("weights").glob("token*.[jm]*"):
        assert Path("exported", path.name).read_bytes() == path.read_bytes()
    assert load_tokenizer("exported").prompt_prefix == [1] * (kind == "llama")
    assert "exported: not empty" in error_of(capsys, EXPORT)
    with mock.patch.object(shutil, "copyfile", full_disk):
        assert "No space left" in error_of(capsys, [*EXPORT, "--export", "broken"])
    assert names_in(Path("broken")) == BOTH_FILES
    if kind == "llama":
        Path("weights/tokenizer_config.json").rename("kept")
        assert "tokenizer_config.json: not the file" in error_of(capsys, [*TRANSLATE, "/dev/null"])
        Path("kept").rename("weights/tokenizer_config.json")
    change(Path("weights/model.safetensors"), negated)
    for words in ([*TRANSLATE, "/dev/null"], [*EXPORT, "--export", "another"]):
        assert "weights/model.safetensors: not the file that run was" in error_of(capsys, words)
    assert not Path("another").exists()
    if kind != "rotary":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
        assert_close(exported(ids), theirs(ids).logits)


def test_training_lowers_the_loss_with_routing_without_and_with_empty_groups(world, here):
    """A pipeline that trains nothing reports tidy tables too; no share to divide by, groups of no rows."""
    finals = []
    rows = [("--epsilon 0.8", 2), ("--epsilon 0.8 --no-routing", 0), ("--epsilon 0", 0)]
    for words, routed_layers in (*rows, ("--epsilon 1", 0)):
        assert lander.main(arguments(world, f"{words} --out run{len(finals)}")) == 0
        log, tensors = log_of(f"run{len(finals)}"), load_file(f"run{len(finals)}/tuned.safetensors")
        assert log[-1]["valid_loss"]["qaa-qab"] < log[0]["valid_loss"]["qaa-qab"] - 0.3
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        routers = [tensor for name, tensor in tensors.items() if ".router." in name]
        assert len(routers) == routed_layers
        assert all(router.abs().sum() > 0 for router in routers)
        finals.append(log[-1]["valid_loss"]["qaa-qab"])
    assert len(set(finals)) == 4


def test_bleu_tokenizer_follows_the_target():
    """13a on Chinese or Japanese counts whole sentences as words."""
    names = {"en-zh": "zh", "en-ja": "ja-mecab", "en-ko": "ko-mecab", "zh-en": "13a"}
    for pair, name in names.items():
        metric = lander.make_metrics(pair)["bleu"]
        metric.corpus_score(["这 is a 本"], [["这 is a 书"]])
        assert f"tok:{name}" in str(metric.get_signature())


def test_scoring_takes_a_sample_of_the_seed(world):
    """The first sentences of a sorted corpus are its shortest, or all of one document."""
    tokenizer, scored = load_tokenizer(world / "weights"), []
    settings = lander.Settings(pair="qaa-qab", data=f"{world}/data", score_sentences=10)
    for settings.seed in (0, 0, 1):
        inputs = lander.read_inputs(tokenizer, ["qaa-qab"], settings)
        scored.append(inputs.scoring["qaa-qab"])
    begin = [render(tokenizer, "qaa-qab", *pair) for pair in inputs.train["qaa-qab"][:10]]
    assert scored[0] == scored[1] != scored[2] and begin not in scored


def test_a_language_can_be_named(world, here, capsys, monkeypatch):
    """A file to edit for each language that the table has not; a name that is lost on the way."""
    shutil.copytree(world / "data", "data")
    for path in Path("data").glob("*.qab"):
        path.rename(path.with_suffix(".xx"))
    words = arguments(world, "--data data --score-pairs qaa-xx,xx-qaa --steps 1", pair="qaa-xx")
    assert "no language 'xx'; add --language" in error_of(capsys, words)
    prompts, prompt_text = [], data.prompt_text
    noted = lambda *rest: prompts.append(prompt_text(*rest)) or prompts[-1]
    monkeypatch.setattr(data, "prompt_text", noted)
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    assert lander.main([*words, "--language", "xx=Xish"]) == 0
    assert prompts[0].startswith("Translate this from Avari to Xish:")
    monkeypatch.setattr(data, "LANGUAGES", {"qaa": "Avari"})
    assert lander.main([*TRANSLATE, "/dev/null", "--pair", "qaa-xx"]) == 0


def test_limits_grow_with_what_a_script_takes(here, capsys):
    """Burmese takes ten of BLOOM's tokens where English takes one: skipped in training, cut in translation."""
    short, long, longest = "ab cd ef\n" * 20, "abcdefgh" * 99 + "\n", "abcdefgh" * 999 + "\n"
    write(here, train_en=short, train_de=short, train_fr=long * 19 + longest)
    write(here, test_en=short, test_de=short, test_fr=long * 20)
    prompt = len(data.prompt_text("en-fr", "ab cd ef"))
    settings = lander.Settings(data=".", pair="en-de", score_pairs="en-de,de-en")
    inputs = lander.read_inputs(Bytes, ["en-de"], settings)
    assert inputs.max_tokens == 4 * (prompt + 10) and inputs.new_tokens == {"en-de": 3, "de-en": 3}
    settings.pair = settings.score_pairs = "en-de,en-fr"
    inputs = lander.read_inputs(Bytes, ["en-de", "en-fr"], settings)
    assert inputs.new_tokens == {"en-de": 3, "en-fr": math.ceil(3 * (8 * 99 + 2) / prompt)}
    assert inputs.max_tokens == 4 * (prompt + 8 * 99 + 2) and len(inputs.scoring["en-fr"]) == 19
    assert f"skipped 1 of 20 examples, over {inputs.max_tokens} tokens" in capsys.readouterr().err
    read = partial(lander.read_inputs, Bytes, ["en-de", "en-fr"], settings)
    refused(lambda: read(longest=prompt + 5), f"longer than --max-tokens {prompt + 6}")
    settings.max_tokens = 100
    refused(read, "longer than --max-tokens 100")


# Interrupted and resumed


def interrupt(words, name="train_step", count=4, save_every=0):
    """A run that is interrupted at the nth call of a function of lander; its state is saved each step."""
    calls = [mock.DEFAULT] * (count - 1) + [KeyboardInterrupt]
    with mock.patch.object(lander, "SAVE_EVERY", save_every), noted(name, side_effect=calls):
        assert lander.main(words) == 130


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert lander.main(arguments(world, f"--out {out}")) == 0
    return out


@pytest.fixture(scope="session")
def half_done(world, tmp_path_factory):
    """The folder of a run that was interrupted in its fourth step."""
    out = tmp_path_factory.mktemp("half") / "run"
    interrupt(arguments(world, f"--out {out}"))
    return out


INTERRUPTS = [
    *[("activation_means", 1), ("neuron_awareness", 2), ("categorize", 1)],
    *[("translate_lines", 1), ("validation_loss", 1), ("train_step", 1), ("train_step", 4)],
    *[("save_state", 2), ("validation_loss", 2), ("translate_lines", 2), ("write", 4)],
]


@pytest.mark.parametrize("name, count", INTERRUPTS)
def test_a_resumed_run_ends_in_the_same_bytes(world, whole, here, capsys, name, count):
    """Batches drawn anew, moments lost, a log line twice, a half-written file taken for a whole one."""
    interrupt(arguments(world), name, count)
    assert "--resume" in capsys.readouterr().err
    assert not list(Path().rglob("*.half-written"))
    assert lander.main(arguments(world, "--resume")) == 0
    assert contents("run") == contents(whole)


def test_what_came_after_the_last_save_is_trained_again(world, whole, here):
    """A log that goes on after steps that were lost; half a step's weights; a finished run that changes."""
    words = arguments(world, "--resume")
    interrupt(words, "save_state", 1, save_every=10**6)  # at the last step: none is saved
    interrupt(words, count=4)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 4, "pair": "qaa-qab"}\n{"step":')
    for _ in range(2):
        assert lander.main(words) == 0
        assert contents("run") == contents(whole)


def test_a_run_goes_on_where_its_files_have_moved(world, whole, half_done, here):
    """Another spelling, another folder, the same fingerprints; half-written files of 6 GB that stay for ever."""
    shutil.copytree(world / "data", "text")
    shutil.copytree(half_done, "moved")
    for name in ("state.safetensors.half-written", "hypotheses/x.txt.half-written", "mine.tmp"):
        Path("moved", name).write_text("half")
    words = f"--data {here}/../{here.name}/text/ --out moved --resume"
    assert lander.main(arguments(world, words)) == 0
    found, expected = contents("moved"), contents(whole)
    assert found.pop("mine.tmp") == b"half", "which is not ours to delete"
    assert found.pop("args.json") != expected.pop("args.json")
    assert found == expected


def test_a_run_of_all_units_that_keeps_others(world, here, capsys):
    """Channels lost on resuming or exporting; a start that is where the state was saved."""
    words = "--units all --keep 0.5 --no-routing --score-pairs qaa-qab,qac-qab --max-tokens 0"
    assert lander.main(arguments(world, f"{words} --out alone")) == 0
    assert "kept: KL" in capsys.readouterr().out
    assert json.loads(Path("alone/log.jsonl").read_text().splitlines()[2])["kept"] > 0
    assert json.loads(Path("alone/neurons.json").read_text()).popitem()[1]["channels"]["qaa-qab"]
    assert json.loads(Path("alone/kept.json").read_text()).keys() == {"qac-qab"}
    for name, count in (("neuron_awareness", 3), ("train_step", 4), ("translate_lines", 3)):
        interrupt(arguments(world, words), name, count)
        assert lander.main(arguments(world, f"{words} --resume")) == 0
        assert contents("run") == contents("alone")
        shutil.rmtree("run")
    assert lander.main("--tuned alone --export exported".split()) == 0
    given = {"tuned": "alone", "export": "x"}
    tuned, _, _ = lander.load_tuned(lander.settings_of_run(given))
    ids = random_ids((2, 9), 90)
    assert_close(load_model("exported")(ids), tuned(ids))
    assert not torch.equal(tuned(ids), load_model(world / "weights")(ids))


def test_a_slow_save_makes_saves_rare(world, here, monkeypatch):
    """A minute for each save of 6 GB, every 30 s: more saving than training."""
    now, saves = [0.0], []

    def slow(seconds, calls, call, *arguments):
        calls.append(now[0])
        now[0] += seconds
        return call(*arguments)

    monkeypatch.setattr(lander.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lander, "save_state", partial(slow, 10, saves, lander.save_state))
    monkeypatch.setattr(lander, "train_step", partial(slow, 31, [], lander.train_step))
    assert lander.main(arguments(world, "--steps 12")) == 0
    assert len(saves) == 3 and saves[0] < 40 and saves[1] - saves[0] >= 200, saves


def started(words):
    """The command in a process of its own, with pipes, where Ctrl-C works: a shell's background jobs ignore it."""
    ctrl_c_works = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *words], preexec_fn=ctrl_c_works, **pipes)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_no_other_may_join(world, here, capsys, sent):
    """A signal that waits for the end of the epoch, or ends in a traceback; two processes that mix their files."""
    words = arguments(world, "--steps 100000")
    process = started(words)
    try:
        process.stdout.readline()
        for more in ([], ["--resume"]):
            error = error_of(capsys, [*words, *more])
            assert f"run: in use by process {process.pid} on " in error
        assert any("Training" in line for line in process.stdout)  # reads no further than that
        time.sleep(1)
        start = time.monotonic()
        for _ in range(3):  # as impatient people press it
            process.send_signal(sent)
            time.sleep(0.02)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert time.monotonic() - start < 5  # shared machines are slow at times
    assert "Traceback" not in err and "--steps 100000 --resume" in err


@pytest.mark.parametrize("delay", [0.2, 0.5, 1])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(delay):
    """44 lines of it, for whoever notices a typo at once."""
    process = started([])
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_traceback(closed):
    """AttributeError: NoneType has no attribute reconfigure; status 1, and nothing said."""
    command = f"exec {sys.executable} {lander.__file__} --pair en-de --weights nowhere {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


SAME_ON_RESUME = {"weights", "data", "out", "device", "resume", "translate", "tuned", "export"}
OTHER_SETTINGS = {str: "qac-qab", bool: True, int: 3, float: 0.25}  # that are no setting's default
OTHER_SETTINGS |= {"units": "all", "dtype": "bfloat16", "language": "xx=Xish"}
OTHER_SETTINGS |= dict.fromkeys(["score_pairs", "eval_pairs"], "qaa-qab,qab-qaa")


def test_resuming_with_any_other_setting_is_refused(world, half_done, here, capsys, monkeypatch):
    """Half a run with one seed and half with another; a device or type that is not what it was."""
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    shutil.copytree(half_done, "run")
    before, resume = contents("run"), arguments(world, "--resume")
    for setting in fields(lander.Settings):
        if setting.name not in SAME_ON_RESUME:
            flag = lander.flag_of(setting.name)
            value = OTHER_SETTINGS.get(setting.name) or OTHER_SETTINGS[setting.type]
            words = [flag] if value is True else [flag, str(value)]
            assert f"now {flag} {value}" in error_of(capsys, [*resume, *words])
    other_type = torch.device("cpu"), torch.bfloat16
    with mock.patch.object(lander, "choose_device", return_value=other_type):
        assert "now --dtype bfloat16" in error_of(capsys, resume)
    with mock.patch.object(torch, "__version__", "9.9"):
        assert "now --torch 9.9" in error_of(capsys, resume)
    assert "holds a run already" in error_of(capsys, arguments(world))
    assert contents("run") == before


def test_a_file_that_changes_under_a_run_is_named(world, here, capsys, monkeypatch):
    """Results of neither the old text nor the new."""
    shutil.copytree(world / "data", "data")
    changes = lambda *rest: change(Path("data/train.qaa"), with_e)
    monkeypatch.setattr(lander, "show_table", changes)  # which comes last
    captured = ends_in(capsys, 0, arguments(world, "--data data --steps 1"))
    assert "data/train.qaa changed while the run used it" in captured.err


# Several processes, another device

IMPORTABLE = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}


def torchrun(processes, words, program=lander.__file__):
    """Run lander.py, or another program, in several processes. -> exit status"""
    command = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {program}"
    return subprocess.run([sys.executable, *command.split(), *words], env=IMPORTABLE).returncode


def assert_same_result(folder, other):
    """What runs on different numbers of processes have in common."""
    ours, theirs = contents(folder), contents(other)
    for name in ours.keys() - {"args.json", "lock", "log.jsonl", "tuned.safetensors"}:
        assert ours[name] == theirs[name], name
    one, two = (load_file(run / "tuned.safetensors") for run in (folder, other))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name
    for entry, same in zip(log_of(folder), log_of(other), strict=True):
        for key in entry.keys() & {"loss", "valid_loss"}:
            assert entry[key] == pytest.approx(same[key], rel=1e-5)


@pytest.mark.parametrize(
    "processes, options",
    [(2, "--keep 0.5 --max-tokens 0"), (2, "--units all --no-routing"), (3, "--batch 2")],
)
def test_the_number_of_processes_does_not_matter(world, here, capfd, processes, options):
    """A mean of means; a share counted twice; a process without a sentence that moves other neurons."""
    words = arguments(world, f"{options} --steps 6", pair="qaa-qab,qac-qab")
    assert lander.main([*words, "--out", "alone"]) == 0
    alone = capfd.readouterr().out
    assert torchrun(processes, words) == 0
    assert_same_result(here / "alone", here / "run")
    shown = [text.split("It took")[0] for text in (alone, capfd.readouterr().out)]
    assert shown[0] == shown[1], "one process alone prints"


DIES = """
import os, signal, sys
import lander

if os.environ["RANK"] == "1":
    lander.train_step = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(lander.main())
"""


def test_a_process_that_dies_ends_all_and_another_number_goes_on(world, here, capfd):
    """The others waiting for it for half an hour; a state that belongs to a number of processes."""
    words = arguments(world, "--steps 6", pair="qaa-qab,qac-qab")
    assert lander.main([*words, "--out", "alone"]) == 0
    interrupt(words)
    capfd.readouterr()
    # SIGKILL to the second of two, in the middle of its first step.
    Path("dies.py").write_text(DIES)
    began = time.monotonic()
    assert torchrun(2, [*words, "--resume"], "dies.py") != 0
    assert time.monotonic() - began < 60
    failed = [line for line in capfd.readouterr().err.splitlines() if " failed (exitcode: " in line]
    assert len(failed) == 1 and "-9" in failed[0] and "local_rank: 1" in failed[0]
    assert torchrun(3, [*words, "--resume"]) == 0
    assert_same_result(here / "alone", here / "run")
    assert torchrun(2, words) != 0
    assert capfd.readouterr().err.count("error: run: holds a run already") == 1


ON_PRETEND = """
import sys
from study import pretend

library = pretend.register()
import pytest, torch
import lander
from test_lander import TRANSLATE, interrupt

words = sys.argv[1:]
with pretend.OnPretend():
    with pytest.raises(RuntimeError, match="is on the CPU"):
        torch.ones(2, device="pretend") + torch.ones(2)
    interrupt(words, count=3)
    assert lander.main([*words, "--resume"]) == 0
    assert lander.main([*TRANSLATE, "input", *words[:2]]) == 0
"""


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_device_that_is_not_the_cpu(world, here, dtype, tolerance):
    """A tensor left on the CPU: the first user with CUDA would be the one to find it."""
    more = f"--dtype {dtype} --beams 2 --steps 4 --eval-sentences 2"
    words = arguments(world, more, pair="qaa-qab,qac-qab")
    Path("input").write_text("\n".join((world / "data" / "test.qaa").read_text().split("\n")[:2]))
    command = [sys.executable, "-c", ON_PRETEND, "--device", "pretend", *words]
    done = subprocess.run(command, env=IMPORTABLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lander.main([*words, "--device", "cpu", "--out", "here"]) == 0
    there, losses = ([e["loss"] for e in log_of(out) if "loss" in e] for out in ("run", "here"))
    assert there == pytest.approx(losses, rel=tolerance) and len(losses) == 4


# Translations


class Bytes:
    """A tokenizer of one id a byte."""

    eos_id, end_ids, pad_id, vocab_size = 0, [0], 1, 128
    prompt_prefix, target_prefix = [], " "
    encode = staticmethod(lambda text: list(text.encode("ascii", "replace")))
    decode = staticmethod(lambda ids: bytes(ids).decode("latin-1"))


def translations(decoder, sources, new_tokens=3, **decoding):
    """What translate_lines makes of sources, with an all-byte tokenizer. -> lines, how many were cut"""
    rest = list(enumerate(sources)), lander.Settings(**decoding), "", new_tokens
    found = list(lander.translate_lines(decoder, Bytes, "en-de", *rest))
    assert [number for number, _, _ in found] == list(range(len(sources)))
    return [line for _, line, _ in found], sum(cut for _, _, cut in found)


@pytest.mark.parametrize("beams", [1, 2])
def test_translations_do_not_depend_on_their_neighbours(beams, monkeypatch, capsys):
    """Cut at a neighbour's limit; loops not counted; one line of 10,000 tokens, whose attention ends all."""
    decoder = tiny_decoder("bloom", vocabulary=128)
    sources = ["a", "", "a longer one, than the others", "two words", " ", "b" * 40, "b" * 5000]
    expected, cut = translations(decoder, sources, beams=beams)
    assert cut > 0 and expected[1] == expected[4] == expected[6] == ""
    assert max(map(len, expected)) > 64 and min(map(len, (expected[0], expected[5]))) > 0
    for cache_gb in (0, 3e-4, 1):
        assert translations(decoder, sources, cache_gb=cache_gb, beams=beams) == (expected, cut)
    for limit in ("ROWS_AT_ONCE", "LINES_AT_A_TIME"):
        monkeypatch.setattr(lander, limit, 3)
        assert translations(decoder, sources, beams=beams) == (expected, cut)
        assert "line 7" in capsys.readouterr().err
    text, settings = [(source, "x") for source in sources], lander.Settings(beams=beams)
    hypotheses, scores = lander.evaluate(decoder, Bytes, "en-de", text, settings)
    assert hypotheses == expected and scores["cut"] == cut
    alone = [translations(decoder, [source], beams=beams) for source in sources]
    assert [lines[0] for lines, _ in alone] == expected and sum(cut for _, cut in alone) == cut


def test_limits_and_groups_by_hand(monkeypatch):
    """Twice the prompt; a cache of --cache-gb for each beam, which is as often too large."""
    decoder, asked = tiny_decoder("bloom", vocabulary=128), []

    def loops(ids, mask, limits, eos_id, beams, **options):
        asked.append((len(ids), limits))
        return [[65] * (limit - ends) for limit in limits]

    ends = 0  # so many tokens before the limit
    monkeypatch.setattr(decoder, "generate", loops)
    prompt = len(data.prompt_text("en-de", "a"))
    sources = ["a", "b", "c", "d"]
    lines, cut = translations(decoder, sources)
    translations(decoder, sources, new_tokens=7)
    assert asked == [(4, [3 * prompt] * 4), (4, [7 * prompt] * 4)]
    assert cut == 4 and len(lines[0]) == 3 * prompt
    ends = 1
    assert translations(decoder, sources)[1] == 0, "none came to its limit"
    ends, decoder.config = 0, replace(decoder.config, longest=prompt + 9)
    lines, cut = translations(decoder, ["a", "b" * 11, "c"])
    assert asked[-1] == (2, [9, 9]) and cut == 2 and lines[1] == "", (
        "a window, or no positions left"
    )
    decoder.config = replace(decoder.config, longest=10**6)
    room = 2 * 4 * prompt * decoder.cache_bytes() / 1e9  # for two prompts and their translations
    for beams, sizes in [(1, [2, 2]), (2, [1, 1, 1, 1])]:
        asked.clear()
        translations(decoder, sources, beams=beams, cache_gb=room)
        assert [size for size, _ in asked] == sizes


# What a user can get wrong


@pytest.mark.parametrize("found", ["the loss is nan", "its gradient inf"])
def test_a_loss_that_is_no_number_stops_the_run(world, here, monkeypatch, capsys, found):
    """NaN weights saved over the last good state; a step by a gradient that overflows, with a finite loss."""
    monkeypatch.setattr(lander, "SAVE_EVERY", 0)
    train_step, seen = lander.train_step, []

    def poisoned(decoder, batches, optimizer, learners, keep):
        seen.append(list(learners))
        if len(seen) == 3 and "loss" in found:
            decoder.blocks[3].ffn_norm.weight.data.fill_(math.nan)
        elif len(seen) == 3:
            seen[0][0].register_hook(lambda gradient: gradient.fill_(math.inf))
        return train_step(decoder, batches, optimizer, seen[-1])

    monkeypatch.setattr(lander, "train_step", poisoned)
    line = error_of(capsys, arguments(world))
    assert "step 3" in line and "state.safetensors" in line and found in line
    assert "a lower --lr and another --out" in line, "--resume refuses another --lr"
    state = load_file("run/state.safetensors")
    assert state["step"] in (1, 2)
    assert all(tensor.isfinite().all() for tensor in (*state.values(), *seen[0]))
    assert not Path("run/tuned.safetensors").exists()


@pytest.mark.parametrize("scores, culprit", [(0.0, "all zero"), (math.nan, "not all numbers")])
def test_scores_that_say_nothing_are_an_error(world, here, monkeypatch, capsys, scores, culprit):
    """A pair whose scores in a layer are all zero becomes NaN, and owns every specific neuron."""
    awareness, last = lander.neuron_awareness, torch.tensor([1])
    spoiled = lambda *rest: awareness(*rest).index_fill(0, last, scores)
    monkeypatch.setattr(lander, "neuron_awareness", spoiled)
    line = error_of(capsys, arguments(world))
    assert "awareness for qaa-qab in layer" in line and culprit in line


def with_neurons(groups, neurons):
    """Other neurons of the first pair in the first layer."""
    specific = next(iter(groups.values()))["specific"]
    specific[next(iter(specific))] = neurons
    return groups


def with_channels_of(groups, channels):
    """Channels of the first pair in all layers; of no pair for None."""
    owned = {"qaa-qab": channels} if channels is not None else {}
    return {layer: group | {"channels": owned} for layer, group in groups.items()}


def with_a_rare_token(tokenizer):
    tokenizer["model"]["vocab"]["never"] = 5000
    return tokenizer


# What differs: the file, the change, and what the error says besides the file's name.
BAD_ON_RESUME = {
    "references": ("data/test.qab", with_e, "has changed"),
    "training sources": ("data/train.qaa", with_e, "has changed"),
    "a line less": ("data/valid.qab", lambda text: text[:-1], "has changed"),
    "a file less": ("data/valid.qaa", lambda text: None, "has changed"),
    "a sister's weights": ("weights/model.safetensors", negated, "has changed"),  # of the same size
    "the beginning of prompts": ("weights/tokenizer_config.json", dict, "has changed"),
    "more tokens than embeddings": ("weights/tokenizer.json", with_a_rare_token, "has 5001 tokens"),
    "no such pair": ("run/results.json", lambda r: {"x": r["qaa-qab"]}, "results.json: "),
    "no such time": ("run/results.json", lambda r: {"qaa-qab": {"x": 1}}, "results.json: "),
}
BAD_WHEN_FINISHED = {
    "another version": ("run/args.json", lambda args: args | {"magic": 1}, "magic"),
    "a setting less": ("run/args.json", lambda args: {"pair": "x"}, "weights"),
    "a setting of another kind": ("run/args.json", lambda args: args | {"beams": "2"}, "beams"),
    "folders": ("run/args.json", lambda args: args | {"weights": ["a"]}, "weights"),
    "a limit": ("run/args.json", lambda args: args | {"new_tokens": {"qaa-qab": []}}, ""),
    "a list": ("run/neurons.json", lambda groups: [groups], ""),
    "no such neuron": ("run/neurons.json", lambda g: with_neurons(g, [9999]), "does not fit"),
    "no such channel": ("run/neurons.json", lambda g: with_channels_of(g, [9999]), "does not fit"),
    "a truth": ("run/neurons.json", lambda g: with_channels_of(g, [True]), "does not fit"),
    "channels of another pair": (
        "run/neurons.json",
        lambda g: with_channels_of(g, None),
        "share of",
    ),
    "a neuron of text": ("run/neurons.json", lambda g: with_neurons(g, ["1"]), ""),
    "no list": ("run/neurons.json", lambda g: with_neurons(g, ""), ""),
    "a neuron twice": ("run/neurons.json", lambda g: with_neurons(g, [1, 1]), "two owners"),
    "no such layer": ("run/neurons.json", lambda g: {"77": g.popitem()[1]}, "layer 77"),
    "a tensor less": ("run/tuned.safetensors", lambda t: t.popitem() and t, "does not fit"),
    "no tensors": ("run/tuned.safetensors", lambda t: {}, "does not fit"),
    "no numbers": ("run/tuned.safetensors", no_numbers, "not all numbers"),
}


@pytest.mark.parametrize("case", [*BAD_ON_RESUME, *BAD_WHEN_FINISHED])
def test_a_file_that_does_not_fit_is_named(world, half_done, whole, here, capsys, case):
    """Old hypotheses scored against new references; another model; a traceback, even at the very end."""
    path, edit, culprit = (BAD_ON_RESUME | BAD_WHEN_FINISHED)[case]
    resumed, words = half_done, arguments(world, "--resume")
    if case in BAD_WHEN_FINISHED:
        resumed, words = whole, [*TRANSLATE, "/dev/null"]
    shutil.copytree(resumed, "run")
    place, _, name = path.partition("/")
    if place != "run":
        shutil.copytree(world / place, place)
        words += [f"--{place}", place]
    change(Path(path), edit)
    before = contents("run")
    error = error_of(capsys, words)
    assert name in error and culprit in error
    assert contents("run") == before


BAD_COMMANDS = [
    ("--pair qaa-xx", "'xx'"),
    ("--pair=", "expected two language codes"),
    ("--pair qaa-qab,qaa-qab", "twice"),
    ("--pair en-de", "no train text for en-de"),
    ("--data nowhere", "nowhere"),
    ("--data=", "--data"),
    ("--data empty", "the train text of qaa-qab is empty"),
    ("--weights nowhere", "nowhere"),
    ("--score-pairs qaa-qab", "one pair only"),
    ("--pair qaa-qab,qab-qaa --score-pairs qaa-qab --keep 1", "--keep"),
    ("--max-tokens 9", "longer than --max-tokens 9"),
    ("--layers 4", "4 layers to select, but only 3"),
    ("--layers 0", "--layers is 0"),
    ("--epsilon 1.5", "--epsilon is 1.5"),
    ("--lr -1", "--lr is -1.0"),
    ("--lr fast", "'fast'"),
    ("--lr nan", "--lr is nan"),
    ("--fast", "--fast"),
    ("--step 3", "--step"),
    ("--device abacus", "abacus"),
    ("--dtype int4", "int4"),
    ("--eval-pairs en-de", "no test text for en-de"),
    ("--translate -", "--tuned"),
    ("--export x", "--tuned"),
    ("--beams 999999", "--beams is 999999"),
    ("--out a\0b", "--out has a NUL"),
    ("--steps 1" + "0" * 30, "--steps is 1000"),
    ("--device meta", "--device meta"),
    ("--out file/run", "file"),
]
BAD_WITH_TUNED = [
    ("--tuned nowhere --translate -", "nowhere"),
    ("--tuned nowhere", "--translate"),
    ("--tuned nowhere --translate - --export x", "--translate"),
    ("--tuned nowhere --export x --steps 3", "--steps has no effect with --tuned"),
    ("--tuned nowhere --export x --beams 3", "--beams has no effect with --tuned and --export"),
    ("--tuned nowhere --translate - --no-routing", "--no-routing has no effect"),
]


@pytest.mark.parametrize("words, culprit", [*BAD_COMMANDS, *BAD_WITH_TUNED])
def test_a_bad_command_ends_in_one_line(world, here, monkeypatch, capsys, words, culprit):
    """A traceback; an error after an hour; a folder made for nothing; an option that does nothing."""
    monkeypatch.setattr(lander, "load_model", None)  # all of it shows before that
    Path("file").write_text("")
    Path("empty").mkdir()
    empty = dict(train_qaa="", train_qab="", train_qac="")
    write(here / "empty", **empty, test_qaa="a\n", test_qab="b\n", test_qac="c\n")
    alone = words.startswith("--tuned")
    captured = ends_in(capsys, 2, words.split() if alone else arguments(world, words))
    assert len(captured.err.splitlines()) == 1 and culprit in captured.err, captured.err
    assert captured.out == "" and not Path("run").exists()


def test_an_option_given_counts_as_given(monkeypatch, here):
    """The demo's own defaults won over --layers 4, since 4 is the general default."""
    chosen = []
    monkeypatch.setattr(demo, "build", lambda folder: None)
    monkeypatch.setattr(lander, "run", lambda settings: chosen.append(settings) or {})
    for words in (["--layers", "4"], []):
        assert lander.main(words) == 0
    assert [settings.layers for settings in chosen] == [4, demo.SETTINGS["layers"]]


# --------------------------------------------------------------------------------------------------
# The decoder against independent implementations


def reference(kind, **options):
    """A small model of transformers, of LLAMA_LIKE's sizes, with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=90, hidden_size=48, n_layer=3, n_head=4, n_positions=64)
    sizes = sizes if kind in ("bloom", "gpt2") else LLAMA_LIKE
    config = transformers.AutoConfig.for_model(kind, **sizes | options)
    return randomize(transformers.AutoModelForCausalLM.from_config(config))


def load_reference(folder):
    """A published folder as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rewrite(path, edit):
    """Its tensors through a function, {name: tensor} -> {name: tensor}."""
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(stored), path)


def edit_config(folder, **changes):
    """Change keys of a config.json; "gone" removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    left = {key: value for key, value in config.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(left))


def write_published(folder, model, config={}, tensors=dict, **options):
    """What transformers writes; then keys of config.json changed, and the tensors."""
    model.save_pretrained(folder, **options)
    edit_config(folder, **config)
    for path in folder.glob("*.safetensors"):
        rewrite(path, tensors)


def with_masks(tensors):
    """As GPT-2 was published: without a prefix, with buffers that are no weights."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    return bare(tensors) | masks


def packed(tensors):
    """LLaMA's tensors as Baichuan's, and one that is dropped on purpose."""
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn."
        rows = [tensors.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        tensors[f"{attention}W_pack.weight"] = torch.cat(rows)
        tensors[f"{attention}rotary_emb.inv_freq"] = torch.ones(4)
    return tensors | {"model.rotary_emb.inv_freq": torch.ones(4)}


bare = lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()}
# How BLOOM was published, by its number of heads; n_embed wins.
FOUR = dict(n_embed=48, hidden_size=7, n_head="gone", n_inner=None, num_attention_heads=4)
SIX = FOUR | {"num_attention_heads": 6}
AFTER_NORM = {"apply_residual_connection_post_layernorm": True}
TIED = {"tie_word_embeddings": True}
# Rotary positions as transformers 5 spells them, and as it was before.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
LLAMA3 = {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}}
OLD_PLAIN = dict(rope_parameters="gone", rope_theta=1e6, rope_scaling=None)
OLD_LINEAR = dict(rope_parameters="gone", rope_scaling={"type": "linear", "factor": 4.0})
OLD_LLAMA3 = dict(rope_parameters="gone", rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
# What transformers takes for keys that are not there; and the options that those stand for.
LEFT_OUT = (
    "num_key_value_heads rms_norm_eps attention_bias mlp_bias head_dim rope_parameters layer_types"
    " sliding_window use_sliding_window tie_word_embeddings max_position_embeddings"
)
ABSENT = dict.fromkeys(LEFT_OUT.split(), "gone")
MISTRAL = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}
QWEN2 = {"num_attention_heads": 64, "num_key_value_heads": 32, "hidden_size": 128}
QWEN3 = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}

# What a reader or a loader gets wrong at first: kind, options of transformers' config, and how the
# files are written.
BIASED = dict(attention_bias=True, mlp_bias=True, head_dim=10, num_key_value_heads=2)
CASES = {
    "bloom": ("bloom", {}, dict(config=FOUR, tensors=bare)),
    "6 heads, shards": ("bloom", {"n_head": 6}, dict(config=SIX, max_shard_size="60KB")),
    "12 heads, saved again": ("bloom", {"n_head": 12}, {}),
    "16 bits": ("bloom", {"n_head": 6, "dtype": torch.float16}, dict(config=SIX, tensors=bare)),
    "residual after the norm": ("bloom", AFTER_NORM, dict(config=FOUR, tensors=bare)),
    "baichuan": ("llama", {}, dict(config={"model_type": "baichuan"}, tensors=packed)),
    "2 heads of keys, shards": ("llama", {"num_key_value_heads": 2}, {"max_shard_size": "60KB"}),
    "1, the head tied": ("llama", {"num_key_value_heads": 1} | TIED, {}),
    "biases, heads of another size": ("llama", BIASED, {}),
    "another base, old spelling": ("llama", PLAIN, {"config": OLD_PLAIN}),
    "linear scaling": ("llama", LINEAR, {}),
    "linear scaling, old spelling": ("llama", LINEAR, {"config": OLD_LINEAR}),
    "llama3 scaling": ("llama", LLAMA3, {}),
    "llama3 scaling, old spelling": ("llama", LLAMA3, {"config": OLD_LLAMA3}),
    "llama, absent keys": ("llama", {}, {"config": ABSENT}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, {}),
    "mistral, absent keys": ("mistral", MISTRAL, {"config": ABSENT}),
    "qwen2": ("qwen2", PLAIN | {"num_key_value_heads": 4} | TIED, {}),
    "qwen2, absent keys": ("qwen2", QWEN2, {"config": ABSENT}),
    "qwen3": ("qwen3", PLAIN | {"num_key_value_heads": 2, "head_dim": 10}, {}),
    "qwen3, biases, tied": ("qwen3", {"attention_bias": True} | TIED, {}),
    "qwen3, absent keys": ("qwen3", QWEN3, {"config": ABSENT}),
    "gpt2": ("gpt2", {}, {"tensors": with_masks}),
    "gpt2, saved again": ("gpt2", {"n_inner": 100, "tie_word_embeddings": False}, {}),
}


def assert_same(ours, theirs):
    """The same logits with padding on either side."""
    for side in ("left", "right"):
        ids, mask = padded_ids(90, side, lengths=(40, 7, 25))
        options = {"attention_mask": mask.long()}
        if theirs.config.model_type == "gpt2":  # which counts padding, unless it is told
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        assert_close(ours(ids, mask), theirs(ids, **options).logits, mask)


def up_to_end(row, eos_ids):
    return list(itertools.takewhile(lambda token: token not in eos_ids, row))


def generated(theirs, ids, mask, limit, eos_ids, beams):
    """Rows of new ids, up to their ends, as transformers generates them."""
    options = dict(num_beams=beams, length_penalty=1.0, early_stopping=False, do_sample=False)
    options |= dict(max_new_tokens=limit, pad_token_id=0, eos_token_id=eos_ids or None)
    rows = theirs.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]
    return [up_to_end(row, eos_ids) for row in rows.tolist()]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_new_ids_equal_transformers(tmp_path, case):
    """A slope, norm, interleaving, rotation, group, default or scaling of another model loads."""
    kind, options, files = CASES[case]
    theirs = reference(kind, **options)
    write_published(tmp_path, theirs, **files)
    theirs = theirs.float()  # with the file's rounding
    ours = load_model(tmp_path, dtype=torch.float32)
    assert_same(ours, theirs)
    ids, mask = padded_ids(90, "left")
    for beams in (1, 3):
        expected = generated(theirs, ids, mask, 20, [89], beams)
        assert ours.generate(ids, mask, 20, eos_id=89, beams=beams) == expected
    save_model(ours, tmp_path / "copy")
    if case != "baichuan":  # of which transformers has no class
        assert torch.equal(load_reference(tmp_path / "copy")(ids).logits, theirs(ids).logits)


def test_baichuan_13b_equals_llama_with_alibi(tmp_path):
    """No class is published: LLaMA without angles, distances in its mask, unit rows in its head."""
    theirs = reference("llama", num_attention_heads=6, num_key_value_heads=6)
    stored = theirs.lm_head.weight.detach().clone()
    config = {"model_type": "baichuan", "normalize_head": True, "positions": "alibi"}
    write_published(tmp_path, theirs, config=config, tensors=packed)
    theirs.lm_head.weight.data = functional.normalize(stored)
    theirs.model.rotary_emb.inv_freq.zero_()
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    distance = torch.arange(40)[:, None] - torch.arange(40)
    bias = torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)[None]
    ids, _ = padded_ids(90, "left", lengths=(40, 40))
    ours = load_model(tmp_path)
    assert_close(ours(ids), theirs(ids, attention_mask=bias).logits)
    assert torch.equal(ours.head.weight, stored)


def test_baichuan_variants_are_told_apart(capsys):
    """v1 read as v2, or 13B as 7B: no shape would tell. What no key says is guessed aloud."""
    v1, v2, length = {"vocab_size": 64000}, {"vocab_size": 125696}, "max_position_embeddings"
    said = {"positions": "rotary", "normalize_head": False}
    for changes, positions, head, version in [
        (v1 | {length: 4096}, "rotary", "plain", 1),
        (v1 | {"model_max_length": 4096}, "alibi", "plain", 1),
        (v2 | {length: 4096, "model_max_length": 9}, "rotary", "normalized", 2),
        (v2 | {"model_max_length": 4096}, "alibi", "normalized", 2),
        (v2 | said, "rotary", "plain", None),
        ({"z_loss_weight": 0}, "alibi", "normalized", None),
        ({"normalize_head": True}, "alibi", "normalized", None),
    ]:
        config = Config.from_json(BAICHUAN | changes)
        assert (config.positions, config.head, config.max_length) == (positions, head, 4096)
        lines = capsys.readouterr().err.splitlines()
        assert [f"Baichuan {version} " in line for line in lines] == [True] * bool(version)


def test_longer_input_than_the_window_or_positions_is_refused():
    """Attention to all, where a window is; an error where positions end; a window switched off."""
    windowed, usual = {"sliding_window": 12, "use_sliding_window": True}, 2**24 - 1
    for kind, changes, longest in [
        ("mistral", {"sliding_window": 12}, 12),
        ("qwen2", windowed, 12),
        ("qwen3", windowed, 12),
        ("gpt2", {"n_positions": 12}, 12),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, usual),
        ("qwen2", {"sliding_window": 9}, usual),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": False}, usual),
        ("llama", {"sliding_window": 9}, usual),
    ]:
        config = Config.from_json(LLAMA_LIKE | {"model_type": kind} | changes)
        assert config.longest == longest
        if longest > 12:
            continue
        decoder = randomize(Decoder(config))
        assert decoder(torch.full((1, 12), 5)).isfinite().all()
        refused(lambda: decoder(torch.full((1, 13), 5)), "13 tokens", "sliding_window")
        refused(lambda: decoder.generate(torch.full((1, 13), 5), None, 9, 2), "13 tokens")
        ids, mask = padded_ids(90, "left", lengths=(12, 4, 11))
        for beams in (1, 2):
            new = decoder.generate(ids, mask, 9, eos_id=[], beams=beams)
            assert [len(row) for row in new] == [0, 8, 1]
            for prompt, row in zip(unpadded(ids, mask), new):
                assert decoder.generate(torch.tensor([prompt]), None, 9, [], beams) == [row]


def test_what_16_bits_would_round_is_computed_in_fp32():
    """ALiBi as slope * position is off by several at 2048 tokens; RMS norms cast, then multiply."""
    bias = model.attention_bias(tiny_config("bloom"), None, 1, 2048, "cpu", torch.bfloat16)
    near = torch.arange(15, -1, -1.0)
    assert torch.equal(bias[0, :, 0, -16:].float(), -model.alibi_slopes(4)[:, None] * near)
    norm, generator = model.RMSNorm(64, eps=1e-6), torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(64, generator=generator)
    norm, x = norm.bfloat16(), torch.randn(50, 64, generator=generator).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).bfloat16())


# --------------------------------------------------------------------------------------------------
# Padding and generation


def unpadded(ids, mask):
    """The prompts of a padded batch, as lists."""
    return [row[real].tolist() for row, real in zip(ids, mask)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, side):
    """Positions counted from the padding, padding attended to, NaN of an empty softmax."""
    decoder = tiny_decoder(kind)
    ids, mask = padded_ids(90, side)
    logits = decoder(ids, mask)
    for b, prompt in enumerate(unpadded(ids, mask)):
        assert_close(logits[b][mask[b]], decoder(torch.tensor([prompt]))[0])
    bias = model.attention_bias(decoder.config, mask, 11, 11, "cpu", torch.float32)
    seen, real = bias[:, 0].isfinite(), mask[:, :, None]
    assert seen.any(-1).all(), "a query that sees nothing is NaN on some devices"
    assert torch.equal(seen & real, torch.ones(11, 11).tril().bool() & mask[:, None] & real)


@pytest.fixture
def nan_in_new_memory():
    """torch.empty returns NaN, so that reading memory before writing it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def recomputed_greedy(decoder, ids, max_new_tokens, eos_id, vocab_size=None, texts=None):
    """The four lines; given texts, a line break after a visible character ends it."""
    new = []
    while len(new) < max_new_tokens:
        token = int(decoder(torch.tensor([ids + new]))[0, -1, :vocab_size].argmax())
        if token == eos_id:
            break
        new.append(token)
        if texts and "\n" in "".join(texts[token] for token in new).lstrip():
            break
    return new


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_greedy_equals_recomputation(kind, side, nan_in_new_memory, monkeypatch):
    """A key at the wrong place, a row mixed up when a sentence leaves, memory never written."""
    monkeypatch.setattr(model, "PROMPTS_AT_ONCE", 3)
    monkeypatch.setattr(model, "ROOM", 4)
    decoder = tiny_decoder(kind, vocabulary=12)
    ids, mask = padded_ids(12, side, lengths=(7, 13, 5, 9, 10, 6, 11, 4))
    endless = [recomputed_greedy(decoder, row, 15, eos_id=None) for row in unpadded(ids, mask)]
    ends = {token: {(*row, token).index(token) for row in endless} for token in range(12)}
    eos_id = max(ends, key=lambda token: len(ends[token]))
    assert len(ends[eos_id]) > 1, "sentences must end at different steps to test anything"
    expected = [up_to_end(row, [eos_id]) for row in endless]
    assert decoder.generate(ids, mask, 15, eos_id) == expected
    assert decoder.generate(ids, mask, 15, eos_id=(12, eos_id), beams=1) == expected
    assert decoder.generate(ids, mask, 15, eos_id=[]) == endless
    assert decoder.generate(ids, mask, 0, eos_id) == [[]] * 8
    assert decoder.generate(ids[:0], mask[:0], 5, eos_id) == []
    all_real = decoder.generate(ids, torch.ones_like(mask), 5, eos_id)
    assert decoder.generate(ids, None, 5, eos_id) == all_real
    cache = model.Cache.empty(decoder.bfloat16(), rows=3, tokens=7)
    assert sum(store.nbytes for store in cache.stores) == 3 * 7 * decoder.cache_bytes()


class Texts(tuple):
    """A tokenizer whose tokens say these texts; </s> is number 2."""

    vocab_size = property(len)
    decode = lambda self, ids: "".join(self[id] for id in ids)


TWELVE = Texts(["a", "b", "</s>", "c", "\n", " \n ", "d\n", " ", "e\ne", "f", "g ", " h"])
FIVE = Texts(["a", "\n", "</s>", "b\n", " "])


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_break_ends_a_translation(kind, nan_in_new_memory):
    """A line too many, a neighbour's limit; a break before the first word; ids without a token."""
    ends, ended, skipped, beyond = data.line_ends(TWELVE), 0, 0, 0
    ids, mask = padded_ids(12, "left", lengths=(5, 11, 3, 7, 8))
    limits = [9, 4, 1, 14, 12]
    for seed, vocabulary in enumerate([12] * 12 + [15] * 4):
        decoder = tiny_decoder(kind, seed, vocabulary)
        beyond += max(map(max, decoder.generate(ids, mask, limits, eos_id=[]))) >= 12
        new = decoder.generate(ids, mask, limits, eos_id=2, vocab_size=12, line_ends=ends)
        for prompt, limit, row in zip(unpadded(ids, mask), limits, new):
            assert row == recomputed_greedy(decoder, prompt, limit, 2, 12, TWELVE)
            text = TWELVE.decode(row)
            ended += "\n" in text.lstrip()
            skipped += "\n" in text[: len(text) - len(text.lstrip())] and text.lstrip() != ""
    assert ended > 5 and skipped > 1 and beyond, "nothing ended at a line break: nothing was tested"


@pytest.mark.parametrize("kind", PUBLISHED_KINDS)
def test_beam_search_equals_transformers(kind, tmp_path, nan_in_new_memory):
    """A beam without its cache, a hypothesis lost, a length miscounted, a stop too early."""
    rng, ended, not_greedy = random.Random(0), 0, 0
    ids, mask = padded_ids(12, "left", lengths=(5, 11, 3, 7, 8))
    for seed in range(10):
        decoder = tiny_decoder(kind, seed, vocabulary=12)
        save_model(decoder, tmp_path)
        theirs = load_reference(tmp_path)
        for beams in rng.sample(range(2, 9), 3):
            limit, eos_ids = rng.choice([1, 2, 5, 24]), rng.choice([[2], [1, 2, 4, 7], []])
            expected = generated(theirs, ids, mask, limit, eos_ids, beams)
            assert decoder.generate(ids, mask, limit, eos_ids, beams=beams) == expected
            ended += sum(len(row) < limit for row in expected)
            not_greedy += expected != decoder.generate(ids, mask, limit, eos_ids)
    assert ended > 20 and not_greedy > 5, "too easy to test anything"


def continuations(limit, lines):
    """All up to their </s>, or if lines end them, to a line break after a visible character."""
    for new in itertools.product(range(5), repeat=limit):
        for length in range(1, limit + 1):
            text = FIVE.decode([token for token in new[:length] if token != 2])
            if new[length - 1] == 2 or (lines and "\n" in text.lstrip()):
                break
        yield new[:length]


@torch.no_grad()
def score(decoder, prompt, new):
    """Log-probability a token of a continuation, its end counted, of the tokenizer's tokens."""
    logits = decoder(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1, :5]
    return float(logits.double().log_softmax(-1)[range(len(new)), list(new)].mean())


@pytest.mark.parametrize("lines", [False, True])
def test_beams_wide_enough_find_the_best_of_all(lines):
    """Beams ranked by a second line; a finished one lost; a neighbour's limit; unknown ids."""
    ends, not_greedy = data.line_ends(FIVE) if lines else None, 0
    ids, mask = padded_ids(5, "left", lengths=(3, 1, 4))
    limits = [3, 2, 3]
    everything = {limit: {*continuations(limit, lines)} for limit in limits}
    for seed in range(8):
        decoder = tiny_decoder("alibi", seed, vocabulary=7)
        generate = partial(decoder.generate, ids, mask, limits, 2, vocab_size=5, line_ends=ends)
        found = generate(beams=125)
        for prompt, limit, new in zip(unpadded(ids, mask), limits, found):
            best = max(everything[limit], key=partial(score, decoder, prompt))
            assert new == [token for token in best if token != 2]
        not_greedy += found != generate(beams=1)
    assert not_greedy, "greedy finds them all: the toy model is too easy to test anything"


# --------------------------------------------------------------------------------------------------
# Reading and writing checkpoints

BOTH_FILES = ["config.json", "model.safetensors"]
INDEX = "model.safetensors.index.json"
BLOOM_CONFIG = dict(model_type="bloom", vocab_size=90, n_embed=32, n_layer=2, n_head=4)
GPT2_CONFIG = dict(model_type="gpt2", vocab_size=90, n_embd=32, n_layer=2, n_head=4)
LLAMA_CONFIG = LLAMA_LIKE | {"model_type": "llama"}
BAICHUAN_CONFIG = BAICHUAN | {"model_max_length": 64}
names_in = lambda folder: sorted(path.name for path in folder.iterdir())
renamed = lambda change: lambda tensors: {change(name): t for name, t in tensors.items()}


def same_weights(ours, theirs):
    return all(torch.equal(p, theirs.get_parameter(n)) for n, p in ours.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_as_the_same_bits(tmp_path, kind):
    """Weights that are not copied lie in the mapped file: training must not write through it."""
    decoder = tiny_decoder(kind).half()
    save_model(decoder, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = load_model(tmp_path)
    assert again.config.published["dtype"] == again.config.published["torch_dtype"] == "float16"
    assert {p.dtype for p in again.parameters()} == {torch.float16}, "a cast doubles the memory"
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert same_weights(decoder, again) and names_in(tmp_path) == BOTH_FILES
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped there")
def test_a_large_weight_that_is_dropped_leaves_memory(tmp_path):
    """One file open for all keeps every page that was read: regrouped layers count twice."""
    large = BLOOM_CONFIG | {"n_embed": 528}  # FFN weights have over 2**20 numbers
    save_model(Decoder(Config.from_json(large)), tmp_path)
    mapped = lambda: Path("/proc/self/maps").read_text().count(str(tmp_path))
    model = load_model(tmp_path)
    assert mapped() == 4 + 1  # all small ones share one
    model.blocks[0].ffn = None
    assert mapped() == 2 + 1


def test_saving_is_atomic(tmp_path, monkeypatch):
    """An interrupted save must leave the old file whole, and no debris."""
    save_model(tiny_decoder("bloom", seed=1), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_decoder("bloom", seed=2), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert names_in(tmp_path) == BOTH_FILES


def misfit(tensors):
    del tensors["h.1.mlp.dense_h_to_4h.bias"], tensors["ln_f.weight"]
    tensors["h.0.input_layernorm.weight"] = torch.ones(31)
    tensors["h.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.int8)
    others = ("h.2.input_layernorm.weight", "transformer.ln_f.bias")
    return tensors | {name: torch.ones(32) for name in others}


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path):
    """A loader that skips what it does not know leaves random weights in the model."""
    save_model(tiny_decoder("bloom"), tmp_path)
    rewrite(tmp_path / "model.safetensors", misfit)
    text = refused(lambda: load_model(tmp_path), str(tmp_path))
    missing, unexpected, misshapen = text.split("; ")[1:]
    assert missing == "2 missing: h.1.mlp.dense_h_to_4h.bias, ln_f.weight"
    assert "h.2.input_layernorm.weight" in unexpected and "ln_f.bias (twice)" in unexpected
    assert "h.0.input_layernorm.weight torch.float32 [31]" in misshapen
    assert "h.1.input_layernorm.weight torch.int8" in misshapen
    rewrite(tmp_path / "model.safetensors", renamed(lambda name: f"x.{name}"))
    text = refused(lambda: load_model(tmp_path), "29 missing", "29 unexpected: x.", ", ...")
    assert len(text) < 1000, "26,000 characters for a model of 7B"


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_names_are_recognized(tmp_path, kind):
    """Of torch.compile, DistributedDataParallel or FSDP, or of the model below the head alone."""
    decoder = tiny_decoder(kind)
    prefix = model.FAMILIES[decoder.config.family].prefix
    for change in (
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("0.", "0._fsdp_wrapped_module."),
        lambda name: name.removeprefix(prefix),
        lambda name: name if name.startswith((prefix, "lm_head")) else prefix + name,
    ):
        save_model(decoder, tmp_path)
        rewrite(tmp_path / "model.safetensors", renamed(change))
        assert same_weights(decoder, load_model(tmp_path))


@pytest.mark.parametrize("kind", ["bloom", "qwen2", "gpt2"])
def test_a_stored_head_that_is_not_the_tied_embedding_is_used(tmp_path, kind, capsys):
    """Dropped unread, as a tied head's copy may be, it gives other logits (merged, tuned)."""
    decoder = tiny_decoder(kind)
    for change in (0, 1):
        save_model(decoder, tmp_path)
        head = {"lm_head.weight": decoder.embedding.weight.detach() + change}
        rewrite(tmp_path / "model.safetensors", lambda tensors: tensors | head)
        theirs, ours = load_reference(tmp_path), load_model(tmp_path)
        assert_same(ours, theirs)
        assert ours.config.head == ("plain" if change else "tied")
        # Before transformers 5 this key decided alone.
        assert ours.config.published.get("tie_word_embeddings", True) != bool(change)
        assert ("lm_head.weight" in capsys.readouterr().err.split("\r")[-1]) == bool(change)
        save_model(ours, tmp_path / "copy")
        assert_same(load_model(tmp_path / "copy"), theirs)
        assert_same(ours, load_reference(tmp_path / "copy"))
    save_model(decoder, tmp_path)
    (embedding,) = model.published_names(decoder.config.family, "embedding.weight")
    as_head = lambda name: "lm_head.weight" if name == embedding else name
    rewrite(tmp_path / "model.safetensors", renamed(as_head))  # of two names for one, the first
    assert_same(load_model(tmp_path), load_reference(tmp_path))
    edit_config(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path / "model.safetensors", renamed(lambda name: name.replace("lm_head", "head")))
    refused(lambda: load_model(tmp_path), "missing: ", "lm_head.weight")


# Keys of a config.json each of which, with this value, is another function: "key is value".
OTHER_VALUES = [
    (BLOOM_CONFIG, dict(quantization_config={}, hidden_act="relu", tie_word_embeddings="no")),
    (BLOOM_CONFIG, dict(rope_scaling={"type": "yarn"}, model_type=["bloom"])),
    # positions "Rotary" was accepted, and then there were no positions at all.
    (BAICHUAN_CONFIG, dict(positions="Rotary", normalize_head=1, tie_word_embeddings=True)),
    (GPT2_CONFIG, dict(activation_function="gelu", scale_attn_weights=False)),
    (GPT2_CONFIG, dict(scale_attn_by_inverse_layer_idx=True, add_cross_attention=True)),
    (LLAMA_CONFIG, dict(partial_rotary_factor=0.5, clip_qkv=8.0, logits_scaling=16.0)),
    (LLAMA_CONFIG, dict(attn_logit_softcapping=50.0, use_bidirectional_attention=True)),
    (LLAMA_CONFIG, dict(hidden_act="gelu", attention_bias=None, quantization_config={})),
    (LLAMA_CONFIG, dict(model_type="mixtral", is_causal=False)),
]
OTHER_CONFIGS = [
    (BLOOM_CONFIG, {"model_type": "gpt9"}, ["'gpt9'", "bloom, baichuan"]),
    (BLOOM_CONFIG, {"n_head": None}, ["num_attention_heads"]),
    (BLOOM_CONFIG, {"n_head": 5}, ["32", "5 heads"]),
    (BLOOM_CONFIG, {"n_layer": "2"}, ["layers is '2'"]),
    (BLOOM_CONFIG, {"n_embed": 10**30}, ["hidden_size is 1000"]),
    (BLOOM_CONFIG, {"layer_norm_epsilon": "x"}, []),
    (BLOOM_CONFIG, {"layer_norm_epsilon": 1.5}, ["norm_eps is 1.5"]),
    (LLAMA_CONFIG, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary"]),
    (LLAMA_CONFIG, {"rope_parameters": {"full_attention": {}}}, ["full_attention"]),
    (LLAMA_CONFIG, {"layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
    (LLAMA_CONFIG, {"rope_scaling": {"type": "linear"}}, ["factor"]),
    (LLAMA_CONFIG, {"rope_scaling": {"type": "linear", "factor": 0}}, ["'factor': 0"]),
    (LLAMA_CONFIG, {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, ["low_freq"]),
    (LLAMA_CONFIG, {"rope_scaling": "linear"}, []),
    (LLAMA_CONFIG, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["'yarn'"]),
    *[(LLAMA_CONFIG, {"rope_parameters": {"rope_type": k}}, [k]) for k in ("dynamic", "longrope")],
    (LLAMA_CONFIG, {"rope_theta": "large"}, ["'large'"]),
    (LLAMA_CONFIG, {"num_key_value_heads": 3}, ["8 heads do not divide into 3"]),
    (LLAMA_CONFIG, {"head_dim": 5}, ["heads of 5 numbers"]),
    (LLAMA_CONFIG, {"model_type": "mistral", "sliding_window": "all"}, ["'all'"]),
]
for config, changes in OTHER_VALUES:
    for key, value in changes.items():
        OTHER_CONFIGS.append((config, {key: value}, [f"{key} is {value!r}"]))


@pytest.mark.parametrize("config, changes, culprits", OTHER_CONFIGS)
def test_what_a_config_asks_for_is_done_or_refused_by_name(config, changes, culprits):
    """Loaded all the same, it would compute another function."""
    harmless = {"attention_dropout": 0.1, "logits_scaling": 1.0, "clip_qkv": None}
    Config.from_json(config | harmless | {"rope_parameters": {"partial_rotary_factor": 1.0}})
    refused(lambda: Config.from_json(config | changes), "config.json", *culprits)


def shard(name):
    index = {"weight_map": {"ln_f.weight": name}}
    return {"model.safetensors": None, INDEX: json.dumps(index)}


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MANY_LAYERS = json.dumps(BLOOM_CONFIG | {"n_layer": 10**6})
ADAPTER = '{"base_model_name_or_path": "haoranxu/ALMA-7B-Pretrain"}'
# Other contents of files, None for no file, -100 for as many bytes less; and what is said.
DAMAGED = [
    ({"config.json": None}, ["config.json: cannot be read"]),
    ({"config.json": None, "adapter_config.json": ADAPTER}, ["of haoranxu/ALMA-7B-P", "merge"]),
    ({"config.json": MANY_LAYERS}, ["1000000 layers", "29 te"]),
    ({"config.json": '{"a": NaN}'}, ["config.json", "NaN"]),
    *[({"config.json": text}, ["config.json"]) for text in ("{", "[]", "[" * 100000)],
    ({"model.safetensors": None}, ["no model.safetensors"]),
    ({"model.safetensors": LFS_POINTER}, ["Git LFS"]),
    *[({"model.safetensors": text}, ["model.safetensors"]) for text in ("", "x" * 1000, -100)],
    *[(shard(name), [INDEX, repr(name)]) for name in ("../else.safetensors", "/etc/passwd", "")],
    *[(shard(name), [INDEX]) for name in (7, "\ud800.safetensors")],  # half a character
    (shard("gone.safetensors"), ["gone.safetensors"]),
]


@pytest.mark.parametrize("files, culprits", DAMAGED)
def test_a_damaged_checkpoint_ends_in_one_line(tmp_path, files, culprits):
    """A traceback; a file outside the folder; cannot be read, for an adapter or a hub's name."""
    folder = tmp_path / "folder"
    save_model(tiny_decoder("bloom"), folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "else.safetensors")
    edit_config(folder, note="😀")  # a pair of surrogates in the file
    load_model(folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        elif content == -100:
            os.truncate(folder / name, (folder / name).stat().st_size - 100)
        else:
            (folder / name).write_text(content)
    refused(lambda: load_model(folder), str(folder), *culprits)
    name = "bigscience/bloom-560m"
    refused(lambda: load_model(name), f"hf download {name} --local-dir bloom-560m")


def run_convert(folder, **options):
    command = [sys.executable, Path(model.__file__), "convert", folder]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_bin_shards_convert_to_the_same_tensors(tmp_path):
    """safetensors refuses what overlaps, and a tied head; ASCII cannot print the name of a file."""
    save_model(tiny_decoder("rotary"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    whole = torch.arange(6.0)
    views = {"a": whole[:4], "b": whole[2:], "c": whole.view(2, 3).T, "d": whole, "tied": whole}
    torch.save(tensors, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(views, tmp_path / "pytorch_model-ü.bin")
    refused(lambda: load_model(tmp_path), f"python model.py convert {tmp_path}")
    done = run_convert(tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    stored = load_file(tmp_path / "model-00001-of-00002.safetensors")
    stored |= load_file(tmp_path / "model-ü.safetensors")
    assert stored.keys() == {*tensors, *views}
    assert all(torch.equal(stored[name], value) for name, value in (tensors | views).items())
    text = refused(lambda: load_model(tmp_path), "5 unexpected: a, b, c, d, tied")
    assert "missing" not in text and "misshapen" not in text


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def compressed(path):
    """A .bin whose data.pkl unpacks to a thousand times its size."""
    torch.save({"w": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


old_format = partial(torch.save, {}, _use_new_zipfile_serialization=False)
# What torch.save would write, a function that writes it, or no file; and what is said of it.
BAD_BINS = {
    "no checkpoint": (lambda path: path.write_bytes(b"not a checkpoint"), "zip"),
    "before torch 1.6": (old_format, "zip"),
    "compressed": (compressed, "compressed"),
    "code": (Payload(), "code"),
    "no tensors": ({"w": [1, 2]}, "'w', a list"),
    "a list": ([torch.zeros(2)], "list"),
    "Lightning's": ({"state_dict": {"w": torch.zeros(2)}}, "'state_dict', a dict"),
    "a number as name": ({7: torch.zeros(2)}, "holds 7"),
    "half a character as name": ({"\ud800": torch.zeros(2)}, "'\\ud800'"),
    "larger than the file": ({"w": torch.zeros(1).expand(10000, 10000)}, "larger than the file"),
    "no values": ({"w": torch.zeros(2, device="meta")}, "'w'"),
    "sparse": ({"w": torch.zeros(2, 2).to_sparse()}, "'w'"),
    "nothing": (None, "no pytorch_model"),
}


@pytest.mark.parametrize("case", BAD_BINS)
def test_converting_runs_no_code_and_names_the_file(tmp_path, monkeypatch, case):
    """A pickle may run anything; torch's own message advises to load it all the same."""
    monkeypatch.chdir(tmp_path)
    content, culprit = BAD_BINS[case]
    path = tmp_path / "pytorch_model.bin"
    if callable(content):
        content(path)
    elif content is not None:
        torch.save(content, path)
    done = run_convert(".")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "pytorch_model" in done.stderr
    assert culprit in done.stderr and len(done.stderr) < 200
    assert "weights_only" not in done.stderr
    assert names_in(tmp_path) == [path.name] * (content is not None)


def test_converting_overwrites_nothing_and_writes_all_or_nothing(tmp_path):
    """A published model.safetensors beside the .bin files; a second shard refused too late."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model-1.bin")
    for name in ("model.safetensors", INDEX):
        (tmp_path / name).write_text("published")
        refused(lambda: model.convert(tmp_path), str(tmp_path / name), "already")
        assert (tmp_path / name).read_text() == "published"
        (tmp_path / name).unlink()
    torch.save({"w": [1]}, tmp_path / "pytorch_model-2.bin")
    refused(lambda: model.convert(tmp_path), "pytorch_model-2.bin")
    assert not list(tmp_path.glob("*.safetensors*"))


MEASURE_LOADING = """
import resource, sys, torch, model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model.load_model(sys.argv[1] + "/warm-up")
before = peak()
loaded = model.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in loaded.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_holds_the_weights_once(tmp_path, dtype):
    """Reading a whole file before converting it takes 1.5 times the weights; 1.15 is allowed."""
    config = BLOOM_CONFIG | dict(vocab_size=20000, n_embed=1024, n_layer=6, n_head=8)
    save_model(Decoder(Config.from_json(config)).half(), tmp_path)
    save_model(tiny_decoder("bloom").half(), tmp_path / "warm-up")
    command = [sys.executable, "-c", MEASURE_LOADING, tmp_path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    assert peak < 1.15 * weights


# --------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = [
    "Hello, world!  (two spaces)\n\ttabs … 你好，世界。",
    "a    b\n\n  c",
    "f(x)|g(y) (a) ( b",
    "「你好！」？ 你好! ？",
    "1,234.56 a.b@c.com",
    "a\u00a0b\u3000c\u200bd \u00a0e",
    " leading and trailing  ",
    *["", " ", "\n", "end ", "Ġ Ċ ĠĠ", "x\x00y\x1c\x1d\x1e\x1f\x7f\x85z"],
    "\u1680\u2000\u2028\u2029\u202f\u205f\ufeff\u180e w",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 ñ n\u0303 ﬁ ½ Ⅷ",
    "مرحبا بالعالم، كيف حالك؟ हिन्दी। ۔",
    *["Привет, мир! Ёлка", "中文没有空格但是有标点，对吧？"],
    *["<s>text</s> <pad><unk>< s> </s", "a<pad>b</s></s>", "x" * 3000, "das Haus 你好" * 300],
]
TRAINING_TEXT = [
    *TEXTS[:16],
    *["das Haus ist grün und der Hund ist müde", "the house is green and the dog is tired"] * 3,
]
FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
MARKS = fuzz.PIPELINES["llama"]  # LLaMA's, over "▁" for a space


def template(*names, ids=(1,)):
    """A post_processor that puts tokens around the text A."""
    kinds = {name: "Sequence" if name == "A" else "SpecialToken" for name in names}
    return {
        "type": "TemplateProcessing",
        "single": [{kind: {"id": name, "type_id": 0}} for name, kind in kinds.items()],
        "pair": [],
        "special_tokens": {n: {"id": n, "ids": [*ids], "tokens": [n]} for n in names if n != "A"},
    }


def over_marks(folder):
    """A tokenizer.model as a tokenizer.json: pairs that make a piece, in their order."""
    model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    pieces = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    ids = {piece: id for id, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if ids.keys() >= {*cut}]
        merges += sorted(known, key=lambda cut: [ids[part] for part in cut])
    added = [dict(id=id, content=pieces[id], special=True, **FLAGS) for id in range(3)]
    pipeline = MARKS | {"pre_tokenizer": MARKS["pre_tokenizer"] | {"split": False}}
    pipeline |= {"post_processor": template("<s>", "A"), "added_tokens": added, "normalizer": None}
    return pipeline | {"model": MARKS["model"] | {"vocab": ids, "merges": merges}}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """By family: trained and written by the libraries; "marks" is LLaMA's without its model."""
    pytest.importorskip("tokenizers")
    from study import tokens

    families = ("bloom", "Qwen2", "Llama-3", "baichuan", "llama", "marks")
    folders = {family: tmp_path_factory.mktemp(family) for family in families}
    bloom = (*tokens.PIPELINES["BLOOM"][:2], ["<unk>", "<s>", "</s>", "<pad>"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tokens.PIPELINES, "bloom", bloom)
        for family in families[:3]:
            tokens.train(family, TRAINING_TEXT, folders[family], vocab_size=500)
    (folders["bloom"] / "tokenizer_config.json").unlink()
    options = dict(model_type="bpe", vocab_size=420, byte_fallback=True, character_coverage=1.0)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    for family, dummy_prefix in (("baichuan", False), ("llama", True)):
        options |= dict(model_prefix=f"{folders[family]}/tokenizer", add_dummy_prefix=dummy_prefix)
        text = iter(TRAINING_TEXT)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, minloglevel=2, **options)
    (folders["marks"] / "tokenizer.json").write_text(json.dumps(over_marks(folders["llama"])))
    return folders


@pytest.fixture(scope="session")
def texts():
    """TEXTS, and strings of many alphabets with some added tokens."""
    pytest.importorskip("tokenizers")
    from study import tokens

    odd = ["x<unk>", "<unk>xy", "x<y", "á a\u0301", "I'm 12 345", "a <s> b", "<s>a<s><s> b"]
    odd += [" a", "▁a", "▁▁ a  b", "his the"]
    added = ["<s>", "</s>", "<|im_end|>", "<|end_of_text|>"]
    return [*TEXTS, *odd, *tokens.random_texts(4500, seed=1, added=added)]


def with_files(folder, target, edits={}, **files):
    """With other files by name, and other values in tokenizer.json; None and ... for none."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    if edits:
        files["tokenizer"] = json.loads((folder / "tokenizer.json").read_text())
    for path, value in edits.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        part = files["tokenizer"]
        for key in way:
            part = part[key]
        part[last] = value(part[last]) if callable(value) else value
        if value is ...:
            del part[last]
    for name, content in files.items():
        (target / f"{name}.json").unlink(missing_ok=True)
        if content is not None:
            (target / f"{name}.json").write_text(json.dumps(content))
    return target


def compare_ids(folder, texts):
    """Our ids and text against those of `tokenizers`."""
    library = pytest.importorskip("tokenizers")
    theirs, ours = library.Tokenizer.from_file(f"{folder}/tokenizer.json"), load_tokenizer(folder)
    assert ours.paths[0] == folder / "tokenizer.json"
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert [*ours.prompt_prefix, *ids] == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    return ours, theirs


@pytest.mark.parametrize("name", ["bloom", "Qwen2", "Llama-3", "marks"])
def test_ids_and_text_equal_tokenizers(tokenizer_folders, texts, name):
    """A merge out of order, white space of Python's kind, marks left apart, bytes dropped."""
    ours, theirs = compare_ids(tokenizer_folders[name], texts)
    assert ours.vocab_size == theirs.get_vocab_size()
    rng = random.Random(1)
    for _ in range(300 if name != "marks" else 0):  # ids that no text gives: broken characters
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(20))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_a_tokenizer_json_over_marks_gives_sentencepieces_ids(tokenizer_folders, texts):
    """LLaMA's and Mistral's as transformers 5 saves them, without a tokenizer.model."""
    model = load_tokenizer(tokenizer_folders["llama"])
    ours = load_tokenizer(tokenizer_folders["marks"])
    for text in texts:
        if text[:1] not in (" ", "▁") and not any(token in text for token in ours.added):
            assert ours.encode(text) == model.encode(text), ascii(text)
    assert (ours.prompt_prefix, ours.target_prefix) == ([1], "")


def byte_level(*steps, **how):
    last = fuzz.BYTES | {"trim_offsets": True} | how
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}}


split = lambda regex, **how: fuzz.SPLIT | {"pattern": {"Regex": regex}} | how
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACES = {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
CONTENT, NORMALIZED = "added_tokens.1.content", "added_tokens.1.normalized"
ACCENT = {"normalizer": NFC, CONTENT: "a\u0301", NORMALIZED: True, "model.vocab.a\u0301": 1}
WHOLE = {"model.ignore_merges": True, "model.merges": []}
NEVER = {"pre_tokenizer.prepend_scheme": "never"}
NOTHING = {"normalizer": {"type": "Sequence", "normalizers": []}, "post_processor": None}
# What does nothing where all bytes are known.
KNOWN = {"model.unk_token": "<unk>", "model.fuse_unk": True, "model.byte_fallback": True}
as_text = lambda merges: [" ".join(merge) for merge in merges]
OVER_BYTES = {
    "merges before tokenizers 0.20": {"model.merges": as_text},
    "matched in what others leave": {CONTENT: "x<", NORMALIZED: True, "model.vocab.x<": 1},
    "the longer of two tokens": {CONTENT: "<unk>x", "model.vocab.<unk>x": 1},
    "no added tokens, all characters apart": {"added_tokens": [], "model.merges": []},
    "composed": {"normalizer": NFC, "post_processor": template("A")},
    "composed before it is matched": ACCENT,
    "nothing before and after": NOTHING | KNOWN,
    "all pieces, inverted": {"pre_tokenizer.pretokenizers.0.invert": True},
    "merges that count for no whole token": WHOLE,
    "GPT-2's": byte_level(use_regex=True),
    "SmolLM2's": byte_level(DIGITS, use_regex=True),
    "numbers whole": byte_level(DIGITS | {"individual_digits": False}, use_regex=True),
    "Midm's": byte_level(split(data.LLAMA3_SPLIT, behavior="Removed", invert=True)),
    "DeepSeek's": byte_level(*map(split, data.DEEPSEEK_SPLITS), DIGITS),
    "Mistral-Nemo's": byte_level(split(data.NEMO_SPLIT)),
}
OVER_MARKS = {
    "in front of every part": {"pre_tokenizer.prepend_scheme": "always"},
    "never in front": NEVER | {"decoder.decoders": lambda decoders: decoders[:3]},
    "words apart": {"pre_tokenizer.split": True},
    "LLaMA-2's": {"pre_tokenizer": None, "normalizer": PREPEND, "model.unk_token": "<unk>"},
    "no space in front": {"pre_tokenizer": None, "normalizer": REPLACE},
    "a token over two words": {"model.vocab.s▁t": 420, "model.merges.0": ["s", "▁t"]},
    "whole words": WHOLE,
}


@pytest.mark.parametrize("case", [*OVER_BYTES, *OVER_MARKS])
def test_other_pipelines_equal_tokenizers(tokenizer_folders, tmp_path, texts, case):
    """A token that takes the beginning of another; a mark in front of each part; words merged."""
    base = "bloom" if case in OVER_BYTES else "marks"
    edits = (OVER_BYTES | OVER_MARKS)[case]
    end = {"tokenizer_config": {"eos_token": "!"}}
    compare_ids(with_files(tokenizer_folders[base], tmp_path, edits, **end), texts[:400])


@pytest.mark.parametrize("family", ["bloom", "baichuan", "llama", "Qwen2", "Llama-3"])
def test_prompt_and_target_are_what_the_joined_text_gives(tokenizer_folders, family):
    """Two spaces where sentencepiece puts one itself, or none; white space lost; eos in a text."""
    ours = load_tokenizer(tokenizer_folders[family])
    for target in ["das Haus", "Das", "12", "«ja»", " two spaces", "你好", "é", "<s>"]:
        prompt, answer = render(ours, "en-de", "the house", target)
        joined = ours.encode(f"{data.prompt_text('en-de', 'the house')} {target}")
        assert [*prompt, *answer] == [*ours.prompt_prefix, *joined, ours.eos_id]
        assert ours.decode(answer[:-1]).lstrip() == target.lstrip()
    for text in TEXTS:
        ids = ours.encode(text)
        if family == "baichuan":
            assert isinstance(ids, list) and not {1, 2} & {*ids}
        if family in ("bloom", "Llama-3") or (family == "baichuan" and "\x00" not in text):
            assert ours.decode(ids) == text


named = lambda **tokens: {f"{kind}_token": token for kind, token in tokens.items()}
by_id = lambda **ids: {f"{kind}_token_id": id for kind, id in ids.items()}
TOKENS, NAMES = "tokenizer_config", "special_tokens_map"
CONFIG, GENERATION = "config", "generation_config"
UNK = {"content": "<unk>", "lstrip": False}
ADDED = {"added_tokens_decoder": {"421": {"content": "<|e|>"}}}
NO_ADDED = {"added_tokens_decoder": {}}
LLAMA, FAST = {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizerFast"}
OF_BAICHUAN = {"tokenizer_class": "BaichuanTokenizer"}
NO_BOS, BOS = {"add_bos_token": False}, {"add_bos_token": True}
# Family, files; ids (or tokens) that begin a text, end it, pad it, and stand before a prompt.
SPECIAL = [
    ("bloom", {}, 1, [2], 3, []),
    ("bloom", {TOKENS: BOS | named(bos="<pad>", eos=UNK)}, 3, [0, 2], 3, []),
    ("bloom", {TOKENS: named(eos="<s>", pad="a"), NAMES: named(eos=UNK)}, 1, [0, 1, 2], "a", []),
    ("bloom", {NAMES: named(bos=UNK, pad="</s>")}, 0, [2], 2, []),
    ("bloom", {CONFIG: by_id(eos=0), NAMES: named(eos="<s>")}, 1, [1, 0, 2], 3, []),
    ("bloom", {CONFIG: by_id(bos=3, eos=[0, 2]), GENERATION: by_id(eos=[3])}, 3, [0, 2, 3], 3, []),
    ("bloom", {CONFIG: by_id(eos=[], pad=1), TOKENS: named(bos=None)}, 1, [2], 1, []),
    ("bloom", {TOKENS: named(eos="!") | NO_ADDED, NAMES: named(eos=UNK)}, 1, ["!", 0, 2], 3, []),
    ("baichuan", {TOKENS: OF_BAICHUAN}, 1, [2], 0, []),
    ("baichuan", {TOKENS: OF_BAICHUAN | NO_BOS}, 1, [2], 0, []),
    ("llama", {CONFIG: by_id(eos=7, pad=-1)}, 1, [7, 2], 0, []),
    ("llama", {TOKENS: LLAMA | named(eos=UNK, pad="</s>")}, 1, [0, 2], 2, [1]),
    ("llama", {TOKENS: FAST | {"add_bos_token": None}}, 1, [2], 0, [1]),
    ("llama", {TOKENS: LLAMA | NO_BOS}, 1, [2], 0, []),
    ("llama", {TOKENS: BOS, NAMES: named(pad="[PAD]"), CONFIG: by_id(pad=9)}, 1, [2], 9, [1]),
    ("llama", {GENERATION: by_id(eos=[2, 7]), CONFIG: by_id(eos=5)}, 1, [5, 2, 7], 0, []),
    ("llama", {TOKENS: named(eos="<|e|>") | ADDED}, 1, [421, 2], 0, []),
    ("llama", {TOKENS: named(eos="<|e|>"), "added_tokens": {"<|e|>": 420}}, 1, [420, 2], 0, []),
    ("llama", {TOKENS: named(eos="<|e|>"), "added_tokens": {"<|e|>": 5}}, 1, [5, 2], 0, []),
    ("llama", {CONFIG: {"vocab_size": 420}, "added_tokens": {"<pad>": 420}}, 1, [2], 0, []),
    ("Qwen2", {}, -1, [0], 0, []),
    ("Qwen2", {TOKENS: named(eos="<|im_end|>", bos="<|im_start|>")}, 1, [2], 2, []),
    ("Qwen2", {TOKENS: None, CONFIG: by_id(bos=1, eos=2)}, 1, [2], 2, []),
    ("Llama-3", {TOKENS: named(eos="<|end_of_text|>") | NO_BOS}, 0, [1], 1, [0]),
    ("Llama-3", {CONFIG: by_id(eos=1), GENERATION: by_id(eos=[1, 8])}, 0, [1, 8], 1, [0]),
]


@pytest.mark.parametrize("case", SPECIAL)
def test_special_tokens_come_from_the_folders_files(tokenizer_folders, tmp_path, case):
    """A text that never ends, or at once; a chat's end of turn as text; another beginning."""
    family, files, bos_id, end_ids, pad_id, front = case
    ours = load_tokenizer(with_files(tokenizer_folders[family], tmp_path, **files))
    id_of = lambda token: token if isinstance(token, int) else ours.ids[token]
    assert (ours.bos_id, ours.pad_id, ours.prompt_prefix) == (bos_id, id_of(pad_id), front)
    assert ours.end_ids == [*map(id_of, end_ids)] and ours.eos_id == ours.end_ids[0]
    assert ours.vocab_size > max(ours.end_ids)
    assert {path.stem for path in ours.paths} >= {name for name in files if files[name]}
    encoded = ours.encode(data.prompt_text("en-de", "the house"))
    prompt, target = render(ours, "en-de", "the house", "das Haus")
    assert prompt == [*front, *encoded] and ours.bos_id not in [*encoded, *target[:-1]]
    last = [ours.vocab_size - 2, ours.vocab_size - 1, ours.encode("c")[-1]]
    text = ours.decode([*ours.encode("a b"), *last])
    assert text.startswith("a b") and text.endswith("c")


def test_a_tokenizer_json_with_more_tokens_counts(tokenizer_folders, tmp_path, texts):
    """A vocabulary that was extended in one of two files; added words that are not found, unsaid."""
    longer = {"model.vocab.Haus▁ist": 420, "model.merges.0": ["Haus", "▁ist"]}
    longer |= {"model.vocab.Haus": 421, "model.vocab.▁ist": 422}
    with_files(tokenizer_folders["marks"], tmp_path, longer)
    shutil.copy(tokenizer_folders["llama"] / "tokenizer.model", tmp_path)
    ours, _ = compare_ids(tmp_path, ["das Haus ist", *texts[:100]])
    assert ours.vocab_size == 423


def test_what_is_not_applied_is_said(tokenizer_folders, tmp_path, capsys):
    """Greedy without the penalty that a chat model's generation_config.json asks for; a word by id."""
    generation = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 0, "temperature": 0.7}
    words = {"Zauberwürfel": 420, "<pad>": 421}
    files = {GENERATION: generation, CONFIG: {"vocab_size": 421}, "added_tokens": words}
    load_tokenizer(with_files(tokenizer_folders["llama"], tmp_path, **files))
    row, text, penalty = capsys.readouterr().err.splitlines()
    assert "<pad> has no row" in row and text.endswith("by id: Zauberwürfel")
    assert "generation_config.json: repetition_penalty 1.1 is not applied" in penalty


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_prompt_is_framed_as_in_transformers(tokenizer_folders, tmp_path, name, begins):
    """Of a template and add_bos_token that differ, one counts; of two files, the template."""
    transformers = pytest.importorskip("transformers")
    config = named(eos="</s>", bos="<s>") | {"add_bos_token": not begins}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    edits = {"post_processor": template("<s>", "A") if begins else template("A")}
    files = {TOKENS: config, CONFIG: {"model_type": "llama"}}
    folder = with_files(tokenizer_folders["marks"], tmp_path, edits, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if name == "tokenizer.model":
        shutil.copy(tokenizer_folders["llama"] / name, folder)
    ours = load_tokenizer(folder)
    assert ours.paths[0].name == name
    text = data.prompt_text("en-de", "the house")
    assert render(ours, "en-de", "the house")[0] == theirs(text)["input_ids"]


FIRST, LAST = "pre_tokenizer.pretokenizers.0", "pre_tokenizer.pretokenizers.1"
NO_SPACE = {"model.vocab.Ġ": ..., "model.merges": []}
# What another tokenizer.json has, and what is said beside the file's name.
OTHER_OPTIONS = dict(ignore_merges=7, a_new_option=1, dropout=0.1, end_of_word_suffix="</w>")
OTHER_TYPES = {"normalizer": "NFKC", "pre_tokenizer": "Whitespace", "decoder": "Metaspace"}
OTHER_BYTES = [
    *[({f"{FIRST}.pattern.Regex": split}, split) for split in (r"\w+", "(a+)+b|.")],
    ({f"{FIRST}.pattern": {"String": " "}}, "String"),
    ({f"{FIRST}.behavior": "Removed"}, "Removed"),
    ({f"{LAST}.add_prefix_space": True}, "'add_prefix_space': True"),
    ({"pre_tokenizer": None}, "pre_tokenizer"),
    ({"model.type": "WordPiece"}, "WordPiece"),
    ({"model.continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
    (NO_SPACE | {"model.unk_token": "<unk>"}, "unk_token is"),
    (NO_SPACE | {"model.byte_fallback": True}, "byte_fallback"),
    ({"model.vocab.x": -7}, "ids from -7"),
    ({"model.vocab.x": 2**24}, "16777216"),
    ({"model.merges.0": ["never", "seen"]}, "never"),
    ({"post_processor": template("<s>", "A", "</s>")}, "</s>"),
    ({"post_processor": template("<s>", "<pad>", "A")}, "<pad>"),
    ({"post_processor": template("<s>", "A", ids=(1, 1))}, "'<s>'"),
    ({"post_processor": template("<s>", "A", ids=(10**6,))}, "1000000"),
    ({"post_processor": {"type": "TemplateProcessing"}}, ""),
    ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
    ({"decoder": None}, "decoder []"),
    ({"added_tokens.1.id": 77}, "<s> has another id"),
    ({"added_tokens.2.content": "</x>"}, "no end-of-sentence"),
    *[({f"added_tokens.1.{flag}": True}, f"<s>: {flag}") for flag in [*FLAGS][:3]],
    *[({f"model.{key}": value}, f"{key} is {value!r}") for key, value in OTHER_OPTIONS.items()],
    *[({key: {"type": kind}}, kind) for key, kind in OTHER_TYPES.items()],
    *[({key: 7}, "") for key in ("pre_tokenizer", "post_processor", "model.merges.0")],
    *[({"model": None}, ""), ({"model.vocab": []}, ""), ({"model.vocab.x": "7"}, "")],
    ({"added_tokens": {}}, ""),
]
OTHERS = [
    ("bloom", {TOKENS: named(eos="none")}, "eos_token 'none'"),
    ("llama", {NAMES: named(bos="[BOS]")}, "bos_token '[BOS]'"),
    ("bloom", {CONFIG: by_id(bos=10**6)}, "bos_token_id 1000000"),
    ("bloom", {TOKENS: named(eos=7)}, "eos_token 7"),
    ("bloom", {TOKENS: named(eos={})}, ""),
    ("bloom", {CONFIG: by_id(eos="</s>")}, "eos_token_id"),
    *[("llama", {CONFIG: by_id(eos=[id])}, f"eos_token_id {id}") for id in (-1, True, 420)],
    ("llama", {TOKENS: {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
    ("llama", {TOKENS: []}, ""),
    ("llama", {TOKENS: {"added_tokens_decoder": {"x": {}}}}, "tokenizer_config.json"),
    ("llama", {"added_tokens": {"x": 2**24}}, "16777216"),
    ("llama", {"added_tokens": []}, "added_tokens.json"),
    ("bloom", {GENERATION: by_id(eos=500)}, "eos_token_id 500"),
    ("llama", {TOKENS: {"add_prefix_space": False}}, "add_prefix_space"),
    ("bloom", {TOKENS: {"add_prefix_space": True}}, "add_prefix_space"),
    ("bloom", {TOKENS: {"split_special_tokens": True}}, "split_special_tokens is True"),
    ("llama", {TOKENS: {"sp_model_kwargs": {"enable_sampling": True}}}, "enable_sampling"),
    ("Qwen2", {TOKENS: None}, "no end-of-sentence token"),
    ("Llama-3", {TOKENS: named(eos="a", bos="b")}, "[0] begins a text"),
    *[("bloom", {"edits": edits}, culprit) for edits, culprit in OTHER_BYTES],
    ("marks", {"edits": {"pre_tokenizer.replacement": "_"}}, "'replacement': '_'"),
    ("marks", {"edits": {"pre_tokenizer.prepend_scheme": ...}}, "Metaspace"),
    ("marks", {"edits": {"normalizer": SPACES}}, " +"),
    ("marks", {"edits": {"model.vocab.<0x0A>": ...}}, "bytes, <0x00>"),
    ("marks", {"edits": {"decoder": {"type": "ByteLevel"}}}, "ByteLevel"),
    ("marks", {"edits": {"decoder.decoders.3.start": 2}}, "'start': 2"),
    ("marks", {"edits": {"model.byte_fallback": False}}, "no byte_fallback"),
]


@pytest.mark.parametrize("family, files, culprit", OTHERS)
def test_another_tokenizer_is_refused_by_name(tokenizer_folders, tmp_path, family, files, culprit):
    """Ids that are almost right. But a tokenizer.model is read before a tokenizer.json."""
    folder = with_files(tokenizer_folders[family], tmp_path, **files)
    name = "tokenizer.json" if "edits" in files else str(folder)
    refused(lambda: load_tokenizer(folder), name, culprit)
    if family == "marks":
        shutil.copy(tokenizer_folders["llama"] / "tokenizer.model", folder)
        ours = load_tokenizer(folder)
        assert ours.paths[0].name == "tokenizer.model" and ours.prompt_prefix == [1]


def test_a_folder_without_a_readable_tokenizer_is_named(tokenizer_folders, tmp_path):
    """A piece that is not UTF-8 fails when it is said; tiktoken's file beside a tokenizer.json."""
    raw = (tokenizer_folders["baichuan"] / "tokenizer.model").read_bytes()
    assert raw.count(b"\xe2\x96\x81the") == 1
    pointer = LFS_POINTER.encode()
    for name, content, culprit in [
        ("vocab.json", b"{}", "no tokenizer.json and no tokenizer.model"),
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("tokenizer.json", b"[]", "tokenizer.json"),
        ("tokenizer.json", pointer, "tokenizer.json: a Git LFS pointer; git lfs pull"),
        ("tokenizer.model", pointer, "tokenizer.model: a Git LFS pointer; git lfs pull"),
        ("tokenizer.model", b"x", "tokenizer.model"),
        ("tokenizer.model", raw.replace(b"\x81the", b"\xffthe"), "tokenizer.model"),
        ("tokenizer.model", b"\x96" + raw, "tokenizer.model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tokenizer.model"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(lambda: load_tokenizer(tmp_path), str(tmp_path), culprit)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours = load_tokenizer(with_files(tokenizer_folders["bloom"], tmp_path))
    assert ours.paths[0].name == "tokenizer.json"


# --------------------------------------------------------------------------------------------------
# Parallel text, prompts, batches


def write(folder, **files):
    """Text files, or bytes, under names like train_en__de_tsv: train.en-de.tsv."""
    for name, text in files.items():
        path = folder / name.replace("__", "-").replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


in_json = lambda source, target: json.dumps({"translation": {"de": target, "en": source}})
MARK, ITEM = b"\xef\xbb\xbf", in_json("a", "A")


def test_the_four_forms_give_the_same_pairs(tmp_path):
    """Columns or sides swapped; lines split at U+2028; the reverse read before the exact order."""
    pairs = [("one\u2028line", "eine Zeile"), ("a\x85b", "ab"), ("last", "letzte")]
    english, german = ("\n".join(side) for side in zip(*pairs))
    items = [in_json(source, target) for source, target in pairs]
    columns = "".join(f"{source}\t{target}\n" for source, target in pairs)
    write(tmp_path, two_en__de_en=english, two_en__de_de=german + "\n", tab_en__de_tsv=columns)
    write(tmp_path, many_en=MARK + english.encode(), many_de=german.replace("\n", "\r\n") + "\r\n")
    write(tmp_path, list_de__en_json=MARK + f"[{', '.join(items)}]".encode())
    write(tmp_path, lines_de__en_json="\n".join(items) + "\n")
    for split in ("two", "many", "tab", "list", "lines"):
        assert read_parallel(tmp_path, split, "en-de") == pairs
        assert read_parallel(tmp_path, split, "de-en") == [pair[::-1] for pair in pairs]
        assert list_pairs(tmp_path, split) == ["de-en", "en-de"]
        paths = data.open_parallel(tmp_path, split, "en-de").paths
        assert {*paths} == {*tmp_path.glob(f"{split}.*")}
    write(tmp_path, test_de__en_de="d1", test_de__en_en="e1", test_en="e", test_fr="f")
    write(tmp_path, test_en__de_de="d2", test_en__de_en="e2")
    assert read_parallel(tmp_path, "test", "de-en") == [("d1", "e1")]
    assert read_parallel(tmp_path, "test", "en-de") == [("e2", "d2")]
    assert list_pairs(tmp_path, "test") == ["de-en", "en-de", "en-fr", "fr-en"]


def test_only_newlines_end_a_line(tmp_path):
    """A last line without newline; a carriage return or a byte order mark as text; a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for text, lines in [
        ("", []),
        ("\n", [""]),
        ("a", ["a"]),
        ("\ufeffa\nb", ["a", "b"]),
        ("ä\r\n\n \u2028\n\u3000\n中\n\tx\n", ["ä", "", " \u2028", "\u3000", "中", "\tx"]),
        ("\n\nа\r\nб\ufeff", ["", "", "а", "б\ufeff"]),
    ]:
        (tmp_path / "text").write_bytes(text.encode())
        assert data.read_lines(tmp_path / "text") == lines
        writer = subprocess.Popen(["cp", tmp_path / "text", tmp_path / "pipe"])
        assert data.read_lines(tmp_path / "pipe") == lines and writer.wait() == 0


def test_text_takes_few_bytes_a_pair(tmp_path):
    """A million captions took 0.7 GB before the first step."""
    size = 100_000
    write(tmp_path, train_en="a house\n" * size, train_de="ein Haus\n" * size)
    tracemalloc.start()
    try:
        text = data.open_parallel(tmp_path, "train", "en-de")
        assert len(text) == size and text[size - 1] == ("a house", "ein Haus")
        assert tracemalloc.get_traced_memory()[0] < 30 * size
    finally:
        tracemalloc.stop()


BOTH = [("a", "A"), ("b", "B")]
EMPTY_SIDE = "\n".join([ITEM, " ", in_json("c", ""), in_json("b", "B"), ""])
TWO_LINES = "\n".join([ITEM, in_json("c", "C\nC"), "", in_json("b", "B")])
QUOTED = '"a, ""b"""\tA\n"c ""d"""\t"D ""E"" F"\n'
UNQUOTED = [('a, "b"', "A"), ('c "d"', 'D "E" F')]
# Files, what is read of them, and what is said.
READ = [
    (dict(train_en="a\n\nc\nb\n", train_de="A\nB\n \nB\n"), BOTH, "skipped 2 of 4"),
    (dict(train_en="a\nb\n", train_de="A\nB\n", train_en__de_en="c\n"), BOTH, "train.en-de.de"),
    (dict(train_en="a\n\n\u3000\nb\n", train_de="A\n\nB\nB\n"), BOTH, "skipped 2 of 4"),
    (dict(train_en__de_tsv="a\tA\n\n\tC\nb\tB\n"), BOTH, "skipped 2 of 4"),
    (dict(train_en__de_json=EMPTY_SIDE), BOTH, "skipped 2 of 4"),
    (dict(train_en__de_json=TWO_LINES), BOTH, "skipped 2 of 4"),
    (dict(train_en__de_tsv='a "b"\tA\n'), [('a "b"', "A")], ""),
    (dict(train_en__de_tsv=QUOTED), UNQUOTED, "quotes"),
    (dict(train_en__de_tsv='"a ""b"""\tA\nc "d"\tD\n'), [('"a ""b"""', "A"), ('c "d"', "D")], ""),
    (dict(train_en__de_tsv='"a"\t"A"\n'), [('"a"', '"A"')], ""),
    (dict(train_en__de_tsv="a\tA\t1.07\t-2e-3\nb\tB\t.5\t3\n"), BOTH, "numbers"),
    (dict(train_en__de_tsv="1\t2\n"), [("1", "2")], ""),
    (dict(train_en__de_tsv="en\tde\na\tA\n"), [("en", "de"), ("a", "A")], "not a header"),
]


@pytest.mark.parametrize("files, pairs, said", READ)
def test_text_as_others_write_it(tmp_path, capsys, files, pairs, said):
    """Two lines in a JSON string; quotes of a spreadsheet as text; a score that is refused."""
    write(tmp_path, **files)
    assert read_parallel(tmp_path, "train", "en-de") == pairs
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)


BAD_TEXT = [
    ("en-de", dict(train_en="a\nb\n", train_de="A\n"), ["en has 2 lines", "de has 1"]),
    ("en-de", dict(train_en=b"a\n\xff", train_de="A\nB"), ["train.en: line 2 of 2", "UTF-8"]),
    ("en-de", dict(train_en=b"a\nb\n\xe4", train_de="A\nB\nC"), ["train.en: line 3 of 3"]),
    ("en-de", dict(train_en="a\rb\r", train_de="A\nB\n"), ["train.en", "old Macs"]),
    ("en-de", dict(train_en=LFS_POINTER, train_de=LFS_POINTER), ["train.en", "git lfs pull"]),
    ("en-de", dict(train_en__de_tsv="a\tb\tc\n"), ["tsv: line 1 of 1", "3 tab-separated"]),
    ("en-de", dict(train_en__de_tsv="a\tb\nc\n"), ["tsv: line 2 of 2", "1 tab-separated"]),
    ("en-de", dict(train_en="a\n"), ["no train text for en-de", "one side, but no train.de"]),
    ("de-en", dict(train_en__de_en="a\n"), ["one side, but no train.en-de.de"]),
    ("en-de", dict(train_en="a\n", train_fr="b\n"), ["pairs found: en-fr, fr-en"]),
    ("en-de", dict(train_en__de_json="[{}]"), ["train.en-de.json: item 1 of 1"]),
    ("en-de", dict(train_en__de_json=ITEM.replace('"A"', "7")), ["item 1 of 1"]),
    ("en-de", dict(train_en__de_json="nonsense"), ["train.en-de.json", "JSON"]),
    ("en-de", dict(train_en__de_json=ITEM.replace("A", "\\ud800")), ["surrogates"]),
    ("en-xx", dict(train_en="a\n", train_xx="b\n"), ["'xx'", "--language CODE=NAME"]),
    ("en-de", {}, ["no train text"]),
    ("en-pt-xx", {}, ["'xx'", "--language"]),
    *[(pair, {}, [repr(pair), "en-de"]) for pair in ("ende", "en-en", "en-eng_Latn", "en-pt-br")],
]


@pytest.mark.parametrize("pair, files, culprits", BAD_TEXT)
def test_bad_text_ends_in_one_line(tmp_path, pair, files, culprits):
    """A traceback, or a message that names neither the file nor the line."""
    write(tmp_path, **files)
    refused(lambda: read_parallel(tmp_path, "train", pair), *culprits)
    refused(lambda: read_parallel(tmp_path / "nowhere", "train", "en-de"), "nowhere: no train text")


def test_languages_by_any_of_their_codes(tmp_path, monkeypatch):
    """BLEU of Chinese by words of whole sentences; a pair of three parts; files not found."""
    assert "xx" not in data.LANGUAGES
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    data.name_languages("xx=Xeno")
    for pair, source, target, tokenizer in [
        ("en-de", "English", "German", "13a"),
        ("eng_Latn-zho_Hans", "English", "Chinese", "zh"),
        ("xx_Cyrl-zh-CN", "Xeno", "Chinese", "zh"),
        ("zh-Hant-yue", "Traditional Chinese", "Cantonese", "zh"),
        ("zho_Hans-zho_Hant", "Chinese", "Traditional Chinese", "zh"),
        ("pt-BR-pt-PT", "Brazilian Portuguese", "Portuguese", "13a"),
        ("deu-jpn_Jpan", "German", "Japanese", "ja-mecab"),
        ("fr-kor", "French", "Korean", "ko-mecab"),
        ("sr-Latn-sr", "Serbian in Latin script", "Serbian", "13a"),
        ("my-tha_Thai", "Burmese", "Thai", "char"),
        ("xx-my", "Xeno", "Burmese", "char"),
        ("my-xx", "Burmese", "Xeno", "13a"),
        ("cmn_Hans-cmn_Hant", "Chinese", "Traditional Chinese", "zh"),
        ("zho-TW-zh_Hans_CN", "Traditional Chinese", "Chinese", "zh"),
        ("sr_Latn_RS-zh_Hant_HK", "Serbian in Latin script", "Traditional Chinese", "zh"),
        ("arb_Arab-arb_Latn", "Arabic", "Arabic in Latin script", "13a"),
        ("es-419-en", "Spanish", "English", "13a"),
    ]:
        codes, folder = data.split_pair(pair), tmp_path / pair
        assert "-".join(codes) == pair
        assert [*map(data.language_name, codes)] == [source, target]
        assert data.bleu_tokenizer(codes[1]) == tokenizer
        assert f" from {source} to {target}:\n" in data.prompt_text(pair, "a")
        folder.mkdir()
        for name in (f"two.{codes[0]}", f"two.{codes[1]}", f"tab.{pair}.tsv"):
            (folder / name).write_text("a\tb\n")
        for split in ("two", "tab"):
            assert list_pairs(folder, split) == sorted([pair, "-".join(codes[::-1])])
            assert len(read_parallel(folder, split, pair)) == 1
    assert list_pairs(tmp_path / "en-de", "two") == ["de-en", "en-de"]
    (tmp_path / "en-de/two.en_US").write_text("a\tb\n")  # English, too: no pair of its own
    assert list_pairs(tmp_path / "en-de", "two") == ["de-en", "de-en_US", "en-de", "en_US-de"]
    data.name_languages("ja= Nihongo ")
    assert data.language_name("jpn") == "Japanese" and data.language_name("ja") == "Nihongo"
    assert data.bleu_tokenizer("ja") == "ja-mecab"
    for text in ("", "de", "=German", "de=", "de=Ger\nman", "a=A,,b=B"):
        refused(lambda: data.read_languages(text), "de=German")


def test_a_line_is_one_line_for_every_reader(tmp_path):
    """comet-score got 13 references for 12 hypotheses."""
    lines = ["a\rb", "c\r", "\u2028d\x85e\x0cf\x1cg", "", "h\r\ni"]
    data.write_lines(tmp_path / "text", lines)
    raw = (tmp_path / "text").read_bytes().decode()
    assert raw == "a b\nc\n d e f g\n\nh i\n"
    assert len(raw.splitlines()) == len(open(tmp_path / "text").readlines()) == len(lines)


def test_examples_and_batches():
    """A merge across the boundary; eos as input; labels shifted twice; an example lost; padding."""
    prompt, target = render(Letters, "en-de", "A {house}", "Ein Haus")
    text = "Translate this from English to German:\nEnglish: A {house}\nGerman:"
    assert prompt == Letters.encode(text) and target == [*Letters.encode(" Ein Haus"), 2]
    assert render(Letters, "en-de", "A {house}") == (prompt, [])
    examples = [([5, 6], [7, 8, 2]), ([9], [2]), ([4, 4, 4], [])]
    (batch,) = make_batches(examples, pad_id=3, tokens_per_batch=100)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [4, 4, 4, 3], [9, 3, 3, 3]]
    assert batch.mask.tolist() == [[True] * 4, [True] * 3 + [False], [True] + [False] * 3]
    assert batch.targets.tolist() == [[-100, 7, 8, 2], [-100] * 4, [2, -100, -100, -100]]
    rng = random.Random(0)
    examples = [([i] * rng.randint(1, 30), [i, 2]) for i in range(4, 204)]
    for seed in (None, 1):
        batches = list(make_batches(examples, 3, tokens_per_batch=64, seed=seed))
        firsts = [row[0] for batch in batches for row in batch.ids.tolist()]
        assert sorted(firsts) == list(range(4, 204))
        assert all(batch.ids.numel() <= 64 for batch in batches)
    padding = sum(int((~batch.mask).sum()) for batch in batches)
    assert padding < 0.1 * sum(batch.ids.numel() for batch in batches)
    ids = lambda seed: [batch.ids.tolist() for batch in make_batches(examples, 3, 64, seed=seed)]
    assert ids(1) == ids(1) != ids(2)
    (long,) = make_batches([([4] * 100, [])], 3, tokens_per_batch=64)
    assert long.ids.shape == (1, 100)


def test_sisters_have_other_fingerprints(tmp_path):
    """bloom and bloomz: the same names, shapes and sizes."""
    tensors = {f"layer.{i}": torch.full((100, 100), float(i)) for i in range(5)}
    path, found = tmp_path / "0.safetensors", []
    for number in (3.0, 3.0, 3.5):
        data.write_tensors(path, tensors | {"layer.3": torch.full((100, 100), number)})
        found.append(data.fingerprint(path))
    assert found[0] == found[1] != found[2]
    for damaged in (b"", b"\0" * 8, b"\xff" * 99):
        path.write_bytes(damaged)
        refused(lambda: data.fingerprint(path), "0.safetensors")
    path.write_bytes((10**9).to_bytes(8, "little") + b"{}")
    assert data.fingerprint(path) not in found  # loading refuses what is cut off
    (tmp_path / "a.json").write_text("{}")
    assert data.fingerprint(tmp_path / "a.json") == hashlib.sha256(b"{}").hexdigest()


def test_a_lock_follows_no_link_and_removes_nothing_of_others(tmp_path):
    """A link as lock emptied a file of mine; temporary files of others were swept."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.mkdir()
    (mine / "keys").write_text("precious")
    for name, target in (("lock", mine / "keys"), ("lock", mine / "no"), ("hypotheses", mine)):
        (run / name).symlink_to(target)
        refused(data.locked(run).__enter__, f"run/{name}", "link")
        (run / name).unlink()
    os.mkfifo(run / "lock")
    refused(data.locked(run).__enter__, "run/lock")
    (run / "lock").unlink()
    assert (mine / "keys").read_text() == "precious" and not (mine / "no").exists()
    left_over = run / "x.json.half-written", run / ".tmpAbCdE1", run / ".tmpbackup"
    for path in left_over[:2]:
        path.write_text("")
    left_over[2].mkdir()
    (run / "link.half-written").symlink_to(mine / "keys")
    with data.locked(run):
        assert all(path.exists() for path in left_over)  # no run wrote these
    (run / "args.json").write_text("{}")
    with data.locked(run):
        assert [path.exists() for path in left_over] == [False, False, True]
        assert (run / "link.half-written").is_symlink()
    with data.locked(tmp_path / "new"):
        assert (tmp_path / "new/lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "new").exists()


def test_a_lock_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    """A lock file that was removed and made again: two held it. A file system without locks."""
    lock, stat = tmp_path / "lock", os.stat
    with data.locked(tmp_path):
        lock.rename(tmp_path / "another")
        with data.locked(tmp_path):
            refused(data.locked(tmp_path).__enter__, "in use by process")
    other = stat(tmp_path / "another")
    of_another = lambda path, **how: other if path == lock else stat(path, **how)
    monkeypatch.setattr(os, "stat", of_another)
    refused(data.locked(tmp_path).__enter__, "in use by")
    monkeypatch.setattr(os, "stat", stat)
    failing = data.portalocker.LockException(OSError(95, "Operation not supported"))
    monkeypatch.setattr(data.portalocker, "lock", lambda *_: (_ for _ in ()).throw(failing))
    with data.locked(tmp_path):
        assert capsys.readouterr().err.startswith(f"{tmp_path}: no locks here")


def test_what_is_said_is_one_line_and_steers_no_terminal(capsys):
    """A foreign file's name or a tensor's set the window's title, or took a second line."""

    def fail():
        raise InputError("h.\u2028mlp \x1b]0;title\x07 \x1b[2J \x1c \x9b2J\u202e ü\n.")

    assert data.exit_status(fail) == 2
    escaped = "h.\\u2028mlp \\x1b]0;title\\x07 \\x1b[2J \\x1c \\x9b2J\\u202e ü\\n."
    assert capsys.readouterr().err == f"error: {escaped}\n"


def test_an_older_python_is_named_at_once():
    """torch installs on Python 3.10, where a run ended after minutes in a traceback."""
    code = "import sys; sys.version_info = (3, 10, 13, 'final', 0); import data"
    command, folder = [sys.executable, "-c", code], Path(data.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")


# --------------------------------------------------------------------------------------------------
# Worked examples, as the docstrings have them


def test_worked_examples():
    """A docstring that says what the function does not do."""
    assert model.alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert model.alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert model.published_names("bloom", "blocks.3.ffn.up.bias") == ["h.3.mlp.dense_h_to_4h.bias"]
    assert data.group_by_length([5, 9, 1, 7], 100, rows_per_batch=3) == [[1, 3, 0], [2]]
    assert data.group_by_length([5, 9, 1, 7], 18) == [[1, 3], [0, 2]]
    assert lander.union({"en-de": [1, 7], "fr-cs": [1, 2]}) == [1, 2, 7]
    assert model.survivors(torch.tensor([True, False, True, True])).tolist() == [0, 3, 2]
    assert [data.byte_characters()[byte] for byte in (65, 32, 10)] == ["A", "Ġ", "Ċ"]
    assert data.split_pair("en-de") == ("en", "de")
    line = "Ein\u00a0Haus\u3000steht  da."  # no-break and ideographic spaces stay
    assert data.first_line(f"\n  {line} \nGerman: x") == line and data.first_line("a\u2028b") == "a"
    assert data.first_line(" \n ") == data.first_line("") == ""
    (ids,), _, (targets,) = data.make_batch([([5, 6], [7, 2])], pad_id=3)
    assert (ids.tolist(), targets.tolist()) == ([5, 6, 7], [-100, 7, 2])
    meaning = {"S": (3, True, 1), "O": (5, False, None), "V": (2, True)}
    words = demo.toy_words("qaa")
    assert demo.toy_sentence("qaa", words, meaning) == "dida sesas gelied lefa."
    assert demo.toy_sentence("qaa", words, meaning, pidgin=True) == "dida sesa geli lefa."


def test_the_readme_names_tests_that_there_are():
    """A test that was renamed, named as proof."""
    readme = Path(lander.__file__).with_name("README.md").read_text()
    named = {*re.findall(r"`(test_\w+)`", readme)}
    assert len(named) > 10 and named <= globals().keys()


# --------------------------------------------------------------------------------------------------
# Real input, where it is there


@pytest.mark.skipif(not (SHARED / "checkpoints/bloom-mini").exists(), reason="no such checkpoint")
def test_a_real_checkpoint_translates_as_in_transformers():
    """What random weights do not show: scales, long prompts, ends that are learned."""
    folder = SHARED / "checkpoints/bloom-mini"
    ours, theirs = load_model(folder, dtype=torch.float32), load_reference(folder)
    tokenizer, eos_ids = load_tokenizer(folder), [load_tokenizer(folder).eos_id]
    pairs = read_parallel(SHARED / "data/multi30k", "valid", "en-de")[:8]
    prompts = [render(tokenizer, "en-de", source) for source, _ in pairs]
    ((ids, mask, _),) = make_batches(prompts, tokenizer.pad_id, 10**6)
    assert_close(ours(ids, mask), theirs(ids, attention_mask=mask.long()).logits, mask)
    for beams in (1, 4):
        new = ours.generate(ids, mask, 48, eos_ids, beams=beams)
        for prompt, found in zip(unpadded(ids, mask), new):
            alone = torch.tensor([prompt])
            expected = generated(theirs, alone, torch.ones_like(alone), 48, eos_ids, beams)
            assert [found] == expected


@pytest.mark.parametrize("name", ["bloom-style-16k", "baichuan-style-16k"])
@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no ../shared/tokenizers")
def test_real_tokenizers_agree_with_the_libraries(name):
    """What a vocabulary of 500 does not show: merges of whole words, of other alphabets."""
    folder, lines = SHARED / "tokenizers" / name, []
    for code in ("en", "de", "fr", "it", "ar", "zh"):
        lines += data.read_lines(SHARED / "data/flores200" / f"test.{code}")
    if name.startswith("bloom"):
        ours, theirs = compare_ids(folder, lines)
    else:
        ours, model = load_tokenizer(folder), f"{folder}/tokenizer.model"
        theirs = sentencepiece.SentencePieceProcessor(model_file=model)
        assert [ours.encode(line) for line in lines] == theirs.encode(lines)
    assert all(ours.decode(ours.encode(line)) == line for line in lines)
