"""The store behind a URL, an object store or a server, through fsspec: an upload is committed by its manifest.

*Contract*: each upload has a prefix that no other upload ever has, so nothing is overwritten:

| key                                    | meaning                                                                 |
|----------------------------------------|-------------------------------------------------------------------------|
| `step-00000040.1f2e3d4c/…`             | an upload; without MANIFEST.json it is under way or cut off: never read |
| `step-00000040.1f2e3d4c/MANIFEST.json` | written last, in one piece: it commits the upload                       |
| `step-00000040.1f2e3d4c/DAMAGED`       | the damage that was found: never read, never removed by a run           |

The sizes of the other files are checked before the manifest is written. To remove an upload, its manifest goes first.

*Errors*: an exception of the store becomes a CheckpointError with the URL and the reason. A file that is missing, or
that has another size or hash than its manifest lists, is a DamagedError.

*Cost*: an upload holds one block of fsspec in memory. To load, every rank copies the files to a temporary directory of
its machine, which needs as much free space.
"""

import logging
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from disttrain.checkpoint.check import check_size, check_small, read_manifest
from disttrain.checkpoint.manifest import MANIFEST, SUMS, FileRecord, Manifest, manifest_bytes, sums_bytes
from disttrain.checkpoint.storage import checkpoint_name, note_name, note_number, step_of
from disttrain.checkpoint.tensor_writer import send_tensors
from disttrain.errors import CheckpointError, DamagedError, DisttrainError

logger = logging.getLogger(__name__)

_DAMAGED_MARK = "DAMAGED"
_UPLOAD = re.compile(r"(step-[0-9]{8,15})\.[0-9a-f]{8}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")

FileInfos = dict[str, dict[str, Any]]
"""The store's information on the files of an upload, such as "size", by the names of the files."""


def is_url(root: str) -> bool:
    """Return whether a text is a URL, such as s3://bucket/runs, and not a path."""
    return _URL.match(root) is not None


