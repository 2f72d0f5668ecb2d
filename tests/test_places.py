"""Whose a path is: every component, every link, what is opened; as root, as another user, with a swap in the middle."""

from __future__ import annotations

import errno
import grp
import os
import pickle
import pwd
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fed_dpprune import places
from fed_dpprune.records import write_atomically

SOMEBODY, ANOTHER = 54321, 54322
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and become another user")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """home/folder/file, each for its owner alone."""
    (tmp_path / "home" / "folder").mkdir(mode=0o700, parents=True)
    path = tmp_path / "home" / "folder" / "file"
    path.write_bytes(b"content")
    path.chmod(0o600)
    return tmp_path / "home"


def as_user(uid: int, act: Callable[[], str]) -> str:
    """What a function answers in a child that belongs to this uid and to no group of ours."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            places._is_private_group.cache_clear()
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(write, act().encode())
            os._exit(0)
        except BaseException as error:
            os.write(write, f"failed: {error!r}".encode())
            os._exit(1)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


def test_what_is_ours_all_the_way_up_is_alone_below_a_sticky_folder_too(home):
    assert places.why_not_alone(home / "folder" / "file") == ""
    assert places.why_not_alone(home / "folder", secret=True) == ""
    assert places.read_alone(home / "folder" / "file", secret=True) == b"content"
    home.chmod(0o1777)
    assert places.why_not_alone(home / "folder" / "file") == "", "others cannot rename what is ours in a sticky folder"


@pytest.mark.parametrize("component", ["home", "home/folder", "home/folder/file"])
@pytest.mark.parametrize(("mode", "who"), [(0o777, "everybody"), (0o770, "group")])
def test_a_component_that_others_can_write_is_named_with_its_mode(home, monkeypatch, component, mode, who):
    monkeypatch.setattr(places, "_is_private_group", lambda gid: False)
    path = home.parent / component
    path.chmod(mode)
    reason = places.why_not_alone(home / "folder" / "file")
    assert reason.startswith(f"{path} has mode {mode:o}: {who}") and f"chmod go-w {path}" in reason and "\n" not in reason
    with pytest.raises(places.NotAlone):
        places.read_alone(home / "folder" / "file")


@needs_root
@pytest.mark.parametrize("component", ["home", "home/folder", "home/folder/file"])
def test_a_component_of_another_user_is_named_with_its_owner(home, component):
    path = home.parent / component
    os.chown(path, SOMEBODY, -1)
    assert places.why_not_alone(home / "folder" / "file").startswith(f"{path} belongs to uid {SOMEBODY}, not to you (uid 0)")
    with pytest.raises(places.NotAlone):
        places.read_alone(home / "folder" / "file")


def test_a_sticky_folder_is_passed_through_but_is_no_folder_of_ours(home):
    home.chmod(0o1777)
    assert "everybody can write it" in places.why_not_alone(home)
    assert "everybody can write it" in places.why_not_alone(home / "folder" / "..")


@needs_root
@pytest.mark.parametrize("component", ["home/folder", "home/folder/file"])
def test_in_a_sticky_folder_what_others_put_there_is_not_ours(home, component):
    (home.parent / component).parent.chmod(0o1777)
    os.chown(home.parent / component, SOMEBODY, -1)
    assert f"belongs to uid {SOMEBODY}" in places.why_not_alone(home / "folder" / "file")


