"""Whether the base is still the base once an adapter lies on it.

Teacher, reference, barrier and yardstick are all the model with its adapter switched off. Some adapters change what that is:
PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA rewrite the weights below them, ``bias`` trains the base's own biases, replicated
layers make another model. Nothing fails then; every figure that speaks of the base is wrong.

:func:`record_base` is called before an adapter is put on, :func:`check_base` after it, and :func:`check_adapters` looks at what
is trained and where, which needs no weights.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from trimtab.axis.errors import UserError, one_line
from trimtab.axis.layers import base_model_of, shape_of, text_config_of

log = logging.getLogger("trimtab")

SAMPLED = 4096  # numbers of each weight that are kept: whatever rewrites a weight changes nearly all of them
TOKENS = 8  # of the text whose logits are kept
# How far logits may lie apart, as a share of the largest: the same arithmetic, maybe on another device.
APART = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 2e-1}
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of ``init_lora_weights``
# What PEFT puts around a weight, as it stands in the weight's name.
WRAPPERS = (
    r"\.base_layer\b|\.token_adapter\b|\.modules_to_save\.[^.]+|\.original_module\b|\b_checkpoint_wrapped_module\."
)
ROWS_PREFIX = "trainable_tokens_"


@dataclass(frozen=True)
class BaseRecord:
    """What a model was before an adapter was put on.

    Attributes:
        samples: name -> some numbers of that weight; of a sharded one, of this process's shard.
        logits: of a short text, [T, V]; None where no forward can be had.
    """

    samples: dict[str, Tensor]
    logits: Tensor | None


def record_base(model: Any) -> BaseRecord | None:
    """What a model is, to be held against what it is later; None of one that has an adapter already, or is but a name.

    Args:
        model: a transformers model; sharded by ZeRO-3, or on the meta device, it is told by its weights alone.
    """
    if not isinstance(model, nn.Module) or isinstance(model, PeftModel):
        return None
    logits = probe_logits(model)  # first: quantised weights may be packed anew at their first use
    samples = {name: _sample(parameter) for name, parameter in model.named_parameters() if not parameter.is_meta}
    return BaseRecord(samples, logits)


def check_base(model: Any, record: BaseRecord | None, *, remedy: str, key: str, file: Any = None) -> None:
    """Check that a model with its adapter switched off is what it was before.

    Args:
        model: a PeftModel.
        record: of :func:`record_base`; None checks nothing.
        remedy: what to do where it is not.
        key: where the adapter was asked for.
        file: where it comes from.

    Raises:
        UserError: naming the first weight that has changed.
    """
    if record is None:
        return
    found = {base_name(model, name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, before in record.samples.items():
        now = found.get(name)
        if now is None or not _same(before, _sample(now)):
            what = "is gone" if now is None else "has changed"
            raise UserError(
                f"with the adapter off this is no longer the base: {name} {what}", file=file, key=key, remedy=remedy
            )
    if record.logits is None:
        return
    with model.disable_adapter():
        logits = probe_logits(model)
    if logits is not None and not near(logits, record.logits):
        raise UserError(
            "with the adapter off this is no longer the base: its weights are the same, and its logits are not",
            file=file,
            key=key,
            remedy=remedy,
        )


def probe_logits(model: Any) -> Tensor | None:
    """Logits [T, V] of a short text, by one forward without gradient in evaluation mode; None where no forward can be had.

    That is where weights are not whole; of 4-bit weights on a CPU, which bitsandbytes may pack anew there, in a form that can't
    be sharded later; and of a model with kernels for a GPU alone that still lies on the CPU.
    """
    parameters = list(model.parameters())
    if any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in parameters):
        return None
    if any(hasattr(p, "quant_state") and p.device.type == "cpu" for p in parameters):
        return None
    vocabulary = int(text_config_of(model).vocab_size)
    # from the middle of the vocabulary: tokens of images and the like stand at its ends
    ids = torch.arange(1, TOKENS + 1, device=parameters[0].device)[None] * vocabulary // (TOKENS + 2)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    except Exception as error:  # each kernel has errors of its own
        log.info("the base is told by its weights alone, as it can't be run on %s yet: %s", ids.device, error)
        return None
    finally:
        model.train(training)
    return logits.cpu()


def near(logits: Tensor, wanted: Tensor) -> bool:
    """Whether logits [T, V] are the same but for rounding.

    By the middle one of the tokens: in a mixture of experts rounding may send a single token to another expert.
    """
    if logits.shape != wanted.shape:
        return False
    one, other = logits.double(), wanted.double()
    finite = one.isfinite() & other.isfinite()
    if not bool((one.isfinite() == other.isfinite()).all()):
        return False
    apart = (one - other).masked_fill(~finite, 0.0).abs().amax(-1).median()
    scale = other.masked_fill(~finite, 0.0).abs().max()
    return bool(apart <= APART.get(wanted.dtype, APART[torch.float32]) * scale)


def base_name(model: Any, name: str) -> str | None:
    """The name that a weight of a PEFT model has in the base; None for a weight of the adapter's own.

    Args:
        model: a PeftModel.
        name: of the weight.
    """
    if model.base_model.prefix in name or ROWS_PREFIX in name or ".modules_to_save." in name:
        return None
    return re.sub(WRAPPERS, "", name.removeprefix("base_model.model."))


def plain_module(module: Any) -> Any:
    """A module without what PEFT has put around it."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def is_tied(model: Any) -> bool:
    """Whether a model's embedding and its head are one weight."""
    base = base_model_of(model)
    head, embedding = (plain_module(m) for m in (base.get_output_embeddings(), base.get_input_embeddings()))
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def add_adapters(model: nn.Module, lora: Mapping[str, Any]) -> Any:
    """Put a recipe's adapters on a model of the meta device, whose weights can't be read.

    Args:
        model: without weights.
        lora: the recipe's ``lora`` section.

    Returns:
        The PeftModel.

    Raises:
        UserError: if PEFT refuses them, or :func:`check_adapters` does.
    """
    try:
        with warnings.catch_warnings():
            # A matter between peft and transformers: nothing that a user can mend.
            warnings.simplefilter("ignore", FutureWarning)
            # no initialisation that looks at weights
            config = LoraConfig(**{"task_type": "CAUSAL_LM", **lora, "init_lora_weights": True})
            wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    except Exception as error:  # PEFT raises whatever its code comes upon
        raise UserError(
            f"PEFT refuses these adapters: {one_line(error)}",
            key="lora",
            remedy="name modules that the model has in lora.target_modules, or use all-linear",
        ) from error
    check_adapters(wrapped)
    return wrapped


