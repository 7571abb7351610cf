"""MONAI's DynUNet on PyTorch: a training step and sliding-window prediction, timed for both benchmarks."""

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet

from serve import serve, timed  # isort: skip

torch.set_num_threads(2)
state = {}


def build(dim, features, strides, kernel_sizes, classes, weights):
    """The network with the given weights (an .npz, in the order of our modules); returns its parameter count."""
    net = DynUNet(dim, 1, classes, kernel_sizes, strides, strides[1:], features, trans_bias=True)
    with np.load(weights) as file:
        arrays = [torch.from_numpy(file[name]) for name in file.files]
    blocks = [net.input_block, *net.downsamples, net.bottleneck]
    parameters = [p for block in blocks for p in _in_order(block)]
    for up in net.upsamples:
        parameters += [*up.transp_conv.parameters(), *_in_order(up.conv_block)]
    parameters += net.output_block.parameters()
    with torch.no_grad():
        for parameter, array in zip(parameters, arrays, strict=True):
            parameter.copy_(array)
    state.clear()
    state["net"] = net
    return sum(p.numel() for p in net.parameters())


def _in_order(block):
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
        yield from (*conv.parameters(), *norm.parameters())


def prepare_training(batch, learning_rate, momentum, weight_decay, clip_norm):
    """Loss and optimiser, and the batch from an .npz with image [b, c, *s] and label [b, 1, *s]."""
    net = state["net"].train()
    kernels = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    state["optimizer"] = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=True)
    state["loss"] = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    state["clip_norm"] = clip_norm
    with np.load(batch) as file:
        state["batch"] = torch.from_numpy(file["image"]), torch.from_numpy(file["label"])


def train_step():
    """One step; returns its seconds and its loss."""
    losses = []

    def step():
        image, label = state["batch"]
        state["optimizer"].zero_grad(set_to_none=True)
        loss = state["loss"](state["net"](image), label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state["net"].parameters(), state["clip_norm"])
        state["optimizer"].step()
        losses.append(loss.item())

    return {"seconds": timed(step), "loss": losses[0]}


def predict(image, patch_size, overlap, batch_size, out=None):
    """Probabilities of an image [1, 1, *s] (.npy) by gaussian sliding windows; returns the seconds."""
    net = state["net"].eval()
    volume = torch.from_numpy(np.load(image))
    found = []
    state["windows"] = 0

    def predictor(x):
        state["windows"] += len(x)
        return torch.softmax(net(x), 1)

    def run():
        with torch.inference_mode():
            found.append(sliding_window_inference(volume, patch_size, batch_size, predictor, overlap, mode="gaussian"))

    seconds = timed(run)
    if out:
        np.save(out, found[0][0, :, ::8, ::8, ::8].numpy())
    return {"seconds": seconds}


def windows_seen():
    """How many windows the last prediction put through the network."""
    return state["windows"]


FUNCTIONS = (build, prepare_training, train_step, predict, windows_seen)
serve({f.__name__: f for f in FUNCTIONS}, ("torch", "monai", "numpy"))
