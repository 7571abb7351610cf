"""Who belongs to whom: domains, patients, and which patients train, validate and test."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from medseg_jax.data import io
from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.options import Options, flag
from medseg_jax.data.convert.words import SPLITS, natural, plain
from medseg_jax.types import UserError

type Notes = list[tuple[str, str]]

ROLES = ("train", "val", "test")

PATIENT_PATTERNS = (
    ("names like patient003_frame01", r"^((?:patient|subject|sub|pat|case|subj)[-_]?\d+)(?=[-_.].)"),
    ("names like sub-A01_ses-1", r"^(sub-[A-Za-z0-9]+)(?=_)"),
    ("names like BraTS-GLI-00001-000", r"^(BraTS-[A-Z]+-\d+)-\d{3}$"),
    ("names like X_slice_7", r"^(.+?)(?:[-_]frame[-_]?\d+)?[-_]slice[-_]?\d+$"),
    ("left and right", r"^(.*\d)[-_]?(?:L|R|left|right|OD|OS)$"),
    ("X and X_1, X_2", r"^(.+)_\d{1,2}$"),
)


def assign(src: Path, layout: Layout, options: Options) -> tuple[list[Found], Notes]:
    """Fills in domain, patient, split and a unique name for each case.

    Raises:
        UserError: a pattern that does not fit, a list that names nobody, a patient in two splits.
    """
    notes: Notes = []
    found = list(layout.cases)
    described = layout.labels is not None
    if options.domain_from:
        found = [replace(c, domain=plain(_extract(src, c, "domain_from", options.domain_from))) for c in found]
    found = _name(_choose_domains(found, options), keep=described)
    if options.patient_from or not described:
        found, text = _assign_patients(src, found, options)
        notes.append(("patients", text))
    found, text = _assign_splits(src, found, options)
    notes.append(("split", text))
    if options.test_domain is not None:
        found = _hold_out(found, options.test_domain)
        notes.append(("test set", f"domain {options.test_domain}"))
    return found, notes


def _choose_domains(cases: list[Found], options: Options) -> list[Found]:
    if options.domains is None:
        return cases
    wanted = [name.strip() for name in options.domains.split(",")]
    known = sorted({case.domain for case in cases})
    if missing := [name for name in wanted if name not in known]:
        raise UserError("--domains names no domain", found=", ".join(missing), expected=", ".join(known))
    return [case for case in cases if case.domain in wanted]


def _extract(src: Path, case: Found, option: str, pattern: str) -> str:
    path = case.file.relative_to(src).as_posix()
    match = re.search(pattern, path)
    if match is None:
        raise UserError(
            f"{flag(option)} does not fit a path", file=path, found=pattern, expected="a match in every path"
        )
    return next((group for group in match.groups() if group), match[0])


def _name(cases: list[Found], keep: bool) -> list[Found]:
    """Plain, unique names: the file's own, with the domain before it if there are several."""
    several = len({case.domain for case in cases}) > 1 and not keep
    named = [f"{c.domain}_{c.name}" if several and c.domain else c.name for c in cases]
    if len(set(named)) < len(named):
        named = [f"{c.split}_{name}" if c.split else name for c, name in zip(cases, named, strict=True)]
    named = [plain(name) for name in named]
    if twice := [name for name, count in Counter(named).items() if count > 1]:
        files = ", ".join(str(c.file) for c, name in zip(cases, named, strict=True) if name == twice[0])
        raise UserError("Two cases have the same name", file=files, found=twice[0], remedy="--domain-from REGEX")
    return [replace(case, name=name) for case, name in zip(cases, named, strict=True)]


# ---------------------------------------------------------------------------------------------------------- patients


