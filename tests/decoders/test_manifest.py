"""Artifacts appear whole or not at all, and are remade when their inputs change."""

from pathlib import Path
from typing import Any

import pytest

from memdec.decoders.manifest import Bookmark, is_fresh, read_manifest, stage
from memdec.decoders.reading.errors import ManifestError


def make(out: Path, inputs: dict[str, Any], text: str) -> bool:
    """Make a one-file artifact; returns whether it was made now."""
    with stage(out, inputs) as folder:
        if folder is None:
            return False
        (folder / "data.txt").write_text(text)
        return True


def test_fresh_artifacts_are_kept_and_stale_ones_replaced(tmp_path: Path) -> None:
    """By their inputs, not by time."""
    out = tmp_path / "artifact"
    assert make(out, {"seed": 1}, "old")
    assert not make(out, {"seed": 1}, "never written")
    assert make(out, {"seed": 2}, "new")
    assert (out / "data.txt").read_text() == "new"
    assert read_manifest(out)["inputs"] == {"seed": 2}


def test_a_stage_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """No half-written artifact, no leftovers."""
    out = tmp_path / "artifact"
    make(out, {"seed": 1}, "old")
    with pytest.raises(TypeError), stage(out, {"seed": 2}) as folder:
        (folder / "data.txt").write_text(b"not text")  # type: ignore
    assert (out / "data.txt").read_text() == "old"
    assert is_fresh(out, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """An OSError while writing names the file and keeps nothing."""
    with pytest.raises(ManifestError, match="No space left"), stage(tmp_path / "artifact", {}):
        raise OSError(28, "No space left on device", "data.npy")
    assert list(tmp_path.iterdir()) == []


def run_out_of_space(out: Path, inputs: dict[str, Any], rows: int) -> None:
    """Begin a stage, move its bookmark, meet a full disk."""
    with stage(out, inputs) as folder:
        assert folder is not None
        Bookmark(folder, "rows").move(rows=rows)
        raise OSError(28, "No space left on device", "data.npy")


def test_progress_outlives_a_full_disk_and_a_kill(tmp_path: Path) -> None:
    """With a bookmark the partial folder stays, and a run from the same inputs goes on in it; one from others starts anew."""
    out = tmp_path / "artifact"
    for seed in (1, 2):
        with pytest.raises(ManifestError, match="run the same command again to go on"):
            run_out_of_space(out, {"seed": seed}, 5 * seed)
    with stage(out, {"seed": 2}) as folder:
        assert folder is not None
        assert Bookmark(folder, "rows").place == {"rows": 10}
        (folder / "data.txt").write_text("whole")
    with stage(tmp_path / "other", {"seed": 2}) as folder:
        assert folder is not None
        assert Bookmark(folder, "rows").place == {}
    assert sorted(p.name for p in out.iterdir()) == ["data.txt", "manifest.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "other"]


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    """Whatever isn't an artifact is refused by name, and stays."""
    for name in ("folder", "file"):
        thesis = tmp_path / name / "thesis.txt" if name == "folder" else tmp_path / name
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("years of work")
        with pytest.raises(ManifestError, match="give a new folder"):
            make(tmp_path / name, {"seed": 1}, "new")
        assert thesis.read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty", {"seed": 1}, "new")


def test_reading_what_is_no_artifact(tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(tmp_path)
