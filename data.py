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
import os
import random
import re
import sys
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import portalocker
import sentencepiece
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


# --------------------------------------------------------------------------------------------------
# The prompt


# A space at the end belongs to the target: "German: Das", and " Das" is one token as a rule.
PROMPT = "Translate this from {source} to {target}:\n{source}: {text}\n{target}: "


def read_prompt(path):
    """A prompt of one's own, from a file like PROMPT. A line break at its end is dropped."""
    prompt = read_text(path).removesuffix("\n")
    if prompt.count("{text}") != 1 or "{source}" not in prompt or "{target}" not in prompt:
        raise InputError(f"{path}: expected {{text}} once, {{source}} and {{target}}: {PROMPT!r}")
    return prompt


def prompt_text(pair, source, prompt=PROMPT):
    """The prompt of training and evaluation. "en-de", "A house." -> "Translate this from ..." """
    first, second = pair_name(pair)
    filled = prompt.removesuffix(" ").replace("{source}", first).replace("{target}", second)
    return filled.replace("{text}", source)


def render(tokenizer, pair, source, target=None, prompt=PROMPT):
    """A translation example: (prompt ids, target ids). The target's end in eos; [] for None.

    Prompt and target are tokenized apart and joined, in training as in generation, so that no
    merge crosses the boundary. That is what the joined text gives, where a tokenizer splits there.
    """
    text = prompt_text(pair, source, prompt)
    ids = tokenizer.encode(text)
    prompt_ids = [*tokenizer.prompt_prefix, *ids]
    if target is None:
        return prompt_ids, []
    if prompt.endswith(" "):
        target_ids = tokenizer.encode(f"{tokenizer.target_prefix}{target}")
    else:  # glued on: alone, LLaMA's tokenizers would put a space in front
        target_ids = tokenizer.encode(text + target)[len(ids) :]
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
    """Which rows make up which batch: B <= rows_per_batch, B * T <= tokens_per_batch where B > 1.

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


def read_codes(text):
    """ "de deu=German, fr=French" -> {"de": "German", "deu": "German", "fr": "French"}"""
    names = {}
    for entry in text.split(","):
        codes, _, name = " ".join(entry.split()).partition("=")
        if not codes or not name or not name.isprintable():
            raise InputError(f"language {entry!r}: expected a code and a name, as in de=German")
        names |= dict.fromkeys(codes.lower().replace("_", "-").split(), name.strip())
    return names


# Codes of ISO 639, of two letters and of three as FLORES-200 has them, and the name in the prompt;
# of a script or region only where its text is another. Last, the demo's toy languages.
LANGUAGES = read_codes(
    """
    af afr=Afrikaans, am amh=Amharic, ar ara arb=Arabic, az aze azj=Azerbaijani, be bel=Belarusian,
    bg bul=Bulgarian, bho=Bhojpuri, bn ben=Bengali, bs bos=Bosnian, ca cat=Catalan, cs ces=Czech,
    cy cym=Welsh, da dan=Danish, de deu=German, el ell=Greek, en eng=English, es spa=Spanish, et
    est ekk=Estonian, eu eus=Basque, fa fas pes=Persian, fi fin=Finnish, fr fra=French, ga
    gle=Irish, gd gla=Scottish Gaelic, gl glg=Galician, gu guj=Gujarati, ha hau=Hausa, he
    heb=Hebrew, hi hin=Hindi, hr hrv=Croatian, hu hun=Hungarian, hy hye=Armenian, id
    ind=Indonesian, ig ibo=Igbo, is isl=Icelandic, it ita=Italian, iu iku=Inuktitut, ja
    jpn=Japanese, jv jav=Javanese, ka kat=Georgian, kk kaz=Kazakh, km khm=Khmer, kn kan=Kannada, ko
    kor=Korean, kmr ku=Kurdish, ky kir=Kyrgyz, lo lao=Lao, lt lit=Lithuanian, lv lav lvs=Latvian,
    mg plt=Malagasy, mk mkd=Macedonian, ml mal=Malayalam, mn khk=Mongolian, mr mar=Marathi, ms msa
    zsm=Malay, mt mlt=Maltese, my mya=Burmese, nb nob=Norwegian Bokmål, ne nep npi=Nepali, nl
    nld=Dutch, nn nno=Norwegian Nynorsk, no nor=Norwegian, or ori ory=Odia, pa pan=Punjabi, pl
    pol=Polish, ps pus pbt=Pashto, pt por=Portuguese, pt-br por-br=Brazilian Portuguese, ro
    ron=Romanian, ru rus=Russian, sd snd=Sindhi, si sin=Sinhala, sk slk=Slovak, sl slv=Slovenian,
    so som=Somali, sq sqi als=Albanian, sr srp=Serbian, sv swe=Swedish, sw swa swh=Swahili, ta
    tam=Tamil, te tel=Telugu, tg tgk=Tajik, th tha=Thai, tl tgl fil=Filipino, tr tur=Turkish, ug
    uig=Uyghur, uk ukr=Ukrainian, ur urd=Urdu, uz uzb uzn=Uzbek, vi vie=Vietnamese, xh xho=Xhosa,
    yo yor=Yoruba, yue=Cantonese, zh zho cmn=Chinese, zh-hant zho-hant cmn-hant zh-tw zho-tw zh-hk
    zho-hk zh-mo=Traditional Chinese, zu zul=Zulu, qaa=Avari, qab=Belun, qac=Corith, qad=Dorva
    """
)
# What sacreBLEU splits text by where spaces do not part words.
BLEU_TOKENIZERS = read_codes(
    "zh zho cmn yue=zh, ja jpn=ja-mecab, ko kor=ko-mecab, km khm lo lao my mya th tha=char"
)


def name_languages(text):
    """Add to LANGUAGES what --language names, before anything is read: "", or "xx=Name, ..." """
    if text:
        LANGUAGES.update(read_codes(text))


def language_name(code):
    """ "de", "deu", "de-AT" or "deu_Latn" -> "German"; "" for no code that is known."""
    base, *others = re.split("[-_]", code)
    is_tag = re.fullmatch(r"([a-z]{4})?([a-z]{2}|\d{3})?", "".join(others).lower())
    is_pair = any(part in LANGUAGES for part in others)  # de-en; in de-AT and pt-PT are regions
    codes = ["-".join([base, *others])]
    if is_tag and not is_pair:
        codes += [*(f"{base}-{part}" for part in others), base]
    return next((LANGUAGES[code.lower()] for code in codes if code.lower() in LANGUAGES), "")


def bleu_tokenizer(code, references=()):
    """What sacreBLEU splits a target language by: "zho_Hans" -> "zh", "de" -> "13a"; "char" where
    the references have fewer than a space in fifteen characters."""
    tokenizer = BLEU_TOKENIZERS.get(re.split("[-_]", code.lower())[0], "13a")
    text = "".join(references)
    return "char" if tokenizer == "13a" and text.count(" ") * 15 < len(text) else tokenizer


def split_pair(pair):
    """ "en-de" -> ("en", "de"), "en-pt-BR" -> ("en", "pt-BR"). InputError for unknown languages."""
    unknown = ""
    for hyphen in re.finditer("-", pair):
        codes = pair[: hyphen.start()], pair[hyphen.end() :]
        first, second = (language_name(code) for code in codes)
        if first and second and first != second:
            return codes
        if not unknown and bool(first) != bool(second):
            unknown = codes[bool(first)]
    if unknown:
        raise InputError(f"pair {pair!r}: no language {unknown!r}; add --language {unknown}=NAME")
    raise InputError(f"pair {pair!r}: expected two language codes, source first, as in en-de")


def pair_name(pair):
    """ "en-de", "eng_Latn-deu" -> ("English", "German"): what makes two spellings one pair."""
    return tuple(language_name(code) for code in split_pair(pair))


# --------------------------------------------------------------------------------------------------
# Parallel text


def read_two_files(source, target):
    """Line i of one file is a translation of line i of the other. -> sources, targets"""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise InputError(f"{source} has {len(sources)} lines but {target} has {len(targets)}")
    return sources, targets


def read_columns(path, source_column):
    """Tab-separated text, the source in column 0 or 1. -> sources, targets"""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        rows.append(line.split("\t") if line.strip() else ["", ""])
        if len(rows[-1]) != 2:
            found = f"line {number} has {len(rows[-1])} tab-separated columns"
            raise InputError(f"{path}: {found}, expected 2 (cut -f1,2 keeps the first two)")
    return [row[source_column] for row in rows], [row[1 - source_column] for row in rows]


def read_translations(path, source, target):
    """ALMA's JSON, {"translation": {"de": ..., "en": ...}}: a list, or one a line. -> 2 columns"""
    lines = read_lines(path)
    is_list = path.suffix == ".json" and "".join(lines[:1]).lstrip().startswith("[")
    items, columns = read_json(path) if is_list else lines, ([], [])
    for number, item in enumerate(items, 1):
        with reading(f"{path}: {'item' if is_list else 'line'} {number}"):
            item = item if is_list else json.loads(item)
            for column, code in zip(columns, (source, target)):
                column.append("" + item["translation"][code])  # text, or a TypeError
                column[-1].encode()  # half of a surrogate pair is no text
    return columns


