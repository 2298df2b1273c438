"""LANDeRMT: find the neurons of a language model that matter for translation, and train only those.

"Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine Translation"
(Zhu, Pan, Li, Xiong, ACL 2024, arXiv 2409.19523)

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
    -           only G, S and w_p of the batch's pair learn                    what_learns, train_step
    -           BLEU and chrF before and after, for other pairs too            evaluate

Where this differs from the paper, and why (README.md says more):
  - Scores of a pair are scaled to mean 1 before variances are taken: otherwise the pair with the
    largest loss owns all neurons.
  - CAR is our reading: a learned w_p per layer and pair starts at zero, and both factors are
    divided by what they are then, so that training starts at exactly the pretrained function.
  - Neurons that other pairs own stay active and frozen: without them the FFN is another function.
  - Warm-up and linear decay, weight decay 0.01, gradients clipped to norm 1: the paper is silent.

Letters: B sentences, T tokens, D hidden size, F neurons of one FFN, V vocabulary, L layers,
P pairs, K scored layers (those that any tuned pair selected), k layers that a pair selects, h what
the down projection reads: the neurons' activations.

In this file: layers; neurons; groups; routing; attention, too; training; evaluation. There the method
ends. Then a run: several processes; settings and progress; the run folder; tune; translate; export;
main.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what follows takes seconds: no traceback there

import argparse
import json
import math
import os
import random
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import InputError, bleu_tokenizer, exit_status, fingerprint, first_line, group_by_length
from data import has_line_break, line_ends, list_pairs, load_tokenizer, locked, make_batch
from data import make_batches, name_languages, note, open_parallel, read_json, read_lines
from data import read_tensors, reading, render, replacing, split_pair, write_json, write_lines
from data import write_tensors
from model import FFN, Config, Linear, checkpoint_files, load_model, save_model


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


LOGITS_AT_ONCE = 30_000_000  # 0.48 GB: 16 bytes each, in 16 bits, in fp32, and both gradients


def in_pieces(model, loss_of, *rows):
    """The sum of loss_of over rows, N in each, so many at a time that their logits fit into memory."""
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


@contextmanager
def recording(model, layers, reader="ffn.down"):
    """While open, h[layer] is what the layer's `reader` read in the last forward pass, [B, T, F].

    ffn.down reads the neurons' activations, attention.output the values that attention mixed.
    """
    h = {}

    def record(layer, module, inputs):
        # With every weight frozen no graph leads to the lowest recorded h. It is made a leaf, so the
        # graph starts there, and nothing below the lowest recorded layer is differentiated.
        h[layer] = inputs[0].requires_grad_()

    handles = []
    for layer in layers:
        module = model.blocks[layer].get_submodule(reader)
        handles.append(module.register_forward_pre_hook(partial(record, layer)))
    try:
        yield h
    finally:
        for handle in handles:
            handle.remove()


def neuron_awareness(model, batches, layers, reader="ffn.down"):
    """How much each neuron matters: the mean over tokens of |h_i * dloss/dh_i|.

    The loss is the sum over target tokens, so that a sentence's scores do not depend on its batch.
    One forward and backward pass a batch scores all layers. -> [len(layers), F] fp32
    """
    width = model.blocks[layers[0]].get_submodule(reader).in_features
    # In 64 bits, so that the sum does not depend on the order in which processes add up.
    total = torch.zeros(len(layers), width).double()
    tokens = 0
    with recording(model, layers, reader) as h:
        for batch in batches:
            loss = target_loss(model, batch)
            gradients = torch.autograd.grad(loss, [h[layer] for layer in layers])
            for k, (layer, gradient) in enumerate(zip(layers, gradients)):
                effect = h[layer].detach() * gradient.float()  # [B, T, F], zero where T is padding
                # The sum of |effect| over sentences and tokens, without a second [B, T, F].
                total[k] += torch.linalg.vector_norm(effect, 1, (0, 1)).cpu()
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
    """Which of `size` neurons are whose: {"general": [...], "rest": [...], tuned pair: [...], ...}"""
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
        """name -> Parameter of all that learns from a pair: general neurons, its own, its router."""
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


def routed_layers(model):
    """layer number -> RoutedFFN"""
    layers = {}
    for layer, block in enumerate(model.blocks):
        if isinstance(block.ffn, RoutedFFN):
            layers[layer] = block.ffn
    return layers


def route(model, pair):
    """Make the model that of one pair: what comes next is routed as text of that pair."""
    for ffn in routed_layers(model).values():
        ffn.pair = pair


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
# Why: attention is a sum over channels as an FFN is over neurons. query . key is a sum over a head's
# channels, and the output projection adds up one mixed value of each. So channels are scored, grouped
# and trained as neurons are. Nothing routes between them.


def channel_places(config):
    """Channel c is number c % d of key and value head c // d, and of the query heads that read it.

    -> its rows of query_key_value [C, H / H_kv + 2], its columns of output [C, H / H_kv]; C = H_kv * d
    """
    H, H_kv, d = config.heads, config.kv_heads, config.head_size
    if config.query_key_value == "interleaved":
        query, key, value = torch.arange(3 * H * d).view(H, 3, d).unbind(1)
    else:
        query, key, value = torch.arange((H + 2 * H_kv) * d).view(-1, d).split([H, H_kv, H_kv])
    columns = torch.arange(H * d).view(H_kv, -1, d).transpose(1, 2).reshape(H_kv * d, -1)
    queries = query.reshape(-1)[columns]
    return torch.cat([queries, key.reshape(-1, 1), value.reshape(-1, 1)], 1), columns


def channel_awareness(awareness, config):
    """A channel's, from that of each value the output projection reads. [.., H * d] -> [.., C]"""
    _, columns = channel_places(config)
    return awareness[..., columns].mean(-1)


