"""Small encoded videos for the tests."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving_texture(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (frames, height, width, 3): a texture that moves and grows lighter with every frame, so that all differ."""
    texture = np.random.default_rng(0).integers(0, 60, (height // 4 + 2, width // 4 + 2, 3)).repeat(4, 0).repeat(4, 1)
    moved = [np.roll(texture, (k, 2 * k), (0, 1))[:height, :width] + 10 + k * 180 // frames for k in range(frames)]
    return np.stack(moved).astype(np.uint8)


def encode(
    path: Path,
    images: Iterable[np.ndarray],
    codec: str,
    times: Iterable[int] | None = None,
    index_first: bool = False,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """Write RGB images (H, W, 3) as a video at 25 frames a second, or at `times` in units of 1/25 s."""
    images = list(images)
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        for image, time in zip(images, times if times is not None else range(len(images)), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file of one second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path
