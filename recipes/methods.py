"""The methods: the keys of each, and all else that must be known of it beforehand.

A new method is a class here and an entry script of its name in ``train/``. Checks, plan, rehearsal and stages ask the class, and
know no method by its name. A class that leaves out one of the facts of :class:`MethodSection` is refused when it is imported.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Set
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from pydantic import Field

from trimtab.recipes.faults import Fault
from trimtab.recipes.sections import (
    HEAVIEST,
    Annealing,
    AnswerSampling,
    DataSection,
    JudgeSection,
    Name,
    Positive,
    Section,
    Strength,
    Weight,
)

DEFAULT_METHOD = "sft"  # of a recipe that names none
# TRL's own longest row, tokens, where train.max_length says nothing.
ROW_LENGTH = 1024
REWARDS = ("assistant", "capped_self_llr", "capped_self", "persona_llr", "above_floor", "judge")
# Forwards of each: the reader's and four questions', capped self and learner, ...
REWARDED = {"assistant": 5.0, "capped_self_llr": 2.0, "capped_self": 1.0, "persona_llr": 2.0, "above_floor": 1.0}
NEED_SYSTEM = {"persona_llr"}  # rewards that score no answer without a system prompt

# Keys of `train` that trimtab sets itself, or whose work it does another way -> what to do instead.
NOT_YOURS_IN_ROWS = {
    "dataset_kwargs": "remove it: trimtab sets it, as its rows come as tokens",
    "dataset_text_field": "remove it: rows come as tokens, made of the `data` section",
    "shuffle_dataset": "remove it: the order of prompts is fixed by data.seed",
    "assistant_only_loss": "remove it: only the answer is ever trained on",
    "completion_only_loss": "remove it: only the answer is ever trained on",
    "train_sampling_strategy": "remove it: the order of prompts is fixed by data.seed",
    "packing_strategy": "remove it: rows can't be packed",
    "eval_packing": "remove it: rows can't be packed",
    "pad_to_multiple_of": "remove it: trimtab pads its rows as the machine likes it",
    "eos_token": "remove it: the chat template's own end of an answer is used",
    "pad_token": "remove it: the tokenizer's own is used",
    "dataset_num_proc": "remove it: rows come as tokens, and nothing is left to prepare",
}
NOT_YOURS_IN_DISTILLATION = {
    "loss_type": "remove it: method.divergence is the loss",
    "label_smoothing_factor": "remove it: the loss is a divergence, and has no labels",
}
NOT_YOURS_IN_GRPO = {
    "reward_weights": "remove it: each entry of method.rewards has a weight",
    "vllm_importance_sampling_correction": "remove it: method.correct_ratio and method.ratio_limit cover vLLM as well",
    "generation_kwargs": "remove it: what shapes the samples beyond temperature would make the importance ratio wrong",
    "chat_template_kwargs": "set model.chat_template_kwargs instead",
    "use_transformers_continuous_batching": "remove it: trimtab samples the rollouts, or vLLM (train.use_vllm)",
    "use_transformers_paged": "remove it: trimtab samples the rollouts, or vLLM (train.use_vllm)",
    "transformers_continuous_batching_config": "remove it: trimtab samples the rollouts, or vLLM (train.use_vllm)",
    "cache_implementation": "remove it: trimtab samples the rollouts, or vLLM (train.use_vllm)",
}
# Keys of `train` that shape GRPO's samples without its log-probabilities knowing of it -> values that do nothing.
SHAPING: dict[str, tuple[object, ...]] = {
    "top_p": (1, None), "top_k": (0, None), "min_p": (0, None), "repetition_penalty": (1, None),
}  # fmt: skip

# What `train` says where the recipe doesn't: TRL's own defaults are those of full fine-tuning on a fixed data set.
TRAIN: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "save_steps": 50}
ROWS_A_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


class ConfigClass(NamedTuple):
    """Where a config class of TRL stands in its source."""

    package: str
    file: str
    name: str


SFT_CONFIG = ConfigClass("trl", "trainer/sft_config.py", "SFTConfig")
GRPO_CONFIG = ConfigClass("trl", "trainer/grpo_config.py", "GRPOConfig")
DPO_CONFIG = ConfigClass("trl", "trainer/dpo_config.py", "DPOConfig")


class Beside(Protocol):
    """The sections of a recipe that stand beside its method."""

    @property
    def data(self) -> DataSection:
        """The ``data`` section."""
        ...

    @property
    def train(self) -> dict[str, Any]:
        """The ``train`` section, whole."""
        ...

    @property
    def lora(self) -> dict[str, Any]:
        """The ``lora`` section, whole."""
        ...


class MethodSection(Section):
    """What every method has: the floor penalty and the benign barrier. Weights differ by method, as losses do in size.

    Below its keys stand the facts that each method states of itself.

    Attributes:
        trl_config: TRL's config class, to which ``train`` goes.
        lacks_vllm: ``train`` takes GRPOConfig's keys of vLLM, which the config class itself has not.
        not_yours: keys of ``train`` that may not be set -> what to do instead.
        train_defaults: what ``train`` says where the recipe doesn't.
        rows_a_step: the same of the keys for the rows of a step, filled in where the recipe has neither.
        learning_rates: of small models, and of large ones.
        benign_share: the share of benign rows where the recipe names none.
        benign_beside: benign rows stand beside the method's own; else they are among them.
        makes_pairs: pairs are made before training, in a stage of their own.
        answers_a_row: answers of one prompt that a row of training holds.
        trains_conversations: whole conversations are trained on, in groups of one prompt, of whose size the rows of a step are a
            multiple; else rows with one answer, or a pair.
        compares_distributions: whole distributions are compared, the vocabulary's width at every token.
        base_floor: the floor may be the base's own projection, ``floor_target: base``.
        batch_key: the key that says how many answers are sampled at a time.
    """

    trl_config: ClassVar[ConfigClass]
    lacks_vllm: ClassVar[bool]
    not_yours: ClassVar[Mapping[str, str]]
    train_defaults: ClassVar[Mapping[str, Any]]
    rows_a_step: ClassVar[Mapping[str, int]]
    learning_rates: ClassVar[tuple[float, float]]
    benign_share: ClassVar[float]
    benign_beside: ClassVar[bool]
    makes_pairs: ClassVar[bool]
    answers_a_row: ClassVar[int]
    trains_conversations: ClassVar[bool]
    compares_distributions: ClassVar[bool]
    base_floor: ClassVar[bool]
    batch_key: ClassVar[str]

    floor_weight: Weight = 0.7
    floor_schedule: Annealing = "constant"
    floor_target: Literal["absolute", "base"] = "absolute"
    floor_margin: float = Field(default=0.0, ge=-100, le=100)
    benign_kl_weight: Weight = 8.0
    benign_axis_weight: Weight = 10.0

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        """Refuse a method, which is what has a name, that leaves a fact out."""
        super().__pydantic_init_subclass__(**settings)
        if "name" not in cls.model_fields:
            return
        facts = sorted(MethodSection.__class_vars__ - Section.__class_vars__)
        absent = [fact for fact in facts if not hasattr(cls, fact)] + sorted(cls.__abstractmethods__)
        if absent:
            raise TypeError(f"the method {cls.__name__} does not say of itself: {', '.join(absent)}")

    @classmethod
    def title(cls) -> str:
        """The method's name, as recipes and entry scripts have it."""
        return str(get_args(cls.model_fields["name"].annotation)[0])

    @classmethod
    def last_stage(cls) -> str:
        """Name of the last stage before training."""
        return "pairs" if cls.makes_pairs else "floor"

    @classmethod
    def whole_train(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The ``train`` section, whole. Rows a step are only filled in where neither of their keys is given."""
        rows = cls.rows_a_step if not cls.rows_a_step.keys() & given.keys() else {}
        return {**rows, **cls.train_defaults, **given}

    @abstractmethod
    def row_length(self, train: Mapping[str, Any]) -> int | None:
        """The longest row that is trained on, in tokens; None for any."""

    @abstractmethod
    def answers(self, train: Mapping[str, Any]) -> AnswerSampling:
        """How the answers are sampled that are trained on."""

    @abstractmethod
    def forwards_beside(self, train: Mapping[str, Any]) -> float:
        """Forwards without gradient that a row of the method's own costs, beside the learner's."""

    @abstractmethod
    def own_weights(self, train: Mapping[str, Any]) -> dict[str, float]:
        """What the method's own part of the loss is weighed by: a name for it, as a remedy calls it -> the weight."""

    @abstractmethod
    def judges(self) -> dict[str, JudgeSection]:
        """The judges that are asked in training, by the key of each below ``method``."""

    @abstractmethod
    def functions(self) -> list[str]:
        """Functions of the user's own that training calls, ``package.module:function`` each."""

    def own_faults(self, recipe: Beside, given: Set[str]) -> Iterator[Fault]:
        """What can't work, or would do nothing, of the method's own keys; arguments as of ``recipes.rules.impossible``."""
        yield from ()


class SampledMethod(MethodSection):
    """What methods have whose rows are a prompt and an answer that was sampled for it."""

    sampling: AnswerSampling = AnswerSampling()

    trains_conversations: ClassVar[bool] = False
    batch_key: ClassVar[str] = "method.sampling.batch_size"

    def row_length(self, train: Mapping[str, Any]) -> int | None:
        """As ``train.max_length`` says."""
        length: int | None = train.get("max_length", ROW_LENGTH)
        return length

    def answers(self, train: Mapping[str, Any]) -> AnswerSampling:
        """As ``method.sampling`` says."""
        return self.sampling

    def judges(self) -> dict[str, JudgeSection]:
        """None."""
        return {}

    def functions(self) -> list[str]:
        """None."""
        return []


class DriftSampling(NamedTuple):
    """Who answers the drift rows of a method on rollouts.

    Attributes:
        strength: the cap's, at the start.
        schedule: how it is annealed.
        student_share: share of the rows that the uncapped student answers, the capped self the others; None: the current weights
            answer all of them under the cap.
    """

    strength: float
    schedule: Annealing
    student_share: float | None


class RowMethod(SampledMethod):
    """What methods on rollouts made on the fly have: when they are made, and by whom."""

    rollouts: Literal["on_the_fly", "stored"] = "on_the_fly"
    regenerate_every: Positive = 20
    benign_student_share: float = Field(default=0.0, ge=0, le=1)

    trl_config: ClassVar[ConfigClass] = SFT_CONFIG
    lacks_vllm: ClassVar[bool] = True
    train_defaults: ClassVar[Mapping[str, Any]] = TRAIN
    rows_a_step: ClassVar[Mapping[str, int]] = ROWS_A_STEP
    benign_share: ClassVar[float] = DataSection.model_fields["benign_share"].default
    benign_beside: ClassVar[bool] = False
    makes_pairs: ClassVar[bool] = False
    answers_a_row: ClassVar[int] = 1
    base_floor: ClassVar[bool] = True

    @property
    @abstractmethod
    def drift(self) -> DriftSampling:
        """Who answers the drift rows."""

    def own_faults(self, recipe: Beside, given: Set[str]) -> Iterator[Fault]:
        """Stored rollouts that are to be made anew."""
        if self.rollouts == "stored" and "method.regenerate_every" in given:
            yield Fault(
                "has no effect: stored rollouts are made once",
                "remove it, or set method.rollouts=on_the_fly",
                "method.regenerate_every",
            )


class SftMethod(RowMethod):
    """SFT on capped rollouts."""

    name: Literal["sft"] = "sft"
    cap_strength: Strength = 1.0
    cap_schedule: Annealing = "constant"
    ce_weight: Weight = 1.0

    not_yours: ClassVar[Mapping[str, str]] = NOT_YOURS_IN_ROWS
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-4)
    compares_distributions: ClassVar[bool] = False

    @property
    def drift(self) -> DriftSampling:
        """The current weights, under the cap."""
        return DriftSampling(self.cap_strength, self.cap_schedule, None)

    def forwards_beside(self, train: Mapping[str, Any]) -> float:
        """None: the answers are the labels."""
        return 0.0

    def own_weights(self, train: Mapping[str, Any]) -> dict[str, float]:
        """The cross-entropy's."""
        return {"method.ce_weight": self.ce_weight}


