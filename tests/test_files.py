"""Two at once, files of others, and full disks: nothing is written over, and nothing half is left."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from unittest.mock import MagicMock, Mock

import benchmark
import pytest
import torch
from helpers import ALONE, CONV4, FORK, TORCHRUN, alive, descendants, digests, free_folders, one_line, touch, within

import data
import evaluate
import fima
import find
import runs
import synthetic
import train
import visualize

SHORT = [*CONV4, "--device=cpu", "--workers=0", "--clips=1"]


@pytest.fixture
def hold():
    """Has another process hold a run folder: gives the process."""
    others = []

    def live(folder, pipe):
        runs._locks.clear()  # inherited
        runs.claim_folder(folder, str(folder / "checkpoint.pt"))
        pipe.send("holds")
        time.sleep(60)

    def start(folder):
        end, mine = FORK.Pipe()
        others.append(FORK.Process(target=live, args=(folder, mine)))
        others[-1].start()
        mine.close()
        end.recv()
        return others[-1]

    yield start
    for process in others:
        process.kill()
        process.join()
    free_folders()


@pytest.mark.slow
def test_a_run_folder_is_one_processes_until_it_ends_or_is_killed(tmp_path, hold):
    other = hold(tmp_path / "run")
    for resume in ("", f"{tmp_path}/run/checkpoint.pt"):
        with pytest.raises(train.UserError, match=rf"run is in use by process {other.pid} on "):
            runs.claim_folder(tmp_path / "run", resume)
    runs.claim_folder(tmp_path / "another")
    other.kill()
    other.join()
    for _ in range(2):  # as a probe does, for its training and its result
        runs.claim_folder(tmp_path / "run")
    with pytest.raises(EOFError):  # it ends, as the folder is this one's
        hold(tmp_path / "run")
    child = FORK.Process(target=time.sleep, args=(60,), daemon=True)  # as a loader's worker, which may live on
    child.start()
    free_folders()
    hold(tmp_path / "run")
    child.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "word"), [(fima, "--epochs=1"), (evaluate, "linear")])
def test_a_second_run_is_refused_before_it_writes_anything(module, word, run, hold):
    other = hold(run.path / "run")
    before = digests(run.path)
    run.refused(module, word, *CONV4, "--device=cpu", "--out=run", says=[f"run is in use by process {other.pid} on "])
    assert digests(run.path) == before


@pytest.mark.parametrize("fcntl", [None, MagicMock(lockf=Mock(side_effect=OSError("no locks")))])
def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(fcntl, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    runs.claim_folder(tmp_path / "run")
    assert capsys.readouterr().out.count("run can't be locked (") == 1
    free_folders()


def test_what_a_killed_run_has_left_half_written_is_deleted_and_nothing_else(tmp_path):
    kept = ["run/mine.partial", "run/knn_ucf101.json.0123abcd.partial", "disk/b.pt.0123abcd.partial"]
    gone = ["run/epoch_0001.pt", "run/run.json", "run/log.jsonl", "run/bad_videos.log", "disk/a.pt", "run/result.json"]
    touch(tmp_path, *kept, *[f"{name}.0123abcd.partial" for name in gone])
    (tmp_path / "run" / "checkpoint.pt").symlink_to("../disk/a.pt")
    runs.claim_folder(tmp_path / "run")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.partial")} == {*kept}
    free_folders()


@pytest.mark.slow
def test_two_that_write_the_same_file_leave_it_whole_and_a_link_stays_one(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    (path := tmp_path / "checkpoint.pt").symlink_to("disk/there.pt")
    state = dict(method="M", config={}, optimizer={}, step=1, steps_per_epoch=1, world_size=1)

    def write(size):
        for _ in range(100):
            train.save_checkpoint(path, state | {"model": {"weight": torch.full((size,), float(size))}})

    other = FORK.Process(target=write, args=(10,))
    other.start()
    write(100_000)
    other.join()
    assert other.exitcode == 0 and path.is_symlink() and os.listdir(disk) == ["there.pt"]
    weight = runs.load_checkpoint(disk / "there.pt")["model"]["weight"]
    assert (weight == len(weight)).all()


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(videos, tmp_path):
    flags = [*CONV4, f"--data={videos}", "--queue=8", "--decoder_width=32", "--device=cpu", "--batch_size=2"]
    launch = [*TORCHRUN, "--nproc_per_node=2", fima.__file__, *flags, "--workers=1", "--epochs=9999", "--out=run"]
    output, saved = tmp_path / "out.txt", tmp_path / "run" / "checkpoint.pt"
    with output.open("w") as out:
        launcher = subprocess.Popen(launch, cwd=tmp_path, stdout=out, stderr=out)
    assert within(120, saved.exists), output.read_text()
    ranks = descendants(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert len(ranks) >= 4  # two, and their loaders' workers
    assert within(60, lambda: not alive(ranks))
    said = output.read_text()
    assert "saved; continue with: torchrun --nproc_per_node=2" in said and "Traceback" not in said
    assert runs.load_checkpoint(saved)["step"] == runs.read_lines(tmp_path / "run" / "log.jsonl")[-1]["step"]


COMMANDS = {  # what is written, and how
    "o.json": lambda run: run(evaluate, "knn", *SHORT, "--out=o.json"),
    "o_confusion.png": lambda run: run(evaluate, "svm", *SHORT, "--out=o.json"),
    "o.pt": lambda run: run(evaluate, "export", "--checkpoint=none.pt", "--out=o.pt", dataset=None),
    "result.json": lambda run: run(evaluate, "linear", *SHORT, "--out=."),
    "log.jsonl": lambda run: run(fima, *CONV4, "--out=."),
    "epoch_0001.pt": lambda run: run(fima, *CONV4, "--out=."),
    "lock": lambda run: run(fima, *CONV4, "--out=."),
    "o.png": lambda run: run(visualize, "curves", "none", "--out=o.png", dataset=None),
    "o.svg": lambda run: run(visualize, "sample", *CONV4, "--out=o.svg"),
    "o.gif": lambda run: run(visualize, "sample", *CONV4, "--out=o.gif"),
    "o.html": lambda run: run(visualize, "report", "none", "--out=o.html", dataset=None),
    "benchmark_step_cpu.json": lambda run: run(benchmark, "step", "--out=.", dataset=None),
    "bad.txt": lambda run: run(data, "check", ".", "--out=bad.txt", dataset=None),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("held", [b"PK\3\4weights", b'{"years": "of work"}', b'"name","score"\n', None])
def test_a_file_of_another_kind_or_a_folder_is_never_written_over(name, held, tmp_path, run):
    touch(tmp_path, "video.mp4")
    (tmp_path / name).write_bytes(held) if held else (tmp_path / name).mkdir()
    before = digests(tmp_path)
    code, _, err = COMMANDS[name](run)
    assert code == 2 and digests(tmp_path) == before
    one_line(err, name)


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 bytes: the system's error is of the same kind as that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def log_of(folder):
    log = train.Log(train.Run(torch.nn.Linear(1, 1), train.TrainConfig(), ALONE, 1), folder, 1)
    log.steps = [train.Step(1, {"loss": torch.ones(()), "grad_norm": torch.ones(())}, [])]
    return log


WRITERS = {
    "checkpoint.pt": lambda folder: train.save_checkpoint(folder / "checkpoint.pt", {"model": torch.ones(99)}),
    "log.jsonl": lambda folder: log_of(folder).line(),
    "bad_videos.log": lambda folder: log_of(folder).add_bad([("new" * 99, "reason")]),
    "bad.txt": lambda folder: find.check(find.CheckConfig(str(folder / "bad.txt"), 1), folder),
    "_0001.mp4": lambda folder: synthetic.make_synthetic(folder / "set", 20, 10, frames=2, size=(16, 16)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_nothing_half(name, tmp_path, capsys):  # capsys: stderr is no file
    touch(tmp_path, f"{'long' * 50}.mp4", "a.mp4")
    (tmp_path / name).write_bytes(b"'old'\t")  # as a list of bad videos begins
    before = sorted(os.listdir(tmp_path))
    with full_disk(), pytest.raises((OSError, train.UserError), match=rf"File too large: '.*{name}'"):
        WRITERS[name](tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    if name == "checkpoint.pt":
        assert (tmp_path / name).read_bytes() == b"'old'\t"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["o.json", "o.svg"])
def test_results_are_replaced_and_stay_as_they_were_on_a_full_disk(name, tmp_path, run):
    assert COMMANDS[name](run)[0] == COMMANDS[name](run)[0] == 0
    before = digests(tmp_path)
    with full_disk():
        code, _, err = COMMANDS[name](run)
    assert code == 2 and digests(tmp_path) == before
    one_line(err, f"File too large: '{name}'")
