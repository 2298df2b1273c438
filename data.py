"""Prompts and batches; parallel text and tokenizers of published checkpoints; files.

    tokenizer = load_tokenizer("bloom-7b1/")                    # tokenizer.json, or tokenizer.model
    pairs = read_parallel("wmt16/", "train", "en-de")           # [(source, target), ...]
    examples = [render(tokenizer, "en-de", source, target) for source, target in pairs]
    for ids, mask, targets in make_batches(examples, tokenizer.pad_id, tokens_per_batch=4096): ...

In this file: languages and the prompt; batches; parallel text; tokenizers; files.
Letters: B sentences, T tokens.
"""

import hashlib
import json
import math
import mmap
import os
import random
import re
import socket
import stat
import struct
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import portalocker
import regex
import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


# --------------------------------------------------------------------------------------------------
# Languages and the prompt


# The languages of BLOOM, the WMT news tasks and FLORES' largest, by code; last, the demo's toy ones.
NAMES = """
    af=Afrikaans ak=Akan am=Amharic ar=Arabic as=Assamese bg=Bulgarian bm=Bambara bn=Bengali
    ca=Catalan cs=Czech da=Danish de=German el=Greek en=English es=Spanish et=Estonian eu=Basque
    fa=Persian fi=Finnish fon=Fon fr=French gl=Galician gu=Gujarati ha=Hausa he=Hebrew hi=Hindi
    hr=Croatian hu=Hungarian hy=Armenian id=Indonesian ig=Igbo is=Icelandic it=Italian
    iu=Inuktitut ja=Japanese ka=Georgian kk=Kazakh ki=Kikuyu km=Khmer kn=Kannada ko=Korean
    lg=Luganda ln=Lingala lt=Lithuanian lv=Latvian mk=Macedonian ml=Malayalam mr=Marathi
    ms=Malay mt=Maltese ne=Nepali nl=Dutch no=Norwegian nso=Sotho ny=Chichewa or=Odia pa=Punjabi
    pl=Polish ps=Pashto pt=Portuguese rn=Kirundi ro=Romanian ru=Russian rw=Kinyarwanda sk=Slovak
    sl=Slovenian sn=Shona sq=Albanian sr=Serbian st=Sesotho sv=Swedish sw=Swahili ta=Tamil
    te=Telugu th=Thai tl=Tagalog tn=Setswana tr=Turkish ts=Tsonga tum=Tumbuka tw=Twi
    uk=Ukrainian ur=Urdu vi=Vietnamese wo=Wolof xh=Xhosa yo=Yoruba zh=Chinese zu=Zulu
    qaa=Avari qab=Belun qac=Corith qad=Dorva
"""
LANGUAGES = dict(entry.split("=") for entry in NAMES.split())

PROMPT = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"


def split_pair(pair):
    """ "en-de" -> ("en", "de"). InputError where it is not two known language codes."""
    codes = pair.split("-")
    if len(codes) != 2 or codes[0] == codes[1]:
        expected = "two language codes, source first, as in en-de"
        raise InputError(f"pair {pair!r}: expected {expected}")
    for code in codes:
        if code not in LANGUAGES:
            remedy = "name it in LANGUAGES in data.py, as de=German"
            raise InputError(f"pair {pair!r}: unknown language {code!r}; {remedy}")
    return codes[0], codes[1]


def prompt_text(pair, source):
    """The one prompt, of training and evaluation. "en-de", "A house." -> "Translate this from ..." """
    source_code, target_code = split_pair(pair)
    return PROMPT.format(source=LANGUAGES[source_code], target=LANGUAGES[target_code], text=source)


def render(tokenizer, pair, source, target=None):
    """A translation example: (prompt ids, target ids). The target's end in eos; [] for None.

    Prompt and target are tokenized apart and joined, in training as in generation, so that no
    merge crosses the boundary. That is what the joined text gives, where a tokenizer splits there.
    """
    prompt_ids = [*tokenizer.prompt_prefix, *tokenizer.encode(prompt_text(pair, source))]
    if target is None:
        return prompt_ids, []
    target_ids = tokenizer.encode(f"{tokenizer.target_prefix}{target}")
    return prompt_ids, [*target_ids, tokenizer.eos_id]


