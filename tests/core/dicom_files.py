"""DICOM files made in memory: series, multi-frame images, segmentations and structure sets, each with a full patient.

Arrays are (columns, rows, slices) and affines lead from those indices to RAS+ millimetres, as everywhere in voxdino.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    SegmentationStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

AFFINE = np.array([[-0.8, 0, 0, 90], [0, -1.5, 0, 126], [0, 0, 5, -72.5], [0, 0, 0, 1.0]])  # LPS axes, as scanners do
SHAPE = (5, 6, 7)
LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"

IDENTIFIERS = {  # keyword -> what must never leave the file
    "PatientName": "Quixquill^Zaphirina",
    "PatientID": "PID-7744-QX",
    "PatientBirthDate": "19530517",
    "PatientBirthTime": "031415.9265",
    "PatientAddress": "17 Wumbleton Crescent",
    "PatientTelephoneNumbers": "+00-555-718281",
    "PatientMotherBirthName": "Orvandelle",
    "PatientBirthName": "Tressilwick",
    "PatientReligiousPreference": "Pastafarinx",
    "PatientComments": "allergic to xylophonium",
    "OtherPatientNames": "Zaffy^Quill",
    "OtherPatientIDs": "OTH-9931-ZZ",
    "EthnicGroup": "Zorblaxian",
    "Occupation": "lighthousekeep",
    "MilitaryRank": "Vicesubgeneral",
    "CountryOfResidence": "Freedonia",
    "RegionOfResidence": "Lower Slobbovia",
    "MedicalRecordLocator": "MRL-313-QV",
    "AccessionNumber": "ACC884422QX",
    "StudyID": "STD-5150-X",
    "StudyDescription": "zygomatic follow-upq",
    "SeriesDescription": "axialq quixotic",
    "ProtocolName": "protoq-ultra",
    "ImageComments": "seen with Mrs Vandersnoot",
    "StudyComments": "ask Dr Wobblethwaite",
    "InstitutionName": "Hospital of Nowherecester",
    "InstitutionAddress": "1 Imaginary Plaza",
    "InstitutionalDepartmentName": "Dept of Radioqology",
    "ReferringPhysicianName": "Wobblethwaite^Ignatz",
    "PerformingPhysicianName": "Crumplehorn^Bettina",
    "OperatorsName": "Snodgrassq^Olaf",
    "PhysiciansOfRecord": "Fitzwhimsy^Cornelia",
    "RequestingPhysician": "Gobbledeen^Hubert",
    "StationName": "STATIONQX7",
    "DeviceSerialNumber": "SER-60964-QX",
    "StudyDate": "20190827",
    "StudyTime": "142857.1428",
    "AdmissionID": "ADM-2718-QX",
}
UIDS = {
    "StudyInstanceUID": "1.2.826.0.1.3680043.10.271.31415926535",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.10.271.27182818284",
}
SERIES_UID = "1.2.826.0.1.3680043.10.271.57721566490"
OTHER_SERIES_UID = "1.2.826.0.1.3680043.10.271.16180339887"
SEEDS = (*IDENTIFIERS.values(), *UIDS.values(), SERIES_UID, "REQ-1618-QX")


def numbered(shape=SHAPE, dtype=np.int16):
    return (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype)


def number(value):
    """A decimal string of at most 16 characters, as near as it gets."""
    return DSfloat(float(value), auto_format=True)


def patient(modality="CT", sop_class=CTImageStorage, *, series_uid=SERIES_UID, sop_uid=None, syntax=None):
    """A data set with the whole patient in it, and the header of a file."""
    dataset = Dataset()
    for keyword, text in IDENTIFIERS.items():
        setattr(dataset, keyword, text)
    request = Dataset()
    request.ScheduledProcedureStepID = "REQ-1618-QX"
    dataset.RequestAttributesSequence = Sequence([request])
    for keyword, uid in UIDS.items():
        setattr(dataset, keyword, uid)
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = sop_uid or generate_uid()
    dataset.SeriesInstanceUID = series_uid
    dataset.SeriesNumber = 3
    dataset.Modality = modality
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    return dataset


def set_pixels(dataset, frames):
    """Pixel data and its description. frames: (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    colour = frames.shape[-1] == 3 and frames.ndim == 3 and frames.dtype == np.uint8
    spatial = frames.shape[:2] if colour else frames.shape[-2:]
    dataset.Rows, dataset.Columns = spatial
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * frames.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    data = np.ascontiguousarray(frames).astype(frames.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if frames.dtype.itemsize == 1 else "OW"


def plane(affine, index):
    """(position, orientation, pixel spacing) of a slice in the patient's LPS millimetres, as DICOM writes them."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    position = lps[:3, 3] + index * lps[:3, 2]
    cosines = lps[:3, :2] / spacing[:2]
    return (
        [number(v) for v in position],
        [number(v) for v in (*cosines[:, 0], *cosines[:, 1])],
        [number(spacing[1]), number(spacing[0])],
    )


def series(array=None, affine=AFFINE, *, slope=1, intercept=0, per_slice=None, **settings):
    """One data set per slice. per_slice(dataset, index): a change to each; settings: those of `patient`."""
    array = numbered() if array is None else array
    made = []
    for index in range(array.shape[2]):
        dataset = patient(**settings)
        position, orientation, spacing = plane(affine, index)
        dataset.InstanceNumber = index + 1
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = position, orientation
        dataset.PixelSpacing = spacing
        dataset.SliceThickness = number(np.linalg.norm(affine[:3, 2]))
        dataset.RescaleSlope, dataset.RescaleIntercept = number(slope), number(intercept)
        set_pixels(dataset, array[:, :, index].T)
        if per_slice is not None:
            per_slice(dataset, index)
        made.append(dataset)
    return made


def enhanced(array=None, affine=AFFINE, *, modality="CT", sop_class=EnhancedCTImageStorage, **settings):
    """A multi-frame image: position per frame, everything else shared."""
    array = numbered() if array is None else array
    dataset = patient(modality, sop_class, **settings)
    set_pixels(dataset, array.transpose(2, 1, 0))
    dataset.NumberOfFrames = array.shape[2]
    add_planes(dataset, affine, range(array.shape[2]))
    shared = dataset.SharedFunctionalGroupsSequence[0]
    scale = Dataset()
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = number(1), number(-1024), "HU"
    shared.PixelValueTransformationSequence = Sequence([scale])
    return dataset


def add_planes(dataset, affine, indices, segments=None):
    """The functional groups of frames that lie in the slices `indices`, of the segments with those numbers."""
    shared, frames = Dataset(), []
    _, orientation, spacing = plane(affine, 0)
    measures, direction = Dataset(), Dataset()
    measures.PixelSpacing = spacing
    measures.SliceThickness = measures.SpacingBetweenSlices = number(np.linalg.norm(affine[:3, 2]))
    direction.ImageOrientationPatient = orientation
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([direction])
    for place, index in enumerate(indices):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = plane(affine, index)[0]
        frame.PlanePositionSequence = Sequence([position])
        if segments is not None:
            of = Dataset()
            of.ReferencedSegmentNumber = int(segments[place])
            frame.SegmentIdentificationSequence = Sequence([of])
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)


def segmentation(masks, affine=AFFINE, *, kind="BINARY", referenced=SERIES_UID, sparse=True, most=255, **settings):
    """A DICOM SEG. masks: number -> (columns, rows, slices) truth, or shares for FRACTIONAL; LABELMAP: one label map.

    sparse: frames without a voxel are left out, as most writers do.
    """
    labelmap = kind == "LABELMAP"
    settings.setdefault("series_uid", OTHER_SERIES_UID)
    dataset = patient("SEG", LABELMAP_STORAGE if labelmap else SegmentationStorage, **settings)
    stacks = {0: masks} if labelmap else masks
    chosen = [
        (label, index) for label, mask in stacks.items() for index in range(mask.shape[2])
        if not sparse or mask[:, :, index].any()
    ]  # fmt: skip
    frames = np.stack([stacks[label][:, :, index].T for label, index in chosen])
    numbers = [int(n) for n in np.unique(masks)] if labelmap else list(masks)
    if kind == "FRACTIONAL":
        dataset.MaximumFractionalValue, dataset.SegmentationFractionalType = most, "PROBABILITY"
        frames = np.rint(frames * most)
    set_pixels(dataset, frames.astype(np.uint8))
    if kind == "BINARY":
        dataset.BitsAllocated = dataset.BitsStored = 1
        dataset.HighBit = 0
        packed = np.packbits(frames.astype(bool).reshape(-1), bitorder="little").tobytes()
        dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    dataset.NumberOfFrames = len(frames)
    dataset.SegmentationType = kind
    dataset.SegmentSequence = Sequence([_segment(n) for n in numbers])
    add_planes(dataset, affine, [index for _, index in chosen], None if labelmap else [label for label, _ in chosen])
    reference = Dataset()
    reference.SeriesInstanceUID = referenced
    dataset.ReferencedSeriesSequence = Sequence([reference])
    return dataset


def _segment(label):
    item = Dataset()
    item.SegmentNumber, item.SegmentLabel, item.SegmentAlgorithmType = label, f"part {label}", "MANUAL"
    return item


def structures(contours, *, referenced=SERIES_UID, geometry="CLOSED_PLANAR", **settings):
    """An RTSTRUCT. contours: name -> list of (points, 3) in RAS millimetres."""
    dataset = patient("RTSTRUCT", RTStructureSetStorage, **{"series_uid": OTHER_SERIES_UID, **settings})
    rois, drawn = [], []
    for label, (name, lines) in enumerate(contours.items(), start=1):
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = label, name
        roi.ReferencedFrameOfReferenceUID = UIDS["FrameOfReferenceUID"]
        item.ReferencedROINumber = label
        item.ContourSequence = Sequence([_contour(points, geometry) for points in lines])
        rois.append(roi)
        drawn.append(item)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Sequence(rois), Sequence(drawn)
    frame, study, of = Dataset(), Dataset(), Dataset()
    of.SeriesInstanceUID = referenced
    study.RTReferencedSeriesSequence = Sequence([of])
    frame.RTReferencedStudySequence = Sequence([study])
    dataset.ReferencedFrameOfReferenceSequence = Sequence([frame])
    return dataset


def _contour(points, geometry):
    item = Dataset()
    lps = np.asarray(points, dtype=float) * (-1, -1, 1)
    item.ContourGeometricType, item.NumberOfContourPoints = geometry, len(lps)
    item.ContourData = [number(value) for value in lps.ravel()]
    return item


def encode(dataset, *, preamble=True):
    """The bytes of a file; without preamble: neither that nor the file meta information, as old archives have it."""
    buffer = io.BytesIO()
    syntax = dataset.file_meta.TransferSyntaxUID
    if preamble:
        dcmwrite(buffer, dataset, enforce_file_format=True)
    else:
        bare = Dataset(dataset)
        dcmwrite(buffer, bare, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return buffer.getvalue()


def compress(dataset, syntax):
    """The data set, its pixels compressed losslessly (RLE, JPEG-LS, JPEG 2000), under its old SOP instance UID."""
    dataset.compress(syntax, generate_instance_uid=False)
    return dataset


def with_fragments(dataset, syntax, fragments):
    """The data set with these bytes in place of compressed frames, one fragment each."""
    dataset.PixelData = encapsulate(list(fragments))
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def write(folder, datasets, *, names="{:03d}.dcm") -> Path:
    """Write data sets as files of a folder, called by their position."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, dataset in enumerate(datasets):
        (folder / names.format(index)).write_bytes(encode(dataset))
    return folder


def write_zip(path, datasets, *, names="scan/{:03d}.dcm") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, dataset in enumerate(datasets):
            archive.writestr(names.format(index), encode(dataset))
    return Path(path)
