"""Unpack a zip or tar of images.  Nothing in it is trusted: neither names, nor links, nor sizes."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from rediffuse.runtime.errors import UserError
from rediffuse.sources.folder import JUNK

SUFFIXES = ".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"
BLOCK = 4096  # bytes: a file takes whole blocks of the disk
CHUNK = 2**20  # bytes that are read at once
FILL = 0.9  # of the free space: the rest is for what is made of the images
DAMAGED = (
    *(EOFError, NotImplementedError, OSError, ValueError),
    *(lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error),
)


class Member(NamedTuple):
    """What an archive holds besides folders: a file, or else a link or a device.  size: by its header."""

    name: str
    size: int
    is_file: bool
    open: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Return whether this is a zip or tar, by its content or its name.  A .npz is arrays, not an archive."""
    name = path.name.lower()
    if not path.is_file() or name.endswith(".npz"):
        return False
    return name.endswith(SUFFIXES) or _is_tar(path) or zipfile.is_zipfile(path)


def unpack(archive: Path, into: Path) -> list[str]:
    """Write the files of an archive below `into`; return what a user should know of it, a line each.

    Hidden files and other programs' junk are not written.  Raises UserError for names that lead elsewhere and
    for more than the disk can take, before anything is written; and for what is encrypted or damaged.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        if _is_tar(archive):  # asked first: a tar that ends with a zip looks like a zip
            with tarfile.open(archive) as tar:
                return _write(archive, _tar_members(tar), into)
        with zipfile.ZipFile(archive) as zipped:
            return _write(archive, _zip_members(zipped), into)
    except DAMAGED as error:
        raise _refuse(archive, f"cannot be unpacked ({error}): get it again if it is damaged") from None


def _refuse(archive: Path, why: str) -> UserError:
    return UserError(f"{archive} {why}; or unpack it yourself, and give the folder as data.path")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except DAMAGED:
        return False


def _zip_members(zipped: zipfile.ZipFile) -> Iterator[Member]:
    for info in zipped.infolist():
        if info.flag_bits & 1:
            raise zipfile.BadZipFile("it is encrypted")
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if it was not packed on Unix
        if not info.is_dir():
            yield Member(info.filename, info.file_size, kind in (0, stat.S_IFREG), partial(zipped.open, info))


def _tar_members(tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if info.size < 0:  # tarfile would come back to it without end (CVE-2025-8194)
            raise tarfile.ReadError(f"the size of {info.name} is negative")
        if not info.isdir():
            yield Member(info.name, info.size, info.isreg(), partial(tar.extractfile, info))
    # tarfile takes a damaged header, and the end of a file that is cut off, for the end of the archive.
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"its end is missing after {tar.offset} bytes")
    while file.read(CHUNK):  # the checksum of what is compressed comes at the very end
        pass


def _write(archive: Path, members: Iterable[Member], into: Path) -> list[str]:
    files, skipped = _plan(archive, members, shutil.disk_usage(into).free)
    made = {into}
    for parts, member in tqdm(files, desc="unpacking", unit="file", leave=False):
        paths = [into.joinpath(*parts[: end + 1]) for end in range(len(parts))]
        try:
            for folder in paths[:-1]:
                if folder not in made:
                    folder.mkdir()
                    made.add(folder)
            source: Any = member.open()
            with source, paths[-1].open("xb") as file:
                shutil.copyfileobj(source, file)  # zipfile and tarfile give no more than the header says
        except FileExistsError:
            why = f"holds {member.name!r} twice, or in upper and lower case, which is the same on this disk"
            raise _refuse(archive, f"{why}: rename one, pack it again") from None
    return [f"warning: {skipped} links or devices in {archive.name} are passed over"] if skipped else []


def _plan(archive: Path, members: Iterable[Member], free: int) -> tuple[list[tuple[list[str], Member]], int]:
    """Return the files to write, with the parts of their paths, and the number of links and devices."""
    files, skipped, size = [], 0, 0
    for member in members:
        name, parts = member.name, [part for part in member.name.split("/") if part not in ("", ".")]
        if ".." in parts or re.match(r"/|[A-Za-z]:", name) or "\\" in name or "\0" in name:
            why = "an absolute name, a drive, '..' or a backslash can lead out of the folder: pack it again"
            raise _refuse(archive, f"holds {name!r}; {why}")
        if not member.is_file:
            skipped += 1
        elif parts and not any(part.startswith(".") or part.lower() in JUNK for part in parts):
            size += -(-member.size // BLOCK) * BLOCK
            if size > free * FILL:
                why = (
                    f"takes {size / 1e9:.3f} GB or more, and the disk has room for {free * FILL / 1e9:.3f} GB"
                )
                raise _refuse(archive, f"{why}: free some space")
            files.append((parts, member))
    return files, skipped
