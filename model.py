"""A decoder-only transformer from scratch that reads and writes published BLOOM and Baichuan checkpoints.

    model = load_model("bloom-7b1/", device="cuda")          # safetensors, one file or shards
    logits = model(ids, mask)                                # [B, T] -> [B, T, V]
    new_ids = model.generate(ids, mask, max_new_tokens=128, eos_id=2, beams=4)

    python model.py convert Baichuan2-7B-Base/               # pytorch_model*.bin -> safetensors, beside them

Letters: B sentences, T tokens, D hidden size, F neurons of one feed-forward layer, V vocabulary, L layers, H heads,
d = D / H head size.

In this file: errors; Config and the families (the only place that knows BLOOM from Baichuan: a reader of config.json
and a map of tensor names each); positions; the layers; the Decoder; generation; loading, saving, converting.
"""

import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Errors


class InputError(ValueError):
    """The user's files or arguments are wrong; the message is one line that names what was found and expected."""


def exit_status(command, *arguments):
    """Run a command for the shell: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        command(*arguments)
        return 0
    except (InputError, OSError, SafetensorError) as error:  # the latter two: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def read_json(path):
    """The JSON object in a file. InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


@contextmanager
def replacing(path):
    """Write to a temporary name beside `path` and rename at the end, so that no half-written file ever has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path, tensors):
    """Write a safetensors file whole or not at all."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------------
# Config and families


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know. Every difference between families is one of these fields."""

    family: str  # key into FAMILIES: how tensors are named
    vocab_size: int  # V, rows of the embedding; a tokenizer may fill fewer
    hidden_size: int  # D
    ffn_size: int  # F
    layers: int  # L
    heads: int  # H
    positions: str  # "alibi" or "rotary"
    norm: str  # "layer" (with bias) or "rms"
    norm_eps: float
    embedding_norm: bool  # a norm right after the embedding
    residual_after_norm: bool  # the residual is the norm's output, not its input
    query_key_value: str  # rows of the fused projection: "interleaved" (H, 3, d) or "stacked" (3, H, d)
    gated: bool  # feed-forward: silu(gate) * up, else tanh-GELU(up)
    bias: bool  # the linear layers have biases
    head: str  # "tied" to the embedding, "plain", or "normalized" (unit rows)
    published: dict  # config.json as it was read; save_model writes it back

    @classmethod
    def from_folder(cls, folder):
        """Read config.json of a published checkpoint. InputError names what is missing or unknown."""
        path = Path(folder) / "config.json"
        return cls.from_json(read_json(path), path)

    @classmethod
    def from_json(cls, published, where="config.json"):
        """Config from the contents of a config.json; `where` names it in errors."""
        family = published.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"{where}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
        try:
            config = cls(family=family, published=published, **FAMILIES[family].read(published))
        except KeyError as error:
            raise InputError(f"{where}: no {error.args[0]}") from None
        for size in ("vocab_size", "hidden_size", "ffn_size", "layers", "heads"):
            if not isinstance(getattr(config, size), int) or getattr(config, size) < 1:
                raise InputError(f"{where}: {size} is {getattr(config, size)!r}, expected a positive integer")
        if config.hidden_size % config.heads:
            raise InputError(f"{where}: hidden size {config.hidden_size} does not divide into {config.heads} heads")
        return config


class Family(NamedTuple):
    read: Callable  # contents of config.json -> the fields of Config; a KeyError names a missing key
    names: dict  # our module -> the published one, "{}" for the layer; a tuple is concatenated along the rows
    prefix: str = ""  # may stand before every published name
    drops: str = "(?!)"  # regex of tensors that files may have and the model does not need


def first_of(published, *keys):
    """The first key that is there and not null. {"n_embed": 8, "hidden_size": 4}, "n_embed", "hidden_size" -> 8"""
    for key in keys:
        if published.get(key) is not None:
            return published[key]
    raise KeyError(" or ".join(keys))


def read_bloom(published):
    """BLOOM's config.json: published (n_embed, num_attention_heads) or re-saved (hidden_size, n_head)."""
    hidden_size = first_of(published, "n_embed", "hidden_size")
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=hidden_size,
        ffn_size=4 * hidden_size,
        layers=first_of(published, "n_layer", "num_hidden_layers"),
        heads=first_of(published, "n_head", "num_attention_heads"),
        positions="alibi",
        norm="layer",
        norm_eps=published.get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        residual_after_norm=published.get("apply_residual_connection_post_layernorm", False),
        query_key_value="interleaved",
        gated=False,
        bias=True,
        head="tied" if published.get("tie_word_embeddings", True) else "plain",
    )


