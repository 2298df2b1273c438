"""What learns: the method, the method without each of its parts, its rivals, and its variants.

A method is a function (model, context) -> learners: it changes the model as it needs, and says which
parameters learn from which pair, {"en-de": {name: Parameter}}. compare.py does the rest: the same
training, with the same batches, and the same evaluation for all.

In this file: LANDeRMT and its parts; some neurons of all layers; whole weights; LoRA and adapters;
variants of the method; cheap rivals of any method.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

import lander
from data import split_pair
from model import Linear


class Context(NamedTuple):
    """What the cells of a grid share."""

    settings: lander.Settings
    tokenizer: object
    inputs: lander.Inputs
    tuned: list  # pairs
    differences: dict  # pair -> [L-1], by representation analysis
    awareness: torch.Tensor  # [P, L, F] of the neurons of all layers
    channels: torch.Tensor  # [P, L, D] of the channels of attention


# --------------------------------------------------------------------------------------------------
# LANDeRMT, and without each of its parts


def select(context, k=None):
    """pair -> the k layers that representation analysis selects; k: as --layers says"""
    k = k or context.settings.layers
    return {pair: lander.select_layers(context.differences[pair], k) for pair in context.tuned}


def group(context, selected, awareness, epsilon=None):
    """Groups as in lander.py, of some layers."""
    own = awareness[:, lander.union(selected)]  # [P, K, F]
    owner = lander.categorize(own, context.settings.epsilon if epsilon is None else epsilon)
    return lander.describe_groups(own, owner, list(context.inputs.scoring), selected)


def install(model, context, groups, routing=True):
    """Route, and say what learns. -> learners"""
    lander.install_routing(model, groups, routing)
    return {pair: lander.what_learns(model, pair) for pair in context.tuned}


def landermt(model, context, k=None, epsilon=None):
    """LANDeRMT as lander.py runs it."""
    return install(model, context, group(context, select(context, k), context.awareness, epsilon))


def no_car(model, context):
    """The same neurons, without routing."""
    groups = group(context, select(context), context.awareness)
    return install(model, context, groups, routing=False)


def keep(learners, word):
    """What has `word` in its name."""
    kept = {}
    for pair, own in learners.items():
        kept[pair] = {name: parameter for name, parameter in own.items() if word in name}
    return kept


def specific_only(model, context):
    """The pair's own neurons alone: the paper's LANDeRMT-LS."""
    return keep(no_car(model, context), ".specific.")


def general_only(model, context):
    """The general neurons alone."""
    return keep(no_car(model, context), ".general.")


def random_layers(model, context):
    """As many layers as representation analysis selects, any but the first."""
    selected = {}
    for pair in context.tuned:
        order = torch.randperm(model.config.layers - 1) + 1
        selected[pair] = sorted(order[: context.settings.layers].tolist())
    return install(model, context, group(context, selected, context.awareness))


def random_scores(model, context):
    """Neurons of the same number in each group, by chance instead of by awareness."""
    scores = torch.rand_like(context.awareness)
    return install(model, context, group(context, select(context), scores))


# --------------------------------------------------------------------------------------------------
# Some neurons of all layers, of equal number


PART_OF_NEURONS = 0.3


def best_neurons(model, context, scores):
    """Train the PART_OF_NEURONS of all FFN neurons that score highest. scores: pair -> [L, F]"""
    (pair,) = context.tuned
    ranked = scores[pair].flatten().argsort(descending=True)  # [L * F]
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked[: round(PART_OF_NEURONS * len(ranked))]] = True
    groups = {}
    for layer, own in enumerate(chosen.view_as(scores[pair])):
        others = (~own).nonzero().flatten().tolist()
        specific = {pair: own.nonzero().flatten().tolist(), "others": others}
        groups[str(layer)] = {"specific": specific, "share": {pair: None}}
    return keep(install(model, context, groups), ".specific.")


def own_awareness(context):
    """pair -> [L, F]: each pair's scores, scaled to mean 1 in each layer."""
    scaled = lander.scale_awareness(context.awareness)
    return dict(zip(context.inputs.scoring, scaled))


def neurons_random(model, context):
    scores = {pair: torch.rand_like(context.awareness[0]) for pair in context.tuned}
    return best_neurons(model, context, scores)


def neurons_aware(model, context):
    """By awareness for the pair."""
    return best_neurons(model, context, own_awareness(context))


def neurons_relative(model, context):
    """By awareness for the pair over the mean of the other pairs'."""
    scores = own_awareness(context)
    relative = {}
    for pair in context.tuned:
        others = torch.stack([scores[other] for other in scores if other != pair]).mean(0)
        relative[pair] = scores[pair] / others
    return best_neurons(model, context, relative)


