"""Prompts and batches; parallel text and tokenizers of published checkpoints; files.

    tokenizer = load_tokenizer("bloom-7b1/")                    # tokenizer.json, or tokenizer.model
    pairs = read_parallel("wmt16/", "train", "en-de")           # [(source, target), ...]
    examples = [render(tokenizer, "en-de", source, target) for source, target in pairs]
    for ids, mask, targets in make_batches(examples, tokenizer.pad_id, tokens_per_batch=4096): ...

In this file: the prompt; batches; languages; parallel text; tokenizers; files.
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
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, reduce
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, permutations
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")

import numpy as np
import portalocker
import regex
import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


# --------------------------------------------------------------------------------------------------
# The prompt


PROMPT = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"


def prompt_text(pair, source):
    """The one prompt, of training and evaluation. "en-de", "A house." -> "Translate this from ..." """
    first, second = (language_name(code) for code in split_pair(pair))
    return PROMPT.format(source=first, target=second, text=source)


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
# Languages


# Codes of ISO 639, of two letters and of three as FLORES-200 has them, and the name in the prompt;
# of a script or region only where its text is another. By the tokenizer of sacreBLEU that counts
# words there. Last, the demo's toy languages.
LANGUAGES_BY_TOKENIZER = {
    "zh": """
    zh zho cmn=Chinese, zh-Hant zho-Hant cmn-Hant zh-TW zho-TW zh-HK zho-HK zh-MO=Traditional Chinese,
    yue=Cantonese
    """,
    "ja-mecab": "ja jpn=Japanese",
    "ko-mecab": "ko kor=Korean",
    "char": "bo bod=Tibetan, dz dzo=Dzongkha, km khm=Khmer, lo lao=Lao, my mya=Burmese, th tha=Thai",
    "13a": """
    af afr=Afrikaans, ak aka=Akan, am amh=Amharic, ar ara arb=Arabic, as asm=Assamese, ast=Asturian,
    ay aym ayr=Aymara, az aze azj=Azerbaijani, ba bak=Bashkir, be bel=Belarusian, bg bul=Bulgarian,
    bho=Bhojpuri, bm bam=Bambara, bn ben=Bengali, br bre=Breton, bs bos=Bosnian, ca cat=Catalan,
    ceb=Cebuano, ckb=Sorani, cs ces=Czech, cy cym=Welsh, da dan=Danish, de deu=German,
    dsb=Lower Sorbian, ee ewe=Ewe, el ell=Greek, en eng=English, eo epo=Esperanto, es spa=Spanish,
    et est ekk=Estonian, eu eus=Basque, fa fas pes=Persian, ff ful fuv=Fula, fi fin=Finnish,
    fil=Filipino, fo fao=Faroese, fon=Fon, fr fra=French, fy fry=Frisian, ga gle=Irish,
    gd gla=Scottish Gaelic, gl glg=Galician, gn grn=Guarani, gu guj=Gujarati, ha hau=Hausa,
    he heb=Hebrew, hi hin=Hindi, hr hrv=Croatian, hsb=Upper Sorbian, ht hat=Haitian Creole,
    hu hun=Hungarian, hy hye=Armenian, id ind=Indonesian, ig ibo=Igbo, is isl=Icelandic,
    it ita=Italian, iu iku=Inuktitut, jv jav=Javanese, ka kat=Georgian, kg kon=Kikongo,
    ki kik=Kikuyu, kk kaz=Kazakh, kmr ku kur=Kurdish, kn kan=Kannada, ky kir=Kyrgyz, la lat=Latin,
    lb ltz=Luxembourgish, lg lug=Luganda, ln lin=Lingala, lt lit=Lithuanian, lv lav lvs=Latvian,
    mai=Maithili, mg mlg plt=Malagasy, mi mri=Maori, mk mkd=Macedonian, ml mal=Malayalam,
    mn mon khk=Mongolian, mr mar=Marathi, ms msa zsm=Malay, mt mlt=Maltese, nb nob=Norwegian Bokmål,
    ne nep npi=Nepali, nl nld=Dutch, nn nno=Norwegian Nynorsk, no nor=Norwegian, nso=Sotho,
    ny nya=Chichewa, oc oci=Occitan, om orm gaz=Oromo, or ori ory=Odia, pa pan=Punjabi,
    pl pol=Polish, ps pus pbt=Pashto, pt por=Portuguese, qu que quy=Quechua, rn run=Kirundi,
    ro ron=Romanian, ru rus=Russian, rw kin=Kinyarwanda, sa san=Sanskrit, sd snd=Sindhi,
    si sin=Sinhala, sk slk=Slovak, sl slv=Slovenian, sn sna=Shona, so som=Somali,
    sq sqi als=Albanian, sr srp=Serbian, st sot=Sesotho, su sun=Sundanese, sv swe=Swedish,
    sw swa swh=Swahili, ta tam=Tamil, te tel=Telugu, tg tgk=Tajik, ti tir=Tigrinya, tk tuk=Turkmen,
    tl tgl=Tagalog, tn tsn=Setswana, tr tur=Turkish, ts tso=Tsonga, tt tat=Tatar, tum=Tumbuka,
    tw twi=Twi, ug uig=Uyghur, uk ukr=Ukrainian, ur urd=Urdu, uz uzb uzn=Uzbek, vi vie=Vietnamese,
    wo wol=Wolof, xh xho=Xhosa, yi yid ydd=Yiddish, yo yor=Yoruba, zu zul=Zulu,
    pt-BR por-BR=Brazilian Portuguese, sr-Latn srp-Latn=Serbian in Latin script,
    ar-Latn arb-Latn=Arabic in Latin script, bn-Latn ben-Latn=Bengali in Latin script,
    hi-Latn hin-Latn=Hindi in Latin script, ne-Latn npi-Latn=Nepali in Latin script,
    si-Latn sin-Latn=Sinhala in Latin script, ur-Latn urd-Latn=Urdu in Latin script,
    qaa=Avari, qab=Belun, qac=Corith, qad=Dorva
    """,
}


def read_languages(text):
    """ "de deu=German, fr=French" -> {"de": "German", "deu": "German", "fr": "French"}"""
    languages = {}
    for entry in text.split(","):
        codes, _, name = entry.strip().partition("=")
        if not codes or not name.strip() or not name.isprintable():
            raise InputError(f"language {entry!r}: expected a code and a name, as in de=German")
        languages |= dict.fromkeys(codes.split(), name.strip())
    return languages


LANGUAGES = read_languages(",".join(LANGUAGES_BY_TOKENIZER.values()))


def name_languages(text):
    """Add to LANGUAGES what --language names, before anything is read: "", or "xx=Name, ..." """
    if text:
        LANGUAGES.update(read_languages(text))


def language_name(code):
    """ "de", "deu", "de-AT" or "deu_Latn" -> "German"; "" for no code that is known."""
    base, *others = re.split("[-_]", code)
    codes = [code]
    if re.fullmatch(r"([A-Z][a-z]{3})?([A-Z]{2}|\d{3})?", "".join(others)):  # a script, a region
        codes += ["-".join([base, *others]), *(f"{base}-{one}" for one in others), base]
    return next((LANGUAGES[code] for code in codes if code in LANGUAGES), "")


def bleu_tokenizer(code):
    """What sacreBLEU splits a target language by. "zho_Hans" -> "zh", "de" -> "13a" """
    base, name = re.split("[-_]", code)[0], language_name(code)
    for tokenizer, text in LANGUAGES_BY_TOKENIZER.items():
        languages = read_languages(text)
        if base in languages or name in languages.values():  # --language may name it otherwise
            return tokenizer
    return "13a"


def split_pair(pair):
    """ "en-de" -> ("en", "de"), "en-pt-BR" -> ("en", "pt-BR"). InputError for unknown languages."""
    for hyphen in re.finditer("-", pair):
        codes = pair[: hyphen.start()], pair[hyphen.end() :]
        first, second = (language_name(code) for code in codes)
        if first and second and first != second:
            return codes
    unknown = [code for code in pair.split("-") if not language_name(code)]
    if "-" in pair and unknown:
        raise InputError(f"pair {pair!r}: no language {unknown[0]!r}; add --language CODE=NAME")
    raise InputError(f"pair {pair!r}: expected two language codes, source first, as in en-de")


# --------------------------------------------------------------------------------------------------
# Parallel text


class Lines(Sequence):
    """A text file's lines, decoded when asked for: 8 bytes a line; the file stays on disk, mapped.

    Only newlines end a line: str.splitlines would split at U+2028, too.
    """

    def __init__(self, path):
        self.path, self.raw = path or "standard input", map_file(path)
        self.ends = np.flatnonzero(np.frombuffer(self.raw, np.uint8) == ord("\n"))
        if len(self.ends) == 0 and b"\r" in self.raw[:-1]:
            raise InputError(
                f"{self.path}: its lines end as old Macs wrote them, in \\r without \\n"
            )
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


NUMBER = re.compile(r"\s*[-+]?\d*\.?\d+(e[-+]?\d+)?\s*", re.IGNORECASE)
QUOTED = re.compile('"(?:[^"]|"")*"')


def read_columns(path, source_column):
    """Tab-separated text, the source in column 0 or 1. -> sources, targets

    Numbers after those, as of scores, are left out. Quotes go where they are a spreadsheet's: around
    each field that has some, and doubled in it.
    """
    rows = [line.split("\t") if line.strip() else ["", ""] for line in Lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not all(map(NUMBER.fullmatch, row[2:])):
            where = f"{path}: line {number} of {len(rows)} has {len(row)} tab-separated columns"
            raise InputError(f"{where}, expected 2, and none but numbers after them")
    if any(len(row) > 2 for row in rows):
        note(f"{path}: numbers after two columns of text are left out")
    if rows and all(language_name(c) or c in ("source", "target") for c in rows[0][:2]):
        note(f"{path}: its first line is taken for text, not a header: {rows[0][:2]}")
    quoted = [field for field in chain(*rows) if '"' in field]
    if all(map(QUOTED.fullmatch, quoted)) and any('""' in field for field in quoted):
        note(f"{path}: quotes around fields are taken away, as a spreadsheet has put them")
        for row in rows:
            row[:] = [c.replace('""', '"')[1:-1] if c.startswith('"') else c for c in row]
    return [row[source_column] for row in rows], [row[1 - source_column] for row in rows]


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
    if halves:
        note(f"{folder}: {split} {pair}{halves}; {paths[0].name} is read")
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
    """The directions a split offers, sorted: ["de-en", "en-de"]; of languages that are known."""
    codes = set()
    for path in Path(folder).glob(f"{split}.*"):
        name = path.name.removeprefix(f"{split}.").split(".")[0]  # of a language or a pair
        if language_name(name):
            codes.add(name)
        with suppress(InputError):
            codes.update(split_pair(name))
    pairs = []
    for source, target in permutations(sorted(codes), 2):
        forms = candidates(folder, split, source, target)
        differ = language_name(source) != language_name(target)
        if differ and any(all(map(Path.exists, paths)) for paths, _ in forms):
            pairs.append(f"{source}-{target}")
    return sorted(pairs)


# --------------------------------------------------------------------------------------------------
# Tokenizers


# The split regexes that are known, as published. `regex`, which comes with sacrebleu, reads them in
# its version 1 as `tokenizers` does: \p{L}, Unicode's \s, and a class in a class is a union. Not so
# \w, ^, $ or {2}?, and nested counts may take for ever: another regex is refused by name.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
NEMO_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"  # one after another
SPLITS = BLOOM_SPLIT, GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, NEMO_SPLIT, *DEEPSEEK_SPLITS


def byte_characters():
    """GPT-2's printable character for each byte: its own, or U+0100 and on where that is none.

    65 -> "A", 32 -> "Ġ", 10 -> "Ċ"
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def steps_of(part, key):
    """What a part of a tokenizer.json does, one after the other: nothing, one step, or several."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def known_normalizer(path, step):
    """A step of a normalizer, as a function str -> str."""
    match step:
        case {"type": "NFC"}:
            return partial(unicodedata.normalize, "NFC")
        case {"type": "Prepend", "prepend": str(mark)}:
            return lambda text: text and mark + text
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return lambda text: text.replace(old, new)
    raise InputError(f"{path}: {step} is no normalizer that is known here")


def known_split(path, step):
    """A step of a pre_tokenizer, as a function str -> pieces; None where it splits nothing."""
    match step:
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": _}:  # encode puts the mark
            return re.compile("(?=▁)").split if step.get("split", True) else None
        case {"type": "Digits", "individual_digits": bool(apart)}:
            return regex.compile(r"(\p{N})" if apart else r"(\p{N}+)").split
        case {"type": "ByteLevel", "add_prefix_space": False}:
            if step.get("use_regex", True):
                return regex.compile(f"({GPT2_SPLIT})", regex.V1).split
            return None
        case {"type": "Split", "pattern": {"Regex": split}, "behavior": how} if split in SPLITS:
            if how == "Isolated":
                return regex.compile(f"({split})", regex.V1).split  # matches, what is between
            if how == "Removed" and step["invert"]:
                return regex.compile(split, regex.V1).findall
    raise InputError(f"{path}: {step} is no pre_tokenizer that is known here")


def ids_in_front(path, post_processor):
    """What a post_processor puts in front of a text, [] or [id]. InputError where it does more."""
    ids = []
    for step in steps_of(post_processor, "processors"):
        if step["type"] != "ByteLevel":  # which trims offsets
            if step["type"] != "TemplateProcessing":
                raise InputError(f"{path}: post_processor {step['type']} is not known here")
            single = step["single"]
            names = [one["SpecialToken"]["id"] for one in single[:-1] if "SpecialToken" in one]
            for name in names:
                ids += step["special_tokens"][name]["ids"]
            if len(names) < len(single) - 1 or "Sequence" not in single[-1] or len(ids) > 1:
                raise InputError(f"{path}: post_processor {single} adds more than a token in front")
    return ids


class BPETokenizer:
    """Byte-pair encoding from a tokenizer.json, in plain Python: the ids of the `tokenizers` library.

    Over bytes, each a character of GPT-2's table (BLOOM, GPT-2, Qwen2, Llama-3), or over characters
    with "▁" for a space, where what has no token is spelled in bytes, <0xE2> (LLaMA-2, Mistral).
    InputError names what a file does beside. added: the folder's added tokens, {id, content, flags}
    """

    def __init__(self, path, published, added):
        with reading(path):
            model = published["model"]
            steps = steps_of(published["pre_tokenizer"], "pretokenizers")
            decoders = steps_of(published["decoder"], "decoders")
            normalizers = steps_of(published.get("normalizer"), "normalizers")
            normalizers = [known_normalizer(path, step) for step in normalizers]
            self.normalize = partial(reduce, lambda text, step: step(text), normalizers)
            self.splits = [*filter(None, (known_split(path, step) for step in steps))]
            # Where a Metaspace puts "▁": "always" in front, at the "first" word, or "never".
            self.mark = next((s["prepend_scheme"] for s in steps if s["type"] == "Metaspace"), "")
            self.strips = decoders[-1:] == [STRIP]  # decoding takes that space away
            self.over_bytes = [step["type"] for step in steps][-1:] == ["ByteLevel"]
            self.symbols = [f"<0x{byte:02X}>" for byte in range(256)]
            if self.over_bytes:
                self.symbols = list(map(byte_characters().get, range(256)))
            check_options(path, self, model, decoders, added)
            self.ignore_merges = model.get("ignore_merges")  # for a piece that is a token
            self.vocabulary = model["vocab"]  # token -> id
            # "a b" until tokenizers 0.20, [a, b] since.
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            self.ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
            self.added = {token["content"]: token["id"] for token in added}
            literal = [token["content"] for token in added if not token.get("normalized")]
            others = self.added.keys() - literal  # matched in what the normalizer makes of the rest
            self.normalized = {self.normalize(content): self.added[content] for content in others}
            self.split_literal, self.split_normalized = any_of(literal), any_of(self.normalized)
            self.ids = self.vocabulary | self.added
            self.tokens = {id: token for token, id in self.ids.items()}
            self.tokens |= {id: token for token, id in self.normalized.items()}
            for merge in self.ranks:
                if len(merge) != 2 or not {*merge, "".join(merge)} <= self.vocabulary.keys():
                    raise InputError(f"{path}: merge {merge} is no two tokens that make a third")
        if not (self.over_bytes or self.ignore_merges):
            if not any("▁" in token.lstrip("▁") for token in self.vocabulary):
                self.splits.append(re.compile("(▁*[^▁]+)").split)  # the same ids, and words repeat
        self.own_ids = [self.added.get(token, -1) for token in ("<s>", "</s>", "<pad>")]  # BLOOM's
        self.bytes = {symbol: byte for byte, symbol in enumerate(self.symbols)}
        self.piece_ids = lru_cache(maxsize=1 << 18)(self.merge)  # words repeat: most are found here

    def encode(self, text):
        """str -> list of ids. Added tokens in the text are matched literally, first of all."""
        ids = []
        for i, part in enumerate(self.split_literal(text)):  # those of odd numbers are tokens
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, piece in enumerate(self.split_normalized(self.normalize(part))):
                if j % 2:
                    ids.append(self.normalized[piece])
                    continue
                if self.mark:
                    piece = piece.replace(" ", "▁")
                is_marked = self.mark == "always" or (self.mark == "first" and i == j == 0)
                if is_marked and piece and not piece.startswith("▁"):
                    piece = "▁" + piece
                pieces = [piece]
                for split in self.splits:
                    pieces = chain.from_iterable(map(split, pieces))
                ids += chain.from_iterable(map(self.piece_ids, pieces))
        return ids

    def merge(self, piece):
        """Ids of one piece: merge the pair of lowest rank, the leftmost on ties, until none is left.

        A heap of candidate merges over a linked list: a piece of n bytes takes n log n steps.
        str -> tuple of ids
        """
        symbols = []
        for part in [piece] if self.over_bytes else piece:
            if part in self.vocabulary and not self.over_bytes:
                symbols.append(part)
            else:
                symbols += [self.symbols[byte] for byte in part.encode("utf-8", errors="replace")]
        if self.ignore_merges and "".join(symbols) in self.vocabulary:
            return (self.vocabulary["".join(symbols)],)
        symbols = [c for c in symbols if c in self.vocabulary]  # `tokenizers` drops others, too
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols)))
        ranks = self.ranks
        heap = [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]
        heapify(heap)
        symbols.append(None)  # what stands after the last and before the first, number -1
        while heap:
            rank, i = heappop(heap)
            j = after[i]
            if ranks.get((symbols[i], symbols[j])) != rank:
                continue  # one of the two has been merged since
            symbols[i] += symbols[j]
            symbols[j] = None
            after[i] = after[j]
            before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                pair = symbols[left], symbols[right]
                if pair in ranks:
                    heappush(heap, (ranks[pair], left))
        return tuple(self.vocabulary[symbol] for symbol in symbols if symbol is not None)

    def decode(self, ids):
        """List of ids -> str. A character's bytes may straddle tokens: all are decoded at once."""
        raw = bytearray()
        for id in ids:
            token = self.tokens.get(id, "")  # ids may have gaps
            symbols = token if self.over_bytes else [token]
            if all(symbol in self.bytes for symbol in symbols):
                raw += bytes(self.bytes[symbol] for symbol in symbols)
            else:  # an added token may hold any character
                text = token if self.over_bytes else token.replace("▁", " ")
                raw += text.encode("utf-8", errors="replace")
        text = raw.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips else text


