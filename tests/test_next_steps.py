"""Help fits on a page, and commands that the project prints, in help, at a run's end and in errors, work as printed."""

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import benchmark
import pytest
import simclr
import test_mcl
import torch
import tubelet_contrast
from conftest import main_of
from helpers import CONV4, FORK, ROOT, write

import cli
import data
import dclr
import evaluate
import fame
import fima
import mcl
import moco
import train
import visualize

COMMAND = re.compile(r"(?m)^ *((?:python|torchrun) .*?) *(?:#.*)?$")
FILES = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]) if COMMAND.search(path.read_text())]
TINY = [*CONV4, "--batch_size=4", "--queue=8", "--epochs=1", "--max_steps=1", "--workers=0", "--device=cpu"]
TESTED = ["--encoder=conv4", "--crop=32", "--clips=1", "--workers=0", "--device=cpu"]
MADE = ["--train=20", "--test=10", "--frames=40", "--size=48"]
FEW = {  # flags that are added to a command, by its script, or script and sub-command
    "simclr.py": [flag for flag in TINY if "queue" not in flag],
    "fima.py": [*TINY, "--decoder_width=32"],
    "dclr.py": [*TINY, "--retrieved=2"],
    "mcl.py maps": ["--workers=1"],
    "data.py check": ["--workers=1"],
    "data.py shrink": ["--workers=1"],
    "data.py synthetic": MADE,
    "benchmark.py data": [*TINY, "--rounds=1", "--decoder_width=32"],
    "benchmark.py step": [*TINY, "--rounds=1", "--decoder_width=32"],
    "benchmark.py count": TINY,
    "evaluate.py linear": [*TESTED, "--epochs=1", "--batch_size=6"],
    "evaluate.py finetune": [*TESTED, "--epochs=1", "--batch_size=6"],
    "evaluate.py": TESTED,
    "scene_bias.py": TESTED,
    "foreground.py": [*TESTED, "--test_batch=4"],
    "draw_method.py": ["--out=method.png"],
    "visualize.py report": ["--clips=1", "--gallery=4", "--workers=0", "--device=cpu"],
    "visualize.py": [*TESTED, "--count=6", "--gallery=4"],
}


def few(words: list[str]) -> list[str]:
    script = Path(words[0]).name
    return FEW.get(f"{script} {words[1] if words[1:] else ''}", FEW.get(script, TINY))


@pytest.fixture
def place(videos, tmp_path, monkeypatch):
    """A folder with tiny data sets, in which commands run; gives what they name, by the names of paths and capitals."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(videos, "datasets/synthetic")
    listed = {"train": [], "test": []}
    classes = sorted(path.name for path in (videos / "train").iterdir())
    for path in sorted(videos.glob("*/*/*.mp4")):
        part, name = path.parts[-3], path.parent.name
        ucf = Path("ucf101/UCF-101", name, f"v_{part}_{path.stem}_g01_c01.avi")
        hmdb = Path("hmdb51", name, f"{part}_{path.stem}.avi")
        k400 = Path("k400", part.replace("test", "val"), name, path.name)
        for copy in (ucf, hmdb, k400):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        listed[part].append(f"{name}/{ucf.name} {classes.index(name) + 1}")
        with open(Path("hmdb51", f"{name}_test_split1.txt"), "a") as file:
            file.write(f"{hmdb.name} {1 if part == 'train' else 2} \n")
    write(Path("ucf101/classInd.txt"), *[f"{i} {name}" for i, name in enumerate(classes, 1)])
    for part, lines in listed.items():
        write(Path(f"ucf101/{part}list01.txt"), *lines)
    names = dict.fromkeys(("/videos", "YOUR_VIDEOS", "LABELLED_VIDEOS", "DATA"), str(videos))
    names |= {f"/data/{name}": name for name in ("ucf101", "hmdb51", "k400")}
    return names | {"OUT": "out", "ROOT": "made", "clip.mp4": str(next(videos.glob("test/*/*.mp4")))}


@pytest.fixture
def works(place, in_process):
    """Checks that a command ends well in this process, alone in the place of torchrun's; gives what it prints."""

    def call(command, *more):
        launcher, *words = [place.get(word, word) for word in shlex.split(command, comments=True)]
        words = [word for word in words if not word.startswith("--nproc_per_node")] if launcher == "torchrun" else words
        script, *flags = [*words, *few(words), *more]
        module = importlib.import_module(Path(script).stem)
        code, out, err = in_process(module, *flags, main=main_of(module))
        assert code == 0, f"{command}\n{err}"
        return out

    return call


@pytest.fixture
def flow(monkeypatch):
    """Something in place of TV-L1, which needs scikit-image."""
    monkeypatch.setattr(mcl, "tvl1_flow", test_mcl.difference_flow)
    monkeypatch.setattr(torch.multiprocessing, "Process", FORK.Process)  # which inherit it


def printed(text: str) -> list[str]:
    """The commands in a text, without their comments."""
    return COMMAND.findall(text)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_in_a_scripts_help_work(path, works, flow):
    doc = importlib.import_module(path.stem).__doc__
    for name in ("moco", "fima"):
        if f"runs/{name}" in doc and f"--out runs/{name}" not in doc:  # which its commands take for granted
            works(f"python {name}.py --out runs/{name}")
    assert printed(doc)
    for number, command in enumerate(printed(doc)):
        works(command, *[f"--out=runs/{number}"] * bool(re.search("evaluate.py (linear|finetune)", command)))


