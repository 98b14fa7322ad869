"""What README, CONTRIBUTING, docs, help and messages say holds: commands run, names exist, imports run one way."""

import ast
import graphlib
import importlib
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import main_of
from helpers import CONV4, ROOT
from test_mcl import difference_flow

import cli
import evaluate
import fima
import moco
import train
import visualize

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
ALL = "\n".join(PAGES.values())
REPRODUCE, TRAINING = PAGES["docs/reproduce.md"], PAGES["docs/training.md"]
SOURCES = {path: path.read_text() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")])}
COMMAND = re.compile(r"(?m)^ *((?:python|torchrun) .*?) *(?:#.*)?$")  # without the comment behind it
BLOCKS = "".join(re.findall(r"^```bash\n(.*?)^```", ALL, re.DOTALL | re.MULTILINE))
IN_TEXT = [f"python {command}" for command in re.findall(r"`(\w+\.py [^`]*)`", ALL)]
OF_ROWS = [  # the flags of a table's row after the base command, which is the block above the table
    f"{base.strip()} {flags}"
    for base, below in re.findall(r"^```bash\n(.*?)^```(.*?)(?=^```|\Z)", REPRODUCE, re.DOTALL | re.MULTILINE)
    for flags in re.findall(r"^\|[^`\n]*`(--[^`\n]*)`", below, re.MULTILINE)
]
SCRIPTS = {  # the words from the script's name on, of each command that runs one of ours
    line: shlex.split(match[1], comments=True)
    for line in [*BLOCKS.splitlines(), *COMMAND.findall("\n".join(SOURCES.values())), *IN_TEXT, *OF_ROWS]
    if (match := re.search(r"(?:python|torchrun) (?:--\S+ )*(\S+\.py.*)", line))
}
PROGRAMS = sorted({re.match(r"\S+(?: [a-z]+(?= |$))?", " ".join(words))[0] for words in SCRIPTS.values()})
OWN_PARSER = {"examples/draw_method.py", "tests/torture.py"}  # without --print_config


def ends_itself(monkeypatch, script, *flags):
    """Runs a script with flags that end it: its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_parses(command, monkeypatch):
    script, *flags = SCRIPTS[command]
    checkpoint = {"method": mock.ANY, "config": {"dataset": "ucf101"}, "model": {}, "step": 1}
    monkeypatch.setattr(cli, "load_checkpoint", lambda path: checkpoint)
    assert ends_itself(monkeypatch, script, *flags, "--help" if script in OWN_PARSER else "--print_config") == 0


def test_commands_are_there():
    assert all(f"pip install -r requirements.txt && python {words}\n" in BLOCKS for words in ("fima.py", "-m pytest"))
    assert len(IN_TEXT) > 10 and len(OF_ROWS) > 30
    assert {f"evaluate.py {name}" for name in evaluate.PROTOCOLS} <= {*PROGRAMS}
    assert {f"visualize.py {name}" for name in visualize.FIGURES} <= {*PROGRAMS}
    assert all((ROOT / word).is_file() for word in BLOCKS.split() if word.startswith("tests/"))


def test_every_run_that_a_table_names_is_made_once():
    made = re.findall(r"--out runs/([\w.]+)", REPRODUCE)
    lists = ",".join(re.findall(r"runs/\{(.*?)\}", REPRODUCE)).split(",")
    named = {*lists, *re.findall(r"\| runs/([\w.]+) \|", REPRODUCE)}
    assert len(made) == len(set(made)) > 20 and named <= set(made)


def anchors(page: str) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_that_are_named_exist(name):
    of_users = {"run.json", "labels.json", "train.json", "validation.json"}
    of_users |= {f"Diving48_{part}.json" for part in ("V2_train", "V2_test", "vocab")}
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]*)\)", PAGES[name])):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists() and (not anchor or anchor in anchors(path.read_text())), f"{target}#{anchor}"
    for file in re.findall(r"`([\w/]+\.(?:py|sh|json|md))(?=[` ])", PAGES[name]):
        places = [ROOT / folder / file for folder in ("", "tests", "docs", "results")]
        assert any(place.is_file() for place in places) or file in of_users, file


def test_flags_that_are_named_exist(monkeypatch, capsys):
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"}  # of torchrun
    for program in PROGRAMS:
        assert ends_itself(monkeypatch, *program.split(), "--help_all", "--help") == 0
        known |= {*re.findall(r"(?m)^  (?:-h, )?(--\w+)", capsys.readouterr().out)}
    without_slurm = re.sub(r"^```sh\n.*?^```", "", ALL, flags=re.DOTALL | re.MULTILINE)
    assert {*re.findall(r"--\w+", without_slurm)} <= known


def test_names_that_are_imported_exist():
    for block in re.findall(r"^```python\n(.*?)^```", ALL, re.DOTALL | re.MULTILINE):
        exec("\n".join(line for line in block.splitlines() if line.startswith(("from ", "import "))), {})


def test_what_runs_have_written_holds_no_path_of_a_machine_and_no_progress_bar():
    notebooks, records = [*ROOT.glob("notebooks/*.ipynb")], [*ROOT.glob("results/**/*.json*")]
    assert notebooks and records and all('"output_type"' in path.read_text() for path in notebooks)
    for path in notebooks + records:
        assert not re.search(r'/(tmp|root|home|work|Users)/|it/s\]|\d%\||"stderr"', path.read_text()), path


def test_notebooks_show_the_source_of_now():
    """What a cell prints by `inspect.getsource` is in a module, but for a last line of its own."""
    known, cells = {line.strip() for source in SOURCES.values() for line in source.split("\n")} | {""}, 0
    for path in ROOT.glob("notebooks/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if "getsource(" in "".join(cell["source"]) and cell["cell_type"] == "code":
                shown = "".join("".join(output.get("text", "")) for output in cell["outputs"]).strip().split("\n")
                assert {line.strip() for line in shown[:-1]} <= known, path
                cells += 1
    assert cells > 5


def test_every_promise_names_a_test():
    promises = re.findall(r"^- (?:.+\n)(?:  .+\n)*", TRAINING.partition("## Ten promises")[2], re.MULTILINE)
    assert len(promises) == 10 and all(re.search(r"`test_\w+\.py`", promise) for promise in promises)


def test_troubleshooting_quotes_what_the_program_prints():
    table = TRAINING.partition("## Troubleshooting")[2].partition("## ")[0]
    quoted = re.findall(r"`(.*?)`", "\n".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)))
    printed = []  # with … for each value that an f-string takes in
    for node in ast.walk(ast.parse("\n".join(SOURCES.values()))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        printed.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    assert len(quoted) > 20
    assert not [beginning for beginning in quoted if not any(text.startswith(beginning) for text in printed)]


DESCRIBED = [path for path, source in SOURCES.items() if COMMAND.search(source)]
ADVISED = re.findall(r"\w+\.py (?:\w+ )?(?:DATA|RUN)\b[^\"\n]*", "".join(SOURCES.values()))  # in messages
TINY = [*CONV4, "--batch_size=4", "--queue=8", "--epochs=1", "--max_steps=1", "--workers=1", "--device=cpu"]
QUICK = [*TINY, "--clips=1", "--retrieved=2", "--rounds=1", "--count=2", "--neighbours=2", "--train=20", "--test=10"]


@pytest.fixture
def works(run, monkeypatch):
    """Checks that a command ends well in this process, alone in the place of torchrun's, with those of the flags QUICK
    that it knows; gives what it prints. Names in capitals, and all data sets, stand for a tiny one."""
    shutil.copytree(run.videos, run.path / "datasets" / "synthetic")
    k400 = shutil.copytree(run.videos, run.path / "k400")  # whose class folders need no lists
    (k400 / "test").rename(k400 / "val")
    names = dict.fromkeys(["/videos", "YOUR_VIDEOS", "LABELLED_VIDEOS", "DATA"], str(run.videos))
    names |= {f"{above}{name}": "k400" for name in ("ucf101", "hmdb51", "k400") for above in ("", "/data/")}
    names |= {"OUT": "out", "/data/k400_256": "out", "ROOT": "made", "docs/method.png": "method.png"}
    names["clip.mp4"] = str(next(run.videos.glob("test/*/*.mp4")))
    monkeypatch.setattr("mcl.tvl1_flow", difference_flow)  # which needs scikit-image

    def call(command, *more):
        _, script, *words = (names.get(word, word) for word in shlex.split(command) if "--nproc_per_node" not in word)
        module, here = importlib.import_module(Path(script).stem), dict(dataset=None, small=False)
        known = run(module, *filter(str.isalpha, words[:1]), "--help-all", **here)[1]
        quick = [flag for flag in QUICK if f"\n  {flag.partition('=')[0]} " in known]
        return run.ok(module, *words, *quick, *more, **here)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: path.stem)
def test_the_commands_that_a_script_names_work(path, works):
    commands = COMMAND.findall(SOURCES[path])
    for name in ("moco", "fima"):
        if f"runs/{name}" in str(commands) and f"--out runs/{name}" not in str(commands):  # which they take for granted
            works(f"python {name}.py --out runs/{name}")
    assert COMMAND.search(importlib.import_module(path.stem).__doc__)  # its help
    for number, command in enumerate(commands):
        works(command, *[f"--out=runs/{number}"] * bool(re.search("evaluate.py (linear|finetune)", command)))


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["fima.py --dataset=folder --data=flat", "mcl.py"])
def test_the_next_steps_that_a_run_prints_work(begun, works, run):
    """From any folder; of one's own videos too, of which nobody knows the classes."""
    for folder in run.videos.glob("test/*"):
        shutil.copytree(folder, run.path / "flat", dirs_exist_ok=True)
    out = works(f"python {begun} --out='runs/a run'")
    steps = COMMAND.findall(out.partition("\nnext:\n")[2])
    scripts = [Path(shlex.split(step)[1]) for step in steps]
    assert [script.stem for script in scripts] == ["evaluate", "evaluate", "visualize", begun.partition(".")[0]]
    assert all(script.is_file() for script in scripts[:3])
    for step in steps[3 if begun == "mcl.py" else 0 :]:  # the others are the same
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


@pytest.mark.parametrize("program", sorted({*PROGRAMS} - OWN_PARSER))
def test_help_fits_on_a_page_and_says_how_to_see_the_rest(program, in_process, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    script, *words = program.split()
    module = importlib.import_module(Path(script).stem)
    short, whole = (in_process(module, *words, flag, main=main_of(module))[1] for flag in ("--help", "--help-all"))
    few, every = (set(re.findall(r"(?m)^  (--\w+)", text)) for text in (short, whole))
    lines = short.splitlines()
    between = {"data": "ROOT ", "shrink": "ROOT OUT ", "visualize": "[RUN …] "}.get(module.__name__, "")
    assert lines[0] == f"usage: {' '.join([module.__name__ + '.py', *words])} {between}[--flag value …]"
    assert len(lines) <= 60 and max(map(len, lines)) <= 120 and lines[0].count("--") == 1
    assert few <= every and "--print_config" in few
    assert (f"--help-all lists {len(every - few)} more flags" in lines[-1]) == (few != every)
    groups = {"data:", "model and clips:", "optimisation:", "run:", "FIMA:"} if module is fima else {"options:"}
    assert groups <= {*lines} & {*whole.splitlines()}


def test_print_config_shows_every_option_and_what_differs_and_ends(in_process):
    flags = ["--dataset", "k400", "--queue", "8", "--list-file", "my list"]
    code, out, _ = in_process(fima, *flags, "--print-config", main=main_of(fima))
    shown = {*re.sub(" +", " ", out).splitlines()}
    assert {"--queue 8 # default: 2048", "--pixel_queue 31360 # default: 0", "--crop 224"} < shown
    again = cli.parse(fima.FIMAConfig, "", argv=shlex.split(out, comments=True))
    assert again == cli.parse(fima.FIMAConfig, "", fima.PRESETS, flags)
    assert code == 0 and re.findall(r"(?m)^--(\w+)", out) == [*vars(again)]


def test_help_shows_the_defaults_of_the_data_set_beside_it(in_process):
    for flags, dataset in (([], "synthetic"), (["--dataset", "k400"], "k400"), (["--dataset=hmdb51"], "hmdb51")):
        described = " ".join(in_process(fima, "--help-all", *flags, main=main_of(fima))[1].split())
        config = cli.parse(fima.FIMAConfig, "", fima.PRESETS, flags)
        for name in ("epochs", "batch_size", "crop", "queue"):
            text = described.partition(f"--{name} INT")[2].partition("(default: ")[2]
            assert text.startswith(f"{getattr(config, name)}; "), (dataset, name)


FILES = {path.stem: path for path in SOURCES if path.parent == ROOT}
PARTS = {  # which can be copied alone, but data with video
    "video": {"av", "numpy"},
    "synthetic": {"av", "numpy", "tqdm"},
    "losses": {"torch"},
    "models": {"torch", "torchvision"},
    "augment": {"torch"},
    "train": {"torch", "tqdm"},
    "data": {"torch", "numpy", "tqdm", "video"},
}
METHODS = {"moco", "fima", "fame", "dclr", "mcl"}
IMPORTS = {  # at the top of a file: the top-level names of modules, without the standard library
    name: {*re.findall(r"^(?:import|from) (\w+)", SOURCES[path], re.MULTILINE)} - sys.stdlib_module_names
    for name, path in FILES.items()
}


def test_imports_run_one_way():
    """pretrain's look at what was learnt, in the first run, imports evaluate where it is needed."""
    for name, libraries in PARTS.items():
        assert IMPORTS[name] <= libraries
    for name in METHODS:
        assert IMPORTS[name] & FILES.keys() <= {"moco", "pretrain", "cli", *PARTS} - {name}
    for name in ("pretrain", "cli", "runs", "find", *PARTS):
        assert not IMPORTS[name] & (METHODS | {"evaluate", "visualize"}), name
    assert not (IMPORTS["evaluate"] | IMPORTS["features"]) & METHODS
    graphlib.TopologicalSorter({name: found & FILES.keys() for name, found in IMPORTS.items()}).prepare()  # no cycle


TRAIN_ALONE = """
import torch
from pathlib import Path
from train import Process, Run, TrainConfig, fit

line = torch.nn.Linear(3, 1)
line.forward = lambda batch: {"square": (batch["x"] @ line.weight.T).square().mean()}
run = Run(line, TrainConfig(epochs=2, batch_size=4), Process(0, 1, torch.device("cpu")), steps_per_epoch=4)
saved = fit(run, lambda step: [{"x": torch.ones(4, 3)}] * (8 - step), Path("."))
assert torch.load(saved, weights_only=True)["step"] == 8
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_part_works_in_a_folder_of_its_own(name, tmp_path):
    for copied in {name} | (PARTS[name] & FILES.keys()):
        shutil.copy(FILES[copied], tmp_path)
    program = [sys.executable, "-E", "-c", f"import {name}\n" + TRAIN_ALONE * (name == "train")]  # without PYTHONPATH
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (name != "train" or "epoch 2/2  square" in done.stdout), done.stderr
