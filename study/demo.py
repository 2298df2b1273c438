"""The demo: four toy languages, a tiny checkpoint that knows them half, and the method on it.

    python lander.py                                   # everything it needs, offline, in runs/demo

The languages share one grammar of meanings and differ in words, word order and endings. The
checkpoint is pretrained in all twelve directions on text that mostly leaves endings out, like a
pidgin; tuning one pair on text with all endings is then a small matter of known right answers.
"""

import random
import shutil
from itertools import chain, count, islice, permutations
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

import lander
from data import InputError, LANGUAGES, load_tokenizer, locked, make_batches, prompt_text, render
from data import split_pair, write_lines
from model import Decoder, read_config, save_model


# --------------------------------------------------------------------------------------------------
# Toy languages


class ToyLanguage(NamedTuple):
    order: str  # of subject S, verb V, object O and place P
    adjective_first: bool  # before its noun
    consonants: str  # that its words are made of; the vowels are everyone's
    past: str  # ending of a verb in the past
    plural: str  # of a noun that is many
    cases: dict  # after that, of a noun by its part in the sentence


# By their private-use codes of ISO 639.
TOY_LANGUAGES = {
    "qaa": ToyLanguage("SVOP", True, "bdfglmst", "ed", "s", {"S": "", "O": "", "P": "in"}),
    "qab": ToyLanguage("PSOV", True, "hjkmnprt", "ta", "ler", {"S": "", "O": "u", "P": "da"}),
    "qac": ToyLanguage("VSOP", False, "cdlnrsvz", "it", "i", {"S": "um", "O": "em", "P": "ob"}),
    "qad": ToyLanguage("OVSP", False, "bghkpvwy", "ak", "en", {"S": "ar", "O": "", "P": "il"}),
}
NOUNS, VERBS, ADJECTIVES = 20, 10, 6


