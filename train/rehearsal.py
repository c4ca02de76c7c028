"""A rehearsal: what TRL, transformers and PEFT refuse of a recipe, they refuse here, before anything heavy.

A toy model of one layer takes one step on the CPU, by the library's own trainer and by the very config that the entry script
builds from the recipe; the adapters are put on the recipe's own model on the meta device, where nothing has a weight. No rule of
ours stands for what the libraries take, so none can be out of date. Which keys are at fault is found by leaving each out.

What belongs to the machine (bfloat16, compilers, vLLM, reports to a service) is left out of the step, and looked at by itself.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import logging
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.axis.errors import UserError, known_fault
from trimtab.axis.models import resolve_name
from trimtab.pipeline.run import Run, Variant
from trimtab.recipes.faults import Fault, Findings, did_you_mean
from trimtab.recipes.library_fields import VLLM_KEYS, train_config
from trimtab.recipes.loader import LoadedRecipe
from trimtab.recipes.schema import ModelSection, Recipe
from trimtab.recipes.sections import JudgeSection
from trimtab.train.method import method_of
from trimtab.train.protocols import Toy, TrainingArguments

log = logging.getLogger("trimtab")

# Keys of `train` that say on what machine and how fast, and change what is done to it or to the whole process.
MACHINE = (
    "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
)  # fmt: skip
NOT_ON_A_TOY = (
    *MACHINE, *VLLM_KEYS, "use_cpu", "use_liger_kernel", "liger_kernel_config", "activation_offloading", "full_determinism",
    "dataset_num_proc", "disable_tqdm", "log_level", "log_level_replica", "log_completions",
)  # fmt: skip
# A launcher's variables, which would make a process group of the toy's one process.
LAUNCHED = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_", "MV2_", "DEEPSPEED_")
LAUNCHED_NAMES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
TOY_ROWS, MOST_TOY_ROWS = 8, 1024

Trial = Callable[[dict[str, Any]], None]


def rehearse(
    loaded: LoadedRecipe, *, processes: int = 1, here: bool = True, make_model: Callable[[], Any] | None = None
) -> None:
    """Have the libraries build what a recipe asks of them.

    Args:
        loaded: the recipe.
        processes: that train; how many completions GRPO samples at a time goes by it.
        here: whether this machine trains, so that it must have what the recipe asks for.
        make_model: gives the recipe's model on the meta device, each time a new one; None builds it.

    Raises:
        RecipeError: with every fault.
    """
    if (
        loaded.recipe.eval.tuned is not None
    ):  # nothing is trained but what `eval.durability` lists, with few keys of `train`
        return
    findings = Findings()
    checks: list[Callable[[], list[Fault]]] = [
        lambda: _train_faults(loaded, processes),
        lambda: _data_faults(loaded),
        lambda: _lora_faults(loaded, make_model or functools.partial(meta_model_of, loaded.recipe.model)),
        lambda: section_faults(loaded.recipe, here=here),
        lambda: _service_faults(loaded.recipe.train),
        lambda: _reward_faults(loaded),
    ]
    if here:
        judges = loaded.recipe.method.judges()
        sections = {"axis.judge": loaded.recipe.axis.judge, **{f"method.{key}": judge for key, judge in judges.items()}}
        checks += [lambda: _machine_faults(loaded), lambda: judge_faults(sections)]
    with _as_one_plain_process():
        for check in checks:
            with findings.of_a_check():
                findings.add(check())
    findings.faults = [loaded.placed(fault) for fault in findings.faults]
    findings.tell()


def meta_model_of(section: Any) -> Any:
    """The model of a ``model`` section on the meta device.

    Raises:
        UserError: if its configuration can't be had, transformers doesn't know it, or has no such attention.
    """
    from trimtab.axis.models import meta_model

    return had(lambda: meta_model(section.name, section.revision), section.name, "model.name")


def had(get: Callable[[], Any], name: str, key: str) -> Any:
    """What ``get`` gets of a model.

    Args:
        get: gets it.
        name: of the model.
        key: that names it.

    Raises:
        UserError: if it can't be had.
    """
    try:
        return get()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the configuration of {name!r} can't be had: {_first_line(error)}",
            key=key,
            remedy="check the name and the network (HF_TOKEN for gated models), or give a folder with its config.json",
        ) from error


# ---- train ----


def _train_faults(loaded: LoadedRecipe, processes: int) -> list[Fault]:
    recipe = loaded.recipe
    owner = train_config(recipe.method.name)
    trial = functools.partial(_step_of_a_toy, loaded, processes)
    found = _guilty(recipe.train, trial)
    if found and _error(trial, {}) is not None:  # not the recipe's fault: the toy itself does not train here
        log.warning("the recipe could not be rehearsed on a toy model: %s", found[0][1])
        return []
    return [_fault("train", key, recipe.train.get(key), error, owner) for key, error in found]


def _step_of_a_toy(loaded: LoadedRecipe, processes: int, train: dict[str, Any]) -> None:
    """One optimiser step of a toy model by the method's own config and TRL's trainer; raises whatever they raise."""
    recipe = loaded.recipe
    kept = {key: value for key, value in train.items() if key not in NOT_ON_A_TOY}
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    step = True
    if recipe.method.trains_conversations:  # of which the completions of a prompt must be a divisor
        micro, steps = (int(kept.get(key, default)) for key, default in zip(rows, (8, 1), strict=True))
        rows = {"per_device_train_batch_size": micro * processes, "gradient_accumulation_steps": steps}
        step = micro * processes * steps <= MOST_TOY_ROWS
    forced = {"use_cpu": True, "bf16": False, "learning_rate": kept.get("learning_rate", 1e-4)}
    asked = recipe.model_copy(update={"train": {"max_steps": TOY_ROWS, **kept, **rows, **forced}})
    method = method_of(recipe)
    with _config_of(asked, loaded) as arguments:
        arguments.report_to, arguments.push_to_hub = [], False
        if step:
            _train_toy(method.toy(), arguments)
        if method.check_arguments is not None:
            method.check_arguments(arguments)


@contextlib.contextmanager
def _config_of(asked: Recipe, loaded: LoadedRecipe) -> Iterator[TrainingArguments]:
    """TRL's config as the entry script builds it, with a folder that is there for as long."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        run, variant = Run(Path(folder), asked, loaded), Variant(Path(folder), "train")
        yield method_of(asked).arguments(run, variant, True)