def read_baichuan(published):
    """Baichuan's config.json, v1 and v2, 7B and 13B: the files do not say which, their keys and sizes do."""
    rotary = published.get("max_position_embeddings") is not None
    normalized = published["vocab_size"] == 125696
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=published["hidden_size"],
        ffn_size=published["intermediate_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        positions=published.get("positions", "rotary" if rotary else "alibi"),
        norm="rms",
        norm_eps=published.get("rms_norm_eps", 1e-6),
        embedding_norm=False,
        residual_after_norm=False,
        # The trap: W_pack has the shape of BLOOM's fused weight, so a mix-up loads cleanly and computes garbage.
        query_key_value="stacked",
        gated=True,
        bias=False,
        head="normalized" if published.get("normalize_head", normalized) else "plain",
    )


FAMILIES = {
    "bloom": Family(
        read=read_bloom,
        names={
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
        },
        prefix="transformer.",
        drops=r"lm_head\.weight",  # re-saved files may repeat the tied embedding
    ),
    "baichuan": Family(
        read=read_baichuan,
        names={
            "embedding": "model.embed_tokens",
            "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
            "blocks.{}.attention.query_key_value": "model.layers.{}.self_attn.W_pack",
            "blocks.{}.attention.output": "model.layers.{}.self_attn.o_proj",
            "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
            "blocks.{}.ffn.gate": "model.layers.{}.mlp.gate_proj",
            "blocks.{}.ffn.up": "model.layers.{}.mlp.up_proj",
            "blocks.{}.ffn.down": "model.layers.{}.mlp.down_proj",
            "final_norm": "model.norm",
            "head": "lm_head",
        },
        drops=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # recomputed, in fp32
    ),
}


