"""The demo: what it counts, and pictures."""

from pathlib import Path
from typing import Any

import pytest

from bench import demo, models, runs, shapes, viz


@pytest.mark.slow
def test_the_demo_counts_compiles_of_a_sweep() -> None:
    first, again = demo.sweep("tome_fx+compile", models.build("tiny"))
    assert (first, again) == (len(demo.RATIOS), 0)


def test_the_demo_pictures_no_variant_that_failed_and_puts_the_unet_back(tmp_path: Path, monkeypatch: Any) -> None:
    pipe = shapes.pipeline()
    own, prepare = pipe.unet, runs.prepare
    columns: dict[str, Any] = {}

    def eager(name: str, unet: Any, **options: Any) -> Any:
        if name.startswith("tomesd"):
            raise RuntimeError("no such variant")
        return prepare("tome_fx" if name.startswith("tome_fx") else "sdpa", unet, **options)

    monkeypatch.setattr(shapes, "pipeline", lambda: pipe)
    monkeypatch.setattr(demo, "prepare", eager)
    monkeypatch.setattr(demo, "sweep", lambda name, unet: (0, 0))
    monkeypatch.setattr(viz, "grid", lambda path, images, rows: columns.update(images))
    monkeypatch.setattr(demo, "LATENTS", 16)
    document = demo.run(1, 1, 1, tmp_path / "demo.json")
    assert list(columns) == ["sdpa, ratio 0", "tome_fx, ratio 0.5"]
    assert all(images[0].shape == (3, 128, 128) for images in columns.values())
    assert document["rows"]["tomesd+compile"]["error"] == "RuntimeError: no such variant"
    assert pipe.unet is own
