"""Losses, masks and geometry of FIMA as pure functions of tensors.

Can be copied alone into another project: it imports torch only. No function writes state, talks to other processes or
waits for the device, and the shape of every result follows from the shapes of the arguments.

Letters: B videos, C channels, D projected channels, T, H, W frames, rows and columns of a feature map, HW = H·W
feature pixels in row-major order, N, K numbers of rows or keys. "Eq." and "Sec." are those of FIMA (Zhu et al., ACM MM
2023). Feature vectors are L2-normalised by the caller, so that h(x, y) of Eq. 1 is exp(x·y / temperature). float64 in,
float64 out; half precision is computed in float32, under autocast too.

| paper | here |
|---|---|
| V, D; F, M; Z | clip, its frame difference; their feature maps; activation map |
| y, y_cls (Eq. 7, 9) | prediction |
| φ_p, A (Eq. 6, 8) | positives, foreground mask |
| h, τ, 𝒯, β | exp of `similarity`, temperature, threshold, ratio |
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """log h(x, y) of Eq. 1 for every pair of rows: (..., N, D), (..., K, D) → (..., N, K), float32 or float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ y.to(dtype).mT / temperature


def frame_difference(clip: Tensor) -> Tensor:
    """D_t = (V_{t+1} − V_t + 1) / 2 (Sec. 3.1); the last difference stands twice, so that D has as many frames as V.

    Args:
        clip: (B, 3, T, H, W) in [0, 1], T ≥ 2.

    Returns:
        Same shape, in [0, 1]; 0.5 where nothing moves.

    Raises:
        ValueError: fewer than two frames.
    """
    if clip.shape[2] < 2:
        raise ValueError(f"a frame difference needs at least 2 frames, the clip has {clip.shape[2]}")
    difference = (clip[:, :, 1:] - clip[:, :, :-1] + 1) / 2
    return torch.cat([difference, difference[:, :, -1:]], 2)


def bin_centers(box: Tensor, height: int, width: int) -> Tensor:
    """Where the feature pixels of a crop lie in the original frame (Sec. 3.1).

    Args:
        box: (B, 4), the crop's x0, y0, x1, y1 in any unit; x0 > x1 after a horizontal flip.
        height, width: H, W of the feature map.

    Returns:
        (B, HW, 2): x, y of each bin's centre in the units of the box, row-major.
    """
    x0, y0, x1, y1 = box.unbind(1)
    columns = (torch.arange(width, device=box.device, dtype=box.dtype) + 0.5) / width
    rows = (torch.arange(height, device=box.device, dtype=box.dtype) + 0.5) / height
    x = x0[:, None] + columns * (x1 - x0)[:, None]  # (B, W)
    y = y0[:, None] + rows * (y1 - y0)[:, None]  # (B, H)
    return torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3).flatten(1, 2)


def positive_pairs(source_box: Tensor, target_box: Tensor, grid: tuple[int, int], threshold: float = 0.7) -> Tensor:
    """φ_p by location (Sec. 3.1): pixels whose centres in the original frame lie closer than `threshold` bins.

    The distance is divided by the longer of the two views' bin diagonals, which makes the relation symmetric.

    Args:
        source_box, target_box: (B, 4) each, in the same units (see `bin_centers`).
        grid: (H, W) of the feature map.
        threshold: 𝒯, in bin diagonals (Table 3a: 0.35, 0.7, 1.4, 2.8).

    Returns:
        (B, HW, HW) bool: entry (b, s, t) says that target pixel t is a positive of source pixel s.
    """
    height, width = grid
    corners = (box.unbind(1) for box in (source_box, target_box))
    diagonals = [((x1 - x0) / width).hypot((y1 - y0) / height) for x0, y0, x1, y1 in corners]
    offset = bin_centers(source_box, *grid)[:, :, None] - bin_centers(target_box, *grid)[:, None]
    return offset.norm(dim=3) < threshold * torch.maximum(*diagonals)[:, None, None]


def activation_map(features: Tensor) -> Tensor:
    """Class-agnostic activation map, the mean over channels and time (Sec. 3.2): (B, C, T, H, W) → (B, H, W)."""
    return features.mean((1, 2), dtype=torch.promote_types(features.dtype, torch.float32))


