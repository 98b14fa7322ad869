"""The loop, what every method has from it, and the command line: train.py, pretrain.py and cli.py, in this order."""

import contextlib
import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import sys
import time
from unittest import mock

import numpy as np
import pytest
import simclr
import torch
import tubelet_contrast
from conftest import options_of
from helpers import ALONE, CONV4, FORK, ROOT, Bare, generator, lines, one_line, refused, run_two, same, weights

import cli
import data
import dclr
import evaluate
import fame
import fima
import losses
import mcl
import moco
import runs
import train


def fit(method, folder, kind=train.TrainConfig, steps=4, more=(), wait=0, **options):
    """Trains on numbers that follow from the step, so many an epoch; gives the checkpoint."""
    config = kind(**dict(epochs=2, log_every=1, batch_size=4, lr=3.0) | options)

    def batches(start):
        for step in range(start, 2 * steps):
            x, overlap = torch.randn(4, 3, generator=generator(step)), torch.tensor([0.1 * step, 0.2])
            time.sleep(wait)
            yield {"x": x, "index": torch.full((4,), step), "overlap": overlap.repeat(2)} | dict(more)

    paths = [f"{step}.mp4" for step in range(2 * steps)]
    return weights(runs.fit_in_folder(method, config, ALONE, batches, steps, str(folder), {}, paths=paths))


def tiny_moco(**options):
    return moco.MoCo(moco.MoCoConfig(**dict(encoder="conv4", width=0.25, crop=32) | options))


def below(config: type) -> list[type]:
    return [config, *(found for each in config.__subclasses__() for found in below(each))]


@pytest.mark.parametrize("config", dict.fromkeys(below(train.Options)), ids=lambda config: config.__name__)
def test_every_number_has_limits_that_help_shows_and_beyond_them_is_one_line(config, capsys):
    with pytest.raises(SystemExit):
        cli.parse(config, "", argv=["--help-all"])
    described = " ".join(capsys.readouterr().out.split())
    for field in (field for field in dataclasses.fields(config) if field.type is not str):
        least, most = field.metadata["allowed"]
        assert -math.inf < least <= field.default <= most < math.inf, field.name
        limits = " to ".join(f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (least, most))
        assert f"(default: {field.default}; {limits})" in described
        outside = [math.nextafter(least, -math.inf), math.nextafter(most, math.inf), 1e308, math.inf, math.nan]
        for beyond in [least - 1, most + 1, 10**20] if field.type is int else outside:
            says = rf"--{field.name} \S+: must be \S+ to \S+$"
            refused(says, cli.parse, config, "", argv=[f"--{field.name}={beyond}"])


def test_learning_rate_is_a_half_cosine_scaled_with_the_total_batch_or_the_configs_own(tmp_path):
    rates = [train.TrainConfig(lr=0.04, epochs=100).learning_rate(64, epoch) for epoch in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([0.01, 0.005 + 0.005 / 2**0.5, 0.005, 0.005 - 0.005 / 2**0.5, 0])
    fit(Bare(), tmp_path, evaluate.LinearConfig)
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.75] * 5 + [0.075] * 2 + [0.0075])


def test_a_run_keeps_how_it_was_made_and_means_of_metrics_over_the_steps_that_have_them(tmp_path, capsys):
    class Fickle(Bare):
        def forward(self, batch):
            assert self.metrics == {}  # nothing of the step before
            step = round(4 * batch["epoch"])
            loss = 0 * super().forward(batch)["x"] + step
            self.metrics = {"odd": loss} if step % 2 else {}  # with a graph, which is not kept
            self.metrics |= {"chance/x": 2.0, "whole": torch.tensor(step)} if step > 3 else {}
            return {"x": loss}

        def warnings(self, line):
            return ["beware"]

    fit(Fickle(), tmp_path, log_every=3)
    found = [[line.get(name) for name in ("loss", "odd", "chance/x", "whole")] for line in lines(tmp_path)]
    assert found == [[1, 1, None, None], [3, 3, None, None], [4.5, 5, 2, 4.5], [6.5, 7, 2, 6.5]]
    (start,), out = json.loads((tmp_path / "run.json").read_text()), capsys.readouterr().out
    assert lines(tmp_path)[0]["overlap"] == pytest.approx(0.15)
    assert shlex.join(sys.argv) in start["command"] and start["versions"] == runs.versions()
    assert start["config"]["lr"] == 3 and all(f"--{name} " in out for name in start["config"])
    first, second = out.split("epoch 2/2")
    assert "x 1.500  " in first and "x 5.500 (chance 2.000)" in second and out.count("beware") == 1


