"""Batches made by worker processes in shared memory."""

import os
import time
from pathlib import Path

import pytest
import torch
from encoding import encode, moving_texture

import moco
from data import PretrainingViews, StepSampler, VideoList, collate, load_batches


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Views of five videos, the second of them bad."""
    folder = tmp_path_factory.mktemp("loader")
    paths = [encode(folder / f"{i}.mp4", moving_texture(36 + i), "libx264", crf="20") for i in range(5)]
    paths[1].write_bytes(b"")
    return PretrainingViews(VideoList([str(path) for path in paths], [-1] * 5, [], ""), crop=28, frames=4)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_batches_are_the_items_in_the_samplers_order_whatever_the_number_of_workers(views, workers, start):
    sampler = StepSampler(len(views), batch_size=2, epochs=6, start_step=start)
    seen = 0
    for keys, batch in zip(sampler, load_batches(views, sampler, workers), strict=True):
        assert_same(batch, collate([views[key] for key in keys]))
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


def test_workers_that_are_not_forked_share_the_memory_too(views, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "Process", torch.multiprocessing.get_context("spawn").Process)
    sampler = StepSampler(len(views), batch_size=2, epochs=2)
    for keys, batch in zip(sampler, load_batches(views, sampler, workers=1), strict=True):
        assert_same(batch, collate([views[key] for key in keys]))


def test_weights_are_the_same_whatever_the_number_of_workers(run, videos):
    bad = videos / "train" / "rise" / "bad.mp4"
    bad.touch()
    for workers in (0, 1, 3):
        flags = ["--epochs", 2, "--frames", 8, "--crop", 32, "--max_bad", 1, "--out", str(workers)]
        code, _, err = run(moco, *flags, "--batch_size", 9, "--workers", workers, dataset="folder")
        assert code == 0, err
    bad.unlink()
    states = [torch.load(run.path / str(workers) / "checkpoint.pt")["model"] for workers in (0, 1, 3)]
    for state in states[1:]:
        assert_same(state, states[0])
    logs = [(run.path / str(workers) / "bad_videos.log").read_text() for workers in (0, 1, 3)]
    assert logs[0].count("\n") == 1 and logs == logs[:1] * 3


def test_too_little_shared_memory_is_an_error_that_says_what_to_do(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(OSError, match=r"GiB of shared memory for 5 batches: .*workers.*smaller batches.*/dev/shm"):
        next(load_batches(Counter(), Keys([[(0, 0), (0, 1)]]), workers=2))
    assert len(list(load_batches(Counter(), Keys([[(0, 0), (0, 1)]]), workers=0))) == 1


def test_workers_end_with_the_iteration():
    for take in (1, 3):
        batches = load_batches(Counter(), Keys([[(0, 0), (0, 1)]] * 3), workers=2)
        for _ in range(take):
            next(batches)
        assert len(torch.multiprocessing.active_children()) == 2
        batches.close()
        assert not torch.multiprocessing.active_children()


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
