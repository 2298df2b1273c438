"""A decoder-only transformer from scratch that reads and writes published checkpoints.

    model = load_model("bloom-7b1/", device="cuda")             # any of FAMILIES, safetensors
    logits = model(ids, mask)                                   # [B, T] -> [B, T, V]
    new_ids = model.generate(ids, mask, max_new_tokens=128, eos_id=2, beams=4)

    python model.py convert Baichuan2-7B-Base/                  # pytorch_model*.bin -> safetensors

In this file: Config; norms and linear layers; positions; attention, FFN with FFN.part, block; the
Decoder; generation. There the model ends, and what it is read from begins: published checkpoints
(the only place that knows BLOOM from LLaMA), loading, saving, converting.

Letters: B sentences, T tokens, D hidden size, F neurons of one feed-forward layer, V vocabulary,
L layers, H heads, H_kv heads of keys and values, d head size.
"""

import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import InputError, exit_status, open_safetensors, read_json, reading
from data import write_json, write_tensors


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
    positions: str = "rotary"  # or "alibi"
    rotary_base: float = 10000.0
    rotary_scaling: dict | None = None  # as config.json has it, of type linear or llama3
    window: int | None = None  # tokens that attention sees; longer input is refused
    norm: str = "rms"  # or "layer", with bias
    norm_eps: float = 1e-6
    embedding_norm: bool = False  # a norm right after the embedding
    residual_after_norm: bool = False  # the residual is the norm's output, not its input
    query_key_value: str = (
        "stacked"  # rows of the projection: (3, H, d), or "interleaved" (H, 3, d)
    )
    query_key_value_bias: bool = False
    output_bias: bool = False  # of attention
    gated: bool = True  # feed-forward: silu(gate) * up, else tanh-GELU(up)
    ffn_bias: bool = False
    head: str = "plain"  # "tied" to the embedding, "plain", or "normalized" (unit rows)

    @classmethod
    def from_folder(cls, folder):
        """Read a checkpoint's config.json. InputError names what is missing, wrong or unknown."""
        path = Path(folder) / "config.json"
        return cls.from_json(read_json(path), path)

    @classmethod
    def from_json(cls, published, where="config.json"):
        """Config from the contents of a config.json; `where` names it in errors."""
        with reading(where):
            return read_config(published, where)


# --------------------------------------------------------------------------------------------------
# Norms and linear layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight: in fp32, cast back before the weight multiplies (LLaMA). [.., D]"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def make_norm(config):
    # nn.LayerNorm needs no visible cast: its kernels compute in fp32 and round once, at the end.
    norm = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return norm(config.hidden_size, eps=config.norm_eps)


