"""Encoders, projection head, motion decoder and queue against plain reimplementations and their published sizes."""

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import models
import processes

WIDTHS = [("conv4", 1.0), ("i3d", 0.125), ("r3d_18", 0.125), ("r2plus1d_18", 0.125), ("s3d", 1.0)]


def shape_of(name: str, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Shape of a feature map, found without computing it."""
    with torch.device("meta"):
        encoder = models.build_encoder(name)
        features = encoder(torch.empty(1, 3, frames, height, width))
    assert features.shape[1] == encoder.out_channels
    return tuple(features.shape[1:])


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomised(module: nn.Module) -> nn.Module:
    """With buffers and one-dimensional parameters (norms, biases) drawn too, so that none is neutral; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


# ----------------------------------------------------------------------------------------------------------- encoders


def test_i3d_has_the_size_and_names_of_released_checkpoints():
    encoder = models.build_encoder("i3d")
    assert count(encoder) == 12_287_264
    units = ["conv3d_1a_7x7", "conv3d_2b_1x1", "conv3d_2c_3x3"]
    blocks = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
    units += [f"mixed_{b}.branch_{branch}" for b in blocks for branch in ("0", "1.0", "1.1", "2.0", "2.1", "3.1")]
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{unit}.{rest}" for unit in units for rest in ("conv3d.weight", *(f"batch3d.{s}" for s in statistics))}
    assert encoder.state_dict().keys() == names and len(names) == 342
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.BatchNorm3d)} == {1e-5}


def test_conv4_is_four_convolutions_of_the_documented_size():
    encoder = models.build_encoder("conv4")
    assert count(encoder) == 238_496
    parts = [type(m) for m in encoder.modules() if not list(m.children()) and not isinstance(m, nn.ConstantPad3d)]
    assert parts == [nn.Conv3d, nn.BatchNorm3d, nn.ReLU] * 4


def center_of(weight: Tensor, axis: int) -> float:
    """Centre of mass along an axis of a clip, of which pixel k covers k to k + 1."""
    mass = weight.double().sum([d for d in range(weight.dim()) if d != axis])
    return float(mass @ (torch.arange(len(mass)).double() + 0.5) / mass.sum())


