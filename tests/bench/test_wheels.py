"""What is packed for a machine without a network, with wheels made here: nothing is downloaded."""

import argparse
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import wheels
from bench.wheels import SETS, Wheel, command, members, pack


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    wheels.add_arguments(parser)
    return parser.parse_args(arguments)


def make(cache: Path, wheel: Wheel, files: dict[str, str]) -> Path:
    """A wheel as a registry would give it."""
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}"
    path = cache / f"{stem}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {wheel.name}\nVersion: {wheel.version}\n"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in {**files, f"{stem}.dist-info/METADATA": metadata}.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o755 if "/bin/" in name else 0o644) << 16
            file.writestr(info, text)
    return path


@pytest.fixture
def peer(tmp_path):
    """A package with what its wheel may hold: code, a tool, a stub for another system, a script, a large data file."""
    wheel = Wheel("a-peer", "1.0", "for tests", only=("a_peer/*.py", "*/bin/*"))
    files = {
        "a_peer/__init__.py": "value = 7\n",
        "a_peer/bin/tool": "#!/bin/sh\necho tool\n",
        "a_peer/stubs/__init__.py": "",
        "a_peer/data.bin": "x" * 1000,
        "a_peer-1.0.data/scripts/script.py": "",
    }
    make(tmp_path / "cache", wheel, files)
    return wheel


def test_what_is_unpacked_imports_and_is_known_by_its_version(peer, tmp_path):
    archive = pack([peer], tmp_path, "first")
    line = command("first", archive, options("--site", str(tmp_path / "there")))
    unpack = line.partition(" && ")[0].replace("python3", sys.executable)
    subprocess.run(unpack, shell=True, check=True)
    site = tmp_path / "there" / "site-packages"
    code = "import a_peer, importlib.metadata; print(a_peer.value, importlib.metadata.version('a-peer'))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["7", "1.0"]
    assert os.stat(site / "a_peer/bin/tool").st_mode & stat.S_IXUSR
    assert f"PYTHONPATH={site}:{site}/{wheels.CUTE_PACKAGES}" in line


def test_what_nothing_opens_stays_behind(peer, tmp_path):
    names = [name for name, _, _ in members(next((tmp_path / "cache").iterdir()), peer.only)]
    assert names == ["a_peer/__init__.py", "a_peer/bin/tool", "a_peer-1.0.dist-info/METADATA"]


def test_packed_once_and_again_only_for_other_wheels(peer, tmp_path, monkeypatch):
    archive = pack([peer], tmp_path, "first")
    before = archive.read_bytes()
    monkeypatch.setattr(wheels, "compress", lambda *_: pytest.fail("packed again"))
    assert pack([peer], tmp_path, "first") == archive
    monkeypatch.undo()
    other = Wheel("b-peer", "2.0", "another")
    make(tmp_path / "cache", other, {"b_peer.py": ""})
    assert pack([peer, other], tmp_path, "first").read_bytes() != before
    archive.unlink()
    assert pack([peer], tmp_path, "first").read_bytes() == before  # equal contents, equal bytes


def test_an_interrupted_packing_leaves_no_archive(peer, tmp_path, monkeypatch):
    def interrupted(files, archive):
        archive.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack([peer], tmp_path, "first")
    assert not (tmp_path / "first.tar.xz").exists()


def test_the_checkout_counts_and_too_much_is_an_error(peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "SETS", {"first": (peer,)})
    monkeypatch.setattr(wheels, "tracked_bytes", lambda root: 3 * wheels.MIB)
    here = ["--out", str(tmp_path), "--set", "first"]
    assert wheels.main(options(*here, "--limit_mb", "3.1")) == 0
    assert f"with the checkout 3.0 MiB (leave {wheels.LEFT_BEHIND} behind" in capsys.readouterr().out
    assert wheels.main(options(*here, "--limit_mb", "2.5")) == 1
    assert "first is 0.5 MiB over" in capsys.readouterr().err


def test_a_wheel_that_cannot_be_had_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    def refuse(order, **_):
        raise subprocess.CalledProcessError(1, order, stderr="WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(wheels, "SETS", {"first": (Wheel("absent", "1", ""),)})
    monkeypatch.setattr(wheels, "tracked_bytes", lambda root: 0)
    monkeypatch.setattr(wheels.subprocess, "run", refuse)
    assert wheels.main(options("--out", str(tmp_path), "--set", "first")) == 1
    assert capsys.readouterr().err.strip().endswith("ERROR: No matching distribution")


def test_the_tracked_files_are_counted(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "a file").write_bytes(b"x" * 100)
    (tmp_path / "untracked").write_bytes(b"x" * 1000)
    behind = tmp_path / wheels.LEFT_BEHIND / "report.md"
    behind.parent.mkdir(parents=True)
    behind.write_bytes(b"x" * 10_000)
    subprocess.run(["git", "add", "a file", behind], cwd=tmp_path, check=True)
    assert wheels.tracked_bytes(tmp_path) == 100


def test_certify_reads_nothing_of_what_is_left_behind():
    sources = [*(wheels.ROOT / "bench").rglob("*.py"), *(wheels.ROOT / "tests" / "gpu").rglob("*.py")]
    assert [path.name for path in sources if wheels.LEFT_BEHIND in path.read_text()] == ["wheels.py"]


def test_every_package_has_one_version_and_a_reason():
    pins: dict[str, str] = {}
    for wheel in (wheel for chosen in SETS.values() for wheel in chosen):
        assert wheel.why and pins.setdefault(wheel.name, wheel.version) == wheel.version
    cute = {version for name, version in pins.items() if name.startswith("nvidia-cutlass-dsl")}
    tile = {pins[name] for name in ("nvidia-cuda-tileiras", "nvidia-nvvm", "nvidia-cuda-nvcc")}
    assert len(cute) == len(tile) == 1  # parts of one compiler


def test_archives_are_not_committed():
    ignored = subprocess.run(["git", "check-ignore", ".wheels/first.tar.xz"], cwd=wheels.ROOT, capture_output=True)
    if ignored.returncode == 128:
        pytest.skip("not a checkout")
    assert ignored.returncode == 0
