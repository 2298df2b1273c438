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
        raise InputError(f"pair {pair!r}: expected two language codes, source first, as in en-de")
    for code in codes:
        if code not in LANGUAGES:
            raise InputError(f"pair {pair!r}: no language {code!r} in LANGUAGES in data.py")
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
            if os.fstat(file.fileno()).st_size:
                self.raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                self.raw = file.read()  # a pipe, or nothing
        self.ends = np.flatnonzero(np.frombuffer(self.raw, np.uint8) == ord("\n"))
        if self.raw and self.raw[-1:] != b"\n":
            self.ends = np.append(self.ends, len(self.raw))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        end = int(self.ends[i])  # an IndexError ends a loop
        start = int(self.ends[i - 1]) + 1 if i else 0
        try:
            return self.raw[start:end].decode("utf-8" if i else "utf-8-sig").removesuffix("\r")
        except UnicodeDecodeError as error:
            where = f"{self.path}: line {i + 1} of {len(self)}"
            raise InputError(f"{where} is not UTF-8 ({error.reason})") from None


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


def read_two_files(source, target):
    """Line i of one file is a translation of line i of the other. -> sources, targets"""
    sources, targets = Lines(source), Lines(target)
    if len(sources) != len(targets):
        raise InputError(f"{source} has {len(sources)} lines but {target} has {len(targets)}")
    return sources, targets


def read_columns(path, source_column):
    """Tab-separated text of two columns; source_column is 0 or 1. -> sources, targets"""
    columns, lines = ([], []), Lines(path)
    for number, line in enumerate(lines, 1):
        row = line.split("\t") if line.strip() else ["", ""]
        if len(row) != 2:
            where = f"{path}: line {number} of {len(lines)}"
            raise InputError(f"{where} has {len(row)} tab-separated columns, expected 2")
        for column, text in zip(columns, row):
            column.append(text)
    return columns[source_column], columns[1 - source_column]


def read_translations(path, source, target):
    """ALMA's JSON: a list, or one a line, of {"translation": {"de": ..., "en": ...}}. -> 2 columns"""
    text = "\n".join(read_lines(path))
    with reading(path):
        if text.lstrip().startswith("["):
            items = parse_json(text)
        else:
            empty = {"translation": {source: "", target: ""}}
            items = [parse_json(line) if line.strip() else empty for line in text.split("\n")]
    columns = [], []
    for number, item in enumerate(items, 1):
        with reading(f"{path}: item {number} of {len(items)}"):
            for column, code in zip(columns, (source, target)):
                column.append("" + item["translation"][code])  # text, or a TypeError
    return columns


def candidates(folder, split, source, target):
    """The files that may hold a split's text, of each form, and the function that reads them.

    In order of preference: the exact order of the pair, the reverse, multi-way text.
    """
    for first, second in ((source, target), (target, source)):
        stem = f"{folder}/{split}.{first}-{second}"
        yield [Path(f"{stem}.{source}"), Path(f"{stem}.{target}")], read_two_files
        yield [Path(f"{stem}.tsv")], partial(read_columns, source_column=int(first != source))
        yield [Path(f"{stem}.json")], partial(read_translations, source=source, target=target)
    yield [Path(f"{folder}/{split}.{source}"), Path(f"{folder}/{split}.{target}")], read_two_files


def open_parallel(folder, split, pair):
    """Sentence pairs of one direction, decoded when asked for. -> ParallelText

    Reads {split}.{pair}.{lang}, .tsv (columns in the pair's order) or .json (ALMA's), in either
    order of the pair, or multi-way {split}.{lang}. Pairs with an empty side, and blank lines, are
    skipped and counted. Files of one language each take 24 bytes a pair; others are read as a whole.
    """
    halves = ""
    for paths, read in candidates(folder, split, *split_pair(pair)):
        missing = [path.name for path in paths if not path.exists()]
        if not missing:
            break
        if len(missing) < len(paths):
            halves += f"; there is one side, but no {missing[0]}"
    else:
        found = ", ".join(list_pairs(folder, split)) or "none"
        raise InputError(f"{folder}: no {split} text for {pair}{halves}; pairs found: {found}")
    sources, targets = read(*paths)
    kept = []
    for i, (source, target) in enumerate(zip(sources, targets)):  # names a line of bad UTF-8, too
        if source.strip() and target.strip() and "\n" not in source + target:
            kept.append(i)
    if skipped := len(sources) - len(kept):
        why = "a side is empty or more than a line"
        note(f"{folder}: {split} {pair}: skipped {skipped} of {len(sources)} pairs, {why}")
    return ParallelText((sources, targets), np.array(kept, np.int64), paths)