def foreground_mask(activation: Tensor, ratio: float = 0.5) -> Tensor:
    """A of Eq. 6: the pixels strictly above the (1 − ratio) quantile of their map.

    The paper writes "β-th quantile" but means the portion β that is foreground (Table 3d, Fig. 8). A value lies above
    the (linearly interpolated) quantile exactly when it lies above the order statistic just below it.

    Args:
        activation: (B, H, W).
        ratio: β in [0, 1] (Table 3d: 0.3, 0.5, 0.7).

    Returns:
        (B, H, W) bool; ⌈ratio · (HW − 1)⌉ pixels a map where values differ, none where a map is constant.

    Raises:
        ValueError: ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the foreground ratio is a portion in [0, 1], not {ratio}")
    pixels = activation.flatten(1)
    last = pixels.shape[1] - 1
    rank = last - math.ceil(ratio * last - 1e-9)  # the 1e-9 forgives products such as 0.28 · 25 = 7.000000000000001
    return activation > pixels.sort(1).values[:, rank, None, None]


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """L_VV of Eq. 1, and L_VD of Eq. 2 with motion keys: −log h(q, k⁺) / (h(q, k⁺) + Σ h(q, k⁻)), mean over B.

    Args:
        query, positive: (B, D), the positive of row b is row b.
        negatives: (N, D), the queue.

    Returns:
        Scalar ≥ 0; log(N + 1) if all similarities are equal.
    """
    own = similarity(query[:, None], positive[:, None], temperature)[:, 0]  # (B, 1)
    logits = torch.cat([own, similarity(query, negatives, temperature)], 1)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def pixel_contrast(
    prediction: Tensor, target: Tensor, positives: Tensor, keys: Tensor, temperature: float = 0.1
) -> Tensor:
    """L_Pix of Eq. 3, 5 and 8: −log Σ_{φ_p} h(y, m) / Σ_keys h(y, m), in log-sum-exp form.

    Averaged over the source pixels that have a positive, video by video, then over the videos that have such a pixel.

    Args:
        prediction: (B, HW, D), y of each source pixel.
        target: (B, HW, D), the motion pixels m that may be positives.
        positives: (B, HW, HW) bool, φ_p ∩ foreground: source pixel × target pixel.
        keys: (N, D), or (B, N, D) for keys of each video's own: the whole denominator, that is every motion pixel of
            the batch, the target's own included, and the queue. Without the target's own, the loss means nothing.

    Returns:
        Scalar ≥ 0; exactly 0, with zero gradients, if nothing has a positive.
    """
    counts = positives.any(2)  # (B, HW): the source pixels that count
    numerator = similarity(prediction, target, temperature)
    # A row without positives would be log 0, whose gradient is NaN even when multiplied by 0: keep such rows whole.
    numerator = numerator.masked_fill(~positives & counts[:, :, None], -math.inf).logsumexp(2)
    denominator = similarity(prediction, keys, temperature).logsumexp(2)
    loss = (denominator - numerator).clamp(min=0) * counts  # clamped, as rounding can make it −1e-7
    video = loss.sum(1) / counts.sum(1).clamp(min=1)  # (B,)
    return video.sum() / counts.any(1).sum().clamp(min=1)


def frame_info_nce(prediction: Tensor, target: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """L_Fra of Eq. 10: each y_cls against its sub-clip's motion feature, the other sub-clips and the queue.

    Args:
        prediction, target: (N, D) for all N sub-clips of the mini-batch (both views); row n belongs to row n, the other
            rows are its negatives: the set L̃ of the same video and, of other videos, L̂.
        negatives: (K, D), the queue, more of L̂.

    Returns:
        Scalar ≥ 0; log(N + K) if all similarities are equal.
    """
    logits = torch.cat([similarity(prediction, keys, temperature) for keys in (target, negatives)], 1)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def frame_triplet(prediction: Tensor, target: Tensor, negatives: Tensor, margin: float = 1.0) -> Tensor:
    """Triplet form of L_Fra (Table 9): max(0, ‖y − l‖² − ‖y − l⁻‖² + margin), mean over all pairs (y, l⁻).

    Arguments as in `frame_info_nce`. The paper gives no margin; 1 is torch's default. Scalar in [0, 4 + margin].
    """
    cosine = torch.cat([similarity(prediction, keys, 1.0) for keys in (target, negatives)], 1)
    own = cosine.diagonal()[:, None]  # ‖y − l‖² = 2 − 2 y·l for unit vectors
    loss = (2 * (cosine - own) + margin).clamp(min=0)
    positive = torch.eye(*loss.shape, dtype=torch.bool, device=loss.device)
    return loss.masked_fill(positive, 0).sum() / max(loss.numel() - len(loss), 1)


def frame_mse(prediction: Tensor, target: Tensor, negatives: Tensor | None = None) -> Tensor:
    """MSE form of L_Fra (Table 9): ‖y − l‖² = 2 − 2 y·l, mean over the sub-clips, in [0, 4]; negatives play no part."""
    return 2 - 2 * similarity(prediction[:, None], target[:, None], 1.0).mean()


FRAME_LOSSES = {"infonce": frame_info_nce, "triplet": frame_triplet, "mse": frame_mse}
