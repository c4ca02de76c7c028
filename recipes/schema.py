"""The recipe: one YAML file, one job. Sections model, axis, floor, data, method, lora, train, eval.

``train`` goes verbatim to the TRL config of the method and ``lora`` to PEFT's LoraConfig, so their keys are those libraries'
own; the loader checks them against those classes' fields without importing the heavy libraries.

A key that a recipe leaves out has the value that was measured, which SmolLM2's recipes give it: defaults differ by method
(:data:`BENIGN_SHARES`, :data:`TRAIN_DEFAULTS`). They stand here; ``tests/recipes/test_defaults.py`` holds recipes, trainers and
losses to them. What depends on the model, such as its window, is chosen by a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trimtab.axis.addresses import address_fault, key_name_fault


class Section(BaseModel):
    """A section: unknown keys are errors, values keep their type."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Beyond these a slip of the finger fills the memory, or makes a number that no float32 holds.
MOST, HEAVIEST = 1_000_000, 1e6

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0, le=MOST)]
NotNegative = Annotated[int, Field(ge=0, le=MOST)]
Weight = Annotated[float, Field(ge=0, le=HEAVIEST)]
Strength = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Name = Annotated[str, Field(pattern=r"\S")]
Annealing = Literal["constant", "linear", "cosine"]
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


class Sampling(Section):
    """How answers are sampled."""

    max_new_tokens: Positive = 64
    temperature: float = Field(default=0.7, ge=0, le=100)
    top_p: float = Field(default=0.9, gt=0, le=1)
    batch_size: Positive = 64

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        """Logits are divided by it: so small a number makes infinities of them."""
        if 0 < value < 1e-3:
            raise ValueError(f"{value} is too small to divide logits by: write 0 for greedy answers")
        return value


class AnswerSampling(Sampling):
    """How answers to train on and to evaluate are sampled: shorter than those behind the axis."""

    max_new_tokens: Positive = 48


class ModelSection(Section):
    """Which chat model, and how it is loaded."""

    name: Name
    revision: Name | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|mps|xpu|npu|hpu)(:[0-9]{1,3})?)$")] = "auto"
    attn_implementation: Name | None = None
    quantization: Literal["nf4", "int8"] | None = None
    chat_template_kwargs: dict[str, Any] = {}


