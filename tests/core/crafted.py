"""NIfTI files made byte by byte, so that each header field can lie."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np

FIELDS = {  # name -> (offset, struct format) in a NIfTI-1 header
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "b"),
    "descrip": (148, "80s"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "srow_x": (280, "4f"),
    "srow_y": (296, "4f"),
    "srow_z": (312, "4f"),
    "magic": (344, "4s"),
}
AFFINE = np.array([[-0.8, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 5, -72.5], [0, 0, 0, 1]])
SHAPE = (5, 6, 7)


def numbered(dtype=np.int16, shape=SHAPE):
    return (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype)


def nifti_bytes(array=None, affine=AFFINE, *, kind=nibabel.Nifti1Image, endian="<", **fields):
    """The bytes of a .nii file; keyword arguments overwrite header fields."""
    array = numbered() if array is None else array
    image = kind(array, affine, dtype=array.dtype)
    header = image.header if endian == "<" else image.header.as_byteswapped(endian)
    image = kind(array, affine, header, dtype=array.dtype)
    data = bytearray(image.to_bytes())
    for name, value in fields.items():
        offset, form = FIELDS[name]
        values = value if isinstance(value, (tuple, list)) else (value,)
        struct.pack_into(endian + form, data, offset, *values)
    return bytes(data)


def nifti_file(folder: Path, name="case.nii.gz", *args, **kwargs) -> Path:
    path = folder / name
    data = nifti_bytes(*args, **kwargs)
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return path
