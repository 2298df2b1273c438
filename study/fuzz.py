"""Mutates every file that the project reads, and its arguments: 0 inputs may end badly.

    python study/fuzz.py --cases 10000 --seed 0         # minutes on two cores

Good is status 0 with a line for every line, or status 2 with one line that begins with "error: ".
Bad is a traceback, a crash, more than 20 s, more than 2 GB, or a file written outside the run
folder. A case is a function of its number and the seed: --only NUMBER shows one again.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import BLOOM_SPLIT, byte_characters, load_tokenizer, read_tensors, write_json
from model import Config, Decoder, save_model
from study import demo

SECONDS, MEMORY = 20, 2 * 2**30


# --------------------------------------------------------------------------------------------------
# A world to break


SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
CONFIGS = {
    "bloom": dict(model_type="bloom", n_embed=16, n_layer=3, n_head=2),
    "baichuan": dict(model_type="baichuan", model_max_length=512, z_loss_weight=0, **SIZES),
    "llama": dict(model_type="llama", **SIZES),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, eos_token_id=[2, 3], **SIZES),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=1, head_dim=6, **SIZES),
    "gpt2": dict(model_type="gpt2", n_embd=16, n_layer=3, n_head=2, n_positions=1024),
}
# Beside the tokenizer's own file, which says nothing of these.
NAMED = {
    "baichuan": {"tokenizer_class": "LlamaTokenizer", "eos_token": {"content": "</s>"}},
    "qwen2": {"bos_token": "<s>", "eos_token": None, "add_bos_token": True},
}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SPELLED = [*SPECIAL, *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "n", "an", "▁an"]
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": BLOOM_SPLIT},
    "behavior": "Isolated",
    "invert": False,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"<s>": {"ids": [1]}},
}
MARKS = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
]
DECODERS += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
VOCABULARY = {token: id for id, token in enumerate(SPELLED)}
MERGES = [["a", "n"], ["▁", "an"]]
DIGITS = {"type": "Digits", "individual_digits": True}
# What tokenizer.json has where it is not like BLOOM's. Baichuan has a tokenizer.model.
PIPELINES = {
    "bloom": {},
    "llama": {
        "pre_tokenizer": MARKS,
        "decoder": {"type": "Sequence", "decoders": DECODERS},
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": MERGES, "byte_fallback": True},
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]},
    },
    "qwen3": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, SPLIT, BYTES]}},
    "gpt2": {"pre_tokenizer": BYTES | {"use_regex": True}},
}


def tokenizer_json(lines, **pipeline):
    """Contents of a tokenizer.json like BLOOM's that knows all bytes, and the words of some lines."""
    characters = byte_characters()
    tokens, merges = [*SPECIAL, *characters.values()], []
    for piece in re.findall(r" ?\w+", "\n".join(lines)):
        word = "".join(characters[byte] for byte in piece.encode())
        for end in range(2, len(word) + 1):  # one character after the other
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append([word[: end - 1], word[end - 1]])
    vocabulary = {token: id for id, token in enumerate(tokens)}
    return {
        "added_tokens": [{"id": id, "content": token} for id, token in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        **pipeline,
    }


def build(folder):
    """A checkpoint of each family, one in shards, text in three forms, finished and broken-off runs."""
    meanings = demo.toy_meanings(9, seed=0)
    text = demo.toy_text(meanings)
    demo.write_text(folder / "data", dict.fromkeys(("train", "valid", "test"), meanings[:6]))
    for split in ("train", "valid", "test"):
        rows = list(zip(text["qac"], text["qad"]))[:4]
        columns = "".join(f"{source}\t{target}\n" for source, target in rows)
        (folder / f"data/{split}.qac-qad.tsv").write_text(columns)
        items = [{"translation": {"qaa": a, "qad": b}} for a, b in zip(text["qaa"], text["qad"])]
        stream = "".join(json.dumps(item) + "\n" for item in items[:4])
        (folder / f"data/{split}.qaa-qad.json").write_text(stream)
    (folder / "input").write_text("gefos samu.\n\nfafes.\n")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        if name in PIPELINES:
            published = tokenizer_json(["an", " an"], **PIPELINES[name])
            write_json(folder / name / "tokenizer.json", published)
        else:
            demo.train_tokenizer(folder / name, demo.prompts({c: text[c] for c in ("qaa", "qab")}))
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            write_json(folder / name / file, NAMED.get(name, {}) | {"pad_token": "<unk>"})
        size = load_tokenizer(folder / name).vocab_size
        save_model(Decoder(Config.from_json(config | {"vocab_size": size})), folder / name)
    shard = (folder / "bloom/model.safetensors").rename(folder / "bloom/shard.safetensors")
    index = {"weight_map": dict.fromkeys(read_tensors(shard), shard.name)}
    write_json(folder / "bloom/model.safetensors.index.json", index)
    for name in CONFIGS:
        status, _, err = command(folder, run_words(name, f"run-{name}"))
        assert status == 0, err
        with leaving_off():
            status, _, err = command(folder, run_words(name, f"broken-{name}"))
        assert status == 130 and (folder / f"broken-{name}/state.safetensors").exists(), err


@contextlib.contextmanager
def leaving_off():
    """While open, a run ends when its training was saved but is not done."""
    before = lander.SAVE_EVERY, lander.write

    def write(path, value):
        if path.name == "tuned.safetensors":
            raise KeyboardInterrupt
        before[1](path, value)

    lander.SAVE_EVERY, lander.write = 0, write
    yield
    lander.SAVE_EVERY, lander.write = before


def run_words(name, out):
    words = f"--pair qaa-qab --weights {name} --data data --layers 1 --steps 2 --batch 2 "
    words += "--score-sentences 2 --score-pairs qaa-qab,qac-qad,qaa-qad --max-tokens 999 "
    if name in ("bloom", "llama", "gpt2"):
        words += "--units all --keep 1 "
    return [*words.split(), "--eval-sentences", "1", "--out", out]


def command(folder, words):
    """Run lander.main in this process. -> status, stdout, stderr"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = lander.main(words)
        except SystemExit as end:  # argparse's -h
            status = end.code
    return status, out.getvalue(), err.getvalue()


# --------------------------------------------------------------------------------------------------
# Mutations


VALUES = json.loads(r"""[null, true, 0, -1, 1, 7, 2147483648, 1180591620717411303424, 0.5, -0.0, 1e308,
"", "x", "alibi", "\ud800", "\u0000", "[", "\\p{L}+|(a", "<s>", "a*", "qaa-qab", "../x", [], {}, [[]],
[null], {"a": 1}, ["a", "b"], ["Ġ", "a"]]""")


def mutate_structure(value, rng):
    """Change one place of a JSON value, somewhere on a random way down."""
    root = [copy.deepcopy(value)]
    parent, key = root, 0
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.9:
        parent = parent[key]
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    old = parent[key]
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", f"{key}2", "positions", "rope_scaling"])] = old
    elif kind == 2 and type(old) in (int, float):
        parent[key] = rng.choice([old + 1, -old, old * 10**9, str(old)])
    elif kind == 3:
        parent[key] = [old]
    else:
        parent[key] = copy.deepcopy(rng.choice([*VALUES, "é" * 300]))
    return root[0]


def mutate_json(raw, rng):
    if rng.random() < 0.05:
        odd = [b"[" * 100000, b'{"a":' * 100000, b"NaN", b'{"a": Infinity}', b"1e999"]
        return rng.choice(odd)
    value = json.loads(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = mutate_structure(value, rng)
    return json.dumps(value).encode()


def mutate_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        at, size = rng.randrange(len(raw) + 1), rng.choice([1, 1, 2, 8, 100])
        odd = [b"\0", b"\n", b"\t", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xff"]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at : at + 1])
        replaced = [(at + size, rng.randbytes(size)), (at + size, b""), (len(raw), b"")]
        inserted = [(at, rng.randbytes(size)), (at, raw[:size]), (at, rng.choice(odd))]
        end, new = rng.choice([*replaced, *inserted, (at + 1, flipped)])
        raw[at:end] = new
    return bytes(raw)


def mutate_text(raw, rng):
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    odd = rng.choice([b"", b"  ", b"\t", b"\t\t", b"{}", b"[", b"\r", "\u2028".encode()])
    mutated = [
        [*lines[:at], *lines[at + 1 :]],
        [*lines[:at], odd, *lines[at:]],
        [*lines[:at], lines[at] * rng.choice([2, 30, 3000]), *lines[at + 1 :]],
        [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
        [],
    ]
    if rng.random() < 0.3:
        return mutate_bytes(raw, rng)
    return b"\n".join(rng.choice(mutated))


def mutate_safetensors(raw, rng):
    (size,) = struct.unpack("<Q", raw[:8])
    header, numbers = raw[8 : 8 + size], raw[8 + size :]
    kind = rng.choice(["file", "JSON", "header", "numbers"])
    if kind == "file":
        return mutate_bytes(raw, rng)
    if kind == "JSON":
        header = mutate_json(header, rng)
    elif kind == "header":
        header = mutate_bytes(header, rng)
    else:
        numbers = mutate_bytes(numbers, rng)
    return struct.pack("<Q", len(header)) + header + numbers


MUTATIONS = {".safetensors": mutate_safetensors, ".model": mutate_bytes, "": mutate_bytes}


def mutate(path, raw, rng):
    mutation = MUTATIONS.get(path.suffix, mutate_text)
    if path.suffix == ".json" and path.parent.name != "data":  # there it is a stream of objects
        mutation = mutate_json if rng.random() < 0.8 else mutate_bytes
    return mutation(raw, rng)


FLAGS = [lander.flag_of(setting.name) for setting in fields(lander.Settings)]
SWITCHES = "--no-routing --checkpointing --resume --fast --export=out word -h".split()
ARGUMENTS = """0 -1 1 2 7 999999 1000000000000000000000000000000 nan inf 1e-400 0.5 x all qaa-qab
qac-qad qaa qaa-qaa qab-qaa,qaa-qad en-de , - input data bloom run-bloom nowhere /dev/null /proc/x/y
meta cpu float32 bfloat16 cuda abacus --resume ../..""".split()
ARGUMENTS += ["", "\0", "é" * 300, "\udcff"]


def mutate_words(words, rng):
    words = list(words)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(4)
        if kind == 0:
            words.append(rng.choice(SWITCHES))
        elif kind == 1:
            del words[rng.randrange(len(words))]
        else:
            words += [rng.choice(FLAGS), rng.choice(ARGUMENTS)]
    return words


# --------------------------------------------------------------------------------------------------
# Cases


def listing(folder):
    """Every file below a folder with its size and time of change."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def choose(world, rng):
    """-> the words of a case, and the file that it damages, None for the words themselves"""
    name = rng.choice(list(CONFIGS))
    translating = f"--pair qaa-qab --tuned run-{name} --translate input".split()
    tuning = run_words(name, "out")
    kind = rng.choices(["words", "text", "checkpoint", "finished", "begun"], [2, 2, 6, 4, 4])[0]
    if kind == "words":
        words = mutate_words(rng.choice([translating, tuning]), rng)
        # Last, so that what is written lies in out, whatever was said before.
        return words if "--tuned" in words else [*words, "--out", "out"], None
    if kind == "text":
        files = "train.qaa", "test.qab", "train.qac-qad.tsv", "train.qaa-qad.json"
        return tuning, world / "data" / rng.choice(files)
    if kind == "checkpoint":
        files = sorted(world.glob(f"{name}/*"))
        return rng.choice([translating, translating, tuning]), rng.choice(files)
    if kind == "finished":
        files = "args.json", "neurons.json", "tuned.safetensors"
        return translating, world / f"run-{name}" / rng.choice(files)
    shutil.copytree(world / f"broken-{name}", world / "out")
    files = sorted(path for path in world.glob("out/**/*") if path.is_file())
    return [*tuning, "--resume"], rng.choice(files)


def run_case(world, words):
    """-> "0" or "2", or what is wrong with how the command ended"""
    try:
        status, printed, said = command(world, words)
    except BaseException as error:  # whatever it is, it is what a user would see
        return "".join(traceback.format_exception(error)[-4:])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == 2 and (len(errors) != 1 or not said.endswith(f"{errors[0]}\n")):
        return f"status 2, and not one line of error at the end: {said}"
    if status == 0 and words[-1] == "input" and printed.count("\n") != 3:
        return f"{printed.count(chr(10))} lines for 3"
    return str(status) if status in (0, 2) else f"status {status}"


def check(world, number, seed=0):
    """Run one case in a world of build(). -> what was done, and "0", "2" or what went wrong

    In a process of its own, so that a crash or a hang ends no other case.
    """
    rng = random.Random(f"{seed} {number}")
    shutil.rmtree(world / "out", ignore_errors=True)
    words, path = choose(world, rng)
    if path:
        original = path.read_bytes()
        path.write_bytes(mutate(path, original, rng))
    before = listing(world)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # ends the process
        os.write(sender, run_case(world, words).encode(errors="replace")[:60000])
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as file:
        outcome = file.read().decode()
    _, status, usage = os.wait4(child, 0)
    if status:
        outcome = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    elif usage.ru_maxrss * 1024 > MEMORY:
        outcome = f"{usage.ru_maxrss} KiB"
    after = listing(world)
    changed = [file for file in before | after if before.get(file) != after.get(file)]
    outside = [file for file in changed if world / "out" not in file.parents]
    if outside:
        outcome = f"wrote {outside}"
    for file in outside:
        file.unlink(missing_ok=True)
    if path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(original)
    return f"case {number}: {path or ''} {' '.join(map(repr, words))}", outcome


# --------------------------------------------------------------------------------------------------
# Many cases


def check_here(number, folder, seed):
    """check(), in a world that each process makes for itself."""
    world = Path(folder, str(os.getpid()))
    if not world.exists():
        torch.set_num_threads(1)
        build(world)
    return check(world, number, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, and how it ends")
    args = parser.parse_args()
    numbers = range(args.cases) if args.only is None else [args.only]
    start, counts = time.monotonic(), {"0": 0, "2": 0, "bad": 0}
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Pool() as pool:
        folder = Path(temporary).resolve()
        work = partial(check_here, folder=folder, seed=args.seed)
        for done, (case, outcome) in enumerate(pool.imap_unordered(work, numbers), 1):
            counts[outcome if outcome in counts else "bad"] += 1
            if outcome not in counts or args.only is not None:
                print(f"{case}\n{outcome}", flush=True)
            if done % 500 == 0:
                print(f"{done} of {len(numbers)}, {counts['bad']} bad", flush=True)
    took = f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s"
    print(f"{took}: {counts['0']} gave a result, {counts['2']} one line, {counts['bad']} bad")
    sys.exit(counts["bad"] > 0)


if __name__ == "__main__":
    main()
