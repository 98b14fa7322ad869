"""What imports what, so that each part can be copied alone and imports run one way."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

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
COMMANDS = {"evaluate", "visualize"}


def imports(name: str) -> set[str]:
    """Top-level names of all modules a file imports at its top, without the standard library."""
    body = ast.parse(FILES[name].read_text(encoding="utf-8")).body
    found = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in body if isinstance(node, ast.ImportFrom)]
    return {module.partition(".")[0] for module in found} - sys.stdlib_module_names


def test_imports_run_one_way():
    """pretrain's look at what was learnt, in the first run, imports evaluate where it is needed."""
    for name, libraries in PARTS.items():
        assert imports(name) <= libraries
    for name in METHODS:
        assert imports(name) & FILES.keys() <= PARTS.keys() | SHARED | {"moco"} - {name}
    for name in ("pretrain", "cli", "runs", "find", *PARTS):
        assert not imports(name) & (METHODS | COMMANDS), name
    assert not (imports("evaluate") | imports("features")) & METHODS
    graphlib.TopologicalSorter({name: imports(name) & FILES.keys() for name in FILES}).prepare()  # there is no cycle


TRAIN_ALONE = """
import torch
from pathlib import Path
from train import Process, Run, TrainConfig, fit

class Line(torch.nn.Linear):
    def forward(self, batch):
        return {"square": super().forward(batch["x"]).square().mean()}

run = Run(Line(3, 1), TrainConfig(epochs=2, batch_size=4), Process(0, 1, torch.device("cpu")), steps_per_epoch=4)
saved = fit(run, lambda step: [{"x": torch.ones(4, 3)}] * (8 - step), Path("."))
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
    assert done.returncode == 0 and (name != "train" or "epoch 2/2  square" in done.stdout), done.stderr
