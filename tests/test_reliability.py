"""What a run survives, in processes of its own: kills, signals, lost terminals, launchers and other processes."""

import itertools
import json
import multiprocessing
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from random import Random

import pytest
import torch
from helpers import CONV4, ROOT, alive, descendants, free_port, one_line, same, torchrun, weights, within
from helpers import lines as log

import cli
import evaluate
import fima
import pretrain
import runs
import train

TINY = [*CONV4, "--dataset=synthetic", "--queue=8", "--decoder_width=32", "--device=cpu", "--batch_size=2"]
TINY += ["--workers=0", "--log_every=3"]
SAVING, RUNNING = ("save", "save_checkpoint", "write_file"), ("claim_folder", "open_record", "fit", "line", "step")


def kill_at_line(count: int, names: tuple[str, ...]) -> None:
    """Kills this process at the count-th line that it comes to in functions of these names in train.py and runs.py."""
    lines, own = itertools.count(1), os.getpid()

    def trace(frame, event, _argument):
        if frame.f_code.co_name not in names or frame.f_code.co_filename not in (train.__file__, runs.__file__):
            return None
        if event == "line" and os.getpid() == own and next(lines) == count:  # loader workers inherit the trace
            os.kill(own, signal.SIGKILL)
        return trace

    sys.settrace(trace)


def live(folder, flags, output, place=(), kill=(), every_6th="") -> None:
    """A run of fima.py with its output in a file, maybe one of several, killed, or disturbed every 6 steps."""
    os.chdir(folder)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    if place:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ.update(zip(names, map(str, place), strict=True), MASTER_ADDR="127.0.0.1")
    output = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    sys.argv = ["fima.py", *flags]
    if kill:
        kill_at_line(*kill)
    step = train.Run.step

    def watched_step(run, *batch):
        result = step(run, *batch)
        if run.done % 6 == 0 and every_6th == "spoil":
            run.method.head.net[2].bias.data[0] += 1e-6
        elif run.done % 6 == 0 and every_6th:
            loaders = descendants(os.getpid()) if every_6th == "SIGINT" else []  # as `scancel --full -s INT` does
            for process in (*loaders, os.getpid()):
                os.kill(process, signal.Signals[every_6th])
        return result

    train.Run.step, evaluate.first_look = watched_step, lambda *_: None
    cli.command_line(lambda: pretrain.main(fima.FIMA, fima.FIMAConfig, fima.PRESETS, ""))


def start(folder, *flags, output="out0.txt", **options):
    """`live` in a process of its own."""
    arguments = folder, list(map(str, flags)), output
    process = multiprocessing.get_context("forkserver").Process(target=live, args=arguments, kwargs=options)
    process.start()
    process.output = folder / output
    return process


def finish(process):
    """Exit code (−N for signal N) and output of a process that was started."""
    process.join(300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, process.output.read_text()


def end_well(folder, *flags, **options):
    """A run to its end."""
    code, out = finish(start(folder, *flags, **options))
    assert code == 0, out


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
    assert code == 128 + signal.SIGINT and "--resume run/checkpoint.pt" in out and "Traceback" not in out, out
    assert weights(saved)["step"] == steps[-1] // 6 * 6 + 6
    end_well(tmp_path, *flags, "--deterministic")
    assert equal_ends(expected, tmp_path / "run") and log(tmp_path / "run") == log(expected)


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_ends_and_is_saved(undisturbed, tmp_path):
    """No signal comes where it is not the terminal's own; to write there fails."""
    terminal, end = pty.openpty()
    process = start(tmp_path, *undisturbed[1], "--epochs", "9999", "--workers", "1", output=os.ttyname(end))
    saved = tmp_path / "run" / "checkpoint.pt"
    assert within(60, lambda: saved.exists() or not process.is_alive()) and process.is_alive()
    os.close(terminal)
    os.close(end)
    process.join(120)
    process.kill()  # or a run of 9999 epochs is left
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    assert weights(saved)["step"] == log(tmp_path / "run")[-1]["step"]


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


@pytest.mark.slow
def test_help_that_nobody_reads_ends_without_a_word():
    command = f"set -o pipefail; {shlex.quote(sys.executable)} {ROOT / 'moco.py'} --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def start_two(*folders, flags, every_6th=""):
    """Two processes of a run, in one folder or two, in epochs of 4 steps; something may befall the second."""
    port, started = free_port(), []
    for rank, folder in enumerate((folders * 2)[:2]):
        folder.mkdir(exist_ok=True)
        options = dict(place=(rank, 2, port), every_6th=every_6th * rank, output=f"out{rank}.txt")
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
def test_processes_whose_launcher_is_killed_save_and_end(videos, tmp_path):
    output, saved = tmp_path / "out.txt", tmp_path / "run" / "checkpoint.pt"
    flags = [*TINY, f"--data={videos}", "--workers=1", "--epochs=9999", "--out=run"]
    launcher = torchrun(ROOT / "fima.py", *flags, folder=tmp_path)
    assert within(120, saved.exists), output.read_text()
    ranks = descendants(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert len(ranks) >= 4  # two, and their loaders' workers
    assert within(60, lambda: not alive(ranks))
    said = output.read_text()
    assert "saved; continue with: torchrun --nproc_per_node=2" in said and "Traceback" not in said
    assert weights(saved)["step"] == log(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_where_one_of_two_processes_fails_both_end_and_go_on_as_if_nothing_had_been(undisturbed, tmp_path):
    flags, whole, broken = [*undisturbed[1], "--resume", "auto"], tmp_path / "whole", tmp_path / "broken"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "run").touch()  # as on a node that has no common disk with the first, nor a place for a run folder
    (code, out), (other, _) = map(finish, start_two(whole, elsewhere, flags=flags))
    assert code == other == 0 and "2 × 2 = 4" in out, out
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


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so_in_one_line_each_within_the_time_out(tmp_path):
    """Some are missing, or meet a program that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        three = free_port()
        places = (0, 2, free_port()), (1, 2, free_port()), (0, 3, three), (1, 3, three), (1, 2, silent.getsockname()[1])
        flags = [*TINY, "--timeout", 0.05]
        started = [start(tmp_path, *flags, place=at, output=f"{n}.txt") for n, at in enumerate(places)]
        for (rank, world, port), (code, out) in zip(places, map(finish, started), strict=True):
            assert code == 2 and "start all of them" in out and out.count("\n") == 1
            assert out.startswith(f"error: process {rank} of {world} does not meet the others at 127.0.0.1:{port} (")
