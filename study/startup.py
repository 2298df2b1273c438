"""How long millions of pairs take before the first step, and how much memory, made from some text.

    python study/startup.py --weights W --data D --pair en-de --pairs 5000000

Repeats the training text of a pair in two files of a temporary folder, then reads it as lander.py
does: finding lines, checking UTF-8, fingerprints, the scoring sample, the shuffled order, and the
first step's sentences in batches. Memory is the growth of the resident set, less the mapped files.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lander
from data import exit_status, fingerprint, load_tokenizer, make_batches, read_parallel, split_pair


def own_memory():
    """Bytes of the resident set that are not of mapped files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024


def repeat_text(args, folder):
    """Write both sides of the text again and again, until there are enough pairs."""
    text = read_parallel(args.data, "train", args.pair)
    for side, code in enumerate(split_pair(args.pair)):
        lines = "".join(f"{row[side]}\n" for row in text)
        with open(f"{folder}/train.{args.pair}.{code}", "w", encoding="utf-8") as file:
            for _ in range(args.pairs // len(text)):
                file.write(lines)


def measure(args, folder):
    tokenizer, settings = load_tokenizer(args.weights), lander.Settings()
    settings.data, settings.pair, settings.eval_pairs = folder, args.pair, args.pair
    settings.score_pairs = ",".join(["-".join(split_pair(args.pair)[::-1]), args.pair])
    for code in split_pair(args.pair):
        Path(folder, f"test.{args.pair}.{code}").write_text("a\n")
    before, start = own_memory(), time.monotonic()
    inputs = lander.read_inputs(tokenizer, [args.pair], settings)
    for path in inputs.files:
        fingerprint(Path(path))
    steps = lander.schedule(inputs.train, settings.batch, settings.seed)
    _, numbers = next(steps)
    examples = [inputs.train[args.pair][i] for i in numbers]
    list(make_batches([one for one in examples if one], tokenizer.pad_id, settings.micro_tokens))
    seconds, pairs = time.monotonic() - start, len(inputs.train[args.pair])
    memory = (own_memory() - before) / pairs
    print(f"{pairs:,} pairs: {seconds:.1f} s to the first step, {memory:.0f} bytes a pair")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("weights", "data", "pair"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repeat_text(args, folder)
        measure(args, folder)


if __name__ == "__main__":
    sys.exit(exit_status(main))
