"""What DICOM objects of ours say beside their voxels; free of pydicom, so that records can hold it."""

from voxdino.core.records import Record


class DicomOutput(Record):
    """What a DICOM object says beside its voxels.

    model, version: of what made the segments: a model's name and the first digits of its digest.
    keep_patient:   copy name, ID, birth date, sex, accession number, study ID, date and time, and referring physician
                    from the images. Without it these stay empty, and the UIDs alone say what the object belongs to.
    """

    model: str = "voxdino"
    version: str = "unknown"
    keep_patient: bool = False
