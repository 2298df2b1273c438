"""Files, tokenizers of published checkpoints, parallel text, prompts and batches.

    tokenizer = load_tokenizer("bloom-7b1/")                    # tokenizer.json, or tokenizer.model
    pairs = read_parallel("wmt16/", "train", "en-de")           # [(source, target), ...]
    examples = [render(tokenizer, "en-de", source, target) for source, target in pairs]
    for ids, mask, targets in make_batches(examples, tokenizer.pad_id, tokens_per_batch=4096): ...

In this file: files; the two tokenizers; languages and the prompt; parallel text; batches.
Letters: B sentences, T tokens.
"""

import codecs
import fcntl
import hashlib
import json
import math
import mmap
import os
import socket
import struct
import random
import re
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed


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


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path, shape={}):
    """The JSON in a file, checked against a shape (see check_shape). InputError where it differs."""
    return parse_json(read_bytes(path), shape, path)


def parse_json(text, shape, where):
    """JSON text, str or bytes -> its value, of that shape. InputError begins with `where`."""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
        if b"\\ud" in (text if isinstance(text, bytes) else text.encode()).lower():
            json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except RecursionError:
        raise InputError(f"{where}: not JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: has half a character, a lone surrogate") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    check_shape(value, shape, where)
    return value


def refuse_constant(name):
    raise ValueError(f"{name} is no number")


JSON_KINDS = {dict: "a JSON object", list: "a list", str: "text", bool: "true or false"}
JSON_KINDS |= {int: "a whole number", float: "a number", type(None): "null"}


def kind_of(shape):
    return shape if isinstance(shape, type) else type(shape)


def has_kind(value, shape):
    """Whether a value is of a shape's outermost kind. A whole number is a number, too."""
    if type(value) in (int, float) and abs(value) >= 2**63:
        return False  # would overflow later
    return type(value) is kind_of(shape) or (shape is float and type(value) is int)


def check_shape(value, shape, where):
    """InputError, beginning with `where`, for a JSON value that is not of a shape.

    int, float, str, bool, None: such a value; [int]: a list of them; {str: int}: an object of them;
    {"name": str}: an object with at least these keys, {}: any; (None, int): one or the other.
    """
    if isinstance(shape, tuple):
        matching = [one for one in shape if has_kind(value, one)]
        shape = matching[0] if matching else shape[-1]
    if not has_kind(value, shape):
        found = json.dumps(value)
        found = found if len(found) < 60 else JSON_KINDS[type(value)]
        raise InputError(f"{where}: {found} is not {JSON_KINDS[kind_of(shape)]}")
    if isinstance(shape, list):
        for item in value:
            check_shape(item, shape[0], f"{where}: in the list")
    elif isinstance(shape, dict) and str in shape:
        for key, item in value.items():
            check_shape(item, shape[str], f"{where}: {key}")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise InputError(f"{where}: no {key}")
            check_shape(value[key], inner, f"{where}: {key}")


def read_lines(path):
    """A text file's lines. Only newlines end a line: str.splitlines would split at U+2028, too."""
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            where = f"line {number} of {len(lines)}"
            raise InputError(f"{path}: {where} is not UTF-8 ({error.reason})") from None
    return decoded