class JudgeSection(Section):
    """A judge, or a simulated user: an OpenAI-compatible endpoint (key in the environment variable), or a local model.

    ``chat_template_kwargs`` are the template's, such as ``{enable_thinking: false}``; an endpoint gets them as vLLM's and
    SGLang's servers take them. ``max_tokens`` are of a reply with its thoughts: null is 1024 at an endpoint; of a model that is
    loaded here, 32 for a judge and 160 for a user. ``api_key_env: null`` asks without a key; an address on this machine or in a
    private network needs none. ``timeout`` is of a whole request, in seconds. A fault of transport is tried again ``retries``
    times, at first after about ``backoff`` seconds, then after twice as long; an unreadable reply is asked for again
    ``unreadable_retries`` times. Prices are in any currency a million tokens; with them the cost is shown.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # which may be a key in the wrong place

    endpoint: str | None = None
    model: str = Field(min_length=1)
    chat_template_kwargs: dict[str, Any] = {}
    api_key_env: str | None = "OPENAI_API_KEY"
    max_tokens: Positive | None = None
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    retries: NotNegative = 6
    backoff: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    unreadable_retries: NotNegative = 2
    concurrency: int = Field(default=8, gt=0, le=1000)
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    price_in: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    price_out: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return _told(value, address_fault)

    @field_validator("api_key_env")
    @classmethod
    def _key_name(cls, value: str | None) -> str | None:
        return _told(value, key_name_fault)

    @model_validator(mode="after")
    def _used(self) -> JudgeSection:
        for name in ENDPOINT_ONLY if self.endpoint is None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on a model that is loaded here: remove it, or name an endpoint")
        return self


ENDPOINT_ONLY = (
    "api_key_env", "timeout", "retries", "backoff", "concurrency", "requests_per_minute", "price_in", "price_out",
)  # fmt: skip
# Settings of a judge that say how it is asked, and change none of its replies.
ONLY_ASKING = {*ENDPOINT_ONLY, "unreadable_retries"}


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


def _told(value: str | None, look: Callable[[str], tuple[str, str] | None]) -> str | None:
    """The value, where ``look`` finds no fault in it."""
    if value is not None and (fault := look(value)):
        raise ValueError(": ".join(fault))
    return value


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


class DataSection(Section):
    """What the model is trained on. A ``drift_file`` stands in the place of the prompts that ship.

    ``benign_share`` differs by method: see :data:`BENIGN_SHARES`.
    """

    drift_prompts: NotNegative = 220
    role_questions: NotNegative = 0
    conversation_turns: NotNegative = 0
    drift_file: Name | None = None
    benign_file: Name | None = None
    benign_share: Share = 0.5
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _of_the_file_alone(cls, value: Any) -> Any:
        """The number that ships is no wish for them beside a file."""
        alone = isinstance(value, dict) and value.get("drift_file") is not None
        return {"drift_prompts": 0, **value} if alone else value


# Of the methods whose benign rows stand beside their own; the default is that of methods that mix them into their rows.
BENIGN_SHARES = {"grpo": 0.25, "dpo": 0.33}


class MethodSection(Section):
    """What every method has: the floor penalty and the benign barrier. Weights differ by method, as losses do in size."""

    floor_weight: Weight = 0.7
    floor_schedule: Annealing = "constant"
    floor_target: Literal["absolute", "base"] = "absolute"
    floor_margin: float = Field(default=0.0, ge=-100, le=100)
    benign_kl_weight: Weight = 8.0
    benign_axis_weight: Weight = 10.0


class RowMethod(MethodSection):
    """What methods on rollouts made on the fly have: when they are made, and by whom."""

    rollouts: Literal["on_the_fly", "stored"] = "on_the_fly"
    regenerate_every: Positive = 20
    sampling: AnswerSampling = AnswerSampling()
    benign_student_share: float = Field(default=0.0, ge=0, le=1)


class SftMethod(RowMethod):
    """SFT on capped rollouts."""

    name: Literal["sft"] = "sft"
    cap_strength: Strength = 1.0
    cap_schedule: Annealing = "constant"
    ce_weight: Weight = 1.0


class DistillMethod(RowMethod):
    """On-policy distillation from the capped self."""

    name: Literal["distill"]
    regenerate_every: Positive = 6
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: Positive | None = None
    distill_weight: Weight = 3.0
    student_share: float = Field(default=0.5, ge=0, le=1)


class RewardSection(Section):
    """One reward: a shipped one, or ``package.module:function``; ``judge`` needs the section of that name."""

    name: Name
    weight: float = Field(default=1.0, ge=-HEAVIEST, le=HEAVIEST)
    judge: JudgeSection | None = None


class GrpoMethod(MethodSection):
    """GRPO on capped rollouts."""

    name: Literal["grpo"]
    floor_weight: Weight = 0.1
    benign_kl_weight: Weight = 1.0
    benign_axis_weight: Weight = 1.0
    cap_strength: Strength = 1.0
    cap_schedule: Annealing = "linear"
    correct_ratio: bool = True
    ratio_level: Literal["token", "sequence"] = "token"
    ratio_beyond: Literal["truncate", "mask"] = "truncate"
    ratio_limit: float = Field(default=2.0, ge=1, le=HEAVIEST)
    rewards: list[RewardSection] = [RewardSection(name="capped_self_llr")]
    sampling_batch: Positive = 64


class DpoMethod(MethodSection):
    """DPO on pairs of the capped against the uncapped self."""

    name: Literal["dpo"]
    floor_weight: Weight = 0.1
    benign_kl_weight: Weight = 2.0
    benign_axis_weight: Weight = 2.0
    cap_strength: float = Field(default=1.0, gt=0, le=100)
    sampling: AnswerSampling = AnswerSampling()


AnyMethod = SftMethod | DistillMethod | GrpoMethod | DpoMethod
METHODS: dict[str, type[AnyMethod]] = {
    "sft": SftMethod,
    "distill": DistillMethod,
    "grpo": GrpoMethod,
    "dpo": DpoMethod,
}


# What `train` says where the recipe doesn't: TRL's own defaults are those of full fine-tuning on a fixed data set. The learning
# rate depends on the model's size, see `trimtab.train.job.usual_learning_rate`. Rows a step go by two keys, as memory allows.
_TRAIN: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "save_steps": 50}
TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": _TRAIN,
    "distill": _TRAIN,
    "grpo": {**_TRAIN, "num_generations": 4, "max_completion_length": 48, "beta": 0.05},
    "dpo": {**_TRAIN, "beta": 0.1},
}
ROWS_A_STEP: dict[str, dict[str, int]] = {
    "sft": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "distill": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "grpo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "dpo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
}
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}


def with_train_defaults(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train`` section of a method, whole. Rows a step are only filled in where neither of their keys is given."""
    rows = ROWS_A_STEP[method]
    return {**(rows if not rows.keys() & given.keys() else {}), **TRAIN_DEFAULTS[method], **given}


def with_lora_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``lora`` section, whole; ``lora_alpha`` is twice the rank, so that another rank leaves the scale as it is."""
    found = {**LORA_DEFAULTS, **given}
    rank = found["r"]
    return {"lora_alpha": 2 * rank, **found} if isinstance(rank, int) and rank > 0 else found


# Further fine-tunings that bring their rows, and what they set.
SHIPPED_TUNINGS: dict[str, dict[str, Any]] = {
    "benign": {},
    "long": {"epochs": 5},
    "persona": {"rows": 32, "epochs": 4, "batch_size": 8, "adversarial": True},
}


class FurtherTuning(Section):
    """A further fine-tuning that the stability should outlast. Those of :data:`SHIPPED_TUNINGS` bring their rows, others a file.

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
    def _rows_from_somewhere(self) -> FurtherTuning:
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
    roles: Positive = 68
    questions: Positive = 3
    conversations: NotNegative = 16
    turns: Positive = 8
    conversations_file: Name | None = None
    benign: Positive = 48
    professional: NotNegative = 36
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
    durability: list[FurtherTuning] = []
    control: bool = False
    tuned_cap: bool = True
    bootstrap: Annotated[int, Field(gt=0, le=100_000)] = 5000
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

    @field_validator("method", mode="before")
    @classmethod
    def _default_method(cls, value: Any) -> Any:
        """A method section without a name is SFT's."""
        return {"name": "sft", **value} if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, value: Any) -> Any:
        """Fill in what the recipe leaves out and the method decides."""
        if not isinstance(value, dict):
            return value
        section = value.get("method", {})
        method = section.get("name", "sft") if isinstance(section, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            return value
        share = {"benign_share": BENIGN_SHARES[method]} if method in BENIGN_SHARES else {}
        whole: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "train": lambda given: with_train_defaults(method, given),
            "lora": with_lora_defaults,
            "data": lambda given: {**share, **given},
        }
        sections = {name: value.get(name, {}) for name in whole}
        return value | {name: whole[name](given) for name, given in sections.items() if isinstance(given, dict)}
