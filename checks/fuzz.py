"""Damages every file that the project reads, and its arguments: no case may end badly.

    python checks/fuzz.py --cases 10000 --seed 0        # half an hour on one core

Good is status 0 with a line for every line, or status 2 with one line of error. Bad is a crash,
20 s of computing, more than 2 GB, a file written outside the run folder, or a traceback. But what a
run wrote itself is trusted: where that was damaged, a traceback is good, and so are translations of
as many tokens as the record now allows. A case is a function of its number and the seed: --only
NUMBER shows it again.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Each case runs in a fork. A fork has none of the threads of its parent and waits for them in vain:
# so none may start, neither torch's nor those of the library of tokenizers.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import sentencepiece
import torch
import torch._dynamo  # AdamW imports it at its first step: a second in every fork
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import PROMPT, load_tokenizer, read_lines, read_tensors, write_json, write_lines
from model import Decoder, read_config, save_model
from test_lander import LETTERS, LLAMA3_SCALING, interrupt, sentence, train_bpe

SECONDS, MEMORY = 20, 2 * 2**30
RESULT, ONE_LINE, TRUSTED = "a result", "one line of error", "trust in a run's own file"
TOO_LONG = f"the process ended with {-signal.SIGXCPU}"


# --------------------------------------------------------------------------------------------------
# A world to break


SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
SIZES |= dict(num_key_value_heads=1, head_dim=8, max_position_embeddings=512)
CONFIGS = {
    "bloom": dict(n_embed=16, n_layer=3, n_head=2),
    "baichuan": SIZES | dict(z_loss_weight=0),
    "llama": SIZES | dict(rope_scaling=LLAMA3_SCALING),
    "qwen2": SIZES | dict(eos_token_id=[2, 3]),
    "qwen3": SIZES | dict(head_dim=6),
    "gpt2": dict(n_embd=16, n_layer=3, n_head=2, n_positions=1024),
    "gemma3_text": SIZES | dict(sliding_window=30),
}
MORE_WORDS = {"bloom": "--units all --keep 1", "gpt2": "--no-routing", "qwen3": "--valid-every 1"}


def train_marks(path, lines):
    """A tokenizer.json like LLaMA's: "▁" for a space, bytes for what is not known, a template."""
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    library.train_from_iterator(lines, trainer)
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(path))


def build(folder):
    """Text in all forms; of each family a checkpoint, a finished run and one broken off."""
    meanings = [random.Random(seed).sample(range(20), 4) for seed in range(6)]
    text = {code: [sentence(code, meaning) for meaning in meanings] for code in LETTERS}
    en, de, fr, cs = text.values()
    for split in ("train", "valid", "test"):
        write_lines(folder / f"data/{split}.en", en)
        write_lines(folder / f"data/{split}.de", de)
    write_lines(folder / "data/train.fr-cs.tsv", map("\t".join, zip(fr, cs)))
    items = [{"translation": {"en": a, "cs": b, "fr": c}} for a, b, c in zip(en, cs, fr)]
    write_lines(folder / "data/train.en-cs.jsonl", map(json.dumps, items))
    write_json(folder / "data/train.en-fr.json", items)
    write_lines(folder / "data/input", [*en[:2], "", "x"])
    write_lines(folder / "data/prompt", ["{source} to {target}: {text} = "])
    for name in CONFIGS:
        # Each in a process of its own, so that in this one nothing computes and no thread starts.
        assert (outcome := apart(build_family, folder, name, [PROMPT, *en])) == RESULT, outcome


def build_family(folder, name, lines):
    weights, named = folder / name, {"pad_token": "<unk>"}
    write_json(weights / "generation_config.json", {"eos_token_id": [2]})
    if name == "baichuan":
        options = dict(model_type="bpe", vocab_size=330, byte_fallback=True, minloglevel=2)
        options |= dict(sentence_iterator=iter(lines), model_prefix=weights / "tokenizer")
        sentencepiece.SentencePieceTrainer.train(**options)
        write_json(weights / "added_tokens.json", {"<more>": 330})
        named |= {"tokenizer_class": "LlamaTokenizer", "eos_token": {"content": "</s>"}}
    else:
        train = train_marks if name == "llama" else train_bpe
        train(weights / "tokenizer.json", lines)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        write_json(weights / file, named)
    sizes = {"model_type": name, "vocab_size": load_tokenizer(weights).vocab_size}
    torch.manual_seed(0)
    save_model(Decoder(read_config(CONFIGS[name] | sizes)), weights)
    if name == "bloom":
        shard = (weights / "model.safetensors").rename(weights / "shard.safetensors")
        index = {"weight_map": dict.fromkeys(read_tensors(shard), shard.name)}
        write_json(weights / "model.safetensors.index.json", index)
    outcome = run_case(folder, run_words(name, f"run-{name}"))
    with contextlib.chdir(folder):
        interrupt(run_words(name, f"broken-{name}"), count=2)
    return outcome


