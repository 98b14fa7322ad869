"""What imports what, so that each part can be copied alone and imports run one way; and where each equation is."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
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
SHARED = {"pretrain", "cli"}  # by all methods: options, views, main; how a script starts and ends


def imports(name: str) -> set[str]:
    """Top-level names of all modules a file imports at its top, without the standard library."""
    found = set()
    for node in ast.parse(FILES[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py imports relatively, which fails for a file copied alone"
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("name", PARTS)
def test_a_part_imports_its_libraries_only(name):
    assert imports(name) <= PARTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_part_can_be_copied_alone(name, tmp_path):
    for copied in {name} | (PARTS[name] & FILES.keys()):
        shutil.copy(FILES[copied], tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, env=environment, check=True, timeout=60)


@pytest.mark.parametrize("name", sorted(METHODS & FILES.keys()))
def test_a_method_imports_parts_and_moco_only(name):
    siblings = imports(name) & FILES.keys()
    assert siblings <= PARTS.keys() | SHARED | ({"moco"} if name != "moco" else set())


def test_what_methods_share_knows_no_method_and_methods_know_no_command():
    """pretrain's look at what was learnt, in the first run, imports evaluate where it is needed."""
    for name in {"pretrain", "cli", "runs", "processes", "find", *PARTS}:
        assert not imports(name) & (METHODS | {"evaluate", "visualize", "benchmark"}), name


TRAIN_ALONE = """
import torch
from pathlib import Path
from train import Process, TrainConfig, fit

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def forward(self, batch):
        return {"square": self.layer(batch["x"]).square().mean()}

config = TrainConfig(epochs=2, batch_size=4)
process = Process(0, 1, torch.device("cpu"))
saved = fit(Line(), config, process, lambda step: [{"x": torch.ones(4, 3)}] * (8 - step), 4, Path("."))
assert torch.load(saved, weights_only=True)["step"] == 8
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_part_works_in_a_folder_of_its_own(name, tmp_path):
    for copied in {name} | (PARTS[name] & FILES.keys()):
        shutil.copy(FILES[copied], tmp_path)
    program = [sys.executable, "-c", f"import {name}\n" + TRAIN_ALONE * (name == "train")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert name != "train" or "epoch 2/2  square" in done.stdout


def test_imports_have_no_cycle():
    graphlib.TopologicalSorter({name: imports(name) & FILES.keys() for name in FILES}).prepare()


def public_functions(name: str) -> list[ast.FunctionDef]:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("function", public_functions("losses"), ids=lambda node: node.name)
def test_every_loss_names_its_place_in_the_paper(function):
    assert any(place in (ast.get_docstring(function) or "") for place in ("Eq.", "Sec.", "Table"))


@pytest.mark.parametrize("name", ["evaluate", "features"])
def test_evaluation_imports_no_method(name):
    assert not imports(name) & METHODS
