"""Images and masks as picture or volume files in folders of their own, or side by side in one.

Every folder on a file's path says one of four things: role (images, masks, fov), split (train), class (a folder of its
own below the masks, or masks_<class>), or, if images have it too, domain. What all images have in common says nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

from medseg_jax.data import io
from medseg_jax.data.convert.found import Found, Layout, Mask
from medseg_jax.data.convert.options import Ambiguous, Options, count
from medseg_jax.data.convert.words import IMAGE, MASK, RATERS, ROI, match, natural, plain, read_name, remainder
from medseg_jax.types import UserError


@dataclass(frozen=True)
class Piece:
    """A file and what its path says; `tag`: the role folder beside its role (od of masks_od), `folders`: the others."""

    path: Path
    stem: str
    role: str | None
    split: str
    folders: tuple[str, ...]
    tag: str
    tree: str

    @property
    def place(self) -> tuple[str, ...]:
        return (*self.folders, self.tag) if self.tag else self.folders


def find_pairs(src: Path, files: Sequence[Path], options: Options) -> Layout:
    """Recognises images and masks among `files`.

    Raises:
        UserError: no images, no masks, masks without an image, or images without a mask.
        Ambiguous: several masks for one image and class.
    """
    levels = zip(*(path.relative_to(src).parts[:-1] for path in files), strict=False)
    above = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    for name in ("images", "masks", "roi"):
        given = getattr(options, name)
        if given is not None and all(matches(path.relative_to(src), given) is None for path in files):
            folders = sorted({path.parent.relative_to(src).as_posix() for path in files}, key=natural)
            raise UserError(
                f"--{name} names no folder and fits no file",
                file=src,
                found=given,
                expected=f"a folder such as {', '.join(folders[:8])}, or a pattern such as *_mask.png",
            )
    pieces = _assign_roles([_read_piece(src, path, options, above) for path in files])
    images, masks, rois = ([p for p in pieces if p.role == role] for role in (IMAGE, MASK, ROI))
    _require_both(src, images, masks, options)
    shared = set.intersection(*(set(p.place) for p in images))
    groups: dict[tuple[str, ...], list[Piece]] = defaultdict(list)
    for piece in images:
        groups[_without(piece.place, shared)].append(piece)
    if _case_folders(groups):
        cases, instances, notes = _pair_by_folder(groups, masks, rois, shared)
    else:
        cases, instances, notes = _pair_by_name(src, groups, masks, rois, shared)
    unused = [p for p in pieces if p.role is None]
    if unused:
        notes.append(
            ("not used", f"{len(unused)} files outside the image and mask folders, e.g. {unused[0].path.name}")
        )
    if rois and not options.roi:
        notes.append(
            ("not used", f"{len(rois)} fields of view (--roi {Path(rois[0].tree).name} ignores what lies outside)")
        )
    cases = mind_unmatched(src, cases, options)
    if not options.roi:
        cases = [replace(case, roi=None) for case in cases]
    return Layout("image and mask files", tuple(cases), instances=instances, notes=tuple(notes))


# --------------------------------------------------------------------------------------------------- what paths say


def _read_piece(src: Path, path: Path, options: Options, above: int) -> Piece:
    """`above`: so many folders hold everything, and say no role whatever they are called."""
    relative = path.relative_to(src)
    folders = relative.parts[:-1]
    words = [read_name(folder) for folder in folders]
    at = max((i for i, word in enumerate(words) if word.role and i >= above), default=None)
    role = words[at].role if at is not None else None
    for name, meant in ((options.images, IMAGE), (options.masks, MASK), (options.roi, ROI)):
        if name is None:
            continue
        hit = matches(relative, name)
        if hit is not None:
            role, at = meant, (hit if hit >= 0 else at)
        elif role == meant:
            role = None
    split = next((word.split for word in reversed(words) if word.split), "")
    others = []
    for i, folder in enumerate(folders):
        if i != at and not (words[i].split and not remainder(words[i])):
            others.append(remainder(words[i]) if words[i].split else folder)
    tag = remainder(words[at]) if at is not None else ""
    tree = "/".join(folders[: at + 1]) if at is not None else "/".join(folders)
    return Piece(path, io.stem(path), role, split, tuple(others), tag, tree)


def matches(relative: Path, patterns: str) -> int | None:
    """Index of the folder that a pattern names, -1 for a match of the whole path, None for none."""
    for pattern in filter(None, (p.strip().strip("/") for p in patterns.split(","))):
        if any(sign in pattern for sign in "*?["):
            if fnmatch(relative.as_posix(), pattern) or fnmatch(relative.name, pattern):
                return -1
            continue
        wanted, folders = Path(pattern).parts, relative.parts[:-1]
        for start in range(len(folders) - len(wanted) + 1):
            if folders[start : start + len(wanted)] == wanted:
                return start + len(wanted) - 1
    return None


def _assign_roles(pieces: list[Piece]) -> list[Piece]:
    """Where folders say no role, file names do: x.png and x_mask.png."""
    roles = {piece.role for piece in pieces}
    if MASK not in roles:
        by_name = {p.path: read_name(p.stem).role for p in pieces}
        pieces = [
            replace(p, role=by_name[p.path] if by_name[p.path] in (MASK, ROI) else p.role or IMAGE)
            if p.role in (None, IMAGE) and (IMAGE not in roles or p.role == IMAGE)
            else p
            for p in pieces
        ]
    elif IMAGE not in roles:
        pieces = [replace(p, role=p.role or IMAGE) for p in pieces]
    return _drive_masks(pieces)


def _drive_masks(pieces: list[Piece]) -> list[Piece]:
    """In DRIVE's own layout `1st_manual` holds the vessels and `mask` the field of view."""
    names = {Path(p.tree).name.lower() for p in pieces if p.role == MASK}
    if not any("manual" in name for name in names):
        return pieces
    return [replace(p, role=ROI) if p.role == MASK and Path(p.tree).name.lower() == "mask" else p for p in pieces]


