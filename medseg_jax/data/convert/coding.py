"""Decides classes and their values, and turns the masks of a case into one label map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.masks import (
    IGNORE,
    MIDDLE,
    Reading,
    Study,
    Survey,
    ask_levels,
    few_levels,
    is_binary,
    numbered_objects,
    read_mask,
    threshold_of,
    union,
)
from medseg_jax.data.convert.options import Ambiguous, Options, count, name_colour, parse_classes, parse_colour
from medseg_jax.data.convert.words import natural
from medseg_jax.types import Geometry, Labels, UserError

MOST_CLASSES = 64


@dataclass(frozen=True)
class Coding:
    """Classes of the data set and how each source mask tells them.

    Attributes:
        readings: by (domain, tag); class numbers count from 1.
        raw: True if masks are label maps of `labels` already.
    """

    labels: Labels
    readings: dict[tuple[str, str], Reading]
    notes: tuple[tuple[str, str], ...]
    raw: bool = False

    def encode(self, case: Found, layout: Layout, options: Options) -> tuple[np.ndarray, Geometry]:
        """All masks of a case -> one label map [*s].

        Raises:
            UserError: the masks of the case differ in size.
        """
        key = layout.keys[1] if layout.keys else None
        label, geometry = None, None
        for mask in sorted(case.masks, key=lambda m: self._number(case, m.tag)):
            if (case.domain, mask.tag) not in self.readings and not self.raw:
                continue
            values, geometry = read_mask(mask.path, key, options)
            numbers = values if self.raw else self.readings[case.domain, mask.tag].apply(values, mask.path)
            if label is None:
                label = np.zeros(numbers.shape, np.uint16)
            if label.shape != numbers.shape:
                raise UserError(
                    "The masks of an image differ in size", file=mask.path, found=numbers.shape, expected=label.shape
                )
            self._draw(label, numbers)
        if label is None or geometry is None:
            raise UserError("No mask of this image is used", file=case.file, remedy="--empty if it shows no class")
        return label, geometry

    def _number(self, case: Found, tag: str) -> int:
        """Later classes are drawn over earlier ones."""
        reading = self.readings.get((case.domain, tag))
        return reading.number if reading else 0

    def _draw(self, label: np.ndarray, numbers: np.ndarray) -> None:
        ignored = numbers == IGNORE
        if self.raw:
            label[...] = numbers
        elif self.labels.exclusive:
            drawn = (numbers > 0) & ~ignored
            label[drawn] = numbers[drawn]
        else:
            for number in range(1, len(self.labels.names) + 1):
                label[numbers == number] |= np.uint16(1 << (number - 1))
        if not self.raw and self.labels.ignore is not None:
            label[ignored] = self.labels.ignore


def decide(study: Study, cases: Sequence[Found], layout: Layout, options: Options) -> Coding:
    """Chooses the classes from what the masks hold and what the user says.

    Raises:
        Ambiguous: several readings are possible; the message lists the options for each.
        UserError: options and masks contradict each other.
    """
    if layout.labels is not None:
        if options.classes or options.threshold is not None or options.invert:
            raise UserError("The classes of an nnU-Net folder are taken as they are", found=options.classes)
        return Coding(layout.labels, {}, (("classes", describe(layout.labels)),), raw=True)
    classes = parse_classes(options.classes)
    merged = classes[0][0] if len(classes) == 1 and not classes[0][1] else None
    there = presence(cases)
    tags = {tag for found in there.values() for tag in found}
    if len(tags) > 1 and (merged is None or merged in tags):
        coding = _one_file_per_class(study, there, options, classes)
    elif merged or options.instances or options.threshold is not None or options.invert:
        if len(classes) > 1:
            raise UserError(
                "--instances, --threshold and --invert make one class", found=f"--classes {options.classes}"
            )
        coding = _everything_is(merged or "foreground", study, options, layout)
    else:
        coding = _one_file(study, options, classes, layout)
    return _mind_ignore(coding, options)


def describe(labels: Labels) -> str:
    """ "1 RV, 2 Myo" or "bit 0 heart, bit 1 lung (overlapping)"."""
    if labels.exclusive:
        text = ", ".join(f"{values[0]} {name}" for name, values in zip(labels.names, labels.values, strict=True))
    else:
        overlapping = labels.values == Labels.overlapping(*labels.names).values
        text = (
            ", ".join(f"bit {i} {name}" for i, name in enumerate(labels.names)) + " (may overlap)"
            if overlapping
            else ", ".join(f"{list(vs)} {name}" for name, vs in zip(labels.names, labels.values, strict=True))
        )
    return text + (f", {labels.ignore} ignored" if labels.ignore is not None else "")


def _mind_ignore(coding: Coding, options: Options) -> Coding:
    """The ignore label must be the highest value (nnU-Net)."""
    if coding.raw or (options.ignore is None and options.roi is None):
        return replace(coding, notes=(*coding.notes, ("classes", describe(coding.labels))))
    labels = coding.labels
    if not labels.exclusive and len(labels.names) > 15:
        raise UserError(
            "Too many overlapping classes for an ignore label", found=len(labels.names), expected="at most 15"
        )
    labels = replace(labels, ignore=max(labels.known) + 1)
    return replace(coding, labels=labels, notes=(*coding.notes, ("classes", describe(labels))))


# -------------------------------------------------------------------------------------------------- one file per class


def presence(cases: Sequence[Found]) -> dict[str, dict[str, Path]]:
    """Domain -> tags of its masks, each with its first file."""
    there: dict[str, dict[str, Path]] = {}
    for case in cases:
        for mask in case.masks:
            there.setdefault(case.domain, {}).setdefault(mask.tag, mask.path)
    return there


def _one_file_per_class(
    study: Study,
    there: dict[str, dict[str, Path]],
    options: Options,
    classes: list[tuple[str, tuple[str, ...]]],
) -> Coding:
    tags = sorted({tag for found in there.values() for tag in found}, key=natural)
    chosen = _tags_of_classes(tags, classes)
    _mind_missing_folders(there, [tag for _, keys in chosen for tag in keys])
    class_of = {tag: name for name, keys in chosen for tag in keys}
    shared = {
        (one, other): voxels
        for (one, other), voxels in study.overlap.items()
        if voxels and one in class_of and other in class_of and class_of[one] != class_of[other]
    }
    overlapping = options.multilabel or (bool(shared) and not options.exclusive)
    names = [name for name, _ in chosen]
    labels = _labels(names, replace(options, multilabel=overlapping))
    readings, notes = {}, []
    for number, (name, keys) in enumerate(chosen, start=1):
        for domain, tag in (key for key in study.surveys if key[1] in keys):
            above, how = threshold_of(_without_ignored(study.surveys[domain, tag], options.ignore), options)
            readings[domain, tag] = Reading(above, options.invert, number, ignored=options.ignore)
            notes.append((f"{domain} {name}".strip(), how))
    how = "one file per class"
    if shared:
        (one, other), most = max(shared.items(), key=lambda item: item[1])
        verb = "kept, as bit masks" if overlapping else "the later class wins"
        how += f"; {count(len(shared), 'pair')} of classes overlap, most {one} and {other} ({most} pixels): {verb}"
    return Coding(labels, readings, (("encoding", how), *_join(notes)))


def _tags_of_classes(tags: list[str], classes: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(class, its folders or name endings): all of them by default."""
    if not classes:
        return [(tag or "other", (tag,)) for tag in tags]
    chosen = [(name, keys or (name,)) for name, keys in classes]
    if unknown := [key for _, keys in chosen for key in keys if key not in tags]:
        raise UserError(
            "--classes names something that no mask folder or file name says",
            found=", ".join(unknown),
            expected=", ".join(tags),
            remedy=f"--classes {','.join(f'name={tag}' for tag in tags)} renames them",
        )
    return chosen