def read_parallel(folder, split, pair):
    """All that open_parallel gives, [(source, target), ...]."""
    return list(open_parallel(folder, split, pair))


def list_pairs(folder, split):
    """The directions a split offers, sorted: ["de-en", "en-de"]; of languages in LANGUAGES."""
    codes = set()
    for path in Path(folder).glob(f"{split}.*"):
        codes |= LANGUAGES.keys() & {*re.split("[.-]", path.name)}
    pairs = []
    for source, target in permutations(sorted(codes), 2):
        for paths, _ in candidates(folder, split, source, target):
            if all(path.exists() for path in paths):
                pairs.append(f"{source}-{target}")
                break
    return pairs


# --------------------------------------------------------------------------------------------------
# Tokenizers


# The split regexes that are known, as published. `regex`, which comes with sacrebleu, reads them in
# its version 1 as `tokenizers` does: \p{L}, Unicode's \s, and a class in a class is a union. Not so
# \w, ^, $ or {2}?, and nested counts may take for ever: another regex is refused by name.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPLITS = BLOOM_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT


def byte_characters():
    """GPT-2's table from byte to printable character: itself, or U+0100 and on where unprintable.

    65 -> "A", 32 -> "Ġ", 10 -> "Ċ"
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others, map(chr, [*printable, *range(256, 512)])))


def steps_of(part, key):
    """What a part of a tokenizer.json does, one after the other: nothing, one step, or several."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def known_step(path, step):
    """A step of a normalizer, as a function str -> str, or of a pre_tokenizer, str -> pieces."""
    match step:
        case {"type": "NFC"}:
            return partial(unicodedata.normalize, "NFC")
        case {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}:
            if split in SPLITS:
                return regex.compile(f"({split})", regex.V1).split  # matches, what is between
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return lambda text: [text]
    raise InputError(f"{path}: {step} is no step that is known here")


def ids_in_front(path, post_processor):
    """What a post_processor puts in front of a text, [] or [id]. InputError where it does more."""
    ids = []
    for step in steps_of(post_processor, "processors"):
        if step["type"] != "ByteLevel":  # which trims offsets
            single = step["single"]
            names = [one["SpecialToken"]["id"] for one in single[:-1] if "SpecialToken" in one]
            for name in names:
                ids += step["special_tokens"][name]["ids"]
            if len(names) < len(single) - 1 or "Sequence" not in single[-1] or len(ids) > 1:
                raise InputError(f"{path}: post_processor {single} adds more than a token in front")
    return ids


