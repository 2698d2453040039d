"""How far from float64 a GRU is whose products round their operands to TF32, by simulation on a CPU.

    python benchmarks/tf32.py        # docs/results/tf32-simulated.txt

Everything else is float64, states are kept in float32. The kernels round each operand to the nearest TF32 value; the other rows
leave some products exact, or drop bits as tensor cores do with plain float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: T, B, H = inputs, layers
SHAPES = ((4, 8, 32, 3), (4, 32, 128, 3), (100, 8, 32, 3), (4, 8, 32, 1))
DRAWS = 8


def nearest(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def exact(x: Tensor) -> Tensor:
    return x


#: What operands become: input of the lowest layer, inputs of the others, states.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "all nearest": (nearest, nearest, nearest),
    "lowest input exact": (exact, nearest, nearest),
    "inputs exact": (exact, exact, nearest),
    "states exact": (nearest, nearest, exact),
    "all truncated": (truncated, truncated, truncated),
}


def stack(x: Tensor, h0: Tensor, module: nn.GRU, way: tuple[Callable[[Tensor], Tensor], ...]) -> list[Tensor]:
    """output and h_n of float32 x [T, B, I], h0 [L, B, H]."""
    finals = []
    for layer in range(module.num_layers):
        w_ih, w_hh, b_ih, b_hh = module.all_weights[layer]
        of_input, of_state = way[0 if layer == 0 else 1], way[2]
        h, states = h0[layer], []
        for x_t in x:
            i_r, i_z, i_n = (of_input(x_t).double() @ of_input(w_ih).double().T + b_ih).chunk(3, 1)
            h_r, h_z, h_n = (of_state(h).double() @ of_state(w_hh).double().T + b_hh).chunk(3, 1)
            n = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
            h = (n + torch.sigmoid(i_z + h_z) * (h.double() - n)).float()
            states.append(h)
        x = torch.stack(states)
        finals.append(h)
    return [x, torch.stack(finals)]


def rms_error(actual: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    """Over both results, each relative to its RMS, as `bench` has it."""
    parts = [(a.double() - e) / e.square().mean().sqrt() for a, e in zip(actual, expected, strict=True)]
    return math.sqrt(sum(p.square().sum().item() for p in parts) / sum(p.numel() for p in parts))


@torch.no_grad()
def main() -> None:
    for T, B, H, L in SHAPES:
        errors = dict.fromkeys(WAYS, 0.0)
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            module = nn.GRU(H, H, L)
            x, h0 = torch.randn(T, B, H), torch.randn(L, B, H)
            results = {name: stack(x, h0, module, way) for name, way in WAYS.items()}
            expected = module.double()(x.double(), h0.double())
            for name, result in results.items():
                errors[name] += rms_error(result, expected) / DRAWS
        print(f"T {T}, B {B}, H {H}, {L} layers: " + ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
