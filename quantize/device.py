"""Where to compute: the torch device and the number of threads that the command's options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch


def torch_device(name: str, threads: int | None) -> torch.device:
    """The torch device of `--device`; also sets the number of threads.

    Raises:
        BadInput: torch has no such device, or it is neither a CPU nor a CUDA device.
    """
    import torch

    from qembed.vllm import machine

    torch.set_num_threads(threads or len(machine.cores()))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: no such device; choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(f"--device {name}: torch sees no such CUDA device")
    return device
