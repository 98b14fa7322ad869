"""Batches made by worker processes in shared memory."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from encoding import encode, moving_texture
from helpers import same

import evaluate
import features
import moco
from data import PretrainingViews, StepSampler, TestClips, VideoList, collate, load_batches
from train import Process


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Views of five videos, the second of them bad."""
    folder = tmp_path_factory.mktemp("loader")
    paths = [encode(folder / f"{i}.mp4", moving_texture(36 + i), "libx264", crf="20") for i in range(5)]
    paths[1].write_bytes(b"")
    return PretrainingViews(VideoList([str(path) for path in paths], [-1] * 5, [], ""), crop=28, frames=4)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_batches_are_the_items_in_the_samplers_order_whatever_the_number_of_workers(views, workers, start):
    sampler = StepSampler(len(views), batch_size=2, epochs=6, start_step=start)
    seen = 0
    for keys, batch in zip(sampler, load_batches(views, sampler, workers), strict=True):
        assert same(batch, collate([views[key] for key in keys]))
        assert batch["clip"].movedim(-4, -1).is_contiguous()  # as the decoder writes images
        assert batch["sub_clips"].movedim(-4, -1).is_contiguous()
        seen += len(batch["bad"])
    assert seen > 0


class Counter:
    """Stands for views: an item holds its index and is made at once."""

    def empty(self, *batch: int) -> dict[str, torch.Tensor]:
        return {"value": torch.empty(*batch, 1000, dtype=torch.int64)}

    def write(self, key: tuple[int, int], item: dict[str, torch.Tensor]) -> list:
        item["value"].fill_(key[1])
        return []


class Keys(list):
    batch_size = 2


@pytest.mark.parametrize("workers", [1, 4])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(workers):
    """Workers that are as far ahead as they may be don't touch the batch in use, nor skip or repeat one."""
    keys = Keys([(0, 2 * step), (0, 2 * step + 1)] for step in range(6 * workers + 3))
    for step, batch in enumerate(load_batches(Counter(), keys, workers)):
        time.sleep(0.05)
        assert (batch["value"] == torch.tensor([[2 * step], [2 * step + 1]])).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_share_the_memory_too(views, monkeypatch, method):
    monkeypatch.setattr(torch.multiprocessing, "Process", torch.multiprocessing.get_context(method).Process)
    sampler = StepSampler(len(views), batch_size=2, epochs=2)
    for keys, batch in zip(sampler, load_batches(views, sampler, workers=1), strict=True):
        assert same(batch, collate([views[key] for key in keys]))


@pytest.mark.slow
def test_weights_are_the_same_whatever_the_number_of_workers(run, videos):
    bad = videos / "train" / "rise" / "bad.mp4"
    bad.touch()
    for workers in (0, 1, 3):
        flags = ["--epochs", 2, "--frames", 8, "--crop", 32, "--max_bad", 1, "--out", str(workers)]
        code, _, err = run(moco, *flags, "--batch_size", 9, "--workers", workers, dataset="folder")
        assert code == 0, err
    bad.unlink()
    states = [torch.load(run.path / str(workers) / "checkpoint.pt")["model"] for workers in (0, 1, 3)]
    assert same(states[1:], states[:1] * 2)
    logs = [(run.path / str(workers) / "bad_videos.log").read_text() for workers in (0, 1, 3)]
    assert logs[0].count("\n") == 1 and logs == logs[:1] * 3


