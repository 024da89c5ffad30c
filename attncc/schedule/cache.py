"""The disk cache: small JSON files, read and written by many processes at once, and validated on every read.

A file holds `{"format", "key", "checksum", "value"}`. It is written under a temporary name and moved into place
atomically, so a reader sees the old entry, the new one, or none. Anything else is a miss with one warning. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from attncc.errors import InputError, warn
from attncc.version import __version__

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = "attncc-cache-1"
KINDS = ("schedule", "facts", "source", "kernel", "spills")
LOCK_SECONDS = 10.0
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One cached value as `Cache.list` shows it: its size in bytes and when it was written, in seconds since 1970."""

    key: str
    value: dict[str, Any]
    size: int
    written: float

    @property
    def kind(self) -> str:
        """The kind of the entry: one of KINDS."""
        return str(self.value["kind"])


def cache_key(**parts: str | int | float | bool | None) -> str:
    """The digest of `parts` and of the versions of attncc, triton and torch: 64 hexadecimal digits."""
    return _checksum({"parts": parts, "versions": _versions()})


def bucket(length: int) -> int:
    """`length` rounded up to a power of two: lengths of one bucket share cache entries."""
    return 1 << (length - 1).bit_length()


class Cache:
    """A folder of entries. Where the folder cannot be written, `put` warns once and the values stay in memory."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """The cache in `directory`, else $ATTNCC_CACHE_DIR, else the user's cache folder. Nothing is created yet."""
        chosen = directory or os.environ.get("ATTNCC_CACHE_DIR") or platformdirs.user_cache_dir("attncc")
        self.directory = Path(chosen)
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._locks: dict[str, BaseFileLock] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        """The value stored under `key`, or None. A corrupt or foreign file is a miss, with one warning a file."""
        if key in self._unwritten:
            return self._copy(self._unwritten[key])
        return self._read(self._path(key))

    @property
    def unwritten(self) -> int:
        """The number of entries that could not be written, and will be lost with this process."""
        return len(self._unwritten)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Store `value`, a JSON object whose "kind" is one of KINDS. The last of several writers wins, none is torn."""
        self._store(key, lambda: value)

    def update(self, key: str, change: Callable[[dict[str, Any] | None], Mapping[str, Any]]) -> None:
        """Store what `change` makes of the value under `key`, or of None where there is none. No writer comes between
        that value and the new one."""
        self._store(key, lambda: change(self.get(key)))

    def _store(self, key: str, make: Callable[[], Mapping[str, Any]]) -> None:
        from filelock import Timeout

        path = self._path(key)
        try:
            with self._locked():
                _write(path, _encode(key, make()))
        except (OSError, Timeout) as error:
            value = make()
            _encode(key, value)  # what cannot be stored is refused all the same
            self._unwritten[key] = self._copy(value)
            _warn_once(
                str(self.directory),
                f"the cache folder {self.directory} cannot be written ({error}): entries last as long as this process. "
                "Set ATTNCC_CACHE_DIR to a folder that can be written",
            )
        else:
            self._unwritten.pop(key, None)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """While no other process holds the lock of this name in this folder; waits as long as it takes. Who holds it
        may take it again. Where the folder cannot be written, nobody is waited for."""
        from filelock import FileLock

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            held = self._locks.setdefault(name, FileLock(self.directory / f".{name}.lock"))
            held.acquire()
        except OSError:
            yield
            return
        try:
            yield
        finally:
            held.release()

    def list(self) -> tuple[Entry, ...]:
        """Every readable entry on disk, the newest first."""
        entries = []
        for path in self._files():
            value = self._read(path)
            if value is not None:
                status = path.stat()
                entries.append(Entry(path.stem, value, status.st_size, status.st_mtime))
        return tuple(sorted(entries, key=lambda entry: (-entry.written, entry.key)))

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write every entry into one JSON file that `import_` reads on another machine; returns how many."""
        entries = {entry.key: entry.value for entry in self.list()}
        _write(Path(path), json.dumps({"format": FORMAT, "entries": entries}, indent=1, sort_keys=True) + "\n")
        return len(entries)

    def import_(self, path: str | os.PathLike[str]) -> int:
        """Add the entries of a file that `export` wrote; returns how many. InputError, with none added, for another."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise InputError(f"{path} cannot be imported: {reason}") from error
        entries = data.get("entries") if isinstance(data, dict) and data.get("format") == FORMAT else None
        if not isinstance(entries, dict) or not all(_KEY.fullmatch(k) and _is_value(v) for k, v in entries.items()):
            raise InputError(f"{path} is not a file written by `attncc cache export`, or is of another version")
        for key, value in entries.items():
            self.put(key, value)
        return len(entries)

    def clear(self) -> int:
        """Remove every entry, readable or not, and left-over temporary files; returns how many entries went. InputError
        where the folder cannot be written."""
        from filelock import Timeout

        held = len(self._unwritten)
        self._unwritten.clear()
        if not self.directory.is_dir():
            return held
        try:
            with self._locked():
                files = list(self._files())
                for path in [*files, *self.directory.glob(".*.tmp")]:
                    path.unlink(missing_ok=True)
        except (OSError, Timeout) as error:
            raise InputError(f"the cache folder {self.directory} cannot be cleared: {error}") from error
        return held + len(files)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is 64 hexadecimal digits, not {key!r}")
        return self.directory / f"{key}.json"

    def _files(self) -> Iterator[Path]:
        """The files that are named like entries; what else lies in the folder is not ours."""
        return (path for path in self.directory.glob("*.json") if _KEY.fullmatch(path.stem) and not path.is_dir())

    def _locked(self) -> BaseFileLock:
        from filelock import FileLock  # what only reads needs no lock, and no import

        self.directory.mkdir(parents=True, exist_ok=True)
        return FileLock(self.directory / ".lock", timeout=LOCK_SECONDS)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _warn_once(str(path), f"the cache entry {path} cannot be read ({error}); it is ignored")
            return None
        try:
            return _decode(path.stem, text)
        except ValueError as error:
            _warn_once(str(path), f"the cache entry {path} is ignored: {error}. It is replaced at the next write")
            return None

    @staticmethod
    def _copy(value: Mapping[str, Any]) -> dict[str, Any]:
        """A deep copy through JSON, so that callers share no state with the cache."""
        copied: dict[str, Any] = json.loads(json.dumps(value))
        return copied


_warned: set[str] = set()


def _warn_once(subject: str, message: str) -> None:
    """Each op has a cache of its own, and one warning a process is enough of a file or folder."""
    if subject not in _warned:
        _warned.add(subject)
        warn(message)


def _encode(key: str, value: Mapping[str, Any]) -> str:
    """The text of the file for `value`; ValueError or TypeError if it is no JSON object of a known kind."""
    if not _is_value(value):
        raise ValueError(f"a cache value is a JSON object whose kind is one of {', '.join(KINDS)}")
    entry = {"format": FORMAT, "key": key, "checksum": _checksum(value), "value": value}
    return json.dumps(entry, sort_keys=True, allow_nan=False)


def _decode(key: str, text: bytes) -> dict[str, Any]:
    """The value in a file's `text`; ValueError saying what is wrong with it."""
    try:
        entry = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise ValueError(f"it is not of the format {FORMAT}")
    if entry.get("key") != key:
        raise ValueError("it belongs to another key")
    value: dict[str, Any] = entry.get("value", {})
    if not _is_value(value) or entry.get("checksum") != _checksum(value):
        raise ValueError("its checksum does not match")
    return value


def _is_value(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("kind") in KINDS


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Put `text` at `path` in one step: it is written beside it, then moved over it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@cache
def _versions() -> dict[str, str]:
    return {"attncc": __version__, "triton": version("triton"), "torch": version("torch")}