class Linear(nn.Linear):
    """A linear layer whose weights are cast to the input's type: fp32 masters run in 16 bits."""

    ready = None  # what operands() gave, while cast_once is open

    def reset_parameters(self):
        """Nothing: the Decoder fills new weights, and load_model and FFN.part bring their own."""

    def operands(self, dtype):
        """Weight and bias as a product in that type takes them."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.weight.to(dtype), bias

    def forward(self, x):
        """[.., in] -> [.., out]"""
        weight, bias = self.ready or self.operands(x.dtype)
        return functional.linear(x, weight, bias)


@contextmanager
def cast_once(model):
    """While open, what is cast in each pass is cast once: for many passes in which nothing learns."""
    dtype = model.embedding.weight.dtype
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.ready = linear.operands(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.ready = None


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


def attention_bias(config, mask, queries, keys, device, dtype):
    """What is added to attention scores: how far away a key is (ALiBi), and who may see whom.

    For the last `queries` of `keys` tokens. Real tokens are contiguous, so the distance of two
    ranks among them is the distance of their indices.
    mask [B, keys] or None -> [1 or B, 1 or H, queries, keys], None where causal order decides alone
    """
    if config.positions == "rotary" and mask is None and queries in (1, keys):
        return None
    key = torch.arange(keys, device=device)
    distance = key[keys - queries :, None] - key  # [queries, keys]
    seen = (distance >= 0)[None, None]
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


def rotary_angles(config, mask, queries, keys, device):
    """Cosines and sines of the last `queries` of `keys` tokens (Su et al. 2021).

    mask [B, keys] or None -> two of [1 or B, 1, queries, d], fp32
    """
    positions = (
        torch.arange(keys, device=device)[None]
        if mask is None
        else (mask.cumsum(1) - 1).clamp(min=0)
    )
    frequencies = rotary_frequencies(config, device)
    angles = positions[:, None, keys - queries :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


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

    def forward(self, x, bias, angles, cache, layer):
        """[B, T, D] -> [B, T, D]. The softmax runs in fp32 inside scaled_dot_product_attention."""
        B, T, _ = x.shape
        H, H_kv, d = self.config.heads, self.config.kv_heads, self.config.head_size
        if self.config.query_key_value == "interleaved":
            parts = self.query_key_value(x).view(B, T, H, 3, d).unbind(3)
        else:
            parts = self.query_key_value(x).view(B, T, -1, d).split([H, H_kv, H_kv], dim=2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # [B, H or H_kv, T, d] each
        if angles is not None:
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        causal = bias is None and T > 1
        mixed = functional.scaled_dot_product_attention(
            query, key, value, bias, is_causal=causal, enable_gqa=H != H_kv
        )
        return self.output(mixed.transpose(1, 2).reshape(B, T, H * d))


# The weights of a neuron, and which dimension of each counts the neurons: neuron i is row i of gate
# and up with their biases, and column i of down. down.bias belongs to no neuron.
NEURON_DIMENSION = {
    "gate.weight": 0,
    "gate.bias": 0,
    "up.weight": 0,
    "up.bias": 0,
    "down.weight": 1,
}


class FFN(nn.Module):
    """Feed-forward layer: tanh-GELU (BLOOM) or gated SiLU (all others). It is a sum over its neurons.

    h_i = gelu(up[i] . x + up.bias[i])  or  silu(gate[i] . x) * (up[i] . x)        a neuron
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
        if self.gate is None:
            h = functional.gelu(self.up(x), approximate="tanh")  # [B, T, F]
        else:
            h = functional.silu(self.gate(x)) * self.up(x)  # [B, T, F]
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
    """Attention, then feed-forward, each on the norm of the residual stream x and added to it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FFN(config)
        self.residual_after_norm = config.residual_after_norm

    def forward(self, x, bias=None, angles=None, cache=None, layer=None):
        """[B, T, D] -> [B, T, D]"""
        normed = self.attention_norm(x)
        attended = self.attention(normed, bias, angles, cache, layer)
        x = (normed if self.residual_after_norm else x) + attended
        normed = self.ffn_norm(x)
        return (normed if self.residual_after_norm else x) + self.ffn(normed)


# --------------------------------------------------------------------------------------------------
# The decoder


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head. New weights are N(0, 0.02), biases zero."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute blocks in the backward pass, keep inputs alone
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        if config.head != "tied":
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.is_meta or "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

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
        if self.config.window is not None and keys > self.config.window:
            found = f"{keys} tokens, {self.config.family} attends to {self.config.window} at once"
            raise InputError(f"{found} (sliding_window), which is not supported")
        x = self.embedding_norm(self.embedding(ids))  # [B, T, D]
        bias = attention_bias(self.config, mask, new, keys, ids.device, x.dtype)
        angles = None
        if self.config.positions == "rotary":
            angles = rotary_angles(self.config, mask, new, keys, ids.device)
        for layer, block in enumerate(self.blocks):
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
        logits = functional.linear(hidden, weight)
        return logits if norms is None else (logits / norms).to(logits.dtype)

    @torch.inference_mode()
    def generate(self, ids, mask, max_new_tokens, eos_id, beams=1, vocab_size=None, line_ends=None):
        """Continue prompts: greedy, or beam search by log-probability a token, the last one counted.

        ids, mask [B, T], padded on either side. A continuation ends at eos_id (an id, or several),
        with a token that ends its line if line_ends (of data.py) says where lines end, and after
        max_new_tokens, a number or one for each prompt. vocab_size: only ids below it are emitted
        (pass the tokenizer's, since an embedding may have more rows).
        -> list of B lists of new ids, eos excluded
        """
        B, device = len(ids), ids.device
        limits = torch.as_tensor(max_new_tokens, device=device).expand(B)
        if B == 0 or limits.max() == 0:
            return [[] for _ in range(B)]
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        order = mask.sum(1).argsort(descending=True, stable=True)  # long prompts first
        head = self.head_weight(vocab_size)
        with cast_once(self):
            cache, logits = read_prompts(
                self, head, ids[order], mask[order], int(limits.max()), beams
            )

            def next_logits(token):
                """The newest token of each row, [rows, 1] -> logits of the one after it, [rows, V]"""
                return self.logits(self.hidden_states(token, cache=cache)[:, -1], head)

            ends = Ends(eos_id, line_ends, logits.shape[1], device)
            search = next_logits, logits, cache, limits[order], ends
            new, lengths = greedy_search(*search) if beams == 1 else beam_search(*search, beams)
        continuations = [None] * B
        for b, row, length in zip(order.tolist(), new.tolist(), lengths.tolist()):
            continuations[b] = row[:length]
        return continuations


# --------------------------------------------------------------------------------------------------
# Generation
#
# The idea is four lines: read the prompt; take the likeliest next token; append it; repeat until
# end-of-sentence. What follows is that, fast: keys and values of earlier tokens are cached, prompts
# of like length are read together, and finished sentences leave the batch. The tests hold it
# against the four lines.


ROOM = 32  # tokens by which a cache grows


class Cache:
    """Keys and values so far, of each layer [2, rows, H_kv, room for T, d]; mask [rows, T] or None.

    Most translations end long before their limit: room for the new tokens is made as they come.
    """

    def __init__(self, stores, mask, rows):
        self.stores, self.mask, self.rows, self.length = stores, mask, rows, 0

    @classmethod
    def empty(cls, model, rows, tokens, mask=None):
        """New memory for that many tokens of that many rows."""
        shape = 2, rows, model.config.kv_heads, tokens, model.config.head_size
        stores = [model.embedding.weight.new_empty(shape) for _ in model.blocks]
        return cls(stores, mask, rows)

    def part(self, first, last, start):
        """An empty cache over the same memory: rows from first to last, tokens from `start` on."""
        stores = [store[:, first:last, :, start:] for store in self.stores]
        mask = None if self.mask is None else self.mask[first:last, start:]
        return Cache(stores, mask, last - first)

    def append(self, layer, key, value):
        """Store a layer's new keys and values, [rows, H_kv, new, d] each.

        -> all of this layer so far, [2, rows, H_kv, length + new, d]
        """
        end, store = self.length + key.shape[2], self.stores[layer][:, : self.rows]
        if end > store.shape[3]:
            self.stores[layer] = functional.pad(store, (0, 0, 0, ROOM))
            store = self.stores[layer]
        store[0, :, :, self.length : end] = key
        store[1, :, :, self.length : end] = value
        return store[:, :, :, :end]

    def select(self, sources, start=0):
        """Row r becomes what row sources[r] was, from token `start` on; the others are dropped."""
        self.rows = len(sources)
        stays = sources == torch.arange(self.rows, device=sources.device)
        moved = (~stays).nonzero().flatten()
        if len(moved):
            for store in self.stores:
                changing = store[:, :, :, start : self.length]
                changing[:, moved] = changing[:, sources[moved]]
        if self.mask is not None:
            self.mask = self.mask[sources]


PROMPTS_AT_ONCE = 32


def read_prompts(model, head, ids, mask, max_new_tokens, beams):
    """Fill a new cache with prompts, sorted by length, the longest first. ids, mask [B, T]

    -> the cache, of `beams` rows a prompt; logits of the first new token, [B, V]
    """
    B, T = len(ids), int(mask[0].sum())
    # All padding to the left, so that the newest column is every row's last token.
    real_columns = mask.long().argsort(dim=1, stable=True)[:, -T:]
    ids, mask = ids.gather(1, real_columns), mask.gather(1, real_columns)
    real = None if mask.all() else functional.pad(mask, (0, max_new_tokens), value=True)
    cache = Cache.empty(model, B * beams, T + ROOM, real)
    logits = []
    for first in range(0, B, PROMPTS_AT_ONCE):
        last = min(first + PROMPTS_AT_ONCE, B)
        start = T - int(mask[first].sum())  # the columns before are padding in all of these rows
        for store in cache.stores:
            # Padding is masked, but memory that was never written may be NaN, and 0 * NaN is NaN.
            store[:, first:last, :, :start] = 0
        chunk = cache.part(first, last, start)
        hidden = model.hidden_states(ids[first:last, start:], cache=chunk)
        logits.append(model.logits(hidden[:, -1], head))
    cache.rows, cache.length = B, T
    return cache, torch.cat(logits)


def survivors(alive):
    """The order that keeps the rows in `alive` with the fewest moves: the last ones fill the holes.

    [B] bool -> [n]; [True, False, True, True] -> [0, 3, 2]
    """
    kept = alive.nonzero().flatten()
    order = torch.arange(len(kept), device=alive.device)
    order[~alive[: len(kept)]] = kept[kept >= len(kept)]
    return order


class Ends:
    """Which tokens end a continuation: eos_id, one or several, and what ends its line (LineEnds)."""

    def __init__(self, eos_id, line_ends, vocab_size, device):
        self.eos = torch.zeros(vocab_size, dtype=torch.bool)  # [V]
        for token in [eos_id] if isinstance(eos_id, int) else eos_id:
            self.eos[token] = True
        self.visible = torch.zeros_like(self.eos)  # [V]
        self.ending = self.eos.repeat(2, 1)  # [2, V]: before the line shows something, and after
        if line_ends is not None:
            self.visible = line_ends.visible
            self.ending |= torch.stack([line_ends.ends_before, line_ends.ends_after])
        self.eos, self.visible = self.eos.to(device), self.visible.to(device)
        self.ending = self.ending.to(device)


def greedy_search(next_logits, logits, cache, limits, ends):
    """The likeliest token, again and again; finished sentences leave.

    logits of the first new token [B, V], limits [B] -> new ids [B, largest limit], lengths [B]
    """
    sentence = torch.arange(len(logits), device=logits.device)  # which one each live row is
    begun = torch.zeros_like(sentence, dtype=torch.bool)  # whether its line shows something
    new = sentence.new_zeros(len(logits), int(limits.max()))
    lengths = limits.clone()
    for step in range(new.shape[1]):
        token = logits.max(-1).indices  # argmax, several times faster on the CPU
        new[sentence, step] = token
        ended = ends.ending[begun.long(), token]
        begun = begun | ends.visible[token]
        alive = ~ended & (limits > step + 1)
        if not alive.all():
            lengths[sentence[ended]] = step + (~ends.eos[token[ended]]).long()
            order = survivors(alive)
            cache.select(order)
            sentence, token = sentence[order], token[order]
            begun, limits = begun[order], limits[order]
        if len(sentence) == 0:
            break
        logits = next_logits(token[:, None])
    return new, lengths


def beam_search(next_logits, logits, cache, limits, ends, beams):
    """The likeliest continuation, by log-probability a token, that `beams` parallel ones find.

    Each step scores every token after each of the `beams` live hypotheses of a sentence. Of the best
    `beams` of these candidates, those that end are finished hypotheses. The best `beams` that do
    not end live on. A sentence is done at its limit, which ends every candidate, or when `beams`
    hypotheses have finished and no live one has a better score so far than the worst of them. It is
    what transformers does with num_beams, length_penalty 1 and early_stopping False.

    logits of the first new token [B, V], limits [B] -> new ids [B, largest limit], lengths [B]
    """
    B, V = logits.shape
    prompt_length = cache.length
    sentence = torch.arange(B, device=logits.device)  # [S] the S live sentences
    tokens = sentence.new_zeros(B, beams, int(limits.max()))  # [S, beams, largest limit]
    begun = torch.zeros_like(tokens[:, :, 0], dtype=torch.bool)  # [S, beams]
    total = logits.new_full(
        (B, beams), -torch.inf, dtype=torch.float32
    )  # [S, beams] log-probability
    finished = total.clone()  # [S, beams] the best scores of what has ended, the highest first
    total[:, 0] = 0  # the beams are alike at first: one alone is continued
    best, best_length = torch.zeros_like(tokens[:, 0]), torch.zeros_like(sentence)
    cache.select(sentence.repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)

    for step in range(tokens.shape[2]):
        S = len(sentence)
        row = torch.arange(S, device=logits.device)
        at_limit = limits == step + 1  # [S]
        ending = ends.ending[begun.long()]  # [S, beams, V]
        candidates = logits.float().log_softmax(-1).view(S, beams, V) + total[:, :, None]

        score, choice = candidates.flatten(1).topk(beams)  # [S, beams]
        ended = ending.flatten(1).gather(1, choice) | at_limit[:, None]
        score = (score / (step + 1)).masked_fill(~ended, -torch.inf)
        top_score, top = score.max(1)  # [S]
        better = top_score > finished[:, 0]
        beam, token = choice[row, top] // V, choice[row, top] % V
        hypothesis = tokens[row, beam]
        hypothesis[:, step] = token
        best[sentence[better]] = hypothesis[better]
        best_length[sentence[better]] = step + (~ends.eos[token[better]]).long()
        finished = torch.cat([finished, score], 1).topk(beams).values

        total, choice = candidates.masked_fill_(ending, -torch.inf).flatten(1).topk(beams)
        beam, token = choice // V, choice % V  # [S, beams]
        tokens = tokens.gather(1, beam[:, :, None].expand_as(tokens))
        tokens[:, :, step] = token
        begun = begun.gather(1, beam) | ends.visible[token]

        alive = ~at_limit & (total[:, 0] / (step + 1) > finished[:, -1])
        order = survivors(alive)
        if len(order) == 0:
            break
        # Where no sentence has left, its beams differ in what was generated alone.
        start = prompt_length if len(order) == S else 0
        cache.select((order[:, None] * beams + beam[order]).flatten(), start)
        sentence, limits, tokens = sentence[order], limits[order], tokens[order]
        begun, total, finished = begun[order], total[order], finished[order]
        logits = next_logits(token[order].view(-1, 1))
    return best, best_length


# --------------------------------------------------------------------------------------------------
# Published checkpoints


# A family is a reader of its config.json, and a map of names: our module to the published one, "{}"
# for the layer. Where query, key and value are three tensors, their rows are concatenated.


def switch(published, key, default=False):
    """A key of config.json that is true, false or absent."""
    value = published.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} is {value!r}, expected true or false")
    return value


def first_of(published, *keys):
    """The first key that is there and not null.

    {"n_embed": 8, "hidden_size": 4}, "n_embed", "hidden_size" -> 8
    """
    for key in keys:
        if published.get(key) is not None:
            return published[key]
    raise KeyError(" or ".join(keys))


def split_heads(hidden_size, heads):
    """-> head size. InputError where heads do not divide the hidden size."""
    if hidden_size % heads:
        raise InputError(f"hidden size {hidden_size} does not divide into {heads} heads")
    return hidden_size // heads


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


def read_bloom(published):
    """BLOOM's config.json, published (n_embed, num_attention_heads) or re-saved (hidden_size)."""
    hidden_size = first_of(published, "n_embed", "hidden_size")
    heads = first_of(published, "n_head", "num_attention_heads")
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        layers=first_of(published, "n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=split_heads(hidden_size, heads),
        max_length=published.get("seq_length", 2048),
        positions="alibi",
        norm="layer",
        norm_eps=published.get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        residual_after_norm=switch(published, "apply_residual_connection_post_layernorm"),
        query_key_value="interleaved",
        query_key_value_bias=True,
        output_bias=True,
        gated=False,
        ffn_bias=True,
        head="tied" if switch(published, "tie_word_embeddings", True) else "plain",
    )


LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.query_key_value": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.output": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.ffn.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
INVERSE_FREQUENCIES = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # recomputed, in fp32


def read_sizes(published):
    """The keys that LLaMA and all that came after it share. -> fields of Config"""
    heads = published["num_attention_heads"]
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=published["hidden_size"],
        ffn_size=published["intermediate_size"],
        layers=published["num_hidden_layers"],
        heads=heads,
        kv_heads=published.get("num_key_value_heads") or heads,
        head_size=published.get("head_dim") or split_heads(published["hidden_size"], heads),
        norm_eps=published.get("rms_norm_eps", 1e-6),
    )


