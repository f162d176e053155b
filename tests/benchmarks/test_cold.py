"""Seconds to compile."""

from pathlib import Path
from typing import Any

from bench import cold, documents


def test_seconds_to_compile_are_taken_from_both_ways_in_each_round(tmp_path: Path, monkeypatch: Any) -> None:
    seconds = iter([99.0, 10.0, 11.0, 4.0, 2.0, 18.0, 20.0, 6.0, 4.0])  # the first is not counted; the order alternates
    monkeypatch.setattr(cold, "compile_seconds", lambda model, inputs: next(seconds))
    document = cold.run(["tiny"], 64, 2, tmp_path / "cold.json")
    assert document["models"]["tiny"]["default"] == {"stock": [10.0, 20.0], "tome_fx": [11.0, 18.0]}
    assert document["models"]["tiny"]["regional"] == {"stock": [4.0, 4.0], "tome_fx": [2.0, 6.0]}
    assert documents.read(tmp_path / "cold.json") == document
    lines = cold.table(document).splitlines()
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row == ["tiny", "whole", "15.0", "14.5", "1.00x", "0.90 - 1.10", "2"]
    assert "block by block" in lines[3]
