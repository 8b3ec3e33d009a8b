"""The Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported: test_kernels.py starts
this file in a process of its own. Prints nothing; an assertion that fails ends it with status 1."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

import kernels
from model import LocalResponseNorm

SHAPES = [  # shape, columns, channels in a window
    ((2, 96, 3, 5), 1, 5), ((1, 48, 9, 8), 2, 5), ((3, 7, 1, 1), 1, 5), ((2, 10, 2, 2), 2, 5), ((1, 66, 2, 3), 1, 5),
    ((2, 44, 3, 5), 1, 9), ((1, 10, 2, 2), 2, 9), ((1, 4, 3, 3), 1, 1),
]
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the largest number


def main() -> None:
    torch.manual_seed(0)
    for dtype, close in CLOSE.items():
        for shape, columns, size in SHAPES:
            for layout in (torch.channels_last, torch.contiguous_format):
                a, g = ((30 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout) for _ in range(2))
                b, grad = torch.empty_like(a), torch.empty_like(a)
                kernels.launch("lrn_forward", (a, b), columns, size, 1 / size, 2.0)
                kernels.launch("lrn_backward", (a, g, grad), columns, size, 1 / size, 2.0)
                x = a.double().requires_grad_()
                expected = LocalResponseNorm(columns, size, alpha=1.0)(x)
                (expected_grad,) = torch.autograd.grad(expected, x, g.double())
                for got, right in ((b, expected), (grad, expected_grad)):
                    assert got.dtype == dtype
                    assert (got - right).abs().max() <= close * right.abs().max(), (dtype, shape, columns, size, layout)


if __name__ == "__main__":
    main()
