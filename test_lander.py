"""Tests on tiny random models, on the CPU, without downloads, with requirements.txt alone:  pytest

Each test says which mistake it would catch. What takes longer, or another library, is in checks/.

In this file: tiny models; the method; a tiny world and runs in it; what a user can get wrong; then
what they stand on, the decoder, generation, checkpoints, tokenizers, text and files.
"""

import contextlib
import doctest
import itertools
import json
import math
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import sacrebleu
import sentencepiece
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

import data
import lander
import model
from data import InputError, list_pairs, load_tokenizer, make_batches, read_parallel, render
from lander import read_settings
from model import Decoder, load_model, save_model

torch.set_num_threads(1)  # the tensors are small


# --------------------------------------------------------------------------------------------------
# Tiny models


def randomize(module, seed=0, std=0.15):
    """Every parameter away from its start: zero biases and unit norms would hide a mix-up."""
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
    "gemma2": {"num_key_value_heads": 2, "head_dim": 10, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 10, "sliding_window_pattern": 2},
}
for kind in ("gemma2", "gemma3_text"):
    TINY_LLAMA_LIKE[kind] |= {"sliding_window": 5, "query_pre_attn_scalar": 24}
TINY_LLAMA_LIKE["llama"]["rope_scaling"] = LLAMA3_SCALING


def tiny_config(kind, vocabulary=90, layers=2):
    sizes = {"model_type": kind, "vocab_size": vocabulary}
    if kind == "bloom":
        return model.read_config(sizes | {"n_embed": 32, "n_layer": layers, "n_head": 4})
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
        return model.read_config(sizes)
    if kind in TINY_LLAMA_LIKE:
        sizes["num_hidden_layers"] = layers
        return model.read_config(LLAMA_LIKE | sizes | TINY_LLAMA_LIKE[kind])
    longest = "max_position_embeddings" if kind == "rotary" else "model_max_length"
    more = {longest: 64, "vocab_size": vocabulary, "normalize_head": True}
    return model.read_config(BAICHUAN | more)


def tiny_decoder(kind, seed=0, vocabulary=90, layers=2):
    decoder = Decoder(tiny_config(kind, vocabulary, layers))
    return randomize(decoder, seed, std=0.5)  # wild enough for varied continuations


KINDS = "bloom", "rotary", "alibi", "llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text"
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
    """Padding counted, the mean of all tokens for that of prompts' means, a block's input."""
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
    """diff[l] scoring layer l for l + 1; ties to the higher layer; the first layer selected."""
    differences = lander.layer_differences(torch.tensor([0.0, 2.0, 1.0, 3.0, 3.5]))
    assert differences.tolist() == [2.0, 1.0, 2.0, 0.5]
    for k, layers in ((1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4])):
        assert lander.select_layers(differences, k) == layers
    refused(lambda: lander.select_layers(differences, 5), "5 layers")


def brute_force_awareness(decoder, examples, layers, readers):
    """|h * dL/dh| per sentence and token, with every weight taking part in autograd."""
    kept, sums, tokens = {}, 0, 0

    def keep(module, inputs):
        inputs[0].retain_grad()
        kept[module] = inputs[0]

    modules = [[decoder.blocks[i].get_submodule(r) for r in readers] for i in layers]
    hooks = [m.register_forward_pre_hook(keep) for row in modules for m in row]
    for prompt, target in examples:
        logits = decoder(torch.tensor([prompt + target[:-1]]))[0].log_softmax(-1)
        (-logits[range(len(prompt) - 1, len(logits)), target].sum()).backward()
        rows = [torch.cat([(kept[m] * kept[m].grad)[0] for m in row], 1) for row in modules]
        sums = sums + torch.stack(rows).abs().sum(1).detach()  # of [K, T, F]
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
    """Labels shifted twice, a mean loss, |a sum|, padding counted; no graph if all is frozen."""
    decoder, readers = tiny_decoder(kind), lander.NEURONS + lander.CHANNELS
    examples, F = random_examples(9), decoder.config.ffn_size
    for layers in ([0, 1], [1], [1, 0]):
        expected = brute_force_awareness(decoder.requires_grad_(True), examples, layers, readers)
        least = 1e-5 * expected.max().item()
        decoder.requires_grad_(not frozen)
        one_by_one, all_at_once = (make_batches(examples, 3, tokens) for tokens in (1, 10**6))
        shuffled = make_batches(examples[::-1], 3, 30, seed=1)
        padded_left = map(left_padded, make_batches(examples, 3, 60))
        for batches in (one_by_one, shuffled, padded_left):
            scores = lander.neuron_awareness(decoder, batches, layers)
            assert scores.shape == expected[:, :F].shape and scores.dtype == torch.float32
            assert torch.allclose(scores, expected[:, :F], rtol=1e-3, atol=least)
        scores = lander.neuron_awareness(decoder, all_at_once, layers, readers)
        assert torch.allclose(scores, expected, rtol=1e-3, atol=least), "channels, in the same pass"
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_awareness_predicts_the_damage_of_removing_a_neuron():
    """A score that ranks neurons by something else than their effect on the loss."""
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
    """Layer 0 scaled: .5 .5 .5 .5 3, 1.5 .5 .5 .5 2; unscaled, pair 1 would own everything."""
    owner = lander.categorize(TABLE, epsilon=0.6)
    assert owner.tolist() == [[1, -1, -1, -1, 0], [0, -1, -1, -1, 1]]
    assert owner.dtype == torch.long
    assert lander.categorize(TABLE, epsilon=1.0).eq(-1).all()
    one_each = lander.categorize(TABLE, epsilon=0.8)
    assert one_each.tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert lander.categorize(TABLE, epsilon=0.0).ge(0).all()
    refused(lambda: lander.categorize(TABLE[:1], epsilon=0.9), "one pair only")


def test_share_by_hand():
    """Layer 0 of the table: pair 1 has 1.5 on its own neuron, .5 on average on general ones."""
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
    """What everything rests on. A gate's bias forgotten, a neuron lost."""
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