def any_of(tokens):
    """-> a function, str -> [text, token, text, ..., text]; of two tokens at a place, the longer."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split


# What decodes "▁", and takes away the space that it put in front.
MARKS_TO_TEXT = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def check_options(path, tokenizer, model, decoders, added):
    """Refuse what changes the ids of a tokenizer.json and is not known to BPETokenizer."""
    expected = [MARKS_TO_TEXT, [*MARKS_TO_TEXT, STRIP]]
    decodes = decoders in expected
    if tokenizer.over_bytes:
        decodes = [step["type"] for step in decoders] == ["ByteLevel"]
    if model["type"] != "BPE" or not decodes:
        found = f"model {model['type']} and decoder {decoders}"
        raise InputError(f"{path}: {found} are not known here beside this pre_tokenizer")
    known = ["type", "vocab", "merges", "fuse_unk"]
    if model.get("ignore_merges") is True:
        known.append("ignore_merges")
    if model["vocab"].keys() >= {*tokenizer.symbols}:
        known += ["unk_token", "byte_fallback"]  # nothing is unknown
    elif not tokenizer.over_bytes:
        raise InputError(f"{path}: model has not all tokens of bytes, <0x00> to <0xFF>")
    if not (tokenizer.over_bytes or model.get("byte_fallback")):
        raise InputError(f"{path}: model has no byte_fallback: characters without a token are lost")
    parts = [(path, model, known)]
    for token in added:
        if model["vocab"].get(token["content"], token["id"]) != token["id"]:
            raise InputError(
                f"{path}: added token {token['content']} has another id in model.vocab"
            )
        flags = ("id", "content", "special", "normalized")
        parts.append((f"{path}: added token {token['content']}", token, flags))
    for where, part, known in parts:
        for key, value in part.items():
            if value and key not in known:
                raise InputError(f"{where}: {key} is {value!r}, which is not known here")


class SentencePieceTokenizer:
    """A tokenizer.model: Baichuan's, LLaMA's, Mistral's. The file's own flags treat white space.

    Tokens that a folder adds are known by id, and not looked for in a text.
    """

    def __init__(self, path, added):
        with reading(path):
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=map_file(path)[:])
            pieces = model.id_to_piece(list(range(model.get_piece_size())))  # all of UTF-8?
            self.tokens = dict(enumerate(pieces))
            others = [token for token in added if self.tokens.get(token["id"]) != token["content"]]
            self.added = {token["id"]: token["content"] for token in others}
        self.tokens |= self.added
        self.ids = {token: id for id, token in self.tokens.items()}
        pad = model.pad_id() if model.pad_id() >= 0 else model.unk_id()  # LLaMA pads with <unk>
        self.own_ids = [model.bos_id(), model.eos_id(), pad]
        self.encode = model.encode

    def decode(self, ids):
        """List of ids -> str."""
        text = ""
        pieces = range(self.model.get_piece_size())
        for is_piece, run in groupby(ids, lambda id: id in pieces and id not in self.added):
            if is_piece:
                text += self.model.decode(list(run))
            else:
                text += "".join(self.added.get(id, "") for id in run)  # ids may have gaps
        return text


# How the files beside a tokenizer name a token that begins a text, ends it, or pads.
NAMED = {
    "special_tokens_map.json": "{}_token",
    "tokenizer_config.json": "{}_token",
    "config.json": "{}_token_id",
    "generation_config.json": "{}_token_id",
}
# Keys of generation_config.json that would change the likeliest text. Sampling's do not count.
PENALTIES = "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids"
# Keys of tokenizer_config.json that would change ids.
NOT_KNOWN = "do_lower_case", "split_special_tokens", "sp_model_kwargs", "fix_mistral_regex"


def added_tokens(folder, files):
    """The tokens that a folder's files add: content -> {id, content, flags}, as tokenizer.json has."""
    added = {}
    with reading(f"{folder}: added tokens of added_tokens.json or tokenizer_config.json"):
        for content, id in files["added_tokens.json"].items():
            added[content] = {"content": content, "id": id}
        for id, token in files["tokenizer_config.json"].get("added_tokens_decoder", {}).items():
            added[token["content"]] = token | {"id": int(id)}
    with reading(f"{folder}/tokenizer.json"):
        for token in files["tokenizer.json"].get("added_tokens", []):
            added[token["content"]] = token
    added.pop("", None)
    with reading(f"{folder}/config.json"):
        rows = int(files["config.json"].get("vocab_size", 2**30))
    with reading(f"{folder}: ids of added tokens"):
        for content in [content for content, token in added.items() if token["id"] >= rows]:
            note(f"{folder}: added token {content} has no row in the embedding; it is left out")
            del added[content]
    return added


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder: its tokenizer.model, or else tokenizer.json,
    also where that has tokens which tokenizer.model has not.

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .bos_id, .eos_id, .pad_id, .vocab_size;
    .end_ids: all that end a text, eos_id first;
    .prompt_prefix: [bos_id] where the folder's files ask for it, else []; encode adds none.
    .target_prefix: the space between prompt and target, "" where encode adds it.
    .paths: the files that were read, the tokenizer's own first.
    """
    path, json_path = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    names = "tokenizer.json", "added_tokens.json", *NAMED
    paths = [path.with_name(name) for name in names if path.with_name(name).exists()]
    files = dict.fromkeys(names, {}) | {one.name: read_json(one) for one in paths}
    if not (path.exists() or json_path.exists()):
        remedy = "from other forms transformers' AutoTokenizer writes one (save_pretrained)"
        raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model; {remedy}")
    added = added_tokens(folder, files)
    with reading(json_path):
        vocabulary = files["tokenizer.json"].get("model", {}).get("vocab", {})
        in_json = set(vocabulary.items()) if isinstance(vocabulary, dict) else set()
    tokenizer = None
    try:
        tokenizer = SentencePieceTokenizer(path, added.values())
    except InputError:  # there is none, or it is tiktoken's
        if not json_path.exists():
            raise
    if tokenizer is None or in_json - tokenizer.ids.items():  # tokens were added there alone
        path = json_path
        tokenizer = BPETokenizer(path, files["tokenizer.json"], added.values())
    else:
        no_pieces = [token for token in added.values() if token["id"] in tokenizer.added]
        if words := [token["content"] for token in no_pieces if not token.get("special")]:
            note(f"{path}: not looked for in a text, but known by id: {', '.join(words[:10])}")
    tokenizer.paths = list(dict.fromkeys([path, *paths]))
    with reading(path):
        smallest, largest = min(tokenizer.tokens), max(tokenizer.tokens)
    if not 0 <= smallest <= largest < 2**24:
        raise InputError(f"{path}: ids from {smallest} to {largest}, expected 0 to 2**24 - 1")
    tokenizer.vocab_size = largest + 1
    # LLaMA's puts a space before any text, a "dummy prefix": a second one would be a token.
    begin = "".join(tokenizer.tokens[id] for id in tokenizer.encode("a"))
    tokenizer.target_prefix = "" if begin.startswith("▁") else " "
    frame(path, tokenizer, files)
    return tokenizer


def frame(path, tokenizer, files):
    """Decide which tokens begin and end a text, from all that a folder says.

    As in transformers 5 the template of a tokenizer.json alone says what stands in front; where that
    file is not, add_bos_token does, and where no key says, LLaMA's class puts bos there. What any
    file names as an end is one. Sets .prompt_prefix, .bos_id, .eos_id, .end_ids, .pad_id. InputError
    for what contradicts, and for keys that would change ids.
    """
    config_path = path.with_name("tokenizer_config.json")
    json_path = path.with_name("tokenizer.json")
    config = files[config_path.name]
    for key in NOT_KNOWN:
        if config.get(key):
            raise InputError(f"{config_path}: {key} is {config[key]!r}, which is not known here")
    generation_path = path.with_name("generation_config.json")
    with reading(generation_path):
        for key in PENALTIES:
            value = files[generation_path.name].get(key)
            if value not in (None, 0, 1, []):
                note(f"{generation_path}: {key} {value!r} is not applied")
    if config.get("add_prefix_space") not in (None, tokenizer.target_prefix == ""):
        raise InputError(f"{config_path}: add_prefix_space is not what {path.name} does")
    bos, eos, pad = (named_ids(kind, path, tokenizer, files) for kind in ("bos", "eos", "pad"))
    own_bos, own_eos, own_pad = ([id] if id >= 0 else [] for id in tokenizer.own_ids)
    if files[json_path.name]:
        with reading(json_path):
            front = ids_in_front(json_path, files[json_path.name].get("post_processor"))
        bos = [*bos, *front, *own_bos]
    else:
        bos = [*bos, *own_bos]
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        if adds_bos not in (False, True) or (adds_bos and not bos):
            raise InputError(f"{config_path}: add_bos_token is {adds_bos!r}, the token {bos}")
        front = bos[:1] if adds_bos else []
    if front != bos[: len(front)] or not {*front} <= tokenizer.tokens.keys():
        raise InputError(f"{path}: {front} begins a text, but beginning-of-sentence is {bos[:1]}")
    tokenizer.end_ids = list(dict.fromkeys([*eos, *own_eos]))
    if not tokenizer.end_ids:
        raise InputError(f"{path}: no end-of-sentence token, nor in {', '.join(NAMED)}")
    tokenizer.prompt_prefix, tokenizer.bos_id = front, [*bos, -1][0]
    tokenizer.eos_id = tokenizer.end_ids[0]
    tokenizer.pad_id = [*pad, *own_pad, tokenizer.eos_id][0]  # padding is masked: any id does


def named_ids(kind, path, tokenizer, files):
    """Ids that a folder names as "bos", "eos" or "pad", first the one that counts."""
    names, ids = list(NAMED), []
    if "added_tokens_decoder" in files["tokenizer_config.json"]:
        names[:2] = names[1::-1]  # special_tokens_map.json is older then, as in transformers 5
    for name in names:
        key = NAMED[name].format(kind)
        with reading(path.with_name(name)):
            value = files[name].get(key)
            value = value["content"] if isinstance(value, dict) else value
            for one in value if isinstance(value, list) else [value]:
                id = one if key.endswith("_id") else tokenizer.ids.get(one)
                if type(id) is int and id in tokenizer.tokens:
                    ids.append(id)
                elif one is not None and kind != "pad":  # some pad with a token that is not there
                    raise InputError(f"{path.with_name(name)}: {key} {one!r} is in no vocabulary")
    return ids


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


def printable(text):
    """Without line breaks, of a file's name or of the rarer kinds, and what steers a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def note(text):
    """One line on stderr."""
    print(printable(text), file=sys.stderr)


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
    except Exception as error:  # RecursionError, SafetensorError, ...
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def map_file(path):
    """A file's bytes, which stay on disk; in memory those of a pipe, or of half-read standard input.

    path: 0 is standard input.
    """
    with reading(path or "standard input"), open(path, "rb") as file:
        whole = os.fstat(file.fileno()).st_size and file.tell() == 0
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if whole else file.read()
    if raw[:23] == b"version https://git-lfs":
        raise InputError(f"{path}: a Git LFS pointer; git lfs pull or hf download fetches the file")
    return raw


