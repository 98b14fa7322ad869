"""What a run survives: kills, full disks, damaged checkpoints, losses that are not finite, and lost processes."""

import ast
import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import pty
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from random import Random

import pytest
import torch
from helpers import ALONE, ROOT, free_port, one_line, same, weights
from helpers import lines as log

import cli
import data
import evaluate
import fima
import moco
import pretrain
import processes
import runs
import train
import visualize

QUICK = ["--encoder=conv4", "--width=0.25", "--crop=32"]
TINY = [*QUICK, "--dataset=synthetic", "--queue=8", "--decoder_width=32", "--device=cpu", "--batch_size=2"]
TINY += ["--workers=0", "--log_every=3"]
STATE = dict(method="M", config={}, model={}, optimizer={}, step=1, steps_per_epoch=1, world_size=1)


# ---------------------------------------------------------------------------------------------------------------------
# Runs in processes of their own, forked from one that has imported everything and done nothing
# ---------------------------------------------------------------------------------------------------------------------


def kill_at_line(count: int, within: tuple[str, ...]) -> None:
    """Kills this process at the count-th line that it comes to in train.py and runs.py, or in these functions there."""
    lines, own, files = iter(range(1, count)), os.getpid(), (train.__file__, runs.__file__)

    def at_line(_frame, event, _argument):
        if event == "line" and os.getpid() == own and next(lines, None) is None:  # loader workers inherit the trace
            os.kill(own, signal.SIGKILL)
        return at_line

    def at_call(frame, _event, _argument):
        code = frame.f_code
        return at_line if code.co_filename in files and (not within or code.co_name in within) else None

    sys.settrace(at_call)


def live(
    folder: str,
    flags: list[str],
    environment: dict,
    kill: tuple,
    file_size: int,
    at_step_6: str,
    output: str,
    closed: str,
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if str(number) in closed:  # as a shell's 2>&- leaves it
            os.close(number)
            setattr(sys, name, None)
    torch.set_num_threads(1)
    sys.argv = ["fima.py", *flags]
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    fit, step = runs.fit, train.Run.step

    def watched_fit(*arguments, **options):
        if kill:
            kill_at_line(*kill)
        return fit(*arguments, **options)

    def watched_step(run, batch):
        result = step(run, batch)
        if run.done == 6 and at_step_6 == "spoil":
            run.method.head.net[2].bias.data[0] += 1e-6
        elif run.done == 6 and at_step_6:
            os.kill(os.getpid(), signal.Signals[at_step_6])
        return result

    runs.fit, evaluate.first_look = watched_fit, lambda *_: None
    train.Run.step = watched_step
    cli.command_line(lambda: pretrain.main(fima.FIMA, fima.FIMAConfig, fima.PRESETS, ""))


def start(folder, *flags, environment=None, kill=(), file_size=0, at_step_6="", output="", closed=""):
    """A run of fima.py in its own process: killed in `fit` (see `kill_at_line`), unable to write files above file_size
    bytes, or spoiling a weight ("spoil") or sending itself a signal after step 6. It writes to out0.txt, or `output`,
    or where "1" and "2" are `closed` to nothing.
    """
    output = output or f"out{(environment or {}).get('RANK', 0)}.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reliability", "torch.utils.tensorboard"])
    flags = [str(flag) for flag in flags]
    arguments = str(folder), flags, environment or {}, kill, file_size, at_step_6, output, closed
    process = context.Process(target=live, args=arguments)
    process.start()
    return process


def finish(process, folder, rank=0, seconds=300):
    """Exit code (−N for signal N) and output of a process that was started."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, (folder / f"out{rank}.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """A run of four epochs of 9 steps that nothing disturbs: its folder, and flags to repeat it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = [*TINY, "--data", videos, "--epochs", "4", "--out", "run"]
    code, out = finish(start(folder, *flags), folder)
    assert code == 0, out
    return folder / "run", flags


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    """Ten kills at random lines, every second one while a checkpoint is written, all with a loader's worker.

    A moment within a step of the method is like one at the line that calls it: nothing on disk tells them apart.
    """
    expected, flags = undisturbed
    flags = [*flags, "--workers", "1", "--save_minutes", "0"]
    random, steps = Random(0), set()
    for life in range(10):
        saving = ("save", "save_checkpoint")
        kill = (random.randint(1, 40), saving) if life % 2 else (random.randint(1, 450), ())
        code, out = finish(start(tmp_path, *flags, "--resume", "auto", kill=kill), tmp_path)
        assert code == -signal.SIGKILL, out
        saved = tmp_path / "run" / "checkpoint.pt"
        steps.add(weights(saved)["step"] if saved.exists() else 0)
    assert len(steps) > 3 and any(step % 9 for step in steps)  # they struck at different places, in mid-epoch, too
    code, out = finish(start(tmp_path, *flags, "--resume", "auto"), tmp_path)
    assert code == 0, out
    for name in ("model", "optimizer", "step"):
        assert same(*(weights(folder / "checkpoint.pt")[name] for folder in (expected, tmp_path / "run"))), name
    assert log(tmp_path / "run") == log(expected)


