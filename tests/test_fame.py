"""FAME: its masks against plain loops, the merging, the method in MoCo and FIMA, and the command line."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import generator, views_without_colours
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import rgb_to_hsv

import fame
import fima
import moco
from augment import ForegroundBackgroundMerging as Merging
from train import UserError

seeds, sizes, portions = st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.01, 1)
TINY = dict(encoder="conv4", width=0.25, crop=32, queue=12, batch_size=3)


def random_clips(seed: int, *shape: int, colors: int = 256) -> torch.Tensor:
    """uint8 clips of few or many colours, in which pixels change at random rates."""
    g = generator(seed)
    still = torch.randint(colors, (*shape[:-3], 1, *shape[-2:]), generator=g) * (255 // max(colors - 1, 1))
    change = torch.randint(-40, 41, shape, generator=g) * (torch.rand(shape[-2:], generator=g) < 0.5)
    return (still + change).clamp(0, 255).byte()


def seed_loop(clip) -> np.ndarray:
    _, frames, height, width = clip.shape
    region = np.zeros((height, width))
    for c, t, i, j in np.ndindex(3, frames - 1, height, width):
        region[i, j] += abs(float(clip[c, t + 1, i, j]) - float(clip[c, t, i, j]))
    return region / max(frames - 1, 1)


def likelihood_loop(clip, region) -> np.ndarray:
    """P(F | x) for 16 levels of each colour, with one pixel more of each in B; clip in [0, 1]."""
    height, width = region.shape
    pixels = list(np.ndindex(height, width))
    color = {(i, j): tuple(min(int(16 * clip[c, :, i, j].mean()), 15) for c in range(3)) for i, j in pixels}
    ordered = sorted((region[p] for p in pixels), reverse=True)
    front = [p for p in pixels if region[p] >= ordered[math.ceil(0.5 * len(pixels)) - 1]]
    back = [p for p in pixels if region[p] <= ordered[len(pixels) - math.ceil(0.1 * len(pixels))]]
    result = np.full((height, width), 0.5)
    for p in pixels:
        f, b = (sum(color[q] == color[p] for q in part) for part in (front, back))
        f, b = f / len(front), (b + 1) / (len(back) + 16**3)
        result[p] = f / (f + b)
    return result


def blur_loop(picture: np.ndarray) -> np.ndarray:
    """Each pixel the mean of those about it by a Gaussian, a tenth of each side wide; edges are mirrors."""
    for _ in range(2):  # columns, then rows
        size = len(picture)
        kernel = int(0.1 * size) // 2 * 2 + 1
        offsets = range(-(kernel // 2), kernel // 2 + 1)
        weights = [math.exp(-0.5 * (d / (kernel / 3)) ** 2) for d in offsets]
        lines = [
            sum(w * picture[size - 1 - abs(size - 1 - abs(i + d))] for d, w in zip(offsets, weights, strict=True))
            for i in range(size)
        ]
        picture = np.array(lines).T / sum(weights)
    return picture


def released_mask(clip: np.ndarray, portion: float = 0.5) -> np.ndarray:
    """The mask of FAME's released code, as a note on it says: seed and soft mask blurred, 10 × 10 × 10 bins of HSV on
    (S cos H, S sin H, V) with H, in radians, times 2π once more, 1 added to the background's. (3, T, H, W) in [0, 1].
    """
    height, width = clip.shape[2:]
    seed = blur_loop(np.abs(np.diff(clip, axis=1)).sum(0).mean(0)).ravel()
    hsv = rgb_to_hsv(clip.mean(1).reshape(3, -1).T)
    hue, saturation, value = hsv[:, 0] * (2 * np.pi) ** 2, hsv[:, 1], hsv[:, 2]
    axes = (saturation * np.cos(hue) + 1) / 2, (saturation * np.sin(hue) + 1) / 2, value
    color = sum(np.round(9 * axis).astype(int) * 10**i for i, axis in enumerate(axes))
    ranks = np.argsort(-seed, kind="stable")
    front = np.bincount(color[ranks[: int(0.5 * len(ranks))]], minlength=1000)
    back = np.bincount(color[ranks[len(ranks) - int(0.1 * len(ranks)) :]], minlength=1000) + 1
    front, back = front / front.sum(), back / back.sum()
    soft = blur_loop((front / (front + back))[color].reshape(height, width)).ravel()
    mask = np.zeros(len(soft), bool)
    mask[np.argsort(-soft, kind="stable")[: int(portion * len(soft))]] = True
    return mask.reshape(height, width)


def moving_disc(rng: np.random.Generator, side: int, textured: bool, size: float, shift: float) -> tuple:
    """A disc, of one colour or textured, that moves over a textured picture before a camera with a little noise: uint8
    (3, 16, side, side), and where it is in each frame (16, side, side). Size and path are in sides of the picture.
    """

    def texture(side: int, cells: tuple) -> np.ndarray:
        layers = [torch.from_numpy(rng.random((1, 3, n, n))) for n in cells]
        layers = [F.interpolate(x, (side, side), mode="bicubic", align_corners=True)[0].numpy() for x in layers]
        picture = sum(layers)
        return (picture - picture.min()) / (picture.max() - picture.min())

    across = round(size * side)
    offset = (np.arange(across) - (across - 1) / 2) ** 2
    disc = offset[:, None] + offset < (across / 2) ** 2
    look = texture(across, (3, 5, 9)) if textured else np.broadcast_to(rng.random((3, 1, 1)), (3, across, across))
    clip = np.repeat(texture(side, (5, 9, 17, 33))[:, None], 16, 1)
    where, angle = np.zeros((16, side, side), bool), 2 * np.pi * rng.random()
    middle = (side - across) / 2 + 0.08 * side * rng.uniform(-1, 1, 2)
    for t in range(16):
        steps = shift * side * (t / 15 - 0.5) * np.array([np.sin(angle), np.cos(angle)])
        y, x = (middle + steps).round().astype(int).clip(0, side - across)
        clip[:, t, y : y + across, x : x + across][:, disc] = look[:, disc]
        where[t, y : y + across, x : x + across] = disc
    clip += rng.normal(0, 0.004, clip.shape)
    return (255 * clip.clip(0, 1)).round().astype(np.uint8), where


def cells_loop(region, portion) -> np.ndarray:
    height, width = region.shape
    sums = {(r, c): 0.0 for r in range(4) for c in range(4)}
    for i, j in np.ndindex(height, width):
        sums[4 * i // height, 4 * j // width] += region[i, j]
    chosen = sorted(sums, key=lambda cell: -sums[cell])[: math.ceil(16 * portion - 1e-9)]
    return np.array([[(4 * i // height, 4 * j // width) in chosen for j in range(width)] for i in range(height)])


# -------------------------------------------------------------------------------------------------- masks, Eq. 2 and 3


@given(seeds, st.integers(1, 4), sizes, sizes)
def test_seed_region_is_that_of_a_loop_for_bytes_and_floats(seed, frames, height, width):
    clips = random_clips(seed, 2, 3, frames, height, width)
    for given_clips, unit in ((clips, 255), (clips.double() / 255, 1)):
        found = Merging.seed_region(given_clips)
        assert found.shape == (2, height, width) and found.is_floating_point()
        for region, clip in zip(found.double().numpy(), clips.double().numpy() / 255, strict=True):
            np.testing.assert_allclose(region / unit, seed_loop(clip), atol=1e-6)


@given(seeds, st.integers(2, 4))
def test_seed_region_reads_backwards_and_of_a_still_clip_is_zero(seed, frames):
    clips = random_clips(seed, 2, 3, frames, 4, 5)
    assert torch.equal(Merging.seed_region(clips), Merging.seed_region(clips.flip(2)))
    assert not Merging.seed_region(clips[:, :, :1].expand(-1, -1, frames, -1, -1)).any()


@given(seeds, sizes, sizes, st.sampled_from([2, 3, 256]))
def test_color_likelihood_is_that_of_a_loop(seed, height, width, colors):
    clips = random_clips(seed, 2, 3, 3, height, width, colors=colors)
    region = Merging.seed_region(clips)
    soft = Merging.color_likelihood(clips, region)
    for found, clip, own in zip(soft.numpy(), clips.double().numpy() / 255, region.numpy(), strict=True):
        np.testing.assert_allclose(found, likelihood_loop(clip, own), atol=1e-6)
    torch.testing.assert_close(Merging.color_likelihood(clips.double() / 255, region), soft)


@given(seeds, st.sampled_from([1, 3, 256]))
def test_color_likelihood_does_not_know_where_pixels_are_and_counts_one_colour_once(seed, colors):
    clips = random_clips(seed, 2, 3, 3, 4, 5, colors=colors)
    region = Merging.seed_region(clips)
    soft = Merging.color_likelihood(clips, region)
    assert (soft >= 0).all() and (soft <= 1).all()
    order = torch.randperm(20, generator=generator(seed))
    shuffled = clips.flatten(3)[..., order].view_as(clips), region.flatten(1)[:, order].view_as(region)
    assert torch.equal(Merging.color_likelihood(*shuffled), soft.flatten(1)[:, order].view_as(soft))
    plain = Merging.color_likelihood(torch.full_like(clips, 77), region)
    assert (plain == plain[:, :1, :1]).all()  # one colour says nothing of where


@settings(max_examples=12)
@given(seeds, st.integers(1, 45), st.integers(1, 45))
def test_blur_is_that_of_a_loop_and_of_each_map_alone(seed, height, width):
    maps = torch.rand(3, height, width, generator=generator(seed), dtype=torch.float64)
    blurred = Merging.blur(maps)
    for found, own in zip(blurred.numpy(), maps.numpy(), strict=True):
        np.testing.assert_allclose(found, blur_loop(own), atol=1e-12)
    torch.testing.assert_close(Merging.blur(maps.float()), blurred.float())
    torch.testing.assert_close(Merging.blur(maps[1:2]), blurred[1:2])
    torch.testing.assert_close(Merging.blur(torch.ones_like(maps)), torch.ones_like(maps))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Merging.blur(maps.float()), blurred.float())


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize(("side", "clips"), [(32, 24), (112, 12), (224, 6)])
def test_masks_keep_as_much_of_what_moves_as_the_released_ones(side, clips, textured):
    rng = np.random.default_rng(0)
    drawn = [moving_disc(rng, side, textured, *(((0.35, 0.3), (0.2, 0.3), (0.5, 0.2))[i % 3])) for i in range(clips)]
    masks = Merging(0.5).foreground_of(torch.from_numpy(np.stack([clip for clip, _ in drawn]))).numpy()

    def kept(mask, where):
        return np.mean([(mask & place).sum() / place.sum() for place in where])

    ours = [kept(mask, where) for mask, (_, where) in zip(masks, drawn, strict=True)]
    released = [kept(released_mask(clip / 255), where) for clip, where in drawn]
    assert np.mean(ours) > max(np.mean(released) - 0.02, 0.9), (np.mean(ours), np.mean(released))


@given(seeds, sizes, sizes, portions, portions, st.sampled_from([1, 3, 1000]))
def test_top_portion_has_its_size_is_nested_and_takes_the_greatest(seed, height, width, one, other, values):
    g = generator(seed)
    soft = torch.randint(values, (3, height, width), generator=g) / values
    tie = torch.randint(4, (3, height, width), generator=g).float()
    small, large = (Merging.top_portion(soft, portion, tie) for portion in sorted((one, other)))
    assert small.flatten(1).sum(1).tolist() == [math.ceil(min(one, other) * height * width - 1e-9)] * 3
    assert (small <= large).all()
    for mask, value, second in zip(small.flatten(1), soft.flatten(1), tie.flatten(1), strict=True):
        ranks = sorted(range(len(value)), key=lambda p: (-value[p], -second[p], p))
        assert sorted(mask.nonzero().flatten().tolist()) == sorted(ranks[: int(mask.sum())])


def test_top_portion_forgives_rounding_of_the_product():
    assert Merging.top_portion(torch.rand(1, 5, 5), 0.28, torch.zeros(1, 5, 5)).sum() == 7  # 0.28 · 25 is 7.000…01


@given(seeds, st.integers(4, 9), st.integers(4, 9), portions)
def test_top_cells_are_those_of_a_loop(seed, height, width, portion):
    region = torch.rand(2, height, width, generator=generator(seed), dtype=torch.float64)
    mask = Merging.top_cells(region, portion, 4)
    for found, own in zip(mask.numpy(), region.numpy(), strict=True):
        np.testing.assert_array_equal(found, cells_loop(own, portion))


def test_grid_takes_eight_of_sixteen_cells_and_gauss_the_middle():
    clips = random_clips(0, 2, 3, 3, 16, 24)
    grid = Merging(mask="grid").foreground_of(clips)
    assert grid.flatten(1).sum(1).tolist() == [8 * 4 * 6] * 2
    gauss = Merging(mask="gauss").foreground_of(clips)
    assert gauss.flatten(1).sum(1).tolist() == [16 * 24 // 2] * 2
    assert gauss[:, 8, 12].all() and not gauss[:, 0, 0].any()
    inside = torch.linspace(-1, 1, 16)[:, None] ** 2 + torch.linspace(-1, 1, 24) ** 2
    assert inside[gauss[0]].max() <= inside[~gauss[0]].min() + 1e-5  # an ellipse
    region = Merging.seed_region(clips)
    seed = Merging(mask="seed").foreground_of(clips)
    assert region[0][seed[0]].min() >= region[0][~seed[0]].max()


@pytest.mark.parametrize("mask", Merging.MASKS)
@given(seed=seeds)
def test_masks_follow_their_clips_and_no_other(mask, seed):
    clips = random_clips(seed, 4, 3, 3, 8, 8, colors=3)
    merging, order = Merging(0.3, mask), torch.randperm(4, generator=generator(seed))
    masks = merging.foreground_of(clips)
    assert torch.equal(merging.foreground_of(clips[order]), masks[order])
    assert torch.equal(torch.cat([merging.foreground_of(clip[None]) for clip in clips]), masks)


def moving_square(side: int = 32, frames: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A red square that goes right before green and blue stripes that stand still, and where it is in any frame."""
    clip = torch.zeros(3, frames, side, side, dtype=torch.uint8)
    clip[1, :, ::4], clip[2, :, 2::4] = 200, 200
    where = torch.zeros(side, side, dtype=torch.bool)
    for t in range(frames):
        clip[:, t, 10:20, 6 + t : 16 + t] = torch.tensor([220, 20, 20], dtype=torch.uint8)[:, None, None]
        where[10:20, 6 + t : 16 + t] = True
    return clip, where


