"""Help fits on a page, and commands that the project prints, in help, at a run's end and in errors, work as printed."""

import dataclasses
import importlib
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import test_mcl
import torch
from conftest import main_of
from helpers import CONV4, FORK, ROOT

import cli
import evaluate
import fima
import mcl
import moco
import train
import visualize

COMMAND = re.compile(r"(?m)^ *((?:python|torchrun) .*?) *(?:#.*)?$")  # without the comment behind it
SOURCES = {path: path.read_text() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")])}
DESCRIBED = [path for path, source in SOURCES.items() if COMMAND.search(source)]
ADVISED = re.findall(r"\w+\.py (?:\w+ )?(?:DATA|RUN)\b[^\"\n]*", "".join(SOURCES.values()))  # in messages
TINY = [*CONV4, "--batch_size=4", "--queue=8", "--epochs=1", "--max_steps=1", "--workers=1", "--device=cpu"]
QUICK = [*TINY, "--clips=1", "--decoder_width=32", "--retrieved=2", "--test_batch=4", "--rounds=1", "--count=6"]
QUICK += ["--gallery=4", "--train=20", "--test=10"]


@pytest.fixture
def works(run):
    """Checks that a command ends well in this process, alone in the place of torchrun's, with those of the flags QUICK
    that it knows; gives what it prints.

    Names in capitals, and all data sets, stand for a tiny one: a k400 of class folders, which needs no lists.
    """
    shutil.copytree(run.videos, run.path / "datasets" / "synthetic")
    for part, own in ("train", "train"), ("val", "test"):
        shutil.copytree(run.videos / own, run.path / "k400" / part)
    names = dict.fromkeys(["/videos", "YOUR_VIDEOS", "LABELLED_VIDEOS", "DATA"], str(run.videos))
    names |= {f"{above}{name}": "k400" for name in ("ucf101", "hmdb51", "k400") for above in ("", "/data/")}
    names |= {"OUT": "out", "/data/k400_256": "out", "ROOT": "made", "docs/method.png": "method.png"}
    names["clip.mp4"] = str(next(run.videos.glob("test/*/*.mp4")))

    def call(command, *more):
        _, script, *words = (names.get(word, word) for word in shlex.split(command) if "--nproc_per_node" not in word)
        module, here = importlib.import_module(Path(script).stem), dict(dataset=None, small=False)
        known = run(module, *filter(str.isalpha, words[:1]), "--help-all", **here)[1]
        quick = [flag for flag in QUICK if f"\n  {flag.partition('=')[0]} " in known]
        return run.ok(module, *words, *quick, *more, **here)

    return call


@pytest.fixture
def flow(monkeypatch):
    """Something in place of TV-L1, which needs scikit-image."""
    monkeypatch.setattr(mcl, "tvl1_flow", test_mcl.difference_flow)
    monkeypatch.setattr(torch.multiprocessing, "Process", FORK.Process)  # which inherit it


@pytest.mark.slow
@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: path.stem)
def test_the_commands_in_a_scripts_help_work(path, works, flow):
    doc = importlib.import_module(path.stem).__doc__
    for name in ("moco", "fima"):
        if f"runs/{name}" in doc and f"--out runs/{name}" not in doc:  # which its commands take for granted
            works(f"python {name}.py --out runs/{name}")
    assert COMMAND.search(doc)
    for number, command in enumerate(COMMAND.findall(doc)):
        works(command, *[f"--out=runs/{number}"] * bool(re.search("evaluate.py (linear|finetune)", command)))


@pytest.mark.slow
@pytest.mark.parametrize("module", [fima, mcl], ids=lambda module: module.__name__)
@pytest.mark.parametrize("dataset", ["synthetic", "folder"])
def test_the_next_steps_that_a_run_prints_work(module, dataset, works, flow, run):
    """From any folder; of one's own videos too, of which nobody knows the classes."""
    (run.path / "flat").mkdir()
    for path in run.videos.glob("test/*/*.mp4"):
        shutil.copy(path, run.path / "flat")
    own = "" if dataset == "synthetic" else "--dataset=folder --data=flat"
    out = works(f"python {module.__name__}.py --out='runs/a run' {own}")
    steps = COMMAND.findall(out.partition("\nnext:\n")[2])
    scripts = [Path(shlex.split(step)[1]) for step in steps]
    assert [script.stem for script in scripts] == ["evaluate", "evaluate", "visualize", module.__name__]
    assert all(script.is_file() for script in scripts[:3])
    for step in steps:
        works(step)


@pytest.mark.slow
def test_a_stopped_run_and_one_that_is_there_already_say_how_to_continue(works, run, monkeypatch):
    step, here = train.Run.step, dict(dataset=None, small=False)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", lambda *given: (step(*given), signal.raise_signal(signal.SIGTERM))[0])
        code, out, _ = run(moco, *TINY, "--max_steps=3", "--out=runs/stopped", **here)
    assert code == 128 + signal.SIGTERM
    assert "resumed after step 1" in works(out.partition("continue with: ")[2].strip(), "--max_steps=2")
    (flags,) = re.findall(r"continue it with (--resume \S+),", run(moco, *TINY, "--out=runs/stopped", **here)[2])
    assert "resumed after step 2" in works(f"python moco.py {flags}", "--max_steps=3")


@pytest.mark.slow
def test_what_errors_and_notes_advise_works(works, run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    err = run(moco, dataset=None, small=False)[2]
    for name in re.search("`unset (.*)`", err)[1].split():
        monkeypatch.delenv(name)
    works("python fima.py --out RUN")
    assert {command.split()[0] for command in ADVISED} == {"shrink.py", "visualize.py"}
    for command in ADVISED:
        works(f"python {command}")


HELP = ["fima", "moco", "fame", "dclr", "mcl", "mcl maps", "simclr", "tubelet_contrast", "data check", "data synthetic"]
HELP += ["shrink", "benchmark data", "benchmark step", "benchmark count"]
HELP += [f"evaluate {name}" for name in evaluate.PROTOCOLS] + [f"visualize {name}" for name in visualize.FIGURES]


@pytest.mark.parametrize("given", HELP)
def test_help_fits_on_a_page_and_says_how_to_see_the_rest(given, in_process, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    name, *words = given.split()
    module = importlib.import_module(name)
    short, whole = (in_process(module, *words, flag, main=main_of(module))[1] for flag in ("--help", "--help-all"))
    few, every = (set(re.findall(r"(?m)^  (--\w+)", text)) for text in (short, whole))
    lines = short.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120 and lines[0].count("--") == 1
    assert few <= every and "--print_config" in few
    assert (f"--help-all lists {len(every - few)} more flags" in lines[-1]) == (few != every)
    if name == "fima":
        assert {"data:", "model and clips:", "optimisation:", "run:", "FIMA:"} <= {*lines} & {*whole.splitlines()}


def test_print_config_shows_every_option_and_what_differs_and_ends(in_process):
    flags = ["--dataset", "k400", "--queue", "8", "--list-file", "my list"]
    code, out, _ = in_process(fima, *flags, "--print-config", main=main_of(fima))
    assert not code
    assert re.findall(r"(?m)^--(\w+)", out) == [field.name for field in dataclasses.fields(fima.FIMAConfig)]
    shown = {*re.sub(" +", " ", out).splitlines()}
    assert {"--queue 8 # default: 2048", "--pixel_queue 31360 # default: 0", "--crop 224"} < shown
    again = cli.parse(fima.FIMAConfig, "", argv=shlex.split(out, comments=True))
    assert again == cli.parse(fima.FIMAConfig, "", fima.PRESETS, flags)
