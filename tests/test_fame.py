"""FAME: its masks against plain loops, the merging, and the method in MoCo and FIMA."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_trains, generator, same, views_without_colours
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from test_fima import build

import fame
import fima
import moco
from augment import ForegroundBackgroundMerging as Merging

seeds, sizes, portions = st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.01, 1)


def random_clips(seed: int, *shape: int, colors: int = 256) -> torch.Tensor:
    """uint8 clips of few or many colours, in which pixels change at random rates."""
    g = generator(seed)
    still = torch.randint(colors, (*shape[:-3], 1, *shape[-2:]), generator=g) * (255 // max(colors - 1, 1))
    change = torch.randint(-40, 41, shape, generator=g) * (torch.rand(shape[-2:], generator=g) < 0.5)
    return (still + change).clamp(0, 255).byte()


def seed_of(clip) -> np.ndarray:
    return np.abs(np.diff(clip, axis=1)).sum((0, 1)) / max(clip.shape[1] - 1, 1)


def likelihood_of(clip, region) -> np.ndarray:
    """P(F | x) for 16 levels of each colour, with one pixel more of each in B; clip in [0, 1]."""
    levels = np.minimum((16 * clip.mean(1)).astype(int), 15)
    color, ordered, count = levels[0] * 256 + levels[1] * 16 + levels[2], np.sort(region.ravel()), region.size
    front, back = region >= ordered[count - math.ceil(0.5 * count)], region <= ordered[math.ceil(0.1 * count) - 1]
    f = np.bincount(color[front], minlength=4096) / front.sum()
    b = (np.bincount(color[back], minlength=4096) + 1) / (back.sum() + 4096)
    return (f / (f + b))[color]


def blur_of(picture: np.ndarray) -> np.ndarray:
    """A Gaussian, a tenth of each side wide; edges are mirrors."""
    radius = np.array(picture.shape) // 10 // 2
    return gaussian_filter(picture, (2 * radius + 1) / 3, mode="mirror", radius=radius)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    layers = [torch.from_numpy(rng.random((1, 3, n, n))) for n in (5, 9, 17, 33)]
    picture = sum(F.interpolate(x, (side, side), mode="bicubic", align_corners=True)[0].numpy() for x in layers)
    return (picture - picture.min()) / np.ptp(picture)


def moving_disc(rng: np.random.Generator, side: int, textured: bool, size: float, shift: float) -> tuple:
    """A disc that moves over a textured picture: uint8 (3, 16, side, side), and where it is, (16, side, side)."""
    angle, middle = 2 * np.pi * rng.random(), side / 2 + 0.08 * side * rng.uniform(-1, 1, 2)
    steps = (shift * side * np.outer(np.linspace(-0.5, 0.5, 16), (np.sin(angle), np.cos(angle)))).round().astype(int)
    y, x = np.mgrid[:side, :side] - middle[:, None, None]
    look = texture(rng, side) if textured else np.broadcast_to(rng.random((3, 1, 1)), (3, side, side))
    where = np.stack([np.roll(np.hypot(y, x) < size * side / 2, step, (0, 1)) for step in steps])
    moved = np.stack([np.roll(look, step, (1, 2)) for step in steps], 1)
    clip = np.where(where, moved, texture(rng, side)[:, None]) + rng.normal(0, 0.004, moved.shape)
    return (255 * clip.clip(0, 1)).round().astype(np.uint8), where


@given(seeds, st.integers(1, 4), sizes, sizes, st.sampled_from([2, 3, 256]))
def test_seed_region_and_color_likelihood_of_bytes_and_floats(seed, frames, height, width, colors):
    clips = random_clips(seed, 2, 3, frames, height, width, colors=colors)
    region = Merging.seed_region(clips)
    for given_clips, unit in ((clips, 255), (clips.double() / 255, 1)):
        found = Merging.seed_region(given_clips).double() / unit
        soft = Merging.color_likelihood(given_clips, region)
        for n, clip in enumerate(clips.double().numpy() / 255):
            np.testing.assert_allclose(found[n], seed_of(clip), atol=1e-6)
            np.testing.assert_allclose(soft[n], likelihood_of(clip, region[n].numpy()), atol=1e-6)


@settings(max_examples=12)
@given(seeds, st.integers(1, 45), st.integers(1, 45))
def test_blur_of_each_map_alone(seed, height, width):
    maps = torch.rand(3, height, width, generator=generator(seed), dtype=torch.float64)
    expected = torch.from_numpy(np.stack([blur_of(own) for own in maps.numpy()]))
    torch.testing.assert_close(Merging.blur(maps), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Merging.blur(maps.float()), expected.float())


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize(("side", "rounds"), [(32, 8), (112, 4), pytest.param(224, 2, marks=pytest.mark.slow)])
def test_masks_keep_what_moves(side, rounds, textured):
    rng, kept = np.random.default_rng(0), []
    for size, shift in ((0.35, 0.3), (0.2, 0.3), (0.5, 0.2)) * rounds:
        clip, where = moving_disc(rng, side, textured, size, shift)
        mask = Merging(0.5).foreground_of(torch.from_numpy(clip)[None])[0].numpy()
        kept.append((mask & where).sum((1, 2)) / where.sum((1, 2)))
    assert np.mean(kept) > 0.94


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
    clips, merging = random_clips(seed, 4, 3, 3, 20, 40, colors=3), Merging(0.5, mask)
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
    clips = random_clips(seed, batch, 2, 3, 3, 8, 8)
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
    counts = F.one_hot(picked.long()).sum(0)
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0 and ((off_diagonal - 200).abs() < 4 * (600 * 2 / 9) ** 0.5).all()


def test_what_merging_cannot_do_is_an_error():
    assert fame.FAMEConfig(batch_size=1, background="intra")  # which needs no other video
    for flags in (dict(mask="box"), dict(background="black"), dict(branches="three"), dict(foreground=math.nan)):
        with pytest.raises(ValueError, match=r"choose from|portion"):
            Merging(**flags)
    with pytest.raises(ValueError, match="two videos"):
        Merging()(random_clips(0, 1, 2, 3, 3, 8, 8))


def test_fame_is_moco_on_merged_clips():
    views, plain = views_without_colours(sub_clips=0), build(moco)
    variants = [dict(branches="both", foreground=0.3), dict(background="intra"), dict(background="none")]
    for flags in (*variants, *(dict(mask=mask) for mask in Merging.MASKS)):
        model = build(fame, **flags)
        torch.manual_seed(0)
        expected = copy.deepcopy(plain)(views | {"clip": Merging(**flags)(views["clip"])})
        torch.manual_seed(0)
        assert torch.equal(model(views)["vv"], expected["vv"])


@pytest.mark.parametrize("branches", Merging.BRANCHES)
def test_rgb_is_merged_and_motion_is_that_of_the_video_itself(branches):
    model, views = build(fima, fame=branches), views_without_colours()
    with mock.patch.object(model, "encoder_input", wraps=model.encoder_input) as encoder_input:
        torch.manual_seed(0)
        assert_trains(model, model(views))
    torch.manual_seed(0)
    shown = Merging(branches=branches)(views["clip"]), views["clip"], views["sub_clips"]
    merged, clips, sub_clips = map(model.both, shown)
    given = [(call.args[0], call.kwargs.get("difference", False)) for call in encoder_input.call_args_list]
    assert same(given, [(merged, False), (clips, True), (sub_clips.flatten(0, 1), True)])
