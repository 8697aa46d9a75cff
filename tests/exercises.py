"""What the tests of chapters share about their exercises."""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


def folded_solutions(notebook):
    """The function `answer` of every solution that is folded below an exercise of a notebook, in order."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    text, found = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), []
    for block in re.findall(r"<summary>Solution</summary>\s*```python\n(.*?)```", text, re.S):
        space = {"torch": torch, "F": F, "math": math}
        exec(block, space)
        found.append(space["answer"])
    return found


def check_solutions(module, checkers, notebook):
    """Every checker accepts the solution that the notebook gives, and there are as many of both."""
    solutions = folded_solutions(notebook)
    assert len(solutions) == len(checkers)
    for name, solution in zip(checkers, solutions): getattr(module, name)(solution)
