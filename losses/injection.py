"""The floor penalty without touching a trainer: hooks that add the penalty's gradient in the backward pass.

For frameworks that hide their loss. The forward is left as it is, bit by bit; where the gradient of a floor layer's output comes
by, the penalty's own is added to it:

    dL/dh += weight / (L * n) * mask * g'( (tau - <h, v>)/sigma + margin ) * (-1/sigma) * v

over the L floor layers and the n tokens of the optimiser step, as a trainer of transformers or TRL divides its own loss: by the
tokens of all micro-batches and ranks, or, where it doesn't count them, by the tokens of this forward times the number of
micro-batches. In a loop of one's own n is the latter. Limits, none of which :class:`~trimtab.losses.axis_floor_loss` has where it
is added to the loss:

* the reported loss does not hold the penalty; see :meth:`FloorInjection.figures` for it;
* in a loop of one's own, with micro-batches of unlike length or several ranks, the penalty is a mean of means;
* a scaled loss (float16 with a GradScaler) is not known of: use bfloat16 or float32;
* every forward with gradient is penalised, the one of another loss term too.
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
from trimtab.losses.axis_floor import Shape, hinge


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
        shape: ``squared`` or ``huber``.

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
        shape: Shape = "squared",
    ) -> None:
        self.floor = floor
        self.weight = weight
        self.accumulation = accumulation
        self.margin = margin
        self.shape: Shape = shape
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None
        self._sums = {"penalty": 0.0, "violations": 0.0, "slots": 0.0}
        base, layers = base_model_of(model), decoder_layers_of(model)
        check_fits(len(layers), width_of(model), floor=floor)
        self._handles = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            *(layers[layer].register_forward_hook(_LayerHook(self, i)) for i, layer in enumerate(floor.layers)),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def of_step(self, accumulation: int, tokens: Tensor | float | None) -> None:
        """What the next forwards are divided by.

        Args:
            accumulation: micro-batches of the step.
            tokens: labelled tokens of all its micro-batches, over the number of ranks where gradients are averaged over those;
                None where nobody has counted them.
        """
        self.accumulation = accumulation
        self._tokens = None if tokens is None else torch.as_tensor(tokens).clamp(min=1)

    def divisor(self, own: Tensor) -> Tensor:
        """What a forward with so many tokens of its own is divided by."""
        if self._tokens is not None:
            return self._tokens.to(own.device)
        return own.clamp(min=1) * self.accumulation

    def seen(self) -> bool:
        """Whether a trained token has passed the layers since the figures were last asked for."""
        return self._sums["slots"] > 0

    def figures(self) -> dict[str, float]:
        """Mean penalty a token and share of (token, layer) slots below the floor, since the last call."""
        slots = max(self._sums["slots"], 1.0)
        found = {
            "floor_penalty": self._sums["penalty"] / slots,
            "floor_violation_rate": self._sums["violations"] / slots,
        }
        self._sums = dict.fromkeys(self._sums, 0.0)
        return found

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
        if labels is not None:
            self._mask = labels.ne(-100)
        else:
            self._mask = attention.bool() if attention is not None and attention.dim() == 2 else None

    def on_layer(self, position: int, output: Any) -> Any:
        """What a layer's output becomes: the same, with a node in the backward pass."""
        hidden = stream_of(output, self.floor.hidden_size, self.floor.layers[position])
        if not hidden.requires_grad:
            return None
        mask = self._mask
        if mask is None or mask.shape != hidden.shape[:-1]:
            mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        passed = _AddGradient.apply(hidden, mask.to(hidden.device), self, position)  # type: ignore[no-untyped-call]
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
    def forward(ctx: Any, hidden: Tensor, mask: Tensor, injection: FloorInjection, position: int) -> Tensor:
        floor = injection.floor
        sigma = float(floor.sigma[position])
        shortfall = (
            float(floor.tau[position]) - project(hidden, floor.directions[position])
        ) / sigma + injection.margin
        shortfall = shortfall.masked_fill(~mask, 0.0)
        ctx.save_for_backward(shortfall)
        ctx.scale = injection.weight / (len(floor.layers) * sigma) / injection.divisor(mask.sum())
        ctx.injection, ctx.position = injection, position
        sums = injection._sums
        sums["penalty"] += float(hinge(shortfall, injection.shape).sum())
        sums["violations"] += float((shortfall > 0).sum())
        sums["slots"] += float(mask.sum())
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = outputs
        (shortfall,) = ctx.saved_tensors
        with torch.enable_grad():
            x = shortfall.detach().requires_grad_()
            slope = torch.autograd.grad(hinge(x, ctx.injection.shape).sum(), x)[0]
        direction = ctx.injection.floor.directions[ctx.position].to(gradient.device)
        added = (-ctx.scale * slope).unsqueeze(-1) * direction
        return gradient + added.to(gradient.dtype), None, None, None


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
        check_arguments(trained.args)
    model = trained if alone else trained.model
    injection = FloorInjection(model, floor, weight=weight, accumulation=accumulation or 1, **options)
    try:
        with contextlib.nullcontext() if alone else telling(trained, injection):
            yield injection
    finally:
        injection.remove()


def check_arguments(arguments: Any) -> None:
    """Refuse arguments of a trainer under which the penalty's gradient would be wrong.

    Raises:
        UserError: if the loss is scaled (float16), or one process spreads a batch over several GPUs.
    """
    if arguments.fp16:
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


@contextlib.contextmanager
def telling(trainer: Any, injection: FloorInjection) -> Iterator[None]:
    """Tell the injection before each micro-batch what the trainer divides the step's loss by."""
    own = vars(trainer).get("training_step")  # of a framework that has put one there
    step = trainer.training_step

    def told(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        tokens, arguments = num_items_in_batch, trainer.args
        if tokens is not None and getattr(arguments, "average_tokens_across_devices", False):
            tokens = tokens / trainer.accelerator.num_processes  # those of all ranks; the gradients will be averaged
        micro_batches = getattr(trainer, "current_gradient_accumulation_steps", arguments.gradient_accumulation_steps)
        injection.of_step(micro_batches, tokens)
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = told
    try:
        yield
    finally:
        if own is None:
            del trainer.training_step
        else:
            trainer.training_step = own