def read_baichuan(published):
    """Baichuan's config.json, v1 and v2, 7B and 13B.

    The files do not say which they are: the 13B models, with ALiBi, lack max_position_embeddings,
    and only v2, with its normalized head, has 125696 rows. `positions` and `normalize_head` are
    keys of this project's own small checkpoints, where neither sign holds.

    The trap: W_pack has the shape of BLOOM's fused weight, but its rows are stacked, not interleaved.
    A mix-up loads cleanly and computes garbage.
    """
    length = published.get("max_position_embeddings")
    normalized = switch(published, "normalize_head", published["vocab_size"] == 125696)
    return read_sizes(published) | dict(
        max_length=length or published.get("model_max_length", 4096),
        positions=published.get("positions", "rotary" if length else "alibi"),
        head="normalized" if normalized else "plain",
    )


def read_llama(published):
    """LLaMA's config.json: LLaMA 1 to 3, ALMA, Tower. Absent keys mean what transformers says."""
    bias = switch(published, "attention_bias")
    return read_sizes(published) | dict(
        max_length=published.get("max_position_embeddings", 2048),
        query_key_value_bias=bias,
        output_bias=bias,
        ffn_bias=switch(published, "mlp_bias"),
        head="tied" if switch(published, "tie_word_embeddings") else "plain",
        **read_rotary(published),
    )