def test_too_many_unreadable_videos_stop_the_run_and_are_named_once(tmp_path, capsys):
    bad = {"bad": [("a/0.mp4", "empty"), ("b\n.mp4", "cut\nshort")]}
    says = r"2 videos of .* --max_bad 0\.05; .* `cat \S+few/bad_videos\.log >> bad\.txt` .* --exclude bad\.txt, or"
    with pytest.raises(train.UserError, match=says):
        fit(Bare(), tmp_path / "few", more=bad)
    fit(Bare(), tmp_path / "many", more=bad, max_bad=0.5)  # 8 in 16 of an epoch
    assert capsys.readouterr().out.count("  8 unreadable videos") == 2
    log = (tmp_path / "many" / "bad_videos.log").read_text()
    assert log == "step 1\t'a/0.mp4'\tempty\nstep 1\t'b\\n.mp4'\tcut\n"


def test_an_epoch_that_is_resumed_counts_the_unreadable_videos_of_before_too(tmp_path):
    options = dict(more={"bad": [("a.mp4", "empty")]}, max_bad=1.0)
    fit(Bare(), tmp_path, max_steps=2, **options)
    fit(Bare(), tmp_path, resume=str(tmp_path / "checkpoint.pt"), **options)
    assert [line["bad_videos"] for line in lines(tmp_path)] == [1, 2, 3, 4] * 2


def test_steps_are_those_of_sgd_with_momentum_and_weight_decay_of_all_parameters():
    config = train.TrainConfig(batch_size=4, lr=3.0, epochs=2, weight_decay=0.1, sgd_momentum=0.8)
    run = train.Run(Bare(), config, ALONE, 4)
    values = [parameter.detach().clone() for parameter in run.method.parameters()]
    speed = [torch.zeros_like(value) for value in values]
    for k in range(3):
        x = torch.randn(4, 3, generator=generator(k))
        weight, bias = (value.requires_grad_() for value in values)
        gradients = torch.autograd.grad((x @ weight.T + bias - 1).square().mean(), (weight, bias))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        rate = 3.0 * 4 / 256 * (1 + math.cos(math.pi * k / 8)) / 2
        speed = [0.8 * v + g + 0.1 * w.detach() for v, g, w in zip(speed, gradients, values, strict=True)]
        values = [w.detach() - rate * v for w, v in zip(values, speed, strict=True)]
        torch.testing.assert_close(run.step({"x": x}).numbers["grad_norm"], norm)
        torch.testing.assert_close([*run.method.parameters()], values)


def test_what_is_random_in_a_step_differs_between_steps_processes_and_seeds():
    class Random(Bare):
        def forward(self, batch):
            drawn.append(torch.rand(()).item())
            return super().forward(batch)

    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        run = train.Run(Random(), train.TrainConfig(seed=seed), train.Process(rank, 1, ALONE.device), 4)
        for _ in range(3):
            run.step({"x": torch.ones(4, 3)})
    assert len({*drawn}) == 9


def test_a_slow_loader_is_told_once_in_the_first_epoch_with_what_it_takes_so_long_for(tmp_path, capsys, monkeypatch):
    now = [0.0]  # by a clock that only sleep moves
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    made = {"seconds": torch.tensor([[0.1, 0.5, 0.2], [0.1, 0.1, 1.0]])}
    says = r"data wait 100%, as the loader is slow \(60% scaling, 30% decoding, 10% reading files\): .*shrink\.py"
    fit(Bare(), tmp_path / "slow", wait=0.05, more=made, log_every=2)
    assert len(re.findall(says, out := capsys.readouterr().out)) == 1 and "160 clips/s  data wait 100%" in out
    (slow := Bare()).register_forward_pre_hook(lambda *_: time.sleep(0.05))
    fit(slow, tmp_path / "fast", more=made)
    fit(Bare(), tmp_path / "unknown", wait=0.05)
    fit(Bare(), tmp_path / "start", wait=0.05, more=made, steps=1)  # one line an epoch
    assert "loader is" not in capsys.readouterr().out


