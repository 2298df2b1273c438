"""Published families against transformers, and tokenizers against their libraries.

    python -m pytest checks/test_families.py

Needs transformers and mistral-common, beside what the project needs. What lies in ../shared is
tested where it is there.
"""

import importlib.util
import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import data
import lander
import test_lander
from data import load_tokenizer, make_batch, read_lines, read_parallel, render
from model import load_model, save_model
from test_lander import EXPORT, KINDS, LLAMA3_SCALING, LLAMA_LIKE, arguments, assert_close, one
from test_lander import here, nan_in_new_memory, tokenizer_folders, world  # fixtures
from test_lander import padded_ids, random_ids, randomize, tiny_decoder, up_to_end

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


# --------------------------------------------------------------------------------------------------
# The decoder against transformers


def reference(kind, **options):
    """A small model of transformers with random weights."""
    sizes = dict(vocab_size=90, hidden_size=48, n_layer=3, n_head=4, n_positions=64)
    sizes = sizes if kind in ("bloom", "gpt2") else LLAMA_LIKE
    config = transformers.AutoConfig.for_model(kind, **sizes | options)
    return randomize(transformers.AutoModelForCausalLM.from_config(config))


def load_reference(folder):
    """A published folder as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_published(folder, model, config={}, tensors=dict, **options):
    """What transformers writes; then keys of config.json changed, "gone" for none, and tensors."""
    model.save_pretrained(folder, **options)
    published = json.loads((folder / "config.json").read_text()) | config
    published = {key: value for key, value in published.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(published))
    for path in folder.glob("*.safetensors"):
        save_file(tensors({name: t.clone() for name, t in load_file(path).items()}), path)


def bare(tensors):
    """BLOOM's and GPT-2's as they were published: without a prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    """GPT-2's, with buffers that are no weights."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    return bare(tensors) | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}


def packed(tensors):
    """LLaMA's as Baichuan's, and one that is no weight."""
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn."
        rows = [tensors.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        tensors[f"{attention}W_pack.weight"] = torch.cat(rows)
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


# How BLOOM was published, by its number of heads; n_embed wins.
FOUR = dict(n_embed=48, hidden_size=7, n_head="gone", n_inner=None, num_attention_heads=4)
SIX = FOUR | {"num_attention_heads": 6}
AFTER_NORM = {"apply_residual_connection_post_layernorm": True}
TIED = {"tie_word_embeddings": True}
BIASED = dict(attention_bias=True, mlp_bias=True, head_dim=10, num_key_value_heads=2)
# Rotary positions as transformers 5 spells them, and as it was before.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
LLAMA3 = {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}}
OLD_PLAIN = dict(rope_parameters="gone", rope_theta=1e6, rope_scaling=None)
OLD_LINEAR = dict(rope_parameters="gone", rope_scaling={"type": "linear", "factor": 4.0})
OLD_LLAMA3 = dict(rope_parameters="gone", rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
# What transformers takes for keys that are not there; and the options that those stand for.
LEFT_OUT = """num_key_value_heads rms_norm_eps attention_bias mlp_bias head_dim rope_parameters
    layer_types sliding_window use_sliding_window tie_word_embeddings max_position_embeddings"""
ABSENT = dict.fromkeys(LEFT_OUT.split(), "gone")
MISTRAL = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}
GEMMA3 = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 256}
# Windows that are shorter than the input.
NEAR = {"sliding_window": 9, "num_key_value_heads": 2}
NEAR_QWEN = NEAR | {"use_sliding_window": True, "max_window_layers": 1}
GEMMA = NEAR | {"head_dim": 10, "query_pre_attn_scalar": 24}
CAPPED = GEMMA | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}

FAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
BOTH_BASES = {
    "full_attention": FAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
APART = {"rope_parameters": BOTH_BASES, "tie_word_embeddings": False}
APART["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]

# What a reader or a loader gets wrong at first: kind, options of transformers' config, and how the
# files are written.
CASES = {
    "bloom": ("bloom", {}, dict(config=FOUR, tensors=bare)),
    "6 heads, shards": ("bloom", {"n_head": 6}, dict(config=SIX, max_shard_size="60KB")),
    "12 heads, saved again": ("bloom", {"n_head": 12}, {}),
    "16 bits": ("bloom", {"n_head": 6, "dtype": torch.float16}, dict(config=SIX, tensors=bare)),
    "residual after the norm": ("bloom", AFTER_NORM, dict(config=FOUR, tensors=bare)),
    "baichuan": ("llama", {}, dict(config={"model_type": "baichuan"}, tensors=packed)),
    "2 heads of keys, shards": ("llama", {"num_key_value_heads": 2}, {"max_shard_size": "60KB"}),
    "1, the head tied": ("llama", {"num_key_value_heads": 1} | TIED, {}),
    "biases, heads of another size": ("llama", BIASED, {}),
    "another base, old spelling": ("llama", PLAIN, {"config": OLD_PLAIN}),
    "linear scaling": ("llama", LINEAR, {}),
    "linear scaling, old spelling": ("llama", LINEAR, {"config": OLD_LINEAR}),
    "llama3 scaling": ("llama", LLAMA3, {}),
    "llama3 scaling, old spelling": ("llama", LLAMA3, {"config": OLD_LLAMA3}),
    "llama, absent keys": ("llama", {}, {"config": ABSENT}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, {}),
    "mistral, a window": ("mistral", NEAR, {}),
    "mistral, absent keys": ("mistral", MISTRAL, {"config": ABSENT}),
    "qwen2": ("qwen2", PLAIN | {"num_key_value_heads": 4} | TIED, {}),
    "qwen2, a window": ("qwen2", NEAR_QWEN, {}),
    "qwen3": ("qwen3", PLAIN | {"num_key_value_heads": 2, "head_dim": 10}, {}),
    "qwen3, biases, tied": ("qwen3", {"attention_bias": True} | TIED, {}),
    "gpt2": ("gpt2", {}, {"tensors": with_masks}),
    "gpt2, saved again": ("gpt2", {"n_inner": 100, "tie_word_embeddings": False}, {}),
    "gemma2": ("gemma2", CAPPED, {}),
    "gemma3": ("gemma3_text", GEMMA, {}),
    "gemma3, linear scaling, a head of its own": ("gemma3_text", GEMMA | APART, {}),
    "gemma3, absent keys": ("gemma3_text", GEMMA3, {"config": ABSENT}),
}


def generated(theirs, ids, mask, limit, eos_ids, beams):
    """Rows of new ids, up to their ends, as transformers generates them."""
    options = dict(num_beams=beams, length_penalty=1.0, early_stopping=False, do_sample=False)
    options |= dict(max_new_tokens=limit, pad_token_id=0, eos_token_id=eos_ids or None)
    rows = theirs.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]
    return [up_to_end(row, eos_ids) for row in rows.tolist()]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_new_ids_equal_transformers(tmp_path, case):
    """A slope, norm, interleaving, rotation, group, default, window or scaling of another model."""
    kind, options, files = CASES[case]
    theirs = reference(kind, **options)
    write_published(tmp_path, theirs, **files)
    theirs = theirs.float()  # with the file's rounding
    ours = load_model(tmp_path, dtype=torch.float32)
    for side in ("left", "right"):
        ids, mask = padded_ids(90, side, lengths=(40, 7, 25))
        options = {"attention_mask": mask.long()}
        if kind == "gpt2":  # which counts padding, unless it is told
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        assert_close(ours(ids, mask), theirs(ids, **options).logits, mask)
    ids, mask = padded_ids(90, "left")
    for beams in (1, 3):
        expected = generated(theirs, ids, mask, 20, [89], beams)
        assert ours.generate(ids, mask, 20, eos_id=89, beams=beams) == expected
    save_model(ours, tmp_path / "copy")
    if case != "baichuan":  # of which transformers has no class
        assert torch.equal(load_reference(tmp_path / "copy")(ids).logits, theirs(ids).logits)


def test_baichuan_13b_equals_llama_with_alibi(tmp_path):
    """No class is published: LLaMA without angles, distances in its mask, unit rows in its head."""
    theirs = reference("llama", num_attention_heads=6, num_key_value_heads=6)
    stored = theirs.lm_head.weight.detach().clone()
    config = {"model_type": "baichuan", "normalize_head": True, "positions": "alibi"}
    write_published(tmp_path, theirs, config=config, tensors=packed)
    theirs.lm_head.weight.data = functional.normalize(stored)
    theirs.model.rotary_emb.inv_freq.zero_()
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    distance = torch.arange(40)[:, None] - torch.arange(40)
    bias = torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)[None]
    ids = random_ids((2, 40), 90)
    ours = load_model(tmp_path)
    assert_close(ours(ids), theirs(ids, attention_mask=bias).logits)
    assert torch.equal(ours.head.weight, stored)


def with_images(tensors):
    """Gemma 3's as they lie beside what sees images."""
    return {f"language_model.{name}": t for name, t in tensors.items()} | {"vision_tower.x": one}