def _assign_patients(src: Path, cases: list[Found], options: Options) -> tuple[list[Found], str]:
    if options.patient_from:
        pattern = options.patient_from
        cases = [replace(c, patient=_patient_id(c, _extract(src, c, "patient_from", pattern))) for c in cases]
        return cases, f"{len({c.patient for c in cases})} by --patient-from"
    if any(case.patient for case in cases):
        return cases, f"{len({c.patient or c.name for c in cases})} as given"
    said = []
    for what, pattern in PATIENT_PATTERNS:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, case in enumerate(cases):
            if not case.patient:
                match = re.search(pattern, case.name.removeprefix(f"{case.domain}_"), re.IGNORECASE)
                groups[_patient_id(case, match[1] if match else case.name.removeprefix(f"{case.domain}_"))].append(i)
        members = {
            name: indices for name, indices in groups.items() if len(indices) > 1 and _is_series(what, name, cases)
        }
        for name, indices in members.items():
            for i in indices:
                cases[i] = replace(cases[i], patient=name)
        if members:
            said.append(f"{sum(map(len, members.values()))} cases of {len(members)} patients by {what}")
    return cases, "; ".join(said) or "every case counts as one; if some belong together, --patient-from tells"


def _is_series(what: str, name: str, cases: list[Found]) -> bool:
    """X_1, X_2 belong together only if there is an X: otherwise the number is a case's own."""
    return not what.startswith("X and") or any(case.name == name for case in cases)


def _patient_id(case: Found, patient: str) -> str:
    """Patients of two domains never meet."""
    return plain(f"{case.domain}_{patient}" if case.domain else patient)


def _patient(case: Found) -> str:
    return case.patient or case.name


# ------------------------------------------------------------------------------------------------------------ splits


def _assign_splits(src: Path, cases: list[Found], options: Options) -> tuple[list[Found], str]:
    how = options.split
    if how is None:
        return _split_by_default(src, cases)
    if match := re.fullmatch(r"every-(\d+)(?:th|rd|nd|st)?", how):
        return _by_rule(cases, lambda _: _every(_positive(how, match[1]))), f"every {match[1]}th patient validates"
    if match := re.fullmatch(r"last-(\d+)", how):
        return _by_rule(
            cases, lambda _: _last(_positive(how, match[1]))
        ), f"the last {match[1]} patients of each domain validate"
    if how == "folders":
        if not any(case.split for case in cases):
            raise UserError("No folder is called train, val or test", file=src, found="--split folders")
        return _from_folders(cases)
    if "=" in how:
        return _by_lists(cases, _parse_lists(src, how))
    raise UserError(
        "--split is not understood", found=how, expected="every-5, last-4, folders, or train=a.list,val=b.list"
    )


def _positive(how: str, digits: str) -> int:
    if int(digits) < 1:
        raise UserError("--split needs a number above 0", found=how)
    return int(digits)


def _split_by_default(src: Path, cases: list[Found]) -> tuple[list[Found], str]:
    """Folders, else list files beside the data, else a rule."""
    if {"val", "train"} <= {case.split for case in cases}:
        return _from_folders(cases)
    if lists := _find_lists(src, cases):
        return _by_lists(cases, lists)
    return _from_folders(cases)


def _from_folders(cases: list[Found]) -> tuple[list[Found], str]:
    """Splits that folders give; where they give no validation cases, every 5th training patient validates."""
    given = sorted({case.split for case in cases if case.split}, key=ROLES.index)
    kept = [replace(case, split=case.split or "train") for case in cases]
    said = f"folders: {', '.join(given)}; " if given and given != ["train"] else ""
    if "val" in given:
        return kept, said.rstrip("; ")
    training = [case for case in kept if case.split == "train"]
    alike = _neighbours_alike(training)
    new = {c.name: c for c in _by_rule(training, lambda domain: _last_fifth if domain in alike else _every(5))}
    domains = {case.domain for case in training}
    if len(alike) < len(domains):
        several = " of each domain" if len(domains) > 1 else ""
        said += f"patients{several} sorted, every 5th (the first, the sixth ...) validates"
    for domain, likeness in alike.items():
        title = f"{domain}: " if domain else ""
        said += f"{'; ' if said else ''}{title}neighbouring images are alike ({likeness}): the last fifth validates"
    return [new.get(case.name, case) for case in kept], said


type Rule = Callable[[list[str]], set[str]]


def _every(n: int) -> Rule:
    """The same order as `Dataset` has: sorted as text."""
    return lambda patients: set(sorted(patients)[::n]) if len(patients) > 1 else set()


