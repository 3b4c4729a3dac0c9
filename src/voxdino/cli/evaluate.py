"""`voxdino evaluate`: predictions against references, at the references' own grids, with intervals."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from voxdino.cli.options import (
    GeometryOption,
    JsonOption,
    LesionsOption,
    LossyOption,
    MapOption,
    OnOption,
    SegmentOption,
    ShardOption,
    StrictOption,
    TrustOption,
    WorkersOption,
)
from voxdino.cli.output import cohort_on, counting, end, say


class Paper(StrEnum):
    meddinov3 = "meddinov3"
    segdino = "segdino"
    dinomed3d = "dinomed3d"
    nnunet = "nnunet"


class Empty(StrEnum):
    undefined = "undefined"
    score = "score"


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="Folder of predicted label maps or probabilities.")
    ],
    references: Annotated[
        Path, typer.Argument(metavar="REFERENCES", help="The data set, or a folder of label maps with the same names.")
    ],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="dataset.json, labels.json or plan.json that names the labels.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", help="Some of voxdino list metrics, with commas; default: all, lesion-wise ones apart."
        ),
    ] = None,
    lesions: LesionsOption = False,
    lesion_overlap: Annotated[
        float,
        typer.Option(
            "--lesion-overlap", min=0.0, max=1.0, help="Share of a lesion to be marked (--lesions); 0: one voxel."
        ),
    ] = 0.0,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="Of NSD, in mm.")] = 1.0,
    paper_compat: Annotated[
        list[Paper] | None,
        typer.Option("--paper-compat", help="Also the columns as this paper's authors compute them. Repeatable."),
    ] = None,
    empty: Annotated[
        Empty, typer.Option("--empty", help="Empty masks: undefined, or score (both empty: best; one empty: worst).")
    ] = Empty.undefined,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", metavar="CSV", help="case,group: intervals over patients. Default: the data set's."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: scores.json with the predictions.")] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option("--run", "-r", help="The run that predicted: warns of cases that its backbone was pretrained on."),
    ] = None,
    map_: MapOption = None,
    lossy_labels: LossyOption = None,
    geometry_tol: GeometryOption = None,
    trust_array_order: TrustOption = False,
    segment: SegmentOption = None,
    strict: StrictOption = False,
    workers: WorkersOption = None,
    on: OnOption = None,
    shard: ShardOption = None,
    json: JsonOption = False,
) -> None:
    """Score predictions: Dice, IoU, HD95, ASSD, NSD and volumes per case, with mean and 95 % interval.

    Of a classifier (probabilities.csv) AUROC, AUPRC, accuracy, F1, MCC, ECE and Brier, with 95 % intervals.
    """
    from voxdino.cli.classify import score_classes
    from voxdino.cli.references import find_pairs, read_groups
    from voxdino.cli.summaries import error_of, print_scores
    from voxdino.cli.values import read_options
    from voxdino.core.locks import lock_folder
    from voxdino.core.shards import Shard, file_of, files_of_shards
    from voxdino.evaluation.classified import is_classified
    from voxdino.evaluation.evaluate import evaluate as score
    from voxdino.evaluation.metrics import LESION_METRICS, USUAL_METRICS
    from voxdino.evaluation.papers import PAPERS

    if is_classified(predictions):
        given: dict[str, object] = {"--labels": labels, "--lesions": lesions, "--paper-compat": paper_compat}
        given |= {"--map": map_, "--run": run, "--on": on, "--shard": shard}
        score_classes(predictions, references, metrics, groups, out, json=json, without=given)
        return
    options = read_options(
        label_map=map_,
        lossy_labels=lossy_labels,
        geometry_tol=geometry_tol,
        trust_array_order=trust_array_order,
        segments=segment,
    )
    wanted = tuple(name.strip() for name in metrics.split(",")) if metrics else USUAL_METRICS
    wanted += LESION_METRICS if lesions or lesion_overlap else ()
    wanted += tuple(f"{paper}:{name}" for paper in paper_compat or () for name in PAPERS[paper])
    pairs, label_set, known_groups = find_pairs(predictions, references, labels, options)
    patients = known_groups if groups is None else read_groups(groups, pairs)
    part = None if shard is None else Shard.parse(shard)
    if part is not None:
        pairs = part.of(pairs, key=lambda pair: pair[0])
        if not pairs:
            say(f"shard {shard} has no case: there are fewer cases than shards")
            end({"cases": []}, None, as_json=json)
            return
    path = out or predictions / "scores.json"
    of_part, used = file_of(path, part), list[Path]()
    seen = _pretrained_on(predictions, run, [case for case, *_ in pairs]) if run else ()
    over_cases = None if on is None else cohort_on(on, "cpu").over_cases
    with (
        lock_folder(path.parent, file=path.name, part="" if part is None else str(part)),
        counting("scoring", tell=on is not None) as on_progress,
    ):
        scores = score(
            pairs,
            label_set,
            options,
            tolerance_mm=tolerance,
            metrics=tuple(dict.fromkeys(wanted)),
            min_overlap=lesion_overlap,
            empty=empty.value,
            groups=patients or None,
            num_workers=workers,
            strict=strict,
            kept=files_of_shards(path),
            on_used=used.append,
            keep=None if part is None else of_part,
            over_cases=over_cases,
            on_progress=on_progress,
        )
        scores = scores.model_copy(update={"warnings": (*scores.warnings, *seen)})
        if part is None:
            scores.write(path)
            for earlier in used:  # what is right of it is in the scores now
                earlier.unlink(missing_ok=True)
    if part is None:
        say(f"every case is in {path}")
    else:
        say(f"the cases of shard {shard} are in {of_part}; the same command without --shard brings all together")
    if not json:
        print_scores(scores)
    end(scores.to_json(), error_of(scores, predictions), as_json=json)


def _pretrained_on(predictions: Path, runs: list[Path], cases: list[str]) -> tuple[str, ...]:
    """The warning of cases that are not unseen, if there are any."""
    from voxdino.inference.seen import seen_in_pretraining

    found = [case for case in seen_in_pretraining(predictions, runs) if case in cases]
    if not found:
        return ()
    told = (
        f"{len(found)} of {len(cases)} cases (first: {found[0]}) were in the pool that the backbone was pretrained on"
    )
    return (f"{told}: their scores are not those of unseen cases.",)
