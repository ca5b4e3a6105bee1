"""Predicted and measured errors of the final images of tiny pipelines under one budget.

    python scripts/one_budget.py FOLDER [--xl]

Builds a pipeline of random weights (Stable Diffusion's or SDXL's form) in FOLDER at 0.5 of FP16, and prints its table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mpq_deploy.models.pipeline_parts import whole_parts
from mpq_deploy.report.parts_page import pipeline_text
from mpq_deploy.run.several_parts import build_whole
from mpq_deploy.system.progress import PlainTalk
from tests.pipeline.runs import FEW_SCHEMES, recipe_for
from tests.tiny_models import WHOLE_LEVEL, tiny_text_pipeline_folder

# More calls than tests take, so that what is predicted is not noise.
COUNTS = {
    **{"calibrate__samples": 16, "calibrate__steps": 20, "calibrate__timesteps": 10},
    **{"measure__samples": 12, "measure__probes": 4, "measure__timesteps": 10},
    **{"measure__batch_size": 8, "calibrate__batch_size": 8, "quantize__hessian_rows": 512},
    **{"evaluate__steps": 20, "evaluate__samples": 8, "evaluate__timesteps": 10},
    **{"evaluate__controls": False, "component_samples": 32},
}


def main() -> None:
    """Build, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--xl", action="store_true")
    given = parser.parse_args()
    form = WHOLE_LEVEL if given.xl else {}
    model = tiny_text_pipeline_folder(given.folder, xl=given.xl, **form)
    settings = {**FEW_SCHEMES, **COUNTS, "target": "onnxruntime-cpu", "budget": 0.5}
    recipe, run = recipe_for(model, **settings), given.folder / "run"
    parts = whole_parts(recipe)
    assert parts is not None
    print(pipeline_text(build_whole(recipe, run, parts, "report", PlainTalk()), run))


if __name__ == "__main__":
    main()