def read_json(path):
    """The JSON in a file, UTF-8. InputError where it is none."""
    with reading(path):
        return parse_json(map_file(path)[:].decode("utf-8-sig"))


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
    map_file(path)  # names a Git LFS pointer
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
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_lines(path, lines):
    """A line each for every reader: what only some take for a line's end becomes a space."""
    write_text(path, "".join(f"{' '.join(line.splitlines())}\n" for line in lines))


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
    """The SHA-256 of a file's content; of safetensors header, size and some bytes of each tensor.

    Reading 14 GB would take longer than it tells. Sisters, as bloom and bloomz, differ in each tensor.
    """
    raw = map_file(path)
    if path.suffix != ".safetensors":
        return hashlib.sha256(raw).hexdigest()
    with reading(path):
        start = 8 + int.from_bytes(raw[:8], "little")
        digest = hashlib.sha256(raw[:start])
        for name, tensor in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                middle = start + sum(tensor["data_offsets"]) // 2
                digest.update(raw[middle - 64 : middle + 64])
    return f"{digest.hexdigest()}, {len(raw)} bytes"


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
    with open(path, "a+", errors="replace") as file:
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
                    if left_over.is_file() and not left_over.is_symlink():
                        left_over.unlink()
        try:
            yield
        finally:
            file.truncate(0)
            if os.listdir(folder) == [path.name]:
                with suppress(OSError):  # Windows does not remove what is open
                    path.unlink()
                    folder.rmdir()
