"""What is the same for every method: settings of its paper, resuming to the last bit, processes."""

import math

import numpy as np
import pytest
import simclr
import torch
import tubelet_contrast
from conftest import options_of
from helpers import CONV4, FORK, ROOT, SMALL, lines, same, torchrun, weights

import dclr
import fame
import fima
import mcl
from cli import parse

OF_FIMA = dict(encoder="i3d", crop=224, momentum=0.999, losses="vv,pix,fra", threshold=0.7, foreground=0.5)
OF_FAME = dict(encoder="i3d", crop=224, epochs=200, momentum=0.999, foreground=0.5, branches="single", mask="fame")
OF_FAME |= dict(background="inter", jitter_p=0.8, gray_p=0.2, blur_p=0.5, min_scale=0.2)
OF_DCLR = dict(encoder="r2plus1d_18", crop=112, losses="vs,vd,sd,ac", ac_weight=0.5, search="motion", retrieved=5)
OF_DCLR |= dict(retrieved_weights="prior", decouple="both", same_view="off", gray_p=0.0, weight_decay=1e-4)
OF_MCL = dict(encoder="s3d", crop=224, losses="vv,t,s,st", alignment="v3", bn="shuffle", momentum=0.999)
OF_MCL |= dict(temporal_sampling="motion", spatial_sampling="motion")
PAPERS = [
    (fima, "ucf101", 24, 0.00375, OF_FIMA | dict(epochs=200, queue=2048, pixel_queue=0)),
    (fima, "k400", 64, 0.01, OF_FIMA | dict(epochs=100, queue=65536, pixel_queue=31360)),
    (fame, "ucf101", 64, 0.01, OF_FAME | dict(queue=2048)),
    (fame, "k400", 64, 0.01, OF_FAME | dict(queue=65536)),
    (dclr, "ucf101", 64, 0.01, OF_DCLR | dict(epochs=200, queue=2048, refresh=10)),
    (dclr, "k400", 64, 0.01, OF_DCLR | dict(epochs=100, queue=16384, refresh=5)),
    (mcl, "ucf101", 64, 0.01, OF_MCL | dict(epochs=200, queue=8192)),
    (mcl, "k400", 64, 0.01, OF_MCL | dict(epochs=400, queue=131072)),
]


@pytest.mark.parametrize(("script", "dataset", "total", "rate", "expected"), PAPERS, ids=str)
def test_presets_are_the_papers(script, dataset, total, rate, expected):
    config = parse(options_of(script)[1], "", script.PRESETS, ["--dataset", dataset])
    expected = expected | dict(frames=16, frame_stride=2, temperature=0.1)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.lr * total / 256 == pytest.approx(rate)


HALVES = ["--batch_size", 2, "--accumulate", 2]  # not --batch_size 4
RESUMED = {
    fima: ["--fame", "single", "--pixel_queue", 64, "--queue", 99, "--seed", 2**31 - 1, *HALVES],
    fame: ["--branches", "both"],
    dclr: ["--refresh", 1, "--delay", 1, "--queue", 16, *HALVES],
    mcl: ["--maps", "maps", *HALVES, "--activation_checkpointing"],
    simclr: ["--warmup", 1, *HALVES],
    tubelet_contrast: HALVES,
}


@pytest.mark.slow
@pytest.mark.parametrize("script", RESUMED, ids=lambda script: script.__name__)
def test_a_resumed_run_equals_a_whole_one_bit_for_bit(script, run, monkeypatch):
    """Across an epoch of 4 steps, with DCLR's refresh and delay, and the end of the warm-up."""
    monkeypatch.setattr(mcl.MotionMaps, "compute", lambda maps, path: np.ones((40, 6, 6), np.float32))
    monkeypatch.setattr(torch.multiprocessing, "Process", FORK.Process)  # which inherit what is patched
    own = SMALL if script is not simclr else [flag for flag in SMALL if "queue" not in flag]
    flags = [*own, *CONV4, "--epochs", 2, "--keep_every", 1, *RESUMED[script], "--max_steps"]
    folder = dict(dataset="folder", small=False)
    out = run.ok(script, *flags, 6, "--out", "whole", **folder)
    for line in lines(run.path / "whole"):
        assert line["loss"] == pytest.approx(sum(line[name] for name in line if name.startswith("loss/")))
    if script is fima:
        assert line["chance/vv"] == pytest.approx(math.log(100)) and line["chance/pix"] > 0
        assert "--queue 99 exceeds" in out
    assert f"python {script.__name__}.py" in run.ok(script, *flags, 3, "--out", "half", **folder)
    run.ok(script, "--resume", "half/checkpoint.pt", "--max_steps", 6, "--workers", 2, **folder)
    whole, half = (weights(run.path / name / "checkpoint.pt") for name in ("whole", "half"))
    assert whole["method"] == options_of(script)[0].__name__ and whole["step"] == half["step"] == 6
    assert same(whole["model"], half["model"]) and same(whole["optimizer"], half["optimizer"])
    assert weights(run.path / "whole" / "epoch_0001.pt")["step"] == 4
    if script is dclr:
        assert int(whole["model"]["queues.d.keys"].any(1).sum()) == 8  # of the two steps since the refresh at step 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dclr.py", "examples/simclr.py"])
def test_two_processes_train_and_agree(script, videos, tmp_path):
    flags = ["--dataset=folder", f"--data={videos}", "--epochs=2", "--max_steps=3", "--device=cpu", "--out=run"]
    flags += ["--batch_size=2", "--accumulate=2", "--workers=1", "--activation_checkpointing"]
    done = torchrun(ROOT / script, *flags, *CONV4, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "run" / "checkpoint.pt")["step"] == 3  # which is saved if the processes agree
