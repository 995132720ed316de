"""Optimizers and learning rates: Adam, Muon, a rate that a CUDA graph can read."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from support.fast import has_bf16


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for weights of convolutions, as
    matrices with a row for each output channel: Nesterov momentum 0.95, then the nearest orthogonal
    matrix by five Newton–Schulz steps. Steps are as large as Adam's at the same rate (Liu et al.,
    arXiv 2502.16982). torch.optim.Muon takes matrices alone and no rate that a CUDA graph reads."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"].lerp_(weight.grad, 0.05)
                update = orthogonal(weight.grad.lerp(momentum, 0.95).flatten(1))
                rate = group["lr"] * 0.2 * math.sqrt(max(update.shape))
                weight.sub_(rate * update.view_as(weight))


def orthogonal(x: Tensor) -> Tensor:
    """Matrix -> approximately the nearest one with orthogonal rows or columns, in bf16 where the
    hardware has it: elsewhere products in bf16 take a CPU 30 times as long as in fp32."""
    wide = x.shape[0] <= x.shape[1]
    y = (x if wide else x.T).to(torch.bfloat16 if has_bf16(x.device) else torch.float32)
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return y if wide else y.T


def make_adam(groups: list[dict], device: torch.device) -> torch.optim.Adam:
    """Adam with weight decay 1e-5, as in both papers; `groups` have "params" and "lr"."""
    cuda = device.type == "cuda"
    groups = prepare(groups, device)
    return torch.optim.Adam(groups, weight_decay=1e-5, fused=True, capturable=cuda)


def make_optimizers(
    learned: Iterable[nn.Parameter], lr: float, matrices: list[nn.Parameter], matrix_lr: float
) -> list[torch.optim.Optimizer]:
    """Adam for those in `learned` that are not frozen; Muon for those of them that are in
    `matrices`, weights of convolutions."""
    known = set(matrices)
    others = [weight for weight in learned if weight.requires_grad and weight not in known]
    device = others[0].device
    optimizers = [make_adam([{"params": others, "lr": lr}], device)]
    if matrices:
        optimizers.append(Muon(prepare([{"params": matrices, "lr": matrix_lr}], device)))
    return optimizers


def matrices_of(network: nn.Sequential) -> list[nn.Parameter]:
    """The weights of a network's convolutions but the first, whose rows are too short for Muon."""
    return [layer.weight for layer in network if isinstance(layer, nn.Conv2d)][1:]


def prepare(groups: list[dict], device: torch.device) -> list[dict]:
    """Parameter groups whose learning rates are known to `set_rate`. On a GPU a rate is a tensor
    there: a CUDA graph reads it anew every step."""
    for group in groups:
        group["full_lr"] = group["lr"]
        if device.type == "cuda":
            group["lr"] = torch.tensor(group["lr"], device=device)
    return groups


def set_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial one."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["full_lr"] * factor)
        else:
            group["lr"] = group["full_lr"] * factor


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor: a linear warm-up in 5 % of the steps, then half a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
