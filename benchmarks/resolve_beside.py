"""Which trainers can be installed beside trimtab's core, and beside its own trainers: writes the table in docs/beside.md.

    python benchmarks/resolve_beside.py

Nothing is installed: uv (pip install uv) resolves each pair against the registry.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "beside.md"
TRAINERS = ("axolotl", "unsloth", "llamafactory", "ms-swift", "verl", "openrlhf")
SHOWN = ("torch", "transformers", "trl", "peft")
BEGIN, END = "<!-- resolved -->", "<!-- /resolved -->"


def resolve(wanted: list[str]) -> dict[str, str] | str:
    """Package -> version of a resolution; the reason where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wanted.in"
        file.write_text("\n".join(wanted), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-header",
            "--no-annotate",
            "--python-version",
            "3.11",
        ]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        return done.stderr.strip()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, flags=re.MULTILINE))


def main() -> None:
    """Resolve all pairs and write the table."""
    lines = ["| trainer | beside the core | beside `trimtab[train]` |", "|---|---|---|"]
    newest = {trainer: resolve([trainer]) for trainer in TRAINERS}
    for trainer, alone in newest.items():
        assert isinstance(alone, dict), alone
        cells = []
        for extra in ("", "[train]"):
            # of the very release that stands alone: an older one that pins nothing would always do
            found = resolve([f"trimtab{extra} @ file://{ROOT}", f"{trainer}=={alone[trainer]}"])
            if isinstance(found, str):
                cells.append("no")
            else:
                cells.append(f"yes: {', '.join(f'{name} {found[name]}' for name in SHOWN if name in found)}")
        lines.append(f"| {trainer} {alone[trainer]} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python 3.11:", "", *lines])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
