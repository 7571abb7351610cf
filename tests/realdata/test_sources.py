"""Every source whose data are here: classes, domains and splits as the data's README says."""

from collections import Counter

import pytest

from medseg_jax.data import sources
from medseg_jax.data.verify import check_dataset

# folder, options, classes, cases by split
SETS = {
    "msd": ("hippocampus_msd04", {}, ("Anterior", "Posterior"), {"train": 96, "val": 24}),
    "acdc_ssl": ("acdc/derived_128", {}, ("RV", "MYO", "LV"), {"train": 60, "val": 16}),
    "la2018": ("la2018", {"split": "last-2"}, ("atrium",), {"train": 2, "val": 2}),
    "optic_disc": ("optic_disc", {"limit": 2}, ("disc",), {"train": 4, "val": 4}),
    "kvasir_seg": ("polyp/kvasir_seg", {}, ("polyp",), {"train": 64, "val": 16}),
    "cvc_clinicdb": ("polyp/cvc_clinicdb", {}, ("polyp",), {"train": 32, "val": 8}),
    "etis_larib": ("polyp/etis_larib", {}, ("polyp",), {"train": 3, "val": 1}),
    "bkai_igh": ("polyp/bkai_igh_neopolyp", {}, ("neoplastic", "non_neoplastic"), {"train": 6, "val": 2}),
    "polyps": ("polyp", {"limit": 1}, ("polyp",), {"train": 4, "val": 4}),
    "isic2018": ("isic2018_256", {"limit": 4}, ("lesion",), {"train": 4, "val": 4}),
    "glas": ("glas", {}, ("gland",), {"train": 4, "val": 1}),
    "foot_ulcers": ("wound_fuseg", {}, ("wound",), None),
    "dsb2018": ("dsb2018", {"limit": 3}, ("nucleus",), {"train": 3, "val": 3}),
    "em_isbi2012": ("em_isbi2012", {}, ("membrane",), {"train": 14, "val": 4}),
    "sts": ("sts_ctpet", {}, ("tumour",), {"train": 3, "val": 1}),
    "jsrt": ("jsrt/derived_256", {}, None, {"train": 99, "val": 25}),
    "retinal_vessels": ("vessels", {"limit": 1}, ("vessel",), {"train": 4, "val": 4}),
    "idrid": ("idrid", {"limit": 1}, ("MA", "HE", "EX", "SE", "OD"), {"train": 1, "val": 1}),
}
SLOW = ("idrid", "retinal_vessels", "optic_disc", "polyps", "isic2018")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SETS])
def test_source(name, real_data, tmp_path):
    folder, options, classes, splits = SETS[name]
    dataset = sources.convert(name, real_data / folder, tmp_path / "dst", quiet=True, **options)
    assert not [p for p in check_dataset(dataset) if p.severity == "error"]
    assert classes is None or dataset.labels.names == classes
    assert splits is None or Counter(case.split for case in dataset.cases) == splits
    assert dataset.extra["source"] == name
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]
