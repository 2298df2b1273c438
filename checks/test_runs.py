"""Slow tests of runs: several processes, another device, memory, ends at random moments.

    python -m pytest checks/test_runs.py

In this file: several processes; a device that is not the CPU; memory; damaged files and broken-off
runs, a little of what fuzz.py and interrupt.py do; training; generation; checkpoints.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lander
import model
from lander import read_settings
from model import Decoder, load_model, save_model
from test_lander import EXPORT, Letters, Texts, arguments, assert_close, contents, interrupt
from test_lander import half_done, here, whole, world  # fixtures
from test_lander import log_of, names_in, padded_ids, random_groups, random_ids, refused
from test_lander import routed_decoder, same_weights, tiny_decoder, translations, unpadded, without

ROOT = Path(lander.__file__).resolve().parent
IMPORTABLE = os.environ | {"PYTHONPATH": str(ROOT)}
FOREVER = 1800  # seconds, after which something waits for what never comes


def python(*words, **options):
    """Run Python on words, with the project's modules at hand. -> what subprocess.run gives"""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, env=IMPORTABLE, timeout=FOREVER, text=True, **options)


# --------------------------------------------------------------------------------------------------
# Several processes


def torchrun(processes, words, program=lander.__file__):
    """Run lander.py, or another program, in several processes. -> exit status"""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {program}"
    return python(*launcher.split(), *words).returncode


def assert_same_result(folder, other):
    """What runs on different numbers of processes have in common."""
    ours, theirs = contents(folder), contents(other)
    for name in ours.keys() - {"args.json", "lock", "log.jsonl", "tuned.safetensors"}:
        assert ours[name] == theirs[name], name
    one, two = (load_file(run / "tuned.safetensors") for run in (folder, other))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name
    for entry, same in zip(log_of(folder), log_of(other), strict=True):
        for key in entry.keys() & {"loss", "valid_loss"}:
            assert entry[key] == pytest.approx(same[key], rel=1e-5)


@pytest.mark.parametrize(
    "processes, options",
    [(2, "--keep 0.5 --max-tokens 0"), (2, "--units all --no-routing"), (3, "--batch 2")],
)
def test_the_number_of_processes_does_not_matter(world, here, capfd, processes, options):
    """A mean of means; a share counted twice; a process without a sentence that moves others."""
    words = arguments(world, f"{options} --steps 6", pair="en-de,fr-de")
    assert lander.main([*words, "--out", "alone"]) == 0
    alone = capfd.readouterr().out
    assert torchrun(processes, words) == 0
    assert_same_result(here / "alone", here / "run")
    shown = [text.split("It took")[0] for text in (alone, capfd.readouterr().out)]
    assert shown[0] == shown[1], "one process alone prints"


# The second of two gets SIGKILL in the middle of its first step.
DIES = """
import os, signal, sys
import lander

if os.environ["RANK"] == "1":
    lander.train_step = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(lander.main())
"""


def test_a_process_that_dies_ends_all_and_another_number_goes_on(world, here, capfd):
    """The others waiting for it for half an hour; a state that belongs to a number of processes."""
    words = arguments(world, "--steps 6", pair="en-de,fr-de")
    assert lander.main([*words, "--out", "alone"]) == 0
    interrupt(words)
    capfd.readouterr()
    Path("dies.py").write_text(DIES)
    assert torchrun(2, [*words, "--resume"], "dies.py") != 0
    failed = [line for line in capfd.readouterr().err.splitlines() if " failed (exitcode: " in line]
    assert len(failed) == 1 and "-9" in failed[0] and "local_rank: 1" in failed[0]
    assert torchrun(3, [*words, "--resume"]) == 0
    assert_same_result(here / "alone", here / "run")
    assert torchrun(2, words) != 0
    assert capfd.readouterr().err.count("error: run: holds a run already") == 1


# The second of two writes to a folder that the first does not see, as on another machine's disk.
APART = """
import os, sys
import lander

sys.exit(lander.main([*sys.argv[1:], "--out", "run" + os.environ["RANK"]]))
"""


def test_machines_without_a_shared_folder_fail_before_training(world, here, capfd):
    """Hours of training, after which the second machine finds nothing to translate with."""
    Path("apart.py").write_text(APART)
    assert torchrun(2, arguments(world), "apart.py") != 0
    assert "error: run1: not shared by all machines, as it must be" in capfd.readouterr().err
    assert not list(Path("run0").glob("*.safetensors")) and not Path("run1").exists()


# --------------------------------------------------------------------------------------------------
# A device that is not the CPU


