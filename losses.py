"""Losses, masks and geometry of FIMA, and at the end those of DCLR and MCL, as pure functions of tensors.

Can be copied alone into another project: it imports torch only. No function writes state, draws, talks to other
processes or waits for the device.

Letters: B videos, C channels, D projected channels, T, H, W frames, rows and columns of a feature map, HW = H·W
feature pixels in row-major order, N, K numbers of rows or keys. Up to DCLR, "Eq.", "Sec." and "Table" are those of FIMA
(Zhu et al., ACM MM 2023). Feature vectors are L2-normalised by the caller, so that h(x, y) of Eq. 1 is
exp(x·y / temperature). float64 in, float64 out; half precision is computed in float32, under autocast too.
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


def bin_centers(box: Tensor, height: int, width: int) -> Tensor:
    """Where the feature pixels of a crop lie in the original frame (Sec. 3.1).

    Args:
        box: (B, 4), the crop's x0, y0, x1, y1, all in one unit; x0 > x1 after a horizontal flip.
        height, width: H, W of the feature map.

    Returns:
        (B, HW, 2): x, y of each bin's centre in the units of the box, row-major.
    """
    x, y = ((torch.arange(n, device=box.device, dtype=box.dtype) + 0.5) / n for n in (width, height))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).flatten(0, 1)  # (HW, 2), in sides of the crop
    return box[:, None, :2] + places * (box[:, 2:] - box[:, :2])[:, None]


def seen_box(box: Tensor, size: int, pixels: int, stride: int, offset: float) -> Tensor:
    """The part of the frame whose bins have their centres where the feature pixels of a crop look (Sec. 3.1).

    That is the crop itself where `stride * pixels` is `size` and `offset` is 0.

    Args:
        box: (..., 4), as in `bin_centers`.
        size, pixels: rows, and columns, of the clip and of its feature map.
        stride, offset: of the encoder, in pixels of the clip (`strides` and `offsets` in models.py).

    Returns:
        (..., 4), in the units of the box.
    """
    corner, sides = box[..., :2], box[..., 2:] - box[..., :2]
    return torch.cat([corner + offset / size * sides, corner + (offset + stride * pixels) / size * sides], -1)


def positive_pairs(source_box: Tensor, target_box: Tensor, grid: tuple[int, int], threshold: float = 0.7) -> Tensor:
    """φ_p by location (Sec. 3.1): pixels whose centres in the original frame lie closer than `threshold` bins.

    The distance is divided by the longer of the two views' bin diagonals, which makes the relation symmetric.

    Args:
        source_box, target_box: (B, 4) each, in one unit for both axes, such as the frame's pixels (see `bin_centers`).
        grid: (H, W) of the feature map.
        threshold: 𝒯, in bin diagonals (Table 3a: 0.35, 0.7, 1.4, 2.8).

    Returns:
        (B, HW, HW) bool: entry (b, s, t) says that target pixel t is a positive of source pixel s.
    """
    sides = (box[:, 2:] - box[:, :2] for box in (source_box, target_box))
    diagonals = [(x / grid[1]).hypot(y / grid[0]) for x, y in (side.unbind(1) for side in sides)]
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
    """
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
    """L_Pix of Eq. 3, 5 and 8: −log Σ_{φ_p} h(y, m) / Σ_keys h(y, m), in log-sum-exp form; mean over the source pixels
    that have a positive, video by video, then over the videos that have such a pixel.

    Args:
        prediction: (B, HW, D), y of each source pixel.
        target: (B, HW, D), the motion pixels m that may be positives.
        positives: (B, HW, HW) bool, φ_p ∩ foreground: source pixel × target pixel.
        keys: (N, D), or (B, N, D) for keys of each video's own: the whole denominator, that is every motion pixel of
            the batch's target views, the target's own included, and the queue.

    Returns:
        Scalar ≥ 0; exactly 0, with zero gradients, if nothing has a positive.
    """
    counts = positives.any(2)  # (B, HW): the source pixels that count
    numerator = similarity(prediction, target, temperature)
    # A row without positives would be log 0, whose gradient is NaN even when multiplied by 0: keep such rows whole.
    numerator = numerator.masked_fill(~positives & counts[:, :, None], -math.inf).logsumexp(2)
    denominator = similarity(prediction, keys, temperature).logsumexp(2)
    return _video_mean((denominator - numerator).clamp(min=0), counts)  # clamped, as rounding can make it −1e-7