def split_name(folder, split):
    """What a split's files are called: development text has three names."""
    names = [split] if split != "valid" else ["valid", "dev", "val"]
    return next((name for name in names if any(Path(folder).glob(f"{name}.*"))), split)


def candidates(folder, split, source, target):
    """The files that may hold a split's text, of each form, and the function that reads them.

    In order of preference: the exact order of the pair, the reverse, multi-way text.
    """
    split = split_name(folder, split)
    read_alma = partial(read_translations, source=source, target=target)
    for first, second in ((source, target), (target, source)):
        stem = f"{folder}/{split}.{first}-{second}"
        yield [Path(f"{stem}.{source}"), Path(f"{stem}.{target}")], read_two_files
        yield [Path(f"{stem}.tsv")], partial(read_columns, source_column=int(first != source))
        yield [Path(f"{stem}.json")], read_alma
        yield [Path(f"{stem}.jsonl")], read_alma
    yield [Path(f"{folder}/{split}.{source}"), Path(f"{folder}/{split}.{target}")], read_two_files


def open_parallel(folder, split, pair):
    """Sentence pairs of one direction, and the files they lie in. -> [(source, target), ...], paths

    Reads {split}.{pair}.{lang}, .tsv (columns in the pair's order), .json or .jsonl (ALMA's), in
    either order of the pair, or multi-way {split}.{lang}; any codes of the two languages will do.
    Pairs with an empty side, or with a line break inside, are skipped and counted.
    """
    offered, found, problem = list_pairs(folder, split), [], ""
    spelled = [other for other in offered if pair_name(other) == pair_name(pair)]
    source, target = split_pair(pair if pair in offered else [*spelled, pair][0])
    for paths, read in candidates(folder, split, source, target):
        missing = [path.name for path in paths if not path.exists()]
        if not missing:
            found.append((paths, read))
        elif len(missing) < len(paths):
            problem += f"; there is one side, but no {missing[0]}"
    if not found:
        there = sorted(path.name for path in Path(folder).glob(f"{split}.*"))[:9]
        expected = (
            f"{', '.join(there) or 'no such file'}; pairs found: {', '.join(offered) or 'none'}"
        )
        raise InputError(f"{folder}: no {split} text for {pair}{problem}, in {expected}")
    (paths, read), *others = found
    others = [other[0].name for other, _ in others if f".{target}-{source}." not in other[0].name]
    if others:
        note(f"{folder}: {split} {pair}: {paths[0].name} is read, not {', '.join(others)}")
    sources, targets = read(*paths)
    pairs = []
    for source, target in zip(sources, targets):
        if source.strip() and target.strip() and "\n" not in source + target:
            pairs.append((source, target))
    if skipped := len(sources) - len(pairs):
        why = "a side is empty or more than a line"
        note(f"{folder}: {split} {pair}: skipped {skipped} of {len(sources)} pairs, {why}")
    return pairs, paths


