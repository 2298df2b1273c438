"""What learns: the method, the method without each of its parts, its rivals, and its variants.

A method is a function (model, context) -> learners: it changes the model as it needs, and says which
parameters learn from which pair, {"en-de": {name: Parameter}}. A keeper goes with any method: it
holds what learns near its start. compare.py does the rest: the same training, with the same batches,
and the same evaluation for all.

In this file: LANDeRMT and its parts; whole weights; LoRA and adapters; the public scripts' recipe;
keepers.
"""

import math
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

import lander
from data import make_batch, split_pair
from model import Linear


class Context(NamedTuple):
    """What the cells of a grid share."""

    settings: lander.Settings
    tokenizer: object
    inputs: lander.Inputs
    tuned: list  # pairs
    differences: dict  # pair -> [L-1], by representation analysis
    awareness: torch.Tensor  # [P, L, F] of the neurons of all layers
    channels: torch.Tensor  # [P, L, H * d] of what attention's output reads
    adjacent: list = ()  # the layers that the public scripts' recipe trains
    languages: dict = {}  # language -> name of a module -> [out], how much each output matters
    valid: dict = {}  # pair -> rendered examples, of the same sentences in every pair
    plain: dict = {}  # language -> ids of those sentences
    start_text: dict = {}  # split -> pair -> rendered sources with the start's own translations


# --------------------------------------------------------------------------------------------------
# LANDeRMT, and without each of its parts


def select(context, k=None):
    """pair -> the k layers that representation analysis selects; k: as --layers says"""
    k = k or context.settings.layers
    return {pair: lander.select_layers(context.differences[pair], k) for pair in context.tuned}


def install(model, context, selected, awareness=None, epsilon=None, routing=True, channels=None):
    """Group units of some layers, and route, as lander.py does; say what learns. -> learners"""
    awareness = context.awareness if awareness is None else awareness
    epsilon = context.settings.epsilon if epsilon is None else epsilon
    layers, pairs = lander.union(selected), list(context.inputs.scoring)
    own = awareness[:, layers]  # [P, K, F]
    owner = lander.categorize(own, epsilon)
    groups = lander.describe_groups(own, owner, pairs, selected)
    if channels is not None:
        lander.add_channels(groups, channels[:, layers], model.config, pairs, epsilon)
    lander.install_routing(model, groups, routing)
    return {pair: lander.what_learns(model, pair) for pair in context.tuned}


def landermt(model, context, k=None, epsilon=None):
    """LANDeRMT as lander.py runs it."""
    return install(model, context, select(context, k), epsilon=epsilon)


def no_car(model, context, part=""):
    """The same neurons without routing, or those of one part: the paper's LANDeRMT-LS is specific."""
    learners = {}
    for pair, own in install(model, context, select(context), routing=False).items():
        learners[pair] = {name: parameter for name, parameter in own.items() if part in name}
    return learners


def random_layers(model, context):
    """As many layers as representation analysis selects, any but the first."""
    selected = {}
    for pair in context.tuned:
        order = torch.randperm(model.config.layers - 1) + 1
        selected[pair] = sorted(order[: context.settings.layers].tolist())
    return install(model, context, selected)


def shuffled(awareness):
    """Every layer's scores, each unit's given to another one: groups of the same sizes. [P, L, F]"""
    order = torch.rand_like(awareness[0]).argsort(-1)  # [L, F]
    return awareness.gather(-1, order.expand_as(awareness))


def random_scores(model, context):
    """Neurons of the same number in each group, by chance instead of by awareness."""
    return install(model, context, select(context), shuffled(context.awareness))


def all_units(model, context):
    """LANDeRMT as lander.py runs it with --units all: attention's channels, too."""
    return install(model, context, select(context), channels=context.channels)


def all_units_random(model, context):
    """The same numbers of neurons and channels, by chance."""
    awareness, channels = shuffled(context.awareness), shuffled(context.channels)
    return install(model, context, select(context), awareness, channels=channels)


