"""medseg_jax: medical image segmentation in JAX. The Python API says what the command line says.

    import medseg_jax as ms
    run = ms.train(ms.Config(data="my_dataset"), "runs/first")
    ms.predict(run, "new_images", "predictions")
    ms.evaluate("predictions", "reference_labels", "scores")

Nothing heavy is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Augment": "data.augment",
    "BCP": "methods.bcp",
    "BCPUNet": "models.bcp_unet",
    "Config": "config",
    "CopyPaste": "methods.bcp",
    "DRLesions": "methods.dr_lesions",
    "DSU": "methods.domain_generalisation",
    "Dataset": "data.dataset",
    "DeepLabV3Plus": "models.deeplabv3p",
    "EfficientUNet": "models.efficientnet",
    "FourierMixing": "methods.domain_generalisation",
    "Group": "config",
    "KMSNoise": "methods.kms_noise",
    "LabelNoise": "data.label_noise",
    "Labels": "types",
    "MambaSea": "methods.mamba_sea",
    "MeanTeacher": "methods.mean_teacher",
    "Med2DSegNet": "models.med2d_segnet",
    "Mix": "data.pipeline",
    "MixStyle": "methods.domain_generalisation",
    "Optim": "config",
    "Plan": "data.plan",
    "ResEncUNet": "models.resenc",
    "Robust": "methods.robust_losses",
    "Rule": "config",
    "Stage": "config",
    "Supervised": "methods.supervised",
    "UNet": "models.unet",
    "UserError": "types",
    "VMUNet": "models.vmunet",
    "VNet": "models.vnet",
    "WTBCP": "methods.wt_bcp",
    "WTCopyPaste": "methods.wt_bcp",
    "XNet": "models.xnet",
    "audit": "evaluation.audit",
    "check_dataset": "data.verify",
    "compare": "evaluation.compare",
    "convert": "data.convert",
    "corrupt": "data.label_noise",
    "evaluate": "evaluation.evaluate",
    "export": "inference.export",
    "make_phantoms": "data.synthetic",
    "make_plan": "data.planning",
    "open_run": "runtime.run",
    "predict": "inference.predict",
    "preflight": "training.preflight",
    "report": "evaluation.report",
    "train": "training.train",
    "train_by_class": "training.by_class",
    "train_folds": "training.folds",
    "train_hold_out": "training.hold_out",
    "verify": "evaluation.verify",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from medseg_jax.config import Config, Group, Optim, Rule, Stage
    from medseg_jax.data.augment import Augment
    from medseg_jax.data.convert import convert
    from medseg_jax.data.dataset import Dataset
    from medseg_jax.data.label_noise import LabelNoise, corrupt
    from medseg_jax.data.pipeline import Mix
    from medseg_jax.data.plan import Plan
    from medseg_jax.data.planning import make_plan
    from medseg_jax.data.synthetic import make_phantoms
    from medseg_jax.data.verify import check_dataset
    from medseg_jax.evaluation.audit import audit
    from medseg_jax.evaluation.compare import compare
    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.evaluation.report import report
    from medseg_jax.evaluation.verify import verify
    from medseg_jax.inference.export import export
    from medseg_jax.inference.predict import predict
    from medseg_jax.methods.bcp import BCP, CopyPaste
    from medseg_jax.methods.domain_generalisation import DSU, FourierMixing, MixStyle
    from medseg_jax.methods.dr_lesions import DRLesions
    from medseg_jax.methods.kms_noise import KMSNoise
    from medseg_jax.methods.mamba_sea import MambaSea
    from medseg_jax.methods.mean_teacher import MeanTeacher
    from medseg_jax.methods.robust_losses import Robust
    from medseg_jax.methods.supervised import Supervised
    from medseg_jax.methods.wt_bcp import WTBCP, WTCopyPaste
    from medseg_jax.models.bcp_unet import BCPUNet
    from medseg_jax.models.deeplabv3p import DeepLabV3Plus
    from medseg_jax.models.efficientnet import EfficientUNet
    from medseg_jax.models.med2d_segnet import Med2DSegNet
    from medseg_jax.models.resenc import ResEncUNet
    from medseg_jax.models.unet import UNet
    from medseg_jax.models.vmunet import VMUNet
    from medseg_jax.models.vnet import VNet
    from medseg_jax.models.xnet import XNet
    from medseg_jax.runtime.run import open_run
    from medseg_jax.training.by_class import train_by_class
    from medseg_jax.training.folds import train_folds
    from medseg_jax.training.hold_out import train_hold_out
    from medseg_jax.training.preflight import preflight
    from medseg_jax.training.train import train
    from medseg_jax.types import Labels, UserError


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medseg_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medseg_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