@pytest.mark.parametrize("share", ["off", "own", 1e-6, 1e-3, 0.3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_freshly_routed_model_is_the_pretrained_one(kind, share):
    """A neuron in two groups or none, a bias counted twice, factors that do not start at 1."""
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
    """A mean over an empty group is no number; a group that scores nothing has share 0 or 1."""
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
        activation = model.ACTIVATIONS[decoder.config.activation]
        h = activation(h) if ffn.gate is None else h * activation(projected(ffn.gate))
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
    """A gradient times zero, which AdamW's decay still moves; another pair's neurons trained."""
    decoder = routed_decoder(kind, routing=routing)
    checkpoint = copies(decoder)
    learners, optimizer = adamw(decoder)
    with_gradient = set()
    for name, p in decoder.named_parameters():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda p, name=name: with_gradient.add(name))
    for pair in ("en-de", "fr-en"):
        before = copies(decoder)
        for seed in range(5):
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
    """A rest that is not the checkpoint's rows; training that writes into the FFN they are of."""
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
    """A baseline that trains all weights, or some, takes the same steps, without a RoutedFFN."""
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
    """How many micro-batches a step took, its loss, norm, and {name: gradient before clipping}."""
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
    """A mean of means, which weighs short micro-batches more; a block recomputed unrouted."""
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
    """Cut, or replaced, which changes every later step; AdamW's decay in an empty step."""
    monkeypatch.setattr(lander, "process_count", lambda: processes)
    monkeypatch.setattr(lander.distributed, "all_reduce", lambda tensor: None)
    decoder = tiny_decoder("bloom", vocabulary=128)
    text = {"en-de": [("a" * length, "b") for length in (1, 60, 2, 60)]}
    settings = read_settings(steps=4, batch=1, max_tokens=100)
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


def test_pairs_are_spread_over_an_epoch_of_every_example_once():
    """All of the shorter text first, in the warm-up; an example lost; each epoch the same."""
    sizes = {"en-de": 7, "fr-en": 3}
    steps = list(itertools.islice(lander.schedule(sizes, 2, seed=0), 12))
    assert [pair for pair, _ in steps[:6]] == ["en-de", "fr-en", "en-de", "en-de", "fr-en", "en-de"]
    for epoch in (steps[:6], steps[6:]):
        for pair, size in sizes.items():
            numbers = [number for of, batch in epoch if of == pair for number in batch]
            assert sorted(numbers) == list(range(size))
    assert steps[:6] != steps[6:], "each epoch is shuffled anew"
    assert steps == list(itertools.islice(lander.schedule(sizes, 2, seed=0), 12))


def test_learning_rate_by_hand():
    """No warm-up or a longer one; a last step of rate zero; a twentieth of 30 not rounded."""
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
    # [P, K, H_kv, query heads of a key's, d]: a channel has the mean of its query heads' scores.
    scores = awareness.unflatten(2, (decoder.config.kv_heads, -1, decoder.config.head_size)).mean(3)
    for group, owner in zip(groups.values(), lander.categorize(scores.flatten(2), 0.7)):
        assert group["channels"] == lander.owned_by(owner, PAIRS)
    return groups


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_a_sum_over_channels(kind):
    """A row of another head, or of the key for the query; a row of two channels or none."""
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
    # What the output projection reads, before and after a value's row is zero.
    place, mixed = (0, "attention.output"), []
    channel = config.head_size if config.kv_heads > 1 else 0
    for _ in range(2):
        with lander.recording(decoder, [place]) as h:
            decoder(ids, mask)
        mixed.append(h[place].detach())  # [B, T, H * d]
        for p in fused.parameters():
            p.data[rows[channel, -1]] = 0
    changed = (mixed[0] != mixed[1]).any(0).any(0).nonzero().flatten().tolist()
    assert changed == sorted(columns[channel].tolist())
    assert len(changed) == config.heads // config.kv_heads
    if not config.query_key_norm:  # which mixes a head's channels
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
    """A start that is another function; a frozen row that moves; another pair's channel."""
    decoder = tiny_decoder(kind).to(dtype)
    ids, mask = padded_ids(decoder.config.vocab_size, "right")
    groups, whole = with_channels(decoder), copies(decoder)
    rows, columns = lander.channel_places(decoder.config)
    x = torch.ones(1, 3, decoder.config.hidden_size, dtype=dtype)
    bias = torch.zeros(1, 1, 3, 3)
    attend = lambda layer: decoder.blocks[layer].attention(x, bias.to(dtype), None, None, layer)
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
    settings = read_settings(keep=weight, micro_tokens=micro_tokens)
    keeper = lander.Keeper(decoder, examples, settings, pad_id=3)
    for i, p in enumerate(learners.values()):
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.requires_grad_(True)
    return keeper, learners


@pytest.mark.parametrize("rows_at_once", [10**6, 5])
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_the_gradient_of_keep(kind, rows_at_once, monkeypatch):
    """KL the other way round, over padding or prompts, a mean of means, or routed."""
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
    before, optimizer = copies(keeper.model), torch.optim.AdamW(learners.values(), fused=True)
    batches = [], batched(random_examples(3)), []
    steps = [("en-de", own, 0) for own in batches]
    rest = {"en-de": learners}, steps, 3, optimizer, 1e-2
    entries = lander.training_steps(keeper.model, *rest, keeper=keeper)
    assert ["kept" in entry for entry in entries] == [False, True, False]
    assert moved_since(before, keeper.model) == set(learners), "its router, too"


def test_a_step_keeps_one_batch_and_the_next_step_the_next():
    """The same twenty sentences in all steps."""
    keeper, _ = drifted(tiny_decoder("bloom"), random_examples(6), micro_tokens=20)
    size, drifts = len(keeper.batches), []
    for step in range(size + 1):
        keeper.add_gradients(step)
        drifts.append(keeper.drift)
    assert size > 2 and len(set(drifts)) == size and drifts[0] == drifts[-1]


# --------------------------------------------------------------------------------------------------
# A tiny world, and runs in it


LETTERS = {"en": "bdfg", "de": "hjkm", "fr": "lnpr", "cs": "stvz"}


def sentence(code, numbers):
    """Made up: a word of two letters for each number below 20. "en", [0, 5] -> "ba de." """
    return " ".join(LETTERS[code][n % 4] + "aeiou"[n // 4] for n in numbers) + "."


def train_bpe(path, lines, special=("<unk>", "<s>", "</s>", "<pad>"), size=340):
    """A tokenizer.json like BLOOM's: byte-level BPE, its special tokens first."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    library.pre_tokenizer = level(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    options = dict(initial_alphabet=level.alphabet(), show_progress=False, vocab_size=size)
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=list(special), **options)
    library.train_from_iterator(lines, trainer)
    path.parent.mkdir(exist_ok=True)
    library.save(str(path))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny BLOOM checkpoint with a tokenizer, and multi-way text in four languages."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    meanings = [rng.sample(range(20), 4) for _ in range(70)]
    for split, part in dict(train=meanings[:40], valid=meanings[40:50], test=meanings[50:]).items():
        for code in LETTERS:
            data.write_lines(folder / f"data/{split}.{code}", [sentence(code, m) for m in part])
    prompts = [data.prompt_text("en-de", sentence("en", meaning)) for meaning in meanings]
    train_bpe(folder / "weights/tokenizer.json", prompts)
    decoder = tiny_decoder("bloom", vocabulary=360, layers=4)
    randomize(decoder).final_norm.bias.data.zero_()  # which would make it repeat one token
    save_model(decoder, folder / "weights")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL_RUN = """--layers 2 --lr 1e-2 --batch 8 --score-sentences 10 --eval-sentences 4
    --max-tokens 120 --score-pairs en-de,fr-de,de-en --out run"""
TRANSLATE = "--tuned run --translate".split()
EXPORT = "--tuned run --export exported".split()


def arguments(world, words="", pair="en-de"):
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
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def noted(name, **more):
    """While open, a function of lander notes its calls, as a mock of the same name."""
    function = getattr(lander, name)
    double = mock.Mock(wraps=function, **more)
    double.__module__, double.__qualname__ = function.__module__, function.__qualname__
    return mock.patch.object(lander, name, double)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A run of two pairs with all flags that change the work, one line with an empty side."""
    folder = tmp_path_factory.mktemp("fünf")
    shutil.copytree(world / "data", folder / "data")
    for path in (folder / "data").glob("test.*"):
        lines = path.read_text().split("\n")[:5]
        path.write_text("\n".join([lines[0], "" if path.suffix == ".de" else lines[1], *lines[2:]]))
    words = f"""--weights weights --data {folder}/data --out {folder}/run --steps 5 --seed 3
        --score-pairs all --eval-pairs en-de,fr-de,cs-en --eval-sentences 0 --beams 2
        --micro-tokens 300 --checkpointing --max-tokens 0 --epsilon 0.5 --dtype bfloat16"""
    umask = os.umask(0o027)
    with contextlib.chdir(world), open(folder / "output", "w", encoding="utf-8") as output:
        with contextlib.redirect_stdout(output), noted("Progress") as progress:
            assert lander.main(arguments(world, words, pair="en-de, fr-de".replace(" ", ""))) == 0
    os.umask(umask)
    (folder / "labels").write_text("\n".join(call.args[0] for call in progress.call_args_list))
    return folder / "run"


def test_what_a_run_shows_and_leaves(finished):
    """Minutes of silence; results shown twice; files that nobody else may read."""
    labels = (finished.parent / "labels").read_text().splitlines()
    for what in ("layers for", "scoring", "translating", "validation loss of", "training"):
        assert any(label.startswith(what) for label in labels), what
    lines = (finished.parent / "output").read_text("utf-8").splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 40
    shown = [line for line in lines if line.startswith(("pair ", "mean")) or line.endswith("tuned")]
    assert len([line for line in shown if line.endswith("  tuned")]) == 2 and len(shown) == 5
    losses = [line for line in lines if "loss of a validation token" in line and " to " in line]
    assert len(losses) == 2
    specific = re.compile(r"   layer \d: 64 specific neurons, \d+ of en-de, ")
    assert any(map(specific.match, lines))
    expected = {"args.json", "layers.json", "awareness.safetensors", "neurons.json", "lock"}
    expected |= {"tuned.safetensors", "log.jsonl", "results.json"}
    for name in ("before", "after", "source", "reference"):
        expected |= {f"hypotheses/{pair}.{name}.txt" for pair in ("en-de", "fr-de", "cs-en")}
    assert contents(finished).keys() == expected
    assert {(finished / name).stat().st_mode & 0o777 for name in expected} == {0o640}
    log = log_of(finished)
    assert [entry["step"] for entry in log] == [*range(6), 5]
    assert [entry["pair"] for entry in log[1:-1]] == ["en-de", "fr-de"] * 2 + ["en-de"]
    assert all(entry["loss"] > 0 for entry in log[1:-1]), "of no limit all examples are left out"
    assert set(log[0]["valid_loss"]) == {"en-de", "fr-de"}
    args = json.loads((finished / "args.json").read_text())
    assert (args["beams"], args["dtype"], args["seed"]) == (2, "bfloat16", 3)
    assert args["files"].keys() >= {"data/train.en", "data/test.cs", "weights/model.safetensors"}


def test_the_files_of_a_run_can_be_evaluated_alone(finished):
    """Hypotheses out of order, escaped, or not line by line beside sources and references."""
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["en-de", "fr-de", "cs-en"]
    read = lambda name: (finished / f"hypotheses/en-de.{name}.txt").read_text().split("\n")[:-1]
    for name, code in (("source", "en"), ("reference", "de")):
        first, second, third, *_ = (finished.parent / f"data/test.{code}").read_text().split("\n")
        assert read(name)[:2] == [first, third] and len(read(name)) == 4
    assert second == "", "of the pair that is left out"
    assert set(results["en-de"]) == {"before", "after"}
    for when, scores in results["en-de"].items():
        bleu = sacrebleu.corpus_bleu(read(when), [read("reference")])
        chrf = sacrebleu.corpus_chrf(read(when), [read("reference")])
        assert (scores["bleu"], scores["chrf"]) == (bleu.score, chrf.score)
        assert "tok:13a" in scores["bleu_signature"] and scores["cut"] >= 0
        assert scores["sentences"] == 4


def test_translating_with_a_finished_run(finished, here, capsys, monkeypatch):
    """A line lost or out of order, the frozen model, other beams or types than the run had."""
    shutil.copytree(finished, "run")
    names = [f"run/hypotheses/en-de.{name}.txt" for name in ("source", "before", "after")]
    lines, before, after = (Path(name).read_text().splitlines() for name in names)
    Path("input").write_text(f"{lines[0]}\n\n{lines[1]}\n{lines[2]}\n \n{lines[3]}")
    assert "one --pair; that run tuned en-de,fr-de" in error_of(capsys, [*TRANSLATE, "input"])
    with noted("translate_text") as double:
        captured = ends_in(capsys, 0, [*TRANSLATE, "input", "--pair", "en-de"])
    settings = read_settings(EXPORT, **json.loads(Path("run/args.json").read_text()))
    assert double.call_args.args[5] == settings.new_tokens["en-de"] == 3
    expected = [after[0], "", after[1], after[2], "", after[3], ""]
    assert captured.out.split("\n") == expected and "not tuned" not in captured.err
    assert after != before
    Path("headed").write_text("header\n" + Path("input").read_text())
    with open("headed", "rb", buffering=0) as source:
        source.readline()  # as a script may do
        opened = lambda path, mode: open(path or os.dup(source.fileno()), mode)
        monkeypatch.setattr(data, "open", opened, raising=False)
        assert ends_in(capsys, 0, [*TRANSLATE, "-", "--pair", "en-de"]).out == captured.out
    captured = ends_in(capsys, 0, [*TRANSLATE, "input", "--pair", "de-en"])
    assert len(captured.out.split("\n")) == 7 and "de-en was not tuned" in captured.err
    assert (settings.beams, settings.dtype, settings.no_routing) == (2, "bfloat16", False)
    assert "its tokens are routed" in error_of(capsys, EXPORT) and not Path("exported").exists()
    for words in ("--no-routing", "--units all"):
        assert "was made with" in error_of(capsys, [*EXPORT, *words.split()])


def full_disk(source, target):
    Path(target).write_text("half")
    raise OSError(28, "No space left on device")


BOTH_FILES = ["config.json", "model.safetensors"]
names_in = lambda folder: sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_a_run_and_its_export(world, here, capsys, kind):
    """Neurons in other places; weights rounded, or a sister's, under the trained ones."""
    save_model(tiny_decoder(kind, vocabulary=360, layers=4).bfloat16(), here / "weights")
    shutil.copy(world / "weights/tokenizer.json", "weights")
    Path("weights/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    Path("weights/chat_template.jinja").write_text("{{ messages }}")
    words = "--weights weights --steps 4 --no-routing --eval-pairs en-de,de-en"
    lines = ends_in(capsys, 0, arguments(world, words)).out.splitlines()
    assert [line[:6] for line in lines if line.startswith("mean")] == ["mean, "] * 2
    log, trained = log_of("run"), load_file("run/tuned.safetensors")
    assert log[-1]["valid_loss"]["en-de"] < log[0]["valid_loss"]["en-de"]
    assert any("bias" in name for name in trained)
    assert lander.main(EXPORT) == 0
    exported, base = load_model("exported"), load_model("weights", dtype=torch.float32)
    layers = {name.split(".")[1] for name in trained}
    expected = {f"blocks.{i}.ffn.{name}" for i in layers for name in model.NEURON_DIMENSION}
    expected &= dict(base.named_parameters()).keys()
    assert moved_since(copies(base), exported) == expected
    settings = read_settings(EXPORT, **json.loads(Path("run/args.json").read_text()))
    tuned, tokenizer, _ = lander.load_tuned(settings)
    ids = random_ids((2, 9), tokenizer.vocab_size)
    assert_close(exported(ids), tuned(ids))
    assert not torch.allclose(exported(ids), base(ids), atol=1e-3)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert Path("exported", name).read_bytes() == Path("weights", name).read_bytes()
    assert "exported: not empty" in error_of(capsys, EXPORT)
    with mock.patch.object(shutil, "copyfile", full_disk):
        assert "No space left" in error_of(capsys, [*EXPORT, "--export", "broken"])
    assert names_in(Path("broken")) == BOTH_FILES
    with mock.patch.object(data, "save_file", side_effect=SafetensorError("no space")):
        assert error_of(capsys, [*EXPORT, "--export", "unwritten"]) == "error: no space"
    stored = load_file("weights/model.safetensors")
    save_file({name: -tensor for name, tensor in stored.items()}, "weights/model.safetensors")
    for words in ([*TRANSLATE, "/dev/null"], [*EXPORT, "--export", "another"]):
        assert "run: was made with weights/model.safetensors" in error_of(capsys, words)
    assert not Path("another").exists()


def test_training_lowers_the_loss_with_routing_without_and_with_empty_groups(world, here):
    """A run that trains nothing; no share to divide by, groups of no rows."""
    finals = []
    rows = [("--epsilon 0.8", 2), ("--epsilon 0.8 --no-routing", 0), ("--epsilon 0", 0)]
    for words, routed_layers in (*rows, ("--epsilon 1", 0)):
        assert lander.main(arguments(world, f"{words} --out run{len(finals)}")) == 0
        log, tensors = log_of(f"run{len(finals)}"), load_file(f"run{len(finals)}/tuned.safetensors")
        assert log[-1]["valid_loss"]["en-de"] < log[0]["valid_loss"]["en-de"] - 0.3
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        routers = [tensor for name, tensor in tensors.items() if ".router." in name]
        assert len(routers) == routed_layers
        assert all(router.abs().sum() > 0 for router in routers)
        finals.append(log[-1]["valid_loss"]["en-de"])
    assert len(set(finals)) == 4


def test_bleu_tokenizer_follows_the_target():
    """13a in a language without spaces, for which a sentence is a word."""
    without_spaces = ["今天天气很好，我们去公园吧。"]
    names = {"en-zh": "zh", "en-ja": "ja-mecab", "en-ko": "ko-mecab", "zh-en": "13a"}
    for pair, name in {**names, "en-th": "char"}.items():
        metric = lander.make_metrics(pair, ["a b"])["bleu"]
        metric.corpus_score(["这 is a 本"], [["这 is a 书"]])
        assert f"tok:{name}" in str(metric.get_signature())
    for references, name in ((without_spaces, "char"), ([*without_spaces, "so a word"], "13a")):
        assert data.bleu_tokenizer("wuu", references) == name
    assert data.bleu_tokenizer("zho_Hant", without_spaces) == "zh"


def test_scoring_takes_a_sample_of_the_seed(world):
    """The first sentences of a sorted corpus are its shortest, or all of one document."""
    tokenizer, scored = load_tokenizer(world / "weights"), []
    settings = read_settings(pair="en-de", data=f"{world}/data", score_sentences=10)
    for settings.seed in (0, 0, 1):
        inputs = lander.read_inputs(tokenizer, ["en-de"], settings)
        scored.append(inputs.scoring["en-de"])
    begin = [render(tokenizer, "en-de", *pair) for pair in inputs.train["en-de"][:10]]
    assert scored[0] == scored[1] != scored[2] and begin not in scored


def test_a_language_can_be_named(world, here, capsys, monkeypatch):
    """A file to edit for each language that the table has not; a name that is lost on the way."""
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    shutil.copytree(world / "data", "data")
    for path in Path("data").glob("*.de"):
        path.rename(path.with_suffix(".xx"))
    words = arguments(world, "--data data --score-pairs en-xx,xx-en --steps 1", pair="en-xx")
    assert "no language 'xx'; add --language xx=NAME" in error_of(capsys, words)
    prompts, prompt_text = [], data.prompt_text
    noted = lambda *rest: prompts.append(prompt_text(*rest)) or prompts[-1]
    monkeypatch.setattr(data, "prompt_text", noted)
    assert lander.main([*words, "--language", "xx=Xish,yy=Other Name"]) == 0
    begins = {f"Translate this from {both}" for both in ("English to Xish", "Xish to English")}
    assert {prompt.split(":")[0] for prompt in prompts} == begins
    prompts.clear()
    Path("input").write_text("ba de.\n")
    assert lander.main([*TRANSLATE, "input"]) == 0 and "to Xish" in prompts[0], "as the run had it"


def write(folder, **files):
    """train_en__de_tsv="..." -> train.en-de.tsv"""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "-").replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_limits_grow_with_what_a_script_takes(here, capsys):
    """Burmese takes ten tokens where English takes one: skipped in training, cut in translation."""
    short, long, longest = "ab cd ef\n" * 20, "abcdefgh" * 99 + "\n", "abcdefgh" * 999 + "\n"
    write(here, train_en=short, train_de=short, train_fr=long * 19 + longest)
    write(here, test_en=short, test_de=short, test_fr=long * 20)
    prompt = len(data.prompt_text("en-fr", "ab cd ef"))
    of_fr = math.ceil(3 * (8 * 99 + 2) / prompt)
    settings = read_settings(data=".", pair="en-de", score_pairs="en-de,de-en")
    inputs = lander.read_inputs(Bytes, ["en-de"], settings)
    assert inputs.max_tokens == 4 * (prompt + 10) and inputs.new_tokens == {"en-de": 3, "de-en": 3}
    assert "en-de: 1 of 20 test pairs are in the train text" in capsys.readouterr().err
    settings.eval_pairs = "en-fr"
    inputs = lander.read_inputs(Bytes, ["en-de"], settings)
    assert inputs.new_tokens["en-fr"] == of_fr, "of a pair that is only evaluated"
    settings.pair = settings.score_pairs = "en-de,en-fr"
    inputs = lander.read_inputs(Bytes, ["en-de", "en-fr"], settings)
    assert inputs.new_tokens == {"en-de": 3, "en-fr": of_fr}
    assert inputs.max_tokens == 4 * (prompt + 8 * 99 + 2) and len(inputs.scoring["en-fr"]) == 19
    said = f"1 of 20 examples are left out, over {inputs.max_tokens} tokens"
    assert said in capsys.readouterr().err
    read = partial(lander.read_inputs, Bytes, ["en-de", "en-fr"], settings)
    refused(lambda: read(longest=prompt + 5), f"longer than --max-tokens {prompt + 6}")


def test_two_spellings_are_one_pair(world, here, capsys):
    """A pair compared with itself, which shares out its own neurons; not routed later."""
    shutil.copytree(world / "data", "data")
    for path in Path("data").glob("test.*"):
        path.rename(path.with_suffix({".en": ".eng_Latn", ".de": ".deu"}.get(path.suffix, ".fr")))
    for name, other in (("train.en", "train.eng"), ("train.de", "train.deu")):
        shutil.copy(f"data/{name}", f"data/{other}")
    words = "--data data --score-pairs all --eval-pairs eng-deu --steps 2"
    assert lander.main(arguments(world, words)) == 0
    results = json.loads(Path("run/results.json").read_text())
    groups = json.loads(Path("run/neurons.json").read_text())
    named = [data.pair_name(pair) for pair in groups.popitem()[1]["specific"]]
    assert list(results) == ["en-de"] and len(named) == len(set(named)) == 12
    Path("input").write_text("ba de.\n")
    captured = ends_in(capsys, 0, [*TRANSLATE, "input", "--pair", "eng_Latn-deu_Latn"])
    assert "not tuned" not in captured.err


@pytest.mark.parametrize("end, glue", [(" \n", " "), ("\n", "")])
def test_a_prompt_of_ones_own(world, here, capsys, monkeypatch, end, glue):
    """Training with one prompt and translating with another; ALMA's glued-on targets apart."""
    Path("prompt").write_text("{source}>{target}: {text} ={target}" + end)
    rendered, render = [], data.render
    noted = lambda *rest, **more: rendered.append(render(*rest, **more)) or rendered[-1]
    monkeypatch.setattr(lander, "render", noted)
    assert lander.main(arguments(world, "--prompt prompt --steps 1 --keep 1")) == 0
    decode = load_tokenizer(world / "weights").decode
    texts = [decode(prompt + target[:-1]) for prompt, target in rendered]
    begins = r"(English|German|French)>(English|German): [\w ]+\. =(English|German)"
    assert all(re.match(begins, text) for text in texts) and len(texts) > 60
    source, target = read_parallel(world / "data", "valid", "en-de")[0]
    assert f"English>German: {source} =German{glue}{target}" in texts
    Path("input").write_text("ba de.\n")
    rendered.clear()
    assert lander.main([*TRANSLATE, "input"]) == 0
    assert decode(rendered[0][0]) == "English>German: ba de. =German"
    Path("prompt").write_text("{source} {target} {text}")
    assert "template " in error_of(capsys, "--out run --resume --prompt prompt".split())
    Path("prompt").write_text("{source}\n{target}\n{text}")
    assert "now {source}\\n" in error_of(capsys, "--out run --resume --prompt prompt".split())


def test_the_best_step_is_kept(world, here, capsys, monkeypatch):
    """The last weights for the best; a state that forgets them, or a log that does."""
    validation_loss = lander.validation_loss  # made to have its minimum at the fourth step
    monkeypatch.setattr(lander, "validation_loss", lambda *rest: abs(validation_loss(*rest) - 5))
    words = "--steps 6 --valid-every 2 --lr 1"
    assert lander.main(arguments(world, f"{words} --out alone")) == 0
    log = log_of("alone")
    losses = {entry["step"]: entry["valid_loss"]["en-de"] for entry in log if "valid_loss" in entry}
    assert list(losses) == [0, 2, 4, 6] and min(losses, key=losses.get) == 4, losses
    for place in (2, 4, 6):
        interrupt(arguments(world, words), "train_step", place, save_every=10**6)
        assert lander.main("--out run --resume".split()) == 0
        assert contents("run") == contents("alone")
        shutil.rmtree("run")
    kept = load_file("alone/tuned.safetensors")
    assert lander.main(arguments(world, "--lr 1 --steps 6 --out last")) == 0
    assert any(not torch.equal(kept[n], t) for n, t in load_file("last/tuned.safetensors").items())
    Path("data").mkdir()
    for path in (world / "data").glob("t*"):
        shutil.copy(path, "data")
    assert "no valid text for en-de" in error_of(capsys, arguments(world, f"{words} --data data"))


def test_another_score_is_recorded(world, half_done, here, capsys, monkeypatch):
    """Half of a run's neurons by one score, half by another."""
    shutil.copytree(half_done, "run")
    mine = lambda *rest: lander_score(*rest).flip(-1)
    lander_score = lander.neuron_awareness
    monkeypatch.setattr(lander, "neuron_awareness", mine)
    line = error_of(capsys, "--out run --resume".split())
    assert "score lander.neuron_awareness, now test_lander.test_another" in line


# Interrupted and resumed


def interrupt(words, name="train_step", count=4, save_every=0):
    """A run that is interrupted at the nth call of a function; its state is saved each step."""
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


PLACES = [("neuron_awareness", 2), ("translate_text", 1), ("train_step", 4), ("write", 4)]


@pytest.mark.parametrize("name, count", PLACES)
def test_a_resumed_run_ends_in_the_same_bytes(world, whole, here, name, count):
    """Batches drawn anew, moments lost, a log line twice, a half-written file."""
    interrupt(arguments(world), name, count)
    assert not list(Path().rglob("*.half-written"))
    assert lander.main("--out run --resume".split()) == 0, "its own record says the rest"
    assert contents("run") == contents(whole)


def test_what_came_after_the_last_save_is_trained_again(world, whole, here):
    """A log that goes on after steps that were lost; a finished run that changes."""
    words = arguments(world, "--resume")
    interrupt(words, "save_state", 1, save_every=10**6)  # at the last step: none is saved
    interrupt(words, count=4)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 4, "pair": "en-de"}\n')
    for _ in range(2):
        assert lander.main(words) == 0
        assert contents("run") == contents(whole)


def test_more_pairs_and_sentences_on_a_finished_run(world, whole, here, capsys):
    """Results of other sentences under one name; a pair that is scored after tuning alone."""
    more = "--eval-pairs en-de,fr-cs,de-en --eval-sentences 5"
    assert lander.main(arguments(world, f"{more} --out alone")) == 0
    shutil.copytree(whole, "run")
    tuned = Path("run/tuned.safetensors").read_bytes()
    assert lander.main(f"--out run --resume {more}".split()) == 0
    assert Path("run/tuned.safetensors").read_bytes() == tuned
    assert contents("run") == contents("alone")
    table = ends_in(capsys, 0, "--out run --resume --eval-pairs en-de".split()).out
    assert "mean, tuned" in table and "fr-cs" not in table
    assert json.loads(Path("run/results.json").read_text()).keys() == {"en-de", "fr-cs", "de-en"}


OTHER_SETTINGS = """--pair fr-de, --layers 1, --epsilon 0.8, --lr 0.1, --steps 9, --batch 4,
    --seed 1, --max-tokens 99, --score-pairs all, --score-sentences 9, --beams 2, --keep 1,
    --language xx=Xish, --dtype bfloat16, --units all, --no-routing""".replace("\n", "").split(", ")
with_e = lambda text: text.replace("a", "e")
OTHER_FILES = {
    "data/test.de": with_e,
    "data/train.en": with_e,
    "data/valid.de": lambda text: text[:-1],
    "data/valid.en": lambda text: None,
    "weights/tokenizer_config.json": lambda text: "{}",
}


@pytest.mark.parametrize("other", [*OTHER_SETTINGS, *OTHER_FILES])
def test_resuming_with_another_setting_or_file_is_refused(
    world, half_done, here, capsys, monkeypatch, other
):
    """Half a run with one seed and half with another; old hypotheses, new references."""
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    shutil.copytree(half_done, "run")
    before, words, named = contents("run"), other, other.split()[0].strip("-").replace("-", "_")
    if other in OTHER_FILES:
        path, words = Path(other), f"--{other.split('/')[0]} {other.split('/')[0]}"
        shutil.copytree(world / path.parent, path.parent)
        changed = OTHER_FILES[other](path.read_text() if path.exists() else "")
        path.unlink(missing_ok=True) if changed is None else path.write_text(changed)
        named = other
    line = error_of(capsys, f"--out run --resume {words}".split())
    assert "run: was made with " in line and f"{named} " in line and ", now " in line
    assert contents("run") == before


def test_one_run_at_a_time_in_a_folder(world, whole, here, capsys):
    """Two processes that mix their files; a run over another; results of a run that is gone."""
    with data.locked(Path("run")):
        assert "run: in use by another process" in error_of(capsys, arguments(world))
    shutil.copytree(whole, "run", dirs_exist_ok=True)
    before = contents("run")
    assert "run: holds a run already; --resume" in error_of(capsys, arguments(world))
    assert contents("run") == before
    assert "nowhere: no run to go on with" in error_of(capsys, "--out nowhere --resume".split())


@pytest.mark.parametrize("found", ["the loss is nan", "its gradient inf"])
def test_a_loss_that_is_no_number_stops_the_run(world, here, monkeypatch, capsys, found):
    """NaN saved over the last good state; an overflowing gradient with a finite loss."""
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
    assert "step 3" in line and found in line and "a lower --lr and another --out" in line
    state = load_file("run/state.safetensors")
    assert state["step"] in (1, 2) and all(tensor.isfinite().all() for tensor in state.values())
    assert not Path("run/tuned.safetensors").exists()


@pytest.mark.parametrize("scores", [0.0, math.nan])
def test_scores_that_say_nothing_are_an_error(world, here, monkeypatch, capsys, scores):
    """A pair whose scores in a layer are all zero becomes NaN, and owns every specific neuron."""
    awareness, last = lander.neuron_awareness, torch.tensor([1])
    spoiled = lambda *rest: awareness(*rest).index_fill(0, last, scores)
    monkeypatch.setattr(lander, "neuron_awareness", spoiled)
    line = error_of(capsys, arguments(world))
    assert "awareness for en-de in layer" in line and "not all numbers, or all zero" in line


def test_the_demo_is_named_where_it_is_not(here, capsys, monkeypatch):
    """A traceback, ModuleNotFoundError: study, where the six files lie alone."""
    monkeypatch.setattr(lander, "__file__", str(here / "lander.py"))
    assert "study/demo.py" in error_of(capsys, [])


# Translations


class Bytes:
    """A tokenizer of one id a byte."""

    eos_id, end_ids, pad_id, vocab_size = 0, [0], 1, 128
    prompt_prefix, target_prefix = [], " "
    encode = staticmethod(lambda text: list(text.encode("ascii", "replace")))
    decode = staticmethod(lambda ids: bytes(ids).decode("latin-1"))


def translations(decoder, sources, new_tokens=3, **decoding):
    """What translate_text makes of sources, over bytes. -> lines, how many were cut"""
    settings = read_settings(**decoding)
    return lander.translate_text(decoder, Bytes, "en-de", sources, settings, new_tokens)


@pytest.mark.parametrize("beams", [1, 2])
def test_translations_do_not_depend_on_their_neighbours(beams, monkeypatch, capsys):
    """Cut at a neighbour's limit; loops not counted; one line whose attention ends all."""
    decoder = tiny_decoder("bloom", vocabulary=128)
    sources = ["a", "", "a longer one, than the others", "two words", " ", "b" * 40, "b" * 5000]
    expected, cut = translations(decoder, sources, beams=beams)
    assert cut > 0 and expected[1] == expected[4] == expected[6] == ""
    assert max(map(len, expected)) > 64 and min(map(len, (expected[0], expected[5]))) > 0
    assert "made for 2048; left empty: bbb" in capsys.readouterr().err
    for cache_gb in (0, 3e-4, 1):
        assert translations(decoder, sources, cache_gb=cache_gb, beams=beams) == (expected, cut)
    monkeypatch.setattr(lander, "ROWS_AT_ONCE", 3)
    assert translations(decoder, sources, beams=beams) == (expected, cut)
    text, settings = [(source, "x y") for source in sources], read_settings(beams=beams)
    hypotheses, scores = lander.evaluate(decoder, Bytes, "en-de", text, settings)
    assert hypotheses == expected and scores["cut"] == cut and scores["sentences"] == 7
    alone = [translations(decoder, [source], beams=beams) for source in sources]
    assert [lines[0] for lines, _ in alone] == expected and sum(cut for _, cut in alone) == cut


def test_what_is_kept_of_a_translation(monkeypatch):
    """More than a line; an end or a line break, even in the last token, taken for a loop."""
    decoder, limit = tiny_decoder("bloom"), 3 * len(data.prompt_text("en-de", "a"))
    new = [*b"A\nB"], [*b"C" * limit], [*b"D"], [*b"E" * (limit - 1), 10]
    monkeypatch.setattr(decoder, "generate", lambda *rest, **more: new)
    expected = ["A", "C" * limit, "D", "E" * (limit - 1)]
    assert translations(decoder, list("abcd")) == (expected, 1)


# --------------------------------------------------------------------------------------------------
# What a user can get wrong: each ends in status 2 and one line, which names it


BLOOM_CONFIG = dict(model_type="bloom", vocab_size=360, n_embed=32, n_layer=2, n_head=4)
LLAMA_CONFIG = LLAMA_LIKE | {"model_type": "llama", "vocab_size": 360}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ADAPTER = '{"base_model_name_or_path": "haoranxu/ALMA-7B-Pretrain"}'
ITEM = '{"translation": {"en": "a", "de": 7}}'
one = torch.ones(1)


def without(*names, **more):
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names} | more


def config(base=BLOOM_CONFIG, **changes):
    return {"config.json": json.dumps(base | changes)}


# Words after those of a good command, and a pattern of what is said.
BAD_WORDS = [
    ("--pair en-xx", "no language 'xx'; add --language xx=NAME"),
    *[
        (f"--pair {pair}", f"pair '{pair}': .*as in en-de")
        for pair in ("ende", "en-en", "en-eng_Latn")
    ],
    ("--pair ru-de", "data: no train text for ru-de.*pairs found: cs-de, cs-en"),
    ("--eval-pairs de-ru", "data: no test text for de-ru"),
    ("--pair=", "--pair and --data are needed"),
    ("--data nowhere", "nowhere: not there, expected a folder of text"),
    ("--data data/test.de", "data/test.de: a file, expected a folder of text"),
    ("--prompt data/test.de", "data/test.de: expected {text} once"),
    ("--weights nowhere", "nowhere/config.json: cannot be read, there is none"),
    ("--weights big/bloom", "hf download big/bloom --local-dir bloom"),
    ("--score-pairs en-de", "one pair only.*--score-pairs"),
    ("--pair en-de,de-en --score-pairs en-de --keep 1", "--keep"),
    ("--max-tokens 9", "scoring en-de: 10 of 10 examples are longer than --max-tokens 9"),
    ("--layers 4", "4 layers to select, but only 3"),
    ("--layers 0", "--layers is 0, expected 1 or more"),
    ("--epsilon 1.5", "--epsilon is at most 1"),
    (f"--steps {2**63}", r"expected 0 or more, below 2\^63"),
    ("--lr -1", "--lr is -1.0, expected 0 or more"),
    ("--lr 0", "--lr above 0"),
    ("--lr nan", "--lr is nan"),
    ("--lr fast", "'fast'"),
    ("--fast", "--fast"),
    ("--step 3", "--step"),
    ("--units some", "'some'"),
    ("--dtype int4", "'int4'"),
    ("--device abacus", "--device abacus"),
    ("--device meta", "--device meta"),
    ("--translate -", "--tuned"),
    ("--export x", "--tuned"),
    ("--tuned nowhere", "--translate or --export"),
    ("--tuned nowhere --translate - --export x", "--translate or --export"),
    ("--tuned nowhere --translate -", "nowhere: not the folder of a finished run"),
    ("--out data/test.de/run", "data/test.de"),
]
# Files of the text with other contents (None: none), and a pattern; forms beside train.en go alone.
BAD_TEXT = [
    ({"train.de": "a\n"}, "data/train.en has 40 lines but data/train.de has 1"),
    ({"train.en": b"a\n\xff"}, "data/train.en: line 2 is not UTF-8"),
    ({"train.en": LFS}, "data/train.en: a Git LFS pointer; git lfs pull"),
    ({"test.de": None}, "no test text for en-de; there is one side, but no test.de"),
    ({"train.en-de.tsv": ""}, "the train text of en-de is empty"),
    (
        {"train.en-de.csv": "a,A"},
        "no train text for en-de.* in train.cs, train.de, train.en-de.csv",
    ),
    ({"train.en-de.tsv": "a\tb\tc\n"}, "train.en-de.tsv: line 1 has 3 tab-separated columns"),
    ({"train.en-de.tsv": "a\tb\nc\n"}, "train.en-de.tsv: line 2 has 1 tab-separated columns"),
    ({"train.en-de.json": "[{}]"}, "train.en-de.json: item 1.*KeyError"),
    ({"train.en-de.json": f"[{ITEM}]"}, "train.en-de.json: item 1.*TypeError"),
    ({"train.en-de.json": "[{]"}, "train.en-de.json: cannot be read .JSONDecodeError"),
    ({"train.en-de.jsonl": ITEM.replace("7", '"A"') + "\n{\n"}, "train.en-de.jsonl: line 2"),
    ({"train.en-de.jsonl": ITEM.replace("7", '"\\ud800"')}, "jsonl: line 1.*surrogates"),
]
MODEL, INDEX, NAMES = "model.safetensors", "model.safetensors.index.json", "tokenizer_config.json"
# The same of the checkpoint; a function changes tensors.
BAD_WEIGHTS = [
    (
        {"config.json": None, "adapter_config.json": ADAPTER},
        "an adapter of haoranxu/ALMA-7B-P.*merge",
    ),
    ({"config.json": None, "tuned.safetensors": ""}, "a run's folder; .*--export"),
    *[({"config.json": text}, "weights/config.json: ") for text in ("{", "[]", "[" * 100000, LFS)],
    (
        config(model_type="gpt9"),
        "config.json: .*model_type is 'gpt9', expected one of bloom, baichuan",
    ),
    (config(n_head=None), "config.json: .*num_attention_heads"),
    (config(n_head=5), "hidden size 32 does not divide into 5 heads"),
    (config(n_layer="2"), "layers is '2', expected a positive integer"),
    (config(n_layer=10**6), "weights: 1000000 layers in config.json"),
    (config(layer_norm_epsilon="x"), "weights/config.json: "),
    (config(quantization_config={}), "quantization_config is {}, expected None"),
    (config(model_type="gpt2", activation_function="relu"), "activation_function is 'relu'"),
    (config(LLAMA_CONFIG, hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (config(LLAMA_CONFIG, rope_scaling={"type": "yarn"}), "'yarn', expected default"),
    (config(LLAMA_CONFIG, rope_scaling={"type": "linear"}), "'factor'"),
    (config(LLAMA_CONFIG, rope_parameters={"rope_type": "dynamic"}), "'dynamic'"),
    (config(LLAMA_CONFIG, rope_theta="large"), "'large'"),
    (config(LLAMA_CONFIG, model_type="mistral", sliding_window="all"), "window is 'all'"),
    ({MODEL: None}, "weights: no model.safetensors"),
    ({MODEL: None, "pytorch_model.bin": ""}, "python model.py convert weights"),
    ({MODEL: LFS}, "weights/model.safetensors: a Git LFS pointer"),
    *[({MODEL: raw}, "weights/model.safetensors: cannot be read") for raw in ("", "x" * 999)],
    ({MODEL: None, INDEX: '{"weight_map": {"x": "gone.safetensors"}}'}, "weights/gone.safetensors"),
    ({MODEL: None, INDEX: '{"weight_map": 7}'}, "index.json: cannot be read"),
    ({MODEL: without("ln_f.weight", x=one)}, "1 missing: ln_f.weight; 1 unexpected: x"),
    ({MODEL: without(**{"ln_f.weight": one})}, "weights: .*final_norm.weight.*Size..1"),
    ({MODEL: without(**{"lm_head.weight": one})}, "lm_head.weight is not the embedding"),
    ({"tokenizer.json": None}, "weights: no tokenizer.json and no tokenizer.model"),
    ({"tokenizer.json": "{}"}, "weights/tokenizer.json: cannot be read"),
    ({"tokenizer.json": None, "tokenizer.model": "x"}, "weights/tokenizer.model: cannot be read"),
    (config(vocab_size=300), "weights: the tokenizer has 311 tokens, .* an embedding of 300"),
    (
        {NAMES: '{"add_prefix_space": true}'},
        "add_prefix_space is True, which tokenizer.json does not",
    ),
    ({NAMES: "[]"}, "weights/tokenizer_config.json: a list, expected an object"),
]
MISTAKES = [(words, "", {}, said) for words, said in BAD_WORDS]
MISTAKES += [("", "data", files, said) for files, said in BAD_TEXT]
MISTAKES += [("", "weights", files, said) for files, said in BAD_WEIGHTS]


@pytest.mark.parametrize("words, folder, files, said", MISTAKES)
def test_a_mistake_ends_in_one_line(world, here, capsys, words, folder, files, said):
    """A traceback; an error after an hour; a run that begins; an option that does nothing."""
    shutil.copytree(world, here, dirs_exist_ok=True)
    for name, content in files.items():
        path = here / folder / name
        if callable(content):
            save_file(content(load_file(path)), path)
        elif content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if path.suffix in (".tsv", ".json", ".jsonl", ".csv") and folder == "data":
            Path("data/train.en").unlink()
    if "--tuned" not in words:
        words = f"--pair en-de --weights weights --data data {SMALL_RUN} {words}"
    captured = ends_in(capsys, 2, words.split())
    *usage, line = captured.err.splitlines()
    assert not [more for more in usage if not more.startswith(("usage: ", "   "))], captured.err
    assert re.search(f"error: .*{said}", line) and len(line) < 500, line
    assert captured.out == "" and not Path("run/args.json").exists()


# --------------------------------------------------------------------------------------------------
# The decoder: config.json, positions, padding


def test_baichuan_variants_are_told_apart():
    """v1 read as v2, or 13B as 7B: no shape would tell."""
    v1, v2, length = {"vocab_size": 64000}, {"vocab_size": 125696}, "max_position_embeddings"
    for changes, positions, head in [
        (v1 | {length: 4096}, "rotary", "plain"),
        (v1 | {"model_max_length": 4096}, "alibi", "plain"),
        (v2 | {length: 4096, "model_max_length": 9}, "rotary", "normalized"),
        (v2 | {"model_max_length": 4096}, "alibi", "normalized"),
        (v2 | {"positions": "rotary", "normalize_head": False}, "rotary", "plain"),
        ({"z_loss_weight": 0}, "alibi", "normalized"),
    ]:
        config = model.read_config(BAICHUAN | changes)
        assert (config.positions, config.head, config.max_length) == (positions, head, 4096)


def test_longer_input_than_the_positions_is_refused():
    """An error where positions end, of torch's; a translation that runs past them."""
    config = model.read_config(LLAMA_LIKE | {"model_type": "gpt2", "n_positions": 12})
    decoder = randomize(Decoder(config))
    refused(lambda: decoder(torch.full((1, 13), 5)), "13 tokens", "12 positions")
    ids, mask = padded_ids(90, "left", lengths=(12, 4, 11))
    new = decoder.generate(ids, mask, 9, eos_id=[])
    assert [len(row) for row in new] == [0, 8, 1]
    for prompt, row in zip(unpadded(ids, mask), new):
        assert decoder.generate(torch.tensor([prompt]), None, 9, []) == [row]


def test_a_window_hides_what_is_far_away():
    """Attention to all, where a window is; a window of one token more; padding that is seen."""
    config, (_, mask) = tiny_config("gemma3_text"), padded_ids(90, "left")
    distance = torch.arange(11)[:, None] - torch.arange(11)
    near = (distance >= 0) & (distance < 5)
    for real in (None, mask):
        bias = model.attention_bias(config, real, 11, 11, "cpu", torch.float32, window=5)
        seen = near if real is None else near & real[:, None] | (distance == 0)
        assert torch.equal(bias[:, 0].isfinite(), seen.expand(len(bias), -1, -1))
        last = model.attention_bias(config, real, 1, 11, "cpu", torch.float32, window=5)
        assert torch.equal(last, bias[:, :, -1:])


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


# --------------------------------------------------------------------------------------------------
# Generation


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


def up_to_end(row, eos_ids):
    """A row of new ids up to its first end, which is left out."""
    return list(itertools.takewhile(lambda token: token not in eos_ids, row))


@pytest.mark.parametrize(
    "kind, side", [("bloom", "left"), ("llama", "right"), ("gpt2", "left"), ("gemma3_text", "left")]
)
def test_cached_greedy_equals_recomputation(kind, side, nan_in_new_memory):
    """A key at the wrong place, a row mixed up when a sentence leaves, memory never written."""
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
    cache = model.Cache(decoder.bfloat16(), prompts=3, beams=2, room=7, mask=None)
    assert sum(store.nbytes for store in cache.stores) == 6 * 7 * decoder.cache_bytes()


class Texts(tuple):
    """A tokenizer whose tokens say these texts; </s> is number 2."""

    vocab_size = property(len)
    decode = lambda self, ids: "".join(self[id] for id in ids)


TWELVE = Texts(["a", "b", "</s>", "c", "\n", " \n ", "d\n", " ", "e\ne", "f", "g ", " h"])


@pytest.mark.parametrize("kind", ["bloom", "qwen2"])
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


# --------------------------------------------------------------------------------------------------
# Reading and writing checkpoints


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


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """Like BLOOM's and LLaMA's tokenizer.json, like Baichuan's and LLaMA's tokenizer.model."""
    names = "bytes", "marks", "baichuan", "llama"
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    lines = ["das Haus ist grün und der Hund ist müde", "the house is green, the dog is tired"] * 5
    train_bpe(folders["bytes"] / "tokenizer.json", lines)
    marks = tokenizers.Tokenizer(tokenizers.models.BPE())
    marks.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    marks.decoder = tokenizers.decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, show_progress=False)
    marks.train_from_iterator(lines, trainer)
    template = tokenizers.processors.TemplateProcessing
    marks.post_processor = template("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    marks.enable_padding(length=50)
    marks.enable_truncation(max_length=5)
    marks.save(str(folders["marks"] / "tokenizer.json"))
    options = dict(model_type="bpe", vocab_size=330, byte_fallback=True, minloglevel=2)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    for name, dummy_prefix in (("baichuan", False), ("llama", True)):
        options |= dict(model_prefix=f"{folders[name]}/tokenizer", add_dummy_prefix=dummy_prefix)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), **options)
    return folders


@pytest.mark.parametrize(
    "name, front", [("bytes", []), ("marks", [1]), ("baichuan", []), ("llama", [])]
)
def test_prompt_and_target_are_what_the_joined_text_gives(tokenizer_folders, name, front):
    """Two spaces where one is put already, or none; what a file cuts off or pads."""
    ours = load_tokenizer(tokenizer_folders[name])
    assert (ours.prompt_prefix, ours.end_ids) == (front, [2])
    for target in ["das Haus", "the house is green", "Hund und Hund"]:
        prompt, answer = render(ours, "en-de", "the house", target)
        joined = ours.encode(f"{data.prompt_text('en-de', 'the house')} {target}")
        assert [*prompt, *answer] == [*front, *joined, 2]
        assert ours.decode(answer[:-1]).strip() == target
    text = "das Haus  ist\ngrün"
    if name in ("bytes", "baichuan"):
        assert ours.decode(ours.encode(text)) == text


TOKENS, SPECIALS = "tokenizer_config", "special_tokens_map"
CONFIG, GENERATION = "config", "generation_config"
ADDED = {"added_tokens_decoder": {"331": {"content": "<|e|>"}}, "eos_token": "<|e|>"}
# Family, its other files; ids that end a text, ids that stand before a prompt.
SPECIAL = [
    ("bytes", {TOKENS: {"eos_token": {"content": "<pad>"}}}, [3], []),
    ("bytes", {TOKENS: {"eos_token": "<s>"}, SPECIALS: {"eos_token": "<unk>"}}, [1, 0], []),
    ("bytes", {CONFIG: {"eos_token_id": [0, 3]}, GENERATION: {"eos_token_id": [1]}}, [0, 3, 1], []),
    ("bytes", {CONFIG: {"eos_token_id": [True, 4]}}, [4], []),
    ("bytes", {TOKENS: {"eos_token": "nowhere", "add_bos_token": True}}, [2], []),
    ("marks", {TOKENS: {"eos_token": "<unk>", "add_bos_token": False}}, [0], [1]),
    ("baichuan", {TOKENS: {"tokenizer_class": "BaichuanTokenizer"}}, [2], []),
    ("llama", {TOKENS: {"tokenizer_class": "LlamaTokenizer"}}, [2], [1]),
    ("llama", {TOKENS: {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}}, [2], []),
    ("llama", {TOKENS: {"add_bos_token": True}, CONFIG: {"eos_token_id": 7}}, [7], [1]),
    ("llama", {TOKENS: ADDED}, [331], []),
    ("llama", {TOKENS: {"eos_token": "<|e|>"}, "added_tokens": {"<|e|>": 330}}, [330], []),
    ("llama", {CONFIG: {"vocab_size": 330}, "added_tokens": {"<pad>": 330}}, [2], []),
]


@pytest.mark.parametrize("name, files, end_ids, front", SPECIAL)
def test_what_begins_and_ends_a_text_comes_from_the_folders_files(
    tokenizer_folders, tmp_path, name, files, end_ids, front
):
    """A text that never ends, or at an HTML tag; a chat's end of turn as text."""
    shutil.copytree(tokenizer_folders[name], tmp_path, dirs_exist_ok=True)
    for stem, content in files.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    ours = load_tokenizer(tmp_path)
    assert (ours.end_ids, ours.eos_id, ours.prompt_prefix) == (end_ids, end_ids[0], front)
    assert ours.vocab_size <= files.get(CONFIG, {}).get("vocab_size", 999)
    assert ours.decode([*ours.encode("das Haus"), *end_ids]).startswith("das Haus")


# --------------------------------------------------------------------------------------------------
# Text and files


BOTH = [("a", "A"), ("b", "B")]
ITEMS = [{"translation": {"en": source, "de": target}} for source, target in BOTH]
TWO_LINES = {"translation": {"en": "a\nb", "de": "c"}}
A_LINE_EACH = "\n".join(map(json.dumps, ITEMS))
MULTI_WAY = dict(train_en="a\nb\n", train_de="A\nB\n")
# Files of train text, and what is said while BOTH are read of them.
READ = [
    (dict(train_en="a\r\nb\r\n", train_de="\ufeffA\nB"), ""),
    (dict(train_en__de_en="a\nb\n", train_en__de_de="A\nB\n"), ""),
    (dict(train_de__en_en="a\nb\n", train_de__en_de="A\nB\n"), ""),
    (dict(train_de__en_tsv="A\ta\nB\tb\n"), ""),
    (dict(train_en__de_json=json.dumps(ITEMS)), ""),
    (dict(train_de__en_json=A_LINE_EACH), ""),
    (dict(train_en__de_jsonl=A_LINE_EACH + "\n"), ""),
    (dict(train_en="a\n\nc\nb\n", train_de="A\nB\n \nB\n"), "skipped 2 of 4"),
    (dict(train_en__de_tsv="a\tA\n\n\tC\nb\tB\n"), "skipped 2 of 4"),
    (dict(train_en__de_json=json.dumps([*ITEMS, TWO_LINES])), "skipped 1 of 3"),
    (MULTI_WAY | dict(train_de__en_json=A_LINE_EACH), "train.de-en.json is read, not train."),
]


@pytest.mark.parametrize("files, said", READ)
def test_all_forms_of_text_give_the_same_pairs(tmp_path, capsys, files, said):
    """The wrong side as the source; two lines in a string; pairs out of step; a form unsaid."""
    write(tmp_path, **files)
    for pair, expected in (("en-de", BOTH), ("de-en", [both[::-1] for both in BOTH])):
        assert read_parallel(tmp_path, "train", pair) == expected
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)
    assert list_pairs(tmp_path, "train") == ["de-en", "en-de"]


