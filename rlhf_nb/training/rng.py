"""The state of chance: kept and put back, and left as it was by what only looks."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def generators() -> dict[str, Any]:
    """Python's, NumPy's and torch's, as JSON has it. Our loops draw from none of them, but a reward may."""
    import numpy as np
    import torch

    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def put_back(state: dict[str, Any]) -> None:
    """Generators as they were: those that are named in what `generators` gave, or in its JSON."""
    import numpy as np
    import torch

    if "python" in state:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in state:
        keys, *rest = state["numpy"]
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    if "torch" in state:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))


@contextmanager
def undisturbed(*models: Any) -> Iterator[None]:
    """Put back every generator (Python, NumPy, torch, each accelerator) and every module's train or eval mode.

    What is sampled inside leaves the training that follows bit-identical.
    """
    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