@pytest.mark.parametrize(("native", "version", "auto"), [(0, "2.14.1", False), (1, "2.14.1", True), (1, "2.10", False)])
def test_auto_takes_bf16_where_the_gpu_computes_in_it_and_does_not_emulate_it(native, version, auto, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    gpu = train.Process(0, 1, torch.device("cuda"))
    found = [train.autocast_bf16(train.TrainConfig(precision=name), gpu) for name in ("auto", "float32", "bf16")]
    assert found == [auto, False, True] and not train.autocast_bf16(train.TrainConfig(), ALONE)


def test_nohup_is_obeyed(in_process, request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with train.noted_signals(ALONE) as caught:
        signal.raise_signal(signal.SIGHUP)
    code, *_ = in_process(cli, main=lambda: signal.raise_signal(signal.SIGHUP))
    assert caught == [] and code == 0


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_ends_a_run_at_once_but_under_torchrun_which_repeats_what_reached_all(launched, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    outcome = contextlib.nullcontext() if launched else pytest.raises(KeyboardInterrupt)
    with train.noted_signals(ALONE) as caught:
        signal.raise_signal(signal.SIGTERM)
        with outcome:
            signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM] * (1 + launched)


def test_a_signal_in_the_last_save_ends_the_run_too(tmp_path, monkeypatch):
    save = train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda *given: (save(*given), signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(train.Interrupted):
        fit(Bare(), tmp_path, epochs=1)
    assert weights(tmp_path / "checkpoint.pt")["step"] == 4


class Broken(Bare):
    """Its loss, or only the gradient of it, is not finite in some steps."""

    def __init__(self, how, steps):
        super().__init__()
        self.how, self.steps, self.states = how, steps, []
        self.register_buffer("queue", torch.zeros(1))

    def forward(self, batch):
        self.states.append({name: value.clone() for name, value in self.state_dict().items()})
        self.queue += 1
        zero, broken = (self.weight * 0).sum(), len(self.states) in self.steps
        more = {"loss": zero * math.nan, "gradient": zero.abs().sqrt()}[self.how] if broken else 0
        return {"x": super().forward(batch)["x"] + more}


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(how, tmp_path):
    with pytest.raises(train.UserError, match=r"not finite, step 6: x .*norm of the gradient nan.*5\.mp4") as error:
        fit(Broken(how, {6}), tmp_path, log_every=2)
    assert ("x nan" in str(error.value)) == (how == "loss")
    assert weights(tmp_path / "checkpoint.pt")["step"] == 4 and [line["step"] for line in lines(tmp_path)] == [2, 4]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_can_be_left_out(how, parts, tmp_path, capsys, monkeypatch):
    """Of all its micro-batches, if one is broken."""
    options = dict(on_nan="skip", accumulate=parts, batch_size=4 // parts)
    state = fit(method := Broken(how, {2 * parts + 1}), tmp_path, **options)
    out = capsys.readouterr().out
    assert "left out: step 3: x" in out and "1 steps left out" in out
    first, second, third, fourth = method.states[: 4 * parts : parts]
    assert same(third, fourth) and not same(second, third) and not same(first, second)
    counts = [(line["step"], line["skipped_steps"]) for line in lines(tmp_path)]
    assert counts == [(1, 0), (2, 0), (4, 1), (5, 0), (6, 0), (7, 0), (8, 0)]
    assert all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.setattr(train.Run, "MOST_LEFT_OUT", 2)
    with pytest.raises(train.UserError, match="2 steps in a row were left out, and now step 8: x nan"):
        fit(Broken("loss", {5 * parts + 1, 6 * parts + 1, 8 * parts}), tmp_path / "row", **options)
    assert weights(tmp_path / "row" / "checkpoint.pt")["step"] == 4


def test_resuming_with_other_batches_goes_on_at_the_same_part_of_the_schedule_and_forgets_no_line(tmp_path, capsys):
    state, path = fit(Bare(), tmp_path, log_every=3, max_steps=4), tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, state | {"world_size": 2})
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # a kill may cut the last line
    for options, says in (
        (dict(steps=9, batch_size=2, max_steps=9), "saved by 2 processes with 4 steps an epoch, now it is 1 with 9"),
        (dict(steps=9, batch_size=2, max_steps=9), "nothing left"),
        (dict(steps=9, batch_size=2, max_steps=11), "--batch_size 2 (was 4)"),
        (dict(max_steps=6, weight_decay=0.5), "resumed after step 5"),
    ):
        state = fit(Bare(), tmp_path, log_every=3, resume=str(path), **options)
        assert says in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path)] == [3, 4, 11, 6]
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_run_of_another_optimiser_is_not_resumed(tmp_path):
    fit(Bare(), tmp_path, max_steps=2)
    for kind, says in ((torch.optim.AdamW, "with SGD, not with AdamW: start anew"), (torch.optim.SGD, "")):
        method, path = Bare(), str(tmp_path / "checkpoint.pt")
        method.optimizer = lambda config, method=method, kind=kind: kind(method.parameters(), config.lr)
        with pytest.raises(train.UserError, match=says) if says else contextlib.nullcontext():
            fit(method, tmp_path, max_steps=3, resume=path)


def test_features_are_projected_and_averaged_in_float32_whatever_they_are_computed_in():
    method, features = tiny_moco(), torch.rand(2, 96, 2, 3, 3, generator=generator(0))
    with torch.autocast("cpu", torch.bfloat16):
        projected = method.project(method.head, features.mean((2, 3, 4))[:, :24])
    assert projected.dtype == torch.float32 and (projected.norm(dim=1) - 1).abs().max() < 1e-6
    for function in (losses.activation_map, losses.pixel_activation):
        half = features.bfloat16()
        assert torch.equal(function(half), function(half.float()))


def test_views_are_made_by_the_methods_options():
    options = dict(seed=3, min_scale=0.5, jitter_p=0.1, gray_p=0.3, blur_p=0.6, frames=8, frame_stride=3)
    views = tiny_moco(**options).make_views(data.VideoList(["a.mp4"], [0], ["a"], ""))
    assert (views.seed, views.min_scale, views.frames, views.frame_stride) == (3, 0.5, 8, 3)
    assert (views.crop, views.color) == (32, dict(jitter_p=0.1, gray_p=0.3, blur_p=0.6))
    assert tiny_moco(activation_checkpointing="on").encoder.checkpointing and not tiny_moco().encoder.checkpointing


def test_the_first_look_compares_with_the_encoder_as_it_was(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "first_look", lambda encoders, *_: seen.update(encoders))
    run.ok(moco, *CONV4, "--max_steps=1", "--seed=5")
    torch.manual_seed(5)
    fresh = tiny_moco(queue=8, batch_size=4).encoder.state_dict()
    assert list(seen) == ["untrained", "moco"] and same(dict(seen["untrained"].state_dict()), dict(fresh))
    assert not same(dict(seen["moco"].state_dict()), dict(fresh))


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
HALVES = ["--batch_size", 2, "--accumulate", 2]  # not --batch_size 4
RESUMED = {
    fima: ["--fame", "single", "--pixel_queue", 64, "--queue", 99, "--seed", 2**31 - 1, *HALVES],
    fame: ["--branches", "both", "--queue", 8],
    dclr: ["--refresh", 1, "--delay", 1, "--queue", 16, *HALVES],
    mcl: ["--maps", "maps", "--queue", 8, *HALVES, "--activation_checkpointing"],
    simclr: ["--warmup", 1, *HALVES],
    tubelet_contrast: ["--queue", 8, *HALVES],
}


@pytest.mark.parametrize(("script", "dataset", "total", "rate", "expected"), PAPERS, ids=str)
def test_presets_are_the_papers(script, dataset, total, rate, expected):
    config = cli.parse(options_of(script)[1], "", script.PRESETS, ["--dataset", dataset])
    expected = expected | dict(frames=16, frame_stride=2, temperature=0.1)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.lr * total / 256 == pytest.approx(rate)


@pytest.mark.slow
@pytest.mark.parametrize("script", RESUMED, ids=lambda script: script.__name__)
def test_a_resumed_run_equals_a_whole_one_bit_for_bit(script, run, monkeypatch):
    """Across an epoch of 4 steps, with DCLR's refresh and delay, and the end of the warm-up."""
    monkeypatch.setattr(mcl.MotionMaps, "compute", lambda maps, path: np.ones((40, 6, 6), np.float32))
    monkeypatch.setattr(torch.multiprocessing, "Process", FORK.Process)  # which inherit what is patched
    flags = [*CONV4, "--device=cpu", "--batch_size=4", "--epochs=2", "--keep_every=1", *RESUMED[script], "--max_steps"]
    folder = dict(dataset="folder", small=False)
    out = run.ok(script, *flags, 6, "--out", "whole", **folder)
    for line in lines(run.path / "whole"):
        assert line["loss"] == pytest.approx(sum(line[name] for name in line if name.startswith("loss/")))
    assert ("--queue 99 exceeds" in out) == (script is fima)
    assert f"python {script.__name__}.py" in run.ok(script, *flags, 3, "--out", "half", **folder)
    run.ok(script, "--resume", "half/checkpoint.pt", "--max_steps", 6, "--workers", 2, **folder)
    whole, half = (weights(run.path / name / "checkpoint.pt") for name in ("whole", "half"))
    assert whole["method"] == options_of(script)[0].__name__ and whole["step"] == half["step"] == 6
    assert same(whole["model"], half["model"]) and same(whole["optimizer"], half["optimizer"])
    assert weights(run.path / "whole" / "epoch_0001.pt")["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dclr.py", "examples/simclr.py"])
