"""Losses, masks and geometry against plain loops written from the paper, closed forms and invariances."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import generator, info_nce_loop, log_ratio, mean, units
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import losses

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 4)
crops = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 2), st.floats(0.1, 2), st.booleans())


def pixel_contrast_loop(prediction, target, positives, keys, temperature=0.1):
    videos = []
    for b, rows in enumerate(positives):
        own_keys = keys[b] if isinstance(keys[0][0], list) else keys
        chosen = [[m for m, positive in zip(target[b], row, strict=True) if positive] for row in rows]
        pairs = [(y, near) for y, near in zip(prediction[b], chosen, strict=True) if near]
        videos += [mean([log_ratio(*pair, own_keys, temperature) for pair in pairs])] if pairs else []
    return mean(videos)


def frame_info_nce_loop(prediction, target, negatives, temperature=0.1):
    return mean([log_ratio(y, [target[n]], [*target, *negatives], temperature) for n, y in enumerate(prediction)])


def frame_triplet_loop(prediction, target, negatives, margin=1.0):
    others = [[math.dist(y, z) for z in target[:n] + target[n + 1 :] + negatives] for n, y in enumerate(prediction)]
    own = [math.dist(y, z) for y, z in zip(prediction, target, strict=True)]
    return mean([max(0.0, o**2 - far**2 + margin) for o, row in zip(own, others, strict=True) for far in row])


def box_of(crop: tuple) -> Tensor:
    x, y, w, h, flipped = crop
    return torch.tensor([[x + w, y, x, y + h] if flipped else [x, y, x + w, y + h]], dtype=torch.float64)


def place_of(crop: tuple, along: float, down: float) -> tuple[float, float]:
    """Where in the frame a view shows what lies so far along its width and down its height; flipped, it is mirrored."""
    x, y, w, h, flipped = crop
    return x + w * (1 - along if flipped else along), y + h * down


@given(crops, st.integers(1, 5), st.integers(1, 40), st.integers(1, 16), st.floats(-9, 9))
def test_bins_of_a_seen_box_are_centred_where_feature_pixels_look(crop, pixels, size, stride, offset):
    box = losses.seen_box(box_of(crop), size, pixels, stride, offset)
    for n, center in enumerate(losses.bin_centers(box, pixels, pixels)[0].tolist()):
        row, column = divmod(n, pixels)
        down, along = ((stride * (i + 0.5) + offset) / size for i in (row, column))
        assert center == pytest.approx(place_of(crop, along, down), abs=1e-9)


@given(crops, crops, sizes, sizes, st.floats(0.1, 3))
def test_positive_pairs_are_those_of_a_loop(source, target, height, width, threshold):
    """Distances are in bin diagonals, the longer of the two views'."""
    bins = [((column + 0.5) / width, (row + 0.5) / height) for row in range(height) for column in range(width)]
    places = [[place_of(crop, *center) for center in bins] for crop in (source, target)]
    diagonal = max(math.hypot(w / width, h / height) for _, _, w, h, _ in (source, target))
    distances = torch.tensor([[math.dist(s, t) / diagonal for t in places[1]] for s in places[0]], dtype=torch.float64)
    clear = (distances - threshold).abs() > 1e-9  # rounding may decide the others either way
    pairs = losses.positive_pairs(box_of(source), box_of(target), (height, width), threshold)[0]
    assert torch.equal(pairs[clear], (distances < threshold)[clear])


def test_positive_pairs_are_strictly_closer_than_the_threshold_and_batched():
    box = torch.tensor([[0.0, 0, 6, 8], [0, 0, 6, 8]])  # bins of 3 × 4, diagonal 5
    far = torch.tensor([[0.0, 0, 6, 8], [600, 0, 606, 8]])
    pairs = losses.positive_pairs(box, far, (2, 2), 1.0)
    assert torch.equal(pairs[0], ~torch.eye(4, dtype=torch.bool).flip(1))  # all but the diagonal neighbours, at 5 of 5
    assert not pairs[1].any()
    assert losses.positive_pairs(box, box, (2, 2))[0].sum() == 8  # 3 / 5 is below the default 0.7, 4 / 5 is not


