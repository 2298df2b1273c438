"""A decoder-only transformer from scratch that reads and writes published checkpoints.

    model = load_model("bloom-7b1/", device="cuda")             # any of FAMILIES, safetensors
    logits = model(ids, mask)                                   # [B, T] -> [B, T, V]
    new_ids = model.generate(ids, mask, max_new_tokens=128, eos_id=2, beams=4)

    python model.py convert Baichuan2-7B-Base/                  # pytorch_model*.bin -> safetensors

In this file: Config and the families (the only place that knows BLOOM from LLaMA: a reader of
config.json and a map of tensor names each); positions; the layers, with FFN.part; the Decoder;
generation; loading, saving, converting.

Letters: B sentences, T tokens, D hidden size, F neurons of one feed-forward layer, V vocabulary,
L layers, H heads, H_kv heads of keys and values, d head size.
"""

import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import InputError, exit_status, open_safetensors, read_json, write_json, write_tensors


# --------------------------------------------------------------------------------------------------
# Config and families


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know: every difference between families is a field here."""

    family: str  # key into FAMILIES: how tensors are named
    vocab_size: int  # V, rows of the embedding; a tokenizer may fill fewer
    hidden_size: int  # D
    ffn_size: int  # F
    layers: int  # L
    heads: int  # H
    kv_heads: int  # H_kv, of keys and values: query head h reads number h // (H / H_kv)
    head_size: int  # d
    positions: str  # "alibi" or "rotary"
    norm: str  # "layer" (with bias) or "rms"
    norm_eps: float
    embedding_norm: bool  # a norm right after the embedding
    residual_after_norm: bool  # the residual is the norm's output, not its input
    query_key_value: (
        str  # rows of the fused projection: "interleaved" (H, 3, d) or "stacked" (3, H, d)
    )
    query_key_value_bias: bool
    output_bias: bool  # of attention
    gated: bool  # feed-forward: silu(gate) * up, else tanh-GELU(up)
    ffn_bias: bool
    head: str  # "tied" to the embedding, "plain", or "normalized" (unit rows)
    max_length: int  # tokens that the model was made for
    published: dict  # config.json as it was read; save_model writes it back
    rotary_base: float = 10000.0
    rotary_scaling: dict | None = None  # as config.json has it, of type linear or llama3
    window: int | None = None  # tokens that attention sees; longer input is refused

    @classmethod
    def from_folder(cls, folder):
        """Read a checkpoint's config.json. InputError names what is missing, wrong or unknown."""
        path = Path(folder) / "config.json"
        return cls.from_json(read_json(path, {}), path)

    @classmethod
    def from_json(cls, published, where="config.json"):
        """Config from the contents of a config.json; `where` names it in errors."""
        name = published.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            expected = f"expected one of {', '.join(FAMILIES)}"
            raise InputError(f"{where}: model_type is {name!r}, {expected}")
        family = FAMILIES[name]
        for key in SWITCHES:
            if type(published.get(key, True)) is not bool:
                raise InputError(f"{where}: {key} is {published[key]!r}, expected true or false")
        try:
            config = cls(family=name, published=published, **family.read(published))
        except KeyError as error:
            raise InputError(f"{where}: no {error.args[0]}") from None
        except (TypeError, ZeroDivisionError):
            raise InputError(f"{where}: a size is no number") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        config.check(where)
        # What would be another function must not be passed over.
        for key in ("quantization_config", *family.refuses):
            if published.get(key) is not None:
                raise InputError(f"{where}: {key} is set, which is not supported")
        activation = published.get("hidden_act", family.activation)
        if activation != family.activation:
            expected = f"expected {family.activation!r}"
            raise InputError(f"{where}: hidden_act is {activation!r}, {expected}")
        return config

    def check(self, where):
        """InputError for fields that no model can have."""
        sizes = "vocab_size", "hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_size"
        for name in (*sizes, "max_length"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size < 2**24:
                raise InputError(f"{where}: {name} is {size!r}, expected a positive integer")
        if self.heads % self.kv_heads:
            found = f"{self.heads} heads do not divide into {self.kv_heads} of keys and values"
            raise InputError(f"{where}: {found}")
        if self.positions not in ("alibi", "rotary"):
            raise InputError(f"{where}: positions is {self.positions!r}, expected alibi or rotary")
        if self.positions == "rotary" and self.head_size % 2:
            found = f"heads of {self.head_size} numbers"
            raise InputError(f"{where}: {found}, expected an even number for rotary positions")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            found = f"sliding_window is {self.window!r}"
            raise InputError(f"{where}: {found}, expected a positive integer or null")
        if type(self.norm_eps) is not float or not 0 < self.norm_eps < 1:
            raise InputError(f"{where}: norm_eps is {self.norm_eps!r}, expected a small number")


# Keys of config.json that are true, false or absent.
SWITCHES = ("apply_residual_connection_post_layernorm", "tie_word_embeddings", "normalize_head")
SWITCHES += ("attention_bias", "mlp_bias", "use_sliding_window")


class Family(NamedTuple):
    """How a family's files are read: its config.json, and the names of its tensors."""

    read: Callable  # contents of config.json -> fields of Config; a KeyError names a missing key
    names: dict  # our module -> the published one, "{}" for the layer; a tuple: rows concatenated
    prefix: str = ""  # may stand before every published name
    drops: str = "(?!)"  # regex of tensors that files may have and the model does not need
    activation: str = "silu"  # what hidden_act says, where config.json has it
    refuses: tuple = ("rope_scaling",)  # keys of config.json that must not be set


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
        positions="alibi",
        norm="layer",
        norm_eps=published.get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        residual_after_norm=published.get("apply_residual_connection_post_layernorm", False),
        query_key_value="interleaved",
        query_key_value_bias=True,
        output_bias=True,
        gated=False,
        ffn_bias=True,
        head="tied" if published.get("tie_word_embeddings", True) else "plain",
        max_length=published.get("seq_length", 2048),
    )


