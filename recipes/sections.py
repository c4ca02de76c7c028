"""What sections of a recipe are made of, and the sections that several of them hold: sampling, and a judge."""

from __future__ import annotations

from collections.abc import Callable
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


class DataSection(Section):
    """What the model is trained on. A ``drift_file`` stands in the place of the prompts that ship.

    ``benign_share`` differs by method; the default here is that of methods that mix benign rows into their own.
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


def _told(value: str | None, look: Callable[[str], tuple[str, str] | None]) -> str | None:
    """The value, where ``look`` finds no fault in it."""
    if value is not None and (fault := look(value)):
        raise ValueError(": ".join(fault))
    return value