def average_pool(x, kernel, stride, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    padding = (padding,) * 3 if isinstance(padding, int) else padding
    return F.avg_pool3d(F.pad(x, [p for p in padding[::-1] for _ in range(2)]), kernel, stride, 0, ceil_mode)


def middle_pool(x, kernel, stride, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Takes the middle of each window, of an even one the mean of the two in the middle."""
    for axis, (k, s, p) in enumerate(zip(kernel, stride, padding, strict=True), 2):
        count = math.ceil((x.shape[axis] + 2 * p - k) / s) + 1
        x = F.pad(x, [0, 0] * (4 - axis) + [p, p + s])
        first, second = (x.narrow(axis, at, s * (count - 1) + 1) for at in ((k - 1) // 2, k // 2))
        x = ((first + second) / 2).index_select(axis, torch.arange(0, s * (count - 1) + 1, s))
    return x


def linear(encoder: nn.Module, middle: bool) -> nn.Module:
    """Makes it a weighted mean of positive clips: of all that it looks at, or of what its kernels' middles hit."""
    for module in encoder.eval().modules():
        if isinstance(module, nn.Conv3d):
            nn.init.constant_(module.weight, 0 if middle else 1 / module.weight[0].numel())
            if middle:
                module.weight.data[(..., *(k // 2 for k in module.kernel_size))] = 1 / module.in_channels
    return encoder


@pytest.mark.parametrize("name", models.ENCODERS)
def test_offsets_are_where_feature_pixels_look(name, monkeypatch):
    """The centre of gravity of all that an inner feature pixel looks at, none of which is cut by the clip's edge."""
    monkeypatch.setattr(F, "max_pool3d", average_pool)
    encoder = linear(models.build_encoder(name, 1 if name == "s3d" else 0.05), middle=False)
    for axis, (stride, offset) in enumerate(zip(encoder.strides, encoder.offsets, strict=True)):
        size = [8, 32, 32]
        size[axis] = 160 if axis == 0 else 448
        clip = torch.ones(1, 3, *size, requires_grad=True)
        pixel = size[axis] // stride // 2
        encoder(clip).select(2 + axis, pixel).sum().backward()
        seen = clip.grad[0].sum(0)
        assert not seen.select(axis, 0).any() and not seen.select(axis, -1).any()
        assert center_of(seen, axis) == pytest.approx(stride * (pixel + 0.5) + offset, abs=1e-3), axis


@pytest.mark.parametrize("crop", [112, 224])
def test_offsets_of_i3d_are_those_at_the_papers_sizes(crop, monkeypatch):
    """Its padding goes by the size. Kernels look at their middles alone here, so that no edge cuts what is seen."""
    monkeypatch.setattr(F, "max_pool3d", middle_pool)
    encoder = linear(models.build_encoder("i3d", 0.02), middle=True)
    clip = torch.ones(1, 3, 16, crop, crop, requires_grad=True)
    features = encoder(clip)
    for axis, (stride, offset) in enumerate(zip(encoder.strides, encoder.offsets, strict=True)):
        whole = [i for i in range(features.shape[2 + axis]) if stride * (i + 1) <= clip.shape[2 + axis]]
        assert len(whole) >= (2, 3, 3)[axis]
        for i in whole:
            (seen,) = torch.autograd.grad(features.select(2 + axis, i).sum(), clip, retain_graph=True)
            assert center_of(seen[0].sum(0), axis) == pytest.approx(stride * (i + 0.5) + offset, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_feature_pixels_of_a_random_conv4_look_at_the_middle_of_their_bins(seed):
    torch.manual_seed(seed)
    encoder, clip = models.build_encoder("conv4"), torch.randn(1, 3, 64, 96, 96, requires_grad=True)
    features, beside = encoder(clip), []
    for place in ((3, 5, 5), (3, 6, 7), (4, 5, 6), (4, 6, 4), (3, 7, 6), (4, 7, 5)):
        (seen,) = torch.autograd.grad(features[(0, slice(None), *place)].sum(), clip, retain_graph=True)
        squares = seen[0].square().sum(0)
        beside.append([center_of(squares, axis) / 8 - (i + 0.5) for axis, i in enumerate(place)])
    assert torch.tensor(beside).mean(0).abs().max() < 0.07


@pytest.mark.parametrize(
    ("name", "crop", "shape"),
    [
        ("i3d", 224, (1024, 2, 7, 7)),
        ("i3d", 112, (1024, 2, 4, 4)),
        ("r2plus1d_18", 112, (512, 2, 7, 7)),
        ("r2plus1d_18", 224, (512, 2, 14, 14)),
        ("r3d_18", 112, (512, 2, 7, 7)),
        ("r3d_18", 224, (512, 2, 14, 14)),
        ("s3d", 112, (1024, 2, 3, 3)),
        ("s3d", 224, (1024, 2, 7, 7)),
        ("conv4", 32, (96, 2, 4, 4)),
        ("conv4", 64, (96, 2, 8, 8)),
    ],
)
def test_published_shapes_of_feature_maps(name, crop, shape):
    assert shape_of(name, 16, crop, crop) == shape


@pytest.mark.parametrize("name", models.ENCODERS)
@pytest.mark.parametrize("pixels", [(1, 2, 2), (2, 3, 5), (4, 2, 1)])
def test_a_feature_pixel_stands_for_strides_of_the_clip(name, pixels):
    clip = [n * stride for n, stride in zip(pixels, models.build_encoder(name).strides, strict=True)]
    assert shape_of(name, *clip)[1:] == pixels


@pytest.mark.parametrize("name", ["i3d", "r3d_18", "r2plus1d_18"])
@pytest.mark.parametrize("clip", [(17, 65, 97), (9, 100, 47), (1, 33, 1)])
def test_sizes_that_are_no_multiple_of_the_strides_are_rounded_up(name, clip):
    strides = models.build_encoder(name, 0.1).strides
    assert shape_of(name, *clip)[1:] == tuple(math.ceil(n / s) for n, s in zip(clip, strides, strict=True))


@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_encoders_run_and_every_parameter_learns(name, width):
    torch.manual_seed(0)
    encoder = models.build_encoder(name, width)
    assert width == 1 or count(encoder) < 0.02 * count(models.build_encoder(name))
    features = encoder(torch.randn(2, 3, 16, 64, 64))
    strides = zip((16, 64, 64), encoder.strides, strict=True)
    assert features.shape == (2, encoder.out_channels, *(n // s for n, s in strides))
    (features * torch.randn_like(features)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def i3d_loop(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """I3D from its table: zeros written out around every input, then convolution or pooling without padding."""

    def padded(x, kernel, stride):
        excess = [max(k - (n % s or s), 0) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
        return F.pad(x, [side for n in excess[::-1] for side in (n // 2, n - n // 2)])

    def conv(x, name, stride=1):
        w = weights[f"{name}.conv3d.weight"]
        x = F.conv3d(padded(x, w.shape[2:], (stride,) * 3), w, stride=stride)
        statistics = (weights[f"{name}.batch3d.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics).clamp(min=0)

    def pool(x, kernel, stride):
        return F.max_pool3d(padded(x, kernel, stride), kernel, stride)

    def block(x, name):
        b = f"mixed_{name}.branch_"
        wide = [conv(conv(x, f"{b}{i}.0"), f"{b}{i}.1") for i in (1, 2)]
        return torch.cat([conv(x, f"{b}0"), *wide, conv(pool(x, (3, 3, 3), (1, 1, 1)), f"{b}3.1")], 1)

    x = pool(conv(x, "conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(conv(conv(x, "conv3d_2b_1x1"), "conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "pool 3 3 3", "4b", "4c", "4d", "4e", "4f", "pool 2 2 2", "5b", "5c"):
        kernel = tuple(int(n) for n in name.split()[1:])
        x = pool(x, kernel, (2, 2, 2)) if kernel else block(x, name)
    return x


@pytest.mark.parametrize("size", [(16, 64, 64), (13, 45, 51), (7, 50, 33), (1, 7, 1)])
def test_i3d_is_that_of_a_plain_reimplementation_at_even_and_odd_sizes(size):
    torch.manual_seed(0)
    encoder = randomised(models.build_encoder("i3d", 0.1)).double()
    clip = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(clip), i3d_loop(encoder.state_dict(), clip))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("i2d",), "unknown encoder 'i2d'; choose from conv4, i3d, "),
        (("s3d", 0.5), "width 1 only"),
        (("i3d", 0), "positive"),
    ],
)
def test_an_encoder_that_does_not_exist_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build_encoder(*arguments)


# -------------------------------------------------------------------------------------------- projection head, decoder


def test_projection_head_is_two_1x1_convolutions():
    assert count(models.ProjectionHead(1024)) == 1_180_800
    torch.manual_seed(0)
    head = models.ProjectionHead(6, 8, 4)
    maps = torch.randn(2, 6, 2, 3, 3)
    first, _, last = head.net
    hidden = F.conv3d(maps, first.weight[:, :, None, None, None], first.bias).relu()
    expected = F.conv3d(hidden, last.weight[:, :, None, None, None], last.bias)
    torch.testing.assert_close(head(maps.movedim(1, -1)).movedim(-1, 1), expected)


def test_motion_decoder_has_the_published_size_and_a_cls_that_starts_at_zero():
    decoder = models.MotionDecoder(1024)
    assert count(decoder.blocks) == 3_155_968
    assert count(decoder.reduce) + count(decoder.expand) == 1_050_112
    assert decoder.cls.shape == (1, 1, 512) and not decoder.cls.any()


@pytest.mark.parametrize("sizes", [dict(depth=0), dict(heads=3), dict(heads=0)])
def test_a_decoder_of_impossible_sizes_is_an_error(sizes):
    with pytest.raises(ValueError, match="heads that divide its width"):
        models.MotionDecoder(12, **sizes)


def small_decoder() -> tuple[models.MotionDecoder, Tensor, Tensor]:
    """With a source of N = 5 pixels and a target of M = 6, two videos each, in float64."""
    torch.manual_seed(0)
    decoder = randomised(models.MotionDecoder(12, dim=16, depth=2, heads=4)).double()
    nn.init.normal_(decoder.cls)
    return decoder, torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)


def decoder_loop(
    decoder: models.MotionDecoder, source: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One video in numpy, query by query and head by head: outputs (1 + N, C) and the last attention (1 + N, M)."""
    w = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}

    def linear(x, name, rows=slice(None), kind="."):
        return x @ w[f"{name}{kind}weight"][rows].T + w[f"{name}{kind}bias"][rows]

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def position(place):
        rates = [10000 ** (-2 * (i // 2) / 16) for i in range(16)]
        return np.array([(math.cos if i % 2 else math.sin)(place * rate) for i, rate in enumerate(rates)])

    memory = [linear(pixel, "reduce") + position(i) for i, pixel in enumerate(target)]
    outputs, attentions = [], []
    for query in [w["cls"][0, 0], *(linear(pixel, "reduce") + position(i) for i, pixel in enumerate(source))]:
        for block in ("blocks.0", "blocks.1"):
            asked, heads, weights = norm(query, f"{block}.norm1"), [], []
            for head in range(4):
                q, k, v = (slice(16 * part + 4 * head, 16 * part + 4 * head + 4) for part in range(3))
                mine = linear(asked, f"{block}.attention", q, ".in_proj_")
                scores = np.array([mine @ linear(m, f"{block}.attention", k, ".in_proj_") / 2 for m in memory])
                weights.append(np.exp(scores) / np.exp(scores).sum())
                values = [linear(m, f"{block}.attention", v, ".in_proj_") for m in memory]
                heads.append(sum(a * value for a, value in zip(weights[-1], values, strict=True)))
            query = query + linear(np.concatenate(heads), f"{block}.attention.out_proj")
            hidden = np.maximum(linear(norm(query, f"{block}.norm2"), f"{block}.feed_forward.0"), 0)
            query = query + linear(hidden, f"{block}.feed_forward.3")
        outputs.append(linear(query, "expand"))
        attentions.append(np.mean(weights, 0))
    return np.stack(outputs), np.stack(attentions)


@torch.no_grad()
def test_motion_decoder_is_that_of_a_loop_and_its_attention_sums_to_one():
    decoder, source, target = small_decoder()
    y, y_cls, attention = decoder(source, target, need_weights=True)
    assert attention.shape == (2, 5, 6)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 5, dtype=torch.float64))
    for b in range(2):
        outputs, attentions = (torch.from_numpy(x) for x in decoder_loop(decoder, source[b].numpy(), target[b].numpy()))
        torch.testing.assert_close(torch.cat([y_cls[b : b + 1], y[b]]), outputs)
        torch.testing.assert_close(attention[b], attentions[1:])
    for plain, weighted in zip(decoder(source, target), (y, y_cls), strict=True):
        torch.testing.assert_close(plain, weighted)


def test_decoder_outputs_depend_on_their_own_query_and_target_only():
    decoder, source, target = small_decoder()
    inputs = source.requires_grad_(), target.requires_grad_(), decoder.cls
    y, y_cls = decoder(*inputs[:2])

    def touched(output: Tensor) -> tuple[Tensor, Tensor, bool]:
        """(B, N) source pixels, (B, M) target pixels and whether [cls] that an output depends on."""
        gradients = torch.autograd.grad(
            output.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradients[0].any(2), gradients[1].any(2), bool(gradients[2].any())

    for b in range(2):
        everything = torch.zeros(2, 6, dtype=torch.bool)
        everything[b] = True
        for n in range(5):
            own = torch.zeros(2, 5, dtype=torch.bool)
            own[b, n] = True
            pixels, places, cls = touched(y[b, n])
            assert torch.equal(pixels, own) and torch.equal(places, everything) and not cls
        pixels, places, cls = touched(y_cls[b])
        assert not pixels.any() and torch.equal(places, everything) and cls


@torch.no_grad()
def test_decoder_knows_positions():
    decoder, source, target = small_decoder()
    y, y_cls = decoder(source, target)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    y_moved, y_cls_moved = decoder(source, target[:, order])
    assert not torch.isclose(y, y_moved).all(2).any() and not torch.isclose(y_cls, y_cls_moved).all(1).any()
    swapped, y_cls_same = decoder(source[:, order[:5]], target)
    torch.testing.assert_close(swapped[:, 2:], y[:, 2:])
    torch.testing.assert_close(y_cls_same, y_cls)
    assert not torch.isclose(swapped[:, :2], y[:, [1, 0]]).all(2).any()


@pytest.mark.parametrize("dim", [2, 8, 7])
def test_sincos_positions_are_their_closed_form(dim):
    positions = models.sincos_positions(50, dim)
    assert positions.shape == (50, dim)
    for place, i in np.ndindex(50, dim):
        angle = place / 10000 ** (2 * (i // 2) / dim)
        assert positions[place, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-5)


# ------------------------------------------------------------------------------------------------ queue, key encoder


def oldest_first(queue: models.MomentumQueue) -> list[list[float]]:
    return torch.roll(queue.keys, -int(queue.pointer), 0).tolist()


@given(st.integers(0, 7), st.lists(st.integers(0, 16), max_size=8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_queue_holds_the_latest_keys_for_any_batch_sizes(length, batches, dtype):
    torch.manual_seed(0)
    queue = models.MomentumQueue(length, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(length))
    expected = deque(queue.keys.tolist(), maxlen=length)
    for n in batches:
        keys = torch.randn(n, 3, requires_grad=True).to(dtype)
        queue.enqueue(keys)
        expected.extend(keys.tolist())
        assert oldest_first(queue) == list(expected)
    assert queue.keys.dtype == torch.float32 and not queue.keys.requires_grad
    other = models.MomentumQueue(length, 3)
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(torch.ones(2, 3))
    assert oldest_first(other) == oldest_first(queue)


def gather_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    queue = models.MomentumQueue(5, 2)
    for step in range(3):
        queue.enqueue(torch.tensor([[step, rank], [step, rank + 10]]))
    torch.save(queue.state_dict(), f"{folder}/{rank}.pt")
    processes.end_process()


@pytest.mark.slow
def test_processes_hold_the_same_queue_in_the_order_of_ranks(tmp_path):
    torch.multiprocessing.spawn(gather_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        queue = models.MomentumQueue(5, 2)
        queue.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert oldest_first(queue) == [[1, 11], [2, 0], [2, 10], [2, 1], [2, 11]]


LAYOUTS = {  # rows of (n, 2, 3, 4, 5) in memory of several orders
    "contiguous": lambda rows: rows,
    "channels last": lambda rows: rows.to(memory_format=torch.channels_last_3d),
    "permuted": lambda rows: rows.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0),
    "rows last": lambda rows: rows.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second row": lambda rows: rows.repeat_interleave(2, 0)[::2],
    "expanded": lambda rows: rows[..., :1].expand(-1, -1, -1, -1, 5),
}
DEALT = [
    (n, dtype, layout)
    for n in (0, 1, 2, 3, 5, 8)
    for dtype in (torch.uint8, torch.float32, torch.bfloat16)
    for layout in LAYOUTS
]


def rows_of(rank: int, n: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """What a process has: values that differ within a row, between rows, and between processes."""
    values = torch.arange(n * 120).view(n, 2, 3, 4, 5) % 83 + 40 * rank
    return LAYOUTS[layout](values.to(dtype))


def deal_process(rank: int, folder: str) -> None:
    for world in (3, 2):
        if rank == world:
            return
        rendezvous = f"file://{folder}/rendezvous{world}"
        torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=world)
        found = []
        for case in DEALT:
            rows = rows_of(rank, *case)
            before = rows.clone()
            found.append(models.deal(rows))
            assert found[-1].dtype == rows.dtype and found[-1].shape == rows.shape, case
            made = LAYOUTS[case[2]](found[-1])  # what is made of dealt rows comes in any order, too
            assert torch.equal(models.deal(made, back=True), before) and torch.equal(rows, before), case
        torch.save(found, f"{folder}/{world}{rank}.pt")
        processes.end_process()


@pytest.mark.slow
def test_rows_are_dealt_over_the_processes_like_cards_and_come_back(tmp_path):
    torch.multiprocessing.spawn(deal_process, (str(tmp_path),), nprocs=3)
    for world in (3, 2):
        found = [torch.load(tmp_path / f"{world}{rank}.pt") for rank in range(world)]
        for case, *dealt in zip(DEALT, *found, strict=True):
            rows = [rows_of(source, *case) for source in range(world)]
            for receiver in range(world):
                due = [rows[r][i] for r in range(world) for i in range(case[0]) if (r + i) % world == receiver]
                assert torch.equal(dealt[receiver], torch.stack(due) if due else rows[0]), case


def test_one_process_deals_to_itself():
    rows = torch.rand(3, 2)
    assert models.deal(rows) is rows and models.deal(rows, back=True) is rows


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_momentum_update_moves_parameters_towards_the_query_and_nothing_else(momentum):
    torch.manual_seed(0)
    query, key = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    for module in (query, key):
        module(torch.randn(8, 3))
    key.requires_grad_(False)
    before, asked = copy.deepcopy(key.state_dict()), copy.deepcopy(query.state_dict())
    models.momentum_update(query, key, momentum)
    parameters = dict(key.named_parameters())
    for name, value in key.state_dict().items():
        old, goal = before[name], asked[name]
        torch.testing.assert_close(value, momentum * old + (1 - momentum) * goal if name in parameters else old)
        assert torch.equal(query.state_dict()[name], goal)
    assert all(p.grad_fn is None and not p.requires_grad for p in parameters.values())
