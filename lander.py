"""LANDeRMT: find the neurons of a language model that matter for translation, and train only those.

Zhu, Pan, Li, Xiong: "Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs
to Machine Translation", ACL 2024, arXiv 2409.19523

    python lander.py --pair en-de --weights bloom-7b1/ --data wmt16/     # the whole method
    python lander.py --pair en-de --tuned runs/en-de --translate FILE    # translate with its result
    python lander.py --tuned runs/en-de --export DIR                     # as a published checkpoint
    torchrun --nproc-per-node 8 lander.py --pair en-de ...               # the same on eight GPUs
    python lander.py                                                     # a demo, offline

The idea. Finetuning all weights on one language pair overwrites what others need. But an FFN is a
sum over its neurons, and pairs need different ones. So ask, of every neuron in the layers that do
most, how much each pair's loss needs it. Neurons that all pairs need alike are language-general;
those that one pair needs far more than the others are its own. Train the general neurons and the
pair's own, and for each token learn how much to lean on either. Nothing else moves by one bit.

                                 x  [B, T, D]
           +---------------------+----------------------+
     CAR / share                 |            (1 - CAR) / (1 - share)      per token; 1 at the start
           |                     |                      |
    FFN_G: general        FFN_rest: other        FFN_S: the pair's own
    neurons, trained      pairs', frozen         neurons, trained
           +---------------------+----------------------+
                            sum + b_down

The method in one column, on a model, batches of prompts, and batches of examples for each pair:

    >>> means = activation_means(model, prompts)                                    # [L]
    >>> layers = select_layers(layer_differences(means), k=2)
    >>> scores = [neuron_awareness(model, examples[pair], layers) for pair in pairs]
    >>> awareness = torch.stack(scores)                                             # [P, K, F]
    >>> owner = categorize(awareness, epsilon=0.9)                                  # [K, F]
    >>> groups = describe_groups(awareness, owner, pairs, {"en-de": layers})
    >>> install_routing(model, groups)
    >>> route(model, "en-de")
    >>> learners = what_learns(model, "en-de").values()
    >>> optimizer = torch.optim.AdamW(learners, lr=5e-5)
    >>> loss, norm = train_step(model, examples["en-de"], optimizer, learners)

    paper       what                                                           here
    3.1         A[l], mean output of block l over tokens and D                 activation_means
    3.1         |A[l+1] - A[l]| scores layer l+1; take the best k              select_layers
    3.2         awareness of neuron i: mean over tokens of |h_i * dloss/dh_i|  neuron_awareness
    3.2         variance over pairs splits general from specific neurons       categorize
    3.3, eq. 7  CAR weighs the general branch, 1 - CAR the specific one        RoutedFFN
    -           only G, S and w_p of the batch's pair learn                    what_learns
    -           BLEU and chrF before and after, for other pairs too            evaluate

Where this differs from the paper, and why (docs/paper.md says more):
  - A pair's scores are scaled to mean 1: else the pair with the largest loss owns all neurons.
  - CAR is our reading: a learned w_p per layer and pair starts at zero, and both factors are
    divided by what they are then, so that training starts at exactly the pretrained function.
  - Neurons that other pairs own stay active and frozen: without them it is another function.
  - Warm-up, decay and clipping of gradients, on which the paper is silent, are ours.

Letters: B sentences, T tokens, D hidden size, F neurons of one FFN, V vocabulary, L layers,
P pairs, K scored layers (those that any tuned pair selected), k layers that a pair selects, h what
the down projection reads: the neurons' activations.

In this file: layers; neurons; groups; routing; attention, too; training; evaluation. There the
method ends. Then a run: several processes; settings; the run folder; inputs; the steps; translate
and export; main.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import PROMPT, InputError, bleu_tokenizer, exit_status, fingerprint, first_line
from data import group_by_length, has_line_break, line_ends, list_pairs, load_tokenizer, locked
from data import make_batch, make_batches, name_languages, note, open_parallel, pair_name
from data import read_json, read_lines, read_prompt, read_tensors, render, replacing, split_pair
from data import write_json, write_lines, write_tensors
from model import FFN, Config, Linear, load_model, save_model


# --------------------------------------------------------------------------------------------------
# Layers: representation analysis (paper 3.1)
#
# Why: a layer that moves the mean of the residual stream most, on a pair's prompts, does most of
# the work there. Train in those layers and leave the others alone.


def to_device(batch, model):
    device = model.embedding.weight.device
    return [tensor.to(device, non_blocking=True) for tensor in batch]


@torch.no_grad()
def activation_means(model, batches):
    """A[l]: the mean output of block l over a prompt's tokens and over D, then over prompts.

    batches: Batch of prompts, without targets; padding does not count. -> [L] fp32
    """
    total = torch.zeros(model.config.layers).double()  # on the CPU: some devices have no 64 bits
    prompts = 0
    for batch in batches:
        ids, mask, _ = to_device(batch, model)
        outputs = [x.float().mean(-1) for x in model.block_outputs(ids, mask)]  # L of [B, T]
        means = (torch.stack(outputs) * mask).sum(-1) / mask.sum(-1)  # [L, B]
        total += means.cpu().double().sum(1)  # [L]
        prompts += len(ids)
    return (add_up(total) / add_up(prompts)).float()


def layer_differences(means):
    """diff[l] = |A[l+1] - A[l]|, the change that layer l+1 makes. [L] -> [L-1]

    [1, 4, 3] -> [3, 1]
    """
    return (means[1:] - means[:-1]).abs()


def select_layers(differences, k):
    """The k layers that change most, sorted. diff[l] scores layer l+1; ties go to the lower layer.

    [3, 1, 3], 1 -> [1]
    """
    differences = torch.as_tensor(differences)
    if k > len(differences):
        scored = f"only {len(differences)} have a score (the first has none)"
        raise InputError(f"{k} layers to select, but {scored}")
    ranked = differences.argsort(descending=True, stable=True)  # [L-1]
    return sorted((ranked[:k] + 1).tolist())


# --------------------------------------------------------------------------------------------------
# Neurons: awareness by Taylor expansion (paper 3.2)
#
# Why: set neuron i's activation h_i to zero, and to first order the loss changes by
# -h_i * dloss/dh_i. The size of that product is how much the loss needs the neuron. One backward
# pass tells for all neurons what removing them one by one would.


LOGITS_AT_ONCE = 100_000_000  # 1.6 GB: 16 bytes each, in 16 bits, in fp32, and both gradients


def in_pieces(model, loss_of, *rows):
    """The sum of loss_of over rows, N in each, as many at a time as have LOGITS_AT_ONCE."""
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(rows[0]) <= size:
        return loss_of(*rows)
    # Checkpointed: the backward pass makes a piece's logits again instead of keeping all.
    pieces = zip(*(some.split(size) for some in rows))
    return sum(checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces)


def target_states(model, batch):
    """What the head reads where it predicts target tokens, and those tokens. -> [N, D], [N]"""
    ids, mask, targets = to_device(batch, model)
    wanted = targets != -100
    return model.hidden_states(ids, mask)[wanted], targets[wanted]


def target_loss(model, batch):
    """The sum of the target tokens' negative log-likelihoods, fp32.

    Logits exist at target positions only, and not for all of them at once: V is 250,880 in BLOOM.
    """

    def loss_of(hidden, targets):
        return functional.cross_entropy(model.logits(hidden).float(), targets, reduction="sum")

    return in_pieces(model, loss_of, *target_states(model, batch))


NEURONS, CHANNELS = ["ffn.down"], ["attention.output"]  # what reads them, of each block


@contextmanager
def recording(model, places):
    """While open, h[place] is what a linear layer read in the last pass, [B, T, width].

    places: (layer, "ffn.down") for the activations of its neurons, (layer, "attention.output") for
    the values that attention mixed
    """
    h, handles = {}, []

    def record(place, module, inputs):
        # With every weight frozen no graph leads to the lowest recorded h. It is made a leaf: the
        # graph starts there, and nothing below the lowest recorded layer is differentiated.
        h[place] = inputs[0].requires_grad_()

    for place in places:
        module = model.blocks[place[0]].get_submodule(place[1])
        handles.append(module.register_forward_pre_hook(partial(record, place)))
    try:
        yield h
    finally:
        for handle in handles:
            handle.remove()


def neuron_awareness(model, batches, layers, readers=NEURONS):
    """How much each neuron matters: the mean over tokens of |h_i * dloss/dh_i|.

    The loss is the sum over target tokens, so that a sentence's scores do not depend on its batch.
    One forward and backward pass a batch scores all layers. -> [len(layers), F] fp32; with CHANNELS
    among the readers [len(layers), F + H * d], the values that attention mixed scored alike
    """
    block = model.blocks[layers[0]]
    width = sum(block.get_submodule(reader).in_features for reader in readers)
    # In 64 bits, so that the sum does not depend on the order in which processes add up.
    total, tokens = torch.zeros(len(layers), width).double(), 0
    places = [(layer, reader) for layer in layers for reader in readers]
    with recording(model, places) as h:
        for batch in batches:
            loss, sums = target_loss(model, batch), []
            gradients = torch.autograd.grad(loss, [h[place] for place in places])
            for place, gradient in zip(places, gradients):
                effect = h[place].detach() * gradient.float()  # [B, T, F], zero where T is padding
                # The sum of |effect| over sentences and tokens, without a second [B, T, F].
                sums.append(torch.linalg.vector_norm(effect, 1, (0, 1)))
            total += torch.cat(sums).view(len(layers), width).cpu()
            tokens += int(batch.mask.sum())
    return (add_up(total) / add_up(tokens)).float()


# --------------------------------------------------------------------------------------------------
# Groups: language-general and language-specific neurons (paper 3.2)
#
# Why: what every pair needs alike is shared capacity; what one pair needs far more than the others
# is its own. So the variance of a neuron's awareness over pairs tells the two apart.


def scale_awareness(awareness):
    """Each pair's scores in a layer, scaled to mean 1. [P, K, F] -> [P, K, F]

    Without it the pair with the largest loss would own every neuron.
    """
    return awareness / awareness.mean(-1, keepdim=True)


NEEDS_TWO_PAIRS = "comparing neurons takes training text of two or more (train.*, --score-pairs)"


def categorize(awareness, epsilon):
    """Who owns each neuron: -1 for general ones, else the index of a pair. [P, K, F] -> [K, F] long

    The round((1 - epsilon) * F) neurons of a layer whose scaled awareness varies most over pairs
    are specific, each to the pair that scores it highest. InputError for one pair alone.
    """
    if len(awareness) < 2:
        raise InputError(f"training text of one pair only; {NEEDS_TWO_PAIRS}")
    scaled = scale_awareness(awareness)  # [P, K, F]
    variance = scaled.var(0, correction=0)  # [K, F]
    highest = scaled.argmax(0)  # [K, F]
    specific = round((1 - epsilon) * awareness.shape[-1])
    owner = torch.full_like(highest, -1)
    for k in range(len(owner)):
        most_varied = variance[k].argsort(descending=True, stable=True)[:specific]
        owner[k, most_varied] = highest[k, most_varied]
    return owner


def general_share(scores, general, specific):
    """m_G / (m_G + m_S): what part of the capacity that a pair uses is general.

    m_G and m_S are the mean scaled awareness (scores [F]) over the general neurons and over the
    specific ones that the pair owns ([F] bool each). None where a group is empty or scores nothing:
    there is nothing to route between.
    """
    m_general = scores[general].sum().item() / max(1, general.sum().item())
    m_specific = scores[specific].sum().item() / max(1, specific.sum().item())
    if m_general + m_specific == 0:
        return None
    share = m_general / (m_general + m_specific)
    return share if 0 < share < 1 else None


def union(selected):
    """The layers that any pair selected. {"en-de": [1, 7], "fr-cs": [1, 2]} -> [1, 2, 7]"""
    return sorted(set().union(*selected.values()))


def owned_by(owner, pairs):
    """[F] -> pair -> the neurons that it owns"""
    return {pair: (owner == p).nonzero().flatten().tolist() for p, pair in enumerate(pairs)}


def describe_groups(awareness, owner, pairs, selected):
    """What neurons.json holds, all that RoutedFFN is made from.

        {"5": {"specific": {"en-de": [3, 8], "de-en": [6]}, "share": {"en-de": 0.4}}, ...}

    by layer: the neurons that each pair owns, all others being general; and of each pair that tunes
    the layer its general_share. pairs: names of the P rows; selected: tuned pair -> layers
    """
    scaled = scale_awareness(awareness).double()  # [P, K, F]
    groups = {}
    for k, layer in enumerate(union(selected)):
        share = {}
        for p, pair in enumerate(pairs):
            if layer in selected.get(pair, []):
                share[pair] = general_share(scaled[p, k], owner[k] == -1, owner[k] == p)
        groups[str(layer)] = {"specific": owned_by(owner[k], pairs), "share": share}
    return groups


# --------------------------------------------------------------------------------------------------
# Routing: conditional awareness-based routing, CAR (paper 3.3)
#
# Why: general neurons serve every pair, a pair's own serve it alone, and tokens differ in which of
# the two they need. CAR learns for each token how much to lean on either.


def partition(size, specific, tuned):
    """Which of `size` neurons are whose: {"general": [..], "rest": [..], tuned pair: [..], ...}"""
    owned = set().union(*specific.values())
    own = {pair: specific[pair] for pair in tuned}
    general = [i for i in range(size) if i not in owned]
    return {"general": general, "rest": sorted(owned.difference(*own.values())), **own}


class RoutedFFN(nn.Module):
    """An FFN regrouped into parts that add up to it, with routing between two of them (eq. 7).

        CAR(x) = sigmoid(w_p . x + logit(share))         a number for each token; share at the start
        y = FFN_G(CAR(x) / share * x) + FFN_S((1 - CAR(x)) / (1 - share) * x) + FFN_rest(x) + b_down

    ffn: the FFN whose place it takes. specific: pair -> the neurons that it owns. share: pair ->
    its general_share, or None, for the pairs that tune this layer; any other pair gets the same
    function without routing. `pair` is that of the current batch, set by route(). Trained parts are
    fp32, the rest keeps the checkpoint's type. A factor scales W x and not the bias: it scales x.
    """

    def __init__(self, ffn, specific, share, routing=True):
        super().__init__()
        self.places = partition(ffn.up.out_features, specific, share)
        self.general = ffn.part(self.places["general"], torch.float32)
        self.rest = ffn.part(self.places["rest"], ffn.up.weight.dtype)
        self.specific = nn.ModuleDict()
        for pair in share:
            self.specific[pair] = ffn.part(self.places[pair], torch.float32)
        self.config = ffn.config
        self.output_bias = ffn.down.bias
        self.share = {}
        self.router = nn.ParameterDict()  # pair -> w_p [D]
        for pair in share:
            if routing and share[pair] is not None:
                self.share[pair] = share[pair]
                self.router[pair] = torch.zeros(ffn.up.in_features, device=ffn.up.weight.device)
        self.pair = None

    def what_learns(self, pair):
        """name -> Parameter of what learns from a pair: general neurons, its own, its router."""
        if pair not in self.specific:
            return {}
        learners = dict(self.general.named_parameters("general"))
        learners |= self.specific[pair].named_parameters(f"specific.{pair}")
        if pair in self.router:
            learners[f"router.{pair}"] = self.router[pair]
        return learners

    def factors(self, x):
        """CAR / share and (1 - CAR) / (1 - share), of a routed pair. [B, T, D] -> [B, T] each"""
        share = self.share[self.pair]
        logit = x.float() @ self.router[self.pair] + math.log(share / (1 - share))  # [B, T]
        # 1 - CAR as the sigmoid of -logit: a difference would lose all digits where CAR nears 1.
        return torch.sigmoid(logit) / share, torch.sigmoid(-logit) / (1 - share)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        x_general = x_specific = x
        if self.pair in self.share:
            general_factor, specific_factor = self.factors(x)
            x_general = general_factor[..., None].to(x.dtype) * x  # [B, T, D]
            x_specific = specific_factor[..., None].to(x.dtype) * x  # [B, T, D]
        y = self.rest(x) + self.general(x_general)
        for pair, part in self.specific.items():
            y = y + part(x_specific if pair == self.pair else x)
        return y if self.output_bias is None else y + self.output_bias

    def whole(self):
        """The parts put together again as one FFN, without routing, in the frozen part's type."""
        with torch.device(self.rest.up.weight.device):
            ffn = FFN(self.config).to(self.rest.up.weight.dtype)
        for name, part in {"general": self.general, "rest": self.rest, **self.specific}.items():
            ffn.put(self.places[name], part)
        ffn.down.bias = self.output_bias
        return ffn


