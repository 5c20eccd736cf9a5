"""What the work of a stage is given, and on which nodes: Ray's own options, under the names that Ray has for them.

None of it changes a result's digest. Whether any node of the cluster has it is looked at before the run.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

from urbanclip_ray.config.section import Section, execution

Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


def _check_accelerator(value: str) -> str:
    if value and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value):
        raise ValueError("one of Ray's names for an accelerator, for example L4, A100 or H100")
    return value


def _check_labels(value: dict[str, str]) -> dict[str, str]:
    for name, wanted in value.items():
        if not (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", name) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", wanted)):
            raise ValueError(f"{name}={wanted}: a label of a node and its value, for example ray.io/node-group: caption")
    return value


AcceleratorType = Annotated[str, AfterValidator(_check_accelerator)]  # of the GPUs, by Ray's name; empty: any
NodeLabels = Annotated[dict[str, str], AfterValidator(_check_labels)]  # Ray's labels that a node must have; empty: any node


class ActorsConfig(Section):
    """What each actor of a stage is given: captioning, embedding, and the scoring of sentences."""

    gpus_per_actor: float = execution(0.0, ge=0)
    cpus_per_actor: float = execution(0.0, ge=0)  # 0: most of one CPU, and none beside a GPU
    memory_per_actor_bytes: int = execution(0, ge=0)  # set aside of a node's for each; 0: Ray does not count it
    accelerator_type: AcceleratorType = execution("")
    node_labels: NodeLabels = execution({})

    @model_validator(mode="after")
    def _has_gpu_of_its_type(self) -> Self:
        if self.accelerator_type and not self.gpus_per_actor:
            raise ValueError(
                f"accelerator_type={self.accelerator_type} without a GPU: set gpus_per_actor too, or leave the type out"
            )
        return self

    def without_gpus(self) -> ActorsConfig:
        """The same for work that no GPU can do."""
        names = ("cpus_per_actor", "memory_per_actor_bytes", "node_labels")
        return ActorsConfig(**{name: getattr(self, name) for name in names})


class TasksConfig(Section):
    """What each task of a stage is given that has no actors: reading."""

    cpus_per_task: float = execution(1.0, ge=0.01)
    memory_per_task_bytes: int = execution(0, ge=0)  # as of actors
    node_labels: NodeLabels = execution({})


class ResourcesConfig(Section):
    """What the pretraining may use, and what the whole run may count on."""

    # training ranks; [least, most]: as many as the cluster has, with a restart from the last checkpoint when that changes
    num_workers: int | tuple[int, int] = execution(2)
    cpus_per_worker: int = execution(1, ge=1)
    use_gpu: bool = execution(False)
    memory_per_worker_bytes: int = execution(0, ge=0)  # as of actors
    accelerator_type: AcceleratorType = execution("")
    # how ranks lie on nodes: on few or on many where that is possible, or (STRICT) on one, or on as many as there are ranks
    placement: Placement = execution("PACK")
    node_labels: NodeLabels = execution({})
    shared_filesystem: bool = execution(False)  # declares that every host has the same local paths (NFS, EFS)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _one_or_two_counts(cls, value: Any) -> int | tuple[int, int]:
        counts = value if isinstance(value, list | tuple) else [value]
        are_counts = len(counts) in (1, 2) and all(type(count) is int and count >= 1 for count in counts)
        if not are_counts or counts[0] > counts[-1]:
            raise ValueError("a number of workers from 1 on, or [least, most]")
        return int(counts[0]) if len(counts) == 1 else (int(counts[0]), int(counts[1]))

    @model_validator(mode="after")
    def _has_gpu_of_its_type(self) -> Self:
        if self.accelerator_type and not self.use_gpu:
            raise ValueError(
                f"resources.accelerator_type={self.accelerator_type} without a GPU: set resources.use_gpu=true, or leave the "
                "type out"
            )
        return self