class BPETokenizer:
    """Byte-level BPE from a tokenizer.json, in plain Python: the ids of the `tokenizers` library.

    BLOOM's, Qwen2's and Llama-3's. InputError names what another pipeline has that these have not.
    """

    target_prefix = " "
    largest_id = 2**24

    def __init__(self, path):
        published = read_json(path)
        with reading(path):
            model = published["model"]
            check_options(path, published)
            known = partial(known_step, path)
            self.normalizers = [*map(known, steps_of(published.get("normalizer"), "normalizers"))]
            self.splits = [*map(known, steps_of(published["pre_tokenizer"], "pretokenizers"))]
            self.in_front = ids_in_front(path, published.get("post_processor"))
            self.ignore_merges = model.get("ignore_merges")  # for a piece that is a token
            self.vocabulary = model["vocab"]  # token, in byte characters -> id
            # "a b" until tokenizers 0.20, [a, b] since.
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            self.ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
            self.added, literal, normalized = {}, [], []  # those are matched in what others leave
            for token in published["added_tokens"]:
                if token["content"]:
                    self.added[token["content"]] = token["id"]
                    (normalized if token.get("normalized") else literal).append(token["content"])
            self.ids = self.vocabulary | self.added
            self.tokens = {id: token for token, id in self.ids.items()}
            smallest, self.vocab_size = min(self.tokens), max(self.tokens) + 1
            if not 0 <= smallest < self.vocab_size <= self.largest_id:
                raise InputError(f"{path}: ids from {smallest} to {self.vocab_size - 1}")
        for merge in self.ranks:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= self.vocabulary.keys():
                raise InputError(f"{path}: merge {merge} is not of two tokens that make a third")
        if not {*self.in_front} <= self.tokens.keys():
            raise InputError(f"{path}: post_processor adds {self.in_front}, which is no token")
        bos, eos, pad = (self.added.get(token, -1) for token in ("<s>", "</s>", "<pad>"))  # BLOOM's
        self.own_ids = {"bos": self.in_front[0] if self.in_front else bos, "eos": eos, "pad": pad}
        self.literal, self.normalized = any_of(literal), any_of(normalized)
        self.byte_characters = byte_characters()
        self.character_bytes = {character: byte for byte, character in self.byte_characters.items()}
        self.piece_ids = lru_cache(maxsize=1 << 18)(self.merge)  # words repeat: most are found here

    def encode(self, text):
        """str -> list of ids. Added tokens in the text are matched literally, first of all."""
        ids = []
        for part in chain.from_iterable(map(self.normalized.split, self.literal.split(text))):
            if part in self.added:
                ids.append(self.added[part])
                continue
            for normalize in self.normalizers:
                part = normalize(part)
            pieces = [part]
            for split in self.splits:
                pieces = chain.from_iterable(map(split, pieces))
            for piece in pieces:
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


def any_of(tokens):
    """A pattern whose .split gives those tokens and what is between; of two at a place the longer."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def check_options(path, published):
    """Refuse what changes the ids of a tokenizer.json and is not known to BPETokenizer."""
    model, steps = published["model"], steps_of(published["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps], published["decoder"]["type"], model["type"]
    expected = ["Split", "ByteLevel"], "ByteLevel", "BPE"
    if kinds != expected:
        raise InputError(f"{path}: pre_tokenizer, decoder, model are {kinds}, expected {expected}")
    if model.get("ignore_merges") not in (None, False, True):
        raise InputError(f"{path}: ignore_merges {model['ignore_merges']} is no boolean")
    flags = ("id", "content", "special", *([] if published.get("normalizer") else ["normalized"]))
    parts = [(path, model, ("type", "vocab", "merges", "ignore_merges", "fuse_unk"))]
    for token in published["added_tokens"]:
        parts.append((f"{path}: added token {token['content']}", token, flags))
    for where, part, known in parts:
        for key, value in part.items():
            if value and key not in known:
                raise InputError(f"{where}: {key} is {value!r}, which is not known here")


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


# Where a folder says which token begins a text, ends it, or pads: the first that does so counts.
SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "config.json"


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder.

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .bos_id, .eos_id, .pad_id, .vocab_size;
    .prompt_prefix: [bos_id] where the folder's files ask for it, else []; encode adds none.
    .target_prefix: the space between prompt and target, "" where encode adds it.
    .paths: the files that were read, the tokenizer's own first.
    """
    path = Path(folder) / "tokenizer.model"
    if path.exists():
        tokenizer = SentencePieceTokenizer(path)
    else:
        path = path.with_name("tokenizer.json")
        tokenizer = BPETokenizer(path)
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
            f"{path}: post_processor adds {tokenizer.in_front}, not {tokenizer.bos_id}"
        )
    config = files.get(path.with_name("tokenizer_config.json"), {})
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        adds_bos = llama if path.name == "tokenizer.model" else bool(tokenizer.in_front)
    if adds_bos not in (False, True) or (adds_bos and tokenizer.bos_id < 0):
        raise InputError(
            f"{path}: add_bos_token {adds_bos!r}, beginning-of-sentence {tokenizer.bos_id}"
        )
    tokenizer.prompt_prefix = [tokenizer.bos_id] if adds_bos else []
    return tokenizer


