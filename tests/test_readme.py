"""Every command in README parses, every file it names exists, and every flag of the ablation tables is there."""

import re
import shlex
from pathlib import Path

import pytest

import benchmark
import evaluate
import fima
import moco
import train
import visualize

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
CONFIGS = {
    "fima.py": (fima.FIMAConfig, fima.PRESETS),
    "moco.py": (moco.MoCoConfig, moco.PRESETS),
    **{f"evaluate.py {name}": (config, {}) for name, (_, config) in evaluate.PROTOCOLS.items()},
    "visualize.py": (visualize.FigureConfig, {}),
    "benchmark.py": (benchmark.BenchmarkConfig, {}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    words = shlex.split(command.rpartition("&&")[2])
    if words[:3] == ["python", "-m", "pytest"]:
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    config, presets = CONFIGS.get(" ".join(words[script : script + 2])) or CONFIGS[words[script]]
    named = (*evaluate.PROTOCOLS, *visualize.FIGURES, *benchmark.COMMANDS)
    arguments = [word for word in words[script + 1 :] if word not in named]
    state = {"method": config.__name__.removesuffix("Config"), "config": {"dataset": "ucf101"}, "model": {}, "step": 1}
    monkeypatch.setattr(train, "load_checkpoint", lambda path: state)
    train.parse(config, "", presets, arguments)


def test_the_commands_are_there():
    assert "pip install -r requirements.txt && python fima.py" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert len(COMMANDS) > 10


def test_files_and_flags_that_are_named_exist():
    root = Path(__file__).parents[1]
    for name in set(re.findall(r"`(\w+\.py)`|\]\((\w+\.png)\)", README)):
        assert (root / "".join(name)).is_file(), name
    for flag in set(re.findall(r"--(\w+)", README)) - {"nproc_per_node", "help"}:
        assert any(flag in config.__dataclass_fields__ for config, _ in CONFIGS.values()), flag
