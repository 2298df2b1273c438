"""A decoder-only transformer from scratch that reads and writes published checkpoints.

    model = load_model("bloom-7b1/", device="cuda")             # any of FAMILIES, safetensors
    logits = model(ids, mask)                                   # [B, T] -> [B, T, V]
    new_ids = model.generate(ids, mask, max_new_tokens=128, eos_id=2, beams=4)

    python model.py convert Baichuan2-7B-Base/                  # pytorch_model*.bin -> safetensors

In this file: Config; norms and linear layers; positions; attention, FFN with FFN.part, block; the
Decoder; generation. There the model ends. Then comes what it is read from: families of published
checkpoints (the only place that knows BLOOM from LLaMA), loading, saving, converting.

Letters: B sentences, T tokens, D hidden size, F neurons of one feed-forward layer, V vocabulary,
L layers, H heads, H_kv heads of keys and values, d head size.
"""

import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import InputError, exit_status, read_bytes, read_json, reading, write_json, write_tensors


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know. The defaults are LLaMA's; a family says what differs."""

    family: str  # key into FAMILIES: how tensors are named
    published: dict  # config.json as it was read; save_model writes it back
    vocab_size: int  # V, rows of the embedding; a tokenizer may fill fewer
    hidden_size: int  # D
    ffn_size: int  # F
    layers: int  # L
    heads: int  # H
    kv_heads: int  # H_kv, of keys and values: query head h reads number h // (H / H_kv)
    head_size: int  # d
    max_length: int  # tokens that the model was made for
    positions: str = "rotary"  # or "alibi", "learned"
    rotary_base: float = 10000.0
    rotary_scaling: dict | None = None  # as config.json has it, of type linear or llama3
    longest: int = 2**24 - 1  # more tokens than there are learned positions are refused
    window: int = 2**24 - 1  # of the last tokens, as many are seen in the layers
    window_layers: tuple = ()  # with these numbers
    window_base: float | None = None  # their rotary base, unscaled, where it is another
    score_scale: float | None = None  # of query . key; None: 1 / sqrt(d)
    score_cap: float | None = None  # cap * tanh(score / cap); the same of the logits
    logit_cap: float | None = None
    embedding_scale: float | None = None
    norm: str = "rms"  # or "rms from 1", whose weights are stored less 1, or "layer", with bias
    norm_eps: float = 1e-6
    embedding_norm: bool = False  # a norm right after the embedding
    residual_after_norm: bool = False  # the residual is the norm's output, not its input
    norm_after: bool = False  # a second norm after attention, and after the FFN
    query_key_value: str = "stacked"  # rows: (3, H, d), or "interleaved" (H, 3, d)
    query_key_value_bias: bool = False
    query_key_norm: bool = False  # an RMS norm of each head's query and key, before rotary
    output_bias: bool = False  # of attention
    gated: bool = True  # feed-forward: activation(gate) * up, else activation(up)
    activation: str = "silu"  # or "gelu", by its tanh form
    ffn_bias: bool = False
    head: str = "plain"  # "tied" to the embedding, "plain", or "normalized" (unit rows)

    @classmethod
    def from_folder(cls, folder):
        """Read a checkpoint's config.json. InputError names what is missing, wrong or unknown."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise InputError(f"{path}: {why_no_config(path.parent)}")
        published = read_json(path)
        with reading(path):
            return read_config(published)


# --------------------------------------------------------------------------------------------------
# Norms and linear layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight: in fp32, cast back before the weight multiplies (LLaMA). [.., D]
    from_1: by 1 + weight, and cast back after that (Gemma)"""

    def __init__(self, size, eps, from_1=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if from_1 else torch.ones(size))
        self.eps, self.from_1 = eps, from_1

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.from_1:
            return (wide * (1 + self.weight.float())).to(x.dtype)
        return wide.to(x.dtype) * self.weight


def make_norm(config, size=None):
    size = size or config.hidden_size
    if config.norm == "layer":
        # It needs no visible cast: its kernels compute in fp32 and round once, at the end.
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, from_1=config.norm == "rms from 1")