def test_fame_finds_the_whole_of_a_moving_square_where_the_seed_has_its_edges():
    clip, where = moving_square()
    mask = Merging(0.25, "fame").foreground_of(clip[None])[0]
    assert (mask & where).sum() == where.sum()
    inner = where.clone()
    inner[:, :13] = inner[:, 16:] = False  # red in every frame
    assert Merging.seed_region(clip[None])[0][inner].max() == 0 and mask[inner].all()


@pytest.mark.parametrize("mask", Merging.MASKS)
@pytest.mark.parametrize("value", [0, 255])
def test_still_clips_of_one_colour_have_a_foreground_of_the_right_size(mask, value):
    clips = torch.full((2, 3, 4, 8, 8), value, dtype=torch.uint8)
    found = Merging(0.5, mask).foreground_of(clips)
    assert found.flatten(1).sum(1).tolist() == [32, 32]


# ------------------------------------------------------------------------------------------------------- merging, Eq. 4


def videos_by_colour(batch: int) -> torch.Tensor:
    """Clips in which each view of each video has a value of its own: 10 · video + view."""
    values = 10 * torch.arange(batch)[:, None] + torch.arange(2)
    return values[..., None, None, None, None].expand(-1, -1, 3, 2, 4, 4).byte()


@pytest.mark.parametrize("branches", Merging.BRANCHES)
@given(seed=seeds, batch=st.integers(2, 6))
def test_backgrounds_are_those_of_other_videos_and_differ_between_the_views(branches, seed, batch):
    torch.manual_seed(seed)
    clips = videos_by_colour(batch)
    merged = Merging(0.5, "gauss", branches=branches)(clips)
    mask = Merging(0.5, "gauss").foreground_of(clips[:1, 0])[0]
    partners = []
    for view in range(2):
        front, behind = merged[:, view, ..., mask], merged[:, view, ..., ~mask]
        assert (front == 10 * torch.arange(batch)[:, None, None, None] + view).all()
        assert (behind == behind[..., :1, :1, :1]).all()
        video, other_view = behind[:, 0, 0, 0] // 10, behind[:, 0, 0, 0] % 10
        assert (other_view == view).all()
        partners.append(video.long())
    own = torch.arange(batch)
    assert (partners[0] != own).all() and sorted(partners[0].tolist()) == own.tolist()  # each lends its own once
    if branches == "single":
        assert torch.equal(merged[:, 1], clips[:, 1])
    else:
        assert (partners[1] != own).all() and (batch == 2 or (partners[0] != partners[1]).all())