def test_each_direction_reads_its_own_file_and_development_text_has_three_names(tmp_path, capsys):
    """test.de-en.* read backwards where test.en-de.* is there; dev.* passed over."""
    write(tmp_path, dev_en__de_tsv="a\tA\n", dev_de__en_tsv="X\tx\n")
    assert read_parallel(tmp_path, "valid", "en-de") == [("a", "A")]
    assert read_parallel(tmp_path, "valid", "de-en") == [("X", "x")]
    assert capsys.readouterr().err == ""


def test_only_newlines_end_a_line(tmp_path):
    """str.splitlines breaks at U+2028 and eight others, and everything after is out of step."""
    odd = "a\u2028b\x85c\x0bd\x1ce"
    write(tmp_path, train_en=f"{odd}\nx\n", train_de="A\nX\n")
    assert read_parallel(tmp_path, "train", "en-de") == [(odd, "A"), ("x", "X")]
    lines = ["a\rb", "c\r", "\u2028d\x85e\x0cf\x1cg", "", "h\r\ni"]
    data.write_lines(tmp_path / "text", lines)
    raw = (tmp_path / "text").read_bytes().decode()
    assert raw == "a b\nc\n d e f g\n\nh i\n", "comet-score got 13 references for 12 hypotheses"
    assert len(raw.splitlines()) == len(lines)


