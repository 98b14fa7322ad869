"""Views, their boxes, test clips and the order of samples."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import encode, moving_texture, same
from hypothesis import given
from hypothesis import strategies as st

from data import PretrainingViews, StepSampler, TestClips, VideoList, crop_resize, draw_region, empty_clips
from losses import bin_centers
from video import Video

seeds, few = st.integers(0, 2**32 - 1), st.integers(1, 4)
NOTHING = VideoList([""], [0], [], "")


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixel (x, y) has red 2x and green 2y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x, 2 * y, np.full_like(x, 128)], -1).astype(np.uint8)


def assert_shows_box(clip: torch.Tensor, box: torch.Tensor) -> None:
    """Each of 7 × 7 bins of a clip of coordinates shows the place that the box says, within half a bin."""
    bins, size = 7, clip.shape[-1]
    x0, y0, x1, y1 = box.tolist()
    said = bin_centers(torch.tensor([[x0, y0, x1, y1]]), bins, bins)[0].unflatten(0, (bins, bins))  # (rows, columns, 2)
    seen = clip.double().mean(1)[:2].unflatten(1, (bins, -1)).unflatten(3, (bins, -1)).mean((2, 4)) / 2 + 0.5
    for axis, bin_size in ((0, abs(x1 - x0) / bins), (1, abs(y1 - y0) / bins)):
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
    path = encode(tmp_path / "coordinates.mp4", [coordinates(96, 120)] * 34, "libx264", crf="1")
    views, flips = PretrainingViews(VideoList([str(path)], [-1], [], ""), 56), set()
    for epoch in range(12):
        sample = views[epoch, 0]
        for clip, box in zip(sample["clip"], sample["box"], strict=True):
            assert_shows_box(clip, box)
            flips.add(bool(box[0] > box[2]))
    assert flips == {False, True}
    for clip in TestClips(views.videos, 56, frames=4, clips=2)[0]["clips"]:  # the central square, 7/8 of the height
        assert_shows_box(clip, torch.tensor([60 - 42, 48 - 42, 60 + 42, 48 + 42]))


def test_a_sample_depends_on_seed_epoch_and_index_only(videos):
    views, reseeded = (PretrainingViews(videos, 28, frames=4, seed=seed) for seed in (0, 1))
    samples = {key: views[key] for key in itertools.product((0, 1), range(4))}
    for key in reversed(samples):
        assert same(views[key], samples[key]) and same(copy.deepcopy(views)[key], samples[key])
    for name, other in itertools.product(("clip", "box", "color"), (samples[1, 0], reseeded[0, 0])):
        assert not torch.equal(samples[0, 0][name], other[name])


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
