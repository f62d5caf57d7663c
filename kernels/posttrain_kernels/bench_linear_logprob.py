"""Times the chunked head beside the naive one: ``python -m posttrain_kernels.bench_linear_logprob [N] [D] [V] [chunk]``.

Prints the median of several forward and backward passes of both, their ratio, and the largest block of logits each of them holds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from posttrain_kernels.linear_logprob import linear_logprob, linear_logprob_reference


def median_ms(run: Callable[[], None], device: torch.device, repeats: int = 7) -> float:
    """Median milliseconds of ``run`` after one warm-up call."""
    times = []
    for index in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def compare(n: int, d: int, v: int, chunk: int, dtype: torch.dtype, need_entropy: bool) -> str:
    """One line of the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(v, d, device=device, dtype=dtype) / d**0.5).requires_grad_()
    targets = torch.randint(0, v, (n,), device=device)

    def run(head: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        hidden.grad = weight.grad = None
        logp, entropy = head()
        (logp.sum() if entropy is None else logp.sum() + entropy.sum()).backward()

    naive = median_ms(lambda: run(lambda: linear_logprob_reference(hidden, weight, targets, need_entropy=need_entropy)), device)
    ours = median_ms(lambda: run(lambda: linear_logprob(hidden, weight, targets, chunk=chunk, need_entropy=need_entropy)), device)
    size = 4 * v / 2**20
    return (
        f"{str(dtype)[6:]:>9} {'yes' if need_entropy else 'no':>7} {naive:10.1f} {ours:11.1f} {ours / naive:6.2f}x "
        f"{n * size:10.1f} {min(chunk, n) * size:11.1f}"
    )


def main() -> None:
    n, d, v, chunk = ([int(a) for a in sys.argv[1:]] + [2048, 256, 8192, 256][len(sys.argv) - 1 :])[:4]
    print(f"N={n} D={d} V={v} chunk={chunk} device={'cuda' if torch.cuda.is_available() else 'cpu'} (forward and backward, median of 7)")
    print(f"{'dtype':>9} {'entropy':>7} {'naive ms':>10} {'chunked ms':>11} {'ratio':>7} {'naive MiB':>10} {'chunk MiB':>11}")
    for dtype in (torch.float32, torch.bfloat16):
        for need_entropy in (False, True):
            print(compare(n, d, v, chunk, dtype, need_entropy))


if __name__ == "__main__":
    main()