def _train_toy(toy: Toy, arguments: Any) -> None:
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    class OneStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    if hasattr(arguments, "max_completion_length"):
        arguments.max_completion_length = min(arguments.max_completion_length or 2, 2)
    trainer = toy.kind(
        model=_toy_model(),
        args=arguments,
        processing_class=_toy_tokenizer(),
        peft_config=LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=datasets.Dataset.from_list([toy.row] * TOY_ROWS),
        callbacks=[OneStep()],
        **toy.beside,
    )
    trainer.remove_callback(PrinterCallback)
    gc.freeze()  # the trainer collects garbage, and there is nothing of its own yet among so many modules
    try:
        trainer.train()
    finally:
        gc.unfreeze()


def _toy_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=1, max_position_embeddings=64))


def _toy_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<end>", "user", "assistant", "a", "b", "c")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    ends = {"eos_token": "<end>", "pad_token": "<pad>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **ends)


@contextlib.contextmanager
def _as_one_plain_process() -> Iterator[None]:
    """No launcher, no noise, and afterwards the process as it was: a trainer seeds, logs and keeps states of its own."""
    import datasets
    import numpy as np
    from accelerate.state import AcceleratorState, GradientState
    from transformers.utils import logging as said

    launched = {
        name: value for name, value in os.environ.items() if name.startswith(LAUNCHED) or name in LAUNCHED_NAMES
    }
    draws = random.getstate(), np.random.get_state(), torch.get_rng_state()
    verbosity, bars = said.get_verbosity(), datasets.are_progress_bars_disabled()
    for name in launched:
        del os.environ[name]
    said.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.update(launched)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        said.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        torch.set_rng_state(draws[2])


# ---- lora ----