def test_every_other_video_lends_its_background_equally_often():
    torch.manual_seed(0)
    clips, counts = videos_by_colour(4), torch.zeros(4, 4)
    merging = Merging(0.1, "gauss")
    for _ in range(600):
        counts[torch.arange(4), merging(clips)[:, 0, 0, 0, 0, 0].long() // 10] += 1
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0 and ((off_diagonal - 200).abs() < 4 * (600 * 2 / 9) ** 0.5).all()


@given(seeds, st.sampled_from(Merging.MASKS), st.sampled_from(Merging.BRANCHES), st.booleans())
def test_merging_keeps_type_and_input_and_is_drawn_from_torchs_seed(seed, mask, branches, floats):
    clips = random_clips(seed, 4, 2, 3, 3, 8, 8)
    clips = clips / 255 if floats else clips
    before, merging = clips.clone(), Merging(0.3, mask, branches=branches)
    torch.manual_seed(seed)
    merged = merging(clips)
    torch.manual_seed(seed)
    assert torch.equal(merging(clips), merged) and torch.equal(clips, before)
    assert merged.dtype == clips.dtype and merged.shape == clips.shape
    front = merging.foreground_of(clips[:, 0])[:, None, None]
    assert torch.equal(torch.where(front, merged[:, 0], 0), torch.where(front, clips[:, 0], 0))


@given(seeds, st.sampled_from(Merging.BRANCHES))
def test_intra_video_background_is_the_other_views(seed, branches):
    clips = random_clips(seed, 3, 2, 3, 3, 6, 6)
    merging = Merging(0.5, background="intra", branches=branches)
    merged = merging(clips)
    for view in range(1 + (branches == "both")):
        mask = merging.foreground_of(clips[:, view])[:, None, None]
        assert torch.equal(merged[:, view], torch.where(mask, clips[:, view], clips[:, 1 - view]))
    assert branches == "both" or torch.equal(merged[:, 1], clips[:, 1])


@pytest.mark.parametrize("flags", [dict(foreground=1.0), dict(background="none"), dict(foreground=1.0, mask="grid")])
def test_clips_stay_as_they_are_with_all_of_the_picture_as_foreground_or_without_background(flags):
    clips = random_clips(0, 3, 2, 3, 3, 8, 8)
    assert torch.equal(Merging(**flags, branches="both")(clips), clips)


def test_what_merging_cannot_do_is_an_error():
    for flags in (dict(mask="box"), dict(background="black"), dict(branches="three")):
        with pytest.raises(ValueError, match="choose from"):
            Merging(**flags)
    for portion in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="portion"):
            Merging(portion)
    with pytest.raises(ValueError, match="two videos"):
        Merging()(torch.zeros(1, 2, 3, 2, 4, 4, dtype=torch.uint8))


