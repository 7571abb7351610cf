"""What the names of folders and files say: image, mask, field of view; train, val, test; which image a mask is of."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

IMAGE, MASK, ROI = "image", "mask", "roi"

ROLES = (
    (ROI, {"fov", "fovs", "roi", "rois"}),
    (
        MASK,
        {"mask", "masks", "label", "labels", "labelstr", "labelsts", "labelsval", "annotation", "annotations", "annot"}
        | {
            "gt",
            "gts",
            "groundtruth",
            "groundtruths",
            "truth",
            "ground",
            "seg",
            "segs",
            "segmentation",
            "segmentations",
        }
        | {
            "segmentationclass",
            "segmentationobject",
            "target",
            "targets",
            "manual",
            "manuals",
            "manual1",
            "manual2",
            "contour",
            "contours",
            "1stho",
            "2ndho",
        },
    ),
    (
        IMAGE,
        {"image", "images", "img", "imgs", "imagestr", "imagests", "imagesval", "jpegimages", "original", "originals"}
        | {"input", "inputs", "photo", "photos", "picture", "pictures", "scan", "scans"},
    ),
)
RATERS = {
    "1stho",
    "2ndho",
    "1st",
    "2nd",
    "manual1",
    "manual2",
    "vk",
    "ah",
    "observer1",
    "observer2",
    "rater1",
    "rater2",
}
SPLITS = {
    **dict.fromkeys(("train", "training", "trainset", "tr", "imagestr", "labelstr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "imagesval", "labelsval"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "ts", "imagests", "labelsts"), "test"),
}
FILLER = {"set", "sets", "folder", "dir", "data", "dataset", "all", "files", "stage1", "png", "jpg", "tif", "nii"}


@dataclass(frozen=True)
class Words:
    """What a name says. `rest` are the words that say none of it."""

    role: str | None
    split: str | None
    rest: tuple[str, ...]


SPOKEN = {word for _, known in ROLES for word in known} | set(SPLITS)


@cache
def read_name(name: str) -> Words:
    """ "Train_Folder" -> split train; "masks_od" -> role mask, rest ("od",); "STS_002" -> rest ("STS", "002")."""
    words = [part for word in re.split(r"[^A-Za-z0-9]+", name) for part in _split_word(word)]
    lower = [word.lower() for word in words]
    role = next((role for role, known in ROLES if known & set(lower)), None)
    split = next((SPLITS[word] for word in lower if word in SPLITS), None)
    return Words(role, split, tuple(word for word in words if word.lower() not in SPOKEN))


def _split_word(word: str) -> list[str]:
    """GroundTruth is one word, TrainImages are two, img001 is img and 001; a hash stays whole."""
    if word.lower() in SPOKEN or not word:
        return [word] if word else []
    if (numbered := re.fullmatch(r"([A-Za-z]+)(\d+)", word)) and numbered[1].lower() in SPOKEN:
        return list(numbered.groups())
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", word) if word.isalpha() else [word]


def remainder(words: Words) -> str:
    """What a folder's name says beside its role and split: "od" of masks_od, "" of "a. Training Set"."""
    return "_".join(word for word in words.rest if word.lower() not in FILLER and not re.fullmatch(r"\w|\d+", word))


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def plain(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.") or "case"


# ------------------------------------------------------------------------------------- which image a mask belongs to


@dataclass(frozen=True)
class Matching:
    """Mask index -> (image index, what the mask's name says beyond the image's)."""

    rule: str
    found: dict[int, tuple[int, str]]


def match(images: Sequence[str], masks: Sequence[str], tags: Sequence[str]) -> Matching:
    """Finds the image of every mask by their stems.

    Args:
        images: stems, all different.
        masks: stems.
        tags: class of each mask as its folder says; one image has at most one mask of a tag and name ending.

    Returns:
        the rule that matches most masks; earlier (stricter) rules win ties.
    """
    rules: list[tuple[str, Callable[[], dict[int, tuple[int, str]]]]] = [
        ("same name", lambda: _by_key(images, masks, str)),
        ("same name, upper or lower case", lambda: _by_key(images, masks, str.lower)),
        ("same name but for words like mask", lambda: _by_key(images, masks, _bare)),
        ("mask's name begins with the image's", lambda: _by_prefix(images, masks)),
        ("same last number", lambda: _by_key(images, masks, _last_number)),
    ]
    results = []
    for rule, find in rules:
        found = find()
        claims = Counter((image, tags[mask], ending) for mask, (image, ending) in found.items())
        unique = {m: (i, e) for m, (i, e) in found.items() if claims[i, tags[m], e] == 1}
        results.append(Matching(rule, unique))
    return max(results, key=lambda result: len(result.found))


def _by_key(images: Sequence[str], masks: Sequence[str], key: Callable[[str], str]) -> dict[int, tuple[int, str]]:
    keys = [key(stem) for stem in images]
    counts = Counter(keys)
    index = {k: i for i, k in enumerate(keys) if k and counts[k] == 1}
    return {m: (index[key(stem)], "") for m, stem in enumerate(masks) if key(stem) in index}


def _bare(stem: str) -> str:
    """ "21_manual1" -> "21", "ISIC_01_segmentation" -> "ISIC_01", "img_7" -> "7"."""
    words = read_name(stem).rest
    kept = [word for word in words if word.lower() not in RATERS]
    return "_".join(kept)


def _by_prefix(images: Sequence[str], masks: Sequence[str]) -> dict[int, tuple[int, str]]:
    """IDRiD_01_EX is of IDRiD_01, im0001.vk of im0001; the longest image name wins."""
    index = {stem: i for i, stem in enumerate(images)}
    found = {}
    for m, stem in enumerate(masks):
        for end in range(len(stem), 0, -1):
            boundary = end == len(stem) or not stem[end].isalnum()
            if boundary and stem[:end] in index:
                found[m] = (index[stem[:end]], stem[end:].strip("_-. "))
                break
    return found


def _last_number(stem: str) -> str:
    numbers = re.findall(r"\d+", stem)
    return str(int(numbers[-1])) if numbers else ""
