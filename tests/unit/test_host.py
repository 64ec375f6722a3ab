"""The process behind an actor: which bases it keeps."""

from pathlib import Path

import pytest

from tests.tiny import make_base
from translora.config import BaseModelConfig
from translora.engine.host import EngineHost, base_bytes
from translora.engine.transformers import TransformersEngine


def count_slots(engine: TransformersEngine, rows: list[dict[str, object]], _: dict[str, object]) -> list[dict]:  # type: ignore[type-arg]
    return [{**row, "engine": id(engine)} for row in rows]


def test_bases_stay_resident_as_long_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = [BaseModelConfig(model=str(make_base(tmp_path / n, seed=i))).model_dump() for i, n in enumerate("ab")]
    own = EngineHost(1, 1)

    def engine_of(base: dict[str, object]) -> object:
        return own.run(base, {}, count_slots, [{}], {})[0]["engine"]

    first = [engine_of(base) for base in bases]
    assert [engine_of(base) for base in bases] == first and len(own.engines) == 2
    size = base_bytes(BaseModelConfig.model_validate(bases[0]))
    monkeypatch.setattr(EngineHost, "_free_bytes", lambda _: 2 * size - 1)
    own.engines.clear()
    engine_of(bases[0]), engine_of(bases[1])
    assert len(own.engines) == 1, "the second takes more than half of what is free: the first had to go"


def test_the_size_of_a_base_is_that_of_its_weights(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base")
    on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    wide, narrow = (base_bytes(BaseModelConfig(model=str(path), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert wide == 2 * narrow and 0 <= on_disk - wide < 20_000