def test_of_gemma3_with_images_the_text_part_is_read(tmp_path):
    """Names with another prefix; a config inside a config; an export that no class reads."""
    theirs = reference("gemma3_text", **GEMMA)
    write_published(tmp_path, theirs, tensors=with_images)
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, ours = random_ids((2, 20), 90), load_model(tmp_path)
    assert_close(ours(ids), theirs(ids).logits)
    save_model(ours, tmp_path / "copy")
    assert torch.equal(load_reference(tmp_path / "copy")(ids).logits, theirs(ids).logits)


PUBLISHED = [kind for kind in KINDS if kind not in ("rotary", "alibi")]  # those are Baichuan's
# Small Gemmas say one token again and again: their embedding is scaled, and tied.
VARIED = [kind for kind in KINDS if not kind.startswith("gemma")]


@pytest.mark.parametrize("kind", [kind for kind in PUBLISHED if kind in VARIED])
def test_beam_search_equals_transformers(kind, tmp_path, nan_in_new_memory):
    """A beam without its cache, a hypothesis lost, a length miscounted, a stop too early."""
    rng, ended, not_greedy = random.Random(0), 0, 0
    ids, mask = padded_ids(12, "left", lengths=(5, 11, 3, 7, 8))
    for seed in range(10):
        decoder = tiny_decoder(kind, seed, vocabulary=12)
        save_model(decoder, tmp_path)
        theirs = load_reference(tmp_path)
        for beams in rng.sample(range(2, 9), 3):
            limit, eos_ids = rng.choice([1, 2, 5, 24]), rng.choice([[2], [1, 2, 4, 7], []])
            expected = generated(theirs, ids, mask, limit, eos_ids, beams)
            assert decoder.generate(ids, mask, limit, eos_ids, beams=beams) == expected
            ended += sum(len(row) < limit for row in expected)
            not_greedy += expected != decoder.generate(ids, mask, limit, eos_ids)
    assert ended > 20 and not_greedy > 5, "too easy to test anything"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_greedy_equals_recomputation_in_all_kinds(kind, side, nan_in_new_memory):
    """A key at the wrong place, in a family that the quick tests leave out."""
    test_lander.test_cached_greedy_equals_recomputation(kind, side, None)


