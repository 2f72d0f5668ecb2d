"""Where files are looked for, where what can be made again is kept, and whose a path is. Standard library only.

`FED_DPPRUNE_DATA` is the root of the user's data sets (torchvision-style); it is only ever read. `FED_DPPRUNE_CACHE` holds
what may be deleted at any time: unpacked data, calibrations, compiled kernels; its default is `~/.cache/fed-dpprune`.

What is loaded, believed or continued (kernels, unpacked data, figures, layouts, ledgers, checkpoints, models and partitions
of a run) must be this user's alone, all the way up. The rule, one for all:

- every component of the path belongs to this user (the effective uid) or to root, and so does each symbolic link on the
  way, whose own folder and target are judged alike;
- no component can be written by others: neither the group's nor the others' write bit is set. An access control list that
  lets somebody write shows in the group's bit, which is its mask. One group counts as this user: the private one that many
  systems give to each (the user's primary group, of the user's name, without another member);
- a folder with the sticky bit (/tmp) may be writable by all where it is only passed through: in it a name can be removed or
  renamed by the owner of the file or of the folder alone, both of whom are judged. As a folder of its own it is refused: new
  names may be planted there (a journal beside a ledger, a module beside a script);
- a file has one name (link count 1), and so has a link in a folder that others can write: a second name may be somebody's
  who gives out an older file of this user's for the one that is wanted;
- what is read is opened from one held descriptor to the next (openat, O_NOFOLLOW) and judged by fstat of what was opened.

A path that was found alone stays so: nobody else can rename, replace or write any part of it. So it may afterwards be opened
by name (SQLite, dlopen, memory maps). Not excluded: root, and somebody who still holds a file open from when it was writable.
Inside a container in which everything is root's and so is the process, all this holds without more; owners that the
container does not know show as 65534 and are refused. A system without POSIX owners has no answer: everything is refused.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from pathlib import Path

_LINKS = 40  # symbolic links on one path, as in Linux
# To pass through a folder takes no right to list it, where the system can say so.
_PASS = getattr(os, "O_PATH", os.O_RDONLY)
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER = _PASS | _SAFELY | getattr(os, "O_DIRECTORY", 0)
_READ = os.O_RDONLY | _SAFELY | getattr(os, "O_NONBLOCK", 0)  # a pipe would make it wait
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def data_root() -> Path | None:
    """The folder that `FED_DPPRUNE_DATA` names, or None when it is unset."""
    root = os.environ.get("FED_DPPRUNE_DATA", "")
    return Path(root).expanduser() if root else None


def cache_root() -> Path:
    """The folder that `FED_DPPRUNE_CACHE` names, else `~/.cache/fed-dpprune`; it may not exist yet."""
    root = os.environ.get("FED_DPPRUNE_CACHE", "")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "fed-dpprune"


class NotAlone(PermissionError):
    """A path that somebody else could change; its text is one line: which component, why, what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


def why_not_alone(path: str | Path, *, secret: bool = False, passing: bool = False) -> str:
    """One line that says why a path is not this user's alone; empty when it is.

    Args:
        path: A file or folder that exists.
        secret: Whether a file must also be unreadable for others.
        passing: Whether it is a folder in which another is to be made: then a sticky one will do.

    Raises:
        OSError: It does not exist, or cannot be reached.
    """
    try:
        _reach(path, secret, read=False, passing=passing)
    except NotAlone as refusal:
        return str(refusal)
    return ""


def require_alone(path: str | Path, *, secret: bool = False) -> None:
    """Refuse a path that is not this user's alone. Arguments and other errors: `why_not_alone`.

    Raises:
        NotAlone: With the reason.
    """
    _reach(path, secret, read=False)


def open_alone(path: str | Path, *, secret: bool = False) -> int:
    """A descriptor for reading a file that is this user's alone; the caller closes it.

    Raises:
        NotAlone: It is not; or it is no regular file.
        OSError: It does not exist, or cannot be read.
    """
    return _reach(path, secret, read=True)


def read_alone(path: str | Path, *, secret: bool = False) -> bytes:
    """The bytes of a file that is this user's alone. Errors: `open_alone`."""
    with open(open_alone(path, secret=secret), "rb") as file:
        return file.read()


def make_folder(path: str | Path) -> Path:
    """Make a folder and what is missing above it, each for this user alone (0700), whatever the umask.

    Raises:
        OSError: It cannot be made.
    """
    path = Path(path)
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):  # another process of ours was first; or a file, which fails below
                folder.mkdir(mode=0o700)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path))
    return path


def private_folder(path: str | Path) -> Path:
    """A folder that is this user's alone, made (0700) where it is missing.

    Raises:
        NotAlone: It, or a folder above it, is not.
        OSError: It cannot be made.
    """
    folder = make_folder(path)
    require_alone(folder)
    return folder


