"""Archives that somebody made to do harm: nothing comes out of them but what lies inside of the release."""

import io
import os
import random
import stat
import tarfile
from pathlib import Path

import pytest

from partitiond import safe_archive
from partitiond.safe_archive import RefusedError

NAME = "0123456789abcdef0123456789abcdef"
FINAL = Path("/srv/software", NAME)


def member(name, kind=tarfile.REGTYPE, content=b"", mode=0o644, to="", **more):
    found = tarfile.TarInfo(name)
    found.type, found.size, found.mode, found.linkname = kind, len(content), mode, to
    for key, value in more.items():
        setattr(found, key, value)
    return found, content


def archive(*members):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for one, content in members:
            tar.addfile(one, io.BytesIO(content))
    made.seek(0)
    return made


def unpack(tmp_path, *members, **limits):
    target = tmp_path / "target"
    safe_archive.unpack(archive(*members), target, name=NAME, final=FINAL, **limits)
    return target


def file(path, content=b"x", **more):
    return member(f"{NAME}/{path}", content=content, **more)


def link(path, to):
    return member(f"{NAME}/{path}", tarfile.SYMTYPE, to=to)


def test_a_release_comes_out_as_it_went_in(tmp_path):
    source = tmp_path / NAME
    (source / "bin").mkdir(parents=True)
    (source / "eggs" / "é ü").mkdir(parents=True)
    (source / "bin" / "buildout").write_text("#!/x\n")
    (source / "bin" / "buildout").chmod(0o755)
    (source / "eggs" / "é ü" / "a.py").write_text("1")
    os.utime(source / "eggs" / "é ü" / "a.py", (1.5e9, 1.5e9))
    os.link(source / "bin" / "buildout", source / "bin" / "again")
    (source / "bin" / "python").symlink_to(FINAL / "parts" / "python")
    (source / "eggs" / "link").symlink_to("../bin/buildout")
    (source / "long" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (source / ".completed").write_text("")
    sink = io.BytesIO()
    safe_archive.pack(source, sink, skip=frozenset([".completed"]), going_on=lambda: True)
    sink.seek(0)
    target = tmp_path / "target"
    safe_archive.unpack(sink, target, name=NAME, final=FINAL)
    (source / ".completed").unlink()
    assert tree(target) == tree(source)
    assert (target / "bin" / "again").stat().st_ino == (target / "bin" / "buildout").stat().st_ino


def tree(top):
    found = {}
    for path in sorted(top.rglob("*")):
        seen = path.lstat()
        content = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None  # noqa: PTH115
        )
        when = int(seen.st_mtime) if path.is_file() and not path.is_symlink() else 0
        found[str(path.relative_to(top))] = (
            stat.S_IFMT(seen.st_mode),
            bool(seen.st_mode & 0o100),
            content,
            when,
        )
    return found


HOSTILE = {
    "absolute": [member("/etc/x", content=b"x")],
    "climbing": [file("../../x")],
    "climbing inside": [file("a/../../../x")],
    "another release": [member("f" * 32 + "/x", content=b"x")],
    "beside": [member(f"{NAME}x/x", content=b"x")],
    "odd components": [file("a//b")],
    "dot": [file("./a")],
    "top is a file": [member(NAME, content=b"x")],
    "top is a link": [member(NAME, tarfile.SYMTYPE, to="/etc")],
    "link out": [link("a", "/etc/passwd")],
    "link out by climbing": [link("a/b", "../../x")],
    "link out behind a name": [link("deep/er/a", "../.."), link("b", "deep/er/a/../x")],
    "link to a neighbour": [link("a", f"{FINAL}x/y")],
    "link to a neighbour by climbing": [link("a", f"{FINAL}/../x")],
    "through a link": [file("d/x"), link("l", "d"), file("l/x")],
    "link in place of a directory": [file("d/x"), link("d", "e")],
    "link twice": [link("a", "b"), link("a", "c")],
    "file twice": [file("a"), file("a")],
    "file where a link comes": [link("a", "b"), file("a")],
    "hard link out": [member(f"{NAME}/a", tarfile.LNKTYPE, to="/etc/passwd")],
    "hard link elsewhere": [member(f"{NAME}/a", tarfile.LNKTYPE, to=f"{NAME}/not there")],
    "hard link to a link": [link("a", "b"), member(f"{NAME}/c", tarfile.LNKTYPE, to=f"{NAME}/a")],
    "device": [member(f"{NAME}/a", tarfile.BLKTYPE, devmajor=7)],
    "character device": [member(f"{NAME}/a", tarfile.CHRTYPE, devmajor=1, devminor=1)],
    "pipe": [member(f"{NAME}/a", tarfile.FIFOTYPE)],
    "contiguous": [member(f"{NAME}/a", tarfile.CONTTYPE)],
    "unknown": [member(f"{NAME}/a", b"Z")],
    "directory where a file is": [file("a"), file("a/b")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_as_a_whole(tmp_path, name):
    with pytest.raises(RefusedError):
        unpack(tmp_path, file("before"), *HOSTILE[name])
    assert {path.name for path in tmp_path.iterdir()} == {"target"}
    for path in (tmp_path / "target").rglob("*"):
        assert not path.is_symlink()


def test_no_bit_makes_anything_somebody_else_s(tmp_path):
    target = unpack(
        tmp_path,
        file("setuid", mode=0o6777, uid=0),
        member(f"{NAME}/open", tarfile.DIRTYPE, mode=0o7777),
        file("secret", mode=0o000),
    )
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {
        "setuid": 0o755,
        "open": 0o755,
        "secret": 0o644,
    }


def test_what_is_skipped_does_not_come_out(tmp_path):
    target = unpack(tmp_path, file(".completed"), file("a"), skip=frozenset([".completed"]))
    assert [path.name for path in target.iterdir()] == ["a"]


def test_bounds(tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(RefusedError, match="more than 1000 bytes"):
        unpack(tmp_path, file("a", bytes(600)), file("b", bytes(600)), most_bytes=1000)
    with pytest.raises(RefusedError, match="more than 3 members"):
        unpack(other, *[file(str(number)) for number in range(4)], most_members=3)


def test_damaged_ones_are_told_as_such(tmp_path):
    whole = archive(file("a", os.urandom(4096)), file("b", bytes(5000)), link("c", "a")).getvalue()
    dice = random.Random(7)  # noqa: S311 - the same damage each time
    seen = set()
    for number in range(150):
        content = bytearray(whole[: dice.randrange(len(whole))] if number % 2 else whole)
        if number % 2 == 0:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        target = tmp_path / str(number)
        try:
            safe_archive.unpack(io.BytesIO(bytes(content)), target, name=NAME, final=FINAL)
        except safe_archive.FAULTS as error:
            seen.add(type(error).__name__)
    assert len(seen) > 1
