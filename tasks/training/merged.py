"""LoRA layers that compute with the merged weight W + s·B·A, as the served model will.

PEFT's own layer adds B·A·x to W·x: two thin matrix products and a sum over every activation, forward and backward. The
merged weight is as small as W, costs one product of W's size a step, and leaves a single product per activation.
"""

import torch
from peft.tuners.lora.layer import Linear
from torch import nn


class Product(torch.autograd.Function):
    """x (W + scaling·b·a)ᵀ + bias, with gradients for x, a and b."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        merged = torch.addmm(weight, b, a, alpha=scaling)
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        return nn.functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, grad):
        x, merged, a, b = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        grad_a = (grads @ b * ctx.scaling).T @ rows
        grad_b = grads.T @ (rows @ a.T * ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


class MergedLinear(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (name,) = self.active_adapters
        weight = self.base_layer.weight
        a, b = (part[name].weight.to(weight.dtype) for part in (self.lora_A, self.lora_B))
        return Product.apply(x.to(weight.dtype), weight, self.base_layer.bias, a, b, self.scaling[name])


def use_merged_weights(network) -> None:
    """Has every LoRA layer over plain weights compute so from here on; LoRA must be without dropout."""
    for module in network.modules():
        if type(module) is Linear:
            module.__class__ = MergedLinear
