"""Combinations that cannot work, or in which a setting would do nothing, across the sections of a recipe."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from trimtab.recipes.faults import Fault, did_you_mean
from trimtab.recipes.schema import MOST_LAYERS, Recipe

DATA = Path(__file__).parent / "data"

# Keys of `train` that trimtab sets itself, or whose work it does another way, whatever the method.
NOT_YOURS = {
    "remove_unused_columns": "remove it: trimtab sets it, as its rows carry a column of their own",
    "chat_template_path": "remove it: the tokenizer's own template is used, with model.chat_template_kwargs",
    "truncation_mode": "remove it: what is longer than train.max_length loses its oldest turns, never its answer",
    "model_init_kwargs": "remove it: the `model` section says how the model is loaded",
    "num_train_epochs": "set train.max_steps instead: rollouts are made as training goes on, so there is no epoch",
    "eval_strategy": "remove it: the eval stage measures the model, with every arm",
    "ignore_data_skip": "remove it: a resumed run goes on with the rows where it stopped",
    "auto_find_batch_size": "remove it: which row belongs to which step is laid out beforehand; `trimtab check` tells what fits",
    "accelerator_config": "remove it: which row belongs to which rank and step is laid out beforehand",
    "deepspeed": "remove it and choose a strategy when launching: --accelerate zero3",
    "fsdp": "remove it and choose a strategy when launching: --accelerate fsdp2",
    "fsdp_config": "remove it and choose a strategy when launching: --accelerate fsdp2",
    "parallelism_config": "remove it and choose a strategy when launching: --accelerate fsdp2",
    "resume_from_checkpoint": "remove it: a run goes on from its own last whole checkpoint",
    "trust_remote_code": "remove it: the code of a model's folder is never run",
    "enable_jit_checkpoint": "remove it: a run is killed and goes on from its last whole checkpoint",
}

# Keys of `train` that may have but one value: (the value, why, what to do instead).
ONLY = {
    "save_only_model": (
        False,
        "a checkpoint without the optimiser would be resumed with another one, and nothing would say so",
    ),
}
# Keys of `lora` that may have but some values: (values, why, what to do instead). With its adapter off, a model must be its base.
_NOT_THE_BASE = "the base's weights are rewritten: with the adapter off, the model would not be the base"
_OF_AN_INIT = "it belongs to an initialisation that rewrites the base's weights, or does nothing"
LORA_ONLY: dict[str, tuple[tuple[object, ...], str, str]] = {
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal", "mica"),
        f"{_NOT_THE_BASE} (or the data that this initialisation needs is not gathered)",
        "set lora.init_lora_weights=true, or one of false, gaussian, orthogonal, mica",
    ),
    "bias": (("none",), "the base's own biases would be trained, and stay changed with the adapter off", "set lora.bias=none"),
    "modules_to_save": (
        (None, []),
        "whole modules would be trained beside the adapter; of the head the divergences give no gradient",
        "remove it: target_modules: all-linear reaches all layers",
    ),
    "kasa_config": ((None,), _NOT_THE_BASE, "remove it"),
    "layer_replication": ((None, []), "the base would have other layers: another model", "remove it"),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"), ((None, {}), _OF_AN_INIT, "remove it")
    ),
    "alora_invocation_tokens": (
        (None, []),
        "the adapter would act only behind these tokens, which no prompt here has",
        "remove it",
    ),
    "monteclora_config": ((None,), "the policy would be another at every forward", "remove it"),
    "arrow_config": ((None,), "it chooses among adapters that are there already", "remove it"),
    "megatron_config": ((None,), "it is of Megatron's layers, which transformers' models have not", "remove it"),
    "megatron_core": (("megatron.core",), "it is of Megatron's layers, which transformers' models have not", "remove it"),
    "use_qalora": ((False,), "it is of GPTQ weights alone", "remove it"),
    "qalora_group_size": ((16,), "it is of GPTQ weights alone", "remove it"),
    "ensure_weight_tying": ((False,), "no adapter may lie on embedding and head at once", "remove it"),
    "runtime_config": ((None, {}), "it is not part of an adapter", "remove it"),
    "inference_mode": ((False,), "nothing would be trained", "remove it"),
    "task_type": (("CAUSAL_LM",), "a causal language model is trained", "remove it, or set lora.task_type=CAUSAL_LM"),
    "peft_type": (("LORA",), "PEFT makes a LoRA of it whatever it says", "remove it"),
    **dict.fromkeys(
        ("auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        ((None,), "PEFT writes it itself: the `model` section names the base", "remove it"),
    ),
}  # fmt: skip

PATTERNS = ("rank_pattern", "alpha_pattern")  # of `lora`: a number for each module that a pattern names
# How texts are taken for tokens without a tokenizer: characters a token, as in English, and what a template writes around a
# message, and before a chat. Rather too many, so that what passes here does fit.
CHARACTERS, MARKUP, HEAD = 4, 6, 32
# Keys of `train` and `lora` whose library takes any number, though not all of them mean something. Any other number must not be
# below 0, but for those of which the library's own default, or its formula, may be.
ABOVE_ZERO = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "max_length",
    "max_completion_length", "num_iterations", "steps_per_generation", "generation_batch_size", "num_generations",
    "temperature", "adam_epsilon", "ddp_timeout", "dataset_num_proc", "precompute_ref_batch_size", "ref_model_sync_steps",
    "r", "lora_alpha", "qalora_group_size",
)  # fmt: skip
SHARES = (
    "adam_beta1", "adam_beta2", "label_smoothing_factor", "label_smoothing", "ld_alpha", "ref_model_mixup_alpha",
    "top_entropy_quantile", "vllm_gpu_memory_utilization", "lora_dropout",
)  # fmt: skip
BELOW_ZERO = ("local_rank", "entropy_coef", "f_alpha_divergence_coef", "top_k")
# The largest that mean something; of all others a number beyond MOST is a slip of the finger.
AT_MOST = {"learning_rate": 10, "weight_decay": 10, "adam_epsilon": 1, "neftune_noise_alpha": 1000, "temperature": 100}
MOST, OF_ANY_SIZE = 1_000_000_000, ("seed", "data_seed")
# Values that the libraries look at when training begins, or never.
_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")
CHOICES: dict[str, tuple[Any, ...]] = {
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
# Which row belongs to which step is laid out beforehand: these many take about 1 GB.
MOST_ROWS = 10_000_000
SHORT_TRIAL = 10  # steps: a trial run of a recipe may end within its warm-up
SUCH_AS = {"r": 16, "lora_alpha": 32}

EVALUATED = "eval.split"  # in the place of a split: the one that this key names
# key -> (file, split, what): how many there are is known, so asking for more is told before anything is loaded.
SHIPPED = {
    "axis.roles": ("roles.jsonl", "train", "roles"),
    "axis.held_out_roles": ("roles.jsonl", "dev", "dev roles"),
    "axis.questions": ("questions.jsonl", "train", "questions"),
    "data.drift_prompts": ("drift_prompts.jsonl", "train", "drift prompts"),
    "eval.roles": ("roles.jsonl", EVALUATED, "roles"),
    "eval.questions": ("questions.jsonl", EVALUATED, "questions"),
    "eval.conversations": ("drift_conversations.jsonl", EVALUATED, "conversations"),
    "eval.benign": ("benign.jsonl", EVALUATED, "benign prompts"),
    "eval.benign_systems": ("benign_systems.jsonl", EVALUATED, "benign system prompts"),
    "eval.professional": ("professional_probes.jsonl", None, "professional probes"),
    "eval.case_studies": ("case_studies.jsonl", None, "case studies"),
    "eval.susceptibility_roles": ("roles.jsonl", EVALUATED, "roles"),
}


def impossible(recipe: Recipe, given: Set[str]) -> Iterator[Fault]:
    """Faults across sections, without file and line.

    Args:
        recipe: the recipe, each section valid by itself.
        given: dotted keys that stand in the file or on the command line, as against defaults.
    """
    yield from _train(recipe, given)
    yield from _lengths(recipe)
    yield from _floor(recipe, given)
    yield from _lora(recipe)
    yield from _method_and_data(recipe, given)
    yield from _shipped_data(recipe)
    yield from _evaluation(recipe)


@functools.cache
def _lines(name: str) -> list[str]:
    """The lines of a file that ships."""
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def _evaluation(recipe: Recipe) -> Iterator[Fault]:
    section = recipe.eval
    kinds = [json.loads(line)["kind"] for line in _lines("boundary_probes.jsonl")]
    there, alike = kinds.count("boundary"), kinds.count("benign_lookalike")
    if section.boundary_file is None and section.boundary_probes > there:
        yield Fault(
            f"{section.boundary_probes} boundary probes asked for; there are {there}",
            f"ask for at most {there}, or name a file of your own: eval.boundary_file",
            "eval.boundary_probes",
        )
    if section.lookalikes > alike:
        yield Fault(
            f"{section.lookalikes} look-alikes asked for; there are {alike}",
            f"ask for at most {alike}",
            "eval.lookalikes",
        )
    if section.second_reader == recipe.model.name:
        yield Fault(
            "has no effect: it is the base, which is the first reader",
            "name a model of another family, or leave it out",
            "eval.second_reader",
        )
    rows = map(json.loads, _lines("simulated_users.jsonl"))
    users = sum(len(row["topics"]) for row in rows if row["split"] == section.split)
    if section.simulated_users > users:
        yield Fault(
            f"{section.simulated_users} {section.split} simulated users asked for; there are {users}",
            f"ask for at most {users}",
            "eval.simulated_users",
        )
    if (section.simulated_users > 0) != (section.user is not None):
        yield Fault(
            "simulated users and the model that plays them belong together, and one is without the other",
            "set eval.simulated_users above 0 and eval.user to {endpoint: ..., model: ...} or {model: ...}",
            "eval.user" if section.user is None else "eval.simulated_users",
        )
    if section.judge is not None and not (
        section.susceptibility_roles or section.boundary_probes or section.boundary_file
    ):
        yield Fault(
            "has no effect: no measure that is judged is switched on",
            "set eval.susceptibility_roles or eval.boundary_probes above 0, or remove the judge",
            "eval.judge",
        )
    names = [tuning.name for tuning in section.durability]
    if len(names) > len(set(names)):
        yield Fault(f"two durability runs share a name: {', '.join(names)}", "give each its own", "eval.durability")
    if recipe.eval.tuned is not None and recipe.eval.control:
        yield Fault(
            "there is no control to weights that were tuned elsewhere: eval.tuned is set",
            "set eval.control=false, or remove eval.tuned to train and evaluate an adapter of this recipe",
            "eval.control",
        )


def _train(recipe: Recipe, given: Set[str]) -> Iterator[Fault]:
    if recipe.train.get("fp16") is True and (recipe.model.device == "cpu" or recipe.train.get("use_cpu") is True):
        yield Fault("has no effect: a CPU has no float16 training", "remove it, or set train.bf16=true", "train.fp16")
    for key, remedy in {**NOT_YOURS, **recipe.method.not_yours}.items():
        if key in recipe.train and not (key == "eval_strategy" and recipe.train[key] == "no"):
            yield Fault("this key can't be set in a recipe", remedy, f"train.{key}")
    yield from _numbers("train", recipe.train)
    for key, choices in CHOICES.items():
        if (value := recipe.train.get(key)) is not None and value not in choices:
            words = [str(choice) for choice in choices]
            remedy = did_you_mean(str(value), words, f"choose one of {', '.join(words)}")
            yield Fault(f"there is no {value!r} to choose here", remedy, f"train.{key}")
    for key, (only, why) in ONLY.items():
        if recipe.train.get(key, only) != only:
            yield Fault(f"is {recipe.train[key]}: {why}", f"set train.{key}={str(only).lower()}", f"train.{key}")
    yield from _size_of_training(recipe.train)
    trained = recipe.eval.tuned is None and "eval.tuned" not in given
    if trained and "max_steps" not in recipe.train and "num_train_epochs" not in recipe.train:
        yield Fault("is missing", "say how many optimiser steps to train: train.max_steps=100", "train.max_steps")
    for key in ("packing", "padding_free"):
        if recipe.train.get(key) is True:
            fault = (
                "rows can't be packed: on-the-fly rollouts, benign rows and the floor penalty need each row by itself"
            )
            yield Fault(fault, f"set train.{key}=false", f"train.{key}")
    for key in recipe.train:
        if key.startswith("vllm_") and recipe.train.get("use_vllm") is not True:
            yield Fault(
                "has no effect: vLLM samples nothing", "set train.use_vllm=true, or remove this key", f"train.{key}"
            )
    yield from _numbers("lora", recipe.lora)


def _lengths(recipe: Recipe) -> Iterator[Fault]:
    """Rows too short for an answer, or for the deepest turn of the shipped conversations with answers as long as they may be."""
    longest = recipe.row_length
    if not isinstance(longest, int) or longest < 1 or recipe.eval.tuned is not None:
        return
    answer = recipe.method.answers(recipe.train).max_new_tokens
    if longest <= answer + 2 * MARKUP:
        yield Fault(
            f"rows of {longest} tokens hold no answer of {answer} (method.sampling.max_new_tokens) with its prompt",
            f"set train.max_length={_rounded(answer + HEAD + 20 * MARKUP)}, or lower method.sampling.max_new_tokens",
            "train.max_length",
        )
        return
    needed = _conversation_lengths(answer)[
        : 0 if recipe.data.drift_file is not None else recipe.data.conversation_turns
    ]
    if needed and needed[-1] > longest:
        fits = sum(tokens <= longest for tokens in needed)
        yield Fault(
            f"a conversation of {len(needed)} turns (data.conversation_turns) with answers of {answer} tokens "
            f"(method.sampling.max_new_tokens) takes about {needed[-1]} tokens, and rows hold {longest}",
            f"set train.max_length={_rounded(needed[-1])}, which costs memory only where rows are that long; "
            f"or data.conversation_turns={fits}, or lower method.sampling.max_new_tokens",
            "train.max_length",
        )


def tokens_in(text: str) -> int:
    """Tokens of a message with its markup, about: told by its characters, since no tokenizer need be at hand."""
    return math.ceil(len(text) / CHARACTERS) + MARKUP


def _conversation_lengths(answer: int) -> list[int]:
    """About how many tokens the longest shipped conversation has after 1, 2, ... turns, each answered with ``answer`` tokens."""
    rows = map(json.loads, _lines("drift_conversations.jsonl"))
    asked: list[list[str]] = [row["turns"] for row in rows if row["split"] == "train"]
    lengths = [
        list(itertools.accumulate((tokens_in(turn) + answer + MARKUP for turn in turns), initial=HEAD))
        for turns in asked
    ]
    return [max(column) for column in itertools.zip_longest(*lengths, fillvalue=0)][1:]


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / 64) * 64


def _numbers(section: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    """Numbers of a library's section that lie outside of what means something."""
    for name, value in values.items():
        key = f"{section}.{name}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name in SHARES:
            if not 0 <= value <= 1 or (value == 1 and name in ("adam_beta1", "adam_beta2", "lora_dropout")):
                yield Fault(f"must be at least 0 and below 1, got {value}", f"give a share, such as {key}=0.0", key)
        elif name in ABOVE_ZERO:
            if value <= 0 or (isinstance(value, float) and value < 1e-30):
                yield Fault(
                    f"must be above 0, got {value}", f"give a positive number: {key}={SUCH_AS.get(name, 1)}", key
                )
        elif value < 0 and name not in BELOW_ZERO:
            yield Fault(f"must not be below 0, got {value}", f"give a positive number, such as {key}=1", key)
        if value > (most := AT_MOST.get(name, MOST)) and name not in (*SHARES, *OF_ANY_SIZE, "max_steps"):
            yield Fault(f"must be at most {most:,}, got {value:g}", "give a smaller number", key)


