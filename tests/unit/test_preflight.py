"""Preflight: names of topologies, what is known of data, the search for a batch, the roofline; end to end on CPUs."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import medseg_jax as ms
from medseg_jax import cli
from medseg_jax.data import pipeline
from medseg_jax.data.cache import build_cache
from medseg_jax.runtime import chips
from medseg_jax.training import preflight as pf
from medseg_jax.training.preflight import search
from medseg_jax.training.preflight.compiler import Compiler
from medseg_jax.training.preflight.search import changed
from medseg_jax.training.preflight.worker import needed_bytes
from medseg_jax.training.prepare import sample_size

NET = ms.UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
MOVING = ms.Augment(**{**vars(ms.Augment.none()), "p_mirror": 0.5, "p_rotation": 0.5})
TINY = ms.Config(data="nowhere", stages=(ms.Stage(ms.Supervised(NET), steps=100, augment=MOVING),))
KNOWN = {"patch_size": (16, 16), "channels": 2, "classes": 3, "cases": 20}

# ----------------------------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("v5e-1", "v5e", (1, 1)),
        ("v5e-256", "v5e", (16, 16)),
        ("v5litepod-16", "v5e", (4, 4)),
        ("V5E-4x4", "v5e", (4, 4)),
        ("v5p-64", "v5p", (2, 4, 4)),
        ("v6e-8", "v6e", (2, 4)),
        ("h100x8", "h100", (8,)),
        ("h100", "h100", (1,)),
        ("cpu", "cpu", (1,)),
        ("cpux4", "cpu", (4,)),
    ],
)
def test_names_of_topologies(name, kind, shape):
    found = chips.parse_topology(name)
    assert (found.kind, found.shape, found.chips) == (kind, shape, int(np.prod(shape)))


@pytest.mark.parametrize("name", ["v5e-3", "v5e-512", "v5p-4", "v5e-3x5", "h100x9", "h200x1", "cpux0", "tpu", ""])
def test_wrong_names_say_what_there_is(name):
    with pytest.raises(ms.UserError, match="no such topology") as error:
        chips.parse_topology(name)
    assert error.value.expected


def test_links_of_a_slice():
    """One link a way along an open axis, two along a ring."""
    names = ("v5e-1", "v5e-4", "v5e-256", "v5p-64", "v5p-128", "h100x8")
    speed = {n: chips.parse_topology(n).interconnect for n in names}
    expected = {"v5e-1": None, "v5e-4": 2 * 50e9, "v5e-256": 4 * 50e9, "h100x8": 450e9}
    # 2 x 4 x 4 chips are no whole cube of 4 x 4 x 4, whose axes alone can be closed
    assert speed == expected | {"v5p-64": 3 * 100e9, "v5p-128": 6 * 100e9}


@pytest.mark.parametrize(("name", "extra"), [("v5e-1", "preflight-tpu"), ("h100x1", "preflight-cuda")])
def test_missing_wheels_give_the_one_command(monkeypatch, name, extra):
    monkeypatch.setattr(chips, "find_spec", lambda module: None)
    with pytest.raises(ms.UserError, match="is not installed") as error:
        ms.preflight(TINY, name, **KNOWN)
    assert error.value.remedy == f"pip install 'medseg-jax[{extra}]'"


# ----------------------------------------------------------------------------------------------------------------- data


def test_nothing_known_of_the_data():
    with pytest.raises(ms.UserError, match="Nothing is known") as error:
        pf.know_data(TINY, chips.parse_topology("cpu"))
    assert "--patch-size" in error.value.remedy


def test_a_damaged_data_set_is_not_a_missing_one(phantoms, tmp_path):
    """What is wrong with data that are here is said, and no other data are made up."""
    (tmp_path / "dataset.json").write_text("{")
    cpu = chips.parse_topology("cpu")
    with pytest.raises(ms.UserError, match="JSON"):
        pf.know_data(replace(TINY, data=str(tmp_path)), cpu, **KNOWN)
    with pytest.raises(ms.UserError, match="No such domain"):
        pf.know_data(replace(TINY, data=str(phantoms.root), hold_out="site9"), cpu, **KNOWN)
    with pytest.raises(ms.UserError, match="number of training cases"):
        pf.know_data(TINY, cpu, patch_size=(16, 16), cases=0)


def test_another_number_of_cases_leaves_the_rest_of_the_data_as_it_is(phantoms):
    here = replace(TINY, data=str(phantoms.root))
    facts = pf.know_data(here, chips.parse_topology("cpu"), cases=1000)
    assert (facts.training, facts.cases, facts.domains) == (1000, 1000, phantoms.domains)
    assert len(facts.domains) > 1


def test_what_is_assumed_is_said():
    facts = pf.know_data(TINY, chips.parse_topology("cpu"), patch_size=(16, 16))
    assert [n.partition(" ")[0] for n in facts.notes] == ["nowhere", "a", "100"]
    assert facts.labels.exclusive
    assert not pf.know_data(TINY, chips.parse_topology("cpu"), **KNOWN, overlapping=True).labels.exclusive


def test_shapes_are_those_of_real_batches(phantoms, tmp_path):
    plan = ms.make_plan(phantoms)
    cache = build_cache(phantoms, plan, str(tmp_path))
    stage = ms.Stage(mix=ms.Mix(4))
    size = sample_size(stage, plan)
    batch = pipeline.batch_at(cache, phantoms, plan, stage.mix, sample_size=size, seed=0, step=0)
    shapes = pipeline.batch_shapes(plan, size, (4, 0))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s, np.dtype(d)) for k, (s, d) in shapes.items()}


def test_rows_that_do_not_divide_are_noted():
    plan = pf.know_data(TINY, chips.parse_topology("cpu"), **KNOWN).plan
    four, sixteen = chips.parse_topology("v5e-4"), chips.parse_topology("v5e-16")
    assert search.step_rows(TINY, 0, plan, four, None) == ((8, 0), None)
    rows, note = search.step_rows(TINY, 0, plan, sixteen, None)
    assert rows == (128, 0)
    assert "batch_size in plan.json" in note
    assert search.step_rows(TINY, 0, plan, sixteen, 32) == ((32, 0), None)
    for batch in (24, 0, -16):
        with pytest.raises(ms.UserError, match="cannot be shared"):
            search.step_rows(TINY, 0, plan, sixteen, batch)


def test_chips_that_share_samples_take_rows_together():
    shared = replace(TINY, spatial=2)
    plan = pf.know_data(shared, chips.parse_topology("cpu"), **KNOWN).plan
    assert search.step_rows(shared, 0, plan, chips.parse_topology("v5e-16"), None) == ((8, 0), None)  # 8 groups
    assert search.step_rows(shared, 0, plan, chips.parse_topology("v5e-4"), 6) == ((6, 0), None)
    with pytest.raises(ms.UserError, match="spatial does not divide"):
        search.step_rows(shared, 0, plan, chips.parse_topology("cpu"), None)


# --------------------------------------------------------------------------------------------------------------- search


class Machine:
    """Stands in for a compiler: memory = state + rows ** power, of which it has `capacity`."""

    def __init__(self, state, each, capacity, power=1.0):
        self.state, self.each, self.capacity, self.power, self.asked = state, each, capacity, power, 0

    def __call__(self, what, stage, rows, title, change=None):
        self.asked += 1
        total = int(self.state + self.each * sum(rows) ** self.power)
        if total > self.capacity:
            return {"status": "out of memory", "needed": total, "fits": False}
        memory = {"total": total, "arguments": self.state, "held": {"batch": 0}}
        return {"status": "compiled", "memory": memory, "fits": True}


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 10**8), st.integers(1, 64), st.floats(0.8, 1.3))
def test_the_search_brackets_the_largest_batch(state, each, room, first, power):
    machine = Machine(state, each, state + room, power)
    target = SimpleNamespace(chips=1, memory=machine.capacity)
    start = {"rows": [first, 0], **machine("train", 0, (first, 0), "")}
    found = search.largest_batch(TINY, 0, start, target, machine, 60)
    step = 2 if first % 2 == 0 else 1
    if found is None:
        assert state + each * step**power > machine.capacity
        return
    rows, gap = found["rows_per_chip"], max(step, search.CLOSE * found["rows_per_chip"])
    assert rows % step == 0
    assert int(state + each * rows**power) <= machine.capacity
    assert int(state + each * (rows + gap + step) ** power) > machine.capacity


def test_the_search_needs_few_programs():
    machine = Machine(10**9, 10**7, 16 * 2**30)
    target = SimpleNamespace(chips=1, memory=machine.capacity)
    start = {"rows": [8, 0], **machine("train", 0, (8, 0), "")}
    found = search.largest_batch(TINY, 0, start, target, machine, 9)
    assert found["compiles"] <= 6
    assert found["rows_per_chip"] > 0.9 * (16 * 2**30 - 10**9) / 10**7


def test_a_program_that_was_not_compiled_says_nothing_of_the_memory():
    machine = Machine(10**9, 10**7, 16 * 2**30)

    def ask(*words):
        reply = machine(*words)
        ask.asked += 1
        return reply if ask.asked < 2 else {"status": "timed out", "fits": None}

    ask.asked = 0
    start = {"rows": [8, 0], **machine("train", 0, (8, 0), "")}
    found = search.largest_batch(TINY, 0, start, SimpleNamespace(chips=1, memory=machine.capacity), ask, 9)
    assert found["known_to"] is None
    assert found["ended"] == "timed out"
    assert found["compiles"] == 2


@pytest.mark.parametrize(("each", "asked"), [(10**7, 4), (10**10, 3)], ids=["largest batch", "what to change"])
def test_a_search_that_is_stopped_leaves_what_is_known(each, asked):
    target = chips.parse_topology("v5e-1")
    machine = Machine(10**9, each, target.memory)

    def ask(*words):
        if ask.asked == asked:
            raise KeyboardInterrupt
        ask.asked += 1
        return machine(*words[:4])

    ask.asked = 0
    found = pf.examine(TINY, target, pf.know_data(TINY, target, **KNOWN), ask, None, 8, print)
    if found["fits"]:
        assert found["largest"]["rows_per_chip"] > found["stages"][0]["rows_per_chip"]
        assert found["largest"]["ended"] == "stopped"
    else:
        assert [offer["status"] for offer in found["suggestions"]] == ["out of memory"]
        assert "search was stopped" in found["notes"][-1]


def test_what_to_change():
    machine = Machine(0, 10, 100)
    first = {"rows": [16, 0], **machine("train", 0, (16, 0), "")}
    target = chips.parse_topology("v5e-4")
    offers = list(search.suggestions(TINY, 0, first, target, machine, 3))
    assert [next(iter(o["change"])) for o in offers] == [
        *("remat", "dtype", "accumulate", "accumulate"),
        "fsdp",
        "spatial",
    ]
    assert [o["status"] for o in offers] == ["out of memory"] * 2 + ["not tested"] * 4
    assert offers[0]["how"] == "--stages.0.objective.net.remat"


def test_what_is_set_already_is_no_advice():
    """Nor is what does not go with it: 4 chips, of which two share a sample, have 2 shares of the parameters."""
    machine, target = Machine(0, 10, 100), chips.parse_topology("v5e-4")
    net = replace(NET, remat=True, dtype="bfloat16")
    stage = replace(TINY.stages[0], objective=ms.Supervised(net), optim=ms.Optim(accumulate=2))
    first = {"rows": [16, 0], **machine("train", 0, (16, 0), "")}

    def advice(**fields):
        config = replace(TINY, stages=(stage,), **fields)
        return [offer["change"] for offer in search.suggestions(config, 0, first, target, machine, 9)]

    assert advice(spatial=2) == [{"accumulate": 4}, {"accumulate": 8}, {"fsdp": 2}]
    assert advice(fsdp=2) == [{"accumulate": 4}, {"fsdp": 4}, {"spatial": 2}]
    assert advice(fsdp=4) == [{"accumulate": 4}]


@pytest.mark.parametrize("change", [{"remat": True}, {"dtype": "bfloat16"}, {"accumulate": 2}, {"spatial": 2}])
def test_the_words_of_a_change_do_it(change):
    """What is suggested is what was compiled."""
    by_hand = ms_override(TINY, search.how_to(change, 0, TINY).split())
    assert by_hand == changed(TINY, 0, change)


def ms_override(config, words):
    from medseg_jax.config import override

    return override(config, words)


def test_a_network_without_the_option():
    with pytest.raises(ms.UserError, match="no option remat"):
        changed(ms.Config(stages=(ms.Stage(ms.Supervised(ms.Med2DSegNet())),)), 0, {"remat": True})


def test_the_tpu_compilers_message():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert needed_bytes(text) == int(20.5 * 2**30)
    assert needed_bytes("something else") is None


# ------------------------------------------------------------------------------------------------------------- roofline


def test_the_slowest_part_binds():
    counts = {"matmul_by_dtype": {"bf16": 197e12}, "bytes": 2 * 819e9, "vector_flops": 0, "kernel_flops": 0}
    counts["collectives"] = {"all-reduce": {"wire_bytes": 100e9}}
    found = pf.roofline(counts, chips.parse_topology("v5e-4"))
    assert found["binds"] == "HBM"
    assert found["step"] == pytest.approx(2.0)
    assert found["seconds"]["matrix units"] == pytest.approx(1.0)
    assert found["efficiency"] == pytest.approx(2 / 3)
    assert pf.roofline(counts, chips.parse_topology("cpu")) is None


def test_cost():
    stage = {"roofline": {"step": 0.5}, "rows": [8, 4], "steps": 100}
    assert pf.cost(stage, 20, 4, 3.6) == pytest.approx({"price": 3.6, "epoch": 3 * 0.002, "stage": 0.2})


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    picture = tmp_path_factory.mktemp("preflight") / "memory.png"
    lines = []
    one, four = (
        ms.preflight(TINY, name, **KNOWN, compiles=1, search=name == "cpux4", picture=picture, say=lines.append)
        for name in ("cpu", "cpux4")
    )
    return one, four, picture, lines


def test_end_to_end(on_four):
    one, four, picture, lines = on_four
    assert one["label"] == four["label"] == "compiled, not timed"
    assert one["fits"] is four["fits"] is True
    assert json.loads(json.dumps(four)) == four
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert any("compiled in" in line for line in lines)
    memory = four["stages"][0]["memory"]
    assert memory["total"] == sum(memory[k] for k in ("arguments", "outputs", "temporaries", "program"))
    held = memory["held"]
    assert held["opt"] == 2 * held["params"] + 2 * 4  # Adam's two moments and the counts of it and of the schedule
    assert held["batch"] == 2 * (20 * 20 * (4 * 2 + 4) + 5 * 4)  # 2 of 8 rows: image, label, case, domain, start
    assert four["largest"]["rows_per_chip"] > 2


def test_four_devices_share_the_work(on_four):
    """Each does a quarter, and the gradients are summed: nobody computes the whole batch."""
    one, four, *_ = (result["stages"][0]["counts"] for result in on_four[:2])
    assert four["matmul_flops"] == pytest.approx(one["matmul_flops"] / 4, rel=0.01)
    assert set(four["collectives"]) == {"all-reduce"}
    assert four["collectives"]["all-reduce"]["bytes"] >= on_four[1]["stages"][0]["memory"]["held"]["params"]
    assert not one["collectives"]


def test_the_command_line(capsys, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from medseg_jax import *\n"
        "net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)\n"
        "stage = Stage(Supervised(net), steps=5, augment=Augment.none())\n"
        "config = Config(data='nowhere', stages=(stage,))\n"
    )
    words = ["preflight", str(config), "--topology", "cpu", "--patch-size", "16", "16", "--no-search"]
    assert cli.main([*words, "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "fits   (compiled, not timed)" in out
    assert "memory a chip" in out
    assert cli.main(["preflight", str(config), "--topology", "cpu", "v5e-7"]) == 1
    assert "no such topology" in (said := capsys.readouterr()).err
    assert not said.out  # what another topology takes its minutes for


def test_a_refusal_is_an_answer(capsys, tmp_path):
    """A config that training would refuse: a rule that matches nothing. Its prediction is not worth minutes."""
    config = ms.Config(data="nowhere", stages=TINY.stages, rules=(ms.Rule("nothing", "fsdp"),))
    found = ms.preflight(config, "cpu", **KNOWN, search=False, say=lambda text: None)
    assert found["fits"] is None
    assert "matches nothing" in found["stages"][0]["error"]
    assert found["prediction"]["status"] == "not compiled"
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": ms.config.to_json(config)}))
    words = ["preflight", str(file), "--topology", "cpu", "--patch-size", "16", "16", "--no-search"]
    assert cli.main(words) == 1
    said = capsys.readouterr().out
    assert "refused: " in said
    assert found["stages"][0]["error"].splitlines()[-1].strip() in said


def test_a_compiler_that_dies_is_an_answer(monkeypatch, tmp_path):
    """Whatever bytes it leaves; and another one is started for the next request."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nread -r request\nprintf 'out of luck \\377' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with Compiler(chips.parse_topology("cpu"), 60, print) as compiler:
        replies = [compiler.ask({}, "it") for _ in range(2)]
    assert [reply["status"] for reply in replies] == ["crashed"] * 2
    assert "code 3\nout of luck" in replies[0]["error"]