def test_languages_by_any_of_their_codes(monkeypatch):
    """A pair of three parts; a region for a language; another case; a name that was given."""
    assert "xx" not in data.LANGUAGES
    monkeypatch.setattr(data, "LANGUAGES", dict(data.LANGUAGES))
    data.name_languages("xx=Xeno, ja= Nihongo ")
    for pair, source, target, tokenizer in [
        ("en-de", "English", "German", "13a"),
        ("eng_Latn-zho_Hans", "English", "Chinese", "zh"),
        ("xx_Cyrl-zh-CN", "Xeno", "Chinese", "zh"),
        ("zh-Hant-yue", "Traditional Chinese", "Cantonese", "zh"),
        ("en-zh-hans", "English", "Chinese", "zh"),
        ("EN-pt_br", "English", "Brazilian Portuguese", "13a"),
        ("pt-BR-pt-PT", "Brazilian Portuguese", "Portuguese", "13a"),
        ("pt-br-en", "Brazilian Portuguese", "English", "13a"),
        ("deu-jpn_Jpan", "German", "Japanese", "ja-mecab"),
        ("sr-cyrl-ja", "Serbian", "Nihongo", "ja-mecab"),
        ("my-tha_Thai", "Burmese", "Thai", "char"),
        ("zho-TW-zh_Hans_CN", "Traditional Chinese", "Chinese", "zh"),
        ("es-419-en", "Spanish", "English", "13a"),
    ]:
        codes = data.split_pair(pair)
        assert "-".join(codes) == pair
        assert [*map(data.language_name, codes)] == [source, target]
        assert data.bleu_tokenizer(codes[1]) == tokenizer
        assert f" from {source} to {target}:\n" in data.prompt_text(pair, "a")
    for text in ("de", "=German", "de=", "a=A,,b=B"):
        refused(lambda: data.read_codes(text), "de=German")


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


