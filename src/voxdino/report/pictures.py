"""The lowest, the middle and the highest case as pictures, where images and predictions are at hand."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from voxdino.core.errors import DatasetError
from voxdino.core.io import image_suffix, is_image, read_label_map
from voxdino.core.io.options import ReadOptions
from voxdino.core.labels import LabelSet
from voxdino.evaluation.evaluate import prediction_options
from voxdino.evaluation.pictures import DARK, overlay_picture
from voxdino.evaluation.scores import Scores
from voxdino.preparation.case import Case
from voxdino.preparation.dataset import read_case
from voxdino.report.page import GalleryItem, GallerySection
from voxdino.report.score_sections import main_metric, metric_heading, values_by_case
from voxdino.report.texts import number


def gallery_section(
    scores: Scores, cases: Mapping[str, Case], predictions: Path, labels: LabelSet, options: ReadOptions
) -> GallerySection:
    """Image, reference and prediction of the cases with the lowest, the middle and the highest score.

    predictions: folder of the predicted label maps, named after their cases.
    Errors: DatasetError where no scored case has an image, a reference and a prediction; those of reading images.
    """
    metric = main_metric(scores)
    files = {path.name.removesuffix(image_suffix(path)): path for path in predictions.glob("*") if is_image(path)}
    known = {} if metric is None else values_by_case(scores, metric)
    order = sorted((case for case in known if case in cases and case in files), key=lambda case: known[case])
    if metric is None or not order:
        fact = "no scored case has its image in the data set and its prediction here: there is nothing to draw."
        raise DatasetError(fact, where=predictions, fix="give the data set that was scored, or leave out --dataset.")
    places = {"Lowest": 0, "Middle": len(order) // 2, "Highest": len(order) - 1}
    named = {place: name for name, place in reversed(places.items())}  # of few cases one place has several names
    items = []
    for place, words in sorted(named.items()):
        case = order[place]
        png = _draw(cases[case], files[case], labels, options)
        facts = [(metric_heading(metric), number(known[case], 3))]
        for row in scores.cases:
            if row.case == case and (value := row.values.get(metric)) is not None:
                facts.append((row.structure, number(value, 3)))
        items.append(GalleryItem(caption=f"{words}: {case}", png=png, facts=tuple(facts)))
    return GallerySection(title="Lowest, middle and highest case", items=tuple(items))


def _draw(case: Case, prediction: Path, labels: LabelSet, options: ReadOptions) -> bytes:
    volume, reference = read_case(case, options, labels)
    found = read_label_map(prediction, options=prediction_options(options, labels))
    assert reference is not None  # it was scored
    with TemporaryDirectory() as folder:
        file = Path(folder) / "case.png"
        overlay_picture(file, volume, reference, found, labels, num_slices=1, frame=DARK)
        return file.read_bytes()