@given(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(0, 100), st.sampled_from([2, 4, 1000]))
@example(0, 2, 13, 28, 1000)  # 0.28 · 25 is 7.000000000000001 in floating point
def test_foreground_is_strictly_above_the_quantile_with_and_without_ties(seed, height, width, percent, values):
    pixels = torch.randint(values, (2, height, width), generator=generator(seed))
    mask = losses.foreground_mask(pixels.double(), percent / 100)
    for chosen, z in zip(mask, pixels, strict=True):
        ordered, place = sorted(z.flatten().tolist()), Fraction(100 - percent, 100) * (height * width - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert torch.equal(chosen, z > float(below + place % 1 * (above - below)))


def pixel_batch(seed: int, videos: int = 3, pixels: int = 4, queue: int = 2, per_video: bool = False) -> list[Tensor]:
    """Prediction, target, positives (none in the first video) and keys, of the batch or each video: targets, more."""
    prediction, target = units(seed, videos, pixels, 5), units(seed + 1, videos, pixels, 5)
    positives = torch.rand(videos, pixels, pixels, generator=generator(seed)) < 0.3
    positives[0] = False
    own = target if per_video else target.flatten(0, 1)
    keys = torch.cat([own, units(seed + 2, queue, 5).expand(*own.shape[:-2], -1, -1)], -2)
    return [prediction, target, positives, keys]


def vector_batch(seed: int, rows: int = 4, queue: int = 3) -> list[Tensor]:
    return [units(seed, rows, 5), units(seed + 1, rows, 5), units(seed + 2, queue, 5)]


CASES = {
    "info_nce": (losses.info_nce, info_nce_loop, vector_batch),
    "pixel_contrast": (losses.pixel_contrast, pixel_contrast_loop, pixel_batch),
    "frame_info_nce": (losses.frame_info_nce, frame_info_nce_loop, vector_batch),
    "frame_triplet": (losses.frame_triplet, frame_triplet_loop, vector_batch),
    "frame_mse": (losses.frame_mse, lambda y, z, _: mean([far**2 for far in map(math.dist, y, z)]), vector_batch),
}


@pytest.mark.parametrize("name", CASES)
@given(seeds, sizes, st.integers(0, 3), st.floats(0.05, 2), st.booleans())
def test_a_loss_is_that_of_a_loop_and_not_negative(name, seed, rows, queue, option, per_video):
    loss, loop, make = CASES[name]
    batch = make(seed, rows, queue=queue, **dict(per_video=per_video) if name == "pixel_contrast" else {})
    lists = [x.tolist() for x in batch]
    for options in ((), (option,))[: 1 + (name != "frame_mse")]:  # a temperature or a margin
        value = loss(*batch, *options)
        assert value.shape == () and value.dtype == torch.float64 and value >= 0
        assert value.item() == pytest.approx(loop(*lists, *options), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    loss, _, make = CASES[name]
    batch = [x.requires_grad_() if x.is_floating_point() else x for x in make(3)]
    assert torch.autograd.gradcheck(loss, batch)


@pytest.mark.parametrize("name", ["info_nce", "pixel_contrast", "frame_info_nce"])  # those with a temperature
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=seeds)
def test_low_precision_is_computed_in_float32_and_stays_finite_at_a_low_temperature(name, dtype, seed):
    loss, _, make = CASES[name]
    batch = [x.to(dtype) if x.is_floating_point() else x for x in make(seed)]
    exact = [x.double() if x.is_floating_point() else x for x in batch]
    leaves = [x.requires_grad_() for x in batch if x.is_floating_point()]
    value = loss(*batch, 0.01)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(*exact, 0.01), rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*batch, 0.01), value)


def test_pixels_without_a_positive_learn_nothing_and_without_any_the_loss_is_zero():
    prediction, target, positives, keys = pixel_batch(0)
    leaves = [x.requires_grad_() for x in (prediction, target, keys)]
    for chosen in (positives, torch.zeros_like(positives)):
        value = losses.pixel_contrast(prediction, target, chosen, keys, 0.01)
        gradients = torch.autograd.grad(value, leaves)
        assert all(g.isfinite().all() for g in gradients)
        assert torch.equal(gradients[0].ne(0).any(2), chosen.any(2))
    assert value.item() == 0 and not any(g.any() for g in gradients)


@given(seed=seeds, videos=st.integers(2, 4), queue=st.integers(0, 5), per_video=st.booleans())
def test_closed_forms_and_chance_of_equal_similarities(seed, videos, queue, per_video):
    zeros, old = torch.zeros(videos, 5), torch.zeros(queue, 5)
    assert losses.info_nce(zeros, zeros, old).item() == pytest.approx(math.log(1 + queue))
    assert losses.frame_info_nce(zeros, zeros, old).item() == pytest.approx(math.log(videos + queue))
    prediction, target, positives, keys = pixel_batch(seed, videos, queue=queue, per_video=per_video)
    expected = losses.pixel_contrast(prediction * 0, target * 0, positives, keys * 0)
    torch.testing.assert_close(losses.pixel_chance(positives, keys.shape[-2]).double(), expected, rtol=1e-5, atol=1e-6)
    assert losses.pixel_contrast(zeros[None], zeros[None], torch.ones(1, videos, videos).bool(), zeros).item() == 0
