"""misfit: the base that an adapter was not trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapter.making import Q, V, pair, write_adapter, write_base
from tests.tiny_models import TinyRun, build_base
from tunesmith.adapter import Adapter, misfit
from tunesmith.checkpoint import Checkpoint
from tunesmith.report import LANGUAGES, finding_text

K = "model.layers.1.self_attn.k_proj"
ADAPTED = {**pair(Q), **pair(V), **pair(K, outputs=2)}
SHAPES = {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6), f"{K}.weight": (2, 6)}


def test_a_base_that_fits_gives_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    """A real pair, and a written one."""
    assert misfit(Adapter(tiny.adapters["final"]), Checkpoint(tiny.base)) == []
    base = write_base(tmp_path / "base", SHAPES)
    assert misfit(Adapter(write_adapter(tmp_path / "a", ADAPTED)), Checkpoint(base)) == []


def test_a_wider_base_is_named_with_both_shapes(tmp_path: Path) -> None:
    """The same family, another size: every name is there and no shape is right."""
    shapes = {name: (2 * rows, 2 * columns) for name, (rows, columns) in SHAPES.items()}
    base = write_base(tmp_path / "base", shapes, hidden_size=12, num_hidden_layers=2)
    (finding,) = misfit(Adapter(write_adapter(tmp_path / "a", ADAPTED)), Checkpoint(base))
    assert (finding.code, finding.severity) == ("base_does_not_fit", "error")
    assert finding.params == {
        "count": 3,
        "total": 3,
        "absent": 0,
        "misshapen": 3,
        "names": f"{Q}, {V}, {K}",
        "shapes": f"{Q}: 4×6, 8×12",
        "named": "org/base",
        "width": 6,
        "layers": 2,
        "base_width": 12,
        "base_layers": 2,
    }
    for lang in LANGUAGES:
        assert "4×6, 8×12" in finding_text(finding, lang)


def test_what_a_shallower_base_lacks_is_counted_apart(tmp_path: Path) -> None:
    """One layer is missing, the others are right."""
    shapes = {name: shape for name, shape in SHAPES.items() if ".1." not in name}
    base = write_base(tmp_path / "base", shapes, hidden_size=6, num_hidden_layers=1)
    (finding,) = misfit(Adapter(write_adapter(tmp_path / "a", ADAPTED)), Checkpoint(base))
    assert {key: finding.params[key] for key in ("absent", "misshapen", "layers", "base_layers", "shapes")} == {
        "absent": 1,
        "misshapen": 0,
        "layers": 2,
        "base_layers": 1,
        "shapes": None,
    }
    assert str(finding.params["names"]).startswith(K)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_key_value_heads": 1}, {"num_hidden_layers": 1}])
def test_real_models_of_another_form_do_not_fit(tiny: TinyRun, tmp_path: Path, change: dict[str, int]) -> None:
    """Narrower, with fewer key heads, shallower: each is told."""
    build_base(tmp_path / "other", **change)
    (finding,) = misfit(Adapter(tiny.adapters["final"]), Checkpoint(tmp_path / "other"))
    assert finding.params["count"]
    assert finding.params["width"] == Checkpoint(tiny.base).config["hidden_size"]


def test_an_adapter_that_cannot_be_merged_is_looked_at_all_the_same(tmp_path: Path) -> None:
    """What is refused may also be on the wrong base."""
    base = write_base(tmp_path / "base", {"other.weight": (4, 6)})
    assert misfit(Adapter(write_adapter(tmp_path / "a", use_qalora=True)), Checkpoint(base))