@pytest.mark.parametrize("kind", VARIED)
def test_a_line_break_ends_a_translation_in_all_kinds(kind, nan_in_new_memory):
    """A line too many, in a family that the quick tests leave out."""
    test_lander.test_a_line_break_ends_a_translation(kind, None)


@pytest.mark.parametrize("units", ["ffn", "all"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_transformers_loads_what_a_run_exports(world, here, kind, units):
    """A step that knows only BLOOM; a file that only this project reads, or reads otherwise."""
    save_model(tiny_decoder(kind, vocabulary=360, layers=4), here / "weights")
    shutil.copy(world / "weights/tokenizer.json", "weights")
    words = f"--weights weights --steps 4 --no-routing --units {units}"
    assert lander.main(arguments(world, words)) == 0
    assert lander.main(EXPORT) == 0
    ids = random_ids((2, 30), 311)
    exported, base = load_model("exported"), load_model("weights")
    assert_close(exported(ids), load_reference("exported")(ids).logits)
    moved = test_lander.moved_since(test_lander.copies(base), exported)
    assert any("attention" in name for name in moved) == (units == "all")
    assert any("ffn" in name for name in moved)


# --------------------------------------------------------------------------------------------------
# Tokenizers


TEXTS = [
    "Hello, world!  (two spaces)\n\ttabs … 你好，世界。",
    *["", " ", "\n", "end ", "Ġ Ċ ĠĠ", " leading and trailing  ", "1,234.56 a.b@c.com"],
    "a\u00a0b\u3000c\u200bd \u00a0e \u1680\u2028\u2029\ufeff\u180e w",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 ñ n\u0303 ﬁ ½ Ⅷ مرحبا بالعالم हिन्दी।",
    "a <s>text</s> <pad><unk>< s> </s",
]


def assert_framed_as_theirs(ours, prompts_of, lines):
    """Prompts as another library has them, and no seam between a prompt and its target."""
    for line, target in zip(lines, lines[1:]):
        text = data.prompt_text("en-de", line).rstrip(" ")
        prompt, answer = render(ours, "en-de", line, target)
        assert prompt == prompts_of(text), ascii(line)
        if target[:1].strip():  # a text that begins with a space has two behind the prompt
            joined = prompts_of(f"{text} {target}")
            assert [*prompt, *answer] == [*joined, ours.eos_id], ascii(target)


@pytest.mark.parametrize("begins", [True, False])
def test_a_prompt_is_framed_as_in_transformers(tokenizer_folders, tmp_path, begins):
    """Of a template and add_bos_token that differ, one counts."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer_folders["marks"] / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing
    library.post_processor = template("<s> $A" if begins else "$A", special_tokens=[("<s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": not begins}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.prompt_prefix == [1] * begins
    assert_framed_as_theirs(ours, lambda text: theirs(text)["input_ids"], TEXTS)


def real_lines():
    """A hundred lines of six languages, where they are there."""
    folder, lines = SHARED / "data/flores200", list(TEXTS)
    for code in ("en", "de", "fr", "it", "ar", "zh"):
        if folder.exists():
            lines += read_lines(folder / f"test.{code}")[:100]
    return lines


def test_mistrals_tokenizer_model_frames_as_mistrals_library_does(tmp_path):
    """Two spaces or none behind the prompt, a beginning left out: what Mistral never saw."""
    package = Path(importlib.util.find_spec("mistral_common").origin).parent
    path = shutil.copy(package / "data/tokenizer.model.v1", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    theirs, ours = SentencePieceTokenizer(str(path)), load_tokenizer(tmp_path)
    encode = partial(theirs.encode, bos=True, eos=False)
    assert_framed_as_theirs(ours, encode, real_lines())
    assert all(ours.decode(ours.encode(line)) == theirs.decode(encode(line)) for line in TEXTS)


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="no ../shared/tokenizers")
@pytest.mark.parametrize("name", ["bloom-style-16k", "baichuan-style-16k"])
def test_real_tokenizers_agree_with_the_libraries(name):
    """What a vocabulary of 300 does not show: merges of whole words, of other alphabets."""
    folder, lines = SHARED / "tokenizers" / name, real_lines()
    ours, path = load_tokenizer(folder), str(folder / "tokenizer.model")
    if name.startswith("bloom"):
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        assert_framed_as_theirs(ours, lambda text: theirs(text)["input_ids"], lines)
    else:
        theirs = sentencepiece.SentencePieceProcessor(model_file=path)
        assert_framed_as_theirs(ours, theirs.encode, lines)
    assert all(ours.decode(ours.encode(line)) == line for line in lines)


@pytest.mark.skipif(not (SHARED / "checkpoints/bloom-mini").exists(), reason="no bloom-mini")
def test_a_real_checkpoint_translates_as_in_transformers():
    """What random weights do not show: scales, long prompts, ends that are learned."""
    folder = SHARED / "checkpoints/bloom-mini"
    ours, theirs = load_model(folder, dtype=torch.float32), load_reference(folder)
    tokenizer, eos_ids = load_tokenizer(folder), [load_tokenizer(folder).eos_id]
    pairs = read_parallel(SHARED / "data/multi30k", "valid", "en-de")[:8]
    prompts = [render(tokenizer, "en-de", source) for source, _ in pairs]
    ids, mask, _ = make_batch(prompts, tokenizer.pad_id)
    assert_close(ours(ids, mask), theirs(ids, attention_mask=mask.long()).logits, mask)
    for beams in (1, 4):
        new = ours.generate(ids, mask, 48, eos_ids, beams=beams)
        for (prompt, _), found in zip(prompts, new):
            alone = torch.tensor([prompt])
            expected = generated(theirs, alone, torch.ones_like(alone), 48, eos_ids, beams)
            assert [found] == expected