def _mind_missing_folders(there: dict[str, dict[str, Path]], tags: list[str]) -> None:
    """A class of which one domain has no file at all was never outlined there, which is not the same as absent."""
    for domain, found in there.items():
        missing = [tag for tag in tags if tag not in found]
        if not missing:
            continue
        shared = [tag for tag in tags if all(tag in others for others in there.values())]
        complete = [name for name, others in there.items() if all(tag in others for tag in tags)]
        choices: list[tuple[str, dict[str, object]]] = []
        if shared:
            choices.append(("classes that every domain has", {"classes": ",".join(shared)}))
        if complete:
            choices.append((f"{complete[0]} alone, with all classes", {"domains": complete[0]}))
        raise Ambiguous(
            f"Nobody outlined {', '.join(missing)} in the domain {domain}",
            choices or [("fewer classes", {"classes": "..."})],
            file=next(iter(found.values())).parent,
            found=f"{domain}: {', '.join(sorted(found))}",
            expected=f"{', '.join(tags)} in every domain",
        )


def _join(notes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Notes that say the same become one."""
    by_text: dict[str, list[str]] = {}
    for what, text in notes:
        by_text.setdefault(text, []).append(what)
    return [("values", f"{', '.join(whats)}: {text}".lstrip(": ")) for text, whats in by_text.items()]


# ------------------------------------------------------------------------------------------- one file for all classes


def _everything_is(name: str, study: Study, options: Options, layout: Layout) -> Coding:
    """All that is not background is one class."""
    readings, notes = {}, []
    for (domain, tag), survey in study.surveys.items():
        above, how = _foreground_of(survey, options)
        readings[domain, tag] = Reading(above, options.invert, ignored=options.ignore)
        notes.append((domain, how + (_mostly(survey, above) if not options.invert else ", inverted")))
    how = "one file per object, joined" if layout.instances else "all that is drawn is one class"
    return Coding(Labels.simple(name), readings, (("encoding", how), *_join(notes)))


def _foreground_of(survey: Survey, options: Options) -> tuple[float, str]:
    survey = _without_ignored(survey, options.ignore)
    if options.threshold is None and not is_binary(survey):
        if few_levels(survey) and not options.instances:
            ask_levels(survey)
        return 0, f"{len(survey.foreground)} values above 0 joined"
    above, how = threshold_of(survey, options)
    return above, how + (f"; {len(set(survey.colours) - {(0, 0, 0)})} colours joined" if survey.coloured else "")


def _mostly(survey: Survey, above: float) -> str:
    total = sum(survey.voxels.values())
    drawn = sum(count for value, count in survey.voxels.items() if value > above) / total
    return f"; {drawn:.0%} of all pixels: --invert if the dark part is meant" if drawn > 0.6 else ""


def _one_file(study: Study, options: Options, classes: list[tuple[str, tuple[str, ...]]], layout: Layout) -> Coding:
    surveys = study.surveys
    coloured = [key for key, survey in surveys.items() if survey.coloured]
    if coloured:
        return _colours(study, options, classes)
    kept = {key: _without_ignored(survey, options.ignore) for key, survey in surveys.items()}
    binary = [key for key, survey in kept.items() if is_binary(survey)]
    if len(binary) == len(surveys) and len(classes) < 2 and not (layout.names and len(layout.names) > 1):
        name = classes[0][0] if classes else next(iter((layout.names or {1: "foreground"}).values()))
        return _everything_is(name, study, options, layout)
    if (
        binary
        and len(binary) < len(surveys)
        and any(max(kept[key].foreground, default=0) > MOST_CLASSES for key in binary)
    ):
        raise Ambiguous(
            "Masks of some domains are black and white, those of others hold several values",
            [("all that is drawn is one class", {"classes": "..."})],
            found="; ".join(f"{domain or 'masks'}: {s.foreground[:8]}" for (domain, _), s in kept.items()),
        )
    return _values(union(list(kept.values())), surveys, options, classes, layout)


def _labels(names: list[str], options: Options) -> Labels:
    return Labels.overlapping(*names) if options.multilabel else Labels.simple(*names)


def _without_ignored(survey: Survey, ignore: int | None) -> Survey:
    return replace(survey, voxels=type(survey.voxels)({v: n for v, n in survey.voxels.items() if v != ignore}))


def _values(
    total: Survey,
    surveys: dict[tuple[str, str], Survey],
    options: Options,
    classes: list[tuple[str, tuple[str, ...]]],
    layout: Layout,
) -> Coding:
    values = total.foreground
    given = _values_of_classes(classes, values, layout)
    if not given:
        _refuse_unlikely_classes(total, values)
        given = [(f"class_{value}", (value,)) for value in values]
    background = next((vs for name, vs in given if name == "background"), (0,))
    given = [(name, vs) for name, vs in given if name != "background"]
    number = dict.fromkeys(background, 0) | {value: i for i, (_, vs) in enumerate(given, start=1) for value in vs}
    if unknown := [value for value in values if value not in number]:
        raise UserError(
            "The masks hold values that no class stands for",
            file=total.first[unknown[0]],
            found=", ".join(f"{value} ({total.voxels[value]} voxels)" for value in unknown[:10]),
            expected=", ".join(f"{name}={'+'.join(map(str, vs))}" for name, vs in given),
            remedy=f"--ignore {unknown[0]}, or name it in --classes (values of one class are joined by +)",
        )
    reading = Reading(table=tuple(number.items()), ignored=options.ignore)
    labels = _labels([name for name, _ in given], options)
    notes = [("encoding", f"one value per class: {', '.join(map(str, values))}")]
    if not classes and not layout.names:
        notes.append(("names", "not known; --classes " + ",".join(f"NAME={value}" for value in values)))
    return Coding(labels, dict.fromkeys(surveys, reading), tuple(notes))


def _values_of_classes(
    classes: list[tuple[str, tuple[str, ...]]], values: list[int], layout: Layout
) -> list[tuple[str, tuple[int, ...]]]:
    if not classes:
        return [(name, (value,)) for value, name in sorted((layout.names or {}).items())]
    if not classes[0][1]:
        if len(classes) < len(values):
            raise UserError(
                "--classes names fewer classes than the masks hold",
                found=f"{len(classes)} names, values {', '.join(map(str, values))}",
                remedy="--classes " + ",".join(f"NAME={value}" for value in values),
            )
        # Values that happen to be absent here still count: 1, 2, 3 stand for the first, second, third name.
        small = not values or values[-1] <= len(classes)
        if not small and len(classes) > len(values):
            raise UserError(
                "--classes names more classes than the masks hold",
                found=f"{len(classes)} names, values {', '.join(map(str, values))}",
                remedy="--classes " + ",".join(f"{name}=VALUE" for name, _ in classes),
            )
        numbers = range(1, len(classes) + 1) if small else values
        return [(name, (value,)) for (name, _), value in zip(classes, numbers, strict=True)]
    try:
        return [(name, tuple(int(key) for key in keys)) for name, keys in classes]
    except ValueError as error:
        text = ", ".join(f"{name}={'+'.join(keys)}" for name, keys in classes)
        raise UserError("--classes must give whole numbers here", found=text, expected="rv=1,myo=2") from error


def _refuse_unlikely_classes(total: Survey, values: list[int]) -> None:
    joined = [
        ("they number objects of one class", {"instances": True}),
        ("they are classes", {"classes": ",".join(f"NAME={value}" for value in values[:4]) + "..."}),
    ]
    if len(values) > MOST_CLASSES or numbered_objects(total):
        raise Ambiguous(
            "The values of these masks look like numbers of objects rather than classes",
            joined,
            file=total.first[values[-1]],
            found=f"values 1 to {values[-1]}, largest value per file {sorted(total.largest.values())[:8]}",
        )
    if values[-1] > MIDDLE and len(values) > 1:
        ask_levels(total)


def _colours(study: Study, options: Options, classes: list[tuple[str, tuple[str, ...]]]) -> Coding:
    total = union(list(study.surveys.values()))
    everything = sum(total.colours.values())
    black = (0, 0, 0)
    shown = [c for c, n in total.colours.most_common(MOST_CLASSES) if c != black and n > 0.0005 * everything]
    found = ", ".join(f"{name_colour(c)} {total.colours[c] / everything:.1%}" for c in shown[:8])
    plain = [domain for (domain, _), survey in study.surveys.items() if not survey.coloured]
    if not classes:
        choices: list[tuple[str, dict[str, object]]] = [("all that is drawn is one class", {"classes": "NAME"})]
        if not plain:
            named = ",".join(f"NAME={name_colour(c)}" for c in shown[:8])
            choices.insert(0, ("a class for each colour", {"classes": named}))
        else:
            coloured = [domain for (domain, _), survey in study.surveys.items() if survey.coloured]
            choices.append(("the coloured ones alone", {"domains": ",".join(coloured)}))
        raise Ambiguous(
            "The masks are coloured: what do the colours stand for?"
            if not plain
            else f"Some masks are coloured, those of {', '.join(plain)} are black and white",
            choices,
            file=total.coloured,
            found=found,
        )
    if plain:
        raise UserError(
            "Colours cannot tell the classes where masks are black and white",
            file=total.coloured,
            found=f"coloured masks beside black and white ones in {', '.join(plain)}",
            remedy="--classes NAME joins all colours; --domains chooses the coloured ones",
        )
    dark = [key for name, keys in classes if name == "background" for key in keys] or ["#000000"]
    palette = [(parse_colour(key), 0) for key in dark]
    for number, (_, keys) in enumerate((c for c in classes if c[0] != "background"), start=1):
        palette += [(parse_colour(key), number) for key in keys]
    named = np.array([colour for colour, _ in palette], int)
    far = [c for c in shown if np.abs(named - np.array(c)).sum(-1).min() > 96]
    if far:
        raise UserError(
            "The masks hold colours that no class stands for",
            file=total.coloured,
            found=", ".join(name_colour(c) for c in far[:8]),
            expected=found,
            remedy="name them in --classes; colours of one class are joined by +",
        )
    labels = _labels([name for name, _ in classes if name != "background"], options)
    reading = Reading(palette=tuple(palette))
    notes = (("encoding", f"one colour per class: {found}; what lies between takes the nearest"),)
    return Coding(labels, dict.fromkeys(study.surveys, reading), notes)
