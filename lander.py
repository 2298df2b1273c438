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

In this file: layers; neurons; groups; routing; training; evaluation; then what a run needs besides:
settings, progress, saved state, several processes, the run itself, the command line.
"""

import argparse
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import InputError, exit_status, find_parallel, fingerprint, first_line, first_process
from data import group_by_length, has_line_break, line_ends, list_pairs, load_tokenizer, locked
from data import make_batch, make_batches, open_parallel, parse_json, read_json, read_lines
from data import read_tensors, render, split_pair, tokenizer_file, tokenizer_files, write_json
from data import write_lines, write_tensors
from model import FFN, Config, checkpoint_files, load_model, save_model


# --------------------------------------------------------------------------------------------------
# Layers: representation analysis (paper 3.1)
#
# Why: a layer that moves the mean of the residual stream most, on a pair's prompts, does most of
# the work there. Train in those layers and leave the others alone.


def device_of(model):
    return model.embedding.weight.device


def to_device(batch, model):
    return [tensor.to(device_of(model), non_blocking=True) for tensor in batch]


@torch.no_grad()
def activation_means(model, batches):
    """A[l]: the mean output of block l over a prompt's tokens and over D, then over prompts.

    batches: Batch of prompts, without targets; padding does not count. -> [L] fp32
    """
    total = torch.zeros(model.config.layers, dtype=torch.float64, device=device_of(model))
    prompts = 0
    for batch in batches:
        ids, mask, _ = to_device(batch, model)
        outputs = [x.float().mean(-1) for x in model.block_outputs(ids, mask)]  # L of [B, T]
        means = (torch.stack(outputs) * mask).sum(-1) / mask.sum(-1)  # [L, B]
        total += means.double().sum(1)  # [L]
        prompts += len(ids)
    return (add_up(total) / add_up(prompts)).float().cpu()


def layer_differences(means):
    """diff[l] = |A[l+1] - A[l]|, the change that layer l+1 makes. [L] -> [L-1]

    [1, 4, 3] -> [3, 1]
    """
    return (means[1:] - means[:-1]).abs()


def check_layer_count(k, scored):
    if k > scored:
        found = f"{k} layers to select, but only {scored} have a score"
        raise InputError(f"{found} (the first has none)")


def select_layers(differences, k):
    """The k layers that change most, sorted. diff[l] scores layer l+1; ties go to the lower layer.

    [3, 1, 3], 1 -> [1]
    """
    differences = torch.as_tensor(differences)
    check_layer_count(k, len(differences))
    ranked = differences.argsort(descending=True, stable=True)  # [L-1]
    return sorted((ranked[:k] + 1).tolist())


# --------------------------------------------------------------------------------------------------
# Neurons: awareness by Taylor expansion (paper 3.2)
#
# Why: set neuron i's activation h_i to zero, and to first order the loss changes by
# -h_i * dloss/dh_i. The size of that product is how much the loss needs the neuron. One backward
# pass tells for all neurons what removing them one by one would.


LOGITS_AT_ONCE = 30_000_000  # 0.48 GB: 16 bytes each, in 16 bits, in fp32, and both gradients


def token_losses(model, hidden, targets):
    """hidden [N, D], targets [N] -> the sum of their negative log-likelihoods, fp32"""
    return functional.cross_entropy(model.logits(hidden).float(), targets, reduction="sum")


def target_loss(model, batch):
    """The sum of the target tokens' negative log-likelihoods, fp32.

    Logits exist at target positions only, and not for all of them at once: V is 250,880 in BLOOM.
    """
    ids, mask, targets = to_device(batch, model)
    wanted = targets != -100
    hidden, targets = model.hidden_states(ids, mask)[wanted], targets[wanted]  # [N, D], [N]
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(targets) <= size:
        return token_losses(model, hidden, targets)
    # Checkpointed: the backward pass makes a piece's logits again instead of keeping all.
    pieces = zip(hidden.split(size), targets.split(size))
    return sum(checkpoint(token_losses, model, *piece, use_reentrant=False) for piece in pieces)


@contextmanager
def recording(model, layers, reader="ffn.down"):
    """While open, h[layer] is what the layer's `reader` read in the last forward pass, [B, T, F].

    ffn.down reads the neurons' activations, attention.output the values that attention mixed.
    """
    h = {}

    def record(layer, module, inputs):
        # With every weight frozen no graph leads to the lowest recorded h: it starts here.
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
    total = torch.zeros(len(layers), width, dtype=torch.float64, device=device_of(model))
    tokens = 0
    with recording(model, layers, reader) as h:
        for batch in batches:
            loss = target_loss(model, batch)
            gradients = torch.autograd.grad(loss, [h[layer] for layer in layers])
            for k, (layer, gradient) in enumerate(zip(layers, gradients)):
                effect = h[layer].detach() * gradient.float()  # [B, T, F], zero where T is padding
                total[k] += torch.linalg.vector_norm(effect, 1, (0, 1))  # the sum of |effect|
            tokens += int(batch.mask.sum())
    return (add_up(total) / add_up(tokens)).float().cpu()


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


def general_share(scores, general, own):
    """m_G / (m_G + m_S): what part of the capacity that a pair uses is general.

    m_G and m_S are the mean scaled awareness (scores [F]) over the general neurons and over the
    pair's own ([F] bool each). None where a group is empty or scores nothing: there is nothing to
    route between.
    """
    m_general = scores[general].sum().item() / max(1, general.sum().item())
    m_own = scores[own].sum().item() / max(1, own.sum().item())
    if m_general + m_own == 0:
        return None
    share = m_general / (m_general + m_own)
    return share if 0 < share < 1 else None


def union(selected):
    """The layers that any pair selected. {"en-de": [1, 7], "fr-cs": [1, 2]} -> [1, 2, 7]"""
    return sorted(set().union(*selected.values()))


def describe_groups(awareness, owner, pairs, selected):
    """What neurons.json holds, all that RoutedFFN is made from.

        {"5": {"specific": {"en-de": [3, 8], "de-en": [6]}, "share": {"en-de": 0.4}}, ...}

    by layer: the neurons that each pair owns, all others being general; and of each pair that tunes
    the layer its general_share. pairs: names of the P rows; selected: tuned pair -> layers
    """
    scaled = scale_awareness(awareness).double()  # [P, K, F]
    groups = {}
    for k, layer in enumerate(union(selected)):
        specific, share = {}, {}
        for p, pair in enumerate(pairs):
            own = owner[k] == p  # [F]
            specific[pair] = own.nonzero().flatten().tolist()
            if layer in selected.get(pair, []):
                share[pair] = general_share(scaled[p, k], owner[k] == -1, own)
        groups[str(layer)] = {"specific": specific, "share": share}
    return groups


# --------------------------------------------------------------------------------------------------
# Routing: conditional awareness-based routing, CAR (paper 3.3)
#
# Why: general neurons serve every pair, a pair's own serve it alone, and tokens differ in which of
# the two they need. CAR learns for each token how much to lean on either.


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
        owned = set().union(*specific.values())
        others = owned.difference(*(specific[pair] for pair in share))
        self.neurons = {pair: specific[pair] for pair in share}  # numbers, of each part
        self.neurons["general"] = [i for i in range(ffn.up.out_features) if i not in owned]
        self.neurons["rest"] = sorted(others)
        self.general = ffn.part(self.neurons["general"], torch.float32)
        self.specific = nn.ModuleDict()
        for pair in share:
            self.specific[pair] = ffn.part(specific[pair], torch.float32)
        self.rest = ffn.part(self.neurons["rest"], ffn.up.weight.dtype)
        self.config, self.output_bias = ffn.config, ffn.down.bias
        self.share, self.router = {}, nn.ParameterDict()  # router: pair -> w_p [D]
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
        ffn.put(self.neurons["general"], self.general)
        ffn.put(self.neurons["rest"], self.rest)
        for pair, part in self.specific.items():
            ffn.put(self.neurons[pair], part)
        ffn.down.bias = self.output_bias
        return ffn


def install_routing(model, groups, routing=True):
    """Put a RoutedFFN into each layer of `groups`, which is as describe_groups makes it."""
    for layer, group in groups.items():
        block = model.blocks[int(layer)]
        block.ffn = RoutedFFN(block.ffn, group["specific"], group["share"], routing)


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
    for layer, ffn in routed_layers(model).items():
        for name, parameter in ffn.what_learns(pair).items():
            learners[f"blocks.{layer}.ffn.{name}"] = parameter
    return learners


# --------------------------------------------------------------------------------------------------
# Training
#
# Why like this: what must not change has no gradient at all, so the optimizer passes it over. A
# gradient multiplied by zero would not do: AdamW's decay and momentum still move such a weight.


WEIGHT_DECAY = 0.01
WARM_UP = 0.05  # of all steps
CLIP_NORM = 1.0


def count_targets(batches):
    return sum(int((batch.targets != -100).sum()) for batch in batches)


def train_step(model, batches, optimizer, learners):
    """One update of `learners`, and of nothing else, from the micro-batches of one pair.

    The loss is the sum over all their target tokens, those of other processes too, divided by their
    number, not a mean of means. learners: the parameters that learn.
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
    if tokens:
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


