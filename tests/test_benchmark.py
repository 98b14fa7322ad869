"""Benchmarks: plain is the same step, the floor is the step's passes, turns are fair, each command writes its JSON."""

import copy
import json
import statistics
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
    rows = benchmark.compare("", seconds, "a")
    assert rows["b"]["ratio"] == 2 and rows["b"]["median_ms"] == 6000 and rows["b"]["min_ms"] == 2000
    assert rows["b"]["rounds_ms"] == [2000, 6000, 10000] and rows["a"]["per_s"] == 0.5


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


COMMON = {"command", "config", "machine", "git_commit", "versions", "written"}


@pytest.mark.slow
def test_data_writes_its_json(run, videos):
    code, record, err = run("data", data=videos, samples=2, workers="0,1")
    assert code == 0, err
    assert COMMON | {"one_core", "loader"} <= record.keys()
    assert len(record["one_core"]) == 4 and list(record["loader"]) == ["workers 0", "workers 1"]
    assert record["config"]["data"] == str(videos)


def test_decoding_alone_decodes_the_frames_and_makes_no_pixels(videos, monkeypatch):
    path, decoded = str(next(videos.glob("train/*/*.mp4"))), []
    monkeypatch.setattr(benchmark.PicturesDropped, "_pixels", lambda video, image: decoded.append(image))
    with benchmark.PicturesDropped(path) as video:
        assert video.read([3, 4, 30]) == [None] * 3
    assert len(decoded) == 3


@pytest.mark.slow
def test_step_writes_its_json(run):
    code, record, err = run("step")
    assert code == 0, err
    assert COMMON | {"variants", "floors", "pixel_loss_ratio"} <= record.keys()
    assert record["variants"].keys() == {"plain", "ours", "ours, contiguous", "ours, vv,vd", "ours, vv,pix"}
    assert record["floors"].keys() == {"ours"}
    assert record["apart"].keys() == {"ours", "plain"}
    assert record["gflop_per_sample"] > 0
    floor = record["floors"]["ours"]
    ratios = [a / b for a, b in zip(*(floor[name]["rounds_ms"] for name in ("ours", "encoders alone")), strict=True)]
    assert floor["ours"]["ratio"] == pytest.approx(statistics.median(ratios))


@pytest.mark.parametrize(("way", "kept"), [("ours", 1), ("plain", 0)])
def test_plain_in_a_process_of_its_own_leaves_the_heap_to_the_system(way, kept, run, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark.processes, "keep_freed_memory", lambda: calls.append(1))
    assert run("one", way=way)[0] == 0
    assert len(calls) == kept


def test_scale_takes_turns_over_its_settings_and_writes_json(run, monkeypatch):
    asked = []

    def fresh(config, processes, **flags):
        asked.append((processes, *flags.values()))
        return {"seconds": [flags["crop"], flags["crop"] * 3], "peak_gb": 1.5, "received_bytes": {"gradients": 4e6}}

    monkeypatch.setattr(benchmark, "fresh", fresh)
    flags = dict(processes="2", batches="2,4", crops="48", lengths="16", queues="8", rounds=2)
    code, record, err = run("scale", **flags)
    assert code == 0, err
    settings = [(1, 2, 32, 16, 8, 2), (2, 2, 32, 16, 8, 2), (1, 4, 32, 16, 8, 2), (1, 2, 48, 16, 8, 2)]
    assert asked == settings * 2  # the last number: two timed steps a visit
    rows = {(row["swept"], row[row["swept"]]): row for row in record["rows"]}
    assert len(rows) == 2 + 3 * 2
    assert rows["crop", 48]["median_ms"] == 96_000 and rows["crop", 48]["ratio"] == 1.5
    assert rows["batch_size", 4]["samples_per_s"] == 4 / 64 and rows["processes", 2]["exchanged_mb"] == 4


@pytest.mark.slow
def test_processes_measure_a_step_and_count_what_they_exchange():
    config = benchmark.BenchmarkConfig(**TINY)
    found = benchmark.fresh(config, processes=2)
    method = build().method
    assert found["received_bytes"].pop("gradients") == sum(
        4 * p.numel() for p in method.parameters() if p.requires_grad
    )
    assert found["received_bytes"]["all_gather"] == 2 * 4 * 128 * (2 * 2 + 2 * 2 * 2)  # keys of both
    clips = (2 * 2 + 2 * 2 * 2) * 3 * 16 * 32 * 32  # uint8 clips and sub-clips, dealt out for shuffled batch norm
    assert clips < found["received_bytes"]["all_to_all_single"] < 1.1 * clips  # and what comes back
    assert len(found["seconds"]) == 1 and 0.1 < found["peak_gb"] < 10


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("data", dict(workers="0,x"), "--workers 0,x: numbers from 0"),
        ("data", dict(data="nowhere"), "nowhere: no such folder"),
        ("step", dict(losses="vv,pixel"), "--losses vv,pixel"),
        ("scale", dict(batches="0"), "--batches 0: numbers from 1"),
        pytest.param("scale", dict(crop=16), "--crop 16", marks=pytest.mark.slow),  # said by the fresh process
        ("speed", {}, "data, step, scale, one"),
    ],
)
def test_a_mistake_is_one_line(command, flags, says, run):
    code, record, err = run(command, **flags)
    assert code == 2 and record is None
    one_line(err, says)
