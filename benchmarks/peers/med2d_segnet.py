"""Med-2D SegNet in PyTorch, layer by layer what medseg_jax/models/med2d_segnet.py is, timed for one image."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from serve import serve, timed  # isort: skip

torch.set_num_threads(2)
state = {}


def unit(before, after, side, groups=1, activation=True):
    layers = [nn.Conv2d(before, after, side, padding=side // 2, groups=groups), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, *([nn.ELU()] if activation else []))


class MedBlock(nn.Module):
    def __init__(self, channels, expand=6, side=7):
        super().__init__()
        wide = expand * channels
        self.widen, self.depthwise = unit(channels, wide, 1), unit(wide, wide, side, wide)
        self.narrow = unit(wide, channels, 1, activation=False)

    def forward(self, x):
        y = self.depthwise(self.widen(x))
        return x + self.narrow(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


class Net(nn.Module):
    def __init__(self, widths, channels, classes):
        super().__init__()
        self.stem = unit(channels, widths[0], 3)
        self.enter = nn.ModuleList([unit(a, b, 1) for a, b in zip((widths[0], *widths), widths, strict=False)])
        self.blocks = nn.ModuleList([MedBlock(w) for w in widths])
        ways = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.decoder = nn.ModuleList([nn.Sequential(unit(a + b, b, 3), unit(b, b, 3)) for a, b in ways])
        self.head = nn.Sequential(
            nn.Conv2d(widths[0], 32, 3, padding=1), nn.ELU(), nn.Conv2d(32, 16, 3, padding=1), nn.ELU()
        )
        self.logits = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x, skips = self.stem(x), []
        for enter, block in zip(self.enter, self.blocks, strict=True):
            x = block(enter(F.max_pool2d(skips[-1], 2) if skips else x))
            skips.append(x)
        x = skips.pop()
        for pair in self.decoder:
            up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = pair(torch.cat([up, skips.pop()], 1))
        return self.logits(self.head(x))


def build(widths, channels, classes, weights):
    """The network with the given weights: (convolution kernel, bias, norm scale, bias) of each unit in order."""
    net = Net(widths, channels, classes).eval()
    with np.load(weights) as file, torch.no_grad():
        for parameter, name in zip(net.parameters(), file.files, strict=True):
            parameter.copy_(torch.from_numpy(file[name]))
    state["net"] = net
    return sum(p.numel() for p in net.parameters())


def predict(image, output=None):
    """Seconds of one forward pass of an .npy image [b, c, h, w]; the logits go to `output`."""
    if state.get("file") != image:
        state["file"], state["image"] = image, torch.from_numpy(np.load(image))
    with torch.inference_mode():
        seconds = timed(lambda: state.__setitem__("logits", state["net"](state["image"])))
    if output:
        np.save(output, state["logits"].numpy())
    return seconds


serve({"build": build, "predict": predict}, ("torch", "numpy"))
