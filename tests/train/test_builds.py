"""A killed build's lock: torch would wait for it for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trimtab.train.builds import drop_stale_locks


@pytest.fixture(params=["py311_cpu/deepspeed_shm_comm", "deepspeed_shm_comm"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As torch makes it: below the folder of this Python and device, or right below the user's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path: Path = tmp_path / request.param / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    _aged(path, minutes=11)
    return path


def _aged(path: Path, *, minutes: float) -> None:
    then = time.time() - 60 * minutes
    os.utime(path, (then, then))


def test_a_lock_that_nobody_holds_is_removed_and_named(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert drop_stale_locks() == [lock]
    assert not lock.exists() and str(lock) in caplog.text


def test_a_lock_that_a_build_holds_stays(lock: Path) -> None:
    with lock.open():
        assert drop_stale_locks() == []
    assert lock.exists()


def test_a_young_lock_may_be_another_machine_s(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    _aged(lock, minutes=1)
    assert drop_stale_locks() == []
    assert lock.exists() and "delete it if none is" in caplog.text
    assert drop_stale_locks(minutes=0) == [lock]


def test_it_is_the_lock_that_torch_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(cpp_extension._get_build_directory("some_op", verbose=False))
    (folder / "lock").touch()
    _aged(folder / "lock", minutes=11)
    assert drop_stale_locks() == [folder / "lock"]
