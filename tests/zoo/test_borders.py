"""Mixers whose kernels are told where rows begin: rows packed through them are what they are alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from tests.trainer.training.test_probe import losses, trained
from tests.zoo import faith, kernels
from tests.zoo.families import FAMILIES, build

from ftlaunch.errors import UserError
from fttrain.data.segments import Segments
from fttrain.data.token_set import Group
from fttrain.model import borders

NEAR = 1e-5
"""Δ log p of any token, in nats; gradient norms are compared in relation to their size."""
KEPT_APART = ["bamba", "falcon_h1", "mamba2", "qwen3_next", "kimi_linear", "lfm2"]
"""Mamba-2 next to attention, in one layer with it and alone; the delta rule with two kinds of gates; convolutions."""


@contextmanager
def kernels_of(name: str, *packages: str) -> Iterator[None]:
    kind, _ = FAMILIES[name]
    modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
    with kernels.installed(modeling, set(packages or kernels.PACKAGES)):
        yield


@pytest.mark.parametrize("name", KEPT_APART)
def test_rows_are_packed_where_kernels_are_told_of_their_borders(name: str, tmp_path: Path):
    model, rows = build(name, tmp_path), faith.rows()
    expected = faith.plain(model, rows)
    with kernels_of(name):
        found = faith.trained(model, [Group((row,)) for row in rows], packing=True)
        with pytest.raises(UserError, match="no prompt can be shared"):
            faith.trained(model, faith.pairs(), packing=True, share=True)
    assert float((found.logps_N - expected.logps_N).abs().max()) <= NEAR
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=NEAR)


@pytest.mark.parametrize(
    ("name", "packages", "why"),
    [
        ("bamba", ["causal_conv1d"], "BambaMixer.*: without mamba-ssm nothing keeps rows apart"),
        ("qwen3_next", ["fla"], "GatedDeltaNet.*: without causal-conv1d nothing keeps rows apart"),
        ("jamba", ["causal_conv1d", "mamba_ssm"], "JambaMambaMixer.*: its kernels take no borders of rows"),
    ],
)
def test_rows_are_not_packed_where_a_kernel_is_missing_or_takes_no_borders(
    name: str, packages: list[str], why: str, tmp_path: Path
):
    model, groups = build(name, tmp_path), [Group((row,)) for row in faith.rows()]
    with kernels_of(name, *packages), pytest.raises(UserError, match=why):
        faith.trained(model, groups, packing=True)


def test_a_stage_packs_such_rows_and_finds_out_where_borders_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build("bamba", tmp_path / "model")
    for folder in ("packed", "lost", "plain"):
        (tmp_path / folder).mkdir()
    with kernels_of("bamba"):
        packed, done = trained(model, tmp_path / "packed", kind="dpo", activation_checkpointing=True)
        sound = borders.told
        monkeypatch.setattr(borders, "told", lambda of, rows: sound(of, Segments.of([rows.tokens], rows.device)))
        lost, its = trained(model, tmp_path / "lost", kind="dpo")
    plain, plainly = trained(model, tmp_path / "plain", kind="dpo")
    assert (packed["layout"], packed["share_prompt"]) == ("packed", False)
    assert (lost["layout"], plain["layout"]) == ("padded", "padded")
    assert "padded instead of packed, as packed rows give other results than single rows" in lost["warnings"][-1]
    assert losses(done) == pytest.approx(losses(plainly), abs=NEAR)
    assert losses(its) == pytest.approx(losses(plainly), abs=NEAR)