class Lines(Sequence):
    """A text file's lines, as read_lines gives them, found at once and decoded when asked for.

    It takes 8 bytes a line; the file stays on disk, mapped. InputError names a line of bad UTF-8.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0
                raw = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        self.raw = raw
        self.first = len(codecs.BOM_UTF8) if raw[:3] == codecs.BOM_UTF8 else 0
        ends, decoder = [], codecs.getincrementaldecoder("utf-8")()
        try:
            for start in range(0, len(raw), BYTES_AT_A_TIME):
                some = raw[start : start + BYTES_AT_A_TIME]
                decoder.decode(some)
                newlines = np.flatnonzero(np.frombuffer(some, np.uint8) == ord("\n"))
                ends.append(newlines + start)
            decoder.decode(b"", final=True)
            bad = False
        except UnicodeDecodeError:
            bad = True
        self.ends = np.concatenate([*ends, [len(raw)] * (len(raw) > 0 and raw[-1:] != b"\n")])
        self.ends = self.ends.astype(np.int64)
        if bad:
            read_lines(path)  # which names the line

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = int(self.ends[i - 1]) + 1 if i else self.first
        return self.raw[start : int(self.ends[i])].removesuffix(b"\r").decode("utf-8")

    def blank(self):
        """Which lines have nothing to see. -> [len(self)] bool"""
        if not len(self):
            return np.zeros(0, bool)
        starts = np.concatenate([[self.first], self.ends[:-1] + 1])
        first = np.frombuffer(self.raw, np.uint8)[np.minimum(starts, len(self.raw) - 1)]
        blank = np.isin(first, SPACES)  # or it has one of those before something else
        for i in np.flatnonzero(blank):
            blank[i] = not self[i].strip()
        return blank


BYTES_AT_A_TIME = 2**24
# First bytes of all white space in UTF-8.
SPACES = sorted({chr(code).encode()[0] for code in range(0x3001) if chr(code).isspace()})


def open_safetensors(path):
    """A safetensors file, memory-mapped. InputError where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def read_tensors(path):
    """All tensors of a safetensors file. -> {name: tensor}"""
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}


