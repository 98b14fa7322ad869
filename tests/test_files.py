"""Two at once, files of others, and full disks: nothing is written over, and nothing half is left."""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
import data
import evaluate
import fima
import mcl
import train
import visualize

QUICK = ["--encoder=conv4", "--width=0.25", "--crop=32"]
STATE = dict(method="M", config={}, model={}, optimizer={}, step=1, steps_per_epoch=1, world_size=1)
FORK = multiprocessing.get_context("fork")


def digests(root):
    """What every file below a folder holds; of the lock, nothing."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


class Other:
    """Another process, which holds a run folder and has started a third one, as of a loader, which only sleeps."""

    def __init__(self, folder):
        mine, self.end = FORK.Pipe()
        self.process = FORK.Process(target=self.live, args=(folder, mine))
        self.process.start()
        mine.close()
        self.child = self.end.recv()

    @staticmethod
    def live(folder, pipe):
        train.claim_folder(folder, str(folder / "checkpoint.pt"))
        child = os.fork()
        if child:
            pipe.send(child)
        time.sleep(60)

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture
def hold():
    """Has another process hold a run folder."""
    others = []

    def start(folder):
        others.append(Other(folder))
        return others[-1]

    yield start
    for other in others:
        other.kill()
        os.kill(other.child, signal.SIGKILL)


@pytest.fixture(autouse=True)
def nothing_stays_locked():
    yield
    train.end_process()


# ---------------------------------------------------------------------------------------------------------------------
# Two at once
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_one_processes_until_it_ends_or_is_killed(tmp_path, hold):
    """Its children, as loader workers, may live on."""
    folder = tmp_path / "run"
    other = hold(folder)
    with pytest.raises(train.UserError, match=rf"run is in use by process {other.process.pid} on \S+: wait"):
        train.claim_folder(folder)
    train.claim_folder(tmp_path / "another")
    other.kill()
    os.kill(other.child, 0)  # lives
    train.claim_folder(folder)
    train.claim_folder(folder)  # as a probe does, for its training and its result

    def claim():
        train._locks.clear()  # inherited
        try:
            train.claim_folder(folder)
        except train.UserError:
            os._exit(5)

    for expected in (5, 0):
        process = FORK.Process(target=claim)
        process.start()
        process.join()
        assert process.exitcode == expected
        train.end_process()


@pytest.mark.parametrize("words", ["--out=run", "--resume=run/checkpoint.pt", "--resume=auto", "linear", "finetune"])
def test_a_second_run_is_refused_before_it_writes_anything(words, run, hold):
    if words.startswith("--resume"):
        assert run(fima, "--max_steps=1", "--out=run", *QUICK)[0] == 0
    other = hold(run.path / "run")
    before = digests(run.path)
    if words.isalpha():
        code, _, err = run(evaluate, words, *QUICK, "--device=cpu", "--workers=0", "--out=run")
    else:
        code, _, err = run(fima, *QUICK, words, "--out=run")
    assert code == 2 and f"run is in use by process {other.process.pid} on " in err.splitlines()[-1], err
    assert "Traceback" not in err and digests(run.path) == before
    assert f"process {other.process.pid} on " in (run.path / "run" / "lock").read_text()


@pytest.mark.parametrize("fault", ["no service", "no fcntl"])
def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(fault, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(train, "fcntl", None if fault == "no fcntl" else train.fcntl)
    monkeypatch.setattr("fcntl.lockf", fail)
    train.claim_folder(tmp_path / "run")
    assert capsys.readouterr().out.count("run can't be locked (") == 1


def test_what_a_killed_run_has_left_half_written_is_deleted_and_nothing_else(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").symlink_to("../disk/a.pt")
    gone = ["run/epoch_0001.pt", "run/run.json", "run/log.jsonl", "run/bad_videos.log", "disk/a.pt", "run/result.json"]
    for name in gone:
        (tmp_path / f"{name}.0123abcd.partial").touch()
    for name in ("run/mine.partial", "run/knn_ucf101.json.0123abcd.partial", "disk/b.pt.0123abcd.partial"):
        (tmp_path / name).touch()
    train.claim_folder(tmp_path / "run")
    left = [path.name for path in tmp_path.rglob("*.partial")]
    assert sorted(left) == ["b.pt.0123abcd.partial", "knn_ucf101.json.0123abcd.partial", "mine.partial"]


def test_two_that_write_the_same_file_leave_it_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def write(size):
        state = STATE | {"model": {"weight": torch.full((size,), float(size))}}
        for _ in range(100):
            train.save_checkpoint(path, state)

    write(10)
    writers = [FORK.Process(target=write, args=(size,)) for size in (10, 100_000)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        weight = train.load_checkpoint(path)["model"]["weight"]
        assert (weight == len(weight)).all()
        looks += 1
    for writer in writers:
        writer.join()
    assert looks > 3 and [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == [path.name]


def test_a_linked_file_keeps_its_link(tmp_path):
    (tmp_path / "disk").mkdir()
    path = tmp_path / "checkpoint.pt"
    path.symlink_to("disk/there.pt")
    for step in (1, 2):
        train.save_checkpoint(path, STATE | {"step": step})
        assert path.is_symlink() and train.load_checkpoint(tmp_path / "disk" / "there.pt")["step"] == step
    assert os.listdir(tmp_path / "disk") == ["there.pt"]


def alive(pids):
    return [
        pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    ]


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [found for child in children for found in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_processes_whose_launcher_is_killed_save_and_end(videos, tmp_path):
    flags = [*QUICK, f"--data={videos}", "--queue=8", "--decoder_width=32", "--device=cpu", "--batch_size=2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "out.txt", "w") as out:
        launcher = subprocess.Popen(
            [*launch, fima.__file__, *flags, "--workers=1", "--epochs=9999", "--out=run"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
    saved, until = tmp_path / "run" / "checkpoint.pt", time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until and launcher.poll() is None:
        time.sleep(0.1)
    assert saved.exists(), (tmp_path / "out.txt").read_text()
    ranks = descendants(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert len(ranks) >= 4  # two, and their loaders' workers
    while alive(ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(ranks)
    said = (tmp_path / "out.txt").read_text()
    assert "saved; continue with: torchrun --nproc_per_node=2" in said and "Traceback" not in said
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert train.load_checkpoint(saved)["step"] == last["step"]
