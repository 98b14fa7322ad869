"""Encoders, motion decoder and queue against plain reimplementations and their published sizes."""

import copy
import itertools
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, join_group, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cli
import models

WIDTHS = [("conv4", 1.0), ("i3d", 0.125), ("r3d_18", 0.125), ("r2plus1d_18", 0.125), ("s3d", 1.0)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_published():
    decoder = models.MotionDecoder(1024)
    assert count(models.build_encoder("i3d")) == 12_287_264 and count(models.ProjectionHead(1024)) == 1_180_800
    assert count(decoder.blocks) == 3_155_968 and count(decoder.reduce) + count(decoder.expand) == 1_050_112
    assert decoder.cls.shape == (1, 1, 512) and not decoder.cls.any()
    assert count(models.build_encoder("conv4")) == 236_720


SHAPES = [
    ("i3d", (16, 224, 224), (1024, 2, 7, 7)),
    ("i3d", (17, 65, 97), (1024, 3, 3, 4)),  # no multiples of the strides
    ("r2plus1d_18", (16, 112, 112), (512, 2, 7, 7)),
    ("r3d_18", (16, 224, 224), (512, 2, 14, 14)),
    ("s3d", (16, 112, 112), (1024, 2, 3, 3)),
    ("conv4", (16, 32, 32), (96, 2, 4, 4)),
]


@pytest.mark.parametrize(("name", "clip", "shape"), SHAPES, ids=str)
def test_shapes_of_feature_maps(name, clip, shape):
    with torch.device("meta"):  # computes nothing
        assert models.build_encoder(name)(torch.empty(1, 3, *clip)).shape[1:] == shape


def center_of(weight: Tensor, axis: int) -> float:
    """Centre of mass along an axis of a clip, of which pixel k covers k to k + 1."""
    mass = weight.double().sum([d for d in range(weight.dim()) if d != axis])
    return float(mass @ (torch.arange(len(mass)).double() + 0.5) / mass.sum())


def average_pool(x, kernel, stride, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    padding = (padding,) * 3 if isinstance(padding, int) else padding
    return F.avg_pool3d(F.pad(x, [p for p in padding[::-1] for _ in range(2)]), kernel, stride, 0, ceil_mode)


@pytest.mark.parametrize("name", models.ENCODERS)
def test_offsets_are_where_feature_pixels_look(name, monkeypatch):
    """The centre of gravity of all that an inner feature pixel looks at, none of which is cut by the clip's edge."""
    monkeypatch.setattr(F, "max_pool3d", average_pool)
    encoder = models.build_encoder(name, 1 if name == "s3d" else 0.05).eval()
    for module in encoder.modules():  # a mean of positive clips
        if isinstance(module, nn.Conv3d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    for axis, (stride, offset) in enumerate(zip(encoder.strides, encoder.offsets, strict=True)):
        size = [8, 32, 32]
        size[axis] = 160 if axis == 0 else 448
        clip = torch.ones(1, 3, *size, requires_grad=True)
        pixel = size[axis] // stride // 2
        encoder(clip).select(2 + axis, pixel).sum().backward()
        seen = clip.grad[0].sum(0)
        assert not seen.select(axis, 0).any() and not seen.select(axis, -1).any()
        assert center_of(seen, axis) == pytest.approx(stride * (pixel + 0.5) + offset, abs=1e-3), axis


def test_feature_pixels_of_random_conv4s_look_at_the_middle_of_their_bins_up_to_the_offset():
    beside = []
    for seed in range(4):
        torch.manual_seed(seed)
        encoder, clip = models.build_encoder("conv4"), torch.randn(1, 3, 64, 96, 96, requires_grad=True)
        features = encoder(clip)
        for place in ((3, 5, 5), (3, 6, 7), (4, 5, 6), (4, 6, 4), (3, 7, 6), (4, 7, 5)):
            (seen,) = torch.autograd.grad(features[(0, slice(None), *place)].sum(), clip, retain_graph=True)
            squares = seen[0].square().sum(0)
            beside.append([center_of(squares, axis) / 8 - (i + 0.5) for axis, i in enumerate(place)])
    assert torch.tensor(beside).mean(0).tolist() == pytest.approx([0.5 / 8] * 3, abs=0.03)


@pytest.mark.parametrize("training", [True, False], ids=["training", "fixed batch norm"])
@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_every_parameter_learns_and_checkpointing_changes_nothing_but_computes_all_stages_again(name, width, training):
    torch.manual_seed(0)
    plain, clip, found = models.build_encoder(name, width).train(training), torch.randn(2, 3, 8, 64, 64), []
    assert width == 1 or count(plain) < 0.02 * count(models.build_encoder(name))
    saving = copy.deepcopy(plain)
    saving.checkpointing = True
    for encoder in (plain, saving):
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
        with models.recorded_inputs(norms) as calls:
            features = encoder(clip)
            (features * torch.randn(features.shape, generator=generator(1))).sum().backward()
        assert len(calls) == len(norms) * (1 + encoder.checkpointing) and all(norm.momentum for norm in norms)
        assert features.shape[1:] == (encoder.out_channels, *map(int.__floordiv__, (8, 64, 64), encoder.strides))
        assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())
        found.append([features, *(p.grad for p in encoder.parameters()), encoder.state_dict()])
    assert same(*found)


def decoder_loop(decoder, source, target):
    """One video, query by query, head by head: outputs (1 + N, C), the last attention (1 + N, M)."""

    def position(t):
        return source.new_tensor([(math.sin, math.cos)[i % 2](t / 10000 ** (i // 2 / 8)) for i in range(16)])

    def placed(pixels):
        return [decoder.reduce(pixel) + position(t) for t, pixel in enumerate(pixels)]

    def norm(layer, x):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * layer.weight + layer.bias

    memory, outputs, attentions = torch.stack(placed(target)), [], []
    for query in [decoder.cls[0, 0], *placed(source)]:
        for block in decoder.blocks:
            attention, asked = block.attention, norm(block.norm1, query)
            weight, bias = attention.in_proj_weight.split(16), attention.in_proj_bias.split(16)
            q, k, v = (x.unflatten(-1, (4, 4)) for x in map(F.linear, (asked, memory, memory), weight, bias))
            weights = [(k[:, head] @ q[head] / 2).softmax(0) for head in range(4)]
            heads = [weights[head] @ v[:, head] for head in range(4)]
            query = query + attention.out_proj(torch.cat(heads))
            first, *_, last = block.feed_forward
            query = query + last(first(norm(block.norm2, query)).clamp(min=0))
        outputs.append(decoder.expand(query))
        attentions.append(torch.stack(weights).mean(0))
    return torch.stack(outputs), torch.stack(attentions)


@torch.no_grad()
def test_motion_decoder_is_that_of_a_loop():
    torch.manual_seed(0)
    decoder = models.MotionDecoder(12, dim=16, depth=2, heads=4).double().eval()
    for parameter in decoder.parameters():  # norms, biases and [cls] too, so that none is neutral
        if parameter.dim() != 2:
            parameter.uniform_(0.5, 1.5)
    source, target = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 6))
    y, y_cls, attention = decoder(source, target, need_weights=True)
    for b in range(2):
        outputs, attentions = decoder_loop(decoder, source[b], target[b])
        torch.testing.assert_close((torch.cat([y_cls[b : b + 1], y[b]]), attention[b]), (outputs, attentions[1:]))
    torch.testing.assert_close(decoder(source, target), (y, y_cls))


@given(st.integers(1, 7), st.lists(st.integers(0, 16), max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_queue_holds_the_latest_keys_for_any_batch_sizes(length, batches, dtype):
    queue = models.MomentumQueue(length, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(length))
    expected = deque(queue.keys.tolist(), maxlen=length)
    for n in batches:
        keys = torch.randn(n, 3, requires_grad=True).to(dtype)
        queue.enqueue(keys)
        expected.extend(keys.tolist())
        assert torch.roll(queue.keys, -int(queue.pointer), 0).tolist() == list(expected)
    assert queue.keys.dtype == torch.float32 and not queue.keys.requires_grad


LAYOUTS = {  # of rows that do not lie in memory as they come
    "permuted": lambda rows: rows.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0),
    "expanded": lambda rows: rows[..., :1].expand(-1, -1, -1, -1, 5),
}


def group_process(rank: int, folder: str) -> None:
    join_group(rank, folder, 3)
    for n, (name, layout) in itertools.product((0, 1, 2, 5), LAYOUTS.items()):
        rows = [layout((torch.arange(n * 120) % 83 + 40 * r).byte().view(n, 2, 3, 4, 5)) for r in range(3)]
        due = [rows[r][i] for r in range(3) for i in range(n) if (r + i) % 3 == rank]
        dealt = models.deal(rows[rank])
        assert torch.equal(dealt, torch.stack(due) if due else rows[0]), (n, name)
        assert torch.equal(models.deal(layout(dealt), back=True), rows[rank]), (n, name)
    cli.end_process()


@pytest.mark.slow
def test_processes_deal_rows_like_cards(tmp_path):
    torch.multiprocessing.spawn(group_process, (str(tmp_path),), nprocs=3)


def test_momentum_update_moves_parameters_towards_the_query_and_nothing_else():
    query, key = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    query(torch.randn(8, 3))  # gives it other statistics
    before, asked = copy.deepcopy((key.state_dict(), query.state_dict()))
    models.momentum_update(query, key, 0.9)
    assert same(query.state_dict(), asked)
    learnt = dict(key.named_parameters())
    expected = {name: 0.9 * x + 0.1 * asked[name] if name in learnt else x for name, x in before.items()}
    torch.testing.assert_close(dict(key.state_dict()), expected)