# --------------------------------------------------------------------------------------------------
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
    ids, targets = torch.full(shape, pad_id), torch.full(shape, -100)  # [B, T] each
    mask = torch.zeros(shape, dtype=torch.bool)  # [B, T]
    for b, (row, (prompt, target)) in enumerate(zip(rows, examples)):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = True
        if target:
            targets[b, len(prompt) - 1 : len(row)] = torch.tensor(target)
    return Batch(ids, mask, targets)


def group_by_length(lengths, tokens_per_batch, rows_per_batch=math.inf):
    """Which rows make up which batch: B <= rows_per_batch, and B * T <= tokens_per_batch where B > 1.

    Like lengths together, so that little is padding; the longest first, so that memory that does
    not suffice shows at once. lengths: tokens of each row. -> lists of indices
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            longest, rows = lengths[groups[-1][0]], len(groups[-1]) + 1
        if not groups or rows > rows_per_batch or rows * longest > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    return groups


def make_batches(examples, pad_id, tokens_per_batch, seed=None):
    """Batches of examples of like length; a seed shuffles the batches. -> iterator of Batch"""
    lengths = [len(prompt) + max(len(target) - 1, 0) for prompt, target in examples]
    groups = group_by_length(lengths, tokens_per_batch)
    if seed is not None:
        random.Random(seed).shuffle(groups)
    for group in groups:
        yield make_batch([examples[i] for i in group], pad_id)


# --------------------------------------------------------------------------------------------------
# Parallel text


class Lines(Sequence):
    """A text file's lines, decoded when asked for: 8 bytes a line; the file stays on disk, mapped.

    Only newlines end a line: str.splitlines would split at U+2028, too.
    """

    def __init__(self, path):
        self.path = path
        with reading(path), open(path, "rb") as file:
            sized = os.fstat(file.fileno()).st_size  # not a pipe, which cannot be mapped
            access = mmap.ACCESS_READ
            self.raw = mmap.mmap(file.fileno(), 0, access=access) if sized else file.read()
        self.ends = np.flatnonzero(np.frombuffer(self.raw, np.uint8) == ord("\n"))
        if self.raw and self.raw[-1:] != b"\n":
            self.ends = np.append(self.ends, len(self.raw))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = int(self.ends[i - 1]) + 1 if i else 0
        line = self.raw[start : int(self.ends[i])]
        try:
            return line.decode("utf-8" if i else "utf-8-sig").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: line {i + 1} of {len(self)} is not UTF-8 ({error.reason})"
            ) from None


class ParallelText(Sequence):
    """Sentence pairs, (source, target): the rows `kept` of two columns; .paths: the files they lie in."""

    def __init__(self, columns, kept, paths):
        self.columns, self.kept, self.paths = columns, kept, paths

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        sources, targets = self.columns
        return sources[self.kept[i]], targets[self.kept[i]]


def read_two_files(source_path, target_path):
    """Line i of one file is a translation of line i of the other. -> sources, targets"""
    sources, targets = Lines(source_path), Lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}"
        )
    return sources, targets


def read_columns(path, source_column):
    """Tab-separated text of two columns; source_column is 0 or 1. -> sources, targets"""
    columns, lines = ([], []), Lines(path)
    for number, line in enumerate(lines, 1):
        row = line.split("\t") if line.strip() else ["", ""]
        if len(row) != 2:
            raise InputError(
                f"{path}: line {number} of {len(lines)} has {len(row)} tab-separated columns, expected 2"
            )
        for column, text in zip(columns, row):
            column.append(text)
    return columns[source_column], columns[1 - source_column]


def read_translations(path, source, target):
    """ALMA's JSON: a list, or one a line, of {"translation": {"de": ..., "en": ...}}.

    -> sources, targets
    """
    text = "\n".join(read_lines(path))
    with reading(path):
        if text.lstrip().startswith("["):
            items = parse_json(text)
        else:
            empty = {"translation": {source: "", target: ""}}
            items = [parse_json(line) if line.strip() else empty for line in text.split("\n")]
    columns = [], []
    for number, item in enumerate(items, 1):
        try:
            for column, code in zip(columns, (source, target)):
                column.append("" + item["translation"][code])  # text, or a TypeError
        except (KeyError, TypeError):
            raise InputError(
                f"{path}: item {number} of {len(items)}"
                f' has no "translation" with {source} and {target}'
            ) from None
    return columns


def candidates(folder, split, source, target):
    """The files that may hold a split's text for one direction, in order of preference.

    The exact order of the pair comes first, then the reverse, then multi-way text. Yields the
    files of each form and the function that reads them.
    """
    for first, second in ((source, target), (target, source)):
        stem = f"{folder}/{split}.{first}-{second}"
        yield [Path(f"{stem}.{source}"), Path(f"{stem}.{target}")], read_two_files
        yield [Path(f"{stem}.tsv")], partial(read_columns, source_column=int(first != source))
        yield [Path(f"{stem}.json")], partial(read_translations, source=source, target=target)
    yield [Path(f"{folder}/{split}.{source}"), Path(f"{folder}/{split}.{target}")], read_two_files


def find_parallel(folder, split, pair):
    """The files with a split's text for one direction, and the function that reads them.

    InputError where there are none.
    """
    source, target = split_pair(pair)
    halves = ""
    for paths, read in candidates(folder, split, source, target):
        missing = [path.name for path in paths if not path.exists()]
        if not missing:
            return paths, read
        if len(missing) < len(paths):
            halves += f"; there is one side, but no {missing[0]}"
    found = ", ".join(list_pairs(folder, split)) or "none"
    raise InputError(f"{folder}: no {split} text for {pair}{halves}; pairs found: {found}")


def open_parallel(folder, split, pair):
    """Sentence pairs of one direction, decoded when asked for. -> ParallelText

    Reads {split}.{pair}.{lang}, .tsv (columns in the pair's order) or .json (ALMA's), in either
    order of the pair, or multi-way {split}.{lang}. Pairs with an empty side are skipped and
    counted; a blank line is such a pair in all forms. InputError names file, line and count. Files
    of one language each take 24 bytes a pair of memory; TSV and JSON are read as a whole.
    """
    paths, read = find_parallel(folder, split, pair)
    sources, targets = read(*paths)
    # Every line is decoded here once, so that one that is not UTF-8 is named before a run begins.
    is_kept = (
        bool(source.strip() and target.strip()) and "\n" not in source + target
        for source, target in zip(sources, targets)
    )
    kept = np.flatnonzero(np.fromiter(is_kept, bool))
    if skipped := len(sources) - len(kept):
        print(
            f"{folder}: {split} {pair}: skipped {skipped} of {len(sources)} pairs,"
            " a side is empty or more than a line",
            file=sys.stderr,
        )
    return ParallelText((sources, targets), kept, paths)


def read_parallel(folder, split, pair):
    """All that open_parallel gives, [(source, target), ...]."""
    return list(open_parallel(folder, split, pair))


def list_pairs(folder, split):
    """The directions a split offers, sorted: ["de-en", "en-de"]; of languages in LANGUAGES."""
    code = "|".join(LANGUAGES)
    pattern = re.compile(rf"{re.escape(split)}\.(?:({code})-({code})\..+|({code}))")
    codes = set()
    for path in Path(folder).glob(f"{split}.*"):
        if match := pattern.fullmatch(path.name):
            codes.update(filter(None, match.groups()))
    pairs = []
    for source, target in permutations(sorted(codes), 2):
        for paths, _ in candidates(folder, split, source, target):
            if all(path.exists() for path in paths):
                pairs.append(f"{source}-{target}")
                break
    return pairs


# --------------------------------------------------------------------------------------------------
# Tokenizers


# The split regexes that are known, as published: of BLOOM, of Llama-3, of Qwen2. `regex`, on which
# sacrebleu depends as well, reads them in its version 1 as `tokenizers` does: \p{L}, Unicode's \s,
# a class in a class is a union. Not so \w, ^, $ or {2}?: a regex that is not listed is refused.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
SPLITS = (
    BLOOM_SPLIT,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def byte_characters():
    """GPT-2's table from byte to printable character: itself, or U+0100 and on where unprintable.

    65 -> "A", 32 -> "Ġ", 10 -> "Ċ"
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


