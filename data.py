"""Tokenizers of published checkpoints, parallel text, prompts and batches.

    tokenizer = load_tokenizer("bloom-7b1/")                       # tokenizer.json, or tokenizer.model for Baichuan
    pairs = read_parallel("wmt16/", "train", "en-de")              # [(source, target), ...]
    examples = [render(tokenizer, "en-de", source, target) for source, target in pairs]
    for ids, mask, targets in make_batches(examples, tokenizer.pad_id, tokens_per_batch=4096): ...

In this file: the two tokenizers; languages and the prompt; parallel text; batches; toy languages for the demo.
"""

import json
import random
import re
import sys
from collections import Counter
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

from model import InputError, read_json


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


# Unicode's 25 white space characters. Python's \s adds U+001C to U+001F, so it is spelled out.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# BLOOM's pre-tokenizer, as tokenizer.json spells it for Oniguruma, where the inner brackets are a union, and as Python
# needs it. What lies between two matches is a piece as well.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
PIECE = re.compile(f"( ?[^{WHITE_SPACE}(|).,!?…。，、।۔،]+)")


def byte_characters():
    """GPT-2's table from byte to printable character: itself where it is printable Latin-1, else from U+0100 on.

    65 -> "A", 32 -> "Ġ", 10 -> "Ċ"
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BloomTokenizer:
    """BLOOM's byte-level BPE from tokenizer.json, in plain Python: the same ids as the `tokenizers` library.

    InputError names what is there where the file's pipeline is not BLOOM's.
    """

    def __init__(self, path):
        published = read_json(path)
        try:
            added = {token["content"]: token["id"] for token in published["added_tokens"]}
            self.vocabulary = published["model"]["vocab"]  # token, in byte characters -> id
            merges = published["model"]["merges"]  # "a b" until tokenizers 0.20, [a, b] since
            merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
            self.bos_id, self.eos_id, self.pad_id = (added[token] for token in ("<s>", "</s>", "<pad>"))
            check_pipeline(path, published)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a BPE tokenizer.json (at {error})") from None
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.added = added
        longest_first = sorted(added, key=len, reverse=True)
        self.added_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.byte_characters = byte_characters()
        self.character_bytes = {character: byte for byte, character in self.byte_characters.items()}
        self.tokens = {id: token for token, id in (self.vocabulary | added).items()}
        self.vocab_size = max(self.tokens) + 1
        self.piece_ids = lru_cache(maxsize=1 << 18)(self.merge)  # words repeat: most pieces are found here

    def encode(self, text):
        """str -> list of ids. Added tokens in the text are matched literally, before anything else."""
        ids = []
        for i, part in enumerate(self.added_pattern.split(text)):
            if i % 2:
                ids.append(self.added[part])
            else:
                for piece in PIECE.split(part):
                    ids += self.piece_ids(piece)
        return ids

    def merge(self, piece):
        """Ids of one piece: merge the pair of lowest rank, the leftmost on ties, until none is left. str -> tuple

        A heap of candidate merges over a linked list, so that a piece of n bytes takes n log n steps.
        """
        characters = (self.byte_characters[byte] for byte in piece.encode("utf-8", errors="replace"))
        symbols = [c for c in characters if c in self.vocabulary]  # others are dropped, as `tokenizers` does
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        ranks = self.ranks
        heap = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
        heapify(heap)
        while heap:
            rank, i = heappop(heap)
            j = after[i]
            if j == len(symbols) or ranks.get((symbols[i], symbols[j])) != rank:
                continue  # one of the two has been merged since
            symbols[i] += symbols[j]
            symbols[j] = None
            after[i] = after[j]
            if after[j] < len(symbols):
                before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < len(symbols):
                    pair = symbols[left], symbols[right]
                    if pair in ranks:
                        heappush(heap, (ranks[pair], left))
        return tuple(self.vocabulary[symbol] for symbol in symbols if symbol is not None)

    def decode(self, ids):
        """List of ids -> str. A character's bytes may straddle tokens, so the whole sequence is decoded at once."""
        raw = bytearray()
        for token in (self.tokens[id] for id in ids):
            try:
                raw += bytes(self.character_bytes[character] for character in token)
            except KeyError:  # an added token may hold any character
                raw += token.encode()
        return raw.decode("utf-8", errors="replace")


