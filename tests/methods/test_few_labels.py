"""Mean teacher, BCP and WT-BCP: the teacher, what NaN does, what each term does, any network, any kind of labels."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fakes import make_plan
from medseg_jax import (
    BCP,
    WTBCP,
    Augment,
    BCPUNet,
    Config,
    CopyPaste,
    Labels,
    MambaSea,
    MeanTeacher,
    Mix,
    Stage,
    Supervised,
    UNet,
    UserError,
    VNet,
    WTCopyPaste,
    XNet,
    train,
)
from medseg_jax.data.dataset import Dataset
from medseg_jax.methods import teacher as teachers
from medseg_jax.methods.objective import Task
from medseg_jax.methods.wt_bcp import low_high, low_high_as_released
from medseg_jax.training.prepare import transfer
from medseg_jax.training.step import StepParts, init_state, make_step

KEY = jax.random.key(0)
NET, XNET = UNet.isotropic(2, 4, 8, norm="batch"), XNet(width=2)
EXCLUSIVE = Labels.simple("a", "b")


def bound(objective, labels=EXCLUSIVE, dim=2):
    plan = make_plan((16,) * dim, batch_size=4, classes=labels.names)
    return objective.bind(Task(plan, labels, 1))


def batch(rows=4, dim=2, values=3, **changes):
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(rows, *(16,) * dim, 1)).astype(np.float32) for name in ("image", "unlabelled")}
    return given | {"label": rng.integers(0, values, (rows, *(16,) * dim)).astype(np.int32)} | changes


def parts(objective):
    stage = Stage(objective, augment=Augment.none())
    return StepParts(objective, optax.sgd(0.1), stage, 0.0, (1.0,) * objective.task.plan.dim, (16, 16))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


METHODS = {"mean teacher": MeanTeacher(NET), "bcp": BCP(NET), "wt_bcp": WTBCP(net=XNET)}


@pytest.mark.parametrize("name", ["mean teacher", "bcp", pytest.param("wt_bcp", marks=pytest.mark.slow)])
def test_teacher_starts_as_the_student_follows_it_and_no_nan_enters(name):
    objective = bound(METHODS[name])
    p = parts(objective)
    step = jax.jit(make_step(p))
    start = init_state(p, batch())
    # Another teacher, as if the stage before had none: at step 0 the student replaces it.
    aux = {**start["aux"], "teacher": jax.tree.map(lambda x: x + 7, start["aux"]["teacher"])}
    one, _ = step({**start, "aux": aux}, {}, batch())
    student = {"params": one["params"], "stats": one["aux"]["stats"]}
    before = {"params": start["params"], "stats": start["aux"]["stats"]}
    expected = jax.tree.map(lambda t, s: 0.99 * t + 0.01 * s, before, student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one["aux"]["teacher"], expected)
    assert int(one["aux"]["step"]) == 1

    for field, row, where in (("unlabelled", 0, (8, 8)), ("unlabelled", 1, (0, 0)), ("image", 0, (8, 8))):
        spoiled = batch()
        spoiled[field][row, *where] = np.nan
        after, metrics = step(one, {}, spoiled)
        assert int(metrics["bad"]) == 1, (field, row)
        assert_equal((one["params"], one["aux"]), (after["params"], after["aux"]))
    two, metrics = step(one, {}, batch())
    assert int(metrics["bad"]) == 0
    assert np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: np.any(a != b), one["aux"], two["aux"])
    for path, has_moved in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path)
        assert has_moved or name.endswith("['conv']['bias']"), name  # a norm takes that bias away


def test_a_broken_teacher_stops_the_step_instead_of_teaching():
    objective = bound(BCP(NET))
    params, aux = objective.init(KEY, batch())
    broken = jax.tree.map(lambda x: x * jnp.nan, aux["teacher"])
    aux = {**aux, "teacher": broken, "step": jnp.int32(1)}
    loss, _ = jax.jit(objective.loss)(params, aux, {}, batch(), KEY)
    assert not np.isfinite(loss)


def test_stage_two_takes_over_stage_one():
    first, second = parts(bound(CopyPaste(NET))), parts(bound(BCP(NET)))
    trained, _ = jax.jit(make_step(first))(init_state(first, batch()), {}, batch())
    state = transfer(init_state(second, batch()), {"params": trained["params"], "aux": trained["aux"]})
    assert_equal(state["params"], trained["params"])
    teacher = teachers.current(state["params"], state["aux"])
    assert_equal(teacher, {"params": trained["params"], "stats": trained["aux"]["stats"]})


def test_without_validation_cases_no_stage_starts_from_the_best(phantoms, tmp_path):
    """Said before the stage that would leave none: `start` cannot be changed afterwards."""
    data = Dataset.open(shutil.copytree(phantoms.root, tmp_path / "data"))
    cases = (replace(case, split="train") if case.split == "val" else case for case in data.cases)
    replace(data, cases=tuple(cases)).save()
    first, second = Stage(CopyPaste(NET), 2, mix=Mix(4)), Stage(CopyPaste(NET), 2, mix=Mix(4), name="b", start="best")
    config = Config(data=str(data.root), stages=(first, second), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no validation cases"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (Stage(BCP(NET), 2, mix=Mix(4), name="b"), "needs data"),
        (Stage(BCP(NET), 2, mix=Mix(4, 2), name="b"), "pairs of images"),
        (Stage(MambaSea(NET), 2, mix=Mix(4), name="b"), "share nothing"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_the_first_is_trained(phantoms, tmp_path, second, problem):
    first = Stage(CopyPaste(NET), 2, mix=Mix(4))
    config = Config(data=str(phantoms.root), stages=(first, second), labelled=1, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=problem):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists(), "the folder is free for a mended config"


def test_a_stage_has_a_teacher_of_its_own_also_after_another_with_one():
    """Its ramp rises anew, and its teacher is the student, not the teacher of the stage before."""
    first, second = parts(bound(MeanTeacher(NET))), parts(bound(BCP(NET)))
    trained, _ = jax.jit(make_step(first))(init_state(first, batch()), {}, batch())
    assert int(trained["aux"]["step"]) == 1
    state = transfer(init_state(second, batch()), {"params": trained["params"], "aux": trained["aux"]})
    assert int(state["aux"]["step"]) == 0
    student = {"params": trained["params"], "stats": trained["aux"]["stats"]}
    assert_equal(teachers.current(state["params"], state["aux"]), student)
    before = jax.tree.leaves(trained["aux"]["teacher"])
    assert any(np.any(a != b) for a, b in zip(before, jax.tree.leaves(student), strict=True))


@pytest.mark.parametrize("method", [CopyPaste(NET), BCP(NET), MeanTeacher(NET)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "labels", [Labels.overlapping("a", "b"), Labels.simple("a", ignore=2)], ids=["overlap", "ignore"]
)
def test_overlapping_classes_and_ignored_voxels(method, labels):
    objective = bound(replace(method, net=UNet.isotropic(2, 4, 8, deep_supervision=False)), labels)
    params, aux = objective.init(KEY, batch())
    loss = jax.jit(lambda given: objective.loss(params, aux, {}, given, KEY)[0])
    assert np.isfinite(loss(batch()))
    if labels.ignore is not None:  # what is ignored may be anything
        nothing = batch(label=np.full((4, 16, 16), 2, np.int32))
        assert float(loss(nothing)) < float(loss(batch()))


def test_volumes_and_deep_supervision():
    for method in (CopyPaste(UNet.isotropic(3, 4, 8)), BCP(UNet.isotropic(3, 4, 8)), WTBCP(net=XNET)):
        objective, given = bound(method, dim=3), batch(2, 3)
        params, aux = jax.eval_shape(lambda: objective.init(KEY, given))  # noqa: B023
        loss, (after, _) = jax.eval_shape(objective.loss, params, aux, {}, given, KEY)
        assert loss.shape == ()
        assert jax.tree.structure(after) == jax.tree.structure(aux)


@pytest.mark.parametrize(("labelled", "unlabelled"), [(3, 3), (4, 2)])
def test_rows_that_make_no_pairs_are_refused(labelled, unlabelled):
    given = batch(4)
    given = {k: v[: unlabelled if k == "unlabelled" else labelled] for k, v in given.items()}
    objective = bound(BCP(NET))
    params, aux = jax.eval_shape(lambda: objective.init(KEY, given))
    with pytest.raises(UserError, match="pairs"):
        jax.eval_shape(objective.loss, params, aux, {}, given, KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CopyPaste(ratio=1.5),
        lambda: BCP(ratio=-0.5),
        lambda: BCP(ema_decay=1.5),
        lambda: BCP(unlabelled_weight=-1),
        lambda: MeanTeacher(ema_decay=-0.1),
        lambda: MeanTeacher(ramp=-5),
        lambda: MeanTeacher(noise=float("nan")),
        lambda: WTBCP(ramp=-5),
        lambda: WTBCP(consistency=-1),
        lambda: WTBCP(fusion=(0.1,)),  # pyright: ignore[reportArgumentType]
        lambda: WTCopyPaste(fusion=(0.1, -0.1)),
        lambda: WTCopyPaste(net=NET),  # pyright: ignore[reportArgumentType]
        lambda: WTBCP(net=BCPUNet()),  # pyright: ignore[reportArgumentType]
        lambda: WTBCP(as_released=True, wavelet="db2"),
        lambda: XNet(width=0),
        lambda: BCPUNet(width=-1),
        lambda: VNet(width=0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError):
        wrong()


# ---------------------------------------------------------------- WT-BCP


def test_methods_that_know_one_output_train_the_main_branch_of_xnet_alone():
    """Three outputs would be taken for three scales of deep supervision, the last of weight 0."""
    for method in (Supervised(XNET), CopyPaste(XNET), BCP(XNET), MeanTeacher(XNET)):
        objective = bound(method)
        params, aux = jax.eval_shape(lambda: objective.init(KEY, batch()))  # noqa: B023
        logits, _ = jax.eval_shape(
            lambda p, s: objective.fn.apply(p, s, batch()["image"], train=True),  # noqa: B023
            params,
            aux["stats"],
        )
        assert [y.shape for y in logits] == [(4, 16, 16, 3)]
        assert jax.eval_shape(objective.loss, params, aux, {}, batch(), KEY)[0].shape == ()
    for method in (WTBCP(net=XNET), WTBCP(net=XNET, wavelet=None)):
        objective = bound(method)
        params, aux = jax.eval_shape(lambda: objective.init(KEY, batch()))  # noqa: B023
        heads, _ = jax.eval_shape(objective.heads, params, aux["stats"], batch()["image"], KEY)
        assert len(heads) == 3


def test_consistency_works_and_has_no_effect_as_released():
    heads = tuple((jax.random.normal(jax.random.key(i), (2, 4, 4, 3)),) for i in range(3))

    def gradients(as_released):
        objective = bound(WTBCP(net=XNET, as_released=as_released, ramp=10))
        return jax.grad(lambda h: jnp.asarray(objective.extra_loss(h, jnp.int32(5))[0]) + 0 * h[0][0].sum())(heads)

    assert all(np.any(g) for g in jax.tree.leaves(gradients(False)))
    assert not any(np.any(g) for g in jax.tree.leaves(gradients(True)))
    loss, metrics = bound(WTBCP(net=XNET, ramp=10)).extra_loss(heads, jnp.int32(5))
    assert float(loss) == pytest.approx(0.5 * 0.5 * float(metrics["consistency"]))


def test_the_high_head_of_volumes_is_not_trained_in_stage_one_as_released():
    each = jnp.array([1.0, 2.0, 4.0])
    assert bound(WTCopyPaste(net=XNET, as_released=True), dim=3).over_heads(each) == pytest.approx(5 / 3)
    assert bound(WTCopyPaste(net=XNET), dim=3).over_heads(each) == pytest.approx(7 / 3)


def test_wavelet_images_reach_the_branches():
    given = jnp.asarray(batch()["image"])
    assert_equal(bound(WTBCP(net=XNET, wavelet=None)).images(given, True), {"low": given, "high": given})
    fixed, released = (bound(WTBCP(net=XNET, as_released=flag)) for flag in (False, True))
    np.testing.assert_array_equal(fixed.images(given, True)["high"], fixed.images(given, False)["high"])
    low, high = low_high_as_released(given, 0, 0)
    found = released.images(given, False)
    np.testing.assert_array_equal((found["low"], found["high"]), (low, high))
    assert np.any(released.images(given, True)["high"] != high)


@pytest.mark.parametrize("shape", [(16, 12), (6, 8, 4)])
def test_low_and_high_are_finite_also_of_a_constant_image_and_know_no_scale(shape):
    constant = jnp.full((1, *shape, 2), 3.0)
    for image in low_high(constant, 0.2, 0.5):
        assert image.shape == constant.shape
        np.testing.assert_array_equal(image, 0)
    image = jax.random.normal(KEY, (2, *shape, 1))
    for one, other in zip(low_high(image, 0.2, 0.5), low_high(5 * image + 2, 0.2, 0.5), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    if len(shape) == 2:
        low, high = low_high_as_released(image, 0.1, 0.9)
        assert float(low.min()) >= 0
        assert float(high.max()) <= 1 + 0.9 + 0.09 + 1e-5


def test_a_volume_of_one_brightness_with_a_dark_spot_is_not_blown_up():
    """All voxels above the mean are equal: their deviation is 0, or a rounding error."""
    for value in (1.0, 0.7):
        volume = jnp.full((1, 16, 16, 16, 1), value).at[0, 4:6, 3:6, 5:8].set(0)
        for image in low_high(volume, 0.2, 0.5):
            assert float(jnp.abs(image).max()) <= 1000


def test_nothing_leaves_the_device_in_a_step():
    objective = bound(WTBCP(net=XNET))
    p = parts(objective)
    text = str(jax.make_jaxpr(make_step(p))(jax.eval_shape(lambda: init_state(p, batch())), {}, batch()))
    assert "callback" not in text