LARGEST_ID = 2**24


class ByteLevelTokenizer:
    """Byte-level BPE from a tokenizer.json, in plain Python: the ids of the `tokenizers` library.

    BLOOM's, Qwen2's and Llama-3's. InputError names what another pipeline has that these have not.
    """

    target_prefix = " "

    def __init__(self, path):
        published = read_json(path)
        with reading(path):
            model = published["model"]
            added = [token for token in published["added_tokens"] if token["content"]]
            split = check_pipeline(path, published)
            self.in_front = ids_in_front(path, published.get("post_processor"))
            self.vocabulary = model["vocab"]  # token, in byte characters -> id
            self.added = {token["content"]: token["id"] for token in added}
            self.ids = self.vocabulary | self.added
            self.tokens = {id: token for token, id in self.ids.items()}
            smallest, largest = min(self.tokens, default=0), max(self.tokens, default=0)
            # "a b" until tokenizers 0.20, [a, b] since.
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            self.ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
        if not 0 <= smallest <= largest < LARGEST_ID:
            raise InputError(
                f"{path}: ids from {smallest} to {largest}, expected 0 to {LARGEST_ID - 1}"
            )
        self.vocab_size = largest + 1
        for merge in self.ranks:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= self.vocabulary.keys():
                raise InputError(f"{path}: merge {merge} is not of two tokens that make a third")
        if not {*self.in_front} <= self.tokens.keys():
            raise InputError(f"{path}: post_processor adds {self.in_front}, which is no token")
        bos, eos, pad = (self.added.get(token, -1) for token in ("<s>", "</s>", "<pad>"))  # BLOOM's
        self.own_ids = {"bos": self.in_front[0] if self.in_front else bos, "eos": eos, "pad": pad}
        self.split = regex.compile(f"({split})", regex.V1).split  # the matches, and what is between
        self.normalize = str
        if published.get("normalizer"):
            self.normalize = partial(unicodedata.normalize, "NFC")
        self.ignore_merges = model.get("ignore_merges")  # for a piece that is a token
        self.added_patterns = []
        for normalized in (False, True):  # those are matched in what the others leave
            some = [t["content"] for t in added if bool(t.get("normalized")) is normalized]
            longest_first = sorted(some, key=len, reverse=True)
            if some:
                pattern = "|".join(map(re.escape, longest_first))
                self.added_patterns.append(re.compile(f"({pattern})"))
        self.byte_characters = byte_characters()
        self.character_bytes = {character: byte for byte, character in self.byte_characters.items()}
        self.piece_ids = lru_cache(maxsize=1 << 18)(self.merge)  # words repeat: most are found here

    def encode(self, text):
        """str -> list of ids. Added tokens in the text are matched literally, first of all."""
        parts = [text]
        for pattern in self.added_patterns:
            parts = chain.from_iterable(map(pattern.split, parts))
        ids = []
        for part in parts:
            if part in self.added:
                ids.append(self.added[part])
            else:
                for piece in self.split(self.normalize(part)):
                    ids += self.piece_ids(piece)
        return ids

    def merge(self, piece):
        """Ids of one piece: merge the pair of lowest rank, the leftmost on ties, until none is left.

        A heap of candidate merges over a linked list: a piece of n bytes takes n log n steps.
        str -> tuple of ids
        """
        symbols = [self.byte_characters[byte] for byte in piece.encode("utf-8", errors="replace")]
        if self.ignore_merges and "".join(symbols) in self.vocabulary:
            return (self.vocabulary["".join(symbols)],)
        symbols = [c for c in symbols if c in self.vocabulary]  # `tokenizers` drops others, too
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        ranks = self.ranks
        neighbours = enumerate(zip(symbols, symbols[1:]))
        heap = [(ranks[pair], i) for i, pair in neighbours if pair in ranks]
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
        """List of ids -> str. A character's bytes may straddle tokens: all are decoded at once."""
        raw = bytearray()
        for id in ids:
            token = self.tokens.get(id, "")  # ids may have gaps
            try:
                raw += bytes(self.character_bytes[character] for character in token)
            except KeyError:  # an added token may hold any character
                raw += token.encode("utf-8", errors="replace")
        return raw.decode("utf-8", errors="replace")


