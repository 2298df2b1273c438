"""Tests on tiny random models, on the CPU, without downloads:  pytest

Each test says which mistake it would catch. Parity with transformers and tokenizers is checked where
they are installed (study/requirements.txt); a few tests use real checkpoints and text where they lie
in ../shared, and skip elsewhere.

In this file, in the order of the method: tiny models; the method in one column; layers and neurons;
parts, groups and routing; training; runs and the command line; the method's rivals; then what it stands on: the decoder
against independent implementations; padding and generation; checkpoints; tokenizers; parallel text,
prompts, batches; worked examples; real input.
"""

import doctest
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

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
from study import compare, demo, fuzz, methods, picture, plan, probe, shapes

SHARED = Path(__file__).resolve().parent.parent / "shared"


# --------------------------------------------------------------------------------------------------
# Tiny models


def randomize(module, seed=0, std=0.15):
    """Every parameter away from its initial value: zero biases and unit norms would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * std
                + ("norm" in name or "ln" in name)
            )
    return module.eval()


def assert_close(ours, theirs, real=None):
    """Largest difference below 2e-5 of the largest logit, on real tokens."""
    ours, theirs = (ours, theirs) if real is None else (ours[real], theirs[real])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def padded_ids(vocabulary, side, lengths=(11, 4, 7)):
    """Ids [B, T] and mask [B, T] with padding on one side."""
    ids = torch.randint(
        4, vocabulary, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)
    )
    rank = torch.arange(max(lengths))
    rank = rank if side == "right" else rank.flip(0)
    return ids, rank < torch.tensor(lengths)[:, None]


BAICHUAN = {
    "model_type": "baichuan", "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "rms_norm_eps": 1e-6,
}  # fmt: skip


LLAMA_LIKE = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# A scaled LLaMA 3 with heads of another size and all biases there can be, and a small Qwen2.5.
TINY_LLAMA_LIKE = {
    "llama": {
        "num_key_value_heads": 2, "head_dim": 10, "rope_scaling": LLAMA3_SCALING,
        "attention_bias": True, "mlp_bias": True,
    },
    "qwen2": {"num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": True},
}  # fmt: skip


def tiny_config(kind, vocabulary=90, layers=2):
    if kind == "bloom":
        sizes = dict(vocab_size=vocabulary, n_embed=32, n_layer=layers, n_head=4)
        return Config.from_json(dict(model_type="bloom", **sizes))
    if kind in TINY_LLAMA_LIKE:
        sizes = dict(model_type=kind, vocab_size=vocabulary, num_hidden_layers=layers)
        return Config.from_json(LLAMA_LIKE | sizes | TINY_LLAMA_LIKE[kind])
    extra = {"max_position_embeddings": 64} if kind == "rotary" else {"model_max_length": 64}
    return Config.from_json(BAICHUAN | extra | {"vocab_size": vocabulary, "normalize_head": True})


def tiny_decoder(kind, seed=0, vocabulary=90, layers=2):
    decoder = Decoder(tiny_config(kind, vocabulary, layers))
    return randomize(decoder, seed, std=0.5)  # wild enough for varied continuations


KINDS = ("bloom", "rotary", "alibi", "llama", "qwen2")


def random_examples(count, vocabulary=90, seed=0, longest=9):
    rng = random.Random(seed)
    ids = lambda: [rng.randrange(4, vocabulary) for _ in range(rng.randint(2, longest))]
    return [(ids(), [*ids(), 2]) for _ in range(count)]


def batched(examples, tokens=10**6):
    return list(make_batches(examples, pad_id=3, tokens_per_batch=tokens))


PAIRS = ["en-de", "fr-en", "en-cs"]


class Letters:
    """A tokenizer of one id a character."""

    eos_id, pad_id = 2, 3
    encode = staticmethod(lambda text: [ord(c) for c in text])


def message(error):
    """The text of an InputError, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# --------------------------------------------------------------------------------------------------
# The method in one column


def test_the_column_at_the_top_of_lander_runs():
    """The example that a student reads first must be the code, and must train what it says."""
    decoder = tiny_decoder("bloom", layers=5)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
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
    after = dict(decoder.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in after if name in before)


# --------------------------------------------------------------------------------------------------
# Layers and neurons


def left_padded(batch):
    """The same batch with its padding on the left."""
    order = batch.mask.long().argsort(dim=1, stable=True)
    return data.Batch(*(tensor.gather(1, order) for tensor in batch))


def test_layer_scores_equal_a_loop_over_prompts():
    """Padding counted, the mean of all tokens instead of the mean of prompts' means, a block's input for its output."""
    decoder = tiny_decoder("rotary")
    prompts = [(prompt, []) for prompt, _ in random_examples(7)]
    expected = torch.zeros(3)
    for prompt, _ in prompts:
        x = decoder.embedding(torch.tensor([prompt]))
        angles = model.rotary_angles(decoder.config, None, len(prompt), len(prompt), "cpu")
        for layer, block in enumerate(decoder.blocks):
            x = block(x, None, angles)
            expected[layer] += x.mean().item() / len(prompts)
    for tokens in (1, 20, 1000):
        means = lander.activation_means(decoder, make_batches(prompts, 3, tokens))
        assert torch.allclose(means, expected, rtol=1e-5, atol=1e-6)
    (batch,) = make_batches(prompts, 3, 1000)
    assert torch.allclose(
        lander.activation_means(decoder, [left_padded(batch)]), expected, rtol=1e-5, atol=1e-6
    )


def test_layer_selection_by_hand():
    """diff[l] scoring layer l instead of l + 1; ties to the higher layer; the first layer selected."""
    differences = lander.layer_differences(torch.tensor([0.0, 2.0, 1.0, 3.0, 3.5]))
    assert differences.tolist() == [2.0, 1.0, 2.0, 0.5]
    assert lander.select_layers(differences, 1) == [1]
    assert lander.select_layers(differences, 2) == [1, 3]
    assert lander.select_layers(differences, 4) == [1, 2, 3, 4]
    with pytest.raises(InputError):
        lander.select_layers(differences, 5)


def brute_force_awareness(decoder, examples, layers):
    """|h * dL/dh| per sentence and token, with every weight taking part in autograd and one leaf a layer."""
    sums, tokens = 0, 0
    for prompt, target in examples:
        kept = {}
        hooks = []
        for layer in layers:

            def keep(module, inputs, layer=layer):
                inputs[0].retain_grad()
                kept[layer] = inputs[0]

            hooks.append(decoder.blocks[layer].ffn.down.register_forward_pre_hook(keep))
        logits = decoder(torch.tensor([prompt + target[:-1]]))[0].log_softmax(-1)
        loss = -sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(target))
        loss.backward()
        for hook in hooks:
            hook.remove()
        sums = sums + torch.stack(
            [(kept[layer] * kept[layer].grad)[0].abs().sum(0).detach() for layer in layers]
        )
        tokens += len(prompt) + len(target) - 1
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


@pytest.mark.parametrize("kind", KINDS)
def test_awareness_equals_brute_force(kind):
    """Labels shifted twice, a mean loss, the absolute value of a sum, padding counted; frozen weights without a graph."""
    decoder = tiny_decoder(kind)
    examples = random_examples(9)
    for layers in ([0, 1], [1], [1, 0]):
        expected = brute_force_awareness(decoder, examples, layers)
        for frozen in (False, True):
            decoder.requires_grad_(not frozen)
            for batches in (
                make_batches(examples, 3, 1),
                make_batches(examples[::-1], 3, 30, seed=1),
                make_batches(examples, 3, 10**6),
                map(left_padded, make_batches(examples, 3, 60)),
            ):
                scores = lander.neuron_awareness(decoder, batches, layers)
                assert scores.shape == expected.shape and scores.dtype == torch.float32
                assert torch.allclose(
                    scores, expected, rtol=1e-3, atol=1e-5 * expected.max().item()
                )
        decoder.requires_grad_(True)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def rank_correlation(a, b):
    a, b = (x.argsort().argsort().double() for x in (a, b))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def copying_decoder():
    """A small model trained to repeat its prompt, and examples of that: a loss that neurons really matter for."""
    torch.manual_seed(0)
    decoder = Decoder(tiny_config("bloom", vocabulary=24))
    rng = random.Random(0)
    words = [[rng.randrange(4, 24) for _ in range(4)] for _ in range(600)]
    examples = [([*word, 0], [*word, 2]) for word in words]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for step in range(300):
        (batch,) = make_batches(rng.sample(examples, 32), 3, 10**6)
        (lander.target_loss(decoder, batch) / (batch.targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder, examples[:64]


def test_awareness_predicts_the_damage_of_removing_a_neuron():
    """A score that ranks neurons by anything else than what they do to the loss."""
    decoder, examples = copying_decoder()
    (batch,) = make_batches(examples, 3, 10**6)
    ffn = decoder.blocks[1].ffn

    @torch.no_grad()
    def sentence_losses():
        logits = decoder(batch.ids).transpose(1, 2)
        return functional.cross_entropy(logits, batch.targets, reduction="none").sum(1)

    (scores,) = lander.neuron_awareness(decoder, [batch], [1])
    whole, damage = sentence_losses(), []
    for neuron in range(len(scores)):
        hook = ffn.down.register_forward_pre_hook(
            lambda down, inputs: (inputs[0].index_fill(-1, torch.tensor(neuron), 0),)
        )
        damage.append((sentence_losses() - whole).abs().mean())
        hook.remove()
    correlation = rank_correlation(scores, torch.stack(damage))
    print(f"rank correlation of awareness and damage: {correlation:.3f}")
    assert correlation > 0.8


# --------------------------------------------------------------------------------------------------
# Parts, groups and routing

TABLE = torch.tensor(
    [[[1.0, 1, 1, 1, 6], [2, 2, 2, 2, 2]], [[30, 10, 10, 10, 40], [1, 2, 2, 2, 3]]]
)  # [2, 2, 5]


def test_categorization_by_hand():
    """Scaled, the rows of layer 0 are .5 .5 .5 .5 3 and 1.5 .5 .5 .5 2; unscaled, pair 1 would own everything."""
    owner = lander.categorize(TABLE, epsilon=0.6)
    assert owner.tolist() == [[1, -1, -1, -1, 0], [0, -1, -1, -1, 1]]
    assert owner.dtype == torch.long
    assert lander.categorize(TABLE, epsilon=1.0).eq(-1).all()
    assert lander.categorize(TABLE, epsilon=0.8).tolist() == [
        [1, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
    ]
    assert lander.categorize(TABLE, epsilon=0.0).ge(0).all()


def test_every_neuron_is_in_exactly_one_group():
    awareness = torch.rand(5, 3, 200, generator=torch.Generator().manual_seed(0))
    owner = lander.categorize(awareness, epsilon=0.9)
    assert owner.shape == (3, 200) and (owner != -1).sum(1).tolist() == [20, 20, 20]
    pairs = ["en-de", "de-en", "en-fr", "fr-en", "en-cs"]
    groups = lander.describe_groups(awareness, owner, pairs, {"en-de": [4, 7], "fr-en": [7, 9]})
    assert list(groups) == ["4", "7", "9"]
    assert [list(group["share"]) for group in groups.values()] == [
        ["en-de"],
        ["en-de", "fr-en"],
        ["fr-en"],
    ]
    for group in groups.values():
        listed = [i for own in group["specific"].values() for i in own]
        assert len(listed) == len(set(listed)) == 20


def test_one_pair_is_an_error():
    with pytest.raises(InputError) as error:
        lander.categorize(torch.rand(1, 2, 10), 0.9)
    assert "one pair only" in message(error)


def test_share_by_hand():
    """Layer 0 of the table: pair 1 has 1.5 on its own neuron and a mean of .5 on the general ones."""
    owner = lander.categorize(TABLE, epsilon=0.6)
    groups = lander.describe_groups(TABLE, owner, ["en-de", "de-en"], {"de-en": [3, 5]})
    assert groups["3"] == {"specific": {"en-de": [4], "de-en": [0]}, "share": {"de-en": 0.25}}
    nothing = lander.describe_groups(
        TABLE, lander.categorize(TABLE, 0.8), ["en-de", "de-en"], {"en-de": [3, 5]}
    )
    assert nothing["3"]["share"] == {"en-de": None}


def random_groups(decoder, selected, seed=0):
    layers = sorted({layer for own in selected.values() for layer in own})
    awareness = torch.rand(
        3, len(layers), decoder.config.ffn_size, generator=torch.Generator().manual_seed(seed)
    )
    return lander.describe_groups(awareness, lander.categorize(awareness, 0.7), PAIRS, selected)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole(kind):
    """What everything rests on: an FFN is a sum over its neurons. A gate's bias forgotten, a neuron lost."""
    decoder = tiny_decoder(kind)
    ffn = decoder.blocks[0].ffn
    F = ffn.up.out_features
    x = torch.randn(2, 3, ffn.up.in_features, generator=torch.Generator().manual_seed(1))
    order = list(range(F))
    random.Random(0).shuffle(order)
    for cuts in ([0, F], [0, 7, 7, 20, F], [0, *range(1, F + 1)]):
        parts = [ffn.part(order[a:b], torch.float32) for a, b in zip(cuts, cuts[1:])]
        y = sum(part(x) for part in parts)
        assert_close(y if ffn.down.bias is None else y + ffn.down.bias, ffn(x))
        assert sum(p.numel() for part in parts for p in part.parameters()) == sum(
            p.numel() for name, p in ffn.named_parameters() if name != "down.bias"
        )
    names = {name for name, _ in ffn.named_parameters()} - {"down.bias"}
    assert names <= set(model.NEURON_DIMENSION) and names == {
        name for name, _ in parts[0].named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_routed_ffn_can_be_made_whole_again(kind):
    """Neurons put back in other places; general ones that were trained, lost."""
    decoder = tiny_decoder(kind)
    ffn = decoder.blocks[0].ffn
    specific = {"en-de": [5, 2], "fr-en": [7], "en-cs": []}
    routed = lander.RoutedFFN(ffn, specific, {"en-de": None, "en-cs": None})
    for name, weight in routed.whole().state_dict().items():
        assert torch.equal(weight, ffn.state_dict()[name])
    with torch.no_grad():
        routed.specific["en-de"].up.weight += 1.0
    changed = (routed.whole().up.weight != ffn.up.weight).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 5]


def test_a_part_is_a_copy_in_its_own_type():
    """Training a part must not write into the FFN that it was taken from, nor into the checkpoint's file."""
    ffn = tiny_decoder("bloom").bfloat16().blocks[0].ffn
    before = ffn.up.weight.detach().clone()
    part = ffn.part([3, 1], torch.float32)
    assert (
        torch.equal(part.up.weight, before[[3, 1]].float())
        and part.up.weight.dtype == torch.float32
    )
    part.up.weight.data.fill_(9)
    assert torch.equal(ffn.up.weight, before)
    assert part(torch.ones(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_computes_in_16_bits_with_a_multiple_of_8(kind):
    """Rows that no fast kernel reads; zero neurons that add something, or that are saved with the part."""
    torch.manual_seed(0)
    decoder = randomize(tiny_decoder(kind))
    part = decoder.blocks[0].ffn.part(list(range(13)), torch.float32)
    exact = decoder.blocks[0].ffn.part(list(range(13)), torch.float32)
    for linear in (exact.gate, exact.up, exact.down):
        if linear is not None:
            linear.zero_rows = linear.zero_columns = 0
    read = []
    part.down.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    x = torch.randn(5, decoder.config.hidden_size).bfloat16()
    y = part(x)
    torch.testing.assert_close(y, exact(x))
    y.square().sum().backward()
    exact(x).square().sum().backward()
    assert read[0].shape == (5, 16) and not read[0][:, 13:].any()
    for (name, one), two in zip(part.named_parameters(), exact.parameters()):
        assert one.shape == two.shape and 13 in one.shape, name
        torch.testing.assert_close(one.grad, two.grad, rtol=0.02, atol=0.02)
    part(x.float())
    assert read[1].shape == (5, 13)


def test_generation_casts_weights_once(monkeypatch):
    """A cast of the trained parts at every token, 17% of the time; or a cast that outlives them."""
    decoder = tiny_decoder("bloom").bfloat16()
    lander.install_routing(decoder, random_groups(decoder, {"en-de": [0, 1]}))
    lander.route(decoder, "en-de")
    calls, operands = [], model.Linear.operands
    monkeypatch.setattr(
        model.Linear, "operands", lambda self, dtype: calls.append(self) or operands(self, dtype)
    )
    ids = torch.tensor([[5, 6, 7]])
    before = decoder.generate(ids, None, 9, eos_id=89)
    assert (
        len(set(calls)) == len(calls) == sum(isinstance(m, model.Linear) for m in decoder.modules())
    )
    logits = decoder(ids)
    with torch.no_grad():
        decoder.blocks[1].ffn.general.up.weight.mul_(-3)
    assert not torch.equal(decoder(ids), logits)
    assert before != decoder.generate(ids, None, 9, eos_id=89)


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_freshly_routed_model_is_the_pretrained_one(kind, routing):
    """A neuron in two groups or none, a bias counted twice, factors that do not start at one."""
    decoder = tiny_decoder(kind)
    ids, mask = padded_ids(90, "left")
    expected = decoder(ids, mask)
    groups = random_groups(decoder, {"en-de": [0, 1], "fr-en": [1]})
    lander.install_routing(decoder, groups, routing)
    for pair in (None, *PAIRS):
        lander.route(decoder, pair)
        assert_close(decoder(ids, mask), expected, mask)


@pytest.mark.parametrize("share", [1e-6, 1e-3, 0.3, 0.999, 1 - 1e-6])
def test_the_routed_start_is_exact_for_any_share(share):
    """1 - CAR as a difference is 0.95 / 1 of what it must be at a share of 1 - 1e-6."""
    ffn = tiny_decoder("bloom").blocks[0].ffn
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    routed = lander.RoutedFFN(ffn, {"en-de": [0, 5, 9], "fr-en": [1]}, {"en-de": share})
    routed.pair = "en-de"
    assert list(routed.share) == ["en-de"]
    assert_close(routed(x), ffn(x))


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
    x = torch.randn(2, 3, ffn.up.in_features, generator=torch.Generator().manual_seed(1))
    routed = lander.RoutedFFN(ffn, specific, share)
    for pair in share:
        torch.manual_seed(2)
        routed.router[pair].data.normal_()
        w, s = routed.router[pair].data, share[pair]
        car = 1 / (1 + torch.exp(-(x @ w + torch.log(torch.tensor(s / (1 - s))))))[..., None]
        owned = torch.zeros(ffn.up.out_features, dtype=torch.bool)
        owned[specific[pair]] = True
        general = torch.ones_like(owned)
        general[[i for own in specific.values() for i in own]] = False
        factor = torch.ones(2, 3, ffn.up.out_features)
        # Equation 7: CAR weighs the general branch, 1 - CAR the specific one.
        factor = torch.where(general, car / s, torch.where(owned, (1 - car) / (1 - s), factor))
        up = factor * (x @ ffn.up.weight.T) + (0 if ffn.up.bias is None else ffn.up.bias)
        if ffn.gate is None:
            h = functional.gelu(up, approximate="tanh")
        else:
            bias = 0 if ffn.gate.bias is None else ffn.gate.bias
            gate = factor * (x @ ffn.gate.weight.T) + bias
            h = gate * torch.sigmoid(gate) * up
        routed.pair = pair
        assert_close(routed(x), ffn.down(h))


# --------------------------------------------------------------------------------------------------
# Training


def tunable(kind="bloom", selected={"en-de": [0, 1], "fr-en": [1]}, routing=True):
    decoder = tiny_decoder(kind)
    lander.install_routing(decoder, random_groups(decoder, selected), routing)
    return decoder


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
    learn = set()
    for name, _ in decoder.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if layer in {"en-de": [0, 1], "fr-en": [1]}[pair]:
            learn |= {name} if f".{pair}" in name or ".ffn.general." in name else set()
    return learn


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_batchs_neurons_move(kind, routing):
    """A gradient multiplied by zero still lets AdamW decay and move the row; another pair's neurons train along."""
    decoder = tunable(kind, routing=routing)
    checkpoint = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    learners, optimizer = adamw(decoder)
    with_gradient = set()
    for name, p in decoder.named_parameters():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda p, name=name: with_gradient.add(name))
    moved_by = {}
    for pair in ("en-de", "fr-en"):
        before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
        for seed in range(20):
            with_gradient.clear()
            step(decoder, pair, batched(random_examples(6, seed=seed), 40), learners, optimizer)
            assert with_gradient == learning_names(decoder, pair) == set(learners[pair])
        assert all(p.grad is None for p in decoder.parameters())
        moved_by[pair] = {
            name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])
        }
        assert moved_by[pair] == learning_names(decoder, pair)
    moved = moved_by["en-de"] | moved_by["fr-en"]
    frozen = {name for name in checkpoint if name not in moved}
    assert len(frozen) > 15
    assert all(torch.equal(checkpoint[name], decoder.get_parameter(name)) for name in frozen)
    assert {id(p) for p in optimizer.state} == {id(decoder.get_parameter(name)) for name in moved}
    assert set(lander.merged(learners)) == moved


def test_frozen_weights_equal_the_checkpoint_bit_for_bit():
    """Regrouping must not touch what it does not train: the rest group is the checkpoint's own rows, in its own type."""
    decoder = tiny_decoder("rotary").bfloat16()
    original = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    groups = random_groups(decoder, {"en-de": [1]})
    lander.install_routing(decoder, groups)
    learners, optimizer = adamw(decoder)
    for seed in range(5):
        step(decoder, "en-de", batched(random_examples(4, seed=seed), 100), learners, optimizer)
    assert {p.dtype for p in learners["en-de"].values()} == {torch.float32}
    others = sorted(groups["1"]["specific"]["fr-en"] + groups["1"]["specific"]["en-cs"])
    rest = decoder.blocks[1].ffn.rest
    for part, rows in (
        ("up", rest.up.weight),
        ("gate", rest.gate.weight),
        ("down", rest.down.weight.T),
    ):
        weight = original[f"blocks.1.ffn.{part}.weight"]
        assert (
            torch.equal(rows, (weight.T if part == "down" else weight)[others])
            and rows.dtype == torch.bfloat16
        )
    for name, p in decoder.named_parameters():
        if ".ffn." not in name or name.startswith("blocks.0."):
            assert torch.equal(p, original[name])


def test_any_parameters_can_be_trained():
    """A baseline that trains all weights, or some matrices, uses the same steps: nothing asks for a RoutedFFN."""
    decoder = tiny_decoder("bloom")
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    chosen = {name: p for name, p in decoder.named_parameters() if ".attention.output." in name}
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2, fused=True)
    settings = lander.Settings(steps=4, batch=3, lr=1e-2)
    examples = {"en-de": random_examples(9), "fr-en": random_examples(6, seed=1)}
    learners = dict.fromkeys(examples, chosen)
    entries = list(lander.training_steps(decoder, Letters, learners, examples, optimizer, settings))
    assert [(entry["step"], entry["pair"]) for entry in entries] == [
        (1, "en-de"), (2, "fr-en"), (3, "en-de"), (4, "fr-en"),
    ]  # fmt: skip
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(chosen) and len(moved) == 4


def test_accumulated_micro_batches_equal_one_batch():
    """A mean of means weighs the tokens of a short micro-batch more."""
    examples = random_examples(12)
    gradients = []
    for tokens in (10**6, 40):
        decoder = tunable()
        learners, optimizer = adamw(decoder)
        batches = batched(examples, tokens)
        kept = {}
        for name, p in learners["en-de"].items():
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: kept.update({name: p.grad.clone()})
            )
        loss, norm = step(decoder, "en-de", batches, learners, optimizer)
        gradients.append((len(batches), loss, norm, kept))
    (one, loss, norm, whole), (four, loss_4, norm_4, accumulated) = gradients
    assert one == 1 and four >= 4
    assert abs(loss - loss_4) < 1e-5 * loss and abs(norm - norm_4) < 1e-4 * norm
    assert len(whole) == len(accumulated) == len(learners["en-de"])
    for name in whole:
        assert torch.allclose(
            whole[name], accumulated[name], rtol=1e-3, atol=1e-5 * whole[name].abs().max().item()
        )


