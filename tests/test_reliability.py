"""What a run survives: kills, signals, lost terminals and processes, and what a scheduler has left behind."""

import itertools
import json
import multiprocessing
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from random import Random
from unittest import mock

import pytest
import torch
from helpers import ALONE, CONV4, ROOT, free_port, one_line, same, weights
from helpers import lines as log

import cli
import evaluate
import fima
import moco
import pretrain
import runs
import train

TINY = [*CONV4, "--dataset=synthetic", "--queue=8", "--decoder_width=32", "--device=cpu", "--batch_size=2"]
TINY += ["--workers=0", "--log_every=3"]
SAVING, RUNNING = ("save", "save_checkpoint", "write_file"), ("claim_folder", "open_record", "fit", "line", "step")
LEFT = ["WORLD_SIZE=4", "RANK=1", "LOCAL_RANK=2", "RANK=0 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=two", "RANK=1 WORLD_SIZE=1"]
LEFT += ["RANK=0 WORLD_SIZE=1 LOCAL_RANK=1", "RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0"]


def kill_at_line(count: int, within: tuple[str, ...]) -> None:
    """Kills this process at the count-th line that it comes to in functions of these names in train.py and runs.py."""
    lines, own = itertools.count(1), os.getpid()

    def trace(frame, event, _argument):
        if frame.f_code.co_name not in within or frame.f_code.co_filename not in (train.__file__, runs.__file__):
            return None
        if event == "line" and os.getpid() == own and next(lines) == count:  # loader workers inherit the trace
            os.kill(own, signal.SIGKILL)
        return trace

    sys.settrace(trace)


def live(folder, flags, output, environment=(), kill=(), file_size=0, every_6th="") -> None:
    """A run of fima.py with its output in a file, and `kill_at_line`, small files, or a signal at every sixth step."""
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    sys.argv = ["fima.py", *flags]
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if kill:
        kill_at_line(*kill)
    step = train.Run.step

    def watched_step(run, *batch):
        result = step(run, *batch)
        if run.done % 6 == 0 and every_6th == "spoil":
            run.method.head.net[2].bias.data[0] += 1e-6
        elif run.done % 6 == 0 and every_6th:
            os.kill(os.getpid(), signal.Signals[every_6th])
        return result

    train.Run.step, evaluate.first_look = watched_step, lambda *_: None
    cli.command_line(lambda: pretrain.main(fima.FIMA, fima.FIMAConfig, fima.PRESETS, ""))


def start(folder, *flags, output="out0.txt", **options):
    """`live` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reliability"])
    process = context.Process(target=live, args=(folder, list(map(str, flags)), output), kwargs=options)
    process.start()
    process.output = folder / output
    return process


def finish(process):
    """Exit code (−N for signal N) and output of a process that was started."""
    process.join(300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, process.output.read_text()


def end_well(folder, *flags, **options):
    """A run to its end: its output."""
    code, out = finish(start(folder, *flags, **options))
    assert code == 0, out
    return out


def equal_ends(first, second):
    """Whether two runs have ended alike, bit for bit."""
    states = [weights(folder / "checkpoint.pt") for folder in (first, second)]
    return all(same(*(state[name] for state in states)) for name in ("model", "optimizer", "step"))


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """A run of four epochs of 9 steps that nothing disturbs: its folder, and flags to repeat it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = [*TINY, "--data", videos, "--epochs", "4", "--out", "run"]
    end_well(folder, *flags)
    return folder / "run", flags


