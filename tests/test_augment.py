"""Colours as torchvision's, drawn per clip and reproducible; frame differences; FAME's merging against plain loops."""

import functools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import generator
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from test_synthetic import draw
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms.v2 import functional as tv

import augment
import data
import synthetic
from augment import ForegroundBackgroundMerging as Merging

seeds, sizes, portions = st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.01, 1)
close = functools.partial(torch.testing.assert_close, rtol=0, atol=5e-6)
TORCHVISION = {  # what it does to frames, and the least and greatest number
    "brightness": (tv.adjust_brightness, 0, 2),
    "saturation": (tv.adjust_saturation, 0, 2),
    "hue": (tv.adjust_hue, -0.5, 0.5),
    "gray": (lambda frames, _: tv.rgb_to_grayscale(frames, num_output_channels=3), 1, 1),
    "contrast": (tv.adjust_contrast, 0, 2),
}


def random_clips(n: int = 1, frames: int = 3, size: int = 32) -> torch.Tensor:
    """Noise that also holds gray, black, white and saturated pixels, where hue is a special case."""
    clips = torch.rand(n, 3, frames, size, size, generator=generator(0))
    clips[..., 0, :8] = clips[:, :1, ..., 0, :8]
    clips[..., 1, :8] = torch.linspace(0, 1, 8).round()
    clips[..., 2, :] = clips[..., 2, :].round()
    return clips


def augmented(clips: torch.Tensor, **changed: float) -> torch.Tensor:
    params = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, gray=0.0, sigma=0.0) | changed
    return augment.color_augment(clips, torch.tensor([[*params.values()]] * len(clips)))


@pytest.mark.parametrize("name", TORCHVISION)
@given(at=st.floats(0, 1))
def test_values_are_those_of_torchvision(name, at):
    clips = random_clips() * torch.tensor([0.3, 0.6, 1.0])[:, None, None]  # frames of unequal brightness
    function, low, high = TORCHVISION[name]
    value = low + at * (high - low)
    frames = clips.flatten(2, 3)[:, None] if name == "contrast" else clips.transpose(1, 2)  # about the clip's mean
    expected = function(frames, value).transpose(1, 2).reshape(clips.shape)
    close(augmented(clips, **{name: value}), expected)


def test_normalisation_is_that_of_torchvisions_weights():
    made, clips = R3D_18_Weights.DEFAULT.transforms(), random_clips()
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (made.mean, made.std))
    close(augment.normalize(clips), (clips - mean) / std)


@pytest.mark.parametrize("size, width, kernel", [(16, 16, 3), (32, 20, 3), (64, 64, 7), (112, 80, 11)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_that_of_torchvision(size, width, kernel, sigma):
    clips = random_clips(frames=2, size=size)[..., :width]
    expected = tv.gaussian_blur(clips.transpose(1, 2), [kernel, kernel], [sigma, sigma])
    close(augmented(clips, sigma=sigma).transpose(1, 2), expected, atol=2e-6)


@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_the_order_is_brightness_contrast_saturation_hue_gray_blur(gray):
    one_by_one = clips = random_clips()
    params = dict(brightness=1.3, contrast=0.7, saturation=1.4, hue=-0.08, gray=gray, sigma=1.2)
    for name, value in params.items():
        one_by_one = augmented(one_by_one, **{name: value})
    close(augmented(clips, **params), one_by_one)


def test_identity_changes_nothing_and_no_draw_changes_its_input_or_the_precision():
    clips, rng = random_clips().double().expand(6, -1, -1, -1, -1), np.random.default_rng(0)
    before = clips.clone()
    assert torch.equal(augmented(clips), clips)
    never = data.draw_color(rng, jitter_p=0, gray_p=0, blur_p=0)
    assert never.dtype == np.float32 and tuple(never) == augment.IDENTITY
    color = torch.tensor(np.stack([data.draw_color(rng, jitter_p=1) for _ in clips]))
    exact = augment.color_augment(clips, color)
    assert torch.equal(clips, before) and exact.min() >= 0 and exact.max() <= 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for same in (clips, clips.float()):
            close(augment.color_augment(same, color), exact.to(same.dtype))


def test_draws_depend_on_the_generator_alone_and_have_the_stated_probabilities_and_ranges():
    first, second = np.random.default_rng(0), np.random.default_rng(0)
    draws = np.stack([data.draw_color(first) for _ in range(4000)])
    assert np.array_equal(draws, [data.draw_color(second) for _ in range(4000)])
    applied = draws != augment.IDENTITY
    assert (applied[:, :4] == applied[:, :1]).all()  # the jitter as a whole
    np.testing.assert_allclose(applied[:, 3:].mean(0), (0.8, 0.2, 0.5), atol=0.03)
    for column, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4), (3, -0.1, 0.1), (5, 0.1, 2)):
        found = np.quantile(draws[applied[:, column], column], (0, 0.5, 1))
        np.testing.assert_allclose(found, (low, (low + high) / 2, high), atol=(high - low) / 40)
    assert set(draws[:, 4]) == {0, 1} and np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.06


