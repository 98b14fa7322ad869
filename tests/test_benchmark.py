"""Benchmarks: the floor is the step's passes, turns are fair, each command writes its JSON."""

import importlib
import json

import benchmark
import pytest
import torch
from conftest import options_of
from helpers import ALONE, views_without_colours
from torch._subclasses.fake_tensor import DataDependentOutputException

from models import recorded_inputs

TINY = dict(encoder="r3d_18", width=0.0625, crop=32, batch_size=2, queue=8, device="cpu")


@pytest.mark.parametrize("terms, keys", [("vv", [4]), ("vv,vd", [4, 4]), ("vv,pix", [4, 4]), ("vv,pix,fra", [4, 4, 8])])
def test_the_floor_is_the_encoder_passes_of_the_step(terms, keys):
    """With B = 2 videos and T = 2 sub-clips: 2B clips of query, 2B of key RGB, 2B of differences, 2TB of sub-clips."""
    training, backwards = benchmark.Training(benchmark.StepConfig(**TINY), ALONE, losses=terms), []
    method, inputs = training.method, training.encoder_inputs()
    method.encoder.register_full_backward_pre_hook(lambda *_: backwards.append(1))
    for take in (training.step, lambda: training.encoders_alone(*inputs)):
        with recorded_inputs([method.encoder]) as query, recorded_inputs([method.key_encoder]) as key:
            take()
        assert ([len(clips) for clips in query], [len(clips) for clips in key]) == ([4], keys)
    assert len(backwards) == 2  # of the step and of the floor
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == name.startswith("encoder."), name
    for clips in query + key:
        assert clips.is_contiguous(memory_format=torch.channels_last_3d) and not clips.is_contiguous()


def test_variants_take_turns_and_ratios_are_of_the_same_round():
    order, took = [], [99, 99, 98, 98, 1, 2, 2, 6, 10, 10]  # seconds of a, b, a, b, …: two rounds are to warm up
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    clock = iter([time for seconds in took for time in (5, 5 + seconds)])
    seconds = benchmark.take_turns(works, clock.__next__, 3, ALONE)
    assert "".join(order) == "ab" * 5 and seconds == {"a": [1, 2, 10], "b": [2, 6, 10]}
    assert benchmark.compare("", seconds, "a")["b"] == {"median_ms": 6000, "ratio": 2, "rounds_ms": [2000, 6000, 10000]}


def method_of(name):
    method, config, *_ = options_of(importlib.import_module(name))
    return method(config(**TINY)).train()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["moco", "fima", "fame", "dclr", "mcl"])
def test_a_step_waits_for_no_value_and_has_no_shape_that_depends_on_one(name, bf16):
    method = method_of(name)
    views = views_without_colours(sub_clips=method.sub_clips) | {"motion": torch.rand(3, 2, 16, 32, 32), "epoch": 1.5}
    counter = benchmark.counted_step(method, views, "h100", bf16)
    assert counter.parts.keys() >= {"colours", "query pass", "key passes", "losses", "backward", "optimizer"}
    assert all(row["GB"] > 0 and row["ms"] > 0 for row in counter.parts.values()) and 0 < counter.peak < 1e9


def test_waiting_for_a_value_is_found():
    method = method_of("moco")
    method.project = lambda head, features: head(features)[: int(features.sum()) % 1 + 2]
    with pytest.raises(DataDependentOutputException):
        benchmark.counted_step(method, views_without_colours(sub_clips=0), "h100", False)


def test_bytes_flop_and_memory_are_counted():
    counter, a, b = benchmark.Counter(1e9, 1e12), torch.zeros(100, 50), torch.zeros(50, 1)
    with counter:
        c = counter.counts_as("product")(torch.mm)(a, b.expand(50, 10))
        d = c.T + 1
        del d
        c * 2  # takes the place of d, and is gone
    size = a.nbytes + b.nbytes + c.nbytes
    expected = {"GB": size / 1e9, "TFLOP": 2 * 100 * 50 * 10 / 1e12, "operators": 1, "ms": size / 1e6}
    assert counter.parts["product"] == pytest.approx(expected)
    assert counter.parts["losses"]["operators"] == 2 and counter.peak == size + c.nbytes


TABLES = {benchmark.reading: ["one_core"], benchmark.step: ["floor", "losses", "settings"], benchmark.count: ["parts"]}


@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES)
def test_a_command_writes_its_json(command, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(benchmark, "SAMPLES", 2)
    command(benchmark.StepConfig(**TINY, rounds=1, data=str(videos), out=str(tmp_path)))
    (path,) = tmp_path.glob("benchmark_*_cpu.json")
    record = json.loads(path.read_text())
    assert record.keys() >= {"command", "config", "machine", "git_commit", "versions", "written"}
    assert all(len(record[name]) > 1 for name in TABLES[command])


def test_decoding_alone_makes_no_pixels(videos):
    with benchmark.PicturesDropped(next(videos.glob("train/*/*.mp4"))) as video:
        assert video.read([3, 4, 30]) == [None] * 3
