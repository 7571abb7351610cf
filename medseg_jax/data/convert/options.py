"""What a user may say to `convert`, and how an open question is put to him."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from medseg_jax.types import UserError

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "maroon": (128, 0, 0),
    "darkgreen": (0, 128, 0),
    "navy": (0, 0, 128),
    "olive": (128, 128, 0),
    "purple": (128, 0, 128),
    "teal": (0, 128, 128),
}


CONTRADICTIONS = (
    ("multilabel", "exclusive"),
    ("empty", "unlabelled"),
    ("instances", "threshold"),
    ("resize_labels", "same_grid"),
)


@dataclass(frozen=True)
class Options:
    """Every option has a default that is decided from the files; say it only where the decision is not the right one.

    Attributes:
        name: name of the data set; the source folder's by default.
        layout: how the source is laid out; recognised by default.
        images: where the images are: a sub-folder, a pattern such as "*_image.png", or the key inside h5/npz files.
        masks: where the masks are, likewise; several separated by commas.
        classes: names of the classes: "lesion" (all foreground is one class), "disc,cup" (in order), or with what each
            stands for in the source: "rv=1,myo=2" (values), "polyp=red,other=#00ff00" (colours), "disc=od" (folders or
            name endings); "a=1+2" joins two. "background=255" if it is not 0 or black.
        threshold: a mask's foreground is what lies above this value; 127 for 0..255 by default.
        invert: foreground is what lies at or below the threshold.
        multilabel: store the classes so that they may overlap, even where these files do not.
        exclusive: never let classes overlap: where they do, the later one wins.
        instances: every value above 0 is one object; join them to one class.
        empty: an image without any mask file shows none of the classes.
        unlabelled: an image without any mask file is an unlabelled case.
        domain_from: regular expression on the path of an image; its group (or the whole match) is the domain.
        domains: only these, separated by commas.
        patient_from: regular expression on the path of an image; its group (or the whole match) is the patient.
        split: "every-5" (patients sorted, first of each five validates), "last-4" (the last four patients
            validate), "folders", or files: "train=a.list,val=b.list,test=c.list".
        test_domain: cases of this domain are the test set.
        channels: names of the input channels, separated by commas.
        ignore: value of the source's masks that takes no part in training and scores.
        spacing: millimetres between voxels along each array axis, for arrays that do not say; "2.5,0.7,0.7".
        axes: order of the axes of h5/npz/npy volumes; the shortest is the slice axis by default.
        reference: channel whose grid is kept where the channels of a case lie on different grids.
        resize_labels: bring masks that lie on another grid onto the image by nearest neighbour.
        same_grid: where mask and image have the same shape, their voxels belong together whatever the headers say.
        roi: folder with fields of view; what lies outside is given the ignore label.
        limit: at most so many cases of each domain and split.
        overwrite: replace an existing target.
        quiet: print nothing.
    """

    name: str | None = None
    layout: Literal["auto", "nnunet", "msd", "arrays", "cases", "pairs"] = "auto"
    images: str | None = None
    masks: str | None = None
    classes: str | None = None
    threshold: float | None = None
    invert: bool = False
    multilabel: bool = False
    exclusive: bool = False
    instances: bool = False
    empty: bool = False
    unlabelled: bool = False
    domain_from: str | None = None
    domains: str | None = None
    patient_from: str | None = None
    split: str | None = None
    test_domain: str | None = None
    channels: str | None = None
    ignore: int | None = None
    spacing: str | None = None
    axes: Literal["auto", "zyx", "xyz"] = "auto"
    reference: str | None = None
    resize_labels: bool = False
    same_grid: bool = False
    roi: str | None = None
    limit: int | None = None
    overwrite: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, **given: object) -> "Options":
        """Checks names and what no single option can check.

        Raises:
            UserError: an unknown option, or options that contradict each other.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise UserError("Unknown option", found=name, expected=f"did you mean {close[0]}?" if close else known)
        options = cls(**given)  # pyright: ignore[reportArgumentType]
        for one, other in CONTRADICTIONS:
            if getattr(options, one) and getattr(options, other):
                flags = f"{flag(one)} and {flag(other)}"
                raise UserError("Two options contradict each other", found=flags, expected="one of them")
        if options.limit is not None and options.limit < 1:
            raise UserError("--limit must be at least 1", found=options.limit)
        for name in ("domain_from", "patient_from"):
            check_regex(name, getattr(options, name))
        return options


class Ambiguous(UserError):
    """A question only the user can answer: one line per answer, each with the options that give it.

    Attributes:
        choices: (what it means, options) for each possible answer; options that hold "..." need the user's own words.
    """

    def __init__(self, problem: str, choices: Sequence[tuple[str, Mapping[str, object]]], **known):
        self.choices = tuple(choices)
        lines = [f"{as_flags(options)}   ({meaning})" for meaning, options in choices]
        super().__init__(problem, remedy="add one of\n       " + "\n       ".join(lines), **known)


def count(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_flags(options: Mapping[str, object]) -> str:
    words = []
    for name, value in options.items():
        text = str(value)
        quoted = f'"{text}"' if re.search(r"[\s*?#]", text) else text
        words.append(flag(name) if value is True else f"{flag(name)} {quoted}")
    return " ".join(words)


def check_regex(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"{flag(name)} is no regular expression", found=pattern, expected=str(error)) from error


def parse_classes(text: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """ "a=1,b=2+3,c" -> [("a", ("1",)), ("b", ("2", "3")), ("c", ())]."""
    classes = []
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, keys = part.partition("=")
        classes.append((name.strip(), tuple(key.strip() for key in keys.split("+")) if keys else ()))
    names = [name for name, _ in classes]
    unnamed = "background" in dict(classes) and not dict(classes)["background"]
    if len(set(names)) < len(names) or unnamed or {"ignore", ""} & set(names):
        raise UserError(
            "--classes needs different names, none of them empty or 'ignore', and 'background' only with a value",
            found=text,
            expected="lesion  or  disc,cup  or  rv=1,myo=2",
            remedy="join values or colours by +: polyp=red+green" if len(set(names)) < len(names) else None,
        )
    if len({bool(keys) for _, keys in classes}) > 1:
        raise UserError("--classes must say for all classes or for none what they stand for", found=text)
    return classes


def parse_numbers(name: str, text: str | None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"{flag(name)} must be numbers", found=text, expected="2.5,0.7,0.7") from error
    if any(not number > 0 for number in numbers):
        raise UserError(f"{flag(name)} must be positive", found=text)
    return numbers


def parse_colour(text: str) -> tuple[int, int, int]:
    if text.lower() in COLOURS:
        return COLOURS[text.lower()]
    if match := re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text):
        red, green, blue = (int(part, 16) for part in match.groups())
        return red, green, blue
    raise UserError("--classes names an unknown colour", found=text, expected=", ".join(COLOURS) + " or #rrggbb")


def name_colour(colour: tuple[int, int, int]) -> str:
    """ "red" for a colour close to pure red, else "#rrggbb"."""
    for name, known in COLOURS.items():
        if max(abs(a - b) for a, b in zip(colour, known, strict=True)) <= 16:
            return name
    return "#{:02x}{:02x}{:02x}".format(*colour)
