"""The installed mlx-lm is one that was tested, and has all that the package takes from inside it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import families
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn import lm
from ringattn.lm import mlx_lm_compat as compat
from ringattn.lm.sharding.layer_adapters import ADAPTERS, INDEXER
from ringattn.lm.sharding.patch_points import METHODS

ROOT = Path(__file__).parents[2]
DOCUMENTED = {"mlx_lm", "mlx_lm.sample_utils"}


def test_the_installed_version_was_tested() -> None:
    problem = compat.version_problem()
    if problem is not None:
        pytest.fail(problem, pytrace=False)


def test_the_installed_version_has_every_name() -> None:
    missing = compat.missing_names()
    if missing:
        pytest.fail(f"mlx-lm lacks what ringattn/lm/mlx_lm_compat.py expects: {'; '.join(missing)}", pytrace=False)


@pytest.mark.parametrize("family, key", [("gemma2", *ADAPTERS), ("deepseek_v32", INDEXER)])
def test_the_adapted_layers_have_every_attribute(family: str, key: tuple[str, str]) -> None:
    layer = families.build(family).layers[0].self_attn
    layer = getattr(layer, "indexer", layer)
    assert (type(layer).__module__, type(layer).__name__) == key
    assert [name for name in compat.LAYERS[key] if not hasattr(layer, name)] == []


def test_the_caches_and_the_tokenizer_have_their_attributes() -> None:
    rotating = compat.RotatingKVCache(8)
    assert (rotating.keep, rotating.max_size, rotating.keys, rotating.values) == (0, 8, None, None)
    assert families.words().has_chat_template is False


def test_every_adapted_layer_is_described() -> None:
    assert {*ADAPTERS, INDEXER} == set(compat.LAYERS)


def test_every_replaced_method_is_described() -> None:
    assert METHODS.keys() <= compat.METHODS


def test_a_missing_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.IMPORTED, "Nothing", "mlx_lm.generate")
    monkeypatch.setitem(compat.PARAMETERS, "generate_step", ("depth",))
    monkeypatch.setitem(compat.ATTRIBUTES, "KVCache", ("left",))
    monkeypatch.setitem(compat.LAYERS, ("mlx_lm.models.none", "Attention"), ())
    monkeypatch.setattr(compat, "METHODS", {("mlx_lm.models.llama", "Attention", "wave")})
    assert set(compat.missing_names()) == {
        "Nothing in mlx_lm.generate",
        "parameter depth of generate_step",
        "attribute left of KVCache",
        "Attention in mlx_lm.models.none",
        "Attention.wave in mlx_lm.models.llama",
    }


def test_the_bound_is_that_of_the_extra() -> None:
    (requirement,) = re.findall(r'^lm = \["(mlx-lm[^"]*)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requirement == f"mlx-lm>={compat.OLDEST},<{compat.BOUND}"


@pytest.mark.parametrize(
    "found, tested",
    [("0.32.2", True), ("0.32.10", True), ("0.32.1", False), ("0.33", False), ("0.33.0.dev1", False), ("1.0", False)],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, found: str, tested: bool) -> None:
    monkeypatch.setattr(compat, "version", lambda _: found)
    problem = compat.version_problem()
    assert (problem is None) == tested
    if problem is not None:
        assert problem.startswith(f"mlx-lm {found} is installed") and "\n" not in problem
        assert "pip install 'mlx-lm>=0.32.2,<0.33'" in problem


def test_load_warns_of_an_untested_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compat, "version", lambda _: "0.34.0")
    with pytest.warns(lm.VersionWarning, match=r"^mlx-lm 0.34.0 is installed, and ringattn was tested with [^\n]*$"):
        lm.load(families.save(tmp_path))


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_other_modules_use_the_documented_interface_alone() -> None:
    for path in (ROOT / "ringattn" / "lm").rglob("*.py"):
        inside = {name for name in imported(path) if name.split(".")[0] == "mlx_lm"} - DOCUMENTED
        assert not inside, f"{path.name} imports {sorted(inside)}, expected mlx_lm_compat"