def first_process():
    """Of several that torchrun started, one alone writes and prints."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


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
    if not first_process():
        return
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
    if not first_process():
        return
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets the owner alone read its files


def fingerprint(path):
    """What tells a file from another: the SHA-256 of its content; of safetensors, header and size.

    Reading all of a 7B checkpoint would take longer than it tells.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix != ".safetensors":
                return hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            (header,) = struct.unpack("<Q", file.read(8))
            digest = hashlib.sha256(file.read(min(header, size))).hexdigest()
            return f"{digest}, {size} bytes"
    except (OSError, struct.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


@contextmanager
def locked(folder):
    """Hold a folder, making it where there is none; one process at a time, until it ends or dies.

    Sweeps what a killed process left half-written. A folder in which nothing came to lie is removed
    again. InputError names the process that holds it. Of several processes the first one holds it.
    """
    if not first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when we die
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError  # who held it removed it
        except (BlockingIOError, FileNotFoundError):
            file.seek(0)
            raise InputError(f"{folder}: in use by {file.read() or 'another process'}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for pattern in (f"*{HALF_WRITTEN}", f"*/*{HALF_WRITTEN}", ".tmp??????"):  # safetensors' own
            for left_over in folder.glob(pattern):
                left_over.unlink()
        try:
            yield
        finally:
            file.truncate(0)
            if os.listdir(folder) == [path.name]:
                path.unlink()
                folder.rmdir()


# --------------------------------------------------------------------------------------------------
# Tokenizers


# Unicode's 25 white space characters. Python's \s adds U+001C to U+001F, so it is spelled out.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# BLOOM's pre-tokenizer, as tokenizer.json spells it for Oniguruma, where the inner brackets are a
# union, and as Python needs it.
BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
BLOOM_PIECE = f" ?[^{WHITE_SPACE}(|).,!?…。，、।۔،]+"

# A part of a regex that means the same to Python as to Oniguruma, \p, \P, \s and \S apart: a class,
# with no other inside; a set outside of a class; an escape; a group; a count; a character. In any
# case, (?i:, f, i, ss and st are more to one of the two: "ss" is "ß", "i" is the dotless one.
REGEX_PART = re.compile(
    r"\[\^?(?:\\p\{\w+\}|\\[srnt]|\\[^\w\s]|&(?!&)|-(?!\\)|[^]\\[&-])+\]"
    r"|(?P<set>\\[pP]\{\w+\}|\\[sS])"
    r"|\\[rnt]|\\[^\w\s]"
    r"|\(\?[:=!]|\(\?i:(?=[a-eghj-z'|[\]]+\))(?![^)]*s[st])|\((?!\?)"
    r"|\{\d+(?:,\d*)?\}(?![?+])"
    r"|[^]\\[({^$]"
)
ESCAPE = re.compile(r"\\p\{(\w+)\}|\\.")


def piece_pattern(regex):
    """The split regex of a tokenizer.json, compiled. Its .split gives matches and what is between.

    Python's `re` has no \\p{L}, so classes are spelled out. ValueError, or one of `re`, names what
    it cannot have.
    """
    translated = BLOOM_PIECE if regex == BLOOM_SPLIT else ""
    rest = "" if translated else regex
    while rest:
        part = REGEX_PART.match(rest)
        if not part:
            raise ValueError(f"no counterpart to what {rest} begins with")
        rest = rest[part.end() :]
        text = part[0]
        if part["set"]:
            text = f"[{'^' * text[1].isupper()}\\{text[1].lower()}{text[2:]}]"
        elif text == "(":
            text = "(?:"  # another group would add to what .split gives
        translated += ESCAPE.sub(spell_out, text)
    pattern = re.compile(f"({translated})")
    if pattern.fullmatch(""):
        raise ValueError("it matches where there is nothing, too")  # others go on there otherwise
    return pattern


def spell_out(escape):
    """A match of ESCAPE inside a class -> the characters that it stands for."""
    if escape[1]:
        return characters_of(escape[1])
    return WHITE_SPACE if escape[0] == "\\s" else escape[0]


@lru_cache
def characters_of(category):
    """A general category of Unicode, "L" or "Lu", as ranges in a class. ValueError for no category.

    "Zl" -> "\\U00002028-\\U00002028"
    """
    ranges = ""
    belongs = lambda code: unicodedata.category(chr(code)).startswith(category)
    for inside, run in groupby(range(sys.maxunicode + 1), belongs):
        if inside:
            run = list(run)
            ranges += f"\\U{run[0]:08x}-\\U{run[-1]:08x}"
    if not ranges:
        raise ValueError(f"{category} is no general category of Unicode")
    return ranges


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


TOKENIZER_SHAPE = {
    "added_tokens": [{"id": int, "content": str}],
    "pre_tokenizer": (None, {}),
    "decoder": (None, {}),
    "model": {"type": str, "vocab": {str: int}, "merges": [(str, [str])]},
}
LARGEST_ID = 2**24


class ByteLevelTokenizer:
    """Byte-level BPE from a tokenizer.json, in plain Python: the ids of the `tokenizers` library.

    BLOOM's, Qwen2's and Llama-3's. InputError names what another pipeline has that these have not.
    """

    target_prefix = " "

    def __init__(self, path):
        published = read_json(path, TOKENIZER_SHAPE)
        regex, self.in_front = check_pipeline(path, published)
        try:
            self.pieces = piece_pattern(regex).split
        except (ValueError, re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: pre_tokenizer splits by {regex!r}: {error}") from None
        self.normalize = str
        if published.get("normalizer"):
            self.normalize = partial(unicodedata.normalize, "NFC")
        self.ignore_merges = published["model"].get("ignore_merges")  # for a piece that is a token
        check_shape(self.ignore_merges, (None, bool), f"{path}: model: ignore_merges")
        self.vocabulary = published["model"]["vocab"]  # token, in byte characters -> id
        added = [token for token in published["added_tokens"] if token["content"]]
        self.added = {token["content"]: token["id"] for token in added}
        self.ids = self.vocabulary | self.added
        self.tokens = {id: token for token, id in self.ids.items()}
        smallest, largest = min(self.tokens, default=0), max(self.tokens, default=0)
        if not 0 <= smallest <= largest < LARGEST_ID:
            found = f"ids from {smallest} to {largest}"
            raise InputError(f"{path}: {found}, expected 0 to {LARGEST_ID - 1}")
        if not {*self.in_front} <= self.tokens.keys():
            raise InputError(f"{path}: post_processor adds {self.in_front}, which is no token")
        self.vocab_size = largest + 1
        bos, eos, pad = (self.added.get(token, -1) for token in ("<s>", "</s>", "<pad>"))  # BLOOM's
        self.own_ids = {"bos": self.in_front[0] if self.in_front else bos, "eos": eos, "pad": pad}
        self.ranks = {}
        for rank, merge in enumerate(published["model"]["merges"]):
            # "a b" until tokenizers 0.20, [a, b] since.
            pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
            if len(pair) != 2 or not {*pair, "".join(pair)} <= self.vocabulary.keys():
                raise InputError(f"{path}: merge {merge!r} is not of two tokens that make a third")
            self.ranks[pair] = rank
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
                for piece in self.pieces(self.normalize(part)):
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


def check_pipeline(path, published):
    """Refuse a tokenizer.json that does to text what ByteLevelTokenizer does not.

    -> the regex that it splits by, and the ids that it puts in front of a text: [] or [one]
    """
    model, normalizer = published["model"], published.get("normalizer")
    pre_tokenizer = steps_of(published["pre_tokenizer"], "pretokenizers")
    pattern = pre_tokenizer[0].get("pattern") if pre_tokenizer else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    regex = regex if isinstance(regex, str) else "..."
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    options = ("dropout", "unk_token", "byte_fallback")
    options += ("continuing_subword_prefix", "end_of_word_suffix")
    flags = ["single_word", "lstrip", "rstrip", *["normalized"] * bool(normalizer)]
    flagged = []
    for token in published["added_tokens"]:
        flagged += [f"{token['content']} {flag}" for flag in flags if token.get(flag)]
    found = {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": [model["type"], *(f"{name}={model[name]}" for name in options if model.get(name))],
        "decoder": (published["decoder"] or {}).get("type"),
        "added_tokens": flagged,
    }
    expected = {
        "normalizer": {"type": "NFC"} if normalizer else None,
        "pre_tokenizer": [split, byte_level],
        "model": ["BPE"],
        "decoder": "ByteLevel",
        "added_tokens": [],  # none with flags
    }
    for part, value in expected.items():
        if found[part] != value:
            raise InputError(f"{path}: {part} is {found[part]}, expected {value}")
    processors = steps_of(published.get("post_processor"), "processors")
    templates = [step for step in processors if step.get("type") != "ByteLevel"]  # trims offsets
    return regex, ids_in_front(templates, f"{path}: post_processor") if templates else []


def ids_in_front(templates, where):
    """What post-processors put in front of a text, [id]. InputError where they do anything else."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    found = [step.get("type") for step in templates]
    if found == ["TemplateProcessing"]:
        (template,) = templates
        check_shape(template, {"single": [{}], "special_tokens": {str: {"ids": [int]}}}, where)
        found = template["single"]
        for name, token in template["special_tokens"].items():
            in_front = {"SpecialToken": {"id": name, "type_id": 0}}
            if found == [in_front, text] and len(token["ids"]) == 1:
                return token["ids"]
    raise InputError(f"{where} is {found}, expected a template of one token in front of the text")


def steps_of(part, key):
    """What a part of a pipeline does, one after the other: nothing, one step, or a "Sequence"."""
    if part is None:
        return []
    if isinstance(part, dict) and part.get("type") == "Sequence":
        part = part.get(key)
    steps = []
    for step in part if isinstance(part, list) else [part]:
        step = dict(step) if isinstance(step, dict) else {"type": step}
        step.pop("trim_offsets", None)  # of no meaning to ids
        steps.append(step)
    return steps


class SentencePieceTokenizer:
    """A tokenizer.model: Baichuan's, LLaMA's, Mistral's. The file's own flags treat white space."""

    in_front = []  # nothing that the file says

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            pieces = self.model.id_to_piece(list(range(self.model.get_piece_size())))  # all UTF-8?
            begin = "".join(self.model.encode("a", out_type=str))
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({error})") from None
        self.vocab_size = len(pieces)
        self.ids = {piece: id for id, piece in enumerate(pieces)}
        # LLaMA's puts a space before any text, a "dummy prefix": a second one would be a token.
        self.target_prefix = "" if begin.startswith("▁") else " "
        model = self.model
        pad = model.pad_id() if model.pad_id() >= 0 else model.unk_id()  # LLaMA pads with <unk>
        self.own_ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": pad}
        self.encode, self.decode = model.encode, model.decode


TOKENIZERS = {"tokenizer.model": SentencePieceTokenizer, "tokenizer.json": ByteLevelTokenizer}

# Where a folder says which token begins a text, ends it, or pads: the first that does so counts.
NAMED = "{}_token", (None, str, {"content": str})
NUMBERED = "{}_token_id", (None, int, [int])
SPECIAL_TOKENS = {"tokenizer_config.json": NAMED, "special_tokens_map.json": NAMED}
SPECIAL_TOKENS |= {"config.json": NUMBERED}


def tokenizer_file(folder):
    """The file that holds the tokenizer of a published checkpoint folder."""
    for name in TOKENIZERS:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise InputError(f"{folder}: no tokenizer.model and no tokenizer.json")


def tokenizer_files(folder):
    """All files that load_tokenizer reads: the tokenizer's, then those of SPECIAL_TOKENS."""
    others = (Path(folder) / name for name in SPECIAL_TOKENS)
    return [tokenizer_file(folder), *(path for path in others if path.exists())]


def load_tokenizer(folder):
    """The tokenizer of a published checkpoint folder.

    -> .encode(str) -> list[int], .decode(list[int]) -> str, .bos_id, .eos_id, .pad_id, .vocab_size;
    .prompt_prefix: [bos_id] where the folder's files ask for it, else []; encode adds none.
    .target_prefix: the space between prompt and target, "" where encode adds it.
    """
    path, *others = tokenizer_files(folder)
    tokenizer = TOKENIZERS[path.name](path)
    files = {other: read_json(other, {}) for other in others}
    tokenizer.bos_id = special_id("bos", tokenizer, files)
    tokenizer.eos_id = special_id("eos", tokenizer, files)
    tokenizer.pad_id = special_id("pad", tokenizer, files)
    if tokenizer.eos_id < 0:
        raise InputError(f"{path}: no end-of-sentence token, nor in {', '.join(SPECIAL_TOKENS)}")
    if tokenizer.pad_id < 0:
        tokenizer.pad_id = tokenizer.eos_id  # padding is masked: any id does
    if tokenizer.in_front not in ([], [tokenizer.bos_id]):
        found = f"{path}: post_processor puts {tokenizer.in_front} in front of a text"
        raise InputError(f"{found}, expected beginning-of-sentence, {tokenizer.bos_id}")
    settings = path.with_name("tokenizer_config.json")
    config = files.get(settings, {})
    adds_bos = config.get("add_bos_token")
    check_shape(adds_bos, (None, bool), f"{settings}: add_bos_token")
    if adds_bos is None:
        llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        adds_bos = llama if path.name == "tokenizer.model" else bool(tokenizer.in_front)
    if adds_bos and tokenizer.bos_id < 0:
        raise InputError(f"{path}: no beginning-of-sentence token, which {settings.name} asks for")
    tokenizer.prompt_prefix = [tokenizer.bos_id] if adds_bos else []
    return tokenizer


def special_id(kind, tokenizer, files):
    """The id of a folder's "bos", "eos" or "pad", -1 for none.

    files: path -> content of those of SPECIAL_TOKENS that are there
    """
    for path, content in files.items():
        key, shape = SPECIAL_TOKENS[path.name]
        key = key.format(kind)
        value = content.get(key)
        check_shape(value, shape, f"{path}: {key}")
        if isinstance(value, list):
            value = value[0] if value else None  # several may end a text: the first is written
        if isinstance(value, dict):
            value = value["content"]
        if value is None:
            continue
        id = tokenizer.ids.get(value) if isinstance(value, str) else value
        if id in tokenizer.ids.values():
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
    # A tokenizer of another's making may have neither.
    prompt_prefix = getattr(tokenizer, "prompt_prefix", [])
    target_prefix = getattr(tokenizer, "target_prefix", " ")
    prompt_ids = [*prompt_prefix, *tokenizer.encode(prompt_text(pair, source))]
    if target is None:
        return prompt_ids, []
    target_ids = tokenizer.encode(f"{target_prefix}{target}")
    return prompt_ids, [*target_ids, tokenizer.eos_id]


# --------------------------------------------------------------------------------------------------
# Parallel text


class ParallelText(Sequence):
    """Sentence pairs, (source, target), some of the rows of files; text is decoded when asked for."""

    def __init__(self, rows, kept):
        self.rows, self.kept = rows, kept  # kept: numbers of rows, ascending

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.rows[row] for row in self.kept[i]]
        return self.rows[self.kept[i]]


class TwoFiles(Sequence):
    """Line i of one file is a translation of line i of the other."""

    def __init__(self, source_path, target_path):
        self.sources, self.targets = Lines(source_path), Lines(target_path)
        if len(self.sources) != len(self.targets):
            found = f"{source_path} has {len(self.sources)} lines"
            raise InputError(f"{found} but {target_path} has {len(self.targets)}")

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        return self.sources[i], self.targets[i]

    def complete(self):
        """Numbers of the rows with text on both sides."""
        return np.flatnonzero(~self.sources.blank() & ~self.targets.blank())


class Rows(list):
    """Sentence pairs in memory."""

    def complete(self):
        """Numbers of the rows with a line of text on both sides."""
        numbers = []
        for number, (source, target) in enumerate(self):
            if source.strip() and target.strip() and "\n" not in source + target:
                numbers.append(number)
        return np.array(numbers, np.int64)


def read_columns(path, source_column):
    """Tab-separated text of two columns; source_column is 0 or 1. A blank line is an empty pair."""
    rows, lines = Rows(), Lines(path)
    for number, line in enumerate(lines, 1):
        row = line.split("\t") if line.strip() else ["", ""]
        if len(row) != 2:
            where = f"line {number} of {len(lines)}"
            raise InputError(f"{path}: {where} has {len(row)} tab-separated columns, expected 2")
        rows.append((row[source_column], row[1 - source_column]))
    return rows


def read_translations(path, source, target):
    """ALMA's JSON: a list, or one a line, of {"translation": {"de": ..., "en": ...}}.

    A blank line is an empty pair.
    """
    lines = read_lines(path)
    text = "\n".join(lines)
    if text.lstrip().startswith("["):
        items = parse_json(text, [{}], path)
    else:
        empty = {"translation": {source: "", target: ""}}
        items = [parse_json(line, {}, path) if line.strip() else empty for line in lines]
    pairs = Rows()
    for number, item in enumerate(items, 1):
        where = f"{path}: item {number} of {len(items)}"
        try:
            check_shape(item, {"translation": {source: str, target: str}}, where)
        except InputError:
            raise InputError(f'{where} has no "translation" with {source} and {target}') from None
        pairs.append((item["translation"][source], item["translation"][target]))
    return pairs


def candidates(folder, split, source, target):
    """The files that may hold a split's text for one direction, in order of preference.

    The exact order of the pair comes first, then the reverse, then multi-way text. Yields the
    files of each form and the function that reads them.
    """
    for first, second in ((source, target), (target, source)):
        stem = f"{folder}/{split}.{first}-{second}"
        two_files = Path(f"{stem}.{source}"), Path(f"{stem}.{target}")
        yield two_files, TwoFiles
        yield [Path(f"{stem}.tsv")], partial(read_columns, source_column=int(first != source))
        yield [Path(f"{stem}.json")], partial(read_translations, source=source, target=target)
    multi_way = Path(f"{folder}/{split}.{source}"), Path(f"{folder}/{split}.{target}")
    yield multi_way, TwoFiles


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
    counted. InputError names file, line and count. Files of one language each take 24 bytes a pair
    of memory; TSV and JSON are read as a whole.
    """
    paths, read = find_parallel(folder, split, pair)
    rows = read(*paths)
    kept = rows.complete()
    if skipped := len(rows) - len(kept):
        note = f"skipped {skipped} of {len(rows)} pairs, a side is empty or more than a line"
        print(f"{folder}: {split} {pair}: {note}", file=sys.stderr)
    return ParallelText(rows, kept)


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
