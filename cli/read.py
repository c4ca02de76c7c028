"""``trimtab read``: blind reading, by people or large models: write sheets of answers, and take the labels back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.files import write_json
from trimtab.eval.answers.sheets import (
    PER_ARM,
    SEED,
    SUITE,
    check_sheet,
    draw_sheet,
    read_key,
    read_labels,
    sheet_files,
    write_sheet,
)
from trimtab.eval.report.blind import blind_markdown, read_blind
from trimtab.eval.report.compare import load_runs


def read_command(
    runs: Sequence[Path],
    *,
    sheet: Path | None = None,
    per_arm: int | None = None,
    suite: str | None = None,
    seed: int | None = None,
    labels: Sequence[Path] | None = None,
    key: Path | None = None,
    json: Path | None = None,
) -> None:
    """The command ``trimtab read``: one of its two halves.

    Args:
        runs: run folders, or their ``report.json``.
        sheet: where to write a sheet for readers; its key and rubric come beside it.
        per_arm: answers of each arm.
        suite: which answers.
        seed: of the draw.
        labels: labelled sheets, one a reader.
        key: the sheet's key.
        json: also write everything that the labels gave.

    Raises:
        UserError: for whatever is wrong with the options or the files.
    """
    if (sheet is None) == (labels is None):
        raise UserError(
            "neither half is asked for" if sheet is None else "both halves are asked for",
            key="--sheet",
            remedy="give --sheet FILE to write a sheet, or --labels FILE ... --key FILE.key.json to take labels back",
        )
    if labels is None:
        assert sheet is not None
        _refuse({"--key": key, "--json": json}, "--labels")
        check_sheet(sheet)
        rows, made = draw_sheet(
            load_runs(runs),
            per_arm=PER_ARM if per_arm is None else per_arm,
            suite=SUITE if suite is None else suite,
            seed=SEED if seed is None else seed,
        )
        write_sheet(sheet, rows, made)
        for name, path in zip(("sheet", "key, not for the readers", "rubric"), sheet_files(sheet), strict=True):
            print(f"{name}: {path.resolve()}")
        return
    _refuse({"--per-arm": per_arm, "--suite": suite, "--seed": seed}, "--sheet")
    if key is None:
        raise UserError("the labels come without a key", key="--key", remedy="give the .key.json beside the sheet")
    held = read_key(key)
    reports = load_runs(runs)
    reading = read_blind(held, read_labels(labels, held, reports), reports)
    if json is not None:
        write_json(json, reading.model_dump())
    print(blind_markdown(reading), end="")


def _refuse(options: Mapping[str, Any], half: str) -> None:
    """Refuse options that would do nothing."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} does nothing here", key=option, remedy=f"leave it out, or give {half}")