def expect(where, found, *expected):
    """InputError where a value is none of those that ByteLevelTokenizer knows."""
    if found not in expected:
        raise InputError(f"{where} is {found}, expected {' or '.join(map(str, expected))}")


def check_pipeline(path, published):
    """Refuse a tokenizer.json that does to text what ByteLevelTokenizer does not.

    -> the regex that it splits by
    """
    model, normalizer = published["model"], published.get("normalizer")
    expect(f"{path}: normalizer", normalizer, None, {"type": "NFC"})
    steps = steps_of(published["pre_tokenizer"], "pretokenizers")
    expect(
        f"{path}: steps of pre_tokenizer", [step["type"] for step in steps], ["Split", "ByteLevel"]
    )
    split, byte_level = steps
    known = [{"Regex": one} for one in SPLITS]
    if split["pattern"] not in known:
        raise InputError(
            f"{path}: pre_tokenizer splits by {split['pattern']}, which is none of SPLITS"
        )
    expect(f"{path}: pre_tokenizer: behavior", split["behavior"], "Isolated")
    expect(f"{path}: pre_tokenizer: invert", split["invert"], False)
    expect(f"{path}: pre_tokenizer: add_prefix_space", byte_level["add_prefix_space"], False)
    expect(f"{path}: pre_tokenizer: use_regex", byte_level["use_regex"], False)
    expect(f"{path}: model: type", model["type"], "BPE")
    expect(f"{path}: model: ignore_merges", model.get("ignore_merges"), None, True, False)
    for option in ("dropout", "unk_token", "byte_fallback"):
        expect(f"{path}: model: {option}", model.get(option), None, False)
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        expect(f"{path}: model: {option}", model.get(option), None, "")
    expect(f"{path}: decoder", published["decoder"]["type"], "ByteLevel")
    flags = ["single_word", "lstrip", "rstrip"]
    for token in published["added_tokens"]:
        for flag in [*flags, "normalized"] if normalizer else flags:
            expect(f"{path}: added token {token['content']}: {flag}", token.get(flag), None, False)
    return split["pattern"]["Regex"]