def _size_of_training(train: Mapping[str, Any]) -> Iterator[Fault]:
    """More rows than can be laid out, and a warm-up that never ends."""
    sizes = [train.get(key, 1) for key in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return
    steps, rows = sizes[0], sizes[0] * sizes[1] * sizes[2]
    if rows > MOST_ROWS:
        yield Fault(
            f"{rows:,} rows a process are more than can be laid out beforehand, which is at most {MOST_ROWS:,}",
            "lower it, or the rows of a step; SmolLM2's recipes take 30 steps, those of larger models 200",
            "train.max_steps",
        )
    elif train.get("warmup_steps", 0) > max(steps, SHORT_TRIAL) and "max_steps" in train:
        yield Fault(
            f"the learning rate would rise for {train['warmup_steps']:g} steps, and training ends after {steps}",
            "set it below train.max_steps; a number below 1 is a share of them",
            "train.warmup_steps",
        )


def floor_layers(recipe: Recipe) -> list[int] | None:
    """The floor's layers, as far as the recipe tells them: a list, or a published experiment's id; None for ``auto``."""
    if isinstance(recipe.floor.layers, list):
        return sorted(recipe.floor.layers)
    found = re.match(r"layers_(\d+):(\d+)-", recipe.floor.experiment or "")
    if found is None or len(found[2]) > 9 or int(found[2]) - int(found[1]) > MOST_LAYERS:
        return None  # the file will tell that it has no such experiment
    return list(range(int(found[1]), int(found[2]))) or None  # the slice in the id leaves out its end


def _floor(recipe: Recipe, given: Set[str]) -> Iterator[Fault]:
    layers = recipe.floor.layers
    if isinstance(layers, list) and (not layers or layers != sorted(set(layers))):
        yield Fault(
            f"layers must be ascending and distinct, got {layers}",
            "write a range, floor.layers: 46-53, or a list such as [46, 47, 48]",
            "floor.layers",
        )
    if recipe.floor.experiment is not None and (recipe.floor.path or "").endswith(".safetensors"):
        yield Fault(
            "has no effect: a floor.safetensors holds one floor alone",
            "remove floor.experiment, or name a capping_config.pt in floor.path",
            "floor.experiment",
        )
    if recipe.floor.path is not None:
        for key in ("layers", "percentile"):
            if f"floor.{key}" in given:
                yield Fault(
                    "has no effect: floor.path names a finished floor, with layers and heights of its own",
                    f"remove floor.{key}, or remove floor.path to calibrate a floor",
                    f"floor.{key}",
                )


def _lora(recipe: Recipe) -> Iterator[Fault]:
    for key, (values, why, remedy) in LORA_ONLY.items():
        value = recipe.lora.get(key, values[0])
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            yield Fault(f"is {value!r}: {why}", remedy, f"lora.{key}")
    for name in PATTERNS:
        given = recipe.lora.get(name)
        for module, value in given.items() if isinstance(given, dict) else ():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= 0 or (name == "rank_pattern" and value != int(value)):
                yield Fault(
                    f"must be a number above 0 for each module, got {value!r} for {module}",
                    "give a rank, such as 8" if name == "rank_pattern" else "give a number, such as 16",
                    f"lora.{name}",
                )
    targets = recipe.lora.get("target_modules")
    names = targets if isinstance(targets, list) else []
    hit = any(isinstance(name, str) and (name == "lm_head" or name.endswith(".lm_head")) for name in names)
    if isinstance(targets, str) and targets != "all-linear":
        hit = _matches(targets, "lm_head") is True
    patterns = {name: recipe.lora.get(name) for name in ("target_modules", "exclude_modules", *PATTERNS)}
    for name, value in patterns.items():
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            if isinstance(fault := _matches(str(pattern), ""), str):
                yield Fault(f"not a regular expression: {fault}", "mend it, or write a list of names", f"lora.{name}")
    if hit:
        yield Fault(
            "an adapter on lm_head is not supported: TRL fuses the head with the loss, past any adapter",
            "leave lm_head out; `all-linear` does so by itself",
            "lora.target_modules",
        )
    chosen = recipe.lora.get("layers_to_transform")
    if chosen is not None and isinstance(targets, str):
        yield Fault(
            "PEFT takes layers_to_transform only with a list of target_modules",
            "list the modules, such as [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
            "lora.layers_to_transform",
        )
        return
    adapted = [chosen] if isinstance(chosen, int) else chosen
    window = floor_layers(recipe)
    if not window or not isinstance(adapted, list) or not all(isinstance(layer, int) for layer in adapted):
        return
    if adapted and min(adapted) > window[-1]:
        yield Fault(
            f"the adapters begin at layer {min(adapted)}, above the floor's deepest layer {window[-1]}: "
            "no adapter can move a projection there",
            f"adapt layers up to {window[-1]} as well, or leave layers_to_transform out",
            "lora.layers_to_transform",
        )


def _matches(pattern: str, name: str) -> bool | str:
    """Whether a regular expression matches a name; what is wrong with it where it is none."""
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)