def test_a_link_is_followed_to_what_it_means_and_that_is_judged(home, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("home/folder")
    (tmp_path / "absolute").symlink_to(tmp_path / "link")
    (home / "folder" / "again").symlink_to("../folder/file")
    assert places.read_alone(tmp_path / "absolute" / "again") == b"content"
    (home / "folder").chmod(0o777)
    assert f"{home / 'folder'} has mode 777" in places.why_not_alone(tmp_path / "absolute" / "again")
    (home / "folder").chmod(0o700)
    home.chmod(0o777)
    assert f"{home} has mode 777" in places.why_not_alone(tmp_path / "link" / "file"), "the folder above a link's target counts"


def test_a_link_lies_in_a_folder_that_counts_too(home, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(home / "folder")
    (tmp_path / "open").chmod(0o777)
    assert f"{tmp_path / 'open'} has mode 777" in places.why_not_alone(tmp_path / "open" / "link" / "file")


@needs_root
def test_a_link_of_another_user_is_refused_although_its_target_is_ours(home, tmp_path):
    (tmp_path / "link").symlink_to(home / "folder" / "file")
    os.lchown(tmp_path / "link", SOMEBODY, -1)
    assert places.why_not_alone(tmp_path / "link").startswith(f"{tmp_path / 'link'} belongs to uid {SOMEBODY}")


def test_a_second_name_is_refused(home, tmp_path):
    os.link(home / "folder" / "file", tmp_path / "second")
    for path in (tmp_path / "second", home / "folder" / "file"):
        assert "2 names" in places.why_not_alone(path)
        with pytest.raises(places.NotAlone, match="2 names"):
            places.read_alone(path)


def test_a_link_with_a_second_name_counts_where_others_can_give_one(home, tmp_path):
    (tmp_path / "link").symlink_to(home / "folder" / "file")
    (tmp_path / "crowd").mkdir()
    (tmp_path / "crowd").chmod(0o1777)
    os.link(tmp_path / "link", tmp_path / "crowd" / "link", follow_symlinks=False)
    assert places.why_not_alone(tmp_path / "link") == ""
    assert "2 names" in places.why_not_alone(tmp_path / "crowd" / "link")


def test_what_others_may_read_is_no_secret(home):
    (home / "folder" / "file").chmod(0o640)
    assert places.why_not_alone(home / "folder" / "file") == ""
    reason = places.why_not_alone(home / "folder" / "file", secret=True)
    assert "mode 640: others can read it" in reason and "chmod 600" in reason
    with pytest.raises(places.NotAlone):
        places.open_alone(home / "folder" / "file", secret=True)


def test_pipes_folders_loops_and_missing_files_are_no_content(home):
    os.mkfifo(home / "pipe", 0o600)
    with pytest.raises(places.NotAlone, match="not a regular file"):
        places.read_alone(home / "pipe")
    with pytest.raises(IsADirectoryError):
        places.read_alone(home)
    (home / "loop").symlink_to("loop")
    with pytest.raises(OSError) as caught:
        places.why_not_alone(home / "loop")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError):
        places.why_not_alone(home / "nowhere" / "file")


def test_relative_paths_and_dots_mean_what_the_system_means(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    assert places.read_alone("folder/../folder/./file") == b"content"
    # A name after a link and `..` is looked up where the link leads, not where it lies.
    (tmp_path / "link").symlink_to("home/folder")
    assert places.read_alone(tmp_path / "link" / ".." / "folder" / "file") == b"content"
    assert places.why_not_alone("/") == places.why_not_alone("/..") == ""


@pytest.mark.parametrize("swap", ["writable", "link", "pipe"])
def test_what_is_swapped_between_the_look_and_the_opening_is_not_read(home, tmp_path, monkeypatch, swap):
    """The judgement is of the open descriptor. A look by name, then an opening by name, would read the other file."""
    path, real = home / "folder" / "file", os.open
    (tmp_path / "other").write_bytes(b"planted")
    (tmp_path / "other").chmod(0o666)

    def swapping(name, flags, *arguments, **keywords):
        if name == "file":
            path.unlink()
            if swap == "link":
                path.symlink_to(tmp_path / "other")
            elif swap == "pipe":
                os.mkfifo(path, 0o600)
            else:
                os.rename(tmp_path / "other", path)
        return real(name, flags, *arguments, **keywords)

    monkeypatch.setattr(places.os, "open", swapping)
    with pytest.raises(OSError):
        places.read_alone(path)


def test_a_folder_swapped_for_a_link_is_not_followed(home, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_bytes(b"planted")
    real = os.open

    def swapping(name, flags, *arguments, **keywords):
        if name == "folder":
            (home / "folder").rename(home / "away")
            (home / "folder").symlink_to(tmp_path / "theirs")
        return real(name, flags, *arguments, **keywords)

    monkeypatch.setattr(places.os, "open", swapping)
    with pytest.raises(OSError):
        places.read_alone(home / "folder" / "file")


def test_no_descriptor_is_left_open_and_a_look_opens_no_file(home, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(home / "folder")
    opened, real = [], os.open
    monkeypatch.setattr(places.os, "open", lambda name, *rest, **keywords: opened.append(name) or real(name, *rest, **keywords))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    places.require_alone(tmp_path / "link" / "file")
    assert "file" not in opened, "closing it would drop the record locks of SQLite and of ours"
    (home / "folder" / "file").chmod(0o666)
    for act in (places.require_alone, places.read_alone):
        with pytest.raises(places.NotAlone):
            act(tmp_path / "link" / "file")
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# --- groups ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def accounts(monkeypatch) -> SimpleNamespace:
    """A user `ann` whose primary group is 77, as the system's tables would tell."""
    tables = SimpleNamespace(primary=77, name="ann", members=[], others=[])
    user = lambda: SimpleNamespace(pw_name="ann", pw_uid=os.geteuid(), pw_gid=tables.primary)  # noqa: E731
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user())
    monkeypatch.setattr(pwd, "getpwall", lambda: [user(), *tables.others])
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=tables.name, gr_mem=tables.members))
    places._is_private_group.cache_clear()
    yield tables
    places._is_private_group.cache_clear()


def test_the_private_group_of_a_user_is_the_user(accounts):
    assert places._is_private_group(77)


@pytest.mark.parametrize(
    "change",
    [
        {"primary": 78},
        {"name": "staff"},
        {"members": ["ann", "bob"]},
        {"others": [SimpleNamespace(pw_name="bob", pw_uid=4, pw_gid=77)]},
    ],
)
def test_a_group_with_anybody_else_is_not(accounts, change):
    vars(accounts).update(change)
    assert not places._is_private_group(77)


def test_a_user_or_group_that_the_system_does_not_know_has_no_private_group(accounts, monkeypatch):
    def unknown(gid):
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert not places._is_private_group(77)


# --- another user, another system -----------------------------------------------------------------------------------------


@needs_root
def test_a_user_who_is_not_root_trusts_root_and_itself_and_nobody_else(tmp_path_factory):
    # Beside pytest's own folders, which root alone can enter.
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        base = Path(made)
        base.chmod(0o755)
        for name, uid in (("roots", 0), ("own", SOMEBODY), ("theirs", ANOTHER)):
            (base / name).mkdir(mode=0o755)
            (base / name / "file").write_bytes(name.encode())
            os.chown(base / name, uid, uid)
            os.chown(base / name / "file", uid, uid)
        (base / "own" / "link").symlink_to(base / "theirs" / "file")
        os.lchown(base / "own" / "link", SOMEBODY, SOMEBODY)

        assert as_user(SOMEBODY, lambda: places.why_not_alone(base / "roots" / "file")) == ""
        assert as_user(SOMEBODY, lambda: places.read_alone(base / "own" / "file").decode()) == "own"
        for path in (base / "theirs" / "file", base / "own" / "link"):
            reason = as_user(SOMEBODY, lambda path=path: places.why_not_alone(path))
            assert f"belongs to uid {ANOTHER}, not to you (uid {SOMEBODY})" in reason
        assert f"belongs to uid {SOMEBODY}" in places.why_not_alone(base / "own" / "file"), "root does not trust users"
        # A folder that may be passed through but not listed.
        (base / "roots").chmod(0o711)
        assert as_user(SOMEBODY, lambda: places.read_alone(base / "roots" / "file").decode()) == "roots"


def test_without_posix_owners_everything_is_refused(home, monkeypatch):
    monkeypatch.delattr(places.os, "geteuid")
    with pytest.raises(places.NotAlone, match="no POSIX owners"):
        places.require_alone(home)


def test_the_refusal_survives_pickling_and_is_an_os_error(home):
    home.chmod(0o777)
    with pytest.raises(OSError) as caught:
        places.require_alone(home)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is places.NotAlone and str(again) == str(caught.value) == again.strerror


# --- what is made ---------------------------------------------------------------------------------------------------------


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_folders_and_files_are_made_for_their_owner_alone_whatever_the_umask(tmp_path, no_umask):
    made = places.make_folder(tmp_path / "a" / "b")
    assert [_mode(folder) for folder in (made, made.parent)] == [0o700, 0o700]
    assert places.make_folder(made) == places.private_folder(made) == made
    write_atomically(made / "file", "text")
    assert _mode(made / "file") == 0o600 and [path.name for path in made.iterdir()] == ["file"]
    with pytest.raises(OSError):
        places.make_folder(made / "file")


def test_a_folder_that_was_there_is_judged_before_it_is_used(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o777)
    with pytest.raises(places.NotAlone):
        places.private_folder(tmp_path / "there" / "below")


def test_no_file_is_written_through_a_name_that_could_be_guessed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for name in (f".file.{os.getpid()}.tmp", f"file.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "file", "text")
    assert victim.read_text() == "whole" and (tmp_path / "file").read_text() == "text"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("fed_dpprune.records.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