def test_checkpointing_changes_no_gradient():
    """Recomputing a block without its routing or its bias."""
    gradients = []
    for checkpointing in (False, True):
        decoder = tunable().requires_grad_(False)
        lander.route(decoder, "en-de")
        for parameter in lander.what_learns(decoder, "en-de").values():
            parameter.requires_grad_(True)
        decoder.checkpointing = checkpointing
        (batch,) = batched(random_examples(5))
        lander.target_loss(decoder, batch).backward()
        gradients.append(
            {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        )
    plain, recomputed = gradients
    assert set(plain) == set(recomputed) == learning_names(decoder, "en-de")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_examples_over_the_limit_are_left_out_of_their_step():
    """They are found when their step comes: another one in their place would change every later step."""
    decoder = tiny_decoder("bloom", vocabulary=128)
    text = [("a" * length, "b") for length in (1, 60, 2, 60)]
    examples = lander.Examples(Letters, "en-de", text, 100)
    assert [examples[i] is None for i in range(4)] == [False, True, False, True]
    assert (examples.read, examples.skipped) == (4, 2)
    learners = {"en-de": dict(decoder.named_parameters())}
    settings = lander.Settings(steps=4, batch=1, lr=1e-2)
    optimizer = torch.optim.AdamW(decoder.parameters())
    before, moved, losses = decoder.embedding.weight.detach().clone(), [], []
    arguments = learners, {"en-de": examples}, optimizer, settings
    for entry in lander.training_steps(decoder, Bytes, *arguments):
        moved.append(not torch.equal(before, decoder.embedding.weight))
        before = decoder.embedding.weight.detach().clone()
        losses.append(entry["loss"])
    assert sum(moved) == 2 and [loss > 0 for loss in losses] == moved


def test_pairs_alternate_and_an_epoch_is_every_example_once():
    examples = {"en-de": [("a", i) for i in range(7)], "fr-en": [("b", i) for i in range(3)]}
    steps = list(itertools.islice(lander.schedule(examples, 2, seed=0), 12))
    assert [pair for pair, _ in steps[:6]] == ["en-de", "fr-en", "en-de", "fr-en", "en-de", "en-de"]
    for epoch in (steps[:6], steps[6:]):
        for pair, own in examples.items():
            numbers = [number for of, batch in epoch if of == pair for number in batch]
            assert sorted(numbers) == list(range(len(own)))
    assert steps[:6] != steps[6:], "each epoch is shuffled anew"
    assert steps == list(itertools.islice(lander.schedule(examples, 2, seed=0), 12))


def test_learning_rate_by_hand():
    rates = [lander.learning_rate(step, 100, 1.0) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[4] == rates[5] == 1.0
        and rates[99] == pytest.approx(1 / 95)
    )
    assert max(rates) == 1.0 and lander.learning_rate(0, 1, 1.0) == 1.0


# --------------------------------------------------------------------------------------------------
# Runs and the command line


def word_tokenizer(lines):
    """Contents of a tokenizer.json like BLOOM's that knows the words of some lines, each whole."""
    characters = data.byte_characters()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {token: id for id, token in enumerate([*special, *characters.values()])}
    merges, split = [], data.piece_pattern(data.BLOOM_SPLIT).split
    for piece in dict.fromkeys(piece for line in lines for piece in split(line)):
        word = "".join(characters[byte] for byte in piece.encode())
        for end in range(2, len(word) + 1):  # one character after the other
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append([word[: end - 1], word[end - 1]])
    return fuzz.tokenizer_json(vocabulary, merges)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny BLOOM checkpoint with a tokenizer, and multi-way text in the toy languages."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    meanings = demo.toy_meanings(70, seed=0)
    splits = {"train": meanings[:40], "valid": meanings[40:50], "test": meanings[50:]}
    for split, said in splits.items():
        for code, lines in demo.toy_text(said).items():
            (folder / "data" / f"{split}.{code}").write_text("".join(f"{line}\n" for line in lines))
    prompts = [data.prompt_text("qaa-qab", sentence) for sentence in demo.toy_text(meanings)["qaa"]]
    tokenizer = word_tokenizer(prompts)
    size = len(tokenizer["model"]["vocab"]) + 20
    decoder = Decoder(
        Config.from_json(dict(model_type="bloom", vocab_size=size, n_embed=32, n_layer=4, n_head=4))
    )
    with torch.no_grad():
        randomize(decoder).final_norm.bias.zero_()  # which would make it repeat one token
    save_model(decoder, folder / "weights")
    (folder / "weights" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def arguments(world, *more, pair="qaa-qab"):
    return ["--pair", pair, "--weights", str(world / "weights"), "--data", str(world / "data"), "--layers", "2",
            "--lr", "1e-2", "--batch", "8", "--score-sentences", "10", "--eval-sentences", "4", "--max-tokens", "120",
            "--score-pairs", "qaa-qab,qac-qab,qab-qaa", "--out", "run", *more]  # fmt: skip


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_end_to_end(world, tmp_path, monkeypatch, capsys):
    """Every stage, with two pairs, all flags that change the work, and what the run folder must hold."""
    monkeypatch.chdir(tmp_path)
    more = ["--eval-pairs", "all", "--steps", "7", "--beams", "2", "--micro-tokens", "300", "--checkpointing", "--seed", "3",
            "--epsilon", "0.5", "--device", "cpu", "--dtype", "bfloat16"]  # fmt: skip
    assert lander.main(arguments(world, *more, pair="qaa-qab,qac-qab")) == 0
    out = capsys.readouterr().out
    table = [
        line for line in out.splitlines() if line.endswith("  tuned") or line.startswith("pair ")
    ]
    assert len(table) == 3 and max(map(len, table)) <= 80
    run = tmp_path / "run"
    pairs = list_pairs(world / "data", "test")
    assert set(contents(run)) == {
        "args.json", "layers.json", "awareness.safetensors", "neurons.json", "tuned.safetensors", "log.jsonl",
        "results.json", "lock",
        *(f"hypotheses/{pair}.{name}.txt" for pair in pairs for name in ("before", "after", "source", "reference")),
    }  # fmt: skip
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert [line["pair"] for line in log[1:-1]] == ["qaa-qab", "qac-qab"] * 3 + ["qaa-qab"]
    assert set(log[0]["valid_loss"]) == {"qaa-qab", "qac-qab"}
    assert json.loads((run / "args.json").read_text())["beams"] == 2
    results = json.loads((run / "results.json").read_text())
    assert list(results) == pairs and set(results["qaa-qab"]) == {"before", "after"}


def test_output_fits_into_80_columns(world, tmp_path, monkeypatch, capsys):
    """A line of layers of 250 columns; results that are shown twice. With all twelve pairs tuned."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--steps",
        "12",
        "--eval-pairs",
        "all",
        "--score-pairs",
        "all",
        "--eval-sentences",
        "1",
    ]
    assert lander.main(arguments(world, *words, pair="all")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 60
    assert len([line for line in lines if line.endswith("  tuned")]) == 12
    (losses,) = [i for i, line in enumerate(lines) if "loss of a validation token" in line]
    assert " to " in lines[losses]
    assert len([line for line in lines if line.startswith(("mean, tuned", "mean, others"))]) == 1
    assert lander.main(["--translate", "/dev/null", "--tuned", "run", "--pair", "qab-qac"]) == 0


@pytest.mark.parametrize(
    "kind, tokenizer, has_biases",
    [("rotary", "baichuan", False), ("llama", "llama", True), ("qwen2", "Qwen2", False)],
)
def test_a_run_on_other_families(
    world, tokenizer_folders, tmp_path, monkeypatch, kind, tokenizer, has_biases
):
    """A step that knows only BLOOM: no gate, no biases, tokenizer.json, no beginning of a prompt."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_decoder(kind, vocabulary=520, layers=4), tmp_path / "weights")
    files = {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}} if kind == "llama" else {}
    with_files(tokenizer_folders[tokenizer], tmp_path / "weights", **files)
    words = arguments(world, "--weights", "weights", "--max-tokens", "400", "--steps", "4")
    assert lander.main([*words, "--no-routing"]) == 0
    trained = load_file("run/tuned.safetensors")
    assert any("bias" in name for name in trained) == has_biases
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert log[-1]["valid_loss"]["qaa-qab"] < log[0]["valid_loss"]["qaa-qab"]
    assert lander.main(["--tuned", "run", "--export", "exported"]) == 0
    exported, original = load_model("exported"), load_model("weights")
    for name, parameter in exported.named_parameters():
        same = torch.equal(parameter, original.get_parameter(name))
        layer = name.split(".")[1] if name.startswith("blocks") else ""
        tuned_ffn = any(own.startswith(f"blocks.{layer}.ffn") for own in trained) and ".ffn." in name
        assert same == (not tuned_ffn or name.endswith("down.bias")), name
    assert load_tokenizer("exported").prompt_prefix == [1] * (kind == "llama")


def test_training_lowers_the_loss_and_routing_can_be_switched_off(world, tmp_path, monkeypatch):
    """A pipeline that trains nothing reports tidy tables too."""
    monkeypatch.chdir(tmp_path)
    finals = {}
    for name in ("routed", "plain"):
        assert (
            lander.main(
                arguments(
                    world, "--out", name, "--epsilon", "0.8", *["--no-routing"] * (name == "plain")
                )
            )
            == 0
        )
        log = [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        assert log[-1]["valid_loss"]["qaa-qab"] < log[0]["valid_loss"]["qaa-qab"] - 0.3
        tensors = load_file(tmp_path / name / "tuned.safetensors")
        routers = [name for name in tensors if ".router." in name]
        assert len(routers) == (2 if name == "routed" else 0)
        assert all(tensors[router].abs().sum() > 0 for router in routers)
        finals[name] = log[-1]["valid_loss"]
    assert finals["routed"] != finals["plain"]


def test_reported_scores_are_sacrebleus_own(world, tmp_path, monkeypatch):
    """Hypotheses out of order or escaped on their way to the file."""
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--steps", "3", "--eval-sentences", "0")) == 0
    results = json.loads(Path("run/results.json").read_text())["qaa-qab"]
    for when in ("before", "after"):
        command = [sys.executable, "-m", "sacrebleu", world / "data" / "test.qab", "-i", f"run/hypotheses/qaa-qab.{when}.txt",
                   "-m", "bleu", "chrf", "-w", "10", "-l", "qaa-qab"]  # fmt: skip
        bleu, chrf = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
        assert (round(results[when]["bleu"], 10), round(results[when]["chrf"], 10)) == (
            bleu["score"],
            chrf["score"],
        )
        assert results[when]["bleu_signature"] == bleu["signature"]


@pytest.mark.parametrize("epsilon", ["0", "1"])
def test_groups_may_be_empty(world, tmp_path, monkeypatch, epsilon):
    """No specific neuron at all, or no general one: no share to divide by, groups of no rows."""
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--epsilon", epsilon, "--steps", "3")) == 0
    assert all(tensor.isfinite().all() for tensor in load_file("run/tuned.safetensors").values())


@pytest.mark.parametrize(
    "pair, name", [("en-zh", "zh"), ("en-ja", "ja-mecab"), ("en-ko", "ko-mecab"), ("zh-en", "13a")]
)
def test_bleu_tokenizer_follows_the_target(pair, name):
    """13a on Chinese or Japanese counts whole sentences as words."""
    metric = lander.make_metrics(pair)["bleu"]
    metric.corpus_score(["这 is a 本"], [["这 is a 书"]])
    assert f"tok:{name}" in str(metric.get_signature())


class Interrupt:
    """Raise KeyboardInterrupt when a function of lander is called for the nth time."""

    def __init__(self, monkeypatch, name, count):
        self.call, self.left = getattr(lander, name), count
        monkeypatch.setattr(lander, name, self)

    def __call__(self, *arguments, **keywords):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.call(*arguments, **keywords)


@pytest.mark.parametrize(
    "name, count",
    [("activation_means", 1), ("neuron_awareness", 2), ("categorize", 1), ("translate_lines", 1), ("validation_loss", 1),
     ("train_step", 1), ("train_step", 4), ("save_state", 2), ("validation_loss", 2), ("translate_lines", 2), ("write_json", 4)],
)  # fmt: skip
def test_an_interrupted_and_resumed_run_ends_in_the_same_bytes(
    world, tmp_path, monkeypatch, capsys, name, count
):
    """Batches drawn anew, moments lost, a log line twice, a half-written file taken for a whole one."""
    monkeypatch.setattr(lander, "SAVE_EVERY", 0)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert lander.main(arguments(world)) == 0
    monkeypatch.chdir(tmp_path / "parts")
    with monkeypatch.context() as patch:
        Interrupt(patch, name, count)
        assert lander.main(arguments(world)) == 130
    assert "--resume" in capsys.readouterr().err
    assert not list(Path().rglob("*.half-written"))
    assert lander.main(arguments(world, "--resume")) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def run_command(*arguments, **keywords):
    command = [sys.executable, lander.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **keywords)


def test_ctrl_c_ends_in_a_second(world, tmp_path):
    """An interrupt that waits for the end of the epoch, or ends in a traceback."""
    command = [sys.executable, lander.__file__, *arguments(world, "--steps", "100000")]
    restore = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )
    for line in process.stdout:
        if "Training" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and time.monotonic() - start < 5
    )  # shared machines are slow at times
    assert "Traceback" not in err and "--steps 100000 --resume" in err


