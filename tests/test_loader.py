"""Batches made by worker processes in shared memory."""

import errno
import itertools
import mmap
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import collate, encode, moving_texture, same
from torch.utils.data import BatchSampler

import data
from data import PretrainingViews, StepSampler, VideoList, load_batches

NOT_FORKED = [pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver")]


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Views of five videos, two of them bad."""
    folder = tmp_path_factory.mktemp("loader")
    paths = [encode(folder / f"{i}.mp4", moving_texture(36 + i), "libx264", crf="20") for i in range(5)]
    for n in (1, 3):
        paths[n].write_bytes(b"")
    return PretrainingViews(VideoList([str(path) for path in paths], [-1] * 5, [], ""), crop=28, frames=4)


@pytest.mark.parametrize("workers", [0, 1, 3, *NOT_FORKED])
def test_batches_are_the_items_in_the_samplers_order_whatever_the_workers(views, workers, monkeypatch):
    if isinstance(workers, str):
        monkeypatch.setattr(data, "PROCESSES", torch.multiprocessing.get_context(workers))
        workers = 1
    sampler = StepSampler(len(views), batch_size=3, epochs=12, start_step=5)
    for keys, batch in zip(sampler, load_batches(views, sampler, workers), strict=True):
        assert same(batch, collate([views[key] for key in keys])) and not {1, 3} & {*batch["index"].tolist()}
        assert {path for path, _ in batch["bad"]} >= {views.videos.paths[i] for _, i in keys if i in (1, 3)}
        assert all(batch[name].movedim(-4, -1).is_contiguous() for name in ("clip", "sub_clips"))  # as decoders write


def test_memory_that_a_gpu_copies_from_is_locked_while_there_are_batches_as_far_as_it_can_be(views, monkeypatch):
    held, parts = {}, itertools.count()

    def register(address, size, flags):
        refused = next(parts) in (2, 3)  # of a batch's eight
        held.update({} if refused else {address: size})
        return 2 * refused  # of CUDA: success, out of memory

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=held.pop)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    loader = load_batches(views, StepSampler(len(views), 2, 2), workers=1)
    places = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in next(loader).values() if isinstance(x, torch.Tensor)]
    locked = [any(start <= a and b <= start + size for start, size in held.items()) for a, b in places]
    assert sum(locked) == len(held) == len(places) - 2 == 6
    loader.close()
    assert not held


class Counter:
    """Stands for views: an item holds its index and is made at once."""

    def empty(self, *batch: int) -> dict[str, torch.Tensor]:
        return {"value": torch.empty(*batch, 1000, dtype=torch.int64)}

    def write(self, key: int, item: dict[str, torch.Tensor]) -> list:
        item["value"].fill_(key)
        return []


@pytest.mark.parametrize("workers", [1, 4])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(workers):
    """Workers that are as far ahead as they may be don't touch the batch in use, nor skip or repeat one."""
    for step, batch in enumerate(load_batches(Counter(), BatchSampler(range(12 * workers + 6), 2, False), workers)):
        time.sleep(0.05)
        assert (batch["value"] == torch.tensor([[2 * step], [2 * step + 1]])).all()


def test_too_little_memory_and_too_many_processes_are_errors_that_say_what_to_do(monkeypatch):
    for owner, name, number, says in (
        (mmap, "mmap", errno.ENOMEM, r"shared memory for batches \(Cannot allocate memory\): take fewer --workers"),
        (data.PROCESSES, "Pipe", errno.EAGAIN, r"can't be started.*ulimit -u"),
        (data.PROCESSES.Process, "start", errno.EAGAIN, r"can't be started.*ulimit -u"),
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=says):
            patched.setattr(owner, name, Mock(side_effect=OSError(number, os.strerror(number))))
            next(load_batches(Counter(), BatchSampler(range(2), 2, False), workers=1))


@pytest.mark.parametrize("take", [1, 3])
def test_workers_end_with_the_iteration_and_take_nothing_of_dev_shm(monkeypatch, take):
    """Docker gives 64 MB of /dev/shm, and the name of a temporary folder may be too long for a socket."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    maps = Path("/proc/self/maps")
    before = maps.read_text().count("/dev/shm")
    batches = load_batches(Counter(), BatchSampler(range(6), 2, False), workers=2)
    for _ in range(take):
        next(batches)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2 and maps.read_text().count("/dev/shm") <= before
    apart = [os.getpgid(worker.pid) != os.getpgid(0) for worker in workers]
    assert sum(apart) >= min(take, 2)  # of the process group, which a terminal's Ctrl-C reaches whole
    batches.close()
    assert not torch.multiprocessing.active_children()


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_many_samples(views):
    item, used = views.empty(), []
    for epoch in range(80):
        for index in range(len(views)):
            views.write((epoch, index), item)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
    assert used[-1][0] - used[20][0] < 4 * 2**20 and used[-1][1] == used[20][1]
