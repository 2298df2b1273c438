"""LANDeRMT: find the neurons of a large language model that matter for translation, and train only those.

"Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine Translation"
(Zhu, Pan, Li, Xiong, ACL 2024, arXiv 2409.19523)

    python lander.py --pair en-de --weights bloom-7b1/ --data wmt16/      # the whole method on a published checkpoint
    python lander.py --pair en-de --tuned runs/en-de --translate FILE     # translate with a finished run
    python lander.py                                                      # a demo that builds all it needs, offline

    paper       what                                                             here
    3.1         A[l], mean output of block l over tokens and D                   activation_means
    3.1         diff[l] = |A[l+1] - A[l]| scores layer l+1; take the best k      layer_differences, select_layers
    3.2         awareness of neuron i: mean over tokens of |h_i * dL/dh_i|       neuron_awareness
    3.2         variance over pairs splits general from specific neurons         categorize
    3.3, eq. 7  FFN_G((1-CAR)/(1-share) x) + FFN_S(CAR/share x) + FFN_rest(x)    RoutedFFN
    -           only G, S and w_p of the batch's pair learn                      route, train_step
    -           BLEU and chrF before and after, for other pairs too              evaluate

Where this differs from the paper, and why (README.md says more):
  - Scores of a pair are scaled to mean 1 before variances are taken: otherwise the pair with the largest loss owns all.
  - CAR is our reading: a learned w_p per layer and pair starts at zero, and the factors are divided by what they are
    then, so that training starts at exactly the pretrained function. A pair without own neurons is not routed.
  - Neurons that other pairs own stay active and frozen: without them the FFN would be another function.
  - Warm-up and linear decay, weight decay 0.01, gradients clipped to norm 1: the paper is silent.

Letters: B sentences, T tokens, D hidden size, F neurons of one feed-forward layer, V vocabulary, L layers, P pairs,
K selected layers.

In this file, in the order of the method: settings; layers; neurons; groups; routing; training; evaluation; a run; the
demo.
"""

import argparse
import json
import math
import random
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, count, islice, permutations, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF
from torch import nn

from data import LANGUAGES, TOY_LANGUAGES, list_pairs, load_tokenizer, make_batches, prompt_text, read_lines
from data import read_parallel, render, split_pair, toy_meanings, toy_text, train_bpe
from model import Config, Decoder, InputError, activation, exit_status, load_model, open_safetensors, read_json
from model import save_model, write_json, write_tensors, write_text