def check_adapters(model: Any) -> None:
    """Check that what is trained is an adapter, and lies where the base can still be told from it.

    Args:
        model: a PeftModel, on the meta device or not.

    Raises:
        UserError: naming the option, and the weight.
    """
    config = model.peft_config[model.active_adapter]
    for fault, key, remedy in _faults(model, config):
        raise UserError(fault, key=key, remedy=remedy)
    _warn_of_unmatched(model, config)


def _faults(model: Any, config: Any) -> Iterator[tuple[str, str, str]]:
    """What is wrong, where it was asked for, and what to do."""
    if config.is_prompt_learning:
        yield "it puts tokens before the text, so positions are no longer the base's", "lora.peft_type", "train a LoRA"
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(REWRITING):
        yield f"{init} rewrites the base's weights", "lora.init_lora_weights", "set lora.init_lora_weights=true"
    for option in ("kasa_config", "layer_replication"):
        if getattr(config, option, None):
            yield "makes the base another model", f"lora.{option}", f"remove lora.{option}"
    base = base_model_of(model)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    on_head, on_embedding = _option_of(head), _option_of(embedding)
    if on_head is not None:
        one = ": this model's embedding and head are one weight" if on_head == "trainable_token_indices" else ""
        yield (
            "the head would be tuned, and with it what the base says: divergences from the base are worked out by one head",
            f"lora.{on_head}",
            f"leave the head out of lora.{on_head}{one}",
        )
    if on_embedding is not None and is_tied(model):
        yield (
            "this model's embedding and head are one weight: the head would be tuned or not by whether the adapter is merged",
            f"lora.{on_embedding}",
            f"leave the embedding out of lora.{on_embedding}",
        )
    tokens, rows = getattr(config, "trainable_token_indices", None) or (), int(embedding.weight.shape[0])
    listed = [token for group in tokens.values() for token in group] if isinstance(tokens, dict) else list(tokens)
    if outside := [token for token in listed if not 0 <= token < rows]:
        yield (
            f"there is no token {outside[0]}: the model's embedding has {rows} rows",
            "lora.trainable_token_indices",
            f"name tokens from 0 to {rows - 1}",
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." in name:
            yield (
                f"{name} is a whole module, trained beside the adapter",
                "lora.modules_to_save",
                "remove lora.modules_to_save",
            )
        elif parameter.requires_grad and base_name(model, name) is not None:
            of_bias = name.endswith(".bias")
            yield (
                f"{name} is the base's own and would be trained: it stays changed with the adapter off",
                "lora.bias" if of_bias else "lora",
                "set lora.bias=none" if of_bias else "freeze the base's weights",
            )
    chosen = getattr(config, "layers_to_transform", None)
    layers = [chosen] if isinstance(chosen, int) else chosen or []
    count = shape_of(model)[0]
    for layer in layers:
        if not 0 <= layer < count:
            yield (
                f"there is no layer {layer}: the model's are 0 to {count - 1}",
                "lora.layers_to_transform",
                f"name layers of 0 to {count - 1}",
            )


def _option_of(module: Any) -> str | None:
    """Which option of LoraConfig has put something around a module; None where nothing is."""
    if isinstance(module, ModulesToSaveWrapper):
        return "modules_to_save"
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "trainable_token_indices"
    return "target_modules" if isinstance(module, BaseTunerLayer) else None


def _warn_of_unmatched(model: Any, config: Any) -> None:
    """Name what an option lists and no module has: PEFT says nothing as long as one entry is found."""
    adapted = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]

    def ends_so(entry: str) -> Callable[[str], bool]:
        return lambda name: name == entry or name.endswith(f".{entry}")

    def matches(entry: str) -> Callable[[str], bool]:
        return lambda name: re.match(rf"(.*\.)?({entry})$", name) is not None

    entries: dict[str, tuple[Iterable[str], Callable[[str], Callable[[str], bool]]]] = {
        option: (getattr(config, option, None) or (), test)
        for option, test in (("target_modules", ends_so), ("rank_pattern", matches), ("alpha_pattern", matches))
    }
    for option, (listed, test) in entries.items():
        excluded = _excluded(config) if option == "target_modules" else ()
        unmatched = (
            []
            if isinstance(listed, str)
            else sorted(e for e in listed if e not in excluded and not any(map(test(e), adapted)))
        )
        if unmatched:
            log.warning("lora.%s: no adapted module is called %s", option, ", ".join(unmatched))


def _excluded(config: Any) -> Sequence[str]:
    """Names that ``exclude_modules`` lists."""
    given = getattr(config, "exclude_modules", None) or ()
    return () if isinstance(given, str) else tuple(given)


def _sample(parameter: Any) -> Tensor:
    """Some numbers of a weight, evenly spread, on the CPU."""
    held = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
    flat: Tensor = (held.to_local() if hasattr(held, "to_local") else held).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].cpu().clone()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one.double().nan_to_num(), other.double().nan_to_num()))
