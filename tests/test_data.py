"""Views, their boxes, test clips, the order of samples, and batches made by worker processes in shared memory."""

import copy
import errno
import itertools
import mmap
import os
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import collate, encode, moving_texture, same, touch
from hypothesis import given
from hypothesis import strategies as st

import data
from data import PretrainingViews, StepSampler, TestClips, VideoList, crop_resize, draw_region, empty_clips
from losses import bin_centers
from video import Video

seeds, few = st.integers(0, 2**32 - 1), st.integers(1, 4)
NOTHING = VideoList([""], [0], [], "")
NOT_FORKED = [pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver")]


def assert_shows_box(clip: torch.Tensor, box: torch.Tensor) -> None:
    """Each of 7 × 7 bins of a clip of red 2x and green 2y shows the place that the box says, within half a bin."""
    bins, size = 7, clip.shape[-1]
    said = bin_centers(box[None], bins, bins)[0].unflatten(0, (bins, bins))  # (rows, columns, 2)
    seen = clip.double().mean(1)[:2].unflatten(1, (bins, -1)).unflatten(3, (bins, -1)).mean((2, 4)) / 2 + 0.5
    for axis, bin_size in enumerate(((box[2:] - box[:2]).abs() / bins).tolist()):
        pixel = max(bin_size * bins / size, 1)  # sampling is off by up to half of these, a file's chroma by 2.5
        assert (seen[axis] - said[..., axis]).abs().max() <= min(bin_size / 2, pixel / 2 + 2.5)


@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=seeds, flip=st.booleans())
def test_a_crop_is_pytorchs_bilinear_image_written_where_it_is_told(height, width, seed, flip):
    rng = np.random.default_rng(seed)
    images = list(rng.integers(0, 256, (rng.integers(1, 10), height, width, 3), dtype=np.uint8))
    top, left, h, w = region = draw_region(rng, height, width)
    cropped = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[..., top : top + h, left : left + w]
    expected = F.interpolate(cropped.contiguous(), (24, 24), mode="bilinear").transpose(0, 1)
    batch = empty_clips(2, 3, len(images), 24, 24).zero_()
    box = crop_resize(images, region, flip, batch[1])
    assert box.tolist() == ([left + w, top, left, top + h] if flip else [left, top, left + w, top + h])
    assert torch.equal(batch[1], expected.flip(-1) if flip else expected) and not batch[0].any()


@given(seed=seeds, height=st.integers(1, 400), width=st.integers(1, 400), least=st.floats(0.05, 1))
def test_regions_lie_in_the_frame_and_have_the_share_and_ratio_asked_for(seed, height, width, least):
    top, left, h, w = draw_region(np.random.default_rng(seed), height, width, scale=(least, 1.0))
    assert 0 <= top < top + h <= height and 0 <= left < left + w <= width
    if min(height, width) >= 100 and max(height, width) / min(height, width) < 4 / 3:
        assert 0.98 * least <= h * w / (height * width)
        assert 0.97 * 3 / 4 <= w / h <= 1.03 * 4 / 3