# ---------------------------------------------------------------------------------------------------------------------
# Settings and progress


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Every setting with its default: the command line is made from it, and args.json records it."""

    pair: str = option("", "pair to tune, source first: en-de; several alternate: en-de,fr-cs")
    weights: str = option("", "folder of a BLOOM or Baichuan checkpoint; none: run the demo")
    data: str = option("", "folder of parallel text: train.*, valid.* (if there), test.*")
    out: str = option("", "run folder; none: runs/PAIRS")
    layers: int = option(4, "how many layers to select, K")
    epsilon: float = option(0.9, "share of a layer's neurons that are language-general")
    lr: float = option(5e-5, "peak learning rate of AdamW")
    steps: int = option(0, "training steps; 0: one epoch")
    batch: int = option(80, "sentences in a training step")
    max_tokens: int = option(256, "longer examples, prompt and target, are skipped and counted")
    micro_tokens: int = option(2048, "tokens in one pass through the model; a step takes as many passes as it needs")
    checkpointing: bool = option(False, "recompute activations in the backward pass: slower, less memory")
    score_pairs: str = option("all", "pairs whose neurons are compared: all, or a list")
    score_sentences: int = option(500, "training sentences of each pair for layer and neuron scores")
    eval_pairs: str = option("", "pairs to evaluate before and after: all, or a list; none: the tuned ones")
    eval_sentences: int = option(0, "test sentences of each pair; 0: all")
    beams: int = option(1, "beam search with so many beams; 1: greedy")
    device: str = option("", "cpu, cuda, cuda:1, ...; none: cuda where there is one")
    dtype: str = option(
        "", "of frozen weights and activations: float32 (none: on the cpu) or bfloat16 (none: elsewhere)"
    )
    seed: int = option(0, "of shuffling and sampling")
    no_routing: bool = option(False, "train the same neurons without CAR")
    resume: bool = option(False, "go on with an interrupted run")
    translate: str = option("", "translate the lines of a file, or of - (standard input), with --tuned")
    tuned: str = option("", "folder of a finished run, for --translate")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; -h lists the options")


def parse_settings(argv):
    """Command-line words -> Settings. InputError where a value makes no sense."""
    parser = Parser(prog="lander.py", description=__doc__.split("\n\n")[0])
    for setting in fields(Settings):
        name, kind = "--" + setting.name.replace("_", "-"), type(setting.default)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=setting.metadata["help"])
        else:
            shown = f" (default: {setting.default})" if setting.default != "" else ""
            text = setting.metadata["help"] + shown
            parser.add_argument(name, type=kind, default=setting.default, metavar=kind.__name__.upper(), help=text)
    settings = Settings(**vars(parser.parse_args(argv)))
    at_least = dict(
        layers=1, batch=1, max_tokens=1, micro_tokens=1, score_sentences=1, beams=1, steps=0, eval_sentences=0
    )
    for name, lowest in at_least.items():
        if getattr(settings, name) < lowest:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(settings, name)}, expected {lowest} or more")
    if not 0 <= settings.epsilon <= 1:
        raise InputError(f"--epsilon is {settings.epsilon}, expected a share from 0 to 1")
    if not 0 < settings.lr < math.inf:
        raise InputError(f"--lr is {settings.lr}, expected a positive number")
    if settings.dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype is {settings.dtype!r}, expected float32 or bfloat16")
    return settings


class Progress:
    """Rate and time left of a long step, on stderr: one updating line on a terminal, else a plain line now and then."""

    def __init__(self, label, total, unit, done=0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.start = self.shown = time.monotonic()

    def add(self, count, note=""):
        self.done += count
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self.shown < (0.2 if terminal else 30) and not (terminal and self.done >= self.total):
            return
        self.shown = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {left:.0f} s left{note}"
        end = "" if terminal and self.done < self.total else "\n"
        print(f"\r{line:<79}" if terminal else line, end=end, file=sys.stderr, flush=True)


def say(text=""):
    print(text, flush=True)


def write_lines(path, lines):
    write_text(path, "".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------------------
# Layers: representation analysis (paper 3.1)


def to_device(batch, model):
    device = model.embedding.weight.device
    return (tensor.to(device, non_blocking=True) for tensor in batch)


@torch.no_grad()
def activation_means(model, batches):
    """A[l]: the mean output of block l over a prompt's tokens and over D, then over prompts. -> [L], fp32

    batches: Batch of prompts (without targets); padding does not count.
    """
    outputs, total, prompts = [], 0.0, 0

    def record(block, inputs, output):
        outputs.append(output.float().mean(-1))  # [B, T]

    handles = [block.register_forward_hook(record) for block in model.blocks]
    try:
        for batch in batches:
            ids, mask, _ = to_device(batch, model)
            outputs.clear()
            model.hidden_states(ids, mask)
            means = (torch.stack(outputs) * mask).sum(-1) / mask.sum(-1)  # [L, B]
            total, prompts = total + means.double().sum(1), prompts + len(ids)
    finally:
        for handle in handles:
            handle.remove()
    return (total / prompts).float().cpu()


def layer_differences(means):
    """diff[l] = |A[l+1] - A[l]|, the change that layer l+1 makes. [L] -> [L-1]

    [1, 4, 3] -> [3, 1]
    """
    return (means[1:] - means[:-1]).abs()


def check_layer_count(k, scored):
    if k > scored:
        raise InputError(f"{k} layers to select, but only {scored} have a score (the first has none)")


def select_layers(differences, k):
    """The k layers with the largest scores, sorted; diff[l] scores layer l+1, and ties go to the lower layer.

    [3, 1, 3], 1 -> [1]
    """
    differences = torch.as_tensor(differences).tolist()
    check_layer_count(k, len(differences))
    ranked = sorted(range(len(differences)), key=lambda l: (-differences[l], l))
    return sorted(l + 1 for l in ranked[:k])


# ---------------------------------------------------------------------------------------------------------------------
# Neurons: awareness by Taylor expansion (paper 3.2)


def target_loss(model, batch):
    """The sum of the target tokens' negative log-likelihoods, fp32. Logits exist at target positions only."""
    ids, mask, targets = to_device(batch, model)
    wanted = targets != -100
    logits = model.logits(model.hidden_states(ids, mask)[wanted])
    return F.cross_entropy(logits.float(), targets[wanted], reduction="sum")


def neuron_awareness(model, batches, layers):
    """How much each neuron matters: the mean over tokens of |h_i * dL/dh_i|. -> [len(layers), F], fp32

    L is the sum over target tokens, so that a sentence's scores do not depend on its batch. One forward and backward
    pass a batch scores all layers; only the sums are kept.
    """
    activations, total, tokens = [], 0.0, 0

    def watch(down, inputs):
        (h,) = inputs  # [B, T, F]
        # With every weight frozen there is no graph through the lowest layer's h: it starts here.
        activations.append(h if h.requires_grad else h.detach().requires_grad_())
        return (activations[-1],)

    handles = [model.blocks[layer].ffn.down.register_forward_pre_hook(watch) for layer in layers]
    try:
        for batch in batches:
            activations.clear()
            loss = target_loss(model, batch)
            real = batch.mask.to(loss.device)
            effects = [
                (h.detach()[real].float() * gradient[real].float()).abs().sum(0)  # [F]
                for h, gradient in zip(activations, torch.autograd.grad(loss, activations))
            ]
            total, tokens = total + torch.stack(effects), tokens + int(real.sum())
    finally:
        for handle in handles:
            handle.remove()
    order = torch.tensor(layers).argsort().argsort()  # the hooks ran from the lowest layer up
    return (total / tokens).cpu()[order]