def schedule(examples, batch, seed):
    """Steps without end: yields (pair, numbers of the step's examples).

    Each epoch shuffles every pair's text, and pairs alternate; once the shorter text is through,
    the rest of the epoch is the longer one's. examples: pair -> sequence
    """

    def slices(pair, shuffled):
        for start in range(0, len(shuffled), batch):
            yield pair, shuffled[start : start + batch]

    rng = random.Random(seed)
    while True:
        steps = []  # of each pair
        for pair, own in examples.items():
            steps.append(slices(pair, rng.sample(range(len(own)), len(own))))
        for turn in zip_longest(*steps):
            yield from filter(None, turn)


def count_steps(examples, settings):
    epoch = sum(math.ceil(len(own) / settings.batch) for own in examples.values())
    return settings.steps or epoch


def training_steps(model, tokenizer, learners, examples, optimizer, settings, start=0):
    """Train from step `start` on. learners: pair -> {name: Parameter}; examples: pair -> sequence

    An example that is None is left out; a step of none but such changes nothing. What learns from a
    pair is the caller's to say: some neurons, some matrices, everything.
    Yields what log.jsonl says of a step, after each.
    """
    total = count_steps(examples, settings)
    steps = islice(schedule(examples, settings.batch, settings.seed), start, total)
    for step, (pair, numbers) in enumerate(steps, start):
        rate = learning_rate(step, total, settings.lr)
        optimizer.param_groups[0]["lr"] = rate
        route(model, pair)
        chosen = [example for example in map(examples[pair].__getitem__, share(numbers)) if example]
        batches = list(make_batches(chosen, tokenizer.pad_id, settings.micro_tokens))
        loss, norm = train_step(model, batches, optimizer, learners[pair].values())
        entry = {"step": step + 1, "pair": pair, "loss": loss}
        yield entry | {"gradient_norm": norm, "learning_rate": rate}


@torch.no_grad()
def validation_loss(model, tokenizer, examples, settings):
    """pair -> mean negative log-likelihood of a target token."""
    losses = {}
    for pair, own in examples.items():
        route(model, pair)
        total, tokens = 0.0, 0
        batches = make_batches(own, tokenizer.pad_id, settings.micro_tokens)
        for batch in counted(batches, f"validation loss of {pair}", len(own)):
            total += target_loss(model, batch).item()
            tokens += count_targets([batch])
        losses[pair] = add_up(total) / add_up(tokens)
    return losses