class DistillMethod(RowMethod):
    """On-policy distillation from the capped self."""

    name: Literal["distill"]
    regenerate_every: Positive = 6
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: Positive | None = None
    distill_weight: Weight = 3.0
    student_share: float = Field(default=0.5, ge=0, le=1)

    not_yours: ClassVar[Mapping[str, str]] = {**NOT_YOURS_IN_ROWS, **NOT_YOURS_IN_DISTILLATION}
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-4)
    compares_distributions: ClassVar[bool] = True

    @property
    def drift(self) -> DriftSampling:
        """The uncapped student, and its teacher, whose cap stays as it is."""
        return DriftSampling(1.0, "constant", self.student_share)

    def forwards_beside(self, train: Mapping[str, Any]) -> float:
        """The teacher's."""
        return 1.0

    def own_weights(self, train: Mapping[str, Any]) -> dict[str, float]:
        """The divergence's."""
        return {"method.distill_weight": self.distill_weight}

    def own_faults(self, recipe: Beside, given: Set[str]) -> Iterator[Fault]:
        """Of the rows', and a mixture that no divergence uses."""
        yield from super().own_faults(recipe, given)
        if self.divergence != "jsd" and "method.jsd_beta" in given:
            yield Fault(
                f"has no effect: the divergence is {self.divergence}",
                "remove it, or set method.divergence=jsd",
                "method.jsd_beta",
            )


