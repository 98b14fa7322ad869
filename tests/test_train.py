"""The loop and the command line: what a method must have, options, several processes, interrupts, errors of users."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types

import conftest
import encoding
import numpy as np
import pytest
import torch
from helpers import ALONE, ROOT, Bare, lines, one_line, same, torchrun, weights

import benchmark  # noqa: F401  its options are tried, too
import cli
import data
import evaluate
import fima
import find
import moco
import pretrain
import runs
import train
import visualize

SMALL = [*conftest.SMALL, *conftest.DECODER]
CLIPS = ROOT.parent / "shared" / "clips"


# ---------------------------------------------------------------------------------------------------------------------
# What the loop asks of a method
# ---------------------------------------------------------------------------------------------------------------------


def fit(method, folder, **options):
    """Trains on numbers that follow from the step, 4 steps an epoch; gives the checkpoint."""
    config = train.TrainConfig(epochs=2, log_every=1, batch_size=4, lr=3.0, **options)

    def batches(start):
        for step in range(start, 8):
            yield {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step))}

    return weights(runs.fit_in_folder(method, config, ALONE, batches, 4, str(folder), {}))


def test_a_method_needs_no_more_than_a_forward(tmp_path, capsys):
    fit(Bare(), tmp_path)
    assert "epoch 2/2  x " in (out := capsys.readouterr().out) and "chance" not in out
    assert len(lines(tmp_path)) == 8


def test_metrics_may_come_in_some_steps_and_chance_is_shown_where_it_is_told(tmp_path, capsys):
    class Fickle(Bare):
        def forward(self, batch):
            losses, step = super().forward(batch), round(4 * batch["epoch"])
            assert self.metrics == {}  # nothing of the step before
            if step % 2:
                self.metrics["odd"] = losses["x"] + step  # with a graph, which is not kept
            if step > 3:
                self.metrics |= {"chance/x": 2.0, "whole": torch.tensor(step)}
            return losses

        def warnings(self, line):
            return [f"whole {line['whole']:g}"] if line.get("whole", 0) > 5 else []

    fit(Fickle(), tmp_path)
    found = lines(tmp_path)
    assert ["odd" in line for line in found] == [False, True] * 4
    assert found[3]["odd"] == pytest.approx(3 + found[3]["loss"]) and found[6]["whole"] == 6
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert "chance" not in first and "(chance 2.000)" in second
    (tmp_path / "more").mkdir()
    config = train.TrainConfig(epochs=1, log_every=4, batch_size=4)
    batch = {"x": torch.ones(4, 3)}
    runs.fit_in_folder(Fickle(), config, ALONE, lambda _: [batch] * 4, 4, str(tmp_path / "more"), {})
    (line,) = lines(tmp_path / "more")
    assert line["odd"] == pytest.approx(2 + line["loss"], abs=0.5)  # the mean over steps 1 and 3


def test_what_a_method_warns_of_is_said_once(tmp_path, capsys):
    class Anxious(Bare):
        def warnings(self, line):
            return ["beware"]

    fit(Anxious(), tmp_path)
    assert capsys.readouterr().out.count("warning, step 1: beware") == 1


class Adam(Bare):
    def optimizer(self, config):
        return torch.optim.AdamW(self.parameters(), config.lr, weight_decay=config.weight_decay)


@pytest.mark.parametrize("method", [Bare, Adam])
def test_any_optimiser_is_restored_exactly(method, tmp_path):
    whole = fit(method(), tmp_path / "whole")
    fit(method(), tmp_path / "half", max_steps=3)
    half = fit(method(), tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint.pt"))
    assert same(whole["model"], half["model"]) and same(whole["optimizer"], half["optimizer"])
    state = weights(tmp_path / "half" / "checkpoint.pt")["optimizer"]
    assert ("exp_avg" in state["state"][0]) == (method is Adam)
    state["state"][0]["exp_avg"] = torch.ones(5)
    with pytest.raises(train.UserError, match="no valid optimizer"):
        train.load_optimizer(
            "it",
            method().optimizer(train.TrainConfig()) if method is Adam else train.sgd(method(), train.TrainConfig()),
            state,
        )


def test_a_config_may_have_a_schedule_of_its_own(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class WarmConfig(train.TrainConfig):
        def learning_rate(self, total_batch, epoch):
            return min(epoch, 1.0)

    config = WarmConfig(epochs=2, log_every=1, batch_size=4)
    runs.fit_in_folder(Bare(), config, ALONE, lambda _: [{"x": torch.ones(4, 3)}] * 8, 4, str(tmp_path), {})
    assert [line["lr"] for line in lines(tmp_path)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_learning_rate_is_a_half_cosine_per_step_scaled_with_the_total_batch():
    config = train.TrainConfig(lr=0.04, epochs=100)
    rates = [config.learning_rate(64, epoch) for epoch in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[50] == pytest.approx(0.005) and rates[100] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)
    assert config.learning_rate(24, 0) == pytest.approx(0.00375)


@pytest.mark.parametrize("place", ["constructor", "views", "item", "forward"])
def test_an_error_in_somebodys_own_code_keeps_its_traceback(place, run, monkeypatch):
    """Whatever it is, a ValueError too, which is what users' errors are where a part raises them."""

    def fail(*_arguments, **_options):
        x, y = (1, 2, 3)
        return x, y

    places = {
        "constructor": (moco.MoCo, "__init__"),
        "views": (moco.MoCo, "make_views"),
        "item": (data.PretrainingViews, "write"),
        "forward": (moco.MoCo, "forward"),
    }
    monkeypatch.setattr(*places[place], fail)
    with pytest.raises(ValueError, match="too many values to unpack"):
        run(moco, *conftest.CONV4, "--epochs", 1)


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("major", "torch_version", "auto"), [(7, "2.14.1", False), (8, "2.14.1", True), (9, "2.10.0", False)]
)
def test_auto_takes_bf16_where_the_gpu_computes_in_it_and_does_not_emulate_it(
    major, torch_version, auto, device, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_properties": types.SimpleNamespace(major=major),
        "_check_bf16_tensor_supported": True,  # such a tensor can be made on any GPU
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    process = train.Process(0, 1, torch.device("cuda" if device == "auto" else "cpu"))
    assert train.autocast_bf16(train.TrainConfig(), process) is (auto and device == "auto")
    assert not train.autocast_bf16(train.TrainConfig(precision="float32"), process)
    if device == "auto":
        assert train.autocast_bf16(train.TrainConfig(precision="bf16"), process)  # who asks for it gets it


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "no folder": (fima, ["--dataset", "ucf101", "--data", "nowhere"], ["nowhere", "ucfTrainTestlist"]),
    "empty folder": (fima, ["--dataset", "folder", "--data", "."], ["folder", "no videos"]),
    "unknown value": (fima, ["--encoder", "resnet"], ["--encoder", "i3d"]),
    "unknown flag": (fima, ["--epoch", "3"], ["--epoch"]),
    "unknown loss": (fima, ["--losses", "vv,pixel"], ["--losses", "pix"]),
    "not a number": (fima, ["--lr", "fast"], ["--lr"]),
    "crop too small": (fima, ["--encoder", "i3d", "--crop", "32"], ["--crop 32", "64"]),
    "frames": (fima, ["--frames", "13"], ["--frames 13", "stride of conv4"]),
    "heads": (fima, ["--decoder_heads", "5"], ["--decoder_heads 5"]),
    "width of s3d": (moco, ["--encoder", "s3d", "--width", "2"], ["--width 2", "s3d"]),
    "small set": (moco, ["--batch_size", "400"], ["18 videos", "--batch_size"]),
    "bf16 on a CPU": (fima, ["--precision", "bf16", "--batch_size", "4"], ["bf16", "GPU"]),
    "no compiler": (fima, ["--compile", "on"], ["--compile on", "nowhere/c++"]),
    "no checkpoint": (fima, ["--resume", "nowhere.pt"], ["nowhere.pt"]),
    "two lines": (fima, ["--dataset", "folder", "--data", "\x1b[31mno\nwhere\udcff"], [r"\x1b[31mno\nwhere\udcff:"]),
    "no CUDA": (fima, ["--device", "cuda"], ["CUDA"]),
    "no protocol": (evaluate, ["linearise"], ["retrieve"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, run, monkeypatch):
    script, flags, says = BAD_INPUT[case]
    monkeypatch.setenv("CXX", "nowhere/c++")
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    device = [] if script is evaluate or "--device" in flags else ["--device", "cpu"]
    dataset = "synthetic" if case in ("bf16 on a CPU", "small set") else None
    code, _, err = run(script, *flags, *device, dataset=dataset, small=False)
    assert code == 2
    one_line(err, *says)


def below(config: type) -> list[type]:
    known = [
        each for each in config.__subclasses__() if each.__module__ in sys.modules and "test" not in each.__module__
    ]
    return [config, *(found for each in known for found in below(each))]


@pytest.mark.parametrize("config", dict.fromkeys(below(train.Options)), ids=lambda config: config.__name__)
def test_every_number_has_limits_that_help_shows_and_beyond_them_is_one_line(config, capsys):
    with pytest.raises(SystemExit):
        cli.parse(config, "", argv=["--help"])
    described = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config):
        if field.type is str:
            continue
        least, most = field.metadata["allowed"]
        assert -math.inf < least <= field.default <= most < math.inf, field.name
        limits = " to ".join(f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (least, most))
        assert f"(default: {field.default}; {limits})" in described
        steps = [least - 1, most + 1, 10**20] if field.type is int else [math.nextafter(least, -math.inf)]
        steps += [] if field.type is int else [math.nextafter(most, math.inf), 1e308, math.inf, math.nan]
        for beyond in steps:
            with pytest.raises(train.UserError, match=rf"--{field.name} \S+: must be \S+ to \S+$"):
                cli.parse(config, "", argv=[f"--{field.name}={beyond}"])


@dataclasses.dataclass(frozen=True)
class CountConfig(train.Options):
    count: int = train.option(1, "how many", (0, 9))


def count(config):
    """Counts."""


def test_sub_commands_are_told_apart_and_get_their_options(monkeypatch, capsys):
    def dispatch(*argv, **options):
        monkeypatch.setattr(sys, "argv", ["program.py", *argv])
        return cli.dispatch({"count": (count, CountConfig)} | options.pop("more", {}), "What it does.", **options)

    assert dispatch("count", "--count", "3") == ("count", count, CountConfig(3), [])
    assert dispatch("count", "a", "b", "--count=2", words=True) == ("count", count, CountConfig(2), ["a", "b"])
    without = {"": (print, CountConfig, {"": {"count": 5}})}
    assert dispatch(more=without) == ("", print, CountConfig(5), [])
    assert dispatch("--count", "4", more=without) == ("", print, CountConfig(4), [])
    for argv in ((), ("other",), ("--count", "3"), ("count", "a")):
        with pytest.raises(train.UserError, match="--help"):
            dispatch(*argv)
    for argv, says in ((("-h",), "What it does."), (("count", "--help"), "Counts.")):
        with pytest.raises(SystemExit):
            dispatch(*argv)
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated …"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.command_line(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch_size" in err and err.count("\n") == 1 and "reserved" not in err


@pytest.mark.slow
def test_a_script_runs_from_any_folder_and_help_teaches(tmp_path):
    help = [sys.executable, ROOT / "fima.py", "--help"]
    done = subprocess.run(help, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for name in fima.FIMAConfig.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    assert "torchrun --nproc_per_node=8 fima.py --dataset k400" in done.stdout and "k400:" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_folder_holds_config_command_versions_and_every_loss_with_its_chance(run):
    code, out, _ = run(fima, "--epochs", 1, "--log_every", 2, "--out", "run", "--lr", 0.1)
    assert code == 0
    (start,) = json.loads((run.path / "run" / "run.json").read_text())
    assert start["config"]["lr"] == 0.1 and start["config"]["epochs"] == 1  # explicit flags win over the preset
    assert "fima.py" in start["command"] and start["versions"] == runs.versions()
    records = [json.loads(line) for line in (run.path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in records] == [2, 4]
    for line in records:
        assert line["loss"] == pytest.approx(sum(line[f"loss/{name}"] for name in ("vv", "pix", "fra")))
        assert line["chance/vv"] == pytest.approx(math.log(9)) and line["chance/pix"] > 0
        assert line["clips_per_s"] > 0 and 0 <= line["data_wait"] <= 1
    for name in start["config"]:
        assert name in out  # the settings are printed in full
    assert "chance" in out and "own other half" in out and "evaluate.py retrieve" in out


@pytest.mark.slow
def test_the_overlap_of_windows_is_in_the_log_and_the_last_epochs_in_run_json_and_too_much_is_warned_of(run, videos):
    """The videos have 40 frames: of windows of 32, the two of a video share 7/8 or more of them, of 8 much less."""
    flags = [*conftest.CONV4, "--epochs", 2, "--log_every", 3, "--out", "run"]
    code, out, _ = run(moco, *flags, dataset="folder")
    assert code == 0 and out.count("share more than 80% of their frames") == 1
    listed = find.find_videos("folder", videos, True)
    views = data.PretrainingViews(listed, 32)
    keys = [key for keys in data.StepSampler(len(listed), 4, 2) for key in keys]
    means = [float(np.mean([views[key]["overlap"] for key in keys if key[0] == epoch])) for epoch in (0, 1)]
    found = lines(run.path / "run")
    assert [line["step"] for line in found] == [3, 4, 6, 8]
    assert (3 * found[0]["overlap"] + found[1]["overlap"]) / 4 == pytest.approx(means[0])
    (start,) = json.loads((run.path / "run" / "run.json").read_text())
    assert start["overlap"] == pytest.approx(means[1])
    code, out, _ = run(moco, *flags[:-1], "short", "--frames", 8, "--frame_stride", 1, dataset="folder")
    assert code == 0 and "of their frames" not in out


def test_a_checkpoint_of_synchronised_batch_norm_is_refused_in_one_line_and_goes_on_with_another(run):
    flags = [*conftest.CONV4, "--epochs", 2, "--out", "run"]
    assert run(fima, *flags, "--max_steps", 2, dataset="folder")[0] == 0
    path = run.path / "run" / "checkpoint.pt"
    state = weights(path)
    state["config"]["bn"] = "sync"  # which there was
    torch.save(state, path)
    code, _, err = run(fima, "--resume", path, small=False, dataset=None)
    assert code == 2
    one_line(err, path, "--bn sync")
    model, _ = visualize.load_decoder(visualize.FigureConfig(device="cpu"), [str(path)])
    assert all(same(value, state["model"][f"encoder.{name}"]) for name, value in model.encoder.state_dict().items())
    code, out, _ = run(fima, "--resume", path, "--bn", "shuffle", "--max_steps", 3, small=False, dataset="folder")
    assert code == 0 and "--bn shuffle (was sync)" in out


def test_moco_trains_with_the_same_command_line_and_the_largest_seed(run):
    flags = [*conftest.CONV4, "--epochs", 1, "--losses", "vv,vd", "--max_steps", 2, "--seed", 2**31 - 1]
    code, out, _ = run(moco, *flags, "--queue", 99, "--out", "a run", dataset="folder")
    assert code == 0 and "vd" in out and "--queue 99 exceeds" in out
    command = next(line for line in out.splitlines() if "evaluate.py retrieve" in line)
    assert shlex.split(command, comments=True)[-1] == "a run/checkpoint.pt"  # can be pasted


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(run, monkeypatch):
    rate = train.TrainConfig.learning_rate

    def press(config, total_batch, epoch):
        if epoch == 1.25:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, total_batch, epoch)

    monkeypatch.setattr(train.TrainConfig, "learning_rate", press)
    code, out, _ = run(moco, *conftest.CONV4, "--epochs", 1000, "--out", "run")  # of 4 steps
    monkeypatch.undo()
    assert code == 130 and "--resume run/checkpoint.pt" in out
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 6
    code, out, _ = run(moco, "--resume", "run/checkpoint.pt", "--max_steps", 7, small=False)
    assert code == 0 and "resumed after step 6" in out


def test_a_run_is_not_overwritten(run):
    assert run(moco, *conftest.CONV4, "--max_steps", 1, "--out", "run")[0] == 0
    before = (run.path / "run" / "log.jsonl").read_text()
    shutil.copytree(run.path / "run", run.path / "other")
    for flags in (["--out", "run"], ["--resume", "other/checkpoint.pt", "--out", "run"]):
        code, _, err = run(moco, *conftest.CONV4, "--max_steps", 2, *flags)
        assert code == 2
        one_line(err, "--resume run/checkpoint.pt")
        assert (run.path / "run" / "log.jsonl").read_text() == before
    (run.path / "run" / "run.json").write_text("")
    code, _, err = run(moco, *conftest.CONV4, "--resume", "run/checkpoint.pt", "--max_steps", 2)
    assert code == 2
    one_line(err, "run/run.json is damaged")


def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    name = str(tmp_path / "runs" / "moco")
    assert [runs.unused_folder(name) for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]


@pytest.mark.slow
def test_resuming_with_other_batches_goes_on_at_the_same_part_of_the_schedule_and_forgets_no_line(run):
    flags = [*conftest.CONV4, "--epochs", 2, "--log_every", 3, "--max_steps", 4, "--out", "run"]  # 4 steps an epoch
    assert run(moco, *flags)[0] == 0
    with open(run.path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # a kill may cut the last line
    flags = ["--resume", "run/checkpoint.pt", "--batch_size", 2, "--max_steps", 9]  # of 9 steps an epoch
    code, out, _ = run(moco, *flags, small=False)
    assert code == 0 and "nothing left" in out and "note:" in out
    code, out, _ = run(moco, *flags[:-1], 11, small=False)
    assert code == 0 and "resumed after step 9" in out and "--batch_size 2 (was 4)" in out
    code, out, _ = run(moco, "--resume", "run/checkpoint.pt", "--batch_size", 4, "--max_steps", 6, small=False)
    assert code == 0 and "resumed after step 5" in out
    assert [line["step"] for line in lines(run.path / "run")] == [3, 4, 11, 6]


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_refused(run):
    assert run(fima, "--max_steps", 1, "--out", "run")[0] == 0
    (run.path / "cut.pt").write_bytes((run.path / "run" / "checkpoint.pt").read_bytes()[:1000])
    torch.save({"state_dict": {}}, run.path / "other.pt")
    for script, path, flags, says in (
        (fima, "run/checkpoint.pt", ["--width", 0.125], "was trained with --width 0.0625, not 0.125"),
        (fima, "run/checkpoint.pt", ["--encoder", "i3d"], "was trained with --encoder r3d_18, not i3d"),
        (moco, "run/checkpoint.pt", [], "is a checkpoint of FIMA, not of MoCo"),
        (fima, "cut.pt", [], "cut.pt"),
        (fima, "other.pt", [], "other.pt"),
    ):
        code, _, err = run(script, "--resume", path, *flags, small=False)
        assert code == 2
        one_line(err, says)
    state = weights(run.path / "run" / "checkpoint.pt")["model"]
    with pytest.raises(train.UserError, match=r"1 tensors differ; head\.net\.2\.bias: missing in it"):
        method = fima.FIMA(fima.FIMAConfig(**weights(run.path / "run" / "checkpoint.pt")["config"]))
        train.load_model("it", method, {name: value for name, value in state.items() if name != "head.net.2.bias"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_two_saves_once_for_all(number, videos, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "fima.py"]
    flags = ["--dataset", "synthetic", "--data", str(videos), "--epochs", "9999", "--workers", "1", "--out", "run"]
    running = subprocess.Popen(
        [*launch, *flags, *SMALL, "--log_every", "2"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    out = ""
    while "epoch 1/" not in out:
        line = running.stdout.readline()
        assert line, out
        out += line
    os.killpg(running.pid, number)
    out += running.communicate(timeout=120)[0]
    assert "torchrun --nproc_per_node=2" in out and "--resume run/checkpoint.pt" in out
    assert weights(tmp_path / "run" / "checkpoint.pt")["step"] % 2 == 0


@pytest.mark.slow
def test_two_processes_end_with_identical_weights(videos, tmp_path):
    (tmp_path / "two.py").write_text(
        "import sys, torch, torch.distributed as dist, cli, fima, pretrain\n"
        "def fit(method, *rest, **options):\n"
        "    path = original(method, *rest, **options)\n"
        "    torch.save(method.state_dict(), f'weights.{dist.get_rank()}')\n"
        "    return path\n"
        "original, pretrain.fit_in_folder = pretrain.fit_in_folder, fit\n"
        "cli.command_line(lambda: pretrain.main(fima.FIMA, fima.FIMAConfig, fima.PRESETS, ''))\n"
    )
    flags = ["--dataset", "synthetic", "--data", videos, "--epochs", 2, "--workers", 1, "--out", "run", *SMALL]
    done = torchrun("two.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (weights(tmp_path / f"weights.{rank}") for rank in range(2))
    assert same(first, second)
    assert same(first, weights(tmp_path / "run" / "checkpoint.pt")["model"])
    assert "4 × 2 = 8" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


def check_folder_trains(run, folder, batch_size):
    flags = ["--dataset", "folder", "--data", folder, "--epochs", 2, "--out", "run"]
    code, out, err = run(fima, *flags, "--batch_size", batch_size, dataset=None)
    assert code == 0, err
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 2 and "no labels" in out
    assert not (run.path / "run" / "bad_videos.log").exists()


@pytest.mark.slow
def test_real_clips_train(run):
    if not CLIPS.is_dir():
        pytest.skip("no real clips here")
    check_folder_trains(run, CLIPS, 5)


@pytest.mark.slow
def test_files_of_many_kinds_train(run):
    folder = run.path / "videos"
    folder.mkdir()
    long, short, odd = encoding.moving_texture(50), encoding.moving_texture(20), encoding.moving_texture(40, 49, 65)
    encoding.encode(folder / "a.avi", long, "mpeg4", bf="2")
    encoding.encode(folder / "b.mp4", short, "libx264")
    encoding.encode(folder / "c.webm", odd[:, :48, :64], "libvpx-vp9", deadline="realtime", cpu_used="8")
    encoding.encode(folder / "d.mp4", odd, "mpeg4")
    check_folder_trains(run, folder, 4)


@pytest.mark.slow
def test_too_many_unreadable_videos_stop_the_run_and_are_named(run, videos):
    tree = run.path / "tree"
    for n, path in enumerate(sorted((videos / "train").glob("*/*.mp4"))[:8]):
        (tree / "a").mkdir(parents=True, exist_ok=True)
        (tree / "a" / f"{n}.mp4").write_bytes(path.read_bytes() if n else b"")
    flags = [*conftest.CONV4, "--dataset", "folder", "--data", tree, "--out", "run", "--epochs", 2]
    code, _, err = run(moco, *flags, dataset=None)
    assert code == 2
    one_line(err, "--max_bad", "run/bad_videos.log says why", " by --exclude run/bad_videos.log")
    (run.path / "other bad.txt").write_text("a/7.mp4\n")
    code, _, err = run(moco, *flags[:-3], "again", "--exclude", "other bad.txt", dataset=None)
    assert code == 2 and err.endswith("--exclude 'other bad.txt,again/bad_videos.log'\n"), err
    listed = find.find_videos("folder", tree, True, exclude=shlex.split(err.partition("--exclude ")[2])[0])
    assert [os.path.basename(path) for path in listed.paths] == [f"{n}.mp4" for n in range(1, 7)]
    code, out, _ = run(moco, *flags, "--max_bad", 0.5, "--max_steps", 3, dataset=None)
    assert code == 0 and "unreadable" in out
    assert "0.mp4" in (run.path / "run" / "bad_videos.log").read_text()
    resume = ["--resume", "run/checkpoint.pt", "--exclude", "run/bad_videos.log", "--max_steps", 0, "--epochs", 4]
    code, _, err = run(moco, *flags, *resume, dataset=None)
    assert code == 2
    one_line(err, f"1 fewer ({'a/0.mp4'!r})", "--changed_data")
    code, out, _ = run(moco, *flags, *resume, "--changed_data", dataset=None)
    assert code == 0 and "goes on at the same part" in out and "1 of the 1 named in run/bad_videos.log" in out
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 4


def test_all_videos_unreadable_is_a_clear_error(run):
    tree = run.path / "tree"
    tree.mkdir()
    for n in range(8):
        (tree / f"{n}.mp4").write_bytes(b"not a video")
    code, _, err = run(moco, *conftest.CONV4, "--dataset", "folder", "--data", tree, dataset=None)
    assert code == 2
    one_line(err, "10 videos in a row", ".mp4")


def test_a_base_method_warns_of_collapse_where_it_logs_the_spread_of_features():
    method = pretrain.Method(pretrain.PretrainConfig(encoder="conv4", width=0.25, crop=32))
    assert method.warnings({"epoch": 2, "feature_std": 0.005}) and not method.warnings(
        {"epoch": 2, "feature_std": 0.05}
    )
    assert not method.warnings({"epoch": 2}) and not method.warnings({"epoch": 1, "feature_std": 0})
