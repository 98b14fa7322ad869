"""What a run goes on with: its options, its data, and files that somebody may have changed."""

import dataclasses
import json
import math
import shutil
import sys

import conftest
import numpy as np
import pytest
import torch
from test_train import same, weights

import data
import dclr
import evaluate
import fame
import fima
import mcl
import moco
import train
import visualize

ALONE = train.Process(0, 1, torch.device("cpu"))
CONFIGS = {
    moco.MoCoConfig: moco.PRESETS,
    fima.FIMAConfig: fima.PRESETS,
    fame.FAMEConfig: fame.PRESETS,
    dclr.DCLRConfig: dclr.PRESETS,
    mcl.MCLConfig: mcl.PRESETS,
    evaluate.LinearConfig: {},
    evaluate.FinetuneConfig: {},
}


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """A method of one linear layer, which is all that the loop and its options need."""

    metrics = {"chance/x": 0.0}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, batch):
        return {"x": (self.layer(batch["x"]) - 1).square().mean()}


def fit_tiny(config):
    def batches(start):
        while True:
            yield {"x": torch.randn(config.batch_size, 3, generator=torch.Generator().manual_seed(start))}
            start += 1

    path = train.fit(Tiny(), config, ALONE, batches, 8 // config.batch_size, "", seen={})
    return weights(path)["model"]


def another(field, value):
    """Another value that the command line takes for an option, None if there is none."""
    if field.metadata["choices"]:
        return next((choice for choice in field.metadata["choices"] if choice not in (value, "")), None)
    if field.type is str:
        return f"{value}x"
    least, most = field.metadata["range"]
    return value + 1 if value + 1 <= most else (max(least, 0) + value) / 2


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)
def test_each_option_makes_a_resumed_run_another_or_is_refused_or_is_one_that_defines_nothing(config_class, tmp_path):
    presets = CONFIGS[config_class]
    options = presets.get("synthetic", {}) | dict(epochs=5, batch_size=4, out=str(tmp_path), lr=0.3)
    config = config_class(**options, max_steps=5)  # of 10
    fit_tiny(config)
    path = str(tmp_path / "checkpoint.pt")

    def resumed(*flags):
        return train.parse(config_class, "", presets, ["--resume", path, "--out", str(tmp_path / "resumed"), *flags])

    undisturbed = fit_tiny(resumed())
    for field in dataclasses.fields(config_class):
        value = another(field, getattr(config, field.name))
        if value is None or field.name == "resume":
            continue
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
        if field.name not in config_class.FREE | config_class.TUNED:
            with pytest.raises(train.UserError, match=rf"with --{field.name} .*, not {value}: start anew") as error:
                resumed(f"--{field.name}={value}")
            assert "\n" not in str(error.value)
        elif field.name in train.TrainConfig.TUNED:
            ended = fit_tiny(resumed(f"--{field.name}={value}"))
            assert not same(ended, undisturbed), field.name
        else:
            try:
                assert getattr(resumed(f"--{field.name}={value}"), field.name) == value
            except train.UserError as error:  # as lists that go in pairs
                assert f"--{field.name}" in str(error)


def test_a_resumed_run_reads_each_option_that_may_be_changed(run, videos, monkeypatch):
    """Those of the loop that make it another run are seen in the weights above, the others here where they are used."""
    used, read = set(), object.__getattribute__

    def spy(config, name):
        code = sys._getframe(1).f_code
        if not code.co_filename.endswith("dataclasses.py") and code.co_name not in ("__post_init__", "__str__"):
            used.add(name)
        return read(config, name)

    shutil.copytree(videos, run.path / "fewer")
    next((run.path / "fewer" / "train").glob("*/*.mp4")).unlink()
    begin = ["--epochs", 3, "--max_steps", 1, "--out"]
    pretrain, probe = [*conftest.CONV4, *begin], ["--clips", 1, "--batch_size", 6, "--device", "cpu", *begin]
    monkeypatch.setattr(evaluate, "first_look", lambda *_: None)
    assert run(fima, *pretrain, "fima")[0] == 0
    monkeypatch.setattr(mcl.MotionMaps, "compute", lambda maps, path: np.ones((40, 6, 6), np.float32))  # in no time
    monkeypatch.setattr(mcl.MotionMaps, "make", lambda maps, paths, _: [maps.visit(path) for path in paths])
    assert run(mcl, *pretrain, "mcl")[0] == 0
    checkpoint = ["--checkpoint", "fima/checkpoint.pt"]
    assert run(evaluate, "linear", *checkpoint, *probe, "linear")[0] == 0
    assert run(evaluate, "finetune", *checkpoint, *probe, "finetune")[0] == 0
    monkeypatch.setattr(train.Options, "__getattribute__", spy)
    for name, script, words in (
        ("fima", fima, []),
        ("mcl", mcl, []),
        *((n, evaluate, [n]) for n in ("linear", "finetune")),
    ):
        flags = ["--resume", f"{name}/checkpoint.pt", "--data", "fewer", "--changed_data", "--max_steps", 3]
        code, out, err = run(script, *words, *flags, small=False, dataset=None)
        assert code == 0 and "goes on with other data" in out, err
    for config_class in CONFIGS:
        assert config_class.FREE | config_class.TUNED <= used | train.TrainConfig.TUNED