def _last(n: int) -> Rule:
    return lambda patients: set(sorted(patients, key=natural)[-n:])


def _last_fifth(patients: list[str]) -> set[str]:
    return set(sorted(patients, key=natural)[-max(1, round(len(patients) / 5)) :])


def _by_rule(cases: list[Found], rule_of: Callable[[str], Rule]) -> list[Found]:
    """Applies a rule to the labelled patients of each domain; an unlabelled case goes where its patient is."""
    validating: set[str] = set()
    for domain in {case.domain for case in cases}:
        patients = {_patient(c) for c in cases if c.domain == domain and c.labelled and c.split != "test"}
        validating |= rule_of(domain)(list(patients))
    if validating and all(_patient(c) in validating for c in cases if c.split != "test"):
        raise UserError("No case is left to train with", found=f"{len(validating)} patients, all of them validate")
    splits = {True: "val", False: "train"}
    return [c if c.split == "test" else replace(c, split=splits[_patient(c) in validating]) for c in cases]


def _hold_out(cases: list[Found], domain: str) -> list[Found]:
    domains = sorted({case.domain for case in cases})
    if domain not in domains:
        raise UserError(
            "--test-domain names no domain", found=domain, expected=", ".join(d for d in domains if d) or "none"
        )
    if len(domains) < 2:
        raise UserError("--test-domain needs two domains at least", found=domains)
    return [replace(c, split="test" if c.domain == domain else c.split) for c in cases]


def limit(cases: list[Found], options: Options) -> list[Found]:
    """The first cases of each domain and split, where --limit is given."""
    if options.limit is None:
        return cases
    kept: Counter = Counter()
    chosen = []
    for case in cases:
        group = (case.domain, case.split, case.labelled)
        kept[group] += 1
        if kept[group] <= options.limit:
            chosen.append(case)
    return chosen


# -------------------------------------------------------------------------------------------------------- list files


def _find_lists(src: Path, cases: list[Found]) -> dict[str, list[Path]]:
    """train.list, val.txt ... in the source, its lists/ or splits/, or those beside it, that name some of the cases."""
    known = {_source_name(case) for case in cases} | {_patient(case) for case in cases}
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for base in (src, src.parent):
        for folder in (base / "lists", base / "splits", base / "ImageSets", base):
            for path in sorted((*folder.glob("*.list"), *folder.glob("*.txt"))):
                role = SPLITS.get(re.split(r"[^a-z]+", path.stem.lower())[0])
                if role is None:
                    continue
                names = _read_list(path)
                hits = sum(name in known or _patient_of(name) in known for name in names)
                exact = sum(name in known for name in names)
                if hits:
                    found[role].append((exact * 1_000_000 + hits, path))
        if found:
            break
    return {role: [max(paths, key=lambda p: p[0])[1]] for role, paths in found.items()}


def _source_name(case: Found) -> str:
    return case.name.removeprefix(f"{case.domain}_") if case.domain else case.name


def _patient_of(name: str) -> str:
    match = re.search(PATIENT_PATTERNS[0][1], name, re.IGNORECASE)
    return match[1] if match else name


def _parse_lists(src: Path, text: str) -> dict[str, list[Path]]:
    lists: dict[str, list[Path]] = defaultdict(list)
    for part in text.split(","):
        role, _, name = part.partition("=")
        role = SPLITS.get(role.strip(), "")
        path = next((p for p in (Path(name.strip()), src / name.strip()) if p.is_file()), None)
        if not role or path is None:
            problem = "--split names no such file" if role else "--split must name train, val or test"
            raise UserError(problem, file=name if role else None, found=part, expected="train=a.list,val=b.list")
        lists[role].append(path)
    return lists


