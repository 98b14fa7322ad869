"""Commands on README and results/README.md parse, files that are named exist, and so do the flags of ablations."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

import benchmark
import cli
import dclr
import evaluate
import fame
import fima
import find
import mcl
import moco
import synthetic
import visualize

README, RESULTS = ((Path(__file__).parents[1] / name).read_text() for name in ("README.md", "results/README.md"))
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def commands_of_results() -> list[str]:
    """Those of its bash blocks, without loops around them, and each table row's flags after the block above it."""
    found, base = [], ""
    for block, flags in re.findall(r"```bash\n(.*?)```|^\|[^`\n]*`(--[^`\n]*)`", RESULTS, re.DOTALL | re.MULTILINE):
        base = block.strip() or base
        lines = map(str.strip, block.splitlines() or [f"{base} {flags}"])
        found += [line for line in lines if line != "done" and not line.startswith("for ")]
    return found


CONFIGS = {
    "fima.py": (fima.FIMAConfig, fima.PRESETS),
    "moco.py": (moco.MoCoConfig, moco.PRESETS),
    "fame.py": (fame.FAMEConfig, fame.PRESETS),
    "dclr.py": (dclr.DCLRConfig, dclr.PRESETS),
    "mcl.py": (mcl.MCLConfig, mcl.PRESETS),
    "mcl.py maps": (mcl.MapsConfig, mcl.FLOW),
    **{f"evaluate.py {name}": (config, {}) for name, (_, config) in evaluate.PROTOCOLS.items()},
    **{f"visualize.py {name}": (config, {}) for name, (_, config) in visualize.FIGURES.items()},
    "benchmark.py": (benchmark.BenchmarkConfig, {}),
    "data.py check": (find.CheckConfig, {}),
    "data.py synthetic": (synthetic.command()[1], {}),
}


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + commands_of_results()))
def test_every_command_parses(command, monkeypatch):
    words = shlex.split(command.rpartition("&&")[2])
    if words[:3] == ["python", "-m", "pytest"]:
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    config, presets = CONFIGS.get(" ".join(words[script : script + 2])) or CONFIGS[words[script]]
    named = (*evaluate.PROTOCOLS, *benchmark.COMMANDS, "maps")
    arguments = [word for word in words[script + 1 :] if word not in named]
    if words[script] in ("data.py", "visualize.py"):
        arguments = list(itertools.dropwhile(lambda word: not word.startswith("-"), arguments))
    state = {"method": config.__name__.removesuffix("Config"), "config": {"dataset": "ucf101"}, "model": {}, "step": 1}
    monkeypatch.setattr(cli, "load_checkpoint", lambda path: state)
    cli.parse(config, "", presets, arguments)


def test_the_commands_are_there():
    assert "pip install -r requirements.txt && python fima.py" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert len(COMMANDS) > 10


def test_every_run_that_a_table_of_results_names_is_made_once():
    made = re.findall(r"--out runs/([\w.]+)", RESULTS)
    lists = [names.split(",") for names in re.findall(r"runs/\{(.*?)\}", RESULTS)]
    named = {name for names in lists for name in names} | set(re.findall(r"\| runs/([\w.]+) \|", RESULTS))
    assert len(made) == len(set(made)) > 20 and named <= set(made)
    assert len(commands_of_results()) > 30


def test_files_and_flags_that_are_named_exist():
    root = Path(__file__).parents[1]
    for name in set(re.findall(r"`((?!test_)\w+\.py)`|\]\((\w+\.png)\)", README)):
        assert (root / "".join(name)).is_file(), name
    for flag in set(re.findall(r"--(\w+)", README)) - {"nproc_per_node", "help", "minutes"}:
        known = [config.__dataclass_fields__ for config, _ in CONFIGS.values()]
        assert any(flag in options for options in known), flag


def test_every_promise_names_tests_that_exist():
    promises = re.findall(r"^- .*", README, re.MULTILINE)
    assert len(promises) == 10
    for promise in promises:
        named = re.findall(r"`(test_\w+\.py)`", promise)
        assert named and all((Path(__file__).parent / name).is_file() for name in named), promise
