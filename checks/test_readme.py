"""README's snippets run as they stand, and what it names is there:  python -m pytest checks"""

import re
import shutil
import sys
from pathlib import Path

import pytest

import lander
import model
from test_lander import arguments, here, world  # fixtures, too

ROOT = Path(lander.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "number, said", list(enumerate(["activation", "attention", "mine", "loss"]))
)
def test_a_snippet_runs_as_it_stands(world, here, monkeypatch, capsys, number, said):
    """A name that is gone; a baseline that trains nothing; a score that no file records."""
    for name in ("neuron_awareness", "what_learns", "training_steps"):
        monkeypatch.setattr(lander, name, getattr(lander, name))  # put back at the end
    monkeypatch.setattr(model, "FAMILIES", dict(model.FAMILIES))
    shutil.copytree(world / "weights", "weights")
    if said == "mine":
        sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=360)
        config = model.read_config(sizes | {"model_type": "llama", "intermediate_size": 128})
        model.save_model(model.Decoder(config), Path("weights"))
        text = Path("weights/config.json").read_text().replace('"llama"', '"mine"')
        Path("weights/config.json").write_text(text.replace('"intermediate_size": 128,', ""))
    words = arguments(world, "--weights weights --steps 2 --no-routing")
    monkeypatch.setattr(sys, "argv", ["snippet.py", *words])
    exec(compile(SNIPPETS[number], "snippet.py", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert "mean, tuned" in out and ("\n1 loss " in out) == (said == "loss")
    record = Path("run/args.json").read_text()
    if said in ("activation", "attention"):
        assert f'"__main__.{said}"' in record
    if said == "attention":
        trained = lander.read_tensors(Path("run/tuned.safetensors"))
        assert trained and all(".attention." in name for name in trained)


def test_what_readme_names_is_there():
    """A test that was renamed, named as proof; a file that moved."""
    assert len(SNIPPETS) == 4
    tests = (ROOT / "test_lander.py").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 5 and all(f"def {name}(" in tests for name in named)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    functions = re.findall(r"`([a-z_]+)`", README.split("| paper |")[1].split("\n\n")[0])
    code = tests + (ROOT / "lander.py").read_text(encoding="utf-8")
    assert len(functions) > 10 and all(f"def {name}(" in code for name in functions)