# --------------------------------------------------------------------------------------------------
# Whole weights


def weights(model, context, where=("blocks.",)):
    """Train linear layers, all that have one of these in their names, as fp32 masters."""
    own = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and any(place in name for place in where):
            own |= module.float().named_parameters(name)
    return dict.fromkeys(context.tuned, own)


def full(model, context):
    """Full finetuning: every weight."""
    own = dict(model.float().named_parameters())
    return dict.fromkeys(context.tuned, own)


def layers(model, context):
    """The paper's Layers: every weight of the selected layers' FFNs."""
    learners = {}
    for pair, selected in select(context).items():
        where = [f"blocks.{layer}.ffn." for layer in selected]
        learners[pair] = weights(model, context, where)[pair]
    return learners


# --------------------------------------------------------------------------------------------------
# LoRA and adapters


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x  (Hu et al. 2022; loralib/layers.py, peft's tuners/lora).

    A [r, in] is uniform within 1 / sqrt(in), B [out, r] zero, so that the start is the base model.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        limit = 1 / math.sqrt(linear.in_features)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.uniform_(self.lora_a, -limit, limit)

    def forward(self, x):
        low = functional.linear(x, self.lora_a.to(x.dtype))  # [.., r]
        return self.linear(x) + functional.linear(low, self.lora_b.to(x.dtype)) * self.scale


def add_lora(model, rank=8, where=""):
    """Put a LoRA around the linear layers of the blocks that have `where` in their names.

    alpha = 2 r, as in practice.
    """
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear) and where in name and module.weight.numel():
            parent, _, child = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), child, LoRA(module, rank, 2 * rank))


