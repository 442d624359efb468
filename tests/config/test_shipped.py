"""Everything under configs/: nothing is shipped that does not load, and the editors' schema is the schema."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest

from svdtune.config import schema
from svdtune.config.json_schema import json_schema
from svdtune.config.load import load_config, option_types

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
RUNS = [path for path in SHIPPED if path.parent == CONFIGS]


def test_the_promised_configs_are_there() -> None:
    names = {str(path.relative_to(CONFIGS)) for path in SHIPPED}
    assert names >= {"tiny.yaml", "svd_lora.yaml", "svd_temporal.yaml", "svd_xt_lora.yaml", "svd_xt_full.yaml"}
    assert names >= {"accelerate/single.yaml", "accelerate/multi_gpu.yaml"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_it_loads_under_its_own_name(path: Path) -> None:
    config = load_config(path)
    assert config.run.name == path.stem.replace("_", "-")
    frames = 25 if "xt" in path.stem else 14
    if path.stem != "tiny":
        assert (config.data.num_frames, config.data.height, config.data.width) == (frames, 576, 1024)
        assert config.objective.p_mean == {14: 0.7, 25: 1.0}[frames]
        assert config.model.pretrained.endswith("-xt") == (frames == 25)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_it_says_who_it_is_for_and_what_it_needs(path: Path) -> None:
    first, *comments = path.read_text().splitlines()[:4]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert comments[0].startswith("# For ")
    assert any("Needs" in line or "GB" in line for line in comments)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single" else 2)
    assert config.mixed_precision is None, "train.precision decides"


def test_the_committed_json_schema_is_current() -> None:
    committed = json.loads((CONFIGS / "schema.json").read_text())
    assert committed == json.loads(json.dumps(json_schema())), "svdtune config schema > configs/schema.json"


def test_every_option_is_described_and_closed() -> None:
    result = json_schema()
    for section in ("Run", "Data", "Train", "Validation"):
        assert result["$defs"][section]["additionalProperties"] is False
    described = {
        f"{name.lower()}.{option}"
        for name, definition in result["$defs"].items()
        for option, property_ in definition["properties"].items()
        if property_.get("description")
    }
    assert described == set(option_types())
    assert result["$defs"]["Data"]["properties"]["resize"]["enum"] == ["cover", "pad", "squash"]


def test_range_messages_start_with_an_option() -> None:
    """The loader finds the line of a message by its beginning; a key that does not exist has no line."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(schema))) if isinstance(node, ast.Call)]
    checks = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "_require"]
    keys = [call.args[1].value for call in checks if isinstance(call.args[1], ast.Constant)]
    assert len(keys) >= 20
    assert set(keys) <= set(option_types())
