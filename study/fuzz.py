"""Mutates every file that the project reads, and its arguments: 0 inputs may end badly.

    python study/fuzz.py --cases 10000 --seed 0         # about ten minutes on two cores

Good is status 0 with a result for every line, or status 2 with one line that begins with "error: ".
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
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import BLOOM_SPLIT, byte_characters, load_tokenizer, write_tensors
from model import Config, Decoder, save_model
from study import demo

SECONDS, BYTES = 20, 2 * 2**30
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "bloom": {"model_type": "bloom", "n_embed": 16, "n_layer": 3, "n_head": 2},
    "baichuan": SIZES
    | {"model_type": "baichuan", "intermediate_size": 24, "model_max_length": 512},
    "qwen2": SIZES
    | {"model_type": "qwen2", "intermediate_size": 24, "num_key_value_heads": 1}
    | {"eos_token_id": [2, 3]},
}
# Beside the tokenizer's own file, which says nothing of these.
NAMED = {
    "bloom": {},
    "baichuan": {"tokenizer_class": "LlamaTokenizer", "eos_token": {"content": "</s>"}},
    "qwen2": {"bos_token": "<s>", "eos_token": None, "add_bos_token": True},
}


# --------------------------------------------------------------------------------------------------
# A world to break


def tokenizer_json(vocabulary, merges, regex=BLOOM_SPLIT):
    """Contents of a tokenizer.json like BLOOM's. Its first four tokens are the special ones."""
    split = {"type": "Split", "pattern": {"Regex": regex}}
    split |= {"behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    special = list(vocabulary)[:4]
    return {
        "added_tokens": [{"id": id, "content": token} for id, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def byte_tokenizer(name):
    """A tokenizer.json of all bytes and two merges, like BLOOM's, or like Qwen2's and Llama-3's."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *byte_characters().values(), "an", "Ġan"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [["a", "n"], ["Ġ", "an"]]
    if name == "bloom":
        return tokenizer_json(vocabulary, merges)
    published = tokenizer_json(vocabulary, merges, r"(?i:'s|'t)|[^\s\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)")
    published["model"]["ignore_merges"] = True
    published["normalizer"] = {"type": "NFC"}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "special_tokens": special}
    steps = [{"type": "ByteLevel"}, template]
    return published | {"post_processor": {"type": "Sequence", "processors": steps}}


def build(folder):
    """Three checkpoints, one in shards, text in three forms, finished and broken-off runs."""
    text = demo.toy_text(demo.toy_meanings(9, seed=0))
    (folder / "data").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        for code in ("qaa", "qab"):
            lines = "".join(f"{line}\n" for line in text[code][:6])
            (folder / "data" / f"{split}.{code}").write_text(lines)
        rows = list(zip(text["qac"], text["qad"]))[:4]
        columns = "".join(f"{source}\t{target}\n" for source, target in rows)
        (folder / "data" / f"{split}.qac-qad.tsv").write_text(columns)
        items = [{"translation": {"qaa": a, "qad": b}} for a, b in zip(text["qaa"], text["qad"])]
        stream = "".join(json.dumps(item) + "\n" for item in items[:4])
        (folder / "data" / f"{split}.qaa-qad.json").write_text(stream)
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        if name != "baichuan":
            (folder / name).mkdir()
            (folder / name / "tokenizer.json").write_text(json.dumps(byte_tokenizer(name)))
        else:
            demo.train_tokenizer(folder / name, demo.prompts({c: text[c] for c in ("qaa", "qab")}))
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            (folder / name / file).write_text(json.dumps(NAMED[name] | {"pad_token": "<unk>"}))
        size = load_tokenizer(folder / name).vocab_size
        save_model(Decoder(Config.from_json(config | {"vocab_size": size})), folder / name)
    tensors = folder / "bloom" / "model.safetensors"
    tensors.rename(folder / "bloom" / "one.safetensors")
    names = lander.read_tensors(folder / "bloom" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "bloom" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "input").write_text("gefos samu.\n\nfafes.\n")
    for name in CONFIGS:
        status, _, err = command(folder, run_words(folder, name, folder / f"run-{name}"))
        assert status == 0, err
        broken = folder / f"broken-{name}"
        step = lander.SAVE_EVERY, lander.write_tensors
        lander.SAVE_EVERY = 0
        lander.write_tensors = interrupt_at_the_end
        status, _, err = command(folder, run_words(folder, name, broken))
        lander.SAVE_EVERY, lander.write_tensors = step
        assert status == 130 and (broken / "state.safetensors").exists(), err


def interrupt_at_the_end(path, tensors):
    """Leaves a run whose training was saved but is not done."""
    if path.name == "tuned.safetensors":
        raise KeyboardInterrupt
    write_tensors(path, tensors)


def run_words(folder, name, out):
    words = [
        "--pair",
        "qaa-qab",
        "--weights",
        folder / name,
        "--data",
        folder / "data",
        "--out",
        out,
    ]
    words += ["--layers", "1", "--steps", "2", "--batch", "2", "--score-sentences", "2"]
    words += [
        "--eval-sentences",
        "1",
        "--score-pairs",
        "qaa-qab,qac-qad,qaa-qad",
        "--max-tokens",
        "999",
    ]
    return [str(word) for word in words]


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


VALUES = [None, True, 0, -1, 1, 7, 2**31, 2**70, 0.5, -0.0, 1e308, "", "x", "alibi", "\ud800", "\0"]
VALUES += [r"\p{L}+|(a", "[", "<s>", "a*", [], {}, [[]], [None], {"a": 1}, ["a", "b"], ["Ġ", "a"], "qaa-qab", "../x", "é" * 300]


def mutate_structure(value, rng):
    """Change one place of a JSON value."""
    places = []

    def walk(parent):
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            places.append((parent, key))
            if isinstance(parent[key], (dict, list)) and len(places) < 5000:
                walk(parent[key])

    root = [copy.deepcopy(value)]
    walk(root)
    # A level first, then a place in it: a vocabulary of hundreds would take all of the cases.
    parent, key = rng.choice(places)
    if rng.random() < 0.5:
        parents = {id(parent): parent for parent, _ in places}
        parent = rng.choice(list(parents.values()))
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", str(key) + "2", "positions", "rope_scaling"])] = parent[key]
    elif kind == 2 and type(parent[key]) in (int, float):
        parent[key] = rng.choice(
            [parent[key] + 1, -parent[key], parent[key] * 10**9, str(parent[key])]
        )
    elif kind == 3:
        parent[key] = (
            copy.deepcopy(rng.choice(rng.choice(places)[0:1]))
            if rng.random() < 0.3
            else [parent[key]]
        )
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return root[0]


def mutate_json(raw, rng):
    value = json.loads(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        try:
            value = mutate_structure(value, rng)
            text = json.dumps(value)
        except (ValueError, TypeError, IndexError, RecursionError):
            break  # a cycle, or nothing left to change
    else:
        return text.encode()
    nested = rng.choice([b"[" * 100000, b'{"a":' * 100000, b"NaN", b'{"a": Infinity}', b"1e999"])
    return nested


def mutate_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        at, size = rng.randrange(len(raw) + 1), rng.choice([1, 1, 2, 8, 100])
        kind = rng.randrange(7)
        if kind == 0:
            raw[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            raw[at:at] = rng.randbytes(size)
        elif kind == 2:
            del raw[at : at + size]
        elif kind == 3:
            del raw[at:]
        elif kind == 4:
            raw[at:at] = raw[:size]
        elif kind == 5 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        else:
            raw[at:at] = rng.choice(
                [b"\0", b"\n", b"\t", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xff"]
            )
    return bytes(raw)


def mutate_text(raw, rng):
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(7)
    if kind == 0:
        lines[at : at + 1] = []
    elif kind == 1:
        lines[at:at] = [
            rng.choice([b"", b"  ", b"\t", b"\t\t", b"{}", b"[", b"\r", "\u2028".encode()])
        ]
    elif kind == 2:
        lines[at] = lines[at] * rng.choice([2, 30, 3000])
    elif kind == 3:
        lines = [b"\xef\xbb\xbf" + lines[0], *lines[1:]]
    elif kind == 4:
        lines = []
    else:
        return mutate_bytes(raw, rng)
    return b"\n".join(lines)


def mutate_safetensors(raw, rng):
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + size], raw[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(raw, rng)
    if kind == 1:
        header = mutate_json(header, rng)
    elif kind == 2:
        header = mutate_bytes(header, rng)
    else:
        data = mutate_bytes(data, rng)
    return struct.pack("<Q", len(header)) + header + data


def mutate_words(words, rng):
    words = list(words)
    flags = [
        "--pair",
        "--layers",
        "--epsilon",
        "--lr",
        "--steps",
        "--batch",
        "--max-tokens",
        "--device",
    ]
    flags += [
        "--micro-tokens",
        "--score-pairs",
        "--score-sentences",
        "--eval-pairs",
        "--beams",
        "--seed",
    ]
    flags += [
        "--eval-sentences",
        "--dtype",
        "--tuned",
        "--translate",
        "--weights",
        "--data",
        "--out",
    ]
    values = [
        "",
        "0",
        "-1",
        "1",
        "2",
        "7",
        "999999",
        str(10**30),
        "nan",
        "inf",
        "1e-400",
        "0.5",
        "x",
        "all",
    ]
    values += [
        "qaa-qab",
        "qac-qad",
        "qaa",
        "qaa-qaa",
        "qab-qaa,qaa-qad",
        "en-de",
        ",",
        "-",
        "\0",
        "é" * 300,
    ]
    values += [
        "input",
        "data",
        "bloom",
        "run-bloom",
        "nowhere",
        "/dev/null",
        "/proc/x/y",
        "meta",
        "cpu",
    ]
    values += ["float32", "bfloat16", "cuda", "abacus", "--resume", "../..", "\udcff"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(4)
        if kind == 0:
            words += [
                rng.choice(["--no-routing", "--checkpointing", "--resume", "--fast", "word", "-h"])
            ]
        elif kind == 1:
            del words[rng.randrange(len(words))]
        else:
            words += [rng.choice(flags), rng.choice(values)]
    if "--out" in words[8:] or "out" not in "".join(words):
        words += ["--out", "out"]
    return words


# --------------------------------------------------------------------------------------------------
# Cases


def listing(folder):
    """Every file below a folder with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[str(path)] = stat.st_size, stat.st_mtime_ns
    return found


def check(world, number, seed=0):
    """Run one case in a world of build(). -> what was done, and its status or what went wrong"""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(CONFIGS))
    out = world / "out"
    shutil.rmtree(out, ignore_errors=True)
    translating = ["--pair", "qaa-qab", "--tuned", f"run-{name}", "--translate", "input"]
    resuming = [*run_words(world, name, out), "--resume"]
    text = [world / "data" / file for file in ("train.qaa", "test.qab", "train.qac-qad.tsv")]
    text += [world / "data" / "train.qaa-qad.json"]
    checkpoint = [path for path in (world / name).iterdir() if path.suffix != ".vocab"]
    finished = [
        world / f"run-{name}" / f for f in ("args.json", "neurons.json", "tuned.safetensors")
    ]
    broken = world / f"broken-{name}"
    begun = [
        broken / f for f in ("args.json", "layers.json", "awareness.safetensors", "results.json")
    ]
    begun += [
        broken / f for f in ("log.jsonl", "state.safetensors", "hypotheses/qaa-qab.before.txt")
    ]
    kind = rng.choices(["words", "text", "checkpoint", "finished", "begun"], [2, 2, 6, 4, 4])[0]
    path = None
    if kind == "words":
        words = mutate_words(rng.choice([translating, run_words(world, name, out)]), rng)
    else:
        files = {"text": text, "checkpoint": checkpoint, "finished": finished, "begun": begun}
        path = rng.choice(files[kind])
        words = translating if kind in ("checkpoint", "finished") else resuming
        if kind == "begun":
            shutil.copytree(broken, out)
            args = json.loads((out / "args.json").read_text())
            (out / "args.json").write_text(json.dumps(args | {"out": str(out)}))
            path = out / path.relative_to(broken)
    original = path and path.read_bytes()
    if path:
        mutate = (
            mutate_text
            if path.suffix in (".txt", ".tsv", ".qaa", ".qab", ".jsonl")
            else mutate_bytes
        )
        if path.suffix == ".safetensors":
            mutate = mutate_safetensors
        elif path.suffix == ".json" and rng.random() < 0.8:
            mutate = mutate_text if kind == "text" else mutate_json
        path.write_bytes(mutate(original, rng))
    what = f"case {number}: {path or ''} {' '.join(map(repr, words))}"

    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = listing(world)
    wrong = None
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        status, printed, said = command(world, words)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if status == 2 and len(errors) != 1:
            wrong = f"status 2 with {len(errors)} lines of error"
        elif status == 2 and not said.endswith(f"{errors[0]}\n"):
            wrong = "the error is more than a line"
        elif status not in (0, 2):
            wrong = f"status {status}"
        elif status == 0 and words is translating and len(printed.split("\n")) != 4:
            wrong = f"{len(printed.split(chr(10))) - 1} lines for 3"
    except BaseException as error:  # whatever it is, it is what a user would see
        wrong = "".join(traceback.format_exception(error)[-4:])
    signal.alarm(0)
    after = listing(world)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    outside = [file for file in changed if not file.startswith(f"{out}/")]
    if not wrong and outside:
        wrong = f"wrote {outside}"
    if not wrong and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > BYTES:
        wrong = "more than 2 GB"
    if path and kind != "begun":
        path.write_bytes(original)
    for file in outside:
        if file not in before:
            Path(file).unlink(missing_ok=True)
    return what, wrong or status


# --------------------------------------------------------------------------------------------------
# Many cases


def work(numbers, seed, answers):
    """One process: a world of its own, and its share of the cases."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder).resolve() / "world"
        build(world)
        for number in numbers:
            answers.send((number, None, None))  # so that a crash has a number
            answers.send((number, *check(world, number, seed)))
    answers.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, with all that it prints")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.cases) if args.only is None else [args.only]
    processes = min(args.processes, len(numbers))
    start, done, right, bad = time.monotonic(), 0, 0, 0
    context = multiprocessing.get_context("fork")
    waiting = {}

    def begin(share):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(share, args.seed, sender))
        process.start()
        sender.close()
        waiting[receiver] = share, process, None

    for i in range(processes):
        begin(numbers[i::processes])
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting)):
            share, process, current = waiting.pop(receiver)
            try:
                number, what, outcome = receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode:  # it crashed: count that, go on after it
                    bad += 1
                    print(
                        f"BAD case {current}: the process ended with {process.exitcode}", flush=True
                    )
                    rest = [n for n in share if current is not None and n > current]
                    if rest:
                        begin(rest)
                continue
            waiting[receiver] = share, process, number
            if what is None:
                continue
            done += 1
            right += outcome == 0
            if isinstance(outcome, str):
                bad += 1
                print(f"BAD {what}\n{outcome}", flush=True)
            if done % 500 == 0:
                print(
                    f"{done} of {len(numbers)}, {time.monotonic() - start:.0f} s, {bad} bad",
                    flush=True,
                )
    took = f"{done} cases in {time.monotonic() - start:.0f} s"
    print(f"{took}: {right} gave a result, {done - right - bad} one line, {bad} bad")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