def read_parallel(folder, split, pair):
    """The pairs of open_parallel. -> [(source, target), ...]"""
    return open_parallel(folder, split, pair)[0]


def list_pairs(folder, split):
    """The directions a split offers, sorted: ["de-en", "en-de"]; of languages that are known."""
    if not Path(folder).is_dir():
        found = "a file" if Path(folder).exists() else "not there"
        raise InputError(f"{folder}: {found}, expected a folder of text")
    codes, split = set(), split_name(folder, split)
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


class JsonTokenizer:
    """A tokenizer.json, read by the library that defines it: BLOOM's, and most others'."""

    def __init__(self, path):
        with reading(path):
            self.library = tokenizers.Tokenizer.from_buffer(read_bytes(path))
            self.library.no_padding()
            self.library.no_truncation()
            self.ids = self.library.get_vocab(with_added_tokens=False)
            self.added = self.library.get_vocab(with_added_tokens=True)
            # What stands in front of a text is what the library puts in front of this one.
            with_prefix, text = self.library.encode("a").ids, self.encode("a")
            self.prompt_prefix = with_prefix[: with_prefix.index(text[0])]
        self.own_ends = [id for token, id in self.added.items() if token == "</s>"]

    def encode(self, text):
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.library.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer:
    """A tokenizer.model without a tokenizer.json: Baichuan's. Its own flags treat white space.

    config: what tokenizer_config.json says; added: added_tokens.json. What they add is known by id,
    and not looked for in a text.
    """

    def __init__(self, path, config, added):
        with reading(path):
            self.model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
            pieces = self.model.id_to_piece(list(range(self.model.get_piece_size())))
            decoder = config.get("added_tokens_decoder", {})
            self.added = added | {token["content"]: int(id) for id, token in decoder.items()}
        self.ids = {piece: id for id, piece in enumerate(pieces)}
        self.own_ends = [self.model.eos_id()] if self.model.eos_id() >= 0 else []
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # LLaMA's code adds one, Baichuan's does not
            adds_bos = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        self.prompt_prefix = [self.model.bos_id()] if adds_bos else []

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([id for id in ids if id < len(self.ids)])


