"""VM-UNet on PyTorch, written here from its description under its published names, with the reference scan.

Where the published network calls a CUDA kernel this one runs the kernel's reference, mamba-ssm's selective_scan_ref:
all decays and inputs at once, then a loop over time. The published function indexes one time after the other, whose
gradient is quadratic in the length; without `indexed` the slices are taken once, by `unbind`.
"""

import resource

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from serve import serve, timed  # isort: skip

torch.set_num_threads(2)
DIRECTIONS, STATES = 4, 16
state = {}


def scan(u, delta, A, B, C, D):
    """u, delta [b, k, d, l], A [k, d, n], B, C [b, k, n, l], D [k, d] -> [b, k, d, l]."""
    decay = torch.exp(delta[..., None] * A[:, :, None])  # [b, k, d, l, n]
    more = (delta * u)[..., None] * B.transpose(2, 3)[:, :, None]
    arrays, h, ys = (decay, more, C), 0, []
    if state["indexed"]:
        slices = ([x[:, :, :, t] for x in arrays] for t in range(u.shape[3]))
    else:
        slices = zip(*(x.unbind(3) for x in arrays), strict=True)
    for a, x, c in slices:
        h = a * h + x
        ys.append((h * c[:, :, None]).sum(-1))
    return torch.stack(ys, -1) + D[..., None] * u


class SS2D(nn.Module):
    def __init__(self, dim):
        super().__init__()
        d, self.rank = 2 * dim, -(-dim // 16)
        self.in_proj = nn.Linear(dim, 2 * d, bias=False)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.x_proj_weight = nn.Parameter((2 * torch.rand(DIRECTIONS, self.rank + 2 * STATES, d) - 1) * d**-0.5)
        self.dt_projs_weight = nn.Parameter((2 * torch.rand(DIRECTIONS, d, self.rank) - 1) * self.rank**-0.5)
        dt = 10 ** (2 * torch.rand(DIRECTIONS, d) - 3)
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, STATES + 1)).repeat(DIRECTIONS * d, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * d))
        self.out_norm = nn.LayerNorm(d)
        self.out_proj = nn.Linear(d, dim, bias=False)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        b, d, h, w = x.shape
        two = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)  # [b, 2, d, l]
        u = torch.cat([two, two.flip(-1)], 1)
        projected = torch.einsum("bkdl,kmd->bkml", u, self.x_proj_weight)
        dt, B, C = projected.split([self.rank, STATES, STATES], 2)
        delta = F.softplus(torch.einsum("bkrl,kdr->bkdl", dt, self.dt_projs_weight) + self.dt_projs_bias[..., None])
        A = -torch.exp(self.A_logs).view(DIRECTIONS, d, STATES)
        y = scan(u, delta, A, B, C, self.Ds.view(DIRECTIONS, d))
        y = y[:, :2] + y[:, 2:].flip(-1)
        y = y[:, 0] + y[:, 1].view(b, d, w, h).transpose(2, 3).flatten(2)
        y = self.out_norm(y.transpose(1, 2).view(b, h, w, d))
        return self.out_proj(y * F.silu(z))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(dim), SS2D(dim)

    def forward(self, x):
        return x + self.self_attention(self.ln_1(x))


class Merge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        phases = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(phases, -1)))


class Expand(nn.Module):
    """Out of `dim` channels `out`, at `side` times the resolution."""

    def __init__(self, dim, out, side):
        super().__init__()
        self.expand, self.norm, self.side = nn.Linear(dim, side * side * out, bias=False), nn.LayerNorm(out), side

    def forward(self, x):
        b, h, w, _ = x.shape
        x = self.expand(x).view(b, h, w, self.side, self.side, -1).transpose(2, 3)
        return self.norm(x.reshape(b, h * self.side, w * self.side, -1))


class Stage(nn.Module):
    def __init__(self, dim, depth, downsample=None, upsample=None):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x):
        x = x if self.upsample is None else self.upsample(x)
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class VMUNet(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        dims = [dim, 2 * dim, 4 * dim, 8 * dim]
        self.patch_embed = PatchEmbed(dim)
        self.layers = nn.ModuleList(Stage(d, 2, downsample=Merge(d) if i < 3 else None) for i, d in enumerate(dims))
        self.layers_up = nn.ModuleList(
            Stage(d, n, upsample=Expand(2 * d, d, 2) if i else None)
            for i, (d, n) in enumerate(zip(dims[::-1], (2, 2, 2, 1), strict=True))
        )
        self.final_up = Expand(dim, dim // 4, 4)
        self.final_conv = nn.Conv2d(dim // 4, classes, 1)

    def forward(self, x):
        x, skips = self.patch_embed(x), []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x + skips[-i] if i else x)
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


def build(classes, dim, weights, indexed):
    """A random network, whose tensors are written to an .npz; returns its parameter count."""
    torch.manual_seed(0)
    net = VMUNet(classes, dim)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    np.savez(weights, **{name: tensor.numpy() for name, tensor in net.state_dict().items()})
    state.clear()
    state.update(net=net, indexed=indexed)
    return sum(p.numel() for p in net.parameters())


def prepare_training(batch, learning_rate, weight_decay):
    """AdamW, and the batch from an .npz with image [b, 3, h, w] and label [b, h, w]."""
    state["optimizer"] = torch.optim.AdamW(state["net"].parameters(), learning_rate, weight_decay=weight_decay)
    with np.load(batch) as file:
        state["batch"] = torch.from_numpy(file["image"]), torch.from_numpy(file["label"])


def objective(logits, label):
    """Half cross entropy, half Dice over the whole batch, background included, squares in the denominator."""
    p, t = logits.softmax(1), F.one_hot(label, logits.shape[1]).permute(0, 3, 1, 2)
    overlap, size = (p * t).sum((0, 2, 3)), (p**2).sum((0, 2, 3)) + t.sum((0, 2, 3))
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return (F.cross_entropy(logits, label) + dice.mean()) / 2


def train_step():
    """One step; returns its seconds, its loss and the process's peak memory so far."""
    losses = []

    def step():
        image, label = state["batch"]
        state["optimizer"].zero_grad(set_to_none=True)
        loss = objective(state["net"](image), label)
        loss.backward()
        state["optimizer"].step()
        losses.append(loss.item())

    seconds = timed(step)
    return {"seconds": seconds, "loss": losses[0], "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


serve({f.__name__: f for f in (build, prepare_training, train_step)}, ("torch", "numpy"))