# ---------------------------------------------------------------------------------------------------------------------
# Groups: language-general and language-specific neurons (paper 3.2)


def scale_awareness(awareness):
    """Each pair's scores in a layer, scaled to mean 1. [P, K, F] -> [P, K, F]

    Without it the pair with the largest loss would own every neuron.
    """
    return awareness / awareness.mean(-1, keepdim=True)


ONE_PAIR = "training text of one pair only; comparing neurons takes that of two or more (train.*, --score-pairs)"


def categorize(awareness, epsilon):
    """Who owns each neuron. [P, K, F] -> [K, F] long: -1 general, else the index of the owning pair

    The round((1 - epsilon) * F) neurons of a layer whose scaled awareness varies most over pairs are specific, each to
    the pair with the highest. InputError for one pair: there is nothing to vary over.
    """
    if len(awareness) < 2:
        raise InputError(ONE_PAIR)
    scaled = scale_awareness(awareness)
    specific = round((1 - epsilon) * awareness.shape[-1])
    ranked = scaled.var(0, unbiased=False).argsort(dim=-1, descending=True, stable=True)[:, :specific]
    owner = torch.full(awareness.shape[1:], -1)
    return owner.scatter(1, ranked, scaled.argmax(0).gather(1, ranked))


def union(selected):
    """The layers that any pair selected. {"en-de": [1, 7], "fr-cs": [1, 2]} -> [1, 2, 7]"""
    return sorted({layer for layers in selected.values() for layer in layers})


def describe_groups(awareness, owner, pairs, selected):
    """What neurons.json holds, all that RoutedFFN is made from. pairs: names of the P rows; selected: pair -> layers

    {"5": {"specific": {"en-de": [3, 8], ...}, "share": {"en-de": 0.6}}, ...}: neurons listed nowhere are general, and
    `share` has the pairs that tune the layer: m_S / (m_G + m_S) of their mean scaled awareness over S and over G, or
    null where a group is empty or scores nothing, so that there is nothing to route between.
    """
    scaled = scale_awareness(awareness)
    groups = {}
    for k, layer in enumerate(union(selected)):
        general = owner[k] == -1
        specific = {pair: owner[k] == p for p, pair in enumerate(pairs)}
        share = {}
        for pair in (pair for pair in selected if layer in selected[pair]):
            score = scaled[pairs.index(pair), k].double()
            m_general, m_specific = (score[group].mean().item() for group in (general, specific[pair]))  # nan if empty
            value = m_specific / (m_general + m_specific) if m_general + m_specific > 0 else math.nan
            share[pair] = value if 0 < value < 1 else None
        listed = {pair: group.nonzero().flatten().tolist() for pair, group in specific.items()}
        groups[str(layer)] = {"specific": listed, "share": share}
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Routing (paper 3.3)


class Neurons(nn.Module):
    """Some neurons of an FFN as an FFN of their own, without the output bias: [B, T, D] -> [B, T, D]

    A neuron is a row of up (and of gate) with its bias, and a column of down; this is the only list of its weights.
    """

    def __init__(self, ffn, index, dtype):
        super().__init__()

        def take(weight, dim):
            return None if weight is None else nn.Parameter(weight.detach().index_select(dim, index).to(dtype), False)

        self.up, self.up_bias = take(ffn.up.weight, 0), take(ffn.up.bias, 0)
        self.gate = None if ffn.gate is None else take(ffn.gate.weight, 0)
        self.down = take(ffn.down.weight, 1)

    def forward(self, x):
        def linear(weight, bias=None):  # fp32 masters are cast to the activations' type, as autocast would
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        h = activation(linear(self.up, self.up_bias), None if self.gate is None else linear(self.gate))
        return F.linear(h, self.down.to(x.dtype))


class RoutedFFN(nn.Module):
    """An FFN regrouped into general, specific and other neurons, with conditional awareness-based routing (eq. 7).

    h = FFN_G((1 - CAR) / (1 - share) * x) + FFN_S(CAR / share * x) + FFN_rest(x) + b_down
    CAR(x) = sigmoid(w_p . x + logit(share)), one for each token; w_p starts at zero, both factors at 1.

    specific: pair -> its neurons; share: pair -> share or None, for the pairs that tune this layer. Trained groups are
    fp32, the rest keeps the checkpoint's type. `pair` is the pair of the current batch; any other pair than those in
    share gets the same function without routing. A factor scales W x and not the bias, since it scales x.
    """

    def __init__(self, ffn, specific, share, routing=True):
        super().__init__()
        neurons, width = ffn.up.weight.shape
        device = ffn.up.weight.device
        tuned = {pair: torch.tensor(specific[pair], dtype=torch.long, device=device) for pair in share}
        others = [i for pair in specific if pair not in share for i in specific[pair]]
        rest = torch.zeros(neurons, dtype=torch.bool, device=device)
        rest[others] = True
        general = ~rest
        general[torch.cat([*tuned.values()])] = False
        self.general = Neurons(ffn, general.nonzero().flatten(), torch.float32)
        self.specific = nn.ModuleDict({pair: Neurons(ffn, index, torch.float32) for pair, index in tuned.items()})
        self.rest = Neurons(ffn, rest.nonzero().flatten(), ffn.up.weight.dtype)
        self.down_bias = ffn.down.bias
        self.share = {pair: value for pair, value in share.items() if routing and value is not None}
        self.router = nn.ParameterDict(
            {pair: nn.Parameter(torch.zeros(width, device=device), requires_grad=False) for pair in self.share}
        )
        self.pair = None

    def groups_of(self, pair):
        """The parts that learn from a pair: the general neurons, its own, its router."""
        return [self.general, *(own[pair] for own in (self.specific, self.router) if pair in own)]

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        x_general = x_specific = x
        if self.pair in self.share:
            share = self.share[self.pair]
            car = torch.sigmoid(x.float() @ self.router[self.pair] + math.log(share / (1 - share)))[..., None]
            x_general = ((1 - car) / (1 - share)).to(x.dtype) * x
            x_specific = (car / share).to(x.dtype) * x
        out = self.rest(x) + self.general(x_general)
        for pair, neurons in self.specific.items():
            out = out + neurons(x_specific if pair == self.pair else x)
        return out if self.down_bias is None else out + self.down_bias