def add_channels(groups, awareness, config, pairs, epsilon):
    """Say in groups which channels each pair owns. awareness [P, K, H * d]; rest: describe_groups"""
    owner = categorize(channel_awareness(awareness, config), epsilon)  # [K, C]
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
        # Without rotary positions a key's bias has no effect: AdamW would move it by rounding alone.
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
    if math.isfinite(total) and math.isfinite(norm):
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

    Each epoch shuffles every pair's text, and pairs alternate; once the shorter text is through,
    the rest of the epoch is the longer one's. sizes: pair -> number of its examples
    """
    rng = random.Random(seed)
    while True:
        order = {pair: rng.sample(range(size), size) for pair, size in sizes.items()}
        for start in range(0, max(sizes.values()), batch):
            for pair, numbers in order.items():
                if start < len(numbers):
                    yield pair, numbers[start : start + batch]


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

    examples: those sources with the model's own greedy translations: no references, no second model.
    A step adds the gradient of weight * KL(p_start || p) of a target token, on one batch of them.
    Made before training: the head is frozen, so p_start is known from what it read then.
    """

    @torch.no_grad()
    def __init__(self, model, examples, weight, pad_id, micro_tokens):
        self.model, self.weight = model, weight
        self.batches = list(make_batches(examples, pad_id, micro_tokens, seed=0))
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


LINES_AT_A_TIME = 1000  # sorted by length; their translations come in order
LEAST_NEW_TOKENS = 64
NEW_TOKENS = 3  # for each token of the prompt; more where a pair's targets take more (read_inputs)
ROWS_AT_ONCE = 512  # of more, padding costs more than it saves to read the weights less often


