"""Colour augmentation: torchvision's values, one transform for all frames of a clip, drawn per clip, reproducible."""

import functools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import generator
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms.v2 import functional as tv

import augment
import data


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


close = functools.partial(torch.testing.assert_close, rtol=0, atol=5e-6)
TORCHVISION = {  # what it does to frames, and the least and greatest number
    "brightness": (tv.adjust_brightness, 0, 2),
    "saturation": (tv.adjust_saturation, 0, 2),
    "hue": (tv.adjust_hue, -0.5, 0.5),
    "gray": (lambda frames, _: tv.rgb_to_grayscale(frames, num_output_channels=3), 1, 1),
    "contrast": (tv.adjust_contrast, 0, 2),
}


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


def test_identity_changes_nothing_and_no_draw_changes_its_input():
    clips, rng = random_clips().expand(6, -1, -1, -1, -1), np.random.default_rng(0)
    before = clips.clone()
    assert torch.equal(augmented(clips), clips)
    never = data.draw_color(rng, jitter_p=0, gray_p=0, blur_p=0)
    assert never.dtype == np.float32 and tuple(never) == augment.IDENTITY
    out = augment.color_augment(clips, torch.tensor(np.stack([data.draw_color(rng, jitter_p=1) for _ in clips])))
    assert torch.equal(clips, before) and out.min() >= 0 and out.max() <= 1


def test_precision_is_kept():
    clips, row = random_clips().double(), torch.tensor(data.draw_color(np.random.default_rng(3)))[None]
    exact = augment.color_augment(clips, row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for same in (clips, clips.float()):
            close(augment.color_augment(same, row), exact.to(same.dtype))


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
def test_all_clips_at_once_as_on_a_gpu_give_the_same_as_one_by_one_on_a_cpu(size, spans, order, monkeypatch):
    rng = np.random.default_rng(0)
    clips = torch.randint(256, (6, 4, *size, 3), generator=generator(0)).byte().movedim(-1, 1)
    color = torch.tensor(np.stack([data.draw_color(rng, gray_p=0.4) for _ in clips]))
    color[0] = torch.tensor(augment.IDENTITY)
    expected = augment.encoder_input(clips, color, spans, order)
    monkeypatch.setattr(augment, "_on_cpu", lambda clips: False)
    monkeypatch.setattr(augment, "_on_gpu", augment._encoder_input)
    found = augment.encoder_input(clips, color, spans, order)
    close(found, expected, atol=1e-5)
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
