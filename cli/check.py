"""``trimtab check``: what a recipe would do, found out on the meta device, without weights.

The memory plan is an estimate for choosing hardware; activations depend on kernels and may differ by a third. The time is that of
:mod:`trimtab.cli.work`.
Shapes: N decoder layers, D hidden size, B rows a GPU, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from trimtab.axis.adapters import MERGED_SHARE
from trimtab.axis.base_check import add_adapters
from trimtab.axis.calibration import check_window, window_by_rule
from trimtab.axis.errors import UserError
from trimtab.axis.layers import find_decoder_layers, shape_of, text_config_of
from trimtab.axis.models import choose_device, choose_dtype, resolve_name
from trimtab.cli.calls import Call, Counted, count
from trimtab.cli.launch import default_accelerate, read_accelerate_config, resolve_accelerate_config
from trimtab.cli.verify import find_faults
from trimtab.cli.work import QUANTIZED, Work, estimate_work
from trimtab.losses.divergence import CHUNK
from trimtab.pipeline.instrument import check_counts, given_axis, given_floor
from trimtab.recipes.loader import LoadedRecipe
from trimtab.recipes.rules import floor_layers
from trimtab.recipes.schema import Recipe
from trimtab.train.rehearsal import meta_model_of

log = logging.getLogger("trimtab")

GIB = 1024**3
VLLM, MERGED = "vLLM", "copies of merged weights"
TRAINING, ROLLOUTS, ALONE = "training", "rollouts", "axis, floor, eval"
# CUDA context and libraries, and what the allocator can't use.
CONTEXT, SLACK, SLACK_ROW = 1.0, 0.05, "context and slack"


@dataclass(frozen=True)
class Strategy:
    """How training is spread.

    Attributes:
        name: of the accelerate config.
        kind: ``single``, ``ddp``, ``zero2``, ``zero3`` or ``fsdp2``.
        processes: number of processes.
        cpu: on the CPU.
    """

    name: str
    kind: str
    processes: int
    cpu: bool

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only its share of the weights."""
        return self.kind in ("zero3", "fsdp2")


@dataclass(frozen=True)
class Structure:
    """What was found in the model.

    Attributes:
        layers: decoder layers, N.
        hidden: hidden size, D.
        parameters: of the whole model.
        layer_parameters: of the largest decoder layer.
        embedding_parameters: of the largest single weight.
        window: the floor's layers.
        window_from: where the window comes from.
        targets: module name -> how many carry an adapter.
        adapted: decoder layers with an adapter.
        trainable: trainable parameters.
        adapted_parameters: of the weights that carry an adapter.
        active: parameters that a token passes through: of a mixture of experts, those of the chosen ones.
    """

    layers: int
    hidden: int
    parameters: int
    layer_parameters: int
    embedding_parameters: int
    window: tuple[int, ...]
    window_from: str
    targets: dict[str, int]
    adapted: tuple[int, ...]
    trainable: int
    adapted_parameters: int
    active: float


