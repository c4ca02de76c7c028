"""The floor penalty without touching a trainer: hooks that add the penalty's gradient in the backward pass.

For frameworks that hide their loss. The forward is left as it is, bit by bit; where the gradient of a floor layer's output comes
by, the penalty's own is added to it:

    dL/dh += weight / (L * n) * mask * 2 relu( (tau - <h, v>)/sigma + margin ) * (-1/sigma) * v

over the L floor layers and the n tokens of the optimiser step, as a trainer of transformers or TRL divides its own loss: by the
tokens of all micro-batches and ranks, or, where it doesn't count them, by the tokens of this forward times the number of
micro-batches. In a loop of one's own n is the latter. Limits, none of which :class:`~trimtab.losses.axis_floor_loss` has where it
is added to the loss:

* the reported loss does not hold the penalty; see :meth:`FloorInjection.figures` for it;
* in a loop of one's own, with micro-batches of unlike length or several ranks, the penalty is a mean of means;
* a scaled loss (float16 with a GradScaler) is not known of: use bfloat16 or float32;
* every forward with gradient is penalised, the one of another loss term too; where checkpointed layers are computed anew with
  their hooks (transformers before 5.24), the mask is that of the last such forward before the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.axis import Floor, UserError, project
from trimtab.axis.directions import check_fits
from trimtab.axis.hooks import decoder_layers_of
from trimtab.axis.layers import base_model_of, stream_of, width_of, with_stream
from trimtab.losses.axis_floor import hinge


class FloorInjection:
    """The hooks, and what they saw.

    Tokens that count are the labelled ones where the framework gives the model ``labels``, else those of the attention mask, else
    all.

    Args:
        model: any Hugging Face causal model, PEFT-wrapped or not.
        floor: window, directions, tau and sigma.
        weight: weight of the penalty.
        accumulation: micro-batches an optimiser step, by whose number the loop divides its loss; 1 if it steps after each.
        margin: sigma above the floor.

    Raises:
        UserError: if the layers are not found, or the floor does not fit them.
    """

    def __init__(
        self,
        model: nn.Module,
        floor: Floor,
        *,
        weight: float,
        accumulation: int,
        margin: float = 0.0,
    ) -> None:
        self.floor = floor
        self.weight = weight
        self.accumulation = accumulation
        self.margin = margin
        self.active = True
        self.calls = self.passes = self.trained = 0
        self._tokens: Tensor | None = None
        self._labels: Tensor | None = None
        self._mask: Tensor | None = None
        self._labelled = self._outer = False
        self._sums = {"penalty": 0.0, "violations": 0.0, "slots": 0.0}
        base, layers = base_model_of(model), decoder_layers_of(model)
        check_fits(len(layers), width_of(model), floor=floor)
        # PEFT before 0.21 calls the base's forward past its hooks, so the model that is handed in is listened to as well.
        outer = (
            [
                model.register_forward_pre_hook(self._before_outer, with_kwargs=True),
                model.register_forward_hook(self._after_outer),
            ]
            if model is not base
            else []
        )
        self._handles = [
            *outer,
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            *(layers[layer].register_forward_hook(_LayerHook(self, i)) for i, layer in enumerate(floor.layers)),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def of_step(self, accumulation: int, tokens: Tensor | float | None, labels: Tensor | None = None) -> None:
        """What the next forwards are divided by, and which tokens count where the model is given no labels.

        Args:
            accumulation: micro-batches of the step.
            tokens: labelled tokens of all its micro-batches, over the number of ranks where gradients are averaged over those;
                None where nobody has counted them.
            labels: of the micro-batch, [B, T].
        """
        self.accumulation = accumulation
        self._tokens = None if tokens is None else torch.as_tensor(tokens).clamp(min=1)
        self._labels = labels

    def divisor(self, own: Tensor, *, labelled: bool) -> Tensor:
        """What a forward is divided by.

        Args:
            own: how many of its tokens count.
            labelled: whether these are the labelled ones, of which there may be a count over the whole step.
        """
        if self._tokens is not None and labelled:
            return self._tokens.to(own.device)
        return own.clamp(min=1) * self.accumulation

    def figures(self) -> dict[str, float]:
        """Mean penalty a token and share of (token, layer) slots below the floor, since the last call."""
        slots = max(self._sums["slots"], 1.0)
        found = {
            "floor_penalty": self._sums["penalty"] / slots,
            "floor_violation_rate": self._sums["violations"] / slots,
        }
        self._sums = dict.fromkeys(self._sums, 0.0)
        return found

    def _before_outer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._take(kwargs)
        self._outer = True

    def _after_outer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outer = False

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._outer or kwargs.get("labels") is not None:  # a wrapper may have kept the labels to itself
            self._take(kwargs)

    def _take(self, kwargs: dict[str, Any]) -> None:
        """Which tokens of a forward count; one without gradient may come between a forward and its checkpointed backward."""
        if not torch.is_grad_enabled():
            return
        labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
        self._labelled = labels is not None
        if labels is not None:
            self._mask = labels.ne(-100)
        else:
            self._mask = attention.bool() if attention is not None and attention.dim() == 2 else None

    def _counted(self, shape: torch.Size) -> tuple[Tensor | None, bool]:
        """The mask of a forward's tokens, and whether it is that of labels; None where all count."""
        fits = self._mask is not None and self._mask.shape == shape
        if not (fits and self._labelled) and self._labels is not None and self._labels.shape == shape:
            return self._labels.ne(-100), True
        return (self._mask, self._labelled) if fits else (None, False)

    def on_layer(self, position: int, output: Any) -> Any:
        """What a layer's output becomes: the same, with a node in the backward pass."""
        if not self.active:
            return None
        self.calls += 1
        hidden = stream_of(output, self.floor.hidden_size, self.floor.layers[position])
        if not hidden.requires_grad:
            return None
        self.passes += 1
        mask, labelled = self._counted(hidden.shape[:-1])
        if mask is None:
            mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        mask = mask.to(hidden.device)
        scale = self.weight / self.divisor(mask.sum(), labelled=labelled)
        passed = _AddGradient.apply(hidden, mask, scale, self, position)  # type: ignore[no-untyped-call]
        return with_stream(output, passed)


