"""The Hugging Face model card of an adapter: front matter, verdict, before/after table, use and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from trimtab.eval.report.read_answers import rate_sentence
from trimtab.eval.schema import ARMS, Metric, Report, Retention
from trimtab.eval.wording import ARM_NAMES, STATUS_DOTS, estimate_text, number, percent_text, real_minus

REQUIRED_FACTS = ("base_model", "license")
TAGS = ["activation-capping", "assistant-axis", "persona-drift", "lora", "trimtab"]


def model_card(report: Report, *, adapter_facts: Mapping[str, Any], trained_here: bool = True) -> str:
    """Markdown with YAML front matter for the adapter folder's ``README.md``.

    Args:
        report: the evaluated report.
        adapter_facts: ``base_model`` (hub id or path) and ``license`` (hub identifier) are needed; every other entry
            (``method``, ``r``, ``target_modules``, ...) is listed under *How it was made*.
        trained_here: whether a recipe trained the weights; of weights from elsewhere the card says only what was measured.

    Raises:
        ValueError: if ``base_model`` or ``license`` is missing.
    """
    missing = [key for key in REQUIRED_FACTS if not adapter_facts.get(key)]
    if missing:
        raise ValueError(f"adapter_facts lacks {', '.join(missing)}")
    facts = _bullets([f"{key}: {_plain(value)}" for key, value in adapter_facts.items() if key not in REQUIRED_FACTS])
    front = {
        "license": adapter_facts["license"],
        "base_model": adapter_facts["base_model"],
        **({"library_name": "peft"} if trained_here else {}),
        "pipeline_tag": "text-generation",
        "tags": TAGS if trained_here else [tag for tag in TAGS if tag != "lora"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {report.title}",
        (
            "A LoRA adapter trained with activation capping in the loop, so that the model keeps its Assistant persona "
            "**without** any hook at inference."
            if trained_here
            else "Weights from elsewhere, measured without any hook against their base under the Assistant-axis cap."
        ),
        f"**{real_minus(report.verdict.headline)}** (verdict: {STATUS_DOTS[report.verdict.status]} {report.verdict.status})",
        _decided(report),
        rate_sentence(report.metrics) or "",
        _bullets(report.verdict.points),
        "## Before and after",
        _metrics_table(report.metrics),
        (
            "Values with 95 % intervals. Retention = (tuned − base) / (base+cap − base): 0 % = nothing is kept, "
            "100 % = the hook is no longer needed."
        ),
        "## Side effects",
        _side_effects_table(report),
        *(
            ["## Use", _usage(str(adapter_facts["base_model"])), "## How it was made"]
            if trained_here
            else ["## What it is"]
        ),
        facts,
        (
            "`floor.safetensors` beside the adapter holds the floor it was trained with; nothing needs it at inference."
            if trained_here
            else ""
        ),
        "## Limits",
        "The axis is about persona drift, not about all misalignment.",
        _bullets([*report.warnings, *(f"Does not compare: {line}" for line in report.does_not_compare)]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _decided(report: Report) -> str:
    names = [claim.name for claim in report.claims if claim.id in report.verdict.decided_by]
    return real_minus(f"Decided by: {'; '.join(names)}.") if names else ""


def _metrics_table(metrics: list[Metric]) -> str:
    if not metrics:
        return "Nothing was measured."
    arms = [arm for arm in (*ARMS, "control") if any(arm in metric.arms for metric in metrics)]
    rows = [["metric", *(ARM_NAMES[arm] for arm in arms), "retention", "random-direction control"]]
    for metric in metrics:
        name = f"{metric.name} ({metric.unit}; {metric.toward_assistant} is more Assistant)"
        values = [_arm(metric, arm) for arm in arms]
        rows.append([name, *values, _retention(metric.retention), _retention(metric.control_retention)])
    return _table(rows)


def _arm(metric: Metric, arm: str) -> str:
    estimate = metric.arms.get(arm)
    return f"{estimate_text(estimate)}, n = {estimate.n}" if estimate else "not measured"


def _retention(retention: Retention | None) -> str:
    if retention is None:
        return "not run"
    return percent_text(retention.estimate) if retention.estimate else f"undefined: {retention.why}"


def _side_effects_table(report: Report) -> str:
    if not report.side_effects:
        return "None was measured."
    marks = {True: "within", False: "**over**", None: "not judged"}
    rows = [["side effect", "value", "limit", "verdict"]]
    for effect in report.side_effects:
        limit = number(effect.limit) if effect.limit is not None else "none"
        value = f"{estimate_text(effect.estimate)}, n = {effect.estimate.n}"
        rows.append([f"{effect.name} ({effect.unit})", value, limit, marks[effect.ok]])
    return _table(rows)


def _usage(base_model: str) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base_model!r})
model = AutoModelForCausalLM.from_pretrained({base_model!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder")  # or .merge_and_unload()
```"""


def _table(rows: list[list[str]]) -> str:
    head, *body = [[" ".join(real_minus(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {real_minus(line)}" for line in lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