def test_too_little_shared_memory_is_an_error_that_says_what_to_do():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        says = r"GiB of shared memory for 2 batches \(File too large\): take fewer --workers.*smaller batches"
        with pytest.raises(OSError, match=says):
            next(load_batches(Counter(), Keys([[(0, 0), (0, 1)]]), workers=2))
        assert len(list(load_batches(Counter(), Keys([[(0, 0), (0, 1)]]), workers=0))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def long_temporary_folder(tmp_path, monkeypatch):
    """TMPDIR with a name that no socket can have."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)


def test_a_long_temporary_folder_costs_no_video(views, long_temporary_folder):
    clips, alone = TestClips(views.videos, 28, 4, 1, 2), Process(0, 1, torch.device("cpu"))
    found, _, bad = features.clip_outputs(lambda x: x.flatten(1).float(), clips, alone, 2, 2, "")
    assert [path for path, _ in bad] == [views.videos.paths[1]]
    assert torch.equal(found, torch.stack([clips[i]["clips"].flatten(1).float() for i in range(5)]))


def test_a_process_that_cannot_be_started_ends_the_run_and_says_why(views, long_temporary_folder, monkeypatch):
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(torch.multiprocessing, "Process", context.Process)
    monkeypatch.setattr(forkserver, "connect_to_new_process", forkserver.ForkServer().connect_to_new_process)
    says = "a loader process can't be started: AF_UNIX path too long: set TMPDIR to a shorter path"
    with pytest.raises(OSError, match=says):
        next(load_batches(views, StepSampler(len(views), 2, 2), workers=1))


SHARED_MEMORY_IS_FULL = """
mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77
dd if=/dev/zero of=/dev/shm/other bs=1k 2> /dev/null
exec "$@"
"""


@pytest.mark.slow
def test_shared_memory_that_others_have_filled_costs_no_video(run, videos):
    """Docker gives 64 MB of it, which another program may have taken; numbers are as without."""
    flags = ["--encoder=conv4", "--width=0.25", "--crop=32", "--device=cpu", f"--data={videos}", "--clips=2"]
    assert run(evaluate, "retrieve", *flags, "--workers=0", "--out=0.json")[0] == 0
    command = [sys.executable, evaluate.__file__, "retrieve", *flags, "--dataset=synthetic", "--workers=2"]
    shell = ["unshare", "-m", "sh", "-c", SHARED_MEMORY_IS_FULL, "sh"]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    done = subprocess.run(
        [*shell, *command, "--out=2.json"], cwd=run.path, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 77:
        pytest.skip("no small /dev/shm can be mounted here")
    assert done.returncode == 0, done.stderr
    results = [json.loads((run.path / f"{n}.json").read_text())["result"] for n in (0, 2)]
    assert results[0] == results[1] and results[0]["unreadable"] == []


def test_workers_end_with_the_iteration():
    for take in (1, 3):
        batches = load_batches(Counter(), Keys([[(0, 0), (0, 1)]] * 3), workers=2)
        for _ in range(take):
            next(batches)
        assert len(torch.multiprocessing.active_children()) == 2
        batches.close()
        assert not torch.multiprocessing.active_children()


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_many_samples(views):
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("reads the process's memory in /proc")
    item, used = views.empty(), []
    for epoch in range(80):
        for index in range(len(views)):
            views.write((epoch, index), item)
        used.append((int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
    assert used[-1][0] - used[20][0] < 4 * 2**20
    assert used[-1][1] == used[20][1]


class Short(Counter):
    """Its process finds what the system lacks."""

    def write(self, key: tuple[int, int], item: dict[str, torch.Tensor]) -> list:
        raise OSError(errno.EMFILE, "Too many open files", "a module")


def test_what_the_system_lacks_is_named_with_what_to_do(monkeypatch):
    tasks = Keys([[(0, 0), (0, 1)]])
    with pytest.raises(OSError, match=r"Too many open files: raise `ulimit -n`, or take fewer --workers: 'a module'"):
        next(load_batches(Short(), tasks, workers=1))

    def fail(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    for owner, name in ((multiprocessing, "Pipe"), (torch.multiprocessing.Process, "start")):
        with (
            monkeypatch.context() as patched,
            pytest.raises(OSError, match=r"can't be started: .*`ulimit -u`.*\(0: none\)"),
        ):
            patched.setattr(owner, name, fail)
            next(load_batches(Counter(), tasks, workers=1))
