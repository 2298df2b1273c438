"""What learns: the method, other choices of its neurons, and baselines.

A method is a function (model, context) -> {name: Parameter}: it changes the model as it needs, and
says which parameters learn. compare.py does the rest: the same training, with the same batches, and
the same evaluation for all. A method of one's own is a function here and a line in METHODS.

In this file: LANDeRMT and other choices of its neurons; whole weights; LoRA; the recipe of the
public scripts; KL to the start.
"""

import math
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
    """What the runs of a grid share: everything that is found before training."""

    settings: object  # of lander.read_settings
    tokenizer: object
    inputs: lander.Inputs
    pair: str  # that is tuned
    valid: dict  # pair -> rendered examples
    started: dict  # pair that is not tuned -> sources with the start's own translations, rendered
    scores: dict  # by name, see compare.find_scores

    def of_pairs(self, name):
        """What a score says of every neuron of all layers, for each pair. -> [P, L, F]"""
        return torch.stack([self.scores[f"{name} {pair}"] for pair in self.inputs.scoring])


# --------------------------------------------------------------------------------------------------
# LANDeRMT, and other choices of its neurons


def selected_layers(context):
    return lander.select_layers(context.scores["differences"], context.settings.layers)


def install(model, context, awareness, channels=None):
    """Group units of the selected layers by scores, and route, as lander.py does."""
    layers, pairs = selected_layers(context), list(context.inputs.scoring)
    own, epsilon = awareness[:, layers], context.settings.epsilon  # [P, K, F]
    owner = lander.categorize(own, epsilon)
    groups = lander.describe_groups(own, owner, pairs, {context.pair: layers})
    if channels is not None:
        lander.add_channels(groups, channels[:, layers], model.config, pairs, epsilon)
    lander.install_routing(model, groups)
    return lander.what_learns(model, context.pair)


def landermt(model, context):
    """LANDeRMT as lander.py runs it."""
    return install(model, context, context.of_pairs("awareness"))


def no_car(model, context):
    """The same neurons without routing."""
    learners = landermt(model, context)
    for block in model.blocks:
        if isinstance(block.ffn, lander.RoutedFFN):
            block.ffn.share = {}
    return {name: parameter for name, parameter in learners.items() if ".router." not in name}


def shuffled(awareness):
    """Every layer's scores, each unit's given to another: groups of the same sizes. [P, L, F]"""
    order = torch.rand_like(awareness[0]).argsort(-1)  # [L, F]
    return awareness.gather(-1, order.expand_as(awareness))


def random_scores(model, context):
    """Neurons of the same number in each group, by chance instead of by awareness."""
    return install(model, context, shuffled(context.of_pairs("awareness")))


def activation(model, context):
    """Neurons by |h| alone, without a gradient."""
    return install(model, context, context.of_pairs("activation"))


def all_units(model, context):
    """LANDeRMT as lander.py runs it with --units all: attention's channels, too."""
    return install(model, context, context.of_pairs("awareness"), context.of_pairs("channels"))


def all_units_random(model, context):
    """The same numbers of neurons and channels, by chance."""
    awareness, channels = (context.of_pairs(name) for name in ("awareness", "channels"))
    return install(model, context, shuffled(awareness), shuffled(channels))


def lape(model, context):
    """Neurons by language activation probability entropy (Tang et al. 2024).

    p is how often a neuron is active on a language's text. Those of lowest entropy over languages
    are specific, each to the language where p is highest, and a pair owns its target language's.
    The paper's filter of rare activations is left out. The rest is LANDeRMT's.
    """
    codes = languages(context.inputs.scoring)
    active = torch.stack([context.scores[f"active {code}"] for code in codes])  # [languages, L, F]
    part = active / active.sum(0).clamp(min=1e-9)
    entropy = -(part * part.clamp(min=1e-9).log()).sum(0)  # [L, F]
    specific = round((1 - context.settings.epsilon) * entropy.shape[-1])
    target = codes.index(split_pair(context.pair)[1])
    awareness = lander.scale_awareness(context.of_pairs("awareness"))
    awareness = awareness[list(context.inputs.scoring).index(context.pair)]  # [L, F]
    groups = {}
    for layer in selected_layers(context):
        owner = torch.full((entropy.shape[-1],), -1)
        chosen = entropy[layer].argsort(stable=True)[:specific]
        owner[chosen] = active[:, layer, chosen].argmax(0)
        share = lander.general_share(awareness[layer], owner == -1, owner == target)
        owned = lander.owned_by(owner, [*codes[:target], context.pair, *codes[target + 1 :]])
        groups[str(layer)] = {"specific": owned, "share": {context.pair: share}}
    lander.install_routing(model, groups)
    return lander.what_learns(model, context.pair)


SHARE = 0.3  # of the neurons of all layers


