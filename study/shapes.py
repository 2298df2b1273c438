"""Random weights at any shape, for measurements."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import write_json
from model import Config, Decoder

SIZES = "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"
FAMILIES = {
    "bloom": {"model_type": "bloom"},
    "llama": {"model_type": "llama"},
    "baichuan": {"model_type": "baichuan", "max_position_embeddings": 4096},
    "baichuan-13b": {"model_type": "baichuan"},  # ALiBi
}


def shape_config(shape, family="bloom"):
    """ "D,L,H,V" or "D,L,H,V,F" -> Config. LLaMA's as of LLaMA 3: four query heads share a key's."""
    sizes = dict(zip(SIZES, map(int, shape.split(","))))
    published = {"intermediate_size": sizes["hidden_size"] * 7 // 2} | FAMILIES[family] | sizes
    if family == "llama":
        published["num_key_value_heads"] = sizes["num_attention_heads"] // 4
    return Config.from_json(published)


def random_decoder(config, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = Decoder(config).requires_grad_(False)
    torch.set_default_dtype(before)
    return model


def write_shards(tensors, folder, count):
    """As large checkpoints are published: some files and an index. tensors: published name -> tensor"""
    names, weight_map = list(tensors), {}
    for i in range(count):
        of_shard = names[i * len(names) // count : (i + 1) * len(names) // count]
        file = f"model_{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in of_shard}, folder / file)
        weight_map |= dict.fromkeys(of_shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
