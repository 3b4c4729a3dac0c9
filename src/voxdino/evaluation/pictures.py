"""Pictures of results: image, reference and prediction side by side, structures in colour."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray

from voxdino.core.errors import GeometryError
from voxdino.core.labels import LabelSet
from voxdino.core.safe_files import write_atomic
from voxdino.core.volume import LabelMap, Volume
from voxdino.evaluation.masks import union_mask
from voxdino.evaluation.measure import Measures, score_label_maps, structures
from voxdino.preparation.orientation import SliceAxis, slice_geometry, to_slices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0559b", "#f0e442", "#0072b2", "#d55e00", "#b19cd9", "#9acd32", "#ffffff")
PANEL, GAP, HEADING, LEGEND = 2.6, 0.06, 0.24, 0.4  # inches
SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units shown where the image is a CT (its air gives it away)

Frame = tuple[str, str]  # colours of the paper around the pictures and of the words on it
LIGHT: Frame = ("white", "#333333")
DARK: Frame = ("#101519", "#c9d3db")

CaseToDraw = tuple[str, Volume, LabelMap, LabelMap | None]  # title, image, reference, prediction if there is one


def overlay_picture(
    path: str | PathLike[str],
    volume: Volume,
    reference: LabelMap,
    prediction: LabelMap,
    labels: LabelSet,
    *,
    title: str = "",
    num_slices: int = 3,
    slice_axis: SliceAxis = "S",
    window: tuple[float, float] | None = None,
    frame: Frame = LIGHT,
) -> None:
    """A PNG of one case: a row per slice with image | reference | prediction. See `overlay_grid`."""
    case = (title, volume, reference, prediction)
    overlay_grid(path, [case], labels, slices_per_case=num_slices, slice_axis=slice_axis, window=window, frame=frame)


def overlay_grid(
    path: str | PathLike[str],
    cases: Sequence[CaseToDraw],
    labels: LabelSet,
    *,
    slices_per_case: int = 1,
    slice_axis: SliceAxis = "S",
    window: tuple[float, float] | None = None,
    frame: Frame = LIGHT,
) -> None:
    """A PNG of several cases: a row per slice with image | reference | prediction, with the Dice of each structure.

    Where no case has a prediction: image | reference, to see whether the labels lie where they should.

    Slices are those that show most of the reference, turned as a DICOM viewer shows them, in true proportions.
    slice_axis: world axis that slices are stacked along (volumes).  window: file values shown black and white; default:
    the soft tissue window for CT, else the middle 99 % of the values.  frame: colours of the paper and of its words.
    Errors: GeometryError where the three do not share a shape; ResourceError when it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for case in cases for row in _rows_of(case, labels, slices_per_case, slice_axis, window)]
    names = [name for name, _ in structures(labels)]
    heights = [PANEL * min(row.size[0] / row.size[1], 1.6) for row in rows]  # inches
    num_panels = 3 if any(case[3] is not None for case in cases) else 2
    width, height = num_panels * PANEL + (num_panels + 1) * GAP, sum(heights) + len(rows) * HEADING + LEGEND
    figure = Figure(figsize=(width, height), facecolor=frame[0])
    FigureCanvasAgg(figure)
    top = height
    for row, row_height in zip(rows, heights, strict=True):
        top -= HEADING + row_height
        panels = ((row.title, ()), ("reference", row.reference), ("prediction", row.prediction))
        for column, (heading, masks) in enumerate(panels[:num_panels]):
            left = GAP + column * (PANEL + GAP)
            axis = figure.add_axes((left / width, top / height, PANEL / width, row_height / height))
            _draw(axis, row, masks)
            axis.set_title(heading, fontsize=8, color=frame[1], pad=3)
        if row.dice:
            _write_dice(axis, row, names)
    shown = [i for i in range(len(names)) if any(row.reference[i].any() or row.prediction[i].any() for row in rows)]
    if shown:
        patches = [Patch(color=_colour(i), label=names[i]) for i in shown[:12]]
        figure.legend(
            handles=patches,
            loc="lower center",
            ncols=6,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            labelcolor=frame[1],
        )
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


class _Row:
    """One slice to draw: an image (H, W) or (H, W, 3) in 0..1 and the masks of every structure."""

    def __init__(
        self,
        title: str,
        image: Shaped[np.ndarray, "H W *colours"],
        reference: Sequence[Bool[np.ndarray, "H W"]],
        prediction: Sequence[Bool[np.ndarray, "H W"]],
        spacing: tuple[float, float],
        dice: Sequence[float | None],
    ) -> None:
        self.title, self.image, self.spacing, self.dice = title, image, spacing, dice
        self.reference, self.prediction = reference, prediction

    @property
    def size(self) -> tuple[float, float]:
        """(height, width) in mm or pixels."""
        return self.image.shape[0] * self.spacing[0], self.image.shape[1] * self.spacing[1]

    @property
    def defined_dice(self) -> list[tuple[int, float]]:
        return [(i, value) for i, value in enumerate(self.dice) if value is not None]