def read_mistral(published):
    """Mistral's config.json. Without num_key_value_heads it has 8, without sliding_window 4096."""
    fields = read_llama({"num_key_value_heads": 8, "max_position_embeddings": 131072} | published)
    return fields | {"window": published.get("sliding_window", 4096)}


def read_qwen2(published):
    """Qwen2's config.json. Query, key and value have biases, and no key says so."""
    fields = read_llama({"num_key_value_heads": 32, "max_position_embeddings": 32768} | published)
    fields |= {"query_key_value_bias": True, "output_bias": False, "ffn_bias": False}
    if switch(published, "use_sliding_window"):
        fields["window"] = published.get("sliding_window", 4096)
    return fields


ROTARY_SCALINGS = {  # what each kind needs
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def read_rotary(published):
    """Base and scaling of rotary positions, in either spelling. -> fields of Config"""
    # rope_parameters: of files saved since transformers 5.
    scaling = published.get("rope_parameters") or published.get("rope_scaling") or {}
    base = scaling.get("rope_theta", published.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROTARY_SCALINGS:
        raise InputError(f"rope_scaling of type {kind!r}, expected {', '.join(ROTARY_SCALINGS)}")
    for name in ROTARY_SCALINGS[kind]:
        if not scaling[name] > 0:
            raise InputError(
                f"rope_scaling: {name} is {scaling[name]!r}, expected a number above 0"
            )
    if not base > 1:
        raise InputError(f"rope_theta is {base!r}, expected a number above 1")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError("rope_scaling: low_freq_factor is not below high_freq_factor")
    scaling = None if kind == "default" else scaling | {"rope_type": kind}
    return dict(rotary_base=float(base), rotary_scaling=scaling)


class Family(NamedTuple):
    """How a family's files are read: its config.json, and the names of its tensors."""

    read: Callable  # contents of config.json -> fields of Config; a KeyError names a missing key
    names: dict  # our module -> the published one, "{}" for the layer; a tuple: rows concatenated
    prefix: str = ""  # may stand before every published name
    drops: str = "(?!)"  # regex of tensors that files may have and the model does not need
    activation: str = "silu"  # what hidden_act says, where config.json has it
    refuses: tuple = ()  # keys of config.json that must not be set


# A file may repeat a tied head.
LLAMA = Family(read_llama, LLAMA_NAMES, drops=rf"{INVERSE_FREQUENCIES}|lm_head\.weight")
FAMILIES = {
    "bloom": Family(
        read=read_bloom,
        names=BLOOM_NAMES,
        prefix="transformer.",
        drops=r"lm_head\.weight",
        activation="gelu",
        refuses=("rope_scaling",),
    ),
    "baichuan": Family(
        read=read_baichuan,
        names=LLAMA_NAMES
        | {"blocks.{}.attention.query_key_value": "model.layers.{}.self_attn.W_pack"},
        drops=INVERSE_FREQUENCIES,
        refuses=("rope_scaling",),
    ),
    "llama": LLAMA,
    "mistral": LLAMA._replace(read=read_mistral),
    "qwen2": LLAMA._replace(read=read_qwen2),
}


def read_config(published, where):
    """The contents of a config.json -> Config. What would be another function is refused by name."""
    name = published.get("model_type")
    if name not in list(FAMILIES):
        raise InputError(f"{where}: model_type is {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    try:
        config = Config(family=name, published=published, **family.read(published))
        check_config(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for key in ("quantization_config", *family.refuses):
        if published.get(key) is not None:
            raise InputError(f"{where}: {key} is set, which is not supported")
    activation = published.get("hidden_act", family.activation)
    if activation != family.activation:
        raise InputError(f"{where}: hidden_act is {activation!r}, expected {family.activation!r}")
    return config


SIZES = ("vocab_size", "hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_size")


def check_config(config):
    """InputError for fields that no model can have."""
    for name in (*SIZES, "max_length"):
        size = getattr(config, name)
        if type(size) is not int or not 1 <= size < 2**24:
            raise InputError(f"{name} is {size!r}, expected a positive integer")
    window = config.window
    if window is not None and (type(window) is not int or window < 1):
        raise InputError(f"sliding_window is {window!r}, expected a positive integer or null")
    if config.heads % config.kv_heads:
        raise InputError(
            f"{config.heads} heads do not divide into {config.kv_heads} of keys and values"
        )
    if config.positions not in ("alibi", "rotary"):
        raise InputError(f"positions is {config.positions!r}, expected alibi or rotary")
    if config.positions == "rotary" and config.head_size % 2:
        raise InputError(
            f"heads of {config.head_size} numbers, expected an even number for rotary positions"
        )
    if type(config.norm_eps) is not float or not 0 < config.norm_eps < 1:
        raise InputError(f"norm_eps is {config.norm_eps!r}, expected a small number")


def published_names(family, parameter):
    """The tensors of a checkpoint that make up one of our parameters.

    bloom, "blocks.3.ffn.up.bias" -> ["h.3.mlp.dense_h_to_4h.bias"]
    """
    module, kind = parameter.rsplit(".", 1)
    layer = re.search(r"\d+", module)
    names = FAMILIES[family].names[re.sub(r"\d+", "{}", module)]
    names = (names,) if isinstance(names, str) else names
    return [f"{name.format(layer and layer[0])}.{kind}" for name in names]


def to_published(config, parameter, value):
    """A parameter as the tensors of a checkpoint, by name: query, key and value may be three."""
    names = published_names(config.family, parameter)
    if len(names) == 1:
        return {names[0]: value}
    rows = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return dict(zip(names, value.split(rows)))


# --------------------------------------------------------------------------------------------------
# Loading, saving, converting


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        with reading(index):
            shards = sorted(set(read_json(index)["weight_map"].values()))
            for shard in shards:
                if not shard or Path(shard).name != shard:
                    raise InputError(f"{index}: shard {shard!r} is not a file in its own folder")
            return [folder / shard for shard in shards]
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder}: only .bin files, expected safetensors; "
            f"run: python model.py convert {folder}"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    name: str  # in the file
    shape: list
    dtype: str  # as safetensors spells it: F16, BF16, F32, ...


def find_tensors(folder, prefix):
    """All tensors of a checkpoint, by their names without prefix. -> {name: Stored}"""
    found = {}
    for path in checkpoint_files(folder):
        file = open_safetensors(path)
        for name in file.keys():
            short = name.removeprefix(prefix)
            if short in found:
                short = f"{name} (twice)"  # which is no name of a model's: it is unexpected
            view = file.get_slice(name)
            found[short] = Stored(path, name, view.get_shape(), view.get_dtype())
    return found


def check_tensors(folder, found, wanted, drops):
    """One InputError that lists every missing, unexpected and misshapen tensor.

    found: {name: Stored}; wanted: {name: tensor}; drops: regex of what may be passed over
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and not re.fullmatch(drops, name)]
    misshapen = []
    for name in wanted.keys() - missing:
        stored, shape = found[name], list(wanted[name].shape)
        if stored.shape != shape or stored.dtype not in ("F16", "BF16", "F32"):
            misshapen.append(
                f"{name} {stored.dtype} {stored.shape}, expected 16- or 32-bit float {shape}"
            )
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": sorted(misshapen)}
    listed = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise InputError(f"{folder}: tensors do not fit config.json; {'; '.join(listed)}")


def read_tensor(stored, opened):
    """One tensor, memory-mapped. opened: {path: file}, the files that small tensors share."""
    # An open file keeps in memory every page read through it: a large tensor opens its own.
    if math.prod(stored.shape) > 2**20:
        return open_safetensors(stored.path).get_tensor(stored.name)
    if stored.path not in opened:
        opened[stored.path] = open_safetensors(stored.path)
    return opened[stored.path].get_tensor(stored.name)


def load_model(folder, device="cpu", dtype=None, config=None):
    """Read a published checkpoint folder. -> Decoder

    dtype None keeps the checkpoint's; config: its Config, where that was read already. Files are
    memory-mapped and tensors go one by one to `device`; on the CPU, in the checkpoint's own dtype,
    they are not copied at all. InputError lists every missing, unexpected and misshapen tensor.
    """
    folder = Path(folder)
    config = config or Config.from_folder(folder)
    family = FAMILIES[config.family]
    found = find_tensors(folder, family.prefix)
    if config.layers > len(found):
        raise InputError(f"{folder}: {config.layers} layers in config.json, {len(found)} tensors")
    with torch.device("meta"):
        model = Decoder(config)
    wanted = {}  # published name -> a tensor without data
    for parameter, value in model.named_parameters():
        wanted |= to_published(config, parameter, value)
    check_tensors(folder, found, wanted, family.drops)

    opened, state = {}, {}
    for parameter, _ in model.named_parameters():
        pieces = []
        for name in published_names(config.family, parameter):
            piece = read_tensor(found[name], opened)
            dtype = dtype or piece.dtype  # the embedding's, which comes first
            pieces.append(piece.to(device).to(dtype))
        state[parameter] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    model.load_state_dict(state, assign=True)
    return model


def save_model(model, folder):
    """Write config.json and model.safetensors in the family's published layout."""
    tensors = {}
    for parameter, value in model.named_parameters():
        for name, piece in to_published(model.config, parameter, value.detach()).items():
            tensors[name] = piece.contiguous()
    published = {
        key: value for key, value in model.config.published.items() if key != "torch_dtype"
    }
    published["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_json(Path(folder) / "config.json", published)
    write_tensors(Path(folder) / "model.safetensors", tensors)


def convert(folder):
    """Turn pytorch_model*.bin shards into safetensors beside them, running no code in them.

    One at a time, memory-mapped; pytorch_model-00001-of-00002.bin becomes
    model-00001-of-00002.safetensors, with an index where there are several.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise InputError(f"{folder}: no pytorch_model*.bin to convert")
    weight_map, total_size = {}, 0
    for shard in shards:
        target = folder / (shard.stem.removeprefix("pytorch_") + ".safetensors")
        try:
            loaded = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
            tensors = {name: tensor.contiguous() for name, tensor in loaded.items()}
        except Exception as error:  # torch raises many kinds for a file that is not its own
            reason = str(error).split("\n")[0]
            if reason.startswith("Weights only load failed"):
                # What torch says next is to load it all the same: the one thing not to do.
                reason = "it holds objects that running code would make, and none is run"
            expected = "not a PyTorch file of plain tensors in the zip format"
            raise InputError(f"{shard}: {expected} ({reason})") from None
        seen = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:  # a head that is tied to the embedding
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        write_tensors(target, tensors)
        weight_map |= dict.fromkeys(tensors, target.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{shard.name} -> {target.name}  {len(tensors)} tensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "convert":
        sys.exit("usage: python model.py convert DIR")
    sys.exit(exit_status(convert, sys.argv[2]))
