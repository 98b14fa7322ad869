"""Commands that the project prints, in help, at a run's end and in errors, work as they are printed."""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import test_mcl
from conftest import main_of
from helpers import CONV4, ROOT, TORCHRUN, write

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
    "benchmark.py data": ["--samples=1", "--rounds=1", "--crop=32"],
    "benchmark.py step": [*TINY, "--rounds=1"],
    "benchmark.py count": TINY,
    "evaluate.py linear": [*TESTED, "--epochs=1", "--batch_size=6"],
    "evaluate.py finetune": [*TESTED, "--epochs=1", "--batch_size=6"],
    "evaluate.py": TESTED,
    "scene_bias.py": TESTED,
    "foreground.py": [*TESTED, "--test_batch=4"],
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
    own = {
        "/videos": videos,
        "YOUR_VIDEOS": videos,
        "LABELLED_VIDEOS": videos,
        "DATA": videos,
        "OUT": "out",
        "ROOT": "made",
    }
    own["clip.mp4"] = next(videos.glob("test/*/*.mp4"))
    return {name: str(path) for name, path in own.items()} | {
        f"/data/{name}": name for name in ("ucf101", "hmdb51", "k400")
    }


@pytest.fixture
def works(place, in_process):
    """Checks that a command ends well, in this process, or with torchrun in one of its own; gives what it prints."""

    def call(command, *more):
        launcher, *words = [place.get(word, word) for word in shlex.split(command, comments=True)]
        words = [word for word in words if not word.startswith("--nproc_per_node")] if launcher == "torchrun" else words
        script, *flags = [*words, *few(words), *more]
        if launcher == "torchrun":
            start = [*TORCHRUN, "--nproc_per_node=1", str(ROOT / script)]
            done = subprocess.run([*start, *flags], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout
        module = importlib.import_module(Path(script).stem)
        code, out, err = in_process(module, *flags, main=main_of(module))
        assert code == 0, f"{command}\n{err}"
        return out

    return call


def train(works, folder, script="fima.py"):
    return works(f"python {script} --out {folder}")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_in_help_work(path, works, monkeypatch, request):
    if path.stem == "mcl":
        request.getfixturevalue("without_flow")
    module = importlib.import_module(path.stem)
    commands = COMMAND.findall(module.__doc__)
    for name in ("moco", "fima"):
        if f"runs/{name}" in module.__doc__ and f"--out runs/{name}" not in module.__doc__:
            train(works, f"runs/{name}", f"{name}.py")
    for number, command in enumerate(commands):
        if path.stem == "mcl" and command.startswith("torchrun"):
            pytest.importorskip("skimage")
        own = [f"--out=out{number}"] * bool(re.search("evaluate.py (linear|finetune)", command))
        works(command, *own)
    assert commands


without_flow = test_mcl.without_flow