def _method_and_data(recipe: Recipe, given: Set[str]) -> Iterator[Fault]:
    method, data = recipe.method, recipe.data
    yield from _benign(recipe, given)
    if method.floor_target == "base" and not method.base_floor:
        yield Fault(
            f"{method.name} has no base-relative floor", "set method.floor_target=absolute", "method.floor_target"
        )
    yield from method.own_faults(recipe, given)
    yield from _files(recipe)
    yield from _weights(recipe)
    if data.drift_file is None and data.drift_prompts + data.role_questions + data.conversation_turns == 0:
        yield Fault(
            "there is nothing to train on: every source of drift prompts is 0",
            "set data.drift_prompts=220, or name a data.drift_file",
            "data.drift_prompts",
        )


def _files(recipe: Recipe) -> Iterator[Fault]:
    """Files of the user's own stand in the place of what ships."""
    data = recipe.data
    for name in ("drift_prompts", "role_questions", "conversation_turns"):
        if data.drift_file is not None and getattr(data, name) > 0:
            yield Fault(
                "has no effect: data.drift_file stands in the place of the prompts that ship",
                f"set data.{name}=0, or remove data.drift_file",
                f"data.{name}",
            )
    if data.benign_file is not None and data.benign_share == 0:
        yield Fault(
            "has no effect: no row is benign, as data.benign_share is 0",
            "set data.benign_share above 0, or remove data.benign_file",
            "data.benign_file",
        )