ON_PRETEND = """
import sys
from checks import device

library = device.register()
import pytest, torch
import lander
from test_lander import TRANSLATE, interrupt

words = sys.argv[1:]
with device.OnPretend():
    with pytest.raises(RuntimeError, match="is on the CPU"):
        torch.ones(2, device="pretend") + torch.ones(2)
    interrupt(words, count=3)
    assert lander.main([*words, "--resume"]) == 0
    assert lander.main([*TRANSLATE, "input", "--pair", "en-de"]) == 0
"""


@pytest.mark.parametrize(
    "tolerance, options",
    [
        (1e-5, "--dtype float32 --units all --keep 1"),
        (1e-2, "--dtype bfloat16 --beams 2 --valid-every 2"),
    ],
)
def test_a_device_that_is_not_the_cpu(world, here, tolerance, options):
    """A tensor left on the CPU: the first user with CUDA would be the one to find it."""
    small = "--steps 4 --eval-pairs en-de --eval-sentences 1 --score-sentences 2"
    words = arguments(world, f"{options} {small}", pair="en-de,fr-de")
    data.write_lines(Path("input"), ["ba de."])
    done = python("-c", ON_PRETEND, "--device", "pretend", *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert lander.main([*words, "--device", "cpu", "--out", "here"]) == 0
    there, losses = ([e["loss"] for e in log_of(out) if "loss" in e] for out in ("run", "here"))
    assert there == pytest.approx(losses, rel=tolerance) and len(losses) == 4


# --------------------------------------------------------------------------------------------------
# Memory


MEASURE_LOADING = """
import re, sys, torch, model
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
model.load_model(sys.argv[1] + "/warm-up")
before = peak()
loaded = model.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in loaded.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there what is held")
@pytest.mark.parametrize("dtype, largest", [("float32", 1.65), ("float16", 0.3)])
def test_loading_holds_the_weights_once(tmp_path, dtype, largest):
    """A copy of weights that can stay in the file; in 32 bits another beside it and the result."""
    sizes = dict(model_type="bloom", vocab_size=20000, n_embed=1024, n_layer=6, n_head=8)
    save_model(Decoder(model.read_config(sizes)).half(), tmp_path)
    save_model(tiny_decoder("bloom").half(), tmp_path / "warm-up")
    done = python("-c", MEASURE_LOADING, tmp_path, dtype, capture_output=True, check=True)
    peak, weights = map(int, done.stdout.split())
    # In 32 bits the mapped file counts, half as large, which the system may drop at any time.
    assert peak < largest * weights


# --------------------------------------------------------------------------------------------------
# Damaged files, and ends at random moments


def test_damaged_files_end_in_one_line():
    """A traceback where one line would do; a hang; children that wait for threads they have not."""
    environment = {name: value for name, value in IMPORTABLE.items() if "NUM_THREADS" not in name}
    command = [sys.executable, ROOT / "checks/fuzz.py", *"--cases 60 --seed 7".split()]
    done = subprocess.run(command, env=environment, timeout=FOREVER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 bad" in done.stdout and " 0 a result" not in done.stdout


def test_runs_that_are_ended_go_on_to_the_same_bytes():
    """A half-written file taken for a whole one; moments lost; two processes that mix files."""
    done = python(ROOT / "checks/interrupt.py", "--times", 2, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all the same bytes") == 4 and "in use by another" in done.stdout


def test_a_run_goes_on_elsewhere_with_less_memory(world, whole, half_done, here):
    """Text, weights and run in other folders; the advice after running out of memory, refused."""
    shutil.copytree(world, "elsewhere")
    shutil.copytree(half_done, "moved")
    words = "--weights elsewhere/weights --data elsewhere/data --out moved --resume"
    memory = "--micro-tokens 200 --cache-gb 0.001 --checkpointing --device cpu"
    assert lander.main(f"{words} {memory}".split()) == 0
    found, expected = load_file("moved/tuned.safetensors"), load_file(whole / "tuned.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in found)
    for name in ("results.json", "neurons.json"):
        assert Path("moved", name).read_bytes() == (whole / name).read_bytes()


def test_a_run_of_all_units_that_keeps_others(world, here, capsys):
    """Channels lost on resuming or exporting; a start that is where the state was saved."""
    words = "--units all --keep 0.5 --no-routing --score-pairs en-de,fr-de --max-tokens 0"
    assert lander.main(arguments(world, f"{words} --out alone")) == 0
    shown = capsys.readouterr().out
    assert "kept: KL" in shown and "specific channels" in shown
    assert log_of("alone")[2]["kept"] > 0
    assert json.loads(Path("alone/neurons.json").read_text()).popitem()[1]["channels"]["en-de"]
    assert json.loads(Path("alone/kept.json").read_text()).keys() == {"fr-de"}
    interrupt(arguments(world, words), "train_step", 4)
    assert lander.main(arguments(world, f"{words} --resume")) == 0
    assert contents("run") == contents("alone")
    assert lander.main(EXPORT) == 0
    settings = read_settings(EXPORT, **json.loads(Path("run/args.json").read_text()))
    tuned, _, _ = lander.load_tuned(settings)
    ids = random_ids((2, 9), 90)
    assert_close(load_model("exported")(ids), tuned(ids))
    assert not torch.equal(tuned(ids), load_model(world / "weights")(ids))


# --------------------------------------------------------------------------------------------------
# Training and generation


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_recomputes_activations_where_it_is_asked_to(tmp_path, monkeypatch, checkpointing):
    """--checkpointing that is ignored: out of memory, on the machine that it was meant for."""
    decoder, seen, train_step = routed_decoder(), [], lander.train_step
    noted = lambda model, *rest: seen.append(model.checkpointing) or train_step(model, *rest)
    monkeypatch.setattr(lander, "train_step", noted)
    text = {"en-de": [("0", "1")] * 2}
    learners = {"en-de": lander.what_learns(decoder, "en-de")}
    settings = read_settings(steps=2, batch=1, checkpointing=checkpointing)
    lander.train(decoder, Letters, learners, text, {}, settings, tmp_path)
    assert seen == [checkpointing] * 2 and not decoder.checkpointing


def test_a_slow_save_makes_saves_rare(world, here, monkeypatch):
    """A minute for each save of 6 GB, every 30 s: more saving than training."""
    now, saves = [0.0], []

    def slow(seconds, calls, call, *arguments):
        calls.append(now[0])
        now[0] += seconds
        return call(*arguments)

    monkeypatch.setattr(lander.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lander, "save_state", partial(slow, 10, saves, lander.save_state))
    monkeypatch.setattr(lander, "train_step", partial(slow, 31, [], lander.train_step))
    assert lander.main(arguments(world, "--steps 12")) == 0
    assert len(saves) == 3 and saves[0] < 40 and saves[1] - saves[0] >= 200, saves


def test_generation_casts_weights_once(monkeypatch):
    """A cast of the trained parts at every token, 17% of the time; or a cast that outlives them."""
    decoder = tiny_decoder("bloom").bfloat16()
    lander.install_routing(decoder, random_groups(decoder, {"en-de": [0, 1]}))
    lander.route(decoder, "en-de")
    calls, operands = [], model.Linear.operands
    noted = lambda self, dtype: calls.append(self) or operands(self, dtype)
    monkeypatch.setattr(model.Linear, "operands", noted)
    ids = torch.tensor([[5, 6, 7]])
    before = decoder.generate(ids, None, 9, eos_id=89)
    linears = sum(isinstance(module, model.Linear) for module in decoder.modules())
    assert len(set(calls)) == len(calls) == linears
    logits = decoder(ids)
    with torch.no_grad():
        decoder.blocks[1].ffn.general.up.weight.mul_(-3)
    assert not torch.equal(decoder(ids), logits)
    assert before != decoder.generate(ids, None, 9, eos_id=89)


def test_limits_and_groups_by_hand(monkeypatch):
    """Twice the prompt; a cache of --cache-gb for each beam, which is as often too large."""
    decoder, asked, ends = tiny_decoder("bloom", vocabulary=128), [], [0]

    def loops(ids, mask, limits, eos_id, beams, **options):
        asked.append((len(ids), list(limits)))
        return [[65] * (limit - ends[0]) for limit in limits]  # so many tokens before the limit

    monkeypatch.setattr(decoder, "generate", loops)
    prompt = len(data.prompt_text("en-de", "a"))
    lines, cut = translations(decoder, list("abcd"))
    translations(decoder, list("abcd"), new_tokens=7)
    assert asked == [(4, [3 * prompt] * 4), (4, [7 * prompt] * 4)]
    assert cut == 4 and len(lines[0]) == 3 * prompt
    ends[0] = 1
    assert translations(decoder, list("abcd"))[1] == 0, "none came to its limit"
    room = 2 * 4 * prompt * decoder.cache_bytes() / 1e9  # for two prompts and their translations
    for beams, sizes in [(1, [2, 2]), (2, [1, 1, 1, 1])]:
        asked.clear()
        translations(decoder, list("abcd"), beams=beams, cache_gb=room)
        assert [size for size, _ in asked] == sizes
    decoder.config = replace(decoder.config, longest=prompt + 9)
    lines, _ = translations(decoder, ["a", "b" * 11, "c"])
    assert asked[-1] == (2, [9, 9]) and lines[1] == "", "a window, or no positions left"


FIVE = Texts(["a", "\n", "</s>", "b\n", " "])


def continuations(limit, lines):
    """All up to their </s>, or if lines end them, to a line break after a visible character."""
    for new in itertools.product(range(5), repeat=limit):
        for length in range(1, limit + 1):
            text = FIVE.decode([token for token in new[:length] if token != 2])
            if new[length - 1] == 2 or (lines and "\n" in text.lstrip()):
                break
        yield new[:length]


@torch.no_grad()
def score(decoder, prompt, new):
    """Log-probability a token of a continuation, its end counted, of the tokenizer's tokens."""
    logits = decoder(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1, :5]
    return float(logits.double().log_softmax(-1)[range(len(new)), list(new)].mean())


@pytest.mark.parametrize("lines", [False, True])
def test_beams_wide_enough_find_the_best_of_all(lines):
    """Beams ranked by a second line; a finished one lost; a neighbour's limit; unknown ids."""
    ends, not_greedy = data.line_ends(FIVE) if lines else None, 0
    ids, mask = padded_ids(5, "left", lengths=(3, 1, 4))
    limits = [3, 2, 3]
    everything = {limit: {*continuations(limit, lines)} for limit in limits}
    for seed in range(8):
        decoder = tiny_decoder("llama", seed, vocabulary=7)
        generate = partial(decoder.generate, ids, mask, limits, 2, vocab_size=5, line_ends=ends)
        found = generate(beams=125)
        for prompt, limit, new in zip(unpadded(ids, mask), limits, found):
            best = max(everything[limit], key=partial(score, decoder, prompt))
            assert new == [token for token in best if token != 2]
        not_greedy += found != generate(beams=1)
    assert not_greedy, "greedy finds them all: the toy model is too easy to test anything"


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_tied_heads_and_names_with_and_without_a_prefix(tmp_path):
    """Of two names for one weight, one missing; a head of its own that is dropped unread."""
    decoder = tiny_decoder("bloom")
    path, embedding = tmp_path / "model.safetensors", decoder.embedding.weight.detach().clone()
    for edit in (
        lambda tensors: {f"transformer.{name}": t for name, t in tensors.items()},
        lambda tensors: tensors | {"lm_head.weight": embedding.clone()},
        lambda tensors: without("word_embeddings.weight", **{"lm_head.weight": embedding})(tensors),
        lambda tensors: tensors | {"h.0.attn.masked_bias": torch.ones(1)},
    ):
        save_model(decoder, tmp_path)
        save_file(edit(load_file(path)), path)
        assert same_weights(decoder, load_model(tmp_path))
    save_file(load_file(path) | {"lm_head.weight": embedding + 1}, path)
    refused(lambda: load_model(tmp_path), "lm_head.weight is not the embedding", "config.json")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path).head.weight, embedding + 1)


