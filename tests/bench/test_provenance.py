"""Which commit a result is of, and from which files none may be taken."""

import subprocess

import pytest

from bench import provenance
from bench.__main__ import main


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in place of this one."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv(provenance.VARIABLE, raising=False)
    provenance._described.cache_clear()
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for name in ("kernel.py", "bench/results/gpu.jsonl", "bench/RESULTS.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    yield tmp_path
    provenance._described.cache_clear()


def test_a_clean_checkout_is_its_commit(checkout):
    assert len(provenance.commit()) >= 7 and "dirty" not in provenance.commit()
    assert provenance.refusal(allow_dirty=False) is None


def test_results_and_files_that_git_does_not_know_change_nothing(checkout):
    for name in ("bench/results/gpu.jsonl", "bench/RESULTS.md", "log.txt"):
        (checkout / name).write_text("second\n")
    assert provenance.refusal(allow_dirty=False) is None


def test_a_changed_file_is_refused_unless_allowed_and_shows_in_the_commit(checkout):
    (checkout / "kernel.py").write_text("second\n")
    assert provenance.commit().endswith("-dirty")
    assert "commit them first" in provenance.refusal(allow_dirty=False)
    assert provenance.refusal(allow_dirty=True) is None


def test_without_a_checkout_the_commit_has_to_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv(provenance.VARIABLE, raising=False)
    provenance._described.cache_clear()
    assert provenance.commit() == "unknown" and provenance.VARIABLE in provenance.refusal(allow_dirty=True)
    monkeypatch.setenv(provenance.VARIABLE, "abc1234")
    assert provenance.commit() == "abc1234" and provenance.refusal(allow_dirty=False) is None
    provenance._described.cache_clear()


def test_a_benchmark_that_would_write_from_changed_files_is_refused(checkout, tmp_path, capsys):
    (checkout / "kernel.py").write_text("second\n")
    out = tmp_path / "out.jsonl"
    assert main(["run", "--suite", "head", "--out", str(out)]) == 2
    assert "say --allow_dirty" in capsys.readouterr().err and not out.exists()