def _weights(recipe: Recipe) -> Iterator[Fault]:
    """A loss whose every weight is 0 trains nothing, after axis and floor were made for it."""
    method = recipe.method
    barrier = recipe.data.benign_share > 0 and (method.benign_kl_weight > 0 or method.benign_axis_weight > 0)
    own = method.own_weights(recipe.train)
    if barrier or method.floor_weight > 0 or any(own.values()):
        return
    yield Fault(
        "every weight of the loss is 0: nothing would be trained",
        f"set method.floor_weight above 0, or {' or '.join(own)}",
        "method.floor_weight",
    )


def _benign(recipe: Recipe, given: Set[str]) -> Iterator[Fault]:
    data, method = recipe.data, recipe.method
    if data.benign_share > 0 and method.benign_kl_weight == 0 and method.benign_axis_weight == 0:
        yield Fault(
            f"a share of {data.benign_share} of the rows is benign, and neither benign weight uses them",
            "set data.benign_share=0, or method.benign_kl_weight above 0",
            "data.benign_share",
        )
    for key in ("benign_kl_weight", "benign_axis_weight", "benign_student_share"):
        if data.benign_share == 0 and f"method.{key}" in given and getattr(method, key) > 0:
            yield Fault(
                "has no effect: no row is benign, as data.benign_share is 0",
                "set data.benign_share above 0, or remove this weight",
                f"method.{key}",
            )


def _shipped_data(recipe: Recipe) -> Iterator[Fault]:
    asked = sum(json.loads(line)["split"] == "train" for line in _lines("questions.jsonl"))
    if recipe.data.role_questions > asked:
        yield Fault(
            f"{recipe.data.role_questions} questions a role asked for; there are {asked}",
            f"ask for at most {asked}",
            "data.role_questions",
        )
    for key, (file, split, what) in SHIPPED.items():
        section, _, name = key.partition(".")
        if key == "eval.conversations" and recipe.eval.conversations_file is not None:
            continue
        asked = getattr(getattr(recipe, section), name)
        if split == EVALUATED:
            split = recipe.eval.split
            what = f"{split} {what}"
        there = sum(1 for line in _lines(file) if split is None or json.loads(line)["split"] == split)
        if asked > there:
            yield Fault(f"{asked} {what} asked for; there are {there}", f"ask for at most {there}", key)
