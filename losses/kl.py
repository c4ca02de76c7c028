"""Token-level Kullback-Leibler divergence over the full vocabulary.

Shapes: M masked-in tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse"]


def kl_terms(student_logits: Tensor, teacher_logits: Tensor, direction: Direction = "forward") -> Tensor:
    """KL per token, [M], float32, in nat.

    Args:
        student_logits: [M, V], with gradient.
        teacher_logits: [M, V], the reference.
        direction: ``forward`` is KL(teacher || student), ``reverse`` is KL(student || teacher).
    """
    student = torch.log_softmax(student_logits.float(), dim=-1)
    teacher = torch.log_softmax(teacher_logits.float(), dim=-1)
    if direction == "reverse":
        student, teacher = teacher, student
    return (teacher.exp() * (teacher - student)).sum(-1)