def _rows_of(
    case: CaseToDraw,
    labels: LabelSet,
    num_slices: int,
    slice_axis: SliceAxis,
    window: tuple[float, float] | None,
) -> list[_Row]:
    title, volume, reference, prediction = case
    label_maps = [reference] if prediction is None else [reference, prediction]
    if any(item.grid.shape != volume.grid.shape for item in label_maps):
        raise GeometryError("image, reference and prediction have different shapes.", where=title, fix="use one grid.")
    indices = [labels.to_indices(item.array) for item in label_maps]
    dice = Measures(metrics=("dice",))
    scores = [] if prediction is None else score_label_maps(indices[1], indices[0], volume.grid, labels, measures=dice)
    geometry = slice_geometry(volume.grid, slice_axis if volume.grid.ndim == 3 else None)
    image = _to_grey(to_slices(volume.array, geometry), window)  # (D, H, W[, 3])
    there, claimed = to_slices(indices[0], geometry), to_slices(indices[-1], geometry)
    spacing = (geometry.prepared_spacing[1], geometry.prepared_spacing[2])
    members = [indices_of for _, indices_of in structures(labels)]
    rows = []
    for z in _telling_slices(there, num_slices):
        place = f"slice {z + 1} of {len(there)}" if len(there) > 1 else ""
        rows.append(
            _Row(
                title=", ".join(part for part in (title, place) if part) or "image",
                image=image[z],
                reference=[union_mask(there[z], which) for which in members],
                prediction=[union_mask(claimed[z], which) for which in members],
                spacing=spacing,
                dice=[row.values["dice"] for row in scores],
            )
        )
    return rows


def _telling_slices(labels: Shaped[np.ndarray, "D H W"], num_slices: int) -> list[int]:
    """Slices in order, apart from each other, that show many structures and much of them."""
    present = [np.bincount(plane.ravel())[1:] for plane in labels.astype(np.int64)]
    merit = np.array([(counts > 0).sum() + counts.sum() / labels[0].size for counts in present])
    chosen: list[int] = []
    apart = max(1, int((merit >= 1).sum()) // (2 * num_slices))
    for z in np.argsort(-merit, kind="stable"):
        if len(chosen) < num_slices and all(abs(int(z) - other) >= apart for other in chosen):
            chosen.append(int(z))
    return sorted(chosen)


def _to_grey(image: NDArray[Any], window: tuple[float, float] | None) -> NDArray[np.float32]:
    """(C, D, H, W) file values as (D, H, W) or, with three channels of bytes, (D, H, W, 3), in 0..1."""
    if len(image) == 3 and image.dtype == np.uint8:
        return np.asarray(np.moveaxis(image, 0, -1) / 255, np.float32)
    grey = image[0].astype(np.float32)
    if window is None:
        is_ct = grey.min() < -500 and grey.max() < 5000
        low, high = SOFT_TISSUE if is_ct else np.quantile(grey, (0.005, 0.995))
        window = (float(low), float(high))
    return np.asarray(np.clip((grey - window[0]) / max(window[1] - window[0], 1e-6), 0, 1), np.float32)


def _draw(axis: "Axes", row: _Row, masks: Sequence[Bool[np.ndarray, "H W"]]) -> None:
    height, width = row.size
    edges = (0.0, width, height, 0.0)
    axis.set_facecolor("black")
    axis.imshow(row.image, cmap="gray", vmin=0, vmax=1, extent=edges, interpolation="bicubic", aspect="equal")
    x = (np.arange(-1, row.image.shape[1] + 1) + 0.5) * row.spacing[1]
    y = (np.arange(-1, row.image.shape[0] + 1) + 0.5) * row.spacing[0]
    for i, mask in enumerate(masks):
        if mask.any():
            inside = np.pad(mask, 1).astype(np.float32)
            axis.contourf(x, y, inside, levels=[0.5, 1.5], colors=[_colour(i)], alpha=0.4)
            axis.contour(x, y, inside, levels=[0.5], colors=[_colour(i)], linewidths=1.1)
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _write_dice(axis: "Axes", row: _Row, names: Sequence[str]) -> None:
    """Dice of the whole case, one line per structure, in its colour."""
    from matplotlib.patheffects import withStroke

    lines = [("Dice", "white"), *((f"{names[i]} {value:.2f}", _colour(i)) for i, value in row.defined_dice[:8])]
    for position, (text, colour) in enumerate(lines):
        axis.annotate(
            text,
            (0, 1),
            xytext=(4, -4 - 8.5 * position),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=6.5,
            fontweight="bold",
            va="top",
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