def neurons_least(model, context):
    """The least aware."""
    scores = own_awareness(context)
    return best_neurons(model, context, {pair: -scores[pair] for pair in context.tuned})


# --------------------------------------------------------------------------------------------------
# Whole weights


def weights(model, context, wanted):
    """Train the linear layers whose names satisfy `wanted`, as fp32 masters, with every pair."""
    own = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and wanted(name):
            own |= module.float().named_parameters(name)
    return dict.fromkeys(context.tuned, own)


def full(model, context):
    """Full finetuning: every weight."""
    own = dict(model.float().named_parameters())
    return dict.fromkeys(context.tuned, own)


def layers(model, context):
    """The paper's Layers: every FFN weight of the layers that representation analysis selects."""
    learners = {}
    for pair, selected in select(context).items():
        places = tuple(f"blocks.{layer}.ffn." for layer in selected)
        learners |= {pair: weights(model, context, lambda name: name.startswith(places))[pair]}
    return learners


def all_ffn(model, context):
    return weights(model, context, lambda name: ".ffn." in name)


def all_attention(model, context):
    return weights(model, context, lambda name: ".attention." in name)


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


LORA_RANK, LORA_ALPHA = 8, 16  # alpha = 2 r, as in practice


def add_lora(model, wanted):
    """Put a LoRA around the linear layers of the blocks whose names satisfy `wanted`."""
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear) and wanted(name) and module.weight.numel():
            parent, _, child = name.rpartition(".")
            module.zero_rows = module.zero_columns = 0  # A has exactly as many columns
            setattr(model.blocks.get_submodule(parent), child, LoRA(module, LORA_RANK, LORA_ALPHA))


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


def lora_attention(model, context):
    add_lora(model, lambda name: ".attention." in name)
    return added(model, context)


def lora_all(model, context):
    add_lora(model, lambda name: True)
    return added(model, context)


def adapters(model, context):
    add_adapters(model)
    return added(model, context)


def adapter_lora(model, context):
    """Both at once. The paper does not say what its Adapter-LoRA is: this is our reading."""
    add_lora(model, lambda name: ".attention." in name)
    add_adapters(model)
    return added(model, context)


# --------------------------------------------------------------------------------------------------
# Variants of the method: other owners, low rank, and attention


def own_groups(context, general, own):
    """Groups of one tuned pair. general, own: [K, F] bool of its K layers; all others are frozen."""
    (pair,) = context.tuned
    selected = select(context)
    pairs = list(context.inputs.scoring)
    scaled = lander.scale_awareness(context.awareness[:, selected[pair]])[pairs.index(pair)]
    groups = {}
    for k, layer in enumerate(selected[pair]):
        others = (~general[k] & ~own[k]).nonzero().flatten().tolist()
        specific = {pair: own[k].nonzero().flatten().tolist(), "others": others}
        share = lander.general_share(scaled[k].double(), general[k], own[k])
        groups[str(layer)] = {"specific": specific, "share": {pair: share}}
    return groups


def split_by_language(context, awareness, sides, epsilon=None):
    """General units, and those that the tuned pair's languages own: two of [K, F] bool.

    A language scores what its pairs score on average: those that have it on one of the `sides`, 0
    for sources and 1 for targets. awareness: [P, K, F]
    """
    (pair,) = context.tuned
    pairs = [split_pair(name) for name in context.inputs.scoring]
    codes = sorted({names[side] for names in pairs for side in sides})
    scaled, scores = lander.scale_awareness(awareness), []
    for code in codes:
        has_code = [any(names[side] == code for side in sides) for names in pairs]
        scores.append(scaled[torch.tensor(has_code)].mean(0))
    epsilon = context.settings.epsilon if epsilon is None else epsilon
    owner = lander.categorize(torch.stack(scores), epsilon)
    own = torch.zeros_like(owner, dtype=torch.bool)
    for side in sides:
        own |= owner == codes.index(split_pair(pair)[side])
    return owner == -1, own


def owners_by_language(model, context, sides):
    """Neurons belong to languages: a pair's own are those of its languages on these sides."""
    (selected,) = select(context).values()
    general, own = split_by_language(context, context.awareness[:, selected], sides)
    return install(model, context, own_groups(context, general, own))


SHARED_ABOVE = 0.9


