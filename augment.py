"""From uint8 clips to an encoder's input: colours, frame difference, normalisation; and FAME's merging of videos.

Can be copied alone into another project: it imports torch only.

Letters: N clips, B videos, T frames, H, W height and width in pixels.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)  # what `data.draw_color` gives a clip that stays as it is
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


def _luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Gray, with the weights of ITU-R BT.601."""
    return (red * 0.2989).add(green, alpha=0.587).add(blue, alpha=0.114)


def _shift_hue(red: Tensor, green: Tensor, blue: Tensor, shift: Tensor) -> list[Tensor]:
    """The colours with the hue of HSV turned by `shift` ∈ [−0.5, 0.5] turns; exact, without division.

    Hue is kept multiplied by the chroma c (6c is a full turn). A channel is then the largest value plus c minus the
    distance on the circle from the hue to the channel's own (0, 2c, 4c), but neither above the largest nor below the
    smallest value.
    """
    high, low = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    chroma = high - low
    hue = (blue - red).add(chroma, alpha=2).lerp((red - green).add(chroma, alpha=4), (high - green).sign())
    hue = (green - blue).lerp(hue, (high - red).sign()).addcmul(chroma, shift, value=6)  # exact: weights are 0 or 1
    half, above = chroma * 3, high + chroma
    distances = (((hue.sub(chroma, alpha=own).abs() - half).abs() - half).abs() for own in (0, 2, 4))
    return [(above - distance).clamp(low, high) for distance in distances]


def _taps(radius: int, sigma: Tensor) -> Tensor:
    """Weights (N, 2 · radius + 1) of a Gaussian of each deviation (N, 1), the identity for 0."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2)
    return weights / weights.sum(1, keepdim=True)


def _filter(size: int, taps: Tensor) -> Tensor:
    """(N, size, size): of which pixels of a line, reflected at its ends, a filter (N, taps) makes each of them."""
    radius = taps.shape[1] // 2
    lines = torch.eye(size, device=taps.device, dtype=taps.dtype)[None]
    lines = F.pad(lines, (radius, radius), mode="reflect")[0].unfold(1, 2 * radius + 1, 1)
    return (lines @ taps.mT).permute(2, 1, 0)


def _blur(clips: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every frame, (N, 3, T, H, W), reflected at the border; sigma (N, 1), 0 for none."""
    height, width = clips.shape[-2:]
    radius = max(int(0.1 * height) // 2, 1)
    with torch.autocast(clips.device.type, enabled=False):
        taps = _taps(radius, sigma)
        if _on_cpu(clips) and height > 48:  # fewer operations: every frame and colour a channel with its own kernel
            images = clips.reshape(1, -1, height, width)
            kernels = taps.repeat_interleave(images.shape[1] // len(clips), 0)[:, None, None]
            images = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="reflect"), kernels, groups=len(kernels))
            images = F.conv2d(F.pad(images, (0, 0, radius, radius), mode="reflect"), kernels.mT, groups=len(kernels))
            return images.view_as(clips)
        rows = _filter(height, taps)
        columns = _filter(width, taps) if width != height else rows
        return rows[:, None, None] @ (clips.reshape(len(clips), -1, width) @ columns.mT).view(clips.shape)


def _on_cpu(clips: Tensor) -> bool:
    """Whether the host may look at values, to leave out what changes nothing; compiled, all is one graph."""
    return clips.device.type == "cpu" and not torch.compiler.is_compiling()