class RewardSection(Section):
    """One reward: a shipped one, or ``package.module:function``; ``judge`` needs the section of that name."""

    name: Name
    weight: float = Field(default=1.0, ge=-HEAVIEST, le=HEAVIEST)
    judge: JudgeSection | None = None


class ConversationMethod(MethodSection):
    """What methods have that are trained on whole conversations, each answer of which was sampled while training goes on."""

    rewards: list[RewardSection] = [RewardSection(name="assistant")]
    sampling_batch: Positive = 64

    lacks_vllm: ClassVar[bool] = False
    benign_beside: ClassVar[bool] = True
    makes_pairs: ClassVar[bool] = False
    answers_a_row: ClassVar[int] = 1
    trains_conversations: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False
    base_floor: ClassVar[bool] = False
    batch_key: ClassVar[str] = "method.sampling_batch"

    def row_length(self, train: Mapping[str, Any]) -> int | None:
        """Any: completions are cut one by one."""
        return None

    def answers(self, train: Mapping[str, Any]) -> AnswerSampling:
        """As long as ``train.max_completion_length``, which is TRL's key: this section's own limit does not hold there."""
        return AnswerSampling.model_construct(
            max_new_tokens=train["max_completion_length"], batch_size=self.sampling_batch
        )

    def judges(self) -> dict[str, JudgeSection]:
        """Those of the rewards."""
        return {f"rewards.{place}.judge": entry.judge for place, entry in enumerate(self.rewards) if entry.judge}

    def functions(self) -> list[str]:
        """Those that are rewards."""
        return [entry.name for entry in self.rewards if ":" in entry.name]