def routed_layers(model):
    """layer number -> RoutedFFN"""
    return {l: block.ffn for l, block in enumerate(model.blocks) if isinstance(block.ffn, RoutedFFN)}


def install_routing(model, groups, routing=True):
    """Freeze the model and put a RoutedFFN in each selected layer; `groups` as from describe_groups."""
    model.requires_grad_(False)
    for layer, group in groups.items():
        block = model.blocks[int(layer)]
        block.ffn = RoutedFFN(block.ffn, group["specific"], group["share"], routing)


def route(model, pair):
    """Make the model that of one pair: its routing, and gradients for exactly the weights that learn from it."""
    model.requires_grad_(False)
    for ffn in routed_layers(model).values():
        ffn.pair = pair
        if pair in ffn.specific:
            for part in ffn.groups_of(pair):
                part.requires_grad_(True)


def trained_parameters(model):
    """name -> Parameter of everything that some pair trains."""
    return {
        name: parameter
        for layer, ffn in routed_layers(model).items()
        for name, parameter in ffn.named_parameters(prefix=f"blocks.{layer}.ffn")
        if ".rest." not in name and not name.endswith("down_bias")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


WEIGHT_DECAY = 0.01
WARM_UP = 0.05  # of all steps
CLIP_NORM = 1.0
SAVE_EVERY = 30  # seconds at least, and twenty times what the last save took
VALID_SENTENCES = 500


def schedule(examples, batch, seed):
    """Steps without end, (pair, examples of the step): each epoch shuffles every pair's text, and pairs alternate.

    examples: pair -> list. Once the shorter text is through, the rest of an epoch is the longer one's.
    """
    rng = random.Random(seed)
    while True:
        epoch = []
        for pair, own in examples.items():
            order = rng.sample(range(len(own)), len(own))
            epoch.append([(pair, [own[i] for i in order[s : s + batch]]) for s in range(0, len(own), batch)])
        for turn in zip_longest(*epoch):
            yield from (step for step in turn if step)


def learning_rate(step, total, peak):
    """Linear warm-up over the first steps, then linear decay to zero. 0 <= step < total

    step 0 of 100, peak 1 -> 0.2; step 4 -> 1.0; step 99 -> 1/95
    """
    warm = max(1, round(WARM_UP * total))
    return peak * min((step + 1) / warm, (total - step) / max(1, total - warm))


def count_targets(batches):
    return sum(int((batch.targets != -100).sum()) for batch in batches)


@torch.no_grad()
def validation_loss(model, tokenizer, examples, settings):
    """pair -> mean negative log-likelihood of a target token."""
    losses = {}
    for pair, own in examples.items():
        route(model, pair)
        batches = list(make_batches(own, tokenizer.pad_id, settings.micro_tokens))
        losses[pair] = sum(target_loss(model, batch).item() for batch in batches) / count_targets(batches)
    return losses


def train_step(model, batches, optimizer, parameters):
    """One update from the micro-batches of one pair (after route). -> loss of a target token, norm of the gradient

    The loss is the sum over all their target tokens divided by their number, not a mean of means. Frozen parameters
    have no gradient, so the optimizer passes them over: a gradient of zero would still decay and move them.
    """
    tokens, total = count_targets(batches), 0.0
    for batch in batches:
        loss = target_loss(model, batch) / tokens
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def save_state(path, parameters, optimizer, step):
    """Weights, AdamW's moments and the number of steps done, in one file, so that they always belong together."""
    tensors = {"step": torch.tensor(step)} | {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    write_tensors(path, tensors)


def read_tensors(path):
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}


def load_parameters(path, tensors, parameters):
    """Copy tensors into parameters of the same names. InputError where names or shapes differ."""
    wrong = [name for name, p in parameters.items() if name not in tensors or tensors[name].shape != p.shape]
    wrong += [name for name in tensors if name not in parameters]
    if wrong:
        raise InputError(f"{path}: does not fit this model and neurons.json, at {', '.join(wrong)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_state(path, parameters, optimizer):
    """Undo save_state. -> steps done"""
    tensors = read_tensors(path)
    step = int(tensors.pop("step"))
    for name in [name for name in tensors if "/" in name]:
        owner, key = name.split("/")
        optimizer.state[parameters[owner]][key] = tensors.pop(name).to(parameters[owner].device)
    load_parameters(path, tensors, parameters)
    return step


def train(model, tokenizer, examples, valid, settings, folder):
    """Train the routed neurons and write tuned.safetensors. examples, valid: pair -> list of rendered examples

    log.jsonl gets a line a step; state.safetensors holds the last good state until the training is done. InputError
    where the loss is no longer a number.
    """
    log_path, state_path = folder / "log.jsonl", folder / "state.safetensors"
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=WEIGHT_DECAY, fused=True)
    total = settings.steps or sum(math.ceil(len(own) / settings.batch) for own in examples.values())
    start = load_state(state_path, parameters, optimizer) if state_path.exists() else 0
    kept = read_lines(log_path)[: start + 1] if start else []  # the first line is the validation loss
    write_lines(log_path, kept)

    with open(log_path, "a", encoding="utf-8") as log:

        def write(**entry):
            print(json.dumps(entry), file=log, flush=True)

        if not start:
            write(step=0, valid_loss=validation_loss(model, tokenizer, valid, settings))
        progress = Progress("training", total, "steps", done=start)
        saved, wait = time.monotonic(), SAVE_EVERY
        model.checkpointing = settings.checkpointing
        steps = islice(schedule(examples, settings.batch, settings.seed), start, total)
        for step, (pair, chosen) in enumerate(steps, start + 1):
            route(model, pair)
            rate = learning_rate(step - 1, total, settings.lr)
            optimizer.param_groups[0]["lr"] = rate
            batches = list(make_batches(chosen, tokenizer.pad_id, settings.micro_tokens))
            loss, norm = train_step(model, batches, optimizer, parameters.values())
            if not math.isfinite(loss) or not math.isfinite(norm):
                left = f"the last good state is {state_path}" if state_path.exists() else "no state was saved yet"
                raise InputError(f"step {step}: the loss is {loss} and its gradient {norm}; {left}; try a lower --lr")
            write(step=step, pair=pair, loss=loss, gradient_norm=norm, learning_rate=rate)
            progress.add(1, f", loss {loss:.3f}")
            if time.monotonic() - saved > wait or step == total:
                saved = time.monotonic()
                save_state(state_path, parameters, optimizer, step)
                wait = max(SAVE_EVERY, 20 * (time.monotonic() - saved))
        model.checkpointing = False
        write(step=total, valid_loss=validation_loss(model, tokenizer, valid, settings))
    write_tensors(folder / "tuned.safetensors", {name: parameter.detach() for name, parameter in parameters.items()})
    state_path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def translate_lines(model, tokenizer, pair, sources, settings, label):
    """Translate sentences, one line each, in order; an empty line stays empty."""
    route(model, pair)
    hypotheses = [""] * len(sources)
    prompts = {i: render(tokenizer, pair, source) for i, source in enumerate(sources) if source.strip()}
    order = sorted(prompts, key=lambda i: -len(prompts[i][0]))  # as make_batches sorts
    progress, done = Progress(label, len(order), "sentences"), 0
    for batch in make_batches([prompts[i] for i in order], tokenizer.pad_id, settings.micro_tokens // settings.beams):
        ids, mask, _ = to_device(batch, model)
        # A translation of twice the prompt's length, which holds the source and more, is a loop.
        limit = min(settings.max_tokens, 2 * ids.shape[1])
        for new in model.generate(ids, mask, limit, tokenizer.eos_id, settings.beams, tokenizer.vocab_size):
            text = tokenizer.decode(new).strip()
            hypotheses[order[done]] = " ".join(text.split("\n")[0].split())
            done += 1
        progress.add(len(ids))
    return hypotheses


def make_metrics(pair):
    """sacreBLEU's metrics; BLEU's tokenizer follows the target language (zh, ja-mecab, ko-mecab, else 13a)."""
    try:
        return {"bleu": BLEU(trg_lang=split_pair(pair)[1]), "chrf": CHRF()}
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{pair}: no BLEU tokenizer ({str(error).splitlines()[0]})") from None


def evaluate(model, tokenizer, pair, text, settings, path):
    """Translate the test text (unless path holds the hypotheses already) and score it. -> {"bleu": ..., ...}"""
    if path.exists():
        hypotheses = read_lines(path)
    else:
        sources = [source for source, _ in text]
        hypotheses = translate_lines(model, tokenizer, pair, sources, settings, f"translating {pair}")
        write_lines(path, hypotheses)
    scores = {}
    for name, metric in make_metrics(pair).items():
        scores[name] = metric.corpus_score(hypotheses, [[target for _, target in text]]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# A run


def choose_device(settings):
    """-> torch.device and dtype"""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device, getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def choose_pairs(choice, folder, split):
    """ "all" -> every pair of a split; else the listed ones, checked."""
    pairs = list_pairs(folder, split) if choice == "all" else choice.split(",")
    for i, pair in enumerate(pairs):
        split_pair(pair)
        if pair in pairs[:i]:
            raise InputError(f"pair {pair!r} is listed twice")
    return pairs


def render_examples(tokenizer, pair, text, settings, what):
    """Rendered examples that fit into max_tokens; the others are counted. InputError where none is left."""
    rendered = [render(tokenizer, pair, source, target) for source, target in text]
    kept = [example for example in rendered if sum(map(len, example)) <= settings.max_tokens]
    if not kept:
        shortest = min(sum(map(len, example)) for example in rendered)
        found = f"all {len(rendered)} {what} examples of {pair}, the shortest with {shortest} tokens,"
        raise InputError(f"{settings.data}: {found} are longer than --max-tokens {settings.max_tokens}")
    if skipped := len(rendered) - len(kept):
        found = f"skipped {skipped} of {len(rendered)} examples, over {settings.max_tokens} tokens"
        print(f"{what} {pair}: {found}", file=sys.stderr)
    return kept


def once(path, compute):
    """The JSON object in a file of the run folder; computed and written where it is not there yet."""
    if not path.exists():
        write_json(path, compute())
    return read_json(path)


def check_run_folder(folder, settings):
    """The settings to record in a run folder. InputError where it holds another run, or this one without --resume."""
    record = {name: value for name, value in asdict(settings).items() if name != "resume"}
    if (folder / "args.json").exists():
        if not settings.resume:
            raise InputError(f"{folder}: holds a run already; --resume goes on with it, --out names another folder")
        for name, value in read_json(folder / "args.json").items():
            if record.get(name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{folder}: was run with {flag} {value}, now {flag} {record.get(name)}; --resume needs the same"
                )
    return record


class Inputs(NamedTuple):
    """What a run reads, each by pair."""

    train: dict  # tuned pair -> rendered examples
    valid: dict  # tuned pair -> rendered examples, where there is such text
    scoring: dict  # tuned and other pairs -> rendered examples for the scores
    test: dict  # evaluated pair -> [(source, target), ...]


def read_inputs(tokenizer, tuned, settings):
    """Read all text that a run needs, so that whatever is wrong with it shows before anything long begins."""

    def read(split, pair):
        text = read_parallel(settings.data, split, pair)
        if not text:
            raise InputError(f"{settings.data}: the {split} text of {pair} is empty")
        return text

    text = {pair: read("train", pair) for pair in tuned}
    others = [pair for pair in choose_pairs(settings.score_pairs, settings.data, "train") if pair not in tuned]
    scoring = {
        pair: random.Random(settings.seed).sample(own, min(settings.score_sentences, len(own)))
        for pair, own in (text | {pair: read("train", pair) for pair in others}).items()
    }
    if len(scoring) < 2:
        raise InputError(f"{settings.data}: {ONE_PAIR}")
    test = {
        pair: read("test", pair)[: settings.eval_sentences or None]
        for pair in choose_pairs(settings.eval_pairs or settings.pair, settings.data, "test")
    }
    for pair in test:
        make_metrics(pair)
    with_valid = list_pairs(settings.data, "valid")
    valid = {pair: read("valid", pair)[:VALID_SENTENCES] for pair in tuned if pair in with_valid}
    rendered = (
        {pair: render_examples(tokenizer, pair, own, settings, what) for pair, own in texts.items()}
        for what, texts in {"training": text, "validation": valid, "scoring": scoring}.items()
    )
    return Inputs(*rendered, test)


def counted(batches, label, sentences):
    """The same batches, with progress."""
    progress = Progress(label, sentences, "sentences")
    for batch in batches:
        yield batch
        progress.add(len(batch.ids))


def analyse_layers(model, tokenizer, scoring, tuned, settings):
    """What layers.json holds: for each tuned pair the means, their differences and the selected layers."""
    analysis = {}
    for pair in tuned:
        prompts = [(prompt, []) for prompt, _ in scoring[pair]]
        batches = make_batches(prompts, tokenizer.pad_id, settings.micro_tokens)
        means = activation_means(model, counted(batches, f"layers for {pair}", len(prompts)))
        differences = layer_differences(means)
        selected = select_layers(differences, settings.layers)
        analysis[pair] = {"selected": selected, "means": means.tolist(), "differences": differences.tolist()}
    return analysis


def group_neurons(model, tokenizer, scoring, selected, settings, folder):
    """What neurons.json holds. Each pair's awareness is saved when it is done."""
    path = folder / "awareness.safetensors"
    awareness = read_tensors(path) if path.exists() else {}
    layers = union(selected)
    for pair in scoring:
        if pair not in awareness:
            batches = make_batches(scoring[pair], tokenizer.pad_id, settings.micro_tokens)
            awareness[pair] = neuron_awareness(model, counted(batches, f"scoring {pair}", len(scoring[pair])), layers)
            write_tensors(path, awareness)
    stacked = torch.stack([awareness[pair] for pair in scoring])  # [P, K, F]
    return describe_groups(stacked, categorize(stacked, settings.epsilon), list(scoring), selected)


def print_table(results, tuned):
    say(f"\n{'pair':<8}{'BLEU before':>12}{'after':>8}{'change':>8}{'chrF before':>14}{'after':>8}{'change':>8}")
    for pair, scores in results.items():
        row = f"{pair:<8}"
        for name, width in (("bleu", 12), ("chrf", 14)):
            before, after = scores["before"][name], scores["after"][name]
            row += f"{before:{width}.2f}{after:8.2f}{after - before:+8.2f}"
        say(row + "  tuned" * (pair in tuned))


def run(settings):
    """The whole method, step by step; each step leaves a file in the run folder, and a resumed run skips those done."""
    start = time.monotonic()
    if not settings.data:
        raise InputError("--data names no folder of parallel text")
    folder = Path(settings.out or f"runs/{settings.pair}")
    record = check_run_folder(folder, settings)
    device, dtype = choose_device(settings)
    tuned = choose_pairs(settings.pair, settings.data, "train")
    tokenizer = load_tokenizer(settings.weights)
    inputs = read_inputs(tokenizer, tuned, settings)
    model = load_model(settings.weights, device, dtype).requires_grad_(False)
    config = model.config
    check_layer_count(settings.layers, config.layers - 1)
    write_json(folder / "args.json", record)
    size = sum(p.numel() for p in model.parameters())
    say(f"{settings.weights}: {config.family}, {config.layers} layers, {size:,} parameters, {dtype} on {device}")

    say("\n1. Layers: whose output, over a prompt's tokens, changes most from the layer before?")
    layers_path, neurons_path = folder / "layers.json", folder / "neurons.json"
    analysis = once(layers_path, lambda: analyse_layers(model, tokenizer, inputs.scoring, tuned, settings))
    selected = {pair: analysis[pair]["selected"] for pair in tuned}
    for pair in tuned:
        say(f"   {pair}: layers {', '.join(map(str, selected[pair]))} of 0 to {config.layers - 1}")

    say(f"\n2. Neurons: which matter for one of {len(inputs.scoring)} pairs more than for the others?")
    groups = once(neurons_path, lambda: group_neurons(model, tokenizer, inputs.scoring, selected, settings, folder))
    counts = {pair: sum(len(group["specific"][pair]) for group in groups.values()) for pair in inputs.scoring}
    specific = sum(counts.values())
    general = len(groups) * config.ffn_size - specific
    own = ", ".join(f"{counts[pair]} of {pair}" for pair in tuned)
    say(f"   {general} general, {specific} specific: {own}")

    results = {pair: {} for pair in inputs.test}

    def evaluate_all(when):
        for pair, text in inputs.test.items():
            path = folder / "hypotheses" / f"{pair}.{when}.txt"
            results[pair][when] = scores = evaluate(model, tokenizer, pair, text, settings, path)
            say(f"   {pair}: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}")

    say("\n3. Before tuning:")
    evaluate_all("before")

    install_routing(model, groups, not settings.no_routing)
    parameters = trained_parameters(model)
    trained, size = sum(p.numel() for p in parameters.values()), sum(p.numel() for p in model.parameters())
    routers = "" if settings.no_routing else " and their routers"
    say(f"\n4. Training the general and own neurons{routers}: {trained:,} of {size:,} parameters")
    tuned_path = folder / "tuned.safetensors"
    if tuned_path.exists():
        load_parameters(tuned_path, read_tensors(tuned_path), parameters)
    else:
        train(model, tokenizer, inputs.train, inputs.valid, settings, folder)

    say("\n5. After tuning:")
    evaluate_all("after")
    write_json(folder / "results.json", results)

    print_table(results, tuned)
    say("\nlayers  " + "; ".join(f"{pair} {', '.join(map(str, selected[pair]))}" for pair in tuned))
    say(f"neurons {general} general, {own}, {specific - sum(counts[pair] for pair in tuned)} of other pairs")
    say(f"trained {trained:,} of {size:,} parameters, {trained / size:.2%}")
    say(f"took    {time.monotonic() - start:.0f} s; everything is in {folder}")


def translate(settings):
    """Translate lines with a finished run, to stdout: one line out for each line in."""
    if not settings.tuned:
        raise InputError("--translate needs --tuned, the folder of a finished run")
    split_pair(settings.pair)
    folder = Path(settings.tuned)
    if not (folder / "tuned.safetensors").exists():
        raise InputError(f"{folder}: not the folder of a finished run, it has no tuned.safetensors")
    args = Settings(**read_json(folder / "args.json"))
    sources = read_lines(Path("/dev/stdin" if settings.translate == "-" else settings.translate))
    weights = settings.weights or args.weights
    device, dtype = choose_device(settings)
    tokenizer, model = load_tokenizer(weights), load_model(weights, device, dtype)
    install_routing(model, read_json(folder / "neurons.json"), not args.no_routing)
    load_parameters(folder / "tuned.safetensors", read_tensors(folder / "tuned.safetensors"), trained_parameters(model))
    if not any(settings.pair in ffn.specific for ffn in routed_layers(model).values()):
        print(f"{settings.pair} was not tuned in {folder} ({args.pair}): general neurons, no routing", file=sys.stderr)
    for line in translate_lines(model, tokenizer, settings.pair, sources, settings, "translating"):
        say(line)


# ---------------------------------------------------------------------------------------------------------------------
# The demo


# Meanings, all different: those that the toy checkpoint is pretrained on, then those of the splits.
PRETRAINING_SENTENCES, SPLIT_SENTENCES = 3000, dict(train=3000, valid=100, test=100)
PIDGIN = 0.7  # of the pretraining text leaves number and tense unsaid; over a half, so that greedy search does, too
DEMO_MODEL = dict(model_type="bloom", n_embed=64, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=3)
DEMO_SETTINGS = dict(pair="qaa-qab", layers=2, lr=3e-3, batch=20, eval_pairs="all", score_sentences=200)
PRETRAINING_STEPS, PRETRAINING_RATE, PRETRAINING_TOKENS = 1500, 3e-3, 1024


def pretrain(folder, text):
    """Train a tiny BLOOM from scratch to translate in every direction of multi-way text; write it like a published one.

    text: language code -> sentences, line by line translations of each other.
    """
    pairs = [f"{source}-{target}" for source, target in permutations(text, 2)]
    rows = [(pair, *row) for pair in pairs for row in zip(*(text[code] for code in split_pair(pair)))]
    random.Random(0).shuffle(rows)  # make_batches keeps this order among equal lengths: directions are mixed
    lines = (prompt_text(pair, source) for pair, source, _ in rows)
    write_json(folder / "tokenizer.json", train_bpe(lines, vocab_size=512))
    tokenizer = load_tokenizer(folder)
    examples = [render(tokenizer, *row) for row in rows]

    model = Decoder(Config.from_json(DEMO_MODEL | {"vocab_size": tokenizer.vocab_size}))
    for parameter in model.blocks.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)  # 0.02 is for hidden sizes in the thousands, and learns slowly here
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    epochs = (make_batches(examples, tokenizer.pad_id, PRETRAINING_TOKENS, seed) for seed in count())
    progress = Progress("pretraining", PRETRAINING_STEPS, "steps")
    for step, batch in enumerate(islice(chain.from_iterable(epochs), PRETRAINING_STEPS)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, PRETRAINING_STEPS, PRETRAINING_RATE)
        loss, _ = train_step(model, [batch], optimizer, model.parameters())
        progress.add(1, f", loss {loss:.3f}")
    save_model(model, folder)


def demo(settings):
    """Build toy languages and a weak toy checkpoint, then run the method on them like on any other."""
    folder = Path(settings.out or "runs/demo")
    defaults = asdict(Settings())
    given = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    if "data" in given:
        raise InputError("--data needs --weights; the demo makes its own text")
    paths = dict(weights=str(folder / "weights"), data=str(folder / "data"), out=str(folder / "run"))
    chosen = Settings(**(DEMO_SETTINGS | given | paths))
    for pair in chosen.pair.split(","):
        if not set(split_pair(pair)) <= set(TOY_LANGUAGES):
            raise InputError(f"the demo knows {', '.join(TOY_LANGUAGES)}, not {pair}, which takes --weights and --data")
    if not settings.out and not settings.resume:
        shutil.rmtree(folder / "run", ignore_errors=True)  # the last demo's
    check_run_folder(folder / "run", chosen)
    if not (settings.resume and (folder / "weights" / "model.safetensors").exists()):
        say("No --weights, so this is the demo. It makes up four languages out of one grammar:")
        meanings = toy_meanings(PRETRAINING_SENTENCES + sum(SPLIT_SENTENCES.values()), seed=0)
        for code, (sentence, *_) in toy_text(meanings[:1]).items():
            say(f"  {code} {LANGUAGES[code]}: {sentence}")
        first = PRETRAINING_SENTENCES
        for split, size in SPLIT_SENTENCES.items():
            for code, sentences in toy_text(meanings[first : first + size]).items():
                write_lines(folder / "data" / f"{split}.{code}", sentences)
            first += size
        say("pretrains a tiny BLOOM to translate in all twelve directions, from text that mostly leaves endings out,")
        pretrain(folder / "weights", toy_text(meanings[:PRETRAINING_SENTENCES], PIDGIN))
        say(f"writes it to {folder / 'weights'}, and tunes it for {chosen.pair} on text with all endings.\n")
    run(chosen)


def main(argv=None):
    """The command line. -> exit status: 0 done, 2 bad input or arguments, 130 interrupted"""
    argv = sys.argv[1:] if argv is None else argv

    def command():
        settings = parse_settings(argv)
        torch.manual_seed(settings.seed)
        try:
            (translate if settings.translate else run if settings.weights else demo)(settings)
        except KeyboardInterrupt:
            if not settings.translate:
                words = ["python", "lander.py", *argv, *["--resume"] * (not settings.resume)]
                print(f"\nto go on: {shlex.join(words)}", file=sys.stderr)
            raise

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
