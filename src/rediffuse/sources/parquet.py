"""Images in parquet files, as Hugging Face writes and hosts them, read in constant memory.

A column holds encoded images (PNG, JPEG), as a struct of bytes and path or as bytes; or it holds names of
files.  Which column is what stands in the metadata that the package `datasets` leaves, or in its type.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from rediffuse.images.image_set import Split
from rediffuse.runtime.errors import UserError
from rediffuse.sources.arrays import number_labels
from rediffuse.sources.folder import FORMATS, SPLIT_NAMES, open_image
from rediffuse.sources.found import Found

IMAGES = "image", "img", "file_name"  # the last one holds names in Hugging Face's metadata of a folder
LABELS = "label", "labels", "class", "target"
ROWS = 16  # rows that are read at once
WAITING = 2**26  # bytes of rows that were read and not yet asked for, above which the oldest go
BUFFER = 2**20  # bytes; without it a row group is read at once, and that may be the whole file
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")


class Group(NamedTuple):
    """A row group of a file.  row: of the file, with which it starts; first: the same of all files."""

    file: Path
    number: int
    row: int
    first: int


class Layout(NamedTuple):
    """The columns of images and labels, which kind the labels are, and their names if these are written."""

    image: str
    label: str | None
    kind: str | None
    classes: tuple[str, ...] | None


class ParquetImages:
    """The images of a column.  Threads ask for them nearly in order: a row waits until it is wanted."""

    def __init__(self, groups: Sequence[Group], n: int, column: str) -> None:
        self.groups, self.n, self.column = groups, n, column
        self.firsts = [group.first for group in groups]
        self.lock = Lock()
        self.waiting, self.size = dict[int, bytes | str](), 0
        # What is read: a file, a group in it, the number of its next row, and the blocks from there on.
        self.file: Any = None
        self.group: Group | None = None
        self.next = 0
        self.stream: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self.n

    def name(self, index: int) -> str:
        group = self._group(index)
        return f"{group.file}, row {group.row + index - group.first}"

    def open(self, index: int) -> Image.Image:
        with self.lock:
            while index not in self.waiting:
                self._read_on(index)
            content = self._take(index)
        if not content:
            raise ValueError("the row holds no image")
        if isinstance(content, bytes):
            return Image.open(BytesIO(content), formats=FORMATS)
        path = PurePosixPath(content)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the row holds only the path of an image, {path}, that is not beside the file")
        return open_image(self._group(index).file.parent / path)

    def _group(self, index: int) -> Group:
        return self.groups[bisect_right(self.firsts, index) - 1]

    def _take(self, index: int) -> bytes | str:
        content = self.waiting.pop(index)
        self.size -= len(content)
        return content

    def _read_on(self, index: int) -> None:
        """Read the next rows; from the start of a row group, if this one does not lead to the index."""
        group = self._group(index)
        if group != self.group or index < self.next:
            if self.group is None or self.group.file != group.file:
                self.file = _open(group.file)
            self.stream = self.file.iter_batches(ROWS, [group.number], [self.column])
            self.group, self.next = group, group.first
        while self.size > WAITING:
            self._take(next(iter(self.waiting)))
        try:
            rows = next(self.stream).column(0).to_pylist()
        except (pa.ArrowException, StopIteration) as error:  # after an error, the stream has stopped
            raise OSError(f"the file is damaged in this row group: {error}") from None
        for row in rows:
            content = (row.get("bytes") or row.get("path") if isinstance(row, dict) else row) or b""
            if self.next not in self.waiting:
                self.waiting[self.next] = content
                self.size += len(content)
            self.next += 1


def is_parquet(path: Path) -> bool:
    """Return whether this is a parquet file by its name, or a folder with one."""
    return any(_files(path))


def find_parquet(path: Path) -> Found:
    """Return the images of a file, or of all files of a folder, in the order of their names.

    Files of a folder are splits by their names (train-00000-of-00002.parquet), or by those of their folders,
    as in SPLIT_NAMES.  Raises UserError for damaged files, and where columns or splits cannot be told.
    """
    files = sorted(_files(path))
    groups, counts, labels = list[Group](), list[int](), list[NDArray[Any]]()
    layouts, unused = list[Layout](), set[str]()
    for file in files:
        reader = _open(file)
        layouts.append(layout := _layout(file, reader.schema_arrow))
        if layout != layouts[0]:
            differ = [name for name in Layout._fields if getattr(layout, name) != getattr(layouts[0], name)]
            raise UserError(f"{file} and {files[0]} differ ({', '.join(differ)}): give the files of one set")
        row, first = 0, sum(counts)
        for number in range(reader.num_row_groups):
            groups.append(Group(file, number, row, first + row))
            row += reader.metadata.row_group(number).num_rows
        counts.append(row)
        labels.append(_read_labels(file, reader, layout))
        unused |= set(reader.schema_arrow.names) - {layout.image, layout.label}
    if not sum(counts):
        raise UserError(f"data.path ({path}) holds no images: its parquet files have no rows")
    image, label, _, classes = layouts[0]
    images, splits = ParquetImages(groups, sum(counts), image), _splits(path, files, counts)
    notes = [f"columns that are not used: {', '.join(sorted(unused))}"] if unused else []
    notes += _missing_shards(files)
    if label is None:
        return Found(images, None, (), splits, notes)
    values = np.concatenate(labels)
    numbers, names = (values.tolist(), classes) if classes else number_labels(values)
    return Found(images, numbers, names, splits, notes)


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the files of a folder that are not hidden, if their names end with .parquet."""
    if path.is_file() and path.suffix.lower() == ".parquet":
        yield path
    for root, folders, names in os.walk(path, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(".parquet") and not name.startswith("."):
                yield Path(root, name)


def _open(file: Path) -> Any:
    try:
        return pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        with file.open("rb") as content:
            if content.read(20).startswith(b"version https://git"):
                raise UserError(f"{file} is only a pointer of Git LFS: run `git lfs pull` there") from None
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no parquet file, or damaged ({reason}): get it again") from None


def _layout(file: Path, schema: Any) -> Layout:
    """Tell the columns by the features that `datasets` described, and otherwise by kind and name."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (about.get("info") or {}).get("features") or {}
    described = {name: each["_type"] for name, each in features.items() if "_type" in each}
    kinds = {name: _kind(each) for name, each in zip(schema.names, schema.types, strict=True)}
    images = [name for name in kinds if described.get(name) == "Image"]
    images = images or [name for name in kinds if kinds[name] == "bytes"]
    images = images or [name for name in kinds if kinds[name] == "text" and name in IMAGES]
    labels = [name for name in kinds if described.get(name) == "ClassLabel" or name in LABELS]
    if not images:
        columns = ", ".join(f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True))
        raise UserError(
            f"{file} must have a column of encoded images, as a struct with `bytes` or as binary, and has"
            f" {columns}: write it with `datasets` and its feature Image, or keep it out of data.path"
        )
    image = _choose(file, images, IMAGES)
    if not labels:
        return Layout(image, None, None, None)
    label = _choose(file, labels, LABELS[:1])
    if kinds[label] not in ("text", "integer"):
        raise UserError(
            f"{file}: the column {label} must be integers or text, one label for each image, and is"
            f" {schema.field(label).type}: convert it, or drop it to learn without labels"
        )
    names = features[label].get("names") if described.get(label) == "ClassLabel" else None
    return Layout(image, label, kinds[label], tuple(names) if names else None)


def _kind(of: Any) -> str | None:
    """Return bytes (also for a struct that has them) | text | integer | None, any other type."""
    if pa.types.is_struct(of):
        return (
            "bytes" if any(field.name == "bytes" and _kind(field.type) == "bytes" for field in of) else None
        )
    if pa.types.is_dictionary(of):
        return _kind(of.value_type)
    if pa.types.is_integer(of):
        return "integer"
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return "text"
    return "bytes" if pa.types.is_binary(of) or pa.types.is_large_binary(of) else None


def _choose(file: Path, columns: Sequence[str], preferred: Sequence[str]) -> str:
    chosen = columns if len(columns) == 1 else [name for name in columns if name in preferred]
    if len(chosen) == 1:
        return chosen[0]
    raise UserError(
        f"{file} has {len(columns)} columns that may be meant, {', '.join(columns)}: rename the one to"
        f" learn from to {preferred[0]}, or drop the others (pyarrow.Table.drop_columns)"
    )


def _read_labels(file: Path, reader: Any, layout: Layout) -> NDArray[Any]:
    """Return the labels as int64 or text.  Raises UserError if one is missing: null, or -1 in `datasets`."""
    if layout.label is None:
        return np.empty(0)
    values = reader.read([layout.label]).column(0).to_pylist()
    allowed = range(len(layout.classes)) if layout.classes else None
    missing = sum(value is None or (allowed is not None and value not in allowed) for value in values)
    if missing:
        raise UserError(
            f"{missing} of {len(values)} images in {file} have no label: keep the file out of data.path, or"
            f" drop the column {layout.label} of all files to learn without labels"
        )
    return np.array(values, np.str_ if layout.kind == "text" else np.int64)


def _splits(path: Path, files: Sequence[Path], counts: Sequence[int]) -> list[Split] | None:
    """Return the split of each image by the names of a folder's files; None if no name tells one."""
    told = {file: None if file == path else _split(file.relative_to(path)) for file in files}
    if not any(told.values()):
        return None
    if None in told.values() or "train" not in told.values():
        listed = "".join(f"\n  {file}: {split or 'unknown'}" for file, split in told.items())
        raise UserError(
            f"the files in data.path must be of the split train and others, or of none: begin their names"
            f" with {', '.join(SPLIT_NAMES)}; keep some out, or give a single file:{listed}"
        )
    return [split for split, n in zip(told.values(), counts, strict=True) if split for _ in range(n)]


def _split(name: Path) -> Split | None:
    """Return the split that the file's name tells, or else that of the nearest folder."""
    for part in reversed(name.parts):
        told = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", part.lower()) if word in SPLIT_NAMES}
        if told:
            return told.pop() if len(told) == 1 else None
    return None


def _missing_shards(files: Sequence[Path]) -> list[str]:
    """Return a warning for each set of numbered files of which some are not there."""
    there = defaultdict[tuple[str, int], set[str]](set)
    for file in files:
        if match := SHARD.match(file.name):
            there[match[1], int(match[3])].add(match[2])
    return [
        f"warning: of {n} numbered files {name}, only {len(numbers)} are in data.path"
        for (name, n), numbers in there.items()
        if len(numbers) < n
    ]
