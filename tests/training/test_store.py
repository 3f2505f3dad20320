"""Writing to a temporary name, and finding what was finished."""

import pytest

from training.store import fingerprint, finished, renamed_when_done, write_json


def test_a_name_appears_only_when_all_is_written(tmp_path):
    path = tmp_path / "folder" / "result"
    with renamed_when_done(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "model"
    with renamed_when_done(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), renamed_when_done(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("new")
        raise OSError("disk full")
    assert [p.name for p in path.iterdir()] == ["weights"]
    with renamed_when_done(path) as temporary:  # over the old folder, and without what the failure left behind
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("weights", "new")]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_only_the_same_key_is_found(tmp_path):
    path = tmp_path / "record.json"
    key = fingerprint({"lr": 1e-3, "seed": 0})
    assert finished(path, key) is None
    write_json(path, {"key": key, "loss": 0.5})
    assert finished(path, fingerprint({"seed": 0, "lr": 1e-3})) == {"key": key, "loss": 0.5}
    assert finished(path, fingerprint({"seed": 1, "lr": 1e-3})) is None
    path.write_text(path.read_text()[:-9])
    assert finished(path, key) is None
