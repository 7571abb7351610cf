"""Med-2D SegNet: size, shapes, and what its block reduces to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medseg_jax.methods.objective import Fn
from medseg_jax.models.med2d_segnet import MED2D_SEGNET, MED2D_TINY, Med2DSegNet, MedBlock
from medseg_jax.types import UserError

SMALL = Med2DSegNet(widths=(4, 8, 8), expand=2, kernel_size=3)


def counts(net):
    _, params, stats = nnx.split(nnx.eval_shape(lambda: net.build(3, 1, nnx.Rngs(0))), nnx.Param, ...)
    trainable, rest = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, stats))
    return trainable, trainable + rest


def test_parameter_counts():
    assert counts(MED2D_SEGNET) == (2_052_545, 2_067_425)
    assert counts(MED2D_TINY) == (559_937, 567_377)


def test_images_of_any_size_and_several_classes():
    fn = Fn(lambda rngs: SMALL.build(1, 3, rngs))
    params, stats = fn.init(jax.random.key(0))
    for size in ((8, 8), (13, 22)):
        (logits,), new = fn.apply(params, stats, jnp.ones((2, *size, 1)), train=True)
        assert logits.shape == (2, *size, 3)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), stats, new)
    assert all(jax.tree.leaves(changed)), "every running statistic moves in training"


def block(gate="gap"):
    return MedBlock(4, Med2DSegNet(expand=2, kernel_size=5, gate=gate), nnx.Rngs(1))


X = jax.random.normal(jax.random.key(2), (2, 9, 11, 4))


def test_a_block_whose_last_scale_is_zero_is_the_identity():
    module = block()
    module.narrow.norm.scale[...] = jnp.zeros(4)
    np.testing.assert_array_equal(module(X, train=True), X)


def test_without_its_gate_a_block_is_an_inverted_residual():
    module = block("none")

    def unit(layer, x, groups=1):
        kernel = layer.conv.kernel[...]
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )
        return y / np.sqrt(1 + 1e-5)  # batch norm as it starts

    y = jax.nn.elu(unit(module.widen, X))
    y = jax.nn.elu(unit(module.depthwise, y, groups=8))
    np.testing.assert_allclose(module(X), X + unit(module.narrow, y), atol=1e-5)
    assert not np.allclose(block("gap")(X), module(X), atol=1e-3), "the gate does something"


def test_errors_say_what_to_do():
    with pytest.raises(UserError, match=r"Unknown Med2DSegNet\.gate"):
        Med2DSegNet(gate="se").build(3, 1, nnx.Rngs(0))  # type: ignore[arg-type]


def test_it_learns_a_few_images_by_heart():
    """A disc of another brightness in each image: Dice above 0.95 on the images it has seen."""
    import optax

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    centre, radius = rng.uniform(10, 22, (4, 2, 1, 1)), rng.uniform(5, 9, (4, 1, 1))
    target = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2).astype(np.float32)
    image = (target * rng.uniform(0.5, 2, (4, 1, 1)) + rng.normal(0, 0.3, target.shape))[..., None].astype(np.float32)
    fn = Fn(lambda rngs: Med2DSegNet(widths=(8, 16), expand=2, kernel_size=3).build(1, 1, rngs))
    params, stats = fn.init(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = (params, stats, optimizer.init(params))

    @jax.jit
    def step(state):
        params, stats, opt = state

        def loss(params):
            (logits,), new = fn.apply(params, stats, image, train=True)
            return optax.sigmoid_binary_cross_entropy(logits[..., 0], target).mean(), (new, logits[..., 0])

        grads, (stats, logits) = jax.grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), stats, opt), logits

    for _ in range(60):
        state, logits = step(state)
    found = np.asarray(logits) > 0
    assert 2 * (found * target).sum() / (found.sum() + target.sum()) > 0.95
