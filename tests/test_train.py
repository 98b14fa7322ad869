"""The loop and the command line: resuming, several processes, logs, interrupts, and what the user is told."""

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import conftest
import encoding
import numpy as np
import pytest
import torch

import benchmark  # noqa: F401  its options are tried, too
import cli
import data
import evaluate
import fima
import find
import moco
import runs
import train
import visualize

ROOT, SMALL = Path(__file__).parents[1], [*conftest.SMALL, *conftest.DECODER]
CLIPS = Path(__file__).parents[2] / "shared" / "clips"


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equality, bit for bit, of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_two_steps_resumed_for_two_more_equal_four_steps_bit_for_bit(run):
    assert run(fima, "--epochs", 2, "--max_steps", 6, "--out", "whole")[0] == 0  # 4 steps an epoch
    assert run(fima, "--epochs", 2, "--max_steps", 3, "--out", "half")[0] == 0
    assert run(fima, "--resume", "half/checkpoint.pt", "--max_steps", 6, "--workers", 2, small=False)[0] == 0
    whole, half = (weights(run.path / name / "checkpoint.pt") for name in ("whole", "half"))
    assert whole["step"] == half["step"] == 6
    assert same(whole["model"], half["model"]) and same(whole["optimizer"], half["optimizer"])
    torch.manual_seed(0)
    fresh = fima.FIMA(fima.FIMAConfig(**whole["config"])).state_dict()
    assert not same(whole["model"]["encoder.stem.0.weight"], fresh["encoder.stem.0.weight"])  # and it did train
    lines = [json.loads(line) for line in (run.path / "half" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_run_folder_holds_config_command_versions_and_every_loss_with_its_chance(run):
    code, out, _ = run(fima, "--epochs", 1, "--log_every", 2, "--out", "run", "--lr", 0.1)
    assert code == 0
    (start,) = json.loads((run.path / "run" / "run.json").read_text())
    assert start["config"]["lr"] == 0.1 and start["config"]["epochs"] == 1  # explicit flags win over the preset
    assert "fima.py" in start["command"] and start["versions"] == train.versions()
    lines = [json.loads(line) for line in (run.path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss/{name}"] for name in ("vv", "pix", "fra")))
        assert line["chance/vv"] == pytest.approx(math.log(9)) and line["chance/pix"] > 0
        assert line["clips_per_s"] > 0 and 0 <= line["data_wait"] <= 1
    for name in start["config"]:
        assert name in out  # the settings are printed in full
    assert "chance" in out and "own other half" in out and "evaluate.py retrieve" in out


def test_the_overlap_of_windows_is_in_the_log_and_the_last_epochs_in_run_json_and_too_much_is_warned_of(run, videos):
    """The videos have 40 frames: of windows of 32, the two of a video share 7/8 or more of them, of 8 much less."""
    flags = [*conftest.CONV4, "--epochs", 3, "--log_every", 3, "--out", "run"]
    code, out, _ = run(fima, *flags, "--max_steps", 8, dataset="folder")
    assert code == 0 and out.count("share more than 80% of their frames") == 1
    listed = find.find_videos("folder", videos, True)
    views = data.PretrainingViews(listed, 32)

    def mean_of_epoch(epoch):
        keys = [key for keys in data.StepSampler(len(listed), 4, 3) for key in keys if key[0] == epoch]
        return float(np.mean([views[key]["overlap"] for key in keys]))

    def starts():
        return [start["overlap"] for start in json.loads((run.path / "run" / "run.json").read_text())]

    lines = [json.loads(line) for line in (run.path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert (3 * lines[0]["overlap"] + lines[1]["overlap"]) / 4 == pytest.approx(mean_of_epoch(0))
    assert starts() == [pytest.approx(mean_of_epoch(1))]
    assert run(fima, "--resume", "run/checkpoint.pt", small=False, dataset="folder")[0] == 0
    assert starts() == [pytest.approx(mean_of_epoch(1)), pytest.approx(mean_of_epoch(2))]
    code, out, _ = run(fima, *flags[:-1], "short", "--frames", 8, "--frame_stride", 1, dataset="folder")
    assert code == 0 and "of their frames" not in out
    code, out, _ = run(
        evaluate, "linear", "--checkpoint", "short/checkpoint.pt", "--epochs", 1, "--device", "cpu", dataset="folder"
    )
    assert code == 0
    (start,) = json.loads((run.path / "short" / "linear_folder" / "run.json").read_text())
    assert "overlap" not in start and "of their frames" not in out


def test_learning_rate_is_a_half_cosine_per_step_scaled_with_the_total_batch():
    config = train.TrainConfig(lr=0.04, epochs=100)
    rates = [config.learning_rate(64, epoch) for epoch in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[50] == pytest.approx(0.005) and rates[100] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)
    assert config.learning_rate(24, 0) == pytest.approx(0.00375)


def test_a_checkpoint_of_synchronised_batch_norm_is_refused_in_one_line_and_goes_on_with_another(run):
    flags = [*conftest.CONV4, "--epochs", 2, "--out", "run"]
    assert run(fima, *flags, "--max_steps", 2, dataset="folder")[0] == 0
    path = run.path / "run" / "checkpoint.pt"
    state = weights(path)
    state["config"]["bn"] = "sync"  # which there was
    torch.save(state, path)
    code, _, err = run(fima, "--resume", path, small=False, dataset=None)
    assert code == 2 and err == f"error: {path} was made with --bn sync: choose from shuffle, local\n"
    model, _ = visualize.load_decoder(visualize.FigureConfig(device="cpu"), [str(path)])
    assert all(same(value, state["model"][f"encoder.{name}"]) for name, value in model.encoder.state_dict().items())
    code, out, _ = run(fima, "--resume", path, "--bn", "shuffle", "--max_steps", 3, small=False, dataset="folder")
    assert code == 0 and "--bn shuffle (was sync)" in out


def test_moco_trains_with_the_same_command_line(run):
    code, out, _ = run(moco, "--epochs", 1, "--losses", "vv,vd", "--max_steps", 2)
    assert code == 0 and "vd" in out


def test_ctrl_c_saves_and_says_how_to_go_on(run, monkeypatch):
    rate = train.TrainConfig.learning_rate

    def press(config, total_batch, epoch):
        if epoch == 1.25:  # step 5 of 4 an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, total_batch, epoch)

    monkeypatch.setattr(train.TrainConfig, "learning_rate", press)
    code, out, _ = run(fima, "--epochs", 1000, "--out", "run")
    monkeypatch.undo()
    assert code == 130 and "--resume run/checkpoint.pt" in out
    step = weights(run.path / "run" / "checkpoint.pt")["step"]
    assert step == 6
    code, out, _ = run(fima, "--resume", "run/checkpoint.pt", "--max_steps", step + 1, small=False)
    assert code == 0 and f"resumed after step {step}" in out


@pytest.mark.parametrize(
    ("major", "torch_version", "auto"), [(7, "2.14.1", False), (8, "2.14.1", True), (9, "2.10.0", False)]
)
def test_auto_takes_bf16_where_the_gpu_computes_in_it_and_does_not_emulate_it(major, torch_version, auto, monkeypatch):
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
    process = train.Process(0, 1, torch.device("cuda"))
    assert train.autocast_bf16(train.TrainConfig(), process) is auto
    assert not train.autocast_bf16(train.TrainConfig(precision="float32"), process)
    assert train.autocast_bf16(train.TrainConfig(precision="bf16"), process)  # who asks for it gets it


BAD_INPUT = {
    "no folder": (fima, ["--dataset", "ucf101", "--data", "nowhere"], ["nowhere", "ucfTrainTestlist"]),
    "empty folder": (fima, ["--dataset", "folder", "--data", "."], ["folder", "no videos"]),
    "unknown value": (fima, ["--encoder", "resnet"], ["--encoder", "i3d"]),
    "unknown flag": (fima, ["--epoch", "3"], ["--epoch"]),
    "unknown loss": (fima, ["--losses", "vv,pixel"], ["--losses", "pix"]),
    "not a number": (fima, ["--lr", "fast"], ["--lr"]),
    "crop too small": (fima, ["--encoder", "i3d", "--crop", "32"], ["--crop 32", "64"]),
    "batch of 0": (fima, ["--batch_size", "0"], ["--batch_size 0"]),
    "negative rate": (fima, ["--lr", "-1"], ["--lr -1", "0 to 1e+06"]),
    "rate that is no number": (fima, ["--lr", "nan"], ["--lr nan"]),
    "negative seed": (fima, ["--seed", "-1"], ["--seed -1"]),
    "too many epochs": (fima, ["--epochs", 10**20], ["--epochs 1000", "1 to 1000000"]),
    "endless wait": (fima, ["--timeout", "1e15"], ["--timeout", "1000000"]),
    "share above 1": (fima, ["--max_bad", "1.5"], ["--max_bad 1.5", "0 to 1"]),
    "no width": (fima, ["--width", "0"], ["--width 0"]),
    "bf16 on a CPU": (fima, ["--precision", "bf16", "--device", "cpu", "--batch_size", "4"], ["bf16", "GPU"]),
    "no clips": (evaluate, ["retrieve", "--clips", "0"], ["--clips 0"]),
    "no compiler": (fima, ["--compile", "on"], ["--compile on", "nowhere/c++"]),
    "no checkpoint": (fima, ["--resume", "nowhere.pt"], ["nowhere.pt"]),
    "a name of two lines": (
        fima,
        ["--dataset", "folder", "--data", "\x1b[31mno\nwhere\udcff"],
        [r"\x1b[31mno\nwhere\udcff:"],
    ),
    "no CUDA": (fima, ["--device", "cuda"], ["CUDA"]),
    "no protocol": (evaluate, ["linearise"], ["retrieve"]),
    "no checkpoint to evaluate": (evaluate, ["retrieve", "--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, run, monkeypatch):
    script, flags, says = BAD_INPUT[case]
    monkeypatch.setenv("CXX", "nowhere/c++")
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    dataset = "synthetic" if case == "bf16 on a CPU" else None
    code, _, err = run(script, *flags, dataset=dataset, small=False)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in says), err


def below(config: type) -> list[type]:
    return [
        config,
        *(found for each in config.__subclasses__() if each.__module__ in sys.modules for found in below(each)),
    ]


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


def test_a_run_is_not_overwritten(run):
    assert run(fima, "--max_steps", 1, "--out", "run")[0] == 0
    before = (run.path / "run" / "log.jsonl").read_text()
    assert run(moco, "--max_steps", 1, "--out", "other")[0] == 0
    for script, flags in ((fima, ["--out", "run"]), (moco, ["--resume", "other/checkpoint.pt", "--out", "run"])):
        code, _, err = run(script, "--max_steps", 2, *flags)
        assert code == 2 and "--resume run/checkpoint.pt" in err and err.count("\n") == 1
        assert (run.path / "run" / "log.jsonl").read_text() == before


def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    name = str(tmp_path / "runs" / "moco")
    assert [runs.unused_folder(name) for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]


def test_what_to_do_next_can_be_pasted(run):
    _, out, _ = run(moco, "--max_steps", 1, "--out", "a run")
    command = next(line for line in out.splitlines() if "evaluate.py retrieve" in line)
    assert shlex.split(command, comments=True)[-1] == "a run/checkpoint.pt"


def test_a_damaged_record_of_a_run_is_named(run):
    assert run(moco, "--max_steps", 1, "--out", "run")[0] == 0
    (run.path / "run" / "run.json").write_text("")
    code, _, err = run(moco, "--resume", "run/checkpoint.pt", "--max_steps", 2)
    assert code == 2 and "run/run.json is damaged" in err and err.count("\n") == 1


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


def test_the_largest_seed_trains(run):
    code, _, err = run(moco, "--seed", 2**31 - 1, "--max_steps", 2, "--out", "run")
    assert code == 0, err


def test_resuming_with_other_batches_goes_on_at_the_same_part_of_the_schedule(run):
    assert run(fima, "--epochs", 2, "--max_steps", 4, "--out", "run")[0] == 0  # of 4 steps an epoch
    (run.path / "run" / "log.jsonl").write_text(
        '{"step": 4, "epoch": 1.0}\n\n{"step": 4, "lo'
    )  # a kill may cut the last line
    flags = ["--resume", "run/checkpoint.pt", "--batch_size", 2, "--max_steps", 9]  # of 9 steps an epoch
    code, out, _ = run(fima, *flags, small=False)
    assert code == 0 and "resumed after step 9" not in out and "nothing left" in out and "note:" in out
    code, out, _ = run(fima, *flags[:-1], 10, small=False)
    assert code == 0 and "resumed after step 9" in out
    assert [json.loads(line)["step"] for line in (run.path / "run" / "log.jsonl").open()] == [4, 10]


def test_a_larger_batch_forgets_nothing_that_was_logged(run):
    flags = ["--epochs", 2, "--batch_size", 2, "--log_every", 3, "--max_steps", 9, "--out", "run"]  # 9 steps an epoch
    assert run(moco, *flags)[0] == 0
    code, out, _ = run(moco, "--resume", "run/checkpoint.pt", "--batch_size", 4, "--max_steps", 5, small=False)
    assert code == 0 and "resumed after step 4" in out and "--batch_size 4 (was 2)" in out
    assert [json.loads(line)["step"] for line in (run.path / "run" / "log.jsonl").open()] == [3, 6, 9, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_two_saves_once_for_all(number, videos, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(ROOT / "fima.py"),
    ]
    flags = ["--dataset", "synthetic", "--data", str(videos), "--epochs", "9999", "--workers", "1", "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        [*command, *flags, *SMALL, "--log_every", "2"],
        cwd=tmp_path,
        env=environment,
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


def test_checkpoints_that_do_not_fit_are_refused(run):
    assert run(fima, "--max_steps", 1, "--out", "run")[0] == 0
    for flags, says in (
        (["--width", 0.125], "was trained with --width 0.0625, not 0.125"),
        (["--encoder", "i3d", "--crop", 64], "was trained with --encoder r3d_18, not i3d"),
    ):
        code, _, err = run(fima, "--resume", "run/checkpoint.pt", *flags, small=False)
        assert code == 2 and says in err and err.count("\n") == 1, err
    code, _, err = run(moco, "--resume", "run/checkpoint.pt", small=False)
    assert code == 2 and "FIMA" in err and "MoCo" in err
    (run.path / "cut.pt").write_bytes((run.path / "run" / "checkpoint.pt").read_bytes()[:1000])
    torch.save({"state_dict": {}}, run.path / "other.pt")
    for name in ("cut.pt", "other.pt"):
        code, _, err = run(fima, "--resume", name, small=False)
        assert code == 2 and name in err and err.count("\n") == 1, err


def check_folder_trains(run, folder, batch_size):
    flags = ["--dataset", "folder", "--data", folder, "--epochs", 2, "--out", "run"]
    code, out, err = run(fima, *flags, "--batch_size", batch_size, dataset=None)
    assert code == 0, err
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 2 and "no labels" in out
    assert not (run.path / "run" / "bad_videos.log").exists()


def test_real_clips_train(run):
    if not CLIPS.is_dir():
        pytest.skip("no real clips here")
    check_folder_trains(run, CLIPS, 5)


def test_files_of_many_kinds_train(run):
    folder = run.path / "videos"
    folder.mkdir()
    long, short, odd = encoding.moving_texture(50), encoding.moving_texture(20), encoding.moving_texture(40, 49, 65)
    encoding.encode(folder / "a.avi", long, "mpeg4", bf="2")
    encoding.encode(folder / "b.mp4", short, "libx264")
    encoding.encode(folder / "c.webm", odd[:, :48, :64], "libvpx-vp9", deadline="realtime", cpu_used="8")
    encoding.encode(folder / "d.mp4", odd, "mpeg4")
    check_folder_trains(run, folder, 4)


def test_too_many_unreadable_videos_stop_the_run_and_are_named(run, videos):
    tree = run.path / "tree"
    for n, path in enumerate(sorted((videos / "train").glob("*/*.mp4"))[:8]):
        (tree / "a").mkdir(parents=True, exist_ok=True)
        (tree / "a" / f"{n}.mp4").write_bytes(path.read_bytes() if n else b"")
    flags = ["--dataset", "folder", "--data", tree, "--out", "run", "--epochs", 2]
    code, _, err = run(fima, *flags, dataset=None)
    assert code == 2 and "max_bad" in err and "bad_videos.log names them" in err
    assert err.endswith(" by --exclude run/bad_videos.log\n")
    (run.path / "other bad.txt").write_text("a/7.mp4\n")
    code, _, err = run(fima, *flags[:-3], "again", "--exclude", "other bad.txt", dataset=None)
    assert code == 2 and err.endswith("--exclude 'other bad.txt,again/bad_videos.log'\n"), err
    listed = find.find_videos("folder", tree, True, exclude=shlex.split(err.partition("--exclude ")[2])[0])
    assert [Path(path).name for path in listed.paths] == [f"{n}.mp4" for n in range(1, 7)]
    code, out, _ = run(fima, *flags, "--max_bad", 0.5, "--max_steps", 3, dataset=None)
    assert code == 0 and "unreadable" in out
    assert "0.mp4" in (run.path / "run" / "bad_videos.log").read_text()
    resume = ["--resume", "run/checkpoint.pt", "--exclude", "run/bad_videos.log", "--max_steps", 0, "--epochs", 4]
    code, _, err = run(fima, *flags, *resume, dataset=None)
    assert code == 2 and f"1 fewer ({'a/0.mp4'!r})" in err.splitlines()[-1] and "--changed_data" in err
    code, out, _ = run(fima, *flags, *resume, "--changed_data", dataset=None)
    assert code == 0 and "goes on at the same part" in out and "1 of the 1 named in run/bad_videos.log" in out
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 4


def test_all_videos_unreadable_is_a_clear_error(run):
    tree = run.path / "tree"
    tree.mkdir()
    for n in range(8):
        (tree / f"{n}.mp4").write_bytes(b"not a video")
    code, _, err = run(fima, "--dataset", "folder", "--data", tree, dataset=None)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: 10 videos in a row") and ".mp4" in last, err
    assert "Traceback" not in err


def test_two_processes_end_with_identical_weights(videos, tmp_path):
    program = (
        "import sys, torch, torch.distributed as dist, moco, fima, train\n"
        "def fit(method, *rest, **options):\n"
        "    path = original(method, *rest, **options)\n"
        "    torch.save(method.state_dict(), sys.argv[0] + f'.{dist.get_rank()}')\n"
        "    return path\n"
        "original, moco.fit = moco.fit, fit\n"
        "sys.argv[0] = 'weights'\n"
        "train.command_line(lambda: pretrain.main(fima.FIMA, fima.FIMAConfig, fima.PRESETS, ''))\n"
    )
    (tmp_path / "two.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "two.py"]
    flags = ["--dataset", "synthetic", "--data", str(videos), "--epochs", "2", "--workers", "1", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags, *SMALL], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (weights(tmp_path / f"weights.{rank}") for rank in range(2))
    assert same(first, second)
    assert same(first, weights(tmp_path / "run" / "checkpoint.pt")["model"])
    assert "4 × 2 = 8" in done.stdout


def test_a_script_runs_from_any_folder_and_help_teaches(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "fima.py", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for name in fima.FIMAConfig.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    assert "torchrun --nproc_per_node=8 fima.py --dataset k400" in done.stdout and "k400:" in done.stdout
