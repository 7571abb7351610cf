"""Public data sets: one small file each, which says what the set is, how to get it, and how to convert it.

Nothing is ever downloaded: you fetch a set where its owners give it out, under their terms, and say where it lies. The
modules of this package are the list; there is no other.
"""

import difflib
import importlib
import pkgutil
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source
from medseg_jax.types import UserError

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

__all__ = ["Source", "convert", "find", "sources"]


def sources() -> dict[str, Source]:
    """Every source by its name."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("source", "tfds"))
    return {name: importlib.import_module(f"{__name__}.{name}").SOURCE for name in names}


def find(name: str) -> Source:
    """The source of this name.

    Raises:
        UserError: there is none.
    """
    known = sources()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        expected = f"did you mean {near[0]}?" if near else ", ".join(known)
        raise UserError("Unknown source", found=name, expected=expected, remedy="medseg data sources lists them")
    return known[name]


def convert(name: str, src: str | Path, dst: str | Path, /, **options: object) -> "Dataset":
    """Makes a canonical data set of a public one.

    Args:
        name: of the source; "tfds:NAME" for a builder of TensorFlow Datasets (src is then its data_dir).
        src: folder or archive, laid out as the source says.
        dst: folder to write.
        options: fields of `convert.Options`; they go before the source's own.

    Returns:
        the data set in `dst`; its dataset.json says source, licence and reference.

    Raises:
        UserError: unknown source, another layout, or whatever the converter finds.
    """
    # Readers and their libraries load only here, so that listing the sources is quick.
    from medseg_jax.data.convert.archives import as_folder
    from medseg_jax.data.convert.steps import run
    from medseg_jax.data.convert.write import beside, check_target
    from medseg_jax.data.sources import tfds

    src, dst = Path(src), Path(dst)
    if name.startswith("tfds:"):
        chosen = Options.of(**{"name": name[5:].partition(":")[0].replace("/", "_")} | _said(Options.of(**options)))
        check_target(src, dst, chosen)
        with beside(dst, ".arranged") as work:
            return run(tfds.export(name[5:], src, work), dst, chosen)
    source = find(name)
    chosen = Options.of(**{"name": source.name} | _said(source.options) | _said(Options.of(**options)))
    check_target(src, dst, chosen)
    with as_folder(src, dst) as folder, beside(dst, ".arranged") as work:
        source.check(folder)
        try:
            dataset = run(source.arrange(folder, work) if source.arrange else folder, dst, chosen)
        except UserError as error:
            if error.file is not None and Path(error.file).is_symlink():
                error.file = Path(error.file).resolve()  # the user's own file, rather than our link to it
            raise
    said = {"source": source.name, "licence": source.licence, "reference": source.citation}
    values = dict(zip(dataset.labels.names, dataset.labels.values, strict=True))
    if source.scores and not all(name in values for names in source.scores.values() for name in names):
        source = replace(source, scores={})  # the user named the classes otherwise
    scores = tuple((name, tuple(v for part in parts for v in values[part])) for name, parts in source.scores.items())
    labels = replace(dataset.labels, scores=scores)
    dataset = replace(dataset, labels=labels, extra={**dataset.extra, **said})
    dataset.save()
    return dataset


def _said(options: Options) -> dict[str, object]:
    return {f.name: value for f in fields(Options) if (value := getattr(options, f.name)) != f.default}
