"""Weights of others: files made by their names and shapes, against networks written anew from their descriptions."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import video as torchvision_video

import augment
import evaluate
import features
import models
import runs
import train
import visualize

WIDTH = 1 / 16
BLOCKS = {  # channels out of the branches: 1×1×1; 1×1×1 and 3×3×3; the same; pooled 1×1×1
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
PIERGIAJ = {"stem": "Conv3d_", "block": "Mixed_", "bn": "bn"} | {
    b: b for b in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
}
FIMA = {"stem": "conv3d_", "block": "mixed_", "bn": "batch3d", "b0": "branch_0", "b1a": "branch_1.0"}
FIMA |= {"b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1", "b3b": "branch_3.1"}
FLAGS = ["--crop", 32, "--frames", 8, "--clips", 1, "--workers", 0, "--device", "cpu"]
NARROW = [*FLAGS, "--width", WIDTH]


def i3d_units(names: dict[str, str]) -> dict[str, tuple[int, int, int]]:
    """Each unit of a narrow I3D by its name in someone's files: channels in, channels out, kernel."""

    def scaled(*channels: int) -> list[int]:
        return [round(c * WIDTH) for c in channels]

    channels, wide = scaled(64, 192)
    units = {names["stem"] + "1a_7x7": (3, channels, 7), names["stem"] + "2b_1x1": (channels, channels, 1)}
    units[names["stem"] + "2c_3x3"] = (channels, wide, 3)
    for block, sizes in BLOCKS.items():
        b0, b1a, b1b, b2a, b2b, b3b = scaled(*sizes)
        branches = {"b0": (wide, b0, 1), "b1a": (wide, b1a, 1), "b1b": (b1a, b1b, 3), "b2a": (wide, b2a, 1)}
        branches |= {"b2b": (b2a, b2b, 3), "b3b": (wide, b3b, 1)}
        units |= {f"{names['block']}{block}.{names[branch]}": size for branch, size in branches.items()}
        wide = b0 + b1b + b2b + b3b
    return units


def i3d_file(names: dict[str, str], counters: bool = True) -> dict[str, Tensor]:
    """A state dict of an I3D with variances so small that the eps of batch norm matters; some channels are dead."""
    generator, file = torch.Generator().manual_seed(0), {}
    for unit, (inputs, outputs, kernel) in i3d_units(names).items():
        weight = torch.randn(outputs, inputs, *(kernel,) * 3, generator=generator)
        file[f"{unit}.conv3d.weight"] = weight * (2e-3 / (inputs * kernel**3)) ** 0.5
        bn = f"{unit}.{names['bn']}"
        file[f"{bn}.weight"], file[f"{bn}.bias"] = torch.rand(2, outputs, generator=generator) + 0.5
        file[f"{bn}.running_mean"] = 0.01 * torch.randn(outputs, generator=generator)
        file[f"{bn}.running_var"] = 2e-3 * torch.rand(outputs, generator=generator) ** 4
        if counters:
            file[f"{bn}.num_batches_tracked"] = torch.tensor(7)
    return file