class GrpoMethod(ConversationMethod):
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

    trl_config: ClassVar[ConfigClass] = GRPO_CONFIG
    not_yours: ClassVar[Mapping[str, str]] = NOT_YOURS_IN_GRPO
    train_defaults: ClassVar[Mapping[str, Any]] = {
        **TRAIN,
        "num_generations": 4,
        "max_completion_length": 48,
        "beta": 0.05,
    }
    rows_a_step: ClassVar[Mapping[str, int]] = ROWS_A_STEP
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 2e-5)
    benign_share: ClassVar[float] = 0.25

    def forwards_beside(self, train: Mapping[str, Any]) -> float:
        """The old policy's and the sampler's, the reference's where it counts, and those of the rewards."""
        reference = 1.0 if train.get("beta", 0.0) else 0.0
        return 2.0 + reference + sum(REWARDED.get(reward.name, 0.0) for reward in self.rewards)

    def own_weights(self, train: Mapping[str, Any]) -> dict[str, float]:
        """The reference's and the rewards'."""
        rewards = max((abs(entry.weight) for entry in self.rewards), default=0.0)
        return {"train.beta": train.get("beta", 0), "the weight of a reward": rewards}

    def own_faults(self, recipe: Beside, given: Set[str]) -> Iterator[Fault]:
        """Of the samples, the importance ratio and the rewards."""
        yield from _shaped(recipe)
        yield from _completions(recipe)
        yield from _ratio(recipe, self, given)
        yield from _rewards(self, recipe.data)


def _shaped(recipe: Beside) -> Iterator[Fault]:
    """What makes the log-probabilities of a sample others than those it was sampled by."""
    for key, neutral in SHAPING.items():
        if key in recipe.train and recipe.train[key] not in neutral:
            yield Fault(
                "shapes the samples without the log-probabilities knowing of it: the importance ratio would be wrong",
                f"remove it, or set train.{key}={neutral[0]}",
                f"train.{key}",
            )
    dropout = recipe.lora.get("lora_dropout", 0)
    if isinstance(dropout, int | float) and 0 < dropout < 1:
        yield Fault(
            "GRPO compares log-probabilities of several forwards, and dropout makes each another",
            "set lora.lora_dropout=0.0",
            "lora.lora_dropout",
        )