class Linear(nn.Linear):
    """A linear layer whose weights are cast to the input's type: fp32 masters run in 16 bits."""

    cast = None  # weight and bias in the input's type, while cast_once is open

    def reset_parameters(self):
        """New weights are N(0, 0.02), biases zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def operands(self, dtype):
        """Weight and bias as a product in that type takes them."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        """[.., in] -> [.., out]"""
        return functional.linear(x, *(self.cast or self.operands(x.dtype)))


@contextmanager
def cast_once(model):
    """While open, weights are cast once and not in each pass: nothing may learn meanwhile."""
    dtype = model.embedding.weight.dtype
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.cast = linear.operands(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.cast = None


# --------------------------------------------------------------------------------------------------
# Positions


def alibi_slopes(heads):
    """ALiBi's slope of each head (Press et al. 2022; BLOOM, Baichuan-13B). H -> [H], fp32

    4 -> [1/4, 1/16, 1/64, 1/256]. Where H is no power of two: those of the closest lower power c,
    then every other slope of the 2c series.
    """
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


def attention_bias(config, mask, queries, keys, device, dtype, window=2**24 - 1):
    """What is added to attention scores: how far away a key is (ALiBi), and who may see whom.

    For the last `queries` of `keys` tokens. Real tokens are contiguous, so the distance of two
    ranks among them is the distance of their indices.
    mask [B, keys] or None -> [1 or B, 1 or H, queries, keys], None where causal order decides alone
    """
    by_order = mask is None and queries in (1, keys) and keys <= window
    if by_order and config.positions != "alibi" and config.score_cap is None:
        return None
    key = torch.arange(keys, device=device)
    distance = key[keys - queries :, None] - key  # [queries, keys]
    seen = ((distance >= 0) & (distance < window))[None, None]
    if mask is not None:
        # A padding query sees itself: with nothing to see, its softmax is NaN, and 0 * NaN poisons
        # the next layer.
        seen = seen & mask[:, None, None, :] | (distance == 0)
    bias = torch.zeros((), device=device)
    if config.positions == "alibi":
        # Relative and in fp32: an absolute slope * position is off by up to 5 in bf16, for near
        # keys too.
        bias = -alibi_slopes(config.heads).to(device)[:, None, None] * distance
    return torch.where(seen, bias, -torch.inf).to(dtype)


def rotary_frequencies(config, device):
    """The angle from one position to the next, of each pair of a head's numbers. -> [d / 2] fp32

    Su et al. 2021. Scaled "linear", positions are `factor` times closer. Scaled "llama3", so are
    those of long wavelengths alone, with a smooth passage between (Llama 3.1's release).
    """
    d, scaling = config.head_size, config.rotary_scaling
    frequencies = 1 / config.rotary_base ** (torch.arange(0, d, 2, device=device).float() / d)
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    fast = ((turns - low) / (high - low)).clamp(0, 1)  # 1: not scaled
    return (1 - fast) * slow + fast * frequencies


def real_positions(mask, queries, keys, device):
    """The rank among real tokens of the last `queries` of `keys` tokens. -> [1 or B, queries]"""
    if mask is None:
        return torch.arange(keys - queries, keys, device=device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)[:, keys - queries :]


def rotary_angles(config, mask, queries, keys, device):
    """Cosines and sines of the last `queries` of `keys` tokens (Su et al. 2021).

    mask [B, keys] or None -> two of [1 or B, 1, queries, d], fp32
    """
    positions = real_positions(mask, queries, keys, device)[:, None, :, None].float()
    angles = positions * rotary_frequencies(config, device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def what_is_seen(config, mask, queries, keys, x, near=False):
    """attention_bias and rotary_angles of a layer, None for none; near: one that sees a window."""
    window = config.window if near else keys
    bias = attention_bias(config, mask, queries, keys, x.device, x.dtype, window)
    if config.positions != "rotary":
        return bias, None
    if near and config.window_base:
        config = replace(config, rotary_base=config.window_base, rotary_scaling=None)
    return bias, rotary_angles(config, mask, queries, keys, x.device)


def apply_rotary(x, cosines, sines):
    """Rotate each pair (x[i], x[i + d/2]) of a head by its angle, in fp32. [B, H, T, d] -> same"""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cosines + torch.cat([-second, first], dim=-1) * sines).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Attention, feed-forward, block


class Attention(nn.Module):
    """Multi-head attention: one projection makes query, key and value. Query heads may share keys
    and values (grouped-query attention, Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, d = config.hidden_size, config.head_size
        rows = (config.heads + 2 * config.kv_heads) * d
        self.query_key_value = Linear(D, rows, bias=config.query_key_value_bias)
        self.output = Linear(config.heads * d, D, bias=config.output_bias)
        if config.query_key_norm:
            self.query_norm, self.key_norm = make_norm(config, d), make_norm(config, d)

    def forward(self, x, bias, angles, cache, layer):
        """[B, T, D] -> [B, T, D]. The softmax runs in fp32 inside scaled_dot_product_attention."""
        B, T, _ = x.shape
        H, H_kv, d = self.config.heads, self.config.kv_heads, self.config.head_size
        if self.config.query_key_value == "interleaved":
            parts = self.query_key_value(x).view(B, T, H, 3, d).unbind(3)
        else:
            parts = self.query_key_value(x).view(B, T, -1, d).split([H, H_kv, H_kv], dim=2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # [B, H or H_kv, T, d] each
        if self.config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        scale, cap = self.config.score_scale, self.config.score_cap
        if cap is not None:
            mixed = capped_attention(query, key, value, bias, scale, cap)
        else:
            causal = bias is None and T > 1
            mixed = functional.scaled_dot_product_attention(
                query, key, value, bias, is_causal=causal, enable_gqa=H != H_kv, scale=scale
            )
        return self.output(mixed.transpose(1, 2).reshape(B, T, H * d))


def capped_attention(query, key, value, bias, scale, cap):
    """scaled_dot_product_attention of scores within a cap (Gemma 2). [B, H, T, d] -> same"""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = cap * torch.tanh(scores / cap) + bias
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


# The weights of a neuron, and which dimension of each counts the neurons: neuron i is row i of gate
# and up with their biases, and column i of down. down.bias belongs to no neuron.
NEURON_DIMENSION = {
    "gate.weight": 0,
    "gate.bias": 0,
    "up.weight": 0,
    "up.bias": 0,
    "down.weight": 1,
}


ACTIVATIONS = {"silu": functional.silu, "gelu": partial(functional.gelu, approximate="tanh")}


class FFN(nn.Module):
    """Feed-forward layer, gated (LLaMA, Gemma) or not (BLOOM, GPT-2). A sum over its neurons:

    h_i = act(gate[i] . x) * (up[i] . x)  or  act(up[i] . x + up.bias[i])          a neuron
    y   = sum over i of h_i * down[:, i],  + down.bias
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, F = config.hidden_size, config.ffn_size
        self.gate = Linear(D, F, bias=config.ffn_bias) if config.gated else None
        self.up = Linear(D, F, bias=config.ffn_bias)
        self.down = Linear(F, D, bias=config.ffn_bias)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            h = activation(self.up(x))  # [B, T, F]
        else:
            h = activation(self.gate(x)) * self.up(x)  # [B, T, F]
        return self.down(h)

    def part(self, index, dtype):
        """Some neurons, by number, as an FFN of their own: copies, without the output bias.

        Since the FFN is a sum over neurons, the parts of a partition add up to the whole:
        part(a)(x) + part(b)(x) + down.bias = ffn(x), where a and b are all neurons.
        """
        with torch.device("meta"):
            part = FFN(replace(self.config, ffn_size=len(index)))
        part.down.bias = None
        index = torch.tensor(index, dtype=torch.long, device=self.up.weight.device)
        chosen = {}
        for name, weight in self.state_dict().items():
            if name in NEURON_DIMENSION:
                chosen[name] = weight.index_select(NEURON_DIMENSION[name], index).to(dtype)
        part.load_state_dict(chosen, assign=True)
        return part

    @torch.no_grad()
    def put(self, index, part):
        """Write a part back to where it came from: the inverse of part(index)."""
        index = torch.tensor(index, dtype=torch.long, device=self.up.weight.device)
        whole = self.state_dict()
        for name, weight in part.state_dict().items():
            whole[name].index_copy_(NEURON_DIMENSION[name], index, weight.to(whole[name].dtype))


class Block(nn.Module):
    """Attention, then feed-forward, each on the norm of the residual stream x and added to it.

    Gemma norms what is added, too. Behind that norm the sum over neurons is no longer linear in one
    neuron: what one adds changes the scale of all.
    """

    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.after_attention = make_norm(config) if config.norm_after else nn.Identity()
        self.ffn_norm = make_norm(config)
        self.ffn = FFN(config)
        self.after_ffn = make_norm(config) if config.norm_after else nn.Identity()
        self.residual_after_norm = config.residual_after_norm

    def forward(self, x, bias=None, angles=None, cache=None, layer=None):
        """[B, T, D] -> [B, T, D]"""
        normed = self.attention_norm(x)
        attended = self.attention(normed, bias, angles, cache, layer)
        x = (normed if self.residual_after_norm else x) + self.after_attention(attended)
        normed = self.ffn_norm(x)
        return (normed if self.residual_after_norm else x) + self.after_ffn(self.ffn(normed))


# --------------------------------------------------------------------------------------------------
# The decoder


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute blocks in the backward pass, keep inputs alone
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.longest, config.hidden_size)
            nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        if config.head != "tied":
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, mask=None):
        """Logits of the next token at every position. ids [B, T], mask [B, T] or None -> [B, T, V]

        mask is True on real tokens, which are contiguous: left or right padding.
        """
        return self.logits(self.hidden_states(ids, mask))

    def hidden_states(self, ids, mask=None, cache=None):
        """The final norm's output, what the head reads. ids [B, T] -> [B, T, D]"""
        for x in self.block_outputs(ids, mask, cache):
            pass
        return self.final_norm(x)

    def block_outputs(self, ids, mask=None, cache=None):
        """The residual stream after each block, the first block's first: yields L of [B, T, D].

        With a cache, ids are the tokens after those in the cache, and the cache knows the mask.
        """
        new = keys = ids.shape[1]
        if cache is not None:
            keys += cache.length
            mask = None if cache.mask is None else cache.mask[:, :keys]
        elif mask is not None and mask[:, 0].all():
            mask = None  # right padding: causal order already hides it from every real token
        if new > self.config.longest:
            raise InputError(f"{new} tokens, the model has {self.config.longest} positions")
        x = self.embedding(ids)  # [B, T, D]
        if self.config.embedding_scale is not None:  # rounded as x is: 25.25 in bf16, not 25.3
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.config.positions == "learned":
            x = x + self.position_embedding(real_positions(mask, new, keys, ids.device))
        x = self.embedding_norm(x)
        near_layers = self.config.window_layers
        far = what_is_seen(self.config, mask, new, keys, x)
        near = what_is_seen(self.config, mask, new, keys, x, near=True) if near_layers else None
        for layer, block in enumerate(self.blocks):
            bias, angles = near if layer in near_layers else far
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, angles, use_reentrant=False)
            else:
                x = block(x, bias, angles, cache, layer)
            yield x
        if cache is not None:
            cache.length = keys

    def cache_bytes(self):
        """What the keys and values of one token take, of all layers."""
        config = self.config
        size = config.kv_heads * config.head_size * self.embedding.weight.itemsize
        return 2 * config.layers * size

    def head_weight(self, vocab_size=None):
        """The head's first `vocab_size` rows (None: all), and the norms to divide its logits by.

        Dividing logits by the row's norm is Baichuan2's normalized head without a second copy of
        the weight. -> [V, D], and [V] fp32 or None
        """
        weight = (self.embedding if self.config.head == "tied" else self.head).weight[:vocab_size]
        if self.config.head != "normalized":
            return weight, None
        return weight, torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)

    def logits(self, hidden, head=None):
        """[.., D] -> [.., V]. `head` is head_weight()'s result, where it is used more than once."""
        weight, norms = head or self.head_weight()
        logits, cap = functional.linear(hidden, weight), self.config.logit_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits if norms is None else (logits / norms).to(logits.dtype)

    def next_logits(self, ids, cache, head):
        """Read more tokens of each row of the cache, [rows, T] -> logits of the next, [rows, V]"""
        return self.logits(self.hidden_states(ids, cache=cache)[:, -1], head)

    @torch.inference_mode()
    def generate(self, ids, mask, max_new_tokens, eos_id, beams=1, vocab_size=None, line_ends=None):
        """Continue prompts: greedy, or beam search by log-probability a token, its end counted.

        ids, mask [B, T], padded on either side. A continuation ends at eos_id (an id, or several),
        with a token that ends its line (line_ends: data.line_ends), after max_new_tokens (a number,
        or one for each prompt), and where the model's positions end. Only ids below vocab_size are
        emitted: an embedding may have more rows than the tokenizer has tokens.
        -> list of B lists of new ids, eos excluded
        """
        B = len(ids)
        limits = torch.as_tensor(max_new_tokens, device=ids.device).expand(B)
        if B == 0 or limits.max() == 0:
            return [[] for _ in range(B)]
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        lengths = mask.sum(1)
        limits = limits.minimum(self.config.longest - lengths)
        # All padding to the left, so that the newest column is every row's last token.
        columns = mask.long().argsort(dim=1, stable=True)[:, -int(lengths.max()) :]
        ids, mask = ids.gather(1, columns), mask.gather(1, columns)
        mask = None if mask.all() else functional.pad(mask, (0, int(limits.max())), value=True)
        eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
        head = self.head_weight(vocab_size)
        ends = which_end(eos_ids, line_ends, len(head[0]), ids.device)
        with cast_once(self):
            cache = Cache(self, B, beams, ids.shape[1] + int(limits.max()), mask)
            logits = self.next_logits(ids, cache, head)
            if beams == 1:
                new = greedy_search(self, head, cache, logits, limits, ends)
            else:
                new = beam_search(self, head, cache, logits, limits, ends, beams)
        no_text = {*eos_ids, NO_TOKEN}
        rows = zip(new.tolist(), limits.tolist())
        return [[token for token in row[:limit] if token not in no_text] for row, limit in rows]


# --------------------------------------------------------------------------------------------------
# Generation
#
# Read the prompt; take the likeliest next token; append it; repeat until end-of-sentence. What
# follows is these four lines, fast: keys and values of earlier tokens are cached, and finished
# sentences leave the batch. The tests hold it against the four.


class Cache:
    """Keys and values so far of each layer, [2, rows, H_kv, room for T, d]; mask [rows, T] or None.

    rows are one a prompt, and by select() `beams` a prompt.
    """

    def __init__(self, model, prompts, beams, room, mask):
        shape = 2, prompts * beams, model.config.kv_heads, room, model.config.head_size
        self.stores = [model.embedding.weight.new_empty(shape) for _ in model.blocks]
        self.mask, self.rows, self.length = mask, prompts, 0

    def append(self, layer, key, value):
        """Store a layer's new keys and values, [rows, H_kv, new, d] each.

        -> all of this layer so far, [2, rows, H_kv, length + new, d]
        """
        store = self.stores[layer][:, : self.rows, :, : self.length + key.shape[2]]
        store[0, :, :, self.length :] = key
        store[1, :, :, self.length :] = value
        return store

    def select(self, sources):
        """Row r becomes what row sources[r] was; the others are dropped. [rows]"""
        self.rows = len(sources)
        moved = (sources != torch.arange(self.rows, device=sources.device)).nonzero().flatten()
        if len(moved):
            for store in self.stores:
                written = store[:, :, :, : self.length]
                written[:, moved] = written[:, sources[moved]]
        if self.mask is not None:
            self.mask = self.mask[sources]


NO_TOKEN = -1  # in a row of new ids, after its end


def survivors(alive):
    """The order that keeps the rows in `alive` with the fewest moves: the last ones fill the holes.

    [B] bool -> [n]; [True, False, True, True] -> [0, 3, 2]
    """
    kept = alive.nonzero().flatten()
    order = torch.arange(len(kept), device=alive.device)
    order[~alive[: len(kept)]] = kept[kept >= len(kept)]
    return order


def which_end(eos_ids, line_ends, vocab_size, device):
    """Which tokens are visible, [V] bool, and which end a continuation, [2, V] bool: row 0 where
    its line shows nothing so far, row 1 where it does. line_ends: of data.line_ends, or None"""
    visible, before, after = line_ends or torch.zeros(3, vocab_size, dtype=torch.bool)
    ending = torch.stack([before, after])
    ending[:, [id for id in eos_ids if id < vocab_size]] = True
    return visible.to(device), ending.to(device)


def greedy_search(model, head, cache, logits, limits, ends):
    """The likeliest token, again and again; finished sentences leave.

    logits of the first new token [B, V], limits [B] -> new ids [B, largest limit], and NO_TOKEN
    """
    visible, ending = ends
    sentence = torch.arange(len(logits), device=logits.device)  # which one each live row is
    begun = torch.zeros_like(sentence, dtype=torch.bool)  # whether its line shows something
    new = sentence.new_full((len(logits), int(limits.max())), NO_TOKEN)
    for step in range(new.shape[1]):
        token = logits.max(-1).indices  # argmax, several times faster on the CPU
        new[sentence, step] = token
        ended = ending[begun.long(), token]
        begun = begun | visible[token]
        alive = ~ended & (limits > step + 1)
        if not alive.all():
            order = survivors(alive)
            cache.select(order)
            sentence, token = sentence[order], token[order]
            begun, limits = begun[order], limits[order]
        if len(sentence) == 0:
            break
        logits = model.next_logits(token[:, None], cache, head)
    return new


def beam_search(model, head, cache, logits, limits, ends, beams):
    """The likeliest continuation, by log-probability a token, that `beams` parallel ones find.

    Each step scores every token after each of a sentence's `beams` live hypotheses. Of the best
    `beams` of these candidates, those that end are finished. The best `beams` that do not end live
    on. At its limit, every hypothesis ends. A sentence is done when `beams` hypotheses are finished
    and no live one scores higher so far than the worst of the best `beams` finished ones: what
    transformers does with early_stopping=False. Arguments and result are greedy_search's.
    """
    visible, ending = ends
    B, V = logits.shape
    sentence = torch.arange(B, device=logits.device)  # [S] which ones are live
    tokens = sentence.new_full((B, beams, int(limits.max())), NO_TOKEN)  # [S, beams, limit]
    begun = torch.zeros(B, beams, dtype=torch.bool, device=logits.device)  # [S, beams]
    total = torch.full_like(begun, -torch.inf, dtype=torch.float)  # [S, beams] log-probability
    finished = total.clone()  # [S, beams] the highest scores of what has ended, in order
    total[:, 0] = 0  # the beams are alike at first: one alone goes on
    best = tokens[:, 0].clone()  # [B, limit] the finished hypothesis with the highest score
    cache.select(sentence.repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)
    for step in range(tokens.shape[2]):
        S = len(sentence)
        row = torch.arange(S, device=logits.device)
        at_limit = limits <= step + 1  # [S]
        ends_here = ending[begun.long()]  # [S, beams, V]
        candidates = logits.float().log_softmax(-1).view(S, beams, V) + total[:, :, None]

        score, choice = candidates.flatten(1).topk(beams)  # [S, beams]
        ended = ends_here.flatten(1).gather(1, choice) | at_limit[:, None]
        score = (score / (step + 1)).masked_fill(~ended, -torch.inf)
        top_score, top = score.max(1)  # [S]
        better = top_score > finished[:, 0]
        hypothesis = tokens[row, choice[row, top] // V]  # [S, limit]
        hypothesis[:, step] = choice[row, top] % V
        best[sentence[better]] = hypothesis[better]
        finished = torch.cat([finished, score], 1).topk(beams).values

        total, choice = candidates.masked_fill_(ends_here, -torch.inf).flatten(1).topk(beams)
        beam, token = choice // V, choice % V  # [S, beams]
        tokens = tokens.gather(1, beam[:, :, None].expand_as(tokens))
        tokens[:, :, step] = token
        begun = begun.gather(1, beam) | visible[token]

        alive = ~at_limit & (total[:, 0] / (step + 1) > finished[:, -1])
        order = survivors(alive)
        if len(order) == 0:
            break
        cache.select((order[:, None] * beams + beam[order]).flatten())
        sentence, limits, tokens = sentence[order], limits[order], tokens[order]
        begun, total, finished = begun[order], total[order], finished[order]
        logits = model.next_logits(token[order].view(-1, 1), cache, head)
    return best


# --------------------------------------------------------------------------------------------------
# Published checkpoints
#
# A family is a reader of its config.json and a map of names. Config's defaults say what is usual, a
# reader what differs. Absent keys mean what transformers takes them for.


def read_sizes(published, tied=False):
    """What every family says, by any of its names. tied: the head, if no key says so."""
    hidden_size = published.get("n_embed") or published.get("n_embd") or published["hidden_size"]
    heads = published.get("n_head") or published["num_attention_heads"]
    if published.get("head_dim") is None and hidden_size % heads:
        raise ValueError(f"hidden size {hidden_size} does not divide into {heads} heads")
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=hidden_size,
        ffn_size=published.get("intermediate_size") or published.get("n_inner") or 4 * hidden_size,
        layers=published.get("n_layer") or published["num_hidden_layers"],
        heads=heads,
        kv_heads=published.get("num_key_value_heads") or heads,
        head_size=published.get("head_dim") or hidden_size // heads,
        head="tied" if published.get("tie_word_embeddings", tied) else "plain",
    )


# GPT-2's layers, and BLOOM's: norms with a mean, biases everywhere, no gate.
BIASED = dict(norm="layer", query_key_value_bias=True, output_bias=True, ffn_bias=True)
BIASED |= dict(gated=False, activation="gelu")


def read_gpt2(published):
    """The config.json of GPT-2 and mGPT."""
    length = published.get("n_positions", 1024)
    return read_sizes(published, tied=True) | dict(
        **BIASED,
        max_length=length,
        longest=length,
        positions="learned",
        norm_eps=float(published.get("layer_norm_epsilon", 1e-5)),
    )


def read_bloom(published):
    """BLOOM's config.json, published (n_embed, num_attention_heads) or re-saved (hidden_size)."""
    return read_sizes(published, tied=True) | dict(
        **BIASED,
        max_length=published.get("seq_length", 2048),
        positions="alibi",
        norm_eps=float(published.get("layer_norm_epsilon", 1e-5)),
        embedding_norm=True,
        residual_after_norm=published.get("apply_residual_connection_post_layernorm", False),
        query_key_value="interleaved",
    )


def read_baichuan(published):
    """Baichuan's config.json. The 13B models, with ALiBi, lack max_position_embeddings; version 2
    has a normalized head. `positions`, `normalize_head`: keys of our own small checkpoints."""
    length = published.get("max_position_embeddings")
    is_second = "z_loss_weight" in published or published["vocab_size"] == 125696
    return read_llama(published) | dict(
        max_length=length or published.get("model_max_length", 4096),
        positions=published.get("positions", "rotary" if length else "alibi"),
        head="normalized" if published.get("normalize_head", is_second) else "plain",
    )


def read_llama(published):
    """The config.json of LLaMA 1 to 3, ALMA, Tower."""
    bias = published.get("attention_bias", False)
    return read_sizes(published) | dict(
        max_length=published.get("max_position_embeddings", 2048),
        norm_eps=float(published.get("rms_norm_eps", 1e-6)),
        query_key_value_bias=bias,
        output_bias=bias,
        ffn_bias=published.get("mlp_bias", False),
        **read_rotary(published),
    )


def read_rotary(published):
    """Base and scaling of rotary positions, in either spelling. -> fields of Config"""
    # rope_parameters: of files saved since transformers 5.
    scaling = published.get("rope_scaling") or published.get("rope_parameters") or {}
    base = float(scaling.get("rope_theta", published.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_scaling of type {kind!r}, expected default, linear or llama3")
    scaling = None if kind == "default" else scaling | {"rope_type": kind}
    return dict(rotary_base=base, rotary_scaling=scaling)


def read_mistral(published):
    """Mistral's config.json. Without num_key_value_heads it has 8, without sliding_window 4096."""
    fields = read_llama({"num_key_value_heads": 8} | published)
    window = published.get("sliding_window", 4096)
    near = range(fields["layers"]) if window else ()
    return fields | {"window": window or Config.window, "window_layers": tuple(near)}


def read_qwen(published):
    """The config.json of Qwen2 and Qwen3. A window counts if use_sliding_window says so.

    Query, key and value have biases in Qwen2 and norms in Qwen3, and no key says so.
    """
    new = "query_key_value_bias" if published["model_type"] == "qwen2" else "query_key_norm"
    fields = read_llama(published) | {new: True}
    if published.get("use_sliding_window"):
        near = range(published["max_window_layers"], fields["layers"])
        fields |= {"window": published["sliding_window"], "window_layers": tuple(near)}
    return fields


def read_gemma(published, pattern, **more):
    """What the config.json of Gemma 2 and 3 have in common. more: fields of Config that differ"""
    fields = read_llama({"head_dim": 256, "tie_word_embeddings": True} | published)
    if kinds := published.get("layer_types"):
        near = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    else:  # one layer in so many sees all tokens
        pattern = published.get("sliding_window_pattern", pattern)
        near = [layer for layer in range(fields["layers"]) if (layer + 1) % pattern]
    return fields | dict(
        window=published.get("sliding_window", 4096),
        window_layers=tuple(near),
        score_scale=published.get("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=fields["hidden_size"] ** 0.5,
        norm="rms from 1",
        norm_after=True,
        activation="gelu",
        **more,
    )


def read_gemma2(published):
    """Gemma 2's config.json: scores and logits have caps, every second layer a window."""
    caps = dict(score_cap=published.get("attn_logit_softcapping", 50.0))
    caps |= dict(logit_cap=published.get("final_logit_softcapping", 30.0))
    return read_gemma({"max_position_embeddings": 8192} | published, 2, **caps)


def read_gemma3(published):
    """Gemma 3's config.json: five of six layers have a window, and a rotary base of their own."""
    usual = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    published = usual | {"max_position_embeddings": 131072, "rope_theta": 1e6} | published
    near_base, by_kind = published.get("rope_local_base_freq"), published.get("rope_parameters")
    if by_kind and "full_attention" in by_kind:  # of files saved since transformers 5
        near_base = by_kind["sliding_attention"]["rope_theta"]
        published["rope_parameters"] = by_kind["full_attention"]
    return read_gemma(published, 6, window_base=near_base or 10000.0, query_key_norm=True)


# The trap: BLOOM's and Baichuan's fused query, key and value have the same shape, but BLOOM's rows
# are interleaved and Baichuan's stacked. A mix-up loads cleanly and computes garbage.
BLOOM_NAMES = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "blocks.{}.attention_norm": "h.{}.input_layernorm",
    "blocks.{}.attention.query_key_value": "h.{}.self_attention.query_key_value",
    "blocks.{}.attention.output": "h.{}.self_attention.dense",
    "blocks.{}.ffn_norm": "h.{}.post_attention_layernorm",
    "blocks.{}.ffn.up": "h.{}.mlp.dense_h_to_4h",
    "blocks.{}.ffn.down": "h.{}.mlp.dense_4h_to_h",
    "final_norm": "ln_f",
    "head": "lm_head",
}
GPT2_NAMES = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "blocks.{}.attention_norm": "h.{}.ln_1",
    "blocks.{}.attention.query_key_value": "h.{}.attn.c_attn",
    "blocks.{}.attention.output": "h.{}.attn.c_proj",
    "blocks.{}.ffn_norm": "h.{}.ln_2",
    "blocks.{}.ffn.up": "h.{}.mlp.c_fc",
    "blocks.{}.ffn.down": "h.{}.mlp.c_proj",
    "final_norm": "ln_f",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.query_key_value": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",  # Qwen3's
    "blocks.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attention.output": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
PACKED = {"blocks.{}.attention.query_key_value": "model.layers.{}.self_attn.W_pack"}
GEMMA_NAMES = LLAMA_NAMES | {  # the trap: LLaMA's post_attention_layernorm is the FFN's
    "blocks.{}.after_attention": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.{}.after_ffn": "model.layers.{}.post_feedforward_layernorm",
}

# Tensors that are no weights of a decoder: angles, who may see whom, and what sees images.
DROPPED = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias"
DROPPED += r"|(vision_tower|multi_modal_projector)\..+"


class Family(NamedTuple):
    """How a family's files are read: its config.json, and the names of its tensors."""

    read: Callable  # contents of config.json -> fields of Config; a KeyError names a missing key
    names: dict  # our module -> the published one, "{}" for the layer; a tuple: rows concatenated
    computes: dict  # keys of config.json, and what alone they may say
    transposed: bool = False  # matrices of blocks are stored [in, out]


LLAMA = Family(read_llama, LLAMA_NAMES, {"hidden_act": "silu"})
GPT2 = {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False}
BY_TANH = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
GEMMA3 = Family(read_gemma3, GEMMA_NAMES, BY_TANH)
FAMILIES = {
    "bloom": Family(read_bloom, BLOOM_NAMES, {}),
    "baichuan": LLAMA._replace(read=read_baichuan, names=LLAMA_NAMES | PACKED),
    "llama": LLAMA,
    "mistral": LLAMA._replace(read=read_mistral),
    "qwen2": LLAMA._replace(read=read_qwen),
    "qwen3": LLAMA._replace(read=read_qwen),
    "gpt2": Family(read_gpt2, GPT2_NAMES, GPT2, transposed=True),
    "gemma2": GEMMA3._replace(read=read_gemma2),
    "gemma3_text": GEMMA3,
}


def read_config(published):
    """The contents of a config.json -> Config. ValueError names what would be another function."""
    if published["model_type"] == "gemma3":  # with images: its text part is a model of its own
        published = published["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}
    name = published["model_type"]
    if name not in FAMILIES:
        raise ValueError(f"model_type is {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    for key, value in {**family.computes, "quantization_config": None}.items():
        if published.get(key) not in (None, value):
            raise ValueError(f"{key} is {published[key]!r}, expected {value!r}")
    config = Config(family=name, published=published, **family.read(published))
    for field in fields(config):
        size = getattr(config, field.name)
        if field.type is int and not (isinstance(size, int) and 0 < size < 2**31):
            raise ValueError(f"{field.name} is {size!r}, expected a positive integer below 2^31")
    rotary_frequencies(config, "meta")  # a KeyError names what scaling lacks
    return config


def published_names(family, parameter):
    """The tensors of a checkpoint that make up one of our parameters.

    bloom, "blocks.3.ffn.up.bias" -> ["h.3.mlp.dense_h_to_4h.bias"]
    """
    module, kind = parameter.rsplit(".", 1)
    layer = re.search(r"\d+", module)
    names = FAMILIES[family].names[re.sub(r"\d+", "{}", module)]
    names = (names,) if isinstance(names, str) else names
    return [f"{name.format(layer and layer[0])}.{kind}" for name in names]


def oriented(config, parameter, value):
    """A weight as the other side has it: GPT-2's files hold matrices of blocks transposed."""
    is_matrix = parameter.startswith("blocks.") and value.dim() == 2
    return value.T if FAMILIES[config.family].transposed and is_matrix else value


def to_published(config, parameter, value):
    """A parameter as the tensors of a checkpoint, by name: query, key and value may be three."""
    names = published_names(config.family, parameter)
    if len(names) == 1:
        return {names[0]: oriented(config, parameter, value)}
    rows = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return dict(zip(names, value.split(rows)))


# --------------------------------------------------------------------------------------------------
# Loading, saving, converting


def why_no_config(folder):
    """What a folder without config.json is taken for."""
    if (folder / "tuned.safetensors").exists():
        return "not there, this is a run's folder; lander.py --tuned it --export DIR, and take DIR"
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        with reading(adapter):
            base = read_json(adapter)["base_model_name_or_path"]
        return f"not there, this is an adapter of {base}; merge it into that model first (peft)"
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return f"no such folder; from a hub: hf download {folder} --local-dir {folder.name}"
    return "cannot be read, there is none"


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        with reading(index):
            return [folder / shard for shard in sorted({*read_json(index)["weight_map"].values()})]
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{folder}: only .bin files; run: python model.py convert {folder}")
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def bare(name):
    """A tensor's name without what stands in front of it in some files and not in others."""
    return re.sub(r"^(transformer\.|model\.|language_model\.)+", "", name)


def check_names(folder, wanted, found):
    """One InputError about all tensors that are missing, and all that are of no such model."""
    said = []
    for kind, names in (("missing", wanted - found), ("unexpected", found - wanted)):
        names = sorted(name for name in names if not re.fullmatch(DROPPED, name))
        if names:
            said.append(f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
    if said:
        raise InputError(f"{folder}: tensors do not fit config.json; {'; '.join(said)}")


def load_model(folder, device="cpu", dtype=None, config=None):
    """Read a published checkpoint folder. -> Decoder

    dtype None keeps the checkpoint's; config: its Config, where that was read already. Files are
    memory-mapped and tensors go one by one to `device`; on the CPU, in the checkpoint's own dtype,
    they are not copied at all. InputError names every missing and unexpected tensor.
    """
    folder = Path(folder)
    config = config or Config.from_folder(folder)
    found = {}  # name -> tensor
    for path in checkpoint_files(folder):
        read_bytes(path, 100)  # names a Git LFS pointer
        with reading(path):
            file = safe_open(path, framework="pt")
            found |= {bare(name): file.get_tensor(name) for name in file.keys()}
    if config.layers > len(found):
        raise InputError(f"{folder}: {config.layers} layers in config.json, {len(found)} tensors")
    (embedding,) = map(bare, published_names(config.family, "embedding.weight"))
    if config.head == "tied" and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        if not torch.equal(head, found.setdefault(embedding, head)):
            remedy = "tie_word_embeddings false in config.json uses it"
            raise InputError(f"{folder}: lm_head.weight is not the embedding; {remedy}")
    with reading(folder / "config.json"), torch.device("meta"):
        model = Decoder(config)
    names = {}
    for parameter, _ in model.named_parameters():
        names[parameter] = [bare(name) for name in published_names(config.family, parameter)]
    check_names(folder, set().union(*names.values()), found.keys())
    dtype = dtype or found[embedding].dtype
    state = {}
    with reading(folder):
        for parameter, pieces in names.items():
            tensors = [found.pop(name).to(device).to(dtype) for name in pieces]
            value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            state[parameter] = oriented(config, parameter, value)
        model.load_state_dict(state, assign=True)
    return model


def save_model(model, folder):
    """Write config.json and model.safetensors in the family's published layout."""
    tensors = {}
    for parameter, value in model.named_parameters():
        for name, piece in to_published(model.config, parameter, value.detach()).items():
            tensors[name] = piece.contiguous()
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    types = {"dtype": dtype, "torch_dtype": dtype}  # the second for transformers before 4.56
    write_json(Path(folder) / "config.json", model.config.published | types)
    write_tensors(Path(folder) / "model.safetensors", tensors)


def convert(folder):
    """Turn pytorch_model*.bin shards into safetensors beside them, running no code in them.

    Several get an index. Nothing is overwritten.
    """
    folder, weight_map = Path(folder), {}
    if any(folder.glob("model*.safetensors*")):
        raise InputError(f"{folder}: has safetensors already, and nothing is overwritten")
    for path in sorted(folder.glob("pytorch_model*.bin")):
        target = path.with_name(path.stem.removeprefix("pytorch_") + ".safetensors")
        with reading(path):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
                raise ValueError(f"holds {', '.join(tensors)[:100]}, expected tensors alone")
            # Copies: safetensors takes none in the memory of another, as of a tied head.
            tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_tensors(target, tensors)
        weight_map |= dict.fromkeys(tensors, target.name)
        print(f"{path.name} -> {target.name}  {len(tensors)} tensors")
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "convert":
        sys.exit("usage: python model.py convert DIR")
    sys.exit(exit_status(convert, sys.argv[2]))