# --------------------------------------------------------------------------------------------------
# Evaluation
#
# Why for other pairs too: a gain says nothing without what was forgotten for it.


LEAST_NEW_TOKENS = 64
ROWS_AT_ONCE = 512  # of more, padding costs more than it saves to read the weights less often


def translate_lines(model, tokenizer, pair, sources, settings, label):
    """Translate sentences, those of like length together. Yields (number, line, cut), out of order.

    sources: [(number, sentence), ...]

    A translation ends at end-of-sentence, at the first line break after its first visible character,
    or at three times its own prompt's length or LEAST_NEW_TOKENS; cut says that it came to that: it
    is a loop, as a rule. An empty source, or one too long for the model, is an empty line.
    """
    route(model, pair)
    numbers, prompts = [], []
    for number, source in sources:
        prompt, _ = render(tokenizer, pair, source)
        if not source.strip():
            yield number, "", False
        elif len(prompt) > model.config.max_length:
            found = f"{len(prompt)} tokens, the model was made for {model.config.max_length}"
            print(f"{pair}: line {number + 1}: {found}; left empty", file=sys.stderr)
            yield number, "", False
        else:
            numbers.append(number)
            prompts.append(prompt)
    progress = Progress(label, len(prompts), "sentences")
    ends = line_ends(tokenizer)
    limits = [max(3 * len(prompt), LEAST_NEW_TOKENS) for prompt in prompts]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits)]
    room = settings.cache_gb * 1e9 / (model.cache_bytes() * settings.beams)  # tokens
    for group in group_by_length(lengths, room, ROWS_AT_ONCE // settings.beams):
        batch = make_batch([(prompts[i], []) for i in group], tokenizer.pad_id)
        ids, mask, _ = to_device(batch, model)
        options = settings.beams, tokenizer.vocab_size, ends
        own_limits = [limits[i] for i in group]
        continuations = model.generate(ids, mask, own_limits, tokenizer.eos_id, *options)
        for i, new in zip(group, continuations):
            text = tokenizer.decode(new)
            cut = len(new) == limits[i] and not has_line_break(text.lstrip())
            yield numbers[i], first_line(text), cut
        progress.add(len(group))


def make_metrics(pair):
    """sacreBLEU's metrics; BLEU's tokenizer follows the target language (zh, ja-mecab, 13a, ...)."""
    try:
        return {"bleu": BLEU(trg_lang=split_pair(pair)[1]), "chrf": CHRF()}
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{pair}: no BLEU tokenizer ({str(error).splitlines()[0]})") from None


def evaluate(model, tokenizer, pair, text, settings, path):
    """Translate text, [(source, target), ...], into a file, and score it.

    -> {"bleu": ..., "chrf": ..., their signatures, "cut": how many translations ran to their limit}
    """
    sources, references = [source for source, _ in text], [target for _, target in text]
    own, found = list(share(enumerate(sources))), {}  # found: number -> line, cut
    lines = translate_lines(model, tokenizer, pair, own, settings, f"translating {pair}")
    for number, line, was_cut in lines:
        found[number] = line, was_cut
    found = gather(found)
    hypotheses = [found[number][0] for number in range(len(text))]
    cut = sum(was_cut for _, was_cut in found.values())
    write_lines(path, hypotheses)
    scores = {}
    for name, metric in make_metrics(pair).items():
        scores[name] = metric.corpus_score(hypotheses, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores | {"cut": cut}


# --------------------------------------------------------------------------------------------------
# Settings and progress


def option(default, help):
    return field(default=default, metadata={"help": help})


MANY = 2**31 - 1
RANGES = {name: (1, MANY) for name in ("layers", "batch", "max_tokens", "micro_tokens")}
RANGES |= {"score_sentences": (1, MANY), "steps": (0, MANY), "eval_sentences": (0, MANY)}
RANGES |= {"seed": (0, MANY), "beams": (1, 128), "cache_gb": (0, MANY)}


@dataclass
class Settings:
    """Every setting with its default: the command line is made from it, args.json records it.

    InputError where a value makes no sense.
    """

    pair: str = option("", "pair to tune, source first: en-de; several alternate: en-de,fr-cs")
    weights: str = option("", "folder of a published checkpoint; none: run the demo")
    data: str = option("", "folder of parallel text: train.*, valid.* (if there), test.*")
    out: str = option("", "run folder; none: runs/PAIRS")
    layers: int = option(4, "how many layers each pair selects")
    epsilon: float = option(0.9, "share of a layer's neurons that are language-general")
    lr: float = option(5e-5, "peak learning rate of AdamW")
    steps: int = option(0, "training steps; 0: one epoch")
    batch: int = option(80, "sentences in a training step")
    max_tokens: int = option(256, "longer examples, prompt and target, are skipped and counted")
    micro_tokens: int = option(2048, "tokens in one pass; a step takes as many passes as it needs")
    checkpointing: bool = option(False, "recompute activations: slower training, less memory")
    score_pairs: str = option("all", "pairs whose neurons are compared: all, or a list")
    score_sentences: int = option(500, "training sentences of each pair to score with")
    eval_pairs: str = option("", "pairs to evaluate: all, or a list; none: the tuned ones")
    eval_sentences: int = option(0, "test sentences of each pair; 0: all")
    beams: int = option(1, "beam search with so many beams; 1: greedy")
    cache_gb: float = option(2.0, "GB for the keys and values of a batch of translations")
    device: str = option("", "cpu, cuda, cuda:1, ...; none: cuda where there is one")
    dtype: str = option("", "float32 or bfloat16; none: float32 on the cpu, bfloat16 elsewhere")
    seed: int = option(0, "of shuffling and sampling")
    no_routing: bool = option(False, "train the same neurons without CAR")
    resume: bool = option(False, "go on with an interrupted run")
    translate: str = option("", "translate the lines of a file, or of - (standard input)")
    tuned: str = option("", "folder of a finished run, for --translate or --export")
    export: str = option("", "folder to write the tuned model to, as a published checkpoint")

    def __post_init__(self):
        for name, (lowest, highest) in RANGES.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                expected = f"{lowest} or more" if highest == MANY else f"{lowest} to {highest}"
                raise InputError(f"{flag_of(name)} is {value}, expected {expected}")
        for name, value in asdict(self).items():
            if isinstance(value, str) and "\0" in value:
                raise InputError(f"{flag_of(name)} has a NUL character")
        if self.tuned and not (self.translate or self.export):
            raise InputError("--tuned needs --translate or --export, what to do with that run")
        for name in ("translate", "export"):
            if getattr(self, name) and not self.tuned:
                raise InputError(f"{flag_of(name)} needs --tuned, the folder of a finished run")
        if not 0 <= self.epsilon <= 1:
            raise InputError(f"--epsilon is {self.epsilon}, expected a share from 0 to 1")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr is {self.lr}, expected a positive number")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise InputError(f"--dtype is {self.dtype!r}, expected float32 or bfloat16")


def flag_of(name):
    """ "eval_pairs" -> "--eval-pairs" """
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; -h lists the options")


def parse_arguments(argv):
    """Command-line words -> {name: value} of the settings that were given."""
    about = __doc__.split("\n\n")[0]
    parser = Parser(prog="lander.py", description=about, argument_default=argparse.SUPPRESS)
    for setting in fields(Settings):
        flag, kind, text = flag_of(setting.name), type(setting.default), setting.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            if setting.default != "":
                text += f" (default: {setting.default})"
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    return vars(parser.parse_args(argv))


class Progress:
    """Rate and time left of a long step, on stderr.

    One updating line on a terminal, which is gone at the end; elsewhere a plain line now and then.
    """

    def __init__(self, label, total, unit, done=0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.start = self.shown = time.monotonic()

    def add(self, count, note=""):
        self.done += count
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if terminal and self.done >= self.total:
            print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)
            return
        if now - self.shown < (0.2 if terminal else 30):
            return
        self.shown = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = f"{rate:.3g}/s, {(self.total - self.done) / rate:.0f} s left"
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {left}{note}"
        if terminal:
            print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def counted(batches, label, sentences):
    """This process's share of the batches, with progress."""
    progress = Progress(label, sentences, "sentences")
    for batch in share(batches):
        yield batch
        progress.add(len(batch.ids) * process_count())


def say(line=""):
    """Print a line, wrapped to 80 columns."""
    for part in textwrap.wrap(line, 80, subsequent_indent="   ", break_long_words=False) or [""]:
        print(part, flush=True)


# --------------------------------------------------------------------------------------------------
# Training that can be interrupted


SAVE_EVERY = 30  # seconds at least, and twenty times what the last save took


@contextmanager
def interrupts_held():
    """While open, Ctrl-C and SIGTERM only fill the list that it gives; a second one ends at once.

    A step that is broken off leaves weights of which some have moved and some have not.
    """
    came = []

    def note(number, frame):
        if number in came:
            raise KeyboardInterrupt
        came.append(number)
        print("\nending after this step", file=sys.stderr)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def merged(learners):
    """What learns from any pair. pair -> {name: Parameter} -> {name: Parameter}"""
    parameters = {}
    for own in learners.values():
        parameters |= own
    return parameters


def save_state(path, parameters, optimizer, step):
    """Weights, AdamW's moments and the number of steps done: one file, so that they fit together."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    write_tensors(path, tensors)


def load_state(path, parameters, optimizer, total):
    """Undo save_state. -> steps done. InputError for a file that does not fit."""
    tensors = read_tensors(path)
    step = tensors.pop("step", torch.tensor(-1))
    if step.shape != () or not 0 < step <= total:
        raise InputError(f"{path}: is not of a step from 1 to {total}")
    expected = dict(parameters)
    for name, parameter in parameters.items():
        if any(found.startswith(f"{name}/") for found in tensors):  # it has learned something yet
            expected[f"{name}/step"] = torch.tensor(0.0)
            expected[f"{name}/exp_avg"] = expected[f"{name}/exp_avg_sq"] = parameter
    check_fit(path, tensors, expected)
    for name in expected.keys() - parameters.keys():
        owner, key = name.split("/")
        optimizer.state[parameters[owner]][key] = tensors.pop(name).to(parameters[owner].device)
    load_parameters(path, tensors, parameters)
    return int(step)


def check_fit(path, tensors, expected):
    """InputError where a file's tensors differ from what is expected in name, shape or type."""
    wrong = [name for name in tensors if name not in expected]
    for name, tensor in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            wrong.append(name)
    if wrong:
        raise InputError(f"{path}: does not fit this model and neurons.json, at {', '.join(wrong)}")


def load_parameters(path, tensors, parameters):
    """Copy tensors into parameters of the same names. InputError where they differ."""
    check_fit(path, tensors, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def train(model, tokenizer, learners, examples, valid, settings, folder, weight_decay=WEIGHT_DECAY):
    """Train to the end, from the last saved state if there is one, and write tuned.safetensors.

    learners: pair -> {name: Parameter}, as what_learns; examples, valid: pair -> list of rendered
    examples. log.jsonl gets a line a step, state.safetensors holds the last good state. Ctrl-C and
    SIGTERM wait for the step to end, and save. InputError where the loss is no longer a number.
    """
    log_path, state_path = folder / "log.jsonl", folder / "state.safetensors"
    parameters, total = merged(learners), count_steps(examples, settings)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=weight_decay, fused=True)
    start = 0
    if state_path.exists():
        start = load_state(state_path, parameters, optimizer, total)
        log = read_lines(log_path)
        if len(log) <= start:
            raise InputError(f"{log_path}: has {len(log)} lines, {state_path} is of step {start}")
        write_lines(log_path, log[: start + 1])  # the first line is the validation loss
    else:
        before = {"step": 0, "valid_loss": validation_loss(model, tokenizer, valid, settings)}
        write_lines(log_path, [json.dumps(before)])

    progress = Progress("training", total, "steps", done=start)
    saved, wait = time.monotonic(), SAVE_EVERY
    model.checkpointing = settings.checkpointing
    steps = training_steps(model, tokenizer, learners, examples, optimizer, settings, start)
    own_path = log_path if first_process() else os.devnull
    with open(own_path, "a", encoding="utf-8") as log, interrupts_held() as interrupts:
        for entry in steps:
            step, loss, norm = entry["step"], entry["loss"], entry["gradient_norm"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                found = f"step {step}: the loss is {loss} and its gradient {norm}"
                if state_path.exists():
                    found += f"; the last good state is {state_path}"
                raise InputError(f"{found}; run again with a lower --lr and another --out")
            print(json.dumps(entry), file=log, flush=True)
            progress.add(1, f", loss {loss:.3f}")
            ending = add_up(len(interrupts)) > 0  # all in the same step
            if ending or time.monotonic() - saved > wait or step == total:
                began = time.monotonic()
                save_state(state_path, parameters, optimizer, step)
                saved = time.monotonic()
                wait = max(SAVE_EVERY, 20 * (saved - began))
            if ending:
                wait_for_all()
                raise KeyboardInterrupt
    model.checkpointing = False
    after = {"step": total, "valid_loss": validation_loss(model, tokenizer, valid, settings)}
    with open(own_path, "a", encoding="utf-8") as log:
        print(json.dumps(after), file=log)
    tuned = {name: parameter.detach() for name, parameter in parameters.items()}
    write_tensors(folder / "tuned.safetensors", tuned)
    wait_for_all()


# --------------------------------------------------------------------------------------------------
# Several processes
#
# Why sums: scores, losses and gradients are sums over sentences. So each process takes its share of
# the same batches, and all add up what they found: the result does not depend on their number.


def process_count():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(items):
    """What this process works on. Of [0, 1, 2, 3, 4] the second of two processes has 1 and 3."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return islice(items, rank, None, process_count())


def add_up(value):
    """The sum over processes of a number or a tensor."""
    if process_count() == 1:
        return value
    if isinstance(value, torch.Tensor):
        distributed.all_reduce(value)
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return type(value)(add_up(torch.tensor(value, dtype=torch.float64, device=device)).item())


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
        parts *= process_count()
        distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def wait_for_all():
    if process_count() > 1:
        distributed.barrier()


ECHO = 10  # seconds


@contextmanager
def torchrun():
    """Join the processes that torchrun started, if it did. All but the first are silent."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    if not first_process():
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (InputError, OSError, RuntimeError) as error:
        # The first process may say the same, and where another has died, an error in waiting for it
        # is an echo: then torchrun ends this one meanwhile.
        if not first_process() or isinstance(error, RuntimeError):
            time.sleep(ECHO)
        sys.stderr = sys.__stderr__
        print(f"process {distributed.get_rank()}: ", end="", file=sys.stderr)
        raise
    distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# A run


VALID_SENTENCES = 500


def choose_device(settings):
    """-> torch.device and dtype"""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def read_args(folder):
    """What args.json of a run holds: its settings, and of each file that it read a fingerprint."""
    path = folder / "args.json"
    shape = {setting.name: type(setting.default) for setting in fields(Settings)}
    del shape["resume"], shape["export"]
    shape["files"] = {str: str}
    record = read_json(path, shape)
    for name in record:
        if name not in shape:
            raise InputError(f"{path}: {name!r} is no setting of this version")
    return record


def check_run_folder(folder, settings):
    """InputError for a folder that holds another run, or this one without --resume."""
    if not (folder / "args.json").exists():
        for name in ("layers.json", "awareness.safetensors", "tuned.safetensors", "results.json"):
            if (folder / name).exists():
                raise InputError(f"{folder}: holds {name} of a run, but not its args.json")
        return
    if not settings.resume:
        remedy = "--resume goes on with it, --out names another folder"
        raise InputError(f"{folder}: holds a run already; {remedy}")
    now = asdict(settings)
    for name, value in read_args(folder).items():
        if name != "files" and now[name] != value:
            found = f"was run with {flag_of(name)} {value}, now {flag_of(name)} {now[name]}"
            raise InputError(f"{folder}: {found}; --resume needs the same")


def record_args(folder, settings, paths):
    """Write args.json; where it is there, InputError that names a file that has changed since."""
    files = {str(path): fingerprint(path) for path in paths}
    if (folder / "args.json").exists():
        before = read_args(folder)["files"]
        for path in sorted(before.keys() | files.keys()):
            if before.get(path) != files.get(path):
                found = f"{path} has changed since the run began"
                raise InputError(f"{folder}: {found}; --resume needs the same")
        return
    record = asdict(settings) | {"files": files}
    del record["resume"], record["export"]
    write_json(folder / "args.json", record)


def open_checkpoint(folder):
    """The Config and the tokenizer of a checkpoint. InputError where they do not fit together."""
    config, tokenizer = Config.from_folder(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        found = f"{tokenizer_file(folder)} has {tokenizer.vocab_size} tokens"
        raise InputError(f"{found}, config.json an embedding of {config.vocab_size}")
    return config, tokenizer


class Inputs(NamedTuple):
    """What a run reads, each by pair."""

    train: dict  # tuned pair -> Examples
    valid: dict  # tuned pair -> rendered examples, where there is such text
    scoring: dict  # tuned and other pairs -> rendered examples for the scores
    test: dict  # evaluated pair -> [(source, target), ...]
    files: dict  # path -> None, in the order of reading


class Examples(Sequence):
    """Training text, each example rendered when its step comes: None if it is over max_tokens.

    So millions of pairs take no time before the first step, on resuming neither.
    """

    def __init__(self, tokenizer, pair, text, max_tokens):
        self.tokenizer, self.pair, self.text, self.max_tokens = tokenizer, pair, text, max_tokens
        self.read = self.skipped = 0

    def __len__(self):
        return len(self.text)

    def __getitem__(self, i):
        prompt, target = render(self.tokenizer, self.pair, *self.text[i])
        self.read += 1
        if len(prompt) + len(target) <= self.max_tokens:
            return prompt, target
        self.skipped += 1


def read_text(settings, split, pair, files):
    text = open_parallel(settings.data, split, pair)
    files.update(dict.fromkeys(find_parallel(settings.data, split, pair)[0]))
    if not text:
        raise InputError(f"{settings.data}: the {split} text of {pair} is empty")
    return text


def render_examples(tokenizer, pair, text, settings, what):
    """Rendered examples that fit into max_tokens; the others are counted. InputError for none."""
    rendered = [render(tokenizer, pair, source, target) for source, target in text]
    lengths = [len(prompt) + len(target) for prompt, target in rendered]
    kept = [one for one, length in zip(rendered, lengths) if length <= settings.max_tokens]
    if not kept:
        found = f"all {len(rendered)} {what} examples of {pair}, the shortest with {min(lengths)}"
        limit = f"tokens, are longer than --max-tokens {settings.max_tokens}"
        raise InputError(f"{settings.data}: {found} {limit}")
    if skipped := len(rendered) - len(kept):
        found = f"skipped {skipped} of {len(rendered)} examples, over {settings.max_tokens} tokens"
        print(f"{what} {pair}: {found}", file=sys.stderr)
    return kept


def read_inputs(tokenizer, tuned, settings):
    """Read all text that a run needs, so that what is wrong with it shows before anything long."""
    inputs = Inputs({}, {}, {}, {}, {})
    for pair in tuned:
        text = read_text(settings, "train", pair, inputs.files)
        inputs.train[pair] = Examples(tokenizer, pair, text, settings.max_tokens)
    with_valid = list_pairs(settings.data, "valid")
    for pair in tuned:
        if pair in with_valid:
            own = read_text(settings, "valid", pair, inputs.files)[:VALID_SENTENCES]
            inputs.valid[pair] = render_examples(tokenizer, pair, own, settings, "validation")
    compared = choose_pairs(settings.score_pairs, settings.data, "train")
    for pair in tuned + [pair for pair in compared if pair not in tuned]:
        if pair in tuned:
            own = inputs.train[pair].text
        else:
            own = read_text(settings, "train", pair, inputs.files)
        size = min(settings.score_sentences, len(own))
        sample = random.Random(settings.seed).sample(own, size)
        inputs.scoring[pair] = render_examples(tokenizer, pair, sample, settings, "scoring")
    if len(inputs.scoring) < 2:
        raise InputError(f"{settings.data}: training text of one pair only; {NEEDS_TWO_PAIRS}")
    for pair in choose_pairs(settings.eval_pairs or settings.pair, settings.data, "test"):
        make_metrics(pair)  # which may lack its tokenizer
        own = read_text(settings, "test", pair, inputs.files)
        inputs.test[pair] = own[: settings.eval_sentences or None]
    return inputs


def check_scores(scores, what):
    """InputError for scores that are no numbers, or that say nothing: they would decide all."""
    if not scores.isfinite().all():
        raise InputError(f"{what}: not all numbers; are the weights?")
    if not scores.any():
        raise InputError(f"{what}: all zero")


def analyse_layers(model, tokenizer, scoring, tuned, settings, path):
    """Write layers.json: of each tuned pair the means, differences and selected layers.

    What a file that is there already says of the means is not computed again.
    -> pair -> selected layers
    """
    L = model.config.layers
    known = read_json(path, {str: {"means": [float]}}) if path.exists() else {}
    analysis = {}
    for pair in tuned:
        what = f"layer means of {pair}"
        if pair in known:
            means = torch.tensor(known[pair]["means"])
            what = f"{path}: {what}"
        else:
            prompts = [(prompt, []) for prompt, _ in scoring[pair]]
            batches = make_batches(prompts, tokenizer.pad_id, settings.micro_tokens)
            means = activation_means(model, counted(batches, f"layers for {pair}", len(prompts)))
        if means.shape != (L,):
            raise InputError(f"{what}: {len(means)} layers, the model has {L}")
        check_scores(means, what)
        differences = layer_differences(means)
        selected = select_layers(differences, settings.layers)
        analysis[pair] = {"selected": selected, "means": means.tolist()}
        analysis[pair]["differences"] = differences.tolist()
    write_json(path, analysis)
    return {pair: analysis[pair]["selected"] for pair in tuned}


def group_neurons(model, tokenizer, scoring, selected, settings, folder):
    """Write neurons.json, and awareness.safetensors as each pair's awareness is done.

    What a file that is there already says of awareness is not computed again. -> groups
    """
    path = folder / "awareness.safetensors"
    awareness = read_tensors(path) if path.exists() else {}
    layers = union(selected)
    for pair in scoring:
        if pair not in awareness:
            batches = make_batches(scoring[pair], tokenizer.pad_id, settings.micro_tokens)
            batches = counted(batches, f"scoring {pair}", len(scoring[pair]))
            awareness[pair] = neuron_awareness(model, batches, layers)
            write_tensors(path, awareness)
        shape, expected = awareness[pair].shape, (len(layers), model.config.ffn_size)
        if shape != expected or awareness[pair].dtype != torch.float32:
            raise InputError(f"{path}: {pair}: {list(shape)}, expected {list(expected)} in fp32")
        for layer, scores in zip(layers, awareness[pair]):
            check_scores(scores, f"{path}: awareness for {pair} in layer {layer}")
    stacked = torch.stack([awareness[pair] for pair in scoring])  # [P, K, F]
    owner = categorize(stacked, settings.epsilon)
    groups = describe_groups(stacked, owner, list(scoring), selected)
    write_json(folder / "neurons.json", groups)
    return groups


def read_groups(path, config):
    """neurons.json of a finished run. InputError where it cannot be of this model."""
    groups = read_json(path, {str: {"specific": {str: [int]}, "share": {str: (None, float)}}})
    for layer, group in groups.items():
        neurons = [i for own in group["specific"].values() for i in own]
        known_layer = layer.isdecimal() and int(layer) < config.layers
        if not known_layer or not set(neurons) <= set(range(config.ffn_size)):
            sizes = f"{config.layers} layers of {config.ffn_size} neurons"
            raise InputError(f"{path}: layer {layer}: does not fit a model of {sizes}")
        if len(set(neurons)) < len(neurons):
            raise InputError(f"{path}: layer {layer}: a neuron has two owners")
        for pair, share in group["share"].items():
            if pair not in group["specific"] or not (share is None or 0 < share < 1):
                raise InputError(f"{path}: layer {layer}: share of {pair} is {share}")
    return groups


def show_validation(log_path):
    """The validation losses before and after, from the first and the last line of the log."""
    lines = read_lines(log_path)
    if len(lines) < 2:
        raise InputError(f"{log_path}: has {len(lines)} lines, expected at least 2")
    shape = {"valid_loss": {str: float}}
    before, after = (parse_json(line, shape, log_path) for line in (lines[0], lines[-1]))
    before, after = before["valid_loss"], after["valid_loss"]
    if before.keys() != after.keys():
        raise InputError(f"{log_path}: its first and last line are not of the same pairs")
    if before:
        changes = [f"{pair} {before[pair]:.3f} to {after[pair]:.3f}" for pair in before]
        say(f"   loss of a validation token: {', '.join(changes)}")


def show_table(results, tuned):
    """Scores before and after, pair by pair, with the means of the tuned pairs and of the others."""
    say()
    print("pair          BLEU before   after  change   chrF before   after  change")

    def show(label, pairs, note=""):
        row = f"{label:<13}"
        for metric, width in (("bleu", 12), ("chrf", 14)):
            before = sum(results[pair]["before"][metric] for pair in pairs) / len(pairs)
            after = sum(results[pair]["after"][metric] for pair in pairs) / len(pairs)
            row += f"{before:{width}.2f}{after:8.2f}{after - before:+8.2f}"
        print(row + note)

    for pair in results:
        show(pair, [pair], note="  tuned" if pair in tuned else "")
    own = [pair for pair in results if pair in tuned]
    others = [pair for pair in results if pair not in tuned]
    if own:
        show("mean, tuned", own)
    if others:
        show("mean, others", others)
    for when in ("before", "after"):
        cut = sum(scores[when]["cut"] for scores in results.values())
        if cut:
            say(f"{cut} translations {when} tuning ran to their limit, as a loop does.")


def run(settings):
    """The whole method in a run folder of its own. -> what results.json holds"""
    if not settings.data:
        raise InputError("--data names no folder of parallel text")
    folder = Path(settings.out or f"runs/{settings.pair}")
    with locked(folder):
        return tune(settings, folder)


def tune(settings, folder):
    """The whole method; each step leaves a file in the run folder, a resumed run skips those done."""
    started = time.monotonic()
    check_run_folder(folder, settings)
    wait_for_all()  # what the first process writes from now on, all have looked for
    device, dtype = choose_device(settings)
    tuned = choose_pairs(settings.pair, settings.data, "train")
    config, tokenizer = open_checkpoint(settings.weights)
    check_layer_count(settings.layers, config.layers - 1)
    inputs = read_inputs(tokenizer, tuned, settings)
    model = load_model(settings.weights, device, dtype).requires_grad_(False)
    weights = Path(settings.weights)
    files = [*tokenizer_files(weights), *checkpoint_files(weights)]  # config.json is one of them
    files += weights.glob("model.safetensors.index.json")
    record_args(folder, settings, [*files, *inputs.files])
    size = sum(p.numel() for p in model.parameters())
    say(f"{settings.weights}: {config.family}, {config.layers} layers, {size:,} parameters")
    say(f"{dtype} on {device}")

    say()
    say("1. Layers: which change a prompt's representation most?")
    path = folder / "layers.json"
    selected = analyse_layers(model, tokenizer, inputs.scoring, tuned, settings, path)
    for pair in tuned:
        say(f"   {pair}: {', '.join(map(str, selected[pair]))} of 0 to {config.layers - 1}")

    say()
    say(f"2. Neurons: which does one of {len(inputs.scoring)} pairs need more than the others?")
    groups = group_neurons(model, tokenizer, inputs.scoring, selected, settings, folder)
    counts = dict.fromkeys(inputs.scoring, 0)
    for group in groups.values():
        for pair, neurons in group["specific"].items():
            counts[pair] += len(neurons)
    specific = sum(counts.values())
    own = ", ".join(f"{counts[pair]} of {pair}" for pair in tuned)
    say(f"   {len(groups) * config.ffn_size - specific} general, {specific} specific: {own}")

    say()
    say(f"3. Translating the test text of {len(inputs.test)} pairs, before tuning")
    results_path = folder / "results.json"  # of what was evaluated so far
    shape = {str: {str: {"bleu": float, "chrf": float, "cut": int}}}
    results = read_json(results_path, shape) if results_path.exists() else {}
    for pair, scores in results.items():
        if pair not in inputs.test or not scores.keys() <= {"before", "after"}:
            raise InputError(f"{results_path}: {pair}: {', '.join(scores)} is not of this run")

    def evaluate_all(when):
        for pair, text in inputs.test.items():
            scores = results.setdefault(pair, {})
            if when not in scores:
                path = folder / "hypotheses" / f"{pair}.{when}.txt"
                scores[when] = evaluate(model, tokenizer, pair, text, settings, path)
                write_json(results_path, results)

    for pair, text in inputs.test.items():
        for side, name in enumerate(("source", "reference")):
            lines = [sentences[side] for sentences in text]
            write_lines(folder / "hypotheses" / f"{pair}.{name}.txt", lines)
    evaluate_all("before")

    install_routing(model, groups, not settings.no_routing)
    learners = {pair: what_learns(model, pair) for pair in tuned}
    trained = sum(p.numel() for p in merged(learners).values())
    size = sum(p.numel() for p in model.parameters())
    routers = "" if settings.no_routing else " and routers"
    say()
    say("4. Training the general neurons and the pair's own" + routers)
    say(f"   {trained:,} of {size:,} parameters, {trained / size:.2%}")
    tuned_path = folder / "tuned.safetensors"
    if tuned_path.exists():
        load_parameters(tuned_path, read_tensors(tuned_path), merged(learners))
    else:
        train(model, tokenizer, learners, inputs.train, inputs.valid, settings, folder)
        for pair, own in inputs.train.items():
            if own.skipped:
                found = f"{own.skipped} of {own.read} examples, over {settings.max_tokens} tokens"
                print(f"training {pair}: skipped {found}", file=sys.stderr)
    (folder / "state.safetensors").unlink(missing_ok=True)
    show_validation(folder / "log.jsonl")

    say()
    say("5. Translating again")
    evaluate_all("after")
    show_table(results, tuned)
    say()
    say(f"It took {time.monotonic() - started:.0f} s; everything is in {folder}")
    return results


def finished_args(folder):
    """The args of a run. InputError where it is not finished."""
    tuned_path = folder / "tuned.safetensors"
    if not tuned_path.exists():
        raise InputError(f"{folder}: not the folder of a finished run, it has no {tuned_path.name}")
    return read_args(folder)


def load_tuned(folder, args, settings):
    """What a finished run made. -> Decoder, tokenizer, groups"""
    weights = settings.weights or args["weights"]
    device, dtype = choose_device(settings)
    config, tokenizer = open_checkpoint(weights)
    groups = read_groups(folder / "neurons.json", config)
    model = load_model(weights, device, dtype)
    install_routing(model, groups, not args["no_routing"])
    learners = {pair: what_learns(model, pair) for pair in tuned_pairs(groups)}
    tuned_path = folder / "tuned.safetensors"
    load_parameters(tuned_path, read_tensors(tuned_path), merged(learners))
    return model, tokenizer, groups


def tuned_pairs(groups):
    return set().union(*(group["share"] for group in groups.values()))


LINES_AT_A_TIME = 1000  # sorted by length; their translations come in order


def translate(settings):
    """Translate lines with a finished run, to stdout: one line out for each line in."""
    split_pair(settings.pair)
    folder = Path(settings.tuned)
    args = finished_args(folder)
    source = "/dev/stdin" if settings.translate == "-" else settings.translate
    sources = read_lines(Path(source))
    model, tokenizer, groups = load_tuned(folder, args, settings)
    if settings.pair not in tuned_pairs(groups):
        found = f"{settings.pair} was not tuned in {folder} ({args['pair']})"
        print(f"{found}: general neurons, no routing", file=sys.stderr)
    cut = 0
    for first in range(0, len(sources), LINES_AT_A_TIME):
        some, done, shown = sources[first : first + LINES_AT_A_TIME], {}, first
        label = f"translating from line {first + 1} of {len(sources)}"
        numbered = list(enumerate(some, first))
        lines = translate_lines(model, tokenizer, settings.pair, numbered, settings, label)
        for number, line, was_cut in lines:
            done[number] = line
            cut += was_cut
            while shown in done:
                print(done.pop(shown), flush=True)
                shown += 1
    if cut:
        print(f"{cut} of {len(sources)} ran to their limit, as a loop does", file=sys.stderr)


# What of a checkpoint folder goes with the weights: tokenizers and how to generate. No code.
COMPANIONS = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
]
COMPANIONS += ["special_tokens_map.json", "added_tokens.json"]


def export(settings):
    """Write a finished run as a published checkpoint: trained neurons back in their places.

    In the type that the run computes in (--dtype). InputError for a routed run.
    """
    folder = Path(settings.export)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty")
    run = Path(settings.tuned)
    args = finished_args(run)
    model, _, _ = load_tuned(run, args, settings)
    for layer, ffn in routed_layers(model).items():
        if ffn.share:
            expected = "no place in a published checkpoint; tune with --no-routing to export"
            raise InputError(f"{run}: its tokens are routed, which has {expected}")
        model.blocks[layer].ffn = ffn.whole()
    weights = Path(settings.weights or args["weights"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (weights / name).exists():
            shutil.copyfile(weights / name, folder / name)
    save_model(model, folder)
    say(f"{folder}: {model.config.family} in {model.embedding.weight.dtype}")


def main(argv=None):
    """The command line. -> exit status: 0 done, 2 bad input or arguments, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv

    def command():
        with torchrun():
            dispatch()

    def dispatch():
        given = parse_arguments(argv)
        settings = Settings(**given)
        torch.manual_seed(settings.seed)
        if process_count() > 1 and (settings.tuned or not settings.weights):
            raise InputError("torchrun is for tuning a checkpoint; run this one without")
        if settings.export:
            return export(settings)
        if settings.translate:
            return translate(settings)
        try:
            if settings.weights:
                run(settings)
            else:
                from study import demo

                demo.demo(given)
        except KeyboardInterrupt:
            several = ["torchrun", "--nproc-per-node", str(process_count())]
            launcher = several if process_count() > 1 else ["python"]
            words = [*launcher, "lander.py", *argv, *["--resume"] * (not settings.resume)]
            print(f"\nto go on: {shlex.join(words)}", file=sys.stderr)
            raise

    return exit_status(command)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's, like Ctrl-C
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(main())