class Adapter(nn.Module):
    """x + W_up relu(W_down norm(x)), after each FFN's residual sum (Bapna & Firat 2019).

    W_up starts at zero, so that the start is the base model.
    """

    def __init__(self, hidden_size, size, device):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, device=device)
        self.down = nn.Linear(hidden_size, size, device=device)
        self.up = nn.Linear(size, hidden_size, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        return x + self.up(torch.relu(self.down(self.norm(x.float())))).to(x.dtype)


ADAPTER_SIZE = 64


def add_adapters(model):
    def adapt(block, inputs, output):
        return block.adapter(output)

    for block in model.blocks:
        device = block.ffn.up.weight.device
        block.adapter = Adapter(model.config.hidden_size, ADAPTER_SIZE, device)
        block.register_forward_hook(adapt)


def added(model, context):
    """Everything that was added to the checkpoint's own parameters learns, with every pair."""
    own = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".adapter." in name:
            own[name] = parameter
    return dict.fromkeys(context.tuned, own)


def lora_all(model, context, rank=8):
    add_lora(model, rank)
    return added(model, context)


def adapters(model, context):
    add_adapters(model)
    return added(model, context)


def adapter_lora(model, context):
    """Both at once. The paper does not say what its Adapter-LoRA is: this is our reading."""
    add_lora(model, where=".attention.")
    return adapters(model, context)


# --------------------------------------------------------------------------------------------------
# The recipe of the public scripts
#
# github.com/rainyuniverse/llm_interpre is very likely the authors'. There a unit is an output of any
# module of a block: a row of its weight and its bias. Languages own units, not pairs; a row's
# gradient is scaled by its awareness, and nothing is routed.


class Selected(nn.Module):
    """Some rows of a weight learn, as fp32 masters; no others."""

    def __init__(self, start, index):
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("index", index.to(start.device))

    def forward(self, part):
        return self.start.index_copy(0, self.index, part.to(self.start.dtype))

    def right_inverse(self, weight):
        # As a sequence: a parametrization of one tensor may not be of another type.
        return [weight.index_select(0, self.index).float()]


def learn_rows(model, name, index):
    """Train those rows of the parameter `name`. -> {its name from now on: Parameter}"""
    place, _, kind = name.rpartition(".")
    module = model.get_submodule(place)
    start = getattr(module, kind)
    part = Selected(start, index)
    parametrize.register_parametrization(module, kind, part, unsafe=True)  # the part is in fp32
    whole = getattr(module.parametrizations, kind)
    return {f"{place}.parametrizations.{kind}.original0": whole.original0}


def adjacent_layers(differences, k):
    """k layers in pairs: each largest |A[l+1] - A[l]| selects both its layers.

    [1, 5, 4, 2], 4 -> [1, 2, 3, 4]: the second largest shares layer 2 with the largest
    """
    chosen = []
    for lower in torch.as_tensor(differences).argsort(descending=True, stable=True).tolist():
        if len(chosen) < k and not {lower, lower + 1} & set(chosen):
            chosen += [lower, lower + 1]
    return sorted(chosen)


def modules_with_units(model, layers):
    """name -> module of all that has outputs to score, norms included."""
    modules = {}
    for layer in layers:
        modules |= model.blocks[layer].named_modules(prefix=f"blocks.{layer}")
    return {name: m for name, m in modules.items() if getattr(m, "weight", None) is not None}


def output_awareness(model, sentences):
    """How much each output of each module matters to a language: |output * dloss/doutput|.

    The loss is a sentence's mean over its tokens, each predicted from those before it; the score is
    the mean over tokens, then the sum over sentences. sentences: lists of ids -> name -> [out]
    """
    outputs = {}
    total = {}

    def record(name, module, inputs, output):
        outputs[name] = output.requires_grad_()

    modules = modules_with_units(model, range(model.config.layers))
    handles = [m.register_forward_hook(partial(record, name)) for name, m in modules.items()]
    for ids in sentences:
        batch = make_batch([(ids[:1], ids[1:])], 0)
        loss = lander.target_loss(model, batch) / (len(ids) - 1)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for (name, output), gradient in zip(outputs.items(), gradients):
            effect = (output.detach() * gradient).abs().float().mean((0, 1))  # [out]
            total[name] = total.get(name, 0) + effect.cpu()
    for handle in handles:
        handle.remove()
    return total


def scripts(model, context):
    """General units and those of a pair's two languages, in layers that all pairs share.

    The highest variances of a module, unscaled, make its specific units. Several pairs are mixed in
    each step, so that what a pair may move is a matter of its own part of the gradient: the hook
    asks for model.pair, which the training sets.
    """
    codes = list(context.languages)
    own = {}
    for name, module in modules_with_units(model, context.adjacent).items():
        scores = torch.stack([context.languages[code][name] for code in codes])  # [languages, out]
        specific = round((1 - context.settings.epsilon) * scores.shape[1])
        owner = scores.argmax(0)
        general = torch.ones_like(owner, dtype=torch.bool)
        general[scores.var(0).argsort(descending=True, stable=True)[:specific]] = False
        factors = {}  # of the rows' gradients
        for pair in context.tuned:
            languages = [codes.index(code) for code in split_pair(pair)]
            awareness = scores[languages].mean(0)
            trained = general | torch.isin(owner, torch.tensor(languages))
            factors[pair] = trained * awareness / awareness.mean()
        rows = sum(factors.values()).nonzero().flatten()
        for kind, _ in list(module.named_parameters()):
            ((long_name, part),) = learn_rows(model, f"{name}.{kind}", rows).items()
            own_factors = {pair: factor[rows] for pair, factor in factors.items()}
            part.requires_grad_(True).register_hook(partial(scale_rows, model, own_factors))
            own[long_name] = part
    return dict.fromkeys(context.tuned, own)


def scale_rows(model, factors, gradient):
    """As the pair of the batch says; other pairs' text, a keeper's, scales nothing.

    factors: tuned pair -> [rows]; gradient: [rows, ..]
    """
    if model.pair not in factors:
        return gradient
    factor = factors[model.pair].to(gradient)
    return gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


def route(model, pair):
    """What comes next is text of that pair; None: of one that is not tuned."""
    lander.route(model, pair)
    model.pair = pair


PARTS = {
    "lander": landermt,
    "no-car": no_car,
    "specific-only": partial(no_car, part=".specific."),
    "general-only": partial(no_car, part=".general."),
    "random-layers": random_layers,
    "random-scores": random_scores,
    "units-all": all_units,
    "units-random": all_units_random,
}
RIVALS = {
    "full": full,
    "layers": layers,
    "linear": weights,
    "ffn": partial(weights, where=[".ffn."]),
    "attention": partial(weights, where=[".attention."]),
    "lora-all": lora_all,
    "lora-32": partial(lora_all, rank=32),
    "adapters": adapters,
    "adapter-lora": adapter_lora,
    "scripts": scripts,
}
SWEEPS = {
    **{f"k={k}": partial(landermt, k=k) for k in (1, 2, 3, 4, 5, 7)},
    **{f"epsilon={e}": partial(landermt, epsilon=e) for e in (0.5, 0.75, 0.8, 0.85, 0.95, 1.0)},
}
METHODS = PARTS | RIVALS | SWEEPS


# --------------------------------------------------------------------------------------------------
# Keepers: what holds any method near its start


def pulls(model, parameters, radius):
    """name -> L, AdamW's decay to the start: no weight moves farther than 1 / L.

    1 / L = radius * rms(W), of each tensor's start, so that a radius means the same on every model.
    LoRA's B starts at zero: there radius * rms(W) bounds (alpha / r) B A, A as it started. Nothing
    pulls other tensors of zeros, routers above all: other pairs are not routed.
    """
    rms = lambda tensor: tensor.detach().float().square().mean().sqrt().item()
    strengths = {}
    for name, parameter in parameters.items():
        size = rms(parameter)
        if name.endswith(".lora_b"):
            lora = model.get_submodule(name.removesuffix(".lora_b"))
            rank = len(lora.lora_a)
            size = rms(lora.linear.weight) / (lora.scale * math.sqrt(rank) * rms(lora.lora_a))
        strengths[name] = 1 / (radius * size) if size else 0.0
    return strengths


def fisher(model, parameters, examples):
    """name -> the square of the gradient of each sentence's loss, summed, over its mean.

    examples: of other pairs, [(prompt ids, target ids), ...]
    """
    model.requires_grad_(False)
    squares = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        squares[name] = torch.zeros_like(parameter)
    route(model, None)
    for example in examples:
        lander.target_loss(model, make_batch([example], 0)).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:  # a router learns from its own pair alone
                squares[name] += parameter.grad.square()
                parameter.grad = None
    mean = torch.cat([square.flatten() for square in squares.values()]).mean()
    return {name: square / mean for name, square in squares.items()}


@torch.no_grad()
def pull_to_start(parameters, start, strengths, rate):
    """A step of decay: strength * rate of the way back. strengths: name -> number or tensor"""
    for name, parameter in parameters.items():
        part = torch.as_tensor(rate * strengths[name], dtype=parameter.dtype).clamp(max=1)
        parameter.lerp_(start[name], part.to(parameter.device))


@contextmanager
def at_start(parameters, start):
    """While open, the model is what it was before training."""
    now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    lander.load_parameters("", start, parameters)
    try:
        yield
    finally:
        lander.load_parameters("", now, parameters)


def log_probabilities(model, batch):
    """Of the next token, at each target token. -> [N, V]"""
    hidden, _ = lander.target_states(model, batch)
    return model.logits(hidden).float().log_softmax(-1)


def kl_from_start(model, batch, parameters, start):
    """KL(p0 || p), summed over target tokens; p0 is what the model said before training."""
    with at_start(parameters, start), torch.no_grad():
        before = log_probabilities(model, batch)
    now = log_probabilities(model, batch)
    return functional.kl_div(now, before, log_target=True, reduction="sum")