@pytest.mark.slow
@pytest.mark.parametrize("module", [fima, mcl], ids=lambda module: module.__name__)
@pytest.mark.parametrize("dataset", ["synthetic", "folder"])
def test_the_next_steps_that_a_run_prints_work(module, dataset, works, flow):
    """Of one's own videos too, of which nobody knows the classes."""
    Path("flat").mkdir()
    for path in Path("datasets/synthetic/test").glob("*/*.mp4"):
        shutil.copy(path, "flat")
    folder = [] if dataset == "synthetic" else ["--dataset=folder", "--data=flat"]
    out = works(f"python {module.__name__}.py", *folder, "--out=runs/own")
    steps = printed(out.partition("\nnext:\n")[2])
    scripts = [Path(shlex.split(step)[1]).stem for step in steps]
    assert scripts == ["evaluate", "evaluate", "visualize", module.__name__]
    for step in steps:
        works(step)


@pytest.mark.slow
def test_a_next_step_works_in_a_shell_from_any_folder(works):
    out = works("python fima.py --out 'runs/a run'")
    (step,) = re.findall("(?m)^  (python .*evaluate.py retrieve .*)$", out)  # with its comment
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    step = step.partition("#")[0] + " ".join(TESTED) + "  # " + step.partition("#")[2]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(step, shell=True, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "written to runs/a run/retrieve_synthetic.json" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_stopped_run_and_one_that_is_there_already_say_how_to_continue(works, in_process, monkeypatch):
    step = train.Run.step
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", lambda *given: (step(*given), signal.raise_signal(signal.SIGTERM))[0])
        code, out, _ = in_process(moco, *TINY, "--max_steps=3", "--out=runs/stopped", main=main_of(moco))
    assert code == 128 + signal.SIGTERM
    assert "resumed after step 1" in works(out.partition("continue with: ")[2].strip(), "--max_steps=2")
    code, _, err = in_process(moco, *TINY, "--out=runs/stopped", main=main_of(moco))
    assert code == 2
    (flags,) = re.findall(r"continue it with (--resume \S+),", err)
    assert "resumed after step 2" in works(f"python moco.py {flags}", "--max_steps=3")


@pytest.mark.slow
def test_what_errors_and_notes_advise_works(works, place, in_process, monkeypatch):
    process, said = mock.Mock(), []
    process.say = said.append
    log = mock.Mock(making=torch.ones(3), warned=set(), run=mock.Mock(process=process))
    train.Log.advise(log, 0.5)
    works(said[0][said[0].index("python data.py shrink") :])

    damaged = Path("datasets/synthetic/train/damaged.mp4")
    damaged.write_bytes(b"no video")
    code, out, _ = in_process(data, "check", "datasets/synthetic", "--workers=1")
    assert code == 1
    works("python moco.py --data datasets/synthetic --dataset folder " + out[out.index("--exclude") :].strip())
    damaged.unlink()

    monkeypatch.setenv("RANK", "0")
    code, _, err = in_process(moco, *TINY, main=main_of(moco))
    assert code == 2
    for name in re.search("`unset (.*)`", err)[1].split():
        monkeypatch.delenv(name)
    works("python moco.py --out runs/moco")
    code, _, err = in_process(visualize, "attention", "runs/moco", "--device=cpu")
    assert code == 2
    works("python fima.py --out RUN")
    works("python " + re.search("visualize.py attention RUN", err)[0])


HELP = [(module,) for module in (fima, moco, fame, dclr, mcl, simclr, tubelet_contrast)] + [(mcl, "maps")]
HELP += [(data, name) for name in ("check", "synthetic", "shrink")]
HELP += [(benchmark, name) for name in ("data", "step", "count")]
HELP += [(evaluate, name) for name in evaluate.PROTOCOLS] + [(visualize, name) for name in visualize.FIGURES]


@pytest.mark.parametrize("given", HELP, ids=lambda given: " ".join([given[0].__name__, *given[1:]]))
def test_help_fits_on_a_page_and_says_how_to_see_the_rest(given, in_process, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module, *words = given
    short, whole = (in_process(module, *words, flag, main=main_of(module))[1] for flag in ("--help", "--help-all"))
    few, every = (set(re.findall(r"(?m)^  (--\w+)", text)) for text in (short, whole))
    lines = short.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120 and lines[0].count("--") == 1
    assert few <= every and "--print_config" in few
    assert (f"--help-all lists {len(every - few)} more flags" in lines[-1]) == (few != every)
    for heading in ("data:", "model and clips:", "optimisation:", "run:", "FIMA:") if module is fima else ():
        assert heading in lines and heading in whole.splitlines()


def test_print_config_shows_every_option_and_what_differs_and_ends(in_process):
    flags = ["--dataset", "k400", "--queue", "8", "--list-file", "my list"]
    code, out, _ = in_process(fima, *flags, "--print-config", main=main_of(fima))
    assert not code
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert [*shown] == [f"--{field.name}" for field in dataclasses.fields(fima.FIMAConfig)]
    assert shown["--queue"] == "8 # default: 2048" and shown["--pixel_queue"] == "31360 # default: 0"
    assert shown["--crop"] == "224" and shown["--list_file"] == "'my list' # default: ''"
    again = cli.parse(fima.FIMAConfig, "", argv=shlex.split(out, comments=True))
    assert again == cli.parse(fima.FIMAConfig, "", fima.PRESETS, flags)
