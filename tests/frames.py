"""Print the Python functions that one float32 ``EMAModel.update()`` enters, and their number."""

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import ema

ROOT = str(Path(ema.__file__).parent)


def entered() -> list[CodeType]:
    """The functions of ``ema`` that the third update of a small model enters, in order."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2))
    average = ema.EMAModel(model, decay=0.99)
    for _ in range(2):
        average.update()
    found: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            found.append(frame.f_code)

    sys.setprofile(profile)
    average.update()
    sys.setprofile(None)
    return found


def main() -> None:
    """Print them."""
    found = entered()
    for code in found:
        print(f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_name}")
    print(f"{len(found)} frames in {len({code.co_filename for code in found})} files")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
