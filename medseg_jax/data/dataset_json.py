"""Reading dataset.json: strict, with an error that says what to write instead. What its keys mean: `data.dataset`."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medseg_jax.data import io
from medseg_jax.types import Labels, UserError

VERSION = 1
SPLITS = ("train", "val", "test")
KEYS = ("name", "channel_names", "labels", "regions_class_order", "numTraining", "file_ending", "dataset", "medseg")


@dataclass(frozen=True)
class Description:
    """What dataset.json says.

    Attributes:
        channels: name of each input channel.
        labels: the classes.
        file_ending: of images and labels alike.
        unit: "mm" or "px".
        notes: by case id, what is known of "patient", "domain" and "split".
        content: the file as it is.
    """

    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    unit: str
    notes: dict[str, dict[str, str]]
    content: dict[str, Any]


def parse_description(file: Path) -> Description:
    """Reads and checks a dataset.json.

    Raises:
        UserError: it is missing, malformed or of the old MSD form.
    """
    content = _read_json(file)
    _refuse_msd(content, file)
    ending = _parse_ending(required(content, "file_ending", str, file), file)
    ours = _parse_medseg(content.get("medseg", {}), ending, file)
    labels = parse_labels(content, ours["overlapping"], file)
    labels = replace(labels, scores=_parse_scores(ours["scores"], labels, file))
    channels = _parse_channels(required(content, "channel_names", dict, file), file)
    return Description(channels, labels, ending, ours["unit"], ours["cases"], content)


def _read_json(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1):
            raise UserError("dataset.json says the same thing twice", file=file, found=", ".join(twice))
        return dict(pairs)

    if not file.parent.is_dir():
        raise UserError(
            "There is no such data set",
            file=file.parent.absolute(),
            found="no such folder",
            expected="a folder with dataset.json",
            remedy=f"check the path (of a config: --data FOLDER), or medseg data convert SRC {file.parent}",
        )
    if not file.is_file():
        raise UserError(
            "This is no data set: it has no dataset.json",
            file=file.parent,
            found=sorted(p.name for p in file.parent.iterdir())[:10],
            remedy=f"medseg data convert {file.parent} NEW_FOLDER",
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError("dataset.json is not valid JSON", file=file, found=error) from error
    if not isinstance(content, dict):
        raise UserError("dataset.json must be an object", file=file, found=type(content).__name__, expected="{...}")
    return content


def _refuse_msd(content: dict[str, Any], file: Path) -> None:
    labels = content.get("labels")
    numbered = isinstance(labels, dict) and bool(labels) and all(key.isdigit() for key in labels)
    if numbered or ("channel_names" not in content and ("modality" in content or "training" in content)):
        raise UserError(
            "dataset.json has the old form of the Medical Segmentation Decathlon (nnU-Net v1)",
            file=file,
            found=", ".join(key for key in ("modality", "labels", "training") if key in content),
            expected='"channel_names", "labels" as {name: value}, "file_ending"',
            remedy=f"medseg data convert {file.parent} NEW_FOLDER",
        )


def required(content: dict[str, Any], key: str, kind: type, file: Path) -> Any:
    if key not in content:
        close = get_close_matches(key, set(content) - set(KEYS), 1)
        raise UserError(
            f"dataset.json lacks the key {key!r}",
            file=file,
            found=", ".join(content) or "an empty object",
            expected=key,
            remedy=f"rename {close[0]!r} to {key!r}" if close else None,
        )
    if not isinstance(content[key], kind):
        kinds = {dict: "an object", str: "a text", list: "a list"}
        found = json.dumps(content[key])[:80]
        raise UserError(f"{key!r} in dataset.json must be {kinds[kind]}", file=file, found=found)
    return content[key]


def _parse_ending(ending: str, file: Path) -> str:
    endings = sorted(suffix for suffix in io.SUFFIXES if suffix not in (".jpg", ".jpeg", *io.DETACHED))
    if ending not in endings:
        lossy = ending.lower() in (".jpg", ".jpeg")
        raise UserError(
            "JPEG cannot hold labels: it changes values" if lossy else "Unknown file ending in dataset.json",
            file=file,
            found=ending,
            expected=did_you_mean(ending, endings) or ", ".join(endings),
            remedy=f"medseg data convert {file.parent} NEW_FOLDER" if lossy else None,
        )
    return ending


def _parse_channels(names: dict[str, Any], file: Path) -> tuple[str, ...]:
    expected = [str(i) for i in range(len(names))]
    if sorted(names) != sorted(expected) or not names or not all(isinstance(v, str) for v in names.values()):
        raise UserError(
            "channel_names in dataset.json must number the channels from 0",
            file=file,
            found=json.dumps(names),
            expected='{"0": "CT", "1": "PET"}',
        )
    return tuple(names[i] for i in expected)


def parse_labels(content: dict[str, Any], overlapping: bool, file: Path) -> Labels:
    given = dict(required(content, "labels", dict, file))
    values = {name: _parse_values(name, value, file) for name, value in given.items()}
    if values.pop("background", None) != (0,):
        expected = did_you_mean("background", set(given) - {"background"}) or '"background": 0'
        found = f'"background": {given["background"]}' if "background" in given else f"labels {', '.join(given)}"
        raise UserError("The background must have the value 0", file=file, found=found, expected=expected)
    ignore = values.pop("ignore", None)
    if not values:
        raise UserError("dataset.json names no class beside the background", file=file, found=json.dumps(given))
    regions = overlapping or any(len(v) > 1 for v in values.values())
    _check_values(values, ignore, regions, file)
    names, kept = tuple(values), tuple(values.values())
    if overlapping:
        labels = replace(Labels.overlapping(*names), ignore=ignore[0] if ignore else None)
        if kept != labels.values:
            raise UserError(
                'With "overlapping" class i covers all values with bit i set, and these do not',
                file=file,
                found=json.dumps(given)[:200],
                expected=dict(zip(names, labels.values, strict=True)) if len(names) < 5 else "bit masks",
                remedy='set "overlapping" to false if these are nnU-Net regions',
            )
        return labels
    order = _parse_order(content, kept, file) if regions else None
    return Labels(names, kept, ignore[0] if ignore else None, exclusive=not regions, order=order).storable(file)


def _parse_values(name: str, value: Any, file: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    whole = all(type(v) is int and 0 <= v < 2**16 for v in values)
    if not whole or not values or len(set(values)) < len(values) or not name.strip():
        raise UserError(
            "A label in dataset.json has no usable value",
            file=file,
            found=json.dumps({name: value}),
            expected="a name, and a whole number of 0 to 65535 or a list of different ones (a region)",
        )
    return tuple(sorted(values))


def _check_values(values: dict[str, tuple[int, ...]], ignore: tuple[int, ...] | None, regions: bool, file: Path):
    """Foreground values are those nnU-Net accepts: 1, 2, ... without a gap, then the ignore label."""
    used = sorted({v for vs in values.values() for v in vs})
    if 0 in used:
        names = [name for name, vs in values.items() if 0 in vs]
        raise UserError("Only the background may have the value 0", file=file, found=", ".join(names))
    if not regions and len(used) < len(values):
        twice = [name for name, vs in values.items() if list(values.values()).count(vs) > 1]
        raise UserError("Several classes share one value", file=file, found=", ".join(twice), expected="one value each")
    if gaps := sorted(set(range(1, used[-1])) - set(used)):
        raise UserError(
            "The label values in dataset.json are not consecutive",
            file=file,
            found=used[:20],
            expected=f"1, 2, 3, ...; nobody has {', '.join(map(str, gaps[:10]))}",
            remedy=f"medseg data convert {file.parent} NEW_FOLDER numbers the classes anew",
        )
    if ignore is not None and ignore != (used[-1] + 1,):
        raise UserError("The ignore label must be the highest", file=file, found=list(ignore), expected=used[-1] + 1)


def _parse_order(content: dict[str, Any], values: tuple[tuple[int, ...], ...], file: Path) -> tuple[int, ...]:
    order = required(content, "regions_class_order", list, file)
    if len(order) != len(values) or not all(type(v) is int and v in vs for v, vs in zip(order, values, strict=True)):
        raise UserError(
            "regions_class_order must give each region one of its own values, in the order of labels",
            file=file,
            found=order,
            expected=f"for instance {[vs[0] for vs in values]}",
        )
    return tuple(order)


def _parse_medseg(ours: Any, ending: str, file: Path) -> dict[str, Any]:
    defaults = {
        "version": VERSION,
        "unit": "mm" if io.SUFFIXES[ending] in io.PLACED else "px",
        "overlapping": False,
        "scores": {},
        "cases": {},
    }
    if not isinstance(ours, dict):
        raise UserError('"medseg" in dataset.json must be an object', file=file, found=json.dumps(ours)[:80])
    _refuse_unknown(ours, defaults, '"medseg"', file)
    ours = defaults | ours
    if ours["version"] != VERSION:
        raise UserError(
            "dataset.json was written by another version of medseg_jax",
            file=file,
            found=ours["version"],
            expected=VERSION,
            remedy="pip install --upgrade medseg-jax",
        )
    for key, choices in (("unit", ("mm", "px")), ("overlapping", (False, True))):
        if ours[key] not in choices or type(ours[key]) is not type(choices[0]):
            raise UserError(f'"{key}" in dataset.json is not understood', file=file, found=ours[key], expected=choices)
    if not isinstance(ours["cases"], dict):
        raise UserError('"cases" in dataset.json must be an object', file=file, found=type(ours["cases"]).__name__)
    for id, note in ours["cases"].items():
        check_id(id, file)
        if not isinstance(note, dict) or not all(isinstance(v, str) for v in note.values()):
            raise UserError(f"What is said of case {id!r} is not understood", file=file, found=json.dumps(note)[:80])
        _refuse_unknown(note, ("patient", "domain", "split"), f"case {id!r}", file)
        if note.get("split", "train") not in SPLITS:
            close = did_you_mean(note["split"], SPLITS) or ", ".join(SPLITS)
            raise UserError(f"Case {id!r} has no such split", file=file, found=note["split"], expected=close)
    return ours


def _parse_scores(given: Any, labels: Labels, file: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What is scored instead of the classes: {"disc": [1, 2], "cup": 2}."""
    if not isinstance(given, dict):
        raise UserError('"scores" in dataset.json must be an object', file=file, found=json.dumps(given)[:80])
    scores = tuple((name, _parse_values(name, value, file)) for name, value in given.items())
    values = labels.known - {0, labels.ignore}
    if odd := [name for name, vs in scores if not set(vs) <= values]:
        expected = f"values of classes: {', '.join(map(str, sorted(values)[:20]))}"
        raise UserError(
            f'"scores" in dataset.json gives {odd[0]} a value that no class has',
            file=file,
            found=json.dumps({odd[0]: given[odd[0]]}),
            expected=expected,
        )
    return scores


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str, file: Path) -> None:
    for key in given:
        if key not in known:
            expected = did_you_mean(key, known) or ", ".join(known)
            raise UserError(f"Unknown key in {where} of dataset.json", file=file, found=key, expected=expected)


def check_id(id: str, file: Path) -> None:
    """Ids become file names in caches, runs and predictions, so that they must be plain ones."""
    if not id or id.startswith(".") or re.search(r"[/\\:\0\n]", id):
        raise UserError("A case id must be a plain file name", file=file, found=repr(id), expected="no path")


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    close = get_close_matches(word, list(words), n=1)
    return f"did you mean {close[0]!r}?" if close else None
