"""The Python blocks of a page of documentation, run as a reader would paste them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python_blocks(page: str, at_least: int, **given) -> dict:
    """Runs every block of a page of the source tree, in order, in one namespace, which begins as `given` and is returned."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= at_least
    namespace = dict(given)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, Python block {number}", "exec"), namespace)
    return namespace
