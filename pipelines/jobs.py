"""The root config of the training job; each section sits beside what it configures."""

import math
import re
from dataclasses import dataclass, field

from msclip.config import ModelConfig
from msclip.data.loader import DataConfig
from msclip.data.tokenizer import Truncation
from msclip.errors import UserError
from msclip.optim import OptimConfig
from msclip.training import CheckpointConfig, TrainingConfig

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TokenizerConfig:
    """Where token ids come from."""

    source: str = "train"
    """`train` learns a byte-level BPE of `model.vocab_size` ids from the captions; `init` is that of the weights `init`, and
    the default with them, also where a configuration says `train`; else a tokenizer.json, OpenAI's merges file, or a Hugging
    Face name."""
    truncation: Truncation = "end"
    """`end` keeps the end token of a caption that is too long; `official` cuts it off, as MS-CLIP's own tokenizer does."""


@dataclass(frozen=True)
class PixelsConfig:
    """How pixels are normalised; the values travel in every checkpoint."""

    mean: tuple[float, float, float] = IMAGENET[0]
    """Mean of red, green and blue on a scale of 0 to 1. ImageNet's, as MS-CLIP has it; CLIP has its own."""
    std: tuple[float, float, float] = IMAGENET[1]
    """Standard deviation on the same scale."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What shows through transparent pixels, 0 to 255."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(m) for m in self.mean) or not all(s > 0 and math.isfinite(s) for s in self.std):
            raise UserError(f"pixels.mean must be finite and pixels.std positive, got {self.mean} and {self.std}")
        if not all(0 <= value <= 255 for value in self.background):
            raise UserError(f"pixels.background must be 0 to 255, got {self.background}")


@dataclass(frozen=True)
class ClusterConfig:
    """Which Ray cluster trains, and with how much of it."""

    num_workers: int = 1
    """Training processes; one GPU each where there are GPUs."""
    use_gpu: bool | None = None
    """Train on GPUs; null to do so if the cluster has any."""
    cpus_per_worker: float = 1
    """CPUs reserved for each training process, on top of what decoding takes."""
    address: str | None = None
    """A Ray cluster to join; `local` for a new one on this machine; null for RAY_ADDRESS or what
    `ray start` made here, else a new one."""
    autoscaling: bool = False
    """Wait for nodes that the autoscaler will add, instead of refusing more workers than the cluster has now."""
    max_failures: int = 3
    """How many times lost workers are replaced; training then goes on from the newest checkpoint. An error before the first
    step that the same settings would bring about again ends the job at once."""
    logs: bool = False
    """Show the workers' own output on this console."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UserError(f"cluster.num_workers must be at least 1, got {self.num_workers}")
        if self.cpus_per_worker <= 0:
            raise UserError(f"cluster.cpus_per_worker must be positive, got {self.cpus_per_worker}")
        if self.max_failures < -1:
            raise UserError(f"cluster.max_failures must be at least 0, or -1 for no limit, got {self.max_failures}")


@dataclass(frozen=True)
class RunConfig:
    """Where the run keeps its files."""

    name: str = "train"
    """Folder of this run below `storage`; a new run wants a new name."""
    storage: str = "runs"
    """A folder that every node sees: a local or shared path, or s3://bucket/prefix."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise UserError(f"run.name must be letters, digits, '.', '-' and '_', as it names a folder, got {self.name!r}")


@dataclass(frozen=True)
class TrainJob:
    """Train a contrastive image-text model on a Ray cluster."""

    init: str | None = None
    """Weights to start from, instead of fresh ones: anything that `msclip.load` reads, on disk or a URL. Architecture,
    tokenizer and pixels are then theirs by default; of `model`, only the input sizes (positions are interpolated), the loss
    and what concerns training alone may differ, and pixels only where the command line itself says so."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoders and what they share."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and how they are read."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Where token ids come from."""
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    """How pixels are normalised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW, its groups and its schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long and how exactly to train."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Which Ray cluster trains."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the run keeps its files."""

    def __post_init__(self) -> None:
        if self.tokenizer.source == "init" and self.init is None:
            raise UserError("tokenizer.source init is the tokenizer of the weights to start from, and init is null; name one")
        share = self.cluster.num_workers * self.optim.accumulation_steps
        if self.training.global_batch % share:
            raise UserError(
                "training.global_batch must be a multiple of cluster.num_workers times optim.accumulation_steps, got "
                f"{self.training.global_batch}, {self.cluster.num_workers} and {self.optim.accumulation_steps}"
            )
        if self.training.zero_stage is None and self.cluster.num_workers > 1:
            raise UserError(
                "training.zero_stage must be 0, 1, 2 or 3 with more than one worker, got null and cluster.num_workers "
                f"{self.cluster.num_workers}"
            )
