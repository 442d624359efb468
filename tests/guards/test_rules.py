"""Every rule can be met, is tested, and is documented."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from svdtune.guards.catalog import RULES, TOPICS

REPO = Path(__file__).parents[2]
SOURCES = "\n".join(p.read_text() for p in (REPO / "svdtune" / "guards").rglob("*.py") if p.name != "catalog.py")
TESTS = "\n".join(
    p.read_text() for kind in ("*.py", "*.tsv") for p in (REPO / "tests").rglob(kind) if p != Path(__file__)
)


@pytest.mark.parametrize("code", RULES)
def test_every_rule_is_used_and_tested(code):
    assert RULES[code].code == code
    assert code[:3] in TOPICS
    assert f'"{code}"' in SOURCES, f"no check emits {code}"
    assert code in TESTS, f"no test names {code}"


def test_every_code_in_the_checks_has_a_rule():
    used = set(re.findall(r'"((?:' + "|".join(TOPICS) + r')\d{3})"', SOURCES))
    assert used <= RULES.keys()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
def test_every_rule_is_told_in_full(rule):
    for text in (rule.title, rule.why, rule.fix):
        assert text.strip()
    assert not rule.title.endswith(".")
    assert rule.why.endswith((".", '".', '."'))
    assert rule.fix.endswith(".")


def test_the_page_in_docs_is_the_catalog():
    script = runpy.run_path(str(REPO / "scripts" / "render_rules.py"))
    assert (REPO / "docs" / "rules.md").read_text() == script["render"](), "run python scripts/render_rules.py"