class _LayerHook:
    def __init__(self, injection: FloorInjection, position: int) -> None:
        self.injection = injection
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.injection.on_layer(self.position, output)


class _AddGradient(torch.autograd.Function):
    """The identity, whose backward adds the penalty's gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, mask: Tensor, scale: Tensor, injection: FloorInjection, position: int
    ) -> Tensor:
        floor = injection.floor
        sigma = float(floor.sigma[position])
        shortfall = (
            float(floor.tau[position]) - project(hidden, floor.directions[position])
        ) / sigma + injection.margin
        shortfall = shortfall.masked_fill(~mask, 0.0)
        ctx.save_for_backward(shortfall)
        ctx.scale = scale / (len(floor.layers) * sigma)
        ctx.injection, ctx.position = injection, position
        sums = injection._sums
        sums["penalty"] += float(hinge(shortfall).sum())
        sums["violations"] += float((shortfall > 0).sum())
        sums["slots"] += (counted := int(mask.sum()))
        injection.trained += counted
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = outputs
        (shortfall,) = ctx.saved_tensors
        slope = 2 * torch.relu(shortfall)  # of `hinge`
        direction = ctx.injection.floor.directions[ctx.position].to(gradient.device)
        added = (-ctx.scale * slope).unsqueeze(-1) * direction
        return gradient + added.to(gradient.dtype), None, None, None, None


@contextlib.contextmanager
def floor_gradients(
    trained: Any, floor: Floor, *, weight: float, accumulation: int | None = None, **options: Any
) -> Iterator[FloorInjection]:
    """Penalise every forward with gradient inside the block.

    ``with floor_gradients(trainer, floor, weight=0.1): trainer.train()`` is all there is to it.

    Args:
        trained: a trainer of transformers or TRL, which says what a step is divided by; or a model, in a loop of one's own.
        floor: the floor.
        weight: weight of the penalty.
        accumulation: micro-batches of an optimiser step; of a model alone, and needed there.
        **options: of :class:`FloorInjection`.

    Raises:
        UserError: if the number of micro-batches is given twice or not at all, or the trainer scales its loss (float16).
    """
    alone = isinstance(trained, nn.Module)
    if alone == (accumulation is None):
        raise UserError(
            "how many micro-batches make a step is not said"
            if alone
            else "the trainer says itself how many micro-batches make a step",
            key="accumulation",
            remedy="give accumulation=1, or as many as the loop divides its loss by; or the trainer in the place of the model"
            if alone
            else "leave accumulation out",
        )
    if not alone:
        check_trainer(trained)
    model = trained if alone else trained.model
    injection = FloorInjection(model, floor, weight=weight, accumulation=accumulation or 1, **options)
    try:
        with contextlib.nullcontext() if alone else telling(trained, injection):
            yield injection
    finally:
        injection.remove()


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer under which the penalty's gradient would be wrong.

    Raises:
        UserError: if the loss is scaled (float16), or one process spreads a batch over several GPUs.
    """
    arguments, accelerator = trainer.args, getattr(trainer, "accelerator", None)
    if arguments.fp16 or getattr(accelerator, "mixed_precision", None) == "fp16":
        raise UserError(
            "the trainer scales its loss (fp16), and the penalty would not be scaled with it",
            key="fp16",
            remedy="train in bfloat16 or float32",
        )
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process spreads each batch over {arguments.n_gpu} GPUs (DataParallel), which no hook follows",
            remedy="start it with `accelerate launch` or torchrun, a process for each GPU, or set CUDA_VISIBLE_DEVICES=0",
        )