def test_two_processes_train_and_agree(script, videos, tmp_path):
    flags = ["--dataset=folder", f"--data={videos}", "--epochs=2", "--max_steps=3", "--device=cpu", "--out=run"]
    flags += ["--batch_size=2", "--accumulate=2", "--workers=1", "--activation_checkpointing"]
    run_two(ROOT / script, *flags, *CONV4, folder=tmp_path)
    assert weights(tmp_path / "run" / "checkpoint.pt")["step"] == 3  # which is saved if the processes agree


@pytest.mark.slow
def test_a_stray_video_of_the_generated_set_ends_the_first_look_in_one_line(run):
    root = shutil.copytree(run.videos, run.path / "set")
    shutil.copy(next(root.glob("train/*/*.mp4")), root / "train" / "stray.mp4")
    flags = ["--max_steps=1", "--dataset=synthetic", f"--data={root}"]
    run.refused(moco, *flags, dataset=None, says=["1 videos have no label"])
    assert list((run.path / "runs").glob("*/checkpoint.pt"))  # what was trained is saved


REFUSED = [
    (fima, ["--dataset=folder", "--data=\x1b[31mno\nwhere\udcff"], [r"\x1b[31mno\nwhere\udcff:"]),
    (fima, ["--encoder=resnet"], ["--encoder", "i3d"]),
    (fima, ["--epoch=3"], ["--epoch"]),
    (fima, ["--encoder=i3d", "--crop=32"], ["--crop 32", "64"]),
    (fima, ["--frames=13"], ["--frames 13", "conv4"]),
    (fima, ["--losses=vv,pixel"], ["--losses vv,pixel", "pix"]),
    (fima, ["--losses="], ["--losses"]),
    (fima, ["--decoder=none"], ["--decoder none", "fra"]),
    (fima, ["--decoder_heads=5"], ["--decoder_heads 5"]),
    (fima, ["--fame=single", "--batch_size=1"], ["--fame", "--batch_size 2"]),
    (fima, ["--device=cuda"], ["CUDA"]),
    (fima, ["--compile=on"], ["--compile on", "nowhere/c++"]),
    (fima, ["--precision=bf16", "--batch_size=4", "--dataset=synthetic"], ["bf16", "GPU"]),
    (fima, ["--out=datasets/run", "--batch_size=4", "--dataset=synthetic"], ["datasets/run"]),
    (fame, ["--batch_size=1"], ["--background inter", "--batch_size 2"]),
    (dclr, ["--losses=sd,ac"], ["--losses sd,ac", "vv, vs, vd"]),
    (dclr, ["--batch_size=1"], ["--batch_size 1", "2 or more"]),
    (dclr, ["--retrieved=9", "--queue=8"], ["--retrieved 9", "--queue"]),
    (dclr, ["--same_view"], ["--same_view on", "--search none"]),
    (mcl, ["--losses=t,s"], ["--losses t,s", "vv"]),
    (mcl, ["--compile=on"], ["--compile on", "MCL"]),
    (mcl, ["maps", "--maps=/dev/null", "--dataset=synthetic"], ["/dev/null"]),
    (moco, ["--encoder=s3d", "--width=2"], ["--width 2", "s3d"]),
    (moco, ["--batch_size=400", "--dataset=synthetic"], ["18 videos", "--batch_size"]),
    (evaluate, [], ["name one of", "--help"]),
    (evaluate, ["other"], ["name one of", "--help"]),
    (evaluate, ["knn", "word"], ["--help"]),
    (simclr, ["--temperature=0"], ["--temperature 0"]),
    (tubelet_contrast, ["--batch_size=1"], ["--batch_size 1", "2 or more"]),
    (tubelet_contrast, ["--losses=vd"], ["--losses vd", "vv"]),
]
LEFT = ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=2", "RANK=0 WORLD_SIZE=2", "RANK=first WORLD_SIZE=1"]
LEFT += ["RANK=1 WORLD_SIZE=1", "RANK=0 WORLD_SIZE=1 LOCAL_RANK=1", "RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0"]


