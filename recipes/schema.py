"""The recipe: one YAML file, one job. Sections model, axis, floor, data, method, lora, train, eval.

``train`` goes verbatim to the TRL config of the method and ``lora`` to PEFT's LoraConfig, so their keys are those libraries'
own; the loader checks them against those classes' fields without importing the heavy libraries.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A section: unknown keys are errors, values keep their type."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Sampling(Section):
    """How answers are sampled."""

    max_new_tokens: Positive = 64
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    batch_size: Positive = 64


class ModelSection(Section):
    """Which chat model, and how it is loaded."""

    name: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    chat_template_kwargs: dict[str, Any] = {}


class JudgeSection(Section):
    """A role-adherence judge: an OpenAI-compatible endpoint (key in the environment variable), or a local model."""

    endpoint: str | None = None
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = Field(default=60.0, gt=0)
    retries: NotNegative = 3


class AxisSection(Section):
    """Where the axis comes from: a file, or extraction by role rollouts."""

    path: str | None = None
    roles: Positive = 40
    held_out_roles: NotNegative = 20
    questions: Positive = 8
    default_repeats: Positive = 8
    min_per_role: Positive = 1
    seed: int = 0
    sampling: Sampling = Sampling()
    judge: JudgeSection | None = None


class FloorSection(Section):
    """Where the floor comes from: a file, or calibration on the axis rollouts."""

    path: str | None = None
    experiment: str | None = None
    layers: list[NotNegative] | Literal["auto"] = "auto"
    percentile: float = Field(default=75.0, gt=0, lt=100)
    pool: Positive = 256
    drift_rows: Positive = 64
    min_firing: float = Field(default=0.15, ge=0, le=1)
    allow_inert: bool = False
    batch_size: Positive = 16
    control_seed: int = 17

    @field_validator("layers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """Accept ``46-53`` (both ends included) for a window."""
        if isinstance(value, str) and value != "auto":
            first, dash, last = value.partition("-")
            if dash and first.strip().isdigit() and last.strip().isdigit() and int(first) <= int(last):
                return list(range(int(first), int(last) + 1))
        return value

    @model_validator(mode="after")
    def _file(self) -> FloorSection:
        if self.experiment is not None and self.path is None:
            raise ValueError("experiment names an entry of a capping_config.pt: set floor.path to that file as well")
        return self


class DataSection(Section):
    """What the model is trained on."""

    drift_prompts: NotNegative = 220
    role_questions: NotNegative = 0
    conversation_turns: NotNegative = 0
    drift_file: str | None = None
    benign_file: str | None = None
    benign_share: Share = 0.25
    seed: int = 0


class MethodSection(Section):
    """How the cap gets into the weights."""

    name: Literal["sft"] = "sft"
    rollouts: Literal["on_the_fly", "stored"] = "on_the_fly"
    regenerate_every: Positive = 20
    cap_strength: float = Field(default=1.0, ge=0)
    cap_schedule: Literal["constant", "linear", "cosine"] = "constant"
    sampling: Sampling = Sampling()
    floor_weight: float = Field(default=0.5, ge=0)
    floor_schedule: Literal["constant", "linear", "cosine"] = "constant"
    floor_target: Literal["absolute", "base"] = "absolute"
    floor_margin: float = 0.0
    floor_shape: Literal["squared", "huber"] = "squared"
    benign_kl_weight: float = Field(default=1.0, ge=0)
    benign_axis_weight: float = Field(default=0.0, ge=0)


class EvalSection(Section):
    """How much is measured."""

    roles: Positive = 20
    questions: Positive = 6
    conversations: NotNegative = 16
    turns: Positive = 8
    benign: Positive = 64
    professional: NotNegative = 36
    sampling: Sampling = Sampling()
    reextract_roles: NotNegative = 20
    reextract_questions: Positive = 4
    control: bool = False
    bootstrap: Positive = 5000
    transcripts: NotNegative = 12
    seed: int = 1000


class Recipe(Section):
    """A whole job."""

    model: ModelSection
    axis: AxisSection = AxisSection()
    floor: FloorSection = FloorSection()
    data: DataSection = DataSection()
    method: MethodSection = MethodSection()
    lora: dict[str, Any] = {}
    train: dict[str, Any] = {}
    eval: EvalSection = EvalSection()
