"""What each stage of a run depends on, and so which changes of a recipe a run folder takes.

A stage that is done, or begun, holds the run to what it was made from: the sections that it reads, the content of the files that
they name, and what the stages before it were made from. Any other change of the recipe goes on where the run was.

A key is no part of it if it says only where, how fast, or in what portions the same thing is computed, what is told of it, or
what is kept of it on the way. Keys of ``train`` that no list here names are part of it, so that a library's new ones are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.axis.files import file_fingerprint, fingerprint, vector_files
from trimtab.recipes.gone import GONE
from trimtab.recipes.methods import DEFAULT_METHOD, METHODS
from trimtab.recipes.schema import Recipe, deciding

Inputs = dict[str, Any]

# ---- keys that are no part of it ----

PORTIONS = ("axis.sampling.batch_size", "floor.batch_size", *{kind.batch_key for kind in METHODS.values()})
PLACES = ("model.device",)

TOLD = (
    "debug", "disable_tqdm", "include_num_input_tokens_seen", "log_completions", "log_completions_hub_repo", "log_level",
    "log_level_replica", "log_multimodal", "log_on_each_node", "log_unique_prompts", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "num_completions_to_print", "project", "report_to", "run_name",
    "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
)  # fmt: skip
KEPT = (
    "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "output_dir",
    "push_to_hub", "save_on_each_node", "save_steps", "save_strategy", "save_total_limit",
)  # fmt: skip
# Nothing is evaluated while training: `eval_strategy` is refused. The Trainer reads do_train and its like nowhere.
NOT_READ = (
    "batch_eval_metrics", "do_eval", "do_predict", "do_train", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches",
    "eval_on_start", "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object", "greater_is_better",
    "include_for_metrics", "load_best_model_at_end", "metric_for_best_model", "num_generations_eval",
    "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only",
)  # fmt: skip
# The same numbers by another way, up to rounding: from memory or computed again, by one process or by many.
WAYS = (
    "activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataset_num_proc", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "ds3_gather_for_generation", "full_determinism",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rank", "precompute_ref_batch_size", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cache", "use_cpu",
    "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_max_model_length", "vllm_mode",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_tensor_parallel_size",
)  # fmt: skip
# Rows a step are held by themselves, as the number of processes counts too: see `trimtab.train.job.check_spread`.
SPREAD_OVER = ("per_device_train_batch_size", "gradient_accumulation_steps")
NO_PART_OF_TRAINING = frozenset((*TOLD, *KEPT, *NOT_READ, *WAYS, *SPREAD_OVER))

# ---- what the stages read ----

# Stages in their order -> the sections, or keys, that each reads beyond those of the stages before it.
READS: dict[str, tuple[str, ...]] = {
    "axis": ("model", "axis"),
    "floor": ("floor", "eval.control"),
    "pairs": (
        "method.name", "method.cap_strength", "method.sampling", "data.drift_prompts", "data.role_questions",
        "data.conversation_turns", "data.drift_file", "data.seed", "train.max_length",
    ),
    "train": ("method", "data", "lora", "train"),
}  # fmt: skip
# Files of the user, whose content counts and not where they lie.
FILES = ("axis.path", "floor.path", "data.drift_file", "data.benign_file")


def stage_inputs(resolved: Mapping[str, Any], stage: str, *, portions: bool = False) -> Inputs:
    """Dotted key -> value of all that a stage depends on.

    Args:
        resolved: a recipe's sections, whole.
        stage: a key of :data:`READS`.
        portions: with the sizes of batches, by which a stage goes on that was begun.
    """
    stages = list(READS)
    read = [section for each in stages[: stages.index(stage) + 1] for section in READS[each]]
    found = {
        key: _content(value) if key in FILES else value
        for key, value in _flat(deciding(resolved))
        if any(key == section or key.startswith(f"{section}.") for section in read) and _counts(key, portions)
    }
    return found if plays_training_roles(resolved) else {**found, "axis rollouts": "of held-out roles"}


def plays_training_roles(resolved: Mapping[str, Any]) -> bool:
    """Whether the axis stage plays the training roles: for an axis or a floor of its own, or whatever else reads their answers.

    An evaluation of weights from elsewhere needs none of them where it is given both as finished files.
    """
    section = resolved["eval"]
    given = resolved["axis"]["path"] is not None and str(resolved["floor"]["path"] or "").endswith(".safetensors")
    persona = any(tuning["name"] == "persona" and tuning["file"] is None for tuning in section["durability"])
    return persona or section["tuned"] is None or not given


def _counts(key: str, portions: bool) -> bool:
    section, _, name = key.partition(".")
    if section == "train":
        return name.partition(".")[0] not in NO_PART_OF_TRAINING
    if key in PORTIONS:
        return portions
    return key not in PLACES


def flat(resolved: Mapping[str, Any]) -> Inputs:
    """Dotted key -> value of a whole recipe."""
    return dict(_flat(resolved))


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value; lists of sections by number, other lists whole."""
    inner: Mapping[str, Any] | None = value if isinstance(value, Mapping) else None
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        inner = {str(number): item for number, item in enumerate(value)}
    if inner is None:
        yield above, value
        return
    for name, item in inner.items():
        yield from _flat(item, f"{above}.{name}" if above else str(name))


def _content(value: Any) -> Any:
    """A file or a folder of vectors by its name and content; anything else, such as a place on the hub, by itself."""
    if isinstance(value, str) and os.path.isfile(value):
        return f"{Path(value).name} ({file_fingerprint(value)})"
    if isinstance(value, str) and os.path.isdir(value):
        contents = {path.name: file_fingerprint(path) for path in vector_files(value)}
        return f"{Path(value).name} ({fingerprint(contents)})"
    return value


def differences(made: Inputs, now: Inputs) -> list[tuple[str, Any, Any]]:
    """Key, value then and value now, of what differs.

    A key that is new to the schema since then counts as having had its default; one of a library's section as not set. One that
    has left the schema is none where it said what is always so now.
    """
    defaults: Inputs = {}
    if now.keys() - made.keys():
        method = made.get("method.name", now.get("method.name", DEFAULT_METHOD))
        plain = Recipe.model_validate({"model": {"name": "?"}, "method": {"name": method}})
        sections = plain.model_dump(mode="json", exclude={"train", "lora"})
        defaults = flat(sections)
    then = {**{key: defaults[key] for key in now.keys() - made.keys() if key in defaults}, **made}
    then = _of_now(then)
    return [
        (key, then.get(key, NOT_SET), now.get(key, NOT_SET))
        for key in [*now, *(key for key in then if key not in now)]
        if then.get(key, NOT_SET) != now.get(key, NOT_SET)
    ]


def _of_now(made: Inputs) -> Inputs:
    """What a record of before says in the keys of now, where the run is one that those can say."""
    if made.get("floor.allow_inert"):  # any firing was enough then
        made = {**made, "floor.allow_inert": False, "floor.min_firing": 0}
    return {key: value for key, value in made.items() if key not in GONE or value != GONE[key].now}


class _NotSet:
    def __repr__(self) -> str:
        return "not set"


NOT_SET = _NotSet()
