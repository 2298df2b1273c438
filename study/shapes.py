"""Random weights at any shape, for measurements."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import write_json
from model import Config, Decoder

FAMILIES = "bloom", "llama"


def shape_config(shape, family="bloom"):
    """ "D,L,H,V" -> Config. LLaMA's as of Mistral and LLaMA 3: four query heads share keys and values."""
    hidden, layers, heads, vocabulary = map(int, shape.split(","))
    published = {"model_type": family, "vocab_size": vocabulary, "hidden_size": hidden}
    published |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "llama":
        published |= {"num_key_value_heads": heads // 4, "intermediate_size": hidden * 7 // 2}
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
        own = names[i * len(names) // count : (i + 1) * len(names) // count]
        file = f"model_{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