def _reach(path: str | Path, secret: bool, *, read: bool, passing: bool = False) -> int:
    """Walk from the root to the path, judging each component; a descriptor of the file where it is to be read, else -1.

    A file that is not to be read is not opened: to close it would drop the record locks that this process has on it.
    """
    if not hasattr(os, "geteuid"):
        raise _refusal(str(path), "cannot be judged: this system has no POSIX owners", "use one that has")
    todo, links = _parts(os.path.join(os.getcwd(), path)), 0
    with contextlib.ExitStack() as held:
        # The folders on the way with their descriptors: `..` goes back to the last one, as the system would.
        way = [("/", _held(held, os.open("/", _FOLDER)))]
        _judge("/", os.fstat(way[0][1]), passing=bool(todo))
        while todo:
            name = todo.pop()
            if name == "..":
                del way[max(1, len(way) - 1) :]
                continue
            above, folder = way[-1]
            place = os.path.join(above, name)
            crowded = bool(os.fstat(folder).st_mode & _OTHERS_WRITE)
            found = _status(name, folder, place)
            if stat.S_ISLNK(found.st_mode):
                _judge(place, found, crowded=crowded)
                links += 1
                target = os.readlink(name, dir_fd=folder)
                if links > _LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                del way[1 if os.path.isabs(target) else len(way) :]
                todo += _parts(target)
            elif todo or stat.S_ISDIR(found.st_mode):
                way.append((place, _held(held, os.open(name, _FOLDER, dir_fd=folder))))
                _judge(place, os.fstat(way[-1][1]), passing=passing or bool(todo))
            elif not stat.S_ISREG(found.st_mode):
                raise _refusal(place, "is not a regular file", "remove it")
            elif not read:
                _judge(place, found, secret=secret)
                return -1
            else:
                return _open(name, folder, place, secret)
        place, folder = way[-1]
        _judge(place, os.fstat(folder), passing=passing)
        if read:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place)
        return -1


def _open(name: str, folder: int, place: str, secret: bool) -> int:
    """A descriptor for reading, judged by what was opened, whatever the name meant a moment ago."""
    opened = os.open(name, _READ, dir_fd=folder)
    try:
        found = os.fstat(opened)
        _judge(place, found, secret=secret)
        if not stat.S_ISREG(found.st_mode):
            raise _refusal(place, "is not a regular file", "remove it")
    except NotAlone:
        os.close(opened)
        raise
    return opened


def _judge(place: str, found: os.stat_result, *, passing: bool = False, crowded: bool = False, secret: bool = False) -> None:
    """Refuse one component.

    Args:
        place: Its path.
        found: What it is.
        passing: Whether it is a folder that the path goes through; then the sticky bit does.
        crowded: Whether others can write the folder that it lies in.
        secret: Whether others must not read it.
    """
    mode = stat.S_IMODE(found.st_mode)
    is_folder, is_link = stat.S_ISDIR(found.st_mode), stat.S_ISLNK(found.st_mode)
    if found.st_uid not in (os.geteuid(), 0):
        fix = f"use a place that is yours, or chown {os.geteuid()} {place}"
        raise _refusal(place, f"belongs to uid {found.st_uid}, not to you (uid {os.geteuid()}) or root", fix)
    others = mode & _OTHERS_WRITE and not is_link and (mode & stat.S_IWOTH or not _is_private_group(found.st_gid))
    if others and not (passing and mode & stat.S_ISVTX):
        whose = "everybody" if mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise _refusal(place, f"has mode {mode:o}: {whose} can write it", f"chmod go-w {place}, or use a place that is yours")
    if not is_folder and found.st_nlink > 1 and (crowded or not is_link):
        raise _refusal(place, f"has {found.st_nlink} names (hard links)", "remove it, or keep a copy that has one name")
    if secret and not is_folder and mode & 0o077:
        raise _refusal(place, f"has mode {mode:o}: others can read it", f"chmod 600 {place}")


@functools.lru_cache(maxsize=64)
def _is_private_group(gid: int) -> bool:
    """Whether a group is this user alone: the primary group, of the user's name, nobody else's first or further group."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if user.pw_gid != gid or group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        return False
    return all(other.pw_gid != gid or other.pw_uid == user.pw_uid for other in pwd.getpwall())


def _refusal(place: str, why: str, fix: str) -> NotAlone:
    return NotAlone(errno.EPERM, f"{place} {why}; {fix}")


def _parts(path: str) -> list[str]:
    """The components of a path, last one first; the root has none."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _status(name: str, folder: int, place: str) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None


def _held(held: contextlib.ExitStack, descriptor: int) -> int:
    held.callback(os.close, descriptor)
    return descriptor
