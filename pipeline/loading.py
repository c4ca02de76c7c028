"""Loading of a run's model, its chat format and its sampling options, as the recipe says."""

from __future__ import annotations

from trimtab.axis.chat_format import ChatFormat, ends_of
from trimtab.axis.models import Loaded, generation_ends, load_model, load_tokenizer
from trimtab.axis.sampling import SamplingOptions
from trimtab.axis.soundness import check_model
from trimtab.pipeline.run import Run
from trimtab.recipes.schema import ModelSection
from trimtab.recipes.sections import Sampling


def load_section(section: ModelSection) -> Loaded:
    """Load a model for inference as a recipe's ``model`` section says, and check that the instrument is defined on it."""
    loaded = load_model(
        section.name,
        revision=section.revision,
        dtype=section.dtype,
        device=section.device,
        attn_implementation=section.attn_implementation,
        quantization=section.quantization,
    )
    check_model(loaded)
    return loaded


def load_recipe_model(section: ModelSection) -> tuple[Loaded, ChatFormat]:
    """Load the recipe's model for inference, and its chat format."""
    loaded = load_section(section)
    form = ChatFormat(loaded.tokenizer, section.chat_template_kwargs, ends_of(loaded.model))
    form.tell()
    return loaded, form


def chat_format(section: ModelSection) -> ChatFormat:
    """The chat format of a recipe's model, without its weights."""
    tokenizer = load_tokenizer(section.name, section.revision)
    ends = generation_ends(section.name, section.revision)
    return ChatFormat(tokenizer, section.chat_template_kwargs, ends)


def sampling_options(section: Sampling) -> SamplingOptions:
    """The recipe's sampling section as options."""
    return SamplingOptions(**section.model_dump())


class Prepared:
    """The model of a run, loaded once and only when a stage needs it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: tuple[Loaded, ChatFormat] | None = None

    def __call__(self) -> tuple[Loaded, ChatFormat]:
        """Model and chat format."""
        if self._loaded is None:
            chat_format(self._run.recipe.model).check()
            self._loaded = load_recipe_model(self._run.recipe.model)
        return self._loaded