@given(st.integers(0, 2**31), st.integers(2, 12), st.tuples(*[st.integers(1, 9)] * 3))
def test_differences_over_spans_are_of_brightness_a_plane_each(seed, frames, spans):
    clip = torch.rand(2, 3, frames, 2, 3, generator=generator(seed), dtype=torch.float64)
    gray = 0.2989 * clip[:, 0] + 0.587 * clip[:, 1] + 0.114 * clip[:, 2]
    for plane, span in zip(augment.frame_difference(clip, spans).unbind(1), spans, strict=True):
        span = min(span, frames - 1)
        first = [min(t, frames - 1 - span) for t in range(frames)]  # the last one stands for those beyond the end
        torch.testing.assert_close(plane, torch.stack([gray[:, t + span] - gray[:, t] + 1 for t in first], 1) / 2)


@pytest.mark.parametrize("spans", [(), (1,), (1, 4, 8)], ids=str)
@pytest.mark.parametrize("size", [(52, 60), (24, 24)])
@pytest.mark.parametrize("order", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("first", [False, True], ids=["difference first", "colours first"])
def test_all_clips_at_once_as_on_a_gpu_give_the_same_as_one_by_one_on_a_cpu(size, spans, order, first, monkeypatch):
    rng = np.random.default_rng(0)
    clips = torch.randint(256, (6, 4, *size, 3), generator=generator(0)).byte().movedim(-1, 1)
    color = torch.tensor(np.stack([data.draw_color(rng, gray_p=0.4) for _ in clips]))
    color[0] = torch.tensor(augment.IDENTITY)
    expected = augment.encoder_input(clips, color, spans, order, first)
    monkeypatch.setattr(augment, "_on_cpu", lambda clips: False)
    monkeypatch.setattr(augment, "_on_gpu", augment._encoder_input)
    found = augment.encoder_input(clips, color, spans, order, first)
    close(found, expected, atol=1e-5)
    coloured = color if first else color.new_tensor([augment.IDENTITY] * 6)
    shown = augment.color_augment(clips / 255, coloured)
    shown = augment.frame_difference(shown, spans) if spans else shown
    close(found, augment.normalize(shown if first else augment.color_augment(shown, color)), atol=1e-5)
    assert found.is_contiguous(memory_format=order) and expected.is_contiguous(memory_format=order)


def test_colours_that_cannot_be_compiled_are_computed_all_the_same_and_one_line_says_so(monkeypatch, capsys):
    fails = Mock(side_effect=torch._dynamo.exc.TorchDynamoException("there is no compiler\nand much more"))
    clips, color = (255 * random_clips(2)).byte(), torch.tensor([(1.2, 0.9, 1.1, 0.05, 0, 1.0)] * 2)
    expected = augment.encoder_input(clips, color)
    monkeypatch.setattr(augment, "_on_cpu", lambda clips: False)
    monkeypatch.setattr(augment, "_on_gpu", None)
    monkeypatch.setattr(torch, "compile", Mock(return_value=fails))
    for _ in range(2):
        close(augment.encoder_input(clips, color), expected, atol=1e-5)
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no compiler" in line


def flickering_clips(seed: int, *shape: int, colors: int = 256) -> torch.Tensor:
    """uint8 noise of few or many colours."""
    return (torch.randint(colors, shape, generator=generator(seed)) * (255 // (colors - 1))).byte()


def likelihood_of(clip, region) -> np.ndarray:
    """P(F | x) for 16 levels of each colour, with a pixel of 224 × 224 more of each in B; clip in [0, 1]."""
    levels = np.minimum((16 * clip.mean(1)).astype(int), 15)
    color, ordered, count = levels[0] * 256 + levels[1] * 16 + levels[2], np.sort(region.ravel()), region.size
    front, back = region >= ordered[count - math.ceil(0.5 * count)], region <= ordered[math.ceil(0.1 * count) - 1]
    f = np.bincount(color[front], minlength=4096) / front.sum()
    more = count / 224**2
    b = (np.bincount(color[back], minlength=4096) + more) / (back.sum() + 4096 * more)
    return (f / (f + b))[color]


@given(seeds, st.integers(1, 4), sizes, sizes, st.sampled_from([2, 3, 256]))
def test_seed_region_and_color_likelihood_of_bytes_and_floats(seed, frames, height, width, colors):
    clips = flickering_clips(seed, 2, 3, frames, height, width, colors=colors)
    region = Merging.seed_region(clips)
    for given_clips, unit in ((clips, 255), (clips.double() / 255, 1)):
        found = Merging.seed_region(given_clips).double() / unit
        soft = Merging.color_likelihood(given_clips, region)
        for n, clip in enumerate(clips.double().numpy() / 255):
            change = np.abs(np.diff(clip, axis=1)).sum((0, 1)) / max(frames - 1, 1)
            np.testing.assert_allclose(found[n], change, atol=1e-6)
            np.testing.assert_allclose(soft[n], likelihood_of(clip, region[n].numpy()), atol=1e-6)


@given(seeds, st.integers(1, 45), st.integers(1, 45))
def test_blur_of_each_map_alone(seed, height, width):
    """By a Gaussian, a tenth of each side wide; edges are mirrors."""
    maps = torch.rand(3, height, width, generator=generator(seed), dtype=torch.float64)
    radius = np.array([height, width]) // 20
    options = dict(sigma=(2 * radius + 1) / 3, radius=radius, mode="mirror")
    expected = torch.from_numpy(np.stack([gaussian_filter(own, **options) for own in maps.numpy()]))
    torch.testing.assert_close(Merging.blur(maps), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Merging.blur(maps.float()), expected.float())


@pytest.mark.parametrize("grown", [1, 4])
def test_masks_keep_what_moves_in_small_and_in_large_pictures(grown):
    """Whose noise lets no pixel stand still, as that of a codec."""
    rng, kept, area = np.random.default_rng(0), 0, 0
    for motion in synthetic.MOTIONS:
        clip, objects = (draw(motion, 0, shake=0, masked=masked)[:32:2] for masked in (False, True))
        clip = np.clip(clip + rng.normal(0, 2, clip.shape), 0, 255).astype(np.uint8)
        clip, objects = (video.repeat(grown, 1).repeat(grown, 2) for video in (clip, objects[..., 0]))
        mask = Merging().foreground_of(torch.from_numpy(clip).movedim(-1, 0)[None])[0].numpy()
        kept, area = kept + (mask * objects).sum(), area + objects.sum()
    assert kept > 0.95 * area


@given(seeds, sizes, sizes, portions, st.sampled_from([1, 3, 1000]))
@example(0, 5, 5, 0.28, 3)  # 0.28 · 25 is 7.000…01
def test_top_portion_has_its_size_and_takes_the_greatest(seed, height, width, portion, values):
    soft = torch.randint(values, (1, height, width), generator=generator(seed)) / values
    tie = torch.randint(4, (1, height, width), generator=generator(seed + 1)).float()
    mask = Merging.top_portion(soft, portion, tie)
    ranks = np.lexsort((-tie.flatten().numpy(), -soft.flatten().numpy()))
    count = 7 if portion == 0.28 and height * width == 25 else math.ceil(portion * height * width - 1e-9)
    assert mask.flatten().nonzero().flatten().tolist() == sorted(ranks[:count])


@given(seeds, st.integers(4, 9), st.integers(4, 9), portions)
def test_top_cells_are_those_of_a_loop(seed, height, width, portion):
    region = torch.rand(1, height, width, generator=generator(seed), dtype=torch.float64)
    rows, columns = 4 * np.arange(height)[:, None] // height, 4 * np.arange(width) // width
    cell = rows * 4 + columns
    sums = np.bincount(cell.ravel(), region.numpy().ravel())
    chosen = np.argsort(-sums)[: math.ceil(16 * portion - 1e-9)]
    np.testing.assert_array_equal(Merging.top_cells(region, portion, 4)[0], np.isin(cell, chosen))


@pytest.mark.parametrize("mask", Merging.MASKS)
@given(seed=seeds)
def test_masks_have_their_size_and_are_those_of_each_clip_alone(mask, seed):
    """Gauss is an ellipse in the middle, seed what moves most, fame colours of that."""
    clips, merging = flickering_clips(seed, 4, 3, 3, 20, 40, colors=3), Merging(0.5, mask)
    clips[0] = 255
    masks, region = merging.foreground_of(clips), Merging.seed_region(clips)
    assert all(torch.equal(merging.foreground_of(clips[n : n + 1])[0], masks[n]) for n in range(4))
    assert masks.flatten(1).sum(1).tolist() == [400] * 4
    middle = -(torch.linspace(-1, 1, 20)[:, None] ** 2) - torch.linspace(-1, 1, 40) ** 2
    of_colors = Merging.blur(Merging.color_likelihood(clips, Merging.blur(region)))
    score = {"gauss": middle, "seed": region[1], "fame": of_colors[1]}.get(mask)
    assert score is None or score[masks[1]].min() >= score[~masks[1]].max() - 1e-5


@given(seeds, st.sampled_from(Merging.MASKS), st.sampled_from(Merging.BRANCHES), st.booleans(), st.integers(2, 6))
def test_foregrounds_are_put_on_other_videos_or_on_the_other_view(seed, mask, branches, floats, batch):
    """By torch's seed; each video lends its own once a view, and those of a video's two views differ, if they can."""
    clips = flickering_clips(seed, batch, 2, 3, 3, 8, 8)
    clips = clips / 255 if floats else clips
    before, merging = clips.clone(), Merging(0.3, mask, branches=branches)
    torch.manual_seed(seed)
    merged = merging(clips)
    torch.manual_seed(seed)
    assert torch.equal(merging(clips), merged) and torch.equal(clips, before) and merged.dtype == clips.dtype
    inner, lent = Merging(0.3, mask, "intra", branches)(clips), []
    for view in range(2 if branches == "both" else 1):
        front = merging.foreground_of(clips[:, view])[:, None, None]
        assert torch.equal(inner[:, view], torch.where(front, clips[:, view], clips[:, 1 - view]))
        on_each = torch.where(front[:, None], clips[:, None, view], clips[None, :, view])  # own and lending video
        lent.append((merged[:, None, view] == on_each).flatten(2).all(2))
        assert (lent[view].sum(0) == 1).all() and (lent[view].sum(1) == 1).all() and not lent[view].diagonal().any()
    if branches == "both":
        assert batch == 2 or not (lent[0] & lent[1]).any()
    else:
        assert torch.equal(merged[:, 1], clips[:, 1]) and torch.equal(inner[:, 1], clips[:, 1])
    assert torch.equal(Merging(1.0, mask, branches=branches)(clips), clips)  # all of the picture is foreground


def test_every_other_video_lends_its_background_equally_often():
    torch.manual_seed(0)
    clips = torch.arange(4)[:, None, None, None, None, None].expand(4, 2, 3, 2, 4, 4).byte()
    picked = torch.stack([Merging(mask="gauss")(clips)[:, 0, 0, 0, 0, 0] for _ in range(600)])  # a corner
    counts = torch.eye(4)[picked.long()].sum(0)
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0 and ((off_diagonal - 200).abs() < 4 * (600 * 2 / 9) ** 0.5).all()


def test_what_merging_cannot_do_is_an_error():
    for flags in (dict(mask="box"), dict(background="black"), dict(branches="three"), dict(foreground=math.nan)):
        with pytest.raises(ValueError, match=r"choose from|portion"):
            Merging(**flags)
    with pytest.raises(ValueError, match="two videos"):
        Merging()(flickering_clips(0, 1, 2, 3, 3, 8, 8))
