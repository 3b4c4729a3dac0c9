"""`voxdino check`: every finding of a data set, with file, fact, consequence and fix."""

from voxdino.cli.options import (
    DatasetArgument,
    ExternalOption,
    GeometryOption,
    JsonOption,
    LossyOption,
    MapOption,
    NanOption,
    NanPolicy,
    SegmentOption,
    SeriesOption,
    TrustOption,
    WorkersOption,
)
from voxdino.cli.output import counting, end


def check(
    dataset: DatasetArgument,
    map_: MapOption = None,
    lossy_labels: LossyOption = None,
    nan_policy: NanOption = NanPolicy.refuse,
    geometry_tol: GeometryOption = None,
    trust_array_order: TrustOption = False,
    allow_external: ExternalOption = False,
    series: SeriesOption = None,
    segment: SegmentOption = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Read every file of a data set and say what is wrong with it; list the series of a DICOM scan. Writes nothing."""
    from voxdino.cli.findings import first_error, print_findings
    from voxdino.cli.scans import list_scan
    from voxdino.cli.values import read_options
    from voxdino.preparation.check import survey
    from voxdino.preparation.dataset import is_dataset, read_dataset

    if dataset.exists() and not is_dataset(dataset) and list_scan(dataset, as_json=json):
        return
    options = read_options(
        label_map=map_,
        lossy_labels=lossy_labels,
        nan_policy=nan_policy,
        geometry_tol=geometry_tol,
        trust_array_order=trust_array_order,
        allow_external=allow_external,
        series=series,
        segments=segment,
    )
    with counting("checking") as on_progress:
        report, _ = survey(read_dataset(dataset, options), num_workers=workers, on_progress=on_progress)
    if not json:
        print_findings(report)
    end(report.to_json(), first_error(report, dataset), as_json=json)