def i3d(file: dict[str, Tensor], x: Tensor, names: dict[str, str], eps: float) -> Tensor:
    """The trunk as its authors' code runs it, zeros written out: piergiaj's by the size of each input, FIMA's not."""
    by_size = names is PIERGIAJ

    def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        both_sides = []
        for n, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
            total = max(k - (n % s if by_size and n % s else s), 0)
            both_sides += [total // 2, total - total // 2]
        return F.pad(x, both_sides)

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bn = file[f"{name}.conv3d.weight"], f"{name}.{names['bn']}."
        x = F.conv3d(padded(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
        statistics = (file[bn + key] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=eps))

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(padded(x, kernel, stride), kernel, stride, ceil_mode=not by_size)

    x = pool(unit(x, names["stem"] + "1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, names["stem"] + "2b_1x1"), names["stem"] + "2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        of = {
            branch: f"{names['block']}{block}.{names[branch]}" for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
        }
        wide = [unit(unit(x, of[f"b{i}a"]), of[f"b{i}b"]) for i in (1, 2)]
        x = torch.cat([unit(x, of["b0"]), *wide, unit(pool(x, (3, 3, 3), (1, 1, 1)), of["b3b"])], 1)
    return x


def rgb(*size: int) -> Tensor:
    """Two clips in [0, 1]."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def pretraining(backbone: dict[str, Tensor], outer: str = "module.", inner: str = "", **heads: Tensor) -> dict:
    """A checkpoint of FIMA's or FAME's pretraining: both encoders, the key's twice the query's, and what is beside."""
    state = {f"{outer}encoder_q.{inner}{name}": value for name, value in (backbone | heads).items()}
    state |= {f"{outer}encoder_k.{inner}{name}": 2 * value for name, value in (backbone | heads).items()}
    beside = {"cls_token": (1, 1, 512), "queue": (128, 8), "queue_ptr": (1,), "embedding1.weight": (4, 4, 1, 1)}
    beside |= {"projector_dense.net.0.weight": (8, 4, 1, 1), "transformer_decoder.layers.0.norm2.bias": (4,)}
    state |= {outer + name: torch.zeros(shape) for name, shape in beside.items()}
    return {"epoch": 200, "arch": "I3D", "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def tuned(backbone: dict[str, Tensor]) -> dict:
    """A checkpoint of FIMA's evaluation."""
    state = {f"module.{name}": value for name, value in backbone.items()}
    state |= {"module.fc.weight": torch.zeros(5, 64), "module.fc.bias": torch.zeros(5)}
    return pretraining({}) | {"state_dict": state, "best_acc1": torch.tensor([50.0])}


def loaded(checkpoint: object, width: float = WIDTH) -> tuple[str, nn.Module, str]:
    """The encoder of a checkpoint, in eval mode: what it is said to be, itself, and the report."""
    weights = models.encoder_weights(checkpoint)
    name = models.recognize(weights)[0]
    encoder = models.build_encoder(name, width)
    return name, encoder, models.load_weights(encoder.eval(), weights)


# ------------------------------------------------------------------------------------------------------------ formats


HEAD = {"id_head.2.weight": torch.zeros(4, 4), "id_head.4.bias": torch.zeros(4)}


@pytest.mark.parametrize(
    "checkpoint, ignored",
    [
        (pretraining(i3d_file(FIMA)), "encoder_k (342), cls_token (1), queue (1), queue_ptr (1), embedding1 (1)"),
        (tuned(i3d_file(FIMA)), "fc (2)"),
        (pretraining(i3d_file(FIMA), **HEAD), "id_head (2)"),
        (i3d_file(FIMA), "none"),
    ],
    ids=["FIMA", "FIMA's evaluation", "FAME", "plain"],
)
@torch.no_grad()
def test_fima_and_fame_checkpoints_give_the_outputs_of_their_networks(checkpoint, ignored):
    name, encoder, report = loaded(checkpoint)
    assert name == "i3d" and "342 of 342 entries matched" in report and ignored in report and "missing: none" in report
    for size in ((8, 32, 48), (4, 16, 16), (12, 48, 112)):  # those for which the docstring promises it
        clip = augment.normalize(rgb(*size))
        torch.testing.assert_close(encoder(clip), i3d(i3d_file(FIMA), clip, FIMA, 1e-5), rtol=1e-4, atol=1e-4)
    assert encoder.state_dict()["mixed_5c.branch_0.batch3d.num_batches_tracked"] == 7


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("classes", [400, 7, 0])
@torch.no_grad()
def test_piergiajs_i3d_gives_the_outputs_of_its_network(classes, counters):
    file = i3d_file(PIERGIAJ, counters)
    logits = {"logits.conv3d.weight": torch.zeros(classes, 64, 1, 1, 1), "logits.conv3d.bias": torch.zeros(classes)}
    name, encoder, report = loaded(file | logits if classes else file)
    assert name == "i3d_piergiaj" and f"ignored: {'logits (2)' if classes else 'none'}" in report
    assert f"missing: {'none' if counters else '57 num_batches_tracked'}" in report
    assert {(m.eps, m.momentum) for m in encoder.modules() if isinstance(m, nn.BatchNorm3d)} == {(1e-3, 0.01)}
    for size in ((8, 32, 48), (7, 33, 50), (1, 15, 7)):
        clip = rgb(*size)
        features = encoder(augment.normalize(clip))
        torch.testing.assert_close(features, i3d(file, 2 * clip - 1, PIERGIAJ, 1e-3), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(features, i3d(file, 2 * clip - 1, PIERGIAJ, 1e-5), rtol=0.1)  # or eps means nothing


def randomised(module: nn.Module) -> nn.Module:
    """With norms and biases drawn too, so that none is neutral; eval mode."""
    for tensor in module.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return module.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "s3d"])
@torch.no_grad()
def test_torchvision_weights_give_equal_outputs_both_ways(name):
    theirs = randomised(getattr(torchvision_video, name)(weights=None, num_classes=3))
    recognized, ours, report = loaded(theirs.state_dict(), 1.0)
    assert recognized == name and f"ignored: {'classifier' if name == 's3d' else 'fc'} (2); missing: none" in report
    trunk = theirs.features if name == "s3d" else nn.Sequential(*list(theirs.children())[:5])
    clip = augment.normalize(rgb(9, 50, 70)[:1])
    assert torch.equal(ours(clip), trunk(clip))
    exported = models.export_weights(ours, "torchvision")
    again = getattr(torchvision_video, name)(weights=None, num_classes=3)
    missing, unexpected = again.load_state_dict(exported, strict=False)
    assert not unexpected and {key.partition(".")[0] for key in missing} == {"classifier" if name == "s3d" else "fc"}
    for key, value in theirs.state_dict().items():
        assert key in missing or torch.equal(again.state_dict()[key], value), key


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
    expected = "i3d" if name == "i3d_piergiaj" else name  # they share their names
    assert models.recognize(names)[0] == models.recognize(names[5:-5])[0] == expected


@pytest.mark.parametrize("checkpoint", [[], {}, {"epoch": 1}, {"state_dict": {"a": 1}}, {"a.b": torch.ones(1)}, None])
def test_what_holds_no_encoder_is_not_recognized(checkpoint):
    assert models.recognize(models.encoder_weights(checkpoint)) == ()


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["i3d", "i3d_piergiaj"])
@torch.no_grad()
def test_exported_to_piergiajs_names_an_i3d_gives_equal_outputs_in_its_network_and_back(name):
    ours = models.build_encoder(name, WIDTH).eval()
    models.load_weights(ours, i3d_file(FIMA))
    exported = models.export_weights(ours, "piergiaj")
    theirs = {key: value.shape for key, value in i3d_file(PIERGIAJ).items()}
    assert {key: value.shape for key, value in exported.items()} == theirs
    clip = rgb(8, 32, 48)
    given = 2 * clip - 1 if name == "i3d_piergiaj" else augment.normalize(clip)
    expected = ours(augment.normalize(clip))
    torch.testing.assert_close(i3d(exported, given, PIERGIAJ, 1e-3), expected, rtol=1e-4, atol=1e-4)

    assert models.recognize(exported) == ("i3d_piergiaj", "i3d")
    back = models.build_encoder(name, WIDTH).eval()
    models.load_weights(back, exported)
    for key, value in ours.state_dict().items():
        tolerance = 1e-6 if name == "i3d" and key.endswith("batch3d.weight") else 0  # made for one eps, and back
        torch.testing.assert_close(back.state_dict()[key], value, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("name", "to"), [("i3d", "torchvision"), ("r3d_18", "piergiaj"), ("conv4", "torchvision")])
def test_an_encoder_that_the_other_project_lacks_is_not_exported(name, to):
    with pytest.raises(ValueError, match=r"torchvision has r2plus1d_18, r3d_18, s3d, piergiaj I3D"):
        models.export_weights(models.build_encoder(name, WIDTH), to)


def test_export_from_the_command_line_and_back(run, monkeypatch):
    monkeypatch.chdir(run.path)
    torch.save(pretraining(i3d_file(FIMA)), "fima.pth.tar")
    export = ["export", "--checkpoint", "fima.pth.tar", "--width", WIDTH, "--to"]
    code, out, _ = run(evaluate, *export, "piergiaj", dataset=None)
    assert code == 0 and "342 entries written to piergiaj.pt" in out
    code, out, _ = run(evaluate, "retrieve", "--checkpoint", "piergiaj.pt", "--encoder", "i3d", *NARROW)
    assert code == 0 and "piergiaj.pt: i3d, 342 of 342 entries matched" in out
    for wrong, says in (
        ([*export, "piergiaj"], "piergiaj.pt"),  # exists
        ([*export, "torchvision"], "no I3D there"),
        ([*export, "piergiaj", "--out", "nowhere/x.pt"], "nowhere/x.pt"),
    ):
        code, _, err = run(evaluate, *wrong, dataset=None)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert sorted(os.listdir()) == ["fima.pth.tar", "piergiaj.pt", "retrieve_synthetic.json"]


# ----------------------------------------------------------------------------------------------- evaluating and seeing


FILES = {
    "FIMA's evaluation": (tuned(i3d_file(FIMA)), "i3d"),
    "FAME": (pretraining(i3d_file(FIMA), "_orig_mod.module.", **HEAD), "i3d"),
    "torchvision r3d_18": (models.build_encoder("r3d_18", WIDTH).state_dict(), "r3d_18"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_format_is_evaluated_from_the_command_line(run, kind):
    checkpoint, name = FILES[kind]
    torch.save(checkpoint, run.path / "theirs.pth")
    code, out, _ = run(evaluate, "retrieve", "--checkpoint", "theirs.pth", *NARROW)
    assert code == 0 and f"theirs.pth: {name}, " in out and "ignored: " in out and "missing: " in out and "R@1" in out


def test_files_of_torch_before_1_6_are_read(run):
    torch.save(i3d_file(PIERGIAJ, counters=False), run.path / "old.pt", _use_new_zipfile_serialization=False)
    code, out, _ = run(evaluate, "retrieve", "--checkpoint", "old.pt", *NARROW)
    assert code == 0 and "i3d_piergiaj" in out


@pytest.mark.slow
@torch.no_grad()
def test_the_eps_of_batch_norm_travels_through_fine_tuning_and_resuming(run, monkeypatch):
    torch.save(i3d_file(PIERGIAJ), run.path / "piergiaj.pt")
    trained, original = [], evaluate.fit_in_folder

    def keep(model, *given, **options):
        trained.append(model.encoder)
        return original(model, *given, **options)

    monkeypatch.setattr(evaluate, "fit_in_folder", keep)
    with torch.enable_grad():
        start = ["finetune", "--checkpoint", "piergiaj.pt", "--batch_size", 6, "--epochs", 1, "--out", "run"]
        assert run(evaluate, *start, "--max_steps", 1, *NARROW)[0] == 0
        (run.path / "piergiaj.pt").unlink()  # not needed any more
        assert run(evaluate, "finetune", "--resume", "run/checkpoint.pt", *FLAGS[-4:], dataset=None)[0] == 0
    assert [type(encoder) for encoder in trained] == [models.PiergiajI3D] * 2
    assert runs.load_checkpoint("run/checkpoint.pt")["step"] == 3
    encoder, config = features.load_encoder(evaluate.RetrieveConfig(checkpoint="run/checkpoint.pt"))
    assert config.encoder == "i3d_piergiaj" and config.width == WIDTH
    clip, exported = rgb(8, 32, 48), models.export_weights(encoder, "piergiaj")
    assert not torch.equal(exported["Conv3d_1a_7x7.bn.running_var"], i3d_file(PIERGIAJ)["Conv3d_1a_7x7.bn.running_var"])
    expected = i3d(exported, 2 * clip - 1, PIERGIAJ, 1e-3)
    torch.testing.assert_close(encoder.eval()(augment.normalize(clip)), expected, rtol=1e-3, atol=1e-3)


def test_figures_are_drawn_of_others_weights(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(pretraining(i3d_file(FIMA)), "fima.pth.tar")
    config = visualize.FigureConfig(width=WIDTH, device="cpu")
    for key, factor in ((False, 1), (True, 2)):
        (model,) = visualize.load_models(config, ["fima.pth.tar"], key=key)
        weight = model.encoder.state_dict()["mixed_4c.branch_1.1.conv3d.weight"]
        assert torch.equal(weight, factor * i3d_file(FIMA)["mixed_4c.branch_1.1.conv3d.weight"])
    flags = [str(flag) for flag in NARROW]
    monkeypatch.setattr(sys, "argv", ["visualize.py", "activations", "fima.pth.tar", "--data", str(videos), *flags])
    visualize.main()
    assert (tmp_path / "activations.png").is_file() and "ignored: encoder_k (342)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["visualize.py", "attention", "fima.pth.tar", "--data", str(videos), *flags])
    with pytest.raises(train.UserError, match="attention needs a checkpoint of fima"):
        visualize.main()


# ------------------------------------------------------------------------------------------------------------ mistakes


class Code:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in i3d_file(PIERGIAJ).items() if name not in names}


FLOW = i3d_file(PIERGIAJ) | {"Conv3d_1a_7x7.conv3d.weight": torch.zeros(4, 2, 7, 7, 7)}
LOST = [f"Mixed_4c.b1b.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
OURS = i3d_file(FIMA)
WRONG = {
    "unknown": ({"blocks.0.weight": torch.ones(1)}, [], ["no encoder known here", "blocks.0.weight"]),
    "no tensors": ([1, 2], [], ["no encoder known here", "none"]),
    "a key is missing": (without("Mixed_5c.b3b.conv3d.weight"), [], ["i3d_piergiaj", "Mixed_5c.b3b.conv3d.weight"]),
    "keys are missing": (without(*LOST), [], LOST[:4]),
    "many are missing": (without(*list(i3d_file(PIERGIAJ))[:60]), [], ["Conv3d_1a_7x7.conv3d.weight", "and 45 more"]),
    "another shape": (FLOW, [], ["Conv3d_1a_7x7.conv3d.weight is (4, 2, 7, 7, 7)", "(4, 3, 7, 7, 7)"]),
    "another width": (OURS, ["--width", 1], ["--width 1", "(4, 3, 7, 7, 7)", "(64, 3, 7, 7, 7)"]),
    "another encoder": (OURS, ["--encoder", "r3d_18"], ["holds i3d, not r3d_18: give --encoder i3d"]),
    "another I3D": (OURS, ["--encoder", "i3d_piergiaj"], ["holds i3d, not i3d_piergiaj"]),
    "code": ({"state_dict": OURS, "args": Code()}, [], ["holds code, which is never run"]),
    "text": (b"not a checkpoint\n", [], ["damaged, or no checkpoint"]),
    "nothing": (b"", [], ["damaged, or no checkpoint"]),
    "no file": (None, [], ["no checkpoint at theirs.pth"]),
    "resumed": (OURS, ["--resume", "theirs.pth"], ["no checkpoint of this project"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_clear_line(run, monkeypatch, case):
    content, flags, says = WRONG[case]
    monkeypatch.chdir(run.path)
    if isinstance(content, bytes):
        (run.path / "theirs.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "theirs.pth")
    code, _, err = run(evaluate, "linear", "--checkpoint", "theirs.pth", *NARROW, *flags)
    assert code == 2
    one_line(err, "theirs.pth", *says)
    assert not (run.path / "it ran").exists()