def published_names(family, parameter):
    """The tensors of a checkpoint that make up one of our parameters.

    bloom, "blocks.3.ffn.up.bias" -> ["h.3.mlp.dense_h_to_4h.bias"]
    """
    module, kind = parameter.rsplit(".", 1)
    layer = re.search(r"\d+", module)
    names = FAMILIES[family].names[re.sub(r"\d+", "{}", module)]
    names = (names,) if isinstance(names, str) else names
    return [f"{name.format(layer and layer[0])}.{kind}" for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def alibi_slopes(heads):
    """ALiBi's slope of each head (Press et al. 2022; BLOOM, Baichuan-13B). H -> [H], fp32

    4 -> [1/4, 1/16, 1/64, 1/256]. Where H is no power of two: those of the closest lower power c, then every other
    slope of the 2c series.
    """
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


def attention_bias(config, mask, queries, keys, device, dtype):
    """What is added to the attention scores of the last `queries` of `keys` tokens: position and who may see whom.

    mask [B, keys] or None -> [1 or B, 1 or H, queries, keys], or None where causal order alone decides.

    Real tokens are contiguous, so the distance of two ranks among them is the distance of their indices.
    """
    if config.positions == "rotary" and mask is None:
        return None
    key = torch.arange(keys, device=device)
    distance = key[keys - queries :, None] - key  # [queries, keys]
    seen = (distance >= 0)[None, None]
    if mask is not None:
        # A padding query sees itself: with nothing to see its softmax is NaN, and 0 * NaN poisons the next layer.
        seen = seen & mask[:, None, None, :] | (distance == 0)
    bias = torch.zeros((), device=device)
    if config.positions == "alibi":
        # Relative and in fp32: an absolute slope * position is off by up to 5 in bf16, for near keys too.
        bias = -alibi_slopes(config.heads).to(device)[:, None, None] * distance
    return torch.where(seen, bias, -torch.inf).to(dtype)


def rotary_angles(config, mask, queries, keys, device):
    """Cosines and sines of the last `queries` of `keys` tokens (Su et al. 2021; Baichuan-7B), base 10000.

    mask [B, keys] or None -> two of [1 or B, 1, queries, d], fp32
    """
    positions = torch.arange(keys, device=device)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    head_size = config.hidden_size // config.heads
    frequencies = 1 / 10000 ** (torch.arange(0, head_size, 2, device=device).float() / head_size)
    angles = positions[:, None, keys - queries :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x, cosines, sines):
    """Rotate each half-split pair (x[i], x[i + d/2]) of a head by its angle, in fp32. [B, H, T, d] -> [B, H, T, d]"""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cosines + torch.cat([-second, first], dim=-1) * sines).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight: the mean square in fp32, cast back before the weight multiplies (Baichuan). [.., D]"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def make_norm(config):
    # nn.LayerNorm needs no visible cast: its kernels take 16-bit input to fp32 inside and round once, at the end.
    norm = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return norm(config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, bias, angles, cache, layer):
        """[B, T, D] -> [B, T, D]. The softmax runs in fp32 inside scaled_dot_product_attention."""
        B, T, D = x.shape
        H = self.config.heads
        if self.config.query_key_value == "interleaved":
            parts = self.query_key_value(x).view(B, T, H, 3, D // H).unbind(3)
        else:
            parts = self.query_key_value(x).view(B, T, 3, H, D // H).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # [B, H, T, d] each
        if angles is not None:
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, bias, is_causal=bias is None and T > 1)
        return self.output(mixed.transpose(1, 2).reshape(B, T, D))


def activation(up, gate=None):
    """The neurons' activations h, what down reads: gated SiLU (Baichuan) or tanh-GELU (BLOOM). [.., F] -> [.., F]"""
    return F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up


class FFN(nn.Module):
    """Feed-forward layer. Neuron i is row i of up (and gate) and column i of down; the layer is a sum over neurons."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]"""
        return self.down(activation(self.up(x), None if self.gate is None else self.gate(x)))


class Block(nn.Module):
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
        x = (normed if self.residual_after_norm else x) + self.attention(normed, bias, angles, cache, layer)
        normed = self.ffn_norm(x)
        return (normed if self.residual_after_norm else x) + self.ffn(normed)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


class Cache:
    """Keys and values so far, allocated once: [L, 2, rows, H, T, d]. `mask` [rows, T], None where all is real."""

    def __init__(self, store, mask, rows, length=0):
        self.store, self.mask, self.rows, self.length = store, mask, rows, length

    def part(self, first, last, start):
        """A cache over the same memory: rows from first to last, tokens from `start` on."""
        mask = None if self.mask is None else self.mask[first:last, start:]
        return Cache(self.store[:, :, first:last, :, start:], mask, last - first)

    def append(self, layer, key, value):
        """Store a layer's new keys and values, [rows, H, new, d]; return all so far, [2, rows, H, length + new, d]."""
        end = self.length + key.shape[2]
        store = self.store[layer, :, : self.rows]
        store[0, :, :, self.length : end] = key
        store[1, :, :, self.length : end] = value
        return store[:, :, :, :end]

    def select(self, sources, start=0):
        """Row r becomes what row sources[r] was, from token `start` on; rows that stay in place are not copied."""
        self.rows = len(sources)
        moved = (sources != torch.arange(self.rows, device=sources.device)).nonzero().flatten()
        if len(moved):
            span = slice(start, self.length)
            self.store[:, :, moved, :, span] = self.store[:, :, sources[moved], :, span]
        if self.mask is not None:
            self.mask = self.mask[sources]


PREFILL_ROWS = 16  # prompts that generate reads at a time


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head. New weights are N(0, 0.02), biases zero; load_model reads published ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        if config.head != "tied":
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name and not parameter.is_meta:
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)

    def hidden_states(self, ids, mask=None, cache=None):
        """The final norm's output, what the head reads. ids [B, T], mask [B, T] or None -> [B, T, D]

        mask is True on real tokens, which are contiguous: left or right padding. With a cache, ids are the tokens
        after those in the cache, and the cache knows the mask.
        """
        if cache is not None:
            keys = cache.length + ids.shape[1]
            mask = None if cache.mask is None else cache.mask[:, :keys]
        else:
            keys = ids.shape[1]
            if mask is not None and mask[:, 0].all():
                mask = None  # right padding: causal order already hides it from every real token
        x = self.embedding_norm(self.embedding(ids))
        bias = attention_bias(self.config, mask, ids.shape[1], keys, ids.device, x.dtype)
        rotary = self.config.positions == "rotary"
        angles = rotary_angles(self.config, mask, ids.shape[1], keys, ids.device) if rotary else None
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, angles, use_reentrant=False)
            else:
                x = block(x, bias, angles, cache, layer)
        if cache is not None:
            cache.length = keys
        return self.final_norm(x)

    def head_weight(self, vocab_size=None):
        """The head's first `vocab_size` rows (default: all) and the norms to divide its logits by ([V] fp32, or None).

        Dividing logits by the row's norm is the normalized head of Baichuan2 without a second copy of the weight.
        """
        weight = (self.embedding if self.config.head == "tied" else self.head).weight[:vocab_size]
        if self.config.head != "normalized":
            return weight, None
        return weight, torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)

    def logits(self, hidden, head=None):
        """[.., D] -> [.., V]. `head` is head_weight()'s result, where it is used more than once."""
        weight, norms = head or self.head_weight()
        logits = F.linear(hidden, weight)
        return logits if norms is None else (logits / norms).to(logits.dtype)

    def forward(self, ids, mask=None):
        """Logits of the next token at every position. ids [B, T], mask [B, T] or None -> [B, T, V]"""
        return self.logits(self.hidden_states(ids, mask))

    @torch.inference_mode()
    def generate(self, ids, mask, max_new_tokens, eos_id, beams=1, vocab_size=None):
        """Continue prompts: greedy, or beam search by log-probability divided by length (eos counted).

        ids, mask [B, T], padded on either side -> list of B lists of new ids, at most max_new_tokens each, eos
        excluded. vocab_size: only ids below it are emitted; pass the tokenizer's, embeddings may have more rows.
        """
        B = len(ids)
        if B == 0 or max_new_tokens == 0:
            return [[] for _ in range(B)]
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        ids, mask = ids[order], mask[order]
        T = int(lengths[0])
        left = mask.long().argsort(dim=1, stable=True)[:, -T:]  # padding to the left: all rows share the newest column
        ids, mask = ids.gather(1, left), mask.gather(1, left)

        weight, head = self.embedding.weight, self.head_weight(vocab_size)
        size = self.config.layers, 2, B * beams, self.config.heads, T + max_new_tokens
        store = weight.new_empty(*size, self.config.hidden_size // self.config.heads)
        cache = Cache(store, None if mask.all() else F.pad(mask, (0, max_new_tokens), value=True), B, T)

        def next_logits(ids, cache=cache):
            return self.logits(self.hidden_states(ids, cache=cache)[:, -1], head)

        logits = []
        for i in range(0, B, PREFILL_ROWS):  # prompts of like length together, so that little padding is computed
            end, start = min(i + PREFILL_ROWS, B), T - int(lengths[i])
            store[:, :, i:end, :, :start] = 0  # masked, but what was never written may be NaN, and 0 * NaN is NaN
            logits.append(next_logits(ids[i:end, start:], cache.part(i, end, start)))
        search = greedy_search if beams == 1 else beam_search
        new, lengths = search(next_logits, torch.cat(logits), cache, max_new_tokens, eos_id, beams)
        back = order.argsort()
        return [row[:length] for row, length in zip(new[back].tolist(), lengths[back].tolist())]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def survivors(alive):
    """The order that keeps the rows in `alive` with the fewest moves: holes are filled from the end. [B] bool -> [n]

    [True, False, True, True] -> [0, 3, 2]
    """
    kept = alive.nonzero().flatten()
    order = torch.arange(len(kept), device=alive.device)
    order[~alive[: len(kept)]] = kept[kept >= len(kept)]
    return order


def greedy_search(next_logits, logits, cache, max_new_tokens, eos_id, beams=1):
    """The prompts' next logits [B, V] -> new ids [B, max_new_tokens], lengths [B]. Finished sentences leave."""
    sentence = torch.arange(len(logits), device=logits.device)  # of each live row
    new = sentence.new_zeros(len(logits), max_new_tokens)
    lengths = torch.full_like(sentence, max_new_tokens)
    for step in range(max_new_tokens):
        token = logits.max(-1).indices  # argmax, several times faster on the CPU
        new[sentence, step] = token
        alive = token != eos_id
        if not alive.all():
            lengths[sentence[~alive]] = step
            order = survivors(alive)
            cache.select(order)
            sentence, token = sentence[order], token[order]
        if len(sentence) == 0 or step + 1 == max_new_tokens:
            break
        logits = next_logits(token[:, None])
    return new, lengths


def beam_search(next_logits, logits, cache, max_new_tokens, eos_id, beams):
    """The prompts' next logits [B, V] -> new ids [B, max_new_tokens], lengths [B]: the best log-probability / length.

    A sentence ends when `beams` hypotheses have ended, each among the best `beams` candidates of its step, and no live
    one scores higher so far. Beam 0 follows the greedy path while that lives, so the result never scores below it.
    """
    B, device = len(logits), logits.device
    prompt_length = cache.length
    sentence = torch.arange(B, device=device)  # [S] the S live sentences
    tokens = sentence.new_zeros(B, beams, max_new_tokens)  # [S, beams, max_new_tokens]
    total = torch.full((B, beams), -torch.inf, device=device)  # [S, beams] log-probability
    total[:, 0] = 0
    ended = torch.zeros_like(sentence)  # [S] how many hypotheses have ended
    greedy = torch.ones_like(sentence, dtype=torch.bool)  # [S] beam 0 is the greedy path
    best_score = total[:, -1].clone()
    best, best_length = torch.zeros_like(tokens[:, 0]), torch.zeros_like(sentence)

    def offer(score, beam, length):
        """Keep the hypotheses of the S live sentences, score [S], beam [S], that beat the best so far."""
        better = score > best_score[sentence]
        rows = sentence[better]
        best_score[rows], best_length[rows] = score[better], length
        best[rows] = tokens[better, beam[better]]

    cache.select(sentence.repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)
    for step in range(max_new_tokens):
        S = len(sentence)
        candidates = total[:, :, None] + logits.float().log_softmax(-1).view(S, beams, -1)  # [S, beams, V]
        greedy_token = candidates[:, 0].argmax(-1)
        greedy &= greedy_token != eos_id
        greedy_total = candidates[greedy, 0, greedy_token[greedy]]

        ending = candidates[:, :, eos_id].clone()  # [S, beams]
        score, beam = (ending / (step + 1)).max(1)
        offer(score, beam, step)

        candidates[:, :, eos_id] = -torch.inf
        candidates[greedy, 0, greedy_token[greedy]] = torch.inf  # first in line, whatever it scores
        total, choice = candidates.flatten(1).topk(beams)
        total[greedy, 0] = greedy_total
        beam, token = choice // candidates.shape[2], choice % candidates.shape[2]
        tokens = tokens.gather(1, beam[:, :, None].expand_as(tokens))
        tokens[:, :, step] = token
        if step + 1 == max_new_tokens:
            offer(*(total / max_new_tokens).max(1), max_new_tokens)
            break

        above = (torch.cat([total, ending], 1)[:, None] > ending[:, :, None]).sum(-1)  # candidates better than each
        ended = ended + ((above < beams) & ending.isfinite()).sum(1)
        done = (ended >= beams) & (best_score[sentence] >= total.amax(1) / (step + 1)) & ~greedy
        order = survivors(~done)
        if len(order) == 0:
            break
        kept_in_place = len(order) == S  # then only what was generated differs between the beams of a sentence
        cache.select((order[:, None] * beams + beam[order]).flatten(), start=prompt_length if kept_in_place else 0)
        sentence, tokens, total, ended, greedy = (x[order] for x in (sentence, tokens, total, ended, greedy))
        logits = next_logits(token[order].view(-1, 1))
    return best, best_length


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def checkpoint_files(folder):
    """The safetensors files of a checkpoint folder: model.safetensors, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no weight_map")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                raise InputError(f"{index}: shard {shard!r} is not a file name in its own folder")
        return [folder / shard for shard in sorted(set(weight_map.values()))]
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{folder}: only .bin files, expected safetensors; run: python model.py convert {folder}")
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def load_model(folder, device="cpu", dtype=None):
    """Read a published BLOOM or Baichuan checkpoint folder: safetensors, one file or shards. -> Decoder

    dtype None keeps the checkpoint's. Files are memory-mapped and tensors go one by one to `device`; on the CPU, in the
    checkpoint's own dtype, they are not copied at all. InputError lists every missing, unexpected and misshapen tensor.
    """
    folder = Path(folder)
    config = Config.from_folder(folder)
    family = FAMILIES[config.family]
    files = {path: open_safetensors(path) for path in checkpoint_files(folder)}
    found, unexpected = {}, []  # name without prefix -> (file, name, shape, dtype)
    for path, file in files.items():
        for name in file.keys():
            short = name.removeprefix(family.prefix)
            if short in found:
                unexpected.append(f"{name} (twice)")
            view = file.get_slice(name)
            found[short] = path, name, view.get_shape(), view.get_dtype()

    with torch.device("meta"):
        model = Decoder(config)
    wanted = {name: published_names(config.family, name) for name, _ in model.named_parameters()}
    missing, misshapen = [], []
    for parameter, names in wanted.items():
        rows, *rest = model.get_parameter(parameter).shape
        for name in names:
            if name not in found:
                missing.append(name)
                continue
            _, _, shape, kind = found[name]
            if shape != [rows // len(names), *rest] or kind not in ("F16", "BF16", "F32"):
                misshapen.append(f"{name} {kind} {shape}, expected 16- or 32-bit float {[rows // len(names), *rest]}")
    used = {name for names in wanted.values() for name in names}
    unexpected += [name for name in found if name not in used and not re.fullmatch(family.drops, name)]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{folder}: tensors do not fit config.json; {listed}")

    def read(name):
        path, name, shape, _ = found[name]
        # An open file keeps in memory every page read through it, so a large tensor opens it anew.
        file = open_safetensors(path) if torch.Size(shape).numel() > 1 << 20 else files[path]
        return file.get_tensor(name)

    dtype = dtype or read(published_names(config.family, "embedding.weight")[0]).dtype
    state = {}
    for parameter, names in wanted.items():
        pieces = [read(name).to(device).to(dtype) for name in names]
        state[parameter] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    model.load_state_dict(state, assign=True)
    return model


def save_model(model, folder):
    """Write config.json and model.safetensors in the family's published layout, each by renaming a finished file."""
    config = model.config
    tensors = {}
    for parameter, value in model.named_parameters():
        names = published_names(config.family, parameter)
        tensors.update((name, piece.contiguous()) for name, piece in zip(names, value.detach().chunk(len(names))))
    published = {key: value for key, value in config.published.items() if key != "torch_dtype"}
    published["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(Path(folder) / "config.json", published)
    write_tensors(Path(folder) / "model.safetensors", tensors)


def convert(folder):
    """Turn pytorch_model*.bin shards into safetensors beside them, one at a time, memory-mapped; runs no code in them.

    pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors, with an index where there are several.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise InputError(f"{folder}: no pytorch_model*.bin to convert")
    weight_map, total_size = {}, 0
    for shard in shards:
        target = folder / (shard.stem.removeprefix("pytorch_") + ".safetensors")
        try:
            tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        except Exception as error:  # torch raises many kinds for a file that is not its own
            reason = str(error).split("\n")[0]
            raise InputError(f"{shard}: not a PyTorch file of plain tensors in the zip format ({reason})") from None
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