def shared_owners(model, context):
    """A specific neuron belongs to every pair above 0.9 of its highest score (Xie et al. 2021)."""
    (pair,) = context.tuned
    selected = select(context)[pair]
    scaled = lander.scale_awareness(context.awareness[:, selected])  # [P, K, F]
    general = lander.categorize(scaled, context.settings.epsilon) == -1
    row = scaled[list(context.inputs.scoring).index(pair)]
    own = ~general & (row >= SHARED_ABOVE * scaled.amax(0))
    return install(model, context, own_groups(context, general, own))


def low_rank(model, context):
    """LoRA on the general and own neurons instead of training them whole; routers learn, too."""
    routers = keep(landermt(model, context), ".router.")
    add_lora(model, lambda name: ".general." in name or ".specific." in name)
    (pair,) = context.tuned
    return {pair: routers[pair] | added(model, context)[pair]}


class Selected(nn.Module):
    """Some rows (dimension 0) or columns (1) of a weight learn; all others stay as they are."""

    def __init__(self, start, dimension, index):
        super().__init__()
        self.dimension = dimension
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("index", index)

    def forward(self, part):
        return self.start.index_copy(self.dimension, self.index, part)

    def right_inverse(self, weight):
        return weight.index_select(self.dimension, self.index)


def learn_part(model, name, dimension, index):
    """Train that part of the parameter `name`. -> {its name from now on: Parameter}"""
    place, _, kind = name.rpartition(".")
    module = model.get_submodule(place)
    start = getattr(module, kind)
    parametrize.register_parametrization(module, kind, Selected(start, dimension, index))
    whole = getattr(module.parametrizations, kind)
    return {f"{place}.parametrizations.{kind}.original": whole.original}


