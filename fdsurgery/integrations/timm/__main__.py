"""Run a script in which timm knows names such as `resnet50.fdconv`.

```bash
python -m fdsurgery.integrations.timm train.py DATA --model resnet50.fdconv --pretrained
torchrun --nproc-per-node 2 -m fdsurgery.integrations.timm train.py DATA --model resnet50.fdconv
```
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the first argument names as if Python had been given it, with fdsurgery imported."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: python -m fdsurgery.integrations.timm SCRIPT.py [ARGUMENTS OF THE SCRIPT]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"{script}: no such file")
    del sys.argv[0]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