class RemoteStore:
    """A prefix of an object store or a folder of a server; each rank reads a copy of its own."""

    shared = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._reaching():
            self._fs, self._root = _open(self.url)

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def committed(self) -> list[str]:
        uploads = self._uploads()
        good = [name for name, files in uploads.items() if MANIFEST in files and _DAMAGED_MARK not in files]
        return sorted(good, key=lambda name: (_step(name), name), reverse=True)

    def set_aside(self) -> list[str]:
        return sorted(name for name, files in self._uploads().items() if _DAMAGED_MARK in files)

    def leftovers(self) -> list[str]:
        return sorted(name for name, files in self._uploads().items() if not {MANIFEST, _DAMAGED_MARK} & set(files))

    def clean(self) -> None:
        for name in self.leftovers():
            self.discard(name)

    def discard(self, name: str) -> None:
        """Remove one upload; a name such as "step-00000040" removes all uploads of that step."""
        try:
            uploads = self._uploads()
            of_step = [upload for upload in uploads if upload.startswith(f"{name}.")]
            for upload in [name] if name in uploads else of_step:
                self._remove(upload, uploads[upload])
        except CheckpointError as error:
            logger.warning("cannot remove the old checkpoint %s: %s; remove it by hand", self.path(name), error)

    def _remove(self, name: str, files: FileInfos) -> None:
        with self._reaching():
            # Without its manifest it is not a checkpoint any more, even if a later removal fails.
            for file in sorted(files, key=lambda file: file != MANIFEST):
                self._fs.rm_file(f"{self._root}/{name}/{file}")
            self._fs.invalidate_cache()
            if self._fs.isdir(f"{self._root}/{name}"):  # an object store has no directories
                self._fs.rmdir(f"{self._root}/{name}")

    def put_aside(self, name: str, reason: str) -> None:
        try:
            self._put(name, _DAMAGED_MARK, reason.encode(errors="replace"))
        except CheckpointError as error:
            logger.warning("cannot mark %s as damaged: %s", self.path(name), error)

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="disttrain-checkpoint-") as folder:
            directory = Path(folder) / _base_name(name)
            files = self._files(name)
            manifest = self._fetch_manifest(name, files, directory)
            for file in manifest.files:
                self._fetch(name, file, directory)
            yield directory

    def manifest(self, name: str) -> Manifest:
        with tempfile.TemporaryDirectory(prefix="disttrain-checkpoint-") as folder:
            return self._fetch_manifest(name, self._files(name), Path(folder) / _base_name(name))

    def written(self, name: str) -> datetime | None:
        files = self._files(name)
        info = files.get(MANIFEST) or next(iter(files.values()), {})
        return _time(next((info[key] for key in _TIMES if key in info), None))

    def begin(self, step: int) -> str:
        """Make the folder of an upload, if the store has folders; return its name."""
        name = f"{checkpoint_name(step)}.{secrets.token_hex(4)}"
        with self._reaching():
            self._make_folders(f"{self._root}/{name}")
        return name

    def write_part(self, upload: str, file: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        """Upload one file of tensors."""
        with self._reaching(), self._fs.open(f"{self._root}/{upload}/{file}", "wb") as out:
            size_bytes, sha256 = send_tensors(out, tensors)
        return FileRecord(size_bytes=size_bytes, sha256=sha256)

    def commit(self, upload: str, manifest: Manifest) -> str:
        """Check that the files have arrived, then write the manifest beside them; return the name of the upload."""
        data = manifest_bytes(manifest)
        sums = sums_bytes(manifest.files, data)
        self._put(upload, SUMS, sums)
        arrived = self._files(upload)
        sizes = {file: record.size_bytes for file, record in manifest.files.items()} | {SUMS: len(sums)}
        for file, size in sizes.items():
            if file not in arrived or int(arrived[file]["size"]) != size:
                raise CheckpointError(f"{self.path(upload)}/{file} did not arrive: expected {size} bytes")
        with self._reaching():
            for file in arrived:
                if note_number(file) is not None:
                    self._fs.rm_file(f"{self._root}/{upload}/{file}")
        self._put(upload, MANIFEST, data)
        for other in self.committed():
            if _step(other) == manifest.step and other != upload:
                self.discard(other)
        return upload

    def abandon(self, upload: str) -> None:
        """Remove the files of a failed upload."""
        self.discard(upload)

    def leave_note(self, upload: str, number: int, text: str) -> None:
        """Leave a note for the rank that commits."""
        self._put(upload, note_name(number), text.encode())

    def notes(self, upload: str) -> dict[int, str]:
        """Return the notes of an upload, by number."""
        numbers = {file: number for file in self._files(upload) if (number := note_number(file)) is not None}
        with self._reaching():
            return {
                number: self._fs.cat_file(f"{self._root}/{upload}/{file}").decode() for file, number in numbers.items()
            }

    def _make_folders(self, path: str) -> None:
        """Make the missing folders of a path, but never its first part: a misspelt name must not make a bucket."""
        parts = path.split("/")
        start = 3 if path.startswith("/") else 2
        for end in range(start, len(parts) + 1):
            folder = "/".join(parts[:end])
            if not self._fs.isdir(folder):
                self._fs.mkdir(folder, create_parents=False)

    def _put(self, name: str, file: str, data: bytes) -> None:
        with self._reaching():
            self._fs.pipe_file(f"{self._root}/{name}/{file}", data)

    def _fetch_manifest(self, name: str, files: FileInfos, directory: Path) -> Manifest:
        """Copy manifest and hashes into `directory`; check that the other files have the sizes that they list."""
        directory.mkdir()
        for file in (MANIFEST, SUMS):
            if file in files:
                check_small(file, int(files[file]["size"]))
                self._fetch(name, file, directory)
        manifest = read_manifest(directory)
        for file, record in manifest.files.items():
            if file not in files:
                raise DamagedError(f"{file} is missing")
            check_size(file, int(files[file]["size"]), record.size_bytes)
        return manifest

    def _fetch(self, name: str, file: str, directory: Path) -> None:
        try:
            with self._reaching():
                self._fs.get_file(f"{self._root}/{name}/{file}", str(directory / file))
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedError(f"{file} is missing") from error
            raise

    def _files(self, name: str) -> FileInfos:
        return self._uploads(f"{self._root}/{name}").get(name, {})

    def _uploads(self, below: str | None = None) -> dict[str, FileInfos]:
        """Return the files of each upload, as the store lists them now."""
        uploads: dict[str, FileInfos] = {}
        with self._reaching():
            self._fs.invalidate_cache()
            try:
                listing = self._fs.find(below or self._root, detail=True)
            except FileNotFoundError:
                listing = {}
        for path, info in listing.items():
            *_, name, file = ["", "", *str(path).split("/")]
            is_direct = f"{self._root}/{name}/{file}".lstrip("/") == str(path).lstrip("/")
            if is_direct and _UPLOAD.fullmatch(name) and _step(name) is not None:
                uploads.setdefault(name, {})[file] = info
        return uploads

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn an exception of the store into a CheckpointError that names the URL."""
        try:
            yield
        except DisttrainError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"cannot reach the checkpoints in {self.url}: {reason} ({type(error).__name__}); "
                "check the address, the permissions and the network"
            ) from error


def _open(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(
            f"checkpoints in {url} need the package fsspec, which is not installed: pip install 'disttrain[remote]'"
        ) from error
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        # The message of fsspec names the package: "Install s3fs to access S3".
        raise CheckpointError(f"checkpoints in {url} need a package that is not installed: {error}") from error
    return fs, str(root).rstrip("/")


def _base_name(name: str) -> str:
    """Return "step-00000040" for an upload's name."""
    return name.partition(".")[0]


def _step(name: str) -> int | None:
    return step_of(_base_name(name))


def _time(value: Any) -> datetime | None:
    """Return the time that a store gave as a number, a text or a datetime; None if it is none of them."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(value, datetime):
        return None
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