# --------------------------------------------------------------------------------------------------
# Worked examples, as the docstrings have them


def test_worked_examples():
    """A docstring that says what the function does not do."""
    assert model.alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert model.alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert model.published_names("bloom", "blocks.3.ffn.up.bias") == ["h.3.mlp.dense_h_to_4h.bias"]
    quarter_turn = torch.tensor([[0.0], [1.0]])  # its cosine and sine
    assert model.apply_rotary(torch.tensor([1.0, 2.0]), *quarter_turn).tolist() == [-2, 1]
    assert data.group_by_length([5, 9, 1, 7], 100, rows_per_batch=3) == [[1, 3, 0], [2]]
    assert data.group_by_length([5, 9, 1, 7], 18) == [[1, 3], [0, 2]]
    assert lander.union({"en-de": [1, 7], "fr-cs": [1, 2]}) == [1, 2, 7]
    assert model.survivors(torch.tensor([True, False, True, True])).tolist() == [0, 3, 2]
    line = "Ein\u00a0Haus\u3000steht  da."  # no-break and ideographic spaces stay
    assert data.first_line(f"\n  {line} \nGerman: x") == line and data.first_line("a\u2028b") == "a"
    assert data.first_line(" \n ") == data.first_line("") == ""
    (ids,), _, (targets,) = data.make_batch([([5, 6], [7, 2])], pad_id=3)
    assert (ids.tolist(), targets.tolist()) == ([5, 6, 7], [-100, 7, 2])