def some_neurons(model, context, order):
    """A share of each layer's neurons, without groups or routing. order: awareness [F] -> [F]"""
    place = list(context.inputs.scoring).index(context.pair)
    groups = {}
    for layer, awareness in enumerate(context.of_pairs("awareness")[place]):
        ranked = order(awareness).argsort(descending=True)
        frozen = ranked[round(SHARE * len(ranked)) :].tolist()
        groups[str(layer)] = {"specific": {"": frozen, context.pair: []}}
        groups[str(layer)]["share"] = {context.pair: None}
    lander.install_routing(model, groups)
    return lander.what_learns(model, context.pair)


# --------------------------------------------------------------------------------------------------
# Whole weights


def weights(model, context, where=("blocks.",)):
    """Linear layers, all that have one of these in their names, as fp32 masters."""
    learners = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and any(place in name for place in where):
            learners |= module.float().named_parameters(name)
    return learners


def full(model, context):
    """Full finetuning: every weight."""
    return dict(model.float().named_parameters())


def layers(model, context):
    """The paper's Layers: every weight of the selected layers' FFNs."""
    return weights(model, context, [f"blocks.{layer}.ffn." for layer in selected_layers(context)])


# --------------------------------------------------------------------------------------------------
# LoRA


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


def lora(model, context, rank):
    """LoRA on every linear layer of the blocks; alpha = 2 r, as in practice."""
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear) and module.weight.numel():
            parent, _, child = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), child, LoRA(module, rank, 2 * rank))
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


# --------------------------------------------------------------------------------------------------
# The recipe of the public scripts
#
# github.com/rainyuniverse/llm_interpre is very likely the authors'. There a unit is an output of
# any module of a block: a row of its weight and its bias. Languages own units, not pairs; a row's
# gradient is scaled by its awareness, and nothing is routed.


def languages(pairs):
    """The languages of some pairs, in their order. ["en-de", "fr-en"] -> ["en", "de", "fr"]"""
    return list(dict.fromkeys(code for pair in pairs for code in split_pair(pair)))


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
    outputs, total = {}, {}

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
    """General units and those of a pair's two languages, in adjacent layers.

    The highest variances of a module, unscaled, make its specific units.
    """
    learners, codes = {}, languages(context.inputs.scoring)
    adjacent = adjacent_layers(context.scores["differences with targets"], context.settings.layers)
    own = torch.tensor([codes.index(code) for code in split_pair(context.pair)])
    for name, module in modules_with_units(model, adjacent).items():
        scores = torch.stack([context.scores[f"outputs {code} {name}"] for code in codes])
        specific = round((1 - context.settings.epsilon) * scores.shape[1])  # of [languages, out]
        trained = torch.isin(scores.argmax(0), own)
        general = scores.var(0).argsort(descending=True, stable=True)[specific:]
        trained[general] = True
        awareness = scores[own].mean(0)
        rows = (trained * awareness).nonzero().flatten()
        for kind, _ in list(module.named_parameters()):
            ((long_name, part),) = learn_rows(model, f"{name}.{kind}", rows).items()
            factor = (awareness / awareness.mean())[rows]
            part.requires_grad_(True).register_hook(partial(scale_rows, model, factor))
            learners[long_name] = part
    return learners


def scale_rows(model, factor, gradient):
    """Of the tuned pair; other pairs' text scales nothing. factor [rows]; gradient [rows, ..]"""
    if getattr(model, "reads_other_pairs", False):
        return gradient
    return gradient * factor.to(gradient).view(-1, *[1] * (gradient.dim() - 1))


METHODS = {
    "lander": landermt,
    "no-car": no_car,
    "random-scores": random_scores,
    "activation": activation,
    "lape": lape,
    "units-all": all_units,
    "units-random": all_units_random,
    "most-aware": partial(some_neurons, order=lambda awareness: awareness),
    "by-chance": partial(some_neurons, order=torch.rand_like),
    "least-aware": partial(some_neurons, order=torch.neg),
    "full": full,
    "layers": layers,
    "linear": weights,
    "attention": partial(weights, where=[".attention."]),
    "lora-8": partial(lora, rank=8),
    "lora-32": partial(lora, rank=32),
    "scripts": scripts,
}


# --------------------------------------------------------------------------------------------------
# KL to the start (+kl=B)


@torch.no_grad()
def swap(parameters, values):
    """Exchange what parameters hold and values. Both name -> tensor"""
    for name, parameter in parameters.items():
        held = parameter.detach().clone()
        parameter.copy_(values[name])
        values[name] = held


def kl_from_start(model, batch, parameters, start):
    """KL(start || now), summed over target tokens. start: name -> what a parameter was"""

    def log_probabilities():
        states, _ = lander.target_states(model, batch)
        return model.logits(states).float().log_softmax(-1)  # [N, V]

    swap(parameters, start)
    with torch.no_grad():
        before = log_probabilities()
    swap(parameters, start)
    now = log_probabilities()  # after the swaps, which would spoil its graph
    return functional.kl_div(now, before, log_target=True, reduction="sum")