def test_regions_vary_over_the_frame():
    rng = np.random.default_rng(0)
    regions = np.array([draw_region(rng, 100, 120) for _ in range(500)])
    share, ratio = regions[:, 2] * regions[:, 3] / 12_000, regions[:, 3] / regions[:, 2]
    assert share.min() < 0.25 and 0.5 < share.mean() < 0.65  # 0.6 if every draw fitted
    assert ratio.min() < 0.8 and ratio.max() > 1.25
    assert np.allclose((regions[:, :2] + regions[:, 2:] / 2).mean(0), (50, 60), atol=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    textures = [moving_texture(frames, size, size) for frames, size in ((40, 48), (20, 56), (70, 64), (33, 72))]
    paths = [encode(folder / f"{i}.mp4", texture, "libx264", crf="20") for i, texture in enumerate(textures)]
    return VideoList([*map(str, paths)], [0, 1, -1, 2], ["a", "b", "c"], "four videos")


@pytest.fixture(scope="module")
def views(videos):
    """Views of five videos, two of them bad."""
    first, second, *_, last = videos.paths
    (empty := Path(first).with_name("empty.mp4")).touch()
    return PretrainingViews(VideoList([first, "absent", second, str(empty), last], [-1] * 5, [], ""), 28, frames=4)


def test_a_sample_is_what_it_says(videos):
    sample = PretrainingViews(videos, 28)[0, 2]
    shapes = dict(clip=(2, 3, 16, 28, 28), sub_clips=(2, 2, 3, 16, 28, 28), box=(2, 4), color=(2, 4, 6), overlap=())
    shapes |= dict(index=(), label=(), seconds=(3,))
    assert {name: value.shape for name, value in sample.items() if name != "bad"} == shapes
    assert (sample["index"], sample["label"], sample["bad"]) == (2, -1, []) and (sample["seconds"] > 0).all()
    assert not any(torch.equal(*sample[name]) for name in ("clip", "sub_clips", "color"))


@pytest.mark.parametrize("sub_clips", [0, 2])
def test_all_clips_show_one_window_of_which_a_short_video_repeats_its_last_frame(videos, requested, sub_clips):
    """And no frames are read that none of them shows; crops here are whole frames."""
    step = 1 if sub_clips else 4
    views = PretrainingViews(videos, 48, frames=8, frame_stride=4, sub_clips=sub_clips, min_scale=1.0, flip_p=0.0)
    for epoch, index in itertools.product(range(3), (0, 1)):
        with Video(videos.paths[index]) as video:
            images = video.read(range(len(video)))
        sample = views[epoch, index]
        assert ("sub_clips" in sample) == (sub_clips > 0) and sample["color"].shape == (2, 2 + sub_clips, 6)
        for view, frames in enumerate(np.reshape(requested[-1], (2, 32 // step))):
            assert frames.tolist() == [min(frames[0] + k, len(images) - 1) for k in range(0, 32, step)]
            window = empty_clips(3, 32 // step, 48, 48)
            crop_resize([images[k] for k in frames], (0, 0, *images[0].shape[:2]), False, window)
            assert torch.equal(sample["clip"][view], window[:, :: 4 // step])
            if sub_clips:
                assert torch.equal(sample["sub_clips"][view].transpose(0, 1).flatten(1, 2), window)


@given(st.integers(1, 40), few, st.integers(1, 8), few, seeds)
def test_windows_differ_as_far_as_they_can_and_overlap_by_the_frames_in_common(length, windows, frames, stride, seed):
    views = PretrainingViews(NOTHING, 8, frames, stride, 0, windows=windows)
    starts = views.draw_starts(np.random.default_rng(seed), range(length))
    possible = max(length - frames * stride, 0) + 1
    assert starts.shape == (windows,) and set(starts) <= set(range(possible))
    assert len(set(starts)) == min(windows, possible)
    views.write_views = lambda *_: starts
    shown = [set(range(start, start + frames * stride)) for start in starts]
    shares = [len(one & other) / len(one) for one, other in itertools.combinations(shown, 2)]
    item = views[0, 0]
    assert item["overlap"].item() == pytest.approx(np.mean(shares)) if shares else "overlap" not in item


def test_all_pairs_of_different_windows_are_equally_likely():
    views = PretrainingViews(NOTHING, 8, frames=2, frame_stride=18)  # of 40 frames: starts 0 to 4
    drawn = [views.draw_starts(np.random.default_rng(epoch), range(40)) for epoch in range(400)]
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert pairs.tolist() == [[a, b] for a in range(5) for b in range(5) if a != b]
    assert np.abs(counts - 20).max() < 4 * 20**0.5


def test_boxes_hold_through_files_and_the_whole_sampling_and_test_clips_show_the_middle(tmp_path):
    y, x = np.indices((96, 120), np.uint8)
    path = encode(tmp_path / "places.mp4", [np.stack([2 * x, 2 * y, 0 * x + 128], -1)] * 34, "libx264", crf="1")
    views, flips = PretrainingViews(VideoList([str(path)], [-1], [], ""), 56), set()
    for epoch in range(12):
        sample = views[epoch, 0]
        for clip, box in zip(sample["clip"], sample["box"], strict=True):
            assert_shows_box(clip, box)
            flips.add(bool(box[0] > box[2]))
    assert flips == {False, True}
    for clip in TestClips(views.videos, 56, frames=4, clips=2)[0]["clips"]:  # the central square, 7/8 of the height
        assert_shows_box(clip, torch.tensor([60.0 - 42, 48 - 42, 60 + 42, 48 + 42]))


def test_a_sample_depends_on_seed_epoch_and_index_only(videos):
    views, reseeded = (PretrainingViews(videos, 28, frames=4, seed=seed) for seed in (0, 1))
    samples = {key: views[key] for key in itertools.product((0, 1), range(4))}
    for key in reversed(samples):
        assert same(views[key], samples[key]) and same(copy.deepcopy(views)[key], samples[key])
    for name, other in itertools.product(("clip", "box", "color"), (samples[1, 0], reseeded[0, 0])):
        assert not torch.equal(samples[0, 0][name], other[name])


def test_each_epoch_draws_another_video_for_a_bad_one(videos):
    views = PretrainingViews(VideoList(["absent.mp4", *videos.paths], [0] * (1 + len(videos)), [], ""), 28, frames=4)
    drawn = [int(views[epoch, 0]["index"]) for epoch in range(16)]
    assert drawn == [int(views[epoch, 0]["index"]) for epoch in range(16)]
    assert 0 not in drawn and len({*drawn}) > 1


def test_bad_videos_are_zeros_and_never_replaced_at_test(videos):
    clips = TestClips(VideoList(["absent.mp4", videos.paths[0]], [0, 1], [], ""), 28, frames=4, clips=3)
    item = clips.empty()
    assert clips.write(1, item) == [] and item["clips"].any() and item["clips"].shape == (3, 3, 4, 28, 28)
    ((path, _),) = clips.write(0, item)
    assert path == "absent.mp4" and not item["clips"].any()


def test_test_clips_are_uniformly_spaced_and_cover_the_video(videos, requested):
    TestClips(videos, 28, frames=8, frame_stride=2, clips=5)[2]  # 70 frames: 56 starts
    frames = np.reshape(requested[0], (5, 8))
    assert np.abs(frames[:, 0] - np.linspace(0, 55, 5)).max() <= 0.5 and (np.diff(frames) == 2).all()
    TestClips(videos, 28, frames=16, frame_stride=2, clips=3)[1]  # 20 frames
    assert requested[1] == [min(2 * k, 19) for k in range(16)] * 3
    TestClips(videos, 28, frames=8, frame_stride=2, clips=1)[2]  # in the middle
    assert requested[2][0] in (27, 28) and requested[2] == [*range(requested[2][0], requested[2][0] + 16, 2)]


@given(st.integers(1, 60), few, few, few, st.integers(0, 9), st.integers(0, 100))
def test_an_epoch_deals_videos_out_once_and_a_resumed_run_goes_on(length, batch, ranks, epochs, seed, start):
    steps = length // (batch * ranks)
    if steps == 0:
        with pytest.raises(ValueError, match=f"fewer than one batch of {batch} × {ranks}"):
            StepSampler(length, batch, epochs, seed, 0, ranks)
        return
    runs = [list(StepSampler(length, batch, epochs, seed, rank, ranks)) for rank in range(ranks)]
    for epoch in range(epochs):
        dealt = [key for run in runs for keys in run[epoch * steps : (epoch + 1) * steps] for key in keys]
        assert len(dealt) == len({*dealt} & {(epoch, index) for index in range(length)}) == steps * batch * ranks
    start = min(start, steps * epochs)
    rest = StepSampler(length, batch, epochs, seed, ranks - 1, ranks, start)
    assert list(rest) == runs[-1][start:] and rest.steps_per_epoch == steps
    assert len(rest) == len(runs[-1]) - start == steps * epochs - start


def test_epochs_and_seeds_differ_in_their_order():
    orders = [[index for keys in StepSampler(50, 5, 2, seed) for _, index in keys] for seed in (0, 1)]
    assert len({tuple(half) for order in orders for half in (order[:50], order[50:])}) == 4


@pytest.mark.parametrize("workers", [0, 1, 3, *NOT_FORKED])
def test_batches_are_the_items_in_the_samplers_order_whatever_the_workers(views, workers, monkeypatch):
    """And stay so until the next one is asked for: workers that are as far ahead as they may be don't touch it."""
    if isinstance(workers, str):
        monkeypatch.setattr(data, "PROCESSES", torch.multiprocessing.get_context(workers))
        workers = 1
    sampler = StepSampler(len(views), batch_size=3, epochs=16, start_step=5)
    for keys, batch in zip(sampler, data.load_batches(views, sampler, workers), strict=True):
        time.sleep(0.04)  # in which workers get ahead
        assert same(batch, collate([views[key] for key in keys])) and not {1, 3} & {*batch["index"].tolist()}
        assert {path for path, _ in batch["bad"]} >= {views.videos.paths[i] for _, i in keys if i in (1, 3)}
        assert all(batch[name].movedim(-4, -1).is_contiguous() for name in ("clip", "sub_clips"))  # as decoders write


def test_memory_that_a_gpu_copies_from_is_locked_while_there_are_batches_as_far_as_it_can_be(views, monkeypatch):
    class Answer:  # as CUDA's, which has a number and, as success, too, is true
        def __init__(self, number):
            self.number = number

        def __int__(self):
            return self.number

    answers = [0, 0, 2, 2, 0, 0, 0, 0]  # of CUDA for a batch's eight parts: success, out of memory
    register, free = Mock(side_effect=map(Answer, answers)), Mock()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Mock(cudaHostRegister=register, cudaHostUnregister=free))
    loader = data.load_batches(views, StepSampler(len(views), 2, 2), workers=1)
    places = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in next(loader).values() if isinstance(x, torch.Tensor)]
    held = dict(call.args[:2] for call, refused in zip(register.mock_calls, answers, strict=True) if not refused)
    locked = [any(start <= a and b <= start + size for start, size in held.items()) for a, b in places]
    assert sum(locked) == len(held) == 6 and not free.called
    loader.close()
    assert sorted(call.args for call in free.mock_calls) == sorted((start,) for start in held)


def test_too_little_memory_and_too_many_processes_are_errors_that_say_what_to_do(views, monkeypatch):
    for owner, name, number, says in (
        (mmap, "mmap", errno.ENOMEM, r"shared memory for batches \(Cannot allocate memory\): take fewer --workers"),
        (data.PROCESSES, "Pipe", errno.EAGAIN, r"can't be started.*ulimit -u"),
        (data.PROCESSES.Process, "start", errno.EAGAIN, r"can't be started.*ulimit -u"),
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=says):
            patched.setattr(owner, name, Mock(side_effect=OSError(number, os.strerror(number))))
            next(data.load_batches(views, StepSampler(len(views), 2, 1), workers=1))


def test_workers_end_with_the_iteration_and_take_nothing_of_dev_shm(views, monkeypatch):
    """Docker gives 64 MB of /dev/shm, and the name of a temporary folder may be too long for a socket."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    maps = Path("/proc/self/maps")
    before = maps.read_text().count("/dev/shm")
    batches = data.load_batches(views, StepSampler(len(views), 2, 2), workers=2)
    list(itertools.islice(batches, 2))  # one of each
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2 and maps.read_text().count("/dev/shm") <= before
    assert os.getpgid(0) not in [os.getpgid(worker.pid) for worker in workers]  # which Ctrl-C reaches whole
    batches.close()
    assert not torch.multiprocessing.active_children()


class Counted(data.Items):
    """Items that tell what they read, and of each thousandth leave a file."""

    def __init__(self, folder):
        self.videos, self.folder, self.made = range(1000), folder, 0

    def empty(self, *batch):
        return {"x": torch.zeros(batch)}

    def write(self, key, item):
        data._begin("", key)
        self.made += 1
        if self.made % 1000 == 0:
            (self.folder / f"{self.made}").touch()
        return []


def test_workers_make_large_batches_ahead_while_nobody_listens(tmp_path):
    """As in a long step."""
    batches = data.load_batches(Counted(tmp_path), StepSampler(1000, 1000, 4), workers=1)
    next(batches)
    ends = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < 3 and time.monotonic() < ends:
        time.sleep(0.01)
    batches.close()
    assert len(os.listdir(tmp_path)) == 3  # the one that is used, and two ahead


def test_an_unreadable_video_has_no_starts_of_another(videos, tmp_path):
    touch(tmp_path, "bad.mp4")
    found = VideoList([videos.paths[0], str(tmp_path / "bad.mp4")], [0, 0], ["a"], "")
    clips = data.TestClips(found, 16, 4, 1, clips=2)
    memory = clips.empty()
    bad = [clips.write(k, memory) for k in (0, 1)]
    assert not bad[0] and bad[1] and memory["start"].isnan().all() and not memory["clips"].any()


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_many_samples(views):
    item, used = views.empty(), []
    for epoch in range(80):
        for index in range(len(views)):
            views.write((epoch, index), item)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
    assert used[-1][0] - used[20][0] < 4 * 2**20 and used[-1][1] == used[20][1]
