"""What a file really is, by its first bytes, so that a message can say so."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, name
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"II+\0", "a TIFF picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (128, b"DICM", "a DICOM file"),
    (0, b"NRRD", "an NRRD image"),
    (0, b"ObjectType", "a MetaImage (.mha)"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
    (344, b"n+1\0", "an uncompressed NIfTI image"),
    (344, b"ni1\0", "the header of a NIfTI pair (.hdr/.img)"),
    (4, b"n+2\0", "an uncompressed NIfTI-2 image"),
    (4, b"ni2\0", "the header of a NIfTI-2 pair (.hdr/.img)"),
    (0, b"\x5c\x01\0\0", "an Analyze header"),
    (0, b"\0\0\x01\x5c", "an Analyze header"),
)


def name_type(head: bytes) -> str:
    """The kind of file whose first bytes (512 suffice) are `head`: "a PNG picture", "text", "of an unknown type"."""
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    text = head.lstrip()[:64].lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (a download that failed?)"
    if text and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in text):
        return "text"
    return "of an unknown type"