def attention_channels(model, context, layers, learn):
    """Train channels of attention. learn: [len(layers), D] bool -> learners

    Attention is a sum over channels as an FFN is over neurons: channel i is row i of W_q, W_k and
    W_v and column i of W_o. q . k is the sum over a head's channels of q_i k_i, and what W_o
    reads of channel i, the mixed v_i, is its activation. Heads that share keys and values share
    those rows.
    """
    config, own = model.config, {}
    H, H_kv, d = config.heads, config.kv_heads, config.head_size
    if config.query_key_value == "interleaved":
        query, key, value = torch.arange(3 * H * d).view(H, 3, d).transpose(0, 1)
    else:
        query, key, value = torch.arange((H + 2 * H_kv) * d).view(-1, d).split([H, H_kv, H_kv])
    shared = [part.repeat_interleave(H // H_kv, 0) for part in (key, value)]
    # Of the fused projection: query, key and value of each channel.
    rows = torch.stack([query, *shared]).reshape(3, H * d)
    for layer, chosen in zip(layers, learn):
        model.blocks[layer].attention.float()  # fp32 masters
        place, index = f"blocks.{layer}.attention", rows[:, chosen].unique()
        own |= learn_part(model, f"{place}.query_key_value.weight", 0, index)
        if config.query_key_value_bias:
            own |= learn_part(model, f"{place}.query_key_value.bias", 0, index)
        columns = chosen.nonzero().flatten()
        own |= learn_part(model, f"{place}.output.weight", 1, columns)
    return dict.fromkeys(context.tuned, own)


def learning_channels(context, layers, epsilon=None, scores=None):
    """The general and own channels of layers, by the method's own split. -> [len(layers), D] bool"""
    (pair,) = context.tuned
    scores = context.channels if scores is None else scores
    epsilon = context.settings.epsilon if epsilon is None else epsilon
    owner = lander.categorize(scores[:, layers], epsilon)
    return (owner == -1) | (owner == list(context.inputs.scoring).index(pair))


def channels(model, context, epsilon=None):
    """The method's idea in attention: general and own channels, of all layers."""
    layers = list(range(model.config.layers))
    return attention_channels(model, context, layers, learning_channels(context, layers, epsilon))


def channels_by_target(model, context, epsilon):
    """General channels and those of the target language, of all layers."""
    layers = list(range(model.config.layers))
    general, own = split_by_language(context, context.channels, (1,), epsilon)
    return attention_channels(model, context, layers, general | own)


def channels_random(model, context, epsilon):
    """As many channels as `channels` trains in each layer, by chance."""
    layers = list(range(model.config.layers))
    like = learning_channels(context, layers, epsilon)
    learn = torch.zeros_like(like)
    for row, count in zip(learn, like.sum(1)):
        row[torch.randperm(len(row))[:count]] = True
    return attention_channels(model, context, layers, learn)


def channels_of_layers(model, context):
    """The same in the layers that representation analysis selects."""
    (layers,) = select(context).values()
    return attention_channels(model, context, layers, learning_channels(context, layers))


def both(model, context, epsilon=None):
    """Channels of attention in all layers, and the method as it stands in the FFN's."""
    attention = channels(model, context, epsilon)
    ffn = landermt(model, context, epsilon=epsilon)
    return {pair: attention[pair] | ffn[pair] for pair in context.tuned}


def both_of_layers(model, context):
    """Channels of attention and neurons of the FFN, in the same layers."""
    attention = channels_of_layers(model, context)
    ffn = landermt(model, context)
    return {pair: attention[pair] | ffn[pair] for pair in context.tuned}


def both_of_layers_random(model, context):
    """About the same numbers of channels and neurons, by chance."""
    by_chance = {
        "awareness": torch.rand_like(context.awareness),
        "channels": torch.rand_like(context.channels),
    }
    return both_of_layers(model, context._replace(**by_chance))


def blocks_of_layers(model, context):
    """Every weight of attention and FFN in the layers that representation analysis selects."""
    (selected,) = select(context).values()
    places = tuple(f"blocks.{layer}." for layer in selected)
    return weights(model, context, lambda name: name.startswith(places))


def attention_of_layers(model, context):
    """Every attention weight of the layers that representation analysis selects."""
    (selected,) = select(context).values()
    places = tuple(f"blocks.{layer}.attention." for layer in selected)
    return weights(model, context, lambda name: name.startswith(places))


PARTS = {
    "lander": landermt,
    "no-car": no_car,
    "specific-only": specific_only,
    "general-only": general_only,
    "random-layers": random_layers,
    "random-scores": random_scores,
    "neurons-random": neurons_random,
    "neurons-aware": neurons_aware,
    "neurons-relative": neurons_relative,
    "neurons-least": neurons_least,
}
RIVALS = {
    "full": full,
    "layers": layers,
    "ffn": all_ffn,
    "attention": all_attention,
    "lora-attention": lora_attention,
    "lora-all": lora_all,
    "adapters": adapters,
    "adapter-lora": adapter_lora,
}
OTHER_OWNERS = {
    "owners-by-language": partial(owners_by_language, sides=(0, 1)),
    "owners-by-target": partial(owners_by_language, sides=(1,)),
    "shared-owners": shared_owners,
    "low-rank": low_rank,
}
IN_ATTENTION = {
    "channels": channels,
    "channels-half": partial(channels, epsilon=0.5),
    "channels-half-target": partial(channels_by_target, epsilon=0.5),
    "channels-half-random": partial(channels_random, epsilon=0.5),
    "channels-of-layers": channels_of_layers,
    "attention-of-layers": attention_of_layers,
    "both": both,
    "both-half": partial(both, epsilon=0.5),
    "both-of-layers": both_of_layers,
    "both-of-layers-random": both_of_layers_random,
    "blocks-of-layers": blocks_of_layers,
}
SWEEPS = {f"k={k}": partial(landermt, k=k) for k in (1, 2, 3, 4, 5, 7)}
SWEEPS |= {f"epsilon={e}": partial(landermt, epsilon=e) for e in (0.5, 0.75, 0.8, 0.85, 0.95, 1.0)}
GROUPS = {  # rows of the picture
    "the method and its parts": PARTS,
    "rivals": RIVALS,
    "variants: other owners, low rank": OTHER_OWNERS,
    "variants: attention, too": IN_ATTENTION,
}
METHODS = PARTS | RIVALS | OTHER_OWNERS | IN_ATTENTION | SWEEPS


# --------------------------------------------------------------------------------------------------
# Cheap rivals of any method


class FromStart(nn.Module):
    """A weight as its start plus what is learned, so that decay draws it to the start."""

    def __init__(self, start):
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, change):
        return self.start + change

    def right_inverse(self, weight):
        return weight - self.start


L2_DECAY = 10.0  # a step takes this times the learning rate of the way back


def draw_to_start(model, learners):
    """Learn the difference to the start instead of the weights themselves. -> learners"""
    changes = {}
    for name, parameter in lander.merged(learners).items():
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        parametrize.register_parametrization(module, kind, FromStart(parameter))
        changes[name] = getattr(module.parametrizations, kind).original
    return {pair: {name: changes[name] for name in own} for pair, own in learners.items()}


def interpolate(learners, tuned, part):
    """Move every parameter `part` of the way from its start to what was tuned."""
    with torch.no_grad():
        for name, parameter in lander.merged(learners).items():
            parameter += part * (tuned[name].to(parameter.device) - parameter)
