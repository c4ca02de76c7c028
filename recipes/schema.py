"""The recipe: one YAML file, one job. Sections model, axis, floor, data, method, lora, train, eval.

``train`` goes verbatim to the TRL config of the method and ``lora`` to PEFT's LoraConfig, so their keys are those libraries'
own; the loader checks them against those classes' fields without importing the heavy libraries.

A key that a recipe leaves out has the value that was measured, which SmolLM2's recipes give it. Defaults that differ by method
stand on its class in :mod:`trimtab.recipes.methods`; ``tests/recipes/test_defaults.py`` holds recipes, trainers and losses to
them. What depends on the model, such as its window, is chosen by a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trimtab.recipes.methods import DEFAULT_METHOD, METHODS, AnyMethod, SftMethod
from trimtab.recipes.sections import (
    HEAVIEST,
    ONLY_ASKING,
    AnswerSampling,
    DataSection,
    JudgeSection,
    Name,
    NotNegative,
    Positive,
    Sampling,
    Section,
    Seed,
)

MOST_LAYERS = 10_000  # more than any model has: a slip in a range must not fill the memory


def layer_range(text: str) -> list[int]:
    """Layers as people write them: ``46-53`` (both ends included), ``20,22,25``, or both: ``3,20-25``.

    Raises:
        ValueError: if it is not that, or more than :data:`MOST_LAYERS`.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else not last) and len(first + last) < 20):
            raise ValueError(f"these are not layers, {text!r}: write 46-53 or 20,22,25")
        start, end = int(first), int(last or first)
        if end < start:
            raise ValueError(f"these are not layers, {part!r} ends before it begins: write 46-53 or 20,22,25")
        if end - start + len(found) >= MOST_LAYERS:
            raise ValueError(
                f"more than {MOST_LAYERS:,} layers are named: write a window's first and last, such as 46-53"
            )
        found += range(start, end + 1)
    return found


class ModelSection(Section):
    """Which chat model, and how it is loaded."""

    name: Name
    revision: Name | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|mps|xpu|npu|hpu)(:[0-9]{1,3})?)$")] = "auto"
    attn_implementation: Name | None = None
    quantization: Literal["nf4", "int8"] | None = None
    chat_template_kwargs: dict[str, Any] = {}


def deciding(value: Any) -> Any:
    """A section's plain data without what says only how a judge or a simulated user is asked, at any depth.

    After an outage it may be asked more patiently, and what it said before still stands.
    """
    if isinstance(value, list):
        return [deciding(part) for part in value]
    if not isinstance(value, dict):
        return value
    judge = value.keys() >= {"endpoint", "model", "max_tokens"}  # a judge's, of this version or of one with fewer keys
    return {key: deciding(part) for key, part in value.items() if not (judge and key in ONLY_ASKING)}


class AxisSection(Section):
    """Where the axis comes from: a file, or extraction by role rollouts."""

    path: Name | None = None
    roles: Positive = 40
    held_out_roles: NotNegative = 20
    questions: Positive = 8
    default_repeats: Annotated[int, Field(gt=0, le=1000)] = 8
    min_per_role: Positive = 1
    seed: Seed = 0
    sampling: Sampling = Sampling()
    judge: JudgeSection | None = None