# ----------------------------------------------------------------------------------------------------------- the method


def build(method=fame.FAME, config=fame.FAMEConfig, **flags):
    torch.manual_seed(0)
    return method(config(**TINY | flags))


def losses_of(model, views, seed=0):
    torch.manual_seed(seed)
    return model(views)


def test_fame_is_moco_on_merged_clips_and_without_background_is_moco():
    views = views_without_colours(sub_clips=0)
    for flags in (dict(), dict(branches="both", foreground=0.3), dict(background="intra")):
        torch.manual_seed(0)
        shown = Merging(**flags)(views["clip"])
        expected = losses_of(build(moco.MoCo, moco.MoCoConfig), views | {"clip": shown})
        assert torch.equal(losses_of(build(**flags), views)["vv"], expected["vv"])
    plain = losses_of(build(moco.MoCo, moco.MoCoConfig), views)["vv"]
    assert torch.equal(losses_of(build(background="none"), views)["vv"], plain)
    assert torch.equal(losses_of(build(foreground=1.0), views)["vv"], plain)
    masks = [losses_of(build(mask=mask), views)["vv"].item() for mask in Merging.MASKS]
    assert len({plain.item(), *masks}) == 5  # each variant is another loss


@pytest.mark.parametrize("branches", Merging.BRANCHES)
@pytest.mark.parametrize(
    ("method", "config", "flags"),
    [
        (fame.FAME, fame.FAMEConfig, lambda branches: dict(branches=branches, losses="vv,vd")),
        (fima.FIMA, fima.FIMAConfig, lambda branches: dict(fame=branches, decoder_width=32)),
    ],
    ids=["fame", "fima"],
)
def test_rgb_is_merged_and_motion_is_that_of_the_video_itself(method, config, flags, branches, monkeypatch):
    model, views, seen = build(method, config, **flags(branches)), views_without_colours(), {True: [], False: []}
    original = moco.MoCo.encoder_input

    def watched(self, clips, color, difference=False):
        if len(clips) > 1:  # on a CPU it goes on to itself, clip by clip
            seen[difference].append(clips.clone())
        return original(self, clips, color, difference)

    monkeypatch.setattr(moco.MoCo, "encoder_input", watched)
    losses = losses_of(model, views)
    torch.manual_seed(0)
    merged = Merging(branches=branches)(views["clip"])
    assert len(seen[False]) == 1 and torch.equal(seen[False][0], merged.transpose(0, 1).flatten(0, 1))
    assert torch.equal(seen[True][0], views["clip"].transpose(0, 1).flatten(0, 1))
    if method is fima.FIMA:
        assert torch.equal(seen[True][1], views["sub_clips"].transpose(0, 1).flatten(0, 2))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_video_a_batch_is_enough_without_another_videos_background():
    for background in ("intra", "none"):
        assert fame.FAMEConfig(batch_size=1, background=background)
    with pytest.raises(UserError):
        fame.FAMEConfig(batch_size=1)