def test_bin_shards_convert_to_the_same_model(tmp_path, capsys):
    """safetensors refuses what overlaps, and a tied head; a pickle may run anything."""
    decoder, run = tiny_decoder("bloom"), lambda: data.exit_status(model.convert, tmp_path)
    save_model(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert run() == 2 and "has safetensors already" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["word_embeddings.weight"]
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        torch.save(part, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    refused(lambda: load_model(tmp_path), f"python model.py convert {tmp_path}")
    assert run() == 0 and same_weights(decoder, load_model(tmp_path))
    for path in tmp_path.glob("*model*"):
        path.unlink()

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for content in ({"w": Payload()}, {"state_dict": {"w": torch.zeros(2)}}, [torch.zeros(2)]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        assert run() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/pytorch_model.bin: ") and error.count("\n") == 1
        assert names_in(tmp_path) == ["config.json", "pytorch_model.bin"]


def test_sisters_have_other_fingerprints(tmp_path):
    """bloom and bloomz: the same names, shapes and sizes; 14 GB that are read at every start."""
    tensors = {f"layer.{i}": torch.full((2000, 1000), float(i)) for i in range(3)}
    path, found = tmp_path / "0.safetensors", []
    for number in (1.0, 1.0, 1.5):
        data.write_tensors(path, tensors | {"layer.1": torch.full((2000, 1000), number)})
        found.append(data.fingerprint(path))
    assert found[0] == found[1] != found[2]
    (tmp_path / "a.json").write_text("{}" * 9999)
    assert data.fingerprint(tmp_path / "a.json") == hashlib.sha256(b"{}" * 9999).hexdigest()