def install_routing(model, groups, routing=True):
    """Put a RoutedFFN into each layer of `groups`, which is as describe_groups makes it."""
    for layer, group in groups.items():
        block = model.blocks[int(layer)]
        block.ffn = RoutedFFN(block.ffn, group["specific"], group["share"], routing)
        if "channels" in group:
            select_channels(block.attention, group["channels"], group["share"])


def route(model, pair):
    """Make the model that of one pair: what comes next is routed as text of that pair."""
    for module in model.modules():
        if isinstance(module, RoutedFFN):
            module.pair = pair


def what_learns(model, pair):
    """name -> Parameter of all that learns from a pair, in the layers that it tunes."""
    learners = {}
    for place, module in model.named_modules():
        if isinstance(module, (RoutedFFN, PartlyTrained)):
            for name, parameter in module.what_learns(pair).items():
                learners[f"{place}.{name}"] = parameter
    return learners


# --------------------------------------------------------------------------------------------------
# Attention, too (--units all)
#
# Why: attention is a sum over channels as an FFN is over neurons. query . key is a sum over a
# head's channels, and the output projection adds up one mixed value of each. So channels are
# scored, grouped and trained as neurons are. Nothing routes between them.


def channel_places(config):
    """Channel c is number c % d of key and value head c // d, and of the query heads that read it.

    C = H_kv * d -> its rows of query_key_value [C, H / H_kv + 2], columns of output [C, H / H_kv]
    """
    H, H_kv, d = config.heads, config.kv_heads, config.head_size
    if config.query_key_value == "interleaved":
        query, key, value = torch.arange(3 * H * d).view(H, 3, d).unbind(1)
    else:
        query, key, value = torch.arange((H + 2 * H_kv) * d).view(-1, d).split([H, H_kv, H_kv])
    columns = torch.arange(H * d).view(H_kv, -1, d).transpose(1, 2).reshape(H_kv * d, -1)
    queries = query.reshape(-1)[columns]
    return torch.cat([queries, key.reshape(-1, 1), value.reshape(-1, 1)], 1), columns