def ids_in_front(path, post_processor):
    """What a post-processor puts in front of a text, [] or [id]. InputError where it does more."""
    steps = steps_of(post_processor, "processors")
    templates = [step for step in steps if step["type"] != "ByteLevel"]  # which trims offsets
    if not templates:
        return []
    expect(f"{path}: post_processor", [step["type"] for step in templates], ["TemplateProcessing"])
    single, tokens = templates[0]["single"], templates[0]["special_tokens"]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    for name, token in tokens.items():
        if (
            single == [{"SpecialToken": {"id": name, "type_id": 0}}, text]
            and len(token["ids"]) == 1
        ):
            return token["ids"]
    raise InputError(
        f"{path}: post_processor is {single}, expected a template of one token in front of the text"
    )


def steps_of(part, key):
    """What a part of a pipeline does, one after the other: nothing, one step, or a "Sequence"."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


class SentencePieceTokenizer:
    """A tokenizer.model: Baichuan's, LLaMA's, Mistral's. The file's own flags treat white space."""

    in_front = []  # nothing that the file says

    def __init__(self, path):
        with reading(path):
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            pieces = model.id_to_piece(list(range(model.get_piece_size())))  # all UTF-8?
            begin = "".join(model.encode("a", out_type=str))
        self.vocab_size = len(pieces)
        self.ids = {piece: id for id, piece in enumerate(pieces)}
        # LLaMA's puts a space before any text, a "dummy prefix": a second one would be a token.
        self.target_prefix = "" if begin.startswith("▁") else " "
        pad = model.pad_id() if model.pad_id() >= 0 else model.unk_id()  # LLaMA pads with <unk>
        self.own_ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": pad}
        self.encode, self.decode = model.encode, model.decode


TOKENIZERS = {"tokenizer.model": SentencePieceTokenizer, "tokenizer.json": ByteLevelTokenizer}
# Where a folder says which token begins a text, ends it, or pads: the first that does so counts.
SPECIAL_TOKENS = {
    "tokenizer_config.json": "{}_token",
    "special_tokens_map.json": "{}_token",
    "config.json": "{}_token_id",
}


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder.

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .bos_id, .eos_id, .pad_id, .vocab_size;
    .prompt_prefix: [bos_id] where the folder's files ask for it, else []; encode adds none.
    .target_prefix: the space between prompt and target, "" where encode adds it.
    .paths: the files that were read, the tokenizer's own first.
    """
    own = [Path(folder) / name for name in TOKENIZERS if (Path(folder) / name).exists()]
    if not own:
        raise InputError(f"{folder}: no tokenizer.model and no tokenizer.json")
    path = own[0]
    tokenizer = TOKENIZERS[path.name](path)
    others = [path.with_name(name) for name in SPECIAL_TOKENS if path.with_name(name).exists()]
    tokenizer.paths = [path, *others]
    files = {other: read_json(other) for other in others}
    tokenizer.bos_id = special_id("bos", tokenizer, files)
    tokenizer.eos_id = special_id("eos", tokenizer, files)
    tokenizer.pad_id = special_id("pad", tokenizer, files)
    if tokenizer.eos_id < 0:
        raise InputError(f"{path}: no end-of-sentence token, nor in {', '.join(SPECIAL_TOKENS)}")
    if tokenizer.pad_id < 0:
        tokenizer.pad_id = tokenizer.eos_id  # padding is masked: any id does
    if tokenizer.in_front not in ([], [tokenizer.bos_id]):
        raise InputError(
            f"{path}: post_processor puts {tokenizer.in_front} in front of a text,"
            f" expected beginning-of-sentence, {tokenizer.bos_id}"
        )
    config = files.get(path.with_name("tokenizer_config.json"), {})
    adds_bos = config.get("add_bos_token")
    expect(f"{path.with_name('tokenizer_config.json')}: add_bos_token", adds_bos, None, True, False)
    if adds_bos is None:
        llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        adds_bos = llama if path.name == "tokenizer.model" else bool(tokenizer.in_front)
    if adds_bos and tokenizer.bos_id < 0:
        raise InputError(f"{path}: no beginning-of-sentence token, which add_bos_token asks for")
    tokenizer.prompt_prefix = [tokenizer.bos_id] if adds_bos else []
    return tokenizer


