"""PyTorch's side of benchmarks/scan.py: forward and backward of a grouped selective scan, two public ways.

    python benchmarks/peers/scan_torch.py B LENGTH D      prints JSON; needs torch and mambapy

`step by step`: the recurrence of mamba-ssm's selective_scan_ref (all decays and inputs up front, then a Python loop
over time), written here from its formulas because that package does not build without a CUDA compiler. Its time slices
are taken once by `unbind`: indexing one step at a time, as the published function does, makes each step's gradient a
zero tensor of full size, which is quadratic in the length; that form is timed at LENGTH / 4.
`parallel scan`: mamba.py's pscan (package mambapy), with the same inputs around it.
"""

# pyright: reportMissingImports=false
import json
import sys
import time

import torch
import torch.nn.functional as F

K, N = 4, 16


def inputs(b, length, d):
    torch.manual_seed(0)
    c = K * d
    shapes = (b, c, length), (b, c, length), (c, N), (b, K, N, length), (b, K, N, length), (c,), (c,)
    arrays = [torch.randn(s) for s in shapes]
    arrays[1] -= 4
    arrays[2] = -torch.exp(0.1 * arrays[2]) * torch.arange(1.0, N + 1)
    return [a.requires_grad_() for a in arrays]


def discretised(u, delta, A, B, bias):
    """Decays and inputs of every step, [b, c, l, n]."""
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(delta[..., None] * A[:, None])
    return decay, (delta * u)[..., None] * wide(B, u.shape[1])


def wide(x, c):
    return x.repeat_interleave(c // K, 1).transpose(2, 3)  # [b, k, n, l] -> [b, c, l, n]


def step_by_step(u, delta, A, B, C, D, bias, indexed=False):
    decay, more = discretised(u, delta, A, B, bias)
    C = wide(C, u.shape[1])
    if not indexed:
        decay, more, C = (x.unbind(2) for x in (decay, more, C))
    h, ys = 0, []
    for t in range(u.shape[2]):
        a, x, c = (s[:, :, t] for s in (decay, more, C)) if indexed else (s[t] for s in (decay, more, C))
        h = a * h + x
        ys.append((h * c).sum(-1))
    return torch.stack(ys, -1) + D[:, None] * u


def parallel_scan(u, delta, A, B, C, D, bias):
    from mambapy.pscan import pscan

    decay, more = discretised(u, delta, A, B, bias)
    h = pscan(decay.transpose(1, 2), more.transpose(1, 2)).transpose(1, 2)  # it takes [b, l, c, n]
    return (h * wide(C, u.shape[1])).sum(-1) + D[:, None] * u


def least(run, repeats=2):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def timed(scan, b, length, d):
    arrays = inputs(b, length, d)

    def backward():
        torch.autograd.grad((scan(*arrays) ** 2).sum(), arrays)

    with torch.no_grad():
        forward = least(lambda: scan(*arrays))
    return {"forward_ms": forward, "backward_ms": least(backward)}


def main():
    b, length, d = map(int, sys.argv[1:4])
    arrays = inputs(b, 64, d)
    torch.testing.assert_close(step_by_step(*arrays), parallel_scan(*arrays), rtol=1e-4, atol=1e-4)
    rows = {
        "torch: mamba.py pscan": timed(parallel_scan, b, length, d),
        "torch: selective_scan_ref, slices taken once": timed(step_by_step, b, length, d),
    }
    short = length // 4
    rows[f"torch: selective_scan_ref as published, l = {short}"] = timed(
        lambda *a: step_by_step(*a, indexed=True), b, short, d
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
