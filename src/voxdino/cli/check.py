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
    workers: WorkersOption = None,
    json: JsonOption = False,
) -> None:
    """Read every file of a data set and say what is wrong with it. Writes nothing."""
    from voxdino.cli.findings import first_error, print_findings
    from voxdino.cli.values import read_options
    from voxdino.preparation.check import survey
    from voxdino.preparation.dataset import read_dataset

    options = read_options(
        label_map=map_,
        lossy_labels=lossy_labels,
        nan_policy=nan_policy,
        geometry_tol=geometry_tol,
        trust_array_order=trust_array_order,
        allow_external=allow_external,
    )
    with counting("checking") as on_progress:
        report, _ = survey(read_dataset(dataset, options), num_workers=workers, on_progress=on_progress)
    if not json:
        print_findings(report)
    end(report.to_json(), first_error(report, dataset), as_json=json)
