"""Hard feature loss (section 3.2): D = (T − S)², d its p_hard-quantile over all elements, loss = mean of D where D >= d.

Only D is written (the quantile reads it six times; recomputing it would read teacher and student as often). The backward pass
computes D anew and writes the student's gradient; teacher and threshold get none.

Bytes at 256², n = 384·56² elements an image, for S and M alike, fp32: forward 4·(2 read + 1 written + 6 for the quantile + 1 for
the mean)·n = 48 MB, backward 12·n = 14 MB: 15 µs an image on an H200 at 4.3 TB/s. Not measured on a GPU yet.
"""

import torch
from torch import Tensor

from .quantile import quantile, quantile_reference, storage_order
from .triton_or_not import cdiv, jit, runs_on, tl

# Streaming kernels: 8 elements a thread keep enough loads in flight; larger blocks bring no more.
CONFIG = {"BLOCK": 1024, "num_warps": 4}


def hard_feature_loss_reference(teacher: Tensor, student: Tensor, p_hard: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch: loss, threshold d and the number of elements in the mean, three float32 scalars."""
    d = (teacher.float() - student.float()).square()
    threshold = quantile_reference(d, [p_hard])[0]
    hard = d >= threshold
    return (d * hard).sum() / hard.sum(), threshold, hard.sum().float()


@jit
def squared_difference_kernel(teacher_ptr, student_ptr, d_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    difference = tl.load(teacher_ptr + i, mask=i < n).to(tl.float32) - tl.load(student_ptr + i, mask=i < n).to(tl.float32)
    tl.store(d_ptr + i, difference * difference, mask=i < n)


@jit
def hard_sum_kernel(d_ptr, threshold_ptr, sums_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    """Sum and number of the elements >= threshold in each block; a second sum over the blocks keeps the result reproducible,
    which atomic additions of floats would not."""
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(d_ptr + i, mask=i < n, other=0)
    hard = (d >= tl.load(threshold_ptr)) & (i < n)
    tl.store(sums_ptr + block, tl.sum(tl.where(hard, d, 0)))
    tl.store(counts_ptr + block, tl.sum(hard.to(tl.int32)))


@jit
def hard_gradient_kernel(teacher_ptr, student_ptr, threshold_ptr, scale_ptr, gradient_ptr, n, BLOCK: tl.constexpr):
    """scale · (S − T) where (T − S)² >= threshold."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    difference = tl.load(teacher_ptr + i, mask=i < n).to(tl.float32) - tl.load(student_ptr + i, mask=i < n).to(tl.float32)
    hard = difference * difference >= tl.load(threshold_ptr)
    gradient = tl.where(hard, -tl.load(scale_ptr) * difference, 0)
    tl.store(gradient_ptr + i, gradient.to(gradient_ptr.dtype.element_ty), mask=i < n)


def in_step(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Both without gaps and in the same order in memory; copies only what is not."""
    student = storage_order(student)
    if teacher.stride() != student.stride():
        teacher = torch.empty_like(student, dtype=teacher.dtype).copy_(teacher)
    return teacher, student


@torch.library.custom_op("efficientad::hard_feature_loss", mutates_args=())
def hard_feature_loss_op(teacher: Tensor, student: Tensor, p_hard: float) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_on(teacher, student):
        return hard_feature_loss_reference(teacher, student, p_hard)
    teacher, student = in_step(teacher, student)
    n, blocks = student.numel(), cdiv(student.numel(), CONFIG["BLOCK"])
    d = torch.empty_like(student, dtype=torch.float32)
    sums, counts = d.new_empty(blocks), d.new_empty(blocks, dtype=torch.int32)
    with torch.cuda.device_of(student):
        squared_difference_kernel[(blocks,)](teacher, student, d, n, **CONFIG)
        threshold = quantile(d, p_hard).clone()
        hard_sum_kernel[(blocks,)](d, threshold, sums, counts, n, **CONFIG)
    count = counts.sum().float()
    return sums.sum() / count, threshold, count


@torch.library.custom_op("efficientad::hard_feature_loss_backward", mutates_args=())
def backward_op(scale: Tensor, teacher: Tensor, student: Tensor, threshold: Tensor) -> Tensor:
    if not runs_on(teacher, student):
        difference = student.float() - teacher.float()
        gradient = torch.where(difference.square() >= threshold, scale * difference, 0).to(student.dtype)
        return torch.empty_like(storage_order(student)).copy_(gradient)
    teacher, student = in_step(teacher, student)
    gradient, n = torch.empty_like(student), student.numel()
    with torch.cuda.device_of(student):
        hard_gradient_kernel[(cdiv(n, CONFIG["BLOCK"]),)](teacher, student, threshold, scale, gradient, n, **CONFIG)
    return gradient


@hard_feature_loss_op.register_fake
def _(teacher: Tensor, student: Tensor, p_hard: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(student.new_empty((), dtype=torch.float32) for _ in range(3))


@backward_op.register_fake
def _(scale: Tensor, teacher: Tensor, student: Tensor, threshold: Tensor) -> Tensor:
    return torch.empty_like(storage_order(student))


def _setup_context(ctx, inputs, output):
    teacher, student, _ = inputs
    _, threshold, count = output
    ctx.mark_non_differentiable(threshold, count)
    ctx.save_for_backward(teacher, student, threshold, count)


def _backward(ctx, gradient, *_):
    teacher, student, threshold, count = ctx.saved_tensors
    return None, backward_op(gradient * 2 / count, teacher, student, threshold), None


hard_feature_loss_op.register_autograd(_backward, setup_context=_setup_context)


def hard_feature_loss(teacher: Tensor, student: Tensor, p_hard: float = 0.999) -> Tensor:
    """L_hard of two tensors of the same shape (any float dtype but float64), a float32 scalar; the gradient reaches the student
    alone. Raises TypeError or ValueError for other input."""
    for name, x in (("teacher", teacher), ("student", student)):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    if teacher.shape != student.shape or teacher.device != student.device or student.numel() == 0:
        got = f"{tuple(teacher.shape)} on {teacher.device} and {tuple(student.shape)} on {student.device}"
        raise ValueError(f"teacher and student must have one shape and device, and an element, got {got}")
    if not 0 <= p_hard <= 1:
        raise ValueError(f"p_hard must be between 0 and 1, got {p_hard}")
    return hard_feature_loss_op(teacher.detach(), student, float(p_hard))[0]