def test_translating_with_a_finished_run(world, tmp_path, monkeypatch, capsys):
    """A line lost or out of order; the frozen model instead of the tuned one."""
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world)) == 0
    lines = (world / "data" / "test.qaa").read_text().splitlines()[:4]
    Path("input").write_text(f"{lines[0]}\n\n{lines[1]}\n{lines[2]}\n \n{lines[3]}")
    capsys.readouterr()
    translate = ["--pair", "qaa-qab", "--tuned", "run", "--max-tokens", "120", "--translate"]
    assert lander.main([*translate, "input"]) == 0
    captured = capsys.readouterr()
    out = captured.out.split("\n")
    after = Path("run/hypotheses/qaa-qab.after.txt").read_text().splitlines()
    assert (
        out == [after[0], "", after[1], after[2], "", after[3], ""]
        and "not tuned" not in captured.err
    )
    assert after != Path("run/hypotheses/qaa-qab.before.txt").read_text().splitlines()
    piped = run_command(*translate, "-", input=Path("input").read_text(), cwd=tmp_path)
    assert piped.stdout.split("\n") == out
    assert lander.main(["--pair", "qab-qac", *translate[2:], "input"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split("\n")) == 7 and "qab-qac was not tuned" in captured.err


def torchrun(processes, *words):
    """The command that runs lander.py in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*command, str(processes), lander.__file__, *words]


def assert_same_result(folder, other):
    """What runs on different numbers of processes have in common."""
    for name in ("layers.json", "neurons.json", "awareness.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    for path in sorted((folder / "hypotheses").iterdir()):
        assert path.read_text() == (other / "hypotheses" / path.name).read_text()
    for tensors in zip(
        *(data.read_tensors(run / "tuned.safetensors").items() for run in (folder, other))
    ):
        (name, one), (same_name, two) = tensors
        assert name == same_name and (one - two).norm() <= 1e-5 * one.norm()
    losses = []
    for run in (folder, other):
        log = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        losses.append([entry["loss"] if "loss" in entry else entry["valid_loss"] for entry in log])
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert json.loads((folder / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text()
    )


@pytest.mark.parametrize("processes, batch", [(2, 8), (3, 2)])
def test_the_number_of_processes_does_not_matter(
    world, tmp_path, monkeypatch, capfd, processes, batch
):
    """A mean of means; a share counted twice; a process without a sentence that moves other neurons."""
    monkeypatch.chdir(tmp_path)
    words = arguments(world, "--batch", str(batch), "--steps", "6", pair="qaa-qab,qac-qab")
    assert lander.main([*words, "--out", "alone"]) == 0
    alone = capfd.readouterr().out
    subprocess.run(torchrun(processes, *words), check=True)
    assert_same_result(tmp_path / "alone", tmp_path / "run")
    shown = [text.split("It took")[0] for text in (alone, capfd.readouterr().out)]
    assert shown[0] == shown[1], "one process alone prints"


def test_a_process_that_dies_ends_all_and_another_number_goes_on(
    world, tmp_path, monkeypatch, capfd
):
    """The others waiting for it for half an hour; a state that belongs to a number of processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lander, "SAVE_EVERY", 0)
    words = arguments(world, "--steps", "6", pair="qaa-qab,qac-qab")
    assert lander.main([*words, "--out", "alone"]) == 0
    Interrupt(monkeypatch, "train_step", 4)
    assert lander.main(words) == 130
    capfd.readouterr()
    # SIGKILL to the second of two, in the middle of its first step.
    script = tmp_path / "dies.py"
    script.write_text(DIES.format(root=str(Path(lander.__file__).parent)))
    began = time.monotonic()
    command = torchrun(2, *words, "--resume")
    command[command.index(lander.__file__)] = str(script)
    assert subprocess.run(command).returncode != 0
    assert time.monotonic() - began < 60
    failed = [line for line in capfd.readouterr().err.splitlines() if " failed (exitcode: " in line]
    assert len(failed) == 1 and "-9" in failed[0] and "local_rank: 1" in failed[0]
    assert subprocess.run(torchrun(3, *words, "--resume")).returncode == 0
    assert_same_result(tmp_path / "alone", tmp_path / "run")
    assert subprocess.run(torchrun(2, *words)).returncode != 0
    assert capfd.readouterr().err.count("error: run: holds a run already") == 1


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import lander


def dies(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)


step, lander.train_step = lander.train_step, dies
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(lander.main())
"""

ON_PRETEND = """
import sys
from study import pretend

library = pretend.register()
import torch
import lander

step, calls = lander.train_step, []