def read_baichuan(published):
    """Baichuan's config.json, v1 and v2, 7B and 13B.

    The files do not say which they are: the 13B models, with ALiBi, lack max_position_embeddings,
    and only v2, with its normalized head, has 125696 rows. `positions` and `normalize_head` are
    keys of this project's own small checkpoints, where neither sign holds.
    """
    rotary = published.get("max_position_embeddings") is not None
    normalized = published["vocab_size"] == 125696
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=published["hidden_size"],
        ffn_size=published["intermediate_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        kv_heads=published["num_attention_heads"],
        head_size=split_heads(published["hidden_size"], published["num_attention_heads"]),
        positions=published.get("positions", "rotary" if rotary else "alibi"),
        norm="rms",
        norm_eps=published.get("rms_norm_eps", 1e-6),
        embedding_norm=False,
        residual_after_norm=False,
        # The trap: W_pack has the shape of BLOOM's fused weight, so that a mix-up loads cleanly
        # and computes garbage.
        query_key_value="stacked",
        query_key_value_bias=False,
        output_bias=False,
        gated=True,
        ffn_bias=False,
        head="normalized" if published.get("normalize_head", normalized) else "plain",
        max_length=published.get("max_position_embeddings")
        or published.get("model_max_length", 4096),
    )


ROTARY_SCALINGS = {  # what each kind needs
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def read_rotary(published):
    """Base and scaling of rotary positions, in either spelling. -> fields of Config"""
    # rope_parameters: of files saved since transformers 5.
    scaling = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"rope_scaling is {scaling!r}, expected an object")
    base = scaling.get("rope_theta", published.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROTARY_SCALINGS:
        raise InputError(f"rope_scaling of type {kind!r}, expected {', '.join(ROTARY_SCALINGS)}")
    for name in ROTARY_SCALINGS[kind]:
        if not isinstance(scaling[name], (int, float)) or scaling[name] <= 0:
            raise InputError(f"rope_scaling: {name} is {scaling[name]!r}, expected a number")
    if not isinstance(base, (int, float)) or base <= 1:
        raise InputError(f"rope_theta is {base!r}, expected a number above 1")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError("rope_scaling: low_freq_factor is not below high_freq_factor")
    scaling = None if kind == "default" else scaling | {"rope_type": kind}
    return dict(rotary_base=float(base), rotary_scaling=scaling)


def read_llama(published):
    """LLaMA's config.json: LLaMA 1 to 3, ALMA, Tower. Absent keys mean what transformers says."""
    hidden_size, heads = published["hidden_size"], published["num_attention_heads"]
    bias = published.get("attention_bias", False)
    return dict(
        vocab_size=published["vocab_size"],
        hidden_size=hidden_size,
        ffn_size=published["intermediate_size"],
        layers=published["num_hidden_layers"],
        heads=heads,
        kv_heads=published.get("num_key_value_heads") or heads,
        head_size=published.get("head_dim") or split_heads(hidden_size, heads),
        positions="rotary",
        norm="rms",
        norm_eps=published.get("rms_norm_eps", 1e-6),
        embedding_norm=False,
        residual_after_norm=False,
        query_key_value="stacked",
        query_key_value_bias=bias,
        output_bias=bias,
        gated=True,
        ffn_bias=published.get("mlp_bias", False),
        head="tied" if published.get("tie_word_embeddings", False) else "plain",
        max_length=published.get("max_position_embeddings", 2048),
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
    if published.get("use_sliding_window", False):
        fields["window"] = published.get("sliding_window", 4096)
    return fields


LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.query_key_value": tuple(
        f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"
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

LLAMA = Family(
    read=read_llama,
    names=LLAMA_NAMES,
    drops=rf"{INVERSE_FREQUENCIES}|lm_head\.weight",  # a file may repeat a tied head
    refuses=(),
)

FAMILIES = {
    "bloom": Family(
        read=read_bloom,
        activation="gelu",
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
        names=LLAMA_NAMES
        | {"blocks.{}.attention.query_key_value": "model.layers.{}.self_attn.W_pack"},
        drops=INVERSE_FREQUENCIES,
    ),
    "llama": LLAMA,
    "mistral": LLAMA._replace(read=read_mistral),
    "qwen2": LLAMA._replace(read=read_qwen2),
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


def piece_rows(config, parameter, names):
    """How many rows of a parameter each of its published tensors has: all, or query, key, value."""
    if len(names) == 1:
        return [len(parameter)]
    return [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]


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
# Layers


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

    zero_rows = zero_columns = 0  # that a product in 16 bits adds to the weight
    ready = None  # what operands() gave, while nothing changes: see cast_once

    def reset_parameters(self):
        """Nothing: the Decoder fills new weights, and load_model and FFN.part bring their own."""

    def operands(self, dtype):
        """Weight and bias as a product in that type takes them."""
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if dtype.itemsize == 2 and self.zero_rows + self.zero_columns:
            weight = functional.pad(weight, (0, self.zero_columns, 0, self.zero_rows))
            bias = None if bias is None else functional.pad(bias, (0, self.zero_rows))
        return weight, bias

    def forward(self, x):
        """[.., in] -> [.., out]"""
        return functional.linear(x, *(self.ready or self.operands(x.dtype)))


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
NEURON_DIMENSION = {"gate.weight": 0, "gate.bias": 0, "up.weight": 0, "up.bias": 0}
NEURON_DIMENSION |= {"down.weight": 1}


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
        part(a)(x) + part(b)(x) + down.bias = ffn(x), where a and b are all neurons. In 16 bits zero
        neurons, which add nothing and learn nothing, fill it up to a multiple of 8: fast matrix
        kernels need rows of 16 bytes.
        """
        with torch.device("meta"):
            part = FFN(replace(self.config, ffn_size=len(index)))
        part.down.bias = None
        index = torch.tensor(index, dtype=torch.long, device=self.up.weight.device)
        own = {}
        for name, weight in self.state_dict().items():
            if name in NEURON_DIMENSION:
                own[name] = weight.index_select(NEURON_DIMENSION[name], index).to(dtype)
        part.load_state_dict(own, assign=True)
        part.up.zero_rows = part.down.zero_columns = -len(index) % 8
        if part.gate is not None:
            part.gate.zero_rows = part.up.zero_rows
        return part

    @torch.no_grad()
    def put(self, index, part):
        """Write a part back to where it came from: the inverse of part(index)."""
        index = torch.tensor(index, dtype=torch.long, device=self.up.weight.device)
        own = self.state_dict()
        for name, weight in part.state_dict().items():
            own[name].index_copy_(NEURON_DIMENSION[name], index, weight.to(own[name].dtype))


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

        ids, mask [B, T], padded on either side. A continuation ends at eos, with a token that ends
        its line if line_ends (of data.py) says where lines end, and after max_new_tokens, a number
        or one for each prompt. vocab_size: only ids below it are emitted (pass the tokenizer's,
        since an embedding may have more rows).
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

        def next_logits(token):
            """The newest token of each row, [rows, 1] -> logits of the one after it, [rows, V]"""
            return self.logits(self.hidden_states(token, cache=cache)[:, -1], head)

        search = greedy_search if beams == 1 else beam_search
        room = int(limits.max()), beams
        with cast_once(self):
            cache, logits = read_prompts(self, head, ids[order], mask[order], *room)
            ends = Ends(eos_id, line_ends, logits.shape[1], device)
            new, lengths = search(next_logits, logits, cache, limits[order], ends, beams)
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

    def __init__(self, stores, mask, rows, length=0):
        self.stores, self.mask, self.rows, self.length = stores, mask, rows, length

    @classmethod
    def empty(cls, model, rows, tokens, mask=None):
        """New memory for that many tokens of that many rows."""
        shape = 2, rows, model.config.kv_heads, tokens, model.config.head_size
        stores = [model.embedding.weight.new_empty(shape) for _ in model.blocks]
        return cls(stores, mask, rows)

    def part(self, first, last, start, length):
        """A cache over the same memory: rows from first to last, tokens from `start` on."""
        stores = [store[:, first:last, :, start:] for store in self.stores]
        mask = None if self.mask is None else self.mask[first:last, start:]
        return Cache(stores, mask, last - first, length)

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
                own = store[:, :, :, start : self.length]
                own[:, moved] = own[:, sources[moved]]
        if self.mask is not None:
            self.mask = self.mask[sources]


PROMPTS_AT_ONCE = 32


def read_prompts(model, head, ids, mask, max_new_tokens, beams):
    """Fill a new cache with prompts, sorted by length, the longest first. ids, mask [B, T]

    What all of them begin with, as the prompts of one pair do, is read once.
    -> the cache, with room for `beams` rows a prompt; logits of the first new token, [B, V]
    """
    B, lengths = len(ids), mask.sum(1)
    T, shortest = int(lengths[0]), int(lengths[-1])
    begins = ids.gather(1, mask.long().argsort(dim=1, descending=True, stable=True))[:, :shortest]
    same = (begins == begins[0]).all(0)[:-1]  # a token is left to read, which has the logits
    shared = int(same.cumprod(0).sum()) if B > 1 else 0
    # All padding to the left, so that the newest column is every row's last token.
    real_columns = mask.long().argsort(dim=1, stable=True)[:, -T:]
    ids, mask = ids.gather(1, real_columns), mask.gather(1, real_columns)
    padding = T - lengths  # [B]
    prefix = Cache.empty(model, 1, shared)
    if shared:
        model.hidden_states(ids[:1, :shared], cache=prefix)

    real = None if mask.all() else functional.pad(mask, (0, max_new_tokens), value=True)
    cache = Cache.empty(model, B * beams, T + ROOM, real)
    cache.rows, cache.length = B, T
    logits = []
    for first in range(0, B, PROMPTS_AT_ONCE):
        rows = slice(first, min(first + PROMPTS_AT_ONCE, B))
        start = int(padding[first])  # the columns before are padding in all of these rows
        column = torch.arange(start + shared, device=ids.device)
        place = column - padding[rows, None]  # in the prefix; padding where negative
        for store, own in zip(cache.stores, prefix.stores):
            known = store[:, rows, :, : start + shared].transpose(1, 2)  # [2, H_kv, rows, T, d]
            # Padding is masked, but memory that was never written may be NaN, and 0 * NaN is NaN.
            known.zero_()
            known[:, :, place >= 0] = own[:, 0][:, :, place[place >= 0]]
        part = cache.part(rows.start, rows.stop, start, shared)
        hidden = model.hidden_states(ids[rows, start + shared :], cache=part)
        logits.append(model.logits(hidden[:, -1], head))
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
    """Which tokens end a continuation: eos, and whatever ends its line (LineEnds, or None)."""

    def __init__(self, eos_id, line_ends, vocab_size, device):
        self.eos_id = eos_id
        tables = torch.zeros(3, vocab_size, dtype=torch.bool)
        if line_ends is not None:
            tables = torch.stack(line_ends)
        self.visible = tables[0].to(device)  # [V]
        self.ending = tables[1:].to(device)  # [2, V]: before the line has begun, and after
        self.ending[:, eos_id] = True

    def all(self, begun):
        """Of every token, whether it would end the line. begun [..] bool -> [.., V] bool

        begun: whether the line shows something already; what comes before that is skipped.
        """
        return self.ending[begun.long()]

    def of(self, token, begun):
        """Whether `token` ends the line, [..] bool; and whether the line has begun with it."""
        return self.ending[begun.long(), token], begun | self.visible[token]


def greedy_search(next_logits, logits, cache, limits, ends, beams=1):
    """The likeliest token, again and again; finished sentences leave.

    logits of the first new token [B, V], limits [B] -> new ids [B, largest limit], lengths [B]
    """
    sentence = torch.arange(len(logits), device=logits.device)  # which one each live row is
    begun = torch.zeros_like(sentence, dtype=torch.bool)  # whether its line has
    new = sentence.new_zeros(len(logits), int(limits.max()))
    lengths = limits.clone()
    for step in range(new.shape[1]):
        token = logits.max(-1).indices  # argmax, several times faster on the CPU
        new[sentence, step] = token
        ended, begun = ends.of(token, begun)
        alive = ~ended & (limits > step + 1)
        if not alive.all():
            lengths[sentence[ended]] = step + (token[ended] != ends.eos_id)
            order = survivors(alive)
            cache.select(order)
            sentence, token = sentence[order], token[order]
            begun, limits = begun[order], limits[order]
        if len(sentence) == 0:
            break
        logits = next_logits(token[:, None])
    return new, lengths


def beam_search(next_logits, logits, cache, limits, ends, beams):
    """The continuation of highest log-probability a token that `beams` parallel ones come upon.

    A sentence ends at its limit, or when `beams` hypotheses have ended, each among the best `beams`
    candidates of its step, and no live one scores higher so far. Beam 0 follows the greedy path
    while that lives, so the result never scores below it.

    logits of the first new token [B, V], limits [B] -> new ids [B, largest limit], lengths [B]
    """
    B, V, device = *logits.shape, logits.device
    prompt_length = cache.length
    sentence = torch.arange(B, device=device)  # [S] the S live sentences
    tokens = sentence.new_zeros(B, beams, int(limits.max()))  # [S, beams, largest limit]
    begun = torch.zeros(B, beams, dtype=torch.bool, device=device)  # [S, beams]
    total = torch.full((B, beams), -torch.inf, device=device)  # [S, beams] log-probability
    total[:, 0] = 0
    finished = torch.zeros_like(sentence)  # [S] how many hypotheses have ended
    greedy = torch.ones_like(sentence, dtype=torch.bool)  # [S] beam 0 is the greedy path
    best_score = total[:, -1].clone()
    best, best_length = torch.zeros_like(tokens[:, 0]), torch.zeros_like(sentence)

    def offer(score, hypothesis, length):
        """Keep what beats the best: a hypothesis for each live sentence, [S, largest limit]."""
        better = score > best_score[sentence]
        rows = sentence[better]
        best_score[rows], best_length[rows] = score[better], length[better]
        best[rows] = hypothesis[better]

    cache.select(sentence.repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)
    for step in range(tokens.shape[2]):
        S = len(sentence)
        row = torch.arange(S, device=device)
        likelihood = logits.float().log_softmax(-1).view(S, beams, V)
        candidates = total[:, :, None] + likelihood  # [S, beams, V]
        greedy_total, greedy_token = candidates[:, 0].max(-1)  # [S]
        greedy = greedy & ~ends.of(greedy_token, begun[:, 0])[0]

        # The likeliest way for each beam to end here; the best of them may be the best so far.
        ending = ends.all(begun)  # [S, beams, V]
        end_total, end_token = candidates.masked_fill(~ending, -torch.inf).max(-1)  # [S, beams]
        score, beam = (end_total / (step + 1)).max(1)
        hypothesis = tokens[row, beam]
        hypothesis[:, step] = end_token[row, beam]
        offer(score, hypothesis, step + (hypothesis[:, step] != ends.eos_id))

        # The likeliest ways to go on.
        candidates.masked_fill_(ending, -torch.inf)
        candidates[greedy, 0, greedy_token[greedy]] = torch.inf  # first in line, whatever it scores
        total, choice = candidates.flatten(1).topk(beams)
        total[greedy, 0] = greedy_total[greedy]
        beam, token = choice // V, choice % V  # [S, beams]
        tokens = tokens.gather(1, beam[:, :, None].expand_as(tokens))
        tokens[:, :, step] = token
        begun = ends.of(token, begun.gather(1, beam))[1]
        at_limit = limits[sentence] == step + 1
        score, longest = (total / (step + 1)).max(1)
        score = score.masked_fill(~at_limit, -torch.inf)
        offer(score, tokens[row, longest], limits[sentence])

        everything = torch.cat([total, end_total], 1)  # [S, 2 * beams]
        better = (everything[:, None] > end_total[:, :, None]).sum(-1)  # than each that ended
        finished = finished + ((better < beams) & end_total.isfinite()).sum(1)
        settled = best_score[sentence] >= total.amax(1) / (step + 1)
        alive = ~at_limit & ~((finished >= beams) & settled & ~greedy)
        order = survivors(alive)
        if len(order) == 0:
            break
        # Where no sentence has left, its beams differ in what was generated alone.
        start = prompt_length if len(order) == S else 0
        cache.select((order[:, None] * beams + beam[order]).flatten(), start)
        sentence, tokens, total, begun = sentence[order], tokens[order], total[order], begun[order]
        finished, greedy = finished[order], greedy[order]
        logits = next_logits(token[order].view(-1, 1))
    return best, best_length


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index, {"weight_map": {}})["weight_map"]
        for shard in weight_map.values():
            if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                raise InputError(f"{index}: shard {shard!r} is not a file name in its own folder")
        return [folder / shard for shard in sorted(set(weight_map.values()))]
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
    """All tensors of a checkpoint by their names without prefix, and the names that occur twice."""
    found, twice = {}, []
    for path in checkpoint_files(folder):
        file = open_safetensors(path)
        for name in file.keys():
            short = name.removeprefix(prefix)
            if short in found:
                twice.append(f"{name} (twice)")
            view = file.get_slice(name)
            found[short] = Stored(path, name, view.get_shape(), view.get_dtype())
    return found, twice


def load_model(folder, device="cpu", dtype=None):
    """Read a published checkpoint folder. -> Decoder

    dtype None keeps the checkpoint's. Files are memory-mapped and tensors go one by one to
    `device`; on the CPU, in the checkpoint's own dtype, they are not copied at all. InputError
    lists every missing, unexpected and misshapen tensor.
    """
    folder = Path(folder)
    config = Config.from_folder(folder)
    family = FAMILIES[config.family]
    found, unexpected = find_tensors(folder, family.prefix)
    if config.layers > len(found):
        raise InputError(f"{folder}: {config.layers} layers in config.json, {len(found)} tensors")
    with torch.device("meta"):
        model = Decoder(config)
    wanted, missing, misshapen = {}, [], []  # wanted: our parameter -> published names
    for parameter, value in model.named_parameters():
        wanted[parameter] = names = published_names(config.family, parameter)
        for name, rows in zip(names, piece_rows(config, value, names)):
            if name not in found:
                missing.append(name)
                continue
            stored, shape = found[name], [rows, *value.shape[1:]]
            if stored.shape != shape or stored.dtype not in ("F16", "BF16", "F32"):
                expected = f"expected 16- or 32-bit float {shape}"
                misshapen.append(f"{name} {stored.dtype} {stored.shape}, {expected}")
    used = set(chain.from_iterable(wanted.values()))
    for name in found:
        if name not in used and not re.fullmatch(family.drops, name):
            unexpected.append(name)
    problems = []
    for kind, names in [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)]:
        if names:
            problems.append(f"{kind}: {', '.join(names)}")
    if problems:
        raise InputError(f"{folder}: tensors do not fit config.json; {'; '.join(problems)}")

    files = {}

    def read(name):
        path, stored_name, shape, _ = found[name]
        # An open file keeps in memory every page read through it: a large tensor opens its own.
        if math.prod(shape) > 2**20:
            return open_safetensors(path).get_tensor(stored_name)
        if path not in files:
            files[path] = open_safetensors(path)
        return files[path].get_tensor(stored_name)

    dtype = dtype or read(wanted["embedding.weight"][0]).dtype
    state = {}
    for parameter, names in wanted.items():
        pieces = [read(name).to(device).to(dtype) for name in names]
        state[parameter] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    model.load_state_dict(state, assign=True)
    return model


def save_model(model, folder):
    """Write config.json and model.safetensors in the family's published layout."""
    config = model.config
    tensors = {}
    for parameter, value in model.named_parameters():
        names = published_names(config.family, parameter)
        for name, piece in zip(names, value.detach().split(piece_rows(config, value, names))):
            tensors[name] = piece.contiguous()
    published = {key: value for key, value in config.published.items() if key != "torch_dtype"}
    published["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
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