def add_channels(groups, awareness, config, pairs, epsilon):
    """Say in groups which channels each pair owns, by scores of what attention's output reads.

    A channel has the mean of its values' scores. awareness [P, K, H * d]; rest: describe_groups
    """
    _, columns = channel_places(config)
    owner = categorize(awareness[..., columns].mean(-1), epsilon)  # [K, C]
    for k, group in enumerate(groups.values()):
        group["channels"] = owned_by(owner[k], pairs)


class PartlyTrained(Linear):
    """A linear layer of which some rows or columns of the weight learn, and some biases.

    places: "weight" and perhaps "bias" -> which dimension of it counts what learns, and {"general"
    or tuned pair: its numbers}. Masters are fp32; weight and bias themselves never change.
    """

    def __init__(self, linear, places):
        rows, columns = linear.weight.shape
        super().__init__(columns, rows, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.places = places
        self.parts = nn.ModuleDict()
        for kind, (dimension, numbers) in places.items():
            whole = getattr(linear, kind).detach()
            parts = {name: whole.index_select(dimension, n).float() for name, n in numbers.items()}
            self.parts[kind] = nn.ParameterDict(parts)

    def what_learns(self, pair):
        """name -> Parameter of all that learns from a pair: general channels and its own."""
        learners = {}
        for kind, parts in self.parts.items():
            for name in ("general", pair) if pair in parts else ():
                learners[f"parts.{kind}.{name}"] = parts[name]
        return learners

    def operands(self, dtype):
        """Weight and bias as a product in that type takes them, what learns in its places."""
        operands = dict(zip(("weight", "bias"), super().operands(dtype)))
        for kind, parts in self.parts.items():
            dimension, numbers = self.places[kind]
            for name, part in parts.items():
                part = part.to(dtype)
                operands[kind] = operands[kind].index_copy(dimension, numbers[name], part)
        return operands["weight"], operands["bias"]

    def settle(self):
        """Write what was learned into weight and bias."""
        weight, bias = self.operands(self.weight.dtype)
        self.weight.data = weight
        if bias is not None:
            self.bias.data = bias
        self.parts.clear()


def select_channels(attention, channels, tuned):
    """Let channels of attention learn. channels: pair -> those that it owns; tuned: pairs"""
    config, device = attention.config, attention.output.weight.device
    rows, columns = channel_places(config)
    parts = partition(len(rows), channels, tuned)
    del parts["rest"]

    def numbers(places):
        return {part: places[own].flatten().to(device) for part, own in parts.items()}

    learn = {"weight": (0, numbers(rows))}
    if config.query_key_value_bias:
        # Without rotary positions a key's bias has no effect: rounding alone would move it.
        not_key = torch.cat([rows[:, :-2], rows[:, -1:]], 1)
        learn["bias"] = 0, numbers(rows if config.positions == "rotary" else not_key)
    attention.query_key_value = PartlyTrained(attention.query_key_value, learn)
    attention.output = PartlyTrained(attention.output, {"weight": (1, numbers(columns))})


# --------------------------------------------------------------------------------------------------
# Training
#
# Why like this: what must not change has no gradient at all, so the optimizer passes it over. A
# gradient multiplied by zero would not do: AdamW's decay and momentum still move such a weight.


WEIGHT_DECAY = 0.01
WARM_UP = 0.05  # of all steps
CLIP_NORM = 1.0
KEPT_SENTENCES = 200  # of each other pair, with --keep


def count_targets(batches):
    return sum(int((batch.targets != -100).sum()) for batch in batches)


def train_step(model, batches, optimizer, learners, keep=None):
    """One update of `learners`, and of nothing else, from the micro-batches of one pair.

    The loss is the sum over all their target tokens, those of other processes too, divided by their
    number, not a mean of means. learners: the parameters that learn; keep: adds more gradients.
    -> loss of a target token, norm of the gradient
    """
    model.requires_grad_(False)
    for parameter in learners:
        parameter.requires_grad_(True)
    tokens, total = add_up(count_targets(batches)), 0.0
    for batch in batches:
        loss = target_loss(model, batch) / tokens
        loss.backward()
        total += loss.item()
    total = add_up(total)
    if tokens:  # else no process had a sentence: there is nothing to add, nor a step
        if keep:
            keep()
        add_gradients(learners)
    norm = nn.utils.clip_grad_norm_(learners, CLIP_NORM).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def learning_rate(step, total, peak):
    """Linear warm-up over the first steps, then linear decay to zero. 0 <= step < total

    step 0 of 100, peak 1 -> 0.2; step 4 -> 1.0; step 99 -> 1/95
    """
    warm = max(1, round(WARM_UP * total))
    return peak * min((step + 1) / warm, (total - step) / max(1, total - warm))


def schedule(sizes, batch, seed):
    """Steps without end: yields (pair, numbers of the step's examples).

    Each epoch shuffles every pair's text, and spreads its steps evenly over the epoch, as shuffling
    all pairs together would: two pairs of equal text alternate. sizes: pair -> its examples
    """
    rng = random.Random(seed)
    while True:
        steps = []  # (when in the epoch, from 0 to 1, pair, numbers)
        for pair, size in sizes.items():
            order = rng.sample(range(size), size)
            batches = [order[start : start + batch] for start in range(0, size, batch)]
            steps += [((i + 0.5) / len(batches), pair, own) for i, own in enumerate(batches)]
        for _, pair, numbers in sorted(steps, key=lambda step: step[0]):
            yield pair, numbers


def training_steps(model, learners, steps, total, optimizer, peak, start=0, keeper=None):
    """Train on `steps`, from step `start` of `total` on. To build on this, copy it and train_step.

    steps: yields (pair, micro-batches, how many examples were left out). learners: pair -> {name:
    Parameter}; what learns from a pair is the caller's to say: some neurons, some matrices,
    everything. A step without any example changes nothing.
    Yields what log.jsonl says of a step, after each.
    """
    for step, (pair, batches, skipped) in enumerate(steps, start):
        rate = learning_rate(step, total, peak)
        optimizer.param_groups[0]["lr"] = rate
        route(model, pair)
        keep = keeper and partial(keeper.add_gradients, step)
        loss, norm = train_step(model, batches, optimizer, learners[pair].values(), keep)
        entry = {"step": step + 1, "pair": pair, "loss": loss, "gradient_norm": norm}
        if keeper and loss:  # a step without any example keeps nothing
            entry["kept"] = keeper.drift
        yield entry | {"learning_rate": rate, "skipped": add_up(skipped)}


class Keeper:
    """Holds the model to what it said of other pairs' sources before training (--keep).

    examples: those sources with the model's own greedy translations; there is no second model.
    A step adds the gradient of weight * KL(p_start || p) of a target token, on one batch of them.
    Made before training: the head is frozen, so p_start is known from what it read then.
    """

    @torch.no_grad()
    def __init__(self, model, examples, settings, pad_id):
        self.model, self.weight = model, settings.keep
        self.batches = list(make_batches(examples, pad_id, settings.micro_tokens, seed=0))
        self.at_start = [target_states(model, batch)[0].cpu() for batch in self.batches]  # [N, D]

    def add_gradients(self, step):
        """Add those of a step to what learns; .drift is the KL of a target token then."""
        number = step % len(self.batches)
        route(self.model, None)
        hidden, _ = target_states(self.model, self.batches[number])

        def divergence(*states):
            now, before = (self.model.logits(x).float().log_softmax(-1) for x in states)
            return functional.kl_div(now, before, log_target=True, reduction="sum")

        before = self.at_start[number].to(hidden.device)
        loss = in_pieces(self.model, divergence, hidden, before) / len(hidden)
        (self.weight / process_count() * loss).backward()  # every process adds the same
        self.drift = loss.item()


@torch.no_grad()
def validation_loss(model, pair, batches):
    """Mean negative log-likelihood of a target token of a pair."""
    route(model, pair)
    total, tokens = 0.0, 0
    for batch in batches:
        total += target_loss(model, batch).item()
        tokens += count_targets([batch])
    return add_up(total) / add_up(tokens)


# --------------------------------------------------------------------------------------------------
# Evaluation
#
# Why for other pairs too: a gain says nothing without what was forgotten for it.


LEAST_NEW_TOKENS = 64
NEW_TOKENS = 3  # for each token of the prompt; more where a pair's targets take more
MOST_NEW_TOKENS = 12  # where no text says what a pair takes
ROWS_AT_ONCE = 128  # of more, padding costs more than it saves to read the weights less often


def translate_text(model, tokenizer, pair, sources, decoding, ratio=NEW_TOKENS, prompt=PROMPT):
    """Translate sentences, each process its share. -> lines, how many ran to their limit

    A translation ends at end-of-sentence, at the first line break after its first visible
    character, or at `ratio` times its own prompt's length or LEAST_NEW_TOKENS: what comes to that
    is a loop, as a rule. An empty source, or one too long for the model, is an empty line.
    decoding: .beams, 1 for greedy, and .cache_gb, the memory for keys and values
    """
    route(model, pair)
    longest, made_for = model.config.longest, model.config.max_length
    jobs, found = [], {}  # (number of a source, ids of its prompt, limit of its translation)
    for number, source in of_this_process(enumerate(sources)):
        ids, _ = render(tokenizer, pair, source, prompt=prompt)
        if len(ids) > min(longest, made_for):
            too_long = f"{len(ids)} tokens, the model was made for {min(longest, made_for)}"
            note(f"{pair}: {too_long}; left empty: {source[:40]} ...")
        elif source.strip():
            limit = max(ratio * len(ids), LEAST_NEW_TOKENS)
            jobs.append((number, ids, min(limit, longest - len(ids))))
    lengths = [len(ids) + limit for _, ids, limit in jobs]
    room = decoding.cache_gb * 1e9 / (model.cache_bytes() * decoding.beams)  # tokens
    emitted = {"vocab_size": tokenizer.vocab_size, "line_ends": line_ends(tokenizer)}
    progress = Progress(f"translating {pair}", len(jobs))
    for group in group_by_length(lengths, room, ROWS_AT_ONCE // decoding.beams):
        numbers, prompts, limits = zip(*(jobs[i] for i in group))
        batch = make_batch([(ids, []) for ids in prompts], tokenizer.pad_id)
        ids, mask, _ = to_device(batch, model)
        new = model.generate(ids, mask, limits, tokenizer.end_ids, decoding.beams, **emitted)
        for number, limit, tokens in zip(numbers, limits, new):
            text = tokenizer.decode(tokens)
            cut = len(tokens) == limit and not has_line_break(text.lstrip())
            found[number] = first_line(text), cut
        progress.add(len(group))
    found = gather(found)
    lines = [found.get(number, ("", False))[0] for number in range(len(sources))]
    return lines, sum(cut for _, cut in found.values())


def make_metrics(pair, references=()):
    """sacreBLEU's metrics; BLEU's tokenizer follows the target language and its references."""
    tokenizer = bleu_tokenizer(split_pair(pair)[1], references)
    try:
        return {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{pair}: no BLEU tokenizer ({str(error).splitlines()[0]})") from None


def evaluate(model, tokenizer, pair, text, decoding, ratio=NEW_TOKENS, prompt=PROMPT):
    """Translate text, [(source, target), ...], and score it. -> hypotheses, scores

    scores: {"bleu": .., "chrf": .., signatures, "cut": ran to their limit, "sentences": how many}
    """
    sources, references = [source for source, _ in text], [target for _, target in text]
    hypotheses, cut = translate_text(model, tokenizer, pair, sources, decoding, ratio, prompt)
    scores = {}
    for name, metric in make_metrics(pair, references).items():
        scores[name] = metric.corpus_score(hypotheses, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return hypotheses, scores | {"cut": cut, "sentences": len(text)}


# The method ends here. What follows is a run.


# --------------------------------------------------------------------------------------------------
# Several processes
#
# Why sums: scores, losses and gradients are sums over sentences. So each process takes its share of
# the same batches, and all add up what they found: the result does not depend on their number.


def process_count():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_number():
    """The first of several, number 0, alone writes and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def of_this_process(items):
    """Those that this process works on. Of [0, 1, 2, 3, 4] the second of two has 1 and 3."""
    return islice(items, process_number(), None, process_count())


def add_up(value):
    """The sum over processes of a number or a tensor."""
    if process_count() == 1:
        return value
    if isinstance(value, torch.Tensor):
        distributed.all_reduce(value)
        return value
    return type(value)(add_up(torch.tensor(value, dtype=torch.float64)).item())


def add_gradients(parameters):
    """Every process gets the sum. One without sentences in this step has none to add."""
    for parameter in parameters if process_count() > 1 else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        add_up(parameter.grad)


def gather(found):
    """One dictionary of what all processes found."""
    parts = [found]
    if process_count() > 1:
        parts = [None] * process_count()
        distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


@contextmanager
def torchrun():
    """Join the processes that torchrun started, if it did."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group()
    if process_number() > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Settings and progress


def read_settings(words=(), template=PROMPT, **defaults):
    """The command line -> every setting, by name. template, defaults: of a run's args.json"""
    parser = argparse.ArgumentParser("lander.py", allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]

    def option(flag, default, help, **more):
        more |= {"action": "store_true"} if default is False else {"type": type(default)}
        help += f" (default: {default})" if default else ""
        parser.add_argument(flag, default=default, help=help, **more)

    option("--pair", "", "pair to tune, source first: en-de; several alternate: en-de,fr-cs")
    option("--weights", "", "folder of a published checkpoint; none: run the demo")
    option("--data", "", "folder of parallel text: train.*, valid.* (if there), test.*")
    option("--out", "", "run folder; none: runs/PAIRS")
    option("--layers", 4, "how many layers each pair selects")
    option("--epsilon", 0.9, "share of a layer's neurons that are language-general")
    option("--lr", 5e-5, "peak learning rate of AdamW")
    option("--steps", 0, "training steps; 0: one epoch")
    option("--batch", 80, "sentences in a training step")
    option("--max-tokens", 0, "longer examples are skipped; 0: over 256 and 4 times the median")
    option("--micro-tokens", 2048, "tokens in one pass; a step takes several")
    option("--checkpointing", False, "recompute activations: slower training, less memory")
    option("--score-pairs", "all", "pairs whose neurons are compared: all, or a list")
    option("--score-sentences", 500, "training sentences of each pair to score with")
    option("--eval-pairs", "", "pairs to evaluate: all, or a list; none: the tuned ones")
    option("--eval-sentences", 0, "test sentences of each pair; 0: all")
    option("--prompt", "", "file with another prompt: {source}, {target} and {text} in it")
    option("--valid-every", 0, "steps between losses of valid.*; the lowest gives the result")
    option("--beams", 1, "beam search with so many beams; 1: greedy")
    option("--cache-gb", 2.0, "GB for the keys and values of a batch of translations")
    option("--device", "", "cpu, cuda, cuda:1, ...; none: cuda where there is one")
    types = ["", "float32", "bfloat16"]
    option("--dtype", "", "none: float32 on the cpu, bfloat16 elsewhere", choices=types)
    option("--language", "", "names for other languages: xx=Name,yy=Other Name")
    option("--units", "ffn", "what is trained: ffn, or all: attention, too", choices=("ffn", "all"))
    option("--seed", 0, "of shuffling and sampling")
    option("--keep", 0.0, "hold other pairs to what the model said: weight of the KL; 0: off")
    option("--no-routing", False, "train the same neurons without CAR")
    option("--resume", False, "go on with a run: what is not given is as it was")
    option("--tuned", "", "folder of a finished run, for --translate or --export")
    option("--translate", "", "translate the lines of a file, or of - (standard input)")
    option("--export", "", "folder to write the tuned model to, as a published checkpoint")
    parser.set_defaults(**defaults)
    settings = parser.parse_args(words)

    least = {"layers": 1, "batch": 1, "micro_tokens": 1, "score_sentences": 1, "beams": 1}
    for name, value in vars(settings).items():
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < 2**63:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {value}, expected {least.get(name, 0)} or more, below 2^63")
    if settings.epsilon > 1 or settings.lr == 0:
        parser.error("--epsilon is at most 1, and --lr above 0")
    settings.template = read_prompt(settings.prompt) if settings.prompt else template
    if bool(settings.tuned) != (bool(settings.translate) != bool(settings.export)):
        parser.error("--tuned goes with --translate or --export, what to do with that run")
    return settings


class Progress:
    """Rate and time left of long work: a line on stderr each ten seconds."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.done, self.first = label, total, done, done
        self.start = self.shown = time.monotonic()

    def add(self, count, remark=""):
        self.done += count
        now = time.monotonic()
        if now - self.shown > 10 and process_number() == 0:
            self.shown = now
            rate = max(self.done - self.first, 1) / (now - self.start)
            left = f"{rate:.3g}/s, {(self.total - self.done) / rate:.0f} s left"
            note(f"{self.label}: {self.done} of {self.total}, {left}{remark}")


# --------------------------------------------------------------------------------------------------
# The run folder: each step of a run leaves a file, and a resumed run goes on after the last one


READERS = {".json": read_json, ".safetensors": read_tensors}
WRITERS = {".json": write_json, ".safetensors": write_tensors}  # others are lines of text


def write(path, value):
    """Write a file of the run, by its suffix; of several processes the first one does."""
    if process_number() == 0:
        WRITERS.get(path.suffix, write_lines)(path, value)


def grow(path, keys, make):
    """A file with an entry for each key: what it lacks is made, and written when it is done."""
    entries = READERS[path.suffix](path) if path.exists() else {}
    for key in keys:  # in every process, or one finds in the file what another is yet to make
        if key not in entries:
            entries[key] = make(key)
            write(path, entries)
    return entries


NOT_RECORDED = "out", "resume", "tuned", "translate", "export", "prompt"
# What changes rounding alone, or nothing that was computed. Fingerprints know the text and weights.
MAY_DIFFER = "weights", "data", "device", "micro_tokens", "cache_gb", "checkpointing"
MAY_DIFFER += "eval_pairs", "eval_sentences", "new_tokens", "files"


def record(settings, paths):
    """What args.json holds: every setting, the functions that score and choose what learns (a
    program may have put others in their places), and fingerprints. paths: name -> path"""
    held = {name: own for name, own in vars(settings).items() if name not in NOT_RECORDED}
    held |= {name: os.path.abspath(held[name]) for name in ("weights", "data")}
    for role, function in (("score", neuron_awareness), ("learners", what_learns)):
        module = "lander" if function.__module__ == __name__ else function.__module__
        held[role] = f"{module}.{function.__qualname__}"
    held["files"] = {name: fingerprint(path) for name, path in sorted(paths.items())}
    return dict(sorted(held.items()))


def check_same(run, before, now, names):
    """InputError for settings or files that are not what they were. before, now: two records"""
    before, now = before | before["files"], now | now["files"]
    differ = [name for name in sorted(names) if before.get(name) != now.get(name)]
    if differ:
        said = [f"{name} {before.get(name)}, now {now.get(name)}" for name in differ]
        raise InputError(f"{run}: was made with {'; '.join(said)}")


def checked_record(settings, folder, paths):
    """What args.json is to hold. InputError where it says otherwise: that is another run."""
    path, now = folder / "args.json", record(settings, paths)
    if not path.exists():
        return now
    if not settings.resume:
        raise InputError(f"{folder}: holds a run already; --resume goes on, --out names another")
    before = read_json(path)
    one_alone = before["files"].keys() ^ now["files"].keys()
    tests = {name for name in one_alone if name.startswith("data/test.")}  # of other eval_pairs
    names = {*before, *before["files"], *now, *now["files"]} - {*MAY_DIFFER, *tests}
    check_same(folder, before, now, names)
    now["files"] = dict(sorted((before["files"] | now["files"]).items()))
    return now


def merged(learners):
    """What learns from any pair. pair -> {name: Parameter} -> {name: Parameter}"""
    return {name: p for of_pair in learners.values() for name, p in of_pair.items()}


def copies(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def save_state(path, parameters, optimizer, step, best):
    """Weights, AdamW's moments, steps done and the best weights, in one file: they fit together."""
    tensors = {"step": torch.tensor(step)} | copies(parameters)
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    write(path, tensors | {f"{name}/best": value for name, value in best.items()})


def load_state(path, parameters, optimizer):
    """Undo save_state. -> steps done, the best weights"""
    tensors, best = read_tensors(path), {}
    load_parameters(tensors, parameters)
    for place in tensors.keys() - parameters.keys() - {"step"}:
        name, key = place.split("/")
        of_name = best if key == "best" else optimizer.state[parameters[name]]
        of_name[name if key == "best" else key] = tensors[place].to(parameters[name].device)
    return int(tensors["step"]), best


@torch.no_grad()
def load_parameters(tensors, parameters):
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


# --------------------------------------------------------------------------------------------------
# Inputs: device, checkpoint and text, so that what is wrong with them shows before anything long


def choose_device(settings):
    """-> torch.device and dtype"""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and process_count() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    default = "float32" if device.type == "cpu" else "bfloat16"
    return device, getattr(torch, settings.dtype or default)


def choose_pairs(choice, folder, split, spelled=()):
    """ "all" -> every pair of a split; else the listed ones, checked. Two spellings of a pair,
    en-de and eng_Latn-deu_Latn, are one: that of `spelled`, or the first."""
    pairs = list_pairs(folder, split) if choice == "all" else choice.split(",")
    pairs, named = [pair.strip() for pair in pairs], {}
    for pair in [*spelled, *pairs]:
        named.setdefault(pair_name(pair), pair)
    return list(dict.fromkeys(named[pair_name(pair)] for pair in pairs))


def open_checkpoint(folder):
    """-> Config, tokenizer that fits, and name in args.json -> path of what may change a result"""
    config, tokenizer = Config.from_folder(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        found = f"the tokenizer has {tokenizer.vocab_size} tokens"
        raise InputError(f"{folder}: {found}, config.json an embedding of {config.vocab_size}")
    paths = sorted(Path(folder).iterdir())
    read = [path for path in paths if path.suffix in (".json", ".model", ".safetensors")]
    return config, tokenizer, {f"weights/{path.name}": path for path in read}


class Inputs(NamedTuple):
    """The text that a run reads, each by pair."""

    train: dict  # tuned pair -> [(source, target), ...]
    valid: dict  # tuned pair -> rendered examples, where there is such text
    scoring: dict  # tuned and other pairs -> rendered examples for the scores
    others: dict  # pair that is not tuned -> [(source, target), ...], some of its training text
    test: dict  # evaluated pair -> [(source, target), ...]
    paths: dict  # name in args.json -> path
    max_tokens: int  # longer examples are skipped
    new_tokens: dict  # pair -> how many a translation may have for each token of its prompt


def short_enough(examples, max_tokens):
    return [example for example in examples if len(example[0]) + len(example[1]) <= max_tokens]


def new_tokens_of(examples):
    """How many tokens a translation may have for each of its prompt's: thrice what a pair's
    examples have. A script may take ten tokens where English takes one."""
    usual = median(len(target) / len(prompt) for prompt, target in examples)
    return max(NEW_TOKENS, math.ceil(3 * usual))


def read_inputs(tokenizer, tuned, settings, longest=math.inf):
    """Read all text that a run needs. longest: how many tokens the model takes. -> Inputs"""
    paths, valid, scoring, test = {}, {}, {}, {}

    def read(split, pair):
        text, found = open_parallel(settings.data, split, pair)
        paths.update({f"data/{path.name}": path for path in found})
        if not text:
            raise InputError(f"{settings.data}: the {split} text of {pair} is empty")
        return text

    def rendered(pair, text):
        return [render(tokenizer, pair, *both, settings.template) for both in text]

    train = {pair: read("train", pair) for pair in tuned}
    compared = choose_pairs(settings.score_pairs, settings.data, "train", tuned)
    for pair in dict.fromkeys(tuned + compared):
        text = train[pair] if pair in tuned else read("train", pair)
        size = min(settings.score_sentences, len(text))
        scoring[pair] = random.Random(settings.seed).sample(text, size)
    others = {pair: text[:KEPT_SENTENCES] for pair, text in scoring.items() if pair not in tuned}
    if len(scoring) < 2:
        raise InputError(f"{settings.data}: training text of one pair only; {NEEDS_TWO_PAIRS}")
    if settings.keep and not others:
        raise InputError("--keep: --score-pairs and --data have no pair beside the tuned ones")
    offered = {pair_name(pair) for pair in list_pairs(settings.data, "valid")}
    for pair in tuned:
        if pair_name(pair) in offered:
            valid[pair] = rendered(pair, read("valid", pair)[:VALID_SENTENCES])
        elif settings.valid_every:
            raise InputError(f"--valid-every: {settings.data} has no valid text for {pair}")
    scoring = {pair: rendered(pair, text) for pair, text in scoring.items()}
    new_tokens = {pair: new_tokens_of(examples) for pair, examples in scoring.items()}
    lengths = [
        median(len(prompt) + len(target) for prompt, target in own) for own in scoring.values()
    ]
    max_tokens = settings.max_tokens or max(256, math.ceil(4 * max(lengths)))
    max_tokens = min(max_tokens, longest + 1)  # the last target is no input
    for of_split, what in ((scoring, "scoring"), (valid, "validation")):
        for pair, examples in of_split.items():
            of_split[pair] = kept = short_enough(examples, max_tokens)
            over = f"{what} {pair}: {len(examples) - len(kept)} of {len(examples)} examples"
            if not kept:
                raise InputError(f"{over} are longer than --max-tokens {max_tokens}")
            if len(kept) < len(examples):
                note(f"{over} are left out, over {max_tokens} tokens")
    chosen = settings.eval_pairs or settings.pair
    for pair in choose_pairs(chosen, settings.data, "test", list(scoring)):
        test[pair] = read("test", pair)[: settings.eval_sentences or None]
        make_metrics(pair)  # which may lack its tokenizer
        if pair not in new_tokens:
            new_tokens[pair] = new_tokens_of(rendered(pair, test[pair]))
        if known := set(test[pair]).intersection(train.get(pair, ())):
            note(f"{pair}: {len(known)} of {len(test[pair])} test pairs are in the train text, too")
    return Inputs(train, valid, scoring, others, test, paths, max_tokens, new_tokens)


# --------------------------------------------------------------------------------------------------
# The steps of a run


VALID_SENTENCES = 500  # at most, for the validation loss
SAVE_EVERY = 30  # seconds at least, and twenty times what the last save took


def own_batches(settings, tokenizer, examples, label):
    """Batches of examples, those that this process works on, with progress."""
    progress = Progress(label, len(examples))
    for batch in of_this_process(make_batches(examples, tokenizer.pad_id, settings.micro_tokens)):
        yield batch
        progress.add(len(batch.ids) * process_count())


def check_scores(scores, what):
    """InputError for scores that are no numbers, or that say nothing: they decide all."""
    if not scores.isfinite().all() or not scores.any():
        raise InputError(f"{what}: not all numbers, or all zero; are the weights?")
    return scores


def analyse_layers(model, tokenizer, scoring, tuned, settings, folder):
    """layers.json: each tuned pair's means, differences and layers. -> pair -> selected layers"""

    def analyse(pair):
        prompts = [(prompt, []) for prompt, _ in scoring[pair]]
        batches = own_batches(settings, tokenizer, prompts, f"layers for {pair}")
        means = check_scores(activation_means(model, batches), f"layer means of {pair}")
        changes = layer_differences(means)
        found = {"selected": select_layers(changes, settings.layers), "means": means.tolist()}
        return found | {"differences": changes.tolist()}

    analysis = grow(folder / "layers.json", tuned, analyse)
    return {pair: analysis[pair]["selected"] for pair in tuned}


def group_neurons(model, tokenizer, scoring, selected, settings, folder):
    """awareness.safetensors and neurons.json: who owns which units of the layers. -> groups"""
    layers, pairs = union(selected), list(scoring)
    readers = NEURONS + CHANNELS if settings.units == "all" else NEURONS

    def score(pair):
        batches = own_batches(settings, tokenizer, scoring[pair], f"scoring {pair}")
        scores = neuron_awareness(model, batches, layers, readers)
        for layer, row in zip(layers, scores):
            check_scores(row, f"awareness for {pair} in layer {layer}")
        return scores

    found = grow(folder / "awareness.safetensors", pairs, score)
    awareness = torch.stack([found[pair] for pair in pairs])  # [P, K, F or F + H * d]
    size = model.config.ffn_size
    owner = categorize(awareness[..., :size], settings.epsilon)
    groups = describe_groups(awareness[..., :size], owner, pairs, selected)
    if settings.units == "all":
        add_channels(groups, awareness[..., size:], model.config, pairs, settings.epsilon)
    write(folder / "neurons.json", groups)
    return groups


def show_groups(groups, tuned):
    """A line for each layer: how many units are specific, and how many each tuned pair owns."""
    for layer, group in groups.items():
        for key, what in (("specific", "neurons"), ("channels", "channels")):
            if key in group:
                count = sum(map(len, group[key].values()))
                owned = ", ".join(f"{len(group[key][pair])} of {pair}" for pair in tuned)
                print(f"   layer {layer}: {count} specific {what}, {owned}")


def count_steps(text, settings):
    """How many steps a run takes: as many as --steps says, or one epoch."""
    return settings.steps or sum(math.ceil(len(pairs) / settings.batch) for pairs in text.values())


def planned_steps(text, settings):
    """Those of schedule that a run takes."""
    sizes = {pair: len(pairs) for pair, pairs in text.items()}
    return islice(schedule(sizes, settings.batch, settings.seed), count_steps(text, settings))


def step_batches(tokenizer, text, settings, start):
    """The steps of a run from number `start` on, as training_steps takes them.

    Examples are rendered when their step comes: there may be millions.
    """
    for pair, numbers in islice(planned_steps(text, settings), start, None):
        own = [text[pair][i] for i in of_this_process(numbers)]
        examples = [render(tokenizer, pair, *both, settings.template) for both in own]
        kept = short_enough(examples, settings.max_tokens)
        batches = make_batches(kept, tokenizer.pad_id, settings.micro_tokens)
        yield pair, list(batches), len(examples) - len(kept)


def kept_examples(model, tokenizer, others, settings, folder):
    """kept.json: what the model says of other pairs' sources before training. -> its examples"""
    greedy = SimpleNamespace(beams=1, cache_gb=settings.cache_gb)
    sources = {pair: [source for source, _ in text] for pair, text in others.items()}

    def make(pair):
        rest = sources[pair], greedy, settings.new_tokens[pair], settings.template
        return translate_text(model, tokenizer, pair, *rest)[0]

    examples = []
    for pair, lines in grow(folder / "kept.json", others, make).items():
        for source, line in zip(sources[pair], lines):
            examples.append(render(tokenizer, pair, source, line, settings.template))
    return short_enough(examples, settings.max_tokens)


def train(model, tokenizer, learners, text, valid, settings, folder, kept=()):
    """Train from the last saved state, if there is one, to tuned.safetensors; log.jsonl says how.

    learners: pair -> {name: Parameter}; text: pair -> [(source, target), ...]; valid: pair ->
    rendered examples. InputError where the loss is no longer a number.
    """
    log_path, state_path = folder / "log.jsonl", folder / "state.safetensors"
    parameters, total = merged(learners), count_steps(text, settings)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=WEIGHT_DECAY, fused=True)
    keeper = Keeper(model, kept, settings, tokenizer.pad_id) if kept else None

    start, log, best = 0, [], {}  # best: what learned, at the lowest validation loss

    def validate(step):
        losses = {}
        for pair, examples in valid.items():
            batches = own_batches(settings, tokenizer, examples, f"validation loss of {pair}")
            losses[pair] = validation_loss(model, pair, batches)
        log.append({"step": step, "valid_loss": losses})
        *before, last = [mean(e["valid_loss"].values()) for e in log if e.get("valid_loss")] or [0]
        if settings.valid_every and all(last < loss for loss in before):
            best.update(copies(parameters))

    if left_out := text.keys() - {pair for pair, _ in planned_steps(text, settings)}:
        note(f"none of {total} steps is of {', '.join(left_out)}: as --steps and --batch have it")
    if state_path.exists():
        start, best = load_state(state_path, parameters, optimizer)
        log = [entry for entry in map(json.loads, read_lines(log_path)) if entry["step"] <= start]
    else:
        validate(0)
    progress = Progress("training steps", total, done=start)
    saved, wait = time.monotonic(), SAVE_EVERY
    model.checkpointing = settings.checkpointing
    batches = step_batches(tokenizer, text, settings, start)
    steps = training_steps(model, learners, batches, total, optimizer, settings.lr, start, keeper)
    for entry in steps:
        step, loss, norm = entry["step"], entry["loss"], entry["gradient_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            found = f"step {step}: the loss is {loss} and its gradient {norm}"
            raise InputError(f"{found}; run again with a lower --lr and another --out")
        log.append(entry)
        progress.add(1, f", loss {loss:.3f}")
        validates = step == total or (settings.valid_every and step % settings.valid_every == 0)
        if validates:
            validate(step)
        if validates or time.monotonic() - saved > wait:
            began = time.monotonic()
            write(log_path, map(json.dumps, log))
            save_state(state_path, parameters, optimizer, step, best)
            saved = time.monotonic()
            wait = max(SAVE_EVERY, 20 * (saved - began))
    model.checkpointing = False
    load_parameters(best or copies(parameters), parameters)
    write(folder / "tuned.safetensors", copies(parameters))


def show_training(log_path):
    """The validation losses before and after, and how many examples were too long, from the log."""
    entries = [json.loads(line) for line in read_lines(log_path)]
    valid = [entry for entry in entries if entry.get("valid_loss")]
    for pair in valid[0]["valid_loss"] if valid else ():
        losses = " to ".join(f"{entry['valid_loss'][pair]:.3f}" for entry in valid)
        print(f"   {pair}: loss of a validation token {losses}")
    if drifts := [entry["kept"] for entry in entries[-11:] if "kept" in entry]:
        print(f"   kept: KL to the start on other pairs' sources, {mean(drifts):.4f} nats a token")
    if skipped := sum(entry.get("skipped", 0) for entry in entries):
        note(f"training: skipped {skipped} examples, over --max-tokens")


def evaluate_all(model, tokenizer, test, results, when, settings, folder):
    """Translate and score the test text of each pair that results lack; add it to them."""
    for pair, text in test.items():
        scores = results.setdefault(pair, {})
        if scores.get(when, {}).get("sentences") == len(text):
            continue
        rest = text, settings, settings.new_tokens[pair], settings.template
        hypotheses, scores[when] = evaluate(model, tokenizer, pair, *rest)
        sources, references = zip(*text)
        for name, lines in (("source", sources), ("reference", references), (when, hypotheses)):
            write(folder / "hypotheses" / f"{pair}.{name}.txt", lines)
        write(folder / "results.json", results)


def show_table(results, tuned):
    """Scores before and after, pair by pair, and the means of the tuned pairs and of the others."""
    rows = [(pair, [pair], "  tuned" if pair in tuned else "") for pair in results]
    rows.append(("mean, tuned", [pair for pair in results if pair in tuned], ""))
    rows.append(("mean, others", [pair for pair in results if pair not in tuned], ""))
    print("\npair          BLEU before   after  change   chrF before   after  change")
    for label, pairs, remark in rows:
        if pairs:
            print(f"{label:<13}", end="")
            for metric, width in (("bleu", 12), ("chrf", 14)):
                before = mean(results[pair]["before"][metric] for pair in pairs)
                after = mean(results[pair]["after"][metric] for pair in pairs)
                print(f"{before:{width}.2f}{after:8.2f}{after - before:+8.2f}", end="")
            print(remark)
    for when in ("before", "after"):
        if cut := sum(scores[when]["cut"] for scores in results.values()):
            print(f"{cut} translations {when} tuning ran to their limit, as a loop does.")


def run(settings):
    """The whole method in a run folder of its own. -> what results.json holds"""
    started = time.monotonic()
    if not settings.pair or not settings.data:
        raise InputError("--pair and --data are needed: which text to tune on, and where it lies")
    folder = Path(settings.out or f"runs/{settings.pair}")
    device, dtype = choose_device(settings)
    tuned = choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer, paths = open_checkpoint(settings.weights)
    select_layers(torch.zeros(config.layers - 1), settings.layers)  # too many show at once
    inputs = read_inputs(tokenizer, tuned, settings, config.longest)
    settings.dtype = str(dtype).removeprefix("torch.")
    settings.max_tokens, settings.new_tokens = inputs.max_tokens, inputs.new_tokens
    with nullcontext() if process_number() else locked(folder):
        paths |= inputs.paths
        args = None if process_number() else checked_record(settings, folder, paths)
        model = load_model(settings.weights, device, dtype, config).requires_grad_(False)
        write(folder / "args.json", args)
        if add_up(0) == 0 and not (folder / "args.json").exists():  # all wait for all
            raise InputError(f"{folder}: not shared by all machines, as it must be")
        results = tune(model, tokenizer, tuned, inputs, settings, folder)
    print(f"\nIt took {time.monotonic() - started:.0f} s; everything is in {folder}", flush=True)
    return results


def tune(model, tokenizer, tuned, inputs, settings, folder):
    """The steps of a run. Each leaves a file in the folder, and is skipped where that is there."""
    say = partial(print, flush=True)
    config, size = model.config, sum(p.numel() for p in model.parameters())
    on = f"{settings.dtype} on {model.embedding.weight.device}"
    say(f"{config.family}, {size:,} parameters, {config.ffn_size} neurons a layer, {on}")

    say("\n1. Layers: which change a prompt's representation most?")
    selected = analyse_layers(model, tokenizer, inputs.scoring, tuned, settings, folder)
    for pair, layers in selected.items():
        say(f"   {pair}: {', '.join(map(str, layers))} of 0 to {config.layers - 1}")

    say(f"\n2. Neurons: which does one of {len(inputs.scoring)} pairs need more than the others?")
    groups = group_neurons(model, tokenizer, inputs.scoring, selected, settings, folder)
    show_groups(groups, tuned)

    say(f"\n3. Translating the test text of {len(inputs.test)} pairs, before tuning")
    path = folder / "results.json"
    results = read_json(path) if path.exists() else {}
    evaluate_all(model, tokenizer, inputs.test, results, "before", settings, folder)

    others = inputs.others if settings.keep else {}
    kept = kept_examples(model, tokenizer, others, settings, folder)
    downs = [model.blocks[int(layer)].ffn.down.weight for layer in groups]
    rms = mean(weight.float().square().mean().sqrt().item() for weight in downs)
    install_routing(model, groups, not settings.no_routing)
    learners = {pair: what_learns(model, pair) for pair in tuned}
    trained = sum(p.numel() for p in merged(learners).values())
    say(f"\n4. Training {trained:,} of {size:,} parameters, {trained / size:.2%}")
    # Adam's first step moves a weight by the rate, whatever its gradient.
    say(f"   --lr {settings.lr:g} is {settings.lr / rms:.2%} of the rms of their down.weight")
    path = folder / "tuned.safetensors"
    if path.exists():
        load_parameters(read_tensors(path), merged(learners))
    else:
        train(model, tokenizer, learners, inputs.train, inputs.valid, settings, folder, kept)
    if process_number() == 0:
        (folder / "state.safetensors").unlink(missing_ok=True)
        show_training(folder / "log.jsonl")

    say("\n5. Translating again")
    evaluate_all(model, tokenizer, inputs.test, results, "after", settings, folder)
    results = {pair: results[pair] for pair in inputs.test}
    show_table(results, tuned)
    return results


# --------------------------------------------------------------------------------------------------
# Translate and export


def load_tuned(settings):
    """What a finished run made. -> Decoder, tokenizer, tuned pair -> {name: Parameter}"""
    folder = Path(settings.tuned)
    device, dtype = choose_device(settings)
    config, tokenizer, paths = open_checkpoint(settings.weights)
    before, now = read_json(folder / "args.json"), record(settings, paths)
    of_weights = {name for name in before["files"] | paths if name.startswith("weights/")}
    check_same(folder, before, now, of_weights | {"units", "no_routing", "learners"})
    groups = read_json(folder / "neurons.json")
    model = load_model(settings.weights, device, dtype, config)
    install_routing(model, groups, not settings.no_routing)
    pairs = set().union(*(group["share"] for group in groups.values()))
    learners = {pair: what_learns(model, pair) for pair in pairs}
    load_parameters(read_tensors(folder / "tuned.safetensors"), merged(learners))
    return model, tokenizer, learners


def translate(settings):
    """Translate lines with a finished run, to stdout: one line out for each line in."""
    pair = settings.pair
    if "," in pair:
        raise InputError(f"--translate takes one --pair; that run tuned {pair}")
    known = {pair_name(own): own for own in settings.new_tokens}  # spelled as in the run
    pair = known.get(pair_name(pair), pair)
    sources = read_lines(0 if settings.translate == "-" else settings.translate)
    model, tokenizer, learners = load_tuned(settings)
    if pair not in learners:
        note(f"{pair} was not tuned in {settings.tuned}: general neurons, no routing")
    limit = settings.new_tokens.get(pair, MOST_NEW_TOKENS)
    rest = sources, settings, limit, settings.template
    lines, cut = translate_text(model, tokenizer, pair, *rest)
    for line in lines:
        print(line)
    if cut:
        note(f"{cut} of {len(lines)} ran to their limit, as a loop does")


# What of a checkpoint folder goes with the weights: tokenizers and how to generate. No code.
COMPANIONS = "tokenizer.model", "*token*.json", "generation_config.json", "chat_template.jinja"


def export(settings):
    """Write a finished run as a published checkpoint: trained neurons back in their places."""
    folder = Path(settings.export)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty")
    model, _, _ = load_tuned(settings)
    for block in model.blocks:
        if isinstance(block.ffn, RoutedFFN):
            if block.ffn.share:
                expected = "no place in a published checkpoint; tune with --no-routing to export"
                raise InputError(f"{settings.tuned}: its tokens are routed, which has {expected}")
            block.ffn = block.ffn.whole()
    for module in model.modules():
        if isinstance(module, PartlyTrained):
            module.settle()
    save_model(model, folder)
    for pattern in COMPANIONS:
        for path in Path(settings.weights).glob(pattern):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    print(f"{folder}: {model.config.family} in {model.embedding.weight.dtype}")


# --------------------------------------------------------------------------------------------------
# The command line


def command(words):
    """What the words of a command line say."""
    settings = read_settings(words)
    folder = Path(settings.tuned or settings.out or f"runs/{settings.pair}")
    if settings.tuned and not (folder / "tuned.safetensors").exists():
        raise InputError(f"{folder}: not the folder of a finished run, no tuned.safetensors")
    if settings.tuned or (settings.resume and (folder / "args.json").exists()):
        settings = read_settings(words, **read_json(folder / "args.json"))
    elif settings.resume and settings.out and not settings.weights:
        raise InputError(f"{folder}: no run to go on with")
    torch.manual_seed(settings.seed)
    name_languages(settings.language)
    if settings.export:
        return export(settings)
    if settings.translate:
        return translate(settings)
    if settings.weights:
        with torchrun():
            return run(settings)
    if not Path(__file__).with_name("study").exists():
        raise InputError("--weights names no checkpoint; the demo is study/demo.py of the project")
    from study import demo

    demo.demo(words)


def main(argv=None):
    """The command line. -> exit status: 0 done, 2 bad input or arguments, 130 interrupted"""
    try:
        return exit_status(command, sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse's
        return stop.code


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    status = main()
    sys.stdout.flush()  # torchrun: while Python ends, gloo's threads abort one run in some dozens
    (os._exit if distributed.is_torchelastic_launched() else sys.exit)(status)