def _completions(recipe: Beside) -> Iterator[Fault]:
    if recipe.train.get("max_completion_length", 1) is None:
        yield Fault(
            "is null: an answer has a longest length, as rollouts are sampled in batches",
            "set train.max_completion_length=256",
            "train.max_completion_length",
        )


def _ratio(recipe: Beside, method: GrpoMethod, given: Set[str]) -> Iterator[Fault]:
    for key in ("ratio_level", "ratio_beyond"):
        if not method.correct_ratio and f"method.{key}" in given:
            yield Fault(
                "has no effect: method.correct_ratio is false",
                "remove it, or set method.correct_ratio=true",
                f"method.{key}",
            )
    of_sequences = recipe.train.get("importance_sampling_level") == "sequence"
    if of_sequences and method.correct_ratio and method.ratio_level == "token":
        yield Fault(
            "is sequence: TRL then gives all tokens of a completion one surrogate, which tokens' own ratios can't correct",
            "set method.ratio_level=sequence, or remove this key",
            "train.importance_sampling_level",
        )


def _rewards(method: GrpoMethod, data: DataSection) -> Iterator[Fault]:
    if not method.rewards:
        yield Fault("no reward is named", "name one: method.rewards: [{name: assistant}]", "method.rewards")
        return
    weighted = {entry.name for entry in method.rewards if entry.weight}
    if not weighted:
        yield Fault("all rewards have weight 0", "give one a weight: {name: ..., weight: 1.0}", "method.rewards")
    elif weighted <= NEED_SYSTEM and data.drift_file is None and data.conversation_turns:
        yield Fault(
            f"{' and '.join(sorted(weighted))} scores no answer without a system prompt, and the conversations have none: they "
            "would carry no policy gradient",
            "name assistant in its place or beside it, or set data.conversation_turns=0",
            "method.rewards",
        )
    for entry in method.rewards:
        if entry.name not in REWARDS and ":" not in entry.name:
            yield Fault(
                f"no such reward: {entry.name!r}",
                f"name one of {', '.join(REWARDS)}, or a function: package.module:function",
                "method.rewards",
            )
        if (entry.name == "judge") != (entry.judge is not None):
            yield Fault(
                "the reward `judge` and a `judge:` section belong together, and one is without the other",
                "write {name: judge, judge: {endpoint: ..., model: ...}}",
                "method.rewards",
            )


class PairMethod(SampledMethod):
    """What methods have that are trained on pairs, the capped self's answer and the uncapped one's, made before training."""

    cap_strength: float = Field(default=1.0, gt=0, le=100)

    lacks_vllm: ClassVar[bool] = False
    benign_beside: ClassVar[bool] = True
    makes_pairs: ClassVar[bool] = True
    answers_a_row: ClassVar[int] = 2
    base_floor: ClassVar[bool] = False


class DpoMethod(PairMethod):
    """DPO on pairs of the capped against the uncapped self."""

    name: Literal["dpo"]
    floor_weight: Weight = 0.1
    benign_kl_weight: Weight = 2.0
    benign_axis_weight: Weight = 2.0

    trl_config: ClassVar[ConfigClass] = DPO_CONFIG
    not_yours: ClassVar[Mapping[str, str]] = {}
    train_defaults: ClassVar[Mapping[str, Any]] = {**TRAIN, "beta": 0.1}
    rows_a_step: ClassVar[Mapping[str, int]] = {**ROWS_A_STEP, "gradient_accumulation_steps": 1}
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 2e-5)
    benign_share: ClassVar[float] = 0.33
    compares_distributions: ClassVar[bool] = False

    def forwards_beside(self, train: Mapping[str, Any]) -> float:
        """The reference's."""
        return 1.0

    def own_weights(self, train: Mapping[str, Any]) -> dict[str, float]:
        """DPO's own loss can't be switched off."""
        return {"DPO's own loss": 1.0}


AnyMethod = SftMethod | DistillMethod | GrpoMethod | DpoMethod
METHODS: dict[str, type[AnyMethod]] = {kind.title(): kind for kind in get_args(AnyMethod)}