@pytest.mark.slow
def test_a_run_whose_terminal_hangs_up_is_saved_and_goes_on_as_if_nothing_had_been(undisturbed, tmp_path):
    expected, flags = undisturbed
    code, out = finish(start(tmp_path, *flags, at_step_6="SIGHUP"), tmp_path)
    assert code == 128 + signal.SIGHUP and "--resume run/checkpoint.pt" in out, out
    assert weights(tmp_path / "run" / "checkpoint.pt")["step"] == 6  # of 9 in an epoch
    assert finish(start(tmp_path, *flags, "--resume", "auto"), tmp_path)[0] == 0
    assert same(*(weights(folder / "checkpoint.pt")["model"] for folder in (expected, tmp_path / "run")))


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_ends_and_is_saved(undisturbed, tmp_path):
    """No signal comes where it is not the terminal's own; to write there fails."""
    terminal, end = pty.openpty()
    flags = [*undisturbed[1], "--epochs", "9999", "--workers", "1"]
    process = start(tmp_path, *flags, output=os.ttyname(end))
    out = b""
    while b"epoch 1/" not in out and process.is_alive():
        if select.select([terminal], [], [], 1)[0]:
            out += os.read(terminal, 1024)
    assert process.is_alive(), out.decode()
    os.close(terminal)
    os.close(end)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGHUP
    saved = weights(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved >= 9 and log(tmp_path / "run")[-1]["step"] == saved


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.noted_signals(ALONE) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
        with pytest.raises(SystemExit) as stop:
            cli.command_line(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert stop.value.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def broken_pipe():
    """A stream that nobody reads, as before `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


@pytest.mark.slow
def test_a_run_whose_streams_are_closed_ends_as_if_they_were_not(undisturbed, tmp_path):
    expected, flags = undisturbed
    assert finish(start(tmp_path, *flags, closed="2"), tmp_path)[0] == 0
    assert same(*(weights(folder / "checkpoint.pt")["model"] for folder in (expected, tmp_path / "run")))
    assert log(tmp_path / "run") == log(expected)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "| head -1"])
def test_an_evaluation_that_nobody_reads_writes_its_result(streams, videos, tmp_path):
    flags = [*QUICK, f"--data={videos}", "--device=cpu", "--clips=2", "--workers=1", f"--out={tmp_path / 'k.json'}"]
    command = shlex.join([sys.executable, str(ROOT / "evaluate.py"), "knn", *flags])
    subprocess.run(f"{command} {streams}", shell=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "k.json").read_text())["result"]["test_videos"] == 10


class Gone(io.TextIOWrapper):
    """A terminal that is gone."""

    def write(self, _text):
        raise OSError(errno.EIO, "Input/output error")


def test_output_that_nobody_reads_is_lost_and_the_end_of_a_terminal_ends_a_command(broken_pipe, monkeypatch):
    for stream, ends in ((broken_pipe, False), (Gone(open(os.devnull, "wb")), True)):  # noqa: SIM115
        steps = []
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            cli.command_line(lambda steps=steps: [(steps.append(n), print(n, flush=True)) for n in range(9)])
        assert (stop.value.code, len(steps)) == ((130, 1) if ends else (0, 9))


def test_a_check_that_nobody_reads_goes_on_and_one_whose_terminal_is_gone_keeps_its_list(
    broken_pipe, tmp_path, monkeypatch
):
    (tmp_path / "bad.mp4").touch()
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(tmp_path), "--out", str(tmp_path / "bad.txt")])
    for stream, code in ((broken_pipe, 1), (Gone(open(os.devnull, "wb")), 130)):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as stop:
            cli.command_line(data.main)
        assert stop.value.code == code
        assert (tmp_path / "bad.txt").read_text() == ("'bad.mp4'\tempty\n" if code == 1 else "")
        assert not multiprocessing.active_children()
        (tmp_path / "bad.txt").unlink()


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_spoils_nothing(undisturbed, tmp_path):
    expected, flags = undisturbed
    assert finish(start(tmp_path, *flags, "--max_steps", "9"), tmp_path)[0] == 0
    saved = tmp_path / "run" / "checkpoint.pt"
    resume = [*flags, "--resume", saved]
    code, out = finish(start(tmp_path, *resume, file_size=saved.stat().st_size // 2), tmp_path)
    last = out.splitlines()[-1]
    assert code == 2 and last.startswith("error: step 18 cannot be saved: File too large"), out
    assert "run/checkpoint.pt still holds the checkpoint before" in last
    assert weights(saved)["step"] == 9 and not list(saved.parent.glob("*.partial"))
    assert finish(start(tmp_path, *resume), tmp_path)[0] == 0
    assert same(weights(saved)["model"], weights(expected / "checkpoint.pt")["model"])


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, STATE)

    def fail(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(train.UserError, match=r"step 2 cannot be saved: No space left on device; .* still holds"):
        train.save_checkpoint(path, STATE | {"step": 2})
    assert runs.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(run):
    (run.path / "file").write_text("")
    code, _, err = run(fima, "--out", "file/run")
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "file/run" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_weights_whatever_the_number_of_workers(workers, undisturbed, tmp_path):
    expected, flags = undisturbed
    flags = [*flags, "--workers", workers, "--deterministic"]
    assert finish(start(tmp_path, *flags), tmp_path)[0] == 0
    assert same(*(weights(folder / "checkpoint.pt")["model"] for folder in (expected, tmp_path / "run")))
    assert weights(tmp_path / "run" / "checkpoint.pt")["config"]["deterministic"] == "on"


def test_deterministic_is_passed_on_to_torch():
    processes.start_process("cpu", deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights: torch alone would not notice
    path.write_bytes(content)


@pytest.mark.slow
def test_resume_auto_takes_the_furthest_readable_checkpoint_of_the_run_that_is_asked_for(run):
    flags = [*QUICK, "--epochs", 2]

    def auto(*more):
        code, out, err = run(fima, *flags, "--resume", "auto", *more)
        assert code == 0, err
        return out

    out = auto("--max_steps", 1)
    assert "no checkpoint of FIMA" in out and "starts anew" in out
    (first,) = (run.path / "runs").iterdir()
    assert run(fima, *flags, "--max_steps", 7, "--keep_every", 1, "--out", "runs/b")[0] == 0
    assert run(moco, *flags, "--max_steps", 8, "--out", "runs/c")[0] == 0  # of another method
    for path in (first / "checkpoint.pt", run.path / "runs" / "b" / "epoch_0001.pt"):
        os.utime(path)  # newer, as of a copy, or where a clock has jumped
    assert "found runs/b/checkpoint.pt, step 7" in auto("--max_steps", 2)
    flip_a_byte(run.path / "runs" / "b" / "checkpoint.pt")
    (run.path / "runs" / "b" / "epoch_0002.pt").symlink_to("nowhere")
    code, _, err = run(fima, "--resume", "runs/b/checkpoint.pt", small=False)
    assert code == 2 and "damaged" in err and "beside it lie epoch_0001.pt" in err and err.count("\n") == 1
    out = auto("--max_steps", 5)
    assert "passes over a checkpoint: runs/b/checkpoint.pt is damaged" in out
    assert "found runs/b/epoch_0001.pt, step 4" in out and "resumed after step 4" in out
    assert weights(run.path / "runs" / "b" / "checkpoint.pt")["step"] == 5
    assert f"found {first}/checkpoint.pt, step 1" in auto("--max_steps", 2, "--out", first)


@pytest.mark.slow
def test_resume_auto_passes_over_another_run_and_says_what_differs(run, videos):
    """Each of the options that define a result, by what was given or by default, and the videos."""
    (run.path / "moved").symlink_to(videos)
    shutil.copytree(videos, other := run.path / "other")
    shutil.move(next((other / "train").glob("*/*.mp4")), run.path / "away.mp4")
    assert run(fima, *QUICK, "--seed", 5, "--max_steps", 2, "--out", "runs/a")[0] == 0
    before = (run.path / "runs" / "a" / "log.jsonl").read_text()
    for flags, says in (
        ([], "another run is in runs/a: --seed 5, not 0"),
        (["--seed", 5, "--losses", "vv", "--width", 0.125], "--width 0.25, not 0.125, --losses vv,pix,fra, not vv"),
        (["--seed", 5, "--lr", 1], "--lr 0.04, not 1.0"),
        (["--seed", 5, "--data", other], "another run is in runs/a: videos: 1 fewer ('train/"),
    ):
        data = [] if "--data" in flags else ["--data", videos]
        flags = ["--dataset", "synthetic", *data, *flags, "--max_steps", 1, "--resume", "auto"]
        code, out, err = run(fima, *QUICK, *flags, dataset=None)
        assert code == 0 and says in out and "starts anew" in out, (out, err)
    assert (run.path / "runs" / "a" / "log.jsonl").read_text() == before
    flags = [*QUICK, "--dataset", "synthetic", "--data", "moved", "--seed", 5, "--max_steps", 3, "--resume", "auto"]
    code, out, err = run(fima, *flags, "--log_every", 1, dataset=None)  # what defines nothing may be other
    assert code == 0 and "found runs/a/checkpoint.pt, step 2" in out and "run folder runs/a" in out, (out, err)
    path = run.path / "runs" / "a" / "checkpoint.pt"
    shutil.copy(path, path.with_name("epoch_0001.pt"))
    assert run(fima, "--resume", "runs/a/checkpoint.pt", "--lr", 1, "--max_steps", 4, small=False)[0] == 0
    assert "starts anew" in run(fima, *flags, dataset=None)[1]  # and does not write over what went on from there
    assert weights(path)["step"] == 4
    torch.save({name: value for name, value in weights(path).items() if name != "seen"}, path)  # as older code left it
    assert f"runs/a: --data {videos}, not moved" in run(fima, *flags, "--out", "runs/a", dataset=None)[1]
    code, _, err = run(fima, *QUICK, "--seed", 6, "--out", "runs/a", "--resume", "auto")
    assert code == 2 and "runs/a holds a run already" in err and err.count("\n") == 1


def test_a_checkpoint_of_the_conv4_of_old_is_refused_wherever_one_is_taken(run):
    path = run.path / "runs" / "old" / "checkpoint.pt"
    assert run(fima, "--max_steps", 1, "--out", path.parent, *QUICK)[0] == 0
    state = weights(path)
    names = {name: name.replace("encoder.layers.1.weight", "encoder.units.0.conv3d.weight") for name in state["model"]}
    train.save_checkpoint(path, state | {"model": {names[name]: value for name, value in state["model"].items()}})
    for script, *words in (
        (fima, "--resume", path),
        (evaluate, "retrieve", "--checkpoint", path),
        (evaluate, "linear", "--resume", path),
        (evaluate, "export", "--checkpoint", path),
    ):
        code, _, err = run(script, *words, small=False, dataset=None)
        assert code == 2 and err.count("\n") == 1 and f"{path} is of conv4 before" in err
    with pytest.raises(train.UserError, match="is of conv4 before"):
        visualize.load_models(visualize.FigureConfig(), [str(path)])
    code, out, _ = run(fima, "--resume", "auto", "--max_steps", 1, *QUICK)
    assert code == 0 and f"passes over a checkpoint: runs/old/{path.name} is of conv4 before" in out


def test_a_run_from_before_there_was_an_option_goes_on_with_its_default(run):
    path = run.path / "run" / "checkpoint.pt"
    assert run(fima, "--max_steps", 2, "--out", "run")[0] == 0
    state = weights(path)
    assert state["config"].pop("fame") == "none"
    state["config"]["centres"] = "nominal"  # which is no option any more
    train.save_checkpoint(path, state)
    assert run(fima, "--resume", path, "--max_steps", 4, small=False)[0] == 0
    assert weights(path)["config"]["fame"] == "none"


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_never_runs(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(STATE | {"step": Code()}, tmp_path / "code.pt")
    with pytest.raises(train.UserError, match=r"code\.pt.*holds code, which is never run"):
        runs.load_checkpoint(tmp_path / "code.pt")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_unpickled(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not {"pickle", "dill", "joblib", "shelve"} & {alias.name for alias in node.names}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("allow_pickle", "False") == "False"
            assert ast.unparse(node.func) == "np.load" or options.get("weights_only") == "True"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def break_steps(monkeypatch, calls, how):
    """Spoils the loss of some forwards; returns the list of state dicts before each forward."""
    forward, states = fima.FIMA.forward, []

    def broken(method, views):
        states.append({name: value.clone() for name, value in method.state_dict().items()})
        losses = forward(method, views)
        if len(states) in calls:
            zero = (method.head.net[0].weight * 0).sum()
            losses["vv"] = losses["vv"] + {"loss": zero * math.nan, "gradient": zero.abs().sqrt()}[how]
        return losses

    monkeypatch.setattr(fima.FIMA, "forward", broken)
    return states


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(how, run, monkeypatch):
    break_steps(monkeypatch, {6}, how)
    code, _, err = run(fima, "--epochs", 2, "--out", "run", *QUICK)  # of 4 steps
    last = err.splitlines()[-1]
    assert code == 2 and "not finite, step 6: vv" in last and "norm of the gradient nan" in last, err
    assert ("vv nan" in last) == (how == "loss") and last.count(".mp4'") == 4
    assert weights(run.path / "run" / "checkpoint.pt")["step"] == 4
    assert [line["step"] for line in log(run.path / "run")] == [4]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_can_be_left_out(how, run, monkeypatch):
    states = break_steps(monkeypatch, {3}, how)
    code, out, _ = run(fima, "--epochs", 2, "--on_nan", "skip", "--log_every", 1, "--out", "run", *QUICK)
    assert code == 0 and "left out: step 3: vv" in out and "1 steps left out" in out
    assert same(states[2], states[3]) and not same(states[1], states[2])
    counts = [(line["step"], line["skipped_steps"]) for line in log(run.path / "run")]
    assert counts == [(1, 0), (2, 0), (4, 1), (5, 0), (6, 0), (7, 0), (8, 0)]
    assert all(value.isfinite().all() for value in weights(run.path / "run" / "checkpoint.pt")["model"].values())


@pytest.mark.slow
def test_leaving_out_step_after_step_stops_the_run(run, monkeypatch):
    break_steps(monkeypatch, set(range(6, 99)), "loss")
    code, _, err = run(fima, "--epochs", 20, "--on_nan", "skip", "--out", "run", *QUICK)
    assert code == 2 and "10 steps in a row were left out, and now step 16: vv nan" in err.splitlines()[-1]
    assert weights(run.path / "run" / "checkpoint.pt")["skipped_steps"] == 4  # of the epoch that ended at step 12


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def start_two(folder, *flags, at_step_6=""):
    """Two processes of a run without a launcher, in epochs of 4 steps; something may befall the second after step 6."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        start(folder, *flags, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, at_step_6=fault)
        for rank, fault in enumerate(("", at_step_6))
    ]


def leave_at_once() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.distributed.all_gather([torch.empty(1 << 22)], torch.ones(1 << 22), async_op=True)
    processes.end_process()


@pytest.mark.slow
def test_a_process_leaves_while_a_thread_still_holds_tensors():
    """On torch 2.6 and 2.7 the thread waited for Python's lock, held by what waited for the thread."""
    process = multiprocessing.get_context("forkserver").Process(target=leave_at_once)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("at_step_6", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_hangs_ends_the_others_with_a_message(at_step_6, undisturbed, tmp_path):
    timeout = ["--timeout", "0.3"] if at_step_6 == "SIGSTOP" else []  # a death is noticed at once
    first, second = start_two(tmp_path, *undisturbed[1], *timeout, at_step_6=at_step_6)
    try:
        code, out = finish(first, tmp_path)
    finally:
        second.kill()
    last = out.splitlines()[-1]
    assert code == 1 and "error: process 0 has lost another one" in last and "--resume auto" in last, out
    assert "if there is one" in last
    assert "Traceback" not in out and weights(tmp_path / "run" / "checkpoint.pt")["step"] == 4


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_as_if_nothing_had_been_and_one_alone_says_what_differs(undisturbed, tmp_path):
    flags = undisturbed[1]
    for process in start_two(whole := tmp_path / "whole", *flags):
        assert finish(process, whole)[0] == 0
    (record,) = json.loads((whole / "run" / "run.json").read_text())
    lines = [json.loads(line) for line in (whole / "run" / "log.jsonl").read_text().splitlines()]
    last = [line["overlap"] for line in lines if line["epoch"] > lines[-1]["epoch"] - 1]
    assert min(last) <= record["overlap"] <= max(last)  # the last epoch's mean
    first, second = start_two(broken := tmp_path / "broken", *flags, at_step_6="SIGKILL")
    assert (finish(first, broken)[0], finish(second, broken)[0]) == (1, -signal.SIGKILL)
    shutil.copytree(broken, alone := tmp_path / "alone")
    for process in start_two(broken, *flags, "--resume", "auto"):
        assert finish(process, broken)[0] == 0
    for name in ("model", "optimizer", "step"):
        assert same(*(weights(folder / "run" / "checkpoint.pt")[name] for folder in (whole, broken))), name
    code, out = finish(start(alone, *flags, "--resume", "auto"), alone)
    assert code == 0 and "saved by 2 processes with 4 steps an epoch, now it is 1 with 9" in out, out
    state = weights(alone / "run" / "checkpoint.pt")
    assert (state["step"], state["world_size"]) == (36, 1)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.slow
def test_two_nodes_need_no_common_disk(undisturbed, videos, tmp_path):
    """The second has no place for a run folder; what it cannot read is named in the first one's."""
    port = free_port()
    tree = tmp_path / "tree"
    for n, path in enumerate(sorted((videos / "train").glob("*/*.mp4"))):
        tree.mkdir(exist_ok=True)
        (tree / f"{n}.mp4").write_bytes(path.read_bytes() if n % 9 else b"")
    flags = [*undisturbed[1], "--dataset", "folder", "--data", tree, "--epochs", "2", "--max_bad", "1"]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    nodes = [tmp_path / str(rank) for rank in range(2)]
    for node in nodes:
        node.mkdir()
    (nodes[1] / "run").touch()
    running = [start(node, *flags, environment=common | {"RANK": str(rank)}) for rank, node in enumerate(nodes)]
    for rank, (process, node) in enumerate(zip(running, nodes, strict=True)):
        code, out = finish(process, node, rank)
        assert code == 0, out
    assert weights(nodes[0] / "run" / "checkpoint.pt")["step"] == 8
    named = (nodes[0] / "run" / "bad_videos.log").read_text()
    assert [named.count(f"/{name}.mp4'") for name in (0, 9)] == [1, 1]  # the processes have met one each, or both
    assert (nodes[1] / "run").read_bytes() == b""


LEFT = [  # in the environment
    "WORLD_SIZE=4",
    "RANK=1",
    "LOCAL_RANK=2",
    "RANK=0 WORLD_SIZE=2",
    "RANK=0 WORLD_SIZE=two",
    "RANK=1 WORLD_SIZE=1",
    "RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0",
]


@pytest.mark.parametrize("left", LEFT)
def test_an_environment_that_a_scheduler_has_left_is_one_clear_line(left, run, monkeypatch):
    for setting in left.split():
        monkeypatch.setenv(*setting.split("="))
    for script in (moco, evaluate):
        code, out, err = run(script, *(["knn", "--encoder=conv4", "--crop=32"] if script is evaluate else []))
        assert code == 2 and out == ""
        one_line(err, f"the environment has {left}, ", "torchrun", "unset")


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so_in_one_line_each_within_the_time_out(tmp_path):
    """Some are missing, or meet a program that never answers."""
    groups = ["0/2"], ["1/2"], ["0/3", "1/3"]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in groups]
        ports = [server.getsockname()[1] for server in servers]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        places = [(place, port) for group, port in zip(groups, ports, strict=True) for place in group]
        places.append(("1/2", silent.getsockname()[1]))
        processes = []
        for n, (place, port) in enumerate(places):
            rank, count = place.split("/")
            environment = dict(RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            processes.append(start(tmp_path, *TINY, "--timeout", 0.05, environment=environment, output=f"{n}.txt"))
        for process in processes:
            process.join(120)
            process.kill()
    for n, (process, (place, port)) in enumerate(zip(processes, places, strict=True)):
        says = f"error: process {place.replace('/', ' of ')} does not meet the others at 127.0.0.1:{port} ("
        (line,) = (tmp_path / f"{n}.txt").read_text().splitlines()
        assert process.exitcode == 2 and line.startswith(says) and "start all of them" in line


@pytest.mark.slow
def test_processes_that_disagree_stop_before_they_save(undisturbed, tmp_path):
    processes = start_two(tmp_path, *undisturbed[1], at_step_6="spoil")
    for rank, process in enumerate(processes):
        code, out = finish(process, tmp_path, rank)
        assert code == 2, out
        assert f"process {rank}: after step 8 the processes hold different values of head.net.2.bias" in out
    assert weights(tmp_path / "run" / "checkpoint.pt")["step"] == 4
