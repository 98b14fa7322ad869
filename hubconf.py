"""An encoder by torch.hub: `torch.hub.load(FOLDER, "fima", source="local", checkpoint="runs/fima/checkpoint.pt")`."""

from torch import nn

from features import EncoderConfig, load_encoder

dependencies = ["torch", "torchvision", "numpy", "av", "tqdm"]


def fima(checkpoint: str = "", **options: str | float) -> nn.Module:
    """The encoder of a checkpoint, of any method here or of another project, in eval mode; without one, the untrained
    one of `options`, as of `features.EncoderConfig`. Normalised clips (N, 3, frames, H, W) → maps (N, C, T, h, w).

    uint8 clips go through `augment.encoder_input`, or `features.pooled_features` with the encoder."""
    return load_encoder(EncoderConfig(checkpoint, **options))[0]
