"""What holds for every network."""

import jax
import jax.numpy as jnp
import pytest

from medseg_jax import UNet, VMUNet
from medseg_jax.methods.objective import Fn
from medseg_jax.models.bcp_unet import BCPUNet
from medseg_jax.models.deeplabv3p import DeepLabV3Plus
from medseg_jax.models.efficientnet import EfficientUNet
from medseg_jax.models.med2d_segnet import Med2DSegNet
from medseg_jax.models.vnet import VNet
from medseg_jax.models.xnet import XNet

VM_UNET = VMUNet(features=(8, 16), depths=(1, 1), decoder_depths=(1, 1), states=2)


@pytest.mark.parametrize(
    ("net", "dim", "calls"),
    [
        (UNet.isotropic(2, 4, 8, 8), 2, 3),
        (VM_UNET, 2, 16),  # four directions of four blocks
        (Med2DSegNet(), 2, 5),
        (DeepLabV3Plus(encoder="resnet50"), 2, 5),
        (DeepLabV3Plus(encoder="efficientnet-b0"), 2, 5),
        (EfficientUNet(), 2, 5),
        (BCPUNet(2), 2, 5),
        (VNet(2), 3, 5),
        (XNet(2, 2), 2, 15),  # five levels of three branches
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, int) else str(v),
)
def test_the_hook_sees_what_the_encoder_computes(net, dim, calls):
    """MixStyle, DSU and LSA act there. Traced only: nothing is compiled."""
    fn, seen = Fn(lambda rngs: net.build(3, 2, rngs)), []

    def run(x, hook):
        return fn.apply(*fn.init(jax.random.key(0)), x, train=True, key=jax.random.key(1), perturb=hook)

    def hook(y):
        seen.append(y.shape)
        return y

    image = jax.ShapeDtypeStruct((2, *(32,) * dim, 3), jnp.float32)
    with_hook = jax.eval_shape(lambda x: run(x, hook), image)
    assert len(seen) == calls
    assert {shape[0] for shape in seen} == {2}
    assert with_hook == jax.eval_shape(lambda x: run(x, None), image)
    assert f"{jax.make_jaxpr(lambda x: run(x, jnp.cos))(image)}".count(" cos ") >= calls