def run_words(name, out):
    words = f"--pair en-de --weights {name} --data data --out {out} --layers 1 --steps 2 --batch 2"
    words += " --score-sentences 3 --score-pairs en-de,fr-cs,en-cs,en-fr --eval-sentences 1"
    return f"{words} --max-tokens 999 --device cpu {MORE_WORDS.get(name, '')}".split()


# --------------------------------------------------------------------------------------------------
# Mutations


VALUES = r"""null true 0 -1 1 7 2147483648 1180591620717411303424 0.5 -0.0 1e308 NaN Infinity "" "x"
"alibi" "\ud800" "\u0000" "[" "\\p{L}+|(a" "<s>" "a*" "en-de" "../x" [] {} [[]] [null] {"a":1} [2,3]
["a","b"] ["Ġ","a"]""".split()


def mutate_json(raw, rng):
    """Change some places, each somewhere on a random way down."""
    root = [json.loads(raw)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        parent, key = root, 0
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        old, kind = parent[key], rng.randrange(4)
        if kind == 0 and isinstance(parent, dict):
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "", f"{key}2", "positions", "rope_scaling"])] = old
        elif kind == 2 and type(old) in (int, float):
            parent[key] = rng.choice([old + 1, -old, old * 10**9, str(old)])
        else:
            parent[key] = json.loads(rng.choice([*VALUES, json.dumps([old])]))
    return json.dumps(root[0]).encode() if rng.random() < 0.97 else b'[{"a":' * 50000


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
    more = [b"", b"  ", b"\t", b"\t\t", b"{}", b"[", b"\r", "\u2028".encode()]
    more += [b"\xef\xbb\xbf" + lines[at], lines[at] * 30, lines[at] * 3000]
    if lines[at].startswith(b'{"'):
        more = [*more[-3:], *[mutate_json(lines[at], rng) for _ in range(9)]]
    lines[at : at + rng.randrange(2)] = rng.choice([[], [rng.choice(more)], [rng.choice(more)]])
    return b"\n".join(lines) if rng.random() < 0.9 else b""


def mutate_safetensors(raw, rng):
    """Its header, 8 bytes that say how long that is, or the numbers after it."""
    size = int.from_bytes(raw[:8], "little")
    header, numbers = raw[8 : 8 + size], raw[8 + size :]
    if rng.randrange(3) == 0:
        numbers = mutate_bytes(numbers, rng)
    else:
        header = rng.choice([mutate_json, mutate_bytes])(header, rng)
    return len(header).to_bytes(8, "little") + header + numbers


MUTATIONS = {".json": mutate_json, ".safetensors": mutate_safetensors, ".model": mutate_bytes}


def mutate(path, raw, rng):
    if not raw or rng.random() < 0.25:
        return mutate_bytes(raw, rng)
    return MUTATIONS.get(path.suffix, mutate_text)(raw, rng)


FLAGS = [f"--{name.replace('_', '-')}" for name in vars(lander.read_settings())]
FLAGS.remove("--export")  # it writes where it is told to: here, into out
ARGUMENTS = """0 -1 1 2 7 300 1000000000000000000000000000000 nan inf 1e-400 0.5 x all en-de
fr-cs en en-en de-en,en-cs en-xx xx=X , - input data bloom run-bloom nowhere
/dev/null /proc/x/y meta cpu float32 bfloat16 cuda abacus ../.. --no-routing --checkpointing --resume --fast -h""".split()
ARGUMENTS += ["--export=out", "", "\0", "é" * 300, "\udcff"]


def mutate_words(words, rng):
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, more = rng.randrange(len(words)), [rng.choice(FLAGS), rng.choice(ARGUMENTS)]
        fewer = [*words[:at], *words[at + 1 :]]
        words = rng.choice([fewer, words + more[1:], words + more, words + more])
    return words


