"""Benchmarks: the floor is the step's passes, turns are fair, each command writes its JSON."""

import json

import benchmark
import pytest
import torch
from helpers import ALONE, views_without_colours
from torch._subclasses.fake_tensor import DataDependentOutputException

import dclr
import fame
import mcl
import moco
from train import UserError

TINY = dict(encoder="r3d_18", width=0.0625, crop=32, batch_size=2, queue=8, rounds=1, device="cpu")


def build(losses="vv,pix,fra", **flags):
    return benchmark.Training(benchmark.StepConfig(**TINY | flags), ALONE, losses=losses)


@pytest.mark.parametrize("terms, keys", [("vv", [4]), ("vv,vd", [4, 4]), ("vv,pix", [4, 4]), ("vv,pix,fra", [4, 4, 8])])
def test_the_floor_is_the_encoder_passes_of_the_step(terms, keys):
    """With B = 2 videos and T = 2 sub-clips: 2B clips of query, 2B of key RGB, 2B of differences, 2TB of sub-clips."""
    training = build(losses=terms)
    inputs, passes, backwards = training.encoder_inputs(), {"query": [], "key": []}, []
    for name, encoder in (("query", training.method.encoder), ("key", training.method.key_encoder)):
        encoder.register_forward_pre_hook(lambda _, clips, name=name: passes[name].append(clips[0]))
    training.method.encoder.register_full_backward_pre_hook(lambda *_: backwards.append(1))
    for take in (training.step, lambda: training.encoders_alone(*inputs)):
        passes["query"], passes["key"] = [], []
        take()
        assert {name: list(map(len, seen)) for name, seen in passes.items()} == {"query": [4], "key": keys}
    assert len(backwards) == 2  # of the step and of the floor
    reached = {name.partition(".")[0] for name, p in training.method.named_parameters() if p.grad is not None}
    assert reached == {"encoder"} and all(p.grad is not None for p in training.method.encoder.parameters())
    for clips in passes["query"] + passes["key"]:
        assert clips.is_contiguous(memory_format=torch.channels_last_3d) and not clips.is_contiguous()


def test_variants_take_turns_and_ratios_are_of_the_same_round():
    order, took, now = [], {"a": iter([99, 98, 1, 2, 10]), "b": iter([99, 98, 2, 6, 10])}, [5]

    def work(name):
        order.append(name)
        now[0] += next(took[name])

    works = {name: lambda name=name: work(name) for name in "ab"}
    seconds = benchmark.take_turns(works, lambda: now[0], 3, ALONE)
    assert "".join(order) == "ab" * 5
    assert seconds == {"a": [1, 2, 10], "b": [2, 6, 10]}  # without the warm-up
    row = benchmark.compare("", seconds, "a")["b"]
    assert row == {"median_ms": 6000, "ratio": 2, "rounds_ms": [2000, 6000, 10000]}


METHODS = {
    "fima": lambda flags: benchmark.fima.FIMA(benchmark.fima.FIMAConfig(**flags)),
    "moco": lambda flags: moco.MoCo(moco.MoCoConfig(**flags)),
    "fame": lambda flags: fame.FAME(fame.FAMEConfig(**flags)),
    "dclr": lambda flags: dclr.DCLR(dclr.DCLRConfig(**flags)),
    "mcl": lambda flags: mcl.MCL(mcl.MCLConfig(**flags)),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_no_value_and_has_no_shape_that_depends_on_one(name, bf16):
    method = METHODS[name]({k: v for k, v in TINY.items() if k != "rounds"}).train()
    views = views_without_colours(sub_clips=method.sub_clips) | {"motion": torch.rand(3, 2, 16, 32, 32), "epoch": 1.5}
    counter = benchmark.counted_step(method, views, "h100", bf16)
    assert counter.parts.keys() >= {"colours", "query pass", "key passes", "losses", "backward", "optimizer"}
    assert all(row["GB"] > 0 and row["ms"] > 0 for row in counter.parts.values()) and 0 < counter.peak < 1e9


def test_waiting_for_a_value_is_found():
    method = METHODS["moco"]({k: v for k, v in TINY.items() if k != "rounds"})
    method.project = lambda head, features: head(features)[: int(features.sum()) % 1 + 2]
    with pytest.raises(DataDependentOutputException):
        benchmark.counted_step(method, views_without_colours(sub_clips=0), "h100", False)


def test_bytes_flop_and_memory_are_counted():
    counter, a, b = benchmark.Counter(1e9, 1e12), torch.zeros(100, 50), torch.zeros(50, 10)
    with counter:
        c = counter.counts_as("product")(torch.mm)(a, b.expand(50, 10))
        d = c.T + 1
        del d
        e = c * 2  # takes the place of d
    sizes = [4 * x.numel() for x in (a, b, c)]
    assert counter.parts["product"] == pytest.approx(
        {"GB": sum(sizes) / 1e9, "TFLOP": 2 * 100 * 50 * 10 / 1e12, "operators": 1, "ms": sum(sizes) / 1e6}
    )
    assert counter.parts["losses"]["operators"] == 2
    assert counter.peak == sum(sizes) + 4 * e.numel()


@pytest.mark.slow
@pytest.mark.parametrize("command", [benchmark.reading, benchmark.step, benchmark.count])
def test_a_command_writes_its_json(command, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(benchmark, "SAMPLES", 2)
    command(benchmark.StepConfig(**TINY, data=str(videos), out=str(tmp_path)))
    (path,) = tmp_path.glob("benchmark_*_cpu.json")
    record = json.loads(path.read_text())
    assert record.keys() >= {"command", "config", "machine", "git_commit", "versions", "written"}
    if command == benchmark.reading:
        assert len(record["one_core"]) == 3
    elif command == benchmark.step:
        assert [*record["floor"]] == ["step", "encoders alone", "augmentation"]
        assert [*record["losses"]] == ["vv,vd", "vv,pix"]
        assert [*record["settings"]] == ["step", "contiguous"]
    else:
        assert record["parts"]["all"]["TFLOP"] > 0


def test_decoding_alone_decodes_the_frames_and_makes_no_pixels(videos, monkeypatch):
    path, decoded = str(next(videos.glob("train/*/*.mp4"))), []
    monkeypatch.setattr(benchmark.PicturesDropped, "_pixels", lambda video, image: decoded.append(image))
    with benchmark.PicturesDropped(path) as video:
        assert video.read([3, 4, 30]) == [None] * 3
    assert len(decoded) == 3


def test_a_mistake_is_one_line():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        benchmark.reading(benchmark.StepConfig(dataset="folder", data="nowhere"))
    with pytest.raises(UserError, match="--crop 16"):
        benchmark.step(benchmark.StepConfig(**TINY | {"crop": 16}))
