"""What only a folder can get wrong: links, half-written files, missing roots, folders that come and go."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.errors import KeyRefused, StoreUnavailable
from registry.store import FolderStore

KEY = "t/acme/u/0a1b/default/default-1/adapter_model.safetensors"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """Somebody with a foot in the folder must not reach the rest of the disk through us."""
    store = FolderStore(tmp_path / "store")
    store.set_up()
    (tmp_path / "store" / "t").symlink_to(tmp_path)

    with pytest.raises(KeyRefused, match="link"):
        store.put_new("t/secret", b"1")


def test_a_file_half_written_by_a_dead_process_has_no_key(tmp_path: Path) -> None:
    """What a crash leaves aside is never listed, read or in the way."""
    store = FolderStore(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".put-dead").write_bytes(b"half")

    assert store.put_new("t/x", b"whole")
    assert list(store.keys("")) == ["t/x"]


def test_clearing_takes_what_a_killed_writer_left(tmp_path: Path) -> None:
    """And the folders; it is no object, so it is not counted."""
    store = FolderStore(tmp_path / "store")
    store.set_up()
    store.put_new("t/a/x", b"1")
    (tmp_path / "store" / "t" / "a" / ".put-dead").write_bytes(b"half")

    assert store.clear("t/a") == 1
    assert list((tmp_path / "store").iterdir()) == []


def test_putting_again_takes_what_a_killed_writer_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix of a version that is committed is never swept, so nothing may stay in it."""
    store = FolderStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # as if it were killed
        with pytest.raises(KeyboardInterrupt):
            store.put_new("t/x", b"1")
    assert [path.name[:5] for path in (tmp_path / "t").iterdir()] == [".put-"]

    store.put_new("t/x", b"1")

    assert [path.name for path in (tmp_path / "t").iterdir()] == ["x"]


def test_writers_and_sweepers_of_one_folder_do_not_trip_each_other(tmp_path: Path) -> None:
    """Folders come with their first object and go with their last, under others' feet."""
    store = FolderStore(tmp_path)

    def come_and_go(number: int) -> int:
        wrote = 0
        for _ in range(100):
            wrote += store.put_new(f"t/{number}", b"1")
            store.delete(f"t/{number}")
        return wrote

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(come_and_go, range(2))) == [100, 100]


def test_a_file_can_be_read_by_an_inference_server_of_another_user(tmp_path: Path) -> None:
    """Others may read and not write, as far as the umask of whoever runs the worker lets them."""
    before = os.umask(0o002)
    try:
        FolderStore(tmp_path).put_new("t/x", b"1")
        os.umask(0o077)
        FolderStore(tmp_path).put_new("t/y", b"1")
    finally:
        os.umask(before)

    assert [(tmp_path / "t" / name).stat().st_mode & 0o777 for name in "xy"] == [0o644, 0o600]


def test_a_missing_root_is_told_and_never_made(tmp_path: Path) -> None:
    """It may be a disk that is not mounted: what is written below its mount point would be gone when it is."""
    store = FolderStore(tmp_path / "nowhere")

    with pytest.raises(StoreUnavailable, match="lora setup"):
        store.put_new(KEY, b"1")

    assert not (tmp_path / "nowhere").exists()


def test_every_folder_above_a_file_is_synced_before_a_row_may_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes a file whose folder was not synced, also one that an earlier, killed writer put there."""
    store, synced, sync = FolderStore(tmp_path), list[str](), os.fsync

    def watched(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    monkeypatch.setattr(os, "fsync", watched)

    for _ in range(2):
        synced.clear()
        store.put_new("t/a/x", b"1")

        assert synced[-3:] == [f"{tmp_path}/t/a", f"{tmp_path}/t", str(tmp_path)]