def special_id(kind, tokenizer, files):
    """The id of a folder's "bos", "eos" or "pad", -1 for none.

    files: path -> content of those of SPECIAL_TOKENS that are there
    """
    for path, content in files.items():
        key = SPECIAL_TOKENS[path.name].format(kind)
        with reading(f"{path}: {key}"):
            value = content.get(key)
            if isinstance(value, list):
                value = value[0] if value else None  # several may end a text: the first is written
            if isinstance(value, dict):
                value = value["content"]
            id = tokenizer.ids.get(value) if key.endswith("token") else value
        if value is None:
            continue
        if type(id) is int and id in tokenizer.ids.values():
            return id
        if kind != "pad":  # padding is masked: some files name a token that there is not
            raise InputError(f"{path}: {key} {value!r} is not in the tokenizer's vocabulary")
    return tokenizer.own_ids[kind]


class LineEnds(NamedTuple):
    """Where generating a line of text ends: at the first line break after a visible character.

    Of each token, whether it has a visible character, and whether it ends the line: before any
    visible character came, and after. [vocab_size] bool each
    """

    visible: torch.Tensor
    ends_before: torch.Tensor
    ends_after: torch.Tensor


@lru_cache(maxsize=1)
def line_ends(tokenizer):
    """-> LineEnds of a tokenizer's tokens. A base model seldom writes eos; it begins another line."""
    texts = [tokenizer.decode([id]) for id in range(tokenizer.vocab_size)]
    visible = [bool(text.strip()) for text in texts]
    before = [has_line_break(text.lstrip()) for text in texts]
    after = [has_line_break(text) for text in texts]
    return LineEnds(torch.tensor(visible), torch.tensor(before), torch.tensor(after))


def has_line_break(text):
    """Also of the rarer kinds, so that no tool sees two lines in what is kept."""
    return len(f"{text}.".splitlines()) > 1


def first_line(text):
    """What is kept of a generated text. " Ein Haus. (line break) German:" -> "Ein Haus." """
    return "".join(text.lstrip().splitlines()[:1]).rstrip()


# --------------------------------------------------------------------------------------------------
# Files: JSON, text and safetensors, nothing that can execute; each is written whole or not at all


class InputError(ValueError):
    """The user's files or arguments are wrong; one line names what was found and expected."""