@dataclass
class MemoryPlan:
    """GiB by phase and component: ``phases[phase][component]``."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def total(self, phase: str) -> float:
        """GiB of a phase on one device."""
        return sum(self.phases[phase].values())


def strategy_of(path: Path, num_processes: int | None) -> Strategy:
    """The strategy that an accelerate file describes."""
    content = read_accelerate_config(path)
    kind = {"NO": "single", "DEEPSPEED": "zero2", "FSDP": "fsdp2"}.get(str(content["distributed_type"]), "ddp")
    deepspeed = content.get("deepspeed_config") or {}
    named = deepspeed.get("deepspeed_config_file")
    if deepspeed.get("zero_stage") == 3 or (named and '"stage": 3' in Path(named).read_text(encoding="utf-8")):
        kind = "zero3"
    processes = num_processes or int(content.get("num_processes", 1))
    return Strategy(path.stem.removeprefix("accelerate-"), kind, processes, bool(content.get("use_cpu")))


def build_meta_model(recipe: Recipe) -> nn.Module:
    """The recipe's model without weights.

    Raises:
        UserError: see :func:`trimtab.axis.models.load_config`.
    """
    model: nn.Module = meta_model_of(recipe.model)
    return model


def find_structure(recipe: Recipe, model: nn.Module) -> Structure:
    """Layers, window and adapters of a recipe's model.

    Raises:
        UserError: if layers are not found, the window does not fit, or the adapters match nothing or lie above the window.
    """
    layers = find_decoder_layers(model)
    count, hidden = shape_of(model)
    window, window_from = _window(recipe, model)
    check_window(window, count)
    parameters = sum(p.numel() for p in model.parameters())
    layer_parameters = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    largest = max(p.numel() for p in model.parameters())
    active = active_parameters(model)  # before the adapters are put on
    adapted_model = add_adapters(model, recipe.lora)
    carriers: dict[str, Any] = {
        name: module for name, module in adapted_model.named_modules() if hasattr(module, "lora_A")
    }
    adapted = tuple(
        index
        for index, layer in enumerate(find_decoder_layers(adapted_model))
        if any(p.requires_grad for p in layer.parameters())
    )
    if adapted and adapted[0] > window[-1]:
        raise UserError(
            f"the lowest adapter is at layer {adapted[0]}, above the floor's deepest layer {window[-1]}: "
            "no adapter can move a projection there",
            key="lora.layers_to_transform",
            remedy=f"adapt layers up to {window[-1]} as well, or leave layers_to_transform out",
        )
    return Structure(
        count,
        hidden,
        parameters,
        layer_parameters,
        largest,
        window,
        window_from,
        dict(Counter(name.rpartition(".")[2] for name in carriers)),
        adapted,
        sum(p.numel() for p in adapted_model.parameters() if p.requires_grad),
        sum(p.numel() for module in carriers.values() for p in module.get_base_layer().parameters()),
        active,
    )


def active_parameters(model: nn.Module) -> float:
    """Parameters that a token passes through: of a mixture of experts, those of the chosen ones.

    Experts are told by the structure, a module of that name, since each family has names of its own for their number; how many
    are chosen stands in the configuration or on the router. Where neither says, all of them count.
    """
    total = float(sum(p.numel() for p in model.parameters()))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and ".experts." not in f".{name.rpartition('.')[0]}.":
            there = (
                len(module)
                if isinstance(module, nn.ModuleList)
                else max((p.shape[0] for p in module.parameters() if p.ndim == 3), default=0)
            )
            chosen = _chosen_experts(model.get_submodule(name.rpartition(".")[0]), text_config_of(model))
            if there and chosen and chosen < there:
                total -= sum(p.numel() for p in module.parameters()) * (1 - chosen / there)
    return total


# What families call the number of experts that a token passes through.
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


def _chosen_experts(block: nn.Module, config: Any) -> int:
    """How many experts of a block a token passes through; 0 where nothing says."""
    said: list[Any] = [_largest(config, name) for name in CHOSEN]
    said += [getattr(module, name, None) for module in block.modules() for name in ("top_k", *CHOSEN)]
    return next((value for value in said if isinstance(value, int) and value > 0), 0)


def _window(recipe: Recipe, model: nn.Module) -> tuple[tuple[int, ...], str]:
    check_counts(recipe)
    given_axis(recipe, shape_of(model), fetch=False)
    floor = given_floor(recipe, shape_of(model), fetch=False)
    if floor is not None:
        return floor.layers, f"from {recipe.floor.path}"
    named = floor_layers(recipe)
    if named is not None:
        return tuple(named), "from the experiment's id" if recipe.floor.experiment else "from floor.layers"
    config = text_config_of(model)
    return window_by_rule(config.model_type, shape_of(model)[0]), "chosen by rule"


def plan_memory(
    recipe: Recipe,
    structure: Structure,
    config: Any,
    strategy: Strategy,
    counted: Counted,
    gpu_memory: float | None = None,
) -> MemoryPlan:
    """Memory of each phase on one GPU, in GiB.

    Training: weights + 16 bytes a trainable parameter (float32 value, gradient, two AdamW moments) + activations + the largest
    block of logits. Under ZeRO-3 and FSDP2 weights are sharded, and two decoder layers and the embedding are whole at any
    moment. Rollouts: weights (whole under ZeRO-3, which gathers them), copies of those that the adapter is merged into where the
    GPU has room for them, and the KV cache; or, by a colocated vLLM, what that
    claims of the GPU, while training goes on too unless it sleeps then. The stages before and after training run on one device
    with the whole model.

    Args:
        recipe: the recipe.
        structure: of the model.
        config: of the text decoder.
        strategy: how training is spread.
        counted: what the recipe calls and trains.
        gpu_memory: GiB of a GPU, of which vLLM claims its share and merged weights have theirs; without it, the least that they
            can do with.
    """
    train, n = recipe.train, strategy.processes
    size = choose_dtype(recipe.model.dtype, choose_device("cpu"))[0].itemsize if strategy.cpu else _size(recipe)
    weights = structure.parameters * QUANTIZED.get(recipe.model.quantization or "", size)
    shard = n if strategy.shards_weights else 1
    states = n if strategy.kind in ("zero2", "zero3", "fsdp2") else 1
    live = 2 * structure.layer_parameters + structure.embedding_parameters
    resident = weights / shard + (min(live, structure.parameters) * size if strategy.shards_weights else 0)
    adapter = structure.trainable * (4 / shard + 4 / states + _moment_bytes(train) / states)
    tokens = recipe.method.answers_a_row * int(train.get("per_device_train_batch_size", 8)) * counted.trained.longest
    state = tokens * structure.hidden * size
    inside = tokens * bytes_inside_layer(config, size, autocast=train.get("bf16") is True)
    checkpointing = train.get("gradient_checkpointing", train.get("activation_checkpointing", True))
    activations = structure.layers * state + inside if checkpointing else structure.layers * inside
    logits = _compared_tokens(recipe) * config.vocab_size * 4 * 4
    cache = _kv_cache(config, counted.rollouts, size)
    sampler = {"weights": weights + weights / n if strategy.kind == "zero3" else resident, "KV cache": cache}
    copied = structure.adapted_parameters * size
    room = 0.0 if gpu_memory is None or strategy.cpu or recipe.model.quantization else MERGED_SHARE * gpu_memory * GIB
    if copied <= room and not strategy.shards_weights:
        sampler[MERGED] = copied
    alone = {
        "weights": weights,
        "KV cache": _kv_cache(config, [*counted.before, *counted.after, *counted.capability], size),
    }
    if (copies := weights * (2 if recipe.eval.control else 1)) <= room:
        alone[MERGED] = copies
    asleep: dict[str, float] = {}
    if train.get("use_vllm"):
        sampler = {"weights": resident}
        if train.get("vllm_mode", "colocate") == "colocate":
            least = weights / int(train.get("vllm_tensor_parallel_size", 1)) + cache
            claimed = least if gpu_memory is None else _vllm_share(recipe) * gpu_memory * GIB
            if claimed < least:
                raise UserError(
                    f"vLLM gets {claimed / GIB:.1f} GiB of a GPU, and its weights and the cache of a batch are {least / GIB:.1f}",
                    key="train.vllm_gpu_memory_utilization",
                    remedy="raise it, or train.vllm_tensor_parallel_size, over whose GPUs vLLM splits the weights",
                )
            sampler[VLLM] = claimed
            asleep = {} if train.get("vllm_enable_sleep_mode") else {VLLM: claimed}
    phases = {
        TRAINING: {"weights": resident, "adapter and optimiser": adapter, "activations": activations, "logits": logits}
        | asleep,
        ROLLOUTS: {"adapter and optimiser": adapter, **sampler},
        ALONE: alone,
    }
    plan = MemoryPlan({phase: {name: value / GIB for name, value in parts.items()} for phase, parts in phases.items()})
    for phase, parts in plan.phases.items():
        parts[SLACK_ROW] = (0 if strategy.cpu else CONTEXT) + SLACK * plan.total(phase)
    return plan


def _vllm_share(recipe: Recipe) -> float:
    """The share of a GPU that a colocated vLLM claims; TRL's default where the recipe says none."""
    return float(recipe.train.get("vllm_gpu_memory_utilization", 0.3))