@pytest.mark.slow
def test_killed_at_random_moments_and_interrupted_a_run_ends_as_if_nothing_had_been(undisturbed, tmp_path):
    """Six kills at random lines, every second one while a checkpoint is written, all with a loader's worker."""
    (expected, flags), saved = undisturbed, tmp_path / "run" / "checkpoint.pt"
    flags = [*flags, "--workers", "1", "--save_minutes", "0", "--resume", "auto"]
    random, steps = Random(0), []
    for life in range(6):
        kill = (random.randint(1, 150), SAVING) if life % 2 else (random.randint(1, 700), RUNNING)
        code, out = finish(start(tmp_path, *flags, kill=kill))
        assert code == -signal.SIGKILL, out
        steps.append(weights(saved)["step"] if saved.exists() else 0)
    assert len(set(steps)) > 2 and any(step % 9 for step in steps)  # they struck at different places, in mid-epoch, too
    code, out = finish(start(tmp_path, *flags, every_6th="SIGINT"))
    assert code == 128 + signal.SIGINT and "--resume run/checkpoint.pt" in out, out
    assert weights(saved)["step"] == steps[-1] // 6 * 6 + 6
    end_well(tmp_path, *flags, "--deterministic")
    assert equal_ends(expected, tmp_path / "run") and log(tmp_path / "run") == log(expected)


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_ends_and_is_saved(undisturbed, tmp_path):
    """No signal comes where it is not the terminal's own; to write there fails."""
    terminal, end = pty.openpty()
    process = start(tmp_path, *undisturbed[1], "--epochs", "9999", "--workers", "1", output=os.ttyname(end))
    out = b""
    while b"epoch 1/" not in out:
        assert select.select([terminal], [], [], 60)[0] and process.is_alive(), out.decode()
        out += os.read(terminal, 1024)
    os.close(terminal)
    os.close(end)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGHUP
    saved = weights(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved >= 9 and log(tmp_path / "run")[-1]["step"] == saved


def test_nohup_is_obeyed(in_process):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.noted_signals(ALONE) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        code, *_ = in_process(cli, main=lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert caught == [] and code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "| head -1"])
def test_an_evaluation_that_nobody_reads_writes_its_result(streams, videos, tmp_path):
    flags = [*CONV4, f"--data={videos}", "--device=cpu", "--clips=2", "--workers=1", f"--out={tmp_path / 'k.json'}"]
    (tmp_path / "tmp").mkdir()
    places = {"TMPDIR": str(tmp_path / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = shlex.join([sys.executable, str(ROOT / "evaluate.py"), "knn", *flags])
    subprocess.run(f"{command} {streams}", shell=True, timeout=120, env=os.environ | places)
    assert not os.listdir(tmp_path / "tmp")  # as pymp-*
    assert json.loads((tmp_path / "k.json").read_text())["result"]["test_videos"] == 10


def test_deterministic_is_passed_on_to_torch(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked := mock.Mock())
    cli.start_process("cpu", deterministic=True)
    assert asked.call_args.args == (True,)


def test_nothing_is_unpickled():
    for code in (path.read_text() for path in ROOT.glob("*.py")):
        assert not re.search(r"(import|from) (pickle|dill|joblib|shelve)\b", code)
        assert code.count("torch.load(") == code.count("weights_only=True") and "allow_pickle=True" not in code


def place(rank, world, port):
    """What torchrun tells a process, where there is no launcher."""
    return dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def start_two(*folders, flags, every_6th=""):
    """Two processes of a run, in one folder or two, in epochs of 4 steps; something may befall the second."""
    port, started = free_port(), []
    for rank, folder in enumerate((folders * 2)[:2]):
        folder.mkdir(exist_ok=True)
        options = dict(environment=place(rank, 2, port), every_6th=every_6th * rank, output=f"out{rank}.txt")
        started.append(start(folder, *flags, **options))
    return started


def leave_at_once(_rank) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.distributed.all_gather([torch.empty(1 << 22)], torch.ones(1 << 22), async_op=True)
    cli.end_process()


@pytest.mark.slow
def test_a_process_leaves_while_a_thread_still_holds_tensors():
    """On torch 2.6 and 2.7 (tests/oldest.sh) the thread waited for Python's lock, held by what waited for it."""
    assert torch.multiprocessing.spawn(leave_at_once, join=False, daemon=True).join(60)


@pytest.mark.slow
def test_where_one_of_two_processes_fails_both_end_and_go_on_as_if_nothing_had_been(undisturbed, tmp_path):
    flags, whole, broken = [*undisturbed[1], "--resume", "auto"], tmp_path / "whole", tmp_path / "broken"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "run").touch()  # as on a node that has no common disk with the first, nor a place for a run folder
    (code, out), (other, _) = map(finish, start_two(whole, elsewhere, flags=flags))
    assert code == other == 0 and "2 × 2 = 4" in out, out
    (record,), last = json.loads((whole / "run" / "run.json").read_text()), log(whole / "run")[-1]
    assert record["overlap"] == pytest.approx(last["overlap"], abs=0.3)  # of the last epoch
    for fault, codes, says in (
        ("spoil", (2, 2), "process 0: after step 8 the processes hold different values of head.net.2.bias"),
        ("SIGKILL", (1, -signal.SIGKILL), "process 0 has lost another one"),  # at once, without a --timeout
        ("SIGSTOP", (1, -signal.SIGKILL), "process 0 has lost another one"),
    ):
        timeout = ["--timeout", "0.3"] * (fault == "SIGSTOP")
        first, second = start_two(broken, flags=[*flags, *timeout], every_6th=fault)
        first.join(300)
        if fault == "SIGSTOP":
            second.kill()
        (code, out), (other, _) = finish(first), finish(second)
        assert (code, other) == codes, out
        one_line(out, says)
        assert weights(broken / "run" / "checkpoint.pt")["step"] == 4
    for code, out in map(finish, start_two(broken, elsewhere, flags=flags)):
        assert code == 0, out
    assert equal_ends(whole / "run", broken / "run") and (elsewhere / "run").read_bytes() == b""


@pytest.mark.slow
def test_videos_that_one_of_two_processes_cannot_read_are_named_and_others_end_both(undisturbed, videos, tmp_path):
    (tree := tmp_path / "tree").mkdir()
    flags = [*undisturbed[1], "--dataset", "folder", "--epochs", "2", "--max_bad", "1"]
    nodes = [tmp_path / str(rank) for rank in range(2)]
    for n, path in enumerate(sorted((videos / "train").glob("*/*.mp4"))):
        (tree / f"{n}.mp4").write_bytes(path.read_bytes() if n % 9 else b"")
    for code, out in map(finish, start_two(*nodes, flags=[*flags, "--data", tree])):
        assert code == 0, out
    named = (nodes[0] / "run" / "bad_videos.log").read_text()
    assert [named.count(f"/{name}.mp4'") for name in (0, 9)] == [1, 1]  # the processes have met one each, or both
    (nodes[0] / "own").symlink_to(tree)
    for says in ("no such folder", "1 videos, 0 classes, check sum"):
        for rank, (code, out) in enumerate(map(finish, start_two(*nodes, flags=[*flags, "--data", "own"]))):
            assert code == 2
            one_line(out, says, *["process 1"] * (rank == 0))
        (nodes[1] / "own").mkdir(exist_ok=True)
        shutil.copy(tree / "1.mp4", nodes[1] / "own")


@pytest.mark.parametrize("left", LEFT)
def test_an_environment_that_a_scheduler_has_left_is_one_clear_line(left, run, monkeypatch):
    for setting in left.split():
        monkeypatch.setenv(*setting.split("="))
    run.refused(moco, says=[f"the environment has {left}, ", "torchrun", "unset"])


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so_in_one_line_each_within_the_time_out(tmp_path):
    """Some are missing, or meet a program that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        three = free_port()
        places = (0, 2, free_port()), (1, 2, free_port()), (0, 3, three), (1, 3, three), (1, 2, silent.getsockname()[1])
        flags = [*TINY, "--timeout", 0.05]
        started = [start(tmp_path, *flags, environment=place(*at), output=f"{n}.txt") for n, at in enumerate(places)]
        for (rank, world, port), (code, out) in zip(places, map(finish, started), strict=True):
            assert code == 2 and "start all of them" in out and out.count("\n") == 1
            assert out.startswith(f"error: process {rank} of {world} does not meet the others at 127.0.0.1:{port} (")


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_lines_in_a_file_nothing_with_quiet_and_names_hold_no_codes_of_a_terminal(in_process, quiet):
    def work():
        for n in train.progress(ALONE, range(3), desc="work", miniters=1):
            ALONE.say(f"said \x1b[31m\udcff\x9b{n}")
        print("\x1b", file=sys.stderr)

    code, out, err = in_process(cli, *["--quiet"] * quiet, main=work)
    assert code == 0 and out == "".join(f"said \\x1b[31m\\udcff\\x9b{n}\n" for n in range(3)) and "\r" not in err
    assert err.strip() == "\\x1b" if quiet else err.startswith("work:   0%") and "3/3" in err and "\\x1b\n" in err
