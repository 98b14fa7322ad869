"""Benchmarks: plain is the same step, the floor is the step's passes, turns are fair, each command writes its JSON."""

import copy
import json
import sys

import pytest
import torch
from helpers import ALONE, one_line

import benchmark
import cli

TINY = dict(encoder="r3d_18", width=0.0625, crop=32, batch_size=2, queue=8, rounds=1, device="cpu")


def build(**flags):
    return benchmark.Training(benchmark.BenchmarkConfig(**TINY | flags), ALONE)


@pytest.mark.parametrize(
    ("terms", "frames"), [("vv,vd,pix,fra", 8), ("vv,vd,pix,fra", 24), ("vv", 16), ("pix,fra", 16)]
)
def test_the_plain_step_gives_the_same_losses_keys_and_gradients(terms, frames):
    training = build(crop=48, losses=terms, frames=frames)
    method = training.method.eval()  # batch norm and dropout rest, …
    method.training = True  # … but the key encoder follows and the queues are written
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.mul_(1.1)
    plain = copy.deepcopy(method)
    expected, found = method(training.views), benchmark.plain_losses(plain, training.views)
    assert list(found) == list(method.config.terms)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.state_dict(), method.state_dict(), rtol=1e-4, atol=1e-5)
    for losses in (expected, found):
        sum(losses.values()).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), method.named_parameters(), strict=True):
        if q.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("terms", "key_clips"), [("vv", [4]), ("vv,vd", [4, 4]), ("vv,pix", [4, 4]), ("vv,pix,fra", [4, 4, 8])]
)
def test_the_floor_is_the_encoder_passes_of_the_step(terms, key_clips):
    """With B = 2 videos and T = 2 sub-clips: 2B clips of query, 2B of key RGB, 2B of differences, 2TB of sub-clips."""
    training = build(losses=terms)
    inputs, passes, backwards = training.encoder_inputs(), {"query": [], "key": []}, []
    for name, encoder in (("query", training.method.encoder), ("key", training.method.key_encoder)):
        encoder.register_forward_pre_hook(lambda _, clips, name=name: passes[name].append(clips[0]))
    training.method.encoder.register_full_backward_pre_hook(lambda *_: backwards.append(1))
    training.step()
    of_step = {name: [len(clips) for clips in seen] for name, seen in passes.items()}
    passes["query"], passes["key"] = [], []
    training.encoders_alone(*inputs)
    of_floor = {name: [len(clips) for clips in seen] for name, seen in passes.items()}
    assert of_floor == of_step == {"query": [4], "key": key_clips}
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


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command as its command line would; gives exit code, what it wrote, and what it said of errors."""

    def call(command, **flags):
        flags = TINY | {"out": tmp_path} | flags
        monkeypatch.setattr(sys, "argv", ["benchmark.py", command, *(f"--{k}={v}" for k, v in flags.items())])
        monkeypatch.chdir(tmp_path)
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as stop:
            cli.command_line(benchmark.main)
        torch.set_num_threads(threads)
        path = tmp_path / f"benchmark_{command}_cpu.json"
        return stop.value.code, json.loads(path.read_text()) if path.exists() else None, capsys.readouterr().err

    return call


@pytest.mark.slow
@pytest.mark.parametrize("command", ["data", "step"])
def test_a_command_writes_its_json(run, videos, command):
    code, record, err = run(command, data=videos, samples=2, workers=3)
    assert code == 0, err
    assert record.keys() >= {"command", "config", "machine", "git_commit", "versions", "written"}
    if command == "data":
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


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("data", dict(data="nowhere"), "nowhere: no such folder"),
        ("step", dict(losses="vv,pixel"), "--losses vv,pixel"),
        ("step", dict(crop=16), "--crop 16"),
        ("speed", {}, "data, step"),
    ],
)
def test_a_mistake_is_one_line(command, flags, says, run):
    code, record, err = run(command, **flags)
    assert code == 2 and record is None
    one_line(err, says)
