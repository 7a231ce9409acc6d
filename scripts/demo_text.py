"""Write the demo's two texts into a folder: Python's own language reference, one half to calibrate on, one to evaluate.

Every Python installation has it (it is what `help()` shows), so the demo needs no download beside the model.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    texts = [topics[name] for name in sorted(topics)]
    (folder / "calibration.txt").write_text("\n\n".join(texts[0::2]), encoding="utf-8")
    (folder / "evaluation.txt").write_text("\n\n".join(texts[1::2]), encoding="utf-8")


if __name__ == "__main__":
    main()