def _lora_faults(loaded: LoadedRecipe, make_model: Callable[[], Any]) -> list[Fault]:
    from peft import LoraConfig

    from trimtab.axis.base_check import add_adapters

    lora = loaded.recipe.lora
    hidden = make_model().config.get_text_config().hidden_size

    def put_on(given: dict[str, Any]) -> None:
        LoraConfig(**{"task_type": "CAUSAL_LM", **given})
        add_adapters(make_model(), given)

    found = [_fault("lora", key, lora.get(key), error, "PEFT") for key, error in _guilty(lora, put_on)]
    if isinstance(rank := lora.get("r"), int) and rank > hidden:
        found.append(
            Fault(
                f"a rank of {rank:,} is more than the model's hidden size, {hidden}, and holds nothing more than that",
                "lower it: lora.r=16",
                "lora.r",
            )
        )
    return found


# ---- attention, services, rewards, machine ----


def attention_faults(section: ModelSection, *, here: bool) -> list[Fault]:
    """An ``attn_implementation`` that the model doesn't take, or, ``here``, that is not installed."""
    from transformers import AutoModelForCausalLM

    from trimtab.axis.models import load_config

    if section.attn_implementation is None:
        return []
    config = had(functools.partial(load_config, section.name, section.revision), section.name, "model.name")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=section.attn_implementation)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ImportError) or "not installed" in str(error)
        if not missing or here:
            return [_fault("model", "attn_implementation", section.attn_implementation, error, "transformers")]
    return []


def section_faults(recipe: Recipe, *, here: bool) -> list[Fault]:
    """What the ``model`` section asks for and does not get, and answers that it has no room for.

    Args:
        recipe: whose ``model`` section it is.
        here: as for :func:`rehearse`.
    """
    from trimtab.axis.models import load_config
    from trimtab.pipeline.user_texts import context_of

    section = recipe.model
    found = attention_faults(section, here=here)
    config = had(functools.partial(load_config, section.name, section.revision), section.name, "model.name")
    context = context_of(config)
    for name in ("axis", "method", "eval"):
        sampling = getattr(getattr(recipe, name), "sampling", None)
        if context is not None and sampling is not None and sampling.max_new_tokens >= context:
            said = f"answers of {sampling.max_new_tokens} tokens have no room in the model's context of {context}"
            found.append(Fault(said, "lower it", f"{name}.sampling.max_new_tokens"))
    if section.revision is not None and Path(resolve_name(section.name)[0]).is_dir():
        said = "has no effect: model.name is a folder, or a model that comes in a package, and has one revision"
        found.append(Fault(said, "remove model.revision", "model.revision"))
    return found


def _service_faults(train: Mapping[str, Any]) -> list[Fault]:
    """Reports to services that aren't installed, and pushes to a hub without a token."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    found = []
    asked = train.get("report_to", "none")
    for name in asked if isinstance(asked, list) else [asked]:
        try:
            for kind in get_reporting_integration_callbacks(name):
                kind()
        except Exception as error:  # each integration has a class of its own
            found.append(_fault("train", "report_to", name, error, "transformers"))
    if train.get("push_to_hub") is True:
        from huggingface_hub import get_token

        if train.get("hub_token") is None and get_token() is None:
            remedy = "log in once, with `hf auth login`, or set train.push_to_hub=false"
            found.append(Fault("there is no token for the hub on this machine", remedy, "train.push_to_hub"))
    return found


def _data_faults(loaded: LoadedRecipe) -> list[Fault]:
    """Rows of the user's files that can't be trained on, prompts without room for an answer, or that no reward is defined for."""
    from trimtab.train.sources import check_data

    check_data(loaded.recipe)
    method_of(loaded.recipe).check_prompts(loaded.recipe)
    return []


def _reward_faults(loaded: LoadedRecipe) -> list[Fault]:
    """Rewards that can't be imported."""
    from trimtab.train.rewards import imported_reward

    for name in loaded.recipe.method.functions():
        imported_reward(name)
    return []


def judge_faults(sections: Mapping[str, JudgeSection | None]) -> list[Fault]:
    """Judges that can't be asked from here: no key, no package, or a local model that isn't there.

    Args:
        sections: dotted key -> the section.
    """
    from trimtab.axis.judge import check_endpoint
    from trimtab.axis.models import load_config

    findings = Findings()
    for key, section in sections.items():
        if section is not None:
            with findings.of_a_check():
                check_endpoint(section.model_dump(), key)
                if not section.endpoint:
                    had(functools.partial(load_config, section.model), section.model, f"{key}.model")
    return findings.faults