def _size(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def _moment_bytes(train: dict[str, Any]) -> int:
    optimiser = str(train.get("optim", "adamw_torch"))
    if "8bit" in optimiser:
        return 2
    return 0 if optimiser in ("sgd", "adafactor") else 8


def bytes_inside_layer(config: Any, size: int, *, autocast: bool) -> int:
    """Bytes a token that one decoder layer with adapters keeps for its backward.

    Fitted to what autograd saves in a Llama layer: projections, attention and MLP in the model's dtype, norms in float32, and
    without autocast the adapters' own float32 copies of their inputs.

    Args:
        config: of the text decoder.
        size: bytes of the model's dtype.
        autocast: whether ``train.bf16`` is on.
    """
    hidden = int(config.hidden_size)
    heads, key_heads, head = _attention(config)
    queries, keys = head * heads, head * key_heads
    inner = _largest(config, "intermediate_size") or 4 * hidden
    chosen = next(filter(None, (_largest(config, name) for name in CHOSEN)), 0)
    if chosen:  # a mixture of experts: the chosen ones
        inner = chosen * (_largest(config, "moe_intermediate_size") or inner)
    kept = size * (4 * inner + 4 * hidden + 2 * queries + 4 * keys)
    if size < 4:
        kept += 4 * 3 * hidden + (0 if autocast else 4 * (inner + queries + hidden))
    return kept


def _compared_tokens(recipe: Recipe) -> int:
    """Tokens whose whole distribution is compared with another at once: a chunk; 0 for methods that compare none."""
    method = recipe.method
    benign = method.benign_kl_weight > 0 and recipe.data.benign_share > 0
    return CHUNK if benign or method.compares_distributions else 0


def _kv_cache(config: Any, calls: Sequence[Call], size: int) -> float:
    """Bytes of the largest cache that a call fills."""
    _, keys, head = _attention(config)
    return float(
        2 * keys * head * int(config.num_hidden_layers) * max((call.cached for call in calls), default=0) * size
    )


def _attention(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, and the width of a head; of a configuration that tells no heads, one as wide as the model."""
    hidden = int(config.hidden_size)
    heads = _largest(config, "num_attention_heads") or 1
    return heads, _largest(config, "num_key_value_heads") or heads, _largest(config, "head_dim") or hidden // heads


def _largest(config: Any, name: str) -> int:
    """A whole number of the configuration, of one that differs from layer to layer the largest; 0 where there is none."""
    try:
        found = [getattr(config, name, None)]
    except RuntimeError:  # transformers refuses to name one value for layers that differ
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    flat = [value for each in found for value in (each if isinstance(each, list | tuple) else [each])]
    return max((value for value in flat if isinstance(value, int)), default=0)


def advice(recipe: Recipe, plan: MemoryPlan, strategy: Strategy, counted: Counted, gpu_memory: float) -> list[str]:
    """What to change for each phase that does not fit."""
    found: list[str] = []
    train = recipe.train
    batch = int(train.get("per_device_train_batch_size", 8))
    accumulation = int(train.get("gradient_accumulation_steps", 1))
    if plan.total(TRAINING) > gpu_memory:
        if train.get("gradient_checkpointing", True) is False:
            found.append("train.gradient_checkpointing=true")
        if batch > 1:
            halved = (
                f"train.per_device_train_batch_size={batch // 2} train.gradient_accumulation_steps={accumulation * 2}"
            )
            found.append(f"{halved}, which is the same batch")
        if not strategy.shards_weights:
            found.append("--accelerate fsdp2 or zero3, which shard the weights over GPUs")
        elif plan.phases[TRAINING]["weights"] > gpu_memory / 2:
            found.append(f"more GPUs: --num-processes {strategy.processes * 2}")
        if VLLM in plan.phases[TRAINING]:
            found.append("train.vllm_enable_sleep_mode=true, which frees what vLLM holds while a step is trained")
    if plan.total(ROLLOUTS) > gpu_memory:
        if plan.phases[ROLLOUTS]["weights"] > gpu_memory and strategy.kind == "zero3":
            found.append(
                "--accelerate fsdp2: under zero3 the whole model is gathered on every GPU while rollouts are sampled"
            )
        elif plan.phases[ROLLOUTS].get("KV cache", 0.0) > gpu_memory / 4:
            found += _fewer_rows(counted.rollouts)
    if plan.total(ALONE) > gpu_memory:
        if plan.phases[ALONE]["weights"] > gpu_memory:
            needed = math.ceil(plan.phases[ALONE]["weights"] * 1.1 + CONTEXT)
            found.append(
                f"the axis, floor and eval stages hold the whole model on one GPU: use one of {needed} GiB for them"
            )
        else:
            found += _fewer_rows([*counted.before, *counted.after, *counted.capability])
    return found or ["a GPU with more memory"]


def _check_template(recipe: Recipe) -> None:
    """Hold the chat template against the recipe; a folder that has no tokenizer yet is told."""
    from trimtab.pipeline.loading import chat_format  # which takes a second to import

    folder = Path(resolve_name(recipe.model.name)[0])
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        log.warning("%s has no tokenizer: the chat template is not checked", folder)
        return
    form = chat_format(recipe.model)
    form.check()
    form.tell()


def _fewer_rows(calls: Sequence[Call]) -> list[str]:
    """Fewer rows for the call that fills the largest cache."""
    largest = max(calls, key=lambda call: call.cached)
    return [f"{largest.key}={largest.rows // 4 or 1}, which samples more slowly"] if largest.rows > 1 else []


def check_recipe(
    loaded: LoadedRecipe, accelerate: str | None, num_processes: int | None, gpu_memory: float | None
) -> tuple[Structure, MemoryPlan]:
    """Print what a recipe would do and the memory it needs.

    Args:
        loaded: the recipe.
        accelerate: accelerate config, by name or file; None chooses as ``trimtab train`` would.
        num_processes: replaces the file's own number.
        gpu_memory: GiB of one GPU, to be judged against.

    Raises:
        UserError: if something can't work, or does not fit.
    """
    recipe = loaded.recipe
    planned = (accelerate, num_processes, gpu_memory) != (None, None, None)
    here = not planned and (recipe.model.device == "cpu" or torch.cuda.is_available())
    findings = find_faults(loaded, accelerate=accelerate, num_processes=num_processes, here=here)
    with findings.of_a_check():
        _check_template(recipe)
    with findings.of_a_check():
        model = build_meta_model(recipe)
        config = text_config_of(model)
        structure = find_structure(recipe, model)
    findings.faults = [loaded.placed(fault) for fault in findings.faults]
    findings.tell()
    path = resolve_accelerate_config(accelerate or default_accelerate(recipe.model.device)[0])
    strategy = strategy_of(path, num_processes)
    counted = count(recipe, strategy.processes)
    plan = plan_memory(recipe, structure, config, strategy, counted, gpu_memory)
    console = Console()
    console.print(_structure_table(loaded, structure))
    console.print(_memory_table(plan, strategy))
    if not strategy.cpu and recipe.eval.tuned is None:
        work = estimate_work(
            recipe,
            counted,
            structure.parameters,
            structure.active,
            structure.layers,
            sharded=strategy.shards_weights,
            processes=strategy.processes,
        )
        console.print(_work_table(work))
    if gpu_memory is not None:
        largest = max(plan.phases, key=plan.total)
        if plan.total(largest) > gpu_memory:
            raise UserError(
                f"does not fit on {gpu_memory:g} GiB: {largest} needs about {plan.total(largest):.1f} GiB",
                remedy="; or ".join(advice(recipe, plan, strategy, counted, gpu_memory)),
            )
        console.print(f"fits on {gpu_memory:g} GiB: {largest} needs the most, about {plan.total(largest):.1f} GiB")
    console.print(f"ok: nothing was found that would keep {loaded.name} from running", soft_wrap=True)
    return structure, plan


def _structure_table(loaded: LoadedRecipe, structure: Structure) -> Table:
    table = Table(title=f"{loaded.name}: structure", show_header=False, title_justify="left")
    active = f", {structure.active / 1e6:,.1f} M of them a token" if structure.active < structure.parameters else ""
    table.add_row("model", f"{loaded.recipe.model.name}, {structure.parameters / 1e6:,.1f} M parameters{active}")
    table.add_row("decoder layers", f"{structure.layers}, all hooked, hidden size {structure.hidden}")
    first, last = structure.window[0], structure.window[-1]
    table.add_row("floor", f"layers {first}-{last} ({len(structure.window)}), {structure.window_from}")
    targets = ", ".join(f"{name} x{count}" for name, count in structure.targets.items())
    table.add_row("adapters", targets)
    share = 100 * structure.trainable / structure.parameters
    table.add_row("trainable", f"{structure.trainable:,} parameters ({share:.2f} %)")
    unreached = [layer for layer in structure.window if structure.adapted and layer < structure.adapted[0]]
    if unreached:
        table.add_row("note", f"floor layers {unreached} lie below every adapter: the penalty moves nothing there")
    return table


def _work_table(work: Work) -> Table:
    title = "time on H100s, an estimate from arithmetic alone: every answer is taken to be as long as it may be"
    table = Table("", "hours", "GPUs", title=title, title_justify="left")
    rows = {
        "axis, floor, pairs": (work.before, 1),
        "training: rollouts": (work.rollouts, work.processes),
        "training: steps": (work.steps, work.processes),
        "evaluation": (work.after, 1),
        "evaluation: capability": (work.capability, 1),
    }
    for name, (seconds, gpus) in rows.items():
        table.add_row(name, f"{seconds / 3600:.2f}", str(gpus))
    table.add_section()
    table.add_row("GPU-hours", f"{work.gpu_hours:.1f}", "")
    return table


def _memory_table(plan: MemoryPlan, strategy: Strategy) -> Table:
    device = "process (RAM)" if strategy.cpu else "GPU"
    title = (
        f"memory a {device}, GiB, accelerate config {strategy.name} with {strategy.processes} process(es), an estimate"
    )
    table = Table("", *plan.phases, title=title, title_justify="left")
    names = dict.fromkeys(name for parts in plan.phases.values() for name in parts)
    for name in sorted(names, key=lambda name: name == SLACK_ROW):
        cells = [f"{parts[name]:.2f}" if name in parts else "-" for parts in plan.phases.values()]
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("total", *(f"{plan.total(phase):.2f}" for phase in plan.phases))
    return table
