"""Downloads that go on where they broke off, with checksums, and unpacking that cannot write outside its folder."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import http.client
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

from common.errors import ConfigError, DataError
from utils import program

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
MAX_WAIT = 30  # seconds
PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
PASSING_STATUS = {408, 416, 425, 429, 500, 502, 503, 504}


def check_url(flag: str, url: str) -> str:
    """The base URL without a slash at its end; ConfigError when it is none."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{flag} {url}: begins with neither http:// nor https://; give the whole address")
    return url.rstrip("/")


def fetch_text(url: str) -> str | None:
    """A small text file, or None when it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read().decode("utf-8", errors="replace")
    except PASSING:
        return None


def download(url: str, target: Path, *, md5: str | None = None, attempts: int = 5, wait: float = 1.0) -> None:
    """Fetch `url` into `target`, which appears only when it is whole.

    What has arrived is kept in `target`.part and continued by HTTP Range, in this run or the next. `attempts`
    counts tries in a row that bring nothing; the pause before each doubles from `wait` seconds.
    """
    part = target.with_name(target.name + ".part")
    with program.writing(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, attempts, wait)
        if md5 is not None and (found := md5_of(part)) != md5.lower():
            part.unlink()
            raise DataError(f"{url}: md5 is {found}, not {md5}; the download was deleted: run again, or try a mirror")
        part.replace(target)


def _fetch(url: str, part: Path, attempts: int, wait: float) -> None:
    """Go on with `part` until it is whole; DataError after `attempts` tries in a row that bring nothing."""
    failures, reason = 0, ""
    while True:
        before = _size(part)
        try:
            if _continue(url, part):
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code not in PASSING_STATUS:
                raise DataError(f"{url}: {error.code} {error.reason}; check the name and the base URL") from error
            reason = f"{error.code} {error.reason}"
            if error.code == 416:  # nothing lies behind what is there: it is the whole file, or not its beginning
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    break
                part.unlink(missing_ok=True)
        except PASSING as error:
            reason = str(getattr(error, "reason", "") or error)
        failures = 0 if _size(part) > before else failures + 1
        if failures >= attempts:
            raise DataError(f"{url}: {reason}; check the network and run again: it goes on where it stopped")
        time.sleep(min(wait * 2**failures, MAX_WAIT))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(url: str, part: Path) -> bool:
    """Append to `part` what is missing of `url`; False when the connection ended before the file did."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:  # the server knows no ranges: from the start
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        _check_space(part, total - have if total else 0)
        with (
            part.open("ab" if have else "wb") as file,
            program.bar(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise DataError(f"{part.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room")


def md5_of(path: Path) -> str:
    """The md5 sum of a file, as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, program.bar(total=_size(path), unit="B", unit_scale=True, desc="md5") as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive below `folder`: only plain files and folders, nothing outside `folder`.

    Owners, modes and times in the archive are not taken over.
    """
    try:
        with (
            archive.open("rb") as raw,
            tarfile.open(fileobj=raw, mode="r:*") as tar,
            program.bar(total=_size(archive), unit="B", unit_scale=True, desc=f"unpack {archive.name}") as bar,
        ):
            for member in tar:
                _unpack_member(tar, member, folder, archive)
                bar.update(raw.tell() - bar.n)
            # tarfile takes an archive that ends too early for a shorter one; the compression knows better.
            while tar.fileobj is not None and tar.fileobj.read(CHUNK):
                pass
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: damaged ({error}); delete it and run again") from error


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or not (member.isreg() or member.isdir()):
        raise DataError(
            f"{archive}: member {member.name!r} is a link or leads outside the folder; not unpacked: "
            "do not trust this archive"
        )
    path = folder / name
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    if source is not None:
        with source, path.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
