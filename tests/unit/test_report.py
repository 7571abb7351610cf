"""The report: complete, self-contained, escaped, and honest about what is missing."""

import base64
import io as streams
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.evaluation.compare import compare
from medseg_jax.evaluation.evaluate import evaluate
from medseg_jax.evaluation.report import report
from medseg_jax.types import UserError

VOID = {"meta", "img", "br", "path", "use", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")], f"inline handler in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "


def shifted(dataset, cases, folder, shift):
    folder.mkdir(parents=True)
    for i, case in enumerate(cases):
        label, where = io.read_label(case.label)
        io.write_label(folder / case.label.name, np.roll(label, shift * i, 0), where)
    return evaluate(folder, dataset.root, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set and a run as training leaves it."""
    root = tmp_path_factory.mktemp("report")
    dataset = make_phantoms(root / "data", dim=2, cases=30, sites=3, size=32)
    run = root / "run & <co>"
    for name, shift in {"best": 1, "last": 2}.items():
        shifted(dataset, dataset.subset("val"), run / "validation" / name, shift)
    shifted(dataset, dataset.subset("test"), run / "unseen_site", 1)
    record = {
        "config": {"seed": 7, "stages": [{"name": "train"}], "note": "</pre><script>alert(1)</script>"},
        "dataset": {"root": str(dataset.root), "name": "<b>phantoms</b>", "fingerprint": "f00d"},
        "cases": {split: [case.id for case in dataset.subset(split)] for split in ("train", "val", "test")},
        "versions": {"jax": "0.12"},
        "git": {"commit": "abc123", "modified": True},
        "devices": {"kind": "cpu"},
        "command": ["medseg", "train", '"><img src=x onerror=alert(1)>'],
        "started": "2025-01-02 03:04:05",
    }
    (run / "run.json").write_text(json.dumps(record))
    plan = {"dim": 2, "patch_size": [32, 32], "reasons": {"patch_size": "as large as <the> images"}}
    (run / "plan.json").write_text(json.dumps(plan))
    lines = [
        {"kind": "train", "stage": s, "step": i, "loss": 1 / i, "wrong": 0.1 * i} for s in ("a", "b") for i in (1, 2)
    ]
    lines += [{"kind": "val", "stage": "a", "step": 2, "dice": 0.5, "dice/organ": 0.5}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    return dataset, run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run & <co>")


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_whole_and_needs_nothing_else(run):
    path = report(run)
    assert path == run / "report.html"
    text, page = read(path)
    assert page.tags.count("script") == 1
    assert "link" not in page.tags
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in page.fetched), page.fetched
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not list(run.glob(".report*"))


def test_the_same_run_gives_the_same_page(run):
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first


def test_scores_of_all_evaluations_stand_side_by_side(run):
    _, page = read(report(run))
    for place in ("validation/best", "validation/last", "unseen_site"):
        summary = json.loads((run / place / "summary.json").read_text())
        assert f"{summary['mean']['dice']:.3f}" in page.text
        low, high = summary["ci95"]["dice"]
        assert f"{low:.3f} – {high:.3f}" in page.text
    assert page.text.index("Best on validation") < page.text.index("Last") < page.text.index("Unseen site")
    for word in ("NSD at 1 px", "HD95 (px)", "organ", "lesion", "vessel", "site2", "patch_size", "abc123, modified"):
        assert word in page.text


def test_postprocessed_scores_are_named_after_their_weights_and_a_remark_of_all_stands_once(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "validation" / "last", tmp_path / "run" / "validation" / "last_postprocessed")
    shutil.rmtree(tmp_path / "run" / "unseen_site")
    for path in (tmp_path / "run" / "validation").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        summary["notes"] = ["A remark of all.", *(["Of these alone."] if "last" in path.parent.name else [])]
        path.write_text(json.dumps(summary))
    _, page = read(report(tmp_path / "run"))
    assert "Last, post-processed" in page.text
    assert page.text.count("A remark of all.") == 1
    assert "Last; last, post-processed: Of these alone." in page.text


def test_post_processed_scores_are_called_so_and_said_to_be_too_good(made, run):
    dataset, _ = made
    shifted(dataset, dataset.subset("val"), run / "validation" / "best_postprocessed", 0)
    _, page = read(report(run))
    order = [page.text.index(title) for title in ("Best on validation", "Last", "Best, post-processed", "Unseen site")]
    assert order == sorted(order)
    assert "postprocessed" not in page.text
    assert "Post-processing was chosen on these cases" in page.text


def test_cases_of_patients_and_large_volumes_read_well(run):
    path = run / "validation" / "best" / "summary.json"
    summary = json.loads(path.read_text())
    summary["mean"]["volume_error"] = 12345.6
    path.write_text(json.dumps(summary))
    _, page = read(report(run))
    assert "12,346" in page.text
    assert f"{summary['cases']} (of {summary['patients']['patients']} patients)" in page.text


def test_everything_from_files_is_escaped(run):
    text, page = read(report(run))
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    for word in ("<b>phantoms</b>", "run & <co>", "as large as <the> images", "</pre><script>alert(1)</script>"):
        assert word in page.text


def pictures(page):
    sources = [v.removeprefix("data:image/png;base64,") for v in page.fetched if v.startswith("data:")]
    return [np.asarray(Image.open(streams.BytesIO(base64.b64decode(s)))) for s in sources]


def test_worst_median_and_best_are_shown_with_outlines(run):
    _, page = read(report(run))
    shown = pictures(page)
    assert len(shown) == 9
    worst, best = shown[:3], shown[6:]
    assert (worst[0] != worst[1]).any()
    assert (worst[1] != worst[2]).any()
    assert (best[1] == best[2]).all(), "the best prediction is perfect"
    summary = json.loads((run / "validation" / "best" / "summary.json").read_text())
    assert f"Worst: {summary['worst'][0]}" in page.text
    assert "Median: " in page.text
    assert "Best: " in page.text


def test_a_data_set_that_is_gone_is_named(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["dataset"]["root"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(record))
    _, page = read(report(run))
    assert f"there is no data set at {tmp_path / 'gone'}" in re.sub(r"\s+", " ", page.text)
    assert not pictures(page)
    assert "phantom_" in page.text


def test_a_case_that_is_gone_is_named(made, run, tmp_path):
    data = shutil.copytree(made[0].root, tmp_path / "data")
    record = json.loads((run / "run.json").read_text())
    record["dataset"]["root"] = str(data)
    (run / "run.json").write_text(json.dumps(record))
    worst = json.loads((run / "validation" / "best" / "summary.json").read_text())["worst"][0]
    for path in data.glob(f"imagesTr/{worst}*"):
        path.write_bytes(b"damaged")
    _, page = read(report(run))
    assert len(pictures(page)) == 6
    assert "No picture" in page.text


def test_a_run_that_is_not_finished_has_a_page(run):
    shutil.rmtree(run / "validation")
    shutil.rmtree(run / "unseen_site")
    _, page = read(report(run))
    assert "no final scores yet" in page.text
    assert "Training loss" in page.text
    assert "While training: wrong" in page.text
    (run / "log.jsonl").unlink()
    (run / "plan.json").unlink()
    assert "Training loss" not in read(report(run))[1].text


def test_curves_count_steps_through_all_stages(run):
    from medseg_jax.evaluation.report import _read_log

    assert [e["step"] for e in _read_log(run / "log.jsonl") if e["kind"] == "train"] == [1, 2, 3, 4]


def test_empty_masks_and_missing_predictions_are_told(made, tmp_path):
    dataset, _ = made
    pred = tmp_path / "pred"
    shifted(dataset, dataset.subset("val"), pred, 1)
    gone = min(pred.glob("phantom*"))
    gone.unlink()
    evaluate(pred, dataset.root, tmp_path / "out", missing="worst", nsd_tolerance=2.5)
    _, page = read(report(tmp_path / "out"))
    assert f"No prediction, scored as empty: {io.stem(gone)}" in page.text
    assert "∞" in page.text
    assert "2.5 px" in page.text
    assert len(pictures(page)) == 9


def test_an_evaluation_of_plain_folders_has_a_page(made, tmp_path):
    dataset, _ = made
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        for case in dataset.subset("val"):
            shutil.copy(case.label, tmp_path / folder)
    evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    path = report(tmp_path / "out", tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    _, page = read(path)
    assert "cannot be shown" in page.text
    assert "label 1" in page.text
    assert "No dataset.json" in page.text


def test_volumes_show_a_slice(tmp_path):
    dataset = make_phantoms(tmp_path / "data", dim=3, cases=6, sites=2, size=16)
    shifted(dataset, dataset.subset("test"), tmp_path / "pred", 1)
    _, page = read(report(tmp_path / "pred"))
    assert re.search(r"slice \d+ of \d+", page.text)
    assert "HD95 (mm)" in page.text
    assert "Volume error (ml)" in page.text


def test_lesions_probabilities_and_comparisons_are_shown_where_they_are(made, tmp_path):
    dataset, _ = made
    folders = [tmp_path / "run a", tmp_path / "b"]
    for shift, folder in enumerate(folders):
        shifted(dataset, dataset.subset("val"), folder, shift)
        (folder / "probabilities").mkdir()
        for case in dataset.subset("val"):
            label, _ = io.read_label(folder / case.label.name)
            hot = 0.7 * dataset.labels.table[label] + 0.3 / dataset.labels.channels
            names = ["background", *dataset.labels.names]
            np.savez(folder / "probabilities" / f"{case.id}.npz", probabilities=hot, classes=names)
        evaluate(folder, dataset.root, folder, lesions=True, cldice=True)
    compare(*folders, folders[0] / "with b")
    text, page = read(report(folders[0]))
    for word in ("Lesion F1", "clDice", "Average precision", "Probabilities", "likeliest class", "B against A"):
        assert (word in page.text) == (word != "B against A"), word
    assert 'href="with%20b/compare.html"' in text
    assert "Comparisons" in page.text
    assert not re.search(r"\bnan\b", page.text)
    _, comparison = read(folders[0] / "with b" / "compare.html")
    assert "B against A" in comparison.text
    assert all(v.startswith("#") for v in comparison.fetched), comparison.fetched


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        report(tmp_path / "nowhere")
    folds = tmp_path / "cv"
    shutil.copytree(run / "unseen_site", folds / "cross_validation" / "last")
    with pytest.raises(UserError, match=f"medseg report {folds / 'cross_validation' / 'last'}"):
        report(folds)
    (run / "validation" / "best" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report(run)
    (run / "validation" / "best" / "summary.json").write_text("{}")
    (run / "validation" / "best" / "cases.csv").unlink()
    with pytest.raises(UserError, match=r"cases\.csv"):
        report(run)


def test_command_line(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(run), "-o", str(tmp_path / "a.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "a.html")}
    assert (tmp_path / "a.html").is_file()
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["report"]) == 2
