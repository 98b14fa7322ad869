"""Encoders, weights of others, motion decoder and queue against plain reimplementations and published sizes."""

import copy
import math
import re
import subprocess
import sys
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, generator, join_group, processes, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import video as torchvision_video

import augment
import cli
import evaluate
import features
import models


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_published():
    decoder = models.MotionDecoder(1024)
    assert count(models.build_encoder("i3d")) == 12_287_264 and count(models.ProjectionHead(1024)) == 1_180_800
    assert count(decoder.blocks) == 3_155_968 and count(decoder.reduce) + count(decoder.expand) == 1_050_112
    assert decoder.cls.shape == (1, 1, 512) and not decoder.cls.any()
    assert {module.p for module in decoder.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert {block.attention.dropout for block in decoder.blocks} == {0.1}
    assert count(models.build_encoder("conv4")) == 236_720


def test_a_projection_is_two_linear_layers_with_relu_between():
    head, features = models.ProjectionHead(8, 16, 4), torch.randn(3, 5, 8)
    first, _, second = head.net
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(head(features), hidden @ second.weight.T + second.bias)


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18"])
def test_initial_weights_keep_the_variance_of_gradients(name):
    torch.manual_seed(0)
    for module in models.build_encoder(name, 0.25).modules():
        if isinstance(module, nn.Conv3d) and module.weight.numel() > 1000:
            fan_out = module.weight[:, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


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
        seen = clip.grad.double().sum([d for d in range(5) if d != 2 + axis])
        assert seen[0] == seen[-1] == 0
        center = seen @ (torch.arange(size[axis]).double() + 0.5) / seen.sum()  # pixel k covers k to k + 1
        assert center.item() == pytest.approx(stride * (pixel + 0.5) + offset, abs=1e-3), axis
        assert name != "conv4" or offset == stride / 16  # nearly the middle of its bin


@pytest.mark.parametrize("training", [True, False], ids=["training", "fixed batch norm"])
@pytest.mark.parametrize(
    ("name", "width"), [("conv4", 1.0), ("i3d", 0.125), ("r3d_18", 0.125), ("r2plus1d_18", 0.125), ("s3d", 1.0)]
)
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


WIDTH = 1 / 16
with torch.device("meta"):  # S3D has as many channels as I3D, and a pair of convolutions in place of each 3×3×3
    convolutions = [part for part in torchvision_video.s3d().features.modules() if isinstance(part, nn.Conv3d)]
CHANNELS = torch.tensor([part.out_channels for part in convolutions[5:]]).view(9, 8).tolist()
BLOCKS = dict(zip(("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"), CHANNELS, strict=True))
FIMA = {"Conv3d": "conv3d", "Mixed": "mixed", "bn": "batch3d", "b0": "branch_0", "b1a": "branch_1.0"}  # names there
FIMA |= {"b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1", "b3b": "branch_3.1"}
NARROW = ["--crop=32", "--frames=8", "--clips=1", "--workers=0", "--device=cpu", f"--width={WIDTH}"]
HEAD = {"id_head.2.weight": torch.zeros(4, 4), "id_head.4.bias": torch.zeros(4)}
FC = {"fc.weight": torch.zeros(5, 64), "fc.bias": torch.zeros(5)}
LOGITS = {"logits.conv3d.weight": torch.zeros(400, 64, 1, 1, 1), "logits.conv3d.bias": torch.zeros(400)}


def i3d(x: Tensor, file: dict[str, Tensor], eps: float = 1e-3) -> Tensor:
    """The trunk as piergiaj's code runs it, zeros written out by the size of each input. FIMA's pads the same where
    frames are a multiple of 4, height and width of 16. What the file lacks is drawn into it, with variances so small
    that the eps of batch norm matters."""
    drawn = generator(0)

    def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        total = [max(k - (n % s or s), 0) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
        return F.pad(x, [side for n in reversed(total) for side in (n // 2, n - n // 2)])

    def unit(x: Tensor, name: str, channels: int, kernel: int = 1, stride: int = 1) -> Tensor:
        conv, bn, inputs, outputs = f"{name}.conv3d.weight", f"{name}.bn.", x.shape[1], round(channels * WIDTH)
        if conv not in file:
            weight = torch.randn(outputs, inputs, *(kernel,) * 3, generator=drawn)
            file[conv] = weight * (2e-3 / (inputs * kernel**3)) ** 0.5
            file[bn + "weight"], file[bn + "bias"] = torch.rand(2, outputs, generator=drawn) + 0.5
            file[bn + "running_mean"] = 0.01 * torch.randn(outputs, generator=drawn)
            file[bn + "running_var"] = 2e-3 * torch.rand(outputs, generator=drawn) ** 4
            file[bn + "num_batches_tracked"] = torch.tensor(7)
        x = F.conv3d(padded(x, (kernel,) * 3, (stride,) * 3), file[conv], stride=stride)
        statistics = (file[bn + key] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=eps))

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(padded(x, kernel, stride), kernel, stride)

    x = pool(unit(x, "Conv3d_1a_7x7", 64, 7, 2), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1", 64), "Conv3d_2c_3x3", 192, 3)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block, (b0, b1a, b1b, _, b2a, b2b, _, b3b) in BLOCKS.items():
        if block in ("4b", "5b"):
            x = pool(x, (3, 3, 3) if block == "4b" else (2, 2, 2), (2, 2, 2))
        name = f"Mixed_{block}."
        b1 = unit(unit(x, name + "b1a", b1a), name + "b1b", b1b, 3)
        b2 = unit(unit(x, name + "b2a", b2a), name + "b2b", b2b, 3)
        b3 = unit(pool(x, (3, 3, 3), (1, 1, 1)), name + "b3b", b3b)
        x = torch.cat([unit(x, name + "b0", b0), b1, b2, b3], 1)
    return x


def i3d_file() -> dict[str, Tensor]:
    """A state dict of a narrow I3D by piergiaj's names."""
    i3d(torch.zeros(1, 3, 8, 32, 32), file := {})
    return file


def fima_file() -> dict[str, Tensor]:
    """The same by FIMA's names."""
    return {re.sub(r"Conv3d|Mixed|bn|b\d[ab]?", lambda found: FIMA[found[0]], k): v for k, v in i3d_file().items()}


def pretraining(backbone: dict[str, Tensor], outer: str = "module.", inner: str = "", **heads: Tensor) -> dict:
    """A checkpoint of FIMA's or FAME's pretraining: both encoders, the key's twice the query's, and what is beside."""
    state = {f"{outer}encoder_q.{inner}{name}": value for name, value in (backbone | heads).items()}
    state |= {f"{outer}encoder_k.{inner}{name}": 2 * value for name, value in (backbone | heads).items()}
    return {"epoch": 200, "state_dict": state | {outer + name: torch.zeros(4) for name in ("queue", "mlp.0.bias")}}


def loaded(checkpoint: object, width: float = WIDTH) -> tuple[str, nn.Module, str]:
    """The encoder of a checkpoint, in eval mode: what it is said to be, itself, and the report."""
    weights = models.encoder_weights(checkpoint)
    name = models.recognize(weights)[0]
    encoder = models.build_encoder(name, width)
    return name, encoder, models.load_weights(encoder.eval(), weights)


@pytest.mark.parametrize(
    "name, checkpoint, matched, ignored",
    [
        ("i3d", pretraining(fima_file()), 342, "encoder_k (342), queue (1), mlp (1)"),
        ("i3d", pretraining(fima_file(), "_orig_mod.module.", **HEAD), 342, "id_head (2)"),
        ("i3d", {"state_dict": {f"module.{k}": v for k, v in (fima_file() | FC).items()}}, 342, "fc (2)"),
        ("i3d", fima_file(), 342, "none"),
        ("i3d_piergiaj", i3d_file() | LOGITS, 342, "logits (2)"),
        ("i3d_piergiaj", {k: v for k, v in i3d_file().items() if "num_batches" not in k}, 285, "none"),
    ],
)
@torch.no_grad()
def test_i3ds_of_others_give_the_outputs_of_their_networks(name, checkpoint, matched, ignored):
    recognized, encoder, report = loaded(checkpoint)
    assert recognized == name and f"{matched} of 342 entries matched" in report and ignored in report
    eps, other, momentum = (1e-5, 1e-3, 0.1) if name == "i3d" else (1e-3, 1e-5, 0.01)
    assert {(m.eps, m.momentum) for m in encoder.modules() if isinstance(m, nn.BatchNorm3d)} == {(eps, momentum)}
    for size in ((8, 32, 48), (4, 16, 16), (12, 48, 112), (7, 33, 50), (1, 15, 7)):
        clip = torch.rand(2, 3, *size)
        x = augment.normalize(clip) if name == "i3d" else 2 * clip - 1
        maps = encoder(augment.normalize(clip))
        torch.testing.assert_close(maps, i3d(x, i3d_file(), eps), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(maps, i3d(x, i3d_file(), other), rtol=0.1)  # or eps means nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "s3d"])
@torch.no_grad()
def test_torchvision_weights_give_equal_outputs_both_ways(name):
    theirs = getattr(torchvision_video, name)(weights=None, num_classes=3).eval()
    for tensor in theirs.state_dict().values():
        if tensor.dim() == 1:  # norms and biases, so that none is neutral
            tensor.uniform_(0.5, 1.5)
    recognized, ours, report = loaded(theirs.state_dict(), 1.0)
    assert recognized == name and f"ignored: {'classifier' if name == 's3d' else 'fc'} (2)" in report
    trunk = theirs.features if name == "s3d" else nn.Sequential(*list(theirs.children())[:5])
    clip = augment.normalize(torch.rand(1, 3, 9, 50, 70))
    assert torch.equal(ours(clip), trunk(clip))
    exported, expected = models.export_weights(ours), theirs.state_dict()
    assert len(exported) == len(expected) - 2 and all(torch.equal(value, expected[k]) for k, value in exported.items())


@pytest.mark.slow
def test_torchvision_is_imported_for_its_encoders_alone():
    """Importing it takes as long as all the rest."""
    script = "import sys, evaluate, fima, visualize; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@given(*[st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3).map("".join)] * 2)
def test_wrappers_of_names_are_taken_off_in_any_order(outer, inner):
    backbone = {"stem.0.weight": torch.ones(2), "fc.weight": torch.ones(3)}
    found = models.encoder_weights(pretraining(backbone, outer, inner))
    assert found["stem.0.weight"].sum() == 2 and found["encoder_k.stem.0.weight"].sum() == 4 and "queue" in found
    assert models.encoder_weights(pretraining(backbone, outer, inner), key=True)["stem.0.weight"].sum() == 4
    assert not any("module" in name or "_orig_mod" in name for name in found)


@pytest.mark.parametrize("name", models.ENCODERS)
def test_every_encoder_is_recognized_by_its_names_though_some_are_missing(name):
    with torch.device("meta"):
        names = list(models.build_encoder(name).state_dict())
    assert models.recognize(names)[0] == models.recognize(names[5:-5])[0] == name.removesuffix("_piergiaj")


@pytest.mark.parametrize("name", ["i3d", "i3d_piergiaj"])
@torch.no_grad()
def test_exported_to_piergiajs_names_an_i3d_gives_equal_outputs_in_its_network_and_back(name):
    ours = models.build_encoder(name, WIDTH).eval()
    models.load_weights(ours, fima_file())
    exported = models.export_weights(ours)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in i3d_file().items()}
    clip = torch.rand(2, 3, 8, 32, 48)
    x = augment.normalize(clip) if name == "i3d" else 2 * clip - 1
    maps = ours(augment.normalize(clip))  # of an i3d up to 1e12, as its variances are so small
    torch.testing.assert_close(i3d(x, exported), maps, rtol=1e-4, atol=1e-4 * maps.max().item())
    assert models.recognize(exported) == ("i3d_piergiaj", "i3d")
    back = models.build_encoder(name, WIDTH)
    models.load_weights(back, exported)
    for key, value in ours.state_dict().items():
        tolerance = 1e-6 if name == "i3d" and key.endswith("batch3d.weight") else 0  # made for one eps, and back
        torch.testing.assert_close(back.state_dict()[key], value, rtol=tolerance, atol=0)


def test_export_from_the_command_line_and_back(run):
    """And a file of torch before 1.6 is read, and weights that are not finite are not written."""
    file = fima_file()
    torch.save(pretraining(file, **HEAD), run.path / "fima.pth.tar", _use_new_zipfile_serialization=False)
    export = ["export", "--width", WIDTH, "--checkpoint"]
    run.ok(evaluate, *export, "fima.pth.tar", dataset=None)
    out = run.ok(evaluate, "retrieve", "--checkpoint=encoder.pt", "--encoder=i3d", *NARROW)
    assert "encoder.pt: i3d, 342 of 342 entries matched" in out and "R@1" in out
    run.refused(evaluate, *export, "fima.pth.tar", dataset=None, says=["encoder.pt is there"])
    file["mixed_3b.branch_0.conv3d.weight"][0] = torch.nan
    torch.save(file, run.path / "broken.pt")
    says = ["not finite", "Mixed_3b.b0.conv3d.weight"]
    run.refused(evaluate, *export, "broken.pt", "--out=new.pt", dataset=None, says=says)
    assert not (run.path / "new.pt").exists()


def test_the_onnx_file_gives_the_encoders_maps_for_any_number_of_clips(run):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript, which is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which runs the file, is not installed")
    out = run.ok(evaluate, "export", "--checkpoint=small", "--to=onnx", "--out=e.onnx", dataset=None)
    assert "16 frames, 32 × 32" in out
    session, clips = runtime.InferenceSession(run.path / "e.onnx"), torch.randn(3, 3, 16, 32, 32)
    encoder, _ = features.load_encoder("small")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(["maps"], {"clips": clips.numpy()})[0]), encoder(clips))


def test_onnx_without_its_package_is_one_line(run, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    run.refused(evaluate, "export", "--checkpoint=small", "--to=onnx", dataset=None, says=["pip install onnxscript"])


LOST = "Mixed_5c.b3b.conv3d.weight"
MISTAKES = {
    "another shape": (i3d_file() | {LOST: torch.zeros(4, 2, 7, 7, 7)}, [], [LOST]),
    "unknown": ({"blocks.0.weight": torch.ones(1)}, [], ["no encoder known here", "blocks.0.weight"]),
    "no tensors": ([1, 2], [], ["no encoder known here", "none"]),
    "missing": ({k: v for k, v in i3d_file().items() if k != LOST}, [], ["i3d_piergiaj", LOST]),
    "another width": (fima_file(), ["--width=1"], ["--width 1", "shape"]),
    "another encoder": (fima_file(), ["--encoder=r3d_18"], ["holds i3d, not r3d_18"]),
    "resumed": (fima_file(), ["--resume=theirs.pth"], ["no checkpoint of this project"]),
}


@pytest.mark.parametrize(("content", "flags", "says"), MISTAKES.values(), ids=MISTAKES)
def test_weights_that_do_not_serve_are_named_in_one_clear_line(run, content, flags, says):
    torch.save(content, run.path / "theirs.pth")
    run.refused(evaluate, "linear", "--checkpoint=theirs.pth", *NARROW, *flags, says=["theirs.pth", *says])


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


def permuted(rows: Tensor) -> Tensor:
    """Rows that do not lie in memory as they come."""
    return rows.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0)


def group_process(rank: int, folder: str) -> None:
    join_group(rank, folder, 3)
    for n in (0, 1, 2, 5):
        rows = [permuted((torch.arange(n * 120) % 83 + 40 * r).byte().view(n, 2, 3, 4, 5)) for r in range(3)]
        due = [rows[r][i] for r in range(3) for i in range(n) if (r + i) % 3 == rank]
        dealt = models.deal(rows[rank])
        assert torch.equal(dealt, torch.stack(due) if due else rows[0]), n
        assert torch.equal(models.deal(permuted(dealt), back=True), rows[rank]), n
    cli.end_process()


@pytest.mark.slow
def test_processes_deal_rows_like_cards(tmp_path):
    processes(group_process, str(tmp_path), count=3)


def test_momentum_update_moves_parameters_towards_the_query_and_nothing_else():
    query, key = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    query(torch.randn(8, 3))  # gives it other statistics
    before, asked = copy.deepcopy((key.state_dict(), query.state_dict()))
    models.momentum_update(query, key, 0.9)
    assert same(query.state_dict(), asked)
    learnt = dict(key.named_parameters())
    expected = {name: 0.9 * x + 0.1 * asked[name] if name in learnt else x for name, x in before.items()}
    torch.testing.assert_close(dict(key.state_dict()), expected)
