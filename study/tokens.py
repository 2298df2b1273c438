"""The tokenizers of data.py against the libraries: ids and text of real lines and of random strings.

    python study/tokens.py --data ../shared/data

Byte-level pipelines are trained here, on an eighth of the lines: published vocabularies are not at
hand. Mistral's own tokenizer.model lies in mistral-common.
"""

import argparse
import random
import shutil
import sys
import tempfile
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BLOOM_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, exit_status, list_pairs, load_tokenizer
from data import prompt_text, read_lines, read_parallel, render, write_json


# --------------------------------------------------------------------------------------------------
# Tokenizers


# How a text is split; the token that a template puts in front of it; end-of-sentence and other added
# tokens.
PIPELINES = {
    "BLOOM": (BLOOM_SPLIT, None, ["</s>", "<s>", "<pad>"]),
    "Qwen2": (QWEN2_SPLIT, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "Llama-3": (LLAMA3_SPLIT, "<|begin_of_text|>", ["<|end_of_text|>"]),
}


def train(name, lines, folder, vocab_size):
    """Train a tokenizer.json of a published pipeline, in a folder that is there."""
    regex, bos, added = PIPELINES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "Llama-3"))
    if name == "Qwen2":
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": [bos, *added] if bos else added, "show_progress": False}
    alphabet = by_bytes.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **special)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": bos, "eos_token": added[0]})


# --------------------------------------------------------------------------------------------------
# Texts


def known_characters():
    """Those that all tables know, whichever Unicode they are of: NFC of `tokenizers` has an old one."""
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        composes = unicodedata.combining(c) or unicodedata.decomposition(c)
        table = unicodedata.ucd_3_2_0 if composes else unicodedata
        if table.category(c) not in ("Cn", "Cs"):
            yield c


def random_texts(count, seed, added):
    """Strings of many alphabets, marks, numbers, contractions, white space, added tokens."""
    characters = list(known_characters())
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


STRINGS, EXAMPLES = 100_000, 10_000


def compare(folder):
    files = sorted([*folder.glob("flores200/*"), *folder.glob("wmt-news/*")])
    lines = [line for path in files for line in read_lines(path)]
    pairs = []
    for corpus in (folder / "flores200", folder / "wmt-news"):
        for pair in list_pairs(corpus, "test"):
            pairs += [(pair, *row) for row in read_parallel(corpus, "test", pair)]
    pairs = random.Random(0).sample(pairs, min(EXAMPLES, len(pairs)))
    print(f"{len(lines)} lines, {STRINGS} strings, {len(pairs)} examples")
    columns = ("lines: other ids", "text", "strings: other ids", "text", "not as joined")
    print(f"{'':<9}" + "".join(f"{column:>{len(column) + 2}}" for column in columns))

    def report(name, ours, encode, decode):
        strings = random_texts(STRINGS, 0, [*ours.added])
        counts = [*differences(lines, ours, encode, decode)]
        counts += [*differences(strings, ours, encode, decode), unjoined(ours, pairs)]
        row = "".join(f"{count:>{len(column) + 2}}" for count, column in zip(counts, columns))
        print(f"{name:<9}{row}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for name in PIPELINES:
            trained = Path(temporary, name)
            trained.mkdir()
            train(name, lines[::8], trained, vocab_size=16000)
            theirs = Tokenizer.from_file(str(trained / "tokenizer.json"))
            encode = lambda text: theirs.encode(text, add_special_tokens=False).ids
            decode = lambda ids: theirs.decode(ids, skip_special_tokens=False)
            report(name, load_tokenizer(trained), encode, decode)
        (package,) = find_spec("mistral_common").submodule_search_locations
        model = shutil.copy(f"{package}/data/tokenizer.model.v1", f"{temporary}/tokenizer.model")
        write_json(Path(temporary, "tokenizer_config.json"), {"tokenizer_class": "LlamaTokenizer"})
        theirs = sentencepiece.SentencePieceProcessor(model_file=model)
        ours = load_tokenizer(temporary)
        ours.added = ["<s>", "</s>", "▁", "<0x0A>"]
        report("Mistral", ours, theirs.encode, theirs.decode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    sys.exit(exit_status(compare, parser.parse_args().data))