class FloorSection(Section):
    """Where the floor comes from: a file, or calibration on the axis rollouts."""

    path: Name | None = None
    experiment: Name | None = None
    layers: list[NotNegative] | Literal["auto"] = "auto"
    percentile: float = Field(default=75.0, gt=0, lt=100)
    pool: Positive = 160
    drift_rows: Positive = 64
    min_firing: float = Field(default=0.15, ge=0, le=1)
    batch_size: Positive = 16
    control_seed: Seed = 17

    @field_validator("layers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """Accept ``46-53`` (both ends included) for a window."""
        return layer_range(value) if isinstance(value, str) and value != "auto" else value

    @model_validator(mode="after")
    def _file(self) -> FloorSection:
        if self.experiment is not None and self.path is None:
            raise ValueError("experiment names an entry of a capping_config.pt: set floor.path to that file as well")
        return self


LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}


def with_lora_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``lora`` section, whole; ``lora_alpha`` is twice the rank, so that another rank leaves the scale as it is."""
    found = {**LORA_DEFAULTS, **given}
    rank = found["r"]
    return {"lora_alpha": 2 * rank, **found} if isinstance(rank, int) and rank > 0 else found


# Durability runs that bring their rows, and what they set.
SHIPPED_TUNINGS: dict[str, dict[str, Any]] = {
    "benign": {},
    "long": {"epochs": 5},
    "persona": {"rows": 32, "epochs": 4, "batch_size": 8, "adversarial": True},
}


class DurabilityRun(Section):
    """A durability run: a later fine-tuning that the effect should survive.

    Those of :data:`SHIPPED_TUNINGS` bring their rows, others a file.

    ``long`` is ``benign`` several times over. ``persona`` is adversarial: a few in-character answers, several times over.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    file: Name | None = None
    rows: Positive = 214
    epochs: Positive = 1
    batch_size: Positive = 16
    learning_rate: float = Field(default=2e-4, gt=0, le=HEAVIEST)
    adversarial: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A bare name is the shipped one."""
        given = {"name": value} if isinstance(value, str) else value
        name = given.get("name") if isinstance(given, dict) else None
        return {**SHIPPED_TUNINGS[name], **given} if isinstance(name, str) and name in SHIPPED_TUNINGS else given

    @model_validator(mode="after")
    def _rows_from_somewhere(self) -> DurabilityRun:
        if self.file is None and self.name not in SHIPPED_TUNINGS:
            raise ValueError(
                f"file is missing: give it a file of rows; only {', '.join(SHIPPED_TUNINGS)} bring their own"
            )
        return self


class EvalSection(Section):
    """What is measured, and how much. ``tuned`` stands in the place of the run's own adapter: any adapter or model.

    As much as ``smollm2-135m/sft`` measures, but for its control, which trains twice, and its tasks, which need lm-eval.
    """

    tuned: Name | None = None
    split: Literal["dev", "test"] = "dev"
    roles: Positive = 66
    questions: Positive = 3
    conversations: NotNegative = 16
    turns: Positive = 8
    conversations_file: Name | None = None
    benign: Positive = 48
    benign_systems: NotNegative = 48
    lookalikes: NotNegative = 16
    professional: NotNegative = 36
    second_reader: Name | None = None
    sampling: AnswerSampling = AnswerSampling()
    reextract_roles: NotNegative = 20
    reextract_questions: Positive = 4
    probe_rows: NotNegative = 128
    judge: JudgeSection | None = None
    simulated_users: NotNegative = 0
    simulated_turns: Positive = 15
    user: JudgeSection | None = None
    susceptibility_roles: NotNegative = 0
    boundary_probes: NotNegative = 0
    boundary_file: Name | None = None
    capability: list[Name] = []
    capability_limit: Positive | None = None
    capability_folder: Name | None = None
    capability_batch: Positive = 16
    durability: list[DurabilityRun] = []
    control: bool = False
    tuned_cap: bool = True
    bootstrap: Annotated[int, Field(ge=200, le=100_000)] = (
        5000  # of fewer, the ends of an interval are one resample's or two's
    )
    transcripts: NotNegative = 12
    case_studies: NotNegative = 0
    seed: Seed = 1000


class Recipe(Section):
    """A whole job."""

    model: ModelSection
    axis: AxisSection = AxisSection()
    floor: FloorSection = FloorSection()
    data: DataSection = DataSection()
    method: Annotated[AnyMethod, Field(discriminator="name")] = SftMethod()
    lora: dict[str, Any] = {}
    train: dict[str, Any] = {}
    eval: EvalSection = EvalSection()

    @property
    def row_length(self) -> int | None:
        """The longest row that is trained on, in tokens; None for any."""
        return self.method.row_length(self.train)

    @field_validator("method", mode="before")
    @classmethod
    def _default_method(cls, value: Any) -> Any:
        """A method section without a name is SFT's."""
        return {"name": DEFAULT_METHOD, **value} if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, value: Any) -> Any:
        """Fill in what the recipe leaves out and the method decides."""
        if not isinstance(value, dict):
            return value
        section = value.get("method", {})
        method = section.get("name", DEFAULT_METHOD) if isinstance(section, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            return value
        kind = METHODS[method]
        whole: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "train": kind.whole_train,
            "lora": with_lora_defaults,
            "data": lambda given: {"benign_share": kind.benign_share, **given},
        }
        sections = {name: value.get(name, {}) for name in whole}
        return value | {name: whole[name](given) for name, given in sections.items() if isinstance(given, dict)}
