"""The tokenizers of data.py against the libraries: ids and text of real lines and of random strings.

    pip install -r study/requirements.txt
    python study/tokens.py --tokenizers ../shared/tokenizers --data ../shared/data

BLOOM's pipeline comes from a folder. Qwen2's and Llama-3's are trained here, on an eighth of the
lines: their vocabularies are not at hand. Mistral's own tokenizer.model lies in mistral-common.
"""

import argparse
import random
import shutil
import sys
import tempfile
import textwrap
import unicodedata
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import exit_status, list_pairs, load_tokenizer, prompt_text, read_lines, read_parallel
from data import render, write_json

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A number in the split regex, whether NFC comes first, whether a whole token needs no merge, the
# token that a template puts in front; end-of-sentence and other added tokens.
PIPELINES = {
    "Qwen2": (r"\p{N}", True, False, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "Llama-3": (r"\p{N}{1,3}", False, True, "<|begin_of_text|>", ["<|end_of_text|>"]),
}


# --------------------------------------------------------------------------------------------------
# Tokenizers and texts


def train(name, lines, folder, vocab_size):
    """Train a tokenizer.json of a published pipeline, in a folder that is there."""
    number, composes, ignore_merges, bos, added = PIPELINES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT.replace("NUMBER", number)), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [bos, *added] if bos else added
    words = dict(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(**words, show_progress=False))
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        template = f"{bos} $A", f"{bos} $A {bos} $B"
        steps.append(processors.TemplateProcessing(*template, special_tokens=[(bos, 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": bos, "eos_token": added[0]})


def every_character():
    return [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


def missing_in_python(category):
    """Characters that are of a category in `tokenizers` alone, whose Unicode is newer."""
    split = pre_tokenizers.Split(Regex(f"\\p{{{category}}}"), behavior="removed")
    others = set()
    for piece, _ in split.pre_tokenize_str("".join(every_character())):
        others.update(piece)
    theirs = [c for c in every_character() if c not in others]
    return [c for c in theirs if not unicodedata.category(c).startswith(category)]


def missing_in_normalizer():
    """Characters that NFC in `tokenizers`, whose Unicode is older there, does not order or compose."""
    theirs = normalizers.NFC().normalize_str
    missing = []
    for c in every_character():
        if not unicodedata.combining(c) and not unicodedata.decomposition(c):
            continue  # NFC leaves it where it is
        parts = unicodedata.normalize("NFD", c)
        # Marks below a letter come before those above; none of these two composes with a q.
        for text in (f"q{c}\u0323", f"q\u0301{c}", parts):
            if theirs(text) != unicodedata.normalize("NFC", text):
                missing.append(c)
                break
    return missing


def random_texts(count, seed, added):
    """Strings of many alphabets, marks, numbers, contractions, white space, added tokens."""
    # Where tables of another version of Unicode lack a character, no implementation is wrong.
    lacking = {*missing_in_normalizer()}
    lacking |= {part for c in lacking for part in unicodedata.normalize("NFD", c)}
    characters = []
    for c in every_character():
        if unicodedata.category(c) != "Cn" and c not in lacking:
            characters.append(c)
    of = lambda *kinds: [c for c in characters if unicodedata.category(c).startswith(kinds)]
    letters = [c for c in of("L") if c < "\u3000"]
    kinds = [
        characters,
        letters,
        ["".join(letters[i : i + 4]) for i in range(len(letters))],
        of("M"),
        of("N"),
        of("Z", "Cc"),
        [c for c in characters if c < "\x80"],
        [f"'{end}" for end in "s S \u017f t re RE ve VE Ve m M ll Ll lL d D x".split()],
        [" ", "  ", "\n", "\r\n", "\t", " \n ", "\x85", "\u3000", "1234567", "'", "’s", "!?"],
        [unicodedata.normalize("NFD", c) for c in letters],
        added,
    ]
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(24)))


# --------------------------------------------------------------------------------------------------
# Comparing


def differences(texts, ours, encode, decode):
    """How many texts get other ids than the library's, and how many ids give another text."""
    other_ids = other_text = 0
    for text in texts:
        ids = ours.encode(text)
        other_ids += ids != encode(text)
        other_text += ours.decode(ids) != decode(ids)
    return other_ids, other_text


def unjoined(ours, pairs):
    """How many examples are not what the joined text of prompt and target gives."""
    wrong = 0
    for pair, source, target in pairs:
        prompt, answer = render(ours, pair, source, target)
        joined = ours.encode(f"{prompt_text(pair, source)} {target}")
        wrong += [*prompt, *answer] != [*ours.prompt_prefix, *joined, ours.eos_id]
    return wrong


COLUMNS = ["lines", "other ids", "other text", "strings", "other ids", "other text"]
COLUMNS += ["pairs", "not as joined"]


def row(cells):
    first, *others = cells
    return f"{first:<9}" + "".join(f"{cell:>{len(c) + 2}}" for cell, c in zip(others, COLUMNS))


def report(name, ours, encode, decode, lines, strings, pairs):
    counts = [len(lines), *differences(lines, ours, encode, decode)]
    counts += [len(strings), *differences(strings, ours, encode, decode)]
    print(row([name, *counts, len(pairs), unjoined(ours, pairs)]), flush=True)


def ranges(characters):
    """ "abd" -> "U+0061-0062 U+0064" """
    found = []
    for _, run in groupby(enumerate(map(ord, characters)), lambda item: item[1] - item[0]):
        codes = [f"{code:04X}" for _, code in run]
        found.append("-".join(dict.fromkeys([codes[0], codes[-1]])))
    return " ".join(f"U+{each}" for each in found)


def compare(args):
    data = Path(args.data)
    files = [*data.glob("flores200/*"), *data.glob("wmt-news/*")]
    lines = [line for path in sorted(files) for line in read_lines(path)]
    pairs = []
    for folder in ("flores200", "wmt-news"):
        for pair in list_pairs(data / folder, "test"):
            pairs += [(pair, *row) for row in read_parallel(data / folder, "test", pair)]
    pairs = random.Random(0).sample(pairs, min(args.pairs, len(pairs)))

    print(f"Python has Unicode {unicodedata.unidata_version}, `tokenizers` others:")
    for what, characters in {
        "letters that Python lacks": missing_in_python("L"),
        "numbers that Python lacks": missing_in_python("N"),
        "characters that NFC of `tokenizers` lacks": missing_in_normalizer(),
    }.items():
        found = sum(not set(characters).isdisjoint(line) for line in lines)
        what = f"{len(characters)} {what}, in {found} of the lines: {ranges(characters)}"
        print(textwrap.fill(what, 110, subsequent_indent="  ", break_on_hyphens=False))

    print("\n" + row(["", *COLUMNS]))
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"BLOOM": Path(args.tokenizers) / "bloom-style-16k"}
        for name in PIPELINES:
            folders[name] = Path(temporary) / name
            folders[name].mkdir()
            train(name, lines[::8], folders[name], vocab_size=16000)
        for name, folder in folders.items():
            ours = load_tokenizer(folder)
            theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
            encode = lambda text: theirs.encode(text, add_special_tokens=False).ids
            decode = lambda ids: theirs.decode(ids, skip_special_tokens=False)
            strings = [*random_texts(args.strings, 0, [*ours.added])]
            report(name, ours, encode, decode, lines, strings, pairs)

        folder = Path(temporary)
        (package,) = find_spec("mistral_common").submodule_search_locations
        shutil.copy(Path(package) / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
        path = str(folder / "tokenizer.model")
        theirs = sentencepiece.SentencePieceProcessor(model_file=path)
        strings = [*random_texts(args.strings, 0, ["<s>", "</s>", "▁", "<0x0A>"])]
        ours = load_tokenizer(folder)
        report("Mistral", ours, theirs.encode, theirs.decode, lines, strings, pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizers", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=10_000)
    compare(parser.parse_args())


if __name__ == "__main__":
    sys.exit(exit_status(main))