def exit_status(command, *arguments):
    """Run a command for the shell: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        command(*arguments)
        return 0
    except (InputError, OSError, SafetensorError) as error:  # OSError: a full disk, no permission
        # A line break in a file's name, or of the rarer kinds in what was found, stays in one line.
        shown = [c if c.isprintable() else ascii(c)[1:-1] for c in str(error)]
        print(f"error: {''.join(shown)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        kinds = MemoryError, torch.OutOfMemoryError
        if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
            raise
        remedy = "a smaller --micro-tokens (training) or --cache-gb (translating) takes less"
        print(f"error: out of memory; {remedy}", file=sys.stderr)
        return 2


# What reading a damaged file ends in: RecursionError is a RuntimeError, KeyError a LookupError, and
# what JSON and UTF-8 raise are ValueErrors. torch.OutOfMemoryError is none of the file's.
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
DAMAGE += (RuntimeError, struct.error, SafetensorError)


@contextmanager
def reading(path):
    """Whatever goes wrong while a file is read is the file's fault: one InputError that names it.

    The body holds the reading alone, or a mistake of ours would be called a damaged file.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def read_json(path):
    """The JSON in a file. InputError where it is none."""
    with reading(path):
        return parse_json(Path(path).read_text("utf-8-sig"))


def parse_json(text):
    """JSON text -> its value. ValueError for what is no JSON, no number, or half a character."""
    text.encode()
    value = json.loads(text, parse_constant=refuse_constant)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return value


def refuse_constant(name):
    raise ValueError(f"{name} is no number")


def read_lines(path):
    """A text file's lines, or a pipe's."""
    return list(Lines(path))


def open_safetensors(path):
    """A safetensors file, memory-mapped. InputError where it is none."""
    with reading(path):
        return safe_open(path, framework="pt")


def read_tensors(path):
    """All tensors of a safetensors file. -> {name: tensor}"""
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}


HALF_WRITTEN = ".half-written"


@contextmanager
def replacing(path):
    """A temporary name beside `path`, renamed at the end: no half-written file ever has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + HALF_WRITTEN)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path, lines):
    write_text(path, "".join(f"{line}\n" for line in lines))


def json_text(value, indent=""):
    """JSON for people: a line for each entry of an object, however long the list that it holds."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    deeper = indent + "  "
    entries = [f"{deeper}{json.dumps(k)}: {json_text(v, deeper)}" for k, v in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def write_json(path, value):
    write_text(path, json_text(value) + "\n")


def write_tensors(path, tensors):
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets the owner alone read its files


def fingerprint(path):
    """What tells a file from another: the SHA-256 of its content; of safetensors, header and size.

    Reading all of a 7B checkpoint would take longer than it tells.
    """
    with reading(path), open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
        (header,) = struct.unpack("<Q", file.read(8))
        digest = hashlib.sha256(file.read(min(header, size))).hexdigest()
        return f"{digest}, {size} bytes"


@contextmanager
def locked(folder):
    """Hold a folder, making it where there is none; one process at a time, until it ends or dies.

    Sweeps what a killed run left half-written in it. A folder in which nothing came to lie is
    removed again. InputError names the process that holds it, and links, which may lead anywhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    for entry in folder.iterdir():
        if entry.is_symlink() and (entry == path or entry.is_dir()):
            raise InputError(f"{entry}: a link, expected a file or folder of this run's own")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file")
    with open(path, "a+") as file:
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)  # freed when we die
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError  # who held it removed it
        except (portalocker.AlreadyLocked, FileNotFoundError):
            holder = ""
            with suppress(OSError):  # Windows does not let others read what is locked
                file.seek(0)
                holder = file.read()
            raise InputError(f"{folder}: in use by {holder or 'another process'}") from None
        except portalocker.LockException:
            print(f"{folder}: no locks here; let no other run use this folder", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        sweep(folder)
        try:
            yield
        finally:
            file.truncate(0)
            if os.listdir(folder) == [path.name]:
                with suppress(OSError):  # Windows does not remove what is open
                    path.unlink()
                    folder.rmdir()


def sweep(folder):
    """Remove what was half-written when a run was killed, in a run's folder alone, and no links."""
    if not (folder / "args.json").is_file():
        return
    for pattern in (f"*{HALF_WRITTEN}", f"*/*{HALF_WRITTEN}", ".tmp??????"):  # safetensors' own
        for left_over in folder.glob(pattern):
            if stat.S_ISREG(left_over.lstat().st_mode):
                left_over.unlink()