def check_pipeline(path, published):
    """Refuse a tokenizer.json that does anything else to text than BLOOM's does."""
    steps = published["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    split = {"type": "Split", "pattern": {"Regex": BLOOM_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    model = published["model"]
    options = ("dropout", "unk_token", "byte_fallback", "ignore_merges")
    options += ("continuing_subword_prefix", "end_of_word_suffix")
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    found = {
        "normalizer": published.get("normalizer"),
        "pre_tokenizer": [{k: v for k, v in (step or {}).items() if k != "trim_offsets"} for step in steps],
        "model": [model["type"], *(f"{option}={model[option]}" for option in options if model.get(option))],
        "decoder": (published["decoder"] or {}).get("type"),
        "post_processor": (published.get("post_processor") or {}).get("type", "ByteLevel"),
        "added_tokens": [token["content"] for token in published["added_tokens"] if any(token[f] for f in flags)],
    }
    expected = {
        "normalizer": None,
        "pre_tokenizer": [split, byte_level],
        "model": ["BPE"],
        "decoder": "ByteLevel",
        "post_processor": "ByteLevel",  # which only trims offsets
        "added_tokens": [],  # none with flags
    }
    for part, value in expected.items():
        if found[part] != value:
            raise InputError(f"{path}: {part} is {found[part]}, expected BLOOM's {value}")


class SentencePieceTokenizer:
    """Baichuan's tokenizer.model. Dummy prefix, white space and normalization are as the file's own flags say."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({error})") from None
        self.vocab_size = self.model.get_piece_size()
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        pad_id = self.model.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.model.unk_id()  # Baichuan pads with <unk>
        self.encode = self.model.encode
        self.decode = self.model.decode


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder: tokenizer.model (Baichuan) or tokenizer.json (BLOOM).

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .bos_id, .eos_id, .pad_id, .vocab_size
    """
    for name, kind in {"tokenizer.model": SentencePieceTokenizer, "tokenizer.json": BloomTokenizer}.items():
        if (Path(folder) / name).exists():
            return kind(Path(folder) / name)
    raise InputError(f"{folder}: no tokenizer.model and no tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# Languages and the prompt


# The languages of BLOOM, the WMT news tasks and FLORES' largest, by code; last, the toy languages of the demo.
LANGUAGES = dict(entry.split("=") for entry in """
    af=Afrikaans ak=Akan am=Amharic ar=Arabic as=Assamese bg=Bulgarian bm=Bambara bn=Bengali ca=Catalan cs=Czech
    da=Danish de=German el=Greek en=English es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish fon=Fon fr=French
    gl=Galician gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian id=Indonesian ig=Igbo
    is=Icelandic it=Italian iu=Inuktitut ja=Japanese ka=Georgian kk=Kazakh ki=Kikuyu km=Khmer kn=Kannada ko=Korean
    lg=Luganda ln=Lingala lt=Lithuanian lv=Latvian mk=Macedonian ml=Malayalam mr=Marathi ms=Malay mt=Maltese ne=Nepali
    nl=Dutch no=Norwegian nso=Sotho ny=Chichewa or=Odia pa=Punjabi pl=Polish ps=Pashto pt=Portuguese rn=Kirundi
    ro=Romanian ru=Russian rw=Kinyarwanda sk=Slovak sl=Slovenian sn=Shona sq=Albanian sr=Serbian st=Sesotho sv=Swedish
    sw=Swahili ta=Tamil te=Telugu th=Thai tl=Tagalog tn=Setswana tr=Turkish ts=Tsonga tum=Tumbuka tw=Twi uk=Ukrainian
    ur=Urdu vi=Vietnamese wo=Wolof xh=Xhosa yo=Yoruba zh=Chinese zu=Zulu
    qaa=Avari qab=Belun qac=Corith qad=Dorva
""".split())  # fmt: skip

PROMPT = "Translate this from {source_language} to {target_language}:\n{source_language}: {source}\n{target_language}:"


def split_pair(pair):
    """ "en-de" -> ("en", "de"). InputError where it is not two language codes, or one that LANGUAGES lacks."""
    codes = pair.split("-")
    if len(codes) != 2 or codes[0] == codes[1]:
        raise InputError(f"pair {pair!r}: expected two language codes, source first, as in en-de")
    for code in codes:
        if code not in LANGUAGES:
            raise InputError(f"pair {pair!r}: unknown language {code!r}; name it in LANGUAGES in data.py, as de=German")
    return codes[0], codes[1]


def prompt_text(pair, source):
    """The prompt of training and evaluation. "en-de", "A house." -> "Translate this from English to German: ..." """
    source_language, target_language = (LANGUAGES[code] for code in split_pair(pair))
    return PROMPT.format(source_language=source_language, target_language=target_language, source=source)


def render(tokenizer, pair, source, target=None):
    """A translation example: (prompt ids, target ids). The target's end in eos; [] for None.

    Prompt and target are tokenized apart and joined, in training as in generation: no merge crosses the boundary.
    """
    target_ids = [] if target is None else [*tokenizer.encode(f" {target}"), tokenizer.eos_id]
    return tokenizer.encode(prompt_text(pair, source)), target_ids


# ---------------------------------------------------------------------------------------------------------------------
# Parallel text


def read_lines(path):
    """A text file's lines. Only newlines end a line: str.splitlines would also split at U+2028 and the like."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not lines[-1]:
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {number} of {len(lines)} is not UTF-8 ({error.reason})") from None
    return decoded


def read_two_files(source_path, target_path):
    sources, targets = read_lines(source_path), read_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}")
    return list(zip(sources, targets))


def read_tsv(path):
    rows = [line.split("\t") for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(f"{path}: line {number} of {len(rows)} has {len(row)} tab-separated columns, expected 2")
    return [(source, target) for source, target in rows]


def read_translations(path, source, target):
    """ALMA's JSON: a list, or one a line, of {"translation": {"de": ..., "en": ...}}."""
    lines = read_lines(path)
    text = "\n".join(lines)
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise InputError(f"{path}: not a JSON list or one JSON object a line ({error})") from None
    pairs = []
    for number, item in enumerate(items, 1):
        translation = item.get("translation") if isinstance(item, dict) else None
        sides = [translation.get(code) if isinstance(translation, dict) else None for code in (source, target)]
        if not all(isinstance(side, str) for side in sides):
            raise InputError(f'{path}: item {number} of {len(items)} has no "translation" with {source} and {target}')
        pairs.append(tuple(sides))
    return pairs


def candidates(folder, split, source, target):
    """The files that may hold a split's text for one direction, in order of preference, each with its reader.

    The exact order of the pair comes first, then the reverse, then multi-way text.
    """
    for first, second in ((source, target), (target, source)):
        stem = f"{folder}/{split}.{first}-{second}"
        yield [Path(f"{stem}.{code}") for code in (source, target)], read_two_files
        step = 1 if first == source else -1
        yield [Path(f"{stem}.tsv")], lambda path, step=step: [row[::step] for row in read_tsv(path)]
        yield [Path(f"{stem}.json")], lambda path: read_translations(path, source, target)
    yield [Path(f"{folder}/{split}.{code}") for code in (source, target)], read_two_files


def read_parallel(folder, split, pair):
    """Sentence pairs of one direction, [(source, target), ...]; those with an empty side are skipped and counted.

    Reads {split}.{pair}.{lang}, .tsv (columns in the pair's order) or .json (ALMA's), in either order of the pair, or
    multi-way {split}.{lang}. InputError names file, line and count.
    """
    source, target = split_pair(pair)
    halves = ""
    for paths, read in candidates(folder, split, source, target):
        missing = [path.name for path in paths if not path.exists()]
        if not missing:
            break
        if len(missing) < len(paths):
            halves += f"; there is one side, but no {missing[0]}"
    else:
        found = ", ".join(list_pairs(folder, split)) or "none"
        raise InputError(f"{folder}: no {split} text for {pair}{halves}; pairs found: {found}")
    rows = read(*paths)
    kept = [row for row in rows if row[0].strip() and row[1].strip()]
    if len(kept) < len(rows):
        print(f"{folder}: {split} {pair}: skipped {len(rows) - len(kept)} of {len(rows)} pairs, a side is empty",
              file=sys.stderr)  # fmt: skip
    return kept


def list_pairs(folder, split):
    """The directions a split offers, sorted: ["de-en", "en-de"]; languages that LANGUAGES lacks are passed over."""
    names = [path.name for path in Path(folder).glob(f"{split}.*")]
    known = "|".join(LANGUAGES)
    pattern = re.compile(rf"{re.escape(split)}\.(?:({known})-({known})\..+|({known}))")
    codes = sorted({code for name in names if (match := pattern.fullmatch(name)) for code in match.groups() if code})
    return [
        f"{source}-{target}"
        for source, target in permutations(codes, 2)
        if any(all(path.exists() for path in paths) for paths, _ in candidates(folder, split, source, target))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """Right-padded examples, prompt and target joined."""

    ids: torch.Tensor  # [B, T] long; a target's last token (eos) is never an input
    mask: torch.Tensor  # [B, T] bool, True on real tokens
    targets: torch.Tensor  # [B, T] long: the token that position t predicts, or -100


def make_batch(examples, pad_id):
    """[(prompt ids, target ids), ...] -> Batch

    ([5, 6], [7, 2]) -> ids [5, 6, 7], targets [-100, 7, 2]
    """
    rows = [prompt + target[:-1] for prompt, target in examples]
    shape = len(rows), max(map(len, rows))
    ids, targets = torch.full(shape, pad_id), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, (row, (prompt, target)) in enumerate(zip(rows, examples)):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = True
        if target:
            targets[b, len(prompt) - 1 : len(row)] = torch.tensor(target)
    return Batch(ids, mask, targets)


def make_batches(examples, pad_id, tokens_per_batch, seed=None):
    """Batches of examples of like length, the longest first; B * T stays within tokens_per_batch where B > 1.

    The sort is stable, so that outputs can be matched to examples sorted the same way. A seed shuffles the batches.
    """
    lengths = [len(prompt) + max(len(target) - 1, 0) for prompt, target in examples]
    groups = []
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    if seed is not None:
        random.Random(seed).shuffle(groups)
    for group in groups:
        yield make_batch([examples[i] for i in group], pad_id)


# ---------------------------------------------------------------------------------------------------------------------
# Toy languages for the demo, and a tokenizer to go with them


class ToyLanguage(NamedTuple):
    """What tells one toy language from another, besides its words."""

    order: str  # of subject S, verb V, object O and place P
    adjective_first: bool  # before its noun
    consonants: str  # that its words are made of; the vowels are everyone's
    past: str  # endings: of a verb in the past,
    plural: str  # of a noun that is many,
    cases: dict  # and, after that, of a noun by its part in the sentence


# By their private-use codes of ISO 639.
TOY_LANGUAGES = {
    "qaa": ToyLanguage("SVOP", True, "bdfglmst", past="ed", plural="s", cases=dict(S="", O="", P="in")),
    "qab": ToyLanguage("PSOV", True, "hjkmnprt", past="ta", plural="ler", cases=dict(S="", O="u", P="da")),
    "qac": ToyLanguage("VSOP", False, "cdlnrsvz", past="it", plural="i", cases=dict(S="um", O="em", P="ob")),
    "qad": ToyLanguage("OVSP", False, "bghkpvwy", past="ak", plural="en", cases=dict(S="ar", O="", P="il")),
}
NOUNS, VERBS, ADJECTIVES = 20, 10, 6


def toy_words(code):
    """A toy language's stems, all different. "qaa" -> {"noun": ["gide", "fafe", ...], "verb": ..., "adjective": ...}"""
    rng = random.Random(code)
    consonants = TOY_LANGUAGES[code].consonants
    syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]
    stems = rng.sample([first + second for first in syllables for second in syllables], NOUNS + VERBS + ADJECTIVES)
    return dict(noun=stems[:NOUNS], verb=stems[NOUNS:-ADJECTIVES], adjective=stems[-ADJECTIVES:])


def toy_meaning(rng):
    """What a sentence says, by its parts: S, O and perhaps P are (noun, plural, adjective or None), V is (verb, past).

    "big dogs saw a cat" might be {"S": (3, True, 1), "O": (5, False, None), "V": (2, True)}: numbers into toy_words.
    """
    parts = "SOP" if rng.random() < 0.5 else "SO"
    meaning = {
        part: (noun, rng.random() < 0.5, rng.randrange(ADJECTIVES) if rng.random() < 0.5 else None)
        for part, noun in zip(parts, rng.sample(range(NOUNS), len(parts)))
    }
    return meaning | {"V": (rng.randrange(VERBS), rng.random() < 0.5)}


def toy_sentence(code, words, meaning, pidgin=False):
    """Say a meaning in a toy language, whose words are toy_words(code); in pidgin, number and tense are left unsaid.

    "qaa", the meaning in toy_meaning -> "dida sesas gelied lefa."; in pidgin "dida sesa geli lefa."
    """
    language, said = TOY_LANGUAGES[code], []
    for part in language.order:
        if part == "V":
            verb, past = meaning["V"]
            said.append(words["verb"][verb] + language.past * (past and not pidgin))
        elif part in meaning:
            noun, plural, adjective = meaning[part]
            phrase = [words["noun"][noun] + language.plural * (plural and not pidgin) + language.cases[part]]
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
    """Multi-way text: each meaning, said in every toy language. -> {"qaa": [sentence, ...], "qab": [...], ...}

    pidgin: the share of sentences, drawn in each language by itself, that are in pidgin.
    """
    text = {}
    for code in TOY_LANGUAGES:
        rng, words = random.Random(code), toy_words(code)
        text[code] = [toy_sentence(code, words, meaning, rng.random() < pidgin) for meaning in meanings]
    return text


def train_bpe(lines, vocab_size):
    """Contents of a tokenizer.json like BLOOM's: merge the most frequent pair, over and over (Sennrich et al. 2016).

    Ids: four special tokens, 256 bytes, then the merges, fewer than vocab_size allows where all pieces are whole.
    """
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    characters = byte_characters()
    counts = Counter(piece for line in lines for piece in PIECE.split(line))
    words = {tuple(characters[byte] for byte in piece.encode()): count for piece, count in counts.items()}
    vocabulary = {token: id for id, token in enumerate([*special, *sorted(characters.values())])}
    merges = []
    while len(vocabulary) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # the pair itself decides ties
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))  # two merges may spell the same token
        merged = {}
        for word, count in words.items():
            symbols = []
            for symbol in word:
                if symbols and (symbols[-1], symbol) == best:
                    symbols[-1] += symbol
                else:
                    symbols.append(symbol)
            merged[tuple(symbols)] = count
        words = merged
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": BLOOM_SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": token, **flags, "special": True} for id, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