@pytest.mark.parametrize(("script", "flags", "says"), REFUSED, ids=str)
def test_bad_input_is_one_clear_line_and_exit_code_2(script, flags, says, run, monkeypatch):
    monkeypatch.setenv("CXX", "nowhere/c++")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (run.path / "datasets").touch()  # a file, so that nothing is generated below it
    dataset = "synthetic" if "--dataset=synthetic" in flags else None
    run.refused(script, *flags, dataset=dataset, small=False, says=says)


def test_sub_commands_have_help_of_their_own_and_where_none_is_named_the_presets_hold(run):
    for words, says in ((["-h"], evaluate.__doc__[:20]), (["knn", "--help"], evaluate.KnnConfig.__doc__[:20])):
        code, out, _ = run(evaluate, *words, dataset=None)
        assert not code and says in out
    assert "--epochs 12 " in run.ok(mcl, "--print_config", small=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("can't allocate memory"), MemoryError()])
def test_too_little_memory_is_one_line(error, in_process):
    code, _, err = in_process(cli, main=mock.Mock(side_effect=error))
    assert code == 2
    one_line(err, "--batch_size")


@pytest.mark.parametrize("name", ["__init__", "make_views", "forward", "write"])
def test_an_error_in_somebodys_own_code_keeps_its_traceback(name, run, monkeypatch):
    """A ValueError too, which is what users' errors are where a part raises them."""
    owner = data.PretrainingViews if name == "write" else moco.MoCo
    monkeypatch.setattr(owner, name, mock.Mock(side_effect=ValueError("too many values")))
    with pytest.raises(ValueError, match="too many values"):
        run(moco, *CONV4, "--epochs", 1)


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_lines_in_a_file_nothing_with_quiet_and_names_hold_no_codes_of_a_terminal(in_process, quiet):
    def work():
        for n in train.progress(ALONE, range(3), desc="work", miniters=1):
            ALONE.say(f"said \x1b[31m\udcff\x9b{n}")
        print("\x1b", file=sys.stderr)

    code, out, err = in_process(cli, *["--quiet"] * quiet, main=work)
    assert code == 0 and out == "".join(f"said \\x1b[31m\\udcff\\x9b{n}\n" for n in range(3)) and "\r" not in err
    assert err.strip() == "\\x1b" if quiet else err.startswith("work:   0%") and "3/3" in err and "\\x1b\n" in err


@pytest.mark.parametrize("left", LEFT)
def test_an_environment_that_a_scheduler_has_left_is_one_clear_line(left, run, monkeypatch):
    for setting in left.split():
        monkeypatch.setenv(*setting.split("="))
    run.refused(moco, says=[f"the environment has {left}, ", "torchrun", "unset"])


def test_deterministic_is_passed_on_to_torch(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked := mock.Mock())
    cli.start_process("cpu", deterministic=True)
    assert asked.call_args.args == (True,)
