"""A PEFT adapter that somebody has saved: what is wrong with it is told, and it is put on a model.

PEFT loads what fits and passes over the rest: weights under other names leave the model as it was, and nobody is told. So the
files are looked at before any model is loaded (:func:`check_adapter_files`), the adapter is put on the model's mere structure,
and on the model itself (:func:`load_adapter`); each time all its weights must have found their place, and all places a weight.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_json
from trimtab.axis.layers import base_model_of

log = logging.getLogger("trimtab")

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Kinds that the tests load, switch off and merge.
SUPPORTED = frozenset({
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
    "OFT", "PSOFT", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
PROMPTS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"})
# Keys of a LoRA's config under which it is another thing -> why it can't be measured.
UNSUPPORTED_KEYS = {
    "alora_invocation_tokens": "it acts only behind its invocation tokens, which no prompt here has",
    "layer_replication": "it makes the base another model, with other layers",
    "arrow_config": "it chooses among other adapters",
    "megatron_config": "it is of Megatron's layers",
}
MERGED = (
    "merge it where it was trained (merge_and_unload, save_pretrained, with the tokenizer), and name the merged model"
)
# Values of ``init_lora_weights``: on the base itself, or on one that PEFT finds again from it; and on one that it can't.
OF_THE_BASE = ("gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
OF_ANOTHER_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
_MISFIT = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[.*?\])\)"
)


def check_adapter_files(folder: Path, key: str | None = None) -> dict[str, Any]:
    """Look at an adapter's files; returns its config.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        key: where the folder was named, for the error.

    Raises:
        UserError: if a file is not readable, the kind of adapter is not supported, a weight is not finite, or config and weights
            disagree.
    """
    config: Any = read_json(folder / ADAPTER_CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise UserError(
            "it names no peft_type", file=folder / ADAPTER_CONFIG, key=key, remedy="save the adapter once more"
        )
    for fault, remedy in _kind_faults(kind, config):
        raise UserError(fault, file=folder / ADAPTER_CONFIG, key=key, remedy=remedy)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"the adapter has no {ADAPTER_WEIGHTS}" + (", only a pickle, which may run code" if pickled else ""),
            file=folder,
            key=key,
            remedy="save it once more where you trust it: PeftModel.from_pretrained(...).save_pretrained(...)"
            if pickled
            else "save it once more",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            for fault, remedy in _weight_faults(config, names, file):
                raise UserError(fault, file=path, key=key, remedy=remedy)
            if _changes_nothing(config, names, file):
                log.warning("%s: this adapter changes nothing: lora_alpha or every lora_B is zero", folder)
    except SafetensorError as error:
        raise UserError(
            f"not a readable safetensors file: {error}", file=path, key=key, remedy="copy it again; it may be cut short"
        ) from error
    found: dict[str, Any] = config
    return found


def _kind_faults(kind: str, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if kind in PROMPTS:
        yield (
            f"a {kind} adapter puts tokens or keys of its own before the text, so positions are no longer the base's",
            "give an adapter of the weights, such as LoRA",
        )
    if kind not in SUPPORTED:
        yield f"adapters of kind {kind} are not supported", f"{MERGED}; supported are {', '.join(sorted(SUPPORTED))}"
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        yield (
            f"the adapter is for the task {task}, not for text (CAUSAL_LM)",
            "give an adapter of a causal language model",
        )
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    numbers = [config.get("r", 1), config.get("lora_alpha", 1)] if kind == "LORA" else []
    if not all(isinstance(pattern, dict) for pattern in patterns):
        yield "rank_pattern or alpha_pattern is no mapping of names to numbers", "save the adapter once more"
    elif not all(map(_is_number, [*numbers, *(n for p in patterns for n in p.values())])):
        yield "one of r, lora_alpha, rank_pattern and alpha_pattern is no number", "save the adapter once more"
    yield from _init_faults(config.get("init_lora_weights", True)) if kind == "LORA" else ()
    for name, why in UNSUPPORTED_KEYS.items():
        if config.get(name):
            yield f"{name} is set: {why}", MERGED


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _init_faults(init: Any) -> Iterator[tuple[str, str]]:
    """Of ``init_lora_weights``: PEFT changes the base by it once more on loading, where it can, and else leaves it as it is."""
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, str) and name.startswith(OF_ANOTHER_BASE):
        yield (
            f"{init}: it belongs to a base that was changed by what no file holds (data, or numbers drawn at random)",
            MERGED,
        )
    elif not (isinstance(name, bool) or name is None or name in OF_THE_BASE):
        yield f"init_lora_weights: {init} is none that PEFT knows", "save the adapter once more"


def _weight_faults(config: dict[str, Any], names: Sequence[str], file: Any) -> Iterator[tuple[str, str]]:
    if not names:
        yield "it holds no tensors", "save it once more: some engine settings save an empty adapter without an error"
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for name in names:
        if name.endswith("lora_A.weight") and config.get("peft_type") == "LORA" and not config.get("target_parameters"):
            rank = file.get_slice(name).get_shape()[0]
            if rank not in ranks:
                yield (
                    f"{name} has rank {rank}, and {ADAPTER_CONFIG} says r: {config.get('r')}",
                    "give config and weights of one and the same adapter",
                )
        if not bool(torch.isfinite(file.get_tensor(name).float()).all()):
            yield f"{name} is not finite", "train it again, or give an earlier checkpoint of it"


def _changes_nothing(config: dict[str, Any], names: Sequence[str], file: Any) -> bool:
    """Whether a LoRA was saved untrained, so that whatever it is put on stays as it is."""
    if (
        config["peft_type"] != "LORA"
        or config.get("use_dora")
        or not all(re.search(r"\.lora_[AB]\.", n) for n in names)
    ):
        return False
    if config.get("lora_alpha") == 0 and not config.get("alpha_pattern"):
        return True
    return not any(bool(file.get_tensor(name).float().any()) for name in names if ".lora_B." in name)


def load_adapter(
    model: Any, folder: str | Path, *, name: str = "default", trainable: bool = False, key: str | None = None
) -> Any:
    """Put a saved adapter on a model, and see that all of it has landed.

    Args:
        model: the base, or a PeftModel that gets one more adapter; on the meta device only places are looked at.
        folder: of the adapter, see :func:`check_adapter_files`.
        name: that the adapter gets.
        trainable: whether it is to be trained further.
        key: where the folder was named, for the error.

    Returns:
        The PeftModel.

    Raises:
        UserError: if the adapter does not go on the model, whole.
    """
    base = base_model_of(model)
    rows = int(base.get_input_embeddings().weight.shape[0])
    mapping = getattr(base, "_checkpoint_conversion_mapping", None)
    try:
        config = _config_of(Path(folder))
        config.inference_mode = not trainable
        if any(p.is_meta for p in model.parameters()) and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # no initialisation that looks at weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is an error here
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
            found = model.load_adapter(
                str(folder), name, is_trainable=trainable, torch_device="cpu", key_mapping=mapping
            )
    except UserError:
        raise
    except KeyError as error:  # of a module that is saved whole, or of an embedding's rows
        raise _misfit(folder, key, f"its weight {error} is not in the file", "give the whole adapter") from error
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:  # a NotImplementedError is the first
        raise _refused(error, folder, key, rows) from error
    return _landed(model, found, folder, key)


def _landed(model: Any, found: Any, folder: str | Path, key: str | None) -> Any:
    missing = [one for one in found.missing_keys if "vblora_vector_bank" not in one]  # shared by the layers, saved once
    unexpected = list(found.unexpected_keys)
    parts = (
        [f"{len(unexpected)} of its weights have no place in the model, the first is {unexpected[0]}"]
        if unexpected
        else []
    )
    parts += [f"{len(missing)} places of the model get no weight, the first is {missing[0]}"] if missing else []
    if parts:
        raise _misfit(
            folder,
            key,
            "; ".join(parts),
            "name the very base that it was trained from, whose layers have these names, and give the whole adapter",
        )
    return model


def _config_of(folder: Path) -> Any:
    """The adapter's config; a key that the installed PEFT does not know is named."""
    given = read_json(folder / ADAPTER_CONFIG)
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[given["peft_type"]])}
    if unknown := sorted(name for name, value in given.items() if value and name not in known):
        log.warning(
            "%s: this version of PEFT does not know %s and passes over it; a later one may give another model",
            folder / ADAPTER_CONFIG, ", ".join(unknown),
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftConfig.from_pretrained(str(folder))


def _misfit(folder: str | Path, key: str | None, fault: str, remedy: str) -> UserError:
    return UserError(f"this adapter does not go on the base model: {fault}", file=folder, key=key, remedy=remedy)


def _refused(error: Exception, folder: str | Path, key: str | None, rows: int) -> UserError:
    """What torch and PEFT say of an adapter that does not fit, as one sentence.

    Args:
        error: of theirs.
        folder: of the adapter.
        key: where it was named.
        rows: of the base's embedding.
    """
    mismatch = _MISFIT.search(str(error))
    if mismatch is None:
        return _misfit(folder, key, str(error).strip().splitlines()[0], "name the base that it was trained from")
    name, saved, own = mismatch[1], *(_numbers(part) for part in mismatch.groups()[1:])
    grown = [theirs for theirs, ours in zip(saved, own, strict=False) if ours == rows and theirs != rows]
    if grown:
        return _misfit(
            folder,
            key,
            f"it was trained with a vocabulary of {grown[0]}, and the base's embedding has {rows} rows ({name})",
            f"resize the base as in training (model.resize_token_embeddings({grown[0]})), {MERGED}",
        )
    return _misfit(
        folder, key, f"{name} is {list(saved)}, and the model's {list(own)}", "name the base that it was trained from"
    )


def _numbers(shape: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", shape))