def translate_lines(model, tokenizer, pair, sources, decoding, label, new_tokens=NEW_TOKENS):
    """Translate sentences, [(number, sentence), ...]. Yields (number, line, cut), in their order.

    A translation ends at end-of-sentence, at the first line break after its first visible character,
    or at new_tokens times its own prompt's length or LEAST_NEW_TOKENS; cut says that it came to that:
    it is a loop, as a rule. An empty source, or one too long for the model, is an empty line.
    decoding: .beams, 1 for greedy, and .cache_gb, the memory for keys and values (Settings has both)
    """
    route(model, pair)
    progress = Progress(label, len(sources), "sentences")
    longest = model.config.longest
    made_for = min(longest, model.config.max_length)
    room = decoding.cache_gb * 1e9 / (model.cache_bytes() * decoding.beams)  # tokens
    emitted = {"vocab_size": tokenizer.vocab_size, "line_ends": line_ends(tokenizer)}
    for first in range(0, len(sources), LINES_AT_A_TIME):
        lines, prompts = sources[first : first + LINES_AT_A_TIME], {}
        for number, source in lines:
            prompt, _ = render(tokenizer, pair, source)
            if len(prompt) > made_for:
                too_long = f"{len(prompt)} tokens, the model was made for {made_for}"
                note(f"{pair}: line {number + 1}: {too_long}; left empty")
            elif source.strip():
                prompts[number] = prompt
        progress.add(len(lines) - len(prompts))
        numbers, found = list(prompts), {}
        limits = []
        for n in numbers:
            limit = max(new_tokens * len(prompts[n]), LEAST_NEW_TOKENS)
            limits.append(min(limit, longest - len(prompts[n])))
        lengths = [len(prompts[n]) + limit for n, limit in zip(numbers, limits)]
        for group in group_by_length(lengths, room, ROWS_AT_ONCE // decoding.beams):
            batch = make_batch([(prompts[numbers[i]], []) for i in group], tokenizer.pad_id)
            ids, mask, _ = to_device(batch, model)
            continuations = model.generate(
                ids, mask, [limits[i] for i in group], tokenizer.end_ids, decoding.beams, **emitted
            )
            for i, new in zip(group, continuations):
                text = tokenizer.decode(new)
                cut = len(new) == limits[i] and not has_line_break(text.lstrip())
                found[numbers[i]] = first_line(text), cut
            progress.add(len(group))
        for number, _ in lines:
            line, cut = found.get(number, ("", False))
            yield number, line, cut


def make_metrics(pair):
    """sacreBLEU's metrics; BLEU's tokenizer follows the target language (zh, ja-mecab, 13a, ...)."""
    try:
        return {"bleu": BLEU(tokenize=bleu_tokenizer(split_pair(pair)[1])), "chrf": CHRF()}
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{pair}: no BLEU tokenizer ({str(error).splitlines()[0]})") from None


def translate_text(model, tokenizer, pair, sources, decoding, new_tokens=NEW_TOKENS):
    """Translate sentences, each process its share. -> lines, how many ran to their limit"""
    own = list(of_this_process(enumerate(sources)))
    rest = own, decoding, f"translating {pair}", new_tokens
    translated = translate_lines(model, tokenizer, pair, *rest)
    translations = gather({number: (line, cut) for number, line, cut in translated})
    lines = [translations[number][0] for number in range(len(sources))]
    return lines, sum(cut for _, cut in translations.values())


def evaluate(model, tokenizer, pair, text, decoding, new_tokens=NEW_TOKENS):
    """Translate text, [(source, target), ...], and score it. -> hypotheses, scores

    scores: {"bleu": ..., "chrf": ..., their signatures, "cut": how many ran to their limit}
    """
    sources, references = [source for source, _ in text], [target for _, target in text]
    hypotheses, cut = translate_text(model, tokenizer, pair, sources, decoding, new_tokens)
    scores = {}
    for name, metric in make_metrics(pair).items():
        scores[name] = metric.corpus_score(hypotheses, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return hypotheses, scores | {"cut": cut}


# The method ends here. What follows is a run.


# --------------------------------------------------------------------------------------------------
# Several processes
#
# Why sums: scores, losses and gradients are sums over sentences. So each process takes its share of
# the same batches, and all add up what they found: the result does not depend on their number.


def process_count():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_number():
    """The first of several alone writes and prints."""
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
    if process_count() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def gather(found):
    """One dictionary of what all processes found."""
    parts = [found]
    if process_count() > 1:
        parts = [None] * process_count()
        distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def wait_for_all():
    if process_count() > 1:
        distributed.barrier()


@contextmanager
def torchrun():
    """Join the processes that torchrun started, if it did. All but the first are silent."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group()
    number = process_number()
    if number > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (InputError, OSError, RuntimeError) as error:
        # Another may have said the same, or died, which is an echo here: torchrun then ends this one.
        if number > 0 or isinstance(error, RuntimeError):
            time.sleep(10)
        sys.stderr = sys.__stderr__
        print(f"process {number}: ", end="", file=sys.stderr)
        raise
    distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Settings and progress


MANY = 2**31 - 1


def option(default, help, least=0, most=MANY):
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class Settings:
    """Every setting with its default: the command line is made from it, args.json records it."""

    pair: str = option("", "pair to tune, source first: en-de; several alternate: en-de,fr-cs")
    weights: str = option("", "folder of a published checkpoint; none: run the demo")
    data: str = option("", "folder of parallel text: train.*, valid.* (if there), test.*")
    out: str = option("", "run folder; none: runs/PAIRS")
    layers: int = option(4, "how many layers each pair selects", least=1)
    epsilon: float = option(0.9, "share of a layer's neurons that are language-general", most=1)
    lr: float = option(5e-5, "peak learning rate of AdamW")
    steps: int = option(0, "training steps; 0: one epoch")
    batch: int = option(80, "sentences in a training step", least=1)
    max_tokens: int = option(0, "longer examples are skipped; 0: over 256 and 4 times the median")
    micro_tokens: int = option(2048, "tokens in one pass; a step takes several", least=1)
    checkpointing: bool = option(False, "recompute activations: slower training, less memory")
    score_pairs: str = option("all", "pairs whose neurons are compared: all, or a list")
    score_sentences: int = option(500, "training sentences of each pair to score with", least=1)
    eval_pairs: str = option("", "pairs to evaluate: all, or a list; none: the tuned ones")
    eval_sentences: int = option(0, "test sentences of each pair; 0: all")
    beams: int = option(1, "beam search with so many beams; 1: greedy", least=1, most=128)
    cache_gb: float = option(2.0, "GB for the keys and values of a batch of translations")
    device: str = option("", "cpu, cuda, cuda:1, ...; none: cuda where there is one")
    dtype: str = option("", "float32 or bfloat16; none: float32 on the cpu, bfloat16 elsewhere")
    language: str = option("", "names for other languages: xx=Name,yy=Other Name")
    units: str = option("ffn", "what is scored and trained: ffn, or all: attention's channels, too")
    seed: int = option(0, "of shuffling and sampling")
    keep: float = option(0.0, "hold other pairs to what the model said: weight of the KL; 0: off")
    no_routing: bool = option(False, "train the same neurons without CAR")
    resume: bool = option(False, "go on with an interrupted run")
    translate: str = option("", "translate the lines of a file, or of - (standard input)")
    tuned: str = option("", "folder of a finished run, for --translate or --export")
    export: str = option("", "folder to write the tuned model to, as a published checkpoint")

    def __post_init__(self):
        for setting in fields(self):
            flag, value = flag_of(setting.name), getattr(self, setting.name)
            least, most = setting.metadata["least"], setting.metadata["most"]
            if setting.type is str:
                if "\0" in value:
                    raise InputError(f"{flag} has a NUL character")
            elif not least <= value <= most:
                expected = f"{least} or more" if most == MANY else f"{least} to {most}"
                raise InputError(f"{flag} is {value}, expected {expected}")
        if self.lr == 0:
            raise InputError("--lr is 0, which trains nothing")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise InputError(f"--dtype is {self.dtype!r}, expected float32 or bfloat16")
        if self.units not in ("ffn", "all"):
            raise InputError(f"--units is {self.units!r}, expected ffn or all")
        if self.tuned and bool(self.translate) == bool(self.export):
            raise InputError("--tuned needs --translate or --export, what to do with that run")
        if (self.translate or self.export) and not self.tuned:
            raise InputError("--translate and --export need --tuned, the folder of a finished run")


def flag_of(name):
    """ "eval_pairs" -> "--eval-pairs" """
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; -h lists the options")


def parse_arguments(argv):
    """Command-line words -> {name: value} of the settings that were given."""
    parser = Parser("lander.py", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]
    for setting in fields(Settings):
        flag, kind, text = flag_of(setting.name), setting.type, setting.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            if setting.default != "":
                text += f" (default: {setting.default})"
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    return vars(parser.parse_args(argv))


class Progress:
    """Rate and time left of a long step, on stderr: a line each 30 s, or one that updates itself."""

    def __init__(self, label, total, unit, done=0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.start = self.shown = time.monotonic()

    def add(self, count, remark=""):
        self.done += count
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if terminal and self.done >= self.total:
            print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)
        elif now - self.shown > (0.2 if terminal else 30):
            self.shown = now
            rate = max(self.done - self.first, 1) / (now - self.start)
            left = f"{rate:.3g}/s, {(self.total - self.done) / rate:.0f} s left"
            line = f"{self.label}: {self.done}/{self.total} {self.unit}, {left}{remark}"
            line = f"\r{line:<79}" if terminal else f"{line}\n"
            print(line, end="", file=sys.stderr, flush=True)


def counted(batches, label, sentences):
    """Those of the batches that this process works on, with progress."""
    progress = Progress(label, sentences, "sentences")
    for batch in of_this_process(batches):
        yield batch
        progress.add(len(batch.ids) * process_count())


def say(line=""):
    """Print a line, wrapped to 80 columns."""
    wrapped = textwrap.fill(line, 80, subsequent_indent="   ", break_long_words=False)
    print(wrapped, flush=True)


# --------------------------------------------------------------------------------------------------
# The run folder: each step of a run leaves a file, and a resumed run goes on after the last one


READERS = {".json": read_json, ".safetensors": read_tensors}
WRITERS = {".json": write_json, ".safetensors": write_tensors}  # others are lines of text


def write(path, value):
    """Write a file of the run, by its suffix; of several processes the first one does."""
    if process_number() == 0:
        WRITERS.get(path.suffix, write_lines)(path, value)


def grow(path, keys, make):
    """A file with an entry for each key: what it lacks is made, and written as soon as it is done."""
    entries = {}
    if path.exists():
        with reading(path):
            entries = dict(READERS[path.suffix](path))
    for key in keys:  # in every process, or one finds in the file what another is yet to make
        if key not in entries:
            entries[key] = make(key)
            write(path, entries)
    return entries


PLACES = "weights", "data"  # may differ on resuming: fingerprints know what lies there
NOT_RECORDED = {"out", "resume", "translate", "tuned", "export"}  # a result depends on none


def recorded(settings):
    """What args.json holds, the files' fingerprints apart: what a result depends on."""
    device, dtype = choose_device(settings)
    record = asdict(settings) | {"torch": torch.__version__}
    record |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    for name in NOT_RECORDED:
        del record[name]
    for name in PLACES:  # a path that is no UTF-8 is recorded as well as can be
        record[name] = os.path.abspath(record[name]).encode("utf-8", "replace").decode()
    return record


def read_args(folder):
    """args.json of a run. InputError where it is of another version."""
    path = folder / "args.json"
    record = read_json(path)
    with reading(path):
        settings = {one.name: one.type for one in fields(Settings) if one.name not in NOT_RECORDED}
        odd = record.keys() ^ {*settings, "torch", "files", "new_tokens"}
        if odd:
            raise InputError(f"{path}: of another version, at {', '.join(sorted(odd))}")
        for name, kind in settings.items():
            if type(record[name]) is not kind:
                raise InputError(f"{path}: {name} is {record[name]!r}")
        record["files"] = dict(record["files"])
        record["new_tokens"] = {pair: int(limit) for pair, limit in record["new_tokens"].items()}
    return record


def check_run_folder(folder, settings):
    """InputError for a folder that holds another run, or this one without --resume."""
    if not (folder / "args.json").exists():
        if any(folder.glob("*.safetensors")):
            raise InputError(f"{folder}: holds files of a run, but not its args.json")
        if settings.resume:
            note(f"{folder}: no run to go on with, so one begins")
        return
    if not settings.resume:
        remedy = "--resume goes on with it, --out names another folder"
        raise InputError(f"{folder}: holds a run already; {remedy}")
    before, now = read_args(folder), recorded(settings)
    for name in now.keys() - PLACES:
        if before[name] != now[name]:
            changed = f"{flag_of(name)} {before[name]}, now {flag_of(name)} {now[name]}"
            raise InputError(f"{folder}: was run with {changed}; --resume needs the same")


def first_change(before, now, paths):
    """The first file of two {name: fingerprint} that differs or is in one alone; None for none."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return paths.get(name, name)


def record_args(folder, settings, paths, new_tokens):
    """Write args.json. paths: name -> path of all that the run reads. -> name -> fingerprint"""
    files = {name: fingerprint(path) for name, path in paths.items()}
    if (folder / "args.json").exists():
        if changed := first_change(read_args(folder)["files"], files, paths):
            since = f"{changed} has changed since the run began"
            raise InputError(f"{folder}: {since}; --resume needs the same")
    record = recorded(settings) | {"files": files, "new_tokens": new_tokens}
    write(folder / "args.json", record)
    return files


def merged(learners):
    """What learns from any pair. pair -> {name: Parameter} -> {name: Parameter}"""
    return {name: p for of_pair in learners.values() for name, p in of_pair.items()}


def save_state(path, parameters, optimizer, step):
    """Weights, AdamW's moments and the number of steps done: one file, so that they fit together."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    write(path, tensors)


def load_state(path, parameters, optimizer):
    """Undo save_state. -> steps done"""
    tensors = read_tensors(path)
    with reading(path):
        load_parameters(path, {name: tensors.pop(name) for name in parameters}, parameters)
        step = int(tensors.pop("step"))
        for name, value in tensors.items():
            owner, key = name.split("/")
            parameter = parameters[owner]
            shape = () if key == "step" else parameter.shape
            optimizer.state[parameter][key] = value.to(parameter.device, torch.float32).view(shape)
    return step


def load_parameters(path, tensors, parameters):
    """Copy tensors into parameters. InputError for other names, shapes or types, or for no numbers."""
    wrong = sorted(tensors.keys() ^ parameters.keys())
    for name in tensors.keys() & parameters.keys():
        tensor, parameter = tensors[name], parameters[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            wrong.append(name)
        elif not tensor.isfinite().all():
            wrong.append(f"{name} (not all numbers)")
    if wrong:
        raise InputError(f"{path}: does not fit this model and neurons.json, at {', '.join(wrong)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


# --------------------------------------------------------------------------------------------------
# tune


VALID_SENTENCES = 500
SAVE_EVERY = 30  # seconds at least, and twenty times what the last save took


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


def choose_pairs(choice, folder, split):
    """ "all" -> every pair of a split; else the listed ones, checked."""
    pairs = list_pairs(folder, split) if choice == "all" else choice.split(",")
    for i, pair in enumerate(pairs):
        split_pair(pair)
        if pair in pairs[:i]:
            raise InputError(f"pair {pair!r} is listed twice")
    return pairs


def open_checkpoint(folder):
    """-> Config, tokenizer that fits, and name in args.json -> path of all files that are read"""
    config, tokenizer = Config.from_folder(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        found = f"{tokenizer.paths[0]} has {tokenizer.vocab_size} tokens"
        raise InputError(f"{found}, config.json an embedding of {config.vocab_size}")
    folder = Path(folder)
    paths = [folder / "config.json", *tokenizer.paths, *checkpoint_files(folder)]
    paths += folder.glob("model.safetensors.index.json")
    return config, tokenizer, {f"weights/{path.name}": path for path in paths}


class Inputs(NamedTuple):
    """The text that a run reads, each by pair."""

    train: dict  # tuned pair -> [(source, target), ...]
    valid: dict  # tuned pair -> rendered examples, where there is such text
    scoring: dict  # tuned and other pairs -> rendered examples for the scores
    others: dict  # pair that is not tuned -> sources of its training text
    test: dict  # evaluated pair -> [(source, target), ...]
    paths: dict  # name in args.json -> path
    max_tokens: int  # longer examples are skipped
    new_tokens: dict  # pair -> how many a translation may have for each token of its prompt


def short_enough(examples, max_tokens):
    return [example for example in examples if len(example[0]) + len(example[1]) <= max_tokens]


def read_inputs(tokenizer, tuned, settings, longest=math.inf):
    """Read all text that a run needs, so that what is wrong with it shows before anything long.

    A script may take ten tokens where English takes one: limits grow with what a pair takes.
    longest: how many tokens the model takes
    """
    paths, train, valid, scoring, others, test = {}, {}, {}, {}, {}, {}

    def read(split, pair):
        text = open_parallel(settings.data, split, pair)
        paths.update({f"data/{path.name}": path for path in text.paths})
        if not text:
            raise InputError(f"{settings.data}: the {split} text of {pair} is empty")
        return text

    def rendered(pair, text):
        return [render(tokenizer, pair, source, target) for source, target in text]

    for pair in tuned:
        train[pair] = read("train", pair)
    compared = choose_pairs(settings.score_pairs, settings.data, "train")
    for pair in tuned + [pair for pair in compared if pair not in tuned]:
        text = train[pair] if pair in tuned else read("train", pair)
        size = min(settings.score_sentences, len(text))
        chosen = random.Random(settings.seed).sample(text, size)
        scoring[pair] = rendered(pair, chosen)
        if pair not in tuned:
            others[pair] = [source for source, _ in chosen[:KEPT_SENTENCES]]
    if len(scoring) < 2:
        raise InputError(f"{settings.data}: training text of one pair only; {NEEDS_TWO_PAIRS}")
    if settings.keep and not others:
        raise InputError("--keep: --score-pairs and --data have no pair beside the tuned ones")
    with_valid = list_pairs(settings.data, "valid")
    for pair in tuned:
        if pair in with_valid:
            valid[pair] = rendered(pair, read("valid", pair)[:VALID_SENTENCES])
        elif any(Path(settings.data).glob("valid.*")):
            note(f"{settings.data}: no valid text for {pair}, though there is some")
    max_tokens, new_tokens = settings.max_tokens, {}
    for pair, examples in scoring.items():
        ratio = median(len(target) / len(prompt) for prompt, target in examples)
        new_tokens[pair] = max(NEW_TOKENS, math.ceil(3 * ratio))
        length = median(len(prompt) + len(target) for prompt, target in examples)
        if not settings.max_tokens:
            max_tokens = max(max_tokens, 256, math.ceil(4 * length))
    max_tokens = min(max_tokens, longest + 1)  # the last target is no input
    for rendered_text, what in ((scoring, "scoring"), (valid, "validation")):
        for pair, examples in rendered_text.items():
            rendered_text[pair] = kept = short_enough(examples, max_tokens)
            over = f"{len(examples) - len(kept)} of {len(examples)} examples"
            if not kept:
                raise InputError(f"{what} {pair}: {over} are longer than --max-tokens {max_tokens}")
            if len(kept) < len(examples):
                note(f"{what} {pair}: skipped {over}, over {max_tokens} tokens")
    for pair in choose_pairs(settings.eval_pairs or settings.pair, settings.data, "test"):
        make_metrics(pair)  # which may lack its tokenizer
        test[pair] = read("test", pair)[: settings.eval_sentences or None]
    return Inputs(train, valid, scoring, others, test, paths, max_tokens, new_tokens)


def check_scores(scores, size, what):
    """InputError for scores that are not `size` numbers, or that say nothing: they decide all."""
    if scores.shape != (size,) or not scores.isfinite().all():
        raise InputError(f"{what}: not all numbers, or not {size}; are the weights?")
    if not scores.any():
        raise InputError(f"{what}: all zero")


def analyse_layers(model, tokenizer, scoring, tuned, settings, path):
    """layers.json: each tuned pair's means, differences and layers. -> pair -> selected layers"""

    def analyse(pair):
        prompts = [(prompt, []) for prompt, _ in scoring[pair]]
        batches = make_batches(prompts, tokenizer.pad_id, settings.micro_tokens)
        means = activation_means(model, counted(batches, f"layers for {pair}", len(prompts)))
        check_scores(means, model.config.layers, f"layer means of {pair}")
        differences = layer_differences(means).tolist()
        selected = select_layers(differences, settings.layers)
        return {"selected": selected, "means": means.tolist(), "differences": differences}

    analysis, selected = grow(path, tuned, analyse), {}
    with reading(path):
        for pair in tuned:
            differences = torch.tensor(analysis[pair]["differences"])
            check_scores(differences, model.config.layers - 1, f"{path}: differences of {pair}")
            selected[pair] = select_layers(differences, settings.layers)
    return selected


def score_units(model, tokenizer, scoring, layers, reader, settings, path):
    """Write what neuron_awareness says of each pair. -> [P, K, what the reader reads]"""

    def score(pair):
        batches = make_batches(scoring[pair], tokenizer.pad_id, settings.micro_tokens)
        batches = counted(batches, f"scoring {pair}", len(scoring[pair]))
        return neuron_awareness(model, batches, layers, reader)

    awareness = grow(path, scoring, score)
    width = model.blocks[0].get_submodule(reader).in_features
    with reading(path):
        for pair in scoring:
            for layer, scores in zip(layers, awareness[pair], strict=True):
                check_scores(scores, width, f"{path}: awareness for {pair} in layer {layer}")
        return torch.stack([awareness[pair] for pair in scoring])


def group_neurons(model, tokenizer, scoring, selected, settings, folder):
    """neurons.json, from the scores of all units that --units names. -> groups"""
    pairs, rest = list(scoring), (model, tokenizer, scoring, union(selected))
    awareness = score_units(*rest, "ffn.down", settings, folder / "awareness.safetensors")
    owner = categorize(awareness, settings.epsilon)
    groups = describe_groups(awareness, owner, pairs, selected)
    if settings.units == "all":
        read = score_units(*rest, "attention.output", settings, folder / "channels.safetensors")
        add_channels(groups, read, model.config, pairs, settings.epsilon)
    write(folder / "neurons.json", groups)
    return groups


def count_steps(text, settings):
    """How many steps a run takes: as many as --steps says, or one epoch."""
    return settings.steps or sum(math.ceil(len(pairs) / settings.batch) for pairs in text.values())


def step_batches(tokenizer, text, settings, start):
    """The steps of a run from number `start` on, as training_steps takes them.

    Examples are rendered when their step comes: there may be millions.
    """
    sizes = {pair: len(pairs) for pair, pairs in text.items()}
    steps = schedule(sizes, settings.batch, settings.seed)
    for pair, numbers in islice(steps, start, count_steps(text, settings)):
        examples = [render(tokenizer, pair, *text[pair][i]) for i in of_this_process(numbers)]
        kept = short_enough(examples, settings.max_tokens)
        batches = make_batches(kept, tokenizer.pad_id, settings.micro_tokens)
        yield pair, list(batches), len(examples) - len(kept)


def kept_examples(model, tokenizer, others, settings, new_tokens, path):
    """kept.json: what the model says of other pairs' sources before training. -> rendered examples"""

    def make(pair):
        rest = replace(settings, beams=1), new_tokens[pair]
        return translate_text(model, tokenizer, pair, others[pair], *rest)[0]

    said, examples = grow(path, others, make), []
    with reading(path):
        for pair, sources in others.items():
            for source, line in zip(sources, said[pair], strict=True):
                examples.append(render(tokenizer, pair, source, line))
    kept = short_enough(examples, settings.max_tokens)
    if not kept:
        raise InputError(f"--keep: none of {len(examples)} examples of other pairs is short enough")
    return kept


def train(model, tokenizer, learners, text, valid, settings, folder, kept=()):
    """Train from the last saved state, if there is one, to tuned.safetensors; log.jsonl says how.

    learners: pair -> {name: Parameter}, as what_learns; text: pair -> [(source, target), ...];
    valid: pair -> rendered examples. InputError where the loss is no longer a number.
    """
    log_path, state_path = folder / "log.jsonl", folder / "state.safetensors"
    parameters, total = merged(learners), count_steps(text, settings)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=WEIGHT_DECAY, fused=True)
    rest = settings.keep, tokenizer.pad_id, settings.micro_tokens
    keeper = Keeper(model, kept, *rest) if kept else None

    def validate(step):
        losses = {}
        for pair, examples in valid.items():
            batches = make_batches(examples, tokenizer.pad_id, settings.micro_tokens)
            batches = counted(batches, f"validation loss of {pair}", len(examples))
            losses[pair] = validation_loss(model, pair, batches)
        return json.dumps({"step": step, "valid_loss": losses})

    start = 0
    if state_path.exists():
        start = load_state(state_path, parameters, optimizer)
        lines = read_lines(log_path)[: start + 1]  # the first line is the validation loss
        if not 0 < start <= total or len(lines) <= start:
            raise InputError(f"{log_path}: {len(lines)} lines, but {state_path} is of step {start}")
    else:
        lines = [validate(0)]
    write(log_path, lines)

    progress = Progress("training", total, "steps", done=start)
    saved, wait = time.monotonic(), SAVE_EVERY
    model.checkpointing = settings.checkpointing
    batches = step_batches(tokenizer, text, settings, start)
    steps = training_steps(model, learners, batches, total, optimizer, settings.lr, start, keeper)
    with open(os.devnull if process_number() else log_path, "a", encoding="utf-8") as log:
        for entry in steps:
            step, loss, norm = entry["step"], entry["loss"], entry["gradient_norm"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                found = f"step {step}: the loss is {loss} and its gradient {norm}"
                if state_path.exists():
                    found += f"; the last good state is {state_path}"
                raise InputError(f"{found}; run again with a lower --lr and another --out")
            print(json.dumps(entry), file=log, flush=True)
            progress.add(1, f", loss {loss:.3f}")
            if time.monotonic() - saved > wait or step == total:
                began = time.monotonic()
                save_state(state_path, parameters, optimizer, step)
                saved = time.monotonic()
                wait = max(SAVE_EVERY, 20 * (saved - began))
        model.checkpointing = False
        print(validate(total), file=log)
    write(folder / "tuned.safetensors", {name: p.detach() for name, p in parameters.items()})
    wait_for_all()


def show_training(log_path, max_tokens):
    """The validation losses before and after, and how many examples were too long, from the log."""
    with reading(log_path):
        entries = [json.loads(line) for line in read_lines(log_path)]
        skipped = sum(entry["skipped"] for entry in entries[1:-1])
        drifts = [entry["kept"] for entry in entries[1:-1][-10:] if "kept" in entry]
        before, after = entries[0]["valid_loss"], entries[-1]["valid_loss"]
        changes = [f"{pair} {before[pair]:.3f} to {after[pair]:.3f}" for pair in before]
    if changes:
        say(f"   loss of a validation token: {', '.join(changes)}")
    if drifts:
        say(f"   kept: KL to the start on other pairs' sources, {mean(drifts):.4f} nats a token")
    if skipped:
        note(f"training: skipped {skipped} examples, over --max-tokens {max_tokens}")


def evaluate_all(model, tokenizer, test, new_tokens, when, settings, folder):
    """Translate and score the test text of each pair that results.json lacks. -> what it holds then"""
    path = folder / "results.json"
    results = read_json(path) if path.exists() else {}
    with reading(path):
        for pair, scores in results.items():
            if pair not in test or not scores.keys() <= {"before", "after"}:
                raise InputError(f"{path}: {pair}: {', '.join(scores)} is not of this run")
    for pair, text in test.items():
        if when in results.setdefault(pair, {}):
            continue
        limit = new_tokens.get(pair, NEW_TOKENS)
        hypotheses, scores = evaluate(model, tokenizer, pair, text, settings, limit)
        results[pair][when] = scores
        write(folder / "hypotheses" / f"{pair}.{when}.txt", hypotheses)
        write(path, results)
    return results


def show_table(results, tuned):
    """Scores before and after, pair by pair, with the means of the tuned pairs and of the others."""
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
        cut = sum(scores[when]["cut"] for scores in results.values())
        if cut:
            limits = f"{LEAST_NEW_TOKENS} tokens, or {NEW_TOKENS} or more for each of the prompt's"
            say(f"{cut} translations {when} tuning ran to their limit, as a loop does: {limits}.")


def run(settings):
    """The whole method in a run folder of its own. -> what results.json holds"""
    if not settings.data:
        raise InputError("--data names no folder of parallel text")
    folder = Path(settings.out or f"runs/{settings.pair}")
    with nullcontext() if process_number() else locked(folder):
        return tune(settings, folder)


def tune(settings, folder):
    """The whole method; each step leaves a file in the run folder, a resumed run skips those done."""
    started = time.monotonic()
    device, dtype = choose_device(settings)
    given = settings
    check_run_folder(folder, settings)
    wait_for_all()  # until all have looked for what the first process writes from now on
    tuned = choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer, paths = open_checkpoint(settings.weights)
    select_layers(torch.zeros(config.layers - 1), settings.layers)  # too many show at once
    inputs = read_inputs(tokenizer, tuned, settings, config.longest)
    paths |= inputs.paths
    settings = replace(settings, max_tokens=inputs.max_tokens)
    model = load_model(settings.weights, device, dtype, config).requires_grad_(False)
    fingerprints = record_args(folder, given, paths, inputs.new_tokens)
    size = sum(p.numel() for p in model.parameters())
    say(f"{settings.weights}: {config.family}, {config.layers} layers, {size:,} parameters")
    say(f"{dtype} on {device}")

    print("\n1. Layers: which change a prompt's representation most?", flush=True)
    path = folder / "layers.json"
    selected = analyse_layers(model, tokenizer, inputs.scoring, tuned, settings, path)
    for pair in tuned:
        say(f"   {pair}: {', '.join(map(str, selected[pair]))} of 0 to {config.layers - 1}")

    pairs = len(inputs.scoring)
    print(f"\n2. Neurons: which does one of {pairs} pairs need more than the others?", flush=True)
    groups = group_neurons(model, tokenizer, inputs.scoring, selected, settings, folder)
    counts = Counter()
    for group in groups.values():
        for units in (group["specific"], group.get("channels", {})):
            counts.update({pair: len(owned) for pair, owned in units.items()})
    specific = sum(counts.values())
    owned = ", ".join(f"{counts[pair]} of {pair}" for pair in tuned)
    channels = config.kv_heads * config.head_size if settings.units == "all" else 0
    general = len(groups) * (config.ffn_size + channels) - specific
    say(f"   {general} general, {specific} specific: {owned}")

    print(f"\n3. Translating the test text of {len(inputs.test)} pairs, before tuning", flush=True)
    for pair, text in inputs.test.items():
        for side, name in enumerate(("source", "reference")):
            lines = [sentences[side] for sentences in text]
            write(folder / "hypotheses" / f"{pair}.{name}.txt", lines)
    evaluated = model, tokenizer, inputs.test, inputs.new_tokens
    evaluate_all(*evaluated, "before", settings, folder)

    kept = ()
    if settings.keep:
        rest = inputs.others, settings, inputs.new_tokens, folder / "kept.json"
        kept = kept_examples(model, tokenizer, *rest)
    install_routing(model, groups, not settings.no_routing)
    learners = {pair: what_learns(model, pair) for pair in tuned}
    trained = sum(p.numel() for p in merged(learners).values())
    size = sum(p.numel() for p in model.parameters())
    routers = "" if settings.no_routing else " and routers"
    print(f"\n4. Training the general neurons and the pair's own{routers}", flush=True)
    say(f"   {trained:,} of {size:,} parameters, {trained / size:.2%}")
    tuned_path = folder / "tuned.safetensors"
    if tuned_path.exists():
        load_parameters(tuned_path, read_tensors(tuned_path), merged(learners))
    else:
        train(model, tokenizer, learners, inputs.train, inputs.valid, settings, folder, kept=kept)
    (folder / "state.safetensors").unlink(missing_ok=True)
    show_training(folder / "log.jsonl", settings.max_tokens)

    print("\n5. Translating again", flush=True)
    results = evaluate_all(*evaluated, "after", settings, folder)
    with reading(folder / "results.json"):
        show_table(results, tuned)
    for name, path in paths.items():
        if fingerprint(path) != fingerprints[name]:
            note(f"{path} changed while the run used it: what was found is of neither version")
    print(f"\nIt took {time.monotonic() - started:.0f} s; everything is in {folder}", flush=True)
    return results


# --------------------------------------------------------------------------------------------------
# translate


def read_groups(path, config):
    """neurons.json of a finished run. InputError where it cannot be of this model."""
    groups = read_json(path)
    with reading(path):
        for layer, group in groups.items():
            sizes = {"specific": config.ffn_size}
            if "channels" in group:
                sizes["channels"] = config.kv_heads * config.head_size
            for kind, size in sizes.items():
                units = sum(group[kind].values(), [])  # lists, or a TypeError
                fit = all(type(unit) is int and 0 <= unit < size for unit in units)
                if int(layer) not in range(config.layers) or not fit:
                    expected = f"{config.layers} layers of {size} units"
                    raise InputError(f"{path}: layer {layer}: does not fit a model of {expected}")
                if len(set(units)) < len(units):
                    raise InputError(f"{path}: layer {layer}: a neuron has two owners")
            for pair, share in group["share"].items():
                is_owner = all(pair in group[kind] for kind in sizes)
                if not is_owner or not (share is None or 0 < share < 1):
                    raise InputError(f"{path}: layer {layer}: share of {pair} is {share}")
    return groups


TAKEN_OVER = "weights", "dtype", "beams", "no_routing", "language"  # where they are not given
WITH_TUNED = {  # what may be given
    "export": {"tuned", "export", "weights", "dtype", "device"},
    "translate": {"tuned", "translate", "weights", "dtype", "device"}
    | {"pair", "beams", "cache_gb", "language"},
}


def settings_of_run(given):
    """Settings to translate or export with a finished run: what is given, else what the run had."""
    folder = Path(given["tuned"])
    use = "translate" if "translate" in given else "export"
    for name in given.keys() - WITH_TUNED[use]:
        raise InputError(f"{flag_of(name)} has no effect with --tuned and {flag_of(use)}")
    if not (folder / "tuned.safetensors").exists():
        raise InputError(f"{folder}: not the folder of a finished run, it has no tuned.safetensors")
    args = read_args(folder)
    with reading(folder / "args.json"):
        return Settings(**({name: args[name] for name in TAKEN_OVER} | given))


def load_tuned(settings):
    """What a finished run made. -> Decoder, tokenizer, tuned pair -> {name: Parameter}"""
    folder = Path(settings.tuned)
    device, dtype = choose_device(settings)
    config, tokenizer, paths = open_checkpoint(settings.weights)
    files = read_args(folder)["files"].items()
    before = {name: found for name, found in files if name.startswith("weights/")}
    now = {name: fingerprint(path) for name, path in paths.items()}
    if changed := first_change(before, now, paths):
        raise InputError(f"{changed}: not the file that {folder} was tuned on")
    groups = read_groups(folder / "neurons.json", config)
    model = load_model(settings.weights, device, dtype, config)
    install_routing(model, groups, not settings.no_routing)
    pairs = set().union(*(group["share"] for group in groups.values()))
    learners = {pair: what_learns(model, pair) for pair in pairs}
    tuned_path = folder / "tuned.safetensors"
    load_parameters(tuned_path, read_tensors(tuned_path), merged(learners))
    return model, tokenizer, learners


def translate(settings):
    """Translate lines with a finished run, to stdout: one line out for each line in."""
    if not settings.pair or "," in settings.pair:
        raise InputError("--translate takes one --pair, source first, as in en-de")
    split_pair(settings.pair)
    sources = list(enumerate(read_lines(0 if settings.translate == "-" else settings.translate)))
    model, tokenizer, learners = load_tuned(settings)
    if settings.pair not in learners:
        note(f"{settings.pair} was not tuned in {settings.tuned}: general neurons, no routing")
    limit = read_args(Path(settings.tuned))["new_tokens"].get(settings.pair, NEW_TOKENS)
    rest = sources, settings, "translating", limit
    cut = 0
    for _, line, was_cut in translate_lines(model, tokenizer, settings.pair, *rest):
        print(line, flush=True)
        cut += was_cut
    if cut:
        note(f"{cut} of {len(sources)} ran to their limit, as a loop does")


# --------------------------------------------------------------------------------------------------
# export


# What of a checkpoint folder goes with the weights: tokenizers and how to generate. No code.
COMPANIONS = "tokenizer.model", "*token*.json", "generation_config.json"


def export(settings):
    """Write a finished run as a published checkpoint: trained neurons back in their places."""
    folder = Path(settings.export)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty")
    model, _, _ = load_tuned(settings)
    for layer, ffn in routed_layers(model).items():
        if ffn.share:
            expected = "no place in a published checkpoint; tune with --no-routing to export"
            raise InputError(f"{settings.tuned}: its tokens are routed, which has {expected}")
        model.blocks[layer].ffn = ffn.whole()
    for module in model.modules():
        if isinstance(module, PartlyTrained):
            module.settle()
    save_model(model, folder)
    for pattern in COMPANIONS:
        for path in Path(settings.weights).glob(pattern):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    say(f"{folder}: {model.config.family} in {model.embedding.weight.dtype}")


# --------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    """The command line. -> exit status: 0 done, 2 bad input or arguments, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv

    def command():
        with torchrun():
            given = parse_arguments(argv)
            settings = Settings(**given)
            if settings.tuned:
                settings = settings_of_run(given)
            torch.manual_seed(settings.seed)
            name_languages(settings.language)
            if process_count() > 1 and (settings.tuned or not settings.weights):
                raise InputError("torchrun is for tuning a checkpoint; run this one without")
            if settings.tuned:
                return export(settings) if settings.export else translate(settings)
            try:
                if settings.weights:
                    return run(settings)
                from study import demo

                demo.demo(given)
            except KeyboardInterrupt:
                words = ["lander.py", *argv, "--resume"][: None if not settings.resume else -1]
                print(f"\nto go on: {shlex.join(words)}", file=sys.stderr)
                raise

    return exit_status(command)


def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end(number, frame):
    """Ctrl-C, or a cluster's SIGTERM. A second one would interrupt the end of the first."""
    ignore_signals()
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, end)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a stream may be closed: >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    status = main()
    ignore_signals()
    if distributed.is_torchelastic_launched():
        # One such process in thirty aborts in gloo's threads while the interpreter ends.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
