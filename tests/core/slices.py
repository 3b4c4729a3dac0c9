"""DICOM series of single-frame images made in memory, in any orientation, with identifiers that must not leak."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from voxdino.core.geometry import Grid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACINGS = [(0.7, 1.3, 2.5), (1.0, 1.0, 1.0), (0.4882812, 0.3, 7.25)]
OBLIQUES = [(0, 0, 0), (0.3, 0, 0), (0, -0.2, 0.1), (0.05, 0.4, -0.35), (-0.6, 0.5, 0.25)]
ORIENTATIONS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
SECRETS = {
    "PatientName": "Doe^Jane", "PatientID": "MRN-4711-X", "PatientBirthDate": "19510203", "AccessionNumber": "ACC99871",
    "InstitutionName": "Seeded Hospital", "ReferringPhysicianName": "Who^Doctor", "StudyID": "STUDYID77",
    "StudyDescription": "Follow-up of Jane", "PatientComments": "lives next door", "OperatorsName": "Nurse^Joy",
    "StationName": "SCANNER17", "DeviceSerialNumber": "SN-123-777", "InstitutionAddress": "5 Nowhere Lane",
    "ProtocolName": "Protocol Of Jane", "OtherPatientIDs": "SSN-000-11", "StudyDate": "20010911", "PatientAge": "051Y",
}  # fmt: skip


def make_grid(shape, orientation, angles=(0, 0, 0), spacing=(0.7, 1.3, 2.5), origin=(-31.5, 12.25, 170.125)):
    """A grid whose array axis i runs along world axis order[i], with sign, turned by three angles."""
    order, signs = orientation
    linear = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        linear[world, axis] = sign * spacing[axis]
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[[a, b], [a, b]] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        linear = turn @ linear
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, origin
    return Grid(shape, affine)


def make_headers(grid: Grid, **fields) -> list[Dataset]:
    """One CT image for every index of the grid's first axis; its rows run down the second, columns along the third."""
    affine = LPS @ grid.affine
    columns, rows = (affine[:3, axis] / np.linalg.norm(affine[:3, axis]) for axis in (2, 1))
    study, series, frame = (generate_uid(prefix=None) for _ in range(3))
    headers = []
    for index in range(grid.shape[0]):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid(prefix=None)
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.Modality, image.InstanceNumber = "CT", index + 1
        image.Rows, image.Columns = grid.shape[1:]
        image.PixelSpacing = [f"{grid.spacing[1]:.10g}", f"{grid.spacing[2]:.10g}"]
        image.SliceThickness = f"{grid.spacing[0]:.10g}"
        image.ImageOrientationPatient = [f"{value:.12f}" for value in (*columns, *rows)]
        image.ImagePositionPatient = [f"{value:.10g}" for value in affine[:3, 3] + index * affine[:3, 0]]
        for name, value in {**SECRETS, "PatientSex": "F", "StudyTime": "101112", **fields}.items():
            setattr(image, name, value)
        headers.append(image)
    return headers


def write_series(folder: Path, headers: list[Dataset]) -> list[Path]:
    """The images as files, with pixels and a private element."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for image in headers:
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.PixelData = np.zeros((image.Rows, image.Columns), np.uint16).tobytes()
        image.private_block(0x0011, "SEEDED", create=True).add_new(1, "LO", "PRIVATE-SECRET-1")
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        files.append(folder / f"{image.InstanceNumber:03d}.dcm")
        image.save_as(files[-1], enforce_file_format=True)
    return files