def pixel_chance(positives: Tensor, keys: int) -> Tensor:
    """L_Pix of Eq. 8 if all similarities are equal, log N − log n⁺: positives (B, HW, HW), number of keys N."""
    number = positives.sum(2)
    return _video_mean(math.log(keys) - number.clamp(min=1).log(), number > 0)


def _video_mean(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean of those of the rows (B, HW) that count, video by video, then of the videos that have such a row; or 0."""
    video = (rows * counts).sum(1) / counts.sum(1).clamp(min=1)  # (B,)
    return video.sum() / counts.any(1).sum().clamp(min=1)


def frame_info_nce(prediction: Tensor, target: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """L_Fra of Eq. 10: each y_cls against its sub-clip's motion feature, the other sub-clips and the queue.

    Args:
        prediction, target: (N, D) for all N sub-clips of the mini-batch (both views); row n belongs to row n, the other
            rows are its negatives.
        negatives: (K, D), the queue.

    Returns:
        Scalar ≥ 0; log(N + K) if all similarities are equal.
    """
    logits = torch.cat([similarity(prediction, keys, temperature) for keys in (target, negatives)], 1)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def frame_triplet(prediction: Tensor, target: Tensor, negatives: Tensor, margin: float = 1.0) -> Tensor:
    """Triplet form of L_Fra (Table 9): max(0, ‖y − l‖² − ‖y − l⁻‖² + margin), mean over all pairs (y, l⁻): a scalar in
    [0, 4 + margin]. Neither the paper nor its code has a margin; 1 is torch's default."""
    cosine = torch.cat([similarity(prediction, keys, 1.0) for keys in (target, negatives)], 1)
    own = cosine.diagonal()[:, None]  # ‖y − l‖² = 2 − 2 y·l for unit vectors
    loss = (2 * (cosine - own) + margin).clamp(min=0)
    return loss.fill_diagonal_(0).sum() / max(loss.numel() - len(loss), 1)


def frame_mse(prediction: Tensor, target: Tensor, negatives: Tensor | None = None) -> Tensor:
    """MSE form of L_Fra (Table 9): ‖y − l‖² = 2 − 2 y·l, mean over the sub-clips, in [0, 4]; negatives play no part."""
    return 2 - 2 * similarity(prediction[:, None], target[:, None], 1.0).mean()


FRAME_LOSSES = {"infonce": frame_info_nce, "triplet": frame_triplet, "mse": frame_mse}


# --------------------------------------------------------------------------------------------------------------- DCLR
# "Eq.", "Sec." and "Table" below are those of Ding et al., ACM MM 2022. Letters: N videos, V = 2 views;
# v, s, d: RGB clip, static frame, frame difference; i, j: the two views.


def static_frame(clips: Tensor, frame: Tensor) -> Tensor:
    """The frame that s of Eq. 3 repeats T times: clips (N, 3, T, H, W), indices (N,) → (N, 3, 1, H, W)."""
    return clips[torch.arange(len(clips), device=clips.device), :, frame][:, :, None]


def batch_contrast(query: Tensor, positive: Tensor, keys: Tensor, temperature: float = 0.1) -> Tensor:
    """I of Eq. 2, row by row: −log exp(q·k⁺/τ) / (exp(q·k⁺/τ) + Σ exp(q·k/τ)) over the keys of other videos.

    Queries and positives of each video (..., N, D), and keys of the mini-batch (V·N, D), view by view → (..., N), each
    ≥ 0; log(1 + number of negatives) if all similarities are equal.
    """
    pull = similarity(query[..., None, :], positive[..., None, :], temperature)[..., 0]  # (..., N, 1)
    own = torch.eye(query.shape[-2], dtype=torch.bool, device=keys.device).repeat(1, len(keys) // query.shape[-2])
    push = similarity(query, keys, temperature).masked_fill(own, -math.inf)  # (..., N, V·N)
    return torch.cat([pull, push], -1).logsumexp(-1) - pull[..., 0]


def dual_contrast(query: Tensor, key: Tensor, same_view: bool = False, temperature: float = 0.1) -> Tensor:
    """I(x_i; y_j) + I(x_j; y_i), L_VV, L_VS and L_VD of Eq. 1, 6 and 7, or of one view, I(x_i; y_i) + I(x_j; y_j), L_SD
    of Eq. 8; mean over the videos. The negatives are the 2 (N − 1) features y of the other videos.

    x and y (V, N, D) → scalar ≥ 0; 2 log(2N − 1) if all similarities are equal.
    """
    positive = key if same_view else key.flip(0)
    return batch_contrast(query, positive, key.flatten(0, 1), temperature).sum() / key.shape[1]


def retrieve(query: Tensor, pool: Tensor, count: int, weights: str = "prior") -> tuple[Tensor, Tensor]:
    """The `count` entries of a pool (L, D) that are most similar to each query (N, D), best first, and their p_i of Eq.
    10, which sum to 1, (N, count) each: in proportion to the similarity, which counts as 1e-6 if it is less, for
    weights "prior", else equal (Table 6). Entries that are all zeros come last and have no weight; one must not be.
    Raises RuntimeError where the pool is smaller than `count`."""
    scores, index = similarity(query, pool, 1.0).masked_fill(~pool.any(1), -math.inf).topk(count)
    weight = scores.clamp(min=1e-6) if weights == "prior" else torch.ones_like(scores)
    weight = weight.masked_fill(scores == -math.inf, 0)
    return index, weight / weight.sum(1, keepdim=True)


def retrieved_contrast(
    v: Tensor, d: Tensor, found_v: Tensor, found_d: Tensor, weight: Tensor, keys: Tensor, temperature: float = 0.1
) -> Tensor:
    """L_VD of Eq. 10, Σ p_k [I(v; d̃_k) + I(ṽ_k; d)], mean over the videos; Eq. 9 if one is found for each.

    Args:
        v, d: (N, D), features of one view.
        found_v, found_d: ṽ and d̃, (N, K, D), retrieved for each video.
        weight: p, (N, K).
        keys: (V·N, D), the mini-batch's features of d, view by view, of which those of other videos are negatives.

    Returns:
        Scalar ≥ 0; 2 log(2N − 1) if all similarities are equal and the weights of a video sum to 1.
    """
    found_v, found_d = found_v.transpose(0, 1), found_d.transpose(0, 1)  # (K, N, D)
    query = torch.stack([v.expand_as(found_v), found_v])
    positive = torch.stack([found_d, d.expand_as(found_d)])
    rows = batch_contrast(query, positive, keys, temperature)  # (2, K, N)
    return (rows * weight.mT).sum() / len(v)


def pixel_activation(features: Tensor) -> Tensor:
    """A of Eq. 11, the sum of magnitudes over channels: (..., C, T, H, W) → (..., T, H, W), float32 or float64."""
    return features.abs().sum(-4, dtype=torch.promote_types(features.dtype, torch.float32))


def activation_alignment(activation: Tensor, reference: Tensor) -> Tensor:
    """L_ac of Eq. 12: the mean distance, in [0, 1], of A_v (N, T, H, W) from A_s + A_d, which gets no gradient. Each
    map is scaled to [0, 1] by its least and its greatest, a constant one to 0."""
    maps = torch.stack([activation, reference.detach()])
    low, high = (extreme((2, 3, 4), keepdim=True) for extreme in (maps.amin, maps.amax))
    scaled = (maps - low) / torch.where(high > low, high - low, 1)
    return (scaled[0] - scaled[1]).abs().mean()


def activation_pool(features: Tensor, activation: Tensor) -> Tensor:
    """f_d(v) of Eq. 13, and f_s(v): the mean of F(v), (..., C, T, H, W), over time and space with the weights A_d or
    A_s ≥ 0, (..., T, H, W), which get no gradient: (..., C), 0 where all weights are."""
    weight = activation.detach().unsqueeze(-4)
    total = weight.sum((-3, -2, -1)).clamp(min=torch.finfo(weight.dtype).tiny)
    return (features * weight).sum((-3, -2, -1)) / total


# ---------------------------------------------------------------------------------------------------------------- MCL
# "Eq.", "Sec." and "Table" below are those of Li et al., ICCV 2021. h: the output of the encoder's last convolution;
# g: the gradient of the similarity of query and positive key with respect to h.


def motion_map(flow: Tensor) -> Tensor:
    """m of Eq. 1, the magnitude of the derivatives of optical flow, which do not see a camera that moves evenly.

    How far each pixel moves to the right and down, in pixels (N, 2, H, W), with H, W ≥ 2 → (N, H, W) ≥ 0, in pixels per
    pixel; differences are central, and one-sided at the border.
    """
    return torch.stack(torch.gradient(flow, dim=(2, 3))).square().sum((0, 2)).sqrt()


def pool_motion(maps: Tensor, part: str) -> Tensor:
    """Maps (..., T, H, W): "st" themselves, "s" their mean over time (..., H, W), "t" over space (..., T) (Eq. 2)."""
    return {"st": maps, "s": maps.mean(-3), "t": maps.mean((-2, -1))}[part]


def moving_windows(movement: Tensor, window: int, stride: int) -> Tensor:
    """Temporal sampling (Sec. 3.2): the windows whose clips move at least as much as the median one of their video.

    m^T of the frames of a video (N,), the frames of a window, of which a clip takes every stride-th → (max(N − window,
    0) + 1,) bool, by first frame; at least half of them. A shorter video is continued by frames that do not move.
    """
    padded = F.pad(movement, (0, max(window - len(movement), 0)))
    clips = padded.unfold(0, window, 1)[:, ::stride].mean(1)
    return clips >= clips.quantile(0.5)


def crop_motion(motion: Tensor, box: Tensor, size: int) -> Tensor:
    """The motion map of a tubelet (Sec. 3.3): of size × size bins of a crop, the motion where each has its centre.

    Maps of whole frames (T, H, W), and a box (4,), x0, y0, x1, y1 in the frame's widths and heights, x0 > x1 after a
    horizontal flip → (T, size, size).
    """
    x, y = (bin_centers(box[None], size, size)[0] * box.new_tensor(motion.shape[:0:-1])).long().unbind(1)
    return motion[:, y, x].unflatten(1, (size, size))


def response_map(features: Tensor, gradient: Tensor | None = None, version: str = "v3") -> Tensor:
    """What is aligned with motion: Σ h_c (v1, Eq. 4), ReLU(Σ w_c h_c) (v2, Eq. 5) or ReLU(Σ w_c g_c) (v3, Eq. 6).

    w_c is the mean of g_c over time and space; gradients pass through it. h (B, C, T, H, W), and g of the same shape,
    which v1 does without → (B, T, H, W), float32 or float64; ≥ 0 for v2 and v3.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    if version == "v1":
        return features.sum(1, dtype=dtype)
    gradient = gradient.to(dtype)
    weighted = {"v2": features, "v3": gradient}[version]
    return F.relu((gradient.mean((2, 3, 4), keepdim=True) * weighted).sum(1))


def motion_alignment(response: Tensor, motion: Tensor, part: str = "st") -> Tensor:
    """A term of L_MAL, ‖⟨pooled response⟩ − ⟨pooled motion⟩‖² (Eq. 4 to 7), ⟨·⟩ the L2 norm; mean over the clips.

    Eq. 7 normalises the response before pooling; here it is done after, as for motion, so that the term is 0 for equal
    maps. Motion gets no gradient. Both (B, T, H, W), pooled to a `part` by `pool_motion` → scalar in [0, 4], in [0, 2]
    for maps ≥ 0; a map of zeros is at a distance of 1 from all others.
    """
    units = [F.normalize(pool_motion(maps, part).flatten(1), dim=1) for maps in (response, motion.detach())]
    return (units[0] - units[1]).square().sum(1).mean()
