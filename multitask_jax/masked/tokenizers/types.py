"""What a tokenizer is: sizes that fix its shapes, weights, and statistics of its data.

Legend: F frames, S samples of a trajectory, K codes.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax

from multitask_jax.masked.tokenizers import quantizers

Array = jax.Array
Kind = Literal["rgb", "depth", "camera", "gaze"]
Quantizer = Literal["vq", "fsq"]
PATCH = 8  # pixels a token, along each side
CHANNELS = {"rgb": 3, "depth": 1, "camera": 9, "gaze": 2}  # of the network's signal

_VIDEO = {"quantizer": "vq", "codes": 512, "width": 128, "blocks": 1}
_TRAJECTORY = {"quantizer": "vq", "codes": 128, "width": 128, "blocks": 2}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "rgb": _VIDEO,
    "depth": _VIDEO,
    "camera": _TRAJECTORY,
    "gaze": _TRAJECTORY,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a tokenizer's shapes depend on; a setting left empty is its kind's.

    The paper's trajectories: Config("camera", width=768, blocks=12, heads=12,
    samples=60, stride=2, codes=256). The defaults here are for two CPU cores (our
    choice): few tokens and codes, which few clips can teach.

    Raises:
      ValueError: a setting that makes no sense, by name.
    """

    kind: Kind
    width: int = 0  # of the network
    blocks: int = 0  # of the encoder, and as many of the decoder
    heads: int = 4  # of attention: trajectories
    quantizer: Quantizer | Literal[""] = ""
    codes: int = 0  # K, of "vq"
    latent: int = 32  # numbers an encoding, of "vq"
    levels: tuple[int, ...] = (8, 8, 8)  # of "fsq": K is their product
    temporal: Literal[1, 4] = 4  # frames a token; 1: each frame by itself
    frames: int = 16  # F of a video
    size: int = 64  # pixels, the height and the width of a video
    samples: int = 64  # S of a trajectory
    stride: int = 8  # samples of it a token

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULTS:
            raise ValueError(
                f"kind: got {self.kind!r}, expected one of {', '.join(_DEFAULTS)}"
            )
        for name, value in _DEFAULTS[self.kind].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(
                    f"{field.name}: got {value!r}, expected a positive integer"
                )
        if self.quantizer not in get_args(Quantizer):
            raise ValueError(f"quantizer: got {self.quantizer!r}, expected vq or fsq")
        if self.temporal not in (1, 4):
            raise ValueError(f"temporal: got {self.temporal!r}, expected 4 or 1")
        quantizers.check_levels(self.levels)
        self._check_divisible()

    def _check_divisible(self) -> None:
        if self.is_video:
            needs = [("frames", self.temporal), ("size", PATCH), ("width", 2)]
        else:
            needs = [("samples", self.stride), ("width", 2), ("width", self.heads)]
        for name, by in needs:
            if getattr(self, name) % by:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a multiple of {by}"
                )

    @property
    def is_video(self) -> bool:
        """Whether it is of images rather than of a trajectory."""
        return self.kind in ("rgb", "depth")

    @property
    def encoding_width(self) -> int:
        """D, what the quantiser gets for each token."""
        return self.latent if self.quantizer == "vq" else len(self.levels)


class Statistics(NamedTuple):
    """The network's signal is (x - mean) / deviation, channel by channel."""

    mean: Any  # [C] float32
    deviation: Any  # [C] float32, above 0


class Tokenizer(NamedTuple):
    """A trained tokenizer: frozen from then on."""

    config: Config
    variables: Any  # {"encoder", "decoder": parameters, "codebook": Codebook if "vq"}
    statistics: Statistics


def grid(config: Config) -> tuple[int, ...]:
    """The shape of one clip's tokens: (4, 8, 8) of a video, (8,) of a trajectory."""
    if config.is_video:
        side = config.size // PATCH
        return config.frames // config.temporal, side, side
    return (config.samples // config.stride,)


def vocabulary(config: Config) -> int:
    """K: tokens are from 0 to K - 1."""
    return config.codes if config.quantizer == "vq" else math.prod(config.levels)
