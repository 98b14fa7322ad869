"""Colour augmentation: torchvision's values, one transform for all frames of a clip, drawn per clip, reproducible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

import augment
import data

IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
few = settings(max_examples=25, deadline=None)
drawn = st.integers(0, 2**32 - 1).map(lambda seed: data.draw_color(np.random.default_rng(seed)))


def random_clips(n: int = 1, frames: int = 3, size: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise that also holds gray, black, white and saturated pixels, where hue is a special case."""
    clips = torch.rand(n, 3, frames, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    clips[..., 0, :8] = clips[:, :1, ..., 0, :8]
    clips[..., 1, :8] = torch.linspace(0, 1, 8).round().to(dtype)
    clips[..., 2, :] = clips[..., 2, :].round()
    return clips


def augmented(clips: torch.Tensor, **changed: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "gray", "sigma")
    params = torch.tensor([[changed.get(name, same) for name, same in zip(names, IDENTITY, strict=True)]])
    return augment.color_augment(clips, params.expand(len(clips), -1))


def frames_first(clips: torch.Tensor) -> torch.Tensor:
    return clips.transpose(1, 2)


@few
@given(st.floats(0, 2))
def test_brightness_and_saturation_are_those_of_torchvision(factor):
    clips = random_clips()
    images = frames_first(clips)
    torch.testing.assert_close(frames_first(augmented(clips, brightness=factor)), tv.adjust_brightness(images, factor))
    expected = tv.adjust_saturation(images, factor)
    torch.testing.assert_close(frames_first(augmented(clips, saturation=factor)), expected, atol=2e-6, rtol=0)


@few
@given(st.floats(0, 2))
def test_contrast_is_that_of_torchvision_about_the_mean_of_the_whole_clip(factor):
    clips = random_clips() * torch.tensor([0.3, 0.6, 1.0])[:, None, None]  # frames of unequal brightness
    expected = tv.adjust_contrast(clips.flatten(2, 3), factor).view_as(clips)
    torch.testing.assert_close(augmented(clips, contrast=factor), expected, atol=2e-6, rtol=0)


@few
@given(st.floats(-0.5, 0.5))
def test_hue_is_that_of_torchvision(shift):
    clips = random_clips()
    expected = tv.adjust_hue(frames_first(clips), shift)
    torch.testing.assert_close(frames_first(augmented(clips, hue=shift)), expected, atol=5e-6, rtol=0)


def test_grayscale_is_that_of_torchvision():
    clips = random_clips()
    expected = tv.rgb_to_grayscale(frames_first(clips), num_output_channels=3)
    torch.testing.assert_close(frames_first(augmented(clips, gray=1)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size, width, kernel", [(16, 16, 3), (32, 20, 3), (64, 64, 7), (112, 112, 11)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_that_of_torchvision(size, width, kernel, sigma):
    clips = random_clips(frames=2, size=size)[..., :width]
    expected = tv.gaussian_blur(frames_first(clips), [kernel, kernel], [sigma, sigma])
    torch.testing.assert_close(frames_first(augmented(clips, sigma=sigma)), expected, atol=2e-6, rtol=0)


def test_the_order_is_brightness_contrast_saturation_hue_gray_blur():
    clips = random_clips()
    params = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": -0.08, "sigma": 1.2}
    one_by_one = clips
    for name, value in params.items():
        one_by_one = augmented(one_by_one, **{name: value})
    torch.testing.assert_close(augmented(clips, **params), one_by_one, atol=5e-6, rtol=0)
    gray_first = augmented(augmented(clips, **params | {"sigma": 0}), gray=1)
    torch.testing.assert_close(augmented(clips, **params, gray=1), augmented(gray_first, sigma=1.2), atol=5e-6, rtol=0)


@few
@given(drawn)
def test_a_still_clip_stays_still(params):
    still = random_clips(frames=1).expand(-1, -1, 5, -1, -1)
    out = augment.color_augment(still, torch.tensor(params)[None])
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), atol=1e-6, rtol=0)


@few
@given(st.lists(drawn, min_size=1, max_size=4))
def test_a_batch_is_its_clips_one_by_one(rows):
    clips, params = random_clips(len(rows)), torch.tensor(np.stack(rows))
    before = clips.clone()
    batch = augment.color_augment(clips, params)
    single = torch.cat([augment.color_augment(clip[None], row[None]) for clip, row in zip(clips, params, strict=True)])
    torch.testing.assert_close(batch, single, atol=1e-6, rtol=0)
    assert torch.equal(clips, before), "the input was changed"
    assert batch.shape == clips.shape and batch.min() >= 0 and batch.max() <= 1


def test_clips_that_are_equal_come_out_different():
    rng = np.random.default_rng(0)
    clips = random_clips().expand(6, -1, -1, -1, -1)
    params = torch.tensor(np.stack([data.draw_color(rng, jitter_p=1) for _ in clips]))
    out = augment.color_augment(clips, params)
    distance = (out[:, None] - out).abs().mean((2, 3, 4, 5))
    assert distance[~torch.eye(6, dtype=torch.bool)].min() > 0.01


def test_identity_parameters_change_nothing():
    clips = random_clips()
    torch.testing.assert_close(augmented(clips), clips, atol=1e-6, rtol=0)
    never = data.draw_color(np.random.default_rng(0), jitter_p=0, gray_p=0, blur_p=0)
    assert never.dtype == np.float32 and tuple(never) == IDENTITY


def test_precision_is_kept():
    clips, row = random_clips(dtype=torch.float64), torch.tensor(data.draw_color(np.random.default_rng(3)))[None]
    out = augment.color_augment(clips, row)
    assert out.dtype == torch.float64
    torch.testing.assert_close(augment.color_augment(clips.float(), row), out.float(), atol=2e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.color_augment(clips, row), out)


@few
@given(st.integers(0, 2**32 - 1))
def test_a_draw_depends_on_the_generator_alone(seed):
    first, second = np.random.default_rng(seed), np.random.default_rng(seed)
    assert np.array_equal(data.draw_color(first), data.draw_color(second))
    draws = np.stack([data.draw_color(first, jitter_p=1) for _ in range(5)])
    assert len(np.unique(draws, axis=0)) == 5


def test_draws_have_the_stated_probabilities_and_ranges():
    rng = np.random.default_rng(0)
    draws = np.stack([data.draw_color(rng) for _ in range(4000)])
    jittered = draws[(draws[:, :4] != IDENTITY[:4]).any(1)]
    sigma = draws[draws[:, 5] > 0, 5]
    assert abs(len(jittered) / 4000 - 0.8) < 0.03
    assert abs(draws[:, 4].mean() - 0.2) < 0.03 and set(draws[:, 4]) == {0, 1}
    assert abs(len(sigma) / 4000 - 0.5) < 0.03
    for column, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4), (3, -0.1, 0.1)):
        found = np.quantile(jittered[:, column], (0, 0.5, 1))
        np.testing.assert_allclose(found, (low, (low + high) / 2, high), atol=0.03)
    np.testing.assert_allclose(np.quantile(sigma, (0, 0.5, 1)), (0.1, 1.05, 2), atol=0.1)
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.06, "parameters must be independent"


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4, 0.6), (-0.1, 0, 0, 0)])
def test_a_strength_out_of_range_is_named(jitter):
    with pytest.raises(ValueError, match="colour jitter"):
        data.draw_color(np.random.default_rng(0), jitter=jitter)