# --------------------------------------------------------------------------------------------------
# Cases


def choose(world, rng):
    """-> the words of a case, the file that it damages or None, and whether a run wrote that"""
    name = rng.choice(list(CONFIGS))
    tuning = run_words(name, "out")
    translating = f"--pair en-de --tuned run-{name} --translate data/input".split()
    kind = rng.choices(["words", "text", "checkpoint", "finished", "begun"], [3, 3, 6, 2, 2])[0]
    if kind == "words":
        words = mutate_words(rng.choice([translating, tuning]), rng)
        # Last, so that what is written lies in out, whatever was said before.
        return words if "--tuned" in words else [*words, "--out", "out"], None, False
    if kind == "text":
        path = rng.choice(sorted(world.glob("data/*")))
        words = translating if path.name == "input" else [*tuning, "--prompt", "data/prompt"]
        return words, path, False
    if kind == "checkpoint":
        return tuning, rng.choice(sorted(world.glob(f"{name}/*"))), False
    if kind == "finished":
        words = rng.choice([translating, f"--tuned run-{name} --export out".split()])
        file = rng.choice(["args.json", "neurons.json", "tuned.safetensors"])
        return words, world / f"run-{name}" / file, True
    shutil.copytree(world / f"broken-{name}", world / "out")
    files = sorted(path for path in world.glob("out/**/*") if path.is_file())
    return [*tuning, "--resume"], rng.choice(files), True


def run_case(world, words):
    """-> how the command ended: well, or what is wrong with it"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(world), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = lander.main(words)
    said, printed = err.getvalue().rstrip("\n").split("\n"), out.getvalue().count("\n")
    errors = [line for line in said if line.startswith(("error: ", "lander.py: error: "))]
    if status == 2 and len(errors) == 1 and errors == said[-1:]:
        return ONE_LINE
    if status == 0 and (words[-1] != "data/input" or printed == len(read_lines(world / words[-1]))):
        return RESULT
    return f"status {status}, {printed} lines printed, and said {err.getvalue()}"


def apart(call, *arguments):
    """Call in a process of its own. -> what it returned, a traceback, or how else it ended"""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(30 * SECONDS)  # for what waits and computes nothing
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        try:
            outcome = call(*arguments)
        except BaseException as error:  # whatever it is, it is what a user would see
            outcome = "traceback\n" + "".join(traceback.format_exception(error))
        os.write(sender, outcome.encode(errors="replace"))
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as file:
        outcome = file.read().decode()
    _, status, usage = os.wait4(child, 0)
    if status:
        return f"the process ended with {os.waitstatus_to_exitcode(status)}"
    return outcome if usage.ru_maxrss * 1024 < MEMORY else f"{usage.ru_maxrss} KiB"


def listing(folder):
    """Every file below a folder with its size and time of change."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def check(world, number, seed):
    """Run one case in the world. -> what was done, and how it ended"""
    rng = random.Random(f"{seed} {number}")
    shutil.rmtree(world / "out", ignore_errors=True)
    words, path, of_run = choose(world, rng)
    if path:
        original = path.read_bytes()
        path.write_bytes(mutate(path, original, rng))
    before = listing(world.parent).items()
    outcome = apart(run_case, world, words)
    changed = {file for file, _ in before ^ listing(world.parent).items()}
    if of_run and outcome.startswith(("traceback", TOO_LONG)):
        outcome = TRUSTED
    if outside := [file for file in changed if world / "out" not in file.parents]:
        outcome = f"wrote {outside}"
    if path:
        path.write_bytes(original)
    return f"case {number}: {path or ''} {' '.join(map(repr, words))}", outcome


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, and how it ends")
    args = parser.parse_args()
    start, counts = time.monotonic(), {RESULT: 0, ONE_LINE: 0, TRUSTED: 0, "bad": 0}
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary).resolve() / "world"
        build(world)
        for number in range(args.cases) if args.only is None else [args.only]:
            case, outcome = check(world, number, args.seed)
            counts[outcome if outcome in counts else "bad"] += 1
            if outcome not in counts or args.only is not None:
                print(f"{case}\n{outcome}", flush=True)
    ends = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s: {ends}")
    sys.exit(counts["bad"] > 0)


if __name__ == "__main__":
    main()