TOLD = "_trimtab_told"  # where a trainer holds the injections that its steps tell


@contextlib.contextmanager
def telling(trainer: Any, injection: FloorInjection) -> Iterator[None]:
    """Tell the injection before each micro-batch what the trainer divides the step's loss by; it acts within steps alone.

    So hooks that a training leaves behind, broken off, do nothing to the next.
    """
    injection.active = False
    listening: list[FloorInjection] | None = vars(trainer).get(TOLD)
    if listening is None:
        listening = _listen(trainer)
    listening.append(injection)
    try:
        yield
    finally:
        listening.remove(injection)
        if not listening:
            _leave(trainer)


def _listen(trainer: Any) -> list[FloorInjection]:
    """Put a step of ours before the trainer's; the injections that it will tell."""
    listening: list[FloorInjection] = []
    own = vars(trainer).get("training_step")  # of a framework that has put one there
    step = trainer.training_step

    def told(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        tokens = named.get("num_items_in_batch", rest[0] if rest else None)
        arguments = trainer.args
        if tokens is not None and getattr(arguments, "average_tokens_across_devices", False):
            # those of all ranks; the gradients will be averaged over those that have rows of their own
            sharing = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
            tokens = tokens / (trainer.accelerator.num_processes // sharing)
        micro_batches = getattr(trainer, "current_gradient_accumulation_steps", arguments.gradient_accumulation_steps)
        for injection in listening:
            injection.of_step(micro_batches, tokens, inputs.get("labels") if hasattr(inputs, "get") else None)
            injection.active = True
        try:
            return step(model, inputs, *rest, **named)
        finally:
            for injection in listening:
                injection.active = False

    trainer.training_step = told
    setattr(trainer, TOLD, listening)
    trainer._trimtab_own_step = own
    return listening


def _leave(trainer: Any) -> None:
    """Give the trainer its own step back."""
    own = trainer._trimtab_own_step
    for name in (TOLD, "_trimtab_own_step", "training_step"):
        delattr(trainer, name)
    if own is not None:
        trainer.training_step = own