def toy_words(code):
    """A language's stems: "qaa" -> {"noun": ["gide", ...], "verb": ..., "adjective": ...}"""
    rng = random.Random(code)
    syllables = [c + vowel for c in TOY_LANGUAGES[code].consonants for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    stems = iter(rng.sample(words, NOUNS + VERBS + ADJECTIVES))
    sizes = {"noun": NOUNS, "verb": VERBS, "adjective": ADJECTIVES}
    return {kind: list(islice(stems, size)) for kind, size in sizes.items()}


def toy_meaning(rng):
    """What a sentence says: S, O, perhaps P: (noun, plural, adjective or None); V: (verb, past).

    "big dogs saw a cat" might be {"S": (3, True, 1), "O": (5, False, None), "V": (2, True)}, which
    are numbers into toy_words.
    """
    parts = "SOP" if rng.random() < 0.5 else "SO"
    meaning = {}
    for part, noun in zip(parts, rng.sample(range(NOUNS), len(parts))):
        plural = rng.random() < 0.5
        adjective = rng.randrange(ADJECTIVES) if rng.random() < 0.5 else None
        meaning[part] = noun, plural, adjective
    meaning["V"] = rng.randrange(VERBS), rng.random() < 0.5
    return meaning


def toy_sentence(code, words, meaning, pidgin=False):
    """Say a meaning in the language whose words are toy_words(code); pidgin has no number or tense.

    "qaa", the meaning in toy_meaning -> "dida sesas gelied lefa."; in pidgin "dida sesa geli lefa."
    """
    language, said = TOY_LANGUAGES[code], []
    for part in language.order:
        if part == "V":
            verb, past = meaning["V"]
            ending = language.past if past and not pidgin else ""
            said.append(words["verb"][verb] + ending)
        elif part in meaning:
            noun, plural, adjective = meaning[part]
            ending = language.plural if plural and not pidgin else ""
            phrase = [words["noun"][noun] + ending + language.cases[part]]
            if adjective is not None:
                phrase.insert(0 if language.adjective_first else 1, words["adjective"][adjective])
            said += phrase
    return " ".join(said) + "."


def toy_meanings(size, seed):
    """`size` different meanings, in a list: its slices share no sentence."""
    rng = random.Random(seed)
    meanings = {}  # by their text, so that a repeated one is kept once
    while len(meanings) < size:
        meaning = toy_meaning(rng)
        meanings[str(meaning)] = meaning
    return list(meanings.values())


def toy_text(meanings, pidgin=0.0):
    """Each meaning, said in every toy language; a share of the sentences in pidgin.

    -> {"qaa": [sentence, ...], "qab": [...], ...}
    """
    text = {}
    for code in TOY_LANGUAGES:
        rng, words = random.Random(code), toy_words(code)
        text[code] = [toy_sentence(code, words, said, rng.random() < pidgin) for said in meanings]
    return text


def write_text(folder, splits):
    """Multi-way text, a file for each split and language. splits: name -> meanings"""
    for split, meanings in splits.items():
        for code, sentences in toy_text(meanings).items():
            write_lines(folder / f"{split}.{code}", sentences)


# --------------------------------------------------------------------------------------------------
# The checkpoint


# Meanings, all different: those that the checkpoint is pretrained on, then those of the splits.
PRETRAINING_SENTENCES = 3000
SPLIT_SENTENCES = {"train": 3000, "valid": 100, "test": 100}
PIDGIN = 0.7  # of the pretraining text: over a half, so that greedy search leaves endings out, too
VOCABULARY = 512
MODEL = {
    "model_type": "baichuan",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "model_max_length": 256,  # and no max_position_embeddings: ALiBi, as in Baichuan-13B
    "normalize_head": False,  # as in Baichuan 1
}
PRETRAINING_STEPS, PRETRAINING_RATE, PRETRAINING_TOKENS = 1500, 3e-3, 1024


def train_tokenizer(folder, lines):
    """A sentencepiece model with the flags of Baichuan's, in folder/tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    flags |= dict(add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        num_threads=1,
        minloglevel=2,
        **flags,
    )
    (folder / "tokenizer.vocab").unlink()


def pretrain(folder, text):
    """Train a tiny Baichuan from scratch to translate in every direction of multi-way text.

    text: language code -> sentences, line by line translations of each other.
    """
    train_tokenizer(folder, prompts(text))
    tokenizer = load_tokenizer(folder)
    examples = []
    for source, target in permutations(text, 2):
        for pair in zip(text[source], text[target]):
            examples.append(render(tokenizer, f"{source}-{target}", *pair))
    random.Random(0).shuffle(examples)  # equal lengths keep this order in batches: directions mix
    model = Decoder(read_config(MODEL | {"vocab_size": tokenizer.vocab_size}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            # 0.02 is for hidden sizes in the thousands, and learns slowly here.
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), fused=True)
    progress = lander.Progress("pretraining", PRETRAINING_STEPS)
    epochs = (make_batches(examples, tokenizer.pad_id, PRETRAINING_TOKENS, e) for e in count())
    batches = islice(chain.from_iterable(epochs), PRETRAINING_STEPS)
    for step, batch in enumerate(batches):
        rate = lander.learning_rate(step, PRETRAINING_STEPS, PRETRAINING_RATE)
        optimizer.param_groups[0]["lr"] = rate
        loss, _ = lander.train_step(model, [batch], optimizer, parameters)
        progress.add(1, f", loss {loss:.3f}")
    save_model(model, folder)


def prompts(text):
    """Every sentence in a prompt, for the tokenizer to be trained on."""
    for source, target in permutations(text, 2):
        for sentence in text[source]:
            yield from prompt_text(f"{source}-{target}", sentence).split("\n")


# --------------------------------------------------------------------------------------------------
# The demo


# The tuned pair is compared with two that share no language with it: of 192 neurons in a layer, it
# owns about twenty. Of 0.9 and all twelve pairs it would own two, and some layers would not route.
SETTINGS = "--pair qaa-qab --layers 2 --lr 3e-3 --batch 20 --eval-pairs all --epsilon 0.7"
SETTINGS += " --score-pairs qaa-qab,qac-qad,qad-qac --score-sentences 200"


def build(folder):
    """Make the demo's text and checkpoint, in folder/data and folder/weights."""
    meanings = toy_meanings(PRETRAINING_SENTENCES + sum(SPLIT_SENTENCES.values()), seed=0)
    print("No --weights, so this is the demo: four languages made up from one grammar,\n")
    for code, (sentence, *_) in toy_text(meanings[:1]).items():
        print(f"   {code} {LANGUAGES[code]}: {sentence}")
    print("\na tiny Baichuan, pretrained in all twelve directions on text that mostly leaves")
    print("the endings out, and the method on it, with text that has them all.\n", flush=True)
    rest = iter(meanings[PRETRAINING_SENTENCES:])
    splits = {split: list(islice(rest, size)) for split, size in SPLIT_SENTENCES.items()}
    write_text(folder / "data", splits)
    pretrain(folder / "weights", toy_text(meanings[:PRETRAINING_SENTENCES], PIDGIN))


SHOWN = """
What this shows: tuned on full sentences, a pair learns the endings that the checkpoint left out.
What the other pairs lose or gain comes through the general neurons, which they share. Figures
differ from processor to processor; this picture does not."""


def demo(words):
    """Build toy languages and a toy checkpoint, then run the method on them like on any other.

    words: the command line. A run that does not end well ends the demo with its status.
    """
    settings = lander.read_settings([*SETTINGS.split(), *words])
    if settings.data:
        raise InputError("--data needs --weights; the demo makes its own text")
    for pair in settings.pair.split(","):
        if not set(split_pair(pair)) <= set(TOY_LANGUAGES):
            known = f"the demo knows {', '.join(TOY_LANGUAGES)}"
            raise InputError(f"{known}, not {pair}, which takes --weights and --data")
    folder = Path(settings.out or "runs/demo")
    weights, run = folder / "weights", folder / "run"
    with locked(folder):
        if not settings.out and not settings.resume:
            shutil.rmtree(run, ignore_errors=True)  # the last demo's
        begun = (run / "args.json").exists()
        if begun and not settings.resume:  # before the checkpoint, which takes the longest
            raise InputError(f"{run}: holds a run already; --out names another folder")
        if not (settings.resume and (weights / "model.safetensors").exists()):
            build(folder)
        own = [] if begun else SETTINGS.split()  # a run's own record says the rest
        places = "--weights", weights, "--data", folder / "data", "--out", run
        if status := lander.main([*own, *words, *map(str, places)]):
            raise SystemExit(status)
    print(SHOWN)
