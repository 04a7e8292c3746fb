"""A store whose files find no room: what is told, what is left, and that it can go on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from calibrated import SHARDS, calibrated, content, standard

from stepfold.calibration import durable
from stepfold.calibration.document import STATISTICS, STORE
from stepfold.calibration.plan import Settings
from stepfold.calibration.run import calibrate, prepare
from stepfold.calibration.shards import shard_name
from stepfold.calibration.store import missing_shards
from stepfold.loop.errors import StepfoldError


class FullDisk:
    """Lets some files through and then refuses in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: int):
        self.left, self.write = files, durable.os.fsync
        monkeypatch.setattr(durable.os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{descriptor}"):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.write(descriptor)


@pytest.mark.parametrize("files", range(6))
def test_out_of_disk(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """store.json, three shards, the statistics, store.json again: each may be the one that does not fit."""
    store = tmp_path / "store"
    names = [STORE, *(shard_name(i) for i in range(SHARDS)), STATISTICS, STORE]
    with monkeypatch.context() as patch:
        FullDisk(patch, files)
        with pytest.raises(
            StepfoldError, match=rf"^{store / names[files]}: expected room on the disk; received: No space"
        ):
            calibrated(standard(), store)
    assert not any(name.endswith(".partial") for name in content(store))
    done = prepare(standard(), Settings(samples=20)).document
    assert missing_shards(store, done) == list(range(max(0, files - 1), SHARDS))
    calibrated(standard(), store)
    assert content(store) == content(whole)


def test_a_write_that_fails_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stepfold.calibration.store as module

    real = module.write_tensors

    def half(stream, shapes, arrays, metadata) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", half)
    with pytest.raises(StepfoldError, match=r"shards/00000\.safetensors: expected room on the disk"):
        calibrated(standard(), tmp_path)
    assert set(content(tmp_path)) == {STORE, "lock"}
    monkeypatch.setattr(module, "write_tensors", real)
    assert calibrate(prepare(standard(), Settings(samples=20)), tmp_path, lambda *_: None).resumed == 0