def test_a_run_keeps_its_plan(phantoms, tmp_path):
    """Not one that is made anew for the chip."""
    plan = replace(ms.make_plan(phantoms), patch_size=(16, 16), batch_size=3)
    plan.save(tmp_path / "plan.json")
    config = replace(TINY, data=str(phantoms.root))
    (tmp_path / "run.json").write_text(json.dumps({"config": ms.config.to_json(config)}))
    picture = tmp_path / "new" / "memory.png"
    found = ms.preflight(tmp_path, "cpu", search=False, picture=picture, say=lambda text: None)
    assert found["data"]["patch_size"] == [16, 16]
    assert found["stages"][0]["rows"] == [3, 0]
    assert picture.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu():
    found = ms.preflight(TINY, "v5e-4", **KNOWN, compiles=1, price=1.2)
    stage = found["stages"][0]
    assert found["fits"] is True
    assert stage["roofline"]["binds"] in stage["roofline"]["seconds"]
    assert stage["counts"]["collectives"]["all-reduce"]["bytes"] >= stage["memory"]["held"]["params"]
    assert stage["cost"]["stage"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plug-in is not installed")
@pytest.mark.skipif(not os.access(chips.cuda_folder() / "bin" / "ptxas", os.X_OK), reason="ptxas is not installed")
def test_an_h100():
    found = ms.preflight(TINY, "h100x8", **KNOWN, search=False)
    assert found["fits"] is True
    assert found["stages"][0]["counts"]["collectives"]["all-reduce"]["count"] > 0
