"""Between a robot's raw dict and the model's arrays, both ways: steps in fixed stages, and normalisation statistics."""

from vla.transforms.batch import batch, collate
from vla.transforms.build import Context, build_group, make_context, part_steps, stats_steps
from vla.transforms.group import INPUT_STAGES, OUTPUT_STAGES, STAGES, FunctionStep, Group, Placed, Step, flatten, nest
from vla.transforms.images import (
    ConvertToUint8,
    FitCameras,
    ResizeImages,
    camera_steps,
    resize_with_pad,
    to_uint8,
)
from vla.transforms.numbers import (
    AbsoluteActions,
    CheckRow,
    DeltaActions,
    Normalize,
    Pad,
    Repack,
    Select,
    SubsampleActions,
    Unnormalize,
    Unpad,
    delta_steps,
    make_bool_mask,
    normalize,
    pad_to,
    shift,
    unnormalize,
)
from vla.transforms.stats import Stats, compute_stats, identity_stats, load_stats, save_stats
from vla.transforms.text import Detokenize, InjectDefaultPrompt, ReadPrompt, Tokenize, as_text

__all__ = [
    "INPUT_STAGES", "OUTPUT_STAGES", "STAGES", "AbsoluteActions", "CheckRow", "Context", "ConvertToUint8",
    "DeltaActions", "Detokenize", "FitCameras", "FunctionStep", "Group", "InjectDefaultPrompt", "Normalize", "Pad",
    "Placed", "ReadPrompt", "Repack", "ResizeImages", "Select", "Stats", "Step", "SubsampleActions", "Tokenize",
    "Unnormalize", "Unpad", "as_text", "batch", "build_group", "camera_steps", "collate", "compute_stats",
    "delta_steps",
    "flatten", "identity_stats", "load_stats", "make_bool_mask", "make_context", "nest", "normalize", "pad_to",
    "part_steps", "resize_with_pad", "save_stats", "shift", "stats_steps", "to_uint8", "unnormalize",
]  # fmt: skip
