"""Whatever stands in place of a file, reading it neither blocks nor grows without limit, and the error says what it is."""

import os
import socket
import threading
from pathlib import Path

import pytest

from mtp_dist import regular_file
from mtp_dist.errors import UserError
from mtp_dist.regular_file import kind, open_regular, read_regular, require_regular


def make(folder: Path, what: str) -> Path:
    path = folder / "x"
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(folder)  # the name of a socket is limited to 108 bytes
            try:
                server.bind("x")
            finally:
                os.chdir(here)
    elif what == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("what", ["FIFO", "folder", "socket", "device"])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_named(tmp_path: Path, what: str, linked: bool) -> None:
    path = make(tmp_path, what)
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    assert kind(path) == f"a {what}"
    for action in (open_regular, require_regular, lambda path: read_regular(path, 10)):
        with pytest.raises(UserError, match=rf"{path}.* is a {what}, not a regular file") as caught:
            action(path)
        assert "\n" not in str(caught.value)


def test_regular_files_are_read_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("x")
    for path in (tmp_path / "x", str(tmp_path / "link")):
        assert read_regular(path, 5) == b"12345"
        assert require_regular(path) == 5
        with open_regular(path) as file:
            assert (file.seek(2), file.read(2)) == (2, b"34")
    with pytest.raises(UserError, match=r"x is 5 bytes or more; at most 4 are expected"):
        read_regular(tmp_path / "x", 4)


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"x is 1099511627776 bytes or more"):
        read_regular(tmp_path / "x", 1 << 20)


def test_files_of_unknown_size_are_bounded() -> None:
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(UserError, match=r"/proc/self/maps is 101 bytes or more"):
        read_regular("/proc/self/maps", 100)


def test_what_is_missing_or_forbidden_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    assert kind(tmp_path / "link") == "a broken link"
    with pytest.raises(FileNotFoundError):
        kind(tmp_path / "x")


@pytest.mark.timeout(60)
def test_a_fifo_swapped_in_after_the_examination_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, "FIFO")
    monkeypatch.setattr(regular_file, "require_regular", lambda path: 0)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(UserError, match="is a FIFO"):
        open_regular(path)
    assert os.listdir("/proc/self/fd") == descriptors


def test_nobody_waits_for_a_writer(tmp_path: Path) -> None:
    """The refusal comes while a writer hangs on the other end, and leaves it there."""
    path = make(tmp_path, "FIFO")
    writer = threading.Thread(target=lambda: path.write_bytes(b"late"), daemon=True)
    writer.start()
    with pytest.raises(UserError, match="is a FIFO"):
        read_regular(path, 10)
    assert writer.is_alive()
    assert path.read_bytes() == b"late"
    writer.join()