# Where a folder names the ends of a text: as a token, an id, or several. The first is trained with.
ENDS = {
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
}


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder: its tokenizer.json, or else tokenizer.model.

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .vocab_size;
    .end_ids: all that end a text, .eos_id first; .pad_id: any id, as padding is masked;
    .prompt_prefix: what stands in front of a text ([bos], as a rule, or []); encode adds none;
    .target_prefix: the space between prompt and target, "" where encode adds it.
    """
    folder = Path(folder)
    files = {name: read_if_there(folder / name) for name in (*ENDS, "added_tokens.json")}
    config = files["tokenizer_config.json"]
    if (path := folder / "tokenizer.json").exists():
        tokenizer = JsonTokenizer(path)
    elif (path := folder / "tokenizer.model").exists():
        tokenizer = SentencePieceTokenizer(path, config, files["added_tokens.json"])
    else:
        remedy = "from other forms transformers' AutoTokenizer writes one (save_pretrained)"
        raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model; {remedy}")
    with reading(path):
        # Some folders add a token for padding that the embedding has no row for.
        rows = files["config.json"].get("vocab_size", math.inf)
        ids = tokenizer.ids | {token: id for token, id in tokenizer.added.items() if id < rows}
        tokenizer.vocab_size = max(ids.values()) + 1
        # LLaMA's puts a space before any text: a second one would be a token.
        begin = tokenizer.encode("a")[0]
        puts_space = any(ids.get(token) == begin for token in ("▁a", "▁", "Ġa", "Ġ"))
        tokenizer.target_prefix = "" if puts_space else " "
    if config.get("add_prefix_space") not in (None, puts_space):
        found = f"add_prefix_space is {config['add_prefix_space']}"
        raise InputError(f"{folder}/tokenizer_config.json: {found}, which {path.name} does not do")
    ends = []
    for name, key in ENDS.items():
        with reading(folder / name):
            value = files[name].get(key)
            for end in value if isinstance(value, list) else [value]:
                end = end["content"] if isinstance(end, dict) else end
                ends.append(ids.get(end, end))  # a token, or its id
    known = [id for id in ends if type(id) is int and 0 <= id < tokenizer.vocab_size]
    tokenizer.end_ids = list(dict.fromkeys(known)) or tokenizer.own_ends
    if not tokenizer.end_ids:
        raise InputError(f"{folder}: no end-of-sentence token in {', '.join(ENDS)}")
    tokenizer.eos_id = tokenizer.pad_id = tokenizer.end_ids[0]
    return tokenizer


@lru_cache(maxsize=1)
def line_ends(tokenizer):
    """Where a line of text ends: at the first line break after a visible character.

    A base model seldom writes eos; it begins another line. -> three of [vocab_size] bool: which
    tokens have a visible character; which end a line that has none so far; which end another
    """
    texts = [tokenizer.decode([id]) for id in range(tokenizer.vocab_size)]
    visible = [bool(text.strip()) for text in texts]
    before = [has_line_break(text.lstrip()) for text in texts]
    after = [has_line_break(text) for text in texts]
    return torch.tensor(visible), torch.tensor(before), torch.tensor(after)


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
        note("interrupted")
        return 130
    except (InputError, OSError, SafetensorError) as error:  # a full disk, no permission
        note(f"error: {error}".replace("\n", "\\n"))  # a prompt has several lines
        return 2
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|can't allocate memory", repr(error)):
            raise
        note("error: out of memory; a smaller --micro-tokens or --cache-gb takes less")
        return 2


def note(text):
    """One line on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def reading(path):
    """Whatever goes wrong while a file is read is the file's fault: one InputError that names it.
    The body holds the reading alone, or a mistake of ours would be called a damaged file."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # KeyError, RecursionError, SafetensorError, ...
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read ({' '.join(why.split())[:300]})") from error


def read_bytes(path, size=-1):
    """A file's first bytes, or all; path 0 is standard input."""
    with reading(path or "standard input"), open(path, "rb") as file:
        raw = file.read(size)
    if raw[:23] == b"version https://git-lfs":
        raise InputError(f"{path}: a Git LFS pointer; git lfs pull or hf download fetches the file")
    return raw


