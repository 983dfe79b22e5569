"""Pictures of clips: strips of frames, paths from above, gaze on the picture, films.

Legend: F frames, S samples of a trajectory (four a frame).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments.egom2p_evaluation import called
from multitask_jax.data.egocentric import MODALITIES

TRUTH, MADE = "#222222", "#e15c00"
MADE_FILE = "made.npz"  # of `write_made`, in its folder
_SHOWN = (0, 5, 10, 15)  # frames of a strip


def depth_colours(depth: np.ndarray, farthest: float) -> np.ndarray:
    """Depth [..., H, W] in metres as uint8 [..., H, W, 3], near is bright, in log."""
    share = np.log1p(np.nan_to_num(depth)) / np.log1p(farthest)
    return (colormaps["magma_r"](np.clip(share, 0, 1))[..., :3] * 255).astype(np.uint8)


def strip(frames: np.ndarray) -> np.ndarray:
    """Some frames of [F, H, W, 3] beside each other, [H, 4 W, 3]."""
    shown = [frames[i] for i in _SHOWN if i < len(frames)]
    return np.concatenate(shown, axis=1)


def grid(
    truth: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray], rows: Any
) -> Figure:
    """For each clip of `rows`: what was made from what, the truth beside it.

    Args:
      truth: arrays by modality [N, ...], of the data.
      made: by target: "gaze", "camera", "depth" from RGB, "rgb" from depth [N, ...].
      rows: indices of the clips to draw.
    """
    rows = list(rows)
    figure = Figure(figsize=(15, 2.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(rows), 6, squeeze=False, width_ratios=[2.2, 2.2, 2.2, 2.2, 1.1, 1.1]
    )
    titles = (
        "RGB (given)",
        "depth from RGB (below: truth)",
        "RGB from depth",
        "depth (given)",
        "camera from RGB,\nfrom above",
        "gaze proxy\nfrom RGB",
    )
    for title, axes in zip(titles, panels[0], strict=True):
        axes.set_title(title, fontsize=9)
    for line, i in zip(panels, rows, strict=True):
        far = float(np.nanmax(truth["depth"][i]))
        true_depth = strip(depth_colours(truth["depth"][i], far))
        made_depth = strip(depth_colours(made["depth"][i], far))
        line[0].imshow(strip(truth["rgb"][i]))
        line[1].imshow(np.concatenate([made_depth, true_depth]))
        line[2].imshow(strip(made["rgb"][i]))
        line[3].imshow(true_depth)
        for axes in line[:4]:
            axes.axis("off")
        path_from_above(line[4], truth["camera"][i], made["camera"][i])
        gaze_on(line[5], truth["rgb"][i], truth["gaze"][i], made["gaze"][i])
    handles, labels = panels[0, 4].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, fontsize=8)
    return figure


def path_from_above(axes: Any, truth: np.ndarray | None, made: np.ndarray) -> None:
    """Paths of poses [S, 4, 4], x to the right and z upwards, in metres."""
    for poses, colour, label in ((truth, TRUTH, "truth"), (made, MADE, "made")):
        if poses is None:
            continue
        x, z = poses[:, 0, 3], poses[:, 2, 3]
        axes.plot(x, z, color=colour, lw=1.6, label=label)
        axes.plot(x[-1], z[-1], "o", color=colour, ms=4)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelsize=6)


def gaze_on(
    axes: Any, rgb: np.ndarray | None, truth: np.ndarray | None, made: np.ndarray
) -> None:
    """A heat map of the gaze made [S, 2] over the middle frame, and the true path."""
    h, w = (64, 64) if rgb is None else rgb.shape[1:3]
    if rgb is not None:
        axes.imshow(rgb[len(rgb) // 2], alpha=0.6)
    y, x = np.mgrid[:h, :w]
    made = made[np.isfinite(made).all(axis=-1)]
    centres = made * [w, h]
    heat = np.exp(
        -((x[..., None] - centres[:, 0]) ** 2 + (y[..., None] - centres[:, 1]) ** 2)
        / 18
    ).sum(axis=-1)
    axes.imshow(heat, cmap="hot", alpha=0.55)
    if truth is not None:
        axes.plot(*(truth * [w, h]).T, color="white", lw=2.4)
        axes.plot(*(truth * [w, h]).T, color=TRUTH, lw=1.2)
    axes.set_xlim(0, w)
    axes.set_ylim(h, 0)
    axes.axis("off")


def curves(histories: Mapping[str, list[dict[str, float]]], y: str) -> Figure:
    """A learning curve of each run, or modality: `y` over "step"."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, history in histories.items():
        rows = [r for r in history if y in r]
        axes.plot(
            [r["step"] for r in rows], [r[y] for r in rows], label=called(name), lw=1.4
        )
    axes.set_xlabel("step")
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    return figure


def film(frames: np.ndarray, path: Path, *, rate: float = 8.75, scale: int = 4) -> None:
    """Frames uint8 [F, H, W, 3] as a GIF that repeats, enlarged."""
    pictures = [
        Image.fromarray(f).resize(
            (f.shape[1] * scale, f.shape[0] * scale), Image.Resampling.NEAREST
        )
        for f in frames
    ]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / rate),
        loop=0,
    )


def write_made(
    folder: Path,
    made: Mapping[str, np.ndarray],
    given: Mapping[str, np.ndarray],
) -> list[Path]:
    """Arrays, films and pictures of what was made of one clip.

    Those that an earlier call left in the folder go.

    Args:
      folder: made if it is not there.
      made: arrays by modality without an axis of clips.
      given: the clip that it was made from; drawn beside.

    Returns:
      What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / MADE_FILE]
    partial = folder / f"{MADE_FILE}.partial"
    try:
        with partial.open("wb") as file:
            np.savez(file, **made)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if written[0].exists():  # else the pictures of these names are not ours
        for name in MODALITIES:
            for suffix in ("gif", "png"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    partial.replace(written[0])
    for name, x in made.items():
        picture = folder / f"{name}.png"
        if name in ("rgb", "depth"):
            frames = x if name == "rgb" else depth_colours(x, float(x.max()))
            film(frames, folder / f"{name}.gif")
            Image.fromarray(strip(frames)).resize((1024, 256)).save(picture)
            written.append(folder / f"{name}.gif")
        else:
            figure = Figure(figsize=(3.2, 3.2), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            if name == "camera":
                path_from_above(axes, given.get("camera"), x)
                axes.set_xlabel("x, m")
                axes.set_ylabel("z, m")
                axes.legend(fontsize=7)
            else:
                gaze_on(axes, given.get("rgb"), given.get("gaze"), x)
                axes.set_title(called(name), fontsize=9)
            figure.savefig(picture, dpi=120)
        written.append(picture)
    return written