def color_augment(clips: Tensor, params: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, grayscale and blur, in this order, the same on every frame of a clip.

    Values are those of torchvision's `adjust_*`, `rgb_to_grayscale` and `gaussian_blur`, except that contrast refers
    to the mean of the whole clip. The blur's kernel is a tenth of the height, made odd, at least 3. Works on the
    clips' device and in their precision, never makes the host wait for the device, and does nothing in place.

    Args:
        clips: floating point (N, 3, T, H, W) in [0, 1], at least 2 × 2 pixels, W more than a twentieth of H.
        params: (N, 6), one row of `data.draw_color` for each clip.
    """
    params = params.to(clips.device, clips.dtype, non_blocking=True)
    brightness, contrast, saturation, hue, gray, sigma = params[:, :, None, None, None].unbind(1)
    applied = [True] * 6  # on a GPU the host would have to wait for the answer
    if _on_cpu(clips):
        applied = (params != params.new_tensor(IDENTITY)).any(0).tolist()
    jittered, grayed, blurred = any(applied[:4]), applied[4], applied[5]
    if jittered:
        means = [color.clamp(max=1 / brightness).mean((1, 2, 3), keepdim=True) for color in clips.unbind(1)]
        middle, factor = _luma(*means) * brightness * (1 - contrast), brightness * contrast
        white = contrast + middle  # to what brightness makes of 1 or more

    def recolor(frames: Tensor) -> Tensor:
        """All that is done to a pixel alone, in one pass over three planes (N, T, H, W)."""
        colors = frames.unbind(1)
        if jittered:
            colors = [(color * factor + middle).minimum(white).clamp(0, 1) for color in colors]
            luma = _luma(*colors) * (1 - saturation)
            colors = [torch.addcmul(luma, color, saturation).clamp(0, 1) for color in colors]
            colors = _shift_hue(*colors, hue)
        if grayed:
            luma = _luma(*colors).clamp(0, 1)
            colors = [color.lerp(luma, gray) for color in colors]
        return torch.stack(colors, 1)

    if jittered or grayed:
        few = max(2**16 // clips[0, 0, 0].numel(), 1) if _on_cpu(clips) else clips.shape[2]  # that a core's cache holds
        parts = [recolor(frames) for frames in clips.split(few, 2)]
        clips = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return _blur(clips, sigma.flatten(1)).clamp(0, 1) if blurred else clips


def normalize(clips: Tensor) -> Tensor:
    """(..., 3, T, H, W) in [0, 1] → the same less the mean, by the deviation, of Kinetics-400."""
    mean, std = (torch.tensor(x, dtype=clips.dtype).to(clips.device, non_blocking=True) for x in (MEAN, STD))
    return (clips - mean[:, None, None, None]).div_(std[:, None, None, None])


DIFFERENCES = {"adjacent": (1,), "spans": (1, 4, 8)}  # what D compares, in numbers of frames


def frame_difference(clip: Tensor, spans: tuple[int, ...] = (1,)) -> Tensor:
    """D_t = (V_{t+1} − V_t + 1) / 2 (Sec. 3.1): (B, 3, T, H, W) in [0, 1] → the same, 0.5 where nothing moves.

    The scale is that of the authors' code. With three `spans`, numbers of frames, each plane of D is the difference of
    brightness over one of them. The last difference over a span is repeated as often, so that D has as many frames as
    V. Raises ValueError for fewer than two frames.
    """
    if clip.shape[2] < 2:
        raise ValueError(f"a frame difference needs at least 2 frames, the clip has {clip.shape[2]}")
    several = len(spans) > 1
    shown, planes = _luma(*clip.unbind(1))[:, None] if several else clip, []
    for span in spans:
        span = min(span, clip.shape[2] - 1)
        change = (shown[:, :, span:] - shown[:, :, :-span] + 1) / 2
        planes.append(torch.cat([change, *[change[:, :, -1:]] * span], 2))
    return torch.cat(planes, 1) if several else planes[0]


def _colored(clips: Tensor, color: Tensor | None, spans: tuple[int, ...], color_first: bool) -> Tensor:
    if color is not None and color_first:
        clips, color = color_augment(clips, color), None
    if spans:
        clips = frame_difference(clips, spans)
    return clips if color is None else color_augment(clips, color)


def _encoder_input(clips: Tensor, color: Tensor | None, spans: tuple[int, ...], order, color_first: bool) -> Tensor:
    clips = _colored(clips.contiguous() / 255, color, spans, color_first)
    return normalize(clips).contiguous(memory_format=order)


_on_gpu = None  # `_encoder_input` compiled, or as it is where that has failed


def encoder_input(
    clips: Tensor,
    color: Tensor | None = None,
    spans: tuple[int, ...] = (),
    memory_format: torch.memory_format = torch.channels_last_3d,
    color_first: bool = False,
) -> Tensor:
    """uint8 clips (N, 3, T, H, W) → V or, with spans, D; colours, if any, before or after D; normalised: float32.

    Colours on a GPU are compiled, as its memory would else be read and written some fifty times; where that fails, one
    line on stderr says so.
    """
    global _on_gpu
    if _on_cpu(clips):  # what needs the same together, as many clips as its caches hold
        made = torch.empty(clips.shape, memory_format=memory_format)
        few = torch.get_num_threads() * 2**18 // clips[0].numel() or 1
        changed = torch.zeros(len(clips), 6) if color is None else (color != color.new_tensor(IDENTITY)).float()
        kinds = changed @ changed.new_tensor((1, 1, 1, 1, 8, 16))  # any of the first four, gray, blur
        for kind in kinds.unique():
            for index in (kinds == kind).nonzero()[:, 0].split(few):
                layout = torch.contiguous_format if kind else memory_format
                some = torch.empty((len(index), *clips.shape[1:]), memory_format=layout)
                for clip, i in zip(some, index.tolist(), strict=True):
                    clip.copy_(clips[i])
                some = _colored(some.div_(255), color[index] if kind else None, spans, color_first)
                for clip, i in zip(some, index.tolist(), strict=True):
                    made[i] = clip
        rows = made.movedim(1, -1)
        if not rows.is_contiguous():
            return normalize(made)
        mean, std = (torch.tensor(values).repeat(made.shape[-1]) for values in (MEAN, STD))  # fast, as 3 are few
        rows.flatten(3).sub_(mean).div_(std)
        return made
    arguments = clips, color, spans, memory_format, color_first
    if color is None or torch.compiler.is_compiling():
        return _encoder_input(*arguments)
    _on_gpu = _on_gpu or torch.compile(_encoder_input, dynamic=False)
    with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):  # whatever they are, the same graphs
        try:
            return _on_gpu(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            print(f"note: colours take longer, as torch can't compile them here: {reason}", file=sys.stderr)
            _on_gpu = _encoder_input
            return _on_gpu(*arguments)


# FAME: "Eq.", "Sec." and "Table" below are those of Ding et al., CVPR 2022.


class ForegroundBackgroundMerging:
    """FAME's augmentation (Sec. 3.2): the moving foreground of a clip on the background of another video of the batch.

    Works on the clips' device, all at once, and never makes the host wait for it. Which video lends its background is
    drawn from torch's generator: never the video itself, for two views two different ones where the batch has three.

    Args:
        foreground: β, the portion of the picture that is foreground (Table 1: 0.3, 0.5, 0.7; 1 leaves clips alone).
        mask: how the foreground is found (Table 4). fame: colour statistics of the seed region, and blurs; seed: the
            seed region alone; grid: the cells of a 4 × 4 grid that move most; gauss: the middle of the picture.
        background: whose background it gets (Table 3). inter: another video's; intra: that of the video's other view;
            none: clips stay as they are.
        branches: merge the first view only ("single") or "both" (Table 1).

    Raises ValueError for an unknown mask, background or branches, or a portion outside (0, 1].
    """

    MASKS, BACKGROUNDS, BRANCHES = ("fame", "gauss", "seed", "grid"), ("inter", "intra", "none"), ("single", "both")
    FRONT, BACK = 0.5, 0.1  # the portions of S, from the top and from the bottom, that lend their colours (Sec. 3.2)
    LEVELS = 16  # of each of red, green and blue: what counts as one colour
    CELLS = 4  # rows and columns of the grid

    def __init__(
        self, foreground: float = 0.5, mask: str = "fame", background: str = "inter", branches: str = "single"
    ):
        for value, known in ((mask, self.MASKS), (background, self.BACKGROUNDS), (branches, self.BRANCHES)):
            if value not in known:
                raise ValueError(f"merging knows no {value!r}: choose from {', '.join(known)}")
        if not 0 < foreground <= 1:
            raise ValueError(f"the foreground is a portion in (0, 1], not {foreground}")
        self.foreground, self.mask, self.background, self.branches = foreground, mask, background, branches

    def __call__(self, clips: Tensor) -> Tensor:
        """Both views of B videos, (B, 2, 3, T, H, W) of uint8 or floating point in [0, 1] → the same, merged.

        Raises ValueError when the batch has no other video to take a background from.
        """
        if self.background == "none":
            return clips
        if self.background == "inter" and len(clips) < 2:
            raise ValueError("a background of another video needs a batch of two videos or more")
        views = 2 if self.branches == "both" else 1
        front, behind = clips[:, :views], clips.flip(1)[:, :views]
        if self.background == "inter":  # Y of Eq. 4: the last and the next video in a random circle of the batch's
            order = torch.randperm(len(clips), device=clips.device)
            partner = torch.stack([order.roll(1), order.roll(-1)], 1)[order.argsort(), :views]  # (B, views)
            behind = clips[partner, torch.arange(views, device=clips.device)]
        mask = self.foreground_of(front.flatten(0, 1)).unflatten(0, (-1, views))
        merged = torch.where(mask[..., None, None, :, :], front, behind)  # X ⊗ M̃ + Y ⊗ (1 − M̃), Eq. 4
        return torch.cat([merged, clips[:, views:]], 1)

    def foreground_of(self, clips: Tensor) -> Tensor:
        """M̃, (N, 3, T, H, W) → (N, H, W) bool, the same for all frames of a clip."""
        soft = seed = self.seed_region(clips)  # S, Eq. 2
        if self.mask == "grid":
            return self.top_cells(seed, self.foreground, self.CELLS)
        if self.mask == "fame":
            seed = self.blur(seed)
            soft = self.blur(self.color_likelihood(clips, seed))
        if self.mask == "gauss":  # half a side wide, in the middle of the picture (Sec. 4.3)
            rows, columns = (torch.linspace(-1, 1, n, device=seed.device, dtype=seed.dtype) for n in seed.shape[1:])
            soft = torch.exp(-0.5 * (rows[:, None] ** 2 + columns**2)).expand_as(seed)
        return self.top_portion(soft, self.foreground, seed)  # Eq. 3

    @staticmethod
    def seed_region(clips: Tensor) -> Tensor:
        """S of Eq. 2, the magnitude of frame differences: (N, 3, T, H, W) → (N, H, W), in the units of the clips."""
        earlier, later = clips[:, :, :-1], clips[:, :, 1:]
        change = torch.maximum(later, earlier) - torch.minimum(later, earlier)  # uint8 knows no negative numbers
        change = change.sum(1, dtype=torch.promote_types(clips.dtype, torch.int16))
        return change.sum(1) / max(clips.shape[2] - 1, 1)

    @staticmethod
    def blur(maps: Tensor) -> Tensor:
        """Gaussian blur of maps (N, H, W) by a tenth of each side made odd, with σ a third of that, edges reflected."""
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        with torch.autocast(maps.device.type, enabled=False):
            for size in maps.shape[1:]:  # columns, then rows
                radius = int(0.1 * size) // 2
                maps = maps.mT @ _filter(size, _taps(radius, maps.new_full((1, 1), (2 * radius + 1) / 3))).mT
        return maps

    @classmethod
    def color_likelihood(cls, clips: Tensor, seed: Tensor) -> Tensor:
        """The soft mask M_ij = P(F | x_ij) = P(x | F) / (P(x | F) + P(x | B)) (Sec. 3.2): (N, H, W) in [0, 1].

        x is the colour of the clip's mean over time. F is the top half of S, B its last tenth, ties included, and
        HW / 224² pixels more of every colour: one in 224 × 224, and as large a share of smaller maps.
        """
        white = clips.shape[2] * (255 if clips.dtype == torch.uint8 else 1)  # summed over the frames
        levels = clips.sum(2, dtype=torch.promote_types(clips.dtype, torch.int32)) * (cls.LEVELS / white)
        levels = levels.long().clamp(max=cls.LEVELS - 1)
        red, green, blue = levels.flatten(2).unbind(1)
        color = (red * cls.LEVELS + green) * cls.LEVELS + blue  # (N, HW)
        pixels = seed.flatten(1)
        count = pixels.shape[1]

        def share(region: Tensor, more: float) -> Tensor:
            """P(x | region) of every colour, with so many pixels more of each."""
            histogram = seed.new_full((len(seed), cls.LEVELS**3), more).scatter_add(1, color, region.to(seed.dtype))
            return histogram / histogram.sum(1, keepdim=True)

        front = share(pixels >= pixels.kthvalue(count - math.ceil(cls.FRONT * count) + 1, 1, keepdim=True).values, 0)
        back = share(pixels <= pixels.kthvalue(math.ceil(cls.BACK * count), 1, keepdim=True).values, count / 224**2)
        return (front / (front + back)).gather(1, color).view_as(seed)

    @staticmethod
    def top_portion(soft: Tensor, portion: float, tie: Tensor) -> Tensor:
        """M̃ of Eq. 3: the ⌈portion · HW⌉ pixels of each map (N, H, W) with the greatest value, as bool.

        Pixels whose values are within 1e-6 of each other come in the order of `tie`, (N, H, W), then from the top.
        """
        tie = tie.double() / tie.amax((1, 2), keepdim=True).clamp(min=1e-12)
        score = (soft.double() + 1e-6 * tie).flatten(1)
        count = score.shape[1]
        chosen = math.ceil(portion * count - 1e-9)  # the 1e-9 forgives products such as 0.28 · 25 = 7.000000000000001
        least = score.kthvalue(count - chosen + 1, 1, keepdim=True).values
        above, equal = score > least, score == least
        room = chosen - above.sum(1, keepdim=True)
        return (above | (equal & (equal.cumsum(1) <= room))).view_as(soft)

    @classmethod
    def top_cells(cls, seed: Tensor, portion: float, cells: int) -> Tensor:
        """Grid (Sec. 4.3): the ⌈portion · cells²⌉ cells with the greatest sum of S, (N, H, W) → (N, H, W) bool."""
        rows, columns = (torch.arange(size, device=seed.device) * cells // size for size in seed.shape[1:])
        by_row, by_column = (torch.eye(cells, device=seed.device, dtype=seed.dtype)[index] for index in (rows, columns))
        with torch.autocast(seed.device.type, enabled=False):
            sums = by_row.mT @ seed @ by_column  # (N, cells, cells)
        return cls.top_portion(sums, portion, sums)[:, rows[:, None], columns]