def test_normalize_takes_out_the_mean_and_deviation():
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    clips = mean[:, None, None, None].expand(2, 3, 4, 5, 5) + std[:, None, None, None]
    torch.testing.assert_close(augment.normalize(clips), torch.ones_like(clips))
    torch.testing.assert_close(augment.normalize(clips[0]), torch.ones_like(clips[0]))
    noise = random_clips()  # each channel by numbers, bit for bit
    for channel, expected, m, s in zip(augment.normalize(noise)[0], noise[0], augment.MEAN, augment.STD, strict=True):
        assert torch.equal(channel, (expected - m) / s)


def uint8_clips(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 4, height, width, 3), dtype=torch.uint8, generator=generator).movedim(-1, 1)


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("size", [(52, 60), (24, 24)])
def test_all_clips_at_once_as_on_a_gpu_give_the_same_as_one_by_one_on_a_cpu(size, difference, monkeypatch):
    rng, clips = np.random.default_rng(0), uint8_clips(6, *size)
    color = torch.tensor(np.stack([data.draw_color(rng, gray_p=0.4) for _ in clips]))
    color[0] = torch.tensor(IDENTITY)
    expected = augment.encoder_input(clips, color, difference)
    monkeypatch.setattr(augment, "_on_cpu", lambda clips: False)
    monkeypatch.setattr(augment, "_on_gpu", augment._encoder_input)
    torch.testing.assert_close(augment.encoder_input(clips, color, difference), expected, atol=1e-5, rtol=0)


def test_colours_that_cannot_be_compiled_are_computed_all_the_same_and_one_line_says_so(monkeypatch, capsys):
    def fails(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("there is no compiler\nand much more")

    clips, color = uint8_clips(2, 16, 16), torch.tensor([(1.2, 0.9, 1.1, 0.05, 0, 1.0)] * 2)
    expected = augment.encoder_input(clips, color)
    monkeypatch.setattr(augment, "_on_cpu", lambda clips: False)
    monkeypatch.setattr(augment, "_on_gpu", None)
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: fails)
    for _ in range(2):
        torch.testing.assert_close(augment.encoder_input(clips, color), expected, atol=1e-5, rtol=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no compiler" in line
