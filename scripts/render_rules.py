"""Writes docs/rules.md from guards/catalog.py: python scripts/render_rules.py"""

from itertools import groupby
from pathlib import Path

from svdtune.guards.catalog import RULES, TOPICS

TARGET = Path(__file__).parents[1] / "docs" / "rules.md"
HEAD = """# Every rule that preflight, explain and trace can name

Generated from `svdtune/guards/catalog.py` by `python scripts/render_rules.py`; a test compares. `svdtune explain CODE` prints
one. `preflight.ignore: [CODE]` in a config silences one, visibly.
"""


def render() -> str:
    """The page: one section per topic, one paragraph per rule."""
    sections = [HEAD]
    for topic, rules in groupby(sorted(RULES.values(), key=lambda rule: rule.code), key=lambda rule: rule.code[:3]):
        sections.append(f"## {topic}: {TOPICS[topic]}\n")
        sections += [f"**{rule.code}** {rule.title}. {rule.why}\n*Fix:* {rule.fix}\n" for rule in rules]
    return "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(render())
