"""Benchmarks: plain is the same step, the floor is the step's passes, turns are fair, each command writes its JSON."""

import copy
import json

import pytest
import torch
from helpers import ALONE

import benchmark
from train import UserError

TINY = dict(encoder="r3d_18", width=0.0625, crop=32, batch_size=2, queue=8, rounds=1, device="cpu")


def build(losses="vv,pix,fra", **flags):
    return benchmark.Training(benchmark.BenchmarkConfig(**TINY | flags), ALONE, losses=losses)


@pytest.mark.parametrize("frames", [8, 24])
def test_the_plain_step_gives_the_same_losses_keys_and_gradients(frames):
    training = build(crop=48, frames=frames)
    method = training.method.eval()  # batch norm and dropout rest, …
    method.training = True  # … but the key encoder follows and the queues are written
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.mul_(1.1)
    plain = copy.deepcopy(method)
    expected, found = method(training.views), benchmark.plain_losses(plain, training.views)
    assert list(found) == list(expected) == ["vv", "pix", "fra"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.state_dict(), method.state_dict(), rtol=1e-4, atol=1e-5)
    for losses in (expected, found):
        sum(losses.values()).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), method.named_parameters(), strict=True):
        if q.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, name


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
    order, clock = [], {"a": iter([99, 98, 1, 2, 10]), "b": iter([99, 98, 2, 6, 10])}
    variants = {name: lambda name=name: (order.append(name), next(clock[name]))[1] for name in "ab"}
    seconds = benchmark.take_turns(variants, 3, ALONE)
    assert "".join(order) == "ab" * 5
    assert seconds == {"a": [1, 2, 10], "b": [2, 6, 10]}  # without the warm-up
    row = benchmark.compare("", seconds, "a")["b"]
    assert row == {"median_ms": 6000, "ratio": 2, "rounds_ms": [2000, 6000, 10000]}


@pytest.mark.slow
@pytest.mark.parametrize("command", [benchmark.reading, benchmark.step])
def test_a_command_writes_its_json(command, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    command(benchmark.BenchmarkConfig(**TINY, data=str(videos), samples=2, workers=3, out=str(tmp_path)))
    (path,) = tmp_path.glob("benchmark_*_cpu.json")
    record = json.loads(path.read_text())
    assert record.keys() >= {"command", "config", "machine", "git_commit", "versions", "written"}
    if command == benchmark.reading:
        assert len(record["one_core"]) == 3 and list(record["loader"]) == ["workers 0", "workers 1", "workers 2"]
    else:
        assert [*record["floor"]] == ["step", "encoders alone"] and [*record["losses"]] == ["vv,vd", "vv,pix"]
        assert [*record["settings"]] == ["step", "contiguous", "plain"]


def test_decoding_alone_decodes_the_frames_and_makes_no_pixels(videos, monkeypatch):
    path, decoded = str(next(videos.glob("train/*/*.mp4"))), []
    monkeypatch.setattr(benchmark.PicturesDropped, "_pixels", lambda video, image: decoded.append(image))
    with benchmark.PicturesDropped(path) as video:
        assert video.read([3, 4, 30]) == [None] * 3
    assert len(decoded) == 3


def test_a_mistake_is_one_line():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        benchmark.reading(benchmark.BenchmarkConfig(**TINY, data="nowhere"))