def interrupted(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return step(*arguments)


words = sys.argv[1:]
translate = ["--tuned", "run", "--pair", "qaa-qab", "--beams", "2", "--translate", "input"]
with pretend.OnPretend():
    try:
        torch.ones(2, device="pretend") + torch.ones(2)
    except RuntimeError as error:
        assert "is on the CPU" in str(error)
    else:
        sys.exit("tensors of two devices were mixed")
    lander.SAVE_EVERY, lander.train_step = 0, interrupted
    assert lander.main(words) == 130
    lander.train_step = step
    assert lander.main([*words, "--resume"]) == 0
    assert lander.main([*translate, *words[:4]]) == 0
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_that_is_not_the_cpu(world, tmp_path, monkeypatch, dtype):
    """A tensor left on the CPU: the first user with CUDA would be the one to find it."""
    monkeypatch.chdir(tmp_path)
    words = ["--device", "pretend", "--dtype", dtype, "--beams", "2", "--steps", "4"]
    words += arguments(world, "--eval-sentences", "2", pair="qaa-qab,qac-qab")
    Path("input").write_text("\n".join((world / "data" / "test.qaa").read_text().split("\n")[:2]))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    command = [sys.executable, "-c", ON_PRETEND, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lander.main([*words, "--device", "cpu", "--out", "here"]) == 0
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    losses = []
    for folder in ("run", "here"):
        log = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance) and len(losses[0]) == 4


def test_an_exported_run_is_a_published_checkpoint(world, tmp_path, monkeypatch, capsys):
    """Neurons in other places than they came from; the frozen model; weights rounded on the way."""
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--no-routing", "--steps", "3")) == 0
    words = ["--tuned", "run", "--export"]
    assert lander.main([*words, "exported"]) == 0, capsys.readouterr().err
    settings = lander.Settings(tuned="run", export="exported")
    run = Path("run")
    tuned, tokenizer, _ = lander.load_tuned(run, lander.finished_args(run), settings)
    exported = load_model("exported")
    ids = torch.randint(4, tokenizer.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_close(exported(ids), tuned(ids))
    base = load_model(world / "weights", dtype=torch.float32)
    assert not torch.allclose(exported(ids), base(ids), atol=1e-3)
    assert torch.equal(exported.embedding.weight, base.embedding.weight)
    expected = (world / "weights" / "tokenizer.json").read_bytes()
    assert Path("exported/tokenizer.json").read_bytes() == expected
    assert lander.main([*words, "exported"]) == 2
    assert "exported: not empty" in capsys.readouterr().err
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    assert_close(exported(ids), theirs(ids).logits)


def test_a_routed_run_is_not_exported(finished, tmp_path, capsys):
    """Written without its routers it would be another model."""
    assert lander.main(["--tuned", str(finished), "--export", str(tmp_path / "exported")]) == 2
    assert "its tokens are routed" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_a_loss_that_is_no_number_stops_the_run(world, tmp_path, monkeypatch, capsys):
    """NaN weights saved over the last good state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lander, "SAVE_EVERY", 0)
    step, calls = lander.train_step, []

    def poisoned(decoder, batches, optimizer, learners):
        calls.append(1)
        if len(calls) == 3:
            decoder.blocks[3].ffn_norm.weight.data.fill_(float("nan"))
        return step(decoder, batches, optimizer, learners)

    monkeypatch.setattr(lander, "train_step", poisoned)
    assert lander.main(arguments(world)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "step 3" in line and "nan" in line and "state.safetensors" in line
    assert "a lower --lr and another --out" in line, "--resume refuses another --lr"
    state = load_file("run/state.safetensors")
    assert state["step"] in (1, 2) and all(tensor.isfinite().all() for tensor in state.values())
    assert not Path("run/tuned.safetensors").exists()


def translations(decoder, sources, **settings):
    """What translate_lines makes of sources, with an all-byte tokenizer. -> lines, how many were cut"""
    settings = lander.Settings(**settings)
    found = list(
        lander.translate_lines(decoder, Bytes, "en-de", [*enumerate(sources)], settings, "x")
    )
    lines = {number: line for number, line, _ in found}
    return [lines[i] for i in range(len(sources))], sum(cut for _, _, cut in found)


class Bytes:
    """A tokenizer of one id a byte."""

    eos_id, pad_id, vocab_size = 0, 1, 128
    encode = staticmethod(lambda text: list(text.encode("ascii", "replace")))
    decode = staticmethod(lambda ids: bytes(ids).decode("latin-1"))


@pytest.mark.parametrize("beams", [1, 2])
def test_translations_do_not_depend_on_their_neighbours(beams, monkeypatch):
    """Cut at a training limit, or at the longest neighbour's; other tokens with other passes; loops not counted."""
    decoder = tiny_decoder("bloom", vocabulary=128)
    sources = ["a", "", "a longer one, longer than the others", "two words", " ", "b" * 40]
    expected, cut = translations(decoder, sources, beams=beams)
    assert cut > 0 and expected[1] == expected[4] == "" and max(map(len, expected)) > 64
    for cache_gb in (0, 3e-4, 1):
        for max_tokens in (8, 256):
            options = dict(cache_gb=cache_gb, max_tokens=max_tokens, beams=beams)
            assert translations(decoder, sources, **options) == (expected, cut)
    monkeypatch.setattr(lander, "ROWS_AT_ONCE", 3)
    assert translations(decoder, sources, beams=beams) == (expected, cut)
    alone = [translations(decoder, [source], beams=beams) for source in sources]
    assert [lines[0] for lines, _ in alone] == expected and sum(cut for _, cut in alone) == cut


def test_a_source_too_long_for_the_model_is_an_empty_line_and_a_note(capsys):
    """Attention over one line of 10,000 tokens takes tens of gigabytes, and ends all."""
    decoder = tiny_decoder("bloom", vocabulary=128)
    (short, long), _ = translations(decoder, ["a", "b" * 5000])
    assert short and long == ""
    assert "line 2" in capsys.readouterr().err
    settings = lander.Settings()
    list(lander.translate_lines(decoder, Bytes, "en-de", [(1000, "b" * 5000)], settings, "x"))
    assert "line 1001" in capsys.readouterr().err, "a later thousand of --translate counts on"


def end_before_tuned(monkeypatch, words):
    """A run that is interrupted when its training was saved."""
    with monkeypatch.context() as patch:
        patch.setattr(lander, "SAVE_EVERY", 0)
        Interrupt(patch, "train_step", 4)
        assert lander.main(words) == 130


@pytest.mark.parametrize("name, change", [
    ("test.qab", lambda text: text.replace("a", "e")), ("train.qaa", lambda text: text.replace("a", "e")),
    ("test.qaa", lambda text: text + "one more\n"), ("valid.qab", lambda text: text[:-1]),
])  # fmt: skip
def test_resuming_on_other_data_names_the_file(world, tmp_path, monkeypatch, capsys, name, change):
    """Old hypotheses scored against new references; another model, and no message."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "data", "data")
    words = arguments(world, "--data", "data")
    end_before_tuned(monkeypatch, words)
    before, path = contents(Path("run")), Path("data", name)
    text = path.read_text()
    path.write_text(change(text))
    if name == "test.qaa":
        Path("data/test.qab").write_text(Path("data/test.qab").read_text() + "one more\n")
    capsys.readouterr()
    assert lander.main([*words, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"data/{name} has changed" in line
        or "data/test.qab has changed" in line
        and name == "test.qaa"
    )
    assert contents(Path("run")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_resuming_on_other_weights_names_the_file(world, tmp_path, monkeypatch, capsys, name):
    """A checkpoint of the same shapes whose header differs; another beginning of every prompt."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "weights", "weights")
    words = arguments(world, "--weights", "weights")
    end_before_tuned(monkeypatch, words)
    tensors = load_file("weights/model.safetensors")
    if name == "model.safetensors":
        save_file(tensors, "weights/model.safetensors", metadata={"format": "other"})
    else:
        Path("weights", name).write_text('{"add_bos_token": true}')
    capsys.readouterr()
    assert lander.main([*words, "--resume"]) == 2
    assert f"weights/{name} has changed" in capsys.readouterr().err


def test_the_files_of_a_run_can_be_evaluated_alone(world, tmp_path, monkeypatch):
    """Hypotheses that do not lie line by line beside the test files, where a side of those was empty."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "data", "data")
    lines = Path("data/test.qab").read_text().split("\n")
    Path("data/test.qab").write_text("\n".join([lines[0], "", *lines[2:]]))
    assert (
        lander.main(arguments(world, "--data", "data", "--eval-sentences", "0", "--steps", "1"))
        == 0
    )
    source, reference, before = (
        Path(f"run/hypotheses/qaa-qab.{name}.txt").read_text().split("\n")
        for name in ("source", "reference", "before")
    )
    assert len(source) == len(reference) == len(before) == 20
    assert source[0] == Path("data/test.qaa").read_text().split("\n")[0]
    assert (
        source[1] == Path("data/test.qaa").read_text().split("\n")[2] and reference[1] == lines[2]
    )
    assert json.loads(Path("run/results.json").read_text())["qaa-qab"]["before"]["cut"] >= 0


def test_files_have_the_permissions_of_the_umask(world, tmp_path, monkeypatch):
    """safetensors writes files that nobody else may read: a shared cluster folder breaks."""
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        assert lander.main(arguments(world, "--steps", "1")) == 0
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in Path("run").rglob("*") if path.is_file()
    }
    assert set(modes.values()) == {0o640}, modes


def test_left_over_temporary_files_are_swept(world, tmp_path, monkeypatch):
    """6 GB each at 7b1, for ever, under two kinds of names."""
    monkeypatch.chdir(tmp_path)
    end_before_tuned(monkeypatch, arguments(world))
    left_over = "state.safetensors.half-written", ".tmpA1b2C3", "hypotheses/x.txt.half-written"
    for name in left_over:
        Path("run", name).write_text("half")
    Path("run", "mine.tmp").write_text("not ours to delete")
    assert lander.main(arguments(world, "--resume")) == 0
    assert not any(Path("run", name).exists() for name in left_over)
    assert Path("run", "mine.tmp").exists()


def test_a_folder_in_use_is_refused_at_once(world, tmp_path, monkeypatch, capsys):
    """Two processes that both go on and mix their files."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, lander.__file__, *arguments(world, "--steps", "100000")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        process.stdout.readline()
        for words in ([], ["--resume"]):
            assert lander.main(arguments(world, "--steps", "100000", *words)) == 2
            assert f"run: in use by process {process.pid} on " in capsys.readouterr().err
        for line in process.stdout:
            if line.startswith("4."):
                break
        time.sleep(1)
        process.send_signal(
            signal.SIGTERM
        )  # which a cluster sends before it takes the machine away
        assert process.wait(60) == 130
    finally:
        process.kill()
    state = load_file("run/state.safetensors")
    log = Path("run/log.jsonl").read_text().splitlines()
    assert int(state["step"]) == json.loads(log[-1])["step"] == len(log) - 1 > 0, "nothing was lost"


def test_an_unwritable_folder_shows_at_once(world, tmp_path, monkeypatch, capsys):
    """After an hour of scoring: permission denied."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(lander, "load_model", None)
    assert lander.main(arguments(world, "--out", "file/run")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_option_given_counts_as_given(monkeypatch, tmp_path):
    """The demo's own defaults won over --layers 4, since 4 is the general default."""
    chosen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "build", lambda folder: None)
    monkeypatch.setattr(lander, "run", lambda settings: chosen.append(settings) or {})
    for words in (["--layers", "4"], []):
        assert lander.main(words) == 0
    assert [settings.layers for settings in chosen] == [4, demo.SETTINGS["layers"]]


def test_every_long_step_shows_progress(world, tmp_path, monkeypatch):
    """Many minutes of silence: the validation loss of a 7B model."""
    monkeypatch.chdir(tmp_path)
    labels, progress = [], lander.Progress

    def noted(label, total, unit, done=0):
        labels.append(label)
        return progress(label, total, unit, done)

    monkeypatch.setattr(lander, "Progress", noted)
    assert lander.main(arguments(world, "--steps", "1")) == 0
    for what in ("layers for", "scoring", "translating", "validation loss of", "training"):
        assert any(label.startswith(what) for label in labels), what


@pytest.mark.parametrize("scores, culprit", [(0.0, "all zero"), (float("nan"), "not all numbers")])
def test_scores_that_say_nothing_are_an_error(
    world, tmp_path, monkeypatch, capsys, scores, culprit
):
    """A pair whose scores in a layer are all zero becomes NaN, and owns every specific neuron."""
    monkeypatch.chdir(tmp_path)
    awareness = lander.neuron_awareness

    def spoiled(decoder, batches, layers):
        found = awareness(decoder, batches, layers)
        found[-1] = scores
        return found

    monkeypatch.setattr(lander, "neuron_awareness", spoiled)
    assert lander.main(arguments(world)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "awareness for qaa-qab in layer" in line and culprit in line


BAD_RUN_FILES = {
    "args.json of another version": ("args.json", lambda args: args | {"magic": 1}, "magic"),
    "args.json without a setting": ("args.json", lambda args: {"pair": "qaa-qab"}, "no weights"),
    "args.json of another kind": (
        "args.json",
        lambda args: args | {"layers": "2"},
        '"2" is not a whole number',
    ),
    "neurons.json a list": ("neurons.json", lambda groups: [groups], "not a JSON object"),
    "a neuron that is none": (
        "neurons.json",
        lambda groups: edit_neurons(groups, [9999]),
        "does not fit",
    ),
    "a neuron of text": (
        "neurons.json",
        lambda groups: edit_neurons(groups, ["1"]),
        '"1" is not a whole number',
    ),
    "a neuron twice": ("neurons.json", lambda groups: edit_neurons(groups, [1, 1]), "two owners"),
    "a layer that is none": (
        "neurons.json",
        lambda groups: {"77": groups.popitem()[1]},
        "layer 77",
    ),
}


def edit_neurons(groups, neurons):
    """The neurons of the first pair in the first layer, changed."""
    first = next(iter(groups.values()))["specific"]
    first[next(iter(first))] = neurons
    return groups


@pytest.mark.parametrize("case", BAD_RUN_FILES)
def test_a_damaged_run_ends_in_one_line(finished, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    name, edit, culprit = BAD_RUN_FILES[case]
    value = edit(json.loads(Path("run", name).read_text()))
    Path("run", name).write_text(json.dumps(value))
    assert lander.main(["--translate", "/dev/null", "--tuned", "run", "--pair", "qaa-qab"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and culprit in line


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert lander.main(arguments(world, "--out", str(folder / "run"), "--steps", "1")) == 0
    return folder / "run"


def test_a_tokenizer_larger_than_the_embedding_is_refused(world, tmp_path, monkeypatch, capsys):
    """An IndexError, or a device assert on CUDA, at the first rare word."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "weights", "weights")
    tokenizer = json.loads(Path("weights/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["never"] = 5000
    Path("weights/tokenizer.json").write_text(json.dumps(tokenizer))
    assert lander.main(arguments(world, "--weights", "weights")) == 2
    assert "tokenizer.json has 5001 tokens" in capsys.readouterr().err


def test_results_of_another_run_are_not_gone_on_with(world, tmp_path, monkeypatch, capsys):
    """A pair that is not evaluated, or scores of neither before nor after: a KeyError at the very end."""
    monkeypatch.chdir(tmp_path)
    end_before_tuned(monkeypatch, arguments(world))
    results = json.loads(Path("run/results.json").read_text())
    for wrong in (
        {"qab-qaa": results["qaa-qab"]},
        {"qaa-qab": {"x": results["qaa-qab"]["before"]}},
    ):
        Path("run/results.json").write_text(json.dumps(wrong))
        capsys.readouterr()
        assert lander.main(arguments(world, "--resume")) == 2
        assert "results.json: " in capsys.readouterr().err


def test_output_is_utf_8_whatever_the_locale(world, tmp_path):
    """UnicodeEncodeError at the first umlaut."""
    words = arguments(world, "--out", "rün", "--steps", "1")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run_command(*words, cwd=tmp_path, env=environment, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(" in rün\n")


def test_mutated_inputs_end_in_a_result_or_one_line(tmp_path):
    """A few hundred of study/fuzz.py's cases: no traceback, no hang, nothing written elsewhere."""
    fuzz.build(tmp_path / "world")
    outcomes = [fuzz.check(tmp_path / "world", number, seed=1) for number in range(300)]
    assert [what for what, outcome in outcomes if outcome not in (0, 2)] == []
    assert {outcome for _, outcome in outcomes} == {0, 2}


BAD_COMMANDS = {
    "unknown language": (["--pair", "qaa-xx"], "'xx'"),
    "no pair": (["--pair", ""], "expected two language codes"),
    "pair twice": (["--pair", "qaa-qab,qaa-qab"], "twice"),
    "no such text": (["--pair", "en-de"], "no train text for en-de"),
    "no data folder": (["--data", "nowhere"], "nowhere"),
    "no data": (["--data", ""], "--data"),
    "no weights folder": (["--weights", "nowhere"], "nowhere"),
    "one pair only": (["--score-pairs", "qaa-qab"], "one pair only"),
    "all too long": (["--max-tokens", "9"], "longer than --max-tokens 9"),
    "too many layers": (["--layers", "4"], "4 layers to select, but only 3"),
    "no layers": (["--layers", "0"], "--layers is 0"),
    "epsilon": (["--epsilon", "1.5"], "--epsilon is 1.5"),
    "learning rate": (["--lr", "-1"], "--lr is -1.0"),
    "not a number": (["--lr", "fast"], "'fast'"),
    "unknown option": (["--fast"], "--fast"),
    "device": (["--device", "abacus"], "abacus"),
    "dtype": (["--dtype", "int4"], "int4"),
    "evaluation pair without text": (["--eval-pairs", "en-de"], "no test text for en-de"),
    "no run": (["--translate", "-", "--tuned", "nowhere"], "nowhere"),
    "no --tuned": (["--translate", "-"], "--tuned"),
    "no --tuned to export": (["--export", "x"], "--tuned"),
    "--tuned alone": (["--tuned", "run"], "--translate"),
    "beams": (["--beams", "999999"], "--beams is 999999"),
    "NUL": (["--out", "a\0b"], "--out has a NUL"),
    "too many steps": (["--steps", "1" + "0" * 30], "--steps is 1000"),
    "meta": (["--device", "meta"], "--device meta"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_ends_in_one_line_and_status_2(world, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    words, culprit = BAD_COMMANDS[case]
    assert lander.main(arguments(world, *words)) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and culprit in captured.err, captured.err
    assert captured.out == "" and not Path("run").exists()


def test_an_empty_training_set_is_an_error(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        train_qaa="",
        train_qab="",
        test_qaa="a\n",
        test_qab="b\n",
        train_qac="",
        test_qac="c\n",
    )
    assert lander.main(arguments(world, "--data", ".")) == 2
    assert "the train text of qaa-qab is empty" in capsys.readouterr().err


def test_a_run_folder_belongs_to_one_run(world, tmp_path, monkeypatch, capsys):
    """Another run's files taken for this one's; a tuned model of another checkpoint."""
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--steps", "1")) == 0
    before = contents(Path("run"))
    for words, culprit in [([], "holds a run already"), (["--resume"], "--steps 1, now --steps 2")]:
        capsys.readouterr()
        assert lander.main(arguments(world, "--steps", "2", *words)) == 2
        assert culprit in capsys.readouterr().err
    assert lander.main(arguments(world, "--steps", "1", "--resume")) == 0
    assert contents(Path("run")) == before
    tensors = load_file("run/tuned.safetensors")
    for change, culprit in [
        (lambda: tensors.popitem(), "does not fit"),
        (lambda: tensors.clear(), "does not fit"),
    ]:
        change()
        save_file(tensors, "run/tuned.safetensors")
        capsys.readouterr()
        assert lander.main(["--translate", "/dev/null", "--tuned", "run", "--pair", "qaa-qab"]) == 2
        assert culprit in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Rivals of the method (study/methods.py, study/compare.py)


def small_context(decoder):
    """What methods.py needs, for a tiny decoder: random scores; layers 1 and 2 change most."""
    L, F, D = decoder.config.layers, decoder.config.ffn_size, decoder.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    awareness = torch.rand(3, L, F, generator=generator)
    channels = torch.rand(3, L, D, generator=generator)
    inputs = lander.Inputs({}, {}, dict.fromkeys(PAIRS, []), {}, {})
    settings = lander.Settings(epsilon=0.7, layers=2)
    differences = {"en-de": [3.0, 2.0, 1.0]}
    return methods.Context(settings, Letters, inputs, ["en-de"], differences, awareness, channels)


TRAINED_BY = {
    "lander": r"blocks\.[12]\.ffn\.(general\.|specific\.en-de\.|router\.en-de)",
    "no-car": r"blocks\.[12]\.ffn\.(general\.|specific\.en-de\.)",
    "specific-only": r"blocks\.[12]\.ffn\.specific\.en-de\.",
    "general-only": r"blocks\.[12]\.ffn\.general\.",
    "random-layers": r"blocks\.\d\.ffn\.(general\.|specific\.en-de\.|router\.en-de)",
    "random-scores": r"blocks\.[12]\.ffn\.(general\.|specific\.en-de\.|router\.en-de)",
    "full": r".*",
    "layers": r"blocks\.[12]\.ffn\.",
    "ffn": r"blocks\.\d\.ffn\.",
    "attention": r"blocks\.\d\.attention\.",
    "lora-all": r"blocks\.\d\..*\.lora_[ab]",
    "adapters": r"blocks\.\d\.adapter\.",
    "adapter-lora": r"blocks\.\d\.(adapter\.|attention\..*\.lora_[ab])",
    "k=1": r"blocks\.1\.ffn\.(general\.|specific\.en-de\.|router\.en-de)",
    "epsilon=0.5": r"blocks\.[12]\.ffn\.(general\.|specific\.en-de\.|router\.en-de)",
    "channels": r"blocks\.\d\.attention\..*original",
    "channels-half": r"blocks\.\d\.attention\..*original",
    "blocks-of-layers": r"blocks\.[12]\.(attention|ffn)\.",
    "both": r"blocks\.(\d\.attention\..*original|[12]\.ffn\.(general|specific\.en-de|router\.en-de))",
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
    if name in (
        "full",
        "layers",
        "ffn",
        "attention",
        "lora-all",
        "adapters",
        "adapter-lora",
    ):
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_attention_is_its_rows_and_its_column(kind):
    """BLOOM's fused rows taken for Baichuan's: other channels would learn, and nothing would show it."""
    decoder = tiny_decoder(kind, layers=2)
    H, H_kv, d = (getattr(decoder.config, size) for size in ("heads", "kv_heads", "head_size"))
    learn = torch.zeros(1, H * d, dtype=torch.bool)
    learn[0, [3, H * d - 1]] = True
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    context = small_context(decoder)
    learners = methods.attention_channels(decoder, context, [1], learn)
    with torch.no_grad():
        for parameter in learners["en-de"].values():
            parameter.add_(1.0)
    attention = decoder.blocks[1].attention
    changed = (
        attention.query_key_value.weight != before["blocks.1.attention.query_key_value.weight"]
    )
    seen = changed[:, 0].nonzero().flatten().tolist()
    if kind == "bloom":
        expected = [(i // d * 3 + part) * d + i % d for i in (3, H * d - 1) for part in range(3)]
    else:  # the last channel's key and value are the last of all
        expected = [3, H * d + 3, (H + H_kv) * d + 3]
        expected += [end * d - 1 for end in (H, H + H_kv, H + 2 * H_kv)]
    assert seen == sorted(expected) and changed[seen].all()
    columns = attention.output.weight != before["blocks.1.attention.output.weight"]
    assert columns.any(0).nonzero().flatten().tolist() == [3, H * d - 1]


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
    # The others lose 0.25 at the first rate and 1.25 at the second: one is three quarters of the way.
    assert compare.gain_at_equal_forgetting(rates, 1.0) == pytest.approx(4.0 + 0.75 * 4.0)


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


# --------------------------------------------------------------------------------------------------
# The report on a run (study/picture.py)


def test_a_report(world, tmp_path, monkeypatch, capsys):
    """A page that needs another file, that text can break, or that shades tokens by another CAR."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert lander.main(arguments(world, "--epsilon", "0.5", "--steps", "1")) == 0
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
    model, tokenizer, _ = lander.load_tuned(
        Path("run"), lander.finished_args(Path("run")), lander.Settings()
    )
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
    """A mean over no layers; the ends of a curve that is not there; a tuned pair not evaluated."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "data", "text", ignore=shutil.ignore_patterns("valid.*"))
    words = ["--data", "text", "--steps", "2", "--eval-pairs", "qaa-qab"]
    for name, more in (("plain", ["--no-routing"]), ("general", ["--epsilon", "1"])):
        words_of_run = [*words, "--out", name, *more]
        assert lander.main(arguments(world, *words_of_run, pair="qaa-qab,qac-qab")) == 0
        assert picture.main([name]) == 0, capsys.readouterr().err
        page = Path(name, "report.html").read_text()
        assert page.count("there is no CAR to show") == 2 and 'class="tokens"' not in page
        assert page.count("It was not evaluated") == 1
        assert "There was no validation text" in page


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
# The decoder against independent implementations


def bloom_reference(heads=4, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(
        vocab_size=90, hidden_size=48, n_layer=3, n_head=heads, **options
    )
    return randomize(transformers.BloomForCausalLM(config))


def write_bloom(
    folder, reference, dialect="published", prefix="", head=False, shards=1, dtype=torch.float32
):
    """Write transformers' BLOOM the ways that published folders are written."""
    tensors = {
        name.replace("transformer.", prefix, 1): tensor.to(dtype).clone()
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    if head:
        tensors["lm_head.weight"] = reference.lm_head.weight.detach().to(dtype).clone()
    old = reference.config
    published = {
        "model_type": "bloom",
        "vocab_size": old.vocab_size,
        "n_layer": old.n_layer,
        "n_inner": None,
    }
    if dialect == "published":
        published |= {
            "n_embed": old.hidden_size,
            "num_attention_heads": old.n_head,
            "hidden_size": 7,
        }  # n_embed wins
    else:
        published |= {"hidden_size": old.hidden_size, "n_head": old.n_head}
    published["apply_residual_connection_post_layernorm"] = (
        old.apply_residual_connection_post_layernorm
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        shapes.write_shards(tensors, folder, shards)


@pytest.mark.parametrize(
    "heads, options, files",
    [
        (4, {}, {}),
        (4, {}, {"dialect": "resaved", "prefix": "transformer.", "head": True}),
        (6, {}, {"prefix": "transformer.", "shards": 3}),
        (12, {}, {"dialect": "resaved", "head": True, "shards": 2}),
        (6, {}, {"dtype": torch.float16}),
        (4, {"apply_residual_connection_post_layernorm": True}, {}),
    ],
)
def test_bloom_logits_equal_transformers(tmp_path, heads, options, files):
    """A wrong slope series, residual, norm, interleaving, name dialect or shard: all load cleanly and compute garbage."""
    reference = bloom_reference(heads, **options)
    if files.get("dtype") == torch.float16:
        reference.half().float()  # the file's rounding
    write_bloom(tmp_path, reference, **files)
    ours = load_model(tmp_path, dtype=torch.float32)
    for side in ("left", "right"):
        ids, mask = padded_ids(90, side)
        assert_close(ours(ids, mask), reference(ids, attention_mask=mask.long()).logits, mask)


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path):
    """Weights that are not copied lie in the mapped file; writing through the map would change the checkpoint."""
    save_model(tiny_decoder("bloom"), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_model(tmp_path).parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped there")
def test_a_large_weight_that_is_dropped_leaves_memory(tmp_path):
    """One file open for all keeps every page that was read through it: layers that are regrouped would count twice."""
    sizes = dict(vocab_size=90, n_embed=528, n_layer=2, n_head=4)  # FFN weights have over 2**20 numbers
    save_model(Decoder(Config.from_json(dict(model_type="bloom", **sizes))), tmp_path)
    mapped = lambda: Path("/proc/self/maps").read_text().count(str(tmp_path))
    model = load_model(tmp_path)
    assert mapped() == 4 + 1  # all small ones share one
    model.blocks[0].ffn = None
    assert mapped() == 2 + 1


def test_dtype_none_keeps_the_checkpoints(tmp_path):
    """A silent cast to fp32 doubles the memory of a published checkpoint."""
    write_bloom(tmp_path, bloom_reference(), dtype=torch.float16)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float16}


def llama_reference(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        rms_norm_eps=1e-6, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return randomize(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("normalize_head", [False, True])
def test_baichuan_logits_equal_transformers_llama(tmp_path, normalize_head):
    """Stacked read as interleaved, the other rotary convention, a head normalized in place or not at all."""
    reference = llama_reference()
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn."
        packed = [tensors.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        tensors[f"{attention}W_pack.weight"] = torch.cat(packed)
        tensors[f"{attention}rotary_emb.inv_freq"] = torch.ones(4)  # dropped on purpose
    if normalize_head:
        with torch.no_grad():
            reference.lm_head.weight.copy_(functional.normalize(reference.lm_head.weight))
    published = BAICHUAN | {"max_position_embeddings": 64, "normalize_head": normalize_head}
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    for side in ("left", "right"):
        ids, mask = padded_ids(90, side)
        assert_close(ours(ids, mask), reference(ids, attention_mask=mask.long()).logits, mask)
    assert torch.equal(ours.head.weight, tensors["lm_head.weight"])


def plain_loop_logits(weights, ids, heads, eps=1e-6):
    """Baichuan-13B with ALiBi for one sentence, token by token and head by head, in fp64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        return x / (x.square().mean() + eps).sqrt() * weights[name]

    states = [weights["model.embed_tokens.weight"][i] for i in ids]
    size = len(states[0]) // heads
    slopes = {6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}[heads]
    for layer in range(3):
        name = f"model.layers.{layer}."
        normed = [norm(x, name + "input_layernorm.weight") for x in states]
        q, k, v = (
            [part @ x for x in normed]
            for part in weights[name + "self_attn.W_pack.weight"].chunk(3)
        )
        for i in reversed(range(len(states))):
            mixed = []
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                scores = [
                    q[i][own] @ k[j][own] / size**0.5 - slopes[h] * (i - j) for j in range(i + 1)
                ]
                shares = torch.stack(scores).softmax(0)
                mixed.append(sum(share * v[j][own] for j, share in enumerate(shares)))
            states[i] = states[i] + weights[name + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            x = norm(states[i], name + "post_attention_layernorm.weight")
            gate, up = (weights[f"{name}mlp.{part}_proj.weight"] @ x for part in ("gate", "up"))
            states[i] = states[i] + weights[name + "mlp.down_proj.weight"] @ (
                gate / (1 + (-gate).exp()) * up
            )
    return torch.stack([weights["lm_head.weight"] @ norm(x, "model.norm.weight") for x in states])


def test_baichuan_13b_logits_equal_a_plain_loop(tmp_path):
    """ALiBi with Baichuan's stacked projection: no published implementation to lean on, so a loop in the test."""
    ours = randomize(Decoder(Config.from_json(BAICHUAN | {"model_max_length": 64})))
    save_model(ours, tmp_path)
    ids = [5, 17, 80, 33, 4, 61, 9]
    expected = plain_loop_logits(load_file(tmp_path / "model.safetensors"), ids, heads=6)
    assert_close(ours(torch.tensor([ids]))[0], expected.float())


@pytest.mark.parametrize(
    "vocabulary, extra, positions, head",
    [
        (64000, {"max_position_embeddings": 4096}, "rotary", "plain"),
        (64000, {"model_max_length": 4096}, "alibi", "plain"),
        (
            125696,
            {"max_position_embeddings": 4096, "model_max_length": 4096},
            "rotary",
            "normalized",
        ),
        (125696, {"model_max_length": 4096}, "alibi", "normalized"),
        (125696, {"positions": "rotary", "normalize_head": False}, "rotary", "plain"),
    ],
)
def test_baichuan_variants_are_told_apart(vocabulary, extra, positions, head):
    """v1 read as v2, or 13B as 7B: no tensor shape would tell."""
    config = Config.from_json(BAICHUAN | {"vocab_size": vocabulary} | extra)
    assert (config.positions, config.head) == (positions, head)


# What a reader or a loader gets wrong at first: kind, options of transformers' config, and how the
# files are written.
LLAMA_LIKE_CASES = {
    "8 heads of keys and values": ("llama", {}, {}),
    "4": ("llama", {"num_key_value_heads": 4}, {}),
    "2, shards": ("llama", {"num_key_value_heads": 2}, {"max_shard_size": "60KB"}),
    "1, the head tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "heads of another size": ("llama", {"head_dim": 10, "num_key_value_heads": 2}, {}),
    "another base": ("llama", {"rope_theta": 1e6}, {}),
    "another base, old spelling": ("llama", {"rope_theta": 1e6}, {"old": True}),
    "linear scaling": ("llama", {"scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    "linear scaling, old spelling": ("llama", {"scaling": {"rope_type": "linear", "factor": 4.0}}, {"old": True}),
    "llama3 scaling": ("llama", {"scaling": LLAMA3_SCALING, "rope_theta": 5e5}, {}),
    "llama3 scaling, old spelling": ("llama", {"scaling": LLAMA3_SCALING, "rope_theta": 5e5}, {"old": True}),
    "llama, absent keys": ("llama", {}, {"absent": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, {}),
    "mistral, absent keys": ("mistral", {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}, {"absent": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "rope_theta": 1e6}, {}),
    "qwen2, tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}, {}),
    "qwen2, absent keys": ("qwen2", {"num_attention_heads": 64, "num_key_value_heads": 32, "hidden_size": 128}, {"absent": True}),
}  # fmt: skip
LLAMA_LIKE_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
# What transformers takes for a key that is not there, and the file may leave out.
ABSENT = ("num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias", "head_dim", "rope_parameters")
ABSENT += ("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_position_embeddings")


def llama_like_reference(kind, rope_theta=1e4, scaling={"rope_type": "default"}, **options):
    transformers = pytest.importorskip("transformers")
    name = LLAMA_LIKE_CLASSES[kind]
    sizes = LLAMA_LIKE | {"rope_parameters": {"rope_theta": rope_theta} | scaling} | options
    config = getattr(transformers, f"{name}Config")(**sizes)
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config))


def write_llama_like(folder, reference, old=False, absent=False, max_shard_size="1GB"):
    """A folder as transformers writes it; with the rope keys of before transformers 5; bare."""
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    published = json.loads((folder / "config.json").read_text())
    if old:
        scaling = published.pop("rope_parameters")
        published["rope_theta"] = scaling.pop("rope_theta")
        published["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if absent:
        for key in ABSENT:
            published.pop(key, None)
    (folder / "config.json").write_text(json.dumps(published))


@pytest.mark.parametrize("case", LLAMA_LIKE_CASES)
def test_llama_like_logits_equal_transformers(tmp_path, case):
    """Keys shared by the wrong queries, a default of another family, a scaling passed over: all load
    cleanly and compute garbage. Positions go beyond llama3's original length of 16."""
    kind, options, files = LLAMA_LIKE_CASES[case]
    reference = llama_like_reference(kind, **options)
    write_llama_like(tmp_path, reference, **files)
    ours = load_model(tmp_path)
    for side in ("left", "right"):
        ids, mask = padded_ids(90, side, lengths=(40, 7, 25))
        assert_close(ours(ids, mask), reference(ids, attention_mask=mask.long()).logits, mask)
    ids, mask = padded_ids(90, "left")
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=89)
    theirs = reference.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]
    for new, row in zip(ours.generate(ids, mask, 20, eos_id=89), theirs.tolist()):
        assert new == row[: row.index(89) if 89 in row else None]
    save_model(ours, tmp_path / "copy")
    again = type(reference).from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert torch.equal(again(ids).logits, reference(ids).logits)


def test_longer_input_than_the_window_is_refused():
    """Attention to all tokens, where the published model sees the last few, is another function."""
    config = {"model_type": "mistral", "sliding_window": 12}
    decoder = randomize(Decoder(Config.from_json(LLAMA_LIKE | config)))
    assert decoder(torch.full((1, 12), 5)).isfinite().all()
    with pytest.raises(InputError) as error:
        decoder(torch.full((1, 13), 5))
    assert "13 tokens" in message(error) and "sliding_window" in message(error)


def test_alibi_slopes_by_hand():
    """H = 6: the series of 4, then the first and third of the series of 8."""
    assert model.alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert model.alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


@pytest.mark.parametrize("kind", KINDS)
def test_every_query_sees_a_key(kind):
    """A padding query with nothing to see has a softmax of NaN on some devices, which poisons the next layer."""
    _, mask = padded_ids(90, "left")
    bias = model.attention_bias(tiny_config(kind), mask, 11, 11, "cpu", torch.float32)
    assert bias.isfinite().any(-1).all()
    seen = bias[:, 0].isfinite()
    assert torch.equal(
        seen & mask[:, :, None], torch.ones(11, 11).tril().bool() & mask[:, None] & mask[:, :, None]
    )


def test_alibi_is_exact_for_near_keys_in_low_precision():
    """An absolute bias slope * position in bf16 is off by several at 2048 tokens, for near keys too."""
    bias = model.attention_bias(tiny_config("bloom"), None, 1, 2048, "cpu", torch.bfloat16)
    near = torch.arange(15, -1, -1.0)
    assert torch.equal(bias[0, :, 0, -16:].float(), -model.alibi_slopes(4)[:, None] * near)


# --------------------------------------------------------------------------------------------------
# Padding and generation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, side):
    """Positions counted from the padding, padding attended to, NaN of an empty softmax leaking into real tokens."""
    decoder = tiny_decoder(kind)
    ids, mask = padded_ids(90, side)
    logits = decoder(ids, mask)
    for b in range(len(ids)):
        assert_close(logits[b][mask[b]], decoder(ids[b][mask[b]][None])[0])


@pytest.fixture
def nan_in_new_memory():
    """torch.empty returns NaN, so that reading memory before writing it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def recomputed_greedy(decoder, ids, max_new_tokens, eos_id, vocab_size=None, texts=None):
    """The four lines; with the texts of all tokens, a line break after a visible character ends it, too."""
    ids, new = list(ids), []
    while len(new) < max_new_tokens:
        token = int(decoder(torch.tensor([ids + new]))[0, -1, :vocab_size].argmax())
        if token == eos_id:
            break
        new.append(token)
        if texts and "\n" in "".join(texts[token] for token in new).lstrip():
            break
    return new


@pytest.mark.parametrize("begins", [[], [7], [5, 8, 5, 9]])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_greedy_equals_recomputation(kind, side, begins, nan_in_new_memory, monkeypatch):
    """A key cached at the wrong place, a row mixed up when a finished sentence leaves, cache memory never written,
    a prefix that is not everyone's."""
    monkeypatch.setattr(model, "PROMPTS_AT_ONCE", 3)
    monkeypatch.setattr(model, "ROOM", 4)
    decoder = tiny_decoder(kind, vocabulary=12)
    ids, mask = padded_ids(12, side, lengths=(7, 13, 5, 9, 10, 6, 11, 4))
    for row, real in zip(ids, mask):
        first = int(real.long().argmax())
        row[first : first + len(begins)] = torch.tensor(begins, dtype=torch.long)
    endless = [
        recomputed_greedy(decoder, row[real].tolist(), 15, eos_id=-1)
        for row, real in zip(ids, mask)
    ]
    ends = {
        token: [row.index(token) if token in row else 15 for row in endless] for token in range(12)
    }
    eos_id = max(ends, key=lambda token: len(set(ends[token])))
    assert len(set(ends[eos_id])) > 1, "sentences must end at different steps to test anything"
    expected = [row[:end] for row, end in zip(endless, ends[eos_id])]
    assert decoder.generate(ids, mask, 15, eos_id) == expected
    assert decoder.generate(ids, mask, 15, eos_id, beams=1) == expected


def test_generation_edge_cases():
    decoder = tiny_decoder("bloom", vocabulary=12)
    ids, mask = padded_ids(12, "right")
    assert decoder.generate(ids, mask, 0, eos_id=2) == [[], [], []]
    assert decoder.generate(ids[:0], mask[:0], 5, eos_id=2) == []
    assert decoder.generate(ids, None, 5, eos_id=2) == decoder.generate(
        ids, torch.ones_like(mask), 5, eos_id=2
    )


TEXTS_OF_12 = ["a", "b", "</s>", "c", "\n", " \n ", "d\n", " ", "e\ne", "f", "g ", " h"]


class Texts:
    """A tokenizer that knows what its tokens say."""

    vocab_size = 12
    decode = staticmethod(lambda ids: "".join(TEXTS_OF_12[id] for id in ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_break_ends_a_translation(kind, nan_in_new_memory):
    """A base model that goes on with another line until its limit; a break before the first word taken for the end."""
    ends, ended, skipped = data.line_ends(Texts), 0, 0
    for seed in range(12):
        decoder = tiny_decoder(kind, seed, vocabulary=12)
        ids, mask = padded_ids(12, "left", lengths=(5, 11, 3, 7, 8))
        limits = [9, 4, 1, 14, 12]
        new = decoder.generate(ids, mask, limits, eos_id=2, vocab_size=12, line_ends=ends)
        for row, real, limit, found in zip(ids, mask, limits, new):
            expected = recomputed_greedy(decoder, row[real].tolist(), limit, 2, texts=TEXTS_OF_12)
            assert found == expected
            text = Texts.decode(found)
            ended += "\n" in text.lstrip()
            skipped += text.lstrip() != text and "\n" in text[: len(text) - len(text.lstrip())]
    assert ended > 5 and skipped > 1, "nothing ended at a line break: nothing was tested"


@pytest.mark.parametrize("beams", [1, 3])
def test_limits_are_each_prompts_own(beams):
    """Prompts of 13 and 35 tokens, a model that loops: 26 and 70 tokens alone must not be 70 and 70 together."""
    decoder = tiny_decoder("bloom", vocabulary=12)
    ids, mask = padded_ids(12, "right", lengths=(5, 11, 3, 7))
    limits = [6, 2, 9, 4]
    together = decoder.generate(ids, mask, limits, eos_id=2, beams=beams)
    for row, real, limit, new in zip(ids, mask, limits, together):
        assert decoder.generate(row[real][None], None, limit, eos_id=2, beams=beams) == [new]
    assert [len(new) for new in together] == limits


class FiveTexts:
    vocab_size = 5
    decode = staticmethod(lambda ids: "".join(["a", "\n", "</s>", "b\n", " "][id] for id in ids))


def test_beams_rank_what_is_kept():
    """Beams ranked by the lines after the first, which are thrown away."""
    ends, different = data.line_ends(FiveTexts), 0
    for seed in range(8):
        decoder = tiny_decoder("alibi", seed, vocabulary=5)
        scored = {}  # every continuation of up to 3 tokens, cut where it ends -> log-probability a token
        for new in itertools.product(range(5), repeat=3):
            end = 3
            for length in (3, 2, 1):
                text = FiveTexts.decode([token for token in new[:length] if token != 2])
                if new[length - 1] == 2 or "\n" in text.lstrip():
                    end = length
            whole = list(new[:end])
            scored[tuple(whole)] = log_likelihood(decoder, [3, 1, 4], whole) / end
        best = [token for token in max(scored, key=scored.get) if token != 2]
        prompt = torch.tensor([[3, 1, 4]])
        assert decoder.generate(prompt, None, 3, 2, 125, 5, ends) == [best]
        different += decoder.generate(prompt, None, 3, 2, 125, 5) != [best]
    assert different, "line breaks decide nothing: nothing was tested"


@torch.no_grad()
def log_likelihood(decoder, prompt, new):
    logits = decoder(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(new)), new].sum())


def test_first_lines_by_hand():
    """No-break and ideographic spaces made plain; a rarer line break that splits the file elsewhere."""
    assert (
        data.first_line("\n  Ein\u00a0Haus\u3000steht  da. \nGerman: x")
        == "Ein\u00a0Haus\u3000steht  da."
    )
    assert (
        data.first_line("a\u2028b") == "a" and data.first_line(" \n ") == data.first_line("") == ""
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_ids_that_the_tokenizer_lacks_are_never_emitted(beams):
    """BLOOM's embedding has 200 more rows than its tokenizer has tokens."""
    decoder = tiny_decoder("rotary", vocabulary=12)
    ids, mask = padded_ids(8, "left")
    assert max(map(max, decoder.generate(ids, mask, 10, eos_id=2, beams=beams))) > 7
    new = decoder.generate(ids, mask, 10, eos_id=2, beams=beams, vocab_size=8)
    assert max(map(max, new)) < 8
    if beams == 1:
        assert new == [
            recomputed_greedy(decoder, row[real].tolist(), 10, 2, 8) for row, real in zip(ids, mask)
        ]


@torch.no_grad()
def score(decoder, prompt, new, eos_id, max_new_tokens):
    """Log-probability per token of a continuation; eos is one of the tokens where it fitted."""
    new = new + [eos_id] * (len(new) < max_new_tokens)
    logits = decoder(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(new)), new].mean())


@pytest.mark.parametrize("beams, vocabulary, length", [(4, 3, 3), (64, 4, 4)])
def test_beam_search_equals_brute_force(beams, vocabulary, length, nan_in_new_memory):
    """A beam reordered without its cache, a finished hypothesis lost, a length counted wrongly."""
    best_is_not_greedy = 0
    for seed in range(12):
        decoder = tiny_decoder("alibi", seed, vocabulary)
        prompts = [[0, 1, 0, 2], [1], [2, 2]]
        ids, mask = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            ids[b, : len(prompt)], mask[b, : len(prompt)] = torch.tensor(prompt), True
        found = decoder.generate(ids, mask, length, eos_id=2, beams=beams)
        others = [token for token in range(vocabulary) if token != 2]
        everything = [
            list(new) for n in range(length + 1) for new in itertools.product(others, repeat=n)
        ]
        for prompt, new in zip(prompts, found):
            best = max(everything, key=lambda new: score(decoder, prompt, new, 2, length))
            assert new == best
            best_is_not_greedy += best != recomputed_greedy(decoder, prompt, length, 2)
    assert best_is_not_greedy, "greedy finds them all: the toy model is too easy to test anything"


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_never_scores_below_greedy(kind, beams, nan_in_new_memory):
    """Plain beam search may prune the greedy path, or stop before it ends, and finish below it."""
    better = 0
    for seed in range(6):
        decoder = tiny_decoder(kind, seed, vocabulary=12)
        ids, mask = padded_ids(12, "left", lengths=(5, 11, 3, 7, 8))
        greedy, beam = (
            decoder.generate(ids, mask, 24, eos_id=2, beams=count) for count in (1, beams)
        )
        for row, real, a, b in zip(ids, mask, greedy, beam):
            gain = score(decoder, row[real].tolist(), b, 2, 24) - score(
                decoder, row[real].tolist(), a, 2, 24
            )
            assert gain > -1e-5
            better += gain > 1e-5
    assert better > 2


# --------------------------------------------------------------------------------------------------
# Reading and writing checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_as_the_same_bits(tmp_path, kind):
    """And in 16-bit too; nothing but the two files is left behind."""
    decoder = tiny_decoder(kind).half()
    save_model(decoder, tmp_path)
    again = load_model(tmp_path)
    assert again.config.published["dtype"] == "float16"
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        name: torch.float16 for name, _ in decoder.named_parameters()
    }
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in decoder.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["bloom", *TINY_LLAMA_LIKE])
def test_transformers_loads_a_saved_model(tmp_path, kind):
    """The published layout, not one of our own."""
    transformers = pytest.importorskip("transformers")
    decoder = tiny_decoder(kind)
    save_model(decoder, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(tmp_path, dtype=torch.float32).eval()
    ids, mask = padded_ids(90, "left")
    assert_close(decoder(ids, mask), reference(ids, attention_mask=mask.long()).logits, mask)


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path):
    """A loader that skips what it does not know leaves random weights in the model."""
    save_model(tiny_decoder("bloom"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["h.1.mlp.dense_h_to_4h.bias"], tensors["ln_f.weight"]
    tensors["h.0.input_layernorm.weight"] = torch.ones(31)
    tensors["h.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.int8)
    tensors["h.2.input_layernorm.weight"] = torch.ones(32)
    tensors["transformer.ln_f.bias"] = torch.ones(32)
    tensors["lm_head.weight"] = torch.ones(1)  # dropped on purpose
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    text = message(error)
    assert str(tmp_path) in text
    missing, unexpected, misshapen = text.split("; ")[1:]
    assert missing == "missing: h.1.mlp.dense_h_to_4h.bias, ln_f.weight"
    assert "h.2.input_layernorm.weight" in unexpected and "ln_f.bias (twice)" in unexpected
    assert (
        "h.0.input_layernorm.weight F32 [31]" in misshapen
        and "h.1.input_layernorm.weight I8" in misshapen
    )
    assert "lm_head" not in text


def test_an_error_is_one_line_for_every_tool(capsys):
    """A tensor's name with a rare line break in it splits the message; an escape sequence moves the cursor."""

    def fail():
        raise InputError("h.\u2028mlp \x1b[2J \x1c ü\n.")

    assert data.exit_status(fail) == 2
    assert capsys.readouterr().err == "error: h.\\u2028mlp \\x1b[2J \\x1c ü\\n.\n"


def test_half_a_character_in_json_is_refused(tmp_path):
    """A lone surrogate passes json and fails where it is written, or opened as a file."""
    save_model(tiny_decoder("bloom"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = '{"weight_map": {"ln_f.weight": "\\uD800.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert "index.json: has half a character" in message(error)
    assert data.parse_json('{"a": "\\ud83d\\ude00"}', {"a": str}, "x") == {"a": "😀"}


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "", 7])
def test_a_shard_outside_its_folder_is_refused(tmp_path, shard):
    save_model(tiny_decoder("bloom"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "elsewhere.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"ln_f.weight": shard}})
    )
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert "model.safetensors.index.json" in message(error) and repr(shard) in message(error)


def damage(folder, file, content):
    path = folder / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def edit_config(**changes):
    return lambda content: json.dumps(
        {k: v for k, v in (json.loads(content) | changes).items() if v != "gone"}
    ).encode()


@pytest.mark.parametrize(
    "file, content, culprits",
    [
        ("config.json", None, ["config.json", "cannot be read"]),
        ("config.json", b"{", ["config.json", "not JSON"]),
        ("config.json", b"[]", ["config.json", "not a JSON object"]),
        (
            "config.json",
            edit_config(model_type="gpt2"),
            ["config.json", "'gpt2'", "bloom, baichuan"],
        ),
        (
            "config.json",
            edit_config(n_head="gone"),
            ["config.json", "n_head or num_attention_heads"],
        ),
        ("config.json", edit_config(n_head=5), ["config.json", "32", "5 heads"]),
        ("config.json", edit_config(n_layer="2"), ["config.json", "layers is '2'"]),
        ("config.json", edit_config(n_layer=10**6), ["1000000 layers", "29 tensors"]),
        ("config.json", edit_config(n_embed=10**30), ["config.json", "hidden_size is 1000"]),
        ("config.json", edit_config(model_type=["bloom"]), ["config.json", "['bloom']"]),
        ("config.json", edit_config(layer_norm_epsilon="x"), ["config.json", "norm_eps is 'x'"]),
        (
            "config.json",
            edit_config(quantization_config={}),
            ["config.json", "quantization_config"],
        ),
        (
            "config.json",
            edit_config(rope_scaling={"type": "yarn"}),
            ["config.json", "rope_scaling"],
        ),
        ("config.json", edit_config(hidden_act="relu"), ["config.json", "'relu'"]),
        (
            "config.json",
            edit_config(tie_word_embeddings="no"),
            ["config.json", "tie_word_embeddings"],
        ),
        ("config.json", b"[" * 100000, ["config.json", "nested"]),
        ("config.json", b'{"a": NaN}', ["config.json", "NaN"]),
        ("model.safetensors", None, ["no model.safetensors"]),
        ("model.safetensors", lambda content: content[:-100], ["model.safetensors"]),
        ("model.safetensors", b"", ["model.safetensors"]),
    ],
)
def test_a_damaged_checkpoint_ends_in_one_line(tmp_path, file, content, culprits):
    save_model(tiny_decoder("bloom"), tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    damage(tmp_path, file, content)
    assert published["n_head"] == 4
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert all(culprit in message(error) for culprit in [str(tmp_path), *culprits])


@pytest.mark.parametrize(
    "extra, culprit",
    [({"positions": "Rotary"}, "'Rotary'"), ({"normalize_head": 1}, "normalize_head")],
)
def test_unknown_values_of_known_keys_are_refused(extra, culprit):
    """positions "Rotary" was accepted, and then there were no positions at all."""
    with pytest.raises(InputError) as error:
        Config.from_json(BAICHUAN | {"model_max_length": 64} | extra)
    assert culprit in message(error)


@pytest.mark.parametrize(
    "extra, culprit",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "'linear'"),
        ({"rope_theta": "large"}, "rope_theta is 'large'"),
        ({"num_key_value_heads": 3}, "8 heads do not divide into 3"),
        ({"head_dim": 5}, "heads of 5 numbers"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": None}, "attention_bias"),
        ({"model_type": "mistral", "sliding_window": "all"}, "sliding_window is 'all'"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"model_type": "mixtral"}, "'mixtral'"),
    ],
)
def test_what_a_llama_like_config_asks_for_is_done_or_refused_by_name(extra, culprit):
    """Loaded all the same, it would compute another function."""
    with pytest.raises(InputError) as error:
        Config.from_json(LLAMA_LIKE | {"model_type": "llama"} | extra)
    assert culprit in message(error)


def test_rms_norm_casts_before_the_weight_multiplies():
    """In 16 bits the other order rounds otherwise; in fp32 the two are the same."""
    norm = model.RMSNorm(64, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(64, generator=generator)
    norm, x = norm.bfloat16(), torch.randn(50, 64, generator=generator).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).bfloat16())


def test_a_missing_shard_is_named(tmp_path):
    write_bloom(tmp_path, bloom_reference(), shards=2)
    (tmp_path / "model_00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert "model_00002-of-00002.safetensors" in message(error)


def test_bin_shards_convert_to_the_same_model(tmp_path):
    """Baichuan2-7B-Base is published as two .bin shards; loading must say how to convert them."""
    decoder = tiny_decoder("rotary")
    save_model(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for i in (1, 2):
        torch.save(
            dict(list(tensors.items())[i - 1 :: 2]),
            tmp_path / f"pytorch_model-0000{i}-of-00002.bin",
        )
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    command = [sys.executable, Path(model.__file__), "convert", tmp_path]
    assert f"python model.py convert {tmp_path}" in message(error)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    again = load_model(tmp_path)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in decoder.named_parameters())


def test_a_bin_file_with_a_tied_head_converts(tmp_path):
    """safetensors refuses tensors that share memory."""
    save_model(tiny_decoder("bloom"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["word_embeddings.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model.convert(tmp_path)
    assert torch.equal(load_model(tmp_path).embedding.weight, tensors["lm_head.weight"])


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [b"not a checkpoint", Payload(), {"w": [1, 2]}, None])
def test_converting_runs_no_code_and_names_the_file(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    done = subprocess.run(
        [sys.executable, Path(model.__file__), "convert", "."], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "pytorch_model" in done.stderr
    assert "weights_only" not in done.stderr, "torch advises to load it all the same"
    assert [p.name for p in tmp_path.iterdir()] == [path.name] * (content is not None)


MEASURE_LOADING = """
import resource, sys, torch, model
model.load_model(sys.argv[1] + "/warm-up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = model.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(p.nbytes for p in loaded.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_holds_the_weights_once(tmp_path, dtype):
    """Reading a whole file before converting it takes one and a half times the weights; 1.15 is allowed."""
    config = dict(model_type="bloom", vocab_size=20000, n_embed=1024, n_layer=6, n_head=8)
    save_model(Decoder(Config.from_json(config)).half(), tmp_path)
    save_model(tiny_decoder("bloom").half(), tmp_path / "warm-up")
    command = [sys.executable, "-c", MEASURE_LOADING, tmp_path, dtype]
    peak, weights = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert peak < 1.15 * weights


# --------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = [
    "Hello, world!  (two spaces)\n\ttabs … 你好，世界。", "a    b\n\n  c", "f(x)|g(y) (a) ( b", "「你好！」？ 你好! ？",
    "1,234.56 a.b@c.com", "a\u00a0b\u3000c\u200bd \u00a0e", " leading and trailing  ",
    "", " ", "\n", "x\x00y\x1c\x1d\x1e\x1f\x7f\x85z", "\u1680\u2000\u2028\u2029\u202f\u205f\ufeff\u180e w",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 ñ n\u0303 ﬁ ½ Ⅷ", "مرحبا بالعالم، كيف حالك؟ हिन्दी। ۔", "Привет, мир! Ёлка", "中文没有空格但是有标点，对吧？",
    "<s>text</s> <pad><unk>< s> </s", "a<pad>b</s></s>", "x" * 3000, "das Haus 你好" * 300, "end ", "Ġ Ċ ĠĠ",
]  # fmt: skip

TRAINING_TEXT = (
    TEXTS[:14]
    + ["das Haus ist grün und der Hund ist müde", "the house is green and the dog is tired"] * 3
)


@pytest.fixture(scope="session")
def bloom_tokenizer(tmp_path_factory):
    """A folder with a tokenizer.json of BLOOM's pipeline, trained and written by the tokenizers library."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers.Split(library.Regex(data.BLOOM_SPLIT), behavior="isolated")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=False)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def byte_level_tokenizers(tmp_path_factory):
    """Folders with tokenizers of Qwen2's and Llama-3's pipelines, by name; trained in the library."""
    pytest.importorskip("tokenizers")
    from study import tokens

    folders = {name: tmp_path_factory.mktemp(name) for name in tokens.PIPELINES}
    for name, folder in folders.items():
        tokens.train(name, TRAINING_TEXT, folder, vocab_size=500)
    return folders


def edited_tokenizer(folder, target, edit):
    published = json.loads((folder / "tokenizer.json").read_text())
    edit(published)
    (target / "tokenizer.json").write_text(json.dumps(published))
    return target


def split_by(regex):
    """An edit of a tokenizer.json."""
    return lambda published: published["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"Regex": regex}
    )


def of_split(**changes):
    return lambda published: published["pre_tokenizer"]["pretokenizers"][0].update(changes)


def of_byte_level(**changes):
    return lambda published: published["pre_tokenizer"]["pretokenizers"][1].update(changes)


def normalized_token(published):
    """An edit: an added token that is matched in what the others leave."""
    vocabulary = published["model"]["vocab"]
    vocabulary["x<"] = vocabulary.pop("<s>")
    published["added_tokens"][1].update(content="x<", normalized=True)


def template(*names, ids=(1,)):
    """An edit: what is put around the text A."""
    single = [{"Sequence" if name == "A" else "SpecialToken": {"id": name, "type_id": 0}} for name in names]
    tokens = {name: {"id": name, "ids": list(ids), "tokens": [name]} for name in names if name != "A"}
    step = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}
    return lambda published: published.update(post_processor=step)


def random_texts(count):
    rng = random.Random(0)
    ranges = [
        (0, 0x80),
        (0x80, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x110000),
        (0x20, 0x21),
        (0x61, 0x68),
    ]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_bloom_ids_and_text_equal_tokenizers(bloom_tokenizer):
    """A merge out of order, white space of Python's kind, bytes dropped, added tokens matched too late."""
    from tokenizers import Tokenizer

    theirs, ours = (
        Tokenizer.from_file(str(bloom_tokenizer / "tokenizer.json")),
        load_tokenizer(bloom_tokenizer),
    )
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (
        1,
        2,
        3,
        theirs.get_vocab_size(),
    )
    for text in [*TEXTS, *random_texts(500)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text
    rng = random.Random(1)
    for _ in range(300):  # ids that no text gives: broken characters
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(20))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["Qwen2", "Llama-3"])
def test_byte_level_ids_and_text_equal_tokenizers(byte_level_tokenizers, name):
    """Letters and numbers of some scripts alone, Python's white space, marks left apart, merges not ignored."""
    from tokenizers import Tokenizer

    from study import tokens

    folder = byte_level_tokenizers[name]
    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in [*TEXTS, *tokens.random_texts(4000, seed=1, added=[*ours.added])]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert [*ours.prompt_prefix, *ids] == theirs.encode(text).ids


@pytest.mark.parametrize(
    "edit",
    [
        normalized_token,
        lambda p: p["added_tokens"].clear(),
        lambda p: p["model"].update(merges=[]),
        lambda p: p.update(normalizer={"type": "NFC"}),
        lambda p: p.update(post_processor=None),
        lambda p: p["model"].update(ignore_merges=True, merges=[]),
        split_by(r"(\S)x?"),
        split_by(r"[\p{Lu}\p{M}]+(?=\s)|\P{N}?\p{Ll}{2,3}|\S+|[\r\n\-.]"),
        split_by(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}|.|\s+(?!\S)"),
    ],
)
def test_other_pipelines_of_the_kind_equal_tokenizers(bloom_tokenizer, tmp_path, edit):
    """A token that takes the beginning of another; none, so that all characters are apart; merges ignored."""
    from tokenizers import Tokenizer

    folder = edited_tokenizer(bloom_tokenizer, tmp_path, edit)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    for text in [*TEXTS, "x<unk>", "x<y", *random_texts(300)]:
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text)


def test_merges_load_in_both_file_forms(bloom_tokenizer, tmp_path):
    """ "a b" strings until tokenizers 0.20, [a, b] pairs since."""
    merges = json.loads((bloom_tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert isinstance(merges[0], list)
    edit = lambda published: published["model"].update(merges=[" ".join(merge) for merge in merges])
    old = load_tokenizer(edited_tokenizer(bloom_tokenizer, tmp_path, edit))
    new = load_tokenizer(bloom_tokenizer)
    assert all(old.encode(text) == new.encode(text) for text in TEXTS)


@pytest.mark.parametrize(
    "text, pieces",
    [
        (TEXTS[0], "Hello·,· world·!  (·two· spaces·)\n\t·tabs· …· 你好·，·世界·。"),
        (TEXTS[1], "a·   · b·\n\n ·· c".replace("··", "·")),
        (TEXTS[2], "f·(·x·)|·g·(·y·) (·a·) (· b"),
        (TEXTS[3], "「你好！」？· 你好·!· ？"),
        (TEXTS[4], "1·,·234·.·56· a·.·b@c·.·com"),
        (TEXTS[5], "a·\u00a0·b·\u3000·c\u200bd· \u00a0·e"),
        (TEXTS[6], " leading· and· trailing·  "),
    ],
)
def test_pre_tokenizer_by_hand(text, pieces):
    """Oniguruma's nested class is a union; Python's re reads it otherwise."""
    assert [*filter(None, data.piece_pattern(data.BLOOM_SPLIT).split(text))] == pieces.split("·")


@pytest.mark.parametrize(
    "edit, culprit",
    [
        (lambda p: p.update(normalizer={"type": "NFKC"}), "NFKC"),
        (lambda p: p.update(normalizer={"type": "Sequence", "normalizers": []}), "normalizers"),
        (split_by(r"\w+"), r"\w+"),
        (split_by(r"a|\p{Han}+"), "Han"),
        (split_by(r"[\p{L}\P{N}]"), r"[\p{L}\P{N}]"),
        (split_by("[a[b]]"), "[a[b]]"),
        (split_by("[a-z&&b]"), "[a-z&&b]"),
        (split_by("^a"), "^a"),
        (split_by("a{2}?"), "{2}?"),
        (split_by("(?i:'st)"), "(?i:'st)"),
        (split_by("(?<name>a)"), "(?<name>a)"),
        (split_by("(a"), "unterminated"),
        (split_by("a{1,99999999999}"), "too large"),
        (split_by(r"\s*"), "nothing"),
        (of_split(pattern={"String": " "}), "String"),
        (of_split(behavior="Removed"), "Removed"),
        (of_split(invert=True), "'invert': True"),
        (of_byte_level(use_regex=True), "'use_regex': True"),
        (of_byte_level(add_prefix_space=True), "'add_prefix_space': True"),
        (lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda p: p.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda p: p["model"].update(type="WordPiece"), "WordPiece"),
        (lambda p: p["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda p: p["model"].update(ignore_merges=7), "ignore_merges"),
        (lambda p: p["model"].update(dropout=0.1), "dropout=0.1"),
        (lambda p: p["model"].update(unk_token="<unk>"), "unk_token=<unk>"),
        (lambda p: p["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda p: p["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda p: p.update(decoder={"type": "Metaspace"}), "Metaspace"),
        (lambda p: p.update(post_processor={"type": "TemplateProcessing"}), "no single"),
        (lambda p: p.update(post_processor={"type": "RobertaProcessing"}), "RobertaProcessing"),
        (lambda p: p.update(post_processor=7), "post_processor is [7]"),
        (template("<s>", "A", "</s>"), "</s>"),
        (template("<s>", "<s>", "A"), "'<s>'"),
        (template("A"), "'A'"),
        (template("<s>", "A", ids=(1, 1)), "'<s>'"),
        (template("<s>", "A", ids=(10**6,)), "1000000"),
        (lambda p: p["added_tokens"][1].update(lstrip=True), "<s> lstrip"),
        (lambda p: p["added_tokens"][1].update(rstrip=True), "<s> rstrip"),
        (lambda p: p["added_tokens"][1].update(single_word=True), "<s> single_word"),
        (
            lambda p: p.update(normalizer={"type": "NFC"})
            or p["added_tokens"][1].update(normalized=True),
            "<s> normalized",
        ),
        (lambda p: p["added_tokens"].pop(2), "no end-of-sentence"),
        (lambda p: p.pop("model"), "model"),
        (lambda p: p["model"].update(vocab=[]), "vocab"),
        (lambda p: p["model"]["vocab"].update(x="7"), '"7" is not a whole number'),
        (lambda p: p["model"]["vocab"].update(x=-7), "ids from -7"),
        (lambda p: p["model"]["merges"].append(["never", "seen"]), "never"),
        (lambda p: p["model"]["merges"].append(7), "7 is not a list"),
        (lambda p: p.update(added_tokens={}), "added_tokens"),
        (lambda p: p.update(pre_tokenizer=7), "pre_tokenizer"),
    ],
)
def test_another_pipeline_is_refused_by_name(bloom_tokenizer, tmp_path, edit, culprit):
    """A tokenizer that is almost one of those known gives ids that are almost right."""
    with pytest.raises(InputError) as error:
        load_tokenizer(edited_tokenizer(bloom_tokenizer, tmp_path, edit))
    assert culprit in message(error) and "tokenizer.json" in message(error)


def train_sentencepiece(folder, add_dummy_prefix):
    """A folder with a tokenizer.model: identity normalization, byte fallback, white space kept."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def baichuan_tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("baichuan"), add_dummy_prefix=False)


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("llama"), add_dummy_prefix=True)


@pytest.fixture(scope="session")
def tokenizer_folders(bloom_tokenizer, byte_level_tokenizers, baichuan_tokenizer, llama_tokenizer):
    """By family."""
    own = {"bloom": bloom_tokenizer, "baichuan": baichuan_tokenizer, "llama": llama_tokenizer}
    return own | byte_level_tokenizers


def with_files(folder, target, **files):
    """A tokenizer's folder with other files beside it, by name without .json; none for None."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for name, content in files.items():
        if content is None:
            (target / f"{name}.json").unlink(missing_ok=True)
        else:
            (target / f"{name}.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("family", ["bloom", "baichuan", "llama", "Qwen2", "Llama-3"])
def test_prompt_and_target_are_what_the_joined_text_gives(tokenizer_folders, family):
    """Two spaces where a sentencepiece model puts one itself; none where it does not."""
    ours = load_tokenizer(tokenizer_folders[family])
    for target in ["das Haus", "Das", "12", "«ja»", " two spaces", "你好", "é", "<s>"]:
        prompt, answer = render(ours, "en-de", "the house", target)
        joined = ours.encode(f"{data.prompt_text('en-de', 'the house')} {target}")
        assert [*prompt, *answer] == [*ours.prompt_prefix, *joined, ours.eos_id]
        assert ours.decode(answer[:-1]).lstrip() == target.lstrip()


NAMED = {"content": "<unk>", "lstrip": False}


@pytest.mark.parametrize(
    "family, files, expected",
    [
        ("bloom", {}, (1, 2, 3)),
        ("bloom", {"tokenizer_config": {"bos_token": "<pad>", "eos_token": NAMED}}, (3, 0, 3)),
        ("bloom", {"tokenizer_config": {"bos_token": None, "pad_token": "a"}}, (1, 2, "a")),
        ("bloom", {"special_tokens_map": {"bos_token": NAMED, "pad_token": "</s>"}}, (0, 2, 2)),
        ("bloom", {"config": {"bos_token_id": 3, "eos_token_id": [0, 2], "pad_token_id": 1}}, (3, 0, 1)),
        ("bloom", {"config": {"eos_token_id": [], "bos_token_id": None}}, (1, 2, 3)),
        ("bloom", {"config": {"eos_token_id": 0}, "special_tokens_map": {"eos_token": "<s>"}}, (1, 1, 3)),
        ("bloom", {"special_tokens_map": {"eos_token": "<unk>"}, "tokenizer_config": {"eos_token": "<s>"}}, (1, 1, 3)),
        ("baichuan", {}, (1, 2, 0)),
        ("llama", {"tokenizer_config": {"eos_token": NAMED, "pad_token": "</s>"}}, (1, 0, 2)),
        ("llama", {"config": {"eos_token_id": 7, "pad_token_id": -1}}, (1, 7, 0)),
        ("llama", {"special_tokens_map": {"pad_token": "[PAD]"}, "config": {"pad_token_id": 9}}, (1, 2, 9)),
        ("Qwen2", {}, (-1, 0, 0)),
        ("Qwen2", {"tokenizer_config": {"eos_token": "<|im_end|>"}}, (-1, 2, 2)),
        ("Qwen2", {"tokenizer_config": None, "config": {"bos_token_id": 1, "eos_token_id": 2}}, (1, 2, 2)),
        ("Llama-3", {}, (0, 1, 1)),
        ("Llama-3", {"tokenizer_config": {"eos_token": "<|end_of_text|>"}}, (0, 1, 1)),
    ],
)  # fmt: skip
def test_special_ids_come_from_the_folders_files(
    tokenizer_folders, tmp_path, family, files, expected
):
    """Generation that never ends, or ends at once: an end that is another's, or of another file."""
    ours = load_tokenizer(with_files(tokenizer_folders[family], tmp_path, **files))
    expected = tuple(id if isinstance(id, int) else ours.ids[id] for id in expected)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == expected


@pytest.mark.parametrize(
    "family, files, culprits",
    [
        ("bloom", {"tokenizer_config": {"eos_token": "none"}}, ["tokenizer_config.json: eos_token", "'none'"]),
        ("llama", {"special_tokens_map": {"bos_token": "[BOS]"}}, ["special_tokens_map.json: bos_token", "[BOS]"]),
        ("bloom", {"config": {"bos_token_id": 10**6}}, ["config.json: bos_token_id 1000000"]),
        ("llama", {"config": {"eos_token_id": [-1]}}, ["config.json: eos_token_id -1"]),
        ("bloom", {"tokenizer_config": {"eos_token": 7}}, ["tokenizer_config.json: eos_token: 7"]),
        ("bloom", {"tokenizer_config": {"eos_token": {}}}, ["eos_token: no content"]),
        ("bloom", {"config": {"eos_token_id": "</s>"}}, ["config.json: eos_token_id"]),
        ("bloom", {"config": {"eos_token_id": [True]}}, ["eos_token_id: in the list: true"]),
        ("llama", {"tokenizer_config": {"add_bos_token": "yes"}}, ["add_bos_token", "yes"]),
        ("llama", {"tokenizer_config": []}, ["tokenizer_config.json: []"]),
        ("Qwen2", {"tokenizer_config": None}, ["no end-of-sentence token"]),
        ("Qwen2", {"tokenizer_config": {"eos_token": "a", "add_bos_token": True}}, ["no beginning-of-sentence"]),
        ("Llama-3", {"tokenizer_config": {"eos_token": "a", "bos_token": "b"}}, ["post_processor puts [0]"]),
    ],
)  # fmt: skip
def test_wrong_special_tokens_are_refused_by_name(
    tokenizer_folders, tmp_path, family, files, culprits
):
    with pytest.raises(InputError) as error:
        load_tokenizer(with_files(tokenizer_folders[family], tmp_path, **files))
    assert all(culprit in message(error) for culprit in [str(tmp_path), *culprits])


@pytest.mark.parametrize(
    "family, config, begins",
    [
        ("bloom", {}, False),
        ("bloom", {"add_bos_token": True, "tokenizer_class": "BloomTokenizerFast"}, True),
        ("baichuan", {"tokenizer_class": "BaichuanTokenizer"}, False),
        ("baichuan", {"add_bos_token": False, "tokenizer_class": "BaichuanTokenizer"}, False),
        ("llama", None, False),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, True),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": None}, True),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ("llama", {"add_bos_token": True}, True),
        ("Qwen2", {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}, False),
        ("Llama-3", {"eos_token": "<|end_of_text|>"}, True),
        ("Llama-3", {"eos_token": "<|end_of_text|>", "add_bos_token": False}, False),
    ],
)
def test_a_prompt_begins_with_bos_where_the_files_ask(
    tokenizer_folders, tmp_path, family, config, begins
):
    """A model that never saw a text without it."""
    ours = load_tokenizer(with_files(tokenizer_folders[family], tmp_path, tokenizer_config=config))
    text = data.prompt_text("en-de", "the house")
    assert not {ours.bos_id} & {*ours.encode(text)}
    front = [ours.bos_id] * begins
    prompt, target = render(ours, "en-de", "the house", "das Haus")
    assert prompt == [*front, *ours.encode(text)] and ours.bos_id not in target
    short, _ = probe.short_prompt(ours, "en-de", "the house", "das Haus")
    assert short == [*front, *ours.encode("English: the house = German:")]
    ids, kinds = probe.kinds_of_tokens(ours, "en-de", "the house", "das Haus")
    assert kinds[: len(front)] == ["prompt"] * begins and ids[: len(front)] == front


def test_sentencepiece_follows_the_files_flags(baichuan_tokenizer):
    """No bos, no eos, no prefix space, white space kept; <unk> pads where the file has no pad."""
    ours = load_tokenizer(baichuan_tokenizer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 0, 420)
    for text in TEXTS:
        ids = ours.encode(text)
        assert isinstance(ids, list) and not {1, 2} & set(ids)
        if "\x00" not in text:
            assert ours.decode(ids) == text


def test_a_piece_that_is_not_utf_8_is_refused(baichuan_tokenizer, tmp_path):
    """sentencepiece loads it, and fails when it comes to say it."""
    raw = (baichuan_tokenizer / "tokenizer.model").read_bytes()
    assert raw.count(b"\xe2\x96\x81the") == 1
    for damaged in (raw.replace(b"\xe2\x96\x81the", b"\xe2\x96\xffthe"), b"\x96" + raw):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(InputError) as error:
            load_tokenizer(tmp_path)
        assert "tokenizer.model: not a sentencepiece model" in message(error)


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path):
    for name, content in [
        ("nothing", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.model", b"x"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in message(error)


# --------------------------------------------------------------------------------------------------
# Parallel text, prompts, batches


def write(folder, **files):
    for name, text in files.items():
        (folder / name.replace("__", "-").replace("_", ".")).write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )


def test_the_four_forms_give_the_same_pairs(tmp_path):
    """Columns or sides swapped, a form passed over, lines split at U+2028."""
    pairs = [("one\u2028line", "eine Zeile"), ("a\x85b", "ab"), ("last", "letzte")]
    english, german = ("\n".join(side) for side in zip(*pairs))
    items = [{"translation": {"de": target, "en": source}} for source, target in pairs]
    write(tmp_path, two_en__de_en=english, two_en__de_de=german + "\n", many_en=english, many_de=german + "\r\n",
          tab_en__de_tsv="".join(f"{source}\t{target}\n" for source, target in pairs),
          list_de__en_json=json.dumps(items), lines_de__en_json="\n".join(map(json.dumps, items)) + "\n")  # fmt: skip
    for split in ("two", "many", "tab", "list", "lines"):
        assert read_parallel(tmp_path, split, "en-de") == pairs
        assert read_parallel(tmp_path, split, "de-en") == [pair[::-1] for pair in pairs]
        assert list_pairs(tmp_path, split) == ["de-en", "en-de"]


def test_lines_are_those_of_read_lines(tmp_path, monkeypatch):
    """A character cut at a block's end; a last line without newline; a blank line of another script."""
    texts = ["", "\n", "a", "\ufeffa\nb", "ä\r\n\n \u2028\n\u3000\n中文\n\tx\n", "\n\nа\r\nب"]
    path = tmp_path / "text"
    for text in texts:
        path.write_bytes(text.encode())
        for size in (1, 2, 3, 2**24):
            monkeypatch.setattr(data, "BYTES_AT_A_TIME", size)
            lines = data.Lines(path)
            expected = data.read_lines(path)
            assert list(lines) == expected
            assert lines.blank().tolist() == [not line.strip() for line in expected]
    for raw, number in ((b"a\n\xff\n", 2), (b"a\nb\n\xe4", 3)):
        path.write_bytes(raw)
        with pytest.raises(InputError) as error:
            data.Lines(path)
        assert f"line {number} of" in message(error)


def test_text_takes_few_bytes_a_pair(tmp_path):
    """A million captions took 0.7 GB and half a minute before the first step."""
    size = 100_000
    write(tmp_path, train_en="a house\n" * size, train_de="ein Haus\n" * size)
    tracemalloc.start()
    try:
        text = data.open_parallel(tmp_path, "train", "en-de")
        examples = lander.Examples(Letters, "en-de", text, 256)
        steps = lander.schedule({"en-de": examples}, 80, seed=0)
        _, numbers = next(steps)
        assert examples[numbers[0]] == render(Letters, "en-de", "a house", "ein Haus")
        assert tracemalloc.get_traced_memory()[0] < 100 * size
    finally:
        tracemalloc.stop()


def test_the_exact_order_is_read_before_the_reverse(tmp_path):
    """WMT's test.de-en and test.en-de are different texts."""
    write(
        tmp_path,
        test_de__en_de="d1",
        test_de__en_en="e1",
        test_en__de_de="d2",
        test_en__de_en="e2",
        test_en="e",
        test_fr="f",
    )
    assert read_parallel(tmp_path, "test", "de-en") == [("d1", "e1")]
    assert read_parallel(tmp_path, "test", "en-de") == [("e2", "d2")]
    assert list_pairs(tmp_path, "test") == ["de-en", "en-de", "en-fr", "fr-en"]


def test_empty_sides_are_skipped_and_counted(tmp_path, capsys):
    write(tmp_path, train_en="a\n\nc\nd\n", train_de="A\nB\n \nD\n")
    assert read_parallel(tmp_path, "train", "en-de") == [("a", "A"), ("d", "D")]
    assert "skipped 2 of 4" in capsys.readouterr().err


def test_blank_lines_mean_the_same_in_all_forms(tmp_path, capsys):
    """Skipped in two files, an error in TSV, silent in JSON lines."""
    item = json.dumps({"translation": {"en": "a", "de": "A"}})
    write(tmp_path, two_en="a\n\nb\n", two_de="A\n\nB\n", tab_en__de_tsv="a\tA\n\nb\tB\n",
          lines_de__en_json=f"{item}\n \n{item}\n".replace('"a", "de": "A"', '"a", "de": "A"'))  # fmt: skip
    for split in ("two", "tab", "lines"):
        assert len(read_parallel(tmp_path, split, "en-de")) == 2
        assert "skipped 1 of 3" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(tmp_path):
    """It stayed in the first line; JSON with one was refused."""
    mark = b"\xef\xbb\xbf"
    item = json.dumps([{"translation": {"en": "a", "de": "A"}}]).encode()
    write(tmp_path, two_en=mark + b"a\n", two_de=mark + b"A\n", list_de__en_json=mark + item)
    assert (
        read_parallel(tmp_path, "two", "en-de")
        == read_parallel(tmp_path, "list", "en-de")
        == [("a", "A")]
    )


@pytest.mark.parametrize(
    "files, pair, culprits",
    [
        (
            dict(train_en="a\nb\n", train_de="A\n"),
            "en-de",
            ["train.en has 2 lines", "train.de has 1"],
        ),
        (
            dict(train_en=b"a\n\xff\n", train_de="A\nB\n"),
            "en-de",
            ["train.en", "line 2 of 2", "UTF-8"],
        ),
        (dict(train_en="a\n"), "en-de", ["no train text for en-de", "one side, but no train.de"]),
        (dict(train_en__de_en="a\n"), "de-en", ["one side, but no train.en-de.de"]),
        (dict(train_en="a\n", train_fr="b\n"), "en-de", ["pairs found: en-fr, fr-en"]),
        (
            dict(train_en__de_tsv="a\tb\nc\n"),
            "en-de",
            ["train.en-de.tsv", "line 2 of 2", "1 tab-separated"],
        ),
        (dict(train_en__de_json="[{}]"), "en-de", ["train.en-de.json", "item 1 of 1", "en and de"]),
        (dict(train_en__de_json='{"translation": {"en": "a", "de": 7}}'), "en-de", ["item 1 of 1"]),
        (dict(train_en__de_json="nonsense"), "en-de", ["train.en-de.json", "JSON"]),
        (
            dict(train_en__de_json='[{"translation": {"en": "\\ud800", "de": "A"}}]'),
            "en-de",
            ["lone surrogate"],
        ),
        (dict(train_en="a\n", train_xx="b\n"), "en-xx", ["'xx'", "LANGUAGES in data.py"]),
        ({}, "ende", ["'ende'", "en-de"]),
        ({}, "en-en", ["'en-en'"]),
    ],
)
def test_bad_text_ends_in_one_line(tmp_path, files, pair, culprits):
    write(tmp_path, **files)
    with pytest.raises(InputError) as error:
        read_parallel(tmp_path, "train", pair)
    assert all(culprit in message(error) for culprit in culprits)


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        read_parallel(tmp_path / "nowhere", "train", "en-de")
    assert "nowhere: no train text" in message(error)


def test_rendered_prompt_and_target():
    """Prompt and target tokenized together would merge across the boundary; eos belongs to the target."""
    prompt, target = render(Letters, "en-de", "A {house}", "Ein Haus")
    text = "Translate this from English to German:\nEnglish: A {house}\nGerman:"
    assert prompt == Letters.encode(text)
    assert target == [*Letters.encode(" Ein Haus"), 2]
    assert render(Letters, "en-de", "A {house}") == (prompt, [])


def test_batches_by_hand():
    """Labels shifted twice or not at all; eos as an input; the last prompt token without its target."""
    (batch,) = make_batches(
        [([5, 6], [7, 8, 2]), ([9], [2]), ([4, 4, 4], [])], pad_id=3, tokens_per_batch=100
    )
    assert batch.ids.tolist() == [[5, 6, 7, 8], [4, 4, 4, 3], [9, 3, 3, 3]]
    assert batch.mask.tolist() == [
        [True] * 4,
        [True, True, True, False],
        [True, False, False, False],
    ]
    assert batch.targets.tolist() == [[-100, 7, 8, 2], [-100] * 4, [2, -100, -100, -100]]


def test_batches_hold_every_example_once_and_keep_to_size():
    rng = random.Random(0)
    examples = [([i] * rng.randint(1, 30), [i, 2]) for i in range(4, 204)]
    for seed in (None, 1):
        batches = list(make_batches(examples, 3, tokens_per_batch=64, seed=seed))
        assert sorted(row[0] for batch in batches for row in batch.ids.tolist()) == list(
            range(4, 204)
        )
        assert all(batch.ids.numel() <= 64 for batch in batches)
    padding = sum(int((~batch.mask).sum()) for batch in batches)
    assert padding < 0.1 * sum(batch.ids.numel() for batch in batches)
    ids = lambda seed: [batch.ids.tolist() for batch in make_batches(examples, 3, 64, seed=seed)]
    assert ids(1) == ids(1) != ids(2)
    (long,) = make_batches([([4] * 100, [])], 3, tokens_per_batch=64)
    assert long.ids.shape == (1, 100)


@pytest.mark.parametrize("case", plan.CASES)
def test_a_plan_counts_what_happens(case):
    """Operations that the real code does not do; tensors without values that live longer, or are not counted."""
    words = dict(
        layers=2, pairs=3, micro_tokens=256, cache_gb=1e-3, checkpointing=False, dtype="float32"
    )
    args = plan.Namespace(**words)
    config = tiny_config("bloom", vocabulary=500, layers=4)
    peak, operations = plan.plan(case, config, args)
    assert operations == pytest.approx(plan.measure(case, config, args)[1], rel=1e-3)
    weights = 4 * sum(p.numel() for p in Decoder(config).parameters())
    logits = 4 * 500 * (256 // plan.SENTENCE) * (plan.TARGET + 1)
    assert weights + (1e6 if case == "generate" else logits) < peak < 12e6
    args.micro_tokens = 2048
    assert (plan.plan(case, config, args)[0] > 2 * peak) == (case != "generate")


# --------------------------------------------------------------------------------------------------
# Worked examples, as the docstrings have them


def test_worked_examples():
    assert model.first_of({"n_embed": 8, "hidden_size": 4}, "n_embed", "hidden_size") == 8
    assert model.published_names("bloom", "blocks.3.ffn.up.bias") == ["h.3.mlp.dense_h_to_4h.bias"]
    assert data.group_by_length([5, 9, 1, 7], 100, rows_per_batch=3) == [[1, 3, 0], [2]]
    assert data.group_by_length([5, 9, 1, 7], 18) == [[1, 3], [0, 2]]
    assert lander.union({"en-de": [1, 7], "fr-cs": [1, 2]}) == [1, 2, 7]
    assert model.survivors(torch.tensor([True, False, True, True])).tolist() == [0, 3, 2]
    assert data.characters_of("Zl") == "\\U00002028-\\U00002028"
    assert [data.byte_characters()[byte] for byte in (65, 32, 10)] == ["A", "Ġ", "Ċ"]
    assert data.split_pair("en-de") == ("en", "de")
    (ids,), _, (targets,) = data.make_batch([([5, 6], [7, 2])], pad_id=3)
    assert (ids.tolist(), targets.tolist()) == ([5, 6, 7], [-100, 7, 2])
    meaning = {"S": (3, True, 1), "O": (5, False, None), "V": (2, True)}
    words = demo.toy_words("qaa")
    assert demo.toy_sentence("qaa", words, meaning) == "dida sesas gelied lefa."
    assert demo.toy_sentence("qaa", words, meaning, pidgin=True) == "dida sesa geli lefa."


# --------------------------------------------------------------------------------------------------
# Real input, where it is there


@pytest.mark.skipif(
    not (SHARED / "checkpoints/bloom-mini").exists(), reason="no ../shared/checkpoints/bloom-mini"
)
def test_a_real_checkpoint_translates_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "checkpoints/bloom-mini"
    ours = load_model(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    sources = [
        source for source, _ in read_parallel(SHARED / "data/multi30k", "valid", "en-de")[:8]
    ]
    prompts = [render(tokenizer, "en-de", source) for source in sources]
    (batch,) = make_batches(prompts, tokenizer.pad_id, 10**6)
    assert_close(
        ours(batch.ids, batch.mask),
        theirs(batch.ids, attention_mask=batch.mask.long()).logits,
        batch.mask,
    )
    new = ours.generate(batch.ids, batch.mask, 48, tokenizer.eos_id)
    for ids, mask, found in zip(batch.ids, batch.mask, new):
        expected = theirs.generate(ids[mask][None], max_new_tokens=48, do_sample=False)[
            0, mask.sum() :
        ].tolist()
        assert found == [token for token in expected if token != tokenizer.eos_id]


@pytest.mark.parametrize("name", ["bloom-style-16k", "baichuan-style-16k"])
@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no ../shared/tokenizers")
def test_real_tokenizers_agree_with_the_libraries(name):
    ours = load_tokenizer(SHARED / "tokenizers" / name)
    if name.startswith("bloom"):
        tokenizers = pytest.importorskip("tokenizers")
        theirs = tokenizers.Tokenizer.from_file(
            str(SHARED / "tokenizers" / name / "tokenizer.json")
        )
        encode = lambda text: theirs.encode(text).ids
    else:
        theirs = sentencepiece.SentencePieceProcessor(
            model_file=str(SHARED / "tokenizers" / name / "tokenizer.model")
        )
        encode = theirs.encode
    for code in ("en", "de", "fr", "it", "ar", "zh"):
        for line in data.read_lines(SHARED / "data/flores200" / f"test.{code}"):
            ids = ours.encode(line)
            assert ids == encode(line) and ours.decode(ids) == line