def _read_list(path: Path) -> list[str]:
    """First word of each line, without folder and image suffix."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("The list cannot be read", file=path, found=error) from error
    words = [re.split(r"[\s,;]", line.strip())[0] for line in lines if line.strip()]
    return [io.stem(word) if io.suffix(word) in io.SUFFIXES else Path(word).name for word in words]


def _by_lists(cases: list[Found], lists: dict[str, list[Path]]) -> tuple[list[Found], str]:
    """Splits by name; cases that no list names go where their patient is (frames may be numbered otherwise there)."""
    by_name: dict[str, str] = {}
    for role, paths in lists.items():
        for name in (name for path in paths for name in _read_list(path)):
            if by_name.setdefault(name, role) != role:
                raise UserError(
                    "Two lists name the same case", file=paths[0], found=f"{name}: {by_name[name]} and {role}"
                )
    direct = {case.name: by_name.get(_source_name(case)) or by_name.get(case.name) for case in cases}
    patients: dict[str, set[str]] = defaultdict(set)
    for name, role in by_name.items():
        patients[_patient_of(name)].add(role)
    for case in cases:
        if role := direct[case.name]:
            patients[_patient(case)].add(role)
    if torn := sorted(p for p in patients if len(patients[p]) > 1 and any(_patient(c) == p for c in cases)):
        raise UserError(
            "The lists tear a patient apart", file=lists["train"][0] if "train" in lists else None, found=torn[:5]
        )
    split = {
        c.name: direct[c.name] or next(iter(patients.get(_source_patient(c), patients.get(_patient(c), ()))), None)
        for c in cases
    }
    if nobody := [case for case in cases if split[case.name] is None]:
        raise UserError(
            f"{len(nobody)} of {len(cases)} cases are in no list",
            file=nobody[0].file,
            found=", ".join(path.name for paths in lists.values() for path in paths),
            remedy="--split every-5, or lists that name every case",
        )
    named = sum(role is not None for role in direct.values())
    text = ", ".join(f"{role} by {path.name}" for role, paths in lists.items() for path in paths)
    if named < len(cases):
        text += f"; {len(cases) - named} cases that no list names went where their patient is"
    done = [replace(case, split=split[case.name] or "train") for case in cases]
    if "val" not in {case.split for case in done} and "train" in {case.split for case in done} and "val" not in lists:
        done = _by_rule(done, lambda _: _every(5))
        if "val" in {case.split for case in done}:
            text += "; no list for validation: every 5th training patient validates"
    return done, text


def _source_patient(case: Found) -> str:
    return case.patient.removeprefix(f"{case.domain}_") if case.domain else _patient(case)


# ------------------------------------------------------------------------------------------------- leaking neighbours


def _neighbours_alike(cases: list[Found]) -> dict[str, str]:
    """Domains whose images are frames of a video or consecutive slices -> how alike neighbours are.

    Thumbnails of neighbours (in natural order) are compared with thumbnails far apart: on the sets we know, neighbours
    exceed the 95th percentile of far pairs in 0.8 to 0.95 of all pairs for frames and slices, and in less than 0.4 for
    single pictures.
    """
    alike = {}
    for domain in sorted({case.domain for case in cases}):
        members = sorted((c for c in cases if c.domain == domain), key=lambda c: natural(c.name))[:48]
        pictures = all(io.kind(c.file) == "picture" for c in members)
        if len(members) < 10 or not pictures or any(c.patient for c in members):
            continue
        thumbnails = np.stack([_thumbnail(c.file) for c in members])  # [n, 4096]
        likeness = thumbnails @ thumbnails.T / thumbnails.shape[1]  # [n, n]
        n = len(members)
        near = likeness[np.arange(n - 1), np.arange(1, n)]
        far = likeness[np.arange(n), (np.arange(n) + n // 2) % n]
        share = float((near > np.quantile(far, 0.95)).mean())
        if share > 0.6:
            alike[domain] = f"correlation {np.median(near):.2f}, of distant ones {np.median(far):.2f}"
    return alike


def _thumbnail(path: Path) -> np.ndarray:
    """Grey 64 x 64, zero mean and unit variance, as a row."""
    try:
        with Image.open(path) as image:
            image.draft("L", (128, 128))
            small = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), np.float32)
    except OSError as error:
        raise UserError("The picture cannot be read", file=path, found=error) from error
    return ((small - small.mean()) / (small.std() + 1e-6)).ravel()