def read_if_there(path):
    """The JSON object in a file, {} where there is no such file."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}, expected an object")
    return value


def read_text(path):
    """A text file, UTF-8; InputError names a line that is not."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"{path or 'standard input'}: line {line}"
        raise InputError(f"{where} is not UTF-8 ({error.reason})") from None


def read_json(path):
    text = read_text(path)
    with reading(path):
        return json.loads(text)


def read_lines(path):
    """A text file's lines. Only newlines end one: str.splitlines splits at U+2028, too."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def read_tensors(path):
    """All tensors of a safetensors file. -> {name: tensor}"""
    with reading(path):
        return load_file(path)


@contextmanager
def replacing(path):
    """A temporary name beside `path`, renamed at the end: what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.half-written")
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
    """The SHA-256 of a file; of safetensors, which may have 14 GB, that of a thousand samples."""
    size, digest = path.stat().st_size, hashlib.sha256()
    step = max(4096, size // 1000) if path.suffix == ".safetensors" else 4096
    with open(path, "rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(4096))
    return digest.hexdigest()


@contextmanager
def locked(folder):
    """Hold a folder, made where there is none: one process at a time, until it ends or dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.AlreadyLocked:
            raise InputError(f"{folder}: in use by another process") from None
        except portalocker.LockException:
            note(f"{folder}: no locks here; let no other run use this folder")
        yield
