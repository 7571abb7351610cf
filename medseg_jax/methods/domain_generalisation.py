"""Simple ways to train for sites that nobody has seen: the baselines beside Mamba-Sea. All are `Supervised` with a
changed appearance; what a plain network learns, predicts and costs stays the same.

    MixStyle        the style of a sample's features becomes a mixture of its own and another sample's
    DSU             the style of features is drawn anew, as widely as styles differ in the batch
    FourierMixing   the amplitude spectrum of an image is mixed with another's at low frequencies, the phase stays

BigAug, strong intensity augmentation, is no method but a setting: `Stage(augment=Augment.strong())`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medseg_jax.methods.mamba_sea import at_each_call, lsa, style, unit_range
from medseg_jax.methods.objective import Tree, check_numbers
from medseg_jax.methods.supervised import Supervised
from medseg_jax.types import UserError


@dataclass(frozen=True)
class MixStyle(Supervised):
    """MixStyle (Zhou et al., ICLR 2021), after the first stages of the encoder.

        x' = (x - mu_i) / sd_i * (w sd_i + (1 - w) sd_j) + (w mu_i + (1 - w) mu_j),     w ~ Beta(alpha, alpha)

    where j is another sample of the batch and no gradient flows into the statistics. Use Mix(balance="domain"), so that
    j is often of another site (the article's "random shuffle" variant).

    Attributes:
        probability: of each stage to mix; one draw for the batch.
        alpha: of the Beta distribution; small: w is close to 0 or 1.
        stages: how many of the first stages mix; of VM-UNet, how many of the first scans.
    """

    probability: float = 0.5
    alpha: float = 0.1
    stages: int = 2

    def __post_init__(self):
        check_numbers(self, shares=("probability",), amounts=("alpha",))
        if self.alpha == 0:
            raise UserError("MixStyle: alpha cannot be used", found="0", expected="above 0")

    def forward(self, params: Tree, stats: Tree, image: Array, key: Array):
        net_key, style_key = jax.random.split(key)
        perturb = at_each_call(self.mix, style_key, self.stages)
        return self.fn.apply(params, stats, image, train=True, key=net_key, perturb=perturb)

    def mix(self, key: Array, x: Float[Array, "b *s d"]) -> Float[Array, "b *s d"]:
        """Features with mixed styles; those of one token, which have no deviation, stay as they are."""
        if math.prod(x.shape[1:-1]) == 1:
            return x
        gate, order, share = jax.random.split(key, 3)
        other = jax.random.permutation(order, len(x))
        w = jax.random.beta(share, self.alpha, self.alpha, (len(x), 1, 1))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(len(x), -1, x.shape[-1])  # [b, l, d]
        mean, deviation = jax.lax.stop_gradient(style(y))
        wanted_mean, wanted = (w * s + (1 - w) * s[other] for s in (mean, deviation))
        mixed = ((y - mean) / deviation * wanted + wanted_mean).reshape(x.shape).astype(x.dtype)
        return jnp.where(jax.random.bernoulli(gate, self.probability), mixed, x)


@dataclass(frozen=True)
class DSU(Supervised):
    """DSU, "uncertainty modeling" of feature statistics (Li et al., ICLR 2022), after every stage of the encoder.

    It is the `as_run` mode of Mamba-Sea's LSA, with a smaller probability.

    Attributes:
        probability: of each stage to be changed; one draw for the batch.
    """

    probability: float = 0.5

    def __post_init__(self):
        check_numbers(self, shares=("probability",))

    def forward(self, params: Tree, stats: Tree, image: Array, key: Array):
        net_key, style_key = jax.random.split(key)
        perturb = at_each_call(lambda key, x: lsa(key, x, "as_run", self.probability), style_key)
        return self.fn.apply(params, stats, image, train=True, key=net_key, perturb=perturb)


@dataclass(frozen=True)
class FourierMixing(Supervised):
    """Amplitude mixing of images (FDA: Yang and Soatto, 2020; FACT: Xu et al., 2021; FedDG: Liu et al., 2021).

        A' = (1 - w) A_i + w A_j at low frequencies, w ~ U(0, strength);     image' = inverse FFT of A' exp(i phase_i)

    Images are brought to [0, 1] for it (`unit_range`): the mean of an image that is centred at zero has a sign, which
    the phase would keep, so that a dark image mixed with a bright one would become darker.

    Attributes:
        probability: of each image to be mixed.
        strength: largest share of the other image's amplitude.
        band: share of the frequencies along each axis that are mixed; 1 mixes all of them.
    """

    probability: float = 0.5
    strength: float = 1.0
    band: float = 0.1

    def __post_init__(self):
        check_numbers(self, shares=("probability", "strength", "band"))

    def forward(self, params: Tree, stats: Tree, image: Array, key: Array):
        net_key, mix_key = jax.random.split(key)
        return super().forward(params, stats, self.mix(mix_key, image), net_key)

    def mix(self, key: Array, image: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        """Images, on the plan's scale, with mixed amplitude spectra."""
        lowest, span = unit_range(image, self.task.plan)
        gate, order, share = jax.random.split(key, 3)
        scalar = (len(image), *(1,) * (image.ndim - 1))
        chosen = jax.random.bernoulli(gate, self.probability, scalar)
        w = jnp.where(chosen, jax.random.uniform(share, scalar, maxval=self.strength), 0)
        axes, sides = tuple(range(1, image.ndim - 1)), image.shape[1:-1]
        spectrum = jnp.fft.fftn((image - lowest) / span, axes=axes)
        amplitude = jnp.abs(spectrum)
        other = amplitude[jax.random.permutation(order, len(image))]
        # frequencies are k / n in -0.5 ... 0.5
        low = np.ix_(*(np.abs(np.fft.fftfreq(n)) <= self.band / 2 for n in sides))
        inside = np.zeros(sides, bool)
        inside[low] = True
        ratio = jnp.where(inside[..., None], 1 - w + w * other / jnp.maximum(amplitude, 1e-6), 1)
        return jnp.fft.ifftn(spectrum * ratio, axes=axes).real * span + lowest