def special_id(kind, tokenizer, files):
    """The id of a folder's "bos", "eos" or "pad", -1 for none.

    files: path -> content of those of SPECIAL_TOKENS that are there
    """
    for path, content in files.items():
        key = f"{kind}_token_id" if path.name == "config.json" else f"{kind}_token"
        with reading(path):
            value = content.get(key)
            if isinstance(value, dict):
                value = value["content"]
            if isinstance(value, list):
                value = value[0] if value else None  # several may end a text: the first is written
            id = tokenizer.ids.get(value) if key.endswith("_token") else value
        if type(id) is int and id in tokenizer.ids.values():
            return id
        if value is not None and kind != "pad":  # some files name no token of theirs as padding
            raise InputError(f"{path}: {key} {value!r} is not in the tokenizer's vocabulary")
    return tokenizer.own_ids[kind]


class LineEnds(NamedTuple):
    """Where generating a line of text ends: at the first line break after a visible character."""

    visible: torch.Tensor  # [vocab_size] bool: which tokens have a visible character
    ends_before: torch.Tensor  # the same: which end the line before any visible character came
    ends_after: torch.Tensor  # and after


@lru_cache(maxsize=1)
def line_ends(tokenizer):
    """-> LineEnds. A base model seldom writes eos; it begins another line."""
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError, SafetensorError) as error:  # OSError: a full disk, no permission
        note(f"error: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        note("error: out of memory; a smaller --micro-tokens or --cache-gb takes less")
        return 2


def note(text):
    """One line on stderr: without line breaks of a file's name, or what would steer a terminal."""
    shown = [c if c.isprintable() else ascii(c)[1:-1] for c in text]
    print("".join(shown), file=sys.stderr)


@contextmanager
def reading(path):
    """Whatever goes wrong while a file is read is the file's fault: one InputError that names it.

    The body holds the reading alone, or a mistake of ours would be called a damaged file.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # RecursionError, struct.error, SafetensorError, ...
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def read_json(path):
    """The JSON in a file, UTF-8. InputError where it is none."""
    with reading(path):
        return parse_json(Path(path).read_text("utf-8-sig"))


def parse_json(text):
    """JSON text -> its value. ValueError for what is no JSON, no number, or half a character."""
    value = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return value


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
    """SHA-256 of a file; of safetensors header and size, as reading 14 GB takes more than it tells."""
    with reading(path), open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(8), "little")
        digest = hashlib.sha256(file.read(min(header, size))).hexdigest()
        return f"{digest}, {size} bytes"


@contextmanager
def locked(folder):
    """Hold a folder, making it where there is none; one process at a time, until it ends or dies.

    Sweeps what a killed run left half-written, and removes a folder in which nothing came to lie.
    InputError names the process that holds it, or a link, which may lead anywhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    for entry in folder.iterdir():
        links_elsewhere = entry.is_symlink() and (entry == path or entry.is_dir())
        if links_elsewhere or (entry == path and not entry.is_file()):
            raise InputError(f"{entry}: a link, or no regular file; a run writes to its own alone")
    with open(path, "a+") as file:
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)  # freed when we die
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError  # who held it removed it
        except (portalocker.AlreadyLocked, FileNotFoundError):
            file.seek(0)
            raise InputError(f"{folder}: in use by {file.read() or 'another process'}") from None
        except portalocker.LockException:
            note(f"{folder}: no locks here; let no other run use this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        if (folder / "args.json").is_file():  # a run's own
            for pattern in (f"*{HALF_WRITTEN}", f"*/*{HALF_WRITTEN}", ".tmp??????"):  # safetensors'
                for left_over in folder.glob(pattern):
                    if stat.S_ISREG(left_over.lstat().st_mode):
                        left_over.unlink()
        try:
            yield
        finally:
            file.truncate(0)
            if os.listdir(folder) == [path.name]:
                with suppress(OSError):  # Windows does not remove what is open
                    path.unlink()
                    folder.rmdir()