def _require_both(src: Path, images: list[Piece], masks: list[Piece], options: Options) -> None:
    folders = sorted({p.parent.relative_to(src).as_posix() for p in src.rglob("*") if p.is_file()}, key=natural)
    if not images:
        raise UserError(
            "No images found",
            file=src,
            found=f"folders {', '.join(folders[:12])}" if folders else "an empty folder",
            expected="a folder called images (or similar)",
            remedy="--images SUBFOLDER",
        )
    if not masks and not options.unlabelled:
        raise Ambiguous(
            "No masks found",
            [("the folder of the masks", {"masks": "..."}), ("there are none", {"unlabelled": True})],
            file=src,
            found=f"{len(images)} images; folders {', '.join(folders[:12])}",
        )


def _without(place: Iterable[str], removed: set[str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in place if part not in removed)


# ------------------------------------------------------------------------------------- one folder per case: by folder


def _case_folders(groups: dict[tuple[str, ...], list[Piece]]) -> bool:
    """True for <case>/images/x.png: as many places as images."""
    single = all(len(pieces) == 1 for pieces in groups.values())
    named = all(place and pieces[0].stem.startswith(place[-1]) for place, pieces in groups.items())
    return single and all(groups) and (named or len(groups) > 5)


def _pair_by_folder(
    groups: dict[tuple[str, ...], list[Piece]], masks: list[Piece], rois: list[Piece], shared: set[str]
) -> tuple[list[Found], bool, list[tuple[str, str]]]:
    of_place: dict[tuple[str, ...], list[Piece]] = defaultdict(list)
    for mask in masks:
        of_place[_domain_of(_without(mask.place, shared), groups)].append(mask)
    stems = Counter(mask.stem for mask in masks)
    several = any(len(pieces) > 1 for pieces in of_place.values())
    instances = several and max(stems.values()) == 1
    roi_of = {_domain_of(_without(roi.place, shared), groups): roi.path for roi in rois}
    cases = []
    for place, (image,) in sorted(groups.items(), key=lambda item: [natural(part) for part in item[0]]):
        tags = [plain(m.stem) if several and not instances else "" for m in of_place[place]]
        found = tuple(Mask(m.path, tag) for m, tag in zip(of_place[place], tags, strict=True))
        domain = plain("_".join(place[:-1])) if place[:-1] else ""
        cases.append(
            Found(place[-1], (image.path,), found, bool(found), domain, split=image.split, roi=roi_of.get(place))
        )
    how = f"{len(masks)} files, by folder"
    return cases, instances, [("masks", how + (", one per object: joined" if instances else ""))]


def _domain_of(place: tuple[str, ...], groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest image place all of whose folders are on the mask's path."""
    if place in groups:
        return place
    fitting = [group for group in groups if set(group) <= set(place)]
    return max(fitting, key=len, default=())


# ---------------------------------------------------------------------------------------- folders of cases: by name


type Tagged = tuple[Piece, tuple[str, ...], str, str]
"""Mask, its domain, its class by folder, what the name of the mask folder says more."""


def _pair_by_name(
    src: Path,
    groups: dict[tuple[str, ...], list[Piece]],
    masks: list[Piece],
    rois: list[Piece],
    shared: set[str],
) -> tuple[list[Found], bool, list[tuple[str, str]]]:
    """Pairs each domain and split on its own, so that equal names in two of them do not meet."""
    tagged: list[Tagged] = [(m, *_class_of(_without(m.place, shared), m, groups)) for m in masks]
    fields = [(r, _domain_of(_without(r.place, shared), groups)) for r in rois]
    cases: list[Found] = []
    pairs: list[Pair] = []
    rules: Counter[str] = Counter()
    for domain, split, images in _batches(groups):
        own = [t for t in tagged if t[1] == domain and t[0].split in ("", split)]
        files = _channel_groups(images, [t[0].stem for t in own])
        stems = sorted(files, key=natural)
        matching = match(stems, [t[0].stem for t in own], [f"{t[0].tree}/{t[2]}/{t[3]}" for t in own])
        rules[matching.rule] += len(matching.found)
        pairs += [(len(cases) + i, ending, *own[m]) for m, (i, ending) in matching.found.items()]
        roi_of = _match_fields(stems, [r for r, d in fields if d == domain and r.split in ("", split)])
        title = plain("_".join(domain)) if domain else ""
        cases += [Found(s, files[s], (), False, title, split=split, roi=roi_of.get(i)) for i, s in enumerate(stems)]
    _refuse_lonely(src, masks, [pair[2] for pair in pairs], cases)
    kept, notes = _resolve_tags(pairs, cases)
    for index, mask in kept:
        cases[index] = replace(cases[index], masks=(*cases[index].masks, mask), labelled=True)
    rule = "; ".join(f"{number} by: {rule}" for rule, number in rules.items() if number)
    instances = any(number > 1 for case in cases for number in Counter(m.tag for m in case.masks).values())
    return cases, instances, [("masks", rule), *notes]


def _batches(groups: dict[tuple[str, ...], list[Piece]]) -> Iterator[tuple[tuple[str, ...], str, list[Piece]]]:
    """Images of one domain and split at a time."""
    order = ["", "train", "val", "test"]
    for domain, pieces in sorted(groups.items(), key=lambda item: [natural(part) for part in item[0]]):
        for split in sorted({p.split for p in pieces}, key=order.index):
            yield domain, split, [p for p in pieces if p.split == split]


def _match_fields(stems: list[str], rois: list[Piece]) -> dict[int, Path]:
    """Image index -> field of view."""
    found = match(stems, [r.stem for r in rois], [""] * len(rois)).found
    return {image: rois[i].path for i, (image, _) in found.items()}


def _class_of(
    place: tuple[str, ...], mask: Piece, groups: Iterable[tuple[str, ...]]
) -> tuple[tuple[str, ...], str, str]:
    """Domain of a mask; class that a folder below the mask folder names; what the mask folder's own name says more."""
    domain = _domain_of(place, groups)
    folders = [re.sub(r"^\d+[._ -]+", "", part) for part in _without(mask.folders, domain) if part in place]
    variant = mask.tag if mask.tag in place and mask.tag not in domain else ""
    return domain, plain("_".join(folders)) if folders else "", variant


def _channel_groups(images: list[Piece], masks: list[str]) -> dict[str, tuple[Path, ...]]:
    """Stem -> files; case_0000 and case_0001 are channels of case where masks are called case."""
    groups: dict[str, list[Path]] = defaultdict(list)
    channels = all(len(p.stem) > 5 and p.stem[-5] == "_" and p.stem[-4:].isdigit() for p in images)
    if channels and {p.stem[:-5] for p in images} & set(masks):
        for piece in sorted(images, key=lambda p: p.stem):
            groups[piece.stem[:-5]].append(piece.path)
        return {stem: tuple(paths) for stem, paths in groups.items()}
    for piece in images:
        groups[piece.stem].append(piece.path)
    for stem, paths in groups.items():
        if len(paths) > 1:
            raise Ambiguous(
                "Several images have the same name",
                [("which to use", {"images": "..."})],
                file=paths[0],
                found=", ".join(str(path) for path in paths[:3]),
                expected=f"one file called {stem}",
            )
    return {stem: tuple(paths) for stem, paths in groups.items()}


def _refuse_lonely(src: Path, masks: list[Piece], matched: list[Piece], cases: list[Found]) -> None:
    used = {piece.path for piece in matched}
    lonely = [mask for mask in masks if mask.path not in used]
    if lonely:
        folder = lonely[0].path.parent.relative_to(src).as_posix()
        raise UserError(
            f"{len(lonely)} of {count(len(masks), 'mask')} belong to no image",
            file=lonely[0].path,
            found=", ".join(sorted((m.stem for m in lonely), key=natural)[:5]),
            expected=f"images called {', '.join(case.name for case in cases[:5])} ...",
            remedy=f"--masks FOLDER or PATTERN names the masks that are meant (these lie in {folder})",
        )


type Pair = tuple[int, str, Piece, tuple[str, ...], str, str]
"""Case index, name ending, mask, domain, class by folder, variant of the mask folder."""


def _resolve_tags(pairs: list[Pair], cases: list[Found]) -> tuple[list[tuple[int, Mask]], list[tuple[str, str]]]:
    """Decides whether sub-folders, names of mask folders or name endings tell the classes apart."""
    notes: list[tuple[str, str]] = []
    _refuse_twins(pairs)
    variants = sorted({pair[5] for pair in pairs})
    if any(pair[4] for pair in pairs) and len(variants) > 1:
        pairs, note = _choose_variant(pairs, variants)
        notes.append(note)
        variants = []
    many_folders = len({pair[4] for pair in pairs}) > 1
    result, endings = [], _class_endings(pairs, cases)
    for index, ending, mask, _, folder, variant in pairs:
        parts = [folder if many_folders else "", variant if len(variants) > 1 else "", endings.get(ending, "")]
        result.append((index, Mask(mask.path, "_".join(part for part in parts if part))))
    return result, notes


def _refuse_twins(pairs: list[Pair]) -> None:
    """masks/ and labels/ side by side: nothing tells which one is meant."""
    trees: dict[tuple, set[str]] = defaultdict(set)
    for index, ending, mask, _, folder, variant in pairs:
        trees[index, ending, folder, variant].add(mask.tree)
    if twins := next((found for found in trees.values() if len(found) > 1), None):
        raise Ambiguous(
            "Several folders hold masks of the same images",
            [(f"{sum(pair[2].tree == tree for pair in pairs)} masks", {"masks": tree}) for tree in sorted(twins)],
            found=", ".join(sorted(twins)),
        )


def _choose_variant(pairs: list[Pair], variants: list[str]) -> tuple[list[Pair], tuple[str, str]]:
    """masks/EX and masks_tif_native/EX say the same: the one that covers all of the other is used."""
    cover = {v: {(pair[0], pair[4]) for pair in pairs if pair[5] == v} for v in variants}
    trees = {v: next(pair[2].tree for pair in pairs if pair[5] == v) for v in variants}
    best = max(variants, key=lambda v: len(cover[v]))
    if not all(cover[v] <= cover[best] for v in variants) or any(
        cover[v] == cover[best] for v in variants if v != best
    ):
        raise Ambiguous(
            "Several folders hold masks of the same images and classes",
            [(f"{len(cover[v])} masks", {"masks": trees[v]}) for v in variants],
            found=", ".join(trees.values()),
        )
    others = ", ".join(f"{trees[v]} ({len(cover[v])} of {len(cover[best])} masks)" for v in variants if v != best)
    return [pair for pair in pairs if pair[5] == best], ("not used", f"{others}; --masks chooses another folder")


def _class_endings(pairs: list[Pair], cases: list[Found]) -> dict[str, str]:
    """Name ending -> class, where images have several masks that differ by it; numbered endings are objects."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for index, ending, _, _, folder, variant in pairs:
        groups[index, folder, variant].append(ending)
    crowded = next((key for key, endings in groups.items() if len(endings) > 1), None)
    if crowded is None:
        return {}
    endings = sorted({ending for found in groups.values() for ending in found}, key=natural)
    if all(ending.lower() in RATERS for ending in endings):
        raise Ambiguous(
            "Several people have outlined the same images",
            [(f"masks ending in {ending}", {"masks": f"*{ending}*"}) for ending in endings],
            file=cases[crowded[0]].file,
            found=", ".join(endings),
        )
    return {e: "_".join(word for word in read_name(e).rest if not word.isdigit()) for e in endings}


# ---------------------------------------------------------------------------------------------- images without masks


def mind_unmatched(src: Path, cases: list[Found], options: Options) -> list[Found]:
    """Cases without a mask are what the user says they are.

    Raises:
        Ambiguous: he does not say.
    """
    without = [case for case in cases if not case.masks]
    if options.empty:
        return [replace(case, labelled=True) for case in cases]
    if without and not options.unlabelled:
        names = [case.file.relative_to(src).as_posix() for case in without]
        raise Ambiguous(
            f"{len(without)} of {count(len(cases), 'image')} have no mask",
            [
                ("they are unlabelled cases", {"unlabelled": True}),
                ("nothing is to be seen on them", {"empty": True}),
                ("the masks lie elsewhere", {"masks": "..."}),
            ],
            file=without[0].file,
            found=", ".join(names[:8]) + (" ..." if len(names) > 8 else ""),
        )
    return cases