def _machine_faults(loaded: LoadedRecipe) -> list[Fault]:
    """What this machine hasn't got."""
    recipe = loaded.recipe
    trial = functools.partial(_config_here, loaded)
    asked = {key: value for key, value in recipe.train.items() if key in (*MACHINE, "use_cpu")}
    owner = train_config(recipe.method.name)
    guilty = _guilty(asked, trial)
    if guilty and _error(trial, {"use_cpu": True}) is not None:  # nor does the plainest config pass here
        guilty = []
    found = [_fault("train", key, asked.get(key), error, owner) for key, error in guilty]
    for key, package, extra in (
        ("use_vllm", "vllm", "trimtab[vllm]"),
        ("use_liger_kernel", "liger_kernel", "liger-kernel"),
    ):
        if recipe.train.get(key) is True and not _is_installed(package):
            found.append(
                Fault(f"{package} is not installed", f"pip install '{extra}', or set train.{key}=false", f"train.{key}")
            )
    kind, _, number = recipe.model.device.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        remedy = "leave model.device out to have it chosen, or set model.device=cpu"
        found.append(Fault("mps is asked for, and this machine has none", remedy, "model.device"))
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        remedy = "leave model.device out to have it chosen, or set model.device=cpu"
        found.append(Fault(f"{recipe.model.device} is asked for, and torch sees {there} GPUs", remedy, "model.device"))
    return found


def _config_here(loaded: LoadedRecipe, train: dict[str, Any]) -> None:
    """The method's config with the keys that belong to the machine alone, and the accelerator that it asks for."""
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    recipe = loaded.recipe
    group = (
        {"num_generations": 8} if recipe.method.trains_conversations else {}
    )  # TRL's own number of rows divides by it
    asked = recipe.model_copy(update={"train": {"max_steps": 1, "learning_rate": 1e-4, **group, **train}})
    with _config_of(asked, loaded) as arguments:
        if arguments.torch_compile:
            TorchDynamoPlugin(backend=arguments.torch_compile_backend)
        Accelerator(cpu=arguments.use_cpu, mixed_precision=arguments.mixed_precision)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was made by hand
        return True


# ---- who is at fault ----


def _guilty(values: Mapping[str, Any], trial: Trial) -> list[tuple[str, Exception]]:
    """Keys whose values a trial does not take, with what it raises: of each fault, the one without which it says something else.

    Of several such keys it is the one that the error names, or whose value it does, or that the recipe says last.
    """
    left = dict(values)
    found: list[tuple[str, Exception]] = []
    while left and (error := _error(trial, left)) is not None:
        said = str(error)
        likely = list(left)[::-1]
        likely.sort(key=lambda key: (not _in(key, said), not _in(left[key], said)))
        guilty = next((key for key in likely if not _same(error, _error(trial, _without(left, key)))), "")
        if not any(
            _in(key, said) for key, _ in found
        ):  # where a key is left out already, its default may not fit the others
            found.append((guilty, error))
        if not guilty:
            break
        del left[guilty]
    return found


def _in(word: Any, text: str) -> bool:
    return isinstance(word, str) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _error(trial: Trial, values: dict[str, Any]) -> Exception | None:
    try:
        trial(dict(values))
    except Exception as error:  # a library may refuse with any class
        if isinstance(error, OSError) and error.errno is not None and (known := known_fault(error)) is not None:
            raise known from error  # a full disk is no fault of a key
        return error
    return None


def _same(error: Exception, other: Exception | None) -> bool:
    return other is not None and type(error) is type(other) and str(error) == str(other)


def _fault(section: str, name: str, value: Any, error: Exception, owner: str) -> Fault:
    """The fault of a key, in the library's own words; of the whole section where no key alone is at fault."""
    key = f"{section}.{name}" if name else section
    if isinstance(error, UserError):
        return Fault(error.fault, error.remedy, key if error.key in (None, section) else error.key)
    said = _first_line(error)
    remedy = f"correct or remove {key}"
    if "pip install" in said or "installed" in said:
        remedy = f"install it, or remove {key}"
    elif isinstance(value, str) and (choices := re.findall(r"'([^']+)'", said.partition("[")[2])):
        remedy = did_you_mean(value, choices, f"choose one of {', '.join(choices)}")
    return Fault(f"{owner} refuses it: {said}", remedy, key)


def _first_line(error: Exception) -> str:
    """The first line that an error has, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
