"""Replacing a directory as a whole: whoever looks finds the old content or the new, never a mixture.

The new directory is written beside the target under a name of its own, flushed to disk, and put in place by one
rename:

- the target does not exist (or is empty): rename(new, target);
- it exists: the two are exchanged in one system call (renameat2 on Linux, renamex_np on macOS), and the old one, now
  under the temporary name, is removed;
- where the system cannot exchange: rename(target, old), rename(new, target). A kill between the two leaves no target;
  `recover`, which every read and write here calls first, then renames the old one back.

Temporary names carry host and process, so that what a dead process left is recognised and removed by the next save.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from hqq.models.checkpoint.disk import Disk


def replace_directory(
    target: Path, write: Callable[[Path], None], stale: Callable[[str], bool], disk: Disk
) -> None:
    """Replace `target` by a directory that `write` fills; entries of the old one that are not `stale` stay.

    The parent is created if needed. Raises what `write` and the file system raise; `target` is unchanged then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target, disk)
    _remove_leftovers(target, disk)
    new = _beside(target, "new")
    disk.make_directory(new)
    try:
        write(new)
        if target.exists():
            new.chmod(target.stat().st_mode & 0o7777)
            _link_entries(target, new, stale, disk)
        _sync_tree(new, disk)
        _put_in_place(new, target, disk)
    except BaseException:
        # Only reached before the commit: afterwards `new` is the old content, whose removal is of no consequence.
        if new.exists():
            disk.remove_tree(new)
        raise


def recover(target: Path, disk: Disk) -> None:
    """Undo a save that was killed between its two renames: put the old directory back if there is none."""
    if target.exists():
        return
    for path, kind in _leftovers(target):
        if kind == "old":
            disk.rename(path, target)
            return


def _put_in_place(new: Path, target: Path, disk: Disk) -> None:
    if not target.exists() or not any(target.iterdir()):
        disk.rename(new, target)
        disk.sync(target.parent)
        return
    if disk.exchange(new, target):
        disk.sync(target.parent)
        _remove(new, disk)
        return
    old = _beside(target, "old")
    try:
        disk.rename(target, old)
        disk.rename(new, target)
    except BaseException:
        # An interrupt may come between the two.
        if old.exists() and not target.exists():
            disk.rename(old, target)
        raise
    disk.sync(target.parent)
    # From here on it must not be taken for something to recover.
    dead = _beside(target, "dead")
    disk.rename(old, dead)
    _remove(dead, disk)


def _remove(old: Path, disk: Disk) -> None:
    """Remove what has been replaced. The new content is in place: failing here is no failure of the save."""
    try:
        disk.remove_tree(old)
    except OSError as error:
        warnings.warn(
            f"could not remove {old}, which is no longer needed: {error}", ResourceWarning, stacklevel=2
        )


def _link_entries(old: Path, new: Path, stale: Callable[[str], bool], disk: Disk) -> None:
    for entry in sorted(old.iterdir()):
        place = new / entry.name
        if place.exists() or stale(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            disk.make_directory(place)
            _link_entries(entry, place, lambda name: False, disk)
        else:
            disk.link(entry, place)


def _sync_tree(directory: Path, disk: Disk) -> None:
    for entry in sorted(directory.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            _sync_tree(entry, disk)
        else:
            disk.sync(entry)
    disk.sync(directory)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.hqq-{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _leftovers(target: Path) -> Iterator[tuple[Path, str]]:
    """Yield the temporary directories of `target` whose process is gone, with their kind."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.hqq-(new|old|dead)-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}"
    )
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match[2])):
            yield path, match[1]


def _remove_leftovers(target: Path, disk: Disk) -> None:
    for path, _ in list(_leftovers(target)):
        disk.remove_tree(path)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", platform.node()) or "host"


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # there is no harmless way to ask: leave the directory alone
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
